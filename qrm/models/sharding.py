"""Parameters spread over all devices (FSDP): which axis of which leaf, and how shards are used.

Every parameter, and every copy of it that an optimiser keeps, lives in shards, one on each device
of a mesh. A device gathers the blocks one at a time while it computes, and gradients are
summed over devices into the same shards, so that no device ever holds all parameters. This is
data parallelism: each device has its own comparisons.

Axes: R rows, L tokens a row, D features, V entries of a table, N devices.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qrm.models import platforms

AXIS = 'fsdp'  # the one axis of the mesh

_HEAD_AXES = (
    (r'head/kernel', ('embed', 'outputs')),
    (r'head/gate', ('embed', 'outputs')),
    (r'head/cosines', ('cosines', 'embed')),
    (r'head/(gate_)?bias', ('bias',)),
    (r'head/(hidden|gate)_\d+/kernel', ('embed', 'outputs')),
    (r'head/(hidden|gate)_\d+/bias', ('bias',)),
    (r'head/annotators', ('annotators', 'factors')),
)
# End of a leaf's path (a regular expression) -> names of its axes. A path has exactly one row of
# as many axes as it has.
LOGICAL_AXES = (
    (r'backbone/(tokens|output)', ('vocab', 'embed')),
    (r'backbone/(positions|types)', ('positions', 'embed')),
    (r'backbone/blocks/(\d+/)?attention/qkv/kernel', ('layers', 'embed', 'heads')),
    (r'backbone/blocks/(\d+/)?attention/output/kernel', ('layers', 'heads', 'embed')),
    (r'backbone/blocks/(\d+/)?mlp/up/kernel', ('layers', 'embed', 'mlp')),
    (r'backbone/blocks/(\d+/)?mlp/down/kernel', ('layers', 'mlp', 'embed')),
    (r'backbone/blocks/(\d+/)?(attention|mlp)/\w+/bias', ('layers', 'bias')),
    (r'backbone/blocks/(\d+/)?(attention/)?\w+_norm/(scale|bias)', ('layers', 'norm')),
    # Of adapters the sides of the kernel, whichever these are, as weight decay acts on both.
    (r'backbone/blocks/(\d+/)?(attention|mlp)/\w+/lora/\w+/a', ('layers', 'embed', 'rank')),
    (r'backbone/blocks/(\d+/)?(attention|mlp)/\w+/lora/\w+/b', ('layers', 'rank', 'embed')),
    (r'backbone/(embedding_norm|norm|pooler/norm)/(scale|bias)', ('norm',)),
    (r'backbone/pooler/dense/kernel', ('embed', 'outputs')),
    (r'backbone/pooler/dense/bias', ('bias',)),
    *_HEAD_AXES,
    # Heads with several members have their parameters stacked.
    *((end, ('members', *axes)) for end, axes in _HEAD_AXES),
    (r'value/kernel', ('embed', 'outputs')),
    (r'value/bias', ('bias',)),
    (r'key', ('random',)),
)
# A leaf is split along the first of these that its row names and the number of devices divides;
# a leaf without one is whole on every device. Biases and norms are not worth a collective each:
# they are a thousandth of a model. Tables are split along features only, see `look_up`.
MESH_AXES = {'embed': AXIS, 'heads': AXIS, 'mlp': AXIS}


def make_mesh() -> Mesh:
    """All devices of all processes in one axis."""
    return Mesh(np.array(jax.devices()), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def specs(tree: Any, devices: int) -> Any:
    """How each leaf of parameters, or of a state that holds copies of them, is split.

    Args:
      tree: arrays or their shapes; scalars are whole on every device.
      devices: how many devices there are.

    Returns:
      A tree of `PartitionSpec`.

    Raises:
      ValueError: see `logical_axes`.
    """

    def spec(path: Any, leaf: Any) -> P:
        if not leaf.shape:
            return P()
        sizes = dict(zip(logical_axes(path, leaf), leaf.shape, strict=True))
        chosen = next((a for a in MESH_AXES if a in sizes and sizes[a] % devices == 0), None)
        return P(*(MESH_AXES[a] if a == chosen else None for a in sizes)) if chosen else P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def logical_axes(path: Any, leaf: Any) -> tuple[str, ...]:
    """Names of the axes of a leaf, by its path in a tree.

    Raises:
      ValueError: it has no row in `LOGICAL_AXES`, several, or one for other axes.
    """
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    rows = [row for end, row in LOGICAL_AXES if re.search(f'(^|/){end}$', name)]
    fitting = [row for row in rows if len(row) == len(leaf.shape)]
    if len(fitting) != 1:
        raise ValueError(f'{name} {leaf.shape}: rows of sharding.LOGICAL_AXES that match: {rows}, '
                         'expected one, with a name for each axis')
    return fitting[0]


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`specs` of the tree as shardings over a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh.size))


def split(tree: Any, places: Any) -> Any:
    """Arrays that this process has whole, as arrays split over all devices.

    Args:
      tree: arrays, the same in each process.
      places: from `shardings`.
    """

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        own = np.asarray(leaf)
        return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])

    return jax.tree.map(place, tree, places)


@functools.partial(jax.tree_util.register_dataclass, data_fields=['value'], meta_fields=['axis'])
@dataclasses.dataclass(frozen=True)
class Shard:
    """A device's part of a parameter, a leaf of what `on_shards` passes on.

    Attributes:
      value: the part.
      axis: which axis is split, counted from the end (-1 is the last), so that it stays right
        when blocks are taken off a leading axis.
    """

    value: jax.Array
    axis: int


def on_shards(
    function: Callable[..., Any], mesh: Mesh, out_specs: Any
) -> Callable[..., Any]:
    """`function(params, batch, *rest)` on every device, as a function of arrays over the mesh.

    On a device, split parameters arrive as `Shard`, batch without its leading axis, which is
    over devices, and the rest whole. Gradients of `whole` are sums over devices, in shards;
    those of parameters that are whole everywhere are the device's own, see `add_up`.
    """

    def call(params: Any, batch: Any, *rest: Any) -> Any:
        splits = specs(params, mesh.size)

        def own(params: Any, batch: Any, *rest: Any) -> Any:
            return function(_mark(params, splits), jax.tree.map(lambda x: x[0], batch), *rest)

        # Without check_vma, gradients of what is whole everywhere stay plain sums of each device;
        # with it they would be summed over devices already, once for each micro-batch.
        return jax.shard_map(own, mesh=mesh, in_specs=(splits, P(AXIS), *[P()] * len(rest)),
                             out_specs=out_specs, check_vma=False)(params, batch, *rest)

    return call


def is_sharded(tree: Any) -> bool:
    """Whether any leaf is a `Shard`."""
    return any(isinstance(leaf, Shard) for leaf in _leaves(tree))


def whole(tree: Any, dtype: Any = np.float32) -> Any:
    """The tree with shards gathered from all devices, in `dtype`; other leaves as they are.

    Parameters that are kept or computed with in bfloat16 are exchanged in it, which changes no
    number; their gradients are summed over devices in float32.
    """

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, Shard):
            return leaf
        narrower = min(np.dtype(dtype), leaf.value.dtype, key=lambda d: d.itemsize)
        return _gather(leaf.value, leaf.value.ndim + leaf.axis, narrower)

    return jax.tree.map(gather, tree, is_leaf=_is_shard)


def add_up(gradients: Any) -> Any:
    """Gradients summed over devices, as arrays: shards hold their part of the sum already."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, Shard) else jax.lax.psum(leaf, AXIS),
        gradients, is_leaf=_is_shard)


def look_up(table: Any, indices: jax.Array) -> jax.Array:
    """Rows [R, L, D] of a table [V, D], whole or a shard, at indices [R, L].

    Of a shard [V, D / N] each device looks up the indices of all, and what was found, not the
    table, is exchanged.
    """
    if not isinstance(table, Shard):
        return table[indices]
    found = table.value[jax.lax.all_gather(indices, AXIS, tiled=True)]
    return jax.lax.all_to_all(found, AXIS, split_axis=0, concat_axis=2, tiled=True)


def add_rows(table: Any, indices: jax.Array, rows: jax.Array) -> Any:
    """Adds rows [R, L, D] to a table [V, D] at indices [R, L]; to a shard those of all devices."""
    if not isinstance(table, Shard):
        return table.at[indices].add(rows)
    indices = jax.lax.all_gather(indices, AXIS, tiled=True)
    rows = jax.lax.all_to_all(rows, AXIS, split_axis=2, concat_axis=0, tiled=True)
    return dataclasses.replace(table, value=table.value.at[indices].add(rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, axis: int, dtype: np.dtype) -> jax.Array:
    """All devices' parts along an axis; the gradient is summed over devices into the parts."""
    return jax.lax.all_gather(part.astype(dtype), AXIS, axis=axis, tiled=True)


def _gather_forward(part, axis, dtype):
    return _gather(part, axis, dtype), None


def _gather_backward(axis, unused_dtype, unused_saved, gradient):
    gradient = gradient.astype(jnp.float32)
    if platforms.current() != 'cpu':
        return (jax.lax.psum_scatter(gradient, AXIS, scatter_dimension=axis, tiled=True),)
    # Between processes XLA scatters sums on CPU through Gloo, which now and then sends what it has
    # overwritten already (github.com/jax-ml/jax/issues/40830). As many bytes are exchanged here.
    shape, devices = gradient.shape, jax.lax.axis_size(AXIS)
    parts = gradient.reshape(*shape[:axis], devices, -1, *shape[axis + 1:])
    return (jnp.sum(jax.lax.all_to_all(parts, AXIS, split_axis=axis, concat_axis=0), axis=0),)


_gather.defvjp(_gather_forward, _gather_backward)


def _mark(params: Any, splits: Any) -> Any:
    def mark(leaf: jax.Array, spec: P) -> Any:
        return Shard(leaf, spec.index(AXIS) - leaf.ndim) if AXIS in spec else leaf

    return jax.tree.map(mark, params, splits)


def _is_shard(leaf: Any) -> bool:
    return isinstance(leaf, Shard)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_shard)
