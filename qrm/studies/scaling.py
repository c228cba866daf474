"""What `costs` predicts of training on many accelerators: the tables of docs/scaling.md.

These are formulas, on the assumptions that docs/scaling.md states.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from qrm.data import packing
from qrm.data.encoded import Lengths
from qrm.models import families
from qrm.models.architecture import Architecture
from qrm.models.network import RewardNetwork
from qrm.rewards.heads import HeadConfig
from qrm.studies import costs, speed
from qrm.training import workdir


def decoder(blocks: int, width: int, heads: int) -> Architecture:
    """A decoder of GPT-2's kind, with its vocabulary and positions."""
    return families.architecture(families.random_settings('gpt2', {
        'vocab_size': 50257, 'max_positions': 1024, 'hidden_size': width, 'num_layers': blocks,
        'num_heads': heads}))


DECODERS = {'0.1B': decoder(12, 768, 12), '1B': decoder(18, 2048, 16), '8B': decoder(40, 4096, 32),
            '70B': decoder(86, 8192, 64)}
DEVICES = (1, 8, 64, 512)
ON_EACH, TOGETHER = 64, 512  # comparisons of a step: each device brings its own, or all share them
ROWS, LENGTH = (1, 2, 4, 8, 16), 1024  # of a micro-batch, for each device that computes it
EFFICIENCY = 0.5  # assumed share of the peak
# The most memory of a step compiled for accelerators under fsdp, of the formula's; docs/scaling.md
# has those that were compiled.
HELD = 1.28
TENSOR, WIDE = (2, 4, 8), 4096  # devices of tensor groups, which are asked of models so wide
_HEADING = ('model', 'devices', 'layout', 'state, GB', 'in a step, GB', 'rows', 'products, ms',
            'sums, ms', 'update, ms', 'exchange, ms', 'reduction, ms', 'step, ms',
            'comparisons/s', 'of linear')


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to take a step, and what it costs.

    Attributes:
      comparisons: of the step, over all devices.
      sharded: whether the state is split over the devices.
      tensor: devices of a tensor group.
      rows: of a micro-batch.
      remat: whether blocks are recomputed.
      memory, seconds: see `costs`.
    """

    comparisons: int
    sharded: bool
    tensor: int
    rows: int
    remat: bool
    memory: costs.Memory
    seconds: costs.Seconds

    @property
    def needed(self) -> float:
        """Bytes that a device must have."""
        return sum(self.memory) * (HELD if self.sharded else 1.0)

    @property
    def rate(self) -> float:
        """Comparisons a second if nothing overlaps."""
        return self.comparisons / self.seconds.longest


def network(architecture: Architecture, remat: bool) -> RewardNetwork:
    return RewardNetwork(architecture, HeadConfig('quantile'), 'bfloat16', 'dense', remat)


@functools.cache
def pack(comparisons: int, shares: int, rows: int) -> costs.Stacks:
    """Comparisons of HH's lengths dealt in shares: the stacks of the fullest of them."""
    items = speed.synthetic(1500, vocab_size=50257, max_length=512, seed=0)
    layouts = packing.plan_layouts(items, row_length=LENGTH, rows=rows)
    parts = [packing.pack([items[i] for i in part], layouts)
             for part in packing.share(Lengths.of(items[:comparisons]).sizes, shares)]
    return [(layout, max(sum(one.layout == number for one in part) for part in parts))
            for number, layout in enumerate(layouts)]


def options(
    architecture: Architecture, machine: costs.Machine, devices: int, sharded: bool,
    together: bool, tensor: int = 1,
) -> list[Setting]:
    """All ways to take a step with one layout of the state; tensor groups have rows together."""
    found = []
    for rows in (tensor * rows for rows in ROWS):
        # Where devices bring their own, eight of them tell how full the fullest is.
        packed = (pack(TOGETHER, devices // tensor, rows) if together
                  else pack(8 * ON_EACH, 8 // tensor, rows))
        largest = next(layout for layout, filled in packed if filled)
        for remat in (False, True):
            net = network(architecture, remat)
            found.append(Setting(
                TOGETHER if together else ON_EACH * devices, sharded, tensor, rows, remat,
                costs.step_memory(net, largest, shards=devices if sharded else 1, tensor=tensor),
                costs.step_seconds(net, packed, machine, devices=devices, sharded=sharded,
                                   efficiency=EFFICIENCY, tensor=tensor)))
    return found


def fastest(found: Iterable[Setting], memory: float) -> Setting | None:
    """Of those that fit, if any."""
    return max((one for one in found if one.needed <= memory),
               key=lambda one: one.rate, default=None)


def table_of(machine: costs.Machine, *, together: bool, both: bool) -> str:
    """A table of the fastest setting of each model and number of devices.

    Args:
      machine: kind of device.
      together: whether devices share a batch; else each brings its own comparisons.
      both: a row for each layout of the state, the faster one in bold; else for the faster alone.
    """
    rows = []
    for name, architecture in DECODERS.items():
        alone = fastest(options(architecture, machine, 1, False, together), float('inf'))
        for devices in DEVICES:
            found = {layout: [one for tensor in groups for one in options(
                architecture, machine, devices, sharded, together, tensor)]
                for layout, sharded, groups in layouts(architecture, devices)}
            best = {layout: fastest(some, machine.memory) for layout, some in found.items()}
            # If none fits, the one that comes closest.
            first = max(best, key=lambda layout: best[layout].rate if best[layout]
                        else -min(one.needed for one in found[layout]))
            for layout, one in best.items():
                if both or layout == first:
                    mark = '**' if devices > 1 and both and one and layout == first else ''
                    group = f' of {one.tensor}' if one and one.tensor > 1 else ''
                    rows.append([name, f'{devices}', f'{mark}{layout}{group}{mark}',
                                 *cells(one, found[layout], devices * alone.rate)])
    return table(_HEADING, rows)


def groups(machine: costs.Machine) -> str:
    """A table of tensor groups of wide models whose devices share a batch; the fastest in bold."""
    rows = []
    for name, architecture in DECODERS.items():
        if architecture.hidden_size < WIDE:
            continue
        alone = fastest(options(architecture, machine, 1, False, True), float('inf'))
        for devices in DEVICES[1:]:
            found = {tensor: options(architecture, machine, devices, True, True, tensor)
                     for tensor in (1, *TENSOR)}
            best = {tensor: fastest(some, machine.memory) for tensor, some in found.items()}
            rates = {tensor: one.rate for tensor, one in best.items() if one}
            for tensor, one in best.items():
                mark = '**' if rates and rates.get(tensor) == max(rates.values()) else ''
                layout = f'groups of {tensor}' if tensor > 1 else 'fsdp'
                rows.append([name, f'{devices}', f'{mark}{layout}{mark}',
                             *cells(one, found[tensor], devices * alone.rate)])
    return table(_HEADING, rows)


def layouts(
    architecture: Architecture, devices: int
) -> list[tuple[str, bool, tuple[int, ...]]]:
    """Names of layouts of the state; whether it is split; and sizes of tensor groups."""
    if devices == 1:
        return [('one', False, (1,))]
    found = [('pmap', False, (1,)), ('fsdp', True, (1,))]
    return found + [('groups', True, TENSOR)] * (architecture.hidden_size >= WIDE)


def cells(one: Setting | None, found: Sequence[Setting], linear: float) -> list[str]:
    """What a table says of a setting, or of the smallest of those that do not fit."""
    shown = one or min(found, key=lambda other: other.needed)
    memory = [f'{shown.memory.state / 1e9:.3g}', f'{sum(shown.memory) / 1e9:.3g}']
    if one is None:
        return [*memory, 'does not fit', *['-'] * 8]
    seconds, best = one.seconds, one.comparisons / one.seconds.shortest
    return [*memory, f'{one.rows}{" (remat)" if one.remat else ""}',
            *(f'{1e3 * part:,.1f}' for part in seconds),
            span(1e3 * seconds.shortest, 1e3 * seconds.longest, ',.1f'),
            span(one.rate, best, ',.0f'),
            span(100 * one.rate / linear, 100 * best / linear, '.0f') + '%']


def largest(machine: costs.Machine) -> str:
    """A table of the deepest decoder of width 4096 that fits, with one row and recomputation."""
    rows = []
    for devices, sharded in ((1, False), (8, True), (64, True)):

        def formula(blocks: int, devices: int = devices, sharded: bool = sharded) -> int:
            layout = pack(8 * ON_EACH, 8, 1)[0][0]
            return sum(costs.step_memory(network(decoder(blocks, 4096, 32), True), layout,
                                         shards=devices if sharded else 1))

        held = HELD if sharded else 1.0
        blocks = bisect.bisect_right(range(2, 100_000), machine.memory / held, key=formula) + 1
        count = sum(costs.parameters(network(decoder(blocks, 4096, 32), True)))
        rows.append(['fsdp' if sharded else 'one, pmap', f'{devices}' if sharded else 'any',
                     f'{blocks}', f'{count / 1e9:.1f}', f'{formula(blocks) / 1e9:.1f}',
                     f'{held * formula(blocks) / 1e9:.1f}'])
    return table(['layout', 'devices', 'blocks', 'parameters, 10^9', 'in a step, GB',
                  'with what is held longer, GB'], rows)


def hidden(machine: costs.Machine) -> str:
    """A table of the tokens from which on the products of a micro-batch hide its exchange."""
    rows = []
    for name, architecture in DECODERS.items():
        for devices in DEVICES[1:]:
            needed = []
            for remat in (False, True):
                net = network(architecture, remat)
                one, many = (costs.step_seconds(
                    net, [(packing.Layout(LENGTH, count, 8 * count, 2), 1)], machine,
                    devices=devices, sharded=True, efficiency=EFFICIENCY)
                    for count in (1, 2))
                # Both grow by a constant for each row: the exchange by that of the embeddings.
                gain = (many.products - one.products) - (many.exchange - one.exchange)
                rest = one.exchange - one.products + gain
                needed.append(f'{LENGTH * rest / gain:,.0f}')
            rows.append([name, f'{devices}', *needed])
    return table(['model', 'devices', 'tokens', 'tokens (remat)'], rows)


def span(low: float, high: float, form: str) -> str:
    """Both bounds, or one number where they look alike."""
    texts = [format(low, form), format(high, form)]
    return texts[0] if texts[0] == texts[1] else ' to '.join(texts)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [heading, ['---'] * len(heading), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def tables() -> dict[str, str]:
    """Titles and tables, in the order in which docs/scaling.md has them."""
    return {
        f'H200, {ON_EACH} comparisons a device': table_of(costs.H200, together=False, both=True),
        f'H200, {TOGETHER} comparisons in all': table_of(costs.H200, together=True, both=False),
        f'H200, {TOGETHER} comparisons in all, in tensor groups': groups(costs.H200),
        f'TPU v5p, {ON_EACH} comparisons a device': table_of(
            costs.TPU_V5P, together=False, both=False),
        'H200, the largest model': largest(costs.H200),
        'H200, tokens of a micro-batch that hide its exchange': hidden(costs.H200),
    }


def predicted(config: ConfigDict, flops: float) -> float:
    """Comparisons a second of the timed steps of a measurement, if products were all there is.

    Args:
      config: of the measurement.
      flops: floating-point operations a second of its matrix product.
    """
    workload, settings = speed.prepare(config), config.speed
    layouts = packing.plan_layouts(workload.encoded, row_length=config.train.row_length,
                                   rows=config.train.rows)
    items, work = 0, 0
    for number in range(1, 1 + settings.repeats * settings.steps):
        part = speed.training_items(config, workload.encoded, number)
        items += len(part)
        for one in packing.pack(part, layouts):
            contexts = workload.network.contexts(one.micro_batch)
            pairs = [context.plan.pairs for context in contexts]
            work += sum(costs.micro_batch_work(
                workload.network, layouts[one.layout],
                pairs=None if pairs[0] is None else [int(count) for count in pairs]))
    return items * flops / work


def compare(path: str) -> str:
    """Measured and predicted comparisons a second of a measurement."""
    result = workdir.read_json(path)
    try:
        rate = result['matmul']['flops_per_second']['median']
        measured = result['training']['comparisons_per_second']['median']
        config = ConfigDict(result['config'])
    except (KeyError, TypeError) as error:
        raise workdir.WorkdirError(f'--measured={path}: no {error}; expected the speed.json of '
                                   '`qrm speed`') from error
    bound = predicted(config, rate)
    return (f'{measured:.3g} comparisons/s measured, {bound:.3g} if products at {rate / 1e9:.3g} '
            f'GFLOP/s were all there is: {measured / bound:.2f} of it')
