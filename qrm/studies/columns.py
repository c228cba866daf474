"""The numbers that are measured of every model of a comparison, each a statistic of what it says.

Axes: n pairs, R responses.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qrm.analysis import diagnostics, divergences, pooling
from qrm.rewards import statistics
from qrm.rewards.metrics import Predictions
from qrm.rewards.statistics import Undefined


class Judged(NamedTuple):
    """What is said of test comparisons.

    Attributes:
      own: predictions.
      exchanged: of some of them with the prompts of others; None if there are none.
    """

    own: Predictions
    exchanged: Predictions | None = None


class Column(NamedTuple):
    """A number that is measured of every model.

    Attributes:
      label: for tables.
      table: which one it stands in: 'pairs', 'pooling', 'controls' or 'spread', the last over
        responses.
      statistic: what is said -> statistic of multiplicities, see `statistics`.
    """

    label: str
    table: str
    statistic: Callable[[Judged], statistics.Statistic]

    @property
    def of_pairs(self) -> bool:
        """Whether it is over pairs, else over responses."""
        return self.table != 'spread'


def _margin(p: Predictions) -> np.ndarray:
    chosen, rejected = p.rewards
    return chosen - rejected


def _probabilities(j: Judged) -> np.ndarray:
    """[n] float64 log of the predicted probability of the label.

    Raises:
      Undefined: a score is no log odds.
    """
    if np.isnan(j.own.log_win).any():
        raise Undefined('no probability is predicted')
    return j.own.log_win.astype(np.float64)


def _divergence(name: str) -> Callable[[Judged], statistics.Statistic]:
    function = divergences.ESTIMATORS[name].function
    return lambda j: lambda weights: function(*j.own.rewards, weights, j.own.groups)


def _part(name: str) -> Callable[[Judged], statistics.Statistic]:
    """A part of the Gaussian divergence, see `pooling.Split`."""
    return lambda j: lambda weights: getattr(
        pooling.split(*j.own.rewards, weights, j.own.groups), name)


def _log_ratio(p: Predictions) -> np.ndarray:
    """[n] log of the ratio of lengths, preferred side over the other."""
    first, second = np.log(np.maximum(p.lengths, 1)).astype(np.float64)[p.pairs.T]
    return first - second


def _accuracy_where(which: Callable[[np.ndarray], np.ndarray]
                    ) -> Callable[[Judged], statistics.Statistic]:
    """Accuracy on the pairs for whose log ratios of lengths something holds."""

    def statistic(j: Judged) -> statistics.Statistic:
        some = np.flatnonzero(which(_log_ratio(j.own)))
        return _among(some, statistics.accuracy(_margin(j.own)[some]))

    return statistic


def _among(which: np.ndarray, statistic: statistics.Statistic) -> statistics.Statistic:
    """A statistic of some of the pairs as one of all.

    Raises:
      Undefined: they are too few.
    """
    if len(which) < diagnostics.MIN_ITEMS:
        raise Undefined(f'{len(which)} pairs, fewer than {diagnostics.MIN_ITEMS}')
    return lambda weights: statistic(None if weights is None else weights[which])


def _own_prompt(j: Judged) -> statistics.Statistic:
    """What the own prompt adds to the accuracy, in place of another's."""
    if j.exchanged is None:
        raise Undefined('no prompts were exchanged')
    which, own, foreign = diagnostics.exchanged_margins(j.own, j.exchanged)
    return _among(which, statistics.mean(
        statistics.halved_ties(own) - statistics.halved_ties(foreign)))


def _means(j: Judged) -> np.ndarray:
    return j.own.means.astype(np.float64)


def _lowest(j: Judged) -> np.ndarray:
    return np.sort(j.own.quantiles, axis=1)[:, 0].astype(np.float64)


COLUMNS = {
    'accuracy': Column('accuracy', 'pairs', lambda j: statistics.accuracy(_margin(j.own))),
    'nll': Column('NLL', 'pairs', lambda j: statistics.mean(
        statistics.log_scores(_probabilities(j), j.own.log_loss, j.own.label))),
    'ece': Column('ECE', 'pairs', lambda j: statistics.calibration_error(
        *statistics.stated_and_observed(_probabilities(j), j.own.label))),
    **{name: Column(f'KL, {e.label}', 'pairs', _divergence(name))
       for name, e in divergences.ESTIMATORS.items() if e.is_kl},
    'within': Column('KL within pairs, Gaussian', 'pooling', _part('within')),
    'share': Column('share of the variance within pairs', 'pooling', _part('share')),
    'longer_chosen': Column('where the longer is preferred', 'controls',
                            _accuracy_where(lambda ratio: ratio > 0.0)),
    'shorter_chosen': Column('where the shorter is', 'controls',
                             _accuracy_where(lambda ratio: ratio < 0.0)),
    'length_matched': Column(
        f'within {diagnostics.LENGTH_RATIO:g} in length', 'controls',
        _accuracy_where(lambda ratio: np.abs(ratio) <= np.log(diagnostics.LENGTH_RATIO))),
    'own_prompt': Column('added by the own prompt', 'controls', _own_prompt),
    'reward_std': Column('std of rewards', 'spread', lambda j: statistics.deviation(_means(j))),
    'spread': Column('spread', 'spread', lambda j: statistics.mean(j.own.spreads)),
    'spread_variation': Column('variation of the spread', 'spread',
                               lambda j: statistics.variation(j.own.spreads)),
    'outer_rank': Column('rank(lowest quantile, reward)', 'spread',
                         lambda j: statistics.rank_correlation(_lowest(j), _means(j))),
    'unexplained': Column('share of the spread beyond the reward', 'spread',
                          lambda j: statistics.unexplained_share(j.own.spreads, _means(j))),
}
