"""Config files by name: those that come with qrm, and a user's own by their path."""

import importlib.util
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where the config files are: inside an installed package, or beside it in a clone."""
    inside = _PACKAGE / 'configs'
    return inside if inside.is_dir() else _PACKAGE.parent / 'configs'


def names() -> list[str]:
    """Names of the configs that come with qrm."""
    return sorted(path.stem for path in folder().glob('[!_]*.py'))


def resolve(value: str) -> str:
    """`PATH[:arg]` of a config that is given as `NAME[:arg]`; a path stays as it is.

    Raises:
      ValueError: there is no such config.
    """
    name, colon, arg = value.partition(':')
    if name.endswith('.py'):
        return value
    if name not in names():
        raise ValueError(f'--config={value}: no such config, expected one of {", ".join(names())}, '
                         'or the path of a .py file')
    return f'{folder() / name}.py{colon}{arg}'


def module(name: str) -> ModuleType:
    """A config that comes with qrm, as a module; config files are loaded by path."""
    path = folder() / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'config_{name}', path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
