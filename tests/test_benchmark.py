"""Tests of the benchmark: what is counted and written, never how long anything takes."""

import importlib.util
import json
import os
import shutil
import statistics
import sys
import time

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from experiments import benchmark_trl, trl_worker
from qrm import benchmark, config, costs, experiment_figures
from qrm.comparisons import DataError
from tests.helpers import ROOT, encoded, load_config, simulated
from tests.test_commands import command
from tests.test_weights import REFERENCE, _write_tokenizer

SMALL = {
    'model.sizes.vocab_size': 300, 'model.sizes.n_positions': 64, 'model.sizes.n_embd': 16,
    'model.sizes.n_layer': 1, 'model.sizes.n_head': 2, 'data.max_length': 64,
    'train.batch_size': 4, 'train.row_length': 64, 'train.rows': 2, 'benchmark.repeats': 2,
    'benchmark.steps': 2, 'benchmark.comparisons': 30, 'benchmark.scored': 6,
    'benchmark.responses': 3, 'benchmark.prompt': 20, 'benchmark.response': 10,
}
# With words for tokens and the reference checkpoint of 40 words.
WORDS = {
    'data.max_length': 24, 'train.batch_size': 4, 'train.row_length': 24, 'train.rows': 2,
    'benchmark.repeats': 2, 'benchmark.scored': 6, 'benchmark.responses': 0,
}


def small(**changes):
    return load_config('benchmark', **SMALL | changes)


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """A folder with the results of a small benchmark, in place of older ones, and the table."""
    folder = tmp_path_factory.mktemp('benchmark')
    (folder / 'benchmark.json').write_text('{"older": 1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark._PRODUCT, 'cpu', (64, 1))
        return folder, benchmark.benchmark(small(), str(folder))


@pytest.fixture(scope='module')
def result(measured):
    with open(f'{measured[0]}/benchmark.json', encoding='utf-8') as file:
        return json.load(file)


@pytest.fixture(scope='module')
def items():
    """The comparisons of the small benchmark."""
    return benchmark.prepare(small()).encoded


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """A checkpoint whose tokens are words, and a file of pairs of its words."""
    folder = tmp_path_factory.mktemp('words')
    checkpoint = folder / 'checkpoint'
    checkpoint.mkdir()
    for name in ('config.json', 'model.safetensors'):
        shutil.copyfile(REFERENCE / name, checkpoint / name)
    _write_tokenizer(checkpoint)
    rng = np.random.default_rng(0)

    def text(most):
        return ''.join(f' w{i}' for i in rng.integers(1, 38, rng.integers(2, most)))

    rows = [{'id': str(i), 'prompt': f'w{i % 38}{text(15)}', 'chosen': text(12),
             'rejected': text(12)} for i in range(40)]
    path = folder / 'pairs.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return {'model.checkpoint': str(checkpoint), 'data.path': str(path)}


# What is measured.


def test_everything_is_written_with_its_repeats(measured, result):
    folder, table = measured
    assert set(result) == {
        'machine', 'versions', 'config', 'data', 'model', 'matmul', 'startup', 'memory',
        'training', 'scoring', 'best_of_n', 'loader', 'savings'}
    timings = [result['matmul']['flops_per_second'], result['loader']['comparisons_per_second'],
               *(result['best_of_n'][key] for key in
                 ('together_seconds', 'alone_seconds', 'ratio')),
               *(result[part][key] for part in ('training', 'scoring') for key in (
                   'seconds', 'comparisons_per_second', 'tokens_per_second',
                   'useful_flops_per_second'))]
    for timing in timings:
        assert set(timing) == {'median', 'min', 'max', 'repeats'}
        assert 0 < timing['min'] <= timing['median'] <= timing['max'] < float('inf')
        assert timing['median'] == statistics.median(timing['repeats'])
    assert len(result['matmul']['flops_per_second']['repeats']) == 4  # before both, twice
    assert all(value > 0 for value in result['startup'].values())
    assert 0 < result['memory']['after_first_step'] <= result['memory']['whole_run']
    assert result['config']['benchmark']['repeats'] == 2
    assert result['machine']['cores'] == os.cpu_count()
    assert result['training']['model_flops_utilization'] is None
    assert (folder / 'benchmark.png').stat().st_size > 10_000
    assert 'training: useful work' in table
    assert 'synthetic' in table


def test_training_rates_are_work_over_time(result, items):
    training, cfg = result['training'], small()
    steps = [benchmark.training_items(cfg, items, number) for number in range(5)]
    assert len({item.id for part in steps for item in part}) == 20  # one epoch holds them all
    repeats = [steps[1] + steps[2], steps[3] + steps[4]]
    assert training['comparisons'] == [8, 8]
    assert training['tokens'] == [sum(item.size for item in part) for part in repeats]
    decoder = config.decoder_config(cfg)
    assert training['useful_flops'] == [
        costs.useful_flops(decoder, part, training=True) for part in repeats]
    for key, amounts in (('comparisons_per_second', 'comparisons'), ('tokens_per_second', 'tokens'),
                         ('useful_flops_per_second', 'useful_flops')):
        np.testing.assert_allclose(
            np.multiply(training[key]['repeats'], training['seconds']['repeats']),
            training[amounts])


@pytest.mark.parametrize('part', ['training', 'scoring'])
def test_fraction_is_useful_work_over_the_product(result, part):
    assert result[part]['fraction_of_matmul_rate'] == pytest.approx(
        result[part]['useful_flops_per_second']['median']
        / result['matmul']['flops_per_second']['median'])


def test_scoring_takes_the_same_comparisons_each_time(result, items):
    scored = benchmark.scoring_items(small(), items)
    assert result['scoring']['comparisons'] == [6, 6]
    assert result['scoring']['tokens'] == [sum(item.size for item in scored)] * 2
    assert result['scoring']['useful_flops'][0] == costs.useful_flops(
        config.decoder_config(small()), scored, training=False)


def test_best_of_n_states_what_arithmetic_allows(result):
    best = result['best_of_n']
    assert (best['prompt'], best['responses'], best['response']) == (20, 3, 10)
    # One block of width 16: 12 * 16**2 parameters. A prompt of 20 tokens has 210 pairs, a response
    # of 10 has 10 * 20 + 55 = 255. Alone three times 30 tokens, together 50.
    alone = 3 * (30 * 2 * 3072 + (210 + 255) * 4 * 16)
    together = 50 * 2 * 3072 + (210 + 3 * 255) * 4 * 16
    assert best['useful_flops_ratio'] == pytest.approx(alone / together)
    np.testing.assert_allclose(best['ratio']['repeats'], np.divide(
        best['alone_seconds']['repeats'], best['together_seconds']['repeats']))


def test_savings_by_hand():
    # Dialogues of 3, 5 and 6, 5 tokens; distinct 2 + 1 + 3 and 4 + 2 + 1, with 9 + 9 in all.
    items = [encoded('x', 2, (1, 3)), encoded('y', 4, (2, 1))]
    assert benchmark.savings(items, slots=32, real=15) == {
        'comparisons': 2, 'distinct_tokens': 13, 'repeated_tokens': 19, 'packed_tokens': 15,
        'packed_slots': 32, 'padded_slots': 24, 'padded_batch': 8,
        'distinct_of_repeated': 13 / 19, 'fill': 15 / 32, 'padded_fill': 19 / 24,
        'padded_over_packed': 24 / 32}


def test_slots_are_those_of_the_timed_steps(result):
    saved, training = result['savings'], result['training']
    assert saved['comparisons'] == sum(training['comparisons'])
    assert saved['distinct_tokens'] == sum(training['tokens'])
    assert saved['distinct_tokens'] <= saved['packed_tokens'] <= saved['packed_slots']
    assert saved['packed_slots'] % 128 == 0  # two rows of 64 tokens


def test_figure_shows_shares_and_slots(result):
    rate = {'median': 4e12, 'min': 3e12, 'max': 6e12}
    figure = experiment_figures.draw_benchmark(result | {
        'matmul': {'flops_per_second': rate},
        'training': {'useful_flops_per_second': {'median': 1e12, 'min': 1e12, 'max': 2e12}},
        'scoring': {'useful_flops_per_second': rate},
        'savings': benchmark.savings([encoded('x', 2, (1, 3)), encoded('y', 4, (2, 1))], 32, 15)})
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ['4', '1 (25%)', '4 (100%)']
    assert 'TFLOP/s' in left.get_xlabel()
    # Distinct tokens, repeated prompts and padding; a comparison, packed and padded.
    assert [bar.get_width() for bar in right.patches] == [6.5, 6.5, 1, 3, 8.5, 2.5]


def test_peaks_of_devices():
    assert benchmark.peak_rate('NVIDIA H200', 'bfloat16') == 989e12
    assert benchmark.peak_rate('NVIDIA H100 80GB HBM3', 'bfloat16') == 989e12
    assert benchmark.peak_rate('NVIDIA H100 PCIe', 'bfloat16') == 756e12
    assert benchmark.peak_rate('TPU v5 lite', 'bfloat16') == 197e12
    assert benchmark.peak_rate('TPU v5p', 'bfloat16') == 459e12
    assert benchmark.peak_rate('NVIDIA H200', 'float32') is None
    assert benchmark.peak_rate('cpu', 'bfloat16') is None


def test_summary_and_process_time():
    assert benchmark.summary([3.0, 1.0, 2.0]) == {
        'median': 2.0, 'min': 1.0, 'max': 3.0, 'repeats': [3.0, 1.0, 2.0]}
    first = benchmark.process_seconds()
    time.sleep(0.02)
    assert 0 < first < benchmark.process_seconds()


# Synthetic comparisons.


def test_synthetic_lengths_are_those_of_hh():
    items = benchmark.synthetic(1500, vocab_size=50257, max_length=512, seed=0)
    sizes = [item.size for item in items]
    # Of the real pairs: mean 211, percentiles and means as in `benchmark`'s comment.
    assert np.mean(sizes) == pytest.approx(211, rel=0.03)
    np.testing.assert_allclose(np.percentile(sizes, [25, 50, 75, 90, 95, 99]),
                               [107, 177, 284, 404, 497, 604], rtol=0.08)
    assert np.mean([len(item.prompt) for item in items]) == pytest.approx(118, rel=0.03)
    assert costs.repeated_tokens(items) / len(items) == pytest.approx(329, rel=0.03)
    assert max(item.longest for item in items) <= 512
    assert 50000 < max(item.prompt.max() for item in items) < 50257


@pytest.mark.parametrize('max_length', [1, 16, 64])
def test_synthetic_dialogues_fit_and_depend_on_the_seed_alone(max_length):
    items, again, other = (benchmark.synthetic(50, vocab_size=9, max_length=max_length, seed=seed)
                           for seed in (1, 1, 2))
    assert all(item.longest <= max_length for item in items)
    assert all(len(response) for item in items for response in item.responses)

    def ids(comparisons):
        return [[part.tolist() for part in (item.prompt, *item.responses)] for item in comparisons]

    assert ids(items) == ids(again) != ids(other)


def test_real_text_and_checkpoint(words):
    cfg = load_config('benchmark', **WORDS | words)
    workload = benchmark.prepare(cfg)
    assert workload.network.decoder.vocab_size == 40
    assert 20 < len(workload.encoded) < 40
    assert workload.source.startswith(words['data.path'])
    synthetic = benchmark.prepare(load_config('benchmark', **WORDS | words | {'data.path': ''}))
    assert synthetic.network.decoder == workload.network.decoder
    np.testing.assert_array_equal(synthetic.params['decoder']['wte'],
                                  workload.params['decoder']['wte'])


@pytest.mark.parametrize(('changes', 'message'), [
    ({'benchmark.repeats': 0}, 'config.benchmark.repeats=0, expected a number of at least 1'),
    ({'benchmark.response': 50}, 'config.benchmark.prompt=20 and response=50, expected at most 64'),
    ({'data.max_length': 65}, 'config.data.max_length=65, but the model has 64 positions'),
])
def test_bad_values_name_their_keys(changes, message, tmp_path):
    with pytest.raises(config.ConfigError, match=message):
        benchmark.benchmark(small(**changes), str(tmp_path))


def test_other_configs_are_refused(tmp_path):
    with pytest.raises(config.ConfigError, match='config.benchmark: no such section'):
        benchmark.benchmark(load_config('demo'), str(tmp_path))


# Beside TRL, for which a program stands in that writes what the worker would.

STUB = """#!{python}
import json, runpy, sys
worker = runpy.run_path(sys.argv[1])
args = worker['parse'](sys.argv[2:])
pairs = {{name: worker['read'](getattr(args, name)) for name in ('training', 'scoring')}}
count = args.batch_size * args.steps
rates = {{'comparisons_per_second': worker['summary']([2.0] * args.repeats)}}
words = lambda rows: sum(len(row[side].split()) + 1 for row in rows
                         for side in ('chosen', 'rejected'))
json.dump({{
    'training': rates | {{'dialogue_tokens': words(pairs['training'][args.batch_size:])}},
    'scoring': {{'in_order': rates, 'sorted': rates, 'dialogue_tokens': words(pairs['scoring'])}},
    'versions': {{'trl': '0'}}, 'threads': 2, 'device': 'cpu',
}}, open(args.output, 'w'))
"""


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / 'python'
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_both_are_timed_on_the_same_pairs(words, stub, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('XLA_FLAGS', simulated(2)['XLA_FLAGS'])
    changes, folder = {'head.name': 'scalar'} | WORDS | words, tmp_path / 'out'
    out = benchmark_trl.compare(
        load_config('benchmark', **changes), str(folder), trl_python=stub, rounds=1, per_device=2,
        config_args=['--config=configs/benchmark.py',
                     *(f'--config.{key}={value}' for key, value in changes.items())])
    with open(folder / 'benchmark_trl.json', encoding='utf-8') as file:
        found = json.load(file)
    pairs, (single,) = found['pairs'], found['rounds']
    assert (pairs['training'], pairs['scoring']) == (8, 6)
    for name in ('training', 'scoring'):  # qrm and the stub count the tokens of the same texts
        assert single['trl'][name]['dialogue_tokens'] == pairs[f'{name}_dialogue_tokens']
        assert f'{name}: {pairs[name]} pairs' in out
    assert single['qrm']['config']['head']['name'] == 'scalar'
    assert single['qrm']['training']['comparisons'] == [4, 4]
    assert (single['qrm']['machine']['devices'], single['qrm']['best_of_n']) == (2, None)
    assert '2 x cpu' in (folder / 'qrm-1.log').read_text()
    for name, part in (('training', 'training'), ('scoring', 'scoring'),
                       ('scoring_sorted', 'scoring')):
        rate = single['qrm'][part]['comparisons_per_second']['median']
        assert found['ratios'][name]['repeats'] == [pytest.approx(rate / 2.0)]
        assert found['comparisons_per_second'][name]['trl']['median'] == 2.0


@pytest.mark.filterwarnings('ignore:the load_module')  # how ml_collections loads configs
def test_the_config_is_given_on(monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', None, 'Config.', flag_values=values)
    given = [f'--config={ROOT}/configs/benchmark.py:helpful,scalar', '--config.model.remat=True',
             "--config.reproduce.heads=('scalar',)", '--config.data.path=']
    monkeypatch.setattr(sys, 'argv', ['program', *given])  # where overrides are looked for
    values(sys.argv)
    assert benchmark_trl.config_arguments(values['config']) == given


def test_bad_flags_end_in_one_clear_line(tmp_path):
    _, err = command('benchmark_trl', '--config=configs/benchmark.py', f'--workdir={tmp_path}',
                     '--trl_python=python', code=2)
    assert "config.data.path='', expected pairs" in err


def test_ratios_are_taken_round_by_round_and_the_order_changes(words, stub, tmp_path, monkeypatch):
    qrm_rates, ran = iter([8.0, 2.0, 12.0]), []

    def run(arguments, unused_log):
        name = 'trl' if arguments[0] == stub else 'qrm'
        ran.append(name)
        rates = {'comparisons_per_second': {'median': next(qrm_rates) if name == 'qrm' else 4.0}}
        content = {'training': rates, 'scoring': rates} if name == 'qrm' else {
            'training': rates | {'dialogue_tokens': 1}, 'versions': {}, 'threads': 1,
            'scoring': {'in_order': rates, 'sorted': rates, 'dialogue_tokens': 1}, 'device': 'cpu'}
        path = tmp_path / ('trl.json' if name == 'trl' else 'qrm/benchmark.json')
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))

    monkeypatch.setattr(benchmark_trl, 'run', run)
    table = benchmark_trl.compare(load_config('benchmark', **WORDS | words), str(tmp_path),
                                  trl_python=stub, rounds=3, per_device=4, config_args=[])
    assert ran == ['qrm', 'trl', 'trl', 'qrm', 'qrm', 'trl']
    with open(tmp_path / 'benchmark_trl.json', encoding='utf-8') as file:
        ratios = json.load(file)['ratios']
    assert ratios['training'] == {'median': 2.0, 'min': 0.5, 'max': 3.0, 'repeats': [2.0, 0.5, 3.0]}
    assert '2.00, 0.50, 3.00' in table


@pytest.mark.parametrize(('changes', 'message'), [
    ({'data.path': ''}, "config.data.path='', expected pairs"),
    ({'model.checkpoint': ''}, "config.model.checkpoint='', expected a model folder"),
    ({'model.checkpoint': 'no/folder'}, "config.model.checkpoint='no/folder', expected a folder"),
    ({'data.max_length': 0}, 'config.data.max_length=0, expected a number of tokens'),
    ({'data.overlong': 'truncate_prompt'}, "config.data.overlong='truncate_prompt', expected 'dro"),
    ({'model.remat': True}, 'config.model.remat=True, expected False'),
    ({'train.batch_size': 6}, 'config.train.batch_size=6, expected a multiple of --per_device=4'),
])
def test_what_trl_cannot_be_run_on(words, stub, tmp_path, changes, message):
    with pytest.raises(config.ConfigError, match=message):
        benchmark_trl.compare(load_config('benchmark', **WORDS | words | changes), str(tmp_path),
                              trl_python=stub, rounds=1, per_device=4, config_args=[])


def test_a_missing_or_failing_program_is_named(words, tmp_path):
    with pytest.raises(config.ConfigError, match='--trl_python=/no/python: no such program'):
        benchmark_trl.check(load_config('benchmark', **WORDS | words), '/no/python', 4)
    log = tmp_path / 'log'
    with pytest.raises(config.ConfigError, match='exit code 1: no torch here'):
        benchmark_trl.run([sys.executable, '-c', 'raise SystemExit("no torch here")'], str(log))


def test_only_pairs_can_be_compared(words, tmp_path):
    rows = [{'id': str(i), 'prompt': f'w{i}', 'responses': ['w1 w2', 'w3', 'w4'],
             'ratings': [1, 2, 3]} for i in range(30)]
    path = tmp_path / 'triples.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    cfg = load_config('benchmark', **WORDS | words | {'data.path': str(path)})
    with pytest.raises(DataError, match='expected two responses'):
        benchmark_trl.write_pairs(cfg, str(tmp_path))


def test_the_chosen_response_is_the_preferred_one(words, tmp_path):
    rows = [{'id': str(i), 'prompt': f'w{i}', 'responses': [' w1', ' w2'], 'preferred': 1}
            for i in range(30)]
    path = tmp_path / 'preferred.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    cfg = load_config('benchmark', **WORDS | words | {'data.path': str(path)})
    benchmark_trl.write_pairs(cfg, str(tmp_path))
    for name in ('training', 'scoring'):
        for row in trl_worker.read(tmp_path / f'{name}.jsonl'):
            assert row['chosen'] == f'w{row["id"]} w2'
            assert row['rejected'] == f'w{row["id"]} w1'


# The worker, as far as it goes without torch.


def test_the_worker_needs_neither_qrm_nor_torch_to_start():
    spec = importlib.util.spec_from_file_location('w', ROOT / 'experiments' / 'trl_worker.py')
    source = (ROOT / 'experiments' / 'trl_worker.py').read_text()
    assert 'import qrm' not in source
    assert 'from qrm' not in source
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_worker_batches_in_order_and_by_length():
    dialogues = ['aa', 'a', 'aaaa', 'aaa', 'a']
    assert trl_worker.batches(dialogues, 2, by_length=False) == [[0, 1], [2, 3], [4]]
    assert trl_worker.batches(dialogues, 2, by_length=True) == [[2, 3], [0, 1], [4]]


def test_worker_leaves_out_the_first_step():
    # Steps end at 10 (compiled, loaded), 11, 13, 16 and 20; in twos they took 3 and 7 seconds.
    assert trl_worker.intervals([10, 11, 13, 16, 20], 2) == [3, 7]
    assert trl_worker.intervals([10, 11, 13, 16, 20], 1) == [1, 2, 3, 4]


def test_worker_refuses_a_step_of_broken_batches(capsys):
    flags = {'model': 'm', 'training': 't', 'scoring': 's', 'output': 'o', 'max_length': 8,
             'batch_size': 6, 'per_device': 4, 'steps': 1, 'repeats': 1, 'dtype': 'float32'}
    with pytest.raises(SystemExit):
        trl_worker.parse([f'--{key}={value}' for key, value in flags.items()])
    assert '--batch_size=6, expected a multiple of --per_device=4' in capsys.readouterr().err
