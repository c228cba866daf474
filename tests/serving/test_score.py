"""Files are scored whole or not at all, and nothing that stands there is lost."""

import copy
import dataclasses
import gzip
import json

import numpy as np
import pytest

from qrm.commands import processes
from qrm.data import demo
from qrm.data.comparisons import DataError
from qrm.rewards import pairwise
from qrm.serving import score
from qrm.training import reward_model
from qrm.training.interruptions import NonFiniteLoss
from tests.helpers import small_pairwise_model, small_reward_model


@pytest.fixture(scope='module')
def comparisons():
    return demo.generate('helpful', 'train', 12, 0).comparisons


@pytest.fixture(scope='module')
def model(comparisons):
    return small_reward_model(comparisons)


def test_files_are_scored_row_by_row_in_order(model, comparisons, tmp_path):
    reference = model.score([c.prompt for c in comparisons],
                            [list(c.responses) for c in comparisons])
    rows = []
    for i, c in enumerate(comparisons[:6]):
        a, b = c.responses
        rows.append([{'prompt': c.prompt, 'responses': [a, b]},
                     {'chosen': c.prompt + a, 'rejected': c.prompt + b},
                     {'prompt': c.prompt, 'chosen': a, 'rejected': b, 'id': i}][i % 3])
    rows.append({'prompt': comparisons[6].prompt, 'response': comparisons[6].responses[0]})
    source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
    source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    message = score.score_file(model, str(source), str(target))
    assert '7 rows, 13 responses scored, 0 dialogues cut' in message
    scored = [json.loads(line) for line in target.read_text().splitlines()]
    for i, row in enumerate(scored):
        k = len(row['rewards'])
        np.testing.assert_allclose(row['rewards'], reference.rewards[i][:k], atol=1e-4)
        np.testing.assert_allclose(row['quantiles'], reference.quantiles[i][:k], atol=1e-4)
    assert [len(row['rewards']) for row in scored] == [2] * 6 + [1]
    assert 'normalised' not in message
    assert all(row.keys() == {'rewards', 'quantiles'} for row in scored)


def test_a_row_that_cannot_be_scored_stops_with_its_line_and_writes_nothing(model, tmp_path):
    source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
    source.write_text('{"prompt": "a", "response": " b"}\n{"prompt": "a", "response": null}\n')
    with pytest.raises(DataError, match=r"in\.jsonl:2 field 'response': got null, expected text"):
        score.score_file(model, str(source), str(target))
    assert not target.exists()


def test_a_target_that_cannot_be_written_is_refused_before_anything_is_scored(tmp_path):
    source = tmp_path / 'in.jsonl'
    source.write_text('{"prompt": "a", "response": " b"}\n')
    (tmp_path / 'link.jsonl').symlink_to(source)
    for target, message in ((source, 'is the file to be read'),
                            (tmp_path / 'link.jsonl', 'is the file to be read'),
                            (tmp_path, 'expected a file'), ('/dev/null', 'expected a file'),
                            (tmp_path / 'none' / 'out.jsonl', 'No such file or directory'),
                            (source / 'out.jsonl', 'Not a directory')):
        with pytest.raises(DataError, match=message):
            score.score_file(None, str(source), str(target))
    assert source.read_text() == '{"prompt": "a", "response": " b"}\n'
    assert {path.name for path in tmp_path.iterdir()} == {'in.jsonl', 'link.jsonl'}


def test_a_target_is_compressed_if_its_name_says_so(model, tmp_path):
    source = tmp_path / 'in.jsonl'
    source.write_text('{"prompt": "a", "response": " b"}\n')
    targets = [tmp_path / 'out.jsonl', tmp_path / 'out.jsonl.gz']
    for target in targets:
        score.score_file(model, str(source), str(target))
    content = targets[1].read_bytes()
    assert gzip.decompress(content) == targets[0].read_bytes()
    score.score_file(model, str(source), str(targets[1]))
    assert targets[1].read_bytes() == content  # no time in it
    with pytest.raises(DataError, match=r'a name that ends in \.jsonl or \.jsonl\.gz'):
        score.score_file(model, str(source), str(tmp_path / 'out.parquet'))


def test_what_was_noticed_about_rows_is_counted(model, tmp_path):
    chatty = copy.deepcopy(model.tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{'prompt': 'a', 'response': '', 'source': 'x'}, {'prompt': 'a', 'response': ' b'},
            {'prompt': [{'role': 'user', 'content': 'a', 'name': 'Ann'}], 'response': 'b'}]
    source = tmp_path / 'in.json'
    source.write_text(json.dumps(rows))
    message = score.score_file(dataclasses.replace(model, tokenizer=chatty), str(source),
                               str(tmp_path / 'out.jsonl'))
    assert message.splitlines()[1:] == [
        '  note 1: blank response', "  note 1: key 'source' not used",
        "  note 1: message key 'name' not used by the chat template"]


def test_rewards_that_are_not_finite_are_errors_everywhere(model, comparisons, tmp_path):
    head = model.params['head'] | {'kernel': model.params['head']['kernel'].at[3].set(np.inf)}
    broken = dataclasses.replace(model, params=model.params | {'head': head})
    source = tmp_path / 'in.jsonl'
    source.write_text('{"prompt": "a", "response": " b", "id": "one"}\n' * 5)
    with pytest.raises(NonFiniteLoss, match='one, one, one and 2 more: a reward that is'):
        score.score_file(broken, str(source), str(tmp_path / 'out.jsonl'))
    assert not (tmp_path / 'out.jsonl').exists()
    with pytest.raises(NonFiniteLoss, match=r'prompts\[0\]: a reward that is not finite'):
        broken.score(['a'], [' b'])
    # It is raised as bad input is: a line, and exit code 2.
    assert NonFiniteLoss in processes._EXPECTED


@pytest.mark.parametrize(('changes', 'expected'), [
    ({'prompt': np.array([300], np.int32)}, 'token 300, but the embedding has 300 rows'),
    ({'prompt': np.array([-1], np.int32)}, 'token -1, but the embedding has 300 rows'),
    ({'prompt': np.zeros(200, np.int32)}, r'a dialogue of \d+ tokens, but the model has 200'),
    ({'annotator': 0}, 'annotator 0, but the head knows 0'),
])
def test_what_a_table_does_not_have_is_never_looked_up(model, comparisons, changes, expected):
    [item], _ = model.encode(comparisons[:1])
    assert len(model.predict([item])) == 1
    with pytest.raises(DataError, match=f'^{item.id}: {expected}'):
        model.predict([item, dataclasses.replace(item, **changes)])


def test_the_end_of_dialogues_can_be_read_otherwise(model):
    changed = reward_model.read_otherwise(model, append_eos=False, read_before='<|pad|>')
    assert (changed.reading.append_eos, changed.reading.skipped) == (False, 1)
    assert reward_model.read_otherwise(changed, read_before='').reading.skipped is None
    assert reward_model.read_otherwise(model) == model
    with pytest.raises(DataError, match="read_before='<pad>': no token of"):
        reward_model.read_otherwise(model, read_before='<pad>')


def test_a_pairwise_model_compares_the_responses_of_a_row(comparisons, model, tmp_path):
    pairwise_model = small_pairwise_model(comparisons)
    first, second = comparisons[:2]
    rows = [{'prompt': first.prompt, 'responses': [*first.responses, ' Yes.'], 'preferred': 1},
            {'prompt': second.prompt, 'chosen': second.responses[0],
             'rejected': second.responses[1]}]
    source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
    source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    wins = pairwise_model.compare([first.prompt, second.prompt],
                                  [rows[0]['responses'], list(second.responses)])
    for kind in ('', *pairwise.AGGREGATES):
        message = score.score_file(pairwise_model, str(source), str(target), kind)
        assert '2 rows, 5 responses scored, 0 dialogues cut' in message
        assert message.endswith(f'by {kind or "tournament"} of win probabilities')
        scored = [json.loads(line) for line in target.read_text().splitlines()]
        for row, own in zip(scored, wins, strict=True):
            np.testing.assert_allclose(row['wins'], own, atol=1e-5)
            expected = pairwise.aggregate(own, kind or 'tournament').scores
            np.testing.assert_allclose(row['rewards'], expected, atol=1e-4)
    with pytest.raises(DataError, match="'tournament' of a model with the quantile head"):
        score.score_file(model, str(source), str(target), 'tournament')
    source.write_text('{"prompt": "a", "responses": [" b", " c"]}\n{"prompt": "a", '
                      '"response": " b"}\n')
    target.unlink()
    with pytest.raises(DataError, match=r'in.jsonl:2: one response to a prompt, expected two'):
        score.score_file(pairwise_model, str(source), str(target))
    assert not target.exists()
