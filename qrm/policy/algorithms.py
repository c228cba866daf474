"""What online algorithms make of rollouts, and the objective of their steps.

From rewards and log-probabilities of a whole rollout `shape` makes what its steps read: advantages
of tokens, and which responses count. All algorithms then take the same step (`Improvement`):

    loss of a token = policy + beta kl + value_weight value - entropy_weight entropy

which is added over tokens as `objectives.aggregate` says.

Axes: C prompts, K responses, T tokens of a response.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.models.network import Params
from qrm.policy import objectives
from qrm.policy.batches import PolicyBatch
from qrm.policy.network import PolicyNetwork
from qrm.policy.objectives import Moments

NAMES = ('ppo', 'grpo', 'rloo', 'expert_iteration', 'best_of_n')
TRUNCATED = ('penalty', 'mask', 'keep')
SCALES = ('none', 'batch', 'running')


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """How a policy learns from rollouts.

    Attributes:
      name: one of `NAMES`; but for 'best_of_n', which learns nothing.
      clip_low, clip_high: see `objectives.clipped_surrogate`.
      beta: reward per nat, or weight of the loss.
      kl_reward, kl_loss: estimators of the KL in the reward and in the loss; '': none.
      kl_corrected: that in the loss is corrected for the policy that sampled.
      kl_target: nats a response that beta is adapted to; 0: beta stays.
      kl_horizon: see `objectives.adaptive_beta`.
      scale, centre: of rewards, before the KL: which standard deviation they are divided by, one of
        `SCALES`, and whether the mean of the same rewards is subtracted.
      whiten: advantages of a rollout get mean 0 and standard deviation 1 over its tokens (ppo).
      divide_by_std: see `objectives.grpo_advantages` (grpo).
      aggregation, length: see `objectives.aggregate`.
      truncated: one of `TRUNCATED`.
      truncation_penalty: what is subtracted from rewards of truncated responses by 'penalty'.
      gamma, gae_lambda: see `objectives.gae` (ppo).
      value_weight, value_clip: see `objectives.value_loss` (ppo).
      entropy_weight: of the bonus.

    Raises:
      ValueError: settings that do not go together; begins with the key.
    """

    name: str
    clip_low: float
    clip_high: float
    beta: float
    kl_reward: str
    kl_loss: str
    kl_corrected: bool
    kl_target: float
    kl_horizon: float
    scale: str
    centre: bool
    whiten: bool
    divide_by_std: bool
    aggregation: str
    length: int
    truncated: str
    truncation_penalty: float
    gamma: float
    gae_lambda: float
    value_weight: float
    value_clip: float
    entropy_weight: float

    def __post_init__(self):
        if self.kl_loss == 'k1' and not self.kl_corrected:
            raise ValueError("kl_loss='k1' without kl_corrected, whose gradient is noise; expected "
                             "'k2' or 'k3', or kl_corrected=True")
        if self.kl_loss == 'k2' and self.kl_corrected:
            raise ValueError("kl_loss='k2' with kl_corrected=True, expected 'k1' or 'k3'")
        if (self.kl_target or self.beta) and not (self.kl_reward or self.kl_loss):
            key = 'kl_target' if self.kl_target else 'beta'
            raise ValueError(f'{key}={getattr(self, key)} with neither kl_reward nor kl_loss, '
                             'expected 0 or an estimator')
        if self.kl_target and not self.beta:
            raise ValueError(f'kl_target={self.kl_target} with beta=0, which stays 0')

    @property
    def valued(self) -> bool:
        """Whether there is a value head."""
        return self.name == 'ppo'

    @property
    def of_responses(self) -> tuple[str, ...]:
        """What a step reads of responses, by name, see `batches.Plan`."""
        return ('counts', *(('beta',) if self.kl_loss else ()))

    @property
    def of_tokens(self) -> tuple[str, ...]:
        """What a step reads of their tokens."""
        return ('old_log_probs', 'advantages',
                *(('reference_log_probs',) if self.kl_loss else ()),
                *(('old_values', 'returns') if self.valued else ()))

    @property
    def surrogate(self) -> bool:
        """Whether the loss is that of a ratio to the policy that sampled; else a likelihood."""
        return self.name != 'expert_iteration'


class Carried(NamedTuple):
    """What goes on from rollout to rollout, [] float32 each.

    Attributes:
      beta: of the next one.
      scores: of all rewards so far.
    """

    beta: np.ndarray
    scores: Moments


class Rolled(NamedTuple):
    """A rollout in numbers.

    Attributes:
      rewards: [C, K] float32.
      mask: [C, K, T] bool, where there is a token.
      truncated: [C, K] bool.
      log_probs, reference_log_probs, values: [C, K, T] float32, of the policy that sampled.
    """

    rewards: np.ndarray
    mask: np.ndarray
    truncated: np.ndarray
    log_probs: np.ndarray
    reference_log_probs: np.ndarray
    values: np.ndarray


class Shaped(NamedTuple):
    """What steps read of a rollout beside its tokens and log-probabilities.

    Attributes:
      advantages, returns: [C, K, T] float32.
      counts: [C, K] float32, 1 of responses that are learnt from.
      beta: [C, K] float32, the same for all.
    """

    advantages: np.ndarray
    returns: np.ndarray
    counts: np.ndarray
    beta: np.ndarray


def start(how: Algorithm) -> Carried:
    """Before the first rollout."""
    return Carried(np.float32(how.beta), Moments(*np.zeros(3, np.float32)))


def shape(rolled: Rolled, carried: Carried, how: Algorithm
          ) -> tuple[Shaped, Carried, dict[str, float]]:
    """What is learnt from a rollout, what goes on after it, and its metrics.

    1. A truncated response has its reward reduced ('penalty'), is left out of losses, groups and
       statistics ('mask'), or is as any other ('keep').
    2. Rewards are divided by a standard deviation, of those of this rollout ('batch') or of all so
       far with these ('running'), and centred if that is asked for.
    3. KL in the reward: -beta KL at each token ('ppo'), or its sum at the response.
    4. Advantages: `gae` of token rewards and values, whitened; `grpo_advantages` or
       `rloo_advantages` of responses, the same for all tokens; for 'expert_iteration' 1 for the
       best response to a prompt, of equal ones the first, the only one that counts.

    Args:
      rolled: the rollout.
      carried: from before it.
      how: the algorithm.
    """
    shaped, carried, metrics = jax.device_get(_shape(how, rolled, carried))
    return shaped, carried, {name: float(value) for name, value in metrics.items()}


@functools.partial(jax.jit, static_argnums=0)
def _shape(how: Algorithm, rolled: Rolled, carried: Carried
           ) -> tuple[Shaped, Carried, dict[str, jax.Array]]:
    """`shape`, whose values are arrays."""
    present = ~rolled.truncated if how.truncated == 'mask' else jnp.ones_like(rolled.truncated)
    mask, counts = rolled.mask & present[..., None], present
    penalty = how.truncation_penalty if how.truncated == 'penalty' else 0.0
    scores = rolled.rewards - penalty * rolled.truncated
    own = objectives.moments(scores, present)
    running = objectives.merge(carried.scores, own)
    # The first one has standard deviation 1.
    scale = {'none': own._replace(squares=own.count), 'batch': own, 'running': running}[how.scale]
    rewards = objectives.standardise(scores, present, scale, centre=how.centre)
    kl, returns = jnp.zeros(mask.shape), jnp.zeros(mask.shape)
    if how.kl_reward:
        kl = objectives.kl_estimates(
            rolled.log_probs, rolled.reference_log_probs, mask, how.kl_reward)
    if how.name == 'ppo':
        of_tokens = objectives.penalised_rewards(rewards, kl, mask, beta=carried.beta)
        advantages, returns = objectives.gae(
            of_tokens, rolled.values, mask, gamma=how.gamma, gae_lambda=how.gae_lambda)
        if how.whiten:
            advantages = objectives.standardise(
                advantages, mask, objectives.moments(advantages, mask))
    else:
        of_responses = _of_responses(
            rewards - carried.beta * objectives.token_sum(kl, mask), present, how)
        if how.name == 'expert_iteration':
            counts = of_responses > 0
        advantages = jnp.where(mask, of_responses[..., None], 0.0)
    number = jnp.maximum(jnp.sum(present), 1)
    measured = jnp.sum(objectives.token_sum(objectives.kl_estimates(
        rolled.log_probs, rolled.reference_log_probs, mask, 'k1'), mask)) / number
    beta = carried.beta
    if how.kl_target:
        beta = objectives.adaptive_beta(beta, measured, target=how.kl_target,
                                        horizon=how.kl_horizon, n=number)
    metrics = {
        'reward': jnp.mean(rolled.rewards), 'reward_std': jnp.std(rolled.rewards),
        'kl_to_reference': measured, 'beta': carried.beta,
        'length': jnp.mean(jnp.sum(rolled.mask, axis=-1)),
        'truncated': jnp.mean(rolled.truncated), 'counted': jnp.mean(counts)}
    shaped = Shaped(advantages, returns, counts.astype(jnp.float32),
                    jnp.full(present.shape, carried.beta))
    return shaped, Carried(beta, running), metrics


def _of_responses(rewards: jax.Array, present: jax.Array, how: Algorithm) -> jax.Array:
    """Advantages [C, K] of whole responses."""
    if how.name == 'grpo':
        return objectives.grpo_advantages(rewards, present, divide_by_std=how.divide_by_std)
    if how.name == 'rloo':
        return objectives.rloo_advantages(rewards, present)
    best = jnp.argmax(jnp.where(present, rewards, -math.inf), axis=-1, keepdims=True)
    return (jnp.arange(rewards.shape[-1]) == best).astype(jnp.float32) * present


# --- the step ------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Sums over micro-batches, all [] float32.

    `total`, `policy`, `kl` and `value` are over `parts`, by the aggregation of the algorithm; the
    others over `tokens`.
    """

    total: jax.Array
    policy: jax.Array
    kl: jax.Array
    value: jax.Array
    parts: jax.Array
    entropy: jax.Array
    clipped: jax.Array
    clipped_values: jax.Array
    ratio: jax.Array
    old_kl: jax.Array
    tokens: jax.Array

    @property
    def weight(self) -> jax.Array:
        """What gradients are divided by; 1 where no response counts, which then moves nothing."""
        return jnp.where(self.parts > 0, self.parts, 1.0)

    def metrics(self) -> dict[str, jax.Array]:
        """The loss and its parts, and means over tokens."""
        tokens = jnp.maximum(self.tokens, 1.0)
        return {
            'loss': self.total / self.weight, 'policy_loss': self.policy / self.weight,
            'kl_loss': self.kl / self.weight, 'value_loss': self.value / self.weight,
            'entropy': self.entropy / tokens, 'clipped': self.clipped / tokens,
            'clipped_values': self.clipped_values / tokens, 'ratio': self.ratio / tokens,
            'old_kl': self.old_kl / tokens, 'tokens': self.tokens}


@dataclasses.dataclass(frozen=True)
class Improvement:
    """The loss of a step on a part of a rollout, see `step.Objective`.

    Attributes:
      network: the policy.
      how: the algorithm.
    """

    network: PolicyNetwork
    how: Algorithm
    sums = Sums
    draws = False
    ema_decay = None

    def __call__(
        self, params: Params, embedded: jax.Array, batch: PolicyBatch, teacher: None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Sums]:
        """The sum over a micro-batch, see `step.Objective`."""
        how, extras = self.how, batch.extras
        mask = batch.mask & (extras['counts'] > 0)[..., None]
        found = self.network.read(params, batch, embedded, key, entropy=how.entropy_weight > 0)
        log_probs, old = found.log_probs, extras['old_log_probs']
        zeros = jnp.zeros(mask.shape)
        clipped, kl, value, clipped_values = zeros > 0, zeros, zeros, zeros > 0
        if how.surrogate:
            policy, clipped = objectives.clipped_surrogate(
                log_probs, old, extras['advantages'], mask, clip_low=how.clip_low,
                clip_high=how.clip_high)
        else:
            policy = -extras['advantages'] * log_probs
        if how.kl_loss:
            kl = extras['beta'][..., None] * objectives.kl_estimates(
                log_probs, extras['reference_log_probs'], mask, how.kl_loss,
                old if how.kl_corrected else None)
        if how.valued:
            value, clipped_values = objectives.value_loss(
                found.values, extras['old_values'], extras['returns'], mask, clip=how.value_clip)
        losses = policy + kl + how.value_weight * value
        if how.entropy_weight:
            losses -= how.entropy_weight * found.entropy

        def added(values: jax.Array) -> objectives.WeightedSum:
            return objectives.aggregate(values, mask, how.aggregation, how.length or None)

        def over_tokens(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(mask, values, 0)).astype(jnp.float32)

        total = added(losses)
        shift = jnp.where(mask, log_probs - old, 0.0)
        return total.value, Sums(
            total.value, added(policy).value, added(kl).value, added(value).value, total.weight,
            jnp.zeros(()) if found.entropy is None else over_tokens(found.entropy),
            over_tokens(clipped), over_tokens(clipped_values), over_tokens(jnp.exp(shift)),
            over_tokens(jnp.expm1(shift) - shift), over_tokens(mask))

    def as_row(self, values: dict[str, float]) -> dict[str, float]:
        """Without what is 0 as the algorithm has no such thing."""
        how = self.how
        unused = {'kl_loss': not how.kl_loss, 'value_loss': not how.valued,
                  'clipped_values': not how.valued, 'entropy': not how.entropy_weight,
                  'clipped': not how.surrogate}
        return {name: value for name, value in values.items() if not unused.get(name)}
