"""Pretrained weights: Hugging Face folders and hub names to parameters, by a table.

Only safetensors files are read; a pickle can run code and is refused by name.
"""

import collections
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import flax as safetensors_flax
from safetensors import numpy as safetensors_numpy

from qrm.data.comparisons import DataError, in_a_line
from qrm.models import checkpoint_heads, families
from qrm.models.architecture import Architecture, flat, leaf_dtype, leaves, tree
from qrm.models.families import Tensor
from qrm.rewards.heads import HeadConfig

_FILES = ('*.json', '*.safetensors', 'merges.txt', 'vocab.txt', '*.model', '*.jinja')

_MOST_SHARDS = 10_000

VALUE_HEAD = 'value_head.safetensors'  # beside a language model, from LLaMA-Factory


class Pretrained(NamedTuple):
    """A checkpoint as read.

    Attributes:
      settings: its `config.json`.
      architecture: what they describe.
      backbone: parameters, see `load_pretrained`; without the pooler, if a language model has none.
      head: config and parameters, float32, of a reward head; None for a language model.
    """

    settings: dict[str, Any]
    architecture: Architecture
    backbone: dict[str, Any]
    head: tuple[HeadConfig, dict[str, Any]] | None


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
            f'{in_a_line(error)}); for local weights give the path of their folder'
        ) from error


def load_pretrained(
    folder: str, *, output: bool = False, dtype: str = 'float32',
    change: Callable[[dict[str, Any]], None] = lambda tensors: None,
) -> Pretrained:
    """Reads a language model or a reward model of any of `families.FAMILIES`.

    Args:
      folder: in the Hugging Face layout.
      output: with the output embedding, if it is not tied.
      dtype: of tables and of the blocks' kernels; all else is float32.
      change: changes the tensors, by their names without the family's prefix, before anything is
        made of them.

    Raises:
      DataError: an unknown family, a setting that is not computed, no safetensors file, or tensors
        that are missing, unexpected or misshapen (all named together).
    """
    settings = read_settings(folder)
    a, family = families.architecture(settings, folder), families.FAMILIES[settings['model_type']]
    unused = re.compile(f'{family.buffers or "$^"}|{family.language_head or "$^"}')
    tensors: dict[str, jax.Array] = {}
    for given, tensor in _read_tensors(folder).items():
        # `torch.compile` and data parallel wrappers leave their names before and inside of others.
        name = given.replace('_orig_mod.', '').removeprefix('module.').removeprefix(family.prefix)
        for old, new in family.renamed.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if tensors.setdefault(name, tensor) is not tensor:
            raise DataError(f'{folder}: {given} is there with and without a prefix, as of '
                            f'{family.prefix!r}')
        if not unused.fullmatch(name):
            check_finite(folder, {given: tensor})
    change(tensors)
    problems: list[str] = []
    before = len(tensors)
    if 'quantile_head.weight' in tensors:  # Kim et al., whose config.json does not say it
        settings['qrm_outputs'] = 'quantiles'
    try:
        head = checkpoint_heads.take(
            tensors, settings, a.hidden_size, problems,
            reads=families.classifier_reads(settings))
    except ValueError as error:
        raise DataError(f'{folder}: config.json: {error}') from error
    scored = len(tensors) < before
    if family.output in tensors:
        embedding, = family.tensors['tokens'].names
        if a.tied and not jnp.array_equal(tensors[family.output],
                                          tensors.get(embedding, tensors[family.output])):
            problems.append(f'{family.output} differs from {embedding}, expected them tied')
        if a.tied or not output:
            del tensors[family.output]
    table = dict(family.tensors) | {'output': Tensor((family.output,))}
    wanted = leaves(a, output=output)
    poolers = {name for path in wanted if path.startswith('pooler/') for name in table[path].names}
    if not scored and not poolers & set(tensors):
        # Many encoders come without; a new one is trained with the head.
        wanted = {path: leaf for path, leaf in wanted.items() if not path.startswith('pooler/')}
    read = {name: tensor for name, tensor in tensors.items() if not unused.fullmatch(name)}
    del tensors
    others = sorted(read)
    backbone = map_tensors(read, {path: table[path] for path in wanted}, a, problems, dtype)
    if problems:
        if not backbone and others:
            raise DataError(f'{folder}: no tensor of a {settings["model_type"]}, which config.json '
                            f'says it is, but {len(others)} others such as {others[0]}')
        raise DataError(f'{folder}: the weights do not fit the architecture of config.json:\n  '
                        + '\n  '.join(problems))
    return Pretrained(settings, a, backbone, head)


def read_settings(folder: str) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
      DataError: there is none, or it is no JSON object.
    """
    return read_json(os.path.join(folder, 'config.json'))


def read_json(path: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
      DataError: there is no such file, or something else in it.
    """
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


def read_file(path: str) -> dict[str, jax.Array]:
    """The tensors of a safetensors file.

    Raises:
      DataError: there is none, and perhaps a pickle in its place, or it is damaged.
    """
    if not os.path.isfile(path):
        files = sorted(os.listdir(os.path.dirname(path)))
        pickles = [file for file in files if file.endswith(('.bin', '.pt', '.pth'))]
        hint = (
            f'; {", ".join(pickles)} is a pickle, which can run code and is not read: convert '
            'it with save_pretrained(..., safe_serialization=True)' if pickles else ''
        )
        raise DataError(f'{path}: no such file{hint}')
    try:
        return safetensors_flax.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f'{path}: damaged safetensors file ({error})') from error


def check_finite(where: str, tensors: Mapping[str, jax.Array]) -> None:
    """Checks that tensors hold numbers.

    Raises:
      DataError: names where they are, and the first that has something else.
    """
    wrong = [name for name, tensor in tensors.items()
             if jnp.issubdtype(tensor.dtype, jnp.inexact) and not jnp.isfinite(tensor).all()]
    if wrong:
        more = f' and {len(wrong) - 1} more' if wrong[1:] else ''
        raise DataError(f'{where}: {wrong[0]}{more} not finite, expected numbers')


def stored_dtypes(folder: str) -> set[str]:
    """Dtypes of the matrices in a folder's files, as safetensors names them: 'F32', 'BF16'."""
    found = set()
    for file in sorted(os.listdir(folder)):
        if file.endswith('.safetensors'):
            with safetensors.safe_open(os.path.join(folder, file), 'numpy') as opened:
                names = opened.keys()
                slices = [opened.get_slice(name) for name in names]
                found |= {part.get_dtype() for part in slices if len(part.get_shape()) > 1}
    return found


def map_tensors(
    tensors: dict[str, Any], table: Mapping[str, Tensor], a: Architecture, problems: list[str],
    dtype: str = 'float32',
) -> dict[str, Any]:
    """Parameters of a backbone from tensors, by a table.

    Args:
      tensors: name -> tensor; emptied on the way, so that no tensor is in memory twice for long.
      table: paths of the parameters that are wanted -> where they stand.
      a: architecture that they must fit.
      problems: gets every missing, unexpected and misshapen tensor.
      dtype: see `load_pretrained`.

    Returns:
      The parameters; without those of which a tensor is missing or misshapen.
    """
    params, wanted = {}, leaves(a, output='output' in table)
    for path, row in table.items():
        layered = path.startswith('blocks/')
        shape = wanted[path].shape[1:] if layered else wanted[path].shape
        found = np.empty((a.num_layers if layered else 1, *shape), leaf_dtype(path, dtype))
        before = len(problems)
        for i, whole in enumerate(found):
            if path.startswith('blocks/attention_norm/') and not (a.first_norm or i):
                whole[:] = path.endswith('scale')
                continue
            start = 0
            for name, size in zip(row.names, _parts(a, path, row, shape), strict=True):
                name = name.format(i)
                expected = (size, *shape[:-1]) if row.linear else (*shape[:-1], size)
                tensor = tensors.pop(name, None)
                if tensor is None:
                    problems.append(f'missing {name} {expected}')
                elif tensor.shape != expected:
                    problems.append(f'misshapen {name} {tensor.shape}, expected {expected}')
                elif not jnp.issubdtype(tensor.dtype, jnp.floating):
                    problems.append(f'{name} has dtype {tensor.dtype}, expected floats')
                else:
                    part = np.asarray(tensor)
                    whole[..., start:start + size] = part.T if row.linear else part
                start += size
        if len(problems) == before:
            params[path] = jnp.asarray(found if layered else found[0])
    problems += [f'unexpected {name} {tensors[name].shape}' for name in sorted(tensors)]
    return tree(params)


def backbone_tensors(
    settings: Mapping[str, Any], backbone: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Tensors of a backbone under the names of its family, as `load_pretrained` reads them.

    Args:
      settings: of the model.
      backbone: parameters; what is not among them is left out.

    Returns:
      Name -> float32 array, each laid out by itself in memory.
    """
    a = families.architecture(settings)
    family = families.FAMILIES[settings['model_type']]
    tensors = {}
    for path, leaf in flat(backbone).items():
        if path == 'output':
            tensors[family.output] = np.array(leaf, np.float32)
            continue
        row, layered = family.tensors[path], path.startswith('blocks/')
        first = int(path.startswith('blocks/attention_norm/') and not a.first_norm)
        for i in range(first, a.num_layers if layered else 1):
            whole = np.asarray(leaf[i] if layered else leaf, np.float32)
            stops = np.cumsum(_parts(a, path, row, whole.shape))[:-1]
            for name, part in zip(row.names, np.split(whole, stops, axis=-1), strict=True):
                # A copy: safetensors 0.8.0 writes views of NumPy arrays scrambled.
                tensors[('' if row.outer else family.prefix) + name.format(i)] = np.array(
                    part.T if row.linear else part, order='C')
    return tensors


def write_tensors(folder: str, tensors: Mapping[str, np.ndarray], *, shard_bytes: int) -> None:
    """Writes tensors to `model.safetensors`, or to shards of about that size with an index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files = ['model.safetensors'] if len(shards) == 1 else [
        f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(os.path.join(folder, file), shard)
    if len(shards) > 1:
        index = {'metadata': {'total_size': sum(t.nbytes for t in tensors.values())},
                 'weight_map': {name: file for file, shard in zip(files, shards, strict=True)
                                for name in shard}}
        with open(os.path.join(folder, 'model.safetensors.index.json'), 'w',
                  encoding='utf-8') as file:
            json.dump(index, file, indent=2)


def write_file(path: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors to one file; each must be laid out by itself in memory."""
    safetensors_numpy.save_file(dict(tensors), path, metadata={'format': 'pt'})
    os.chmod(path, 0o666 & ~_umask())  # safetensors makes it readable by its owner alone


def write_folder(
    folder: str, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `config.json` and tensors into a folder that is there, in the Hugging Face layout."""
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as file:
        json.dump(dict(settings), file, indent=2)
        file.write('\n')
    write_tensors(folder, tensors, shard_bytes=shard_bytes)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _parts(a: Architecture, path: str, row: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes along the last axis of the tensors that are joined in a parameter."""
    if len(row.names) == 1:
        return shape[-1:]
    return a.parts[path.split('/')[-2]]


def _read_tensors(folder: str) -> dict[str, np.ndarray]:
    """All tensors of a folder, from one file or else from the shards its index names.

    So does transformers, which leaves the index of before when it saves to one file later.
    """
    index = os.path.join(folder, 'model.safetensors.index.json')
    single = os.path.isfile(os.path.join(folder, 'model.safetensors'))
    if single and os.path.isfile(index):
        print(f'note: {folder} has two sets of weights, of which model.safetensors is read and '
              'model.safetensors.index.json is not', flush=True)
    if os.path.isfile(index) and not single:
        weight_map = read_json(index).get('weight_map')
        if not isinstance(weight_map, dict):
            raise DataError(f'{index}: no weight_map, expected tensor names and their files')
        if wrong := [name for name, shard in weight_map.items()
                     if not isinstance(shard, str) or shard != os.path.basename(shard)]:
            raise DataError(f'{index}: weight_map of {wrong[0]!r}: {weight_map[wrong[0]]!r}, '
                            'expected the name of a file in this folder')
        shards = collections.defaultdict(set)
        for name, shard in weight_map.items():
            shards[shard].add(name)
        if len(shards) > _MOST_SHARDS:
            raise DataError(f'{index}: {len(shards)} files, expected at most {_MOST_SHARDS}')
    else:
        shards = {'model.safetensors': None}
    if os.path.isfile(os.path.join(folder, VALUE_HEAD)):
        shards[VALUE_HEAD] = None
    tensors = {}
    for shard, names in shards.items():
        path = os.path.join(folder, shard)
        loaded = read_file(path)
        if names is not None and set(loaded) != names:
            raise DataError(f'{path}: holds other tensors than the index says: '
                            f'{sorted(set(loaded) ^ names)}')
        tensors |= loaded
    return tensors
