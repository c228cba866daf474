"""Makes openrlhf.json: what OpenRLHF's client sends to a reward server, and what it reads.

    pip install aiohttp==3.14.5 && pip install --no-deps openrlhf==0.11.2
    python tests/reference/make_openrlhf.py

Its class `SingleTurnAgentExecutor` runs as it is, between an engine that generates fixed tokens and
a server that keeps what it is sent. Of the package only its modules `utils.agent` and
`utils.logging_utils` are imported, as the others need torch and Ray.
"""

import asyncio
import base64
import importlib.util
import json
import pathlib
import sys
import types

from aiohttp import web

HERE = pathlib.Path(__file__)
PIECES = {1: '\n\nHuman: Why?', 2: '\n\nAssistant:', 3: ' So', 4: '. é "', 5: '</s>'}
ANSWER = {'rewards': [0.5], 'scores': [0.25], 'extra_logs': {'reward_std': [1.5]}}


class Reads(dict):
    """An answer that remembers which of its keys are read."""

    def __init__(self, answer, read):
        super().__init__(answer)
        self.read = read

    def get(self, key, default=None):
        self.read.append(key)
        return super().get(key, default)


class Engine:
    """Generates three tokens."""

    async def generate(self, *unused, **options):
        output = types.SimpleNamespace(token_ids=[3, 4, 5], finish_reason='stop', logprobs=None)
        return types.SimpleNamespace(outputs=[output])


class Tokenizer:
    """Of two tokens for each prompt."""

    def __call__(self, text, **options):
        ids = types.SimpleNamespace(tolist=lambda: [1, 2])
        return {'input_ids': [ids]}

    def decode(self, tokens, **options):
        return ''.join(PIECES[token] for token in tokens)


def agent():
    """The module `openrlhf.utils.agent`, without those that are imported beside it."""
    folder = pathlib.Path(importlib.util.find_spec('openrlhf').origin).parent / 'utils'
    for name, path in (('openrlhf', folder.parent), ('openrlhf.utils', folder)):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    return importlib.import_module('openrlhf.utils.agent')


async def exchange(module, label, answer, status=200):
    """What is sent for a prompt with this label, and what becomes of an answer."""
    sent, read = [], []

    async def reply(request):
        body = await request.read()
        sent.append({'method': request.method, 'path': request.path, 'headers': {
            name: request.headers[name] for name in ('Content-Type', 'Accept', 'Authorization')},
            'body': body.decode()})
        return web.json_response(answer, status=status if len(sent) == 1 else 200)

    app = web.Application()
    app.router.add_post('/get_reward', reply)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, '127.0.0.1', 0)
    await site.start()
    port = runner.addresses[0][1]
    executor = module.SingleTurnAgentExecutor(f'http://any:token@127.0.0.1:{port}/get_reward')
    fetch = executor._fetch_rewards_via_http

    async def watched(*given):
        return [Reads(one, read) for one in await fetch(*given)]

    executor._fetch_rewards_via_http = watched
    params = types.SimpleNamespace(max_tokens=8, logprobs=None)
    prompt = PIECES[1] + PIECES[2]
    found = await executor.execute(prompt, label, params, 64, Tokenizer(), Engine())
    await runner.cleanup()
    return {'label': label, 'status': status, 'sent': sent, 'answer': answer, 'read': read,
            'kept': {key: found[key] for key in ('reward', 'scores', 'extra_logs')}}


async def exchanges():
    module = agent()
    return [await exchange(module, label, answer, status) for label, answer, status in (
        ('4', ANSWER, 200), (None, {'rewards': [0.5]}, 200), ('4', ANSWER, 503))]


def main():
    found = asyncio.run(exchanges())
    token = found[0]['sent'][0]['headers']['Authorization'].removeprefix('Basic ')
    assert base64.b64decode(token) == b'any:token'
    HERE.with_name('openrlhf.json').write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
