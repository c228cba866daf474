"""The server: whom it answers, what it refuses and how, and how it ends."""

import asyncio
import base64
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

import qrm
from qrm.data.comparisons import DataError
from qrm.rewards import selection
from qrm.serving import export, protocols, server
from qrm.serving.batching import Step
from qrm.serving.server import Limits, Service
from qrm.training.interruptions import NonFiniteLoss
from tests.helpers import REFERENCE, ROOT, command

MEAN = selection.parse_rule('mean')


@pytest.fixture(scope='module')
def client(model):
    with TestClient(Service(model, MEAN, 'small').app(), base_url='http://localhost') as client:
        yield client


@contextlib.contextmanager
def serving(model, step=None, **options):
    """A client of a server, whose steps may be others than the model's, and the server."""
    service = Service(model, MEAN, 'small', **options)
    if step:
        service._batcher._step = step
    with TestClient(service.app(), base_url='http://localhost') as client:
        yield client, service


def test_every_protocol_gives_the_reward_of_the_model(model, comparisons, client):
    prompt, response = comparisons[0].prompt, comparisons[0].responses[0]
    expected = model.score([prompt], [response]).rewards[0]
    whole, raw = prompt + response, {'use_activation': False}
    for path, body, read in (
        ('/score', {'prompt': prompt, 'responses': [response]}, lambda x: x['rewards'][0]),
        ('/get_reward', {'query': [whole], 'prompts': [prompt], 'labels': [None]},
         lambda x: x['rewards'][0]),
        ('/slime', {'prompt': prompt, 'response': response, 'label': ''}, lambda x: x),
        ('/classify', {'text': whole}, lambda x: x['embedding'][0]),
        ('/classify', {'input': whole} | raw, lambda x: x['data'][-1]['probs'][-1]),
        ('/pooling', {'input': whole} | raw, lambda x: x['data'][0]['data'][0]),
        ('/v1/embeddings', {'input': whole}, lambda x: x['data'][-1]['embedding'][-1]),
        ('/rerank', {'query': prompt, 'texts': [response], 'raw_scores': True},
         lambda x: x[0]['score']),
        ('/predict', {'inputs': whole, 'raw_scores': True}, lambda x: x[0]['score']),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert read(answer.json()) == pytest.approx(expected, abs=1e-4)


def test_quantiles_are_those_of_the_model(model, comparisons, client):
    prompt, responses = comparisons[1].prompt, list(comparisons[1].responses)
    found = client.post('/score', json={'prompt': prompt, 'responses': responses}).json()
    expected = model.score([prompt], [responses])
    np.testing.assert_allclose(found['quantiles'], expected.quantiles[0], atol=1e-4)
    np.testing.assert_allclose(found['levels'], model.taus, atol=1e-6)
    encoded, _ = model.encode(comparisons[1:2])
    assert sum(found['tokens']) == sum(len(ids) + len(encoded[0].prompt)
                                       for ids in encoded[0].responses)


def test_answers_go_to_those_who_asked(model, comparisons, client):
    pairs = [(c.prompt, response) for c in comparisons for response in c.responses]
    expected = model.score(*map(list, zip(*pairs, strict=True))).rewards
    found = {}

    def ask(i):
        body = {'query': [''.join(pairs[i])]}
        found[i] = client.post('/get_reward', json=body).json()['rewards'][0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose([found[i] for i in range(len(pairs))], expected, atol=1e-4)


@pytest.mark.parametrize(('method', 'path', 'body', 'status', 'message'), [
    ('POST', '/score', b'{', 400, 'the body is not JSON'),
    ('POST', '/score', b'[' * 100_000, 400, 'the body is not JSON'),
    ('POST', '/score', b'\xff', 400, 'the body is not JSON'),
    ('POST', '/score', b'{}', 422, 'prompt: Field required'),
    ('POST', '/score', b'{"prompt": "a", "responses": [null]}', 422, 'responses.0'),
    ('POST', '/score', b'{"prompt": [{"role": "user", "content": "a"}], "responses": ["a"]}', 422,
     'responses[0]: chat messages, but the tokenizer'),
    ('POST', '/nothing', b'{}', 404, 'no such path, expected one of /score, /get_reward'),
    ('GET', '/score', b'', 405, 'GET is not taken here'),
])
def test_what_is_asked_wrongly_is_told_in_a_line(client, method, path, body, status, message):
    answer = client.request(method, path, content=body)
    assert answer.status_code == status
    assert answer.json()['error'].startswith(message)
    assert '\n' not in answer.json()['error']


def test_a_rule_that_needs_other_responses_is_no_reward(model):
    with pytest.raises(ValueError, match="rule 'mean-std:1' needs a scale of other responses"):
        Service(model, selection.parse_rule('mean-std:1'), 'small')


def test_a_model_that_scores_no_response_alone_is_refused(pairwise_model):
    with pytest.raises(DataError, match='a pairwise model compares two responses and scores none'):
        Service(pairwise_model, MEAN, 'small')


def test_limits(model):
    limits = Limits(body_bytes=4000, texts=3, waiting_tokens=100)
    with serving(model, limits=limits) as (client, _):
        answer = client.post('/rerank', json={'query': 'a', 'texts': ['b'] * 4})
        assert (answer.status_code, answer.json()) == (
            413, {'error': '4 texts, expected at most 3', 'error_type': 'validation'})
        assert client.post('/classify', content=b'a' * 4001).status_code == 413
        # Also where the length is not told.
        answer = client.post('/classify', content=iter([b'a' * 3000] * 2))
        assert answer.json()['error']['message'] == 'a body of more than 4000 bytes'
        answer = client.post('/slime', json={'prompt': 'a b ' * 200, 'response': 'c'})
        assert answer.status_code == 413
        assert 'tokens at once, expected at most 100' in answer.json()['error']
        assert 'Retry-After' not in answer.headers
        assert client.post('/slime', json={'prompt': 'a', 'response': 'c'}).status_code == 200


def test_what_is_too_long_is_cut_and_counted_unless_nothing_may_be_cut(model):
    body = {'query': 'a b c d ' * 100, 'texts': ['x']}
    with serving(model) as (client, _):
        assert client.post('/rerank', json=body).status_code == 200
        assert 'qrm_cut_texts_total 1.0' in client.get('/metrics').text
        answer = client.post('/rerank', json=body | {'truncate': False})
        assert answer.status_code == 413
        assert answer.json()['error'] == '1 texts are longer than 200 tokens, and none may be cut'


def test_under_too_much_load_clients_are_told_when_to_come_back(model):
    free, entered = threading.Event(), threading.Event()
    service_step = []

    def step(waiting):
        entered.set()
        assert free.wait(30)
        return service_step[0](waiting)

    with serving(model, step, limits=Limits(waiting_tokens=60)) as (client, service):
        service_step.append(service.scorer.step)
        body = {'prompt': 'a b c d e f g h i j', 'response': ' k l m n o p q r s t'}
        first = []
        thread = threading.Thread(target=lambda: first.append(client.post('/slime', json=body)))
        thread.start()
        assert entered.wait(30)
        answer = client.post('/slime', json=body)
        assert answer.status_code == 429
        assert int(answer.headers['Retry-After']) >= 1
        assert 'tokens wait, expected at most 60' in answer.json()['error']
        # While the model computes, the server answers.
        assert client.get('/health').json() == {'status': 'ok', 'model': 'small', 'rule': 'mean'}
        assert re.search(r'qrm_waiting_tokens [1-9]', client.get('/metrics').text)
        free.set()
        thread.join()
        assert first[0].status_code == 200
        assert 'qrm_waiting_tokens 0.0' in client.get('/metrics').text


def test_a_request_that_takes_too_long_ends_and_frees_its_place(model):
    free = threading.Event()

    def step(waiting):
        free.wait(30)
        return Step({0: RuntimeError('late')}, 0, 0)

    with serving(model, step, limits=Limits(seconds=0.2)) as (client, service):
        answer = client.post('/classify', json={'input': 'a'})
        assert answer.status_code == 503
        assert answer.json()['error']['message'] == 'no answer in 0.2 seconds'
        assert answer.headers['Retry-After'] == '1'
        assert service._batcher.waiting == 0
        free.set()


def test_what_is_not_finite_is_an_error_and_no_number(model):
    def step(waiting):
        return Step({0: NonFiniteLoss('response: a reward that is not finite')}, 1, 1)

    with serving(model, step) as (client, _):
        answer = client.post('/slime', json={'prompt': 'a', 'response': 'b'})
        assert (answer.status_code, answer.json()) == (
            500, {'error': 'response: a reward that is not finite'})
        assert 'qrm_failed_texts_total 1.0' in client.get('/metrics').text


def test_a_failure_that_nobody_thought_of_is_a_line_too(model, capsys):
    def step(waiting):
        raise RuntimeError('secret\ndetails')

    with serving(model, step) as (client, _):
        answer = client.post('/slime', json={'prompt': 'a', 'response': 'b'})
        assert (answer.status_code, answer.json()) == (500, {'error': 'failed (RuntimeError)'})
    assert capsys.readouterr().err == 'error: /slime: RuntimeError: secret details\n'


def test_a_token_is_asked_for(model):
    body = {'prompt': 'a', 'response': 'b'}
    basic = base64.b64encode(b'any:word').decode()
    with serving(model, token='word') as (client, _):
        for header in ('', 'Bearer wor', 'Bearer word2', 'word', 'Basic word', 'Basic !',
                       'Bearer', f'Digest {basic}', 'Bearer \u00e9'.encode('latin-1')):
            answer = client.post('/slime', json=body, headers={'Authorization': header})
            assert answer.status_code == 401, header
            assert answer.headers['WWW-Authenticate'] == 'Basic realm="qrm"'
        for header in ('Bearer word', 'bearer  word', f'Basic {basic}'):
            answer = client.post('/slime', json=body, headers={'Authorization': header})
            assert answer.status_code == 200, header
        for path in ('/', '/docs', '/score.js', '/style.css', '/openapi.json', '/metrics'):
            assert client.get(path).status_code == 401
            assert client.get(path, auth=('any', 'word')).status_code == 200
        assert client.get('/health').status_code == 200


def test_without_a_token_only_names_of_this_machine_are_answered(client):
    body = {'prompt': 'a', 'response': 'b'}
    for host, status in (('localhost:8000', 200), ('127.0.0.1', 200), ('[::1]:80', 200),
                         ('evil.example', 403), ('localhost.evil.example', 403), ('', 403)):
        answer = client.post('/slime', json=body, headers={'Host': host})
        assert answer.status_code == status, host


def test_what_the_client_of_openrlhf_sent_is_answered_with_what_it_read(model):
    """openrlhf.json has the requests of its own class, and the keys that it asked answers for."""
    exchanges = json.loads((REFERENCE / 'openrlhf.json').read_text(encoding='utf-8'))
    assert [exchange['sent'][0]['path'] for exchange in exchanges] == ['/get_reward'] * 3
    with serving(model, token='token') as (client, _):
        for exchange in exchanges:
            for sent in exchange['sent']:
                answer = client.request(sent['method'], sent['path'], content=sent['body'].encode(),
                                        headers=sent['headers'])
                assert answer.status_code == 200
                found = answer.json()
                assert set(exchange['read']) == set(found)
                # As in the answers that it took: a list for each, of one value for its one text.
                for values in (found['rewards'], found['scores'], *found['extra_logs'].values()):
                    assert [type(value) for value in values] == [float]
                body = json.loads(sent['body'])
                [query], [prompt] = body['query'], body['prompts']
                expected = model.score([prompt], [[query.removeprefix(prompt)]]).rewards[0]
                np.testing.assert_allclose(found['rewards'], expected, atol=1e-5)


def test_pages_and_documents(client):
    for path, kind, files in (('/', 'html', ['style.css', 'score.js']),
                              ('/docs', 'html', ['style.css', 'docs.js']),
                              ('/score.js', 'javascript', []), ('/docs.js', 'javascript', []),
                              ('/style.css', 'css', [])):
        page = client.get(path)
        assert page.headers['content-type'] == f'text/{kind}; charset=utf-8'
        policy = page.headers['Content-Security-Policy']
        assert "default-src 'none'" in policy
        assert 'unsafe' not in policy
        assert 'http' not in page.text
        assert 'innerHTML' not in page.text
        # Beside the icon, which is empty, a page names the files that it is made of.
        assert re.findall(r'(?:src|rel="stylesheet" href)="([^"]*)"', page.text) == files
        assert all(client.get(f'/{file}').status_code == 200 for file in files)
    # The look of reports comes first, so that the pages can change it.
    style = client.get('/style.css').text
    assert style.index('--paper: #ffffff') < style.index('--curve0')
    document = client.get('/openapi.json').json()
    assert set(document['paths']) == {route.path for route in protocols.ROUTES}
    assert document['info']['title'] == 'qrm: small'


def test_metrics_count_what_was_asked(model):
    with serving(model) as (client, _):
        for _ in range(2):
            client.post('/rerank', json={'query': 'a b', 'texts': [' c', ' d', ' e']})
        client.post('/rerank', json={})
        text = client.get('/metrics').text
    values = dict(line.rsplit(' ', 1) for line in text.splitlines() if line[0] != '#')
    assert values['qrm_requests_total{path="/rerank",status="200"}'] == '2.0'
    assert values['qrm_requests_total{path="/rerank",status="422"}'] == '1.0'
    assert values['qrm_request_seconds_count{path="/rerank"}'] == '3.0'
    assert values['qrm_texts_total{path="/rerank"}'] == '6.0'
    asked, packed, computed = (float(values[f'qrm_tokens_total{{kind="{kind}"}}'])
                               for kind in ('asked', 'packed', 'computed'))
    assert packed <= asked
    assert packed <= computed


def test_a_client_that_goes_away_is_not_waited_for(model):
    free = threading.Event()

    def step(waiting):
        free.wait(30)
        return Step({0: RuntimeError('late')}, 0, 0)

    async def run():
        service = Service(model, MEAN, 'small')
        service._batcher._step = step
        app, sent = service.app(), []
        body = json.dumps({'prompt': 'a', 'response': 'b'}).encode()
        messages = iter([{'type': 'http.request', 'body': body, 'more_body': False},
                         {'type': 'http.disconnect'}])

        async def receive():
            return next(messages)

        async def send(message):
            sent.append(message)

        async with service._lifespan(app):
            await app({'type': 'http', 'method': 'POST', 'path': '/slime', 'query_string': b'',
                       'headers': [(b'host', b'localhost')]}, receive, send)
        assert sent[0]['status'] == 499
        assert (service.running, service._batcher.waiting) == (0, 0)
        free.set()

    asyncio.run(run())


def test_requests_that_come_after_the_signal_are_refused(model):
    with serving(model) as (client, service):
        service.stopping = True
        answer = client.post('/classify', json={'input': 'a'})
        assert (answer.status_code, answer.json()['error']['message']) == (
            503, 'the server is stopping')
        assert answer.headers['Connection'] == 'close'
        assert client.get('/health').status_code == 503


def test_tokens_and_addresses(tmp_path, monkeypatch):
    file = tmp_path / 'token'
    file.write_text(' word\n')
    assert server.read_token(str(file)) == 'word'
    monkeypatch.setenv(server.TOKEN_VARIABLE, 'other')
    assert server.read_token('') == 'other'
    assert server.read_token(str(file)) == 'word'
    monkeypatch.delenv(server.TOKEN_VARIABLE)
    assert server.read_token('') == ''
    for content in ('', ' \n', 'two words'):
        file.write_text(content)
        with pytest.raises(DataError, match='expected one word'):
            server.read_token(str(file))
    with pytest.raises(DataError, match='cannot be read'):
        server.read_token(str(tmp_path / 'none'))
    assert [server.is_own(host) for host in ('127.0.0.1', '::1', 'localhost', '127.8.8.8')] == (
        [True] * 4)
    assert not any(map(server.is_own, ('0.0.0.0', '::', 'example.org', '10.0.0.1', '')))
    with server.listen('127.0.0.1', 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(DataError, match=f'--host=127.0.0.1 --port={port}: cannot be listened'):
            server.listen('127.0.0.1', port)


def test_other_machines_are_listened_to_with_a_token_only():
    # Told before anything is loaded.
    _, err = command('serve', '--checkpoint=nowhere', '--host=0.0.0.0', code=2)
    assert err == ('error: --host=0.0.0.0 without a token, expected --token_file or '
                   'QRM_SERVE_TOKEN, or an address of this machine alone\n')


def test_what_was_asked_before_the_signal_is_answered(model, tmp_path):
    export.export(model, str(tmp_path / 'model'), kind='quantiles')
    process = subprocess.Popen(
        [sys.executable, '-m', 'experiments.serve', f'--checkpoint={tmp_path}/model', '--port=0',
         '--max_length=64', '--batch_tokens=64', '--rule=cvar:0.2'], cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'}, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, '')
        line = next(line for line in lines if line.startswith('http://127.0.0.1:'))
        assert 'rule cvar:0.2; /score, ' in line
        port = int(line.split(':')[2])
        running, other = (http.client.HTTPConnection('127.0.0.1', port) for _ in range(2))
        other.request('GET', '/health')
        assert other.getresponse().read()
        texts = [' '.join(map(str, range(i, i + 25))) for i in range(200)]
        running.request('POST', '/get_reward', json.dumps({'query': texts}))
        while True:  # until the model works on it
            other.request('GET', '/metrics')
            if re.search(r'qrm_waiting_tokens [1-9]', other.getresponse().read().decode()):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert next(lines).startswith('SIGTERM: answering 1 requests, then stopping')
        other.request('POST', '/get_reward', json.dumps({'query': ['a']}))
        refused = other.getresponse()
        assert (refused.status, refused.read()) == (503, b'{"error":"the server is stopping"}')
        answer = running.getresponse()
        assert answer.status == 200
        found = json.loads(answer.read())['rewards']
        running.close()
        other.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    reward = qrm.reward(str(tmp_path / 'model'), rule='cvar:0.2', max_length=64)
    np.testing.assert_allclose(found, reward([''] * 200, texts), atol=1e-4)
