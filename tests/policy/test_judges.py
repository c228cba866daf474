"""Judges of every kind give the probability that the first of two responses is better."""

import http.server
import json
import shutil
import threading
import time

import numpy as np
import pytest
import scipy
import tokenizers
import transformers
from safetensors import numpy as safetensors_numpy

from qrm.data import demo
from qrm.data.comparisons import DataError, MalformedRow
from qrm.data.rows import parse_row
from qrm.policy import judges, questions
from qrm.policy.questions import Answer, Options
from qrm.training import reward_model
from tests.helpers import (
    REFERENCE,
    command,
    reference_checkpoint,
    small_pairwise_model,
    small_reward_model,
    write_tokenizer,
)

SHORT = 'w5 {prompt} w6 {first} w7 {second}'
CHAT = ("{% for m in messages %}{{ m['role'] == 'user' and 'w1' or 'w2' }} {{ m['content'] }} "
        '{% endfor %}{% if add_generation_prompt %}w2 {% endif %}')


def pair(first, second, prompt='w3 w4', **fields):
    return parse_row({'prompt': prompt, 'responses': [first, second], **fields}, 'in.jsonl:1')


def answers(judge, pairs):
    found = dict(judge(pairs))
    return [found[i] for i in range(len(pairs))]


def probabilities(judge, pairs):
    return [answer.probability for answer in answers(judge, pairs)]


@pytest.mark.parametrize(('text', 'expected'), [
    ('language-model:a/smol/', ('smol', 'language-model', 'a/smol/')),
    ('kind one=reward-model:runs/x', ('kind one', 'reward-model', 'runs/x')),
    ('function:a.b:c', ('a.b:c', 'function', 'a.b:c')),
    ('endpoint:org/m:1@https://h/v1', ('org/m:1', 'endpoint', 'org/m:1@https://h/v1')),
    ('gold:helpful', ('gold helpful', 'gold', 'helpful')),
])
def test_judges_are_named(text, expected):
    assert judges.parse(text) == expected


@pytest.mark.parametrize('text', ['gold', 'oracle:helpful', '=gold:helpful', ' =gold:helpful',
                                  'gold:', ''])
def test_what_names_no_judge(text):
    with pytest.raises(ValueError, match='expected KIND:WHAT or NAME=KIND:WHAT'):
        judges.parse(text)


def test_a_question_holds_texts_as_they_are():
    asked = pair('{second}', ' B ', prompt='\n\nHuman: {first}\n\nAssistant:')
    assert questions.question('<{prompt}|{first}|{second}>', asked) == (
        '<Human: {first}\n\nAssistant:|{second}|B>')
    assert questions.question('{prompt} {first} {second}', asked, most=4) == 'ant: {second} B'
    chat = parse_row({'prompt': [{'role': 'system', 'content': 's'},
                                 {'role': 'user', 'content': 'u'}],
                      'responses': ['a', 'b']}, 'in.jsonl:1')
    assert questions.question('{prompt}|{first}|{second}', chat) == 'system: s\n\nuser: u|a|b'
    called = parse_row({'prompt': [{'role': 'user', 'content': 'u', 'name': 'n'}],
                        'responses': ['a', 'b']}, 'in.jsonl:1')
    with pytest.raises(MalformedRow, match="in.jsonl:1: message key 'name'"):
        questions.question(SHORT, called)


def test_templates_and_patterns_are_checked(tmp_path):
    assert questions.read_template('') == questions.QUESTION
    (tmp_path / 'question.txt').write_text(SHORT)
    assert questions.read_template(str(tmp_path / 'question.txt')) == SHORT
    with pytest.raises(DataError, match=r'--template=.*once'):
        questions.read_template('{prompt} {first}')
    with pytest.raises(DataError, match=r"--template='none.txt': neither a text"):
        questions.read_template('none.txt')
    with pytest.raises(ValueError, match='0 groups, expected one'):
        questions.check_pattern('A|B')
    with pytest.raises(ValueError, match='no regular expression'):
        questions.check_pattern('(')
    questions.check_pattern(questions.PATTERN)


# A language model.

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A GPT-2 of 24 positions whose tokens are words, A and B among them."""
    folder = tmp_path_factory.mktemp('model')
    vocab = {f'w{i}': i for i in range(36)} | {'A': 36, 'B': 37, '<eos>': 38, '<pad>': 39}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='w0'))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token='<eos>', pad_token='<pad>').save_pretrained(folder)
    tensors = safetensors_numpy.load_file(REFERENCE / 'model.safetensors')
    tensors = {name: tensor for name, tensor in tensors.items() if name != 'score.weight'}
    safetensors_numpy.save_file(tensors, folder / 'model.safetensors')
    shutil.copyfile(REFERENCE / 'config.json', folder / 'config.json')
    return folder


@pytest.fixture(scope='module')
def chat_folder(folder, tmp_path_factory):
    copy = shutil.copytree(folder, tmp_path_factory.mktemp('chat') / 'model')
    (copy / 'chat_template.jinja').write_text(CHAT)
    return copy


def language_model(folder, **options):
    return judges.load(judges.parse(f'language-model:{folder}'),
                       Options(**{'template': SHORT} | options))


def alone(judge, tokens):
    """P(A) / (P(A) + P(B)) and P(A) + P(B) after a dialogue, computed by itself."""
    transformer, params = judge.model.transformer, judge.model.params
    tokens = np.array([tokens])
    positions = np.arange(tokens.shape[1])[None]
    contexts = transformer.contexts(1 + 0 * tokens, 0 * tokens, positions, 'dense')
    hidden, _ = transformer(params, transformer.embed(params, tokens, positions), contexts)
    logits = np.asarray(transformer.logits(params, hidden), np.float64)[0, -1]
    probs = scipy.special.softmax(logits)
    return scipy.special.softmax(logits[[36, 37]])[0], probs[36] + probs[37]


PAIRS = [pair('w8', 'w9 w10'), pair('w9 w10', 'w8'), pair('w11 w12 w13', 'w14', prompt='w20'),
         pair('w8 w8 w8 w8', 'w30', prompt='w1 w2 w3')]
ASKED = [[5, 3, 4, 6, 8, 7, 9, 10], [5, 3, 4, 6, 9, 10, 7, 8], [5, 20, 6, 11, 12, 13, 7, 14],
         [5, 1, 2, 3, 6, 8, 8, 8, 8, 7, 30]]


@pytest.mark.parametrize('kind', ['chat', 'plain'])
def test_a_language_model_compares_the_two_letters(folder, chat_folder, kind):
    judge = language_model(chat_folder if kind == 'chat' else folder)
    asked = [[1, *ids, 2] if kind == 'chat' else [*ids, 0] for ids in ASKED]  # 'Answer:' is w0
    expected = [alone(judge, ids) for ids in asked]
    found = answers(judge, PAIRS)
    np.testing.assert_allclose([one.probability for one in found], [p for p, _ in expected],
                               atol=1e-5)
    np.testing.assert_allclose([one.share for one in found], [share for _, share in expected],
                               rtol=1e-4)
    assert [one.read for one in found] == list(map(len, asked))
    assert len({round(one.probability, 4) for one in found}) == 4
    # Whatever else is asked, and however much is computed at once.
    for one, own in zip(PAIRS[:2], found[:2], strict=True):
        assert answers(judge, [one])[0].probability == pytest.approx(own.probability, abs=1e-6)
    more = language_model(chat_folder if kind == 'chat' else folder, rows=1)
    assert probabilities(more, PAIRS[::-1]) == pytest.approx(
        [one.probability for one in found[::-1]], abs=1e-6)


def test_long_prompts_lose_their_beginning_and_long_responses_have_no_answer(chat_folder):
    judge = language_model(chat_folder, max_length=12)
    long = ' '.join(f'w{i}' for i in range(10, 30))
    found = answers(judge, [PAIRS[0], pair('w8', 'w9 w10', prompt=long), pair(long, 'w9')])
    assert [one.cut for one in found] == [False, True, False]
    # 11 tokens are left, 3 of them for the prompt: w1 w5 ... w6 w8 w7 w9 w10 w2.
    assert found[1].read == 11
    assert found[1].probability == pytest.approx(
        alone(judge, [1, 5, 27, 28, 29, 6, 8, 7, 9, 10, 2])[0], abs=1e-5)
    assert found[2] == Answer(None, 'responses longer than the model can read')
    with pytest.raises(DataError, match='--max_length=25, but the model has 24 positions'):
        language_model(chat_folder, max_length=25)


def test_what_a_language_model_says_is_known_by_its_question_and_weights(chat_folder, tmp_path):
    judge = language_model(chat_folder)
    assert language_model(chat_folder).identity == judge.identity
    assert language_model(chat_folder, template=f'{SHORT}.').identity != judge.identity
    copy = shutil.copytree(chat_folder, tmp_path / 'model')
    assert language_model(copy).identity == judge.identity
    tensors = safetensors_numpy.load_file(copy / 'model.safetensors')
    first = next(iter(tensors))
    safetensors_numpy.save_file(tensors | {first: tensors[first] + 0.1}, copy / 'model.safetensors')
    assert language_model(copy).identity != judge.identity


def test_a_tokenizer_without_the_letters_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / 'model')
    write_tokenizer(copy)
    with pytest.raises(DataError, match='no token for each of A and B after a question'):
        language_model(copy)


# A reward model.

TEXTS = [pair(' I will help.', ' No.', prompt='Please help me.'),
         pair(' No.', ' I will help.', prompt='Please help me.'),
         pair(' Yes, gladly.', ' Go away.', prompt='Will you?')]


def test_a_reward_model_gives_its_win_probability():
    model = small_reward_model(TEXTS)
    judge = judges.RewardModelJudge('r', 'r', model)
    scores, _ = model.score_comparisons(TEXTS)
    expected = scipy.special.expit([first - second for first, second in scores.rewards])
    np.testing.assert_allclose(probabilities(judge, TEXTS), expected, atol=1e-6)
    assert probabilities(judge, TEXTS)[0] == pytest.approx(1 - probabilities(judge, TEXTS)[1])
    assert abs(expected[0] - 0.5) > 1e-4
    assert all(one.read > 10 for one in answers(judge, TEXTS))


def test_a_pairwise_model_is_read_in_the_order_that_is_asked():
    model = small_pairwise_model(TEXTS)
    judge = judges.RewardModelJudge('r', 'r', model)
    # A head gives half of the log odds of each order, that of the first response first.
    outputs = np.array([one[:, 0] for one in model.predict(model.encode(TEXTS)[0])])
    np.testing.assert_allclose(probabilities(judge, TEXTS), scipy.special.expit(2 * outputs[:, 0]),
                               atol=1e-6)
    first, second, _ = probabilities(judge, TEXTS)
    assert abs(first + second - 1) > 1e-4  # it prefers a place


def test_a_reward_model_is_loaded_as_others_load_it(tmp_path):
    path = reference_checkpoint(tmp_path)
    judge = judges.load(judges.parse(f'reward-model:{path}'), Options(max_length=20))
    asked = [pair(' w8 w9', ' w10'), pair(' w10', ' w8 w9')]
    scores = reward_model.load(str(path), max_length=20).score(
        ['w3 w4'], [[' w8 w9', ' w10']]).rewards[0]
    first = scipy.special.expit(float(scores[0] - scores[1]))
    assert judge.name == 'checkpoint'
    assert probabilities(judge, asked) == pytest.approx([first, 1 - first], abs=1e-6)
    other = judges.load(judges.parse(f'x=reward-model:{path}'), Options(max_length=21))
    assert other.identity != judge.identity  # others are cut


# A function.

@pytest.fixture
def function(tmp_path, monkeypatch):
    """Loads a judge that is the function `judge` of a module with this body."""
    made = []

    def load(body):
        name = f'judge_{tmp_path.name.replace("-", "_")}_{len(made)}'
        made.append(name)
        (tmp_path / f'{name}.py').write_text(body)
        return judges.load(judges.parse(f'function:{name}:judge'), Options())

    monkeypatch.syspath_prepend(tmp_path)
    return load


def test_a_function_is_given_texts_and_chats_of_some_pairs_at_once(function):
    judge = function('seen = []\n'
                     'def judge(prompts, firsts, seconds):\n'
                     '    seen.append((prompts, firsts, seconds))\n'
                     '    return [None if f == "x" else len(f) / 8 for f in firsts]\n')
    chat = parse_row({'prompt': [{'role': 'user', 'content': 'u'}], 'responses': ['a', 'b']}, 'c')
    assert probabilities(judge, [pair('1234', 'b'), pair('x', 'y'), chat]) == [0.5, None, 0.125]
    (prompts, firsts, seconds), = judge.function.__globals__['seen']
    assert prompts == ['w3 w4', 'w3 w4', [{'role': 'user', 'content': 'u'}]]
    assert (firsts[:2], seconds[:2]) == (['1234', 'x'], ['b', 'y'])
    assert firsts[2] == [{'role': 'assistant', 'content': 'a'}]
    assert answers(judge, [pair('x', 'y')]) == [Answer(None, 'none by the function')]


@pytest.mark.parametrize(('returned', 'message'), [
    ('[0.5]', '1 answers to 2 pairs, expected one for each'),
    ('[0.5, 1.5]', r'1.5, expected a probability in \[0, 1\], or None'),
    ('[0.5, float("nan")]', 'nan, expected a probability'),
    ('[True, 0.5]', 'True, expected a probability'),
    ('["A", 0.5]', "'A', expected a probability"),
    ('3', "TypeError: 'int' object is not iterable"),
    ('[1 / 0]', 'ZeroDivisionError: division by zero'),
])
def test_functions_that_give_no_probabilities(function, returned, message):
    judge = function(f'def judge(prompts, firsts, seconds):\n    return {returned}\n')
    with pytest.raises(DataError, match=f':judge: {message}'):
        list(judge(PAIRS[:2]))


@pytest.mark.parametrize(('name', 'message'), [
    ('json', "function:json: 'json', expected MODULE:NAME"),
    ('no_such_module:x', r'function:no_such_module:x: no such function \(ModuleNotFoundError'),
    ('json:nothing', r'function:json:nothing: no such function \(AttributeError'),
    ('json:__name__', 'function:json:__name__: got str, expected a function'),
])
def test_functions_that_are_none(name, message):
    with pytest.raises(DataError, match=message):
        judges.load(judges.parse(f'function:{name}'), Options())


# The truth of the demo.

def test_the_gold_judge_knows_the_win_probabilities_of_the_demo():
    made = demo.generate('helpful', 'test', 30, 0)
    judge = judges.load(judges.parse('gold:helpful'), Options())
    expected = [first.win_probability(second) for first, second in made.truths]
    assert probabilities(judge, made.comparisons) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(DataError, match='gold:honest: expected a workload of the demo'):
        judges.load(judges.parse('gold:honest'), Options())


# An endpoint.

class Server(http.server.ThreadingHTTPServer):
    """Answers each request by what its question's first response says: a key of `SAYS`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.requests: list[tuple[str, dict, dict]] = []
        self.lock = threading.Lock()
        self.url = f'http://127.0.0.1:{self.server_port}/v1'


def completion(content, **more):
    return json.dumps({'choices': [{'message': {'role': 'assistant', 'content': content}}],
                       **more}).encode()


SAYS = {
    'a': (200, completion('A', usage={'prompt_tokens': 11, 'completion_tokens': 1})),
    'b': (200, completion(' **B**.\n')),
    'prose': (200, completion('A better answer is B', usage={'prompt_tokens': 'x'})),
    'other': (200, completion('C')),
    'null': (200, completion(None)),
    'number': (200, completion(7)),
    'list': (200, b'[1, 2]'),
    'empty': (200, b'{"choices": []}'),
    'choices': (200, b'{"choices": {"0": 1}}'),
    'garbage': (200, b'\xff\xfe<html>'),
    'deep': (200, b'[' * 200_000),
    'large': (200, b'x' * (2**20 + 1)),
    'refused': (400, b'{"error": "too long"}'),
    'forbidden': (401, b'no such key: Bearer s3cret'),
    'moved': (302, b''),
    'down': (503, b''),
    'busy': (429, b''),
}


class _Handler(http.server.BaseHTTPRequestHandler):

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        what = body['messages'][0]['content'].split('|')[1]
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            before = sum(one['messages'][0]['content'].split('|')[1] == what
                         for _, _, one in self.server.requests) - 1
        if what == 'slow':
            time.sleep(1.0)
        if what in ('once', 'busy once'):
            what = 'a' if before else {'once': 'down', 'busy once': 'busy'}[what]
        if what == 'drip':
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(40):
                    self.wfile.write(b' ')
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:  # the client has left
                return
            return
        status, content = SAYS.get(what, SAYS['a'])
        try:
            self.send_response(status)
            if status == 302:
                self.send_header('Location', f'{self.server.url}/elsewhere')
            if status == 429:
                self.send_header('Retry-After', '0')
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            return

    def log_message(self, *unused):
        """Nothing."""


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def endpoint(url, **options):
    return judges.load(judges.parse(f'endpoint:org/model@{url}'), Options(**{
        'template': '{prompt}|{first}|{second}', 'backoff': 0.001, 'retries': 1} | options))


def test_an_endpoint_is_asked_as_a_chat(server, monkeypatch):
    monkeypatch.setenv('MY_TOKEN', 's3cret')
    judge = endpoint(server.url, token_variable='MY_TOKEN', answer_tokens=5)
    found = answers(judge, [pair('a', 'x', prompt='p'), pair('b', 'x')])
    assert found == [Answer(1.0, read=11, written=1), Answer(0.0)]
    path, headers, body = next(one for one in server.requests if '|a|' in str(one[2]))
    assert path == '/v1/chat/completions'
    assert headers['Authorization'] == 'Bearer s3cret'
    assert body == {'model': 'org/model', 'messages': [{'role': 'user', 'content': 'p|a|x'}],
                    'temperature': 0, 'max_tokens': 5}
    assert 's3cret' not in repr(judge) + judge.identity
    assert endpoint(server.url).identity == endpoint(f'{server.url}/chat/completions').identity


def test_no_token_is_sent_unless_it_is_named(server, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 's3cret')
    assert probabilities(endpoint(server.url), [pair('a', 'x')]) == [1.0]
    assert 'Authorization' not in server.requests[0][1]


def test_answers_that_say_nothing_are_no_answers(server):
    said = ['prose', 'other', 'null', 'number', 'list', 'empty', 'choices', 'garbage', 'deep',
            'large', 'refused']
    found = answers(endpoint(server.url), [pair(what, 'x') for what in said])
    assert [one.probability for one in found] == [None] * len(said)
    assert all(one.final for one in found)
    assert [one.failure for one in found] == [
        *['no A or B where the pattern looks'] * 2, *['no completion'] * 7,
        'an answer of more than 1048576 bytes', 'refused with status 400']
    assert len(server.requests) == len(said)  # none is asked again
    assert endpoint(server.url, pattern='answer is ([AB])') is not None
    assert probabilities(endpoint(server.url, pattern='answer is ([AB])'),
                         [pair('prose', 'x')]) == [0.0]
    found, = answers(endpoint(server.url), [pair('y' * 2**20, 'x')])
    assert found.failure == 'a question of more than 1048576 characters'


def test_what_cannot_be_answered_now_is_asked_again(server):
    judge = endpoint(server.url, at_once=1)
    found = answers(judge, [pair('once', 'x'), pair('busy once', 'x'), pair('down', 'x')])
    assert found == [Answer(1.0, read=11, written=1)] * 2 + [
        Answer(None, 'status 503', final=False)]
    assert len(server.requests) == 6


@pytest.mark.parametrize('what', ['slow', 'drip'])
def test_an_answer_that_takes_too_long(server, what):
    begin = time.monotonic()
    found, = answers(endpoint(server.url, timeout=0.2, retries=0), [pair(what, 'x')])
    assert found == Answer(None, 'nothing within 0.2 s', final=False)
    assert time.monotonic() - begin < 30.0  # it ends; how soon is up to the machine


def test_a_server_that_does_not_answer_is_given_up(server):
    judge = endpoint(server.url, at_once=2, retries=0)
    with pytest.raises(DataError, match=r'/v1/chat/completions: no answer to 3 questions in a row '
                                        r'\(the last: status 503\)'):
        answers(judge, [pair('down', f'x{i}') for i in range(50)])
    assert len(server.requests) < 20
    server.shutdown()
    server.server_close()
    found, = answers(endpoint(server.url, retries=0), [pair('a', 'x')])
    assert found.failure.startswith('no connection')


def test_an_endpoint_that_does_not_want_to_be_asked_ends_the_run(server, monkeypatch):
    monkeypatch.setenv('MY_TOKEN', 's3cret')
    judge = endpoint(server.url, token_variable='MY_TOKEN')
    with pytest.raises(DataError, match=r'status 401 \(no such key: Bearer \.\.\.\), expected 200'):
        answers(judge, [pair('forbidden', 'x')])
    # No redirection is followed, as the token would go elsewhere.
    with pytest.raises(DataError, match='status 302'):
        answers(judge, [pair('moved', 'x')])
    assert {path for path, _, _ in server.requests} == {'/v1/chat/completions'}


@pytest.mark.parametrize(('given', 'message'), [
    ('http://example.org/v1', 'http://example.org/v1, expected https, or http of this machine'),
    ('http://127.0.0.1.example.org/v1', 'expected https'),
    ('https://user:secret@example.org/v1', 'without a password or a fragment'),
    ('https://example.org/v1#x', 'without a password or a fragment'),
    ('https:///v1', 'expected a URL such as https://host/v1'),
    ('https://example.org:port/v1', 'no URL'),
    ('httpx://example.org', 'expected https'),
])
def test_addresses_that_are_not_asked(given, message):
    with pytest.raises(DataError, match=message) as caught:
        endpoint(given)
    assert 'secret' not in str(caught.value)


def test_what_stands_behind_the_path_is_not_told(monkeypatch):
    for value in (None, '', 'two words', 'line\nfeed', 'é'):
        monkeypatch.delenv('MY_TOKEN', raising=False)
        if value is not None:
            monkeypatch.setenv('MY_TOKEN', value)
        with pytest.raises(DataError, match=r'^environment variable MY_TOKEN: \w') as caught:
            endpoint('https://example.org/v1', token_variable='MY_TOKEN')
        assert not value or value not in str(caught.value)
    with pytest.raises(DataError) as caught:
        endpoint('http://example.org/v1?key=secret')
    assert 'secret' not in str(caught.value)
    with pytest.raises(DataError, match='expected endpoint:MODEL@URL'):
        judges.load(judges.parse('endpoint:model'), Options())


def test_bad_flags_of_the_command_end_in_one_line(tmp_path):
    (tmp_path / 'in.jsonl').write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    _, err = command('label', '--judge=gold:helpful,oracle:x', f'--input={tmp_path}/in.jsonl',
                     f'--output={tmp_path}/out.jsonl', code=2)
    assert err.startswith("error: --judge, --pattern: 'oracle:x', expected KIND:WHAT or NAME=")
    assert err.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['in.jsonl']
