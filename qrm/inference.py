"""Rewards of many comparisons: packed rows through the network, on all devices."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qrm import sharding
from qrm.devices import own_devices, put, replicate, stack, unreplicate
from qrm.network import Params, RewardNetwork
from qrm.packing import Layout, MicroBatch, empty_micro_batch, layout_of, pack, plan_layouts, runs
from qrm.tokens import Encoded

_CHUNK = 4096  # comparisons packed together; bounds memory and the time spent on packing


def predict(
    network: RewardNetwork,
    params: Params,
    encoded: Sequence[Encoded],
    *,
    row_length: int,
    rows: int,
    max_length: int,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """Quantiles of every response, whatever shares its rows.

    With several processes all of them call it, with the same comparisons, and get all quantiles.

    Args:
      network, params: the reward model.
      encoded: comparisons with any number of responses.
      row_length, rows: shape of the usual micro-batch.
      max_length: tokens of the longest dialogue; rows of this length serve dialogues longer
        than `row_length`.
      mesh: the mesh over which params are split, see `sharding`; None: they are not.

    Returns:
      One [K, N] float32 array for each comparison, in order.
    """
    pieces, owners = [], []
    for owner, item in enumerate(encoded):
        length = row_length if item.longest <= row_length else max_length
        for _, part in runs(item, length):
            pieces.append(dataclasses.replace(
                item, responses=item.responses[part.start:part.stop],
                preference=item.preference[part.start:part.stop, part.start:part.stop]))
            owners.append((owner, part.start))
    results = [np.empty((len(item.responses), network.head.outputs), np.float32)
               for item in encoded]
    if not pieces:
        return results
    layouts = plan_layouts(pieces, row_length=row_length, rows=rows, max_length=max_length)
    devices = jax.device_count()
    params = params if devices == 1 or mesh is not None else replicate(params)
    for number, layout in enumerate(layouts):
        members = [i for i, piece in enumerate(pieces) if layout_of(piece, layouts) == number]
        for start in range(0, len(members), _CHUNK):
            chunk = members[start:start + _CHUNK]
            packed = pack([pieces[i] for i in chunk], layout)
            for first in range(0, len(packed), devices):
                group = packed[first:first + devices]
                outputs = _forward(network, params, [p.micro_batch for p in group], layout,
                                   mesh)
                for slots, indices in zip(outputs, (p.indices for p in group), strict=False):
                    for slot, index in enumerate(indices):
                        owner, k = owners[chunk[index]]
                        count = len(pieces[chunk[index]].responses)
                        results[owner][k:k + count] = slots[slot, :count]
    return results


def _forward(
    network: RewardNetwork,
    params: Params,
    batches: list[MicroBatch],
    layout: Layout,
    mesh: Mesh | None,
) -> np.ndarray:
    """Quantiles [devices, C, K, N] of up to one micro-batch for each device."""
    devices = jax.device_count()
    if devices == 1 and mesh is None:
        return np.asarray(_apply(network, params, batches[0]))[None]
    batches = batches + [empty_micro_batch(layout)] * (devices - len(batches))
    own = [batches[i] for i in own_devices()]
    if mesh is None:
        return np.asarray(unreplicate(_apply_all(network, params, stack(own))))
    return np.asarray(_apply_split(network, mesh, params, put(own, mesh)))


def _quantiles(network: RewardNetwork, params: Params, batch: MicroBatch) -> jax.Array:
    return network(params, batch).quantiles


_apply = jax.jit(_quantiles, static_argnums=0)


@functools.partial(jax.pmap, axis_name='devices', static_broadcasted_argnums=0)
def _apply_all(network: RewardNetwork, params: Params, batch: MicroBatch) -> jax.Array:
    return jax.lax.all_gather(_quantiles(network, params, batch), 'devices')


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_split(
    network: RewardNetwork, mesh: Mesh, params: Params, batch: MicroBatch
) -> jax.Array:
    def own(params, batch):
        return jax.lax.all_gather(_quantiles(network, params, batch), sharding.AXIS)

    return sharding.on_shards(own, mesh, P())(params, batch)
