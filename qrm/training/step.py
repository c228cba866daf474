"""One training step as a pure function of (state, batch), for one device or many.

Sums, not means, are differentiated and reduced: over micro-batches, then over devices, and are
divided once, by the total weight. So a step means the same however its comparisons are spread.
What is summed an `Objective` says: that of reward models is in `reward_objective`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qrm.data.packing import Batch
from qrm.models import platforms, sharding
from qrm.models.architecture import flat, leaf_dtype, tree
from qrm.models.network import Network, Params
from qrm.models.transformer import to_bits
from qrm.models.tuning import stack_blocks, unstack_blocks
from qrm.training.devices import all_sum

SCHEDULES = ('cosine', 'linear', 'constant', 'inverse_sqrt')
OPTIMIZERS = ('adamw', 'sgd')


class TrainState(NamedTuple):
    """Everything a step changes.

    Attributes:
      step: [] int32, steps taken.
      params: parameters that are trained, float32, see `Tuning`.
      opt_state: state of the optimiser.
      key: raw key data of the run's random numbers; step s uses what is folded in from s.
      teacher: moving average of the parameters, for objectives with a teacher; else None.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    teacher: Params | None = None


class Sums(Protocol):
    """Numbers of a micro-batch, a NamedTuple of [] float32; they are added up.

    Attributes:
      weight: what gradients are divided by.
    """

    weight: jax.Array

    def metrics(self) -> dict[str, jax.Array]:
        """What is logged of a step, divided once; `loss` is among it."""


class Objective(Protocol):
    """What a step makes smaller, as a pure function of parameters and a micro-batch.

    Attributes:
      sums: type of what it counts, see `Sums`.
      draws: whether it draws random numbers, beside those of dropout.
      ema_decay: of the moving average of the parameters that it compares with, its teacher; None:
        it has none.
    """

    sums: type[Any]
    draws: bool
    ema_decay: float | None

    def __call__(
        self, params: Params, embedded: jax.Array, batch: Any, teacher: Params | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """The sum that is differentiated, and `sums`.

        Args:
          params: all parameters; blocks may stand in runs.
          embedded: [R, L, D], what `Network.embed` gives, whose gradient is taken by itself.
          batch: a micro-batch.
          teacher: all of its parameters, if there is one.
          key: of random numbers, if any are drawn.
        """

    def as_row(self, values: dict[str, float]) -> dict[str, float]:
        """The metrics of a step as they are logged, without those that mean nothing there."""


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
    floor = peak * config.warmup_floor
    return optax.join_schedules([lambda step: jnp.maximum(rise(step), floor), decay], [warmup])


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
    """Mask of the parameters that weight decay acts on: those with an axis of features."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: 'embed' in sharding.logical_axes(path, leaf), params)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh | None = None,
    *,
    teacher: bool = False,
) -> TrainState:
    """The state before the first step; with a mesh, over which params are split, split likewise.

    Args:
      params: initial parameters.
      optimizer: whose state is kept.
      seed: of the run's random numbers.
      mesh: see above.
      teacher: whether to keep a moving average of the parameters.
    """

    key = jax.random.key_data(jax.random.key(seed))
    if mesh is None:
        return _rest(optimizer, teacher, params, key)._replace(params=params)
    rest = functools.partial(_rest, optimizer, teacher)
    places = sharding.shardings(jax.eval_shape(rest, params, key), mesh)
    return jax.jit(rest, out_shardings=places)(params, key)._replace(params=params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rest(optimizer: optax.GradientTransformation, teacher: bool, params: Params, key: jax.Array
          ) -> TrainState:
    """The state before the first step, but for the parameters."""
    return TrainState(jnp.zeros((), jnp.int32), None, optimizer.init(params), key,
                      params if teacher else None)


def place_frozen(network: Network, frozen: Params) -> Params:
    """Frozen parameters, not over a mesh, as a step and `inference` take them fastest.

    Their blocks are taken apart once, not in every step: into runs that need not be cut, see
    `Transformer`. Tables and kernels of bfloat16 become bits, see `to_bits`.
    """
    if not frozen:
        return frozen
    narrow = jnp.dtype('bfloat16')
    frozen = {'backbone': tree({
        path: to_bits(leaf) if leaf_dtype(path, narrow.name) == narrow else leaf
        for path, leaf in flat(frozen['backbone']).items()})}
    if _unrolled(network) and network.tuning.kind != 'head':
        return unstack_blocks(frozen)
    return network.cut(frozen)


def make_train_step(
    network: Network, objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `train_step(state, batch, frozen=None, *, axis_name=None, mesh=None)`.

    It returns (state, metrics). Frozen are the parameters that are not trained, see `Tuning.split`;
    None: all are. With an axis name the function runs under `pmap` on that device's share of the
    batch, with replicated state; with a mesh, on all shares and on state split as in `sharding`;
    without either, on one device. Metrics are those of the objective and the norm of the gradient
    before clipping. A batch whose weights are all 0 gives a NaN loss.
    """

    tuning = network.tuning

    def total_of(
        params: Params,
        embedded: jax.Array,
        batch: Any,
        frozen: Params,
        teacher: Params | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        known = None if teacher is None else tuning.join(teacher, frozen)
        return objective(tuning.join(params, frozen), embedded, batch, known, key)

    # That of embeddings is taken apart from the tables', see `Transformer.add_embedding_gradient`.
    gradient = jax.grad(total_of, argnums=(0, 1) if tuning.kind == 'all' else 0, has_aux=True)

    def add_micro_batch(
        total: tuple[Params, Any],
        params: Params,
        batch: Any,
        frozen: Params,
        teacher: Params | None,
        key: jax.Array | None,
    ) -> tuple[Params, Any]:
        embedded = network.embed(tuning.join(params, frozen), batch)
        found, sums = gradient(params, embedded, batch, frozen, teacher, key)
        if tuning.kind != 'all':
            return jax.tree.map(jnp.add, total, (found, sums))
        of_params, of_embedded = found
        gradients, sums = jax.tree.map(jnp.add, total, (of_params, sums))
        return network.add_embedding_gradient(gradients, batch, of_embedded), sums

    def add_batch(
        params: Params,
        frozen: Params,
        teacher: Params | None,
        batch: Batch,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None,
    ) -> tuple[Params, Any]:
        """Sums over the micro-batches of one device."""
        own = None
        if network.dropout or objective.draws:
            own = jax.random.fold_in(jax.random.wrap_key_data(key), step)
            if axis_name is not None:
                own = jax.random.fold_in(own, jax.lax.axis_index(axis_name))
        zeros = jnp.zeros((), jnp.float32)
        count = len(objective.sums._fields)
        total = (jax.tree.map(jnp.zeros_like, params), objective.sums(*[zeros] * count))
        for number, stack in enumerate(batch):

            def add(i, carry, stack=stack, number=number):
                micro_batch = jax.tree.map(lambda x: x[i], stack.micro_batches)
                drop = None if own is None else jax.random.fold_in(
                    jax.random.fold_in(own, number), i)
                return add_micro_batch(carry, params, micro_batch, frozen, teacher, drop)

            # The trip count is data: one compilation serves however many are filled. Where
            # shards are gathered in the loop, all devices go round as often as the fullest.
            count = stack.count
            if sharding.is_sharded((params, frozen)):
                count = jax.lax.pmax(count, axis_name)
            total = jax.lax.fori_loop(0, count, add, total)
        return total

    def over_devices(
        state: TrainState, batch: Batch, frozen: Params, axis_name: str | None
    ) -> tuple[Params, Any]:
        # On CPU unstacked blocks save the copies that a scan makes of parameters and activations;
        # elsewhere a scan keeps compilation short, and with it blocks are really recomputed.
        params, teacher = state.params, state.teacher
        if _unrolled(network):
            params, teacher = unstack_blocks(params), teacher and unstack_blocks(teacher)
        gradients, sums = all_sum(
            add_batch(params, frozen, teacher, batch, state.step, state.key, axis_name), axis_name)
        return stack_blocks(gradients), sums

    def over_mesh(
        state: TrainState, batch: Batch, frozen: Params, mesh: Mesh
    ) -> tuple[Params, Any]:

        def own(networks, batch, step, key):
            params, teacher, frozen = networks
            gradients, sums = add_batch(params, frozen, teacher, batch, step, key, sharding.AXIS)
            return sharding.add_up(gradients), all_sum(sums, sharding.AXIS)

        splits = sharding.mesh_specs(state.params, mesh)
        return sharding.on_shards(own, mesh, (splits, P()))(
            (state.params, state.teacher, frozen), batch, state.step, state.key)

    def train_step(
        state: TrainState,
        batch: Batch,
        frozen: Params | None = None,
        *,
        axis_name: str | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        frozen = frozen or {}
        if mesh is None:
            gradients, sums = over_devices(state, batch, frozen, axis_name)
        else:
            gradients, sums = over_mesh(state, batch, frozen, mesh)
        gradients = jax.tree.map(lambda g: g / sums.weight, gradients)
        # Over a mesh these are whole arrays to look at, so that norms are those of all shards.
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = sums.metrics() | {'gradient_norm': optax.tree.norm(gradients)}
        params = optax.apply_updates(state.params, updates)
        teacher = state.teacher
        if teacher is not None:
            teacher = optax.incremental_update(params, teacher, 1.0 - objective.ema_decay)
        state = TrainState(state.step + 1, params, opt_state, state.key, teacher)
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(state, sharding.shardings(state, mesh))
        return state, metrics

    return train_step


def _unrolled(network: Network) -> bool:
    """Whether blocks are computed one by one."""
    return platforms.current() == 'cpu' and not network.remat
