"""What every entry point shares: running a main so that bad input ends in one clear line."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from qrm.data.comparisons import DataError
from qrm.training.config import ConfigError
from qrm.training.train import Interrupted, NonFiniteLoss
from qrm.training.workdir import WorkdirError

_EXPECTED = (DataError, ConfigError, WorkdirError, NonFiniteLoss)
_HEARTBEAT_SECONDS = 15  # a process not heard of for so long is dead, and the others end
_SHUTDOWN_SECONDS = 30  # how long a process that is done waits for the others
# How absl and ml_collections report flags that cannot be parsed, and files that are not there.
_FLAG_ERRORS = (flags.Error, WorkdirError, AttributeError, KeyError, TypeError, ValueError, OSError)


def define_process_flags() -> None:
    """Defines the flags of commands that several processes can run together."""
    flags.DEFINE_string(
        'coordinator', None, "host:port of the first of several processes; 'auto': found out from "
        'Slurm, Kubernetes or the TPU pod, with the other two.')
    flags.DEFINE_integer('num_processes', None, 'Of how many.', lower_bound=1)
    flags.DEFINE_integer('process_id', None, 'Which one this is, from 0.', lower_bound=0)


def run(main: Callable[[], None], parse: Callable[[list[str]], list[str]] | None = None) -> None:
    """Runs `main` under absl; exit code 2 for bad input, 0 after a signal that was served.

    Of several processes each exits so; if one fails or dies, the others end within a minute.

    Args:
      main: takes no arguments, reads flags.
      parse: parses flags, given the command line; default `flags.FLAGS`.
    """

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            rest = (parse or flags.FLAGS)(argv)
            if 'config' in flags.FLAGS:
                # A file that could not be loaded says so only when a value is asked for.
                _ = flags.FLAGS.config.seed
            _check_process_flags()
        except _FLAG_ERRORS as error:
            message = str(error).strip('"').replace('\\n', ' ').replace("\\'", "'")
            _fail(f'{message}; --help lists the flags')
        if len(rest) > 1:
            _fail(f'unexpected arguments {rest[1:]}; a flag starts with --')
        return rest

    def guarded(unused_argv: list[str]) -> None:
        absl_logging.set_verbosity(absl_logging.ERROR)  # checkpointing warns of nothing of use
        logging.getLogger('jax').setLevel(logging.WARNING)
        _cache_compilations()
        several = 'coordinator' in flags.FLAGS and flags.FLAGS.coordinator
        if several:
            _join()
        signal.signal(signal.SIGTERM, _stop)  # not earlier: joining installs a handler too
        try:
            main()
        except Interrupted as stop:
            print(stop, file=sys.stderr, flush=True)
        except _EXPECTED as error:
            if several:
                _leave(2, f'error: {error}')
            _fail(str(error))
        except BaseException:
            if several:
                _leave(1, traceback.format_exc())
            raise
        if several:
            jax.distributed.shutdown()

    app.run(guarded, flags_parser=parse_flags)


def _check_process_flags() -> None:
    if 'coordinator' not in flags.FLAGS:
        return
    coordinator, count, own = (
        flags.FLAGS[name].value for name in ('coordinator', 'num_processes', 'process_id'))
    if coordinator in (None, 'auto'):
        if count is not None or own is not None:
            raise flags.ValidationError(
                f'--num_processes={count} --process_id={own} without --coordinator=host:port')
    elif count is None or own is None or own >= count or ':' not in coordinator:
        raise flags.ValidationError(
            f'--coordinator={coordinator} --num_processes={count} --process_id={own}: expected '
            'host:port, a number of processes and an id below it')


def _join() -> None:
    """Joins the other processes and connects their devices; only the first one prints."""
    coordinator, settings = flags.FLAGS.coordinator, {}
    if coordinator != 'auto':
        settings = {
            'coordinator_address': coordinator, 'num_processes': flags.FLAGS.num_processes,
            'process_id': flags.FLAGS.process_id,
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


def _cache_compilations() -> None:
    """Keeps what is compiled, so that a second run of the same shapes starts at once.

    In `JAX_COMPILATION_CACHE_DIR`, or below the user's cache folder.
    """
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
        jax.config.update('jax_compilation_cache_dir', os.path.join(root, 'qrm', 'compilations'))


def _stop(number: int, unused_frame: Any) -> None:
    """Serves a signal where there is nothing to save; the training loop has its own handler."""
    name = signal.Signals(number).name
    raise Interrupted(f'{name}: stopped; run the same command again to go on')


def _fail(message: str) -> None:
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(2)
