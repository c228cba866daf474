"""Reward models as folders that `transformers` loads as sequence classifiers.

A classifier has a linear head, which reads the last token that is not padding, or CLS. So a model
can be exported if what is asked of it, its mean or its quantiles, is linear in what the head reads,
and if it reads there. What is written loads in versions 4 and 5 of transformers with the same
rewards.
"""

import copy
import os
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qrm.data.comparisons import DataError, parse_row
from qrm.data.tokens import save_tokenizer, tokenize
from qrm.models import families, weights
from qrm.rewards import heads
from qrm.rewards.heads import HeadConfig
from qrm.training.reward_model import RewardModel
from qrm.training.workdir import write_text

KINDS = ('mean', 'quantiles')
DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}

_PAD = '<|pad|>'
_TOLERANCE = 1e-5  # of a head that is linear but for rounding, in units of its largest output


def export(model: RewardModel, folder: str, *, kind: str = 'mean', dtype: str = 'float32') -> str:
    """Writes a reward model as a sequence classifier with its tokenizer and a model card.

    Args:
      model: the reward model.
      folder: to write; it must not exist, and appears when it is complete.
      kind: 'mean', one output, or 'quantiles', one for each.
      dtype: of the tensors, one of `DTYPES`.

    Returns:
      A line that says what was done.

    Raises:
      DataError: the folder exists, or a classifier cannot compute this model's rewards.
    """
    if os.path.exists(folder):
        raise DataError(f'{folder}: exists, expected a folder to be made')
    head = model.network.head
    kernel, bias = linear_head(head, model.params['head'], kind)
    settings, backbone = dict(model.settings), model.params['backbone']
    family = families.FAMILIES[settings['model_type']]
    _check_reads(head, settings)
    if bias.any() and family.head == 'score':
        raise DataError(f'{folder}: the head has a bias, and {family.classifier} has no place for '
                        'one')
    tokenizer, pad = _with_padding(model)
    if pad >= settings['vocab_size']:
        rows = np.zeros((pad + 1 - settings['vocab_size'], kernel.shape[0]), np.float32)
        backbone = backbone | {'tokens': np.concatenate([backbone['tokens'], rows])}
        settings['vocab_size'] = pad + 1
    tensors = weights.backbone_tensors(settings, {
        name: leaf for name, leaf in backbone.items() if name != 'output'})
    tensors[f'{family.head}.weight'] = np.ascontiguousarray(kernel.T)
    if family.head != 'score':
        tensors[f'{family.head}.bias'] = bias
    with np.errstate(over='ignore'):
        tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise DataError(f'{name} is not finite in {dtype}, expected a dtype that holds it')
    suffix = _suffix(tokenizer, model)
    names = _labels(head, kind)
    settings = families.portable_settings(settings) | {
        'architectures': [family.classifier], 'pad_token_id': pad, 'torch_dtype': dtype,
        'num_labels': len(names), 'id2label': {str(i): name for i, name in enumerate(names)},
        'label2id': {name: i for i, name in enumerate(names)},
        'qrm_append_eos': model.reading.append_eos,  # read by us alone
    }
    partial = folder.rstrip('/') + '.tmp'
    shutil.rmtree(partial, ignore_errors=True)
    try:
        os.makedirs(partial)
    except OSError as error:
        raise DataError(f'{folder}: cannot be made ({error.strerror})') from error
    weights.write_folder(partial, settings, tensors)
    _write_tokenizer(tokenizer, model, partial)
    write_text(os.path.join(partial, 'README.md'), card(model, kind, names, settings, suffix))
    os.rename(partial, folder)
    return (f'{folder}: {family.classifier} with {len(names)} '
            f'label{"s" * (len(names) > 1)} ({kind}), {dtype}, '
            f'{sum(t.size for t in tensors.values()):,} parameters')


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
    model: RewardModel, kind: str, labels: list[str], settings: dict[str, Any], suffix: str
) -> str:
    """The model card of an exported model; `suffix` is what plain text needs at its end."""
    appended = model.reading.append_eos and not model.reading.rendered_chats
    plain = ' + tokenizer.eos_token' if suffix else ''
    meaning = {
        'mean': 'Its one label is the mean of the predicted distribution of the reward.',
        'quantiles': (f'Its {len(labels)} labels are quantiles of the reward, lowest first, at the '
                      f'levels {", ".join(f"{tau:g}" for tau in model.taus)}. Their mean is the '
                      'reward. Programs that take the first or the last label as the reward '
                      "(TRL's GRPO, verl) take the lowest or the highest quantile: export the mean "
                      'for them.'),
    }[kind]
    where = {'last': 'at the last token that is not padding', 'first': 'at the first token',
             'dialogue': 'from the mean over all tokens'}[model.network.head.reads[0]]
    ends = ('Dialogues end with the end-of-sequence token: the chat template writes it, plain text '
            'needs it appended. ' if appended and suffix else '')
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model]
---
# Reward model

A reward model, trained with [qrm](https://pypi.org/project/qrm-jax/). {meaning}

- architecture: {settings['architectures'][0]}, {settings['model_type']}
- head: {model.network.head.name}, objective: {model.loss.objective}
- read {where}; longest dialogue: {model.reading.max_length} tokens, longer ones lose their left end

{ends}Rewards are raw numbers: use no sigmoid or softmax on them (`function_to_apply="none"` of a
pipeline, `use_activation: false` of vLLM). They have a meaning beside each other only: a constant
added to all of them changes nothing.

```python
import torch, transformers

tokenizer = transformers.AutoTokenizer.from_pretrained('THIS_FOLDER')
model = transformers.AutoModelForSequenceClassification.from_pretrained(
    'THIS_FOLDER', dtype=torch.float32)
texts = ['\\n\\nHuman: Hello.\\n\\nAssistant: Hello!'{plain}]
print(model(**tokenizer(texts, return_tensors='pt', padding=True)).logits)
```
"""


def _width(head: HeadConfig, params: Any) -> int:
    """Features that a head reads."""
    first = params['hidden_0']['kernel'] if head.hidden_layers else params['kernel']
    return first.shape[-2]


def _check_reads(head: HeadConfig, settings: dict[str, Any]) -> None:
    expected = families.classifier_reads(settings)
    if head.reads != expected:
        raise DataError(f'the head reads {", ".join(head.reads)}, a classifier of the family '
                        f"{settings['model_type']!r} reads {expected[0]}")


def _labels(head: HeadConfig, kind: str) -> list[str]:
    return ['reward'] if kind == 'mean' else [f'quantile {tau:g}' for tau in head.taus]


def _with_padding(model: RewardModel) -> tuple[Any, int]:
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


def _suffix(tokenizer: Any, model: RewardModel) -> str:
    """What plain text needs appended for this tokenizer to give the tokens that are read here.

    Raises:
      DataError: nothing does, as the tokenizer ends texts in its own way.
    """
    comparison = parse_row({'prompt': 'a b', 'responses': [' c']}, 'text', allow_blank=True)
    [[expected]] = tokenize([comparison], model.tokenizer, model.reading)
    for suffix in ('', tokenizer.eos_token or ''):
        ids = tokenizer('a b c' + suffix)['input_ids']
        while model.reading.skipped is not None and ids and ids[-1] == model.reading.skipped:
            ids = ids[:-1]
        if ids == expected.tolist():
            return suffix
    raise DataError('the tokenizer puts tokens after EOS, expected one that ends texts as the '
                    'model was trained to read them: train with data.append_eos=False')


def _write_tokenizer(tokenizer: Any, model: RewardModel, folder: str) -> None:
    if tokenizer.chat_template and model.reading.append_eos and not model.reading.rendered_chats:
        tokenizer.chat_template = _ending(tokenizer.chat_template)
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
