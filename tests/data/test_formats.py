"""Every format on a row as its data set has it, recognised and named, and what is refused."""

import json
import re

import pytest

from qrm.data import formats, translate
from qrm.data.comparisons import DataError, MalformedRow
from qrm.data.files import read_rows
from qrm.data.rows import parse_row
from tests.helpers import ROOT

SHARED = ROOT.parent / 'shared'


def turns(*texts):
    return [{'role': ('user', 'assistant')[i % 2], 'content': text}
            for i, text in enumerate(texts)]


def answers(*texts):
    return [[{'role': 'assistant', 'content': text}] for text in texts]


def said(text):
    return f'\n\nHuman: {text}\n\nAssistant:'


HELPSTEER = {'prompt': 'Why?', 'response': 'So.', 'helpfulness': 3, 'correctness': 4,
             'coherence': 4, 'complexity': 1, 'verbosity': 0}
TLDR = {'id': 't3_1', 'post': 'It rained.', 'title': 'Rain', 'subreddit': 'weather',
        'site': None, 'article': None}
ARENA = {'question_id': 'q', 'model_a': 'a', 'model_b': 'b', 'language': 'English', 'turn': 1,
         'conversation_a': turns('Hi', 'Ho'), 'conversation_b': turns('Hi', 'Hu')}
STRENGTH = {'chosen': ['Hi', 'Ho', 'Why?', 'So.'], 'rejected': ['Hi', 'Ho', 'Why?', 'No.'],
            'chosen score list': [2.0, 1.0, 0.5, 1.5], 'GPT4 label': 1,
            'rejected score list': [1.0, 1.5, 0.0, 1.5], 'mean preference difference': 0.25,
            'std preference difference': 0.6}
PKU = {'prompt': 'Why?', 'response_0': 'So.', 'response_1': 'No.', 'is_response_0_safe': True,
       'is_response_1_safe': True, 'better_response_id': 1, 'safer_response_id': 0}
ULTRA = {'source': 's', 'instruction': 'Why?', 'completions': [
    {'response': text, 'overall_score': overall, 'fine-grained_score': fine, 'annotations': {
        name: {'Rating': rating, 'Rationale': ''} for name in (
            'helpfulness', 'honesty', 'instruction_following', 'truthfulness')}}
    for text, overall, fine, rating in (('So.', 10.0, 2.5, '3'), ('No.', 7.5, 4.5, 'N/A'))]}
PREFERENCE2 = {'prompt': 'Why?', 'response_1': 'So.', 'response_2': 'No.',
               'preference_strength': -2, 'all_preferences_unprocessed': [
                   {'strength': -3, 'justification': ''}, {'strength': 0, 'justification': ''},
                   {'strength': 1, 'justification': ''}, {'strength': -2, 'justification': ''},
                   {'strength': -100, 'justification': ''}],
               'three_most_similar_preferences': [
                   {'strength': -3, 'statement': ''}, {'strength': 1, 'statement': ''},
                   {'strength': -2, 'statement': ''}]}

# Format -> a row, and what is read of it: prompt, responses, and all else that is said.
ROWS = {
    'alpaca-eval': (
        {'instruction': 'Why?', 'output_1': 'So.', 'output_2': 'No.', 'preference': 1.25,
         'generator_1': 'a', 'annotator': 'gpt4'},
        said('Why?'), [' So.', ' No.'], {'preference': 0.75, 'annotator': 'gpt4'}),
    'arena-55k': (
        {'id': 7, 'model_a': 'a', 'model_b': 'b', 'prompt': '["Hi", "Why?"]',
         'response_a': '["Ho", "So."]', 'response_b': '["Ho", "No."]', 'winner_model_a': 0,
         'winner_model_b': 1, 'winner_tie': 0},
        turns('Hi', 'Ho', 'Why?'), answers('So.', 'No.'),
        {'preferred': 1, 'id': '7'}),
    'arena': (
        ARENA | {'winner': 'tie (bothbad)'}, turns('Hi'),
        answers('Ho', 'Hu'), {'ranks': (0, 0)}),
    'helpsteer': (
        HELPSTEER, said('Why?'), [' So.'], {'attributes': {'helpfulness': (3.0,)}}),
    'helpsteer2-preference': (
        PREFERENCE2, said('Why?'), [' So.', ' No.'], {'preference': 2.0 / 3.0}),
    'helpsteer2-preference:all': (
        PREFERENCE2, said('Why?'), [' So.', ' No.'], {'preference': 0.625}),
    'helpsteer2-preference:overall': (
        PREFERENCE2, said('Why?'), [' So.', ' No.'], {'preferred': 0}),
    'helpsteer3': (
        {'domain': 'general', 'language': 'english', 'context': turns('Why?'), 'response1': 'So.',
         'response2': 'No.', 'overall_preference': 2, 'individual_preference': [
             {'score': 2, 'reasoning': ''}, {'score': 3, 'reasoning': ''},
             {'score': 1, 'reasoning': ''}]},
        turns('Why?'), answers('So.', 'No.'),
        {'preferred': 1}),
    'hh-strength': (
        STRENGTH, '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Why?\n\nAssistant:', [' So.', ' No.'],
        {'preferred': 0}),
    'hh-strength:models': (
        STRENGTH, '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Why?\n\nAssistant:', [' So.', ' No.'],
        {'preference': 0.625}),  # 1, 0, 1 and a tie
    'judgebench': (
        {'pair_id': 'p', 'original_id': 'o', 'source': 's', 'question': 'Why?',
         'response_model': 'm', 'response_A': 'So.', 'response_B': 'No.', 'label': 'B>A'},
        said('Why?'), [' So.', ' No.'], {'preferred': 1, 'id': 'p'}),
    'kto': (
        {'prompt': 'Why?', 'completion': 'So.', 'label': True}, said('Why?'), [' So.'],
        {'ratings': (1.0,)}),
    'kto-chats': (
        {'messages': turns('Why?', 'So.'), 'label': False}, turns('Why?'),
        answers('So.'), {'ratings': (0.0,)}),
    'llmbar': (
        {'input': 'Why?', 'output_1': 'So.', 'output_2': 'No.', 'label': 2}, said('Why?'),
        [' So.', ' No.'], {'preferred': 1}),
    'mt-bench': (
        {'question_id': 81, 'model_a': 'a', 'model_b': 'b', 'winner': 'model_b',
         'judge': 'author_2', 'conversation_a': turns('Hi', 'Ho', 'Why?', 'So.'),
         'conversation_b': turns('Hi', 'Hu', 'Why?', 'No.'), 'turn': 1},
        turns('Hi'), answers('Ho', 'Hu'),
        {'preferred': 1, 'annotator': 'author_2', 'group': '81'}),
    'multipref': (
        {'comparison_id': 'c', 'prompt_id': 'p', 'text': 'Why?', 'completion_a': 'So.',
         'completion_b': 'No.', 'model_a': 'a', 'normal_worker_annotations': [
             {'evaluator': 'u', 'overall_pref': 'A-is-clearly-better'},
             {'evaluator': 'v', 'overall_pref': 'Tie'}],
         'expert_worker_annotations': [{'evaluator': 'w', 'overall_pref': 'B-is-slightly-better'},
                                       {'evaluator': 'x', 'overall_pref': 'A-is-slightly-better'}]},
        said('Why?'), [' So.', ' No.'], {'preference': 0.625, 'id': 'c', 'group': 'p'}),
    'nectar': (
        {'prompt': '\n\nHuman: Why?\n\nAssistant: ', 'turns': 1, 'num_responses': 3, 'answers': [
            {'answer': text, 'model': 'm', 'rank': rank}
            for text, rank in (('So.', 2.0), ('No.', 1.0), ('Hm.', 3.0))]},
        said('Why?'), [' So.', ' No.', ' Hm.'], {'ranks': (2, 1, 3)}),
    'oasst': (
        {'message_tree_id': 't', 'tree_state': 'ready_for_export', 'prompt': {
            'message_id': 't', 'text': 'Why?', 'role': 'prompter', 'replies': [
                {'message_id': 'a', 'text': 'So.', 'role': 'assistant', 'rank': 1, 'replies': []},
                {'message_id': 'b', 'text': 'No.', 'role': 'assistant', 'rank': 0, 'replies': []},
                {'message_id': 'c', 'text': 'Hm.', 'role': 'assistant', 'rank': None}]}},
        turns('Why?'), answers('So.', 'No.'),
        {'ranks': (1, 0), 'id': 't', 'group': 't'}),
    'pandalm': (
        {'idx': 3, 'motivation_app': 'm', 'instruction': 'Add.', 'input': '1 1', 'response1': '2',
         'response2': '3', 'annotator1': 1, 'annotator2': 0, 'annotator3': 1},
        said('Add.\n1 1'), [' 2', ' 3'], {'preference': 2.5 / 3.0, 'id': '3'}),
    'pku-saferlhf:better': (PKU, said('Why?'), [' So.', ' No.'], {'preferred': 1}),
    'pku-saferlhf:safer': (PKU, said('Why?'), [' So.', ' No.'], {'preferred': 0}),
    'ppe-preference': (
        {'question_id': 'q', 'model_a': 'a', 'model_b': 'b', 'winner': 'model_a', 'prompt': 'Why?',
         'response_1': 'So.', 'response_2': 'No.'},
        said('Why?'), [' So.', ' No.'], {'preferred': 0, 'id': 'q'}),
    'reward-bench-2': (
        {'id': '9', 'prompt': 'Why?', 'chosen': ['So.'], 'rejected': ['No.', 'Hm.', 'Eh.'],
         'subset': 'Focus', 'num_correct': 1},
        said('Why?'), [' So.', ' No.', ' Hm.', ' Eh.'], {'preferred': 0, 'id': '9'}),
    'shp': (
        {'post_id': 'h', 'domain': 'd', 'history': 'Why?', 'human_ref_A': 'So.',
         'human_ref_B': 'No.', 'labels': 0, 'score_A': 2, 'score_B': 6, 'score_ratio': 3.0},
        said('Why?'), [' So.', ' No.'], {'preferred': 1, 'group': 'h'}),
    'summarize-axis': (
        {'info': TLDR, 'summary': {'text': ' Wet.', 'policy': 'p', 'axes': {
            'overall': 5, 'accuracy': 6, 'coverage': 4, 'coherence': None}}, 'worker': 'w'},
        'SUBREDDIT: r/weather\n\nTITLE: Rain\n\nPOST: It rained.\n\nTL;DR:', [' Wet.'],
        {'ratings': (5.0,), 'annotator': 'w', 'group': 't3_1'}),
    'summarize-comparisons': (
        {'info': TLDR, 'summaries': [{'text': ' Wet.', 'policy': 'p'}, {'text': ' Dry.'}],
         'choice': 1, 'worker': 'w', 'batch': 'b', 'extra': {'confidence': 8}},
        'SUBREDDIT: r/weather\n\nTITLE: Rain\n\nPOST: It rained.\n\nTL;DR:', [' Wet.', ' Dry.'],
        {'preferred': 1, 'annotator': 'w', 'group': 't3_1'}),
    'ultrafeedback-binarized': (
        {'prompt': 'Why?', 'prompt_id': 'p', 'chosen': turns('Why?', 'So.'),
         'rejected': turns('Why?', 'No.'), 'messages': turns('Why?', 'So.'), 'score_chosen': 8.0,
         'score_rejected': 8.0},
        turns('Why?'), answers('So.', 'No.'),
        {'ratings': (8.0, 8.0), 'id': 'p'}),
    'ultrafeedback:fine-grained': (
        ULTRA, said('Why?'), [' So.', ' No.'],
        {'ratings': (2.5, 4.5), 'attributes': {'helpfulness': (3.0, None)}}),
    'ultrafeedback:overall': (
        ULTRA, said('Why?'), [' So.', ' No.'],
        {'ratings': (10.0, 7.5), 'attributes': {'helpfulness': (3.0, None)}}),
    'webgpt': (
        {'question': {'dataset': 'eli5', 'id': 'e', 'full_text': 'Why?'}, 'quotes_0': {},
         'answer_0': 'So.', 'score_0': -0.5, 'answer_1': 'No.', 'score_1': 0.5},
        said('Why?'), [' So.', ' No.'], {'preferred': 1, 'group': 'e'}),
}
SETTINGS = {'votes': 'share', 'strengths': 'ignored'}


def read(name, row, attributes=(), **changes):
    """What is read of a row of a format."""
    found = list(translate.native(name, [('rows:1', row)], **SETTINGS | changes))
    for _, one in found:
        if isinstance(one, MalformedRow):
            raise one
    return [parse_row(one, where, attributes=attributes, literal=True) for where, one in found]


def plain(text):
    return text if isinstance(text, str) else list(text)


def test_every_format_has_a_row_and_is_documented():
    assert set(ROWS) == set(formats.FORMATS)
    text = (ROOT / 'docs/data.md').read_text(encoding='utf-8')
    for name in formats.FORMATS:
        place = formats.describe(name)
        assert (f"| `{name}` | {place['home']} | {place['prompt']}; {place['responses']} | "
                f"{place['preference']} |") in text


@pytest.mark.parametrize('name', ROWS)
def test_rows_say_what_the_format_says(name):
    row, prompt, responses, expected = ROWS[name]
    attributes = tuple(expected.get('attributes', ()))
    one, = read(name, json.loads(json.dumps(row)), attributes)
    assert plain(one.prompt) == prompt
    assert [plain(response) for response in one.responses] == responses
    nothing = {key: None for key in ('preferred', 'preference', 'ranks', 'ratings', 'annotator')}
    for key, value in (nothing | expected).items():
        found = getattr(one, key)
        assert found == (pytest.approx(value) if key == 'preference' else value), key
    assert one.margin == 0.0


@pytest.mark.parametrize('name', ROWS)
def test_rows_are_recognised_or_have_to_be_named(name):
    row = ROWS[name][0]
    base, _, variant = name.partition(':')
    if formats.FORMATS[name].ask:
        with pytest.raises(DataError, match=rf"f.csv:3: may be of the format .*'{name}'.*, and it"
                           if variant else f"f.csv:3: may be of the format '{name}', and the num"):
            translate.recognise([('f.csv:3', row)])
    else:
        assert translate.recognise([('f.csv:3', row)]) == base


@pytest.mark.parametrize('row', [
    {'chosen': said('Why?') + ' So.', 'rejected': said('Why?') + ' No.'},
    {'prompt': 'Why?', 'chosen': turns('Why?', 'So.'), 'rejected': turns('Why?', 'No.')},
    {'prompt': 'Why?', 'responses': ['So.', 'No.'], 'ratings': [1, 2]},
    {'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.', 'subset': 'alpacaeval-easy', 'id': 1},
    {'conversations': [{'from': 'human', 'value': 'Why?'}],
     'chosen': {'from': 'gpt', 'value': 'So.'}, 'rejected': {'from': 'gpt', 'value': 'No.'}},
    {'prompt': 'Why?', 'response': 'So.', 'rating': 3}, 'text', None, [1],
    {'messages': turns('Why?'), 'chosen': turns('So.'), 'rejected': turns('No.'), 'label': 1},
    {'prompt': turns('Why?'), 'chosen': turns('So.'), 'rejected': turns('No.'), 'score_chosen': 3,
     'score_rejected': 1},
    {'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.', 'score_chosen': 3, 'score_rejected': 1},
    {'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.', 'answers': [{'answer': '', 'rank': 1}]},
    {'instruction': 'Why?', 'chosen': 'So.', 'rejected': 'No.', 'completions': [{'response': ''}]},
    {'messages': turns('Why?'), 'response': 'So.', 'rating': 1, 'label': 'spam'},
    HELPSTEER | {'rating': 2},
])
def test_rows_of_this_project_are_no_other_format(row):
    assert translate.recognise([('f:1', row)]) == 'rows'


def test_each_judge_is_a_comparison_of_its_own():
    found = read('multipref', ROWS['multipref'][0], votes='each')
    assert [(c.annotator, c.preferred, c.ranks, c.id) for c in found] == [
        ('u', 0, None, 'c#0'), ('v', None, (0, 0), 'c#1'), ('w', 1, None, 'c#2'),
        ('x', 0, None, 'c#3')]
    disagreeing = HELPSTEER | {name: [value, value + 1] for name, value in HELPSTEER.items()
                               if isinstance(value, int)}
    found = read('helpsteer', disagreeing, ('helpfulness', 'verbosity'))
    assert [c.attributes for c in found] == [{'helpfulness': (3.5,), 'verbosity': (0.5,)}]
    found = read('helpsteer', disagreeing, ('helpfulness', 'verbosity'), votes='each')
    assert [(c.annotator, c.attributes) for c in found] == [
        (None, {'helpfulness': (3.0,), 'verbosity': (0.0,)}),
        (None, {'helpfulness': (4.0,), 'verbosity': (1.0,)})]


def test_strengths_are_margins_if_asked_for():
    def margins(name, **changes):
        return [c.margin for c in read(name, ROWS[name][0], strengths='margin', **changes)]

    assert margins('shp') == [3.0]
    assert margins('webgpt') == [0.5]
    assert margins('helpsteer2-preference:overall') == [2.0]
    assert margins('helpsteer2-preference:all') == [1.0]  # |-3 + 0 + 1 - 2| / 4
    assert margins('helpsteer2-preference:all', votes='each') == [3.0, 0.0, 1.0, 2.0]
    assert margins('hh-strength') == [0.25]
    doubted, = read('hh-strength', STRENGTH | {'mean preference difference': -1.5},
                    strengths='margin')
    assert doubted.margin == -1.5
    assert margins('judgebench') == [0.0]


def test_second_turns_of_mt_bench_are_whole_conversations():
    one, = read('mt-bench', ROWS['mt-bench'][0] | {'turn': 2})
    assert plain(one.prompt) == turns('Hi')
    assert [plain(r) for r in one.responses] == [
        turns('Hi', 'Ho', 'Why?', 'So.')[1:], turns('Hi', 'Hu', 'Why?', 'No.')[1:]]


def test_what_is_not_read_is_counted():
    one, = read('pku-saferlhf:safer', PKU)
    assert one.remarks == ("key 'is_response_0_safe' not used", "key 'is_response_1_safe' not used",
                           "key 'better_response_id' not used")
    one, = read('shp', ROWS['shp'][0] | {'rating': 3})
    assert "key 'rating (of the format)' not used" in one.remarks


def test_keys_that_mean_the_same_everywhere_are_kept():
    kept = {'weight': 0.5, 'id': 'x', 'group': 'g', 'annotator': 'a', 'tools': []}
    one, = read('judgebench', ROWS['judgebench'][0] | kept | {'pair_id': None})
    assert (one.weight, one.group, one.annotator, one.id) == (0.5, 'g', 'a', 'rows:1')
    one, = read('pku-saferlhf:safer', PKU | kept)
    assert one.id == 'x'


def test_prompts_of_several_turns_and_parts():
    marked = 'Hi\n<extra_id_1>Assistant\nHo\n<extra_id_1>User\nWhy?'
    expected = '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Why?\n\nAssistant:'
    for name in ('helpsteer', 'helpsteer2-preference', 'helpsteer2-preference:overall'):
        one, = read(name, ROWS[name][0] | {'prompt': marked}, ('helpfulness',))
        assert one.prompt == expected
    one, = read('alpaca-eval', ROWS['alpaca-eval'][0] | {'input': 'x'})
    assert one.prompt == said('Why?\nx')
    news = {'id': 'n', 'title': 'Rain', 'article': 'It rained.', 'post': None, 'subreddit': None}
    one, = read('summarize-comparisons', ROWS['summarize-comparisons'][0] | {
        'info': news, 'summaries': [{'text': 'Wet.'}, {'text': ' Dry.'}]})
    assert one.prompt == 'TITLE: Rain\n\nARTICLE: It rained.\n\nTL;DR:'
    assert one.responses == (' Wet.', ' Dry.')


def test_arena_messages_are_compared_by_what_is_said():
    row = ROWS['arena'][0]
    more = [message | {'num_tokens': 3} for message in row['conversation_b']]
    one, = read('arena', row | {'conversation_b': more})
    assert plain(one.prompt) == turns('Hi')
    one, = read('arena', row | {key: json.dumps(row[key]) for key in (
        'conversation_a', 'conversation_b')})
    assert plain(one.prompt) == turns('Hi')


def test_several_good_responses_are_several_comparisons():
    row = {'id': 9, 'prompt': 'Why?', 'chosen': ['So.', 'As.'], 'rejected': ['No.', 'Hm.']}
    found = read('reward-bench-2', row)
    assert [(c.id, c.responses, c.preferred) for c in found] == [
        ('9#0', (' So.', ' No.', ' Hm.'), 0), ('9#1', (' As.', ' No.', ' Hm.'), 0)]
    # Nothing is said of the others.
    assert found[0].preference_matrix().tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(('name', 'changes'), [
    ('shp', {'labels': None}), ('webgpt', {'score_0': None}), ('alpaca-eval', {'preference': None}),
    ('arena-55k', dict.fromkeys(('winner_model_a', 'winner_model_b', 'winner_tie'))),
    ('mt-bench', {'winner': 'tie (inconsistent)'}), ('kto', {'label': None}),
    ('multipref', {'normal_worker_annotations': [], 'expert_worker_annotations': [
        {'evaluator': 'u', 'overall_pref': None}]}),
    ('helpsteer2-preference', {'three_most_similar_preferences': []}),
    ('oasst', {'prompt': {'message_id': 't', 'text': 'Why?', 'role': 'prompter', 'replies': []}}),
])
def test_rows_that_were_not_judged_are_told_apart(name, changes):
    with pytest.raises(translate.NotJudged, match='^rows:1: says nothing of its responses'):
        read(name, ROWS[name][0] | changes)


def test_some_of_what_may_be_missing_is():
    one, = read('pandalm', ROWS['pandalm'][0] | {'annotator2': None})
    assert one.preferred == 0
    row = ROWS['summarize-axis'][0]
    axes = row['summary']['axes'] | {'overall': None}
    one, = read('summarize-axis', row | {'summary': row['summary'] | {'axes': axes}}, ('accuracy',))
    assert (one.ratings, one.attributes) == (None, {'accuracy': (6.0,)})
    one, = read('mt-bench', ROWS['mt-bench'][0] | {'turn': 1.0})
    assert len(one.responses[0]) == 1
    one, = read('alpaca-eval', ROWS['alpaca-eval'][0] | {'preference': 0})
    assert one.ranks == (0, 0)
    gone = {'text': None, 'role': 'assistant', 'deleted': True, 'replies': []}
    tree = ROWS['oasst'][0]
    replies = [*tree['prompt']['replies'], gone]
    one, = read('oasst', tree | {'prompt': tree['prompt'] | {'replies': replies}})
    assert len(one.responses) == 2


def test_formats_are_recognised_by_the_first_rows():
    row = ROWS['helpsteer'][0]
    rows = [('f:1', MalformedRow('f:1: not JSON')), ('f:2', row | {'verbosity': None}),
            ('f:3', row), ('f:4', 'text')]
    assert translate.recognise(rows) == 'helpsteer'
    assert translate.recognise([('f:1', row | {'verbosity': None})]) == 'rows'
    assert translate.recognise([]) == 'rows'
    with pytest.raises(DataError, match="f:1 and f:2 look like rows of different formats, 'shp'"):
        translate.recognise([('f:1', ROWS['shp'][0]), ('f:2', ROWS['nectar'][0])])


@pytest.mark.parametrize(('name', 'changes', 'message'), [
    ('shp', {'labels': 2}, "field 'labels': got 2, expected one of [1, 0]"),
    ('shp', {'labels': True}, "field 'labels': got true, expected one of [1, 0]"),
    ('shp', {'human_ref_B': None}, "field 'human_ref_B': got nothing, expected a response"),
    ('shp', {'human_ref_B': 5}, "field 'responses[1]': got an integer, expected text or a list"),
    ('judgebench', {'label': 'A=B'}, 'field \'label\': got "A=B", expected one of [\'A>B\', '),
    ('alpaca-eval', {'preference': 3}, "field 'preference': got 3, expected a number from 1 to 2"),
    ('alpaca-eval', {'preference': 'no'}, 'field \'preference\': got "no", expected a number'),
    ('webgpt', {'score_0': float('nan')}, "field 'score_0': got NaN, expected a number"),
    ('arena-55k', {'winner_tie': 1}, "field 'winner_model_a': got [0.0, 1.0, 1.0] with"),
    ('arena-55k', {'response_a': '[null, "So."]'}, "field 'response_a': got null in place of a t"),
    ('arena-55k', {'response_b': '["Ho"]'}, "field 'prompt': got 2 turns, expected as many as"),
    ('arena-55k', {'prompt': 'Hi'}, "field 'prompt': got no JSON ("),
    ('arena', {'conversation_b': turns('He', 'Ho')},
     "field 'conversation_b': got another prompt than in 'conversation_a'"),
    ('arena', {'conversation_b': 'Ho'}, 'field \'conversation_b\': got "Ho", expected a list'),
    ('mt-bench', {'turn': 3}, "field 'turn': got 3, expected 1 or 2"),
    ('multipref', {'expert_worker_annotations': [5]},
     "field 'expert_worker_annotations[0]': got 5, expected an object"),
    ('multipref', {'expert_worker_annotations': [{'overall_pref': 'C'}]},
     "in 'expert_worker_annotations[0]' field 'overall_pref': got \"C\", expected one of"),
    ('helpsteer2-preference:overall', {'preference_strength': -100},
     "field 'preference_strength': got -100, expected a number from -3 to 3"),
    ('hh-strength', {'rejected': ['Who?', 'No.']},
     "field 'rejected': got another prompt than in 'chosen', expected dialogues that begin alike"),
    ('mt-bench', {'turn': True}, "field 'turn': got true, expected 1 or 2"),
    ('judgebench', {'system': 'Be kind.'}, "field 'system': got what may be a part of the prompt"),
    ('kto', {'prompt': '[{"role": "user", "content": "Why?"}]'},
     "field 'prompt': got text that is a list of chat messages"),
    ('kto', {'prompt': 'Go on:\n\nHuman: hi'}, "field 'prompt': got a text with"),
    ('kto', {'prompt': '\n\nHuman: hi'}, "field 'prompt': got turns that do not end in"),
    ('kto', {'completion': 'So.\n\nHuman: hi'}, "field 'responses': got a text with"),
    ('oasst', {'prompt': {'text': 'Why?', 'role': 'prompter', 'replies': 5}},
     "field 'prompt': got 5, expected a list of replies"),
    ('oasst', {'prompt': {'text': 'Why?', 'role': ['x']}}, "field 'prompt': got role ['x'], expec"),
    ('shp', {'post_id': ['z']}, "field 'group': got a list, expected text or an integer"),
    ('nectar', {'answers': [{'answer': 'So.'}]}, "field 'answers': got items without 'rank'"),
    ('nectar', {'answers': ['So.']}, 'field \'answers[0]\': got "So.", expected an object with'),
    ('nectar', {'answers': []}, "field 'answers': got [], expected a list of responses"),
    ('oasst', {'prompt': {'text': 'Why?', 'role': 'judge'}},
     "field 'prompt': got role 'judge', expected prompter or assistant"),
    ('kto', {'label': 'yes'}, 'field \'label\': got "yes", expected a number'),
    ('hh-strength', {'chosen': ['Hi']}, 'field \'chosen\': got ["Hi"], expected turns of text'),
    ('hh-strength:models', {'rejected score list': [1.0]},
     "field 'rejected score list': got [1.0], expected as many numbers as"),
    ('helpsteer', {'verbosity': [1, 2]}, "field 'helpfulness': got 3, expected as many numbers"),
    ('ultrafeedback:overall', {'completions': [{'response': 'So.', 'overall_score': 'good'}]},
     'field \'completions[0].overall_score\': got "good", expected a number'),
])
def test_rows_that_say_something_else_are_malformed(name, changes, message):
    with pytest.raises(MalformedRow, match='^rows:1.*' + re.escape(message)):
        read(name, ROWS[name][0] | changes)


def test_rows_without_the_keys_of_their_format_are_malformed():
    row = {key: value for key, value in ROWS['shp'][0].items() if key != 'human_ref_B'}
    with pytest.raises(MalformedRow, match=r"'human_ref_B': got nothing \(the key is missing\)"):
        read('shp', row)


def test_rows_that_could_not_be_read_stay_that():
    broken = MalformedRow('rows:1: not JSON')
    assert list(translate.native('shp', [('rows:1', broken)], **SETTINGS)) == [('rows:1', broken)]
    (_, found), = translate.native('shp', [('rows:2', 5)], **SETTINGS)
    assert str(found) == "rows:2: got 5, expected an object of the format 'shp'"


def test_columns_are_called_otherwise():
    columns = translate.parse_columns(
        ('prompt=question.text', ' rating = score', 'care=care'), ('care',))
    row = {'question': {'text': 'Why?'}, 'response': 'old', 'answer': 'So.', 'score': 2, 'care': 1}
    columns |= translate.parse_columns(('response=answer',), ())
    (where, found), = translate.mapped(columns, [('rows:1', row)])
    one = parse_row(found, where, attributes=('care',))
    assert (one.prompt, one.responses, one.ratings) == ('Why?', ('So.',), (2.0,))
    assert one.attributes == {'care': (1.0,)}
    assert one.remarks == ("key 'response (of the rows)' not used",)
    # What is not called otherwise stays what it is.
    rated = translate.parse_columns(('rating=judge_score',), ())
    row = {'prompt': 'Why?', 'response': 'So.', 'judge_score': 0.5}
    (where, found), = translate.mapped(rated, [('rows:1', row)])
    assert parse_row(found, where).ratings == (0.5,)
    for text, message in (('prompt', "'prompt', expected 'key=place'"),
                          ('prompt=', "'prompt=', expected 'key=place'"),
                          ('promt=a', "'promt=a': nothing reads 'promt', expected one of")):
        with pytest.raises(ValueError, match=message):
            translate.parse_columns((text,), ())
    with pytest.raises(ValueError, match="'id=b': 'id' stands twice"):
        translate.parse_columns(('id=a', 'id=b'), ())


@pytest.mark.parametrize(('path', 'name', 'count'), [
    ('preferences/llamafactory-dpo/dpo_en_demo.json', 'rows', 300),
    ('preferences/medicalgpt-dpo/dpo_zh_500.jsonl', 'rows', 500),
    ('preferences/colossalchat-dpo/test_dpo_data.jsonl', 'rows', 1),
    ('preferences/nectar/rows.jsonl', 'nectar', 1),
    ('preferences/oasst/en_100_tree.jsonl', 'oasst', 212),
    ('preferences/pandalm/testset-v1.json', 'pandalm', 993),
    ('preferences/shp/rows.jsonl', 'shp', 1),
    ('paper/helpful_valid.json', 'hh-strength', 79),
])
def test_real_files_are_recognised_and_read(path, name, count):
    file = SHARED / path
    if not file.exists():
        pytest.skip(f'no {file}')
    rows = list(read_rows(str(file)))
    assert translate.recognise(rows) == name
    if name != 'rows':
        rows = translate.native(name, rows, **SETTINGS)
    comparisons, malformed = [], []
    for where, row in rows:
        try:
            comparisons.append(parse_row(row, where, literal=name != 'rows'))
        except MalformedRow as error:
            malformed.append(str(error))
    assert len(comparisons) == count
    assert all(len(c.responses) > 1 for c in comparisons)
    # Texts of PandaLM that are the value true.
    assert len(malformed) == 6 * (name == 'pandalm')
    assert all('got a truth value' in line for line in malformed)
