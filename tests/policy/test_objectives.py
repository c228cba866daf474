"""Tests of objectives: values and gradients by hand, exact expectations over a few actions, and the
same numbers as TRL and Tunix.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.policy import objectives

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
