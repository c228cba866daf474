"""Families of transformers as tables: from settings of a checkpoint to an `Architecture`, and from
names of its tensors to parameters.

A checkpoint has its settings in `config.json` and its tensors in safetensors files, under the names
that `transformers` gives them. A family is added by a row of `FAMILIES`; nothing else knows it.
Settings are read strictly: one that is unknown, or has a value that is not computed, is an error.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qrm.data.comparisons import DataError
from qrm.models.architecture import Architecture, Layer, Rotary

Settings = Mapping[str, Any]


class Tensor(NamedTuple):
    """Where a parameter stands in a checkpoint.

    Attributes:
      names: of its tensor, or of those that are joined in it along its last axis; `{}` is the
        block's number.
      linear: stored [out, in], as by PyTorch's Linear, so transposed here.
      outer: its name never has the family's prefix, as it is part of the classifier.
    """

    names: tuple[str, ...]
    linear: bool = False
    outer: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one `model_type` are read and written.

    Attributes:
      language_model, classifier: names of its classes in `transformers`.
      sizes: fields of `Architecture` -> their settings, which must be there. Where a setting
        is a function of the fields so far if it is missing or null, it stands with that function.
      stated: those of the settings in `sizes` that must be there all the same, as transformers
        has other values for them where they are missing.
      options: fields -> settings and their values where they are missing.
      fixed: fields that are the same in the whole family.
      required: settings -> the values that are computed, the first of which they have if missing.
      layers: from settings and the fields so far, `Architecture.layers`.
      layer_settings: the settings that `layers` reads, but for those of rotary positions.
      rotary: kinds of blocks that have rotary positions of their own, None for all -> setting of
        the base in version 4 of transformers; empty: there are none.
      tensors: parameters (paths of `architecture.leaves`) -> where they stand.
      prefix: of tensor names, which bare decoders lack.
      head: name of a classifier's tensor, without '.weight'.
      language_head: regular expression of tensors that only a language model needs, without those
        of the output embedding.
      output: name of the output embedding, if it is not tied.
      buffers: regular expression of tensors that are no parameters.
      renamed: old ends of names -> new ones.
      start: settings of a model that starts from random weights, beside its sizes.
    """

    language_model: str
    classifier: str
    sizes: Mapping[str, str | tuple[str, Callable[[dict[str, Any]], Any]]]
    options: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    stated: tuple[str, ...] = ()
    required: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    layers: Callable[[Settings, dict[str, Any]], tuple[Layer, ...]] = lambda *_: (Layer(),)
    layer_settings: tuple[str, ...] = ()
    rotary: Mapping[str | None, str] = dataclasses.field(default_factory=dict)
    prefix: str = 'model.'
    head: str = 'score'
    language_head: str = ''
    output: str = 'lm_head.weight'
    buffers: str = ''
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    start: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def settings(self) -> set[str]:
        """All settings that are computed or checked."""
        keys = [key if isinstance(key, str) else key[0] for key in self.sizes.values()]
        rotary = {'rope_parameters', 'rope_scaling', *self.rotary.values()} if self.rotary else ()
        return {*keys, *(key for key, _ in self.options.values()), *_REQUIRED, *self.required,
                *self.layer_settings, *rotary}


# Of every family, as `Family.required`: what version 4 of transformers has in every config, and
# what SmolLM2 and Qwen 2.5 write though nothing reads it.
_REQUIRED = {'is_decoder': (False,), 'add_cross_attention': (False,), 'rope_interleaved': (False,),
             'use_mrope': (False,)}
# Settings that say nothing of what a backbone computes: of names, training, generation, labels,
# tokens and heads.
_SILENT = re.compile(
    r'_.*|architectures|model_type|transformers_version|torch_dtype|dtype|use_cache|'
    r'(bos|eos|pad|sep|cls|unk|mask|decoder_start)_token_id|id2label|label2id|num_labels|'
    r'problem_type|is_encoder_decoder|chunk_size_feed_forward|output_(attentions|hidden_states)|'
    r'return_dict|torchscript|finetuning_task|name_or_path|task_specific_params|'
    r'(resid|embd|attn)_pdrop|.*_?dropout(_prob)?|initializer_\w+|pretraining_tp|'
    # Of generation, which version 4 of transformers writes into every config.
    r'(max|min)_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|'
    r'temperature|top_[kp]|typical_p|(repetition|length|exponential_decay_length)_penalty|'
    r'(encoder_)?no_repeat_ngram_size|bad_words_ids|num_return_sequences|output_scores|'
    r'return_dict_in_generate|forced_(bos|eos)_token_id|remove_invalid_values|'
    r'suppress_tokens|begin_suppress_tokens|prefix|tie_encoder_decoder|tf_legacy_loss|'
    r'use_bfloat16|pruned_heads|cross_attention_hidden_size|tokenizer_class|'
    # Of training, and left by trainers of reward models.
    r'gradient_checkpointing|reference_compile|deterministic_flash_attn|repad_logits_with_grad|'
    r'sparse_pred(iction|_ignore_index)|decoder_bias|hidden_act_param|cache_implementation|'
    r'summary_\w+|reorder_and_upcast_attn|n_ctx|tie_word_embeddings|vhead_\w+|auto_map|'
    r'is_llama_config|'
    # Of heads, which `checkpoint_heads` reads.
    r'qrm_(append_eos|as_chats|outputs|mean|std)|value_head_prefix|normalize_reward|mean|std|'
    r'num_(objectives|quantiles)|gating_\w+')


def family_of(settings: Settings, where: str) -> Family:
    """The family of a checkpoint.

    Raises:
      DataError: there is none for its `model_type`.
    """
    name = settings.get('model_type')
    if not isinstance(name, str) or name not in FAMILIES:
        if isinstance(settings.get('train'), dict):
            raise DataError(f'{where}: the config of a run, expected that of a model; of a run '
                            'that trained one `qrm export` writes a folder')
        raise DataError(f'{where}: model_type {name!r}, expected one of {sorted(FAMILIES)}')
    return FAMILIES[name]


def architecture(settings: Settings, where: str = 'the model') -> Architecture:
    """What a checkpoint computes, from the settings in its `config.json`.

    Raises:
      DataError: an unknown family, a missing size, or a setting that is not computed.
    """
    family = family_of(settings, where)
    unknown = sorted(key for key in settings.keys() - family.settings()
                     if not _SILENT.fullmatch(key))
    if unknown:
        raise DataError(f'{where}: config.json has {", ".join(unknown)}, which the family '
                        f"{settings['model_type']!r} does not know; take it out if it has no "
                        'influence on what is computed')
    for key, values in (_REQUIRED | dict(family.required)).items():
        if settings.get(key, values[0]) not in values:
            raise DataError(f'{where}: {key}={settings[key]!r}, only '
                            f'{" or ".join(map(repr, values))} is computed')
    fields: dict[str, Any] = {}
    for field, rule in family.sizes.items():
        key, default = (rule, None) if isinstance(rule, str) else rule
        value = settings.get(key)
        if (value is None and default is None) or (key in family.stated and key not in settings):
            raise DataError(f'{where}: config.json has no {key!r}')
        # Others may be made of it.
        if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise DataError(f'{where}: config.json: {field}={value!r}, expected a positive integer')
        fields[field] = default(fields) if value is None else value
    for field, (key, default) in family.options.items():
        value = settings.get(key)
        fields[field] = default if value is None else value
    try:
        fields |= {field: value(settings, fields) if callable(value) else value
                   for field, value in family.fixed.items()}
        return Architecture(**fields, layers=family.layers(settings, fields))
    except (TypeError, ValueError) as error:  # TypeError: what should be a number is none.
        raise DataError(f'{where}: config.json: {error}') from error


def classifier_reads(settings: Settings) -> tuple[str, ...]:
    """What the classifier of a family reads, see `HeadConfig.reads`."""
    if FAMILIES[settings['model_type']].fixed.get('causal', True):
        return ('last',)
    return ('dialogue' if settings.get('classifier_pooling') == 'mean' else 'first',)


def portable_settings(settings: Settings) -> dict[str, Any]:
    """Settings that versions 4 and 5 of transformers read alike.

    Version 5 reads `rope_parameters` and, without them, what version 4 wrote; version 4 reads
    only a base and `rope_scaling`, and takes 10000 without a word where those are missing.
    """
    found = {key: value for key, value in settings.items()
             if not key.startswith('_') and key != 'transformers_version'}
    kinds = FAMILIES[settings['model_type']].rotary
    if not kinds:
        return found
    rotaries = {kind: _rotary(settings, kind, theta) for kind, theta in kinds.items()}
    objects = {kind: {'rope_theta': rotary.base, **_scaling(rotary)}
               for kind, rotary in rotaries.items()}
    found['rope_parameters'] = objects.get(None, objects)
    found |= {theta: rotaries[kind].base for kind, theta in kinds.items()}
    main = next(iter(rotaries.values()))
    differ = len({str(_scaling(rotary)) for rotary in rotaries.values()}) > 1
    if differ and 'global_rope_theta' in kinds.values():
        raise DataError('blocks whose rotary positions are scaled differently, which version 4 of '
                        'transformers has no settings for')
    found['rope_scaling'] = None if main.scaling == 'default' else _scaling(main)
    for key in _PERIODS.intersection(FAMILIES[settings['model_type']].layer_settings):
        rest = {name: value for name, value in settings.items() if name != 'layer_types'}
        layers = architecture(settings).layers
        same = [n for n in range(1, len(settings.get('layer_types') or ()) + 2)
                if architecture({**rest, key: n}).layers == layers]
        if same:
            found[key] = same[0]
    return found


# Settings of version 4 in place of `layer_types`: every n-th block sees everything.
_PERIODS = {'sliding_window_pattern', 'global_attn_every_n_layers'}


def _scaling(rotary: Rotary) -> dict[str, Any]:
    fields = {theirs: getattr(rotary, ours) for theirs, ours in _SCALING_KEYS.items()
              if theirs in _SCALING_NEEDS[rotary.scaling]}
    return {'rope_type': rotary.scaling, **fields}


def random_settings(name: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Settings of a model of a family that starts from random weights.

    Args:
      name: of the family.
      sizes: fields of `Architecture`; 0: what follows from the others.

    Raises:
      ValueError: an unknown family, or a size that it has no setting for.
    """
    if name not in FAMILIES:
        raise ValueError(f'family {name!r}, expected one of {sorted(FAMILIES)}')
    family, settings = FAMILIES[name], {'model_type': name}
    for field, value in sizes.items():
        if value and field not in family.sizes:
            raise ValueError(f'{field}={value}, expected 0: the family {name!r} has no such '
                             'setting')
    fields: dict[str, int] = {}
    for field, rule in family.sizes.items():
        key, default = (rule, None) if isinstance(rule, str) else rule
        if not sizes.get(field) and default is None:
            raise ValueError(f'{field}={sizes.get(field, 0)}, expected a number: the family '
                             f'{name!r} has no default')
        fields[field] = settings[key] = sizes.get(field) or default(fields)
    return settings | dict(family.start)


# Settings of a rotary scaling -> fields of `Rotary`; and which of them a scaling reads.
_SCALING_KEYS = {'factor': 'factor', 'low_freq_factor': 'low', 'high_freq_factor': 'high',
                 'original_max_position_embeddings': 'positions'}
_SCALING_NEEDS = {'default': (), 'linear': ('factor',), 'llama3': tuple(_SCALING_KEYS)}


def _rotary(settings: Settings, kind: str | None = None, theta: str = 'rope_theta') -> Rotary:
    """Rotary positions of all blocks, or of those of a kind ('full_attention', ...).

    Version 5 of transformers writes `rope_parameters`, for some families one for each kind;
    version 4 wrote the base by itself and `rope_scaling`. If both are there the base of the first
    one holds, as in transformers.

    Args:
      settings: of the checkpoint.
      kind: see above.
      theta: setting of the base in version 4.
    """
    for key in ('rope_parameters', 'rope_scaling'):
        if settings.get(key) is not None and not isinstance(settings[key], Mapping):
            raise ValueError(f'{key}={settings[key]!r}, expected an object')
    found = settings.get('rope_parameters')
    if found is not None and kind is not None:
        found = found.get(kind)
    # Gemma 3 scales only those of blocks without a window.
    scaling = settings.get('rope_scaling') if theta != 'rope_local_base_freq' else None
    if found is not None and scaling and dict(found) != {**found, **scaling}:
        raise ValueError(f'rope_parameters {found} and rope_scaling {scaling} differ, expected one '
                         'of them')
    if found is None:
        found = {'rope_theta': settings.get(theta), **(scaling or {})}
    found = dict(found)
    base = found.pop('rope_theta', None) or settings.get(theta)
    if base is None:
        # Up to 4.32 transformers had no such setting: all of its models had this base.
        version = re.match(r'4\.(\d+)\.', str(settings.get('transformers_version')))
        if not version or int(version[1]) >= 33:
            raise ValueError(f"neither 'rope_parameters' nor {theta!r}, expected the base of the "
                             'rotary positions; Llama 1 and 2 have 10000')
        base = 10000.0
    old = found.pop('type', 'default')  # an older name, which stands beside the new one
    scaling = found.pop('rope_type', old)
    if not isinstance(scaling, str) or scaling not in _SCALING_NEEDS:
        raise ValueError(f'rope_type {scaling!r}, only {", ".join(_SCALING_NEEDS)} are computed')
    if found.pop('partial_rotary_factor', 1.0) != 1.0:
        raise ValueError('partial_rotary_factor, only 1.0 is computed')
    needed = _SCALING_NEEDS[scaling]
    # What a scaling does not read may stand there all the same.
    if any(key not in found for key in needed) or any(key not in _SCALING_KEYS for key in found):
        raise ValueError(f'rope_type {scaling!r} with {sorted(found)}, expected {list(needed)}')
    return Rotary(base, scaling, **{_SCALING_KEYS[key]: found[key] for key in needed})


def _layers(settings: Settings, kinds: Mapping[str, Layer], default: Callable[[int], str],
            count: int) -> tuple[Layer, ...]:
    """Of each block, by `layer_types` or what they are where those are missing; one if all same."""
    types = settings.get('layer_types') or [default(i) for i in range(count)]
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise ValueError(f'layer_types={types!r}, expected a list of kinds of blocks')
    if len(types) != count:
        raise ValueError(f'layer_types of {len(types)} blocks, expected {count}')
    if unknown := set(types) - set(kinds):
        raise ValueError(f'layer_types {sorted(unknown)}, only {sorted(kinds)} are computed')
    period = next(p for p in range(1, count + 1)
                  if all(types[i] == types[i % p] for i in range(count)))
    return tuple(kinds[kind] for kind in types[:period])


def _plain_layers(settings: Settings, fields: dict[str, Any]) -> tuple[Layer, ...]:
    return (Layer(_rotary(settings)),)


def _mistral_layers(settings: Settings, fields: dict[str, Any]) -> tuple[Layer, ...]:
    return (Layer(_rotary(settings), _or_zero(settings, 'sliding_window', 4096)),)


def _qwen_layers(settings: Settings, fields: dict[str, Any]) -> tuple[Layer, ...]:
    rotary, window = _rotary(settings), 0
    used = settings.get('use_sliding_window', False)
    if used not in (True, False, None):
        raise ValueError(f'use_sliding_window={used!r}, expected true or false')
    if used:
        window = _or_zero(settings, 'sliding_window', 4096)
    below = _count(settings, 'max_window_layers', 28, least=0)
    kinds = {'full_attention': Layer(rotary), 'sliding_attention': Layer(rotary, window)}
    return _layers(settings, kinds, lambda i: (
        'sliding_attention' if window and i >= below else 'full_attention'), fields['num_layers'])


def _gemma2_layers(settings: Settings, fields: dict[str, Any]) -> tuple[Layer, ...]:
    rotary = _rotary(settings)
    kinds = {'full_attention': Layer(rotary),
             'sliding_attention': Layer(rotary, _or_zero(settings, 'sliding_window', 4096))}
    return _layers(settings, kinds, lambda i: ('sliding_attention', 'full_attention')[i % 2],
                   fields['num_layers'])


def _gemma3_layers(settings: Settings, fields: dict[str, Any]) -> tuple[Layer, ...]:
    local = _rotary(settings, 'sliding_attention', 'rope_local_base_freq')
    kinds = {'full_attention': Layer(_rotary(settings, 'full_attention')),
             'sliding_attention': Layer(local, _or_zero(settings, 'sliding_window', 4096))}
    every = _count(settings, 'sliding_window_pattern',
                   _count(settings, '_sliding_window_pattern', 6))
    return _layers(settings, kinds, lambda i: (
        'sliding_attention' if (i + 1) % every else 'full_attention'), fields['num_layers'])


def _modernbert_layers(settings: Settings, fields: dict[str, Any]) -> tuple[Layer, ...]:
    far = _rotary(settings, 'full_attention', 'global_rope_theta')
    near = _rotary(settings, 'sliding_attention', 'local_rope_theta')
    # Half of the window to either side, its end included.
    window = _count(settings, 'local_attention', 128) // 2 + 1
    kinds = {'full_attention': Layer(far), 'sliding_attention': Layer(near, window)}
    every = _count(settings, 'global_attn_every_n_layers', 3)
    return _layers(settings, kinds, lambda i: (
        'sliding_attention' if i % every else 'full_attention'), fields['num_layers'])


# Most families store their tensors as Llama does.
_LLAMA_NORMS = {
    'blocks/attention_norm/scale': Tensor(('layers.{}.input_layernorm.weight',)),
    'blocks/mlp_norm/scale': Tensor(('layers.{}.post_attention_layernorm.weight',)),
}
_LLAMA_REST = {
    'tokens': Tensor(('embed_tokens.weight',)),
    'blocks/attention/qkv/kernel': Tensor(
        tuple(f'layers.{{}}.self_attn.{x}_proj.weight' for x in 'qkv'), linear=True),
    'blocks/attention/qkv/bias': Tensor(
        tuple(f'layers.{{}}.self_attn.{x}_proj.bias' for x in 'qkv')),
    'blocks/attention/output/kernel': Tensor(('layers.{}.self_attn.o_proj.weight',), linear=True),
    'blocks/attention/output/bias': Tensor(('layers.{}.self_attn.o_proj.bias',)),
    'blocks/attention/query_norm/scale': Tensor(('layers.{}.self_attn.q_norm.weight',)),
    'blocks/attention/key_norm/scale': Tensor(('layers.{}.self_attn.k_norm.weight',)),
    'blocks/mlp/up/kernel': Tensor(
        ('layers.{}.mlp.gate_proj.weight', 'layers.{}.mlp.up_proj.weight'), linear=True),
    'blocks/mlp/up/bias': Tensor(('layers.{}.mlp.gate_proj.bias', 'layers.{}.mlp.up_proj.bias')),
    'blocks/mlp/down/kernel': Tensor(('layers.{}.mlp.down_proj.weight',), linear=True),
    'blocks/mlp/down/bias': Tensor(('layers.{}.mlp.down_proj.bias',)),
    'norm/scale': Tensor(('norm.weight',)),
}
_GEMMA_NORMS = {
    'blocks/attention_norm/scale': Tensor(('layers.{}.input_layernorm.weight',)),
    'blocks/attention_out_norm/scale': Tensor(('layers.{}.post_attention_layernorm.weight',)),
    'blocks/mlp_norm/scale': Tensor(('layers.{}.pre_feedforward_layernorm.weight',)),
    'blocks/mlp_out_norm/scale': Tensor(('layers.{}.post_feedforward_layernorm.weight',)),
}

_SIZES = {
    'vocab_size': 'vocab_size',
    'max_positions': 'max_position_embeddings',
    'hidden_size': 'hidden_size',
    'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'num_kv_heads': ('num_key_value_heads', lambda fields: fields['num_heads']),
    'head_dim': ('head_dim', lambda fields: fields['hidden_size'] // fields['num_heads']),
    'intermediate_size': 'intermediate_size',
}
# Not stated by these, where every head has keys and values, and heads share the width.
_PLAIN_SIZES = {field: rule for field, rule in _SIZES.items()
                if field not in ('num_kv_heads', 'head_dim')}
_PLAIN_HEADS = {'num_kv_heads': lambda settings, fields: fields['num_heads'],
                'head_dim': lambda settings, fields: _divided(fields)}
_OPTIONS = {
    'activation': ('hidden_act', 'silu'),
    'norm_epsilon': ('rms_norm_eps', 1e-6),
    'initializer_range': ('initializer_range', 0.02),
    'tied': ('tie_word_embeddings', False),
}


def _divided(fields: dict[str, Any]) -> int:
    if not all(isinstance(fields[key], int) and fields[key] > 0
               for key in ('hidden_size', 'num_heads')):
        return 1  # `Architecture` says what is wrong
    if fields['hidden_size'] % fields['num_heads']:
        raise ValueError(f"hidden_size={fields['hidden_size']} is not divisible by "
                         f"num_heads={fields['num_heads']}")
    return fields['hidden_size'] // fields['num_heads']


def _llama(name: str, **changes: Any) -> Family:
    """A family that differs from Llama in these."""
    values = dict(
        language_model=f'{name}ForCausalLM', classifier=f'{name}ForSequenceClassification',
        sizes=_SIZES, options=_OPTIONS, fixed={'gated': True, 'norm_rounds': True},
        tensors=_LLAMA_NORMS | _LLAMA_REST, layers=_plain_layers, rotary={None: 'rope_theta'},
        start={'rope_theta': 10000.0},
        # Frequencies that old checkpoints store.
        buffers=r'layers\.\d+\.self_attn\.rotary_emb\.inv_freq')
    return Family(**values | changes)


_BIASES = {field: ('attention_bias', False) for field in ('qkv_bias', 'output_bias')}
_GEMMA = {
    'gated': True, 'norm_offset': 1.0, 'norm_places': ('before', 'after'),
    'embedding_scale': lambda settings, fields: fields['hidden_size'] ** 0.5,
    'attention_scale': lambda settings, fields: _positive(settings, 'query_pre_attn_scalar') ** -.5,
}
_GEMMA_OPTIONS = _OPTIONS | _BIASES | {
    'activation': ('hidden_activation', 'gelu_pytorch_tanh'),
    'tied': ('tie_word_embeddings', True),
}
_GEMMA_REQUIRED = {'use_bidirectional_attention': (False, None), 'hidden_act': (
    'gelu_pytorch_tanh',)}


def _or_zero(settings: Settings, key: str, default: float) -> float:
    """What null takes away; where it is missing, what transformers has."""
    value = settings.get(key, default)
    return 0 if value is None else value


def _count(settings: Settings, key: str, default: int, *, least: int = 1) -> int:
    """A whole number; the default where it is missing or null."""
    value = settings.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f'{key}={value!r}, expected a whole number of at least {least}')
    return value


def _positive(settings: Settings, key: str) -> float:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f'{key}={value!r}, expected a positive number')
    return value


_STATED = ('num_key_value_heads', 'head_dim')
_QWEN_START = {'rope_theta': 1000000.0}
_GEMMA_START = {'rope_theta': 10000.0, 'query_pre_attn_scalar': 256, 'sliding_window': 4096}

FAMILIES: Mapping[str, Family] = {
    'gpt2': Family(
        'GPT2LMHeadModel', 'GPT2ForSequenceClassification',
        sizes={
            'vocab_size': 'vocab_size', 'max_positions': 'n_positions', 'hidden_size': 'n_embd',
            'num_layers': 'n_layer', 'num_heads': 'n_head',
            'intermediate_size': ('n_inner', lambda fields: 4 * fields['hidden_size']),
        },
        options={
            'activation': ('activation_function', 'gelu_new'),
            'norm_epsilon': ('layer_norm_epsilon', 1e-5),
            'initializer_range': ('initializer_range', 0.02),
            'tied': ('tie_word_embeddings', True),
        },
        fixed=_PLAIN_HEADS | {
            'norm': 'layer', 'norm_bias': True, 'learned_positions': True, 'qkv_bias': True,
            'output_bias': True, 'mlp_bias': True,
        },
        required={
            'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
        },
        # GPT-2's Conv1D stores [in, out], as here.
        tensors={
            'tokens': Tensor(('wte.weight',)),
            'positions': Tensor(('wpe.weight',)),
            **{f'blocks/{path}/{leaf}': Tensor((f'h.{{}}.{name}.{end}',))
               for path, name in (('attention_norm', 'ln_1'), ('mlp_norm', 'ln_2'))
               for leaf, end in (('scale', 'weight'), ('bias', 'bias'))},
            **{f'blocks/{path}/{leaf}': Tensor((f'h.{{}}.{name}.{end}',))
               for path, name in (('attention/qkv', 'attn.c_attn'),
                                  ('attention/output', 'attn.c_proj'), ('mlp/up', 'mlp.c_fc'),
                                  ('mlp/down', 'mlp.c_proj'))
               for leaf, end in (('kernel', 'weight'), ('bias', 'bias'))},
            'norm/scale': Tensor(('ln_f.weight',)),
            'norm/bias': Tensor(('ln_f.bias',)),
        },
        prefix='transformer.',
        buffers=r'h\.\d+\.attn\.(masked_)?bias',  # causal masks that old checkpoints store
    ),
    'llama': _llama(
        'Llama', options=_OPTIONS | _BIASES | {'mlp_bias': ('mlp_bias', False)}),
    'mistral': _llama(
        'Mistral', stated=('num_key_value_heads',), layers=_mistral_layers,
        layer_settings=('sliding_window',),
        start={'rope_theta': 10000.0, 'sliding_window': None}),
    'qwen2': _llama(
        'Qwen2', stated=('num_key_value_heads',), start=_QWEN_START, layers=_qwen_layers,
        fixed={'gated': True, 'norm_rounds': True, 'qkv_bias': True},
        layer_settings=('use_sliding_window', 'sliding_window', 'max_window_layers',
                        'layer_types')),
    'qwen3': _llama(
        'Qwen3', stated=_STATED, start=_QWEN_START, options=_OPTIONS | _BIASES,
        fixed={'gated': True, 'norm_rounds': True, 'query_key_norm': 'head'}, layers=_qwen_layers,
        layer_settings=('use_sliding_window', 'sliding_window', 'max_window_layers',
                        'layer_types')),
    'gemma2': _llama(
        'Gemma2', stated=_STATED, required=_GEMMA_REQUIRED, tensors=_GEMMA_NORMS | _LLAMA_REST,
        options=_GEMMA_OPTIONS, fixed=_GEMMA | {
            'attention_cap': lambda settings, _: _or_zero(settings, 'attn_logit_softcapping', 50.0),
            'logit_cap': lambda settings, _: _or_zero(settings, 'final_logit_softcapping', 30.0)},
        layers=_gemma2_layers,
        start=_GEMMA_START | {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0},
        layer_settings=('sliding_window', 'layer_types', 'query_pre_attn_scalar',
                        'attn_logit_softcapping', 'final_logit_softcapping')),
    'gemma3_text': _llama(
        'Gemma3', stated=_STATED, classifier='Gemma3TextForSequenceClassification',
        fixed=_GEMMA | {'query_key_norm': 'head'},
        # `transformers` reads a cap of attention logits and does not apply it.
        required=_GEMMA_REQUIRED | {'attn_logit_softcapping': (None,)},
        options=_GEMMA_OPTIONS | {'logit_cap': ('final_logit_softcapping', 0.0)},
        tensors=_GEMMA_NORMS | _LLAMA_REST, layers=_gemma3_layers,
        start=_GEMMA_START | {'rope_theta': 1000000.0, 'rope_local_base_freq': 10000.0,
                              'sliding_window': 512},
        rotary={'full_attention': 'rope_theta', 'sliding_attention': 'rope_local_base_freq'},
        layer_settings=('sliding_window', 'layer_types', 'sliding_window_pattern',
                        'query_pre_attn_scalar')),
    'olmo2': _llama(
        'Olmo2', options=_OPTIONS | _BIASES | {'norm_epsilon': ('rms_norm_eps', 1e-5)},
        fixed={'gated': True, 'norm_places': ('after',), 'query_key_norm': 'projection'},
        tensors=_LLAMA_REST | {path: tensor for path, tensor in _GEMMA_NORMS.items()
                               if path.endswith('out_norm/scale')},
        start={'rope_theta': 500000.0}),
    'bert': Family(
        'BertForMaskedLM', 'BertForSequenceClassification', sizes=_PLAIN_SIZES,
        options={
            'activation': ('hidden_act', 'gelu'), 'norm_epsilon': ('layer_norm_eps', 1e-12),
            'initializer_range': ('initializer_range', 0.02), 'token_types': ('type_vocab_size', 2),
        },
        fixed=_PLAIN_HEADS | {
            'norm': 'layer', 'norm_bias': True, 'norm_places': ('sum',), 'final_norm': False,
            'embedding_norm': True, 'learned_positions': True, 'qkv_bias': True,
            'output_bias': True, 'mlp_bias': True, 'causal': False, 'pooler': 'tanh',
        },
        required={'position_embedding_type': ('absolute',)},
        tensors={
            'tokens': Tensor(('embeddings.word_embeddings.weight',)),
            'positions': Tensor(('embeddings.position_embeddings.weight',)),
            'types': Tensor(('embeddings.token_type_embeddings.weight',)),
            **{f'{path}/{leaf}': Tensor((f'{name}.LayerNorm.{end}',))
               for path, name in (
                   ('embedding_norm', 'embeddings'),
                   ('blocks/attention_out_norm', 'encoder.layer.{}.attention.output'),
                   ('blocks/mlp_out_norm', 'encoder.layer.{}.output'))
               for leaf, end in (('scale', 'weight'), ('bias', 'bias'))},
            **{f'{path}/{leaf}': Tensor(tuple(f'{name}.{end}' for name in names), leaf == 'kernel')
               for path, names in (
                   ('blocks/attention/qkv', tuple(f'encoder.layer.{{}}.attention.self.{x}'
                                                  for x in ('query', 'key', 'value'))),
                   ('blocks/attention/output', ('encoder.layer.{}.attention.output.dense',)),
                   ('blocks/mlp/up', ('encoder.layer.{}.intermediate.dense',)),
                   ('blocks/mlp/down', ('encoder.layer.{}.output.dense',)),
                   ('pooler/dense', ('pooler.dense',)))
               for leaf, end in (('kernel', 'weight'), ('bias', 'bias'))},
        },
        prefix='bert.', head='classifier', language_head=r'cls\..*', output='',
        buffers=r'embeddings\.(position|token_type)_ids',
        renamed={'.gamma': '.weight', '.beta': '.bias'},  # of norms, in the first checkpoints
    ),
    'modernbert': Family(
        'ModernBertForMaskedLM', 'ModernBertForSequenceClassification', sizes=_PLAIN_SIZES,
        options={
            'activation': ('hidden_activation', 'gelu'), 'norm_epsilon': ('norm_eps', 1e-5),
            'norm_bias': ('norm_bias', False), 'mlp_bias': ('mlp_bias', False), **_BIASES,
            'pooler_bias': ('classifier_bias', False),
            'initializer_range': ('initializer_range', 0.02),
        },
        fixed=_PLAIN_HEADS | {
            'norm': 'layer', 'gated': True, 'first_norm': False, 'embedding_norm': True,
            'causal': False, 'pooler': 'activation_norm',
        },
        # The pooler has the activation of the blocks. Its first checkpoints have a second epsilon,
        # which nothing reads.
        required={'layer_norm_eps': (1e-5,), 'position_embedding_type': ('rope', 'absolute'),
                  'hidden_activation': ('gelu',), 'classifier_activation': ('gelu',),
                  'classifier_pooling': ('cls', 'mean')},
        layers=_modernbert_layers,
        layer_settings=('local_attention', 'global_attn_every_n_layers', 'layer_types'),
        rotary={'full_attention': 'global_rope_theta', 'sliding_attention': 'local_rope_theta'},
        tensors={
            'tokens': Tensor(('embeddings.tok_embeddings.weight',)),
            **{f'{path}/{leaf}': Tensor((f'{name}.{end}',))
               for path, name in (
                   ('embedding_norm', 'embeddings.norm'),
                   ('blocks/attention_norm', 'layers.{}.attn_norm'),
                   ('blocks/mlp_norm', 'layers.{}.mlp_norm'), ('norm', 'final_norm'))
               for leaf, end in (('scale', 'weight'), ('bias', 'bias'))},
            **{f'{path}/{leaf}': Tensor((f'{name}.{end}',), leaf == 'kernel')
               for path, name in (
                   ('blocks/attention/qkv', 'layers.{}.attn.Wqkv'),
                   ('blocks/attention/output', 'layers.{}.attn.Wo'),
                   ('blocks/mlp/up', 'layers.{}.mlp.Wi'), ('blocks/mlp/down', 'layers.{}.mlp.Wo'))
               for leaf, end in (('kernel', 'weight'), ('bias', 'bias'))},
            'pooler/dense/kernel': Tensor(('head.dense.weight',), linear=True, outer=True),
            'pooler/dense/bias': Tensor(('head.dense.bias',), outer=True),
            'pooler/norm/scale': Tensor(('head.norm.weight',), outer=True),
            'pooler/norm/bias': Tensor(('head.norm.bias',), outer=True),
        },
        head='classifier', language_head=r'decoder\..*', output='',
        start={'global_rope_theta': 160000.0, 'local_rope_theta': 10000.0},
    ),
}
