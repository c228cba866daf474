"""Modules run as mains in processes that begin with everything imported.

To import what a command needs takes three of its seconds, and tests start a hundred of them.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from unittest import mock

_IMPORTED = ('pytest', 'tests.helpers', 'qrm.commands.processes', 'qrm.policy.candidates',
             'qrm.serving.score', 'qrm.studies.compare', 'qrm.studies.disagreement')
# Read when they are imported. A process with threads at work may not be copied: the only one left
# is that of Arrow's allocator, which forks well.
_ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1', 'OPENBLAS_NUM_THREADS': '1',
                'OMP_NUM_THREADS': '1'}


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    found = multiprocessing.get_context('forkserver')
    found.set_forkserver_preload(list(_IMPORTED))
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    return found


class Process:
    """`python -m NAME ARGUMENTS…`, with what tests use of `subprocess.Popen`.

    Args:
      name: of a module.
      arguments: of its command line.
      environment: its own; what is read at import is that of these tests.
    """

    def __init__(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]):
        self._folder = tempfile.mkdtemp(prefix='qrm-fork-')
        weakref.finalize(self, shutil.rmtree, self._folder)
        self._process = _context().Process(
            target=_run, args=(name, list(arguments), dict(environment), self._folder))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """The same."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Ends it at once, if it runs."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, as soon as it has ended.

        Raises:
          subprocess.TimeoutExpired: it goes on for longer than these seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed and its errors, see `wait`."""
        self.wait(timeout)
        return tuple(self._read(number) for number in (1, 2))

    def _read(self, number: int) -> str:
        with open(os.path.join(self._folder, str(number)), encoding='utf-8') as file:
            return file.read()


def run(
    name: str, arguments: Sequence[str], environment: Mapping[str, str],
    timeout: float | None = 300.0,
) -> tuple[int, str, str]:
    """Exit code, output and errors of a `Process` that is waited for."""
    process = Process(name, arguments, environment)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return process.poll(), out, err


def _run(name: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        with open(os.path.join(folder, str(number)), 'wb') as file:
            os.dup2(file.fileno(), number)
    sys.argv[1:] = arguments
    runpy.run_module(name, run_name='__main__', alter_sys=True)
