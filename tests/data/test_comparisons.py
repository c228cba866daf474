"""Tests of comparisons: preferences, and the report of what became of rows."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from qrm.data.comparisons import Comparison, DataReport, exchange_prompts
from qrm.data.rows import parse_row


def _comparison(k, **known):
    """Of K responses, of which this is known."""
    return Comparison('a', '', tuple(f'r{i}' for i in range(k)), 'a', **known)


@pytest.mark.parametrize(('k', 'known', 'expected'), [
    (2, {'ranks': (0, 1)}, [[0, 1], [0, 0]]),
    (2, {'ranks': (3, 1)}, [[0, 0], [1, 0]]),
    (2, {'ranks': (0, 0)}, [[0, 0.5], [0.5, 0]]),
    (2, {'preference': 0.75}, [[0, 0.75], [0.25, 0]]),
    (2, {'preference': 0.0}, [[0, 0], [1, 0]]),
    (2, {'preference': 0.5, 'ranks': (0, 1)}, [[0, 0.5], [0.5, 0]]),
    (2, {}, [[0, 0], [0, 0]]),
    (1, {}, [[0]]),
    (1, {'ratings': (4.0,)}, [[0]]),
    (1, {'preferred': 0}, [[0]]),
    (3, {'ranks': (1, 0, 1)}, [[0, 0, 0.5], [1, 0, 1], [0.5, 0, 0]]),
    # The preferred response beats the others, of which nothing else is known.
    (3, {'preferred': 1}, [[0, 0, 0], [1, 0, 1], [0, 0, 0]]),
    # Ranks say more than the one preferred response, and that more than ratings.
    (3, {'preferred': 0, 'ranks': (2, 1, 0)}, [[0, 0, 0], [1, 0, 0], [1, 1, 0]]),
    (3, {'preferred': 0, 'ratings': (1, 2, 3)}, [[0, 1, 1], [0, 0, 0], [0, 0, 0]]),
    (3, {'ratings': (2.5, -1, 2.5)}, [[0, 1, 0.5], [0, 0, 0], [0.5, 1, 0]]),
    (3, {'ratings': (1, None, 3)}, [[0, 0, 0], [0, 0, 0], [1, 0, 0]]),
    (3, {'ratings': (None, None, 3)}, [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
    (3, {'ratings': (None, None, None)}, [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
    (2, {'ratings': (1e308, -1e308)}, [[0, 1], [0, 0]]),
    (2, {'ratings': (0, 0.0)}, [[0, 0.5], [0.5, 0]]),
])
def test_preference_matrix_by_hand(k, known, expected):
    matrix = _comparison(k, **known).preference_matrix()
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, np.array(expected, np.float32))


def test_chosen_is_the_first_response_and_preferred():
    comparison = parse_row({'prompt': 'Q', 'chosen': ' good', 'rejected': ' bad'}, 'rows.jsonl:7')
    np.testing.assert_array_equal(comparison.preference_matrix(), [[0, 1], [0, 0]])


# The report.


def test_report_by_hand():
    report = DataReport(
        'file.jsonl', 'train', read=10, kept=7, truncated=2, identical=1, tied=3,
        dropped=collections.Counter({'identical responses': 1, 'malformed row': 2}),
        notes=collections.Counter({'repeats an earlier row': 4}),
        first_malformed='file.jsonl:3: why',
        dialogue_tokens=200, packed_tokens=150, prompt_tokens=100,
    )
    assert report.as_dict() == {
        'source': 'file.jsonl', 'split': 'train', 'read': 10, 'kept': 7,
        'dropped': {'identical responses': 1, 'malformed row': 2},
        'first_malformed': 'file.jsonl:3: why', 'truncated': 2, 'identical': 1,
        'tied': 3, 'notes': {'repeats an earlier row': 4}, 'dialogue_tokens': 200,
        'packed_tokens': 150, 'prompt_tokens': 100, 'prefix_share': 0.5, 'tokens_saved': 50,
    }
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert report.format().splitlines() == [
        'train: 10 read, 7 kept, 3 dropped, 2 truncated, 1 identical, 3 tied; 200 tokens, '
        '50% in shared prompts, 25% saved by storing them once (file.jsonl)',
        '  dropped 1: identical responses',
        '  dropped 2: malformed row',
        '  first malformed: file.jsonl:3: why',
        '  note 4: repeats an earlier row',
    ]


def test_an_empty_report_has_no_shares():
    assert DataReport('x', 'test').as_dict()['prefix_share'] == 0.0
    assert '0 read, 0 kept' in DataReport('x', 'test').format()


def test_prompts_are_exchanged_between_groups():
    chat = tuple({'role': 'user', 'content': f'question {i}'} for i in range(4))
    rows = [Comparison(f't{i}', f'prompt {i}', (f'a{i}', f'b{i}'), f'group {i // 3}', ranks=(0, 1))
            for i in range(12)]
    rows += [Comparison(f'c{i}', (message,), ('x', 'y'), f'chat {i}', tools=({'name': f'{i}'},))
             for i, message in enumerate(chat)]
    rows += [Comparison('alone', '', ('x', 'y'), 'nothing')]
    found = exchange_prompts(rows, seed=0)
    assert [c.id for c in found] == [c.id for c in rows[:-1]]  # without the one without a prompt
    of = {c.id: c for c in rows}
    owner = {str(c.prompt): c for c in rows if c.prompt}
    for c in found:
        own, other = of[c.id], owner[str(c.prompt)]
        assert other.group != own.group
        assert c.tools == other.tools
        assert dataclasses.replace(c, prompt=own.prompt, tools=own.tools) == own
    assert sorted(str(c.prompt) for c in found) == sorted(str(c.prompt) for c in rows[:-1])
    assert exchange_prompts(rows, seed=0) == found
    assert exchange_prompts(rows, seed=1) != found
    # Seven of ten in one group: three prompts of others are left for them.
    uneven = [dataclasses.replace(c, group='most' if i < 7 else c.id)
              for i, c in enumerate(rows[:10])]
    some = exchange_prompts(uneven, seed=0)
    assert sum(c.group == 'most' for c in some) == 3
    assert sum(c.group != 'most' for c in some) == 3
    assert len({c.prompt for c in some}) == 6
    assert exchange_prompts(uneven[:7], seed=0) == []
    assert exchange_prompts([], seed=0) == []
    # Of one prompt under several names there is no other; chats keep the role that they end with.
    same = [dataclasses.replace(c, prompt='prompt', group=c.id) for c in rows[:10]]
    assert exchange_prompts(same, seed=0) == []
    ends = [Comparison(f'{i}', ({'role': 'user', 'content': f'{i}'},
                                {'role': 'assistant', 'content': 'so'})[:1 + i % 2], ('x', 'y'),
                       f'{i}') for i in range(6)]
    for c in exchange_prompts(ends, seed=0):
        assert len(c.prompt) == 1 + int(c.id) % 2
