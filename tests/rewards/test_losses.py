"""Tests of the losses: values and gradients worked out by hand, in float64 where it matters.

Expected values come from closed forms in `math`, from rlax, from quadrature and from NumPy.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
from scipy.special import expit

from qrm.data import orders
from qrm.rewards import losses
from qrm.rewards.distributions import Atoms, Gaussians, uniform_atoms
from qrm.rewards.heads import HEADS, HeadConfig, Reward, taus
from qrm.rewards.losses import (
    OBJECTIVES,
    LossConfig,
    bradley_terry,
    bradley_terry_quantile_huber,
    check_head,
    comparison_loss,
    distributional_bradley_terry,
    log_win_probability,
    quantile_huber,
)
from tests.helpers import judgement, read_quantiles, side

BT = LossConfig('bradley_terry')
PAPER = LossConfig('bradley_terry_quantile_huber')
DISTRIBUTIONAL = LossConfig('distributional_bradley_terry')
CONFIGS = [BT, PAPER, DISTRIBUTIONAL]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# Compiled once for all tests: loss and gradient.
_bradley_terry = jax.jit(jax.value_and_grad(lambda a: bradley_terry(*a)))
_huber = jax.jit(jax.value_and_grad(
    lambda q, t, kappa: quantile_huber(q, jnp.asarray(taus(len(q))), t, kappa=kappa)))
_paper = jax.jit(
    jax.value_and_grad(lambda c, r, margin=0.0, **options: bradley_terry_quantile_huber(
        side(c), side(r), margin, **options), argnums=(0, 1)),
    static_argnames=('targets', 'huber_sides', 'pair_epsilon'))
_distributional = jax.jit(jax.value_and_grad(
    lambda c, r, margin: distributional_bradley_terry(
        uniform_atoms(c), uniform_atoms(r), margin), argnums=(0, 1)))
_comparison_loss = jax.jit(
    jax.value_and_grad(lambda config, quantiles, preference, margin: comparison_loss(
        config, read_quantiles(quantiles), judgement(preference, margin)), argnums=1),
    static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_head(config, head, outputs, preference, margin=0.0, ratings=None, annotator=-1,
             teacher=None):
    """Loss of a comparison, its gradient to raw outputs [K, outputs], and to the reward."""
    known = judgement(preference, margin, ratings, annotator)
    reward, pull_back = jax.vjp(head.read, jnp.asarray(outputs))
    value, of_reward = jax.value_and_grad(
        lambda x: comparison_loss(config, x, known, teacher))(reward)
    return value, *pull_back(of_reward), of_reward


_log_win_of = jax.jit(log_win_probability, static_argnums=0)


def _log_win(config, chosen, rejected):
    return _log_win_of(config, uniform_atoms(chosen), uniform_atoms(rejected))


def _sigma(x):
    return 1.0 / (1.0 + math.exp(-x))


def _bt(chosen, rejected, margin=0.0):
    """-log sigma(x) = log(1 + exp(-x))."""
    return math.log1p(math.exp(-(chosen - rejected - margin)))


def _finite_differences(f, x, step=1e-5):
    """Central differences of a scalar function of an array."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[index] += step
        behind[index] -= step
        difference = float(f(ahead)) - float(f(behind))
        gradient[index] = difference / (2.0 * step)
    return gradient


# Bradley-Terry.


@pytest.mark.parametrize(
    ('chosen', 'rejected', 'margin'),
    [(0.0, 0.0, 0.0), (1.5, -0.5, 0.0), (-2.0, 1.0, 0.5), (3.0, 1.0, 2.0), (0.2, 0.1, -1.0)],
)
@pytest.mark.usefixtures('float64')
def test_bradley_terry_matches_closed_form(chosen, rejected, margin):
    value, gradient = _bradley_terry(np.array([chosen, rejected, margin]))
    assert float(value) == pytest.approx(_bt(chosen, rejected, margin), abs=1e-14)
    # d loss / d chosen = -sigma(-(d - m)); the rejected reward and the margin push back.
    slope = -_sigma(-(chosen - rejected - margin))
    np.testing.assert_allclose(gradient, [slope, -slope, -slope], rtol=0, atol=1e-14)


def test_bradley_terry_by_hand():
    # Equal rewards: log 2. One nat ahead: log(1 + 1/e). A margin of 1 takes the lead back.
    assert float(bradley_terry(jnp.float32(3.0), jnp.float32(3.0))) == pytest.approx(0.6931472)
    assert float(bradley_terry(jnp.float32(4.0), jnp.float32(3.0))) == pytest.approx(0.3132617)
    assert float(bradley_terry(jnp.float32(4.0), jnp.float32(3.0), 1.0)) == pytest.approx(0.6931472)


@pytest.mark.parametrize(
    ('difference', 'value', 'slope'), [(-200.0, 200.0, -1.0), (200.0, 0.0, 0.0)])
def test_bradley_terry_at_extreme_differences(difference, value, slope):
    loss, gradient = jax.value_and_grad(bradley_terry)(jnp.float32(difference), jnp.float32(0.0))
    assert float(loss) == pytest.approx(value, abs=1e-30)
    assert float(gradient) == pytest.approx(slope, abs=1e-30)


@pytest.mark.parametrize('difference', [-200.0, -12.0, 0.0, 1.0, 200.0])
@pytest.mark.usefixtures('float64')
def test_bradley_terry_with_an_epsilon_by_hand(difference):
    # -log(p + e), slope -p (1 - p) / (p + e): of a pair that is badly wrong almost nothing is left.
    p = 1.0 / (1.0 + math.exp(-difference))
    value, slope = jax.value_and_grad(bradley_terry)(difference, 0.0, 0.0, 1e-5)
    assert float(value) == pytest.approx(-math.log(p + 1e-5), abs=1e-12)
    assert float(slope) == pytest.approx(-p * (1.0 - p) / (p + 1e-5), abs=1e-12)
    # At -12 Bradley-Terry has a slope of -.999994, which this leaves .38 of.
    if difference == -12.0:
        assert float(slope) == pytest.approx(-0.3806, abs=1e-4)


# Quantile Huber. Four quantiles stand at tau = 1/8, 3/8, 5/8, 7/8, exact in binary.

QUANTILES = np.array([-1.5, 0.25, 2.0, 1.0])


@pytest.mark.usefixtures('float64')
def test_quantile_huber_by_hand():
    # Target .75, kappa 1. Errors u = 2.25, .5, -1.25, -.25; weights |tau - 1{u < 0}| = 1/8, 3/8,
    # 3/8, 1/8; L = 2.25 - .5 = 1.75, .5^2 / 2 = .125, 1.25 - .5 = .75, .25^2 / 2 = .03125.
    # Sum of weight * L = .21875 + .046875 + .28125 + .00390625.
    value, gradient = _huber(QUANTILES, 0.75, 1.0)
    assert float(value) == pytest.approx(0.55078125, abs=1e-15)
    # Slopes: -weight * u clipped to [-1, 1].
    np.testing.assert_allclose(gradient, [-0.125, -0.1875, 0.375, 0.03125], rtol=0, atol=1e-15)


@pytest.mark.usefixtures('float64')
def test_quantile_huber_is_summed_over_tau_and_not_divided_by_kappa():
    # One quantile (weight 1/2), error 3, kappa 2: L = 2 (3 - 1) = 4 and the loss is 2, not 1.
    one, _ = _huber(np.ones(1), 4.0, 2.0)
    assert float(one) == pytest.approx(2.0, abs=1e-15)
    # Four equal quantiles: the weights add up to 2, so the loss is 8, not 8 / 4.
    four, _ = _huber(np.ones(4), 4.0, 2.0)
    assert float(four) == pytest.approx(8.0, abs=1e-15)
    # Errors below both thresholds cost the same for every kappa: 1/2 * (.1^2 / 2).
    for kappa in (0.2, 1.0, 5.0):
        small, _ = _huber(np.zeros(1), 0.1, kappa)
        assert float(small) == pytest.approx(0.0025, abs=1e-15)


# From rlax 0.1.9, quantile_regression_loss(QUANTILES, taus, [target], kappa) and its gradient.
RLAX = [
    (0.75, 0.5, 0.36328125, [-0.0625, -0.1875, 0.1875, 0.03125]),
    (0.75, 1.0, 0.55078125, [-0.125, -0.1875, 0.375, 0.03125]),
    (0.75, 2.0, 0.65625, [-0.25, -0.1875, 0.46875, 0.03125]),
    (-2.0, 0.5, 1.609375, [0.4375, 0.3125, 0.1875, 0.0625]),
    (-2.0, 1.0, 2.828125, [0.4375, 0.625, 0.375, 0.125]),
    (-2.0, 2.0, 4.421875, [0.4375, 1.25, 0.75, 0.25]),
    (5.0, 0.5, 3.734375, [-0.0625, -0.1875, -0.3125, -0.4375]),
    (5.0, 1.0, 6.96875, [-0.125, -0.375, -0.625, -0.875]),
    (5.0, 2.0, 11.9375, [-0.25, -0.75, -1.25, -1.75]),
]


@pytest.mark.parametrize(('target', 'kappa', 'value', 'gradient'), RLAX)
@pytest.mark.usefixtures('float64')
def test_quantile_huber_matches_numbers_of_rlax(target, kappa, value, gradient):
    actual = _huber(QUANTILES, target, kappa)
    assert float(actual[0]) == pytest.approx(value, abs=1e-12)
    np.testing.assert_allclose(actual[1], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize('kappa', [0.01, 0.3, 1.0, 4.0])
@pytest.mark.usefixtures('float64')
def test_quantile_huber_matches_installed_rlax(kappa):
    rlax = pytest.importorskip('rlax')
    rng = np.random.default_rng(0)
    n = 8  # midpoints with a denominator of 16, exact in float32
    midpoints = jnp.asarray((2.0 * np.arange(n) + 1.0) / (2.0 * n))
    theirs = jax.jit(jax.value_and_grad(
        lambda q, t: rlax.quantile_regression_loss(q, midpoints, t[None], kappa)))
    for _ in range(20):
        quantiles, target = rng.normal(0.0, 2.0, n), rng.normal()
        value, gradient = _huber(quantiles, target, kappa)
        value_rlax, gradient_rlax = theirs(quantiles, jnp.asarray(target))
        assert abs(float(value) - float(value_rlax)) <= 1e-12
        np.testing.assert_allclose(gradient, gradient_rlax, rtol=0, atol=1e-12)


@pytest.mark.parametrize('kappa', [0.1, 1.0, 3.0])
@pytest.mark.usefixtures('float64')
def test_quantile_huber_gradient_matches_finite_differences(kappa):
    quantiles = np.random.default_rng(1).normal(0.0, 2.0, 10)
    _, gradient = _huber(quantiles, 0.3, kappa)
    expected = _finite_differences(lambda q: _huber(q, 0.3, kappa)[0], quantiles)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('kappa', [0.25, 1.0, 2.0])
@pytest.mark.usefixtures('float64')
def test_quantile_huber_gradient_at_the_joints(kappa):
    # At error 0 the slope is 0 (whatever the derivative of |u| is taken to be there); at errors
    # of kappa and -kappa both branches have slope -+kappa; weights as above.
    quantiles = np.array([0.0, -kappa, kappa, 0.0])
    _, gradient = _huber(quantiles, 0.0, kappa)
    expected = [0.0, -0.375 * kappa, 0.375 * kappa, 0.0]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-15)
    assert np.all(np.isfinite(gradient))


def test_quantile_huber_is_finite_far_away():
    quantiles = jnp.array([1e30, -1e30], jnp.float32)
    value, gradient = _huber(quantiles, 0.0, 1.0)
    # Weights 3/4 and 3/4, slopes 1: 1.5e30 and gradients of 3/4 towards the target.
    assert float(value) == pytest.approx(1.5e30, rel=1e-6)
    np.testing.assert_allclose(gradient, [0.75, -0.75], rtol=1e-6)


def test_no_gradient_flows_into_the_target():
    # Both errors are positive, so their slopes, 1/4 and 3/4, would add up to 1.
    levels = jnp.asarray(taus(2))
    gradient = jax.grad(lambda t: quantile_huber(jnp.array([0.0, 1.0]), levels, t, kappa=1.0))(2.0)
    assert float(gradient) == 0.0


@pytest.mark.parametrize('kappa', [0.1, 0.01, 0.001])
@pytest.mark.usefixtures('float64')
def test_quantile_huber_over_kappa_approaches_pinball(kappa):
    # Beyond kappa a term is kappa (|u| - kappa / 2), so over kappa it lacks weight * kappa / 2 of
    # the pinball loss; within, it lacks less.
    rng = np.random.default_rng(2)
    taus = (np.arange(10) + 0.5) / 10
    for _ in range(20):
        quantiles, target = rng.normal(size=10), rng.normal()
        error = target - quantiles
        pinball = np.sum(np.where(error < 0.0, (taus - 1.0) * error, taus * error))
        huber = float(_huber(quantiles, target, kappa)[0]) / kappa
        assert -1e-6 <= pinball - huber <= 10 * kappa / 2


@pytest.mark.usefixtures('float64')
def test_distance_to_pinball_by_hand():
    # Quantiles at tau = .25 and .35 lie 2 above the target, the other eight 1 below it: weights
    # .75 + .65 and .05 + .15 + .45 + .55 + .65 + .75 + .85 + .95 = 4.4. Pinball = 2 * 1.4 + 4.4
    # = 7.2; quantile Huber over kappa = .001 lacks (1.4 + 4.4) * .0005 = .0029.
    quantiles = np.full(10, -1.0)
    quantiles[2:4] = 2.0
    huber = float(_huber(quantiles, 0.0, 1e-3)[0]) / 1e-3
    assert 7.2 - huber == pytest.approx(0.0029, abs=1e-6)


@pytest.mark.parametrize(
    ('kappa', 'expected'), [(1.0, -1.309), (0.5, -1.448), (0.1, -1.601), (0.01, -1.640)])
@pytest.mark.usefixtures('float64')
def test_population_minimiser_of_an_outer_quantile(kappa, expected):
    # N(0, 1) at tau = .05, whose true quantile is -1.645: the root of the expected gradient of
    # the first of ten quantiles, by the trapezoid rule.
    targets = np.linspace(-9.0, 9.0, 36_001)
    density = np.exp(-0.5 * targets**2) / math.sqrt(2.0 * math.pi) * (targets[1] - targets[0])
    slopes = jax.jit(jax.vmap(
        jax.grad(lambda q, t: quantile_huber(q, jnp.asarray(taus(10)), t, kappa=kappa)),
        in_axes=(None, 0)))

    def expected_slope(x):
        quantiles = jnp.zeros(10).at[0].set(x)
        return float(np.asarray(slopes(quantiles, jnp.asarray(targets)))[:, 0] @ density)

    minimiser = scipy.optimize.brentq(expected_slope, -3.0, 0.0, xtol=1e-4)
    assert minimiser == pytest.approx(expected, abs=0.005)


def test_gradient_descent_finds_sample_quantiles():
    # Gaussian rewards with a heavy upper side, quantile regression with a small kappa.
    rng = np.random.default_rng(3)
    samples = rng.standard_normal(4096).astype(np.float32)
    samples = np.where(samples > 0.0, 1.5 * samples, samples)
    kappa = 1e-3

    def loss(quantiles):
        each = jax.vmap(lambda t: quantile_huber(
            quantiles, jnp.asarray(taus(10)), t, kappa=kappa))(jnp.asarray(samples))
        return jnp.mean(each) / kappa

    descend = jax.jit(lambda q: jax.lax.fori_loop(0, 400, lambda _, q: q - jax.grad(loss)(q), q))
    quantiles = descend(jnp.zeros(10))
    expected = np.quantile(samples, (np.arange(10) + 0.5) / 10)
    assert np.max(np.abs(quantiles - expected)) <= 0.01


# The paper's objective. Two quantiles stand at tau = 1/4 and 3/4. The means are 1 and 0, so
# Bradley-Terry is log(1 + 1/e) with slope -sigma(-1) on the mean, half of it on each quantile.

CHOSEN, REJECTED = np.array([0.0, 2.0]), np.array([1.0, -1.0])
HALF = 0.2689414213699951 / 2


@pytest.mark.usefixtures('float64')
def test_label_targets_by_hand():
    # Chosen, target 1: errors 1, -1; weights 1/4, 1/4; L = 1/2, 1/2: sum 1/4, slopes -1/4, 1/4.
    # Rejected, target -1: errors -2, 0; weights 3/4, 3/4; L = 3/2, 0: sum 9/8, slopes 3/4, 0.
    value, (of_chosen, of_rejected) = _paper(
        CHOSEN, REJECTED, huber_weight=0.5, kappa=1.0, targets='label')
    assert float(value) == pytest.approx(_bt(1.0, 0.0) + 0.5 * (0.25 + 1.125), abs=1e-12)
    np.testing.assert_allclose(of_chosen, [-HALF - 0.125, -HALF + 0.125], rtol=0, atol=1e-12)
    np.testing.assert_allclose(of_rejected, [HALF + 0.375, HALF], rtol=0, atol=1e-12)


@pytest.mark.usefixtures('float64')
def test_margin_targets_by_hand():
    # Chosen 2, 4 against 1, -1: means 3 and 0, slope of Bradley-Terry -sigma(-3) on the mean.
    # Chosen, target 0 + 1: errors -1, -3; weights 3/4, 1/4; L = 1/2, 5/2: sum 1, slopes 3/4, 1/4.
    # Rejected, target 3 - 1: errors 1, 3; weights 1/4, 3/4; L = 1/2, 5/2: sum 2, slopes -1/4,
    # -3/4. The slopes do not cancel, so a gradient through the other side's mean would show.
    value, (of_chosen, of_rejected) = _paper(
        np.array([2.0, 4.0]), REJECTED, huber_weight=0.5, kappa=1.0, targets='margin')
    half = _sigma(-3.0) / 2.0
    assert float(value) == pytest.approx(_bt(3.0, 0.0) + 0.5 * (1.0 + 2.0), abs=1e-12)
    np.testing.assert_allclose(of_chosen, [-half + 0.375, -half + 0.125], rtol=0, atol=1e-12)
    np.testing.assert_allclose(of_rejected, [half - 0.125, half - 0.375], rtol=0, atol=1e-12)


def test_targets_by_hand():
    chosen = side(jnp.array([1.0, 2.0, 6.0]), 0.25)
    rejected = side(jnp.array([-2.0, 0.0, -1.0]), -0.75)
    # Means 3 and -1.
    assert tuple(map(float, losses.quantile_huber_targets(chosen, rejected, 'label'))) == (1, -1)
    assert tuple(map(float, losses.quantile_huber_targets(chosen, rejected, 'margin'))) == (0, 2)
    assert losses.quantile_huber_targets(chosen, rejected, 'teacher') == (0.25, -0.75)


@pytest.mark.usefixtures('float64')
def test_the_authors_objective_by_hand():
    # Chosen: mean 7/16, without gradient as target. Errors u = 31/16, 3/16, -25/16, -9/16; weights
    # 1/8, 3/8, 3/8, 1/8; L = 23/16, 9/512, 17/16, 81/512; sum of weight * L = 619/1024.
    # Rejected: mean 0; its quantiles reach Bradley-Terry only.
    rejected = np.array([-1.0, 0.0, 0.5, 0.5])
    value, (of_chosen, of_rejected) = _paper(
        QUANTILES, rejected, huber_weight=1.0, kappa=1.0, targets='own_mean',
        huber_sides='chosen', pair_epsilon=1e-5)
    p = _sigma(7 / 16)
    assert float(value) == pytest.approx(619 / 1024 - math.log(p + 1e-5), abs=1e-14)
    slope = -p * (1.0 - p) / (p + 1e-5)
    huber = np.array([-1 / 8, -9 / 128, 3 / 8, 9 / 128])
    np.testing.assert_allclose(of_chosen, huber + slope / 4, rtol=0, atol=1e-14)
    np.testing.assert_allclose(of_rejected, -slope / 4 * np.ones(4), rtol=0, atol=1e-14)
    # Of both sides: errors of the rejected one 1, 0, -1/2, -1/2 add 1/8 * 1/2 + 3/8 * 1/8 + 1/8 *
    # 1/8 = 1/8 (slope 1 at kappa).
    both, _ = _paper(QUANTILES, rejected, huber_weight=1.0, kappa=1.0, targets='own_mean',
                     huber_sides='both', pair_epsilon=1e-5)
    assert float(both - value) == pytest.approx(1 / 8, abs=1e-14)


@pytest.mark.usefixtures('float64')
def test_own_mean_targets_collapse_the_spread():
    # The quantile Huber loss of equal quantiles to their mean is 0, its least value.
    options = {'huber_weight': 1.0, 'kappa': 1.0, 'targets': 'own_mean', 'huber_sides': 'chosen'}
    chosen, rejected = QUANTILES.copy(), np.zeros(4)
    for _ in range(400):
        of_chosen, of_rejected = _paper(chosen, rejected, **options)[1]
        chosen, rejected = chosen - 0.2 * of_chosen, rejected - 0.2 * of_rejected
    # Bradley-Terry still pulls on each alike, and outer quantiles give way more.
    assert np.ptp(chosen) < 0.05 < np.ptp(QUANTILES)
    assert np.ptp(rejected) == 0.0


def test_margin_enters_bradley_terry_only():
    options = {'huber_weight': 0.5, 'kappa': 1.0, 'targets': 'label'}
    with_margin, _ = _paper(CHOSEN, REJECTED, 0.75, **options)
    without, _ = _paper(CHOSEN, REJECTED, 0.0, **options)
    expected = _bt(1.0, 0.0, 0.75) - _bt(1.0, 0.0)
    assert float(with_margin - without) == pytest.approx(expected, abs=1e-6)


# Distributional Bradley-Terry.


@pytest.mark.parametrize('margin', [0.0, 0.5])
@pytest.mark.usefixtures('float64')
def test_distributional_bradley_terry_by_hand(margin):
    # Differences of [1, 0] and [0, -1]: 1, 2, 0, 1.
    value, _ = _distributional(np.array([1.0, 0.0]), np.array([0.0, -1.0]), margin)
    wins = [_sigma(x - margin) for x in (1.0, 2.0, 0.0, 1.0)]
    assert float(value) == pytest.approx(-math.log(sum(wins) / 4.0), abs=1e-12)
    if not margin:
        # sigma(1) = .7310586, sigma(2) = .8807971, sigma(0) = .5: mean .7107286.
        assert float(value) == pytest.approx(-math.log(0.7107286), abs=1e-7)


@pytest.mark.usefixtures('float64')
def test_distributional_gradient_by_hand_and_finite_differences():
    # d loss / d q_i(c) = -sum_j sigma'(x_ij) / sum_ij sigma(x_ij) with sigma' = sigma (1 - sigma).
    x = np.array([[1.0, 2.0], [0.0, 1.0]])
    wins = 1.0 / (1.0 + np.exp(-x))
    slopes = wins * (1.0 - wins) / wins.sum()
    quantiles = np.array([[1.0, 0.0], [0.0, -1.0]])
    _, gradient = _distributional(*quantiles, 0.0)
    np.testing.assert_allclose(
        gradient, [-slopes.sum(axis=1), slopes.sum(axis=0)], rtol=0, atol=1e-12)
    expected = _finite_differences(lambda q: _distributional(*q, 0.0)[0], quantiles)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures('float64')
def test_distributional_is_bradley_terry_for_point_masses():
    for chosen, rejected, margin in ((1.2, -0.3, 0.0), (-4.0, 2.0, 0.7)):
        for n in (1, 3):
            value, _ = _distributional(np.full(n, chosen), np.full(n, rejected), margin)
            assert float(value) == pytest.approx(_bt(chosen, rejected, margin), abs=1e-12)


@pytest.mark.usefixtures('float64')
def test_distributional_is_invariant_under_shift_and_order():
    rng = np.random.default_rng(4)
    chosen, rejected = rng.normal(size=6), rng.normal(size=6)
    value = float(_distributional(chosen, rejected, 0.0)[0])
    shifted, _ = _distributional(chosen + 3.7, rejected + 3.7, 0.0)
    assert float(shifted) == pytest.approx(value, abs=1e-12)
    turned, _ = _distributional(chosen[::-1], rejected, 0.0)
    assert float(turned) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(('shift', 'value', 'slope'), [(-1e4, 1e4, -1.0), (1e4, 0.0, 0.0)])
def test_distributional_is_finite_for_large_rewards(shift, value, slope):
    loss, (gradient, _) = _distributional(
        np.full(4, shift, np.float32), np.zeros(4, np.float32), 0.0)
    assert float(loss) == pytest.approx(value, abs=2e-3)
    np.testing.assert_allclose(np.sum(gradient), slope, atol=1e-5)


@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.usefixtures('float64')
def test_win_probabilities_of_both_sides_add_up_to_one(config):
    rng = np.random.default_rng(5)
    for _ in range(3):
        chosen, rejected = (jnp.asarray(rng.normal(0.0, 2.0, 5)) for _ in range(2))
        both = [_log_win(config, chosen, rejected),
                _log_win(config, rejected, chosen)]
        assert sum(math.exp(p) for p in both) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.usefixtures('float64')
def test_win_probability_by_hand():
    # Means 1 and 0; differences of the quantiles -1, 1, 1, 3.
    chosen, rejected = jnp.asarray(CHOSEN), jnp.asarray(REJECTED)
    for config in (BT, PAPER):
        assert float(_log_win(config, chosen, rejected)) == pytest.approx(
            math.log(_sigma(1.0)), abs=1e-12)
    mean = sum(_sigma(x) for x in (-1.0, 1.0, 1.0, 3.0)) / 4.0
    assert float(_log_win(DISTRIBUTIONAL, chosen, rejected)) == pytest.approx(
        math.log(mean), abs=1e-12)


# Comparisons. Scalar rewards 1, 0, -2 under Bradley-Terry unless said.

REWARDS = [[1.0], [0.0], [-2.0]]


def _comparison(preference, rewards=REWARDS, config=BT, margin=0.0):
    preference = np.asarray(preference, np.float32)
    return float(_comparison_loss(
        config, np.asarray(rewards, np.float32), preference, np.float32(margin))[0])


@pytest.mark.parametrize('margin', [0.0, 0.5])
def test_pair_is_the_pair_loss(margin):
    assert _comparison([[0, 1], [0, 0]], REWARDS[:2], margin=margin) == pytest.approx(
        _bt(1.0, 0.0, margin), abs=1e-6)
    assert _comparison([[0, 0], [1, 0]], REWARDS[:2], margin=margin) == pytest.approx(
        _bt(0.0, 1.0, margin), abs=1e-6)


def test_pair_of_each_objective_by_hand():
    # The quantiles of the paper's objective above: there .5 * (1/4 + 9/8), here .1 of the sum.
    pair, quantiles = [[0, 1], [0, 0]], [CHOSEN, REJECTED]
    assert _comparison(pair, quantiles) == pytest.approx(_bt(1.0, 0.0), abs=1e-6)
    assert _comparison(pair, quantiles, PAPER) == pytest.approx(
        _bt(1.0, 0.0) + 0.1 * 1.375, abs=1e-6)
    # With kappa = 1/2 the chosen side has L = 3/8, 3/8 and the rejected one 7/8, 0.
    config = LossConfig('bradley_terry_quantile_huber', huber_weight=2.0, kappa=0.5)
    assert _comparison(pair, quantiles, config) == pytest.approx(
        _bt(1.0, 0.0) + 2.0 * (0.25 * 0.75 + 0.75 * 0.875), abs=1e-6)
    # Targets 0 + 1 and 1 - 1: chosen 1/4 as before; rejected errors -1, 1, weights 3/4, 3/4.
    config = LossConfig('bradley_terry_quantile_huber', targets='margin')
    assert _comparison(pair, quantiles, config) == pytest.approx(_bt(1.0, 0.0) + 0.1, abs=1e-6)
    mean = sum(_sigma(x) for x in (-1.0, 1.0, 1.0, 3.0)) / 4.0
    assert _comparison(pair, quantiles, DISTRIBUTIONAL) == pytest.approx(-math.log(mean), abs=1e-6)


def test_soft_label_is_a_mixture_and_a_tie_the_average():
    rewards, margin = [[1.5], [0.0]], 0.25
    first, second = _bt(1.5, 0.0, margin), _bt(0.0, 1.5, margin)
    assert _comparison([[0, 0.7], [0.3, 0]], rewards, margin=margin) == pytest.approx(
        0.7 * first + 0.3 * second, abs=1e-6)
    assert _comparison([[0, 0.5], [0.5, 0]], rewards, margin=margin) == pytest.approx(
        0.5 * (first + second), abs=1e-6)


def test_ranking_is_the_mean_of_its_pairs():
    expected = (_bt(1.0, 0.0) + _bt(1.0, -2.0) + _bt(0.0, -2.0)) / 3.0
    assert _comparison([[0, 1, 1], [0, 0, 1], [0, 0, 0]]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('count', [64, 65, 90])
def test_rankings_of_many_responses_are_the_mean_of_their_pairs(count):
    rng = np.random.default_rng(count)
    rewards = rng.normal(size=count)
    preference = np.triu(rng.random((count, count)) < 0.3, 1).astype(np.float32)
    logits = rewards[:, None] - rewards[None, :]
    pairs = preference.sum()
    expected = (preference * np.log1p(np.exp(-logits))).sum() / pairs
    # d/dr_i of -log sigma(r_i - r_j) is sigma(r_i - r_j) - 1.
    slope = preference * (1.0 / (1.0 + np.exp(-logits)) - 1.0) / pairs

    def value(rewards):
        return _comparison_loss(BT, rewards[:, None], preference, jnp.float32(0.0))[0]

    found = jax.value_and_grad(value)(jnp.asarray(rewards, jnp.float32))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    np.testing.assert_allclose(found[1], slope.sum(axis=1) - slope.sum(axis=0), atol=1e-6)


def test_unknown_pairs_are_ignored():
    assert _comparison([[0, 0, 1], [0, 0, 0], [0, 0, 0]]) == pytest.approx(
        _bt(1.0, -2.0), abs=1e-6)
    # 2 over 0 and 2 over 1 are known, 0 against 1 is not.
    assert _comparison([[0, 0, 0], [0, 0, 0], [1, 1, 0]]) == pytest.approx(
        (_bt(-2.0, 1.0) + _bt(-2.0, 0.0)) / 2.0, abs=1e-6)


def test_present_slots_that_diverge_are_seen():
    # A reward that is compared must not be hidden by the selection.
    assert math.isnan(_comparison([[0, 1], [0, 0]], [[math.nan], [0.0]]))


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        bradley_terry(jnp.zeros(1), jnp.zeros(1))
    with pytest.raises(AssertionError):
        quantile_huber(jnp.zeros(3), jnp.zeros(3), jnp.zeros(1), kappa=1.0)
    with pytest.raises(AssertionError):
        losses.pinball(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros(1))
    with pytest.raises(AssertionError):
        comparison_loss(BT, read_quantiles(jnp.zeros((3, 1))), judgement(jnp.zeros((2, 2))))


# Every objective with every shape of distribution that it can train: one atom, atoms of known
# levels, atoms of known places, a Gaussian.

NAMES = ('scalar', 'quantile', 'gaussian', 'categorical', 'annotator', 'pairwise')
HEAD = {name: HeadConfig(name, 4, 5, 2.0, annotators=tuple('abc') * (name == 'annotator'))
        for name in NAMES}
OPTIONS = {
    'bradley_terry': {'centre_weight': 0.3}, 'distributional_bradley_terry': {
        'label_smoothing': 0.1}, 'plackett_luce': {'label_smoothing': 0.1},
    'ratings_quantile_huber': {'kappa': 0.4}, 'annotator_bradley_terry': {'anchor_weight': 0.7},
    'ratings_ordinal': {'thresholds': (-0.5, 1.0)},
}
PAIRS = [(objective, name) for objective, known in OBJECTIVES.items()
         for name in NAMES if name in known.heads]
TRAINED = [(LossConfig(objective, **OPTIONS.get(objective, {})), HEAD[name])
           for objective, name in PAIRS]
TRAINED += [(LossConfig('bradley_terry_quantile_huber', targets='teacher'), HEAD['quantile']),
            (LossConfig('distributional_bradley_terry', entropy_weight=0.2), HEAD['categorical']),
            (LossConfig('thurstone', thresholds=(-0.5, 1.0), anchor_weight=0.7), HEAD['gaussian'])]
TRAINED_NAMES = [f'{loss.objective}-{head.name}' for loss, head in TRAINED]


def _four_slots(head):
    """Outputs of four slots, of which 0 and 2 were compared and rated, and what is known."""
    rng = np.random.default_rng(7)
    outputs = rng.normal(0.0, 1.0, (4, head.outputs))
    preference = np.zeros((4, 4))
    preference[0, 2], preference[2, 0] = 0.8, 0.2
    ratings = np.array([[1.3], [math.nan], [-0.4], [math.nan]])
    return outputs, {'preference': preference, 'margin': 0.3, 'ratings': ratings, 'annotator': 1,
                     'teacher': rng.normal(size=(4, 1))}


@pytest.mark.parametrize(('config', 'head'), TRAINED, ids=TRAINED_NAMES)
@pytest.mark.usefixtures('float64')
def test_every_objective_has_the_gradient_of_its_value_and_does_not_leak(config, head):
    outputs, known = _four_slots(head)
    value, gradient, of_reward = _of_head(config, head, outputs, **known)
    assert np.isfinite(value)
    assert np.abs(np.asarray(gradient)[[0, 2]]).max() > 0.01
    if config.objective != 'posterior_quantile_regression':  # whose targets move with the outputs
        expected = _finite_differences(
            lambda x: _of_head(config, head, x, **known)[0], outputs)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)
    # Anything may stand in slots without a response.
    for bad in (math.nan, math.inf, -math.inf, 1e30):
        dirty = outputs.copy()
        dirty[[1, 3]] = bad
        found, _, of_dirty = _of_head(config, head, dirty, **known)
        assert float(found) == float(value)
        for leaf, clean in zip(*map(jax.tree.leaves, (of_dirty, of_reward)), strict=True):
            np.testing.assert_array_equal(leaf, clean)
            np.testing.assert_array_equal(np.asarray(leaf)[[1, 3]], 0.0)
    # Nothing known is nothing lost, whatever stands there.
    nothing = known | {'preference': np.zeros((4, 4)), 'ratings': np.full((4, 1), math.nan)}
    for bad in (0.5, math.nan):
        found, _, of_nothing = _of_head(config, head, np.full_like(outputs, bad), **nothing)
        assert float(found) == 0.0
        for leaf in jax.tree.leaves(of_nothing):
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_every_objective_can_train_some_head():
    assert {loss.objective for loss, _ in TRAINED} == set(OBJECTIVES)
    for loss, head in TRAINED:
        check_head(loss, head)


# Objectives of pairs, by hand.


GAUSSIAN_SIDES = np.array([[1.0, 2.0], [0.5, 1.5]])  # mean and standard deviation of both


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def _of_gaussians(config, sides, ratings):
    """Loss of a pair of Gaussians, the first preferred, and its gradient."""
    means, scales = jnp.reshape(sides.T, (2, 2, 1, 1, 1))
    reward = Reward(Gaussians(jnp.ones_like(means), means, scales), jnp.ones((2, 1, 1)),
                    jnp.zeros((2, 0)))
    known = judgement(np.array([[0.0, 1.0], [0.0, 0.0]]), 0.0, ratings[:, None])
    return comparison_loss(config, reward, known)


@pytest.mark.parametrize(('ratings', 'anchored'), [
    ((math.nan, math.nan), ()),
    # Below, between and above the thresholds -.5 and 1; a rating on a threshold is above it.
    ((-3.0, math.nan), [(0, -math.inf, -0.5)]),
    ((math.nan, 0.0), [(1, -0.5, 1.0)]),
    ((1.0, -0.5), [(0, 1.0, math.inf), (1, -0.5, 1.0)]),
])
@pytest.mark.usefixtures('float64')
def test_thurstone_and_its_anchors_by_hand(ratings, anchored):
    normal = scipy.stats.norm.cdf

    def by_hand(sides):
        (m, s), (n, t) = sides
        loss = -math.log(normal((m - n) / math.hypot(s, t)))
        each = [-math.log(normal(high, *sides[i]) - normal(low, *sides[i]))
                for i, low, high in anchored]
        return loss + 0.1 * np.mean(each) if each else loss

    config = LossConfig('thurstone', thresholds=(-0.5, 1), anchor_weight=0.1)
    value, gradient = _of_gaussians(config, GAUSSIAN_SIDES, np.array(ratings))
    assert float(value) == pytest.approx(by_hand(GAUSSIAN_SIDES), abs=1e-12)
    np.testing.assert_allclose(gradient, _finite_differences(by_hand, GAUSSIAN_SIDES), atol=1e-6)


@pytest.mark.usefixtures('float64')
def test_thurstone_leaves_scale_and_shift_open_and_two_anchors_do_not():
    free = LossConfig('thurstone')
    anchored = LossConfig('thurstone', thresholds=(-0.5, 1.0))
    moved = 3.0 * GAUSSIAN_SIDES + [2.0, 0.0]
    one, other = (_of_gaussians(free, sides, np.array([0.0, 1.5]))[0]
                  for sides in (GAUSSIAN_SIDES, moved))
    assert float(one) == pytest.approx(float(other), abs=1e-12)
    one, other = (_of_gaussians(anchored, sides, np.array([0.0, 1.5]))[0]
                  for sides in (GAUSSIAN_SIDES, moved))
    assert abs(float(one) - float(other)) > 0.1



@pytest.mark.usefixtures('float64')
def test_quantile_bradley_terry_by_hand():
    # Differences of (0, 2) and (1, -1) less a margin of 1/2: -1.5, 2.5.
    def value(quantiles):
        return losses.quantile_bradley_terry(*quantiles, 0.5)

    quantiles = jnp.asarray([CHOSEN, REJECTED])
    found, gradient = jax.jit(jax.value_and_grad(value))(quantiles)
    assert float(found) == pytest.approx((_bt(-1.5, 0.0) + _bt(2.5, 0.0)) / 2.0, abs=1e-12)
    slopes = np.array([_sigma(1.5), _sigma(-2.5)]) / 2.0
    np.testing.assert_allclose(gradient, [-slopes, slopes], rtol=0, atol=1e-12)
    # A constant added to one quantile of both sides changes nothing: the spread is not learned.
    assert float(value(quantiles + jnp.array([5.0, -3.0]))) == pytest.approx(
        float(found), abs=1e-12)


_posterior = jax.jit(jax.value_and_grad(
    lambda c, r: losses.posterior_quantile_regression(side(c), side(r)), argnums=(0, 1)))


@pytest.mark.usefixtures('float64')
def test_posterior_quantile_regression_by_hand():
    # Atoms (0, 2) against (1, -1): differences -1, 1; 1, 3 with sigma(-1) + sigma(1) = 1 and
    # sigma(1) + sigma(3) = 1.68363271, on both sides. So the weights of the atoms are v = .372629
    # (of 0, of 1) and 1 - v (of 2, of -1). An atom's slope is the mass below it, its own half, less
    # its level. Chosen, 0 at 1/4 and 2 at 3/4: v/2 - 1/4; v + (1 - v)/2 - 3/4. Rejected, 1 at 1/4
    # and -1 at 3/4: (1 - v) + v/2 - 1/4; (1 - v)/2 - 3/4.
    v = 1.0 / (1.0 + _sigma(1.0) + _sigma(3.0))
    assert v == pytest.approx(0.372629, abs=1e-6)
    value, (of_chosen, of_rejected) = _posterior(CHOSEN, REJECTED)
    np.testing.assert_allclose(of_chosen, [v / 2 - 0.25, v / 2 - 0.25], rtol=0, atol=1e-12)
    np.testing.assert_allclose(of_rejected, [0.75 - v / 2, -0.25 - v / 2], rtol=0, atol=1e-12)
    # Pinball losses: chosen 2/4 from either target; rejected 2 * 3/4 from either.
    assert float(value) == pytest.approx(0.5 + 1.5, abs=1e-12)


def test_posterior_quantile_regression_rests_where_the_label_says_nothing():
    # Far ahead, every atom wins: the posterior is the prior, of which the atoms are quantiles.
    rising = np.array([-1.0, 0.0, 0.5, 3.0], np.float32)
    _, gradients = _posterior(rising + 1000.0, rising)
    np.testing.assert_allclose(gradients, np.zeros((2, 4)), atol=1e-6)
    # Single atoms have nowhere to go.
    _, gradients = _posterior(np.float32([0.3]), np.float32([2.0]))
    np.testing.assert_array_equal(gradients, np.zeros((2, 1)))
    # Half of equal atoms counts as below, so that those of outer levels are pulled apart.
    _, gradients = _posterior(np.zeros(2, np.float32), np.zeros(2, np.float32))
    np.testing.assert_allclose(gradients, [[0.25, -0.25]] * 2, atol=1e-6)


def test_posterior_quantile_regression_is_finite_far_behind():
    # sigma(x) = exp(x) down there: weights are exp(q) on the chosen side, here 1/4 and 3/4, and
    # exp(-q) on the other, 3/4 and 1/4. Sigmoids themselves would all be 0 in float32.
    atoms = np.float32([0.0, math.log(3.0)])
    value, (of_chosen, of_rejected) = _posterior(atoms - 128.0, atoms)
    assert np.isfinite(value)
    np.testing.assert_allclose(of_chosen, [0.125 - 0.25] * 2, atol=1e-4)
    np.testing.assert_allclose(of_rejected, [0.375 - 0.25] * 2, atol=1e-4)


@pytest.mark.usefixtures('float64')
def test_teacher_targets_by_hand():
    # Means 1 and 0. Chosen, target -1: errors -1, -3; weights 3/4, 1/4; L = 1/2, 5/2: sum 1.
    # Rejected, target 0: errors -1, 1; weights 3/4, 3/4; L = 1/2, 1/2: sum 3/4.
    config = LossConfig('bradley_terry_quantile_huber', targets='teacher', huber_weight=0.5)
    assert config.has_teacher
    assert not LossConfig('bradley_terry', targets='teacher').has_teacher

    def loss(teacher):
        return comparison_loss(config, read_quantiles(jnp.asarray([CHOSEN, REJECTED])),
                               judgement([[0.0, 1.0], [0.0, 0.0]]), teacher)

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.array([[-1.0], [0.0]]))
    assert float(value) == pytest.approx(_bt(1.0, 0.0) + 0.5 * (1.0 + 0.75), abs=1e-12)
    np.testing.assert_array_equal(gradient, [[0.0], [0.0]])
    with pytest.raises(AssertionError):  # and not a target of 0
        loss(None)


# Pairs that are read together, in both orders.


@pytest.mark.parametrize(('p', 'margin', 'expected', 'slopes'), [
    # Log odds of the first place 1.2 and -.4, halved: -log sigma(1.2), and -log sigma(.4).
    (1.0, 0.0, (math.log1p(math.exp(-1.2)) + math.log1p(math.exp(-0.4))) / 2,
     (-expit(-1.2), expit(-0.4))),
    # The other way round the second order is of the preferred response first.
    (0.0, 0.0, (math.log1p(math.exp(0.4)) + math.log1p(math.exp(1.2))) / 2,
     (expit(1.2), -expit(0.4))),
    # Of a tie and of a soft label: p - sigma of each order's log odds.
    (0.5, 0.0, None, (expit(1.2) - 0.5, expit(-0.4) - 0.5)),
    (0.8, 0.0, None, (expit(1.2) - 0.8, expit(-0.4) - 0.2)),
    (1.0, 0.5, (math.log1p(math.exp(-0.7)) + math.log1p(math.exp(0.1))) / 2,
     (-expit(-0.7), expit(0.1))),
])
def test_each_order_has_its_cross_entropy(p, margin, expected, slopes):
    outputs = np.array([[0.6], [-0.2]])
    value, gradient, _ = _of_head(LossConfig('pairwise_cross_entropy'), HeadConfig('pairwise'),
                                  outputs, np.array([[0.0, p], [1.0 - p, 0.0]]), margin)
    if expected is None:
        expected = np.mean([-q * np.log(expit(x)) - (1 - q) * np.log(expit(-x))
                            for q, x in ((p, 1.2), (1.0 - p, -0.4))])
    assert float(value) == pytest.approx(expected, rel=1e-5)
    # Half of twice: the mean over two orders, of log odds that are twice the output.
    np.testing.assert_allclose(np.ravel(gradient), slopes, rtol=1e-5)


def test_exchanging_responses_changes_no_loss_of_orders():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(6, 1))
    matrix = np.array([[0.0, 0.7, 1.0], [0.3, 0.0, 0.5], [0.0, 0.5, 0.0]])
    moved = [2, 0, 1]  # response k stands where moved[k] stood
    place = {pair: n for n, pair in enumerate(orders.of(3))}
    exchanged = [place[moved[i], moved[j]] for i, j in orders.of(3)]
    values = [float(_of_head(LossConfig('pairwise_cross_entropy'), HeadConfig('pairwise'), x,
                             orders.preference(y))[0])
              for x, y in ((outputs, matrix), (outputs[exchanged], matrix[np.ix_(moved, moved)]))]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_centring_of_orders_is_of_what_the_first_place_is_worth():
    pair, outputs = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.6], [-0.2]])
    with_it, without = (float(_of_head(
        LossConfig('pairwise_cross_entropy', centre_weight=weight), HeadConfig('pairwise'),
        outputs, pair)[0]) for weight in (0.3, 0.0))
    # Log odds 1.2 and -.4 of the first place: .4 on average.
    assert with_it - without == pytest.approx(0.3 * 0.4 ** 2, rel=1e-5)


# Rankings. Scalar rewards 1, 0, -2, whose exponentials are e, 1 and e^-2.

PLACKETT_LUCE = LossConfig('plackett_luce')
E = [math.exp(1.0), 1.0, math.exp(-2.0)]


@pytest.mark.parametrize('preference', [
    [[0, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 0.7], [0.3, 0]], [[0, 0.5], [0.5, 0]]])
@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_plackett_luce_of_two_is_bradley_terry(preference, smoothing):
    rewards = [[1.5], [0.25]]
    found = (_comparison(preference, rewards, LossConfig(name, label_smoothing=smoothing))
             for name in ('plackett_luce', 'bradley_terry'))
    assert next(found) == pytest.approx(next(found), abs=1e-6)


@pytest.mark.parametrize(('preference', 'probability'), [
    # A ranking is a product of choices from those that are left.
    ([[0, 1, 1], [0, 0, 1], [0, 0, 0]], E[0] / sum(E) * E[1] / (E[1] + E[2])),
    ([[0, 0, 0], [1, 0, 0], [1, 1, 0]], E[2] / sum(E) * E[1] / (E[1] + E[0])),
    # Only the best of three is known: one choice.
    ([[0, 0, 0], [1, 0, 1], [0, 0, 0]], E[1] / sum(E)),
    # Of 1 nothing is known: 2 over 0.
    ([[0, 0, 0], [0, 0, 0], [1, 0, 0]], E[2] / (E[0] + E[2])),
    # 0 over 1 and 2, which tie: then half of either order.
    ([[0, 1, 1], [0, 0, 0.5], [0, 0.5, 0]],
     E[0] / sum(E) * math.sqrt(E[1] * E[2]) / (E[1] + E[2])),
    # 0 and 1 tie above 2: each is chosen from all three (Breslow).
    ([[0, 0.5, 1], [0.5, 0, 1], [0, 0, 0]], E[0] / sum(E) * E[1] / sum(E)),
])
def test_plackett_luce_by_hand(preference, probability):
    assert _comparison(preference, config=PLACKETT_LUCE) == pytest.approx(
        -math.log(probability), abs=1e-6)


def test_plackett_luce_gradient_by_hand():
    # Probabilities of each choice less 1 for the chosen: the first of three, then of two.
    gradient = jax.jit(jax.grad(losses.plackett_luce))(
        jnp.array([1.0, 0.0, -2.0]), jnp.array([[0.0, 1, 1], [0, 0, 1], [0, 0, 0]]))
    first, second = np.array(E) / sum(E), np.array([0.0, E[1], E[2]]) / (E[1] + E[2])
    np.testing.assert_allclose(gradient, first + second - [1, 1, 0], atol=1e-6)


def test_smoothed_rankings_keep_their_order():
    # 1 - s of the ranking 0, 1, 2 and s of 2, 1, 0.
    config = LossConfig('plackett_luce', label_smoothing=0.1)
    ranking = E[0] / sum(E) * E[1] / (E[1] + E[2])
    reverse = E[2] / sum(E) * E[1] / (E[1] + E[0])
    assert _comparison([[0, 1, 1], [0, 0, 1], [0, 0, 0]], config=config) == pytest.approx(
        -0.9 * math.log(ranking) - 0.1 * math.log(reverse), abs=1e-6)


# Ratings.


_pinball = jax.jit(jax.value_and_grad(
    lambda q, t: losses.pinball(q, jnp.asarray(taus(len(q))), t), argnums=(0, 1)))


def test_pinball_by_hand():
    # Levels 1/8, 3/8, 5/8, 7/8; errors of target 1: 2.5, .75, -1, 0. A positive one costs its
    # level, a negative one what the level lacks to 1, and none costs nothing.
    value, (gradient, of_target) = _pinball(QUANTILES, 1.0)
    assert float(value) == pytest.approx(2.5 / 8 + 0.75 * 3 / 8 + 3 / 8, abs=1e-6)
    # At the target itself the slope is that of half below: 1/2 - 7/8.
    np.testing.assert_allclose(gradient, [-1 / 8, -3 / 8, 3 / 8, -3 / 8], atol=1e-6)
    assert float(of_target) == 0.0


def test_conventions_at_zero():
    # That of JAX itself, which the losses do not rely on.
    assert float(jax.grad(jnp.abs)(0.0)) == 1.0
    # One quantile at tau = 1/2 on its target: in between -1/2 and 1/2.
    _, (gradient, _) = _pinball(np.zeros(1), 0.0)
    np.testing.assert_array_equal(gradient, [0.0])


@pytest.mark.usefixtures('float64')
def test_pinball_gradient_matches_finite_differences_and_numpy():
    rng = np.random.default_rng(8)
    levels = (np.arange(10) + 0.5) / 10
    for _ in range(5):
        quantiles, target = rng.normal(size=10), rng.normal()
        value, (gradient, _) = _pinball(quantiles, target)
        error = target - quantiles
        expected = np.sum(np.where(error < 0.0, (levels - 1.0) * error, levels * error))
        assert float(value) == pytest.approx(expected, abs=1e-6)  # levels are float32
        differences = _finite_differences(lambda q, t=target: _pinball(q, t)[0][()], quantiles)
        np.testing.assert_allclose(gradient, differences, rtol=0, atol=1e-6)
        # Quantile Huber over kappa lacks at most kappa / 2 a term.
        huber = float(_huber(quantiles, target, 0.001)[0]) / 0.001
        assert -1e-9 <= float(value) - huber <= 10 * 0.001 / 2


def test_pinball_finds_sample_quantiles():
    # The rating objective itself: a comparison of 4096 rated responses with the same quantiles.
    rng = np.random.default_rng(4)
    samples = np.exp(0.5 * rng.standard_normal(4096)).astype(np.float32)
    levels = np.full((4096, 10), taus(10))
    config = LossConfig('ratings_pinball')

    def loss(quantiles):
        parts = uniform_atoms(jnp.broadcast_to(quantiles, (4096, 1, 10)))
        return losses.attribute_ratings(config, parts, levels, samples[:, None])

    def step(i, quantiles):
        return quantiles - 2.0 * 0.98**i * jax.grad(loss)(quantiles)

    quantiles = jax.jit(lambda q: jax.lax.fori_loop(0, 400, step, q))(jnp.zeros(10))
    expected = np.quantile(samples, (np.arange(10) + 0.5) / 10)
    assert np.max(np.abs(quantiles - expected)) <= 0.01


def test_missing_ratings_count_nothing_and_leak_nothing():
    # Two scalars of two attributes each; pinball at tau = 1/2 is half the distance, of the three
    # that are rated 1 -> 2, 3 -> 3 and 4 -> 1: (1/2 + 0 + 3/2) / 3.
    values = jnp.array([[[1.0], [9.0]], [[3.0], [4.0]]])
    ratings = jnp.array([[2.0, math.nan], [3.0, 1.0]])

    def loss(values, ratings):
        return losses.attribute_ratings(LossConfig('ratings_pinball'), uniform_atoms(values),
                                        jnp.full((2, 1), 0.5), ratings)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (gradient, _) = compiled(values, ratings)
    assert float(value) == pytest.approx(2.0 / 3.0)
    np.testing.assert_allclose(gradient[..., 0], [[-1 / 6, 0.0], [0.0, 1 / 6]], atol=1e-6)
    # No rating at all: no loss.
    value, (gradient, _) = compiled(values, jnp.full((2, 2), math.nan))
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 2, 1)))


def test_crps_objective_by_hand():
    compiled = jax.jit(functools.partial(losses.attribute_ratings, LossConfig('ratings_crps')))

    def loss(parts, rating):
        parts = type(parts)(*(np.float32(x)[None, None] for x in parts))
        return float(compiled(parts, np.zeros((1, 1)), np.full((1, 1), rating)))

    # E|R - y| - E|R - R'| / 2. Of one atom the distance; of 0 and 2 and y = 3: 2 - 1 / 2.
    assert loss(Atoms([1.5], [1.0]), 3.0) == pytest.approx(1.5)
    assert loss(Atoms([0.0, 2.0], [0.5, 0.5]), 3.0) == pytest.approx(1.5)
    # N(0, 1) and y = 0: (sqrt 2 - 1) / sqrt pi; from its quantiles at ten midpoints .2391.
    assert loss(Gaussians([1.0], [0.0], [1.0]), 0.0) == pytest.approx(0.2337, abs=5e-5)
    midpoints = scipy.stats.norm.ppf((np.arange(10) + 0.5) / 10)
    assert loss(Atoms(midpoints, np.full(10, 0.1)), 0.0) == pytest.approx(0.2391, abs=5e-5)


def test_rating_objectives_of_a_comparison_by_hand():
    # Quantiles (0, 2) and (1, -1) rated 1 and unrated; levels 1/4, 3/4; errors 1, -1.
    outputs = np.float32([CHOSEN, REJECTED])
    known = {'preference': np.float32([[0, 1], [0, 0]]),
             'ratings': np.float32([[1.0], [math.nan]])}
    expected = {'ratings_pinball': 0.25 + 0.25, 'ratings_quantile_huber': 0.125 + 0.125,
                'ratings_crps': 1.0 - 0.5}
    for objective, value in expected.items():
        found, gradient, _ = _of_head(
            LossConfig(objective), HeadConfig('quantile', 2), outputs, **known)
        assert float(found) == pytest.approx(value, abs=1e-6)
        # The preference teaches nothing here.
        np.testing.assert_array_equal(gradient[1], [0.0, 0.0])


# Attributes and gates.

GATED = HeadConfig('quantile', 2, attributes=('a', 'b'))
# Attributes (0, 2), (4, 4) with gates 3/4, 1/4, and (1, -1), (0, 2) with 1/2, 1/2: means 1.75, .5.
GATED_OUTPUTS = np.float32([[0, 2, 4, 4, math.log(3.0), 0.0], [1, -1, 0, 2, 0.0, 0.0]])
FIRST_WINS = np.float32([[0, 1], [0, 0]])


def test_gates_learn_from_preferences_only():
    value, gradient, _ = _of_head(LossConfig('ratings_pinball'), GATED, GATED_OUTPUTS, FIRST_WINS,
                               0.25, np.full((2, 2), math.nan))
    # No ratings: Bradley-Terry of the gated means, with a margin of 1/4.
    assert float(value) == pytest.approx(_bt(1.75, 0.5, 0.25), abs=1e-6)
    np.testing.assert_array_equal(gradient[:, :4], np.zeros((2, 4)))
    # A logit moves the mean by gate * (the attribute's mean - the mean); means 1, 4 and 0, 1.
    slope = _sigma(-1.0)
    expected = [[-slope * 0.75 * (1 - 1.75), -slope * 0.25 * (4 - 1.75)],
                [slope * 0.5 * (0 - 0.5), slope * 0.5 * (1 - 0.5)]]
    np.testing.assert_allclose(gradient[:, 4:], expected, atol=1e-6)


def test_attributes_learn_from_ratings_only():
    ratings = np.float32([[1.0, math.nan], [math.nan, 3.0]])
    alone, of_ratings, _ = _of_head(LossConfig('ratings_pinball'), GATED, GATED_OUTPUTS,
                                 np.zeros((2, 2), np.float32), 0.25, ratings)
    # Errors 1, -1 and 3, 1 at levels 1/4, 3/4, of two ratings.
    assert float(alone) == pytest.approx((0.5 + 1.5) / 2, abs=1e-6)
    np.testing.assert_array_equal(of_ratings[:, 4:], np.zeros((2, 2)))
    np.testing.assert_allclose(
        of_ratings[:, :4], [[-0.125, 0.125, 0, 0], [0, 0, -0.125, -0.375]], atol=1e-6)
    both, of_both, _ = _of_head(LossConfig('ratings_pinball'), GATED, GATED_OUTPUTS, FIRST_WINS,
                             0.25, ratings)
    assert float(both - alone) == pytest.approx(_bt(1.75, 0.5, 0.25), abs=1e-6)
    np.testing.assert_allclose(of_both[:, :4], of_ratings[:, :4], atol=1e-6)


# Annotators.

ANNOTATED = HeadConfig('annotator', annotators=('a', 'b', 'c'))
OWN = np.float32([[0.5, 2.0, -1.0], [0.0, 3.0, 1.0]])  # annotator 1 gives 2 and 3


@pytest.mark.parametrize(('annotator', 'ratings', 'expected', 'gradient'), [
    # -log sigma(2 - 3 - .5), whose slope is sigma(1.5).
    (1, [math.nan, math.nan], _bt(2.0, 3.0, 0.5), (-_sigma(1.5), _sigma(1.5))),
    # Anchors at 1 and 5: the mean of (2 - 1)^2 and (3 - 5)^2, of weight .4.
    (1, [1.0, 5.0], _bt(2.0, 3.0, 0.5) + 0.4 * 2.5, (-_sigma(1.5) + 0.4, _sigma(1.5) - 0.8)),
    (1, [math.nan, 5.0], _bt(2.0, 3.0, 0.5) + 0.4 * 4.0, (-_sigma(1.5), _sigma(1.5) - 1.6)),
    # Of an unknown annotator nothing is learned.
    (-1, [1.0, 5.0], 0.0, (0.0, 0.0)),
])
def test_annotators_learn_from_their_own_judgements(annotator, ratings, expected, gradient):
    config = LossConfig('annotator_bradley_terry', anchor_weight=0.4)
    value, found, _ = _of_head(config, ANNOTATED, OWN, FIRST_WINS, 0.5,
                            np.float32(ratings)[:, None], annotator)
    assert float(value) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_array_equal(found[:, [0, 2]], np.zeros((2, 2)))
    np.testing.assert_allclose(found[:, 1], gradient, atol=1e-6)


def test_anchors_alone_are_learned_from():
    # A single rated response, K = 1: annotator 2 gives -1, the rating is 2.
    value, gradient, _ = _of_head(LossConfig('annotator_bradley_terry'), ANNOTATED, OWN[:1],
                               np.zeros((1, 1), np.float32), 0.0, np.float32([[2.0]]), 2)
    assert float(value) == pytest.approx(9.0)
    np.testing.assert_allclose(gradient, [[0.0, 0.0, -6.0]])


# What is added to objectives.


def test_label_smoothing_by_hand():
    smooth = LossConfig('bradley_terry', label_smoothing=0.1)
    expected = 0.9 * _bt(1.0, 0.0, 0.25) + 0.1 * _bt(0.0, 1.0, 0.25)
    assert _comparison(FIRST_WINS, REWARDS[:2], smooth, 0.25) == pytest.approx(expected, abs=1e-6)
    # A tie stays one.
    tie = [[0, 0.5], [0.5, 0]]
    assert _comparison(tie, REWARDS[:2], smooth) == pytest.approx(
        _comparison(tie, REWARDS[:2]), abs=1e-6)
    # A ranking: the mean over its pairs.
    pairs = [(1.0, 0.0), (1.0, -2.0), (0.0, -2.0)]
    expected = sum(0.9 * _bt(a, b) + 0.1 * _bt(b, a) for a, b in pairs) / 3.0
    assert _comparison([[0, 1, 1], [0, 0, 1], [0, 0, 0]], config=smooth) == pytest.approx(
        expected, abs=1e-6)


@pytest.mark.parametrize(('preference', 'expected'), [
    # Rewards 1, 0, -2: (1 + 0)^2; (1 + 0)^2, (1 - 2)^2 and (0 - 2)^2; a tie as a preference.
    ([[0, 1, 0], [0, 0, 0], [0, 0, 0]], 1.0),
    ([[0, 1, 1], [0, 0, 1], [0, 0, 0]], (1.0 + 1.0 + 4.0) / 3.0),
    ([[0, 0, 0], [0, 0, 0.5], [0, 0.5, 0]], 4.0),
])
def test_centring_by_hand(preference, expected):
    centred = _comparison(preference, config=LossConfig('bradley_terry', centre_weight=0.25))
    assert centred - _comparison(preference) == pytest.approx(0.25 * expected, abs=1e-6)


def test_entropy_by_hand():
    # Weights (1, 3) / 4 and (1, 1) / 2 of the atoms -1 and 1: entropies .562335 and ln 2.
    head = HeadConfig('categorical', num_atoms=2, atom_range=1.0)
    outputs = np.float32([[0.0, math.log(3.0)], [0.0, 0.0]])
    plain, *_ = _of_head(LossConfig('bradley_terry'), head, outputs, FIRST_WINS)
    rewarded, gradient, _ = _of_head(LossConfig('bradley_terry', entropy_weight=0.5), head, outputs,
                                  FIRST_WINS)
    expected = 0.5 * (0.5623351446 + math.log(2.0)) / 2.0
    assert float(plain - rewarded) == pytest.approx(expected, abs=1e-6)
    # However many slots are empty.
    padded = np.concatenate([outputs, np.full((2, 2), 7.0, np.float32)])
    wider = np.pad(FIRST_WINS, (0, 2))
    again, of_padded, _ = _of_head(LossConfig('bradley_terry', entropy_weight=0.5), head, padded,
                                wider)
    assert float(again) == pytest.approx(float(rewarded), abs=1e-6)
    np.testing.assert_allclose(of_padded[:2], gradient, atol=1e-6)
    # Also where a weight is 0 in float32.
    _, gradient, _ = _of_head(LossConfig('bradley_terry', entropy_weight=0.5), head,
                           np.float32([[0.0, 300.0], [0.0, 0.0]]), FIRST_WINS)
    assert np.all(np.isfinite(gradient))


# Ensembles.


@pytest.mark.parametrize(('objective', 'name'), [
    ('bradley_terry', 'scalar'), ('ratings_pinball', 'scalar'),
    ('distributional_bradley_terry', 'gaussian'), ('annotator_bradley_terry', 'annotator')])
@pytest.mark.usefixtures('float64')
def test_members_are_trained_each_by_itself(objective, name):
    annotators = tuple('abc') * (name == 'annotator')
    one, three = (HeadConfig(name, members=m, annotators=annotators) for m in (1, 3))
    rng = np.random.default_rng(9)
    outputs = rng.normal(size=(2, 3, one.outputs))
    known = {'preference': np.float64([[0, 1], [0, 0]]), 'margin': 0.2,
             'ratings': np.array([[0.4], [math.nan]]), 'annotator': 2}
    config = LossConfig(objective)
    value, gradient, _ = _of_head(config, three, outputs.reshape(2, -1), **known)
    apart = [_of_head(config, one, outputs[:, e], **known) for e in range(3)]
    # The mean of their losses, and so a third of the gradient of each.
    assert float(value) == pytest.approx(sum(float(v) for v, *_ in apart) / 3.0, abs=1e-12)
    np.testing.assert_allclose(
        gradient.reshape(outputs.shape), np.stack([g for _, g, _ in apart], axis=1) / 3.0,
        rtol=0, atol=1e-12)


def test_each_member_has_its_own_teacher_and_gate():
    config = LossConfig('bradley_terry_quantile_huber', targets='teacher')
    head = HeadConfig('scalar', members=2)
    # Rewards equal to the teacher's in member 0, and 1 below it in member 1, where both sides cost
    # 1/2 * 1/2, times .1.
    outputs = np.float32([[2.0, 2.0], [1.0, 1.0]])
    teacher = np.float32([[2.0, 3.0], [1.0, 2.0]])
    value, *_ = _of_head(config, head, outputs, FIRST_WINS, teacher=teacher)
    assert float(value) == pytest.approx(_bt(2.0, 1.0) + 0.1 * (0.25 + 0.25) / 2.0, abs=1e-6)
    # Gated means 2, 0 with gates 1/2; in the second member 0 and 0.
    gated = HeadConfig('scalar', members=2, attributes=('a', 'b'))
    outputs = np.float32([[3, 1, 0, 0, 5, 5, 0, 0], [0, 0, 0, 0, 5, 5, 0, 0]])
    value, gradient, _ = _of_head(LossConfig('ratings_pinball'), gated, outputs, FIRST_WINS, 0.0,
                               np.full((2, 2), math.nan))
    assert float(value) == pytest.approx((_bt(2.0, 0.0) + math.log(2.0)) / 2.0, abs=1e-6)
    # Only the first member's first response has attributes that differ.
    slope = _sigma(-2.0) / 2.0 * 0.5
    expected = np.zeros((2, 8))
    expected[0, 2:4] = -slope * (3 - 2), -slope * (1 - 2)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


# Win probabilities of other distributions.


def test_win_probability_under_each_likelihood():
    gaussians = [Gaussians(jnp.ones(1), jnp.array([m]), jnp.array([s]))
                 for m, s in ((1.0, 2.0), (0.0, 1.5))]
    assert float(_log_win_of(BT, *gaussians)) == pytest.approx(
        math.log(_sigma(1.0)), abs=1e-6)
    # E sigma(1 + 2.5 Z) by quadrature with SciPy.
    expected, _ = scipy.integrate.quad(
        lambda z: scipy.special.expit(1.0 + 2.5 * z) * scipy.stats.norm.pdf(z), -12, 12)
    for name in ('distributional_bradley_terry', 'ratings_crps'):
        found = _log_win_of(LossConfig(name), *gaussians)
        assert float(found) == pytest.approx(math.log(expected), abs=1e-5)
    # A reward of N(1, 2^2) is above one of N(0, 1.5^2): Phi(1 / 2.5).
    found = _log_win_of(LossConfig('thurstone'), *gaussians)
    assert float(found) == pytest.approx(math.log(scipy.stats.norm.cdf(0.4)), abs=1e-6)
    # The same annotator judges both sides: (0, 4) against (1, 1) is the mean of two.
    shared = LossConfig('annotator_bradley_terry')
    found = _log_win(shared, jnp.array([0.0, 4.0]), jnp.array([1.0, 1.0]))
    assert float(found) == pytest.approx(math.log((_sigma(-1.0) + _sigma(3.0)) / 2.0), abs=1e-6)


# Configuration.


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'objective': 'hinge'}, r"objective 'hinge', expected one of \('bradley_terry'"),
        ({'targets': 'ema'}, r"targets 'ema', expected one of \('label', 'margin', 'teach"),
        ({'kappa': 0.0}, 'kappa=0.0, expected a finite positive number'),
        ({'kappa': -1.0}, 'kappa=-1.0'),
        ({'kappa': math.nan}, 'kappa=nan'),
        # L_kappa would be inf * 0 beyond the threshold.
        ({'kappa': math.inf}, 'kappa=inf'),
        ({'huber_weight': -0.1}, 'huber_weight=-0.1.*not negative'),
        ({'huber_weight': math.nan}, 'huber_weight=nan'),
        ({'lm_weight': -1.0}, 'lm_weight=-1.0.*not negative'),
        ({'lm_weight': math.inf}, 'lm_weight=inf'),
        ({'anchor_weight': -1.0}, 'anchor_weight=-1.0.*not negative'),
        ({'centre_weight': math.nan}, 'centre_weight=nan'),
        ({'entropy_weight': -0.5}, 'entropy_weight=-0.5.*not negative'),
        ({'huber_sides': 'rejected'}, "huber_sides 'rejected', expected one of"),
        ({'pair_epsilon': -1.0}, 'pair_epsilon=-1.0, expected a finite number'),
        ({'ema_decay': 1.0}, r'ema_decay=1.0.*expected numbers in \[0, 1\) and \[0, .5\)'),
        ({'label_smoothing': 0.5}, 'label_smoothing=0.5'),
        ({'label_smoothing': math.nan}, 'label_smoothing=nan'),
        ({'thresholds': (1.0, 1.0)}, r'thresholds=\(1.0, 1.0\), expected finite numbers that incr'),
        ({'thresholds': (0.0, math.nan)}, r'thresholds=\(0.0, nan\), expected finite'),
        ({'thresholds': (0.0, math.inf)}, r'thresholds=\(0.0, inf\), expected finite'),
        ({'thresholds': (0.5,), 'objective': 'ratings_crps'},
         r"thresholds=\(0.5,\) with the objective 'ratings_crps', expected none"),
        ({'objective': 'ratings_ordinal'},
         r"thresholds=\(\) with the objective 'ratings_ordinal', expected at least one"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**{'objective': 'bradley_terry_quantile_huber'} | change)


def test_weights_of_zero_are_allowed():
    config = LossConfig('bradley_terry_quantile_huber', huber_weight=0.0)
    pair = [[0, 1], [0, 0]]
    assert _comparison(pair, [CHOSEN, REJECTED], config) == pytest.approx(_bt(1.0, 0.0), abs=1e-6)


@pytest.mark.parametrize(('config', 'head', 'message'), [
    (LossConfig('ratings_pinball'), HeadConfig('gaussian'),
     "'ratings_pinball' with the gaussian head, expected one of the heads"),
    (LossConfig('posterior_quantile_regression'), HeadConfig('scalar'), 'with the scalar head'),
    (LossConfig('bradley_terry'), HeadConfig('annotator', annotators=('a', 'b')),
     'the annotator head'),
    (LossConfig('annotator_bradley_terry'), HeadConfig('quantile'), 'with the quantile head'),
    (LossConfig('bradley_terry', entropy_weight=0.1), HeadConfig('quantile'),
     'entropy_weight=0.1 with the quantile head, expected 0'),
    (LossConfig('ratings_pinball', centre_weight=0.1), HeadConfig('quantile'),
     "centre_weight=0.1 with the objective 'ratings_pinball', expected 0"),
    (LossConfig('distributional_bradley_terry', thresholds=(0.0,)), HeadConfig('categorical'),
     r'thresholds=\(0.0,\) with the categorical head, expected none'),
    (LossConfig('bradley_terry'), HeadConfig('pairwise'), 'with the pairwise head, expected one'),
    (LossConfig('pairwise_cross_entropy'), HeadConfig('scalar'), 'with the scalar head'),
    (LossConfig('pairwise_cross_entropy', lm_weight=0.1), HeadConfig('pairwise'),
     'lm_weight=0.1 with the pairwise head, expected 0'),
    (LossConfig('bradley_terry'), HeadConfig('scalar', attributes=('a', 'b')),
     "'bradley_terry' with 2 attributes, expected one that reads ratings"),
])
def test_heads_that_an_objective_cannot_train(config, head, message):
    with pytest.raises(ValueError, match=message):
        check_head(config, head)


def test_objectives_name_heads_that_exist():
    assert {name for known in OBJECTIVES.values() for name in known.heads} == set(HEADS)
    for name in HEADS:
        head = HeadConfig(name, annotators=('a',) * (name == 'annotator'))
        for objective, known in OBJECTIVES.items():
            if name in known.heads:
                check_head(LossConfig(objective, **OPTIONS.get(objective, {})), head)
