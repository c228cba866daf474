"""The campaign: things are broken on purpose, and what survives is counted.

A measure is a kind of breakage, a trial one of it, with a generator of its own by which it can be
repeated. Each trial is written down when it ends, so that a campaign that was stopped goes on.
"""

import collections
import json
import os
import shutil
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qrm.studies import breakages, strikes
from qrm.studies.strikes import Ground, Outcome
from qrm.training import schema, workdir
from qrm.training.schema import ANY, NOT_NEGATIVE, ConfigError, Each, Key, Table

_SHOWN = 300  # characters of what went wrong, in the table


class Measure(NamedTuple):
    """A kind of breakage.

    Attributes:
      what: is done, for the table.
      holds: what must come of it.
      trials: of the default run, and of the full one.
      trial: see `strikes`.
      size: how much a trial counts for.
    """

    what: str
    holds: str
    trials: tuple[int, int]
    trial: Callable[[Ground, np.random.Generator, Path], Outcome]
    size: int = 1


MEASURES = {
    'killed': Measure(
        'kill -9 at a random moment, rerun', 'bit for bit the same end', (12, 200),
        strikes.killed),
    'killed_of_two': Measure(
        'the same with two processes, one of them killed',
        'the other ends within 60 s, the rerun ends the same', (2, 50), strikes.killed_of_two),
    'checkpoint_damaged': Measure(
        'a byte flipped, a file cut, emptied, exchanged or removed in a checkpoint',
        'an older good one or an error; never other numbers', (40, 500),
        breakages.checkpoint_damaged),
    'disk_full': Measure(
        'disk full during a run (a file system of its own)',
        'an error in one line; the rerun ends the same', (3, 50), strikes.disk_full),
    'stopped': Measure(
        'SIGTERM or SIGINT at a random moment', 'ended within 10 s, the rerun ends the same',
        (8, 100), strikes.stopped),
    'not_finite': Measure(
        'NaN or infinity in weights, rewards, gradients, data',
        'named; parameters on disk finite', (20, 100), breakages.not_finite),
    'rows': Measure(
        'rows generated, valid and with one or two fields changed, all formats',
        'as specified, or refused by file, line and key; counts add up',
        (10, 20_000 // breakages.ROWS_A_TRIAL), breakages.rows_generated, breakages.ROWS_A_TRIAL),
    'configs': Measure(
        'config values changed (type, range, combination)',
        'refused in a line, or the run does what they say', (40, 2000), breakages.config_changed),
    'folders': Measure(
        'model folders changed (names, shapes, dtypes, config.json, tokenizer)',
        'the right rewards, or refused', (60, 1000), breakages.folder_changed),
    'order': Measure(
        'batch order, split over devices, resume point',
        'every comparison once an epoch', (500, 2000), breakages.order_kept),
    'twice': Measure(
        'the command twice at once in one folder', 'one is refused, nothing lost', (3, 50),
        strikes.run_twice),
}

KEYS: Table = {
    'seed': Key(0, NOT_NEGATIVE, 'of everything that is drawn'),
    'measures': Key(tuple(MEASURES), Each(str), 'which are taken'),
    'trials': Key({name: measure.trials[0] for name, measure in MEASURES.items()}, ANY,
                  'of each measure; rows come a hundred at a time'),
}


def check(config: Any) -> None:
    """Checks the values of a config.

    Raises:
      ConfigError: lists every value that cannot be used.
    """
    schema.check(config, KEYS)
    problems = [f'config.measures: {name!r}, expected some of {tuple(MEASURES)}'
                for name in config.measures if name not in MEASURES]
    problems += [f'config.trials.{name}={count!r}, expected a whole number of at least 0 for one '
                 f'of {tuple(MEASURES)}' for name, count in config.trials.items()
                 if name not in MEASURES or type(count) is not int or count < 0]
    problems += [f'config.trials.{name}: missing' for name in config.measures
                 if name in MEASURES and name not in config.trials]
    schema.raise_all(problems)


def run(config: Any, folder: str) -> str:
    """Takes all trials that are not yet taken, in `folder`.

    Leaves `trials.jsonl`, a line for each trial; `campaign.json` and `campaign.md`; and of each
    trial that failed its files, in `failures/`.

    Returns:
      The table as Markdown.

    Raises:
      ConfigError: see `check`; or trials of another seed are in the folder.
      WorkdirError: another process is in the folder.
    """
    check(config)
    with workdir.lock(folder):
        place = Path(folder)
        known = _read(place / 'trials.jsonl', config.seed)
        ground = Ground(place / 'ground')
        ground.folder.mkdir(exist_ok=True)
        began = time.monotonic()
        with open(place / 'trials.jsonl', 'a', encoding='utf-8') as file:
            for name in config.measures:
                for number in range(config.trials[name]):
                    if (name, number) in known:
                        continue
                    outcome = _once_more(name, number, config.seed, ground, place)
                    known[name, number] = outcome
                    file.write(json.dumps({'measure': name, 'trial': number, 'seed': config.seed,
                                           **outcome._asdict()}) + '\n')
                    file.flush()
                    if outcome.wrong:
                        print(f'{name}, trial {number}: {outcome.wrong}', flush=True)
                print(f'{name}: {config.trials[name]} trials, {time.monotonic() - began:.0f} s',
                      flush=True)
        result = summarise(known)
        workdir.write_json(str(place / 'campaign.json'), {'seed': config.seed, 'measures': result})
        text = format_table(result)
        workdir.write_text(str(place / 'campaign.md'), text)
    return text


def _once_more(name: str, number: int, seed: int, ground: Ground, place: Path) -> Outcome:
    """Takes a trial; one that killed the campaign's own process twice has failed."""
    path, own = place / 'begun.json', {'measure': name, 'trial': number, 'seed': seed}
    before = workdir.read_json(str(path)) if path.exists() else {}
    times = before.get('times', 0) if own.items() <= before.items() else 0
    if times > 1:
        path.unlink()
        return Outcome('died', 'the process died, twice')
    workdir.write_json(str(path), own | {'times': times + 1})
    try:
        return take(name, number, seed, ground, place)
    finally:  # also where a signal asks it to stop
        path.unlink()


def take(name: str, number: int, seed: int, ground: Ground, place: Path) -> Outcome:
    """Takes a trial, the same one whenever it is taken; its files stay if it fails."""
    rng = np.random.default_rng((seed, zlib.crc32(name.encode()), number))
    folder = place / 'failures' / f'{name}-{number}'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        outcome = MEASURES[name].trial(ground, rng, folder)
    except Exception as error:  # that is what the campaign looks for
        line = traceback.extract_tb(error.__traceback__)[-1]
        outcome = Outcome('traceback', f'{type(error).__name__}: {str(error)[:300]} '
                                       f'({os.path.basename(line.filename)}:{line.lineno})')
    if not outcome.wrong:
        shutil.rmtree(folder)
    return outcome


def summarise(known: dict[tuple[str, int], Outcome]) -> dict[str, Any]:
    """Trials, survivors and outcomes of each measure, ready for JSON."""
    result = {}
    for name, measure in MEASURES.items():
        own = {number: outcome for (other, number), outcome in known.items() if other == name}
        taken = {number: outcome for number, outcome in own.items() if outcome.how != 'not run'}
        failed = {number: outcome.wrong for number, outcome in taken.items() if outcome.wrong}
        result[name] = {
            'what': measure.what, 'holds': measure.holds,
            'trials': measure.size * len(taken),
            'survived': measure.size * (len(taken) - len(failed)),
            'outcomes': dict(sorted(collections.Counter(
                outcome.how for outcome in own.values()).items())),
            'failures': {str(number): wrong for number, wrong in sorted(failed.items())},
        }
    return result


def format_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ['# What was broken, and what survived', '',
             '| measure | trials | survived | must hold |', '| --- | --- | --- | --- |']
    lines += [f'| {row["what"]} | {row["trials"] or "not run"} | '
              f'{row["survived"] if row["trials"] else ""} | {row["holds"]} |'
              for row in result.values()]
    lines += ['', 'How trials ended:', '']
    lines += [f'- {name}: ' + ', '.join(f'{how} {count}' for how, count in row['outcomes'].items())
              for name, row in result.items() if row['outcomes']]
    failures = [f'- {name}, trial {number}: {wrong[:_SHOWN]}' for name, row in result.items()
                for number, wrong in row['failures'].items()]
    lines += ['', 'What failed:', '', *failures] if failures else ['', 'Nothing failed.']
    return '\n'.join(lines) + '\n'


def _read(path: Path, seed: int) -> dict[tuple[str, int], Outcome]:
    """Trials that were taken; a last line cut by a kill is left out, and taken again."""
    if not path.exists():
        return {}
    whole = [line for line in path.read_text(encoding='utf-8').splitlines(True)
             if line.endswith('\n')]
    workdir.write_text(str(path), ''.join(whole))
    rows = [json.loads(line) for line in whole]
    if other := {row['seed'] for row in rows} - {seed}:
        raise ConfigError(f'config.seed={seed}, but {path} has trials of seed {other.pop()}; '
                          'choose another --workdir')
    return {(row['measure'], row['trial']): Outcome(row['how'], row['wrong']) for row in rows}
