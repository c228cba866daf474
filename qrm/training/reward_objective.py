"""The objective of reward models: what a training step sums over the comparisons of a micro-batch.

Axes: C comparisons, K responses.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qrm.data.packing import MicroBatch
from qrm.models.network import Params, RewardNetwork
from qrm.rewards import heads, losses


class Sums(NamedTuple):
    """Weighted sums over comparisons, and counts over pairs and responses, all [] float32."""

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    margin: jax.Array
    pairs: jax.Array
    reward: jax.Array
    reward_squared: jax.Array
    responses: jax.Array

    def metrics(self) -> dict[str, jax.Array]:
        """Means, divided once; without pairs, accuracy (ties count one half) and margin are 0."""
        mean = self.reward / self.responses
        variance = self.reward_squared / self.responses - mean**2
        return {
            'loss': self.loss / self.weight,
            'pairs': self.pairs,
            'accuracy': self.correct / jnp.maximum(self.pairs, 1.0),
            'margin': self.margin / jnp.maximum(self.pairs, 1.0),
            'reward_mean': mean,
            'reward_std': jnp.sqrt(jnp.maximum(variance, 0.0)),
        }


@dataclasses.dataclass(frozen=True)
class RewardObjective:
    """A loss of `losses`, and that of the language model if it has a weight, see `step.Objective`.

    Attributes:
      network: the reward model.
      loss: what is learnt, from what.
    """

    network: RewardNetwork
    loss: losses.LossConfig
    sums = Sums

    @property
    def draws(self) -> bool:
        """Whether the levels that quantiles are learnt at are drawn."""
        return self.network.head.name == 'implicit_quantile'

    @property
    def ema_decay(self) -> float | None:
        """Of the teacher, of losses that have one."""
        return self.loss.ema_decay if self.loss.has_teacher else None

    def __call__(
        self, params: Params, embedded: jax.Array, batch: MicroBatch, teacher: Params | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Sums]:
        """The sum over a micro-batch, see `step.Objective`."""
        network, loss = self.network, self.loss
        # The language-model loss needs all tokens, the rewards only those they are read at.
        hidden = network.hidden(params, batch, embedded, key if network.dropout else None,
                                everywhere=bool(loss.lm_weight))
        levels = None
        if self.draws:
            levels = heads.random_levels(jax.random.fold_in(key, 1), batch.present.shape,
                                         network.head.num_quantiles)
        # What empty slots hold must not reach the gradient, not even as 0 * inf.
        outputs = jnp.where(batch.present[..., None], network.outputs(params, hidden, levels), 0.0)
        reward = network.head.read(outputs, levels)
        means = None
        if teacher is not None:
            means = network.head.read(network(teacher, batch)).members.mean
        judgement = losses.Judgement(batch.preference, batch.margin, batch.ratings,
                                     batch.annotator)
        per_comparison = jax.vmap(functools.partial(losses.comparison_loss, loss))(
            reward, judgement, means)
        total = jnp.sum(per_comparison * batch.weight)
        if loss.lm_weight:
            total += loss.lm_weight * network.language_model_loss(params, batch, hidden.tokens)
        return total, sums_of(total, reward.distribution.mean, batch)

    def as_row(self, values: dict[str, float]) -> dict[str, float]:
        """Without accuracy and margin where there are no pairs, such as of a batch of ratings."""
        if values['pairs']:
            return values
        return {name: value for name, value in values.items() if name not in ('accuracy', 'margin')}


def sums_of(loss: jax.Array, rewards: jax.Array, batch: MicroBatch) -> Sums:
    """Sums of a micro-batch from its rewards [C, K]."""
    present = batch.present.astype(jnp.float32)
    rewards = jnp.where(batch.present, rewards, 0.0)
    decided = (batch.preference > 0.5).astype(jnp.float32)
    ahead = rewards[:, :, None] - rewards[:, None, :]
    return Sums(
        loss=loss,
        weight=jnp.sum(batch.weight),
        correct=jnp.sum(decided * 0.5 * (1.0 + jnp.sign(ahead))),
        margin=jnp.sum(decided * ahead),
        pairs=jnp.sum(decided),
        reward=jnp.sum(rewards),
        reward_squared=jnp.sum(rewards**2),
        responses=jnp.sum(present),
    )
