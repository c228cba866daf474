"""How a row of a data set says which of two responses is preferred: by values, signs, shares.

Each kind of verdict is declared by where it stands and what its values mean, judges a row, and says
in words what it reads.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from qrm.data.comparisons import MalformedRow

TIE = 'tie'
NOTHING = 'nothing'  # is said, as of a row that was not judged


class Judgement(NamedTuple):
    """What one judge says of two responses.

    Attributes:
      first: probability that the first is preferred, 1/2 for a tie; None: nothing is said.
      strength: by how much, in the units of the format; None: it is not said.
      judge: name, as the row has it; None: it is not said.
    """

    first: float | None
    strength: float | None = None
    judge: Any = None


class Place:
    """A row with its place, of which it is noted what is read.

    Attributes:
      where: 'file:line'.
      row: the row.
      read: keys that were read.
    """

    def __init__(self, where: str, row: Mapping[str, Any]):
        self.where, self.row, self.read = where, row, set[str]()

    def get(self, key: str) -> Any:
        """The value at a place; None where there is none."""
        self.read.add(key.split('.')[0])
        value = self.row
        for name in key.split('.'):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def need(self, key: str, expected: str) -> Any:
        """The value at a place.

        Raises:
          MalformedRow: there is none.
        """
        value = self.get(key)
        if value is None:
            self.fail(key, f'nothing, expected {expected}')
        return value

    def number(self, key: str) -> float:
        """A finite number, or its text, at a place."""
        return self.as_number(key, self.need(key, 'a number'))

    def as_number(self, key: str, value: Any) -> float:
        """A value that was found at a place, as a finite number.

        Raises:
          MalformedRow: it is none.
        """
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            self.fail(key, f'{shown(value)}, expected a number')
        return found

    def fail(self, key: str, problem: str):
        raise MalformedRow(f"{self.where} field '{key}': got {problem}")


class Values(NamedTuple):
    """A value that names the preferred response: 0, 1, `TIE` or `NOTHING`."""

    key: str
    meaning: Mapping[Any, int | str]

    def judge(self, place: Place) -> Judgement:
        if (value := place.get(self.key)) is None:
            return Judgement(None)
        value = whole_number(value)
        known = {(type(given), given): meaning for given, meaning in self.meaning.items()}
        try:
            found = known.get((type(value), value))
        except TypeError:
            found = None
        if found is None:
            place.fail(self.key, f'{shown(value)}, expected one of {list(self.meaning)}')
        return Judgement({0: 1.0, 1: 0.0, TIE: 0.5, NOTHING: None}[found])

    def __str__(self) -> str:
        words = {0: 'the first', 1: 'the second', TIE: 'a tie', NOTHING: 'not judged'}
        return f'`{self.key}`: ' + ', '.join(
            f'{json.dumps(value)} {words[meaning]}' for value, meaning in self.meaning.items())


class Sign(NamedTuple):
    """A number whose sign says which is preferred, 0 a tie, and whose size is the strength."""

    key: str
    negative: int  # index of the response that a negative number prefers
    most: float = math.inf
    nothing: tuple[float, ...] = ()  # numbers of what was not judged

    def judge(self, place: Place) -> Judgement:
        if place.get(self.key) is None or (number := place.number(self.key)) in self.nothing:
            return Judgement(None)
        if abs(number) > self.most:
            place.fail(self.key, f'{number:g}, expected a number from {-self.most:g} to '
                                 f'{self.most:g}')
        ahead = number if self.negative else -number
        return Judgement(0.5 * (1.0 + (ahead > 0) - (ahead < 0)), abs(number))

    def __str__(self) -> str:
        first, second = ('the second', 'the first') if self.negative else (
            'the first', 'the second')
        return f'`{self.key}`: below 0 {first}, above {second}, 0 a tie; its size the strength'


class Chance(NamedTuple):
    """A number from `first` to `second`, the nearer the likelier that that one is preferred."""

    key: str
    first: float
    second: float
    tie: float | None = None

    def judge(self, place: Place) -> Judgement:
        if place.get(self.key) is None:
            return Judgement(None)
        if (number := place.number(self.key)) == self.tie:
            return Judgement(0.5)
        share = (self.second - number) / (self.second - self.first)
        if not 0.0 <= share <= 1.0:
            place.fail(self.key, f'{number:g}, expected a number from {self.first:g} to '
                                 f'{self.second:g}')
        return Judgement(share)

    def __str__(self) -> str:
        tie = '' if self.tie is None else f'; {self.tie:g} a tie'
        return (f'`{self.key}`: {self.first:g} the first, {self.second:g} the second, between them '
                f'a share of both{tie}')


class Fixed(NamedTuple):
    """The first response is preferred, by where it stands."""

    key: str

    def judge(self, place: Place) -> Judgement:
        return Judgement(1.0)

    def __str__(self) -> str:
        return f'`{self.key}` is preferred'


class Flags(NamedTuple):
    """One key for each answer, of which one is 1."""

    keys: tuple[str, str, str]  # the first is preferred, the second is, a tie

    def judge(self, place: Place) -> Judgement:
        if all(place.get(key) is None for key in self.keys):
            return Judgement(None)
        flags = [place.number(key) for key in self.keys]
        if sorted(flags) != [0.0, 0.0, 1.0]:
            place.fail(self.keys[0], f'{flags} with {self.keys[1:]}, expected a single 1')
        return Judgement((1.0, 0.0, 0.5)[flags.index(1.0)])

    def __str__(self) -> str:
        first, second, tie = self.keys
        return f'the one that is 1: `{first}` the first, `{second}` the second, `{tie}` a tie'


class Ensemble(NamedTuple):
    """Scores of both sides by the same judges, the higher one preferred by each."""

    first: str
    second: str

    def judge(self, place: Place) -> Judgement:
        sides = [place.need(key, 'a list of numbers') for key in self]
        if not all(isinstance(side, list) for side in sides) or len(sides[0]) != len(sides[1]):
            place.fail(self.second, f'{shown(sides[1])}, expected as many numbers as '
                                    f'{self.first!r} has')
        differences = [place.as_number(self.first, a) - place.as_number(self.second, b)
                       for a, b in zip(*sides, strict=True)]
        if not differences:
            return Judgement(None)
        wins = sum(0.5 * (1.0 + (d > 0) - (d < 0)) for d in differences)
        return Judgement(wins / len(differences), abs(sum(differences) / len(differences)))

    def __str__(self) -> str:
        return (f'the share of judges whose `{self.first}` is higher than their `{self.second}`; '
                'the mean difference is the strength')


Verdict = Values | Sign | Chance | Fixed | Flags | Ensemble


class Panel(NamedTuple):
    """Several judges of a row: lists of objects under these keys, or one key for each judge.

    Attributes:
      keys: where they stand.
      verdict: what each says; of a list by the keys of its objects, else its own key is unused.
      name: key of a judge's name in an object; '': nothing says who they are.
      listed: whether the keys hold lists of objects.
    """

    keys: tuple[str, ...]
    verdict: Values | Sign
    name: str = ''
    listed: bool = True

    def judge(self, place: Place) -> list[Judgement]:
        found = []
        for key in self.keys:
            if not self.listed:
                found.append(self.verdict._replace(key=key).judge(place)._replace(judge=key))
                continue
            items = place.get(key) or []
            if not isinstance(items, list):
                place.fail(key, f'{shown(items)}, expected a list of objects')
            for i, item in enumerate(items):
                if not isinstance(item, Mapping):
                    place.fail(f'{key}[{i}]', f'{shown(item)}, expected an object')
                inner = Place(f"{place.where} in '{key}[{i}]'", item)
                judge = inner.get(self.name) if self.name else None
                found.append(self.verdict.judge(inner)._replace(judge=judge))
        return found

    def __str__(self) -> str:
        keys = ', '.join(f'`{key}`' for key in self.keys)
        if self.listed:
            return f'each in {keys}: {self.verdict}'
        return f'each of {keys}: {str(self.verdict).partition(": ")[2]}'


def whole_number(value: Any) -> Any:
    """A whole number as one, also as a column with gaps has it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shown(value: Any) -> str:
    """A value in an error, short."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f'{text[:37]}...'
