"""Samples of a language model: N responses to each prompt, token by token, with cached keys.

Prompts are computed one by one, once each, and padded on the right to a power of two, which is all
that what is compiled depends on. The keys and values of a prompt are there once for all of its
responses, which grow side by side, in step. Random numbers follow from the seed, the number of the
prompt, the number of the sample and the position alone, so a response does not depend on its
company, but for the rounding of matrix products of other sizes: that decides only between two
tokens that are drawn all but equally well.

Axes: R prompts, N responses to each, P tokens of a padded prompt, S tokens of a response, V
vocabulary, D features, G key and value heads, E features a head.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data.comparisons import DataError
from qrm.models.attention import Cache
from qrm.models.transformer import Transformer
from qrm.models.tuning import unstack_blocks
from qrm.training.interruptions import NonFiniteLoss

ROWS = 16  # responses that grow at once

_COLDEST = 1e-6
_SHORTEST = 16  # tokens of a padded prompt
_BITS = 30  # of floats in [0, 1], but for the sign


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    The logits are divided by the temperature, then all tokens but the `top_k` most probable get
    probability 0, then of these all but the fewest whose probabilities sum to at least `top_p`
    (nucleus sampling, Holtzman et al. 2020, section 3.1). Tokens that are as probable as the last
    one that stays stay too.

    Attributes:
      samples: N, of each prompt.
      max_new_tokens: S, of the longest response, its stop included.
      temperature: 0: always the most probable token, of equal ones the first.
      top_k: 0: all.
      top_p: 1: all.
      stops: tokens that end a response, such as EOS.

    Raises:
      ValueError: a number out of range.
    """

    samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stops: tuple[int, ...] = ()

    def __post_init__(self):
        for name, least in (('samples', 1), ('max_new_tokens', 1), ('top_k', 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f'{name}={value!r}, expected a whole number of at least {least}')
        if self.temperature and not _COLDEST <= self.temperature < math.inf:
            raise ValueError(f'temperature={self.temperature!r}, expected 0 or a finite number of '
                             f'at least {_COLDEST}')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p={self.top_p!r}, expected a number in (0, 1]')


class Sample(NamedTuple):
    """One response.

    Attributes:
      tokens: [n] int32, the stop included, if there is one.
      truncated: it has `max_new_tokens` and no stop.
      log_probs: [n] float32, log-probability (nats) of each token under the model itself, at
        temperature 1 and with all tokens, which is what a forward pass over the dialogue gives.
      sampled_log_probs: [n] float32, of each token under the distribution that it was drawn from;
        0 at temperature 0.
    """

    tokens: np.ndarray
    truncated: bool
    log_probs: np.ndarray
    sampled_log_probs: np.ndarray


class Prompt(NamedTuple):
    """A prompt as computed.

    Attributes:
      size: [1] int32, its tokens.
      keys: of each block keys and values, twice [1, G, P, E].
      logits: [1, V] float32 of the token that follows.
    """

    size: jax.Array
    keys: tuple[tuple[jax.Array, jax.Array], ...]
    logits: jax.Array


class _State(NamedTuple):
    """Responses that grow: how many tokens each has, all of them in step while they are active.

    Attributes:
      position: [] int32, tokens of those that are active.
      last: [R, N] int32, the last token of each.
      active: [R, N] bool, whether another one follows.
      stopped: [R, N] bool, whether a stop came.
      sizes: [R, N] int32, tokens of each.
      tokens: [R, N, S] int32.
      log_probs, sampled_log_probs: [R, N, S] float32.
      keys: of each block keys and values, twice [R * N * G, S, E].
    """

    position: jax.Array
    last: jax.Array
    active: jax.Array
    stopped: jax.Array
    sizes: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    sampled_log_probs: jax.Array
    keys: tuple[tuple[jax.Array, jax.Array], ...]


def sample(
    model: Transformer,
    params: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    seed: int,
    numbers: Sequence[int] | None = None,
    rows: int = ROWS,
) -> Iterator[tuple[int, tuple[Sample, ...]]]:
    """Draws responses to prompts.

    Args:
      model: a decoder; it computes in `model.dtype`.
      params: of it, with the output embedding, if that is not tied.
      prompts: [n] int32 each, BOS included where the model expects it.
      sampling: how many, and how.
      seed: of all that is drawn.
      numbers: of the prompts, which what is drawn depends on, at most 2^31; None: their places.
      rows: responses that grow at once, which has no influence on what they are.

    Yields:
      The place of a prompt and its N samples, for each prompt as they are done: short prompts
      first.

    Raises:
      DataError: the model is an encoder, or a prompt is empty, has tokens that the model does not
        have, or leaves no room for `max_new_tokens`; names its place.
      NonFiniteLoss: the model gives log-probabilities that are not finite.
    """
    _check(model, prompts, sampling)
    numbers = range(len(prompts)) if numbers is None else numbers
    params = unstack_blocks({'backbone': params})['backbone']
    side = min(sampling.samples, rows)
    together = max(1, rows // side)
    groups = collections.defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[_padded(len(prompt))].append(place)
    for size, places in sorted(groups.items()):
        for start in range(0, len(places), together):
            some = places[start:start + together]
            filled = some + some[:1] * (together - len(some))
            computed = {place: compute_prompt(model, params, _row(prompts[place], size),
                                              np.array([len(prompts[place])], np.int32))
                        for place in some}
            group = jax.tree.map(lambda *leaves: jnp.concatenate(leaves),
                                 *(computed[place] for place in filled))
            found: list[list[Sample]] = [[] for _ in some]
            for first in range(0, sampling.samples, side):
                which = first + np.arange(side)
                wanted = (np.arange(together) < len(some))[:, None] & (which < sampling.samples)
                state = respond(model, sampling, params, group, jax.random.key(seed),
                                np.array([numbers[place] for place in filled], np.int32),
                                which.astype(np.int32), wanted)
                for samples, own in zip(found, _samples(state, wanted), strict=False):
                    samples += own
            for place, samples in zip(some, found, strict=True):
                if not all(np.isfinite([one.log_probs, one.sampled_log_probs]).all()
                           for one in samples):
                    raise NonFiniteLoss(f'prompt {place}: log-probabilities that are not finite')
                yield place, tuple(samples)


@functools.partial(jax.jit, static_argnums=0)
def compute_prompt(
    model: Transformer, params: Any, tokens: jax.Array, size: jax.Array
) -> Prompt:
    """Computes one prompt.

    Args:
      model, params: see `sample`.
      tokens: [1, P] int32, padded on the right.
      size: [1] int32, how many are no padding.
    """
    at = jnp.arange(tokens.shape[1])[None]
    positions = jnp.minimum(at, size[0] - 1)
    inside = (at < size[0]).astype(jnp.int32)
    contexts = model.contexts(inside, jnp.zeros_like(inside), positions, 'auto')
    hidden, keys = model.extend(params, model.embed(params, tokens, positions), contexts,
                                reads=size - 1)
    keys = tuple(jax.tree.map(lambda x: x.swapaxes(1, 2), one) for one in keys)
    return Prompt(size, keys, model.logits(params, hidden))


@functools.partial(jax.jit, static_argnums=(0, 1))
def respond(
    model: Transformer,
    sampling: Sampling,
    params: Any,
    prompts: Prompt,
    key: jax.Array,
    numbers: jax.Array,
    which: jax.Array,
    wanted: jax.Array,
) -> Any:
    """Draws responses, all at once, until the last one ends.

    Args:
      model, sampling, params: see `sample`.
      prompts: R of them.
      key: from the seed.
      numbers: [R] int32, of the prompts.
      which: [N] int32, numbers of the samples.
      wanted: [R, N] bool; others stay empty.

    Returns:
      The last `_State`, without keys.
    """
    a = model.architecture
    rows, count = wanted.shape
    sizes = rows, count, sampling.max_new_tokens
    own_keys = jax.vmap(jax.vmap(lambda number, one: jax.random.fold_in(
        jax.random.fold_in(key, number), one), (None, 0)), (0, None))(numbers, which)
    empty = jnp.zeros((rows * count * a.num_kv_heads, sizes[2], a.head_dim), model.dtype)
    start = _State(
        jnp.int32(0), jnp.zeros((rows, count), jnp.int32), wanted, jnp.zeros_like(wanted),
        jnp.zeros((rows, count), jnp.int32), jnp.zeros(sizes, jnp.int32), jnp.zeros(sizes),
        jnp.zeros(sizes), ((empty, empty),) * a.num_layers)

    def drawn(state: _State, logits: jax.Array) -> _State:
        """With one more token, drawn from logits [R, N, V]."""
        positions = jnp.broadcast_to((prompts.size + state.position)[:, None], (rows, count))
        token, *scores = draw(sampling, logits, own_keys, positions)

        def put(into: jax.Array, values: jax.Array) -> jax.Array:
            values = jnp.where(state.active, values, 0).astype(into.dtype)
            return jax.lax.dynamic_update_index_in_dim(into, values, state.position, 2)

        stops = state.active & jnp.isin(token, jnp.array(sampling.stops, jnp.int32))
        position = state.position + 1
        return state._replace(
            position=position, last=token, stopped=state.stopped | stops,
            active=state.active & ~stops & (position < sampling.max_new_tokens),
            sizes=state.sizes + state.active, tokens=put(state.tokens, token),
            log_probs=put(state.log_probs, scores[0]),
            sampled_log_probs=put(state.sampled_log_probs, scores[1]))

    def step(state: _State) -> _State:
        at = state.position - 1
        positions = jnp.broadcast_to((prompts.size + at)[:, None], (rows, count))
        contexts = model.next_contexts(
            prompts.size, at, (count, prompts.keys[0][0].shape[2], sizes[2]))
        hidden, keys = model.extend(
            params, model.embed(params, state.last, positions), contexts,
            [Cache(*both) for both in zip(prompts.keys, state.keys, strict=True)])
        return drawn(state._replace(keys=tuple(keys)), model.logits(params, hidden))

    start = drawn(start, jnp.broadcast_to(
        prompts.logits[:, None], (rows, count, a.vocab_size)))
    return jax.lax.while_loop(lambda state: jnp.any(state.active), step, start)._replace(keys=())


def draw(
    sampling: Sampling, logits: jax.Array, keys: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token each, and its log-probabilities, see `Sample`.

    Args:
      sampling: how.
      logits: [R, N, V] float32.
      keys: [R, N], of each response.
      positions: [R, N] int32, of the token in its dialogue.

    Returns:
      [R, N] int32 and twice [R, N] float32.
    """
    log_probs = jax.nn.log_softmax(logits)

    def of(scores: jax.Array, token: jax.Array) -> jax.Array:
        return jnp.take_along_axis(scores, token[..., None], axis=-1)[..., 0]

    if not sampling.temperature:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, of(log_probs, token), jnp.zeros(token.shape)
    scores = filtered(sampling, logits)
    one = jax.vmap(jax.vmap(lambda key, position, scores: jax.random.categorical(
        jax.random.fold_in(key, position), scores)))
    token = one(keys, positions, scores).astype(jnp.int32)
    return token, of(log_probs, token), of(scores, token)


def filtered(sampling: Sampling, logits: jax.Array) -> jax.Array:
    """Log-probabilities that tokens are drawn with, -inf where they are not; [..., V] each."""
    # Low temperatures take differences beyond all floats: that is what -inf is.
    highest = jnp.max(logits, axis=-1, keepdims=True)
    scores = jax.nn.log_softmax((logits - highest) / sampling.temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        probs = jnp.exp(scores)
        scores = _only(scores, probs, jnp.ones_like(probs), sampling.top_k)
    if sampling.top_p < 1:
        probs = jnp.exp(scores)
        scores = _only(scores, probs, probs, sampling.top_p)
    return scores


def _only(
    scores: jax.Array, probs: jax.Array, weights: jax.Array, enough: float
) -> jax.Array:
    """Scores of the most probable tokens, the fewest whose weights sum to enough, made to sum to 1.

    The lowest probability that stays is found bit by bit, from the highest on, as floats that are
    not negative are ordered as their bits are; a vocabulary is not worth sorting.
    """
    order = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def step(i: jax.Array, least: jax.Array) -> jax.Array:
        candidate = least | (1 << (_BITS - 1 - i))
        total = jnp.sum(jnp.where(order >= candidate, weights, 0), axis=-1, keepdims=True)
        return jnp.where(total >= enough, candidate, least)

    least = jax.lax.fori_loop(0, _BITS, step, jnp.zeros_like(order[..., :1]))
    return jax.nn.log_softmax(jnp.where(order >= least, scores, -jnp.inf))


def _check(model: Transformer, prompts: Sequence[np.ndarray], sampling: Sampling) -> None:
    a = model.architecture
    if not a.causal:
        raise DataError('an encoder, which has no next token; expected a decoder')
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f'prompt {place}: no tokens, expected some')
        if prompt.min() < 0 or prompt.max() >= a.vocab_size:
            raise DataError(f'prompt {place}: tokens from {prompt.min()} to {prompt.max()}, but '
                            f'the embedding has {a.vocab_size} rows')
        if len(prompt) + sampling.max_new_tokens > a.max_positions:
            raise DataError(f'prompt {place}: {len(prompt)} tokens and max_new_tokens='
                            f'{sampling.max_new_tokens}, but the model has {a.max_positions} '
                            'positions')


def _padded(size: int) -> int:
    """Tokens of a padded prompt."""
    return max(_SHORTEST, 1 << (size - 1).bit_length())


def _row(prompt: np.ndarray, size: int) -> np.ndarray:
    """[1, P] int32."""
    row = np.zeros((1, size), np.int32)
    row[0, :len(prompt)] = prompt
    return row


def _samples(state: _State, wanted: np.ndarray) -> list[list[Sample]]:
    """Those of each prompt that are wanted."""
    sizes, stopped, *arrays = map(np.asarray, (
        state.sizes, state.stopped, state.tokens, state.log_probs, state.sampled_log_probs))

    def one(at: tuple[int, int]) -> Sample:
        tokens, *scores = (array[at][:sizes[at]].copy() for array in arrays)
        return Sample(tokens, not stopped[at], *scores)

    return [[one((r, n)) for n in np.flatnonzero(row)] for r, row in enumerate(wanted)]
