"""The decoder: GPT-2 (Radford et al. 2019) with explicit positions and attention mask.

Axes: R rows, L tokens a row, D features, H heads, E features a head, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# Hugging Face names of activations; GPT-2 uses the tanh approximation of GELU.
ACTIVATIONS = {
    'gelu_new': functools.partial(nn.gelu, approximate=True),
    'gelu_pytorch_tanh': functools.partial(nn.gelu, approximate=True),
    'gelu': functools.partial(nn.gelu, approximate=False),
    'relu': nn.relu,
    'silu': nn.silu,
}


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


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32 whatever the compute dtype."""

    config: DecoderConfig
    dtype: Any
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        qkv = _dense(c, 3 * c.n_embd, self.dtype, 'c_attn')(x)
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * c.n_head, -1), 3, axis=2)
        precision = _precision(self.dtype)
        logits = jnp.einsum('rqhe,rkhe->rhqk', q, k, precision=precision,
                            preferred_element_type=jnp.float32)
        logits = logits / math.sqrt(c.n_embd // c.n_head)
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        mixed = jnp.einsum('rhqk,rkhe->rqhe', weights, v, precision=precision).reshape(x.shape)
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
    """Pre-norm transformer block; returns (x, None), the form that `nn.scan` asks for."""

    config: DecoderConfig
    dtype: Any
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool):
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        h = _norm(self.config, 'ln_1')(x).astype(self.dtype)
        x = x + drop(Attention(self.config, self.dtype, self.dropout, name='attn')(
            h, mask, deterministic))
        h = _norm(self.config, 'ln_2')(x).astype(self.dtype)
        return x + drop(Mlp(self.config, self.dtype, name='mlp')(h)), None


class Decoder(nn.Module):
    """GPT-2: embeddings, `n_layer` scanned blocks, final norm.

    Parameters are float32; blocks have a leading layer axis. The residual stream and matrix
    products are in `dtype`, norms and softmax in float32.

    Attributes:
      config: architecture.
      dtype: compute dtype, float32 or bfloat16.
      remat: recompute the blocks in the backward pass instead of storing their activations.
      dropout: rate on embeddings, attention weights and residual branches.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, mask: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Hidden states of all tokens.

        Args:
          tokens, positions: [R, L] int32.
          mask: [R, L, L] bool, query by key.
          deterministic: no dropout; otherwise a 'dropout' RNG is needed.

        Returns:
          [R, L, D] float32, after the final norm.
        """
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        wte = self.param('wte', init, (c.vocab_size, c.n_embd))
        wpe = self.param('wpe', init, (c.n_positions, c.n_embd))
        x = (wte[tokens] + wpe[positions]).astype(self.dtype)
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        block = nn.remat(Block, prevent_cse=False, static_argnums=(3,)) if self.remat else Block
        x, _ = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.n_layer,
        )(c, self.dtype, self.dropout, name='h')(x, mask, deterministic)
        return _norm(c, 'ln_f')(x)


def _dense(config: DecoderConfig, features: int, dtype: Any, name: str, depth: int = 0) -> nn.Dense:
    # Residual projections start smaller by sqrt(2 * layers), as in GPT-2.
    scale = config.initializer_range / math.sqrt(2 * depth or 1)
    return nn.Dense(features, dtype=dtype, precision=_precision(dtype), name=name,
                    kernel_init=nn.initializers.normal(scale))


def _precision(dtype: Any) -> jax.lax.Precision:
    # By default accelerators round float32 factors to TF32 or bfloat16, which is not float32.
    full = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT


def _norm(config: DecoderConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_epsilon, dtype=jnp.float32, name=name)
