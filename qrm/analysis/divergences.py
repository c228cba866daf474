"""KL(chosen || rejected) in nats between two samples of rewards, its intervals and its null.

Axes: n pairs, m points, r bootstrap replicates, d null draws, f folds, b bins, g grid points.
Everything is numpy in float64 on the host: a few thousand numbers, evaluated after training.

Pair i holds `chosen[i]` and `rejected[i]`; pairs of one prompt share `clusters[i]`. A bootstrap
replicate is written as integer multiplicities `weights[i]`, never as repeated rewards: a repeated
reward would be its own nearest neighbour at distance 0. A pair of weight 0 is absent.

Four estimators tend to the KL divergence as n grows. Five more, kept apart by `is_kl`, do not:
they are formulas that are easily mistaken for it and are here so that published numbers can be
compared with them.

Conventions shared by all nine:
  - `f(chosen [n], rejected [n], weights [n] or None, clusters [n]) -> float`;
  - if all rewards present are equal, or differ by no more than rounding of float32, both samples
    are the same point and the value is 0;
  - lengths are floored relative to the range of the pooled rewards, so that floors keep the
    invariance to rescaling and a constant sample yields a large finite number, never NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy

from qrm.rewards import resampling, statistics

MIN_PAIRS = 10
NEIGHBOURS = 5
FOLDS = 5

_EstimatorFunction = Callable[
    [np.ndarray, np.ndarray, np.ndarray | None, np.ndarray], float]

# A sample narrower than this share of the pooled range is treated as this wide.
WIDTH_FLOOR = 1e-6
# Same for kernels, where the grid must still resolve the width.
_BANDWIDTH_FLOOR = 1e-3
# Densities below this share of the uniform density over the pooled range are rounding errors of
# the FFT (about 1e-16 of the peak), some of them negative.
_DENSITY_FLOOR = 1e-12
_KDE_GRID = 4096
_KDE_MARGIN = 5.0
_SUM_GRID = 1000
_DENSITY_BINS = 100
_EPSILON_BINS = 50, 5000
_EPSILON = 1e-10
# Per unit of weight and on standardised features: negligible next to the Fisher information of
# about 1/4, but it bounds the coefficients when a training fold is separable.
_RIDGE = 1e-6
_NEWTON_STEPS = 100
_NEWTON_TOLERANCE = 1e-10


class Estimator(NamedTuple):
    """A way to turn pairs of rewards into one number.

    Attributes:
      name: key in `ESTIMATORS`.
      label: name for tables and axes.
      function: `f(chosen, rejected, weights, clusters) -> float`.
      is_kl: whether the value tends to the KL divergence as n grows.
      note: one sentence: what it is, or why it is not a KL divergence.
    """

    name: str
    label: str
    function: _EstimatorFunction
    is_kl: bool
    note: str


class Divergence(NamedTuple):
    """One estimate with what is needed to judge it; all in the units of the estimator.

    Attributes:
      value: the estimate on all pairs.
      low: lower end of the bootstrap interval (may exclude `value`: see `resampling.interval`).
      high: upper end of the bootstrap interval.
      null: median under within-pair swaps, where the truth is 0.
      null_high: 95% quantile under within-pair swaps.
      half: the estimate with all rewards halved; a KL divergence equals `value`.
      double: the estimate with all rewards doubled; a KL divergence equals `value`.
      replicates: [r] the bootstrap values, for paired differences between models.
    """

    value: float
    low: float
    high: float
    null: float
    null_high: float
    half: float
    double: float
    replicates: np.ndarray


class _Pairs(NamedTuple):
    """Validated pairs of positive weight; `start` and `span`, 0 if constant, place the rewards."""

    chosen: np.ndarray
    rejected: np.ndarray
    weights: np.ndarray
    clusters: np.ndarray
    start: float
    span: float


def _check_rewards(chosen, rejected) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.asarray(chosen, np.float64)
    rejected = np.asarray(rejected, np.float64)
    if chosen.ndim != 1 or chosen.shape != rejected.shape:
        raise ValueError('chosen and rejected must both be [n], got '
                         f'{chosen.shape} and {rejected.shape}')
    if chosen.size < MIN_PAIRS:
        raise ValueError(f'at least {MIN_PAIRS} pairs are needed, got {chosen.size}')
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        raise ValueError('rewards must be finite')
    return chosen, rejected


def _check_integers(values, name: str, n: int) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (n,) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f'{name} must be [{n}] integers, got {values.shape} {values.dtype}')
    return values


def _prepare(chosen, rejected, weights, clusters) -> _Pairs:
    chosen, rejected = _check_rewards(chosen, rejected)
    n = chosen.size
    clusters = _check_integers(clusters, 'clusters', n)
    weights = np.ones(n, np.int64) if weights is None else _check_integers(weights, 'weights', n)
    if weights.min() < 0 or not weights.any():
        raise ValueError('weights must be non-negative and not all zero')
    present = weights > 0
    chosen, rejected = chosen[present], rejected[present]
    start = min(chosen.min(), rejected.min())
    span = max(chosen.max(), rejected.max()) - start
    if not np.isfinite(span):
        raise ValueError('the range of the rewards overflows float64')
    if statistics.is_constant(np.concatenate([chosen, rejected])):
        span = 0.0
    return _Pairs(chosen, rejected, weights[present].astype(np.float64), clusters[present],
                  float(start), float(span))


def _estimator(function: Callable[[_Pairs], float]) -> _EstimatorFunction:
    """Gives a function of `_Pairs` the public signature, validation and the constant case."""

    def estimate(chosen, rejected, weights, clusters) -> float:
        pairs = _prepare(chosen, rejected, weights, clusters)
        return float(function(pairs)) if pairs.span > 0.0 else 0.0

    # Not functools.wraps, which would advertise the signature of one argument.
    estimate.__name__ = estimate.__qualname__ = function.__name__
    estimate.__doc__ = function.__doc__
    return estimate


def _moments(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Mean and variance (over the total weight, not one less) of values [m], weights [m]."""
    total = weights.sum()
    mean = weights @ values / total
    return mean, weights @ (values - mean) ** 2 / total


def gaussian_kl(mean_p: float, var_p: float, mean_q: float, var_q: float) -> float:
    """KL(P || Q) of two univariate Gaussians.

    Kullback (1959), Information Theory and Statistics, chapter 9, section 1, in one dimension:
    ((var_p + (mean_p - mean_q)^2) / var_q - 1 - log(var_p / var_q)) / 2.

    Args:
      mean_p: mean of P.
      var_p: variance of P.
      mean_q: mean of Q.
      var_q: variance of Q.

    Returns:
      Nats.

    Raises:
      ValueError: if a variance is not positive.
    """
    if not (var_p > 0.0 and var_q > 0.0):
        raise ValueError(f'variances must be positive, got {var_p} and {var_q}')
    ratio = var_p / var_q
    return 0.5 * (ratio - 1.0 - np.log(ratio) + (mean_p - mean_q) ** 2 / var_q)


@_estimator
def gaussian(pairs: _Pairs) -> float:
    """KL of the Gaussians fitted to both sides by maximum likelihood; see `gaussian_kl`.

    Exact in the limit only if both sides are Gaussian. Variances are divided by the total weight
    and floored at (1e-6 of the pooled range) squared.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      weights: [n] integer multiplicities, or None for ones.
      clusters: [n] integer ids of the prompts; not used.

    Returns:
      Nats.

    Raises:
      ValueError: if shapes or types differ from the above, n < 10, or a reward is not finite.
    """
    floor = (WIDTH_FLOOR * pairs.span) ** 2
    mean_p, var_p = _moments(pairs.chosen, pairs.weights)
    mean_q, var_q = _moments(pairs.rejected, pairs.weights)
    return gaussian_kl(mean_p, max(var_p, floor), mean_q, max(var_q, floor))


def _kth_distance(points: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Distance from each query to its k-th nearest point.

    On the line the k nearest points are k consecutive ones, and the block that holds them is the
    one whose farther end is closest. Only k + 1 blocks touch the place of the query.

    Args:
      points: [m] sorted, m >= k.
      queries: [n] in any order.
      k: which neighbour, counted from 1; a query that is itself a point counts as its first.

    Returns:
      [n] distances.
    """
    padding = np.full(k, np.inf)
    padded = np.concatenate([-padding, points, padding])
    # padded[first + j], j = 0..k, are the left ends of the blocks around the query.
    first = np.searchsorted(points, queries)
    best = np.full(queries.shape, np.inf)
    for j in range(k + 1):
        left = np.abs(queries - padded[first + j])
        right = np.abs(padded[first + j + k - 1] - queries)
        np.minimum(best, np.maximum(left, right), out=best)
    return best


def _count_equal(points: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Number [n] of sorted points [m] that equal each query [n]."""
    return np.searchsorted(points, queries, 'right') - np.searchsorted(points, queries, 'left')


@_estimator
def knn(pairs: _Pairs) -> float:
    """k-nearest-neighbour estimate with k = 5.

    Wang, Kulkarni & Verdu (2009), Divergence estimation for multidimensional densities via
    k-nearest-neighbor distances, eq. 5, in one dimension: the mean over the chosen rewards of
    log(nu / rho) + log(m / (n - 1)), where rho and nu are the distances to the k-th other chosen
    and to the k-th rejected reward, and n and m count the pairs present.

    A replicate's multiplicities weight the mean; distances and counts see each pair once.

    Where more than k equal rewards (on a coarse grid such as bfloat16) make rho or nu zero, the
    reward is an atom and has no density: its ratio nu / rho becomes the ratio of the numbers of
    equal rewards among the other chosen and the rejected, with 1/2 added to both. On such grids
    the estimate is pulled towards 0 (by a fifth for rewards of unit scale in bfloat16).

    For continuous rewards the bias is negative and grows with the divergence, as few rejected
    rewards lie where the chosen ones are extreme: -.010 at .455 nats and n = 2354 for equal
    variances, a third of the value when the chosen side is twice as wide as the rejected.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      weights: [n] integer multiplicities, or None for ones.
      clusters: [n] integer ids of the prompts; not used.

    Returns:
      Nats; may be negative.

    Raises:
      ValueError: as `gaussian`, and if no more than k pairs have positive weight.
    """
    count = pairs.chosen.size
    if count <= NEIGHBOURS:
        raise ValueError(f'knn needs more than {NEIGHBOURS} pairs of positive weight, got {count}')
    order = np.argsort(pairs.chosen)
    chosen, weights = pairs.chosen[order], pairs.weights[order]
    rejected = np.sort(pairs.rejected)
    rho = _kth_distance(chosen, chosen, NEIGHBOURS + 1)
    nu = _kth_distance(rejected, chosen, NEIGHBOURS)
    atom = (rho == 0.0) | (nu == 0.0)
    if atom.any():
        # nu / rho is a ratio of densities chosen : rejected; counts stand in for it in that order.
        nu[atom] = _count_equal(chosen, chosen[atom]) - 1 + 0.5
        rho[atom] = _count_equal(rejected, chosen[atom]) + 0.5
    log_ratio = np.log(nu) - np.log(rho)
    return weights @ log_ratio / weights.sum() + np.log(count / (count - 1))


def _folds(clusters: np.ndarray) -> np.ndarray:
    """Fold in [0, 5) of each cluster id [n].

    A function of the id alone, so that a pair keeps its fold when others are dropped. The finaliser
    of SplitMix64 (Steele, Lea & Flood 2014) evens out ids that share a common factor.
    """
    z = clusters.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) % np.uint64(FOLDS)


def _logistic_loss(beta: np.ndarray, features: np.ndarray, sign: np.ndarray,
                   weights: np.ndarray) -> np.ndarray:
    """Ridge-penalised mean log loss [f] of beta [f, 3] on features [m, 3], weights [f, m]."""
    losses = np.logaddexp(0.0, -sign * (beta @ features.T))
    return (weights * losses).sum(1) + 0.5 * _RIDGE * (beta ** 2).sum(1)


def _fit_logistic(features: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Logistic regressions that share their points and differ in their weights.

    Newton's method (Hastie, Tibshirani & Friedman 2009, The Elements of Statistical Learning,
    eq. 4.23). Steps are halved until the loss does not rise, as separable data overshoot.

    Args:
      features: [m, 3].
      labels: [m], 1 or 0.
      weights: [f, m], each row summing to 1.

    Returns:
      [f, 3] coefficients.
    """
    outer = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    ridge = _RIDGE * np.eye(3)
    sign = 2.0 * labels - 1.0
    beta = np.zeros((len(weights), 3))
    loss = _logistic_loss(beta, features, sign, weights)
    for _ in range(_NEWTON_STEPS):
        probability = scipy.special.expit(beta @ features.T)
        gradient = (weights * (probability - labels)) @ features + _RIDGE * beta
        curvature = (weights * probability * (1.0 - probability)) @ outer
        step = np.linalg.solve(curvature.reshape(-1, 3, 3) + ridge, gradient[:, :, None])[:, :, 0]
        if np.abs(step).max() < _NEWTON_TOLERANCE:
            break
        tried = _logistic_loss(beta - step, features, sign, weights)
        # One part in 1e12 is the rounding of the loss: below it a rise is not a rise.
        while (worse := tried > loss * (1.0 + 1e-12)).any():
            step[worse] *= 0.5
            tried = _logistic_loss(beta - step, features, sign, weights)
        beta, loss = beta - step, tried
    return beta


@_estimator
def logistic(pairs: _Pairs) -> float:
    """Cross-fitted logistic density ratio.

    A classifier between chosen and rejected estimates the density ratio as its odds over the
    prior odds (Sugiyama, Suzuki & Kanamori 2012, Density Ratio Estimation in Machine Learning,
    chapter 4). Its log, averaged over the chosen rewards of the fold that was held out, is the
    estimate. Every pair puts equal weight on both sides, so the log prior odds are exactly 0.

    Features 1, z, z^2 of the reward z standardised over both sides make the ratio exact for
    Gaussians of any means and variances. Five folds are taken by cluster, as a function of the
    cluster id alone. A ridge of 1e-6 per unit of weight keeps separable samples finite.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      weights: [n] integer multiplicities, or None for ones.
      clusters: [n] integer ids of the prompts; no prompt is on both sides of a fold.

    Returns:
      Nats; may be negative.

    Raises:
      ValueError: as `gaussian`, and if the clusters present all fall into one fold.
    """
    folds = _folds(pairs.clusters)
    occupied = np.unique(folds)
    if occupied.size < 2:
        raise ValueError('logistic needs clusters in at least two folds; there are too few')
    rewards = np.concatenate([pairs.chosen, pairs.rejected])
    weights = np.tile(pairs.weights, 2)
    mean, var = _moments(rewards, weights)
    z = (rewards - mean) / np.sqrt(var)
    features = np.stack([np.ones_like(z), z, z ** 2], 1)
    labels = np.repeat([1.0, 0.0], pairs.chosen.size)
    training = weights * (np.tile(folds, 2) != occupied[:, None])
    beta = _fit_logistic(features, labels, training / training.sum(1, keepdims=True))
    held_out = beta[np.searchsorted(occupied, folds)]
    log_odds = (features[:pairs.chosen.size] * held_out).sum(1)
    return pairs.weights @ log_odds / pairs.weights.sum()


def _bandwidth(values: np.ndarray, weights: np.ndarray, floor: float) -> float:
    """Scott's bandwidth: standard deviation (over n - 1) times n^(-1/5), n the total weight."""
    total = weights.sum()
    _, var = _moments(values, weights)
    std = np.sqrt(var * total / (total - 1.0))
    return max(std * total ** -0.2, floor)


def _kde_on_grid(values: np.ndarray, weights: np.ndarray, bandwidth: float, start: float,
                 dx: float, size: int) -> np.ndarray:
    """Gaussian kernel density on the grid start + dx * arange(size), unit mass on the line.

    Each value is shared between its two neighbouring grid points in proportion to nearness and
    the counts are convolved with the kernel by FFT (Silverman 1982, Algorithm AS 176; for the
    linear binning, Wand 1994, Fast computation of multivariate kernel estimators).

    Args:
      values: [m], all inside the grid.
      weights: [m].
      bandwidth: standard deviation of the kernel, in the units of the values.
      start: first grid point.
      dx: grid step.
      size: number of grid points, g.

    Returns:
      [g] densities; rounding leaves values of about 1e-16 of the peak, of either sign.
    """
    position = (values - start) / dx
    cell = np.clip(position.astype(np.int64), 0, size - 2)
    share = position - cell
    counts = (np.bincount(cell, weights * (1.0 - share), size)
              + np.bincount(cell + 1, weights * share, size))
    # The transform is periodic; eight empty bandwidths keep one end from reaching the other.
    length = scipy.fft.next_fast_len(size + int(np.ceil(8.0 * bandwidth / dx)), real=True)
    frequency = 2.0 * np.pi * np.fft.rfftfreq(length, dx)
    spectrum = scipy.fft.rfft(counts, length) * np.exp(-0.5 * (bandwidth * frequency) ** 2)
    return scipy.fft.irfft(spectrum, length)[:size] / (weights.sum() * dx)


@_estimator
def kde(pairs: _Pairs) -> float:
    """Integral of p log(p / q) dx with Gaussian kernel densities p and q.

    Bandwidth: Scott's rule for each side (Scott 1992, Multivariate Density Estimation, chapter 6,
    in one dimension), at least 1e-3 of the pooled range. Support: 4096 points from 5 of the
    larger bandwidths below the pooled rewards to as much above. Both densities are floored at
    1e-12 of the uniform density over the pooled range, then normalised on the grid.

    Sampling noise adds about .004 at n = 2000 when the truth is 0. Beyond the last rejected reward
    log q falls with the square of the distance, far below the truth: with a chosen side twice as
    wide as the rejected the value is too high by half.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      weights: [n] integer multiplicities, or None for ones.
      clusters: [n] integer ids of the prompts; not used.

    Returns:
      Nats, >= 0.

    Raises:
      ValueError: as `gaussian`.
    """
    floor = _BANDWIDTH_FLOOR * pairs.span
    width_p = _bandwidth(pairs.chosen, pairs.weights, floor)
    width_q = _bandwidth(pairs.rejected, pairs.weights, floor)
    margin = _KDE_MARGIN * max(width_p, width_q)
    grid = pairs.start - margin, (pairs.span + 2.0 * margin) / (_KDE_GRID - 1), _KDE_GRID
    p = _kde_on_grid(pairs.chosen, pairs.weights, width_p, *grid)
    q = _kde_on_grid(pairs.rejected, pairs.weights, width_q, *grid)
    p, q = (np.maximum(density, _DENSITY_FLOOR / pairs.span) for density in (p, q))
    # Normalised, sums over the grid are integrals: dx is inside p.
    p, q = p / p.sum(), q / q.sum()
    return (p * np.log(p / q)).sum()


@_estimator
def kde_sum_without_dx(pairs: _Pairs) -> float:
    """Not a KL: sum of p log(p / q) over 1000 grid points, without the grid step.

    Kernel densities as in `kde`, on a grid over the pooled range. The missing dx divides the
    divergence by the grid step: the value is proportional to 1 / scale of the rewards, grows with
    the number of grid points, and is well above 0 for two samples of one distribution.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      weights: [n] integer multiplicities, or None for ones.
      clusters: [n] integer ids of the prompts; not used.

    Returns:
      Nats per unit of reward.

    Raises:
      ValueError: as `gaussian`.
    """
    grid = pairs.start, pairs.span / (_SUM_GRID - 1), _SUM_GRID
    floor = _BANDWIDTH_FLOOR * pairs.span
    p, q = (
        np.maximum(
            _kde_on_grid(side, pairs.weights, _bandwidth(side, pairs.weights, floor), *grid),
            _DENSITY_FLOOR / pairs.span)
        for side in (pairs.chosen, pairs.rejected))
    return (p * np.log(p / q)).sum()


def _bin_shares(pairs: _Pairs, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares [b] of chosen and of rejected in equal bins over the pooled range."""
    # Not start + span, which rounding can put below the highest reward.
    limits = pairs.start, max(pairs.chosen.max(), pairs.rejected.max())
    counts = [np.histogram(side, bins, limits, weights=pairs.weights)[0]
              for side in (pairs.chosen, pairs.rejected)]
    return counts[0] / pairs.weights.sum(), counts[1] / pairs.weights.sum()


@_estimator
def density_histogram_without_width(pairs: _Pairs) -> float:
    """Not a KL: sum of p log(p / q) over 100 bins of density, without the bin width.

    Heights are densities, so the value is proportional to 1 / scale of the rewards. Bins where
    either side is empty are left out, which drops the regions that separate the sides best.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      weights: [n] integer multiplicities, or None for ones.
      clusters: [n] integer ids of the prompts; not used.

    Returns:
      Nats per unit of reward.

    Raises:
      ValueError: as `gaussian`.
    """
    p, q = _bin_shares(pairs, _DENSITY_BINS)
    both = (p > 0.0) & (q > 0.0)
    width = pairs.span / _DENSITY_BINS
    return (p[both] / width * np.log(p[both] / q[both])).sum()


def epsilon_histogram(bins: int) -> _EstimatorFunction:
    """Not a KL: sum of p log(p / q) over equal bins, 1e-10 added to every share.

    A bin that holds chosen rewards only adds its share times log(share * 1e10): the value counts
    such bins and depends on epsilon. The fewer the pairs are for the bins, the more of them there
    are, also of two samples of one distribution; with many pairs a bin it comes to the KL of the
    binned rewards.

    Args:
      bins: over the pooled range of the rewards.

    Returns:
      As the others: (chosen [n], rejected [n], weights [n] or None, clusters [n]) -> nats, by name
      only.
    """

    @_estimator
    def histogram(pairs: _Pairs) -> float:
        p, q = (share + _EPSILON for share in _bin_shares(pairs, bins))
        return (p * np.log(p / q)).sum()

    histogram.__doc__ = epsilon_histogram.__doc__
    return histogram


@_estimator
def softmax(pairs: _Pairs) -> float:
    """Not a KL of the rewards: KL between softmaxes taken over the samples, pairs in order.

    The rewards become probabilities of pair indices. Adding a constant to all chosen rewards
    changes nothing, although that is what a better model does, while the scale of the rewards
    and the order of the pairs, which mean nothing to a KL between the rewards, change the value.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      weights: [n] integer multiplicities, or None for ones; a pair of weight w counts as w
        indices.
      clusters: [n] integer ids of the prompts; not used.

    Returns:
      Nats, between two distributions over pair indices.

    Raises:
      ValueError: as `gaussian`.
    """
    log_p, log_q = (side - scipy.special.logsumexp(side, b=pairs.weights)
                    for side in (pairs.chosen, pairs.rejected))
    return (pairs.weights * np.exp(log_p) * (log_p - log_q)).sum()


ESTIMATORS: dict[str, Estimator] = {
    entry.name: entry for entry in (
        Estimator('gaussian', 'Gaussian', gaussian, True,
                  'Closed form from the means and variances of both sides; exact in the limit '
                  'only if both are Gaussian.'),
        Estimator('knn', f'{NEIGHBOURS}-nearest neighbours', knn, True,
                  'Compares distances to the nearest chosen and rejected rewards; makes no '
                  'assumption on the shape of the densities.'),
        Estimator('logistic', 'Logistic density ratio', logistic, True,
                  'Held-out log odds of a quadratic classifier between the sides, cross-fitted '
                  'by prompt.'),
        Estimator('kde', 'Kernel density', kde, True,
                  "Integral over two Gaussian kernel densities with Scott's bandwidths; slightly "
                  'above 0 when the truth is 0.'),
        Estimator('kde_sum_without_dx', 'KDE sum without dx', kde_sum_without_dx, False,
                  'Leaves out the grid step, so it is proportional to 1 / scale of the rewards '
                  'and not a KL.'),
        Estimator('density_histogram_without_width', 'Density histogram without bin width',
                  density_histogram_without_width, False,
                  'Leaves out the bin width, so it is proportional to 1 / scale of the rewards '
                  'and not a KL.'),
        *(Estimator(f'epsilon_histogram_{bins}', f'Histogram, {bins} bins, epsilon 1e-10',
                    epsilon_histogram(bins), False,
                    'Counts bins that hold one side only: where pairs are few for the bins it is '
                    'as high for two samples of one distribution, and not a KL.')
          for bins in _EPSILON_BINS),
        Estimator('softmax', 'Softmax over samples', softmax, False,
                  'Compares probabilities of pair indices and is blind to a shift between the '
                  'sides, so it is not a KL of the rewards.'),
    )
}


def replicate_values(chosen: np.ndarray, rejected: np.ndarray, clusters: np.ndarray,
                     estimator: Estimator, weights_replicates: np.ndarray) -> np.ndarray:
    """The estimate in every bootstrap replicate.

    Two models evaluated with the same `weights_replicates` give paired values: the interval of
    their difference is the interval of the differences.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      clusters: [n] integer ids.
      estimator: an entry of `ESTIMATORS`.
      weights_replicates: [r, n] integers, from `resampling.cluster_bootstrap_weights`.

    Returns:
      [r] values in the units of the estimator.

    Raises:
      ValueError: if weights_replicates is not a matrix, or as the estimator.
    """
    weights_replicates = np.asarray(weights_replicates)
    if weights_replicates.ndim != 2:
        raise ValueError(f'weights_replicates must be [r, n], got {weights_replicates.shape}')
    return np.array([estimator.function(chosen, rejected, weights, clusters)
                     for weights in weights_replicates])


def swap_null(chosen: np.ndarray, rejected: np.ndarray, clusters: np.ndarray,
              estimator: Estimator, draws: int, seed: int) -> np.ndarray:
    """Values of the estimator when labels carry no information.

    Each pair swaps its sides with probability 1/2, independently. This keeps both the pooled
    rewards and the correlation within pairs, and makes the true divergence 0.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      clusters: [n] integer ids, used by estimators that fold by cluster.
      estimator: an entry of `ESTIMATORS`.
      draws: number of draws, d >= 1.
      seed: seed of the swaps.

    Returns:
      [d] values in the units of the estimator.

    Raises:
      ValueError: if draws < 1, or as the estimator.
    """
    if draws < 1:
        raise ValueError(f'draws must be positive, got {draws}')
    chosen, rejected = _check_rewards(chosen, rejected)
    rng = np.random.default_rng(seed)
    values = np.empty(draws)
    for i in range(draws):
        swap = rng.random(chosen.size) < 0.5
        values[i] = estimator.function(
            np.where(swap, rejected, chosen), np.where(swap, chosen, rejected), None, clusters)
    return values


def summarise(chosen: np.ndarray, rejected: np.ndarray, clusters: np.ndarray,
              estimator: Estimator, weights_replicates: np.ndarray, null_draws: int, seed: int,
              level: float = 0.95) -> Divergence:
    """An estimate, its bootstrap interval, its null and its behaviour under rescaling.

    Args:
      chosen: [n] rewards of the preferred responses.
      rejected: [n] rewards of the others.
      clusters: [n] integer ids.
      estimator: an entry of `ESTIMATORS`.
      weights_replicates: [r, n] integers, from `resampling.cluster_bootstrap_weights`; the same
        for all models that are to be compared.
      null_draws: number of within-pair swaps.
      seed: seed of the swaps.
      level: level of the bootstrap interval.

    Returns:
      A `Divergence`; its `replicates` serve paired differences without a second pass.

    Raises:
      ValueError: as the estimator, `replicate_values`, `swap_null` and `resampling.interval`.
    """
    chosen, rejected = _check_rewards(chosen, rejected)
    replicates = replicate_values(chosen, rejected, clusters, estimator, weights_replicates)
    low, high = resampling.interval(replicates, level)
    null, null_high = np.quantile(
        swap_null(chosen, rejected, clusters, estimator, null_draws, seed), [0.5, 0.95])
    value, half, double = (
        estimator.function(scale * chosen, scale * rejected, None, clusters)
        for scale in (1.0, 0.5, 2.0))
    return Divergence(value, low, high, float(null), float(null_high), half, double, replicates)
