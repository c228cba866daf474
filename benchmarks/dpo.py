"""Times qrm's DPO beside TRL's DPOTrainer on the same pairs, the same model and this machine.

    python -m benchmarks.dpo --config=dpo --workdir=results/dpo-trl --trl_python=ENV/bin/python \\
      --config.data.path=FILE --config.model.checkpoint=DIR --config.data.max_length=512 \\
      --config.data.overlong=drop

In each round both take the same steps on the same pairs in the same order, each in a process of its
own, without dropout and gradient checkpointing; the first step, in which qrm compiles, is not
timed. The log-probabilities of the reference are there before the steps that are timed: TRL is told
to compute them ahead, which is its faster way.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import trl
from qrm.commands import launch
from qrm.data import packing, sources
from qrm.data.comparisons import DataError
from qrm.data.encoded import Encoded
from qrm.policy import dpo, runs
from qrm.policy.runs import Prepared
from qrm.studies import costs, speed
from qrm.training import config as config_lib
from qrm.training import loop, step, workdir
from qrm.training.devices import Spread
from qrm.training.schema import ConfigError

_WORKER = Path(__file__).with_name('trl_worker.py')


def main() -> None:
    values = flags.FLAGS
    found = config_lib.absolute(launch.config(dpo.KEYS, dpo.check))
    if values.measure:
        print(measure(found, values.workdir, values.steps))
        return
    # Only to read the data: the devices are for the processes that are timed.
    jax.config.update('jax_platforms', 'cpu')
    print(compare(found, values.workdir, trl_python=values.trl_python, rounds=values.rounds,
                  per_device=values.per_device, steps=values.steps,
                  config_args=trl.config_arguments(sys.argv[1:])))


def measure(config: Any, folder: str, steps: int) -> str:
    """Takes steps as `qrm dpo` does, on one device, and writes the seconds of each."""
    workdir.make(folder)
    prepared, spread = runs.prepare(config, folder), Spread()
    course = dpo.learn(only_of(prepared, step_items(config, prepared, steps)))
    optimizer = step.make_optimizer(config.optimizer, 1 + steps)
    run = spread.compile(step.make_train_step(course.network, course.objective, optimizer))
    state = step.init_state(course.trained, optimizer, config.seed)
    seconds = []
    for number in range(1 + steps):
        begin = time.perf_counter()
        places = np.arange(number * config.train.batch_size, (number + 1) * config.train.batch_size)
        batch, = course.source.batches(places)
        state, *rest = run(state, spread.put([(batch, np.int32(0))]), course.frozen)
        jax.block_until_ready((state, rest))
        seconds.append(time.perf_counter() - begin)
    workdir.write_json(os.path.join(folder, 'qrm.json'), {
        'seconds': seconds[1:], 'first_step_seconds': seconds[0],
        'parameters': course.parameters, 'versions': workdir.versions()})
    return f'{sum(seconds[1:]):.3f} s for {steps} steps'


def step_items(config: Any, prepared: Prepared, steps: int) -> list[Encoded]:
    """The comparisons of a step that is not timed, and of those that are, in their order."""
    encoded, size = prepared.data.encoded['train'], config.train.batch_size
    return [encoded[i] for number in range(1 + steps) for i in packing.batch_indices(
        number, seed=config.seed, examples=len(encoded), batch_size=size,
        total=(1 + steps) * size)]


def only_of(prepared: Prepared, items: list[Encoded]) -> Prepared:
    """The same run of these comparisons alone, so that the reference is asked for no others."""
    encoded = {'train': items, 'validation': items[:1]}
    return prepared._replace(
        data=prepared.data._replace(encoded=encoded),
        identity=loop.identify(prepared.config, prepared.initial.base, encoded))


def compare(config: Any, folder: str, *, trl_python: str, rounds: int, per_device: int, steps: int,
            config_args: Sequence[str]) -> str:
    """Times both in turns; leaves `benchmark_dpo.json`, the pairs and all logs in `folder`.

    Args:
      config: of `qrm dpo`, with data and a checkpoint.
      folder: of the results.
      trl_python: Python of an environment with TRL.
      rounds: times that both are run.
      per_device: pairs of TRL's forward pass.
      steps: that are timed.
      config_args: the command-line arguments that give this config.

    Returns:
      The comparison for the terminal.

    Raises:
      ConfigError, DataError, WorkdirError: something cannot be compared, or a process failed.
    """
    check(config, trl_python, per_device)
    with workdir.lock(folder):
        pairs = write_pairs(config, folder, steps)
        commands = {
            'qrm': [sys.executable, '-m', 'benchmarks.dpo', *config_args, f'--steps={steps}',
                    '--measure', f'--workdir={folder}/qrm'],
            'trl': [trl_python, str(_WORKER), '--task=dpo', f'--model={config.model.checkpoint}',
                    f'--training={folder}/training.jsonl', f'--output={folder}/trl.json',
                    f'--max_length={config.data.max_length}',
                    f'--batch_size={config.train.batch_size}', f'--per_device={per_device}',
                    '--steps=1', f'--repeats={steps}', f'--dtype={config.model.dtype}',
                    f'--beta={config.dpo.beta}'],
        }
        outputs = {'qrm': f'{folder}/qrm/qrm.json', 'trl': f'{folder}/trl.json'}
        measured = []
        for number in range(rounds):
            found = {}
            for name in ('qrm', 'trl') if number % 2 == 0 else ('trl', 'qrm'):
                print(f'round {number + 1} of {rounds}: {name}', flush=True)
                trl.run(commands[name], f'{folder}/{name}-{number + 1}.log')
                found[name] = workdir.read_json(outputs[name])
            found['seconds'] = {'qrm': sum(found['qrm']['seconds']) / steps,
                                'trl': sum(found['trl']['training']['seconds']['repeats']) / steps}
            measured.append(found)
        ratios = [found['seconds']['trl'] / found['seconds']['qrm'] for found in measured]
        workdir.write_json(os.path.join(folder, 'benchmark_dpo.json'), {
            'pairs': pairs, 'per_device': per_device, 'steps': steps,
            'ratio': speed.summary(ratios), 'rounds': measured})
    other = measured[0]['trl']
    versions = ', '.join(f'{name} {version}' for name, version in other['versions'].items())
    lines = [f'{other["device"]}, {other["threads"]} threads; {versions}',
             f'{pairs["pairs"]} pairs in {steps} steps; tokens of their dialogues: qrm '
             f'{pairs["dialogue_tokens"]}, TRL {other["training"]["dialogue_tokens"]}; '
             f'{pairs["packed_tokens"]} with prompts laid out once',
             'seconds a step, qrm / TRL / ratio of each round:',
             *(f'  {found["seconds"]["qrm"]:.3f} / {found["seconds"]["trl"]:.3f} / {ratio:.2f}'
               for found, ratio in zip(measured, ratios, strict=True))]
    return '\n'.join(lines)


def check(config: Any, trl_python: str, per_device: int) -> None:
    """Checks that TRL can be run on what the config describes.

    Raises:
      ConfigError: it cannot; names the key.
    """
    if not os.path.isdir(config.model.checkpoint):
        raise ConfigError(f'config.model.checkpoint={config.model.checkpoint!r}, expected a folder '
                          'with the model and its tokenizer')
    if not config.data.max_length:
        raise ConfigError('config.data.max_length=0, expected a number of tokens for both')
    for section, key, expected in (
        ('data', 'overlong', 'drop'), ('data', 'as_chats', False), ('model', 'tokenizer', ''),
        ('model', 'dropout', 0.0), ('model', 'remat', False), ('train', 'tune', 'all'),
        ('train', 'sharding', 'replicated'), ('dpo', 'loss', 'dpo'),
        ('dpo', 'label_smoothing', 0.0), ('dpo', 'length_normalised', False),
    ):
        if (value := config[section][key]) != expected:
            raise ConfigError(f'config.{section}.{key}={value!r}, expected {expected!r}, as TRL is '
                              'run')
    if config.train.batch_size % per_device:
        raise ConfigError(f'config.train.batch_size={config.train.batch_size}, expected a multiple '
                          f'of --per_device={per_device}')
    if not os.access(trl_python, os.X_OK):
        raise ConfigError(f'--trl_python={trl_python}: no such program')


def write_pairs(config: Any, folder: str, steps: int) -> dict[str, int]:
    """Writes the texts that qrm trains on, step by step; how many, and their tokens.

    Raises:
      DataError: a comparison is not a pair of texts of which one is preferred.
    """
    prepared = runs.prepare(config, folder)
    section = runs.without_attributes(config.data)
    comparisons, _ = sources.load_splits(section, config.workload)['train']
    texts = {comparison.id: comparison for comparison in comparisons}
    items = step_items(config, prepared, steps)
    rows = [pair(item, texts[item.id]) for item in items]
    workdir.write_text(os.path.join(folder, 'training.jsonl'),
                       ''.join(json.dumps(row) + '\n' for row in rows))
    timed = items[config.train.batch_size:]
    return {'pairs': len(timed), 'dialogue_tokens': costs.repeated_tokens(timed),
            'packed_tokens': costs.distinct_tokens(timed)}


def pair(item: Encoded, comparison: Any) -> dict[str, str]:
    """A comparison as TRL reads it."""
    if (len(item.responses) != 2 or not isinstance(comparison.prompt, str)
            or {*item.preference[[0, 1], [1, 0]].tolist()} != {0.0, 1.0} or item.margin):
        raise DataError(f'{item.id}: expected two responses, as texts, of which one is preferred '
                        'for certain and without a margin; TRL trains on nothing else')
    chosen = int(item.preference[1, 0])
    return {'prompt': comparison.prompt, 'chosen': comparison.responses[chosen],
            'rejected': comparison.responses[1 - chosen]}


def _define_flags() -> None:
    """As the program begins: others that define the same names can be imported beside it."""
    launch.define_config()
    flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun overwrites them.')
    flags.DEFINE_string('trl_python', '', 'Python of an environment with TRL.')
    flags.DEFINE_integer('rounds', 3, 'Times that both are run, in turns.', lower_bound=1)
    flags.DEFINE_integer('steps', 4, 'Steps that are timed; one more is not.', lower_bound=1)
    flags.DEFINE_integer('per_device', 4, "Pairs of TRL's forward pass.", lower_bound=1)
    flags.DEFINE_bool('measure', False, 'Only take the steps of qrm, and write how long they took.')


if __name__ == '__main__':
    _define_flags()
    launch.run(main, required=('config', 'workdir'))
