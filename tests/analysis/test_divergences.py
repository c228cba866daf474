"""Divergences: closed forms, independent libraries, and simulations of known divergence.

Setting of the simulations unless said: pairs of unit-variance Gaussians of correlation 1/2 whose
means are d apart, so that KL(chosen || rejected) = d^2 / 2 nats whatever the correlation.
"""

import numpy as np
import pytest
import scipy.spatial
import scipy.special
import scipy.stats
import sklearn.linear_model

from qrm.analysis import divergences
from qrm.rewards import resampling

N = 2354
NAMES = ('gaussian', 'knn', 'logistic', 'kde', 'kde_sum_without_dx',
         'density_histogram_without_width', 'epsilon_histogram_50', 'epsilon_histogram_5000',
         'softmax')
REAL = NAMES[:4]
# Accuracy .63 at correlation 1/2: the mean shift in standard deviations, squared, over 2.
KL_AT_63 = scipy.stats.norm.ppf(0.63) ** 2 * 2.0 * (1.0 - 0.5) / 2.0


def make_pairs(kl, seed, n=N, rho=0.5):
    rng = np.random.default_rng(seed)
    rejected = rng.standard_normal(n)
    chosen = rho * rejected + np.sqrt(1.0 - rho ** 2) * rng.standard_normal(n)
    return chosen + np.sqrt(2.0 * kl), rejected


def evaluate(name, chosen, rejected, weights=None, clusters=None):
    clusters = np.arange(len(chosen)) if clusters is None else clusters
    return divergences.ESTIMATORS[name].function(chosen, rejected, weights, clusters)


def simulate(name, kl, repeats):
    return np.array([evaluate(name, *make_pairs(kl, seed)) for seed in range(repeats)])


def random_weights(n, seed=3):
    return np.random.default_rng(seed).integers(0, 4, n)


# Values against closed forms and independent libraries.


@pytest.mark.parametrize(('arguments', 'expected'), [
    # (4 + 1) / 1 - 1 - log 4, halved.
    ((1.0, 4.0, 0.0, 1.0), 2.0 - np.log(2.0)),
    # (1 + 1) / 4 - 1 + log 4, halved.
    ((0.0, 1.0, 1.0, 4.0), np.log(2.0) - 0.25),
    ((0.5, 1.0, 0.0, 1.0), 0.125),
    ((3.0, 2.0, 3.0, 2.0), 0.0),
])
def test_gaussian_kl_by_hand(arguments, expected):
    assert divergences.gaussian_kl(*arguments) == pytest.approx(expected, abs=1e-12)


def test_gaussian_fits_means_and_variances():
    # Means 1 and 0, variances 1 and 4.
    chosen = np.repeat([0.0, 2.0], 5)
    rejected = np.repeat([-2.0, 2.0], 5)
    assert evaluate('gaussian', chosen, rejected) == pytest.approx(np.log(2.0) - 0.25, abs=1e-12)


def knn_oracle(chosen, rejected, weights):
    chosen, rejected, weights = (x[weights > 0] for x in (chosen, rejected, weights))
    n = len(chosen)
    rho = scipy.spatial.cKDTree(chosen[:, None]).query(chosen[:, None], 6)[0][:, 5]
    nu = scipy.spatial.cKDTree(rejected[:, None]).query(chosen[:, None], 5)[0][:, 4]
    return np.average(np.log(nu / rho), weights=weights) + np.log(n / (n - 1))


@pytest.mark.parametrize('n', [10, 57, N])
def test_knn_matches_kd_tree(n):
    chosen, rejected = make_pairs(0.2, 1, n)
    for weights in (np.ones(n, int), np.maximum(random_weights(n), np.arange(n) < 6)):
        assert evaluate('knn', chosen, rejected, weights) == pytest.approx(
            knn_oracle(chosen, rejected, weights), abs=1e-12)


def test_knn_counts_atoms():
    chosen = np.repeat([0.0, 1.0], [8, 8])
    rejected = np.repeat([0.0, 1.0], [12, 4])
    # Of each chosen reward there are 7 others; of the rejected 12 and 4; 1/2 is added.
    expected = 0.5 * (np.log(7.5 / 12.5) + np.log(7.5 / 4.5)) + np.log(16.0 / 15.0)
    assert evaluate('knn', chosen, rejected) == pytest.approx(expected, abs=1e-12)


def splitmix_fold(cluster):
    """SplitMix64 on Python integers; 0 gives 0xE220A8397B1DCDAF, the generator's first output."""
    mask = (1 << 64) - 1
    z = (int(cluster) + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) % 5


def test_logistic_matches_sklearn():
    n = 600
    chosen, rejected = make_pairs(0.2, 4, n)
    weights, clusters = random_weights(n), 10 * (np.arange(n) // 3) - 70
    assert splitmix_fold(0) == 0xE220A8397B1DCDAF % 5
    folds = np.array([splitmix_fold(cluster) for cluster in clusters])
    rewards, both = np.concatenate([chosen, rejected]), np.tile(weights, 2)
    mean = np.average(rewards, weights=both)
    z = (rewards - mean) / np.sqrt(np.average((rewards - mean) ** 2, weights=both))
    features = np.stack([np.ones_like(z), z, z ** 2], 1)
    labels = np.repeat([1, 0], n)
    log_odds = np.empty(n)
    for fold in range(5):
        train = np.tile(folds != fold, 2)
        model = sklearn.linear_model.LogisticRegression(
            C=1.0 / (1e-6 * both[train].sum()), fit_intercept=False, solver='newton-cholesky',
            tol=1e-10)
        model.fit(features[train], labels[train], sample_weight=both[train])
        log_odds[folds == fold] = model.decision_function(features[:n][folds == fold])
    expected = np.average(log_odds, weights=weights)
    assert evaluate('logistic', chosen, rejected, weights, clusters) == pytest.approx(
        expected, abs=1e-7)


def test_kde_matches_scipy():
    chosen, rejected = make_pairs(0.2, 5, 500)
    weights = random_weights(500)
    p, q = (scipy.stats.gaussian_kde(np.repeat(side, weights)) for side in (chosen, rejected))
    grid = np.linspace(-8.0, 8.0, 8001)
    # The documented floor; without it the sum is larger by 4 parts in 10,000.
    pooled = np.concatenate([chosen[weights > 0], rejected[weights > 0]])
    p, q = (np.maximum(density(grid), 1e-12 / np.ptp(pooled)) for density in (p, q))
    expected = (p * np.log(p / q)).sum() * (grid[1] - grid[0])
    assert evaluate('kde', chosen, rejected, weights) == pytest.approx(expected, rel=2e-5)


def test_kde_sum_matches_scipy():
    chosen, rejected = make_pairs(0.2, 6, 500)
    pooled = np.concatenate([chosen, rejected])
    grid = np.linspace(pooled.min(), pooled.max(), 1000)
    p, q = scipy.stats.gaussian_kde(chosen)(grid), scipy.stats.gaussian_kde(rejected)(grid)
    assert evaluate('kde_sum_without_dx', chosen, rejected) == pytest.approx(
        (p * np.log(p / q)).sum(), rel=1e-3)


def test_histograms_match_numpy():
    chosen, rejected = make_pairs(0.2, 7, 500)
    pooled = np.concatenate([chosen, rejected])
    limits = pooled.min(), pooled.max()
    p, q = (np.histogram(side, 100, limits, density=True)[0] for side in (chosen, rejected))
    both = (p > 0) & (q > 0)
    assert evaluate('density_histogram_without_width', chosen, rejected) == pytest.approx(
        (p[both] * np.log(p[both] / q[both])).sum(), rel=1e-12)
    for bins in (50, 5000):
        p, q = (np.histogram(side, bins, limits)[0] / 500 + 1e-10 for side in (chosen, rejected))
        assert evaluate(f'epsilon_histogram_{bins}', chosen, rejected) == pytest.approx(
            (p * np.log(p / q)).sum(), rel=1e-12)


def test_softmax_matches_scipy():
    chosen, rejected = make_pairs(0.2, 8, 500)
    expected = scipy.stats.entropy(scipy.special.softmax(chosen), scipy.special.softmax(rejected))
    assert evaluate('softmax', chosen, rejected) == pytest.approx(expected, rel=1e-12)


# Accuracy where the divergence is known.


# The bias limit of knn at .455 is above the .005 of its other rows because the formula itself has
# a bias of -.010 there: a k-d tree implementation gives -.011 with a standard error of .002.
@pytest.mark.parametrize(('name', 'kl', 'bias', 'sd'), [
    ('gaussian', 0.0, 0.01, 0.001),
    ('gaussian', 0.055, 0.01, 0.008),
    ('gaussian', 0.128, 0.01, 0.015),
    ('gaussian', 0.455, 0.01, 0.036),
    ('knn', 0.0, 0.005, 0.02),
    ('knn', 0.055, 0.005, 0.02),
    ('knn', 0.128, 0.005, 0.025),
    ('knn', 0.455, 0.014, 0.04),
    ('logistic', 0.0, 0.001, 0.0015),
    ('logistic', 0.055, 0.003, 0.01),
    ('logistic', 0.128, 0.005, 0.015),
    ('logistic', 0.455, 0.01, 0.036),
    ('kde', 0.0, 0.006, 0.004),
    ('kde', 0.055, 0.006, 0.011),
    ('kde', 0.128, 0.01, 0.018),
    ('kde', 0.455, 0.01, 0.045),
])
def test_bias_and_spread(name, kl, bias, sd):
    values = simulate(name, kl, 150 if name == 'logistic' else 400)
    assert abs(values.mean() - kl) <= bias
    assert values.std(ddof=1) <= sd


@pytest.mark.parametrize('name', REAL)
def test_direction_is_chosen_from_rejected(name):
    # Standard deviations 1 and 2: .318 nats one way, .807 the other.
    forward, backward = [], []
    for seed in range(10):
        chosen, rejected = make_pairs(0.0, seed)
        forward.append(evaluate(name, chosen, 2.0 * rejected))
        backward.append(evaluate(name, 2.0 * rejected, chosen))
    assert np.mean(forward) == pytest.approx(np.log(2.0) - 0.375, abs=0.03)
    # Chosen rewards beyond the last rejected one cost knn a third of the value.
    assert np.mean(backward) > (0.45 if name == 'knn' else 0.7)


@pytest.mark.parametrize(('name', 'expected', 'tolerance'), [
    ('kde_sum_without_dx', 7.6, 0.6),
    ('density_histogram_without_width', 1.1, 0.1),
    ('epsilon_histogram_50', 0.118, 0.01),
    ('epsilon_histogram_5000', 6.75, 0.2),
    # Limit: variance times (1 - correlation), as normalisers of both sides agree.
    ('softmax', 0.5, 0.02),
    *((name, KL_AT_63, 0.01) for name in REAL),
])
def test_values_at_accuracy_63(name, expected, tolerance):
    values = simulate(name, KL_AT_63, 60)
    assert values.mean() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(('name', 'expected', 'tolerance'), [
    ('kde_sum_without_dx', 0.45, 0.1),
    ('density_histogram_without_width', 0.43, 0.05),
    ('epsilon_histogram_50', 0.04, 0.01),
    ('epsilon_histogram_5000', 6.6, 0.2),
    ('softmax', 0.5, 0.02),
])
def test_suspects_are_not_zero_without_a_difference(name, expected, tolerance):
    assert simulate(name, 0.0, 60).mean() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(('n', 'kl', 'bins', 'expected'), [
    # scipy.stats.entropy of np.histogram + 1e-10, two independent normal samples, 400 draws.
    (79, 0.0, 50, 3.13), (65, 0.0, 50, 4.17), (79, 0.0, 20, 0.92), (65, 0.0, 100, 8.1),
    # An AUC of .7: the samples are sqrt(2) Phi^-1(.7) apart.
    (79, scipy.stats.norm.ppf(0.7) ** 2, 50, 4.36), (65, scipy.stats.norm.ppf(0.7) ** 2, 50, 5.31),
])
def test_histograms_of_few_pairs_count_empty_bins(n, kl, bins, expected):
    function = divergences.epsilon_histogram(bins)
    values = [function(*make_pairs(kl, seed, n, rho=0.0), None, np.arange(n))
              for seed in range(400)]
    assert np.mean(values) == pytest.approx(expected, abs=0.25)


def test_softmax_is_blind_to_a_shift():
    chosen, rejected = make_pairs(0.0, 9)
    assert evaluate('softmax', chosen + 3.0, rejected) == pytest.approx(
        evaluate('softmax', chosen, rejected), abs=1e-12)


# Invariances.


@pytest.mark.parametrize('scale', [0.5, 2.0])
@pytest.mark.parametrize('name', NAMES)
def test_rescaling(name, scale):
    chosen, rejected = make_pairs(0.128, 10)
    value = evaluate(name, chosen, rejected)
    scaled = evaluate(name, scale * chosen, scale * rejected)
    if name in REAL or name.startswith('epsilon_histogram'):
        assert scaled == pytest.approx(value, rel=1e-9)
    elif name == 'softmax':
        # The limit is scale^2 / 2; at scale 2 few samples carry the mean, so only the order holds.
        assert (scaled - value) * (scale - 1.0) > 0.15
    else:
        assert scaled == pytest.approx(value / scale, rel=1e-9)


@pytest.mark.parametrize('name', REAL)
def test_real_estimators_ignore_units(name):
    chosen, rejected = make_pairs(0.128, 11)
    assert evaluate(name, 7.0 - 0.3 * chosen, 7.0 - 0.3 * rejected) == pytest.approx(
        evaluate(name, chosen, rejected), rel=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_order_of_pairs_does_not_matter(name):
    chosen, rejected = make_pairs(0.128, 12, 300)
    clusters, weights = np.arange(300) // 2, random_weights(300)
    order = np.random.default_rng(0).permutation(300)
    shuffled = evaluate(name, chosen[order], rejected[order], weights[order], clusters[order])
    assert shuffled == pytest.approx(evaluate(name, chosen, rejected, weights, clusters), rel=1e-9)


# Weights.


@pytest.mark.parametrize('name', sorted(set(NAMES) - {'knn'}))
def test_weights_repeat_pairs(name):
    chosen, rejected = make_pairs(0.128, 13, 300)
    clusters, weights = np.arange(300) // 2, random_weights(300)
    repeated = [np.repeat(x, weights) for x in (chosen, rejected)]
    expected = evaluate(name, *repeated, clusters=np.repeat(clusters, weights))
    # Rounding of the FFT matters where a density is near its floor.
    tolerance = {'gaussian': 1e-12, 'kde': 1e-6, 'kde_sum_without_dx': 1e-6}.get(name, 1e-9)
    assert evaluate(name, chosen, rejected, weights, clusters) == pytest.approx(
        expected, rel=tolerance, abs=0.0)


@pytest.mark.parametrize('name', NAMES)
def test_weight_zero_drops_the_pair(name):
    chosen, rejected = make_pairs(0.128, 14, 300)
    # Extremes are absent too, so that no range or grid may see them.
    chosen[:2] = 50.0, -50.0
    clusters, weights = np.arange(300) // 2, random_weights(300)
    weights[:2] = 0
    keep = weights > 0
    assert evaluate(name, chosen, rejected, weights, clusters) == evaluate(
        name, chosen[keep], rejected[keep], weights[keep], clusters[keep])


@pytest.mark.parametrize('name', NAMES)
def test_no_weights_means_ones(name):
    chosen, rejected = make_pairs(0.128, 15, 300)
    assert evaluate(name, chosen, rejected) == evaluate(
        name, chosen, rejected, np.ones(300, np.int32))


# Resampling.


def test_replicate_values_match_repeated_data():
    chosen, rejected = make_pairs(0.128, 16, 100)
    clusters = np.arange(100) // 4
    weights = resampling.cluster_bootstrap_weights(clusters, 5, 0)
    values = divergences.replicate_values(
        chosen, rejected, clusters, divergences.ESTIMATORS['gaussian'], weights)
    for value, row in zip(values, weights, strict=True):
        c, r = np.repeat(chosen, row), np.repeat(rejected, row)
        expected = (c.var() + (c.mean() - r.mean()) ** 2) / r.var() - 1 - np.log(c.var() / r.var())
        assert value == pytest.approx(expected / 2, abs=1e-12)


def test_interval_coverage_needs_clusters():
    # Four pairs share 90% of the variance of each side, so pairs are far from independent.
    pairs, size, simulations = 400, 4, 150
    covered = np.zeros(2)
    for seed in range(simulations):
        rng = np.random.default_rng(seed)
        shared = np.repeat(rng.standard_normal((2, pairs // size)), size, 1)
        rewards = np.sqrt(0.9) * shared + np.sqrt(0.1) * rng.standard_normal((2, pairs))
        chosen, rejected = rewards[0] + np.sqrt(2.0 * 0.455), rewards[1]
        for i, clusters in enumerate((np.arange(pairs) // size, np.arange(pairs))):
            weights = resampling.cluster_bootstrap_weights(clusters, 200, seed)
            low, high = resampling.interval(divergences.replicate_values(
                chosen, rejected, clusters, divergences.ESTIMATORS['gaussian'], weights))
            covered[i] += low <= 0.455 <= high
    by_cluster, by_pair = covered / simulations
    assert 0.89 <= by_cluster <= 0.99
    assert by_pair < 0.8


def test_swap_null_gaussian():
    chosen, rejected = make_pairs(0.055, 17)
    values = divergences.swap_null(
        chosen, rejected, np.arange(N), divergences.ESTIMATORS['gaussian'], 4000, 0)
    # Second order: (difference of means)^2 / 2 + (log ratio of variances)^2 / 4, where both are
    # normal, of variances 2 (1 - 1/2) / n and 4 (1 - 1/4) / n.
    normal = np.random.default_rng(1).standard_normal((2, 200_000))
    expected = (normal[0] ** 2 / 2 + 3.0 * normal[1] ** 2 / 4) / N
    assert np.median(values) == pytest.approx(0.0004, abs=5e-5)
    assert np.median(values) == pytest.approx(np.median(expected), rel=0.1)
    assert np.quantile(values, 0.99) == pytest.approx(0.0024, abs=5e-4)
    assert np.quantile(values, 0.99) == pytest.approx(np.quantile(expected, 0.99), rel=0.15)


def test_swap_null_knn():
    chosen, rejected = make_pairs(0.455, 18)
    values = divergences.swap_null(
        chosen, rejected, np.arange(N), divergences.ESTIMATORS['knn'], 300, 0)
    assert abs(np.median(values)) < 0.01
    np.testing.assert_allclose(np.quantile(values, [0.025, 0.975]), [-0.035, 0.035], atol=0.012)


def test_swap_null_swaps_half_of_the_pairs():
    def share_kept(chosen, rejected, weights, clusters):
        assert weights is None
        # Pair i holds i and -i - 1: a swap moves both numbers or none.
        np.testing.assert_array_equal(chosen + rejected, -1.0)
        np.testing.assert_array_equal(np.maximum(chosen, rejected), clusters)
        return (chosen >= 0.0).mean()

    probe = divergences.Estimator('probe', 'Probe', share_kept, False, 'Counts pairs.')
    ids = np.arange(1000)
    shares = divergences.swap_null(ids, -ids - 1, ids, probe, 400, 0)
    assert shares.mean() == pytest.approx(0.5, abs=0.005)
    assert shares.std() == pytest.approx(0.5 / np.sqrt(1000.0), rel=0.2)
    np.testing.assert_array_equal(shares, divergences.swap_null(ids, -ids - 1, ids, probe, 400, 0))


@pytest.mark.parametrize('name', NAMES)
def test_summarise(name):
    chosen, rejected = make_pairs(0.128, 19, 400)
    clusters = np.arange(400) // 2
    estimator = divergences.ESTIMATORS[name]
    weights = resampling.cluster_bootstrap_weights(clusters, 20, 0)
    summary = divergences.summarise(chosen, rejected, clusters, estimator, weights, 40, 1, 0.8)
    assert summary.value == evaluate(name, chosen, rejected, None, clusters)
    assert summary.half == evaluate(name, chosen / 2, rejected / 2, None, clusters)
    assert summary.double == evaluate(name, chosen * 2, rejected * 2, None, clusters)
    np.testing.assert_array_equal(summary.replicates, divergences.replicate_values(
        chosen, rejected, clusters, estimator, weights))
    assert (summary.low, summary.high) == pytest.approx(
        tuple(np.quantile(summary.replicates, [0.1, 0.9])))
    null = divergences.swap_null(chosen, rejected, clusters, estimator, 40, 1)
    assert summary.null == pytest.approx(np.median(null))
    assert summary.null_high == pytest.approx(np.quantile(null, 0.95))


# Registry, degenerate inputs, errors.


def test_registry():
    assert tuple(divergences.ESTIMATORS) == NAMES
    for name, estimator in divergences.ESTIMATORS.items():
        assert estimator.name == name
        assert estimator.is_kl == (name in REAL)
        if not name.startswith('epsilon_histogram'):  # which are made
            assert estimator.function is getattr(divergences, name)
        assert estimator.function.__doc__.startswith('Not a KL') != estimator.is_kl
        assert ('not a KL' in estimator.note) != estimator.is_kl


@pytest.mark.parametrize('name', NAMES)
def test_constant_rewards_are_no_divergence(name):
    same = np.full(40, 0.1)
    assert evaluate(name, same, same) == 0.0


@pytest.mark.parametrize('name', NAMES)
def test_rounding_is_no_divergence(name):
    # The next float32 is 2.4e-7 away. One side is off in one place, the other in a half of them,
    # so that their variances differ fortyfold.
    step = float(np.spacing(np.float32(2.5)))
    chosen, rejected = np.full(160, 2.5), 2.5 + step * (np.arange(160) % 2)
    chosen[0] += step
    assert evaluate(name, chosen, rejected) == 0.0
    # As is said of rewards that differ so around 0, where they are no rounding.
    if name in REAL:
        assert evaluate(name, chosen - 2.5, rejected - 2.5) > 0.1


def degenerate_inputs():
    x = np.random.default_rng(20).standard_normal(200)
    constant = np.full(200, 0.1)
    return {
        'two constants': (constant + 1.0, constant),
        'chosen constant': (constant, x),
        'rejected constant': (x, constant),
        'same rewards': (x, x),
        'integers': (np.round(x), np.round(x[::-1] - 0.5)),
        'mostly zeros': (np.where(x > 1.0, x, 0.0), np.where(x < -1.0, x, 0.0)),
        'separable': (x + 100.0, x),
        'outlier': (np.append(x[1:], 1e6), x),
        'offset': (1e5 + x, 1e5 + x[::-1]),
        'large offset': (1e8 + x, 1e8 + x[::-1]),
    }


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('case', sorted(degenerate_inputs()))
@pytest.mark.parametrize('name', NAMES)
def test_degenerate_inputs_stay_finite(name, case):
    chosen, rejected = degenerate_inputs()[case]
    assert np.isfinite(evaluate(name, chosen, rejected))


@pytest.mark.parametrize('name', REAL)
def test_separated_samples_score_high(name):
    x = np.random.default_rng(21).standard_normal(200)
    assert evaluate(name, x + 100.0, x) > 4.0


@pytest.mark.parametrize('step', [0.1, 0.5])
def test_knn_on_a_coarse_grid_stays_near_the_truth(step):
    values = [evaluate('knn', *(step * np.round(side / step) for side in make_pairs(0.128, seed)))
              for seed in range(50)]
    assert np.mean(values) == pytest.approx(0.128, abs=0.015)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(('change', 'message'), [
    ({'rejected': np.zeros(11)}, r'both be \[n\]'),
    ({'chosen': np.zeros((12, 1)), 'rejected': np.zeros((12, 1))}, r'both be \[n\]'),
    ({'chosen': np.full(12, np.nan)}, 'finite'),
    ({'rejected': np.full(12, np.inf)}, 'finite'),
    ({'weights': np.ones(11, int)}, 'weights must be'),
    ({'weights': np.ones(12)}, 'weights must be'),
    ({'weights': np.full(12, -1)}, 'non-negative'),
    ({'weights': np.zeros(12, int)}, 'not all zero'),
    ({'clusters': np.arange(11)}, 'clusters must be'),
    ({'clusters': np.arange(12.0)}, 'clusters must be'),
    ({'chosen': np.full(12, 1.5e308), 'rejected': np.full(12, -1.5e308)}, 'overflows'),
])
@pytest.mark.filterwarnings('ignore:overflow')
def test_bad_inputs(name, change, message):
    inputs = {'chosen': np.arange(12.0), 'rejected': np.arange(12.0) - 0.3, 'weights': None,
              'clusters': np.arange(12)}
    with pytest.raises(ValueError, match=message):
        divergences.ESTIMATORS[name].function(**(inputs | change))


def test_too_few():
    x = np.arange(9.0)
    for name in NAMES:
        with pytest.raises(ValueError, match='at least 10 pairs'):
            evaluate(name, x, x)
    x = np.arange(12.0)
    with pytest.raises(ValueError, match='more than 5 pairs'):
        evaluate('knn', x, x - 0.3, (x < 5).astype(int))
    with pytest.raises(ValueError, match='two folds'):
        evaluate('logistic', x, x - 0.3, clusters=np.zeros(12, int))


def test_bad_resampling_arguments():
    x, gaussian = np.arange(12.0), divergences.ESTIMATORS['gaussian']
    ids = np.arange(12)
    with pytest.raises(ValueError, match='variances'):
        divergences.gaussian_kl(0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r'\[r, n\]'):
        divergences.replicate_values(x, x - 0.3, ids, gaussian, np.ones(12, int))
    with pytest.raises(ValueError, match='draws'):
        divergences.swap_null(x, x - 0.3, ids, gaussian, 0, 0)
