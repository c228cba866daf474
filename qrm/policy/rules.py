"""Rules that call a policy's run suspect, by the rows that it is watched by.

`suspicions` reads the rows of a run, as `monitor.measure` makes them, by `Rules`; of those that
last, `reasons_to_stop` says which should end it. Both are pure functions, and no run is needed to
use them.

The errors of rows are taken for independent. The same prompts in each evaluation, as they should
be, make changes between evaluations more certain than the rules take them to be.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qrm.policy.monitor import Row

_LEAST = 3  # rows that a trend is taken over
_ROUNDING = 1e-6  # of a quantity, relative to its size; smaller changes are none
# Attribute of `Rules` -> the share in a `Row` that it is a limit of.
_SHARES = {'repetition': 'repeated', 'truncation': 'truncated', 'blanks': 'blank',
           'refusals': 'refused'}
RULES = ('over-optimisation', 'kl', 'kl growth', 'length', 'entropy', *_SHARES)


@dataclasses.dataclass(frozen=True)
class Rules:
    """When a run is suspect. A rule holds at the last row of those that it is given.

    Nothing counts as a change that is not `errors` standard errors beyond what the rule allows. A
    trend is the least-squares line over the last `window` rows, at least 3 of them.

    'over-optimisation': the proxy reward rises, and the gold reward or the win probability falls.
    'kl': the KL is above `kl_most`.
    'kl growth': the KL rises by more than `kl_growth` over the window.
    'length': responses are `length_factor` times as long as at the first row, or as short.
    'entropy': the entropy is below `entropy_share` of that of the first row.
    'repetition', 'truncation', 'blanks', 'refusals': the share is above that of the first row by
      more than the attribute of this name.

    Attributes:
      window: rows, of trends.
      errors: standard errors.
      kl_most: nats a response.
      kl_growth: nats a response.
      length_factor: above 1.
      entropy_share: in [0, 1).
      repetition, truncation, blanks, refusals: in [0, 1]; 1: never.
      stop: names of the rules that end a run; none: it goes on, and says what is suspect.
      patience: rows in a row at which a rule has to hold to end it.

    Raises:
      ValueError: a number out of range, or a name that is no rule.
    """

    window: int = 8
    errors: float = 3.0
    kl_most: float = 50.0
    kl_growth: float = 25.0
    length_factor: float = 2.0
    entropy_share: float = 0.25
    repetition: float = 0.2
    truncation: float = 0.2
    blanks: float = 0.05
    refusals: float = 0.3
    stop: tuple[str, ...] = ()
    patience: int = 2

    def __post_init__(self):
        checks = {
            'window': (self.window >= _LEAST, f'at least {_LEAST}'),
            'errors': (self.errors >= 0, 'at least 0'),
            'kl_most': (self.kl_most >= 0, 'at least 0'),
            'kl_growth': (self.kl_growth >= 0, 'at least 0'),
            'length_factor': (self.length_factor > 1, 'above 1'),
            'entropy_share': (0 <= self.entropy_share < 1, 'in [0, 1)'),
            **{name: (0 <= getattr(self, name) <= 1, 'in [0, 1]') for name in _SHARES},
            'stop': (set(self.stop) <= set(RULES), f'some of {RULES}'),
            'patience': (self.patience >= 1, 'at least 1'),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ValueError(f'{name}={getattr(self, name)!r}, expected {expected}')


class Suspicion(NamedTuple):
    """A rule that holds, and a line that says by which numbers."""

    rule: str
    line: str


class Trend(NamedTuple):
    """A line through the numbers of some rows.

    Attributes:
      change: of the line from the first of the rows to the last.
      error: its standard error, from those of the rows.
      first, last: steps.
    """

    change: float
    error: float
    first: int
    last: int


def suspicions(rows: Sequence[Row], rules: Rules) -> list[Suspicion]:
    """What is suspect at the last of the rows, in the order of `RULES`.

    Args:
      rows: of a run so far, the first one from before it or from its beginning.
      rules: what counts.

    Raises:
      ValueError: steps do not rise.
    """
    for before, after in itertools.pairwise(rows):
        if after.step <= before.step:
            raise ValueError(f'step {after.step} after step {before.step}, expected steps to rise')
    if not rows:
        return []
    return [Suspicion(rule, line) for rule, line in _lines(rows, rules)]


def reasons_to_stop(rows: Sequence[Row], rules: Rules) -> list[Suspicion]:
    """The suspicions that should end a run: of `rules.stop`, at the last `rules.patience` rows.

    Args:
      rows, rules: see `suspicions`.

    Returns:
      Those of the last row; none: go on.

    Raises:
      ValueError: see `suspicions`.
    """
    if len(rows) < rules.patience:
        return []
    now, *before = (suspicions(rows[:len(rows) - back], rules) for back in range(rules.patience))
    lasting = set(rules.stop).intersection(*({one.rule for one in found} for found in before))
    return [one for one in now if one.rule in lasting]


def trend(rows: Sequence[Row], name: str, window: int) -> Trend | None:
    """How a number went over the last rows.

    The least-squares line over steps, each row counting the same; the standard error takes the
    rows for independent.

    Args:
      rows: of a run.
      name: of a field of `Row` that has a standard error.
      window: rows.

    Returns:
      The trend, or None if fewer than 3 of these rows know the number.
    """
    known = [row for row in rows[-window:] if getattr(row, name) is not None]
    if len(known) < _LEAST:
        return None
    steps = np.array([row.step for row in known], np.float64)
    slopes = (steps - steps.mean()) * np.ptp(steps) / np.sum((steps - steps.mean()) ** 2)
    values, errors = (np.array([getattr(row, field) for row in known], np.float64)
                      for field in (name, f'{name}_error'))
    # From the first value on, so that what is constant has no trend, not one of rounding.
    return Trend(float(slopes @ (values - values[0])), float(np.linalg.norm(slopes * errors)),
                 known[0].step, known[-1].step)


def _lines(rows: Sequence[Row], rules: Rules) -> Iterator[tuple[str, str]]:
    """Rules that hold at the last row, and why."""
    first, last = rows[0], rows[-1]
    at, sure = f'at step {last.step}', rules.errors
    proxy = trend(rows, 'proxy', rules.window)
    for name, label in (('gold', 'gold reward'), ('win', 'win probability')):
        other = trend(rows, name, rules.window)
        if proxy and other and _rises(proxy, rows, 'proxy', sure) and _rises(
                other._replace(change=-other.change), rows, name, sure):
            yield 'over-optimisation', (
                f'from step {other.first} to {other.last} the proxy reward rose by '
                f'{_number(proxy.change, proxy.error)} while the {label} fell by '
                f'{_number(-other.change, other.error)}')
    if last.kl is not None and last.kl - sure * last.kl_error > rules.kl_most:
        yield 'kl', (f'{_number(last.kl, last.kl_error)} nats a response {at}, more than '
                     f'{rules.kl_most:g}')
    kl = trend(rows, 'kl', rules.window)
    if kl and kl.change - sure * kl.error > rules.kl_growth:
        yield 'kl growth', (f'from step {kl.first} to {kl.last} the KL rose by '
                            f'{_number(kl.change, kl.error)} nats a response, more than '
                            f'{rules.kl_growth:g}')
    for longer, shorter, word in ((last, first, 'more'), (first, last, 'less')):
        beyond = longer.length - rules.length_factor * shorter.length
        error = math.hypot(longer.length_error, rules.length_factor * shorter.length_error)
        if beyond > sure * error + _ROUNDING * longer.length:
            limit = rules.length_factor if word == 'more' else 1.0 / rules.length_factor
            yield 'length', (f'{_number(last.length, last.length_error)} tokens a response {at}, '
                             f'{word} than {limit:g} times the '
                             f'{_number(first.length, first.length_error)} at step {first.step}')
    if first.entropy is not None and last.entropy is not None:
        below = rules.entropy_share * first.entropy - last.entropy
        error = math.hypot(rules.entropy_share * first.entropy_error, last.entropy_error)
        if below > sure * error + _ROUNDING * abs(first.entropy):
            yield 'entropy', (f'{_number(last.entropy, last.entropy_error)} nats a token {at}, '
                              f'less than {rules.entropy_share:g} times the '
                              f'{_number(first.entropy, first.entropy_error)} at step '
                              f'{first.step}')
    for rule, name in _SHARES.items():
        (before, before_error), (now, now_error) = (
            (getattr(row, name), getattr(row, f'{name}_error')) for row in (first, last))
        limit = getattr(rules, rule)
        if now - before - limit > sure * math.hypot(before_error, now_error) + _ROUNDING:
            yield rule, (f'share {_number(now, now_error)} {at}, more than {limit:g} above the '
                         f'{_number(before, before_error)} at step {first.step}')


def _rises(found: Trend, rows: Sequence[Row], name: str, errors: float) -> bool:
    size = max(abs(getattr(row, name) or 0.0) for row in rows)
    return found.change > errors * found.error + _ROUNDING * size


def _number(value: float, error: float) -> str:
    """A number and its standard error in brackets."""
    return f'{value:.4g} (standard error {error:.2g})'
