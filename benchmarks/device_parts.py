"""The parts of `device`, each run in a process of its own.

    python -m benchmarks.device_parts --part=PART --shape=NAME --seconds=S --rows=FILE --carried=DIR

A part appends each row to the file as soon as it has it, and starts nothing that would not end in
time by what the one before took. Axes as in `attention` and `packing`.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import device
from benchmarks.device import Row, Shape
from qrm.commands import configs
from qrm.data import packing, tokens
from qrm.data.encoded import Encoded
from qrm.data.packing import MicroBatch
from qrm.models import attention, families
from qrm.models.network import Params, RewardNetwork
from qrm.rewards.heads import HeadConfig
from qrm.studies import speed
from qrm.training import config as config_lib
from qrm.training import workdir


class Heads(NamedTuple):
    """The attention of some families.

    Attributes:
      families: their names.
      heads, kv_heads, size: H, G and E of a published model, or fewer heads in proportion.
      window: whether some blocks have one.
      cap, scale, causal: see `attention`.
    """

    families: tuple[str, ...]
    heads: int
    kv_heads: int
    size: int
    window: bool = False
    cap: float = 0.0
    scale: float | None = None
    causal: bool = True


HEADS = (
    Heads(('gpt2',), 2, 2, 64),  # of 12, as in BERT and ModernBERT
    Heads(('llama',), 9, 3, 64),  # SmolLM2 135M
    Heads(('llama', 'mistral', 'qwen2', 'olmo2'), 8, 2, 128),  # of Llama 3 8B: 32 and 8
    Heads(('qwen3',), 4, 2, 128),  # of 1.7B: 16 and 8
    Heads(('gemma2',), 8, 4, 256, window=True, cap=50.0, scale=256**-0.5),  # 2B
    Heads(('gemma3_text',), 4, 1, 256, window=True, scale=256**-0.5),  # 1B
    Heads(('bert',), 2, 2, 64, causal=False),
    Heads(('modernbert',), 2, 2, 64, window=True, causal=False),
)
# Of the networks that are checked, one of each family.
_SIZES = {'vocab_size': 512, 'hidden_size': 64, 'num_layers': 4, 'num_heads': 4, 'num_kv_heads': 2,
          'head_dim': 16, 'intermediate_size': 128}
# Settings by which every second block of these has a window; of Gemma 2's, it has.
_EVERY_SECOND = {'gemma3_text': 'sliding_window_pattern',
                 'modernbert': 'global_attn_every_n_layers'}

# ||x - reference|| / ||reference|| at most. In bfloat16 numbers have 8 bits, and errors of a few
# roundings meet; in a network, those of its blocks.
TOLERANCES = {'float32': 1e-5, 'bfloat16': 2e-2}
NETWORK_TOLERANCE = 1e-4

_ROWS = 4  # of the checks
_FILL = 0.85  # of those rows, so that a part is padding
_WINDOW = 8  # a window is this part of the longest dialogue, as few reach what is published
_LEAST_SHARE = 1e-3  # of the gradient's norm; a leaf with less, perhaps 0, is compared with that
_LONGER, _LONG = 16, 8  # long dialogues, in those of a shape; and how many a step
_BEST_OF = 64
_LAYERS, _TRIES = 8, 10  # of attention that is timed
_MARGIN = 1.3  # the next setting may take longer than the last one
_NO_PAIRS = 'not measured: no pairs (device.sh prepare --tokenizer --pairs)'
# TRL takes long for a step, and its share of the time is short.
_TRL = {'speed.repeats': 2, 'speed.steps': 2, 'speed.scored': 512}

Emit = Callable[[Row], None]
# What a row says of itself, and how to find out the rest.
Check = tuple[Row, Callable[[], Row]]


def main(argv: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description='Measures one part; see benchmarks/device.py.')
    parser.add_argument('--part', required=True, choices=[
        *(part for part in device.PARTS if part != 'second'),
        *(f'sweep-{name}' for name in device.SHAPES)])
    parser.add_argument('--shape', choices=device.SHAPES, required=True)
    parser.add_argument('--seconds', type=float, required=True)
    parser.add_argument('--rows', required=True)
    parser.add_argument('--carried', required=True)
    args = parser.parse_args(argv)
    shape, deadline = device.SHAPES[args.shape], began + args.seconds
    emit, swept = functools.partial(append, args.rows, args.part), args.part.removeprefix('sweep-')
    # What another shape trained fastest with says nothing of this one.
    rows = [row for row in device.read_rows(Path(args.rows))
            if row.get('part') != f'sweep-{shape.second}']
    if args.part == 'correctness':
        correctness(shape, emit, deadline)
    elif args.part == 'attention':
        attention_times(shape, emit, deadline)
    elif args.part == 'trl':
        trl(shape, emit, Path(args.carried), rows, deadline)
    elif args.part == 'lengths':
        lengths(shape, best(rows, shape)['attention'], emit, deadline)
    elif swept in device.SHAPES:
        second = device.SHAPES[swept]
        sweep(second, best(rows, second)['attention'], emit, deadline)
    else:
        sweep(shape, swept, emit, deadline)


def append(path: str, part: str, row: Row) -> None:
    """Appends a row, on the disk when this returns."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps({'part': part} | row) + '\n')
        file.flush()
        os.fsync(file.fileno())


# Correctness.


def correctness(shape: Shape, emit: Emit, deadline: float) -> None:
    """Compares every implementation with the dense one, alone and in a network, for each family.

    Most of this is compilation, which is done on all cores: rows come as they are ready.
    """
    batches = {causal: mixed_batch(shape, share_prompt=causal) for causal in (True, False)}
    window, took = shape.max_length // _WINDOW, []
    groups = [attention_checks(heads, batches[heads.causal], window) for heads in HEADS]
    groups += [network_checks(family, batches, shape.max_length) for family in families.FAMILIES]
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(run_checks, group, emit, deadline, took) for group in groups]:
            done.result()


def run_checks(checks: Iterable[Check], emit: Emit, deadline: float, took: list[float]) -> None:
    """Runs checks one after the other while time is left.

    Args:
      checks: what to find out.
      emit: see above.
      deadline: when all is to have ended, by `time.monotonic`.
      took: seconds of the checks that have ended, also of those that run beside these.
    """
    for row, check in checks:
        begin = time.monotonic()
        problem = late(deadline, max(took, default=0.0))
        if problem:
            emit(row | {'result': problem})
            continue
        print(row['setting'], flush=True)  # what a part that is stopped was at
        try:
            emit(row | check())
        except Exception as error:  # What cannot be compiled says nothing about the others.
            emit(row | failed(error))
        took.append(time.monotonic() - begin)


def mixed_batch(shape: Shape, *, share_prompt: bool) -> MicroBatch:
    """Rows of synthetic comparisons and padding, see `mixed_comparisons`."""
    items = mixed_comparisons(shape, share_prompt=share_prompt)
    layouts = packing.plan_layouts(items, row_length=shape.row_length, rows=_ROWS)
    return packing.pack(items, layouts)[0].micro_batch


def mixed_comparisons(shape: Shape, *, share_prompt: bool) -> list[Encoded]:
    """Comparisons as of `ragged`, for most of `_ROWS` rows.

    Args:
      shape: sizes of dialogues and rows.
      share_prompt: see `tokens.split_prompt`.
    """
    room = _FILL * _ROWS * shape.row_length
    found: list[Encoded] = []
    for item in ragged(shape, _ROWS * shape.row_length, share_prompt=share_prompt):
        room -= item.size
        if room < 0:
            break
        found.append(item)
    return found


def ragged(shape: Shape, count: int, *, share_prompt: bool) -> Iterator[Encoded]:
    """Comparisons of random tokens with two, three and four responses in turn, of HH's lengths.

    Args:
      shape: sizes of dialogues and rows; those that fit neither are left out.
      count: at most.
      share_prompt: see `tokens.split_prompt`.
    """
    pairs = speed.synthetic(2 * count, max_length=shape.max_length,
                            vocab_size=_SIZES['vocab_size'], seed=0)
    found = 0
    for item, other in zip(pairs[::2], pairs[1::2], strict=True):
        prompt, responses = item.prompt, (item.responses + other.responses)[:2 + found % 3]
        if not share_prompt:
            prompt, responses = tokens.split_prompt(
                [np.concatenate([prompt, response]) for response in responses], share=False)
        joined = compared(item, prompt, responses)
        if joined.longest <= shape.max_length and joined.size <= shape.row_length:
            found += 1
            yield joined


def compared(item: Encoded, prompt: np.ndarray, responses: Sequence[np.ndarray]) -> Encoded:
    """A comparison of these responses, of which an earlier one is preferred to a later one."""
    k = len(responses)
    return dataclasses.replace(
        item, prompt=prompt, responses=tuple(responses),
        ratings=np.full((k, 1), np.nan, np.float32),
        preference=np.triu(np.ones((k, k), np.float32), 1))


def attention_checks(heads: Heads, batch: MicroBatch, window: int) -> Iterator[Check]:
    """Checks of attention alone; arguments as of `make_attend`."""
    attend = make_attend(heads, batch, window)
    exact = functools.cache(lambda dtype: attend('dense', dtype, 'float32'))
    what = f'{", ".join(heads.families)} ({heads.heads}/{heads.kv_heads} heads of {heads.size})'
    for implementation in device.ATTENTION:
        for dtype in TOLERANCES:
            if (implementation, dtype) != ('dense', 'float32'):
                yield ({'setting': f'{implementation}, {dtype}, {what}',
                        'attention': implementation, 'families': heads.families},
                       functools.partial(check_attention, attend, exact, implementation, dtype))


def make_attend(
    heads: Heads, batch: MicroBatch, window: int
) -> Callable[..., dict[str, np.ndarray]]:
    """Builds a function (implementation, dtype, compute dtype) -> attention over these rows.

    It returns the values and the gradients of queries, keys and values, [tokens, heads, E] each, at
    tokens that are not padding, computed from random inputs that are rounded to the dtype.

    Args:
      heads: of the attention.
      batch: the rows.
      window: where `heads` has one.
    """
    rng = np.random.default_rng(0)
    real = batch.segments > 0
    q, k, v, outgoing = (rng.normal(size=(*real.shape, count, heads.size)) for count in (
        heads.heads, heads.kv_heads, heads.kv_heads, heads.heads))
    # Weights are far from equal, and padding, whose outputs have no meaning, sends nothing back.
    inputs = 2 * q, 2 * k, v, outgoing * real[..., None, None]

    @functools.partial(compiled, static_argnums=0)
    def run(name, segments, responses, positions, q, k, v, outgoing):
        plan = attention.plan(segments, responses, positions, name,
                              window=window if heads.window else 0, causal=heads.causal)
        out, pull = jax.vjp(lambda q, k, v: attention.attend(
            q, k, v, plan, scale=heads.scale, cap=heads.cap), q, k, v)
        return out, *pull(outgoing)

    def attend(name: str, dtype: str, compute: str) -> dict[str, np.ndarray]:
        rounded = [x.astype(jnp.dtype(dtype)).astype(jnp.dtype(compute)) for x in inputs]
        results = run(name, batch.segments, batch.responses, batch.positions, *rounded)
        return {part: np.asarray(x, np.float64)[real]
                for part, x in zip(('out', 'dq', 'dk', 'dv'), results, strict=True)}

    return attend


def check_attention(
    attend: Callable[..., dict[str, np.ndarray]], exact: Callable[[str], dict[str, np.ndarray]],
    implementation: str, dtype: str
) -> dict[str, Any]:
    """Compares attention with the dense one in float32.

    Args:
      attend: from `make_attend`.
      exact: what the dense one gives for inputs of a dtype.
      implementation: one of `attention.IMPLEMENTATIONS`.
      dtype: of the inputs and of the computation.
    """
    found, expected = attend(implementation, dtype, dtype), exact(dtype)
    return verdict({part: relative_error(x, expected[part]) for part, x in found.items()},
                   TOLERANCES[dtype])


def network_checks(
    family: str, batches: Mapping[bool, MicroBatch], max_length: int
) -> Iterator[Check]:
    """Checks of a small network of a family; `batches` are for decoders and for encoders."""
    network = small_network(family, max_length)
    params, batch = random_params(network), batches[network.architecture.causal]
    in_network = functools.cache(lambda name: rewards_and_gradient(
        dataclasses.replace(network, attention=name), params, batch))
    for implementation in device.ATTENTION:
        if implementation != 'dense':
            yield ({'setting': f'{implementation}, float32, network of {family}',
                    'attention': implementation, 'families': (family,)},
                   functools.partial(check_network, in_network, implementation))


def small_network(family: str, max_length: int) -> RewardNetwork:
    """A network that has windows, if its family does, and blocks without, but Mistral's.

    It reads all tokens, or the last block would not use the attention that is checked.
    """
    sizes = {field: size for field, size in (_SIZES | {'max_positions': max_length}).items()
             if field in families.FAMILIES[family].sizes}
    settings, window = families.random_settings(family, sizes), max_length // _WINDOW
    if family in ('mistral', 'gemma2', 'gemma3_text'):
        settings['sliding_window'] = window
    elif family == 'modernbert':
        settings['local_attention'] = 2 * window
    if family in _EVERY_SECOND:
        settings[_EVERY_SECOND[family]] = 2
    return RewardNetwork(families.architecture(settings), HeadConfig('scalar', reads=('mean',)))


def random_params(network: RewardNetwork) -> Params:
    """Parameters with which attention weights are far from equal; scales of norms are about 1."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.normal(float(path[-1].key == 'scale'), 0.2, leaf.shape), leaf.dtype),
        jax.eval_shape(network.init, jax.random.key(0)))


def check_network(
    in_network: Callable[[str], tuple[np.ndarray, Params]], implementation: str
) -> dict[str, Any]:
    """Compares rewards and their gradient with those of dense attention."""
    (exact, exact_gradient), (rewards, gradient) = map(in_network, ('dense', implementation))
    whole = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64))
                        for x in jax.tree.leaves(exact_gradient)))
    leaves = jax.tree.map(functools.partial(relative_error, least=_LEAST_SHARE * whole),
                          gradient, exact_gradient)
    return verdict({
        'rewards': relative_error(rewards, exact),
        'gradient, worst leaf': np.max(jax.tree.leaves(leaves)),  # NaN if any is; not so Python's
    }, NETWORK_TOLERANCE)


def rewards_and_gradient(
    network: RewardNetwork, params: Params, batch: MicroBatch
) -> tuple[np.ndarray, Params]:
    """Rewards of the responses that there are, and the gradient of a weighted sum of them."""
    weights = np.random.default_rng(0).normal(size=batch.present.shape)

    @compiled
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, batch, weights):
        rewards = network.head.read(network(params, batch)).distribution.mean
        rewards = jnp.where(batch.present, rewards, 0.0)
        return jnp.sum(weights * rewards), rewards

    (_, rewards), gradient = run(params, batch, weights)
    return np.asarray(rewards)[batch.present], jax.tree.map(np.asarray, gradient)


def compiled(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """`jax.jit`; on a CPU, where few programs run for long, without optimisation."""
    quickly = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else {}
    return jax.jit(function, compiler_options=quickly, **kwargs)


def relative_error(x: np.ndarray, reference: np.ndarray, least: float = 0.0) -> float:
    """||x - reference|| / ||reference||, or over `least` if that is more; NaN if x has any."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / max(np.linalg.norm(reference), least))


def verdict(errors: Mapping[str, float], tolerance: float) -> dict[str, Any]:
    """What a row says of errors."""
    # Not the other way round: a comparison with NaN is false.
    right = all(error <= tolerance for error in errors.values())
    shown = ', '.join(f'{name} {error:.1e}' for name, error in errors.items())
    return {'result': f'{"ok" if right else "wrong"}, at most {tolerance:.0e}: {shown}',
            'errors': {name: float(error) for name, error in errors.items()},
            'tolerance': tolerance}


# Speed.


def sweep(shape: Shape, implementation: str, emit: Emit, deadline: float) -> None:
    """Measures training and scoring in all settings of a shape, while time is left."""
    took, problem = 0.0, ''
    for rows, batch_size in shape.settings:
        row = {'setting': setting(implementation, rows, batch_size), 'attention': implementation,
               'rows': rows, 'batch_size': batch_size}
        begin = time.monotonic()
        problem = problem or late(deadline, took)
        if problem:
            emit(row | {'result': problem})
            continue
        print(row['setting'], flush=True)
        config = make_config(shape, **{'model.attention': implementation, 'train.rows': rows,
                                       'train.batch_size': batch_size})
        try:
            result = speed.measure(config, speed.prepare(config))
        except Exception as error:  # Such as memory that is full: settings before it have counted.
            emit(row | failed(error))
            problem = 'not measured: a smaller setting failed'
            continue
        for phase, rates in table_rows(result).items():
            emit(row | {'phase': phase, 'result': 'measured'} | rates)
        took = time.monotonic() - begin


def setting(implementation: str, rows: int, batch_size: int) -> str:
    """Attention, rows of a micro-batch and comparisons a step, in words."""
    return f'{implementation}, rows {rows}, steps of {batch_size}'


def table_rows(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of `speed.measure` that the table shows, of training, scoring and the loader."""
    found = {
        phase: {
            'comparisons_per_second': result[phase]['comparisons_per_second']['median'],
            'tokens_per_second': result[phase]['tokens_per_second']['median'],
            'teraflops': result[phase]['useful_flops_per_second']['median'] / 1e12,
            'fraction_of_matmul_rate': result[phase]['fraction_of_matmul_rate'],
            'model_flops_utilization': result[phase]['model_flops_utilization'],
        } for phase in ('training', 'scoring')}
    found['training'] |= {
        # Of the process so far: settings are in the order of memory.
        'peak_gib': result['memory']['whole_run'] / 2**30,
        'compile_seconds': result['startup']['compile_seconds'], 'measured': result}
    loader = result['loader']
    found['loader'] = {
        'comparisons_per_second': loader['comparisons_per_second']['median'],
        # The host prepares a step while the device takes the one before.
        'result': f'{100 / loader["times_training"]:.2g}% of the time of a step: '
                  f'{"never waited for" if loader["times_training"] > 1 else "waited for"}'}
    return found


def lengths(shape: Shape, implementation: str, emit: Emit, deadline: float) -> None:
    """Measures comparisons of several responses, best of many, and long prompts."""
    few = {'speed.repeats': 2, 'speed.steps': 2, 'model.attention': implementation}
    rows, batch_size = shape.settings[0]
    long = shape._replace(
        max_length=_LONGER * shape.max_length, row_length=_LONGER * shape.max_length,
        sizes=dict(shape.sizes) | {'max_positions': max(
            shape.sizes['max_positions'], _LONGER * shape.max_length)})
    cases = (
        ('two to four responses', shape, few | {
            'train.rows': rows, 'train.batch_size': batch_size, 'speed.responses': _BEST_OF,
            'speed.prompt': shape.max_length * 25 // 32,
            'speed.response': shape.max_length * 6 // 32},
         lambda: list(ragged(shape, 2 * batch_size, share_prompt=True))),
        (f'dialogues of {long.max_length}', long, few | {
            'train.rows': 1, 'train.batch_size': _LONG, 'speed.scored': _LONG},
         lambda: long_pairs(long, 4 * _LONG)),
    )
    took = 0.0
    for words, of, changes, make in cases:
        row = {'setting': f'{implementation}, {words}', 'attention': implementation}
        begin = time.monotonic()
        if problem := late(deadline, took):
            emit(row | {'result': problem})
            continue
        print(row['setting'], flush=True)
        config = make_config(of, **changes)
        try:
            result = speed.measure(config, speed.prepare(config)._replace(encoded=make()))
        except Exception as error:  # Such as memory that is full; the other may fit.
            emit(row | failed(error))
            continue
        for phase, rates in (table_rows(result) | best_of_row(result)).items():
            emit(row | {'phase': phase, 'result': 'measured'} | rates)
        took = time.monotonic() - begin


def long_pairs(shape: Shape, count: int) -> list[Encoded]:
    """Pairs that fill a dialogue each: a long prompt, and two short responses to it in a row."""
    rng, response = np.random.default_rng(0), shape.max_length // 32

    def ids(size: int) -> np.ndarray:
        return rng.integers(0, _SIZES['vocab_size'], size).astype(np.int32)

    return [compared(item, ids(shape.max_length - 2 * response), (ids(response), ids(response)))
            for item in speed.synthetic(count, max_length=1, vocab_size=2, seed=0)]


def best_of_row(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the table shows of the best of N, if it was measured."""
    if not (best_of := result['best_of_n']):
        return {}
    together = best_of['together_seconds']['median']
    return {f'best of {best_of["responses"]}': {
        'comparisons_per_second': 1 / together,
        'result': f'{best_of["ratio"]["median"]:.3g} times as fast as each alone'}}


# Attention beside the card's own.


def attention_times(shape: Shape, emit: Emit, deadline: float) -> None:
    """Times the kernel, and cuDNN's attention on the same visible pairs, forward and both ways.

    cuDNN's is given the mask of the packed rows, and rows of whole dialogues without padding or
    shared prompts that have as many visible pairs, which it need not compute others beside.
    """
    took, seconds = 0.0, {}
    for words, phase, run in timed_attention(shape):
        row = {'setting': words, 'phase': f'attention, {phase}'}
        begin = time.monotonic()
        if problem := late(deadline, took):
            emit(row | {'result': problem})
            continue
        print(f'{words}, {phase}', flush=True)
        try:
            seconds[words, phase] = found = run()
        except Exception as error:  # What it does not take says nothing about the others.
            emit(row | failed(error))
            continue
        took = time.monotonic() - begin
        own = seconds.get(('pallas', phase))
        beside = f'; the kernel takes {own / found:.3g} times as long' if (
            own and words != 'pallas') else ''
        emit(row | {'seconds': found, 'result': f'{1e3 * found:.3g} ms a layer{beside}'})


def timed_attention(shape: Shape) -> Iterator[tuple[str, str, Callable[[], float]]]:
    """Names and phases of attention, and what gives the seconds of a layer and the same pairs."""
    batch, layers = pairs_batch(shape), attention_layers(shape)
    mask = attention.attention_mask(batch.segments, batch.responses, batch.positions)
    pairs = int(np.sum(mask & (batch.segments > 0)[..., None]))
    whole = -(-pairs // (shape.max_length * (shape.max_length + 1) // 2))
    share = pairs / (whole * shape.max_length * (shape.max_length + 1) // 2)
    rows = batch.segments.shape
    for phase in ('forward', 'forward and backward'):
        for words, sizes, factor in (
                ('pallas', rows, 1.0), (f'{layers.library}, mask', rows, 1.0),
                (f'{layers.library}, whole dialogues', (whole, shape.max_length), share)):
            yield words, phase, functools.partial(
                lambda *args, factor: factor * timed_layers(*args), layers, batch, words, phase,
                sizes, factor=factor)


class Layers(NamedTuple):
    """Attention of a shape, and whose it is compared with.

    Attributes:
      heads, kv_heads, size: H, G and E.
      library: 'cudnn', or where there is none XLA's own, by `jax.nn.dot_product_attention`.
    """

    heads: int
    kv_heads: int
    size: int
    library: str


def attention_layers(shape: Shape) -> Layers:
    """`Layers` of a shape on the device there is."""
    a = config_lib.architecture(make_config(shape))
    return Layers(a.num_heads, a.num_kv_heads, a.head_dim,
                  'cudnn' if jax.default_backend() == 'gpu' else 'xla')


def pairs_batch(shape: Shape) -> MicroBatch:
    """Packed rows of pairs of HH's lengths, as many as the smallest setting of a shape has."""
    rows = shape.settings[0][0]
    items = speed.synthetic(16 * rows, max_length=shape.max_length,
                            vocab_size=_SIZES['vocab_size'], seed=0)
    layouts = packing.plan_layouts(items, row_length=shape.row_length, rows=rows)
    return packing.pack(items, layouts)[0].micro_batch


def layered(layers: Layers, batch: MicroBatch, words: str) -> Callable[..., jax.Array]:
    """A function of queries, keys and values: some layers, each of which reads the one before.

    What is planned of a micro-batch is planned once, as in a network.
    """
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if words == 'pallas':
            plan = attention.plan(batch.segments, batch.responses, batch.positions, 'pallas')
            once = functools.partial(attention.attend, plan=plan)
        elif words.endswith('mask'):
            mask = attention.attention_mask(batch.segments, batch.responses, batch.positions)
            once = functools.partial(jax.nn.dot_product_attention, mask=mask[:, None],
                                     implementation=layers.library)
        else:
            once = functools.partial(jax.nn.dot_product_attention, is_causal=True,
                                     implementation=layers.library)
        for _ in range(_LAYERS):
            q = once(q, k, v)
        return q

    return run


def timed_layers(layers: Layers, batch: MicroBatch, words: str, phase: str,
                 sizes: tuple[int, int]) -> float:
    """Seconds of a layer in bfloat16, the median of some tries."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(*sizes, count, layers.size)), jnp.bfloat16)
               for count in (layers.heads, layers.kv_heads, layers.kv_heads))
    run = layered(layers, batch, words)
    if phase != 'forward':
        run = jax.grad(lambda *args, run=run: jnp.sum(run(*args).astype(jnp.float32)), (0, 1, 2))
    run = jax.jit(run)
    jax.block_until_ready(run(q, k, v))  # compiles
    seconds = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        jax.block_until_ready(run(q, k, v))
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds)) / _LAYERS


# Beside TRL.


def trl(shape: Shape, emit: Emit, carried: Path, rows: Sequence[Row], deadline: float) -> None:
    """Measures qrm, in the setting that trained fastest, and TRL on the same real pairs."""
    tokenizer, pairs = carried / 'tokenizer', carried / 'pairs.jsonl'
    if not (tokenizer.is_dir() and pairs.is_file()):
        emit({'result': _NO_PAIRS})
        return
    # Flags of its own are defined when it is imported.
    from benchmarks import trl as beside

    jax.config.update('jax_platforms', 'cpu')  # the card is for the processes that are timed
    chosen = best(rows, shape)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = os.path.join(folder, 'model')
        make_checkpoint(shape, tokenizer, checkpoint)
        changes = changed(shape) | _TRL | {
            'model.attention': chosen['attention'], 'train.rows': chosen['rows'],
            'train.batch_size': chosen['batch_size'], 'data.path': str(pairs),
            'model.checkpoint': checkpoint}
        # The checkpoint says itself what it is.
        changes = {key: value for key, value in changes.items()
                   if not key.startswith(('model.family', 'model.sizes'))}
        arguments = ['--config=speed:harmless,scalar',  # TRL's head
                     *(f'--config.{key}={value}' for key, value in changes.items())]
        config = load_config('harmless,scalar', changes)
        took = 0.0
        for per_device in shape.per_device:
            words = setting(chosen['attention'], chosen['rows'], chosen['batch_size'])
            what, begin = f'{words}; TRL {per_device} a pass', time.monotonic()
            problem = late(deadline, took)
            if problem:
                emit({'setting': what, 'result': problem})
                continue
            results = os.path.join(folder, f'trl-{per_device}')
            try:
                print(beside.compare(
                    config, results, trl_python=sys.executable, rounds=1, per_device=per_device,
                    config_args=arguments), flush=True)
                for row in trl_rows(workdir.read_json(f'{results}/benchmark_trl.json')):
                    emit({'setting': what} | row)
            except Exception as error:  # Such as memory that is full; a smaller pass may fit.
                emit({'setting': what} | failed(error))
            finally:
                print_logs(results)
            took = time.monotonic() - begin


def best(rows: Sequence[Row], shape: Shape) -> Row:
    """The row of the setting that trained fastest, or the first setting of a shape.

    Attention that was found to be wrong for the shape's family is left out.
    """
    wrong = {row['attention'] for row in rows
             if row['result'].startswith('wrong') and shape.family in row['families']}
    trained = [row for row in rows if row.get('phase') == 'training' and 'rows' in row
               and row['attention'] not in wrong]
    first = {'attention': 'auto', 'rows': shape.settings[0][0], 'batch_size': shape.settings[0][1]}
    return max(trained, key=lambda row: row['comparisons_per_second'], default=first)


def make_checkpoint(shape: Shape, tokenizer: Path, folder: str) -> None:
    """A folder as transformers writes it: random weights of the shape, and a tokenizer.

    Where the tokenizer is another model's and has more tokens, the vocabulary is as large.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    settings = families.random_settings(shape.family, shape.sizes) | dict(shape.rest)
    known = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    config = transformers.AutoConfig.for_model(
        **settings | {'vocab_size': max(known, settings['vocab_size'])})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, os.path.join(folder, path.name))


def trl_rows(result: Mapping[str, Any]) -> list[Row]:
    """What the table shows of `benchmark_trl.json`: qrm's rates, and TRL's with the ratio."""
    single, = result['rounds']
    found = [{'phase': f'{phase}, qrm', 'result': 'measured'} | own
             for phase, own in table_rows(single['qrm']).items()]
    for name, rates in result['comparisons_per_second'].items():
        found.append({'phase': f'{name.replace("_", ", ")}, TRL',
                      'comparisons_per_second': rates['trl']['median'],
                      'result': f'qrm: {result["ratios"][name]["median"]:.2f} times as fast'})
        if name == 'training':
            found[-1] |= {'peak_gib': single['trl']['peak_memory'] / 2**30,
                          'measured': single['trl']}
    return found


def print_logs(folder: str) -> None:
    """What the processes of a comparison printed, into the log of this part."""
    for path in sorted(Path(folder).glob('*.log')):
        print(f'--- {path.name}\n{path.read_text(encoding="utf-8")}', flush=True)


# What all share.


def late(deadline: float, took: float) -> str:
    """Why nothing is started that may take longer than what took so many seconds; '' if it is."""
    left, needed = deadline - time.monotonic(), _MARGIN * took
    return f'not measured: {left:.0f} s left, {needed:.0f} s needed' if left < needed else ''


def failed(error: Exception) -> dict[str, str]:
    """What a row says of an exception; all of it is printed."""
    traceback.print_exception(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return {'result': f'failed: {type(error).__name__}: {lines[0] if lines else "no message"}'}


def changed(shape: Shape) -> dict[str, Any]:
    """Keys of configs/speed.py that are others on a GPU, as dotted names."""
    return {
        'model.family': shape.family,
        **{f'model.sizes.{key}': value for key, value in shape.sizes.items()},
        'model.dtype': 'bfloat16', 'data.max_length': shape.max_length,
        'train.row_length': shape.row_length, 'speed.repeats': shape.repeats,
        'speed.steps': shape.steps, 'speed.scored': shape.scored,
        'speed.responses': 0,
    }


def make_config(shape: Shape, **overrides: Any) -> Any:
    """A checked config for synthetic comparisons; overrides have dotted names."""
    config = load_config('', changed(shape) | overrides)
    speed.check(config)
    return config


def load_config(arg: str, overrides: Mapping[str, Any]) -> Any:
    """configs/speed.py with some keys set to other values."""
    config = configs.module('speed').get_config(arg)
    config.update_from_flattened_dict(dict(overrides))
    return config


if __name__ == '__main__':
    main()
