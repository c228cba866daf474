"""Direct preference optimisation: a policy from preferences, without a reward model or samples.

With h_k = log(pi(y_k | x) / pi_ref(y_k | x)), the policy before the first step as the reference,
the loss of a prompt x with K responses is the mean over its judged pairs

    sum_ij P_ij l(h_i, h_j) / sum_ij P_ij,

P_ij the probability that response i is preferred to j: 1 for a preference, a soft label and its
rest both ways, 1/2 both ways for a tie, as of reward models. l is that of DPO (Rafailov et al.
2023), with the margin of a row as its offset, or IPO (Azar et al. 2023), see `objectives`. A step's
loss is the weighted mean over its prompts.

Axes as in `batches`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qrm.data.comparisons import DataError
from qrm.data.encoded import Encoded
from qrm.models.network import Params
from qrm.policy import batches, config, objectives, runs
from qrm.policy.batches import Extended, PolicyBatch
from qrm.policy.network import PolicyNetwork
from qrm.policy.runs import Prepared
from qrm.training import workdir
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.loop import Course, Outcome
from qrm.training.schema import ANY, POSITIVE, ConfigError, Key, OneOf, Range, Table
from qrm.training.workdir import WorkdirError

LOSSES = ('dpo', 'ipo')

KEYS: Table = {
    **config.KEYS,
    'dpo.loss': Key('dpo', OneOf(LOSSES), "of a pair: 'dpo', logistic, or 'ipo', a square"),
    'dpo.beta': Key(
        0.1, POSITIVE, "pull to the reference: of 'dpo' reward per nat, of 'ipo' its tau"),
    'dpo.label_smoothing': Key(
        0.0, Range(0, 0.5, open_high=True),
        "of 'dpo': share of preferences taken to be the wrong way round"),
    'dpo.length_normalised': Key(
        False, ANY, 'divide log-ratios by the tokens of their response; beta is then per '
        'nat a token'),
}

_ROUNDING = 1e-6  # of log-probabilities of responses; ratios that differ by less are equal
_REFERENCE = 'reference_log_probs'


class DpoConfig(NamedTuple):
    """What is made of log-ratios; fields as the keys of the section `dpo`."""

    loss: str = 'dpo'
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False


class Sums(NamedTuple):
    """Weighted sums over comparisons; counts over decided pairs, responses and tokens, [] float32.

    Attributes:
      loss, weight: of comparisons.
      correct, margin: of the implicit rewards of decided pairs, the chosen less the rejected.
      chosen, rejected: log-probabilities (nats) of the sides of decided pairs.
      pairs: how many of these there are.
      kl: estimates of each token, see `PreferenceObjective`.
      tokens: of all responses.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    margin: jax.Array
    chosen: jax.Array
    rejected: jax.Array
    pairs: jax.Array
    kl: jax.Array
    tokens: jax.Array

    def metrics(self) -> dict[str, jax.Array]:
        """Means, divided once; without decided pairs those of them are 0."""
        pairs = jnp.maximum(self.pairs, 1.0)
        return {
            'loss': self.loss / self.weight,
            'pairs': self.pairs,
            'accuracy': self.correct / pairs,
            'margin': self.margin / pairs,
            'chosen_log_prob': self.chosen / pairs,
            'rejected_log_prob': self.rejected / pairs,
            'kl': self.kl / jnp.maximum(self.tokens, 1.0),
        }


_OF_PAIRS = ('accuracy', 'margin', 'chosen_log_prob', 'rejected_log_prob')


@dataclasses.dataclass(frozen=True)
class PreferenceObjective:
    """DPO or IPO, see `step.Objective`; batches have the reference's log-probabilities.

    What is logged as `kl` is the mean over tokens of 'k3', the other way round: KL(pi_ref, pi) in
    nats a token, as far as responses are what the reference would say.

    Attributes:
      network: the policy.
      config: of the loss.
    """

    network: PolicyNetwork
    config: DpoConfig
    sums = Sums
    draws = False
    ema_decay = None

    def __call__(
        self, params: Params, embedded: jax.Array, batch: PolicyBatch, teacher: None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Sums]:
        """The sum over a micro-batch, see `step.Objective`."""
        log_probs = self.network.read(params, batch, embedded, key).log_probs
        sums = preference_sums(self.config, log_probs, batch.extras[_REFERENCE], batch.mask,
                               batch.rows.preference, batch.rows.weight, batch.rows.margin)
        return sums.loss, sums

    def as_row(self, values: dict[str, float]) -> dict[str, float]:
        """Without what is said of pairs where none is decided."""
        if values['pairs']:
            return values
        return {name: value for name, value in values.items() if name not in _OF_PAIRS}


def preference_sums(
    config: DpoConfig, log_probs: jax.Array, reference: jax.Array, mask: jax.Array,
    preference: jax.Array, weight: jax.Array, offset: jax.Array,
) -> Sums:
    """Sums over comparisons.

    Args:
      config: of the loss.
      log_probs, reference: [C, K, T] nats, of the policy and the reference.
      mask: [C, K, T] bool.
      preference: [C, K, K], see `Comparison.preference_matrix`; 0 where there is no response.
      weight: [C].
      offset: [C], see `objectives.dpo`; not of IPO.
    """
    ratios = objectives.log_ratio(log_probs, reference, mask,
                                  length_normalised=config.length_normalised)
    first, second = jnp.broadcast_arrays(ratios[:, :, None], ratios[:, None, :])
    if config.loss == 'dpo':
        losses = objectives.dpo(first, second, beta=config.beta,
                                label_smoothing=config.label_smoothing,
                                offset=offset[:, None, None])
    else:
        losses = objectives.ipo(first, second, beta=config.beta)
    known = jnp.sum(preference, axis=(1, 2))
    each = jnp.sum(preference * losses, axis=(1, 2)) / jnp.where(known > 0, known, 1.0)
    ahead = objectives.implicit_rewards(first - second, config.beta)
    decided = (preference > 0.5).astype(jnp.float32)
    totals = objectives.token_sum(log_probs, mask)
    # Programs round otherwise: where the policy is the reference, neither side is ahead.
    noise = _ROUNDING * jnp.abs(totals)
    equal = jnp.abs(first - second) <= noise[:, :, None] + noise[:, None, :]
    # Where nothing is known of a comparison, it has no weight either.
    weight = jnp.where(known > 0, weight, 0.0)
    return Sums(
        loss=jnp.sum(weight * each),
        weight=jnp.sum(weight),
        correct=jnp.sum(decided * 0.5 * (1.0 + jnp.where(equal, 0.0, jnp.sign(ahead)))),
        margin=jnp.sum(decided * ahead),
        chosen=jnp.sum(decided * totals[:, :, None]),
        rejected=jnp.sum(decided * totals[:, None, :]),
        pairs=jnp.sum(decided),
        kl=jnp.sum(objectives.kl_estimates(reference, log_probs, mask, 'k3')),
        tokens=jnp.sum(mask).astype(jnp.float32),
    )


class WithReference(Sequence[Extended]):
    """Comparisons with the log-probabilities of their tokens under the reference.

    Args:
      encoded: the comparisons.
      log_probs: of all tokens of all responses, one after the other.
      starts: [comparisons + 1], first token of each.
    """

    def __init__(self, encoded: Sequence[Encoded], log_probs: np.ndarray, starts: np.ndarray):
        self._encoded, self._log_probs, self._starts = encoded, log_probs, starts

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, i: int) -> Extended:
        item = self._encoded[i]
        own = self._log_probs[self._starts[i]:self._starts[i + 1]]
        return Extended(**vars(item), extras={
            _REFERENCE: np.split(own, np.cumsum(batches.sizes(item))[:-1])})


def check(values: Any) -> None:
    """Checks a config, see `config.check`.

    Raises:
      ConfigError: see there; or label smoothing of a loss that has none.
    """
    config.check(values, KEYS)
    config.check_margins(values, used=values.dpo.loss != 'ipo')
    if values.dpo.loss == 'ipo' and values.dpo.label_smoothing:
        raise ConfigError(f'config.dpo.label_smoothing={values.dpo.label_smoothing} beside '
                          "dpo.loss='ipo', expected 0: its optimum is finite without")


def train(values: Any, folder: str) -> Outcome:
    """Trains the configured model on preferences in a folder, see `runs.train`.

    Args:
      values: the config.
      folder: the workdir.
    """
    check(values)
    return runs.train(values, folder, learn)


def learn(prepared: Prepared) -> Course:
    """What a run learns; the held-out loss ranks its checkpoints.

    Raises:
      DataError: rows have a margin, which the loss does not take.
    """
    if prepared.config.dpo.loss == 'ipo':
        for split, items in prepared.data.encoded.items():
            if count := sum(item.margin != 0.0 for item in items):
                raise DataError(f"{count} {split} comparisons have a margin, which dpo.loss='ipo' "
                                "does not take; expected 'dpo', or rows without")
    own, start = DpoConfig(**prepared.config.dpo), prepared.initial
    shape = {'row_length': prepared.config.train.row_length, 'rows': prepared.config.train.rows}
    examples, validation = with_reference(prepared)
    plan = batches.plan(prepared.data.encoded['train'], **shape, of_tokens=(_REFERENCE,))

    def evaluate(trained: Params) -> dict[str, float]:
        params = start.network.tuning.join(trained, start.frozen)
        return held_out(own, validation, [one for chunk in runs.log_probs(
            start.network, params, prepared.data.encoded['validation'], **shape, mesh=start.mesh)
            for one in chunk])

    return runs.course(
        prepared, PreferenceObjective(start.network, own), examples,
        lambda items: batches.make_batch(items, plan, prepared.per_device), evaluate, 'loss',
        ('accuracy',), plan)


def held_out(
    config: DpoConfig, encoded: WithReference, log_probs: Sequence[Sequence[np.ndarray]]
) -> dict[str, float]:
    """Held-out metrics: those of a step over all comparisons at once.

    Args:
      config: of the loss.
      encoded: comparisons.
      log_probs: of each of them K arrays [n_k] of the policy's.

    Raises:
      NonFiniteLoss: a log-probability is not finite.
    """
    if not all(np.isfinite(own).all() for item in log_probs for own in item):
        raise NonFiniteLoss('held-out log-probabilities that are not finite')
    counts = np.array([len(item) for item in log_probs])
    found = []
    for k in np.unique(counts):
        members = np.flatnonzero(counts == k)
        items = [encoded[i] for i in members]
        longest = max(len(own) for i in members for own in log_probs[i])
        shape = (len(members), k, longest)
        policy, reference = np.zeros((2, *shape), np.float32)
        mask = np.zeros(shape, bool)
        for row, (i, item) in enumerate(zip(members, items, strict=True)):
            for j, own in enumerate(log_probs[i]):
                policy[row, j, :len(own)] = own
                reference[row, j, :len(own)] = item.extras[_REFERENCE][j]
                mask[row, j, :len(own)] = np.arange(len(own)) + item.prompt_sizes[j] > 0
        found.append(preference_sums(
            config, *map(jnp.asarray, (policy, reference, mask)),
            jnp.asarray(np.stack([item.preference for item in items])),
            *(jnp.asarray(np.array([getattr(item, name) for item in items], np.float32))
              for name in ('weight', 'margin'))))
    total = Sums(*map(sum, zip(*found, strict=True)))
    return {name: float(value) for name, value in total.metrics().items()}


def with_reference(prepared: Prepared) -> tuple[WithReference, WithReference]:
    """Training and validation comparisons with the reference, the policy before its first step.

    Its log-probabilities are computed once and kept in the folder of the run, by all that they
    depend on: data, weights, and how these are computed with. With several processes all of them
    call this.

    Raises:
      WorkdirError: what is kept is damaged, or nothing can be.
      NonFiniteLoss: a log-probability is not finite.
    """
    start, values = prepared.initial, prepared.config
    parts = [prepared.data.encoded[split] for split in ('train', 'validation')]
    about = prepared.identity | {
        'dtype': values.model.dtype, 'frozen_dtype': values.train.frozen_dtype}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = os.path.join(prepared.folder, 'reference')
    path = os.path.join(folder, f'{key}.npz')
    sizes = [np.array([batches.sizes(item).sum() for item in part]) for part in parts]
    total = sum(int(own.sum()) for own in sizes)
    kept = multihost_utils.broadcast_one_to_all(np.asarray(os.path.exists(path)))
    if kept:
        arrays = workdir.read_arrays(path)
        log_probs = arrays.get('log_probs')
        if log_probs is None or log_probs.shape != (total,) or not np.isfinite(log_probs).all():
            raise WorkdirError(f'{path}: not the log-probabilities of {total} tokens; delete it, '
                               'and they are computed again')
        print(f'log-probabilities of the reference are in {path}', flush=True)
    else:
        print(f'computing log-probabilities of {sum(map(len, parts))} comparisons under the '
              'reference', flush=True)
        log_probs = np.concatenate([
            own for part in parts for chunk in runs.log_probs(
                start.network, start.params, part, row_length=values.train.row_length,
                rows=values.train.rows, mesh=start.mesh) for item in chunk for own in item])
        if not np.isfinite(log_probs).all():
            raise NonFiniteLoss('the reference gives log-probabilities that are not finite')
        workdir.make(folder)
        workdir.write_arrays(path, {'log_probs': log_probs})
    first, second = np.split(log_probs, [int(sizes[0].sum())])
    return tuple(WithReference(part, own, np.cumsum([0, *each])) for part, own, each in zip(
        parts, (first, second), sizes, strict=True))
