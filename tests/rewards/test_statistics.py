"""Statistics against hand-worked numbers and independent libraries, weighted too."""

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import sklearn.linear_model
import sklearn.metrics
import sklearn.preprocessing
from scipy.special import expit

from qrm.rewards import statistics
from qrm.rewards.statistics import Undefined


def random_weights(n, seed=3):
    return np.random.default_rng(seed).integers(0, 4, n)


def random_scores(n=300, seed=0):
    """Scores on a coarse grid, so that many are equal, and classes they are related to."""
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.3
    return np.round(rng.normal(size=n) + positive, 1), positive


def test_means_and_accuracy_by_hand():
    assert statistics.mean(np.array([1.0, 2.0, 6.0]))(None) == 3.0
    assert statistics.mean(np.array([1.0, 2.0, 6.0]))(np.array([0, 2, 1])) == pytest.approx(10 / 3)
    assert statistics.accuracy(np.array([2.0, 0.0, -1.0, 3.0]))(None) == pytest.approx(2.5 / 4)
    # Of 1, 3 and 3, 5: mean 3, variance 2.
    assert statistics.variation(np.array([1.0, 3.0, 5.0]))(np.array([1, 2, 1])) == pytest.approx(
        np.sqrt(2.0) / 3.0)


@pytest.mark.parametrize('weights', [None, random_weights(300)])
def test_rank_correlation_matches_scipy(weights):
    a, _ = random_scores(seed=1)
    b = np.round(a + np.random.default_rng(2).normal(size=300), 1)
    times = np.ones(300, int) if weights is None else weights
    expected = scipy.stats.spearmanr(np.repeat(a, times), np.repeat(b, times)).statistic
    assert statistics.rank_correlation(a, b)(weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('weights', [None, random_weights(300)])
def test_auroc_matches_sklearn(weights):
    score, positive = random_scores()
    expected = sklearn.metrics.roc_auc_score(positive, score, sample_weight=weights)
    assert statistics.auroc(score, positive)(weights) == pytest.approx(expected, abs=1e-12)


def test_auroc_within_strata_by_hand():
    # Stratum 0: positive 3 against 1 and 3, one half lost. Stratum 1: 5 and 0 against 2.
    score = np.array([3.0, 1.0, 3.0, 5.0, 0.0, 2.0])
    positive = np.array([True, False, False, True, True, False])
    strata = np.array([0, 0, 0, 1, 1, 1])
    statistic = statistics.auroc(score, positive, strata)
    assert statistic(None) == pytest.approx((1.0 + 0.5 + 1.0 + 0.0) / 4)
    # The comparison with 1 counts twice, that of 5 with 2 six times, that of 0 not at all.
    assert statistic(np.array([1, 2, 1, 3, 0, 2])) == pytest.approx((2.0 + 0.5 + 6.0) / 9)
    with pytest.raises(Undefined, match='no positive item'):
        statistic(np.array([1, 0, 0, 1, 1, 0]))


def test_auroc_within_strata_removes_what_strata_say():
    rng = np.random.default_rng(0)
    strata = rng.integers(0, 5, 20_000)
    positive = rng.random(20_000) < 0.1 + 0.15 * strata
    score = strata + rng.random(20_000)
    assert statistics.auroc(score, positive)(None) > 0.7
    assert statistics.auroc(score, positive, strata)(None) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize('weights', [None, random_weights(400)])
def test_unexplained_share_matches_splines_of_sklearn(weights):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=400)
    spread = np.abs(rewards) + rng.normal(size=400)
    knots = np.quantile(rewards, np.linspace(0.0, 1.0, 11))[:, None]
    basis = sklearn.preprocessing.SplineTransformer(degree=1, knots=knots).fit_transform(
        rewards[:, None])
    fit = sklearn.linear_model.LinearRegression(fit_intercept=False)
    fit.fit(basis, spread, sample_weight=weights)
    count = 400 if weights is None else weights.sum()
    left = 1.0 - fit.score(basis, spread, sample_weight=weights)
    assert statistics.unexplained_share(spread, rewards)(weights) == pytest.approx(
        min(left * (count - 1) / (count - 11), 1.0), rel=1e-9)


@pytest.mark.parametrize(('function', 'noise', 'expected'), [
    (np.abs, 0.0, 0.0), (np.tanh, 0.0, 0.0), (np.zeros_like, 1.0, 1.0),
    # The variance of the noise is that of the function, 1 for the identity.
    (lambda x: x, 1.0, 0.5),
])
def test_unexplained_share_of_known_truth(function, noise, expected):
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=20_000)
    spread = function(rewards) + noise * rng.normal(size=20_000)
    assert statistics.unexplained_share(spread, rewards)(None) == pytest.approx(expected, abs=0.02)


def test_crps_by_hand():
    # Atoms 0 and 2: at 1 the mean distance is 1 and half the mean distance of two draws 1/2.
    quantiles = np.array([[0.0, 2.0], [0.0, 2.0], [3.0, 3.0]])
    np.testing.assert_allclose(statistics.crps(quantiles, np.array([1.0, 4.0, 1.0])),
                               [0.5, 2.5, 2.0])
    midpoints = scipy.stats.norm.ppf((np.arange(10) + 0.5) / 10)[None]
    assert statistics.crps(midpoints, np.zeros(1))[0] == pytest.approx(0.2391, abs=5e-5)


def test_coverage_error_by_hand():
    # Ratings 0..3 lie below quantiles 0, 1.5 and 9 at rates 1/4, 1/2 and 1.
    quantiles, taus = np.tile([0.0, 1.5, 9.0], (4, 1)), np.array([0.2, 0.5, 0.8])
    statistic = statistics.coverage_error(quantiles, np.arange(4.0), taus)
    assert statistic(None) == pytest.approx((0.05 + 0.0 + 0.2) / 3)
    assert statistic(np.array([0, 0, 0, 7])) == pytest.approx((0.2 + 0.5 + 0.2) / 3)


def test_scores_match_sklearn():
    win, label = np.array([0.9, 0.2, 0.6]), np.array([1.0, 0.8, 0.6])
    # A soft label is both labels, in parts.
    both = [1, 1, 1, 0, 0, 0], np.tile(win, 2)
    parts = np.concatenate([label, 1.0 - label])
    assert statistics.log_scores(np.log(win), np.log1p(-win), label).mean() == pytest.approx(
        sklearn.metrics.log_loss(*both, sample_weight=parts))
    assert statistics.brier_scores(np.log(win), label).mean() == pytest.approx(
        sklearn.metrics.brier_score_loss(*both, sample_weight=parts))


def test_calibration_error_by_hand():
    # Two bins, of .9 and .6: gaps .9 - (.7 + 0) / 2 and .6 - 1.
    statistic = statistics.calibration_error(
        np.array([0.9, 0.9, 0.6]), np.array([0.7, 0.0, 1.0]))
    assert statistic(None) == pytest.approx((2 * 0.55 + 0.4) / 3)
    assert statistic(np.array([2, 0, 3])) == pytest.approx((2 * 0.2 + 3 * 0.4) / 5)


def test_calibration_error_of_labels_by_hand():
    def error(win, label):
        return statistics.calibration_error(
            *statistics.stated_and_observed(np.log(win), np.float64(label)))(None)

    # Two bins: of .9, right and wrong, so right half of the time; of .6, right both times.
    assert error([0.9, 0.1, 0.6, 0.6], [1, 1, 1, 1]) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    assert error([0.5, 1.0], [1, 1]) == pytest.approx(0.0)
    # As labelled, .9 was right .8 of the time, and .6 (of the other side) .3 of the time.
    assert error([0.9, 0.4], [0.8, 0.7]) == pytest.approx(0.5 * 0.1 + 0.5 * 0.3)
    # A coin in float32, whose half is no half in float64, and its neighbours prefer none.
    half = np.float32(np.log(0.5))
    coins = np.array([half, np.nextafter(half, np.float32(0)), np.nextafter(half, np.float32(-1))])
    assert (np.exp(np.float64(coins)) != 0.5).all()
    confidence, agreement = statistics.stated_and_observed(coins, np.ones(3))
    assert confidence.tolist() == agreement.tolist() == [0.5] * 3
    # The first drawn three times.
    assert statistics.calibration_error(np.array([0.9, 0.6]), np.array([0.8, 0.3]))(
        np.array([3, 1])) == pytest.approx(0.75 * 0.1 + 0.25 * 0.3)


def test_calibrated_predictions_have_a_small_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1.0, 200_000)
    assert statistics.calibration_error(
        p, np.float64(rng.random(p.size) < p))(None) < 0.005


@pytest.mark.parametrize('truth', [0.5, 2.0])
def test_temperature_finds_the_truth_and_the_minimum(truth):
    rng = np.random.default_rng(0)
    logit = 2.0 * rng.normal(size=4000)
    label = (rng.random(4000) < expit(logit / truth)).astype(float)
    found = statistics.temperature(logit, label)(None)
    assert found == pytest.approx(truth, rel=0.1)

    def loss(log_temperature, weights):
        scaled = logit / np.exp(log_temperature)
        return np.average(np.logaddexp(0.0, scaled) - label * scaled, weights=weights)

    for weights in (None, random_weights(4000)):
        best = scipy.optimize.minimize_scalar(loss, (-1.0, 1.0), args=(weights,), tol=1e-12)
        assert statistics.temperature(logit, label)(weights) == pytest.approx(
            np.exp(best.x), rel=1e-6)


def test_temperature_that_does_not_exist():
    logit = np.array([1.0, -2.0, 3.0])
    with pytest.raises(Undefined, match='all pairs as labelled'):
        statistics.temperature(logit, np.array([1.0, 0.0, 1.0]))(None)
    with pytest.raises(Undefined, match='coin'):
        statistics.temperature(logit, np.array([0.0, 1.0, 0.0]))(None)
    with pytest.raises(Undefined, match='coin'):
        statistics.temperature(0.0 * logit, np.ones(3))(None)


@pytest.mark.parametrize('weights', [None, random_weights(500)])
def test_length_controlled_accuracy_matches_sklearn(weights):
    rng = np.random.default_rng(0)
    margin, log_ratio = rng.normal(0.5, 2.0, 500), rng.normal(0.2, 0.4, 500)
    # Each pair both ways round, so that there are two classes.
    features = np.stack([margin, log_ratio], axis=1)
    fit = sklearn.linear_model.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
    both = None if weights is None else np.tile(weights, 2)
    fit.fit(np.concatenate([features, -features]), np.repeat([1, 0], 500), sample_weight=both)
    expected = np.average(expit(fit.coef_[0, 0] * np.abs(margin)), weights=weights)
    found = statistics.length_controlled_accuracy(margin, log_ratio)(weights)
    assert found == pytest.approx(expected, abs=1e-5)


def test_length_controlled_accuracy_of_known_truth():
    rng = np.random.default_rng(1)
    merit, log_ratio = rng.normal(size=40_000), rng.normal(size=40_000)
    sign = np.where(rng.random(40_000) < expit(merit + 2.0 * log_ratio), 1.0, -1.0)
    for bias in (0.0, 1.0):
        # The log odds are reward + (2 - bias) log_ratio, so at equal length those of the reward.
        margin = sign * (merit + bias * log_ratio)
        expected, _ = scipy.integrate.quad(
            lambda x, size: scipy.stats.norm.pdf(x) * expit(size * abs(x)), -10.0, 10.0,
            args=(np.sqrt(1.0 + bias ** 2),))
        found = statistics.length_controlled_accuracy(margin, sign * log_ratio)(None)
        assert found == pytest.approx(expected, abs=0.01)
    # A reward that is length and noise is right as often as a coin, once length is controlled for.
    margin = sign * (log_ratio + rng.normal(size=40_000))
    assert statistics.accuracy(margin)(None) > 0.65
    assert statistics.length_controlled_accuracy(margin, sign * log_ratio)(None) == pytest.approx(
        0.5, abs=0.01)


def test_length_controlled_wins_match_sklearn():
    rng = np.random.default_rng(0)
    longer = np.round(rng.normal(20.0, 50.0, 300))
    wins = expit(0.4 + 1.5 * np.tanh(longer / 50.0) + rng.normal(size=300))
    shares = np.stack([np.full(300, 1 / 300), rng.dirichlet(np.ones(300))])
    found = statistics.length_controlled_wins(wins, longer, shares)
    # Each pair as a win and as a loss, as much as it is either.
    feature = np.tanh(longer / longer.std())[:, None]
    for share, value in zip(shares, found, strict=True):
        fit = sklearn.linear_model.LogisticRegression(C=np.inf, tol=1e-12).fit(
            np.concatenate([feature, feature]), np.repeat([1, 0], 300),
            sample_weight=300 * np.concatenate([share * wins, share * (1 - wins)]))
        assert value == pytest.approx(expit(fit.intercept_[0]), abs=1e-4)


def test_length_controlled_wins_of_known_truth():
    rng = np.random.default_rng(1)
    longer = rng.normal(60.0, 80.0, 50_000)
    shares = np.full((1, 50_000), 1 / 50_000)
    for merit in (0.0, 0.8):
        chance = expit(merit + 2.0 * np.tanh(longer / longer.std()))
        wins = (rng.random(50_000) < chance).astype(float)
        assert wins.mean() > expit(merit) + 0.1
        found = statistics.length_controlled_wins(wins, longer, shares)
        assert found == pytest.approx(expit(merit), abs=0.01)


def test_length_controlled_wins_where_little_is_known():
    shares = np.full((2, 4), 0.25)
    wins = np.array([1.0, 0.0, 1.0, 1.0])
    # Equal lengths: nothing to control for.
    found = statistics.length_controlled_wins(wins, np.zeros(4), shares)
    np.testing.assert_allclose(found, 0.75, atol=1e-5)
    # Where all are longer, or all shorter, nothing is known of equal lengths.
    for longer in (np.full(4, 3.0), np.array([3.0, 3.0, 3.0, 4.0]), np.array([-1, -9, -2, -3])):
        assert np.isnan(statistics.length_controlled_wins(wins, longer, shares)).all()
    # By the weights that count.
    longer = np.array([3.0, 3.0, -4.0, 5.0])
    found = statistics.length_controlled_wins(
        wins, longer, np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.0, 0.25]]))
    assert np.isnan(found).tolist() == [False, True]
    # Length says all: odds at 0 are even by symmetry, and nothing overflows.
    found = statistics.length_controlled_wins(
        np.array([1.0, 1.0, 0.0, 0.0]), np.array([2.0, 1.0, -1.0, -2.0]), shares)
    np.testing.assert_allclose(found, 0.5, atol=1e-9)
    # All are won: certain, as far as the ridge lets it be.
    found = statistics.length_controlled_wins(np.ones(4), np.array([2.0, 1.0, -1.0, -2.0]), shares)
    assert (found > 0.999).all()


@pytest.mark.parametrize('values', [np.zeros(5), np.full(5, -0.3), np.float32([0.3, 0.3 + 3e-8])])
def test_constant_values_define_no_correlation(values):
    other = np.arange(float(len(values)))
    with pytest.raises(Undefined, match='constant'):
        statistics.rank_correlation(values, other)(None)
    with pytest.raises(Undefined, match='constant'):
        statistics.unexplained_share(values, other)(None)
    # The same holds of what a resample leaves of other values.
    varying = np.append(values, [5.0, 7.0])
    left = np.append(np.ones(len(values), int), [0, 0])
    other = np.arange(float(len(varying)))
    for statistic in (statistics.rank_correlation(varying, other),
                      statistics.rank_correlation(other, varying),
                      statistics.unexplained_share(varying, other)):
        assert np.isfinite(statistic(None))
        with pytest.raises(Undefined, match='constant'):
            statistic(left)
    with pytest.raises(Undefined, match='resample'):
        statistics.mean(values)(np.zeros(len(values), int))


@pytest.mark.parametrize(('spread', 'rewards', 'expected'), [
    ([0.0, 1e-7, 3e-8], [1.0, -0.5, 0.2], [0.0, 0.0, 0.0]),  # collapsed
    ([0.5, 0.50006, 0.49994], [1000.0, 998.0, 999.0], [0.5, 0.5, 0.5]),  # one spread, far from 0
    ([0.5, 0.503, 0.497], [1000.0, 998.0, 999.0], [0.5, 0.503, 0.497]),
    ([3e-6, 1e-7, 2e-6], [1.0, -0.5, 0.2], [3e-6, 1e-7, 2e-6]),  # small, but more than rounding
    ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ([], [], []),
])
def test_spreads_without_the_rounding_of_rewards(spread, rewards, expected):
    found = statistics.beyond_rounding(np.array(spread), np.array(rewards))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0.0)
    assert np.ptp(expected or [0.0]) > 0.0 or len(np.unique(found)) <= 1


def test_shares_of_one_and_correlations_stay_within_their_bounds():
    """A sum of weights goes beyond 1 by rounding, a count over a count does not."""
    weights = np.random.default_rng(0).integers(0, 4, (200, 49))
    ahead, ranks = statistics.accuracy(np.ones(49)), np.arange(49.0) ** 2
    for row in weights:
        assert ahead(row) == 1.0
        assert statistics.rank_correlation(ranks, 3 * ranks)(row) <= 1.0
        assert statistics.rank_correlation(ranks, -ranks)(row) >= -1.0
