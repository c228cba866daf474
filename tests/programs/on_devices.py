"""Takes a few steps on all devices there are, and prints what came out as JSON.

    python -m tests.programs.on_devices MODE,OPTIMIZER,HEAD[,TUNING[,FAMILY]] ...
    python -m tests.programs.on_devices FOLDER STEP KEY=VALUE ...

Modes are 'replicated', 'fsdp' and 'fsdp:M' with tensor groups of M.
The second trains a tiny model in a folder until a step, where SIGTERM comes; 0: to the end.
"""

import json
import os
import signal
import sys

import jax
import numpy as np

from qrm.data import packing
from qrm.models import families, parallel, sharding
from qrm.models import lora as lora_lib
from qrm.models.network import RewardNetwork
from qrm.models.tuning import Tuning
from qrm.rewards.heads import HeadConfig
from qrm.training import features, inference, interruptions, step, train
from qrm.training.checkpoints import Checkpoints
from qrm.training.devices import Spread
from tests.helpers import (
    TINY,
    TUNINGS,
    init,
    load_config,
    loss_config,
    network,
    optimizer_config,
    random_comparisons,
    reward_step,
)


def flat(params) -> list[float]:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]).tolist()


def local_bytes(tree) -> int:
    """Bytes of a tree on the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def grouped(head: str, tuning: str, family: str) -> RewardNetwork:
    """Two small blocks of a family, eight heads; four of keys and values where it has fewer."""
    sizes = {'vocab_size': 50, 'max_positions': 64, 'hidden_size': 16, 'num_layers': 2,
             'num_heads': 8, 'intermediate_size': 24}
    if 'num_kv_heads' in families.FAMILIES[family].sizes:
        sizes |= {'num_kv_heads': 4, 'head_dim': 6}
    # Of families with windows, one that is shorter than a row.
    window = {'sliding_window': 9} if family == 'gemma2' else {}
    a = families.architecture(families.random_settings(family, sizes) | window)
    tuned = TUNINGS[tuning]
    if tuning == 'lora':
        modules = lora_lib.targeted(families.FAMILIES[family], a, [lora_lib.ALL])
        tuned = Tuning('lora', lora=lora_lib.Lora(4, 6.0, False, modules))
    return RewardNetwork(a, HeadConfig(head, 10), tuning=tuned)


def alike(tree) -> bool:
    """Whether devices that hold the same part of a leaf hold the same bits."""
    found = {}
    return all(np.array_equal(found.setdefault((i, str(shard.index)), np.asarray(shard.data)),
                              shard.data)
               for i, leaf in enumerate(jax.tree.leaves(tree))
               for shard in leaf.addressable_shards)


def take_steps(
    mode: str, optimizer: str, head: str, tuning: str = 'all', family: str = ''
) -> dict:
    items = random_comparisons(25, seed=2, responses=(2, 4))
    net = grouped(head, tuning, family) if family else network(head, tuning=TUNINGS[tuning])
    layouts = packing.plan_layouts(items, row_length=64, rows=2)
    # A factor on all gradients shows under SGD without clipping only.
    settings = {} if optimizer == 'sgd' else {
        'name': optimizer, 'learning_rate': 0.01, 'weight_decay': 0.1, 'clip_norm': 0.5}
    optimizer = step.make_optimizer(optimizer_config(**settings), 3)
    name, _, tensor = mode.partition(':')
    mesh = sharding.make_mesh(int(tensor or 1)) if name == 'fsdp' else None
    spread = Spread(mesh)
    params, frozen = net.tuning.split(init(net))
    initial = flat(params)
    if mesh is not None:
        params, frozen = (parallel.arrange(sharding.split(part, sharding.shardings(part, mesh)),
                                           net.architecture, mesh) for part in (params, frozen))
    state = step.init_state(params, optimizer, 0, mesh)
    own_bytes = local_bytes((state.params, state.opt_state))
    whole_bytes = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    run_step = spread.compile(reward_step(net, loss_config(head), optimizer))
    state, everywhere, metrics, trips = spread.start(state), spread.start(frozen), [], []
    for number in range(3):
        indices = packing.batch_indices(number, seed=0, examples=25, batch_size=9, total=25)
        shares = spread.shares
        parts = packing.share(np.array([items[i].size for i in indices]), shares)
        batches = [packing.make_batch([items[i] for i in indices[part]], layouts, -(-9 // shares))
                   for part in parts]
        trips.append([[int(stack.count) for stack in batch] for batch in batches])
        placed = spread.put([(batch, np.int32(i == number)) for i, batch in enumerate(batches)])
        with jax.transfer_guard('disallow'):
            state, values, stop = run_step(state, placed, everywhere)
        assert int(spread.one(stop)) == (number < shares) * (jax.device_count() // shares)
        metrics.append({k: float(v) for k, v in spread.one(values).items()})
    if mesh is not None:
        assert local_bytes((state.params, state.opt_state)) == own_bytes
        assert alike((state, frozen))
    params = spread.one(state.params)
    rewards = inference.predict(net, net.tuning.join(params, frozen), items, row_length=64,
                                rows=2, mesh=mesh)
    params, frozen = (parallel.restore(part, net.architecture, mesh) for part in (params, frozen))
    if tuning == 'lora' and mesh is not None:  # whose rewards tell apart what is rounded otherwise
        alone = inference.predict(net, jax.device_get(net.tuning.join(params, frozen)), items,
                                  row_length=64, rows=2)
        for own, expected in zip(rewards, alone, strict=True):
            np.testing.assert_allclose(own, expected, rtol=0, atol=1e-5)
    return {
        'devices': jax.device_count(), 'metrics': metrics, 'trips': trips, 'initial': initial,
        'params': flat(params),
        'rewards': np.concatenate([q.ravel() for q in rewards]).tolist(),
        'share_of_bytes': own_bytes / whole_bytes, 'own_bytes': own_bytes,
    }


def train_until(folder: str, stop: int, overrides: dict) -> None:
    config, calls, end = tiny_config(**overrides), [], ''
    mesh = sharding.make_mesh(config.train.tensor) if config.train.sharding == 'fsdp' else None
    module = features if config.train.tune == 'head' else packing
    make_batch = module.make_batch
    own = len(Spread(mesh).own)
    start = Checkpoints(folder).latest or 0

    def interrupt(*args):
        calls.append(1)
        if start + len(calls) / own == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(*args)

    module.make_batch = interrupt
    try:
        train.train(config, folder)
    except interruptions.Interrupted as interrupted:
        end = str(interrupted)
    finally:
        module.make_batch = make_batch
    assert f'at step {stop} of' in end if stop else not end


def tiny_config(**overrides):
    settings = {'model.sizes.num_layers': 2, 'train.max_steps': 8, 'train.checkpoint_every': 8,
                # Adam makes steps of mere rounding where a gradient is 0, unless eps is larger.
                'optimizer.eps': 1e-3}
    return load_config('demo', 'helpful,quantile', **TINY | settings | overrides)


if __name__ == '__main__':
    if ',' in sys.argv[1]:
        json.dump({key: take_steps(*key.split(',')) for key in sys.argv[1:]}, sys.stdout)
    else:
        given = (a.split('=') for a in sys.argv[3:])
        train_until(sys.argv[1], int(sys.argv[2]), {
            key: int(value) if value.isdecimal() else value for key, value in given})
