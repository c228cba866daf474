"""Losses on preference pairs, each for one example; callers `vmap` them.

Axes: K responses, N quantiles. Inputs are float arrays; all losses are in nats or, for the
quantile Huber loss, in units of reward (squared below kappa).
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp

from qrm import heads

OBJECTIVES = ('bradley_terry', 'bradley_terry_quantile_huber', 'distributional_bradley_terry')
TARGETS = ('label', 'margin')


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which objective, and its constants.

    Attributes:
      objective: one of `OBJECTIVES`.
      targets: what the quantile Huber loss regresses on, see `quantile_huber_targets`.
      huber_weight: lambda, the weight of the quantile Huber loss.
      kappa: threshold of the Huber loss.
      lm_weight: weight of the language-model loss on the preferred response (MOSS-RLHF).

    Raises:
      ValueError: an unknown name, kappa <= 0, a negative weight, or one that is not finite.
    """

    objective: str
    targets: str = 'label'
    huber_weight: float = 0.1
    kappa: float = 1.0
    lm_weight: float = 0.0

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f'objective {self.objective!r}, expected one of {OBJECTIVES}')
        if self.targets not in TARGETS:
            raise ValueError(f'targets {self.targets!r}, expected one of {TARGETS}')
        if not 0 < self.kappa < math.inf:
            raise ValueError(f'kappa={self.kappa}, expected a finite positive number')
        if not (0 <= self.huber_weight < math.inf and 0 <= self.lm_weight < math.inf):
            raise ValueError(f'huber_weight={self.huber_weight}, lm_weight={self.lm_weight}, '
                             'expected finite numbers that are not negative')


def bradley_terry(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0):
    """-log sigma(r_c - r_r - m), Bradley & Terry 1952; margin as in Touvron et al. 2023, eq. 2.

    `log_sigmoid` keeps the gradient of badly wrong pairs, which log(sigma + eps) loses.

    Args:
      chosen, rejected: [] rewards.
      margin: by how much the chosen reward should be ahead.

    Returns:
      [] nats.
    """
    chex.assert_rank([chosen, rejected], 0)
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def distributional_bradley_terry(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0
):
    """-log mean_ij sigma(q_i(c) - q_j(r) - m): Bradley-Terry with both rewards drawn.

    The probability that a draw from the chosen response's quantiles beats one from the rejected
    response's under independent annotators with logistic noise (the likelihood of Siththaranjan
    et al. 2023, DPL, with quantiles in place of their Gaussian). Only win probabilities are
    identified by it: different spreads can give the same loss.

    Args:
      chosen, rejected: [N] quantiles.
      margin: by how much the chosen reward should be ahead.

    Returns:
      [] nats.
    """
    chex.assert_rank([chosen, rejected], 1)
    log_wins = jax.nn.log_sigmoid(chosen[:, None] - rejected[None, :] - margin)
    return jnp.log(log_wins.size) - jax.nn.logsumexp(log_wins)


def quantile_huber(quantiles: jax.Array, target: jax.Array, *, kappa: float):
    """Quantile Huber loss of QR-DQN (Dabney et al. 2018, eq. 10) to one target.

    sum_i |tau_i - 1{u_i < 0}| L_kappa(u_i) with u_i = target - q_i and L_kappa(u) = u^2 / 2 for
    |u| <= kappa, kappa (|u| - kappa / 2) beyond. Summed over the quantiles; not divided by
    kappa (IQN divides), so that small errors weigh the same for every kappa. Huber smoothing
    biases outer quantiles towards the centre by an amount that grows with kappa / scale.

    Args:
      quantiles: [N] at `heads.taus(N)`.
      target: [] the observed value; no gradient flows into it.
      kappa: threshold, > 0.

    Returns:
      [] the loss.
    """
    chex.assert_rank([quantiles, target], [1, 0])
    error = jax.lax.stop_gradient(target) - quantiles
    magnitude = jnp.abs(error)
    # Clipping first keeps both branches and their gradients finite and equal at kappa.
    quadratic = jnp.minimum(magnitude, kappa)
    huber = 0.5 * quadratic**2 + kappa * (magnitude - quadratic)
    below = jax.lax.stop_gradient(error < 0).astype(quantiles.dtype)
    return jnp.sum(jnp.abs(heads.taus(quantiles.shape[0]) - below) * huber)


def quantile_huber_targets(chosen: jax.Array, rejected: jax.Array, targets: str):
    """What the quantiles of the two sides of a pair regress on.

    QR-DQN regresses on Bellman targets; a preference pair carries no observed reward and the
    paper names no target.

    'label' (default) is +1 for the chosen and -1 for the rejected side: the only value the pair
    itself provides, one fixed scale for all pairs, and the targets do not move with the network.
    Every quantile is then a function of the win rate, so the spread says nothing about the
    reward's uncertainty. 'margin' is the other side's mean plus or minus 1.

    Args:
      chosen, rejected: [N] quantiles.
      targets: 'label' or 'margin'.

    Returns:
      ([], []) targets of the chosen and of the rejected side.
    """
    if targets == 'label':
        return jnp.float32(1.0), jnp.float32(-1.0)
    return jnp.mean(rejected) + 1.0, jnp.mean(chosen) - 1.0


def bradley_terry_quantile_huber(
    chosen: jax.Array,
    rejected: jax.Array,
    margin: jax.Array | float = 0.0,
    *,
    huber_weight: float,
    kappa: float,
    targets: str,
):
    """The paper's objective: Bradley-Terry on the means plus lambda times quantile Huber.

    Kim, Hong & Kim combine the log-sigmoid loss with the quantile Huber loss of QR-DQN; here
    BT(mean q(c), mean q(r)) + lambda (QH(q(c), t_c) + QH(q(r), t_r)).

    Args:
      chosen, rejected: [N] quantiles.
      margin: for the Bradley-Terry term.
      huber_weight: lambda.
      kappa: see `quantile_huber`.
      targets: see `quantile_huber_targets`.

    Returns:
      [] the loss.
    """
    target_c, target_r = quantile_huber_targets(chosen, rejected, targets)
    huber = quantile_huber(chosen, target_c, kappa=kappa) + quantile_huber(
        rejected, target_r, kappa=kappa
    )
    return bradley_terry(jnp.mean(chosen), jnp.mean(rejected), margin) + huber_weight * huber


def pair_loss(config: LossConfig):
    """The configured objective as a function of (chosen [N], rejected [N], margin []) -> []."""
    if config.objective == 'bradley_terry':
        return lambda c, r, m: bradley_terry(jnp.mean(c), jnp.mean(r), m)
    if config.objective == 'distributional_bradley_terry':
        return distributional_bradley_terry
    return functools.partial(
        bradley_terry_quantile_huber,
        huber_weight=config.huber_weight,
        kappa=config.kappa,
        targets=config.targets,
    )


def comparison_loss(
    config: LossConfig, quantiles: jax.Array, preference: jax.Array, margin: jax.Array
):
    """Expected pair loss of one comparison under what is known about its responses.

    sum_ij P[i, j] loss(i over j) / sum_ij P[i, j]. For a pair this is the loss itself; for a soft
    label p it is p loss(a over b) + (1 - p) loss(b over a), a tie being p = 1/2; for a ranking
    of K responses the mean over its pairs (Ouyang et al. 2022, eq. 1).

    Args:
      config: objective.
      quantiles: [K, N].
      preference: [K, K], see `Comparison.preference_matrix`.
      margin: [].

    Returns:
      [] the loss; 0 if nothing is known.
    """
    chex.assert_rank([quantiles, preference, margin], [2, 2, 0])
    chex.assert_equal_shape_prefix([quantiles, preference], 1)
    loss = pair_loss(config)
    # Slots without a response hold arbitrary rewards. They are replaced before the losses: a NaN
    # or infinity there would reach the gradient through 0 * inf even if only losses are selected.
    known = preference > 0
    compared = jnp.any(known | known.T, axis=1)
    quantiles = jnp.where(compared[:, None], quantiles, 0.0)
    over_losers = jax.vmap(loss, in_axes=(None, 0, None))
    table = jax.vmap(over_losers, in_axes=(0, None, None))(quantiles, quantiles, margin)
    total = jnp.sum(jnp.where(known, preference * table, 0.0))
    return total / jnp.maximum(jnp.sum(preference), jnp.finfo(jnp.float32).tiny)


def log_win_probability(config: LossConfig, chosen: jax.Array, rejected: jax.Array):
    """log P(chosen preferred) under the likelihood that the objective fits, without margin.

    sigma(mean q(c) - mean q(r)) for the Bradley-Terry objectives, mean_ij sigma(q_i(c) -
    q_j(r)) for the distributional one.

    Args:
      config: objective.
      chosen, rejected: [N] quantiles.

    Returns:
      [] nats, <= 0.
    """
    if config.objective == 'distributional_bradley_terry':
        return -distributional_bradley_terry(chosen, rejected)
    return -bradley_terry(jnp.mean(chosen), jnp.mean(rejected))
