"""What a pairwise model says of K responses: of each two, and one number for each.

Axes: K responses to a prompt, K (K - 1) orders of two of them as in `data.orders`; E ensemble
members. All is numpy in float64.

A head gives each order half of the log odds that its first response is preferred, so that the log
odds of a pair are the difference of its two orders: what the model says of the place of a response
cancels.
"""

from typing import NamedTuple

import numpy as np
import scipy

from qrm.data import orders

LEAST = 1e-6  # probability below which one is taken for it, so that scores are finite
_STEPS = 100  # of Newton's method, which takes a dozen
_TOLERANCE = 1e-9  # of a step, in log odds


class Strengths(NamedTuple):
    """Scores of K responses from their win probabilities.

    Attributes:
      scores: [K] of mean 0, in log odds.
      limited: pairs with a probability below `LEAST`, which was taken for it.
    """

    scores: np.ndarray
    limited: int


def log_odds(outputs: np.ndarray) -> np.ndarray:
    """Log odds that response i is preferred to j, over both orders: [K, K, E], antisymmetric.

    Args:
      outputs: [K (K - 1), E] of a pairwise head.
    """
    halves = _by_pair(outputs)
    return halves - np.swapaxes(halves, 0, 1)


def rewards(outputs: np.ndarray) -> np.ndarray:
    """Rewards [K, E] whose differences are nearest to the log odds: their means over all responses.

    The least-squares fit (HodgeRank of all pairs, Jiang et al. 2011). Of two responses the
    difference is their log odds itself; where log odds are those of Bradley-Terry it is exact, and
    of a cycle nothing is left. Of mean 0 for each prompt: rewards of two prompts do not compare.

    Args:
      outputs: [K (K - 1), E] of a pairwise head.
    """
    return log_odds(outputs).mean(axis=1)


def in_both_orders(outputs: np.ndarray) -> np.ndarray:
    """Log odds that response i is preferred to j where it stands first, and second: [K, K, 2].

    Args:
      outputs: [K (K - 1), E] of a pairwise head; the mean over its members counts.
    """
    halves = _by_pair(outputs).mean(axis=2)
    return 2.0 * np.stack([halves, -halves.T], axis=2)


def flips(log_odds: np.ndarray) -> np.ndarray:
    """Whether pairs [n] are decided otherwise in the other order; a tie in one alone counts too.

    Args:
      log_odds: [n, 2] of one response against another, where it stands first and second.
    """
    return np.sign(log_odds[:, 0]) != np.sign(log_odds[:, 1])


def first_log_odds(log_odds: np.ndarray) -> np.ndarray:
    """Log odds [n] of whichever response stands first, the mean over both orders of a pair.

    Args:
      log_odds: see `flips`.
    """
    return (log_odds[:, 0] - log_odds[:, 1]) / 2.0


def win_probabilities(outputs: np.ndarray) -> np.ndarray:
    """Probability [K, K] that response i is preferred to j, over both orders; 1/2 to itself.

    Args:
      outputs: [K (K - 1), E] of a pairwise head; the mean over its members counts.
    """
    return scipy.special.expit(log_odds(outputs).mean(axis=2))


def tournament(wins: np.ndarray) -> np.ndarray:
    """Mean probability [K] of winning against each other response: Borda's count, divided by K - 1.

    Args:
      wins: [K, K], of K >= 2 responses, see `win_probabilities`.
    """
    _check(wins)
    k = len(wins)
    return (wins.sum(axis=1) - np.diagonal(wins)) / (k - 1)


def bradley_terry(wins: np.ndarray) -> Strengths:
    """Scores r of the greatest likelihood sum_ij wins_ij log sigma(r_i - r_j), of mean 0.

    Bradley & Terry 1952, by Newton's method with halved steps. Win probabilities of rewards give
    these rewards back; a cycle of equal probabilities gives equal scores. One of 0 or 1 would put
    scores infinitely far apart: no probability is taken to be below `LEAST`.

    Args:
      wins: [K, K], of K >= 2 responses, see `win_probabilities`.
    """
    _check(wins)
    k = len(wins)
    pairs = np.triu(np.ones((k, k), bool), 1)
    limited = int((pairs & ((wins < LEAST) | (wins.T < LEAST))).sum())
    wins = np.where(np.eye(k, dtype=bool), 0.0, np.clip(wins, LEAST, 1.0 - LEAST))

    def likelihood(scores: np.ndarray) -> float:
        return -float(np.sum(wins * np.logaddexp(0.0, scores[None, :] - scores[:, None])))

    scores = np.zeros(k)
    for _ in range(_STEPS):
        expected = scipy.special.expit(scores[:, None] - scores[None, :])
        gradient = np.sum(wins - (wins + wins.T) * expected, axis=1)
        weight = (wins + wins.T) * expected * expected.T
        # The constant that all scores share is free: it is held where it is.
        curvature = np.diag(weight.sum(axis=1)) - weight + weight.max() / k
        step, before = np.linalg.solve(curvature, gradient), likelihood(scores)
        while likelihood(scores + step) < before and np.abs(step).max() > _TOLERANCE:
            step = step / 2.0
        scores = scores + step
        if np.abs(step).max() < _TOLERANCE:
            break
    return Strengths(scores - scores.mean(), limited)


AGGREGATES = ('tournament', 'bradley-terry')


def aggregate(wins: np.ndarray, kind: str) -> Strengths:
    """Scores of K responses, by one of `AGGREGATES`.

    Raises:
      ValueError: it is none of them.
    """
    if kind not in AGGREGATES:
        raise ValueError(f'aggregate {kind!r}, expected one of {AGGREGATES}')
    return Strengths(tournament(wins), 0) if kind == 'tournament' else bradley_terry(wins)


def _by_pair(outputs: np.ndarray) -> np.ndarray:
    """[K, K, E] float64 of the order with response i first and j second; 0 of i and i."""
    k = round((1 + np.sqrt(1 + 4 * len(outputs))) / 2)
    if not len(outputs) or k * (k - 1) != len(outputs):
        raise ValueError(f'{len(outputs)} orders, expected K (K - 1) of K >= 2 responses')
    found = np.zeros((k, k, outputs.shape[1]))
    found[tuple(np.array(orders.of(k)).T)] = outputs
    return found


def _check(wins: np.ndarray) -> None:
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or len(wins) < 2:
        raise ValueError(f'wins of shape {wins.shape}, expected [K, K] with K >= 2')
