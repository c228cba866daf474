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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import device
from benchmarks.device import Row, Shape
from qrm.commands import configs
from qrm.data import packing
from qrm.data.packing import MicroBatch
from qrm.data.tokens import Encoded
from qrm.models import attention
from qrm.models.network import Params, RewardNetwork
from qrm.studies import benchmark
from qrm.training import config as config_lib
from qrm.training import step, train, workdir

# ||x - reference|| / ||reference|| at most. In bfloat16 numbers have 8 bits, and errors of a few
# roundings meet; in a network, those of its blocks.
TOLERANCES = {'float32': 1e-5, 'bfloat16': 2e-2}
NETWORK_TOLERANCE = 1e-4
CHECKED = ('pallas', 'tiled')  # against 'dense'

_ROWS = 4  # of the checks
_FILL = 0.85  # of those rows, so that a part is padding
_BLOCKS = 4  # of the network that is checked
_LEAST_SHARE = 1e-3  # of the gradient's norm; a leaf with less, perhaps 0, is compared with that
_MARGIN = 1.3  # the next setting may take longer than the last one
_NO_PAIRS = 'not measured: no pairs (device.sh prepare --tokenizer --pairs)'
# TRL takes long for a step, and its share of the time is short.
_TRL = {'benchmark.repeats': 2, 'benchmark.steps': 2, 'benchmark.scored': 512}

Emit = Callable[[Row], None]


def main(argv: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description='Measures one part; see benchmarks/device.py.')
    parser.add_argument('--part', choices=device.PARTS, required=True)
    parser.add_argument('--shape', choices=device.SHAPES, required=True)
    parser.add_argument('--seconds', type=float, required=True)
    parser.add_argument('--rows', required=True)
    parser.add_argument('--carried', required=True)
    args = parser.parse_args(argv)
    shape, deadline = device.SHAPES[args.shape], began + args.seconds
    emit = functools.partial(append, args.rows, args.part)
    if args.part == 'correctness':
        correctness(shape, emit)
    elif args.part == 'trl':
        trl(shape, emit, Path(args.carried), device.read_rows(Path(args.rows)), deadline)
    else:
        sweep(shape, args.part.removeprefix('sweep-'), emit, deadline)


def append(path: str, part: str, row: Row) -> None:
    """Appends a row, on the disk when this returns."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps({'part': part} | row) + '\n')
        file.flush()
        os.fsync(file.fileno())


# Correctness.


def correctness(shape: Shape, emit: Emit) -> None:
    """Compares every implementation with the dense one, alone and in a network."""
    config = make_config(shape, **{
        'model.dtype': 'float32', 'model.sizes.n_layer': min(_BLOCKS, shape.sizes['n_layer'])})
    items = mixed_comparisons(shape, seed=0)
    layouts = packing.plan_layouts(items, row_length=shape.row_length, rows=_ROWS)
    packed = packing.pack(items, layouts)[0]
    attend = make_attend(packed.micro_batch, shape)
    network, params, _ = train.initial_network(config)

    @functools.cache
    def in_network(name: str) -> tuple[np.ndarray, Params]:
        return rewards_and_gradient(dataclasses.replace(network, attention=name), params, config,
                                    [items[i] for i in packed.indices], layouts)

    for implementation in CHECKED:
        checks = {dtype: functools.partial(check_attention, attend, implementation, dtype)
                  for dtype in TOLERANCES}
        checks['network, float32'] = functools.partial(check_network, in_network, implementation)
        for what, check in checks.items():
            row = {'setting': f'{implementation}, {what}', 'attention': implementation}
            print(row['setting'], flush=True)  # what a part that is stopped was at
            try:
                emit(row | check())
            except Exception as error:  # What cannot be compiled says nothing about the others.
                emit(row | failed(error))


def mixed_comparisons(shape: Shape, seed: int) -> list[Encoded]:
    """Synthetic comparisons with two, three and four responses, which fill most of `_ROWS` rows."""
    room = _FILL * _ROWS * shape.row_length
    pairs = benchmark.synthetic(2 * _ROWS * shape.row_length, max_length=shape.max_length,
                                vocab_size=shape.sizes['vocab_size'], seed=seed)
    found: list[Encoded] = []
    for item, other in zip(pairs[::2], pairs[1::2], strict=True):
        responses = (item.responses + other.responses)[:2 + len(found) % 3]
        joined = dataclasses.replace(
            item, responses=responses, ratings=np.full((len(responses), 1), np.nan, np.float32),
            preference=np.triu(np.ones((len(responses),) * 2, np.float32), 1))
        if joined.longest > shape.max_length or joined.size > shape.row_length:
            continue
        room -= joined.size
        if room < 0:
            break
        found.append(joined)
    return found


def make_attend(batch: MicroBatch, shape: Shape) -> Callable[..., dict[str, np.ndarray]]:
    """Builds a function (implementation, dtype, compute dtype) -> attention over these rows.

    It returns the values and the gradients of queries, keys and values, [tokens, H, E] each, at
    tokens that are not padding, computed from random inputs that are rounded to the dtype.
    """
    heads = shape.sizes['n_head']
    size = (*batch.segments.shape, heads, shape.sizes['n_embd'] // heads)
    rng = np.random.default_rng(0)
    real = batch.segments > 0
    q, k, v, outgoing = (rng.normal(size=size) for _ in range(4))
    # Weights are far from equal, and padding, whose outputs have no meaning, sends nothing back.
    inputs = 2 * q, 2 * k, v, outgoing * real[..., None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, segments, responses, q, k, v, outgoing):
        plan = attention.plan(segments, responses, name)
        out, pull = jax.vjp(lambda q, k, v: attention.attend(q, k, v, plan), q, k, v)
        return out, *pull(outgoing)

    def attend(name: str, dtype: str, compute: str) -> dict[str, np.ndarray]:
        rounded = [jnp.asarray(x, dtype).astype(compute) for x in inputs]
        results = run(name, batch.segments, batch.responses, *rounded)
        return {part: np.asarray(x, np.float64)[real]
                for part, x in zip(('out', 'dq', 'dk', 'dv'), results, strict=True)}

    return attend


def check_attention(
    attend: Callable[..., dict[str, np.ndarray]], implementation: str, dtype: str
) -> dict[str, Any]:
    """Compares attention with the dense one in float32, and the dense one in the same dtype too.

    Args:
      attend: from `make_attend`.
      implementation: one of `attention.IMPLEMENTATIONS`.
      dtype: of the inputs and of the computation.
    """
    exact = attend('dense', dtype, 'float32')

    def errors(name: str) -> dict[str, float]:
        return {part: relative_error(x, exact[part])
                for part, x in attend(name, dtype, dtype).items()}

    beside = None if dtype == 'float32' else errors('dense')
    return verdict(errors(implementation), TOLERANCES[dtype], beside)


def check_network(
    in_network: Callable[[str], tuple[np.ndarray, Params]], implementation: str
) -> dict[str, Any]:
    """Compares rewards and the gradient of a training step with those of dense attention."""
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
    network: RewardNetwork, params: Params, config: Any, items: Sequence[Encoded],
    layouts: Sequence[packing.Layout]
) -> tuple[np.ndarray, Params]:
    """Rewards of these comparisons, and the gradient that a training step computes of them."""

    @jax.jit
    def rewards(params, batch):
        return network.head.read(network(params, batch)).distribution.mean

    # In place of an optimiser's state: the gradient itself.
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, _, params: (jax.tree.map(jnp.zeros_like, params), gradient))
    found = [np.asarray(rewards(params, one.micro_batch))[one.micro_batch.present]
             for one in packing.pack(items, layouts)]
    take = jax.jit(step.make_train_step(network, config_lib.loss_config(config), keep))
    batch = packing.make_batch(items, layouts, len(items))
    state, _ = take(step.init_state(params, keep, 0), batch)
    return np.concatenate(found), jax.tree.map(np.asarray, state.opt_state)


def relative_error(x: np.ndarray, reference: np.ndarray, least: float = 0.0) -> float:
    """||x - reference|| / ||reference||, or over `least` if that is more; NaN if x has any."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / max(np.linalg.norm(reference), least))


def verdict(errors: Mapping[str, float], tolerance: float,
            beside: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What a row says of errors, and of those of the dense implementation in the same dtype."""
    # Not the other way round: a comparison with NaN is false.
    right = all(error <= tolerance for error in errors.values())
    shown = ', '.join(f'{name} {error:.1e}' + (f' (dense {beside[name]:.1e})' if beside else '')
                      for name, error in errors.items())
    return {'result': f'{"ok" if right else "wrong"}, at most {tolerance:.0e}: {shown}',
            'errors': {name: float(error) for name, error in errors.items()},
            'tolerance': tolerance}


# Speed.


def sweep(shape: Shape, implementation: str, emit: Emit, deadline: float) -> None:
    """Measures training and scoring in all settings of a shape, while time is left."""
    took, problem = 0.0, ''
    for rows, batch_size in shape.settings:
        row = {'setting': setting(rows, batch_size), 'attention': implementation, 'rows': rows,
               'batch_size': batch_size}
        begin = time.monotonic()
        left, needed = deadline - begin, _MARGIN * took
        if not problem and left < needed:
            problem = f'not measured: {left:.0f} s left, {needed:.0f} s needed'
        if problem:
            emit(row | {'result': problem})
            continue
        print(row['setting'], flush=True)
        config = make_config(shape, **{'model.attention': implementation, 'train.rows': rows,
                                       'train.batch_size': batch_size})
        try:
            result = benchmark.measure(config, benchmark.prepare(config))
        except Exception as error:  # Such as memory that is full: settings before it have counted.
            emit(row | failed(error))
            problem = 'not measured: a smaller setting failed'
            continue
        for phase, rates in table_rows(result).items():
            emit(row | {'phase': phase, 'result': 'measured'} | rates)
        took = time.monotonic() - begin


def setting(rows: int, batch_size: int) -> str:
    """Rows of a micro-batch and comparisons a step, in words."""
    return f'rows {rows}, steps of {batch_size}'


def table_rows(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of `benchmark.measure` that the table shows, for training and scoring."""
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
    return found


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
    chosen = best(rows) or {'attention': 'auto', 'rows': shape.settings[0][0],
                            'batch_size': shape.settings[0][1]}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = os.path.join(folder, 'model')
        make_checkpoint(shape, tokenizer, checkpoint)
        changes = changed(shape) | _TRL | {
            'model.attention': chosen['attention'], 'train.rows': chosen['rows'],
            'train.batch_size': chosen['batch_size'], 'data.path': str(pairs),
            'model.checkpoint': checkpoint}
        # The checkpoint has sizes of its own.
        changes = {key: value for key, value in changes.items() if 'sizes' not in key}
        arguments = ['--config=benchmark:harmless,scalar',  # TRL's head
                     *(f'--config.{key}={value}' for key, value in changes.items())]
        config = load_config('harmless,scalar', changes)
        took = 0.0
        for per_device in shape.per_device:
            what = (f'{chosen["attention"]}, {setting(chosen["rows"], chosen["batch_size"])}; '
                    f'TRL {per_device} a pass')
            begin = time.monotonic()
            if deadline - begin < _MARGIN * took:
                emit({'setting': what, 'result': f'not measured: {deadline - begin:.0f} s left, '
                      f'{_MARGIN * took:.0f} s needed'})
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


def best(rows: Sequence[Row]) -> Row | None:
    """The row of the setting that trains fastest, with no attention that was found to be wrong."""
    wrong = {row['attention'] for row in rows if row['result'].startswith('wrong')}
    trained = [row for row in rows if row.get('phase') == 'training' and 'rows' in row
               and row['attention'] not in wrong]
    return max(trained, key=lambda row: row['comparisons_per_second'], default=None)


def make_checkpoint(shape: Shape, tokenizer: Path, folder: str) -> None:
    """A folder as transformers writes it: random weights of these sizes, and a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(**shape.sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
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


def failed(error: Exception) -> dict[str, str]:
    """What a row says of an exception; all of it is printed."""
    traceback.print_exception(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return {'result': f'failed: {type(error).__name__}: {lines[0] if lines else "no message"}'}


def changed(shape: Shape) -> dict[str, Any]:
    """Keys of configs/benchmark.py that are others on a GPU, as dotted names."""
    return {
        **{f'model.sizes.{key}': value for key, value in shape.sizes.items()},
        'model.dtype': 'bfloat16', 'data.max_length': shape.max_length,
        'train.row_length': shape.row_length, 'benchmark.repeats': shape.repeats,
        'benchmark.steps': shape.steps, 'benchmark.scored': shape.scored,
        'benchmark.responses': 0,
    }


def make_config(shape: Shape, **overrides: Any) -> Any:
    """A checked config for synthetic comparisons; overrides have dotted names."""
    config = load_config('', changed(shape) | overrides)
    benchmark.check(config)
    return config


def load_config(arg: str, overrides: Mapping[str, Any]) -> Any:
    """configs/benchmark.py with some keys set to other values."""
    config = configs.module('benchmark').get_config(arg)
    config.update_from_flattened_dict(dict(overrides))
    return config


if __name__ == '__main__':
    main()
