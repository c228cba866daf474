"""Paths of optimisation: how far policies went from a reference, and what that was worth.

A path is what one way of optimising did, from the reference on: at each of its evaluations the
distance (KL), the gold reward and the proxy, of every held-out prompt. Paths of equal prompts are
compared at equal distance, or at equal proxy, between their evaluations along straight lines.

Everything here has a leading axis B = 1 + r: the prompts as they are, and r replicates in which
opening questions are drawn with replacement.

Axes: I evaluations, the first one of the reference; P prompts; r bootstrap replicates.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qrm.rewards import statistics

GRID = 20  # places between the reference and the farthest common one, of means over distances


class Path(NamedTuple):
    """A policy at each of its evaluations.

    Attributes:
      steps: [I] of the optimisation; of best of n the n.
      kl: [I, P] nats a response, an estimate for each prompt; 0 of the reference.
      gold: [I, P] mean gold reward of the responses.
      proxy: [I, P] mean of the proxy's reward, whatever rule is optimised, in its units.
      win: [I, P] mean probability, by gold, of being preferred to a rival.
      length: [I, P] mean tokens of the responses.
      unread: [I, P] mean share of the characters that gold could not read; None: it reads all.
      price: [I, P] mean of what text that does not count takes off gold; None: all counts.
      rival_length: [P] mean tokens of the rivals, other responses of the reference.
      unit: standard deviation of the proxy's reward over responses of the reference.
    """

    steps: np.ndarray
    kl: np.ndarray
    gold: np.ndarray
    proxy: np.ndarray
    win: np.ndarray
    length: np.ndarray
    unread: np.ndarray | None
    price: np.ndarray | None
    rival_length: np.ndarray
    unit: float


class Curves(NamedTuple):
    """A path in means over prompts, [B, I] each; the names are those of `Path`."""

    kl: np.ndarray
    gold: np.ndarray
    proxy: np.ndarray
    win: np.ndarray
    length: np.ndarray
    unread: np.ndarray | None
    price: np.ndarray | None


def as_json(path: Path) -> dict[str, Any]:
    """The path, ready for JSON."""
    return {name: values if values is None else np.asarray(values).tolist()
            for name, values in path._asdict().items()}


def from_json(values: Mapping[str, Any]) -> Path:
    """The path that `as_json` wrote."""
    *arrays, unit = (values[name] for name in Path._fields)
    return Path(*(one if one is None else np.array(one) for one in arrays), unit)


def curves(path: Path, weights: np.ndarray) -> Curves:
    """Means over prompts.

    Args:
      path: of P prompts.
      weights: [r, P] multiplicities of the prompts.
    """
    rows = _shares(weights)
    return Curves(*(None if values is None else rows @ values.T for values in (
        getattr(path, name) for name in Curves._fields)))


def win_controlled(path: Path, weights: np.ndarray) -> np.ndarray:
    """[B] how often the last responses would win if they were as long as their rivals.

    See `statistics.length_controlled_wins`; a prompt counts with means over its responses. It is
    nan where it is not defined.

    Args:
      path, weights: see `curves`.
    """
    return statistics.length_controlled_wins(
        path.win[-1], path.length[-1] - path.rival_length, _shares(weights))


def crossing(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What y is where x first reaches a level, along straight lines between evaluations.

    Args:
      x, y: [B, I].
      at: [B] levels.

    Returns:
      [B]; nan where the level is never reached. At a level that is reached from the beginning, the
      first of y.
    """
    reached = np.maximum.accumulate(x, axis=1) >= at[:, None]
    after = np.argmax(reached, axis=1)
    rows, before = np.arange(len(x)), np.maximum(after - 1, 0)
    rise = x[rows, after] - x[rows, before]
    share = np.where(rise > 0, at - x[rows, before], 0.0) / np.where(rise > 0, rise, 1.0)
    share = np.where(after > 0, share, 0.0)
    found = y[rows, before] + share * (y[rows, after] - y[rows, before])
    return np.where(reached.any(axis=1), found, np.nan)


def common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[B] the farthest level that both [B, I] and [B, J] reach."""
    return np.minimum(a.max(axis=1), b.max(axis=1))


def gain_at_end(a: Curves, b: Curves, by: str = 'kl') -> np.ndarray:
    """Gold of a less gold of b, [B], at the farthest level that both reach.

    That is where over-optimisation shows, if it does.

    Args:
      a, b: the curves.
      by: 'kl', or 'proxy' where both have the same one.
    """
    x, z = getattr(a, by), getattr(b, by)
    at = common(x, z)
    return crossing(x, a.gold, at) - crossing(z, b.gold, at)


def gain_along(a: Curves, b: Curves) -> np.ndarray:
    """Gold of a less gold of b, [B], at equal KL: the mean over KLs up to the farthest common one.
    """
    at = np.maximum(common(a.kl, b.kl), 0.0)
    levels = [at * ((i + 1) / GRID) for i in range(GRID)]  # the last one is `at` itself
    return np.mean([crossing(a.kl, a.gold, level) - crossing(b.kl, b.gold, level)
                    for level in levels], axis=0)


def peak(path: Curves) -> np.ndarray:
    """KL [B] of the evaluation with the highest gold reward, of equal ones the first."""
    return path.kl[np.arange(len(path.kl)), path.gold.argmax(axis=1)]


def fall(path: Path, weights: np.ndarray, half: np.ndarray, *,
         values: np.ndarray | None = None) -> np.ndarray:
    """How far the gold reward, or what `values` are, falls from the peak of gold to the end, [B].

    The highest of noisy means is too high. So the evaluation of the peak is chosen on one half of
    the prompts and the fall from it is measured on the other, both ways, and the mean is taken; it
    may be below 0. Replicates keep what was chosen.

    Args:
      path: the path.
      weights: [r, P].
      half: [P] bool, True of one half, the same for all prompts of an opening question.
      values: [I, P] what falls; None: gold itself.

    Raises:
      ValueError: a half is empty.
    """
    if half.all() or not half.any():
        raise ValueError('one half of the prompts is empty, expected at least two opening '
                         'questions')
    rows = np.concatenate([np.ones((1, weights.shape[1])), weights])
    values = path.gold if values is None else values
    total = 0.0
    for chosen, measured in ((half, ~half), (~half, half)):
        top = int(path.gold[:, chosen].mean(axis=1).argmax())
        lost = (values[top] - values[-1])[measured]
        count = rows[:, measured]
        total = total + count @ lost / np.maximum(count.sum(axis=1), 1)
    return 0.5 * total


def _shares(weights: np.ndarray) -> np.ndarray:
    """[B, P] what each prompt counts for."""
    rows = np.concatenate([np.ones((1, weights.shape[1])), weights])
    return rows / rows.sum(axis=1, keepdims=True)
