"""What clients of reward models send, and what they expect: requests to comparisons and back.

No network and no model is in here. `ROUTES` says for each path who speaks so, what is read, how it
is asked and how answered; facts are from the sources that `docs/serving.md` names.
"""

import http
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import pydantic

from qrm.data.comparisons import Comparison, DataError
from qrm.data.rows import parse_row
from qrm.rewards import selection
from qrm.rewards.normalisation import Normalisation
from qrm.rewards.selection import Rule, Scale
from qrm.serving.batching import Score

_LABEL = 'reward'  # of the one class


class Served(NamedTuple):
    """What is served.

    Attributes:
      name: of the model.
      rule: what of the distribution is the reward, unless a request says it.
      levels: [N] of the quantiles.
      bos: text of the token that the tokenizer puts before each text by itself; '': none. Where a
        client has put it there already it is not doubled.
      normalisation: of all rewards; None: they are raw.
      members: of the head.
      scale: of 'mean-std'; None: that rule cannot be asked for.
    """

    name: str
    rule: Rule
    levels: list[float]
    bos: str = ''
    normalisation: Normalisation | None = None
    members: int = 1
    scale: Scale | None = None


class Scored(NamedTuple):
    """What came of a request, of its dialogues in order.

    Attributes:
      scores: of each.
      tokens: of each, as they were read.
      cut: how many were too long, and lost their left end.
      identity: of the request, unique.
      seconds: the time of it, since 1970.
    """

    scores: Sequence[Score]
    tokens: Sequence[int]
    cut: int
    identity: str
    seconds: int

    @property
    def rewards(self) -> list[float]:
        """By the rule that was asked for."""
        return [score.reward for score in self.scores]


class Asked(NamedTuple):
    """What a request asks.

    Attributes:
      comparisons: K = 1, one for each score.
      answer: what is sent back, of `Route.answer`.
      rule: what of the distribution is the reward.
      whole: nothing may be cut.
    """

    comparisons: list[Comparison]
    answer: Callable[[Scored], Any]
    rule: Rule
    whole: bool = False


class Request(pydantic.BaseModel):
    """A request; keys that are not declared are those that a reward model does not read."""

    model_config = pydantic.ConfigDict(strict=True, extra='ignore')


class Answer(pydantic.BaseModel):
    """An answer."""


# --- of this project -----------------------------------------------------------------------------

Chat = list[dict[str, Any]]


class ScoreRequest(Request):
    """A prompt and responses that continue it, texts or chats, and by which rule."""

    model_config = pydantic.ConfigDict(strict=True, extra='forbid')
    prompt: str | Chat
    responses: list[str | Chat]
    rule: str | None = None


class Normalised(Answer):
    """What was subtracted from raw rewards, and then divided by."""

    mean: float
    std: float


class ScoreAnswer(Answer):
    """For each response its reward, standard deviation and quantiles at the levels.

    `normalised` is there if they are.
    """

    model: str
    rule: str
    rewards: list[float]
    stds: list[float]
    levels: list[float]
    quantiles: list[list[float]]
    tokens: list[int]
    cut: int
    normalised: Normalised | None = None


def _ask_score(request: ScoreRequest, served: Served) -> Asked:
    try:
        rule = selection.parse_rule(request.rule) if request.rule else served.rule
        selection.check_alone(rule, served.members, served.scale)
    except ValueError as error:
        raise DataError(str(error)) from error

    by = served.normalisation

    def answer(scored: Scored) -> ScoreAnswer:
        return ScoreAnswer(
            model=served.name, rule=rule.name, rewards=scored.rewards,
            stds=[score.std for score in scored.scores], levels=served.levels,
            quantiles=[score.quantiles for score in scored.scores], tokens=list(scored.tokens),
            cut=scored.cut, normalised=by and Normalised(**by.as_dict()))

    return Asked([_continued(request.prompt, response, f'responses[{i}]')
                  for i, response in enumerate(request.responses)], answer, rule)


# --- OpenRLHF, slime -----------------------------------------------------------------------------


class OpenRLHFRequest(Request):
    """Whole texts; prompts, where they are their beginnings, say where responses begin."""

    query: list[str]
    prompts: list[str] | None = None
    labels: list[Any] | None = None


class OpenRLHFAnswer(Answer):
    """Rewards, which are the scores too, and what of the distributions is worth logging."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


def _ask_openrlhf(request: OpenRLHFRequest, served: Served) -> Asked:
    prompts = request.prompts or [''] * len(request.query)
    if len(prompts) != len(request.query):
        raise DataError(f'{len(request.query)} texts in query and {len(prompts)} prompts')

    def answer(scored: Scored) -> OpenRLHFAnswer:
        logs = {}
        if len(served.levels) > 1:
            low, high = (f'reward_q{served.levels[i]:.2f}' for i in (0, -1))
            logs = {'reward_std': [score.std for score in scored.scores],
                    low: [min(score.quantiles) for score in scored.scores],
                    high: [max(score.quantiles) for score in scored.scores]}
        return OpenRLHFAnswer(rewards=scored.rewards, scores=scored.rewards, extra_logs=logs)

    return Asked([_whole(text, f'query[{i}]', served, prompt)
                  for i, (text, prompt) in enumerate(zip(request.query, prompts, strict=True))],
                 answer, served.rule)


class SlimeRequest(Request):
    """A prompt, text or chat, and what the policy said."""

    prompt: str | Chat
    response: str
    label: Any = None


def _ask_slime(request: SlimeRequest, served: Served) -> Asked:
    return Asked([_continued(request.prompt, request.response, 'response')],
                 lambda scored: scored.rewards[0], served.rule)


# --- vLLM ----------------------------------------------------------------------------------------


class _Vllm(Request):
    """What requests of vLLM have in common; what would change a score and is not done is refused.

    `activation` and `softmax` are older names of `use_activation`.
    """

    model: str | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    softmax: bool | None = None
    encoding_format: Literal['float'] = 'float'
    dimensions: None = None
    truncate_prompt_tokens: None = None
    padding: Literal['do_not_pad'] | None = None

    @property
    def activated(self) -> bool:
        """Whether the sigmoid of the reward is asked for, as it is by default."""
        said = [one for one in (self.use_activation, self.activation, self.softmax)
                if one is not None]
        return said[0] if said else True


class VllmTextRequest(_Vllm):
    """Whole texts, one or several."""

    input: str | list[str]
    add_special_tokens: Literal[True] = True


class VllmChatRequest(_Vllm):
    """One chat."""

    messages: Chat
    add_special_tokens: Literal[False] = False
    add_generation_prompt: Literal[False] = False
    continue_final_message: Literal[False] = False
    chat_template: None = None
    chat_template_kwargs: None = None


class VllmTextPoolingRequest(VllmTextRequest):
    """Texts to be pooled, into one number each."""

    task: Literal['classify'] | None = None


class VllmChatPoolingRequest(VllmChatRequest):
    """A chat to be pooled, into one number."""

    task: Literal['classify'] | None = None


class Usage(Answer):
    """Tokens that were read; none are generated."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Classification(Answer):
    """`probs` holds one number, the reward or its sigmoid."""

    index: int
    label: str = _LABEL
    probs: list[float]
    num_classes: int = 1


class ClassifyAnswer(Answer):
    """As vLLM classifies."""

    id: str
    object: str = 'list'
    created: int
    model: str
    data: list[Classification]
    usage: Usage


class Pooled(Answer):
    """`data` holds one number, the reward or its sigmoid."""

    index: int
    object: str = 'pooling'
    data: list[float]


class PoolingAnswer(Answer):
    """As vLLM pools."""

    id: str
    object: str = 'list'
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


def _ask_vllm(request: VllmTextRequest | VllmChatRequest, served: Served, answer: Any) -> Asked:
    if isinstance(request, VllmChatRequest):
        comparisons = [_chat(request.messages, 'messages')]
    else:
        comparisons = _texts(request.input, 'input', served)
    values = _sigmoids if request.activated else list
    return Asked(comparisons,
                 lambda scored: answer(scored, values(scored.rewards), served), served.rule)


def _ask_classify(request: VllmTextRequest | VllmChatRequest, served: Served) -> Asked:
    return _ask_vllm(request, served, lambda scored, values, served: ClassifyAnswer(
        id=f'classify-{scored.identity}', created=scored.seconds, model=served.name,
        data=[Classification(index=i, probs=[value]) for i, value in enumerate(values)],
        usage=_usage(scored)))


def _ask_pooling(request: VllmTextRequest | VllmChatRequest, served: Served) -> Asked:
    return _ask_vllm(request, served, lambda scored, values, served: PoolingAnswer(
        id=f'pooling-{scored.identity}', created=scored.seconds, model=served.name,
        data=[Pooled(index=i, data=[value]) for i, value in enumerate(values)],
        usage=_usage(scored)))


# --- SGLang --------------------------------------------------------------------------------------


class SglangRequest(Request):
    """Whole texts, one or several."""

    text: str | list[str]
    input_ids: None = None


class SglangMeta(Answer):
    """Of one text."""

    id: str
    prompt_tokens: int


class SglangAnswer(Answer):
    """`embedding` holds one number, the reward."""

    embedding: list[float]
    meta_info: SglangMeta


class EmbeddingsRequest(Request):
    """Whole texts, one or several."""

    input: str | list[str]
    model: str | None = None
    encoding_format: Literal['float'] = 'float'
    dimensions: None = None


class Embedding(Answer):
    """`embedding` holds one number, the reward."""

    index: int
    object: str = 'embedding'
    embedding: list[float]


class EmbeddingsAnswer(Answer):
    """As OpenAI embeds."""

    object: str = 'list'
    model: str
    data: list[Embedding]
    usage: Usage


def _ask_sglang(request: SglangRequest, served: Served) -> Asked:
    def answer(scored: Scored) -> SglangAnswer | list[SglangAnswer]:
        found = [SglangAnswer(embedding=[reward], meta_info=SglangMeta(
                     id=f'{scored.identity}-{i}', prompt_tokens=tokens))
                 for i, (reward, tokens) in enumerate(
                     zip(scored.rewards, scored.tokens, strict=True))]
        return found[0] if isinstance(request.text, str) else found

    return Asked(_texts(request.text, 'text', served), answer, served.rule)


def _ask_embeddings(request: EmbeddingsRequest, served: Served) -> Asked:
    return Asked(_texts(request.input, 'input', served), lambda scored: EmbeddingsAnswer(
        model=served.name, usage=_usage(scored),
        data=[Embedding(index=i, embedding=[reward])
              for i, reward in enumerate(scored.rewards)]), served.rule)


# --- Text Embeddings Inference -------------------------------------------------------------------


class RerankRequest(Request):
    """A prompt, as the query, and responses, as texts."""

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None


class Rank(Answer):
    """A response by its place among the texts; the reward or its sigmoid."""

    index: int
    text: str | None = None
    score: float


class PredictRequest(Request):
    """A whole text, [prompt, response], or a list of [text] and [prompt, response]."""

    inputs: str | list[str] | list[list[str]]
    raw_scores: bool = False
    truncate: bool | None = None


class Prediction(Answer):
    """The reward or its sigmoid."""

    score: float
    label: str = _LABEL


def _ask_rerank(request: RerankRequest, served: Served) -> Asked:
    def answer(scored: Scored) -> list[Rank]:
        values = list(scored.rewards) if request.raw_scores else _sigmoids(scored.rewards)
        # Highest first; of equal ones the last first, as sorting upwards and turning that does.
        order = sorted(range(len(values)), key=lambda i: (values[i], i), reverse=True)
        return [Rank(index=i, score=values[i],
                     text=request.texts[i] if request.return_text else None) for i in order]

    return Asked([_continued(request.query, text, f'texts[{i}]')
                  for i, text in enumerate(request.texts)], answer, served.rule,
                 whole=request.truncate is False)


def _ask_predict(request: PredictRequest, served: Served) -> Asked:
    inputs = request.inputs
    batch = not isinstance(inputs, str) and all(isinstance(one, list) for one in inputs)
    sequences = inputs if batch else [[inputs] if isinstance(inputs, str) else inputs]
    comparisons = []
    for i, sequence in enumerate(sequences):
        where = f'inputs[{i}]' if batch else 'inputs'
        if len(sequence) not in (1, 2):
            raise DataError(f'{where}: {len(sequence)} texts, expected [text] or '
                            '[prompt, response]')
        comparisons.append(_whole(sequence[0], where, served) if len(sequence) == 1
                           else _continued(*sequence, where))

    def answer(scored: Scored) -> list[Prediction] | list[list[Prediction]]:
        values = scored.rewards if request.raw_scores else _sigmoids(scored.rewards)
        found = [[Prediction(score=value)] for value in values]
        return found if batch else found[0]

    return Asked(comparisons, answer, served.rule, whole=request.truncate is False)


# --- what they have in common --------------------------------------------------------------------


def _continued(prompt: str | Chat, response: str | Chat, where: str) -> Comparison:
    return parse_row({'prompt': prompt, 'response': response}, where, literal=True)


def _whole(text: str, where: str, served: Served, prompt: str = '') -> Comparison:
    """A text as it is, without a prompt unless it begins with it."""
    if served.bos:
        text, prompt = text.removeprefix(served.bos), prompt.removeprefix(served.bos)
    at = len(prompt) if text.startswith(prompt) else 0
    return _continued(text[:at], text[at:], where)


def _texts(given: str | list[str], where: str, served: Served) -> list[Comparison]:
    if isinstance(given, str):
        return [_whole(given, where, served)]
    return [_whole(text, f'{where}[{i}]', served) for i, text in enumerate(given)]


def _chat(messages: Chat, where: str) -> Comparison:
    """A chat, whose last message is what is judged."""
    *before, last = messages or [{}]
    if not before:
        raise DataError(f'{where}: {len(messages)} messages, expected a chat of at least 2')
    return parse_row({'prompt': before, 'response': [last]}, where, literal=True)


def _sigmoids(values: Sequence[float]) -> list[float]:
    return [1.0 / (1.0 + math.exp(-value)) if value >= 0.0
            else math.exp(value) / (1.0 + math.exp(value)) for value in values]


def _usage(scored: Scored) -> Usage:
    return Usage(prompt_tokens=sum(scored.tokens), total_tokens=sum(scored.tokens))


# --- errors --------------------------------------------------------------------------------------

_TEI_ERRORS = {401: 'validation', 422: 'tokenizer', 429: 'overloaded', 503: 'unhealthy',
               500: 'backend'}


def plain_error(status: int, message: str) -> dict[str, Any]:
    """An error of this project, and of clients that read the status alone."""
    return {'error': message}


def vllm_error(status: int, message: str) -> dict[str, Any]:
    """As vLLM puts it."""
    return {'error': {'message': message, 'type': http.HTTPStatus(status).phrase, 'param': None,
                      'code': status}}


def sglang_error(status: int, message: str) -> dict[str, Any]:
    """As SGLang puts it."""
    return {'error': {'message': message}}


def tei_error(status: int, message: str) -> dict[str, Any]:
    """As Text Embeddings Inference puts it."""
    return {'error': message, 'error_type': _TEI_ERRORS.get(status, 'validation')}


# --- the table -----------------------------------------------------------------------------------


class Route(NamedTuple):
    """A way to ask.

    Attributes:
      path: that is posted to.
      speaker: whose protocol it is.
      request, answer: types of what is read and sent.
      ask: what a request asks.
      key: that tells it from the next one of the same path; '': takes whatever comes.
      error: what is sent of a status and a line.
    """

    path: str
    speaker: str
    request: type[Request]
    answer: Any
    ask: Callable[[Any, Served], Asked]
    key: str = ''
    error: Callable[[int, str], dict[str, Any]] = plain_error


ROUTES = (
    Route('/score', 'qrm', ScoreRequest, ScoreAnswer, _ask_score),
    Route('/get_reward', 'OpenRLHF', OpenRLHFRequest, OpenRLHFAnswer, _ask_openrlhf),
    Route('/slime', 'slime', SlimeRequest, float, _ask_slime),
    Route('/classify', 'SGLang', SglangRequest, SglangAnswer | list[SglangAnswer], _ask_sglang,
          key='text', error=sglang_error),
    Route('/classify', 'vLLM', VllmChatRequest, ClassifyAnswer, _ask_classify, key='messages',
          error=vllm_error),
    Route('/classify', 'vLLM', VllmTextRequest, ClassifyAnswer, _ask_classify, error=vllm_error),
    Route('/pooling', 'vLLM', VllmChatPoolingRequest, PoolingAnswer, _ask_pooling, key='messages',
          error=vllm_error),
    Route('/pooling', 'vLLM', VllmTextPoolingRequest, PoolingAnswer, _ask_pooling,
          error=vllm_error),
    Route('/v1/embeddings', 'SGLang', EmbeddingsRequest, EmbeddingsAnswer, _ask_embeddings,
          error=sglang_error),
    Route('/rerank', 'TEI', RerankRequest, list[Rank], _ask_rerank, error=tei_error),
    Route('/predict', 'TEI', PredictRequest, list[Prediction] | list[list[Prediction]],
          _ask_predict, error=tei_error),
)


def routes_of(path: str) -> list[Route]:
    """The ways to ask at a path, in the order in which they are tried."""
    return [route for route in ROUTES if route.path == path]


def find(path: str, body: Any) -> Route:
    """The way in which a body, decoded from JSON, asks at a path of `ROUTES`."""
    return next(route for route in routes_of(path)
                if not route.key or (isinstance(body, dict) and route.key in body))


def read(route: Route, body: Any, served: Served) -> Asked:
    """What a body, decoded from JSON, asks.

    Raises:
      DataError: it is none of this route; names the key.
    """
    try:
        request = route.request.model_validate(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = '.'.join(map(str, first['loc']))
        message = f'{place}: {first["msg"]}' if place else first['msg']
        raise DataError(message) from error
    asked = route.ask(request, served)
    if not asked.comparisons:
        raise DataError('nothing to score, expected at least one text')
    return asked


def plain(route: Route, answer: Any) -> Any:
    """An answer as values of JSON; what is not there is left out."""
    return pydantic.TypeAdapter(route.answer).dump_python(answer, mode='json', exclude_none=True)


def openapi(name: str, version: str) -> dict[str, Any]:
    """The OpenAPI document of all routes."""
    adapters = {}
    for route in ROUTES:
        adapters[route, 'validation'] = pydantic.TypeAdapter(route.request)
        adapters[route, 'serialization'] = pydantic.TypeAdapter(route.answer)
    schemas, definitions = pydantic.TypeAdapter.json_schemas(
        [(key, key[1], adapter) for key, adapter in adapters.items()],
        ref_template='#/components/schemas/{model}')
    paths: dict[str, Any] = {}
    for path in dict.fromkeys(route.path for route in ROUTES):
        some = routes_of(path)

        def together(mode: str, some: Sequence[Route] = some) -> dict[str, Any]:
            found = [schemas[(route, mode), mode] for route in some]
            unique = [one for i, one in enumerate(found) if one not in found[:i]]
            schema = unique[0] if len(unique) == 1 else {'anyOf': unique}
            return {'application/json': {'schema': schema}}

        speakers = ' or '.join(dict.fromkeys(route.speaker for route in some))
        answers = {str(status): {'description': text} for status, text in STATUSES.items()}
        paths[path] = {'post': {
            'summary': f'as {speakers} is asked', 'operationId': path.strip('/').replace('/', '_'),
            'requestBody': {'required': True, 'content': together('validation')},
            'responses': {'200': {'description': 'scores',
                                  'content': together('serialization')}, **answers}}}
    return {'openapi': '3.1.0', 'info': {'title': f'qrm: {name}', 'version': version},
            'paths': paths, 'components': {'schemas': definitions.get('$defs', {})}}


STATUSES = {
    400: 'not JSON', 401: 'no token, or a wrong one',
    403: 'a name of this host that is not its own',
    413: 'too large, or too many texts or tokens',
    422: 'JSON that does not ask in this way', 429: 'too much waits; ask again after Retry-After',
    500: 'the model has no finite reward for it', 503: 'stopping, or not in time',
}
