"""What a network makes of many comparisons: packed rows through it, on all devices."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qrm.data.comparisons import DataError
from qrm.data.encoded import Encoded, Lengths, Ranges
from qrm.data.packing import (
    Layout,
    MicroBatch,
    Packed,
    empty_micro_batch,
    fit_row_length,
    pack,
    plan_layouts,
    round_length,
    runs,
)
from qrm.models import sharding
from qrm.models.network import Network, Params, RewardNetwork
from qrm.training.devices import Spread, own_devices
from qrm.training.interruptions import check, watched

_AHEAD = 1  # micro-batches that run while the host prepares the next
_CHUNK = 4096  # comparisons packed together; bounds memory and the time spent on packing
_FEW = 64  # of them for each row, where what is done is to be kept soon


def check_look_ups(network: Network, encoded: Sequence[Encoded]) -> None:
    """Checks everything that a network looks up by a number that comes from data.

    An index beyond a table would read the last row of it, and nothing would be said.

    Raises:
      DataError: names the first comparison with a token, a position or an annotator that the
        network does not have.
    """
    if not encoded:
        return
    a, known = network.architecture, len(network.annotators)
    longest = Lengths.of(encoded).longest
    low, high, annotator = Ranges.of(encoded)
    no_token, too_long = (low < 0) | (high >= a.vocab_size), longest > a.max_positions
    wrong = no_token | too_long | (annotator < -1) | (annotator >= known)
    if not wrong.any():
        return
    i = int(wrong.argmax())
    if no_token[i]:
        problem = (f'token {low[i] if low[i] < 0 else high[i]}, but the embedding has '
                   f'{a.vocab_size} rows')
    elif too_long[i]:
        problem = (f'a dialogue of {longest[i]} tokens, but the model has {a.max_positions} '
                   'positions')
    else:
        problem = f'annotator {annotator[i]}, but the head knows {known}'
    raise DataError(f'{encoded[i].id}: {problem}')


def predict(
    network: RewardNetwork,
    params: Params,
    encoded: Sequence[Encoded],
    *,
    row_length: int,
    rows: int,
    mesh: Mesh | None = None,
    layouts: Sequence[Layout] = (),
) -> list[np.ndarray]:
    """What the head gives for every response, whatever shares its rows.

    With several processes all of them call it, with the same comparisons, and get all outputs.

    Args:
      network, params: the reward model.
      encoded: comparisons with any number of responses.
      row_length, rows: shape of a micro-batch, see `packing.plan_layouts`.
      mesh: the mesh over which params are split, see `sharding`; None: they are not.
      layouts: shapes that hold each of the comparisons, in place of those that are planned for
        them, so that any number of calls need no new compilation.

    Returns:
      One [K, outputs] float32 array for each comparison, in order; see `HeadConfig.read`.
    """
    return list(itertools.chain.from_iterable(run(
        _outputs, network.head.outputs, network, params, encoded, row_length, rows, mesh, _CHUNK,
        layouts)))


def features(
    network: RewardNetwork,
    params: Params,
    encoded: Sequence[Encoded],
    *,
    row_length: int,
    rows: int,
    mesh: Mesh | None = None,
) -> Iterator[list[np.ndarray]]:
    """What the head reads of every response; arguments as of `predict`.

    Yields:
      A chunk of comparisons after the other, as soon as it is computed: one [K, W] float32 array
      for each comparison, in order, see `RewardNetwork.features`.
    """
    yield from run(_features, network.width, network, params, encoded, row_length, rows, mesh,
                    _FEW * rows * jax.device_count())


def run(
    function: Callable[[Any, Params, Any], jax.Array],
    width: int,
    network: Network,
    params: Params,
    encoded: Sequence[Encoded],
    row_length: int,
    rows: int,
    mesh: Mesh | None,
    chunk: int = _CHUNK,
    layouts: Sequence[Layout] = (),
    make: Callable[[MicroBatch], Any] = lambda batch: batch,
) -> Iterator[list[np.ndarray]]:
    """Values of the responses of many comparisons; with several processes all of them call it.

    Args:
      function: (network, params, batch) -> [C, K, width] of a micro-batch; the same object in every
        call, as what is compiled is known by it.
      width: of the values.
      network, params, encoded, row_length, rows, mesh, layouts: as of `predict`.
      chunk: comparisons packed together.
      make: what the function takes of packed rows.

    Yields:
      A chunk of comparisons after the other: one [K, width] float32 array for each, in order.
    """
    if not encoded:
        return
    length, layouts = (None, layouts) if layouts else _planned(encoded, row_length, rows)
    devices, spread = jax.device_count(), Spread(mesh)
    params = spread.start(network.cut(params) if mesh is None else params)

    def values_of(items: Sequence[Encoded]) -> list[np.ndarray]:
        results = [np.empty((len(item.responses), width), np.float32) for item in items]
        # Each piece, and where its values go.
        places = [(piece, result[k:k + len(piece.responses)])
                  for result, item in zip(results, items, strict=True)
                  for piece, k in ([(item, 0)] if length is None else _pieces(item, length))]
        packed = pack([piece for piece, _ in places], layouts)
        running: collections.deque[tuple[jax.Array, list[Packed]]] = collections.deque()

        def fetch() -> None:
            progressed()
            outputs, group = running.popleft()
            for slots, one in zip(np.asarray(outputs), group, strict=False):
                for slot, index in enumerate(one.indices):
                    place = places[index][1]
                    place[:] = slots[slot, :len(place)]

        for number, layout in enumerate(layouts):
            members = [item for item in packed if item.layout == number]
            for first in range(0, len(members), devices):
                group = members[first:first + devices]
                outputs = _forward(function, network, params,
                                   [make(p.micro_batch) for p in group],
                                   make(empty_micro_batch(layout)), spread)
                running.append((outputs, group))
                # The devices never wait for the host to take results away.
                if len(running) > _AHEAD:
                    fetch()
        while running:
            fetch()
        return results

    for start in range(0, len(encoded), chunk):
        check()
        with watched() as progressed:
            values = values_of(list(encoded[start:start + chunk]))
        yield values


def _planned(
    encoded: Sequence[Encoded], row_length: int, rows: int
) -> tuple[int, tuple[Layout, ...]]:
    """Tokens of a row, and the shapes that hold all pieces of such, see `_pieces`."""
    length, sizes = fit_row_length(encoded, row_length), Lengths.of(encoded).sizes
    total = round_length(int(sizes.sum()))
    if total < length:  # a few dialogues alone do not pay for a whole row
        length, rows = total, 1
    if sizes.max() > length:
        encoded = [piece for item in encoded for piece, _ in _pieces(item, length)]
    return length, plan_layouts(encoded, row_length=length,
                                rows=max(1, rows * row_length // length))


def _pieces(item: Encoded, length: int) -> list[tuple[Encoded, int]]:
    """A comparison in parts that each fit a row, and the first response of each."""
    return [(dataclasses.replace(
        item, responses=item.responses[part.start:part.stop],
        preference=item.preference[part.start:part.stop, part.start:part.stop],
        ratings=item.ratings[part.start:part.stop],
        prompt_sizes=item.prompt_sizes[part.start:part.stop]), part.start)
        for _, part in runs(item, length)]


def _forward(
    function: Callable[[Any, Params, Any], jax.Array],
    network: Network,
    params: Params,
    batches: list[Any],
    empty: Any,
    spread: Spread,
) -> jax.Array:
    """Values [devices, C, K, width] of up to one micro-batch for each device."""
    devices = jax.device_count()
    batches = batches + [empty] * (devices - len(batches))
    placed = spread.put([batches[i] for i in own_devices()])
    if spread.mesh is not None:
        return _apply_split(function, network, spread.mesh, params, placed)
    if devices == 1:
        return _apply(function, network, params, placed)[None]
    return spread.one(_apply_all(function, network, params, placed))


def _outputs(network: RewardNetwork, params: Params, batch: MicroBatch) -> jax.Array:
    return network(params, batch)


def _features(network: RewardNetwork, params: Params, batch: MicroBatch) -> jax.Array:
    return network.features(params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(function: Any, network: Network, params: Params, batch: Any) -> jax.Array:
    return function(network, params, batch)


@functools.partial(jax.pmap, axis_name='devices', static_broadcasted_argnums=(0, 1))
def _apply_all(
    function: Any, network: Network, params: Params, batch: Any
) -> jax.Array:
    return jax.lax.all_gather(function(network, params, batch), 'devices')


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apply_split(
    function: Any, network: Network, mesh: Mesh, params: Params, batch: Any
) -> jax.Array:
    def own(params, batch):
        return jax.lax.all_gather(function(network, params, batch), sharding.AXIS)

    return sharding.on_shards(own, mesh, P())(params, batch)
