"""Tests of sampling: eight families of `transformers` token by token, what is drawn and how often,
and that a sample is the same in any company.

The numbers of `transformers` were made by tests/reference/make_samples.py.
"""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qrm.data.comparisons import DataError
from qrm.models import weights
from qrm.models.families import FAMILIES
from qrm.models.transformer import Transformer
from qrm.models.tuning import unstack_blocks
from qrm.policy import sampling
from qrm.policy.sampling import Sampling
from qrm.training.interruptions import NonFiniteLoss
from tests.helpers import REFERENCE

DECODERS = [name for name in FAMILIES if name not in ('bert', 'modernbert')]
SAMPLES = json.loads((REFERENCE / 'samples.json').read_text(encoding='utf-8'))
# All of the small vocabulary is possible, so that anything that differs is seen soon.
WARM = Sampling(3, 5, temperature=1.3, top_k=20, top_p=0.95, stops=(30,))


@functools.cache
def decoder(name):
    """A decoder of the references, and its parameters."""
    pretrained = weights.load_pretrained(
        str(REFERENCE if name == 'gpt2' else REFERENCE / name), output=True)
    return Transformer(pretrained.architecture), pretrained.backbone


def prompts_of(name):
    return [np.array(prompt, np.int32) for prompt in SAMPLES[name]['prompts']]


def sample(name, prompts, how, **kwargs):
    """Samples of each prompt, in order."""
    found = dict(sampling.sample(*decoder(name), prompts, how, **{'seed': 7} | kwargs))
    assert sorted(found) == list(range(len(prompts)))
    return [found[place] for place in range(len(prompts))]


@functools.partial(jax.jit, static_argnums=0)
def _all_log_probs(model, params, tokens):
    """Log-probabilities [R, L, V] of the next tokens, by the forward pass of training."""
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    contexts = model.contexts(ones, 0 * ones, positions, 'dense')
    hidden, _ = model(params, model.embed(params, tokens, positions), contexts)
    return jax.nn.log_softmax(model.logits(params, hidden))


def forced(name, prompt, one):
    """[n, V], what the forward pass of training over a whole dialogue gives for a response."""
    model, params = decoder(name)
    dialogue = np.zeros(model.architecture.max_positions, np.int32)
    dialogue[:len(prompt) + len(one.tokens)] = [*prompt, *one.tokens]
    found = _all_log_probs(model, params, dialogue[None])[0]
    return np.asarray(found)[len(prompt) - 1:len(prompt) - 1 + len(one.tokens)]


def picked(scores, tokens):
    return np.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]


def assert_same(first, second):
    """The same tokens; products of other sizes may be rounded otherwise."""
    for one, other in zip(first, second, strict=True):
        assert one.truncated == other.truncated
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
        np.testing.assert_allclose(one.sampled_log_probs, other.sampled_log_probs, atol=1e-5)


@pytest.mark.parametrize('name', DECODERS)
def test_greedy_samples_are_those_of_transformers(name):
    # Five prompts of unequal lengths at once, the last beyond all windows; there each was alone.
    expected, prompts = SAMPLES[name], prompts_of(name)
    eos = 38 if name == 'gpt2' else 30
    windows = [layer.window for layer in decoder(name)[0].architecture.layers]
    assert len(prompts[-1]) > max(windows)
    found = sample(name, prompts, Sampling(1, 8, temperature=0.0, stops=(eos,)))
    for prompt, (one,), tokens, log_probs in zip(
            prompts, found, expected['tokens'], expected['log_probs'], strict=True):
        assert one.tokens.tolist() == tokens
        assert one.truncated == (tokens[-1] != eos)
        np.testing.assert_allclose(one.log_probs, log_probs, rtol=0, atol=1e-4)
        np.testing.assert_allclose(one.log_probs, picked(forced(name, prompt, one), one.tokens),
                                   rtol=0, atol=1e-4)
        assert not one.sampled_log_probs.any()
    # Some stop, also at once.
    if name == 'mistral':
        assert expected['tokens'][0] == [eos]


@pytest.mark.parametrize('name', ['gpt2', 'gemma2'])
def test_log_probs_of_samples_are_those_of_teacher_forcing(name):
    prompts = prompts_of(name)[1:4]
    how = dataclasses.replace(WARM, stops=(38 if name == 'gpt2' else 30,))
    for prompt, samples in zip(prompts, sample(name, prompts, how), strict=True):
        for one in samples:
            scores = forced(name, prompt, one)
            np.testing.assert_allclose(one.log_probs, picked(scores, one.tokens), atol=1e-4)
            np.testing.assert_allclose(np.exp(one.sampled_log_probs), picked(
                by_sorting(scores, how), one.tokens), atol=1e-4)


def by_sorting(log_probs, how):
    """Probabilities of what is drawn, in float64 and by another way."""
    probs = np.exp(np.asarray(log_probs, np.float64) / how.temperature)
    order = np.argsort(-probs, axis=-1)
    ranked = np.take_along_axis(probs, order, axis=-1)
    if how.top_k:
        ranked[..., how.top_k:] = 0
    ranked /= ranked.sum(axis=-1, keepdims=True)
    ranked[np.cumsum(ranked, axis=-1) - ranked >= how.top_p] = 0
    ranked /= ranked.sum(axis=-1, keepdims=True)
    result = np.zeros_like(probs)
    np.put_along_axis(result, order, ranked, axis=-1)
    return result


def test_samples_are_the_same_in_any_company():
    prompts = prompts_of('gemma2')
    found = sample('gemma2', prompts, WARM)
    assert len({tuple(one.tokens) for samples in found for one in samples}) > 12
    # A prompt at a time in two rounds of samples, and all at once.
    for rows in (2, 32):
        for samples, others in zip(found, sample('gemma2', prompts, WARM, rows=rows), strict=True):
            assert_same(samples, others)


def test_samples_depend_on_numbers_and_not_on_places():
    prompts = prompts_of('gemma2')
    found = sample('gemma2', prompts, WARM)
    order = [3, 0, 4]
    others = sample('gemma2', [prompts[i] for i in order], WARM, numbers=order)
    for i, samples in zip(order, others, strict=True):
        assert_same(found[i], samples)
    # More samples are the same ones and others.
    more = sample('gemma2', prompts[1:2], dataclasses.replace(WARM, samples=7), numbers=[1])
    assert_same(found[1], more[0][:3])
    assert len({tuple(one.tokens) for one in more[0]}) > 4
    # Another seed, and another number.
    for other in (sample('gemma2', prompts[1:2], WARM, seed=8, numbers=[1]),
                  sample('gemma2', prompts[1:2], WARM, numbers=[2])):
        assert [list(one.tokens) for one in other[0]] != [list(one.tokens) for one in found[1]]


def test_prompts_of_a_bucket_are_compiled_once():
    model, params = decoder('gpt2')
    how = Sampling(2, 3, temperature=0.5)
    before = [f._cache_size() for f in (sampling.compute_prompt, sampling.respond)]
    for sizes in ((16, 3, 12), (2,), (5, 9, 1, 7, 2, 2)):
        prompts = [np.arange(size, dtype=np.int32) for size in sizes]
        assert len(list(sampling.sample(model, params, prompts, how, seed=0, rows=4))) == len(sizes)
    after = [f._cache_size() for f in (sampling.compute_prompt, sampling.respond)]
    assert after[0] - before[0] <= 1
    assert after[1] - before[1] == 1


def test_keys_are_written_where_they_stand():
    # What a step does with arrays of the shape of a cache, of which there are two for each block.
    model, params = decoder('gpt2')
    model = dataclasses.replace(model, architecture=dataclasses.replace(
        model.architecture, max_positions=200))
    params = unstack_blocks({'backbone': params})['backbone']
    prompt = sampling.compute_prompt(
        model, params, np.zeros((1, 16), np.int32), np.array([3], np.int32))
    text = sampling.respond.lower(
        model, Sampling(2, 77, temperature=0.0), params, prompt, jax.random.key(0),
        np.zeros(1, np.int32), np.arange(2, dtype=np.int32), np.ones((1, 2), bool),
    ).compile().as_text()
    name, = re.findall(r' while\(.*body=(%[\w.\-]+)', text)
    body = text.split(f'\n{name} (')[1].split('\n}')[0]
    made = re.findall(r' = f32\[8,77,4\]\S* ([\w\-]+)\(', body)
    assert 'copy' not in made
    assert made.count('fusion') + made.count('dynamic-update-slice') == 6


@pytest.mark.parametrize(('how', 'expected'), [
    # Probabilities .4, .3, .2, .1 and logits log p.
    ({}, [.4, .3, .2, .1]),
    ({'temperature': 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ({'temperature': 1e-6}, [1, 0, 0, 0]),
    ({'top_k': 3}, [4 / 9, 3 / 9, 2 / 9, 0]),
    ({'top_k': 1}, [1, 0, 0, 0]),
    ({'top_k': 9}, [.4, .3, .2, .1]),
    ({'top_p': 0.69}, [4 / 7, 3 / 7, 0, 0]),
    ({'top_p': 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
    ({'top_p': 1e-6}, [1, 0, 0, 0]),
    # Of the three that top_k leaves, two have 7/9.
    ({'top_k': 3, 'top_p': 0.77}, [4 / 7, 3 / 7, 0, 0]),
    ({'temperature': 0.5, 'top_p': 0.8}, [16 / 25, 9 / 25, 0, 0]),
])
def test_distributions_by_hand(how, expected):
    logits = jnp.log(jnp.array([.2, .4, .1, .3])) + 5.0
    probs = jnp.exp(sampling.filtered(Sampling(**how), logits))
    np.testing.assert_allclose(probs, np.array(expected)[[2, 0, 3, 1]], atol=1e-6)


def test_equally_probable_tokens_stay_together():
    logits = jnp.array([0.0, 1.0, 0.0, -1.0])
    for how in ({'top_k': 2}, {'top_p': 0.6}):
        found = np.exp(sampling.filtered(Sampling(**how), logits))
        np.testing.assert_allclose(found, np.array([1, math.e, 1, 0]) / (2 + math.e), atol=1e-6)


@pytest.mark.parametrize('name', DECODERS)
def test_distributions_are_those_of_transformers(name):
    prompt, filters = prompts_of(name)[-1], SAMPLES[name]['filters']
    found = sampling.Sample(np.zeros(1, np.int32), True, None, None)
    scores = forced(name, prompt, found)[0]
    probs = np.exp(sampling.filtered(Sampling(**filters), jnp.asarray(scores)))
    np.testing.assert_allclose(probs, SAMPLES[name]['filtered'], atol=1e-5)


def test_frequencies_follow_the_distribution():
    count, rng = 8000, np.random.default_rng(0)
    logits = rng.normal(size=12).astype(np.float32)
    how = Sampling(temperature=0.8, top_k=9, top_p=0.9)
    tokens, log_probs, sampled = jax.jit(functools.partial(sampling.draw, how))(
        jnp.broadcast_to(logits, (1, count, 12)),
        jax.random.split(jax.random.key(3), (1, count)), jnp.zeros((1, count), jnp.int32))
    expected = by_sorting(logits - np.log(np.exp(logits).sum()), how)
    observed = np.bincount(np.asarray(tokens)[0], minlength=12)
    assert not observed[expected == 0].any()
    kept = expected > 0
    assert 3 <= kept.sum() <= 8
    assert stats.chisquare(observed[kept], count * expected[kept]).pvalue > 0.01
    # A little warmer would be seen.
    other = by_sorting(logits, dataclasses.replace(how, temperature=0.9))
    assert stats.chisquare(observed[kept], count * other[kept] / other[kept].sum()).pvalue < 1e-4
    np.testing.assert_allclose(np.exp(sampled[0]), expected[tokens[0]], atol=1e-5)
    np.testing.assert_allclose(
        log_probs[0], (logits - np.log(np.exp(logits).sum()))[tokens[0]], atol=1e-5)


def test_several_stops_and_the_longest_responses():
    prompts = prompts_of('gemma2')[:2]
    free = sample('gemma2', prompts, Sampling(1, 6, temperature=0.0))
    assert [len(one.tokens) for one, in free] == [6, 6]
    first = [int(one.tokens[2]) for one, in free]
    found = sample('gemma2', prompts, Sampling(1, 6, temperature=0.0, stops=tuple(first)))
    for (one,), (whole,) in zip(found, free, strict=True):
        end = min(i for i, token in enumerate(whole.tokens) if token in first) + 1
        assert one.tokens.tolist() == whole.tokens[:end].tolist()
        assert (one.truncated, whole.truncated) == (False, True)
        np.testing.assert_array_equal(one.log_probs, whole.log_probs[:end])


def test_what_cannot_be_sampled_is_refused():
    model, params = decoder('gpt2')
    for prompt, message in (([], 'prompt 0: no tokens'), ([40], 'tokens from 40 to 40, but the'),
                            ([-1, 3], 'tokens from -1 to 3, but the embedding has 40 rows'),
                            (range(20), '20 tokens and max_new_tokens=5, but the model has 24')):
        with pytest.raises(DataError, match=message):
            next(sampling.sample(model, params, [np.array(prompt, np.int32)], WARM, seed=0))
    encoder = Transformer(dataclasses.replace(model.architecture, causal=False))
    with pytest.raises(DataError, match='an encoder'):
        next(sampling.sample(encoder, params, [np.array([1])], WARM, seed=0))
    for wrong in ({'samples': 0}, {'max_new_tokens': 1.5}, {'temperature': -1.0}, {'top_k': -1},
                  {'temperature': math.nan}, {'temperature': 1e-9}, {'top_p': 0.0}, {'top_p': 1.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_log_probabilities_that_are_not_finite_are_told():
    model, params = decoder('gpt2')
    broken = params | {'norm': params['norm'] | {'bias': params['norm']['bias'].at[0].set(np.nan)}}
    with pytest.raises(NonFiniteLoss, match='prompt 0: log-probabilities that are not finite'):
        list(sampling.sample(model, broken, [np.arange(3)], Sampling(2, 3, 0.5), seed=0, rows=4))
