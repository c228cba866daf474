"""Attention of packed rows: one interface, several implementations with the same numbers.

Axes: R rows, L tokens a row, H heads, E features a head, B tokens a tile, T tiles.

`plan` looks at the layout of a micro-batch once; every block then calls `attend` with it. A token
attends to earlier tokens of its own segment that belong to the prompt or to its own response.

    'dense'   scores all pairs of a row and masks them; the reference, and the only one with dropout
    'tiled'   a loop over the tiles of the mask that are not empty (block-sparse FlashAttention-2,
              Dao 2023), which neither computes nor stores what neighbours in a row would cost
    'pallas'  the same as one kernel for NVIDIA GPUs, see `flash`; not for TPUs
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qrm.models import flash

IMPLEMENTATIONS = ('auto', 'dense', 'tiled', 'pallas')

_TILE = 64
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Plan(NamedTuple):
    """What attention needs to know of a micro-batch.

    Attributes:
      mask: [R, L, L] bool, query by key; L is rounded up to whole tiles for the others.
      tiles: [T, 3] int32, row, query tile and key tile of the tiles with any pair, ordered; for
        the tiled implementation.
      count: [] int32, how many of them are used.
      listed: the same tiles as the kernel reads them; for 'pallas'.
    """

    mask: jax.Array
    tiles: jax.Array | None = None
    count: jax.Array | None = None
    listed: flash.Tiles | None = None

    @property
    def pairs(self) -> jax.Array | None:
        """[] int32, (query, key) pairs that the tiled loop computes for each head; else None."""
        return None if self.count is None else self.count * _TILE**2


def plan(
    segments: jax.Array, responses: jax.Array, implementation: str, *, dropout: bool = False
) -> Plan:
    """Prepares attention over packed rows.

    Args:
      segments, responses: [R, L], see `packing.MicroBatch`.
      implementation: one of `IMPLEMENTATIONS`; 'auto' is 'tiled' on CPU and 'dense' elsewhere, as
        nothing else has been measured there yet.
      dropout: whether attention weights will be dropped, for which 'auto' is 'dense'.

    Raises:
      ValueError: 'pallas' on a TPU.
    """
    mask = attention_mask(segments, responses)
    if implementation == 'auto':
        tiled = jax.default_backend() == 'cpu' and not dropout
        implementation = 'tiled' if tiled else 'dense'
    if implementation == 'dense':
        return Plan(mask)
    if implementation == 'pallas' and jax.default_backend() == 'tpu':
        raise ValueError("attention 'pallas' is for NVIDIA GPUs; on a TPU use 'dense'")
    rows, length = segments.shape
    padding = -length % _TILE
    mask = jnp.pad(mask, ((0, 0), (0, padding), (0, padding)))
    n = mask.shape[1] // _TILE
    segments, responses = (jnp.pad(x, ((0, 0), (0, padding))) for x in (segments, responses))
    real = (segments > 0)[:, :, None]
    used = jnp.any((mask & real).reshape(rows, n, _TILE, n, _TILE), axis=(2, 4))
    if implementation == 'pallas':
        return Plan(mask, listed=flash.tiles(segments, responses, used))
    at_most = rows * n * (n + 1) // 2  # causal
    tiles = jnp.stack(jnp.nonzero(used, size=at_most, fill_value=0), axis=1)
    return Plan(mask, tiles.astype(jnp.int32), jnp.sum(used, dtype=jnp.int32))


def attention_mask(segments: jax.Array, responses: jax.Array) -> jax.Array:
    """Which tokens a token attends to: earlier ones of its segment, prompt or own response.

    Padding (segment 0) attends to padding, so that no row of the mask is empty.

    Args:
      segments, responses: [R, L], see `packing.MicroBatch`.

    Returns:
      [R, L, L] bool, query by key.
    """
    index = jnp.arange(segments.shape[-1])
    causal = index[:, None] >= index[None, :]
    same_segment = segments[:, :, None] == segments[:, None, :]
    visible = (responses[:, None, :] == 0) | (responses[:, :, None] == responses[:, None, :])
    return causal & same_segment & visible


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    reads: jax.Array | None = None,
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(E)) v over the pairs of the plan; softmax in float32.

    Args:
      q, k, v: [R, L, H, E] of one dtype.
      plan: from `plan`.
      reads: [...] int32, indices into R * L of the queries that are needed; None for all.
      dropout: rate on the attention weights; only the dense implementation has it.
      dropout_key: with a key, dropout is applied.

    Returns:
      [..., H, E] at `reads`, or [R, L, H, E]; at padding it is finite and without meaning.

    Raises:
      ValueError: dropout in an implementation that has none.
    """
    q = q * (1.0 / math.sqrt(q.shape[-1]))
    if reads is not None:
        return _at_reads(q, k, v, plan.mask, reads, dropout, dropout_key)
    if plan.tiles is None and plan.listed is None:
        return _dense(q, k, v, plan.mask, dropout, dropout_key)
    if dropout and dropout_key is not None:
        raise ValueError("attention dropout needs the implementation 'dense'")
    length = q.shape[1]
    padding = ((0, 0), (0, 0), (0, -length % _TILE), (0, 0))
    q, k, v = (jnp.pad(x.transpose(0, 2, 1, 3), padding) for x in (q, k, v))
    out = _tiled(q, k, v, plan) if plan.listed is None else flash.attend(q, k, v, plan.listed)
    return out.transpose(0, 2, 1, 3)[:, :length]


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Of matrix products: accelerators round float32 factors to TF32 or bfloat16 by default."""
    full = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=precision(x.dtype),
                      preferred_element_type=jnp.float32)


def _dense(q, k, v, mask, dropout, key):
    weights = _weights(_einsum('rqhe,rkhe->rhqk', q, k), mask[:, None], dropout, key)
    return _einsum('rhqk,rkhe->rqhe', weights.astype(q.dtype), v).astype(q.dtype)


def _at_reads(q, k, v, mask, reads, dropout, key):
    """Few queries, against the keys of all rows."""
    rows, length, *head = q.shape
    q, k, v = (x.reshape(rows * length, *head) for x in (q, k, v))
    own = reads.reshape(-1, 1) // length == jnp.arange(rows)
    visible = mask[:, :length, :length].reshape(rows * length, length)[reads.reshape(-1)]
    visible = (own[:, :, None] & visible[:, None, :]).reshape(-1, rows * length)
    weights = _weights(_einsum('qhe,khe->hqk', q[reads.reshape(-1)], k), visible, dropout, key)
    out = _einsum('hqk,khe->qhe', weights.astype(q.dtype), v).astype(q.dtype)
    return out.reshape(*reads.shape, *head)


def _weights(logits, mask, dropout, key):
    weights = jax.nn.softmax(jnp.where(mask, logits, _LOWEST), axis=-1)
    if dropout and key is not None:
        kept = jax.random.bernoulli(key, 1.0 - dropout, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout), 0.0)
    return weights


@jax.custom_vjp
def _tiled(q, k, v, plan):
    """[R, H, L, E] each -> [R, H, L, E]; L is a multiple of the tile."""
    return _tiled_forward(q, k, v, plan)[0]


def _tiled_forward(q, k, v, plan):
    """Online softmax: running maximum, sum and weighted values of each query (Dao 2023, alg. 1)."""
    lowest = jnp.full(q.shape[:3], _LOWEST)

    def step(t, carry):
        maximum, total, mixed = carry
        row, i, j = plan.tiles[t]
        before = _tile(maximum, row, i)
        logits = _einsum('hqe,hke->hqk', _tile(q, row, i), _tile(k, row, j))
        logits = jnp.where(_mask_tile(plan.mask, row, i, j), logits, _LOWEST)
        highest = jnp.maximum(before, jnp.max(logits, axis=-1))
        # A query that has seen no key yet is at the lowest value; its weights are forgotten when
        # the first key comes, and there is one, its own, for every query that is not padding.
        weights = jnp.exp(logits - highest[..., None])
        faded = jnp.exp(before - highest)
        values = _einsum('hqk,hke->hqe', weights.astype(v.dtype), _tile(v, row, j))
        return (
            _put(maximum, highest, row, i),
            _put(total, _tile(total, row, i) * faded + jnp.sum(weights, axis=-1), row, i),
            _put(mixed, _tile(mixed, row, i) * faded[..., None] + values, row, i),
        )

    start = lowest, jnp.zeros_like(lowest), jnp.zeros(q.shape, jnp.float32)
    maximum, total, mixed = jax.lax.fori_loop(0, plan.count, step, start)
    total = jnp.where(total > 0, total, 1.0)  # padding
    out = (mixed / total[..., None]).astype(q.dtype)
    return out, (q, k, v, plan, out, maximum + jnp.log(total))


def _tiled_backward(saved, gradient):
    """Recomputes the weights of each tile from the saved log-sum-exp (Dao 2023, alg. 2)."""
    q, k, v, plan, out, log_total = saved
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    mask = plan.mask.swapaxes(1, 2)

    def step(t, carry):
        dq, dk, dv = carry
        row, i, j = plan.tiles[t]
        queries, keys, values = _tile(q, row, i), _tile(k, row, j), _tile(v, row, j)
        outgoing = _tile(gradient, row, i)
        # Keys by queries: transposed products are slow on CPU, and this way there is only one.
        logits = _einsum('hke,hqe->hkq', keys, queries)
        weights = jnp.where(_mask_tile(mask, row, j, i),
                            jnp.exp(logits - _tile(log_total, row, i)[:, None]), 0.0)
        change = _einsum('hke,hqe->hkq', values, outgoing) - _tile(inner, row, i)[:, None]
        change = (weights * change).astype(q.dtype)
        return (
            _add(dq, _einsum('hkq,hke->hqe', change, keys), row, i),
            _add(dk, _einsum('hkq,hqe->hke', change, queries), row, j),
            _add(dv, _einsum('hkq,hqe->hke', weights.astype(q.dtype), outgoing), row, j),
        )

    zeros = jnp.zeros(q.shape, jnp.float32)
    gradients = jax.lax.fori_loop(0, plan.count, step, (zeros, zeros, zeros))
    return (*(x.astype(q.dtype) for x in gradients), None)


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _tile(x: jax.Array, row: jax.Array, i: jax.Array) -> jax.Array:
    """Tile i of a row: [R, H, L, ...] -> [H, B, ...]."""
    start = (row, 0, i * _TILE, 0)[:x.ndim]
    return jax.lax.dynamic_slice(x, start, (1, x.shape[1], _TILE, *x.shape[3:]))[0]


def _put(x: jax.Array, tile: jax.Array, row: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, tile[None], (row, 0, i * _TILE, 0)[:x.ndim])


def _add(x: jax.Array, tile: jax.Array, row: jax.Array, i: jax.Array) -> jax.Array:
    return _put(x, _tile(x, row, i) + tile, row, i)


def _mask_tile(mask: jax.Array, row: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(mask, (row, i * _TILE, j * _TILE), (1, _TILE, _TILE))
