"""Best of n: the gold world, what is read off it by hand, and a tiny run of the command."""

import json

import jax
import matplotlib.image
import numpy as np
import pytest
import scipy.stats

from qrm.rewards import distributions, selection
from qrm.rewards.selection import Rule
from qrm.studies import best_of_n, worlds
from qrm.studies.best_of_n import ORACLE, Gold, Strategy
from qrm.training.schema import ConfigError
from qrm.training.workdir import WorkdirError
from tests.helpers import command, load_config

TINY = {
    'repetitions': 2, 'labels.pairs': 200, 'proxies.quantiles': 4, 'proxies.networks': 2,
    'training.steps': 20, 'training.batch_size': 32, 'training.width': 16, 'choice.prompts': 3,
    'choice.candidates': 64, 'choice.moderate': 16,
    'choice.rules': ('mean', 'quantile:0.1', 'mean-std:1'),
}
GOLD = Gold(worlds.make(0), fall=0.5, start=2.0)


# The truth.


def test_rewards_fall_far_out_for_every_annotator():
    x = np.stack([np.full(8, scale) for scale in (0.0, 1.4, 2.0)])
    z = np.array([-1.0, 0.0, 2.0])
    # |x|^2 / 8 is the square of the scale: 0, 1.96 and 4, which is 2 beyond the start.
    expected = GOLD.world.reward(x[:, None], z) - np.array([[0.0], [0.0], [0.5 * 2.0]])
    np.testing.assert_allclose(GOLD.reward(x[:, None], z), expected, atol=1e-12)


def test_gold_and_tail_are_means_over_annotators():
    x = worlds.sample_items(0, 5) * 2.0
    # Annotators at the midpoints of equal shares, the least favourable first.
    share = (np.arange(200_000) + 0.5) / 200_000
    rewards = GOLD.reward(x[:, None], scipy.stats.norm.ppf(share))
    np.testing.assert_allclose(GOLD.mean(x), rewards.mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(GOLD.tail(x), rewards[:, :20_000].mean(axis=1), atol=1e-4)


def test_candidates_are_normal_and_some_wider():
    x = best_of_n.candidates(3, 20, 1000, 0.2, 3.0)
    assert x.shape == (20, 1000, 8)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, best_of_n.candidates(3, 20, 1000, 0.2, 3.0))
    # |x|^2 follows a chi-squared distribution with 8 degrees of freedom, or 9 times that.
    square = np.sum(x.astype(float) ** 2, axis=-1).ravel()
    assert scipy.stats.kstest(square, lambda q: (
        0.8 * scipy.stats.chi2(8).cdf(q) + 0.2 * scipy.stats.chi2(8).cdf(q / 9.0))).pvalue > 0.01
    assert scipy.stats.kstest(best_of_n.candidates(3, 20, 1000, 0.0, 3.0)[..., 0].ravel(),
                              scipy.stats.norm.cdf).pvalue > 0.01


# Choosing.


@pytest.fixture(scope='module')
def chosen():
    """Curves of a proxy whose lower quantile tells which of its means are too high.

    Responses gain u on top of their gold reward in the eyes of both proxies; the spread of the
    second is u, so that its lower quantile is the gold reward itself.
    """
    rng = np.random.default_rng(0)
    gold = rng.standard_normal((40, 256)).astype(np.float32)
    error = 2.0 * rng.exponential(size=(40, 256)).astype(np.float32)
    mean = (gold + error)[..., None]
    rewards = {
        'scalar': distributions.uniform_atoms(mean),
        'quantiles': distributions.uniform_atoms(mean + error[..., None] * np.float32([-1, 1])),
    }
    utilities = {'gold': gold, 'tail': gold - 1.0}
    return gold, best_of_n.choose(rewards, utilities, [Rule('quantile', 0.25)], (1, 16, 256),
                                  jax.random.key(0))


def test_which_strategies_there_are(chosen):
    _, curves = chosen
    assert list(curves) == [
        Strategy(ORACLE, 'gold'), Strategy(ORACLE, 'tail'), Strategy('scalar', 'mean'),
        Strategy('quantiles', 'mean'),
        *(Strategy('quantiles', 'quantile:0.25', control) for control in best_of_n.CONTROLS)]


def test_one_draw_is_worth_the_mean_and_all_draws_the_best(chosen):
    gold, curves = chosen
    for curve in curves.values():
        assert curve['gold'][0] == pytest.approx(gold.mean(), abs=1e-5)
        assert curve['tail'][0] == pytest.approx(gold.mean() - 1.0, abs=1e-5)
        assert curve['own'][0] == pytest.approx(0.0, abs=1e-5)
    best = gold.max(axis=1)
    assert curves[Strategy(ORACLE, 'gold')]['gold'][-1] == pytest.approx(best.mean(), abs=1e-5)
    centred = gold - gold.mean(axis=1, keepdims=True)
    assert curves[Strategy(ORACLE, 'gold')]['own'][-1] == pytest.approx(
        centred.max(axis=1).mean() / centred.std(), abs=1e-4)


def test_a_spread_that_tells_is_told_from_its_controls(chosen):
    _, curves = chosen
    gold = {strategy[1:]: curve['gold'] for strategy, curve in curves.items()
            if strategy.proxy == 'quantiles'}
    oracle = curves[Strategy(ORACLE, 'gold')]['gold']
    np.testing.assert_allclose(gold['quantile:0.25', 'none'], oracle, atol=1e-4)
    np.testing.assert_allclose(gold['mean', 'none'], curves[Strategy('scalar', 'mean')]['gold'],
                               atol=1e-4)
    np.testing.assert_allclose(gold['quantile:0.25', 'constant'], gold['mean', 'none'], atol=1e-4)
    for control in ('shuffled', 'matched'):
        assert (gold['quantile:0.25', control][1:] < oracle[1:] - 0.5).all()


def test_matched_spreads_keep_what_is_a_function_of_the_mean():
    """Where the lower quantile is a function of the mean, it stays nearly as good a rule."""
    rng = np.random.default_rng(1)
    mean = rng.standard_normal((40, 256)).astype(np.float32)
    # Lower quantile -mean^2: responses of mean 0 are chosen, and they are the best.
    spread = (mean + mean**2)[..., None]
    rewards = {'quantiles': distributions.uniform_atoms(
        mean[..., None] + spread * np.float32([-1, 1]))}
    utilities = {'gold': -np.abs(mean), 'tail': -np.abs(mean)}
    curves = best_of_n.choose(rewards, utilities, [Rule('quantile', 0.25)], (256,),
                              jax.random.key(0))
    gold = {s.control: c['gold'][0] for s, c in curves.items() if s.rule == 'quantile:0.25'}
    assert gold['none'] > -0.03
    assert gold['matched'] > -0.3
    assert gold['shuffled'] < -1.0
    assert gold['constant'] < -2.0


# Statistics.


def test_sizes_are_powers_of_four():
    assert best_of_n.sizes(4) == [1, 4]
    assert best_of_n.sizes(63) == [1, 4, 16]
    assert best_of_n.sizes(4096) == [1, 4, 16, 64, 256, 1024, 4096]


def test_interval_over_repetitions_is_students():
    values = np.random.default_rng(2).standard_normal((6, 3))
    found = best_of_n.over_repetitions(values, 0.9)
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    np.testing.assert_allclose(found['value'], values.mean(axis=0))
    np.testing.assert_allclose([found['low'], found['high']], expected)


def test_rank_correlation_matches_scipy():
    a, b = np.random.default_rng(3).integers(0, 9, (2, 4, 50)).astype(float)
    expected = [scipy.stats.spearmanr(p, q).statistic for p, q in zip(a, b, strict=True)]
    assert best_of_n._rank_correlation(a, b) == pytest.approx(np.mean(expected))


def test_residual_is_that_of_a_line_through_each_prompt():
    rng = np.random.default_rng(4)
    source, target = rng.standard_normal((2, 3, 30))
    # Regression on the source and an indicator of each prompt.
    design = np.column_stack([source.ravel(), np.repeat(np.eye(3), 30, axis=0)])
    fit = design @ np.linalg.lstsq(design, target.ravel(), rcond=None)[0]
    np.testing.assert_allclose(best_of_n._residual(target, source).ravel(), target.ravel() - fit,
                               atol=1e-12)


def _cell(low, high):
    return {'value': 0.5 * (low + high), 'low': low, 'high': high}


@pytest.mark.parametrize(('constant', 'shuffled', 'matched', 'expected'), [
    ((-2, -1), (1, 2), (1, 2), 'loses'),
    ((-1, 2), (1, 2), (1, 2), 'no difference shown'),
    ((1, 2), (-1, 2), (1, 2), 'gains, not by which response has which spread'),
    ((1, 2), (1, 2), (-1, 2), 'gains, by a spread that changes with the mean'),
    ((1, 2), (1, 2), (1, 2), 'gains by the spread'),
])
def test_verdicts(constant, shuffled, matched, expected):
    row = {'constant': _cell(*constant), 'shuffled': _cell(*shuffled), 'matched': _cell(*matched)}
    assert best_of_n.verdict(row) == expected


def test_a_mean_gains_or_not():
    assert best_of_n.verdict({'scalar': _cell(1, 2)}) == 'gains'
    assert best_of_n.verdict({'scalar': _cell(-2, -1)}) == 'loses'


# The command.


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Results of a tiny run of the command, with what it printed."""
    folder = tmp_path_factory.mktemp('best_of_n')
    out, err = command('best_of_n', '--config=configs/best_of_n.py', f'--workdir={folder}',
                       *(f'--config.{key}={value}' for key, value in TINY.items()))
    assert not err
    return folder, out


def test_what_a_run_leaves(results):
    folder, out = results
    text = (folder / 'best_of_n.md').read_text(encoding='utf-8')
    assert text.strip() in out
    result = json.loads((folder / 'best_of_n.json').read_text(encoding='utf-8'))
    assert result['sizes'] == [1, 4, 16, 64]
    np.testing.assert_allclose(result['kl'], selection.kl_best_of_n(np.array(result['sizes'])))
    assert len(result['labels']) == 6
    # Two oracles, two scalars, and the mean and two rules with three controls of four proxies.
    assert len(result['curves']) == 2 + 2 + 4 * (1 + 2 * 4)
    for row in result['curves']:
        for key in ('gold', 'tail', 'own'):
            low, value, high = (np.array(row[key][name]) for name in ('low', 'value', 'high'))
            assert value.shape == (4,)
            assert (low <= value).all()
            assert (value <= high).all()
    assert [row['proxy'] for row in result['spreads']] == [
        'ensemble', 'label_quantiles', 'distributional', 'ratings']
    assert result['spreads'][0]['networks']['value'] == pytest.approx(1.0)
    for line in result['statements']:
        assert line in text


def test_constant_spreads_choose_as_the_mean(results):
    result = json.loads((results[0] / 'best_of_n.json').read_text(encoding='utf-8'))
    curves = {(row['proxy'], row['rule'], row['control']): row for row in result['curves']}
    for (proxy, _, control), row in curves.items():
        if control == 'constant':
            np.testing.assert_allclose(
                row['gold']['value'], curves[proxy, 'mean', 'none']['gold']['value'], atol=1e-3)


def test_the_figure_has_ink_in_every_panel(results):
    pixels = matplotlib.image.imread(results[0] / 'figures' / 'best_of_n.png')[..., :3]
    rows, columns = (np.array_split(np.arange(size), count) for size, count in
                     zip(pixels.shape[:2], (3, 4), strict=True))
    for row in rows:
        for column in columns:
            assert pixels[np.ix_(row, column)].std() > 0.05


def test_a_folder_keeps_its_settings(results):
    config = load_config('best_of_n', **(TINY | {'world.fall': 0.7}))
    with pytest.raises(WorkdirError, match='config.world.fall: 1.0 -> 0.7'):
        best_of_n.run(config, str(results[0]))


def test_values_that_cannot_be_used_are_named():
    for changes, parts in (
        ({'repetitions': 1, 'world.share': 2.0}, ('config.repetitions=1', 'config.world.share=2')),
        ({'choice.moderate': 63, 'choice.rules': ('mean', 'median')},
         ("rule 'median'", 'config.choice.moderate=63, expected one of [1, 4, 16, 64')),
    ):
        with pytest.raises(ConfigError) as error:
            best_of_n.check(load_config('best_of_n', **changes))
        assert all(part in str(error.value) for part in parts)


def test_the_config_is_valid_and_takes_no_argument():
    config = load_config('best_of_n')
    best_of_n.check(config)
    assert config.is_locked
    with pytest.raises(ValueError, match="argument 'x', expected none"):
        load_config('best_of_n', 'x')
