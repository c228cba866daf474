"""What a file of preference data says, as it is understood, and the same as rows."""

import collections
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from qrm.data import formats, translate
from qrm.data.comparisons import Comparison, DataError, MalformedRow
from qrm.data.files import is_rows, read_rows
from qrm.data.rows import as_row, parse_row
from qrm.data.sources import understood

_LETTERS = 300  # of a text that is shown
_SHOWN = 4  # responses


class _Read(NamedTuple):
    """What was read of a file.

    Attributes:
      comparisons: that could be.
      malformed: what is wrong with each row that could not.
      unjudged: rows that say nothing of their responses.
    """

    comparisons: list[Comparison]
    malformed: list[str]
    unjudged: int


def convert(data: Any, target: str = '') -> str:
    """Reads a file of preference data, says what it says, and writes it as rows.

    Args:
      data: the `data` section of a config, whose `path` is the file.
      target: a .jsonl file to write, a row for each comparison, as `rows.parse_row` reads it;
        '': none.

    Returns:
      The format and what it says where, the first comparison, and counts.

    Raises:
      DataError: the file cannot be read, its format has to be named, no row of it is understood, or
        the target is no .jsonl file or is there already.
    """
    if not is_rows(data.path):
        raise DataError(f'{data.path}: expected a file of rows')
    if target and (not target.endswith('.jsonl') or os.path.exists(target)):
        raise DataError(f'{target}: expected the name of a .jsonl file that is not there yet')
    name, rows = understood(read_rows(data.path), data)
    found = _read(rows, name, data.attributes or formats.attributes(name), check=bool(target))
    if not found.comparisons:
        raise DataError(found.malformed[0] if found.malformed else f'{data.path}: none of its '
                        f'{found.unjudged} rows says anything of its responses')
    if target:
        with open(f'{target}.tmp', 'w', encoding='utf-8') as file:
            file.writelines(json.dumps(as_row(c), ensure_ascii=False) + '\n'
                            for c in found.comparisons)
        os.replace(f'{target}.tmp', target)
    return '\n'.join([f'{data.path}: {_named(name)}', *_report(name, found),
                      *([f'{target}: written'] if target else [])])


def _read(rows: Iterable[Any], name: str, attributes: Sequence[str], *, check: bool) -> _Read:
    """The comparisons of rows that were understood; `check`: that they can be written as rows."""
    comparisons: list[Comparison] = []
    malformed: list[str] = []
    unjudged = 0
    for where, row in rows:
        try:
            if isinstance(row, MalformedRow):
                raise row
            comparison = parse_row(row, where, attributes=attributes,
                                   literal=name in formats.FORMATS)
            if check:
                _check_row(comparison, attributes)
        except translate.NotJudged:
            unjudged += 1
        except MalformedRow as error:
            malformed.append(str(error))
        else:
            comparisons.append(comparison)
    return _Read(comparisons, malformed, unjudged)


def _report(name: str, found: _Read) -> list[str]:
    """Lines of what a format says where, of the first comparison, and of counts."""
    comparisons = found.comparisons
    said = formats.describe(name) if name in formats.FORMATS else {}
    notes = collections.Counter(itertools.chain.from_iterable(c.remarks for c in comparisons))
    return [
        *(f'  {topic}: {place}' for topic, place in said.items()),
        '', *_shown(comparisons[0]), '',
        f'{len(comparisons)} comparisons of {sum(len(c.responses) for c in comparisons)} '
        f'responses, {len(found.malformed)} malformed rows, {found.unjudged} rows not judged',
        *(f'  first malformed: {one}' for one in found.malformed[:1]),
        *(f'  {count}: {what}' for what, count in _counts(comparisons).items() if count),
        *(f'  note {count}: {note}' for note, count in notes.items())]


def _check_row(comparison: Comparison, attributes: Sequence[str]) -> None:
    """Checks that what would be written is read as the same.

    Raises:
      MalformedRow: as where responses seem to repeat the prompt.
    """
    row = json.loads(json.dumps(as_row(comparison)))
    if parse_row(row, comparison.where, attributes=attributes) != comparison:
        raise MalformedRow(f'{comparison.place}: would be read as another comparison once it is '
                           'written, as if responses repeated the prompt')


def _named(name: str) -> str:
    if name in formats.FORMATS:
        return f'read as of the format {name!r}'
    return 'read by data.columns' if name == 'columns' else 'rows as they are read here'


def _counts(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """What is said of how many comparisons."""
    judged = [c.preference_matrix() for c in comparisons]
    return {
        'with a preferred response': sum(bool((p > 0.5).any()) for p in judged),
        'with a tie': sum(bool(((p == 0.5) & (p.T == 0.5)).any()) for p in judged),
        'with a soft label': sum(c.preference is not None for c in comparisons),
        'with a rating': sum(c.ratings is not None or bool(c.attributes) for c in comparisons),
        'with an annotator': sum(c.annotator is not None for c in comparisons),
        'annotators': len({c.annotator for c in comparisons} - {None}),
        'opening questions': len({c.group for c in comparisons}),
    }


def _shown(comparison: Comparison) -> list[str]:
    """A comparison, a line for each thing that it says."""
    c, row = comparison, as_row(comparison)
    said = {key: value for key, value in row.items()
            if key not in ('prompt', 'responses', 'id', 'tools')}
    texts = {'prompt': c.prompt} | {
        f'response {i}': text for i, text in enumerate(c.responses[:_SHOWN])}
    left = len(c.responses) - _SHOWN
    return [f'the first comparison ({c.place}):',
            *(f'  {key}: {_short(text)}' for key, text in texts.items()),
            *([f'  and {left} responses more'] if left > 0 else []),
            *(f'  {key}: {_short(json.dumps(value, ensure_ascii=False))}'
              for key, value in said.items())]


def _short(text: Any) -> str:
    """A text or a chat, on a line, and not all of a long one."""
    if not isinstance(text, str):
        text = ' '.join(f'[{m["role"]}] {m["content"]}' for m in text)
    line = ' '.join(text.split())
    return line if len(line) <= _LETTERS else f'{line[:_LETTERS]}…'
