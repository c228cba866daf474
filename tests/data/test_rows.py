"""Tests of rows: what is read of them, and what is wrong with them."""

import json

import numpy as np
import pytest

from qrm.data.comparisons import Comparison, MalformedRow
from qrm.data.files import read_rows
from qrm.data.rows import as_chat, opening, parse_row

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
    ({'chosen': 'yes', 'rejected': 'no'}, '', ('yes', 'no'), None),
    (_pair(), 'Q', (' good', ' bad'), 'Q'),
    (_pair(prompt=None), '', (' good', ' bad'), None),
    (_pair(prompt=''), '', (' good', ' bad'), None),
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
    # All of a message is kept, but for what is null.
    (
        {'prompt': [USER | {'name': 'Ann', 'extra': None}], 'response': 'Yes'},
        (USER | {'name': 'Ann'},), ((YES,),), 'Hi',
    ),
])
def test_rows_become_comparisons(row, prompt, responses, group):
    comparison = parse_row(row, WHERE)
    assert comparison.id == WHERE
    assert comparison.prompt == prompt
    assert comparison.responses == responses
    assert comparison.has_opening == (group is not None)
    assert group in (None, comparison.group)


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


@pytest.mark.parametrize('row', [
    {'prompt': 'Q', 'responses': ['', ' a']},
    _pair(rejected=' \n\t'),
    {'prompt': 'Q', 'response': ''},
    {'chosen': '\n\nHuman: Q\n\nAssistant: a', 'rejected': '\n\nHuman: Q\n\nAssistant:'},
])
def test_blank_responses_are_kept_and_noted_in_every_form(row):
    comparison = parse_row(row, WHERE)
    assert not all(response.strip() for response in comparison.responses)
    assert comparison.remarks == ('blank response',)


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
    (_pair(id='a', margin=1.0, preference=0.5, weight=1.0, group='b'), []),
    # In their order, whatever Python's hash seed is.
    (_pair(source='web', score_chosen=3, a=0), ['source', 'score_chosen', 'a']),
    (_pair(source=None), []),
    # Keys of other forms of rows are not read either.
    (_pair(ratings=[1, 2], preferred=1), ['ratings', 'preferred']),
    (_pair(responses=['a', 'b']), ['responses']),
    (_three(ratings=[1, 2, 3], ranks=[0, 1, 2], preferred=0), []),
    (_three(response='x'), ['response']),
    ({'prompt': 'Q', 'response': 'x', 'ranks': [0]}, ['ranks']),
    # A prompt beside another one, tools of texts, and a text that is none of the chats' messages.
    (_pair(question='Q?', messages=[USER]), ['question', 'messages']),
    (_pair(tools=[{'name': 'f'}]), ['tools']),
    ({'prompt': 'Hello', 'chosen': [USER, YES], 'rejected': [USER, NO]}, ['prompt']),
    ({'prompt': 'Hi', 'chosen': [USER, YES], 'rejected': [USER, NO]}, []),
])
def test_keys_that_are_not_read_are_named(row, expected):
    assert parse_row(row, WHERE).remarks == tuple(f'key {key!r} not used' for key in expected)


def test_attributes_and_annotators_are_keys_that_are_read():
    def unread(row, attributes=()):
        return parse_row(row, WHERE, attributes=attributes).remarks

    assert unread(HELPSTEER) == (
        "key 'helpfulness' not used", "key 'correctness' not used", "key 'verbosity' not used")
    assert unread(HELPSTEER, NAMES) == ("key 'correctness' not used",)
    assert unread(_pair(annotator='Ann', rating=3, style=[1, 2]), ('style',)) == (
        "key 'rating' not used",)
    assert unread({'prompt': 'Q', 'response': 'x', 'rating': 3}) == ()


CALL = {'role': 'assistant', 'content': '', 'tool_calls': [{'function': {'name': 'f'}}]}
RESULT = {'role': 'tool', 'content': '12', 'tool_call_id': 'c1'}


# Where a prompt stands, and what it is then.


@pytest.mark.parametrize(('row', 'prompt'), [
    ({'question': 'Why?'}, 'Why?'),
    ({'query': 'Why?'}, 'Why?'),
    ({'instruction': 'Do it.'}, 'Do it.'),
    ({'instruction': 'Do it.', 'input': 'This.'}, 'Do it.\nThis.'),
    ({'instruction': 'Do it.', 'input': ' '}, 'Do it.'),
    ({'messages': [USER]}, (USER,)),
    ({'conversations': [{'from': 'human', 'value': 'Hi'}]}, (USER,)),
    ({'context': [{'from': 'user', 'content': 'Hi'}, YES, USER]}, (USER, YES, USER)),
    ({'system': 'Be kind.', 'question': 'Hi'}, (SYSTEM, USER)),
    ({'system': 'Be kind.', 'prompt': 'Hi'}, (SYSTEM, USER)),
    ({'system': 'Be kind.', 'prompt': [USER]}, (SYSTEM, USER)),
    ({'system': '', 'prompt': 'Hi'}, 'Hi'),
    # 'prompt' goes before all others.
    ({'question': 'Hi', 'prompt': 'Why?'}, 'Why?'),
])
@pytest.mark.parametrize('form', ['pair', 'responses', 'response'])
def test_prompts_under_other_keys(row, prompt, form):
    rest = {'pair': {'chosen': 'Yes', 'rejected': 'No'}, 'responses': {'responses': ['Yes', 'No']},
            'response': {'response': 'Yes'}}[form]
    found = parse_row(row | rest, WHERE)
    assert found.prompt == prompt
    assert found.responses[0] == ('Yes' if isinstance(prompt, str) else (YES,))
    assert not [remark for remark in found.remarks if 'question' not in remark]


@pytest.mark.parametrize(('row', 'key', 'expected'), [
    (_pair(prompt=None, history='Why?'), 'history', 'what may be the prompt'),
    (_pair(prompt='', history='Why?'), 'history', 'what may be the prompt'),
    (_pair(prompt=None, instruction='Do.', history=[['a', 'b']]), 'history', 'or a part of it'),
    (_pair(prompt=None, question='Why?', context='It is so.'), 'context', 'or a part of it'),
    (_pair(prompt=None, question='Why?', input='It is so.'), 'input', 'or a part of it'),
    (_pair(prompt=None, system='Be.'), 'system', 'what may be the prompt'),
    ({'chosen': [USER, YES], 'rejected': [USER, NO], 'system': 'Be.'}, 'system', 'expected it in'),
    # Some are whole and some are not.
    ({'prompt': '\n\nHuman: Q\n\nAssistant:', 'responses': [
        '\n\nHuman: Q\n\nAssistant: a', ' b']}, 'prompt', 'some responses begin with and others'),
    ({'prompt': [USER], 'responses': [[USER, YES], [NO]]}, 'prompt', 'some responses begin with'),
    # What prints lists without commas, and keys in another order.
    (_pair(chosen="[{'content': 'x', 'role': 'user'}\n {'content': 'y', 'role': 'assistant'}]"),
     'chosen', 'the list itself'),
    (_pair(chosen='[{"id": 1, "role": "user", "content": "x"}]'), 'chosen', 'the list itself'),
    (_pair(chosen=[USER, {'role': 'assistant', 'content': [{'type': 'image', 'text': ''}]}]),
     'chosen[1].content[0]', "a part of type 'image'"),
    (_pair(chosen=[USER, YES | {'reasoning': {'\ud800': 1}}]), 'chosen[1].reasoning key',
     'lone surrogate'),
    (_pair(chosen=[USER, YES | {'tool_calls': {'name': 'f'}}]), 'chosen[1].tool_calls',
     'an object, expected a list of objects'),
    (_pair(chosen=[USER, YES | {'tool_calls': 'f()'}]), 'chosen[1].tool_calls',
     'text, expected a list of objects'),
    (_pair(chosen=[USER, YES | {'tool_calls': '["f"]'}]), 'chosen[1].tool_calls[0]',
     'text, expected an object'),
    ({'prompt': [USER], 'response': 'x', 'tools': '5'}, 'tools', 'an integer as text'),
    (_pair(prompt=None, context='Why?'), 'context', 'what may be the prompt'),
    (_pair(prompt=None, input='Why?'), 'input', 'what may be the prompt'),
    (_pair(prompt=None, question='Why?', messages=[USER]), 'question', 'a second prompt beside'),
    (_pair(prompt=None, question='A', instruction='B'), 'instruction', 'a second prompt beside'),
    (_pair(prompt=None, question=[USER]), 'question', 'a list, expected text'),
    (_pair(prompt=[SYSTEM, USER], system='Be.'), 'system', 'expected one of them'),
    (_pair(prompt='\n\nHuman: Q\n\nAssistant:', system='Be.'), 'system', 'in turns of text'),
    (_pair(system=3), 'system', 'an integer, expected text'),
    # Whole dialogues of which one does not begin with the prompt, or none does.
    ({'prompt': [USER], 'chosen': [USER, YES], 'rejected': [NO]}, 'prompt', 'and others do not'),
    ({'prompt': [SYSTEM, USER], 'responses': [[USER, YES], [USER, NO]]}, 'prompt', 'of their own'),
    ({'prompt': [SYSTEM, USER], 'response': [SYSTEM, YES]}, 'prompt', 'of their own'),
    # Texts that are no texts.
    (_pair(chosen='[{"role": "assistant", "content": "Yes"}]'), 'chosen', 'the list itself'),
    (_pair(rejected="[{'role': 'assistant', 'content': 'Yes'}]"), 'rejected', 'the list itself'),
    ({'prompt': 'Q', 'response': ' {"from": "gpt", "value": "x"}'}, 'response', 'the list itself'),
    (_three(responses=['a', '[{"content": "x", "role": "user"}]', 'b']), 'responses[1]',
     'the list itself'),
    # Messages.
    (_pair(chosen=[USER, {'role': 'assistant', 'content': [{'type': 'image'}]}]),
     'chosen[1].content[0]', "a part of type 'image', expected a part of type 'text'"),
    (_pair(chosen=[{'from': 'function_call', 'value': 'x'}]), 'chosen[0].from', 'expected one of'),
    (_pair(chosen=[USER, {'role': 'assistant'}]), 'chosen[1].content', 'nothing (the key is'),
    (_pair(chosen=[USER, YES | {'reasoning': [['\ud800']]}]), 'chosen[1].reasoning.0.0',
     'lone surrogate'),
    ({'prompt': [USER], 'response': 'x', 'tools': 'f()'}, 'tools', 'expected a list of objects'),
    ({'prompt': [USER], 'response': 'x', 'tools': ['f']}, 'tools[0]', 'text, expected an object'),
])
def test_ambiguous_rows_are_refused(row, key, expected):
    with pytest.raises(MalformedRow) as error:
        parse_row(row, WHERE)
    assert str(error.value).startswith(f"{WHERE} field '{key}': got ")
    assert expected in str(error.value)


def test_messages_that_are_too_deep_are_refused():
    deep = _nested(100)
    with pytest.raises(MalformedRow, match='more than 32 levels'):
        parse_row({'prompt': [USER | {'reasoning': deep}], 'response': 'x'}, WHERE)


@pytest.mark.parametrize(('prompt', 'repeated'), [
    ('\n\nHuman: Q\n\nAssistant:', True),
    ('What is it?', True),
    ('Supercalifragilistic', True),
    ('Hi', False),
    ('Hi there', False),
])
@pytest.mark.parametrize('form', ['pair', 'responses', 'response'])
def test_texts_that_begin_with_their_prompt_hold_it_once(prompt, repeated, form):
    texts = [f'{prompt} good', f'{prompt} bad']
    row = {'prompt': prompt, **{'pair': {'chosen': texts[0], 'rejected': texts[1]},
                                'responses': {'responses': texts},
                                'response': {'response': texts[0]}}[form]}
    found = parse_row(row, WHERE)
    assert found.prompt == prompt
    assert found.responses[0] == (' good' if repeated else texts[0])
    # Either way it is said.
    assert ['begin with' in remark for remark in found.remarks] == [True]


def test_a_text_that_one_response_begins_with_is_its_own():
    row = {'prompt': 'What is it?', 'chosen': 'What is it? A cat.', 'rejected': 'No.'}
    found = parse_row(row, WHERE)
    assert found.responses == ('What is it? A cat.', 'No.')
    assert found.remarks == ('responses begin with the prompt, and are taken to repeat it',)
    # Of all of them one may be blank.
    found = parse_row(row | {'rejected': 'What is it?'}, WHERE)
    assert found.responses == (' A cat.', '')


def test_chats_of_other_trainers():
    turns = [{'from': 'system', 'value': 'Be kind.'}, {'from': 'human', 'value': 'Hi'}]
    row = {'conversations': turns, 'chosen': {'from': 'gpt', 'value': 'Yes'},
           'rejected': {'role': 'assistant', 'content': [{'type': 'text', 'text': 'N'},
                                                         {'type': 'text', 'text': 'o'}]}}
    found = parse_row(row, WHERE)
    assert (found.prompt, found.responses) == ((SYSTEM, USER), ((YES,), (NO,)))
    developer = {'role': 'developer', 'content': 'Be kind.'}
    assert parse_row({'prompt': [developer, USER], 'response': 'Yes'}, WHERE).prompt == (
        developer, USER)


def test_all_that_messages_hold_is_kept_for_the_template():
    tools = [{'type': 'function', 'function': {'name': 'f'}}]
    call = CALL | {'content': None}
    row = {'prompt': [USER, call, RESULT], 'response': YES | {'reasoning': 'because'},
           'tools': json.dumps(tools)}
    found = parse_row(row, WHERE)
    assert found.prompt == (USER, call, RESULT)  # templates ask whether the content is none
    assert found.responses == ((YES | {'reasoning': 'because'},),)
    assert found.tools == tuple(tools)
    assert not found.remarks
    assert parse_row(row | {'tools': tools}, WHERE) == found
    # As tables of texts have it: a template would print a call for each letter.
    as_text = call | {'tool_calls': json.dumps(call['tool_calls'])}
    assert parse_row(row | {'prompt': [USER, as_text, RESULT]}, WHERE) == found
    # What calls nothing must say something.
    with pytest.raises(MalformedRow, match=r"prompt\[1\]\.content': got null"):
        parse_row(row | {'prompt': [USER, call | {'tool_calls': []}]}, WHERE)


def test_whole_floats_are_ranks_and_indices():
    found = parse_row(_three(ranks=[1.0, 2.0, 0.0], preferred=2.0), WHERE)
    assert (found.ranks, found.preferred) == ((1, 2, 0), 2)
    assert all(isinstance(rank, int) for rank in (*found.ranks, found.preferred))


def test_a_group_can_be_named():
    assert parse_row(_pair(group='p1'), WHERE).group == 'p1'
    assert parse_row(_pair(group=7), WHERE).group == '7'
    assert parse_row(_pair(group=7.0, id=3.0), WHERE).group == '7'  # of a column with gaps
    with pytest.raises(MalformedRow, match="field 'id': got a number, expected text or an integer"):
        parse_row(_pair(id=7.5), WHERE)
    assert parse_row(_pair(group=''), WHERE).group == 'Q'


def test_digests_know_texts_in_any_order():
    first, second = (parse_row(row, WHERE) for row in (
        _pair(), _pair(chosen=' bad', rejected=' good')))
    assert first.text_digest() == second.text_digest()
    assert first.text_digest() != parse_row(_pair(prompt='R'), WHERE).text_digest()
    assert first.text_digest() != parse_row(_pair(prompt=[USER]), WHERE).text_digest()
    assert parse_row(_pair(prompt='row your boat'), WHERE).has_opening
    # A row without a question is a group of its own, wherever it stands.
    alone = [parse_row({'chosen': 'a', 'rejected': 'b'}, where).group for where in 'xy']
    assert alone[0] == alone[1]


# Rows that cannot: where, which key, and what was expected.


@pytest.mark.parametrize(('row', 'key', 'expected'), [
    (_without(_pair(), 'chosen'), 'chosen', 'nothing (the key is missing), expected text'),
    (_without(_pair(), 'rejected'), 'rejected', 'nothing (the key is missing), expected text'),
    (_without(_three(), 'prompt'), 'prompt', 'nothing (the key is missing), expected text'),
    ({'response': 'a'}, 'prompt', 'nothing (the key is missing), expected text'),
    (_pair(chosen=None), 'chosen', 'null, expected text'),
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
    (_pair(chosen=[{'content': 'x'}]), 'chosen[0].role', 'nothing (the key is missing), expected'),
    (_pair(chosen=[{'role': ['user'], 'content': 'x'}]), 'chosen[0].role', 'a list, expected one'),
    (_pair(chosen=[USER, {'role': 'user'}]), 'chosen[1].content', 'nothing (the key is'),
    (_pair(chosen=[USER, {'role': 'user', 'content': ['x']}]), 'chosen[1].content[0]',
     "text, expected a part of type 'text'"),
    (_pair(chosen=[USER, {'role': 'user', 'content': []}]), 'chosen[1].content',
     'empty list, expected text'),
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
    (_three(responses=[[YES], [{'role': 'x', 'content': ''}]], prompt=[USER]),
     'responses[1][0].role', "'x', expected one of"),
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


@pytest.mark.parametrize('value', ['NaN', 'Infinity', '-Infinity', '1e999', '9' * 400])
@pytest.mark.parametrize('key', ['margin', 'weight', 'preference'])
def test_number_literals_beyond_the_finite_are_malformed(tmp_path, key, value):
    path = _write(tmp_path, f'{{"chosen": "a", "rejected": "b", "{key}": {value}}}\n'.encode())
    [(where, row)] = read_rows(path)
    with pytest.raises(MalformedRow, match='expected a finite number') as error:
        parse_row(row, where)
    assert f"{path}:1 field '{key}'" in str(error.value)


def test_escaped_lone_surrogates_are_malformed(tmp_path):
    path = _write(tmp_path, b'{"chosen": "a", "rejected": "\\ud83d"}\n'
                            b'{"chosen": "a", "rejected": "\\ud83d\\ude00"}\n')
    (where, row), good = read_rows(path)
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
    for number, (where, row) in enumerate(read_rows(path), start=1):
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


# Texts as chats.


def _said(*messages):
    return tuple({'role': 'assistant' if role == 'A' else 'user', 'content': content}
                 for role, content in messages)


@pytest.mark.parametrize(('row', 'prompt', 'responses'), [
    ({'chosen': '\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant: So.',
      'rejected': '\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant: No.\n\nHuman: Oh'},
     [('U', 'Hi'), ('A', 'Yes?'), ('U', 'Why')],
     [[('A', 'So.')], [('A', 'No.'), ('U', 'Oh')]]),
    # Nothing in common but a mark.
    ({'chosen': '\n\nHuman: Hi\n\nAssistant: a', 'rejected': '\n\nHuman: Ho\n\nAssistant: b'},
     [], [[('U', 'Hi'), ('A', 'a')], [('U', 'Ho'), ('A', 'b')]]),
    ({'prompt': '\n\nHuman: Q\n\nAssistant:', 'responses': [' a', '']}, [('U', 'Q')],
     [[('A', 'a')], [('A', '')]]),
    ({'prompt': ' Why? ', 'response': ' So.\n'}, [('U', 'Why?')], [[('A', 'So.')]]),
    # A mark inside of a text is a text.
    ({'prompt': 'Say\n\nHuman: x', 'response': 'y'}, [('U', 'Say\n\nHuman: x')], [[('A', 'y')]]),
    ({'prompt': [USER], 'response': 'Yes'}, [('U', 'Hi')], [[('A', 'Yes')]]),
])
def test_texts_as_chats(row, prompt, responses):
    read = parse_row(row, WHERE)
    found = as_chat(read)
    assert found.prompt == _said(*prompt)
    assert found.responses == tuple(_said(*response) for response in responses)
    assert (found.id, found.group, found.ranks) == (read.id, read.group, read.ranks)


@pytest.mark.parametrize(('prompt', 'expected'), [
    ('\n\nHuman: Q', 'do not end in'), ('Human: Q\n\nAssistant:', 'do not begin with')])
def test_turns_that_no_response_can_follow_are_refused(prompt, expected):
    row = parse_row({'prompt': prompt, 'response': 'x'}, WHERE)
    with pytest.raises(MalformedRow, match=f"field 'prompt': got turns that {expected}"):
        as_chat(row)
