"""Rewards in use: as a head gives them, or less a mean and divided by a standard deviation.

Preferences leave the offset of rewards open, and how far apart they lie says how well they could be
told apart. Whoever adds a reward to something else wants known units, so a model can be normalised:
the rewards of a reference set then have mean 0 and standard deviation 1. That is a map of whole
distributions, (R - mean) / std, so that quantiles, standard deviations, CVaRs and samples move with
the mean. Objectives, win probabilities and calibration are of raw rewards: how likely the higher of
two wins depends on their scale, which is learnt.

Axes: R responses, N quantiles; `...` any leading axes.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from qrm.rewards.distributions import Distribution
from qrm.rewards.heads import HeadConfig

_ROUNDING = 1e-5  # of the largest reward, below which differences are those of float32


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """What rewards are normalised by.

    Attributes:
      mean: that is subtracted, in units of raw rewards.
      std: that the rest is divided by, in the same units.

    Raises:
      ValueError: one of them is no number that float32 can subtract or divide by.
    """

    mean: float
    std: float

    def __post_init__(self):
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool)
                      for x in (self.mean, self.std))
        smallest, largest = float(np.finfo('f4').tiny), float(np.finfo('f4').max)
        if not (numbers and abs(self.mean) <= largest and smallest <= self.std <= 1.0 / smallest
                and abs(self.mean) / self.std <= largest):
            raise ValueError(f'mean={self.mean!r} and std={self.std!r}, expected numbers, std '
                             'above 0, whose quotient a float holds')

    def __str__(self):
        sign = '+' if self.mean < 0 else '-'
        return f'(reward {sign} {abs(self.mean):g}) / {self.std:g}'

    def as_dict(self) -> dict[str, float]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    def values(self, raw: Any) -> Any:
        """Raw rewards or quantiles [...], normalised."""
        # Subtracted first: far from 0 the quotients of two near numbers would lose more.
        return (raw - self.mean) * (1.0 / self.std)

    def distribution(self, raw: Distribution) -> Distribution:
        """A distribution [...] of raw rewards, normalised."""
        return raw.scale_and_shift(1.0, -self.mean).scale_and_shift(1.0 / self.std, 0.0)


@dataclasses.dataclass(frozen=True)
class Rewards:
    """What raw outputs of a head stand for in use.

    Attributes:
      head: which gave the outputs.
      outputs: [..., outputs] from `heads.apply`.
      normalisation: None: rewards are raw.
    """

    head: HeadConfig
    outputs: jax.Array
    normalisation: Normalisation | None

    @property
    def distribution(self) -> Distribution:
        """Distribution [...] of the reward."""
        return self._in_use(self.head.read(self.outputs).distribution)

    @property
    def members(self) -> Distribution:
        """Distribution [..., E] of the reward, by each member of the head."""
        return self._in_use(self.head.read(self.outputs).members)

    @property
    def quantiles(self) -> jax.Array:
        """[..., N] at `HeadConfig.taus`, see `HeadConfig.quantiles`."""
        raw = self.head.quantiles(self.outputs)
        return self.normalisation.values(raw) if self.normalisation else raw

    def _in_use(self, raw: Distribution) -> Distribution:
        return self.normalisation.distribution(raw) if self.normalisation else raw


def measure(rewards: np.ndarray) -> Normalisation:
    """By what these rewards are normalised: they then have mean 0 and standard deviation 1.

    The standard deviation is that of these responses, the root mean square distance to their mean.

    Args:
      rewards: [R] raw rewards.

    Raises:
      ValueError: fewer than two rewards, some that are not finite, or all equal but for rounding.
    """
    rewards = np.asarray(rewards, np.float64)
    if len(rewards) < 2:
        raise ValueError(f'{len(rewards)} response{"s" * (len(rewards) != 1)}, expected at least '
                         'two, which rewards can differ between')
    if wrong := int(np.sum(~np.isfinite(rewards))):
        raise ValueError(f'{wrong} of {len(rewards)} rewards are not finite')
    mean, std = float(rewards.mean()), float(rewards.std())
    if std <= _ROUNDING * np.abs(rewards).max():
        raise ValueError(f'{len(rewards)} responses with the same reward, {mean:g}, expected some '
                         'that differ: there is no scale to divide by')
    return Normalisation(mean, std)
