"""How a run is spread over the devices of all processes: on one, copied to each, or split."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qrm.models import sharding

MODES = ('replicated', 'fsdp')
_AXIS = 'devices'
_MAPPINGS = 0.5  # of those that a process may have


def replicate(tree: Any) -> Any:
    """A copy of the tree on each local device, as leaves with a leading device axis."""
    count = jax.local_device_count()
    return jax.pmap(lambda _, x: x, in_axes=(0, None))(jnp.arange(count), tree)


def unreplicate(tree: Any) -> Any:
    """The first local device's copy of a replicated tree."""
    # Not x[0], which would be a computation on all devices of all processes.
    return jax.tree.map(lambda x: x.addressable_shards[0].data.reshape(x.shape[1:]), tree)


def fetch_number(value: jax.Array) -> float:
    """A number that a step gives, the same on all devices; fetched as soon as it is there."""
    # Nothing is computed for it on a device: that would wait for the step that runs by now.
    return float(np.ravel(value.addressable_shards[0].data)[0])


def release_programs() -> None:
    """Forgets compiled programs where those that there are leave little room for others.

    On a CPU each of them keeps several mappings of memory, of which Linux gives a process only so
    many, and one that has none left dies without a word. Where that is not known nothing is done.
    """
    try:
        with open('/proc/self/maps', encoding='utf-8') as file:
            count = sum(1 for _ in file)
        with open('/proc/sys/vm/max_map_count', encoding='utf-8') as file:
            most = int(file.read())
    except (OSError, ValueError):
        return
    if count > _MAPPINGS * most:
        jax.clear_caches()


def all_sum(tree: Any, axis_name: str | tuple[str, ...] | None) -> Any:
    """Sum over the devices of mapped axes; the tree itself without one."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where the state of a run lives, and how its step is run.

    Attributes:
      mesh: the mesh over which the state is split; None: it is on the one device there is, or
        copied to each (`pmap`).
    """

    mesh: Mesh | None = None

    @property
    def shares(self) -> int:
        """How many shares a batch is dealt in: one for each device, or tensor group of the mesh."""
        return jax.device_count() if self.mesh is None else self.mesh.shape[sharding.AXIS]

    @property
    def own(self) -> list[int]:
        """Which of the shares are of this process's devices."""
        size = jax.device_count() // self.shares
        return sorted({i // size for i, device in enumerate(jax.devices())
                       if device.process_index == jax.process_index()})

    @property
    def _copied(self) -> bool:
        return self.mesh is None and jax.device_count() > 1

    def start(self, state: Any) -> Any:
        """The state as `run` takes it; over a mesh it is already."""
        # Of several processes pmap fails on a tree without leaves.
        return replicate(state) if self._copied and jax.tree.leaves(state) else state

    def one(self, tree: Any) -> Any:
        """One copy of state or metrics as `run` gives them; over a mesh, the split arrays."""
        return unreplicate(tree) if self._copied else tree

    def to_save(self, state: Any) -> Any:
        """The state as checkpoints take it."""
        # Of arrays that are whole in each process, only NumPy's are saved by the first alone.
        # Copies, as the next step uses the state's memory while this is being saved.
        return jax.tree.map(np.array, unreplicate(state)) if self._copied else state

    def put(self, trees: Sequence[Any]) -> Any:
        """Trees of arrays, one for each of `own`, on their devices as what runs there takes them.

        This does not wait: while the devices compute, what they need next is on its way.
        """
        if self.mesh is None and not self._copied:
            return jax.device_put(trees[0])
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
        if self.mesh is None:
            mesh = Mesh(np.array(jax.local_devices()), (_AXIS,))
            return jax.device_put(stacked, NamedSharding(mesh, P(_AXIS)))
        place = NamedSharding(self.mesh, P(sharding.AXIS))
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(place, x), stacked)

    def compile(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles `step.make_train_step`'s function; the state given to it is used up.

        Returns:
          `run(state, (batch, stop), frozen=None) -> (state, metrics, stop)`, compiled at its first
          call, with state and frozen parameters from `start` and the rest from `put`. Stop is a
          number that is added up over all devices: what one process knows reaches all of them at
          the same step.
        """

        def run(state, batch_and_stop, frozen=None, *, axis_name=None, mesh=None):
            batch, stop = batch_and_stop
            if mesh is None:
                stops = all_sum(stop, axis_name)
            else:
                # Of a tensor group that several processes share, each gives what it knows itself.
                stops = jax.shard_map(
                    lambda own: jnp.sum(all_sum(own, mesh.axis_names)), mesh=mesh,
                    in_specs=P(sharding.AXIS), out_specs=P(), check_vma=False)(stop)
            return *train_step(state, batch, frozen, axis_name=axis_name, mesh=mesh), stops

        if self._copied:
            return jax.pmap(functools.partial(run, axis_name=_AXIS), _AXIS, donate_argnums=0)
        return jax.jit(functools.partial(run, mesh=self.mesh), donate_argnums=0)
