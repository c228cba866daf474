"""Tests of objectives: values and gradients by hand, exact expectations over a few actions, and the
same numbers as TRL and Tunix.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.policy import objectives
from tests.helpers import REFERENCE

LOG3 = math.log(3.0)
NAN = float('nan')


# Preferences.


def test_dpo_by_hand():
    # Margins 0, log 3 and -log 3: sigma is 1/2, 3/4 and 1/4.
    chosen, rejected = jnp.array([1.0, LOG3, 0.0]), jnp.array([1.0, -LOG3, 2.0 * LOG3])
    np.testing.assert_allclose(objectives.dpo(chosen, rejected, beta=0.5),
                               [math.log(2), math.log(4 / 3), math.log(4)], atol=1e-6)
    # e = 1/4: 3/4 log 4/3 + 1/4 log 4, the entropy of the labels and so the lowest value.
    smoothed = objectives.dpo(chosen, rejected, beta=0.5, label_smoothing=0.25)
    np.testing.assert_allclose(smoothed[1], 0.75 * math.log(4 / 3) + 0.25 * math.log(4), atol=1e-6)


def test_the_offset_of_dpo_by_hand():
    # A margin of log 3 less an offset of log 3 is none; the wrong way round it is -2 log 3.
    chosen, rejected = jnp.array([LOG3]), jnp.array([-LOG3])
    found = objectives.dpo(chosen, rejected, beta=0.5, offset=LOG3)
    np.testing.assert_allclose(found, [math.log(2)], atol=1e-6)
    found = objectives.dpo(chosen, rejected, beta=0.5, label_smoothing=0.25, offset=LOG3)
    np.testing.assert_allclose(found, [0.75 * math.log(2) + 0.25 * math.log(10)], atol=1e-6)


def test_gradient_of_dpo_by_hand():
    # beta (e - sigma(-m)) of chosen, and the opposite of rejected.
    slopes = jax.grad(lambda c, r: objectives.dpo(c, r, beta=0.5, label_smoothing=0.125), (0, 1))(
        jnp.float32(LOG3), jnp.float32(-LOG3))
    np.testing.assert_allclose(slopes, [0.5 * (0.125 - 0.25), -0.5 * (0.125 - 0.25)], atol=1e-6)
    # Far out it is flat, not nan.
    far = jax.grad(lambda c: objectives.dpo(c, jnp.float32(0.0), beta=1.0))(jnp.float32(1e4))
    assert float(far) == 0.0
    assert float(jax.grad(lambda c: objectives.dpo(c, jnp.float32(0.0), beta=1.0))(
        jnp.float32(-1e4))) == pytest.approx(-1.0)


def test_ipo_by_hand():
    # 1 / (2 beta) = 2: (3 - 2)^2 with slope 2, and (2 - 2)^2.
    chosen = jnp.array([4.0, 1.0])
    rejected = jnp.array([1.0, -1.0])
    np.testing.assert_allclose(objectives.ipo(chosen, rejected, beta=0.25), [1.0, 0.0], atol=1e-6)
    slopes = jax.grad(lambda c: objectives.ipo(c, rejected, beta=0.25).sum())(chosen)
    np.testing.assert_allclose(slopes, [2.0, 0.0], atol=1e-6)


def test_log_ratios_are_sums_and_empty_places_reach_no_gradient():
    log_probs = jnp.array([[-1.0, -2.0, NAN], [-3.0, -np.inf, -np.inf], [NAN, NAN, NAN]])
    reference = jnp.array([[-2.0, -2.5, NAN], [-2.0, -np.inf, NAN], [NAN, NAN, NAN]])
    mask = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    np.testing.assert_allclose(objectives.log_ratio(log_probs, reference, mask), [1.5, -1.0, 0.0])
    np.testing.assert_allclose(
        objectives.log_ratio(log_probs, reference, mask, length_normalised=True),
        [0.75, -1.0, 0.0])
    np.testing.assert_allclose(objectives.implicit_rewards(jnp.array([1.5, -1.0]), 0.2),
                               [0.3, -0.2], atol=1e-7)
    slopes = jax.grad(lambda x: objectives.dpo(
        *objectives.log_ratio(x, reference, mask)[:2], beta=1.0))(log_probs)
    # The margin is 2.5.
    slope = 1.0 / (1.0 + math.exp(2.5))
    np.testing.assert_allclose(slopes, [[-slope, -slope, 0], [slope, 0, 0], [0, 0, 0]], atol=1e-6)


def test_narrow_floats_are_refused():
    narrow = jnp.zeros((2, 3), jnp.bfloat16)
    for function in (lambda: objectives.dpo(narrow, narrow, beta=1.0),
                     lambda: objectives.token_sum(narrow, narrow == 0)):
        with pytest.raises(TypeError, match='bfloat16, expected float32'):
            function()


# Sums of token losses.

RAGGED = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)


@pytest.mark.parametrize(('how', 'length', 'long', 'short'), [
    # Five tokens; two responses of four and one tokens; two responses of eight each.
    ('token', None, 1 / 5, 1 / 5), ('sequence', None, 1 / 8, 1 / 2), ('constant', 8, 1 / 16, 1 / 16)
])
def test_what_a_token_of_long_and_short_responses_weighs(how, length, long, short):
    values = jnp.where(RAGGED, 1.0, NAN)
    weights = jax.grad(lambda x: objectives.aggregate(x, RAGGED, how, length).mean)(values)
    np.testing.assert_allclose(weights, [[long] * 4, [short, 0, 0, 0], [0] * 4], rtol=1e-6)
    # A long response as a whole weighs four times a short one, or as much.
    assert float(weights[0].sum() / weights[1].sum()) == pytest.approx(
        1.0 if how == 'sequence' else 4.0)


@pytest.mark.parametrize('how', objectives.AGGREGATIONS)
def test_sums_of_parts_are_those_of_the_whole(how):
    length = 8 if how == 'constant' else None
    values = jax.random.normal(jax.random.key(0), RAGGED.shape)
    whole = objectives.aggregate(values, RAGGED, how, length)
    parts = [objectives.aggregate(values[i:j], RAGGED[i:j], how, length)
             for i, j in ((0, 1), (1, 3))]
    np.testing.assert_allclose(sum(part.value for part in parts), whole.value, rtol=1e-6)
    assert float(sum(part.weight for part in parts)) == float(whole.weight)
    assert float(objectives.aggregate(values[2:], RAGGED[2:], how, length).mean) == 0.0


@pytest.mark.parametrize(('how', 'length', 'match'), [
    ('mean', None, "'mean', expected one of"), ('token', 8, 'length=8'),
    ('constant', None, 'length=None'), ('constant', 0, 'length=0')])
def test_aggregations_that_are_none(how, length, match):
    with pytest.raises(ValueError, match=match):
        objectives.aggregate(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), how, length)


# KL: exact sums over a small vocabulary, and over all responses of two tokens.

LOGITS = jnp.array([0.3, -1.0, 0.9, 0.0])
UNTRAINED = jax.nn.log_softmax(jnp.array([1.0, 0.2, -0.5, 0.1]))
OLD = jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.6, 0.3]))
ALL = jnp.ones(4, bool)


def mean_kl(estimator, logits, weights=None):
    """Exact mean over draws of what each action's estimate is, and its gradient as a loss."""

    def loss(logits):
        log_probs = jax.nn.log_softmax(logits)
        drawn = log_probs if weights is None else weights
        each = objectives.kl_estimates(log_probs, UNTRAINED, ALL, estimator, weights)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(drawn)) * each)

    return jax.value_and_grad(loss)(logits)


def exact_kl(logits):
    return objectives.categorical_kl(jax.nn.log_softmax(logits), UNTRAINED)


def reversed_kl(logits):
    return objectives.categorical_kl(UNTRAINED, jax.nn.log_softmax(logits))


def test_categorical_kl_and_entropy_by_hand():
    p, q = jnp.log(jnp.array([0.5, 0.5, 0.0])), jnp.log(jnp.array([0.25, 0.5, 0.25]))
    assert float(objectives.categorical_kl(p, q)) == pytest.approx(0.5 * math.log(2.0))
    assert float(objectives.categorical_kl(q, p)) == np.inf
    assert float(objectives.entropy(p)) == pytest.approx(math.log(2.0))
    # A token that cannot come reaches no gradient; the slope of p log p is p (log p + 1).
    for function, slope in ((objectives.entropy, -0.5 * (math.log(0.5) + 1.0)),
                            (lambda x: objectives.categorical_kl(x, q), None)):
        found = jax.grad(function)(p)
        assert np.isfinite(found).all()
        assert float(found[2]) == 0.0
        if slope is not None:
            assert float(found[0]) == pytest.approx(slope)


@pytest.mark.parametrize('estimator', ['k1', 'k3'])
def test_k1_and_k3_have_the_kl_as_mean(estimator):
    assert float(mean_kl(estimator, LOGITS)[0]) == pytest.approx(float(exact_kl(LOGITS)), rel=1e-5)
    # Under another policy's draws only with the correction, which makes the gradient right too.
    value, slope = mean_kl(estimator, LOGITS, OLD)
    assert float(value) == pytest.approx(float(exact_kl(LOGITS)), rel=1e-5)
    np.testing.assert_allclose(slope, jax.grad(exact_kl)(LOGITS), atol=1e-6)


def test_gradients_of_kl_estimates_as_losses():
    right, other = jax.grad(exact_kl)(LOGITS), jax.grad(reversed_kl)(LOGITS)
    assert np.abs(right - other).max() > 0.05
    np.testing.assert_allclose(mean_kl('k1', LOGITS)[1], np.zeros(4), atol=1e-6)
    np.testing.assert_allclose(mean_kl('k2', LOGITS)[1], right, atol=1e-6)
    np.testing.assert_allclose(mean_kl('k3', LOGITS)[1], other, atol=1e-6)


def test_k2_is_right_to_second_order():
    nearby = UNTRAINED + 0.01 * LOGITS
    assert float(mean_kl('k2', nearby)[0]) == pytest.approx(float(exact_kl(nearby)), rel=0.02)
    assert abs(float(mean_kl('k2', LOGITS)[0] / exact_kl(LOGITS)) - 1.0) > 0.1


def test_kl_estimates_by_hand():
    log_probs, reference = jnp.array([-1.0, -2.0, -np.inf]), jnp.array([-2.0, -1.0, NAN])
    mask = jnp.array([True, True, False])
    for estimator, expected in (('k1', [1.0, -1.0, 0.0]), ('k2', [0.5, 0.5, 0.0]),
                                ('k3', [math.exp(-1.0), math.e - 2.0, 0.0])):
        found = objectives.kl_estimates(log_probs, reference, mask, estimator)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        slopes = jax.grad(lambda x, e=estimator: objectives.kl_estimates(
            x, reference, mask, e).sum())(log_probs)
        assert np.isfinite(slopes).all()
        assert float(slopes[2]) == 0.0
    with pytest.raises(ValueError, match="'k4', expected one of"):
        objectives.kl_estimates(log_probs, reference, mask, 'k4')
    with pytest.raises(ValueError, match="'k2' corrected"):
        objectives.kl_estimates(log_probs, reference, mask, 'k2', log_probs)


FIRST, SECOND = jax.random.normal(jax.random.key(1), (3,)), jax.random.normal(
    jax.random.key(2), (3, 3))


def of_responses(logits):
    """Log-probabilities [9, 2] of the tokens of all responses of two tokens out of three."""
    first, second = (jax.nn.log_softmax(x) for x in logits)
    return jnp.stack([jnp.repeat(first, 3), second.ravel()], axis=-1)


def test_estimates_of_tokens_add_up_to_the_kl_of_responses():
    log_probs = of_responses((FIRST, SECOND))
    reference = of_responses((jnp.zeros(3), SECOND.T))
    expected = objectives.categorical_kl(log_probs.sum(-1), reference.sum(-1))
    for estimator in ('k1', 'k3'):
        each = objectives.kl_estimates(log_probs, reference, jnp.ones((9, 2), bool), estimator)
        found = jnp.sum(jnp.exp(log_probs.sum(-1)) * each.sum(-1))
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_penalised_rewards_by_hand():
    mask = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    kl = jnp.array([[0.5, -0.25, 1.0], [2.0, NAN, NAN], [NAN, NAN, NAN]])
    found = objectives.penalised_rewards(jnp.array([3.0, 1.0, 7.0]), kl, mask, beta=0.4)
    np.testing.assert_allclose(found, [[-0.2, 0.1, 2.6], [0.2, 0, 0], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize(('kl', 'factor'), [
    (6.0, 1.0), (6.6, 1.0 + 0.1 * 0.05), (60.0, 1.0 + 0.2 * 0.05), (0.0, 1.0 - 0.2 * 0.05)])
def test_adaptive_beta_by_hand(kl, factor):
    found = objectives.adaptive_beta(0.2, kl, target=6.0, horizon=2000.0, n=100)
    assert float(found) == pytest.approx(0.2 * factor, rel=1e-6)


# PPO.


def surrogate(ratio, advantage, low=0.2, high=0.3):
    """Loss, gradient by the log-probability, and whether it is clipped, of one token."""

    def loss(log_prob):
        found = objectives.clipped_surrogate(
            log_prob[None], jnp.array([-1.0]), jnp.array([advantage]), jnp.array([True]),
            clip_low=low, clip_high=high)
        return found.losses[0], found.clipped[0]

    (value, clipped), slope = jax.value_and_grad(loss, has_aux=True)(
        jnp.float32(-1.0 + math.log(ratio)))
    return float(value), float(slope), bool(clipped)


@pytest.mark.parametrize(('ratio', 'advantage', 'value', 'slope', 'clipped'), [
    (1.0, 2.0, -2.0, -2.0, False), (1.25, 2.0, -2.5, -2.5, False), (1.5, 2.0, -2.6, 0.0, True),
    (0.5, 2.0, -1.0, -1.0, False), (0.5, -2.0, 1.6, 0.0, True), (1.5, -2.0, 3.0, 3.0, False),
    (1.5, 0.0, 0.0, 0.0, False)])
def test_clipped_surrogate_by_hand(ratio, advantage, value, slope, clipped):
    assert surrogate(ratio, advantage) == pytest.approx((value, slope, clipped), abs=1e-5)


def test_bounds_that_are_off_and_none():
    for ratio, advantage in ((5.0, 2.0), (0.01, -2.0)):
        assert surrogate(ratio, advantage, 1.0, math.inf) == pytest.approx(
            (-ratio * advantage, -ratio * advantage, False), rel=1e-5)
    for low, high in ((-0.1, 0.2), (1.1, 0.2), (0.2, -0.1)):
        with pytest.raises(ValueError, match=f'clip_low={low}, clip_high={high}'):
            surrogate(1.0, 1.0, low, high)


def test_ratios_beyond_all_floats_and_empty_places_leave_gradients_finite():
    log_probs = jnp.array([[0.0, 0.0, -np.inf]])
    old = jnp.array([[-200.0, -200.0, NAN]])
    advantages = jnp.array([[1.0, 0.0, NAN]])
    mask = jnp.array([[True, True, False]])
    slopes = jax.grad(lambda x: objectives.clipped_surrogate(
        x, old, advantages, mask, clip_low=0.2, clip_high=0.2).losses.sum())(log_probs)
    np.testing.assert_array_equal(slopes, np.zeros((1, 3)))


def test_without_clip_and_kl_ppo_is_the_policy_gradient():
    """Over all responses of two tokens, with the values of any baseline."""
    scores = jnp.arange(9.0) ** 1.5 / 9.0
    mask = jnp.ones((9, 2), bool)
    values = jnp.stack([jnp.full(9, 0.7), jnp.repeat(jnp.array([0.1, -0.4, 0.9]), 3)], -1)

    def expected_return(logits):
        return jnp.sum(jnp.exp(of_responses(logits).sum(-1)) * scores)

    def loss(logits):
        log_probs = of_responses(logits)
        old = jax.lax.stop_gradient(log_probs)
        rewards = objectives.penalised_rewards(scores, 0.0 * old, mask, beta=0.0)
        found = objectives.gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
        losses = objectives.clipped_surrogate(
            log_probs, old, found.advantages, mask, clip_low=1.0, clip_high=math.inf).losses
        return jnp.sum(jnp.exp(old.sum(-1)) * losses.sum(-1))

    for found, expected in zip(jax.grad(loss)((FIRST, SECOND)),
                               jax.grad(expected_return)((FIRST, SECOND)), strict=True):
        np.testing.assert_allclose(found, -expected, atol=1e-6)


def test_gae_by_hand():
    # From the end, gamma = 1/2 and lambda = 1/2: 3 - 2; 0 + 2/2 - 1 + 1/4; 1 + 1/2 - 4 + 1/16.
    rewards = jnp.array([[1.0, 0.0, 3.0, NAN], [1.0, NAN, NAN, NAN]])
    values = jnp.array([[4.0, 1.0, 2.0, NAN], [0.5, NAN, NAN, NAN]])
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    found = objectives.gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    np.testing.assert_allclose(found.advantages, [[-2.4375, 0.25, 1.0, 0.0], [0.5, 0, 0, 0]])
    np.testing.assert_allclose(found.returns, [[1.5625, 1.25, 3.0, 0.0], [1.0, 0, 0, 0]])
    # A truncated response that would have gone on to 8: 3 + 8/2 - 2, then 1/4 of what it is more.
    longer = objectives.gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5,
                            bootstrap=jnp.array([8.0, 0.0]))
    np.testing.assert_allclose(longer.advantages,
                               [[-2.4375 + 0.25, 0.25 + 1.0, 5.0, 0.0], [0.5, 0, 0, 0]])


def test_gae_skips_what_is_empty_in_between():
    rewards, values = jnp.array([1.0, 9.0, 3.0]), jnp.array([4.0, 9.0, 2.0])
    found = objectives.gae(rewards, values, jnp.array([True, False, True]), gamma=0.9,
                           gae_lambda=0.8)
    alone = objectives.gae(rewards[::2], values[::2], jnp.ones(2, bool), gamma=0.9, gae_lambda=0.8)
    np.testing.assert_allclose(found.advantages, [alone.advantages[0], 0.0, alone.advantages[1]])


def test_ends_of_gae():
    rewards = jax.random.normal(jax.random.key(3), (2, 5))
    values = jax.random.normal(jax.random.key(4), (2, 5))
    mask = jnp.ones((2, 5), bool)
    to_go = jnp.cumsum(rewards[:, ::-1], axis=-1)[:, ::-1]
    found = objectives.gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    np.testing.assert_allclose(found.returns, to_go, atol=1e-5)
    np.testing.assert_allclose(found.advantages, to_go - values, atol=1e-5)
    found = objectives.gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(found.advantages, rewards + 0.9 * following - values, atol=1e-6)


def test_no_gradient_flows_through_advantages():
    slopes = jax.grad(lambda v: objectives.gae(
        jnp.ones((1, 3)), v, jnp.ones((1, 3), bool), gamma=1.0, gae_lambda=1.0
    ).advantages.sum())(jnp.ones((1, 3)))
    np.testing.assert_array_equal(slopes, np.zeros((1, 3)))


def test_value_loss_by_hand():
    # Within; beyond the clip and gaining nothing; beyond it on the side that is worse; empty.
    values, old = jnp.array([1.1, 2.0, 0.0, NAN]), jnp.array([1.0, 1.0, 1.0, NAN])
    returns, mask = jnp.array([2.1, 2.0, 2.0, NAN]), jnp.array([True, True, True, False])

    def loss(values, clip=0.5):
        return objectives.value_loss(values, old, returns, mask, clip=clip)

    found = loss(values)
    np.testing.assert_allclose(found.losses, [0.5, 0.125, 2.0, 0.0], atol=1e-6)
    assert found.clipped.tolist() == [False, True, False, False]
    np.testing.assert_allclose(jax.grad(lambda v: loss(v).losses.sum())(values),
                               [-1.0, 0.0, -2.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(loss(values, math.inf).losses, [0.5, 0.0, 2.0, 0.0], atol=1e-6)
    with pytest.raises(ValueError, match='clip=-1'):
        loss(values, -1.0)


# Scales.


def test_moments_of_parts_are_those_of_the_whole():
    # Far from 0, where sums of squares in float32 would leave a variance of rounding.
    values = 1e4 + np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    mask = np.random.default_rng(1).random((6, 50)) < 0.7
    values = np.where(mask, values, NAN).astype(np.float32)
    expected = np.float64(values[mask])
    whole = objectives.moments(jnp.asarray(values), jnp.asarray(mask))
    parts = [objectives.moments(jnp.asarray(values[i:j]), jnp.asarray(mask[i:j]))
             for i, j in ((0, 1), (1, 1), (1, 4), (4, 6))]
    running = objectives.Moments()
    for part in parts:
        running = objectives.merge(running, part)
    stacked = objectives.merge(jax.tree.map(lambda *x: jnp.stack(x), *parts))
    for found in (whole, objectives.merge(*parts), running, stacked):
        assert float(found.count) == mask.sum()
        assert float(found.mean) == pytest.approx(expected.mean(), rel=1e-6)
        assert float(found.std) == pytest.approx(expected.std(), rel=1e-3)


def test_moments_are_the_same_over_devices():
    values = jnp.arange(8.0).reshape(4, 2) ** 2
    mask = jnp.array([[1, 1], [1, 0], [0, 0], [1, 1]], bool)
    found = jax.vmap(lambda v, m: objectives.merge(
        jax.lax.all_gather(objectives.moments(v, m), 'devices')), axis_name='devices')(values, mask)
    # 0, 1, 4, 36, 49.
    np.testing.assert_allclose(found.mean, np.full(4, 18.0))
    np.testing.assert_allclose(found.std, np.full(4, np.std([0, 1, 4, 36, 49])), rtol=1e-6)


def test_standardised_by_hand():
    values, mask = jnp.array([1.0, 3.0, 8.0, NAN]), jnp.array([True, True, False, False])
    scale = objectives.moments(values, mask)
    np.testing.assert_allclose(objectives.standardise(values, mask, scale), [-1.0, 1.0, 0.0, 0.0])
    scale = objectives.Moments(4.0, 1.0, 16.0)
    np.testing.assert_allclose(objectives.standardise(values, mask, scale), [0.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(objectives.standardise(values, mask, scale, centre=False),
                               [0.5, 1.5, 0.0, 0.0])
    # Nothing is known of a scale, or all numbers are equal but for rounding.
    for scale in (objectives.Moments(), objectives.Moments(1.0, 0.0, 0.0),
                  objectives.Moments(4.0, 1e3, 4e-6)):
        np.testing.assert_allclose(objectives.standardise(values, mask, scale, centre=False),
                                   [1.0, 3.0, 0.0, 0.0])
    for narrow in (jnp.bfloat16, jnp.float16):
        with pytest.raises(TypeError, match='expected float32 or wider'):
            objectives.moments(values.astype(narrow), mask)
        with pytest.raises(TypeError, match='expected float32 or wider'):
            objectives.standardise(values.astype(narrow), mask, scale)


# Groups.


GROUPS = jnp.array([[1.0, 3.0, 5.0, 7.0], [2.0, 6.0, NAN, NAN], [4.0, NAN, NAN, NAN],
                    [0.1, 0.1, 0.1, NAN], [NAN] * 4])
PRESENT = jnp.isfinite(GROUPS)


def test_group_advantages_by_hand():
    plain = [[-3, -1, 1, 3], [-2, 2, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    np.testing.assert_allclose(
        objectives.grpo_advantages(GROUPS, PRESENT, divide_by_std=False), plain, atol=1e-6)
    # Standard deviations sqrt(5) and 2; no deviation in the others, also of one.
    np.testing.assert_allclose(
        objectives.grpo_advantages(GROUPS, PRESENT, divide_by_std=True),
        [np.array([-3, -1, 1, 3]) / math.sqrt(5), [-1, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4],
        atol=1e-6)
    # 1 - 15/3, 3 - 13/3, ...; 2 - 6; a group of one has no others.
    np.testing.assert_allclose(
        objectives.rloo_advantages(GROUPS, PRESENT),
        [[-4, -4 / 3, 4 / 3, 4], [-4, 4, 0, 0], [0] * 4, [0] * 4, [0] * 4], atol=1e-6)


def test_division_by_the_std_has_no_unit_and_multiplies_no_rounding():
    rewards = jnp.array([[0.1, 0.2, 0.4]])
    present = jnp.ones((1, 3), bool)
    expected = objectives.grpo_advantages(rewards, present, divide_by_std=True)
    for unit in (1e-6, 1e6):
        np.testing.assert_allclose(
            objectives.grpo_advantages(unit * rewards, present, divide_by_std=True), expected,
            rtol=1e-5)
    nearly = jnp.float32([[100.0, np.nextafter(np.float32(100.0), np.float32(200.0)), 100.0]])
    np.testing.assert_array_equal(
        objectives.grpo_advantages(nearly, present, divide_by_std=True), np.zeros((1, 3)))


# A bandit whose optimum is known: pi*(a) ~ pi_ref(a) exp(r(a) / beta). Expectations are exact.

SCORES = jnp.array([0.0, 1.0, 0.4, -0.6])
BETA = 0.5
OPTIMUM = jax.nn.log_softmax(UNTRAINED + SCORES / BETA)


def distance(logits, optimum=OPTIMUM):
    """Both KLs between a policy and the optimum, the larger one."""
    log_probs = jax.nn.log_softmax(logits)
    return max(float(objectives.categorical_kl(log_probs, optimum)),
               float(objectives.categorical_kl(optimum, log_probs)))


def descend(loss, steps=400, rate=0.5, decay=False):
    """Logits after descent from the reference, on a loss of logits and old log-probabilities."""

    @jax.jit
    def run():
        def step(i, logits):
            size = rate * (1.0 - i / steps) if decay else rate
            return logits - size * jax.grad(loss)(logits, jax.nn.log_softmax(logits))

        return jax.lax.fori_loop(0, steps, step, UNTRAINED)

    assert distance(UNTRAINED) > 0.1
    return run()


def test_ppo_reaches_the_optimum():
    """Penalty in the reward, values of the state, several steps on draws of one policy."""
    mask = jnp.ones((4, 1), bool)

    def loss(logits, old):
        kl = objectives.kl_estimates(old[:, None], UNTRAINED[:, None], mask, 'k1')
        rewards = objectives.penalised_rewards(SCORES, kl, mask, beta=BETA)
        value = jnp.sum(jnp.exp(old) * rewards[:, 0])
        found = objectives.gae(rewards, jnp.full((4, 1), value), mask, gamma=1.0, gae_lambda=0.95)
        losses = objectives.clipped_surrogate(
            jax.nn.log_softmax(logits)[:, None], old[:, None], found.advantages, mask,
            clip_low=0.2, clip_high=0.2)
        return jnp.sum(jnp.exp(old) * losses.losses[:, 0])

    @jax.jit
    def rounds():
        def one(_, logits):
            old = jax.nn.log_softmax(logits)
            return jax.lax.fori_loop(
                0, 4, lambda _, x: x - 0.5 * jax.grad(loss)(x, old), logits)

        return jax.lax.fori_loop(0, 150, one, UNTRAINED)

    assert distance(rounds()) < 1e-2


TRIPLES = jnp.stack(jnp.meshgrid(*[jnp.arange(4)] * 3, indexing='ij'), -1).reshape(-1, 3)


def group_loss(advantages, in_reward=0.0, in_loss=0.0, estimator='k2'):
    """Exact expected loss over all 64 groups of three, with a KL penalty in one of two places."""
    mask = jnp.ones((64, 3, 1), bool)

    def loss(logits, old):
        old = jax.lax.stop_gradient(old)
        log_probs, was, reference = (x[TRIPLES][..., None] for x in (
            jax.nn.log_softmax(logits), old, UNTRAINED))
        rewards = objectives.penalised_rewards(
            SCORES[TRIPLES], objectives.kl_estimates(was, reference, mask, 'k1'), mask,
            beta=in_reward).sum(-1)
        gain = advantages(rewards, jnp.ones((64, 3), bool))[..., None]
        losses = objectives.clipped_surrogate(
            log_probs, was, gain, mask, clip_low=0.2, clip_high=0.2).losses
        losses += in_loss * objectives.kl_estimates(log_probs, reference, mask, estimator)
        return jnp.sum(jnp.exp(old[TRIPLES].sum(-1)) * losses.mean((-2, -1)))

    return loss


def plain(rewards, present):
    return objectives.grpo_advantages(rewards, present, divide_by_std=False)


def divided(rewards, present):
    return objectives.grpo_advantages(rewards, present, divide_by_std=True)


@pytest.mark.parametrize(('advantages', 'kl'), [
    (objectives.rloo_advantages, {'in_loss': BETA}),
    (objectives.rloo_advantages, {'in_reward': BETA}),
    # A group's mean knows its own reward: 2/3 of the gradient, and of the penalty that fits it.
    (plain, {'in_loss': BETA * 2 / 3}),
    (plain, {'in_reward': BETA}),
])
def test_groups_reach_the_optimum(advantages, kl):
    assert distance(descend(group_loss(advantages, **kl))) < 1e-2


def test_grpo_divided_by_the_std_reaches_the_optimum_with_the_penalty_in_the_reward():
    # All rewards are equal there; steps do not shrink by themselves, as advantages have no unit.
    found = descend(group_loss(divided, in_reward=BETA), steps=1000, rate=0.1, decay=True)
    assert distance(found) < 1e-2


def test_k3_in_the_loss_has_another_optimum():
    """The highest E r - beta KL(pi_ref, pi): pi(a) = beta pi_ref(a) / (c - r(a))."""
    found = descend(group_loss(objectives.rloo_advantages, in_loss=BETA, estimator='k3'), 3000)
    low, high = float(SCORES.max()), float(SCORES.max()) + BETA
    for _ in range(60):
        middle = 0.5 * (low + high)
        total = float(jnp.sum(BETA * jnp.exp(UNTRAINED) / (middle - SCORES)))
        low, high = (middle, high) if total > 1.0 else (low, middle)
    other = jnp.log(BETA) + UNTRAINED - jnp.log(high - SCORES)
    assert distance(found, other) < 1e-3
    assert distance(found) > 1e-2


def test_dpo_reaches_the_optimum():
    """Pairs of the reference, preferred by Bradley-Terry on the same rewards."""

    def loss(logits, _):
        ratios = jax.nn.log_softmax(logits) - UNTRAINED
        wins = jax.nn.sigmoid(SCORES[:, None] - SCORES)
        pairs = jnp.exp(UNTRAINED[:, None] + UNTRAINED)
        chosen, rejected = jnp.broadcast_arrays(ratios[:, None], ratios)
        return jnp.sum(2.0 * pairs * wins * objectives.dpo(chosen, rejected, beta=BETA))

    assert distance(descend(loss, 600, 2.0)) < 1e-2


def test_ipo_reaches_its_optimum():
    """pi ~ pi_ref exp(p(a beats a draw of the reference) / beta) (Azar et al. 2023, eq. 9)."""
    wins = jax.nn.sigmoid(3.0 * (SCORES[:, None] - SCORES))

    def loss(logits, _):
        ratios = jax.nn.log_softmax(logits) - UNTRAINED
        pairs = jnp.exp(UNTRAINED[:, None] + UNTRAINED)
        chosen, rejected = jnp.broadcast_arrays(ratios[:, None], ratios)
        return jnp.sum(pairs * wins * objectives.ipo(chosen, rejected, beta=BETA))

    optimum = jax.nn.log_softmax(UNTRAINED + wins @ jnp.exp(UNTRAINED) / BETA)
    assert float(objectives.categorical_kl(optimum, UNTRAINED)) > 0.05
    assert distance(descend(loss, 1000, 0.5), optimum) < 1e-3


# The same numbers in TRL and Tunix (tests/reference/make_objectives.py).

FOUND = json.loads((REFERENCE / 'objectives.json').read_text(encoding='utf-8'))
GIVEN = {name: jnp.asarray(value) for name, value in FOUND['inputs'].items()}
MASK = GIVEN['mask']
SET = FOUND['constants']


def assert_loss(loss, expected, name='log_probs'):
    """The value, and the gradient by what stands in the place of a model's outputs."""
    value, slope = jax.value_and_grad(loss)(GIVEN[name])
    assert float(value) == pytest.approx(expected['loss'], abs=2e-6)
    np.testing.assert_allclose(slope, expected['gradient'], atol=2e-6)


def token_losses(log_probs, advantages=None, beta=0.0, estimator='k3', high=SET['high'], **kwargs):
    if advantages is None:
        advantages = GIVEN['advantages'][:, None]
    losses = objectives.clipped_surrogate(
        log_probs, GIVEN['old_log_probs'], advantages, MASK, clip_low=SET['low'], clip_high=high)
    return losses.losses + beta * objectives.kl_estimates(
        log_probs, GIVEN['reference_log_probs'], MASK, estimator, **kwargs)


def clip_fraction(advantages, high=SET['high']):
    found = objectives.clipped_surrogate(
        GIVEN['log_probs'], GIVEN['old_log_probs'], advantages, MASK, clip_low=SET['low'],
        clip_high=high)
    return float(objectives.aggregate(found.clipped.astype(jnp.float32), MASK, 'token').mean)


@pytest.mark.parametrize(('how', 'trl', 'tunix'), [
    ('token', ('bnpo', 'dapo'), 'token-mean'), ('sequence', ('grpo',), 'sequence-mean-token-mean'),
    ('constant', ('dr_grpo',), 'sequence-mean-token-scale')])
def test_grpo_is_that_of_trl_and_tunix(how, trl, tunix):
    length = SET['length'] if how == 'constant' else None

    def loss(x):
        return objectives.aggregate(token_losses(x, beta=SET['beta']), MASK, how, length).mean

    for expected in (*(FOUND['trl']['grpo'][name] for name in trl), FOUND['tunix']['grpo'][tunix]):
        assert_loss(loss, expected)
        assert clip_fraction(GIVEN['advantages'][:, None]) == pytest.approx(expected['clipped'])


@pytest.mark.parametrize(('estimator', 'tunix'), [
    ('k1', 'kl'), ('k2', 'mse_kl'), ('k3', 'low_var_kl')])
def test_kl_estimates_are_those_of_tunix(estimator, tunix):
    assert_loss(lambda x: objectives.aggregate(
        token_losses(x, beta=SET['beta'], estimator=estimator), MASK, 'token').mean,
        FOUND['tunix']['kl'][tunix])


def test_corrected_kl_and_entropy_bonus_are_those_of_trl():
    assert_loss(lambda x: objectives.aggregate(
        token_losses(x, beta=SET['beta'], old_log_probs=GIVEN['old_log_probs']), MASK, 'token'
    ).mean, FOUND['trl']['grpo_corrected_kl'])
    bonus = 0.1 * objectives.entropy(jax.nn.log_softmax(GIVEN['logits']))
    assert_loss(lambda x: objectives.aggregate(token_losses(x) - bonus, MASK, 'token').mean,
                FOUND['trl']['grpo_entropy'])


def test_ppo_is_that_of_trl_and_tunix():
    entropies = objectives.entropy(jax.nn.log_softmax(GIVEN['logits']))
    mean = objectives.aggregate(entropies, MASK, 'token').mean
    assert float(mean) == pytest.approx(FOUND['trl_ppo']['entropy'], abs=1e-6)
    # That of TRL has one bound for both sides, and no bonus.
    for name, high, weight in (('trl_ppo', SET['low'], 0.0), ('tunix', SET['high'], 0.1)):
        expected = FOUND[name]['policy' if name == 'trl_ppo' else 'ppo']
        advantages = GIVEN['token_advantages']
        assert_loss(lambda x, high=high, weight=weight, advantages=advantages: objectives.aggregate(
            token_losses(x, advantages, high=high) - weight * entropies, MASK, 'token').mean,
            expected)
        assert clip_fraction(advantages, high) == pytest.approx(expected['clipped'])


def test_value_loss_is_that_of_trl_and_tunix():

    def found(values):
        return objectives.value_loss(values, GIVEN['values'], GIVEN['token_rewards'], MASK,
                                     clip=SET['clip'])

    share = objectives.aggregate(
        found(GIVEN['new_values']).clipped.astype(jnp.float32), MASK, 'token').mean
    for name in ('trl_ppo', 'tunix'):
        expected = FOUND[name]['value']
        assert_loss(lambda v: objectives.aggregate(found(v).losses, MASK, 'token').mean, expected,
                    'new_values')
        assert float(share) == pytest.approx(expected['clipped'])


def whitened(values):
    """As others have it, divided by one less than the number."""
    scale = objectives.moments(values, MASK)
    return objectives.standardise(values, MASK, scale) * jnp.sqrt(1.0 - 1.0 / scale.count)


def test_advantages_are_those_of_trl_and_tunix():
    kl = objectives.kl_estimates(GIVEN['old_log_probs'], GIVEN['reference_log_probs'], MASK, 'k1')
    rewards = objectives.penalised_rewards(GIVEN['scores'], kl, MASK, beta=SET['beta'])
    np.testing.assert_allclose(rewards, FOUND['trl_ppo']['rewards'], atol=2e-6)
    for own, name in ((rewards, 'trl_ppo'), (GIVEN['token_rewards'], 'tunix')):
        expected = FOUND[name]
        found = objectives.gae(own, GIVEN['values'], MASK, gamma=SET['gamma'],
                               gae_lambda=SET['lambda'])
        np.testing.assert_allclose(found.returns, expected['returns'], atol=5e-6)
        np.testing.assert_allclose(whitened(found.advantages), expected['advantages'], atol=5e-6)
    np.testing.assert_allclose(whitened(GIVEN['token_rewards']), FOUND['trl_ppo']['whitened'],
                               atol=5e-6)


def test_group_advantages_are_those_of_tunix():
    groups, present = GIVEN['scores'].reshape(2, 3), jnp.ones((2, 3), bool)
    expected = FOUND['tunix']['groups']
    np.testing.assert_allclose(
        objectives.grpo_advantages(groups, present, divide_by_std=False).ravel(),
        expected['drgrpo'], atol=1e-6)
    np.testing.assert_allclose(
        objectives.rloo_advantages(groups, present).ravel(), expected['rloo'], atol=1e-6)
    # Its standard deviation is divided by K - 1, and has 1e-6 added.
    np.testing.assert_allclose(
        objectives.grpo_advantages(groups, present, divide_by_std=True).ravel()
        * math.sqrt(2.0 / 3.0), expected['grpo'], rtol=2e-6)


def test_ratio_of_responses_is_that_of_trl():
    """Its RLOO clips the ratio of whole responses."""

    def loss(x):
        found = objectives.clipped_surrogate(
            objectives.token_sum(x, MASK), objectives.token_sum(GIVEN['old_log_probs'], MASK),
            GIVEN['advantages'], jnp.ones(6, bool), clip_low=SET['low'], clip_high=SET['high'])
        return found.losses.mean()

    assert_loss(loss, FOUND['trl']['rloo'])


def test_adaptive_beta_is_that_of_trl():
    beta = SET['beta']
    for kl, expected in zip((3.0, 6.3, 60.0, 5.9), FOUND['trl_ppo']['betas'], strict=True):
        beta = objectives.adaptive_beta(beta, kl, target=6.0, horizon=1000, n=256)
        assert float(beta) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(('expected', 'name', 'options'), [
    (FOUND['trl']['dpo']['sigmoid'], 'dpo', {}), (FOUND['tunix']['dpo'], 'dpo', {}),
    (FOUND['tunix']['dpo_smoothed'], 'dpo', {'label_smoothing': 0.1}),
    # Both divide by the number of tokens.
    (FOUND['trl']['dpo']['sigmoid_norm'], 'dpo', {'length_normalised': True}),
    (FOUND['trl']['dpo']['ipo'], 'ipo', {'length_normalised': True}),
])
def test_losses_of_pairs_are_those_of_trl_and_tunix(expected, name, options):
    normalised = {key: options[key] for key in options if key == 'length_normalised'}
    smoothed = {key: options[key] for key in options if key == 'label_smoothing'}

    def loss(x):
        ratios = objectives.log_ratio(x, GIVEN['reference_log_probs'], MASK, **normalised)
        return getattr(objectives, name)(ratios[:3], ratios[3:], beta=SET['beta'],
                                         **smoothed).mean()

    assert_loss(loss, expected)


def test_robust_dpo_of_trl_is_another_smoothing():
    """It divides the difference of both sides by 1 - 2 e, and unbiased where labels are noisy."""
    expected = FOUND['trl']['dpo_robust']

    def loss(x):
        ratios = objectives.log_ratio(x, GIVEN['reference_log_probs'], MASK)
        each = [objectives.dpo(*pair, beta=SET['beta']).mean() for pair in (
            (ratios[:3], ratios[3:]), (ratios[3:], ratios[:3]))]
        return (0.9 * each[0] - 0.1 * each[1]) / 0.8

    assert_loss(loss, expected)
    ratios = objectives.log_ratio(GIVEN['log_probs'], GIVEN['reference_log_probs'], MASK)
    found = objectives.implicit_rewards(ratios, SET['beta']).reshape(2, 3).mean(axis=1)
    np.testing.assert_allclose(found, expected['rewards'], atol=1e-6)
