"""The decoder: GPT-2 (Radford et al. 2019) with explicit positions and attention plan.

Axes: R rows, L tokens a row, D features, H heads, E features a head, V vocabulary.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from qrm.models import attention, sharding

# Hugging Face names of activations; GPT-2 uses the tanh approximation of GELU.
ACTIVATIONS = {
    'gelu_new': functools.partial(nn.gelu, approximate=True),
    'gelu_pytorch_tanh': functools.partial(nn.gelu, approximate=True),
    'gelu': functools.partial(nn.gelu, approximate=False),
    'relu': nn.relu,
    'silu': nn.silu,
}

_PRODUCT = 'product'  # what checkpointing calls the results of the projections


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a GPT-2 decoder, with the names of its Hugging Face `config.json`.

    Raises:
      ValueError: a size is not a positive integer, the heads do not divide the width, or the
        activation is unknown.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation_function: str = 'gelu_new'
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self):
        for field in ('vocab_size', 'n_positions', 'n_embd', 'n_layer', 'n_head', 'n_inner'):
            size = getattr(self, field)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f'{field}={size!r}, expected a positive integer')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(f'activation_function={self.activation_function!r}, expected one of '
                             f'{sorted(ACTIVATIONS)}')


class Attention(nn.Module):
    """Projections around `attention.attend`: [R, L, D] in, [R, L, D] or at `reads` [..., D] out."""

    config: DecoderConfig
    dtype: Any
    dropout: float

    @nn.compact
    def __call__(
        self, x: jax.Array, plan: attention.Plan, reads: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        c = self.config
        qkv = _dense(c, 3 * c.n_embd, self.dtype, 'c_attn')(x)
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * c.n_head, -1), 3, axis=2)
        key = self.make_rng('dropout') if self.dropout and not deterministic else None
        mixed = attention.attend(q, k, v, plan, reads, dropout=self.dropout, dropout_key=key)
        mixed = mixed.reshape(*mixed.shape[:-2], c.n_embd)
        return _dense(c, c.n_embd, self.dtype, 'c_proj', depth=c.n_layer)(mixed)


class Mlp(nn.Module):
    """Two-layer perceptron with the configured activation."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = ACTIVATIONS[c.activation_function](_dense(c, c.n_inner, self.dtype, 'c_fc')(x))
        return _dense(c, c.n_embd, self.dtype, 'c_proj', depth=c.n_layer)(x)


class Block(nn.Module):
    """Pre-norm transformer block; with `reads`, its output is computed there only."""

    config: DecoderConfig
    dtype: Any
    dropout: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        plan: attention.Plan,
        reads: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        h = _norm(self.config, 'ln_1')(x).astype(self.dtype)
        attend = Attention(self.config, self.dtype, self.dropout, name='attn')
        x = _at(x, reads) + drop(attend(h, plan, reads, deterministic))
        h = _norm(self.config, 'ln_2')(x).astype(self.dtype)
        return x + drop(Mlp(self.config, self.dtype, name='mlp')(h))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """GPT-2 as pure functions: embeddings, `n_layer` blocks, final norm.

    Parameters are float32; the blocks' are stacked, with a leading layer axis. The residual
    stream and matrix products are in `dtype`, norms and softmax in float32. Leaves may be shards,
    see `sharding`; those of the blocks are then gathered one block at a time.

    Attributes:
      config: architecture.
      dtype: compute dtype, float32 or bfloat16.
      remat: recompute the blocks in the backward pass instead of storing their activations; of
        use for stacked blocks only, as without a scan XLA finds them stored on CPU.
      dropout: rate on embeddings, attention weights and residual branches.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: bool = False
    dropout: float = 0.0

    def init(self, key: jax.Array) -> Any:
        """Random parameters `{'wte', 'wpe', 'h', 'ln_f'}`, initialised as GPT-2's."""
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        wte_key, wpe_key, *layer_keys = jax.random.split(key, 2 + c.n_layer)
        tokens = jnp.zeros((1, 1), jnp.int32)
        plan = attention.plan(tokens, tokens, 'dense')
        x = jnp.zeros((1, 1, c.n_embd), self.dtype)
        return {
            'wte': normal(wte_key, (c.vocab_size, c.n_embd)),
            'wpe': normal(wpe_key, (c.n_positions, c.n_embd)),
            'h': jax.vmap(lambda k: self._block.init(k, x, plan)['params'])(
                jnp.stack(layer_keys)),
            'ln_f': _norm(c, None).init(key, x)['params'],
        }

    def embed(self, params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Sum of token and position embeddings, [R, L] int32 each -> [R, L, D] float32."""
        return (sharding.look_up(params['wte'], tokens)
                + sharding.look_up(params['wpe'], positions))

    def add_embedding_gradient(
        self, total: Any, gradient: jax.Array, tokens: jax.Array, positions: jax.Array
    ) -> Any:
        """Adds the gradient of `embed`'s output to a running total in the shape of the parameters.

        Only the rows of tokens that occur are touched, where differentiating `embed` would make
        and add a gradient of the size of the vocabulary.
        """
        return total | {
            'wte': sharding.add_rows(total['wte'], tokens, gradient),
            'wpe': sharding.add_rows(total['wpe'], positions, gradient),
        }

    def __call__(
        self,
        params: Any,
        embedded: jax.Array,
        plan: attention.Plan,
        reads: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm.

        Of the last block only keys and values are needed of all tokens, so with `reads` queries
        and what follows the attention are computed at the tokens that are read.

        Args:
          params: from `init`, or the same after `unstack_blocks`, which runs them without a scan.
          embedded: [R, L, D], from `embed`.
          plan: from `attention.plan`.
          reads: [...] int32, indices into R * L; None for all tokens.
          dropout_key: with a key, with dropout.

        Returns:
          [..., D] float32 at `reads`, or [R, L, D].
        """
        c = self.config
        keys = None
        if self.dropout and dropout_key is not None:
            dropout_key, *keys = jax.random.split(dropout_key, 1 + c.n_layer)
            kept = jax.random.bernoulli(dropout_key, 1 - self.dropout, embedded.shape)
            embedded = jnp.where(kept, embedded / (1 - self.dropout), 0.0)

        def run(x: jax.Array, layer: Any, key: jax.Array | None, reads=None) -> jax.Array:
            rngs = None if key is None else {'dropout': key}
            return self._block.apply({'params': sharding.whole(layer, self.dtype)}, x, plan, reads,
                                     key is None, rngs=rngs)

        step, sharded = run, sharding.is_sharded(params['h'])
        if self.remat:
            step = jax.checkpoint(run, prevent_cse=False)
        elif sharded:
            # Products are kept, gathered weights are not: they are gathered again.
            step = jax.checkpoint(
                run, prevent_cse=False,
                policy=jax.checkpoint_policies.save_only_these_names(_PRODUCT))
        x, layers = embedded.astype(self.dtype), params['h']
        most = c.n_layer if reads is None else c.n_layer - 1
        if isinstance(layers, tuple):
            for i in range(most):
                x = step(x, layers[i], keys and keys[i])
            last = layers[-1]
        else:
            scanned = jax.tree.map(lambda leaf: leaf[:most], layers)
            x, _ = jax.lax.scan(lambda x, layer: (step(x, *layer), None), x,
                                (scanned, keys and jnp.stack(keys)[:most]))
            last = jax.tree.map(lambda leaf: leaf[-1], layers)
        if reads is not None:
            # The last block is differentiated at once: only gathered weights are worth forgetting.
            x = (step if sharded else run)(x, last, keys and keys[-1], reads)
        return _norm(c, None).apply({'params': params['ln_f']}, x)

    @property
    def _block(self) -> Block:
        return Block(self.config, self.dtype, self.dropout)


def unstack_blocks(params: Any) -> Any:
    """Decoder parameters with a tuple of blocks in place of their leading axis."""
    count = len(jax.tree.leaves(params['h'])[0])
    return params | {'h': tuple(jax.tree.map(operator.itemgetter(i), params['h'])
                                for i in range(count))}


def stack_blocks(params: Any) -> Any:
    """The inverse of `unstack_blocks`."""
    return params | {'h': jax.tree.map(lambda *leaves: jnp.stack(leaves), *params['h'])}


def _at(x: jax.Array, reads: jax.Array | None) -> jax.Array:
    """Rows of x [R, L, D] at indices into R * L; x itself without."""
    return x if reads is None else x.reshape(-1, x.shape[-1])[reads]


def _dense(config: DecoderConfig, features: int, dtype: Any, name: str, depth: int = 0) -> nn.Dense:
    # Residual projections start smaller by sqrt(2 * layers), as in GPT-2.
    scale = config.initializer_range / math.sqrt(2 * depth or 1)
    return nn.Dense(features, dtype=dtype, precision=attention.precision(dtype), name=name,
                    kernel_init=nn.initializers.normal(scale),
                    dot_general=lambda x, kernel, *unused, **unused_kw: checkpoint_name(
                        _project(x, kernel), _PRODUCT))


@jax.custom_vjp
def _project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., D] times [D, F].

    Written out for its backward pass: what differentiation makes of the kernel's gradient is a
    product of two transposed factors, which runs at two thirds of the speed on CPU.
    """
    return jnp.einsum('...d,df->...f', x, kernel, precision=attention.precision(x.dtype))


def _project_forward(x, kernel):
    return _project(x, kernel), (x, kernel)


def _project_backward(saved, gradient):
    x, kernel = saved
    precision = attention.precision(x.dtype)
    if jax.default_backend() == 'cpu':
        # Otherwise the activation that made x is fused into a transposition, and runs in strides.
        x = jax.lax.optimization_barrier(x)
    return (jnp.einsum('...f,df->...d', gradient, kernel, precision=precision),
            jnp.einsum('td,tf->df', x.reshape(-1, x.shape[-1]),
                       gradient.reshape(-1, gradient.shape[-1]), precision=precision))


_project.defvjp(_project_forward, _project_backward)


def _norm(config: DecoderConfig, name: str | None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_epsilon, dtype=jnp.float32, name=name)
