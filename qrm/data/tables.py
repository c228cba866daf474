"""Tables that are made once and kept: Arrow files in a folder, mapped into memory.

An entry is found by a digest of `about`, which is all that it is a function of. It appears in one
rename, so that a reader sees all of it or nothing, and is checked before it is used:

    <folder>/<kind>/<key>/about.json     everything that the entry depends on, of which the key is
                                         a digest
    <folder>/<kind>/<key>/entry.json     what else is kept, ready for JSON; size and checksum of
                                         each table, and a checksum of all that
    <folder>/<kind>/<key>/NAME.arrow     a table, in Arrow's IPC format
    <folder>/<kind>/<key>.lock           held by whoever makes the entry; others wait for it

Without a folder the same tables are in memory, and end with what uses them.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qrm.data.comparisons import DataError, in_a_line

AUTO = 'auto'  # the user's cache folder

_PACKAGES = ('jinja2', 'numpy', 'pyarrow', 'tokenizers', 'transformers')
_READ = 2**22  # bytes
_KEY_LETTERS = 32


class Table:
    """Rows in record batches, of a file or in memory.

    Args:
      source: path of an Arrow file, or the batches themselves.
      schema: of the batches.
    """

    def __init__(self, source: str | list[pa.RecordBatch], schema: pa.Schema | None = None):
        self._path = source if isinstance(source, str) else None
        if self._path:
            reader = pa.ipc.open_file(pa.memory_map(self._path))
            source = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            schema = reader.schema
        self._batches, self._schema = source, schema
        self.starts = np.cumsum([0, *(batch.num_rows for batch in source)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self):
        """A file is mapped again where it is sent to."""
        return Table, (self._path or self._batches, self._schema)

    def batch(self, number: int) -> pa.RecordBatch:
        """A batch, of a file mapped into memory."""
        return self._batches[number]

    def place(self, row: int) -> tuple[int, int]:
        """The batch of a row, and its number there."""
        number = int(np.searchsorted(self.starts, row, side='right')) - 1
        return number, row - int(self.starts[number])

    def in_turn(self) -> Iterator[pa.RecordBatch]:
        """The batches one after the other, none of which stays in memory for longer."""
        if self._path is None:
            yield from self._batches
            return
        try:
            file = pa.OSFile(self._path)
        except FileNotFoundError:  # removed since; what is mapped is still there
            yield from self._batches
            return
        with file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows."""
        return pa.chunked_array([batch.column(name) for batch in self._batches],
                                self._schema.field(name).type)

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, copied; of bytes of one width, [rows, width] uint8."""
        empty = pa.array([], self._schema.field(name).type)
        return np.concatenate([_as_numpy(empty), *(
            _as_numpy(batch.column(name)) for batch in self._batches)])


def _as_numpy(column: pa.Array) -> np.ndarray:
    if not pa.types.is_fixed_size_binary(column.type):
        return column.to_numpy(zero_copy_only=False)
    width = column.type.byte_width
    start = column.offset * width
    whole = np.frombuffer(column.buffers()[1] or b'', np.uint8)
    return whole[start:start + len(column) * width].reshape(-1, width)


class Writer:
    """The tables of an entry while it is made; in memory, if there is no folder."""

    def __init__(self, folder: str = ''):
        self._folder = folder
        self._tables: dict[str, Table] = {}

    @property
    def names(self) -> list[str]:
        """Of the tables written."""
        return list(self._tables)

    @contextlib.contextmanager
    def table(self, name: str, schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
        """A function that appends a batch to a new table.

        Raises:
          DataError: the file cannot be written.
        """
        if not self._folder:
            batches: list[pa.RecordBatch] = []
            yield batches.append
            self._tables[name] = Table(batches, schema)
            return
        path = _table(self._folder, name)
        with _writing(path):
            file = pa.OSFile(path, 'wb')
            stream = pa.ipc.new_file(file, schema)

        def write(batch: pa.RecordBatch) -> None:
            with _writing(path):
                stream.write_batch(batch)

        try:  # Not in `_writing`, as what makes the batches has errors of its own.
            yield write
        finally:
            with _writing(path), file:
                stream.close()
        self._tables[name] = Table(path)

    def __getitem__(self, name: str) -> Table:
        """A table that is whole."""
        return self._tables[name]


Build = Callable[[Writer], Any]


class Entry:
    """What is kept of one function of its key.

    Attributes:
      about: what it is a function of.
      value: what else than tables is kept.
    """

    def __init__(self, about: Mapping[str, Any], value: Any, tables: Callable[[str], Table]):
        self.about, self.value = about, value
        self.table = functools.cache(tables)

    @property
    def key(self) -> str:
        """Digest of `about`."""
        return _key(self.about)


class Cache:
    """A folder of entries.

    Args:
      folder: where they are, `AUTO` for `qrm` in the user's cache folder (`XDG_CACHE_HOME`, else
        `~/.cache`); '': nowhere, they are made each time.
    """

    def __init__(self, folder: str):
        if folder == AUTO:
            folder = os.path.join(
                os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'qrm')
        self._folder = folder

    def keep(self, kind: str, about: Mapping[str, Any], build: Build) -> Entry:
        """An entry, which is made if there is none.

        Of several processes that ask for one, one makes it and the others wait. Where the folder
        cannot be written into, it is made in memory, and a line says so.

        Args:
          kind: what it is called.
          about: everything that it depends on, but for code and libraries; ready for JSON.
          build: writes its tables, and gives what else there is, ready for JSON.

        Raises:
          DataError: writing began, and cannot go on, as on a full disk.
        """
        about = {'kind': kind, **about, 'code': _code(), 'packages': _versions()}
        if not self._folder:
            return _in_memory(about, build)
        place = os.path.join(self._folder, kind, _key(about))

        @functools.cache
        def in_memory() -> Entry:
            return _in_memory(about, build)

        def without_folder(problem: _Unusable) -> Entry:
            print(f'note: {place}: cannot be written into ({problem}), so that '
                  f'{kind} are kept in memory', flush=True)
            return in_memory()

        def table(name: str) -> Table:
            path = _table(place, name)
            if problem := _fault(path, files['tables'][name]):
                print(f'note: {path}: {problem}; made anew', flush=True)
                try:
                    files.update(self._make(place, about, build, damaged=files))
                except _Unusable as unusable:
                    return without_folder(unusable).table(name)
            return Table(path)

        try:
            with _using():
                found = self._find(place)
            files = found or self._make(place, about, build)
        except _Unusable as unusable:
            return without_folder(unusable)
        return Entry(about, files['value'], table)

    def _find(self, place: str, *, quiet: bool = False) -> dict[str, Any] | None:
        """What `entry.json` says of an entry; None if there is none, or it is damaged."""
        path = os.path.join(place, 'entry.json')
        try:
            with open(path, encoding='utf-8') as file:
                text = file.read()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            text = ''
        checksum, _, rest = text.partition('\n')
        if checksum == _digest(rest):
            return json.loads(rest)
        if not quiet:
            print(f'note: {path}: not what was written; made anew', flush=True)
        return None

    def _make(self, place: str, about: Mapping[str, Any], build: Build,
              damaged: dict[str, Any] | None = None) -> dict[str, Any]:
        """Makes an entry, unless another process has meanwhile."""
        with contextlib.ExitStack() as until:
            with _using():
                os.makedirs(os.path.dirname(place), exist_ok=True)
                alone = until.enter_context(_held(place))
                found = self._find(place, quiet=True)
            if found and (damaged is None or not any(
                    _fault(_table(place, name), known)
                    for name, known in found['tables'].items())):
                return found
            parent, name = os.path.split(place)
            temporary = f'{place}.{uuid.uuid4().hex}.tmp'
            with _using():
                for left in os.listdir(parent):  # by processes that were killed
                    if alone and left.startswith(f'{name}.') and left.endswith('.tmp'):
                        shutil.rmtree(os.path.join(parent, left), ignore_errors=True)
                os.mkdir(temporary)
            until.callback(shutil.rmtree, temporary, ignore_errors=True)
            return _made(temporary, place, about, build)


def _made(temporary: str, place: str, about: Mapping[str, Any], build: Build) -> dict[str, Any]:
    """Makes an entry in an empty folder, and gives it its name."""
    writer = Writer(temporary)
    value = build(writer)
    with _writing(place):
        files = {'value': value, 'tables': {
            name: _described(_table(temporary, name)) for name in writer.names}}
        rest = json.dumps(files)
        for file, text in (('about.json', json.dumps(about, indent=2)),
                           ('entry.json', f'{_digest(rest)}\n{rest}')):
            with open(os.path.join(temporary, file), 'w', encoding='utf-8') as opened:
                opened.write(text)
        shutil.rmtree(place, ignore_errors=True)
        try:
            os.rename(temporary, place)
        except OSError as error:  # another has, where files cannot be locked
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    return json.loads(rest)


class _Unusable(Exception):
    """Why nothing can be kept in a folder, found out before anything was made."""


@contextlib.contextmanager
def _using() -> Iterator[None]:
    """What cannot be done within is a reason to do without the folder."""
    try:
        yield
    except OSError as error:
        raise _Unusable(error.strerror or error) from error


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """What cannot be written within ends in a line."""
    try:
        yield
    except OSError as error:
        raise DataError(f'{path}: cannot be written ({error.strerror or in_a_line(error)}); '
                        'expected room for it, or another folder: data.cache') from error


def _in_memory(about: Mapping[str, Any], build: Build) -> Entry:
    writer = Writer()
    return Entry(about, json.loads(json.dumps(build(writer))), writer.__getitem__)


@contextlib.contextmanager
def _held(place: str) -> Iterator[bool]:
    """Keeps other processes from making the same entry; whether it can, as some disks do not."""
    with open(f'{place}.lock', 'w', encoding='utf-8') as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'waiting for another process that makes {place}', flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone


def _table(folder: str, name: str) -> str:
    return os.path.join(folder, f'{name}.arrow')


def _described(path: str) -> list[int]:
    """Size and checksum of a file."""
    size = checksum = 0
    with open(path, 'rb') as file:
        while block := file.read(_READ):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _fault(path: str, known: list[int]) -> str:
    """What is wrong with a file; '' if nothing is."""
    try:
        return '' if _described(path) == known else 'not what was written'
    except OSError as error:
        return f'cannot be read ({error.strerror})'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key(about: Mapping[str, Any]) -> str:
    return _digest(json.dumps(about, sort_keys=True))[:_KEY_LETTERS]


@functools.cache
def _code() -> str:
    """Digest of the wing's own code, so that nothing that another version made is read."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob('*.py')):
        found.update(path.read_bytes())
    return found.hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
