"""Rows of data sets as strategies of Hypothesis: valid ones with what they mean, and changed ones.

What a valid row means is known from how it was made, not from the code that reads it.
"""

import copy
import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet

ROWS = 4  # of a file
SUFFIXES = ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.parquet')

_HALF = '\ue000'  # stands for half of a pair of surrogates until the file is written
_LETTERS = st.characters(codec='utf-8', exclude_characters=f'\r{_HALF}')
# Neither blank, nor like one of the forms that a text is checked for.
_TEXT = st.text(_LETTERS, min_size=1, max_size=12).map(lambda text: f'x{text}')
_NUMBER = st.floats(-1e6, 1e6, allow_nan=False) | st.integers(-10, 10)
_ODD: tuple[Any, ...] = (
    None, '', ' ', 'text', '\x00', 0, 1, -1, 0.5, 10**400, float('nan'), float('inf'), True, [], {},
    [None], [[]], ['a'], ['a', 'b'], [0, 1], [{'role': 'user', 'content': 'Hi'}],
    [{'role': 'robot', 'content': 'x'}], [{'role': 'user'}], [{'role': {}, 'content': []}],
    [{'from': 'human', 'value': 'Hi'}], {'role': 'assistant', 'content': 'x'},
    [{'role': 'assistant', 'content': [{'type': 'image'}]}],
    '[{"role": "user", "content": "Hi"}]', [[[[[[[['deep']]]]]]]], _HALF,
)


class Row(NamedTuple):
    """A row, and what it means.

    Attributes:
      values: its keys.
      meant: prompt and responses, as in `Comparison`; None if it may mean anything or nothing.
    """

    values: dict[str, Any]
    meant: tuple[Any, tuple[Any, ...]] | None


def _message(role: str, text: str) -> dict[str, str]:
    return {'role': role, 'content': text}


@st.composite
def _messages(draw: Any) -> tuple[list[dict[str, Any]], tuple[dict[str, str], ...]]:
    """A chat that ends with the user, as some trainer writes it, and as it is read."""
    texts = draw(st.lists(_TEXT, min_size=1, max_size=3).filter(lambda texts: len(texts) % 2))
    read = tuple(_message(('user', 'assistant')[i % 2], text) for i, text in enumerate(texts))
    form = draw(st.sampled_from(('role', 'from', 'parts')))
    names = {'user': 'human', 'assistant': 'gpt'}
    written = [
        m if form == 'role' else
        {'from': names[m['role']], 'value': m['content']} if form == 'from' else
        m | {'content': [{'type': 'text', 'text': m['content']}]} for m in read]
    return written, read


@st.composite
def valid_rows(draw: Any) -> Row:
    """A row as it is specified, in any of the forms."""
    count = draw(st.sampled_from((3, 2, 4, 1)))
    texts = [f' {i} {draw(_TEXT)}' for i in range(max(count, 2))]
    form = draw(st.sampled_from(('dialogues', 'pair', 'chats', 'rated', 'ranked', 'single')))
    question = draw(_TEXT)
    if form == 'dialogues':
        prompt = f'\n\nHuman: {question}\n\nAssistant:'
        values = {'chosen': prompt + texts[0], 'rejected': prompt + texts[1]}
        meant = prompt, tuple(texts[:2])
    elif form == 'pair':
        key = draw(st.sampled_from(('prompt', 'question', 'query', 'instruction')))
        values = {key: question, 'chosen': texts[0], 'rejected': texts[1],
                  'preference': draw(st.floats(0, 1))}
        meant = question, tuple(texts[:2])
    elif form == 'chats':
        written, prompt = draw(_messages())
        key = draw(st.sampled_from(('prompt', 'messages', 'conversations')))
        answers = tuple((_message('assistant', text),) for text in texts[:2])
        whole = draw(st.booleans()) and key == 'prompt'
        sides = [[*(written if whole else ()), *answer] for answer in answers]
        values, meant = {key: written, 'chosen': sides[0], 'rejected': sides[1]}, (prompt, answers)
    elif form == 'rated':
        values = {'prompt': question, 'responses': texts[:count],
                  'ratings': draw(st.lists(_NUMBER | st.none(), min_size=count, max_size=count))}
        meant = question, tuple(texts[:count])
    elif form == 'ranked':
        values = {'prompt': question, 'responses': texts[:count],
                  'ranks': draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)),
                  'preferred': draw(st.integers(0, count - 1))}
        meant = question, tuple(texts[:count])
    else:
        values = {'prompt': question, 'response': texts[0], 'rating': draw(_NUMBER)}
        meant = question, (texts[0],)
    return Row(values | {'margin': draw(_NUMBER), 'weight': 2}, meant)


@st.composite
def changed_rows(draw: Any) -> Row:
    """A valid row of which one or two fields, or parts of one, are replaced or taken out."""
    values = json.loads(json.dumps(draw(valid_rows()).values))
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(values)))
        odd = copy.deepcopy(draw(st.sampled_from(_ODD)))
        way = draw(st.sampled_from(('remove', 'add', 'part', 'shorten', 'replace')))
        if way == 'remove':
            del values[key]
        elif way == 'add':
            values[draw(st.sampled_from(('rejected', 'ranks', 'extra', 'preference', 'ratings',
                                         'system', 'tools', 'annotator', 'group')))] = odd
        elif way == 'part' and isinstance(values[key], list) and values[key]:
            values[key][draw(st.integers(0, len(values[key]) - 1))] = odd
        elif way == 'shorten' and isinstance(values[key], list):
            values[key] = values[key][:-1]
        else:
            values[key] = odd
        if not values:
            break
    return Row(values, None)


def files() -> st.SearchStrategy[tuple[str, list[Row]]]:
    """The end of a file's name, and its rows, which have ids of their own."""
    row = valid_rows() | changed_rows()
    return st.tuples(st.sampled_from(SUFFIXES), st.lists(row, min_size=ROWS, max_size=ROWS)).map(
        lambda drawn: (drawn[0], [Row(row.values | {'id': f'row {i}'}, row.meant)
                                  for i, row in enumerate(drawn[1])]))


def write(folder: Path, suffix: str, rows: list[Row]) -> str:
    """Writes rows to a file, JSON Lines where a table cannot hold them, and gives its path."""
    path = folder / f'rows{suffix}'
    values = [row.values for row in rows]
    if suffix == '.parquet':
        keys = dict.fromkeys(key for row in values for key in row)
        try:  # a column has one type, so not every list of rows is a table
            table = pyarrow.Table.from_pylist([{key: row.get(key) for key in keys}
                                               for row in values])
            parquet.write_table(table, path)
        except (pyarrow.ArrowException, UnicodeError, OverflowError):
            suffix, path = '.jsonl', folder / 'rows.jsonl'
        else:
            return str(path)
    content = json.dumps(values) if suffix.startswith('.json') and not suffix.startswith(
        '.jsonl') else '\n'.join(map(json.dumps, values)) + '\n'
    content = content.replace('\\ue000', '\\ud800').encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith('.gz') else content)
    return str(path)
