"""Takes a few steps of a policy on all devices there are, and prints what came out as JSON.

    python -m tests.programs.on_policies MODE ...

Modes are those of `on_devices`.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from qrm.data import packing
from qrm.models import parallel, sharding
from qrm.policy import batches, dpo, runs
from qrm.policy.network import PolicyNetwork
from qrm.training import step
from qrm.training.devices import Spread
from tests.helpers import ARCHITECTURE, init, optimizer_config, random_comparisons
from tests.programs.on_devices import flat


def take_steps(mode: str) -> dict:
    shape = {'row_length': 48, 'rows': 1}
    items = [dataclasses.replace(item, prompt_sizes=(len(item.prompt),) * len(item.responses))
             for item in random_comparisons(14, seed=2, most=16, responses=(2, 3))]
    rng = np.random.default_rng(0)
    items = [batches.Extended(**vars(item), extras={'reference_log_probs': [
        rng.normal(-4, 1, n).astype(np.float32) for n in batches.sizes(item)]}) for item in items]
    plan = batches.plan(items, **shape, of_tokens=('reference_log_probs',))
    net = PolicyNetwork(dataclasses.replace(ARCHITECTURE, num_layers=1))
    optimizer = step.make_optimizer(optimizer_config(), 2)
    name, _, tensor = mode.partition(':')
    mesh = sharding.make_mesh(int(tensor or 1)) if name == 'fsdp' else None
    spread, params = Spread(mesh), init(net)
    initial = flat(params)
    if mesh is not None:
        params = parallel.arrange(
            sharding.split(params, sharding.shardings(params, mesh)), net.architecture, mesh)
    state = spread.start(step.init_state(params, optimizer, 0, mesh))
    objective = dpo.PreferenceObjective(net, dpo.DpoConfig())
    run_step, metrics = spread.compile(step.make_train_step(net, objective, optimizer)), []
    for number in range(2):
        indices = packing.batch_indices(number, seed=0, examples=14, batch_size=7, total=14)
        parts = packing.share(np.array([items[i].size for i in indices]), spread.shares)
        placed = spread.put([(batches.make_batch(
            [items[i] for i in indices[part]], plan, -(-7 // spread.shares)), np.int32(0))
            for part in parts])
        state, values, _ = run_step(state, placed, spread.start({}))
        metrics.append({k: float(v) for k, v in spread.one(values).items()})
    params = spread.one(state.params)
    found = [one for chunk in runs.log_probs(net, params, items, **shape, mesh=mesh)
             for item in chunk for one in item]
    params = parallel.restore(params, net.architecture, mesh)
    return {'devices': jax.device_count(), 'metrics': metrics, 'initial': initial,
            'params': flat(params), 'log_probs': np.concatenate(found).tolist()}


if __name__ == '__main__':
    json.dump([take_steps(mode) for mode in sys.argv[1:]], sys.stdout)
