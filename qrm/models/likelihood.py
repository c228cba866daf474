"""Log-probabilities of tokens from hidden states, of a few of them at a time.

Logits of a whole micro-batch are the largest array of a language model: 49,152 for each token.
Here those of a chunk of tokens are there at once, in the backward pass once more. What a place's
log-probability is worth to its hidden state is found where its logits are, in the forward pass, so
that a table that is not trained costs no second look.

Axes: P places, S of a chunk, V vocabulary, D features.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

_CHUNK = 256  # places whose logits are there at once

ReadOut = Callable[[jax.Array, jax.Array], jax.Array]


class Likelihood(NamedTuple):
    """What a model says of one token at each place, in nats; [P] float32.

    Attributes:
      log_probs: of the token.
      entropy: of all tokens there; 0 unless it was asked for.
    """

    log_probs: jax.Array
    entropy: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def likelihood(
    read_out: ReadOut,
    entropy: bool,
    table: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    count: jax.Array,
) -> Likelihood:
    """Log-probabilities of tokens.

    Args:
      read_out: (table, hidden states [S, D]) -> logits [S, V] float32, see `Transformer.read_out`.
      entropy: whether it is asked for.
      table: [V, D], the output embedding.
      hidden: [P, D] float32, from which each token is predicted.
      targets: [P] int32, the tokens.
      count: [] int32, how many of the places, the first ones, are asked for. Others take no time,
        give 0, and no gradient comes from them.
    """
    return _forward(read_out, entropy, table, hidden, targets, count, keep=False)[0]


class _Kept(NamedTuple):
    """What the backward pass reads.

    Attributes:
      of_log_probs, of_entropy: [P, D], gradients of these with respect to the hidden states.
      trained: table, hidden states, targets and log-normalisers and entropies [P] to compute logits
        once more; None if the table is not trained.
    """

    of_log_probs: jax.Array
    of_entropy: jax.Array | None
    trained: tuple[jax.Array, ...] | None
    count: jax.Array


def _forward(read_out, entropy, table, hidden, targets, count, *, keep):
    """Likelihood; log-normalisers [P]; gradients [P, D] of both, if they are to be kept."""
    places, size = len(hidden), min(_CHUNK, len(hidden))
    hidden, targets = _padded(_asked(hidden, count), size), _padded(targets, size)
    row = jnp.zeros(len(hidden), jnp.float32)
    wide = jnp.zeros(hidden.shape, jnp.float32)
    widths = keep * (1 + entropy)

    def add(i, found):
        own, token = (_chunk(x, i, size) for x in (hidden, targets))
        logits, pull = jax.vjp(functools.partial(read_out, table), own)
        norm = jax.nn.logsumexp(logits, axis=-1)
        hits = _hits(logits, token)
        log_p = logits - norm[:, None]
        parts = [jnp.sum(jnp.where(hits, log_p, 0.0), axis=-1), norm]
        slopes = [hits - jnp.exp(log_p)]
        if entropy:
            parts.append(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1))
            slopes.append(-jnp.exp(log_p) * (log_p + parts[-1][:, None]))
        parts += [pull(slope)[0] for slope in slopes[:widths]]
        # Of the last chunk some places may not be asked for.
        parts = [_asked(part, count - i * size) for part in parts]
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, part, i * size, axis=0)
                     for x, part in zip(found, parts, strict=True))

    begin = (row,) * (2 + entropy) + (wide,) * widths
    found = jax.lax.fori_loop(0, -(-count // size), add, begin)
    log_probs, norm, *rest = (x[:places] for x in found)
    entropies = rest.pop(0) if entropy else jnp.zeros_like(log_probs)
    return Likelihood(log_probs, entropies), norm, rest


def _likelihood_forward(read_out, entropy, table, hidden, targets, count):
    table, trained, count = table.value, table.perturbed, count.value
    hidden, targets = _asked(hidden.value, count), targets.value
    found, norm, slopes = _forward(read_out, entropy, table, hidden, targets, count, keep=True)
    again = (table, hidden, targets, norm, found.entropy) if trained else None
    return found, _Kept(slopes[0], slopes[1] if entropy else None, again, count)


def _likelihood_backward(read_out, entropy, kept, gradient):
    of_log_probs, of_entropy = (
        jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else _asked(x, kept.count)
        for x in gradient)
    of_hidden = of_log_probs[:, None] * kept.of_log_probs
    if entropy:
        of_hidden += of_entropy[:, None] * kept.of_entropy
    of_table = None
    if kept.trained is not None:
        table, *rows = kept.trained
        size = min(_CHUNK, len(rows[0]))
        rows = [_padded(x, size) for x in (*rows, of_log_probs, of_entropy)]

        def add(i, total):
            own, token, norm, spread, slope, of_spread = (_chunk(x, i, size) for x in rows)
            logits, pull = jax.vjp(lambda table: read_out(table, own), table)
            log_p = logits - norm[:, None]
            slopes = slope[:, None] * (_hits(logits, token) - jnp.exp(log_p))
            if entropy:
                slopes -= of_spread[:, None] * jnp.exp(log_p) * (log_p + spread[:, None])
            return total + pull(slopes)[0].astype(jnp.float32)

        # In float32, as a bfloat16 that hundreds of chunks are added to keeps little of each.
        total = jnp.zeros(table.shape, jnp.float32)
        of_table = jax.lax.fori_loop(0, -(-kept.count // size), add, total).astype(table.dtype)
    return of_table, of_hidden, None, None


likelihood.defvjp(_likelihood_forward, _likelihood_backward, symbolic_zeros=True)


def _asked(x: jax.Array, count: jax.Array) -> jax.Array:
    """The first `count` places, 0 in place of the others, whatever these hold."""
    inside = jnp.arange(len(x)) < count
    return jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _hits(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """[S, V] bool, where the tokens are."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == tokens[:, None]


def _padded(x: jax.Array, size: int) -> jax.Array:
    """With as many more places as make whole chunks."""
    return jnp.concatenate([x, jnp.zeros((-len(x) % size, *x.shape[1:]), x.dtype)])


def _chunk(x: jax.Array, i: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=0)
