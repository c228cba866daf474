"""Tests of reward heads as they stand in checkpoints of other libraries, and of how they are read.

What a library computes is written out in NumPy in float64, from the tensors as it stores them.
Hidden states of whole models are those of the network, which test_transformer compares with
`transformers`; where that is installed with PyTorch, classifiers are compared with it as a whole.
"""

import dataclasses
import functools
import itertools
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors import numpy as safetensors_numpy

import qrm
from qrm.data.comparisons import DataError
from qrm.models import checkpoint_heads, families, weights
from qrm.models.network import RewardNetwork
from qrm.rewards import heads
from qrm.rewards.heads import HeadConfig
from qrm.rewards.normalisation import Normalisation
from tests.helpers import encoded, single_batch, write_tokenizer

D, EOS, PAD = 8, 38, 39
LLAMA = {
    'model_type': 'llama', 'vocab_size': 40, 'max_position_embeddings': 24, 'hidden_size': D,
    'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 1,
    'intermediate_size': 12, 'rope_theta': 100.0, 'pad_token_id': PAD, 'eos_token_id': EOS,
}
GPT2 = {
    'model_type': 'gpt2', 'vocab_size': 40, 'n_positions': 24, 'n_embd': D, 'n_layer': 2,
    'n_head': 2, 'pad_token_id': PAD, 'eos_token_id': EOS, 'bos_token_id': EOS,
}
# As chats of Llama 3: a message is role, text and end of turn, here w1 or w2, words and w3.
TEMPLATE = ("{% for message in messages %}{{ 'w1' if message['role'] == 'user' else 'w2' }} "
            "{{ message['content'] }} w3 {% endfor %}")

_apply = jax.jit(heads.apply, static_argnums=0)


def _random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


HIDDEN = _random({'hidden': (5, D)}, seed=9)['hidden']


@functools.cache
def _backbone(model_type='llama'):
    """Tensors of a backbone whose hidden states depend on the whole dialogue so far."""
    settings = {'llama': LLAMA, 'gpt2': GPT2}[model_type]
    network = RewardNetwork(families.architecture(settings), HeadConfig('scalar'))
    shapes = jax.eval_shape(network.init, jax.random.key(0))['backbone']
    rng = np.random.default_rng(1)
    backbone = jax.tree_util.tree_map_with_path(
        lambda path, x: rng.normal(float('scale' in str(path)), 0.6, x.shape), shapes)
    return weights.backbone_tensors(settings, backbone)


def _write(folder, head, settings=LLAMA, *, template=TEMPLATE, beside=None):
    """A checkpoint with these tensors for its head; those of `beside` in value_head.safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(settings))
    safetensors_numpy.save_file(_backbone(settings['model_type']) | head,
                                folder / 'model.safetensors')
    if beside:
        safetensors_numpy.save_file(beside, folder / 'value_head.safetensors')
    write_tokenizer(folder)
    (folder / 'chat_template.jinja').write_text(template)
    return str(folder)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(network, params, batch):
    return network.hidden(params, batch, network.embed(params, batch), everywhere=True).tokens[0]


def _states(model, ids):
    """Hidden states [length, D] float64 of a dialogue, from the network itself."""
    network = RewardNetwork(model.network.architecture, HeadConfig('scalar'))
    item = dataclasses.replace(encoded('', 0, [len(ids)]), responses=(np.asarray(ids, np.int32),))
    states = _hidden(network, {'backbone': model.params['backbone']}, single_batch(item, 24))
    return np.asarray(states[:len(ids)], np.float64)


def _take(tensors, settings=None, **kwargs):
    """Takes a head out of tensors, all of which must be its own."""
    tensors, problems = {name: jnp.asarray(x) for name, x in tensors.items()}, []
    head = checkpoint_heads.take(tensors, settings or {}, D, problems, **kwargs)
    assert not problems
    assert not tensors
    return head


def _rewards(head, hidden=HIDDEN):
    """Rewards and quantiles that a head gives."""
    config, params = head
    outputs = _apply(config, params, jnp.asarray(hidden))
    return np.asarray(config.read(outputs).distribution.mean), np.asarray(config.quantiles(outputs))


def _linear(tensors, name, x):
    """PyTorch's Linear: x W^T + b, in float64."""
    bias = np.asarray(tensors.get(f'{name}.bias', 0.0), np.float64)
    return np.asarray(x, np.float64) @ tensors[f'{name}.weight'].astype(np.float64).T + bias


def _relu(x):
    return np.maximum(x, 0.0)


def _softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


# Linear heads and those of two layers.


def _shapes(name, outputs, bias, width=D):
    shapes = {f'{name}.weight': (outputs, width)}
    return shapes | {f'{name}.bias': (outputs,)} if bias else shapes


NAMES = ('score', 'classifier', 'v_head', 'regression_head', 'value_head', 'score_head',
         'v_head.summary', 'quantile_head')


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('outputs', [1, 3])
@pytest.mark.parametrize('name', NAMES)
def test_linear_heads(name, outputs, bias):
    assert NAMES == checkpoint_heads.LINEAR
    tensors = _random(_shapes(name, outputs, bias))
    config, params = head = _take(tensors)
    assert config == (HeadConfig('scalar', bias=bias) if outputs == 1
                      else HeadConfig('quantile', 3, bias=bias))
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype('float32')}
    rewards, quantiles = _rewards(head)
    _close(quantiles, _linear(tensors, name, HIDDEN))
    # The reward is the mean of all outputs.
    _close(rewards, _linear(tensors, name, HIDDEN).mean(axis=-1))


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('outputs', [1, 3])
@pytest.mark.parametrize('name', ['score', 'v_head.summary', 'value_head'])
def test_heads_of_two_layers(name, outputs, bias):
    """INF-ORM and Qwen have 'score', GRM 'v_head.summary': Linear, ReLU, Linear."""
    tensors = _random(_shapes(f'{name}.0', 6, bias) | _shapes(f'{name}.2', outputs, bias, 6))
    config, _ = head = _take(tensors)
    assert config == (HeadConfig('scalar', bias=bias, hidden_layers=(6,)) if outputs == 1
                      else HeadConfig('quantile', 3, bias=bias, hidden_layers=(6,)))
    inner = _linear(tensors, f'{name}.0', HIDDEN)
    assert 0.2 < (inner < 0).mean() < 0.8
    _close(_rewards(head)[1], _linear(tensors, f'{name}.2', _relu(inner)))


def test_layers_may_differ_in_their_bias():
    tensors = _random(_shapes('score.0', 6, True) | _shapes('score.2', 1, False, 6))
    config, _ = head = _take(tensors)
    assert not config.bias
    inner = _relu(_linear(tensors, 'score.0', HIDDEN))
    _close(_rewards(head)[1], _linear(tensors, 'score.2', inner))


@pytest.mark.parametrize('layers', [1, 2])
def test_two_outputs_as_a_gaussian(layers):
    """Siththaranjan et al. 2023: the first is the mean, the softplus of the second the width."""
    if layers == 1:
        tensors = _random(_shapes('score', 2, True))
        raw = _linear(tensors, 'score', HIDDEN)
    else:
        tensors = _random(_shapes('score.0', 6, True) | _shapes('score.2', 2, True, 6))
        raw = _linear(tensors, 'score.2', _relu(_linear(tensors, 'score.0', HIDDEN)))
    config, params = checkpoint_heads.interpret(_take(tensors), {}, 'gaussian')
    assert config == HeadConfig('gaussian', bias=True, hidden_layers=(6,) * (layers - 1))
    mean, width = raw[:, 0], 0.001 + np.log1p(np.exp(raw[:, 1]))  # .001: the floor of this head
    rewards, quantiles = _rewards((config, params))
    _close(rewards, mean)
    levels = [statistics.NormalDist().inv_cdf((i + 0.5) / 10) for i in range(10)]
    _close(quantiles, mean[:, None] + width[:, None] * np.array(levels))
    # Quantiles, or one that is the reward, by its name or number.
    found = checkpoint_heads.interpret(_take(tensors), {}, 'quantiles')
    assert found[0].name == 'quantile'
    _close(_rewards(found)[1], raw)
    labels = {'id2label': {'0': 'BAD', '1': 'GOOD'}}
    for outputs, number in (('GOOD', 1), ('1', 1), ('0', 0)):
        found = checkpoint_heads.interpret(_take(tensors), labels, outputs)
        assert found[0] == HeadConfig('scalar', bias=True, hidden_layers=(6,) * (layers - 1))
        _close(_rewards(found)[0], raw[:, number])


@pytest.mark.parametrize('bias', [False, True])
def test_normalised_rewards_of_openrlhf(bias):
    """Its head stays as it is: how likely one response is to win, raw rewards say."""
    settings = {'normalize_reward': True, 'mean': -1.5, 'std': 4.0}
    given = _take(_random(_shapes('value_head', 1, bias)), settings)
    head, by = checkpoint_heads.normalisation(given, settings)
    assert head is given
    assert by == Normalisation(-1.5, 4.0)
    # Where the model does not apply them, they are only kept there.
    for other in ({'normalize_reward': False}, {'normalize_reward': None}):
        assert checkpoint_heads.normalisation(given, settings | other) == (given, None)


@pytest.mark.parametrize('bias', [False, True])
def test_weights_that_an_export_has_normalised_are_made_raw(bias):
    settings = {'qrm_mean': -1.5, 'qrm_std': 4.0, 'normalize_reward': True, 'mean': -0.375,
                'std': 1.0}
    tensors = _random(_shapes('score', 1, bias))
    head, by = checkpoint_heads.normalisation(_take(tensors), settings)
    assert by == Normalisation(-1.5, 4.0)
    # The mean was subtracted where there was a place for it.
    _close(_rewards(head)[0], 4.0 * _linear(tensors, 'score', HIDDEN)[:, 0] - 1.5 * bias)


@pytest.mark.parametrize('prefix', ['my.reward_head', 'score', None])
def test_a_config_may_name_the_head(prefix):
    name = prefix or 'value_head'
    tensors = _random(_shapes(name, 1, True))
    head = _take(tensors, {'value_head_prefix': prefix})
    _close(_rewards(head)[1], _linear(tensors, name, HIDDEN))
    deep = _random(_shapes(f'{name}.0', 6, True) | _shapes(f'{name}.2', 1, True, 6))
    assert _take(deep, {'value_head_prefix': prefix})[0].hidden_layers == (6,)


def test_names_are_no_patterns():
    tensors = {name: jnp.asarray(x) for name, x in _random(
        {'value_head.weight': (1, D), 'valueXhead.weight': (1, D)}).items()}
    problems = []
    assert checkpoint_heads.take(tensors, {'value_head_prefix': 'value.head'}, D, problems)
    assert set(tensors) == {'valueXhead.weight'}
    assert not problems


def test_a_language_model_has_no_head():
    tensors = {'embed_tokens.weight': jnp.ones((3, D)), 'gating.layers.0.weight': jnp.ones((3, D))}
    before, problems = dict(tensors), []
    assert checkpoint_heads.take(tensors, {}, D, problems) is None
    assert tensors == before
    assert not problems


@pytest.mark.parametrize('reads', [('first',), ('dialogue',)])
def test_what_is_read_is_kept(reads):
    assert _take(_random(_shapes('classifier', 2, True)), reads=reads)[0].reads == reads


# Whole models.


PROMPT, RESPONSES = 'w5 w6 w7', [' w8 w9', ' w10', ' w11 w8 w4 w30']
# The same with EOS, which stands at the end of plain dialogues.
DIALOGUES = [[5, 6, 7, 8, 9, EOS], [5, 6, 7, 10, EOS], [5, 6, 7, 11, 8, 4, 30, EOS]]


def _score(model):
    scores = model.score([PROMPT], [RESPONSES])
    return scores.rewards[0], scores.quantiles[0]


@pytest.mark.parametrize('form', ['with the weights', 'beside them', 'two layers', 'prefix'])
def test_linear_heads_of_whole_models(tmp_path, form):
    settings, beside = LLAMA, {}
    if form == 'with the weights':
        head = _random(_shapes('v_head.summary', 1, True) | {'lm_head.weight': (40, D)})
        expected = functools.partial(_linear, head, 'v_head.summary')
    elif form == 'beside them':
        head, beside = {}, _random(_shapes('v_head.summary', 1, True))
        expected = functools.partial(_linear, beside, 'v_head.summary')
    elif form == 'two layers':
        head = _random(_shapes('score.0', 6, True) | _shapes('score.2', 1, True, 6))

        def expected(x):
            return _linear(head, 'score.2', _relu(_linear(head, 'score.0', x)))
    else:
        head = _random(_shapes('reward', 1, False))
        settings = LLAMA | {'value_head_prefix': 'reward', 'normalize_reward': True, 'mean': 0.5,
                            'std': 2.0}

        def expected(x):
            return (_linear(head, 'reward', x) - 0.5) / 2.0
    folder = _write(tmp_path, head, settings, beside=beside)
    model = qrm.load(folder)
    assert model.loss.objective == 'bradley_terry'
    assert qrm.load(folder, raw=True).normalisation is None
    last = np.stack([_states(model, ids)[-1] for ids in DIALOGUES])
    rewards, quantiles = _score(model)
    _close(rewards, expected(last)[:, 0])
    _close(quantiles, expected(last))
    assert np.ptp(rewards) > 0.1


def test_a_whole_model_with_a_gaussian(tmp_path):
    head = _random(_shapes('score', 2, False))
    model = qrm.load(_write(tmp_path, head), outputs='gaussian')
    assert model.network.head == HeadConfig('gaussian')
    assert model.loss.objective == 'distributional_bradley_terry'
    raw = _linear(head, 'score', np.stack([_states(model, ids)[-1] for ids in DIALOGUES]))
    rewards, quantiles = _score(model)
    _close(rewards, raw[:, 0])
    width = 0.001 + np.log1p(np.exp(raw[:, 1]))
    _close(quantiles[:, 9], raw[:, 0] + width * statistics.NormalDist().inv_cdf(0.95))


# Gates.


GATED = LLAMA | {'gating_temperature': 2.5, 'num_objectives': 3}


def _gated(numbers=(0, 1, 2), *, quantiles=1, norms=False, biases=True):
    """A head of three attributes whose gate has layers of these numbers."""
    sizes, shapes = [*(D, 7, 6, 5)[:len(numbers)], 3], {}
    for number, (before, after) in zip(numbers, itertools.pairwise(sizes), strict=True):
        last = number == numbers[-1]
        shapes |= _shapes(f'gating.layers.{number}', after, biases or last, before)
        if norms and not last:
            shapes |= {f'gating.layers.{number + 2}.{end}': (after,)
                       for end in ('weight', 'bias', 'running_mean', 'running_var')}
    tensors = _random(shapes | {'regression_layer.weight': (3 * quantiles, D),
                                'reward_transform_matrix': (3, 3)}, seed=3)
    for name in tensors:
        if name.endswith('running_var'):
            tensors[name] = tensors[name] ** 2 + np.float32(0.1)
    for number in numbers[:-1]:
        if norms:
            tensors[f'gating.layers.{number + 2}.num_batches_tracked'] = np.array(9, np.int64)
    return tensors | {'gating.logit_scale': np.array([1.3], np.float32)}


def _gate(tensors, numbers, x, temperature=2.5):
    """GatingNetwork of ArmoRM: layers with ReLU between, softmax(x / temperature) logit_scale[0].

    That of QRM has BatchNorm1d, in evaluation, behind each ReLU.
    """
    for number in numbers:
        x = _linear(tensors, f'gating.layers.{number}', x)
        if number != numbers[-1]:
            x = _relu(x)
            if f'gating.layers.{number + 2}.running_mean' in tensors:
                weight, bias, mean, var = (
                    tensors[f'gating.layers.{number + 2}.{end}'].astype(np.float64)
                    for end in ('weight', 'bias', 'running_mean', 'running_var'))
                x = (x - mean) / np.sqrt(var + 1e-5) * weight + bias
    return _softmax(x / temperature) * float(tensors['gating.logit_scale'][0])


def _user(*texts):
    return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]


def _chat_ids(*turns):
    return [token for i, words in enumerate(turns) for token in (1 + i % 2, *words, 3)]


# What is scored: plain text, a chat, and one of several turns; prompts in tokens, and dialogues.
CONVERSATIONS = {
    'prompts': [PROMPT, _user('w10 w11'), _user('w12', 'w13 w14', 'w15 w16 w17')],
    'responses': [RESPONSES[:2], ['w20', 'w21 w22'], ['w23']],
}
IN_TOKENS = [
    ([5, 6, 7], DIALOGUES[:2]),
    (_chat_ids([10, 11]), [_chat_ids([10, 11], [20]), _chat_ids([10, 11], [21, 22])]),
    (_chat_ids([12], [13, 14], [15, 16, 17]),
     [_chat_ids([12], [13, 14], [15, 16, 17], [23])]),
]


def _read_gated(model, prompt, dialogue):
    """What a gated head reads: hidden states at the last token and at that of the prompt."""
    assert dialogue[:len(prompt)] == prompt
    states = _states(model, dialogue)
    return states[-1], states[len(prompt) - 1]


@pytest.mark.parametrize('numbers', [(0, 1), (0, 1, 2, 3)], ids=['one layer', 'three layers'])
def test_armorm(tmp_path, numbers):
    """Wang et al. 2024: scores of attributes, mixed by a matrix, weighed by the prompt's gate."""
    tensors = _gated(numbers)
    model = qrm.load(_write(tmp_path, tensors, GATED))
    head = model.network.head
    assert (head.name, len(head.attributes), head.levels) == ('scalar', 3, ())
    assert head.gate_layers == (7, 6, 5)[:len(numbers) - 1]
    np.testing.assert_array_equal(model.taus, [0.5])
    scores = model.score(**CONVERSATIONS)
    found = [reward for one in scores.rewards for reward in one]
    expected = []
    for prompt, dialogues in IN_TOKENS:
        for dialogue in dialogues:
            last, at_prompt = _read_gated(model, prompt, dialogue)
            attributes = _linear(tensors, 'regression_layer', last)
            adjusted = attributes @ tensors['reward_transform_matrix'].astype(np.float64)
            expected.append((_gate(tensors, numbers, at_prompt) * adjusted).sum())
    _close(found, expected)
    assert np.ptp(found) > 0.1


@pytest.mark.parametrize(('numbers', 'norms'), [
    ((0, 1, 2), False), ((0, 3, 6), False),
    # As in QRM-Llama3.1-8B, whose layers before a batch norm have no bias; with dropout, of which
    # nothing is stored, as in QRM-Gemma-2-27B.
    ((0, 3, 6), True), ((0, 4, 7), True),
])
def test_qrm(tmp_path, numbers, norms):
    """Dorka 2024: quantiles of attributes; those of the reward are sums of them at each level."""
    tensors = _gated(numbers, quantiles=19, norms=norms, biases=not norms)
    model = qrm.load(_write(tmp_path, tensors, GATED | {'num_quantiles': 19}))
    np.testing.assert_allclose(model.taus, np.arange(1, 20) / 20, rtol=1e-6)
    assert model.network.head.gate_layers == (7, 6)
    assert model.loss.objective == 'bradley_terry_quantile_huber'
    scores = model.score(**CONVERSATIONS)
    expected = []
    for prompt, dialogues in IN_TOKENS:
        for dialogue in dialogues:
            last, at_prompt = _read_gated(model, prompt, dialogue)
            values = _linear(tensors, 'regression_layer', last).reshape(3, 19)
            adjusted = values.T @ tensors['reward_transform_matrix'].astype(np.float64)  # [19, 3]
            expected.append(adjusted @ _gate(tensors, numbers, at_prompt))
    found = np.concatenate(scores.quantiles)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.concatenate(scores.rewards), np.mean(expected, axis=-1),
                               rtol=1e-4, atol=1e-4)
    # The order of attributes and quantiles tells, and so does the place of the gate.
    assert np.abs(np.diff(found, axis=0)).min() > 1e-4


def test_a_gate_without_a_scale_has_none(tmp_path):
    tensors = _gated()
    one = _take(tensors | {'gating.logit_scale': np.ones(1, np.float32)}, GATED)
    del tensors['gating.logit_scale']
    other = _take(tensors, GATED)
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


# What is no head.


def _zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


TWO = _random(_shapes('score.0', 6, True) | _shapes('score.2', 1, True, 6))
ARMORM, QRM = _gated(), _gated((0, 3, 6), quantiles=19, norms=True)


def _without(tensors, *names):
    return {name: x for name, x in tensors.items() if not name.startswith(names)}


@pytest.mark.parametrize(('tensors', 'message'), [
    # Several.
    ({'score.weight': _zeros(1, D), 'v_head.weight': _zeros(1, D)},
     'several reward heads: score, v_head, expected one'),
    (TWO | {'v_head.summary.weight': _zeros(1, D), 'v_head.summary.bias': _zeros(1)},
     'several reward heads: v_head.summary, score, expected one'),
    # Halves.
    ({'score.bias': _zeros(1)}, 'missing score.weight'),
    (_without(TWO, 'score.0'), 'missing score.0.weight'),
    (_without(TWO, 'score.2'), 'missing score.2.weight'),
    # Of another shape or dtype.
    ({'score.weight': _zeros(1, 5)}, 'misshapen score.weight (1, 5), expected (N, 8)'),
    ({'score.weight': _zeros(D)}, 'misshapen score.weight (8,), expected (N, 8)'),
    ({'score.weight': _zeros(D, 1)}, 'misshapen score.weight (8, 1), expected (N, 8)'),
    ({'score.weight': _zeros(1, D), 'score.bias': _zeros(2)},
     'misshapen score.bias (2,), expected (1,)'),
    ({'score.weight': _zeros(1, D, dtype=np.int8)}, 'score.weight has dtype int8, expected floats'),
    (TWO | {'score.0.weight': _zeros(6, 5)}, 'misshapen score.0.weight (6, 5), expected (N, 8)'),
    (TWO | {'score.0.bias': _zeros(5)}, 'misshapen score.0.bias (5,), expected (6,)'),
    (TWO | {'score.2.weight': _zeros(1, D)}, 'misshapen score.2.weight (1, 8), expected (N, 6)'),
    # Attributes.
    (ARMORM | {'regression_layer.weight': _zeros(3, 5)},
     'misshapen regression_layer.weight (3, 5), expected (N, 8)'),
    (ARMORM | {'regression_layer.bias': _zeros(3)}, 'unexpected regression_layer.bias'),
    (_without(ARMORM, 'reward_transform'),
     'regression_layer without reward_transform_matrix and gating.layers, expected all three'),
    (_without(ARMORM, 'gating.layers'),
     'regression_layer without reward_transform_matrix and gating.layers, expected all three'),
    *((ARMORM | {'reward_transform_matrix': _zeros(*shape)},
       f'misshapen reward_transform_matrix {shape}, expected (A, A) with A > 1 that divides the 3 '
       'rows of regression_layer.weight')
      for shape in ((3, 4), (4, 3), (2, 2), (1, 1), (3,), (), (0, 0), (3, 3, 1))),
    # Gates.
    (ARMORM | {'gating.logit_scale': _zeros()},
     'misshapen gating.logit_scale (), expected (1,)'),
    (ARMORM | {'gating.layers.1.weight': _zeros(6, D)},
     'misshapen gating.layers.1.weight (6, 8), expected (N, 7)'),
    (ARMORM | {'gating.layers.2.weight': _zeros(4, 6), 'gating.layers.2.bias': _zeros(4)},
     'gating.layers with 4 outputs, expected the 3 of reward_transform_matrix'),
    (_without(ARMORM, 'gating.layers.1.weight'), 'missing gating.layers.1.weight'),
    (_gated((0,)), 'gating.layers with one layer, expected at least two'),
    (QRM | {'gating.layers.5.scale': _zeros(6)}, 'unexpected gating.layers.5.scale (6,)'),
    (QRM | {'gating.layers.5.running_var': _zeros(7)},
     'gating.layers.5, a batch norm, lacks tensors or has others than weight, bias, running_mean, '
     'running_var (6,)'),
    (_without(QRM, 'gating.layers.2.bias'), 'gating.layers.2, a batch norm, lacks tensors'),
    # Before its ReLU, and behind the last layer.
    *((_gated() | {f'gating.layers.{n}.running_mean': _zeros(7)},
       f'gating.layers.{n} is a batch norm at another place than behind the ReLU') for n in (1, 4)),
])
def test_malformed_heads(tmp_path, tensors, message):
    folder = _write(tmp_path, tensors, GATED)
    with pytest.raises(DataError) as caught:
        weights.load_pretrained(folder)
    # One line says what is wrong with the head, none that its tensors are unexpected.
    first, *problems = str(caught.value).splitlines()
    assert first == f'{folder}: the weights do not fit the architecture of config.json:'
    assert len(problems) == 1, problems
    assert message in problems[0]


CLASSES = {'id2label': {'0': 'NEGATIVE', '1': 'POSITIVE'}}


@pytest.mark.parametrize(('settings', 'expected'), [
    (CLASSES, r'2 outputs \(NEGATIVE, POSITIVE\) that are not said'),
    ({'problem_type': 'single_label_classification'}, 'LABEL_1; single_label_classification'),
    (CLASSES | {'problem_type': 'multi_label_classification'}, 'POSITIVE; multi_label'),
])
def test_outputs_that_are_called_classes_are_asked_about(tmp_path, settings, expected):
    head = _random(_shapes('score', 2, False))
    folder = _write(tmp_path, head, LLAMA | settings)
    with pytest.raises(DataError, match=expected):
        qrm.load(folder)
    with pytest.raises(DataError, match="outputs='neutral', expected 'quantiles', 'gaussian', one"):
        qrm.load(folder, outputs='neutral')
    states = np.stack([_states(qrm.load(folder, outputs='1'), ids)[-1] for ids in DIALOGUES])
    raw = _linear(head, 'score', states)
    for outputs, rewards in (('1', raw[:, 1]), ('quantiles', raw.mean(axis=1))):
        _close(_score(qrm.load(folder, outputs=outputs))[0], rewards)


def test_outputs_of_which_nothing_is_said_are_quantiles_with_a_note(tmp_path, capsys):
    for settings, notes in ((LLAMA, 1), (LLAMA | {'qrm_outputs': 'quantiles'}, 0)):
        folder = _write(tmp_path, _random(_shapes('score', 2, False)), settings)
        assert qrm.load(folder).network.head == HeadConfig('quantile', 2)
        assert capsys.readouterr().out.count('taken for quantiles') == notes


@pytest.mark.parametrize('outputs', [1, 3])
def test_a_gaussian_has_two_outputs(tmp_path, outputs):
    folder = _write(tmp_path, _random(_shapes('score', outputs, True)))
    with pytest.raises(DataError, match=f'{outputs} outputs, expected the 2 of a Gaussian'):
        qrm.load(folder, outputs='gaussian')


@pytest.mark.parametrize('temperature', [None, 0, -1.0, '10', True, float('nan')])
def test_gates_without_a_temperature(tmp_path, temperature):
    settings = GATED | {'gating_temperature': temperature}
    if temperature is None:
        del settings['gating_temperature']
    folder = _write(tmp_path, ARMORM, settings)
    with pytest.raises(DataError) as caught:
        weights.load_pretrained(folder)
    problem, = str(caught.value).splitlines()[1:]
    assert f'gating_temperature={temperature!r} in config.json, expected a positive' in problem


@pytest.mark.parametrize('settings', [
    {}, {'mean': 1.0}, {'std': 2.0}, {'mean': 'x', 'std': 2.0}, {'mean': 1.0, 'std': 0.0},
    {'mean': 1.0, 'std': -2.0}, {'mean': None, 'std': 2.0}, {'mean': float('nan'), 'std': 2.0},
])
def test_normalised_rewards_without_their_moments(tmp_path, settings):
    folder = _write(tmp_path, _random(_shapes('value_head', 1, False)),
                    LLAMA | {'normalize_reward': True} | settings)
    with pytest.raises(DataError) as caught:
        qrm.load(folder)
    mean, std = settings.get('mean'), settings.get('std')
    assert str(caught.value) == (f'{folder}: normalize_reward with mean={mean!r} and std={std!r}, '
                                 'expected numbers, std above 0')


# Where classifiers are read.


TEXTS = [' w8 w9', ' w10 <eos>', ' w11 <eos> <eos>', ' w11 <eos> w12', ' w8 <pad> w4', ' w9 <pad>']


def _classifier(folder, settings=LLAMA, **kwargs):
    head = _random(_shapes('score', 3, False), seed=4)
    return head, _write(folder, head, settings, **kwargs)


def _token_ids(text):
    named = {'<eos>': EOS, '<pad>': PAD}
    return [named.get(word) or int(word[1:]) for word in text.split()]


def _read_at(ids, pad):
    """`transformers`: the rightmost token that is not the padding token; without, the last one."""
    return len(ids) - 1 if pad is None else int(np.flatnonzero(np.array(ids) != pad)[-1])


@pytest.mark.parametrize('pad', [PAD, EOS, None])
@pytest.mark.parametrize('settings', [LLAMA, GPT2], ids=['llama', 'gpt2'])
def test_classifiers_are_read_as_by_transformers(tmp_path, settings, pad):
    """TRL appends EOS to what it trains on, and writes GPT-2 models with EOS for padding."""
    head, folder = _classifier(tmp_path, settings | {'pad_token_id': pad})
    model = qrm.load(folder)
    found = model.score([PROMPT], [TEXTS]).quantiles[0]
    for text, quantiles in zip(TEXTS, found, strict=True):
        ids = _token_ids(PROMPT + text)
        ids = [*_without_end(ids, EOS), EOS]
        at = _read_at(ids, pad)
        _close(quantiles, _linear(head, 'score', _states(model, ids)[at]))
        assert (ids[at] == EOS) == (pad != EOS)
    # The first two dialogues, by hand.
    first = {EOS: ([5, 6, 7, 8, 9], [5, 6, 7, 10])}.get(pad, ([5, 6, 7, 8, 9, EOS],
                                                            [5, 6, 7, 10, EOS]))
    for ids, quantiles in zip(first, found, strict=False):
        _close(quantiles, _linear(head, 'score', _states(model, ids)[-1]))


def _without_end(ids, last):
    while ids[-1] == last:
        ids = ids[:-1]
    return ids


def test_a_missing_padding_token_is_none(tmp_path):
    settings = {key: value for key, value in LLAMA.items() if key != 'pad_token_id'}
    assert qrm.load(_classifier(tmp_path, settings)[1]).reading.skipped is None


@pytest.mark.parametrize(('pad', 'end', 'ids'), [
    (PAD, '', [1, 10, 11, 3, 2, 20, 3]),
    # What a template ends with is read, whatever it is, but for padding.
    (PAD, '<eos>', [1, 10, 11, 3, 2, 20, 3, EOS]), (EOS, '<eos>', [1, 10, 11, 3, 2, 20, 3]),
    (EOS, '<eos> <eos>', [1, 10, 11, 3, 2, 20, 3]), (EOS, '', [1, 10, 11, 3, 2, 20, 3]),
    (None, 'w4', [1, 10, 11, 3, 2, 20, 3, 4]), (3, '', [1, 10, 11, 3, 2, 20]),
])
def test_chats_are_read_as_they_are_rendered(tmp_path, pad, end, ids):
    head, folder = _classifier(tmp_path, LLAMA | {'pad_token_id': pad}, template=TEMPLATE + end)
    model = qrm.load(folder)
    quantiles = model.score([_user('w10 w11')], [['w20']]).quantiles[0][0]
    _close(quantiles, _linear(head, 'score', _states(model, ids)[-1]))


@pytest.mark.parametrize('pad', [PAD, EOS, None])
@pytest.mark.parametrize('settings', [LLAMA, GPT2], ids=['llama', 'gpt2'])
def test_scores_are_those_of_transformers(tmp_path, settings, pad):
    torch = pytest.importorskip('torch')
    settings = settings | {'pad_token_id': pad, 'id2label': {str(i): str(i) for i in range(3)},
                           'label2id': {str(i): i for i in range(3)}}
    _, folder = _classifier(tmp_path, settings)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32).eval()
    dialogues = [[*_without_end(_token_ids(PROMPT + text), EOS), EOS] for text in TEXTS]
    expected = []
    # Without a padding token they take one dialogue at a time.
    for batch in [dialogues] if pad is not None else [[ids] for ids in dialogues]:
        longest = max(map(len, batch))
        tokens = torch.tensor([[*ids, *[pad or 0] * (longest - len(ids))] for ids in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])
        with torch.no_grad():
            expected.extend(theirs(input_ids=tokens, attention_mask=mask).logits.numpy())
    found = qrm.load(folder).score([PROMPT], [TEXTS]).quantiles[0]
    _close(found, np.stack(expected))
    # Of chats the tokens are what their template renders.
    with torch.no_grad():
        chat = theirs(input_ids=torch.tensor([_chat_ids([10, 11], [20])])).logits.numpy()[0]
    _close(qrm.load(folder).score([_user('w10 w11')], ['w20']).quantiles[0], chat)
