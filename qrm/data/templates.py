"""Chat templates: how they render chats, what they do not print of them, and at what time."""

import ast
import dataclasses
import datetime
from collections.abc import Callable

import jinja2
import transformers

from qrm.data.comparisons import Comparison, DataError, MalformedRow, Text, in_a_line

Tokenizer = transformers.PreTrainedTokenizerBase

_CLOCK = 'strftime_now'

# MOSS-RLHF's text: turns follow their mark without a blank, and each other with "</s>", which GPT-2
# reads as text. Responses follow the last mark.
MOSS = (
    "{% for message in messages %}{% if not loop.first %}</s>{% endif %}"
    "{{ 'Assistant:' if message.role == 'assistant' else 'Human:' }}{{ message.content }}"
    "{% endfor %}")


def render(
    comparison: Comparison, response: Text, tokenizer: Tokenizer, *, whole: bool = False,
    to_answer: bool = False,
) -> str:
    """A dialogue of a chat as text.

    Args:
      comparison: whose prompt and tools.
      response: messages that continue it; () for the prompt alone.
      tokenizer: with the template.
      whole: whatever the template ends with, else up to EOS if it ends with EOS and blanks.
      to_answer: whole, and with what stands before an answer.

    Raises:
      DataError: there is no template.
      MalformedRow: the template refuses it.
    """
    if tokenizer.chat_template is None:
        name = tokenizer.name_or_path or 'trained on the data'
        raise DataError(f'{comparison.place}: chat messages, but the tokenizer {name!r} has no '
                        'chat template; for training set config.model.chat_template')
    messages = [*comparison.prompt, *response]
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=list(comparison.tools) or None, tokenize=False,
            add_generation_prompt=to_answer)
    except Exception as error:  # A template is a program, and fails in any way.
        raise MalformedRow(f'{comparison.place}: the chat template refuses it '
                           f'({in_a_line(error)})') from error
    if whole or to_answer:
        return text
    # Some templates end in EOS and a line feed: EOS is then the end, not to be appended again.
    stripped = text.rstrip()
    return stripped if stripped.endswith(tokenizer.eos_token or '\0') else text


def unread_keys(comparison: Comparison, tokenizer: Tokenizer) -> list[str]:
    """Keys of a chat's messages, and 'tools', that hold something and change none of its dialogues.

    So a template that prints no tool calls, say, is found by what it prints.
    """
    if isinstance(comparison.prompt, str):
        return []
    chats = [comparison.prompt, *comparison.responses]
    keys = {key for chat in chats for message in chat for key, value in message.items()
            if key not in ('role', 'content') and value not in ('', (), [], {})}
    variants = {f'message key {key!r}': dataclasses.replace(
        comparison, prompt=_without_key(comparison.prompt, key),
        responses=tuple(_without_key(response, key) for response in comparison.responses))
        for key in sorted(keys)}
    if comparison.tools:
        variants["key 'tools'"] = dataclasses.replace(comparison, tools=())
    if not variants:
        return []
    whole = _rendered(comparison, tokenizer)
    return [name for name, variant in variants.items() if _rendered(variant, tokenizer) == whole]


def _without_key(chat: Text, key: str) -> Text:
    return tuple({name: value for name, value in message.items() if name != key}
                 for message in chat)


def _rendered(comparison: Comparison, tokenizer: Tokenizer) -> list[str] | None:
    """All dialogues of a chat as texts; None if the template refuses one."""
    try:
        return [render(comparison, response, tokenizer) for response in comparison.responses]
    except MalformedRow:
        return None


def read(given: str) -> str:
    """A chat template that is given as itself or as a file of it.

    Raises:
      DataError: it is neither.
    """
    if '{' in given:
        return given
    try:
        with open(given, encoding='utf-8') as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'config.model.chat_template={given!r}: neither Jinja nor a file of it '
                        f'({in_a_line(error)})') from error


def settle(tokenizer: Tokenizer, now: datetime.datetime, given: str = '') -> None:
    """Stops the clock of a tokenizer's chat template, or of the one given in its place.

    Raises:
      DataError: the template is no function of the chat, or `read` finds none.
    """
    if given:
        tokenizer.chat_template = read(given)
        _check_syntax(tokenizer)
    name = tokenizer.name_or_path or 'the trained tokenizer'
    try:
        stopped = change_template(tokenizer, lambda template: stop_clock(template, now))
    except ValueError as error:
        raise DataError(f'{name}: the chat template {error}') from error
    if stopped:
        print(f'note: the chat template of {name} prints the time, which stands at '
              f'{now:%Y-%m-%d %H:%M}', flush=True)


def _check_syntax(tokenizer: Tokenizer) -> None:
    chat = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    try:
        tokenizer.apply_chat_template(chat, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f'config.model.chat_template: no Jinja ({in_a_line(error)})') from error
    except Exception:  # what it refuses are chats, and faults of their rows
        return


def change_template(tokenizer: Tokenizer, change: Callable[[str], str]) -> bool:
    """Changes the chat template of a tokenizer, or each of several; whether any is another now."""
    before = tokenizer.chat_template
    if isinstance(before, dict):
        tokenizer.chat_template = {name: change(template) for name, template in before.items()}
    elif before:
        tokenizer.chat_template = change(before)
    return tokenizer.chat_template != before


def stop_clock(template: str, now: datetime.datetime) -> str:
    """A chat template that prints one time, whenever it is rendered.

    Templates of Llama 3 and others print the day on which they are rendered, so that the same chat
    has other tokens, and another reward, on the next. The clock is replaced inside of the template,
    which is kept with the run and exported, by a macro of its name.

    Raises:
      ValueError: what the template prints depends on chance, or on the clock in a way that cannot
        be known beforehand; or it is no template.
    """
    try:
        found = [(kind, value) for _, kind, value in jinja2.Environment().lex(template)
                 if kind not in ('whitespace', 'data') and 'comment' not in kind]
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f'cannot be read ({in_a_line(error)})') from error
    words = [value for _, value in found]
    formats = []
    for i, (kind, word) in enumerate(found):
        if word == 'lipsum' or (word == 'random' and words[i - 1] == '|') or (
                kind == 'string' and words[max(i - 2, 0):i] == ['map', '(']
                and word[1:-1] == 'random'):
            raise ValueError('prints random words, expected a function of the chat')
        if kind != 'name' or word != _CLOCK:
            continue
        if words[i - 1] == 'macro':
            return template
        after = words[i + 1:i + 6]
        if after[:2] == ['is', 'defined'] or after[:3] == ['is', 'not', 'defined']:
            continue
        given = after[3:] if after[1:3] == ['format', '='] else after[1:]
        if after[:1] != ['('] or given[1:2] != [')'] or given[0][:1] not in ('"', "'"):
            raise ValueError(f'uses {_CLOCK} otherwise than with a format that is written out in '
                             'quotes')
        formats.append(given[0])
    if not formats:
        return template
    cases = ''.join(
        f'{{%- {"elif" if i else "if"} format == {text} -%}}'
        f'{{{{ {now.strftime(ast.literal_eval(text))!r} }}}}'
        for i, text in enumerate(dict.fromkeys(formats)))
    # The line feed belongs to the tag before it: the template begins a line, as it did.
    return f'{{%- macro {_CLOCK}(format) -%}}{cases}{{%- endif -%}}{{%- endmacro %}}\n{template}'
