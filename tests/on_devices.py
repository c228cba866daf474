"""Takes a few steps on all devices there are, and prints what came out as JSON."""

import json
import sys

import jax
import numpy as np

from qrm import inference, packing, step
from qrm.devices import replicate, unreplicate
from tests.helpers import init, loss_config, network, random_comparisons
from tests.test_step import optimizer_config


def flat(params) -> list[float]:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]).tolist()


def main() -> None:
    devices = jax.local_device_count()
    items = random_comparisons(25, seed=2, responses=(2, 4))
    layouts = packing.plan_layouts(items, row_length=24, rows=2)
    net = network()
    optimizer = step.make_optimizer(optimizer_config(), 3)
    train_step = step.make_train_step(net, loss_config(), optimizer)
    state = step.init_state(init(net), optimizer, 0)
    initial = flat(state.params)
    if devices > 1:
        state = replicate(state)
        run_step = jax.pmap(lambda s, b: train_step(s, b, axis_name='devices'),
                            axis_name='devices')
    else:
        run_step = jax.jit(train_step)
    losses = []
    for number in range(3):
        indices = packing.batch_indices(number, seed=0, examples=25, batch_size=9, total=25)
        parts = packing.share([items[i] for i in indices], devices)
        batches = [packing.make_batch(part, layouts, -(-9 // devices)) for part in parts]
        batch = jax.tree.map(lambda *x: np.stack(x), *batches) if devices > 1 else batches[0]
        state, metrics = run_step(state, batch)
        losses.append(float(np.ravel(metrics['loss'])[0]))
    params = unreplicate(state.params) if devices > 1 else state.params
    rewards = inference.predict(net, params, items, row_length=24, rows=2)
    json.dump({
        'devices': devices, 'losses': losses, 'initial': initial, 'params': flat(params),
        'rewards': np.concatenate([q.ravel() for q in rewards]).tolist(),
    }, sys.stdout)


if __name__ == '__main__':
    main()
