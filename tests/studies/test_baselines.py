"""Baselines: a probe by its optimum, likelihoods by dialogues one at a time, and what they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from qrm.rewards import statistics
from qrm.studies import baselines
from qrm.training import base, train
from tests.helpers import ROOT, load_config, word_pairs


def test_the_probe_is_at_the_optimum_of_the_best_penalty():
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 100.0, 0.01, 5.0])
    truth = np.array([1.0, -0.5, 0.0, 0.2]) / scale

    def draw(n):
        x = rng.normal(size=(n, 4)) * scale
        return np.where(rng.random(n) < scipy.special.expit(x @ truth), 1.0, -1.0)[:, None] * x

    fitted, held_out = draw(300), draw(100)
    probe = baselines.fit_probe(fitted, held_out)
    w = probe.weights
    rms = np.sqrt(np.mean(fitted**2, axis=0))

    def gradient(weights, penalty):
        x, v = fitted / rms, weights * rms
        return penalty * v - scipy.special.expit(-x @ v) @ x / len(x)

    at_optimum = [penalty for penalty in baselines.PENALTIES
                  if np.abs(gradient(w, penalty)).max() < 1e-4]
    assert at_optimum == [probe.penalty]
    np.testing.assert_allclose(probe.scale, rms)

    def newton(penalty):
        v, x = np.zeros(4), fitted / rms
        for _ in range(50):
            p = scipy.special.expit(-x @ v)
            hessian = penalty * np.eye(4) + (x * (p * (1 - p))[:, None]).T @ x / len(x)
            v -= np.linalg.solve(hessian, penalty * v - p @ x / len(x))
        return v / rms

    losses = {penalty: np.mean(np.logaddexp(0.0, -held_out @ newton(penalty)))
              for penalty in baselines.PENALTIES}
    assert at_optimum[0] == min(losses, key=losses.get)
    np.testing.assert_allclose(w * rms, newton(at_optimum[0]) * rms, atol=1e-3)
    # A feature that never differs has no scale.
    padded = [np.c_[x, np.zeros(len(x))] for x in (fitted, held_out)]
    np.testing.assert_allclose(baselines.fit_probe(*padded).weights, np.r_[w, 0.0], atol=1e-6)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """Of a head on a tiny pretrained decoder."""
    folder = tmp_path_factory.mktemp('words')
    return load_config('hh', 'helpful,scalar', **word_pairs(folder) | {
        'train.tune': 'head', 'train.batch_size': 4, 'train.row_length': 24, 'train.rows': 2,
        'head.reads': ('mean',), 'data.max_length': 24, 'data.test_fraction': 0.6,
        'data.validation_fraction': 0.2,
        'train.features': str(folder / 'features')})


def test_likelihoods_are_those_of_dialogues_alone(config, tmp_path):
    prepared = train.prepare(config, str(tmp_path))
    judged = baselines.judge('likelihood', config, str(tmp_path))
    place = base.find(config.model.checkpoint, 0, 'float32', frozen=False)
    backbone = base.read(place, whole=True, output=True).backbone
    transformer = prepared.model.network.transformer

    @jax.jit
    def log_probs(tokens, places):
        contexts = transformer.contexts(jnp.ones_like(tokens), 0 * tokens, places, 'dense')
        hidden, _ = transformer(backbone, transformer.embed(backbone, tokens, places), contexts)
        return jax.nn.log_softmax(transformer.logits(backbone, hidden))[0]

    rewards = iter(judged.own.means)
    for item in prepared.encoded['test']:
        for size, response in zip(item.prompt_sizes, item.responses, strict=True):
            ids = np.r_[item.prompt, response]
            padded = np.r_[ids, np.zeros(24 - len(ids), np.int32)]  # which comes after all of it
            found = np.asarray(log_probs(padded[None], np.arange(24)[None]))
            picked = found[np.arange(len(ids) - 1), ids[1:]]
            start = max(min(size, len(ids) - 1) - 1, 0)
            np.testing.assert_allclose(next(rewards), picked[start:].mean(), atol=1e-4)
    assert next(rewards, None) is None
    assert np.isnan(judged.own.log_win).all()
    assert len(judged.exchanged.means) == len(judged.own.means)
    assert not np.allclose(judged.exchanged.means, judged.own.means)


def test_longer_and_probe_judge_the_test_split(config, tmp_path):
    longer = baselines.judge('longer', config, str(tmp_path))
    np.testing.assert_array_equal(longer.own.means, longer.own.lengths)
    probe = baselines.judge('probe', config, str(tmp_path))
    own, other = probe.own, probe.exchanged
    assert np.isfinite(own.log_win).all()
    chosen, rejected = own.rewards
    np.testing.assert_allclose(own.log_win, -np.logaddexp(0.0, rejected - chosen), atol=1e-5)
    prepared = train.prepare(config, str(tmp_path))
    kept = prepared.model.features
    weights = baselines.fit_probe(*(
        np.array([np.subtract(*item.features) for item in kept.of(prepared.encoded[split])])
        for split in ('train', 'validation'))).weights
    margins = [np.subtract(*item.features) @ weights for item in kept.of(prepared.encoded['test'])]
    np.testing.assert_allclose(chosen - rejected, margins, atol=1e-4)
    assert len(other.pairs) == len(own.pairs)
    assert 0.0 <= statistics.accuracy(chosen - rejected)(None) <= 1.0


def test_the_bayesian_head_is_that_of_rewarduq():
    # tests/reference/make_rewarduq.py
    with np.load(ROOT / 'tests' / 'reference' / 'rewarduq.npz') as file:
        known = dict(file)
    x = known['differences']
    # Their penalty is for all pairs together, on features as they are.
    probe = baselines.Probe(known['weights'], np.ones(5), float(known['penalty']) / len(x))
    bayes = baselines.Bayes(None, probe, baselines.posterior(probe, x))
    np.testing.assert_allclose(bayes.predict(known['features'])[1], known['std'], rtol=1e-6)
    # The scale of features is a choice of units.
    scale = np.array([1.0, 10.0, 0.1, 3.0, 2.0])
    other = baselines.Probe(known['weights'], scale, probe.penalty)
    assert not np.allclose(baselines.Bayes(None, other, baselines.posterior(other, x)).predict(
        known['features'])[1], known['std'])


def test_mean_and_deviation_of_the_bayesian_head_by_hand():
    # Weights are of features as they are, the covariance of features divided by their scale.
    probe = baselines.Probe(np.array([1.0, -2.0]), np.array([10.0, 0.5]), 1.0)
    bayes = baselines.Bayes(None, probe, np.array([[4.0, 1.0], [1.0, 9.0]]))
    mean, std = bayes.predict(np.array([[3.0, 5.0], [-20.0, 1.0]]))
    np.testing.assert_allclose(mean, [3 - 10, -20 - 2])
    # At (.3, 10) and (-2, 2): 4 a^2 + 2 a b + 9 b^2.
    np.testing.assert_allclose(std, np.sqrt([0.36 + 6 + 900, 16 - 8 + 36]))
