"""Tests of the losses: values and gradients worked out by hand, in float64 where it matters.

Expected values come from closed forms in `math`, from rlax, from quadrature and from NumPy.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from qrm import losses
from qrm.distributions import uniform_atoms
from qrm.heads import taus
from qrm.losses import (
    LossConfig,
    bradley_terry,
    bradley_terry_quantile_huber,
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
        side(c), side(r), margin, **options), argnums=(0, 1)), static_argnames='targets')
_distributional = jax.jit(jax.value_and_grad(
    lambda c, r, margin: distributional_bradley_terry(
        uniform_atoms(c), uniform_atoms(r), margin), argnums=(0, 1)))
_comparison_loss = jax.jit(
    jax.value_and_grad(lambda config, quantiles, preference, margin: comparison_loss(
        config, read_quantiles(quantiles), judgement(preference, margin)), argnums=1),
    static_argnums=0)


def _log_win(config, chosen, rejected):
    return log_win_probability(config, uniform_atoms(chosen), uniform_atoms(rejected))


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


def test_unknown_pairs_are_ignored():
    assert _comparison([[0, 0, 1], [0, 0, 0], [0, 0, 0]]) == pytest.approx(
        _bt(1.0, -2.0), abs=1e-6)
    # 2 over 0 and 2 over 1 are known, 0 against 1 is not.
    assert _comparison([[0, 0, 0], [0, 0, 0], [1, 1, 0]]) == pytest.approx(
        (_bt(-2.0, 1.0) + _bt(-2.0, 0.0)) / 2.0, abs=1e-6)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize('config', CONFIGS)
def test_absent_slots_do_not_leak(config, bad):
    # A pair in slots 0 and 2 of four; anything may stand in 1 and 3.
    preference = np.zeros((4, 4), np.float32)
    preference[0, 2] = 1.0
    clean = np.array([CHOSEN, [0.0, 0.0], REJECTED, [0.0, 0.0]], np.float32)
    dirty = clean.copy()
    dirty[[1, 3]] = bad
    value, gradient = _comparison_loss(config, dirty, preference, np.float32(0.0))
    expected_value, expected_gradient = _comparison_loss(
        config, clean, preference, np.float32(0.0))
    assert float(value) == float(expected_value)
    np.testing.assert_array_equal(gradient, expected_gradient)
    np.testing.assert_array_equal(np.asarray(gradient)[[1, 3]], 0.0)
    assert np.all(np.isfinite(gradient))
    assert np.max(np.abs(gradient)) > 0.01


def test_present_slots_that_diverge_are_seen():
    # A reward that is compared must not be hidden by the selection.
    assert math.isnan(_comparison([[0, 1], [0, 0]], [[math.nan], [0.0]]))


@pytest.mark.parametrize('bad', [0.0, math.nan])
@pytest.mark.parametrize('config', CONFIGS)
def test_nothing_known_gives_zero(config, bad):
    value, gradient = _comparison_loss(
        config, np.full((2, 3), bad, np.float32), np.zeros((2, 2), np.float32), np.float32(0.0))
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.usefixtures('float64')
def test_comparison_gradient_matches_finite_differences(config):
    quantiles = np.random.default_rng(6).normal(0.0, 1.0, (3, 4))
    preference = np.array([[0.0, 0.8, 1.0], [0.2, 0.0, 0.0], [0.0, 0.0, 0.0]])
    _, gradient = _comparison_loss(config, quantiles, preference, np.float64(0.3))
    expected = _finite_differences(
        lambda q: _comparison_loss(config, q, preference, np.float64(0.3))[0], quantiles)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        bradley_terry(jnp.zeros(1), jnp.zeros(1))
    with pytest.raises(AssertionError):
        quantile_huber(jnp.zeros(3), jnp.zeros(3), jnp.zeros(1), kappa=1.0)
    with pytest.raises(AssertionError):
        losses.pinball(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros(1))
    with pytest.raises(AssertionError):
        comparison_loss(BT, read_quantiles(jnp.zeros((3, 1))), judgement(jnp.zeros((2, 2))))


# Configuration.


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'objective': 'hinge'}, r"objective 'hinge', expected one of \('bradley_terry'"),
        ({'targets': 'ema'}, r"targets 'ema', expected one of \('label', 'margin', 'teacher'\)"),
        ({'kappa': 0.0}, 'kappa=0.0, expected a finite positive number'),
        ({'kappa': -1.0}, 'kappa=-1.0'),
        ({'kappa': math.nan}, 'kappa=nan'),
        # L_kappa would be inf * 0 beyond the threshold.
        ({'kappa': math.inf}, 'kappa=inf'),
        ({'huber_weight': -0.1}, 'huber_weight=-0.1.*not negative'),
        ({'huber_weight': math.nan}, 'huber_weight=nan'),
        ({'lm_weight': -1.0}, 'lm_weight=-1.0.*not negative'),
        ({'lm_weight': math.inf}, 'lm_weight=inf'),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**{'objective': 'bradley_terry_quantile_huber'} | change)


def test_weights_of_zero_are_allowed():
    config = LossConfig('bradley_terry_quantile_huber', huber_weight=0.0)
    pair = [[0, 1], [0, 0]]
    assert _comparison(pair, [CHOSEN, REJECTED], config) == pytest.approx(_bt(1.0, 0.0), abs=1e-6)
