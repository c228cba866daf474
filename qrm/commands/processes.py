"""A main in its process, one of several or alone: signals, errors, compiled programs."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from qrm.data.comparisons import DataError, in_a_line
from qrm.training import interruptions
from qrm.training.interruptions import Interrupted, NonFiniteLoss
from qrm.training.schema import ConfigError
from qrm.training.workdir import WorkdirError

_EXPECTED = (DataError, ConfigError, WorkdirError, NonFiniteLoss)
_HEARTBEAT_SECONDS = 15  # a process not heard of for so long is dead, and the others end
_KEPT_SECONDS = 0.1  # of compilation, from which on a program is kept
_SHUTDOWN_SECONDS = 30  # how long a process that is done waits for the others


def run(main: Callable[[], None], coordinator: str | None, count: int | None,
        own: int | None, stall_minutes: float | None) -> None:
    """Runs `main`; exit code 2 for bad input, 0 after a signal that was served.

    Of several processes each exits so; if one fails or dies, the others end within a minute. While
    they train or compute they also end if all wait for each other, see `interruptions.watched`.

    Args:
      main: takes no arguments.
      coordinator: host:port of the first of several processes, 'auto' to find it out, or None.
      count, own: how many they are and which one this is, with host:port.
      stall_minutes: of several processes, how long one goes on without progress; 0: for ever.
    """
    _quiet()
    _cache_compilations()
    if coordinator:
        _join(coordinator, count, own)
        interruptions.end_stalls(60.0 * stall_minutes)
    for number in (signal.SIGTERM, signal.SIGINT):  # not earlier: joining installs a handler too
        signal.signal(number, interruptions.stop)
    try:
        main()
    except Interrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        if not coordinator:
            _end()
    except _EXPECTED as error:
        if coordinator:
            _leave(2, f'error: {error}')
        _fail(str(error))
    except BaseException as error:
        if reason := _of_the_machine(error):
            if coordinator:
                _leave(2, f'error: {reason}')
            _fail(reason)
        if coordinator:
            _leave(1, traceback.format_exc())
        raise
    if coordinator:
        jax.distributed.shutdown()


def _quiet() -> None:
    """Keeps what libraries print of errors that they also raise, which is said in a line, from it.

    A save that fails leaves tasks behind, each of which would print a traceback of its own.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    logging.getLogger('jax').setLevel(logging.WARNING)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # A signal that comes inside of a callback is remembered, see `interruptions.stop`.
        if not (isinstance(unraisable.exc_value, Interrupted)
                or 'Event loop is closed' in str(unraisable.exc_value)):
            before(unraisable)

    sys.unraisablehook = hook


def _of_the_machine(error: BaseException) -> str:
    """What is said of a full disk or too little memory; '' if it is something else."""
    if isinstance(error, OSError):
        place = f'{error.filename}: ' if error.filename else ''
        return f'{place}{error.strerror or error}'
    if interruptions.exhausts_memory(error):
        return (f'too little memory ({in_a_line(error)[:200]}); expected a smaller model, or fewer '
                'tokens at once: train.rows, train.row_length, data.max_length, model.remat')
    return ''


def _join(coordinator: str, count: int | None, own: int | None) -> None:
    """Joins the other processes and connects their devices; only the first one prints."""
    settings = {}
    if coordinator != 'auto':
        settings = {
            'coordinator_address': coordinator, 'num_processes': count, 'process_id': own,
            'coordinator_bind_address': coordinator,  # by default it listens on all interfaces
        }
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                                   shutdown_timeout_seconds=_SHUTDOWN_SECONDS, **settings)
        # Connects all devices now: on CPU a process waits only 30 s for the others to connect, and
        # one may take longer than that to compile its first step.
        multihost_utils.sync_global_devices('joined')
    except (RuntimeError, ValueError) as error:
        _fail(f'--coordinator={coordinator}: {error}')
    if jax.process_index():
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115 (open to the end)


def _leave(code: int, message: str) -> None:
    """Ends this process at once, by which the others, which may wait for it, end too."""
    print(f'process {jax.process_index()}: {message}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _end() -> None:
    """Ends this process at once: threads of XLA still at work crash while Python is taken down."""
    sys.stdout.flush()
    os._exit(0)


def _cache_compilations() -> None:
    """Keeps what is compiled, so that a second run of the same shapes starts at once.

    In `JAX_COMPILATION_CACHE_DIR`, or below the user's cache folder.
    """
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
        jax.config.update('jax_compilation_cache_dir', os.path.join(root, 'qrm', 'compilations'))
        # By default JAX keeps what took a second; a small model's programs take less, each.
        jax.config.update('jax_persistent_cache_min_compile_time_secs', _KEPT_SECONDS)


def _fail(message: str) -> None:
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(2)
