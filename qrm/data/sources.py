"""Where comparisons come from, and how they are divided into train, validation and test."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qrm.data import demo, translate
from qrm.data.comparisons import (
    Comparison,
    DataError,
    DataReport,
    MalformedRow,
    check_malformed,
    in_a_line,
)
from qrm.data.files import SUFFIXES, is_rows, read_rows
from qrm.data.rows import parse_row

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

Split = tuple[list[Comparison], DataReport]
Row = tuple[str, Any]


class Source(NamedTuple):
    """All comparisons of a source, as it divides them.

    Attributes:
      splits: 'train', 'validation', 'test', those that there are -> (comparisons, report).
      digest: of all that is said of the comparisons, wherever they stand.
    """

    splits: dict[str, Split]
    digest: str


class _Found(NamedTuple):
    """Rows of a split before they are read.

    Attributes:
      name: of the file, or of the data set.
      rows: the rows.
      unread: what stands beside them and is not read.
    """

    name: str
    rows: Iterable[Row]
    unread: tuple[str, ...] = ()


def workloads_of(path: str) -> tuple[str, ...]:
    """The workloads that `data.path` holds; () if any name will do, as it is one set of rows."""
    if path == 'demo':
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
    if data.path == 'demo':
        found = {split: _Found(f'demo {workload}', _demo_rows(data, workload, split))
                 for split in ('train', 'test')}
    else:
        found = _sources(data.path, workload)
    splits = {split: _collect(one, data, split) for split, one in found.items()}
    return Source(splits, _digest({split: c for split, (c, _) in splits.items()}))


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
    splits = {split: (comparisons, dataclasses.replace(
        report, dropped=report.dropped.copy(), notes=report.notes.copy()))
        for split, (comparisons, report) in source.splits.items()}
    if 'train' not in splits:  # A folder with test rows alone can still be evaluated on.
        _, report = next(iter(splits.values()))
        splits['train'] = ([], DataReport(report.source, 'train'))
    for name, fraction in (('test', data.test_fraction), ('validation', data.validation_fraction)):
        if name not in splits:
            splits['train'], splits[name] = _divide(splits['train'], fraction, name)
    splits = {split: splits[split] for split in _NAMES}
    for comparisons, report in splits.values():
        report.notes.update(itertools.chain.from_iterable(c.remarks for c in comparisons))
    groups: set[str] = set()
    for split, (comparisons, report) in splits.items():
        if split != 'train' and (overlap := sum(c.group in groups for c in comparisons)):
            report.notes['opening question also in the training rows'] = overlap
        groups |= {c.group for c in comparisons}
    return splits


def load_splits(data: Any, workload: str) -> dict[str, Split]:
    """Reads and divides, see `read` and `divide`."""
    return divide(read(data, workload), data)


def whole(source: Source) -> Split:
    """All comparisons of an undivided source, for a model that was not trained on them."""
    (comparisons, report), = source.splits.values()
    report = dataclasses.replace(report, split='test', notes=report.notes.copy())
    report.notes.update(itertools.chain.from_iterable(c.remarks for c in comparisons))
    return comparisons, report


def held_out(data: Any, workload: str) -> Split:
    """What a source has to judge a model on that was not trained on it.

    Returns:
      Its test split; of a source without one, all that it has.

    Raises:
      DataError: see `read`.
    """
    source = read(data, workload)
    return divide(source, data)['test'] if 'test' in source.splits else whole(source)


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
        return {'train': _Found(path, read_rows(path))}
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
        return {split: _Found(
            names[0], itertools.chain.from_iterable(map(read_rows, names)),
            beside if number == 0 else ()) for number, (split, names) in enumerate(files.items())}
    if path.startswith(('/', '.', '~')) or path.count('/') > 1 or os.path.exists(path):
        raise DataError(f'{path}: no such folder; expected a folder, a file that ends in '
                        f"{', '.join(SUFFIXES)}, the name of a data set on the hub, or 'demo'")
    return _hub_sources(path, HH_FOLDERS[workload] if workloads_of(path) else None)


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
    return {split: _Found(where, numbered(f'{where}[{given}]', loaded[given]),
                          beside if number == 0 else ())
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


def _collect(found: _Found, data: Any, split: str) -> Split:
    """Parses rows, counts those that are malformed, and tells apart those of one id."""
    report = DataReport(found.name, split)
    report.notes.update(f'{one} not read' for one in found.unread)
    comparisons: list[Comparison] = []
    by_id: dict[str, Comparison] = {}
    name, rows = understood(found.rows, data)
    if name != 'rows':
        report.notes[f'read as of the format {name!r}'] += 1
    for where, row in rows:
        report.read += 1
        try:
            if isinstance(row, MalformedRow):
                raise row
            comparison = row if isinstance(row, Comparison) else parse_row(
                row, where, attributes=data.attributes, literal=name not in ('rows', 'columns'))
        except translate.NotJudged:
            report.dropped['not judged'] += 1
            continue
        except MalformedRow as error:
            report.drop_malformed(error)
            continue
        known = by_id.setdefault(comparison.id, comparison)
        if known != comparison:
            comparison = dataclasses.replace(comparison, id=comparison.place, remarks=(
                *comparison.remarks, 'id of an earlier row, told apart by line'))
        comparisons.append(comparison)
    check_malformed([report], data.max_malformed)
    return _note_duplicates(comparisons), report


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


def _note_duplicates(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Remarks on rows with the texts of an earlier one, in any order, by whether the two agree.

    What two people say of the same texts are two judgements.
    """
    seen: dict[tuple[Any, ...], np.ndarray] = {}
    noted = []
    for comparison in comparisons:
        texts = [str(response) for response in comparison.responses]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        matrix = comparison.preference_matrix()[np.ix_(order, order)]
        judged = np.sign(matrix - matrix.T)
        asked = comparison.annotator, str(comparison.prompt), str(comparison.tools)
        first = seen.setdefault((*asked, *(texts[i] for i in order)), judged)
        if first is not judged:
            opposed = (first * judged < 0).any()
            remark = f'{"contradicts" if opposed else "repeats"} an earlier row'
            comparison = dataclasses.replace(comparison, remarks=(*comparison.remarks, remark))
        noted.append(comparison)
    return noted


def _digest(splits: dict[str, list[Comparison]]) -> str:
    """Hexadecimal digest of everything that comparisons say, but for places in files."""
    found = hashlib.sha256()
    for split, comparisons in splits.items():
        found.update(f'{split} {len(comparisons)}\n'.encode())
        for c in comparisons:
            said = {**vars(c), 'attributes': dict(c.attributes), 'where': '', 'remarks': (),
                    'id': c.id.replace(c.where, '') if c.where else c.id}
            found.update(json.dumps(said, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _divide(split: Split, fraction: float, name: str) -> tuple[Split, Split]:
    """Moves `fraction` of the groups, chosen by their hash, into a split of their own."""
    comparisons, report = split
    groups = sorted(
        {c.group for c in comparisons},
        key=lambda group: hashlib.sha256(f'{name} {group}'.encode()).digest(),
    )
    moved = set(groups[:math.ceil(fraction * len(groups) - 1e-9)])
    rest = [c for c in comparisons if c.group not in moved]
    held_out = [c for c in comparisons if c.group in moved]
    report.read -= len(held_out)
    return (rest, report), (held_out, DataReport(report.source, name, read=len(held_out)))
