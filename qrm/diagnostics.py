"""Diagnostics of a reward model where no truth is known: is its spread information or decoration?

Axes: R responses, n ordered pairs, m items (either of the two), N quantiles, r replicates.
Everything is numpy in float64 on the host, computed from saved `metrics.Predictions`.

A statistic is written as a function of the data that returns a function of multiplicities ([m], or
None for ones): what does not depend on them, such as sorting, is done once, and
`resampling.bootstrap` gives the statistic an interval over opening questions. A statistic that the
data do not define raises `Undefined`; in the result it is null, beside the reason.

"Spread" is the standard deviation of the predicted distribution of a response, "reward" its mean,
"margin" the reward of the preferred response less that of the other. Quantiles are sorted before
use, which never takes them farther from the true ones (Chernozhukov, Fernandez-Val & Galichon 2010,
Quantile and probability curves without crossing); only the crossing rate is of the quantiles as
predicted.
"""

import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special

from qrm import metrics, resampling
from qrm.metrics import Predictions

# Rules of the verdict, which states them.
CONSTANT_SPREAD = 0.1  # coefficient of variation below which the spread is one constant
REDUNDANT_SPREAD = 0.1  # share of the spread's variance below which the reward says it all
SAME_ORDER = 0.95  # rank correlation above which a quantile is the reward again
COVERAGE_ERROR = 0.05  # mean absolute error of coverage up to which quantiles fit ratings
CALIBRATION_ERROR = 0.05  # ECE up to which win probabilities are called calibrated

DISAGREEMENT_LABEL = 0.75  # annotators disagree on pairs whose soft label is below this
FLIPPED_SHARE = 0.1  # of the pairs, whose labels are made wrong on purpose
LENGTH_RATIO = 1.25  # pairs are matched in length if no side is longer than this times the other
MIN_ITEMS = 20  # fewest items in a class or a subset of which something is said
_KNOTS = 11  # of the broken line that predicts the spread from the reward: its deciles
_STRATA = 10  # classes of pairs of about equal absolute margin
# A sample narrower than this share of its size differs by rounding of float32 only.
_CONSTANT = 1e-6
# Keeps the coefficients of separable labels finite; see `length_controlled_accuracy`.
_RIDGE = 1e-6
_LARGEST_SLOPE = 1e6  # of the logit, 1 / T, times its mean size
_PAGE_WIDTH = 96

Statistic = Callable[[np.ndarray | None], float]


class Undefined(ValueError):
    """A statistic that these data do not define; the message says why."""


class _Data(NamedTuple):
    """What the statistics are computed from; weights are None if there is too little to resample.

    `quantiles` [R, N] are sorted, `rewards`, `spread` and `ratings` are [R], `crossing` [R] is the
    share of a response's neighbouring quantiles in the wrong order, `pairs` [n, 2] the preferred
    response first, `log_ratio` [n] the log of their lengths' ratio.
    """

    taus: np.ndarray
    quantiles: np.ndarray
    crossing: np.ndarray
    rewards: np.ndarray
    spread: np.ndarray
    ratings: np.ndarray
    pairs: np.ndarray
    log_ratio: np.ndarray
    label: np.ndarray
    log_win: np.ndarray
    log_loss: np.ndarray
    response_weights: np.ndarray | None
    pair_weights: np.ndarray | None
    level: float

    @property
    def margin(self) -> np.ndarray:
        return self.rewards[self.pairs[:, 0]] - self.rewards[self.pairs[:, 1]]

    @property
    def pair_spread(self) -> np.ndarray:
        """[n] standard deviation of the difference of the sides, taken as independent."""
        return np.hypot(*self.spread[self.pairs].T)

    @property
    def logit(self) -> np.ndarray:
        return self.log_win - self.log_loss


def diagnose(test: Predictions, validation: Predictions | None, *, replicates: int, level: float,
             seed: int, fits_ratings: bool) -> dict[str, Any]:
    """All diagnostics of a run, ready for JSON.

    Numbers are {'value', 'low', 'high'}, with the ends of an interval over opening questions, all
    from the same draws; None stands where a number is not defined, and 'reason' says why.

    Args:
      test: predictions on the test split, of which everything is said.
      validation: predictions on the validation split, from which the temperature and the line from
        reward to rating are fitted; None if there is none.
      replicates: replicates of the bootstrap over opening questions.
      level: of the intervals.
      seed: of the resampling and of the labels made wrong on purpose.
      fits_ratings: whether the model was trained to predict ratings, so that its quantiles are in
        their units; otherwise a line maps quantiles to ratings.

    Returns:
      'counts', 'accuracy', 'spread', 'per_tau', 'ratings', 'disagreement', 'label_noise',
      'calibration', 'length' and 'settings'; which numbers there are does not depend on the data.

    Raises:
      ValueError: as `resampling.cluster_bootstrap_weights` and `resampling.interval`.
    """
    data = _prepare(test, replicates, level, seed)
    held_out = None if validation is None else _prepare(validation, replicates, level, seed)
    quantiles, mapped = _in_ratings(data, held_out, fits_ratings)
    return {
        'counts': {'responses': len(data.rewards), 'pairs': len(data.pairs),
                   'comparisons': len(test.comparison_ids),
                   'opening_questions': len(np.unique(test.comparison_groups)),
                   'rated_responses': int(np.isfinite(data.ratings).sum())},
        'accuracy': _of_pairs(data, accuracy(data.margin)),
        'spread': _spread(data),
        'per_tau': _per_tau(data, quantiles),
        'ratings': mapped | _against_ratings(data, quantiles),
        'disagreement': _disagreement(data),
        'label_noise': _label_noise(data, seed),
        'calibration': _calibration(data, held_out),
        'length': _length(data),
        'settings': {
            'replicates': replicates, 'level': level, 'seed': seed, 'fits_ratings': fits_ratings,
            'constant_spread': CONSTANT_SPREAD, 'redundant_spread': REDUNDANT_SPREAD,
            'same_order': SAME_ORDER, 'coverage_error': COVERAGE_ERROR,
            'calibration_error': CALIBRATION_ERROR, 'disagreement_label': DISAGREEMENT_LABEL,
            'flipped_share': FLIPPED_SHARE, 'length_ratio': LENGTH_RATIO, 'min_items': MIN_ITEMS,
        },
    }


# Statistics.


def mean(values: np.ndarray) -> Statistic:
    """Mean of values [m], in their units."""
    return lambda weights: float(_share(weights, len(values)) @ values)


def accuracy(margin: np.ndarray) -> Statistic:
    """Share of pairs whose preferred side has the higher reward, ties one half, of margins [n]."""
    return mean(metrics.halved_ties(margin))


def deviation(values: np.ndarray) -> Statistic:
    """Standard deviation of values [m], in their units."""
    return lambda weights: _moments(values, _share(weights, len(values)))[1]


def variation(values: np.ndarray) -> Statistic:
    """Coefficient of variation of values [m] >= 0: standard deviation over mean."""

    def statistic(weights: np.ndarray | None) -> float:
        center, deviation = _moments(values, _share(weights, len(values)))
        if center <= 0.0:
            raise Undefined('the spread is 0 everywhere: the model predicts single numbers')
        return deviation / center

    return statistic


def rank_correlation(a: np.ndarray, b: np.ndarray) -> Statistic:
    """Spearman's rank correlation of [m] and [m]; equal values share their middle rank."""
    places = [np.unique(values, return_inverse=True)[1] for values in (a, b)]

    def statistic(weights: np.ndarray | None) -> float:
        share = _share(weights, len(a))
        if is_constant(a[share > 0.0]) or is_constant(b[share > 0.0]):
            raise Undefined('one of the two is constant')
        x, y = (_middle_ranks(place, share) for place in places)
        (x_mean, x_std), (y_mean, y_std) = _moments(x, share), _moments(y, share)
        return float(share @ ((x - x_mean) * (y - y_mean)) / (x_std * y_std))

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
        share = _share(weights, len(spread))
        if is_constant(spread[share > 0.0]):
            raise Undefined('the spread is constant')
        center, deviation = _moments(spread, share)
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
        share = _share(weights, m)
        up = np.bincount(place, share * positive)
        down = np.bincount(place, share * ~positive)
        downs = np.bincount(stratum, down)
        comparisons = np.bincount(stratum, up) @ downs
        if comparisons <= 0.0:
            raise Undefined('no positive item can be compared with a negative one')
        below = np.cumsum(down) - 0.5 * down - (np.cumsum(downs) - downs)[stratum]
        return float(up @ below / comparisons)

    return statistic


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
    return lambda weights: float(np.abs(_share(weights, len(ratings)) @ covered - taus).mean())


def brier_scores(log_win: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Brier's (1950) score [n]: the expected squared error of the win probability."""
    win = np.exp(log_win)
    return label * (1.0 - win) ** 2 + (1.0 - label) * win ** 2


def calibration_error(confidence: np.ndarray, agreement: np.ndarray) -> Statistic:
    """`metrics.expected_calibration_error` of confidences [n] and agreements [n]."""
    return lambda weights: metrics.expected_calibration_error(
        confidence, agreement, _share(weights, len(confidence)))


def temperature(logit: np.ndarray, label: np.ndarray) -> Statistic:
    """Temperature T that minimises the cross-entropy of labels under sigma(logit / T).

    Guo et al. (2017), On calibration of modern neural networks, section 4.2. The cross-entropy is
    convex in 1 / T, and the T returned is where its derivative is 0. T > 1 means overconfident.

    Args:
      logit: [n] log odds that the first side is preferred.
      label: [n] probability that it is, as labelled.
    """

    def statistic(weights: np.ndarray | None) -> float:
        share = _share(weights, len(logit))

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
        share = _share(weights, len(margin))

        def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
            logit = features @ beta
            value = share @ np.logaddexp(0.0, -logit) + 0.5 * _RIDGE * beta @ beta
            return value, (share * -scipy.special.expit(-logit)) @ features + _RIDGE * beta

        beta = scipy.optimize.minimize(loss, np.zeros(2), jac=True, method='BFGS').x
        return float(share @ scipy.special.expit(beta[0] * np.abs(features[:, 0])))

    return statistic


def is_constant(values: np.ndarray) -> bool:
    """Whether values [m] differ by no more than rounding."""
    return bool(np.ptp(values) <= _CONSTANT * np.abs(values).max())


def _share(weights: np.ndarray | None, m: int) -> np.ndarray:
    """Multiplicities as weights [m] of sum 1."""
    if weights is None:
        return np.full(m, 1.0 / m)
    total = weights.sum()
    if total <= 0:
        raise Undefined('none of the items is in a resample')
    return weights / total


def _moments(values: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    center = share @ values
    return float(center), float(np.sqrt(share @ (values - center) ** 2))


def _middle_ranks(place: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Ranks [m] over their number, from places [m] among the different values."""
    mass = np.bincount(place, share)
    return (np.cumsum(mass) - 0.5 * mass)[place]


def _unit(values: np.ndarray) -> np.ndarray:
    """Values of mean square 1, unless all are 0."""
    size = np.sqrt(np.sum(values ** 2) / max(len(values), 1))
    return values / size if size > 0.0 else values


def _log_sigmoids(logit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return -np.logaddexp(0.0, -logit), -np.logaddexp(0.0, logit)


def _undefined(reason: str) -> Statistic:
    def statistic(weights: np.ndarray | None) -> float:
        raise Undefined(reason)

    return statistic


def _unless(reason: str | None, statistic: Statistic) -> Statistic:
    return statistic if reason is None else _undefined(reason)


def _too_few(count: int, what: str) -> str | None:
    return None if count >= MIN_ITEMS else f'{count} {what}, fewer than {MIN_ITEMS}'


# Sections of the result.


def _prepare(p: Predictions, replicates: int, level: float, seed: int) -> _Data:
    responses = pairs = None
    if len(np.unique(p.comparison_groups)) >= resampling.MIN_GROUPS:
        draws = resampling.cluster_bootstrap_weights(p.comparison_groups, replicates, seed)
        draws = draws.astype(np.float64)
        responses = draws[:, p.comparisons]
        pairs = responses[:, p.pairs[:, 0]]
    quantiles = p.quantiles.astype(np.float64)
    steps = np.diff(quantiles, axis=1)
    log_lengths = np.log(np.maximum(p.lengths, 1))
    return _Data(
        taus=p.taus.astype(np.float64), quantiles=np.sort(quantiles, axis=1),
        crossing=np.mean(steps < 0.0, axis=1) if steps.size else np.zeros(len(steps)),
        rewards=p.means.astype(np.float64), spread=p.stds.astype(np.float64),
        ratings=p.ratings.astype(np.float64), pairs=p.pairs,
        log_ratio=log_lengths[p.pairs[:, 0]] - log_lengths[p.pairs[:, 1]],
        label=p.label.astype(np.float64), log_win=p.log_win.astype(np.float64),
        log_loss=p.log_loss.astype(np.float64), response_weights=responses, pair_weights=pairs,
        level=level)


def _number(statistic: Statistic, weights: np.ndarray | None, level: float) -> dict[str, Any]:
    """A statistic and its interval; None where it is not defined, with the reason."""
    try:
        value = statistic(None)
    except Undefined as error:
        return {'value': None, 'low': None, 'high': None, 'reason': str(error)}
    if weights is None:
        reason = f'fewer than {resampling.MIN_GROUPS} opening questions to resample'
        return {'value': value, 'low': None, 'high': None, 'reason': reason}
    try:
        found = resampling.bootstrap(statistic, weights, level)
    except Undefined as error:
        return {'value': value, 'low': None, 'high': None, 'reason': f'in a resample: {error}'}
    return {'value': found.value, 'low': found.low, 'high': found.high}


def _of_pairs(data: _Data, statistic: Statistic,
              which: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    weights = None if data.pair_weights is None else data.pair_weights[:, which]
    reason = None if len(data.pairs) else 'no pair has a preferred side'
    return _number(_unless(reason, statistic), weights, data.level)


def _of_responses(data: _Data, statistic: Statistic,
                  which: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    weights = None if data.response_weights is None else data.response_weights[:, which]
    return _number(statistic, weights, data.level)


def _spread(data: _Data) -> dict[str, Any]:
    """The spread by itself and beside the reward.

    'over_reward_sd' is the mean spread over the standard deviation of the rewards. The origin of
    rewards is arbitrary, so 'rank_correlation_with_distance' is with |reward - mean reward|.
    """
    rewards, spread = data.rewards, data.spread

    def over_reward_sd(weights: np.ndarray | None) -> float:
        share = _share(weights, len(rewards))
        if is_constant(rewards[share > 0.0]):
            raise Undefined('all rewards are equal')
        return float(share @ spread / _moments(rewards, share)[1])

    statistics = {
        'mean': mean(spread),
        'variation': variation(spread),
        'over_reward_sd': over_reward_sd,
        'rank_correlation_with_reward': rank_correlation(spread, rewards),
        'rank_correlation_with_distance': rank_correlation(
            spread, np.abs(rewards - rewards.mean())),
        'unexplained_share': unexplained_share(spread, rewards),
        'crossing_rate': mean(data.crossing) if len(data.taus) > 1 else _undefined(
            'the model has one quantile'),
    }
    return {name: _of_responses(data, statistic) for name, statistic in statistics.items()}


def _per_tau(data: _Data, in_ratings: np.ndarray | str) -> list[dict[str, Any]]:
    """Each quantile as if it were the reward, and how often ratings lie below it."""
    rated = np.isfinite(data.ratings)
    rows = []
    for i, tau in enumerate(data.taus):
        quantile = data.quantiles[:, i]
        below = (_undefined(in_ratings) if isinstance(in_ratings, str)
                 else mean((data.ratings[rated] <= in_ratings[rated, i]).astype(np.float64)))
        rows.append({
            'tau': float(tau),
            'accuracy': _of_pairs(data, accuracy(-np.diff(quantile[data.pairs])[:, 0])),
            'rank_correlation_with_reward': _of_responses(
                data, rank_correlation(quantile, data.rewards)),
            'coverage': _of_responses(data, below, rated),
        })
    return rows


def _in_ratings(data: _Data, held_out: _Data | None,
                fits_ratings: bool) -> tuple[np.ndarray | str, dict[str, Any]]:
    """Quantiles [R, N] in units of ratings, or why there are none, and how they got there."""
    none = {'mapped_by': None, 'slope': None, 'intercept': None}
    if reason := _too_few(int(np.isfinite(data.ratings).sum()), 'test responses with one rating'):
        return reason, none
    if fits_ratings:
        return data.quantiles, {'mapped_by': 'nothing', 'slope': 1.0, 'intercept': 0.0}
    fitted = (held_out is not None
              and np.isfinite(held_out.ratings).sum() >= MIN_ITEMS)
    source = held_out if fitted else data
    rated = np.isfinite(source.ratings)
    rewards = source.rewards[rated]
    if is_constant(rewards):
        return 'all rewards are equal, so no line maps them to ratings', none
    slope, intercept = np.polyfit(rewards, source.ratings[rated], 1)
    if slope <= 0.0:
        return 'ratings do not rise with the reward, so no line maps its quantiles to theirs', none
    name = 'a line fitted on validation' if fitted else 'a line fitted on test'
    return intercept + slope * data.quantiles, {
        'mapped_by': name, 'slope': float(slope), 'intercept': float(intercept)}


def _against_ratings(data: _Data, in_ratings: np.ndarray | str) -> dict[str, Any]:
    """Whether the quantiles, in units of ratings, are those of the ratings.

    'crps_gain' is what the score of `crps` loses if every response gets the mean spread about its
    own mean: above 0 the spread of a response says something about its rating.
    'rank_correlation_with_error' is that of the spread with the absolute error of the mean.
    """
    names = ('coverage_error', 'crps', 'crps_constant_spread', 'crps_gain',
             'rank_correlation_of_reward', 'rank_correlation_with_error')
    if isinstance(in_ratings, str):
        return {name: _of_responses(data, _undefined(in_ratings)) for name in names}
    rated = np.isfinite(data.ratings)
    quantiles, ratings = in_ratings[rated], data.ratings[rated]
    center = quantiles.mean(axis=1)
    constant = center[:, None] + (quantiles - center[:, None]).mean(axis=0)
    own_score, constant_score = crps(quantiles, ratings), crps(constant, ratings)
    statistics = (
        coverage_error(quantiles, ratings, data.taus), mean(own_score), mean(constant_score),
        mean(constant_score - own_score), rank_correlation(data.rewards[rated], ratings),
        rank_correlation(data.spread[rated], np.abs(ratings - center)),
    )
    return {name: _of_responses(data, statistic, rated)
            for name, statistic in zip(names, statistics, strict=True)}


def _disagreement(data: _Data) -> dict[str, Any]:
    """AUROC for pairs on which annotators disagree; those with equal votes are no pairs.

    'spread' scores by the pair's spread, 'margin' by minus the size of its margin, and
    'spread_at_equal_margin' compares only pairs whose margins are in the same tenth: what the
    spread adds.
    """
    disagree = data.label < DISAGREEMENT_LABEL
    counts = {'pairs': int(disagree.sum()), 'others': int((~disagree).sum())}
    reason = ('there are no soft labels' if (data.label == 1.0).all()
              else _too_few(min(counts.values()), 'pairs on one side'))
    margin, spread = np.abs(data.margin), data.pair_spread
    place = np.unique(margin, return_inverse=True)[1]
    ranks = _middle_ranks(place, np.full(len(margin), 1.0 / max(len(margin), 1)))
    strata = (_STRATA * ranks).astype(np.int64)
    statistics = {
        'spread': auroc(spread, disagree),
        'margin': auroc(-margin, disagree),
        'spread_at_equal_margin': auroc(spread, disagree, strata),
    }
    return counts | {name: _of_pairs(data, _unless(reason, statistic))
                     for name, statistic in statistics.items()}


def _label_noise(data: _Data, seed: int) -> dict[str, Any]:
    """AUROC for pairs whose label was made wrong on purpose, a share of them drawn at random.

    'margin' scores by minus the margin of the side labelled as preferred. 'discounted_margin'
    divides it by sqrt(1 + pi v / 8), v the variance of the difference of the sides: the log odds
    under independent Gaussian rewards (Bishop 2006, Pattern Recognition and Machine Learning, eq.
    4.153), so that a true spread tells which margins to trust. 'gain' is what that adds; a spread
    that knows nothing adds nothing or takes a little away. 'spread' alone is a control: labels
    made wrong at random know nothing of it, and its AUROC is 1/2.
    """
    n = len(data.pairs)
    wrong = np.zeros(n, bool)
    count = round(FLIPPED_SHARE * n)
    wrong[np.random.default_rng(seed).choice(n, count, replace=False)] = True
    margin = np.where(wrong, -data.margin, data.margin)
    discounted = margin / np.sqrt(1.0 + np.pi / 8.0 * data.pair_spread ** 2)
    plain, scaled = auroc(-margin, wrong), auroc(-discounted, wrong)
    statistics = {
        'margin': plain,
        'discounted_margin': scaled,
        'gain': lambda weights: scaled(weights) - plain(weights),
        'spread': auroc(data.pair_spread, wrong),
    }
    reason = _too_few(count, 'pairs with a wrong label')
    return {'pairs': count, 'others': n - count} | {
        name: _of_pairs(data, _unless(reason, statistic))
        for name, statistic in statistics.items()}


def _calibration(data: _Data, held_out: _Data | None) -> dict[str, Any]:
    """Scores of the win probabilities, as predicted and after temperature scaling.

    The intervals of 'after' take the temperature as given; its own is over validation prompts.
    """
    fit = (_undefined('there is no validation split') if held_out is None
           else temperature(held_out.logit, held_out.label))
    fitted = _of_pairs(data if held_out is None else held_out, fit)
    if fitted['value'] is None:
        none = _of_pairs(data, _undefined(fitted['reason']))
        after = dict.fromkeys(('nll', 'brier', 'ece'), none)
    else:
        scaled = data.logit / fitted['value']
        after = _scores(data, *_log_sigmoids(scaled))
    return _scores(data, data.log_win, data.log_loss) | {
        'reliability': _reliability(data), 'temperature': fitted, 'after': after}


def _scores(data: _Data, log_win: np.ndarray, log_loss: np.ndarray) -> dict[str, Any]:
    statistics = {
        'nll': mean(metrics.log_scores(log_win, log_loss, data.label)),
        'brier': mean(brier_scores(log_win, data.label)),
        'ece': calibration_error(*metrics.stated_and_observed(log_win, data.label)),
    }
    return {name: _of_pairs(data, statistic) for name, statistic in statistics.items()}


def _reliability(data: _Data) -> list[dict[str, Any]]:
    """For each bin of confidence, how often the side that the model prefers was preferred."""
    confidence, agreement = metrics.stated_and_observed(data.log_win, data.label)
    bins = metrics.confidence_bins(confidence)
    edges = np.linspace(0.5, 1.0, metrics.ECE_BINS + 1)
    rows = []
    for i in range(metrics.ECE_BINS):
        inside = bins == i
        count = int(inside.sum())
        rows.append({
            'from': float(edges[i]), 'to': float(edges[i + 1]), 'pairs': count,
            'confidence': float(confidence[inside].mean()) if count else None,
            'observed': _of_pairs(
                data, mean(agreement[inside]) if count else _undefined('no pairs'), inside),
        })
    return rows


def _length(data: _Data) -> dict[str, Any]:
    """How much of the accuracy is length, in tokens of the response; equal lengths count half."""
    margin, log_ratio = data.margin, data.log_ratio
    matched = np.abs(log_ratio) <= np.log(LENGTH_RATIO)
    count = int(matched.sum())
    return {
        'longer_is_preferred': _of_pairs(data, accuracy(log_ratio)),
        'longer_has_higher_reward': _of_pairs(data, accuracy(margin * log_ratio)),
        'accuracy_controlled': _of_pairs(data, length_controlled_accuracy(margin, log_ratio)),
        'matched_pairs': count,
        'accuracy_matched': _of_pairs(
            data, _unless(_too_few(count, 'pairs matched in length'), accuracy(margin[matched])),
            matched),
    }


# The verdict.


def verdict(diagnosis: Mapping[str, Any]) -> str:
    """What a diagnosis says of the spread and of the model, in plain words and by stated rules.

    Args:
      diagnosis: as `diagnose` returns it.

    Returns:
      A page of text: the conclusion, then a paragraph for each question.
    """
    level, counts = diagnosis['settings']['level'], diagnosis['counts']
    paragraphs = (
        'Is the spread information or decoration? ' + conclusion(diagnosis),
        f"From {counts['pairs']} test pairs of {counts['opening_questions']} opening questions; in "
        f'brackets {level:.0%} intervals over opening questions. Decoration is a spread that is '
        'constant or a function of the reward, by the bounds below; of any other the most direct '
        'evidence there is decides: errors against ratings, else disagreement, else labels made '
        'wrong on purpose.',
        'Does the spread vary? ' + _says_variation(diagnosis),
        'Does it say more than the reward? ' + _says_redundancy(diagnosis),
        'Does it foretell errors against ratings? ' + _says_ratings(diagnosis),
        'Does it find disagreement? ' + _says_disagreement(diagnosis),
        'Does it help to find wrong labels? ' + _says_label_noise(diagnosis),
        'Are the win probabilities calibrated? ' + _says_calibration(diagnosis),
        'Is the reward length? ' + _says_length(diagnosis),
    )
    return '\n\n'.join(map(_wrap, paragraphs)) + '\n'


class _Evidence(NamedTuple):
    """A number that tells whether the spread knows anything; above `uninformed` it does."""

    what: str
    number: dict[str, Any]
    uninformed: float
    expected: str
    if_below: str


def _evidence(diagnosis: Mapping[str, Any]) -> _Evidence | None:
    """The most direct evidence there is."""
    ratings, disagreement, label_noise = (
        diagnosis[key] for key in ('ratings', 'disagreement', 'label_noise'))
    candidates = (
        _Evidence('its rank correlation with the error against ratings',
                  ratings['rank_correlation_with_error'], 0.0, '0', 'Misleading'),
        _Evidence('its AUROC for disagreement at equal margin',
                  disagreement['spread_at_equal_margin'], 0.5, '0.5', 'Misleading'),
        # A discount at random is a loss, so that one shows nothing.
        _Evidence("what it adds to the margin's AUROC for wrong labels",
                  label_noise['gain'], 0.0, '0 or a little less', 'Not shown'),
    )
    return next((e for e in candidates if e.number['low'] is not None), None)


def conclusion(diagnosis: Mapping[str, Any]) -> str:
    """The first paragraph of the verdict, without the question."""
    spread = diagnosis['spread']
    if spread['variation']['value'] is None:
        return f"There is none: {spread['variation']['reason']}."
    if _below(spread['variation'], CONSTANT_SPREAD):
        return 'Decoration: the spread is one constant for all responses.'
    if _below(spread['unexplained_share'], REDUNDANT_SPREAD):
        return 'Decoration: the spread is a function of the reward and adds nothing to it.'
    evidence = _evidence(diagnosis)
    if evidence is None:
        return 'Not known: there is too little data for an interval of anything that would show it.'
    word = {'Yes': 'Information', 'No': evidence.if_below}.get(
        _answer(evidence.number, evidence.uninformed), 'Not shown')
    text = (f'{word}: {evidence.what} is {_format(evidence.number)}, where a spread that knows '
            f'nothing has {evidence.expected}.')
    if not diagnosis['settings']['fits_ratings']:
        text += (' The model saw no ratings, and preferences identify win probabilities only: the '
                 'size of the spread is an assumption of the model.')
    return text


def _says_variation(diagnosis: Mapping[str, Any]) -> str:
    spread = diagnosis['spread']
    number = spread['variation']
    return (f'{_answer(number, CONSTANT_SPREAD)}: its coefficient of variation is '
            f'{_format(number)} (an interval below {CONSTANT_SPREAD:g} means one constant, such as '
            f"its initialisation). Its mean is {_format(spread['over_reward_sd'])} standard "
            f'deviations of the reward. Of neighbouring quantiles the share '
            f"{_format(spread['crossing_rate'])} is predicted in the wrong order.")


def _says_redundancy(diagnosis: Mapping[str, Any]) -> str:
    spread, rows = diagnosis['spread'], diagnosis['per_tau']
    share = spread['unexplained_share']
    text = (f'{_answer(share, REDUNDANT_SPREAD)}: the share of its variance that is not a function '
            f'of the reward is {_format(share)} (an interval below {REDUNDANT_SPREAD:g} means '
            f'that the reward says it all). Its rank correlation with the reward is '
            f"{_format(spread['rank_correlation_with_reward'])}.")
    known = [row for row in rows if row['rank_correlation_with_reward']['value'] is not None]
    if len(known) < 2:
        return text
    least = min(known, key=lambda row: row['rank_correlation_with_reward']['value'])
    number = least['rank_correlation_with_reward']
    same = 'every quantile orders responses as the reward does' if _above(
        number, SAME_ORDER) else 'not every quantile is the reward again'
    return text + (f" The quantile that follows the reward least, tau = {least['tau']:.3g}, has a "
                   f'rank correlation of {_format(number)} with it: {same} (bound '
                   f'{SAME_ORDER:g}).')


def _says_ratings(diagnosis: Mapping[str, Any]) -> str:
    ratings, rows = diagnosis['ratings'], diagnosis['per_tau']
    error = ratings['coverage_error']
    if error['value'] is None:
        return f"Not known: {error['reason']}."
    correlation = ratings['rank_correlation_with_error']
    fits = 'fit' if error['value'] <= COVERAGE_ERROR else 'do not fit'
    text = (f'{_answer(correlation, 0.0)}: its rank correlation with the absolute error of the '
            f'mean is {_format(correlation)} (yes means an interval above 0), and a constant '
            f"spread would cost {_format(ratings['crps_gain'])} of a CRPS of "
            f"{_format(ratings['crps'])}. The quantiles {fits} the ratings: the share of ratings "
            f'below a quantile is off by {_format(error)} on average (bound {COVERAGE_ERROR:g}).')
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        held = last['coverage']['value'] - first['coverage']['value']
        text += (f' {held:.0%} of the ratings lie between the outer quantiles, which should hold '
                 f"{last['tau'] - first['tau']:.0%}.")
    if ratings['mapped_by'] != 'nothing':
        text += f" Quantiles were mapped to ratings by {ratings['mapped_by']}."
    return text


def _says_disagreement(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['disagreement']
    number = found['spread_at_equal_margin']
    if number['value'] is None:
        return f"Not known: {number['reason']}."
    return (f'{_answer(number, 0.5)}: for pairs whose label is below {DISAGREEMENT_LABEL:g} its '
            f"AUROC is {_format(found['spread'])}, that of a small margin "
            f"{_format(found['margin'])}, and that of the spread among pairs of about equal margin "
            f'{_format(number)} (yes means an interval above 0.5).')


def _says_label_noise(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['label_noise']
    number = found['gain']
    if number['value'] is None:
        return f"Not known: {number['reason']}."
    return (f'{_answer(number, 0.0)}: for labels made wrong on purpose ({FLIPPED_SHARE:.0%} of the '
            f"pairs) the AUROC of the margin is {_format(found['margin'])}, and discounting it by "
            f'the spread adds {_format(number)} (yes means an interval above 0).')


def _says_calibration(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['calibration']
    if found['ece']['value'] is None:
        return f"Not known: {found['ece']['reason']}."
    near = 'Yes' if found['ece']['value'] <= CALIBRATION_ERROR else 'No'
    text = (f"{near}: the expected calibration error is {_format(found['ece'])} (bound "
            f"{CALIBRATION_ERROR:g}), the NLL {_format(found['nll'])} nats, where a coin has "
            f'{np.log(2.0):.3f}.')
    fitted = found['temperature']
    if fitted['value'] is None:
        return text + f" No temperature was fitted: {fitted['reason']}."
    if _above(fitted, 1.0):
        side = 'the model is overconfident'
    elif _below(fitted, 1.0):
        side = 'the model is not confident enough'
    else:
        side = '1 would do as well'
    return text + (f' The temperature that fits validation is {_format(fitted)}: {side}. After it '
                   f"the NLL is {_format(found['after']['nll'])}.")


def _says_length(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['length']
    controlled = found['accuracy_controlled']
    if controlled['value'] is None:
        return f"Not known: {controlled['reason']}."
    answer = {'Yes': 'No', 'No': 'Yes'}.get(_answer(controlled, 0.5), 'It may be')
    return (f'{answer}: the accuracy is {_format(diagnosis["accuracy"])}, and '
            f'{_format(controlled)} if both sides were equally long (no means an interval above '
            f"0.5). Of pairs within a factor of {LENGTH_RATIO:g} in length it is "
            f"{_format(found['accuracy_matched'])}. The longer response is preferred at a rate of "
            f"{_format(found['longer_is_preferred'])} and has the higher reward at a rate of "
            f"{_format(found['longer_has_higher_reward'])}.")


def _below(number: Mapping[str, Any], bound: float) -> bool:
    return number['high'] is not None and number['high'] < bound


def _above(number: Mapping[str, Any], bound: float) -> bool:
    return number['low'] is not None and number['low'] > bound


def _answer(number: Mapping[str, Any], bound: float) -> str:
    """Whether a number is above a bound, as far as its interval tells."""
    if number['low'] is None:
        return 'Not known'
    if _above(number, bound):
        return 'Yes'
    return 'No' if _below(number, bound) else 'Not shown'


def _wrap(text: str) -> str:
    """Lines of a paragraph, none of which ends within a number and its interval."""
    tie = '\N{NO-BREAK SPACE}'
    tied = re.sub(r' (?=\[)|(?<=\d,) (?=-?\d)', tie, text)
    return textwrap.fill(tied, _PAGE_WIDTH).replace(tie, ' ')


def _format(number: Mapping[str, Any]) -> str:
    if number['value'] is None:
        return f"unknown ({number['reason']})"
    ends = ('no interval' if number['low'] is None
            else f"{number['low']:.3f}, {number['high']:.3f}")
    return f"{number['value']:.3f} [{ends}]"
