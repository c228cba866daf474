"""Losses on what people said of responses, each for one example; callers `vmap` them.

Axes: K responses, A attributes, E ensemble members, N quantiles. Inputs are float arrays; losses
are in nats, those on ratings in units of reward (the quantile Huber loss squared below kappa).

What each objective can identify is said in its docstring. Preferences identify win probabilities
and nothing else: rewards up to a constant, and a spread only as far as the assumed noise and
shape are right. Ratings identify the distribution itself.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from qrm.rewards import distributions
from qrm.rewards.distributions import Atoms, Distribution, Gaussians
from qrm.rewards.heads import HEADS, QUANTILE_HEADS, HeadConfig, Reward

TARGETS = ('label', 'margin', 'teacher', 'own_mean')
HUBER_SIDES = ('both', 'chosen')


_TOGETHER = 64  # responses of a comparison whose pairs are all computed at once


class Objective(NamedTuple):
    """What an objective needs, and what it says of a pair.

    Attributes:
      reads: 'preferences', 'ratings' or 'annotators', what it learns from.
      likelihood: which win probability it fits, see `log_win_probability`.
      heads: names of the heads it can train.
    """

    reads: str
    likelihood: str
    heads: tuple[str, ...]


_LEVELS = ('scalar', *QUANTILE_HEADS)  # whose atoms stand at known levels
_ALONE = tuple(name for name in HEADS if name not in ('annotator', 'pairwise'))
OBJECTIVES = {
    'bradley_terry': Objective('preferences', 'mean', _ALONE),
    'bradley_terry_quantile_huber': Objective('preferences', 'mean', _LEVELS),
    'quantile_bradley_terry': Objective('preferences', 'mean', _LEVELS),
    'distributional_bradley_terry': Objective('preferences', 'independent', _ALONE),
    'thurstone': Objective('preferences', 'draws', ('gaussian',)),
    'posterior_quantile_regression': Objective('preferences', 'independent', QUANTILE_HEADS),
    'plackett_luce': Objective('preferences', 'mean', _ALONE),
    'ratings_pinball': Objective('ratings', 'independent', _LEVELS),
    'ratings_quantile_huber': Objective('ratings', 'independent', _LEVELS),
    'ratings_crps': Objective('ratings', 'independent', _ALONE),
    'ratings_ordinal': Objective('ratings', 'independent', ('gaussian',)),
    'annotator_bradley_terry': Objective('annotators', 'shared', ('annotator',)),
    'pairwise_cross_entropy': Objective('preferences', 'mean', ('pairwise',)),
}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which objective, and its constants.

    Attributes:
      objective: one of `OBJECTIVES`.
      targets: what the quantile Huber loss regresses on, see `quantile_huber_targets`.
      huber_weight: lambda, the weight of the quantile Huber loss.
      huber_sides: whose quantiles it acts on, those of 'both' sides or of the 'chosen' one.
      pair_epsilon: what is added to the probability inside of the logarithm of Bradley-Terry.
      kappa: threshold of the Huber loss.
      ema_decay: of the teacher's parameters, an exponential moving average ('teacher' targets).
      thresholds: that part ratings into classes, of which alone 'ratings_ordinal' learns; with an
        objective on preferences of the Gaussian head responses that are rated as well are anchors,
        see `ordinal`.
      anchor_weight: weight of ratings beside preferences: of an annotator's own, or of classes.
      label_smoothing: share epsilon of preferences taken to be the wrong way round.
      centre_weight: weight of the squared sum of both sides' rewards, see `centring`.
      entropy_weight: weight of the entropy of categorical rewards, which is rewarded.
      lm_weight: weight of the language-model loss on the preferred response (MOSS-RLHF).

    Raises:
      ValueError: an unknown name, kappa <= 0, a negative weight, or one that is not finite,
        thresholds that do not increase or that nothing reads.
    """

    objective: str
    targets: str = 'label'
    huber_weight: float = 0.1
    huber_sides: str = 'both'
    pair_epsilon: float = 0.0
    kappa: float = 1.0
    ema_decay: float = 0.99
    thresholds: tuple[float, ...] = ()
    anchor_weight: float = 1.0
    label_smoothing: float = 0.0
    centre_weight: float = 0.0
    entropy_weight: float = 0.0
    lm_weight: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, 'thresholds', tuple(map(float, self.thresholds)))
        if self.objective not in OBJECTIVES:
            raise ValueError(f'objective {self.objective!r}, expected one of {tuple(OBJECTIVES)}')
        if self.targets not in TARGETS:
            raise ValueError(f'targets {self.targets!r}, expected one of {TARGETS}')
        if self.huber_sides not in HUBER_SIDES:
            raise ValueError(f'huber_sides {self.huber_sides!r}, expected one of {HUBER_SIDES}')
        if self.pair_epsilon and not self.objective.startswith('bradley_terry'):
            raise ValueError(f'pair_epsilon={self.pair_epsilon} with the objective '
                             f'{self.objective!r}, expected 0: only Bradley-Terry on means has it')
        if not 0 < self.kappa < math.inf:
            raise ValueError(f'kappa={self.kappa}, expected a finite positive number')
        if not (0 <= self.ema_decay < 1 and 0 <= self.label_smoothing < 0.5):
            raise ValueError(f'ema_decay={self.ema_decay}, label_smoothing={self.label_smoothing}, '
                             'expected numbers in [0, 1) and [0, .5)')
        if any(not low < high for low, high in itertools.pairwise(
                (-math.inf, *self.thresholds, math.inf))):
            raise ValueError(f'thresholds={self.thresholds}, expected finite numbers that increase')
        ordinal = self.objective == 'ratings_ordinal'
        if ordinal != bool(self.thresholds) and self.reads != 'preferences':
            raise ValueError(f'thresholds={self.thresholds} with the objective {self.objective!r}, '
                             f'expected {"at least one" if ordinal else "none"}')
        for key in ('huber_weight', 'pair_epsilon', 'anchor_weight', 'centre_weight',
                    'entropy_weight', 'lm_weight'):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f'{key}={getattr(self, key)}, expected a finite number that is '
                                 'not negative')

    @property
    def reads(self) -> str:
        """What it learns from: 'preferences', 'ratings' or 'annotators'."""
        return OBJECTIVES[self.objective].reads

    @property
    def rated(self) -> bool:
        """Whether it learns from ratings, alone or beside preferences."""
        return self.reads != 'preferences' or bool(self.thresholds)

    @property
    def has_teacher(self) -> bool:
        """Whether a moving average of the parameters has to be kept."""
        return self.objective == 'bradley_terry_quantile_huber' and self.targets == 'teacher'


def check_head(loss: LossConfig, head: HeadConfig) -> None:
    """Checks that the objective can train the head.

    Raises:
      ValueError: it cannot, or a weight has nothing to act on.
    """
    heads = OBJECTIVES[loss.objective].heads
    if head.name not in heads:
        raise ValueError(f'objective {loss.objective!r} with the {head.name} head, expected one '
                         f'of the heads {heads}')
    if loss.entropy_weight and head.name != 'categorical':
        raise ValueError(f'entropy_weight={loss.entropy_weight} with the {head.name} head, '
                         'expected 0: only categorical weights have an entropy')
    if loss.thresholds and head.name != 'gaussian':
        raise ValueError(f'thresholds={loss.thresholds} with the {head.name} head, expected none: '
                         'classes have probabilities with a slope under Gaussians only')
    if loss.centre_weight and loss.reads != 'preferences':
        raise ValueError(f'centre_weight={loss.centre_weight} with the objective '
                         f'{loss.objective!r}, expected 0: ratings say where rewards are')
    if loss.lm_weight and head.pairwise:
        raise ValueError(f'lm_weight={loss.lm_weight} with the pairwise head, expected 0: it reads '
                         'two responses, of which one is preferred')
    if head.gated and loss.reads != 'ratings':
        raise ValueError(f'objective {loss.objective!r} with {len(head.attributes)} attributes, '
                         'expected one that reads ratings')


class Judgement(NamedTuple):
    """What is known of the responses of one comparison.

    Attributes:
      preference: [K, K], see `Comparison.preference_matrix`.
      margin: [] by how much the preferred reward should be ahead.
      ratings: [K, A] of each attribute, NaN where missing.
      annotator: [] int, who judged; -1 if unknown.
    """

    preference: jax.Array
    margin: jax.Array
    ratings: jax.Array
    annotator: jax.Array


class Side(NamedTuple):
    """One side of a pair.

    Attributes:
      reward: distribution without leading axes.
      taus: [N] levels of the atoms of a quantile head.
      teacher: [] the teacher's mean.
    """

    reward: Distribution
    taus: jax.Array
    teacher: jax.Array


# ---------------------------------------------------------------------------------------------
# Preferences


def bradley_terry(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0,
                  epsilon: float = 0.0):
    """-log sigma(r_c - r_r - m), Bradley & Terry 1952; margin as in Touvron et al. 2023, eq. 2.

    Identifies the means up to a constant; a spread gets no gradient and keeps its initial size.
    `log_sigmoid` keeps the gradient of badly wrong pairs, which log(sigma + epsilon) loses: its
    slope is that of Bradley-Terry times sigma / (sigma + epsilon).

    Args:
      chosen, rejected: [] rewards.
      margin: by how much the chosen reward should be ahead.
      epsilon: added to the probability; MOSS-RLHF and the paper's own code add 1e-5.

    Returns:
      [] nats.
    """
    chex.assert_rank([chosen, rejected], 0)
    difference = chosen - rejected - margin
    if epsilon:
        return -jnp.log(jax.nn.sigmoid(difference) + epsilon)
    return -jax.nn.log_sigmoid(difference)


def distributional_bradley_terry(
    chosen: Distribution, rejected: Distribution, margin: jax.Array | float = 0.0
):
    """-log E sigma(R_c - R_r - m): Bradley-Terry with both rewards drawn.

    The probability that a draw of the chosen response's reward beats one of the rejected
    response's under independent annotators with logistic noise: the likelihood of Siththaranjan
    et al. 2023 (DPL) for any distribution; for atoms -log mean_ij sigma(q_i(c) - q_j(r)).

    Identifies win probabilities: different spreads can give the same loss, and what a spread
    says comes from the assumed noise. Where one annotator judges both sides, which this takes
    for two, spreads come out wrong.

    Args:
      chosen, rejected: distributions of one reward.
      margin: by how much the chosen reward should be ahead.

    Returns:
      [] nats.
    """
    return -chosen.log_win_probability(rejected, margin)


def thurstone(chosen: Gaussians, rejected: Gaussians, margin: jax.Array | float = 0.0):
    """-log P(R_c - R_r > m) of independent draws: Thurstone's case III, without logistic noise.

    Identifies means and standard deviations up to a shift and a scale that all share; ratings of
    two or more thresholds beside the preferences, see `ordinal`, fix both (Fang et al. 2026,
    arXiv:2605.11865, their equation 7 and public code).

    Args:
      chosen, rejected: Gaussians of one reward.
      margin: by how much the chosen reward should be ahead.

    Returns:
      [] nats.
    """
    return -distributions.log_greater_probability(chosen, rejected, margin)


def quantile_bradley_terry(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0
):
    """mean_i -log sigma(q_i(c) - q_i(r) - m): each quantile is a scalar model of its own.

    A negative control: every quantile fits the same win rates, so all are equal up to a constant,
    and that constant, the spread, keeps its initial size.

    Args:
      chosen, rejected: [N] quantiles.
      margin: by how much the chosen reward should be ahead.

    Returns:
      [] nats.
    """
    chex.assert_rank([chosen, rejected], 1)
    return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected - margin))


def pairwise_cross_entropy(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0
):
    """(-log sigma(2 s_c - m) - log sigma(-2 s_r - m)) / 2, with s_c and s_r of two orders.

    The binary cross-entropy of each order's log odds 2 s that its first response is preferred (as
    in Jiang et al. 2023, PairRM, arXiv:2306.02561, and Dong et al. 2024, arXiv:2405.07863): in the
    order of s_c the preferred response stands first, in that of s_r second. Identifies the win
    probability of every pair, also where no rewards of single responses have them, as in a cycle;
    of one order by itself it includes what the place of a response is taken to say.

    Args:
      chosen, rejected: [] what the head gives for the two orders of a pair.
      margin: by how much the log odds should be ahead.

    Returns:
      [] nats.
    """
    chex.assert_rank([chosen, rejected], 0)
    return -0.5 * (jax.nn.log_sigmoid(2.0 * chosen - margin)
                   + jax.nn.log_sigmoid(-2.0 * rejected - margin))


def quantile_huber_targets(chosen: Side, rejected: Side, targets: str):
    """What the quantiles of the two sides of a pair regress on.

    QR-DQN regresses on Bellman targets; a preference pair carries no observed reward and the
    paper's text names no target.

    'label' (default) is +1 for the chosen and -1 for the rejected side: the only value the pair
    itself provides, one fixed scale for all pairs, and the targets do not move with the network.
    Every quantile is then a function of the win rate, so the spread says nothing about the
    reward's uncertainty. 'margin' is the other side's mean plus or minus 1. 'teacher' is the mean
    that a moving average of the parameters gives the same response (after mean teachers, Tarvainen
    & Valpola 2017), a negative control: the target has no spread, so the quantiles collapse.
    'own_mean' is the mean of the side's own quantiles, without gradient, as in the paper's own
    code (min-seong-kim/QR-RLHF, c0f8e59): the teacher without delay, so that the fixed point has
    all quantiles equal.

    Args:
      chosen, rejected: of atoms.
      targets: one of `TARGETS`.

    Returns:
      ([], []) targets of the chosen and of the rejected side.
    """
    if targets == 'label':
        return jnp.float32(1.0), jnp.float32(-1.0)
    if targets == 'teacher':
        return chosen.teacher, rejected.teacher
    if targets == 'own_mean':
        return chosen.reward.mean, rejected.reward.mean
    return rejected.reward.mean + 1.0, chosen.reward.mean - 1.0


def bradley_terry_quantile_huber(
    chosen: Side,
    rejected: Side,
    margin: jax.Array | float = 0.0,
    *,
    huber_weight: float,
    kappa: float,
    targets: str,
    huber_sides: str = 'both',
    pair_epsilon: float = 0.0,
):
    """The paper's objective: Bradley-Terry on the means plus lambda times quantile Huber.

    Kim, Hong & Kim combine the log-sigmoid loss with the quantile Huber loss of QR-DQN; here
    BT(mean q(c), mean q(r)) + lambda (QH(q(c), t_c) + QH(q(r), t_r)). With fixed targets the scale
    of the rewards shrinks as lambda grows, and the quantiles identify the win rate once more.
    The paper's own code has targets 'own_mean' of the chosen side alone, lambda 1, kappa 1 and
    epsilon 1e-5.

    Args:
      chosen, rejected: of atoms.
      margin: for the Bradley-Terry term.
      huber_weight: lambda.
      kappa: see `quantile_huber`.
      targets: see `quantile_huber_targets`.
      huber_sides: one of `HUBER_SIDES`.
      pair_epsilon: see `bradley_terry`.

    Returns:
      [] the loss.
    """
    sides = zip((chosen, rejected), quantile_huber_targets(chosen, rejected, targets), strict=True)
    each = [quantile_huber(side.reward.values, side.taus, target, kappa=kappa)
            for side, target in sides]
    huber = each[0] if huber_sides == 'chosen' else sum(each)
    return (bradley_terry(chosen.reward.mean, rejected.reward.mean, margin, pair_epsilon)
            + huber_weight * huber)


def posterior_quantile_regression(chosen: Side, rejected: Side):
    """Quantile regression of each side on its own atoms as the label reweights them.

    Given that the chosen side won, its atom i has weight w_i ~ sum_j sigma(q_i(c) - q_j(r)), atom
    j of the other side w_j ~ sum_i sigma(q_i(c) - q_j(r)) (Bayes' rule with the likelihood of
    `distributional_bradley_terry`). Those are the targets, as Bellman targets are in QR-DQN, of a
    pinball loss, in which an atom counts half below itself. No gradient flows into them.

    Identifies what that likelihood does, by fixed-point steps in place of its gradient; a margin
    has no place in it.

    Args:
      chosen, rejected: of atoms [N].

    Returns:
      [] units of reward; its value means nothing, as the targets move with the network.
    """
    # In logarithms: all wins of a side that is far behind would be 0 in float32.
    log_wins = jax.nn.log_sigmoid(
        chosen.reward.values[:, None] - rejected.reward.values[None, :])

    def one(side: Side, axis: int) -> jax.Array:
        values = side.reward.values
        weights = jax.nn.softmax(jax.nn.logsumexp(jax.lax.stop_gradient(log_wins), axis=axis))
        to_each = jax.vmap(pinball, in_axes=(None, None, 0))(values, side.taus, values)
        return jnp.sum(weights * to_each)

    return one(chosen, 1) + one(rejected, 0)


def plackett_luce(rewards: jax.Array, preference: jax.Array):
    """-log probability of a ranking by repeated choice: Plackett 1975; Luce 1959.

    sum_i [log sum_{j in S_i} exp(r_j) - r_i] over the responses i that beat any other, S_i being i
    and all it beats: the choices from the top of a ranking down. Of K = 2 it is Bradley-Terry;
    where only the best response is known it is one choice among K. A soft label weighs both
    orders, and a tie of two is one of 1/2; responses that tie above others are each chosen from
    among themselves and all that they beat (Breslow 1974).

    Identifies the rewards up to a constant, from fewer comparisons than pairs taken one by one,
    if choices are made independently with Gumbel noise.

    Args:
      rewards: [K].
      preference: [K, K].

    Returns:
      [] nats.
    """
    chex.assert_rank([rewards, preference], [1, 2])
    others = preference > 0
    among = jnp.where(others | jnp.eye(len(rewards), dtype=bool), rewards[None, :], -jnp.inf)
    return jnp.sum(jnp.max(preference, axis=1) * (jax.nn.logsumexp(among, axis=1) - rewards))


def centring(chosen: jax.Array, rejected: jax.Array):
    """(r_c + r_r)^2: keeps rewards around 0, which preferences leave open (Eisenstein et al. 2023).

    Of a pairwise head these are the two orders of a pair, and this is the square of how far their
    log odds favour the first place.

    Args:
      chosen, rejected: [] rewards.

    Returns:
      [] squared units of reward.
    """
    chex.assert_rank([chosen, rejected], 0)
    return (chosen + rejected) ** 2


# ---------------------------------------------------------------------------------------------
# Ratings


def pinball(quantiles: jax.Array, taus: jax.Array, target: jax.Array):
    """sum_i u_i (tau_i - 1{u_i < 0}) with u_i = target - q_i (Koenker & Bassett 1978).

    1{0 < 0} counts one half, so that a target equal to a quantile lies half below it. In
    expectation over targets its minimum is at their quantiles: ratings identify the distribution.

    Args:
      quantiles: [N] at `taus`.
      taus: [N].
      target: [] the observed value; no gradient flows into it.

    Returns:
      [] units of reward.
    """
    chex.assert_rank([quantiles, taus, target], [1, 1, 0])
    chex.assert_equal_shape([quantiles, taus])
    error = jax.lax.stop_gradient(target) - quantiles
    below = jax.lax.stop_gradient(jnp.heaviside(-error, 0.5))
    return jnp.sum(error * (taus - below))


def quantile_huber(quantiles: jax.Array, taus: jax.Array, target: jax.Array, *, kappa: float):
    """Quantile Huber loss of QR-DQN (Dabney et al. 2018, eq. 10) to one target.

    sum_i |tau_i - 1{u_i < 0}| L_kappa(u_i) with u_i = target - q_i and L_kappa(u) = u^2 / 2 for
    |u| <= kappa, kappa (|u| - kappa / 2) beyond. Summed over the quantiles; not divided by
    kappa (IQN divides), so that small errors weigh the same for every kappa. Huber smoothing
    biases outer quantiles towards the centre by an amount that grows with kappa / scale: for
    ratings of unit scale and kappa = 1 the ".05" quantile stands at the .095 quantile.

    Args:
      quantiles: [N] at `taus`.
      taus: [N].
      target: [] the observed value; no gradient flows into it.
      kappa: threshold, > 0.

    Returns:
      [] the loss.
    """
    chex.assert_rank([quantiles, taus, target], [1, 1, 0])
    chex.assert_equal_shape([quantiles, taus])
    error = jax.lax.stop_gradient(target) - quantiles
    magnitude = jnp.abs(error)
    # Clipping first keeps both branches and their gradients finite and equal at kappa.
    quadratic = jnp.minimum(magnitude, kappa)
    huber = 0.5 * quadratic**2 + kappa * (magnitude - quadratic)
    below = jax.lax.stop_gradient(error < 0).astype(quantiles.dtype)
    return jnp.sum(jnp.abs(taus - below) * huber)


def ordinal(reward: Gaussians, thresholds: tuple[float, ...], rating: jax.Array):
    """-log of the probability of a rating's class, the number of thresholds at or below it.

    An ordered probit (McKelvey & Zavoina 1975) whose thresholds are known: one of them identifies
    the ratio of the mean's distance from it to the standard deviation, two or more both.

    Args:
      reward: Gaussians without leading axes.
      thresholds: that increase, in units of the rating.
      rating: [].

    Returns:
      [] nats.
    """
    ends = jnp.array([-math.inf, *thresholds, math.inf], rating.dtype)
    own = jnp.sum(rating >= ends[1:-1])
    return -distributions.log_interval_probability(reward, ends[own], ends[own + 1])


def attribute_ratings(config: LossConfig, parts: Distribution, taus: jax.Array,
                      ratings: jax.Array):
    """Mean loss of the attributes that were rated, each as its own regression.

    Dorka 2024 (QRM) regresses quantiles on the ratings of several attributes with missing entries,
    Wang et al. 2024 (ArmoRM) scalars. 'ratings_crps' is the continuous ranked probability score,
    for any distribution (Gneiting & Raftery 2007, eq. 21); with thresholds only classes of ratings
    are read, see `ordinal`.

    Args:
      config: a rating objective, or one on preferences with thresholds.
      parts: distribution with axes [K, A].
      taus: [K, N] levels.
      ratings: [K, A], NaN where missing.

    Returns:
      [] the loss; 0 if nothing is rated.
    """
    known = jnp.isfinite(ratings)
    targets = jnp.where(known, ratings, 0.0)

    def one(part: Distribution, levels: jax.Array, target: jax.Array) -> jax.Array:
        if config.thresholds:
            return ordinal(part, config.thresholds, target)
        if config.objective == 'ratings_crps':
            return part.crps(target)
        if config.objective == 'ratings_pinball':
            return pinball(part.values, levels, target)
        return quantile_huber(part.values, levels, target, kappa=config.kappa)

    each = jax.vmap(jax.vmap(one, in_axes=(0, None, 0)))(parts, taus, targets)
    return jnp.sum(jnp.where(known, each, 0.0)) / jnp.maximum(jnp.sum(known), 1)


# ---------------------------------------------------------------------------------------------
# Comparisons


def comparison_loss(
    config: LossConfig, reward: Reward, judgement: Judgement, teacher: jax.Array | None = None
):
    """Loss of one comparison; ensemble members are trained each by itself.

    Args:
      config: objective.
      reward: with leading axis K.
      judgement: what is known of the responses.
      teacher: [K, E] means that the teacher gives, if `config.has_teacher`.

    Returns:
      [] the mean over the members; 0 if nothing is known.
    """
    preference, _, ratings, _ = judgement
    chex.assert_rank([preference, judgement.margin, ratings, judgement.annotator], [2, 0, 2, 0])
    chex.assert_equal_shape_prefix([preference, ratings, reward.gates], 1)
    judged = jnp.any((preference > 0) | (preference > 0).T, axis=1)
    judged |= jnp.any(jnp.isfinite(ratings), axis=1)
    reward = _without(reward, ~judged)
    if teacher is None:
        chex.assert_equal(config.has_teacher, False)
        teacher = jnp.zeros(reward.gates.shape[:2])

    def of_member(parts: Distribution, gates: jax.Array, own_teacher: jax.Array) -> jax.Array:
        one = Reward(*jax.tree.map(lambda x: x[:, None], (parts, gates)), reward.taus)
        return _member_loss(config, one, judgement, own_teacher, judged)

    return jnp.mean(jax.vmap(of_member, in_axes=1)(reward.parts, reward.gates, teacher))


def log_win_probability(config: LossConfig, chosen: Distribution, rejected: Distribution):
    """log P(chosen preferred) under the likelihood that the objective fits, without margin.

    'mean': sigma(mean of R_c - mean of R_r), Bradley-Terry; 'independent': E sigma(R_c - R_r) with
    independent draws; 'draws': P(R_c > R_r) with these; 'shared': the mean over annotators who
    each judge both sides.

    Args:
      config: objective.
      chosen, rejected: distributions with the same leading axes [...].

    Returns:
      [...] nats, <= 0.
    """
    likelihood = OBJECTIVES[config.objective].likelihood
    if likelihood == 'independent':
        return chosen.log_win_probability(rejected)
    if likelihood == 'draws':
        return distributions.log_greater_probability(chosen, rejected)
    if likelihood == 'shared':
        return distributions.log_shared_win_probability(chosen, rejected)
    return jax.nn.log_sigmoid(chosen.mean - rejected.mean)


def _member_loss(config: LossConfig, reward: Reward, judgement: Judgement,
                 teacher: jax.Array, judged: jax.Array) -> jax.Array:
    """Loss of one member: reward with axes [K, E = 1, A], teacher [K], judged [K] bool."""
    total = reward.distribution
    smoothing = config.label_smoothing
    preference = judgement.preference
    preference = (1.0 - smoothing) * preference + smoothing * preference.T
    parts = jax.tree.map(lambda x: x[:, 0], reward.parts)
    if config.reads == 'ratings':
        loss = attribute_ratings(config, parts, reward.taus, judgement.ratings)
        if reward.gates.shape[-1] > 1:
            loss += _gate_loss(reward, preference, judgement.margin)
    elif config.reads == 'annotators':
        loss = _annotator_loss(config, total.values, judgement, preference)
    elif config.objective == 'plackett_luce':
        # A smoothed preference ranks nothing: the order itself is taken to be the wrong way round.
        loss = ((1.0 - smoothing) * plackett_luce(total.mean, judgement.preference)
                + smoothing * plackett_luce(total.mean, judgement.preference.T))
    else:
        pair = _pair_loss(config)
        sides = Side(total, reward.taus, teacher)
        loss = _expected(lambda c, r: pair(c, r, judgement.margin), sides, preference)
    if config.thresholds and config.reads == 'preferences':
        loss += config.anchor_weight * attribute_ratings(
            config, parts, reward.taus, judgement.ratings)
    if config.centre_weight:
        loss += config.centre_weight * _expected(centring, total.mean, preference)
    if config.entropy_weight:
        # Of the responses there are: a mean over slots would depend on how many are empty.
        of_judged = jnp.sum(jnp.where(judged, _entropy(total.weights), 0.0))
        loss -= config.entropy_weight * of_judged / jnp.maximum(jnp.sum(judged), 1)
    return loss


def _entropy(weights: jax.Array) -> jax.Array:
    """[..., N] probabilities -> [...] nats."""
    # A weight may underflow to 0, where the logarithm has no finite slope.
    positive = jnp.where(weights > 0.0, weights, 1.0)
    return -jnp.sum(positive * jnp.log(positive), axis=-1)


def _pair_loss(config: LossConfig) -> Callable[[Side, Side, jax.Array], jax.Array]:
    """The configured objective of a pair (chosen, rejected, margin)."""
    return {
        'bradley_terry': lambda c, r, m: bradley_terry(
            c.reward.mean, r.reward.mean, m, config.pair_epsilon),
        'distributional_bradley_terry': lambda c, r, m: distributional_bradley_terry(
            c.reward, r.reward, m),
        'thurstone': lambda c, r, m: thurstone(c.reward, r.reward, m),
        'quantile_bradley_terry': lambda c, r, m: quantile_bradley_terry(
            c.reward.values, r.reward.values, m),
        'posterior_quantile_regression': lambda c, r, m: posterior_quantile_regression(c, r),
        'pairwise_cross_entropy': lambda c, r, m: pairwise_cross_entropy(
            c.reward.mean, r.reward.mean, m),
        'bradley_terry_quantile_huber': lambda c, r, m: bradley_terry_quantile_huber(
            c, r, m, huber_weight=config.huber_weight, kappa=config.kappa,
            targets=config.targets, huber_sides=config.huber_sides,
            pair_epsilon=config.pair_epsilon),
    }[config.objective]


def _expected(loss: Callable[[Any, Any], jax.Array], sides: Any,
              preference: jax.Array) -> jax.Array:
    """Expected pair loss under what is known of the order.

    sum_ij P[i, j] loss(i over j) / sum_ij P[i, j]. For a pair this is the loss itself; for a soft
    label p it is p loss(a over b) + (1 - p) loss(b over a), a tie being p = 1/2; for a ranking
    of K responses the mean over its pairs (Ouyang et al. 2022, eq. 1).
    """

    def over(side: Any, row: jax.Array) -> jax.Array:
        """Preference row [K] times the loss of one response over each."""
        losses = jax.vmap(loss, in_axes=(None, 0))(side, sides)
        return jnp.where(row > 0, row * losses, 0.0)

    if len(preference) > _TOGETHER:
        # One after the other, and again for the gradient: a pair may take N x N numbers.
        total = jnp.sum(jax.lax.map(jax.checkpoint(lambda x: jnp.sum(over(*x))),
                                    (sides, preference)))
    else:
        total = jnp.sum(jax.vmap(over)(sides, preference))
    return total / jnp.maximum(jnp.sum(preference), jnp.finfo(jnp.float32).tiny)


def _gate_loss(reward: Reward, preference: jax.Array, margin: jax.Array) -> jax.Array:
    """Bradley-Terry of the gated mean, with attributes held fixed (Wang et al. 2024, ArmoRM).

    Only the gate learns from preferences; attributes stay what their ratings say.
    """
    fixed = reward._replace(parts=jax.lax.stop_gradient(reward.parts))
    return _expected(lambda c, r: bradley_terry(c, r, margin), fixed.distribution.mean, preference)


def _annotator_loss(config: LossConfig, values: jax.Array, judgement: Judgement,
                    preference: jax.Array) -> jax.Array:
    """-log sigma(r_a(c) - r_a(r) - m) of the annotator a who judged, and its anchors.

    Identifies each annotator's rewards up to a constant of its own; (r_a - rating)^2 on an
    anchor, a response that the annotator also rated, fixes that constant, and with it how far
    annotators lie apart: the distribution. Without anchors the spread is known up to a constant.

    Args:
      config: weight of the anchors.
      values: [K, annotators] rewards.
      judgement: with the annotator, and ratings [K, 1].
      preference: [K, K], smoothed.

    Returns:
      [] nats; 0 if the annotator is unknown.
    """
    own = jnp.take(values, jnp.maximum(judgement.annotator, 0), axis=-1)
    loss = _expected(lambda c, r: bradley_terry(c, r, judgement.margin), own, preference)
    rating = judgement.ratings[:, 0]
    known = jnp.isfinite(rating)
    squared = jnp.where(known, (own - jnp.where(known, rating, 0.0)) ** 2, 0.0)
    loss += config.anchor_weight * jnp.sum(squared) / jnp.maximum(jnp.sum(known), 1)
    return jnp.where(judgement.annotator >= 0, loss, 0.0)


def _without(reward: Reward, slots: jax.Array) -> Reward:
    """Replaces the rewards of some slots [K] by a standard one.

    Slots without a response hold arbitrary numbers. They are replaced before the losses: a NaN or
    infinity there would reach the gradient through 0 * inf even if only losses are selected.
    """

    def fill(array: jax.Array, value: float) -> jax.Array:
        return jnp.where(slots.reshape(-1, *[1] * (array.ndim - 1)), value, array)

    def like(parts: Distribution) -> Distribution:
        equal = fill(parts.weights, 1.0 / parts.weights.shape[-1])
        if isinstance(parts, Atoms):
            return Atoms(fill(parts.values, 0.0), equal)
        return Gaussians(equal, fill(parts.means, 0.0), fill(parts.scales, 1.0))

    return reward._replace(parts=like(reward.parts),
                           gates=fill(reward.gates, 1.0 / reward.gates.shape[-1]))
