"""The script for a GPU of minutes, on CPU: what it finds, leaves out and says, not how fast."""

import json
import math
import os
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from benchmarks import device, device_parts, trl
from benchmarks.device_parts import Heads
from qrm.data import packing
from qrm.models import attention, families, flash, weights
from qrm.models.architecture import leaves
from qrm.studies import speed
from qrm.training import config, schema
from tests.helpers import ROOT, write_tokenizer

SMALL = device.Shape(
    'gpt2', {'vocab_size': 60, 'max_positions': 48, 'hidden_size': 16, 'num_layers': 1,
             'num_heads': 2}, 48, 64,
    settings=((1, 2), (1, 3), (2, 4)), repeats=1, steps=1, scored=3, per_device=(4, 8))
GROUPED = Heads(('gemma2', 'x'), 4, 2, 16, window=True, cap=50.0)
HEADER = {'card': 'NVIDIA H100', 'driver': '580', 'versions': {'jax': '0.11.2'},
          'shape': 'gpt2-small'}
RATES = {'comparisons_per_second': {'median': 8.0}, 'tokens_per_second': {'median': 90.0},
         'useful_flops_per_second': {'median': 1e12}, 'fraction_of_matmul_rate': 0.5,
         'model_flops_utilization': 0.25}
RESULT = {'training': RATES, 'scoring': RATES, 'memory': {'whole_run': 2**30},
          'startup': {'compile_seconds': 1.0},
          'loader': {'comparisons_per_second': {'median': 400.0}, 'times_training': 50.0}}
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


def checked(families_, heads):
    """Checks only these: a context."""
    patch = pytest.MonkeyPatch()
    patch.setattr(device_parts, 'HEADS', heads)
    patch.setattr(families, 'FAMILIES', {name: families.FAMILIES[name] for name in families_})
    return patch


@pytest.fixture(scope='module')
def found():
    """Rows of the comparison with dense attention, of a decoder alone and in an encoder."""
    rows, patch = [], checked(['modernbert'], (GROUPED,))
    try:
        device_parts.correctness(SMALL, rows.append, time.monotonic() + 1e6)
    finally:
        patch.undo()
    return {row['setting']: row for row in rows}


def test_every_implementation_is_checked_alone_and_in_a_network(found):
    assert sorted(found) == sorted([
        *(f'{name}, gemma2, x (4/2 heads of 16)'
          for name in ('pallas, float32', 'pallas, bfloat16', 'tiled, float32', 'tiled, bfloat16',
                       'dense, bfloat16')),
        *(f'{name}, float32, network of modernbert' for name in ('pallas', 'tiled'))])
    for row in found.values():
        assert row['result'].startswith('ok'), row
        assert max(row['errors'].values()) <= row['tolerance']
    exact, rounded = (found[f'pallas, {dtype}, gemma2, x (4/2 heads of 16)']
                      for dtype in ('float32', 'bfloat16'))
    assert set(exact['errors']) == {'out', 'dq', 'dk', 'dv'}
    assert exact['families'] == ('gemma2', 'x')
    # It did compute in bfloat16.
    assert rounded['errors']['out'] > 100 * exact['errors']['out']


def test_the_attention_of_every_family_is_checked_as_the_family_has_it():
    assert {family for heads in device_parts.HEADS for family in heads.families} == set(
        families.FAMILIES)
    assert len({heads[1:] for heads in device_parts.HEADS}) == len(device_parts.HEADS)
    for heads in device_parts.HEADS:
        for family in heads.families:
            a = device_parts.small_network(family, 128).architecture
            # Mistral's was in its first version.
            assert heads.window == (any(layer.window for layer in a.layers)
                                    and family != 'mistral')
            assert heads.cap == a.attention_cap
            assert heads.scale == (a.attention_scale or None)
            assert heads.causal == a.causal


@pytest.mark.parametrize('family', list(families.FAMILIES))
def test_small_networks_have_all_kinds_of_blocks(family):
    network = device_parts.small_network(family, 128)
    windows = {network.architecture.layer(i).window for i in range(4)}
    assert windows == {'mistral': {16}, 'gemma2': {0, 16}, 'gemma3_text': {0, 16},
                       'modernbert': {0, 17}}.get(family, {0})
    params = device_parts.random_params(network)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert abs(np.mean(leaf) - (path[-1].key == 'scale')) < 0.2


@pytest.mark.parametrize('share_prompt', [True, False])
def test_rows_hold_shared_prompts_or_whole_dialogues_and_padding(share_prompt):
    items = device_parts.mixed_comparisons(device.SHAPES['gpt2-small'], share_prompt=share_prompt)
    layouts = packing.plan_layouts(items, row_length=1024, rows=4)
    assert layouts[0].length == 1024
    packed = packing.pack(items, layouts)[0]
    counts = {len(items[i].responses) for i in packed.indices}
    assert counts == {2, 3, 4}
    assert packed.micro_batch.segments.shape == (4, 1024)
    real = packed.micro_batch.segments > 0
    assert 0.5 < np.mean(real) < 1
    assert np.any(packed.micro_batch.responses[real] == 0) == share_prompt
    assert all(item.longest <= 512 for item in items)


@pytest.mark.parametrize('shape', ['gpt2-small', 'tiny'])
@pytest.mark.parametrize('causal', [True, False])
def test_windows_are_shorter_than_dialogues(shape, causal):
    shape = device.SHAPES[shape]
    batch = device_parts.mixed_batch(shape, share_prompt=causal)
    whole, short = (attention.attention_mask(batch.segments, batch.responses, batch.positions,
                                             window=window, causal=causal)
                    for window in (0, shape.max_length // 8))
    real = batch.segments > 0
    assert 0.1 < np.sum(short[real]) / np.sum(whole[real]) < 0.9


def _mask_of_all_responses(monkeypatch):
    """Responses see each other."""
    right = flash._allowed

    def allowed(queries, keys, **kwargs):
        zero = [(segment, response * 0, *rest) for segment, response, *rest in (queries, keys)]
        return right(*zero, **kwargs)

    monkeypatch.setattr(flash, '_allowed', allowed)


def _mask_without_window(monkeypatch):
    right = flash._allowed

    def allowed(queries, keys, **kwargs):
        segment, response, position, first, last = queries
        return right((segment, response, position, first * 0, last), keys, **kwargs)

    monkeypatch.setattr(flash, '_allowed', allowed)


def _no_cap(monkeypatch):
    # In the kernels alone: the dense reference caps by the same function.
    for name in ('_forward_kernel', '_query_kernel', '_key_kernel'):
        right = getattr(flash, name)
        monkeypatch.setattr(flash, name, lambda *refs, cap, right=right: right(*refs, cap=0.0))


def _gradient_off_by_a_percent(monkeypatch):
    right = flash._query_kernel

    def kernel(*refs, cap):
        right(*refs, cap=cap)
        refs[-1][...] = refs[-1][...] * 1.01

    monkeypatch.setattr(flash, '_query_kernel', kernel)


def _one_nan(monkeypatch):
    right = flash.attend
    monkeypatch.setattr(flash, 'attend', lambda q, k, v, tiles, cap: right(
        q, k, v, tiles, cap).at[0, 0, 0, 0].set(jnp.nan))


@pytest.fixture
def retraced():
    """Nothing that was traced before is used, nor what is traced here afterwards."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(('damage', 'bad'), [
    (_mask_of_all_responses, {'out', 'dq', 'dk', 'dv'}),
    (_mask_without_window, {'out', 'dq', 'dk', 'dv'}),
    (_no_cap, {'out', 'dq', 'dk', 'dv'}),
    (_gradient_off_by_a_percent, {'dq'}),
    (_one_nan, {'out', 'dv'}),
])
def test_broken_attention_is_found(retraced, monkeypatch, damage, bad):
    damage(monkeypatch)
    checks = device_parts.attention_checks(
        GROUPED, device_parts.mixed_batch(SMALL, share_prompt=True), 12)
    row = next(check for row, check in checks if row['setting'].startswith('pallas, float32'))()
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
    monkeypatch.setattr(device, 'ATTENTION', ('pallas',))
    rows, patch = [], checked(['llama'], (GROUPED,))
    try:
        device_parts.correctness(SMALL, rows.append, time.monotonic() + 1e6)
    finally:
        patch.undo()
    assert [row['result'] for row in rows] == ['failed: ValueError: no such instruction'] * 3


def test_checks_stop_when_too_little_time_is_left(monkeypatch):
    now, rows, took = [0.0], [], []

    def check():
        now[0] += 10
        return {'result': 'ok'}

    monkeypatch.setattr(device_parts.time, 'monotonic', lambda: now[0])
    for _ in range(2):  # the second knows how long the first took
        device_parts.run_checks([({'setting': 'a'}, check)] * 2, rows.append, 32.0, took)
    late = 'not measured: 12 s left, 13 s needed'
    assert [row['result'] for row in rows] == ['ok', 'ok', late, late]


# Speed.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(speed._PRODUCT, 'cpu', (64, 1))
    monkeypatch.setattr(speed, '_LOADED', 1)


def test_a_sweep_writes_both_phases_of_each_setting(quick):
    rows, shape = [], SMALL._replace(settings=SMALL.settings[:1])
    device_parts.sweep(shape, 'dense', rows.append, time.monotonic() + 1e6)
    assert [row['phase'] for row in rows] == ['training', 'scoring', 'loader']
    training, scoring, loader = rows
    assert loader['comparisons_per_second'] > 0
    assert '% of the time of a step: ' in loader['result']
    assert training['setting'] == 'dense, rows 1, steps of 2'
    config = training['measured']['config']
    assert (config['model']['dtype'], config['model']['attention']) == ('bfloat16', 'dense')
    assert not config['model']['remat']
    for row in (training, scoring):
        assert all(row[key] > 0 for key in ('comparisons_per_second', 'tokens_per_second',
                                            'teraflops', 'fraction_of_matmul_rate'))
        assert row['model_flops_utilization'] is None  # of a CPU no peak is known
    assert training['peak_gib'] > 0
    assert training['compile_seconds'] > 0
    assert len(cells(device.format_report(HEADER, rows_of('sweep-dense', rows)))) == 4
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
    monkeypatch.setattr(speed, 'prepare', lambda config: config)
    monkeypatch.setattr(speed, 'measure', measure)


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
    assert [row['result'] for row in rows
            if row.get('phase') not in ('scoring', 'loader')] == results


def test_after_a_setting_that_fails_larger_ones_are_left_out(clocked, monkeypatch):
    right, calls = speed.measure, []

    def measure(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory\nwhile trying')
        return right(*args)

    monkeypatch.setattr(speed, 'measure', measure)
    rows = []
    device_parts.sweep(SMALL, 'dense', rows.append, 1e6)
    assert [row['result'] for row in rows] == [
        'measured', 'measured', '2% of the time of a step: never waited for',
        'failed: RuntimeError: RESOURCE_EXHAUSTED: Out of memory',
        'not measured: a smaller setting failed']


@pytest.mark.parametrize(('rows', 'name'), [([], 'auto'), (['pallas'], 'pallas')])
def test_a_second_shape_is_measured_with_the_attention_that_was_fastest(
    tmp_path, monkeypatch, rows, name
):
    path, calls = tmp_path / 'rows.jsonl', []
    path.write_text(''.join(json.dumps(
        {'attention': row, 'rows': 8, 'batch_size': 256, 'phase': 'training', 'result': 'measured',
         'comparisons_per_second': 1.0}) + '\n' for row in rows))
    monkeypatch.setattr(device_parts, 'sweep', lambda shape, name, *_: calls.append((shape, name)))
    device_parts.main(['--part=sweep-tiny-llama', '--shape=tiny', '--seconds=9', f'--rows={path}',
                       '--carried=x'])
    assert calls == [(device.SHAPES['tiny-llama'], name)]


def test_what_the_second_shape_trained_fastest_with_is_not_taken_for_the_first(
    tmp_path, monkeypatch
):
    path, calls = tmp_path / 'rows.jsonl', []
    path.write_text(''.join(json.dumps(
        {'part': part, 'attention': name, 'rows': 8, 'batch_size': 256, 'phase': 'training',
         'result': 'measured', 'comparisons_per_second': rate}) + '\n' for part, name, rate in (
             ('sweep-dense', 'dense', 1.0), ('sweep-tiny-llama', 'pallas', 9.0))))
    monkeypatch.setattr(device_parts, 'lengths', lambda shape, name, *_: calls.append(name))
    device_parts.main(['--part=lengths', '--shape=tiny', '--seconds=9', f'--rows={path}',
                       '--carried=x'])
    assert calls == ['dense']


def test_several_responses_best_of_many_and_long_prompts_have_rows(quick, monkeypatch):
    monkeypatch.setattr(device_parts, '_LONGER', 3)
    monkeypatch.setattr(device_parts, '_LONG', 2)
    monkeypatch.setattr(device_parts, '_BEST_OF', 3)
    rows = []
    device_parts.lengths(SMALL._replace(row_length=128), 'dense', rows.append,
                         time.monotonic() + 1e6)
    assert [(row['setting'], row['phase']) for row in rows] == [
        *(('dense, two to four responses', phase)
          for phase in ('training', 'scoring', 'loader', 'best of 3')),
        *(('dense, dialogues of 144', phase) for phase in ('training', 'scoring', 'loader'))]
    assert all(row['comparisons_per_second'] > 0 for row in rows)
    assert rows[3]['result'].endswith('times as fast as each alone')
    # A dialogue of the last ones is a row.
    config = rows[4]['measured']['config']
    assert config['train']['row_length'] == config['model']['sizes']['max_positions'] == 144


def test_long_pairs_fill_a_row_with_a_prompt():
    items = device_parts.long_pairs(SMALL._replace(max_length=8192), 3)
    assert [(len(item.prompt), item.lengths, item.size) for item in items] == [
        (7680, (256, 256), 8192)] * 3


# Attention beside the card's own.


def test_what_is_timed_is_the_attention_of_the_same_pairs():
    batch = device_parts.pairs_batch(SMALL)
    layers = device_parts.attention_layers(SMALL)
    assert layers == (2, 2, 8, 'xla')
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, *batch.segments.shape, 2, 8)).astype(np.float32)
    kernel, mask = (np.asarray(device_parts.layered(layers, batch, words)(q, k, v))
                    for words in ('pallas', 'xla, mask'))
    real = batch.segments > 0
    assert real.any()
    np.testing.assert_allclose(kernel[real], mask[real], atol=1e-5)
    found = list(device_parts.timed_attention(SMALL))
    assert [(words, phase) for words, phase, _ in found] == [
        (words, phase) for phase in ('forward', 'forward and backward')
        for words in ('pallas', 'xla, mask', 'xla, whole dialogues')]


def test_seconds_of_whole_dialogues_are_those_of_as_many_visible_pairs(monkeypatch):
    calls = []
    monkeypatch.setattr(device_parts, 'timed_layers', lambda layers, batch, words, phase, sizes: (
        calls.append((words, sizes)) or 2.0))
    seconds = [run() for *_, run in device_parts.timed_attention(SMALL)][:3]
    batch = device_parts.pairs_batch(SMALL)
    # Each token sees its prompt and those before it: positions are counted from 0.
    pairs = int(np.sum((batch.positions + 1)[batch.segments > 0]))
    rows = -(-pairs // (48 * 49 // 2))
    packed = batch.segments.shape
    assert calls[:3] == [('pallas', packed), ('xla, mask', packed),
                         ('xla, whole dialogues', (rows, 48))]
    assert seconds == [2.0, 2.0, pytest.approx(2.0 * pairs / (rows * 48 * 49 // 2))]


@pytest.mark.parametrize('words', ['xla, mask', 'xla, whole dialogues'])
def test_layers_are_timed_both_ways(monkeypatch, words):
    monkeypatch.setattr(device_parts, '_LAYERS', 2)
    layers, batch = device_parts.attention_layers(SMALL), device_parts.pairs_batch(SMALL)
    assert device_parts.timed_layers(layers, batch, words, 'forward and backward',
                                     batch.segments.shape) > 0


def test_attention_says_how_long_the_kernel_takes_beside_others(monkeypatch):
    def fail():
        raise ValueError('no such head')

    monkeypatch.setattr(device_parts, 'timed_attention', lambda shape: [
        ('pallas', 'forward', lambda: 0.003), ('cudnn, mask', 'forward', lambda: 0.002),
        ('cudnn, whole dialogues', 'forward', fail)])
    rows = []
    device_parts.attention_times(SMALL, rows.append, time.monotonic() + 1e6)
    assert [row['result'] for row in rows] == [
        '3 ms a layer', '2 ms a layer; the kernel takes 1.5 times as long',
        'failed: ValueError: no such head']
    assert not any('rows' in row for row in rows)  # none of them is a setting to train in


# Shapes.


@pytest.mark.parametrize('name', list(device.SHAPES))
def test_shapes_are_models(name):
    shape = device.SHAPES[name]
    found = config.architecture(device_parts.make_config(shape))
    assert found.max_positions >= shape.max_length
    count = sum(math.prod(leaf.shape) for leaf in leaves(found).values())
    published = {'gpt2-small': 124_439_808, 'smollm2-135m': 134_515_008,
                 'llama-1b': 1_235_814_400}  # meta-llama/Llama-3.2-1B
    assert count == published.get(name, count)
    assert shape.second in ('', *device.SHAPES)


@pytest.mark.parametrize('words', [40, 80])
def test_a_checkpoint_is_what_the_shape_says(tmp_path, monkeypatch, words):
    shape = SMALL._replace(
        family='llama', sizes=SMALL.sizes | {'num_kv_heads': 1, 'intermediate_size': 24},
        rest={'rope_theta': 100000.0, 'tie_word_embeddings': True})
    write_tokenizer(tmp_path / 'tokenizer', words)
    monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(manual_seed=lambda seed: None))
    # A config writes itself as a model would.
    monkeypatch.setattr(transformers, 'AutoModelForCausalLM', types.SimpleNamespace(
        from_config=lambda config: config))
    device_parts.make_checkpoint(shape, tmp_path / 'tokenizer', str(tmp_path / 'model'))
    a = families.architecture(weights.read_settings(str(tmp_path / 'model')))
    assert a.vocab_size == max(words, 60)
    assert (a.hidden_size, a.num_heads, a.num_kv_heads, a.intermediate_size) == (16, 2, 1, 24)
    assert a.layers[0].rotary.base == 100000.0
    assert a.tied
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')) == words


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
    # All of them can be taken home from a machine that gives back eight files.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'device.json', 'device.log', 'device.md']
    assert 'hello' in (tmp_path / 'device.log').read_text()


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


def test_parts_fill_the_time_in_the_order_of_importance():
    found = device.parts('gpt2-small')
    assert sum(found.values()) == 8.5 * 60
    assert [*found] == ['correctness', 'sweep-pallas', 'sweep-dense', 'attention', 'trl',
                        'sweep-llama-1b', 'lengths']
    assert [*device.parts('smollm2-135m')] == [part for part in device.PARTS if part != 'second']
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

    def fastest(*rows):
        return device_parts.best(rows, SMALL)['comparisons_per_second']

    assert device_parts.best([], SMALL) == {'attention': 'auto', 'rows': 1, 'batch_size': 2}
    rows = [row('dense', 1.0), row('dense', 3.0), row('pallas', 5.0),
            row('dense', 9.0, phase='scoring'),
            {'attention': 'dense', 'rows': 32, 'result': 'failed: memory'}, {'result': 'failed: x'}]
    assert fastest(*rows) == 5.0
    wrong = {'attention': 'pallas', 'result': 'wrong, at most 1e-05: out nan'}
    assert fastest(wrong | {'families': ['bert', 'gpt2']}, *rows) == 3.0
    assert fastest(wrong | {'families': ['gemma2']}, *rows) == 5.0


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
    assert not any('sizes' in argument or 'family' in argument
                   for argument in kwargs['config_args'])
    assert [(row.get('phase'), row.get('comparisons_per_second'), row['result'])
            for row in found] == [
        ('training, qrm', 8.0, 'measured'), ('scoring, qrm', 8.0, 'measured'),
        ('loader, qrm', 400.0, '2% of the time of a step: never waited for'),
        ('training, TRL', 2.0, 'qrm: 4.00 times as fast'),
        ('scoring, TRL', 2.0, 'qrm: 4.00 times as fast'),
        ('scoring, sorted, TRL', 2.0, 'qrm: 4.00 times as fast'),
        (None, None, 'failed: ConfigError: trl failed: out of memory')]
    assert found[3]['peak_gib'] == 2.0


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
