"""Tests of the distributions of a reward against closed forms, SciPy and dense integration.

Axes: b cases, N atoms, M components.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from scipy.stats import norm

from qrm.rewards.distributions import (
    Atoms,
    Gaussians,
    log_greater_probability,
    log_interval_probability,
    log_shared_win_probability,
    pool,
    uniform_atoms,
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


class Summary(NamedTuple):
    """What all methods but `sample` say of one distribution against another."""

    mean: jax.Array
    std: jax.Array
    cdf: jax.Array
    quantile: jax.Array
    cvar: jax.Array
    crps: jax.Array
    log_win: jax.Array
    win: jax.Array


TAUS = np.array([0.03, 0.2, 0.5, 0.77, 0.999])
ALPHAS = np.array([0.05, 0.33, 0.9, 1.0])


def _summary(d, other, x, y, margin):
    cvar = jax.vmap(d.cvar, out_axes=-1)(jnp.asarray(ALPHAS, y.dtype))
    return Summary(
        d.mean, d.std, d.cdf(x), d.quantile(TAUS), cvar, d.crps(y),
        d.log_win_probability(other, margin), d.win_probability(other, margin),
    )


# Compiled once for all tests of one shape. All batches have six cases for that.
_summarise = jax.jit(_summary)
_quantile = jax.jit(lambda d, taus: d.quantile(taus))
_cvar = jax.jit(lambda d, alpha: d.cvar(alpha))
_sample = jax.jit(lambda d, key, n: d.sample(key, n), static_argnums=2)
_crps = jax.jit(lambda d, y: d.crps(y))


def _atoms(seed, *axes):
    rng = np.random.default_rng(seed)
    return Atoms(rng.normal(0.3, 1.5, axes), rng.dirichlet(np.ones(axes[-1]), axes[:-1]))


def _gaussians(seed, *axes):
    means, weights = _atoms(seed, *axes)
    return Gaussians(weights, means, np.random.default_rng(seed).uniform(0.2, 1.5, axes))


def _as(dtype, tree):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _sigma(x):
    return 1.0 / (1.0 + math.exp(-x))


X, Y, MARGIN = (np.random.default_rng(1).normal(0.3, 1.0, axes) for axes in ((6, 3), 6, 6))

# Atoms: random; tied; with atoms of weight 0, one of them the lowest and one the highest; all
# equal; a point mass; random.

ATOMS = _atoms(0, 6, 5)
ATOMS.values[1, 3:] = ATOMS.values[1, :2]
ATOMS.values[2] = [5.0, -1.0, 0.5, -7.0, 0.25]
ATOMS.weights[2] = [0.0, 0.3, 0.2, 0.0, 0.5]
ATOMS.values[3] = 3.7
ATOMS.weights[4] = [0.0, 0.0, 1.0, 0.0, 0.0]
OTHER_ATOMS = Atoms(ATOMS.values[::-1].copy(), ATOMS.weights[::-1].copy())
X[2] = [-1.0, np.nextafter(np.float32(0.5), 0.0), 0.5]

# Mixtures: random; with a component of weight 0; with scales from .01 to 10; with components 30
# apart; random.

MIXTURES, OTHER_MIXTURES = _gaussians(2, 6, 3), _gaussians(3, 6, 3)
MIXTURES.weights[1] = [0.4, 0.0, 0.6]
MIXTURES.scales[2] = [0.01, 1.0, 10.0]
MIXTURES.means[3] = [-30.0, 0.0, 30.0]
MIXTURES.weights[3] = [0.3, 0.4, 0.3]

PAIRS = {'atoms': (ATOMS, OTHER_ATOMS), 'gaussians': (MIXTURES, OTHER_MIXTURES)}


def _summarise_pair(name):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _summarise(*PAIRS[name], X, Y, MARGIN))


@pytest.fixture
def of_atoms():
    return _summarise_pair('atoms')


@pytest.fixture
def of_gaussians():
    return _summarise_pair('gaussians')


# Atoms.


def test_atoms_mean_std_and_cdf(of_atoms):
    for i, (values, weights) in enumerate(zip(*ATOMS, strict=True)):
        mean = np.average(values, weights=weights)
        assert of_atoms.mean[i] == pytest.approx(mean, abs=1e-14)
        variance = np.average((values - mean) ** 2, weights=weights)
        assert of_atoms.std[i] == pytest.approx(math.sqrt(variance), abs=1e-14)
        expected = [weights[values <= x].sum() for x in X[i]]
        np.testing.assert_allclose(of_atoms.cdf[i], expected, rtol=0, atol=1e-15)
    # By hand: .3 at -1, .5 at .25 and .2 at .5, which counts at .5 itself.
    np.testing.assert_allclose(of_atoms.cdf[2], [0.3, 0.8, 1.0], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(of_atoms.std[3:5], 0.0)


def test_atoms_quantile_and_cvar_are_of_the_quantile_function(of_atoms):
    # The values at 300,000 midpoints of tau.
    n = 300_000
    for i, (values, weights) in enumerate(zip(*ATOMS, strict=True)):
        order = np.argsort(values)
        place = np.searchsorted(np.cumsum(weights[order]), (np.arange(n) + 0.5) / n)
        dense = values[order][place]
        np.testing.assert_array_equal(of_atoms.quantile[i], dense[(TAUS * n - 0.5).astype(int)])
        expected = [dense[:round(alpha * n)].mean() for alpha in ALPHAS]
        np.testing.assert_allclose(of_atoms.cvar[i], expected, rtol=0, atol=2e-4)


def test_atoms_crps_matches_the_integral(of_atoms):
    for i, (values, weights) in enumerate(zip(*ATOMS, strict=True)):
        # (cdf - 1{x >= y})^2 is constant between the atoms and y.
        ends = np.sort(np.append(values, Y[i]))
        cdf = (values <= ends[:-1, None]) @ weights
        integral = np.sum((cdf - (ends[:-1] >= Y[i])) ** 2 * np.diff(ends))
        assert of_atoms.crps[i] == pytest.approx(integral, abs=1e-13)


def test_atoms_win_probability_is_the_sum_over_pairs(of_atoms):
    lead = ATOMS.values[:, :, None] - OTHER_ATOMS.values[:, None] - MARGIN[:, None, None]
    expected = np.einsum(
        'bn,bm,bnm->b', ATOMS.weights, OTHER_ATOMS.weights, 1.0 / (1.0 + np.exp(-lead)))
    np.testing.assert_allclose(of_atoms.win, expected, rtol=1e-13)
    np.testing.assert_allclose(of_atoms.log_win, np.log(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize('n', [1, 2, 3, 7, 10, 51, 200])
def test_midpoints_of_uniform_atoms_give_them_back(n):
    # In float32, where rounding decides the most; the ends i / N of the steps belong to them.
    values = np.random.default_rng(n).normal(size=n).astype(np.float32)
    steps = np.arange(n)
    taus = np.concatenate([(steps + 0.5) / n, (steps + 1) / n]).astype(np.float32)
    quantiles = _quantile(uniform_atoms(jnp.asarray(values)), taus)
    np.testing.assert_array_equal(quantiles, np.tile(np.sort(values), 2))


def test_quantile_by_hand():
    # Sorted: -7 (0), -1 (.25), 0 (.25 and .125 tied), 2 (.375), 9 (0).
    d = Atoms(jnp.array([2.0, 0.0, -7.0, -1.0, 9.0, 0.0]),
              jnp.array([0.375, 0.25, 0.0, 0.25, 0.0, 0.125]))
    taus = jnp.array([0.01, 0.25, 0.26, 0.5, 0.625, 0.63, 1.0])
    np.testing.assert_array_equal(_quantile(d, taus), [-1, -1, 0, 0, 0, 2, 2])


def test_cvar_by_hand():
    # The lowest .3 of the mass: all of -4 (.25) and .05 of 1; (-1 + .05) / .3.
    d = Atoms(jnp.array([1.0, -4.0, 3.0]), jnp.array([0.5, 0.25, 0.25]))
    for alpha, expected in ((0.1, -4.0), (0.25, -4.0), (0.3, -0.95 / 0.3), (1.0, 0.25)):
        assert float(_cvar(d, alpha)) == pytest.approx(expected, abs=1e-6)
    # Ten midpoints: the mean of the lowest two.
    midpoints = uniform_atoms(jnp.asarray(norm.ppf((np.arange(10) + 0.5) / 10), jnp.float32))
    assert float(_cvar(midpoints, 0.2)) == pytest.approx(-1.341, abs=5e-4)


def test_crps_of_a_standard_gaussian_and_its_midpoints():
    midpoints = uniform_atoms(jnp.asarray(norm.ppf((np.arange(10) + 0.5) / 10), jnp.float32))
    exact = Gaussians(jnp.ones(1), jnp.zeros(1), jnp.ones(1))
    assert float(_crps(midpoints, 0.0)) == pytest.approx(0.2391, abs=5e-5)
    # (sqrt(2) - 1) / sqrt(pi), from Gneiting & Raftery 2007, eq. 22, at z = 0.
    value = float(_crps(exact, 0.0))
    assert value == pytest.approx((math.sqrt(2) - 1) / math.sqrt(math.pi))
    assert value == pytest.approx(0.2337, abs=5e-5)
    # A point mass: the absolute error.
    assert float(_crps(uniform_atoms(jnp.array([2.5])), -1.0)) == pytest.approx(3.5)


def test_std_has_no_gradient_at_no_variance():
    slopes = jax.jit(jax.grad(lambda v: jnp.sum(uniform_atoms(v).std)))
    for values in (np.full((1, 10), 3.7), np.array([[0.0] * 3, [1e4] * 3]), np.ones((1, 1))):
        np.testing.assert_array_equal(
            slopes(jnp.asarray(values, jnp.float32)), np.zeros(values.shape))


# Gaussians.


def _dense(i):
    """cdf and density of a mixture, and points that resolve each of its components."""
    w, m, s = (x[i] for x in MIXTURES)
    points = np.unique(m + s * np.linspace(-10.0, 10.0, 16_001)[:, None])
    return (lambda x: norm.cdf(np.asarray(x)[..., None], m, s) @ w,
            lambda x: norm.pdf(np.asarray(x)[..., None], m, s) @ w, points)


def _root(cdf, tau, points):
    return scipy.optimize.brentq(lambda x: cdf(x) - tau, points[0], points[-1], xtol=1e-13)


def test_gaussians_moments_cdf_and_quantile(of_gaussians):
    for i in range(6):
        cdf, density, points = _dense(i)
        mean = np.trapezoid(points * density(points), points)
        variance = np.trapezoid((points - mean) ** 2 * density(points), points)
        assert of_gaussians.mean[i] == pytest.approx(mean, abs=1e-6)
        assert of_gaussians.std[i] == pytest.approx(math.sqrt(variance), rel=1e-6)
        np.testing.assert_allclose(of_gaussians.cdf[i], cdf(X[i]), rtol=0, atol=1e-14)
        expected = [_root(cdf, tau, points) for tau in TAUS]
        np.testing.assert_allclose(of_gaussians.quantile[i], expected, rtol=0, atol=1e-10)


def test_gaussians_cvar_is_the_mean_below_the_quantile(of_gaussians):
    for i in range(6):
        cdf, density, points = _dense(i)
        for alpha, cvar in zip(ALPHAS[:-1], of_gaussians.cvar[i], strict=False):
            q = _root(cdf, alpha, points)
            below = np.append(points[points < q], q)
            integral = np.trapezoid(below * density(below), below)
            assert cvar == pytest.approx(integral / alpha, abs=1e-5)
    # With all of the mass: the mean.
    np.testing.assert_allclose(of_gaussians.cvar[:, -1], of_gaussians.mean, rtol=0, atol=1e-13)


def test_gaussians_crps_matches_the_integral(of_gaussians):
    for i in range(6):
        cdf, _, points = _dense(i)
        points = np.unique(np.append(points, Y[i]))
        below, above = points[points <= Y[i]], points[points >= Y[i]]
        integral = np.trapezoid(cdf(below) ** 2, below) + np.trapezoid(
            (1.0 - cdf(above)) ** 2, above)
        assert of_gaussians.crps[i] == pytest.approx(integral, abs=1e-5)


def test_gaussians_win_probability_matches_the_integral(of_gaussians):
    # P(R - R' - margin > noise): the logistic noise is integrated here, where the code under test
    # integrates the Gaussians.
    means = MIXTURES.means[:, :, None] - OTHER_MIXTURES.means[:, None] - MARGIN[:, None, None]
    scales = np.hypot(MIXTURES.scales[:, :, None], OTHER_MIXTURES.scales[:, None])
    noise = np.linspace(-60.0, 60.0, 4001)
    wins = np.trapezoid(norm.cdf((means[..., None] - noise) / scales[..., None])
                        / (4.0 * np.cosh(noise / 2.0) ** 2), noise)
    expected = np.einsum('bm,bn,bmn->b', MIXTURES.weights, OTHER_MIXTURES.weights, wins)
    np.testing.assert_allclose(of_gaussians.win, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(of_gaussians.log_win, np.log(expected), rtol=0, atol=1e-11)


def test_single_gaussian_matches_closed_forms():
    d = Gaussians(*jnp.array([[1.0], [2.0], [0.5]]))
    taus = np.array([0.05, 0.5, 0.9])
    np.testing.assert_allclose(_quantile(d, taus), norm.ppf(taus, 2.0, 0.5), rtol=1e-6)
    for alpha in (0.2, 0.75):
        expected = 2.0 - 0.5 * norm.pdf(norm.ppf(alpha)) / alpha
        assert float(_cvar(d, alpha)) == pytest.approx(expected, rel=1e-6)
    assert float(_cvar(d, 1.0)) == pytest.approx(2.0, rel=1e-6)


# Win probabilities.


def _reference(mean, scale):
    """log E sigma(mean + scale Z) and its two slopes, on a fine uniform grid."""
    centre = min(max(-mean / scale, 0.0), scale)
    step = min(0.1, 0.5 / scale)
    z = np.arange(centre - 12.0, centre + 12.0, step)
    log_terms = norm.logpdf(z) + scipy.special.log_expit(mean + scale * z)
    slopes = scipy.special.softmax(log_terms) * scipy.special.expit(-mean - scale * z)
    return scipy.special.logsumexp(log_terms) + math.log(step), slopes.sum(), slopes @ z


@functools.cache
def _accuracy_cases():
    """Means and scales, exact in float32, and their references."""
    scales = np.geomspace(0.01, 3000.0, 23)
    steep = np.array([-6.0, -3.0, -1.0, -0.1, 0.0, 0.5, 2.0, 4.0, 8.0, 12.0, 20.0])
    means = np.concatenate([
        -steep[:, None] * scales, np.broadcast_to([[-200.0], [-30.0], [-1.0], [5.0]], (4, 23))])
    cases = [x.astype(np.float32) for x in (means, np.broadcast_to(scales, means.shape))]
    return *cases, np.vectorize(_reference)(*(x.astype(float) for x in cases))


@pytest.mark.parametrize(
    ('dtype', 'errors'), [(np.float32, (5e-6, 2e-5, 2e-4)), (np.float64, (1e-12, 1e-10, 1e-6))])
@pytest.mark.usefixtures('float64')
def test_accuracy_of_the_quadrature(dtype, errors):
    means, scales, expected = _accuracy_cases()

    def log_win(mean, scale):
        one = jnp.ones_like(mean)
        return Gaussians(one, mean, 0.6 * scale).log_win_probability(
            Gaussians(one, jnp.zeros_like(mean), 0.8 * scale))

    def value_and_slopes(mean, scale):
        value, pull = jax.vjp(log_win, mean[..., None], scale[..., None])
        return (value, *(x[..., 0] for x in pull(jnp.ones_like(value))))

    # The errors that the docstring of the quadrature states.
    results = jax.jit(value_and_slopes)(means.astype(dtype), scales.astype(dtype))
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == dtype
        error = np.abs(got - want) / np.maximum(1.0, np.abs(want))
        for limit, largest in zip((10.0, 100.0, 3000.0), errors, strict=True):
            assert np.max(error[:, scales[0] <= 1.0001 * limit]) <= largest


CLASSES = ['atoms', 'gaussians']


def _narrow(name, means):
    """Standard deviation 1 around the means [b], float32."""
    means = jnp.asarray(means, jnp.float32)[:, None]
    if name == 'atoms':
        return uniform_atoms(means + jnp.array([-1.0, 1.0]))
    return Gaussians(jnp.ones_like(means), means, jnp.ones_like(means))


@pytest.mark.parametrize(('name', 'tail'), [
    # E e^D for the difference D of two signs, cosh(1)^2, and of two Gaussians, e.
    ('atoms', 2.0 * math.log(math.cosh(1.0))), ('gaussians', 1.0)])
def test_tails_are_kept_with_their_gradients(name, tail):
    zero = _narrow(name, np.zeros(2))

    def log_win(lead):
        return _narrow(name, lead).log_win_probability(zero)

    value_and_slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(log_win(x))))
    for lead, value, slope in ((-200.0, -200.0 + tail, 1.0), (200.0, 0.0, 0.0)):
        got, slopes = value_and_slope(jnp.array([lead, 0.0]))
        assert float(got) == pytest.approx(value + math.log(0.5), abs=5e-5)
        assert float(slopes[0]) == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize('name', CLASSES)
def test_margin_shifts_and_scale_and_shift_transforms(name):
    d = _narrow(name, [0.5, -1.0])
    one = jax.tree.map(lambda x: x[0], d)

    @jax.jit
    def transformed():
        moved = d.scale_and_shift(2.0, jnp.array([1.0, -0.75]))
        several = one.scale_and_shift(jnp.array([1.0, 3.0]), 1.0)
        return ((moved, moved.mean, moved.std), (several, several.mean, several.std),
                d.log_win_probability(moved, 0.25),
                d.scale_and_shift(1.0, -0.25).log_win_probability(moved))

    (moved, *moved_moments), (several, *several_moments), by_margin, by_shift = transformed()
    np.testing.assert_allclose(moved_moments, [[2.0, -2.75], [2.0, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(several_moments, [[1.5, 2.5], [1.0, 3.0]], rtol=1e-6)
    for result in (moved, several):
        assert type(result) is type(d)
        assert {(x.shape, x.dtype) for x in result} == {(d.weights.shape, np.dtype('float32'))}
    np.testing.assert_allclose(by_margin, by_shift, rtol=1e-6)


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.usefixtures('float64')
def test_both_sides_add_up_to_one(name):
    turned = _summarise(*PAIRS[name][::-1], X, Y, -MARGIN)
    np.testing.assert_allclose(
        np.exp(_summarise_pair(name).log_win) + np.exp(turned.log_win), 1.0, rtol=0, atol=1e-14)


def test_shared_annotators_by_hand():
    shared = jax.jit(log_shared_win_probability)
    # Both annotators prefer a by 1, though an independent one would not: 1, 5, -3, 1.
    a, b = uniform_atoms(jnp.array([1.0, 5.0])), uniform_atoms(jnp.array([0.0, 4.0]))
    assert float(shared(a, b)) == pytest.approx(math.log(_sigma(1.0)))
    assert float(shared(a, b, 1.0)) == pytest.approx(math.log(0.5))
    weights = jnp.array([1.0, 0.0])
    only = shared(Atoms(jnp.array([-300.0, 9.0]), weights), Atoms(jnp.zeros(2), weights))
    assert float(only) == pytest.approx(-300.0)
    with pytest.raises(AssertionError):
        log_shared_win_probability(a, uniform_atoms(jnp.zeros(3)))


@pytest.mark.parametrize('components', [1, 3])
@pytest.mark.usefixtures('float64')
def test_greater_probability_is_the_mean_over_pairs_of_components(components):
    a, b = _gaussians(20, 6, components), _gaussians(21, 6, components)
    found = log_greater_probability(a, b, 0.4)
    for i in range(6):
        expected = sum(
            a.weights[i, j] * b.weights[i, k] * norm.cdf(
                (a.means[i, j] - b.means[i, k] - 0.4) / math.hypot(a.scales[i, j], b.scales[i, k]))
            for j in range(components) for k in range(components))
        assert float(found[i]) == pytest.approx(math.log(expected), abs=1e-12)
    # Far behind, where the probability itself underflows in float32.
    one, other = (Gaussians(*(jnp.full(1, x, jnp.float32) for x in (1.0, mean, 3.0)))
                  for mean in (-40.0, 60.0))
    assert float(log_greater_probability(one, other)) == pytest.approx(
        norm.logcdf(-100.0 / math.sqrt(18.0)), rel=1e-6)


@pytest.mark.parametrize('components', [1, 3])
@pytest.mark.usefixtures('float64')
def test_intervals_are_differences_of_the_cdf(components):
    a, ends = _gaussians(22, 6, components), jnp.array([-math.inf, -1.0, 0.2, 1.5, math.inf])
    cdf = np.concatenate([np.zeros((6, 1)), a.cdf(ends[1:-1]), np.ones((6, 1))], axis=1)
    for i, (low, high) in enumerate(itertools.pairwise(ends)):
        np.testing.assert_allclose(np.exp(log_interval_probability(a, low, high)),
                                   cdf[:, i + 1] - cdf[:, i], rtol=0, atol=1e-12)


@pytest.mark.parametrize(('low', 'high'), [(0.0, 1.0), (-math.inf, 1.0), (1.0, math.inf)])
@pytest.mark.parametrize(('mean', 'scale'), [
    (0.0, 1.0), (30.0, 2.0), (-30.0, 2.0), (8.0, 0.5), (0.5, 200.0)])
def test_intervals_keep_their_digits_and_slopes_in_the_tails(mean, scale, low, high):
    found, slopes = jax.value_and_grad(
        lambda m, s: log_interval_probability(Gaussians(jnp.ones(1), m[None], s[None]), low, high),
        (0, 1))(jnp.float32(mean), jnp.float32(scale))
    # log(Phi(b) - Phi(a)) from the side where both are small.
    z, w = (low - mean) / scale, (high - mean) / scale
    a, b = (-w, -z) if z > 0.0 else (z, w)
    expected = scipy.special.logsumexp([norm.logcdf(b), norm.logcdf(a)], b=[1.0, -1.0])
    assert float(found) == pytest.approx(expected, rel=2e-4, abs=1e-12)
    density = [0.0 if math.isinf(x) else math.exp(norm.logpdf(x) - expected) for x in (z, w)]
    moved = [0.0 if math.isinf(x) else x * d for x, d in zip((z, w), density, strict=True)]
    by_hand = (density[0] - density[1]) / scale, (moved[0] - moved[1]) / scale
    np.testing.assert_allclose(slopes, by_hand, rtol=2e-3, atol=1e-5)


def test_classes_do_not_mix():
    atoms, gaussians = _narrow('atoms', [0.0]), _narrow('gaussians', [0.0])
    with pytest.raises(TypeError, match='Atoms against Gaussians, expected two'):
        atoms.log_win_probability(gaussians)
    with pytest.raises(TypeError, match='Gaussians against Atoms, expected two'):
        gaussians.win_probability(atoms)


# Both classes.


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.usefixtures('float64')
def test_gradients_and_leading_axes(name):
    rng = np.random.default_rng(5)
    pair = jax.tree.map(lambda x: x[0], PAIRS[name])
    arguments = (X[0], Y[0], MARGIN[0])
    values, slopes = jax.jit(lambda *a: (_summary(*a), jax.jacrev(_summary, (0, 1))(*a)))(
        *pair, *arguments)
    # Three directions, there and back, along which weights keep their sum.
    directions = jax.tree.map(lambda x: rng.normal(size=(3, *x.shape)), pair)
    directions = tuple(d._replace(weights=d.weights - d.weights.mean(axis=-1, keepdims=True))
                       for d in directions)
    step = 1e-6
    ends = jax.tree.map(lambda x, d: x + step * np.concatenate([d, -d]), pair, directions)
    moved = _summarise(*ends, *(np.broadcast_to(x, (6, *x.shape)) for x in arguments))
    for field, value, slope, end in zip(Summary._fields, values, slopes, moved, strict=True):
        expected = (end[:3] - end[3:]) / (2.0 * step)
        analytic = sum(
            np.tensordot(d, s, axes=(-1, -1)) for d, s in zip(
                jax.tree.leaves(directions), jax.tree.leaves(slope), strict=True))
        np.testing.assert_allclose(analytic, expected, rtol=0, atol=1e-6, err_msg=field)
        # One case without leading axes is that of the batch.
        np.testing.assert_allclose(
            value, getattr(_summarise_pair(name), field)[0], rtol=0, atol=1e-12, err_msg=field)


@pytest.mark.parametrize('name', CLASSES)
def test_vmap_in_float32(name):
    vmapped = jax.jit(jax.vmap(jax.vmap(_summary)))
    arguments = _as(jnp.float32, (*PAIRS[name], X, Y, MARGIN))
    summary = vmapped(*jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), arguments))
    for field, value, expected in zip(
            Summary._fields, summary, _summarise_pair(name), strict=True):
        assert value.dtype == jnp.float32, field
        # Values of up to 30 cancel in some.
        np.testing.assert_allclose(
            value.reshape(expected.shape), expected, rtol=5e-6, atol=1e-5, err_msg=field)


@pytest.mark.parametrize('name', CLASSES)
def test_samples_have_the_distribution(name):
    d = _as(jnp.float32, PAIRS[name][0])
    n = 40_000
    samples, summary = np.asarray(_sample(d, jax.random.key(0), n)), _summarise_pair(name)
    assert samples.shape == (6, n)
    # 4.5 standard errors of the mean and of the empirical cdf.
    error = 4.5 * summary.std / math.sqrt(n)
    assert np.all(np.abs(samples.mean(axis=-1) - summary.mean) <= error + 1e-5)
    empirical = np.mean(samples[:, None, :] <= X[..., None], axis=-1)
    np.testing.assert_allclose(empirical, summary.cdf, rtol=0, atol=2.25 / math.sqrt(n))
    # Draws of different leading axes are independent.
    correlation = np.corrcoef(samples[:3])[np.triu_indices(3, 1)]
    assert np.all(np.abs(correlation) <= 4.5 / math.sqrt(n))


def test_atoms_of_weight_zero_are_not_drawn():
    samples = np.asarray(_sample(_as(jnp.float32, ATOMS), jax.random.key(1), 40_000))
    assert set(np.unique(samples[2])) == {-1.0, 0.25, 0.5}
    assert np.all(samples[4] == np.float32(ATOMS.values[4, 2]))


@pytest.mark.parametrize('make', [_atoms, _gaussians])
def test_pool_is_the_mixture_of_its_members(make):
    members, x = _as(jnp.float32, make(11, 2, 3, 4)), jnp.linspace(-3.0, 3.0, 7)
    pooled, (mean, std, cdf), (means, stds, cdfs) = jax.jit(lambda d: (
        pool(d), *((e.mean, e.std, e.cdf(x)) for e in (pool(d), d))))(members)
    assert type(pooled) is type(members)
    assert {x.shape for x in pooled} == {(2, 12)}
    np.testing.assert_allclose(np.sum(pooled.weights, axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(mean, np.mean(means, axis=-1), rtol=1e-5)
    # The law of total variance.
    variance = np.mean(stds**2, axis=-1) + np.var(means, axis=-1)
    np.testing.assert_allclose(std**2, variance, rtol=1e-5)
    np.testing.assert_allclose(cdf, np.mean(cdfs, axis=1), rtol=0, atol=1e-6)


def test_ranks_are_checked():
    d = _narrow('atoms', [0.0])
    with pytest.raises(AssertionError):
        d.quantile(jnp.float32(0.5))
    with pytest.raises(AssertionError):
        d.cvar(jnp.array([0.5]))
