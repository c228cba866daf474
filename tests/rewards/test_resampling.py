"""Resampling: moments of the draws, intervals by hand, coverage of a known truth."""

import numpy as np
import pytest

from qrm.data.comparisons import DataError
from qrm.rewards import resampling


def test_cluster_bootstrap_keeps_clusters_together():
    clusters = np.array([7, 7, 7, -2, 40, 40, 5, 5, 5, 5])
    weights = resampling.cluster_bootstrap_weights(clusters, 4000, 0)
    assert weights.shape == (4000, 10)
    assert np.issubdtype(weights.dtype, np.integer)
    first = np.array([0, 3, 4, 6])
    for start, stop in ((0, 3), (4, 6), (6, 10)):
        assert (weights[:, start:stop] == weights[:, [start]]).all()
    # Four draws among four clusters: mean 1, variance 4 * 1/4 * 3/4.
    assert (weights[:, first].sum(1) == 4).all()
    np.testing.assert_allclose(weights[:, first].mean(0), 1.0, atol=0.05)
    np.testing.assert_allclose(weights[:, first].var(0), 0.75, atol=0.07)
    assert np.unique(weights.sum(1)).size > 1
    np.testing.assert_array_equal(
        weights, resampling.cluster_bootstrap_weights(clusters, 4000, 0))
    assert (weights != resampling.cluster_bootstrap_weights(clusters, 4000, 1)).any()


def test_interval_by_hand():
    assert resampling.interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert resampling.interval(np.arange(101.0)[::-1], 0.5) == pytest.approx((25.0, 75.0))


def test_bootstrap_by_hand():
    values = np.array([0.0, 1.0, 5.0])

    def total(weights):
        return values.sum() if weights is None else weights @ values

    weights = np.array([[3, 0, 0], [0, 3, 0], [0, 0, 3], [1, 1, 1]])
    found = resampling.bootstrap(total, weights, 0.5)
    assert found.value == 6.0
    np.testing.assert_array_equal(found.replicates, [0.0, 3.0, 15.0, 6.0])
    # Of the sorted 0, 3, 6, 15: three quarters of the way to 3, and one quarter from 6 to 15.
    assert (found.low, found.high) == pytest.approx((2.25, 8.25))


def test_bootstrap_interval_covers_the_mean():
    covered = 0
    for seed in range(200):
        x = np.random.default_rng(seed).exponential(size=100)
        weights = resampling.cluster_bootstrap_weights(np.arange(100), 200, seed)
        found = resampling.bootstrap(lambda w, x=x: np.average(x, weights=w), weights, 0.9)
        assert found.value == pytest.approx(x.mean())
        covered += found.low <= 1.0 <= found.high
    # Standard error of the share: 2 percent points.
    assert 0.84 <= covered / 200 <= 0.96


def test_bad_arguments():
    ids = np.arange(12)
    for clusters in (np.arange(12.0), ids.reshape(3, 4)):
        with pytest.raises(ValueError, match='integers'):
            resampling.cluster_bootstrap_weights(clusters, 3, 0)
    with pytest.raises(ValueError, match='replicates'):
        resampling.cluster_bootstrap_weights(ids, 0, 0)
    with pytest.raises(ValueError, match='items'):
        resampling.cluster_bootstrap_weights(ids[:0], 3, 0)
    with pytest.raises(ValueError, match='finite'):
        resampling.interval(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match='samples must be'):
        resampling.interval(np.array([]))
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match='level'):
            resampling.interval(np.arange(12.0), level)
    with pytest.raises(ValueError, match=r'\[r, n\]'):
        resampling.bootstrap(lambda weights: 0.0, ids)


def test_too_few_clusters_are_refused():
    resampling.check_groups(range(30))
    with pytest.raises(DataError, match='29 opening questions in the test pairs, expected at least '
                                        '30 for intervals'):
        resampling.check_groups([*range(29), 3])
