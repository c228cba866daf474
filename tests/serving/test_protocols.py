"""Requests of each client to comparisons, and answers with the keys that it reads."""

import json
import math

import jsonschema
import pytest

from qrm.data.comparisons import DataError
from qrm.rewards import selection
from qrm.serving import protocols
from qrm.serving.batching import Score
from qrm.serving.protocols import Scored, Served
from tests.helpers import REFERENCE

VLLM = json.loads((REFERENCE / 'vllm.json').read_text(encoding='utf-8'))
# Of vLLM's requests, what changes no score of a text: names, order, media, bytes that are refused.
CHAT = [{'role': 'user', 'content': 'u'}, {'role': 'assistant', 'content': 'a'}]
IGNORED = {'user', 'request_id', 'priority', 'cache_salt', 'mm_processor_kwargs', 'media_io_kwargs',
           'truncation_side', 'embed_dtype', 'endianness'}
SERVED = Served('model', selection.parse_rule('mean'), [0.25, 0.75])


def ask(path, body, served=SERVED):
    return protocols.read(protocols.find(path, body), body, served)


def answer(path, body, *rewards, served=SERVED):
    """What is sent if the texts have these rewards, and quantiles 1 below and above."""
    asked = ask(path, body, served)
    assert len(asked.comparisons) == len(rewards)
    scores = [Score(reward, 1.0, [reward - 1.0, reward + 1.0]) for reward in rewards]
    scored = Scored(scores, [7] * len(rewards), 0, 'id', 5)
    return protocols.plain(protocols.find(path, body), asked.answer(scored))


def texts(asked):
    return [(c.prompt, *c.responses) for c in asked.comparisons]


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def test_own():
    body = {'prompt': 'p', 'responses': [' a', ' b'], 'rule': 'cvar:0.5'}
    assert texts(ask('/score', body)) == [('p', ' a'), ('p', ' b')]
    assert ask('/score', body).rule == selection.parse_rule('cvar:0.5')
    assert answer('/score', body, 1.0, 2.0) == {
        'model': 'model', 'rule': 'cvar:0.5', 'rewards': [1.0, 2.0], 'stds': [1.0, 1.0],
        'levels': [0.25, 0.75], 'quantiles': [[0.0, 2.0], [1.0, 3.0]], 'tokens': [7, 7], 'cut': 0}
    chat = {'prompt': [{'role': 'user', 'content': 'u'}], 'responses': ['a']}
    assert texts(ask('/score', chat)) == [
        (({'role': 'user', 'content': 'u'},), ({'role': 'assistant', 'content': 'a'},))]


def test_openrlhf():
    # Its client sends one text a request, reads 'rewards', 'scores' and 'extra_logs', and makes a
    # tensor of each.
    body = {'query': ['p a', 'other'], 'prompts': ['p', 'x'], 'labels': [None, '4']}
    assert texts(ask('/get_reward', body)) == [('p', ' a'), ('', 'other')]
    assert answer('/get_reward', body, 1.0, 2.0) == {
        'rewards': [1.0, 2.0], 'scores': [1.0, 2.0],
        'extra_logs': {'reward_std': [1.0, 1.0], 'reward_q0.25': [0.0, 1.0],
                       'reward_q0.75': [2.0, 3.0]}}
    assert answer('/get_reward', {'query': ['p']}, 1.0, served=SERVED._replace(levels=[0.5]))[
        'extra_logs'] == {}
    with pytest.raises(DataError, match='2 texts in query and 1 prompts'):
        ask('/get_reward', {'query': ['a', 'b'], 'prompts': ['a']})


def test_a_bos_that_the_client_has_put_there_is_not_doubled():
    served = SERVED._replace(bos='<s>')
    body = {'query': ['<s>p a', 'p'], 'prompts': ['<s>p', '']}
    assert texts(ask('/get_reward', body, served)) == [('p', ' a'), ('', 'p')]
    assert texts(ask('/get_reward', body)) == [('<s>p', ' a'), ('', 'p')]
    assert texts(ask('/classify', {'input': '<s><s>p'}, served)) == [('', '<s>p')]


def test_slime():
    # Its client takes the decoded body as the reward.
    body = {'prompt': 'p', 'response': ' a', 'label': None}
    assert texts(ask('/slime', body)) == [('p', ' a')]
    assert answer('/slime', body, 1.5) == 1.5


def test_vllm_classify_gives_one_number():
    for key in ('use_activation', 'activation', 'softmax'):
        found = answer('/classify', {'model': 'm', 'input': ['a', 'b'], key: False}, -1.0, 2.0)
        assert found == {
            'id': 'classify-id', 'object': 'list', 'created': 5, 'model': 'model',
            'data': [{'index': 0, 'label': 'reward', 'probs': [-1.0], 'num_classes': 1},
                     {'index': 1, 'label': 'reward', 'probs': [2.0], 'num_classes': 1}],
            'usage': {'prompt_tokens': 14, 'total_tokens': 14, 'completion_tokens': 0}}
        # As verl reads it.
        assert found['data'][-1]['probs'][-1] == 2.0
    for body in ({'input': 'a'}, {'input': 'a', 'use_activation': True},
                 {'input': 'a', 'use_activation': None},
                 {'input': 'a', 'use_activation': True, 'activation': False}):
        [one] = answer('/classify', body, -800.0)['data']
        assert one['probs'] == [0.0]
        assert answer('/classify', body, 2.0)['data'][0]['probs'] == [pytest.approx(sigmoid(2.0))]


def test_vllm_chats_and_pooling():
    messages = [{'role': 'user', 'content': 'u'}, {'role': 'assistant', 'content': 'a'}]
    assert texts(ask('/pooling', {'messages': messages})) == [
        (({'role': 'user', 'content': 'u'},), ({'role': 'assistant', 'content': 'a'},))]
    found = answer('/pooling', {'messages': messages, 'use_activation': False}, 3.0)
    assert found['data'] == [{'index': 0, 'object': 'pooling', 'data': [3.0]}]
    assert found['id'] == 'pooling-id'
    with pytest.raises(DataError, match='messages: 1 messages, expected a chat of at least 2'):
        ask('/classify', {'messages': messages[:1]})


@pytest.mark.parametrize(('body', 'message'), [
    ({'input': [1, 2]}, 'input'),
    ({'input': 'a', 'encoding_format': 'base64'}, "encoding_format: Input should be 'float'"),
    ({'input': 'a', 'truncate_prompt_tokens': 5}, 'truncate_prompt_tokens: Input should be None'),
    ({'input': 'a', 'padding': 'max_length'}, "padding: Input should be 'do_not_pad'"),
    ({'input': 'a', 'add_special_tokens': False}, 'add_special_tokens: Input should be True'),
    ({'messages': [], 'chat_template': 'x'}, 'chat_template: Input should be None'),
    ({'messages': [], 'add_generation_prompt': True}, 'add_generation_prompt: Input should be'),
    ({'messages': []}, 'messages: 0 messages, expected'),
    ({'input': []}, 'nothing to score'),
    ({}, 'input: Field required'),
    (['a'], 'Input should be a valid dictionary'),
])
def test_what_vllm_does_and_this_does_not_is_refused(body, message):
    with pytest.raises(DataError) as error:
        ask('/classify', body)
    assert str(error.value).startswith(message)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('path', 'kind', 'body'), [
    (path, kind, body) for path in VLLM['requests']
    for kind, body in (('text', {'input': 'a b'}), ('chat', {'messages': CHAT}))])
def test_keys_of_vllm_are_read_refused_or_change_no_score(path, kind, body):
    schema = VLLM['requests'][path][kind]
    request = protocols.find(path, body).request
    assert set(schema['properties']) - set(request.model_fields) <= IGNORED
    assert schema['required'] == [name for name, field in request.model_fields.items()
                                  if field.is_required()]
    defaults = {name: one['default'] for name, one in schema['properties'].items()
                if 'default' in one}
    assert len(defaults) > 8
    assert texts(ask(path, defaults | body)) == texts(ask(path, body))


@pytest.mark.parametrize('exchange', VLLM['exchanges'],
                         ids=lambda one: f'{one["path"]} {json.dumps(one["body"])}')
def test_what_vllm_answered_is_answered_here(exchange):
    """Of the same rewards; or it is refused, as by vLLM, or as what is not done here."""
    path, body = exchange['path'], exchange['body']
    ours_alone = ({'add_generation_prompt', 'truncate_prompt_tokens'} & set(body)
                  or body.get('encoding_format') == 'base64' or body.get('input') == [1, 2, 3])
    if exchange['status'] != 200 or ours_alone:
        with pytest.raises(DataError):
            ask(path, body)
        return
    key = {'/classify': 'probs', '/pooling': 'data'}[path]
    theirs = exchange['answer']
    values = [one[key] for one in theirs['data']]
    assert all(len(value) == 1 for value in values)
    # Rewards that give these numbers; vLLM 0.32 no longer knows two older names, and activates.
    older = {'activation', 'softmax'} & set(body)
    raw = body.get('use_activation') is False
    rewards = [value if raw else math.log(value / (1.0 - value)) for [value] in values]
    ours = answer(path, body, *rewards)
    jsonschema.validate(ours, VLLM['responses'][path])
    expected = [[reward] for reward in rewards] if older else values
    assert [one[key] for one in ours['data']] == [pytest.approx(value) for value in expected]
    assert ours['id'].split('-')[0] == theirs['id'].split('-')[0]
    assert _keys(ours) == _keys(theirs)


def _keys(value):
    """What is in an answer: keys of all depths, but for those without a value."""
    if isinstance(value, dict):
        return {key: _keys(one) for key, one in value.items() if one is not None}
    return [_keys(one) for one in value] if isinstance(value, list) else type(value)


def test_sglang():
    # Which of the two speaks at /classify, the body says.
    assert protocols.find('/classify', {'text': 'a'}).speaker == 'SGLang'
    assert protocols.find('/classify', {'input': 'a'}).speaker == 'vLLM'
    one = {'embedding': [1.0], 'meta_info': {'id': 'id-0', 'prompt_tokens': 7}}
    assert answer('/classify', {'text': 'a'}, 1.0) == one
    assert answer('/classify', {'text': ['a']}, 1.0) == [one]
    found = answer('/v1/embeddings', {'model': 'm', 'input': 'a'}, 1.0)
    assert found['data'] == [{'index': 0, 'object': 'embedding', 'embedding': [1.0]}]
    # As verl reads it.
    assert found['data'][-1]['embedding'][-1] == 1.0


def test_tei_rerank_is_sorted_highest_first_and_of_equal_ones_last_first():
    body = {'query': 'p', 'texts': [' a', ' b', ' c', ' d'], 'raw_scores': True}
    assert texts(ask('/rerank', body)) == [('p', ' a'), ('p', ' b'), ('p', ' c'), ('p', ' d')]
    assert answer('/rerank', body, 1.0, 3.0, 1.0, -2.0) == [
        {'index': 1, 'score': 3.0}, {'index': 2, 'score': 1.0}, {'index': 0, 'score': 1.0},
        {'index': 3, 'score': -2.0}]
    found = answer('/rerank', {'query': 'p', 'texts': [' a'], 'return_text': True}, 2.0)
    assert found == [{'index': 0, 'text': ' a', 'score': pytest.approx(sigmoid(2.0))}]
    assert not ask('/rerank', body).whole
    assert ask('/rerank', body | {'truncate': False}).whole


def test_tei_predict():
    one = [{'score': 2.0, 'label': 'reward'}]
    raw = {'raw_scores': True}
    for inputs, expected in (('a', ('', 'a')), (['a'], ('', 'a')), (['p', ' a'], ('p', ' a'))):
        assert texts(ask('/predict', {'inputs': inputs})) == [expected]
        assert answer('/predict', {'inputs': inputs} | raw, 2.0) == one
    batch = {'inputs': [['a'], ['p', ' a']]}
    assert texts(ask('/predict', batch)) == [('', 'a'), ('p', ' a')]
    assert answer('/predict', batch | raw, 2.0, 2.0) == [one, one]
    assert answer('/predict', {'inputs': 'a'}, 2.0)[0]['score'] == pytest.approx(sigmoid(2.0))
    with pytest.raises(DataError, match=r'inputs\[0\]: 3 texts, expected \[text\] or'):
        ask('/predict', {'inputs': [['a', 'b', 'c']]})


@pytest.mark.parametrize(('body', 'message'), [
    ({'prompt': 'p', 'responses': ['a'], 'rule': 'median'}, "rule 'median', expected mean, quant"),
    ({'prompt': 'p', 'responses': ['a'], 'rule': 'mean-std:1'}, "rule 'mean-std:1' needs a scale"),
    ({'prompt': 'p', 'responses': ['a'], 'rule': 'disagreement:1'},
     "rule 'disagreement:1' of a head with one member"),
    ({'prompt': 'p', 'responses': ['a'], 'rules': 'mean'}, 'rules: Extra inputs are not permitted'),
    ({'prompt': 'p', 'responses': []}, 'nothing to score, expected at least one text'),
    ({'prompt': 'p', 'responses': [1]}, 'responses.0'),
    ({'prompt': 'p', 'responses': [[{'role': 'user'}]]}, 'responses[0] field'),
    ({'prompt': '\ud800', 'responses': ['a']},
     "responses[0] field 'prompt': got text with a lone surrogate"),
    ('p', 'Input should be a valid dictionary'),
])
def test_what_cannot_be_scored_is_told_in_a_line(body, message):
    with pytest.raises(DataError) as error:
        ask('/score', body)
    assert str(error.value).startswith(message)
    assert '\n' not in str(error.value)


def test_errors_have_the_form_of_their_protocol():
    forms = {route.speaker: route.error(429, 'full') for route in protocols.ROUTES}
    assert forms['qrm'] == forms['OpenRLHF'] == forms['slime'] == {'error': 'full'}
    assert forms['vLLM'] == {'error': {'message': 'full', 'type': 'Too Many Requests',
                                       'param': None, 'code': 429}}
    assert forms['SGLang'] == {'error': {'message': 'full'}}
    assert forms['TEI'] == {'error': 'full', 'error_type': 'overloaded'}


def test_openapi_has_every_path_and_only_references_that_are_there():
    document = protocols.openapi('model', '1.0')
    assert list(document['paths']) == ['/score', '/get_reward', '/slime', '/classify', '/pooling',
                                       '/v1/embeddings', '/rerank', '/predict']

    def references(value):
        if isinstance(value, dict):
            yield from [value['$ref']] if '$ref' in value else []
            for one in value.values():
                yield from references(one)
        elif isinstance(value, list):
            for one in value:
                yield from references(one)

    found = {name.removeprefix('#/components/schemas/') for name in references(document)}
    assert len(found) > 10
    assert found <= set(document['components']['schemas'])
    classify = document['paths']['/classify']['post']
    asked = classify['requestBody']['content']['application/json']['schema']['anyOf']
    assert len(asked) == 3  # SGLang's, and vLLM's of texts and of chats
    assert {'400', '401', '413', '422', '429', '503'} <= set(classify['responses'])
