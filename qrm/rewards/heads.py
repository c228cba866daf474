"""Reward heads: from the hidden state at the reward position to a distribution of the reward.

Axes: N quantiles or atoms, E ensemble members, A attributes, D features; `...` stands for any
leading axes, usually [C, K]. Heads compute in float32 and have no bias: a constant added to all
rewards changes no preference, and a linear head is then exactly the `score.weight` of a Hugging
Face sequence classifier.

A head is two pure functions: `apply` gives raw numbers for each response, which is all that
leaves a device, and `HeadConfig.read` says what distribution they stand for.
"""

import dataclasses
import functools
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
# one reward for each known annotator.
QUANTILE_HEADS = ('quantile', 'monotone_quantile', 'implicit_quantile')
HEADS = ('scalar', 'gaussian', 'categorical', *QUANTILE_HEADS, 'annotator')
_MIN_SCALE = 1e-3  # of a Gaussian, in units of reward: scores divide by it


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


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Which head, and its size.

    Attributes:
      name: one of `HEADS`.
      num_quantiles: N of the quantile heads; for all but one scalar, how many quantiles are
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
        for key in ('attributes', 'annotators'):
            names = tuple(getattr(self, key))
            object.__setattr__(self, key, names)
            if len(set(names)) < len(names):
                raise ValueError(f'{key} {names}, expected different names')
        if self.gated and self.name in ('categorical', 'annotator'):
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
    def outputs(self) -> int:
        """Numbers the head gives for each response."""
        gates = len(self.attributes) if self.gated else 0
        return self.members * (self._parts * self._numbers + gates)

    @property
    def taus(self) -> np.ndarray:
        """[N] float32, levels of the quantiles that are reported for a response."""
        return taus(1 if self.name == 'scalar' and self.members == 1 else self.num_quantiles)

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
            # Not `taus`: several scalars are reported as quantiles, but each has one atom.
            number = 1 if self.name == 'scalar' else self.num_quantiles
            levels = jnp.asarray(taus(number), raw.dtype)
        levels = jnp.broadcast_to(levels, (*outputs.shape[:-1], levels.shape[-1]))
        return Reward(self._distribution(raw), gates, levels)

    def quantiles(self, outputs: jax.Array) -> jax.Array:
        """Quantiles [..., N] at `taus`, of a single quantile head as it gives them.

        Those of a free head may cross; those of all other distributions are in order.
        """
        reward = self.read(outputs)
        if self.members == 1 and self.name in ('scalar', *QUANTILE_HEADS):
            return reward.distribution.values
        return reward.distribution.quantile(jnp.asarray(self.taus))

    @property
    def _parts(self) -> int:
        return max(1, len(self.attributes))

    @property
    def _numbers(self) -> int:
        """Numbers for each attribute and member."""
        return {'scalar': 1, 'gaussian': 2, 'categorical': self.num_atoms,
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
        c, width = self.config, hidden.shape[-1]
        # N(0, 1 / (D + 1)): rewards start with a standard deviation of about 1 (Stiennon et al.
        # 2020), which the norm before the head makes independent of the backbone's width.
        init = nn.initializers.normal(1.0 / math.sqrt(width + 1))
        hidden = hidden.astype(jnp.float32)
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
        if c.gated:
            # Attributes start with equal weights.
            gate = self.param('gate', nn.initializers.zeros, (width, len(c.attributes)))
            gates = _matmul('...d,da->...a', prompt.astype(jnp.float32), gate)
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


# Full precision, where an accelerator would round the factors to TF32 or bfloat16.
_matmul = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def init(config: HeadConfig, key: jax.Array, width: int) -> dict[str, jax.Array]:
    """Random parameters for hidden states of D = `width`; of several members stacked [E, ...]."""
    hidden = jnp.zeros((1, width))
    return _module(config).init(key, hidden, hidden, jnp.asarray(config.taus))['params']


def apply(
    config: HeadConfig,
    params: dict[str, jax.Array],
    hidden: jax.Array,
    *,
    prompt: jax.Array | None = None,
    levels: jax.Array | None = None,
) -> jax.Array:
    """Raw outputs of the head, to be read by `HeadConfig.read`.

    Args:
      config: which head.
      params: from `init`.
      hidden: [..., D] at the end of each response.
      prompt: [..., D] at the end of its prompt; read by a gate only.
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
