"""Tensor parallelism: what each device of a tensor group computes of a block.

As Megatron-LM (Shoeybi et al. 2019) divides it: a device has some of the heads, with the columns of
queries, keys and values that make them and the rows of the output projection that read them, and
some of the perceptron's inner features likewise. What both branches give is added up over the group
in the forward pass, what comes back to their inputs in the backward pass. All else is the same on
each device of a group: the residual stream, its dropout, norms, embeddings and head.

So gradients are of three kinds. Of a device's own columns and rows it has all of the gradient, of
what is used beside the branches too, as the others have; of what all use in a part of a branch, the
parts are added up, see `enter`, or put together, see `own`.

Axes: F features out, N devices, M of a tensor group.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qrm.models import sharding
from qrm.models.architecture import Architecture, flat, tree
from qrm.models.lora import Lora, split
from qrm.models.sharding import TENSOR

_COLUMNS = ('attention/qkv', 'mlp/up')  # kernels of which a device has columns; of others, rows
_JOINED = re.compile(r'(^|/)blocks/(\d+/)?(attention/qkv|mlp/up)/(kernel|bias)$')


def check(a: Architecture, devices: int, tensor: int) -> None:
    """Checks that groups of so many devices can divide the blocks.

    Args:
      a: of the model.
      devices: N.
      tensor: M.

    Raises:
      ValueError: they cannot; names what was expected.
    """
    if devices % tensor:
        raise ValueError(f'tensor={tensor}, expected a divisor of the number of devices, {devices}')
    if tensor == 1:
        return
    for count, what in ((a.num_kv_heads, 'key and value heads'),
                        (a.intermediate_size, 'inner features')):
        if count % tensor:
            raise ValueError(f'tensor={tensor} for {count} {what}, expected a divisor of them')
    if a.query_key_norm == 'projection':
        raise ValueError(f'tensor={tensor} for a model with norms of the queries of all heads '
                         'together, expected 1')
    groups = devices // tensor
    if a.hidden_size % groups:
        raise ValueError(f'tensor={tensor} makes {groups} groups of {devices} devices, expected '
                         f'a divisor of the {a.hidden_size} features')


def size(blocks: Any) -> int:
    """M of the mesh that blocks, as `sharding.on_shards` gives them, are split over; else 1."""
    return jax.lax.axis_size(TENSOR) if sharding.is_sharded(blocks) else 1


def part(a: Architecture, tensor: int) -> Architecture:
    """What one device of a group computes of the blocks, as if it were the whole model."""
    return dataclasses.replace(
        a, num_heads=a.num_heads // tensor, num_kv_heads=a.num_kv_heads // tensor,
        intermediate_size=a.intermediate_size // tensor)


def own(a: Architecture, lora: Lora | None, layer: Any, tensor: int) -> tuple[Lora | None, Any]:
    """Adapters and parameters of a block as a device of a group uses them, within `part`.

    Args:
      a: of the whole model.
      lora: of the whole model.
      layer: a block's parameters from `sharding.whole`: of kernels and biases that are split, the
        device's own.
      tensor: M.
    """

    def take(path: str, leaf: jax.Array) -> jax.Array:
        if path.endswith(('query_norm/scale', 'key_norm/scale')):
            return enter(leaf)
        kernel, _, rest = path.partition('/lora/')
        if not rest:
            return leaf
        name, side = rest.split('/')
        # Of one side there are features that the group divides; the other meets all of them.
        if (side == 'b') != (kernel in _COLUMNS):
            return enter(leaf)
        if side == 'a':
            return _own(leaf, leaf.ndim - 2)
        module = next(m for m in lora.of(kernel) if m.name == name)
        sizes = a.parts[kernel.split('/')[1]]
        inside = tuple(width for stop, width in zip(itertools.accumulate(sizes), sizes, strict=True)
                       if module.start < stop <= module.stop)
        return jnp.concatenate([_own(one, leaf.ndim - 1) for one in split(leaf, inside)], axis=-1)

    taken = tree({path: take(path, leaf) for path, leaf in flat(layer).items()})
    if lora is None:
        return None, taken
    modules = tuple(
        m._replace(start=m.start // tensor, stop=m.stop // tensor) if m.kernel in _COLUMNS else m
        for m in lora.modules)
    return dataclasses.replace(lora, modules=modules), taken


@jax.custom_vjp
def enter(x: jax.Array) -> jax.Array:
    """What a group's devices all have, where each begins to use it in a part of a branch.

    Its gradient is the sum of what comes back from all parts.
    """
    return x


def _enter_forward(x):
    return x, None


def _enter_backward(unused_saved, gradient):
    return (jax.lax.psum(gradient, TENSOR),)


enter.defvjp(_enter_forward, _enter_backward)


@jax.custom_vjp
def leave(x: jax.Array) -> jax.Array:
    """The sum over a group of what its parts of a branch give, on each of its devices."""
    return jax.lax.psum(x, TENSOR)


def _leave_forward(x):
    return leave(x), None


def _leave_backward(unused_saved, gradient):
    return (gradient,)


leave.defvjp(_leave_forward, _leave_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _own(x: jax.Array, axis: int) -> jax.Array:
    """The device's part of what all of a group have; its gradient is put together from theirs."""
    return sharding.own_part(x, axis)


def _own_forward(x, axis):
    return _own(x, axis), None


def _own_backward(axis, unused_saved, gradient):
    return (jax.lax.all_gather(gradient, TENSOR, axis=axis, tiled=True),)


_own.defvjp(_own_forward, _own_backward)


def arrange(state: Any, a: Architecture, mesh: Mesh | None) -> Any:
    """Parameters over a mesh, or a state that holds copies of them, as a step takes them.

    A device's part of an axis is contiguous, so columns of kernels that are joined (queries, keys
    and values; gate and up) are put in an order in which those of each device stand together.
    Checkpoints have them in their own order.

    Args:
      state: whose arrays are split by `sharding.shardings`; they are used up.
      a: of the model.
      mesh: the mesh; None: the state is not split.
    """
    return _reordered(state, a, mesh, _arranged, donate=True)


def restore(state: Any, a: Architecture, mesh: Mesh | None) -> Any:
    """The inverse of `arrange`, whose arrays stay."""
    return _reordered(state, a, mesh, _restored, donate=False)


def _reordered(state, a, mesh, order, *, donate):
    if mesh is None or mesh.shape[TENSOR] == 1:
        return state

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        found = _JOINED.search(jax.tree_util.keystr(path, simple=True, separator='/'))
        sizes = a.parts[found[3].split('/')[1]] if found else ()
        if len(sizes) < 2:
            return leaf
        # One after the other, as on the way more than a device's part of a leaf may be there.
        return jax.block_until_ready(jax.jit(
            functools.partial(order, sizes=sizes, tensor=mesh.shape[TENSOR]),
            out_shardings=leaf.sharding, donate_argnums=(0,) if donate else ())(leaf))

    return jax.tree_util.tree_map_with_path(one, state)


def _arranged(x: jax.Array, sizes: Sequence[int], tensor: int) -> jax.Array:
    """Parts [..., F] of these sizes, each in M, as M with one of each."""
    parts = jnp.split(x, list(itertools.accumulate(sizes))[:-1], axis=-1)
    parts = [part.reshape(*x.shape[:-1], tensor, -1) for part in parts]
    return jnp.concatenate(parts, axis=-1).reshape(x.shape)


def _restored(x: jax.Array, sizes: Sequence[int], tensor: int) -> jax.Array:
    """The inverse of `_arranged`."""
    stops = [stop // tensor for stop in itertools.accumulate(sizes)]
    parts = jnp.split(x.reshape(*x.shape[:-1], tensor, -1), stops[:-1], axis=-1)
    return jnp.concatenate([part.reshape(*x.shape[:-1], -1) for part in parts], axis=-1)
