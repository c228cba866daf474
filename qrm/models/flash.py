"""Attention of packed rows in one GPU kernel: FlashAttention-2 (Dao 2023) over chosen tiles.

Axes: R rows, H query heads, G key and value heads, M = H / G, L tokens a row, E features a head,
B tokens a tile, n = L / B tiles a row.

Library kernels take segments, but not prompts that several responses share, and a mask only as an
array of [L, L]. Here a program has one tile of queries (or of keys, for the gradients of keys and
values), visits only the tiles that it has any pair with, and makes the mask of a tile from the
segments, responses and positions of its tokens. Sums are float32.

The kernels are Pallas on Triton, for NVIDIA GPUs; on CPU they are interpreted, slowly, which is for
tests. They have been lowered for GPUs, but not yet run or timed on one. JAX 0.11 still lowers them,
and warns that it will drop Triton from Pallas.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_LOWEST = float(jnp.finfo(jnp.float32).min)
_LEAST_FEATURES = 16  # of a Triton product; sizes are powers of two


class Tiles(NamedTuple):
    """Which tiles have any pair, by query tile and by key tile, and what their masks are made of.

    Attributes:
      segments, responses, positions: [R, L] int32, L a multiple of the tile.
      first, last: [R, L] int32, the positions that a query may attend to.
      keys, key_counts: [R, n, n] and [R, n] int32, the key tiles of a query tile and how many.
      queries, query_counts: the same with queries and keys exchanged.
    """

    segments: jax.Array
    responses: jax.Array
    positions: jax.Array
    first: jax.Array
    last: jax.Array
    keys: jax.Array
    key_counts: jax.Array
    queries: jax.Array
    query_counts: jax.Array


def capped(logits: jax.Array, cap: float) -> jax.Array:
    """Logits x as cap * tanh(x / cap); as they are if the cap is 0."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def uncapped(gradient: jax.Array, logits: jax.Array, cap: float) -> jax.Array:
    """Gradient of logits before the cap, from that of the capped ones and their values."""
    return gradient * (1.0 - (logits / cap) ** 2) if cap else gradient


def tiles(
    segments: jax.Array,
    responses: jax.Array,
    positions: jax.Array,
    reach: tuple[jax.Array, jax.Array],
    used: jax.Array,
) -> Tiles:
    """Lists the tiles to visit.

    Args:
      segments, responses, positions: [R, L] int32, see `packing.MicroBatch`; L is a multiple of
        the tile.
      reach: `first` and `last` of `Tiles`.
      used: [R, n, n] bool, query tile by key tile.
    """
    return Tiles(segments, responses, positions, *reach, *_list(used),
                 *_list(used.swapaxes(1, 2)))


def _list(used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Along the last axis, indices of what is used, in order and first, and their number."""
    order = jnp.argsort(~used, axis=-1, stable=True)
    return order.astype(jnp.int32), jnp.sum(used, axis=-1, dtype=jnp.int32)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles, cap: float = 0.0
) -> jax.Array:
    """softmax(q k^T) v over the pairs that are allowed in the listed tiles.

    Args:
      q: [R, H, L, E], scaled.
      k, v: [R, G, L, E] of the same dtype; G divides H.
      tiles: from `tiles`.
      cap: of the logits, see `attention.attend`; 0: none.

    Returns:
      [R, H, L, E]; finite at padding.
    """
    features = max(_LEAST_FEATURES, pl.next_power_of_2(q.shape[-1]))
    padding = ((0, 0), (0, 0), (0, 0), (0, features - q.shape[-1]))
    out = _attend(*(jnp.pad(x, padding) for x in (q, k, v)), tiles, cap)
    return out[..., :q.shape[-1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, tiles, cap):
    return _forward(q, k, v, tiles, cap)[0]


def _forward(q, k, v, tiles, cap):
    out, log_total = _call(
        functools.partial(_forward_kernel, cap=cap), by_tile=(q,), by_row=(k, v),
        shared=_by_query(tiles), out=(q, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)))
    return out, (q, k, v, tiles, out, log_total)


def _backward(cap, saved, gradient):
    q, k, v, tiles, out, log_total = saved
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dq, = _call(functools.partial(_query_kernel, cap=cap), by_tile=(q, gradient, log_total, inner),
                by_row=(k, v), shared=_by_query(tiles), out=(q,))
    dk, dv = _call(functools.partial(_key_kernel, cap=cap), by_tile=(k, v),
                   by_row=(q, gradient, log_total, inner), shared=_by_key(tiles), out=(k, v))
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _by_query(tiles):
    return *tiles[:5], tiles.keys, tiles.key_counts


def _by_key(tiles):
    return *tiles[:5], tiles.queries, tiles.query_counts


def _call(kernel, *, by_tile, by_row, shared, out):
    """Runs a kernel for each tile of each head of each row.

    Args:
      kernel: gets references to its tile of `by_tile`, to its row of `by_row` and of `shared`, and
        to its tile of the results.
      by_tile, by_row: arrays [R, heads, L, ...]. Those of `by_tile` are as many as the results
        have. Of more heads in `by_row` a program gets all of its group, [M, L, ...]; of fewer, or
        as many, the one of its group, [L, ...].
      shared: what all heads share, [R, ...]; the last is [R, n].
      out: what has the shapes and dtypes of the results [R, H, L, ...].
    """
    rows, heads, length = by_tile[0].shape[:3]
    count = shared[-1].shape[1]

    def tile(x):
        rest = x.shape[3:]
        return pl.BlockSpec((None, None, length // count, *rest),
                            lambda i, h, r: (r, h, i, *[0] * len(rest)))

    def row(x):
        rest = [0] * (x.ndim - 2)
        if x.shape[1] > heads:
            group = x.shape[1] // heads
            return pl.BlockSpec((None, group, *x.shape[2:]), lambda i, h, r: (r, h, *rest))
        group = heads // x.shape[1]
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, h, r: (r, h // group, *rest))

    def shared_row(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, h, r: (r, *[0] * (x.ndim - 1)))

    call = functools.partial(
        pl.pallas_call, kernel, grid=(count, heads, rows),
        in_specs=[*map(tile, by_tile), *map(row, by_row), *map(shared_row, shared)],
        out_specs=[*map(tile, out)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out])
    # By the platform that is compiled for, which need not be the one that this runs on.
    return jax.lax.platform_dependent(
        *by_tile, *by_row, *shared, cpu=call(interpret=True),
        cuda=call(compiler_params=triton.CompilerParams(num_warps=4, num_stages=2)))


def _forward_kernel(
    q_ref, k_ref, v_ref, segments_ref, responses_ref, positions_ref, first_ref, last_ref, keys_ref,
    counts_ref, out_ref, log_total_ref, *, cap
):
    """Online softmax of a tile of queries (Dao 2023, algorithm 1)."""
    i, q = pl.program_id(0), q_ref[...]
    size, ids = len(q), (segments_ref, responses_ref, positions_ref, first_ref, last_ref)
    queries = _ids(ids, i, size)

    def step(t, carry):
        maximum, total, mixed = carry
        j = keys_ref[i, t]
        mask = _allowed(queries, _ids(ids, j, size))
        logits = capped(_dot(q, k_ref[pl.ds(j * size, size)], 1), cap)
        logits = jnp.where(mask, logits, _LOWEST)
        highest = jnp.maximum(maximum, jnp.max(logits, axis=1))
        # A query that has seen no key yet is at the lowest value; its weights are forgotten when
        # the first key comes, and there is one, its own, for every query that is not padding.
        weights = jnp.exp(logits - highest[:, None])
        faded = jnp.exp(maximum - highest)
        v = v_ref[pl.ds(j * size, size)]
        mixed = mixed * faded[:, None] + _dot(weights.astype(v.dtype), v, 0)
        return highest, total * faded + jnp.sum(weights, axis=1), mixed

    start = jnp.full(size, _LOWEST), jnp.zeros(size), jnp.zeros(q.shape, jnp.float32)
    maximum, total, mixed = jax.lax.fori_loop(0, counts_ref[i], step, start)
    total = jnp.where(total > 0, total, 1.0)  # padding
    out_ref[...] = (mixed / total[:, None]).astype(out_ref.dtype)
    log_total_ref[...] = maximum + jnp.log(total)


def _query_kernel(
    q_ref, gradient_ref, log_total_ref, inner_ref, k_ref, v_ref, segments_ref, responses_ref,
    positions_ref, first_ref, last_ref, keys_ref, counts_ref, dq_ref, *, cap
):
    """Gradient of a tile of queries (Dao 2023, algorithm 2)."""
    i, q, gradient = pl.program_id(0), q_ref[...], gradient_ref[...]
    size, ids = len(q), (segments_ref, responses_ref, positions_ref, first_ref, last_ref)
    log_total, inner = log_total_ref[...][:, None], inner_ref[...][:, None]
    queries = _ids(ids, i, size)

    def step(t, dq):
        j = keys_ref[i, t]
        k, v = k_ref[pl.ds(j * size, size)], v_ref[pl.ds(j * size, size)]
        mask = _allowed(queries, _ids(ids, j, size))
        logits = capped(_dot(q, k, 1), cap)
        weights = jnp.where(mask, jnp.exp(logits - log_total), 0.0)
        change = uncapped(weights * (_dot(gradient, v, 1) - inner), logits, cap)
        return dq + _dot(change.astype(k.dtype), k, 0)

    dq = jax.lax.fori_loop(0, counts_ref[i], step, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _key_kernel(
    k_ref, v_ref, q_ref, gradient_ref, log_total_ref, inner_ref, segments_ref, responses_ref,
    positions_ref, first_ref, last_ref, queries_ref, counts_ref, dk_ref, dv_ref, *, cap
):
    """Gradients of a tile of keys and values (Dao 2023, algorithm 2); matrices by [key, query]."""
    j, k, v = pl.program_id(0), k_ref[...], v_ref[...]
    size, ids = len(k), (segments_ref, responses_ref, positions_ref, first_ref, last_ref)
    keys = _ids(ids, j, size)

    def step(t, carry):
        dk, dv = carry
        i = queries_ref[j, t]
        at = pl.ds(i * size, size)
        mask = _allowed(_ids(ids, i, size), keys, transposed=True)
        # One query head of the group after another; without groups the references have no axis.
        grouped = len(q_ref.shape) > 2
        for place in ([(m, at) for m in range(q_ref.shape[0])] if grouped else [at]):
            q, gradient = q_ref[place], gradient_ref[place]
            logits = capped(_dot(k, q, 1), cap)
            weights = jnp.where(mask, jnp.exp(logits - log_total_ref[place][None, :]), 0.0)
            change = uncapped(weights * (_dot(v, gradient, 1) - inner_ref[place][None, :]),
                               logits, cap)
            dk += _dot(change.astype(q.dtype), q, 0)
            dv += _dot(weights.astype(q.dtype), gradient, 0)
        return dk, dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, counts_ref[j], step, (zeros, zeros))
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _ids(refs, i, size):
    """Segment, response, position, first and last position, [B] each, of the tokens of a tile."""
    return [ref[pl.ds(i * size, size)] for ref in refs]


def _allowed(queries, keys, *, transposed=False):
    """`attention.attention_mask` of a tile, [B, B]: queries by keys, or transposed."""
    segment, response, _, first, last = (x[None, :] if transposed else x[:, None] for x in queries)
    key_segment, key_response, key_position, *_ = (
        x[:, None] if transposed else x[None, :] for x in keys)
    visible = (key_response == 0) | (key_response == response)
    within = (first <= key_position) & (key_position <= last)
    return within & (segment == key_segment) & visible


def _dot(x, y, axis):
    """x [m, c] times y, of which `axis` is contracted; float32 factors are not rounded to TF32."""
    full = x.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)
