"""The load on a server and the check of its answers, against servers whose answers are known."""

import asyncio
import collections
import contextlib
import json

import numpy as np
import pytest

from benchmarks import serving
from qrm.data import demo
from qrm.data.comparisons import DataError

PAIRS = [(f'p{i}', f' r{i}') for i in range(5)]
KNOWN = [np.array([i - 1.0, i + 1.0, i]) for i in range(5)]


@contextlib.asynccontextmanager
async def answering(answer):
    """Port of a server that answers (path, body) by (status, body), or closes for None."""

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b'\r\n\r\n')).decode()
                length = int(head.split('Content-Length: ')[1].split('\r\n')[0])
                body = json.loads(await reader.readexactly(length))
                found = answer(head.split()[1], body)
                if found is None:
                    break
                content = json.dumps(found[1]).encode()
                writer.write(f'HTTP/1.1 {found[0]} X\r\nContent-Length: {len(content)}\r\n\r\n'
                             .encode() + content)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, '127.0.0.1', 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


class Process:
    """What is stopped."""

    stopped = False

    def send_signal(self, unused_number):
        self.stopped = True


def known(path, body):
    """The answer of a server that makes no mistake."""
    text = {'/score': lambda: body['prompt'] + body['responses'][0],
            '/get_reward': lambda: body['query'][0], '/classify': lambda: body['input']}[path]()
    low, high, reward = KNOWN[int(text[1])].tolist()
    return {'/score': {'rewards': [reward], 'quantiles': [[low, high]]},
            '/get_reward': {'rewards': [reward]},
            '/classify': {'data': [{'probs': [reward]}]}}[path]


def counted(answer, process, answers=200):
    counts = collections.Counter()

    async def run():
        async with answering(answer) as port:
            return await serving._ask(port, PAIRS, KNOWN, counts, 0, (process, answers), 8)

    assert asyncio.run(run()) >= answers
    return counts


def test_right_answers_are_counted_and_the_server_is_stopped():
    process = Process()
    counts = counted(lambda path, body: (503, {}) if process.stopped else (200, known(path, body)),
                     process)
    assert process.stopped
    assert counts['right'] >= 200
    assert counts['left'] > 0
    assert counts['503 after the stop'] > 0
    assert counts['wrong'] == counts['unanswered before the stop'] == 0


def test_an_answer_to_another_text_and_a_lost_one_are_found():
    process, number = Process(), iter(range(10**6))

    def answer(path, body):
        if process.stopped:
            return None
        k = next(number)
        if k == 7:
            return None
        if k == 9:  # what another text would get
            other = 'p3 r3' if '3' not in str(body) else 'p4 r4'
            return 200, known(path, {'query': [other], 'input': other, 'prompt': other,
                                     'responses': ['']})
        return 200, known(path, body)

    counts = counted(answer, process)
    assert counts['wrong'] == 1
    assert counts['unanswered before the stop'] == 1
    assert counts['unanswered after the stop'] + counts['refused after the stop'] > 0


def test_measurements_by_hand():
    async def run(answer, clients):
        async with answering(answer) as port:
            return await serving.measure(port, ['a', 'b', 'c', 'd'], clients)

    seen = []

    def answer(path, body):
        seen.append((path, body['query']))
        return 200, {'rewards': [1.0]}

    point = asyncio.run(run(answer, 2))
    assert sorted(seen) == [('/get_reward', [text]) for text in 'abcd']
    assert point.answers == 4
    assert 0.0 < point.median <= point.p99 < 4 / point.rate
    with pytest.raises(ExceptionGroup) as failed:
        asyncio.run(run(lambda path, body: (429, {}), 1))
    assert failed.group_contains(DataError, match='answered 429')


def test_workloads_are_the_same_every_time():
    comparisons = demo.generate('helpful', 'train', 20, 0).comparisons
    found = serving.workloads(comparisons, 50)
    assert found == serving.workloads(comparisons, 50)
    assert sorted(found['distinct'][:40]) == sorted(
        c.prompt + response for c in comparisons for response in c.responses)
    assert len(found['distinct']) == len(found['best of 16']) == 50
    [prompt] = {c.prompt for c in comparisons if found['best of 16'][0].startswith(c.prompt)}
    assert all(text.startswith(prompt) for text in found['best of 16'][:16])
    assert len(set(found['best of 16'][:16])) == 16


def test_the_table_has_ratios():
    def points(rate, p99):
        return [{'rate': rate * k, 'median': 0.5, 'p99': p99, 'answers': 16} for k in (1, 2, 3)]

    text = serving.table({'largest_difference': 1e-6, 'load_average': [1.0, 1.0, 1.0], 'points': {
        'distinct/8/qrm': points(6.0, 1.0), 'distinct/8/transformers': points(2.0, 4.0)}})
    assert text.splitlines()[-1] == 'distinct, 8 clients: 3.00 x the throughput, 0.25 x the p99'
    assert 'distinct      8 qrm                    16    12.00     0.500    1.000' in text
