"""Judges: who says which of two responses is better, behind one interface.

A judge is asked about comparisons of two responses, in the order in which they stand, and gives the
probability that the first one is better. `labels` asks both orders. Kinds, by the name before the
colon:

    language-model:PATH     reads a question, and is read at the next token: P(A) against P(B)
    reward-model:PATH       the win probability of a reward model
    function:MODULE:NAME    a Python function of prompts, first and second responses
    endpoint:MODEL@URL      an HTTP server with the chat completions of OpenAI, asked a question
    gold:WORKLOAD           the truth about replies of the demo

`NAME=KIND:...` gives a judge another name than its own.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import inspect
import ipaddress
import itertools
import json
import numbers
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import scipy

from qrm.analysis import winrate
from qrm.data import gold, orders
from qrm.data.comparisons import Comparison, DataError, Text, in_a_line
from qrm.data.demo import WORKLOADS
from qrm.data.encoded import Encoded
from qrm.data.templates import Tokenizer, render
from qrm.data.tokens import encode_prompts
from qrm.policy import batches, language_model, network
from qrm.policy.language_model import LanguageModel
from qrm.policy.network import PolicyNetwork
from qrm.rewards import pairwise
from qrm.training import inference, reward_model
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.reward_model import RewardModel

ANSWERS = ('A', 'B')  # what the first response is called, and the second

# What a language model is asked, and an endpoint.
QUESTION = """Two responses to the same conversation are compared.

Conversation:
{prompt}

Response A:
{first}

Response B:
{second}

Which response is better for the person who asked: more helpful, more honest, less harmful? \
Answer with the letter A or B and nothing else."""
PATTERN = r'^\W*([AB])\W*$'  # of an endpoint's answer: the letter alone

_FIELDS = re.compile(r'\{(prompt|first|second)\}')
_PLAINLY = '\n\nAnswer:'  # what a model without a chat template is asked to continue
_TOGETHER = 64  # pairs that a function is given at once
_OF_A_ROW = 8  # questions for each packed row, after which answers are given
_ROW_LENGTH = 1024  # tokens of packed rows
_CHUNK = 1024  # comparisons of a reward model, as these are quickly scored
_LARGEST = 2**20  # bytes of an endpoint's answer; characters of a question to it
_LONGEST_WAIT = 60.0  # seconds between two tries
_ENOUGH = 3  # questions in a row, after which a server that answers none is given up
_QUOTED = 200  # characters of what an endpoint says of an error
_REFUSED = (400, 413, 422)  # a question that cannot be answered; others may be
_LATER = (408, 409, 425, 429, *range(500, 600))  # may be answered another time


class Answer(NamedTuple):
    """What a judge says of one question.

    Attributes:
      probability: that the first response is better; None: no answer.
      failure: why there is none.
      final: whether the judge would say the same again; False where it could not be reached.
      share: probability of both answers together among all tokens; None where that is not known.
      read, written: tokens of the question and of the answer; 0 where these are not known.
      cut: whether the question lost the beginning of its prompt, as it was too long.
    """

    probability: float | None
    failure: str = ''
    final: bool = True
    share: float | None = None
    read: int = 0
    written: int = 0
    cut: bool = False


Placed = tuple[int, Answer]


class Judge(Protocol):
    """Whoever says which of two responses is better.

    Attributes:
      name: of the annotator that the labels name.
      identity: all that answers depend on beside the texts, by which they are kept.
    """

    name: str
    identity: str

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        """Judges comparisons of two responses each.

        Yields:
          The place of a comparison and the answer, for each one as soon as it is there.

        Raises:
          DataError: the judge cannot be asked.
        """


class Spec(NamedTuple):
    """A judge by its name, its kind and what of that kind it is."""

    name: str
    kind: str
    what: str


@dataclasses.dataclass(frozen=True)
class Options:
    """How judges are asked; each kind reads some.

    Attributes:
      template: of the question, with {prompt}, {first} and {second}, see `check_template`.
      dtype, date: of a language model, see `language_model.load`; the date of a reward model, too.
      max_length: tokens of the longest question or dialogue; 0: the model's number of positions.
      outputs: of a reward model, see `reward_model.load`.
      rows: packed rows that a model computes at once; has no effect on answers.
      pattern: regular expression with one group that finds A or B in an endpoint's answer.
      answer_tokens: that an endpoint may write.
      token_variable: environment variable that holds the token for an endpoint; '': none is sent.
      timeout: seconds for one answer of an endpoint.
      retries: how often a question is asked again that an endpoint could not answer.
      backoff: seconds before the first of them, twice as long before each next one.
      at_once: questions that an endpoint is asked at once.
    """

    template: str = QUESTION
    dtype: str = 'float32'
    date: str = ''
    max_length: int = 0
    outputs: str = ''
    rows: int = 4
    pattern: str = PATTERN
    answer_tokens: int = 16
    token_variable: str = ''
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 1.0
    at_once: int = 4


def parse(text: str) -> Spec:
    """What names a judge, see above.

    Raises:
      ValueError: it names none.
    """
    found = re.fullmatch(r'(?:([^=:]*)=)?([a-z-]+):(.+)', text, re.DOTALL)
    if not found or found[2] not in KINDS or (found[1] is not None and not found[1].strip()):
        raise ValueError(f'{text!r}, expected KIND:WHAT or NAME=KIND:WHAT, with a kind of '
                         f'{tuple(KINDS)}')
    name, kind, what = found.groups()
    own = {'language-model': os.path.basename(os.path.normpath(what)),
           'reward-model': os.path.basename(os.path.normpath(what)),
           'endpoint': what.partition('@http')[0], 'gold': f'gold {what}'}
    return Spec(name or own.get(kind, what), kind, what)


def load(spec: Spec, options: Options) -> Judge:
    """The judge of a name.

    Raises:
      DataError, WorkdirError: there is none, or it cannot be used.
    """
    return KINDS[spec.kind](spec, options)


def check_template(template: str) -> None:
    """Checks that the template of a question has a place for each text.

    Raises:
      ValueError: it does not have {prompt}, {first} and {second} once each.
    """
    if sorted(_FIELDS.findall(template)) != ['first', 'prompt', 'second']:
        raise ValueError('expected a text with {prompt}, {first} and {second}, each once')


def read_template(given: str) -> str:
    """The template of a question, given as itself or as a file of it; '' is `QUESTION`.

    Raises:
      DataError: it is neither, or not as `check_template` expects.
    """
    text = given or QUESTION
    if not _FIELDS.search(text):
        try:
            with open(given, encoding='utf-8') as file:
                text = file.read()
        except (OSError, ValueError) as error:
            raise DataError(f'--template={given!r:.80}: neither a text with {{prompt}}, {{first}} '
                            f'and {{second}} nor a file of it ({in_a_line(error)})') from error
    try:
        check_template(text)
    except ValueError as error:
        raise DataError(f'--template={given!r:.80}: {error}') from error
    return text


def check_pattern(pattern: str) -> None:
    """Checks that a pattern finds one thing.

    Raises:
      ValueError: it is no regular expression with one group.
    """
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f'{pattern!r}: no regular expression ({error})') from error
    if groups != 1:
        raise ValueError(f'{pattern!r}: {groups} groups, expected one, which is A or B')


def question(template: str, pair: Comparison, *, most: int | None = None) -> str:
    """What is asked about two responses.

    Chats are written as texts, with the role before each message of the prompt.

    Args:
      template: see `check_template`.
      pair: a comparison of two responses.
      most: characters of the prompt that stay, the last ones; None: all.

    Raises:
      MalformedRow: messages with more than a role and a text, which a question has no place for.
    """
    prompt = _prompt_text(pair)
    first, second = orders.response_texts(pair)
    texts = {'prompt': prompt if most is None else prompt[len(prompt) - most:],
             'first': first, 'second': second}
    # In one go: texts may hold what looks like a place for another.
    return _FIELDS.sub(lambda field: texts[field[1]], template)


def _prompt_text(pair: Comparison) -> str:
    if isinstance(pair.prompt, str):
        return pair.prompt.strip()
    if not pair.prompt:
        return ''
    text, = orders.response_texts(dataclasses.replace(pair, responses=(pair.prompt,)))
    return f'{pair.prompt[0]["role"]}: {text}'


@dataclasses.dataclass(frozen=True)
class LanguageModelJudge:
    """A language model that is asked, and read at the next token.

    Attributes:
      name, identity: see `Judge`.
      model: the language model.
      template: of the question.
      tokens: of the two answers.
      max_length: tokens of a question at most.
      rows: packed rows that are computed at once.
    """

    name: str
    identity: str
    model: LanguageModel
    template: str
    tokens: tuple[int, int]
    max_length: int
    rows: int

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        asked = [self._fit(pair) for pair in pairs]
        places = []
        for place, (ids, _) in enumerate(asked):
            if ids is None:
                yield place, Answer(None, 'responses longer than the model can read')
            else:
                places.append(place)
        encoded = [_answered(pairs[i].id, asked[i][0], self.tokens) for i in places]
        transformer = self.model.transformer
        policy = PolicyNetwork(transformer.architecture, jnp.dtype(transformer.dtype).name)
        inference.check_look_ups(policy, encoded)
        # Answers are one token each: T = 1.
        found = inference.run(
            network.log_probs, 1, policy, {'backbone': self.model.params}, encoded, _ROW_LENGTH,
            self.rows, None, _OF_A_ROW * self.rows * jax.device_count(),
            make=functools.partial(batches.policy_batch, longest=1))
        for place, log_probs in zip(places, itertools.chain.from_iterable(found), strict=True):
            yield place, _read(log_probs, *asked[place])

    def _fit(self, pair: Comparison) -> tuple[np.ndarray | None, bool]:
        """Tokens of a question, and whether its prompt was cut; None if it is still too long."""
        ids = self._encode(question(self.template, pair))
        if len(ids) <= self.max_length:
            return ids, False
        low, high = 0, len(_prompt_text(pair))  # characters: so many fit, so many do not
        fitting = self._encode(question(self.template, pair, most=0))
        if len(fitting) > self.max_length:
            return None, False
        while high - low > 1:
            middle = (low + high) // 2
            ids = self._encode(question(self.template, pair, most=middle))
            if len(ids) <= self.max_length:
                low, fitting = middle, ids
            else:
                high = middle
        return fitting, True

    def _encode(self, text: str) -> np.ndarray:
        (ids,), _ = encode_prompts([_as_prompt(text, self.model.tokenizer)],
                                   self.model.tokenizer, sys.maxsize)
        return ids


def _read(log_probs: np.ndarray, ids: np.ndarray, cut: bool) -> Answer:
    """The answer of a language model, from log-probabilities [2, 1] of both answers."""
    both = log_probs[:, 0].astype(np.float64)
    if not np.isfinite(both).all():
        raise NonFiniteLoss('a language model that judges: log-probabilities that are not finite')
    return Answer(float(scipy.special.expit(both[0] - both[1])), read=len(ids), cut=cut,
                  share=float(np.exp(both).sum()))


def _answered(name: str, ids: np.ndarray, tokens: tuple[int, int]) -> Encoded:
    """A question as the prompt of its two answers."""
    return Encoded(name, name, ids, tuple(np.array([token], np.int32) for token in tokens),
                   np.zeros((2, 2), np.float32), np.full((2, 1), np.nan, np.float32),
                   prompt_sizes=(len(ids),) * 2)


def _as_prompt(text: str, tokenizer: Tokenizer) -> Comparison:
    """A question as a language model answers it: a chat, if it has a template."""
    prompt: Text = text + _PLAINLY
    if tokenizer.chat_template is not None:
        prompt = ({'role': 'user', 'content': text},)
    return Comparison('question', prompt, (), 'question')


def answer_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens by which both answers follow a question.

    Raises:
      DataError: an answer has not one token of its own.
    """
    asked = _as_prompt('', tokenizer)
    plainly = isinstance(asked.prompt, str)
    text = asked.prompt if plainly else render(asked, (), tokenizer, to_answer=True)
    ends = [f' {answer}' if plainly else answer for answer in ANSWERS]
    before, *after = (tokenizer(text + end, add_special_tokens=False)['input_ids']
                      for end in ('', *ends))
    found = [ids[-1] for ids in after if ids[:-1] == before and
             tokenizer.decode(ids[-1:]).strip() in ANSWERS]
    if len(set(found)) != len(ANSWERS):
        raise DataError(f'{tokenizer.name_or_path}: the tokenizer has no token for each of '
                        f'{" and ".join(ANSWERS)} after a question, expected one, as these are '
                        'compared')
    return found[0], found[1]


def _language_model(spec: Spec, options: Options) -> Judge:
    model = language_model.load(spec.what, dtype=options.dtype, date=options.date)
    positions = model.transformer.architecture.max_positions
    if options.max_length > positions:
        raise DataError(f'--max_length={options.max_length}, but the model has {positions} '
                        'positions')
    longest = (options.max_length or positions) - 1  # an answer has a position of its own
    identity = _identity('language model', _params_digest(model.params), dict(model.settings),
                         options.template, options.dtype, longest, model.tokenizer.chat_template)
    return LanguageModelJudge(spec.name, identity, model, options.template,
                              answer_tokens(model.tokenizer), longest, options.rows)


@dataclasses.dataclass(frozen=True)
class RewardModelJudge:
    """A reward model: the probability with which it prefers the first response.

    One that scores each response alone knows no order. A pairwise one is read in the order that is
    asked.

    Attributes:
      name, identity: see `Judge`.
      model: the reward model.
    """

    name: str
    identity: str
    model: RewardModel

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        for start in range(0, len(pairs), _CHUNK):
            yield from enumerate(self._judge(pairs[start:start + _CHUNK]), start)

    def _judge(self, pairs: Sequence[Comparison]) -> list[Answer]:
        # Both orders of two responses are scored once.
        keys = [pair.text_digest() for pair in pairs]
        once = dict(zip(keys, pairs, strict=True))
        encoded, cut = zip(*(self.model.encode([pair]) for pair in once.values()), strict=True)
        encoded = list(itertools.chain.from_iterable(encoded))
        wins = self._wins(self.model.predict(encoded))
        found = dict(zip(once, zip(wins.tolist(), encoded, cut, strict=True), strict=True))
        answers = []
        for key, pair in zip(keys, pairs, strict=True):
            of_orders, item, shortened = found[key]
            same = pair.responses == once[key].responses
            answers.append(Answer(of_orders[0 if same else 1], read=item.size,
                                  cut=bool(shortened)))
        return answers

    def _wins(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """[n, 2], that the first response is better: in the order they are in, and in the other."""
        if self.model.network.head.pairwise:
            log_odds = np.array([pairwise.in_both_orders(one) for one in outputs])
            return scipy.special.expit(np.stack([log_odds[:, 0, 1, 0], log_odds[:, 1, 0, 0]], 1))
        first, second = (self.model.network.head.read(np.stack(outputs)[:, k:k + 1]).distribution
                         for k in (0, 1))
        return np.concatenate([winrate.win_probabilities(self.model.loss, *sides)
                               for sides in ((first, second), (second, first))], axis=1)


def _reward_model(spec: Spec, options: Options) -> Judge:
    model = reward_model.load(spec.what, max_length=options.max_length, outputs=options.outputs,
                              date=options.date)
    identity = _identity('reward model', _params_digest(model.params), dict(model.settings),
                         str(model.network.head), str(model.reading), str(model.loss),
                         model.tokenizer.chat_template)
    return RewardModelJudge(spec.name, identity, model)


@dataclasses.dataclass(frozen=True)
class FunctionJudge:
    """A Python function of prompts, first and second responses, of several pairs at once.

    Texts and chats are what they are in the rows. It returns a probability or None for each pair.

    Attributes:
      name, identity: see `Judge`.
      function: the function.
      place: by what name it is asked for.
    """

    name: str
    identity: str
    function: Callable[..., Any]
    place: str

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        for start in range(0, len(pairs), _TOGETHER):
            some = pairs[start:start + _TOGETHER]
            columns = [[_plain(text) for text in column] for column in (
                [pair.prompt for pair in some], *zip(*(pair.responses for pair in some),
                                                     strict=True))]
            try:
                found = list(self.function(*columns))
            except Exception as error:  # a program of somebody else, which fails in any way
                raise DataError(f'{self.place}: {type(error).__name__}: {in_a_line(error)}'
                                ) from error
            if len(found) != len(some):
                raise DataError(f'{self.place}: {len(found)} answers to {len(some)} pairs, expected'
                                ' one for each')
            for place, value in enumerate(found, start):
                yield place, self._answer(value)

    def _answer(self, value: Any) -> Answer:
        if value is None:
            return Answer(None, 'none by the function')
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
            raise DataError(f'{self.place}: {value!r:.50}, expected a probability in [0, 1], or '
                            'None')
        return Answer(float(value))


def _plain(text: Text) -> Any:
    """A text, or a chat as a list of messages."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def _function(spec: Spec, unused_options: Options) -> Judge:
    module, colon, name = spec.what.partition(':')
    if not (module and colon and name):
        raise DataError(f'function:{spec.what}: expected function:MODULE:NAME')
    if os.getcwd() not in sys.path:  # as `python -m` has it; the command `qrm` does not
        sys.path.append(os.getcwd())
    try:
        loaded = importlib.import_module(module)
        function = functools.reduce(getattr, name.split('.'), loaded)
    except Exception as error:  # the module is a program too
        raise DataError(f'function:{spec.what}: {type(error).__name__}: {in_a_line(error)}'
                        ) from error
    if not callable(function):
        raise DataError(f'function:{spec.what}: {type(function).__name__}, expected a function')
    try:
        source = inspect.getsource(loaded)
    except (OSError, TypeError):
        source = ''  # as of a compiled one
    return FunctionJudge(spec.name, _identity('function', spec.what, source), function, spec.what)


@dataclasses.dataclass(frozen=True)
class EndpointJudge:
    """A server that is asked a question as a chat, at temperature 0, and answers with a letter.

    A question that the server could not answer now (no connection, a time limit, 429, 5xx) is asked
    again; those it refuses, and answers that the pattern does not find a letter in, are no answers.
    Redirections are not followed, so that nothing is sent to another address.

    Attributes:
      name, identity: see `Judge`.
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

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        texts = [question(self.options.template, pair) for pair in pairs]
        headers = {'Accept-Encoding': 'identity'}  # what is compressed may be large
        if self.token:
            headers['Authorization'] = f'Bearer {self.token}'
        stopped, unreached = threading.Event(), 0
        pool = concurrent.futures.ThreadPoolExecutor(self.options.at_once)
        # A proxy does not reach this machine.
        client = httpx.Client(headers=headers, timeout=self.options.timeout,
                              trust_env=not _is_loopback(self.url))
        try:
            for place, answer in enumerate(pool.map(
                    functools.partial(self._ask, client, stopped), texts)):
                unreached = 0 if answer.final else unreached + 1
                if unreached == max(_ENOUGH, self.options.at_once):
                    raise DataError(f'{_shown(self.url)}: no answer to {unreached} questions in a '
                                    f'row (the last: {answer.failure})')
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
                    raise DataError(f'{_shown(self.url)}: status {status} '
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


def _is_loopback(url: httpx.URL) -> bool:
    try:
        return url.host == 'localhost' or ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


def _shown(url: httpx.URL) -> str:
    """An address without what may be a secret in it."""
    return str(url.copy_with(query=None))


def _endpoint(spec: Spec, options: Options) -> Judge:
    model, _, rest = spec.what.partition('@http')
    given = f'http{rest}'
    try:
        url = httpx.URL(given)
    except (httpx.InvalidURL, ValueError) as error:
        raise DataError(f'endpoint:{model}@...: no URL ({in_a_line(error)})') from error
    if not (model and rest and url.host) or url.userinfo or url.fragment:
        raise DataError(f'endpoint:{model}@...: expected endpoint:MODEL@URL, with a URL such as '
                        'https://host/v1, without a password or a fragment')
    if not (url.scheme == 'https' or (url.scheme == 'http' and _is_loopback(url))):
        raise DataError(f'{_shown(url)}: expected https, or http of this machine itself, as what '
                        'is sent is not encrypted')
    if not url.path.endswith('/chat/completions'):
        url = url.copy_with(path=f'{url.path.rstrip("/")}/chat/completions')
    token = ''
    if name := options.token_variable:
        token = os.environ.get(name, '')
        if not token or not token.isascii() or not token.isprintable() or ' ' in token:
            raise DataError(f'environment variable {name}: '
                            f'{"no" if token else "not set, expected a"} token')
    identity = _identity('endpoint', str(url), model, options.template, options.pattern,
                         options.answer_tokens)
    return EndpointJudge(spec.name, identity, url, model, token, options)


@dataclasses.dataclass(frozen=True)
class GoldJudge:
    """The truth about replies of a demo workload: the probability that one annotator's reward of
    the first exceeds another's of the second.

    Attributes:
      name, identity: see `Judge`.
      workload: one of `demo.WORKLOADS`.
    """

    name: str
    identity: str
    workload: str

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        for place, pair in enumerate(pairs):
            first, second = (gold.judge(self.workload, text).reward
                             for text in orders.response_texts(pair))
            yield place, Answer(first.win_probability(second))


def _gold(spec: Spec, unused_options: Options) -> Judge:
    if spec.what not in WORKLOADS:
        raise DataError(f'gold:{spec.what}: expected a workload of the demo, one of {WORKLOADS}')
    return GoldJudge(spec.name, _identity('gold', spec.what), spec.what)


KINDS: dict[str, Callable[[Spec, Options], Judge]] = {
    'language-model': _language_model, 'reward-model': _reward_model, 'function': _function,
    'endpoint': _endpoint, 'gold': _gold}


def _identity(*parts: Any) -> str:
    """All that answers depend on, as a short text."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _params_digest(params: Any) -> str:
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()
