"""Tests of the small trainer: what it is given, what it returns, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.rewards.heads import HeadConfig
from qrm.rewards.losses import LossConfig
from qrm.studies import mlp, worlds
from qrm.studies.mlp import Model, Training

WORLD = worlds.make(0)
SHORT = Training(steps=4, batch_size=8, width=8)
SCALAR = Model(HeadConfig('scalar'), LossConfig('bradley_terry'))
QUANTILE = Model(HeadConfig('quantile', 4), LossConfig('distributional_bradley_terry'))


def data(seeds):
    return mlp.stack([
        mlp.comparisons(worlds.sample_pairs(WORLD, 'independent', 40, seed)) for seed in seeds])


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def items(n=5):
    return worlds.sample_items(100, n)


def test_comparisons_hold_what_is_observed():
    pairs = worlds.sample_pairs(WORLD, 'identified', 3, 0, 4)
    unrated = mlp.comparisons(pairs)
    np.testing.assert_array_equal(unrated.x, pairs.x)
    np.testing.assert_array_equal(unrated.judgement.preference, [[[0, 1], [0, 0]]] * 3)
    assert np.isnan(unrated.judgement.ratings).all()
    np.testing.assert_array_equal(unrated.judgement.annotator, pairs.annotators)
    rated = mlp.comparisons(pairs, pairs.rewards)
    np.testing.assert_array_equal(rated.judgement.ratings, pairs.rewards[..., None])


def test_network_by_hand():
    # One layer that passes 2 features on, one that adds them up, a head that doubles the sum.
    params = {
        'layers': [{'kernel': jnp.eye(2), 'bias': jnp.zeros(2)},
                   {'kernel': jnp.ones((2, 2)), 'bias': jnp.array([0.0, 1.0])}],
        'head': {'kernel': jnp.array([[2.0], [0.0]])},
    }
    outputs = mlp.apply(SCALAR.head, params, jnp.array([[20.0, 30.0], [-40.0, 7.0]]))
    # GELU passes large numbers on and drops small ones: 2 * 50 and 2 * 7.
    np.testing.assert_allclose(outputs, [[100.0], [14.0]], rtol=1e-5)


def test_shapes_of_parameters_and_predictions():
    # Two whole networks of the kind that draws random numbers at every step.
    head = HeadConfig('implicit_quantile', 4, num_cosines=3)
    model = Model(head, LossConfig('distributional_bradley_terry'), 2)
    params = mlp.train(model, SHORT, data(range(3)), keys(3))
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(params)} == {(3, 2)}
    assert mlp.predict(model, params, items()).mean.shape == (3, 5)
    quantiles = mlp.quantiles(model, params, items())
    assert quantiles.shape == (3, 5, 4)
    # Each seed is another model, each network of an ensemble another network.
    assert np.abs(np.diff(quantiles, axis=0)).max() > 1e-3
    assert np.abs(np.diff(params['layers'][0]['kernel'], axis=1)).max() > 1e-3


def test_seeds_trained_together_do_not_touch():
    # With a teacher, which is one more thing to carry along.
    model = Model(HeadConfig('quantile', 4), LossConfig(
        'bradley_terry_quantile_huber', targets='teacher'))
    both = mlp.train(model, SHORT, data([0, 1]), keys(2))
    again = mlp.train(model, SHORT, data([2, 1]), jnp.stack([keys(3)[2], keys(2)[1]]))
    for first, second in zip(jax.tree.leaves(both), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(first[1], second[1])
        assert np.abs(first[0] - second[0]).max() > 1e-3


def test_an_ensemble_pools_its_networks():
    model = Model(QUANTILE.head, QUANTILE.loss, 2)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves)[None],
                          *[mlp.init(QUANTILE.head, 8, 8, key) for key in keys(2)])
    pooled = mlp.predict(model, params, items())
    each = [mlp.predict(QUANTILE, jax.tree.map(lambda a, e=e: a[:, e:e + 1], params), items())
            for e in range(2)]
    assert np.abs(each[0].mean - each[1].mean).max() > 1e-3
    np.testing.assert_allclose(pooled.mean, (each[0].mean + each[1].mean) / 2, atol=1e-6)
    np.testing.assert_allclose(
        np.sort(pooled.values, axis=-1),
        np.sort(np.concatenate([one.values for one in each], axis=-1), axis=-1), atol=1e-6)


def test_learns_a_linear_reward_from_choices():
    # Reward 2 x_0 without noise: the better item is always preferred.
    x = np.random.default_rng(0).standard_normal((2000, 2, 8)).astype(np.float32)
    x = np.where((x[:, :1, :1] > x[:, 1:, :1]), x, x[:, ::-1])
    pairs = worlds.Pairs(x, 2.0 * x[..., 0], np.full(2000, -1, np.int32))
    params = mlp.train(SCALAR, Training(steps=300, batch_size=128, width=16),
                       mlp.stack([mlp.comparisons(pairs)]), keys(1))
    mean = np.asarray(mlp.predict(SCALAR, params, items(500)).mean[0])
    assert np.corrcoef(mean, items(500)[:, 0])[0, 1] > 0.99


def test_anchors_are_in_every_step():
    # Nothing but anchors teaches: the pairs were judged by someone unknown.
    model = Model(HeadConfig('annotator', annotators=('a', 'b')),
                  LossConfig('annotator_bradley_terry'))
    unknown = data([0])
    unknown = unknown._replace(judgement=unknown.judgement._replace(
        annotator=np.full((1, 40), -1, np.int32)))
    x, ratings = items(2), np.array([1.5, -0.5], np.float32)
    always = mlp.stack([mlp.anchors(x, ratings)])
    params = mlp.train(model, Training(steps=200, batch_size=8, width=8), unknown, keys(1), always)
    values = mlp.predict(model, params, x).values[0]
    np.testing.assert_allclose(np.diagonal(values), ratings, atol=0.05)


def test_models_that_cannot_be():
    with pytest.raises(ValueError, match="objective 'ratings_pinball' with the gaussian head"):
        Model(HeadConfig('gaussian'), LossConfig('ratings_pinball'))
    with pytest.raises(ValueError, match='networks=0, expected at least 1'):
        Model(HeadConfig('scalar'), LossConfig('bradley_terry'), 0)
