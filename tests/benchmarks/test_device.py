"""The script for a GPU of minutes, on CPU: what it finds, leaves out and says, not how fast."""

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import device, device_parts, trl
from qrm.data import packing
from qrm.models import attention, flash
from qrm.studies import benchmark
from qrm.training import schema
from tests.helpers import ROOT

SMALL = device.Shape(
    {'n_embd': 16, 'n_layer': 1, 'n_head': 2, 'n_positions': 48, 'vocab_size': 60}, 48, 64,
    settings=((1, 2), (1, 3), (2, 4)), repeats=1, steps=1, scored=3, per_device=(4, 8))
HEADER = {'card': 'NVIDIA H100', 'driver': '580', 'versions': {'jax': '0.11.2'},
          'shape': 'gpt2-small'}
RATES = {'comparisons_per_second': {'median': 8.0}, 'tokens_per_second': {'median': 90.0},
         'useful_flops_per_second': {'median': 1e12}, 'fraction_of_matmul_rate': 0.5,
         'model_flops_utilization': 0.25}
RESULT = {'training': RATES, 'scoring': RATES, 'memory': {'whole_run': 2**30},
          'startup': {'compile_seconds': 1.0}}
SCRIPT = str(ROOT / 'benchmarks' / 'device.sh')


def program(text):
    """A command that runs this Python, in which `append(row)` writes to the file of rows."""
    return lambda path: [sys.executable, '-c', f"""
import json, os, subprocess, sys, time
def write(text):
    with open({str(path)!r}, 'a') as file:
        file.write(text)
def append(row):
    write(json.dumps({{'part': 'p'}} | row) + chr(10))
{text}"""]


def run_programs(tmp_path, programs, seconds=60.0):
    """Rows of parts that are these programs, of equal weight."""
    commands = {name: program(text)(tmp_path / 'rows.jsonl') for name, text in programs.items()}
    return device.run(dict.fromkeys(programs, 1), lambda part, _: commands[part], tmp_path,
                      time.monotonic() + seconds, HEADER)


def cells(table):
    """Cells of a Markdown table, all rows of which must have as many."""
    lines = [line for line in table.splitlines() if line.startswith('|')]
    rows = [[cell.strip() for cell in line.replace(r'\|', '').strip('|').split('|')]
            for line in lines]
    assert len({len(row) for row in rows}) == 1
    assert set(rows[1]) == {'---'}
    return rows[:1] + rows[2:]


# Correctness.


@pytest.fixture(scope='module')
def found():
    """Rows of the comparison with dense attention."""
    rows = []
    device_parts.correctness(SMALL, rows.append)
    return rows


def test_every_implementation_is_checked_alone_and_in_a_network(found):
    assert [row['setting'] for row in found] == [
        f'{name}, {what}' for name in ('pallas', 'tiled')
        for what in ('float32', 'bfloat16', 'network, float32')]
    for row in found:
        assert row['result'].startswith('ok'), row
        assert max(row['errors'].values()) <= row['tolerance']
    assert set(found[0]['errors']) == {'out', 'dq', 'dk', 'dv'}
    assert 'dense' in found[1]['result']
    # It did compute in bfloat16.
    assert found[1]['errors']['out'] > 100 * found[0]['errors']['out']


def test_rows_hold_shared_prompts_and_padding():
    items = device_parts.mixed_comparisons(device.SHAPES['gpt2-small'], seed=0)
    layouts = packing.plan_layouts(items, row_length=1024, rows=4)
    assert layouts[0].length == 1024
    packed = packing.pack(items, layouts)[0]
    counts = {len(items[i].responses) for i in packed.indices}
    assert counts == {2, 3, 4}
    assert packed.micro_batch.segments.shape == (4, 1024)
    assert np.any(packed.micro_batch.segments == 0)
    assert all(item.longest <= 512 for item in items)


def _mask_of_all_responses(monkeypatch):
    """Responses see each other."""
    right = flash._allowed

    def allowed(queries, keys, **kwargs):
        zero = [(place, segment, response * 0) for place, segment, response in (queries, keys)]
        return right(*zero, **kwargs)

    monkeypatch.setattr(flash, '_allowed', allowed)


def _gradient_off_by_a_percent(monkeypatch):
    right = flash._query_kernel

    def kernel(*refs):
        right(*refs)
        refs[-1][...] = refs[-1][...] * 1.01

    monkeypatch.setattr(flash, '_query_kernel', kernel)


def _one_nan(monkeypatch):
    right = flash.attend
    monkeypatch.setattr(flash, 'attend', lambda q, k, v, tiles: right(
        q, k, v, tiles).at[0, 0, 0, 0].set(jnp.nan))


@pytest.fixture
def retraced():
    """Nothing that was traced before is used, nor what is traced here afterwards."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(('damage', 'bad'), [
    (_mask_of_all_responses, {'out', 'dq', 'dk', 'dv'}),
    (_gradient_off_by_a_percent, {'dq'}),
    (_one_nan, {'out', 'dv'}),
])
def test_broken_attention_is_found(retraced, monkeypatch, damage, bad):
    damage(monkeypatch)
    items = device_parts.mixed_comparisons(SMALL, seed=0)
    layouts = packing.plan_layouts(items, row_length=64, rows=4)
    attend = device_parts.make_attend(packing.pack(items, layouts)[0].micro_batch, SMALL)
    row = device_parts.check_attention(attend, 'pallas', 'float32')
    assert row['result'].startswith('wrong')
    assert {name for name, error in row['errors'].items() if not error <= 1e-5} == bad


def test_a_broken_network_is_found():
    exact = np.ones(4), {'block': np.ones(3), 'zero': np.zeros(2)}
    for rewards, block in ((1.001, 1.0), (1.0, 1.001), (1.0, np.nan)):
        other = rewards * exact[0], exact[1] | {'block': block * np.ones(3)}
        row = device_parts.check_network({'dense': exact, 'pallas': other}.get, 'pallas')
        assert row['result'].startswith('wrong')
    assert device_parts.check_network(lambda name: exact, 'pallas')['result'].startswith('ok')


def test_one_that_does_not_compile_says_so(monkeypatch):
    def attend(q, *unused):
        raise ValueError('no such instruction\nmore')

    monkeypatch.setattr(flash, 'attend', attend)
    monkeypatch.setattr(device_parts, 'CHECKED', ('pallas',))
    rows = []
    device_parts.correctness(SMALL, rows.append)
    assert [row['result'] for row in rows] == ['failed: ValueError: no such instruction'] * 3


# Speed.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(benchmark._PRODUCT, 'cpu', (64, 1))
    monkeypatch.setattr(benchmark, '_LOADED', 1)


def test_a_sweep_writes_both_phases_of_each_setting(quick):
    rows, shape = [], SMALL._replace(settings=SMALL.settings[:1])
    device_parts.sweep(shape, 'dense', rows.append, time.monotonic() + 1e6)
    assert [row['phase'] for row in rows] == ['training', 'scoring']
    training, scoring = rows
    assert training['setting'] == 'rows 1, steps of 2'
    config = training['measured']['config']
    assert (config['model']['dtype'], config['model']['attention']) == ('bfloat16', 'dense')
    assert not config['model']['remat']
    for row in rows:
        assert all(row[key] > 0 for key in ('comparisons_per_second', 'tokens_per_second',
                                            'teraflops', 'fraction_of_matmul_rate'))
        assert row['model_flops_utilization'] is None  # of a CPU no peak is known
    assert training['peak_gib'] > 0
    assert training['compile_seconds'] > 0
    assert len(cells(device.format_report(HEADER, rows_of('sweep-dense', rows)))) == 3
    assert 'measured' not in scoring


def rows_of(part, rows):
    return [{'part': part} | row for row in rows]


@pytest.fixture
def clocked(monkeypatch):
    """A clock that measuring moves: by 10, 20 and 30 seconds."""
    now, seconds = [0.0], iter((10.0, 20.0, 30.0))

    def measure(*unused):
        now[0] += next(seconds)
        return RESULT

    monkeypatch.setattr(device_parts.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(benchmark, 'prepare', lambda config: config)
    monkeypatch.setattr(benchmark, 'measure', measure)


@pytest.mark.parametrize(('deadline', 'results'), [
    # The second is started with 13 seconds left, 1.3 times what the first one took, or more; the
    # third, after 30, needs 26.
    (23.0, ['measured', 'measured', 'not measured: -7 s left, 26 s needed']),
    (22.9, ['measured', *['not measured: 13 s left, 13 s needed'] * 2]),
    (55.9, ['measured', 'measured', 'not measured: 26 s left, 26 s needed']),
    (56.1, ['measured', 'measured', 'measured']),
])
def test_a_sweep_stops_when_too_little_time_is_left(clocked, deadline, results):
    rows = []
    device_parts.sweep(SMALL, 'dense', rows.append, deadline)
    assert [row['result'] for row in rows if row.get('phase') != 'scoring'] == results


def test_after_a_setting_that_fails_larger_ones_are_left_out(clocked, monkeypatch):
    right, calls = benchmark.measure, []

    def measure(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory\nwhile trying')
        return right(*args)

    monkeypatch.setattr(benchmark, 'measure', measure)
    rows = []
    device_parts.sweep(SMALL, 'dense', rows.append, 1e6)
    assert [row['result'] for row in rows] == [
        'measured', 'measured', 'failed: RuntimeError: RESOURCE_EXHAUSTED: Out of memory',
        'not measured: a smaller setting failed']


# Parts and their time.


def test_what_goes_wrong_in_a_part_stays_in_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(device, '_LEAST', 0.1)
    rows = run_programs(tmp_path, {
        'good': 'append({"result": "one"}); append({"result": "two"})',
        'raises': 'append({"result": "before"}); raise ValueError("broken | pipe")',
        'silent': 'pass',
        'dies': 'print("hello", flush=True); os.kill(os.getpid(), 11)',
        'cut': """write('{"part": "p", "resu'); sys.exit("cut")""",
        'last': 'append({"result": "three"})',
    })
    assert [row['result'] for row in rows] == [
        'one', 'two', 'before', 'failed: ValueError: broken | pipe', 'failed: it printed no result',
        'failed: SIGSEGV; hello', 'failed: cut', 'three']
    assert [row['part'] for row in rows[3:7]] == ['raises', 'silent', 'dies', 'cut']
    written = json.loads((tmp_path / 'device.json').read_text())
    assert written['rows'] == rows
    assert written['card'] == 'NVIDIA H100'
    assert len(cells((tmp_path / 'device.md').read_text())) == 1 + len(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ['device.json', 'device.md', *(f'{name}.log' for name in (
            'good', 'raises', 'silent', 'dies', 'cut', 'last'))])


def test_a_part_that_hangs_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(device, '_LEAST', 0.1)
    rows = run_programs(tmp_path, {
        'hangs': """
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
append({"result": str(child.pid)})
print('waiting', flush=True)
time.sleep(600)""",
        'next': 'append({"result": "fine"})',
    }, seconds=6.0)
    child, stopped, fine = (row['result'] for row in rows)
    assert stopped == 'failed: stopped after 3 s; waiting'
    assert fine == 'fine'
    deadline = time.monotonic() + 5  # until whoever inherits it has noticed
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child)


def runs(process):
    """Whether there is a process with this id that has not ended; a zombie has."""
    done = subprocess.run(['ps', '-o', 'stat=', '-p', process], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ('', 'Z')


def test_time_is_shared_by_weight():
    # 100 seconds for weights 1, 3 and 1: 20; if 10 of them are left over, 3/4 of 90; then all.
    assert device.limit([1, 3, 1], 100.0) == 20.0
    assert device.limit([3, 1], 90.0) == 67.5
    assert device.limit([1], 40.0) == 40.0
    assert device.limit([1, 3], -2.0) == 0.0


def test_without_time_nothing_is_started(tmp_path):
    rows = run_programs(tmp_path, {'a': 'append({"result": "x"})', 'b': ''}, seconds=1.0)
    assert [row['result'] for row in rows] == ['not measured: no time left'] * 2


def test_all_results_can_be_taken_home():
    # At most eight files.
    assert len(device.PARTS) + len(['device.json', 'device.md', 'rows.jsonl']) <= 8
    assert {part.removeprefix('sweep-') for part in device.PARTS} == {
        'correctness', 'trl', *device.ATTENTION}
    assert set(device.ATTENTION) == set(attention.IMPLEMENTATIONS) - {'auto'}


def test_the_table_shows_every_row_and_escapes_marks():
    rows = [
        {'part': 'a', 'setting': 's', 'phase': 'training', 'comparisons_per_second': 4321.5,
         'tokens_per_second': 912345.6, 'teraflops': 480.0, 'fraction_of_matmul_rate': 0.654,
         'model_flops_utilization': 0.5, 'peak_gib': 61.25, 'compile_seconds': 12.3,
         'result': 'measured'},
        {'part': 'b', 'result': 'failed: a|b <c> *d*\ne'},
        {'part': 'c', 'model_flops_utilization': None, 'result': 'x' * 500},
    ]
    report = device.format_report(HEADER, rows)
    assert report.startswith('NVIDIA H100, driver 580; jax 0.11.2; gpt2-small\n\n| part |')
    head, *body = cells(report)
    assert [len(line) for line in body] == [len(head)] * 3
    assert body[0] == ['a', 's', 'training', '4,322', '912,346', '480', '65.4%', '50.0%', '61.2',
                       '12.3', 'measured']
    assert 'failed: a\\|b \\<c\\> \\*d\\* e' in report
    assert len(body[2][-1]) < 200


# Beside TRL.


def test_without_pairs_there_is_no_trl(tmp_path):
    rows = []
    device_parts.trl(SMALL, rows.append, tmp_path, [], time.monotonic() + 60)
    assert rows == [
        {'result': 'not measured: no pairs (device.sh prepare --tokenizer --pairs)'}]


def test_qrm_runs_in_its_best_setting_beside_trl():
    def row(name, rate, result='measured', phase='training'):
        return {'attention': name, 'rows': 8, 'batch_size': 256, 'phase': phase, 'result': result,
                'comparisons_per_second': rate}

    assert device_parts.best([]) is None
    rows = [row('dense', 1.0), row('dense', 3.0), row('pallas', 5.0),
            row('dense', 9.0, phase='scoring'),
            {'attention': 'dense', 'rows': 32, 'result': 'failed: memory'}, {'result': 'failed: x'}]
    assert device_parts.best(rows)['comparisons_per_second'] == 5.0
    wrong = {'attention': 'pallas', 'result': 'wrong, at most 1e-05: out nan'}
    assert device_parts.best([wrong, *rows])['comparisons_per_second'] == 3.0


def test_trl_is_given_the_best_setting(tmp_path, monkeypatch):
    (tmp_path / 'tokenizer').mkdir()
    (tmp_path / 'tokenizer' / 'vocab.json').write_text('{}')
    (tmp_path / 'pairs.jsonl').write_text('{}')
    calls = []

    def compare(config, folder, **kwargs):
        calls.append((config, kwargs))
        os.mkdir(folder)
        (device.Path(folder) / 'trl-1.log').write_text('what TRL printed')
        if kwargs['per_device'] == 8:
            raise schema.ConfigError('trl failed: out of memory')
        result = {
            'rounds': [{'qrm': RESULT, 'trl': {'peak_memory': 2**31}}],
            'comparisons_per_second': {name: {'trl': {'median': 2.0}} for name in (
                'training', 'scoring', 'scoring_sorted')},
            'ratios': {name: {'median': 4.0} for name in ('training', 'scoring', 'scoring_sorted')}}
        (device.Path(folder) / 'benchmark_trl.json').write_text(json.dumps(result))
        return 'table'

    monkeypatch.setattr(trl, 'compare', compare)
    monkeypatch.setattr(device_parts, 'make_checkpoint', lambda *unused: None)
    found, before = [], {'attention': 'pallas', 'rows': 16, 'batch_size': 512, 'phase': 'training',
                         'result': 'measured', 'comparisons_per_second': 9.0}
    device_parts.trl(SMALL, found.append, tmp_path, [before], time.monotonic() + 60)
    (config, kwargs), _ = calls
    assert (config.model.attention, config.model.dtype, config.train.rows,
            config.train.batch_size) == ('pallas', 'bfloat16', 16, 512)
    assert config.data.path == str(tmp_path / 'pairs.jsonl')
    assert {'--config.model.attention=pallas', '--config.train.rows=16'} < set(
        kwargs['config_args'])
    assert not any('sizes' in argument for argument in kwargs['config_args'])
    assert [(row.get('phase'), row.get('comparisons_per_second'), row['result'])
            for row in found] == [
        ('training, qrm', 8.0, 'measured'), ('scoring, qrm', 8.0, 'measured'),
        ('training, TRL', 2.0, 'qrm: 4.00 times as fast'),
        ('scoring, TRL', 2.0, 'qrm: 4.00 times as fast'),
        ('scoring, sorted, TRL', 2.0, 'qrm: 4.00 times as fast'),
        (None, None, 'failed: ConfigError: trl failed: out of memory')]
    assert found[2]['peak_gib'] == 2.0


# The script.


def script(*arguments, **environment):
    done = subprocess.run(['bash', SCRIPT, *arguments], capture_output=True, text=True,
                          env=os.environ | {'PYTHON': sys.executable} | environment)
    return done.returncode, done.stdout, done.stderr


def test_the_script_is_bash():
    subprocess.run(['bash', '-n', SCRIPT], check=True)


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--colour=red'], "unknown argument '--colour=red'"),
    (['prepare', '--weights=x'], "prepare: unknown argument '--weights=x'"),
    (['prepare', '--tokenizer=no/folder'], f'--tokenizer={ROOT}/no/folder: no such folder'),
    (['prepare', '--pairs=pairs.csv'], f'--pairs={ROOT}/pairs.csv: expected a .jsonl or .jsonl'),
    (['prepare', '--pairs=no.jsonl'], f'--pairs={ROOT}/no.jsonl: no such file'),
])
def test_bad_arguments_end_in_one_clear_line(arguments, message):
    code, out, err = script(*arguments)
    assert (code, out) == (2, '')
    assert err.startswith(f'error: {message}')
    assert err.count('\n') == 1


@pytest.mark.parametrize(('argument', 'message'), [
    ('--minutes=soon', "argument --minutes: 'soon', expected a number above 0"),
    ('--minutes=0', "argument --minutes: '0', expected a number above 0"),
    ('--shape=gpt5', 'argument --shape: invalid choice'),
])
def test_bad_values_end_in_one_clear_line(argument, message, capsys):
    with pytest.raises(SystemExit) as stop:
        device.parse([argument])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f'error: {message}')
    assert err.count('\n') == 1


def test_the_orchestrator_starts_without_libraries():
    code = 'import sys; from benchmarks import device; print(sorted(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert not {'jax', 'numpy', 'qrm', 'torch'} & set(json.loads(done.stdout.replace("'", '"')))
