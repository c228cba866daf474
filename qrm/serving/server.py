"""The HTTP server of a reward model: limits, token, metrics, a clean stop.

The event loop only moves bytes. Requests are parsed and tokenised in one thread, the model
computes in another (`batching.Batcher`), so that `/health` answers whatever they do.
"""

import asyncio
import base64
import binascii
import concurrent.futures
import contextlib
import hashlib
import hmac
import importlib.metadata
import importlib.resources
import ipaddress
import math
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import prometheus_client
import pydantic_core
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Endpoint

from qrm.data.comparisons import DataError, in_a_line
from qrm.data.encoded import Encoded
from qrm.rewards import selection
from qrm.rewards.selection import Rule
from qrm.serving import protocols
from qrm.serving.batching import Batcher, Dialogue, Overloaded, Scorer, Step
from qrm.serving.protocols import Asked, Route, Scored, Served
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.reward_model import RewardModel, check_alone

TOKEN_VARIABLE = 'QRM_SERVE_TOKEN'
_DISTRIBUTION = 'qrm-jax'
_GONE = 499  # the client closed the connection; is counted, not sent
_SECONDS = (.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20, 50, 100)
_HEADERS = {'Content-Security-Policy': (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
            'X-Content-Type-Options': 'nosniff'}
_KINDS = {'html': 'text/html', 'js': 'text/javascript', 'css': 'text/css'}  # of a page's files


class Limits(NamedTuple):
    """What a server takes.

    Attributes:
      body_bytes: of a request.
      texts: of a request.
      requests: at once.
      waiting_tokens: of all requests that wait.
      seconds: that a request may take.
    """

    body_bytes: int = 8 * 2**20
    texts: int = 1024
    requests: int = 1024
    waiting_tokens: int = 2**20
    seconds: float = 120.0


class Refused(Exception):
    """A request that is not answered with scores.

    Attributes:
      status: of HTTP.
      retry_after: seconds after which to ask again; 0: no such time.
    """

    def __init__(self, status: int, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class _Ready(NamedTuple):
    """A request, read and tokenised."""

    route: Route
    asked: Asked
    encoded: list[Encoded]
    cut: int


class Service:
    """Answers requests; what a process serves on a port.

    Args:
      model: the reward model.
      rule: what of its distribution is the reward, where a request does not say it.
      name: of the model, in answers.
      batch_tokens: tokens of a full micro-batch.
      limits: what is taken.
      token: that clients must know; '': none, and then only requests to this machine by a name of
        its own are answered.

    Attributes:
      scorer: to warm up before anything is served.
      stopping: whether requests that come now are refused.
      running: how many requests are being answered.

    Raises:
      ValueError: a rule that the model cannot be scored by, see `selection.check_alone`.
      DataError: the model scores no response alone.
    """

    def __init__(self, model: RewardModel, rule: Rule, name: str, *, batch_tokens: int = 1024,
                 limits: Limits | None = None, token: str = ''):
        members = model.network.head.members
        selection.check_alone(rule, members, model.scale)
        check_alone(model)
        self.limits, self._token = limits or Limits(), token
        self.scorer = Scorer(model, batch_tokens)
        self._model = model
        levels = [round(float(tau), 6) for tau in model.taus]
        self.served = Served(name, rule, levels, _own_bos(model), model.normalisation, members,
                             model.scale)
        self._metrics = _Metrics()
        self._batcher = Batcher(self.scorer.step, self.limits.waiting_tokens, self._metrics.step)
        self._metrics.waiting.set_function(lambda: self._batcher.waiting)
        self._reader = concurrent.futures.ThreadPoolExecutor(1, 'reader')
        self.stopping = False
        self.running = 0

    def app(self) -> Starlette:
        """The application."""
        posts = dict.fromkeys(route.path for route in protocols.ROUTES)
        document = protocols.openapi(self.served.name, importlib.metadata.version(_DISTRIBUTION))
        gets = {'/': _page('score.html'), '/docs': _page('docs.html'),
                '/score.js': _page('score.js'), '/docs.js': _page('docs.js'),
                '/style.css': _page('style.css'), '/openapi.json': lambda: JSONResponse(document),
                '/metrics': self._metrics.response}
        return Starlette(
            routes=[*(Endpoint(path, self._guarded(path, self._scores), methods=['POST'])
                      for path in posts),
                    *(Endpoint(path, self._guarded(path, _always(make)), methods=['GET'])
                      for path, make in gets.items()),
                    Endpoint('/health', self._health, methods=['GET'])],
            exception_handlers={HTTPException: _unknown}, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, unused_app: Starlette) -> AsyncIterator[None]:
        working = asyncio.create_task(self._batcher.run())
        try:
            yield
        finally:
            working.cancel()
            self._reader.shutdown(wait=False)

    async def _health(self, unused_request: Request) -> Response:
        if self.stopping:
            return JSONResponse({'status': 'stopping'}, 503)
        by = self.served.normalisation
        return JSONResponse({'status': 'ok', 'model': self.served.name,
                             'rule': self.served.rule.name,
                             **({'normalised': by.as_dict()} if by else {})})

    def _guarded(self, path: str, answer: Callable[[Request], Awaitable[Response]]
                 ) -> Callable[[Request], Awaitable[Response]]:
        """An answer to those who may ask, counted and timed; what is refused, as an error."""

        async def endpoint(request: Request) -> Response:
            start = time.perf_counter()
            self.running += 1
            try:
                self._check(request)
                response = await answer(request)
            except Refused as refused:
                response = _error(path, refused)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Exception as error:
                print(f'error: {path}: {type(error).__name__}: {in_a_line(error)}',
                      file=sys.stderr, flush=True)
                response = _error(path, Refused(500, f'failed ({type(error).__name__})'))
            finally:
                self.running -= 1
            self._metrics.request(path, response.status_code, time.perf_counter() - start)
            return response

        return endpoint

    def _check(self, request: Request) -> None:
        """Checks what is known before the body is read.

        Raises:
          Refused: stopping, not allowed, or too many requests.
        """
        if self.stopping:
            raise Refused(503, 'the server is stopping', 1.0)
        if self._token:
            if not _knows(request.headers.get('authorization', ''), self._token):
                raise Refused(401, 'expected the header "Authorization: Bearer TOKEN", or Basic '
                                   'with the token as password')
        elif not is_own(_host(request.headers.get('host', ''))):
            # A page of another site may send its visitors' browsers here by a name of its own.
            raise Refused(403, 'expected a request to localhost; other names need a token')
        if self.running > self.limits.requests:
            raise Refused(429, f'{self.running - 1} requests are being answered',
                          self._batcher.retry_after())

    async def _scores(self, request: Request) -> Response:
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await self._body(request)
                return await self._unless_gone(request, self._answer(request.url.path, body))
        except TimeoutError:
            raise Refused(503, f'no answer in {self.limits.seconds:g} seconds',
                          self._batcher.retry_after()) from None

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        length = request.headers.get('content-length', '0')
        body = bytearray()
        if not (length.isdecimal() and int(length) > most):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    break
            else:
                return bytes(body)
        raise Refused(413, f'a body of more than {most} bytes')

    async def _unless_gone(self, request: Request, answer: Awaitable[Response]) -> Response:
        """An answer, unless its client goes before it is there."""
        answering = asyncio.ensure_future(answer)
        gone = asyncio.ensure_future(request.receive())  # after the body only this can come
        try:
            await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            return Response(status_code=_GONE)
        finally:
            answering.cancel()
            gone.cancel()
            await asyncio.wait((answering,))  # what was asked has left the queue

    async def _answer(self, path: str, body: bytes) -> Response:
        loop = asyncio.get_running_loop()
        ready = await loop.run_in_executor(self._reader, self._read, path, body)
        tokens = [item.size for item in ready.encoded]
        try:
            scores = await self._batcher.scores(
                [Dialogue(item, ready.asked.rule) for item in ready.encoded])
        except Overloaded as error:
            raise _Told(ready.route, Refused(
                413 if math.isinf(error.seconds) else 429, str(error),
                0.0 if math.isinf(error.seconds) else error.seconds)) from None
        except DataError as error:
            raise _Told(ready.route, Refused(422, str(error))) from None
        except NonFiniteLoss as error:
            raise _Told(ready.route, Refused(500, str(error))) from None
        self._metrics.texts(path, tokens, ready.cut)
        scored = Scored(scores, tokens, ready.cut, uuid.uuid4().hex, int(time.time()))
        return JSONResponse(protocols.plain(ready.route, ready.asked.answer(scored)))

    def _read(self, path: str, body: bytes) -> _Ready:
        """What a body asks, in tokens.

        Raises:
          Refused: it cannot be answered.
        """
        try:
            decoded = pydantic_core.from_json(body)
        except ValueError as error:
            raise Refused(400, f'the body is not JSON ({in_a_line(error)})') from None
        route = protocols.find(path, decoded)
        try:
            asked = protocols.read(route, decoded, self.served)
            if (count := len(asked.comparisons)) > self.limits.texts:
                raise _Told(route, Refused(413, f'{count} texts, expected at most '
                                                f'{self.limits.texts}'))
            encoded, cut = self._model.encode(asked.comparisons)
        except DataError as error:
            raise _Told(route, Refused(422, in_a_line(error))) from None
        if cut and asked.whole:
            raise _Told(route, Refused(
                413, f'{cut} texts are longer than {self._model.reading.max_length} tokens, and '
                     'none may be cut'))
        return _Ready(route, asked, encoded, cut)


class _Told(Refused):
    """What is refused, in the words of the protocol that was spoken."""

    def __init__(self, route: Route, refused: Refused):
        super().__init__(refused.status, str(refused), refused.retry_after)
        self.route = route


class _Metrics:
    """What Prometheus is told."""

    def __init__(self):
        self._registry = registry = prometheus_client.CollectorRegistry()
        self._requests = prometheus_client.Counter(
            'qrm_requests', 'Requests.', ('path', 'status'), registry=registry)
        self._seconds = prometheus_client.Histogram(
            'qrm_request_seconds', 'Time from a request to its answer.', ('path',),
            buckets=_SECONDS, registry=registry)
        self._texts = prometheus_client.Counter(
            'qrm_texts', 'Texts scored.', ('path',), registry=registry)
        self._cut = prometheus_client.Counter(
            'qrm_cut_texts', 'Texts that lost their left end.', registry=registry)
        self._tokens = prometheus_client.Counter(
            'qrm_tokens', 'Tokens: of texts, of them less what they shared, of the shapes.',
            ('kind',), registry=registry)
        self._batches = prometheus_client.Histogram(
            'qrm_batch_seconds', 'Time of a micro-batch.', buckets=_SECONDS, registry=registry)
        self._failed = prometheus_client.Counter(
            'qrm_failed_texts', 'Texts without a finite reward.', registry=registry)
        self.waiting = prometheus_client.Gauge(
            'qrm_waiting_tokens', 'Tokens of requests that wait.', registry=registry)

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def texts(self, path: str, tokens: list[int], cut: int) -> None:
        self._texts.labels(path).inc(len(tokens))
        self._tokens.labels('asked').inc(sum(tokens))
        self._cut.inc(cut)

    def step(self, step: Step, seconds: float) -> None:
        self._batches.observe(seconds)
        self._tokens.labels('packed').inc(step.packed)
        self._tokens.labels('computed').inc(step.computed)
        self._failed.inc(sum(isinstance(found, Exception) for found in step.found.values()))

    def response(self) -> Response:
        return Response(prometheus_client.generate_latest(self._registry),
                        media_type=prometheus_client.CONTENT_TYPE_LATEST)


class _Server(uvicorn.Server):
    """Answers what was asked before a signal, refuses what is asked after it, and ends."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        place = f'[{host}]:{port}' if ':' in host else f'{host}:{port}'
        paths = ', '.join(dict.fromkeys(route.path for route in protocols.ROUTES))
        served = self._service.served
        by = f', normalised: {served.normalisation}' if served.normalisation else ''
        print(f'http://{place}: {served.name}, rule {served.rule.name}{by}; {paths}; /docs, '
              '/health, /metrics', flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._service.stopping:  # a second signal
            self.force_exit = True
        self._service.stopping = True
        print(f'{signal.Signals(sig).name}: answering {self._service.running} requests, then '
              'stopping; a second signal stops at once', flush=True)

    async def on_tick(self, counter: int) -> bool:
        if self._service.stopping and (self.force_exit or not self._service.running):
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, so that one that is taken is known before a model is loaded.

    Raises:
      DataError: it cannot be bound.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with contextlib.ExitStack() as failing:
            bound = failing.enter_context(socket.socket(family, kind, number))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            failing.pop_all()
    except OSError as error:
        raise DataError(f'--host={host} --port={port}: cannot be listened on '
                        f'({error.strerror or error})') from error
    return bound


def serve(service: Service, bound: socket.socket) -> None:
    """Serves on a socket until SIGTERM or SIGINT.

    What was asked before the signal is answered, new requests are refused with 503.
    """
    config = uvicorn.Config(service.app(), log_config=None, access_log=False, ws='none',
                            server_header=False, lifespan='on',
                            timeout_graceful_shutdown=math.ceil(service.limits.seconds))
    _Server(config, service).run([bound])


def read_token(path: str) -> str:
    """The token of a file, or of the environment; '' if there is none.

    Raises:
      DataError: the file cannot be read or holds none.
    """
    if not path:
        return os.environ.get(TOKEN_VARIABLE, '').strip()
    try:
        with open(path, encoding='utf-8') as file:
            token = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'--token_file={path}: cannot be read ({in_a_line(error)})') from error
    if not token or len(token.split()) > 1:
        raise DataError(f'--token_file={path}: expected one word')
    return token


def is_own(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == 'localhost'


def _host(header: str) -> str:
    """The host of a Host header, without its port."""
    return header[1:].partition(']')[0] if header.startswith('[') else header.partition(':')[0]


def _knows(header: str, token: str) -> bool:
    """Whether an Authorization header has the token; takes as long whatever it has."""
    scheme, _, given = header.partition(' ')
    if scheme.lower() == 'basic':  # as clients send that only know a URL: http://any:TOKEN@host
        try:
            given = base64.b64decode(given, validate=True).decode().partition(':')[2]
        except (binascii.Error, UnicodeDecodeError):
            given = ''
    elif scheme.lower() != 'bearer':
        given = ''
    digests = (hashlib.sha256(text.strip().encode()).digest() for text in (given, token))
    return hmac.compare_digest(*digests)


def _own_bos(model: RewardModel) -> str:
    """Text of the token that the tokenizer puts before texts by itself; '' if it puts none."""
    tokenizer = model.tokenizer
    ids = tokenizer('a')['input_ids']
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ''


def _error(path: str, refused: Refused) -> Response:
    """What is sent of a request that is refused."""
    form = protocols.plain_error
    if isinstance(refused, _Told):
        form = refused.route.error
    elif found := protocols.routes_of(path):
        form = found[-1].error
    headers = {}
    if refused.retry_after:
        headers['Retry-After'] = str(math.ceil(refused.retry_after))
    if refused.status == 401:
        headers['WWW-Authenticate'] = 'Basic realm="qrm"'
    if refused.status in (413, 503):
        headers['Connection'] = 'close'
    return JSONResponse(form(refused.status, str(refused)), refused.status, headers)


async def _unknown(request: Request, error: HTTPException) -> Response:
    """What is sent where there is nothing, or nothing that is asked so."""
    paths = ', '.join(dict.fromkeys(route.path for route in protocols.ROUTES))
    message = {404: f'no such path, expected one of {paths}',
               405: f'{request.method} is not taken here'}.get(error.status_code, error.detail)
    return JSONResponse({'error': message}, error.status_code, error.headers)


def _page(name: str) -> Callable[[], Response]:
    """A file of the pages; they look like those of reports."""
    places = [importlib.resources.files('qrm.serving') / 'page' / name]
    if name == 'style.css':
        places.insert(0, importlib.resources.files('qrm.analysis') / 'page' / 'base.css')
    content = ''.join(place.read_text(encoding='utf-8') for place in places)
    kind = _KINDS[name.split('.')[-1]]
    return lambda: Response(content, headers=_HEADERS, media_type=kind)


def _always(make: Callable[[], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(unused_request: Request) -> Response:
        return make()

    return answer
