"""Panels of judges: what is read of public files, by rows made up here, and what is refused."""

import json

import pytest

from qrm.data.comparisons import DataError
from qrm.studies import panels


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def votes(*found, idx=0, **fields):
    return {'idx': idx, 'motivation_app': 'app', 'cmp_key': 'a_b', 'instruction': 'Add.',
            'input': '', 'response1': 'one', 'response2': 'two',
            **{f'annotator{i}': vote for i, vote in enumerate(found, start=1)}} | fields


def test_pandalm(tmp_path):
    rows = [votes(1, 1, 1), votes(2, 2, 0, idx=1, input='1 and 2'), votes(0, 0, 0, idx=2),
            votes(1, 2, 0, idx=3, response1=True)]
    panel = panels.read_pandalm(write(tmp_path / 'testset.json', rows))
    first, second, third, fourth = panel.comparisons
    assert first.prompt == '\n\nHuman: Add.\n\nAssistant:'
    assert first.responses == (' one', ' two')
    assert second.prompt == '\n\nHuman: Add.\n1 and 2\n\nAssistant:'
    assert first.group != second.group
    assert (first.preference, first.ratings) == (1.0, (1.0, 0.0))
    assert second.preference == pytest.approx(1 / 6)
    assert (third.preference, fourth.preference) == (0.5, 0.5)
    assert fourth.responses[0] == ' True'
    assert panel.disputed == {'0': False, '1': True, '2': False, '3': True}
    # Shares 0, 0, 1/2: variance (1/6)^2 * 2 + (1/3)^2 over three.
    assert panel.spread == pytest.approx(
        {'0': 0.0, '1': (1 / 18) ** 0.5, '2': 0.0, '3': (1 / 6) ** 0.5})


def test_prometheus(tmp_path):
    text = ('###Task Description:\nJudge.\n\n###The instruction to evaluate:\nWhy?\n\n'
            '###Response to evaluate:\nSo.\n\nThat is why.\n\n###Reference Answer (Score 5):\nX')
    rows = [{'idx': 1, 'instruction': text, 'gpt4_score': [3, 4, 5]},
            {'idx': 1, 'instruction': text, 'gpt4_score': [2, 2, 2]}]
    panel = panels.read_prometheus(write(tmp_path / 'eval.json', rows))
    first, second = panel.comparisons
    assert first.prompt == '\n\nHuman: Why?\n\nAssistant:'
    assert first.responses == (' So.\n\nThat is why.',)
    assert (first.ratings, second.ratings) == ((4.0,), (2.0,))
    assert first.id != second.id
    assert first.group == second.group
    assert list(panel.disputed.values()) == [True, False]
    assert list(panel.spread.values()) == pytest.approx([(2 / 3) ** 0.5, 0.0])


def test_the_papers_pairs(tmp_path):
    row = {'chosen': ['Hi?', 'Yes?', 'Why?', 'So.'], 'rejected': ['Hi?', 'Yes?', 'Why?', 'No.'],
           'chosen score list': [1.0, 3.0], 'rejected score list': [0.0, 0.0]}
    write(tmp_path / 'helpful_valid.json', [row])
    panel = panels.read_paper(str(tmp_path), 'helpful')
    only, = panel.comparisons
    assert only.prompt == ('\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:')
    assert only.responses == (' So.', ' No.')
    assert list(panel.spread.values()) == [1.0]
    assert panel.disputed is None


@pytest.mark.parametrize(('read', 'rows', 'message'), [
    (panels.read_pandalm, [votes(1, 1, 1), votes(1, 1, 3)], r'\[1\]: not the test set of PandaLM'),
    (panels.read_pandalm, [votes(1, 1)], r"\[0\]: not the test set of PandaLM .'annotator3'.$"),
    (panels.read_pandalm, {'a': 1}, 'not the test set of PandaLM .no array of rows'),
    (panels.read_prometheus, [{'instruction': 'Why?', 'gpt4_score': [1, 2]}],
     r'\[0\]: not a benchmark of Prometheus .no instruction and response')])
def test_what_is_none_of_these_is_refused(read, rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / 'file.json', rows))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r'helpful_valid.json: not the published validation pairs'):
        panels.read_paper(str(tmp_path), 'helpful')
