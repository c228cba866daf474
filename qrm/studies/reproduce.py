"""The main job: train each model on each workload, evaluate, tabulate, draw."""

import copy
import os
from typing import Any

import jax

from qrm.analysis import figures, report, tables
from qrm.analysis.evaluate import evaluate
from qrm.data import demo, sources
from qrm.data.comparisons import DataError
from qrm.data.files import is_rows
from qrm.rewards import resampling
from qrm.training import config as config_lib
from qrm.training import features, workdir
from qrm.training.config import CENTRED
from qrm.training.schema import ConfigError
from qrm.training.train import read_data, train


def reproduce(config: Any, folder: str) -> str:
    """Runs the whole experiment in `folder`; goes on where an earlier run stopped.

    Leaves one folder for each run, `<workload>-<model>`, and `table.json`, `table.md`, `figures/`
    and, see `report`, `report.html`; runs whose head alone is trained share `features/`. Several
    processes all call it, see `train`, and come to the same table.

    Returns:
      The table as Markdown.

    Raises:
      ConfigError, DataError, WorkdirError, NonFiniteLoss, Interrupted: as `train`.
    """
    members = run_configs(config)
    for member in members.values():
        features.share(member, folder)
    for workload in dict.fromkeys(workload for workload, _ in members):
        # What the analysis will need is checked before hours of training, not after.
        member = next(m for (name, _), m in members.items() if name == workload)
        test = read_data(member).encoded['test']
        resampling.check_groups(item.group for item in test if (item.preference > 0.5).any())
    runs, comparisons = {}, {}
    for (workload, model), member in members.items():
        path = os.path.join(folder, f'{workload}-{model}')
        print(f'\n== {workload}, {model}: {path}', flush=True)
        train(member, path)
        found = evaluate(member, path)
        runs[workload, model], comparisons[path] = found.predictions, found.comparisons
    print('\n== analysis', flush=True)
    settings = config.analysis
    table = tables.build_table(
        runs, replicates=settings.bootstrap, null_draws=settings.null_draws, level=settings.level,
        seed=settings.seed, source=describe_source(config))
    if config.data.path == sources.DEMO:
        table['bayes'] = {
            workload: demo.bayes(demo.generate(
                workload, 'test', config.data.demo.test, config.data.demo.seed,
                config.data.demo.annotators), config.data.demo.annotators)._asdict()
            for workload, _ in members
        }
    text = tables.format_table(table)
    workdir.write_json(os.path.join(folder, 'table.json'), table)
    workdir.write_text(os.path.join(folder, 'table.md'), text)
    if not jax.process_index():
        figures.draw_all(folder, runs)
    report.leave(folder, comparisons)
    return text


def run_configs(config: Any) -> dict[tuple[str, str], Any]:
    """(workload, model) -> config of that run, which differs in nothing else.

    Raises:
      DataError: a workload that the data do not have.
      ConfigError: a value that cannot be used, or nothing to train.
    """
    config_lib.check(config)
    names = sources.workloads_of(config.data.path)
    workloads = tuple(config.reproduce.workloads)
    if not names:  # One set of rows: one workload, named after the file or data set.
        stem = os.path.basename(os.path.normpath(config.data.path))
        workloads = (stem.split('.')[0] if is_rows(config.data.path) else stem,)
    elif unknown := [name for name in workloads if name not in names]:
        raise DataError(f'config.reproduce.workloads: {unknown} not in {config.data.path}, '
                        f'expected some of {names}')
    if 'pairwise' in config.reproduce.models:
        raise ConfigError("config.reproduce.models: 'pairwise' gives no reward of a response "
                          'alone, of which the tables are; expected other heads, or `qrm train` '
                          'and `qrm evaluate` of this one')
    given, result = config.loss.centre_weight, {}
    if CENTRED in config.reproduce.models and given not in (0.0, config_lib.centre_weight(config)):
        raise ConfigError(f'config.loss.centre_weight={given} beside the model {CENTRED!r}, which '
                          'has one of its own, expected 0')
    for workload in workloads:
        for model in config.reproduce.models:
            member = copy.deepcopy(config)
            member.workload = workload
            if CENTRED in config.reproduce.models:
                member.loss.centre_weight = 0.0  # of the control alone
            config_lib.set_model(member, model)
            config_lib.check(member)
            result[workload, model] = member
    if not result:
        raise ConfigError('config.reproduce: no workload or no model to train')
    return result


def describe_source(config: Any) -> str:
    """What the models start from and what they learn, in words, for the statement."""
    start = (f'models that start from {config.model.checkpoint}' if config.model.checkpoint
             else 'small models with random initial weights')
    data = ('generated dialogues' if config.data.path == sources.DEMO else config.data.path)
    return f'{start}, trained and tested on {data} (one seed, {config.seed})'
