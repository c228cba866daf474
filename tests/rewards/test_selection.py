"""Selection: rules and ratings by hand, best of n against enumeration and simulation."""

import itertools
import math
from fractions import Fraction

import jax
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from qrm.rewards import distributions, selection
from qrm.rewards.distributions import Atoms, Gaussians
from qrm.rewards.heads import HeadConfig
from qrm.rewards.metrics import Predictions
from qrm.rewards.normalisation import Normalisation, Rewards
from qrm.rewards.selection import Rule, Scale

# Three responses of mean 1, 1.5 and 0 with standard deviations 1, 2 and 0.
ATOMS = distributions.uniform_atoms(
    np.float32([[0.0, 0.0, 2.0, 2.0], [-0.5, 3.5, 3.5, -0.5], [0.0, 0.0, 0.0, 0.0]]))


# Rules.


@pytest.mark.parametrize(('text', 'expected'), [
    ('mean', [1.0, 1.5, 0.0]),
    # The lower half of the mass, and the lower 3/4 of which a third is the upper value.
    ('quantile:0.5', [0.0, -0.5, 0.0]),
    ('quantile:0.6', [2.0, 3.5, 0.0]),
    ('cvar:0.5', [0.0, -0.5, 0.0]),
    ('cvar:0.75', [2.0 / 3.0, 2.5 / 3.0, 0.0]),
    ('cvar:1', [1.0, 1.5, 0.0]),
    # mean / 0.5 - 1 * std / 4.
    ('mean-std:1', [1.75, 2.5, 0.0]),
    ('mean-std:0', [2.0, 3.0, 0.0]),
])
def test_rules_by_hand(text, expected):
    rule = selection.parse_rule(text)
    assert rule.name == text
    score = selection.scores(rule, ATOMS, Scale(0.5, 4.0))
    np.testing.assert_allclose(score, expected, atol=1e-6)


def test_cvar_of_ten_quantiles_is_the_mean_of_the_lowest():
    quantiles = np.random.default_rng(0).standard_normal((2, 3, 10)).astype(np.float32)
    score = selection.scores(Rule('cvar', 0.3), distributions.uniform_atoms(quantiles))
    np.testing.assert_allclose(score, np.sort(quantiles)[..., :3].mean(-1), rtol=1e-5, atol=1e-6)


def test_rules_of_a_gaussian():
    rewards = Gaussians(*np.float32([[[1.0], [1.0]], [[1.0], [2.0]], [[0.5], [2.0]]]))
    mean, scale = np.array([1.0, 2.0]), np.array([0.5, 2.0])
    # Mean of the lowest tenth of a standard normal: -pdf(q) / .1 at its quantile q.
    tail = scipy.stats.norm.pdf(scipy.stats.norm.ppf(0.1)) / 0.1
    for rule, expected in (
        (Rule('quantile', 0.1), mean + scale * scipy.stats.norm.ppf(0.1)),
        (Rule('cvar', 0.1), mean - scale * tail),
        (Rule('mean-std', 2.0), mean / 3.0 - 2.0 * scale / 5.0),
    ):
        np.testing.assert_allclose(
            selection.scores(rule, rewards, Scale(3.0, 5.0)), expected, rtol=1e-4)


@pytest.mark.parametrize('text', [
    'median', 'mean:1', 'quantile', 'quantile:0', 'quantile:1', 'cvar:1.5', 'cvar:x', 'mean-std:-1',
    'mean-std:nan', 'quantile:', 'disagreement', 'disagreement:-1', 'sample', 'sample:1.5',
    'sample:-1', 'sample:4294967296', 'sample:inf', 'sample:nan'])
def test_rules_that_cannot_be_read(text):
    with pytest.raises(ValueError) as error:
        selection.parse_rule(text)
    assert str(error.value) == (
        f'rule {text!r}, expected mean, quantile:tau with tau in (0, 1), cvar:alpha with alpha in '
        '(0, 1], mean-std:k with k >= 0, disagreement:k with k >= 0 or sample:seed with seed a '
        'whole number in [0, 2^32)')


def test_rules_of_predictions_read_distributions_alone():
    for text in ('sample:1', 'disagreement:1', 'median'):
        with pytest.raises(ValueError, match=f"'{text}', expected mean, .* or mean-std:k with k"):
            selection.parse_rule(text, selection.DISTRIBUTION_KINDS)
    assert selection.parse_rule('cvar:0.5', selection.DISTRIBUTION_KINDS) == Rule('cvar', 0.5)
    assert selection.parse_rule('sample:4294967295').name == 'sample:4294967295'


@pytest.mark.parametrize(('kind', 'parameter', 'match'), [
    ('median', None, "rule 'median', expected one of"),
    ('mean', 1.0, 'takes no parameter'),
    ('quantile', None, 'parameter None, expected tau in'),
    ('quantile', 0.0, 'parameter 0.0, expected tau in'),
    ('cvar', 1.5, 'expected alpha in'),
    ('mean-std', math.nan, 'expected k >= 0'),
])
def test_rules_that_are_none(kind, parameter, match):
    with pytest.raises(ValueError, match=match):
        Rule(kind, parameter)


def test_mean_std_needs_a_scale():
    with pytest.raises(ValueError, match="rule 'mean-std:1' needs a scale of other responses"):
        selection.check_alone(Rule('mean-std', 1.0), 1, None)
    selection.check_alone(Rule('cvar', 0.5), 1, None)
    selection.check_alone(Rule('mean-std', 1.0), 1, Scale(1.0, 1.0))
    with pytest.raises(ValueError, match='needs a scale'):
        selection.scores(Rule('mean-std', 1.0), ATOMS)


# Rules that read more than a distribution. Two members of two quantiles: means 2 and 6.
ENSEMBLE = HeadConfig('quantile', 2, members=2)
SAID = np.float32([[1.0, 3.0, 5.0, 7.0], [1.0, 3.0, 3.0, 1.0]])


def test_disagreement_by_hand():
    rule = selection.parse_rule('disagreement:0.5')
    assert rule.name == 'disagreement:0.5'
    np.testing.assert_allclose(
        selection.reward(rule, Rewards(ENSEMBLE, SAID, None)), [4.0 - 0.5 * 2.0, 2.0], atol=1e-6)
    # (2 - 1) / 2 and (6 - 1) / 2: mean 1.5 and standard deviation 1.
    by = Normalisation(1.0, 2.0)
    np.testing.assert_allclose(
        selection.reward(rule, Rewards(ENSEMBLE, SAID, by)), [1.0, 0.5], atol=1e-6)
    # Of Gaussians it is not their spread.
    gaussians = HeadConfig('gaussian', members=3)
    outputs = np.float32([[1.0, 5.0, 2.0, 5.0, 6.0, 5.0]])
    np.testing.assert_allclose(selection.reward(rule, Rewards(gaussians, outputs, None)),
                               [3.0 - 0.5 * np.std([1, 2, 6])], rtol=1e-6)


def test_other_rules_of_what_a_head_says_are_those_of_the_distribution():
    rewards = Rewards(ENSEMBLE, SAID, Normalisation(1.0, 2.0))
    # Quantiles 0, 1, 2 and 3.
    for text, expected in (('mean', 1.5), ('quantile:0.9', 3.0), ('cvar:0.5', 0.5),
                           ('mean-std:2', 1.5 / 0.5 - 2.0 * math.sqrt(1.25) / 4.0)):
        found = selection.reward(selection.parse_rule(text), rewards, Scale(0.5, 4.0))
        assert float(found[0]) == pytest.approx(expected, rel=1e-6)


def test_what_a_rule_reads_must_be_there():
    alone = Rewards(HeadConfig('quantile', 4), SAID, None)
    with pytest.raises(ValueError, match="'disagreement:1' of a head with one member, expected"):
        selection.reward(Rule('disagreement', 1.0), alone)
    with pytest.raises(ValueError, match="'sample:1' needs the texts"):
        selection.reward(Rule('sample', 1), alone)
    with pytest.raises(ValueError, match="'mean-std:1' needs a scale"):
        selection.reward(Rule('mean-std', 1.0), alone)
    for kind in ('sample', 'disagreement'):
        with pytest.raises(ValueError, match='of distributions alone'):
            selection.scores(Rule(kind, 1.0), ATOMS)


def digests(texts):
    return np.stack([selection.text_digest(np.array(text)) for text in texts])


def test_a_sample_is_of_the_seed_and_the_text_alone():
    texts = digests([[number, 7] for number in range(300)])
    assert len({tuple(one) for one in texts.tolist()}) == 300
    # The same on any machine.
    assert selection.text_digest(np.array([1, 2, 3])).tolist() == [1951833302, 2654825055]
    head, outputs = HeadConfig('gaussian'), np.float32([[1.0, 2.0]] * 300)

    def drawn(seed, rows):
        return np.asarray(selection.reward(
            Rule('sample', seed), Rewards(head, outputs[rows], None), None, texts[rows]))

    found = drawn(7, np.arange(300))
    assert len(set(found.tolist())) == 300
    for rows in ([5], [299, 5, 5, 0], list(range(100, 164))):
        np.testing.assert_array_equal(drawn(7, np.array(rows)), found[rows])
    assert np.abs(np.corrcoef(drawn(8, np.arange(300)), found)[0, 1]) < 0.2
    # softplus(2) = 2.127: within four standard errors.
    std = math.log1p(math.exp(2.0))
    assert found.mean() == pytest.approx(1.0, abs=4.0 * std / math.sqrt(300))
    assert found.std() == pytest.approx(std, rel=4.0 / math.sqrt(600))


def test_samples_of_quantiles_are_each_as_often():
    texts = digests([[number] for number in range(4000)])
    found = selection.reward(Rule('sample', 0), Rewards(
        ENSEMBLE, np.tile(SAID[0], (4000, 1)), None), None, texts)
    values, counts = np.unique(np.asarray(found), return_counts=True)
    assert values.tolist() == [1.0, 3.0, 5.0, 7.0]
    assert scipy.stats.chisquare(counts).pvalue > 0.001


def test_reference_scale_by_hand():
    # Deviations from the prompt's mean: -1, 0, 1 and -2, 2; a prompt alone adds nothing. Squares
    # 2 + 8 over 6 - 3 degrees of freedom; of the spreads .5 (.25 + .25) over 3.
    scale = selection.reference_scale(
        np.array([1.0, 10.0, 2.0, 14.0, 3.0, 77.0]), np.array([1.0, 5.0, 1.0, 6.0, 1.0, 9.0]),
        np.array([0, 4, 0, 4, 0, 2]))
    np.testing.assert_allclose(scale, [math.sqrt(10.0 / 3.0), math.sqrt(0.5 / 3.0)])
    with pytest.raises(ValueError, match='3 prompts with one each'):
        selection.reference_scale(np.zeros(3), np.ones(3), np.arange(3))


def test_mean_std_does_not_depend_on_units_or_prompt():
    """Rescaling a head or adding a constant for each prompt changes none of its choices."""
    rng = np.random.default_rng(1)
    rewards = distributions.uniform_atoms(rng.standard_normal((40, 5, 6)).astype(np.float32))
    prompts = np.repeat(np.arange(40), 5)
    moved = rewards.scale_and_shift(
        7.0, np.broadcast_to(rng.standard_normal((40, 1)).astype(np.float32), (40, 5)))

    def choices(distribution):
        scale = selection.reference_scale(
            *(np.asarray(x).ravel() for x in (distribution.mean, distribution.std)), prompts)
        return np.argmax(selection.scores(Rule('mean-std', 1.0), distribution, scale), axis=-1)

    np.testing.assert_array_equal(choices(rewards), choices(moved))


def test_spreads_that_differ_by_rounding_are_equal():
    rng = np.random.default_rng(2)
    mean = 5.0 * rng.standard_normal(100).astype(np.float32)
    std = np.float32(1.0) + np.float32(1e-6) * rng.standard_normal(100).astype(np.float32)
    scale = selection.reference_scale(mean, std, np.zeros(100, int))
    assert scale.std == 0.0
    assert scale.mean == pytest.approx(mean.std(ddof=1), rel=1e-5)
    # Small but real differences are kept, whatever the unit of the rewards.
    for unit in (1e-3, 1.0, 1e3):
        scale = selection.reference_scale(unit * mean, unit * (1.0 + 1e-3 * mean),
                                          np.zeros(100, int))
        assert scale.std == pytest.approx(1e-3 * scale.mean, rel=1e-3)


def test_mean_std_of_equal_spreads_or_means_is_finite():
    scale = selection.reference_scale(np.zeros(4), np.ones(4), np.zeros(4, int))
    assert scale == (0.0, 0.0)
    score = selection.scores(Rule('mean-std', 1.0), ATOMS, scale)
    np.testing.assert_allclose(score, ATOMS.mean)


# Controls.


def test_shuffled_spread_keeps_means_and_the_multiset_of_deviations():
    quantiles = np.random.default_rng(2).standard_normal((3, 50, 4)).astype(np.float32)
    rewards = distributions.uniform_atoms(quantiles)
    control = selection.shuffle_spread(rewards, jax.random.key(0))
    np.testing.assert_allclose(control.mean, rewards.mean, atol=1e-6)
    before, after = (np.asarray(d.values - d.mean[..., None]) for d in (rewards, control))
    moved = 0
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a[np.argsort(a[:, 0])], b[np.argsort(b[:, 0])], atol=1e-6)
        moved += np.sum(np.abs(a - b).max(axis=-1) > 1e-3)
    assert moved > 130
    # Each set of K has its own order.
    orders = [np.argmin(np.abs(b[:, None, 0] - a[None, :, 0]), axis=1)
              for a, b in zip(before, after, strict=True)]
    assert not np.array_equal(orders[0], orders[1])


def test_spread_shuffled_in_blocks_moves_among_neighbours_of_the_mean():
    # In the order of the means the deviations are 1, 2 and 3, 4: they move within each two.
    mean, deviation = np.float32([3.0, 1.0, 2.0, 4.0]), np.float32([3.0, 1.0, 2.0, 4.0]) / 10
    rewards = distributions.uniform_atoms(
        mean[:, None] + deviation[:, None] * np.float32([-1.0, 1.0]))
    seen = set()
    for seed in range(12):
        control = selection.shuffle_spread(rewards, jax.random.key(seed), block=2)
        np.testing.assert_allclose(control.mean, mean, atol=1e-6)
        seen.add(tuple(np.round(10.0 * np.asarray(control.std)).astype(int).tolist()))
    assert seen == {(3, 1, 2, 4), (4, 1, 2, 3), (3, 2, 1, 4), (4, 2, 1, 3)}


def test_shuffled_spread_moves_weights_along():
    rewards = Atoms(np.float32([[0.0, 4.0], [1.0, 1.0], [2.0, 12.0]]),
                    np.float32([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]]))
    for seed in range(4):
        control = selection.shuffle_spread(rewards, jax.random.key(seed))
        np.testing.assert_allclose(control.mean, [1.0, 1.0, 3.0], atol=1e-6)
        np.testing.assert_allclose(np.sort(control.std), [0.0, math.sqrt(3.0), 3.0], atol=1e-5)


def test_constant_spread_keeps_means_and_equals_the_average():
    control = selection.constant_spread(ATOMS)
    np.testing.assert_allclose(control.mean, ATOMS.mean, atol=1e-6)
    # Sorted deviations (-1, -1, 1, 1), (-2, -2, 2, 2) and 0 have the average (-1, -1, 1, 1).
    np.testing.assert_allclose(control.values - control.mean[:, None], [[-1, -1, 1, 1]] * 3,
                               atol=1e-6)
    for rule in (Rule('quantile', 0.1), Rule('cvar', 0.5)):
        score = selection.scores(rule, control)
        assert np.argsort(score).tolist() == np.argsort(ATOMS.mean).tolist()


# Ratings of the chosen responses.


def _predictions(comparisons, quantiles, ratings, groups):
    quantiles = np.float32(quantiles)
    return Predictions(
        quantiles=quantiles, taus=np.float32([0.25, 0.75]), means=quantiles.mean(axis=1),
        stds=quantiles.std(axis=1), pair_stds=np.zeros(0, np.float32),
        crps=np.full(len(quantiles), np.nan, np.float32),
        ratings=np.float32(ratings), lengths=np.ones(len(quantiles), np.int32),
        comparisons=np.int32(comparisons),
        comparison_ids=np.array([f'c{i}' for i in range(len(groups))]),
        comparison_groups=np.int64(groups), pairs=np.zeros((0, 2), np.int32),
        label=np.zeros(0, np.float32), log_win=np.zeros(0, np.float32),
        log_loss=np.zeros(0, np.float32))


NAN = float('nan')
RAGGED = _predictions(
    # Comparison 1 has one rated response only; its responses stand apart.
    [1, 0, 0, 2, 2, 2, 1, 3, 3],
    [[9, 9], [-2, 4], [0, 1], [0, 0], [5, 5], [-1, 1], [2, 2], [3, 3], [3, 3]],
    [5, 1, 3, 2, NAN, 4, NAN, 7, 2],
    [10, 20, 10, 10])


def test_chosen_ratings_by_hand():
    result = selection.chosen_ratings(RAGGED, [Rule('quantile', 0.25)], replicates=50, seed=0)
    assert (result.comparisons, result.responses) == (3, 2.0)
    # Means: 1 against .5; 0 and 0 (of the rated); 3 and 3.
    assert result.chosen['mean'].value == pytest.approx((1.0 + 3.0 + 4.5) / 3.0)
    # Lower quantiles: -2 against 0; 0 against -1; 3 and 3.
    assert result.chosen['quantile:0.25'].value == pytest.approx((3.0 + 2.0 + 4.5) / 3.0)
    assert result.differences.keys() == {'quantile:0.25'}
    assert result.differences['quantile:0.25'].value == pytest.approx(1.0 / 3.0)
    assert result.chance.value == pytest.approx((2.0 + 3.0 + 4.5) / 3.0)
    assert result.best.value == pytest.approx((3.0 + 4.0 + 7.0) / 3.0)


def test_one_opening_question_has_no_interval():
    """All rated comparisons are of group 10: every replicate holds the same three."""
    result = selection.chosen_ratings(RAGGED, [], replicates=20, seed=0)
    for one in (result.chance, result.best, result.chosen['mean']):
        assert one.low == pytest.approx(one.value)
        assert one.high == pytest.approx(one.value)


def test_intervals_are_over_opening_questions_and_differences_paired():
    rng = np.random.default_rng(3)
    n = 200
    comparisons, groups = np.repeat(np.arange(n), 3), np.arange(n) // 4
    ratings = np.repeat(rng.standard_normal(n // 4), 12) + rng.standard_normal(3 * n)
    quantiles = ratings[:, None] + rng.standard_normal((3 * n, 2)) + [-1.0, 1.0]
    predictions = _predictions(comparisons, quantiles, ratings, groups)
    result = selection.chosen_ratings(predictions, [Rule('quantile', 0.3)], replicates=2000, seed=1)

    def per_group(score):
        chosen = ratings.reshape(n, 3)[np.arange(n), score.reshape(n, 3).argmax(1)]
        return chosen.reshape(-1, 4).mean(1)

    mean, low = per_group(np.float32(quantiles).mean(1)), per_group(quantiles.min(axis=1))
    for interval, values in ((result.chosen['mean'], mean),
                             (result.differences['quantile:0.3'], low - mean)):
        assert interval.value == pytest.approx(values.mean(), abs=1e-6)
        # Groups are of one size: the interval is that of the mean of 50 independent values.
        error = 1.96 * values.std() / math.sqrt(len(values))
        assert interval.low == pytest.approx(values.mean() - error, abs=0.15 * error)
        assert interval.high == pytest.approx(values.mean() + error, abs=0.15 * error)


def test_ratings_are_needed():
    predictions = RAGGED._replace(ratings=np.full(9, np.nan, np.float32))
    with pytest.raises(ValueError, match='no comparison has two rated responses'):
        selection.chosen_ratings(predictions, [], replicates=20, seed=0)


# Best of n.


@pytest.mark.parametrize('scores', [
    [0.3, -1.0, 2.0, 0.5, 0.1, -0.2, 1.0], [1.0, 1.0, 2.0, 0.0, 2.0, 2.0, 0.0], [4.0] * 7])
def test_best_of_n_matches_enumeration(scores):
    values = np.random.default_rng(4).standard_normal(7)

    def best(subset):
        top = max(scores[i] for i in subset)
        return np.mean([values[i] for i in subset if scores[i] == top])

    expected = [np.mean([best(s) for s in itertools.combinations(range(7), n)])
                for n in range(1, 8)]
    np.testing.assert_allclose(
        selection.best_of_n(np.array(scores), values, range(1, 8)), expected, atol=1e-12)


def test_best_of_n_of_rows_are_those_of_each():
    rng = np.random.default_rng(5)
    scores, values = rng.integers(0, 4, (2, 3, 9)), rng.standard_normal((2, 3, 9))
    together = selection.best_of_n(scores, values, (1, 4))
    assert together.shape == (2, 3, 2)
    for row in np.ndindex(2, 3):
        np.testing.assert_allclose(
            together[row], selection.best_of_n(scores[row], values[row], (1, 4)), atol=1e-12)


@pytest.mark.parametrize('n', [1, 2, 64, 4096, 16383, 16384])
def test_best_of_n_weights_are_exact(n):
    total = 2 ** 14
    weights = selection.best_of_n_weights(total, n)
    assert weights.sum() == pytest.approx(1.0, abs=1e-11)
    assert (np.diff(weights) >= 0.0).all()
    assert (weights[:n - 1] == 0.0).all()
    # C(total - gap - 1, n - 1) / C(total, n), in whole numbers.
    expected = Fraction(n, total)
    for gap in range(60):
        if gap:
            expected *= Fraction(max(total - gap - n + 1, 0), total - gap)
        assert weights[total - 1 - gap] == pytest.approx(float(expected), rel=1e-12)


def test_best_of_n_is_unbiased():
    """The expected maximum of n of 48 normal draws, over 4000 sets, is that of n draws."""
    draws = np.random.default_rng(6).standard_normal((4000, 48))
    sizes = (1, 2, 8, 48)
    estimates = selection.best_of_n(draws, draws, sizes)
    for estimate, n in zip(estimates.T, sizes, strict=True):
        expected = scipy.integrate.quad(
            lambda x, n=n: x * n * scipy.stats.norm.pdf(x) * scipy.stats.norm.cdf(x) ** (n - 1),
            -10, 10)[0]
        assert estimate.mean() == pytest.approx(
            expected, abs=4.0 * estimate.std() / math.sqrt(len(estimate)))


@pytest.mark.parametrize(('scores', 'sizes', 'match'), [
    ([1.0, 2.0], (3,), 'best of 3, expected from 1 to the 2'),
    ([1.0, 2.0], (0,), 'best of 0'),
    ([1.0, NAN], (1,), 'finite'),
])
def test_best_of_n_of_what_cannot_be_drawn(scores, sizes, match):
    with pytest.raises(ValueError, match=match):
        selection.choice_probabilities(np.array(scores), sizes)


@pytest.mark.parametrize('n', [1, 2, 16, 1024])
def test_kl_matches_simulation(n):
    # The score's rank u is uniform for one draw; the best of n has density n u^(n-1).
    best = np.random.default_rng(7).random(200_000) ** (1.0 / n)
    log_ratio = np.log(n) + (n - 1) * np.log(best)
    assert selection.kl_best_of_n(n) == pytest.approx(log_ratio.mean(), abs=0.01)


def test_kl_is_an_upper_bound_with_ties():
    # Four responses of equal probability with scores of their own: draws can be equal.
    sizes = np.array([1, 2, 16, 1024])
    below = (np.arange(5) / 4.0) ** sizes[:, None]
    p = np.diff(below, axis=1)
    exact = np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0) * 4.0), 0.0), axis=1)
    bound = selection.kl_best_of_n(sizes)
    assert (exact <= bound + 1e-12).all()
    assert bound[-1] > exact[-1] + 4.0
    assert exact[-1] == pytest.approx(math.log(4.0))


def test_exact_kl_of_best_of_n_by_enumerating_draws():
    # Five responses, two of them tied at the top and two below; all draws of three.
    scores, p = np.array([1.0, 2.0, 2.0, 1.0, 0.0]), np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    chosen = np.zeros(5)
    for draws in itertools.product(range(5), repeat=3):
        top = [i for i in draws if scores[i] == max(scores[list(draws)])]
        for i in top:
            chosen[i] += np.prod(p[list(draws)]) / len(top)
    expected = np.sum(chosen * np.log(chosen / p))
    assert selection.exact_kl_best_of_n(scores, np.log(p), 3) == pytest.approx(expected, rel=1e-12)
    assert expected < selection.kl_best_of_n(3) - 0.05
    # One level: any choice is a draw. A response that never comes changes nothing.
    assert selection.exact_kl_best_of_n(np.ones(5), np.log(p), 3) == pytest.approx(0.0, abs=1e-12)
    with np.errstate(divide='ignore'):
        more = np.log(np.append(p, 0.0))
    assert selection.exact_kl_best_of_n(np.append(scores, 9.0), more, 3) == pytest.approx(expected)


def test_exact_kl_of_best_of_n_nears_the_bound_of_continuous_scores():
    scores = np.random.default_rng(0).standard_normal((2, 20_000))
    uniform = np.full(scores.shape, -math.log(20_000))
    for n in (1, 4, 64):
        found = selection.exact_kl_best_of_n(scores, uniform, n)
        assert found.shape == (2,)
        assert (found <= selection.kl_best_of_n(n) + 1e-12).all()
        np.testing.assert_allclose(found, selection.kl_best_of_n(n), atol=0.01)
    assert selection.exact_kl_best_of_n(scores[0], uniform[0], 10**6) == pytest.approx(
        math.log(20_000))


def test_estimated_kl_of_best_of_n():
    # Exact where the chosen response is the best and the rest continuous.
    fine = 100_000
    p = np.append(np.full(fine, 0.7 / fine), 0.3)
    exact = selection.exact_kl_best_of_n(np.arange(fine + 1.0), np.log(p), 4)
    assert selection.estimated_kl_best_of_n(math.log(0.3), 4) == pytest.approx(exact, abs=1e-4)
    # The bound for responses that come once, their own probability for those that always come.
    np.testing.assert_allclose(selection.estimated_kl_best_of_n(np.array([-40.0, -1e4, 0.0]), 16),
                               [selection.kl_best_of_n(16)] * 2 + [0.0], atol=1e-9)
    assert selection.estimated_kl_best_of_n(math.log(0.2), 10**5) == pytest.approx(-math.log(0.2))


@pytest.mark.parametrize(('call', 'match'), [
    (lambda: selection.exact_kl_best_of_n([1.0, 2.0], np.log([0.5, 0.2]), 2), 'the sum 0.7'),
    (lambda: selection.exact_kl_best_of_n([1.0, NAN], np.log([0.5, 0.5]), 2), 'finite'),
    (lambda: selection.exact_kl_best_of_n([1.0], np.zeros(1), 0), 'best of 0'),
    (lambda: selection.estimated_kl_best_of_n(0.1, 2), 'at most 0'),
    (lambda: selection.estimated_kl_best_of_n(-0.1, 0), 'best of 0'),
])
def test_what_has_no_kl(call, match):
    with pytest.raises(ValueError, match=match):
        call()
