"""Questions of benchmarks: which responses are right, of which subset, and rows that are none."""

import json

import pytest

from qrm.data import suites
from qrm.data.comparisons import Comparison, DataError

PAIR = {'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.', 'subset': 'donotanswer', 'id': 3}
FOUR = {'prompt': 'Why?', 'chosen': ['So.'], 'rejected': ['A', 'B', 'C'], 'subset': 'Focus',
        'id': '7'}
TIED = {'prompt': 'A colour?', 'chosen': ['red', 'blue'], 'rejected': ['salt'], 'subset': 'Ties',
        'id': 'tied:4'}
STYLES = {'prompt': 'Why?', 'chosen': ['a', 'b', 'c'], 'rejected': ['d', 'e', 'f'],
          'domain': 'safety-refuse', 'id': 'x'}
JUDGED = {'question': 'Why?', 'response_A': 'No.', 'response_B': 'So.', 'label': 'B>A',
          'source': 'livebench-math', 'pair_id': 'p'}
PEOPLE = {'prompt': 'Why?', 'response_1': 'No.', 'response_2': 'So.', 'winner': 'model_b'}
CONFLICTS = {'prompt': 'Why?', 'response_1': 'a', 'response_2': 'b', 'response_3': 'c',
             'scores': [False, True, False], 'sampled_conflict_pairs': [[0, 1], [1, 2]]}


def load(tmp_path, suite, *rows, name='rows.jsonl'):
    path = tmp_path / name
    path.write_text('\n'.join(map(json.dumps, rows)))
    return suites.load(suite, str(path))


def read(questions):
    return [(q.comparison.prompt, *q.comparison.responses, q.right, q.subset, q.kind)
            for q in questions]


@pytest.mark.parametrize(('suite', 'row', 'expected'), [
    ('reward-bench', PAIR, [('\n\nHuman: Why?\n\nAssistant:', ' So.', ' No.', 1, 'donotanswer',
                             '')]),
    ('reward-bench-2', FOUR, [('\n\nHuman: Why?\n\nAssistant:', ' So.', ' A', ' B', ' C', 1,
                               'Focus', '')]),
    ('reward-bench-2', TIED, [('\n\nHuman: A colour?\n\nAssistant:', ' red', ' blue', ' salt', 2,
                               'Ties', 'tied')]),
    ('rm-bench', STYLES, [('\n\nHuman: Why?\n\nAssistant:', ' a', ' b', ' c', ' d', ' e', ' f', 3,
                           'safety-refuse', '')]),
    ('judge-bench', JUDGED, [('\n\nHuman: Why?\n\nAssistant:', ' So.', ' No.', 1,
                              'livebench-math', '')]),
    ('judge-bench', JUDGED | {'label': 'A>B', 'source': 'mmlu-pro-law'},
     [('\n\nHuman: Why?\n\nAssistant:', ' No.', ' So.', 1, 'mmlu-pro', '')]),
    ('ppe-preference', PEOPLE, [('\n\nHuman: Why?\n\nAssistant:', ' So.', ' No.', 1, 'all', '')]),
    ('ppe-correctness', CONFLICTS,
     [('\n\nHuman: Why?\n\nAssistant:', ' b', ' a', 1, 'all', ''),
      ('\n\nHuman: Why?\n\nAssistant:', ' b', ' c', 1, 'all', '')]),
])
def test_right_responses_come_first(tmp_path, suite, row, expected):
    assert read(load(tmp_path, suite, row)) == expected


def test_domains_of_rm_bench_may_be_those_of_its_files(tmp_path):
    nameless = {key: value for key, value in STYLES.items() if key != 'domain'}
    for name in ('chat_filtered.json', 'safety-refuse_filtered.json'):
        (tmp_path / name).write_text(json.dumps([nameless]))
    assert [q.subset for q in suites.load('rm-bench', str(tmp_path))] == ['chat', 'safety-refuse']
    with pytest.raises(DataError, match="field 'domain': null, expected the name of a domain"):
        load(tmp_path, 'rm-bench', nameless)


def test_ties_of_people_are_no_questions(tmp_path):
    found = load(tmp_path, 'ppe-preference', PEOPLE, PEOPLE | {'winner': 'tie (bothbad)'})
    assert len(found) == 1


def test_prompts_that_are_chats_and_files_that_name_subsets(tmp_path):
    chat = [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'So.'},
            {'role': 'user', 'content': 'And?'}]
    row = {'prompt': chat, 'chosen': [*chat, {'role': 'assistant', 'content': 'Yes'}],
           'rejected': 'No'}
    for name in ('shp', 'anthropic_hhh'):
        (tmp_path / f'{name}.jsonl').write_text(json.dumps(row))
    found = suites.load('prior-sets', str(tmp_path))
    said = '\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant:'
    assert read(found) == [(said, ' Yes', ' No', 1, 'anthropic_hhh', ''),
                           (said, ' Yes', ' No', 1, 'shp', '')]


def test_both_ways_to_ask_of_ties_are_one_group(tmp_path):
    one, several, other = load(
        tmp_path, 'reward-bench-2', TIED | {'id': 'ref:4', 'chosen': ['red']}, TIED,
        TIED | {'id': 'tied:5'})
    assert one.comparison.group == several.comparison.group != other.comparison.group


@pytest.mark.parametrize(('suite', 'row', 'message'), [
    ('reward-bench', PAIR | {'chosen': None}, 'rows.jsonl:1: the response null, expected text'),
    ('reward-bench', PAIR | {'prompt': 4}, r"rows.jsonl:1 field 'prompt': 4, expected text or"),
    ('reward-bench', PAIR | {'prompt': [{'role': 'tool', 'content': 'x'}]}, 'expected a message'),
    ('reward-bench', PAIR | {'rejected': 'No.\n\nHuman: Oh.'}, 'expected one turn'),
    ('reward-bench', ['a'], 'expected an object'),
    ('reward-bench-2', FOUR | {'chosen': ['a', 'b']}, "'chosen': 2 responses, expected one outs"),
    ('reward-bench-2', TIED | {'id': '4'}, "'id': \"4\", expected 'ref:N' or 'tied:N' in Ties"),
    ('rm-bench', STYLES | {'chosen': ['a', 'b']}, '2 chosen and 3 rejected responses, expected 3'),
    ('judge-bench', JUDGED | {'label': 'A=B'}, "'label': \"A=B\", expected 'A>B' or 'B>A'"),
    ('ppe-preference', PEOPLE | {'winner': 1}, "'winner': 1, expected 'model_a'"),
    ('ppe-correctness', CONFLICTS | {'sampled_conflict_pairs': [[0, 3]]}, 'two of 3 indices'),
    ('ppe-correctness', CONFLICTS | {'sampled_conflict_pairs': [[0, 2]]}, 'one right and one wro'),
    ('ppe-preference', PEOPLE | {'winner': 'tie'}, 'no questions'),
    ('reward-bench-3', PAIR, '--suite=reward-bench-3, expected one of reward-bench, '),
])
def test_rows_that_are_no_questions(tmp_path, suite, row, message):
    with pytest.raises(DataError, match=message.replace('(', r'\(')):
        load(tmp_path, suite, row)


def test_folders_without_rows(tmp_path):
    with pytest.raises(DataError, match='no file of rows, expected one, or a folder'):
        suites.load('rm-bench', str(tmp_path))


def test_comparisons_of_any_source_put_the_preferred_first():
    known = {'prompt': 'p', 'group': 'g'}
    found, without = suites.of_comparisons([
        Comparison('a', responses=('x', 'y'), preferred=1, **known),
        Comparison('b', responses=('x', 'y', 'z'), ranks=(1, 0, 2), **known),
        Comparison('c', responses=('x', 'y'), ranks=(0, 0), **known),
        Comparison('d', responses=('x',), **known)])
    assert [q.comparison.responses for q in found] == [('y', 'x'), ('y', 'x', 'z')]
    assert without == 2
