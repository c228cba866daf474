"""Transformers of many families as one set of pure functions of a description, `Architecture`.

Decoders look back, encoders in both directions; both work on packed rows, whose layout
`Transformer.contexts` reads once a micro-batch.

Axes: R rows, L tokens a row, D features, E features a head, V vocabulary.
"""

import dataclasses
import functools
import itertools
import math
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from qrm.models import attention, platforms, sharding, tuning
from qrm.models import lora as lora_lib
from qrm.models.architecture import (
    ACTIVATIONS,
    Architecture,
    Leaf,
    Rotary,
    leaf_dtype,
    leaves,
    tree,
)
from qrm.models.lora import Lora, adapter_leaves, split

_PRODUCT = 'product'  # what checkpointing calls the results of the projections


class Context(NamedTuple):
    """What a block needs to know of a micro-batch.

    Attributes:
      plan: of its attention; or what tokens see that come after those of a cache.
      rotary: cosines and sines [R, L, E / 2] float32 of the angles of each position; or None.
    """

    plan: attention.Plan | attention.Sight
    rotary: tuple[jax.Array, jax.Array] | None


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Embeddings, blocks and norms as pure functions of parameters.

    Parameters are float32, but tables and kernels that are not trained may be narrower. The blocks'
    are stacked, with a leading layer axis, all in one run or in several, a tuple of them. A run is
    a scan, but for a run of one. The residual stream and matrix products are in `dtype`, norms and
    softmax in float32. Leaves may be shards, see `sharding`; those of the blocks are then gathered
    one block at a time.

    Attributes:
      architecture: what is computed.
      dtype: compute dtype, float32 or bfloat16.
      remat: recompute the blocks in the backward pass instead of storing their activations; of
        use for stacked blocks only, as without a scan XLA finds them stored on CPU.
      dropout: rate on embeddings, attention weights and residual branches.
      lora: adapters beside the kernels, if there are any.
    """

    architecture: Architecture
    dtype: Any = jnp.float32
    remat: bool = False
    dropout: float = 0.0
    lora: Lora | None = None

    def init(self, key: jax.Array, *, output: bool = False, dtype: str = 'float32') -> Any:
        """Random parameters, see `leaves` and `adapter_leaves`; `dtype`: see `leaf_dtype`.

        Kernels and tables are normal with `initializer_range`; of kernels that add to the residual
        stream it is smaller by sqrt(2 * num_layers), as in GPT-2. The A of adapters are uniform
        within 1 / sqrt(D), as in peft, and their B are 0.
        """
        a = self.architecture
        token_key, position_key, *layer_keys = jax.random.split(key, 2 + a.num_layers)
        other = {'tokens': token_key, 'positions': position_key}
        scales = {'normal': a.initializer_range,
                  'residual': a.initializer_range / math.sqrt(2 * a.num_layers)}
        constants = {'zeros': jnp.zeros, 'ones': jnp.ones}

        def start(path: str, leaf: Leaf) -> jax.Array:
            if leaf.start in constants:
                return constants[leaf.start](leaf.shape, leaf_dtype(path, dtype))
            stream = _STREAMS.get(path, zlib.crc32(path.encode()))
            draw = _UNIFORM if leaf.start == 'uniform' else (
                nn.initializers.normal(scales[leaf.start]))

            def one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
                return draw(key, shape).astype(leaf_dtype(path, dtype))

            if path.startswith('blocks/'):
                # One block after the other: what is drawn is wider than what is kept of it.
                return jax.lax.map(
                    lambda key: one(jax.random.fold_in(key, stream), leaf.shape[1:]),
                    jnp.stack(layer_keys))
            return one(other.get(path, jax.random.fold_in(token_key, stream)), leaf.shape)

        adapters = adapter_leaves(a, self.lora) if self.lora else {}
        return tree({path: start(path, leaf)
                     for path, leaf in (leaves(a, output=output) | adapters).items()})

    def embed(self, params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """What is looked up of tokens and positions, [R, L] int32 each -> [R, L, D] float32."""
        found = from_bits(sharding.look_up(params['tokens'], tokens)).astype(jnp.float32)
        if 'positions' in params:
            found += from_bits(sharding.look_up(params['positions'], positions))
        return found

    def add_embedding_gradient(
        self, total: Any, gradient: jax.Array, tokens: jax.Array, positions: jax.Array
    ) -> Any:
        """Adds the gradient of `embed`'s output to a running total in the shape of the parameters.

        Only the rows of tokens that occur are touched, where differentiating `embed` would make
        and add a gradient of the size of the vocabulary.
        """
        indices = {'tokens': tokens, 'positions': positions}
        return total | {name: sharding.add_rows(total[name], where, gradient)
                        for name, where in indices.items() if name in total}

    def contexts(
        self,
        segments: jax.Array,
        responses: jax.Array,
        positions: jax.Array,
        implementation: str,
        *,
        dropout: bool = False,
    ) -> tuple[Context, ...]:
        """What the blocks need to know of a micro-batch, one for each of `Architecture.layers`.

        Those that are the same are the same object.

        Args:
          segments, responses, positions: [R, L], see `packing.MicroBatch`.
          implementation: see `attention.plan`.
          dropout: whether attention weights will be dropped.
        """
        def plan(window: int) -> attention.Plan:
            return attention.plan(segments, responses, positions, implementation, window=window,
                                  causal=self.architecture.causal, dropout=dropout)

        # A dialogue is no longer than a row.
        return self._contexts(plan, positions, segments.shape[1])

    def next_contexts(
        self, prompt_sizes: jax.Array, position: jax.Array, caches: tuple[int, int, int]
    ) -> tuple[Context, ...]:
        """As `contexts`, of the next token of each of N responses to R prompts, in rows [R, N].

        Args:
          prompt_sizes, position, caches: see `attention.sight`.
        """
        count, prompt, response = caches
        positions = jnp.broadcast_to((prompt_sizes + position)[:, None], (len(prompt_sizes), count))

        def sight(window: int) -> attention.Sight:
            return attention.sight(prompt_sizes, position, caches, window)

        return self._contexts(sight, positions, prompt + response)

    def _contexts(
        self, plan: Callable[[int], Any], positions: jax.Array, longest: int
    ) -> tuple[Context, ...]:
        """Contexts of windows by what `plan` gives; one that holds all there is changes nothing."""

        @functools.cache
        def angles(rotary: Rotary | None) -> tuple[jax.Array, jax.Array] | None:
            if rotary is None:
                return None
            turns = positions[..., None] * jnp.asarray(
                rotary.frequencies(self.architecture.head_dim))
            return jnp.cos(turns), jnp.sin(turns)

        plan = functools.cache(plan)

        @functools.cache
        def context(rotary: Rotary | None, window: int) -> Context:
            return Context(plan(window), angles(rotary))

        return tuple(context(layer.rotary, layer.window if layer.window < longest else 0)
                     for layer in self.architecture.layers)

    def __call__(
        self,
        params: Any,
        embedded: jax.Array,
        contexts: Sequence[Context],
        reads: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        *,
        taps: Sequence[int] = (),
        look: Callable[[jax.Array], Any] = lambda x: x,
    ) -> tuple[jax.Array, list[Any]]:
        """Hidden states after the final norm, and what `look` sees after some of the blocks.

        Of the last block only keys and values are needed of all tokens, so with `reads` queries
        and what follows the attention are computed at the tokens that are read.

        Args:
          params: from `init`, or the same with blocks in several runs.
          embedded: [R, L, D], from `embed`.
          contexts: from `contexts`.
          reads: [...] int32, indices into R * L; None for all tokens.
          dropout_key: with a key, with dropout.
          taps: numbers of blocks, 1 for the first, less than `num_layers`.
          look: of the residual stream [R, L, D] after such a block.

        Returns:
          [..., D] float32 at `reads`, or [R, L, D]; and one value of `look` for each of `taps`.
        """
        a, layers = self.architecture, params['blocks']
        x, keys = self._enter(params, embedded), None
        if self.dropout and dropout_key is not None:
            own, *keys = jax.random.split(dropout_key, 1 + a.num_layers)
            x = _drop(x, self.dropout, own)
        x = x.astype(self.dtype)

        @functools.partial(jax.jit, static_argnums=0)
        def run(normed, x, layer, context, key, reads=None):
            layer = jax.tree.map(from_bits, sharding.whole(layer, self.dtype))
            return _block(a, self.lora, layer, x, context, reads, normed, self.dropout, key)[0]

        sharded = sharding.is_sharded(layers)
        step = run
        if self.remat:
            step = jax.checkpoint(run, prevent_cse=False, static_argnums=0)
        elif sharded:
            # Products are kept, gathered weights are not: they are gathered again.
            step = jax.checkpoint(
                run, prevent_cse=False, static_argnums=0,
                policy=jax.checkpoint_policies.save_only_these_names(_PRODUCT))
        pick, kinds = _by_kind(contexts, a.num_layers)
        keys = None if keys is None else jnp.stack(keys)

        def body(x, scanned):
            layer, key, kind = scanned
            x = step(True, x, layer, pick(kind), key)
            return x, look(x) if taps else None

        seen = {}
        for start, stop, layer in self._pieces(layers, reads is not None):
            last = reads is not None and stop == a.num_layers
            if stop - start == 1:
                # The last block is differentiated at once: only gathered weights are worth
                # forgetting.
                one = run if last and not sharded else step
                x = one(a.first_norm or start > 0, x, jax.tree.map(_only, layer),
                        contexts[start % len(contexts)], None if keys is None else keys[start],
                        *([reads] if last else []))
                if stop in taps:
                    seen[stop] = look(x)
            else:
                own = None if keys is None else keys[start:stop]
                x, looks = jax.lax.scan(body, x, (layer, own, kinds[start:stop]))
                seen |= {i: jax.tree.map(operator.itemgetter(i - 1 - start), looks)
                         for i in taps if start < i <= stop}
        return self._leave(params, x), [seen[i] for i in taps]

    def extend(
        self,
        params: Any,
        embedded: jax.Array,
        contexts: Sequence[Context],
        caches: Sequence[attention.Cache] | None = None,
        *,
        reads: jax.Array | None = None,
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """As `__call__`, with the keys and values that later tokens will attend to.

        Blocks stand one after the other in what is compiled, as a scan would copy the parameters
        of each before it reads them: give them in runs of one, see `tuning.unstack_blocks`.

        Args:
          params: from `init`, or the same with blocks in several runs.
          embedded: [R, L, D], from `embed`.
          contexts: from `contexts`; with caches, from `next_contexts`.
          caches: of each block, of all that comes before these tokens; None: nothing does.
          reads: see `__call__`.

        Returns:
          [..., D] float32 at `reads`, or [R, L, D]; and of each block keys and values
          [R, L, G, E] of these tokens, or with caches their `responses` with these.
        """
        a, found = self.architecture, []
        x = self._enter(params, embedded).astype(self.dtype)

        @functools.partial(jax.jit, static_argnums=0)
        def run(normed, layer, x, context, cache, reads):
            layer = jax.tree.map(from_bits, sharding.whole(layer, self.dtype))
            return _block(a, self.lora, layer, x, context, reads, normed, 0.0, None, cache)

        blocks = [jax.tree.map(operator.itemgetter(i), layers)
                  for layers in tuning.runs_of(params['blocks'])
                  for i in range(len(jax.tree.leaves(layers)[0]))]
        for i, layer in enumerate(blocks):
            x, new = run(a.first_norm or i > 0, layer, x, contexts[i % len(contexts)],
                         None if caches is None else caches[i],
                         reads if i == a.num_layers - 1 else None)
            found.append(new)
        return self._leave(params, x), found

    def _leave(self, params: Any, x: jax.Array) -> jax.Array:
        """Hidden states float32 of what the last block gave."""
        if self.architecture.final_norm:
            x = _norm(self.architecture, params['norm'], x, jnp.float32)
        return x.astype(jnp.float32)

    def _pieces(self, blocks: Any, reads: bool) -> list[tuple[int, int, Any]]:
        """Runs of like blocks: the numbers of the first block and of that after the last, leaves.

        A first block without a norm is not like the others, nor is the last one where it is
        computed at what is read only.
        """
        a, pieces, start = self.architecture, [], 0
        for run in tuning.runs_of(blocks):
            count = len(jax.tree.leaves(run)[0])
            cuts = {0, count}
            if start == 0 and not a.first_norm:
                cuts.add(1)
            if reads and start + count == a.num_layers:
                cuts.add(count - 1)
            pieces += [(start + low, start + high,
                        jax.tree.map(operator.itemgetter(slice(low, high)), run))
                       for low, high in itertools.pairwise(sorted(cuts))]
            start += count
        return pieces

    def cut(self, blocks: Any) -> tuple[Any, ...]:
        """Blocks, the first ones or all, as the runs that `__call__` with reads takes one by one.

        Of those that are stacked otherwise it copies some in every call.
        """
        return tuple(piece for _, _, piece in self._pieces(blocks, True))

    def pool(self, params: Any, hidden: jax.Array) -> jax.Array:
        """What the head reads of last hidden states [..., D] float32: [..., D] float32."""
        a = self.architecture
        if not a.pooler:
            return hidden
        p = sharding.whole(params['pooler'])
        x = _dense(p['dense'], hidden)
        if a.pooler == 'tanh':
            return jnp.tanh(x)
        return _norm(a, p['norm'], ACTIVATIONS[a.activation](x))

    def output_table(self, params: Any) -> jax.Array:
        """The output embedding [V, D], whole: that of tokens, if it is tied."""
        table = params['tokens' if self.architecture.tied else 'output']
        return from_bits(sharding.whole(table, self.dtype))

    def read_out(self, table: jax.Array, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32, from the output embedding [V, D] and hidden states [..., D]."""
        a = self.architecture
        logits = jnp.einsum('...d,vd->...v', hidden.astype(self.dtype), table.astype(self.dtype),
                            preferred_element_type=jnp.float32)
        return a.logit_cap * jnp.tanh(logits / a.logit_cap) if a.logit_cap else logits

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of the next token, from last hidden states [..., D]."""
        return self.read_out(self.output_table(params), hidden)

    def _enter(self, params: Any, x: jax.Array) -> jax.Array:
        """What goes into the first block, from what was looked up: [R, L, D] float32 each."""
        a = self.architecture
        if a.embedding_scale != 1:
            x = x * float(np.asarray(a.embedding_scale, self.dtype))
        if a.token_types:
            x = x + sharding.whole(params['types'])[0]
        return _norm(a, params['embedding_norm'], x) if a.embedding_norm else x


def to_bits(leaf: jax.Array) -> jax.Array:
    """A leaf of bfloat16 as uint16, others as they are.

    XLA on CPU widens arrays of bfloat16 whole before it takes a block or a row out of them.
    """
    return jax.lax.bitcast_convert_type(leaf, jnp.uint16) if leaf.dtype == jnp.bfloat16 else leaf


def from_bits(leaf: jax.Array) -> jax.Array:
    """The inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(leaf, jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf


# What the random numbers of a kernel are folded in from; those of GPT-2's are fixed, so that a
# seed keeps its meaning. Others take a checksum of their path.
_STREAMS: Mapping[str, int] = {
    'blocks/attention/qkv/kernel': 0x4D446F91,
    'blocks/attention/output/kernel': 0x3EFBB596,
    'blocks/mlp/up/kernel': 0x6CF65CF6,
    'blocks/mlp/down/kernel': 0x6A184C64,
}
_UNIFORM = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # within 1 / sqrt(D)


def _by_kind(
    contexts: Sequence[Context], num_layers: int
) -> tuple[Callable[[jax.Array], Context], jax.Array]:
    """How to get the context of a block in a scan: a function of its kind, and the kinds [layers].

    A scan has one body for all blocks, so contexts that differ are taken by index.
    """
    distinct = list({id(context): context for context in contexts}.values())
    places = [next(k for k, one in enumerate(distinct) if one is context) for context in contexts]
    kinds = jnp.asarray([places[i % len(places)] for i in range(num_layers)], jnp.int32)
    if len(distinct) == 1:
        return lambda kind: distinct[0], kinds
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *distinct)
    return lambda kind: jax.tree.map(lambda leaf: leaf[kind], stacked), kinds


def _only(leaf: jax.Array) -> jax.Array:
    """A leaf without its leading axis, of one; of which the gradient is no more than a view."""
    return leaf.reshape(leaf.shape[1:])


def _block(
    a: Architecture,
    lora: Lora | None,
    p: Any,
    x: jax.Array,
    context: Context,
    reads: jax.Array | None,
    normed: bool,
    dropout: float,
    key: jax.Array | None,
    cache: attention.Cache | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A block of [R, L, D], and its keys and values, see `_attention`.

    With `reads` its output is computed there only; with a cache its tokens come after those.
    """
    keys = jax.random.split(key, 3) if dropout and key is not None else (None, None, None)

    def branch(name, x, function, key, *, normed=True, at=lambda x: x):
        h = _norm(a, p[f'{name}_norm'], x) if 'before' in a.norm_places and normed else x
        h, *more = function(h)
        if 'after' in a.norm_places:
            h = _norm(a, p[f'{name}_out_norm'], h)
        x = at(x) + _drop(h, dropout, key)
        return _norm(a, p[f'{name}_out_norm'], x) if 'sum' in a.norm_places else x, *more

    x, *new = branch('attention', x, lambda h: _attention(
        a, lora, p['attention'], h, context, reads, dropout, keys[0], cache),
        keys[1], normed=normed, at=lambda x: _at(x, reads))
    x, = branch('mlp', x, lambda h: (_mlp(a, lora, p['mlp'], h),), keys[2])
    return x, tuple(new)


def _attention(
    a: Architecture,
    lora: Lora | None,
    p: Any,
    x: jax.Array,
    context: Context,
    reads: jax.Array | None,
    dropout: float,
    key: jax.Array | None,
    cache: attention.Cache | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projections around `attention.attend`: [R, L, D] in, [R, L, D] or at `reads` [..., D] out.

    Also gives keys and values [R, L, G, E]; with a cache its `responses` with these.
    """
    q, k, v = split(_dense(p['qkv'], x, lora, 'attention/qkv'), a.parts['qkv'])
    if a.query_key_norm == 'projection':
        q, k = _norm(a, p['query_norm'], q), _norm(a, p['key_norm'], k)
    q, k, v = (y.reshape(*y.shape[:2], -1, a.head_dim) for y in (q, k, v))
    if a.query_key_norm == 'head':
        q, k = _norm(a, p['query_norm'], q), _norm(a, p['key_norm'], k)
    if context.rotary is not None:
        q, k = _rotate(q, *context.rotary), _rotate(k, *context.rotary)
    scale, cap = a.attention_scale or None, a.attention_cap
    if cache is None:
        mixed = attention.attend(q, k, v, context.plan, reads, scale=scale, cap=cap,
                                 dropout=dropout, dropout_key=key)
    else:
        mixed, (k, v) = attention.attend_next(q, k, v, context.plan, cache, scale=scale, cap=cap)
    mixed = mixed.reshape(*mixed.shape[:-2], -1)
    return _dense(p['output'], mixed, lora, 'attention/output'), k, v


def _mlp(a: Architecture, lora: Lora | None, p: Any, x: jax.Array) -> jax.Array:
    activation, x = ACTIVATIONS[a.activation], _dense(p['up'], x, lora, 'mlp/up')
    if a.gated:
        gate, x = split(x, (x.shape[-1] // 2,) * 2)
        x = activation(gate) * x
    else:
        x = activation(x)
    return _dense(p['down'], x, lora, 'mlp/down')


def _rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Turns the pairs of each head [R, L, H, E], element i and i + E / 2, by [R, L, E / 2]."""
    first, second = split(x.astype(jnp.float32), (x.shape[-1] // 2,) * 2)
    cosines, sines = cosines[:, :, None], sines[:, :, None]
    turned = first * cosines - second * sines, second * cosines + first * sines
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _norm(a: Architecture, p: Any, x: jax.Array, dtype: Any = None) -> jax.Array:
    """Norm over the last axis in float32, in the end in `dtype`, by default that of x."""
    dtype = dtype or x.dtype
    scale, x = p['scale'], x.astype(jnp.float32)
    if a.norm == 'layer':
        norm = nn.LayerNorm(epsilon=a.norm_epsilon, use_bias=a.norm_bias, dtype=jnp.float32)
        return norm.apply({'params': p}, x).astype(dtype)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + a.norm_epsilon)
    if a.norm_rounds:
        return x.astype(dtype) * scale.astype(dtype)
    return (x * (scale + a.norm_offset if a.norm_offset else scale)).astype(dtype)


def _at(x: jax.Array, reads: jax.Array | None) -> jax.Array:
    """Rows of x [R, L, D] at indices into R * L; x itself without."""
    return x if reads is None else x.reshape(-1, x.shape[-1])[reads]


def _drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if not rate or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


def _dense(
    p: Any, x: jax.Array, lora: Lora | None = None, kernel: str = ''
) -> jax.Array:
    """[..., D] times the kernel [D, F] in the dtype of x; `kernel`: its path, see `lora.Module`."""
    y = checkpoint_name(_project(x, p['kernel']), _PRODUCT)
    if 'lora' in p:
        y = lora_lib.add(p['lora'], lora, kernel, x, y, _project)
    return y + p['bias'].astype(x.dtype) if 'bias' in p else y


@jax.custom_vjp
def _project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., D] times [D, F], in the dtype of x.

    Written out for its backward pass: what differentiation makes of the kernel's gradient is a
    product of two transposed factors, which runs at two thirds of the speed on CPU.
    """
    return jnp.einsum('...d,df->...f', x, kernel.astype(x.dtype),
                      precision=attention.precision(x.dtype))


def _project_forward(x, kernel):
    return _project(x, kernel), (x, kernel)


def _project_backward(saved, gradient):
    x, kernel = saved
    precision = attention.precision(x.dtype)
    if platforms.current() == 'cpu':
        # Otherwise the activation that made x is fused into a transposition, and runs in strides.
        x = jax.lax.optimization_barrier(x)
    of_kernel = jnp.einsum('td,tf->df', x.reshape(-1, x.shape[-1]),
                           gradient.reshape(-1, gradient.shape[-1]), precision=precision)
    return (jnp.einsum('...f,df->...d', gradient, kernel.astype(x.dtype), precision=precision),
            of_kernel.astype(kernel.dtype))


_project.defvjp(_project_forward, _project_backward)
