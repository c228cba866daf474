"""Reward heads as they stand in checkpoints: from tensors to a `HeadConfig` and parameters.

    NAME.weight [N, D], NAME.bias [N]     one or N outputs (`LINEAR` has the names)
    NAME.0.*, NAME.2.*                    the same behind a layer with ReLU (INF-ORM, GRM, Qwen RMs)
    regression_layer, gating, ...         attributes that a gate on the prompt weighs: ArmoRM (Wang
                                          et al. 2024) and, with quantiles of each, QRM (Dorka 2024)

Axes: N outputs, D features, A attributes.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qrm.rewards.heads import HeadConfig
from qrm.rewards.normalisation import Normalisation

# Those of transformers, and of trainers that have a class of their own: 'v_head' (TRL, Athene),
# 'regression_head' (UltraRM, Eurus), 'value_head' (OpenRLHF), 'score_head' (Beaver),
# 'v_head.summary' (LLaMA-Factory, GRM), 'quantile_head' (Kim et al.).
LINEAR = ('score', 'classifier', 'v_head', 'regression_head', 'value_head', 'score_head',
          'v_head.summary', 'quantile_head')
# Settings that say by what the rewards of a head are normalised: OpenRLHF's, and those of exports.
NORMALISING = ('normalize_reward', 'mean', 'std', 'qrm_mean', 'qrm_std')
_BATCH_NORM_EPSILON = 1e-5  # PyTorch's


def take(
    tensors: dict[str, jax.Array],
    settings: Mapping[str, Any],
    width: int,
    problems: list[str],
    *,
    reads: tuple[str, ...] = ('last',),
) -> tuple[HeadConfig, dict[str, Any]] | None:
    """Takes the tensors of a reward head out of those of a checkpoint.

    Args:
      tensors: name -> tensor; loses those of the head.
      settings: of the checkpoint.
      width: D of the backbone.
      problems: gets what is wrong with them.
      reads: what the head reads, see `HeadConfig`.

    Returns:
      Config and parameters, float32; None if there is no head, or none that can be used. Several
      outputs are taken for quantiles, which `interpret` decides.
    """
    if 'regression_layer.weight' in tensors:
        return _take_gated(tensors, settings, width, problems)
    prefix = settings.get('value_head_prefix')
    names = [*LINEAR, *([prefix] if isinstance(prefix, str) and prefix not in LINEAR else [])]
    # Half a head is one too: what is missing is named.
    linear = [name for name in names if {f'{name}.weight', f'{name}.bias'} & tensors.keys()]
    deep = [name for name in names if {f'{name}.0.weight', f'{name}.2.weight'} & tensors.keys()]
    if len(linear + deep) != 1:
        if linear or deep:
            problems.append(f'several reward heads: {", ".join(linear + deep)}, expected one')
            _pop(tensors, rf'({"|".join(map(re.escape, linear + deep))})(\.[02])?\.(weight|bias)')
        return None
    layers, (name,) = [], linear + deep
    params: dict[str, Any] = {}
    if deep:
        first, inner = _take_dense(tensors, f'{name}.0', width, problems)
        if inner is None:
            _pop(tensors, rf'{re.escape(name)}\.2\.(weight|bias)')
            return None
        layers, params, width, name = [inner], {'hidden_0': first}, inner, f'{name}.2'
        first.setdefault('bias', jnp.zeros(inner))
    last, outputs = _take_dense(tensors, name, width, problems)
    if outputs is None:
        return None
    kind = 'scalar' if outputs == 1 else 'quantile'
    config = HeadConfig(kind, outputs if kind == 'quantile' else 10, reads=reads,
                        hidden_layers=tuple(layers), bias='bias' in last)
    return config, params | last


def interpret(
    head: tuple[HeadConfig, dict[str, Any]], settings: Mapping[str, Any], outputs: str = ''
) -> tuple[HeadConfig, dict[str, Any]]:
    """A head that `take` gave, with the meaning that its outputs have.

    Args:
      head: config and parameters.
      settings: of the checkpoint.
      outputs: what several outputs mean: 'quantiles'; 'gaussian', mean and width of a Gaussian
        (Siththaranjan et al. 2023); or the name or number of the one that is the reward. '': what
        the checkpoint says; quantiles, and a note is printed, if it says nothing at all.

    Raises:
      ValueError: the checkpoint calls its outputs classes or by names of their own, or the head has
        no such outputs.
    """
    config, params = head
    count = params['kernel'].shape[-1]
    names = _label_names(settings, count)
    if not outputs and (count == 1 or config.gated):
        return head
    own = settings.get('qrm_outputs')
    outputs = outputs or ('quantiles' if own == 'quantiles' else '')
    if not outputs:
        kind = settings.get('problem_type')
        if names != _label_names({}, count) or kind:
            raise ValueError(
                f'{count} outputs ({", ".join(names)}{f"; {kind}" if kind else ""}) that are not '
                "said to be quantiles; expected outputs='quantiles', 'gaussian', or the name or "
                'number of the one that is the reward')
        print(f'note: {count} outputs, of which the checkpoint does not say what they are, are '
              'taken for quantiles', flush=True)
        return head
    if config.gated:
        raise ValueError(f'outputs={outputs!r} of a head with a gate, which says itself what its '
                         'outputs mean')
    if outputs == 'quantiles':
        return head
    if outputs == 'gaussian':
        if count != 2:
            raise ValueError(f'{count} outputs, expected the 2 of a Gaussian')
        return dataclasses.replace(config, name='gaussian', num_quantiles=10), params
    if outputs not in names and not (outputs.isdecimal() and int(outputs) < count):
        raise ValueError(f'outputs={outputs!r}, expected \'quantiles\', \'gaussian\', one of '
                         f'{names} or a number below {count}')
    number = names.index(outputs) if outputs in names else int(outputs)
    one = {key: params[key][..., number:number + 1] for key in ('kernel', 'bias') if key in params}
    return dataclasses.replace(config, name='scalar', num_quantiles=10), params | one


def normalisation(
    head: tuple[HeadConfig, dict[str, Any]], settings: Mapping[str, Any]
) -> tuple[tuple[HeadConfig, dict[str, Any]], Normalisation | None]:
    """A head whose outputs are raw, and by what its rewards are normalised; None: by nothing.

    OpenRLHF subtracts and divides where `normalize_reward` says so. An export of ours has divided
    its weights by `qrm_std` and, where there is a bias, subtracted `qrm_mean`, which is undone.

    Args:
      head: config and parameters from `interpret`.
      settings: of the checkpoint.

    Raises:
      ValueError: mean or standard deviation are missing or no numbers.
    """
    config, params = head
    try:
        if 'qrm_std' in settings:
            found = Normalisation(settings.get('qrm_mean'), settings['qrm_std'])
            raw = {'kernel': params['kernel'] * found.std}
            if config.bias:
                raw['bias'] = params['bias'] * found.std + found.mean
            return (config, params | raw), found
        if settings.get('normalize_reward'):
            return head, Normalisation(settings.get('mean'), settings.get('std'))
    except ValueError as error:
        key = 'qrm_std' if 'qrm_std' in settings else 'normalize_reward'
        raise ValueError(f'{key} with {error}') from error
    return head, None


def _label_names(settings: Mapping[str, Any], count: int) -> list[str]:
    """Names of a classifier's outputs."""
    labels, numbers = settings.get('id2label'), settings.get('label2id')
    if isinstance(labels, list):
        labels = dict(enumerate(labels))
    elif not isinstance(labels, Mapping):
        labels = {number: name for name, number in numbers.items()} if isinstance(
            numbers, Mapping) else {}
    known = {str(number): str(name) for number, name in labels.items()}
    return [known.get(str(i), f'LABEL_{i}') for i in range(count)]


def _take_dense(
    tensors: dict[str, jax.Array], name: str, width: int, problems: list[str]
) -> tuple[dict[str, jax.Array], int | None]:
    """Takes kernel [D, N] and bias [N], if any, of a layer, and N; None if they are misshapen."""
    kernel, bias = tensors.pop(f'{name}.weight', None), tensors.pop(f'{name}.bias', None)
    if kernel is None:
        problems.append(f'missing {name}.weight')
    elif kernel.ndim != 2 or kernel.shape[1] != width:
        problems.append(f'misshapen {name}.weight {kernel.shape}, expected (N, {width})')
    elif bias is not None and bias.shape != kernel.shape[:1]:
        problems.append(f'misshapen {name}.bias {bias.shape}, expected {kernel.shape[:1]}')
    elif not jnp.issubdtype(kernel.dtype, jnp.floating):
        problems.append(f'{name}.weight has dtype {kernel.dtype}, expected floats')
    else:
        found = {'kernel': jnp.asarray(kernel, jnp.float32).T}
        if bias is not None:
            found['bias'] = jnp.asarray(bias, jnp.float32)
        return found, kernel.shape[0]
    return {}, None


def _take_gated(
    tensors: dict[str, jax.Array], settings: Mapping[str, Any], width: int, problems: list[str]
) -> tuple[HeadConfig, dict[str, Any]] | None:
    """Takes the head of ArmoRM or QRM.

    Their reward is scale * sum_a softmax(gate(prompt) / temperature)_a sum_i r_i T_ia with values
    r [A] or quantiles [A, N] at levels i / (N + 1) of the response. Here transformation T and
    scale are part of the kernel, the temperature is part of the gate.
    """
    regression, outputs = _take_dense(tensors, 'regression_layer', width, problems)
    transform = tensors.pop('reward_transform_matrix', None)
    scale = tensors.pop('gating.logit_scale', jnp.ones(1))
    gate = _pop(tensors, r'gating\.layers\.\d+\.\w+')
    if outputs is None:
        return None
    if transform is None or not gate:
        problems.append('regression_layer without reward_transform_matrix and gating.layers, '
                        'expected all three')
        return None
    attributes = transform.shape[0] if transform.ndim == 2 else 0
    if attributes < 2 or transform.shape[1] != attributes or outputs % attributes:
        problems.append(f'misshapen reward_transform_matrix {transform.shape}, expected (A, A) '
                        f'with A > 1 that divides the {outputs} rows of regression_layer.weight')
        return None
    if scale.shape != (1,):
        problems.append(f'misshapen gating.logit_scale {scale.shape}, expected (1,)')
        return None
    layers = _take_gate(gate, width, problems)
    if layers is None:
        return None
    *hidden, last = layers
    if last['bias'].shape != (attributes,):
        problems.append(f'gating.layers with {len(last["bias"])} outputs, expected the '
                        f'{attributes} of reward_transform_matrix')
        return None
    if not hidden:
        # A gate of one layer has no bias of its own here.
        problems.append('gating.layers with one layer, expected at least two')
        return None
    temperature = settings.get('gating_temperature')
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or (
            not temperature > 0):
        problems.append(f'gating_temperature={temperature!r} in config.json, expected a positive '
                        'number')
        return None
    if 'bias' in regression:
        problems.append('unexpected regression_layer.bias')
    quantiles = outputs // attributes
    parts = regression['kernel'].reshape(width, attributes, quantiles)
    mixed = jnp.einsum('dan,ab->dbn', parts, jnp.asarray(transform, jnp.float32),
                       precision=jax.lax.Precision.HIGHEST) * jnp.asarray(scale, jnp.float32)
    params = {f'gate_{i}': layer for i, layer in enumerate(hidden)}
    params |= {'kernel': mixed.reshape(width, -1), 'gate': last['kernel'] / temperature,
               'gate_bias': last['bias'] / temperature}
    config = HeadConfig(
        'scalar' if quantiles == 1 else 'quantile', quantiles if quantiles > 1 else 10,
        attributes=tuple(f'objective {i}' for i in range(attributes)),
        gate_layers=tuple(len(layer['bias']) for layer in hidden),
        levels=tuple((i + 1) / (quantiles + 1) for i in range(quantiles) if quantiles > 1))
    return config, params


def _take_gate(
    tensors: dict[str, jax.Array], width: int, problems: list[str]
) -> list[dict[str, jax.Array]] | None:
    """Kernels and biases of the layers of a gate; None if it cannot be used.

    Between layers there is ReLU and, in QRM, a batch norm, which is a part of the next layer here.
    """
    numbers = {int(name.split('.')[2]) for name in tensors}
    norms = {n for n in numbers if f'gating.layers.{n}.running_mean' in tensors}
    dense = sorted(numbers - norms)
    if wrong := sorted(n for n in norms if n - 2 not in dense[:-1]):
        problems.append(f'gating.layers.{wrong[0]} is a batch norm at another place than behind '
                        'the ReLU of a layer, which is not computed')
        return None
    layers, factor, shift = [], jnp.ones(width), jnp.zeros(width)
    for number in dense:
        layer, inner = _take_dense(tensors, f'gating.layers.{number}', width, problems)
        if inner is None:
            return None
        more = jnp.matmul(shift, layer['kernel'], precision=jax.lax.Precision.HIGHEST)
        layers.append({'kernel': layer['kernel'] * factor[:, None],
                       'bias': layer.get('bias', 0.0) + more})
        width, factor, shift = inner, jnp.ones(inner), jnp.zeros(inner)
        if number + 2 in norms:
            norm = [tensors.pop(f'gating.layers.{number + 2}.{end}', None)
                    for end in ('weight', 'bias', 'running_mean', 'running_var')]
            if any(x is None or x.shape != (inner,) for x in norm):
                problems.append(f'gating.layers.{number + 2}, a batch norm, lacks tensors or has '
                                f'others than weight, bias, running_mean, running_var ({inner},)')
                return None
            scale, bias, mean, variance = (jnp.asarray(x, jnp.float32) for x in norm)
            factor = scale / jnp.sqrt(variance + _BATCH_NORM_EPSILON)
            shift = bias - mean * factor
            tensors.pop(f'gating.layers.{number + 2}.num_batches_tracked', None)
    if tensors:
        problems += [f'unexpected {name} {tensors[name].shape}' for name in sorted(tensors)]
    return layers


def _pop(tensors: dict[str, jax.Array], names: str) -> dict[str, jax.Array]:
    """Takes the tensors whose whole name fits a regular expression."""
    return {name: tensors.pop(name) for name in list(tensors) if re.fullmatch(names, name)}
