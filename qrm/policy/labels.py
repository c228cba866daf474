"""Labels from judges: pairs of responses, asked in both orders, as rows that can be learnt from.

A judge prefers what stands first, or second, more than it knows. So each pair is asked in both
orders, its label is the mean of both, and how far the order matters is told beside it.

Answers are kept in a file as they come, by all that they depend on, so that a run that was ended
goes on without asking twice.

Axes: n pairs; 2 orders of a pair, the first of which is that of the row.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qrm.analysis import tables, winrate
from qrm.data import translate
from qrm.data.comparisons import Comparison, DataError, MalformedRow
from qrm.data.files import is_rows, read_rows
from qrm.data.rows import parse_row
from qrm.data.sources import understood
from qrm.policy import judges, questions
from qrm.policy.candidates import readable_row
from qrm.policy.judges import Judge
from qrm.policy.questions import Answer, Options, Spec
from qrm.rewards import pairwise, resampling, statistics
from qrm.serving.score import check_target, write_rows
from qrm.training.interruptions import check

PAIRS = ('all', 'first')
KINDS = ('soft', 'hard')
REPLICATES, LEVEL, SEED = 1000, 0.95, 0  # of the intervals

_TOLD = 100  # questions, after which their number is printed
_FEW = 1e-12  # a label this near to 1/2 is a tie, as sums of floats are not exact
_BEYOND = 1e-5  # by which rounding of float32 takes probabilities beyond 1
_KEPT = ('probability', 'failure', 'share', 'read', 'written', 'cut')


class Pair(NamedTuple):
    """Two responses to be judged.

    Attributes:
      comparison: of these two, without anything that is known of them; its id names the row.
      known: probability that the first is preferred, as the row says; None if it does not.
    """

    comparison: Comparison
    known: float | None


class Verdicts(NamedTuple):
    """What a judge says of n pairs.

    Attributes:
      answers: [n][2], in the order of the row and in the other one.
      asked: questions that were asked now; all others were kept.
      seconds: that it took.
    """

    answers: list[tuple[Answer, Answer]]
    asked: int
    seconds: float

    def first(self) -> np.ndarray:
        """[n, 2] probability that whichever response stands first is better; NaN: no answer."""
        return np.array([[np.nan if one.probability is None else one.probability for one in both]
                         for both in self.answers], np.float64).reshape(-1, 2)

    def labels(self) -> np.ndarray:
        """[n] probability that the row's first response is better, the mean of both orders; NaN
        where there is no answer to one of them."""
        first = self.first()
        # Probabilities may be beyond 1 by rounding, which rows may not.
        return np.clip((first[:, 0] + (1.0 - first[:, 1])) / 2.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Output:
    """Which labels are written.

    Attributes:
      kind: one of `KINDS`: probabilities, or which response is preferred.
      least: confidence, max(p, 1 - p), that a label has at least; a tie is no hard label.
    """

    kind: str = 'soft'
    least: float = 0.5


def label_file(
    specs: Sequence[Spec], options: Options, data: Any, target: str, output: Output, *,
    pairs: str = 'all', cache: str = '',
) -> str:
    """Judges pairs of responses of a file, and writes a row for each label of each judge.

    Args:
      specs: judges with different names, asked one after the other.
      options: how they are asked.
      data: the `data` section of a config, whose `path` is the file.
      target: file to write, with gzip if it ends in `.gz`; it appears when all is answered.
      output: which labels are written.
      pairs: 'all' pairs of the responses of a row, or its 'first' two.
      cache: file where answers are kept as they come; '': `target` with '.answers' after it.

    Returns:
      What was asked, answered, found and written, in lines.

    Raises:
      DataError: a row that cannot be read, a judge that cannot be asked, a cache that is none, or a
        target that cannot be written.
    """
    if len({spec.name for spec in specs}) < len(specs):
        raise DataError(f'judges {[spec.name for spec in specs]}: expected different names, as '
                        'NAME=KIND:WHAT gives them')
    check_target(data.path, target)
    found, notes = read_pairs(data, pairs)
    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    labels = []
    for spec in specs:
        judge = judges.load(spec, options)
        with Kept(cache or f'{target}.answers', data.path, target) as kept:
            verdicts = ask(judge, found, kept)
        written, dropped = label_rows(spec.name, found, verdicts.labels(), output)
        rows += written
        labels.append(verdicts.labels())
        lines += describe(spec, summarise(found, verdicts), verdicts)
        lines += [f'  written: {len(written)} rows' + ''.join(
            f', {count} left out ({reason})' for reason, count in dropped.items())]
    write_rows(target, rows)
    return '\n'.join([
        f'{target}: {len(rows)} rows, of {len(found)} pairs', *lines,
        *_between(specs, found, labels),
        *(f'  note {count}: {note}' for note, count in notes.items())])


def read_pairs(data: Any, which: str) -> tuple[list[Pair], collections.Counter[str]]:
    """Pairs of the responses of the rows of a file, and what was noticed about rows and pairs.

    Args:
      data: see `label_file`.
      which: one of `PAIRS`.

    Raises:
      DataError: the file or a row of it cannot be read, or there is no pair.
    """
    if not is_rows(data.path):
        raise DataError(f'{data.path}: expected a file of rows')
    name, rows = understood(read_rows(data.path), data)
    pairs: list[Pair] = []
    notes: collections.Counter[str] = collections.Counter()
    for where, row in rows:
        if isinstance(row, translate.NotJudged):
            notes['row of its format that judges nothing, not read'] += 1
            continue
        if isinstance(row, MalformedRow):
            raise row
        comparison = parse_row(row, where, literal=name not in ('rows', 'columns'))
        notes.update(comparison.remarks)
        k = len(comparison.responses)
        notes['row with one response, not judged'] += k < 2
        if comparison.tools:
            notes['row with tools, which only a reward model is told of'] += 1
        for i, j in _indices(k, which):
            if comparison.responses[i] == comparison.responses[j]:
                notes['pair of equal responses, not judged'] += 1
            else:
                pairs.append(_pair(comparison, i, j))
    if not pairs:
        raise DataError(f'{data.path}: no row has two different responses to judge')
    return pairs, +notes


def _indices(k: int, which: str) -> list[tuple[int, int]]:
    """The pairs of K responses that are judged."""
    found = [(i, j) for i in range(k) for j in range(i + 1, k)]
    return found if which == 'all' else found[:1]


def _pair(comparison: Comparison, i: int, j: int) -> Pair:
    matrix = comparison.preference_matrix()
    known = float(matrix[i, j]) if matrix[i, j] + matrix[j, i] else None
    name = comparison.id if len(comparison.responses) == 2 else f'{comparison.id} {i}-{j}'
    return Pair(dataclasses.replace(
        comparison, id=name, responses=(comparison.responses[i], comparison.responses[j]),
        ranks=None, preferred=None, preference=None, ratings=None, attributes={}, annotator=None,
        margin=0.0, remarks=()), known)


class Kept:
    """Answers in a file of lines, to which more are added as they come.

    A line says to which question, by a digest of it and of all that the answer depends on, and
    holds no text. A last line that was cut, as where a process was killed, is taken out. While a
    file is entered no other process has it.

    Args:
      path: of the file, made where there is none.
      others: files that it must not be.

    Raises:
      DataError: on entering, it cannot be written, another process has it, or it holds something
        else.
    """

    def __init__(self, path: str, *others: str):
        self._path, self._others = path, others
        self._answers: dict[str, Answer] = {}

    def __enter__(self) -> 'Kept':
        with contextlib.ExitStack() as stack:
            if any(os.path.exists(self._path) and os.path.exists(one)
                   and os.path.samefile(self._path, one) for one in self._others):
                raise DataError(f'{self._path}: expected another file to keep answers in')
            try:
                self._file = stack.enter_context(open(self._path, 'a+b'))
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f'{self._path}: another process keeps answers in it') from error
            except OSError as error:
                raise DataError(f'{self._path}: cannot be written ({error.strerror}), expected a '
                                'file to keep answers in') from error
            self._read()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *unused) -> None:
        self._stack.close()

    def get(self, key: str) -> Answer | None:
        """The answer to a question, if it was kept."""
        return self._answers.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keeps an answer, unless it may be another one next time."""
        self._answers[key] = answer
        if answer.final:
            said = {name: value for name, value in answer._asdict().items() if name in _KEPT}
            self._file.write(json.dumps({'key': key} | said, allow_nan=False).encode() + b'\n')
            self._file.flush()

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b'\n'):
                break
            whole += len(line)
            try:
                said = json.loads(line)
                key = said.pop('key')
                self._answers[key] = _checked(Answer(**said))
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f'{self._path}:{number}: no answer of a judge, expected a file in '
                                'which answers were kept') from error
        self._file.truncate(whole)


def _checked(answer: Answer) -> Answer:
    """An answer that was read.

    Raises:
      TypeError, ValueError: it is none.
    """
    for value in (answer.probability, answer.share):
        if value is not None and not (isinstance(value, float) and 0.0 <= value <= 1.0 + _BEYOND):
            raise ValueError(value)
    if not (isinstance(answer.failure, str) and type(answer.read) is type(answer.written) is int
            and isinstance(answer.cut, bool)):
        raise TypeError(answer)
    return answer


def ask(judge: Judge, pairs: Sequence[Pair], kept: Kept) -> Verdicts:
    """Asks a judge both orders of each pair, but for what was kept; equal questions once.

    Raises:
      DataError: see `Judge`; what was answered until then is kept.
    """
    begin = time.monotonic()
    orders = [(pair.comparison, dataclasses.replace(
        pair.comparison, responses=pair.comparison.responses[::-1])) for pair in pairs]
    keys = [tuple(hashlib.sha256(judge.identity.encode() + one.text_digest(ordered=True)
                                 ).hexdigest()[:32] for one in both) for both in orders]
    new = {key: one for both, own in zip(orders, keys, strict=True)
           for one, key in zip(both, own, strict=True) if kept.get(key) is None}
    of_places = list(new)
    for done, (place, answer) in enumerate(judge(list(new.values())), start=1):
        kept.add(of_places[place], answer)
        check()
        if done % _TOLD == 0:
            print(f'{judge.name}: {done} of {len(new)} questions answered', flush=True)
    answers = [(kept.get(first), kept.get(second)) for first, second in keys]
    return Verdicts(answers, len(new), time.monotonic() - begin)


def summarise(pairs: Sequence[Pair], verdicts: Verdicts) -> dict[str, Any]:
    """What there is to say of a judge, ready for JSON.

    Means are over pairs that are answered in both orders; intervals are over opening questions.

    Returns:
      pairs, questions: how many.
      unanswered, unanswered_pairs: shares; failures: reason -> questions.
      first: mean P(first) - 1/2; consistent: share of pairs decided alike in both orders; ties:
        share of labels of 1/2; accuracy and log_loss (nats): of labels, against what rows say. Each
        with 'value', 'low' and 'high', None where these are not known.
      known, known_ties: pairs of which rows say something, and of these ties, which have no
        accuracy.
      limited: labels that give what rows say less than `pairwise.LEAST`, which the log-loss takes
        for it.
      share: mean probability of both answers; None where that is not known.
      cut: questions; read, written: tokens.
    """
    first, labels = verdicts.first(), verdicts.labels()
    flat = [one for both in verdicts.answers for one in both]
    answered = ~np.isnan(labels)
    groups = np.array([pair.comparison.group for pair in pairs])
    known = np.array([np.nan if pair.known is None else pair.known for pair in pairs])
    judged = answered & ~np.isnan(known)
    decided = judged & (known != 0.5)
    sides = np.stack([labels, 1.0 - labels])
    # What was thought impossible has an infinite loss, where it is the case.
    limited = (sides < pairwise.LEAST) & (np.stack([known, 1.0 - known]) > 0.0)
    logs = np.log(np.maximum(sides, pairwise.LEAST))
    values = {
        'first': (answered, _exact(first.mean(axis=1) - 0.5)),
        'consistent': (answered, ~pairwise.flips(_exact(np.stack(
            [first[:, 0] - 0.5, 0.5 - first[:, 1]], axis=1)))),
        'ties': (answered, _exact(labels - 0.5) == 0.0),
        'accuracy': (decided, statistics.halved_ties(_exact(labels - 0.5) * (known - 0.5))),
        'log_loss': (judged, statistics.log_scores(*logs, known))}
    shares = [one.share for one in flat if one.share is not None]
    missing = [one for one in flat if one.probability is None]
    return {
        'pairs': len(pairs), 'questions': len(flat), 'unanswered': len(missing) / len(flat),
        'unanswered_pairs': float((~answered).mean()),
        'failures': dict(collections.Counter(one.failure for one in missing)),
        **{name: _mean(groups[of], value[of].astype(np.float64))
           for name, (of, value) in values.items()},
        'known': int(judged.sum()), 'known_ties': int((judged & ~decided).sum()),
        'limited': int(limited.any(axis=0).sum()),
        'share': float(np.mean(shares)) if shares else None,
        'cut': sum(one.cut for one in flat), 'read': sum(one.read for one in flat),
        'written': sum(one.written for one in flat)}


def _mean(groups: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    """A mean over pairs with its interval over opening questions; None of no pairs."""
    if not len(values):
        return {'value': None, 'low': None, 'high': None}
    return winrate.over_prompts(values, winrate.prompt_weights(groups, REPLICATES, SEED), LEVEL)


def _exact(ahead: np.ndarray) -> np.ndarray:
    """The same with 0 for what only rounding tells from it."""
    return np.where(np.abs(ahead) <= _FEW, 0.0, ahead)


def label_rows(
    name: str, pairs: Sequence[Pair], labels: np.ndarray, output: Output
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of a judge's labels, and how many pairs have none, by reason.

    Args:
      name: of the judge, who is their annotator.
      pairs: n of them.
      labels: [n], see `Verdicts.labels`.
      output: which are written.
    """
    rows, dropped = [], collections.Counter[str]()
    for pair, label in zip(pairs, labels.tolist(), strict=True):
        c = dataclasses.replace(pair.comparison, id=f'{pair.comparison.id} by {name}',
                                annotator=name)
        tied = abs(label - 0.5) <= _FEW
        if np.isnan(label):
            dropped['not answered in both orders'] += 1
        elif output.kind == 'hard' and tied:
            dropped['a tie'] += 1
        elif max(label, 1.0 - label) < output.least:
            dropped[f'confidence below {output.least:g}'] += 1
        else:
            said = {'preferred': int(label < 0.5)} if output.kind == 'hard' else {
                'preference': 0.5 if tied else label}
            row, readable = readable_row(dataclasses.replace(c, **said))
            if readable:
                rows.append(row)
            else:
                dropped['a row that would be read as another'] += 1
    return rows, dict(dropped)


def describe(spec: Spec, found: Mapping[str, Any], verdicts: Verdicts) -> list[str]:
    """The result of `summarise` in lines, for the terminal."""
    shown = {name: tables.enclosed(found[name]) for name in (
        'consistent', 'ties', 'accuracy', 'log_loss')}
    few = ('' if found['first']['low'] is not None else
           f'; fewer than {resampling.MIN_GROUPS} opening questions have no interval')
    reasons = ''.join(f', {count} {reason}' for reason, count in found['failures'].items())
    lines = [
        f'{spec.name} ({spec.kind}): {found["pairs"]} pairs in both orders, '
        f'{found["questions"]} questions, {verdicts.asked} of them asked now',
        f'  unanswered: {found["unanswered"]:.1%} of questions, '
        f'{found["unanswered_pairs"]:.1%} of pairs{reasons}',
        f'  position bias: {tables.enclosed(found["first"], sign="+")}, mean P(first) - 1/2'
        f' ({LEVEL:.0%} intervals over opening questions{few})',
        f'  consistency: {shown["consistent"]}, share of pairs decided alike in both orders',
        f'  ties: {shown["ties"]} of labels']
    if found['known']:
        lines.append(
            f'  agreement with the labels of {found["known"]} pairs: accuracy '
            f'{shown["accuracy"]}, log-loss {shown["log_loss"]} nats (1/2 has .693)' + (
                f'; {found["known_ties"]} ties have no accuracy' * bool(found['known_ties'])) + (
                f'; {found["limited"]} labels gave the preferred response less than '
                f'{pairwise.LEAST:g} and were taken for it' * bool(found['limited'])))
    if found['share'] is not None:
        lines.append(f'  probability of {" and ".join(questions.ANSWERS)} together: mean '
                     f'{found["share"]:.3f} of all tokens')
    tokens = (f' of {found["read"]} tokens, {found["written"]} tokens of answers, '
              f'{found["cut"]} questions cut' if found['read'] else '')
    return [*lines, f'  cost: {found["questions"]} questions{tokens}; {verdicts.seconds:.1f} s now']


def _between(specs: Sequence[Spec], pairs: Sequence[Pair],
             labels: Sequence[np.ndarray]) -> Iterator[str]:
    """How often each two judges prefer the same response."""
    groups = np.array([pair.comparison.group for pair in pairs])
    for i in range(len(specs)):
        for j in range(i + 1, len(specs)):
            both = ~np.isnan(labels[i] + labels[j])
            same = np.sign(_exact(labels[i] - 0.5)) == np.sign(_exact(labels[j] - 0.5))
            number = _mean(groups[both], same[both].astype(np.float64))
            yield (f'{specs[i].name} and {specs[j].name}: the same verdict on '
                   f'{tables.enclosed(number)} of {both.sum()} pairs')
