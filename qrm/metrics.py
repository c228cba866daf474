"""Predictions on held-out comparisons, and the metrics computed from them.

Axes: n ordered pairs, N quantiles. Evaluation sums over pairs and divides once.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import sklearn.metrics

from qrm import heads, losses
from qrm.tokens import Encoded

ECE_BINS = 10


class Predictions(NamedTuple):
    """Rewards of held-out pairs, the preferred response first; what `predictions.npz` holds.

    A comparison of K responses gives one pair for each two of which one is preferred; ties give
    none.

    Attributes:
      chosen, rejected: [n, N] float32 quantiles (N = 1 for a scalar head).
      taus: [N] float32.
      groups: [n] int64, equal for pairs with the same opening question.
      ids: [n] text, id of the comparison.
      label: [n] float32, probability in (0.5, 1] that chosen is preferred, as labelled.
      log_win: [n] float32, log of the predicted probability that chosen is preferred, nats.
      log_loss: [n] float32, log of the predicted probability that rejected is preferred, nats.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    taus: np.ndarray
    groups: np.ndarray
    ids: np.ndarray
    label: np.ndarray
    log_win: np.ndarray
    log_loss: np.ndarray

    @property
    def rewards(self) -> tuple[np.ndarray, np.ndarray]:
        """([n], [n]) rewards of the chosen and rejected responses, float64 means of quantiles."""
        return self.chosen.mean(axis=1, dtype=np.float64), self.rejected.mean(
            axis=1, dtype=np.float64)


def ordered_pairs(
    encoded: Sequence[Encoded], quantiles: Sequence[np.ndarray], loss: losses.LossConfig
) -> Predictions:
    """Arranges the quantiles of comparisons as ordered pairs.

    Args:
      encoded: n_c comparisons.
      quantiles: for each, [K, N] as from `inference.predict`.
      loss: the objective, which says what a win probability is.

    Raises:
      ValueError: there is no pair with a preferred side.
    """
    numbers = {group: i for i, group in enumerate(dict.fromkeys(item.group for item in encoded))}
    rows = [
        (q[i], q[j], numbers[item.group], item.id, item.preference[i, j])
        for item, q in zip(encoded, quantiles, strict=True)
        for i, j in np.argwhere(item.preference > 0.5)
    ]
    if not rows:
        raise ValueError('no pair with a preferred side to evaluate on')
    chosen, rejected, groups, ids, label = map(np.array, zip(*rows, strict=True))
    return Predictions(
        chosen=chosen,
        rejected=rejected,
        taus=heads.taus(chosen.shape[1]),
        groups=groups,
        ids=ids,
        label=label,
        log_win=_log_wins(loss, chosen, rejected),
        log_loss=_log_wins(loss, rejected, chosen),
    )


def summarise(predictions: Predictions) -> dict[str, float]:
    """Metrics of held-out pairs; rewards are means of quantiles.

    Every decided pair counts once: ties have no chosen side, and weights act in training only.

    `accuracy` counts equal rewards as one half; `auc` is the probability that a random chosen
    reward beats a random rejected one; `nll` (nats) and `ece` judge the predicted probability
    that the chosen side is preferred; `margin`, `reward_mean` and `reward_std` are in units of
    reward; `crossing_rate` is the share of neighbouring quantiles in the wrong order, before any
    sorting.
    """
    chosen, rejected = predictions.rewards
    rewards = np.concatenate([chosen, rejected])
    sides = np.repeat([1, 0], len(chosen))
    steps = np.diff(np.concatenate([predictions.chosen, predictions.rejected]), axis=1)
    win = np.exp(predictions.log_win.astype(np.float64))
    return {
        'n': len(chosen),
        'accuracy': float(np.mean(0.5 * (1.0 + np.sign(chosen - rejected)))),
        'auc': float(sklearn.metrics.roc_auc_score(sides, rewards)),
        'nll': negative_log_likelihood(predictions),
        'ece': expected_calibration_error(win),
        'margin': float(np.mean(chosen - rejected)),
        'reward_mean': float(rewards.mean()),
        'reward_std': float(rewards.std()),
        'crossing_rate': float(np.mean(steps < 0)) if steps.size else 0.0,
    }


def negative_log_likelihood(predictions: Predictions) -> float:
    """Mean cross-entropy (nats) of the labels under the predicted win probabilities."""
    p = predictions
    return float(-np.mean(p.label * p.log_win + (1.0 - p.label) * p.log_loss, dtype=np.float64))


def expected_calibration_error(win: np.ndarray, bins: int = ECE_BINS) -> float:
    """Calibration error of the predicted preference (Guo et al. 2017, eq. 3).

    Confidence is max(p, 1 - p), in `bins` equal bins over [0.5, 1]; correct is p > 0.5, a tie
    one half.

    Args:
      win: [n] predicted probability that the side labelled as preferred is preferred.
      bins: number of bins.
    """
    confidence = np.maximum(win, 1.0 - win)
    correct = 0.5 * (1.0 + np.sign(win - 0.5))
    bin_of = np.minimum((2.0 * (confidence - 0.5) * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(win))


def save_predictions(path: str, predictions: Predictions) -> None:
    """Writes `predictions.npz`, whole or not at all."""
    with open(path + '.tmp', 'wb') as file:
        np.savez_compressed(file, **predictions._asdict())
    os.replace(path + '.tmp', path)


def load_predictions(path: str) -> Predictions:
    """Reads `predictions.npz`; no pickled objects are read."""
    with np.load(path, allow_pickle=False) as file:
        return Predictions(**{name: file[name] for name in Predictions._fields})


def _log_wins(loss: losses.LossConfig, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    function = jax.vmap(lambda c, r: losses.log_win_probability(loss, c, r))
    return np.asarray(jax.jit(function)(chosen, rejected))
