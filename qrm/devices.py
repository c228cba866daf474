"""How a run is spread over the devices of all processes: on one, copied to each, or split."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qrm import sharding

MODES = ('replicated', 'fsdp')
_AXIS = 'devices'


def replicate(tree: Any) -> Any:
    """A copy of the tree on each local device, as leaves with a leading device axis."""
    count = jax.local_device_count()
    return jax.pmap(lambda _, x: x, in_axes=(0, None))(jnp.arange(count), tree)


def unreplicate(tree: Any) -> Any:
    """The first local device's copy of a replicated tree."""
    # Not x[0], which would be a computation on all devices of all processes.
    return jax.tree.map(lambda x: x.addressable_shards[0].data.reshape(x.shape[1:]), tree)


def all_sum(tree: Any, axis_name: str | None) -> Any:
    """Sum over the devices of a mapped axis; the tree itself without one."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def own_devices() -> list[int]:
    """Which of all devices, in the order of `jax.devices()`, belong to this process."""
    return [i for i, device in enumerate(jax.devices())
            if device.process_index == jax.process_index()]


def stack(trees: Sequence[Any]) -> Any:
    """Trees of arrays, one for each device, as one tree with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def put(trees: Sequence[Any], mesh: Mesh) -> Any:
    """Trees of arrays, one for each own device, as one tree of arrays over all devices."""
    place = NamedSharding(mesh, P(sharding.AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), stack(trees))


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where the state of a run lives, and how its step is run.

    Attributes:
      mesh: the mesh over which the state is split; None: it is on the one device there is, or
        copied to each (`pmap`).
    """

    mesh: Mesh | None = None

    @property
    def _copied(self) -> bool:
        return self.mesh is None and jax.device_count() > 1

    def start(self, state: Any) -> Any:
        """The state as `run` takes it; over a mesh it is already."""
        return replicate(state) if self._copied else state

    def one(self, tree: Any) -> Any:
        """One copy of state or metrics as `run` gives them; over a mesh, the split arrays."""
        return unreplicate(tree) if self._copied else tree

    def to_save(self, state: Any) -> Any:
        """The state as checkpoints take it."""
        # Of arrays that are whole in each process, only NumPy's are saved by the first alone.
        # Copies, as the next step uses the state's memory while this is being saved.
        return jax.tree.map(np.array, unreplicate(state)) if self._copied else state

    def compile(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles `step.make_train_step`'s function; the state given to it is used up.

        Returns:
          `run(state, trees) -> (state, metrics, stop)`; trees are (batch, stop) for each own
          device. Stop is a number that is added up over all devices: what one process knows
          reaches all of them at the same step.
        """

        def run(state, batch_and_stop, **kwargs):
            batch, stop = batch_and_stop
            axis_name = kwargs.get('axis_name')
            return *train_step(state, batch, **kwargs), jnp.sum(all_sum(stop, axis_name))

        if self.mesh is not None:
            compiled = jax.jit(lambda s, b: run(s, b, mesh=self.mesh), donate_argnums=0)
            return lambda state, trees: compiled(state, put(trees, self.mesh))
        if self._copied:
            compiled = jax.pmap(lambda s, b: run(s, b, axis_name=_AXIS), _AXIS, donate_argnums=0)
            return lambda state, trees: compiled(state, stack(trees))
        compiled = jax.jit(run, donate_argnums=0)
        return lambda state, trees: compiled(state, trees[0])
