"""Compiles training steps for accelerators that are not here, and says what memory they take.

    pip install 'qrm-jax[tpu]'        # the compiler of TPUs runs without one
    python -m benchmarks.ahead --target=v5e --devices=8 --cases=gpt2-small,llama-8b

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12   # that of GPUs too
    python -m benchmarks.ahead --target=h100 --cases=gpt2-small

Nothing runs: a step that compiles has shapes and kernels that the device's own compiler takes, and
memory is what its plan holds. Parameters are AdamW's and in float32, what is computed is in
bfloat16. One device has all of the state; several have a share each (`train.sharding=fsdp`), and
with `--tensor` compute each block together in groups of so many (`train.tensor`).
"""

import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from qrm.analysis import tables
from qrm.commands import launch
from qrm.data import packing
from qrm.data.comparisons import DataError
from qrm.models import families, lora, parallel, platforms, sharding
from qrm.models.network import RewardNetwork
from qrm.models.tuning import Tuning
from qrm.rewards.heads import HeadConfig
from qrm.studies import costs
from qrm.training import config as config_lib
from qrm.training import step, workdir
from qrm.training.devices import Spread
from qrm.training.reward_objective import RewardObjective

_GB = 1e9
_MICRO_BATCHES = 2
_LAYOUTS = {  # of a TPU, devices -> topology
    'v5e': {1: 'v5e:2x2', 8: 'v5e:2x4', 16: 'v5e:4x4', 64: 'v5e:8x8'},
    'v6e': {1: 'v6e:2x2', 8: 'v6e:2x4', 16: 'v6e:4x4', 64: 'v6e:8x8'},
    'v5p': {1: 'v5p:2x2x1', 8: 'v5p:2x2x2', 16: 'v5p:2x2x4', 64: 'v5p:4x4x4'},
}
# As its maker and https://github.com/openxla/xla (xla/backends/gpu/target_config/specs) give it.
_H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_MEMORY = {'v5e': 16e9, 'v6e': 32e9, 'v5p': 95e9, 'h100': 80e9}  # of a device, by its maker


class Case(NamedTuple):
    """A step to compile.

    Attributes:
      family, sizes: of the model.
      rows, length: of a micro-batch of each device.
      responses: of a comparison.
      attention: one of `attention.IMPLEMENTATIONS`.
      remat: recompute blocks.
      lora: rank of adapters to all linear maps, beside frozen parameters in bfloat16; 0: all
        parameters are trained.
    """

    family: str
    sizes: Mapping[str, int]
    rows: int
    length: int
    responses: int = 2
    attention: str = 'dense'
    remat: bool = False
    lora: int = 0


_GPT2 = {'vocab_size': 50257, 'max_positions': 1024, 'hidden_size': 768, 'num_layers': 12,
         'num_heads': 12, 'intermediate_size': 3072}
_LLAMA_1B = {'vocab_size': 128256, 'max_positions': 131072, 'hidden_size': 2048, 'num_layers': 16,
             'num_heads': 32, 'num_kv_heads': 8, 'head_dim': 64, 'intermediate_size': 8192}
_LLAMA_8B = {'vocab_size': 128256, 'max_positions': 131072, 'hidden_size': 4096, 'num_layers': 32,
             'num_heads': 32, 'num_kv_heads': 8, 'head_dim': 128, 'intermediate_size': 14336}
CASES = {
    'gpt2-small': Case('gpt2', _GPT2, 8, 1024),
    'gpt2-small-pallas': Case('gpt2', _GPT2, 8, 1024, attention='pallas'),
    'best-of-64': Case('gpt2', _GPT2, 1, 8192, responses=64, attention='pallas'),
    'llama-1b': Case('llama', _LLAMA_1B, 4, 1024, remat=True),
    'llama-1b-pallas': Case('llama', _LLAMA_1B, 4, 1024, attention='pallas', remat=True),
    'llama-1b-lora': Case('llama', _LLAMA_1B, 4, 1024, remat=True, lora=16),
    'llama-1b-8k': Case('llama', _LLAMA_1B, 1, 8192, remat=True),
    'llama-1b-8k-pallas': Case('llama', _LLAMA_1B, 1, 8192, attention='pallas', remat=True),
    'llama-8b': Case('llama', _LLAMA_8B, 1, 1024, remat=True),
    'llama-8b-lora': Case('llama', _LLAMA_8B, 1, 1024, remat=True, lora=16),
}


def main() -> None:
    given = flags.FLAGS
    unknown = sorted(set(given.cases) - set(CASES))
    if unknown:
        raise DataError(f'--cases={",".join(unknown)}, expected some of {", ".join(CASES)}')
    found = devices(given.target, given.devices)
    for name in given.cases:
        try:
            parallel.check(describe(CASES[name])[0].architecture, len(found), given.tensor)
        except ValueError as error:
            raise DataError(f'{name}: --{error}') from error
    rows = []
    for name in given.cases:
        print(f'compiling {name} for {len(found)} x {found[0].device_kind}', flush=True)
        rows.append({'case': name, 'devices': len(found), 'tensor': given.tensor,
                     'device': found[0].device_kind}
                    | measure(CASES[name], found, given.tensor))
        if given.workdir:
            os.makedirs(given.workdir, exist_ok=True)
            name = f'ahead-{given.target}-{given.devices}-{given.tensor}.json'
            workdir.write_json(os.path.join(given.workdir, name), rows)
    print(tables.markdown(lines(rows, _MEMORY[given.target])))


def devices(target: str, count: int) -> list[Any]:
    """Devices to compile for, of which there need be none.

    Raises:
      DataError: no such number of them, or no compiler of them.
    """
    try:
        if target == 'h100':
            found = topologies.get_topology_desc(
                '', 'cuda', target_config=_H100, topology=f'1x{-(-count // 8)}x{min(count, 8)}')
        elif count not in _LAYOUTS[target]:
            raise DataError(f'--devices={count}, expected one of {list(_LAYOUTS[target])}')
        else:
            found = topologies.get_topology_desc(_LAYOUTS[target][count], 'tpu')
    # Whatever plugins raise that are not there, or compile for no other machine.
    except (RuntimeError, KeyError, NotImplementedError) as error:
        raise DataError(f'--target={target}: {str(error).splitlines()[0]}; expected the compiler '
                        'that the first lines of benchmarks/ahead.py name') from error
    return list(found.devices)[:count]


def measure(case: Case, found: Sequence[Any], tensor: int = 1) -> dict[str, Any]:
    """Compiles the step; bytes of a device and seconds, or why it cannot.

    Args:
      case: what is compiled.
      found: devices.
      tensor: of them in a tensor group.
    """
    network, layout = describe(case)
    begun = time.perf_counter()
    row: dict[str, Any] = dict(case._asdict())
    if not case.lora:
        row['formula'] = sum(costs.step_memory(network, layout, shards=len(found),
                                             tiled=case.attention == 'pallas', tensor=tensor))
    try:
        memory = compiled(network, layout, found, tensor).memory_analysis()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        row['error'] = ' '.join(str(error).split())[:400]
    else:
        row |= {'arguments': memory.argument_size_in_bytes, 'temporary': memory.temp_size_in_bytes}
    return row | {'seconds': time.perf_counter() - begun}


def describe(case: Case) -> tuple[RewardNetwork, packing.Layout]:
    """Network and micro-batch of a case."""
    settings = families.random_settings(case.family, dict(case.sizes))
    architecture = families.architecture(settings)
    tuning = Tuning()
    if case.lora:
        modules = lora.targeted(families.FAMILIES[case.family], architecture, [lora.ALL])
        tuning = Tuning('lora', lora=lora.Lora(case.lora, 2.0 * case.lora, False, modules))
    network = RewardNetwork(architecture, HeadConfig('quantile', 10), 'bfloat16', case.attention,
                            case.remat, tuning=tuning)
    slots = max(1, case.rows * case.length // (128 * case.responses))
    return network, packing.Layout(case.length, case.rows, slots, case.responses)


def compiled(
    network: RewardNetwork, layout: packing.Layout, found: Sequence[Any], tensor: int
) -> Any:
    """The step of `_MICRO_BATCHES` micro-batches, compiled for these devices.

    Raises:
      JaxRuntimeError: it does not fit, or the compiler refuses it.
    """
    config = config_lib.build({}, 'helpful,quantile')
    optimizer = step.make_optimizer(config.optimizer, 100)
    objective = RewardObjective(network, config_lib.loss_config(config))
    train_step = step.make_train_step(network, objective, optimizer)
    mesh = None
    if len(found) > 1:
        mesh = sharding.make_mesh(tensor, found)
    stack = packing.Stack(np.asarray(_MICRO_BATCHES, np.int32), jax.tree.map(
        lambda x: np.stack([x] * _MICRO_BATCHES), packing.empty_micro_batch(layout)))
    batch = ((stack,), np.int32(0))
    with platforms.ahead_of(found[0].platform):
        trained, frozen = jax.eval_shape(functools.partial(_start, network), jax.random.key(0))
        state = jax.eval_shape(lambda params: step.init_state(params, optimizer, 0), trained)
        if mesh is None:
            place = SingleDeviceSharding(found[0])
            state, batch, frozen = (jax.tree.map(functools.partial(_shape, place=place), tree)
                                    for tree in (state, batch, frozen))
        else:
            state, frozen = (jax.tree.map(_shape, tree, sharding.shardings(tree, mesh))
                             for tree in (state, frozen))
            split = NamedSharding(mesh, P(sharding.AXIS))
            batch = jax.tree.map(lambda x: _shape(
                jax.ShapeDtypeStruct((len(found) // tensor, *np.shape(x)), x.dtype), split), batch)
        return Spread(mesh).compile(train_step).lower(state, batch, frozen).compile()


def _start(network: RewardNetwork, key: jax.Array) -> tuple[Any, Any]:
    """Trained and frozen parameters, the frozen ones in bfloat16."""
    trained, frozen = network.tuning.split(network.init(key, 'bfloat16'))
    trained = jax.tree.map(lambda leaf: leaf.astype(np.float32), trained)
    return trained, step.place_frozen(network, frozen)


def _shape(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=place)


def lines(rows: Sequence[Mapping[str, Any]], memory: float) -> list[list[str]]:
    """The rows as a table; memory of a device in bytes."""
    table = [['step', 'devices', 'rows x tokens', 'responses', 'attention', 'arguments, GB',
              'temporary, GB', 'together, of the memory', 'by formula, GB', 'compiled in']]
    for row in rows:
        formula = f'{row["formula"] / _GB:.3g}' if 'formula' in row else '-'
        group = f', groups of {row["tensor"]}' if row['tensor'] > 1 else ''
        head = [row['case'], f'{row["devices"]} x {row["device"]}{group}',
                f'{row["rows"]} x {row["length"]}', str(row['responses']), row['attention']]
        if 'error' in row:
            table.append([*head, '-', '-', row['error'], formula, f'{row["seconds"]:.0f} s'])
            continue
        together = row['arguments'] + row['temporary']
        table.append([*head, f'{row["arguments"] / _GB:.3g}', f'{row["temporary"] / _GB:.3g}',
                      f'{together / _GB:.3g} GB, {together / memory:.0%}', formula,
                      f'{row["seconds"]:.0f} s'])
    return table


def _define_flags() -> None:
    flags.DEFINE_enum('target', 'v5e', [*_LAYOUTS, 'h100'], 'Which device.')
    flags.DEFINE_integer('devices', 1, 'How many.', lower_bound=1)
    flags.DEFINE_integer('tensor', 1, 'Of them in a tensor group.', lower_bound=1)
    flags.DEFINE_list('cases', list(CASES), f'Which steps: {", ".join(CASES)}.')
    flags.DEFINE_string('workdir', '', 'Folder for the numbers as JSON; empty: they are printed.')


if __name__ == '__main__':
    _define_flags()
    launch.run(main)
