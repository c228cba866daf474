"""Every head on the same batches: one table with paired intervals, and what the Huber term does.

Axes: n pairs, R responses, c comparisons, N quantiles, S seeds, r bootstrap replicates.

A model is a head and a loss; data, backbone, batches and seeds are the same for all, and what of
the backbone it reads can be chosen for each on held-out comparisons. One that reads the texts as
chats stands beside one that reads them as they are. Beside models stand baselines, which are not
trained. A number is the mean over seeds, its interval that of a bootstrap that draws
opening questions and seeds, the same ones for every model, so that differences are paired.
"""

import copy
import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from qrm.analysis import divergences, evaluate, pooling, tables
from qrm.data import demo, sources
from qrm.data.comparisons import DataError
from qrm.data.sources import workloads_of
from qrm.rewards import heads, metrics, resampling
from qrm.rewards.heads import HeadConfig
from qrm.rewards.statistics import Undefined
from qrm.studies import baselines, figures, worlds
from qrm.studies.baselines import BASELINES
from qrm.studies.columns import COLUMNS, Column, Judged
from qrm.training import config as config_lib
from qrm.training import features, schema, workdir
from qrm.training.schema import ANY, NOT_NEGATIVE, ConfigError, Each, Key, OneOf, Table
from qrm.training.train import prepare, read_data, train

_PAPER = 'bradley_terry_quantile_huber'

_CHATS = {'as_chats': True}

# Name -> what a model has in its `head` and `loss` sections, and how it reads texts. Nothing else
# may differ.
MODELS = {
    'scalar': {'head': {'name': 'scalar'}},
    # Pulled towards 0 as ten quantiles with lambda = .1 are, see `config.centre_weight`.
    'scalar_centred': {'head': {'name': 'scalar'}, 'loss': {'centre_weight': 0.125}},
    # Targets of +1 and -1; lambda = 0 is Bradley-Terry on the mean of free quantiles.
    'quantile': {'head': {'name': 'quantile'}},
    'quantile_0': {'head': {'name': 'quantile'}, 'loss': {'huber_weight': 0.0}},
    'quantile_1': {'head': {'name': 'quantile'}, 'loss': {'huber_weight': 1.0}},
    # The quantile loss of the paper's own code, see configs/paper.py: its spread collapses.
    'own_mean': {'head': {'name': 'quantile'}, 'loss': {
        'targets': 'own_mean', 'huber_sides': 'chosen', 'huber_weight': 1.0}},
    # The distributional likelihood, by four families.
    'distributional': {'head': {'name': 'monotone_quantile'}},
    'implicit': {'head': {'name': 'implicit_quantile'}},
    'gaussian': {'head': {'name': 'gaussian'}},
    'categorical': {'head': {'name': 'categorical'}},
    'ensemble': {'head': {'name': 'scalar', 'members': 5}},
    'ratings': {'head': {'name': 'monotone_quantile'},
                'loss': {'monotone_quantile': 'ratings_pinball'}},
    'scalar_chats': {'head': {'name': 'scalar'}, 'data': _CHATS},
    'quantile_chats': {'head': {'name': 'quantile'}, 'data': _CHATS},
}
# But for those that need a chat template, which a tokenizer trained on the data does not have, and
# the objective whose spread says nothing.
DEFAULT = tuple(name for name, sections in MODELS.items()
                if 'data' not in sections and name != 'own_mean')
RATED = ('ratings',)  # those that learn from ratings, where responses have them

KEYS: Table = {  # beside those of every run
    'compare.workloads': Key(('helpful',), Each(str), 'each model is trained on each by itself'),
    'compare.seeds': Key(
        (0, 1, 2), Each(int, NOT_NEGATIVE),
        'of parameters, batch order and dropout; the data stay'),
    'compare.reference': Key(
        'scalar', ANY, 'the model that others are compared with, pair by pair'),
    'compare.models': Key(DEFAULT, Each(str), 'which, in the order of the tables'),
    'compare.sections': Key(
        MODELS, ANY, 'what each has in its `head` and `loss`, and in `data.as_chats`'),
    'compare.reads': Key(
        (), Each(str), "what heads may read, as 'last+mean': each model reads what has the least "
        'held-out loss, the mean over seeds; (): `head.reads`'),
    'compare.baselines': Key(
        ('longer',), Each(str, OneOf(tuple(BASELINES))),
        "'longer', the number of tokens; 'likelihood' of the checkpoint's language model; "
        "'probe', a logistic regression (with train.tune=head)"),
}

# (model, seed) -> what is said of the test split of one workload.
Runs = Mapping[tuple[str, int], Judged]


class Member(NamedTuple):
    """A run of a comparison.

    Attributes:
      workload, model: what is learnt by which model.
      reads: what its head reads; '': `head.reads`.
      seed: of parameters, batch order and dropout.
    """

    workload: str
    model: str
    reads: str
    seed: int

    @property
    def folder(self) -> str:
        return '-'.join(str(part) for part in self if part != '')


def compare(config: Any, folder: str) -> str:
    """Trains, evaluates and tabulates all models in `folder`; goes on where it was stopped.

    Leaves a folder for each run, `<workload>-<model>-<seed>` or, where reads are chosen,
    `<workload>-<model>-<reads>-<seed>`, and `compare.json`, `compare.md` and `figures/`; runs whose
    head alone is trained share `features/`. Several processes all call it, see `train`, and come to
    the same tables.

    Returns:
      The tables as Markdown.

    Raises:
      ConfigError, DataError, WorkdirError, NonFiniteLoss, Interrupted: as `train`.
    """
    members = member_configs(config)
    for member in members.values():
        features.share(member, folder)
    settings = config.analysis
    # What each model and the analysis need of the data is checked before the first is trained.
    for member in {key[:2]: member for key, member in members.items()}.values():
        resampling.check_groups(item.group for item in read_data(member).encoded['test']
                                if (item.preference > 0.5).any())
    results = [
        _workload(config, workload, {key: member for key, member in members.items()
                                     if key.workload == workload}, folder)
        for workload in config.compare.workloads]
    result = {
        'results': results,
        'columns': {name: column.label for name, column in COLUMNS.items()},
        'estimators': {e.name: {'label': e.label, 'is_kl': e.is_kl}
                       for e in divergences.ESTIMATORS.values()},
        'settings': {'data': config.data.path, 'seeds': list(config.compare.seeds),
                     'reference': config.compare.reference, 'bootstrap': settings.bootstrap,
                     'level': settings.level, 'units': 'nats, and units of reward'},
    }
    text = format_tables(result)
    workdir.write_json(os.path.join(folder, 'compare.json'), result)
    workdir.write_text(os.path.join(folder, 'compare.md'), text)
    if not jax.process_index():
        figures.draw_comparison(folder, result)
    return text


def _workload(config: Any, workload: str, members: Mapping[Member, Any],
              folder: str) -> dict[str, Any]:
    """Trains and measures all models of a workload, and the baselines beside them."""
    first, settings = next(iter(members.values())), config.analysis
    if first.train.tune == 'head' and config.compare.reads:
        # Random backbones differ by seed, and chats from texts.
        bases = {(m.seed * (not m.model.checkpoint), m.data.as_chats): m for m in members.values()}
        for member in bases.values():
            _extract(member, config.compare.reads)
    trained, described = {}, {}
    for model in config.compare.models:
        runs, described[model] = _run(
            {key: member for key, member in members.items() if key.model == model}, folder)
        trained |= runs
    judged = {}
    for name in config.compare.baselines:
        print(f'\n== {workload}, {name}', flush=True)
        # A probe can take all that any head reads.
        widest = max(members, key=lambda key: len(members[key].head.reads))
        found = baselines.judge(name, members[widest], os.path.join(folder, widest.folder))
        judged |= {(name, seed): found for seed in config.compare.seeds}
    print(f'\n== analysis of {workload}', flush=True)
    rows = [row | described.get(row['model'], {}) for row in measure(
        trained | judged, reference=config.compare.reference, replicates=settings.bootstrap,
        level=settings.level, seed=settings.seed)]
    return {'workload': workload, 'rows': rows,
            'mechanism': mechanism([row for row in rows if row['model'] in described]),
            'truth': _against_truth(first, trained)}


def _extract(member: Any, reads: Sequence[str]) -> None:
    """Computes all hidden states that the runs of a workload will read, in one pass."""
    widest = copy.deepcopy(member)
    widest.head.reads = tuple(dict.fromkeys('+'.join(reads).split('+')))
    prepared = prepare(widest)
    model = baselines.sized(prepared.model)
    comparisons, report = sources.load_splits(widest.data, widest.workload)['test']
    test = evaluate.encode(widest.data, model, comparisons, report)
    exchanged = evaluate.exchange_some(widest, model, comparisons) or []
    kept = prepared.model.features
    kept.of([*prepared.encoded['train'], *prepared.encoded['validation']])
    # What is judged is computed in float32, whatever is trained on.
    dataclasses.replace(kept, network=dataclasses.replace(kept.network, dtype='float32')).of(
        [*test, *exchanged])


def _run(members: Mapping[Member, Any], folder: str
         ) -> tuple[dict[tuple[str, int], Judged], dict[str, Any]]:
    """Trains the runs of a model, chooses what it reads, and evaluates those that read it."""
    costs, losses = {}, {}
    for key, member in members.items():
        path = os.path.join(folder, key.folder)
        reads = f', reading {key.reads}' if key.reads else ''
        print(f'\n== {key.workload}, {key.model}{reads}, seed {key.seed}: {path}', flush=True)
        costs[key] = _train(member, path)
        losses.setdefault(key.reads, []).append(_held_out_loss(member, path))
    held_out = {reads: float(np.mean(values)) for reads, values in losses.items()}
    chosen = min(held_out, key=held_out.get)
    members = {key: member for key, member in members.items() if key.reads == chosen}
    runs = {}
    for key, member in members.items():
        found = evaluate.evaluate(member, os.path.join(folder, key.folder), exchange=True)
        runs[key.model, key.seed] = Judged(found.predictions, found.exchanged)
    first = next(iter(members.values()))
    return runs, _describe(first) | _cost([costs[key] for key in members]) | {
        'reads': '+'.join(first.head.reads), 'held_out': held_out}


def _held_out_loss(member: Any, path: str) -> float:
    """Of the checkpoint that is evaluated, by which those of a run are ranked."""
    criterion = metrics.criterion(config_lib.loss_config(member))
    values = [row[criterion] for row in workdir.read_metrics(path) if row['split'] == 'validation']
    return min(values) if member.evaluation.checkpoint == 'best' else values[-1]


def member_configs(config: Any) -> dict[Member, Any]:
    """The config of each run; models differ in head and loss only, and in what they read.

    Raises:
      ConfigError: a value that cannot be used, a model that sets anything else, an unknown
        reference, or nothing to train.
      DataError: a workload that the data do not have.
    """
    config_lib.check(config, KEYS)
    settings = config.compare
    known = workloads_of(config.data.path)
    if known and (unknown := [w for w in settings.workloads if w not in known]):
        raise DataError(f'config.compare.workloads: {unknown} not in {config.data.path}, expected '
                        f'some of {known}')
    if unknown := set(settings.models) - set(settings.sections):
        raise ConfigError(f'config.compare.models: {sorted(unknown)}, expected some of '
                          f'{tuple(settings.sections)}')
    if not (settings.workloads and settings.models and settings.seeds):
        raise ConfigError('config.compare: no workload, no model or no seed')
    if settings.reference not in settings.models:
        raise ConfigError(f'config.compare.reference={settings.reference!r}, expected '
                          f'one of {tuple(settings.models)}')
    if taken := set(settings.models) & set(settings.baselines):
        raise ConfigError(f'config.compare.models: {sorted(taken)}, which are names of baselines')
    if 'probe' in settings.baselines and config.train.tune != 'head':
        raise ConfigError("config.compare.baselines: 'probe' with train.tune="
                          f"{config.train.tune!r}, expected 'head'")
    if 'likelihood' in settings.baselines and not config.model.checkpoint:
        raise ConfigError("config.compare.baselines: 'likelihood' without a checkpoint, expected "
                          'a language model in config.model.checkpoint')
    if settings.reads and config.head.reads != config_lib.KEYS['head.reads'].default:
        raise ConfigError(f'config.head.reads={tuple(config.head.reads)} beside compare.reads, '
                          'expected one of the two')
    for text in settings.reads:
        try:
            HeadConfig('scalar', reads=text.split('+'))
        except ValueError as error:
            raise ConfigError(f'config.compare.reads: {text!r}: {error}') from error
    result = {}
    for workload in settings.workloads:
        for model in settings.models:
            changes = _changes_of(model, settings.sections[model])
            if changes.get('head.name', config.head.name) == 'pairwise':
                raise ConfigError(f'config.compare.sections: {model!r} has the pairwise head, '
                                  'which gives no reward of a response alone, of which the tables '
                                  'are; expected another head')
            for reads, seed in itertools.product(settings.reads or ('',), settings.seeds):
                member = copy.deepcopy(config)
                with member.unlocked():
                    del member.compare
                member.workload, member.seed = workload, seed
                member.update_from_flattened_dict(changes)
                if reads:
                    member.head.reads = tuple(reads.split('+'))
                config_lib.check(member)
                result[Member(workload, model, reads, seed)] = member
    return result


def _changes_of(model: str, sections: Any) -> dict[str, Any]:
    """Dotted name -> value of what a model sets in the config of a run."""
    where = f'config.compare.sections.{model}'
    if not isinstance(sections, Mapping | ConfigDict):
        raise ConfigError(f'{where}={sections!r}, expected the sections head, loss and data')
    changes = dict(schema.flatten(sections, {}))
    for name, value in changes.items():
        if name.partition('.')[0] not in ('head', 'loss') and name != 'data.as_chats':
            raise ConfigError(f'{where}: sets {name!r}, expected only keys of head and loss, and '
                              'data.as_chats, so that models differ in nothing else')
        if name not in config_lib.KEYS:
            raise ConfigError(f'{where}: {schema.unknown(name, config_lib.KEYS)}')
        if expected := schema.expected(config_lib.KEYS[name], value):
            raise ConfigError(f'{where}: {name}={value!r}, expected {expected}')
    return changes


def measure(runs: Runs, *, reference: str, replicates: int, level: float,
            seed: int) -> list[dict[str, Any]]:
    """All columns of all models of one workload, ready for JSON.

    Args:
      runs: what is said of the same comparisons in the same order.
      reference: model that the others are compared with.
      replicates: of the bootstrap over opening questions and seeds.
      level: of the intervals.
      seed: of the resampling.

    Returns:
      One row for each model: 'model', 'columns' (name -> value, low, high and the same of the
      difference to the reference), 'parts' (of the difference in the Gaussian divergence, see
      `pooling.Parts`), 'kl' (definition -> mean over seeds), 'seeds' (what the columns are for
      each seed).

    Raises:
      DataError: models that saw different comparisons.
    """
    first = next(iter(runs.values())).own
    if any(not np.array_equal(j.own.comparison_ids, first.comparison_ids) for j in runs.values()):
        raise DataError('the models were evaluated on different comparisons')
    models = list(dict.fromkeys(model for model, _ in runs))
    seeds = list(dict.fromkeys(seed for _, seed in runs))
    weights = resampling.cluster_bootstrap_weights(first.comparison_groups, replicates, seed)
    picks = resampling.picks_of_seeds(len(seeds), replicates, seed)
    values = {
        (model, name): [_evaluate(runs[model, s], column, weights) for s in seeds]
        for model in models for name, column in COLUMNS.items()
    }
    pair_weights = weights[:, first.comparisons[first.pairs[:, 0]]]
    splits = {key: [pooling.split(*j.own.rewards, row, j.own.groups)
                    for row in (None, *pair_weights)] for key, j in runs.items()}
    rows = []
    for model in models:
        columns = {}
        parts = [np.array([pooling.attribute(a, b) for a, b in zip(
            splits[model, s], splits[reference, s], strict=True)]).T for s in seeds]
        for name in COLUMNS:
            own, other = values[model, name], values[reference, name]
            columns[name] = resampling.over_seeds(own, picks, level) | {
                'difference': resampling.over_seeds(_minus(own, other), picks, level)}
        rows.append({
            'model': model,
            'columns': columns,
            'parts': {name: resampling.over_seeds([of_seed[i] for of_seed in parts], picks, level)
                      for i, name in enumerate(pooling.Parts._fields)},
            'kl': {name: float(np.mean([e.function(*runs[model, s].own.rewards, None, first.groups)
                                        for s in seeds]))
                   for name, e in divergences.ESTIMATORS.items()},
            'seeds': {name: [None if v is None else float(v[0]) for v in values[model, name]]
                      for name in COLUMNS},
        })
    return rows


def mechanism(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What changes with lambda: rows with one head and targets of +1 and -1, by the weight."""
    found = [row for row in rows
             if row['objective'] == _PAPER and row['targets'] == 'label'
             and row['head'] == 'quantile' and row['as_chats'] == rows[0]['as_chats']]
    return [{'model': row['model'], 'lambda': row['huber_weight'],
             'accuracy': row['columns']['accuracy'], 'reward_std': row['columns']['reward_std'],
             'kl': row['kl']} for row in sorted(found, key=lambda row: row['huber_weight'])]


def format_tables(result: Mapping[str, Any]) -> str:
    """The tables as Markdown, for the terminal and for `compare.md`."""
    settings, labels = result['settings'], result['columns']
    level = f"{settings['level']:.0%}"
    parts = [
        f'# Every head on the same batches: {settings["data"]}\n',
        f'Means over the seeds {", ".join(map(str, settings["seeds"]))}; {level} intervals of a '
        'bootstrap over opening questions and seeds. KL(chosen || rejected) in nats.\n',
    ]
    for of_workload in result['results']:
        rows = of_workload['rows']
        trained = [row for row in rows if 'head' in row]
        of = {table: [name for name, column in COLUMNS.items() if column.table == table]
              for table in ('pairs', 'pooling', 'controls', 'spread')}
        parts += [f'\n## {of_workload["workload"]}\n', tables.markdown(_model_lines(trained))]
        if any(len(row['held_out']) > 1 for row in trained):
            parts += ['\nHeld-out loss of each model by what its head reads, in the units of its '
                      'criterion (mean over seeds; the least is chosen):\n',
                      tables.markdown(_held_out_lines(trained))]
        parts += [
            '\nJudged by pairs:\n', tables.markdown(_column_lines(rows, labels, of['pairs'])),
            f'\nDifference to {settings["reference"]}, paired:\n',
            tables.markdown(_column_lines(rows, labels, of['pairs'], difference=True)),
            '\nWhat the Gaussian estimate is made of: the product of these two, and a little of '
            'unequal variances:\n',
            tables.markdown(_column_lines(rows, labels, of['pooling'])),
            f'\nWhat the difference to {settings["reference"]} is made of, in nats: less variance '
            'within pairs, less between them, each relative to the squared mean margin, and '
            'unequal variances of the sides:\n',
            tables.markdown(_part_lines(rows)),
            '\nAccuracy by length, and what of it the own prompt adds in place of the prompt of '
            'another pair:\n', tables.markdown(_column_lines(rows, labels, of['controls'])),
            '\nThe spread (standard deviation of the predicted distribution of a response):\n',
            tables.markdown(_column_lines(trained, labels, of['spread'])),
        ]
        if of_workload['truth']:
            parts += ['\nAgainst the true distributions (mean over seeds [least, most]):\n',
                      tables.markdown(_truth_lines(of_workload['truth']))]
        if len(of_workload['mechanism']) > 1:
            parts += ['\nWhat the quantile Huber term does to the scale of the rewards, and what '
                      'follows it (mean over seeds; (!): not a KL divergence):\n',
                      tables.markdown(_mechanism_lines(of_workload['mechanism'],
                                                         result['estimators']))]
    return '\n'.join(parts) + '\n'


def _train(member: Any, path: str) -> dict[str, Any]:
    """Trains a run and says what it cost; of a run that is done, what it cost then."""
    record = os.path.join(path, 'cost.json')
    outcome = train(member, path)
    if outcome.seconds_per_step is not None or not os.path.exists(record):
        workdir.write_json(record, outcome._asdict())
    return workdir.read_json(record)


def _cost(costs: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [c['seconds_per_step'] for c in costs if c['seconds_per_step'] is not None]
    return {'parameters': costs[0]['parameters'],
            'seconds_per_step': float(np.median(measured)) if measured else None}


def _describe(member: Any) -> dict[str, Any]:
    loss = config_lib.loss_config(member)
    return {'head': member.head.name, 'members': member.head.members, 'objective': loss.objective,
            'targets': loss.targets, 'huber_weight': loss.huber_weight,
            'as_chats': member.data.as_chats}


def _evaluate(j: Judged, column: Column, weights: np.ndarray) -> np.ndarray | None:
    """[1 + r] the value and its replicates; None where it is not defined."""
    p = j.own
    owner = p.comparisons[p.pairs[:, 0]] if column.of_pairs else p.comparisons
    try:
        statistic = column.statistic(j)
        return np.array([statistic(None), *(statistic(row) for row in weights[:, owner])])
    except Undefined:
        return None


def _minus(a: list[np.ndarray | None], b: list[np.ndarray | None]) -> list[np.ndarray | None]:
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


def _against_truth(config: Any, runs: Runs) -> list[dict[str, Any]]:
    """How the distributions of each model compare with the true ones, if the data are generated."""
    if config.data.path != sources.DEMO:
        return []
    settings, first = config.data.demo, next(iter(runs.values())).own
    generated = demo.generate(config.workload, 'test', settings.test, settings.seed,
                              settings.annotators)
    truth_of = {comparison.id: truths for comparison, truths
                in zip(generated.comparisons, generated.truths, strict=True)}
    place = np.arange(len(first.comparisons)) - np.searchsorted(first.comparisons,
                                                                first.comparisons)
    truths = [truth_of[str(first.comparison_ids[c])][k]
              for c, k in zip(first.comparisons, place, strict=True)]
    truth, items = demo.population(truths), np.arange(len(truths))
    models = dict.fromkeys(model for model, _ in runs)
    n, rows = config.head.num_quantiles, []
    for model in models:
        # All quantiles of a single number are that number.
        matches = [worlds.match(truth, items, np.broadcast_to(j.own.quantiles, (len(items), n)),
                                heads.taus(n))
                   for (name, _), j in runs.items() if name == model]
        rows.append({'model': model} | {
            key: [None if np.isnan(x) else float(x) for x in (getattr(m, key) for m in matches)]
            for key in _TRUTH})
    return rows


_TRUTH = {'w1_shift': 'W1, shifted', 'w1_affine': 'W1, affine', 'coverage_mae': 'coverage MAE',
          'crossing': 'crossing', 'spread_ratio': 'spread ratio',
          'spread_correlation': 'spread correlation', 'outer_rank': 'rank(q_low, mean)'}


def _model_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    chosen = any(len(row['held_out']) > 1 for row in rows)
    lines = [['model', 'head', 'objective', 'parameters', 'ms a step'] + ['reads'] * chosen]
    for row in rows:
        objective = row['objective']
        if objective == _PAPER:
            objective += f', lambda {row["huber_weight"]:g}' + (
                '' if row['targets'] == 'label' else f', targets {row["targets"]}')
        head = row['head'] if row['members'] == 1 else f'{row["members"]} x {row["head"]}'
        seconds = row['seconds_per_step']
        lines.append([row['model'], head, objective, f'{row["parameters"]:,}',
                      '-' if seconds is None else f'{1000 * seconds:.0f}']
                     + [row['reads']] * chosen)
    return lines


def _held_out_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    reads = list(dict.fromkeys(name for row in rows for name in row['held_out']))
    return [['model', *reads], *([row['model'], *(f'{row["held_out"][name]:.3f}' for name in reads)]
                                 for row in rows)]


def _column_lines(rows: list[dict[str, Any]], labels: Mapping[str, str], names: list[str],
                  *, difference: bool = False) -> list[list[str]]:
    lines = [['model', *(labels[name] for name in names)]]
    for row in rows:
        cells = [row['columns'][name] for name in names]
        lines.append([row['model'], *(
            tables.enclosed(c['difference'], sign='+') if difference else tables.enclosed(c)
            for c in cells)])
    return lines


def _part_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    lines = [['model', 'Gaussian', 'within pairs', 'between pairs', 'unequal variances']]
    return lines + [
        [row['model'], *(tables.enclosed(cell, sign='+') for cell in row['parts'].values())]
        for row in rows]


def _truth_lines(rows: list[dict[str, Any]]) -> list[list[str]]:

    def cell(values: list[float | None]) -> str:
        if None in values:
            return '-'
        return f'{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]'

    lines = [['model', *_TRUTH.values()]]
    return lines + [[row['model'], *(cell(row[key]) for key in _TRUTH)] for row in rows]


def _mechanism_lines(rows: list[dict[str, Any]],
                     estimators: Mapping[str, Any]) -> list[list[str]]:
    names = {name: e['label'] if e['is_kl'] else f'(!) {e["label"]}'
             for name, e in estimators.items()}
    lines = [['lambda', 'accuracy', 'std of rewards', *names.values()]]
    lines += [[f'{row["lambda"]:g}', tables.enclosed(row['accuracy']),
               tables.enclosed(row['reward_std']),
               *(f'{row["kl"][name]:.3f}' for name in names)] for row in rows]
    return lines
