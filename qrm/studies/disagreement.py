"""Does a spread know where judges disagree? Models of a comparison against panels of judges.

Axes: n items (pairs, or single responses), K responses of an item, E ensemble members, S seeds,
r bootstrap replicates, W features.

The models are those of a folder of `qrm compare`, trained on one judgement a comparison. Of each
panel (`panels`) they see the texts alone. The spread of a pair is the standard deviation of the
difference of its sides, see `spread_of`; of the Bayesian linear head, which is fitted here, that of
its posterior. Numbers are means over seeds, with intervals of a bootstrap over opening
questions and seeds, as in `compare`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qrm.analysis import diagnostics, evaluate, tables
from qrm.data.comparisons import DataError, DataReport
from qrm.data.encoded import Encoded
from qrm.rewards import metrics, resampling, selection, statistics
from qrm.rewards.metrics import Predictions
from qrm.rewards.statistics import Statistic, Undefined
from qrm.studies import baselines, figures, panels
from qrm.studies.compare import Member
from qrm.studies.panels import Panel
from qrm.training import features, reward_model, schema, workdir
from qrm.training import train as train_lib
from qrm.training.reward_model import RewardModel
from qrm.training.schema import ANY, LEVEL, NOT_NEGATIVE, SHARE, Each, Key, Range, Table
from qrm.training.workdir import WorkdirError

BAYES = 'bayes'  # the Bayesian linear head, which is fitted here

KEYS: Table = {
    'runs': Key(
        '', ANY, "folder of `qrm compare --config=compare:frozen`, whose models are judged"),
    'pandalm': Key('', ANY, "testset-v1.json of WeOpenML/PandaLM; '': left out"),
    'paper': Key('', ANY, "folder of the paper's validation pairs, see `published`; '': left out"),
    'prometheus': Key(
        '', ANY, "vicuna_eval.json of prometheus-eval/prometheus-eval; '': left out"),
    'rules': Key(
        ('quantile:0.1', 'cvar:0.2', 'mean-std:1'), Each(str),
        "by which disputed pairs are chosen from, beside 'mean', as in `evaluation.rules`"),

    # Stated before any panel was read: what would count as an answer.
    'yes.auroc': Key(
        0.5, SHARE, 'a spread knows of disagreement ("yes") if the interval of its AUROC for '
        'disputed pairs, among pairs of about equal margin, is above this; "no" if it is below'),
    'yes.correlation': Key(
        0.0, Range(-1, 1), "the same of its rank correlation with the judges' own spread"),
    'yes.gain': Key(
        0.0, NOT_NEGATIVE, 'a rule helps on disputed pairs if the interval of what it gains over '
        "the mean, as a share of judges, is above this"),

    'analysis.bootstrap': Key(300, Range(20), 'replicates over opening questions and seeds'),
    'analysis.level': Key(0.95, LEVEL, 'of the intervals'),
    'analysis.seed': Key(0, NOT_NEGATIVE, 'of the resampling, and of the shuffled spread'),
}


class Said(NamedTuple):
    """What a model says of the items of a panel.

    Attributes:
      ids: [n] text, of the comparisons.
      groups: [n] integers, equal for items of one opening question.
      margin: [n] reward of the first response less that of the second; of singles the reward.
      spread: [n] standard deviation of it.
      log_ratio: [n] log of the ratio of lengths in tokens; of singles the log of the length.
      predictions: of a head; None of a baseline.
    """

    ids: np.ndarray
    groups: np.ndarray
    margin: np.ndarray
    spread: np.ndarray
    log_ratio: np.ndarray
    predictions: Predictions | None


class _Run(NamedTuple):
    """A run that is judged, where it is, and how much of the backbone it reads."""

    workload: str
    model: str
    seed: int
    folder: str
    reads: int


# Column -> what it is, of disputed items; all are AUROCs.
DISPUTED = {
    'spread': 'the spread',
    'margin': 'a small margin',
    'equal_margin': 'the spread at equal margin',
    'shuffled': 'a shuffled spread at equal margin',
    'length': 'similar length',
}
# Column -> what it is, of the judges' own spread; all are rank correlations.
GRADED = {
    'spread': 'the spread',
    'margin': 'a small margin',
    'partial': 'the spread given the margin',
    'length': 'similar length',
}
# Column -> what it is, of single ratings.
RATED = {
    'rank_correlation_of_reward': 'rank correlation of the reward',
    'coverage_error': 'coverage error',
    'crps': 'CRPS',
    'crps_gain': 'CRPS gained over one constant spread',
    'rank_correlation_with_error': 'rank correlation of the spread with the error',
}


def disagreement(config: Any, folder: str) -> str:
    """Judges all models of `config.runs` by all panels there are.

    Leaves `disagreement.json`, `disagreement.md` and `figures/`.

    Returns:
      The tables and the verdict as Markdown.

    Raises:
      ConfigError: no panel, or no folder of runs.
      DataError, WorkdirError: a panel or a run cannot be read.
    """
    check(config)
    runs, all_panels = find_runs(config.runs), read_panels(config)
    with workdir.lock(folder):
        return _judge(config, folder, runs, all_panels)


def _judge(config: Any, folder: str, runs: Sequence[_Run], all_panels: Sequence[Panel]) -> str:
    """Judges the runs by the panels, and writes what comes out."""
    by_model: dict[tuple[str, str], list[_Run]] = {}
    for run in runs:
        by_model.setdefault((run.workload, run.model), []).append(run)
    measured = {}
    # Those that read most first: others then find what they read among what was computed.
    for key in sorted(by_model, key=lambda key: -by_model[key][0].reads):
        print('\n== ' + ', '.join(key), flush=True)
        said = [_say(run, all_panels) for run in by_model[key]]
        measured[key] = [measure(panel, [of_run[i] for of_run in said], config)
                         for i, panel in enumerate(all_panels)]
    results = {panel.name: [
        {'workload': workload, 'model': model} | measured[workload, model][i]
        for workload, model in by_model] for i, panel in enumerate(all_panels)}
    result = {
        'panels': [{'name': p.name, 'judges': p.judges, 'items': len(p.comparisons),
                    'pairs': _of_pairs(p),
                    'disputed': p.disputed and sum(p.disputed.values())} for p in all_panels],
        'results': results, 'settings': dict(schema.flatten(config, KEYS)),
    }
    result['verdict'] = verdict(result, config.yes)
    text = format_result(result)
    workdir.write_json(os.path.join(folder, 'disagreement.json'), result)
    workdir.write_text(os.path.join(folder, 'disagreement.md'), text)
    if not jax.process_index():
        figures.draw_disagreement(folder, result)
    return text


def check(config: Any) -> None:
    """Checks the config.

    Raises:
      ConfigError: a value that cannot be used, no panel, or no folder of runs.
    """
    schema.check(config, KEYS)
    problems = []
    if not config.runs:
        problems.append("config.runs='', expected the folder of a comparison")
    if not (config.pandalm or config.paper or config.prometheus):
        problems.append('config: pandalm, paper and prometheus are all empty, expected a panel')
    for text in config.rules:
        try:
            selection.parse_rule(text, selection.DISTRIBUTION_KINDS)
        except ValueError as error:
            problems.append(f'config.rules: {error}')
    schema.raise_all(problems)


def read_panels(config: Any) -> list[Panel]:
    """All panels that the config names.

    Raises:
      DataError: see `panels`.
    """
    found = []
    if config.pandalm:
        found.append(panels.read_pandalm(config.pandalm))
    if config.paper:
        found += [panels.read_paper(config.paper, workload) for workload in panels.PAPER_FILES]
    if config.prometheus:
        found.append(panels.read_prometheus(config.prometheus))
    return found


def find_runs(folder: str) -> list[_Run]:
    """The runs of a comparison that were judged there.

    With a Bayesian linear head for each workload, where backbones stayed as they were.

    Raises:
      WorkdirError: it is no folder of a comparison.
    """
    path = os.path.join(folder, 'compare.json')
    values = workdir.read_json(path)
    runs = []
    try:
        seeds = values['settings']['seeds']
        for of_workload in values['results']:
            trained = [row for row in of_workload['rows'] if 'head' in row]
            own = []
            for row in trained:
                reads = min(row['held_out'], key=row['held_out'].get)
                members = [Member(of_workload['workload'], row['model'], reads, s) for s in seeds]
                own += [_Run(m.workload, m.model, m.seed, os.path.join(folder, m.folder),
                             1 + row['reads'].count('+')) for m in members]
            first = max(own, key=lambda run: run.reads)
            frozen = workdir.load_config(first.folder).train.tune == 'head'
            runs += [*own, *([first._replace(model=BAYES)] if frozen else [])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkdirError(f'{path}: not of a comparison ({error!r})') from error
    return runs


def _say(run: _Run, of_panels: Sequence[Panel]) -> list[Said]:
    """What a run says of each panel."""
    config = workdir.load_config(run.folder)
    if run.model != BAYES:
        model = reward_model.load(run.folder, step=config.evaluation.checkpoint, raw=True,
                                  keep=features.place(config, run.folder))
        return [_of_head(model, _encode(config, model, panel)) for panel in of_panels]
    prepared = train_lib.prepare(config, run.folder)
    bayes = baselines.fit_bayes(prepared)
    return [_of_bayes(bayes, _encode(config, prepared.model, panel)) for panel in of_panels]


def _encode(config: Any, model: RewardModel, panel: Panel) -> list[Encoded]:
    """All of a panel in tokens.

    Raises:
      DataError: a row cannot be read.
    """
    report = DataReport(panel.name, 'test', read=len(panel.comparisons))
    encoded = evaluate.read_tokens(config.data, model, panel.comparisons, report, ratings=True)
    if report.kept < report.read:
        print(report.format(), flush=True)
    return encoded


def _of_head(model: RewardModel, encoded: Sequence[Encoded]) -> Said:
    head, outputs = model.network.head, model.predict(encoded)
    p = metrics.predictions_of(encoded, outputs, head, model.loss)
    means, lengths = (values.astype(np.float64).reshape(len(encoded), -1)
                      for values in (p.means, np.log(np.maximum(p.lengths, 1))))
    members = head.read(np.stack(outputs)).members
    spread = spread_of(*(np.asarray(values, np.float64) for values in (members.mean, members.std)))
    return Said(p.comparison_ids, p.comparison_groups, _first_less_second(means),
                statistics.beyond_rounding(spread, p.means), _first_less_second(lengths), p)


def spread_of(means: np.ndarray, stds: np.ndarray) -> np.ndarray:
    """Standard deviation [n] of the margin of pairs, and of the reward of single responses.

    Of single responses the mean over items is taken from each member, whose offset preferences
    leave open; of pairs see `metrics.margin_std`.

    Args:
      means, stds: [n, K, E] of the reward by each member, with K of 1 or 2.
    """
    if means.shape[1] == 1:  # beside something that is 0 of all members
        means, stds = (np.concatenate([values, np.zeros_like(values)], axis=1)
                       for values in (means - means.mean(axis=0), stds))
    return metrics.margin_std(means, stds)


def _of_bayes(bayes: baselines.Bayes, encoded: Sequence[Encoded]) -> Said:
    found = [_first_less_second(of_item) for of_item in bayes.features(encoded)]
    lengths = np.log([[max(len(r), 1) for r in item.responses] for item in encoded])
    mean, std = bayes.predict(np.array(found))
    groups = {group: i for i, group in enumerate(dict.fromkeys(item.group for item in encoded))}
    return Said(np.array([item.id for item in encoded]),
                np.array([groups[item.group] for item in encoded]), mean, std,
                _first_less_second(lengths), None)


def _of_pairs(panel: Panel) -> bool:
    return len(panel.comparisons[0].responses) == 2


def _first_less_second(values: np.ndarray) -> np.ndarray:
    """Differences of pairs, along the last axis but for features; of singles what they are."""
    axis = 0 if values.ndim == 2 and values.shape[1] > 2 else 1
    first = np.take(values, 0, axis)
    return first - np.take(values, 1, axis) if values.shape[axis] == 2 else first


def measure(panel: Panel, said: Sequence[Said], config: Any) -> dict[str, Any]:
    """All numbers of a model on a panel, means over seeds with intervals; ready for JSON.

    Args:
      panel: the panel.
      said: by the model of each seed.
      config: of the study.

    Returns:
      'items', 'seeds', and name of a table -> column -> 'value', 'low', 'high'. There are
      'disputed' (AUROCs for items on which the judges differ), 'graded' (rank correlations with the
      judges' spread), 'rated' (of single ratings) and 'choices' (what rules gain on disputed
      pairs), as far as the panel has them.
    """
    first, settings = said[0], config.analysis
    if any(not np.array_equal(one.ids, first.ids) for one in said):
        raise DataError(f'{panel.name}: models of different seeds read different items')
    weights = resampling.cluster_bootstrap_weights(
        first.groups, settings.bootstrap, settings.seed)
    picks = resampling.picks_of_seeds(len(said), settings.bootstrap, settings.seed)

    def over_seeds(statistic_of: Any) -> dict[str, float | None]:
        values = []
        for one in said:
            try:
                statistic = statistic_of(one)
                values.append(np.array([statistic(None), *map(statistic, weights)]))
            except Undefined:
                values.append(None)
        return resampling.over_seeds(values, picks, settings.level)

    found: dict[str, Any] = {'items': len(first.ids), 'seeds': len(said)}
    pairs = _of_pairs(panel)
    if panel.disputed is not None:
        found['disputed'] = {name: over_seeds(
            lambda one, name=name: _of_disputed(name, panel, one, settings.seed))
            for name in DISPUTED if pairs or name not in ('margin', 'length')}
    found['graded'] = {name: over_seeds(lambda one, name=name: _of_graded(name, panel, one))
                       for name in GRADED if pairs or name not in ('margin', 'length')}
    if first.predictions is None:
        return found
    if not pairs:
        found['rated'] = {name: over_seeds(
            lambda one, name=name: _of_ratings(name, one.predictions)) for name in RATED}
    elif panel.disputed is not None:
        found['choices'] = {text: over_seeds(
            lambda one, text=text: _of_choices(text, panel, one.predictions))
            for text in config.rules}
    return found


def _of_disputed(name: str, panel: Panel, said: Said, seed: int) -> Statistic:
    """An AUROC of `DISPUTED`."""
    disputed = np.array([panel.disputed[str(i)] for i in said.ids])
    if name in ('spread', 'equal_margin', 'shuffled') and statistics.is_constant(said.spread):
        raise Undefined('the spread is constant')
    if name == 'margin':
        return statistics.auroc(-np.abs(said.margin), disputed)
    if name == 'length':
        return statistics.auroc(-np.abs(said.log_ratio), disputed)
    if name == 'spread':
        return statistics.auroc(said.spread, disputed)
    spread = said.spread
    if name == 'shuffled':
        spread = np.random.default_rng(seed).permutation(spread)
    return statistics.auroc(spread, disputed, _strata(panel, said))


def _strata(panel: Panel, said: Said) -> np.ndarray:
    """[n] tenths by the size of the margin; of single responses by the reward."""
    return statistics.tenths(np.abs(said.margin) if _of_pairs(panel) else said.margin)


def _of_graded(name: str, panel: Panel, said: Said) -> Statistic:
    """A rank correlation of `GRADED`."""
    target = np.array([panel.spread[str(i)] for i in said.ids])
    small = -np.abs(said.margin) if _of_pairs(panel) else said.margin
    if name == 'margin':
        return statistics.rank_correlation(small, target)
    if name == 'length':
        return statistics.rank_correlation(-np.abs(said.log_ratio), target)
    own = statistics.rank_correlation(said.spread, target)
    if name == 'spread':
        return own
    beside, between = (statistics.rank_correlation(small, target),
                       statistics.rank_correlation(said.spread, small))

    def partial(weights: np.ndarray | None) -> float:
        """Of two variables given a third (Kendall & Stuart), of ranks."""
        a, b, c = own(weights), beside(weights), between(weights)
        rest = (1.0 - b**2) * (1.0 - c**2)
        if rest <= 0.0:
            raise Undefined('one of the two is a function of the margin')
        return (a - b * c) / np.sqrt(rest)

    return partial


def _needs_spread(p: Predictions) -> None:
    """Raises `Undefined` of a model that predicts single numbers."""
    if not p.spreads.any():
        raise Undefined('the model predicts single numbers')


def _of_ratings(name: str, p: Predictions) -> Statistic:
    """A number of `RATED`; quantiles are mapped to ratings by the line that fits rewards best."""
    rewards, ratings = p.means.astype(np.float64), p.ratings.astype(np.float64)
    if name == 'rank_correlation_of_reward':  # needs no line
        return statistics.rank_correlation(rewards, ratings)
    if statistics.is_constant(rewards):
        raise Undefined('all rewards are equal')
    slope, intercept = np.polyfit(rewards, ratings, 1)
    if slope <= 0.0:
        raise Undefined('ratings do not rise with the reward')
    quantiles = intercept + slope * np.sort(p.quantiles.astype(np.float64), axis=1)
    if name != 'crps':  # of single numbers their absolute error
        _needs_spread(p)
    return diagnostics.rating_statistics(quantiles, p.taus, rewards, p.spreads, ratings)[name]


def _of_choices(text: str, panel: Panel, p: Predictions) -> Statistic:
    """Share of judges that a rule's choice wins over that of the mean, over disputed pairs."""
    disputed = np.array([panel.disputed[str(i)] for i in p.comparison_ids], np.float64)
    if disputed.sum() < diagnostics.MIN_ITEMS:
        raise Undefined('too few disputed pairs')
    _needs_spread(p)  # by single numbers every rule chooses as the mean does
    shares = p.ratings.astype(np.float64).reshape(-1, 2)

    def won(rule: str) -> np.ndarray:
        scores = selection.scores_of(selection.parse_rule(rule), p).astype(np.float64)
        ahead = statistics.halved_ties(_first_less_second(scores.reshape(-1, 2)))
        return ahead * shares[:, 0] + (1.0 - ahead) * shares[:, 1]

    gain = won(text) - won('mean')

    def statistic(weights: np.ndarray | None) -> float:
        count = disputed if weights is None else disputed * weights
        if not count.any():
            raise Undefined('no disputed pair is drawn')
        return float(np.average(gain, weights=count))

    return statistic


def verdict(result: Mapping[str, Any], bounds: Any) -> list[str]:
    """Answers to the questions that the config states, by its bounds; a line for each answer."""
    lines = []
    questions = (
        ('disputed', 'equal_margin', bounds.auroc, 'its spread finds what is disputed'),
        ('graded', 'partial', bounds.correlation, "its spread follows the judges'"))
    for panel in result['panels']:
        for table, column, bound, what in questions:
            answers: dict[str, list[str]] = {}
            for row in result['results'][panel['name']]:
                cell = row.get(table, {}).get(column)
                if cell is None:
                    continue
                answers.setdefault(_answer(cell, bound), []).append(
                    f"{row['model']} ({row['workload']})")
            for answer, models in answers.items():
                lines.append(f"{panel['name']}, {panel['judges']}: {what}: {answer}: "
                             + ', '.join(models))
        gains = [(row, rule, cell) for row in result['results'][panel['name']]
                 for rule, cell in row.get('choices', {}).items() if cell['value'] is not None]
        helped = [f"{row['model']} ({row['workload']}) by {rule}" for row, rule, cell in gains
                  if _answer(cell, bounds.gain) == 'yes']
        if gains:
            lines.append(f"{panel['name']}: rules that choose better than the mean on disputed "
                         f"pairs: {', '.join(helped) or 'none'} (of {len(gains)})")
    return lines


def _answer(cell: Mapping[str, float | None], bound: float) -> str:
    if cell['value'] is None:
        return 'not defined'
    if cell['low'] > bound:
        return 'yes'
    return 'no' if cell['high'] < bound else 'not shown'


_TABLES = {
    'disputed': ('AUROC for items on which the judges differ, by', DISPUTED),
    'graded': ("Rank correlation with the standard deviation of the judges' numbers, of", GRADED),
    'rated': ('Against the mean rating, to which a line maps rewards', RATED),
}


def format_result(result: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    settings = result['settings']
    level = f"{settings['analysis.level']:.0%}"
    parts = ['# Does a spread know where judges disagree?\n',
             f'Means over seeds; {level} intervals of a bootstrap over opening questions and '
             'seeds.\n']
    for panel in result['panels']:
        rows = result['results'][panel['name']]
        disputed = ('' if panel['disputed'] is None
                    else f", who differ on {panel['disputed']} of {panel['items']}")
        parts.append(f"\n## {panel['name']}: {panel['judges']}{disputed}\n")
        for table, (title, columns) in _TABLES.items():
            known = [row for row in rows if table in row]
            if not known:
                continue
            names = [name for name in columns if name in known[0][table]]
            # A single response has no margin: its reward stands in its place.
            words = [columns[name] if panel['pairs'] else columns[name].replace('margin', 'reward')
                     for name in names]
            lines = [['workload', 'model', *words]]
            lines += [[row['workload'], row['model'],
                       *(_cell(row[table][name]) for name in names)] for row in known]
            parts += [f'{title}:\n', tables.markdown(lines), '']
        chosen = [row for row in rows if 'choices' in row]
        if chosen:
            rules = list(chosen[0]['choices'])
            lines = [['workload', 'model', *rules]]
            lines += [[row['workload'], row['model'],
                       *(_cell(row['choices'][rule], sign='+') for rule in rules)]
                      for row in chosen]
            parts += ['Share of judges that a rule gains over the mean, on disputed pairs:\n',
                      tables.markdown(lines), '']
    parts += ['\n## By the bounds that the config states\n',
              f'Yes: an interval above {settings["yes.auroc"]:g}, of the AUROC for what is '
              'disputed (among pairs of about equal margin); above '
              f'{settings["yes.correlation"]:g}, of the rank correlation with the judges\' spread '
              f'(given the margin); above {settings["yes.gain"]:g}, of what a rule gains over the '
              'mean. No: an interval below the first or the second. Not shown: else.\n',
              *(f'- {line}' for line in result['verdict'])]
    return '\n'.join(parts) + '\n'


def _cell(cell: Mapping[str, float | None], *, sign: str = '') -> str:
    if cell['value'] is None:
        return '-'
    low, high = (f'{cell[key]:{sign}.3f}' for key in ('low', 'high'))
    return f"{cell['value']:{sign}.3f} [{low}, {high}]"
