"""Comparisons as rows of tables, decoded when they are used.

Two tables make them: what each says, as JSON, which is most of the bytes, and facts by which
comparisons are chosen, divided and recognised without reading that. Places of rows stand there
without the name of their file, see `marked`, so that files that were copied or moved have the same
tables.
"""

import bisect
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from qrm.data.comparisons import Comparison, DataReport, Text, digest
from qrm.data.tables import Cache, Table

CHUNK = 2048  # comparisons of a batch

SAID = pa.schema([('said', pa.binary())])
FACTS = pa.schema([
    ('id', pa.string()), ('where', pa.string()), ('remarks', pa.list_(pa.string())),
    ('group', pa.string()), ('annotator', pa.string()),
    ('texts', pa.binary(16)), ('opening', pa.binary(16)), ('has_opening', pa.bool_())])
DIGEST = np.dtype('S16')  # in which NumPy sorts digests
# What is told of a comparison once all rows are known.
_LATE = ('id', 'remarks')

_MARK = re.compile('\0(\\d+)\0')

# Templates print chats and tools in the order of their keys.
_encode = json.JSONEncoder(default=str).encode
_encode_sorted = json.JSONEncoder(sort_keys=True, default=str).encode


def marked(text: str, files: Sequence[str]) -> str:
    """A place, or a message that begins with one, with a mark instead of the name of its file.

    Args:
      text: begins with the name of a file.
      files: their names, ascending, none of which begins with another.
    """
    number = bisect.bisect_right(files, text) - 1
    if number < 0 or not text.startswith(files[number]):
        return text
    return f'\0{number}\0{text[len(files[number]):]}'


def named(text: str, files: Sequence[str]) -> str:
    """A text with the names of files in place of their marks."""
    if not files or '\0' not in text:
        return text
    return _MARK.sub(
        lambda found: files[int(found[1])] if int(found[1]) < len(files) else found[0], text)


def named_report(stored: Mapping[str, Any], files: Sequence[str], source: str = '') -> DataReport:
    """The report of a split that `DataReport.stored` gave, with the names of its files."""
    report = DataReport.of(stored)
    return report.copy(source=source, first_malformed=named(report.first_malformed, files))


def said(comparison: Comparison) -> bytes:
    """All that a comparison says, but for its place in a file and remarks, as JSON."""
    return _encode(_said(comparison)).encode()


def said_in_any_order(comparison: Comparison) -> str:
    """The same, whatever the order of keys."""
    return _encode_sorted(_said(comparison))


def _said(comparison: Comparison) -> dict[str, Any]:
    c = comparison
    return {**vars(c), 'attributes': dict(sorted(c.attributes.items())), 'where': '',
            'remarks': (), 'id': c.id.replace(c.where, '') if c.where else c.id}


def rows_of(comparisons: Sequence[Comparison]) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Comparisons as rows of `SAID` and of `FACTS`."""
    facts = {
        'id': [c.id for c in comparisons], 'where': [c.where for c in comparisons],
        'remarks': [c.remarks for c in comparisons], 'group': [c.group for c in comparisons],
        'annotator': [c.annotator for c in comparisons],
        'texts': [c.text_digest() for c in comparisons],
        'opening': [digest(c.group) for c in comparisons],
        'has_opening': [c.has_opening for c in comparisons]}
    return (pa.record_batch([pa.array([said(c) for c in comparisons], pa.binary())], schema=SAID),
            pa.record_batch([pa.array(facts[field.name], field.type) for field in FACTS],
                            schema=FACTS))


def comparison_of(said: bytes, **facts: Any) -> Comparison:
    """The comparison that `said` gave; facts are its id, where and remarks."""
    values = json.loads(said) | facts
    for key in ('ranks', 'ratings', 'tools', 'remarks'):
        values[key] = values[key] if values[key] is None else tuple(values[key])
    return Comparison(**values | {
        'prompt': _text(values['prompt']), 'responses': tuple(map(_text, values['responses'])),
        'attributes': {name: tuple(given) for name, given in values['attributes'].items()}})


def _text(value: Any) -> Text:
    return value if isinstance(value, str) else tuple(value)


class Comparisons(Sequence[Comparison]):
    """Comparisons of a source, or some of them, in order.

    Args:
      key: digest by which they are known, whole.
      cache: where what is made of them is kept.
      facts: table of `FACTS`, or what gives it once it is needed.
      texts: of `SAID`, likewise.
      rows: numbers of those that these are, ascending; None: all.
      files: names of the files that their places are in, see `marked`.
    """

    def __init__(self, key: str, cache: Cache, facts: Callable[[], Table],
                 texts: Callable[[], Table], rows: np.ndarray | None = None,
                 files: Sequence[str] = ()):
        self.key, self.cache, self.files = key, cache, files
        self._facts, self._texts = facts, texts
        self.rows = np.arange(len(facts())) if rows is None else rows

    @classmethod
    def of(cls, comparisons: Iterable[Comparison]) -> 'Comparisons':
        """The same in memory, if they are not in tables."""
        if isinstance(comparisons, cls):
            return comparisons
        comparisons = list(comparisons)
        pairs = [rows_of(comparisons[start:start + CHUNK])
                 for start in range(0, len(comparisons), CHUNK)]
        texts, facts = (Table([pair[i] for pair in pairs], kind)
                        for i, kind in enumerate((SAID, FACTS)))
        return cls('', Cache(''), lambda: facts, lambda: texts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.pick(np.arange(len(self))[at])
        row = int(self.rows[at])
        texts = self._texts()
        number, place = texts.place(row)
        facts = self._facts()
        of_row = facts.batch(facts.place(row)[0]).slice(facts.place(row)[1], 1)
        return next(_decoded(texts.batch(number).slice(place, 1), of_row, self.files))

    def __iter__(self) -> Iterator[Comparison]:
        for chunk in self.chunks():
            yield from _decoded(chunk, chunk, self.files)

    @property
    def digest(self) -> str:
        """Of which rows these are."""
        return hashlib.sha256(self.rows.astype('<i8').tobytes()).hexdigest()

    def pick(self, places: np.ndarray) -> 'Comparisons':
        """Some of them, by their places here.

        Raises:
          ValueError: places do not ascend.
        """
        rows = self.rows[places]
        if (np.diff(rows) <= 0).any():
            raise ValueError('expected places that ascend')
        return Comparisons(self.key, self.cache, self._facts, self._texts, rows, self.files)

    def fact(self, name: str) -> pa.ChunkedArray:
        """A column of `FACTS`."""
        column = self._facts().column(name)
        column = column if len(column) == len(self) else column.take(pa.array(self.rows))
        if name not in ('id', 'where') or not self.files:
            return column
        return pa.chunked_array([[named(text, self.files) for text in chunk.to_pylist()]
                                 for chunk in column.chunks], column.type)

    def numbers(self, name: str) -> np.ndarray:
        """[rows], a column of `FACTS` that is numbers; of digests [rows, 16] uint8."""
        return self._facts().numbers(name)[self.rows]

    def chunks(self) -> Iterator[pa.RecordBatch]:
        """Batches of what is decoded by `decoded`, in order, which can be sent to a process."""
        facts, start = self._facts(), 0
        of_batch = zip(self._texts().in_turn(), facts.in_turn(), strict=True)
        for number, (texts, known) in enumerate(of_batch):
            stop = int(facts.starts[number + 1])
            first, last = np.searchsorted(self.rows, (start, stop))
            places = pa.array(self.rows[first:last] - start)
            start = stop
            if len(places):
                yield pa.record_batch(
                    [texts.column('said').take(places),
                     *(known.column(name).take(places) for name in ('id', 'where', 'remarks'))],
                    ['said', 'id', 'where', 'remarks'])


def decoded(chunk: pa.RecordBatch) -> Iterator[Comparison]:
    """The comparisons of one of `Comparisons.chunks`; places and ids with marks."""
    return _decoded(chunk, chunk, ())


def _decoded(texts: pa.RecordBatch, facts: pa.RecordBatch,
             files: Sequence[str]) -> Iterator[Comparison]:
    columns = [texts.column('said').to_pylist(),
               *(facts.column(name).to_pylist() for name in ('id', 'where', 'remarks'))]
    for text, name, where, remarks in zip(*columns, strict=True):
        yield comparison_of(text, id=named(name, files), where=named(where, files),
                            remarks=remarks)


def sortable(digests: np.ndarray) -> np.ndarray:
    """[rows] `DIGEST` of [rows, 16] uint8; sorted as bytes are."""
    return np.ascontiguousarray(digests).view(DIGEST)[:, 0]


def replaced(facts: pa.RecordBatch, first: int,
             changes: Mapping[int, tuple[str, tuple[str, ...]]]) -> pa.RecordBatch:
    """Facts with what some rows are called and remarked once all are known.

    Args:
      facts: of rows from number `first` on.
      changes: number of a row -> its id and remarks.
    """
    here = {row: changes[row] for row in range(first, first + len(facts)) if row in changes}
    if not here:
        return facts
    columns = {name: facts.column(name) for name in facts.schema.names}
    for i, name in enumerate(_LATE):
        values = columns[name].to_pylist()
        for row, late in here.items():
            values[row - first] = late[i]
        columns[name] = pa.array(values, FACTS.field(name).type)
    return pa.record_batch(list(columns.values()), schema=FACTS)
