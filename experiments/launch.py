"""What every entry point shares: running a main so that bad input ends in one clear line."""

import logging
import sys
from collections.abc import Callable

from absl import app
from absl import logging as absl_logging

from qrm.comparisons import DataError
from qrm.config import ConfigError
from qrm.train import Interrupted, NonFiniteLoss
from qrm.workdir import WorkdirError

_EXPECTED = (DataError, ConfigError, WorkdirError, NonFiniteLoss)


def run(main: Callable[[], None], flags_parser: Callable | None = None) -> None:
    """Runs `main` under absl; exit code 2 for bad input, 0 after a signal that was served."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f'unexpected arguments {argv[1:]}; a flag starts with --')
        absl_logging.set_verbosity(absl_logging.ERROR)  # checkpointing warns of nothing of use
        logging.getLogger('jax').setLevel(logging.WARNING)
        try:
            main()
        except Interrupted as stop:
            print(stop, file=sys.stderr, flush=True)
        except _EXPECTED as error:
            print(f'error: {error}', file=sys.stderr, flush=True)
            sys.exit(2)

    app.run(guarded, **({'flags_parser': flags_parser} if flags_parser else {}))
