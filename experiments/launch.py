"""What every entry point shares: running a main so that bad input ends in one clear line."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

from qrm.comparisons import DataError
from qrm.config import ConfigError
from qrm.train import Interrupted, NonFiniteLoss
from qrm.workdir import WorkdirError

_EXPECTED = (DataError, ConfigError, WorkdirError, NonFiniteLoss)
# How absl and ml_collections report flags that cannot be parsed, and files that are not there.
_FLAG_ERRORS = (flags.Error, WorkdirError, AttributeError, KeyError, TypeError, ValueError, OSError)


def run(main: Callable[[], None], parse: Callable[[list[str]], list[str]] | None = None) -> None:
    """Runs `main` under absl; exit code 2 for bad input, 0 after a signal that was served.

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
        signal.signal(signal.SIGTERM, _stop)
        try:
            main()
        except Interrupted as stop:
            print(stop, file=sys.stderr, flush=True)
        except _EXPECTED as error:
            _fail(str(error))

    app.run(guarded, flags_parser=parse_flags)


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
