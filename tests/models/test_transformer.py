"""Tests of the transformer: ten families of `transformers`, module by module, then packing,
precision and parameters.

The numbers of `transformers` are in tests/reference and were made by make_references.py, so
PyTorch is not needed; where it is installed, some tests compare with it directly.
"""

import dataclasses
import functools
import math
import re
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.models import families, transformer, weights
from qrm.models.architecture import (
    ACTIVATIONS,
    PLACES,
    POOLERS,
    SCALINGS,
    Architecture,
    Layer,
    Rotary,
    leaves,
)
from qrm.models.families import FAMILIES
from qrm.models.transformer import Transformer
from qrm.models.tuning import stack_blocks, unstack_blocks
from qrm.rewards import heads
from qrm.rewards.heads import HeadConfig
from tests.helpers import REFERENCE

TOLERANCE = 1e-5
BLOCK = 1  # whose modules are in the reference
DECODERS = [name for name in FAMILIES if name not in ('bert', 'modernbert')]

TINY = Architecture(
    vocab_size=11, max_positions=8, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=2,
    head_dim=4, intermediate_size=12, activation='gelu_new', norm='layer', norm_epsilon=1e-5,
    norm_bias=True, learned_positions=True, qkv_bias=True, output_bias=True, mlp_bias=True)


class Rows(NamedTuple):
    """Dialogues of a reference laid out in rows [R, L], and where each of their tokens is.

    Attributes:
      at: indices into R * L.
      of: the tokens that stand there, as indices into all tokens of the dialogues.
      reads: [3] index into R * L of the token of each dialogue where its reward is read.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    responses: np.ndarray
    at: np.ndarray
    of: np.ndarray
    reads: np.ndarray

    def find(self, x):
        """Elements [N, ...] of x [R, L, ...] at all tokens that are not padding."""
        return np.asarray(x).reshape(self.tokens.size, *x.shape[2:])[self.at]


class Reference:
    """A family's classifier, and numbers of `transformers` for three dialogues."""

    def __init__(self, name):
        self.folder = REFERENCE if name == 'gpt2' else REFERENCE / name
        self.gradients = REFERENCE / name / 'gradients.safetensors'
        pretrained = weights.load_pretrained(str(self.folder), output=True)
        self.architecture, self.backbone = pretrained.architecture, pretrained.backbone
        _, self.head = pretrained.head
        with np.load(REFERENCE / name / 'numbers.npz') as file:
            self.numbers = dict(file)
        self.lengths = self.numbers['lengths']
        self.dialogues = np.split(self.numbers['tokens'], np.cumsum(self.lengths)[:-1])
        self.transformer = Transformer(self.architecture)

    @property
    def blocks(self):
        """What each block gives [layers, T, D]."""
        return [self.numbers[f'block_{i}'] for i in range(self.architecture.num_layers)]

    @property
    def output(self):
        """What a head reads [T, D]: BERT has no norm after its last block."""
        return self.numbers.get('output', self.blocks[-1])


@functools.cache
def reference(name):
    return Reference(name)


@pytest.fixture(scope='module', params=list(FAMILIES))
def ref(request):
    return reference(request.param)


@pytest.fixture(scope='module', params=['dense', 'tiled'])
def implementation(request):
    return request.param


@pytest.fixture(scope='module')
def gpt2():
    return reference('gpt2')


@pytest.fixture(scope='module')
def numbers():
    """Of GPT-2: outputs of every module for padded rows, one of them at later positions."""
    with np.load(REFERENCE / 'gpt2.npz') as file:
        return dict(file)


def _rows(ref, rows, length):
    """Lays out lists of segments; a segment is a list of dialogues that share its prompt."""
    shape = 4, len(rows), length
    tokens, positions, segments, responses = arrays = np.zeros(shape, np.int32)
    starts = np.cumsum(ref.lengths) - ref.lengths
    prompt = int(np.argmin(np.equal(*(dialogue[:8] for dialogue in ref.dialogues[:2]))))
    at, of = [], []
    for row, members in enumerate(rows):
        column = 0
        for number, members_of in enumerate(members, start=1):
            shared = prompt if len(members_of) > 1 else 0
            parts = [(0, members_of[0], 0, shared)] if shared else []
            parts += [(k, dialogue, shared, ref.lengths[dialogue])
                      for k, dialogue in enumerate(members_of, start=int(shared > 0))]
            for response, dialogue, first, last in parts:
                here = slice(column, column + last - first)
                tokens[row, here] = ref.dialogues[dialogue][first:last]
                positions[row, here] = np.arange(first, last)
                segments[row, here] = number
                responses[row, here] = response
                for whose in [dialogue] if response or not shared else members_of:
                    at.extend(row * length + np.arange(here.start, here.stop))
                    of.extend(starts[whose] + np.arange(first, last))
                column = here.stop
        assert column <= length
    at, of = np.array(at), np.array(of)
    read = starts + (ref.lengths - 1 if ref.architecture.causal else 0)
    return Rows(*arrays, at, of, np.array([at[of == token][0] for token in read]))


def alone(ref):
    """One dialogue a row."""
    return _rows(ref, [[[0]], [[1]], [[2]]], 16)


def packed(ref):
    """Many in a row; decoders lay out a prompt once. In the first row the two that share it cross
    from the first tile of 64 tokens to the second, the second row holds them in another order."""
    fill = [[2]] * (60 // int(ref.lengths[2]))
    both, other = ([[0, 1]], [[1, 0]]) if ref.architecture.causal else ([[0], [1]], [[1], [0]])
    return _rows(ref, [[*fill, *both, [2]], [[2], *other]], 96)


@functools.partial(jax.jit, static_argnames=('model', 'implementation', 'taps', 'look'))
def _run(model, params, rows, implementation, reads=None, taps=(), look=lambda x: x):
    contexts = model.contexts(rows.segments, rows.responses, rows.positions, implementation)
    return model(params, model.embed(params, rows.tokens, rows.positions), contexts, reads,
                 taps=taps, look=look)


@functools.partial(jax.jit, static_argnames=('model', 'implementation'))
def _rewards_and_gradient(model, params, head, rows, outgoing, implementation):
    """Rewards [3, N], and the gradient of their sum weighted with `outgoing`."""

    def total(params, head):
        contexts = model.contexts(rows.segments, rows.responses, rows.positions, implementation)
        embedded = model.embed(params, rows.tokens, rows.positions)
        hidden, _ = model(params, embedded, contexts, rows.reads)
        rewards = model.pool(params, hidden) @ head['kernel'] + head.get('bias', 0.0)
        return jnp.sum(rewards * outgoing), rewards

    (_, rewards), gradient = jax.value_and_grad(total, (0, 1), has_aux=True)(params, head)
    return rewards, *gradient


def _assert_close(actual, expected, tolerance=TOLERANCE):
    """Absolutely, where numbers are of size 1; else in units of their size."""
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0,
                               atol=tolerance * max(1.0, np.std(expected)))


def _assert_same_gradient(actual, expected, tolerance=1e-4):
    """Leaf by leaf, in units of its largest element."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(expected), strict=True)
    for path, x, y in zip(paths, jax.tree.leaves(actual), leaves, strict=True):
        name = jax.tree_util.keystr(path)
        assert np.max(np.abs(y)) > 1e-3, name
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.max(np.abs(y)), err_msg=name)


def _block(params, i):
    return jax.tree.map(lambda leaf: leaf[i], params['blocks'])


# Parity with `transformers`, float32, at most 1e-5.


def test_what_enters_the_first_block_matches_transformers(ref):
    rows = alone(ref)
    embedded = ref.transformer.embed(ref.backbone, rows.tokens, rows.positions)
    assert embedded.dtype == jnp.float32
    entered = rows.find(ref.transformer._enter(ref.backbone, embedded))
    _assert_close(entered, ref.numbers['embedding'][rows.of])


def test_modules_of_a_block_match_transformers(ref):
    # Each is given what the one of `transformers` was given.
    a, rows, p = ref.architecture, alone(ref), _block(ref.backbone, BLOCK)
    contexts = ref.transformer.contexts(rows.segments, rows.responses, rows.positions, 'dense')
    context = contexts[BLOCK % len(contexts)]
    whole = transformer._Part(a, None, False)

    def spread(x):  # [T, D] -> [R, L, D]
        spread = np.zeros((rows.tokens.size, x.shape[-1]), np.float32)
        spread[rows.at] = x[rows.of]
        return spread.reshape(*rows.tokens.shape, -1)

    x, checked = ref.blocks[BLOCK - 1], set()
    for branch, function in (
            ('attention', lambda h: transformer._attention(whole, p['attention'], h, context,
                                                           None, 0.0, None)[0]),
            ('mlp', lambda h: transformer._mlp(whole, p['mlp'], h))):

        def check(name, actual):
            _assert_close(rows.find(actual), ref.numbers[name][rows.of])
            checked.add(name)
            return ref.numbers[name]

        h = x
        if 'before' in a.norm_places:
            h = check(f'{branch}_norm', transformer._norm(a, p[f'{branch}_norm'], spread(x)))
        h = check(branch, function(spread(h)))
        if 'sum' in a.norm_places:
            h = x + h
        if a.norm_places != ('before',):
            name = f'{branch}_out_norm'
            h = check(name, transformer._norm(a, p[name], spread(h)))
        x = h if 'sum' in a.norm_places else x + h
    # `transformers` adds these up too.
    _assert_close(x, ref.blocks[BLOCK])
    rest = ('tokens', 'lengths', 'embedding', 'output', 'rewards', 'outgoing', 'logits')
    assert checked == {key for key in ref.numbers if key not in rest and 'block' not in key}


def test_dialogues_alone_match_transformers(ref):
    # With a scan; at some tokens only, in any order and shape, and after some blocks in any order.
    rows, a = alone(ref), ref.architecture
    length = rows.tokens.shape[1]
    reads = np.array([[length + 3, 1], [length, 2 * length + 5]])
    starts = np.cumsum(ref.lengths) - ref.lengths
    read, seen = _run(ref.transformer, ref.backbone, rows, 'dense', reads,
                      taps=(a.num_layers - 1, 1), look=lambda x: x[..., ::2])
    assert read.dtype == jnp.float32
    _assert_close(read, ref.output[[[starts[1] + 3, 1], [starts[1], starts[2] + 5]]])
    for x, i in zip(seen, (a.num_layers - 1, 1), strict=True):
        _assert_close(rows.find(x), ref.blocks[i - 1][rows.of, ::2])


@pytest.mark.parametrize(('implementation', 'stacked'), [('tiled', True), ('dense', False)])
def test_packed_dialogues_match_those_alone(ref, implementation, stacked):
    # Those of `transformers` were computed alone. Every block and every token of a shared prompt.
    rows, a = packed(ref), ref.architecture
    params = ref.backbone if stacked else _unstacked(ref.backbone)
    hidden, seen = _run(ref.transformer, params, rows, implementation,
                        taps=tuple(range(1, a.num_layers)))
    assert np.all(np.isfinite(hidden))
    _assert_close(rows.find(hidden), ref.output[rows.of])
    for x, expected in zip(seen, ref.blocks, strict=False):
        _assert_close(rows.find(x), expected[rows.of])


@pytest.mark.parametrize(
    ('implementation', 'stacked', 'remat'), [('tiled', False, False), ('dense', True, True)])
def test_rewards_and_gradients_match_transformers(
    ref, tmp_path, implementation, stacked, remat
):
    rows = packed(ref)
    params = ref.backbone if stacked else _unstacked(ref.backbone)
    rewards, gradient, of_head = _rewards_and_gradient(
        dataclasses.replace(ref.transformer, remat=remat), params, ref.head, rows,
        ref.numbers['outgoing'], implementation)
    _check_gradients(ref, tmp_path, rewards, _stacked(gradient), of_head)


def _unstacked(backbone):
    return unstack_blocks({'backbone': backbone})['backbone']


def _stacked(backbone):
    return stack_blocks({'backbone': backbone})['backbone']


def _check_gradients(ref, folder, rewards, gradient, of_head):
    _assert_close(rewards, ref.numbers['rewards'])
    # Gradients have the names and shapes of what they are of, so they are read as weights are.
    shutil.copyfile(ref.folder / 'config.json', folder / 'config.json')
    shutil.copyfile(ref.gradients, folder / 'model.safetensors')
    expected = weights.load_pretrained(str(folder))
    if not ref.architecture.first_norm:
        # There is none in the checkpoint, for which it has ones and zeros.
        for tree in (expected.backbone, gradient):
            norm = tree['blocks']['attention_norm']
            if tree is gradient:
                assert not any(np.any(leaf[0]) for leaf in norm.values())
            tree['blocks']['attention_norm'] = {key: leaf[1:] for key, leaf in norm.items()}
    gradient.pop('output', None)  # of a language model
    _assert_same_gradient({'backbone': gradient, 'head': of_head},
                          {'backbone': expected.backbone, 'head': expected.head[1]})


def test_kernel_for_gpus_matches_transformers(tmp_path):
    # Windows, caps and grouped heads at once, interpreted.
    ref = reference('gemma2')
    a = ref.architecture
    assert a.attention_cap > 0
    assert a.num_kv_heads < a.num_heads
    assert {layer.window for layer in a.layers} == {0, 4}
    _check_gradients(ref, tmp_path, *_rewards_and_gradient(
        ref.transformer, ref.backbone, ref.head, packed(ref), ref.numbers['outgoing'], 'pallas'))


@pytest.mark.parametrize('name', DECODERS)
def test_logits_match_language_models(name):
    # Tied or not, capped or not, from hidden states of `transformers`.
    ref = reference(name)
    assert ('output' in ref.backbone) == (not ref.architecture.tied)
    logits = ref.transformer.logits(ref.backbone, ref.output)
    assert logits.dtype == jnp.float32
    _assert_close(logits, ref.numbers['logits'])
    if ref.architecture.logit_cap:
        assert 0.9 < np.max(np.abs(logits)) / ref.architecture.logit_cap < 1


def test_references_cover_what_there_is():
    found = [reference(name).architecture for name in FAMILIES]
    for field, values in {
        'tied': {True, False}, 'norm': {'layer', 'rms'}, 'norm_offset': {0.0, 1.0},
        'norm_places': set(PLACES), 'pooler': set(POOLERS),
        'query_key_norm': {'', 'head', 'projection'}, 'causal': {True, False},
        'gated': {True, False}, 'qkv_bias': {True, False}, 'output_bias': {True, False},
        'mlp_bias': {True, False}, 'first_norm': {True, False}, 'final_norm': {True, False},
    }.items():
        assert {getattr(a, field) for a in found} == values
    layers = [layer for a in found for layer in a.layers]
    assert {layer.rotary and layer.rotary.scaling for layer in layers} == {
        None, *SCALINGS}
    # Windows are shorter than the dialogues.
    assert {layer.window for layer in layers} == {0, 3, 4, 5}


# GPT-2's first reference: padded rows, one of them at later positions.


@pytest.fixture(scope='module')
def padded(numbers):
    """Its rows, and [R, L] bool, tokens that are not padding."""
    tokens, positions = numbers['tokens'], numbers['positions']
    real = np.arange(tokens.shape[1]) < numbers['lengths'][:, None]
    reads = np.arange(len(tokens)) * tokens.shape[1] + numbers['lengths'] - 1
    return Rows(tokens, positions, real.astype(np.int32), np.zeros_like(tokens), None, None,
                reads), real


def test_positions_may_start_later(gpt2, numbers, padded, implementation):
    rows, real = padded
    hidden, _ = _run(gpt2.transformer, gpt2.backbone, rows, implementation)
    assert hidden.dtype == jnp.float32
    _assert_close(hidden[real], numbers['output'][real])


def test_norm_of_the_embedding_matches_transformers(gpt2, numbers, padded):
    # Blocks without output projections add nothing, which leaves the embedding and the norm.
    blocks = jax.tree.map(jnp.zeros_like, gpt2.backbone['blocks'])
    hidden, _ = _run(gpt2.transformer, gpt2.backbone | {'blocks': blocks}, padded[0], 'dense')
    _assert_close(hidden, numbers['normed_embedding'])


@pytest.mark.parametrize('outputs', [1, 10])
def test_heads_read_what_sequence_classifiers_read(gpt2, numbers, padded, outputs):
    last, _ = _run(gpt2.transformer, gpt2.backbone, padded[0], 'dense', padded[0].reads)
    kernel = gpt2.head['kernel'] if outputs == 10 else numbers['score_1'].T
    head = HeadConfig('quantile', 10) if outputs == 10 else HeadConfig('scalar')
    found = heads.apply(head, {'kernel': kernel}, last)
    _assert_close(found, numbers[f'rewards_{outputs}'])
    means = head.read(found).distribution.mean
    _assert_close(means, numbers[f'rewards_{outputs}'].mean(axis=1))


# Parity with the `transformers` that is installed: other seeds, sizes and settings.

_LIVE_ENCODER = dict(
    vocab_size=23, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=3, max_position_embeddings=160, pad_token_id=22)
_LIVE = _LIVE_ENCODER | dict(num_key_value_heads=3, bos_token_id=21, eos_token_id=21)
_SHORT = {'rope_type': 'default', 'rope_theta': 20.0}
LIVE = {
    'gpt2': dict(vocab_size=23, n_positions=160, n_embd=24, n_layer=2, n_head=3, n_inner=40,
                 pad_token_id=22, bos_token_id=21, eos_token_id=21, activation_function='gelu',
                 layer_norm_epsilon=1e-3),
    'llama': _LIVE | dict(rope_theta=300.0, tie_word_embeddings=True),
    'mistral': _LIVE | dict(sliding_window=None, rope_parameters=_SHORT | {'rope_type': 'linear',
                                                                           'factor': 3.0}),
    'qwen2': _LIVE | dict(
        use_sliding_window=True, sliding_window=33, rope_parameters=_SHORT,
        layer_types=['sliding_attention', 'full_attention', 'sliding_attention']),
    'qwen3': _LIVE | dict(head_dim=16, rope_parameters=_SHORT, num_key_value_heads=1),
    'gemma2': _LIVE | dict(
        head_dim=16, sliding_window=70, query_pre_attn_scalar=24, attn_logit_softcapping=None,
        final_logit_softcapping=None, attention_bias=True, rope_parameters=_SHORT,
        tie_word_embeddings=False),
    'gemma3_text': _LIVE | dict(
        head_dim=4, sliding_window=17, query_pre_attn_scalar=3, final_logit_softcapping=2.0,
        sliding_window_pattern=2, rope_local_base_freq=7.0,
        rope_theta=50.0),
    'olmo2': _LIVE | dict(num_key_value_heads=1, hidden_act='gelu', rope_parameters={
        'rope_type': 'llama3', 'rope_theta': 100.0, 'factor': 8.0, 'low_freq_factor': 1.0,
        'high_freq_factor': 2.0, 'original_max_position_embeddings': 20}),
    'bert': _LIVE_ENCODER | dict(hidden_act='relu', type_vocab_size=3, layer_norm_eps=1e-2),
    'modernbert': _LIVE_ENCODER | dict(
        bos_token_id=20, eos_token_id=21, cls_token_id=20, sep_token_id=21, norm_eps=1e-2,
        local_attention=35, global_attn_every_n_layers=2, global_rope_theta=200.0,
        local_rope_theta=30.0),
}


@pytest.mark.parametrize('outputs', [1, 4])
@pytest.mark.parametrize('name', FAMILIES)
def test_matches_installed_transformers(tmp_path, name, outputs):
    torch = pytest.importorskip('torch')
    import transformers

    torch.manual_seed(outputs)
    family = FAMILIES[name]
    config = transformers.AutoConfig.for_model(name, **LIVE[name], num_labels=outputs)
    model = getattr(transformers, family.classifier)._from_config(
        config, attn_implementation='eager').eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    # No token is padding, so `transformers` reads the last one; two tiles of 64 tokens.
    tokens = np.random.default_rng(0).integers(0, 20, (2, 90))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()

    _, a, backbone, (_, head) = weights.load_pretrained(str(tmp_path))
    ones = np.ones_like(tokens)
    rows = Rows(tokens, np.cumsum(ones, axis=1) - 1, ones, 0 * ones, None, None,
                np.array([89, 179] if a.causal else [0, 90]))
    model = Transformer(a)
    hidden, _ = _run(model, backbone, rows, 'tiled', rows.reads)
    actual = model.pool(backbone, hidden) @ head['kernel'] + head.get('bias', 0.0)
    assert np.min(np.abs(expected[0] - expected[1])) > 0.01
    _assert_close(actual, expected, tolerance=2e-5)


@pytest.mark.parametrize('name', FAMILIES)
def test_families_are_classes_of_installed_transformers(name):
    torch = pytest.importorskip('torch')
    import transformers

    family = FAMILIES[name]
    settings = {key: value for key, value in LIVE[name].items() if value is not None}
    config = transformers.AutoConfig.for_model(name, **settings)
    # A language model's tensors are those of the backbone and of its output.
    with torch.device('meta'):
        model = getattr(transformers, family.language_model)(config)
    tensors = {key.removeprefix(family.prefix): tuple(tensor.shape)
               for key, tensor in model.state_dict().items()}
    for path, leaf in leaves(families.architecture(config.to_dict())).items():
        if path.startswith('pooler/'):
            continue
        row = family.tensors[path]
        for i in range(config.num_hidden_layers if path.startswith('blocks/') else 1):
            for key in row.names:
                if key.format(i) == 'layers.0.attn_norm.weight':
                    continue  # the first norm of ModernBERT, which has none
                shape = tensors.pop(key.format(i))
                assert len(row.names) > 1 or sorted(shape) == sorted(
                    leaf.shape[path.startswith('blocks/'):])
    # What is left is the language model's own; ModernBERT's has the pooler of its classifier.
    known = f'lm_head.weight|head.*|{family.language_head}|{family.buffers}'
    assert not [key for key in tensors if not re.fullmatch(known, key)]


@pytest.mark.parametrize('rotary', [
    Rotary(10000.0), Rotary(1e6, 'linear', 8.0), Rotary(500000.0, 'llama3', 8.0, 1.0, 4.0, 8192),
    Rotary(500000.0, 'llama3', 32.0, 1.0, 4.0, 8192), Rotary(20.0, 'llama3', 3.0, 2.0, 9.0, 100)])
def test_frequencies_match_installed_transformers(rotary):
    pytest.importorskip('torch')
    import transformers
    from transformers import modeling_rope_utils
    from transformers.models.llama import modeling_llama

    parameters = {'rope_type': rotary.scaling, 'rope_theta': rotary.base}
    if rotary.scaling != 'default':
        parameters['factor'] = rotary.factor
    if rotary.scaling == 'llama3':
        parameters |= {'low_freq_factor': rotary.low, 'high_freq_factor': rotary.high,
                       'original_max_position_embeddings': rotary.positions}
    config = transformers.LlamaConfig(head_dim=64, rope_parameters=parameters)
    plain = modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters
    function = modeling_rope_utils.ROPE_INIT_FUNCTIONS.get(rotary.scaling, plain)
    expected, factor = function(config)
    assert factor == 1.0
    np.testing.assert_allclose(rotary.frequencies(64), expected.numpy(), rtol=3e-6)


# Rotary positions.


def test_frequencies_by_hand():
    # 16^(-i / 4): wavelengths of 2 pi times 1, 2, 4, 8.
    assert Rotary(16.0).frequencies(8).dtype == np.float32
    np.testing.assert_allclose(Rotary(16.0).frequencies(8), [1, 0.5, 0.25, 0.125], rtol=1e-6)
    np.testing.assert_allclose(Rotary(16.0, 'linear', 4.0).frequencies(8),
                               [0.25, 0.125, 0.0625, 0.03125], rtol=1e-6)
    # In 16 pi positions they turn 8, 4, 2 times and once. Four turns or more are kept, one is
    # divided by the factor, and two are a third of the way from 1 to 4:
    # 1/4 * (1/3 + 2/3 * 1/4) = 1/8.
    llama = Rotary(16.0, 'llama3', 4.0, 1.0, 4.0, 16 * math.pi)
    np.testing.assert_allclose(llama.frequencies(8), [1, 0.5, 0.125, 0.03125], rtol=1e-6)
    # Up to two turns are divided; four are half of the way from 2 to 6: 1/2 * (1/2 + 1/2 * 1/4).
    llama = Rotary(16.0, 'llama3', 4.0, 2.0, 6.0, 16 * math.pi)
    np.testing.assert_allclose(llama.frequencies(8), [1, 0.3125, 0.0625, 0.03125], rtol=1e-6)


def test_rotation_by_hand():
    # A quarter turn of the pair (1, 3), half a turn of the pair (2, 4).
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])[None, None, None]
    turns = jnp.asarray([math.pi / 2, math.pi])[None, None]
    turned = transformer._rotate(x, jnp.cos(turns), jnp.sin(turns))[0, 0, 0]
    np.testing.assert_allclose(turned, [-3.0, -2.0, 1.0, -4.0], atol=1e-6)


@pytest.mark.parametrize(('change', 'message'), [
    ({'scaling': 'yarn'}, "rotary scaling 'yarn', expected one of"),
    ({'base': 0.0}, 'rotary base=0.0, expected a positive number'),
    ({'base': None}, 'rotary base=None, expected a positive number'),
    ({'base': '10000'}, "rotary base='10000', expected a positive number"),
    ({'factor': True}, 'rotary factor=True, expected a positive number'),
    ({'factor': float('nan')}, 'rotary factor=nan, expected a positive number'),
    ({'scaling': 'llama3', 'low': 4.0, 'high': 4.0}, 'rotary low=4.0, expected less than high=4'),
])
def test_rotary_errors(change, message):
    with pytest.raises(ValueError, match=message):
        Rotary(**{'base': 10000.0} | change)


# Contexts.


def test_blocks_of_a_kind_share_a_context():
    near, far = Layer(Rotary(10.0), 4), Layer(Rotary(100.0))
    a = dataclasses.replace(TINY, num_layers=5, layers=(near, near, far, Layer(Rotary(10.0), 9)))
    zeros = jnp.zeros((1, 8), jnp.int32)
    contexts = Transformer(a).contexts(zeros, zeros, zeros, 'dense')
    first, second, third, fourth = contexts
    assert first is second
    assert third.plan is not first.plan
    # No dialogue is longer than a row of 8: a window of 9 is none, with the angles of the first.
    assert fourth.plan is third.plan
    assert fourth.rotary is first.rotary
    pick, kinds = transformer._by_kind(contexts, 5)
    np.testing.assert_array_equal(kinds, [0, 0, 1, 2, 0])
    np.testing.assert_array_equal(pick(kinds[4]).rotary[0], first.rotary[0])
    assert a.layer(4) is near


def test_contexts_of_one_kind_are_not_indexed():
    zeros = jnp.zeros((1, 8), jnp.int32)
    contexts = Transformer(TINY).contexts(zeros, zeros, zeros, 'dense')
    assert contexts[0].rotary is None
    pick, kinds = transformer._by_kind(contexts, 3)
    assert pick(kinds[2]) is contexts[0]


def _with_token(rows, place, token):
    """A copy: on CPU a computation that has not begun may still read the array it was given."""
    tokens = rows.tokens.copy()
    tokens[0, place] = token
    return rows._replace(tokens=tokens)


@pytest.mark.parametrize('name', DECODERS)
def test_masked_tokens_have_no_influence(name, implementation):
    ref = reference(name)
    segments, responses = [[1, 1, 1, 1, 2, 2, 0]], [[0, 1, 2, 2, 0, 1, 0]]
    rows = _handmade([[1, 2, 3, 4, 5, 6, 0]], [[0, 1, 1, 2, 0, 1, 0]], segments, responses)
    before, _ = _run(ref.transformer, ref.backbone, rows, implementation)
    # Another first response: its own state changes, those of the others not by a bit.
    other = _with_token(rows, 1, 9)
    after, _ = _run(ref.transformer, ref.backbone, other, implementation)
    assert np.max(np.abs(after[0, 1] - before[0, 1])) > 0.1
    others = np.array([0, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(after[0, others], before[0, others])


@pytest.mark.parametrize('name', ['bert', 'modernbert'])
def test_neighbours_of_an_encoders_dialogue_have_no_influence(name, implementation):
    ref = reference(name)
    rows = _handmade([[1, 2, 3, 4, 5, 6, 0]], [[0, 1, 2, 3, 0, 1, 0]], [[1, 1, 1, 1, 2, 2, 0]])
    before, _ = _run(ref.transformer, ref.backbone, rows, implementation)
    other = _with_token(rows, 3, 9)
    after, _ = _run(ref.transformer, ref.backbone, other, implementation)
    assert np.min(np.max(np.abs(after - before), axis=-1)[0, :4]) > 1e-2  # also earlier ones
    np.testing.assert_array_equal(after[0, 4:], before[0, 4:])


def _handmade(tokens, positions, segments, responses=None):
    responses = np.zeros_like(segments) if responses is None else responses
    arrays = (np.asarray(x, np.int32) for x in (tokens, positions, segments, responses))
    return Rows(*arrays, None, None, None)


@pytest.mark.parametrize('name', ['gpt2', 'gemma2', 'modernbert'])
def test_padding_gives_no_nan(name, implementation):
    # A row of padding only, and one that ends with it, forward and backward.
    ref = reference(name)
    zeros = np.zeros((2, 4), np.int32)
    rows = _handmade(zeros, zeros, [[0, 0, 0, 0], [1, 1, 0, 0]])
    model = dataclasses.replace(ref.transformer, dtype=jnp.bfloat16)

    def loss(params):
        hidden, _ = _run(model, params, rows, implementation)
        return jnp.sum(hidden[1, 1] ** 2), hidden

    gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(ref.backbone)
    assert np.all(np.isfinite(hidden))
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))


def test_embedding_gradient_is_added_row_by_row(ref):
    rows = alone(ref)
    at = rows.tokens, rows.positions
    outgoing = np.random.default_rng(0).normal(
        size=(*rows.tokens.shape, ref.architecture.hidden_size)).astype(np.float32)
    total = jax.tree.map(jnp.ones_like, ref.backbone)
    added = ref.transformer.add_embedding_gradient(total, outgoing, *at)
    expected = jax.grad(lambda params: jnp.sum(ref.transformer.embed(params, *at) * outgoing))(
        ref.backbone)
    for name in ('tokens', 'positions'):
        assert (name in added) == (name in ref.backbone)
        if name in added:
            np.testing.assert_allclose(added[name], 1 + expected[name], atol=1e-5)
    assert all(added[name] is total[name] for name in added if name not in ('tokens', 'positions'))


# Activations and poolers.


@pytest.mark.parametrize('name', sorted(ACTIVATIONS))
def test_activations_match_closed_forms(name):
    def tanh_gelu(x):  # Hendrycks & Gimpel 2016, section 2
        return 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    closed = {
        'gelu_new': tanh_gelu,
        'gelu_pytorch_tanh': tanh_gelu,
        'gelu': _gelu,
        'relu': lambda x: max(x, 0.0),
        'silu': lambda x: x / (1.0 + math.exp(-x)),
    }
    xs = [-4.0, -1.0, -0.1, 0.0, 0.1, 1.0, 2.5, 6.0]
    actual = ACTIVATIONS[name](jnp.asarray(xs))
    np.testing.assert_allclose(actual, [closed[name](x) for x in xs], atol=1e-6)


def _gelu(x):
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def test_tanh_and_exact_gelu_differ():
    # At 2 they are 1.954598 and 1.954500: enough to tell the two apart at 1e-6.
    x = jnp.float32(2.0)
    assert float(ACTIVATIONS['gelu_new'](x)) == pytest.approx(1.954598, abs=2e-6)
    assert float(ACTIVATIONS['gelu'](x)) == pytest.approx(1.954500, abs=2e-6)


def test_poolers_match_closed_forms():
    small = dataclasses.replace(TINY, hidden_size=2, activation='gelu', norm_epsilon=0.0)
    hidden = jnp.asarray([[1.0, -2.0]])
    dense = {'kernel': jnp.asarray([[0.5, 1.0], [0.25, -1.0]]), 'bias': jnp.asarray([0.5, 0.0])}
    # The dense layer gives 0.5 - 0.5 + 0.5 and 1 + 2.
    plain = Transformer(small)
    assert plain.pool({}, hidden) is hidden
    tanh = Transformer(dataclasses.replace(small, pooler='tanh'))
    np.testing.assert_allclose(tanh.pool({'pooler': {'dense': dense}}, hidden)[0],
                               [math.tanh(0.5), math.tanh(3.0)], rtol=1e-6)
    # A norm of two numbers is -1 and 1, the larger of them 1.
    norm = {'scale': jnp.asarray([2.0, 3.0]), 'bias': jnp.asarray([0.5, 0.0])}
    normed = Transformer(dataclasses.replace(small, pooler='activation_norm', pooler_bias=True))
    params = {'pooler': {'dense': dense, 'norm': norm}}
    np.testing.assert_allclose(normed.pool(params, hidden)[0], [-1.5, 3.0], atol=1e-5)
    # Without a bias 0 and 3; after GELU 0 and 2.99595. The activation is seen with an epsilon.
    rough = dataclasses.replace(small, pooler='activation_norm', norm_epsilon=1.0, norm_bias=False)
    params = {'pooler': {'dense': {'kernel': dense['kernel']}, 'norm': {'scale': jnp.ones(2)}}}
    half = (_gelu(3.0) - 0.0) / 2
    np.testing.assert_allclose(Transformer(rough).pool(params, hidden)[0],
                               np.array([-half, half]) / math.sqrt(half**2 + 1.0), rtol=1e-5)


# Description.


@pytest.mark.parametrize('field', [
    'vocab_size', 'max_positions', 'hidden_size', 'num_layers', 'num_heads', 'num_kv_heads',
    'head_dim', 'intermediate_size'])
@pytest.mark.parametrize('value', [0, -1, 8.0, '8', None, True])
def test_sizes_are_positive_integers(field, value):
    with pytest.raises(ValueError, match=f'{field}={value!r}, expected a positive integer'):
        dataclasses.replace(TINY, **{field: value})


@pytest.mark.parametrize(('change', 'message'), [
    ({'activation': 'swoosh'}, "activation='swoosh', expected one of"),
    ({'activation': ['relu']}, r"activation=\['relu'\], expected one of"),
    ({'norm': 'batch'}, "norm='batch', expected one of"),
    ({'norm_places': ('sum', 'before')}, r"norm_places=\('sum', 'before'\), expected one of"),
    ({'pooler': 'mean'}, "pooler='mean', expected one of"),
    ({'query_key_norm': True}, 'query_key_norm=True, expected one of'),
    ({'norm_epsilon': -1e-5}, 'norm_epsilon=-1e-05, expected a number that is not negative'),
    ({'norm_epsilon': '1e-5'}, "norm_epsilon='1e-5', expected a number that is not negative"),
    ({'attention_cap': None}, 'attention_cap=None, expected a number that is not negative'),
    ({'logit_cap': True}, 'logit_cap=True, expected a number that is not negative'),
    ({'attention_scale': math.nan}, 'attention_scale=nan, expected a number that is not negative'),
    ({'gated': 'yes'}, "gated='yes', expected true or false"),
    ({'qkv_bias': None}, 'qkv_bias=None, expected true or false'),
    ({'tied': 1}, 'tied=1, expected true or false'),
    ({'token_types': -1}, 'token_types=-1, expected'),
    ({'token_types': '2'}, "token_types='2', expected"),
    ({'num_heads': 3}, 'num_heads=3 is not divisible by num_kv_heads=2'),
    ({'layers': ()}, 'layers describe 0 blocks, expected 1 to num_layers=2'),
    ({'layers': (Layer(),) * 3}, 'layers describe 3 blocks, expected 1 to num_layers=2'),
    ({'layers': (Layer(Rotary(10.0)), Layer())}, 'layers with and without rotary positions'),
    ({'layers': (Layer(Rotary(10.0)),), 'head_dim': 3}, 'head_dim=3, expected an even number'),
])
def test_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize('window', [-1, 4.0, '4', None, True])
def test_windows_are_integers(window):
    with pytest.raises(ValueError, match=f'window={window!r}, expected'):
        Layer(window=window)


# Precision.


def test_bfloat16_stays_near_float32(ref):
    rows = packed(ref)
    model = dataclasses.replace(ref.transformer, dtype=jnp.bfloat16)
    hidden, _ = _run(model, ref.backbone, rows, 'dense')
    assert hidden.dtype == jnp.float32
    # bfloat16 keeps 8 bits. In units of rounding (2^-8) of the largest output, what `transformers`
    # computes in bfloat16 is off by up to 9 (Gemma 2) and on average by .45 to .9.
    largest = np.max(np.abs(ref.output))
    error = np.abs(rows.find(hidden) - ref.output[rows.of])
    assert np.max(error) < 16 * 2.0**-8 * largest
    assert np.mean(error) < 1.5 * 2.0**-8 * largest
    assert np.max(error) > 1e-4  # it did compute in bfloat16


@pytest.mark.parametrize('name', ['gpt2', 'gemma3_text', 'olmo2', 'modernbert'])
def test_bfloat16_is_for_activations_only(name):
    # Gradients are as precise as the parameters.
    ref = reference(name)
    model = dataclasses.replace(ref.transformer, dtype=jnp.bfloat16, remat=True)
    run = functools.partial(_rewards_and_gradient, model, implementation='tiled')
    rewards, gradient, _ = jax.eval_shape(
        run, ref.backbone, ref.head, alone(ref), ref.numbers['outgoing'])
    assert rewards.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


def test_rms_norms_are_rounded_before_or_after_they_are_scaled():
    # The mean square of 1 and 3 is 5: x / sqrt(5) is .4472136 and 1.3416408.
    x = jnp.asarray([1.0, 3.0], jnp.bfloat16)
    llama = dataclasses.replace(TINY, norm='rms', norm_epsilon=0.0, norm_rounds=True)
    # Llama rounds to steps of 2^-9 and 2^-7: .447265625 and 1.34375; its weight 1.2 to 1.203125;
    # and the products .53812 and 1.61670 to steps of 2^-8 and 2^-7.
    scaled = transformer._norm(llama, {'scale': jnp.full(2, 1.2)}, x)
    assert scaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled.astype(np.float32), [0.5390625, 1.6171875])
    # Gemma rounds the products .53666 and 1.60997 only, with a weight that is stored less 1.
    gemma = dataclasses.replace(llama, norm_rounds=False, norm_offset=1.0)
    scaled = transformer._norm(gemma, {'scale': jnp.full(2, 0.2)}, x)
    assert scaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled.astype(np.float32), [0.53515625, 1.609375])
    # In float32 they are the same.
    x = x.astype(jnp.float32)
    np.testing.assert_allclose(transformer._norm(llama, {'scale': jnp.full(2, 1.2)}, x),
                               transformer._norm(gemma, {'scale': jnp.full(2, 0.2)}, x), rtol=1e-6)


def test_families_round_as_they_do():
    rounds = {name for name in FAMILIES if reference(name).architecture.norm_rounds}
    assert rounds == {'llama', 'mistral', 'qwen2', 'qwen3'}


@pytest.mark.parametrize(('dtype', 'expected'), [
    (jnp.bfloat16, 6.9375),  # a step of 2^-5
    (jnp.float32, 6.928203),
])
def test_embedding_scale_is_rounded(dtype, expected):
    a = dataclasses.replace(TINY, hidden_size=48, embedding_scale=math.sqrt(48.0))
    entered = Transformer(a, dtype)._enter({}, jnp.ones((1, 1, 48)))
    np.testing.assert_allclose(entered, expected, rtol=1e-7)


# Rematerialisation and dropout.


@pytest.fixture(scope='module')
def dropped(gpt2):
    """Hidden states and gradient of a decoder with dropout: (remat, key) -> both."""
    rows = _handmade([range(4)], [range(4)], np.ones((1, 4)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(remat, key):
        def loss(params):
            model = dataclasses.replace(gpt2.transformer, remat=remat, dropout=0.5)
            contexts = model.contexts(
                jnp.asarray(rows.segments), jnp.asarray(rows.responses),
                jnp.asarray(rows.positions), 'auto', dropout=True)
            embedded = model.embed(params, rows.tokens, rows.positions)
            hidden, _ = model(params, embedded, contexts, dropout_key=key)
            return jnp.sum(jnp.sin(hidden)), hidden

        gradient, hidden = jax.grad(loss, has_aux=True)(gpt2.backbone)
        return hidden, gradient

    return lambda remat, key: run(remat, jax.random.key(key))


def test_remat_changes_nothing(dropped):
    # Also with dropout: what is recomputed must drop what was dropped.
    hidden, gradient = dropped(False, 1)
    hidden_remat, gradient_remat = dropped(True, 1)
    np.testing.assert_allclose(hidden_remat, hidden, rtol=0, atol=1e-6)
    assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(gradient)) > 0.1
    for leaf, other in zip(*map(jax.tree.leaves, (gradient, gradient_remat)), strict=True):
        np.testing.assert_allclose(other, leaf, rtol=1e-4, atol=1e-5)


def test_dropout_is_decided_by_its_key(dropped):
    hidden, _ = dropped(False, 1)
    np.testing.assert_array_equal(dropped(False, 1)[0], hidden)
    assert np.max(np.abs(dropped(False, 2)[0] - hidden)) > 0.1


# Parameters.


def test_unstacked_blocks_stack_again(ref):
    unstacked = _unstacked(ref.backbone)
    assert len(unstacked['blocks']) == ref.architecture.num_layers
    jax.tree.map(np.testing.assert_array_equal, _stacked(unstacked), ref.backbone)


def test_parameters_have_the_layer_axis():
    tree = jax.eval_shape(Transformer(TINY).init, jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))
    assert jax.tree.map(lambda leaf: leaf.shape, tree) == {
        'tokens': (11, 8),
        'positions': (8, 8),
        'blocks': {
            'attention_norm': {'scale': (2, 8), 'bias': (2, 8)},
            'attention': {
                'qkv': {'kernel': (2, 8, 24), 'bias': (2, 24)},
                'output': {'kernel': (2, 8, 8), 'bias': (2, 8)},
            },
            'mlp_norm': {'scale': (2, 8), 'bias': (2, 8)},
            'mlp': {
                'up': {'kernel': (2, 8, 12), 'bias': (2, 12)},
                'down': {'kernel': (2, 12, 8), 'bias': (2, 8)},
            },
        },
        'norm': {'scale': (8,), 'bias': (8,)},
    }


def test_random_parameters_have_the_shapes_of_a_checkpoint(ref):
    tree = jax.eval_shape(functools.partial(ref.transformer.init, output=True), jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), ref.backbone)


def test_norms_start_as_ones():
    # Gemma stores them less 1.
    a = reference('gemma2').architecture
    for architecture, expected in ((TINY, 'ones'), (a, 'zeros')):
        found = leaves(architecture)
        assert {leaf.start for path, leaf in found.items() if path.endswith('scale')} == {expected}
        assert {leaf.start for path, leaf in found.items() if path.endswith('bias')} <= {'zeros'}


def test_initial_scales_are_those_of_gpt2():
    a = dataclasses.replace(TINY, hidden_size=64, num_layers=8, intermediate_size=128, head_dim=32,
                            vocab_size=300, token_types=64, pooler='tanh', tied=False)
    params = jax.jit(functools.partial(Transformer(a).init, output=True))(jax.random.key(0))
    blocks = params['blocks']
    # .02 everywhere, residual projections divided by sqrt(2 * 8) = 4.
    for leaf in (params['tokens'], params['output'], params['types'], blocks['mlp']['up']['kernel'],
                 blocks['attention']['qkv']['kernel'], params['pooler']['dense']['kernel']):
        assert np.std(leaf) == pytest.approx(0.02, rel=0.05)
    for leaf in (blocks['attention']['output']['kernel'], blocks['mlp']['down']['kernel']):
        assert np.std(leaf) == pytest.approx(0.005, rel=0.05)
    # Each layer is drawn on its own, and so is each table.
    kernels = np.asarray(blocks['mlp']['up']['kernel'])
    assert np.max(np.abs(kernels[0] - kernels[1])) > 0.01
    assert np.max(np.abs(params['tokens'] - params['output'])) > 0.01
    assert np.max(np.abs(params['types'] - params['pooler']['dense']['kernel'])) > 0.01


def test_seeds_of_gpt2_keep_their_meaning():
    # First and last element and the sum of magnitudes, as they were before there were families.
    params = Transformer(TINY).init(jax.random.key(3))
    blocks = params['blocks']
    for leaf, first, last, total in (
        (params['tokens'], -0.047566793859, -0.012507718056, 1.58026587963),
        (params['positions'], -0.038864430040, -0.012944542803, 1.00652170181),
        (blocks['attention']['qkv']['kernel'], -0.023245176300, 0.000513084349, 6.45309019089),
        (blocks['attention']['output']['kernel'], -0.006110245828, 0.007394193206, 1.02145171165),
        (blocks['mlp']['up']['kernel'], 0.013486067764, -0.019574854523, 3.33506202698),
        (blocks['mlp']['down']['kernel'], -0.007194742560, -0.000162530981, 1.61970901489),
    ):
        np.testing.assert_allclose(
            [leaf.ravel()[0], leaf.ravel()[-1], np.sum(np.abs(leaf))], [first, last, total],
            rtol=1e-6)
