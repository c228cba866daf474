"""Files of rows: JSON Lines, JSON arrays, either with gzip, and Parquet.

What is read is checked against the name of the file and against limits, so that a file of another
kind, or one that is made to fill the memory, ends in a message.
"""

import decimal
import functools
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from qrm.data.comparisons import DataError, MalformedRow, in_a_line

SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz', '.parquet')

_BOM, _GZIP = b'\xef\xbb\xbf', b'\x1f\x8b'
# How files begin that a download has left in place of the rows, or that are of another kind.
_NOT_ROWS = {
    b'version https://git-lfs': 'a Git LFS pointer, expected the file it points to',
    b'<': 'a web page, expected one JSON object a line',
    _GZIP: 'a gzip archive, expected a name that ends in .gz, and to be compressed once',
    b'PAR1': 'a Parquet file, expected a name that ends in .parquet',
    b'PK\x03\x04': 'a zip archive, expected the file in it',
    b'\xff\xfe': 'UTF-16, expected UTF-8',
    b'\xfe\xff': 'UTF-16, expected UTF-8',
}
_LONGEST_ROW = 2**26  # bytes
_LARGEST_ARRAY = 2**32  # bytes, as an array is read as a whole
_SPACE = re.compile(r'[ \t\n\r]*')
_PARQUET_ROWS = 1024  # held in memory at once


def is_rows(path: str) -> bool:
    """Whether a path names a file of rows, by its end."""
    return path.endswith(SUFFIXES)


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Reads a file row by row.

    A file that begins with `[` is one array of rows, on any number of lines; any other holds one
    row a line. Both may have either name, `.json` or `.jsonl`, with `.gz` if it is compressed;
    `.parquet` is read by columns.

    Yields:
      ('file:line', row) for each row, of an array ('file:line[i]', row) with its number from 0, of
      Parquet ('file[i]', row); a line that cannot be decoded is yielded as a `MalformedRow` in
      place of the row, so that the caller decides.

    Raises:
      DataError: the file as a whole cannot be trusted: missing, not UTF-8, a damaged archive, a
        last line or an array that is cut, something else in place of the content, no rows at all,
        duplicate keys within a row, or more than is read of a file.
    """
    if not os.path.isfile(path):
        raise DataError(f'{path}: no such file')
    try:
        rows = 0
        for row in _parquet(path) if path.endswith('.parquet') else _json(path):
            rows += 1
            yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f'{path}: no gzip archive, or a damaged gzip archive ({error})') from error
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror or error})') from error
    if not rows:
        raise DataError(f'{path}: the file has no rows')


def _json(path: str) -> Iterator[tuple[str, Any]]:
    compressed = path.endswith('.gz')
    with open(path, 'rb') as file:
        start = file.read(64)
        if not (compressed and start.startswith(_GZIP)):
            _check_kind(path, start)
    with (gzip.open if compressed else open)(path, 'rb') as file:
        start = file.readline(_LONGEST_ROW).removeprefix(_BOM)
        while not start.strip() and (line := file.readline(_LONGEST_ROW)):
            start = line
        if compressed:
            _check_kind(path, start)
        file.seek(0)
        lines = functools.partial(_lines, path, file)
        if not start.lstrip().startswith(b'['):
            yield from lines()
            return
        text = file.read(_LARGEST_ARRAY + 1).removeprefix(_BOM)
        if len(text) > _LARGEST_ARRAY:
            raise DataError(f'{path}: an array of more than {_LARGEST_ARRAY} bytes, expected one '
                            'object a line')
        if _is_value(start) and text.strip() != start.strip():
            file.seek(0)  # rows that are arrays, a line each
            yield from lines()
            return
    yield from _array(path, _decode(f'{path}:1', text))


def _check_kind(path: str, start: bytes) -> None:
    start = start.removeprefix(_BOM)
    for magic, found in _NOT_ROWS.items():
        if start.startswith(magic) or start.lstrip().startswith(magic):
            raise DataError(f'{path}:1: got {found}')


def _is_value(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _decode(where: str, raw: bytes) -> str:
    try:
        return raw.decode('utf-8')
    except UnicodeDecodeError as error:
        raise DataError(f'{where}: not UTF-8 ({error.reason} at byte {error.start})') from error


def _lines(path: str, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The rows of a file with one a line."""
    number = 0
    while raw := file.readline(_LONGEST_ROW + 1):
        number += 1
        where = f'{path}:{number}'
        if len(raw) > _LONGEST_ROW:
            raise DataError(f'{where}: a line of more than {_LONGEST_ROW} bytes, expected a row')
        line = _decode(where, raw.removeprefix(_BOM) if number == 1 else raw)
        if not line.strip():
            continue
        try:
            yield where, json.loads(line, object_pairs_hook=functools.partial(_unique, where))
        except DataError:
            raise
        except (ValueError, RecursionError) as error:  # ValueError: also for endless integers
            if not raw.endswith(b'\n') and number > 1:
                raise DataError(f'{where}: the last line is cut ({error})') from error
            if number == 1 and line.strip() == '{':
                raise DataError(f'{where}: an object on many lines, expected one object a line, or '
                                'an array of objects') from error
            yield where, MalformedRow(f'{where}: not JSON ({error}); expected one object a line')


def _array(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """The rows of an array, each with the line on which it begins and its number."""
    line, counted = 1, 0
    at = _SPACE.match(text).end() + 1  # behind the bracket
    more, rows = ',', 0
    while True:
        at = _SPACE.match(text, at).end()
        line, counted = line + text.count('\n', counted, at), at
        where = f'{path}:{line}[{rows}]'
        if at == len(text):
            raise DataError(f'{where}: the array is cut')
        if text[at] == ']' and (more != ',' or not rows):
            break
        if more != ',':
            raise DataError(f'{where}: not JSON: expected a comma or the end of the array')
        decoder = json.JSONDecoder(object_pairs_hook=functools.partial(_unique, where))
        try:
            row, end = decoder.raw_decode(text, at)
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            # What follows cannot be told apart from it.
            cut = getattr(error, 'pos', 0) >= len(text.rstrip()) or 'Unterminated' in str(error)
            raise DataError(f'{where}: {"the array is cut" if cut else "not JSON"} '
                            f'({error})') from error
        yield where, row
        rows += 1
        at = _SPACE.match(text, end).end()
        more = text[at:at + 1]
        at += more == ','
    if rest := text[at + 1:].strip():
        line += text.count('\n', counted, text.index(rest, at + 1))
        raise DataError(f'{path}:{line}: something follows the array, expected its end')


def _parquet(path: str) -> Iterator[tuple[str, Any]]:
    import pyarrow  # Takes a while, which other files need not wait for.
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path} field '{twice[0]}': the column stands twice")
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield f'{path}[{number}]', {key: _plain(value) for key, value in row.items()}
                    number += 1
    except DataError:
        raise
    # ValueError, OverflowError: also for values that Python has no type for, as of time.
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:
        raise DataError(f'{path}: a Parquet file that is damaged or has values that cannot be read '
                        f'({in_a_line(error)})') from error


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it: without keys that other rows have, decimals as floats."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, decimal.Decimal) else value


def _unique(where: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DataError(f"{where} field '{key}': the key stands twice in one object")
        result[key] = value
    return result
