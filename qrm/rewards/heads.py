"""Reward heads: from the hidden state at the reward position to a distribution of the reward.

Axes: N quantiles or atoms, E ensemble members, A attributes, D features; `...` stands for any
leading axes, usually [C, K]. Heads compute in float32 and have no bias of their own accord: a
constant added to all rewards changes no preference, and a linear head is then exactly the
`score.weight` of a Hugging Face sequence classifier.

A head is two pure functions: `apply` gives raw numbers for each response, which is all that
leaves a device, and `HeadConfig.read` says what distribution they stand for.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qrm.rewards import distributions
from qrm.rewards.distributions import Atoms, Distribution, Gaussians

# 'gaussian' and 'categorical' as in Siththaranjan et al. 2023 (DPL), 'quantile' as in QR-DQN
# (Dabney et al. 2018a), 'implicit_quantile' as in IQN (Dabney et al. 2018b). 'annotator' gives
# one reward for each known annotator. 'pairwise' reads two responses in one order, and gives half
# of the log odds that the first is preferred, so that two orders differ as two rewards do.
QUANTILE_HEADS = ('quantile', 'monotone_quantile', 'implicit_quantile')
HEADS = ('scalar', 'gaussian', 'categorical', *QUANTILE_HEADS, 'annotator', 'pairwise')
_NUMBERS = ('scalar', 'pairwise')  # whose members give a number, not a distribution
_MIN_SCALE = 1e-3  # of a Gaussian, in units of reward: scores divide by it


# Where hidden states can be read: at the last token of a dialogue, at its first one (CLS of an
# encoder), or as their mean over the tokens of the response or of the whole dialogue.
PLACES = ('last', 'first', 'mean', 'dialogue')


class Read(NamedTuple):
    """What a head reads of the backbone.

    Attributes:
      place: one of `PLACES`.
      block: after how many blocks; None: after the last one and the final norm.
    """

    place: str
    block: int | None


class Reward(NamedTuple):
    """What a head says of a response.

    Attributes:
      parts: distribution with axes [..., E, A]: of each attribute, by each member.
      gates: [..., E, A] weights of the attributes in the reward; they sum to 1 over A.
      taus: [..., N] levels at which the atoms of a quantile head stand.
    """

    parts: Distribution
    gates: jax.Array
    taus: jax.Array

    @property
    def members(self) -> Distribution:
        """Distribution with axes [..., E]: of the reward, by each member.

        The reward is sum_a gate_a r_a with attributes that rise together (comonotone): quantiles
        add up as the attributes do.
        """
        gates = self.gates[..., None]
        if isinstance(self.parts, Gaussians):
            weights, means, scales = self.parts
            return Gaussians(weights[..., 0, :], jnp.sum(gates * means, axis=-2),
                             jnp.sum(gates * scales, axis=-2))
        values, weights = self.parts
        return Atoms(jnp.sum(gates * values, axis=-2), weights[..., 0, :])

    @property
    def distribution(self) -> Distribution:
        """Distribution [...] of the reward: the members' in equal parts."""
        return distributions.pool(self.members)


def taus(n: int) -> np.ndarray:
    """Quantile midpoints tau_i = (i + 0.5) / N (Dabney et al. 2018a, Lemma 2), [N] float32."""
    return ((np.arange(n) + 0.5) / n).astype(np.float32)


def parse_read(text: str) -> Read:
    """Of 'last', 'mean@20' (after 20 blocks), ...

    Raises:
      ValueError: it is none.
    """
    place, at, block = text.partition('@') if isinstance(text, str) else ('', '', '')
    if place not in PLACES or (at and not (block.isdecimal() and int(block))):
        raise ValueError(f"reads {text!r}, expected one of {PLACES}, or with '@' and a number of "
                         "blocks, as 'mean@20'")
    return Read(place, int(block) if at else None)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Which head, and its size.

    Attributes:
      name: one of `HEADS`.
      num_quantiles: N of the quantile heads; for all but a single number, how many quantiles are
        reported.
      num_atoms: atoms of the categorical head, evenly spaced.
      atom_range: the categorical head's atoms span [-atom_range, atom_range], units of reward.
      num_cosines: cosines of tau that the implicit quantile head reads (IQN, eq. 4).
      num_factors: numbers in which annotators differ (annotator head).
      members: E, heads with parameters of their own on one backbone. They are trained each by
        itself; as they share the backbone, their disagreement shows less than that of whole
        networks.
      attributes: names of the attributes that are rated; () or one: the reward itself is.
      annotators: names of the known annotators (annotator head), in the order of its atoms.
      reads: what of the backbone, see `parse_read`; of several, one after the other.
      bias: whether a linear head has one, as classifiers of other libraries may.
      hidden_layers: widths of layers with ReLU between what is read and the head.
      gate_layers: widths of such layers of the gate.
      levels: of the quantiles of a quantile head, if they are not the midpoints.

    Raises:
      ValueError: unknown name, a size below 1, or a combination that has no meaning.
    """

    name: str
    num_quantiles: int = 10
    num_atoms: int = 21
    atom_range: float = 5.0
    num_cosines: int = 64
    num_factors: int = 1
    members: int = 1
    attributes: tuple[str, ...] = ()
    annotators: tuple[str, ...] = ()
    reads: tuple[str, ...] = ('last',)
    bias: bool = False
    hidden_layers: tuple[int, ...] = ()
    gate_layers: tuple[int, ...] = ()
    levels: tuple[float, ...] = ()

    def __post_init__(self):
        if self.name not in HEADS:
            raise ValueError(f'head {self.name!r}, expected one of {HEADS}')
        for key, least in (('num_quantiles', 1), ('num_atoms', 2), ('num_cosines', 1),
                           ('num_factors', 1), ('members', 1)):
            if getattr(self, key) < least:
                raise ValueError(f'{key}={getattr(self, key)}, expected at least {least}')
        if not 0 < self.atom_range < math.inf:
            raise ValueError(f'atom_range={self.atom_range}, expected a finite positive number')
        # Saved configs come back with lists.
        for key in ('attributes', 'annotators', 'reads', 'hidden_layers', 'gate_layers', 'levels'):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for key in ('attributes', 'annotators', 'reads'):
            names = getattr(self, key)
            if len(set(names)) < len(names):
                raise ValueError(f'{key} {names}, expected different names')
        for key in ('hidden_layers', 'gate_layers'):
            if any(width < 1 for width in getattr(self, key)):
                raise ValueError(f'{key} {getattr(self, key)}, expected positive widths')
        if self.gate_layers and not self.gated:
            raise ValueError('gate_layers without several attributes, which a gate would weigh')
        if self.levels:
            rising = (0.0, *self.levels, 1.0)
            if self.name not in ('quantile', 'monotone_quantile'):
                raise ValueError(f'levels with the {self.name} head, expected a quantile head')
            if len(self.levels) != self.num_quantiles or any(
                    not a < b for a, b in itertools.pairwise(rising)):
                raise ValueError(f'levels {self.levels}, expected num_quantiles='
                                 f'{self.num_quantiles} of them, rising between 0 and 1')
        if not self.reads:
            raise ValueError('reads (), expected at least one')
        for text in self.reads:
            parse_read(text)
        if self.bias and self.name in ('annotator', 'implicit_quantile'):
            raise ValueError(f'a bias with the {self.name} head, which has none')
        if self.gated and self.name in ('categorical', 'annotator', 'pairwise'):
            raise ValueError(f'{len(self.attributes)} attributes with the {self.name} head, '
                             'expected a scalar, gaussian or quantile head')
        if (self.name == 'annotator') != bool(self.annotators):
            raise ValueError(f'{len(self.annotators)} annotators with the {self.name} head, '
                             "expected some with the 'annotator' head and none with others")

    @property
    def gated(self) -> bool:
        """Whether a gate weighs several attributes; it reads the hidden state of the prompt."""
        return len(self.attributes) > 1

    @property
    def pairwise(self) -> bool:
        """Whether it reads two responses together, and none alone."""
        return self.name == 'pairwise'

    @property
    def sizes_prompts(self) -> bool:
        """Whether it must be known where in a dialogue its response starts."""
        return self.gated or any(parse_read(text).place == 'mean' for text in self.reads)

    @property
    def outputs(self) -> int:
        """Numbers the head gives for each response."""
        gates = len(self.attributes) if self.gated else 0
        return self.members * (self._parts * self._numbers + gates)

    @property
    def taus(self) -> np.ndarray:
        """[N] float32, levels of the quantiles that are reported for a response."""
        if self.levels:
            return np.asarray(self.levels, np.float32)
        return taus(1 if self.name in _NUMBERS and self.members == 1 else self.num_quantiles)

    def read(self, outputs: jax.Array, levels: jax.Array | None = None) -> Reward:
        """What raw outputs stand for.

        Args:
          outputs: [..., `outputs`] from `apply`.
          levels: [..., N] the levels `apply` was given; None: the midpoints.
        """
        chex.assert_axis_dimension(outputs, -1, self.outputs)
        each = outputs.reshape(*outputs.shape[:-1], self.members, -1)
        raw, gates = jnp.split(each, [self._parts * self._numbers], axis=-1)
        raw = raw.reshape(*raw.shape[:-1], self._parts, self._numbers)
        gates = jax.nn.softmax(gates) if self.gated else jnp.ones(raw.shape[:-1], raw.dtype)
        if levels is None:
            # Several scalars are reported as quantiles, but each has one atom.
            levels = jnp.asarray(taus(1) if self.name in _NUMBERS else self.taus, raw.dtype)
        levels = jnp.broadcast_to(levels, (*outputs.shape[:-1], levels.shape[-1]))
        return Reward(self._distribution(raw), gates, levels)

    def quantiles(self, outputs: jax.Array) -> jax.Array:
        """Quantiles [..., N] at `taus`, of a single quantile head as it gives them.

        Those of a free head may cross; those of all other distributions are in order.
        """
        reward = self.read(outputs)
        if self.members == 1 and self.name in (*_NUMBERS, *QUANTILE_HEADS):
            return reward.distribution.values
        return reward.distribution.quantile(jnp.asarray(self.taus))

    @property
    def _parts(self) -> int:
        return max(1, len(self.attributes))

    @property
    def _numbers(self) -> int:
        """Numbers for each attribute and member."""
        return {'scalar': 1, 'pairwise': 1, 'gaussian': 2, 'categorical': self.num_atoms,
                'annotator': len(self.annotators)}.get(self.name, self.num_quantiles)

    def _distribution(self, raw: jax.Array) -> Distribution:
        if self.name == 'gaussian':
            mean, width = raw[..., :1], raw[..., 1:]
            return Gaussians(jnp.ones_like(mean), mean, _MIN_SCALE + jax.nn.softplus(width))
        if self.name == 'categorical':
            support = jnp.linspace(-self.atom_range, self.atom_range, self.num_atoms,
                                   dtype=raw.dtype)
            return Atoms(jnp.broadcast_to(support, raw.shape), jax.nn.softmax(raw))
        if self.name == 'monotone_quantile':
            raw = monotone_quantiles(raw)
        return distributions.uniform_atoms(raw)


class Head(nn.Module):
    """One member of a head, see `apply`."""

    config: HeadConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, prompt: jax.Array | None,
                 levels: jax.Array | None) -> jax.Array:
        c, hidden = self.config, hidden.astype(jnp.float32)
        hidden = _through(c.hidden_layers, 'hidden', hidden)
        width = hidden.shape[-1]
        # N(0, 1 / (D + 1)): rewards start with a standard deviation of about 1 (Stiennon et al.
        # 2020), which the norm before the head makes independent of the backbone's width.
        init = nn.initializers.normal(1.0 / math.sqrt(width + 1))
        if c.name == 'implicit_quantile':
            outputs = self._at_levels(hidden, levels, init)
        elif c.name == 'annotator':
            kernel = self.param('kernel', init, (width, 1 + c.num_factors))
            common, factors = jnp.split(_matmul('...d,dn->...n', hidden, kernel), [1], axis=-1)
            own = self.param('annotators', nn.initializers.normal(1.0 / math.sqrt(c.num_factors)),
                             (len(c.annotators), c.num_factors))
            outputs = common + _matmul('...f,af->...a', factors, own)
        else:
            kernel = self.param('kernel', init, (width, c._parts * c._numbers))
            outputs = _matmul('...d,dn->...n', hidden, kernel)
            if c.bias:
                outputs += self.param('bias', nn.initializers.zeros, kernel.shape[1:])
        if c.gated:
            prompt = _through(c.gate_layers, 'gate', prompt.astype(jnp.float32))
            # Attributes start with equal weights.
            gate = self.param('gate', nn.initializers.zeros,
                              (prompt.shape[-1], len(c.attributes)))
            gates = _matmul('...d,da->...a', prompt, gate)
            if c.gate_layers:
                gates += self.param('gate_bias', nn.initializers.zeros, gate.shape[1:])
            outputs = jnp.concatenate([outputs, gates], axis=-1)
        return outputs

    def _at_levels(self, hidden: jax.Array, levels: jax.Array, init: Any) -> jax.Array:
        """Values [..., A * N] at levels [..., N]: IQN, eq. 4, with a linear map after it."""
        c, width = self.config, hidden.shape[-1]
        kernel = self.param('kernel', init, (width, c._parts))
        cosines = self.param('cosines', nn.initializers.normal(math.sqrt(2.0 / c.num_cosines)),
                             (c.num_cosines, width))
        bias = self.param('bias', nn.initializers.zeros, (width,))
        waves = jnp.cos(math.pi * jnp.arange(c.num_cosines) * levels[..., None])
        embedded = jax.nn.relu(_matmul('...i,id->...d', waves, cosines) + bias)
        values = _matmul('...nd,da->...an', hidden[..., None, :] * embedded, kernel)
        return values.reshape(*values.shape[:-2], -1)


def _through(widths: tuple[int, ...], name: str, x: jax.Array) -> jax.Array:
    """x [..., D] through layers with ReLU."""
    for i, width in enumerate(widths):
        layer = nn.Dense(width, precision=jax.lax.Precision.HIGHEST, name=f'{name}_{i}',
                         kernel_init=nn.initializers.he_normal())
        x = jax.nn.relu(layer(x))
    return x


# Full precision, where an accelerator would round the factors to TF32 or bfloat16.
_matmul = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def init(config: HeadConfig, key: jax.Array, width: int) -> dict[str, Any]:
    """Random parameters for a backbone of `width`; of several members stacked [E, ...]."""
    hidden, prompt = jnp.zeros((1, width * len(config.reads))), jnp.zeros((1, width))
    return _module(config).init(key, hidden, prompt, jnp.asarray(config.taus))['params']


def standardise(
    config: HeadConfig, params: dict[str, Any], hidden: jax.Array, std: float
) -> dict[str, Any]:
    """Initial parameters for hidden states of the kind given: outputs vary as much as is asked.

    `init` draws kernels for hidden states of independent features of mean 0. Those of pretrained
    models at the end of a text are nearly alike: outputs hardly vary, around a number far from 0.
    So kernels are made orthogonal to the mean hidden state, which takes that number away, and
    scaled. A linear head then has outputs of mean 0; of others only the scale is adjusted.

    Args:
      config: which head.
      params: from `init`.
      hidden: [n, W], what is read of n responses, n > 1.
      std: root mean square deviation of the outputs of a response from their means.

    Returns:
      The parameters with another kernel; the same if hidden states do not vary at all.
    """
    kernel = params['kernel']
    if config.name != 'implicit_quantile' and not config.hidden_layers:
        mean = jnp.mean(hidden, axis=0)
        along = _matmul('w,...wn->...n', mean, kernel) / jnp.maximum(jnp.sum(mean**2), 1e-12)
        kernel = kernel - mean[:, None] * along[..., None, :]
    prompts = None
    if config.gated:
        prompts = jnp.zeros((len(hidden), params.get('gate_0', {'kernel': params['gate']})[
            'kernel'].shape[-2]))
    outputs = apply(config, params | {'kernel': kernel}, hidden, prompt=prompts)
    each = outputs.reshape(len(hidden), config.members, -1)[..., :config._parts * config._numbers]
    spread = jnp.sqrt(jnp.mean(jnp.var(each, axis=0)))
    return params | {'kernel': jnp.where(spread > 0, kernel * std / spread, kernel)}


def apply(
    config: HeadConfig,
    params: dict[str, Any],
    hidden: jax.Array,
    *,
    prompt: jax.Array | None = None,
    levels: jax.Array | None = None,
) -> jax.Array:
    """Raw outputs of the head, to be read by `HeadConfig.read`.

    Args:
      config: which head.
      params: from `init`.
      hidden: [..., D], what is read of each response.
      prompt: [..., D'] at the end of its prompt; read by a gate only.
      levels: [..., N] at which an implicit quantile head is asked; None: the midpoints.

    Returns:
      [..., `config.outputs`] float32.
    """
    if levels is None:
        levels = jnp.asarray(config.taus)
    outputs = _module(config).apply({'params': params}, hidden, prompt, levels)
    return outputs.reshape(*hidden.shape[:-1], config.outputs)


def random_levels(key: jax.Array, shape: tuple[int, ...], n: int) -> jax.Array:
    """Levels [*shape, N] to train an implicit quantile head at: one from each N-th of (0, 1).

    IQN draws them independently; stratified, they are uniform too, and the mean over them, which
    is the reward, varies less.
    """
    return (jnp.arange(n) + jax.random.uniform(key, (*shape, n))) / n


def monotone_quantiles(outputs: jax.Array) -> jax.Array:
    """Quantiles that cannot cross: a mean and N - 1 positive increments.

    The first output is the mean of the quantiles; the others, through a softplus and divided by
    N, are the distances from each quantile to the next, so that the initial spread does not
    grow with N.

    Args:
      outputs: [..., N].

    Returns:
      [..., N], non-decreasing along the last axis, with mean outputs[..., 0].
    """
    n = outputs.shape[-1]
    steps = jnp.concatenate(
        [jnp.zeros_like(outputs[..., :1]), jax.nn.softplus(outputs[..., 1:]) / n], axis=-1
    )
    rising = jnp.cumsum(steps, axis=-1)
    return outputs[..., :1] + rising - jnp.mean(rising, axis=-1, keepdims=True)


def _module(config: HeadConfig) -> nn.Module:
    if config.members == 1:
        return Head(config)
    ensemble = nn.vmap(Head, variable_axes={'params': 0}, split_rngs={'params': True},
                       in_axes=None, out_axes=-2, axis_size=config.members)
    return ensemble(config)
