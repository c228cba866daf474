"""A judge that is asked over HTTP, by the chat completions of OpenAI."""

import concurrent.futures
import dataclasses
import functools
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from qrm.data.comparisons import Comparison, DataError, in_a_line
from qrm.policy import servers
from qrm.policy.questions import ANSWERS, Answer, Options, Spec, identity, question

_LARGEST = 2**20  # bytes of an endpoint's answer; characters of a question to it
_LONGEST_WAIT = 60.0  # seconds between two tries
_ENOUGH = 3  # questions in a row, after which a server that answers none is given up
_QUOTED = 200  # characters of what an endpoint says of an error
_REFUSED = (400, 413, 422)  # a question that cannot be answered; others may be
_LATER = (408, 409, 425, 429, *range(500, 600))  # may be answered another time


@dataclasses.dataclass(frozen=True)
class EndpointJudge:
    """A server that is asked a question as a chat, at temperature 0, and answers with a letter.

    A question that the server could not answer now (no connection, a time limit, 429, 5xx) is asked
    again; those it refuses, and answers that the pattern does not find a letter in, are no answers.
    Redirections are not followed, so that nothing is sent to another address.

    Attributes:
      name, identity: see `judges.Judge`.
      url: where chat completions are.
      model: by the server's name.
      token: sent as the bearer's; '': none.
      options: the rest.
    """

    name: str
    identity: str
    url: httpx.URL
    model: str
    token: str = dataclasses.field(repr=False)
    options: Options

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[tuple[int, Answer]]:
        texts = [question(self.options.template, pair) for pair in pairs]
        stopped, unreached = threading.Event(), 0
        pool = concurrent.futures.ThreadPoolExecutor(self.options.at_once)
        # What is compressed may be large.
        client = servers.client(self.url, timeout=self.options.timeout, token=self.token,
                                headers={'Accept-Encoding': 'identity'})
        try:
            for place, answer in enumerate(pool.map(
                    functools.partial(self._ask, client, stopped), texts)):
                unreached = 0 if answer.final else unreached + 1
                if unreached == max(_ENOUGH, self.options.at_once):
                    raise DataError(f'{servers.shown(self.url)}: no answer to {unreached} '
                                    f'questions in a row (the last: {answer.failure})')
                yield place, answer
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()

    def _ask(self, client: httpx.Client, stopped: threading.Event, text: str) -> Answer:
        """One question, asked until there is an answer or enough tries have failed.

        Raises:
          DataError: the server does not know or want what it is asked, whatever the question.
        """
        if len(text) > _LARGEST:
            return Answer(None, f'a question of more than {_LARGEST} characters')
        failure = ''
        for attempt in range(self.options.retries + 1):
            wait = min(self.options.backoff * 2.0 ** attempt, _LONGEST_WAIT)
            try:
                status, after, content = self._post(client, text)
            except _TooLarge:
                return Answer(None, f'an answer of more than {_LARGEST} bytes')
            except httpx.TimeoutException:
                failure = f'nothing within {self.options.timeout:g} s'
            except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: closed meanwhile
                failure = f'no connection ({in_a_line(error)[:_QUOTED]})'
            else:
                if status == 200:
                    return self._answer(content)
                if status in _REFUSED:
                    return Answer(None, f'refused with status {status}')
                if status not in _LATER:
                    raise DataError(f'{servers.shown(self.url)}: status {status} '
                                    f'({self._quoted(content)}), expected 200')
                failure = f'status {status}'
                if re.fullmatch(r'\d{1,6}', after):
                    wait = min(float(after), _LONGEST_WAIT)
            if attempt < self.options.retries and stopped.wait(wait):
                break
        return Answer(None, failure, final=False)

    def _post(self, client: httpx.Client, text: str) -> tuple[int, str, bytes]:
        """Status, what is said of when to ask again, and content of an answer, within limits."""
        body = {'model': self.model, 'messages': [{'role': 'user', 'content': text}],
                'temperature': 0, 'max_tokens': self.options.answer_tokens}
        end = time.monotonic() + self.options.timeout
        content = bytearray()
        with client.stream('POST', self.url, json=body) as response:
            for part in response.iter_raw():
                content += part
                if len(content) > _LARGEST:
                    raise _TooLarge
                if time.monotonic() > end:  # the client's own limit is of each part
                    raise httpx.ReadTimeout('too slow')
        return response.status_code, response.headers.get('retry-after', ''), bytes(content)

    def _answer(self, content: bytes) -> Answer:
        """What a completion says."""
        try:
            value = json.loads(content)
            text = value['choices'][0]['message']['content']
            usage = value.get('usage')
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            text = None
        if not isinstance(text, str):
            return Answer(None, 'no completion')
        read, written = (_count(usage, key) for key in ('prompt_tokens', 'completion_tokens'))
        found = re.search(self.options.pattern, text)
        if not found or found[1] not in ANSWERS:
            return Answer(None, 'no A or B where the pattern looks', read=read, written=written)
        return Answer(float(found[1] == ANSWERS[0]), read=read, written=written)

    def _quoted(self, content: bytes) -> str:
        """The beginning of what a server says, without the token, should that be in it."""
        text = content.decode(errors='replace')
        text = text.replace(self.token, '...') if self.token else text
        return ' '.join(text.split())[:_QUOTED]


class _TooLarge(Exception):
    """An answer of more bytes than are read."""


def _count(usage: Any, key: str) -> int:
    """A number of tokens that a server says, 0 if it says none."""
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 <= value < 2**31 else 0


def load(spec: Spec, options: Options) -> EndpointJudge:
    """The judge of MODEL@URL.

    Raises:
      DataError: it is no such address, one that others could read, or the token is missing.
    """
    model, _, rest = spec.what.partition('@http')
    given = f'http{rest}'
    if not (model and rest):
        raise DataError(f'endpoint:{model}@...: expected endpoint:MODEL@URL, with a URL such as '
                        'https://host/v1')
    try:
        url = servers.parse(given)
    except ValueError as error:
        raise DataError(f'endpoint:{model}@...: {error}') from error
    if not url.path.endswith('/chat/completions'):
        url = url.copy_with(path=f'{url.path.rstrip("/")}/chat/completions')
    try:
        token = servers.token(options.token_variable)
    except ValueError as error:
        raise DataError(str(error)) from error
    digest = identity('endpoint', str(url), model, options.template, options.pattern,
                      options.answer_tokens)
    return EndpointJudge(spec.name, digest, url, model, token, options)
