"""Benchmarks of reward models: where their questions are, and how their rows say what is right.

A suite is a table: where it is published, and what makes questions of a row. How answers are judged
is in `analysis.benchmarks`.
"""

import dataclasses
import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from qrm.data import sources
from qrm.data.comparisons import Comparison, DataError, MalformedRow
from qrm.data.files import SUFFIXES, is_rows, read_rows
from qrm.data.rows import ASSISTANT, HUMAN, parse_row
from qrm.data.verdicts import shown

_STYLES = 3  # of RM-Bench
_TIES = 'Ties'
_ROLES = {'user': HUMAN, 'assistant': ASSISTANT}
# Prompts of JudgeBench's subsets begin their source with it.
_SOURCES = ('mmlu-pro', 'livebench-reasoning', 'livebench-math', 'livecodebench')


class Question(NamedTuple):
    """A prompt with responses of which it is known which are right.

    Attributes:
      comparison: the prompt and K responses; its group is what intervals resample.
      right: the first so many responses are right, the others wrong.
      subset: of the suite.
      kind: of RewardBench 2's Ties 'ref' (one right response) or 'tied' (several); else ''.
    """

    comparison: Comparison
    right: int
    subset: str
    kind: str = ''


@dataclasses.dataclass(frozen=True)
class Suite:
    """Where the questions of a benchmark are, and how they are read.

    Attributes:
      homes: data sets on the hub, with the split of each ('': all splits) and the subset that its
        rows are of where they do not say it.
      read: what makes questions of a row, given where it stands and the subset.
    """

    homes: tuple[tuple[str, str, str], ...]
    read: Callable[[str, Mapping[str, Any], str], Iterable[Question]]


def load(name: str, path: str = '') -> list[Question]:
    """The questions of a suite.

    Args:
      name: one of `SUITES`.
      path: a file of rows, see `files.read_rows`, or a folder of such files, where subsets that
        rows do not name are those of the files; '': the hub.

    Raises:
      DataError: there is no such suite or file, or a row that is no question of it.
    """
    if name not in SUITES:
        raise DataError(f'--suite={name}, expected one of {", ".join(SUITES)}')
    suite, found = SUITES[name], []
    for subset, rows in _local(path) if path else _hub(suite):
        for where, row in rows:
            if isinstance(row, MalformedRow):
                raise row
            if not isinstance(row, Mapping):
                raise DataError(f'{where}: {shown(row)}, expected an object')
            found.extend(suite.read(where, row, subset))
    if not found:
        raise DataError(f'{path or name}: no questions')
    return found


def of_comparisons(comparisons: Iterable[Comparison]) -> tuple[list[Question], int]:
    """Questions of comparisons of which one response is preferred to all others.

    Returns:
      The questions, the preferred response first, and how many comparisons prefer none.
    """
    found, without = [], 0
    for comparison in comparisons:
        wins = comparison.preference_matrix() > 0.5
        best = next((k for k, row in enumerate(wins) if row.sum() == len(wins) - 1), None)
        if best is None or len(wins) < 2:
            without += 1
            continue
        order = [best, *(k for k in range(len(wins)) if k != best)]
        found.append(Question(dataclasses.replace(
            comparison, responses=tuple(comparison.responses[k] for k in order), ranks=None,
            preferred=0, preference=None, ratings=None, attributes={}), 1, 'all'))
    return found, without


def _local(path: str) -> Iterator[tuple[str, Iterable[sources.Row]]]:
    """Subset and rows of a file, or of each file of a folder."""
    if is_rows(path):
        yield '', read_rows(path)
        return
    names = sorted(name for name in glob.glob(os.path.join(glob.escape(path), '*'))
                   if is_rows(name))
    if not names:
        raise DataError(f'{path}: no file of rows, expected one, or a folder of such, that end in '
                        f'{", ".join(SUFFIXES)}')
    for name in names:
        base = os.path.basename(name)
        stem = next(base.removesuffix(end) for end in SUFFIXES if base.endswith(end))
        yield stem, read_rows(name)


def _hub(suite: Suite) -> Iterator[tuple[str, Iterable[sources.Row]]]:
    for home, split, subset in suite.homes:
        loaded = sources.load_hub(home, '--path')
        if split and split not in loaded:
            raise DataError(f'{home}: splits {sorted(loaded)}, expected {split!r}')
        for part in [split] if split else sorted(loaded):
            yield subset or part, sources.numbered(f'{home}[{part}]', loaded[part])


def _question(where: str, row: Mapping[str, Any], responses: Iterable[Any], subset: str, *,
              right: int = 1, kind: str = '', group: str = '', prompt: str = 'prompt') -> Question:
    """A question of texts, as turns; a response that is a chat is its last message."""
    text = _turns(where, row.get(prompt), prompt)
    answers = [_answer(where, response) for response in responses]
    comparison = parse_row(
        {'prompt': text, 'responses': [f' {answer}' for answer in answers], 'preferred': 0,
         'group': f'{subset} {group or text}'}, where, literal=True)
    return Question(comparison, right, subset, kind)


def _turns(where: str, prompt: Any, key: str) -> str:
    """A prompt, a text or messages, in turns that end where the assistant's begins."""
    if isinstance(prompt, str):
        prompt = [{'role': 'user', 'content': prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f'{where} field {key!r}: {shown(prompt)}, expected text or messages')
    said = ''
    for message in prompt:
        if not (isinstance(message, Mapping) and message.get('role') in _ROLES
                and isinstance(message.get('content'), str)):
            raise DataError(f'{where} field {key!r}: {shown(message)}, expected a message of the '
                            'user or the assistant')
        said += f'{_ROLES[message["role"]]} {_one_turn(where, message["content"])}'
    return said + ASSISTANT


def _answer(where: str, response: Any) -> str:
    if isinstance(response, list) and response and isinstance(response[-1], Mapping):
        response = response[-1].get('content')
    if not isinstance(response, str):
        raise DataError(f'{where}: the response {shown(response)}, expected text')
    return _one_turn(where, response)


def _one_turn(where: str, text: str) -> str:
    if any(mark in f'\n\n{text.strip()}' for mark in _ROLES.values()):
        raise DataError(f'{where}: a text with {HUMAN!r} or {ASSISTANT!r} in it, expected one turn')
    return text.strip()


def _need(where: str, row: Mapping[str, Any], key: str, kind: type, expected: str) -> Any:
    """A value of a kind that is not empty."""
    value = row.get(key)
    if not isinstance(value, kind) or not value:
        raise DataError(f'{where} field {key!r}: {shown(value)}, expected {expected}')
    return value


def _pair(where: str, row: Mapping[str, Any], subset: str) -> Iterator[Question]:
    """RewardBench and the prior sets: `prompt`, `chosen`, `rejected`, and `subset` or none."""
    yield _question(where, row, (row.get('chosen'), row.get('rejected')),
                    row.get('subset') or subset)


def _best_of_four(where: str, row: Mapping[str, Any], subset: str) -> Iterator[Question]:
    """RewardBench 2: lists `chosen` and `rejected`, of which Ties has more than one right."""
    chosen, rejected = (_need(where, row, key, list, 'a list of responses')
                        for key in ('chosen', 'rejected'))
    name = _need(where, row, 'subset', str, 'the name of a subset')
    if name != _TIES:
        if len(chosen) != 1:
            raise DataError(f"{where} field 'chosen': {len(chosen)} responses, expected one "
                            f'outside of {_TIES}')
        yield _question(where, row, (*chosen, *rejected), name)
        return
    kind, colon, number = str(row.get('id')).partition(':')
    if kind not in ('ref', 'tied') or not (colon and number.isdecimal()):
        raise DataError(f"{where} field 'id': {shown(row.get('id'))}, expected 'ref:N' or 'tied:N' "
                        f'in {_TIES}')
    yield _question(where, row, (*chosen, *rejected), name, right=len(chosen), kind=kind,
                    group=number)


def _styles(where: str, row: Mapping[str, Any], subset: str) -> Iterator[Question]:
    """RM-Bench: `chosen` and `rejected`, three styles of each, from concise to marked up.

    The files of its repository, one a domain, do not say the domain in their rows.
    """
    sides = [_need(where, row, key, list, 'three responses') for key in ('chosen', 'rejected')]
    if any(len(side) != _STYLES for side in sides):
        raise DataError(f'{where}: {len(sides[0])} chosen and {len(sides[1])} rejected responses, '
                        f'expected {_STYLES} styles of each')
    row = {'domain': subset.removesuffix('_filtered') or None, **row}
    domain = _need(where, row, 'domain', str, 'the name of a domain')
    yield _question(where, row, itertools.chain(*sides), domain, right=_STYLES)


def _judged(where: str, row: Mapping[str, Any], subset: str) -> Iterator[Question]:
    """JudgeBench: `response_A`, `response_B` and `label`, 'A>B' or 'B>A'."""
    label = row.get('label')
    if label not in ('A>B', 'B>A'):
        raise DataError(f"{where} field 'label': {shown(label)}, expected 'A>B' or 'B>A'")
    source = _need(where, row, 'source', str, 'the name of a source')
    keys = ('response_A', 'response_B') if label == 'A>B' else ('response_B', 'response_A')
    yield _question(where, row, (row.get(key) for key in keys),
                    next((name for name in _SOURCES if source.startswith(name)), source),
                    prompt='question')


def _preferred(where: str, row: Mapping[str, Any], subset: str) -> Iterator[Question]:
    """PPE's people: `response_1`, `response_2` and `winner`; ties are no questions."""
    winner = row.get('winner')
    if not isinstance(winner, str) or not (
            winner in ('model_a', 'model_b') or winner.startswith('tie')):
        raise DataError(f"{where} field 'winner': {shown(winner)}, expected 'model_a', 'model_b' "
                        'or a tie')
    if winner in ('model_a', 'model_b'):
        keys = ('response_1', 'response_2')[::1 if winner == 'model_a' else -1]
        yield _question(where, row, (row.get(key) for key in keys), 'all')


def _conflicts(where: str, row: Mapping[str, Any], subset: str) -> Iterator[Question]:
    """PPE's correctness: `response_1` on, `scores` of each, and pairs of indices, from 0."""
    scores = _need(where, row, 'scores', list, 'a list of numbers')
    pairs = row.get('sampled_conflict_pairs')
    if not isinstance(pairs, list):
        raise DataError(f"{where} field 'sampled_conflict_pairs': {shown(pairs)}, expected pairs")
    for number, pair in enumerate(pairs):
        at = f'{where} sampled_conflict_pairs[{number}]'
        if not (isinstance(pair, list) and len(pair) == 2 and all(
                isinstance(i, int) and 0 <= i < len(scores) for i in pair)):
            raise DataError(f'{at}: {shown(pair)}, expected two of {len(scores)} indices')
        first, second = pair
        if scores[first] == scores[second]:
            raise DataError(f'{at}: {shown(pair)}, expected one right and one wrong response')
        order = pair if scores[first] > scores[second] else (second, first)
        yield _question(at, row, (row.get(f'response_{i + 1}') for i in order), subset or 'all')


_PPE = {'mmlu_pro': 'MMLU-Pro', 'math': 'MATH', 'gpqa': 'GPQA', 'ifeval': 'IFEval',
        'mbpp_plus': 'MBPP-Plus'}

# Name -> suite, as published: RewardBench (Lambert et al., arXiv 2403.13787), RewardBench 2 (Malik
# et al., 2506.01937), RM-Bench (Liu et al., 2410.16184), JudgeBench (Tan et al., 2410.12784), PPE
# (Frick et al., 2410.14872).
SUITES = {
    'reward-bench': Suite((('allenai/reward-bench', 'filtered', ''),), _pair),
    'prior-sets': Suite((('allenai/preference-test-sets', '', ''),), _pair),
    'reward-bench-2': Suite((('allenai/reward-bench-2', 'test', ''),), _best_of_four),
    'rm-bench': Suite((('THU-KEG/RM-Bench', 'train', ''),), _styles),
    'judge-bench': Suite((('ScalerLab/JudgeBench', 'gpt', ''),), _judged),
    'ppe-preference': Suite((('lmarena-ai/PPE-Human-Preference-V1', '', ''),), _preferred),
    'ppe-correctness': Suite(tuple(
        (f'lmarena-ai/PPE-{home}-Best-of-K', 'train', name) for name, home in _PPE.items()),
        _conflicts),
}
