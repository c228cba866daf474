"""Distributions of a reward: finitely many atoms, or a mixture of Gaussians.

Axes: `...` any leading axes, N atoms, M components, E members, m points. Both classes are pytrees
of float arrays, whose precision results have. Every method is a pure function that works under
jit, vmap and grad, and leading axes broadcast as in numpy. For a reward R of this distribution:

  mean, std                 [...]; the gradient of std is 0, not NaN, where std is 0.
  cdf(x)                    [..., m] -> [..., m] P(R <= x).
  quantile(taus)            [m] in (0, 1] -> [..., m] the smallest x with cdf(x) >= tau; for
                            Gaussians tau < 1.
  sample(key, n)            [..., n] independent draws.
  cvar(alpha)               [] in (0, 1] -> [...] the mean of the lowest alpha of the mass.
                            An atom may count in part (Acerbi & Tasche 2002).
  crps(y)                   [...] -> [...] continuous ranked probability score of an observed y,
                            E|R - y| - E|R - R'| / 2 (Gneiting & Raftery 2007, eq. 21).
  log_win_probability(other, margin)
                            log E sigma(R - R' - margin) in nats for independent R and R' ~ other:
                            the probability that annotators prefer this response if each draws
                            his own rewards and has logistic noise. `other` is of the same class,
                            or it raises TypeError.
  win_probability(other, margin)
                            its exponential.
  scale_and_shift(scale, shift)
                            [...], [...] -> the distribution of scale * R + shift, scale > 0.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtr, ndtri

# Quadrature of `_log_expected_sigmoid`.
_NODES = 65
_REACH = 8.0
_FINE = 4.0

_FAR = 1e4  # standard deviations, beyond which a Gaussian has no mass in any precision


class Atoms(NamedTuple):
    """A finite distribution.

    Attributes:
      values: [..., N] in any order; equal ones are allowed.
      weights: [..., N] their probabilities, >= 0 with sum 1 along the last axis.
    """

    values: jax.Array
    weights: jax.Array

    @property
    def mean(self) -> jax.Array:
        return jnp.sum(self.weights * self.values, axis=-1)

    @property
    def std(self) -> jax.Array:
        # Around an atom first: equal atoms then have variance 0 and not a rounding error.
        offset = self.values - self.values[..., :1]
        centred = offset - jnp.sum(self.weights * offset, axis=-1, keepdims=True)
        variance = jnp.sum(self.weights * centred**2, axis=-1)
        positive = variance > 0.0
        # Selected twice, as the infinite slope at 0 would reach the gradient as 0 * inf.
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)

    def cdf(self, x: jax.Array) -> jax.Array:
        below = self.values[..., None, :] <= jnp.asarray(x)[..., :, None]
        return jnp.sum(jnp.where(below, self.weights[..., None, :], 0.0), axis=-1)

    def quantile(self, taus: jax.Array) -> jax.Array:
        chex.assert_rank(taus, 1)
        values, weights = self._sorted()
        n = values.shape[-1]
        # What adding N weights may lose to rounding. Without it tau = i / N could give atom i + 1.
        tolerance = n * jnp.finfo(weights.dtype).eps
        reached = jnp.cumsum(weights, axis=-1)[..., None, :] + tolerance
        index = jnp.sum(reached < jnp.asarray(taus, weights.dtype)[:, None], axis=-1)
        return jnp.take_along_axis(values, jnp.minimum(index, n - 1), axis=-1)

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        return jnp.take_along_axis(self.values, _draw(key, self.weights, n), axis=-1)

    def cvar(self, alpha: jax.Array | float) -> jax.Array:
        chex.assert_rank(alpha, 0)
        values, weights = self._sorted()
        before = jnp.cumsum(weights, axis=-1) - weights
        counted = jnp.clip(alpha - before, 0.0, weights)
        return jnp.sum(counted * values, axis=-1) / alpha

    def crps(self, y: jax.Array) -> jax.Array:
        # Twice the pinball loss of every atom at the middle of its step of the cdf: in
        # O(N log N), and of terms >= 0 where E|R - y| - E|R - R'| / 2 would cancel.
        values, weights = self._sorted()
        taus = jnp.cumsum(weights, axis=-1) - 0.5 * weights
        error = jnp.asarray(y)[..., None] - values
        return 2.0 * jnp.sum(weights * jnp.maximum(taus * error, (taus - 1.0) * error), axis=-1)

    def log_win_probability(
        self, other: 'Atoms', margin: jax.Array | float = 0.0
    ) -> jax.Array:
        _check_same_class(self, other)
        lead = self.values[..., :, None] - other.values[..., None, :]
        log_wins = jax.nn.log_sigmoid(lead - jnp.asarray(margin)[..., None, None])
        return _log_mean_of_pairs(log_wins, self.weights, other.weights)

    def win_probability(self, other: 'Atoms', margin: jax.Array | float = 0.0) -> jax.Array:
        return jnp.exp(self.log_win_probability(other, margin))

    def scale_and_shift(self, scale: jax.Array | float, shift: jax.Array | float) -> 'Atoms':
        scale, shift = (jnp.asarray(x)[..., None] for x in (scale, shift))
        values = scale * self.values + shift
        return Atoms(values, jnp.broadcast_to(self.weights, values.shape))

    def _sorted(self) -> tuple[jax.Array, jax.Array]:
        """Values in increasing order and their weights."""
        return jax.lax.sort((self.values, self.weights), num_keys=1)


class Gaussians(NamedTuple):
    """A mixture of Gaussians; with M = 1 a Gaussian.

    Attributes:
      weights: [..., M] probabilities of the components, >= 0 with sum 1 along the last axis.
      means: [..., M].
      scales: [..., M] standard deviations, > 0.
    """

    weights: jax.Array
    means: jax.Array
    scales: jax.Array

    @property
    def mean(self) -> jax.Array:
        return jnp.sum(self.weights * self.means, axis=-1)

    @property
    def std(self) -> jax.Array:
        centred = self.means - self.mean[..., None]
        return jnp.sqrt(jnp.sum(self.weights * (self.scales**2 + centred**2), axis=-1))

    def cdf(self, x: jax.Array) -> jax.Array:
        return jnp.sum(self.weights[..., None, :] * ndtr(self._standardised(x)), axis=-1)

    def quantile(self, taus: jax.Array) -> jax.Array:
        """Exact for M = 1; else by bisection, with the gradient of the implicit function."""
        chex.assert_rank(taus, 1)
        taus = jnp.asarray(taus, self.means.dtype)
        of_components = (
            self.means[..., None, :] + self.scales[..., None, :] * ndtri(taus)[:, None])
        if self.means.shape[-1] == 1:
            return of_components[..., 0]
        fixed = jax.lax.stop_gradient(self)

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            reached = fixed.cdf(middle) >= taus
            return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

        ends = (jnp.min(of_components, axis=-1), jnp.max(of_components, axis=-1))
        precision = jnp.finfo(self.means.dtype)
        _, x = jax.lax.fori_loop(0, precision.nmant + 10, halve, jax.lax.stop_gradient(ends))
        # cdf(x) = tau, hence dx = (dtau - dcdf) / density. The correction itself is 0.
        weights = (fixed.weights / fixed.scales)[..., None, :]
        density = jnp.sum(weights * _density(fixed._standardised(x)), axis=-1)
        short = taus - self.cdf(x)
        return x + (short - jax.lax.stop_gradient(short)) / jnp.maximum(density, precision.tiny)

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        of_component, of_noise = jax.random.split(key)
        component = _draw(of_component, self.weights, n)
        means, scales = (
            jnp.take_along_axis(x, component, axis=-1) for x in (self.means, self.scales))
        return means + scales * jax.random.normal(of_noise, means.shape, means.dtype)

    def cvar(self, alpha: jax.Array | float) -> jax.Array:
        # q - E max(q - R, 0) / alpha is largest, and is the CVaR, at the quantile q
        # (Rockafellar & Uryasev 2000, theorem 1), so that errors and slopes of q do not matter.
        chex.assert_rank(alpha, 0)
        tau = jnp.minimum(jnp.asarray(alpha), 1.0 - jnp.finfo(self.means.dtype).eps)
        q = jax.lax.stop_gradient(self.quantile(tau[None]))
        z = (q - self.means) / self.scales
        shortfall = self.scales * (z * ndtr(z) + _density(z))
        return q[..., 0] - jnp.sum(self.weights * shortfall, axis=-1) / alpha

    def crps(self, y: jax.Array) -> jax.Array:
        """The closed form of Grimit et al. 2006."""
        of_error = _mean_magnitude(jnp.asarray(y)[..., None] - self.means, self.scales)
        of_pairs = _mean_magnitude(*_pairs(self, self))
        weights = self.weights[..., :, None] * self.weights[..., None, :]
        return jnp.sum(self.weights * of_error, axis=-1) - 0.5 * jnp.sum(
            weights * of_pairs, axis=(-2, -1))

    def log_win_probability(
        self, other: 'Gaussians', margin: jax.Array | float = 0.0
    ) -> jax.Array:
        """The difference of two mixtures is a mixture; see `_log_expected_sigmoid`."""
        _check_same_class(self, other)
        lead, scale = _pairs(self, other)
        log_wins = _log_expected_sigmoid(lead - jnp.asarray(margin)[..., None, None], scale)
        return _log_mean_of_pairs(log_wins, self.weights, other.weights)

    def win_probability(self, other: 'Gaussians', margin: jax.Array | float = 0.0) -> jax.Array:
        return jnp.exp(self.log_win_probability(other, margin))

    def scale_and_shift(self, scale: jax.Array | float, shift: jax.Array | float) -> 'Gaussians':
        scale, shift = (jnp.asarray(x)[..., None] for x in (scale, shift))
        means = scale * self.means + shift
        return Gaussians(
            jnp.broadcast_to(self.weights, means.shape),
            means,
            jnp.broadcast_to(scale * self.scales, means.shape),
        )

    def _standardised(self, x: jax.Array) -> jax.Array:
        """[..., m] -> [..., m, M]."""
        distance = jnp.asarray(x)[..., :, None] - self.means[..., None, :]
        return distance / self.scales[..., None, :]


Distribution = Atoms | Gaussians


def uniform_atoms(values: jax.Array) -> Atoms:
    """[..., N] values, each of probability 1 / N."""
    return Atoms(values, jnp.full_like(values, 1.0 / values.shape[-1]))


def pool(members: Distribution) -> Distribution:
    """The equal mixture of E distributions.

    Args:
      members: a distribution with leading axes [..., E].

    Returns:
      A distribution with leading axes [...] and E times the atoms or components.
    """
    weights = members.weights / members.weights.shape[-2]
    return jax.tree.map(
        lambda x: x.reshape(*x.shape[:-2], -1), members._replace(weights=weights))


def log_shared_win_probability(
    a: Atoms, b: Atoms, margin: jax.Array | float = 0.0
) -> jax.Array:
    """log sum_i w_i sigma(a_i - b_i - margin): every annotator judges both responses.

    Args:
      a, b: atom i of both, with leading axes [...], is the reward that annotator i gives; the
        weights are those of a.
      margin: [...] by how much a should be ahead.

    Returns:
      [...] nats, <= 0.
    """
    chex.assert_equal_shape_suffix([a.values, b.values], 1)
    log_wins = jax.nn.log_sigmoid(a.values - b.values - jnp.asarray(margin)[..., None])
    return jax.nn.logsumexp(log_wins, axis=-1, b=a.weights)


def log_greater_probability(
    a: Gaussians, b: Gaussians, margin: jax.Array | float = 0.0
) -> jax.Array:
    """log P(A - B > margin) of independent draws, without noise beside theirs.

    Thurstone's law of comparative judgement, case III (1927): log Phi((m_a - m_b - margin) /
    sqrt(s_a^2 + s_b^2)), the mean over components of mixtures.

    Args:
      a, b: with leading axes [...].
      margin: [...] by how much a should be ahead.

    Returns:
      [...] nats, <= 0.
    """
    lead, scale = _pairs(a, b)
    log_wins = log_ndtr((lead - jnp.asarray(margin)[..., None, None]) / scale)
    return _log_mean_of_pairs(log_wins, a.weights, b.weights)


def log_interval_probability(a: Gaussians, low: jax.Array, high: jax.Array) -> jax.Array:
    """log P(low <= A < high), precise in both tails.

    Args:
      a: with leading axes [...].
      low, high: [...] ends, low < high; infinite ones are allowed.

    Returns:
      [...] nats, <= 0.
    """

    def standardised(end: jax.Array) -> jax.Array:
        end = jnp.asarray(end)[..., None]
        known = jnp.isfinite(end)
        # Selected twice, as an infinite distance would reach the gradient as 0 * inf.
        z = (jnp.where(known, end, 0.0) - a.means) / a.scales
        return jnp.where(known, z, jnp.copysign(_FAR, end))

    log_masses = _log_ndtr_between(standardised(low), standardised(high))
    return jax.nn.logsumexp(log_masses, axis=-1, b=a.weights)


def _log_ndtr_between(low, high):
    """log(Phi(high) - Phi(low)), low < high, precise in both tails."""
    flipped = low > 0.0
    low, high = jnp.where(flipped, -high, low), jnp.where(flipped, -low, high)
    log_high = log_ndtr(high)
    distance = log_high - log_ndtr(low)
    # log(1 - exp(-d)), by the form that loses fewer digits (Maechler 2012); each is kept from the
    # other's part of the line, where its slope is infinite.
    near = distance < math.log(2.0)
    of_near = jnp.log(-jnp.expm1(-jnp.where(near, distance, 1.0)))
    of_far = jnp.log1p(-jnp.exp(-jnp.where(near, 1.0, distance)))
    return log_high + jnp.where(near, of_near, of_far)


def _check_same_class(a, b):
    if type(a) is not type(b):
        raise TypeError(f'{type(a).__name__} against {type(b).__name__}, '
                        'expected two distributions of the same class')


def _draw(key, weights, n):
    """Indices of n independent draws, [..., N] weights -> [..., n]."""
    reached = jnp.cumsum(weights, axis=-1)
    shape = (*weights.shape[:-1], n)
    # Below the sum of the weights, which rounding may leave below 1.
    uniform = jax.random.uniform(key, shape, weights.dtype) * reached[..., -1:]
    index = jnp.sum(reached[..., None, :] <= uniform[..., :, None], axis=-1)
    return jnp.minimum(index, weights.shape[-1] - 1)


def _log_mean_of_pairs(log_wins, weights, other_weights):
    """log sum_ij w_i w'_j exp(log_wins [..., i, j]); a weight of 0 is allowed."""
    # One axis after the other: the product of two small weights could underflow.
    inner = jax.nn.logsumexp(log_wins, axis=-1, b=other_weights[..., None, :])
    return jax.nn.logsumexp(inner, axis=-1, b=weights)


def _pairs(a, b):
    """Means and scales of the differences of all components, ([..., M, M'], [..., M, M'])."""
    means = a.means[..., :, None] - b.means[..., None, :]
    return means, jnp.sqrt(a.scales[..., :, None] ** 2 + b.scales[..., None, :] ** 2)


def _density(z):
    return jnp.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)


def _mean_magnitude(mean, scale):
    """E|mean + scale Z| for a standard Gaussian Z."""
    z = mean / scale
    return mean * (2.0 * ndtr(z) - 1.0) + 2.0 * scale * _density(z)


def _log_expected_sigmoid(mean, scale):
    """log E sigma(mean + scale Z) for a standard Gaussian Z.

    The trapezoid rule in t with z = pivot + width sinh(t): it converges exponentially, and its
    nodes are dense where the sigmoid is steep, which takes 1 / scale in z. For scale <= 10, 100
    and 3000 the error of the value and of both slopes is below 1e-12, 1e-10 and 1e-6 in float64,
    and 5e-6, 2e-5 and 2e-4 (1e-6 for the value) in float32, where rounding decides; relative for
    numbers beyond 1, and far into the tails. The side that wins less is integrated and the other
    is 1 minus it, so that both add up to 1.

    Args:
      mean, scale: [...].

    Returns:
      [...] nats.
    """
    behind = jnp.where(mean > 0.0, -mean, mean)
    z, log_step = _nodes(*jax.lax.stop_gradient((behind, scale)))
    log_density = -0.5 * (z**2 + math.log(2.0 * math.pi))
    log_win = jax.nn.log_sigmoid(behind[..., None] + scale[..., None] * z)
    log_p = jax.nn.logsumexp(log_step + log_density + log_win, axis=-1)
    return jnp.where(mean > 0.0, jnp.log1p(-jnp.exp(log_p)), log_p)


def _nodes(mean, scale):
    """Nodes z and logarithms of their steps, ([..., n], [..., n]); mean <= 0."""
    # The sigmoid is 1/2 at z = steep. Left of it the integrand is about exp(scale z - z^2 / 2),
    # right of it exp(-z^2 / 2), so its mode is close to min(steep, scale), and it falls from
    # there at least as fast as a standard Gaussian.
    steep = -mean / scale
    mode = jnp.minimum(steep, scale)
    pivot = jnp.minimum(steep, mode + _REACH)
    width = _FINE / scale
    first, last = (jnp.arcsinh((mode + end - pivot) / width) for end in (-_REACH, _REACH))
    t = jnp.linspace(first, last, _NODES, axis=-1)
    step = width * (last - first) / (_NODES - 1)
    z = pivot[..., None] + width[..., None] * jnp.sinh(t)
    return z, jnp.log(step[..., None] * jnp.cosh(t))
