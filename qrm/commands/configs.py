"""Config files: those that come with qrm by their names, and a user's own by its path."""

import importlib.util
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from qrm.training.schema import ConfigError

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where the config files are: inside an installed package, or beside it in a clone."""
    inside = _PACKAGE / 'configs'
    return inside if inside.is_dir() else _PACKAGE.parent / 'configs'


def names() -> list[str]:
    """Names of the configs that come with qrm."""
    return sorted(path.stem for path in folder().glob('[!_]*.py'))


def module(name: str) -> ModuleType:
    """A config that comes with qrm, as a module."""
    return _execute(folder() / f'{name}.py')


def changes(name: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """What a config that comes with qrm changes, of the keys that another kind of run has too."""
    return {key: value for key, value in module(name).CHANGES.items() if key in keys}


def load(value: str) -> ConfigDict:
    """The config that `NAME[:arg]` or `PATH.py[:arg]` names, with the argument it is given.

    Raises:
      ConfigError: there is no such config, or its file fails; one line, with the place in a file.
    """
    if found := re.fullmatch(r'(.*\.py)(?::(.*))?', value):
        path, arg = Path(found[1]), found[2]
    else:
        name, colon, rest = value.partition(':')
        if name not in names():
            raise ConfigError(f'--config={value}: no such config, expected one of '
                              f'{", ".join(names())}, or the path of a .py file')
        path, arg = folder() / f'{name}.py', rest if colon else None
    if not path.is_file():
        raise ConfigError(f'--config={value}: {path}: no such file')
    try:
        loaded = _execute(path)
        if not hasattr(loaded, 'get_config'):
            raise ConfigError('no get_config, which returns the config')
        config = loaded.get_config(*([] if arg is None else [arg]))
        if not isinstance(config, ConfigDict):
            raise ConfigError(f'get_config returned {type(config).__name__}, expected a ConfigDict')
    except ConfigError as error:
        raise ConfigError(f'--config={value}: {error}') from error
    except Exception as error:  # a config file is a program, and fails in any way
        raise ConfigError(f'--config={value}: {_place(error, path)}: {type(error).__name__}: '
                          f'{str(error).split(chr(10))[0]}') from error
    return config


def _execute(path: Path) -> ModuleType:
    """A file as a module, which is not kept: another one may have its name."""
    spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _place(error: Exception, path: Path) -> str:
    """File, and line if one of its own is known, in which an error was raised."""
    if isinstance(error, SyntaxError):
        return f'{error.filename}:{error.lineno}'
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename).resolve() == path.resolve()]
    return f'{path}:{lines[-1]}' if lines else str(path)
