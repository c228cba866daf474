"""Predictions on held-out comparisons, and the metrics computed from them.

Axes: c comparisons, R responses of all of them, n ordered pairs, N quantiles. Evaluation sums
over pairs and divides once.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data.encoded import Encoded
from qrm.rewards import distributions, losses, pairwise, statistics
from qrm.rewards.heads import HeadConfig

Array = jax.Array | np.ndarray


class Predictions(NamedTuple):
    """Rewards of held-out responses and the pairs among them; what `predictions.npz` holds.

    A comparison of K responses gives one pair for each two of which one is preferred; ties give
    none.

    Attributes:
      quantiles: [R, N] float32 in the order of tau, as the head gives them (a free head's may
        cross); N = 1 for one scalar.
      taus: [N] float32.
      means, stds: [R] float32 of the distribution; the mean is the reward.
      pair_stds: [n] float32, standard deviation of the difference of rewards, see `margin_std`.
      crps: [R] float32, continuous ranked probability score of the rating, the mean over rated
        attributes; NaN where there is none, and of models that do not learn from ratings.
      ratings: [R] float32, NaN where there is none or there are several attributes.
      lengths: [R] int32, tokens of the response.
      comparisons: [R] int32, which comparison the response belongs to.
      comparison_ids: [c] text.
      comparison_groups: [c] int64, equal for comparisons with the same opening question.
      pairs: [n, 2] int32, which responses, the preferred one first.
      label: [n] float32, probability in (0.5, 1] that the first is preferred, as labelled.
      log_win: [n] float32, log of the predicted probability that the first is preferred, nats.
      log_loss: [n] float32, log of the predicted probability that the second is, nats.
      order_log_odds: [n, 2] float32, of a pairwise head: log odds that the first is preferred, as
        the model has them where it stands first, and where it stands second; [0, 2] of other heads.
    """

    quantiles: np.ndarray
    taus: np.ndarray
    means: np.ndarray
    stds: np.ndarray
    pair_stds: np.ndarray
    crps: np.ndarray
    ratings: np.ndarray
    lengths: np.ndarray
    comparisons: np.ndarray
    comparison_ids: np.ndarray
    comparison_groups: np.ndarray
    pairs: np.ndarray
    label: np.ndarray
    log_win: np.ndarray
    log_loss: np.ndarray
    order_log_odds: np.ndarray = np.zeros((0, 2), np.float32)

    @property
    def pairwise(self) -> bool:
        """Whether pairs were read together, so that rewards compare within a prompt alone."""
        return len(self.order_log_odds) > 0

    @property
    def chosen(self) -> np.ndarray:
        """[n, N] quantiles of the preferred responses."""
        return self.quantiles[self.pairs[:, 0]]

    @property
    def rejected(self) -> np.ndarray:
        """[n, N] quantiles of the others."""
        return self.quantiles[self.pairs[:, 1]]

    @property
    def rewards(self) -> tuple[np.ndarray, np.ndarray]:
        """([n], [n]) float64 rewards of the preferred responses and of the others."""
        means = self.means.astype(np.float64)
        return means[self.pairs[:, 0]], means[self.pairs[:, 1]]

    @property
    def spreads(self) -> np.ndarray:
        """[R] float64 standard deviations of responses' rewards, see `beyond_rounding`."""
        return statistics.beyond_rounding(self.stds.astype(np.float64), self.means)

    @property
    def groups(self) -> np.ndarray:
        """[n] int64, equal for pairs with the same opening question."""
        return self.comparison_groups[self.comparisons[self.pairs[:, 0]]]

    @property
    def ids(self) -> np.ndarray:
        """[n] text, id of each pair's comparison."""
        return self.comparison_ids[self.comparisons[self.pairs[:, 0]]]


def predictions_of(
    encoded: Sequence[Encoded], outputs: Sequence[np.ndarray], head: HeadConfig,
    loss: losses.LossConfig,
) -> Predictions:
    """What a head says of comparisons.

    What a pairwise head says of pairs is also made rewards of responses, see `pairwise.rewards`:
    of two responses they differ by the log odds of the pair; of more, win probabilities are those
    of the pairs, and rewards what fits all of them best.

    Args:
      encoded: c comparisons, at least one.
      outputs: for each, [K, outputs] as from `inference.predict`.
      head: which reads the outputs.
      loss: the objective, which says what a win probability is.
    """
    decided, labels, ratings, lengths, sizes, ids, of_items = [], [], [], [], [], [], []
    groups: dict[str, int] = {}
    for item in encoded:  # each is there only now, if a table decodes them
        judged = item.candidates or item
        own = np.argwhere(judged.preference > 0.5)
        decided.append(own)
        labels.append(judged.preference[tuple(own.T)])
        ratings.append(judged.ratings.copy())
        lengths += judged.lengths
        sizes.append(len(judged.lengths))
        ids.append(item.id)
        of_items.append(groups.setdefault(item.group, len(groups)))
    starts = np.cumsum([0, *sizes[:-1]])
    pairs = np.concatenate([start + own for start, own in zip(starts, decided, strict=True)])
    pairs, ratings = pairs.astype(np.int32), np.concatenate(ratings)
    log_odds = np.zeros((0, 2), np.float32)
    if head.pairwise:
        log_odds = np.concatenate([pairwise.in_both_orders(of_item)[tuple(own.T)]
                                   for of_item, own in zip(outputs, decided, strict=True)])
        outputs = [pairwise.rewards(of_item).astype(np.float32) for of_item in outputs]
    read = {name: np.asarray(value) for name, value in _read(
        head, loss, np.concatenate(outputs), ratings, pairs).items()}
    if head.pairwise:
        both = log_odds.mean(axis=1)
        read |= {'log_win': -np.logaddexp(0.0, -both).astype(np.float32),
                 'log_loss': -np.logaddexp(0.0, both).astype(np.float32)}
    return Predictions(
        **read,
        taus=head.taus,
        ratings=ratings[:, 0] if ratings.shape[1] == 1 else np.full(len(ratings), np.nan, 'f4'),
        lengths=np.array(lengths, np.int32),
        comparisons=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        comparison_ids=np.array(ids),
        comparison_groups=np.array(of_items),
        pairs=pairs,
        label=np.concatenate(labels).astype(np.float32),
        order_log_odds=log_odds.astype(np.float32),
    )


def margin_std(means: Array, stds: Array) -> Array:
    """Standard deviation [n] of the difference of the rewards of two responses.

    The sides are independent in the distribution of one member of an ensemble. Between members the
    differences vary and not the rewards: preferences leave the offset of each member open.

    Args:
      means, stds: [n, 2, E] of the reward by each of E members.
    """
    within = (stds ** 2).sum(axis=1).mean(axis=-1)
    return (within + (means[:, 0] - means[:, 1]).var(axis=-1)) ** 0.5


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(head: HeadConfig, loss: losses.LossConfig, outputs: jax.Array, ratings: jax.Array,
          pairs: jax.Array) -> dict[str, jax.Array]:
    """The fields of `Predictions` that are computed from raw outputs [R, outputs]."""
    reward = head.read(outputs)
    whole = reward.distribution
    sides = [jax.tree.map(lambda x, i=i: x[pairs[:, i]], whole) for i in range(2)]
    # Attributes are rated one by one, each against its own distribution over all members.
    parts = distributions.pool(jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), reward.parts))
    # Preferences leave the scale of rewards open: their distance to a rating means nothing.
    known = jnp.isfinite(ratings) & loss.rated
    crps = jnp.where(known, parts.crps(jnp.where(known, ratings, 0.0)), 0.0)
    return {
        'quantiles': head.quantiles(outputs), 'means': whole.mean, 'stds': whole.std,
        'pair_stds': margin_std(reward.members.mean[pairs], reward.members.std[pairs]),
        'crps': jnp.where(known.any(axis=1), crps.sum(axis=1) / known.sum(axis=1), jnp.nan),
        'log_win': losses.log_win_probability(loss, *sides),
        'log_loss': losses.log_win_probability(loss, *reversed(sides)),
    }


def summarise(predictions: Predictions) -> dict[str, float]:
    """Metrics of held-out pairs, and of ratings; what nothing is known of is left out.

    Every decided pair counts once: ties have no chosen side, and weights act in training only.

    `accuracy` counts equal rewards as one half; `auc` is the probability that a random chosen
    reward beats a random rejected one; `nll` (nats) and `ece` judge the predicted probability
    that the chosen side is preferred; `margin`, `reward_mean` and `reward_std` are in units of
    reward, and so is `crps`, the mean over rated responses; `crossing_rate` is the share of
    neighbouring quantiles in the wrong order, before any sorting. Of a pairwise model, whose
    rewards compare within a prompt alone, `auc`, `reward_mean` and `reward_std` are left out.
    """
    p = predictions
    steps = np.diff(p.quantiles, axis=1)
    summary = {'n': len(p.pairs),
               'crossing_rate': float(np.mean(steps < 0)) if steps.size else 0.0}
    if not p.pairwise:
        rewards = p.means.astype(np.float64)
        summary |= {'reward_mean': float(rewards.mean()), 'reward_std': float(rewards.std())}
    if len(p.pairs):
        log_win = p.log_win.astype(np.float64)
        chosen, rejected = p.rewards
        summary |= {
            'accuracy': statistics.accuracy(chosen - rejected)(None),
            'nll': float(statistics.log_scores(log_win, p.log_loss, p.label).mean()),
            'ece': statistics.calibration_error(
                *statistics.stated_and_observed(log_win, p.label))(None),
            'margin': float(np.mean(chosen - rejected)),
        }
        if not p.pairwise:
            summary['auc'] = statistics.pooled_auc(chosen, rejected)(None)
    if np.isfinite(p.crps).any():
        summary['crps'] = float(np.nanmean(p.crps, dtype=np.float64))
    return summary


def criterion(loss: losses.LossConfig) -> str:
    """The metric of held-out comparisons by which a checkpoint is chosen; lower is better."""
    return 'crps' if loss.reads == 'ratings' else 'nll'


def save_predictions(path: str, predictions: Predictions, texts: np.ndarray) -> None:
    """Writes `predictions.npz`, whole or not at all.

    Beside the fields it holds `chosen` and `rejected`, for readers of pairs alone, and `texts`.

    Args:
      path: of the file.
      predictions: what is written.
      texts: [c, 16] uint8 digests, by which the texts of the comparisons are recognised.
    """
    p = predictions
    with open(path + '.tmp', 'wb') as file:
        np.savez_compressed(file, **p._asdict(), chosen=p.chosen, rejected=p.rejected, texts=texts)
    os.replace(path + '.tmp', path)


def fingerprint(predictions: Predictions) -> str:
    """SHA-256 over all fields, by which what was computed of predictions is known to be of them."""
    found = hashlib.sha256()
    for name, array in predictions._asdict().items():
        found.update(f'{name} {array.dtype} {array.shape}'.encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def load_predictions(path: str) -> Predictions:
    """Reads `predictions.npz`; no pickled objects are read."""
    with np.load(path, allow_pickle=False) as file:
        return Predictions(**{name: file[name] for name in Predictions._fields})

