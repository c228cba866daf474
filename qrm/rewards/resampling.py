"""Bootstrap over clusters: how far a statistic would move with other prompts.

Axes: n items (pairs or responses), r replicates.
A replicate is written as integer multiplicities `weights [n]`, never as repeated items, and an
item of weight 0 is absent. Items of one cluster (a prompt) come and go together.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from qrm.data.comparisons import DataError

MIN_GROUPS = 30  # with fewer clusters, replicates hold too few different items


class Interval(NamedTuple):
    """A statistic with its bootstrap interval, in the units of the statistic.

    Attributes:
      value: of the items as they are.
      low: lower end (see `interval` for when the two exclude `value`).
      high: upper end.
      replicates: [r] values, for paired differences between models.
    """

    value: float
    low: float
    high: float
    replicates: np.ndarray


def check_groups(groups: Iterable[Hashable]) -> None:
    """Checks that the opening questions of test items are enough to resample.

    Raises:
      DataError: fewer than `MIN_GROUPS`.
    """
    count = len(set(groups))
    if count < MIN_GROUPS:
        raise DataError(f'{count} opening questions in the test pairs, expected at least '
                        f'{MIN_GROUPS} for intervals')


def cluster_bootstrap_weights(clusters: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Multiplicities of items when whole clusters are drawn with replacement.

    As many clusters are drawn as there are; a replicate's number of items varies when clusters
    differ in size (Davison & Hinkley 1997, Bootstrap Methods and their Application, section 3.8).

    Args:
      clusters: [n] integer ids.
      replicates: number of replicates, r >= 1.
      seed: seed of the draws.

    Returns:
      [r, n] int64, equal within a cluster, of mean 1.

    Raises:
      ValueError: if clusters is not [n] integers, n = 0, or replicates < 1.
    """
    clusters = np.asarray(clusters)
    if clusters.ndim != 1 or not np.issubdtype(clusters.dtype, np.integer):
        raise ValueError(f'clusters must be [n] integers, got {clusters.shape} {clusters.dtype}')
    if clusters.size == 0 or replicates < 1:
        raise ValueError(f'need items and replicates, got {clusters.size} and {replicates}')
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    count = sizes.size
    draws = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1.0 / count), size=replicates)
    return draws[:, index]


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Equal-tailed percentile interval.

    Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapter 13. Bias of the replicates
    moves the interval with it: for estimators that count empty bins, which a replicate has more
    of, the interval can lie wholly above the estimate.

    Args:
      samples: [r] bootstrap values.
      level: share of the samples between the ends, in (0, 1).

    Returns:
      (low, high) in the units of the samples.

    Raises:
      ValueError: if samples is not a non-empty vector or level is outside (0, 1); also if any
        sample is not finite, since dropping it would narrow the interval unseen.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(f'samples must be [r] with r >= 1, got {samples.shape}')
    if not np.isfinite(samples).all():
        raise ValueError('samples must be finite')
    if not 0.0 < level < 1.0:
        raise ValueError(f'level must be in (0, 1), got {level}')
    tail = 0.5 * (1.0 - level)
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    return float(low), float(high)


def bootstrap(statistic: Callable[[np.ndarray | None], float], weights: np.ndarray,
              level: float = 0.95) -> Interval:
    """A statistic and its percentile interval.

    Two statistics evaluated with the same `weights` give paired replicates: the interval of their
    difference is the interval of the differences.

    Args:
      statistic: function of the multiplicities, [n] integers or None for the items as they are.
      weights: [r, n] integers, from `cluster_bootstrap_weights`.
      level: of the interval, in (0, 1).

    Raises:
      ValueError: if weights is not a matrix with rows, or as `interval`.
    """
    weights = np.asarray(weights)
    if weights.ndim != 2:
        raise ValueError(f'weights must be [r, n], got {weights.shape}')
    replicates = np.array([statistic(row) for row in weights], np.float64)
    return Interval(float(statistic(None)), *interval(replicates, level), replicates)


def picks_of_seeds(seeds: int, replicates: int, seed: int) -> np.ndarray:
    """Which of some seeds are drawn, with replacement, in each replicate: [r, seeds] int64."""
    return np.random.default_rng(seed).integers(seeds, size=(replicates, seeds))


def over_seeds(values: Sequence[np.ndarray | None], picks: np.ndarray,
               level: float) -> dict[str, float | None]:
    """Mean over seeds, with an interval over seeds and clusters.

    Args:
      values: of each seed [1 + r] a statistic of the items as they are and its replicates; None
        where it is not defined.
      picks: of `picks_of_seeds`.
      level: of the interval.

    Returns:
      'value', 'low' and 'high', ready for JSON; None if it is not defined for a seed.
    """
    if any(value is None for value in values):
        return {'value': None, 'low': None, 'high': None}
    table = np.array(values)
    replicates = np.take_along_axis(table[:, 1:].T, picks, axis=1).mean(axis=1)
    low, high = interval(replicates, level)
    return {'value': float(table[:, 0].mean()), 'low': low, 'high': high}
