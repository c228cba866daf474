"""Rows of other formats as `rows.parse_row` reads them, and how a format is recognised.

What comes out has `prompt` and `responses` with `preferred`, `preference`, `ranks` or `ratings`, so
that whatever is wrong with a text is found there. A question and an answer that are plain texts
become turns as in Anthropic's HH, which any model can read, and `data.as_chats` makes chats of.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qrm.data.comparisons import DataError, MalformedRow
from qrm.data.formats import FORMATS, Format, Items, Parts, list_at
from qrm.data.rows import ASSISTANT, HUMAN, NATIVE, holds_messages
from qrm.data.verdicts import Judgement, Place, shown

# What becomes of several judgements of the same responses, and of a stated strength.
VOTES = ('share', 'each')
STRENGTHS = ('ignored', 'margin')

FIRST_ROWS = 100  # by which a format is recognised
# Keys that mean in all formats what they mean here.
_KEPT = ('weight', 'id', 'group', 'tools', 'annotator')
# Keys that hold a part of the prompt where they hold anything.
_OF_PROMPTS = ('system', 'input', 'context', 'history')
Row = tuple[str, Any]  # where it stands, and the row


class NotJudged(MalformedRow):
    """A row that says nothing of its responses."""


def recognise(rows: Iterable[Row]) -> str:
    """The format of the first rows, by their keys and their values; 'rows' if it is none of these.

    Raises:
      DataError: it may be of several, or of one whose numbers others use otherwise, or rows differ:
        it must be named.
    """
    first = [(where, row) for where, row in itertools.islice(rows, FIRST_ROWS)
             if isinstance(row, Mapping)]
    # What is null in all of them is not there.
    empty = {key for _, row in first for key in row} - {
        key for _, row in first for key, value in row.items() if value is not None}
    found: dict[str, str] = {}
    for where, row in first:
        found.setdefault(_recognised(where, {
            key: value for key, value in row.items() if key not in empty}), where)
    if len(found) > 1:
        raise DataError(f'{" and ".join(found.values())} look like rows of different formats, '
                        f'{" and ".join(map(repr, found))}; expected config.data.format to name '
                        'one')
    return next(iter(found), 'rows')


def _recognised(where: str, row: Mapping[str, Any]) -> str:
    # A variant of a format that is one itself, 'name:variant', is never meant if it is not named.
    fitting = {name: known for name, known in FORMATS.items()
               if known.fits(row) and (name.partition(':')[0] not in FORMATS or ':' not in name)}
    if not fitting:
        return 'rows'
    # Of two that fit, the one that asks for more is meant, if it asks for all that the other does.
    found = [name for name, known in fitting.items()
             if not any(set(known.marks) < set(other.marks) for other in fitting.values())]
    asked = next((fitting[name].ask for name in found if fitting[name].ask), '')
    if len(found) > 1 or asked:
        raise DataError(f'{where}: may be of the format {" or ".join(map(repr, found))}'
                        f'{f", and {asked}" if asked else ""}; expected config.data.format to name '
                        'one')
    return found[0]


def native(name: str, given: Iterable[Row], *, votes: str, strengths: str) -> Iterator[Row]:
    """Rows of a format as `rows.parse_row` reads them.

    Args:
      name: of `FORMATS`.
      given: rows with their places; one that is a `MalformedRow` stays that.
      votes: of several judges, 'share' makes one row, with the share that prefers the first, and
        'each' a row for each.
      strengths: 'ignored', or 'margin', by how much rewards should differ at least.

    Yields:
      Rows with their places, one that cannot be read as a `MalformedRow`, one that says nothing of
      its responses as `NotJudged`.
    """
    known = FORMATS[name]
    for where, row in given:
        try:
            if isinstance(row, MalformedRow):
                raise row
            if not isinstance(row, Mapping):
                raise MalformedRow(f'{where}: got {shown(row)}, expected an object of the format '
                                   f'{name!r}')
            place = Place(where, row)
            for key in known.marks:
                if key.split('.')[0] not in row:
                    place.fail(key, f'nothing (the key is missing), expected the format {name!r}')
            found = list(_converted(known, place, votes, strengths))
            if not found:
                raise NotJudged(f'{where}: says nothing of its responses')
        except MalformedRow as error:
            yield where, error
            continue
        # Several of a row have places of their own, and names if they share one.
        alone = len(found) == 1
        named = not alone and found[0].get('id') == found[-1].get('id') is not None
        for i, one in enumerate(found):
            yield (where if alone else f'{where}#{i}',
                   one | {'id': f'{one["id"]}#{i}'} if named else one)


def parse_columns(texts: Sequence[str], attributes: Sequence[str]) -> dict[str, str]:
    """Key -> place in rows, of 'key=place'.

    Raises:
      ValueError: a text that is none, a key that means nothing, or one that stands twice.
    """
    columns: dict[str, str] = {}
    for text in texts:
        key, equals, place = (part.strip() for part in text.partition('='))
        if not (key and equals and place):
            raise ValueError(f"{text!r}, expected 'key=place'")
        if key not in NATIVE and key not in attributes:
            raise ValueError(f'{text!r}: nothing reads {key!r}, expected one of {sorted(NATIVE)} '
                             'or of data.attributes')
        if key in columns:
            raise ValueError(f'{text!r}: {key!r} stands twice')
        columns[key] = place
    return columns


def mapped(columns: Mapping[str, str], given: Iterable[Row]) -> Iterator[Row]:
    """Rows whose keys are called otherwise, as `rows.parse_row` reads them.

    Args:
      columns: a key of `rows.NATIVE`, or the name of an attribute -> place in the rows.
      given: rows with their places.
    """
    for where, row in given:
        if not isinstance(row, Mapping):
            yield where, row
            continue
        place = Place(where, row)
        found = {key: value for key, name in columns.items()
                 if (value := place.get(name)) is not None}
        rest = {f'{key} (of the rows)' if key in columns else key: value
                for key, value in row.items() if key not in place.read}
        yield where, rest | found


def _converted(known: Format, whole: Place, votes: str,
               strengths: str) -> Iterator[dict[str, Any]]:
    """What a row of a format says, as rows that `rows.parse_row` reads."""
    for row in known.each(whole, votes) if known.each else (whole.row,):
        place = Place(whole.where, row)
        base = _in_turns(known, place, _texts(known, place))
        for key in _KEPT:
            # Where a row says it otherwise, its own key means something else.
            if (value := place.get(getattr(known, key, '') or key)) is not None:
                base[key] = value
        judgements = _judgements(known, place, votes)
        base = _unread(place) | base
        yield from (base | said(strengths) for said in judgements)


def _texts(known: Format, place: Place) -> dict[str, Any]:
    """Prompt and responses of a row."""
    texts = {}
    if isinstance(known.prompt, Parts):
        texts['prompt'] = _joined(known.prompt, place)
    elif known.prompt:
        texts['prompt'] = place.need(known.prompt, 'a prompt')
    if isinstance(known.responses, Items):
        places, responses = zip(*_items(known.responses, place), strict=True)
    else:
        places = known.responses
        responses = [place.need(key, 'a response') for key in places]
    if not known.prompt:  # whole chats or dialogues: what they share is the prompt
        shared = _shared(place, places, responses)
        texts['prompt'], responses = responses[0][:shared], [r[shared:] for r in responses]
    for key in _OF_PROMPTS:
        if place.row.get(key) and key not in place.read:
            place.fail(key, 'what may be a part of the prompt, expected no such key in this format')
    for key, text in (('prompt', texts['prompt']), *zip(places, responses, strict=True)):
        if isinstance(text, str) and holds_messages(text):
            place.fail(key, 'text that is a list of chat messages, expected the list itself')
    return texts | {'responses': list(responses)}


def _in_turns(known: Format, place: Place, texts: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt and responses that are plain texts, as turns if they are, a blank between them."""
    prompt, responses = texts['prompt'], texts['responses']
    if not isinstance(prompt, str) or not all(isinstance(r, str) for r in responses):
        return dict(texts)
    responses = [r if r[:1].isspace() or not r else f' {r}' for r in responses]
    if not known.turns:
        return {'prompt': prompt, 'responses': responses}
    if prompt.startswith(HUMAN):  # in turns already, maybe with the blank that a response has
        prompt = prompt.rstrip()
        if not prompt.endswith(ASSISTANT):
            place.fail('prompt', f'turns that do not end in {ASSISTANT!r}, expected such')
    elif HUMAN in prompt or ASSISTANT in prompt:
        place.fail('prompt', f'a text with {HUMAN!r} or {ASSISTANT!r} in it, expected turns that '
                             'begin with the first, or none')
    else:
        if known.said_by:
            user, assistant = known.said_by
            prompt = re.sub(rf'\s*{re.escape(assistant)}', f'{ASSISTANT} ', prompt)
            prompt = re.sub(rf'\s*{re.escape(user)}', f'{HUMAN} ', prompt)
        prompt = f'{HUMAN} {prompt}{ASSISTANT}'
    if any(mark in response for mark in (HUMAN, ASSISTANT) for response in responses):
        place.fail('responses', f'a text with {HUMAN!r} or {ASSISTANT!r} in it, expected one turn')
    return {'prompt': prompt, 'responses': responses}


def _shared(place: Place, keys: Sequence[str], responses: Sequence[Any]) -> int:
    """How many messages, or letters up to the assistant's last common turn, all have in common."""
    if all(isinstance(r, str) for r in responses):
        found = responses[0].rfind(ASSISTANT, 0, len(_common(responses)))
        if found < 0:
            place.fail(keys[-1], f'another prompt than in {keys[0]!r}, expected dialogues that '
                                 'begin alike')
        return found + len(ASSISTANT)
    for key, response in zip(keys, responses, strict=True):
        if not isinstance(response, list) or len(response) < 2:
            place.fail(key, f'{shown(response)}, expected a list of at least two messages')
    count = min(len(_common(responses)), *(len(r) - 1 for r in responses))
    if not count:
        place.fail(keys[-1], f'another prompt than in {keys[0]!r}, expected chats that begin alike')
    return count


def _common(sequences: Sequence[Any]) -> list[Any]:
    return [first for first, *_ in itertools.takewhile(
        lambda items: all(item == items[0] for item in items), zip(*sequences, strict=False))]


def _joined(parts: Parts, place: Place) -> str:
    """Parts of a prompt, each after its title."""
    found = []
    for title, key in parts.places:
        value = place.get(key) if key else ''
        if value is None or (key and value == ''):
            continue
        if not isinstance(value, str):
            place.fail(key, f'{shown(value)}, expected text')
        found.append(title + value)
    return parts.joint.join(found)


def _items(items: Items, place: Place) -> list[tuple[str, Any]]:
    """Responses in lists, with the place of each."""
    found = []
    for key in items.lists:
        for i, item in enumerate(list_at(place, key)):
            if items.text and not (isinstance(item, Mapping) and items.text in item):
                place.fail(f'{key}[{i}]', f'{shown(item)}, expected an object with {items.text!r}')
            found.append((f'{key}[{i}]', item[items.text] if items.text else item))
    return found


# What a judgement says in keys of `rows.parse_row`, given what becomes of strengths.
Said = Callable[[str], dict[str, Any]]


def _judgements(known: Format, place: Place, votes: str) -> list[Said]:
    """What is said of the responses, by as many comparisons as it takes; [] if nothing is."""
    graded = _graded(known, place)
    if known.panel is None and known.verdict is None:
        return [lambda _: graded] if graded else []
    each = known.panel.judge(place) if known.panel else [known.verdict.judge(place)]
    if known.strength and (strength := place.get(known.strength)) is not None:
        each = [one._replace(strength=place.as_number(known.strength, strength)) for one in each]
    each = [one for one in each if one.first is not None]
    if each and known.panel and votes == 'share':
        leads = [(2.0 * one.first - 1.0) * one.strength for one in each if one.strength is not None]
        each = [Judgement(sum(one.first for one in each) / len(each),
                          abs(sum(leads) / len(each)) if leads else None)]
    return [lambda strengths, one=one: graded | _said(one, strengths) for one in each]


def _graded(known: Format, place: Place) -> dict[str, Any]:
    """Ratings and ranks of the responses; {} if there are none."""
    said: dict[str, list[float | None]] = {}
    if not isinstance(known.responses, Items):
        said['ratings'] = [_rating(place, key, place.get(key)) for key in known.ratings]
        said |= {name: [_rating(place, key, place.get(key))]
                 for name, key in known.attributes.items()}
        return _some(said)
    items, found = known.responses, [
        (f'{key}[{i}]', item) for key in known.responses.lists
        for i, item in enumerate(list_at(place, key))]
    if items.ranked:
        return {'preferred': 0}
    keys = {'ratings': items.rating, 'ranks': items.rank, **items.attributes}
    for name, key in keys.items():
        said[name] = [_rating(place, f'{at}.{key}', Place('', item).get(key))
                      for at, item in found] if key else []
    if items.rank and None in said['ranks']:
        place.fail(items.lists[0], f'items without {items.rank!r}, expected one in each')
    return _some(said)


def _some(said: Mapping[str, list[float | None]]) -> dict[str, Any]:
    """Those that say anything."""
    return {name: values for name, values in said.items()
            if any(value is not None for value in values)}


def _rating(place: Place, key: str, value: Any) -> float | None:
    """A number, its text, or whether a response is good; None where it is not rated."""
    if value is None or value == 'N/A':
        return None
    return float(value) if isinstance(value, bool) else place.as_number(key, value)


def _said(one: Judgement, strengths: str) -> dict[str, Any]:
    """A judgement in keys of `rows.parse_row`."""
    said: dict[str, Any] = {}
    if one.first == 0.5:
        said['ranks'] = [0, 0]
    elif one.first in (0.0, 1.0):
        said['preferred'] = int(1.0 - one.first)
    else:
        said['preference'] = one.first
    if one.judge is not None:
        said['annotator'] = one.judge
    if strengths == 'margin' and one.strength is not None:
        said['margin'] = one.strength
    return said


def _unread(place: Place) -> dict[str, Any]:
    """What stands in a row and was not read, under keys that mean nothing to `rows.parse_row`.

    It is there to be counted.
    """
    return {f'{key} (of the format)' if key in NATIVE else key: value
            for key, value in place.row.items() if key not in place.read}
