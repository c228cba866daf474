"""Tests of pretrained weights: the Hugging Face layout, and every way in which it can be wrong.

Checkpoints are tiny; the one of `transformers` in tests/reference gives the numbers.
"""

import json
import pathlib

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import flax as safetensors_flax
from safetensors import numpy as safetensors_numpy

import qrm
from qrm.data.comparisons import DataError
from qrm.models import weights
from qrm.models.decoder import DecoderConfig
from tests.helpers import REFERENCE, reference_checkpoint, write_tokenizer

CONFIG = {
    'model_type': 'gpt2', 'vocab_size': 7, 'n_positions': 5, 'n_embd': 4, 'n_layer': 2,
    'n_head': 2, 'n_inner': None, 'activation_function': 'gelu_new',
}
WIDTH, INNER = 4, 16  # n_inner is null, which means 4 * n_embd


def _tensors(dtype=np.float32):
    """A language model without prefix; all shapes are spelt out, all values differ."""
    shapes = {'wte.weight': (7, WIDTH), 'wpe.weight': (5, WIDTH)}
    for i in range(2):
        shapes |= {
            f'h.{i}.ln_1.weight': (WIDTH,), f'h.{i}.ln_1.bias': (WIDTH,),
            f'h.{i}.attn.c_attn.weight': (WIDTH, 3 * WIDTH),
            f'h.{i}.attn.c_attn.bias': (3 * WIDTH,),
            f'h.{i}.attn.c_proj.weight': (WIDTH, WIDTH), f'h.{i}.attn.c_proj.bias': (WIDTH,),
            f'h.{i}.ln_2.weight': (WIDTH,), f'h.{i}.ln_2.bias': (WIDTH,),
            f'h.{i}.mlp.c_fc.weight': (WIDTH, INNER), f'h.{i}.mlp.c_fc.bias': (INNER,),
            f'h.{i}.mlp.c_proj.weight': (INNER, WIDTH), f'h.{i}.mlp.c_proj.bias': (WIDTH,),
        }
    shapes |= {'ln_f.weight': (WIDTH,), 'ln_f.bias': (WIDTH,)}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _write(folder, tensors, config=CONFIG, name='model.safetensors'):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    safetensors_numpy.save_file(tensors, folder / name)
    return str(folder)


def _refused(folder, *messages):
    with pytest.raises(DataError) as caught:
        weights.load_pretrained(str(folder))
    for message in (str(folder), *messages):
        assert message in str(caught.value)
    return str(caught.value)


@pytest.fixture
def reward_model(tmp_path):
    return reference_checkpoint(tmp_path)


# What is read.


@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_language_models_with_and_without_prefix(tmp_path, prefix):
    tensors = _tensors()
    folder = _write(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()})
    config, decoder, score = weights.load_pretrained(folder)
    assert config == DecoderConfig(vocab_size=7, n_positions=5, n_embd=4, n_layer=2, n_head=2,
                                   n_inner=16)
    assert score is None
    np.testing.assert_array_equal(decoder['wte'], tensors['wte.weight'])
    np.testing.assert_array_equal(decoder['wpe'], tensors['wpe.weight'])
    np.testing.assert_array_equal(decoder['ln_f']['scale'], tensors['ln_f.weight'])
    np.testing.assert_array_equal(decoder['ln_f']['bias'], tensors['ln_f.bias'])
    places = {
        'ln_1.weight': ('ln_1', 'scale'), 'ln_1.bias': ('ln_1', 'bias'),
        'ln_2.weight': ('ln_2', 'scale'), 'ln_2.bias': ('ln_2', 'bias'),
        'attn.c_attn.weight': ('attn', 'c_attn', 'kernel'),
        'attn.c_attn.bias': ('attn', 'c_attn', 'bias'),
        'attn.c_proj.weight': ('attn', 'c_proj', 'kernel'),
        'attn.c_proj.bias': ('attn', 'c_proj', 'bias'),
        'mlp.c_fc.weight': ('mlp', 'c_fc', 'kernel'), 'mlp.c_fc.bias': ('mlp', 'c_fc', 'bias'),
        'mlp.c_proj.weight': ('mlp', 'c_proj', 'kernel'),
        'mlp.c_proj.bias': ('mlp', 'c_proj', 'bias'),
    }
    assert len(jax.tree.leaves(decoder)) == 4 + len(places)
    for name, path in places.items():
        leaf = decoder['h']
        for part in path:
            leaf = leaf[part]
        for i in range(2):
            np.testing.assert_array_equal(leaf[i], tensors[f'h.{i}.{name}'])


def test_square_projection_is_not_transposed(tmp_path):
    # It would fit transposed as well, and be wrong.
    tensors = _tensors()
    kernel = np.zeros((WIDTH, WIDTH), np.float32)
    kernel[0, 3] = 1.0  # from input 0 to output 3
    tensors['h.1.attn.c_proj.weight'] = kernel
    loaded = weights.load_pretrained(_write(tmp_path, tensors)).decoder
    np.testing.assert_array_equal(loaded['h']['attn']['c_proj']['kernel'][1], kernel)


def test_score_is_transposed(tmp_path):
    # [N, D] in torch, [D, N] here; square, so that shapes alone would not tell.
    score = np.arange(16, dtype=np.float32).reshape(4, 4)
    folder = _write(tmp_path, _tensors() | {'score.weight': score})
    np.testing.assert_array_equal(weights.load_pretrained(folder).score, score.T)


def test_buffers_of_old_checkpoints_are_ignored(tmp_path):
    tensors = _tensors()
    plain = weights.load_pretrained(_write(tmp_path / 'plain', tensors))
    for i in range(2):
        tensors[f'h.{i}.attn.bias'] = np.tril(np.ones((1, 1, 5, 5), np.uint8))
        tensors[f'h.{i}.attn.masked_bias'] = np.array(-1e4, np.float32)
    old = weights.load_pretrained(_write(tmp_path / 'old', tensors))
    jax.tree.map(np.testing.assert_array_equal, old.decoder, plain.decoder)


def test_tied_output_embedding_is_accepted_and_another_refused(tmp_path):
    tensors = _tensors()
    tied = _write(tmp_path / 'tied', tensors | {'lm_head.weight': tensors['wte.weight']})
    assert weights.load_pretrained(tied).score is None
    for name, other in (('untied', tensors['wte.weight'] + 1e-3),
                        ('larger', np.zeros((9, WIDTH), np.float32))):
        folder = _write(tmp_path / name, tensors | {'lm_head.weight': other})
        _refused(folder, 'lm_head.weight differs from wte.weight, expected them tied')


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, np.float64])
def test_other_floats_become_float32(tmp_path, dtype):
    tensors = _tensors(dtype) | {'score.weight': np.ones((3, WIDTH), dtype)}
    if dtype == np.float64:
        _write(tmp_path, tensors)
    else:
        _write(tmp_path, {})
        safetensors_flax.save_file(
            {name: jnp.asarray(tensor) for name, tensor in tensors.items()},
            tmp_path / 'model.safetensors')
    loaded = weights.load_pretrained(str(tmp_path))
    for leaf in jax.tree.leaves((loaded.decoder, loaded.score)):
        assert leaf.dtype == jnp.float32
    # bfloat16 and float16 are contained in float32, so nothing is lost.
    expected = tensors['h.1.mlp.c_fc.weight'].astype(np.float32)
    np.testing.assert_array_equal(loaded.decoder['h']['mlp']['c_fc']['kernel'][1], expected)


# What does not fit.


def test_all_problems_are_reported_together(tmp_path):
    tensors = _tensors()
    del tensors['wpe.weight'], tensors['h.1.ln_2.bias']
    tensors['h.0.mlp.c_fc.weight'] = np.zeros((INNER, WIDTH), np.float32)
    tensors['ln_f.bias'] = np.zeros(WIDTH, np.int32)
    tensors['h.2.ln_1.bias'] = np.zeros(WIDTH, np.float32)
    tensors['score.bias'] = np.zeros(3, np.float32)
    message = _refused(
        _write(tmp_path, tensors),
        'the weights do not fit the architecture of config.json',
        'missing wpe.weight (5, 4)',
        'missing h.1.ln_2.bias (4,)',
        'misshapen h.0.mlp.c_fc.weight (16, 4), expected (4, 16)',
        'ln_f.bias has dtype int32, expected floats',
        'unexpected h.2.ln_1.bias (4,)',
        'unexpected score.bias (3,)',
    )
    assert len(message.splitlines()) == 1 + 6


@pytest.mark.parametrize('shape', [(3, 5), (4,), (1, 3, 4)])
def test_misshapen_score(tmp_path, shape):
    folder = _write(tmp_path, _tensors() | {'score.weight': np.zeros(shape, np.float32)})
    _refused(folder, f'score.weight {shape}, expected (N, 4)')


def test_one_tensor_under_two_names_is_refused(tmp_path):
    tensors = _tensors()
    tensors['transformer.wte.weight'] = tensors['wte.weight'] + 1.0
    _refused(_write(tmp_path, tensors), "wte.weight is there with and without 'transformer.'")


# config.json.


@pytest.mark.parametrize('model_type', ['llama', None])
def test_wrong_model_type(tmp_path, model_type):
    folder = _write(tmp_path, _tensors(), CONFIG | {'model_type': model_type})
    _refused(folder, f"model_type {model_type!r}, expected 'gpt2'")


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('scale_attn_weights', False),
        ('scale_attn_by_inverse_layer_idx', True),
        ('add_cross_attention', True),
        ('tie_word_embeddings', False),
    ],
)
def test_unsupported_settings(tmp_path, key, value):
    folder = _write(tmp_path, _tensors(), CONFIG | {key: value})
    _refused(folder, f'{key}={value}, only {not value} is supported')
    # The supported value may be spelt out.
    assert weights.load_pretrained(_write(tmp_path, _tensors(), CONFIG | {key: not value}))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'activation_function': 'quick'}, "activation_function='quick', expected one of"),
        ({'activation_function': ['relu']}, 'unhashable'),
        ({'n_head': 3}, 'n_embd=4 is not divisible by n_head=3'),
        ({'n_layer': 0}, 'n_layer=0, expected a positive integer'),
        ({'n_embd': '4'}, "n_embd='4', expected a positive integer"),
        ({'n_embd': None}, 'NoneType'),
        ({'n_embd': None, 'n_inner': 16}, 'n_embd=None, expected a positive integer'),
        ({'n_positions': 5.0}, 'n_positions=5.0, expected a positive integer'),
    ],
)
def test_config_that_is_no_architecture(tmp_path, change, message):
    _refused(_write(tmp_path, _tensors(), CONFIG | change), 'config.json', message)


def test_config_without_a_size(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != 'n_head'}
    _refused(_write(tmp_path, _tensors(), config), "config.json has no 'n_head'")


def test_config_settings_reach_the_decoder():
    settings = CONFIG | {'n_inner': 6, 'layer_norm_epsilon': 1e-3, 'initializer_range': 0.5,
                         'activation_function': 'relu'}
    assert weights.decoder_config(settings, 'here') == DecoderConfig(
        vocab_size=7, n_positions=5, n_embd=4, n_layer=2, n_head=2, n_inner=6,
        activation_function='relu', layer_norm_epsilon=1e-3, initializer_range=0.5)


def test_config_missing_or_damaged(tmp_path):
    folder = pathlib.Path(_write(tmp_path, _tensors()))
    path = folder / 'config.json'
    for content in (b'{"model_type": "gpt2", ', b'', b'\xff\xfe'):
        path.write_bytes(content)
        _refused(folder, 'config.json', 'not JSON')
    path.write_text('["gpt2"]')
    _refused(folder, 'config.json', 'expected an object')
    path.unlink()
    _refused(folder, 'config.json: no such file')


# Files.


def _write_sharded(folder, tensors, shard_of):
    shards = {}
    for name, tensor in tensors.items():
        shards.setdefault(shard_of[name], {})[name] = tensor
    for shard, content in shards.items():
        _write(folder, content, name=shard)
    index = {'metadata': {'total_size': 1}, 'weight_map': shard_of}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path):
    tensors = _tensors()
    shard_of = {name: f'model-0000{1 + i % 2}-of-00002.safetensors'
                for i, name in enumerate(tensors)}
    _write_sharded(tmp_path, tensors, shard_of)
    return tmp_path


def _edit_index(folder, edit):
    path = folder / 'model.safetensors.index.json'
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def test_shards_are_read_by_the_index(sharded, tmp_path_factory):
    whole = weights.load_pretrained(_write(tmp_path_factory.mktemp('whole'), _tensors()))
    parts = weights.load_pretrained(str(sharded))
    jax.tree.map(np.testing.assert_array_equal, parts.decoder, whole.decoder)


def test_missing_shard(sharded):
    (sharded / 'model-00002-of-00002.safetensors').unlink()
    _refused(sharded, 'model-00002-of-00002.safetensors: no such file')


def test_index_that_lies(sharded):
    def move(index):
        index['weight_map']['wte.weight'] = 'model-00002-of-00002.safetensors'

    _edit_index(sharded, move)
    _refused(sharded, 'holds other tensors than the index says', "['wte.weight']")


def test_index_that_forgets_a_tensor(sharded):
    _edit_index(sharded, lambda index: index['weight_map'].pop('wpe.weight'))
    _refused(sharded, 'holds other tensors than the index says', "['wpe.weight']")


def test_index_without_a_map(sharded):
    _edit_index(sharded, lambda index: index.pop('weight_map'))
    _refused(sharded, 'model.safetensors.index.json', 'weight_map')


def test_index_does_not_lead_out_of_the_folder(sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp('outside') / 'model-00001-of-00002.safetensors'
    (sharded / outside.name).rename(outside)

    def lead_out(index):
        for name, shard in index['weight_map'].items():
            if shard == outside.name:
                index['weight_map'][name] = str(outside)

    _edit_index(sharded, lead_out)
    _refused(sharded, f'{sharded}/{outside.name}: no such file')


def test_pickles_are_refused_by_name(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80\x04.')
    _refused(tmp_path, 'model.safetensors: no such file', 'pytorch_model.bin is a pickle',
             'safe_serialization=True')


def test_no_weights_at_all(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    message = _refused(tmp_path, 'model.safetensors: no such file')
    assert 'pickle' not in message


def test_damaged_weights(tmp_path):
    folder = pathlib.Path(_write(tmp_path, _tensors()))
    path = folder / 'model.safetensors'
    content = path.read_bytes()
    pointer = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'
    for damaged in (content[:-10], content[:200], content[:4], b'', pointer):
        path.write_bytes(damaged)
        _refused(folder, 'model.safetensors: damaged safetensors file')


# Names.


def test_folders_are_themselves_and_paths_are_not_looked_up(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError('asked the hub for a path')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
    assert weights.resolve(str(tmp_path)) == str(tmp_path)
    for name in (str(tmp_path / 'nothing'), './nothing', '~/nothing', 'a/b/c'):
        with pytest.raises(DataError, match='no such folder, expected a checkpoint folder'):
            weights.resolve(name)


def test_hub_names(monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        # No pickle is fetched.
        assert not any(pattern.endswith(('.bin', '.pt')) for pattern in allow_patterns)
        if name == 'owner/private':
            raise PermissionError('401')
        return '/cache'

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    assert weights.resolve('gpt2') == '/cache'
    with pytest.raises(DataError, match=r'owner/private: .*PermissionError: 401.*local weights'):
        weights.resolve('owner/private')
    assert asked == ['gpt2', 'owner/private']


# Reward models.


@pytest.fixture(scope='module')
def numbers():
    with np.load(REFERENCE / 'gpt2.npz') as file:
        return dict(file)


def _texts(numbers):
    """Prompt and two responses: the first two dialogues of the reference."""
    first, second = (
        [f'w{token}' for token in row[:length - 1]] + ['<eos>']
        for row, length in zip(numbers['tokens'][:2], numbers['lengths'][:2], strict=True))
    assert first[:5] == second[:5]
    return ' '.join(first[:5]), [' ' + ' '.join(row[5:]) for row in (first, second)]


def test_quantile_model_scores_as_transformers(reward_model, numbers):
    model = qrm.load(str(reward_model))
    assert (model.network.head.name, model.network.head.outputs) == ('quantile', 10)
    assert model.network.head.name == 'quantile'
    assert model.max_length == 24
    assert model.loss.objective == 'bradley_terry_quantile_huber'
    prompt, responses = _texts(numbers)
    scores = model.score([prompt], [responses])
    np.testing.assert_allclose(
        scores.quantiles[0], numbers['rewards_10'][:2], rtol=0, atol=2e-5)
    np.testing.assert_allclose(
        scores.rewards[0], numbers['rewards_10'][:2].mean(axis=1), rtol=0, atol=2e-5)


def test_scalar_model_scores_as_transformers(reward_model, numbers):
    path = reward_model / 'model.safetensors'
    tensors = safetensors_numpy.load_file(path) | {'score.weight': numbers['score_1']}
    safetensors_numpy.save_file(tensors, path)
    model = qrm.load(str(reward_model))
    assert (model.network.head.name, model.network.head.outputs) == ('scalar', 1)
    assert model.loss.objective == 'bradley_terry'
    prompt, responses = _texts(numbers)
    scores = model.score([prompt], [responses])
    np.testing.assert_allclose(
        scores.rewards[0], numbers['rewards_1'][:2, 0], rtol=0, atol=2e-5)


def test_max_length_is_at_most_the_positions(reward_model):
    assert qrm.load(str(reward_model), max_length=20).max_length == 20
    with pytest.raises(DataError, match='max_length=25, but the model has 24 positions'):
        qrm.load(str(reward_model), max_length=25)


def test_language_model_is_no_reward_model(tmp_path):
    folder = _write(tmp_path, _tensors())
    write_tokenizer(tmp_path, 7)
    with pytest.raises(DataError, match=r'no score.weight; this is a language model'):
        qrm.load(folder)


def test_tokenizer_larger_than_the_embedding(reward_model):
    write_tokenizer(reward_model, 41)
    with pytest.raises(DataError, match='has 41 tokens, but the embedding has 40 rows'):
        qrm.load(str(reward_model))


def test_no_tokenizer(reward_model):
    # Without these files `transformers` makes a tokenizer that knows no word.
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (reward_model / name).unlink()
    with pytest.raises(DataError, match='no tokenizer.*expected tokenizer.json, or vocab.json'):
        qrm.load(str(reward_model))


def test_damaged_tokenizer(reward_model):
    path = reward_model / 'tokenizer.json'
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match='checkpoint: no tokenizer could be loaded'):
        qrm.load(str(reward_model))


def test_folder_of_runs_names_them(tmp_path):
    for name in ('quantile', 'scalar'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'model.json').write_text('{}')
    (tmp_path / 'figures').mkdir()
    with pytest.raises(DataError, match='it holds the runs quantile, scalar: name one of them'):
        qrm.load(str(tmp_path))


def test_folder_of_nothing(tmp_path):
    with pytest.raises(DataError, match=r'neither the folder of a run \(model.json\)') as caught:
        qrm.load(str(tmp_path))
    assert 'holds the runs' not in str(caught.value)
