"""Tests of files of rows, and of what is none."""

import decimal
import gzip
import json

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from qrm.data import files
from qrm.data.comparisons import DataError, MalformedRow
from qrm.data.files import read_rows


def _write(folder, content, name='rows.jsonl'):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def _rows(path):
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize(('path', 'expected'), [
    ('a/rows.jsonl', True), ('rows.jsonl.gz', True), ('rows.json', True), ('rows.json.gz', True),
    ('rows.parquet', True), ('rows.gz', False), ('demo', False), ('Anthropic/hh-rlhf', False),
])
def test_files_of_rows_are_known_by_their_name(path, expected):
    assert files.is_rows(path) is expected


def test_rows_carry_file_and_line(tmp_path):
    path = _write(tmp_path, b'{"a": 1}\n\n  \t\n{"a": 2}\n')
    assert list(read_rows(path)) == [(f'{path}:1', {'a': 1}), (f'{path}:4', {'a': 2})]


@pytest.mark.parametrize('content', [
    b'{"a": "x"}\n{"a": "y"}\n',
    b'{"a": "x"}\n{"a": "y"}',  # no newline at the end
    b'\xef\xbb\xbf{"a": "x"}\n{"a": "y"}\n',  # byte order mark
    b'{"a": "x"}\r\n{"a": "y"}\r\n',
    b'\r\n{"a": "x"}\r\n\r\n{"a": "y"}\r\n\r\n',
    b'\n\n{"a": "x"}\n \n\t\n{"a": "y"}\n\n',
])
@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz'])
def test_byte_order_marks_line_ends_and_blank_lines_do_not_matter(tmp_path, content, suffix):
    content = gzip.compress(content, mtime=0) if suffix.endswith('.gz') else content
    assert _rows(_write(tmp_path, content, 'rows' + suffix)) == [{'a': 'x'}, {'a': 'y'}]


def test_other_line_separators_belong_to_the_text(tmp_path):
    text = 'a\u2028b\u2029c\x85d'
    content = json.dumps({'a': text}, ensure_ascii=False).encode() + b'\n'
    assert _rows(_write(tmp_path, content)) == [{'a': text}]


ARRAYS = (
    '[{"a": "x"}, {"a": "y"}]',
    ' \n[{"a": "x"},{"a": "y"}]\n\n',
    '[\n  {\n    "a": "x"\n  },\n  {\n    "a": "y"\n  }\n]\n',
    '\ufeff[\r\n{"a": "x"}\r\n,\r\n{"a": "y"}]',
    '\ufeff[{"a": "x"}, {"a": "y"}]',
    '\n \n' * 100 + '[{"a": "x"}, {"a": "y"}]',
)


@pytest.mark.parametrize('content', ARRAYS)
@pytest.mark.parametrize('suffix', ['.json', '.jsonl', '.json.gz', '.jsonl.gz'])
def test_arrays_are_rows_whatever_the_name(tmp_path, content, suffix):
    content = content.encode()
    content = gzip.compress(content, mtime=0) if suffix.endswith('.gz') else content
    assert _rows(_write(tmp_path, content, 'rows' + suffix)) == [{'a': 'x'}, {'a': 'y'}]


def test_rows_of_an_array_carry_the_line_they_begin_on(tmp_path):
    path = _write(tmp_path, b'[\n{"a":\n1}, {"a": 2},\n\n\n{"a": 3}\n]', 'rows.json')
    assert list(read_rows(path)) == [
        (f'{path}:2[0]', {'a': 1}), (f'{path}:3[1]', {'a': 2}), (f'{path}:6[2]', {'a': 3})]


def test_lines_that_are_arrays_are_rows_a_line_each(tmp_path):
    assert _rows(_write(tmp_path, b'[1]\n[2]\n')) == [[1], [2]]


def test_json_with_a_row_a_line_is_read(tmp_path):
    assert _rows(_write(tmp_path, b'{"a": 1}\n{"a": 2}\n', 'rows.json')) == [{'a': 1}, {'a': 2}]


def test_parquet(tmp_path):
    chat = [{'role': 'user', 'content': 'Hi'}]
    rows = [{'prompt': chat, 'chosen': 'a', 'ratings': [1.0, 2.5]},
            {'prompt': None, 'chosen': 'b', 'ratings': None}]
    path = str(tmp_path / 'rows.parquet')
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert list(read_rows(path)) == [(f'{path}[{i}]', row) for i, row in enumerate(rows)]
    # Keys that other rows have are no keys of this one, however deep.
    nested = [{'a': [{'x': 1}]}, {'a': [{'y': 2}]}]
    parquet.write_table(pyarrow.Table.from_pylist(nested), path)
    assert _rows(path) == nested
    parquet.write_table(pyarrow.table({'a': [decimal.Decimal('0.5')]}), path)
    assert _rows(path) == [{'a': 0.5}]
    for table, expected in (
            (pyarrow.table([[1], [2]], names=['a', 'a']), "field 'a': the column stands twice"),
            (pyarrow.table({'a': pyarrow.array([2**60], pyarrow.timestamp('us'))}), 'cannot be')):
        parquet.write_table(table, path)
        with pytest.raises(DataError, match=expected):
            _rows(path)
    datasets.Dataset.from_list(rows).to_parquet(path)
    content = (tmp_path / 'rows.parquet').read_bytes()
    for damaged in (content[:-9], content[:200], b'PAR1', b'', b'{"a": 1}\n'):
        with pytest.raises(DataError, match=r'^.*rows\.parquet: a Parquet file that is'):
            _rows(_write(tmp_path, damaged, 'rows.parquet'))
    datasets.Dataset.from_dict({'a': []}).to_parquet(path)
    with pytest.raises(DataError, match='has no rows'):
        _rows(path)


def test_rows_and_arrays_beyond_the_limits_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(files, '_LONGEST_ROW', 100)
    monkeypatch.setattr(files, '_LARGEST_ARRAY', 200)
    path = _write(tmp_path, b'{"a": 1}\n{"a": "' + b'x' * 100 + b'"}\n')
    with pytest.raises(DataError, match=r':2: a line of more than 100 bytes'):
        _rows(path)
    path = _write(tmp_path, b'[' + b'1, ' * 100 + b'1]')
    with pytest.raises(DataError, match='an array of more than 200 bytes'):
        _rows(path)
    assert _rows(_write(tmp_path, b'[' + b'1, ' * 50 + b'1]')) == [1] * 51


LFS = (b'version https://git-lfs.github.com/spec/v1\noid sha256:'
       + b'0' * 64 + b'\nsize 481129\n')
HTML = b'<!DOCTYPE html>\n<html><body>404</body></html>'


@pytest.mark.parametrize(('content', 'place', 'expected'), [
    (b'', '', 'the file has no rows'),
    (b'\n \r\n\n', '', 'the file has no rows'),
    (b'\xef\xbb\xbf', '', 'the file has no rows'),
    (b'{"a": 1}\n{"a": "\xff"}\n', ':2', 'not UTF-8'),
    ('{"a": "é"}\n'.encode('latin-1'), ':1', 'not UTF-8'),
    ('{"a": 1}\n'.encode('utf-16'), ':1', 'got UTF-16, expected UTF-8'),
    (gzip.compress(b'{"a": 1}\n', mtime=0), ':1', 'a gzip archive, expected a name that ends in'),
    (b'PAR1....', ':1', 'a Parquet file, expected a name that ends in .parquet'),
    (b'PK\x03\x04....', ':1', 'a zip archive, expected the file in it'),
    (b'{\n  "a": 1\n}\n', ':1', 'an object on many lines, expected one object a line, or an array'),
    # Arrays.
    (b'[]', '', 'the file has no rows'),
    (b'[\n{"a": 1},\n{"a": 2}', ':3[2]', 'the array is cut'),
    (b'[\n{"a": 1},\n{"a"\n', ':3[1]', 'the array is cut'),
    (b'[\n{"a": 1},\n{"a": "xyz', ':3[1]', 'the array is cut'),
    (b'[\n{"a": 1}\n{"a": 2}]', ':3[1]', 'expected a comma'),
    (b'[{"a": 1},\n]', ':2[1]', 'not JSON'),
    (b'[\n{"a": 1}]\n\n{"a": 2}', ':4', 'something follows the array'),
    (b'[{"a": 1},\n{"a": 2, "a": 3}]', ":2[1] field 'a'", 'stands twice'),
    (b'[{"a": "\xff"}]', ':1', 'not UTF-8'),
    (b'[' * 100_000, ':1[0]', 'not JSON'),
    (b'{"a": 1}\n{"a": 2', ':2', 'the last line is cut'),
    (b'{"a": 1}\n\n{"a"', ':3', 'the last line is cut'),
    (LFS, ':1', 'got a Git LFS pointer, expected the file it points to'),
    (b'\xef\xbb\xbf' + LFS, ':1', 'got a Git LFS pointer'),
    (HTML, ':1', 'got a web page, expected one JSON object a line'),
    (b'\r\n  ' + HTML.lower(), ':1', 'got a web page'),
    (b'<?xml version="1.0"?>\n<Error/>\n', ':1', 'got a web page'),
    (b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', ":2 field 'a'", 'stands twice'),
    (b'{"a": {"role": "x", "role": "x"}}\n', ":1 field 'role'", 'stands twice'),
])
def test_files_that_cannot_be_trusted_stop(tmp_path, content, place, expected):
    path = _write(tmp_path, content)
    with pytest.raises(DataError) as error:
        _rows(path)
    assert not isinstance(error.value, MalformedRow)
    assert str(error.value).startswith(f'{path}{place}: ')
    assert expected in str(error.value)


@pytest.mark.parametrize(('content', 'expected'), [
    (b'', 'the file has no rows'),
    (b'{"a": 1}\n', 'damaged gzip archive'),
    (LFS, 'got a Git LFS pointer'),
    (HTML, 'got a web page'),
    (gzip.compress(b'', mtime=0), 'the file has no rows'),
    (gzip.compress(b'{"a": 1}\n', mtime=0) + b'garbage', 'damaged gzip archive'),
])
def test_files_that_are_no_archives_stop(tmp_path, content, expected):
    path = _write(tmp_path, content, 'rows.jsonl.gz')
    with pytest.raises(DataError) as error:
        _rows(path)
    assert str(error.value).startswith(path)
    assert expected in str(error.value)


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz'])
def test_missing_files_and_folders_stop(tmp_path, suffix):
    path = str(tmp_path / f'rows{suffix}')
    with pytest.raises(DataError, match='no such file') as error:
        _rows(path)
    assert path in str(error.value)
    (tmp_path / f'rows{suffix}').mkdir()
    with pytest.raises(DataError, match='no such file'):
        _rows(path)


def test_files_that_the_system_refuses_stop(tmp_path, monkeypatch):
    path = _write(tmp_path, b'{"a": 1}\n')

    def refuse(*_):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(files, 'open', refuse, raising=False)
    with pytest.raises(DataError, match='cannot be read') as error:
        _rows(path)
    assert path in str(error.value)


def _archive():
    """Some rows that do not compress well, and their gzip archive."""
    rng = np.random.default_rng(0)
    rows = [{'chosen': str(rng.bytes(8).hex()), 'rejected': str(rng.integers(10**9))}
            for _ in range(8)]
    return rows, gzip.compress(b''.join(json.dumps(row).encode() + b'\n' for row in rows), mtime=0)


def test_archives_cut_anywhere_stop(tmp_path):
    rows, archive = _archive()
    assert _rows(_write(tmp_path, archive, 'rows.jsonl.gz')) == rows
    for length in range(len(archive)):
        path = _write(tmp_path, archive[:length], 'rows.jsonl.gz')
        with pytest.raises(DataError) as error:
            _rows(path)
        assert str(error.value).startswith(path), length


@pytest.mark.parametrize('flip', [0x01, 0x80, 0xFF])
def test_archives_with_a_flipped_byte_stop_or_are_read_unharmed(tmp_path, flip):
    rows, archive = _archive()
    messages = []
    for position in range(len(archive)):
        damaged = bytearray(archive)
        damaged[position] ^= flip
        path = _write(tmp_path, bytes(damaged), 'rows.jsonl.gz')
        try:
            assert _rows(path) == rows, position  # a time stamp, for example
        except DataError as error:
            messages.append(str(error))
    assert all(message.startswith(path) for message in messages)
    # Of the ten bytes of the header, six (time, compression level, system) may be anything.
    assert len(messages) >= len(archive) - 10


@pytest.mark.parametrize('line', [
    b'{"a": 1} {"a": 2}',  # two objects
    b'{"a": 1},',
    b"{'a': 1}",
    b'{"a": 1',
    b'{"a": tru}',
    b'{"a": "\x00"}',
    b'\x00',
    b'plain text',
    b'[' * 100_000 + b']' * 100_000,  # deeper than the interpreter's stack
    b'{"a":' * 100_000 + b'1' + b'}' * 100_000,
    b'{"a": ' + b'9' * 5000 + b'}',  # more digits than Python reads
])
def test_lines_that_are_not_json_are_left_to_the_caller(tmp_path, line):
    path = _write(tmp_path, b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    first, (where, error), last = read_rows(path)
    assert (first[1], last[1]) == ({'a': 1}, {'a': 3})
    assert where == f'{path}:2'
    assert isinstance(error, MalformedRow)
    assert str(error).startswith(f'{path}:2: not JSON')
    assert 'expected one object a line' in str(error)
