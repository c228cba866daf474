"""Replication over the devices of this process, for `pmap`."""

from typing import Any

import jax
import jax.numpy as jnp


def replicate(tree: Any) -> Any:
    """A copy of the tree on each local device, as leaves with a leading device axis."""
    count = jax.local_device_count()
    return jax.pmap(lambda _, x: x, in_axes=(0, None))(jnp.arange(count), tree)


def unreplicate(tree: Any) -> Any:
    """The first device's copy of a replicated tree."""
    return jax.tree.map(lambda x: x[0], tree)


def all_sum(tree: Any, axis_name: str | None) -> Any:
    """Sum over the devices of a mapped axis; the tree itself without one."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
