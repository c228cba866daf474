"""The paper's table beside real estimates of the same thing, from saved predictions.

Table 1 of Kim, Hong & Kim reports KL(chosen || rejected) of a scalar and a quantile reward
model. Here each cell is computed by four estimators of that divergence and by five formulas that
are easily mistaken for it, with what is needed to tell them apart: intervals, a null, the value
after rescaling the rewards, and the value on as few pairs as the paper's code validates on; and
the divergence of pooled rewards is split into what is within pairs and what is between prompts.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from qrm.analysis import divergences, pooling
from qrm.data.comparisons import DataError
from qrm.rewards import metrics, resampling, statistics
from qrm.rewards.metrics import Predictions

# Kim, Hong & Kim, Table 1: GPT-2, all of Anthropic HH.
PUBLISHED = {
    'helpful': {'scalar': 4.914, 'quantile': 6.779},
    'harmless': {'scalar': 6.833, 'quantile': 7.291},
}

# Pairs of the validation files in the authors' repository, min-seong-kim/QR-RLHF at c0f8e59. That
# the table is of these is inferred: the repository holds no others.
PUBLISHED_PAIRS = {'helpful': 79, 'harmless': 65}
_SUBSETS = 100  # of as many pairs, drawn from the test pairs
_RANGE = (0.05, 0.95)

# (workload, model) -> predictions on the test pairs of the workload.
Runs = Mapping[tuple[str, str], Predictions]


def build_table(runs: Runs, *, replicates: int, null_draws: int, level: float, seed: int,
                source: str) -> dict[str, Any]:
    """All numbers of the table, ready for JSON.

    Models of one workload are resampled together, so that their differences are paired.

    Args:
      runs: predictions; those of one workload hold the same pairs in the same order.
      replicates: replicates of the prompt-clustered bootstrap.
      null_draws: draws of the within-pair swap null.
      level: of the intervals.
      seed: of the resampling.
      source: what the models are and what they were evaluated on, for the statement.

    Returns:
      'rows', 'differences' (of each two models of a workload), 'per_quantile', 'published',
      'estimators', 'statement' and 'settings'.

    Raises:
      DataError: too few opening questions, or workloads whose models saw different pairs.
    """
    rows, differences, per_quantile = [], [], []
    for workload in dict.fromkeys(workload for workload, _ in runs):
        members = {model: p for (name, model), p in runs.items() if name == workload}
        first = next(iter(members.values()))
        resampling.check_groups(first.groups.tolist())
        if any(not np.array_equal(p.ids, first.ids) for p in members.values()):
            raise DataError(f'{workload}: the models were evaluated on different pairs')
        weights = resampling.cluster_bootstrap_weights(first.groups, replicates, seed)
        cells = {
            model: _divergences(p, weights, null_draws, seed, level) for model, p in members.items()
        }
        splits = {model: _splits(p, weights) for model, p in members.items()}
        for model, predictions in members.items():
            rows.append({'workload': workload, 'model': model}
                        | _metric_columns(predictions, weights, level)
                        | {'kl': {name: _cell(name, d) for name, d in cells[model].items()},
                           'split': _with_intervals(splits[model], level),
                           'matched': _matched(predictions, workload, seed)})
            per_quantile += _per_quantile(workload, model, predictions)
        differences += [
            {'workload': workload, 'model': model, 'reference': reference,
             'kl': {name: _difference(cells[model][name], cells[reference][name], level)
                    for name in divergences.ESTIMATORS},
             'parts': _with_intervals(
                 [pooling.attribute(a, b)
                  for a, b in zip(splits[model], splits[reference], strict=True)], level)}
            for reference, model in itertools.combinations(members, 2)]
    return {
        'rows': rows,
        'differences': differences,
        'per_quantile': per_quantile,
        'published': PUBLISHED,
        'estimators': {e.name: {'label': e.label, 'is_kl': e.is_kl, 'note': e.note}
                       for e in divergences.ESTIMATORS.values()},
        'statement': statement(rows, source),
        'settings': {'units': 'nats', 'direction': 'KL(chosen || rejected)',
                     'score': 'mean of the quantiles', 'bootstrap': replicates,
                     'null_draws': null_draws, 'level': level, 'seed': seed, 'source': source},
    }


def required_auc(kl: float) -> float:
    """AUC of two Gaussians of equal variance whose KL divergence is `kl` nats.

    KL = d^2 / 2 and AUC = Phi(d / sqrt 2), d the distance of the means in standard deviations.
    """
    return float(scipy.stats.norm.cdf(math.sqrt(kl)))


def statement(rows: list[dict[str, Any]], source: str) -> str:
    """The sentence that says what a comparison with the published cells shows, and what not."""
    real = [cell['value'] for row in rows for cell in row['kl'].values() if cell['is_kl']]
    aucs = [row['auc'] for row in rows]
    published = [value for cells in PUBLISHED.values() for value in cells.values()]
    return (
        f'The published cells are of a GPT-2 that was fine-tuned and then trained on Anthropic HH; '
        f'the other numbers are of {source}. The real estimators give {min(real):.3f} to '
        f'{max(real):.3f} nats at an AUC of {min(aucs):.3f} to {max(aucs):.3f}; between Gaussians '
        f'of equal variance the published {min(published)} to {max(published)} nats would need an '
        f'AUC of {required_auc(min(published)):.3f} to {required_auc(max(published)):.3f}. Known '
        f"from the authors' code: it validates on {PUBLISHED_PAIRS['helpful']} helpful and "
        f"{PUBLISHED_PAIRS['harmless']} harmless pairs, drives the quantiles of the chosen side to "
        f'their own mean, and reads quantile rewards at another token than scalar ones, most often '
        f'in the padding. Inferred: that the table is of those pairs, and that its cells are '
        f'histograms with a small constant, which give numbers of their size there: of 30 or 50 '
        f'bins for an AUC of .8, but of 100 bins for one of .5 too, so that they fix neither the '
        f'bins nor the AUC; the script that made it is not public. A divergence of pooled rewards '
        f'also depends on how much they vary between prompts, so a larger one need not mean better '
        f'discrimination within pairs, which is what accuracy measures: the split above has both '
        f'parts.'
    )


def format_table(table: Mapping[str, Any]) -> str:
    """The table as Markdown, for the terminal and for `table.md`."""
    level = f"{table['settings']['level']:.0%}"
    estimators = table['estimators'].values()
    parts = [
        '# KL(chosen || rejected), in nats\n',
        'The reward is the mean of the quantiles. Published: Kim, Hong & Kim, Table 1 (GPT-2, all '
        'of Anthropic HH).\n',
        '## The models\n', markdown(_model_lines(table)),
        '\n## The table, by every definition\n', *_titled(summary(table)),
        *_matched_parts(table),
        '\nEstimates of KL(chosen || rejected):\n',
        *(f"- {e['label']}: {e['note']}" for e in estimators if e['is_kl']),
        '\nNot KL, marked (!): formulas that are easily mistaken for it:\n',
        *(f"- {e['label']}: {e['note']}" for e in estimators if not e['is_kl']),
        f'\n## Each cell with its {level} interval\n',
        'Intervals: bootstrap over opening questions. Null: median under within-pair swaps, where '
        'the truth is 0. Halved, doubled: the value after rescaling the rewards, which no KL '
        'notices. A resample holds fewer different rewards and so more empty bins: the interval '
        'of a definition that counts them can lie off its value.\n',
        markdown(_cell_lines(table, level)),
    ]
    parts += [
        '\n## Within pairs and between prompts\n',
        f'The Gaussian estimate is that within pairs (of rewards around the mean of their pair) '
        f'times the share of the variance that is within pairs, plus what unequal variances of the '
        f'two sides add; {level} intervals.\n', markdown(_split_lines(table))]
    if table['differences']:
        parts += [f'\n## Differences between models, paired, with {level} intervals\n',
                  *_titled(_by_workload(table['differences'],
                                        functools.partial(_difference_lines, table))),
                  'What the differences of the Gaussian estimate are made of, in nats: less '
                  'variance within pairs and less between them, each relative to the squared mean '
                  'margin, and unequal variances of the sides:\n',
                  markdown(_parts_lines(table))]
    if table['per_quantile']:
        parts += ['\n## Each quantile by itself\n', markdown(_quantile_lines(table))]
    if 'bayes' in table:
        parts += ['\n## The best possible on this generated data\n', markdown(_bayes_lines(table))]
    return '\n'.join([*parts, '\n' + table['statement'] + '\n'])


def summary(table: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """The table by every definition: workload -> lines of cells, a column for each model."""
    return _by_workload(table['rows'], functools.partial(
        _summary_lines, table, lambda row, name: f"{row['kl'][name]['value']:.3f}"))


def _divergences(predictions: Predictions, weights: np.ndarray, null_draws: int, seed: int,
                 level: float) -> dict[str, divergences.Divergence]:
    chosen, rejected = predictions.rewards
    return {
        name: divergences.summarise(chosen, rejected, predictions.groups, estimator, weights,
                                    null_draws, seed, level)
        for name, estimator in divergences.ESTIMATORS.items()
    }


def _splits(predictions: Predictions, weights: np.ndarray) -> list[pooling.Split]:
    """Of all pairs, and of each replicate."""
    chosen, rejected = predictions.rewards
    return [pooling.split(chosen, rejected, each, predictions.groups)
            for each in (None, *weights)]


def _with_intervals(values: Sequence[NamedTuple], level: float) -> dict[str, dict[str, float]]:
    """Each number of the first, with its interval over the others."""
    columns = np.array(values, np.float64).T
    intervals = [resampling.interval(column[1:], level) for column in columns]
    return {name: {'value': float(column[0]), 'low': low, 'high': high}
            for name, column, (low, high) in zip(
                values[0]._fields, columns, intervals, strict=True)}


def _matched(predictions: Predictions, workload: str, seed: int) -> dict[str, Any] | None:
    """What subsets of as many pairs as published give; None if there are no more pairs."""
    n, (chosen, rejected) = PUBLISHED_PAIRS.get(workload, 0), predictions.rewards
    if not n or n >= len(chosen):
        return None
    return {'n': n} | of_subsets(chosen, rejected, predictions.groups, n, _SUBSETS, seed)


def of_subsets(chosen: np.ndarray, rejected: np.ndarray, clusters: np.ndarray, n: int, draws: int,
               seed: int) -> dict[str, Any]:
    """Accuracy, AUC and every definition on random subsets of n pairs.

    Args:
      chosen, rejected, clusters: as of `divergences`.
      n: pairs of a subset, drawn without replacement.
      draws: subsets.
      seed: of the draws.

    Returns:
      'accuracy', 'auc' and, by definition, 'kl' in nats: mean and 5% to 95% range over the subsets.
    """
    drawn = subsets(len(chosen), n, draws, seed)
    return {
        'accuracy': spread_of([statistics.accuracy(chosen[i] - rejected[i])(None)
                               for i in drawn]),
        'auc': spread_of([statistics.pooled_auc(chosen[i], rejected[i])(None) for i in drawn]),
        'kl': {name: spread_of([e.function(chosen[i], rejected[i], None, clusters[i])
                                for i in drawn])
               for name, e in divergences.ESTIMATORS.items()},
    }


def subsets(pairs: int, n: int, draws: int, seed: int) -> list[np.ndarray]:
    """Indices [n] of some pairs each, drawn without replacement."""
    rng = np.random.default_rng(seed)
    return [rng.choice(pairs, n, replace=False) for _ in range(draws)]


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Mean and 5% to 95% range of some draws."""
    low, high = np.quantile(values, _RANGE)
    return {'mean': float(np.mean(values)), 'low': float(low), 'high': float(high)}


def _cell(name: str, d: divergences.Divergence) -> dict[str, Any]:
    numbers = {key: value for key, value in d._asdict().items() if key != 'replicates'}
    return numbers | {'is_kl': divergences.ESTIMATORS[name].is_kl}


def _difference(a: divergences.Divergence, b: divergences.Divergence,
                level: float) -> dict[str, float]:
    low, high = resampling.interval(a.replicates - b.replicates, level)
    return {'value': a.value - b.value, 'low': low, 'high': high}


def _metric_columns(predictions: Predictions, weights: np.ndarray, level: float) -> dict[str, Any]:
    chosen, rejected = predictions.rewards
    correct = statistics.halved_ties(chosen - rejected)
    low, high = resampling.interval(weights @ correct / weights.sum(axis=1), level)
    summary = metrics.summarise(predictions)
    return summary | {'std': summary['reward_std'], 'accuracy_low': low, 'accuracy_high': high}


def _per_quantile(workload: str, model: str, predictions: Predictions) -> list[dict[str, Any]]:
    """Accuracy and divergences of each quantile as if it were the reward."""
    if len(predictions.taus) == 1:
        return []
    rows = []
    for i, tau in enumerate(predictions.taus):
        chosen, rejected = (side[:, i].astype(np.float64)
                            for side in (predictions.chosen, predictions.rejected))
        accuracy = np.mean(statistics.halved_ties(chosen - rejected))
        kl = {name: e.function(chosen, rejected, None, predictions.groups)
              for name, e in divergences.ESTIMATORS.items() if e.is_kl}
        rows.append({'workload': workload, 'model': model, 'tau': float(tau),
                     'accuracy': float(accuracy), 'kl': kl})
    return rows


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table, padded so that it can be read as text too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ['| ' + ' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + ' |'
            for line in lines]
    return '\n'.join([rows[0], '| ' + ' | '.join('-' * w for w in widths) + ' |', *rows[1:]])


def _model_lines(table: Mapping[str, Any]) -> list[list[str]]:
    lines = [['workload', 'model', 'pairs', 'accuracy', 'AUC', 'NLL', 'ECE', 'margin', 'std',
              'crossing']]
    lines += [
        [row['workload'], row['model'], str(row['n']),
         f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]",
         *(f'{row[key]:.3f}' for key in ('auc', 'nll', 'ece', 'margin', 'std')),
         f"{row['crossing_rate']:.1%}"]
        for row in table['rows']
    ]
    return lines


def _label(estimator: Mapping[str, Any]) -> str:
    return estimator['label'] if estimator['is_kl'] else f"(!) {estimator['label']}"


def _by_workload(
    rows: Sequence[Mapping[str, Any]],
    lines: Callable[[list[Mapping[str, Any]]], list[list[str]]],
) -> dict[str, list[list[str]]]:
    """Workload -> the lines that its rows give."""
    return {workload: lines(list(own))
            for workload, own in itertools.groupby(rows, lambda row: row['workload'])}


def _titled(lines_of: Mapping[str, list[list[str]]]) -> list[str]:
    """The workloads' tables, each under its name."""
    return [part for workload, lines in lines_of.items()
            for part in (f'{workload}:\n', markdown(lines), '')]


def _summary_lines(table: Mapping[str, Any], cell: Callable[[Mapping[str, Any], str], str],
                   rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One line for each definition, one column for each model, as in the paper."""
    published = [table['published'].get(row['workload'], {}).get(row['model']) for row in rows]
    lines = [['', *(row['model'] for row in rows)],
             ['published', *('-' if one is None else f'{one:.3f}' for one in published)]]
    lines += [[_label(e), *(cell(row, name) for row in rows)]
              for name, e in table['estimators'].items()]
    return lines


def _matched_parts(table: Mapping[str, Any]) -> list[str]:
    """The table on as few pairs as published, where there are more."""
    rows = [row for row in table['rows'] if row['matched']]
    if not rows:
        return []
    counts = ' and '.join(f'{n} of {workload}' for workload, n in dict.fromkeys(
        (r['workload'], r['matched']['n']) for r in rows))
    return ["\n## With as many pairs as the paper's code validates on\n",
            f'{counts}: mean and 5% to 95% range of {_SUBSETS} random subsets of the test pairs.\n',
            *_titled(_by_workload(rows, functools.partial(
                _summary_lines, table, lambda row, name: ranged(row['matched']['kl'][name]))))]


def ranged(cell: Mapping[str, float]) -> str:
    """A mean and its range, to three digits or two places."""
    mean, low, high = (
        f'{cell[key]:.{max(0, 2 - int(math.log10(max(abs(cell[key]), 1.0))))}f}'
        for key in ('mean', 'low', 'high'))
    return f'{mean} [{low}, {high}]'


def _cell_lines(table: Mapping[str, Any], level: str) -> list[list[str]]:
    lines = [['workload', 'model', 'definition', 'value', f'{level} interval', 'null', 'halved',
              'doubled']]
    lines += [
        [row['workload'], row['model'], _label(e), f"{cell['value']:.3f}",
         f"[{cell['low']:.3f}, {cell['high']:.3f}]", f"{cell['null']:.3f}", f"{cell['half']:.3f}",
         f"{cell['double']:.3f}"]
        for row in table['rows'] for name, e in table['estimators'].items()
        for cell in (row['kl'][name],)
    ]
    return lines


def _difference_lines(table: Mapping[str, Any],
                      rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    lines = [['', *(f"{d['model']} - {d['reference']}" for d in rows)]]
    lines += [[_label(e), *(_signed(d['kl'][name]) for d in rows)]
              for name, e in table['estimators'].items()]
    return lines


def _split_lines(table: Mapping[str, Any]) -> list[list[str]]:
    lines = [['workload', 'model', 'Gaussian', 'within pairs', 'share', 'unequal variances']]
    for row in table['rows']:
        gaussian, found = row['kl']['gaussian'], row['split']
        lines.append([row['workload'], row['model'], enclosed(gaussian),
                      enclosed(found['within']), enclosed(found['share']),
                      _signed(found['unequal'])])
    return lines


def _parts_lines(table: Mapping[str, Any]) -> list[list[str]]:
    lines = [['workload', 'difference', 'within pairs', 'between pairs', 'unequal variances']]
    lines += [[d['workload'], f"{d['model']} - {d['reference']}",
               *(_signed(d['parts'][name]) for name in ('within', 'between', 'unequal'))]
              for d in table['differences']]
    return lines


def enclosed(number: Mapping[str, float | None], *, sign: str = '') -> str:
    """A value and its interval, if it has one; '-' where it is not defined."""
    if number['value'] is None:
        return '-'
    value, low, high = (number[key] for key in ('value', 'low', 'high'))
    return f'{value:{sign}.3f}' + ('' if low is None else f' [{low:{sign}.3f}, {high:{sign}.3f}]')


_signed = functools.partial(enclosed, sign='+')


def _quantile_lines(table: Mapping[str, Any]) -> list[list[str]]:
    names = [name for name, e in table['estimators'].items() if e['is_kl']]
    lines = [['workload', 'model', 'tau', 'accuracy',
              *(table['estimators'][n]['label'] for n in names)]]
    lines += [
        [q['workload'], q['model'], f"{q['tau']:.3f}", f"{q['accuracy']:.3f}",
         *(f"{q['kl'][n]:.3f}" for n in names)]
        for q in table['per_quantile']
    ]
    return lines


def _bayes_lines(table: Mapping[str, Any]) -> list[list[str]]:
    lines = [['workload', 'accuracy', 'NLL']]
    lines += [[workload, f"{b['accuracy']:.3f}", f"{b['nll']:.3f}"]
              for workload, b in table['bayes'].items()]
    return lines
