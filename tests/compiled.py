"""Compiles training steps for all devices there are, and prints what they cost as JSON.

    python -m tests.compiled MODE,FAMILY,DTYPE,REMAT[,WIDTH,ROWS,LENGTH] ...

Products and collectives are those of XLA's optimised program, in one step; memory is of one device.
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


def architecture(family: str, width: int = 32) -> Architecture:
    """Four small blocks of a family; sizes differ, and heads share keys where they can."""
    sizes = {'vocab_size': 50, 'max_positions': 64, 'hidden_size': width, 'num_layers': 4,
             'num_heads': 2, 'intermediate_size': 3 * width // 2}
    if 'num_kv_heads' in families.FAMILIES[family].sizes:
        sizes |= {'num_kv_heads': 1, 'head_dim': 5 * width // 8}
    return families.architecture(
        families.random_settings(family, sizes) | WINDOWS.get(family, {}))


def shapes(
    family: str, dtype: str, remat: str, width: str = '32', rows: str = '2', length: str = '24'
) -> tuple[RewardNetwork, packing.Layout]:
    """Network and micro-batch of what the command line names."""
    net = RewardNetwork(architecture(family, int(width)), HeadConfig('quantile', 10), dtype,
                        'dense', remat == 'remat')
    return net, packing.Layout(int(length), int(rows), slots=4, responses=2)


def costs_of(mode: str, *rest: str) -> dict:
    (net, layout), devices = shapes(*rest), jax.device_count()
    optimizer = step.make_optimizer(optimizer_config(name='adamw', weight_decay=0.1), 3)
    train_step = reward_step(net, loss_config(), optimizer)
    state = jax.eval_shape(
        lambda key: step.init_state(net.init(key), optimizer, 0), jax.random.key(0))
    stack = packing.Stack(np.asarray(MICRO_BATCHES, np.int32), jax.tree.map(
        lambda x: np.stack([x] * MICRO_BATCHES), packing.empty_micro_batch(layout)))
    if mode == 'fsdp':
        mesh = sharding.make_mesh()
        state = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            state, sharding.shardings(state, mesh))
        place = NamedSharding(mesh, P(sharding.AXIS))
    else:
        mesh, state, place = None, on_all(state, devices), None
    batch_and_stop = on_all(((stack,), np.int32(0)), devices, place)
    compiled = Spread(mesh).compile(train_step).lower(state, batch_and_stop).compile()
    memory = compiled.memory_analysis()
    return count(compiled.as_text()) | {
        'temporary': memory.temp_size_in_bytes, 'arguments': memory.argument_size_in_bytes,
        'predicted': predict(mode, net, layout)}


def predict(mode: str, net: RewardNetwork, layout: packing.Layout) -> dict:
    """The same by `costs`; of collectives bytes sent, not results."""
    devices, sharded = jax.device_count(), mode == 'fsdp'
    work = costs.micro_batch_work(net, layout, sharded=sharded)
    memory = costs.step_memory(net, layout, shards=devices if sharded else 1)
    sent = costs.traffic(net, [(layout, MICRO_BATCHES)], devices, sharded=sharded)
    return sent._asdict() | {
        'products': MICRO_BATCHES * sum(work), 'state': memory.state,
        'temporary': sum(memory) - memory.state}


def on_all(tree: Any, devices: int, place: NamedSharding | None = None) -> Any:
    """Shapes with a leading axis over devices."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype, sharding=place), tree)


def count(program: str) -> dict:
    """FLOPs of products, and arrays that collectives give (bytes by kind), of an HLO program."""
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
                total[operation] += times * sum(
                    _BYTES[dtype] * math.prod(sizes) for dtype, sizes in arrays)
            elif operation == 'while':
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                walk(re.search(r'body=%([^\s,]+)', rest)[1],
                     times * (int(trips[1]) if trips else MICRO_BATCHES))
            elif called := re.search(r'(?:calls|to_apply)=%([^\s,]+)', rest):
                walk(called[1], times)

    walk(entry, 1)
    return total


if __name__ == '__main__':
    json.dump({key: costs_of(*key.split(',')) for key in sys.argv[1:]}, sys.stdout)
