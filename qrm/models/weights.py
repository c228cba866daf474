"""Pretrained weights: Hugging Face folders and hub names to parameters, by a table.

Only safetensors files are read; a pickle can run code and is refused by name.
"""

import collections
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import flax as safetensors_flax

from qrm.data.comparisons import DataError
from qrm.models.decoder import Decoder, DecoderConfig

# Tensor name -> path in the decoder's parameters. GPT-2's Conv1D stores [in, out], as a Flax
# Dense kernel does, so nothing is transposed. `{}` is the layer, which becomes an axis.
GPT2_TENSORS = {
    'wte.weight': 'wte',
    'wpe.weight': 'wpe',
    'h.{}.ln_1.weight': 'h/ln_1/scale',
    'h.{}.ln_1.bias': 'h/ln_1/bias',
    'h.{}.attn.c_attn.weight': 'h/attn/c_attn/kernel',
    'h.{}.attn.c_attn.bias': 'h/attn/c_attn/bias',
    'h.{}.attn.c_proj.weight': 'h/attn/c_proj/kernel',
    'h.{}.attn.c_proj.bias': 'h/attn/c_proj/bias',
    'h.{}.ln_2.weight': 'h/ln_2/scale',
    'h.{}.ln_2.bias': 'h/ln_2/bias',
    'h.{}.mlp.c_fc.weight': 'h/mlp/c_fc/kernel',
    'h.{}.mlp.c_fc.bias': 'h/mlp/c_fc/bias',
    'h.{}.mlp.c_proj.weight': 'h/mlp/c_proj/kernel',
    'h.{}.mlp.c_proj.bias': 'h/mlp/c_proj/bias',
    'ln_f.weight': 'ln_f/scale',
    'ln_f.bias': 'ln_f/bias',
}
# Causal masks that old checkpoints store as buffers.
_BUFFERS = re.compile(r'h\.\d+\.attn\.(masked_)?bias')
_PREFIX = 'transformer.'

# Settings of config.json whose other values this decoder does not compute.
_REQUIRED = {
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'add_cross_attention': False,
    'tie_word_embeddings': True,
}
_FILES = ('*.json', '*.safetensors', 'merges.txt', '*.model', '*.jinja')


class Pretrained(NamedTuple):
    """A checkpoint as read.

    Attributes:
      config: architecture of the decoder.
      decoder: parameters of the decoder, float32.
      score: [D, N] float32, kernel of a linear reward head; None for a language model.
    """

    config: DecoderConfig
    decoder: dict[str, Any]
    score: jax.Array | None


def resolve(name: str) -> str:
    """Local folder of a checkpoint; a name that is no folder is fetched from the hub.

    Raises:
      DataError: neither a folder nor to be had from the hub.
    """
    if os.path.isdir(name):
        return name
    if name.startswith(('/', '.', '~')) or name.count('/') > 1:
        raise DataError(f'{name}: no such folder, expected a checkpoint folder or a hub name')
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES))
    except Exception as error:  # The library raises a different type for each way to fail.
        raise DataError(
            f'{name}: no such folder, and not to be had from the hub ({type(error).__name__}: '
            f'{error}); for local weights give the path of their folder'
        ) from error


def load_pretrained(folder: str) -> Pretrained:
    """Reads a GPT-2 language model or `GPT2ForSequenceClassification` from a folder.

    Raises:
      DataError: not a GPT-2 checkpoint, a setting this decoder does not compute, no safetensors
        file, or tensors that are missing, unexpected or misshapen (all named together).
    """
    settings = _read_json(os.path.join(folder, 'config.json'))
    config = decoder_config(settings, folder)
    tensors = {}
    for name, tensor in _read_tensors(folder).items():
        if tensors.setdefault(name.removeprefix(_PREFIX), tensor) is not tensor:
            raise DataError(f'{folder}: {name} is there with and without {_PREFIX!r}')
    score, lm_head = tensors.pop('score.weight', None), tensors.pop('lm_head.weight', None)
    problems = []
    if lm_head is not None and not jnp.array_equal(lm_head, tensors.get('wte.weight', lm_head)):
        problems.append('lm_head.weight differs from wte.weight, expected them tied')
    if score is not None and (score.ndim != 2 or score.shape[1] != config.n_embd):
        problems.append(f'misshapen score.weight {score.shape}, expected (N, {config.n_embd})')
    decoder = map_tensors(tensors, config, folder, problems)
    return Pretrained(config, decoder, None if score is None else jnp.asarray(score, jnp.float32).T)


def decoder_config(settings: Mapping[str, Any], where: str) -> DecoderConfig:
    """Architecture from the settings of a Hugging Face `config.json`.

    Raises:
      DataError: not GPT-2, a missing size, or a setting that is not supported.
    """
    if settings.get('model_type') != 'gpt2':
        raise DataError(f"{where}: model_type {settings.get('model_type')!r}, expected 'gpt2'")
    for key, value in _REQUIRED.items():
        if settings.get(key, value) != value:
            raise DataError(f'{where}: {key}={settings[key]}, only {value} is supported')
    try:
        sizes = {key: settings[key] for key in ('vocab_size', 'n_positions', 'n_embd', 'n_layer',
                                                'n_head')}
    except KeyError as error:
        raise DataError(f'{where}: config.json has no {error}') from error
    optional = {key: settings[key] for key in ('activation_function', 'layer_norm_epsilon',
                                               'initializer_range') if key in settings}
    try:
        inner = settings.get('n_inner') or 4 * sizes['n_embd']
        return DecoderConfig(n_inner=inner, **sizes, **optional)
    except (TypeError, ValueError) as error:  # TypeError: a size or the activation is no scalar.
        raise DataError(f'{where}: config.json: {error}') from error


def map_tensors(
    tensors: Mapping[str, jax.Array], config: DecoderConfig, where: str,
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """Maps tensors (without the `transformer.` prefix) to decoder parameters by the table.

    Args:
      tensors: name -> tensor.
      config: architecture they must fit.
      where: folder, for the error.
      problems: what is wrong with other tensors of the checkpoint, reported with the rest.

    Raises:
      DataError: lists every missing, unexpected and misshapen tensor.
    """
    shapes = _decoder_shapes(config)
    problems, used, flat = list(problems), set(), {}
    for pattern, path in GPT2_TENSORS.items():
        layered = '{}' in pattern
        names = [pattern.format(i) for i in range(config.n_layer)] if layered else [pattern]
        shape = shapes[path][1:] if layered else shapes[path]
        found = []
        for name in names:
            used.add(name)
            if name not in tensors:
                problems.append(f'missing {name} {shape}')
            elif tensors[name].shape != shape:
                problems.append(f'misshapen {name} {tensors[name].shape}, expected {shape}')
            elif not jnp.issubdtype(tensors[name].dtype, jnp.floating):
                problems.append(f'{name} has dtype {tensors[name].dtype}, expected floats')
            else:
                found.append(jnp.asarray(tensors[name], jnp.float32))
        if len(found) == len(names):
            flat[path] = jnp.stack(found) if layered else found[0]
    problems += [
        f'unexpected {name} {tensors[name].shape}'
        for name in sorted(set(tensors) - used) if not _BUFFERS.fullmatch(name)
    ]
    if problems:
        raise DataError(f'{where}: the weights do not fit the architecture of config.json:\n  '
                        + '\n  '.join(problems))
    return _unflatten(flat)


def _decoder_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {'/'.join(part.key for part in path): leaf.shape for path, leaf in leaves}


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _read_tensors(folder: str) -> dict[str, np.ndarray]:
    """All tensors of a folder, from one file or from the shards its index names."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    if os.path.isfile(index):
        weight_map = _read_json(index).get('weight_map')
        if not isinstance(weight_map, dict):
            raise DataError(f'{index}: no weight_map, expected tensor names and their files')
        shards = collections.defaultdict(set)
        for name, shard in weight_map.items():
            shards[os.path.basename(shard)].add(name)
    else:
        shards = {'model.safetensors': None}
    tensors = {}
    for shard, names in shards.items():
        path = os.path.join(folder, shard)
        if not os.path.isfile(path):
            pickles = [f for f in sorted(os.listdir(folder)) if f.endswith(('.bin', '.pt', '.pth'))]
            hint = (
                f'; {", ".join(pickles)} is a pickle, which can run code and is not read: convert '
                'it with save_pretrained(..., safe_serialization=True)' if pickles else ''
            )
            raise DataError(f'{path}: no such file{hint}')
        try:
            loaded = safetensors_flax.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise DataError(f'{path}: damaged safetensors file ({error})') from error
        if names is not None and set(loaded) != names:
            raise DataError(f'{path}: holds other tensors than the index says: '
                            f'{sorted(set(loaded) ^ names)}')
        tensors |= loaded
    return tensors


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise DataError(f'{path}: no such file') from error
    except ValueError as error:
        raise DataError(f'{path}: not JSON ({error})') from error
    if not isinstance(content, dict):
        raise DataError(f'{path}: a {type(content).__name__}, expected an object')
    return content
