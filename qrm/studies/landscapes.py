"""The loss of a pair over the rewards of both sides: where an objective pulls them, and how hard.

Both sides have one shape of distribution, a Gaussian or its ten quantiles, with standard deviation
1, which their rewards r_c and r_r move, so that objectives on scalars and on distributions stand
beside each other. Axes: G points of each reward.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from qrm.rewards import losses
from qrm.rewards.heads import HeadConfig
from qrm.rewards.losses import Judgement, LossConfig

REWARDS = np.linspace(-4.0, 4.0, 81)  # of both sides

_PAPER = 'bradley_terry_quantile_huber'
OBJECTIVES = {
    'Bradley-Terry': LossConfig('bradley_terry'),
    'Bradley-Terry, 10% of labels smoothed': LossConfig('bradley_terry', label_smoothing=0.1),
    'Bradley-Terry, centred (weight .125)': LossConfig('bradley_terry', centre_weight=0.125),
    '+ quantile Huber, ±1, λ = .1': LossConfig(_PAPER),
    '+ quantile Huber, ±1, λ = 1': LossConfig(_PAPER, huber_weight=1.0),
    '+ quantile Huber, other side ±1, λ = 1': LossConfig(
        _PAPER, targets='margin', huber_weight=1.0),
    'distributional Bradley-Terry': LossConfig('distributional_bradley_terry'),
    "Thurstone's law": LossConfig('thurstone'),
    "Thurstone's law, both rated between two anchors": LossConfig(
        'thurstone', thresholds=(-1.0, 1.0)),
}


class Surface(NamedTuple):
    """A loss over rewards.

    Attributes:
      loss: [G, G] nats, by r_r and r_c.
      slopes: [G, G, 2] of it with r_c and r_r, as training has them: none flows into targets.
    """

    loss: np.ndarray
    slopes: np.ndarray


def surface(config: LossConfig) -> Surface:
    """The loss of a pair, the first side preferred, over `REWARDS` of both."""
    gaussian = 'quantile' not in losses.OBJECTIVES[config.objective].heads
    head = HeadConfig('gaussian' if gaussian else 'quantile')
    known = Judgement(
        jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.float32(0.0),
        jnp.full((2, 1), 0.0 if config.thresholds else jnp.nan), jnp.int32(-1))
    levels = ndtri(jnp.asarray(head.taus))
    unit = head.read(jnp.zeros((2, 2)) if gaussian else jnp.stack([levels, levels]))

    def loss(rewards: jax.Array) -> jax.Array:
        """Of r_c and r_r, [2]."""
        moved = unit._replace(parts=unit.parts.scale_and_shift(
            1.0 / unit.parts.std, rewards[:, None, None]))
        return losses.comparison_loss(config, moved, known)

    chosen, rejected = np.meshgrid(REWARDS, REWARDS)
    points = jnp.asarray(np.stack([chosen, rejected], axis=-1).reshape(-1, 2), jnp.float32)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(loss)))(points)
    return Surface(np.asarray(values).reshape(chosen.shape),
                   np.asarray(slopes).reshape(*chosen.shape, 2))
