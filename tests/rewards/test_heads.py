"""Tests of the reward heads: outputs by hand, what they stand for, members, attributes, gates.

Expected values come from NumPy in float64 and from numbers worked out by hand.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.models import sharding
from qrm.rewards import heads
from qrm.rewards.distributions import Atoms, Gaussians
from qrm.rewards.heads import HEADS, HeadConfig, monotone_quantiles, taus

QUANTILES = ('quantile', 'monotone_quantile', 'implicit_quantile')
ANNOTATORS = {'annotator': ('a', 'b', 'c')}  # of those heads that know some


# A compilation costs less than its operations one by one.
_init = jax.jit(heads.init, static_argnums=(0, 2))
_apply = jax.jit(heads.apply, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _read(config, outputs, levels=None):
    """The reward with its distribution, and the quantiles that are reported."""
    reward = config.read(jnp.asarray(outputs, jnp.float32), levels)
    return reward, reward.distribution, config.quantiles(jnp.asarray(outputs, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _moments(config, outputs, levels=None):
    """Mean and std of the reward, and the members' means."""
    reward = config.read(jnp.asarray(outputs, jnp.float32), levels)
    return reward.distribution.mean, reward.distribution.std, reward.members.mean


def _config(name, num_quantiles=7, **sizes):
    return HeadConfig(name, num_quantiles, annotators=ANNOTATORS.get(name, ()), **sizes)


def _params(**arrays):
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


def _random_params(config, width, rng):
    shapes = jax.eval_shape(lambda: heads.init(config, jax.random.key(0), width))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


def _hidden(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _softplus(x):
    return math.log1p(math.exp(x))


# Levels and shapes.


def test_taus_by_hand():
    np.testing.assert_array_equal(taus(1), [0.5])
    np.testing.assert_array_equal(taus(2), [0.25, 0.75])
    np.testing.assert_array_equal(taus(4), [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(
        taus(10), [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95], rtol=1e-7)
    assert taus(10).dtype == np.float32


@pytest.mark.parametrize(('config', 'n'), [
    (HeadConfig('scalar'), 1),
    # Several scalars are a distribution.
    (HeadConfig('pairwise'), 1), (HeadConfig('pairwise', members=3), 10),
    (HeadConfig('scalar', members=3), 10), (HeadConfig('scalar', 4, members=2), 4),
    (HeadConfig('quantile', 7), 7), (HeadConfig('gaussian', 5), 5),
    (HeadConfig('categorical', 6, 21), 6), (HeadConfig('annotator', annotators=('a', 'b')), 10),
])
def test_levels_that_are_reported(config, n):
    np.testing.assert_array_equal(config.taus, taus(n))


D = 5
SHAPES = {
    'scalar': ({'kernel': (D, 1)}, 1),
    'gaussian': ({'kernel': (D, 2)}, 2),
    'categorical': ({'kernel': (D, 21)}, 21),
    'quantile': ({'kernel': (D, 7)}, 7),
    'monotone_quantile': ({'kernel': (D, 7)}, 7),
    'implicit_quantile': ({'kernel': (D, 1), 'cosines': (64, D), 'bias': (D,)}, 7),
    'annotator': ({'kernel': (D, 2), 'annotators': (3, 1)}, 3),
    'pairwise': ({'kernel': (D, 1)}, 1),
}


@pytest.mark.parametrize('members', [1, 2])
@pytest.mark.parametrize('name', HEADS)
def test_outputs_and_parameters(name, members):
    assert tuple(SHAPES) == HEADS
    config = _config(name, members=members)

    def shapes_of(hidden):
        params = heads.init(config, jax.random.key(0), D)
        outputs = heads.apply(config, params, hidden)
        reward = config.read(outputs)
        return (params, outputs, reward.gates, reward.parts.mean, reward.members.mean,
                reward.distribution.mean, reward.taus, config.quantiles(outputs))

    params, outputs, *read, reported = jax.eval_shape(shapes_of, jnp.ones((3, 2, D)))
    shapes, numbers = SHAPES[name]
    stacked = {key: shape if members == 1 else (members, *shape) for key, shape in shapes.items()}
    assert jax.tree.map(lambda x: x.shape, params) == stacked
    assert {x.dtype for x in (*jax.tree.leaves(params), outputs, reported)} == {
        jnp.dtype('float32')}
    assert outputs.shape == (3, 2, config.outputs) == (3, 2, members * numbers)
    assert [x.shape for x in read] == [
        (3, 2, members, 1), (3, 2, members, 1), (3, 2, members), (3, 2),
        (3, 2, 1 if name in ('scalar', 'pairwise') else 7)]
    assert reported.shape == (3, 2, len(config.taus))


@pytest.mark.parametrize('name', [n for n in HEADS
                                  if n not in ('categorical', 'annotator', 'pairwise')])
def test_outputs_and_parameters_of_attributes(name):
    config = _config(name, attributes=('kind', 'true', 'short'), members=2)

    def shapes_of(hidden):
        params = heads.init(config, jax.random.key(0), D)
        outputs = heads.apply(config, params, hidden, prompt=hidden)
        reward = config.read(outputs)
        return (params['gate'], outputs, reward.gates, reward.parts.mean, reward.members.mean,
                reward.distribution.mean, reward.taus)

    shapes = [x.shape for x in jax.eval_shape(shapes_of, jnp.ones((4, D)))]
    assert config.outputs == 2 * (3 * SHAPES[name][1] + 3)
    assert shapes == [(2, D, 3), (4, config.outputs), (4, 2, 3), (4, 2, 3), (4, 2), (4,),
                      (4, 1 if name == 'scalar' else 7)]


def test_attributes_start_with_equal_weights_whatever_the_prompt():
    config = HeadConfig('scalar', attributes=('kind', 'true', 'short'), members=2)
    prompt = jnp.asarray(_hidden(4, D))
    outputs = _apply(config, _init(config, jax.random.key(0), D), prompt, prompt=prompt)
    reward, _, _ = _read(config, outputs)
    np.testing.assert_allclose(reward.gates, np.full((4, 2, 3), 1 / 3), rtol=1e-6)


# Each head by hand.


def test_linear_heads_by_hand():
    hidden = jnp.array([[1.0, -2.0], [0.5, 4.0]])
    # [1, -2] @ [3, 1]^T = 1 and [.5, 4] @ [3, 1]^T = 5.5.
    scalar = HeadConfig('scalar')
    outputs = _apply(scalar, _params(kernel=[[3.0], [1.0]]), hidden)
    _, whole, quantiles = _read(scalar, outputs)
    np.testing.assert_array_equal(quantiles, [[1.0], [5.5]])
    np.testing.assert_array_equal(whole.mean, [1.0, 5.5])
    np.testing.assert_array_equal(whole.std, [0.0, 0.0])
    # A free head gives the outputs as they are, also if they cross.
    free = HeadConfig('quantile', 2)
    outputs = _apply(free, _params(kernel=[[3.0, 0.0], [1.0, 1.0]]), hidden)
    reward, whole, quantiles = _read(free, outputs)
    np.testing.assert_array_equal(quantiles, [[1.0, -2.0], [5.5, 4.0]])
    np.testing.assert_array_equal(whole.mean, [-0.5, 4.75])
    np.testing.assert_array_equal(reward.taus, [[0.25, 0.75]] * 2)


def test_scalar_reward_is_exact():
    point = jnp.array([0.1, -7.3])
    np.testing.assert_array_equal(HeadConfig('scalar').read(point[:, None]).distribution.mean,
                                  point)


def test_gaussian_by_hand():
    # Mean 3; scale .001 + softplus(0) = .001 + ln 2. Far below, softplus is 0 and the floor stays.
    config = HeadConfig('gaussian', 3)
    _, reward, quantiles = _read(config, [[3.0, 0.0], [-1.0, -200.0], [0.0, 50.0]])
    assert isinstance(reward, Gaussians)
    np.testing.assert_allclose(reward.mean, [3.0, -1.0, 0.0])
    np.testing.assert_allclose(reward.std, [0.001 + math.log(2.0), 0.001, 50.001], rtol=1e-6)
    np.testing.assert_array_equal(reward.weights, np.ones((3, 1)))
    # Quantiles at 1/6, 1/2 and 5/6: Phi^-1(5/6) = .967421566.
    scale = 0.967421566 * (0.001 + math.log(2.0))
    np.testing.assert_allclose(quantiles[0], [3.0 - scale, 3.0, 3.0 + scale], rtol=1e-5)
    # The slope of the scale is that of softplus, sigma(0) = 1/2.
    slope = jax.jit(jax.grad(lambda x: config.read(x).distribution.std))(jnp.array([3.0, 0.0]))
    np.testing.assert_allclose(slope, [0.0, 0.5], atol=1e-6)


def test_categorical_by_hand():
    # Atoms -1, -.5, 0, .5, 1 with weights (1, 2, 4, 2, 1) / 10 from their logarithms.
    config = HeadConfig('categorical', 10, 5, 1.0)
    weights = np.array([1.0, 2.0, 4.0, 2.0, 1.0])
    outputs = np.log(weights) + 3.0  # a constant changes nothing
    _, reward, quantiles = _read(config, outputs)
    assert isinstance(reward, Atoms)
    np.testing.assert_allclose(reward.values, [-1.0, -0.5, 0.0, 0.5, 1.0])
    np.testing.assert_allclose(reward.weights, weights / 10, rtol=1e-6)
    # Variance 2 (1 / 10 + .25 * 2 / 10) = .3.
    assert float(reward.mean) == pytest.approx(0.0, abs=1e-7)
    assert float(reward.std) == pytest.approx(math.sqrt(0.3), rel=1e-6)
    # cdf .1, .3, .7, .9, 1 at the midpoints of ten.
    np.testing.assert_allclose(quantiles, [-1, -0.5, -0.5, 0, 0, 0, 0, 0.5, 0.5, 1])


def test_the_default_support_has_21_atoms_from_minus_5_to_5():
    values = HeadConfig('categorical').read(jnp.zeros(21)).distribution.values
    np.testing.assert_allclose(values, np.arange(-10, 11) / 2, atol=1e-6)


def test_annotator_by_hand():
    # Common reward 1 * 2 + 2 * (-1) = 0, factor 1 * 1 + 2 * 1 = 3; annotators at 0, 1 and -2.
    config = HeadConfig('annotator', 3, annotators=('a', 'b', 'c'))
    params = _params(kernel=[[2.0, 1.0], [-1.0, 1.0]], annotators=[[0.0], [1.0], [-2.0]])
    outputs = _apply(config, params, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(outputs, [0.0, 3.0, -6.0])
    _, reward, quantiles = _read(config, outputs)
    # In the order of the annotators, each of weight 1/3; quantiles are in order.
    np.testing.assert_array_equal(reward.values, [0.0, 3.0, -6.0])
    assert float(reward.mean) == pytest.approx(-1.0)
    np.testing.assert_array_equal(quantiles, [-6.0, 0.0, 3.0])


def test_annotators_differ_in_so_many_factors():
    config = HeadConfig('annotator', annotators=tuple('abcd'), num_factors=2)
    rng = np.random.default_rng(1)
    kernel, own, hidden = rng.normal(size=(3, 3)), rng.normal(size=(4, 2)), rng.normal(size=(6, 3))
    outputs = _apply(config, _params(kernel=kernel, annotators=own),
                          jnp.asarray(hidden, jnp.float32))
    expected = (hidden @ kernel)[:, :1] + (hidden @ kernel)[:, 1:] @ own.T
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def _implicit(params, hidden, levels):
    """IQN, eq. 4 with n = 64 cosines i = 0 ... n - 1, and a linear map, in float64: [N, A]."""
    values = []
    for tau in np.asarray(levels, np.float64):
        phi = np.zeros(hidden.shape[-1])
        for i in range(len(params['cosines'])):
            phi += math.cos(math.pi * i * tau) * np.asarray(params['cosines'][i], np.float64)
        phi = np.maximum(phi + np.asarray(params['bias'], np.float64), 0.0)
        values.append((hidden * phi) @ np.asarray(params['kernel'], np.float64))
    return np.array(values)


def test_implicit_quantiles_by_hand():
    config = HeadConfig('implicit_quantile', 4, num_cosines=6, attributes=('a', 'b'))
    params = _random_params(config, D, np.random.default_rng(1))
    hidden = _hidden(2, 3, D)
    levels = np.random.default_rng(2).uniform(size=(2, 3, 4)).astype(np.float32)
    outputs = _apply(config, params, jnp.asarray(hidden), prompt=jnp.asarray(hidden),
                          levels=jnp.asarray(levels))
    reward, _, _ = _read(config, outputs, jnp.asarray(levels))
    np.testing.assert_array_equal(reward.taus, levels)
    values = reward.parts.values  # [2, 3, E = 1, A, N]
    for c in range(2):
        for k in range(3):
            expected = _implicit(params, hidden[c, k].astype(np.float64), levels[c, k])
            np.testing.assert_allclose(values[c, k, 0], expected.T, atol=2e-5)
    # Without levels, the midpoints.
    outputs = _apply(config, params, jnp.asarray(hidden), prompt=jnp.asarray(hidden))
    expected = _implicit(params, hidden[1, 2].astype(np.float64), (0.125, 0.375, 0.625, 0.875))
    reward, _, _ = _read(config, outputs)
    np.testing.assert_allclose(reward.parts.values[1, 2, 0], expected.T, atol=2e-5)
    np.testing.assert_array_equal(reward.taus, np.broadcast_to(taus(4), (2, 3, 4)))


def test_one_cosine_does_not_depend_on_the_level():
    # cos(0) = 1: the values at all levels are hidden * relu(w + b) @ kernel, here 2 * 3 * 5.
    config = HeadConfig('implicit_quantile', 2, num_cosines=1)
    params = _params(cosines=[[1.0, -1.0]], bias=[2.0, 0.5], kernel=[[5.0], [100.0]])
    outputs = _apply(config, params, jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(outputs, [30.0, 30.0])


# Levels of the implicit head while it learns.


def test_random_levels_are_stratified_and_uniform():
    levels = np.asarray(heads.random_levels(jax.random.key(0), (1000, 4), 5))
    assert levels.shape == (1000, 4, 5)
    np.testing.assert_array_equal(np.floor(5 * levels), np.broadcast_to(np.arange(5), levels.shape))
    # Within its fifth each is uniform: 4000 of them have mean 1/2 +- 4 * .289 / 63 and, by
    # Dvoretzky-Kiefer-Wolfowitz, a cdf within .04 but for a chance of 2 exp(-12.8).
    within = 5 * levels - np.arange(5)
    assert np.abs(within.mean(axis=(0, 1)) - 0.5).max() < 0.018
    grid = (np.arange(4000) + 0.5) / 4000
    assert np.abs(np.sort(within.reshape(-1, 5), axis=0) - grid[:, None]).max() < 0.04
    # Each response has its own, and another key others.
    assert np.ptp(within[:, :, 2]) > 0.99
    assert not np.array_equal(levels, heads.random_levels(jax.random.key(1), (1000, 4), 5))
    np.testing.assert_array_equal(levels, heads.random_levels(jax.random.key(0), (1000, 4), 5))


# Monotone quantiles.


def test_monotone_quantiles_by_hand():
    # softplus(0) = ln 2 and softplus(ln(e^3 - 1)) = 3, over N = 3: steps a = ln 2 / 3 and 1. The
    # quantiles rise as 0, a, a + 1 with mean (2 a + 1) / 3, which is shifted to the mean 5.
    a = math.log(2.0) / 3.0
    shift = 5.0 - (2.0 * a + 1.0) / 3.0
    outputs = jnp.array([5.0, 0.0, math.log(math.exp(3.0) - 1.0)])
    np.testing.assert_allclose(
        monotone_quantiles(outputs), [shift, shift + a, shift + a + 1.0], rtol=1e-6)
    # The head reads its outputs in this way.
    config = HeadConfig('monotone_quantile', 3)
    outputs = _apply(config, {'kernel': outputs[None]}, jnp.ones(1))
    np.testing.assert_allclose(
        config.quantiles(outputs), [shift, shift + a, shift + a + 1.0], rtol=1e-6)


def test_monotone_with_one_quantile_is_the_output():
    np.testing.assert_array_equal(monotone_quantiles(jnp.array([[2.5], [-1.0]])), [[2.5], [-1.0]])


@pytest.mark.parametrize('n', [2, 10, 33, 200])
def test_monotone_quantiles_never_cross(n):
    rng = np.random.default_rng(n)
    for scale in (0.1, 1.0, 30.0, 300.0):
        outputs = (scale * rng.standard_normal((500, n))).astype(np.float32)
        quantiles = np.asarray(jax.jit(monotone_quantiles)(outputs), np.float64)
        assert np.all(np.diff(quantiles, axis=-1) >= 0.0)
        # The mean is output 0 up to the rounding of the sums.
        largest = np.abs(quantiles).max(axis=-1)
        assert np.all(np.abs(quantiles.mean(axis=-1) - outputs[:, 0]) <= 4e-7 * (1.0 + largest))


def test_monotone_mean_is_output_0_exactly():
    with jax.enable_x64(True):
        outputs = jnp.asarray(np.random.default_rng(0).normal(0.0, 3.0, (100, 10)))
        means = HeadConfig('monotone_quantile').read(outputs).distribution.mean
        np.testing.assert_allclose(means, outputs[:, 0], rtol=0, atol=1e-14)


def test_monotone_gradient_by_hand():
    # The first quantile of N = 2 is o_0 - s / 2 with s = softplus(o_1) / 2, whose slope is
    # sigma(o_1) / 2; at o_1 = 0 the gradient is (1, -1/8), of the second quantile (1, 1/8).
    jacobian = jax.jit(jax.jacobian(monotone_quantiles))(jnp.array([3.0, 0.0]))
    np.testing.assert_allclose(jacobian, [[1.0, -0.125], [1.0, 0.125]], rtol=1e-6)


# Members.


@pytest.mark.parametrize('name', ['gaussian', 'implicit_quantile', 'annotator'])
def test_members_are_heads_applied_one_by_one(name):
    one = _config(name, attributes=() if name == 'annotator' else ('a', 'b'))
    config = dataclasses.replace(one, members=3)
    rng = np.random.default_rng(3)
    params = _random_params(config, D, rng)
    hidden, prompt = (jnp.asarray(_hidden(4, 2, D, seed=s)) for s in (0, 1))
    levels = jnp.asarray(rng.uniform(size=(4, 2, 7)), jnp.float32)
    given = {'prompt': prompt, 'levels': levels}
    found = _apply(config, params, hidden, **given)
    apart = [_apply(one, jax.tree.map(lambda x, e=e: x[e], params), hidden, **given)
             for e in range(3)]
    np.testing.assert_allclose(found, np.concatenate(apart, axis=-1), atol=1e-5)
    # The whole is their equal mixture: means add up, and variances by the law of total variance.
    mean, std, members = _moments(config, found, levels)
    means, stds, alone = (np.stack(x) for x in zip(
        *(_moments(one, outputs, levels) for outputs in apart), strict=True))
    np.testing.assert_allclose(members, np.moveaxis(alone[..., 0], 0, -1), atol=1e-5)
    np.testing.assert_allclose(mean, means.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(std, np.sqrt((stds**2).mean(axis=0) + means.var(axis=0)), rtol=1e-4)


def test_members_start_apart():
    params = _init(HeadConfig('implicit_quantile', members=2), jax.random.key(0), 32)
    for key, leaf in params.items():
        if key != 'bias':  # starts with zeros
            assert np.abs(leaf[0] - leaf[1]).min() > 0, key


def test_several_scalars_by_hand():
    # Rewards 2 and 5: mean 3.5, std 1.5; half of the levels lie in each.
    config = HeadConfig('scalar', 4, members=2)
    reward, whole, quantiles = _read(config, [5.0, 2.0])
    assert float(whole.mean) == pytest.approx(3.5)
    assert float(whole.std) == pytest.approx(1.5)
    np.testing.assert_array_equal(quantiles, [2.0, 2.0, 5.0, 5.0])
    # The one atom of each member stands at its median.
    np.testing.assert_array_equal(reward.taus, [0.5])
    assert reward.parts.values.shape == (2, 1, 1)


def test_pooled_quantiles_by_hand():
    # Quantiles 0, 4 and 1, 1 pooled: 0, 1, 1, 4 at levels of a quarter each, so at 1/4 and 3/4 of
    # the whole they are 0 and 1.
    config = HeadConfig('quantile', 2, members=2)
    np.testing.assert_array_equal(_read(config, [0.0, 4.0, 1.0, 1.0])[2], [0.0, 1.0])


# Attributes and gates.


def test_attributes_add_up_comonotonely_by_hand():
    # Attributes with quantiles (0, 2) and (10, 14); gate logits ln 3 and 0 are weights 3/4, 1/4.
    config = HeadConfig('quantile', 2, attributes=('a', 'b'))
    outputs = jnp.array([0.0, 2.0, 10.0, 14.0, math.log(3.0), 0.0])
    reward, whole, quantiles = _read(config, outputs)
    np.testing.assert_allclose(reward.gates, [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_array_equal(reward.parts.values, [[[0.0, 2.0], [10.0, 14.0]]])
    # 3/4 * 0 + 1/4 * 10 and 3/4 * 2 + 1/4 * 14: each level of the sum is the sum at that level.
    np.testing.assert_allclose(quantiles, [2.5, 5.0], rtol=1e-6)
    assert float(whole.mean) == pytest.approx(3.75)
    # Standard deviations add up too: 3/4 * 1 + 1/4 * 2.
    assert float(whole.std) == pytest.approx(1.25, rel=1e-6)


def test_gaussian_attributes_add_up_comonotonely_by_hand():
    config = HeadConfig('gaussian', attributes=('a', 'b'))
    _, reward, _ = _read(config, [1.0, 0.0, 5.0, 2.0, 0.0, math.log(3.0)])
    assert float(reward.mean) == pytest.approx(0.25 * 1.0 + 0.75 * 5.0)
    scales = 0.001 + _softplus(0.0), 0.001 + _softplus(2.0)
    assert float(reward.std) == pytest.approx(0.25 * scales[0] + 0.75 * scales[1], rel=1e-6)


def test_one_attribute_has_no_gate():
    config = HeadConfig('quantile', 2, attributes=('overall',))
    assert not config.gated
    assert set(_random_params(config, D, np.random.default_rng(0))) == {'kernel'}
    assert config.outputs == 2
    np.testing.assert_array_equal(_read(config, [1.0, 2.0])[0].gates, [[1.0]])
    # Also where several have no meaning.
    assert HeadConfig('categorical', attributes=('overall',)).outputs == 21


@pytest.mark.parametrize('members', [1, 2])
def test_gates_read_the_prompt_only_and_attributes_the_response_only(members):
    config = HeadConfig('quantile', 3, members=members, attributes=('a', 'b'))
    rng = np.random.default_rng(5)
    params = _random_params(config, D, rng)
    hidden, other = (jnp.asarray(_hidden(D, seed=s)) for s in (0, 1))

    def read(hidden, prompt):
        return _read(config, _apply(config, params, hidden, prompt=prompt))[0]

    base, new_prompt, new_response = read(hidden, hidden), read(hidden, other), read(other, hidden)
    np.testing.assert_array_equal(base.parts.values, new_prompt.parts.values)
    np.testing.assert_array_equal(base.gates, new_response.gates)
    assert np.abs(base.gates - new_prompt.gates).min() > 1e-3
    assert np.abs(base.parts.values - new_response.parts.values).min() > 1e-3
    gates = params['gate'][0] if members > 1 else params['gate']
    logits = np.asarray(other, np.float64) @ np.asarray(gates, np.float64)
    np.testing.assert_allclose(new_prompt.gates[0], np.exp(logits) / np.exp(logits).sum(),
                               rtol=1e-5)


# Biases, layers and levels, as heads of other libraries have them.


LAYERS = {'bias': True, 'hidden_layers': (6, 4), 'reads': ('last', 'mean@2')}


@pytest.mark.parametrize('members', [1, 2])
def test_parameters_of_biases_and_layers(members):
    """Layers come before the kernel; several reads stand side by side, a gate reads one state."""
    config = HeadConfig('quantile', 7, members=members, attributes=('a', 'b', 'c'),
                        gate_layers=(3,), **LAYERS)

    def shapes_of(hidden, prompt):
        params = heads.init(config, jax.random.key(0), D)
        return params, heads.apply(config, params, hidden, prompt=prompt)

    params, outputs = jax.eval_shape(shapes_of, jnp.ones((2, 2 * D)), jnp.ones((2, D)))
    shapes = {
        'hidden_0': {'kernel': (2 * D, 6), 'bias': (6,)},
        'hidden_1': {'kernel': (6, 4), 'bias': (4,)},
        'kernel': (4, 21), 'bias': (21,),
        'gate_0': {'kernel': (D, 3), 'bias': (3,)}, 'gate': (3, 3), 'gate_bias': (3,),
    }
    stack = () if members == 1 else (members,)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
        lambda shape: (*stack, *shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    assert {x.dtype for x in (*jax.tree.leaves(params), outputs)} == {jnp.dtype('float32')}
    assert outputs.shape == (2, config.outputs) == (2, members * (21 + 3))


@pytest.mark.parametrize('members', [1, 2])
@pytest.mark.parametrize('name', ['scalar', 'gaussian', 'quantile', 'monotone_quantile'])
def test_biases_and_layers_are_split_over_devices(name, members):
    config = HeadConfig(name, members=members, attributes=('a', 'b'), gate_layers=(8, 8),
                        bias=True, hidden_layers=(16,))
    shapes = jax.eval_shape(lambda: {'head': heads.init(config, jax.random.key(0), 16)})
    kernel, bias = (jax.sharding.PartitionSpec(*axes) for axes in (
        (*[None] * (members > 1), 'fsdp', None), ()))
    layer = {'kernel': kernel, 'bias': bias}
    assert sharding.specs(shapes, 8)['head'] == {
        'hidden_0': layer, 'kernel': kernel, 'bias': bias,
        'gate_0': layer, 'gate_1': layer, 'gate': kernel, 'gate_bias': bias}


@pytest.mark.parametrize('name', ['scalar', 'gaussian', 'categorical', 'quantile',
                                  'monotone_quantile'])
def test_a_bias_is_added_and_starts_with_zeros(name):
    config = _config(name, bias=True)
    params = _init(config, jax.random.key(0), D)
    np.testing.assert_array_equal(params['bias'], np.zeros(config.outputs))
    bias = np.arange(1.0, 1 + config.outputs, dtype=np.float32)
    hidden = jnp.asarray(_hidden(3, D))
    plain = _apply(_config(name), {'kernel': params['kernel']}, hidden)
    np.testing.assert_allclose(_apply(config, params | {'bias': jnp.asarray(bias)}, hidden),
                               plain + bias, rtol=1e-6)


def test_hidden_layers_by_hand():
    # relu([1, -2] @ [[1, 0], [0, 1]] + [.5, 1]) = [1.5, 0]; times [[2, 1], [3, 5]] and plus the
    # bias [0, 10], which ReLU does not see.
    config = HeadConfig('quantile', 2, hidden_layers=(2,), bias=True)
    params = {'hidden_0': _params(kernel=[[1.0, 0.0], [0.0, 1.0]], bias=[0.5, 1.0]),
              **_params(kernel=[[2.0, -1.0], [3.0, 5.0]], bias=[0.0, -10.0])}
    outputs = _apply(config, params, jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(_read(config, outputs)[2], [3.0, -11.5])
    # A second layer stands behind the first: relu(1.5 * -2 + 7) = 4.
    config = HeadConfig('scalar', hidden_layers=(2, 1))
    params |= {'hidden_1': _params(kernel=[[-2.0], [9.0]], bias=[7.0]), **_params(kernel=[[0.25]])}
    del params['bias']
    outputs = _apply(config, params, jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(outputs, [1.0])


def test_gate_layers_by_hand():
    # The gate sees relu([1, -2] @ I + [1, 1]) = [2, 0], so its logits are [2 ln 3, 0] + [0, ln 3]:
    # weights 3/4 and 1/4 of the attributes 8 and 4, which only the response says.
    config = HeadConfig('scalar', attributes=('a', 'b'), gate_layers=(2,))
    params = {'gate_0': _params(kernel=[[1.0, 0.0], [0.0, 1.0]], bias=[1.0, 1.0]),
              **_params(kernel=[[2.0, 1.0]], gate=[[math.log(3.0), 0.0], [5.0, 7.0]],
                        gate_bias=[0.0, math.log(3.0)])}
    outputs = _apply(config, params, jnp.array([4.0]), prompt=jnp.array([1.0, -2.0]))
    reward, whole, _ = _read(config, outputs)
    np.testing.assert_allclose(reward.gates, [[0.75, 0.25]], rtol=1e-6)
    assert float(whole.mean) == pytest.approx(0.75 * 8 + 0.25 * 4)


def test_gates_with_layers_start_with_equal_weights_whatever_the_prompt():
    config = HeadConfig('scalar', attributes=('a', 'b', 'c'), gate_layers=(4, 4))
    prompt = jnp.asarray(_hidden(4, D))
    outputs = _apply(config, _init(config, jax.random.key(0), D), prompt, prompt=prompt)
    np.testing.assert_allclose(_read(config, outputs)[0].gates, np.full((4, 1, 3), 1 / 3),
                               rtol=1e-6)


@pytest.mark.parametrize('name', ['quantile', 'gaussian'])
def test_members_with_layers_are_heads_applied_one_by_one(name):
    one = _config(name, attributes=('a', 'b'), bias=True, hidden_layers=(6,), gate_layers=(3,))
    config = dataclasses.replace(one, members=2)
    params = _random_params(config, D, np.random.default_rng(3))
    hidden, prompt = (jnp.asarray(_hidden(4, D, seed=s)) for s in (0, 1))
    apart = [_apply(one, jax.tree.map(lambda x, e=e: x[e], params), hidden, prompt=prompt)
             for e in range(2)]
    np.testing.assert_allclose(_apply(config, params, hidden, prompt=prompt),
                               np.concatenate(apart, axis=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['implicit_quantile', 'annotator'])
def test_every_head_may_have_layers_before_it(name):
    config = _config(name, hidden_layers=(4,))
    params = _random_params(config, D, np.random.default_rng(0))
    hidden = jnp.asarray(_hidden(3, D))
    inner = jnp.maximum(hidden @ params['hidden_0']['kernel'] + params['hidden_0']['bias'], 0)
    rest = {key: leaf for key, leaf in params.items() if key != 'hidden_0'}
    np.testing.assert_allclose(_apply(config, params, hidden), _apply(_config(name), rest, inner),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['quantile', 'monotone_quantile'])
def test_levels_are_where_the_quantiles_stand(name):
    levels = (0.25, 0.5, 0.75)
    config, plain = HeadConfig(name, 3, levels=levels), HeadConfig(name, 3)
    assert config.taus.dtype == np.float32
    np.testing.assert_array_equal(config.taus, np.float32(levels))
    outputs = np.array([[3.0, 1.0, -2.0], [0.0, 5.0, 7.0]])
    found, expected = _read(config, outputs), _read(plain, outputs)
    np.testing.assert_array_equal(found[0].taus, np.broadcast_to(np.float32(levels), (2, 3)))
    # What the outputs are does not depend on them, nor does the mean, which is the reward.
    np.testing.assert_array_equal(found[2], expected[2])
    np.testing.assert_array_equal(found[1].mean, expected[1].mean)
    np.testing.assert_array_equal(expected[0].taus, np.broadcast_to(taus(3), (2, 3)))


@pytest.mark.parametrize(('text', 'place', 'block'), [
    ('last', 'last', None), ('first', 'first', None), ('mean', 'mean', None),
    ('dialogue', 'dialogue', None), ('mean@20', 'mean', 20), ('last@1', 'last', 1),
])
def test_reads_are_parsed(text, place, block):
    assert heads.parse_read(text) == heads.Read(place, block) == (place, block)


@pytest.mark.parametrize(('config', 'expected'), [
    (HeadConfig('scalar'), False), (HeadConfig('scalar', reads=('dialogue', 'first')), False),
    (HeadConfig('scalar', reads=('last', 'mean')), True),
    (HeadConfig('scalar', reads=('mean@2',)), True),
    (HeadConfig('scalar', attributes=('a', 'b')), True),
    (HeadConfig('scalar', attributes=('a',)), False),
])
def test_who_must_know_where_a_response_starts(config, expected):
    assert config.sizes_prompts is expected


# Numerics.


@pytest.mark.parametrize('width', [16, 256])
def test_initial_outputs_have_unit_scale(width):
    # A norm leaves states of mean 0 and variance 1, so the outputs have variance D / (D + 1).
    # 4000 outputs of one random kernel each: standard error 1 / sqrt(8000) = .011.
    hidden = _hidden(width, seed=width)
    hidden = (hidden - hidden.mean()) / hidden.std()
    config = HeadConfig('quantile', 4000)
    outputs = _apply(config, _init(config, jax.random.key(0), width),
                          jnp.asarray(hidden))
    assert np.std(outputs) == pytest.approx(math.sqrt(width / (width + 1)), abs=0.045)
    assert np.mean(outputs) == pytest.approx(0.0, abs=0.065)


@pytest.mark.parametrize('name', ['implicit_quantile', 'categorical', 'annotator'])
def test_initial_rewards_differ_between_responses(name):
    """Rewards of other heads start with a scale of the same order, neither 0 nor large."""
    config = _config(name, members=64)
    outputs = _apply(config, _init(config, jax.random.key(0), 64), jnp.asarray(_hidden(32, 64)))
    members = _moments(config, outputs)[2]
    assert 0.4 < np.std(members, axis=0).mean() < 2.0


@pytest.mark.parametrize('name', ['quantile', 'implicit_quantile', 'annotator'])
def test_bfloat16_states_are_read_in_float32(name):
    config = _config(name)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((20, 32)), jnp.bfloat16)
    params = _random_params(config, 32, rng)
    outputs = _apply(config, params, hidden)
    assert outputs.dtype == jnp.float32
    # The states are rounded, what is computed from them is not.
    rounded = jnp.asarray(np.asarray(hidden, np.float32))
    np.testing.assert_array_equal(outputs, _apply(config, params, rounded))
    if 'annotators' not in params and 'cosines' not in params:
        expected = np.asarray(hidden, np.float64) @ np.asarray(params['kernel'], np.float64)
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ['gaussian', 'categorical', 'quantile', 'monotone_quantile'])
def test_rewards_and_gradients_of_large_outputs_are_finite(name):
    config = _config(name)
    outputs = jnp.asarray(1e4 * _hidden(6, config.outputs))

    def total(outputs):
        reward = config.read(outputs).distribution
        return jnp.sum(reward.mean + reward.std)

    value, gradient = jax.jit(jax.value_and_grad(total))(outputs)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


# Configuration.


@pytest.mark.parametrize(('changes', 'message'), [
    ({'name': 'linear'}, r"head 'linear', expected one of \('scalar'"),
    ({'num_quantiles': 0}, 'num_quantiles=0, expected at least 1'),
    ({'num_quantiles': -3}, 'num_quantiles=-3, expected at least 1'),
    ({'name': 'categorical', 'num_atoms': 1}, 'num_atoms=1, expected at least 2'),
    ({'num_cosines': 0}, 'num_cosines=0, expected at least 1'),
    ({'num_factors': 0}, 'num_factors=0, expected at least 1'),
    ({'members': 0}, 'members=0, expected at least 1'),
    ({'atom_range': 0.0}, 'atom_range=0.0, expected a finite positive'),
    ({'atom_range': -1.0}, 'atom_range=-1.0'),
    ({'atom_range': math.inf}, 'atom_range=inf'),
    ({'atom_range': math.nan}, 'atom_range=nan'),
    ({'name': 'categorical', 'attributes': ('a', 'b')}, '2 attributes with the categorical head'),
    ({'name': 'annotator', 'attributes': ('a', 'b'), 'annotators': ('c', 'd')},
     '2 attributes with the annotator head'),
    ({'attributes': ('a', 'a')}, r"attributes \('a', 'a'\), expected different names"),
    ({'name': 'annotator', 'annotators': ('a', 'a')}, r"annotators \('a', 'a'\), expected"),
    ({'name': 'annotator'}, '0 annotators with the annotator head'),
    ({'annotators': ('a', 'b', 'c')}, '3 annotators with the quantile head'),
    ({'name': 'annotator', 'annotators': ('a',), 'bias': True}, 'a bias with the annotator head'),
    ({'name': 'implicit_quantile', 'bias': True}, 'a bias with the implicit_quantile head, which'),
    ({'hidden_layers': (0,)}, r'hidden_layers \(0,\), expected positive widths'),
    ({'hidden_layers': (4, -1)}, r'hidden_layers \(4, -1\), expected positive widths'),
    ({'attributes': ('a', 'b'), 'gate_layers': (0,)}, r'gate_layers \(0,\), expected positive'),
    ({'gate_layers': (4,)}, 'gate_layers without several attributes'),
    ({'attributes': ('a',), 'gate_layers': (4,)}, 'gate_layers without several attributes'),
    ({'name': 'gaussian', 'levels': (0.5,)}, 'levels with the gaussian head, expected a quantile'),
    ({'name': 'implicit_quantile', 'num_quantiles': 1, 'levels': (0.5,)},
     'levels with the implicit_quantile head'),
    *(({'num_quantiles': 2, 'levels': levels}, 'expected num_quantiles=2 of them, rising between')
      for levels in ((0.5,), (0.2, 0.4, 0.6), (0.6, 0.4), (0.4, 0.4), (0.0, 0.5), (0.5, 1.0),
                     (-0.1, 0.5), (0.5, 1.5), (math.nan, 0.5), (0.5, math.nan))),
    ({'reads': ()}, r'reads \(\), expected at least one'),
    ({'reads': ('last', 'last')}, r"reads \('last', 'last'\), expected different names"),
    *(({'reads': ('last', text)}, f"reads {text!r}, expected one of .*, as 'mean@20'")
      for text in ('', 'lst', 'mean@', 'mean@0', 'mean@-1', 'mean@x', 'mean@2.0', '@2', 2, None)),
])
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**{'name': 'quantile'} | changes)


def test_configs_are_hashable_also_from_json():
    config = HeadConfig('quantile', attributes=['a', 'b'])
    assert config == HeadConfig('quantile', attributes=('a', 'b'))
    assert hash(config) == hash(HeadConfig('quantile', attributes=('a', 'b')))


@pytest.mark.parametrize('config', [
    HeadConfig('scalar'),
    HeadConfig('quantile', 3, members=2, attributes=('a', 'b'), gate_layers=(8, 4),
               levels=(0.25, 0.5, 0.75), **LAYERS),
    # Levels that no decimal is.
    HeadConfig('monotone_quantile', 6, levels=tuple(i / 7 for i in range(1, 7))),
    HeadConfig('annotator', annotators=('a', 'b'), num_factors=2, hidden_layers=(5,)),
])
def test_saved_configs_come_back_equal(config):
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert HeadConfig(**saved) == config
    assert hash(HeadConfig(**saved)) == hash(config)
    # Those of before have none of the later fields.
    early = {key: saved[key] for key in ('name', 'num_quantiles', 'members', 'attributes',
                                         'annotators', 'num_factors')}
    assert HeadConfig(**early).reads == ('last',)
    assert not HeadConfig(**early).bias


def test_outputs_of_another_head_are_refused():
    with pytest.raises(AssertionError):
        HeadConfig('quantile', 3).read(jnp.zeros((2, 4)))


# The scale at the start.


@pytest.mark.parametrize('members', [1, 2])
@pytest.mark.parametrize('name', [name for name in heads.HEADS if name != 'implicit_quantile'])
def test_outputs_start_with_the_spread_that_is_asked_for(name, members):
    gated = name in ('scalar', 'quantile')
    config = HeadConfig(name, members=members, annotators=('a', 'b') * (name == 'annotator'),
                        attributes=('x', 'y') if gated else ())
    # Hidden states that are nearly alike, as at the end of texts.
    hidden = 3.0 + 0.01 * jax.random.normal(jax.random.key(1), (50, 8))
    before = heads.init(config, jax.random.key(0), 8)
    after = heads.standardise(config, before, hidden, 0.5)
    prompts = jnp.zeros((50, 8)) if gated else None
    outputs = _apply(config, after, hidden, prompt=prompts)
    raw = np.asarray(outputs).reshape(50, members, -1)[..., :config._parts * config._numbers]
    np.testing.assert_allclose(np.sqrt(raw.var(axis=0).mean()), 0.5, rtol=1e-3)
    # Around 0, where they were around a number that is large beside their spread.
    assert np.abs(raw.mean(axis=0)).max() < 0.02
    first = np.asarray(_apply(config, before, hidden, prompt=prompts)).reshape(50, members, -1)
    assert np.abs(first.mean(axis=0)).max() > 10 * np.sqrt(first.var(axis=0).mean())
    assert before.keys() == after.keys()


def test_heads_that_are_not_linear_are_scaled():
    hidden = 3.0 + 0.01 * jax.random.normal(jax.random.key(1), (50, 8))
    for config in (HeadConfig('implicit_quantile', 3), HeadConfig('scalar', hidden_layers=(6,))):
        params = heads.standardise(config, heads.init(config, jax.random.key(0), 8), hidden, 2.0)
        outputs = np.asarray(_apply(config, params, hidden))
        np.testing.assert_allclose(np.sqrt(outputs.var(axis=0).mean()), 2.0, rtol=1e-3)


def test_hidden_states_that_do_not_vary_change_no_scale():
    config = HeadConfig('scalar')
    params = heads.init(config, jax.random.key(0), 4)
    found = heads.standardise(config, params, jnp.zeros((5, 4)), 1.0)
    np.testing.assert_array_equal(found['kernel'], params['kernel'])
