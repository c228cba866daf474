"""Times qrm beside TRL's RewardTrainer on the same pairs, the same model and this machine.

    python -m benchmarks.trl --config=speed --workdir=results/trl \\
      --trl_python=ENV/bin/python --config.data.path=DIR --config.model.checkpoint=DIR

In each round `experiments.speed` and `benchmarks/trl_worker.py` run one after the other, each
in a process of its own. Both train on the same pairs in the same steps, and score the same ones,
without dropout and without gradient checkpointing; TRL with its own data loader, `--per_device`
pairs in a forward pass. Scoring beside it is a forward pass of transformers over dialogues padded
to the longest of their batch, in order and, as the stronger baseline, sorted by length.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from qrm.commands import launch
from qrm.data import sources
from qrm.data.comparisons import DataError
from qrm.data.encoded import Encoded
from qrm.studies import costs, speed
from qrm.training import config, train, workdir
from qrm.training.schema import ConfigError

_WORKER = Path(__file__).with_name('trl_worker.py')
# Ratio -> where qrm's and the other's comparisons a second stand.
_RATIOS = {
    'training': (('training',), ('training',)),
    'scoring': (('scoring',), ('scoring', 'in_order')),
    'scoring_sorted': (('scoring',), ('scoring', 'sorted')),
}


def main() -> None:
    # Only to read the data: the devices are for the processes that are timed.
    jax.config.update('jax_platforms', 'cpu')
    found = launch.config({**config.KEYS, **speed.KEYS}, speed.check)
    values = flags.FLAGS
    print(compare(found, values.workdir, trl_python=values.trl_python, rounds=values.rounds,
                  per_device=values.per_device, config_args=config_arguments(sys.argv[1:])))


def compare(config: Any, folder: str, *, trl_python: str, rounds: int, per_device: int,
            config_args: Sequence[str]) -> str:
    """Times both in turns; leaves `benchmark_trl.json`, the pairs and all logs in `folder`.

    Args:
      config: a config with a `speed` section, data and a checkpoint.
      folder: of the results.
      trl_python: Python of an environment with TRL.
      rounds: times that both are run.
      per_device: pairs of TRL's forward pass, and dialogues of one when scoring.
      config_args: the command-line arguments that give this config.

    Returns:
      The comparison as a table for the terminal.

    Raises:
      ConfigError, DataError, WorkdirError: something cannot be compared, or a process failed.
    """
    check(config, trl_python, per_device)
    with workdir.lock(folder):
        counts = write_pairs(config, folder)
        commands = {
            # One prompt with many responses has no counterpart in TRL.
            'qrm': [sys.executable, '-m', 'experiments.speed', *config_args,
                    '--config.speed.responses=0', f'--workdir={folder}/qrm'],
            'trl': [trl_python, str(_WORKER), f'--model={config.model.checkpoint}',
                    f'--training={folder}/training.jsonl', f'--scoring={folder}/scoring.jsonl',
                    f'--output={folder}/trl.json', f'--max_length={config.data.max_length}',
                    f'--batch_size={config.train.batch_size}', f'--per_device={per_device}',
                    f'--steps={config.speed.steps}', f'--repeats={config.speed.repeats}',
                    f'--dtype={config.model.dtype}'],
        }
        outputs = {'qrm': f'{folder}/qrm/speed.json', 'trl': f'{folder}/trl.json'}
        measured = []
        for number in range(rounds):
            found = {}
            # Who comes first changes, so that a drift of the machine favours neither.
            for name in ('qrm', 'trl') if number % 2 == 0 else ('trl', 'qrm'):
                print(f'round {number + 1} of {rounds}: {name}', flush=True)
                run(commands[name], f'{folder}/{name}-{number + 1}.log')
                found[name] = workdir.read_json(outputs[name])
            found['ratios'] = {
                name: _rate(found['qrm'], *qrm) / _rate(found['trl'], *trl)
                for name, (qrm, trl) in _RATIOS.items()}
            measured.append(found)
        result = {
            'pairs': counts, 'per_device': per_device,
            'ratios': {name: speed.summary([found['ratios'][name] for found in measured])
                       for name in _RATIOS},
            'comparisons_per_second': {
                name: {'qrm': speed.summary([_rate(f['qrm'], *qrm) for f in measured]),
                       'trl': speed.summary([_rate(f['trl'], *trl) for f in measured])}
                for name, (qrm, trl) in _RATIOS.items()},
            'rounds': measured,
        }
        workdir.write_json(os.path.join(folder, 'benchmark_trl.json'), result)
    return format_table(result)


def check(config: Any, trl_python: str, per_device: int) -> None:
    """Checks that TRL can be run on what the config describes.

    Raises:
      ConfigError: it cannot; names the key.
    """
    speed.check(config)
    for key, value, expected in (
        ('data.path', config.data.path, 'pairs that TRL can read as well'),
        ('model.checkpoint', config.model.checkpoint, 'a model folder for both'),
        ('data.max_length', config.data.max_length, 'a number of tokens for both'),
    ):
        if not value:
            raise ConfigError(f'config.{key}={value!r}, expected {expected}')
    if not os.path.isdir(config.model.checkpoint):
        raise ConfigError(f'config.model.checkpoint={config.model.checkpoint!r}, expected a folder '
                          'with the model and its tokenizer')
    for key, value, expected in (
        ('data.overlong', config.data.overlong, 'drop'),
        ('data.append_eos', config.data.append_eos, True),
        ('model.tokenizer', config.model.tokenizer, ''),
        ('model.dropout', config.model.dropout, 0.0),
        ('model.remat', config.model.remat, False),
    ):
        if value != expected:
            raise ConfigError(f'config.{key}={value!r}, expected {expected!r}, as TRL is run')
    if config.train.batch_size % per_device:
        raise ConfigError(f'config.train.batch_size={config.train.batch_size}, expected a multiple '
                          f'of --per_device={per_device}')
    if not os.access(trl_python, os.X_OK):
        raise ConfigError(f'--trl_python={trl_python}: no such program')


def write_pairs(config: Any, folder: str) -> dict[str, int]:
    """Writes the texts that qrm trains on, step by step, and those that it scores.

    Returns:
      Pairs of the timed steps and of a scoring, and tokens of their dialogues as qrm reads them.

    Raises:
      DataError: a comparison is not a pair of texts of which one is preferred.
    """
    encoded = train.prepare(config).encoded['train']
    comparisons, _ = sources.load_splits(config.data, config.workload)['train']
    texts = {comparison.id: comparison for comparison in comparisons}
    steps = 1 + config.speed.repeats * config.speed.steps
    training = [speed.training_items(config, encoded, number) for number in range(steps)]
    timed = [item for items in training[1:] for item in items]
    scoring = speed.scoring_items(config, encoded)
    for name, items in (('training', [*training[0], *timed]), ('scoring', scoring)):
        rows = [_pair(item, texts[item.id]) for item in items]
        workdir.write_text(os.path.join(folder, f'{name}.jsonl'),
                           ''.join(json.dumps(row) + '\n' for row in rows))
    return {'training': len(timed), 'training_dialogue_tokens': costs.repeated_tokens(timed),
            'scoring': len(scoring), 'scoring_dialogue_tokens': costs.repeated_tokens(scoring)}


def _pair(item: Encoded, comparison: Any) -> dict[str, str]:
    """The dialogues of a comparison as TRL reads them."""
    chosen = [k for k, row in enumerate(item.preference) if (row > 0.5).any()]
    if len(item.responses) != 2 or len(chosen) != 1 or not isinstance(comparison.prompt, str):
        raise DataError(f'{item.id}: expected two responses, as texts, of which one is preferred; '
                        'TRL trains on nothing else')
    dialogues = [comparison.prompt + response for response in comparison.responses]
    return {'id': item.id, 'chosen': dialogues[chosen[0]], 'rejected': dialogues[1 - chosen[0]]}


def run(command: Sequence[str], log: str) -> None:
    """Runs a program to its end, with all that it prints in a file.

    Raises:
      ConfigError: it failed; shows its last line.
    """
    with open(log, 'w', encoding='utf-8') as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = Path(log).read_text(encoding='utf-8').split('\n')
        last = next((line for line in reversed(lines) if line.strip()), 'no output')
        raise ConfigError(f'{command[0]} failed with exit code {done.returncode}: {last} '
                          f'(all of it: {log})')


def config_arguments(argv: Sequence[str]) -> list[str]:
    """Those of the arguments that give the config: `--config` and `--config.KEY`, with values."""
    own = re.compile(r'--?(no)?config(\..*)?')
    return [arg for before, arg in zip(['', *argv], argv, strict=False)
            if own.match(arg) or (own.fullmatch(before) and '=' not in before
                                  and not arg.startswith('-'))]


def format_table(result: dict[str, Any]) -> str:
    """Comparisons a second of both and their ratios, round by round and the median."""
    pairs, rounds = result['pairs'], result['rounds']
    trl = rounds[0]['trl']
    versions = ', '.join(f'{name} {version}' for name, version in trl['versions'].items())
    lines = [
        f'{trl["device"]}, {trl["threads"]} threads; {versions}',
        *(f'{name}: {pairs[name]} pairs; tokens of their dialogues: qrm '
          f'{pairs[f"{name}_dialogue_tokens"]}, TRL {trl[name]["dialogue_tokens"]}'
          for name in ('training', 'scoring')),
        '', f'{"comparisons / s":17}{"qrm":>10}{"TRL":>10}{"ratio":>10}  of each round',
    ]
    for name, rates in result['comparisons_per_second'].items():
        ratio = result['ratios'][name]
        each = ', '.join(f'{value:.2f}' for value in ratio['repeats'])
        lines.append(f'{name.replace("_", ", "):17}{rates["qrm"]["median"]:>10.4g}'
                     f'{rates["trl"]["median"]:>10.4g}{ratio["median"]:>10.3g}  {each}')
    return '\n'.join(lines)


def _rate(result: dict[str, Any], *path: str) -> float:
    for key in path:
        result = result[key]
    return result['comparisons_per_second']['median']


def _define_flags() -> None:
    """As the program begins: others that define the same names can be imported beside it."""
    launch.define_config()
    flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun overwrites them.')
    flags.DEFINE_string('trl_python', None, 'Python of an environment with TRL.')
    flags.DEFINE_integer('rounds', 3, 'Times that both are run, in turns.', lower_bound=1)
    flags.DEFINE_integer(
        'per_device', 8, "Pairs of TRL's forward pass, dialogues of one in scoring.", lower_bound=1)


if __name__ == '__main__':
    _define_flags()
    launch.run(main, required=('config', 'workdir', 'trl_python'))
