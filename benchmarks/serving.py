"""Asks `qrm serve` under load, beside a plain server of transformers, and checks every answer.

    python -m benchmarks.serving --checkpoint=DIR --input=pairs.jsonl --workdir=results/serving \\
      --torch_python=ENV/bin/python
    python -m benchmarks.serving --mode=integrity --checkpoint=DIR --input=pairs.jsonl \\
      --workdir=results/serving --answers=100000

'load': 1, 8 and 64 clients, each of which sends its next request when it has its answer, over
loopback, as OpenRLHF asks: one text a request. 'distinct' texts are dialogues of the input in
random order; 'best of 16' are 16 responses to one prompt, one after the other. Both servers run in
processes of their own, and are asked in turns. 'integrity': clients that come and go ask in three
protocols, the server is stopped in the middle and started again, and each answer is compared with
the score that the model gives the text when it is asked directly.
"""

import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from absl import flags

from qrm.commands import launch
from qrm.data.comparisons import DataError
from qrm.data.sources import read_comparisons
from qrm.training import reward_model, workdir
from qrm.training.schema import ConfigError

_WORKER = Path(__file__).with_name('serving_worker.py')
_RESPONSES = 16
_FEWEST = 16  # requests of a measurement
_TEXTS = 2000  # of 'integrity'
_LEAVES = 0.02  # of requests: the client goes without its answer, and another comes
_TOLERANCE = 1e-4  # of a score
_TOLD = 5000  # answers, after which the number is printed
_START_SECONDS = 600


class Failed(Exception):
    """A request without an answer; says why."""


class Point(NamedTuple):
    """A measurement.

    Attributes:
      rate: answers a second.
      median, p99: seconds from a request to its answer.
      answers: how many.
    """

    rate: float
    median: float
    p99: float
    answers: int


class Client:
    """A connection that is kept, and made again when it has ended."""

    def __init__(self, port: int):
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: Any, *, leave: bool = False) -> tuple[int, Any]:
        """Status and decoded answer; with `leave` goes away before it is there.

        Raises:
          Failed: 'refused', if nobody listens, or 'unanswered', if the connection ended.
        """
        if self._streams is None:
            try:
                self._streams = await asyncio.open_connection('127.0.0.1', self._port)
            except OSError as error:
                raise Failed('refused') from error
        reader, writer = self._streams
        content = json.dumps(body).encode()
        try:
            writer.write(f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: '
                         f'{len(content)}\r\n\r\n'.encode() + content)
            await writer.drain()
            if leave:
                await self.close()
                return 0, None
            head = (await reader.readuntil(b'\r\n\r\n')).decode().lower()
            fields = dict(line.split(': ', 1) for line in head.splitlines()[1:] if line)
            found = json.loads(await reader.readexactly(int(fields['content-length'])))
        except (OSError, asyncio.IncompleteReadError) as error:
            await self.close()
            raise Failed('unanswered') from error
        if fields.get('connection') == 'close':
            await self.close()
        return int(head.split()[1]), found

    async def close(self) -> None:
        """Ends the connection."""
        if self._streams is not None:
            (_, writer), self._streams = self._streams, None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *unused: Any) -> None:
        await self.close()


def main() -> None:
    values = flags.FLAGS
    comparisons = [c for c in read_comparisons(values.input)
                   if all(isinstance(text, str) for text in (c.prompt, *c.responses))]
    if len(comparisons) < _RESPONSES:
        raise DataError(f'{values.input}: {len(comparisons)} comparisons of texts, expected at '
                        f'least {_RESPONSES}')
    with workdir.lock(values.workdir):
        if values.mode == 'integrity':
            print(integrity(values.checkpoint, comparisons, values.workdir, values.answers,
                            values.max_length))
            return
        clients = [int(count) for count in values.clients]
        print(load(values.checkpoint, comparisons, values.workdir,
                   torch_python=values.torch_python, clients=clients, each=values.requests,
                   rounds=values.rounds, max_length=values.max_length))


def load(checkpoint: str, comparisons: Sequence[Any], folder: str, *, torch_python: str,
         clients: Sequence[int], each: int, rounds: int, max_length: int) -> str:
    """Times both servers; leaves `load.json` and their logs in `folder`; returns a table."""
    texts = workloads(comparisons, max(clients) * each + _FEWEST)
    found: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    with contextlib.ExitStack() as stack:
        ports = {'qrm': stack.enter_context(running(
            qrm_command(checkpoint, max_length), f'{folder}/qrm.log'))[0]}
        if torch_python:
            ports['transformers'] = stack.enter_context(running(
                [torch_python, str(_WORKER), f'--model={checkpoint}',
                 f'--max_length={max_length}'], f'{folder}/transformers.log'))[0]
        differences = asyncio.run(_differences(list(ports.values()), texts['distinct'][:_FEWEST]))
        for number in range(rounds):
            for workload, some in texts.items():
                for count in clients:
                    names = list(ports) if number % 2 == 0 else list(ports)[::-1]
                    for name in names:
                        print(f'round {number + 1} of {rounds}: {workload}, {count} clients, '
                              f'{name}', flush=True)
                        point = asyncio.run(measure(
                            ports[name], some[:max(_FEWEST, count * each)], count))
                        found[f'{workload}/{count}/{name}'].append(point._asdict())
    result = {'largest_difference': differences, 'load_average': os.getloadavg(), 'points': found}
    workdir.write_json(os.path.join(folder, 'load.json'), result)
    return table(result)


def workloads(comparisons: Sequence[Any], count: int) -> dict[str, list[str]]:
    """Texts to be asked for, at least `count` of each kind, in order; the same every time."""
    choose = random.Random(0)
    dialogues = [c.prompt + response for c in comparisons for response in c.responses]
    choose.shuffle(dialogues)
    responses = [response for c in comparisons for response in c.responses]
    groups = [c.prompt + response for c in choose.sample(comparisons, len(comparisons))
              for response in choose.sample(responses, _RESPONSES)]
    found = {'distinct': dialogues, f'best of {_RESPONSES}': groups}
    return {name: (texts * -(-count // len(texts)))[:count] for name, texts in found.items()}


async def measure(port: int, texts: Sequence[str], clients: int) -> Point:
    """Asks for each text once, by so many clients."""
    waiting = iter(texts)
    seconds = []

    async def client() -> None:
        async with Client(port) as own:
            for text in waiting:
                start = time.perf_counter()
                status, found = await own.post('/get_reward', {'query': [text]})
                if status != 200:
                    raise DataError(f'the server on port {port} answered {status}: {found}')
                seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    took = time.perf_counter() - start
    return Point(len(seconds) / took, float(np.median(seconds)),
                 float(np.quantile(seconds, 0.99, method='higher')), len(seconds))


async def _differences(ports: Sequence[int], texts: Sequence[str]) -> float:
    """By how much answers of the servers differ, at most."""
    rewards = []
    for port in ports:
        async with Client(port) as client:
            answers = [await client.post('/get_reward', {'query': [text]}) for text in texts]
        rewards.append([found['rewards'][0] for _, found in answers])
    return float(np.ptp(np.array(rewards), axis=0).max())


def table(result: dict[str, Any]) -> str:
    """Rates and times of all measurements, the median of the rounds."""
    lines = [f'largest difference of a reward between the servers: '
             f'{result["largest_difference"]:.1e}; load average '
             f'{result["load_average"][0]:.1f} at the end', '',
             f'{"":32}{"requests":>9}{"/ s":>9}{"median s":>10}{"p99 s":>9}']
    middle: dict[str, dict[str, float]] = {}
    for name, points in result['points'].items():
        middle[name] = m = {key: float(np.median([point[key] for point in points]))
                            for key in Point._fields}
        workload, count, server = name.split('/')
        lines.append(f'{workload:12}{count:>3} {server:16}{m["answers"]:>9.0f}{m["rate"]:>9.2f}'
                     f'{m["median"]:>10.3f}{m["p99"]:>9.3f}')
    for name, own in middle.items():
        if name.endswith('/qrm') and (other := middle.get(name[:-3] + 'transformers')):
            workload, count, _ = name.split('/')
            lines.append(f'{workload}, {count} clients: {own["rate"] / other["rate"]:.2f} x the '
                         f'throughput, {own["p99"] / other["p99"]:.2f} x the p99')
    return '\n'.join(lines)


def integrity(checkpoint: str, comparisons: Sequence[Any], folder: str, answers: int,
              max_length: int, clients: int = 64) -> str:
    """Compares so many answers with what is known; returns what was counted.

    Raises:
      DataError: an answer is wrong or lost, or the server did not end as it should.
    """
    pairs = [(c.prompt, response) for c in comparisons for response in c.responses][:_TEXTS]
    model = reward_model.load(checkpoint, max_length=max_length)
    scores = model.score([prompt for prompt, _ in pairs], [response for _, response in pairs])
    known = [np.append(quantiles, reward) for quantiles, reward in zip(
        scores.quantiles, scores.rewards, strict=True)]
    counts: collections.Counter[str] = collections.Counter()
    command = qrm_command(checkpoint, max_length)
    done = 0
    for part in (1, 2):
        with running(command, f'{folder}/integrity-{part}.log') as (port, process):
            stop = (process, answers // 2) if part == 1 else (process, answers)
            done = asyncio.run(_ask(port, pairs, known, counts, done, stop, clients))
            if code := process.wait(timeout=_START_SECONDS):
                raise DataError(f'the server ended with exit code {code}, expected 0')
    workdir.write_json(os.path.join(folder, 'integrity.json'), dict(counts))
    line = ', '.join(f'{count} {name}' for name, count in sorted(counts.items()))
    if counts['wrong'] or counts['unanswered before the stop']:
        raise DataError(f'{line}; expected none wrong and none unanswered before a stop')
    return f'{len(pairs)} texts, {clients} clients, two servers, each stopped under load: {line}'


async def _ask(port: int, pairs: Sequence[tuple[str, str]], known: Sequence[np.ndarray],
               counts: collections.Counter[str], done: int, stop: tuple[Any, int],
               clients: int) -> int:
    """Asks until so many answers are there, then stops the server; returns how many there are."""
    process, most = stop
    stopped = False

    async def client(number: int) -> None:
        choose = random.Random(number + done)
        async with Client(port) as own:
            while await ask(choose, own):
                pass

    async def ask(choose: random.Random, own: Client) -> bool:
        """Asks once; whether to go on."""
        nonlocal done, stopped
        i = choose.randrange(len(pairs))
        path, body, read = _PROTOCOLS[choose.randrange(len(_PROTOCOLS))](*pairs[i])
        leave = choose.random() < _LEAVES
        before = stopped
        try:
            status, found = await own.post(path, body, leave=leave)
        except Failed as error:
            counts[f'{error} {"after" if stopped else "before"} the stop'] += 1
            return not stopped
        if leave:
            counts['left'] += 1
            return True
        if status == 503 and stopped:
            counts['503 after the stop'] += 1
            return False
        if status != 200:
            raise DataError(f'{path}: {status}: {found}')
        value = read(found)
        expected = known[i] if len(value) > 1 else known[i][-1:]
        right = np.allclose(value, expected, rtol=0, atol=_TOLERANCE)
        counts['right' if right else 'wrong'] += 1
        counts['right, after the stop'] += stopped and not before
        done += 1
        if done % _TOLD == 0:
            print(f'{done} answers', flush=True)
        if done >= most and not stopped:
            stopped = True
            process.send_signal(signal.SIGTERM)
        return True

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
    return done


def _as_score(prompt: str, response: str) -> tuple[str, Any, Callable[[Any], Any]]:
    return ('/score', {'prompt': prompt, 'responses': [response]},
            lambda found: [*found['quantiles'][0], found['rewards'][0]])


def _as_openrlhf(prompt: str, response: str) -> tuple[str, Any, Callable[[Any], Any]]:
    return '/get_reward', {'query': [prompt + response]}, lambda found: found['rewards']


def _as_vllm(prompt: str, response: str) -> tuple[str, Any, Callable[[Any], Any]]:
    return ('/classify', {'input': prompt + response, 'use_activation': False},
            lambda found: found['data'][-1]['probs'])


_PROTOCOLS = (_as_score, _as_openrlhf, _as_vllm)


def qrm_command(checkpoint: str, max_length: int) -> list[str]:
    """Starts the server, but for its port."""
    return [sys.executable, '-m', 'experiments.serve', f'--checkpoint={checkpoint}',
            f'--max_length={max_length}']


@contextlib.contextmanager
def running(command: Sequence[str], log: str) -> Iterator[tuple[int, subprocess.Popen]]:
    """A server on a free port, which it is and its process; it is killed at the end.

    Raises:
      ConfigError: it does not come up; shows its last line.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    with open(log, 'w', encoding='utf-8') as file:
        process = subprocess.Popen([*command, f'--port={port}'], stdout=file,
                                   stderr=subprocess.STDOUT)
    try:
        _wait(port, process, log)
        yield port, process
    finally:
        process.kill()
        process.wait()


def _wait(port: int, process: subprocess.Popen, log: str) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1.0):
            return
        time.sleep(0.2)
    lines = Path(log).read_text(encoding='utf-8').strip().split('\n')
    raise ConfigError(f'{process.args[0]} serves nothing: {lines[-1]} (all of it: {log})')


def _define_flags() -> None:
    """As the program begins: others that define the same names can be imported beside it."""
    flags.DEFINE_string(
        'checkpoint', None,
        'Folder of a model, for both servers one of transformers with one label.')
    flags.DEFINE_string('input', None, 'File of comparisons of texts, as of `qrm score`.')
    flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun overwrites them.')
    flags.DEFINE_enum('mode', 'load', ('load', 'integrity'), 'What is measured.')
    flags.DEFINE_string(
        'torch_python', '', "Python of an environment with torch and transformers; '': only qrm.")
    flags.DEFINE_list('clients', ['1', '8', '64'], 'Clients at once, one after the other.')
    flags.DEFINE_integer(
        'requests', 3, 'Of a client in a measurement, of all of them at least 16.', lower_bound=1)
    flags.DEFINE_integer('rounds', 1, 'Times that everything is measured.', lower_bound=1)
    flags.DEFINE_integer('max_length', 1024, 'Tokens of a dialogue.', lower_bound=8)
    flags.DEFINE_integer('answers', 100_000, "Of 'integrity'.", lower_bound=10)


if __name__ == '__main__':
    _define_flags()
    launch.run(main, required=('checkpoint', 'input', 'workdir'))
