"""Comparisons in tokens, and tables of them that are decoded one by one."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from qrm.data.records import named
from qrm.data.tables import Cache, Table

Ids = np.ndarray  # [length] int32


class Candidates(NamedTuple):
    """The K responses of a comparison that is read as orders of two of them, see `orders`.

    Attributes:
      preference: [K, K] float32, see `Comparison.preference_matrix`.
      ratings: [K, A] float32, see `Comparison.rating_matrix`.
      lengths: tokens of each.
    """

    preference: np.ndarray
    ratings: np.ndarray
    lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One comparison in tokens; dialogue k is `prompt` followed by `responses[k]`.

    Attributes:
      id, group: as in `Comparison`.
      prompt: [P] int32, tokens shared by all dialogues.
      responses: K arrays [R_k] int32 with R_k >= 1; the reward is read at the last token. With
        `candidates` these are orders of two responses, and so are those that all else is of.
      preference: [K, K] float32, see `Comparison.preference_matrix`.
      ratings: [K, A] float32, see `Comparison.rating_matrix`.
      margin, weight: as in `Comparison`.
      annotator: index of who judged, -1 if unknown.
      prompt_sizes: how many tokens at the start of each dialogue are those of its prompt alone, if
        anything reads it. Unlike the size of `prompt`, no other response changes it.
      candidates: what is known of the responses that these are orders of; None: they are responses.
    """

    id: str
    group: str
    prompt: Ids
    responses: tuple[Ids, ...]
    preference: np.ndarray
    ratings: np.ndarray
    margin: float = 0.0
    weight: float = 1.0
    annotator: int = -1
    prompt_sizes: tuple[int, ...] = ()
    candidates: Candidates | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each response."""
        return tuple(map(len, self.responses))

    @property
    def size(self) -> int:
        """Tokens of the comparison with the prompt stored once."""
        return len(self.prompt) + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest dialogue."""
        return len(self.prompt) + max(self.lengths)


class Lengths(NamedTuple):
    """How many tokens N comparisons have.

    Attributes:
      prompts: [N], of what is shared.
      responses: of each response of each comparison, one after the other.
      starts: [N + 1], first response of each comparison.
    """

    prompts: np.ndarray
    responses: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, encoded: Sequence[Encoded]) -> 'Lengths':
        """Of comparisons, at least one."""
        if isinstance(encoded, EncodedTable):
            return encoded.lengths
        return cls(np.array([len(item.prompt) for item in encoded]),
                   np.array([len(ids) for item in encoded for ids in item.responses]),
                   np.cumsum([0, *(len(item.responses) for item in encoded)]))

    @property
    def counts(self) -> np.ndarray:
        """[N], responses of each."""
        return np.diff(self.starts)

    @property
    def sizes(self) -> np.ndarray:
        """[N], see `Encoded.size`."""
        return self.prompts + np.add.reduceat(self.responses, self.starts[:-1])

    @property
    def longest(self) -> np.ndarray:
        """[N], see `Encoded.longest`."""
        return self.prompts + np.maximum.reduceat(self.responses, self.starts[:-1])


class Ranges(NamedTuple):
    """What networks look up of N comparisons.

    Attributes:
      low, high: [N], least and greatest token.
      annotator: [N], see `Encoded`.
    """

    low: np.ndarray
    high: np.ndarray
    annotator: np.ndarray

    @classmethod
    def of(cls, encoded: Sequence[Encoded]) -> 'Ranges':
        """Of comparisons, at least one."""
        if isinstance(encoded, EncodedTable):
            return encoded.ranges
        whole = [np.concatenate([item.prompt, *item.responses]) for item in encoded]
        return cls(np.array([ids.min() for ids in whole]), np.array([ids.max() for ids in whole]),
                   np.array([item.annotator for item in encoded]))


_LISTS = {'sizes': pa.int32(), 'preference': pa.float32(), 'ratings': pa.float32(),
          'prompt_sizes': pa.int32()}
_CANDIDATES = {'candidate_preference': pa.float32(), 'candidate_ratings': pa.float32(),
               'candidate_lengths': pa.int32()}
_NUMBERS = {'margin': pa.float64(), 'weight': pa.float64(), 'annotator': pa.int32(),
            'low': pa.int32(), 'high': pa.int32()}


def schema(vocabulary: int) -> pa.Schema:
    """Columns of a table, for tokens below `vocabulary`.

    `tokens` are the prompt and the responses, one after the other, whose lengths are `sizes`; `low`
    and `high` are the least and the greatest of them. Matrices are row after row. What is known of
    candidates is null where there are none.
    """
    token = pa.uint16() if vocabulary <= 2**16 else pa.int32()
    return pa.schema([('id', pa.string()), ('group', pa.string()), ('tokens', pa.list_(token)),
                      *((name, pa.list_(kind)) for name, kind in (_LISTS | _CANDIDATES).items()),
                      *_NUMBERS.items()])


def rows_of(items: Sequence[Encoded], columns: pa.Schema) -> pa.RecordBatch:
    """Comparisons as rows of `schema`."""
    parts = [(item.prompt, *item.responses) for item in items]
    tokens = [np.concatenate(of_item) for of_item in parts]
    lists = {'tokens': tokens, 'sizes': [list(map(len, of_item)) for of_item in parts],
             'preference': [item.preference.ravel() for item in items],
             'ratings': [item.ratings.ravel() for item in items],
             'prompt_sizes': [item.prompt_sizes for item in items],
             **_lists_of_candidates([item.candidates for item in items])}
    values = {'id': [item.id for item in items], 'group': [item.group for item in items],
              'margin': [item.margin for item in items], 'weight': [item.weight for item in items],
              'annotator': [item.annotator for item in items],
              'low': [ids.min() for ids in tokens], 'high': [ids.max() for ids in tokens]}
    return pa.record_batch(
        [_list_array(lists[field.name], field.type) if field.name in lists
         else pa.array(values[field.name], field.type) for field in columns], schema=columns)


def _lists_of_candidates(
    candidates: Sequence[Candidates | None]
) -> dict[str, list[Sequence[Any] | None]]:
    parts = [one and (one.preference.ravel(), one.ratings.ravel(), one.lengths)
             for one in candidates]
    return {name: [one and one[i] for one in parts] for i, name in enumerate(_CANDIDATES)}


def _list_array(rows: Sequence[Sequence[Any] | None], kind: pa.ListType) -> pa.ListArray:
    known = [row for row in rows if row is not None]
    offsets = np.cumsum([0, *(0 if row is None else len(row) for row in rows)], dtype=np.int32)
    flat = np.concatenate(known) if known else np.zeros(0)
    none = pa.array([row is None for row in rows]) if len(known) < len(rows) else None
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat).cast(kind.value_type), type=kind, mask=none)


class EncodedTable(Sequence[Encoded]):
    """Comparisons in the rows of a table, each decoded when it is used.

    Args:
      table: of `schema`.
      key: digest by which they are known; '': by none.
      cache: where what is made of them is kept.
      rows: numbers of those that these are; None: all.
      files: names of the files that ids may name, see `records.marked`.
    """

    def __init__(self, table: Table, key: str = '', cache: Cache | None = None,
                 rows: np.ndarray | None = None, files: Sequence[str] = ()):
        self._table, self._rows = table, np.arange(len(table)) if rows is None else rows
        self.key, self.cache, self._files = key, cache or Cache(''), files
        self._seen: dict[int, _Views] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return EncodedTable(self._table, '', self.cache, self._rows[at], self._files)
        number, place = self._table.place(int(self._rows[at]))
        return self._views(number).item(place)

    def __iter__(self) -> Iterator[Encoded]:
        if not np.array_equal(self._rows, np.arange(len(self._table))):
            yield from map(self.__getitem__, range(len(self)))
            return
        for batch in self._table.in_turn():
            views = _Views(batch, self._files)
            yield from map(views.item, range(len(batch)))

    @functools.cached_property
    def lengths(self) -> Lengths:
        """How many tokens they have; these are not read."""
        views = [self._views(number) for number in range(len(self._table.starts) - 1)]
        sizes = np.concatenate([view.lists['sizes'][1] for view in views] or [np.zeros(0, int)])
        counts = np.concatenate([np.diff(view.lists['sizes'][0]) for view in views]
                                or [np.zeros(0, int)])
        starts = np.cumsum([0, *counts])[self._rows]
        prompts, counts = sizes[starts], counts[self._rows] - 1
        ends = np.cumsum([0, *counts])
        places = np.repeat(starts + 1 - ends[:-1], counts) + np.arange(ends[-1])
        return Lengths(prompts, sizes[places], ends)

    def numbers(self, name: str) -> np.ndarray:
        """[rows], a column of one number each."""
        return self._table.numbers(name)[self._rows]

    @property
    def ranges(self) -> 'Ranges':
        """What networks look up; tokens are not read."""
        return Ranges(*map(self.numbers, ('low', 'high', 'annotator')))

    def _views(self, number: int) -> '_Views':
        if number not in self._seen:
            self._seen[number] = _Views(self._table.batch(number), self._files)
        return self._seen[number]


class _Views:
    """A batch as arrays that are mapped, not read.

    Attributes:
      lists: name of a column -> offsets [rows + 1] and values.
    """

    def __init__(self, batch: pa.RecordBatch, files: Sequence[str]):
        self._batch, self._files = batch, files
        self.lists = {
            name: (batch.column(name).offsets.to_numpy(), batch.column(name).values.to_numpy())
            for name in ('tokens', *_LISTS, *_CANDIDATES)}
        self._paired = batch.column('candidate_lengths').is_valid().to_numpy(zero_copy_only=False)
        self._numbers = {name: batch.column(name).to_numpy() for name in _NUMBERS}

    def item(self, row: int) -> Encoded:
        """The comparison of a row."""
        tokens, sizes, preference, ratings, prompt_sizes, *of_candidates = (
            values[offsets[row]:offsets[row + 1]] for offsets, values in self.lists.values())
        k, tokens, ends = len(sizes) - 1, tokens.astype(np.int32), sizes.cumsum().tolist()
        margin, weight, annotator = (
            self._numbers[name][row].item() for name in ('margin', 'weight', 'annotator'))
        return Encoded(
            named(self._batch.column('id')[row].as_py(), self._files),
            self._batch.column('group')[row].as_py(),
            tokens[:ends[0]], tuple(map(tokens.__getitem__, map(slice, ends[:-1], ends[1:]))),
            preference.reshape(k, k), ratings.reshape(k, -1),
            margin, weight, annotator, tuple(prompt_sizes.tolist()),
            _candidates(*of_candidates) if self._paired[row] else None)


def _candidates(preference: np.ndarray, ratings: np.ndarray, lengths: np.ndarray) -> Candidates:
    """Of what a row holds of them."""
    k = len(lengths)
    return Candidates(preference.reshape(k, k), ratings.reshape(k, -1), tuple(lengths.tolist()))


def has_preferred(encoded: Iterable[Encoded]) -> bool:
    """Whether there is any pair with a preferred side."""
    return any((item.preference > 0.5).any() for item in encoded)


def has_rating(encoded: Iterable[Encoded]) -> bool:
    """Whether there is any rated response."""
    return any(np.isfinite(item.ratings).any() for item in encoded)


def fingerprint(*parts: Sequence[Encoded]) -> str:
    """SHA-256 over everything training reads of the comparisons, to recognise other data.

    Of tables it is kept.
    """
    if not all(isinstance(part, EncodedTable) and part.key for part in parts):
        return _fingerprint(itertools.chain(*parts))
    return parts[0].cache.keep('fingerprints', {'tokens': [part.key for part in parts]},
                               lambda _: _fingerprint(itertools.chain(*parts))).value


def _fingerprint(encoded: Iterable[Encoded]) -> str:
    digest = hashlib.sha256()
    for item in encoded:
        for array in (item.prompt, *item.responses, item.preference, item.ratings):
            digest.update(f'{array.shape}'.encode())
            digest.update(array.tobytes())
        digest.update(f'{item.margin} {item.weight} {item.annotator} {item.prompt_sizes}'.encode())
    return digest.hexdigest()
