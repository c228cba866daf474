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
    # Selected before the difference: of two infinities at an empty place it would be nan.
    ratios = jnp.where(mask, log_probs, 0.0) - jnp.where(mask, reference_log_probs, 0.0)
    total = token_sum(ratios, mask)
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
) -> jax.Array:
    """Direct preference optimisation: Bradley-Terry on implicit rewards.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: -log sigma(m) with the margin m = beta
    (chosen - rejected). A share of preferences that are the wrong way round is taken into account
    as cross-entropy with soft labels, -(1 - e) log sigma(m) - e log sigma(-m) (cDPO, Mitchell
    2023); m is then finite at the optimum, log((1 - e) / e).

    Args:
      chosen, rejected: [...] log-ratios of responses to the same prompts, see `log_ratio`; of any
        samples.
      beta: strength of the pull to the reference, > 0; of reward per nat.
      label_smoothing: e in [0, .5), a number or [...].

    Returns:
      [...] nats.
    """
    _check_floats(chosen, rejected)
    chex.assert_equal_shape([chosen, rejected])
    margin = beta * (chosen - rejected)
    # -log sigma(-m) = m - log sigma(m), so that a smoothing of 0 multiplies nothing infinite.
    return label_smoothing * margin - jax.nn.log_sigmoid(margin)


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


def _check_floats(*arrays: jax.Array) -> None:
    for array in arrays:
        if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).bits < 32:
            raise TypeError(f'an array of {array.dtype}, expected float32 or wider')
