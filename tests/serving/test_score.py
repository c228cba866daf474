"""Files are scored whole or not at all, and nothing that stands there is lost."""

import dataclasses
import json

import numpy as np
import pytest

from qrm.data import demo, tokens
from qrm.data.comparisons import DataError
from qrm.data.tokens import Reading
from qrm.models import families
from qrm.rewards import losses
from qrm.serving import score
from qrm.training.reward_model import RewardModel
from tests.helpers import SETTINGS, init, network


@pytest.fixture(scope='module')
def comparisons():
    return demo.generate('helpful', 'train', 12, 0).comparisons


@pytest.fixture(scope='module')
def model(comparisons):
    tokenizer = tokens.train_tokenizer(tokens.texts_of(comparisons), 300)
    net = network(layers=1)
    settings = SETTINGS | {'vocab_size': 300, 'n_positions': 200}
    net = dataclasses.replace(net, architecture=families.architecture(settings))
    return RewardModel(net, settings, init(net), tokenizer, losses.LossConfig('bradley_terry'),
                       Reading(200), row_length=128)


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
    for target, message in ((source, 'is the file to be scored'),
                            (tmp_path / 'link.jsonl', 'is the file to be scored'),
                            (tmp_path, 'expected a file'), ('/dev/null', 'expected a file'),
                            (tmp_path / 'none' / 'out', 'No such file or directory'),
                            (source / 'out', 'Not a directory')):
        with pytest.raises(DataError, match=message):
            score.score_file(None, str(source), str(target))
    assert source.read_text() == '{"prompt": "a", "response": " b"}\n'
    assert {path.name for path in tmp_path.iterdir()} == {'in.jsonl', 'link.jsonl'}
