"""Trained policies as folders that `transformers` loads as language models, or peft as adapters."""

import json
import os

from qrm.data.comparisons import DataError
from qrm.data.tokens import save_tokenizer
from qrm.models import adapters, families, weights
from qrm.models.tuning import stack_blocks
from qrm.policy.language_model import Run
from qrm.serving.export import appearing, cast
from qrm.training.workdir import write_text

KINDS = ('merged', 'adapter')

_LOADING = """\
model = transformers.AutoModelForCausalLM.from_pretrained('THIS_FOLDER', dtype=torch.float32)"""
_LOADING_ADAPTER = """\
import peft

base = transformers.AutoModelForCausalLM.from_pretrained('{base}', dtype=torch.float32)
model = peft.PeftModel.from_pretrained(base, 'THIS_FOLDER')"""


def export(run: Run, folder: str, *, kind: str = 'merged', dtype: str = 'float32') -> str:
    """Writes a language model with its tokenizer, the tokens that end answers, and a model card.

    Args:
      run: the model.
      folder: to write; it must not exist, and appears when it is complete.
      kind: 'merged', the whole model, or 'adapter', what LoRA trained.
      dtype: of the tensors, one of `serving.export.DTYPES`.

    Returns:
      A line that says what was done.

    Raises:
      DataError: the folder exists, or there is no adapter.
    """
    if kind not in KINDS:
        raise DataError(f'{kind!r} of a language model, expected one of {KINDS}')
    write = {'merged': _write_whole, 'adapter': _write_adapter}[kind]
    with appearing(folder) as partial:
        line = write(run, partial, dtype)
        save_tokenizer(run.tokenizer, partial)
    return f'{folder}: {line}'


def _write_whole(run: Run, folder: str, dtype: str) -> str:
    model = run.merged()
    family = families.FAMILIES[run.settings['model_type']]
    settings = families.portable_settings(run.settings) | {
        'architectures': [family.language_model], 'torch_dtype': dtype,
        'eos_token_id': list(run.stops)}
    tensors = cast(weights.backbone_tensors(run.settings, model.params), dtype)
    weights.write_folder(folder, settings, tensors)
    write_text(os.path.join(folder, 'generation_config.json'),
               json.dumps({'eos_token_id': list(run.stops)}, indent=2) + '\n')
    write_text(os.path.join(folder, 'README.md'), _card(run, 'transformers', _LOADING))
    return f'{family.language_model}, {dtype}, {sum(t.size for t in tensors.values()):,} parameters'


def _write_adapter(run: Run, folder: str, dtype: str) -> str:
    base, lora = run.base, run.network.tuning.lora
    if not lora:
        raise DataError("'adapter' of a model without adapters, expected a run of "
                        "train.tune='lora', or 'merged'")
    if not base.checkpoint or adapters.find(base.checkpoint).adapter:
        raise DataError(f'an adapter to {base.checkpoint or "random weights"}: peft puts adapters '
                        "beside whole models that others have; expected 'merged'")
    tensors = cast(adapters.adapter_tensors(
        run.settings, stack_blocks(run.params)['backbone'], lora), dtype)
    adapters.write_folder(folder, run.settings, lora, base.checkpoint, tensors,
                          task=adapters.LANGUAGE_MODEL)
    write_text(os.path.join(folder, 'README.md'),
               _card(run, 'peft', _LOADING_ADAPTER.format(base=base.checkpoint)))
    return (f'adapter to {base.checkpoint}, {dtype}, '
            f'{sum(t.size for t in tensors.values()):,} parameters')


def _card(run: Run, library: str, loading: str) -> str:
    return f"""---
library_name: {library}
pipeline_tag: text-generation
---
# Language model

Trained with [qrm](https://pypi.org/project/qrm-jax/). Family: {run.settings['model_type']}; answers
end with {' or '.join(map(repr, run.tokenizer.convert_ids_to_tokens(list(run.stops))))}.

```python
import torch, transformers

{loading}
tokenizer = transformers.AutoTokenizer.from_pretrained('THIS_FOLDER')
```
"""
