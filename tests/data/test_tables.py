"""Tests of tables that are kept: made once, checked, made anew where they are damaged."""

import errno
import fcntl
import json
import pickle
import re
import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest

from qrm.data import tables
from qrm.data.comparisons import DataError
from qrm.data.tables import Cache, Table

SCHEMA = pa.schema([('x', pa.int32()), ('digest', pa.binary(2))])


class Making:
    """Makes an entry of three batches, and counts how often."""

    def __init__(self):
        self.times = 0

    def __call__(self, writer):
        self.times += 1
        with writer.table('numbers', SCHEMA) as write:
            for start in (0, 3, 4):
                stop = {0: 3, 3: 4, 4: 9}[start]
                write(pa.record_batch([
                    pa.array(range(start, stop), pa.int32()),
                    pa.array([bytes([i, 255 - i]) for i in range(start, stop)], pa.binary(2))],
                    schema=SCHEMA))
        assert len(writer['numbers']) == 9  # can be read while others are made
        return {'made': [1, 'two']}


def _check(entry):
    table = entry.table('numbers')
    assert entry.value == {'made': [1, 'two']}
    assert len(table) == 9
    assert table.column('x').to_pylist() == list(range(9))
    np.testing.assert_array_equal(table.numbers('x'), range(9))
    np.testing.assert_array_equal(table.numbers('digest'), [[i, 255 - i] for i in range(9)])
    assert [batch.num_rows for batch in table.in_turn()] == [3, 1, 5]
    assert [table.place(row) for row in (0, 2, 3, 4, 8)] == [(0, 0), (0, 2), (1, 0), (2, 0), (2, 4)]
    assert table.batch(2).column('x').to_pylist() == [4, 5, 6, 7, 8]


def _entry_of(folder):
    place, = (path for path in (folder / 'numbers').iterdir() if path.is_dir())
    return place


def test_an_entry_is_made_once_and_the_same_in_memory(tmp_path, capsys):
    making = Making()
    for _ in range(2):
        _check(Cache(str(tmp_path)).keep('numbers', {'of': 1}, making))
    assert making.times == 1
    for _ in range(2):
        _check(Cache('').keep('numbers', {'of': 1}, making))
    assert making.times == 3
    assert sorted(path.name for path in _entry_of(tmp_path).iterdir()) == [
        'about.json', 'entry.json', 'numbers.arrow']
    assert json.loads((_entry_of(tmp_path) / 'about.json').read_text())['of'] == 1
    assert capsys.readouterr().out == ''


def test_tables_are_sent_by_their_path(tmp_path):
    table = Cache(str(tmp_path)).keep('numbers', {}, Making()).table('numbers')
    sent = pickle.dumps(table)
    assert len(sent) < 600
    np.testing.assert_array_equal(pickle.loads(sent).numbers('x'), range(9))


def test_what_is_made_of_something_else_is_another_entry(tmp_path, monkeypatch):
    making, cache = Making(), Cache(str(tmp_path))
    keys = [cache.keep('numbers', about, making).key for about in ({'of': 1}, {'of': 2}, {'of': 1})]
    assert (making.times, keys[0] == keys[1], keys[0] == keys[2]) == (2, False, True)
    for name, other in (('_code', 'other code'), ('_versions', {'numpy': '0'})):
        monkeypatch.setattr(tables, name, lambda other=other: other)
        cache.keep('numbers', {'of': 1}, making)
    assert making.times == 4


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize('name', ['numbers.arrow', 'entry.json'])
@pytest.mark.parametrize('damage', [_flip, _cut, lambda path: path.write_bytes(b'')])
def test_damaged_entries_are_made_anew_and_that_is_said(name, damage, tmp_path, capsys):
    making, cache = Making(), Cache(str(tmp_path))
    cache.keep('numbers', {}, making)
    damage(_entry_of(tmp_path) / name)
    _check(cache.keep('numbers', {}, making))
    assert making.times == 2
    out = capsys.readouterr().out
    assert out == f'note: {_entry_of(tmp_path) / name}: not what was written; made anew\n'
    _check(cache.keep('numbers', {}, making))
    assert making.times == 2
    assert capsys.readouterr().out == ''


def test_a_table_that_is_gone_is_made_anew(tmp_path, capsys):
    making = Making()
    entry = Cache(str(tmp_path)).keep('numbers', {}, making)
    (_entry_of(tmp_path) / 'numbers.arrow').unlink()
    _check(entry)
    assert 'numbers.arrow: cannot be read (No such file or directory); made anew' in (
        capsys.readouterr().out)


def test_what_is_mapped_stays_when_the_folder_is_removed(tmp_path):
    entry = Cache(str(tmp_path / 'cache')).keep('numbers', {}, Making())
    entry.table('numbers')
    shutil.rmtree(tmp_path / 'cache')
    _check(entry)


def test_damage_where_nothing_can_be_written_is_made_good_in_memory(tmp_path, monkeypatch, capsys):
    def refuse(place):
        raise PermissionError(errno.EACCES, 'Permission denied')

    making = Making()
    entry = Cache(str(tmp_path)).keep('numbers', {}, making)
    _cut(_entry_of(tmp_path) / 'numbers.arrow')
    monkeypatch.setattr(tables, '_held', refuse)
    _check(entry)
    assert making.times == 2
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        'cannot be written into (Permission denied), so that numbers are kept in memory')


@pytest.mark.parametrize('locks', [True, False])
def test_of_two_that_ask_for_an_entry_one_makes_it(locks, tmp_path, monkeypatch):
    making, found, both = Making(), [], threading.Barrier(2)

    def refuse(*_):
        raise OSError('no locks here')

    if not locks:  # then both make it, and either's is there
        monkeypatch.setattr(fcntl, 'flock', refuse)

    def ask():
        both.wait()
        found.append(Cache(str(tmp_path)).keep('numbers', {}, making))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert making.times == 1 if locks else making.times <= 2
    for entry in found:
        _check(entry)
    assert not list(tmp_path.rglob('*.tmp'))


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    cache = Cache(str(tmp_path))
    cache.keep('numbers', {}, Making())
    place = _entry_of(tmp_path)
    left = place.with_name(f'{place.name}.123.tmp')
    left.mkdir()
    (place / 'entry.json').unlink()
    _check(cache.keep('numbers', {}, Making()))
    assert not left.exists()


def test_an_entry_that_cannot_be_made_leaves_nothing(tmp_path):
    def fail(writer):
        with writer.table('numbers', SCHEMA):
            raise ValueError('no such data')

    with pytest.raises(ValueError, match='no such data'):
        Cache(str(tmp_path)).keep('numbers', {}, fail)
    assert [path.suffix for path in (tmp_path / 'numbers').iterdir()] == ['.lock']


def test_where_nothing_can_be_written_tables_are_in_memory(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    _check(Cache(str(tmp_path / 'file')).keep('numbers', {}, Making()))
    assert 'cannot be written into (Not a directory), so that numbers are kept in memory' in (
        capsys.readouterr().out)


@pytest.fixture
def full(monkeypatch):
    """A disk without room for tables."""
    plain = pa.OSFile
    monkeypatch.setattr(tables.pa, 'OSFile', lambda path, mode='rb': plain(
        '/dev/full' if mode == 'wb' else path, mode))


def test_a_disk_that_is_full_is_said_and_nothing_is_made_again(full, tmp_path, capsys):
    making = Making()
    with pytest.raises(DataError) as error:
        Cache(str(tmp_path)).keep('numbers', {}, making)
    assert re.fullmatch(
        r'.*/numbers\.arrow: cannot be written \(.*No space left on device.*\); expected room for '
        r'it, or another folder: data\.cache', str(error.value))
    assert making.times == 1
    assert capsys.readouterr().out == ''
    assert [path.suffix for path in (tmp_path / 'numbers').iterdir()] == ['.lock']


def test_a_disk_that_is_full_at_the_end_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    making = Making()
    monkeypatch.setattr(tables.os, 'rename', refuse)
    with pytest.raises(DataError, match=r'cannot be written \(No space left on device\)'):
        Cache(str(tmp_path)).keep('numbers', {}, making)
    assert making.times == 1


def test_what_makes_a_table_has_errors_of_its_own(tmp_path):
    def fail(writer):
        with writer.table('numbers', SCHEMA):
            raise ConnectionError('no hub')

    with pytest.raises(ConnectionError, match='no hub'):
        Cache(str(tmp_path)).keep('numbers', {}, fail)


def test_the_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'caches'))
    Cache('auto').keep('numbers', {}, Making())
    assert _entry_of(tmp_path / 'caches' / 'qrm').is_dir()
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    Cache('auto').keep('numbers', {}, Making())
    assert _entry_of(tmp_path / 'home' / '.cache' / 'qrm').is_dir()


def test_a_table_without_rows_has_columns():
    table = Table([], SCHEMA)
    assert (len(table), table.column('x').to_pylist()) == (0, [])
    assert table.numbers('x').shape == (0,)
    assert table.numbers('digest').shape == (0, 2)
