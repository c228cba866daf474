"""Adapters of peft: a kernel is W + s B A of the tensors as they are stored; all else is refused.

Where peft and PyTorch are installed, adapters that they train are compared as a whole.
"""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors import numpy as safetensors_numpy

import qrm
from qrm.data.comparisons import DataError
from qrm.models import adapters, families, weights
from qrm.models.adapters import Adapter, Targets
from qrm.models.architecture import leaves, tree
from qrm.rewards.heads import HeadConfig
from qrm.training import base as base_lib
from qrm.training.base import Base
from tests.helpers import write_tokenizer

SIZES = {'vocab_size': 40, 'max_positions': 24, 'hidden_size': 8, 'num_layers': 2, 'num_heads': 2,
         'intermediate_size': 12}
# Modules of a block, by their names in transformers.
MODULES = {
    'gpt2': ['transformer.h.{}.attn.c_attn', 'transformer.h.{}.mlp.c_proj'],
    'llama': ['model.layers.{}.self_attn.k_proj', 'model.layers.{}.mlp.up_proj'],
    'bert': ['bert.encoder.layer.{}.attention.self.value', 'bert.encoder.layer.{}.output.dense'],
    'modernbert': ['model.layers.{}.attn.Wqkv', 'model.layers.{}.mlp.Wo'],
}
POOLERS = {'bert': 'bert.pooler.dense', 'modernbert': 'head.dense'}
CONFIG = {'peft_type': 'LORA', 'task_type': 'SEQ_CLS', 'r': 3, 'lora_alpha': 6, 'bias': 'none',
          'init_lora_weights': True}
RANK, SCALE = 3, 2.0


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def settings_of(family):
    settings = families.random_settings(family, SIZES)
    if family == 'modernbert':  # transformers has those of a larger vocabulary
        settings |= dict.fromkeys(
            [f'{name}_token_id' for name in ('pad', 'eos', 'bos', 'cls', 'sep')], 38)
    return families.portable_settings(settings) | {
        'architectures': [families.FAMILIES[family].language_model]}


def base_tensors(family, pooler=True):
    """Tensors of a backbone by their names in transformers."""
    settings = settings_of(family)
    flat = {path: random(leaf.shape, seed) * 0.4 for seed, (path, leaf) in enumerate(
        leaves(families.architecture(settings)).items()) if pooler or 'pooler' not in path}
    return weights.backbone_tensors(settings, tree(flat))


def write_base(folder, family, tensors=None):
    folder.mkdir()
    weights.write_folder(str(folder), settings_of(family),
                         base_tensors(family) if tensors is None else tensors)
    write_tokenizer(folder)
    return folder


def write_adapter(folder, base, tensors, **config):
    folder.mkdir(exist_ok=True)
    targets = sorted({name.split('.lora_')[0] for name in tensors if '.lora_' in name})
    config = CONFIG | {'base_model_name_or_path': str(base), 'target_modules': targets} | config
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    safetensors_numpy.save_file({f'base_model.model.{name}': x for name, x in tensors.items()},
                                folder / 'adapter_model.safetensors')
    return str(folder)


def pair(module, inputs, outputs, rank=RANK, seed=0):
    """Tensors of an adapter of one module."""
    return {f'{module}.lora_A.weight': random((rank, inputs), seed),
            f'{module}.lora_B.weight': random((outputs, rank), seed + 1)}


def adapter_of(family, layers=(0, 1)):
    """Tensors of adapters of some modules, and of the pooler, and a head of two outputs."""
    kernels, turned = base_tensors(family), family == 'gpt2'
    names = [name.format(i) for name in MODULES[family] for i in layers]
    found = {f'{families.FAMILIES[family].head}.weight': random((2, 8), 9)}
    for seed, name in enumerate([*names, *([POOLERS[family]] if family in POOLERS else [])]):
        shape = kernels[f'{name}.weight'].shape
        outputs, inputs = shape[::-1] if turned else shape
        found |= pair(name, inputs, outputs, seed=10 * seed)
    return found


def by_hand(family, adapter, scale=SCALE):
    """The tensors of the whole model, in float64."""
    found = {name: x.astype(np.float64) for name, x in base_tensors(family).items()}
    for name, a in adapter.items():
        if name.endswith('.lora_A.weight'):
            module = name.removesuffix('.lora_A.weight')
            product = scale * adapter[f'{module}.lora_B.weight'].astype(np.float64) @ a
            found[f'{module}.weight'] += product.T if family == 'gpt2' else product
    return {name: x.astype(np.float32) for name, x in found.items()}


def read(folder, **kwargs):
    return adapters.load_pretrained(adapters.find(str(folder)), **kwargs)


def same(found, expected, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), found, expected)


# What is read.


@pytest.mark.parametrize('family', MODULES)
def test_kernels_are_those_of_the_base_and_s_b_a(tmp_path, family):
    base, given = write_base(tmp_path / 'base', family), adapter_of(family)
    found = read(write_adapter(tmp_path / 'adapter', base, given))
    whole = tmp_path / 'whole'
    write_base(whole, family, by_hand(family, given))
    expected = weights.load_pretrained(str(whole))
    same(found.backbone, expected.backbone)
    head, params = found.head
    reads = families.classifier_reads(found.settings)
    assert head == HeadConfig('quantile', 2, reads=reads)
    np.testing.assert_array_equal(params['kernel'], random((2, 8), 9).T)
    assert found.settings['architectures'] == [families.FAMILIES[family].classifier]


def test_only_what_has_tensors_is_adapted(tmp_path):
    base, given = write_base(tmp_path / 'base', 'llama'), adapter_of('llama', layers=[1])
    found = read(write_adapter(tmp_path / 'adapter', base, given, layers_to_transform=[1]))
    plain = read(base).backbone['blocks']['attention']['qkv']['kernel']
    kernel = found.backbone['blocks']['attention']['qkv']['kernel']
    np.testing.assert_array_equal(kernel[0], plain[0])
    assert np.abs(kernel[1, :, 8:16] - plain[1, :, 8:16]).max() > 0.1  # keys
    for columns in (slice(0, 8), slice(16, 24)):
        np.testing.assert_array_equal(kernel[1, :, columns], plain[1, :, columns])


def test_names_of_a_bare_decoder(tmp_path):
    base, given = write_base(tmp_path / 'base', 'llama'), adapter_of('llama')
    bare = {name.removeprefix('model.'): x for name, x in given.items()}
    folders = [write_adapter(tmp_path / str(i), base, tensors)
               for i, tensors in enumerate((given, bare))]
    same(*(read(folder).backbone for folder in folders))


def test_sums_are_in_float32_whatever_the_parts_are_in(tmp_path):
    narrow = {name: x.astype(ml_dtypes.bfloat16) for name, x in base_tensors('llama').items()}
    base = write_base(tmp_path / 'base', 'llama', narrow)
    given = {name: x.astype(ml_dtypes.bfloat16) for name, x in adapter_of('llama').items()}
    found = read(write_adapter(tmp_path / 'adapter', base, given))
    name = 'model.layers.1.mlp.up_proj'
    a, b, w = (x.astype(np.float32) for x in (
        given[f'{name}.lora_A.weight'], given[f'{name}.lora_B.weight'], narrow[f'{name}.weight']))
    np.testing.assert_allclose(found.backbone['blocks']['mlp']['up']['kernel'][1, :, 12:],
                               (w + SCALE * b @ a).T, rtol=0, atol=1e-6)
    kept = read(tmp_path / 'adapter', dtype='bfloat16').backbone['blocks']['mlp']['up']['kernel']
    assert kept.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(('config', 'module', 'expected'), [
    ({}, 'model.layers.0.mlp.up_proj', (3, 2.0)),
    ({'use_rslora': True}, 'model.layers.0.mlp.up_proj', (3, 6 / math.sqrt(3))),
    ({'lora_alpha': 1.5}, 'model.layers.0.mlp.up_proj', (3, 0.5)),
    ({'rank_pattern': {'up_proj': 4}}, 'model.layers.0.mlp.up_proj', (4, 1.5)),
    ({'rank_pattern': {'up_proj': 4}}, 'model.layers.0.mlp.gate_up_proj', (3, 2.0)),
    ({'rank_pattern': {'up_proj': 4}, 'use_rslora': True}, 'model.layers.0.mlp.up_proj', (4, 3.0)),
    ({'alpha_pattern': {'layers.1.mlp.up_proj': 12}}, 'model.layers.1.mlp.up_proj', (3, 4.0)),
    ({'alpha_pattern': {'layers.1.mlp.up_proj': 12}}, 'model.layers.0.mlp.up_proj', (3, 2.0)),
    ({'rank_pattern': {r'layers\.[01]\..*': 2, 'up_proj': 4}}, 'model.layers.1.mlp.up_proj',
     (2, 3.0)),
    ({'alpha_pattern': {'^up_proj': 9}}, 'model.layers.1.mlp.up_proj', (3, 2.0)),
    ({'alpha_pattern': {'^model.*up_proj': 9}}, 'model.layers.1.mlp.up_proj', (3, 3.0)),
])
def test_rank_and_scaling_of_a_module(tmp_path, config, module, expected):
    base = write_base(tmp_path / 'base', 'llama')
    folder = write_adapter(tmp_path / 'adapter', base, adapter_of('llama'), **config)
    rank, scale = adapters.find(folder).adapter.scaling(module)
    assert (rank, scale) == (expected[0], pytest.approx(expected[1]))


def test_ranks_of_patterns(tmp_path):
    base = write_base(tmp_path / 'base', 'llama')
    name = 'model.layers.0.mlp.up_proj'
    given = adapter_of('llama') | pair(name, 8, 12, rank=5, seed=70)
    found = read(write_adapter(tmp_path / 'adapter', base, given,
                               rank_pattern={'layers.0.mlp.up_proj': 5},
                               alpha_pattern={'layers.0.mlp.up_proj': 20}))
    expected = base_tensors('llama')[f'{name}.weight'] + 4.0 * (
        given[f'{name}.lora_B.weight'] @ given[f'{name}.lora_A.weight'])
    np.testing.assert_allclose(found.backbone['blocks']['mlp']['up']['kernel'][0, :, 12:],
                               expected.T, rtol=0, atol=1e-5)


def test_heads_are_those_of_the_adapter_or_else_of_the_base(tmp_path):
    scored = base_tensors('llama') | {'score.weight': random((1, 8), 3)}
    base = write_base(tmp_path / 'base', 'llama', scored)
    given = adapter_of('llama')
    own = read(write_adapter(tmp_path / 'own', base, given))
    assert own.head[0].outputs == 2
    del given['score.weight']
    kept = read(write_adapter(tmp_path / 'kept', base, given, task_type=None))
    np.testing.assert_array_equal(kept.head[1]['kernel'], random((1, 8), 3).T)
    plain = write_base(tmp_path / 'plain', 'llama')
    folder = write_adapter(tmp_path / 'language', plain, given, task_type='CAUSAL_LM')
    assert read(folder).head is None
    with pytest.raises(DataError, match='no score.weight or other reward head; this is a language'):
        qrm.load(folder)
    # As LLaMA-Factory keeps the head of an adapter.
    safetensors_numpy.save_file({'v_head.summary.weight': random((1, 8)),
                                 'v_head.summary.bias': random(1)},
                                tmp_path / 'language' / 'value_head.safetensors')
    found = read(folder)
    assert found.head[0] == HeadConfig('scalar', bias=True)
    assert found.settings['architectures'] == ['LlamaForCausalLM']


@pytest.mark.parametrize('family', POOLERS)
def test_poolers_are_those_of_the_adapter(tmp_path, family):
    base = write_base(tmp_path / 'base', family, base_tensors(family, pooler=False))
    pooler = {name: x + 1 for name, x in base_tensors(family).items()
              if name not in base_tensors(family, pooler=False)}
    given = {name: x for name, x in adapter_of(family).items() if POOLERS[family] not in name}
    found = read(write_adapter(tmp_path / 'adapter', base, given | pooler))
    np.testing.assert_array_equal(found.backbone['pooler']['dense']['kernel'],
                                  pooler[f'{POOLERS[family]}.weight'].T)
    # A base without a pooler had a random one in training, which is nowhere.
    with pytest.raises(DataError, match=r'missing (pooler|head).dense.weight: the base has none'):
        read(write_adapter(tmp_path / 'none', base, given))
    with pytest.raises(DataError, match=rf'of {POOLERS[family]}, which the base has not: it was'):
        read(write_adapter(tmp_path / 'half', base, adapter_of(family)))


# Names.


def test_parts_are_found(tmp_path, monkeypatch):
    base = write_base(tmp_path / 'base', 'llama')
    assert adapters.find(str(base)) == (str(base), str(base), None)
    folder = write_adapter(tmp_path / 'adapter', base, adapter_of('llama'))
    model, tokenizer, adapter = adapters.find(folder)
    assert (model, tokenizer) == (str(base), str(base))
    names = tuple(sorted(name.format(i) for name in MODULES['llama'] for i in (0, 1)))
    assert adapter == Adapter(folder, str(base), 'SEQ_CLS', 3, 6, False, {}, {},
                              Targets(names, None, (), (), ()))
    write_tokenizer(folder)
    assert adapters.find(folder)[:2] == (str(base), folder)
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / 'adapter', 'base', adapter_of('llama'))
    assert adapters.find('adapter')[:2] == ('base', 'adapter')


def test_what_has_no_base_of_its_own_is_refused(tmp_path):
    base = write_base(tmp_path / 'base', 'llama')
    first = write_adapter(tmp_path / 'first', base, adapter_of('llama'))
    for place, message in ((first, 'its base .*first is itself an adapter'),
                           (tmp_path / 'nothing', 'nothing: no such folder'),
                           ('', "base_model_name_or_path='', expected a folder or a hub name")):
        folder = write_adapter(tmp_path / 'adapter', place, adapter_of('llama'))
        with pytest.raises(DataError, match=message):
            adapters.find(folder)
    write_adapter(base, base, adapter_of('llama'))
    with pytest.raises(DataError, match='has adapter_config.json and the weights of a whole model'):
        adapters.find(str(base))


def test_runs_start_from_adapters(tmp_path):
    base, given = write_base(tmp_path / 'base', 'llama'), adapter_of('llama')
    del given['score.weight']
    folder = write_adapter(tmp_path / 'adapter', base, given, task_type='CAUSAL_LM')
    found = base_lib.read(Base(folder, 0, 'float32'), whole=True, output=False)
    whole = write_base(tmp_path / 'whole', 'llama', by_hand('llama', given))
    same(found.backbone, read(whole).backbone)


@pytest.mark.parametrize('padding', ['<pad>', '<eos>'])
def test_models_are_read_before_the_padding_of_their_tokenizer(tmp_path, padding):
    base = write_base(tmp_path / 'base', 'llama')
    folder = write_adapter(tmp_path / 'adapter', base, adapter_of('llama'))
    # The base says nothing of padding, and nor does an adapter.
    assert qrm.load(folder).reading.skipped is None
    write_tokenizer(folder)
    path = tmp_path / 'adapter' / 'tokenizer_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'pad_token': padding}))
    assert qrm.load(folder).reading.skipped == {'<eos>': 38, '<pad>': 39}[padding]


# What is refused.


@pytest.mark.parametrize(('config', 'message'), [
    ({'peft_type': 'IA3'}, "peft_type='IA3', only 'LORA' is computed"),
    ({'use_dora': True}, 'use_dora=True, only False is computed'),
    ({'bias': 'all'}, "bias='all', only 'none'"),
    ({'lora_bias': True}, 'lora_bias=True'),
    ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa'"),
    ({'init_lora_weights': 'pissa_niter_16'}, "init_lora_weights='pissa_niter_16'"),
    ({'init_lora_weights': 'olora'}, "init_lora_weights='olora'"),
    ({'init_lora_weights': 'corda'}, "init_lora_weights='corda'"),
    ({'init_lora_weights': 'loftq'}, "init_lora_weights='loftq'"),
    ({'layer_replication': [[0, 2], [1, 2]]}, 'layer_replication='),
    ({'alora_invocation_tokens': [5]}, r'alora_invocation_tokens=\[5\]'),
    ({'target_parameters': ['experts']}, "target_parameters=.'experts'."),
    ({'trainable_token_indices': [1]}, r'trainable_token_indices=\[1\]'),
    ({'kasa_config': {'beta': 1}}, 'kasa_config='),
    ({'use_rslora': 1}, 'use_rslora=1, only False or True'),
    ({'use_more': 1}, 'use_more, which is not known here'),
    ({'r': 0}, 'r: 0, expected a positive integer'),
    ({'r': True}, 'r: True, expected a positive integer'),
    ({'lora_alpha': '16'}, "lora_alpha: '16', expected a finite number"),
    ({'lora_alpha': math.nan}, 'lora_alpha: nan, expected a finite number'),
    ({'alpha_pattern': {'q_proj': math.inf}}, 'alpha_pattern: inf, expected a finite number'),
    ({'rank_pattern': ['q_proj']}, r"rank_pattern=\['q_proj'\], expected dict"),
    ({'task_type': ['SEQ_CLS']}, r"task_type=\['SEQ_CLS'\], expected a name"),
    ({'target_modules': [1]}, r'target_modules: \[1\], expected names'),
    ({'target_modules': '('}, r"'\(' is no regular expression"),
    ({'layers_to_transform': '0'}, "layers_to_transform='0', expected int or list"),
    ({'rank_pattern': {'q_proj': 1.5}}, 'rank_pattern: 1.5, expected a positive integer'),
    ({'alpha_pattern': {'(': 2}}, r"'\(' is no regular expression"),
])
def test_settings_that_are_not_computed(tmp_path, config, message):
    base = write_base(tmp_path / 'base', 'llama')
    folder = write_adapter(tmp_path / 'adapter', base, adapter_of('llama'), **config)
    with pytest.raises(DataError, match=rf'adapter_config.json: {message}'):
        adapters.find(folder)


def test_a_revision_of_a_folder_is_of_no_meaning(tmp_path):
    base = write_base(tmp_path / 'base', 'llama')
    folder = write_adapter(tmp_path / 'adapter', base, adapter_of('llama'), revision='v2')
    assert adapters.find(folder).model == str(base)
    write_adapter(tmp_path / 'adapter', 'owner/name', adapter_of('llama'), revision='v2')
    with pytest.raises(DataError, match="revision='v2' of owner/name, only null is fetched"):
        adapters.find(folder)


UP = 'model.layers.0.mlp.up_proj'


@pytest.mark.parametrize(('change', 'message'), [
    (lambda t: t.pop(f'{UP}.lora_B.weight'), f'missing {UP}.lora_B.weight'),
    (lambda t: t.pop(f'{UP}.lora_A.weight'), f'missing {UP}.lora_A.weight'),
    (lambda t: t.update(pair(UP, 8, 12, rank=4)),
     rf'misshapen {UP}.lora_A.weight \(4, 8\), expected \(3, 8\)'),
    (lambda t: t.update(pair(UP, 8, 13)),
     rf'misshapen {UP}.lora_B.weight \(13, 3\), expected \(12, 3\)'),
    (lambda t: t.update({f'{UP}.lora_A.weight': np.ones((3, 8), np.int32)}), 'expected floats'),
    (lambda t: t.update(pair('model.layers.2.mlp.up_proj', 8, 12)),
     'an adapter of model.layers.2.mlp.up_proj, which the base has not'),
    (lambda t: t.update(pair('score', 8, 2)),
     'an adapter of score, expected only those of linear maps of blocks and pooler'),
    (lambda t: t.update(pair('lm_head', 8, 40)), 'an adapter of lm_head, expected only'),
    (lambda t: t.update({f'{UP}.lora_magnitude_vector': np.ones(12, np.float32)}),
     rf'unexpected {UP}.lora_magnitude_vector \(12,\)'),
    (lambda t: t.update({f'{UP}.base_layer.bias': np.ones(12, np.float32)}),
     f'unexpected {UP}.base_layer.bias'),
    (lambda t: t.update({'model.embed_tokens.lora_embedding_A': random((3, 40))}),
     'unexpected model.embed_tokens.lora_embedding_A'),
    (lambda t: t.pop('score.weight'), 'missing score.weight: peft keeps the head'),
])
def test_tensors_that_do_not_fit(tmp_path, change, message):
    base, given = write_base(tmp_path / 'base', 'llama'), adapter_of('llama')
    change(given)
    folder = write_adapter(tmp_path / 'adapter', base, given)
    expected = rf'{folder}, an adapter of {base}: they do not fit:\n(.*\n)*.*{message}'
    with pytest.raises(DataError, match=expected):
        read(folder)


@pytest.mark.parametrize(('tensors', 'one', 'other'), [
    (pair('layers.0.mlp.up_proj', 8, 12), f'{UP}.weight', 'layers.0.mlp.up_proj.weight'),
    ({'model.score.weight': random((2, 8))}, 'score.weight', 'model.score.weight'),
])
def test_a_tensor_under_two_names_is_refused(tmp_path, tensors, one, other):
    base = write_base(tmp_path / 'base', 'llama')
    folder = write_adapter(tmp_path / 'adapter', base, adapter_of('llama') | tensors)
    either = rf' ({one} beside {other}|{other} beside {one}), expected one of them'
    with pytest.raises(DataError, match=either):
        read(folder)


# Which modules peft 0.21 adapts: what stands in the file for others it ignores, and those without
# tensors it leaves as they are.
K, V = 'model.layers.{}.self_attn.k_proj', 'model.layers.{}.self_attn.v_proj'


@pytest.mark.parametrize(('config', 'adapted', 'missing', 'ignored'), [
    ({'target_modules': ['k_proj']}, [K], [], []),
    ({'target_modules': ['proj']}, [], [], []),
    ({'target_modules': ['k_proj']}, [], [K.format(0), K.format(1)], []),
    ({'target_modules': ['k_proj', 'v_proj']}, [K], [V.format(0), V.format(1)], []),
    ({'target_modules': ['v_proj']}, [K, V], [], [K.format(0), K.format(1)]),
    ({'target_modules': ['k_proj', 'v_proj'], 'exclude_modules': ['v_proj']}, [K], [], []),
    ({'target_modules': r'.*\.1\..*[kv]_proj'}, [K], [V.format(1)], [K.format(0)]),
    ({'target_modules': ['k_proj'], 'layers_to_transform': 1}, [K], [], [K.format(0)]),
    ({'target_modules': ['k_proj'], 'layers_to_transform': [0], 'layers_pattern': 'layers'}, [K],
     [], [K.format(1)]),
    ({'target_modules': ['k_proj'], 'layers_to_transform': [0], 'layers_pattern': ['blocks']}, [K],
     [], [K.format(0), K.format(1)]),
    ({'target_modules': ['k_proj', 'v_proj'], 'modules_to_save': ['v_proj']}, [K], [], []),
])
def test_modules_are_those_that_the_config_names(tmp_path, config, adapted, missing, ignored):
    base = write_base(tmp_path / 'base', 'llama')
    some = pair('model.layers.0.mlp.up_proj', 8, 12)  # so that there is one in every file
    tensors = {'score.weight': random((1, 8))} | some | {
        name: x for place in adapted for i in (0, 1)
        for name, x in pair(place.format(i), 8, 8).items()}
    if 'modules_to_save' in config:
        tensors |= {f'{V.format(i)}.weight': random((8, 8)) for i in (0, 1)}
    targets = config['target_modules']
    targets = (f'(.*0.mlp.up_proj)|({targets})' if isinstance(targets, str)
               else [*targets, 'model.layers.0.mlp.up_proj'])
    folder = write_adapter(tmp_path / 'adapter', base, tensors, **config | {
        'target_modules': targets})
    expected = [
        *(f'an adapter of {name}, which adapter_config.json does not name' for name in [
            *ignored, *([f'{UP}'] if config.get('layers_to_transform') == 1
                        or config.get('layers_pattern') == ['blocks'] else [])]),
        *(f'missing {name}.lora_A.weight and .lora_B.weight, which adapter_config.json names'
          for name in missing)]
    if not expected:
        read(folder)
        return
    with pytest.raises(DataError) as error:
        read(folder)
    assert sorted(str(error.value).split('\n  ')[1:]) == sorted(expected)


def test_all_linear_maps_are_named_at_once(tmp_path):
    base, given = write_base(tmp_path / 'base', 'llama'), adapter_of('llama')
    folder = write_adapter(tmp_path / 'adapter', base, given, target_modules='all-linear')
    with pytest.raises(DataError) as error:
        read(folder)
    # Of 7 in each of two blocks there are tensors of two.
    assert str(error.value).count('\n  missing model.layers.') == 10


def test_modules_that_are_kept_whole_have_tensors(tmp_path):
    base, given = write_base(tmp_path / 'base', 'llama'), adapter_of('llama')
    folder = write_adapter(tmp_path / 'adapter', base, given,
                           modules_to_save=['embed_tokens', 'score'])
    with pytest.raises(DataError, match=r'fit:\n  missing model.embed_tokens.weight, which'):
        read(folder)
    given |= {'model.embed_tokens.weight': random((40, 8))}
    found = read(write_adapter(tmp_path / 'adapter', base, given,
                               modules_to_save=['embed_tokens', 'score']))
    np.testing.assert_array_equal(found.backbone['tokens'], random((40, 8)))


def test_a_table_of_another_vocabulary_is_refused(tmp_path):
    base = write_base(tmp_path / 'base', 'llama')
    given = adapter_of('llama') | {'model.embed_tokens.weight': random((41, 8))}
    with pytest.raises(DataError, match=r'misshapen embed_tokens.weight \(41, 8\)'):
        read(write_adapter(tmp_path / 'adapter', base, given))


def test_files_that_are_no_adapter(tmp_path):
    base = write_base(tmp_path / 'base', 'llama')
    folder = write_adapter(tmp_path / 'adapter', base, adapter_of('llama'))
    path = tmp_path / 'adapter' / 'adapter_model.safetensors'
    safetensors_numpy.save_file({'score.weight': random((1, 8))}, path)
    with pytest.raises(DataError, match='score.weight, expected names that begin with base_model'):
        read(folder)
    safetensors_numpy.save_file({'base_model.model.score.weight': random((1, 8))}, path)
    with pytest.raises(DataError, match='no lora_A.weight and lora_B.weight, expected some'):
        read(folder)
    path.rename(path.with_suffix('.bin'))
    with pytest.raises(DataError, match=r'adapter_model.bin is a pickle, which can run code'):
        read(folder)
    (tmp_path / 'adapter' / 'adapter_config.json').write_text('[]')
    with pytest.raises(DataError, match='adapter_config.json: a list, expected an object'):
        read(folder)


# What peft trains.


@pytest.fixture(scope='module')
def torch():
    module = pytest.importorskip('torch')
    module.manual_seed(0)
    return module


@pytest.fixture(scope='module')
def peft():
    return pytest.importorskip('peft')


def trained(peft, torch, base, folder, config, labels=1):
    """An adapter after some steps of peft, and its logits [2, N] of two dialogues of words."""
    kind = (transformers.AutoModelForSequenceClassification if config.task_type == 'SEQ_CLS'
            else transformers.AutoModelForCausalLM)
    more = {'num_labels': labels, 'pad_token_id': 39} if config.task_type == 'SEQ_CLS' else {}
    whole = kind.from_pretrained(str(base), dtype=torch.float32, attn_implementation='eager',
                                 **more)
    model = peft.get_peft_model(whole, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    tokens = torch.tensor([[3, 5, 8, 2, 38], [3, 5, 30, 11, 38]])
    for _ in range(5):
        logits = model(input_ids=tokens).logits
        optimizer.zero_grad()
        (logits * torch.arange(logits.numel()).reshape(logits.shape).sin()).mean().backward()
        optimizer.step()
    model.save_pretrained(str(folder))
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits.numpy()


def moved(backbone, base):
    """Largest change of a number in the blocks of a base."""
    plain = weights.load_pretrained(str(base)).backbone['blocks']
    return max(map(float, jax.tree.leaves(jax.tree.map(
        lambda a, b: np.abs(a - b).max(), backbone['blocks'], plain))))


@pytest.mark.filterwarnings('ignore::FutureWarning')  # peft asks transformers in an old way
@pytest.mark.parametrize(('family', 'labels', 'config'), [
    ('llama', 1, {'target_modules': ['q_proj', 'v_proj']}),
    ('llama', 10, {'target_modules': 'all-linear', 'use_rslora': True}),
    ('llama', 3, {'target_modules': ['q_proj', 'down_proj'], 'rank_pattern': {'down_proj': 2},
                  'alpha_pattern': {'layers.1.self_attn.q_proj': 1}, 'layers_to_transform': [1]}),
    ('gpt2', 2, {'target_modules': 'all-linear', 'fan_in_fan_out': True}),
    ('bert', 2, {'target_modules': 'all-linear'}),
    ('bert', 1, {'target_modules': ['query'], 'modules_to_save': ['pooler']}),
    ('modernbert', 2, {'target_modules': ['Wqkv'], 'modules_to_save': ['head']}),
])
def test_adapters_of_peft_score_as_there(tmp_path, torch, peft, family, labels, config):
    base = write_base(tmp_path / 'base', family)
    # Adapters that matter from the start.
    config = peft.LoraConfig(task_type='SEQ_CLS', r=4, lora_alpha=8, init_lora_weights=False,
                             **config)
    expected = trained(peft, torch, base, tmp_path / 'adapter', config, labels)
    write_tokenizer(tmp_path / 'adapter')
    model = qrm.load(str(tmp_path / 'adapter'))
    assert moved(model.params['backbone'], base) > 0.01
    scores = model.score(['w3 w5'], [[' w8 w2 <eos>', ' w30 w11 <eos>']])
    np.testing.assert_allclose(scores.quantiles[0], expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_language_models_of_peft_are_read(tmp_path, torch, peft):
    tensors = base_tensors('llama') | {'lm_head.weight': random((40, 8))}
    base = write_base(tmp_path / 'base', 'llama', tensors)
    config = peft.LoraConfig(task_type='CAUSAL_LM', r=4, target_modules='all-linear')
    trained(peft, torch, base, tmp_path / 'adapter', config)
    found = base_lib.read(Base(str(tmp_path / 'adapter'), 0, 'float32'), whole=True, output=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(whole, str(tmp_path / 'adapter')).merge_and_unload()
    merged.save_pretrained(str(tmp_path / 'merged'))
    expected = weights.load_pretrained(str(tmp_path / 'merged'), output=True)
    assert found.head is None
    same(found.backbone, expected.backbone)
    assert moved(found.backbone, base) > 1e-3
