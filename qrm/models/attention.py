"""Attention of packed rows: one interface, several implementations with the same numbers.

Axes: R rows, L tokens a row, H query heads, G key and value heads, M = H / G query heads that
share one, E features a head, B tokens a tile, n = L / B tiles a row, T tiles, C of them a group.

`plan` looks at the layout of a micro-batch once; every block then calls `attend` with it. A token
attends to tokens of its own segment that belong to the prompt or to its own response, and of these
to those whose position in the dialogue is at most its own, or within a window of it.

    'dense'   scores all pairs of a row and masks them; the reference, and the only one with dropout
    'tiled'   a loop over the tiles of the mask that are not empty (block-sparse FlashAttention-2,
              Dao 2023), which neither computes nor stores what neighbours in a row would cost
    'pallas'  the same as one kernel for NVIDIA GPUs, see `flash`; not for TPUs
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qrm.models import flash, platforms

IMPLEMENTATIONS = ('auto', 'dense', 'tiled', 'pallas')

_TILE = 64
# Tiles that the loop takes at once, if there may be as many. XLA on CPU has a core for each matrix
# product of them, but all cores for what is between: 4 or 8 take three quarters of the time of one,
# 16 as much as one.
_GROUP = 4
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Plan(NamedTuple):
    """What attention needs to know of a micro-batch.

    Attributes:
      mask: [R, L, L] bool, query by key; L is rounded up to whole tiles for the others. For the
        dense implementation also float32, added to the logits.
      tiles: [T / C, C, 3] int32, row, query tile and key tile of the tiles with any pair, ordered;
        for the tiled implementation.
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
        return None if self.count is None else _groups(self) * self.tiles.shape[1] * _TILE**2


class Cache(NamedTuple):
    """Keys and values, as a block has computed them, of R prompts and N responses to each.

    Attributes:
      prompts: twice [R, G, P, E], of up to P tokens of each prompt, which is there once for all of
        its responses.
      responses: twice [R * N * G, S, E], of up to S tokens of each response. With axes apart XLA
        on CPU (jax 0.10.2) would copy them in every step of a loop, to reshape them.
    """

    prompts: tuple[jax.Array, jax.Array]
    responses: tuple[jax.Array, jax.Array]


class Sight(NamedTuple):
    """What the next token of each response attends to, with itself; and where it will stand.

    Attributes:
      prompts: [R, N, P] bool, which tokens of its prompt.
      responses: [R, N, S] bool, which of its own response.
      position: [] int32, its own in its response.
    """

    prompts: jax.Array
    responses: jax.Array
    position: jax.Array


def plan(
    segments: jax.Array,
    responses: jax.Array,
    positions: jax.Array,
    implementation: str,
    *,
    window: int = 0,
    causal: bool = True,
    dropout: bool = False,
) -> Plan:
    """Prepares attention over packed rows.

    Args:
      segments, responses, positions: [R, L], see `packing.MicroBatch`.
      implementation: one of `IMPLEMENTATIONS`; 'auto' is 'tiled' on CPU and 'dense' elsewhere, as
        nothing else has been measured there yet.
      window, causal: see `attention_mask`.
      dropout: whether attention weights will be dropped, for which 'auto' is 'dense'.

    Raises:
      ValueError: 'pallas' on a TPU.
    """
    mask = attention_mask(segments, responses, positions, window=window, causal=causal)
    if implementation == 'auto':
        tiled = platforms.current() == 'cpu' and not dropout
        implementation = 'tiled' if tiled else 'dense'
    if implementation == 'dense':
        return Plan(mask)
    if implementation == 'pallas' and platforms.current() == 'tpu':
        raise ValueError("attention 'pallas' is for NVIDIA GPUs; on a TPU use 'dense'")
    rows, length = segments.shape
    padding = -length % _TILE
    mask = jnp.pad(mask, ((0, 0), (0, padding), (0, padding)))
    n = mask.shape[1] // _TILE
    segments, responses, positions = (
        jnp.pad(x, ((0, 0), (0, padding))) for x in (segments, responses, positions))
    real = (segments > 0)[:, :, None]
    used = jnp.any((mask & real).reshape(rows, n, _TILE, n, _TILE), axis=(2, 4))
    if implementation == 'pallas':
        reach = _reach(positions, window, causal)
        return Plan(mask, listed=flash.tiles(segments, responses, positions, reach, used))
    at_most = rows * (n * (n + 1) // 2 if causal else n * n)
    # XLA on CPU (jax 0.10.2) compiles the gradient of more than one tile out of one wrongly.
    size = min(_GROUP, at_most)
    tiles = jnp.stack(jnp.nonzero(used, size=at_most + -at_most % size, fill_value=0), axis=1)
    return Plan(mask, tiles.astype(jnp.int32).reshape(-1, size, 3),
                jnp.sum(used, dtype=jnp.int32))


def attention_mask(
    segments: jax.Array,
    responses: jax.Array,
    positions: jax.Array,
    *,
    window: int = 0,
    causal: bool = True,
) -> jax.Array:
    """Which tokens a token attends to: of its segment, prompt or own response, within reach.

    Padding (segment 0) attends to padding, so that no row of the mask is empty.

    Args:
      segments, responses, positions: [R, L], see `packing.MicroBatch`.
      window: positions less than this apart are within reach; 0: all. Positions are those of
        the dialogue, so it reaches as far into a shared prompt as it would without neighbours.
      causal: whether later positions are out of reach.

    Returns:
      [R, L, L] bool, query by key.
    """
    first, last = (x[:, :, None] for x in _reach(positions, window, causal))
    same_segment = segments[:, :, None] == segments[:, None, :]
    visible = (responses[:, None, :] == 0) | (responses[:, :, None] == responses[:, None, :])
    keys = positions[:, None, :]
    return same_segment & visible & (first <= keys) & (keys <= last)


def sight(
    prompt_sizes: jax.Array, position: jax.Array, caches: tuple[int, int, int], window: int
) -> Sight:
    """What responses attend to that are all equally long.

    Args:
      prompt_sizes: [R], tokens of each prompt.
      position: [] of the next token in its response, from 0.
      caches: N, P and S, see `Cache`.
      window: see `attention_mask`.
    """
    count, prompt, response = caches
    own = jnp.arange(response) <= position
    of_prompt = jnp.arange(prompt) < prompt_sizes[:, None]
    if window:
        own &= jnp.arange(response) > position - window
        of_prompt &= jnp.arange(prompt) > (prompt_sizes + position)[:, None] - window
    rows = len(prompt_sizes)
    return Sight(jnp.broadcast_to(of_prompt[:, None], (rows, count, prompt)),
                 jnp.broadcast_to(own, (rows, count, response)), position)


def _reach(
    positions: jax.Array, window: int, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """First and last position that each token may attend to, [R, L] each."""
    first = positions - (window - 1) if window else jnp.zeros_like(positions)
    if causal:
        return first, positions
    if window:
        return first, positions + (window - 1)
    return first, jnp.full_like(positions, jnp.iinfo(positions.dtype).max)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    reads: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float = 0.0,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T * scale) v over the pairs of the plan; softmax in float32.

    Args:
      q: [R, L, H, E].
      k, v: [R, L, G, E] of the same dtype; G divides H, and query head h reads key and value head
        h // M (grouped-query attention, Ainslie et al. 2023), which is not repeated in memory.
      plan: from `plan`.
      reads: [...] int32, indices into R * L of the queries that are needed; None for all.
      scale: None: 1 / sqrt(E).
      cap: logits x become cap * tanh(x / cap) (Gemma 2, section 2); 0: they do not.
      dropout: rate on the attention weights; only the dense implementation has it.
      dropout_key: with a key, dropout is applied.

    Returns:
      [..., H, E] at `reads`, or [R, L, H, E]; at padding it is finite and without meaning.

    Raises:
      ValueError: dropout in an implementation that has none.
    """
    q = q * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if reads is not None:
        return _at_reads(q, k, v, plan.mask, reads, cap, dropout, dropout_key)
    if plan.tiles is None and plan.listed is None:
        return _dense(q, k, v, plan.mask, cap, dropout, dropout_key)
    if dropout and dropout_key is not None:
        raise ValueError("attention dropout needs the implementation 'dense'")
    length = q.shape[1]
    padding = ((0, 0), (0, -length % _TILE), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    if plan.listed is None:
        tiles = (_to_tiles(x, k.shape[2]) for x in (q, k, v))
        out = _from_tiles(_tiled(*tiles, plan, cap), q.shape)
    else:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out = flash.attend(q, k, v, plan.listed, cap).swapaxes(1, 2)
    return out[:, :length]


def attend_next(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sight: Sight,
    cache: Cache,
    *,
    scale: float | None = None,
    cap: float = 0.0,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """As `attend`, of one more token of each response.

    Args:
      q: [R, N, H, E].
      k, v: [R, N, G, E].
      sight: what it attends to.
      cache: of all that comes before it.
      scale, cap: see `attend`.

    Returns:
      [R, N, H, E], and the `Cache.responses` with its keys and values.
    """
    rows, count, groups, size = k.shape
    # First written, then read, so that a loop can write them where they stand.
    own = tuple(jax.lax.dynamic_update_index_in_dim(
        old, new.reshape(-1, size), sight.position, 1)
        for old, new in zip(cache.responses, (k, v), strict=True))
    queries = (q * (1.0 / math.sqrt(size) if scale is None else scale)).reshape(
        rows, count, groups, -1, size)
    alone = queries.reshape(-1, *queries.shape[-2:])
    logits = jnp.concatenate([
        _einsum('rngme,rgke->rngmk', queries, cache.prompts[0]),
        _einsum('xme,xke->xmk', alone, own[0]).reshape(*queries.shape[:-1], -1)], axis=-1)
    mask = jnp.concatenate([sight.prompts, sight.responses], axis=-1)[:, :, None, None]
    weights = jax.nn.softmax(jnp.where(mask, flash.capped(logits, cap), _LOWEST), axis=-1)
    of_prompt, of_own = jnp.split(weights.astype(q.dtype), (sight.prompts.shape[-1],), axis=-1)
    mixed = _einsum('rngmk,rgke->rngme', of_prompt, cache.prompts[1]).reshape(q.shape)
    mixed += _einsum('xmk,xke->xme', of_own.reshape(*alone.shape[:2], -1), own[1]).reshape(q.shape)
    return mixed.astype(q.dtype), own


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Of matrix products: accelerators round float32 factors to TF32 or bfloat16 by default."""
    full = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=precision(x.dtype),
                      preferred_element_type=jnp.float32)


def _dense(q, k, v, mask, cap, dropout, key):
    queries = _beside(q, k.shape[2])
    logits = flash.capped(_einsum('rqhe,rkhe->rhqk', queries, k), cap)
    weights = _weights(logits, mask[:, None], dropout, key)
    out = _einsum('rhqk,rkhe->rqhe', weights.astype(q.dtype), v).astype(q.dtype)
    return _apart(out, q.shape)


def _at_reads(q, k, v, mask, reads, cap, dropout, key):
    """Few queries, against the keys of all rows."""
    rows, length, *head = q.shape
    k, v = (x.reshape(rows * length, *x.shape[2:]) for x in (k, v))
    own = reads.reshape(-1, 1) // length == jnp.arange(rows)
    visible = mask[:, :length, :length].reshape(rows * length, length)[reads.reshape(-1)]
    visible = (own[:, :, None] & visible[:, None, :]).reshape(-1, rows * length)
    read = q.reshape(rows * length, *head)[reads.reshape(-1)]
    logits = flash.capped(_einsum('qhe,khe->hqk', _beside(read, k.shape[1]), k), cap)
    weights = _weights(logits, visible, dropout, key)
    out = _einsum('hqk,khe->qhe', weights.astype(q.dtype), v).astype(q.dtype)
    return _apart(out, read.shape).reshape(*reads.shape, *head)


def _beside(q: jax.Array, groups: int) -> jax.Array:
    """Queries [..., L, H, E] with the heads of a group beside each other: [..., L * M, G, E]."""
    *rest, length, heads, size = q.shape
    grouped = q.reshape(*rest, length, groups, heads // groups, size)
    return grouped.swapaxes(-3, -2).reshape(*rest, -1, groups, size)


def _apart(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_beside`."""
    *rest, _, groups, size = x.shape
    grouped = x.reshape(*rest, shape[-3], -1, groups, size)
    return grouped.swapaxes(-3, -2).reshape(shape)


def _weights(logits, mask, dropout, key):
    """Of logits [..., L * M, K], see `_beside`, and a mask [..., L, K]."""
    mask = jnp.repeat(mask, logits.shape[-2] // mask.shape[-2], axis=-2)
    logits = jnp.where(mask, logits, _LOWEST) if mask.dtype == bool else logits + mask
    weights = jax.nn.softmax(logits, axis=-1)
    if dropout and key is not None:
        kept = jax.random.bernoulli(key, 1.0 - dropout, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout), 0.0)
    return weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(q, k, v, plan, cap):
    """[R * n, G, M * B, E] and twice [R * n, G, B, E] -> [R * n, G, M * B, E]."""
    return _tiled_forward(q, k, v, plan, cap)[0]


def _tiled_forward(q, k, v, plan, cap):
    """Online softmax: running maximum, sum and weighted values of each query (Dao 2023, alg. 1)."""

    def step(t, carry):
        maximum, total, mixed = carry
        i, j, mask = _group(plan, t)
        visible = jnp.tile(mask, (1, q.shape[2] // _TILE, 1))[:, None]
        logits = flash.capped(_einsum('cgqe,cgke->cgqk', q[i], k[j]), cap)
        logits = jnp.where(visible, logits, _LOWEST)
        highest = maximum.at[i].max(jnp.max(logits, axis=-1))
        # A query that has seen no key yet is at the lowest value; its weights are forgotten when
        # the first key comes, and there is one, its own, for every query that is not padding.
        weights = jnp.exp(logits - highest[i][..., None])
        faded = jnp.exp(maximum - highest)
        values = _einsum('cgqk,cgke->cgqe', weights.astype(v.dtype), v[j])
        return (highest, (total * faded).at[i].add(jnp.sum(weights, axis=-1)),
                (mixed * faded[..., None]).at[i].add(values))

    lowest = jnp.full(q.shape[:-1], _LOWEST)
    start = lowest, jnp.zeros_like(lowest), jnp.zeros(q.shape, jnp.float32)
    maximum, total, mixed = jax.lax.fori_loop(0, _groups(plan), step, start)
    total = jnp.where(total > 0, total, 1.0)  # padding
    out = (mixed / total[..., None]).astype(q.dtype)
    return out, (q, k, v, plan, out, maximum + jnp.log(total))


def _tiled_backward(cap, saved, gradient):
    """Recomputes the weights of each tile from the saved log-sum-exp (Dao 2023, alg. 2)."""
    q, k, v, plan, out, log_total = saved
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def step(t, carry):
        dq, dk, dv = carry
        i, j, mask = _group(plan, t)
        queries, keys, values, outgoing = q[i], k[j], v[j], gradient[i]
        # Keys by queries: transposed products are slow on CPU, and this way there is only one.
        logits = flash.capped(_einsum('cgke,cgqe->cgkq', keys, queries), cap)
        visible = jnp.tile(mask.swapaxes(1, 2), q.shape[2] // _TILE)[:, None]
        weights = jnp.where(visible, jnp.exp(logits - log_total[i][:, :, None]), 0.0)
        change = _einsum('cgke,cgqe->cgkq', values, outgoing) - inner[i][:, :, None]
        change = flash.uncapped(weights * change, logits, cap).astype(q.dtype)
        return (
            dq.at[i].add(_einsum('cgkq,cgke->cgqe', change, keys)),
            dk.at[j].add(_einsum('cgkq,cgqe->cgke', change, queries)),
            dv.at[j].add(_einsum('cgkq,cgqe->cgke', weights.astype(q.dtype), outgoing)),
        )

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, _groups(plan), step, zeros)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _groups(plan: Plan) -> jax.Array:
    """How many groups are used."""
    return -(-plan.count // plan.tiles.shape[1])


def _group(plan: Plan, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group t of the tiles: [C] int32, row * n + query or key tile; and [C, B, B] bool, the mask.

    Nothing is visible in tiles that only fill the last group.
    """
    rows, length, _ = plan.mask.shape
    n, size = length // _TILE, plan.tiles.shape[1]
    row, i, j = plan.tiles[t].T
    mask = plan.mask.reshape(rows, n, _TILE, n, _TILE)[row, i, :, j]
    real = t * size + jnp.arange(size) < plan.count
    return row * n + i, row * n + j, mask & real[:, None, None]


def _to_tiles(x: jax.Array, groups: int) -> jax.Array:
    """[R, L, G * M, E] -> [R * n, G, M * B, E]: the heads of a group beside each other."""
    rows, length, heads, size = x.shape
    x = x.reshape(rows, length // _TILE, _TILE, groups, heads // groups, size)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(-1, groups, heads // groups * _TILE, size)


def _from_tiles(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_to_tiles`."""
    rows, length, heads, size = shape
    groups = x.shape[1]
    x = x.reshape(rows, length // _TILE, groups, heads // groups, _TILE, size)
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(shape)
