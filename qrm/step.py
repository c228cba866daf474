"""One training step as a pure function of (state, batch), for one device or many.

Sums, not means, are differentiated and reduced: over micro-batches, then over devices, and are
divided once, by the total weight. So a step means the same however its comparisons are spread.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qrm import losses
from qrm.devices import all_sum
from qrm.network import Params, RewardNetwork, stack_blocks, unstack_blocks
from qrm.packing import Batch, MicroBatch

SCHEDULES = ('cosine', 'linear', 'constant', 'inverse_sqrt')
OPTIMIZERS = ('adamw', 'sgd')


class TrainState(NamedTuple):
    """Everything a step changes.

    Attributes:
      step: [] int32, steps taken.
      params: parameters, float32.
      opt_state: state of the optimiser.
      key: raw key data of the run's random numbers; step s uses what is folded in from s.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array


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
        """Means, divided once; accuracy counts a tie of rewards as one half."""
        mean = self.reward / self.responses
        variance = self.reward_squared / self.responses - mean**2
        return {
            'loss': self.loss / self.weight,
            'accuracy': self.correct / jnp.maximum(self.pairs, 1.0),
            'margin': self.margin / jnp.maximum(self.pairs, 1.0),
            'reward_mean': mean,
            'reward_std': jnp.sqrt(jnp.maximum(variance, 0.0)),
        }


def make_schedule(config: Any, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the configured decay.

    Args:
      config: the `optimizer` section of a config.
      steps: steps of the whole run.
    """
    warmup = max(1, round(config.warmup_fraction * steps)) if config.warmup_fraction else 0
    peak, rest = config.learning_rate, max(steps - warmup, 1)
    decay = {
        'cosine': optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        'linear': optax.linear_schedule(peak, peak * config.final_fraction, rest),
        'constant': optax.constant_schedule(peak),
        'inverse_sqrt': lambda step: peak * jnp.sqrt(
            jnp.maximum(warmup, 1) / (step + jnp.maximum(warmup, 1))
        ),
    }[config.schedule]
    if not warmup:
        return decay
    # The first step already moves: it takes 1 / warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or SGD on the schedule.

    Weight decay acts on matrices only, not on norms and biases.
    """
    schedule = make_schedule(config, steps)
    if config.name == 'sgd':
        optimizer = optax.sgd(schedule)
    else:
        optimizer = optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps,
                                weight_decay=config.weight_decay, mask=decays)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def decays(params: Params) -> Params:
    """Mask of the parameters that weight decay acts on."""
    matrices = ('kernel', 'wte', 'wpe')
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in matrices, params)


def init_state(params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def make_train_step(
    network: RewardNetwork, loss: losses.LossConfig, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `train_step(state, batch, *, axis_name=None) -> (state, metrics)`.

    With an axis name the function runs under `pmap` on that device's share of the batch, with
    replicated state; without, on one device. Metrics are those of `Sums.metrics` and the norm
    of the gradient before clipping. A batch whose weights are all 0 gives a NaN loss.
    """

    def objective(
        params: Params, embedded: jax.Array, batch: MicroBatch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        # The language-model loss needs all tokens, the rewards only those they are read at.
        hidden = network.hidden(params, batch, embedded, key, everywhere=bool(loss.lm_weight))
        read = hidden.reshape(-1, hidden.shape[-1])[batch.reads] if loss.lm_weight else hidden
        quantiles = network.rewards(params, read).quantiles
        per_comparison = jax.vmap(losses.comparison_loss, in_axes=(None, 0, 0, 0))(
            loss, quantiles, batch.preference, batch.margin
        )
        total = jnp.sum(per_comparison * batch.weight)
        if loss.lm_weight:
            total += loss.lm_weight * network.language_model_loss(params, batch, hidden)
        return total, _sums(total, jnp.mean(quantiles, axis=-1), batch)

    gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)

    def add_micro_batch(
        total: tuple[Params, Sums], params: Params, batch: MicroBatch, key: jax.Array | None
    ) -> tuple[Params, Sums]:
        (of_params, of_embedded), sums = gradient(params, network.embed(params, batch), batch, key)
        gradients, sums = jax.tree.map(jnp.add, total, (of_params, sums))
        return network.add_embedding_gradient(gradients, batch, of_embedded), sums

    def train_step(
        state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = None
        if network.dropout:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            if axis_name is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        # On CPU unstacked blocks save the copies that a scan makes of parameters and activations;
        # elsewhere a scan keeps compilation short, and with it blocks are really recomputed.
        unrolled = jax.default_backend() == 'cpu' and not network.remat
        params = unstack_blocks(state.params) if unrolled else state.params
        zeros = jnp.zeros((), jnp.float32)
        total = (jax.tree.map(jnp.zeros_like, params), Sums(*[zeros] * len(Sums._fields)))
        for number, stack in enumerate(batch):

            def add(i, carry, stack=stack, number=number):
                micro_batch = jax.tree.map(lambda x: x[i], stack.micro_batches)
                own = None if key is None else jax.random.fold_in(
                    jax.random.fold_in(key, number), i)
                return add_micro_batch(carry, params, micro_batch, own)

            # The trip count is data: one compilation serves however many are filled.
            total = jax.lax.fori_loop(0, stack.count, add, total)
        gradients, sums = all_sum(total, axis_name)
        gradients = stack_blocks(gradients) if unrolled else gradients
        gradients = jax.tree.map(lambda g: g / sums.weight, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = sums.metrics() | {'gradient_norm': optax.tree.norm(gradients)}
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def _sums(loss: jax.Array, rewards: jax.Array, batch: MicroBatch) -> Sums:
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
