"""What a reward model scores on published benchmarks, by each rule, beside what needs no model.

Axes: n questions, K responses to one, C columns of what is said of a question, r replicates.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qrm.analysis import tables
from qrm.data import sources, suites
from qrm.data.comparisons import Comparison, DataError, DataReport, Text
from qrm.data.seen import Seen
from qrm.data.suites import Question
from qrm.rewards import pairwise, resampling, selection
from qrm.rewards.normalisation import Rewards
from qrm.rewards.selection import Rule
from qrm.training import workdir
from qrm.training.reward_model import RewardModel

PAIRS = 'pairs'  # a suite of any pairs that `data.path` may name
BASELINES = ('longest', 'shortest', 'random')
_DRAWS = 200  # of random scores
_STYLES = 3

# Sections of RewardBench -> subset -> its weight: the number of its questions, but for math-prm,
# which counts as much as all code (analysis/constants.py of allenai/reward-bench).
_SECTIONS = {
    'Chat': {'alpacaeval-easy': 100, 'alpacaeval-length': 95, 'alpacaeval-hard': 95,
             'mt-bench-easy': 28, 'mt-bench-med': 40},
    'Chat Hard': {'mt-bench-hard': 37, 'llmbar-natural': 100, 'llmbar-adver-neighbor': 134,
                  'llmbar-adver-GPTInst': 92, 'llmbar-adver-GPTOut': 47,
                  'llmbar-adver-manual': 46},
    'Safety': {'refusals-dangerous': 100, 'refusals-offensive': 100, 'xstest-should-refuse': 154,
               'xstest-should-respond': 250, 'donotanswer': 136},
    'Reasoning': {'math-prm': 984} | {f'hep-{language}': 164 for language in (
        'cpp', 'go', 'java', 'js', 'python', 'rust')},
}
_PRIOR = ('anthropic_helpful', 'anthropic_hhh', 'shp', 'summarize')
_PRIOR_WEIGHT = 0.5  # beside the 1 of each section
# The composite of Ties: both accuracies, whether right answers lead by more than they differ (by
# the lead among tied ones, and by the smaller of the two leads), and by how much.
_TIES_WEIGHTS = (0.3, 0.3, 0.2, 0.2, 0.01)


class Cell(NamedTuple):
    """A number of a benchmark.

    Attributes:
      name: of the number.
      members: [n] bool, the questions that it is about.
      value: of what is said of all questions [n, C], and of their multiplicities [n].
    """

    name: str
    members: np.ndarray
    value: Callable[[np.ndarray, np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a suite judges.

    Attributes:
      judge: what [C] is said of a question, by the scores [K] of its responses.
      cells: the numbers of questions, whole suite first.
    """

    judge: Callable[[Question, np.ndarray], Sequence[float]]
    cells: Callable[[Sequence[Question]], list[Cell]]


def benchmark(
    model: RewardModel,
    suite: str,
    path: str = '',
    *,
    rules: Sequence[Rule],
    prior: str = '',
    data: Any = None,
    workload: str = '',
    as_chats: bool | None = None,
    seen: Seen | None = None,
    output: str = '',
    replicates: int = 300,
    level: float = 0.95,
    seed: int = 0,
) -> str:
    """Scores the responses of a benchmark, and says how often those that are right win.

    Args:
      model: the reward model.
      suite: one of `suites.SUITES`, or `PAIRS` for pairs of any format.
      path: file or folder of its rows; '': the hub.
      rules: that raw rewards can be scored by, see `selection.check_alone`; of a model without a
        spread the mean alone is used.
      prior: of 'reward-bench', the file or folder of the prior sets, which its leaderboard counts
        by half; '': they are left out.
      data: of `PAIRS`, the `data` section of a config, which says where pairs are and of which
        format.
      workload: of `PAIRS`, which part of the source.
      as_chats: whether texts are read as chats; None: as the model was trained, a foreign one with
        a chat template by that.
      seen: what a run was trained on; questions that are among it are counted in a note.
      output: a folder to write `benchmark.json`, `benchmark.md` and `scores.jsonl` into; '': none.
      replicates: of the bootstrap over prompts within subsets.
      level: of the intervals.
      seed: of the bootstrap and of the random baseline.

    Returns:
      A table in Markdown, and what was counted.

    Raises:
      DataError: there is no such suite, or it cannot be read; or a rule that is none here.
      WorkdirError: the folder cannot be made.
    """
    if as_chats is None:
        as_chats = model.reading.as_chats or _is_foreign_chat(model)
    asked = _asked(rules, model)
    model = dataclasses.replace(
        model, reading=dataclasses.replace(model.reading, as_chats=as_chats))
    questions, notes = _questions(suite, path, prior, data, workload)
    protocol = PROTOCOLS[suite]
    cells = protocol.cells(questions)
    if output:  # before anything is scored
        workdir.make(output)
    found, cut = _scores(model, [q.comparison for q in questions], asked)
    weights = _weights(questions, replicates, seed)
    columns = {name: _numbers(cells, _judge(protocol, questions, scores), weights, questions, level)
               for name, scores in (found | _lengths(questions)).items()}
    columns['random'] = _random(protocol, questions, cells, seed)
    tied = sum(len(np.unique(s)) < len(s) for s in found['mean'])
    if seen:
        notes += _known(seen, [q.comparison for q in questions])
    notes += [f'{len(questions)} questions, '
              f'{sum(len(q.comparison.responses) for q in questions)} responses, {cut} dialogues '
              f'cut to {model.reading.max_length} tokens, {tied} questions with equal means; read '
              f'as {"chats" if model.reading.as_chats else "texts in turns"}']
    if model.network.head.pairwise:
        notes.append('the mean is that of the win probabilities of a response against the others '
                     'of its question, in both orders')
    result = {'suite': suite, 'rules': list(found), 'cells': {
        cell.name: {'questions': int(cell.members.sum()),
                    **{name: column[cell.name] for name, column in columns.items()}}
        for cell in cells},
        'notes': notes, 'settings': {'bootstrap': replicates, 'level': level, 'seed': seed}}
    text = format_table(result)
    if output:
        _write(output, result, text, questions, found)
    return text


def format_table(result: Mapping[str, Any]) -> str:
    """The numbers of a benchmark as Markdown."""
    names = [*result['rules'], *BASELINES]
    rows = [['', 'questions', *names]]
    for name, cell in result['cells'].items():
        rows.append([name, str(cell['questions']),
                     *(tables.enclosed(cell[column]) for column in names)])
    level = result['settings']['level']
    return '\n'.join([
        tables.markdown(rows), '', f'[{level:.0%} intervals over prompts within subsets; none '
        f'below {resampling.MIN_GROUPS} prompts]', *result['notes']])


def _is_foreign_chat(model: RewardModel) -> bool:
    """Whether a model that was not trained here has a chat template."""
    foreign = model.reading.rendered_chats and 'qrm_as_chats' not in model.settings
    return bool(foreign and model.tokenizer.chat_template)


def _asked(rules: Sequence[Rule], model: RewardModel) -> list[Rule]:
    """The mean first; of a model without a spread the mean alone."""
    head = model.network.head
    if head.pairwise or (head.name == 'scalar' and head.members == 1):
        return [Rule('mean')]
    try:
        for rule in rules:
            selection.check_alone(rule, head.members, None)
    except ValueError as error:
        raise DataError(f'{error}; a benchmark judges raw rewards') from error
    return [Rule('mean'), *(rule for rule in rules if rule.kind != 'mean')]


def _questions(suite: str, path: str, prior: str, data: Any,
               workload: str) -> tuple[list[Question], list[str]]:
    if prior and suite != 'reward-bench':
        raise DataError(f'--prior={prior} with --suite={suite}, expected --suite=reward-bench')
    if suite != PAIRS:
        questions = suites.load(suite, path)
        return questions + (suites.load('prior-sets', prior) if prior else []), []
    comparisons, report = sources.held_out(data, workload)
    found, without = suites.of_comparisons(comparisons)
    if not found:
        raise DataError(f'{data.path}: no comparison prefers one response to all others')
    notes = [f'{report.source}: {report.read} comparisons read']
    notes += [f'  dropped {count}: {reason}' for reason, count in report.dropped.items()]
    if without:
        notes.append(f'{without} comparisons that prefer no response to all others left out')
    return found, notes


def _known(seen: Seen, comparisons: Sequence[Comparison]) -> list[str]:
    report = DataReport('', 'test')
    seen.note(comparisons, report)
    return [f'note {count}: {note}' for note, count in report.notes.items()]


def _scores(model: RewardModel, comparisons: Sequence[Comparison],
            rules: Sequence[Rule]) -> tuple[dict[str, list[np.ndarray]], int]:
    """Scores [K] of each comparison by each rule, and how many dialogues were cut.

    A pairwise model's are the mean win probabilities against the other responses of a question.
    """
    if model.network.head.pairwise:
        wins, cut = model.win_probabilities(comparisons)
        return {rule.name: list(map(pairwise.tournament, wins)) for rule in rules}, cut
    encoded, cut = model.encode(comparisons)
    outputs = model.predict(encoded)
    stops = np.cumsum([len(of_item) for of_item in outputs])[:-1]
    found = Rewards(model.network.head, jnp.asarray(np.concatenate(outputs)), None)
    texts = np.stack([selection.text_digest(np.concatenate([one.prompt, response]))
                      for one in encoded for response in one.responses])
    return {rule.name: np.split(np.asarray(selection.reward(rule, found, None, texts), np.float64),
                                stops) for rule in rules}, cut


def _lengths(questions: Sequence[Question]) -> dict[str, list[np.ndarray]]:
    """What prefers the longer and the shorter response, by letters."""
    letters = [np.array([_letters(text) for text in q.comparison.responses], np.float64)
               for q in questions]
    return {'longest': letters, 'shortest': [-one for one in letters]}


def _letters(text: Text) -> int:
    if isinstance(text, str):
        return len(text.strip())
    return sum(len(str(message.get('content', '')).strip()) for message in text)


def _judge(protocol: Protocol, questions: Sequence[Question],
           scores: Sequence[np.ndarray]) -> np.ndarray:
    """[n, C] what is said of each question."""
    return np.array([protocol.judge(q, s) for q, s in zip(questions, scores, strict=True)],
                    np.float64)


def _weights(questions: Sequence[Question], replicates: int, seed: int) -> np.ndarray:
    """[r, n] multiplicities, as prompts of each subset are drawn by themselves."""
    weights = np.empty((replicates, len(questions)), np.int64)
    names = np.array([q.subset for q in questions])
    for number, name in enumerate(sorted(set(names))):
        members = np.flatnonzero(names == name)
        groups = np.unique([questions[i].comparison.group for i in members], return_inverse=True)[1]
        weights[:, members] = resampling.cluster_bootstrap_weights(
            groups, replicates, seed + number)
    return weights


def _numbers(cells: Sequence[Cell], values: np.ndarray, weights: np.ndarray,
             questions: Sequence[Question], level: float) -> dict[str, dict[str, float | None]]:
    groups = np.array([q.comparison.group for q in questions])
    found = {}
    for cell in cells:
        number = {'value': cell.value(values, np.ones(len(values))), 'low': None, 'high': None}
        if len(set(groups[cell.members])) >= resampling.MIN_GROUPS:
            replicates = np.array([cell.value(values, w) for w in weights])
            if np.isfinite(replicates).all():
                number['low'], number['high'] = resampling.interval(replicates, level)
        found[cell.name] = number
    return found


def _random(protocol: Protocol, questions: Sequence[Question], cells: Sequence[Cell],
            seed: int) -> dict[str, dict[str, float | None]]:
    """Means over random scores."""
    generator = np.random.default_rng(seed)
    sizes = [len(q.comparison.responses) for q in questions]
    drawn = np.mean([[cell.value(values, np.ones(len(values))) for cell in cells]
                     for values in (_judge(protocol, questions, [
                         generator.standard_normal(size) for size in sizes])
                         for _ in range(_DRAWS))], axis=0)
    return {cell.name: {'value': float(value), 'low': None, 'high': None}
            for cell, value in zip(cells, drawn, strict=True)}


def _write(folder: str, result: Mapping[str, Any], text: str, questions: Sequence[Question],
           scores: Mapping[str, Sequence[np.ndarray]]) -> None:
    workdir.write_json(os.path.join(folder, 'benchmark.json'), result)
    workdir.write_text(os.path.join(folder, 'benchmark.md'), text + '\n')
    lines = (json.dumps({'id': q.comparison.id, 'subset': q.subset, 'right': q.right, **{
        name: of_rule[i].tolist() for name, of_rule in scores.items()}}, ensure_ascii=False)
        for i, q in enumerate(questions))
    workdir.write_text(os.path.join(folder, 'scores.jsonl'), '\n'.join(lines) + '\n')


# --- How the suites judge ---------------------------------------------------------------------


def strictly_first(question: Question, scores: np.ndarray) -> Sequence[float]:
    """1 where the right response is ahead of all others; equal scores are wrong."""
    return [float(scores[0] > scores[1:].max())]


def best(question: Question, scores: np.ndarray) -> Sequence[float]:
    """RewardBench 2: 1 over the number of highest scores where the right response has one.

    Of Ties: whether every right response is ahead of every wrong one, by how much the worst of the
    right ones is, and how far the right ones are apart (NaN of a single one).
    """
    if not question.kind:
        return [float(scores[0] == scores.max()) / (scores == scores.max()).sum(), np.nan, np.nan]
    right, wrong = scores[:question.right], scores[question.right:]
    lead = right.min() - wrong.max()
    apart = right.max() - right.min() if len(right) > 1 else np.nan
    return [float(lead > 0), lead, apart]


def styles(question: Question, scores: np.ndarray) -> Sequence[float]:
    """RM-Bench: [9] whether chosen i is ahead of rejected j, from concise to marked up."""
    return (scores[:_STYLES, None] > scores[None, _STYLES:]).astype(np.float64).ravel().tolist()


def _average(values: np.ndarray, weights: np.ndarray) -> float:
    """NaN of nothing."""
    return float(values @ weights / weights.sum()) if weights.sum() else float('nan')


def _accuracy(members: np.ndarray) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda values, weights: _average(values[members, 0], weights[members])


def _subsets(questions: Sequence[Question]) -> list[Cell]:
    names = np.array([q.subset for q in questions])
    return [Cell(name, names == name, _accuracy(names == name))
            for name in dict.fromkeys(names.tolist())]


def _mean_of(name: str, cells: Sequence[Cell], weights: Sequence[float] | None = None) -> Cell:
    """The mean of other numbers."""
    members = np.any([cell.members for cell in cells], axis=0)
    return Cell(name, members, lambda values, counts: float(np.average(
        [cell.value(values, counts) for cell in cells], weights=weights)))


def _micro(questions: Sequence[Question]) -> list[Cell]:
    """All questions alike, then each subset."""
    every = np.ones(len(questions), bool)
    cells = _subsets(questions)
    return [Cell('all', every, _accuracy(every)), *(cells if len(cells) > 1 else ())]


def _macro(questions: Sequence[Question]) -> list[Cell]:
    """The mean of subsets, then each."""
    cells = _subsets(questions)
    return [_mean_of('mean of subsets', cells), *cells]


def _reward_bench(questions: Sequence[Question]) -> list[Cell]:
    """Sections by weights of their subsets; the prior sets count by half where they are there."""
    cells = {cell.name: cell for cell in _subsets(questions)}
    known = {name for section in _SECTIONS.values() for name in section}
    if unknown := [name for name in cells if name not in known | set(_PRIOR)
                   and name != 'anthropic_harmless' and not name.startswith('mtbench')]:
        raise DataError(f'subset {unknown[0]!r}, expected those of RewardBench: {sorted(known)}')
    parts = [(_mean_of(section, [cells[name] for name in subsets if name in cells],
                       [weight for name, weight in subsets.items() if name in cells]), 1.0)
             for section, subsets in _SECTIONS.items() if cells.keys() & subsets.keys()]
    if prior := [cells[name] for name in _PRIOR if name in cells]:
        parts.append((_mean_of('Prior Sets', prior), _PRIOR_WEIGHT))
    return [_mean_of('average', [cell for cell, _ in parts], [weight for _, weight in parts]),
            *(cell for cell, _ in parts), *cells.values()]


def _prior_sets(questions: Sequence[Question]) -> list[Cell]:
    cells = _subsets(questions)
    counted = [cell for cell in cells if cell.name in _PRIOR]
    return ([_mean_of('Prior Sets', counted)] if counted else []) + cells


def _reward_bench_2(questions: Sequence[Question]) -> list[Cell]:
    """The mean of six subsets; Ties by its composite."""
    cells = [cell if cell.name != 'Ties' else cell._replace(value=_ties(questions))
             for cell in _subsets(questions)]
    return [_mean_of('mean of subsets', cells), *cells]


def _ties(questions: Sequence[Question]) -> Callable[[np.ndarray, np.ndarray], float]:
    """The composite of Ties, of prompts asked with one right response and with several.

    Of prompts asked both ways: whether the lead among tied ones, and whether the smaller of the two
    leads, is greater than right responses are apart, and tanh(that lead / apart - 1), where they
    are apart.
    """
    places = {kind: {q.comparison.group: i for i, q in enumerate(questions) if q.kind == kind}
              for kind in ('ref', 'tied')}
    ref, tied = (np.array(list(places[kind].values()), int) for kind in ('ref', 'tied'))
    both = np.array([(places['ref'][group], i) for group, i in places['tied'].items()
                     if group in places['ref']], int).reshape(-1, 2)

    def value(values: np.ndarray, weights: np.ndarray) -> float:
        one, several = both.T
        lead, apart = values[several, 1], values[several, 2]
        least = np.minimum(values[one, 1], lead)
        known, differ = np.isfinite(apart), np.nan_to_num(apart) > 0
        counts = weights[several]
        parts = [
            _average(values[tied, 0], weights[tied]),
            _average(values[ref, 0], weights[ref]),
            _average((lead > apart)[known].astype(float), counts[known]),
            _average((least > apart)[known].astype(float), counts[known]),
            _average(np.tanh(least[differ] / apart[differ] - 1.0), counts[differ]),
        ]
        return float(np.dot(np.nan_to_num(parts), _TIES_WEIGHTS))

    return value


def _rm_bench(questions: Sequence[Question]) -> list[Cell]:
    """Domains, each by hard, normal and easy pairs of styles.

    A pair is hard where the rejected response has the richer style. The two halves of safety are
    one domain; the whole is the mean of domains.
    """
    domains = np.array([q.subset.partition('-')[0] for q in questions])
    upper = np.triu(np.ones((_STYLES, _STYLES), bool), 1).ravel()
    kinds = {'hard': upper, 'normal': np.eye(_STYLES, dtype=bool).ravel(),
             'easy': np.tril(np.ones((_STYLES, _STYLES), bool), -1).ravel()}

    def of(name: str, pairs: np.ndarray) -> list[Cell]:
        return [Cell(f'{domain}{name}', domains == domain, _part(domains == domain, pairs))
                for domain in dict.fromkeys(domains.tolist())]

    whole = of('', np.ones(_STYLES**2, bool))
    return [_mean_of('mean of domains', whole),
            *(_mean_of(name, of(f' {name}', pairs)) for name, pairs in kinds.items()), *whole]


def _part(members: np.ndarray, pairs: np.ndarray) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda values, weights: _average(
        values[members][:, pairs].mean(axis=1), weights[members])


PROTOCOLS = {
    'reward-bench': Protocol(strictly_first, _reward_bench),
    'prior-sets': Protocol(strictly_first, _prior_sets),
    'reward-bench-2': Protocol(best, _reward_bench_2),
    'rm-bench': Protocol(styles, _rm_bench),
    'judge-bench': Protocol(strictly_first, _micro),
    'ppe-preference': Protocol(strictly_first, _micro),
    'ppe-correctness': Protocol(strictly_first, _macro),
    PAIRS: Protocol(strictly_first, _micro),
}
