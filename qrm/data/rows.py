"""Rows of data sets: what is read of them, and what is wrong with them.

Rows are checked here, once, where file and line are still known. What can be understood in two
ways is resolved by one rule for texts and chats, and noted, or refused.
"""

import ast
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qrm.data.comparisons import Comparison, MalformedRow, Text

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
# Of conversations with `from` and `value`.
_OTHER_ROLES = {'human': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant', 'model': 'assistant',
                'observation': 'tool'}

HUMAN = '\n\nHuman:'
ASSISTANT = '\n\nAssistant:'
_FORMS = {'chosen': ('chosen', 'rejected'), 'responses': ('responses',),
          'response': ('response',)}
_ROW_FORMS = "'chosen' + 'rejected', 'prompt' + 'responses' or 'prompt' + 'response'"
# Where else a prompt may stand if there is no 'prompt'.
_CHAT_PROMPTS = ('messages', 'conversations', 'conversation', 'context')
_TEXT_PROMPTS = ('question', 'instruction', 'query')
# Names by which data sets call a prompt or a part of it, which are not read.
_UNREAD_PROMPTS = ('context', 'history', 'input', 'inputs', 'post', 'problem', 'dialogue', 'dialog',
                   'prompt_text', 'system')
# A text that is shorter may well stand at the start of its own answer.
_REPEATED_WORDS, _REPEATED_LETTERS = 3, 16
# Every key that means something to `parse_row`, but for names of attributes.
NATIVE = frozenset((
    'prompt', 'chosen', 'rejected', 'responses', 'response', *_CHAT_PROMPTS, *_TEXT_PROMPTS,
    *_UNREAD_PROMPTS, 'rating', 'ratings', 'ranks', 'preferred', 'preference', 'margin', 'weight',
    'annotator', 'id', 'group', 'tools'))
_DEEPEST = 32  # levels of lists and objects in a message
_LONGEST_LITERAL = 2**20  # letters, as Python's parser takes far more memory than JSON's


def parse_row(
    row: Any, where: str, *, attributes: Sequence[str] = (), literal: bool = False
) -> Comparison:
    """Turns one row of a data set into a `Comparison`.

    Accepted are rows with `chosen` + `rejected` (whole dialogues, or continuations of `prompt`),
    `prompt` + `responses` (optionally `ratings`, `ranks` or `preferred`) and `prompt` +
    `response` (optionally `rating`). Texts are strings or chats: lists of messages, or one, with
    `role` and `content` (or `from` and `value`), the content a text or a list of parts of type
    text; all else in a message is kept for the chat template. Optional: `preference` (probability
    that chosen, or the first of two responses, is preferred), `margin`, `weight`, `annotator`,
    `id`, `group` (what the row is clustered by, else the opening question), `tools` (of chats).
    Each of the `attributes` is a key of its own, a number or null (as in HelpSteer), or with
    `responses` a list of these. Null is the same as no key.

    In place of `prompt` may stand `messages`, `conversations`, `conversation` or `context` (a
    chat), or `question`, `query` or `instruction` with or without `input` (a text); `system` beside
    the prompt makes it a chat. Responses that all begin with the prompt are whole dialogues, if
    the prompt is a chat, begins with a turn or has at least 3 words or 16 letters.

    Args:
      row: the decoded row.
      where: 'file:line', used in errors and as the id of rows without one.
      attributes: names of rated attributes to read.
      literal: all is what it is called: responses continue the prompt, whatever they begin with,
        and texts are texts, also if they look like messages.

    Raises:
      MalformedRow: names `where`, the key and what was expected.
    """
    if not isinstance(row, Mapping):
        raise MalformedRow(f'{where}: got {_kind(row)}, expected an object with {_ROW_FORMS}')
    fields = _Fields(row, where, literal)
    name = fields.name('id')
    fields.where = where if name is None else f'{where} id={name}'
    known: dict[str, Any]
    form = fields.form()
    if form == 'chosen':
        prompt, responses, group = fields.pair()
        known = {'ranks': (0, 1)}
    elif form == 'responses':
        prompt, responses, group = fields.continued(fields.texts('responses'))
        known = fields.judgements(len(responses))
    elif form == 'response':
        prompt, responses, group = fields.continued((fields.text('response'),))
        known = {'ratings': fields.rating('rating')}
    else:
        raise MalformedRow(
            f'{fields.where}: keys {sorted(map(str, row))} make no comparison, expected '
            f'{_ROW_FORMS}, or a format of `qrm data --formats`'
        )
    annotator = fields.name('annotator')
    if annotator is not None and not annotator.strip():
        fields.fail('annotator', 'blank text, expected a name')
    preference = fields.number('preference', low=0.0, high=1.0)
    if preference is not None and len(responses) != 2:
        fields.fail('preference', f'a soft label for {len(responses)} responses, expected 2')
    if any(isinstance(response, str) and not response.strip() for response in responses):
        fields.remarks.append('blank response')
    weight = fields.number('weight', low=0.0)
    comparison = {
        'id': where if name is None else name,
        'prompt': prompt,
        'responses': responses,
        'group': fields.name('group') or group,
        'preference': preference,
        'attributes': {name: ratings for name in attributes
                       if (ratings := fields.attribute(name, len(responses)))},
        'annotator': annotator,
        'margin': fields.number('margin') or 0.0,
        'weight': 1.0 if weight is None else weight,
        'tools': () if isinstance(prompt, str) else fields.tools(),
        'where': where,
    }
    remarks = fields.remarks + [f'key {key!r} not used' for key in fields.unused()]
    return Comparison(**comparison, **known, remarks=tuple(remarks))


def parse_prompt(row: Any, where: str) -> Comparison:
    """The prompt of a row, as a `Comparison` without responses.

    Args:
      row, where: see `parse_row`; responses may be missing.

    Raises:
      MalformedRow: see `parse_row`; or there is nothing to answer.
    """
    alone = isinstance(row, Mapping) and not _Fields(row, where, False).form()
    c = parse_row({**row, 'response': ''} if alone else row, where)
    if not c.prompt:
        raise MalformedRow(f"{c.place} field 'prompt': got empty text, expected what is answered")
    if not isinstance(c.prompt, str) and c.prompt[-1]['role'] == 'assistant':
        raise MalformedRow(f"{c.place} field 'prompt': got a chat that ends with a message of the "
                           'assistant, expected what is answered')
    remarks = tuple(remark for remark in c.remarks if remark != 'blank response')
    group = c.group if c.has_opening else ''
    return Comparison(c.id, c.prompt, (), group, tools=c.tools, where=where, remarks=remarks)


def as_row(comparison: Comparison) -> dict[str, Any]:
    """A row that `parse_row` reads as this comparison, ready for JSON."""
    c = comparison
    said = {'ranks': c.ranks, 'preferred': c.preferred, 'preference': c.preference,
            'ratings': c.ratings, **c.attributes, 'annotator': c.annotator, 'id': c.id,
            'group': c.group if c.has_opening and c.group != opening(c.prompt) else None,
            'margin': c.margin or None, 'weight': None if c.weight == 1.0 else c.weight,
            'tools': c.tools or None}
    return {'prompt': c.prompt, 'responses': list(c.responses)} | {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in said.items() if value is not None}


def opening(prompt: Text) -> str:
    """The first human turn of a prompt, or the whole prompt if it has no turns."""
    if not isinstance(prompt, str):
        return next((m['content'] for m in prompt if m['role'] == 'user'), '')
    if prompt.startswith(HUMAN):
        return prompt[len(HUMAN):].split(ASSISTANT)[0].strip()
    return prompt.strip()


def as_chat(comparison: Comparison) -> Comparison:
    """The same comparison with chats in place of texts.

    Turns of a text become messages; a prompt without turns is one message of the user, and a
    response one of the assistant. Blanks around each are left out, as templates put their own.

    Raises:
      MalformedRow: a prompt in turns that does not end where the assistant's begins.
    """
    prompt, responses = comparison.prompt, comparison.responses
    if not isinstance(prompt, str):
        return comparison
    chat: Text = ({'role': 'user', 'content': prompt.strip()},) if prompt.strip() else ()
    in_turns = prompt.startswith(HUMAN) or (
        not chat and all(response.startswith(HUMAN) for response in responses))
    if not in_turns and prompt.rstrip().endswith(ASSISTANT.strip()):
        raise MalformedRow(f"{comparison.place} field 'prompt': got turns that do not begin with "
                           f'{HUMAN!r}, expected such, to be read as chats')
    if not in_turns:
        chats = [({'role': 'assistant', 'content': text.strip()},) for text in responses]
    elif not chat:
        chats = [_messages(text) for text in responses]
    else:
        *chat, last = _messages(prompt)
        if last != {'role': 'assistant', 'content': ''}:
            raise MalformedRow(f"{comparison.place} field 'prompt': got turns that do not end in "
                               f'{ASSISTANT!r}, which responses are read as chats after')
        chats = [_messages(ASSISTANT + text) for text in responses]
    return dataclasses.replace(comparison, prompt=tuple(chat), responses=tuple(chats))


def _messages(text: str) -> Text:
    """The turns of a text that begins with one, as messages."""
    _, *parts = re.split(f'({HUMAN}|{ASSISTANT})', text)
    return tuple({'role': 'user' if mark == HUMAN else 'assistant', 'content': said.strip()}
                 for mark, said in zip(parts[::2], parts[1::2], strict=True))


class _Fields:
    """Typed access to the fields of one row, with errors that say where and what.

    Attributes:
      where: place of the row.
      remarks: what was noticed about it.
    """

    def __init__(self, row: Mapping[str, Any], where: str, literal: bool):
        self._row, self._used, self._literal = row, set(), literal
        self.where, self.remarks = where, list[str]()

    def fail(self, key: str, problem: str):
        raise MalformedRow(f"{self.where} field '{key}': got {problem}")

    def has(self, key: str) -> bool:
        """Whether the row has a key, be it null."""
        return key in self._row

    def form(self) -> str:
        """The key by which the row is a comparison; '' if it has none.

        In tables the keys of other forms are null; where nothing else is there, they are missing.
        """
        for known in (lambda key: self._row.get(key) is not None, self.has):
            for form, keys in _FORMS.items():
                if any(map(known, keys)):
                    return form
        return ''

    def unused(self) -> list[str]:
        """Keys that hold something and were not read, in order."""
        return [str(key) for key, value in self._row.items()
                if key not in self._used and value is not None]

    def get(self, key: str, types: tuple[type, ...], expected: str) -> Any:
        self._used.add(key)
        value = self._row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            self.fail(key, f'{_kind(value)}, expected {expected}')
        return value

    def name(self, key: str) -> str | None:
        """A name, or a whole number as one."""
        value = self._row.get(key)
        if isinstance(value, float) and value.is_integer():  # as a column with gaps has it
            self._used.add(key)
            return str(int(value))
        value = self.get(key, (str, int), 'text or an integer')
        if isinstance(value, str):
            self._check(key, value)
        return None if value is None else str(value)

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        value = self.get(key, (int, float), 'a number')
        if value is not None and not (_is_finite(value) and low <= value <= high):
            found = value if _is_finite(value) else _kind(value)
            self.fail(key, f'{found}, expected a finite number in [{low}, {high}]')
        return value if value is None else float(value)

    def text(self, key: str) -> Text:
        self._used.add(key)
        if key not in self._row:
            self.fail(key, 'nothing (the key is missing), expected text or chat messages')
        return self._text(key, self._row[key])

    def texts(self, key: str) -> tuple[Text, ...]:
        self._used.add(key)
        values = self._row[key]
        if not isinstance(values, (list, tuple)) or not values:
            self.fail(key, f'{_kind(values)}, expected a list of at least one response')
        return tuple(self._text(f'{key}[{i}]', value) for i, value in enumerate(values))

    def pair(self) -> tuple[Text, tuple[Text, ...], str]:
        """Prompt, (chosen, rejected) as its continuations, and the group."""
        chosen, rejected = self.text('chosen'), self.text('rejected')
        if isinstance(chosen, str) != isinstance(rejected, str):
            self.fail('rejected', 'text beside chat messages, expected both to be of a kind')
        key = self._prompt_key()
        if key == 'prompt' and self._row['prompt'] == '':
            self._used.add('prompt')
            key = None
        if key is not None:
            given = self._prompt(key)
            if not isinstance(given, str) or isinstance(chosen, str):
                return self._continued(key, given, (chosen, rejected))
            # A text beside chats is one of their messages, which say more.
            contents = [message['content'] for message in (*chosen, *rejected)
                        if message['role'] == 'user']
            if given and not contents:
                self.fail(key, 'text before chat messages that do not contain it, expected both '
                               'to be of a kind')
            if given and given not in contents:
                self._used.discard(key)
        elif isinstance(chosen, str) and not chosen.startswith(HUMAN):
            self._refuse_unread(_UNREAD_PROMPTS)
        elif self._row.get('system'):
            self.fail('system', "text beside whole dialogues, expected it in them, or a 'prompt'")
        if isinstance(chosen, str):
            split = _common(chosen, rejected).rfind(ASSISTANT)
            split = split + len(ASSISTANT) if split >= 0 else 0
            # Unrelated texts may begin alike: only turns tell what the opening question is.
            group = opening(chosen) if chosen.startswith(HUMAN) else ''
            return chosen[:split], (chosen[split:], rejected[split:]), group
        prompt = _common(chosen[:-1], rejected[:-1])
        return prompt, (chosen[len(prompt):], rejected[len(prompt):]), opening(prompt or chosen)

    def continued(self, responses: tuple[Text, ...]) -> tuple[Text, tuple[Text, ...], str]:
        """Prompt, responses as its continuations, and the group."""
        key = self._prompt_key()
        if key is None:
            found = 'null' if self.has('prompt') else 'nothing (the key is missing)'
            self.fail('prompt', f'{found}, expected text or chat messages')
        return self._continued(key, self._prompt(key), responses)

    def judgements(self, k: int) -> dict[str, Any]:
        """What a K-wise row says of its responses, as arguments of `Comparison`."""
        known: dict[str, Any] = {}
        ratings = self.numbers('ratings', k, missing=True)
        if ratings is not None:
            known['ratings'] = ratings
        ranks = self.numbers('ranks', k, whole=True)
        if ranks is not None:
            known['ranks'] = ranks
        preferred = self.get('preferred', (int, float), 'the index of a response')
        if preferred is not None:
            if preferred not in range(k):
                self.fail('preferred', f'{preferred}, expected an index in 0..{k - 1}')
            known['preferred'] = int(preferred)
        return known

    def numbers(self, key: str, k: int, *, missing: bool = False,
                whole: bool = False) -> tuple[Any, ...] | None:
        """A list of one number for each of k responses, None where one may be missing."""
        values = self.get(key, (list, tuple), f'a list of {k} numbers')
        if values is None:
            return None
        if len(values) != k:
            self.fail(key, f'{len(values)} numbers, expected one for each of {k} responses')
        for i, value in enumerate(values):
            if value is None and missing:
                continue
            if (isinstance(value, bool) or not isinstance(value, (int, float))
                    or not _is_finite(value) or (whole and value != int(value))):
                self.fail(f'{key}[{i}]', f'{_kind(value)}, expected '
                                         f'{"an integer" if whole else "a finite number"}')
        return tuple(value if value is None else (int if whole else float)(value)
                     for value in values)

    def rating(self, key: str) -> tuple[float, ...] | None:
        """The rating of a single response."""
        value = self.number(key)
        return None if value is None else (value,)

    def attribute(self, key: str, k: int) -> tuple[float | None, ...] | None:
        """Ratings of an attribute: a number for a single response, else a list."""
        if self._row.get('responses') is None and k == 1:
            return self.rating(key)
        return self.numbers(key, k, missing=True)

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """Descriptions of tools, which may be a list or its JSON."""
        return self._objects('tools', self.get('tools', (list, tuple, str), 'a list of objects'))

    def _objects(self, at: str, value: Any) -> tuple[Mapping[str, Any], ...]:
        """A list of objects, or the JSON of one, as tables of texts have it."""
        how = ''
        if isinstance(value, str):
            how = ' as text'
            try:
                value = json.loads(value) if value.strip() else []
            except (ValueError, RecursionError):
                self.fail(at, 'text, expected a list of objects')
        if value is not None and not isinstance(value, (list, tuple)):
            self.fail(at, f'{_kind(value)}{how}, expected a list of objects')
        for i, item in enumerate(value or ()):
            if not isinstance(item, Mapping):
                self.fail(f'{at}[{i}]', f'{_kind(item)}, expected an object')
            self._check(f'{at}[{i}]', item)
        return tuple(value or ())

    def _prompt_key(self) -> str | None:
        """The key that holds the prompt."""
        if self._row.get('prompt') is not None:
            return 'prompt'
        chats = [key for key in _CHAT_PROMPTS if isinstance(self._row.get(key), (list, tuple))]
        texts = [key for key in _TEXT_PROMPTS if self._row.get(key) is not None]
        if len(chats + texts) > 1:
            self.fail(texts[-1] if texts else chats[-1],
                      f"a second prompt beside {(chats + texts)[0]!r}, expected one, or 'prompt'")
        return next(iter(chats + texts), None)

    def _prompt(self, key: str) -> Text:
        """The prompt under this key, and what else belongs to it."""
        prompt = self.text(key)
        if key in _TEXT_PROMPTS and not isinstance(prompt, str):
            self.fail(key, f'{_kind(self._row[key])}, expected text')
        if key in _TEXT_PROMPTS:
            read = ('system', 'input') if key == 'instruction' else ('system',)
            self._refuse_unread([name for name in _UNREAD_PROMPTS if name not in read])
        if key == 'instruction':
            more = self.get('input', (str,), 'text')
            self._check('input', more)
            prompt = f'{prompt}\n{more}' if more and more.strip() else prompt
        system = self.get('system', (str,), 'text')
        self._check('system', system)
        if not system:
            return prompt
        if isinstance(prompt, str) and prompt.startswith(HUMAN):
            self.fail('system', "text beside a prompt in turns of text, expected a prompt of one "
                                'turn, or chat messages')
        user = ({'role': 'user', 'content': prompt},) if isinstance(prompt, str) else prompt
        if user[0]['role'] == 'system':
            self.fail('system', 'text beside a chat that begins with a system message, expected '
                                'one of them')
        return {'role': 'system', 'content': system}, *user

    def _refuse_unread(self, names: Sequence[str]) -> None:
        """Refuses keys that may hold the prompt or a part of it, which nothing reads."""
        for name in names:
            if self._row.get(name):
                self.fail(name, "what may be the prompt or a part of it, expected all of it under "
                                "'prompt', or no such key")

    def _continued(self, key: str, prompt: Text,
                   responses: tuple[Text, ...]) -> tuple[Text, tuple[Text, ...], str]:
        """Prompt, its continuations and the group, of responses that may be whole dialogues."""
        if not isinstance(prompt, str):
            responses = tuple(({'role': 'assistant', 'content': response},)
                              if isinstance(response, str) else response for response in responses)
        elif any(not isinstance(response, str) for response in responses):
            self.fail('responses' if self._row.get('responses') is not None else 'response',
                      'chat messages after a text prompt, expected both to be of a kind')
        n = len(prompt)
        plainly = isinstance(prompt, str)
        # One that is the prompt alone is blank; of a chat it would have no message.
        begin = [not self._literal and n > 0 and text[:n] == prompt and (plainly or len(text) > n)
                 for text in responses]
        if all(begin) and (not plainly or _unmistakable(prompt)):
            responses = tuple(text[n:] for text in responses)
            self.remarks.append('responses begin with the prompt, which stands once')
        elif any(begin) and not all(begin) and (not plainly or prompt.startswith(HUMAN)):
            self.fail(key, 'a prompt that some responses begin with and others do not, expected '
                           'continuations, or dialogues that all begin with it')
        elif any(begin):
            self.remarks.append('responses begin with the prompt, and are taken to repeat it')
        elif not plainly and n and any(
                text[0]['role'] == 'system' or prompt[-1]['role'] == text[0]['role'] == 'user'
                for text in responses):
            self.fail(key, 'a chat that is not continued by messages which begin a chat of their '
                           'own, expected continuations, or dialogues that all begin with it')
        return prompt, responses, opening(prompt)

    def _text(self, key: str, value: Any) -> Text:
        if isinstance(value, str):
            self._check(key, value)
            if not self._literal and holds_messages(value):
                self.fail(key, 'text that is a list of chat messages, expected the list itself')
            return value
        if isinstance(value, Mapping) and _ROLE_KEYS & value.keys():
            value = (value,)
        if not isinstance(value, (list, tuple)) or not value:
            self.fail(key, f'{_kind(value)}, expected text or a list of chat messages')
        return tuple(self._message(f'{key}[{i}]', message) for i, message in enumerate(value))

    def _message(self, at: str, message: Any) -> Mapping[str, Any]:
        """A message with `role` and `content`, and all else that it has."""
        if not isinstance(message, Mapping):
            self.fail(at, f"{_kind(message)}, expected a message with 'role' and 'content'")
        keys = [next((key for key in names if message.get(key) is not None), names[0])
                for names in (('role', 'from'), ('content', 'value'))]
        role = message.get(keys[0])
        role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            self.fail(f'{at}.{keys[0]}',
                      f'{self._found(message, keys[0])}, expected one of {ROLES}')
        content = message.get(keys[1])
        more = {key: value for key, value in message.items()
                if key not in keys and value is not None}
        if 'tool_calls' in more:
            more['tool_calls'] = list(self._objects(f'{at}.tool_calls', more['tool_calls']))
        if isinstance(content, (list, tuple)) and content:
            content = ''.join(self._part(f'{at}.{keys[1]}[{i}]', part)
                              for i, part in enumerate(content))
        # What calls a tool may say nothing beside.
        if not isinstance(content, str) and not (content is None and more.get('tool_calls')):
            self.fail(f'{at}.{keys[1]}', f'{self._found(message, keys[1])}, expected text')
        self._check(f'{at}.{keys[1]}', content)
        for key, value in more.items():
            self._check(f'{at}.{key}', value)
        return {'role': role, 'content': content, **more}

    def _part(self, at: str, part: Any) -> str:
        """The text of a part of a message."""
        found = part.get('type') if isinstance(part, Mapping) else None
        if found not in _TEXT_PARTS or not isinstance(part, Mapping) or not isinstance(
                part.get('text'), str):
            found = f'a part of type {found!r}' if isinstance(found, str) else _kind(part)
            self.fail(at, f"{found}, expected a part of type 'text'")
        return part['text']

    def _found(self, message: Mapping[str, Any], key: str) -> str:
        value = message.get(key)
        if key not in message:
            return 'nothing (the key is missing)'
        return repr(value) if isinstance(value, str) else _kind(value)

    def _check(self, at: str, value: Any, depth: int = _DEEPEST) -> None:
        """Checks that all texts in a value are valid Unicode, and that it is not too deep."""
        if isinstance(value, str):
            try:
                value.encode('utf-8')
            except UnicodeEncodeError:
                self.fail(at, 'text with a lone surrogate, expected valid Unicode')
        elif isinstance(value, (Mapping, list, tuple)):
            if not depth:
                self.fail(at, f'more than {_DEEPEST} levels of lists and objects')
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                self._check(f'{at} key', key, depth - 1)
                self._check(f'{at}.{key}', item, depth - 1)


_TEXT_PARTS = (None, 'text', 'input_text', 'output_text')
_ROLE_KEYS = frozenset(('role', 'from'))
_LIKE_MESSAGES = re.compile(r'\s*(\[\s*)?\{[^{}]*[\'"](role|from)[\'"]\s*:')


def holds_messages(text: str) -> bool:
    """Whether a text is what JSON or Python writes for a message, or for a list of them."""
    if not _LIKE_MESSAGES.match(text):
        return False
    readers: list[Callable[[str], Any]] = [json.loads]
    if len(text) <= _LONGEST_LITERAL:
        # Python's own, and what arrays of objects print, which has no commas.
        readers += [ast.literal_eval, lambda text: ast.literal_eval(
            re.sub(r'\}\s*\{', '}, {', text))]
    for read in readers:
        try:
            found = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        found = found if isinstance(found, list) else [found]
        return all(isinstance(item, Mapping) and bool(_ROLE_KEYS & item.keys()) for item in found)
    return False


def _unmistakable(prompt: str) -> bool:
    """Whether a text that begins with this repeats it, and does not merely begin alike."""
    return (prompt.startswith(HUMAN) or len(prompt.split()) >= _REPEATED_WORDS
            or len(prompt.strip()) >= _REPEATED_LETTERS)


def _common(first: Any, second: Any) -> Any:
    """The longest common prefix of two texts, or of two tuples."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return first[:low]


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON has integers that are too large for a float.
        return False


def _kind(value: Any) -> str:
    """Short description of a value for error messages, without its content."""
    names = {type(None): 'null', str: 'text', bool: 'a truth value', int: 'an integer',
             float: 'a number', list: 'a list', dict: 'an object'}
    if isinstance(value, (int, float)) and not _is_finite(value):
        return str(value) if isinstance(value, float) else 'an integer beyond all floats'
    if value in ('', [], {}):
        return f'empty {names[type(value)].removeprefix("a ").removeprefix("an ")}'
    return names.get(type(value), type(value).__name__)
