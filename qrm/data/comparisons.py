"""Comparisons: a prompt with K >= 1 responses and what people said of them.

Every source (HH folders, JSON Lines, hub data sets, generated demos) becomes a list of
`Comparison`; a pair (chosen, rejected) is K = 2, a response to be scored is K = 1. Rows are
checked here, once, where file and line are still known.
"""

import collections
import dataclasses
import functools
import gzip
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# A chat is a tuple of messages, mappings with the keys `role` and `content`.
Messages = tuple[Mapping[str, str], ...]
Text = str | Messages

ROLES = ('system', 'user', 'assistant', 'tool')

_HUMAN = '\n\nHuman:'
_ASSISTANT = '\n\nAssistant:'
_PAIR_KEYS = frozenset(('chosen', 'rejected'))
_LIST_KEYS = frozenset(('responses', 'ratings', 'ranks', 'preferred'))
_SINGLE_KEYS = frozenset(('response', 'rating'))
_COMMON_KEYS = frozenset(('prompt', 'preference', 'margin', 'weight', 'id', 'annotator'))
_ROW_FORMS = "'chosen' + 'rejected', 'prompt' + 'responses' or 'prompt' + 'response'"


class DataError(ValueError):
    """Bad input; the message names the file, the line, the key and what was expected."""


class MalformedRow(DataError):
    """One row that cannot be used; a caller may skip and count such rows."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A prompt, its K responses and what is known about them.

    Attributes:
      id: unique name of the comparison within its source.
      prompt: text or chat messages that every response continues ('' if there is none).
      responses: K texts or message tuples; dialogue k is `prompt` followed by `responses[k]`.
      group: what the comparison is clustered by in splits and intervals (the opening question).
      ranks: place of each response, 0 best, equal numbers tie.
      preferred: index of the one response that is preferred to all others.
      preference: for K = 2, probability in [0, 1] that the first response is preferred.
      ratings: one number per response, higher is better, None where unrated.
      attributes: name of an attribute -> `ratings` of it, for the attributes that were asked for.
      annotator: name of the person who judged.
      margin: by how much whichever response is preferred should be ahead, in units of reward;
        under a soft label this holds for either order.
      weight: weight of the comparison in losses.
    """

    id: str
    prompt: Text
    responses: tuple[Text, ...]
    group: str
    ranks: tuple[int, ...] | None = None
    preferred: int | None = None
    preference: float | None = None
    ratings: tuple[float | None, ...] | None = None
    attributes: Mapping[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)
    annotator: str | None = None
    margin: float = 0.0
    weight: float = 1.0

    def preference_matrix(self) -> np.ndarray:
        """P[i, j], the probability that response i is preferred to j; 0 both ways if unknown.

        A soft label takes precedence over ranks, ranks over a single preferred response, and
        that over ratings; a tie is 1/2 both ways.

        Returns:
          [K, K] float32 with a zero diagonal.
        """
        k = len(self.responses)
        matrix = np.zeros((k, k), np.float32)
        if self.preference is not None:
            matrix[0, 1], matrix[1, 0] = self.preference, 1.0 - self.preference
        elif self.ranks is None and self.preferred is not None:
            matrix[self.preferred] = 1.0
            matrix[self.preferred, self.preferred] = 0.0
        else:
            scores = [-r for r in self.ranks] if self.ranks else self.ratings or [None] * k
            for i, j in itertools.permutations(range(k), 2):
                if scores[i] is not None and scores[j] is not None:
                    matrix[i, j] = 0.5 * (1.0 + np.sign(scores[i] - scores[j]))
        return matrix

    def rating_matrix(self, names: Sequence[str] = ()) -> np.ndarray:
        """Ratings of each response, NaN where there is none.

        Args:
          names: of the attributes, one column each; (): the rating of the response as a whole.

        Returns:
          [K, A] float32.
        """
        unrated = (None,) * len(self.responses)
        columns = [self.attributes.get(name, unrated) for name in names]
        return np.array(columns or [self.ratings or unrated], np.float32).T


# ---------------------------------------------------------------------------------------------
# Rows


def parse_row(
    row: Any, where: str, *, allow_blank: bool = False, attributes: Sequence[str] = ()
) -> Comparison:
    """Turns one row of a data set into a `Comparison`.

    Accepted are rows with `chosen` + `rejected` (whole dialogues, or continuations of `prompt`),
    `prompt` + `responses` (optionally `ratings`, `ranks` or `preferred`) and `prompt` +
    `response` (optionally `rating`); texts are strings or lists of chat messages. Optional:
    `preference` (probability that chosen, or the first of two responses, is preferred), `margin`,
    `weight`, `annotator`, `id`. Each of the `attributes` is a key of its own, a number or null (as
    in HelpSteer), or with `responses` a list of these.

    Args:
      row: the decoded row.
      where: 'file:line', used in errors and as the id of rows without one.
      allow_blank: accept empty responses (they can be scored, but teach nothing).
      attributes: names of rated attributes to read.

    Raises:
      MalformedRow: names `where`, the key and what was expected.
    """
    if not isinstance(row, Mapping):
        raise MalformedRow(f'{where}: got {_kind(row)}, expected an object with {_ROW_FORMS}')
    fields = _Fields(row, where, allow_blank)
    name = fields.get('id', (str, int), 'text or an integer')
    if isinstance(name, str):
        fields.text('id', blank=True)
    fields.where = where if name is None else f'{where} id={name}'
    if 'chosen' in row or 'rejected' in row:
        prompt, responses, group = fields.pair()
        known = {'ranks': (0, 1)}
    elif 'responses' in row:
        prompt, responses = fields.text('prompt', blank=True), fields.texts('responses')
        known, group = fields.judgements(len(responses)), opening(prompt)
    elif 'response' in row:
        prompt, responses = fields.text('prompt', blank=True), (fields.text('response'),)
        known, group = {'ratings': fields.rating('rating')}, opening(prompt)
    else:
        raise MalformedRow(
            f'{fields.where}: keys {sorted(map(str, row))} make no comparison, expected '
            f'{_ROW_FORMS}'
        )
    if not isinstance(prompt, str):
        responses = tuple(_as_messages(response) for response in responses)
    elif any(not isinstance(response, str) for response in responses):
        fields.fail('responses' if 'responses' in row else 'response',
                    'chat messages after a text prompt, expected both to be of a kind')
    annotator = fields.get('annotator', (str, int), 'text or an integer')
    if isinstance(annotator, str) and not fields.text('annotator', blank=True).strip():
        fields.fail('annotator', 'blank text, expected a name')
    preference = fields.number('preference', low=0.0, high=1.0)
    if preference is not None and len(responses) != 2:
        fields.fail('preference', f'a soft label for {len(responses)} responses, expected 2')
    return Comparison(
        id=where if name is None else str(name),
        prompt=prompt,
        responses=responses,
        group=group or where,
        preference=preference,
        attributes={name: ratings for name in attributes
                    if (ratings := fields.attribute(name, len(responses)))},
        annotator=None if annotator is None else str(annotator),
        margin=fields.number('margin') or 0.0,
        weight=1.0 if row.get('weight') is None else fields.number('weight', low=0.0),
        **known,
    )


def ignored_keys(row: Mapping[str, Any], attributes: Sequence[str] = ()) -> set[str]:
    """Keys of a row that `parse_row` does not read."""
    if _PAIR_KEYS & row.keys():
        read = _PAIR_KEYS
    else:
        read = _LIST_KEYS if 'responses' in row else _SINGLE_KEYS
    return set(map(str, row)) - _COMMON_KEYS - read - set(attributes)


def opening(prompt: Text) -> str:
    """The first human turn of a prompt, or the whole prompt if it has no turns."""
    if not isinstance(prompt, str):
        return next((m['content'] for m in prompt if m['role'] == 'user'), '')
    if prompt.startswith(_HUMAN):
        return prompt[len(_HUMAN):].split(_ASSISTANT)[0].strip()
    return prompt.strip()


class _Fields:
    """Typed access to the fields of one row, with errors that say where and what."""

    def __init__(self, row: Mapping[str, Any], where: str, allow_blank: bool):
        self.row, self.where, self.allow_blank = row, where, allow_blank

    def fail(self, key: str, problem: str):
        raise MalformedRow(f"{self.where} field '{key}': got {problem}")

    def get(self, key: str, types: tuple[type, ...], expected: str) -> Any:
        value = self.row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            self.fail(key, f'{_kind(value)}, expected {expected}')
        return value

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        value = self.get(key, (int, float), 'a number')
        if value is not None and not (_is_finite(value) and low <= value <= high):
            found = value if _is_finite(value) else _kind(value)
            self.fail(key, f'{found}, expected a finite number in [{low}, {high}]')
        return value if value is None else float(value)

    def text(self, key: str, blank: bool = False) -> Text:
        if key not in self.row:
            self.fail(key, 'nothing (the key is missing), expected text or chat messages')
        return self._text(key, self.row[key], blank or self.allow_blank)

    def texts(self, key: str) -> tuple[Text, ...]:
        values = self.row[key]
        if not isinstance(values, (list, tuple)) or not values:
            self.fail(key, f'{_kind(values)}, expected a list of at least one response')
        return tuple(
            self._text(f'{key}[{i}]', value, self.allow_blank) for i, value in enumerate(values)
        )

    def pair(self) -> tuple[Text, tuple[Text, ...], str]:
        """Prompt, (chosen, rejected) as its continuations, and the group."""
        chosen, rejected = self.text('chosen'), self.text('rejected')
        if isinstance(chosen, str) != isinstance(rejected, str):
            self.fail('rejected', 'text beside chat messages, expected both to be of a kind')
        given = self.row.get('prompt')
        text_beside_chats = isinstance(given, str) and not isinstance(chosen, str)
        if given is not None and not text_beside_chats:
            prompt = self.text('prompt', blank=True)
            n = len(prompt)
            # Conversations may be whole and begin with the prompt; texts are continuations.
            if not isinstance(prompt, str) and all(
                len(chat) > n and chat[:n] == prompt for chat in (chosen, rejected)
            ):
                chosen, rejected = chosen[n:], rejected[n:]
            return prompt, (chosen, rejected), opening(prompt)
        if text_beside_chats and given and not any(
            message['role'] == 'user' for message in (*chosen, *rejected)
        ):
            self.fail('prompt', 'text before chat messages that do not contain it, expected both '
                                'to be of a kind')
        if isinstance(chosen, str):
            split = _common(chosen, rejected).rfind(_ASSISTANT)
            split = split + len(_ASSISTANT) if split >= 0 else 0
            # Unrelated texts may begin alike: only turns tell what the opening question is.
            group = opening(chosen) if chosen.startswith(_HUMAN) else ''
            return chosen[:split], (chosen[split:], rejected[split:]), group
        prompt = _common(chosen[:-1], rejected[:-1])
        return prompt, (chosen[len(prompt):], rejected[len(prompt):]), opening(prompt or chosen)

    def judgements(self, k: int) -> dict[str, Any]:
        """What a K-wise row says of its responses, as arguments of `Comparison`."""
        known: dict[str, Any] = {}
        for key, types, expected in (('ratings', (int, float), 'a finite number'),
                                     ('ranks', (int,), 'an integer')):
            values = self.numbers(key, k, types, expected, missing=key == 'ratings')
            if values is not None:
                known[key] = values
        preferred = self.get('preferred', (int,), 'the index of a response')
        if preferred is not None:
            if not 0 <= preferred < k:
                self.fail('preferred', f'{preferred}, expected an index in 0..{k - 1}')
            known['preferred'] = preferred
        return known

    def numbers(self, key: str, k: int, types: tuple[type, ...], expected: str,
                missing: bool) -> tuple[Any, ...] | None:
        """A list of one number for each of k responses, None where one may be missing."""
        values = self.get(key, (list, tuple), f'a list of {k} numbers')
        if values is None:
            return None
        if len(values) != k:
            self.fail(key, f'{len(values)} numbers, expected one for each of {k} responses')
        for i, value in enumerate(values):
            if value is None and missing:
                continue
            if isinstance(value, bool) or not isinstance(value, types) or not _is_finite(value):
                self.fail(f'{key}[{i}]', f'{_kind(value)}, expected {expected}')
        return tuple(values)

    def rating(self, key: str) -> tuple[float, ...] | None:
        """The rating of a single response."""
        value = self.number(key)
        return None if value is None else (value,)

    def attribute(self, key: str, k: int) -> tuple[float | None, ...] | None:
        """Ratings of an attribute: a number for a single response, else a list."""
        if 'responses' not in self.row and k == 1:
            return self.rating(key)
        return self.numbers(key, k, (int, float), 'a finite number', missing=True)

    def _text(self, key: str, value: Any, blank: bool) -> Text:
        if isinstance(value, str):
            try:
                value.encode('utf-8')
            except UnicodeEncodeError:
                self.fail(key, 'text with a lone surrogate, expected valid Unicode')
            if not value.strip() and not blank:
                self.fail(key, 'blank text, expected a response')
            return value
        if not isinstance(value, (list, tuple)) or not value:
            self.fail(key, f'{_kind(value)}, expected text or a list of chat messages')
        for i, message in enumerate(value):
            at = f'{key}[{i}]'
            if not isinstance(message, Mapping):
                self.fail(at, f"{_kind(message)}, expected a message with 'role' and 'content'")
            role = message.get('role')
            if role not in ROLES:
                found = repr(role) if isinstance(role, str) else _kind(role)
                self.fail(f'{at}.role', f'{found}, expected one of {ROLES}')
            if not isinstance(message.get('content'), str):
                self.fail(f'{at}.content', f'{_kind(message.get("content"))}, expected text')
            self._text(f'{at}.content', message['content'], blank=True)
        return tuple({'role': m['role'], 'content': m['content']} for m in value)


def _common(first: Any, second: Any) -> Any:
    """The longest common prefix of two texts, or of two tuples."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return first[:low]


def _as_messages(text: Text) -> Messages:
    return ({'role': 'assistant', 'content': text},) if isinstance(text, str) else text


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON has integers that are too large for a float.
        return False


def _kind(value: Any) -> str:
    """Short description of a value for error messages, without its content."""
    names = {type(None): 'null', str: 'text', bool: 'a truth value', int: 'an integer',
             float: 'a number', list: 'a list', dict: 'an object'}
    if isinstance(value, (int, float)) and not _is_finite(value):
        return str(value) if isinstance(value, float) else 'an integer beyond all floats'
    if value in ('', [], {}):
        return f'empty {names[type(value)].removeprefix("a ").removeprefix("an ")}'
    return names.get(type(value), type(value).__name__)


# ---------------------------------------------------------------------------------------------
# JSON Lines

_BOM = b'\xef\xbb\xbf'
# How files begin that a download has left in place of the rows, archives included.
_NOT_ROWS = {
    b'version https://git-lfs': 'a Git LFS pointer, expected the file it points to',
    b'<': 'a web page, expected one JSON object a line',
}


def read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    """Reads a `.jsonl` or `.jsonl.gz` file row by row.

    Yields:
      ('file:line', row) for each line that is not blank; a line that cannot be decoded is
      yielded as a `MalformedRow` in place of the row, so that the caller decides.

    Raises:
      DataError: the file as a whole cannot be trusted: missing, not UTF-8, a damaged archive, a
        last line that is cut, a pointer or a web page in place of the content, no rows at all, or
        duplicate keys within a row.
    """
    rows = 0
    for number, raw in _lines(path):
        where = f'{path}:{number}'
        if number == 1:
            raw = raw.removeprefix(_BOM)
        try:
            line = raw.decode('utf-8')
        except UnicodeDecodeError as error:
            raise DataError(f'{where}: not UTF-8 ({error.reason} at byte {error.start})') from error
        if not line.strip():
            continue
        rows += 1
        try:
            yield where, json.loads(line, object_pairs_hook=functools.partial(_unique, where))
        except DataError:
            raise
        except (ValueError, RecursionError) as error:  # ValueError: also for endless integers
            if not raw.endswith(b'\n') and number > 1:
                raise DataError(f'{where}: the last line is cut ({error})') from error
            yield where, MalformedRow(f'{where}: not JSON ({error}); expected one object a line')
    if not rows:
        raise DataError(f'{path}: the file has no rows')


def read_comparisons(path: str) -> list[Comparison]:
    """Reads a JSON Lines file of rows to be scored, blank responses included.

    Raises:
      DataError: see `read_jsonl`; or a row is malformed.
    """
    comparisons = []
    for where, row in read_jsonl(path):
        if isinstance(row, MalformedRow):
            raise row
        comparisons.append(parse_row(row, where, allow_blank=True))
    return comparisons


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    if not os.path.isfile(path):
        raise DataError(f'{path}: no such file')
    try:
        with open(path, 'rb') as file:
            start = file.read(64).removeprefix(_BOM).lstrip()
        for magic, found in _NOT_ROWS.items():
            if start.startswith(magic):
                raise DataError(f'{path}:1: got {found}')
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
            yield from enumerate(file, start=1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f'{path}: damaged gzip archive ({error})') from error
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror})') from error


def _unique(where: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DataError(f"{where} field '{key}': the key stands twice in one object")
        result[key] = value
    return result


# ---------------------------------------------------------------------------------------------
# Report


@dataclasses.dataclass
class DataReport:
    """What happened to the rows of one split; `read` = `kept` + the sum of `dropped`.

    Attributes:
      source: where the rows came from.
      split: 'train', 'validation' or 'test'.
      read: rows read.
      kept: comparisons that remain.
      dropped: reason -> rows left out.
      truncated: kept comparisons whose prompt was cut from the left.
      identical: comparisons whose responses are all the same (dropped: they teach nothing).
      tied: kept comparisons in which two responses are tied.
      notes: remark -> rows it applies to; none of these rows is left out.
      dialogue_tokens: tokens of all dialogues, each with its own copy of the prompt.
      packed_tokens: tokens with each shared prompt stored once.
      prompt_tokens: tokens of the dialogues that lie in shared prompts.
    """

    source: str
    split: str
    read: int = 0
    kept: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    truncated: int = 0
    identical: int = 0
    tied: int = 0
    notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    dialogue_tokens: int = 0
    packed_tokens: int = 0
    prompt_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the two ratios derived from the token counts."""
        total = max(self.dialogue_tokens, 1)
        return dataclasses.asdict(self) | {
            'dropped': dict(self.dropped),
            'notes': dict(self.notes),
            'prefix_share': self.prompt_tokens / total,
            'tokens_saved': self.dialogue_tokens - self.packed_tokens,
        }

    def format(self) -> str:
        """One line of counts and one for each reason and remark, for the terminal."""
        d = self.as_dict()
        saved = d['tokens_saved'] / max(self.dialogue_tokens, 1)
        lines = [
            f'{self.split}: {self.read} read, {self.kept} kept, {sum(self.dropped.values())} '
            f'dropped, {self.truncated} truncated, {self.identical} identical, {self.tied} tied; '
            f'{self.dialogue_tokens} tokens, {d["prefix_share"]:.0%} in shared prompts, '
            f'{saved:.0%} saved by storing them once ({self.source})'
        ]
        lines += [f'  dropped {count}: {reason}' for reason, count in self.dropped.items()]
        lines += [f'  note {count}: {note}' for note, count in self.notes.items()]
        return '\n'.join(lines)
