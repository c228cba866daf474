"""Tests of the families: what is read of a checkpoint's settings, and every way in which it cannot
be. Nothing is computed here, see test_transformer.py; `transformers` says how it reads the same.
"""

import copy
import dataclasses
import json
import math
import re

import pytest
import transformers

from qrm.data.comparisons import DataError
from qrm.models import families
from qrm.models.architecture import Architecture, Layer, Rotary, leaves
from qrm.models.families import FAMILIES, architecture
from tests.helpers import REFERENCE

DECODERS = [name for name in FAMILIES if name not in ('bert', 'modernbert')]
WITH_ROTARY = [name for name in FAMILIES if name not in ('gpt2', 'bert')]

# Settings of published models as in their config.json, most as version 4 of transformers wrote it,
# and how many parameters the language model has (the encoders without their heads).
_LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
           'original_max_position_embeddings': 8192, 'rope_type': 'llama3'}
PUBLISHED = {
    'Llama-3.1-8B': ({
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 128000, 'eos_token_id': [128001, 128008, 128009], 'hidden_act': 'silu',
        'hidden_size': 4096, 'initializer_range': 0.02, 'intermediate_size': 14336,
        'max_position_embeddings': 131072, 'mlp_bias': False, 'model_type': 'llama',
        'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8,
        'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_scaling': _LLAMA3,
        'rope_theta': 500000.0, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.43.0.dev0', 'use_cache': True, 'vocab_size': 128256,
    }, 8_030_261_248),
    'Llama-2-7b': ({
        'architectures': ['LlamaForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2,
        'hidden_act': 'silu', 'hidden_size': 4096, 'initializer_range': 0.02,
        'intermediate_size': 11008, 'max_position_embeddings': 4096, 'model_type': 'llama',
        'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 32,
        'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_scaling': None,
        'tie_word_embeddings': False, 'torch_dtype': 'float16',
        'transformers_version': '4.31.0.dev0', 'use_cache': True, 'vocab_size': 32000,
    }, 6_738_415_616),
    'SmolLM2-135M': ({
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 0, 'eos_token_id': 0, 'hidden_act': 'silu', 'hidden_size': 576,
        'initializer_range': 0.041666666666666664, 'intermediate_size': 1536,
        'is_llama_config': True, 'max_position_embeddings': 8192, 'model_type': 'llama',
        'num_attention_heads': 9, 'num_hidden_layers': 30, 'num_key_value_heads': 3,
        'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_interleaved': False,
        'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True,
        'torch_dtype': 'bfloat16', 'transformers_version': '4.40.1', 'use_cache': True,
        'vocab_size': 49152,
    }, 134_515_008),
    'Mistral-7B-v0.1': ({
        'architectures': ['MistralForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2,
        'hidden_act': 'silu', 'hidden_size': 4096, 'initializer_range': 0.02,
        'intermediate_size': 14336, 'max_position_embeddings': 32768, 'model_type': 'mistral',
        'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8,
        'rms_norm_eps': 1e-05, 'rope_theta': 10000.0, 'sliding_window': 4096,
        'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.34.0.dev0', 'use_cache': True, 'vocab_size': 32000,
    }, 7_241_732_096),
    'Qwen2.5-0.5B': ({
        'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643,
        'eos_token_id': 151643, 'hidden_act': 'silu', 'hidden_size': 896,
        'initializer_range': 0.02, 'intermediate_size': 4864, 'max_position_embeddings': 32768,
        'max_window_layers': 24, 'model_type': 'qwen2', 'num_attention_heads': 14,
        'num_hidden_layers': 24, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-06,
        'rope_theta': 1000000.0, 'sliding_window': 32768, 'tie_word_embeddings': True,
        'torch_dtype': 'bfloat16', 'transformers_version': '4.40.1', 'use_cache': True,
        'use_mrope': False, 'use_sliding_window': False, 'vocab_size': 151936,
    }, 494_032_768),
    'Qwen3-0.6B': ({
        'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 151643, 'eos_token_id': 151645, 'head_dim': 128, 'hidden_act': 'silu',
        'hidden_size': 1024, 'initializer_range': 0.02, 'intermediate_size': 3072,
        'max_position_embeddings': 40960, 'max_window_layers': 28, 'model_type': 'qwen3',
        'num_attention_heads': 16, 'num_hidden_layers': 28, 'num_key_value_heads': 8,
        'rms_norm_eps': 1e-06, 'rope_scaling': None, 'rope_theta': 1000000,
        'sliding_window': None, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.51.0', 'use_cache': True, 'use_sliding_window': False,
        'vocab_size': 151936,
    }, 596_049_920),
    'gemma-2-2b': ({
        'architectures': ['Gemma2ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'attn_logit_softcapping': 50.0, 'bos_token_id': 2, 'cache_implementation': 'hybrid',
        'eos_token_id': 1, 'final_logit_softcapping': 30.0, 'head_dim': 256,
        'hidden_act': 'gelu_pytorch_tanh', 'hidden_activation': 'gelu_pytorch_tanh',
        'hidden_size': 2304, 'initializer_range': 0.02, 'intermediate_size': 9216,
        'max_position_embeddings': 8192, 'model_type': 'gemma2', 'num_attention_heads': 8,
        'num_hidden_layers': 26, 'num_key_value_heads': 4, 'pad_token_id': 0,
        'query_pre_attn_scalar': 256, 'rms_norm_eps': 1e-06, 'rope_theta': 10000.0,
        'sliding_window': 4096, 'torch_dtype': 'float32', 'transformers_version': '4.42.4',
        'use_cache': True, 'vocab_size': 256000,
    }, 2_614_341_888),
    'gemma-3-1b': ({
        'architectures': ['Gemma3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'attn_logit_softcapping': None, 'bos_token_id': 2, 'cache_implementation': 'hybrid',
        'eos_token_id': 1, 'final_logit_softcapping': None, 'head_dim': 256,
        'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': 1152, 'initializer_range': 0.02,
        'intermediate_size': 6912, 'max_position_embeddings': 32768, 'model_type': 'gemma3_text',
        'num_attention_heads': 4, 'num_hidden_layers': 26, 'num_key_value_heads': 1,
        'pad_token_id': 0, 'query_pre_attn_scalar': 256, 'rms_norm_eps': 1e-06,
        'rope_local_base_freq': 10000, 'rope_scaling': None, 'rope_theta': 1000000,
        'sliding_window': 512, 'sliding_window_pattern': 6, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.50.0.dev0', 'use_cache': True, 'vocab_size': 262144,
    }, 999_885_952),
    'OLMo-2-1124-7B': ({
        'architectures': ['Olmo2ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'eos_token_id': 100257, 'hidden_act': 'silu', 'hidden_size': 4096,
        'initializer_range': 0.02, 'intermediate_size': 11008, 'max_position_embeddings': 4096,
        'model_type': 'olmo2', 'num_attention_heads': 32, 'num_hidden_layers': 32,
        'num_key_value_heads': 32, 'pad_token_id': 100277, 'rms_norm_eps': 1e-06,
        'rope_scaling': None, 'rope_theta': 500000, 'tie_word_embeddings': False,
        'torch_dtype': 'float32', 'transformers_version': '4.47.0', 'use_cache': True,
        'vocab_size': 100352,
    }, 7_298_617_344),
    'bert-base-uncased': ({
        'architectures': ['BertForMaskedLM'], 'attention_probs_dropout_prob': 0.1,
        'gradient_checkpointing': False, 'hidden_act': 'gelu', 'hidden_dropout_prob': 0.1,
        'hidden_size': 768, 'initializer_range': 0.02, 'intermediate_size': 3072,
        'layer_norm_eps': 1e-12, 'max_position_embeddings': 512, 'model_type': 'bert',
        'num_attention_heads': 12, 'num_hidden_layers': 12, 'pad_token_id': 0,
        'position_embedding_type': 'absolute', 'transformers_version': '4.6.0.dev0',
        'type_vocab_size': 2, 'use_cache': True, 'vocab_size': 30522,
    }, 109_482_240),
    'ModernBERT-base': ({
        'architectures': ['ModernBertForMaskedLM'], 'attention_bias': False,
        'attention_dropout': 0.0, 'bos_token_id': 50281, 'classifier_activation': 'gelu',
        'classifier_bias': False, 'classifier_dropout': 0.0, 'classifier_pooling': 'mean',
        'cls_token_id': 50281, 'decoder_bias': True, 'deterministic_flash_attn': False,
        'embedding_dropout': 0.0, 'eos_token_id': 50282, 'global_attn_every_n_layers': 3,
        'global_rope_theta': 160000.0, 'gradient_checkpointing': False,
        'hidden_activation': 'gelu', 'hidden_size': 768, 'initializer_cutoff_factor': 2.0,
        'initializer_range': 0.02, 'intermediate_size': 1152, 'layer_norm_eps': 1e-05,
        'local_attention': 128, 'local_rope_theta': 10000.0, 'max_position_embeddings': 8192,
        'mlp_bias': False, 'mlp_dropout': 0.0, 'model_type': 'modernbert', 'norm_bias': False,
        'norm_eps': 1e-05, 'num_attention_heads': 12, 'num_hidden_layers': 22,
        'pad_token_id': 50283, 'position_embedding_type': 'absolute', 'sep_token_id': 50282,
        'tie_word_embeddings': True, 'torch_dtype': 'float32', 'transformers_version':
        '4.47.0.dev0', 'vocab_size': 50368,
    }, 149_014_272),
    'gpt2': ({
        'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'],
        'attn_pdrop': 0.1, 'bos_token_id': 50256, 'embd_pdrop': 0.1, 'eos_token_id': 50256,
        'initializer_range': 0.02, 'layer_norm_epsilon': 1e-05, 'model_type': 'gpt2',
        'n_ctx': 1024, 'n_embd': 768, 'n_head': 12, 'n_layer': 12, 'n_positions': 1024,
        'resid_pdrop': 0.1, 'summary_activation': None, 'summary_first_dropout': 0.1,
        'summary_proj_to_labels': True, 'summary_type': 'cls_index', 'summary_use_proj': True,
        'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}},
        'vocab_size': 50257,
    }, 124_439_808),
}
BY_FAMILY = {settings['model_type']: settings for settings, _ in PUBLISHED.values()}
# Where one family has several, the first.
BY_FAMILY['llama'] = PUBLISHED['Llama-3.1-8B'][0]


def theirs(settings):
    """The same settings as the installed transformers reads and writes them."""
    # It changes objects that it is given.
    return transformers.AutoConfig.for_model(**copy.deepcopy(settings)).to_dict()


def without(settings, *keys):
    return {key: value for key, value in settings.items() if key not in keys}


def refused(settings, message):
    with pytest.raises(DataError, match=message) as caught:
        architecture(settings, 'checkpoint')
    assert str(caught.value).startswith('checkpoint: ')


# Published models.


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_have_their_number_of_parameters(name):
    settings, count = PUBLISHED[name]
    a = architecture(settings)
    sizes = {path: math.prod(leaf.shape)
             for path, leaf in leaves(a, output=True).items()}
    if name == 'ModernBERT-base':
        # Its backbone has no pooler, and its first block no norm before the attention.
        assert not a.first_norm
        sizes['first norm'] = -a.hidden_size
        sizes = {path: size for path, size in sizes.items() if not path.startswith('pooler/')}
    assert sum(sizes.values()) == count


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_read_the_same_from_version_5(name):
    settings, _ = PUBLISHED[name]
    written = theirs(settings)
    assert not any('rope_theta' in key or key == 'rope_local_base_freq' for key in written)
    assert architecture(written) == architecture(settings)


def test_llama():
    settings, _ = PUBLISHED['Llama-3.1-8B']
    assert architecture(settings) == Architecture(
        vocab_size=128256, max_positions=131072, hidden_size=4096, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, intermediate_size=14336, activation='silu', gated=True,
        norm='rms', norm_epsilon=1e-5, norm_rounds=True, tied=False, layers=(
            Layer(Rotary(500000.0, 'llama3', 8.0, 1.0, 4.0, 8192)),))
    biased = settings | {'attention_bias': True, 'mlp_bias': True}
    assert architecture(biased) == dataclasses.replace(
        architecture(settings), qkv_bias=True, output_bias=True, mlp_bias=True)


def test_mistral():
    settings, _ = PUBLISHED['Mistral-7B-v0.1']
    a = architecture(settings)
    assert a.layers == (Layer(Rotary(10000.0), 4096),)
    assert (a.head_dim, a.norm_rounds, a.qkv_bias) == (128, True, False)
    # Version 0.2 has none.
    assert architecture(settings | {'sliding_window': None}).layers == (Layer(Rotary(10000.0)),)


def test_qwen2():
    settings, _ = PUBLISHED['Qwen2.5-0.5B']
    a = architecture(settings)
    assert (a.qkv_bias, a.output_bias, a.mlp_bias, a.tied) == (True, False, False, True)
    full, near = Layer(Rotary(1e6)), Layer(Rotary(1e6), 32768)
    assert a.layers == (full,)
    windows = settings | {'use_sliding_window': True}
    assert architecture(windows | {'max_window_layers': 21}).layers == (full,) * 21 + (near,) * 3
    assert architecture(windows | {'max_window_layers': 0}).layers == (near,)
    assert architecture(windows).layers == (full,)
    types = ['sliding_attention', 'full_attention', 'full_attention'] * 8
    assert architecture(windows | {'layer_types': types}).layers == (near, full, full)


def test_qwen3():
    a = architecture(PUBLISHED['Qwen3-0.6B'][0])
    assert (a.query_key_norm, a.head_dim, a.num_heads * a.head_dim) == ('head', 128, 2048)
    assert not a.qkv_bias
    biased = architecture(PUBLISHED['Qwen3-0.6B'][0] | {'attention_bias': True})
    assert biased == dataclasses.replace(a, qkv_bias=True, output_bias=True)


def test_gemma2():
    settings, _ = PUBLISHED['gemma-2-2b']
    a = architecture(settings)
    assert (a.norm_offset, a.norm_rounds, a.norm_places) == (1.0, False, ('before', 'after'))
    assert (a.embedding_scale, a.attention_scale) == (48.0, 0.0625)
    assert (a.attention_cap, a.logit_cap, a.tied) == (50.0, 30.0, True)
    assert a.activation == 'gelu_pytorch_tanh'
    # The first block has the window.
    assert a.layers == (Layer(Rotary(10000.0), 4096), Layer(Rotary(10000.0)))
    # 27B scales by the width over the number of heads, not by the size of a head.
    wide = architecture(settings | {'query_pre_attn_scalar': 144})
    assert wide.attention_scale == pytest.approx(1 / 12)
    uncapped = architecture(settings | {'attn_logit_softcapping': None,
                                        'final_logit_softcapping': None})
    assert (uncapped.attention_cap, uncapped.logit_cap) == (0.0, 0.0)


def test_gemma3():
    settings, _ = PUBLISHED['gemma-3-1b']
    a = architecture(settings)
    near, far = Layer(Rotary(10000), 512), Layer(Rotary(1000000))
    # Five blocks with a window, then one without; the last two have one.
    assert a.layers == (near,) * 5 + (far,)
    assert a.layer(24) == a.layer(25) == near
    assert (a.query_key_norm, a.attention_cap, a.logit_cap) == ('head', 0.0, 0.0)
    assert a.embedding_scale == pytest.approx(33.941125, rel=1e-7)
    assert architecture(settings | {'sliding_window_pattern': 2}).layers == (near, far)
    # 4B and larger scale the positions of the blocks that see far.
    scaled = architecture(settings | {'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}})
    assert scaled.layers == (near,) * 5 + (Layer(Rotary(1000000, 'linear', 8.0)),)


def test_olmo2():
    a = architecture(PUBLISHED['OLMo-2-1124-7B'][0])
    assert (a.norm_places, a.query_key_norm) == (('after',), 'projection')
    assert not a.norm_rounds


def test_bert():
    assert architecture(PUBLISHED['bert-base-uncased'][0]) == Architecture(
        vocab_size=30522, max_positions=512, hidden_size=768, num_layers=12, num_heads=12,
        num_kv_heads=12, head_dim=64, intermediate_size=3072, activation='gelu', norm='layer',
        norm_epsilon=1e-12, norm_places=('sum',), norm_bias=True, final_norm=False,
        embedding_norm=True, learned_positions=True, token_types=2, qkv_bias=True,
        output_bias=True, mlp_bias=True, causal=False, pooler='tanh')


def test_modernbert():
    settings, _ = PUBLISHED['ModernBERT-base']
    a = architecture(settings)
    # 128 tokens are 64 to either side and the token itself.
    near, far = Layer(Rotary(10000.0), 65), Layer(Rotary(160000.0))
    assert a.layers == (far, near, near)
    assert (a.causal, a.first_norm, a.embedding_norm, a.gated) == (False, False, True, True)
    assert (a.pooler, a.norm_bias, a.qkv_bias, a.pooler_bias) == (
        'activation_norm', False, False, False)
    assert architecture(settings | {'global_attn_every_n_layers': 2}).layers == (far, near)


def test_gpt2():
    a = architecture(PUBLISHED['gpt2'][0])
    assert (a.intermediate_size, a.head_dim, a.num_kv_heads, a.tied) == (3072, 64, 12, True)
    assert a.layers == (Layer(),)
    assert a.learned_positions
    assert architecture(PUBLISHED['gpt2'][0] | {'n_inner': 100}).intermediate_size == 100


@pytest.mark.parametrize('name', FAMILIES)
def test_classifiers_read_the_last_or_the_first_token(name):
    expected = {'bert': ('first',), 'modernbert': ('dialogue',)}.get(name, ('last',))
    assert families.classifier_reads(BY_FAMILY[name]) == expected
    if name == 'modernbert':
        assert families.classifier_reads({'model_type': name}) == ('first',)
        assert families.classifier_reads(
            {'model_type': name, 'classifier_pooling': 'cls'}) == ('first',)


# As transformers reads them.


@pytest.mark.parametrize('name', FAMILIES)
def test_all_settings_of_installed_transformers_are_known(name):
    settings = transformers.AutoConfig.for_model(name).to_dict()
    assert architecture(settings) == architecture(json.loads(json.dumps(settings)))


@pytest.mark.parametrize('name', FAMILIES)
def test_settings_that_are_missing_are_what_transformers_takes(name):
    # Or an error.
    ours = FAMILIES[name].settings()
    settings = dict(BY_FAMILY[name])
    if name.startswith('qwen'):
        settings |= {'use_sliding_window': True, 'sliding_window': 100, 'max_window_layers': 8}
    found = 0
    for key in ours & settings.keys():
        for changed in (without(settings, key), settings | {key: None}):
            try:
                a = architecture(changed)
            except DataError:
                continue
            expected = _theirs_or_none(changed)
            if expected is None:
                assert key in changed, key  # some null is no value for it
                continue
            assert a == expected, (key, changed.get(key, 'missing'))
            found += 1
    assert found >= 3


def _theirs_or_none(settings):
    try:
        written = theirs(settings)
    except Exception:  # It has errors of many types.
        return None
    return architecture(written)


@pytest.mark.parametrize('name', [name for name in FAMILIES if name != 'gpt2'])
def test_settings_of_references_are_read_as_written_and_as_before(name):
    # They were written by version 5; the other way round with settings of version 4.
    settings = json.loads((REFERENCE / name / 'config.json').read_text())
    a = architecture(settings)
    rotary = settings.pop('rope_parameters', None)
    settings.pop('layer_types', None)
    old = {
        'qwen2': {'max_window_layers': 1}, 'qwen3': {'max_window_layers': 2},
        'gemma3_text': {'rope_local_base_freq': 10.0, 'sliding_window_pattern': 3,
                        'layer_types': None},
        'modernbert': {'global_rope_theta': 100.0, 'local_rope_theta': 10.0,
                       'global_attn_every_n_layers': 3},
    }.get(name, {})
    if rotary is not None and name != 'modernbert':
        rotary = rotary.get('full_attention', rotary)
        old |= {'rope_theta': rotary['rope_theta']}
        if rotary['rope_type'] != 'default':
            old |= {'rope_scaling': without(rotary, 'rope_theta')}
    if name == 'gemma3_text':
        # Version 4 could not put the blocks that see far first.
        near, far = a.layers[1], a.layers[0]
        a = dataclasses.replace(a, layers=(near, near, far))
    assert architecture(settings | old) == a


def test_rotary_parameters_of_version_5_hold():
    settings, _ = PUBLISHED['Llama-3.1-8B']
    both = without(settings, 'rope_scaling') | {
        'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 7.0}}
    assert architecture(both).layers == (Layer(Rotary(7.0, 'linear', 2.0)),)
    assert architecture(theirs(both)) == architecture(both)
    settings, _ = PUBLISHED['gemma-3-1b']
    both = settings | {'rope_parameters': {
        'full_attention': {'rope_type': 'default', 'rope_theta': 7.0},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 5.0}}}
    assert {layer.rotary for layer in architecture(both).layers} == {Rotary(7.0), Rotary(5.0)}
    assert architecture(theirs(both)) == architecture(both)


def test_a_scaling_beside_another_is_refused():
    # transformers takes the older one, whose base may be that of the newer one.
    settings, _ = PUBLISHED['Llama-3.1-8B']
    parameters = {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 500000.0}
    refused(settings | {'rope_parameters': parameters}, 'rope_parameters .* and rope_scaling .* '
            'differ, expected one of them')
    same = settings | {'rope_parameters': _LLAMA3 | {'rope_theta': 500000.0}}
    assert architecture(same) == architecture(settings)


@pytest.mark.parametrize('name', ['qwen3', 'modernbert'])
def test_scalings_of_version_4_are_for_all_blocks(name):
    # But for Gemma 3.
    settings = BY_FAMILY[name] | {'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}}
    if name == 'qwen3':
        settings |= {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 3}
    a = architecture(settings)
    assert {layer.window > 0 for layer in a.layers} == {True, False}
    assert {(layer.rotary.scaling, layer.rotary.factor) for layer in a.layers} == {('linear', 4.0)}
    assert architecture(theirs(settings)) == a


def test_older_name_of_a_scaling():
    settings, _ = PUBLISHED['OLMo-2-1124-7B']
    for scaling in ({'type': 'linear', 'factor': 2.0},
                    {'type': 'linear', 'rope_type': 'linear', 'factor': 2.0}):
        layer, = architecture(settings | {'rope_scaling': scaling}).layers
        assert layer == Layer(Rotary(500000, 'linear', 2.0))


def test_what_a_scaling_does_not_read_may_stand_there():
    # As where a scaling was taken back.
    settings, _ = PUBLISHED['Llama-3.1-8B']
    scaling = _LLAMA3 | {'rope_type': 'linear'}
    assert architecture(settings | {'rope_scaling': scaling}).layers == (
        Layer(Rotary(500000.0, 'linear', 8.0)),)


# What is refused.


@pytest.mark.parametrize('name', WITH_ROTARY)
def test_no_base_of_rotary_positions(name):
    family = FAMILIES[name]
    refused(without(BY_FAMILY[name], *family.rotary.values()),
            "neither 'rope_parameters' nor '.*'.*Llama 1 and 2 have 10000")
    for theta in family.rotary.values():
        refused(without(BY_FAMILY[name], theta), f"neither 'rope_parameters' nor '{theta}'")


@pytest.mark.parametrize('version', ['4.28.0.dev0', '4.31.0', '4.32.1'])
def test_llamas_before_there_was_a_base(version):
    settings = PUBLISHED['Llama-2-7b'][0] | {'transformers_version': version}
    assert architecture(settings).layers == (Layer(Rotary(10000.0)),)
    # Meta's later files of the same models say it, and read the same.
    assert architecture(settings | {'rope_theta': 10000.0}) == architecture(settings)


@pytest.mark.parametrize('version', ['4.33.0', '4.45.2', '5.0.0', None])
def test_later_llamas_without_a_base(version):
    refused(PUBLISHED['Llama-2-7b'][0] | {'transformers_version': version},
            "neither 'rope_parameters' nor 'rope_theta'")


def test_unknown_family():
    for name in ('phi3', 'gemma3', None, ['llama']):
        with pytest.raises(DataError, match="model_type .*, expected one of .*'llama'"):
            architecture(PUBLISHED['Llama-3.1-8B'][0] | {'model_type': name}, 'here')


@pytest.mark.parametrize('name', FAMILIES)
def test_unknown_settings_are_named_together(name):
    refused(BY_FAMILY[name] | {'logit_scale': 0.5, 'alibi': True},
            f"config.json has alibi, logit_scale, which the family '{name}' does not know")


@pytest.mark.parametrize(('name', 'key', 'value', 'message'), [
    *((name, key, True, f'{key}=True, only False is computed')
      for name in FAMILIES for key in ('add_cross_attention', 'is_decoder')),
    *((name, 'partial_rotary_factor', 0.5, 'config.json has partial_rotary_factor')
      for name in FAMILIES),
    *((name, 'use_bidirectional_attention', True,
       'use_bidirectional_attention=True, only False or None is computed')
      for name in ('gemma2', 'gemma3_text')),
    *((name, 'layer_types', ['full_attention'], 'layer_types of 1 blocks, expected')
      for name in ('qwen2', 'qwen3', 'gemma2', 'gemma3_text', 'modernbert')),
    *((name, 'layer_types', ['full_attention', 'linear_attention'] * (
        BY_FAMILY[name]['num_hidden_layers'] // 2),
       r"layer_types \['linear_attention'\], only \['full_attention', 'sliding_attention'\] are")
      for name in ('qwen2', 'qwen3', 'gemma2', 'gemma3_text', 'modernbert')),
    ('llama', 'layer_types', ['full_attention'] * 32, 'config.json has layer_types'),
    ('mistral', 'attention_bias', False, 'config.json has attention_bias'),
    ('gemma2', 'hidden_act', 'gelu', "hidden_act='gelu', only 'gelu_pytorch_tanh' is computed"),
    ('gemma2', 'query_pre_attn_scalar', 0, 'query_pre_attn_scalar=0, expected a positive number'),
    ('gemma2', 'query_pre_attn_scalar', None, 'query_pre_attn_scalar=None, expected a positive'),
    ('gemma3_text', 'attn_logit_softcapping', 50.0,
     'attn_logit_softcapping=50.0, only None is computed'),
    ('gpt2', 'scale_attn_weights', False, 'scale_attn_weights=False, only True is computed'),
    ('gpt2', 'scale_attn_by_inverse_layer_idx', True,
     'scale_attn_by_inverse_layer_idx=True, only False is computed'),
    ('bert', 'position_embedding_type', 'relative_key',
     "position_embedding_type='relative_key', only 'absolute' is computed"),
    ('modernbert', 'classifier_activation', 'relu', "classifier_activation='relu', only 'gelu' is"),
    # The pooler's activation would be another.
    ('modernbert', 'hidden_activation', 'silu', "hidden_activation='silu', only 'gelu' is"),
    ('modernbert', 'classifier_pooling', 'max', "classifier_pooling='max', only 'cls' or 'mean'"),
    ('llama', 'hidden_act', 'quick_gelu', "activation='quick_gelu', expected one of"),
    ('llama', 'num_key_value_heads', 5, 'num_heads=32 is not divisible by num_kv_heads=5'),
    ('bert', 'num_attention_heads', 10, 'hidden_size=768 is not divisible by num_heads=10'),
    ('llama', 'head_dim', 127, 'head_dim=127, expected an even number'),
    ('mistral', 'sliding_window', -1, 'window=-1, expected an integer that is not negative'),
    ('mistral', 'sliding_window', '4096', "window='4096', expected an integer"),
    ('bert', 'type_vocab_size', '2', "token_types='2', expected an integer"),
    ('llama', 'rms_norm_eps', '1e-6', "norm_epsilon='1e-6', expected a number"),
    ('llama', 'attention_bias', 'false', "qkv_bias='false', expected true or false"),
    ('llama', 'rope_theta', '10000', "rotary base='10000', expected a positive number"),
    ('llama', 'rope_theta', 0, 'rotary base=0, expected a positive number'),
    ('llama', 'rope_scaling', 'linear', "rope_scaling='linear', expected an object"),
    ('llama', 'rope_parameters', 'linear', "rope_parameters='linear', expected an object"),
    ('gemma3_text', 'rope_parameters', [1], r'rope_parameters=\[1\], expected an object'),
    ('gemma3_text', 'sliding_window_pattern', '6', "sliding_window_pattern='6', expected a whole"),
    ('modernbert', 'local_attention', -1, 'local_attention=-1, expected a whole number'),
    ('qwen2', 'use_sliding_window', 'false', "use_sliding_window='false', expected true or false"),
    ('qwen2', 'max_window_layers', '1', "max_window_layers='1', expected a whole number"),
    ('qwen3', 'layer_types', 5, 'layer_types=5, expected a list of kinds'),
])
def test_settings_that_are_not_computed(name, key, value, message):
    refused(BY_FAMILY[name] | {key: value}, message)


@pytest.mark.parametrize('kind', ['yarn', 'dynamic', 'longrope', 'proportional', 'su', None])
@pytest.mark.parametrize('name', WITH_ROTARY)
def test_unknown_rotary_scalings(name, kind):
    scaling = {'rope_type': kind, 'factor': 2.0}
    message = f'rope_type {kind!r}, only default, linear, llama3 are computed'
    refused(BY_FAMILY[name] | {'rope_scaling': scaling}, message)
    parameters = scaling | {'rope_theta': 10000.0}
    if None not in FAMILIES[name].rotary:
        parameters = dict.fromkeys(FAMILIES[name].rotary, parameters)
    refused(without(BY_FAMILY[name], 'rope_scaling') | {'rope_parameters': parameters}, message)


@pytest.mark.parametrize(('scaling', 'message'), [
    ({'rope_type': 'default', 'partial_rotary_factor': 0.5}, 'partial_rotary_factor, only 1.0'),
    ({'rope_type': 'linear'}, r"rope_type 'linear' with \[\], expected \['factor'\]"),
    ({'rope_type': 'linear', 'factor': 2.0, 'truncate': True},
     r"rope_type 'linear' with \['factor', 'truncate'\], expected \['factor'\]"),
    ({'rope_type': 'linear', 'factor': 0}, 'rotary factor=0, expected a positive number'),
    (without(_LLAMA3, 'low_freq_factor'), "rope_type 'llama3' with .*'low_freq_factor'"),
    (without(_LLAMA3, 'original_max_position_embeddings'), "'original_max_position_embeddings'"),
    (_LLAMA3 | {'high_freq_factor': 1.0}, 'rotary low=1.0, expected less than high=1.0'),
    (_LLAMA3 | {'factor': None}, 'rotary factor=None, expected a positive number'),
])
def test_rotary_scalings_that_are_incomplete(scaling, message):
    settings, _ = PUBLISHED['Llama-3.1-8B']
    refused(settings | {'rope_scaling': scaling}, message)
    refused(without(settings, 'rope_scaling') | {
        'rope_parameters': scaling | {'rope_theta': 500000.0}}, message)


@pytest.mark.parametrize('name', FAMILIES)
def test_sizes_that_are_no_sizes(name):
    settings = BY_FAMILY[name]
    for field, rule in FAMILIES[name].sizes.items():
        key, optional = (rule, False) if isinstance(rule, str) else (rule[0], True)
        for value in (0, -1, True, '4', 4.0, [4]):
            refused(settings | {key: value},
                    f'{field}={re.escape(repr(value))}, expected a positive integer')
        # Null is what follows from the others; transformers may take another if it is missing.
        for changed, known in (
                (settings | {key: None}, optional),
                (without(settings, key), optional and key not in FAMILIES[name].stated)):
            if known:
                architecture(changed)
            else:
                refused(changed, f"config.json has no '{key}'")


@pytest.mark.parametrize('name', FAMILIES)
def test_no_setting_ends_in_another_error(name):
    values = (None, True, 0, -1, 2.5, float('nan'), 'x', '', [], [1], ['full_attention'], {},
              {'rope_type': 'linear'}, {'full_attention': None}, {'full_attention': 'x'})
    for key in sorted(FAMILIES[name].settings() | {'model_type'}):
        for value in values:
            try:
                found = architecture(BY_FAMILY[name] | {key: value})
            except DataError:
                continue
            assert isinstance(found, Architecture)


@pytest.mark.parametrize('name', DECODERS)
def test_heads_that_follow_from_others(name):
    settings = BY_FAMILY[name]
    if name == 'gpt2':
        assert architecture(settings).num_kv_heads == settings['n_head']
        return
    for key in {'head_dim', 'num_key_value_heads'} - set(FAMILIES[name].stated):
        assert architecture(settings | {key: None}) == architecture(without(settings, key))
    a = architecture(settings | {'head_dim': None, 'num_key_value_heads': None})
    assert a.num_kv_heads == a.num_heads
    assert a.head_dim == a.hidden_size // a.num_heads
    assert architecture(settings | {'head_dim': 6}).head_dim == 6


# From random weights.

_SIZES = {'vocab_size': 50, 'max_positions': 64, 'hidden_size': 16, 'num_layers': 2,
          'num_heads': 4, 'num_kv_heads': 0, 'head_dim': 0, 'intermediate_size': 32}


@pytest.mark.parametrize('name', FAMILIES)
def test_random_settings(name):
    settings = families.random_settings(name, _SIZES)
    a = architecture(settings)
    for field, size in _SIZES.items():
        assert getattr(a, field) == (size or {'num_kv_heads': 4, 'head_dim': 4}[field])
    # They are what a published model of the family computes, in small.
    published = architecture(BY_FAMILY[name])
    for field in ('gated', 'norm', 'norm_offset', 'norm_places', 'pooler', 'query_key_norm',
                  'attention_scale', 'attention_cap', 'logit_cap', 'qkv_bias', 'causal'):
        assert getattr(a, field) == getattr(published, field)
    assert len({layer.window > 0 for layer in published.layers}) >= len(
        {layer.window > 0 for layer in a.layers})
    # transformers reads them as well, so that what is trained from them can be exported.
    assert architecture(theirs(settings)) == a


def test_random_settings_that_there_are_not():
    with pytest.raises(ValueError, match="family 'gpt', expected one of .*'gpt2'"):
        families.random_settings('gpt', _SIZES)
    for name in ('gpt2', 'bert', 'modernbert'):
        with pytest.raises(ValueError, match=f'num_kv_heads=2, expected 0: the family {name!r}'):
            families.random_settings(name, _SIZES | {'num_kv_heads': 2})
    with pytest.raises(ValueError, match=r'num_layers=0, expected a number: .* has no default'):
        families.random_settings('llama', _SIZES | {'num_layers': 0})


def test_random_settings_state_what_follows_from_others():
    assert families.random_settings('gpt2', _SIZES | {'intermediate_size': 0}) == {
        'model_type': 'gpt2', 'vocab_size': 50, 'n_positions': 64, 'n_embd': 16, 'n_layer': 2,
        'n_head': 4, 'n_inner': 64}
    settings = families.random_settings('gemma2', _SIZES)
    assert (settings['num_key_value_heads'], settings['head_dim']) == (4, 4)


# For both versions of transformers.


@pytest.mark.parametrize('name', FAMILIES)
def test_portable_settings_read_the_same(name):
    for settings in (BY_FAMILY[name], theirs(BY_FAMILY[name])):
        portable = families.portable_settings(settings)
        assert architecture(portable) == architecture(settings)
        assert architecture(theirs(portable)) == architecture(settings)
        # As version 4 does, which does not know the first.
        assert architecture(without(portable, 'rope_parameters')) == architecture(settings)
        assert not any(key.startswith('_') for key in portable)


# Tensors.


def _with_all_biases(name):
    settings = BY_FAMILY[name]
    biases = [key for key, _ in FAMILIES[name].options.values() if key.endswith('bias')]
    return architecture(settings | dict.fromkeys(biases, True))


@pytest.mark.parametrize('name', FAMILIES)
def test_every_parameter_has_its_tensors(name):
    a, family = _with_all_biases(name), FAMILIES[name]
    for path, leaf in leaves(a).items():
        row = family.tensors[path]
        assert all(('{}' in key) == path.startswith('blocks/') for key in row.names)
        # Matrices of Linear are stored the other way round; Conv1D's of GPT-2 are not.
        assert row.linear == (path.endswith('kernel') and name != 'gpt2')
        if len(row.names) > 1:
            assert len(row.names) == len(a.parts[path.split('/')[-2]])
            assert sum(a.parts[path.split('/')[-2]]) == leaf.shape[-1]
    names = [key for row in family.tensors.values() for key in row.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize('name', ['gpt2', 'bert', 'modernbert'])
def test_every_tensor_has_its_parameter(name):
    assert set(FAMILIES[name].tensors) == set(leaves(_with_all_biases(name)))


def test_every_tensor_of_the_other_families_has_a_parameter_of_one():
    others = [name for name in DECODERS if name != 'gpt2']
    needed = {path for name in others for path in leaves(_with_all_biases(name))}
    assert needed == {path for name in others for path in FAMILIES[name].tensors}


@pytest.mark.parametrize('name', FAMILIES)
def test_an_output_embedding_has_a_name(name):
    a, family = architecture(BY_FAMILY[name]), FAMILIES[name]
    untied = dataclasses.replace(a, tied=False)
    assert set(leaves(untied, output=True)) - set(leaves(a)) == {'output'}
    if a.causal:
        assert family.output == 'lm_head.weight'
