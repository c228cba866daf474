"""Keys of a config: default, check and comment of each in one place.

A table says which keys a kind of run has, by dotted name and in the order in which they are shown.
From it come the locked `ml_collections` config of a file in `configs/`, which states only what it
changes, the check of a config before anything is loaded, and what `--print_config` prints.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A config value that cannot be used; the message names the key and what was expected."""


class Check(Protocol):
    """Which values a key can have, beside having the type of its default; str() says it."""

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""


class Range(NamedTuple):
    """Finite numbers from `low` to `high`, without an end that is named open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is such a number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (self.low < value if self.open_low else self.low <= value) and (
            value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f'a number {"above" if self.open_low else "of at least"} {self.low:g}'
        if self.high == math.inf:
            return low
        high = f'{self.high:,}' if isinstance(self.high, int) else f'{self.high:g}'
        return f'{low} and {"below" if self.open_high else "at most"} {high}'


class OneOf(NamedTuple):
    """One of a few values."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""
        return value in self.values

    def __str__(self) -> str:
        return f'one of {self.values}'


class Anything(NamedTuple):
    """All values of the default's type; what uses them checks them."""

    def holds(self, value: Any) -> bool:
        """Always."""
        return True


ANY = Anything()


class Each(NamedTuple):
    """Tuples of values of one type for which a check holds."""

    kind: type
    check: Check = ANY

    def holds(self, value: Any) -> bool:
        """Whether each of them is one."""
        return all(type(item) is self.kind and self.check.holds(item) for item in value)

    def __str__(self) -> str:
        return f'a tuple, each of it {_TYPES[self.kind] if self.check == ANY else self.check}'


AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE = Range(1), Range(0), Range(0, open_low=True)
SHARE, BELOW_ONE = Range(0, 1), Range(0, 1, open_high=True)
LEVEL = Range(0.5, 1, open_high=True)  # of an interval


class Key(NamedTuple):
    """A key of a config.

    Attributes:
      default: its value where a config does not say another; values have its type. A mapping is a
        section whose own keys are free.
      check: which values it can have.
      comment: what it means, with units and what special values do.
    """

    default: Any
    check: Check
    comment: str


Table = Mapping[str, Key]

_NAMED = 3  # of many keys
_TOO_LARGE = 2**31  # for what devices count in
_TYPES = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text',
          tuple: 'a tuple', dict: 'a section'}


def build(table: Table, changes: Mapping[str, Any]) -> ConfigDict:
    """A complete, locked config.

    Args:
      table: its keys.
      changes: values that differ from the defaults, by dotted name.

    Raises:
      ConfigError: a change of a key that the table does not have.
    """
    for name in changes:
        if name not in table:
            raise ConfigError(unknown(name, table))
    tree: dict[str, Any] = {}
    for name, key in table.items():
        *sections, last = name.split('.')
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = changes.get(name, key.default)
    return ConfigDict(tree).lock()


def unknown(name: str, known: Iterable[str]) -> str:
    """What is said of a key that is none of the known ones."""
    close = difflib.get_close_matches(name, known, n=1)
    return f'config.{name}: no such key' + (f', did you mean config.{close[0]}?' if close else '')


def problems(config: Any, table: Table) -> list[str]:
    """A line for each value of a config with these keys that cannot be used.

    Raises:
      ConfigError: a key is missing, or there is one that nothing would read.
    """
    values = dict(flatten(config, table))
    kind = '; is this the config of another kind of run, or of another version?'
    if missing := [name for name in table if name not in values]:
        raise ConfigError(f'no {_few(missing)}{kind}')
    if more := [name for name in values if name not in table]:
        raise ConfigError(f'{_few(more)}: not known here{kind}')
    return [f'config.{name}={values[name]!r}, expected {allowed}'
            for name, key in table.items() if (allowed := expected(key, values[name]))]


def check(config: Any, table: Table) -> None:
    """Checks that a config has the keys of a table, and their values one by one.

    Raises:
      ConfigError: names keys that are missing or unknown, or lists every value that cannot be used.
    """
    raise_all(problems(config, table))


def raise_all(lines: list[str]) -> None:
    """Raises a ConfigError of all these lines, if there are any."""
    if lines:
        raise ConfigError('\n'.join(lines))


def describe(config: Any, table: Table) -> str:
    """All keys with their values and comments, in the order of the table, for the terminal.

    A value that is not the default has it in brackets.
    """
    values, lines, before = dict(flatten(config, table)), [], ''
    for name, key in table.items():
        if name in values:
            value = values[name]
            shown = value.to_dict() if isinstance(value, ConfigDict) else value
            default = '' if shown == key.default else f' [default: {key.default!r}]'
            section = name.rpartition('.')[0]
            lines += [''] * (section != before)
            lines.append(f'config.{name} = {shown!r}  # {key.comment}{default}')
            before = section
    return '\n'.join(lines)


def flatten(config: Any, table: Table, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all keys; a section of free keys is one value."""
    for part, value in config.items():
        name = prefix + part
        if isinstance(value, Mapping | ConfigDict) and name not in table:
            yield from flatten(value, table, f'{name}.')
        else:
            yield name, value


def _few(names: list[str]) -> str:
    """The first of these keys, and how many there are."""
    rest = f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
    return f'config.{", config.".join(names[:_NAMED])}{rest}'


def expected(key: Key, value: Any) -> str:
    """What should be in place of a value, or nothing if it can be used."""
    kind = dict if isinstance(key.default, Mapping) else type(key.default)
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif kind is dict:
        fits = isinstance(value, Mapping | ConfigDict)
    else:
        fits = type(value) is kind
    if not fits:
        return _TYPES[kind]
    if kind is int and abs(value) >= _TOO_LARGE:
        return f'a whole number below {_TOO_LARGE:,}'
    return '' if key.check.holds(value) else str(key.check)
