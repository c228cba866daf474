"""Files of prompts are answered whole or not at all, in rows that can be scored."""

import gzip
import json
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from qrm.data.comparisons import DataError
from qrm.data.rows import parse_row
from qrm.data.sources import read_comparisons
from qrm.policy import candidates, language_model, sampling
from qrm.policy.sampling import Sampling
from tests.helpers import REFERENCE, command, write_tokenizer

HOW = Sampling(3, 6, temperature=1.2, top_p=0.9)
TEMPLATE = ("{% for m in messages %}{{ m['role'] == 'user' and 'w1' or 'w2' }} {{ m['content'] }} "
            "{% endfor %}{% if add_generation_prompt %}w2{% endif %}")


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A GPT-2 of 24 positions whose tokens are words."""
    folder = tmp_path_factory.mktemp('model')
    write_tokenizer(folder)
    tensors = safetensors_numpy.load_file(REFERENCE / 'model.safetensors')
    tensors = {name: tensor for name, tensor in tensors.items() if name != 'score.weight'}
    safetensors_numpy.save_file(tensors, folder / 'model.safetensors')
    shutil.copyfile(REFERENCE / 'config.json', folder / 'config.json')
    return folder


@pytest.fixture(scope='module')
def model(folder):
    model = language_model.load(str(folder))
    model.tokenizer.chat_template = TEMPLATE
    return model


def answer(model, tmp_path, given, name='out.jsonl', how=HOW, **kwargs):
    """Message, and rows that were written."""
    source, target = tmp_path / 'in.jsonl', tmp_path / name
    source.write_text(''.join(json.dumps(row) + '\n' for row in given))
    message = candidates.sample_file(model, str(source), str(target), how,
                                     **{'seed': 3, 'rows': 4} | kwargs)
    content = target.read_bytes()
    content = gzip.decompress(content) if name.endswith('.gz') else content
    return message, [json.loads(line) for line in content.splitlines()]


ROWS = [{'prompt': 'w3 w4 w5', 'id': 'a', 'source': 'x'},
        {'prompt': [{'role': 'user', 'content': 'w7 w8'}], 'id': 'b', 'tools': [{'name': 't'}]},
        {'chosen': '\n\nHuman: w9\n\nAssistant: w1', 'rejected': '\n\nHuman: w9\n\nAssistant: w2',
         'id': 'c'}]


def test_rows_are_answered_in_order_and_can_be_read(model, tmp_path):
    message, rows = answer(model, tmp_path, ROWS, details=True)
    assert [row['id'] for row in rows] == ['a', 'b', 'c']
    assert rows[1]['prompt'] == ROWS[1]['prompt']
    assert rows[1]['tools'] == ROWS[1]['tools']
    assert rows[2]['prompt'] == '\n\nHuman: w9\n\nAssistant:'
    prompts = [[3, 4, 5], [1, 7, 8, 2], [0, 9, 0]]  # unknown words are w0
    expected = dict(sampling.sample(
        model.transformer, model.params, [np.array(prompt, np.int32) for prompt in prompts],
        Sampling(3, 6, temperature=1.2, top_p=0.9, stops=(38,)), seed=3))
    truncated = 0
    for place, (row, source) in enumerate(zip(rows, ROWS, strict=True)):
        own = expected[place]
        read = parse_row(row, 'out.jsonl:1')
        texts = [text if isinstance(text, str) else text[0]['content'] for text in read.responses]
        assert texts == [''.join(f' w{token}' for token in one.tokens if token < 38)
                         for one in own]
        assert row['tokens'] == [len(one.tokens) for one in own]
        assert row['truncated'] == [one.truncated for one in own]
        np.testing.assert_allclose(row['log_probs'], [one.log_probs.sum() for one in own],
                                   rtol=1e-4)
        np.testing.assert_allclose(
            row['sampled_log_probs'], [one.sampled_log_probs.sum() for one in own], rtol=1e-4)
        truncated += sum(row['truncated'])
        assert row['id'] == source['id']
    total = sum(len(one.tokens) for own in expected.values() for one in own)
    first, *notes = message.splitlines()
    assert first == (f'{tmp_path}/out.jsonl: 3 prompts, 9 responses of {total} tokens, {truncated} '
                     'truncated at 6 tokens, 0 prompts cut to 18 tokens')
    assert "  note 1: key 'source' not used" in notes
    # What `qrm score` reads of it.
    assert [len(c.responses) for c in read_comparisons(f'{tmp_path}/out.jsonl')] == [3, 3, 3]


def test_the_same_bytes_whatever_is_computed_at_once(model, tmp_path):
    _, rows = answer(model, tmp_path, ROWS)
    again = answer(model, tmp_path, ROWS, name='again.jsonl.gz', rows=1)[1]
    assert again == rows
    # No more is computed than is asked for.
    assert answer(model, tmp_path, ROWS, rows=10**9)[1] == rows
    assert rows[0].keys() == {'prompt', 'responses', 'id'}
    content = (tmp_path / 'again.jsonl.gz').read_bytes()
    answer(model, tmp_path, ROWS, name='again.jsonl.gz', rows=1)
    assert (tmp_path / 'again.jsonl.gz').read_bytes() == content
    assert answer(model, tmp_path, ROWS, seed=4)[1] != rows


def test_texts_can_be_read_as_chats(model, tmp_path):
    _, rows = answer(model, tmp_path, [ROWS[2]], as_chats=True)
    assert rows[0]['prompt'] == [{'role': 'user', 'content': 'w9'}]
    _, chat = answer(model, tmp_path, [{'prompt': rows[0]['prompt'], 'id': 'c'}])
    assert chat == rows


def test_long_prompts_are_cut_from_the_left_and_counted(model, tmp_path):
    words = [f'w{i}' for i in range(1, 30)]
    message, rows = answer(model, tmp_path, [{'prompt': ' '.join(words), 'id': 'a'},
                                             {'prompt': 'w1', 'id': 'b'}])
    assert '1 prompts cut to 18 tokens' in message
    assert rows[0]['prompt'] == ' '.join(words)  # as it was given
    _, short = answer(model, tmp_path, [{'prompt': ' '.join(words[-18:]), 'id': 'a'}])
    assert [text.strip() for text in rows[0]['responses']] == [
        text.strip() for text in short[0]['responses']]
    _, short = answer(model, tmp_path, [{'prompt': ' '.join(words[-4:]), 'id': 'a'}])
    assert rows[0] | {'prompt': ''} == answer(
        model, tmp_path, [{'prompt': ' '.join(words), 'id': 'a'}])[1][0] | {'prompt': ''}
    assert answer(model, tmp_path, [{'prompt': ' '.join(words), 'id': 'a'}],
                  max_length=10)[1][0]['responses'] == short[0]['responses']
    for length in (6, 25):
        with pytest.raises(DataError, match=f'--max_length={length} with --max_new_tokens=6, but '
                                            'the model has 24 positions'):
            answer(model, tmp_path, ROWS, max_length=length)


def test_responses_that_begin_with_their_prompt_are_read_as_they_were(model, tmp_path, monkeypatch):
    repeated = sampling.Sample(np.array([3, 4, 5, 6], np.int32), True, np.zeros(4), np.zeros(4))
    monkeypatch.setattr(candidates, 'sample', lambda *args, **kwargs: [(0, (repeated,))])
    monkeypatch.setattr(candidates, 'text_of', lambda *args: 'w3 w4 w5 w6')
    _, rows = answer(model, tmp_path, [{'prompt': 'w3 w4 w5', 'id': 'a'}])
    read = parse_row(rows[0], 'out.jsonl:1')
    assert (read.prompt, read.responses) == ('w3 w4 w5', ('w3 w4 w5 w6',))
    # Others are told of.
    monkeypatch.setattr(candidates, 'text_of', lambda *args: '{"role": "user", "content": ""}')
    message, _ = answer(model, tmp_path, [{'prompt': 'w3', 'id': 'a'}])
    assert message.endswith('  note 1: row that `qrm score` refuses')


def test_special_tokens_are_left_out_and_counted(model, tmp_path, monkeypatch):
    one = sampling.Sample(np.array([39, 7, 38], np.int32), False, np.zeros(3), np.zeros(3))
    blank = one._replace(tokens=np.array([38], np.int32))
    monkeypatch.setattr(candidates, 'sample', lambda *args, **kwargs: [(0, (one, blank))])
    message, rows = answer(model, tmp_path, [{'prompt': 'w3', 'id': 'a'}])
    assert rows[0]['responses'] == [' w7', '']
    assert message.splitlines()[1:] == [
        '  note 1: special tokens in a response left out', '  note 1: blank response']


def test_what_ends_an_answer(folder, tmp_path):
    assert language_model.load(str(folder)).stops == (38,)
    copy = shutil.copytree(folder, tmp_path / 'copy')
    for given, expected in (([38, 3], (3, 38)), (5, (5, 38)), (None, (38,))):
        (copy / 'generation_config.json').write_text(json.dumps({'eos_token_id': given}))
        assert language_model.load(str(copy)).stops == expected
    (copy / 'generation_config.json').write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(DataError, match=r'generation_config\.json: eos_token_id=\["</s>"\], expec'):
        language_model.load(str(copy))


@pytest.mark.parametrize(('row', 'message'), [
    ({'prompt': ''}, "in.jsonl:1 field 'prompt': got empty text, expected what is answered"),
    ({'prompt': None}, "in.jsonl:1 field 'prompt': got null, expected text or chat messages"),
    ({'prompt': [{'role': 'assistant', 'content': 'x'}]},
     "field 'prompt': got a chat that ends with a message of the assistant"),
    ({'prompt': 3}, "in.jsonl:1 field 'prompt': got an integer, expected text"),
    ('w1', 'in.jsonl:1: got text, expected an object with'),
])
def test_rows_that_cannot_be_answered_stop_with_their_line(model, tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        answer(model, tmp_path, [row])
    assert not (tmp_path / 'out.jsonl').exists()


def test_a_target_is_checked_before_anything_is_read(model, tmp_path):
    with pytest.raises(DataError, match='cannot be written, expected a name that ends in .jsonl'):
        candidates.sample_file(model, f'{tmp_path}/none.jsonl', f'{tmp_path}/out.txt', HOW,
                               seed=0, rows=1)


def test_a_reward_run_is_no_language_model(tmp_path):
    (tmp_path / 'model.json').write_text('{}')
    with pytest.raises(DataError, match='a run, which is a reward model; expected a language'):
        language_model.load(str(tmp_path))


@pytest.mark.parametrize(('name', 'message'), [
    ('bert', 'bert: a bert is an encoder, which has no next token; expected a decoder'),
    ('llama', 'llama: has a reward head, expected a language model'),
])
def test_models_that_do_not_answer_are_refused(name, message):
    with pytest.raises(DataError, match=message):
        language_model.load(str(REFERENCE / name))


def test_bad_input_of_the_command_ends_in_one_line(tmp_path):
    _, err = command('sample', f'--model={REFERENCE / "llama"}', '--input=none.jsonl',
                     f'--output={tmp_path}/out.jsonl', '--temperature=nan', code=2)
    assert err.startswith('error: --temperature=nan, expected 0 or a finite number of at least')
    assert err.count('\n') == 1
