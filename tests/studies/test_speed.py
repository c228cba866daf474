"""Tests of the measurement of speed: what is counted and written, never how long anything takes."""

import json
import os
import statistics
import time

import numpy as np
import pytest

from qrm.models.tuning import Tuning
from qrm.studies import costs, figures, speed
from qrm.training import config
from qrm.training.schema import ConfigError
from tests.helpers import WORDS, encoded, load_config, word_pairs

SMALL = {
    'model.sizes.vocab_size': 300, 'model.sizes.max_positions': 64, 'model.sizes.hidden_size': 16,
    'model.sizes.num_layers': 1, 'model.sizes.num_heads': 2, 'data.max_length': 64,
    'train.batch_size': 4, 'train.row_length': 64, 'train.rows': 2, 'speed.repeats': 2,
    'speed.steps': 2, 'speed.comparisons': 30, 'speed.scored': 6,
    'speed.responses': 3, 'speed.prompt': 20, 'speed.response': 10,
}

def small(**changes):
    return load_config('speed', **SMALL | changes)


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """A folder with the results of a small measurement, in place of older ones, and the table."""
    folder = tmp_path_factory.mktemp('speed')
    (folder / 'speed.json').write_text('{"older": 1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speed._PRODUCT, 'cpu', (64, 1))
        return folder, speed.run(small(), str(folder))


@pytest.fixture(scope='module')
def result(measured):
    with open(f'{measured[0]}/speed.json', encoding='utf-8') as file:
        return json.load(file)


@pytest.fixture(scope='module')
def items():
    """The comparisons of the small measurement."""
    return speed.prepare(small()).encoded


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    return word_pairs(tmp_path_factory.mktemp('words'))


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
    # Parameters and two moments, float32, and the batch.
    assert result['memory']['arguments'] > 12 * result['model']['parameters']
    assert result['memory']['temporary'] > 0
    assert result['config']['speed']['repeats'] == 2
    assert result['machine']['cores'] == os.cpu_count()
    assert result['training']['model_flops_utilization'] is None
    assert (folder / 'speed.png').stat().st_size > 10_000
    assert 'training: useful work' in table
    assert 'synthetic' in table


def test_training_rates_are_work_over_time(result, items):
    training, cfg = result['training'], small()
    steps = [speed.training_items(cfg, items, number) for number in range(5)]
    assert len({item.id for part in steps for item in part}) == 20  # one epoch holds them all
    repeats = [steps[1] + steps[2], steps[3] + steps[4]]
    assert training['comparisons'] == [8, 8]
    assert training['tokens'] == [sum(item.size for item in part) for part in repeats]
    a = config.architecture(cfg)
    assert training['useful_flops'] == [
        costs.useful_flops(a, part, tuning=Tuning()) for part in repeats]
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
    scored = speed.scoring_items(small(), items)
    assert result['scoring']['comparisons'] == [6, 6]
    assert result['scoring']['tokens'] == [sum(item.size for item in scored)] * 2
    assert result['scoring']['useful_flops'][0] == costs.useful_flops(
        config.architecture(small()), scored)


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
    assert speed.savings(items, slots=32, real=15) == {
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
    figure = figures.draw_benchmark(result | {
        'matmul': {'flops_per_second': rate},
        'training': {'useful_flops_per_second': {'median': 1e12, 'min': 1e12, 'max': 2e12}},
        'scoring': {'useful_flops_per_second': rate},
        'savings': speed.savings([encoded('x', 2, (1, 3)), encoded('y', 4, (2, 1))], 32, 15)})
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ['4', '1 (25%)', '4 (100%)']
    assert 'TFLOP/s' in left.get_xlabel()
    # Distinct tokens, repeated prompts and padding; a comparison, packed and padded.
    assert [bar.get_width() for bar in right.patches] == [6.5, 6.5, 1, 3, 8.5, 2.5]


def test_peaks_of_devices():
    assert speed.peak_rate('NVIDIA H200', 'bfloat16') == 989e12
    assert speed.peak_rate('NVIDIA H100 80GB HBM3', 'bfloat16') == 989e12
    assert speed.peak_rate('NVIDIA H100 PCIe', 'bfloat16') == 756e12
    assert speed.peak_rate('TPU v5 lite', 'bfloat16') == 197e12
    assert speed.peak_rate('TPU v5p', 'bfloat16') == 459e12
    assert speed.peak_rate('NVIDIA H200', 'float32') is None
    assert speed.peak_rate('cpu', 'bfloat16') is None


def test_summary_and_process_time():
    assert speed.summary([3.0, 1.0, 2.0]) == {
        'median': 2.0, 'min': 1.0, 'max': 3.0, 'repeats': [3.0, 1.0, 2.0]}
    first = speed.process_seconds()
    time.sleep(0.02)
    assert 0 < first < speed.process_seconds()


# Synthetic comparisons.


def test_synthetic_lengths_are_those_of_hh():
    items = speed.synthetic(1500, vocab_size=50257, max_length=512, seed=0)
    sizes = [item.size for item in items]
    # Of the real pairs: mean 211, percentiles and means as in `speed`'s comment.
    assert np.mean(sizes) == pytest.approx(211, rel=0.03)
    np.testing.assert_allclose(np.percentile(sizes, [25, 50, 75, 90, 95, 99]),
                               [107, 177, 284, 404, 497, 604], rtol=0.08)
    assert np.mean([len(item.prompt) for item in items]) == pytest.approx(118, rel=0.03)
    assert costs.repeated_tokens(items) / len(items) == pytest.approx(329, rel=0.03)
    assert max(item.longest for item in items) <= 512
    assert 50000 < max(item.prompt.max() for item in items) < 50257


@pytest.mark.parametrize('max_length', [1, 16, 64])
def test_synthetic_dialogues_fit_and_depend_on_the_seed_alone(max_length):
    items, again, other = (speed.synthetic(50, vocab_size=9, max_length=max_length, seed=seed)
                           for seed in (1, 1, 2))
    assert all(item.longest <= max_length for item in items)
    assert all(len(response) for item in items for response in item.responses)

    def ids(comparisons):
        return [[part.tolist() for part in (item.prompt, *item.responses)] for item in comparisons]

    assert ids(items) == ids(again) != ids(other)


def test_real_text_and_checkpoint(words):
    cfg = load_config('speed', **WORDS | words)
    workload = speed.prepare(cfg)
    assert workload.network.architecture.vocab_size == 40
    assert 20 < len(workload.encoded) < 40
    assert workload.source.startswith(words['data.path'])
    synthetic = speed.prepare(load_config('speed', **WORDS | words | {'data.path': ''}))
    assert synthetic.network.architecture == workload.network.architecture
    np.testing.assert_array_equal(synthetic.trained['backbone']['tokens'],
                                  workload.trained['backbone']['tokens'])


@pytest.mark.parametrize(('changes', 'message'), [
    ({'speed.repeats': 0}, 'config.speed.repeats=0, expected a number of at least 1'),
    ({'speed.response': 50}, 'config.speed.prompt=20 and response=50, expected at most 64'),
    ({'data.max_length': 65}, 'config.data.max_length=65, but the model has 64 positions'),
])
def test_bad_values_name_their_keys(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        speed.run(small(**changes), str(tmp_path))


def test_other_configs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'^no config\.speed\.repeats, '):
        speed.run(load_config('demo'), str(tmp_path))
