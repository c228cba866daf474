"""Formats of preference data: how the data sets of the field say what people prefer.

A format is a table: where texts stand in a row, and where and by which values it says what is
preferred. Rows of all formats become rows as `rows.parse_row` reads them, `prompt` and `responses`
with `preferred`, `preference`, `ranks` or `ratings`, so that whatever is wrong with a text is found
there. A question and an answer that are plain texts become turns as in Anthropic's HH, which any
model can read, and `data.as_chats` makes chats of. Places are keys, those of objects within objects
joined by dots: 'info.post'.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qrm.data.comparisons import DataError, MalformedRow, in_a_line
from qrm.data.rows import ASSISTANT, HUMAN, NATIVE, holds_messages

# What becomes of several judgements of the same responses, and of a stated strength.
VOTES = ('share', 'each')
STRENGTHS = ('ignored', 'margin')

_TIE = 'tie'
_NOTHING = 'nothing'  # is said, as of a row that was not judged
FIRST_ROWS = 100  # by which a format is recognised
Row = tuple[str, Any]  # where it stands, and the row


class NotJudged(MalformedRow):
    """A row that says nothing of its responses."""


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
            self.fail(key, f'{_shown(value)}, expected a number')
        return found

    def fail(self, key: str, problem: str):
        raise MalformedRow(f"{self.where} field '{key}': got {problem}")


# ---------------------------------------------------------------------------------------------
# Where a row says which of two responses is preferred. Each says in words what it reads.


class Values(NamedTuple):
    """A value that names the preferred response: 0, 1, `_TIE` or `_NOTHING`."""

    key: str
    meaning: Mapping[Any, int | str]

    def judge(self, place: Place) -> Judgement:
        if (value := place.get(self.key)) is None:
            return Judgement(None)
        value = _whole(value)
        known = {(type(given), given): meaning for given, meaning in self.meaning.items()}
        try:
            found = known.get((type(value), value))
        except TypeError:
            found = None
        if found is None:
            place.fail(self.key, f'{_shown(value)}, expected one of {list(self.meaning)}')
        return Judgement({0: 1.0, 1: 0.0, _TIE: 0.5, _NOTHING: None}[found])

    def __str__(self) -> str:
        words = {0: 'the first', 1: 'the second', _TIE: 'a tie', _NOTHING: 'not judged'}
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
            place.fail(self.second, f'{_shown(sides[1])}, expected as many numbers as '
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
                place.fail(key, f'{_shown(items)}, expected a list of objects')
            for i, item in enumerate(items):
                if not isinstance(item, Mapping):
                    place.fail(f'{key}[{i}]', f'{_shown(item)}, expected an object')
                inner = Place(f"{place.where} in '{key}[{i}]'", item)
                judge = inner.get(self.name) if self.name else None
                found.append(self.verdict.judge(inner)._replace(judge=judge))
        return found

    def __str__(self) -> str:
        keys = ', '.join(f'`{key}`' for key in self.keys)
        if self.listed:
            return f'each in {keys}: {self.verdict}'
        return f'each of {keys}: {str(self.verdict).partition(": ")[2]}'


# ---------------------------------------------------------------------------------------------
# Formats


class Parts(NamedTuple):
    """A prompt of several parts; those that a row does not have are left out.

    Attributes:
      places: title and place of each; '': a title alone.
      joint: between them.
    """

    places: tuple[tuple[str, str], ...]
    joint: str


class Items(NamedTuple):
    """Responses in a list of objects, or in lists of texts.

    Attributes:
      lists: keys of the lists.
      text: key of a text in an object; '': the items are texts.
      rating: key of a number in an object, higher is better; '': none.
      rank: key of a place, 1 best; '': none.
      attributes: name of an attribute -> key of a number in an object.
      ranked: whether each of the first list is preferred to all of the second; nothing is said
        of those of one list, so each of the first is in a comparison of its own.
    """

    lists: tuple[str, ...]
    text: str = ''
    rating: str = ''
    rank: str = ''
    attributes: Mapping[str, str] = {}
    ranked: bool = False


@dataclasses.dataclass(frozen=True)
class Format:
    """How rows say what `rows.parse_row` reads.

    Attributes:
      home: where such rows are published.
      responses: places of responses, or a list of them.
      prompt: place of the prompt, or its parts; '': it is what the responses, which are whole
        chats, have in common.
      verdict: which of two responses is preferred; None: ratings or ranks say it.
      panel: what each of several judges says, in place of the verdict.
      marks: places that a row must have beside, to be taken for one of this format.
      ratings: places of a rating of each response, a number or whether it is good.
      attributes: names of attributes -> places, of a single response.
      annotator, group, id: places of names.
      strength: place of a strength of what is preferred, negative where it is doubted; '': as
        the verdict says.
      unless: keys that a row of this format does not have.
      turns: whether a prompt and a response are what two say to each other; else the response
        completes the prompt.
      said_by: what the user's and the assistant's turns begin with in a prompt of several.
      each: what turns a row into rows before it is read, as of texts that are JSON.
      ask: why it must be named; '': rows that look like it are taken for it.
    """

    home: str
    responses: tuple[str, ...] | Items
    prompt: str | Parts = 'prompt'
    verdict: Verdict | None = None
    panel: Panel | None = None
    marks: tuple[str, ...] = ()
    ratings: tuple[str, ...] = ()
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    annotator: str = ''
    group: str = ''
    id: str = ''
    strength: str = ''
    unless: tuple[str, ...] = ()
    turns: bool = True
    said_by: tuple[str, str] | None = None
    each: Callable[[Place, str], Iterable[Mapping[str, Any]]] | None = None
    ask: str = ''

    def fits(self, row: Any) -> bool:
        """Whether a row has what this format needs; null is no value, but a key."""
        if not isinstance(row, Mapping) or any(key in row for key in self.unless):
            return False
        if not all(_has(row, key) for key in self.marks):
            return False
        own = {key.split('.')[0] for key in self.marks}
        if any(all(row.get(key) is not None for key in keys) and not own.issuperset(keys)
               for keys in _COMPLETE):
            return False
        place = Place('', row)
        if isinstance(self.responses, Items) and (self.responses.ranked or not self.each):
            kind = Mapping if self.responses.text else str
            return all(items is None or (isinstance(items, list) and all(
                isinstance(item, kind) for item in items))
                for items in map(place.get, self.responses.lists))
        if not self.prompt and not self.each:
            return all(chat is None or (isinstance(chat, list) and len(chat) > 1)
                       for chat in map(place.get, self.responses))
        return True


# Keys by which a row is one of this project: another format must read them itself.
_COMPLETE = (('chosen', 'rejected'), ('responses',), ('response',))
# Keys that mean in all formats what they mean here.
_KEPT = ('weight', 'id', 'group', 'tools', 'annotator')
# Keys that hold a part of the prompt where they hold anything.
_OF_PROMPTS = ('system', 'input', 'context', 'history')


def _has(row: Mapping[str, Any], place: str) -> bool:
    """Whether a row has a key, be it null; of a place within an object, a value."""
    first, _, rest = place.partition('.')
    if not rest:
        return first in row
    return Place('', row).get(place) is not None


_AB = {'model_a': 0, 'model_b': 1}
_TIES = {'tie': _TIE, 'tie (bothbad)': _TIE, 'both_bad': _TIE}
_UNSURE = {'tie': _TIE, 'tie (inconsistent)': _NOTHING}
_LEANS = {'A-is-clearly-better': 0, 'A-is-slightly-better': 0, 'Tie': _TIE,
          'B-is-slightly-better': 1, 'B-is-clearly-better': 1}
_NUMBERS = 'the numbers of this format mean something else in others'
_HELPFULNESS = ('helpfulness', 'correctness', 'coherence', 'complexity', 'verbosity')
_REDDIT = Parts((('SUBREDDIT: r/', 'info.subreddit'), ('TITLE: ', 'info.title'),
                 ('POST: ', 'info.post'), ('ARTICLE: ', 'info.article'), ('TL;DR:', '')), '\n\n')
_TASK = Parts((('', 'instruction'), ('', 'input')), '\n')
_EXTRA_ID = ('<extra_id_1>User\n', '<extra_id_1>Assistant\n')
_ASPECTS = {name: f'annotations.{name}.Rating' for name in (
    'helpfulness', 'honesty', 'instruction_following', 'truthfulness')}


# What turns a row into others before it is read.


def _annotators(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Attributes that are lists, a number of each annotator: their mean, or a row of each."""
    if not any(isinstance(place.row.get(name), list) for name in _HELPFULNESS):
        yield place.row
        return
    each = {}
    for name in _HELPFULNESS:
        values = place.need(name, 'a list of numbers')
        if not isinstance(values, list) or not values or len(values) != len(
                next(iter(each.values()), values)):
            place.fail(name, f'{_shown(values)}, expected as many numbers as '
                             f'{_HELPFULNESS[0]!r} has')
        each[name] = [place.as_number(name, value) for value in values]
    if votes == 'share':
        each = {name: [sum(values) / len(values)] for name, values in each.items()}
    for numbers in zip(*each.values(), strict=True):
        yield {**place.row, **dict(zip(each, numbers, strict=True))}


def _alternating(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Turns in a list, the first of them the human's, as the dialogues of Anthropic's HH."""
    marks, dialogues = (HUMAN, ASSISTANT), {}
    for key in ('chosen', 'rejected'):
        turns = place.need(key, 'a list of turns')
        if (not isinstance(turns, list) or len(turns) % 2
                or not all(isinstance(turn, str) for turn in turns)):
            place.fail(key, f'{_shown(turns)}, expected turns of text that end with a response')
        dialogues[key] = ''.join(f'{marks[i % 2]} {turn}' for i, turn in enumerate(turns))
    yield {**place.row, **dialogues}


def _one_chosen(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """A list of good responses, each with all of the others."""
    for chosen in _list(place, 'chosen'):
        yield {**place.row, 'chosen': [chosen]}


def _last(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Messages, of which the last is the response."""
    messages = place.need('messages', 'a list of messages')
    if not isinstance(messages, list) or len(messages) < 2:
        place.fail('messages', f'{_shown(messages)}, expected a prompt and a response')
    yield {**place.row, 'prompt': messages[:-1], 'messages': messages[-1:]}


def _parsed_lists(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Turns whose texts are JSON lists in a text, an exchange each, as chats."""
    turns = {}
    for key in ('prompt', 'response_a', 'response_b'):
        text = place.need(key, 'a list as JSON')
        try:
            turns[key] = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            place.fail(key, f'no JSON ({in_a_line(error)}), expected a list of texts')
        if not isinstance(turns[key], list):
            place.fail(key, f'{_shown(turns[key])}, expected a list of texts')
        if None in turns[key]:
            place.fail(key, 'null in place of a turn, expected texts')
    if len({len(each) for each in turns.values()}) != 1:
        place.fail('prompt', f'{len(turns["prompt"])} turns, expected as many as responses')
    chats = {key: [message for asked, said in zip(turns['prompt'], turns[key], strict=True)
                   for message in ({'role': 'user', 'content': asked},
                                   {'role': 'assistant', 'content': said})]
             for key in ('response_a', 'response_b')}
    yield {**place.row, **chats, 'prompt': None}


def _conversations(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Chats that may be JSON in a text, and whose messages have more than is said in them."""
    chats = {}
    for key in ('conversation_a', 'conversation_b'):
        chat = place.need(key, 'a list of messages')
        if isinstance(chat, str):
            try:
                chat = json.loads(chat)
            except (ValueError, RecursionError):
                place.fail(key, f'{_shown(chat)}, expected a list of messages')
        if not isinstance(chat, list) or not all(isinstance(m, Mapping) for m in chat):
            place.fail(key, f'{_shown(chat)}, expected a list of messages')
        chats[key] = [{name: message.get(name) for name in ('role', 'content')}
                      for message in chat]
    yield {**place.row, **chats}


def _turns(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Judgements of the first exchange of a conversation leave out the second."""
    place.read.add('turn')
    turn = _whole(place.row.get('turn'))
    if turn not in (1, 2) or isinstance(turn, bool):
        place.fail('turn', f'{_shown(turn)}, expected 1 or 2')
    for row in _conversations(place, votes):
        yield {**row, **{key: row[key][:2 * turn] for key in ('conversation_a', 'conversation_b')}}


def _siblings(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Every set of ranked answers in a tree of messages, after the messages before it."""

    def walk(node: Any, before: tuple[Any, ...]) -> Iterator[Mapping[str, Any]]:
        if not isinstance(node, Mapping) or not isinstance(node.get('text'), str):
            place.fail('prompt', f"{_shown(node)}, expected messages with 'text'")
        roles = {'prompter': 'user', 'assistant': 'assistant'}
        if node.get('role') not in list(roles):
            place.fail('prompt', f"role {node.get('role')!r}, expected prompter or assistant")
        role = roles[node['role']]
        chat = (*before, {'role': role, 'content': node['text']})
        replies = node.get('replies') or []
        if not isinstance(replies, list):
            place.fail('prompt', f'{_shown(replies)}, expected a list of replies')
        ranked = [reply for reply in replies if isinstance(reply, Mapping)
                  and reply.get('rank') is not None and not reply.get('deleted')]
        if role == 'user' and len(ranked) > 1:
            yield {'id': node.get('message_id'), 'prompt': list(chat), 'answers': ranked,
                   'group': place.row.get('message_tree_id')}
        for reply in replies:
            # What was taken out may have no text, and nothing that follows it a whole prompt.
            if not (isinstance(reply, Mapping) and reply.get('deleted')
                    and reply.get('text') is None):
                yield from walk(reply, chat)

    place.read |= {'prompt', 'message_tree_id'}
    yield from walk(place.need('prompt', 'the first message of a tree'), ())


FORMATS: dict[str, Format] = {
    'alpaca-eval': Format(
        'tatsu-lab/alpaca_eval, annotations', ('output_1', 'output_2'), _TASK,
        Chance('preference', 1.0, 2.0, 0.0), annotator='annotator',
        marks=('instruction', 'output_1', 'output_2', 'preference'), ask=_NUMBERS),
    'arena-55k': Format(
        'lmsys/lmsys-arena-human-preference-55k', ('response_a', 'response_b'), '',
        Flags(('winner_model_a', 'winner_model_b', 'winner_tie')), id='id', each=_parsed_lists,
        marks=('response_a', 'response_b', 'winner_model_a', 'winner_model_b', 'winner_tie')),
    'arena': Format(
        'lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference-100k and -140k',
        ('conversation_a', 'conversation_b'), '', Values('winner', _AB | _TIES), annotator='judge',
        each=_conversations, marks=('conversation_a', 'conversation_b', 'winner', 'language')),
    'helpsteer': Format(
        'nvidia/HelpSteer, nvidia/HelpSteer2 and its disagreements/', ('response',),
        attributes={name: name for name in _HELPFULNESS}, each=_annotators, said_by=_EXTRA_ID,
        marks=('prompt', 'response', *_HELPFULNESS), unless=('rating',)),
    'helpsteer2-preference': Format(
        'nvidia/HelpSteer2, preference/, the three judgements that agree most',
        ('response_1', 'response_2'), said_by=_EXTRA_ID,
        panel=Panel(('three_most_similar_preferences',), Sign('strength', 0, 3.0)),
        marks=('prompt', 'response_1', 'response_2', 'three_most_similar_preferences')),
    'helpsteer2-preference:all': Format(
        'nvidia/HelpSteer2, preference/, all judgements', ('response_1', 'response_2'),
        panel=Panel(('all_preferences_unprocessed',), Sign('strength', 0, 3.0, (-100.0,))),
        marks=('prompt', 'response_1', 'response_2', 'all_preferences_unprocessed'),
        said_by=_EXTRA_ID),
    'helpsteer2-preference:overall': Format(
        'nvidia/HelpSteer2, preference/', ('response_1', 'response_2'), said_by=_EXTRA_ID,
        verdict=Sign('preference_strength', 0, 3.0),
        marks=('prompt', 'response_1', 'response_2', 'preference_strength')),
    'helpsteer3': Format(
        'nvidia/HelpSteer3', ('response1', 'response2'), 'context',
        panel=Panel(('individual_preference',), Sign('score', 0, 3.0)),
        marks=('context', 'response1', 'response2', 'individual_preference')),
    'hh-strength': Format(
        'fnlp/hh-rlhf-strength-cleaned', ('chosen', 'rejected'), '', Fixed('chosen'),
        strength='mean preference difference', each=_alternating,
        marks=('chosen', 'rejected', 'chosen score list', 'rejected score list')),
    'hh-strength:models': Format(
        'fnlp/hh-rlhf-strength-cleaned, by its ten reward models', ('chosen', 'rejected'), '',
        Ensemble('chosen score list', 'rejected score list'), each=_alternating,
        marks=('chosen', 'rejected', 'chosen score list', 'rejected score list')),
    'judgebench': Format(
        'ScalerLab/JudgeBench', ('response_A', 'response_B'), 'question',
        Values('label', {'A>B': 0, 'B>A': 1}), id='pair_id',
        marks=('question', 'response_A', 'response_B', 'label')),
    'kto': Format(
        'KTO labels, as of TRL', ('completion',), ratings=('label',),
        marks=('prompt', 'completion', 'label')),
    'kto-chats': Format(
        'KTO labels, as of LLaMA-Factory', ('messages',), 'prompt', ratings=('label',), each=_last,
        marks=('messages', 'label')),
    'llmbar': Format(
        'princeton-nlp/LLMBar', ('output_1', 'output_2'), 'input',
        Values('label', {1: 0, 2: 1}), marks=('input', 'output_1', 'output_2', 'label'),
        ask=_NUMBERS),
    'mt-bench': Format(
        'lmsys/mt_bench_human_judgments', ('conversation_a', 'conversation_b'), '',
        Values('winner', _AB | _UNSURE), annotator='judge', group='question_id', each=_turns,
        marks=('conversation_a', 'conversation_b', 'winner', 'judge', 'turn'),
        unless=('language',)),
    'multipref': Format(
        'allenai/multipref', ('completion_a', 'completion_b'), 'text',
        panel=Panel(('normal_worker_annotations', 'expert_worker_annotations'),
                    Values('overall_pref', _LEANS), 'evaluator'),
        id='comparison_id', group='prompt_id',
        marks=('text', 'completion_a', 'completion_b', 'normal_worker_annotations')),
    'nectar': Format(
        'berkeley-nest/Nectar', Items(('answers',), 'answer', rank='rank'),
        marks=('prompt', 'answers')),
    'oasst': Format(
        'OpenAssistant/oasst1, trees', Items(('answers',), 'text', rank='rank'), each=_siblings,
        group='group', id='id', marks=('message_tree_id', 'prompt')),
    'pandalm': Format(
        "PandaLM's test set", ('response1', 'response2'), _TASK,
        panel=Panel(('annotator1', 'annotator2', 'annotator3'),
                    Values('annotator', {1: 0, 2: 1, 0: _TIE}), listed=False),
        id='idx', marks=('instruction', 'response1', 'response2', 'annotator1')),
    'pku-saferlhf:better': Format(
        'PKU-Alignment/PKU-SafeRLHF', ('response_0', 'response_1'),
        verdict=Values('better_response_id', {0: 0, 1: 1}),
        marks=('prompt', 'response_0', 'response_1', 'better_response_id'),
        ask='it has two preferences, for the better and for the safer response'),
    'pku-saferlhf:safer': Format(
        'PKU-Alignment/PKU-SafeRLHF', ('response_0', 'response_1'),
        verdict=Values('safer_response_id', {0: 0, 1: 1}),
        marks=('prompt', 'response_0', 'response_1', 'safer_response_id'),
        ask='it has two preferences, for the better and for the safer response'),
    'ppe-preference': Format(
        'lmarena-ai/PPE-Human-Preference-V1', ('response_1', 'response_2'),
        verdict=Values('winner', _AB | _TIES), id='question_id',
        marks=('prompt', 'response_1', 'response_2', 'winner')),
    'reward-bench-2': Format(
        'allenai/reward-bench-2, THU-KEG/RM-Bench', Items(('chosen', 'rejected'), ranked=True),
        id='id', each=_one_chosen, marks=('prompt', 'chosen', 'rejected')),
    'shp': Format(
        'stanfordnlp/SHP', ('human_ref_A', 'human_ref_B'), 'history',
        Values('labels', {1: 0, 0: 1}), strength='score_ratio', group='post_id',
        marks=('history', 'human_ref_A', 'human_ref_B', 'labels')),
    'summarize-axis': Format(
        'openai/summarize_from_feedback, axis', ('summary.text',),
        _REDDIT, ratings=('summary.axes.overall',), annotator='worker', group='info.id',
        attributes={name: f'summary.axes.{name}' for name in (
            'accuracy', 'coverage', 'coherence')},
        turns=False, marks=('info', 'summary.text', 'summary.axes')),
    'summarize-comparisons': Format(
        'openai/summarize_from_feedback, comparisons', Items(('summaries',), 'text'),
        _REDDIT, Values('choice', {0: 0, 1: 1}), annotator='worker', group='info.id',
        turns=False, marks=('info', 'summaries', 'choice')),
    'ultrafeedback-binarized': Format(
        'HuggingFaceH4/ultrafeedback_binarized', ('chosen', 'rejected'), '',
        ratings=('score_chosen', 'score_rejected'), id='prompt_id',
        marks=('chosen', 'rejected', 'score_chosen', 'score_rejected')),
    'ultrafeedback:fine-grained': Format(
        'openbmb/UltraFeedback, the mean of four aspects',
        Items(('completions',), 'response', rating='fine-grained_score', attributes=_ASPECTS),
        'instruction', marks=('instruction', 'completions'),
        ask='its overall scores were wrong in early revisions, and contradict the others'),
    'ultrafeedback:overall': Format(
        'openbmb/UltraFeedback, the overall score',
        Items(('completions',), 'response', rating='overall_score', attributes=_ASPECTS),
        'instruction', marks=('instruction', 'completions'),
        ask='its overall scores were wrong in early revisions, and contradict the others'),
    'webgpt': Format(
        'openai/webgpt_comparisons', ('answer_0', 'answer_1'), 'question.full_text',
        Sign('score_0', 1), group='question.id',
        marks=('question', 'answer_0', 'answer_1', 'score_0', 'score_1')),
}


# ---------------------------------------------------------------------------------------------
# Reading


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


def attributes(name: str) -> tuple[str, ...]:
    """Names of attributes that rows of a format rate; () of what is none."""
    known = FORMATS.get(name)
    if known is None:
        return ()
    items = known.responses
    return tuple(items.attributes if isinstance(items, Items) else known.attributes)


def describe(name: str) -> dict[str, str]:
    """What a format says and where, in words: topic -> place."""
    known = FORMATS[name]
    prompt, responses = known.prompt, known.responses
    said = {
        'home': known.home,
        'prompt': (f'`{prompt}`' if isinstance(prompt, str) and prompt else
                   ', '.join(f'`{key}`' for _, key in prompt.places if key) if prompt else
                   'what the responses have in common'),
        'responses': ', '.join(f'`{key}`' for key in (
            responses.lists if isinstance(responses, Items) else responses)),
        'preference': str(known.panel or known.verdict or ''),
    }
    if isinstance(responses, Items):
        said['responses'] = f'each in {said["responses"]}'
        said['preference'] = said['preference'] or (
            f'rank `{responses.rank}`, the lowest is best' if responses.rank else
            f'rating `{responses.rating}`' if responses.rating else
            'each of the first list over all of the second')
    elif known.ratings:
        said['preference'] = 'ratings ' + ', '.join(f'`{key}`' for key in known.ratings)
    elif known.attributes and not said['preference']:
        said['preference'] = 'ratings of attributes'
    more = {'strength': known.strength, 'annotator': known.annotator, 'group': known.group}
    if known.panel and known.panel.listed:
        more['annotator'] = known.panel.name
    said |= {topic: f'`{place}`' for topic, place in more.items() if place}
    if rated := attributes(name):
        said['attributes'] = ', '.join(rated)
    return said | ({'must be named': known.ask} if known.ask else {})


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
                raise MalformedRow(f'{where}: got {_shown(row)}, expected an object of the format '
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
            place.fail(key, f'{_shown(response)}, expected a list of at least two messages')
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
            place.fail(key, f'{_shown(value)}, expected text')
        found.append(title + value)
    return parts.joint.join(found)


def _items(items: Items, place: Place) -> list[tuple[str, Any]]:
    """Responses in lists, with the place of each."""
    found = []
    for key in items.lists:
        for i, item in enumerate(_list(place, key)):
            if items.text and not (isinstance(item, Mapping) and items.text in item):
                place.fail(f'{key}[{i}]', f'{_shown(item)}, expected an object with {items.text!r}')
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
        for i, item in enumerate(_list(place, key))]
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


def _list(place: Place, key: str) -> list[Any]:
    value = place.need(key, 'a list of responses')
    if not isinstance(value, list) or not value:
        place.fail(key, f'{_shown(value)}, expected a list of responses')
    return value


def _whole(value: Any) -> Any:
    """A whole number as one, also as a column with gaps has it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shown(value: Any) -> str:
    """A value in an error, short."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f'{text[:37]}...'
