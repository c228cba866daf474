"""Adapters as peft writes them: folders with what was learnt beside the weights of a base.

    adapter_config.json          the base, rank and scaling; which modules are adapted
    adapter_model.safetensors    of each module lora_A.weight [r, D] and lora_B.weight [F, r], and
                                 whole tensors of what was trained itself: head, pooler
                                 (`base_model.model.` stands before the names of transformers)

Wherever a checkpoint is asked for it may be such a folder. Its base is read and each adapted kernel
W becomes W + s B A, in float32. What else peft computes is refused by name.

Axes: D features in, F features out, r rank.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data.comparisons import DataError
from qrm.models import checkpoint_heads, families, weights
from qrm.models.families import Family, Tensor
from qrm.models.lora import Lora, module_names
from qrm.models.weights import Pretrained

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
CLASSIFIER, LANGUAGE_MODEL = 'SEQ_CLS', 'CAUSAL_LM'  # tasks of adapters
_HEADS = ('classifier', 'score')  # which peft keeps whole for this task, of those that there are
_HEAD = re.compile(rf'({"|".join(map(re.escape, checkpoint_heads.LINEAR))})'
                   r'(\.[02])?\.(weight|bias)')

# Settings -> the values that are computed; the first is that of a setting that is missing. Those
# of `init_lora_weights` leave the base as it was, others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) not.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    'peft_type': ('LORA',), 'bias': ('none',), 'use_rslora': (False, True), 'use_dora': (False,),
    'lora_bias': (False,), 'use_qalora': (False,), 'use_bdlora': (None,),
    'layer_replication': (None,), 'target_parameters': (None, []),
    'trainable_token_indices': (None,), 'alora_invocation_tokens': (None,),
    'arrow_config': (None,), 'kasa_config': (None,), 'velora_config': (None,),
    'monteclora_config': (None,), 'megatron_config': (None,),
    'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal', 'mica'),
}
_READ = {'base_model_name_or_path', 'revision', 'task_type', 'r', 'lora_alpha', 'rank_pattern',
         'alpha_pattern', 'target_modules', 'exclude_modules', 'layers_to_transform',
         'layers_pattern', 'modules_to_save'}
# Settings that say nothing of what is computed: whether a kernel stands [D, F] its family says.
_SILENT = {'auto_mapping', 'corda_config', 'ensure_weight_tying', 'eva_config', 'fan_in_fan_out',
           'inference_mode', 'loftq_config', 'lora_dropout', 'lora_ga_config', 'megatron_core',
           'peft_version', 'qalora_group_size', 'runtime_config'}
_TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt')


@dataclasses.dataclass(frozen=True)
class Targets:
    """Which modules of a model peft adapts.

    Attributes:
      modules, excluded: a regular expression of whole names of modules, or the ends of names; of
        modules also 'all-linear', all but the head. None: nothing is said.
      layers: numbers of the blocks; (): all.
      layer_names: regular expressions of what stands before the number; (): any name.
      saved: regular expressions of modules that are kept whole, adapters or not.

    Raises:
      ValueError: one of them is none.
    """

    modules: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...] | None
    layers: tuple[int, ...]
    layer_names: tuple[str, ...]
    saved: tuple[str, ...]

    def __post_init__(self):
        patterns = [*self.layer_names, *self.saved]
        for key, ends in (('target_modules', self.modules), ('exclude_modules', self.excluded)):
            if isinstance(ends, str):
                patterns.append(ends)
            elif not all(isinstance(end, str) for end in ends or ()):
                raise ValueError(f'{key}: {list(ends)}, expected names')
        for pattern in patterns:
            _check_pattern(pattern)

    def adapts(self, module: str) -> bool:
        """Whether there is an adapter beside a linear map, by its whole name."""
        if (self.excluded and _is_named(self.excluded, module)) or self.keeps(module):
            return False
        if isinstance(self.modules, str) and self.modules.lower() == 'all-linear':
            return True
        if not _is_named(self.modules or (), module):
            return False
        if isinstance(self.modules, str) or not self.layers:
            return True
        numbers = (re.match(rf'(?:^|.*?\.){name}\.(\d+)\.', module)
                   for name in self.layer_names or (r'[^.]*',))
        return int(next((found[1] for found in numbers if found), -1)) in self.layers

    def keeps(self, module: str) -> bool:
        """Whether a module, or what it is part of, is kept whole."""
        return any(re.match(rf'(^|.*\.){one}($|\..*)', module) for one in self.saved)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What the config of an adapter says.

    Attributes:
      folder: where it is.
      base: folder or hub name of its base.
      task: what peft trained it for, as 'SEQ_CLS' or 'CAUSAL_LM'; '' if that is not said.
      rank, alpha: of modules that have none of their own.
      rank_stabilised: see `Lora`.
      ranks, alphas: regular expressions of the ends of names of modules -> their own.
      targets: which modules are adapted.

    Raises:
      ValueError: one of them is none.
    """

    folder: str
    base: str
    task: str
    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: Targets

    def __post_init__(self):
        if not isinstance(self.base, str) or not self.base:
            raise ValueError(f'base_model_name_or_path={self.base!r}, expected a folder or a hub '
                             'name')
        if not isinstance(self.task, str):
            raise ValueError(f'task_type={self.task!r}, expected a name')
        for key, values in (('r', [self.rank]), ('rank_pattern', self.ranks.values())):
            for value in values:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f'{key}: {value!r}, expected a positive integer')
        for key, values in (('lora_alpha', [self.alpha]), ('alpha_pattern', self.alphas.values())):
            for value in values:
                if (isinstance(value, bool) or not isinstance(value, (int, float))
                        or not math.isfinite(value)):
                    raise ValueError(f'{key}: {value!r}, expected a finite number')
        for pattern in (*self.ranks, *self.alphas):
            _check_pattern(pattern)

    def scaling(self, module: str) -> tuple[int, float]:
        """r and s of a module, by its whole name in transformers."""

        def own(patterns: Mapping[str, Any], default: Any) -> Any:
            return next((value for pattern, value in patterns.items()
                         if re.match(rf'(.*\.)?({pattern})$', module)), default)

        rank, alpha = own(self.ranks, self.rank), own(self.alphas, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


class Source(NamedTuple):
    """Where the parts of a checkpoint are.

    Attributes:
      model: folder with the weights; those of the base, if there is an adapter.
      tokenizer: folder with the tokenizer.
      adapter: None: the weights are whole.
    """

    model: str
    tokenizer: str
    adapter: Adapter | None


def find(name: str) -> Source:
    """The parts of a checkpoint, by its folder or hub name.

    An adapter's own tokenizer goes before that of its base. A base that is no absolute path is
    sought from the working directory, then on the hub.

    Raises:
      DataError: see `weights.resolve`; or an adapter that is not computed, or that has no base.
    """
    folder = weights.resolve(name)
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        return Source(folder, folder, None)
    adapter = _read_config(folder)
    # Here transformers takes these weights for the base, and peft those that the config names.
    if any(os.path.isfile(os.path.join(folder, file))
           for file in ('model.safetensors', 'model.safetensors.index.json')):
        raise DataError(f'{folder}: has {CONFIG} and the weights of a whole model, expected one of '
                        'them')
    base = weights.resolve(adapter.base)
    if os.path.isfile(os.path.join(base, CONFIG)):
        raise DataError(f'{folder}: its base {adapter.base} is itself an adapter, expected a whole '
                        'model')
    own = any(os.path.isfile(os.path.join(folder, file)) for file in _TOKENIZERS)
    return Source(base, folder if own else base, adapter)


def load_pretrained(
    source: Source, *, output: bool = False, dtype: str = 'float32'
) -> Pretrained:
    """A checkpoint, with its adapter merged.

    Args:
      source: from `find`.
      output, dtype: see `weights.load_pretrained`.

    Raises:
      DataError: see `weights.load_pretrained`; or tensors of the adapter that are missing,
        unexpected or misshapen (all named together).
    """
    adapter = source.adapter
    read = functools.partial(weights.load_pretrained, source.model, output=output,
                             dtype=dtype)
    if adapter is None:
        return read()
    settings = weights.read_settings(source.model)
    family = families.family_of(settings, source.model)
    kernels, whole = _read_tensors(adapter)
    try:
        found = read(change=lambda tensors: _change(tensors, adapter, family, kernels, whole))
    except DataError as error:
        raise DataError(f'{adapter.folder}, an adapter of {adapter.base}: {error}') from error
    if f'{family.head}.weight' in whole:
        # The class that the adapter belongs to; the base's may be that of a language model, or it
        # has a head of its own, by whose rewards those of this one are not normalised.
        rest = {key: value for key, value in settings.items()
                if key not in checkpoint_heads.NORMALISING}
        found = found._replace(settings=rest | {'architectures': [family.classifier]})
    return found


def write_folder(
    folder: str, settings: Mapping[str, Any], lora: Lora, base: str,
    tensors: Mapping[str, np.ndarray], *, task: str = CLASSIFIER,
) -> None:
    """Writes an adapter into a folder that is there.

    Args:
      folder: where.
      settings: of the base.
      lora: which adapters.
      base: folder or hub name of the base.
      tensors: from `adapter_tensors`, and whole ones of head and pooler by their names in
        transformers.
      task: `CLASSIFIER` or `LANGUAGE_MODEL`.
    """
    config = adapter_config(settings, lora, base, task)
    with open(os.path.join(folder, CONFIG), 'w', encoding='utf-8') as file:
        json.dump(config, file, indent=2, sort_keys=True)
        file.write('\n')
    weights.write_file(os.path.join(folder, TENSORS),
                       {_PREFIX + name: tensor for name, tensor in tensors.items()})


def adapter_config(
    settings: Mapping[str, Any], lora: Lora, base: str, task: str = CLASSIFIER
) -> dict[str, Any]:
    """`adapter_config.json`; what it does not say is peft's default."""
    a = families.architecture(settings)
    family = families.FAMILIES[settings['model_type']]
    names = module_names(family, a)
    linear = _linear(family)
    adapted = [name for name, module in names.items() if module in lora.modules]
    pooler = [row.names[0].split('.')[0] for path, row in family.tensors.items()
              if path == 'pooler/dense/kernel']
    heads = _HEADS if task == CLASSIFIER else ('lm_head',)
    return {
        'peft_type': 'LORA', 'task_type': task, 'base_model_name_or_path': base,
        'revision': None, 'inference_mode': True, 'r': lora.rank,
        'lora_alpha': int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        'use_rslora': lora.rank_stabilised, 'rank_pattern': {}, 'alpha_pattern': {},
        'lora_dropout': 0.0, 'bias': 'none', 'init_lora_weights': True,
        'fan_in_fan_out': not all(linear[name] for name in adapted),
        'modules_to_save': [*pooler, *_HEADS] if task == CLASSIFIER else None,
        'target_modules': _ends(adapted, [*linear, *heads], a.num_layers),
    }


def adapter_tensors(
    settings: Mapping[str, Any], backbone: Mapping[str, Any], lora: Lora
) -> dict[str, np.ndarray]:
    """lora_A.weight [r, D] and lora_B.weight [F, r] of each module, by names in transformers.

    Args:
      settings: of the base.
      backbone: parameters with adapters, blocks in one run.
      lora: which.
    """
    a = families.architecture(settings)
    family, found = families.FAMILIES[settings['model_type']], {}
    for name, module in module_names(family, a).items():
        if module not in lora.modules:
            continue
        branch, kernel = module.kernel.split('/')
        params = backbone['blocks'][branch][kernel]['lora'][module.name]
        for i in range(a.num_layers):
            for end, leaf in (('lora_A', params['a']), ('lora_B', params['b'])):
                found[f'{family.prefix}{name.format(i)}.{end}.weight'] = np.array(
                    np.asarray(leaf[i], np.float32).T, order='C')
    return found


def _read_config(folder: str) -> Adapter:
    path = os.path.join(folder, CONFIG)
    config = weights.read_json(path)
    for key, values in _REQUIRED.items():
        # By what they look like, as True is 1 to Python.
        if repr(config.get(key, values[0])) not in map(repr, values):
            raise DataError(f'{path}: {key}={config[key]!r}, only '
                            f'{" or ".join(map(repr, values))} is computed; where peft can, merge '
                            'it there (merge_and_unload) and save the whole model')
    if unknown := sorted(config.keys() - _REQUIRED.keys() - _READ - _SILENT):
        raise DataError(f'{path}: {", ".join(unknown)}, which is not known here; take it out if it '
                        'has no influence on what is computed')
    try:
        adapter = Adapter(
            folder, config.get('base_model_name_or_path'), config.get('task_type') or '',
            config.get('r', 8), config.get('lora_alpha', 8), config.get('use_rslora', False),
            _setting(config, 'rank_pattern', dict) or {},
            _setting(config, 'alpha_pattern', dict) or {}, _targets(config))
    except ValueError as error:
        raise DataError(f'{path}: {error}') from error
    revision = config.get('revision')
    if revision not in (None, 'main') and not os.path.isdir(adapter.base):
        raise DataError(f'{path}: revision={revision!r} of {adapter.base}, only null is fetched: '
                        'set base_model_name_or_path to a folder with that revision')
    return adapter


def _targets(config: Mapping[str, Any]) -> Targets:
    """Which modules a config names."""
    modules, excluded = (
        tuple(found) if isinstance(found, list) else found
        for found in (_setting(config, key, str, list)
                      for key in ('target_modules', 'exclude_modules')))
    layers, names = (
        tuple(found or ()) if isinstance(found, list | None) else (found,)
        for found in (_setting(config, 'layers_to_transform', int, list),
                      _setting(config, 'layers_pattern', str, list)))
    return Targets(modules, excluded, layers, names,
                   tuple(_setting(config, 'modules_to_save', list) or ()))


def _setting(config: Mapping[str, Any], key: str, *types: type) -> Any:
    """A setting of one of these types, or None.

    Raises:
      ValueError: it is of another one.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, types):
        raise ValueError(f'{key}={value!r}, expected {" or ".join(t.__name__ for t in types)}')
    return value


def _check_pattern(pattern: Any) -> None:
    """Raises ValueError for what is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f'{pattern!r} is no regular expression ({error})') from error


def _is_named(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a regular expression is all of a name, or one of some names is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f'.{module}'.endswith(f'.{name}') for name in names)


def _read_tensors(adapter: Adapter) -> tuple[dict[str, dict[str, jax.Array]], dict[str, jax.Array]]:
    """Adapters, module -> {'A', 'B'}, and whole tensors, by their names in transformers."""
    path = os.path.join(adapter.folder, TENSORS)
    kernels: dict[str, dict[str, jax.Array]] = {}
    whole = {}
    for name, tensor in weights.read_file(path).items():
        bare = name.removeprefix(_PREFIX)
        if bare == name:
            raise DataError(f'{path}: {name}, expected names that begin with {_PREFIX}')
        if part := re.fullmatch(r'(.+)\.lora_([AB])\.weight', bare):
            kernels.setdefault(part[1], {})[part[2]] = tensor
        else:
            whole[bare] = tensor
    if not kernels:
        raise DataError(f'{path}: no lora_A.weight and lora_B.weight, expected some')
    head = os.path.join(adapter.folder, weights.VALUE_HEAD)
    whole |= weights.read_file(head) if os.path.isfile(head) else {}
    weights.check_finite(adapter.folder, whole | {
        f'{name}.lora_{part}.weight': tensor for name, parts in kernels.items()
        for part, tensor in parts.items()})
    return kernels, whole


def _change(
    tensors: dict[str, Any], adapter: Adapter, family: Family,
    kernels: Mapping[str, Mapping[str, jax.Array]], whole: Mapping[str, jax.Array],
) -> None:
    """Makes the tensors of a base those of the whole model.

    Args:
      tensors: of the base, by names without the family's prefix.
      adapter, family: of the model.
      kernels, whole: from `_read_tensors`.

    Raises:
      DataError: names all that does not fit.
    """
    problems, named = _incomplete(set(tensors), adapter, family, kernels, whole), {}
    for name in (*whole, *(f'{module}.weight' for module in kernels)):
        # A kernel may be whole and have an adapter, as its own names are others.
        other = named.setdefault((name in whole, name.removeprefix(family.prefix)), name)
        if other != name:
            problems.append(f'{name} beside {other}, expected one of them')
    known = {name for row in family.tensors.values() for name in row.names} | {family.output}
    for name, tensor in whole.items():
        bare = name.removeprefix(family.prefix)
        if _HEAD.fullmatch(bare) or _template(bare) in known:
            tensors[bare] = tensor
        else:
            problems.append(f'unexpected {name} {tensor.shape}')
    for module, pair in kernels.items():
        name = f'{module.removeprefix(family.prefix)}.weight'
        try:
            tensors[name] = _merged(tensors.get(name), pair, module, adapter, family)
        except ValueError as error:
            problems.append(str(error))
    scored = any(map(_HEAD.fullmatch, whole))
    if adapter.task == CLASSIFIER and not scored:
        problems.append(f'missing {family.head}.weight: peft keeps the head of a {CLASSIFIER} '
                        'model with its adapter')
    if scored:
        problems += [f'missing {name}: the base has none, and the adapter lacks the one that it '
                     'was trained with; expected that module among modules_to_save in training'
                     for name in family.tensors.get('pooler/dense/kernel', Tensor(())).names
                     if name not in tensors]
    if problems:
        raise DataError('they do not fit:\n  ' + '\n  '.join(problems))


def _incomplete(
    base: set[str], adapter: Adapter, family: Family, kernels: Mapping[str, Any],
    whole: Mapping[str, Any],
) -> list[str]:
    """What is adapted and no target, and what is to be adapted or kept whole and is not there.

    Peft builds adapters where its config says so. It ignores tensors for other modules, and leaves
    modules without tensors as the base has them, after a warning.

    Args:
      base: names of the base's tensors, without the family's prefix.
      adapter, family, kernels, whole: see `_change`.
    """
    targets = adapter.targets
    if targets.modules is None:
        return []
    prefix = family.prefix if any(name.startswith(family.prefix) for name in kernels) else ''
    ours = {name for row in family.tensors.values() for name in row.names}
    modules = {name.removesuffix('.weight') for name in base
               if name.endswith('.weight') and _template(name) in ours}
    maps = _linear(family)
    linear = {name for name in modules if _template(name) in maps}
    adapted = {module.removeprefix(family.prefix) for module in kernels}
    there = {name.removeprefix(family.prefix).rpartition('.')[0] for name in whole}
    return [
        *(f'an adapter of {prefix + name}, which {CONFIG} does not name'
          for name in sorted(adapted & linear) if not targets.adapts(prefix + name)),
        *(f'missing {prefix + name}.lora_A.weight and .lora_B.weight, which {CONFIG} names'
          for name in sorted(linear - adapted) if targets.adapts(prefix + name)),
        *(f'missing {prefix + name}.weight, which {CONFIG} has in modules_to_save'
          for name in sorted(modules - there) if targets.keeps(prefix + name)),
    ]


def _merged(
    kernel: Any, pair: Mapping[str, jax.Array], module: str, adapter: Adapter, family: Family
) -> np.ndarray:
    """A kernel of the base with its adapter, float32, in the layout of the base.

    Args:
      kernel: None if the base has none.
      pair: 'A' and 'B'.
      module: its name in transformers.
      adapter, family: of the model.

    Raises:
      ValueError: they do not fit.
    """
    linear, place = _linear(family), _template(module.removeprefix(family.prefix))
    if set(pair) != {'A', 'B'}:
        raise ValueError(f'missing {module}.lora_{"B" if "A" in pair else "A"}.weight')
    if place not in linear:
        raise ValueError(f'an adapter of {module}, expected only those of linear maps of blocks '
                         'and pooler')
    if kernel is None:
        raise ValueError(f'an adapter of {module}, which the base has not: it was random when the '
                         'adapter was trained, and is in no file')
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (kernel, *pair.values())):
        raise ValueError(f'{module} has tensors of dtypes {kernel.dtype}, {pair["A"].dtype} and '
                         f'{pair["B"].dtype}, expected floats')
    rank, scale = adapter.scaling(module)
    whole = kernel.shape if linear[place] else kernel.shape[::-1]
    for key, shape in (('A', (rank, *whole[1:])), ('B', (*whole[:1], rank))):
        if pair[key].shape != shape:
            raise ValueError(f'misshapen {module}.lora_{key}.weight {pair[key].shape}, expected '
                             f'{shape}')
    a, b = (np.asarray(pair[key], np.float32) for key in 'AB')
    product = np.float32(scale) * (b @ a)
    return np.asarray(kernel, np.float32) + (product if linear[place] else product.T)


def _linear(family: Family) -> dict[str, bool]:
    """Linear maps of blocks and pooler, `{}` the number -> whether they are stored [F, D]."""
    return {name.removesuffix('.weight'): row.linear for path, row in family.tensors.items()
            if path.endswith('/kernel') for name in row.names}


def _template(name: str) -> str:
    """A name with `{}` for the number of its block, as in the table of a family."""
    return re.sub(r'\.\d+\.', '.{}.', name, count=1)


def _ends(adapted: list[str], linear: list[str], layers: int) -> list[str]:
    """Shortest ends of names that are those of adapted modules only, as peft looks for them.

    Args:
      adapted: names of modules, `{}` the number.
      linear: names of all linear maps.
      layers: how many blocks.
    """

    def names(some: list[str]) -> set[str]:
        return {name.format(i) for name in some for i in range(layers)}

    others, found = names(linear) - names(adapted), set()
    for name in names(adapted):
        parts = name.split('.')
        ends = ['.'.join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found.add(next(end for end in ends
                       if not any(f'.{other}'.endswith(f'.{end}') for other in others)))
    return sorted(found)
