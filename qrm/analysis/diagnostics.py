"""Diagnostics of a reward model where no truth is known: is its spread information or decoration?

Axes: R responses, n ordered pairs, m items (either of the two), N quantiles, r replicates.
Everything is numpy in float64 on the host, computed from saved `metrics.Predictions`.

Where the data do not define a statistic, it is null in the result, beside the reason.

"Spread" is the standard deviation of the predicted distribution of a response, "reward" its mean,
"margin" the reward of the preferred response less that of the other. Quantiles are sorted before
use, which never takes them farther from the true ones (Chernozhukov, Fernandez-Val & Galichon 2010,
Quantile and probability curves without crossing); only the crossing rate is of the quantiles as
predicted.
"""

from typing import Any, NamedTuple

import numpy as np

from qrm.rewards import pairwise, resampling
from qrm.rewards.metrics import Predictions
from qrm.rewards.statistics import (
    ECE_BINS,
    Statistic,
    Undefined,
    accuracy,
    auroc,
    beyond_rounding,
    brier_scores,
    calibration_error,
    confidence_bins,
    coverage_error,
    crps,
    halved_ties,
    is_constant,
    length_controlled_accuracy,
    log_scores,
    mean,
    moments,
    normalised,
    rank_correlation,
    stated_and_observed,
    temperature,
    tenths,
    unexplained_share,
    variation,
)

# Rules of the verdict, which states them.
CONSTANT_SPREAD = 0.1  # coefficient of variation below which the spread is one constant
REDUNDANT_SPREAD = 0.1  # share of the spread's variance below which the reward says it all
SAME_ORDER = 0.95  # rank correlation above which a quantile is the reward again
COVERAGE_ERROR = 0.05  # mean absolute error of coverage up to which quantiles fit ratings
CALIBRATION_ERROR = 0.05  # ECE up to which win probabilities are called calibrated

DISAGREEMENT_LABEL = 0.75  # annotators disagree on pairs whose soft label is below this
FLIPPED_SHARE = 0.1  # of the pairs, whose labels are made wrong on purpose
LENGTH_RATIO = 1.25  # pairs are matched in length if no side is longer than this times the other
RATING_STATISTICS = ('coverage_error', 'crps', 'crps_constant_spread', 'crps_gain',
                     'rank_correlation_of_reward', 'rank_correlation_with_error')
MIN_ITEMS = 20  # fewest items in a class or a subset of which something is said



class _Data(NamedTuple):
    """What the statistics are computed from; weights are None if there is too little to resample.

    `quantiles` [R, N] are sorted, `rewards`, `spread` and `ratings` are [R], `crossing` [R] is the
    share of a response's neighbouring quantiles in the wrong order, `pairs` [n, 2] the preferred
    response first, `pair_spread` [n] the standard deviation of the difference of their rewards,
    `log_ratio` [n] the log of their lengths' ratio.
    """

    taus: np.ndarray
    quantiles: np.ndarray
    crossing: np.ndarray
    rewards: np.ndarray
    spread: np.ndarray
    ratings: np.ndarray
    pairs: np.ndarray
    pair_spread: np.ndarray
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
    def logit(self) -> np.ndarray:
        return self.log_win - self.log_loss


def diagnose(test: Predictions, validation: Predictions | None,
             exchanged: Predictions | None = None, *, replicates: int, level: float, seed: int,
             fits_ratings: bool) -> dict[str, Any]:
    """All diagnostics of a run, ready for JSON.

    Numbers are {'value', 'low', 'high'}, with the ends of an interval over opening questions, all
    from the same draws; None stands where a number is not defined, and 'reason' says why.

    Args:
      test: predictions on the test split, of which everything is said.
      validation: predictions on the validation split, from which the temperature and the line from
        reward to rating are fitted; None if there is none.
      exchanged: predictions on test comparisons, or some of them, with the prompts of others; None
        if there are none.
      replicates: replicates of the bootstrap over opening questions.
      level: of the intervals.
      seed: of the resampling and of the labels made wrong on purpose.
      fits_ratings: whether the model was trained to predict ratings, so that its quantiles are in
        their units; otherwise a line maps quantiles to ratings.

    Returns:
      'counts', 'accuracy', 'spread', 'per_tau', 'ratings', 'disagreement', 'label_noise',
      'calibration', 'length', 'prompt', 'position' and 'settings'; which numbers there are does not
      depend on the data.

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
        'prompt': _prompt(data, test, exchanged),
        'position': _position(data, test.order_log_odds),
        'settings': {
            'replicates': replicates, 'level': level, 'seed': seed, 'fits_ratings': fits_ratings,
            'constant_spread': CONSTANT_SPREAD, 'redundant_spread': REDUNDANT_SPREAD,
            'same_order': SAME_ORDER, 'coverage_error': COVERAGE_ERROR,
            'calibration_error': CALIBRATION_ERROR, 'disagreement_label': DISAGREEMENT_LABEL,
            'flipped_share': FLIPPED_SHARE, 'length_ratio': LENGTH_RATIO, 'min_items': MIN_ITEMS,
        },
    }


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
        rewards=p.means.astype(np.float64), spread=p.spreads,
        ratings=p.ratings.astype(np.float64), pairs=p.pairs,
        pair_spread=beyond_rounding(p.pair_stds.astype(np.float64), p.means),
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
        share = normalised(weights, len(rewards))
        if is_constant(rewards[share > 0.0]):
            raise Undefined('all rewards are equal')
        return float(share @ spread / moments(rewards, share)[1])

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
    rated = np.isfinite(data.ratings)
    if isinstance(in_ratings, str):
        found = dict.fromkeys(RATING_STATISTICS, _undefined(in_ratings))
    else:
        found = rating_statistics(in_ratings[rated], data.taus, data.rewards[rated],
                                  data.spread[rated], data.ratings[rated])
    return {name: _of_responses(data, statistic, rated) for name, statistic in found.items()}


def rating_statistics(quantiles: np.ndarray, taus: np.ndarray, rewards: np.ndarray,
                      spread: np.ndarray, ratings: np.ndarray) -> dict[str, Statistic]:
    """The statistics of `RATING_STATISTICS`, of n rated responses.

    Args:
      quantiles: [n, N] sorted, in units of ratings, at `taus`.
      rewards, spread: [n] of the model, in its units.
      ratings: [n].
    """
    center = quantiles.mean(axis=1)
    constant = center[:, None] + (quantiles - center[:, None]).mean(axis=0)
    own_score, constant_score = crps(quantiles, ratings), crps(constant, ratings)
    return dict(zip(RATING_STATISTICS, (
        coverage_error(quantiles, ratings, taus), mean(own_score), mean(constant_score),
        mean(constant_score - own_score), rank_correlation(rewards, ratings),
        rank_correlation(spread, np.abs(ratings - center))), strict=True))


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
    statistics = {
        'spread': auroc(spread, disagree),
        'margin': auroc(-margin, disagree),
        'spread_at_equal_margin': auroc(spread, disagree, tenths(margin)),
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
        'nll': mean(log_scores(log_win, log_loss, data.label)),
        'brier': mean(brier_scores(log_win, data.label)),
        'ece': calibration_error(*stated_and_observed(log_win, data.label)),
    }
    return {name: _of_pairs(data, statistic) for name, statistic in statistics.items()}


def _reliability(data: _Data) -> list[dict[str, Any]]:
    """For each bin of confidence, how often the side that the model prefers was preferred."""
    confidence, agreement = stated_and_observed(data.log_win, data.label)
    bins = confidence_bins(confidence)
    edges = np.linspace(0.5, 1.0, ECE_BINS + 1)
    rows = []
    for i in range(ECE_BINS):
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


def matching_pairs(test: Predictions, other: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Indices ([m], [m]) of the pairs of both that are the same two responses of a comparison."""
    places = []
    for p in (test, other):
        first = np.searchsorted(p.comparisons, p.comparisons[p.pairs])  # of the comparison
        places.append({(name, *pair): i for i, (name, pair) in enumerate(zip(
            p.ids.tolist(), (p.pairs - first).tolist(), strict=True))})
    common = [key for key in places[0] if key in places[1]]
    return tuple(np.array([of[key] for key in common], np.int64) for of in places)


def exchanged_margins(
    test: Predictions, exchanged: Predictions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which pairs [m] of the test have another prompt, and their margins [m] before and after."""
    which, other = matching_pairs(test, exchanged)
    margins = [np.subtract(*p.rewards)[i] for p, i in ((test, which), (exchanged, other))]
    return which, *margins


def _prompt(data: _Data, test: Predictions, exchanged: Predictions | None) -> dict[str, Any]:
    """How much of the accuracy depends on the prompt: that with own prompts and with others'.

    'margin_gain' is by how much the mean margin falls, in standard deviations of the margins with
    the own prompts. 'changed_order' is the share of pairs of which the other side is ahead once the
    prompt is another one.
    """
    reason = 'no prompts were exchanged'
    which = own = foreign = np.zeros(0, np.int64)
    if exchanged is not None:
        which, own, foreign = exchanged_margins(test, exchanged)
        reason = _too_few(len(which), 'pairs with another prompt')
    before, after = halved_ties(own), halved_ties(foreign)
    statistics = {
        'accuracy': mean(before),
        'accuracy_exchanged': mean(after),
        'gain': mean(before - after),
        'margin_gain': _standardised(own - foreign, own),
        'rank_correlation_of_margins': rank_correlation(own, foreign),
        'changed_order': mean((before != after).astype(np.float64)),
    }
    return {'pairs': len(which)} | {
        name: _of_pairs(data, _unless(reason, statistic), which)
        for name, statistic in statistics.items()}


def _standardised(values: np.ndarray, margin: np.ndarray) -> Statistic:
    """Mean of values [m] in standard deviations of margins [m]."""

    def statistic(weights: np.ndarray | None) -> float:
        share = normalised(weights, len(values))
        if is_constant(margin[share > 0.0]):
            raise Undefined('all margins are equal')
        return float(share @ values / moments(margin, share)[1])

    return statistic


def position(test: Predictions, *, replicates: int, level: float, seed: int) -> dict[str, Any]:
    """The section 'position' of `diagnose` by itself, see there for the arguments."""
    return _position(_prepare(test, replicates, level, seed), test.order_log_odds)


def _position(data: _Data, log_odds: np.ndarray) -> dict[str, Any]:
    """What the place of a response is worth to a pairwise model, of pairs with a preferred side.

    'accuracy_first' and 'accuracy_second' are those of the orders in which the preferred response
    stands first, and second; 'accuracy' and 'nll' are of both orders of each pair together, 'nll'
    in nats beside 'nll_one_order', the mean over the orders by themselves. 'flips' is the share of
    pairs that are decided otherwise in the other order, 'first_is_chosen' the share of orders that
    are decided for whichever stands first, and 'first_log_odds' its mean log odds; a few large ones
    may hide in that what most decisions show.
    """
    names = ('accuracy', 'accuracy_first', 'accuracy_second', 'flips', 'first_is_chosen',
             'first_log_odds', 'nll', 'nll_one_order')
    if not len(log_odds):
        reason = 'the model reads each response alone' if len(data.pairs) else None
        return {name: _of_pairs(data, _unless(reason, mean(np.zeros(1)))) for name in names}
    log_odds = log_odds.astype(np.float64)
    alone = np.mean([log_scores(*_log_sigmoids(one), data.label) for one in log_odds.T], axis=0)
    first = halved_ties(log_odds * [1.0, -1.0]).mean(axis=1)
    statistics = (
        accuracy(log_odds.mean(axis=1)), accuracy(log_odds[:, 0]), accuracy(log_odds[:, 1]),
        mean(pairwise.flips(log_odds).astype(np.float64)), mean(first),
        mean(pairwise.first_log_odds(log_odds)),
        mean(log_scores(data.log_win, data.log_loss, data.label)), mean(alone))
    return {name: _of_pairs(data, statistic)
            for name, statistic in zip(names, statistics, strict=True)}
