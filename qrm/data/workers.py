"""Work on many chunks, in order, by processes where it is much."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from qrm.data.comparisons import DataError

Chunk, Found = TypeVar('Chunk'), TypeVar('Found')

_SMALL = 24  # chunks that no process is started for, as it takes seconds to begin
_MOST = 16  # processes; the one that hands out chunks keeps no more of them busy
_AHEAD = 2  # chunks for each process that wait for it

_function: Callable[[Any], Any] | None = None


def in_order(function: Callable[[Chunk], Found], chunks: Iterable[Chunk]) -> Iterator[Found]:
    """What a function gives of each chunk, in order; the first error of any is raised.

    Many chunks are given to new processes, as many as there are cores. These begin from nothing
    (`spawn`), as a copy of a process with threads, such as JAX's, may hang.

    Args:
      function: of one chunk. It is sent to each process once, with all that is bound to it.
      chunks: what it is called with.

    Raises:
      DataError: a process was killed.
    """
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, _SMALL + 1))
    processes = min(os.cpu_count() or 1, _MOST)
    if hasattr(os, 'sched_getaffinity'):  # those that this process may use
        processes = min(len(os.sched_getaffinity(0)), _MOST)
    if len(first) <= _SMALL or processes == 1:
        yield from map(function, itertools.chain(first, chunks))
        return
    with concurrent.futures.ProcessPoolExecutor(
            processes, multiprocessing.get_context('spawn'), _begin, (function,)) as pool:
        running: collections.deque[concurrent.futures.Future[Found]] = collections.deque()
        try:
            for chunk in itertools.chain(first, chunks):
                running.append(pool.submit(_call, chunk))
                if len(running) > _AHEAD * processes:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError('a process that reads data ended before it was done: it was killed, '
                            "perhaps for memory, or the program that calls has no `if __name__ == "
                            "'__main__'`") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    """Of a new process."""
    global _function
    _function = function
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # each has a core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(chunk: Any) -> Any:
    return _function(chunk)
