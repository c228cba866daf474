"""The paper's table from its authors' own code: where it reads rewards, what formulas give there.

Axes: n pairs, N quantiles, d draws.

Four parts, each from data or simulation alone. (a) Which token the published evaluation reads, of
the authors' own validation pairs. (b) What each definition of the divergence gives for as few
pairs, of two normal samples whose AUC is known. (c) How the spread of a quantile model goes with
each target while it trains. (d) One pair of models, scored at the right token and as published.
"""

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy

from qrm.analysis import divergences, tables
from qrm.analysis.tables import PUBLISHED_PAIRS
from qrm.data import tokens
from qrm.data.comparisons import Comparison, DataError, MalformedRow, in_a_line
from qrm.data.encoded import Encoded
from qrm.data.rows import parse_row
from qrm.data.templates import MOSS
from qrm.data.tokens import Reading
from qrm.models import adapters, weights
from qrm.rewards import metrics, resampling, statistics
from qrm.rewards.metrics import Predictions
from qrm.rewards.statistics import Statistic
from qrm.studies import figures, padded, reproduce
from qrm.studies.panels import PAPER_FILES
from qrm.training import config as config_lib
from qrm.training import reward_model, workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.reward_model import RewardModel
from qrm.training.schema import (
    ANY,
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    ConfigError,
    Each,
    Key,
    Range,
    Table,
)
from qrm.training.train import read_data, train

BATCH = 4  # pairs of a batch in the authors' scripts
READS = ('end', 'published')  # at the last token, and as the authors' code reads its models
SIDES = ('chosen', 'rejected')

# What the loss of the quantile model changes for its spread to be followed.
TARGETS = {
    'own_mean': {'targets': 'own_mean', 'huber_sides': 'chosen'},
    'free': {'huber_weight': 0.0},
    'label': {'targets': 'label', 'huber_sides': 'both'},
    'teacher': {'targets': 'teacher', 'huber_sides': 'both'},
}

KEYS: Table = {  # beside those of every run
    'paper': Key(
        '', ANY, f"folder of the published pairs, {' and '.join(PAPER_FILES.values())}; '': what "
        'needs them is left out'),
    'published.tokenizer': Key(
        'openai-community/gpt2', ANY, 'with which the published evaluation is followed'),
    'published.aucs': Key(
        (0.5, 0.6, 0.7, 0.8), Each(float, Range(0.5, 1, open_high=True)), 'of simulated samples'),
    'published.bins': Key((20, 30, 50, 100), Each(int, AT_LEAST_ONE), 'of histograms'),
    'published.draws': Key(400, Range(20), 'simulated samples, and subsets of the test pairs'),
    'published.orders': Key(20, AT_LEAST_ONE, 'random orders of the published pairs'),
    'published.followed': Key(
        200, AT_LEAST_ONE, 'test comparisons on which spreads are followed over training'),
    'published.seed': Key(0, NOT_NEGATIVE, 'of what is simulated, drawn and ordered'),
}


def check(config: Any) -> None:
    """Checks the config, and that the published pairs are there if it names them.

    Raises:
      ConfigError, DataError: something cannot be used.
    """
    config_lib.check(config, KEYS)
    base, _ = _members(config)
    for workload, _ in base:
        if config.paper and workload in PAPER_FILES:
            read_pairs(config.paper, workload)


def published(config: Any, folder: str) -> str:
    """Computes all parts in `folder`; goes on where an earlier run stopped.

    Leaves `published.json`, `published.md`, figures, and a folder for each run.

    Returns:
      The tables as Markdown.

    Raises:
      ConfigError, DataError, WorkdirError, NonFiniteLoss, Interrupted: as `train`.
    """
    check(config)
    settings = config.published
    base, followed = _members(config)
    pairs = {workload: read_pairs(config.paper, workload)
             for workload in dict.fromkeys(workload for workload, _ in base)
             if config.paper and workload in PAPER_FILES}
    sizes = {workload: lengths(of, settings.tokenizer) for workload, of in pairs.items()}
    print('\n== estimators', flush=True)
    estimators = simulate(PUBLISHED_PAIRS.values(), settings.aucs, settings.bins, settings.draws,
                          settings.seed)
    spread = []
    for name, member in followed.items():
        path = _train(member, folder, name)
        spread += [{'targets': name} | row for row in follow(member, path, settings.followed)]
    table, counts = [], []
    for (workload, head), member in base.items():
        path = _train(member, folder, 'scalar' if head == 'scalar' else 'own_mean')
        rows, counted = score_both_ways(
            reward_model.load(path, step=member.evaluation.checkpoint, raw=True),
            _test_pairs(member, path), pairs.get(workload), workload, settings, member.analysis)
        table += [{'workload': workload, 'head': head} | row for row in rows]
        counts += [{'workload': workload, 'head': head} | row for row in counted]
    result = {
        'reads': {workload: padded.places(of, BATCH)._asdict() for workload, of in sizes.items()},
        'reads_by_batch_and_order': [row for workload, of in sizes.items() for row in read_orders(
            workload, of, settings.orders, settings.seed)],
        'estimators': estimators, 'spread': spread, 'table': table, 'counts': counts,
        'published': tables.PUBLISHED,
        'settings': {'batch': BATCH, 'pairs': PUBLISHED_PAIRS, 'draws': settings.draws,
                     'seed': settings.seed, 'range': '5% to 95%', 'paper': bool(config.paper),
                     'level': config.analysis.level,
                     'source': reproduce.describe_source(config)},
    }
    text = format_result(result)
    workdir.write_json(os.path.join(folder, 'published.json'), result)
    workdir.write_text(os.path.join(folder, 'published.md'), text)
    if not jax.process_index():
        figures.draw_published(folder, result)
    return text


def _train(member: Any, folder: str, name: str) -> str:
    """Trains a member; the folder of its run."""
    path = os.path.join(folder, f'{member.workload}-{name}')
    print(f'\n== {member.workload}, {name}: {path}', flush=True)
    train(member, path)
    return path


def _members(config: Any) -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    """Configs of the pair of models of each workload, and those whose spread is followed."""
    run = copy.deepcopy(config)
    with run.unlocked():
        for key in {name.split('.')[0] for name in KEYS}:
            del run[key]
    if tuple(run.reproduce.models) != ('scalar', 'quantile'):
        raise ConfigError(f'config.reproduce.models={tuple(run.reproduce.models)}, expected '
                          "('scalar', 'quantile'), the published pair")
    if run.loss.targets != 'own_mean' or run.loss.huber_sides != 'chosen' or (
            not run.loss.huber_weight):
        raise ConfigError("config.loss: targets, huber_sides or huber_weight, expected 'own_mean', "
                          "'chosen' and a weight, as published")
    if (family := _family(run)) != 'gpt2':
        raise ConfigError(f'config.model: family {family!r}, expected gpt2, whose padded rows are '
                          'followed')
    if not run.data.append_eos or run.head.members > 1:
        raise ConfigError('config.data.append_eos or config.head.members: expected EOS and one '
                          'member, as published')
    base = reproduce.run_configs(run)
    followed = {}
    for name, changes in TARGETS.items():
        member = copy.deepcopy(next(m for (_, model), m in base.items() if model == 'quantile'))
        member.loss.update(changes)
        config_lib.check(member)
        followed[name] = member
    return base, followed


def _family(config: Any) -> str:
    checkpoint = config.model.checkpoint
    if not checkpoint:
        return config.model.family
    return str(weights.read_settings(adapters.find(checkpoint).model).get('model_type'))


# ---------------------------------------------------------------------------------------------
# (a) Which token is read


def read_pairs(folder: str, workload: str) -> list[Comparison]:
    """The published validation pairs of a workload, as chats.

    Raises:
      DataError: they are not there, or not what they were.
    """
    path = os.path.join(folder, PAPER_FILES[workload])
    try:
        with open(path, encoding='utf-8') as file:
            rows = json.load(file)
        found = [parse_row({side: _chat(row[side]) for side in ('chosen', 'rejected')},
                           f'{path}[{i}]') for i, row in enumerate(rows)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path}: not the published validation pairs ({in_a_line(error)}); '
                        'expected the files of config.paper') from error
    if len(found) != PUBLISHED_PAIRS[workload]:
        raise DataError(f'{path}: {len(found)} pairs, expected the {PUBLISHED_PAIRS[workload]} '
                        'published ones')
    return found


def _chat(turns: Sequence[str]) -> list[dict[str, str]]:
    """Turns, of which the last is the assistant's."""
    if not isinstance(turns, list) or not all(isinstance(text, str) for text in turns):
        raise TypeError('a side that is no list of texts')
    last = len(turns) - 1
    return [{'role': ('user', 'assistant')[(last - i) % 2 == 0], 'content': text}
            for i, text in enumerate(turns)]


def lengths(comparisons: Sequence[Comparison], tokenizer: str) -> np.ndarray:
    """[n, 2] tokens of both dialogues of each pair in MOSS-RLHF's text, EOS included.

    Raises:
      DataError: there is no such tokenizer.
    """
    try:
        found = tokens.tokenize(comparisons, tokens.load_tokenizer(tokenizer, template=MOSS),
                                Reading(0, as_chats=True))
    except DataError as error:
        raise DataError(f'config.published.tokenizer={tokenizer!r}, expected that of GPT-2: '
                        f'{in_a_line(error)}') from error
    if refused := [of for of in found if isinstance(of, MalformedRow)]:
        raise refused[0]
    return np.array([[len(ids) for ids in dialogues] for dialogues in found])


def read_orders(workload: str, sizes: np.ndarray, orders: int, seed: int) -> list[dict[str, Any]]:
    """Where responses are read by size of the batch, in the order of the file and in random ones.

    Args:
      workload: for the rows.
      sizes: [n, 2] as from `lengths`.
      orders: how many random ones; of these the mean and the range.
      seed: of the orders.
    """
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(len(sizes)) for _ in range(orders)]
    rows = []
    for batch in (1, 2, 4, 8, 16):
        drawn = [padded.places(sizes[order], batch).end for order in shuffled]
        rows.append({'workload': workload, 'batch': batch, **padded.places(sizes, batch)._asdict(),
                     'end_in_random_order': tables.spread_of(drawn)})
    return rows


# ---------------------------------------------------------------------------------------------
# (b) What each definition gives


def simulate(counts: Sequence[int], aucs: Sequence[float], bins: Sequence[int], draws: int,
             seed: int) -> list[dict[str, Any]]:
    """Every definition of the divergence for n pairs of independent normal rewards.

    Args:
      counts: numbers of pairs n.
      aucs: of the two samples, of variance 1: their means are sqrt(2) Phi^-1(AUC) apart.
      bins: of histograms with a small constant, beside the definitions of `divergences`.
      draws: samples of each.
      seed: of the samples.

    Returns:
      Rows of definition, bins (0: of no histogram, or its own), n, auc, mean, low, high (5% and
      95%) and is_kl, and `truth`, the divergence in nats.
    """
    known = {(name, 0): (e.function, e.is_kl) for name, e in divergences.ESTIMATORS.items()
             if not name.startswith('epsilon_histogram')}
    known |= {('epsilon_histogram', b): (divergences.epsilon_histogram(b), False) for b in bins}
    rows = []
    for n in dict.fromkeys(counts):
        for auc in aucs:
            rng = np.random.default_rng((seed, n, round(1000 * auc)))
            distance = np.sqrt(2.0) * scipy.stats.norm.ppf(auc)
            samples = [(rng.normal(distance, 1.0, n), rng.normal(0.0, 1.0, n))
                       for _ in range(draws)]
            for (name, count), (function, is_kl) in known.items():
                values = [function(*sample, None, np.arange(n)) for sample in samples]
                rows.append({'definition': name, 'bins': count, 'n': n, 'auc': auc,
                             **tables.spread_of(values), 'is_kl': is_kl,
                             'truth': float(distance**2 / 2.0)})
    return rows


# ---------------------------------------------------------------------------------------------
# (c) What a target does to the spread


def _test_pairs(member: Any, path: str) -> list[Encoded]:
    """Test pairs, in the tokens of a run."""
    return [item for item in read_data(member, path).encoded['test']
            if len(item.responses) == 2 and (item.preference > 0.5).any()]


def follow(member: Any, path: str, count: int) -> list[dict[str, Any]]:
    """The spread of a run's quantiles at each of its checkpoints, on the first test comparisons.

    Returns:
      Rows of step, spread of the chosen and of the rejected side (mean over responses of the
      standard deviation over quantiles) and `reward_std`, in units of reward, and `relative`, both
      spreads in standard deviations of the rewards, with intervals over opening questions.
    """
    pairs = _test_pairs(member, path)[:count]
    with Checkpoints(path, read_only=True) as checkpoints:
        steps = checkpoints.steps
    rows = []
    for step in steps:
        p = _predictions(reward_model.load(path, step=step, raw=True), pairs, 'end')
        chosen, rejected = p.stds[p.pairs].mean(axis=0)
        rows.append({'step': step, 'chosen': float(chosen), 'rejected': float(rejected),
                     'reward_std': metrics.summarise(p)['reward_std'],
                     'relative': _with_intervals(
                         {side: _relative(p, i) for i, side in enumerate(SIDES)}, p,
                         member.analysis)})
    return rows


def _relative(p: Predictions, side: int) -> Statistic:
    """Mean spread of one side of pairs over the standard deviation of the rewards of both."""
    spread, rewards = p.stds[p.pairs[:, side]], np.stack(p.rewards, axis=1).ravel()

    def statistic(weights: np.ndarray | None) -> float:
        share = statistics.normalised(weights, len(spread))
        both = np.repeat(share, 2) / 2.0
        if statistics.is_constant(rewards[both > 0.0]):
            raise statistics.Undefined('all rewards are equal')
        return float(share @ spread) / statistics.moments(rewards, both)[1]

    return statistic


# ---------------------------------------------------------------------------------------------
# (d) The same models, read at two places


def score_both_ways(
    model: RewardModel, test: Sequence[Encoded], real: Sequence[Comparison] | None,
    workload: str, settings: Any, analysis: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Accuracy, AUC and every definition of one model, at the right token and as published.

    Rows are of all test pairs, of random subsets of as many as published, and of the published
    pairs. Those of subsets have means and 5% to 95% ranges over the subsets; the others values with
    intervals over opening questions.

    Args:
      model: to score with.
      test: pairs.
      real: the published pairs; None: left out.
      workload: says how many were published.
      settings: config section `published`.
      analysis: config section of the intervals.

    Returns:
      Those rows, and rows of `count` of the same subsets.
    """
    sets = {'test': test}
    if real:
        sets['published'], _ = model.encode(real)
    rows, counts = [], []
    for name, pairs in sets.items():
        for read in READS:
            p = _predictions(model, pairs, read)
            common, (chosen, rejected) = {'pairs': name, 'read': read}, p.rewards
            rows.append(common | {'n': len(pairs)} | measure(p, analysis))
            n = PUBLISHED_PAIRS.get(workload, 0)
            if name == 'test' and 0 < n < len(pairs):
                rows.append(common | {'n': n} | tables.of_subsets(
                    chosen, rejected, p.groups, n, settings.draws, settings.seed))
                counts += [{'read': read} | row for row in count(
                    p, n, settings.bins, settings.draws, settings.seed)]
    return rows, counts


def measure(p: Predictions, analysis: Any) -> dict[str, Any]:
    """Accuracy, AUC and every definition of all pairs, with intervals over opening questions.

    Args:
      p: predictions.
      analysis: config section with `bootstrap`, `level` and `seed`.

    Returns:
      'accuracy', 'auc', each 'value', 'low' and 'high', and 'kl', name -> the same.
    """
    chosen, rejected = p.rewards
    found = {'accuracy': statistics.accuracy(chosen - rejected),
             'auc': statistics.pooled_auc(chosen, rejected)}

    def divergence(function: Callable[..., float]) -> Statistic:
        return lambda weights: function(chosen, rejected, weights, p.groups)

    kl = {name: divergence(e.function) for name, e in divergences.ESTIMATORS.items()}
    return _with_intervals(found, p, analysis) | {'kl': _with_intervals(kl, p, analysis)}


def _with_intervals(found: Mapping[str, Statistic], p: Predictions,
                    analysis: Any) -> dict[str, dict[str, float | None]]:
    """Statistics of the pairs of some predictions, with intervals over opening questions.

    Those that are not defined, of a collapsed model, are None.
    """
    weights = resampling.cluster_bootstrap_weights(p.groups, analysis.bootstrap, analysis.seed)
    result = {}
    for name, statistic in found.items():
        try:
            interval = resampling.bootstrap(statistic, weights, analysis.level)
        except statistics.Undefined:
            result[name] = dict.fromkeys(('value', 'low', 'high'))
            continue
        result[name] = {'value': interval.value, 'low': interval.low, 'high': interval.high}
    return result


def count(p: Predictions, n: int, bins: Sequence[int], draws: int,
          seed: int) -> list[dict[str, Any]]:
    """What a histogram with a small constant gives for few pairs, by what is counted.

    The authors' code saves the N quantiles of each response, of which a histogram may have been
    made in place of their means.

    Args:
      p: predictions.
      n: pairs of a subset.
      bins: of each histogram.
      draws, seed: see `tables.subsets`.

    Returns:
      Rows of counted ('means', or 'quantiles': n N numbers a side), bins, n, mean, low and high (5%
      and 95%).
    """
    sides = p.quantiles[p.pairs]  # [n, 2, N]
    subsets = tables.subsets(len(sides), n, draws, seed)
    counted = {'means': np.stack(p.rewards, axis=1)[..., None]}
    if sides.shape[-1] > 1:
        counted['quantiles'] = sides
    rows = []
    for name, values in counted.items():
        for number in bins:
            histogram = divergences.epsilon_histogram(number)
            drawn = [histogram(*np.moveaxis(values[i], 1, 0).reshape(2, -1), None,
                               np.repeat(p.groups[i], values.shape[-1])) for i in subsets]
            rows.append({'counted': name, 'bins': number, 'n': n, **tables.spread_of(drawn)})
    return rows


def _predictions(model: RewardModel, pairs: Sequence[Encoded], read: str) -> Predictions:
    """What a model says of pairs, read at the end of each dialogue or as published."""
    if read == 'end':
        outputs = model.predict(pairs)
    else:
        outputs = padded.outputs(
            model, [[np.concatenate([pair.prompt, ids]) for ids in pair.responses]
                    for pair in pairs], BATCH, last=model.network.head.name == 'scalar')
    return metrics.predictions_of(pairs, outputs, model.network.head, model.loss)


# ---------------------------------------------------------------------------------------------
# For the terminal


def format_result(result: dict[str, Any]) -> str:
    """The four parts as Markdown."""
    settings = result['settings']
    published = [value for cells in result['published'].values() for value in cells.values()]
    parts = ['# Table 1 from its own code\n', '## (a) Which token is read\n']
    if result['reads']:
        parts += [
            f'Quantile models, batches of {BATCH} pairs in the order of the files.\n',
            tables.markdown([['workload', 'responses', 'end', 'inside', 'in the padding'],
                             *([workload, *map(str, row.values())]
                               for workload, row in result['reads'].items())]),
            '\nBy size of the batch; the last column in random orders, mean and 5% to 95% range.\n',
            tables.markdown([['workload', 'batch', 'end', 'inside', 'in the padding',
                              'end, other orders'], *map(_order_line,
                                                         result['reads_by_batch_and_order'])])]
    else:
        parts.append('Left out: no config.paper, the folder of the published pairs.')
    parts += [
        f'\n## (b) What each definition gives for {_counts(settings)} pairs\n',
        f'Two normal samples with that AUC: mean and 5% to 95% range of {settings["draws"]} draws. '
        f'Published: {", ".join(f"{value:.3f}" for value in sorted(published))}.\n',
        tables.markdown(_estimator_lines(result['estimators'])),
        '\n## (c) What each target does to the spread\n',
        f'{settings["source"]}: standard deviation over quantiles of the chosen and of the '
        'rejected responses, in standard deviations of the rewards, with '
        f'{settings["level"]:.0%} intervals of a bootstrap over opening questions.\n',
        tables.markdown(_spread_lines(result['spread'])),
        '\n## (d) The same models, read at the right token and as published\n',
        f'Of all pairs, with {settings["level"]:.0%} intervals of a bootstrap over opening '
        'questions; or mean and 5% to 95% range of subsets of as many as published. As published '
        'a scalar model is read at the last column of its padded batch, a quantile model at the '
        'column of as many tokens as the text has. A resample has fewer different pairs, and so '
        'more empty bins: intervals of (!) histograms may lie above their value.\n',
        *([] if settings['paper'] else ['The published pairs are left out: no config.paper.\n']),
        *(part for workload in dict.fromkeys(row['workload'] for row in result['table'])
          for part in _both_ways(result, workload)),
        '### Histograms with epsilon 1e-10 by their bins and by what is counted\n',
        'Mean and 5% to 95% range of the same subsets.\n',
        tables.markdown(_count_lines(result['counts']))]
    return '\n'.join(parts) + '\n'


def _counts(settings: dict[str, Any]) -> str:
    return ' and '.join(map(str, settings['pairs'].values()))


def _order_line(row: dict[str, Any]) -> list[str]:
    return [row['workload'], *(str(row[key]) for key in ('batch', 'end', 'inside', 'padding')),
            tables.ranged(row['end_in_random_order'])]


def _estimator_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each definition and n, a column for each AUC."""
    aucs = list(dict.fromkeys(row['auc'] for row in rows))
    lines = [['n', 'definition', *(f'AUC {auc:g}' for auc in aucs)]]
    truth = {row['auc']: row['truth'] for row in rows}
    lines.append(['', 'the divergence', *(f'{truth[auc]:.2f}' for auc in aucs)])
    for n, name, bins in dict.fromkeys((r['n'], r['definition'], r['bins']) for r in rows):
        own = {r['auc']: r for r in rows if (r['n'], r['definition'], r['bins']) == (n, name, bins)}
        label = f'Histogram, {bins} bins, epsilon 1e-10' if bins else (
            divergences.ESTIMATORS[name].label)
        lines.append([str(n), label if own[aucs[0]]['is_kl'] else f'(!) {label}',
                      *(tables.ranged(own[auc]) for auc in aucs)])
    return lines


def _spread_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    names = list(dict.fromkeys(row['targets'] for row in rows))
    lines = [['step', *(f'{name}, {side}' for name in names for side in SIDES)]]
    for step in dict.fromkeys(row['step'] for row in rows):
        own = {row['targets']: row for row in rows if row['step'] == step}
        lines.append([str(step), *(
            tables.enclosed(own[name]['relative'][side]) if name in own else '-'
            for name in names for side in SIDES)])
    return lines


def _count_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each model, reading and what is counted, a column for each number of bins."""
    keys = ('workload', 'n', 'head', 'read', 'counted')
    bins = list(dict.fromkeys(row['bins'] for row in rows))
    found = {(*(row[key] for key in keys), row['bins']): tables.ranged(row) for row in rows}
    return [['workload', 'pairs', 'model', 'read', 'counted', *(f'{b} bins' for b in bins)],
            *([*map(str, line), *(found[*line, b] for b in bins)]
              for line in dict.fromkeys(key[:-1] for key in found))]


def _both_ways(result: dict[str, Any], workload: str) -> list[str]:
    rows = [row for row in result['table'] if row['workload'] == workload]
    cells = result['published'].get(workload, {})
    lines = [['', *(f"{r['head']}, {r['pairs']}, {r['read']}" for r in rows)],
             ['pairs', *(str(r['n']) for r in rows)],
             ['accuracy', *(_estimate(r['accuracy']) for r in rows)],
             ['AUC', *(_estimate(r['auc']) for r in rows)],
             ['published', *(f"{cells[r['head']]:.3f}" if cells else '-' for r in rows)]]
    lines += [[e.label if e.is_kl else f'(!) {e.label}', *(_estimate(r['kl'][name]) for r in rows)]
              for name, e in divergences.ESTIMATORS.items()]
    return [f'### {workload}\n', tables.markdown([list(line) for line in zip(*lines, strict=True)]),
            '']


def _estimate(cell: dict[str, float]) -> str:
    """A value with its interval, or a mean with the range of subsets."""
    return tables.enclosed(cell) if 'value' in cell else tables.ranged(cell)
