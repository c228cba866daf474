"""Tests of comparisons: rows and what is wrong with them, files, preferences, the report."""

import collections
import gzip
import json

import numpy as np
import pytest

from qrm.data import comparisons
from qrm.data.comparisons import (
    Comparison,
    DataError,
    DataReport,
    MalformedRow,
    ignored_keys,
    opening,
    parse_row,
    read_jsonl,
)

WHERE = 'rows.jsonl:7'
HUGE = 10**400  # an integer that no float can hold
USER = {'role': 'user', 'content': 'Hi'}
SYSTEM = {'role': 'system', 'content': 'Be kind.'}
YES = {'role': 'assistant', 'content': 'Yes'}
NO = {'role': 'assistant', 'content': 'No'}


def _pair(**changes):
    return {'prompt': 'Q', 'chosen': ' good', 'rejected': ' bad'} | changes


def _three(**changes):
    return {'prompt': 'Q', 'responses': [' a', ' b', ' c']} | changes


def _without(row, key):
    return {k: v for k, v in row.items() if k != key}


def _write(folder, content, name='rows.jsonl'):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def _rows(path):
    return [row for _, row in read_jsonl(path)]


# Rows that can be used.


@pytest.mark.parametrize(('row', 'prompt', 'responses', 'group'), [
    # Whole dialogues are divided at the last turn of the assistant that they have in common.
    (
        {'chosen': '\n\nHuman: Why?\n\nAssistant: So.',
         'rejected': '\n\nHuman: Why?\n\nAssistant: S'},
        '\n\nHuman: Why?\n\nAssistant:', (' So.', ' S'), 'Why?',
    ),
    (
        {'chosen': '\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D',
         'rejected': '\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: E'},
        '\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:', (' D', ' E'), 'A',
    ),
    # One side has more turns than the other.
    (
        {'chosen': '\n\nHuman: A\n\nAssistant: B', 'rejected':
         '\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D'},
        '\n\nHuman: A\n\nAssistant:', (' B', ' B\n\nHuman: C\n\nAssistant: D'), 'A',
    ),
    # The sides differ from the opening question on: nothing is shared.
    (
        {'chosen': '\n\nHuman: A\n\nAssistant: B', 'rejected': '\n\nHuman: Z\n\nAssistant: B'},
        '', ('\n\nHuman: A\n\nAssistant: B', '\n\nHuman: Z\n\nAssistant: B'), 'A',
    ),
    ({'chosen': 'yes', 'rejected': 'no'}, '', ('yes', 'no'), WHERE),
    (_pair(), 'Q', (' good', ' bad'), 'Q'),
    (_pair(prompt=None), '', (' good', ' bad'), WHERE),
    (_pair(prompt=''), '', (' good', ' bad'), WHERE),
    (_three(), 'Q', (' a', ' b', ' c'), 'Q'),
    ({'prompt': 'Q', 'response': ' a'}, 'Q', (' a',), 'Q'),
    # Chats: whole conversations, continuations of a chat, and texts that continue a chat.
    (
        {'chosen': [SYSTEM, USER, YES], 'rejected': [SYSTEM, USER, NO]},
        (SYSTEM, USER), ((YES,), (NO,)), 'Hi',
    ),
    ({'prompt': [USER], 'chosen': [YES], 'rejected': [NO]}, (USER,), ((YES,), (NO,)), 'Hi'),
    ({'prompt': [USER], 'chosen': 'Yes', 'rejected': 'No'}, (USER,), ((YES,), (NO,)), 'Hi'),
    ({'prompt': [USER], 'responses': ['Yes', [NO]]}, (USER,), ((YES,), (NO,)), 'Hi'),
    ({'prompt': [USER], 'response': [YES]}, (USER,), ((YES,),), 'Hi'),
    # A conversation that is the beginning of the other keeps its last message as a response.
    (
        {'chosen': [USER, YES], 'rejected': [USER, YES, USER, NO]},
        (USER,), ((YES,), (YES, USER, NO)), 'Hi',
    ),
    # The prompt as text beside whole conversations that contain it.
    (
        {'prompt': 'Hi', 'chosen': [USER, YES], 'rejected': [USER, NO]},
        (USER,), ((YES,), (NO,)), 'Hi',
    ),
    # Only role and content of a message are kept.
    (
        {'prompt': [USER | {'name': 'Ann', 'extra': None}], 'response': 'Yes'},
        (USER,), ((YES,),), 'Hi',
    ),
])
def test_rows_become_comparisons(row, prompt, responses, group):
    comparison = parse_row(row, WHERE)
    assert comparison.id == WHERE
    assert comparison.prompt == prompt
    assert comparison.responses == responses
    assert comparison.group == group


def test_optional_fields_are_read():
    row = _pair(id=12, preference=0.75, margin=2, weight=0.5)
    assert parse_row(row, WHERE) == Comparison(
        id='12', prompt='Q', responses=(' good', ' bad'), group='Q', ranks=(0, 1),
        preference=0.75, margin=2.0, weight=0.5,
    )
    row = _three(id='x', ratings=[1, None, 2.5], ranks=[1, 1, 0], preferred=2)
    assert parse_row(row, WHERE) == Comparison(
        id='x', prompt='Q', responses=(' a', ' b', ' c'), group='Q', ranks=(1, 1, 0),
        ratings=(1, None, 2.5), preferred=2,
    )


# A row of HelpSteer, and what its attributes are.
HELPSTEER = {'prompt': 'Q', 'response': ' a', 'helpfulness': 3, 'correctness': 4.5,
             'coherence': None, 'verbosity': 1}
NAMES = ('helpfulness', 'coherence', 'verbosity', 'style')


@pytest.mark.parametrize(('row', 'attributes', 'matrix'), [
    (HELPSTEER, {'helpfulness': (3.0,), 'verbosity': (1.0,)}, [[3, None, 1, None]]),
    (_three(helpfulness=[1, None, 0.5], style=[None, None, None], coherence=None),
     {'helpfulness': (1, None, 0.5), 'style': (None, None, None)},
     [[1, None, None, None], [None] * 4, [0.5, None, None, None]]),
    (_pair(verbosity=[2, 4]), {'verbosity': (2, 4)},
     [[None, None, 2, None], [None, None, 4, None]]),
    # One response in a list.
    ({'prompt': 'Q', 'responses': [' a'], 'style': [5]}, {'style': (5,)}, [[None, None, None, 5]]),
    (_pair(), {}, [[None] * 4] * 2),
])
def test_attributes_that_were_asked_for_are_read(row, attributes, matrix):
    comparison = parse_row(row, WHERE, attributes=NAMES)
    assert comparison.attributes == attributes
    found = comparison.rating_matrix(NAMES)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(matrix, np.float32))
    # They are no preference, and without being asked for they are nothing.
    assert not parse_row(_without(row, 'ranks'), WHERE, attributes=NAMES).ratings
    assert parse_row(row, WHERE).attributes == {}


def test_ratings_of_the_whole_response_are_the_one_column():
    rated = parse_row(_three(ratings=[1, None, 2.5]), WHERE)
    np.testing.assert_array_equal(rated.rating_matrix(), np.float32([[1], [np.nan], [2.5]]))
    np.testing.assert_array_equal(parse_row(_pair(), WHERE).rating_matrix(),
                                  np.full((2, 1), np.nan))
    # A rating of a single response, as a key of its own or as an attribute of any name.
    row = {'prompt': 'Q', 'response': ' a', 'rating': 0}
    single = parse_row(row, WHERE, attributes=('rating',))
    assert (single.ratings, single.attributes) == ((0.0,), {'rating': (0.0,)})
    np.testing.assert_array_equal(single.rating_matrix(), [[0.0]])
    np.testing.assert_array_equal(single.rating_matrix(('rating',)), [[0.0]])
    assert parse_row(row | {'rating': None}, WHERE).ratings is None


@pytest.mark.parametrize(('given', 'name'), [('Ann', 'Ann'), (7, '7'), (None, None), ('7', '7')])
def test_annotators_have_names(given, name):
    for row in (_pair(), _three(), {'prompt': 'Q', 'response': ' a'}):
        assert parse_row(row | {'annotator': given}, WHERE).annotator == name
        assert parse_row(row, WHERE).annotator is None


def test_nulls_in_optional_fields_are_their_defaults():
    nulls = dict.fromkeys(('id', 'preference', 'margin', 'weight', 'annotator'))
    assert parse_row(_pair(**nulls), WHERE) == parse_row(_pair(), WHERE)
    assert parse_row(_pair(), WHERE).weight == 1.0
    assert parse_row(_pair(), WHERE).margin == 0.0
    assert parse_row(_pair(weight=0), WHERE).weight == 0.0


def test_blank_responses_are_accepted_for_scoring_only():
    row = {'prompt': 'Q', 'responses': ['', ' a']}
    assert parse_row(row, WHERE, allow_blank=True).responses == ('', ' a')
    with pytest.raises(MalformedRow, match='blank text'):
        parse_row(row, WHERE)


@pytest.mark.parametrize(('prompt', 'expected'), [
    ('\n\nHuman: First?\n\nAssistant: A\n\nHuman: Second?\n\nAssistant:', 'First?'),
    ('\n\nHuman: Two\n\nparagraphs \n\nAssistant:', 'Two\n\nparagraphs'),
    ('  plain text\n', 'plain text'),
    ('', ''),
    ((SYSTEM, USER, YES, {'role': 'user', 'content': 'Later'}), 'Hi'),
    ((SYSTEM,), ''),
    ((), ''),
])
def test_opening_is_the_first_human_turn(prompt, expected):
    assert opening(prompt) == expected


@pytest.mark.parametrize(('row', 'expected'), [
    (_pair(id='a', margin=1.0, preference=0.5, weight=1.0), set()),
    (_pair(source='web', score_chosen=3), {'source', 'score_chosen'}),
    # Keys of other forms of rows are not read either.
    (_pair(ratings=[1, 2], preferred=1), {'ratings', 'preferred'}),
    (_pair(responses=['a', 'b']), {'responses'}),
    (_three(ratings=[1, 2, 3], ranks=[0, 1, 2], preferred=0), set()),
    (_three(response='x'), {'response'}),
    ({'prompt': 'Q', 'response': 'x', 'ranks': [0]}, {'ranks'}),
])
def test_keys_that_are_not_read_are_named(row, expected):
    assert ignored_keys(row) == expected


def test_attributes_and_annotators_are_keys_that_are_read():
    assert ignored_keys(HELPSTEER) == {'helpfulness', 'correctness', 'coherence', 'verbosity'}
    assert ignored_keys(HELPSTEER, NAMES) == {'correctness'}
    assert ignored_keys(_pair(annotator='Ann', rating=3, style=[1, 2]), ('style',)) == {'rating'}
    assert ignored_keys({'prompt': 'Q', 'response': 'x', 'rating': 3}) == set()


# Rows that cannot: where, which key, and what was expected.


@pytest.mark.parametrize(('row', 'key', 'expected'), [
    (_without(_pair(), 'chosen'), 'chosen', 'nothing (the key is missing), expected text'),
    (_without(_pair(), 'rejected'), 'rejected', 'nothing (the key is missing), expected text'),
    (_without(_three(), 'prompt'), 'prompt', 'nothing (the key is missing), expected text'),
    ({'response': 'a'}, 'prompt', 'nothing (the key is missing), expected text'),
    (_pair(chosen=None), 'chosen', 'null, expected text'),
    (_pair(chosen=''), 'chosen', 'blank text, expected a response'),
    (_pair(rejected=' \n\t'), 'rejected', 'blank text, expected a response'),
    (_pair(chosen=3), 'chosen', 'an integer, expected text'),
    (_pair(chosen=True), 'chosen', 'a truth value, expected text'),
    (_pair(rejected=2.5), 'rejected', 'a number, expected text'),
    (_pair(rejected={'a': 1}), 'rejected', 'an object, expected text'),
    (_pair(rejected={}), 'rejected', 'empty object, expected text'),
    (_pair(chosen=[]), 'chosen', 'empty list, expected text or a list of chat messages'),
    (_pair(chosen=['a']), 'chosen[0]', "text, expected a message with 'role' and 'content'"),
    (_pair(chosen=[None]), 'chosen[0]', 'null, expected a message'),
    (_pair(chosen='bad \ud800'), 'chosen', 'lone surrogate, expected valid Unicode'),
    (_pair(prompt=5), 'prompt', 'an integer, expected text'),
    (_pair(prompt=[]), 'prompt', 'empty list, expected text'),
    (_pair(prompt='\udfff'), 'prompt', 'lone surrogate'),
    (_pair(chosen=[USER, YES], prompt=None), 'rejected', 'expected both to be of a kind'),
    (_pair(rejected=[USER, NO], prompt=None), 'rejected', 'expected both to be of a kind'),
    # The prompt would be lost.
    (_pair(chosen=[YES], rejected=[NO]), 'prompt', 'expected both to be of a kind'),
    (_three(responses=[' a', [YES]]), 'responses', 'expected both to be of a kind'),
    ({'prompt': 'Q', 'response': [YES]}, 'response', 'expected both to be of a kind'),
    (_pair(chosen=[{'role': 'bot', 'content': 'x'}]), 'chosen[0].role', "'bot', expected one of"),
    (_pair(chosen=[{'content': 'x'}]), 'chosen[0].role', 'null, expected one of'),
    (_pair(chosen=[{'role': ['user'], 'content': 'x'}]), 'chosen[0].role', 'a list, expected one'),
    (_pair(chosen=[USER, {'role': 'user'}]), 'chosen[1].content', 'null, expected text'),
    (_pair(chosen=[USER, {'role': 'user', 'content': ['x']}]), 'chosen[1].content',
     'a list, expected text'),
    (_pair(chosen=[USER, {'role': 'user', 'content': '\ud800'}]), 'chosen[1].content',
     'lone surrogate'),
    (_pair(id=True), 'id', 'a truth value, expected text or an integer'),
    (_pair(id=1.5), 'id', 'a number, expected text or an integer'),
    (_pair(id=['a']), 'id', 'a list, expected text or an integer'),
    (_pair(id='\ud800'), 'id', 'lone surrogate'),
    (_pair(margin='1'), 'margin', 'text, expected a number'),
    (_pair(margin=True), 'margin', 'a truth value, expected a number'),
    (_pair(margin=float('nan')), 'margin', 'nan, expected a finite number'),
    (_pair(margin=float('-inf')), 'margin', '-inf, expected a finite number'),
    (_pair(margin=HUGE), 'margin', 'an integer beyond all floats, expected a finite number'),
    (_pair(weight=-0.5), 'weight', '-0.5, expected a finite number in [0.0, inf]'),
    (_pair(weight=float('inf')), 'weight', 'inf, expected a finite number'),
    (_pair(weight=[1]), 'weight', 'a list, expected a number'),
    (_pair(preference=1.01), 'preference', '1.01, expected a finite number in [0.0, 1.0]'),
    (_pair(preference=-0.1), 'preference', '-0.1, expected a finite number in [0.0, 1.0]'),
    (_pair(preference=False), 'preference', 'a truth value, expected a number'),
    (_three(preference=0.5), 'preference', 'a soft label for 3 responses, expected 2'),
    ({'prompt': 'Q', 'response': 'a', 'preference': 1.0}, 'preference', '1 responses, expected 2'),
    (_three(responses=[]), 'responses', 'empty list, expected a list of at least one response'),
    (_three(responses='abc'), 'responses', 'text, expected a list of at least one response'),
    (_three(responses=None), 'responses', 'null, expected a list of at least one response'),
    (_three(responses=[' a', None]), 'responses[1]', 'null, expected text'),
    (_three(responses=[' a', '']), 'responses[1]', 'blank text, expected a response'),
    (_three(responses=[[YES], [{'role': 'x', 'content': ''}]], prompt=[USER]),
     'responses[1][0].role', "'x', expected one of"),
    ({'prompt': 'Q', 'response': ''}, 'response', 'blank text, expected a response'),
    ({'prompt': None, 'response': 'a'}, 'prompt', 'null, expected text'),
    (_three(ratings=[1, 2]), 'ratings', '2 numbers, expected one for each of 3 responses'),
    (_three(ratings=3), 'ratings', 'an integer, expected a list of 3 numbers'),
    (_three(ratings='123'), 'ratings', 'text, expected a list of 3 numbers'),
    (_three(ratings=[1, '2', 3]), 'ratings[1]', 'text, expected a finite number'),
    (_three(ratings=[1, 2, True]), 'ratings[2]', 'a truth value, expected a finite number'),
    (_three(ratings=[1, float('nan'), 3]), 'ratings[1]', 'nan, expected a finite number'),
    (_three(ratings=[HUGE, 2, 3]), 'ratings[0]', 'expected a finite number'),
    (_three(ranks=[0, 1]), 'ranks', '2 numbers, expected one for each of 3 responses'),
    (_three(ranks=[0, 1, None]), 'ranks[2]', 'null, expected an integer'),
    (_three(ranks=[0, 1.5, 2]), 'ranks[1]', 'a number, expected an integer'),
    (_three(ranks=[0, False, 2]), 'ranks[1]', 'a truth value, expected an integer'),
    (_three(preferred=3), 'preferred', '3, expected an index in 0..2'),
    (_three(preferred=-1), 'preferred', '-1, expected an index in 0..2'),
    (_three(preferred='0'), 'preferred', 'text, expected the index of a response'),
    (_three(preferred=True), 'preferred', 'a truth value, expected the index of a response'),
])
def test_malformed_rows_name_place_key_and_expectation(row, key, expected):
    with pytest.raises(MalformedRow) as error:
        parse_row(row, WHERE)
    message = str(error.value)
    assert message.startswith(WHERE)
    assert f"field '{key}': got " in message
    assert expected in message


@pytest.mark.parametrize(('row', 'key', 'expected'), [
    (_pair(annotator=True), 'annotator', 'a truth value, expected text or an integer'),
    (_pair(annotator=1.5), 'annotator', 'a number, expected text or an integer'),
    (_pair(annotator=['Ann']), 'annotator', 'a list, expected text or an integer'),
    (_pair(annotator=' '), 'annotator', 'blank text, expected a name'),
    (_pair(annotator='\ud800'), 'annotator', 'lone surrogate'),
    ({'prompt': 'Q', 'response': ' a', 'rating': '5'}, 'rating', 'text, expected a number'),
    ({'prompt': 'Q', 'response': ' a', 'rating': [5]}, 'rating', 'a list, expected a number'),
    ({'prompt': 'Q', 'response': ' a', 'rating': HUGE}, 'rating', 'beyond all floats, expected'),
    (HELPSTEER | {'verbosity': 'low'}, 'verbosity', 'text, expected a number'),
    (HELPSTEER | {'verbosity': True}, 'verbosity', 'a truth value, expected a number'),
    (HELPSTEER | {'style': float('inf')}, 'style', 'inf, expected a finite number'),
    (HELPSTEER | {'style': [1]}, 'style', 'a list, expected a number'),
    (_three(style=3), 'style', 'an integer, expected a list of 3 numbers'),
    (_three(style=[1, 2]), 'style', '2 numbers, expected one for each of 3 responses'),
    (_three(style=[1, None, 'x']), 'style[2]', 'text, expected a finite number'),
    (_three(style=[1, True, None]), 'style[1]', 'a truth value, expected a finite number'),
    (_three(style=[float('nan'), 1, 2]), 'style[0]', 'nan, expected a finite number'),
    (_pair(helpfulness=3), 'helpfulness', 'an integer, expected a list of 2 numbers'),
])
def test_malformed_judgements_name_place_key_and_expectation(row, key, expected):
    with pytest.raises(MalformedRow) as error:
        parse_row(row | {'id': 'q9'}, WHERE, attributes=NAMES)
    message = str(error.value)
    assert message.startswith(f"rows.jsonl:7 id=q9 field '{key}': got ")
    assert expected in message


@pytest.mark.parametrize('row', [None, 3, 'text', [1], True, float('nan'), []])
def test_rows_that_are_no_objects(row):
    with pytest.raises(MalformedRow, match=r"^rows\.jsonl:7: got .*, expected an object with"):
        parse_row(row, WHERE)


@pytest.mark.parametrize('row', [{}, {'prompt': 'Q'}, {'text': 'x', 'label': 1}])
def test_rows_without_responses(row):
    with pytest.raises(MalformedRow, match=r"^rows\.jsonl:7: keys .* make no comparison, expected"):
        parse_row(row, WHERE)


def test_errors_name_the_id_but_quote_no_content():
    with pytest.raises(MalformedRow, match=r"^rows\.jsonl:7 id=q9 field 'chosen'"):
        parse_row(_pair(id='q9', chosen=None), WHERE)
    secret = [[['private']]]
    for row in (_pair(chosen=secret), _pair(chosen=[{'role': secret, 'content': 'x'}])):
        with pytest.raises(MalformedRow) as error:
            parse_row(row, WHERE)
        assert 'private' not in str(error.value)


# Preferences.


def _comparison(k, **known):
    return Comparison('a', 'Q', tuple(f' {i}' for i in range(k)), 'g', **known)


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
    comparison = parse_row(_pair(), WHERE)
    np.testing.assert_array_equal(comparison.preference_matrix(), [[0, 1], [0, 0]])


# Files.


def test_rows_carry_file_and_line(tmp_path):
    path = _write(tmp_path, b'{"a": 1}\n\n  \t\n{"a": 2}\n')
    assert list(read_jsonl(path)) == [(f'{path}:1', {'a': 1}), (f'{path}:4', {'a': 2})]


@pytest.mark.parametrize('content', [
    b'{"a": "x"}\n{"a": "y"}\n',
    b'{"a": "x"}\n{"a": "y"}',  # no newline at the end
    b'\xef\xbb\xbf{"a": "x"}\n{"a": "y"}\n',  # byte order mark
    b'{"a": "x"}\r\n{"a": "y"}\r\n',
    b'\r\n{"a": "x"}\r\n\r\n{"a": "y"}\r\n\r\n',
    b'\n\n{"a": "x"}\n \n\t\n{"a": "y"}\n\n',
])
@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz'])
def test_byte_order_marks_line_ends_and_blank_lines_do_not_matter(tmp_path, content, suffix):
    content = gzip.compress(content, mtime=0) if suffix.endswith('.gz') else content
    assert _rows(_write(tmp_path, content, 'rows' + suffix)) == [{'a': 'x'}, {'a': 'y'}]


def test_other_line_separators_belong_to_the_text(tmp_path):
    text = 'a\u2028b\u2029c\x85d'
    content = json.dumps({'a': text}, ensure_ascii=False).encode() + b'\n'
    assert _rows(_write(tmp_path, content)) == [{'a': text}]


LFS = (b'version https://git-lfs.github.com/spec/v1\noid sha256:'
       + b'0' * 64 + b'\nsize 481129\n')
HTML = b'<!DOCTYPE html>\n<html><body>404</body></html>'


@pytest.mark.parametrize(('content', 'place', 'expected'), [
    (b'', '', 'the file has no rows'),
    (b'\n \r\n\n', '', 'the file has no rows'),
    (b'\xef\xbb\xbf', '', 'the file has no rows'),
    (b'{"a": 1}\n{"a": "\xff"}\n', ':2', 'not UTF-8'),
    ('{"a": "é"}\n'.encode('latin-1'), ':1', 'not UTF-8'),
    ('{"a": 1}\n'.encode('utf-16'), ':1', 'not UTF-8'),
    (gzip.compress(b'{"a": 1}\n', mtime=0), ':1', 'not UTF-8'),
    (b'{"a": 1}\n{"a": 2', ':2', 'the last line is cut'),
    (b'{"a": 1}\n\n{"a"', ':3', 'the last line is cut'),
    (LFS, ':1', 'got a Git LFS pointer, expected the file it points to'),
    (b'\xef\xbb\xbf' + LFS, ':1', 'got a Git LFS pointer'),
    (HTML, ':1', 'got a web page, expected one JSON object a line'),
    (b'\r\n  ' + HTML.lower(), ':1', 'got a web page'),
    (b'<?xml version="1.0"?>\n<Error/>\n', ':1', 'got a web page'),
    (b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', ":2 field 'a'", 'stands twice'),
    (b'{"a": {"role": "x", "role": "x"}}\n', ":1 field 'role'", 'stands twice'),
])
def test_files_that_cannot_be_trusted_stop(tmp_path, content, place, expected):
    path = _write(tmp_path, content)
    with pytest.raises(DataError) as error:
        _rows(path)
    assert not isinstance(error.value, MalformedRow)
    assert str(error.value).startswith(f'{path}{place}: ')
    assert expected in str(error.value)


@pytest.mark.parametrize(('content', 'expected'), [
    (b'', 'the file has no rows'),
    (b'{"a": 1}\n', 'damaged gzip archive'),
    (LFS, 'got a Git LFS pointer'),
    (HTML, 'got a web page'),
    (gzip.compress(b'', mtime=0), 'the file has no rows'),
    (gzip.compress(b'{"a": 1}\n', mtime=0) + b'garbage', 'damaged gzip archive'),
])
def test_files_that_are_no_archives_stop(tmp_path, content, expected):
    path = _write(tmp_path, content, 'rows.jsonl.gz')
    with pytest.raises(DataError) as error:
        _rows(path)
    assert str(error.value).startswith(path)
    assert expected in str(error.value)


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz'])
def test_missing_files_and_folders_stop(tmp_path, suffix):
    path = str(tmp_path / f'rows{suffix}')
    with pytest.raises(DataError, match='no such file') as error:
        _rows(path)
    assert path in str(error.value)
    (tmp_path / f'rows{suffix}').mkdir()
    with pytest.raises(DataError, match='no such file'):
        _rows(path)


def test_files_that_the_system_refuses_stop(tmp_path, monkeypatch):
    path = _write(tmp_path, b'{"a": 1}\n')

    def refuse(*_):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(comparisons, 'open', refuse, raising=False)
    with pytest.raises(DataError, match='cannot be read') as error:
        _rows(path)
    assert path in str(error.value)


def _archive():
    """Some rows that do not compress well, and their gzip archive."""
    rng = np.random.default_rng(0)
    rows = [{'chosen': str(rng.bytes(8).hex()), 'rejected': str(rng.integers(10**9))}
            for _ in range(8)]
    return rows, gzip.compress(b''.join(json.dumps(row).encode() + b'\n' for row in rows), mtime=0)


def test_archives_cut_anywhere_stop(tmp_path):
    rows, archive = _archive()
    assert _rows(_write(tmp_path, archive, 'rows.jsonl.gz')) == rows
    for length in range(len(archive)):
        path = _write(tmp_path, archive[:length], 'rows.jsonl.gz')
        with pytest.raises(DataError) as error:
            _rows(path)
        assert str(error.value).startswith(path), length


@pytest.mark.parametrize('flip', [0x01, 0x80, 0xFF])
def test_archives_with_a_flipped_byte_stop_or_are_read_unharmed(tmp_path, flip):
    rows, archive = _archive()
    messages = []
    for position in range(len(archive)):
        damaged = bytearray(archive)
        damaged[position] ^= flip
        path = _write(tmp_path, bytes(damaged), 'rows.jsonl.gz')
        try:
            assert _rows(path) == rows, position  # a time stamp, for example
        except DataError as error:
            messages.append(str(error))
    assert all(message.startswith(path) for message in messages)
    # Of the ten bytes of the header, six (time, compression level, system) may be anything.
    assert len(messages) >= len(archive) - 10


@pytest.mark.parametrize('line', [
    b'{"a": 1} {"a": 2}',  # two objects
    b'{"a": 1},',
    b"{'a': 1}",
    b'{"a": 1',
    b'{"a": tru}',
    b'{"a": "\x00"}',
    b'\x00',
    b'plain text',
    b'[' * 100_000 + b']' * 100_000,  # deeper than the interpreter's stack
    b'{"a":' * 100_000 + b'1' + b'}' * 100_000,
    b'{"a": ' + b'9' * 5000 + b'}',  # more digits than Python reads
])
def test_lines_that_are_not_json_are_left_to_the_caller(tmp_path, line):
    path = _write(tmp_path, b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    first, (where, error), last = read_jsonl(path)
    assert (first[1], last[1]) == ({'a': 1}, {'a': 3})
    assert where == f'{path}:2'
    assert isinstance(error, MalformedRow)
    assert str(error).startswith(f'{path}:2: not JSON')
    assert 'expected one object a line' in str(error)


@pytest.mark.parametrize('value', ['NaN', 'Infinity', '-Infinity', '1e999', '9' * 400])
@pytest.mark.parametrize('key', ['margin', 'weight', 'preference'])
def test_number_literals_beyond_the_finite_are_malformed(tmp_path, key, value):
    path = _write(tmp_path, f'{{"chosen": "a", "rejected": "b", "{key}": {value}}}\n'.encode())
    [(where, row)] = read_jsonl(path)
    with pytest.raises(MalformedRow, match='expected a finite number') as error:
        parse_row(row, where)
    assert f"{path}:1 field '{key}'" in str(error.value)


def test_escaped_lone_surrogates_are_malformed(tmp_path):
    path = _write(tmp_path, b'{"chosen": "a", "rejected": "\\ud83d"}\n'
                            b'{"chosen": "a", "rejected": "\\ud83d\\ude00"}\n')
    (where, row), good = read_jsonl(path)
    with pytest.raises(MalformedRow, match='lone surrogate'):
        parse_row(row, where)
    assert parse_row(good[1], good[0]).responses == ('a', '\N{GRINNING FACE}')


# Generated rows: a valid row, then one field of it changed.


def _valid_row(rng):
    def text():
        return ''.join(rng.choice(list('abc é\n?'), rng.integers(1, 9))) + 'x'

    def chat(turns):
        roles = ('user', 'assistant')
        return [{'role': roles[i % 2], 'content': text()} for i in range(turns)]

    k = int(rng.integers(1, 4))
    form = rng.integers(5)
    if form == 0:
        question = f'\n\nHuman: {text()}\n\nAssistant: '
        row = {'chosen': question + text(), 'rejected': question + text()}
    elif form == 1:
        row = {'prompt': text(), 'chosen': text(), 'rejected': text(),
               'preference': float(rng.random())}
    elif form == 2:
        prompt = chat(2 * int(rng.integers(2)) + 1)
        row = {'prompt': prompt, 'chosen': [{'role': 'assistant', 'content': text()}],
               'rejected': [{'role': 'assistant', 'content': text()}]}
    elif form == 3:
        row = {'prompt': text(), 'responses': [text() for _ in range(k)],
               'ratings': [None if rng.random() < 0.2 else float(rng.normal()) for _ in range(k)]}
    else:
        row = {'prompt': chat(1), 'responses': [text() for _ in range(k)],
               'ranks': rng.integers(0, 3, k).tolist(), 'preferred': int(rng.integers(k))}
    return row | {'id': str(rng.integers(10**9)), 'margin': float(rng.normal()), 'weight': 2}


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES = (
    None, '', ' ', 'text', '\x00', '\ud800', 0, 1, -1, 0.5, HUGE, float('nan'), float('inf'), True,
    [], {}, [None], [[]], ['a'], ['a', 'b'], [0, 1], [USER], [YES], [USER, YES], _nested(200),
    [{'role': 'robot', 'content': 'x'}], [{'role': 'user'}], [{'role': {}, 'content': []}],
)


def _changed(row, rng):
    """The row with one of its fields, or a part of one, replaced or removed."""
    row = json.loads(json.dumps(row))
    key = list(row)[rng.integers(len(row))]
    odd = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    way = rng.integers(5)
    if way == 0:
        del row[key]
    elif way == 1:
        row[['rejected', 'ranks', 'extra', 'preference', 'ratings'][rng.integers(5)]] = odd
    elif way == 2 and isinstance(row[key], list):
        row[key][rng.integers(len(row[key]))] = odd
    elif way == 3 and isinstance(row[key], list):
        row[key] = row[key][:-1]
    else:
        row[key] = odd
    return row


def test_generated_rows_are_accepted_or_malformed_and_nothing_else(tmp_path):
    rng = np.random.default_rng(5)
    rows = [_valid_row(rng) for _ in range(600)]
    for row in rows:
        assert parse_row(row, WHERE).id == row['id']

    lines = (json.dumps(_changed(row, rng)) for row in rows)
    path = _write(tmp_path, '\n'.join(lines).encode())
    accepted, malformed = 0, []
    for number, (where, row) in enumerate(read_jsonl(path), start=1):
        try:
            comparison = parse_row(row, where)
        except MalformedRow as error:
            malformed.append((f'{path}:{number}', str(error)))
            continue
        accepted += 1
        matrix = comparison.preference_matrix()
        k = len(comparison.responses)
        assert k >= 1
        assert matrix.shape == (k, k)
        assert not matrix.diagonal().any()
        assert set(np.unique(matrix + matrix.T).round(6)) <= {0.0, 1.0}
        assert np.isfinite([comparison.margin, comparison.weight]).all()
        texts = [comparison.id, comparison.prompt, comparison.responses, comparison.group]
        json.dumps(texts, ensure_ascii=False).encode()
    for where, message in malformed:
        assert message.startswith(where)
        assert 'expected' in message
    assert accepted + len(malformed) == len(rows)
    assert min(accepted, len(malformed)) >= 0.3 * len(rows)


# The report.


def test_report_by_hand():
    report = DataReport(
        'file.jsonl', 'train', read=10, kept=7, truncated=2, identical=1, tied=3,
        dropped=collections.Counter({'identical responses': 1, 'malformed row': 2}),
        notes=collections.Counter({'repeats an earlier row': 4}),
        dialogue_tokens=200, packed_tokens=150, prompt_tokens=100,
    )
    assert report.as_dict() == {
        'source': 'file.jsonl', 'split': 'train', 'read': 10, 'kept': 7,
        'dropped': {'identical responses': 1, 'malformed row': 2}, 'truncated': 2, 'identical': 1,
        'tied': 3, 'notes': {'repeats an earlier row': 4}, 'dialogue_tokens': 200,
        'packed_tokens': 150, 'prompt_tokens': 100, 'prefix_share': 0.5, 'tokens_saved': 50,
    }
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert report.format().splitlines() == [
        'train: 10 read, 7 kept, 3 dropped, 2 truncated, 1 identical, 3 tied; 200 tokens, '
        '50% in shared prompts, 25% saved by storing them once (file.jsonl)',
        '  dropped 1: identical responses',
        '  dropped 2: malformed row',
        '  note 4: repeats an earlier row',
    ]


def test_an_empty_report_has_no_shares():
    assert DataReport('x', 'test').as_dict()['prefix_share'] == 0.0
    assert '0 read, 0 kept' in DataReport('x', 'test').format()


def test_conversations_that_begin_with_the_prompt_are_not_doubled():
    user, good, bad = ({'role': r, 'content': c} for r, c in (
        ('user', 'why?'), ('assistant', 'so'), ('assistant', 'no')))
    whole = parse_row({'prompt': [user], 'chosen': [user, good], 'rejected': [user, bad]}, 'f:1')
    rest = parse_row({'prompt': [user], 'chosen': [good], 'rejected': [bad]}, 'f:1')
    assert whole == rest
    assert whole.responses == ((good,), (bad,))


def test_texts_that_begin_alike_are_not_one_group():
    first, second = (parse_row({'chosen': f'The cat {i} sat', 'rejected': f'The dog {i} ran'},
                               f'f:{i}') for i in range(2))
    assert first.group != second.group
