"""Where comparisons come from, and how they are divided into train, validation and test."""

import collections
import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from qrm.data import demo
from qrm.data.comparisons import (
    Comparison,
    DataError,
    DataReport,
    MalformedRow,
    ignored_keys,
    parse_row,
    read_jsonl,
)

# Workload -> folder (`data_dir`) of the HH release (Bai et al. 2022, arXiv 2204.05862).
HH_FOLDERS = {
    'helpful': 'helpful-base',
    'harmless': 'harmless-base',
    'helpful-online': 'helpful-online',
    'helpful-rejection-sampled': 'helpful-rejection-sampled',
}
_SUFFIXES = ('.jsonl', '.jsonl.gz')

Split = tuple[list[Comparison], DataReport]
Row = tuple[str, Any]


def is_jsonl(path: str) -> bool:
    """Whether `data.path` names a single JSON Lines file."""
    return path.endswith(_SUFFIXES)


def workloads_of(path: str) -> tuple[str, ...]:
    """The workloads that `data.path` holds; () if any name will do, as it is one set of rows."""
    if path == 'demo':
        return demo.WORKLOADS
    if os.path.isdir(path):
        return () if _file(path, 'train') or _file(path, 'test') else tuple(HH_FOLDERS)
    return tuple(HH_FOLDERS) if path.endswith('hh-rlhf') else ()


def load_splits(data: Any, workload: str) -> dict[str, Split]:
    """Loads the comparisons of a workload.

    `data.path` is 'demo' (generated), a JSON Lines file, a folder with train/test files or with
    folders of the HH release, or the name of a data set on the hub. The validation split is
    taken from the training rows, and so is the test split where the source has none; both take
    whole groups, so that no opening question stands on two sides.

    Args:
      data: the `data` section of a config.
      workload: which part of the source to load.

    Returns:
      'train', 'validation' and 'test' -> (comparisons, report).

    Raises:
      DataError: the source is missing, damaged or has too many malformed rows.
    """
    names = workloads_of(data.path)
    if names and workload not in names:
        raise DataError(f'workload {workload!r} is not in {data.path}, expected one of {names}')
    if data.path == 'demo':
        splits = {
            split: _collect(_demo_rows(data, workload, split), data, f'demo {workload}', split)
            for split in ('train', 'test')
        }
    else:
        splits = {
            split: _collect(rows, data, source, split)
            for split, (source, rows) in _sources(data.path, workload).items()
        }
    if 'train' not in splits:  # A folder with test rows alone can still be evaluated on.
        splits['train'] = ([], DataReport(splits['test'][1].source, 'train'))
    if 'test' not in splits:
        splits['train'], splits['test'] = _divide(splits['train'], data.test_fraction, 'test')
    train, validation = _divide(splits['train'], data.validation_fraction, 'validation')
    splits = {'train': train, 'validation': validation, 'test': splits['test']}
    groups = {c.group for split in ('train', 'validation') for c in splits[split][0]}
    comparisons, report = splits['test']
    if overlap := sum(c.group in groups for c in comparisons):
        report.notes['opening question also in the training rows'] = overlap
    return splits


def load_whole(data: Any, workload: str) -> Split:
    """Loads all comparisons of an undivided source, for a model that was not trained on them.

    Args:
      data, workload: as `load_splits`, with the path of a JSON Lines file.

    Raises:
      DataError: as `load_splits`.
    """
    (source, rows), = _sources(data.path, workload).values()
    return _collect(rows, data, source, 'test')


def _demo_rows(data: Any, workload: str, split: str) -> Iterator[tuple[str, Comparison]]:
    generated = demo.generate(workload, split, data.demo[split], data.demo.seed,
                              data.demo.annotators)
    return ((comparison.id, comparison) for comparison in generated.comparisons)


def _sources(path: str, workload: str) -> dict[str, tuple[str, Iterable[Row]]]:
    """Split -> (name, rows); a single file or an undivided hub data set is all 'train'."""
    if is_jsonl(path):
        return {'train': (path, read_jsonl(path))}
    if os.path.isdir(path):
        folder = os.path.join(path, HH_FOLDERS[workload]) if workloads_of(path) else path
        files = {split: _file(folder, split) for split in ('train', 'test')}
        if not any(files.values()):
            raise DataError(
                f'{path}: no comparisons found; expected train.jsonl(.gz) and test.jsonl(.gz), or '
                f'those in a folder {os.path.basename(folder)}'
            )
        return {split: (name, read_jsonl(name)) for split, name in files.items() if name}
    if path.startswith(('/', '.', '~')) or path.count('/') > 1 or os.path.exists(path):
        raise DataError(f'{path}: no such folder; expected a folder, a file that ends in .jsonl or '
                        ".jsonl.gz, the name of a data set on the hub, or 'demo'")
    return _hub_sources(path, HH_FOLDERS[workload] if workloads_of(path) else None)


def _hub_sources(name: str, data_dir: str | None) -> dict[str, tuple[str, Iterable[Row]]]:
    import datasets  # Takes half a second, which other sources need not wait for.

    try:
        loaded = datasets.load_dataset(name, data_dir=data_dir)
    except Exception as error:  # The library raises a different type for each way to fail.
        raise DataError(
            f'{name}: could not be loaded from the hub ({type(error).__name__}: {error}); for '
            'local data set config.data.path to a folder or a .jsonl file'
        ) from error
    where = name if data_dir is None else f'{name}/{data_dir}'
    found = {split: loaded[split] for split in ('train', 'test') if split in loaded}
    if not found:
        raise DataError(f'{where}: splits {sorted(loaded)}, expected train or test')
    return {split: (where, _numbered(f'{where}[{split}]', rows)) for split, rows in found.items()}


def _numbered(where: str, rows: Iterable[Any]) -> Iterator[Row]:
    return ((f'{where}:{i}', row) for i, row in enumerate(rows))


def _file(folder: str, split: str) -> str | None:
    names = (os.path.join(folder, split + suffix) for suffix in _SUFFIXES)
    return next((name for name in names if os.path.isfile(name)), None)


def _collect(rows: Iterable[Row], data: Any, source: str, split: str) -> Split:
    """Parses rows, counts those that are malformed, and refuses contradictions in their ids."""
    report = DataReport(source, split)
    comparisons: list[Comparison] = []
    by_id: dict[str, Comparison] = {}
    first_error = None
    for where, row in rows:
        report.read += 1
        try:
            if isinstance(row, MalformedRow):
                raise row
            if isinstance(row, Comparison):
                comparison = row
            else:
                comparison = parse_row(row, where, attributes=data.attributes)
                report.notes.update(f'key {key!r} not used'
                                    for key in ignored_keys(row, data.attributes))
        except MalformedRow as error:
            first_error = first_error or error
            report.dropped['malformed row'] += 1
            continue
        known = by_id.setdefault(comparison.id, comparison)
        if known != comparison:
            raise DataError(f'{where}: id {comparison.id!r} stands on another row with other '
                            'content, expected unique ids')
        if any(isinstance(r, str) and not r.strip() for r in comparison.responses):
            report.notes['blank response'] += 1
        comparisons.append(comparison)
    malformed = report.dropped['malformed row']
    if malformed and malformed / report.read > data.max_malformed:
        raise DataError(
            f'{first_error}; {malformed} of {report.read} rows are malformed, more than '
            f'config.data.max_malformed={data.max_malformed} allows'
        )
    report.dropped += collections.Counter()  # Counting a missing key must not leave a zero.
    _note_duplicates(comparisons, report)
    return comparisons, report


def _note_duplicates(comparisons: list[Comparison], report: DataReport) -> None:
    """Counts rows with the texts of an earlier one, in any order, by whether the two agree."""
    seen: dict[tuple[str, ...], np.ndarray] = {}
    for comparison in comparisons:
        texts = [str(response) for response in comparison.responses]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        matrix = comparison.preference_matrix()[np.ix_(order, order)]
        judged = np.sign(matrix - matrix.T)
        first = seen.setdefault((str(comparison.prompt), *(texts[i] for i in order)), judged)
        if first is not judged:
            opposed = (first * judged < 0).any()
            report.notes[f'{"contradicts" if opposed else "repeats"} an earlier row'] += 1


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
