"""Where comparisons come from, and how they are divided into train, validation and test."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from qrm.data import demo, records, translate, workers
from qrm.data.comparisons import (
    Comparison,
    DataError,
    DataReport,
    MalformedRow,
    check_malformed,
    digest,
    in_a_line,
)
from qrm.data.files import SUFFIXES, is_rows, read_rows
from qrm.data.records import FACTS, SAID, Comparisons
from qrm.data.rows import parse_row
from qrm.data.tables import Cache, Entry, Table, Writer

DEMO = 'demo'  # a path that says that data are generated

# Workload -> folder (`data_dir`) of the HH release (Bai et al. 2022, arXiv 2204.05862).
HH_FOLDERS = {
    'helpful': 'helpful-base',
    'harmless': 'harmless-base',
    'helpful-online': 'helpful-online',
    'helpful-rejection-sampled': 'helpful-rejection-sampled',
}
# Split -> how files and hub data sets call it.
_NAMES = {'train': ('train',), 'validation': ('validation', 'valid', 'val', 'dev'),
          'test': ('test',)}
_MOST_PARTS = 10_000
_SHARD = re.compile(r'-(\d{5})-of-(\d{5})')

Split = tuple[Comparisons, DataReport]
Row = tuple[str, Any]


class Source(NamedTuple):
    """All comparisons of a source, as it divides them.

    Attributes:
      splits: 'train', 'validation', 'test', those that there are -> (comparisons, report).
      digest: of all that is said of the comparisons, wherever they stand.
      entry: where it is kept.
      cache: where what is made of it is kept.
    """

    splits: dict[str, Split]
    digest: str
    entry: Entry
    cache: Cache


class _Found(NamedTuple):
    """Rows of a split before they are read.

    Attributes:
      name: of the file, or of the data set.
      rows: gives the rows, from the first one on.
      content: gives what the rows are known by, ready for JSON; None: nothing.
      files: names that places of rows begin with, see `records.marked`.
      unread: what stands beside them and is not read.
    """

    name: str
    rows: Callable[[], Iterable[Row]]
    content: Callable[[], Any]
    files: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def workloads_of(path: str) -> tuple[str, ...]:
    """The workloads that `data.path` holds; () if any name will do, as it is one set of rows."""
    if path == DEMO:
        return demo.WORKLOADS
    if os.path.isdir(path):
        return () if any(_files(path, split) for split in _NAMES) else tuple(HH_FOLDERS)
    return tuple(HH_FOLDERS) if path.endswith('hh-rlhf') else ()


def read(data: Any, workload: str) -> Source:
    """Reads all comparisons of a workload.

    `data.path` is 'demo' (generated), a file of rows (see `files.read_rows`), a folder with such
    files called train, validation and test (also in numbered parts, as the hub names them) or with
    folders of the HH release, or the name of a data set on the hub. A single file, or a data set
    without these splits, is all 'train'.

    Args:
      data: the `data` section of a config.
      workload: which part of the source to load.

    Raises:
      DataError: the source is missing, damaged or has too many malformed rows.
    """
    names = workloads_of(data.path)
    if names and workload not in names:
        raise DataError(f'workload {workload!r} is not in {data.path}, expected one of {names}')
    if data.path == DEMO:
        found = {split: _Found(
            f'demo {workload}', functools.partial(_demo_rows, data, workload, split),
            lambda split=split: [
                'demo', workload, data.demo[split], data.demo.seed, data.demo.annotators])
            for split in ('train', 'test')}
    else:
        found = _sources(data.path, workload)
    contents = {split: one.content() for split, one in found.items()}
    cache = Cache('' if None in contents.values() else data.cache)
    entry = cache.keep('comparisons', {
        'format': data.format, 'columns': list(data.columns), 'votes': data.votes,
        'strengths': data.strengths, 'attributes': list(data.attributes),
        'rows': {split: [contents[split], one.unread] for split, one in found.items()},
    }, functools.partial(_collect_all, found, contents, data))
    splits = {split: (_comparisons(entry, cache, split, one.files),
                      records.named_report(entry.value['reports'][split], one.files, one.name))
              for split, one in found.items()}
    for _, report in splits.values():
        check_malformed([report], data.max_malformed)
    return Source(splits, entry.value['digest'], entry, cache)


def divide(source: Source, data: Any) -> dict[str, Split]:
    """The three splits of a source.

    Validation and test splits that the source does not have are taken from its training rows; they
    take whole groups, so that no opening question stands on two sides.

    Args:
      source: what was read.
      data: the `data` section of a config, which says how much is taken.

    Returns:
      'train', 'validation' and 'test' -> (comparisons, report).
    """
    divided = source.cache.keep('splits', {
        'comparisons': source.entry.key, 'test': data.test_fraction,
        'validation': data.validation_fraction}, functools.partial(_divide_all, source, data))
    splits = {}
    for split, (origin, report) in divided.value.items():
        comparisons, whole_report = source.splits[origin]
        splits[split] = (
            _comparisons(source.entry, source.cache, origin, comparisons.files,
                         divided.table(split).numbers('row')),
            records.named_report(report, comparisons.files, whole_report.source))
    return splits


def load_splits(data: Any, workload: str) -> dict[str, Split]:
    """Reads and divides, see `read` and `divide`."""
    return divide(read(data, workload), data)


def whole(source: Source) -> Split:
    """All comparisons of an undivided source, for a model that was not trained on them."""
    (comparisons, report), = source.splits.values()
    report = report.copy(split='test')
    report.notes.update(_remarks(comparisons))
    return comparisons, report


def held_out(data: Any, workload: str) -> Split:
    """What a source has to judge a model on that was not trained on it.

    Returns:
      Its test split; of an undivided source all that it has.

    Raises:
      DataError: see `read`.
    """
    source = read(data, workload)
    if len(source.splits) == 1 and 'test' not in source.splits:
        return whole(source)
    return divide(source, data)['test']


def read_comparisons(
    path: str, parse: Callable[[Any, str], Comparison] = parse_row
) -> list[Comparison]:
    """Reads a file of rows to be scored, or with `rows.parse_prompt` to be answered.

    Raises:
      DataError: see `files.read_rows`; or a row is malformed, or of another format, which has other
        texts.
    """
    comparisons, rows = [], read_rows(path)
    first = list(itertools.islice(rows, translate.FIRST_ROWS))
    if (name := translate.recognise(first)) != 'rows':
        raise DataError(f'{path}: rows of the format {name!r}, expected those that `qrm data '
                        f'--input={path} --output=ROWS.jsonl` writes')
    for where, row in itertools.chain(first, rows):
        if isinstance(row, MalformedRow):
            raise row
        comparisons.append(parse(row, where))
    return comparisons


def _demo_rows(data: Any, workload: str, split: str) -> Iterator[tuple[str, Comparison]]:
    generated = demo.generate(workload, split, data.demo[split], data.demo.seed,
                              data.demo.annotators)
    return ((comparison.id, comparison) for comparison in generated.comparisons)


def _sources(path: str, workload: str) -> dict[str, _Found]:
    """Split -> its rows."""
    if is_rows(path):
        return {'train': _found([path])}
    if os.path.isdir(path):
        folder = os.path.join(path, HH_FOLDERS[workload]) if workloads_of(path) else path
        files = {split: names for split in _NAMES if (names := _files(folder, split))}
        if not files:
            raise DataError(
                f'{path}: no comparisons found; expected train.jsonl and test.jsonl (or .json, '
                '.parquet, .jsonl.gz, .json.gz), or those in a folder '
                f'{os.path.basename(folder)}'
            )
        read = {name for names in files.values() for name in names}
        known = {name for names in _NAMES.values() for name in names}
        beside = tuple(f'{name!r}' for name in sorted(os.listdir(folder))
                       if (is_rows(name) or name.split('.')[0] in known)
                       and os.path.join(folder, name) not in read)
        return {split: _found(names, beside if number == 0 else ())
                for number, (split, names) in enumerate(files.items())}
    if path.startswith(('/', '.', '~')) or path.count('/') > 1 or os.path.exists(path):
        raise DataError(f'{path}: no such folder; expected a folder, a file that ends in '
                        f"{', '.join(SUFFIXES)}, the name of a data set on the hub, or 'demo'")
    return _hub_sources(path, HH_FOLDERS[workload] if workloads_of(path) else None)


def _found(names: Sequence[str], unread: tuple[str, ...] = ()) -> _Found:
    """The rows of files."""
    return _Found(names[0], lambda: itertools.chain.from_iterable(map(read_rows, names)),
                  functools.partial(_content, names), tuple(names), unread)


def _content(paths: Sequence[str]) -> list[list[str]] | None:
    """Ends of names, by which files are read, and digests of files, in order.

    None if there are none, or one cannot be read, which its rows will tell.
    """
    found = []
    for path in paths:
        kind = next((end for end in SUFFIXES if path.endswith(end)), '')
        try:
            with open(path, 'rb') as file:
                found.append([kind, hashlib.file_digest(file, 'sha256').hexdigest()])
        except OSError:
            return None
    return found or None


def load_hub(name: str, setting: str, data_dir: str | None = None) -> Mapping[str, Iterable[Any]]:
    """Split -> rows of a data set on the hub.

    Args:
      name: of the data set.
      setting: what can name local files in its place, as errors say.
      data_dir: folder of it.

    Raises:
      DataError: it cannot be loaded.
    """
    import datasets  # Takes half a second, which other sources need not wait for.

    try:
        return datasets.load_dataset(name, data_dir=data_dir)
    except Exception as error:  # The library raises a different type for each way to fail.
        if 'scripts are no longer supported' in str(error):
            raise DataError(
                f'{name}: is loaded by a script of its own, which datasets {datasets.__version__} '
                f'does not run; expected {setting} to name its files, downloaded') from error
        raise DataError(
            f'{name}: could not be loaded from the hub ({type(error).__name__}: '
            f'{in_a_line(error)}); for '
            f'local data set {setting} to a folder or a file of rows'
        ) from error


def _hub_sources(name: str, data_dir: str | None) -> dict[str, _Found]:
    loaded = load_hub(name, 'config.data.path', data_dir)
    where = name if data_dir is None else f'{name}/{data_dir}'
    found = {split: given for split, names in _NAMES.items()
             if (given := next((one for one in names if one in loaded), None))}
    if not found.keys() & {'train', 'test'}:
        raise DataError(f'{where}: splits {sorted(loaded)}, expected train or test')
    beside = tuple(f'split {split!r}' for split in loaded if split not in found.values())
    return {split: _Found(
        where, functools.partial(numbered, f'{where}[{given}]', loaded[given]),
        functools.partial(_content, [
            file['filename'] for file in getattr(loaded[given], 'cache_files', ())]),
        (f'{where}[{given}]',), beside if number == 0 else ())
        for number, (split, given) in enumerate(found.items())}


def numbered(where: str, rows: Iterable[Any]) -> Iterator[Row]:
    """Rows with the place of each."""
    return ((f'{where}:{i}', row) for i, row in enumerate(rows))


def _files(folder: str, split: str) -> list[str]:
    """The file of a split, or its numbered parts; none if there is none.

    Raises:
      DataError: there are several files that may be it, or a part is missing.
    """
    parts: dict[tuple[str, str], list[str]] = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        suffix = next((end for end in SUFFIXES if name.endswith(end)), None)
        if suffix is None or not os.path.isfile(os.path.join(folder, name)):
            continue
        stem = name.removesuffix(suffix)
        if _SHARD.sub('', stem) in _NAMES[split]:
            count = _SHARD.search(stem)
            kind = (_SHARD.sub('', stem) + suffix, count.group(2) if count else '')
            parts.setdefault(kind, []).append(name)
    if len(parts) > 1:
        first, second = [names[0] for names in parts.values()][:2]
        raise DataError(f'{folder}: {first} and {second} may both be the {split} split, expected '
                        'one of them')
    for (_, count), names in parts.items():
        if len(names) > _MOST_PARTS:
            raise DataError(f'{folder}: {len(names)} parts of the {split} split, expected at most '
                            f'{_MOST_PARTS}')
        numbers = [int(_SHARD.search(name)[1]) for name in names] if count else []
        if count and numbers != list(range(int(count))):
            raise DataError(f'{folder}: {len(names)} parts of the {split} split, expected {count}, '
                            f'numbered from 0, as {names[0]} says')
    return [os.path.join(folder, name) for names in parts.values() for name in names]


def _comparisons(
    entry: Entry, cache: Cache, split: str, files: Sequence[str], rows: np.ndarray | None = None
) -> Comparisons:
    """Comparisons of a split of a source as it divides them, all or some."""
    return Comparisons(f'{entry.key} {split}', cache, lambda: entry.table(f'{split}-facts'),
                       lambda: entry.table(f'{split}-texts'), rows, files)


def _collect_all(found: Mapping[str, _Found], contents: Mapping[str, Any], data: Any,
                 writer: Writer) -> dict[str, Any]:
    """Writes the comparisons of all splits.

    Raises:
      DataError: too many are malformed, or the rows are not those of before any more, so that
        nothing of them may be kept as what they were.
    """
    reports, whole = {}, hashlib.sha256()
    for split, one in found.items():
        report = _collect(one, data, split, writer)
        reports[split] = report.stored()
        check_malformed([records.named_report(reports[split], one.files)], data.max_malformed)
        _add_to_digest(whole, split, writer)
    for split, one in found.items():
        if one.content() != contents[split]:
            raise DataError(f'{one.name}: changed while it was read, expected a file that nothing '
                            'writes into')
    return {'reports': reports, 'digest': whole.hexdigest()}


def _collect(found: _Found, data: Any, split: str, writer: Writer) -> DataReport:
    """Parses rows, counts those that are malformed, and tells apart those of one id."""
    report = DataReport('', split)
    report.notes.update(f'{one} not read' for one in found.unread)
    name, rows = understood(found.rows(), data)
    if name != 'rows':
        report.notes[f'read as of the format {name!r}'] += 1
    parse = functools.partial(_parse, files=found.files, attributes=tuple(data.attributes),
                              literal=name not in ('rows', 'columns'))
    facts: list[pa.RecordBatch] = []
    with writer.table(f'{split}-texts', SAID) as write:
        for texts, known, counts in workers.in_order(parse, _chunks(rows)):
            write(texts)
            facts.append(known)
            report.add(counts)
    changes = _late(Comparisons('', Cache(''), lambda: Table(facts, FACTS),
                                lambda: writer[f'{split}-texts']))
    first = 0
    with writer.table(f'{split}-facts', FACTS) as write:
        for known in facts:
            write(records.replaced(known, first, changes))
            first += len(known)
    return report


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while some := list(itertools.islice(rows, records.CHUNK)):
        yield some


def _parse(
    rows: Sequence[Row], *, files: Sequence[str], attributes: Sequence[str], literal: bool
) -> tuple[pa.RecordBatch, pa.RecordBatch, DataReport]:
    """Rows as those of `SAID` and `FACTS`, and what became of them; places with marks."""
    report, comparisons = DataReport('', ''), []
    for where, row in rows:
        report.read += 1
        where = records.marked(where, files)
        try:
            if isinstance(row, MalformedRow):
                raise row
            comparisons.append(row if isinstance(row, Comparison) else parse_row(
                row, where, attributes=attributes, literal=literal))
        except translate.NotJudged:
            report.dropped['not judged'] += 1
        except MalformedRow as error:
            report.drop_malformed(MalformedRow(records.marked(str(error), files)))
    return *records.rows_of(comparisons), report


def _late(comparisons: Comparisons) -> dict[int, tuple[str, tuple[str, ...]]]:
    """What rows are called and remarked that have the id or the texts of an earlier one.

    Rows of one id that say the same have the same id. Those with the same texts, in any order, are
    remarked by whether the two agree; what two people say of the same texts are two judgements.

    Returns:
      Number of the row -> its id and remarks.
    """
    if not len(comparisons):
        return {}
    ids, annotators = (_codes(comparisons.fact(name)) for name in ('id', 'annotator'))
    texts = records.sortable(comparisons.numbers('texts'))
    rows = np.flatnonzero(_repeated(ids) | _repeated(texts, annotators))
    by_id: dict[str, bytes] = {}
    first_of: dict[tuple[str | None, bytes], np.ndarray] = {}
    changes = {}
    for row, comparison in zip(rows.tolist(), comparisons.pick(rows), strict=True):
        c = comparison
        says = digest(records.said_in_any_order(dataclasses.replace(c, where='')))
        if by_id.setdefault(c.id, says) != says:
            c = dataclasses.replace(c, id=c.place, remarks=(
                *c.remarks, 'id of an earlier row, told apart by line'))
        judged = _judged(c)
        first = first_of.setdefault((c.annotator, c.text_digest()), judged)
        if first is not judged:
            opposed = (first * judged < 0).any()
            remark = f'{"contradicts" if opposed else "repeats"} an earlier row'
            c = dataclasses.replace(c, remarks=(*c.remarks, remark))
        if c is not comparison:
            changes[row] = c.id, c.remarks
    return changes


def _judged(comparison: Comparison) -> np.ndarray:
    """[K, K], 1 where a response is preferred, -1 where another is; in an order of the texts."""
    texts = [str(response) for response in comparison.responses]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    matrix = comparison.preference_matrix()[np.ix_(order, order)]
    return np.sign(matrix - matrix.T)


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each text of a column, the same for the same one."""
    return np.concatenate([chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)
                           for chunk in column.dictionary_encode().chunks])


def _repeated(*columns: np.ndarray) -> np.ndarray:
    """Whether another row has the same in all of some columns."""
    order = np.lexsort(columns)
    same = np.logical_and.reduce([column[order][1:] == column[order][:-1] for column in columns])
    found = np.zeros(len(order), bool)
    found[order[1:][same]] = found[order[:-1][same]] = True
    return found


def understood(rows: Iterable[Row], data: Any) -> tuple[str, Iterable[Row]]:
    """The format of rows, and the rows as `parse_row` reads them.

    Args:
      rows: as they stand in a source.
      data: the `data` section of a config, which names the format, or 'auto'.

    Raises:
      DataError: the format has to be named, see `translate.recognise`.
    """
    if data.columns:
        columns = translate.parse_columns(data.columns, data.attributes)
        return 'columns', translate.mapped(columns, rows)
    name, rows = data.format, iter(rows)
    if name == 'auto':
        first = list(itertools.islice(rows, translate.FIRST_ROWS))
        name = translate.recognise(first)
        rows = itertools.chain(first, rows)
    if name == 'rows':
        return name, rows
    return name, translate.native(name, rows, votes=data.votes, strengths=data.strengths)


def _add_to_digest(found: Any, split: str, writer: Writer) -> None:
    """Adds everything that the comparisons of a split say, but for places in files."""
    texts, facts = writer[f'{split}-texts'], writer[f'{split}-facts']
    found.update(f'{split} {len(texts)}\n'.encode())
    told_apart = _told_apart(facts)
    for number, batch in enumerate(texts.in_turn()):
        said = batch.column('said')
        start, stop = texts.starts[number:number + 2]
        if not told_apart[start:stop].any():
            found.update(_content_of(said))
            continue
        rows = np.arange(start, stop)
        for row, comparison in zip(rows, Comparisons(
                '', Cache(''), lambda: facts, lambda: texts, rows), strict=True):
            found.update(records.said(comparison) if told_apart[row]
                         else said[int(row - start)].as_py())


def _told_apart(facts: Table) -> np.ndarray:
    """Whether the id of each row is that of an earlier one."""
    remark = 'id of an earlier row, told apart by line'
    return np.array([remark in remarks for batch in facts.in_turn()
                     for remarks in batch.column('remarks').to_pylist()], bool)


def _content_of(column: pa.Array) -> memoryview:
    """The bytes of all values, one after the other."""
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset:]
    return memoryview(column.buffers()[2])[offsets[0]:offsets[len(column)]]


def _remarks(comparisons: Comparisons) -> collections.Counter[str]:
    return collections.Counter(itertools.chain.from_iterable(
        chunk.flatten().to_pylist() for chunk in comparisons.fact('remarks').chunks))


def _divide_all(source: Source, data: Any, writer: Writer) -> dict[str, Any]:
    """Writes which rows each of the three splits has; of each, whose rows, and its report."""
    parts = {split: (split, np.arange(len(comparisons)),
                     DataReport.of(source.entry.value['reports'][split]))
             for split, (comparisons, _) in source.splits.items()}
    if 'train' not in parts:  # A folder with test rows alone can still be evaluated on.
        origin, *_ = next(iter(parts.values()))
        parts['train'] = origin, np.zeros(0, np.int64), DataReport('', 'train')
    for name, fraction in (('test', data.test_fraction), ('validation', data.validation_fraction)):
        if name not in parts:
            origin, rows, report = parts['train']
            moved = _moved(source.splits[origin][0].pick(rows), fraction, name)
            report.read -= int(moved.sum())
            parts['train'] = origin, rows[~moved], report
            parts[name] = origin, rows[moved], DataReport('', name, read=int(moved.sum()))
    groups, found = np.zeros(0, records.DIGEST), {}
    for split in _NAMES:
        origin, rows, report = parts[split]
        comparisons = source.splits[origin][0].pick(rows)
        report.notes.update(_remarks(comparisons))
        own = records.sortable(comparisons.numbers('opening'))
        if split != 'train' and (overlap := int(np.isin(own, groups).sum())):
            report.notes['opening question also in the training rows'] = overlap
        groups = np.union1d(groups, own)
        with writer.table(split, pa.schema([('row', pa.int64())])) as write:
            write(pa.record_batch([pa.array(rows)], ['row']))
        found[split] = [origin, report.stored()]
    return found


def _moved(comparisons: Comparisons, fraction: float, name: str) -> np.ndarray:
    """Which comparisons a split of their own takes: `fraction` of the groups, by their hash."""
    if not len(comparisons):
        return np.zeros(0, bool)
    _, first, group = np.unique(records.sortable(comparisons.numbers('opening')),
                                return_index=True, return_inverse=True)
    names = comparisons.pick(np.sort(first)).fact('group').to_pylist()
    hashes = np.array([hashlib.sha256(f'{name} {one}'.encode()).digest() for one in names], 'S32')
    of_group = np.empty(len(first), 'S32')
    of_group[np.argsort(first)] = hashes
    count = math.ceil(fraction * len(first) - 1e-9)
    moved = np.zeros(len(first), bool)
    moved[np.argsort(of_group, kind='stable')[:count]] = True
    return moved[group]
