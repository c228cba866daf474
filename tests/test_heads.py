"""Tests of the reward heads: levels, reading of the outputs, initial scale."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.heads import HEADS, Head, HeadConfig, Reward, monotone_quantiles, taus

HEAD_CONFIGS = [
    HeadConfig('scalar'), HeadConfig('quantile', 7), HeadConfig('quantile', 7, monotone=True)]


def _apply(config, kernel, hidden):
    return Head(config).apply({'params': {'kernel': jnp.asarray(kernel)}}, jnp.asarray(hidden))


def test_taus_by_hand():
    np.testing.assert_array_equal(taus(1), [0.5])
    np.testing.assert_array_equal(taus(2), [0.25, 0.75])
    np.testing.assert_array_equal(taus(4), [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(
        taus(10), [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95], rtol=1e-7)
    assert taus(10).dtype == np.float32


def test_reward_is_the_mean_of_the_quantiles():
    quantiles = jnp.array([[[1.0, 2.0, 6.0], [-1.0, 0.0, 1.0]]])
    np.testing.assert_allclose(Reward(quantiles).mean, [[3.0, 0.0]], rtol=1e-6)
    # One quantile is a point mass: the reward itself, to the bit.
    point = jnp.array([0.1, -7.3])
    np.testing.assert_array_equal(Reward(point[:, None]).mean, point)


@pytest.mark.parametrize('config', HEAD_CONFIGS)
def test_outputs_and_parameters(config):
    hidden = jnp.ones((3, 2, 5))
    reward, variables = Head(config).init_with_output(jax.random.key(0), hidden)
    outputs = 1 if config.name == 'scalar' else 7
    assert config.outputs == outputs
    assert reward.quantiles.shape == (3, 2, outputs)
    assert reward.mean.shape == (3, 2)
    assert reward.quantiles.dtype == jnp.float32
    # A kernel and no bias: a state of zeros has reward 0.
    assert jax.tree.map(jnp.shape, variables) == {'params': {'kernel': (5, outputs)}}
    zero = Head(config).apply(variables, jnp.zeros((5,)))
    assert float(zero.mean) == pytest.approx(0.0, abs=1e-7)


def test_linear_heads_by_hand():
    hidden = [[1.0, -2.0], [0.5, 4.0]]
    # [1, -2] @ [3, 1]^T = 1 and [.5, 4] @ [3, 1]^T = 5.5.
    reward = _apply(HeadConfig('scalar'), [[3.0], [1.0]], hidden)
    np.testing.assert_array_equal(reward.quantiles, [[1.0], [5.5]])
    np.testing.assert_array_equal(reward.mean, [1.0, 5.5])
    # A free head gives the outputs as they are, also if they cross.
    reward = _apply(HeadConfig('quantile', 2), [[3.0, 0.0], [1.0, 1.0]], hidden)
    np.testing.assert_array_equal(reward.quantiles, [[1.0, -2.0], [5.5, 4.0]])
    np.testing.assert_array_equal(reward.mean, [-0.5, 4.75])


def test_monotone_quantiles_by_hand():
    # softplus(0) = ln 2 and softplus(ln(e^3 - 1)) = 3, over N = 3: steps a = ln 2 / 3 and 1. The
    # quantiles rise as 0, a, a + 1 with mean (2 a + 1) / 3, which is shifted to the mean 5.
    a = math.log(2.0) / 3.0
    shift = 5.0 - (2.0 * a + 1.0) / 3.0
    outputs = jnp.array([5.0, 0.0, math.log(math.exp(3.0) - 1.0)])
    np.testing.assert_allclose(
        monotone_quantiles(outputs), [shift, shift + a, shift + a + 1.0], rtol=1e-6)
    # The head reads its outputs in this way.
    reward = _apply(HeadConfig('quantile', 3, monotone=True), outputs[None], [1.0])
    np.testing.assert_allclose(reward.quantiles, [shift, shift + a, shift + a + 1.0], rtol=1e-6)


def test_monotone_with_one_quantile_is_the_output():
    np.testing.assert_array_equal(monotone_quantiles(jnp.array([[2.5], [-1.0]])), [[2.5], [-1.0]])


@pytest.mark.parametrize('n', [2, 10, 33, 200])
def test_monotone_quantiles_never_cross(n):
    rng = np.random.default_rng(n)
    for scale in (1.0, 10.0, 1000.0):
        outputs = (scale * rng.standard_normal((500, n))).astype(np.float32)
        quantiles = np.asarray(jax.jit(monotone_quantiles)(outputs), np.float64)
        assert np.all(np.diff(quantiles, axis=-1) >= 0.0)
        # The mean is output 0 up to the rounding of the sums.
        largest = np.abs(quantiles).max(axis=-1)
        assert np.all(np.abs(quantiles.mean(axis=-1) - outputs[:, 0]) <= 4e-7 * (1.0 + largest))


def test_monotone_mean_is_output_0_exactly():
    with jax.enable_x64(True):
        outputs = jnp.asarray(np.random.default_rng(0).normal(0.0, 3.0, (100, 10)))
        means = Reward(monotone_quantiles(outputs)).mean
        np.testing.assert_allclose(means, outputs[:, 0], rtol=0, atol=1e-14)


def test_monotone_gradient_by_hand():
    # The first quantile of N = 2 is o_0 - s / 2 with s = softplus(o_1) / 2, whose slope is
    # sigma(o_1) / 2; at o_1 = 0 the gradient is (1, -1/8), of the second quantile (1, 1/8).
    jacobian = jax.jacobian(monotone_quantiles)(jnp.array([3.0, 0.0]))
    np.testing.assert_allclose(jacobian, [[1.0, -0.125], [1.0, 0.125]], rtol=1e-6)


@pytest.mark.parametrize('width', [16, 256])
def test_initial_outputs_have_unit_scale(width):
    # A norm leaves states of mean 0 and variance 1, so the outputs have variance D / (D + 1).
    # 4000 outputs of one random kernel each: standard error 1 / sqrt(8000) = .011.
    rng = np.random.default_rng(width)
    hidden = rng.standard_normal((width,))
    hidden = ((hidden - hidden.mean()) / hidden.std()).astype(np.float32)
    reward, _ = Head(HeadConfig('quantile', 4000)).init_with_output(
        jax.random.key(0), jnp.asarray(hidden))
    assert np.std(reward.quantiles) == pytest.approx(math.sqrt(width / (width + 1)), abs=0.045)
    assert np.mean(reward.quantiles) == pytest.approx(0.0, abs=0.065)


@pytest.mark.parametrize('config', HEAD_CONFIGS)
def test_bfloat16_states_are_read_in_float32(config):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((20, 32)), jnp.bfloat16)
    kernel = rng.standard_normal((32, config.outputs)).astype(np.float32)
    reward = _apply(config, kernel, hidden)
    assert reward.quantiles.dtype == jnp.float32
    # The states are rounded, the product is not: as with the same states in float64.
    outputs = np.asarray(hidden, np.float64) @ kernel
    if config.monotone:
        np.testing.assert_allclose(reward.mean, outputs[:, 0], rtol=0, atol=1e-5)
    else:
        np.testing.assert_allclose(reward.quantiles, outputs, rtol=0, atol=1e-5)


def test_config_errors():
    assert HEADS == ('scalar', 'quantile')
    with pytest.raises(ValueError, match=r"head 'linear', expected one of \('scalar'"):
        HeadConfig('linear')
    for n in (0, -3):
        with pytest.raises(ValueError, match=f'num_quantiles={n}, expected at least 1'):
            HeadConfig('quantile', n)
