"""Python functions of one's own, by the name MODULE:NAME."""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from qrm.data.comparisons import in_a_line


def find(place: str) -> tuple[Callable[..., Any], ModuleType]:
    """A function and its module, which is looked for in the current folder too.

    Args:
      place: 'MODULE:NAME'; dots in the name lead into what the module holds.

    Raises:
      ValueError: there is none, or the module fails; one line.
    """
    module, colon, name = place.partition(':')
    if not (module and colon and name):
        raise ValueError(f'{place!r}, expected MODULE:NAME')
    if os.getcwd() not in sys.path:  # as `python -m` has it; the command `qrm` does not
        sys.path.append(os.getcwd())
    try:
        loaded = importlib.import_module(module)
        function = functools.reduce(getattr, name.split('.'), loaded)
    except Exception as error:  # the module is a program too
        raise ValueError(f'no such function ({type(error).__name__}: {in_a_line(error)})'
                         ) from error
    if not callable(function):
        raise ValueError(f'got {type(function).__name__}, expected a function')
    return function, loaded
