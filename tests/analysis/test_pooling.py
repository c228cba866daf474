"""What pooled divergences consist of, by hand."""

import numpy as np
import pytest

from qrm.analysis import divergences, pooling


def test_the_gaussian_estimate_is_split_into_within_and_between_pairs():
    # By hand: margins 2, 4, so d = 1, 2 and Var d = 1/4; sums 0, 8, so m = 0, 4 and Var m = 4.
    chosen, rejected = np.tile([1.0, 6.0], 5), np.tile([-1.0, 2.0], 5)
    clusters = np.arange(10)
    found = pooling.split(chosen, rejected, None, clusters)
    assert found.within == pytest.approx(2 * 1.5**2 / 0.25)
    assert found.share == pytest.approx(0.25 / 4.25)
    gaussian = divergences.gaussian(chosen, rejected, None, clusters)
    assert found.within * found.share + found.unequal == pytest.approx(gaussian)
    # Around the mean of their pair nothing is left between pairs, and both sides vary alike.
    mean = (chosen + rejected) / 2
    around = pooling.split(chosen - mean, rejected - mean, None, clusters)
    assert around == pytest.approx((found.within, 1.0, 0.0))
    assert divergences.gaussian(chosen - mean, rejected - mean, None, clusters) == pytest.approx(
        found.within)
    # Multiplicities are repetitions; the scale does not matter.
    weights = np.array([2, 0, 1, 1, 3, 1, 0, 1, 1, 1])
    index = np.repeat(clusters, weights)
    assert pooling.split(chosen, rejected, weights, clusters) == pytest.approx(
        pooling.split(3 * chosen[index], 3 * rejected[index], None, index))
    constant = pooling.split(np.ones(10), np.ones(10), None, clusters)
    assert constant == (0.0, 1.0, 0.0)
    rounded = 2.5 + np.spacing(np.float32(2.5)) * (np.arange(10) % 2)
    assert pooling.split(rounded, np.full(10, 2.5), None, clusters) == (0.0, 1.0, 0.0)


def test_a_difference_of_splits_is_the_sum_of_its_parts():
    a, b = pooling.Split(0.5, 0.4, 0.01), pooling.Split(0.3, 0.2, 0.03)
    parts = pooling.attribute(a, b)
    # By hand: 1 / .5 and 1 / .3 within pairs; 1 / .2 - 1 / .5 and 1 / .06 - 1 / .3 between them.
    within, between = 1 / 0.3 - 1 / 0.5, (1 / 0.06 - 1 / 0.3) - (1 / 0.2 - 1 / 0.5)
    assert parts == pytest.approx((0.12, 0.2 * 0.06 * within, 0.2 * 0.06 * between, -0.02))
    assert parts.total == pytest.approx((0.5 * 0.4 + 0.01) - (0.3 * 0.2 + 0.03))
    # Margins of the same mean that vary more: nothing is said of the variance between pairs.
    noisy = pooling.attribute(pooling.Split(0.5, 0.5, 0.0),
                                  pooling.Split(2.0, 0.2, 0.0))
    assert noisy.between == pytest.approx(0.0)
    assert noisy.within == pytest.approx(0.25 - 0.4)
    none = pooling.attribute(pooling.Split(0.0, 0.3, 0.0), b)
    assert none.total == pytest.approx(-0.09)
