"""What a transformer computes, as a frozen description, and which parameters that takes.

An `Architecture` says it for any family: norms, positions, heads, windows, caps. Nothing here knows
a family's name; `families` makes descriptions from the settings of checkpoints, `transformer`
computes them.

Axes: D features, H query heads, G key and value heads, E features a head, F inner features,
V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Hugging Face names of activations; GPT-2 and Gemma use the tanh approximation of GELU.
ACTIVATIONS = {
    'gelu_new': functools.partial(jax.nn.gelu, approximate=True),
    'gelu_pytorch_tanh': functools.partial(jax.nn.gelu, approximate=True),
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}
NORMS = ('layer', 'rms')
# Where a block has norms: of what a branch reads ('before'), of what it gives ('after'), or of the
# sum with what it gives ('sum', as the first transformers and BERT).
PLACES = (('before',), ('after',), ('before', 'after'), ('sum',))
POOLERS = ('', 'tanh', 'activation_norm')
SCALINGS = ('default', 'linear', 'llama3')


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021, section 3.2), the halves of a head as pairs.

    Attributes:
      base: the wavelengths are 2 pi base^(2 i / E).
      scaling: one of `SCALINGS`: as they are; all frequencies divided by `factor` (Chen et al.
        2023); or those of long wavelengths only (Llama 3.1: Grattafiori et al. 2024).
      factor: see above.
      low, high: of 'llama3': wavelengths longer than `positions / low` are scaled, shorter than
        `positions / high` are not, those between in part.
      positions: of 'llama3': how many the model was trained with at first.

    Raises:
      ValueError: an unknown scaling, or a number that is not positive.
    """

    base: float
    scaling: str = 'default'
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    positions: int = 8192

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ValueError(f'rotary scaling {self.scaling!r}, expected one of {SCALINGS}')
        for field in ('base', 'factor', 'low', 'high', 'positions'):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f'rotary {field}={value!r}, expected a positive number')
        if self.scaling == 'llama3' and not self.low < self.high:
            raise ValueError(f'rotary low={self.low}, expected less than high={self.high}')

    def frequencies(self, size: int) -> np.ndarray:
        """[size / 2] float32, radians a position."""
        # float32 throughout, as the models were trained with.
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        plain = np.float32(1) / np.float32(self.base) ** exponents
        if self.scaling == 'default':
            return plain
        if self.scaling == 'linear':
            return plain / np.float32(self.factor)
        turns = self.positions * plain / (2 * np.pi)  # over all those positions
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return (plain * (kept + (1 - kept) / self.factor)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the attention of a block has of its own.

    Attributes:
      rotary: position embedding of queries and keys; None: none.
      window: see `attention.attention_mask`; 0: none.

    Raises:
      ValueError: a window that is negative or no integer.
    """

    rotary: Rotary | None = None
    window: int = 0

    def __post_init__(self):
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise ValueError(f'window={self.window!r}, expected an integer that is not negative')


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a transformer computes.

    Attributes:
      vocab_size: V.
      max_positions: tokens of the longest dialogue.
      hidden_size: D.
      num_layers: blocks.
      num_heads, num_kv_heads, head_dim: H, G and E; H * E need not be D.
      intermediate_size: F.
      activation: one of `ACTIVATIONS`.
      gated: the perceptron is down(activation(gate x) * up x) (Shazeer 2020), not
        down(activation(up x)).
      norm: one of `NORMS`; RMS norms (Zhang & Sennrich 2019) have no mean and no bias.
      norm_epsilon: added to the variance.
      norm_offset: added to the scale that is stored (Gemma stores it less 1).
      norm_rounds: RMS norms are rounded to the compute dtype before they are scaled (Llama), not
        after (Gemma); the same in float32.
      norm_places: one of `PLACES`.
      norm_bias: layer norms have one.
      first_norm: the first block has a norm before its attention (ModernBERT has none).
      final_norm: there is one after the last block.
      embedding_norm: there is one after the embedding.
      embedding_scale: factor of the embedding, rounded to the compute dtype.
      learned_positions: a table of positions is added to the embedding.
      token_types: rows of a table, the first of which is added to the embedding; 0: no table.
      qkv_bias, output_bias, mlp_bias: of the attention's first and second projections, and of the
        perceptron's.
      query_key_norm: '', 'head' (RMS norm of each head's queries and keys), or 'projection' (of
        all heads' together).
      attention_scale: of the logits; 0: 1 / sqrt(E).
      attention_cap, logit_cap: soft caps of attention logits and of the vocabulary's; 0: none.
      layers: one for each block; a shorter tuple repeats.
      causal: a decoder; else tokens see the whole dialogue.
      tied: the output embedding is the input embedding.
      pooler: what is between the last hidden state that is read and the head: '', 'tanh' (a dense
        layer with bias and tanh, as BERT), or 'activation_norm' (as ModernBERT).
      pooler_bias: the 'activation_norm' pooler's dense layer has one.
      initializer_range: standard deviation of initial parameters.

    Raises:
      ValueError: names the field that cannot be.
    """

    vocab_size: int
    max_positions: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: str = 'silu'
    gated: bool = False
    norm: str = 'rms'
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    norm_rounds: bool = False
    norm_places: tuple[str, ...] = ('before',)
    norm_bias: bool = False
    first_norm: bool = True
    final_norm: bool = True
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    learned_positions: bool = False
    token_types: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: str = ''
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    layers: tuple[Layer, ...] = (Layer(),)
    causal: bool = True
    tied: bool = True
    pooler: str = ''
    pooler_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        for field in ('vocab_size', 'max_positions', 'hidden_size', 'num_layers', 'num_heads',
                      'num_kv_heads', 'head_dim', 'intermediate_size'):
            size = getattr(self, field)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f'{field}={size!r}, expected a positive integer')
        for field, choices in (('activation', sorted(ACTIVATIONS)), ('norm', NORMS),
                               ('norm_places', PLACES), ('pooler', POOLERS),
                               ('query_key_norm', ('', 'head', 'projection'))):
            if getattr(self, field) not in choices:
                raise ValueError(f'{field}={getattr(self, field)!r}, expected one of {choices}')
        for field in ('norm_epsilon', 'norm_offset', 'embedding_scale', 'attention_scale',
                      'attention_cap', 'logit_cap', 'initializer_range'):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f'{field}={value!r}, expected a number that is not negative')
        types = self.token_types
        if isinstance(types, bool) or not isinstance(types, int) or types < 0:
            raise ValueError(f'token_types={types!r}, expected an integer that is not negative')
        for field in ('gated', 'norm_rounds', 'norm_bias', 'first_norm', 'final_norm',
                      'embedding_norm', 'learned_positions', 'qkv_bias', 'output_bias', 'mlp_bias',
                      'causal', 'tied', 'pooler_bias'):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f'{field}={getattr(self, field)!r}, expected true or false')
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f'num_heads={self.num_heads} is not divisible by '
                             f'num_kv_heads={self.num_kv_heads}')
        if not 1 <= len(self.layers) <= self.num_layers:
            raise ValueError(f'layers describe {len(self.layers)} blocks, expected 1 to '
                             f'num_layers={self.num_layers}')
        rotary = [layer.rotary is not None for layer in self.layers]
        if any(rotary) != all(rotary):
            raise ValueError('layers with and without rotary positions, expected all or none')
        if any(rotary) and self.head_dim % 2:
            raise ValueError(f'head_dim={self.head_dim}, expected an even number for rotary '
                             'positions')

    @property
    def parts(self) -> Mapping[str, tuple[int, ...]]:
        """Sizes of what a joined projection gives: queries, keys and values; gate and up."""
        keys = self.num_kv_heads * self.head_dim
        return {'qkv': (self.num_heads * self.head_dim, keys, keys),
                'up': (self.intermediate_size,) * (2 if self.gated else 1)}

    def layer(self, i: int) -> Layer:
        """That of block i."""
        return self.layers[i % len(self.layers)]


class Leaf(NamedTuple):
    """Shape of a parameter, and what it starts as: 'normal', 'residual', 'zeros' or 'ones'."""

    shape: tuple[int, ...]
    start: str


def leaves(a: Architecture, *, output: bool = False) -> dict[str, Leaf]:
    """All parameters by path, those of the blocks stacked along a leading axis.

    Args:
      a: architecture.
      output: with an output embedding of its own, if it has one.
    """
    d, inner = a.hidden_size, a.num_heads * a.head_dim
    one = 'zeros' if a.norm_offset else 'ones'

    def norm(name: str, size: int = d, bias: bool = a.norm_bias) -> dict[str, Leaf]:
        found = {f'{name}/scale': Leaf((size,), one)}
        return found | ({f'{name}/bias': Leaf((size,), 'zeros')} if bias else {})

    def dense(name: str, shape: tuple[int, int], bias: bool, start: str = 'normal'):
        found = {f'{name}/kernel': Leaf(shape, start)}
        return found | ({f'{name}/bias': Leaf(shape[1:], 'zeros')} if bias else {})

    block = dense('attention/qkv', (d, sum(a.parts['qkv'])), a.qkv_bias)
    block |= dense('attention/output', (inner, d), a.output_bias, 'residual')
    block |= dense('mlp/up', (d, sum(a.parts['up'])), a.mlp_bias)
    block |= dense('mlp/down', (a.intermediate_size, d), a.mlp_bias, 'residual')
    for branch in ('attention', 'mlp'):
        if 'before' in a.norm_places:
            block |= norm(f'{branch}_norm')
        if a.norm_places != ('before',):
            block |= norm(f'{branch}_out_norm')
    if a.query_key_norm:
        whole = a.query_key_norm == 'projection'
        for name, heads in (('query', a.num_heads), ('key', a.num_kv_heads)):
            block |= norm(f'attention/{name}_norm', a.head_dim * (heads if whole else 1), False)
    found = {'tokens': Leaf((a.vocab_size, d), 'normal')}
    if a.learned_positions:
        found['positions'] = Leaf((a.max_positions, d), 'normal')
    if a.token_types:
        found['types'] = Leaf((a.token_types, d), 'normal')
    if a.embedding_norm:
        found |= norm('embedding_norm')
    found |= {f'blocks/{name}': Leaf((a.num_layers, *leaf.shape), leaf.start)
              for name, leaf in block.items()}
    if a.final_norm:
        found |= norm('norm')
    if a.pooler:
        found |= dense('pooler/dense', (d, d), a.pooler == 'tanh' or a.pooler_bias)
        if a.pooler == 'activation_norm':
            found |= norm('pooler/norm')
    if output and not a.tied:
        found['output'] = Leaf((a.vocab_size, d), 'normal')
    return found


def leaf_dtype(path: str, dtype: str) -> np.dtype:
    """Dtype of a parameter where tables and the blocks' kernels are in `dtype`; else float32."""
    narrow = path in ('tokens', 'positions', 'output') or (
        path.startswith('blocks/') and path.endswith('/kernel'))
    return jnp.dtype(dtype if narrow else 'float32')


def tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of what is given by path."""
    result: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split('/')
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return result


def flat(params: Any) -> dict[str, Any]:
    """Leaves of nested dicts by path, the inverse of `tree`."""
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
