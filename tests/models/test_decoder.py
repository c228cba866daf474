"""Tests of the decoder: GPT-2 of `transformers`, module by module, then packing and precision.

The numbers of `transformers` are in tests/reference and were made by make_gpt2_reference.py, so
PyTorch is not needed; where it is installed, one test compares with it directly.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.models import attention, weights
from qrm.models import decoder as decoder_lib
from qrm.models.decoder import ACTIVATIONS, Attention, Block, Decoder, DecoderConfig, Mlp
from qrm.rewards import heads
from qrm.rewards.heads import HeadConfig
from tests.helpers import REFERENCE

LAYERS = range(3)
TOLERANCE = 1e-5

TINY = DecoderConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, n_inner=12)


@pytest.fixture(scope='module')
def pretrained():
    return weights.load_pretrained(str(REFERENCE))


@pytest.fixture(scope='module')
def numbers():
    with np.load(REFERENCE / 'gpt2.npz') as file:
        return dict(file)


@pytest.fixture(scope='module')
def real(numbers):
    """[R, L] bool, tokens that are not padding."""
    return np.arange(numbers['tokens'].shape[1]) < numbers['lengths'][:, None]


@pytest.fixture(scope='module', params=['dense', 'tiled'])
def implementation(request):
    return request.param


@pytest.fixture(scope='module')
def plan(real, implementation):
    return _plan(real, jnp.zeros(real.shape), implementation)


def _plan(segments, responses, implementation='dense'):
    return attention.plan(
        jnp.asarray(segments, jnp.int32), jnp.asarray(responses, jnp.int32), implementation)


def _layer(pretrained, i, *names):
    """Parameters of a module of layer i, which are slices of the stacked ones."""
    node = functools.reduce(lambda tree, name: tree[name], names, pretrained.decoder['h'])
    return {'params': jax.tree.map(lambda leaf: leaf[i], node)}


def _assert_close(actual, expected, where, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(actual)[where], expected[where], rtol=0, atol=tolerance)


@functools.partial(jax.jit, static_argnums=0)
def _apply(decoder, params, tokens, positions, plan):
    return decoder(params, decoder.embed(params, tokens, positions), plan)


def _run(config, params, tokens, positions, plan, dtype=jnp.float32):
    # Without rematerialisation, which has a test of its own, this compiles faster.
    return _apply(Decoder(config, dtype, remat=False), params, tokens, positions, plan)


# Parity with `transformers`, float32, at most 1e-5 in every module.


def test_embedding_matches_transformers(pretrained, numbers):
    embedded = Decoder(pretrained.config).embed(
        pretrained.decoder, numbers['tokens'], numbers['positions'])
    assert embedded.dtype == jnp.float32
    _assert_close(embedded, numbers['embedding'], ...)


def test_norm_of_the_embedding_matches_transformers(pretrained, numbers, plan):
    # A block without output projections adds nothing, which leaves the embedding and the norm.
    params = dict(pretrained.decoder)
    silent = {'c_proj': jax.tree.map(jnp.zeros_like, params['h']['attn']['c_proj'])}
    params['h'] = params['h'] | {
        'attn': params['h']['attn'] | silent,
        'mlp': params['h']['mlp']
        | {'c_proj': jax.tree.map(jnp.zeros_like, params['h']['mlp']['c_proj'])},
    }
    hidden = _run(pretrained.config, params, numbers['tokens'], numbers['positions'], plan)
    _assert_close(hidden, numbers['normed_embedding'], ...)


@pytest.mark.parametrize('i', LAYERS)
@pytest.mark.parametrize(('name', 'before'), [('ln_1', 'block'), ('ln_2', 'attention')])
def test_norm_matches_transformers(pretrained, numbers, i, name, before):
    x = numbers['embedding'] if i == 0 else numbers[f'block_{i - 1}']
    if before == 'attention':
        x = x + numbers[f'attention_{i}']
    actual = decoder_lib._norm(pretrained.config, name).apply(_layer(pretrained, i, name), x)
    expected = numbers[f'norm_{i}' if name == 'ln_1' else f'second_norm_{i}']
    _assert_close(actual, expected, ...)


@pytest.mark.parametrize('i', LAYERS)
def test_attention_matches_transformers(pretrained, numbers, real, plan, i):
    module = Attention(pretrained.config, jnp.float32, 0.0)
    actual = module.apply(_layer(pretrained, i, 'attn'), numbers[f'norm_{i}'], plan, None, True)
    _assert_close(actual, numbers[f'attention_{i}'], real)


@pytest.mark.parametrize('i', LAYERS)
def test_mlp_matches_transformers(pretrained, numbers, i):
    module = Mlp(pretrained.config, jnp.float32)
    actual = module.apply(_layer(pretrained, i, 'mlp'), numbers[f'second_norm_{i}'])
    _assert_close(actual, numbers[f'mlp_{i}'], ...)


@pytest.mark.parametrize('i', LAYERS)
def test_block_matches_transformers(pretrained, numbers, real, plan, i):
    x = numbers['embedding'] if i == 0 else numbers[f'block_{i - 1}']
    block = Block(pretrained.config, jnp.float32, 0.0)
    actual = block.apply(_layer(pretrained, i), x, plan)
    _assert_close(actual, numbers[f'block_{i}'], real)
    # At some tokens only, in any order and shape; 1 is in the first row, the others in the second.
    length = real.shape[1]
    reads = jnp.array([[length + 3, 1], [length, length]])
    actual = block.apply(_layer(pretrained, i), x, plan, reads)
    _assert_close(actual, numbers[f'block_{i}'][[[1, 0], [1, 1]], [[3, 1], [0, 0]]], ...)


def test_output_norm_matches_transformers(pretrained, numbers):
    params = {'params': pretrained.decoder['ln_f']}
    actual = decoder_lib._norm(pretrained.config, 'ln_f').apply(params, numbers['block_2'])
    _assert_close(actual, numbers['output'], ...)


def test_decoder_matches_transformers(pretrained, numbers, real, plan):
    hidden = _run(
        pretrained.config, pretrained.decoder, numbers['tokens'], numbers['positions'], plan)
    assert hidden.dtype == jnp.float32
    _assert_close(hidden, numbers['output'], real)


@pytest.mark.parametrize('outputs', [1, 10])
def test_rewards_match_sequence_classification(pretrained, numbers, plan, outputs):
    decoder = Decoder(pretrained.config)
    embedded = decoder.embed(pretrained.decoder, numbers['tokens'], numbers['positions'])
    rows, length = numbers['tokens'].shape
    reads = np.arange(rows) * length + numbers['lengths'] - 1
    last = jax.jit(decoder.__call__)(pretrained.decoder, embedded, plan, reads)
    kernel = pretrained.score if outputs == 10 else numbers['score_1'].T
    head = HeadConfig('quantile', 10) if outputs == 10 else HeadConfig('scalar')
    found = heads.apply(head, {'kernel': kernel}, last)
    _assert_close(found, numbers[f'rewards_{outputs}'], ...)
    means = head.read(found).distribution.mean
    _assert_close(means, numbers[f'rewards_{outputs}'].mean(axis=1), ...)


def test_shared_prompt_matches_dialogues_alone(pretrained, numbers, implementation):
    # The first two dialogues share 5 tokens; with 7 and 4 of their own they fill a row of 18,
    # the last 2 of it padding.
    first, second = numbers['tokens'][:2]
    np.testing.assert_array_equal(first[:5], second[:5])
    row = np.r_[first, second[5:9], 0, 0][None]
    positions = np.r_[:12, 5:9, 0, 0][None]
    segments = np.r_[np.ones(16, int), 0, 0][None]
    responses = np.r_[np.zeros(5, int), np.full(7, 1), np.full(4, 2), 0, 0][None]
    plan = _plan(segments, responses, implementation)
    hidden = _run(pretrained.config, pretrained.decoder, row, positions, plan)[0]
    assert np.all(np.isfinite(hidden))
    _assert_close(hidden[:12], numbers['output'][0], ...)
    _assert_close(hidden[12:16], numbers['output'][1, 5:9], ...)


@pytest.mark.parametrize('outputs', [1, 10])
def test_matches_installed_transformers(tmp_path, outputs):
    torch = pytest.importorskip('torch')
    import transformers

    torch.manual_seed(outputs)
    config = transformers.GPT2Config(
        vocab_size=23, n_positions=16, n_embd=24, n_layer=2, n_head=3, n_inner=40,
        num_labels=outputs, pad_token_id=22, bos_token_id=21, eos_token_id=21,
        activation_function='gelu', layer_norm_epsilon=1e-3, initializer_range=0.3,
    )
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    # No token is padding, so `transformers` reads the last one.
    tokens = np.random.default_rng(0).integers(0, 21, (3, 9))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()

    pretrained = weights.load_pretrained(str(tmp_path))
    positions = np.tile(np.arange(9), (3, 1))
    plan = _plan(np.ones((3, 9)), np.zeros((3, 9)))
    hidden = _run(pretrained.config, pretrained.decoder, tokens, positions, plan)[:, -1]
    head = HeadConfig('quantile', outputs)
    actual = heads.apply(head, {'kernel': pretrained.score}, hidden)
    assert np.std(expected) > 0.1
    _assert_close(actual, expected, ..., tolerance=1e-4)


# Activations.


@pytest.mark.parametrize('name', sorted(ACTIVATIONS))
def test_activations_match_closed_forms(name):
    def tanh_gelu(x):  # Hendrycks & Gimpel 2016, section 2
        return 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    closed = {
        'gelu_new': tanh_gelu,
        'gelu_pytorch_tanh': tanh_gelu,
        'gelu': lambda x: 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0))),
        'relu': lambda x: max(x, 0.0),
        'silu': lambda x: x / (1.0 + math.exp(-x)),
    }
    xs = [-4.0, -1.0, -0.1, 0.0, 0.1, 1.0, 2.5, 6.0]
    actual = ACTIVATIONS[name](jnp.asarray(xs))
    np.testing.assert_allclose(actual, [closed[name](x) for x in xs], atol=1e-6)


def test_tanh_and_exact_gelu_differ():
    # At 2 they are 1.954598 and 1.954500: enough to tell the two apart at 1e-6.
    x = jnp.float32(2.0)
    assert float(ACTIVATIONS['gelu_new'](x)) == pytest.approx(1.954598, abs=2e-6)
    assert float(ACTIVATIONS['gelu'](x)) == pytest.approx(1.954500, abs=2e-6)


# Configuration.


def test_config_errors_name_the_field():
    values = dataclasses.asdict(TINY)
    for field in ('vocab_size', 'n_positions', 'n_embd', 'n_layer', 'n_head', 'n_inner'):
        for value in (0, -1):
            with pytest.raises(ValueError, match=f'{field}={value}, expected a positive integer'):
                DecoderConfig(**values | {field: value})
    with pytest.raises(ValueError, match='n_embd=8 is not divisible by n_head=3'):
        DecoderConfig(**values | {'n_head': 3})
    with pytest.raises(ValueError, match="activation_function='swoosh', expected one of"):
        DecoderConfig(**values | {'activation_function': 'swoosh'})


@pytest.mark.parametrize('value', [8.0, '8', None])
def test_config_sizes_are_integers(value):
    with pytest.raises(ValueError, match=r'n_embd=.*, expected a positive integer'):
        DecoderConfig(**dataclasses.asdict(TINY) | {'n_embd': value})


# Packed rows.


def test_masked_tokens_have_no_influence(pretrained, implementation):
    plan = _plan([[1, 1, 1, 1, 2, 2, 0]], [[0, 1, 2, 2, 0, 1, 0]], implementation)
    positions = jnp.array([[0, 1, 1, 2, 0, 1, 0]])
    run = functools.partial(_run, pretrained.config, pretrained.decoder)
    before = run(jnp.array([[1, 2, 3, 4, 5, 6, 0]]), positions, plan)[0]
    # Another first response: its own state changes, those of the others not by a bit.
    after = run(jnp.array([[1, 9, 3, 4, 5, 6, 0]]), positions, plan)[0]
    assert np.max(np.abs(after[1] - before[1])) > 0.1
    others = np.array([0, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(after[others], before[others])


def test_padding_gives_no_nan(pretrained, implementation):
    # A row of padding only, and one that ends with it, forward and backward.
    tokens = positions = jnp.zeros((2, 4), jnp.int32)
    plan = _plan([[0, 0, 0, 0], [1, 1, 0, 0]], np.zeros((2, 4)), implementation)

    def loss(params):
        hidden = _run(pretrained.config, params, tokens, positions, plan, jnp.bfloat16)
        return jnp.sum(hidden[1, 1] ** 2), hidden

    gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(pretrained.decoder)
    assert np.all(np.isfinite(hidden))
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))


# Precision, rematerialisation, parameters.


def test_bfloat16_stays_near_float32(pretrained, numbers, real, plan):
    hidden = _run(pretrained.config, pretrained.decoder, numbers['tokens'],
                  numbers['positions'], plan, dtype=jnp.bfloat16)
    assert hidden.dtype == jnp.float32
    # bfloat16 keeps 8 bits. The outputs are about 1; over three blocks the error stays within
    # 8 units of rounding (2^-8) at the worst and within 2 on average.
    error = np.abs(np.asarray(hidden) - numbers['output'])[real]
    assert np.max(error) < 8 * 2.0**-8 * np.max(np.abs(numbers['output']))
    assert np.mean(error) < 2 * 2.0**-8 * np.max(np.abs(numbers['output']))
    assert np.max(error) > 1e-4  # it did compute in bfloat16


@pytest.fixture(scope='module')
def dropped(pretrained):
    """Hidden states and gradient of a decoder with dropout: (remat, key) -> both."""
    tokens = positions = jnp.arange(4)[None]
    plan = _plan(np.ones((1, 4)), np.zeros((1, 4)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(remat, key):
        def loss(params):
            decoder = Decoder(pretrained.config, remat=remat, dropout=0.5)
            embedded = decoder.embed(params, tokens, positions)
            hidden = decoder(params, embedded, plan, dropout_key=key)
            return jnp.sum(jnp.sin(hidden)), hidden

        gradient, hidden = jax.grad(loss, has_aux=True)(pretrained.decoder)
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


def test_parameters_have_the_layer_axis():
    tree = jax.eval_shape(Decoder(TINY).init, jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))
    assert jax.tree.map(lambda leaf: leaf.shape, tree) == {
        'wte': (11, 8),
        'wpe': (8, 8),
        'h': {
            'ln_1': {'scale': (2, 8), 'bias': (2, 8)},
            'attn': {
                'c_attn': {'kernel': (2, 8, 24), 'bias': (2, 24)},
                'c_proj': {'kernel': (2, 8, 8), 'bias': (2, 8)},
            },
            'ln_2': {'scale': (2, 8), 'bias': (2, 8)},
            'mlp': {
                'c_fc': {'kernel': (2, 8, 12), 'bias': (2, 12)},
                'c_proj': {'kernel': (2, 12, 8), 'bias': (2, 8)},
            },
        },
        'ln_f': {'scale': (8,), 'bias': (8,)},
    }


def test_initial_scales_are_those_of_gpt2():
    config = dataclasses.replace(TINY, n_embd=64, n_inner=128, n_layer=8, vocab_size=300)
    params = jax.jit(Decoder(config).init)(jax.random.key(0))
    blocks = params['h']
    # .02 everywhere, residual projections divided by sqrt(2 * 8) = 4.
    assert np.std(params['wte']) == pytest.approx(0.02, rel=0.05)
    assert np.std(blocks['attn']['c_attn']['kernel']) == pytest.approx(0.02, rel=0.05)
    assert np.std(blocks['mlp']['c_fc']['kernel']) == pytest.approx(0.02, rel=0.05)
    assert np.std(blocks['attn']['c_proj']['kernel']) == pytest.approx(0.005, rel=0.05)
    assert np.std(blocks['mlp']['c_proj']['kernel']) == pytest.approx(0.005, rel=0.05)
    # Each layer is drawn on its own.
    kernels = np.asarray(blocks['mlp']['c_fc']['kernel'])
    assert np.max(np.abs(kernels[0] - kernels[1])) > 0.01
