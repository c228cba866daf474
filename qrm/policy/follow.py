"""The checkpoints of a policy, watched after it was trained: rewards, distance, length, who wins.

Runs that learn from given responses, `sft` and `dpo`, answer nothing while they are trained; and an
online run can be looked at by another reward or judge than its own. The folder has what `watch`
leaves of a run, its first row of the policy before the first step.
"""

import os
import shutil
from typing import Any

from ml_collections import ConfigDict

from qrm.data import sources
from qrm.data.comparisons import DataError
from qrm.policy import language_model, optimise, rollouts, runs, scoring
from qrm.policy.monitor import format_rows
from qrm.policy.watch import Bench, Watch
from qrm.training import initial, schema, workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.schema import ANY, Key, Table

_SECTIONS = ('reward', 'rollouts', 'evaluation', 'monitor', 'analysis')
# What an online run does with its answers and rules beside.
_OTHERS = ('rollouts.prompts', 'rollouts.samples', 'monitor.stop', 'monitor.patience')

KEYS: Table = {
    'run': Key('', ANY, 'workdir of what trained a policy: `qrm sft`, `qrm dpo` or `qrm rl`'),
} | {name: key for name, key in optimise.KEYS.items()
     if name.split('.')[0] in _SECTIONS and name not in _OTHERS}


def check(values: Any) -> None:
    """Checks the values of a config.

    Raises:
      ConfigError: lists every value that cannot be used.
    """
    schema.check(values, KEYS)
    problems = [f"config.{key}='', expected {expected}" for key, value, expected in (
        ('run', values.run, 'the workdir of what trained a policy'),
        ('reward.source', values.reward.source, 'a reward')) if not value]
    try:
        optimise.rules(values)
    except ValueError as error:
        problems.append(f'config.monitor.{error}')
    schema.raise_all(problems)


def run(values: Any, folder: str) -> str:
    """Answers held-out prompts with each kept checkpoint of a run, and writes what that was worth.

    The prompts are those of the run's own held-out rows, answered with the same random numbers each
    time; a second call does all again.

    Args:
      values: the config.
      folder: what is written into.

    Returns:
      The rows as a table, and the step to keep.

    Raises:
      ConfigError, WorkdirError: a setting that cannot be used, or no run.
      DataError: no policy, too few prompts, or a reward that cannot be had.
      NonFiniteLoss: a policy gives numbers that are not finite.
    """
    check(values)
    values = _absolute(values)
    with workdir.lock(folder):
        workdir.check_claim(folder, values, free=())
        steps, bench = prepare(values)
        workdir.claim(folder, values)
        watch = Watch(folder, bench)
        watch.forget(-1)
        shutil.rmtree(os.path.join(folder, 'responses'), ignore_errors=True)
        watch.evaluate(*bench.reference, 0)
        for step in steps:
            policy = language_model.load_run(values.run, step=step)
            watch.evaluate(policy.network, policy.params, step)
        watch.draw()
    return f'{format_rows(watch.rows)}\n{watch.verdict()}'


def prepare(values: Any) -> tuple[list[int], Bench]:
    """The evaluated checkpoints of the run, and what they are watched with.

    Raises:
      ConfigError, DataError, WorkdirError: see `run`.
    """
    # However it was split over devices, a policy that answers is whole.
    own = ConfigDict(workdir.load_config(values.run).to_dict())
    own.train.update(sharding='replicated', tensor=1)
    with Checkpoints(values.run, read_only=True) as checkpoints:
        steps = checkpoints.evaluated
    if not steps:
        raise DataError(f'{values.run}: no checkpoint that was evaluated')
    last = language_model.load_run(values.run, step=steps[-1])
    # How the run was made, and how it is watched.
    whole = ConfigDict(own.to_dict() | {name: values[name].to_dict() for name in _SECTIONS})
    schema.raise_all(optimise.without_truth(whole))
    section = runs.without_attributes(whole.data)
    comparisons, report = sources.divide(sources.read(section, whole.workload),
                                         section)['validation']
    prompts = rollouts.prompts_of(
        comparisons, report, last.tokenizer, optimise.room(whole, last.network.architecture),
        as_chats=whole.data.as_chats)
    rollouts.check_room(prompts, 'validation')
    prompts = optimise.asked(whole, prompts, report)
    print(report.format(), flush=True)
    network, settings = runs.describe_network(
        own, value='algorithm' in own and optimise.algorithm(own).valued)
    start = initial.start(own, network, settings)
    return steps, optimise.bench(
        whole, prompts, last.tokenizer, last.stops,
        rollouts.reference(network, start.trained, start.frozen), *optimise.rewards(whole))


def _absolute(values: Any) -> Any:
    """The config with absolute paths, so that it means the same from anywhere."""
    found = ConfigDict(values.to_dict())
    found.run = os.path.abspath(found.run)
    found.reward.update(scoring.absolute(found.reward))
    return found
