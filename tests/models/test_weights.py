"""Tests of pretrained weights: the Hugging Face layout, and every way in which it can be wrong.

Checkpoints are tiny; those of `transformers` in tests/reference give the numbers. Every family's
tensors are compared with these in test_transformer; here are the rules, each with the families that
need it.
"""

import json
import pathlib
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import flax as safetensors_flax
from safetensors import numpy as safetensors_numpy

import qrm
from qrm.data.comparisons import DataError
from qrm.models import families, weights
from qrm.models.architecture import Architecture
from qrm.rewards.heads import HeadConfig
from tests.helpers import REFERENCE, reference_checkpoint, write_tokenizer

CONFIG = {
    'model_type': 'gpt2', 'vocab_size': 7, 'n_positions': 5, 'n_embd': 4, 'n_layer': 2,
    'n_head': 2, 'n_inner': None, 'activation_function': 'gelu_new',
}
WIDTH, INNER = 4, 16  # n_inner is null, which means 4 * n_embd
GPT2 = {
    'activation': 'gelu_new', 'norm': 'layer', 'norm_epsilon': 1e-5, 'norm_bias': True,
    'learned_positions': True, 'qkv_bias': True, 'output_bias': True, 'mlp_bias': True,
}


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
    return _random(shapes | {'ln_f.weight': (WIDTH,), 'ln_f.bias': (WIDTH,)}, dtype)


def _random(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _leaf(tree, path):
    for part in path.split('/'):
        tree = tree[part]
    return tree


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
    settings, architecture, backbone, head = weights.load_pretrained(folder)
    assert settings == CONFIG
    assert architecture == Architecture(
        vocab_size=7, max_positions=5, hidden_size=4, num_layers=2, num_heads=2, num_kv_heads=2,
        head_dim=2, intermediate_size=16, **GPT2)
    assert head is None
    np.testing.assert_array_equal(backbone['tokens'], tensors['wte.weight'])
    np.testing.assert_array_equal(backbone['positions'], tensors['wpe.weight'])
    np.testing.assert_array_equal(backbone['norm']['scale'], tensors['ln_f.weight'])
    np.testing.assert_array_equal(backbone['norm']['bias'], tensors['ln_f.bias'])
    places = {
        'ln_1.weight': 'attention_norm/scale', 'ln_1.bias': 'attention_norm/bias',
        'ln_2.weight': 'mlp_norm/scale', 'ln_2.bias': 'mlp_norm/bias',
        'attn.c_attn.weight': 'attention/qkv/kernel', 'attn.c_attn.bias': 'attention/qkv/bias',
        'attn.c_proj.weight': 'attention/output/kernel',
        'attn.c_proj.bias': 'attention/output/bias',
        'mlp.c_fc.weight': 'mlp/up/kernel', 'mlp.c_fc.bias': 'mlp/up/bias',
        'mlp.c_proj.weight': 'mlp/down/kernel', 'mlp.c_proj.bias': 'mlp/down/bias',
    }
    assert len(jax.tree.leaves(backbone)) == 4 + len(places)
    for name, path in places.items():
        for i in range(2):
            np.testing.assert_array_equal(_leaf(backbone['blocks'], path)[i],
                                          tensors[f'h.{i}.{name}'])


def test_square_projection_is_not_transposed(tmp_path):
    # It would fit transposed as well, and be wrong.
    tensors = _tensors()
    kernel = np.zeros((WIDTH, WIDTH), np.float32)
    kernel[0, 3] = 1.0  # from input 0 to output 3
    tensors['h.1.attn.c_proj.weight'] = kernel
    loaded = weights.load_pretrained(_write(tmp_path, tensors)).backbone
    np.testing.assert_array_equal(loaded['blocks']['attention']['output']['kernel'][1], kernel)


def test_score_is_transposed(tmp_path):
    # [N, D] in torch, [D, N] here; square, so that shapes alone would not tell.
    score = np.arange(16, dtype=np.float32).reshape(4, 4)
    folder = _write(tmp_path, _tensors() | {'score.weight': score})
    config, params = weights.load_pretrained(folder).head
    assert config == HeadConfig('quantile', 4)
    assert set(params) == {'kernel'}
    np.testing.assert_array_equal(params['kernel'], score.T)


def test_bias_of_a_score_is_read(tmp_path):
    tensors = _random({'score.weight': (3, WIDTH), 'score.bias': (3,)})
    config, params = weights.load_pretrained(_write(tmp_path, _tensors() | tensors)).head
    assert config == HeadConfig('quantile', 3, bias=True)
    np.testing.assert_array_equal(params['kernel'], tensors['score.weight'].T)
    np.testing.assert_array_equal(params['bias'], tensors['score.bias'])


def test_buffers_of_old_checkpoints_are_ignored(tmp_path):
    tensors = _tensors()
    plain = weights.load_pretrained(_write(tmp_path / 'plain', tensors))
    for i in range(2):
        tensors[f'h.{i}.attn.bias'] = np.tril(np.ones((1, 1, 5, 5), np.uint8))
        tensors[f'h.{i}.attn.masked_bias'] = np.array(-1e4, np.float32)
    old = weights.load_pretrained(_write(tmp_path / 'old', tensors))
    jax.tree.map(np.testing.assert_array_equal, old.backbone, plain.backbone)


def test_tied_output_embedding_is_accepted_and_another_refused(tmp_path):
    tensors = _tensors()
    tied = _write(tmp_path / 'tied', tensors | {'lm_head.weight': tensors['wte.weight']})
    for output in (True, False):
        loaded = weights.load_pretrained(tied, output=output)
        assert loaded.head is None
        assert 'output' not in loaded.backbone
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
    for leaf in jax.tree.leaves((loaded.backbone, loaded.head[1])):
        assert leaf.dtype == jnp.float32
    # bfloat16 and float16 are contained in float32, so nothing is lost.
    expected = tensors['h.1.mlp.c_fc.weight'].astype(np.float32)
    np.testing.assert_array_equal(loaded.backbone['blocks']['mlp']['up']['kernel'][1], expected)


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
        'missing score.weight',  # half a head is none
    )
    assert len(message.splitlines()) == 1 + 6


@pytest.mark.parametrize('shape', [(3, 5), (4,), (1, 3, 4)])
def test_misshapen_score(tmp_path, shape):
    folder = _write(tmp_path, _tensors() | {'score.weight': np.zeros(shape, np.float32)})
    message = _refused(folder, f'misshapen score.weight {shape}, expected (N, 4)')
    assert len(message.splitlines()) == 2


def test_one_tensor_under_two_names_is_refused(tmp_path):
    tensors = _tensors()
    tensors['transformer.wte.weight'] = tensors['wte.weight'] + 1.0
    _refused(_write(tmp_path, tensors), 'wte.weight is there with and without a prefix')


@pytest.mark.parametrize('wrap', [
    '_orig_mod.{}'.format, '_orig_mod.transformer.{}'.format, 'module._orig_mod.{}'.format,
    'module.transformer.{}'.format, 'transformer._orig_mod.{}'.format])
def test_names_that_wrappers_leave_are_read(tmp_path, wrap):
    plain = weights.load_pretrained(_write(tmp_path, _tensors()))
    wrapped = weights.load_pretrained(_write(
        tmp_path, {wrap(name): tensor for name, tensor in _tensors().items()}))
    jax.tree.map(np.testing.assert_array_equal, wrapped.backbone, plain.backbone)


def test_tensors_of_something_else_are_told_in_a_line(tmp_path):
    tensors = {f'encoder.{name}': tensor for name, tensor in _tensors().items()}
    message = _refused(_write(tmp_path, tensors), 'no tensor of a gpt2, which config.json says it',
                       'others such as encoder.h.0')
    assert len(message.splitlines()) == 1


def test_a_flag_of_an_output_embedding_does_not_matter_to_a_reward_model(tmp_path):
    plain = weights.load_pretrained(_write(tmp_path, _tensors()))
    untied = weights.load_pretrained(
        _write(tmp_path, _tensors(), CONFIG | {'tie_word_embeddings': False}))
    jax.tree.map(np.testing.assert_array_equal, untied.backbone, plain.backbone)
    with pytest.raises(DataError, match=r'missing lm_head\.weight'):
        weights.load_pretrained(str(tmp_path), output=True)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    tensors = _tensors(dtype)
    tensors['h.1.mlp.c_fc.weight'][3, 5] = value
    folder = _write(tmp_path, {f'transformer.{name}': x for name, x in tensors.items()})
    _refused(folder, f'{folder}: transformer.h.1.mlp.c_fc.weight not finite, expected numbers')
    # What nothing reads may be anything: old checkpoints store -inf for what a mask hides.
    tensors = _tensors() | {'h.0.attn.masked_bias': np.float32([-np.inf])}
    assert weights.load_pretrained(_write(tmp_path, tensors))


# config.json.


@pytest.mark.parametrize('model_type', ['bloom', 'GPT2', None])
def test_wrong_model_type(tmp_path, model_type):
    folder = _write(tmp_path, _tensors(), CONFIG | {'model_type': model_type})
    _refused(folder, f"model_type {model_type!r}, expected one of ['bert', 'gemma2',", "'qwen3']")


def test_another_familys_settings(tmp_path):
    folder = _write(tmp_path, _tensors(), CONFIG | {'model_type': 'llama'})
    _refused(folder, 'config.json has activation_function, n_embd, n_head, n_inner, n_layer, '
             "n_positions, which the family 'llama' does not know")


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('scale_attn_weights', False),
        ('scale_attn_by_inverse_layer_idx', True),
        ('add_cross_attention', True),
    ],
)
def test_unsupported_settings(tmp_path, key, value):
    folder = _write(tmp_path, _tensors(), CONFIG | {key: value})
    _refused(folder, f'{key}={value}, only {not value} is computed')
    # The value that is computed may be spelt out.
    assert weights.load_pretrained(_write(tmp_path, _tensors(), CONFIG | {key: not value}))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'activation_function': 'quick'}, "activation='quick', expected one of"),
        ({'activation_function': ['relu']}, "activation=['relu'], expected one of"),
        ({'n_head': 3}, 'hidden_size=4 is not divisible by num_heads=3'),
        ({'n_head': 0}, 'num_heads=0, expected a positive integer'),
        ({'n_layer': 0}, 'num_layers=0, expected a positive integer'),
        ({'n_embd': '4'}, "hidden_size='4', expected a positive integer"),
        ({'n_embd': None}, "has no 'n_embd'"),
        ({'n_embd': None, 'n_inner': 16}, "has no 'n_embd'"),
        ({'n_positions': 5.0}, 'max_positions=5.0, expected a positive integer'),
    ],
)
def test_config_that_is_no_architecture(tmp_path, change, message):
    _refused(_write(tmp_path, _tensors(), CONFIG | change), 'config.json', message)


def test_config_without_a_size(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != 'n_head'}
    _refused(_write(tmp_path, _tensors(), config), "config.json has no 'n_head'")


def test_config_settings_reach_the_transformer():
    settings = CONFIG | {'n_inner': 6, 'layer_norm_epsilon': 1e-3, 'initializer_range': 0.5,
                         'activation_function': 'relu'}
    assert families.architecture(settings) == Architecture(
        vocab_size=7, max_positions=5, hidden_size=4, num_layers=2, num_heads=2, num_kv_heads=2,
        head_dim=2, intermediate_size=6, initializer_range=0.5,
        **GPT2 | {'activation': 'relu', 'norm_epsilon': 1e-3})


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


def _write_sharded(folder, tensors, shard_of, config=CONFIG):
    shards = {}
    for name, tensor in tensors.items():
        shards.setdefault(shard_of[name], {})[name] = jnp.asarray(tensor)
    (folder / 'config.json').write_text(json.dumps(config))
    for shard, content in shards.items():
        safetensors_flax.save_file(content, folder / shard)
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
    jax.tree.map(np.testing.assert_array_equal, parts.backbone, whole.backbone)


@pytest.mark.parametrize('complete', [True, False])
def test_of_two_sets_of_weights_the_single_file_is_read(sharded, complete, capsys):
    """As transformers does, which leaves the index when it saves to one file later."""
    newer = {name: tensor + 1.0 for name, tensor in _tensors().items()}
    folder = _write(sharded, newer)
    if not complete:
        (sharded / 'model-00002-of-00002.safetensors').unlink()
    found = weights.load_pretrained(folder)
    np.testing.assert_array_equal(found.backbone['tokens'], newer['wte.weight'])
    assert 'two sets of weights, of which model.safetensors is read' in capsys.readouterr().out


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


def test_index_with_too_many_files(sharded, monkeypatch):
    monkeypatch.setattr(weights, '_MOST_SHARDS', 1)
    _refused(sharded, 'model.safetensors.index.json: 2 files, expected at most 1')


def test_index_without_a_map(sharded):
    _edit_index(sharded, lambda index: index.pop('weight_map'))
    _refused(sharded, 'model.safetensors.index.json', 'weight_map')


@pytest.mark.parametrize('place', ['{}', '../outside/{}', 'inner/{}', './{}'])
def test_index_does_not_lead_out_of_the_folder(sharded, tmp_path_factory, place):
    name = 'model-00001-of-00002.safetensors'
    outside = tmp_path_factory.mktemp('outside') / name
    (sharded / name).rename(outside)
    place = place.format(outside if place == '{}' else name)

    def lead_out(index):
        for tensor, shard in index['weight_map'].items():
            if shard == name:
                index['weight_map'][tensor] = place

    _edit_index(sharded, lead_out)
    _refused(sharded, f'{place!r}, expected the name of a file in this folder')


def test_pickles_are_refused_by_name(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80\x04.')
    _refused(tmp_path, 'model.safetensors: no such file', 'pytorch_model.bin is a pickle',
             'safe_serialization=True')


def test_code_beside_the_weights_is_never_run(tmp_path):
    """Many reward models come with a class of their own, which `auto_map` names."""
    settings = LLAMA | {'vocab_size': 40, 'auto_map': {
        'AutoConfig': 'modeling_custom.Config', 'AutoModel': 'modeling_custom.Model',
        'AutoModelForSequenceClassification': 'modeling_custom.Model'}}
    tensors = _llama_tensors() | _random({
        'model.embed_tokens.weight': (40, WIDTH), 'score.weight': (1, WIDTH)})
    _write(tmp_path, tensors, settings)
    write_tokenizer(tmp_path)
    path = tmp_path / 'tokenizer_config.json'
    of_tokenizer = {'auto_map': {'AutoTokenizer': ['modeling_custom.T', 'modeling_custom.T']}}
    path.write_text(json.dumps(json.loads(path.read_text()) | of_tokenizer))
    (tmp_path / 'modeling_custom.py').write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nraise SystemExit(1)\n")
    before = {name for name in sys.modules if 'modeling_custom' in name}
    assert qrm.load(str(tmp_path)).network.head.name == 'scalar'
    assert not (tmp_path / 'ran').exists()
    assert {name for name in sys.modules if 'modeling_custom' in name} == before


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


# Other families.


LLAMA = {
    'model_type': 'llama', 'vocab_size': 7, 'max_position_embeddings': 5, 'hidden_size': WIDTH,
    'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 1,
    'intermediate_size': 6, 'rope_theta': 10000.0,
}


def _llama_tensors(keys=2, inner=6, biases=False):
    """Of a classifier's backbone: [out, in], as PyTorch stores them. keys: width of all keys."""
    shapes = {'model.embed_tokens.weight': (7, WIDTH), 'model.norm.weight': (WIDTH,)}
    for i in range(2):
        linear = {
            'self_attn.q_proj': (4, WIDTH), 'self_attn.k_proj': (keys, WIDTH),
            'self_attn.v_proj': (keys, WIDTH), 'self_attn.o_proj': (WIDTH, 4),
            'mlp.gate_proj': (inner, WIDTH), 'mlp.up_proj': (inner, WIDTH),
            'mlp.down_proj': (WIDTH, inner),
        }
        shapes |= {f'model.layers.{i}.{name}.weight': shape for name, shape in linear.items()}
        if biases:
            shapes |= {f'model.layers.{i}.{name}.bias': shape[:1]
                       for name, shape in linear.items()}
        shapes |= {f'model.layers.{i}.{name}_layernorm.weight': (WIDTH,)
                   for name in ('input', 'post_attention')}
    return _random(shapes)


# With two heads of keys and 4 inner features every kernel is square: shapes alone would not tell
# that one is not transposed, or that its parts are joined along the other axis.
@pytest.mark.parametrize(('keys', 'inner'), [(4, 4), (2, 6)])
def test_joined_projections_of_llama(tmp_path, keys, inner):
    tensors = _llama_tensors(keys, inner, biases=True)
    settings = LLAMA | {'num_key_value_heads': keys // 2, 'intermediate_size': inner,
                        'attention_bias': True, 'mlp_bias': True}
    backbone = weights.load_pretrained(_write(tmp_path, tensors, settings)).backbone
    joined = {
        'attention/qkv': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
        'attention/output': ['self_attn.o_proj'], 'mlp/up': ['mlp.gate_proj', 'mlp.up_proj'],
        'mlp/down': ['mlp.down_proj'],
    }
    for i in range(2):
        for path, names in joined.items():
            parts = [tensors[f'model.layers.{i}.{name}.weight'] for name in names]
            # Features that go in are rows; what comes out stands side by side.
            np.testing.assert_array_equal(_leaf(backbone['blocks'], path)['kernel'][i],
                                          np.hstack([part.T for part in parts]))
            parts = [tensors[f'model.layers.{i}.{name}.bias'] for name in names]
            np.testing.assert_array_equal(_leaf(backbone['blocks'], path)['bias'][i],
                                          np.concatenate(parts))
        for path, name in (('attention_norm', 'input'), ('mlp_norm', 'post_attention')):
            np.testing.assert_array_equal(backbone['blocks'][path]['scale'][i],
                                          tensors[f'model.layers.{i}.{name}_layernorm.weight'])
    np.testing.assert_array_equal(backbone['tokens'], tensors['model.embed_tokens.weight'])
    np.testing.assert_array_equal(backbone['norm']['scale'], tensors['model.norm.weight'])
    assert len(jax.tree.leaves(backbone)) == 2 * len(joined) + 4


def test_parts_of_joined_projections_are_named_each_by_itself(tmp_path):
    tensors = _llama_tensors()
    del tensors['model.layers.0.self_attn.k_proj.weight']
    tensors['model.layers.1.self_attn.v_proj.weight'] = np.zeros((4, WIDTH), np.float32)
    tensors['model.layers.1.mlp.up_proj.weight'] = np.zeros((WIDTH, 6), np.float32)
    tensors['model.layers.1.self_attn.q_proj.bias'] = np.zeros(4, np.float32)
    message = _refused(
        _write(tmp_path, tensors, LLAMA),
        'missing layers.0.self_attn.k_proj.weight (2, 4)',
        'misshapen layers.1.self_attn.v_proj.weight (4, 4), expected (2, 4)',
        'misshapen layers.1.mlp.up_proj.weight (4, 6), expected (6, 4)',
        'unexpected layers.1.self_attn.q_proj.bias (4,)',
    )
    assert len(message.splitlines()) == 1 + 4


def test_a_sharded_llama_in_bfloat16(tmp_path):
    tensors = _llama_tensors() | _random({'score.weight': (1, WIDTH)})
    shard_of = {name: f'model-0000{1 + i % 3}-of-00003.safetensors'
                for i, name in enumerate(tensors)}
    rounded = {name: jnp.asarray(tensor, jnp.bfloat16) for name, tensor in tensors.items()}
    _write_sharded(tmp_path, rounded, shard_of, LLAMA)
    loaded = weights.load_pretrained(str(tmp_path))
    assert {leaf.dtype for leaf in jax.tree.leaves((loaded.backbone, loaded.head[1]))} == {
        jnp.dtype('float32')}
    expected = np.hstack([np.asarray(rounded[f'model.layers.1.mlp.{name}_proj.weight'],
                                     np.float32).T for name in ('gate', 'up')])
    np.testing.assert_array_equal(loaded.backbone['blocks']['mlp']['up']['kernel'][1], expected)
    np.testing.assert_array_equal(loaded.head[1]['kernel'],
                                  np.asarray(rounded['score.weight'], np.float32).T)


def test_output_embedding_is_kept_if_it_is_asked_for_and_not_tied(tmp_path):
    tensors = _llama_tensors()
    output = _random({'lm_head.weight': (7, WIDTH)})
    folder = _write(tmp_path / 'untied', tensors | output, LLAMA)
    plain, whole = (weights.load_pretrained(folder, output=output) for output in (False, True))
    assert set(whole.backbone) - set(plain.backbone) == {'output'}
    np.testing.assert_array_equal(whole.backbone['output'], output['lm_head.weight'])
    # Of a classifier there is none.
    folder = _write(tmp_path / 'classifier', tensors, LLAMA)
    assert 'output' not in weights.load_pretrained(folder).backbone
    with pytest.raises(DataError, match=r'missing lm_head.weight \(7, 4\)'):
        weights.load_pretrained(folder, output=True)


def test_tied_output_embedding_of_llama(tmp_path):
    tensors, settings = _llama_tensors(), LLAMA | {'tie_word_embeddings': True}
    table = tensors['model.embed_tokens.weight']
    for name, more in (('without', {}), ('with', {'lm_head.weight': table})):
        folder = _write(tmp_path / name, tensors | more, settings)
        assert 'output' not in weights.load_pretrained(folder, output=True).backbone
    _refused(_write(tmp_path / 'other', tensors | {'lm_head.weight': table + 1}, settings),
             'lm_head.weight differs from embed_tokens.weight, expected them tied')


def test_frequencies_of_old_checkpoints_are_ignored(tmp_path):
    tensors = _llama_tensors()
    plain = weights.load_pretrained(_write(tmp_path / 'plain', tensors, LLAMA))
    tensors |= {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': np.ones(1, np.float32)
                for i in range(2)}
    old = weights.load_pretrained(_write(tmp_path / 'old', tensors, LLAMA))
    jax.tree.map(np.testing.assert_array_equal, old.backbone, plain.backbone)


@pytest.mark.parametrize('name', [
    'model.layers.2.self_attn.q_proj.weight',  # of a third block
    'model.layers.0.self_attn.rotary_emb.inv_frequencies', 'model.layers.0.self_attn.q_norm.weight',
    'model.layers.0.mlp.experts.0.up_proj.weight', 'vision.patches.weight', 'lm_head.bias',
    'gating.logit_scale', 'score.1.weight', 'transformer.model.norm.weight',
])
def test_unexpected_tensors_are_named(tmp_path, name):
    folder = _write(tmp_path, _llama_tensors() | {name: np.zeros((2, 3), np.float32)}, LLAMA)
    message = _refused(folder, f"unexpected {name.removeprefix('model.')} (2, 3)")
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize('shards', [False, True])
def test_a_value_head_in_its_own_file_beside_a_language_model(tmp_path, shards):
    tensors = _llama_tensors() | _random({'lm_head.weight': (7, WIDTH)})
    if shards:
        _write_sharded(tmp_path, tensors, dict.fromkeys(tensors, 'model-1.safetensors'), LLAMA)
    else:
        _write(tmp_path, tensors, LLAMA)
    value = _random({'v_head.summary.weight': (1, WIDTH), 'v_head.summary.bias': (1,)})
    _write(tmp_path, value, LLAMA, name='value_head.safetensors')
    loaded = weights.load_pretrained(str(tmp_path))
    assert loaded.head[0] == HeadConfig('scalar', bias=True)
    np.testing.assert_array_equal(loaded.head[1]['kernel'], value['v_head.summary.weight'].T)
    np.testing.assert_array_equal(loaded.head[1]['bias'], value['v_head.summary.bias'])
    assert len(jax.tree.leaves(loaded.backbone)) == 8  # no output embedding


BERT = {
    'model_type': 'bert', 'vocab_size': 7, 'max_position_embeddings': 5, 'hidden_size': WIDTH,
    'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 6,
}
POOLER = {'bert.pooler.dense.weight': (WIDTH, WIDTH), 'bert.pooler.dense.bias': (WIDTH,)}


def _bert_shapes(ends=('weight', 'bias')):
    """Without pooler. ends: what the parameters of norms are called."""
    shapes = {f'bert.embeddings.{name}_embeddings.weight': (rows, WIDTH)
              for name, rows in (('word', 7), ('position', 5), ('token_type', 2))}
    norms = ['bert.embeddings.LayerNorm']
    for i in range(2):
        block = f'bert.encoder.layer.{i}'
        norms += [f'{block}.attention.output.LayerNorm', f'{block}.output.LayerNorm']
        linear = {'attention.self.query': (WIDTH, WIDTH), 'attention.self.key': (WIDTH, WIDTH),
                  'attention.self.value': (WIDTH, WIDTH), 'attention.output.dense': (WIDTH, WIDTH),
                  'intermediate.dense': (6, WIDTH), 'output.dense': (WIDTH, 6)}
        shapes |= {f'{block}.{name}.weight': shape for name, shape in linear.items()}
        shapes |= {f'{block}.{name}.bias': shape[:1] for name, shape in linear.items()}
    return shapes | {f'{name}.{end}': (WIDTH,) for name in norms for end in ends}


MASKED = {
    'cls.predictions.bias': (7,), 'cls.predictions.decoder.weight': (7, WIDTH),
    'cls.predictions.transform.dense.weight': (WIDTH, WIDTH), 'cls.seq_relationship.bias': (2,),
    'cls.predictions.transform.LayerNorm.gamma': (WIDTH,),
}


def test_old_names_of_norms_and_the_heads_of_pretraining_of_bert(tmp_path):
    new = _random(_bert_shapes() | POOLER)
    old = dict(zip(_bert_shapes(('gamma', 'beta')) | POOLER, new.values(), strict=True))
    assert old['bert.embeddings.LayerNorm.gamma'] is new['bert.embeddings.LayerNorm.weight']
    positions = {'bert.embeddings.position_ids': np.arange(5)[None]}
    one = weights.load_pretrained(_write(tmp_path / 'new', new, BERT))
    other = weights.load_pretrained(_write(tmp_path / 'old', old | _random(MASKED) | positions,
                                           BERT))
    jax.tree.map(np.testing.assert_array_equal, one.backbone, other.backbone)
    assert one.head is other.head is None
    np.testing.assert_array_equal(one.backbone['embedding_norm']['scale'],
                                  new['bert.embeddings.LayerNorm.weight'])
    queries = [new[f'bert.encoder.layer.1.attention.self.{name}.weight'].T
               for name in ('query', 'key', 'value')]
    np.testing.assert_array_equal(one.backbone['blocks']['attention']['qkv']['kernel'][1],
                                  np.hstack(queries))
    np.testing.assert_array_equal(one.backbone['pooler']['dense']['kernel'],
                                  new['bert.pooler.dense.weight'].T)


def test_both_names_of_a_norm_are_refused(tmp_path):
    tensors = _random(_bert_shapes() | {'bert.embeddings.LayerNorm.gamma': (WIDTH,)})
    with pytest.raises(DataError, match='bert.embeddings.LayerNorm.(gamma|weight) is there'):
        weights.load_pretrained(_write(tmp_path, tensors, BERT))


def test_an_encoder_without_pooler_is_a_language_model_only(tmp_path):
    tensors = _random(_bert_shapes() | MASKED)
    plain = weights.load_pretrained(_write(tmp_path / 'plain', tensors, BERT))
    assert 'pooler' not in plain.backbone
    classifier = {'classifier.weight': (1, WIDTH), 'classifier.bias': (1,)}
    missing = 'missing pooler.dense.weight (4, 4)', 'missing pooler.dense.bias (4,)'
    message = _refused(_write(tmp_path / 'classifier', tensors | _random(classifier), BERT),
                       *missing)
    assert len(message.splitlines()) == 1 + 2
    # Half of one is none.
    half = _random({'bert.pooler.dense.weight': (WIDTH, WIDTH)})
    _refused(_write(tmp_path / 'half', tensors | half, BERT), missing[1])
    whole = tensors | _random(POOLER | classifier)
    loaded = weights.load_pretrained(_write(tmp_path / 'whole', whole, BERT))
    assert set(loaded.backbone['pooler']) == {'dense'}
    assert loaded.head[0] == HeadConfig('scalar', reads=('first',), bias=True)


MODERNBERT = {
    'model_type': 'modernbert', 'vocab_size': 7, 'max_position_embeddings': 5,
    'hidden_size': WIDTH, 'num_hidden_layers': 2, 'num_attention_heads': 2,
    'intermediate_size': 6, 'global_rope_theta': 100.0, 'local_rope_theta': 10.0,
    'norm_bias': True,
}


def _modernbert_shapes():
    shapes = {'model.embeddings.tok_embeddings.weight': (7, WIDTH)}
    norms = ['model.embeddings.norm', 'model.final_norm', 'model.layers.1.attn_norm', 'head.norm']
    for i in range(2):
        shapes |= {f'model.layers.{i}.{name}.weight': shape for name, shape in (
            ('attn.Wqkv', (3 * WIDTH, WIDTH)), ('attn.Wo', (WIDTH, WIDTH)),
            ('mlp.Wi', (12, WIDTH)), ('mlp.Wo', (WIDTH, 6)))}
        norms.append(f'model.layers.{i}.mlp_norm')
    shapes |= {f'{name}.{end}': (WIDTH,) for name in norms for end in ('weight', 'bias')}
    return shapes | {'head.dense.weight': (WIDTH, WIDTH)}


def test_the_first_block_of_modernbert_has_no_norm(tmp_path):
    tensors = _random(_modernbert_shapes())
    masked = _random({'decoder.bias': (7,), 'decoder.weight': (7, WIDTH)})
    loaded = weights.load_pretrained(_write(tmp_path / 'masked', tensors | masked, MODERNBERT))
    norm = loaded.backbone['blocks']['attention_norm']
    np.testing.assert_array_equal(norm['scale'][0], np.ones(WIDTH))
    np.testing.assert_array_equal(norm['bias'][0], np.zeros(WIDTH))
    for key, end in (('scale', 'weight'), ('bias', 'bias')):
        np.testing.assert_array_equal(norm[key][1], tensors[f'model.layers.1.attn_norm.{end}'])
    np.testing.assert_array_equal(loaded.backbone['blocks']['attention']['qkv']['kernel'][0],
                                  tensors['model.layers.0.attn.Wqkv.weight'].T)
    assert loaded.head is None
    # It is not written either, and not expected.
    written = weights.backbone_tensors(MODERNBERT, loaded.backbone)
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
    tensors['model.layers.0.attn_norm.weight'] = np.ones(WIDTH, np.float32)
    _refused(_write(tmp_path / 'more', tensors, MODERNBERT),
             'unexpected layers.0.attn_norm.weight (4,)')


@pytest.mark.parametrize(('settings', 'tensors'), [
    (CONFIG, _tensors), (LLAMA, _llama_tensors), (BERT, lambda: _random(_bert_shapes() | POOLER)),
], ids=['gpt2', 'llama', 'bert'])
def test_tensors_are_written_as_they_were_read(tmp_path, settings, tensors):
    backbone = weights.load_pretrained(_write(tmp_path, tensors(), settings)).backbone
    prefix = families.FAMILIES[settings['model_type']].prefix
    expected = {prefix + name.removeprefix(prefix): x for name, x in tensors().items()}
    written = weights.backbone_tensors(settings, backbone)
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor)


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
    assert model.reading.max_length == 24
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
    assert qrm.load(str(reward_model), max_length=20).reading.max_length == 20
    with pytest.raises(DataError, match='max_length=25, but the model has 24 positions'):
        qrm.load(str(reward_model), max_length=25)


def test_language_model_is_no_reward_model(tmp_path):
    folder = _write(tmp_path, _tensors())
    write_tokenizer(tmp_path, 7)
    with pytest.raises(DataError, match='no score.weight or other reward head; this is a language'):
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
