"""Reward heads: from the hidden state at the reward position to a reward or its quantiles.

Axes: N quantiles, D features; `...` stands for any leading axes, usually [C, K]. Heads compute in
float32 and have no bias: a constant added to all rewards changes no preference, and a linear
head is then exactly the `score.weight` of a Hugging Face sequence classifier.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

HEADS = ('scalar', 'quantile')


class Reward(NamedTuple):
    """What every head returns.

    Attributes:
      quantiles: [..., N] float32, the values at `taus(N)` in the order of tau, as the head gives
        them (a free head's may cross). A scalar reward is a point mass: N = 1.
    """

    quantiles: jax.Array

    @property
    def mean(self) -> jax.Array:
        """[...] the reward: the mean of the quantiles."""
        return jnp.mean(self.quantiles, axis=-1)


def taus(n: int) -> np.ndarray:
    """Quantile midpoints tau_i = (i + 0.5) / N (Dabney et al. 2018, Lemma 2), [N] float32."""
    return ((np.arange(n) + 0.5) / n).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Which head, and its size.

    Attributes:
      name: 'scalar' or 'quantile'.
      num_quantiles: N of the quantile head.
      monotone: quantiles cannot cross.

    Raises:
      ValueError: unknown name, or no quantiles.
    """

    name: str
    num_quantiles: int = 10
    monotone: bool = False

    def __post_init__(self):
        if self.name not in HEADS:
            raise ValueError(f'head {self.name!r}, expected one of {HEADS}')
        if self.num_quantiles < 1:
            raise ValueError(f'num_quantiles={self.num_quantiles}, expected at least 1')

    @property
    def outputs(self) -> int:
        """Numbers the head gives for each response."""
        return self.num_quantiles if self.name == 'quantile' else 1


class Head(nn.Module):
    """A linear map to `outputs` numbers, read as the configured head reads them."""

    config: HeadConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> Reward:
        """[..., D] -> `Reward`."""
        # N(0, 1 / (D + 1)): rewards start with a standard deviation of about 1 (Stiennon et al.
        # 2020), which the norm before the head makes independent of the backbone's width.
        init = nn.initializers.normal(1.0 / math.sqrt(hidden.shape[-1] + 1))
        kernel = self.param('kernel', init, (hidden.shape[-1], self.config.outputs))
        # Full precision, where an accelerator would round the factors to TF32 or bfloat16.
        outputs = jnp.einsum('...d,dn->...n', hidden.astype(jnp.float32), kernel,
                             precision=jax.lax.Precision.HIGHEST)
        if self.config.name == 'quantile' and self.config.monotone:
            outputs = monotone_quantiles(outputs)
        return Reward(outputs)


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
