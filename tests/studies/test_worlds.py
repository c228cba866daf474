"""Tests of worlds: closed forms against quadrature, samples against closed forms."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

from qrm.studies import worlds
from qrm.studies.worlds import SCHEMES

WORLD = worlds.make(0)
TAUS = (np.arange(10) + 0.5) / 10


def items(n=6, seed=0):
    return worlds.sample_items(seed, n)


def sigma(x):
    return 1.0 / (1.0 + math.exp(-x))


def over_annotators(function):
    """E function(z), z ~ N(0, 1), by adaptive quadrature."""
    return scipy.integrate.quad(
        lambda z: function(z) * scipy.stats.norm.pdf(z), -12, 12, epsabs=1e-12, limit=200)[0]


# The truth.


def test_annotators_have_mean_0_variance_1_and_a_mild_skewness():
    def power(k):
        return over_annotators(lambda z: float(worlds.skewed(z)) ** k)

    assert [power(1), power(2)] == pytest.approx([0.0, 1.0], abs=1e-9)
    assert power(3) == pytest.approx(0.95, abs=0.01)


def test_moments_quantiles_and_cdf_agree():
    x = items()
    for item, mean, std in zip(x, WORLD.mean(x), WORLD.std(x), strict=True):
        def reward(z, item=item):
            return float(WORLD.reward(item, z))

        assert over_annotators(reward) == pytest.approx(mean, abs=1e-9)
        assert over_annotators(lambda z, m=mean: (reward(z) - m) ** 2) == pytest.approx(
            std**2, abs=1e-9)
    np.testing.assert_allclose(WORLD.cdf(x, WORLD.quantile(x, TAUS)), [TAUS] * len(x), atol=1e-12)
    # The lognormal ends 3.3 standard deviations below the mean.
    np.testing.assert_array_equal(
        WORLD.cdf(x, (WORLD.mean(x) - 4.0 * WORLD.std(x))[:, None]), 0.0)


def test_worlds_are_what_the_docstring_says():
    x = items(200_000)
    mean, std = WORLD.mean(x), WORLD.std(x)
    assert mean.std() == pytest.approx(0.92, abs=0.01)
    assert std.mean() == pytest.approx(0.94, abs=0.01)
    assert 0.28 <= std.min() < 0.3
    assert 1.58 < std.max() <= 1.6
    assert abs(np.corrcoef(mean, std)[0, 1]) < 0.01
    for scheme, accuracy, nll in (('independent', 0.672, 0.6009), ('shared', 0.702, 0.5680)):
        wins = worlds.win_probability(WORLD, x[:40_000].reshape(-1, 2, 8), scheme)
        assert worlds.expected_accuracy(wins, wins - 0.5) == pytest.approx(accuracy, abs=0.003)
        assert worlds.expected_nll(wins, np.log(wins), np.log1p(-wins)) == pytest.approx(
            nll, abs=0.003)


def test_worlds_and_samples_are_functions_of_the_seed():
    np.testing.assert_array_equal(worlds.make(3).directions, worlds.make(3).directions)
    assert np.abs(worlds.make(3).directions - worlds.make(4).directions).max() > 0.1
    for scheme in SCHEMES:
        one, same, other = (worlds.sample_pairs(WORLD, scheme, 50, seed) for seed in (1, 1, 2))
        for first, second in zip(one, same, strict=True):
            np.testing.assert_array_equal(first, second)
        assert np.abs(one.x - other.x).max() > 0.1
    for first, second in zip(worlds.sample_anchors(WORLD, 4, 1),
                             worlds.sample_anchors(WORLD, 4, 1), strict=True):
        np.testing.assert_array_equal(first, second)


# Win probabilities.


def test_win_probabilities_match_adaptive_quadrature():
    x = items(4, seed=1).reshape(2, 2, 8)
    mean, std = WORLD.mean(x), WORLD.std(x)
    independent, shared = (worlds.win_probability(WORLD, x, s) for s in ('independent', 'shared'))
    for i in range(2):
        def lead(z, other, i=i):
            return (mean[i, 0] - mean[i, 1] + std[i, 0] * float(worlds.skewed(z))
                    - std[i, 1] * float(worlds.skewed(other)))

        assert shared[i] == pytest.approx(
            over_annotators(lambda z, lead=lead: sigma(lead(z, z))), abs=1e-9)
        nodes = np.linspace(-9, 9, 49)
        density = scipy.stats.norm.pdf(nodes) * (nodes[1] - nodes[0])
        of_each = [over_annotators(lambda z, o=other, lead=lead: sigma(lead(z, o)))
                   for other in nodes]
        assert independent[i] == pytest.approx(float(np.dot(density, of_each)), abs=1e-9)


def test_known_judges_by_hand():
    x = items(4, seed=2).reshape(2, 2, 8)
    rewards = WORLD.reward(x[:, :, None], worlds.panel(3))
    np.testing.assert_allclose(worlds.panel(3), scipy.stats.norm.ppf([1 / 6, 1 / 2, 5 / 6]))
    wins = 1.0 / (1.0 + np.exp(rewards[:, 1] - rewards[:, 0]))
    np.testing.assert_allclose(
        worlds.win_probability(WORLD, x, 'identified', annotators=3), wins.mean(axis=1))
    np.testing.assert_allclose(
        worlds.win_probability(WORLD, x, 'identified', np.array([2, 0]), 3),
        [wins[0, 2], wins[1, 0]])


@pytest.mark.parametrize('scheme', SCHEMES)
def test_both_sides_win_with_probability_1(scheme):
    x = items(1000).reshape(-1, 2, 8)
    total = sum(worlds.win_probability(WORLD, order, scheme) for order in (x, x[:, ::-1]))
    np.testing.assert_allclose(total, 1.0, atol=1e-10)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_samples_follow_the_closed_forms(scheme):
    n = 20_000
    pairs = worlds.sample_pairs(WORLD, scheme, n, 5, annotators=10)
    # Rewards have the stated distribution: their cdf is uniform.
    position = WORLD.cdf(pairs.x, pairs.rewards[..., None].astype(np.float64))[..., 0]
    order = np.where(np.random.default_rng(0).random(n)[:, None] < 0.5, [0, 1], [1, 0])
    one_side = np.take_along_axis(position, order, 1)[:, 0]
    if scheme == 'identified':
        np.testing.assert_allclose(position, ((pairs.annotators + 0.5) / 10)[:, None].repeat(2, 1),
                                   atol=1e-4)
        assert np.bincount(pairs.annotators).min() > 1800
    else:
        assert scipy.stats.kstest(one_side, 'uniform').pvalue > 0.01
        assert np.all(pairs.annotators == -1)
    if scheme == 'shared':
        np.testing.assert_allclose(position[:, 0], position[:, 1], atol=1e-4)
    # Choices have the stated probabilities: Bayes accuracy and NLL of the labels as drawn.
    wins = worlds.win_probability(WORLD, pairs.x, scheme)
    for drawn, expected in (
        ((wins > 0.5).astype(float), worlds.expected_accuracy(wins, wins - 0.5)),
        (-np.log(wins), worlds.expected_nll(wins, np.log(wins), np.log1p(-wins))),
    ):
        error = drawn.std() / math.sqrt(n)
        assert drawn.mean() == pytest.approx(expected, abs=4.0 * error)


def test_anchors_are_rated_by_their_annotator():
    x, ratings = worlds.sample_anchors(WORLD, 5, 0)
    np.testing.assert_allclose(WORLD.cdf(x, ratings[:, None].astype(np.float64))[:, 0],
                               (np.arange(5) + 0.5) / 5, atol=1e-5)


def test_some_items_are_rated_by_annotators_of_their_own():
    pairs = worlds.sample_pairs(WORLD, 'independent', 2000, 0)
    ratings = worlds.sample_ratings(WORLD, pairs.x, 0, 0.5)
    rated = np.isfinite(ratings)
    assert rated.mean() == pytest.approx(0.5, abs=0.03)
    shares, judges = (WORLD.cdf(pairs.x[rated], r[rated][:, None].astype(np.float64))[:, 0]
                      for r in (ratings, pairs.rewards))
    assert scipy.stats.kstest(shares, 'uniform').pvalue > 0.01
    # They are not those who chose.
    assert abs(np.corrcoef(shares, judges)[0, 1]) < 0.08
    assert np.isfinite(worlds.sample_ratings(WORLD, pairs.x, 0)).all()


def test_unknown_scheme():
    with pytest.raises(ValueError, match=r"scheme 'alone', expected one of \('independent'"):
        worlds.sample_pairs(WORLD, 'alone', 2, 0)
    with pytest.raises(ValueError, match="scheme 'alone'"):
        worlds.win_probability(WORLD, items(2)[None], 'alone')


def test_expectations_over_labels_by_hand():
    # Right with .8, .6 (the second is preferred) and a coin toss.
    wins = np.array([0.8, 0.4, 0.9])
    assert worlds.expected_accuracy(wins, np.array([2.0, -0.1, 0.0])) == pytest.approx(
        (0.8 + 0.6 + 0.5) / 3)
    half = np.log([0.5, 0.5, 0.5])
    assert worlds.expected_nll(wins, half, half) == pytest.approx(math.log(2.0))
    one = worlds.expected_nll(np.array([0.25]), np.log([0.5]), np.log([0.2]))
    assert one == pytest.approx(-(0.25 * math.log(0.5) + 0.75 * math.log(0.2)))


# Comparing with the truth.


def test_the_truth_matches_itself_up_to_shift_and_scale():
    x = items(50)
    true = WORLD.quantile(x, TAUS)
    exact = worlds.match(WORLD, x, true, TAUS)
    assert exact.w1_shift == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(exact.coverage, TAUS, atol=1e-9)
    assert (exact.crossing, exact.spread_ratio) == (0.0, pytest.approx(1.0))
    assert exact.spread_correlation == pytest.approx(1.0)
    other = worlds.match(WORLD, x, 3.0 + 2.0 * true, TAUS)
    assert other.w1_affine == pytest.approx(0.0, abs=1e-4)
    assert (other.scale, other.spread_ratio) == (pytest.approx(0.5, abs=1e-4), pytest.approx(2.0))
    assert other.w1_shift > 0.5


def test_match_by_hand():
    x = items(2)
    true = WORLD.quantile(x, TAUS[:3])
    # Errors 1, 1, 1, 1, 1 and 4 after one of the quantiles was moved: the median shift is -1,
    # and 3 / 6 remains.
    predicted = true + 1.0
    predicted[1, 2] += 3.0
    match = worlds.match(WORLD, x, predicted, TAUS[:3])
    assert match.shift == pytest.approx(-1.0)
    assert match.w1_shift == pytest.approx(0.5)
    expected = [WORLD.cdf(x[i:i + 1], (predicted - 1.0)[i:i + 1, 2:])[0, 0] for i in range(2)]
    np.testing.assert_allclose(match.coverage, [*TAUS[:2], np.mean(expected)], atol=1e-9)
    assert match.coverage_mae == pytest.approx(abs(np.mean(expected) - 0.25) / 3)
    # One of four neighbours in the wrong order; sorted, it is the truth.
    swapped = true.copy()
    swapped[0, :2] = swapped[0, 1::-1]
    crossed = worlds.match(WORLD, x, swapped, TAUS[:3])
    assert crossed.crossing == 0.25
    assert crossed.w1_shift == pytest.approx(0.0, abs=1e-12)


def test_best_affine_map_is_the_least_absolute_deviation():
    x = items(40)
    rng = np.random.default_rng(0)
    predicted = 0.7 * WORLD.quantile(x, TAUS) + rng.normal(0.0, 0.3, (40, 10))
    match = worlds.match(WORLD, x, predicted, TAUS)
    ordered, true = np.sort(predicted, axis=1), WORLD.quantile(x, TAUS)
    grid = min(np.mean(np.abs(a * ordered + b - true))
               for a in np.linspace(0.5, 2.0, 151) for b in np.linspace(-0.5, 0.5, 101))
    assert match.w1_affine <= grid
    assert match.w1_affine == pytest.approx(grid, abs=1e-3)
    assert match.w1_affine < match.w1_shift


def test_point_masses_have_no_spread():
    x = items(20)
    match = worlds.match(WORLD, x, np.repeat(WORLD.mean(x)[:, None], 10, axis=1), TAUS)
    assert (match.spread_ratio, match.crossing) == (pytest.approx(0.0), 0.0)
    assert math.isnan(match.spread_correlation)
    assert match.outer_rank == pytest.approx(1.0)


# What labels leave open.


def test_one_number_an_item_is_nearly_all_that_labels_show():
    x = items(10)
    value = worlds.scalar_bound(WORLD, x)
    pairs = np.array(list(itertools.combinations(range(10), 2)))
    wins = worlds.win_probability(WORLD, x[pairs], 'independent')
    bayes = worlds.expected_nll(wins, np.log(wins), np.log1p(-wins))

    def nll(rewards):
        lead = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
        return worlds.expected_nll(wins, -np.logaddexp(0, -lead), -np.logaddexp(0, lead))

    best = scipy.optimize.minimize(nll, np.zeros(10), tol=1e-12)
    assert value == pytest.approx(best.fun - bayes, abs=1e-8)
    # Published: all distributional information is worth at most .0013 nats a pair.
    assert 0.0 < worlds.scalar_bound(WORLD, items(80)) <= 0.0013


@pytest.mark.parametrize('seed', range(3))
def test_equal_win_probabilities_with_another_spread(seed):
    true = WORLD.quantile(items(6, seed), TAUS)
    other = worlds.equal_win_probabilities(true)
    for a, b in itertools.combinations(range(6), 2):
        first, second = (
            math.log(np.mean([sigma(i - j) for i in q[a] for j in q[b]])) for q in (true, other))
        assert first == pytest.approx(second, abs=1e-9)
    assert np.all(np.diff(other, axis=1) > 0.0)
    assert other.std(axis=1).mean() / true.std(axis=1).mean() > 1.6


def test_equal_win_probabilities_may_not_be_found():
    with pytest.raises(ValueError, match='of these 14 x 10 were found from a spread of 2.0 times'):
        worlds.equal_win_probabilities(WORLD.quantile(items(14), TAUS))
