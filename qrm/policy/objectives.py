"""Losses, estimators and advantages that policies are trained by: pure functions of arrays.

Axes: `...` any leading axes, usually [C, K]: C prompts, K responses to each; T tokens of a
response on the right, V the vocabulary. Arrays with T have a `mask`, True where there is a token,
those with K a `present`; what is elsewhere reaches neither a value nor a gradient, be it nan.
Log-probabilities are in nats, of the tokens of a response at temperature 1: `log_probs` under the
policy that is trained, `old_log_probs` under the one that sampled, `reference_log_probs` under the
reference. Responses are draws of the policy, unless said otherwise.

Losses are one for each token or pair and are to be minimised. What a step differentiates is a sum
of them; it is divided once by its weight, added over micro-batches and devices like the sum
(`WeightedSum`). Everything is float32 (or wider), and narrower floats raise a TypeError, as sums
and ratios of them are noise.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

AGGREGATIONS = ('token', 'sequence', 'constant')
KL_ESTIMATORS = ('k1', 'k2', 'k3')
_ROUNDING = 1e-5  # of rewards, relative to the largest; what differs by less is equal


# --- sums over tokens ----------------------------------------------------------------------------


class WeightedSum(NamedTuple):
    """A sum and what it is divided by, once it is added over micro-batches and devices.

    Attributes:
      value: [].
      weight: [].
    """

    value: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The quotient; 0 of nothing."""
        return self.value / jnp.where(self.weight > 0, self.weight, 1)


def aggregate(
    values: jax.Array, mask: jax.Array, how: str, length: int | None = None
) -> WeightedSum:
    """Token losses as one sum, and its weight.

    What a token of a response of n tokens weighs says what length does (L the total number of
    tokens, R that of responses):

    - 'token': 1 / L. All tokens of a batch are equal, and long responses weigh more than short
      ones (DAPO, arXiv 2503.14476, section 3.3).
    - 'sequence': 1 / (R n). Responses are equal, and a token of a long one weighs less: mistakes
      are cheaper at length (GRPO, arXiv 2402.03300, eq. 3).
    - 'constant': 1 / (R length). Tokens are equal in every batch, so that the expected gradient is
      that of the return, times a constant (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Args:
      values: [..., T].
      mask: [..., T] bool; a response without a token is none.
      how: one of `AGGREGATIONS`.
      length: for 'constant' alone, such as the most tokens of a response.

    Raises:
      ValueError: an unknown name, or a length that is missing, unexpected or not positive.
    """
    chex.assert_equal_shape([values, mask])
    if how not in AGGREGATIONS:
        raise ValueError(f'aggregation {how!r}, expected one of {AGGREGATIONS}')
    if (how == 'constant') != (length is not None) or (length is not None and length <= 0):
        raise ValueError(f'aggregation {how!r} with length={length}, expected a positive length '
                         "with 'constant' and none with others")
    sizes = jnp.sum(mask, axis=-1)
    sums = token_sum(values, mask)
    if how == 'token':
        return WeightedSum(jnp.sum(sums), jnp.sum(sizes).astype(sums.dtype))
    each = sums / (jnp.maximum(sizes, 1) if length is None else length)
    return WeightedSum(jnp.sum(each), jnp.sum(sizes > 0).astype(sums.dtype))


def token_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums [...] over the tokens of values [..., T]."""
    _check_floats(values)
    chex.assert_equal_shape([values, mask])
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1)


# --- preferences ---------------------------------------------------------------------------------


def log_ratio(
    log_probs: jax.Array,
    reference_log_probs: jax.Array,
    mask: jax.Array,
    *,
    length_normalised: bool = False,
) -> jax.Array:
    """log(pi(y) / pi_ref(y)) of whole responses y, in nats.

    Args:
      log_probs, reference_log_probs: [..., T].
      mask: [..., T] bool.
      length_normalised: divide by the number of tokens, nats a token. `beta` then has another
        unit, and what is learnt is no longer the optimum of reward less beta KL.

    Returns:
      [...]; 0 without a token.
    """
    total = token_sum(_difference(log_probs, reference_log_probs, mask), mask)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1) if length_normalised else total


def implicit_rewards(log_ratios: jax.Array, beta: jax.Array | float) -> jax.Array:
    """Rewards [...] whose optimal policy this one is: beta log(pi / pi_ref).

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 5, up to a constant of each prompt.
    """
    return beta * log_ratios


def dpo(
    chosen: jax.Array,
    rejected: jax.Array,
    *,
    beta: jax.Array | float,
    label_smoothing: jax.Array | float = 0.0,
    offset: jax.Array | float = 0.0,
) -> jax.Array:
    """Direct preference optimisation: Bradley-Terry on implicit rewards.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: -log sigma(m) with the margin m = beta
    (chosen - rejected). Where it is known by how much the chosen response is better, -log
    sigma(m - offset) (ODPO, Amini et al. 2024, arXiv 2402.10571). A share of preferences that are
    the wrong way round is taken into account as cross-entropy with soft labels, -(1 - e) log
    sigma(m) - e log sigma(-m) (cDPO, Mitchell 2023), the offset subtracted from both; m is then
    finite at the optimum, without offset log((1 - e) / e).

    Args:
      chosen, rejected: [...] log-ratios of responses to the same prompts, see `log_ratio`; of any
        samples.
      beta: strength of the pull to the reference, > 0; of reward per nat.
      label_smoothing: e in [0, .5), a number or [...].
      offset: by how much the chosen reward should be ahead, a number or [...].

    Returns:
      [...] nats.
    """
    _check_floats(chosen, rejected)
    chex.assert_equal_shape([chosen, rejected])
    margin = beta * (chosen - rejected)
    right, wrong = (jax.nn.log_sigmoid(side * margin - offset) for side in (1.0, -1.0))
    return (label_smoothing - 1.0) * right - label_smoothing * wrong


def ipo(chosen: jax.Array, rejected: jax.Array, *, beta: jax.Array | float) -> jax.Array:
    """Identity preference optimisation: a square loss, with a finite optimum for sure preferences.

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, whose tau is beta: (chosen - rejected -
    1 / (2 beta))^2.

    Args:
      chosen, rejected: [...] log-ratios, see `dpo`.
      beta: > 0, per nat.

    Returns:
      [...] nats squared.
    """
    _check_floats(chosen, rejected)
    chex.assert_equal_shape([chosen, rejected])
    return (chosen - rejected - 0.5 / beta) ** 2


# --- distance to the reference -------------------------------------------------------------------


def kl_estimates(
    log_probs: jax.Array,
    reference_log_probs: jax.Array,
    mask: jax.Array,
    estimator: str,
    old_log_probs: jax.Array | None = None,
) -> jax.Array:
    """Estimates of KL(pi || pi_ref), in nats, one for each token.

    Schulman 2020 (Approximating KL divergence, joschu.net/blog/kl-approx.html). With d = log pi -
    log pi_ref of a token that was drawn from pi, whose mean over draws is

    | | estimate | mean | gradient of the mean of the estimates |
    | --- | --- | --- | --- |
    | 'k1' | d | KL(pi, pi_ref) | 0: as a loss it is noise |
    | 'k2' | d^2 / 2 | biased, right to second order | that of KL(pi, pi_ref) |
    | 'k3' | exp(-d) - 1 + d >= 0 | KL(pi, pi_ref) | that of KL(pi_ref, pi), the other way round |

    So 'k1' and 'k3' are values, for rewards and monitors; the loss that pulls to the reference as
    the KL in a reward does is 'k2'. GRPO (arXiv 2402.03300, eq. 4) has 'k3' in its loss: its
    optimum is another one. With `old_log_probs` estimates are multiplied by pi / pi_old: of draws
    of pi_old 'k1' and 'k3' then have the right mean and the right gradient.

    Args:
      log_probs, reference_log_probs: [..., T].
      mask: [..., T] bool.
      estimator: one of `KL_ESTIMATORS`.
      old_log_probs: [..., T] of the policy that sampled, to be corrected for; None: not.

    Returns:
      [..., T] nats, 0 where there is no token. The sum over T estimates the KL of responses.

    Raises:
      ValueError: an unknown name, or 'k2' with `old_log_probs`, which has no right mean to keep.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f'KL estimator {estimator!r}, expected one of {KL_ESTIMATORS}')
    if estimator == 'k2' and old_log_probs is not None:
        raise ValueError("KL estimator 'k2' corrected for another policy, expected 'k1' or 'k3'")
    difference = _difference(log_probs, reference_log_probs, mask)
    kl = {'k1': lambda d: d, 'k2': lambda d: 0.5 * d**2,
          'k3': lambda d: jnp.expm1(-d) + d}[estimator](difference)
    if old_log_probs is None:
        return kl
    ratio = jnp.exp(_difference(log_probs, jax.lax.stop_gradient(old_log_probs), mask))
    return ratio * kl


def categorical_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) [...] in nats of log-probabilities [..., V]; inf where q excludes what p has."""
    _check_floats(log_p, log_q)
    chex.assert_equal_shape([log_p, log_q])
    possible = log_p > -jnp.inf
    # Selected first, as 0 * inf would be nan, and reach gradients as such.
    p, q = jnp.where(possible, log_p, 0.0), jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(p) * (p - q), 0.0), axis=-1)


def entropy(log_p: jax.Array) -> jax.Array:
    """Entropy [...] in nats of log-probabilities [..., V].

    As a bonus: token losses less a weight times the entropy of what each token was drawn from
    (PPO, arXiv 1707.06347, eq. 9).
    """
    _check_floats(log_p)
    possible = log_p > -jnp.inf
    safe = jnp.where(possible, log_p, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(safe) * safe, 0.0), axis=-1)


def penalised_rewards(
    scores: jax.Array, kl: jax.Array, mask: jax.Array, *, beta: jax.Array | float
) -> jax.Array:
    """Rewards of tokens: -beta KL at each, and the score of the response at the last one.

    Ziegler et al. 2019 (arXiv 1909.08593), eq. 2. Their sum is what a group's rewards are.

    Args:
      scores: [...], in units of reward.
      kl: [..., T] nats, see `kl_estimates`; under the policy that sampled.
      mask: [..., T] bool; a response without a token has nowhere to put its score.
      beta: reward per nat.

    Returns:
      [..., T].
    """
    _check_floats(scores, kl)
    chex.assert_equal_shape([kl, mask])
    left = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
    score = jnp.where(mask & (left == 1), scores[..., None], 0.0)
    return jax.lax.stop_gradient(score - beta * jnp.where(mask, kl, 0.0))


def adaptive_beta(
    beta: jax.Array | float, kl: jax.Array | float, *, target: float, horizon: float, n: int
) -> jax.Array:
    """The next weight of the KL penalty, which keeps the KL near a target.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: beta grows by the factor 1 + K e with e =
    (kl / target - 1) within +-.2; K = n / horizon, as their code has it (.1 in the paper).

    Args:
      beta: so far.
      kl: measured KL of whole responses, nats.
      target: of it, > 0.
      horizon: in how many responses an error of 100% would double beta.
      n: responses since the last update.

    Returns:
      [].
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return beta * (1.0 + error * n / horizon)


# --- proximal policy optimisation ----------------------------------------------------------------


class Clipped(NamedTuple):
    """Losses some of which are clipped.

    Attributes:
      losses: [..., T]; 0 where there is no token.
      clipped: [..., T] bool, where the loss has no gradient.
    """

    losses: jax.Array
    clipped: jax.Array


class Advantages(NamedTuple):
    """How much better than expected each token turned out; no gradient flows through.

    Attributes:
      advantages: [..., T] in units of reward; 0 where there is no token.
      returns: [..., T] which values should have been; 0 where there is no token.
    """

    advantages: jax.Array
    returns: jax.Array


def clipped_surrogate(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> Clipped:
    """The losses of PPO: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_old.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7; two numbers as in DAPO (arXiv 2503.14476,
    section 3.1). The ratio is to the policy that sampled. The bound is one-sided: with A > 0
    nothing is gained above 1 + clip_high, with A < 0 below 1 - clip_low, and a ratio that is wrong
    in the other direction is not clipped. Where pi = pi_old the gradient is that of the policy
    gradient, -A d log pi. Summed log-probabilities of responses in place of those of tokens, with
    `present` for `mask`, give the ratio of whole responses.

    Args:
      log_probs, old_log_probs: [..., T].
      advantages: [..., T], or [..., 1] for all tokens of a response.
      mask: [..., T] bool.
      clip_low: in [0, 1]; 1: off.
      clip_high: >= 0; inf: off.

    Raises:
      ValueError: a bound out of its range.
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f'clip_low={clip_low}, clip_high={clip_high}, expected numbers in [0, 1] '
                         'and [0, inf]')
    _check_floats(advantages)
    log_r = _difference(log_probs, jax.lax.stop_gradient(old_log_probs), mask)
    gain = jnp.where(mask, jax.lax.stop_gradient(advantages), 0.0)
    low = math.log1p(-clip_low) if clip_low < 1 else -math.inf
    high = math.log1p(clip_high)
    clipped = ((gain > 0) & (log_r > high)) | ((gain < 0) & (log_r < low))
    # The ratio is bounded before exp: one beyond all floats has an infinite slope.
    bound = jnp.where(gain > 0, high, low)
    used = jnp.where(clipped, bound, jnp.where(gain == 0, 0.0, log_r))
    return Clipped(-gain * jnp.exp(used), clipped)


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip: float,
) -> Clipped:
    """Half the squared errors of values, which are not rewarded for going far from old ones.

    max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2, of the code of PPO (Engstrom et
    al. 2020, arXiv 2005.12729, section 3), not of its paper.

    Args:
      values: [..., T] in units of reward, of the state before each token.
      old_values: [..., T] the same when responses were sampled.
      returns: [..., T] see `Advantages`.
      mask: [..., T] bool.
      clip: >= 0, in units of reward; inf: off.

    Raises:
      ValueError: clip is negative.
    """
    if not clip >= 0:
        raise ValueError(f'clip={clip}, expected a number of at least 0')
    _check_floats(values, old_values, returns)
    chex.assert_equal_shape([values, old_values, returns, mask])
    values = jnp.where(mask, values, 0.0)
    old, target = (jax.lax.stop_gradient(jnp.where(mask, x, 0.0)) for x in (old_values, returns))
    near = jnp.clip(values, old - clip, old + clip)
    free, bounded = 0.5 * (values - target)**2, 0.5 * (near - target)**2
    return Clipped(jnp.maximum(free, bounded), bounded > free)


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap: jax.Array | None = None,
) -> Advantages:
    """Generalised advantage estimation over the tokens of responses.

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16: A_t = d_t + gamma lambda A_(t+1) with d_t = r_t
    + gamma V_(t+1) - V_t, where t + 1 is the next token that there is. After the last one there is
    nothing: its value is 0, and that of truncated responses too, as if the limit ended them. Where
    a response that goes on should not be blamed for the limit, `bootstrap` is the value of the
    state it was cut at.

    Args:
      rewards: [..., T], see `penalised_rewards`.
      values: [..., T] of the state before each token, in units of reward.
      mask: [..., T] bool; what is False in between is skipped.
      gamma: discount of a token, in [0, 1].
      gae_lambda: 1: returns less values; 0: one step.
      bootstrap: [...] value after the last token, 0 for responses that ended; None: 0 for all.

    Returns:
      Advantages, not whitened, and returns A + V.
    """
    _check_floats(rewards, values)
    chex.assert_equal_shape([rewards, values, mask])
    rewards, values = (jnp.where(mask, x, 0.0) for x in (rewards, values))
    after = jnp.zeros(mask.shape[:-1], values.dtype) if bootstrap is None else bootstrap

    def step(following, token):
        reward, value, there = token
        advantage, next_value = following
        own = reward + gamma * next_value - value + gamma * gae_lambda * advantage
        return (jnp.where(there, own, advantage), jnp.where(there, value, next_value)), own

    steps = tuple(jnp.moveaxis(x, -1, 0) for x in (rewards, values, mask))
    _, found = jax.lax.scan(step, (jnp.zeros_like(after), after), steps, reverse=True)
    found = jnp.where(mask, jnp.moveaxis(found, 0, -1), 0.0)
    return Advantages(*jax.lax.stop_gradient((found, found + values)))


# --- scales --------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """What mean and variance of numbers take, and can be merged; `Moments()` is of none.

    Squares are kept around the mean, as sums of plain squares lose what a float holds of a variance
    that is small beside the mean.

    Attributes:
      count: [].
      mean: [].
      squares: [] sum of squared distances to the mean.
    """

    count: jax.Array | float = 0.0
    mean: jax.Array | float = 0.0
    squares: jax.Array | float = 0.0

    @property
    def std(self) -> jax.Array:
        """Root mean square distance to the mean (divided by the count); 0 of nothing."""
        return jnp.sqrt(self.squares / jnp.maximum(self.count, 1.0))


def moments(values: jax.Array, mask: jax.Array) -> Moments:
    """Of the values [...] where mask [...] is True."""
    _check_floats(values)
    chex.assert_equal_shape([values, mask])
    count = jnp.sum(mask).astype(values.dtype)
    mean = jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(count, 1.0)
    return Moments(count, mean, jnp.sum(jnp.where(mask, values - mean, 0.0)**2))


def merge(*parts: Moments) -> Moments:
    """Those of all numbers together (Chan, Golub & LeVeque 1979).

    Micro-batches, devices (`jax.lax.all_gather` of their moments) and cuts of any kind agree with
    the whole but for rounding; `merge(running, moments(scores))` is a running statistic, in which
    every number ever seen counts once.

    Args:
      parts: with arrays [] or [n].
    """
    count, mean, squares = (jnp.concatenate([jnp.ravel(jnp.asarray(x)) for x in xs])
                            for xs in zip(*parts, strict=True))
    total = jnp.sum(count)
    middle = jnp.sum(count * mean) / jnp.maximum(total, 1.0)
    return Moments(total, middle, jnp.sum(squares + count * (mean - middle)**2))


def standardise(
    values: jax.Array, mask: jax.Array, scale: Moments, *, centre: bool = True
) -> jax.Array:
    """Values less a mean, over a standard deviation: whitened advantages, scaled rewards.

    Args:
      values: [...].
      mask: [...] bool.
      scale: of these values or others. Where its numbers are equal but for rounding nothing is
        divided.
      centre: whether the mean is subtracted. Without it rewards keep their sign, and as they are
        not moved, their sum over tokens is scaled like each.

    Returns:
      [...]; 0 where mask is False.
    """
    _check_floats(values)
    chex.assert_equal_shape([values, mask])
    std = scale.std
    std = jnp.where(std > _ROUNDING * jnp.abs(scale.mean), std, 1.0)
    return jnp.where(mask, values - (scale.mean if centre else 0.0), 0.0) / std


# --- groups --------------------------------------------------------------------------------------


def grpo_advantages(
    rewards: jax.Array, present: jax.Array, *, divide_by_std: bool
) -> jax.Array:
    """Advantages within the group of responses to a prompt: (r - mean) / std.

    GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2). The mean has the response's own reward
    in it, so that without division the expected gradient is (K - 1) / K of the policy gradient, see
    `rloo_advantages`. The division weighs prompts by how alike their responses' rewards are; Dr.
    GRPO (Liu et al. 2025, arXiv 2503.20783) leaves it out. Here the standard deviation is divided
    by K. A group of one has advantage 0, and so, divided, has one of rewards that are equal but
    for rounding of float32; nothing is added to the divisor.

    Args:
      rewards: [..., K].
      present: [..., K] bool.
      divide_by_std: see above.

    Returns:
      [..., K]; 0 where there is no response.
    """
    deviations, count = _deviations(rewards, present)
    if not divide_by_std:
        return deviations
    std = jnp.sqrt(jnp.sum(deviations**2, axis=-1, keepdims=True) / count)
    largest = jnp.max(jnp.where(present, jnp.abs(rewards), 0.0), axis=-1, keepdims=True)
    differ = std > _ROUNDING * largest
    return jnp.where(differ, deviations / jnp.where(differ, std, 1.0), 0.0)


def rloo_advantages(rewards: jax.Array, present: jax.Array) -> jax.Array:
    """Advantages over the mean of the other responses to a prompt.

    REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).
    The baseline does not know the response, so that the gradient is unbiased; it is K / (K - 1)
    times GRPO's without division. A group of one has no others, and advantage 0.

    Args:
      rewards: [..., K].
      present: [..., K] bool.

    Returns:
      [..., K]; 0 where there is no response.
    """
    deviations, count = _deviations(rewards, present)
    return deviations * count / jnp.maximum(count - 1.0, 1.0)


def _deviations(rewards: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distances [..., K] to the mean of a group, and [..., 1] how many there are, at least 1."""
    _check_floats(rewards)
    chex.assert_equal_shape([rewards, present])
    rewards = jax.lax.stop_gradient(jnp.where(present, rewards, 0.0))
    count = jnp.maximum(jnp.sum(present, axis=-1, keepdims=True), 1).astype(rewards.dtype)
    mean = jnp.sum(rewards, axis=-1, keepdims=True) / count
    return jnp.where(present, rewards - mean, 0.0), count


def _difference(log_probs: jax.Array, other: jax.Array, mask: jax.Array) -> jax.Array:
    """Differences [..., T] of log-probabilities, 0 where there is no token."""
    _check_floats(log_probs, other)
    chex.assert_equal_shape([log_probs, other, mask])
    # Selected before the difference: of two infinities at an empty place it would be nan.
    return jnp.where(mask, log_probs, 0.0) - jnp.where(mask, other, 0.0)


def _check_floats(*arrays: jax.Array) -> None:
    for array in arrays:
        if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).bits < 32:
            raise TypeError(f'an array of {array.dtype}, expected float32 or wider')
