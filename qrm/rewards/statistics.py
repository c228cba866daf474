"""Statistics of predictions and of what is known of them, ready to be given intervals.

Axes: n ordered pairs, m items (responses or pairs), N quantiles. All is numpy in float64.

A statistic is written as a function of the data that returns a function of multiplicities ([m], or
None for ones): what does not depend on them, such as sorting, is done once, and
`resampling.bootstrap` gives the statistic an interval. A statistic that the data do not define
raises `Undefined`.
"""

from collections.abc import Callable

import numpy as np
import scipy

ECE_BINS = 10
_KNOTS = 11  # of the broken line that predicts the spread from the reward: its deciles
# A sample narrower than this share of its size, or a probability this close to 1/2, differs by
# rounding of float32 only.
_CONSTANT = 1e-6
# Keeps the coefficients of separable labels finite; see `length_controlled_accuracy`.
_RIDGE = 1e-6
_NEWTON_STEPS, _CONVERGED = 200, 1e-9
_LARGEST_STEP = 1.0  # of a coefficient: where labels nearly separate, whole Newton steps run away
_LARGEST_SLOPE = 1e6  # of the logit, 1 / T, times its mean size

Statistic = Callable[[np.ndarray | None], float]


class Undefined(ValueError):
    """A statistic that these data do not define; the message says why."""


def mean(values: np.ndarray) -> Statistic:
    """Mean of values [m], in their units."""

    def statistic(weights: np.ndarray | None) -> float:
        # Divided at the end: a share of 1 is a count over the same count.
        return float(values.mean() if weights is None else weights @ values / _total(weights))

    return statistic


def accuracy(margin: np.ndarray) -> Statistic:
    """Share of pairs whose preferred side has the higher reward, ties one half, of margins [n]."""
    return mean(halved_ties(margin))


def halved_ties(ahead: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, 1/2 at 0."""
    return 0.5 * (1.0 + np.sign(ahead))


def deviation(values: np.ndarray) -> Statistic:
    """Standard deviation of values [m], in their units."""
    return lambda weights: moments(values, normalised(weights, len(values)))[1]


def variation(values: np.ndarray) -> Statistic:
    """Coefficient of variation of values [m] >= 0: standard deviation over mean."""

    def statistic(weights: np.ndarray | None) -> float:
        center, deviation = moments(values, normalised(weights, len(values)))
        if center <= 0.0:
            raise Undefined('the spread is 0 everywhere: the model predicts single numbers')
        return deviation / center

    return statistic


def rank_correlation(a: np.ndarray, b: np.ndarray) -> Statistic:
    """Spearman's rank correlation of [m] and [m]; equal values share their middle rank."""
    places = [np.unique(values, return_inverse=True)[1] for values in (a, b)]

    def statistic(weights: np.ndarray | None) -> float:
        share = normalised(weights, len(a))
        if is_constant(a[share > 0.0]) or is_constant(b[share > 0.0]):
            raise Undefined('one of the two is constant')
        x, y = (middle_ranks(place, share) for place in places)
        (x_mean, x_std), (y_mean, y_std) = moments(x, share), moments(y, share)
        found = float(share @ ((x - x_mean) * (y - y_mean)) / (x_std * y_std))
        return min(max(found, -1.0), 1.0)  # rounding goes beyond

    return statistic


def unexplained_share(spread: np.ndarray, rewards: np.ndarray) -> Statistic:
    """Share of the spread's variance that is not a function of the reward.

    One less the adjusted coefficient of determination (Wherry 1931) of the least-squares
    continuous broken line through the deciles of the reward: it follows any smooth function,
    rising or not. Near 0 the spread repeats the reward, near 1 (and no more than 1) it goes its
    own way.

    Args:
      spread: [m].
      rewards: [m].
    """
    knots = np.unique(np.quantile(rewards, np.linspace(0.0, 1.0, _KNOTS)))
    # A hat function for each knot: 1 there, 0 at the others, linear between.
    basis = np.stack([np.interp(rewards, knots, hat) for hat in np.eye(len(knots))], axis=1)

    def statistic(weights: np.ndarray | None) -> float:
        share = normalised(weights, len(spread))
        if is_constant(spread[share > 0.0]):
            raise Undefined('the spread is constant')
        center, deviation = moments(spread, share)
        weighted = share[:, None] * basis
        coefficients = np.linalg.lstsq(weighted.T @ basis, weighted.T @ (spread - center))[0]
        residual = spread - center - basis @ coefficients
        count = len(spread) if weights is None else weights.sum()
        correction = (count - 1) / max(count - len(knots), 1)
        return min(float(correction * (share @ residual ** 2) / deviation ** 2), 1.0)

    return statistic


def auroc(score: np.ndarray, positive: np.ndarray, strata: np.ndarray | None = None) -> Statistic:
    """Probability that a positive item scores above a negative one, ties one half.

    The Mann-Whitney statistic (Hanley & McNeil 1982). With strata only items of the same stratum
    are compared, and every such comparison counts once: what the score says beyond them.

    Args:
      score: [m].
      positive: [m] bool.
      strata: [m] integers >= 0.
    """
    m = len(score)
    strata = np.zeros(m, np.int64) if strata is None else strata
    order = np.unique(score, return_inverse=True)[1]
    # Places of the scores, those of one stratum after those of the one before.
    keys, place = np.unique(strata * m + order, return_inverse=True)
    stratum = keys // m

    def statistic(weights: np.ndarray | None) -> float:
        counts = np.ones(m) if weights is None else weights
        up = np.bincount(place, counts * positive)
        down = np.bincount(place, counts * ~positive)
        downs = np.bincount(stratum, down)
        comparisons = np.bincount(stratum, up) @ downs
        if comparisons <= 0.0:
            raise Undefined('no positive item can be compared with a negative one')
        below = np.cumsum(down) - 0.5 * down - (np.cumsum(downs) - downs)[stratum]
        return float(up @ below / comparisons)

    return statistic


def pooled_auc(chosen: np.ndarray, rejected: np.ndarray) -> Statistic:
    """Probability that a chosen reward [n] is above a rejected one [n] of any pair, ties one half.

    Multiplicities are of the n pairs.
    """
    of_sides = auroc(np.concatenate([chosen, rejected]), np.repeat([True, False], len(chosen)))
    return lambda weights: of_sides(None if weights is None else np.tile(weights, 2))


def tenths(values: np.ndarray) -> np.ndarray:
    """[m] in which tenth of values [m] each of them is, from 0; equal ones are in the same."""
    ranks = middle_ranks(np.unique(values, return_inverse=True)[1],
                         np.full(len(values), 1.0 / max(len(values), 1)))
    return (10 * ranks).astype(np.int64)


def crps(quantiles: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score [m] of quantiles [m, N] as equally likely atoms.

    Gneiting & Raftery (2007), Strictly proper scoring rules, eq. 21: E |Q - y| - E |Q - Q'| / 2,
    whose second term is the sum of (2 i - N - 1) q_i / N^2 over sorted atoms, i = 1..N. In units
    of the ratings; lower is better, and a single atom scores its absolute error.

    Args:
      quantiles: [m, N] sorted.
      ratings: [m].
    """
    n = quantiles.shape[1]
    signs = 2.0 * np.arange(1, n + 1) - n - 1
    return np.abs(quantiles - ratings[:, None]).mean(axis=1) - quantiles @ signs / n ** 2


def coverage_error(quantiles: np.ndarray, ratings: np.ndarray, taus: np.ndarray) -> Statistic:
    """Mean over tau of |P(rating <= quantile) - tau|, for [m, N], [m] and [N]."""
    covered = (ratings[:, None] <= quantiles).astype(np.float64)
    return lambda weights: float(np.abs(normalised(weights, len(ratings)) @ covered - taus).mean())


def log_scores(log_win: np.ndarray, log_loss: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Cross-entropy [n], nats, of labels [n] under log win probabilities [n]."""
    return -(label * log_win + (1.0 - label) * log_loss)


def brier_scores(log_win: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Brier's (1950) score [n]: the expected squared error of the win probability."""
    win = np.exp(log_win)
    return label * (1.0 - win) ** 2 + (1.0 - label) * win ** 2


def stated_and_observed(log_win: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([n], [n]) probability of the side that the model prefers: predicted, and as labelled.

    Where it prefers none, but for rounding of float32, both are .5.

    Args:
      log_win: [n] log of the predicted probability that the first side is preferred.
      label: [n] labelled probability that it is.
    """
    win = np.exp(np.asarray(log_win, np.float64))
    win = np.where(np.abs(win - 0.5) <= _CONSTANT, 0.5, win)
    return np.maximum(win, 1.0 - win), 0.5 + np.sign(win - 0.5) * (label - 0.5)


def calibration_error(confidence: np.ndarray, agreement: np.ndarray) -> Statistic:
    """Expected calibration error (Guo et al. 2017, eq. 3) in equal bins of confidence.

    Never negative, and so biased upwards: by about sqrt(bins / n) / 3 if it is really 0.

    Args:
      confidence: [n] probability in [0.5, 1] of the side that the model prefers.
      agreement: [n] probability that this side was preferred, as labelled.
    """
    bins = confidence_bins(confidence)

    def statistic(weights: np.ndarray | None) -> float:
        share = normalised(weights, len(confidence))
        return float(np.abs(np.bincount(bins, share * (agreement - confidence))).sum())

    return statistic


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """Which of `ECE_BINS` equal bins over [0.5, 1] each confidence [n] is in."""
    return np.minimum((2.0 * (confidence - 0.5) * ECE_BINS).astype(int), ECE_BINS - 1)


def temperature(logit: np.ndarray, label: np.ndarray) -> Statistic:
    """Temperature T that minimises the cross-entropy of labels under sigma(logit / T).

    Guo et al. (2017), On calibration of modern neural networks, section 4.2. The cross-entropy is
    convex in 1 / T, and the T returned is where its derivative is 0. T > 1 means overconfident.

    Args:
      logit: [n] log odds that the first side is preferred.
      label: [n] probability that it is, as labelled.
    """

    def statistic(weights: np.ndarray | None) -> float:
        share = normalised(weights, len(logit))

        def derivative(slope: float) -> float:
            return share @ (logit * (scipy.special.expit(slope * logit) - label))

        if derivative(0.0) >= 0.0:
            raise Undefined('the win probabilities are no better than a coin')
        high = _LARGEST_SLOPE / (share @ np.abs(logit))
        if derivative(high) <= 0.0:
            raise Undefined('the model orders all pairs as labelled, which fits any T near 0')
        return 1.0 / scipy.optimize.brentq(derivative, 0.0, high)

    return statistic


def length_controlled_accuracy(margin: np.ndarray, log_ratio: np.ndarray) -> Statistic:
    """Expected accuracy of the reward if both sides of every pair were equally long.

    In the spirit of length-controlled AlpacaEval (Dubois et al. 2024): a logistic regression of
    which side is preferred on margin and log ratio of lengths, without intercept, so that
    exchanging the sides exchanges the probabilities. It predicts with the log ratio set to 0: the
    mean of sigma(coefficient |margin|) is the probability that the reward is right. Features have
    unit mean square; a ridge of 1e-6 keeps separable pairs finite.

    Args:
      margin: [n] reward of the preferred side less that of the other.
      log_ratio: [n] log of its length less that of the other's.
    """
    features = np.stack([_unit(margin), _unit(log_ratio)], axis=1)

    def statistic(weights: np.ndarray | None) -> float:
        share = normalised(weights, len(margin))

        def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
            logit = features @ beta
            value = share @ np.logaddexp(0.0, -logit) + 0.5 * _RIDGE * beta @ beta
            return value, (share * -scipy.special.expit(-logit)) @ features + _RIDGE * beta

        beta = scipy.optimize.minimize(loss, np.zeros(2), jac=True, method='BFGS').x
        return float(share @ scipy.special.expit(beta[0] * np.abs(features[:, 0])))

    return statistic


def length_controlled_wins(
    wins: np.ndarray, longer: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """Probability of winning if both sides of every pair were equally long, by many weightings.

    Length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475, section 3) without its term
    for how hard an instruction is: the log odds of winning are a + b tanh(d / std(d)), d the
    difference in length, fitted by cross-entropy to probabilities; what is left at d = 0 is
    sigma(a). A ridge of 1e-6 keeps both finite. Where all that count are longer, or all are
    shorter, nothing is known of d = 0, and what the curve would say there is nan.

    Args:
      wins: [m] probability of winning, or 1, 1/2, 0.
      longer: [m] length less that of the other side.
      shares: [B, m] weights, each row of sum 1.

    Returns:
      [B], or nan.
    """
    deviation = longer.std()
    feature = np.tanh(longer / deviation) if deviation else np.zeros(len(longer))
    features = np.stack([np.ones(len(longer)), feature])  # [2, m]
    beta = np.zeros((len(shares), 2))
    for _ in range(_NEWTON_STEPS):
        p = scipy.special.expit(beta @ features)
        gradient = (shares * (p - wins)) @ features.T + _RIDGE * beta
        hessian = np.einsum('bm,im,jm->bij', shares * p * (1.0 - p), features, features)
        step = np.linalg.solve(hessian + _RIDGE * np.eye(2), gradient[..., None])[..., 0]
        size = np.abs(step).max(axis=1, keepdims=True)
        beta -= step * np.minimum(1.0, _LARGEST_STEP / np.maximum(size, _CONVERGED))
        if size.max() < _CONVERGED:
            break
    counts = shares > 0
    known = (counts & (longer <= 0)).any(axis=1) & (counts & (longer >= 0)).any(axis=1)
    return np.where(known, scipy.special.expit(beta[:, 0]), np.nan)


def is_constant(values: np.ndarray) -> bool:
    """Whether values [m] differ by no more than rounding."""
    return bool(np.ptp(values) <= _CONSTANT * np.abs(values).max())


def beyond_rounding(spread: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Spreads [m] without what rounding alone makes of them or of their differences.

    They are computed from numbers of the size of the rewards, and known no better: all are 0 where
    none is more than the rounding of the largest reward, and equal where they differ by no more.

    Args:
      spread: [m] >= 0.
      rewards: numbers of the same unit.
    """
    rounding = _CONSTANT * np.abs(rewards).max(initial=0.0)
    if spread.max(initial=0.0) <= rounding:
        return np.zeros_like(spread)
    return np.full_like(spread, spread.mean()) if np.ptp(spread) <= rounding else spread


def normalised(weights: np.ndarray | None, m: int) -> np.ndarray:
    """Multiplicities as weights [m] of sum 1."""
    if weights is None:
        return np.full(m, 1.0 / m)
    return weights / _total(weights)


def _total(weights: np.ndarray) -> float:
    total = weights.sum()
    if total <= 0:
        raise Undefined('none of the items is in a resample')
    return total


def moments(values: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of values [m] with weights [m] of sum 1."""
    center = share @ values
    return float(center), float(np.sqrt(share @ (values - center) ** 2))


def middle_ranks(place: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Ranks [m] over their number, from places [m] among the different values."""
    mass = np.bincount(place, share)
    return (np.cumsum(mass) - 0.5 * mass)[place]


def _unit(values: np.ndarray) -> np.ndarray:
    """Values of mean square 1, unless all are 0."""
    size = np.sqrt(np.sum(values ** 2) / max(len(values), 1))
    return values / size if size > 0.0 else values
