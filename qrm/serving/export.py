"""Reward models as folders that `transformers` loads as sequence classifiers.

A classifier has a linear head, which reads the last token that is not padding, or CLS. So a model
can be exported if what is asked of it, its mean or its quantiles, is linear in what the head reads,
and if it reads there. What is written loads in versions 4 and 5 of transformers with the same
rewards; an adapter by itself in peft, beside the base that it was trained on.

Of a model that is normalised weights are divided by the standard deviation, and the mean goes into
the bias of families that have one. Of others settings keep it, for whoever reads them.
"""

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qrm.data.comparisons import Comparison, DataError
from qrm.data.templates import Tokenizer, change_template
from qrm.data.tokens import save_tokenizer, tokenize
from qrm.models import adapters, checkpoint_heads, families, weights
from qrm.models.families import Family
from qrm.models.tuning import stack_blocks
from qrm.rewards import heads
from qrm.rewards.heads import HeadConfig
from qrm.training.reward_model import RewardModel, check_alone, merged
from qrm.training.workdir import write_text

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}

# How a folder is loaded, on its card.
_LOADING = """\
import torch, transformers

model = transformers.AutoModelForSequenceClassification.from_pretrained(
    'THIS_FOLDER', dtype=torch.float32)"""
_LOADING_ADAPTER = """\
import peft, torch, transformers

base = transformers.AutoModelForSequenceClassification.from_pretrained(
    '{base}', num_labels={labels}, pad_token_id={pad},{mismatched}
    dtype=torch.float32)
model = peft.PeftModel.from_pretrained(base, 'THIS_FOLDER')"""
_PAD = '<|pad|>'
_TOLERANCE = 1e-5  # of a head that is linear but for rounding, in units of its largest output


def export(model: RewardModel, folder: str, *, kind: str = 'mean', dtype: str = 'float32') -> str:
    """Writes a reward model as a sequence classifier with its tokenizer and a model card.

    Args:
      model: the reward model; for 'merged' and 'adapter' with its adapters by themselves.
      folder: to write; it must not exist, and appears when it is complete.
      kind: 'mean', one output, or 'quantiles', one for each; of a model with adapters 'merged',
        what its head gives, or 'adapter', the same without the weights of the base.
      dtype: of the tensors, one of `DTYPES`.

    Returns:
      A line that says what was done.

    Raises:
      DataError: the folder exists, or a classifier cannot compute this model's rewards, as of a
        pairwise model, which has none of a response alone.
    """
    check_alone(model)
    outputs, write = kind, _write_classifier
    if kind in ('merged', 'adapter'):
        if not model.network.tuning.lora:
            raise DataError(f"{kind!r} of a model without adapters, expected a run of "
                            "train.tune='lora', or 'mean' or 'quantiles'")
        outputs = 'mean' if len(model.taus) == 1 else 'quantiles'
        write = _write_adapter if kind == 'adapter' else write
    with appearing(folder) as partial:
        line = write(model, partial, outputs, dtype)
    return f'{folder}: {line}'


@contextlib.contextmanager
def appearing(folder: str) -> Iterator[str]:
    """A folder to be filled, which appears under its name whole or not at all.

    Raises:
      DataError: it exists, or cannot be made.
    """
    if os.path.exists(folder):
        raise DataError(f'{folder}: exists, expected a folder to be made')
    place, name = os.path.split(os.path.abspath(folder))
    try:
        os.makedirs(place, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f'.{name}-', dir=place)
    except OSError as error:
        raise DataError(f'{folder}: cannot be made ({error.strerror})') from error
    with beside as made:
        partial = os.path.join(made, name)
        os.mkdir(partial)
        yield partial
        os.rename(partial, folder)


def linear_head(
    head: HeadConfig, params: Any, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [D, N] and bias [N] of the linear map from what a head reads to mean or quantiles.

    It is read off at the unit vectors, so that whatever is linear is found to be: the mean of a
    quantile, monotone quantile, Gaussian or implicit quantile head, and that of several members.

    Raises:
      DataError: there is no such map.
    """
    if head.gated:
        raise DataError('a gate weighs attributes by the prompt, which no classifier computes')

    def outputs(hidden: jax.Array) -> np.ndarray:
        raw = heads.apply(head, params, hidden)
        found = head.read(raw).distribution.mean[..., None] if kind == 'mean' else (
            head.quantiles(raw))
        return np.asarray(found, np.float64)

    width = _width(head, params)
    bias = outputs(jnp.zeros((1, width)))[0]
    kernel = outputs(jnp.eye(width)) - bias
    probes = np.asarray(jax.random.normal(jax.random.key(0), (16, width)), np.float32)
    expected, found = outputs(probes), probes @ kernel + bias
    if np.abs(found - expected).max() > _TOLERANCE * np.abs(expected).max():
        other = "; its mean may be, try 'mean'" if kind == 'quantiles' else ''
        raise DataError(f'the {kind} of a {head.name} head is no linear function of what it reads, '
                        f'as a classifier computes{other}')
    return kernel.astype(np.float32), bias.astype(np.float32)


def card(
    model: RewardModel, outputs: str, labels: list[str], suffix: str, loading: str,
    header: str = 'library_name: transformers', normalised: str = '',
) -> str:
    """The model card of an exported model.

    Args:
      model: the model.
      outputs: 'mean' or 'quantiles', which the labels are.
      labels: their names.
      suffix: what plain text needs at its end.
      loading: lines of Python that make `model` of transformers.
      header: of its metadata.
      normalised: what labels are of a model that is.
    """
    appended = model.reading.append_eos and not model.reading.rendered_chats
    plain = ' + tokenizer.eos_token' if suffix else ''
    meaning = {
        'mean': 'Its one label is the mean of the predicted distribution of the reward.',
        'quantiles': (f'Its {len(labels)} labels are quantiles of the reward, lowest first, at the '
                      f'levels {", ".join(f"{tau:g}" for tau in model.taus)}. Their mean is the '
                      'reward. Programs that take the first or the last label as the reward '
                      "(TRL's GRPO, verl) take the lowest or the highest quantile: export the mean "
                      'for them.'),
    }[outputs]
    where = {'last': 'at the last token that is not padding', 'first': 'at the first token',
             'dialogue': 'from the mean over all tokens'}[model.network.head.reads[0]]
    ends = ('Dialogues end with the end-of-sequence token: the chat template writes it, plain text '
            'needs it appended. ' if appended and suffix else '')
    listed = f'- normalised: {normalised}\n' if normalised else ''
    if model.reading.as_chats:
        ends = 'It was trained on chats: use the chat template, also for single texts. '
    return f"""---
{header}
pipeline_tag: text-classification
tags: [reward-model]
---
# Reward model

A reward model, trained with [qrm](https://pypi.org/project/qrm-jax/). {meaning}

- architecture: {_family(model).classifier}, {model.settings['model_type']}
- head: {model.network.head.name}, objective: {model.loss.objective}
- read {where}; longest dialogue: {model.reading.max_length} tokens, longer ones lose their left end
{listed}
{ends}Rewards have no bounds: use no sigmoid or softmax on them (`function_to_apply="none"` of a
pipeline, `use_activation: false` of vLLM). They have a meaning beside each other only: a constant
added to all of them changes nothing.

```python
{loading}
tokenizer = transformers.AutoTokenizer.from_pretrained('THIS_FOLDER')
texts = ['\\n\\nHuman: Hello.\\n\\nAssistant: Hello!'{plain}]
print(model(**tokenizer(texts, return_tensors='pt', padding=True)).logits)
```
"""


def _write_classifier(model: RewardModel, folder: str, outputs: str, dtype: str) -> str:
    """Writes a classifier into a folder to be made; returns what it is."""
    model = merged(model)
    settings, backbone = dict(model.settings), model.params['backbone']
    family, head = _family(model), _head_tensors(model, outputs)
    tokenizer, pad = _with_padding(model)
    if pad >= settings['vocab_size']:
        rows = np.zeros((pad + 1 - settings['vocab_size'], backbone['tokens'].shape[1]), np.float32)
        backbone = backbone | {'tokens': np.concatenate([backbone['tokens'], rows])}
        settings['vocab_size'] = pad + 1
    tensors = cast(weights.backbone_tensors(settings, {
        name: leaf for name, leaf in backbone.items() if name != 'output'}) | head, dtype)
    names = _labels(model.network.head, outputs)
    # Those of a checkpoint that training started from speak of its own head.
    rest = {key: value for key, value in settings.items()
            if key not in (*checkpoint_heads.NORMALISING, 'value_head_prefix')}
    settings = families.portable_settings(rest) | {
        'architectures': [family.classifier], 'pad_token_id': pad, 'torch_dtype': dtype,
        'num_labels': len(names), 'id2label': {str(i): name for i, name in enumerate(names)},
        'label2id': {name: i for i, name in enumerate(names)},
        **_for_openrlhf(model, outputs),
        # Read by us alone.
        **_own_settings(model, outputs),
    }
    by = _normalised(model, outputs, True)
    text = card(model, outputs, names, _suffix(tokenizer, model), _LOADING, normalised=by)
    weights.write_folder(folder, settings, tensors)
    _write_tokenizer(tokenizer, model, folder)
    write_text(os.path.join(folder, 'README.md'), text)
    return (f'{family.classifier} with {_count(names)} ({outputs}), {dtype}, '
            f'{sum(t.size for t in tensors.values()):,} parameters'
            + (f'; normalised: {by}' if by else ''))


def _write_adapter(model: RewardModel, folder: str, outputs: str, dtype: str) -> str:
    """Writes an adapter of peft into a folder to be made; returns what it is."""
    base, lora = model.base, model.network.tuning.lora
    if not base.checkpoint:
        raise DataError('an adapter of weights that started at random, which no one else has; '
                        "expected a run with model.checkpoint, or 'merged'")
    source = adapters.find(base.checkpoint)
    if source.adapter:
        raise DataError(f'an adapter to {base.checkpoint}, which is one itself: peft puts adapters '
                        "beside whole models only; expected 'merged'")
    family, settings = _family(model), dict(model.settings)
    backbone = stack_blocks(model.params)['backbone']
    tensors = cast(
        adapters.adapter_tensors(settings, backbone, lora) | weights.backbone_tensors(settings, {
            name: leaf for name, leaf in backbone.items() if name == 'pooler'})
        | _head_tensors(model, outputs), dtype)
    tokenizer, pad = _with_known_padding(model)
    names = _labels(model.network.head, outputs)
    # The head of such a base may have another number of labels.
    other = any(str(name).endswith('ForSequenceClassification')
                for name in settings.get('architectures') or ())
    loading = _LOADING_ADAPTER.format(
        base=base.checkpoint, labels=len(names), pad=pad,
        mismatched=' ignore_mismatched_sizes=True,' if other else '')
    header = 'library_name: peft' + (
        '' if os.path.isabs(base.checkpoint) else f'\nbase_model: {base.checkpoint}')
    parts = 'adapters, head and pooler' if 'pooler' in backbone else 'adapters and head'
    by = _normalised(model, outputs, False)
    text = card(model, outputs, names, _suffix(tokenizer, model), loading, header, by) + f"""
This folder has {parts}; the rest is `{base.checkpoint}`. No adapter says how many labels there are
or what the padding token is: both must be given as above. Labels, in order: {', '.join(names)}.
"""
    wider, note = weights.stored_dtypes(source.model) - {'BF16'}, ''
    if base.dtype == 'bfloat16' and wider:
        note = (f'it was trained beside a base rounded to bfloat16, whose files have '
                f'{" and ".join(sorted(wider))}: beside these, rewards differ by that rounding')
        text += f'\nNote: {note}.\n'
    adapters.write_folder(folder, settings, lora, base.checkpoint, tensors)
    # Read by us alone.
    tokenizer.init_kwargs |= _own_settings(model, outputs)
    _write_tokenizer(tokenizer, model, folder)
    write_text(os.path.join(folder, 'README.md'), text)
    return (f'adapter to {base.checkpoint}, {family.classifier} with {_count(names)} ({outputs}), '
            f'{dtype}, {sum(t.size for t in tensors.values()):,} parameters'
            + (f'; normalised: {by}' if by else '') + (f'; note: {note}' if note else ''))


def _family(model: RewardModel) -> Family:
    return families.FAMILIES[model.settings['model_type']]


def _head_tensors(model: RewardModel, outputs: str) -> dict[str, np.ndarray]:
    """Those of a classifier's head, by their names.

    Raises:
      DataError: it cannot compute what is asked of this model's head.
    """
    head, family, by = model.network.head, _family(model), model.normalisation
    kernel, bias = linear_head(head, model.params['head'], outputs)
    _check_reads(head, model.settings)
    if bias.any() and not _has_bias(model):
        raise DataError(f'the head has a bias, and {family.classifier} has no place for one')
    if by:
        kernel, bias = kernel * np.float32(1.0 / by.std), by.values(bias)
    tensors = {f'{family.head}.weight': np.ascontiguousarray(kernel.T)}
    return tensors | ({f'{family.head}.bias': bias} if _has_bias(model) else {})


def _has_bias(model: RewardModel) -> bool:
    """Whether the head of its classifier has one."""
    return _family(model).head != 'score'


def _normalised(model: RewardModel, outputs: str, whole: bool) -> str:
    """What labels, of a whole model or of an adapter, are if it is normalised; '' if not."""
    by = model.normalisation
    if not by:
        return ''
    if _has_bias(model):
        return f'labels are {by}'
    also = ", and config.json has it as OpenRLHF's mean" if whole and outputs == 'mean' else ''
    return (f'labels are reward / {by.std:g}, and {by.mean / by.std:g} is still to be subtracted, '
            f'as {_family(model).classifier} has no bias; qrm does it{also}')


def _for_openrlhf(model: RewardModel, outputs: str) -> dict[str, Any]:
    """Settings by which OpenRLHF subtracts what the weights cannot."""
    by = model.normalisation
    if not by or _has_bias(model) or outputs != 'mean':
        return {}
    return {'normalize_reward': True, 'mean': by.mean / by.std, 'std': 1.0}


def cast(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Tensors in a dtype.

    Raises:
      DataError: it does not hold them.
    """
    with np.errstate(over='ignore'):
        tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise DataError(f'{name} is not finite in {dtype}, expected a dtype that holds it')
    return tensors


def _count(labels: list[str]) -> str:
    return f'{len(labels)} label{"s" * (len(labels) > 1)}'


def _width(head: HeadConfig, params: Any) -> int:
    """Features that a head reads."""
    first = params['hidden_0']['kernel'] if head.hidden_layers else params['kernel']
    return first.shape[-2]


def _check_reads(head: HeadConfig, settings: Mapping[str, Any]) -> None:
    expected = families.classifier_reads(settings)
    if head.reads != expected:
        raise DataError(f'the head reads {", ".join(head.reads)}, a classifier of the family '
                        f"{settings['model_type']!r} reads {expected[0]}")


def _labels(head: HeadConfig, kind: str) -> list[str]:
    return ['reward'] if kind == 'mean' else [f'quantile {tau:g}' for tau in head.taus]


def _with_padding(model: RewardModel) -> tuple[Tokenizer, int]:
    """The tokenizer with a padding token that no dialogue ends with, and the token's id.

    transformers reads a classifier at the last token that is not padding, so where EOS is read,
    padding must be another token.
    """
    tokenizer = copy.deepcopy(model.tokenizer)
    if model.reading.skipped is not None:
        return tokenizer, model.reading.skipped
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({'pad_token': _PAD})
    return tokenizer, tokenizer.pad_token_id


def _with_known_padding(model: RewardModel) -> tuple[Tokenizer, int]:
    """As `_with_padding`, where the embedding cannot get another row.

    Raises:
      DataError: there is no such token.
    """
    tokenizer, pad = _with_padding(model)
    if pad < model.settings['vocab_size']:
        return tokenizer, pad
    tokenizer = copy.deepcopy(model.tokenizer)
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()
               if token.special and i != tokenizer.eos_token_id}
    # Where dialogues end with EOS they end with no other token. One that is meant for padding goes
    # before others, and those before BOS.
    if not special or not model.reading.append_eos:
        raise DataError(f'{tokenizer.name_or_path}: no padding token but EOS, and the embedding of '
                        f"{model.settings['vocab_size']} rows, which an adapter does not change, "
                        "has none for a new one; export as 'merged', or train with a tokenizer "
                        'that has one')
    tokenizer.pad_token = min(special, key=lambda name: (
        'pad' not in name.lower(), name == tokenizer.bos_token, special[name]))
    return tokenizer, tokenizer.pad_token_id


def _suffix(tokenizer: Tokenizer, model: RewardModel) -> str:
    """What plain text needs appended for this tokenizer to give the tokens that are read here.

    Raises:
      DataError: nothing does, as the tokenizer ends texts in its own way.
    """
    if model.reading.as_chats:  # all goes through the chat template
        return ''
    comparison = Comparison('text', 'a b', (' c',), 'a b')
    [[expected]] = tokenize([comparison], model.tokenizer, model.reading)
    for suffix in ('', tokenizer.eos_token or ''):
        ids = tokenizer('a b c' + suffix)['input_ids']
        while model.reading.skipped is not None and ids and ids[-1] == model.reading.skipped:
            ids = ids[:-1]
        if ids == expected.tolist():
            return suffix
    raise DataError('the tokenizer puts tokens after EOS, expected one that ends texts as the '
                    'model was trained to read them: train with data.append_eos=False')


def _own_settings(model: RewardModel, outputs: str) -> dict[str, Any]:
    """What only `reward_model.load` reads of an exported model."""
    by = model.normalisation
    return {'qrm_append_eos': model.reading.append_eos, 'qrm_as_chats': model.reading.as_chats,
            'qrm_outputs': outputs,
            **({'qrm_mean': by.mean, 'qrm_std': by.std} if by else {})}


def _write_tokenizer(tokenizer: Tokenizer, model: RewardModel, folder: str) -> None:
    if tokenizer.chat_template and model.reading.append_eos and not model.reading.rendered_chats:
        change_template(tokenizer, _ending)
    tokenizer.model_max_length = model.reading.max_length
    tokenizer.truncation_side = 'left'
    save_tokenizer(tokenizer, folder)


def _ending(template: str) -> str:
    """A chat template that ends with EOS, as `tokens.tokenize` ends what the given one renders."""
    # At the end of a template Jinja drops a line feed, here it would be inside.
    return ('{% set rendered %}' + template.removesuffix('\n') + '{% endset %}'
            '{% if add_generation_prompt %}{{ rendered }}{% else %}'
            '{% set text = rendered.rstrip() %}'
            '{{ text if text.endswith(eos_token) else rendered + eos_token }}{% endif %}')
