"""Compiles training steps for all devices there are, and prints what they cost as JSON.

    python -m tests.programs.compiled MODE,FAMILY,DTYPE,REMAT[,WIDTH,ROWS,LENGTH] ...

Modes are 'replicated', 'fsdp' and 'fsdp:M' with tensor groups of M. Products and bytes that
collectives send are those of XLA's optimised program, in one step on one device; so is memory.
"""

import json
import math
import re
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qrm.data import packing
from qrm.models import families, sharding
from qrm.models.architecture import Architecture
from qrm.models.network import RewardNetwork
from qrm.rewards.heads import HeadConfig
from qrm.studies import costs
from qrm.training import step
from qrm.training.devices import Spread
from tests.helpers import loss_config, optimizer_config, reward_step

MICRO_BATCHES = 3
_BYTES = {'pred': 1, 'bf16': 2, 's32': 4, 'u32': 4, 'f32': 4}
_COLLECTIVES = {'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute'}


# Of families with windows, one that is shorter than the rows.
WINDOWS = {
    'mistral': {'sliding_window': 9},
    'qwen2': {'use_sliding_window': True, 'sliding_window': 9, 'max_window_layers': 2},
    'gemma2': {'sliding_window': 9},
    'gemma3_text': {'sliding_window': 9, 'sliding_window_pattern': 3},
    'modernbert': {'local_attention': 16},
}


def architecture(family: str, width: int = 32, tensor: int = 1) -> Architecture:
    """Four small blocks of a family; sizes differ, and heads share keys where they can."""
    sizes = {'vocab_size': 50, 'max_positions': 64, 'hidden_size': width, 'num_layers': 4,
             'num_heads': 2 * tensor, 'intermediate_size': 3 * width // 2}
    if 'num_kv_heads' in families.FAMILIES[family].sizes:
        sizes |= {'num_kv_heads': tensor, 'head_dim': 5 * width // 8}
    return families.architecture(
        families.random_settings(family, sizes) | WINDOWS.get(family, {}))


def shapes(
    tensor: int, family: str, dtype: str, remat: str, width: str = '32', rows: str = '2',
    length: str = '24',
) -> tuple[RewardNetwork, packing.Layout]:
    """Network and micro-batch of what the command line names."""
    net = RewardNetwork(architecture(family, int(width), tensor), HeadConfig('quantile', 10),
                        dtype, 'dense', remat == 'remat')
    return net, packing.Layout(int(length), int(rows), slots=4, responses=2)


def costs_of(mode: str, *rest: str) -> dict:
    mode, _, tensor = mode.partition(':')
    tensor, devices = int(tensor or 1), jax.device_count()
    net, layout = shapes(tensor, *rest)
    optimizer = step.make_optimizer(optimizer_config(name='adamw', weight_decay=0.1), 3)
    train_step = reward_step(net, loss_config(), optimizer)
    state = jax.eval_shape(
        lambda key: step.init_state(net.init(key), optimizer, 0), jax.random.key(0))
    stack = packing.Stack(np.asarray(MICRO_BATCHES, np.int32), jax.tree.map(
        lambda x: np.stack([x] * MICRO_BATCHES), packing.empty_micro_batch(layout)))
    if mode == 'fsdp':
        mesh = sharding.make_mesh(tensor)
        state = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            state, sharding.shardings(state, mesh))
        place = NamedSharding(mesh, P(sharding.AXIS))
    else:
        mesh, state, place = None, on_all(state, devices), None
    spread = Spread(mesh)
    batch_and_stop = on_all(((stack,), np.int32(0)), spread.shares, place)
    compiled = spread.compile(train_step).lower(state, batch_and_stop).compile()
    memory = compiled.memory_analysis()
    return count(compiled.as_text()) | {
        'temporary': memory.temp_size_in_bytes, 'arguments': memory.argument_size_in_bytes,
        'predicted': predict(mode, tensor, net, layout)}


def predict(mode: str, tensor: int, net: RewardNetwork, layout: packing.Layout) -> dict:
    """The same by `costs`."""
    devices, sharded, stacks = jax.device_count(), mode == 'fsdp', [(layout, MICRO_BATCHES)]
    work = costs.micro_batch_work(net, layout, sharded=sharded, tensor=tensor)
    memory = costs.step_memory(net, layout, shards=devices if sharded else 1, tensor=tensor)
    parts = (costs.traffic(net, stacks, devices, sharded=sharded, tensor=tensor),
             costs.group_traffic(net, stacks, devices, tensor=tensor))
    sent = costs.Traffic(*map(sum, zip(*parts, strict=True)))
    return sent._asdict() | {
        'products': MICRO_BATCHES * sum(work), 'state': memory.state,
        'temporary': sum(memory) - memory.state}


def on_all(tree: Any, devices: int, place: NamedSharding | None = None) -> Any:
    """Shapes with a leading axis over devices."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype, sharding=place), tree)


def count(program: str) -> dict:
    """FLOPs of products, and what a device sends in collectives (bytes by kind), of a program."""
    computations, entry = {}, ''
    for line in program.splitlines():
        if heading := re.match(r'(ENTRY )?%(\S+) .*\{$', line):
            name = heading[2]
            computations[name], entry = [], name if heading[1] else entry
        elif ' = ' in line:
            computations[name].append(line.strip().removeprefix('ROOT '))
    total = dict.fromkeys(['products', *_COLLECTIVES], 0)

    def walk(computation: str, times: int) -> None:
        results = {}
        for line in computations[computation]:
            name, result, operation, rest = re.match(
                r'%(\S+) = (.+?) ([a-z][a-z\d-]*)\((.*)', line).groups()
            results[name] = arrays = [
                (dtype, [int(n) for n in sizes.split(',') if n])
                for dtype, sizes in re.findall(r'(\w+)\[([\d,]*)\]', result)]
            if operation == 'dot':
                sizes = results[re.match(r'%([^\s,)]+)', rest)[1]][0][1]
                contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', rest)[1]
                total['products'] += 2 * times * math.prod(
                    arrays[0][1] + [sizes[int(i)] for i in contracted.split(',')])
            elif operation in _COLLECTIVES:
                given = sum(_BYTES[dtype] * math.prod(sizes) for dtype, sizes in arrays)
                total[operation] += times * given * _sent(operation, rest)
            elif operation == 'while':
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                walk(re.search(r'body=%([^\s,]+)', rest)[1],
                     times * (int(trips[1]) if trips else MICRO_BATCHES))
            elif called := re.search(r'(?:calls|to_apply)=%([^\s,]+)', rest):
                walk(called[1], times)

    walk(entry, 1)
    return total


def _sent(operation: str, rest: str) -> float:
    """Share that a device sends of what a collective gives it, in a ring or to each by itself."""
    groups = rest[rest.index('replica_groups='):]
    if listed := re.match(r'replica_groups=\{\{([\d,]*)\}', groups):
        count = len(listed[1].split(','))
    elif listed := re.match(r'replica_groups=\[\d+,(\d+)\]', groups):
        count = int(listed[1])
    else:  # axes of a mesh, and those that are gone along
        sizes, along = re.match(r'replica_groups=mesh\[(.*?)\].*?\{(.*?)\}', groups).groups()
        count = math.prod(int(size) for name, size in re.findall(r"('\w+')=(\d+)", sizes)
                          if name in along)
    share = (count - 1) / count
    return {'all-reduce': 2 * share, 'reduce-scatter': count - 1}.get(operation, share)


if __name__ == '__main__':
    json.dump({key: costs_of(*key.split(',')) for key in sys.argv[1:]}, sys.stdout)
