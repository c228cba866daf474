"""Supervised fine-tuning: maximum likelihood of the responses that people preferred.

    loss = - sum_c w_c sum_t log pi(y_ct | x_c, y_c<t) / sum_c w_c n_c

for the preferred response y_c (n_c tokens, EOS included) to each prompt x_c of a batch, w_c the
weight of its row: a mean over the tokens of the batch, so that long responses weigh more. Rows with
one response teach it, whatever is said of it; of others that which is preferred to all is taken.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data.encoded import EncodedTable
from qrm.models.network import Params
from qrm.policy import batches, config, runs
from qrm.policy.batches import PolicyBatch
from qrm.policy.network import PolicyNetwork
from qrm.policy.objectives import token_sum
from qrm.policy.runs import Prepared
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.loop import Course, Outcome

KEYS = config.KEYS


class Sums(NamedTuple):
    """Sums over responses, all [] float32; `weight` is tokens times weights of their rows."""

    loss: jax.Array
    weight: jax.Array
    tokens: jax.Array

    def metrics(self) -> dict[str, jax.Array]:
        """The loss in nats a token, and how many tokens there were."""
        return {'loss': self.loss / self.weight, 'tokens': self.tokens}


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of responses, see `step.Objective`.

    Attributes:
      network: the policy.
    """

    network: PolicyNetwork
    sums = Sums
    draws = False
    ema_decay = None

    def __call__(
        self, params: Params, embedded: jax.Array, batch: PolicyBatch, teacher: None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Sums]:
        """The sum over a micro-batch, see `step.Objective`."""
        found = self.network.read(params, batch, embedded, key)
        tokens = jnp.sum(batch.mask, axis=-1)
        weight = batch.rows.weight[:, None]
        loss = -jnp.sum(weight * token_sum(found.log_probs, batch.mask))
        return loss, Sums(loss, jnp.sum(weight * tokens), jnp.sum(tokens).astype(jnp.float32))

    def as_row(self, values: dict[str, float]) -> dict[str, float]:
        """All of them."""
        return values


def check(values: Any) -> None:
    """Checks a config, see `config.check`."""
    config.check(values, KEYS)
    config.check_margins(values, used=False)


def train(values: Any, folder: str) -> Outcome:
    """Fine-tunes the configured model in a folder, see `runs.train`.

    Args:
      values: the config.
      folder: the workdir.
    """
    check(values)
    return runs.train(values, folder, learn, demonstrations=True)


def learn(prepared: Prepared) -> Course:
    """What a run learns; the held-out likelihood ranks its checkpoints."""
    examples = prepared.data.encoded['train']
    validation, start = prepared.data.encoded['validation'], prepared.initial
    shape = {'row_length': prepared.config.train.row_length, 'rows': prepared.config.train.rows}
    plan = batches.plan(examples, **shape)

    def evaluate(trained: Params) -> dict[str, float]:
        params = start.network.tuning.join(trained, start.frozen)
        return held_out(validation, [
            own for chunk in runs.log_probs(start.network, params, validation, **shape,
                                            mesh=start.mesh) for own in chunk])

    return runs.course(
        prepared, Likelihood(start.network), examples,
        lambda items: batches.make_batch(items, plan, prepared.per_device), evaluate, 'nll', (),
        plan)


def held_out(encoded: EncodedTable, log_probs: list[list[np.ndarray]]) -> dict[str, float]:
    """Held-out metrics.

    Args:
      encoded: comparisons of one response each.
      log_probs: of its tokens.

    Returns:
      'nll', nats a token, weighted as in training; 'response_nll', nats a response; 'tokens'.

    Raises:
      NonFiniteLoss: a log-probability is not finite.
    """
    weights = np.array([item.weight for item in encoded])
    sums = np.array([own[0].sum(dtype=np.float64) for own in log_probs])
    counts = np.array([len(own[0]) - (item.prompt_sizes[0] == 0)
                       for item, own in zip(encoded, log_probs, strict=True)])
    if not np.isfinite(sums).all():
        raise NonFiniteLoss('held-out log-probabilities that are not finite')
    return {'nll': float(-(weights @ sums) / (weights @ counts)),
            'response_nll': float(-(weights @ sums) / weights.sum()),
            'tokens': float(counts.sum())}
