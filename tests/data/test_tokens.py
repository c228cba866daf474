"""Tests of tokenised comparisons: shared prompts, special tokens, over-length, scoring."""

import dataclasses
import datetime
import itertools
import json
import math

import numpy as np
import pytest
import tokenizers
import transformers
from ml_collections import ConfigDict

from qrm.data import orders, templates, tokens
from qrm.data.comparisons import Comparison, DataError, DataReport, MalformedRow, check_malformed
from qrm.data.encoded import Encoded, fingerprint
from qrm.data.files import read_rows
from qrm.data.rows import parse_row
from qrm.data.sources import load_splits
from qrm.data.templates import render
from qrm.data.tokens import (
    Reading,
    encode,
    encode_to_score,
    load_tokenizer,
    split_prompt,
    tokenize,
)
from tests.helpers import ROOT

SHARED = ROOT / '../shared'
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'][0] }}]"
    "{{ message['content'] }}{% endfor %}"
)
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
BOS, EOS = '<s>', '</s>'


def _tokenizer(single='<s> $A', eos=EOS, template=None, normalizer=None):
    """Byte-level BPE that merges 'he', 'll' and 'hell', and by default writes BOS first."""
    vocabulary = [BOS, EOS, '<pad>', *BYTES, 'he', 'll', 'hell']
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(vocabulary)}, [('h', 'e'), ('l', 'l'), ('he', 'll')]
    ))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        bpe.normalizer = normalizer
    if single:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[(BOS, 0), (EOS, 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=eos, pad_token='<pad>',
        chat_template=template,
    )


@pytest.fixture(scope='module')
def tokenizer():
    return _tokenizer()


@pytest.fixture(scope='module')
def chat_tokenizer():
    return _tokenizer(template=CHAT_TEMPLATE)


def _comparison(prompt, *responses, name='a', **known):
    if len(responses) == 2 and not known:
        known = {'ranks': (0, 1)}
    return Comparison(name, prompt, responses, 'group', **known)


def _user(text):
    return ({'role': 'user', 'content': text},)


def _assistant(text):
    return ({'role': 'assistant', 'content': text},)


def _spelt(tokenizer, ids):
    """Tokens as a list of strings; a space is 'Ġ'."""
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


READING = {field.name for field in dataclasses.fields(Reading)}


def _encode_one(comparison, tokenizer, max_length=100, **kwargs):
    report = DataReport('rows', 'train', read=1)
    reading = {key: kwargs.pop(key) for key in READING & set(kwargs)}
    encoded = encode([comparison], tokenizer, report, Reading(max_length, **reading), **kwargs)
    assert report.read == report.kept + sum(report.dropped.values())
    return (encoded[0] if encoded else None), report


def _parts(tokenizer, comparison, **kwargs):
    encoded, _ = _encode_one(comparison, tokenizer, **kwargs)
    return ' '.join(_spelt(tokenizer, encoded.prompt)), [
        ' '.join(_spelt(tokenizer, response)) for response in encoded.responses]


# Whole dialogues and their special tokens.


def test_dialogues_are_tokenised_whole(tokenizer):
    # The merge 'hell' crosses the boundary of prompt and response.
    [[ids]] = tokenize([_comparison('he', 'llo')], tokenizer, Reading(100))
    assert _spelt(tokenizer, ids) == [BOS, 'hell', 'o', EOS]
    assert ids.dtype == np.int32
    [[ids]] = tokenize([_comparison('he', 'llo')], tokenizer, Reading(100, append_eos=False))
    assert _spelt(tokenizer, ids) == [BOS, 'hell', 'o']


def test_dialogues_come_back_in_order(chat_tokenizer):
    rows = [
        _comparison('a', 'b', 'c'), _comparison(_user('d'), _assistant('e')),
        _comparison('f', 'g'), _comparison(_user('h'), _assistant('i'), _assistant('j')),
    ]
    found = [[''.join(_spelt(chat_tokenizer, ids)) for ids in dialogues]
             for dialogues in tokenize(rows, chat_tokenizer, Reading(100))]
    assert found == [
        ['<s>ab</s>', '<s>ac</s>'], ['<s>[u]d[a]e</s>'], ['<s>fg</s>'],
        ['<s>[u]h[a]i</s>', '<s>[u]h[a]j</s>'],
    ]
    assert tokenize([], chat_tokenizer, Reading(100)) == []


def test_dialogues_come_back_in_order_across_batches(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, '_BATCH', 3)
    rows = [_comparison('', *(f'{i}{k}' for k in 'abcd'[:1 + i % 4])) for i in range(8)]
    found = [[''.join(_spelt(tokenizer, ids)) for ids in dialogues]
             for dialogues in tokenize(rows, tokenizer, Reading(100))]
    assert found == [
        ['<s>0a</s>'], ['<s>1a</s>', '<s>1b</s>'], ['<s>2a</s>', '<s>2b</s>', '<s>2c</s>'],
        ['<s>3a</s>', '<s>3b</s>', '<s>3c</s>', '<s>3d</s>'],
        ['<s>4a</s>'], ['<s>5a</s>', '<s>5b</s>'], ['<s>6a</s>', '<s>6b</s>', '<s>6c</s>'],
        ['<s>7a</s>', '<s>7b</s>', '<s>7c</s>', '<s>7d</s>'],
    ]


@pytest.mark.parametrize('comparison', [
    _comparison('he', 'y'), _comparison('', 'hey'), _comparison(_user('he'), _assistant('y')),
    _comparison((), (*_user('he'), *_assistant('y'))),
])
def test_bos_stands_once_in_texts_and_chats(chat_tokenizer, comparison):
    [[ids]] = tokenize([comparison], chat_tokenizer, Reading(100))
    spelt = _spelt(chat_tokenizer, ids)
    assert spelt[0] == BOS
    assert spelt.count(BOS) == 1


def test_chats_get_no_other_special_tokens_than_those_of_their_template():
    silent = _tokenizer(template=CHAT_TEMPLATE.removeprefix('{{ bos_token }}'))
    [[ids]] = tokenize([_comparison(_user('a'), _assistant('b'))], silent,
                       Reading(100, append_eos=False))
    assert ''.join(_spelt(silent, ids)) == '[u]a[a]b'


@pytest.mark.parametrize('single', ['<s> $A', '<s> $A </s>', ''])
@pytest.mark.parametrize('response', ['b', 'b</s>', 'b</s></s>'])
def test_eos_is_the_last_token_once(single, response):
    tokenizer = _tokenizer(single)
    [[ids]] = tokenize([_comparison('a', response)], tokenizer, Reading(100))
    assert _spelt(tokenizer, ids) == ([BOS] if single else []) + ['a', 'b', EOS]


@pytest.mark.parametrize('end', ['', '{{ eos_token }}'])
def test_eos_is_the_last_token_of_a_chat_once(end):
    tokenizer = _tokenizer(template=CHAT_TEMPLATE + end)
    [[ids]] = tokenize([_comparison(_user('a'), _assistant('b'))], tokenizer, Reading(100))
    assert ''.join(_spelt(tokenizer, ids)) == '<s>[u]a[a]b</s>'


def test_eos_inside_a_dialogue_stays(tokenizer):
    [[ids]] = tokenize([_comparison('a</s>', 'b')], tokenizer, Reading(100))
    assert _spelt(tokenizer, ids) == [BOS, 'a', EOS, 'b', EOS]


def test_tokenizers_without_eos_are_refused_if_it_is_needed():
    tokenizer = _tokenizer('', eos=None)
    with pytest.raises(DataError, match='no EOS token'):
        tokenize([_comparison('a', 'b')], tokenizer, Reading(100))
    [[ids]] = tokenize([_comparison('a', 'b')], tokenizer, Reading(100, append_eos=False))
    assert _spelt(tokenizer, ids) == ['a', 'b']


def test_dialogues_without_tokens_are_refused():
    rows = [_comparison('a', 'b'), _comparison('', '', name='row 5')]
    first, second = tokenize(rows, _tokenizer(''), Reading(100, append_eos=False))
    assert [len(ids) for ids in first] == [2]
    assert isinstance(second, MalformedRow)
    assert str(second) == 'row 5: a dialogue has no tokens, expected text'


def test_chats_without_a_template_are_refused(tokenizer):
    with pytest.raises(DataError, match='row 5: chat messages, but .* has no chat template'):
        tokenize([_comparison(_user('a'), _assistant('b'), name='row 5')], tokenizer, Reading(100))


REFUSALS = {
    "{{ raise_exception('no x') }}": 'no x',
    "{{ messages[0].content + 1 }}": 'concatenate',  # any error of Python
    "{{ missing.content }}": "'missing' is undefined",
    "{{ messages.__class__.__mro__ }}": 'unsafe',  # what Jinja's sandbox keeps templates from
}


@pytest.mark.parametrize(('refusal', 'reason'), REFUSALS.items())
def test_rows_that_the_template_refuses_are_malformed(refusal, reason):
    template = "{% if messages[0].content == 'x' %}" + refusal + '{% endif %}' + CHAT_TEMPLATE
    tokenizer = _tokenizer(template=template)
    good, bad = (dataclasses.replace(
        _comparison(_user(text), _assistant('b'), _assistant('c'), name='row 5'), where='f:7')
        for text in 'ax')
    _, error = tokenize([good, bad], tokenizer, Reading(100))
    assert isinstance(error, MalformedRow)
    assert str(error).startswith('f:7 id=row 5: the chat template refuses it (')
    assert reason in str(error)
    # Counted with those that could not be read, up to the share that is allowed.
    report = DataReport('rows', 'train', read=4)
    report.drop_malformed(MalformedRow('f:1: not JSON'))
    assert len(encode([good, bad, good], tokenizer, report, Reading(100))) == 2
    assert report.dropped == {'malformed row': 2}
    assert report.first_malformed == 'f:1: not JSON'
    check_malformed([report], 0.5)
    other = DataReport('rows', 'test', read=2)
    encode([good, bad], tokenizer, other, Reading(100))
    check_malformed([report, other], 0.5)
    with pytest.raises(DataError, match=r'^f:1: not JSON; 3 of 6 rows are malformed, more than'):
        check_malformed([report, other], 0.49)
    with pytest.raises(DataError, match=r'^f:7 id=row 5: .*; 1 of 2 rows are malformed, more'):
        check_malformed([other], 0.49)
    with pytest.raises(DataError, match='f:7 id=row 5: the chat template refuses it'):
        encode_to_score([good, bad], tokenizer, Reading(100))


def test_rows_that_the_tokenizer_refuses_are_malformed():
    def refuse(texts, **kwargs):
        if any('x' in text for text in texts):
            raise OverflowError('too much')
        return {'input_ids': [[5] * len(text) for text in texts]}

    refusing = _tokenizer()
    refusing.__class__ = type('Refusing', (type(refusing),), {
        '__call__': lambda self, *args, **kwargs: refuse(*args, **kwargs)})
    rows = [_comparison('a', 'b'), _comparison('a', 'b', 'x', name='row 5'), _comparison('', 'cd')]
    first, second, third = tokenize(rows, refusing, Reading(100, append_eos=False))
    assert str(second) == 'row 5: the tokenizer refuses it (too much)'
    assert [len(first[0]), len(third[0])] == [2, 2]


def _call(name):
    return {'role': 'assistant', 'content': '', 'tool_calls': [{'function': {'name': name}}]}


@pytest.mark.parametrize(('prints', 'kept', 'unread'), [
    ('', 0, ["message key 'tool_calls'", "key 'tools'"]),
    ('{{ message.tool_calls }}', 1, ["key 'tools'"]),
    ('{{ tools }}', 0, ["message key 'tool_calls'"]),
    ("{% if 'tool_calls' in message %}{{ message.tool_calls[0].function.name }}{% endif %}"
     '{{ tools | tojson }}', 1, []),
])
def test_what_a_template_does_not_print_is_counted(prints, kept, unread):
    template = CHAT_TEMPLATE.replace('{% endfor %}', prints + '{% endfor %}')
    tokenizer = _tokenizer(template=template)
    chat = dataclasses.replace(
        _comparison(({'role': 'user', 'content': 'a', 'name': ''},), (_call('f'),), (_call('g'),)),
        tools=({'name': 'f'},))
    assert templates.unread_keys(chat, tokenizer) == unread
    report = DataReport('rows', 'train', read=1)
    encode([chat], tokenizer, report, Reading(100))
    assert (report.kept, report.identical) == (kept, 1 - kept)
    assert report.notes == {f'{key} not used by the chat template': 1 for key in unread}
    # Texts have none.
    assert templates.unread_keys(_comparison('a', 'b'), tokenizer) == []


def test_tools_are_read_in_training_as_in_use():
    template = CHAT_TEMPLATE.replace('{% endfor %}', '{{ tools | tojson }}{% endfor %}')
    tokenizer = _tokenizer(template=template)
    chat = dataclasses.replace(
        _comparison(({'role': 'user', 'content': 'a'},),
                    ({'role': 'assistant', 'content': 'b'},),
                    ({'role': 'assistant', 'content': 'ab'},)),
        tools=({'type': 'function', 'function': {'name': 'f', 'arguments': {'b': 1, 'a': 2}}},))
    trained, = encode([chat], tokenizer, DataReport('rows', 'train', read=1), Reading(400))
    (used,), cut = encode_to_score([chat], tokenizer, Reading(400))
    assert (_dialogues(trained), cut) == (_dialogues(used), 0)
    words = tokenizer.convert_ids_to_tokens(trained.prompt.tolist())
    assert '"type":Ġ"function",Ġ"function":' in ''.join(words)


NOON = datetime.datetime(2024, 7, 26, 12, 5)
DATED = "{{ 'On ' + strftime_now('%d %b %Y') + strftime_now( \"%H:%M\" ) }}" + CHAT_TEMPLATE


def test_texts_are_read_as_chats(chat_tokenizer):
    text, chat = _comparison(' a ', ' b', 'c '), _comparison(_user('a'), _assistant('b'),
                                                              _assistant('c'))
    reading = Reading(100, as_chats=True)
    found, plain = ([list(map(list, dialogues)) for dialogues in tokenize(
        [text, chat], chat_tokenizer, how)] for how in (reading, Reading(100)))
    assert found[0] == found[1] == plain[1] != plain[0]
    turns = _comparison('\n\nHuman: a', 'b', name='row 5')  # after which no response can stand
    report = DataReport('rows', 'train', read=2)
    [kept] = encode([turns, text], chat_tokenizer, report, reading)
    assert [*kept.prompt, *kept.responses[0]] == found[0][0]
    assert report.first_malformed.startswith("row 5 field 'prompt': got turns that do not end in")
    [scored], _ = encode_to_score([text], chat_tokenizer, dataclasses.replace(
        reading, size_prompt=True))
    assert [*scored.prompt, *scored.responses[1]] == found[0][1]
    # One that is too long loses the left of its prompt, as a chat does.
    long = [_comparison(text, ' b', 'c ') for text in ('a' * 30,)] + [
        _comparison(_user('a' * 30), _assistant('b'), _assistant('c'))]
    cut = []
    for comparison in long:
        [kept], report = (lambda r: (encode([comparison], chat_tokenizer, r, Reading(
            25, as_chats=True)), r))(DataReport('rows', 'train', read=1))
        assert report.truncated == 1
        cut.append([*kept.prompt, *kept.responses[0]])
    assert cut[0] == cut[1]
    # Sizes are those of the chat's prompt, which begins as its dialogues do.
    [asked], _ = encode_to_score([chat], chat_tokenizer, Reading(100, size_prompt=True))
    assert scored.prompt_sizes == asked.prompt_sizes


def test_a_template_in_place_of_the_tokenizers(tmp_path):
    folder = tmp_path / 'tokenizer'
    _tokenizer(template='{{ messages[0].content }}').save_pretrained(folder)
    file = tmp_path / 'other.jinja'
    file.write_text('b{{ messages[0].content }}')
    chat = _comparison(_user('a'), _assistant('c'))
    read = {given: render(chat, chat.responses[0], load_tokenizer(str(folder), template=given))
            for given in ('', str(file), 'c{{ messages[0].content }}')}
    assert list(read.values()) == ['a', 'ba', 'ca']
    with pytest.raises(DataError, match=r'config\.model\.chat_template: no Jinja \('):
        load_tokenizer(str(folder), template='{% for x in')
    with pytest.raises(DataError, match="chat_template='nowhere': neither Jinja nor a file of it"):
        load_tokenizer(str(folder), template='nowhere')


def test_the_clock_of_a_template_stands_still(tmp_path, capsys):
    stopped = templates.stop_clock(DATED, NOON)
    assert templates.stop_clock(stopped, NOON.replace(year=2030)) == stopped
    chat = [*_user('a'), *_assistant('b')]
    expected = 'On 26 Jul 202412:05<s>[u]a[a]b'
    assert _tokenizer(template=stopped).apply_chat_template(chat, tokenize=False) == expected
    # As found in a folder; what was saved with a run stays as it is.
    for folder, template, notes in (('given', DATED, 1), ('saved', stopped, 0)):
        tokens.save_tokenizer(_tokenizer(template=template), str(tmp_path / folder))
        found = tokens.load_tokenizer(str(tmp_path / folder), NOON)
        assert found.apply_chat_template(chat, tokenize=False) == expected
        assert capsys.readouterr().out.count('which stands at 2024-07-26 12:05') == notes
    # Templates that ask whether there is a clock, and those without one.
    for start in ('\n\n', '  {% if true %}\n{% endif %}x'):
        plain = _tokenizer(template=start + 'On 26 Jul 2024').apply_chat_template(
            chat, tokenize=False)
        moved = templates.stop_clock(start + "On {{ strftime_now(format='%d %b %Y') }}", NOON)
        assert _tokenizer(template=moved).apply_chat_template(chat, tokenize=False) == plain
    quoted = templates.stop_clock('{# strftime_now(x) #}A | random walk '
                               '{{ strftime_now("It\'s %d") }}', NOON)
    assert _tokenizer(template=quoted).apply_chat_template(chat, tokenize=False) == (
        "A | random walk It's 26")
    asking = '{% if strftime_now is defined %}' + DATED + '{% endif %}'
    asking = templates.stop_clock(asking, NOON)
    assert _tokenizer(template=asking).apply_chat_template(chat, tokenize=False) == expected
    assert templates.stop_clock(CHAT_TEMPLATE, NOON) == CHAT_TEMPLATE


@pytest.mark.parametrize(('template', 'reason'), [
    ("{% set f = '%d' %}{{ strftime_now(f) }}", 'with a format that is written out'),
    ('{% set f = strftime_now %}{{ f("%d") }}', 'with a format that is written out'),
    ('{{ (strftime_now)("%d") }}', 'with a format that is written out'),
    ("{{ ['a'] | map('random') | first }}", 'prints random words'),
    ('{{ "unclosed', 'cannot be read'),
    ("{{ ['a', 'b'] | random }}", 'prints random words'),
    ('{{ lipsum(2) }}', 'prints random words'),
])
def test_templates_that_are_no_functions_are_refused(tmp_path, template, reason):
    tokens.save_tokenizer(_tokenizer(template=template), str(tmp_path))
    with pytest.raises(DataError, match=f'^{tmp_path}: the chat template .*{reason}'):
        tokens.load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match='no tokenizer could be loaded') as error:
        tokens.load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_trained_tokenizers_are_saved_loaded_and_repeatable(tmp_path):
    texts = ['low lower lowest', 'new newer newest', 'é 漢'] * 5
    trained = tokens.train_tokenizer(texts, 270)
    assert len(trained) == 270
    assert (trained.eos_token_id, trained.pad_token_id) == (0, 1)
    trained.save_pretrained(tmp_path)
    for other in (tokens.load_tokenizer(str(tmp_path)), tokens.train_tokenizer(texts, 270)):
        assert other.get_vocab() == trained.get_vocab()
        assert other.eos_token_id == 0
        for text in ('lowest newest', ' é漢\n', 'never seen: \N{GRINNING FACE}'):
            assert other(text)['input_ids'] == trained(text)['input_ids']
            assert other.decode(other(text)['input_ids']) == text


def test_texts_of_chats_and_plain_comparisons():
    rows = [_comparison('a', 'b', 'c'),
            _comparison((*_user('d'), *_assistant('e'), *_user('f')), _assistant('g'))]
    assert list(tokens.texts_of(rows)) == ['a', 'b', 'c', 'd\ne\nf', 'g']


# Shared prompts.


@pytest.mark.parametrize(('dialogues', 'prompt', 'responses'), [
    ([[1, 2, 3], [1, 2, 4]], [1, 2], [[3], [4]]),
    ([[1, 2, 3], [1, 5, 3]], [1], [[2, 3], [5, 3]]),
    ([[1, 2], [3, 4]], [], [[1, 2], [3, 4]]),
    # One dialogue is the beginning of the other, or equal to it: a token each is left.
    ([[1, 2], [1, 2, 3]], [1], [[2], [2, 3]]),
    ([[1, 2, 3], [1, 2]], [1], [[2, 3], [2]]),
    ([[1, 2], [1, 2]], [1], [[2], [2]]),
    ([[1], [1, 2, 3]], [], [[1], [1, 2, 3]]),
    ([[7]], [], [[7]]),
    ([[7, 8, 9]], [7, 8], [[9]]),
    ([[1, 2, 3], [1, 2, 4], [1, 5]], [1], [[2, 3], [2, 4], [5]]),
    # Tokens that agree again after a difference are not shared.
    ([[1, 2, 3, 4], [9, 2, 3, 4]], [], [[1, 2, 3, 4], [9, 2, 3, 4]]),
])
def test_split_prompt_by_hand(dialogues, prompt, responses):
    found, rest = split_prompt([np.array(ids, np.int32) for ids in dialogues])
    assert found.tolist() == prompt
    assert [ids.tolist() for ids in rest] == responses


@pytest.mark.parametrize(('prompt', 'texts', 'shared', 'responses'), [
    # 'he' is shared as text, but the first dialogue has it inside of the token 'hell'.
    ('he', ('llo', 'art'), BOS, ['hell o </s>', 'he a r t </s>']),
    ('hel', ('lo', 'p'), BOS, ['hell o </s>', 'he l p </s>']),
    # Responses that begin alike: more than the prompt is shared.
    ('he', (' a', ' b'), '<s> he Ġ', ['a </s>', 'b </s>']),
    ('he', ('lla', 'llb'), '<s> hell', ['a </s>', 'b </s>']),
    ('a', ('', 'b'), '<s> a', ['</s>', 'b </s>']),
    # One response is the beginning of the other.
    ('a', ('b', 'bc'), '<s> a b', ['</s>', 'c </s>']),
    ('a', ('he', 'hell'), '<s> a', ['he </s>', 'hell </s>']),
    # Bytes of one character are divided: both begin with the byte 0xC3.
    ('a', ('é', 'è'), '<s> a Ã', ['© </s>', '¨ </s>']),
    ('', ('a', 'b'), BOS, ['a </s>', 'b </s>']),
])
def test_the_shared_prompt_is_a_prefix_of_tokens(tokenizer, prompt, texts, shared, responses):
    assert _parts(tokenizer, _comparison(prompt, *texts)) == (shared, responses)


def test_responses_without_eos_keep_a_token(tokenizer):
    comparison = _comparison('a', 'b', 'bc')
    assert _parts(tokenizer, comparison, append_eos=False) == ('<s> a', ['b', 'b c'])


def test_three_responses_share_what_all_have(tokenizer):
    comparison = _comparison('a', 'bx', 'by', 'bz', ratings=(1.0, 1.0, None))
    assert _parts(tokenizer, comparison) == ('<s> a b', ['x </s>', 'y </s>', 'z </s>'])
    encoded, report = _encode_one(comparison, tokenizer)
    np.testing.assert_array_equal(encoded.preference, [[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]])
    assert (encoded.size, encoded.longest) == (9, 5)
    assert (report.tied, report.dialogue_tokens, report.packed_tokens) == (1, 15, 9)
    assert report.prompt_tokens == 9


def test_chats_share_their_prompt(chat_tokenizer):
    comparison = _comparison(_user('a'), _assistant('xy'), _assistant('z'))
    assert _parts(chat_tokenizer, comparison) == (
        '<s> [ u ] a [ a ]', ['x y </s>', 'z </s>'])


def test_encoded_carries_what_is_known(tokenizer):
    comparison = dataclasses.replace(
        _comparison('a', 'b', 'c', name='row 3', preference=0.75), margin=1.5, weight=0.25)
    encoded, _ = _encode_one(comparison, tokenizer)
    assert (encoded.id, encoded.group) == ('row 3', 'group')
    assert (encoded.margin, encoded.weight) == (1.5, 0.25)
    np.testing.assert_array_equal(encoded.preference, [[0, 0.75], [0.25, 0]])


# Read as a classifier of `transformers` is.


def test_chats_are_read_as_they_are_rendered():
    chat = _comparison(_user('a'), _assistant('b'))
    ending = _tokenizer(template=CHAT_TEMPLATE + "{{ eos_token + '\\n' }}")
    [[ours]] = tokenize([chat], ending, Reading(100))
    [[theirs]] = tokenize([chat], ending, Reading(100, rendered_chats=True))
    assert _spelt(ending, ours)[-2:] == ['b', EOS]
    assert _spelt(ending, theirs)[-3:] == ['b', EOS, 'Ċ']
    expected = ending.apply_chat_template([*chat.prompt, *chat.responses[0]], tokenize=True)
    assert theirs.tolist() == expected['input_ids']
    # Plain text has no template that could end it.
    [[plain]] = tokenize([_comparison('a', 'b')], ending, Reading(100, rendered_chats=True))
    assert _spelt(ending, plain) == [BOS, 'a', 'b', EOS]


def test_the_token_of_padding_is_skipped_at_the_end(tokenizer):
    reading = Reading(100, skipped=tokenizer.eos_token_id)
    for text in ('b', 'b</s>', 'b</s></s>'):
        [[ids]] = tokenize([_comparison('a</s>', text)], tokenizer, reading)
        assert _spelt(tokenizer, ids) == [BOS, 'a', EOS, 'b']
    other = Reading(100, skipped=tokenizer.pad_token_id)
    [[ids]] = tokenize([_comparison('a', 'b')], tokenizer, other)
    assert _spelt(tokenizer, ids) == [BOS, 'a', 'b', EOS]
    [error] = tokenize([_comparison('', '', name='row 5')], _tokenizer(''), reading)
    assert str(error) == 'row 5: a dialogue has no tokens, expected text'


# What is dropped, cut, counted and noted.

# <s> a b c d x </s> and <s> a b c d y z </s>: a shared prompt of 5, responses of 2 and 3 tokens.
LONG = _comparison('abcd', 'x', 'yz', name='row 3')


@pytest.mark.parametrize(('max_length', 'prompt', 'cut'), [
    (9, '<s> a b c d', False), (8, '<s> a b c d', False), (7, '<s> b c d', True),
    (5, '<s> d', True), (4, '<s>', True),
])
def test_prompts_are_cut_behind_bos_and_responses_stay_whole(tokenizer, max_length, prompt, cut):
    encoded, report = _encode_one(LONG, tokenizer, max_length=max_length)
    assert ' '.join(_spelt(tokenizer, encoded.prompt)) == prompt
    assert [_spelt(tokenizer, r) for r in encoded.responses] == [['x', EOS], ['y', 'z', EOS]]
    assert report.truncated == cut
    assert encoded.longest == min(max_length, 8)


def test_without_bos_prompts_are_cut_from_the_left():
    encoded, _ = _encode_one(LONG, _tokenizer(''), max_length=5)
    assert [_spelt(_tokenizer(''), ids) for ids in _dialogues(encoded)] == [
        ['c', 'd', 'x', EOS], ['c', 'd', 'y', 'z', EOS]]


def test_prompts_that_are_not_shared_are_laid_out_with_each_response(tokenizer):
    # Cut as they would be if they were shared, and with the same sizes.
    for max_length in (9, 6):
        shared, report = _encode_one(LONG, tokenizer, max_length=max_length, size_prompt=True)
        alone, other = _encode_one(LONG, tokenizer, max_length=max_length, size_prompt=True,
                                   share_prompt=False)
        assert len(alone.prompt) == 0
        assert _dialogues(alone) == _dialogues(shared)
        assert alone.prompt_sizes == shared.prompt_sizes
        assert other.truncated == report.truncated == (max_length == 6)
        assert other.packed_tokens == other.dialogue_tokens == report.dialogue_tokens
    [item], _ = encode_to_score([LONG], tokenizer, Reading(6, share_prompt=False))
    assert (len(item.prompt), [len(ids) for ids in item.responses]) == (0, [6, 6])


def test_counts_of_tokens_by_hand(tokenizer):
    # At most 6 tokens: the prompt keeps 3, so 3 * 2 + 2 + 3 = 11 tokens, of which 3 are saved.
    _, report = _encode_one(LONG, tokenizer, max_length=6)
    counts = report.as_dict()
    assert (counts['dialogue_tokens'], counts['packed_tokens'], counts['prompt_tokens']) == (
        11, 8, 6)
    assert counts['tokens_saved'] == 3
    assert counts['prefix_share'] == pytest.approx(6 / 11)


def test_responses_longer_than_the_limit_are_dropped(tokenizer):
    encoded, report = _encode_one(LONG, tokenizer, max_length=2)
    assert encoded is None
    assert report.dropped == {'a response alone is longer than 2 tokens': 1}
    assert (report.truncated, report.dialogue_tokens) == (0, 0)


def test_prompts_that_the_template_refuses_alone_are_malformed_where_they_must_be_cut():
    template = ("{% if messages[-1].role != 'assistant' %}{{ raise_exception('no') }}{% endif %}"
                + CHAT_TEMPLATE)
    tokenizer = _tokenizer(template=template)
    chat = _comparison(_user('a' * 20), _assistant('b'), _assistant('c'), name='row 5')
    _, report = _encode_one(chat, tokenizer, max_length=10)
    assert report.dropped == {'malformed row': 1}
    assert report.first_malformed.startswith('row 5: the chat template refuses it')
    _, report = _encode_one(chat, tokenizer, max_length=10, overlong='drop')
    assert report.dropped == {'a dialogue is longer than 10 tokens': 1}
    encoded, _ = _encode_one(chat, tokenizer, max_length=100)
    assert encoded is not None


def test_clocks_of_named_templates_stand_still(tmp_path):
    named = {'default': DATED, 'tool_use': CHAT_TEMPLATE}
    tokens.save_tokenizer(_tokenizer(template=named), str(tmp_path))
    found = tokens.load_tokenizer(str(tmp_path), NOON)
    assert found.chat_template == {name: templates.stop_clock(template, NOON)
                                   for name, template in named.items()}
    tokens.save_tokenizer(found, str(tmp_path / 'again'))
    assert tokens.load_tokenizer(str(tmp_path / 'again')).chat_template == found.chat_template


def test_what_responses_share_is_no_part_of_the_prompt(tokenizer):
    # The prompt is <s> a b, the responses begin alike: 'b' and more of the prompt can be cut.
    alike = _comparison('ab', 'cccx', 'cccy')
    encoded, report = _encode_one(alike, tokenizer, max_length=6)
    assert [_spelt(tokenizer, ids) for ids in _dialogues(encoded)] == [
        [BOS, *'cccx', EOS], [BOS, *'cccy', EOS]]
    assert report.truncated == 1
    encoded, report = _encode_one(alike, tokenizer, max_length=5)
    assert report.dropped == {'a response alone is longer than 5 tokens': 1}


def test_a_single_response_stays_whole_or_is_dropped(tokenizer):
    rated = _comparison('abc', 'xyz', ratings=(1.0,))
    encoded, report = _encode_one(rated, tokenizer, max_length=5, ratings=True)
    assert [_spelt(tokenizer, ids) for ids in _dialogues(encoded)] == [[BOS, *'xyz', EOS]]
    encoded, report = _encode_one(rated, tokenizer, max_length=4, ratings=True)
    assert encoded is None
    assert report.dropped == {'a response alone is longer than 4 tokens': 1}
    assert report.truncated == 0


def test_overlong_dialogues_can_be_dropped_or_refused(tokenizer):
    encoded, report = _encode_one(LONG, tokenizer, max_length=7, overlong='drop')
    assert encoded is None
    assert report.dropped == {'a dialogue is longer than 7 tokens': 1}
    with pytest.raises(DataError, match='row 3: a dialogue of 8 tokens, expected at most 7'):
        _encode_one(LONG, tokenizer, max_length=7, overlong='error')
    for overlong in ('drop', 'error'):
        encoded, report = _encode_one(LONG, tokenizer, max_length=8, overlong=overlong)
        assert encoded.longest == 8
        assert not report.dropped
    with pytest.raises(ValueError, match='expected one of'):
        _encode_one(LONG, tokenizer, overlong='cut')


@pytest.mark.parametrize(('comparison', 'reason', 'identical'), [
    (_comparison('a', 'b', 'b'), 'identical responses', 1),
    (_comparison('a', 'b', 'b', 'b', ranks=(0, 1, 2)), 'identical responses', 1),
    # Different texts, but the same tokens: EOS is there once in both.
    (_comparison('a', 'b', 'b</s>'), 'identical responses', 1),
    (_comparison('a', 'b'), 'one response', 0),
    (_comparison('a', 'b', 'c', 'd', ratings=(None, 2.0, None)), 'no preference known', 0),
    (_comparison('a', 'b', 'c', ratings=None), 'no preference known', 0),
    (dataclasses.replace(_comparison('a', 'b', 'c'), weight=0.0), 'weight 0', 0),
])
def test_comparisons_that_say_nothing_are_dropped(tokenizer, comparison, reason, identical):
    encoded, report = _encode_one(comparison, tokenizer)
    assert encoded is None
    [(found, count)] = report.dropped.items()
    assert reason in found
    assert count == 1
    assert report.identical == identical


def test_responses_that_a_tokenizer_makes_equal_are_identical():
    lower = _tokenizer(normalizer=tokenizers.normalizers.Lowercase())
    _, report = _encode_one(_comparison('a', 'B', 'b'), lower)
    assert (report.kept, report.identical) == (0, 1)
    trim = _tokenizer(template=CHAT_TEMPLATE.replace("['content']", "['content'] | trim"))
    chat = _comparison(_user('a'), _assistant('b'), _assistant(' b\n'))
    _, report = _encode_one(chat, trim)
    assert (report.kept, report.identical) == (0, 1)


def test_ties_are_kept_and_counted(tokenizer):
    for known in ({'ranks': (0, 0)}, {'preference': 0.5}, {'ratings': (3, 3)}):
        encoded, report = _encode_one(_comparison('a', 'b', 'c', **known), tokenizer)
        assert report.tied == 1
        np.testing.assert_array_equal(encoded.preference, [[0, 0.5], [0.5, 0]])


@pytest.mark.parametrize(('comparison', 'noted'), [
    (_comparison('a', 'b', 'c'), 0),
    (_comparison('a</s>', 'b', 'c'), 1),
    (_comparison('a', 'b', 'c <pad>'), 1),
    (_comparison('<s></s>', '<s>', '</s>c'), 1),
    (_comparison(_user('a'), _assistant('b'), _assistant('c')), 0),
    (_comparison(_user('a <s>'), _assistant('b'), _assistant('c')), 1),
    (_comparison(_user('a'), _assistant('b'), _assistant('c </s> d')), 1),
])
def test_special_tokens_spelt_out_are_noted(chat_tokenizer, comparison, noted):
    encoded, report = _encode_one(comparison, chat_tokenizer)
    assert encoded is not None
    assert report.notes == ({'special tokens spelt out in the text': 1} if noted else {})


def test_every_row_of_a_file_is_kept_or_counted(tokenizer, tmp_path):
    rows = [
        {'prompt': 'q0', 'chosen': 'a', 'rejected': 'b'},
        {'prompt': 'q1', 'chosen': 'a', 'rejected': 'a'},
        {'prompt': 'q2', 'response': 'a'},
        {'prompt': 'q3', 'responses': ['a', 'b', 'c'], 'ratings': [1, 1, 0]},
        {'prompt': 'q4', 'responses': ['a', 'b'], 'ratings': [None, 1]},
        {'prompt': 'q5', 'chosen': 'a', 'rejected': None},
        {'prompt': 'q6', 'chosen': 'a' * 50, 'rejected': 'b'},
        {'prompt': 'q' * 50, 'chosen': 'a', 'rejected': 'b'},
        {'prompt': 'q8', 'chosen': 'a', 'rejected': 'b', 'weight': 0},
        'not JSON',
    ]
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path = tmp_path / 'rows.jsonl'
    path.write_text('\n'.join(lines) + '\n')
    settings = ConfigDict({'path': str(path), 'validation_fraction': 0.2, 'test_fraction': 0.2,
                           'max_malformed': 0.2, 'cache': '', 'attributes': (), 'format': 'auto',
                           'columns': (), 'votes': 'share', 'strengths': 'ignored'})
    total = DataReport('all', 'all')
    for comparisons, report in load_splits(settings, 'any').values():
        encode(comparisons, tokenizer, report, Reading(20))
        assert report.read == report.kept + sum(report.dropped.values())
        for field in ('read', 'kept', 'truncated', 'identical', 'tied', 'dropped'):
            setattr(total, field, getattr(total, field) + getattr(report, field))
    assert (total.read, total.kept, total.truncated, total.identical, total.tied) == (
        10, 3, 1, 1, 1)
    assert total.dropped == {
        'malformed row': 2, 'identical responses': 1, 'one response': 1,
        'a response alone is longer than 20 tokens': 1, 'no preference known, or weight 0': 2,
    }


# What is read, and what then is left of comparisons.


@pytest.mark.parametrize(('comparison', 'kept', 'dropped'), [
    # Which of the readings keep it: preferences, ratings, both; and why the others do not.
    (_comparison('a', 'b', 'c'), (True, False, True), 'no rating known, or weight 0'),
    (_comparison('a', 'b', 'c', ratings=(1.0, None)), (False, True, True),
     'no preference known, or weight 0'),
    (_comparison('a', 'b', 'c', ratings=(1.0, 2.0)), (True, True, True), ''),
    (_comparison('a', 'b', ratings=(1.0,)), (False, True, True), 'one response'),
    (_comparison('a', 'b', 'b', ratings=(1.0, 2.0)), (False, True, True), 'identical responses'),
    (_comparison('a', 'b', ratings=None), (False, False, False), 'one response'),
    (_comparison('a', 'b', 'c', 'd', ratings=(None,) * 3), (False, False, False),
     ('no preference known, or weight 0', 'no rating known, or weight 0',
      'no preference or rating known, or weight 0')),
    (dataclasses.replace(_comparison('a', 'b', ratings=(1.0,)), weight=0.0),
     (False, False, False),
     ('one response', 'no rating known, or weight 0',
      'no preference or rating known, or weight 0')),
])
def test_what_is_read_decides_what_is_kept(tokenizer, comparison, kept, dropped):
    readings = ({'preferences': True}, {'preferences': False, 'ratings': True},
                {'preferences': True, 'ratings': True})
    reasons = (dropped,) * 3 if isinstance(dropped, str) else dropped
    for options, expected, reason in zip(readings, kept, reasons, strict=True):
        encoded, report = _encode_one(comparison, tokenizer, **options)
        assert (encoded is not None) == expected
        assert report.kept == expected
        assert report.dropped == ({} if expected else {reason: 1})


def test_ratings_and_annotators_are_encoded(tokenizer):
    rated = dataclasses.replace(
        _comparison('a', 'b', 'c', ratings=(1.0, None)), annotator='Ann',
        attributes={'kind': (None, 2.0), 'true': (3.0, 4.0)})
    known = {'ratings': True, 'annotators': ('Ada', 'Ann')}
    encoded, _ = _encode_one(rated, tokenizer, **known)
    np.testing.assert_array_equal(encoded.ratings, np.float32([[1], [np.nan]]))
    assert (encoded.annotator, encoded.prompt_sizes) == (1, ())
    encoded, _ = _encode_one(rated, tokenizer, attributes=('true', 'short', 'kind'), **known)
    np.testing.assert_array_equal(
        encoded.ratings, np.float32([[3, np.nan, np.nan], [4, np.nan, 2]]))
    encoded, _ = _encode_one(rated, tokenizer, attributes=('true',), **known)
    np.testing.assert_array_equal(encoded.ratings, [[3.0], [4.0]])
    # Annotators that have no index are unknown.
    assert _encode_one(rated, tokenizer, ratings=True)[0].annotator == -1
    other = dataclasses.replace(rated, annotator='Bo')
    assert _encode_one(other, tokenizer, **known)[0].annotator == -1


def test_comparisons_without_an_annotator_can_be_left_out(tokenizer):
    nameless = _comparison('a', 'b', 'c')
    encoded, report = _encode_one(nameless, tokenizer, named=True, annotators=('Ann',))
    assert encoded is None
    assert report.dropped == {'annotator not named': 1}
    encoded, _ = _encode_one(nameless, tokenizer, annotators=('Ann',))
    assert encoded.annotator == -1
    named = dataclasses.replace(nameless, annotator='Ann')
    assert _encode_one(named, tokenizer, named=True, annotators=('Ann',))[0].annotator == 0


# Where a prompt ends.

SIZED = {'ratings': True, 'preferences': True, 'size_prompt': True}


def _ends(comparison, tokenizer, **options):
    """For each dialogue its tokens up to the end of the prompt, spelt."""
    encoded, _ = _encode_one(comparison, tokenizer, **SIZED | options)
    return [''.join(_spelt(tokenizer, ids[:size]))
            for ids, size in zip(_dialogues(encoded), encoded.prompt_sizes, strict=True)]


@pytest.mark.parametrize(('prompt', 'texts', 'expected'), [
    ('ab', ('c', 'd'), ['<s>ab', '<s>ab']),
    # The shared tokens reach into the responses, the prompt does not.
    ('ab', ('cx', 'cy'), ['<s>ab', '<s>ab']),
    # A merge over the boundary changes a token: its own dialogue ends before it, no other does.
    ('he', ('llo', 'y'), ['<s>', '<s>he']),
    ('a</s>', ('b', 'c'), ['<s>a</s>', '<s>a</s>']),
    # Without a prompt it is what the tokenizer puts before it.
    ('', ('b', 'c'), ['<s>', '<s>']),
])
def test_prompt_sizes_by_hand(tokenizer, prompt, texts, expected):
    assert _ends(_comparison(prompt, *texts), tokenizer) == expected


def test_prompt_sizes_do_not_depend_on_other_responses(tokenizer):
    texts = ('llo', 'y', ' there', 'y', 'lp')
    alone = [tokens.prompt_sizes(_comparison('he', text), ids, tokenizer)
             for text in texts
             for ids in tokenize([_comparison('he', text)], tokenizer, Reading(100))]
    for order in ([0, 1, 2, 3, 4], [2, 0], [1, 3, 4]):
        row = _comparison('he', *(texts[i] for i in order), ratings=(1.0,) * len(order))
        dialogues, = tokenize([row], tokenizer, Reading(100))
        assert tokens.prompt_sizes(row, dialogues, tokenizer) == tuple(
            alone[i][0] for i in order)


@pytest.mark.parametrize(('single', 'expected'), [
    ('<s> $A', '<s>ab'), ('<s> $A </s>', '<s>ab'), ('', 'ab')])
def test_prompts_end_before_what_the_tokenizer_appends(single, expected):
    assert _ends(_comparison('ab', 'c', 'd'), _tokenizer(single)) == [expected] * 2


def test_prompts_of_chats_end_with_their_last_message(chat_tokenizer):
    chat = _comparison(_user('ab'), _assistant('c'), _assistant('d'))
    assert _ends(chat, chat_tokenizer) == ['<s>[u]ab'] * 2
    # No messages but responses.
    assert _ends(_comparison((), _user('x'), _user('y')), chat_tokenizer) == [''] * 2
    ending = _tokenizer(template=CHAT_TEMPLATE + '{{ eos_token }}\n')
    assert _ends(chat, ending) == ['<s>[u]ab'] * 2


@pytest.mark.parametrize(('max_length', 'expected'), [
    (8, ['<s>abcd'] * 2), (7, ['<s>bcd'] * 2), (5, ['<s>d'] * 2),
    # Nothing of the prompt is left but BOS.
    (4, ['<s>'] * 2),
])
def test_prompt_sizes_move_with_what_is_cut(tokenizer, max_length, expected):
    assert _ends(LONG, tokenizer, max_length=max_length) == expected


def test_prompt_sizes_of_dialogues_to_score_are_cut_each_by_itself(tokenizer):
    row = _comparison('abc', 'd', 'efghi')
    reading, options = Reading(7, size_prompt=True), {'attributes': ('kind', 'true')}
    [encoded], _ = encode_to_score([row], tokenizer, reading, **options)
    spelt = [''.join(_spelt(tokenizer, ids[:size]))
             for ids, size in zip(_dialogues(encoded), encoded.prompt_sizes, strict=True)]
    assert spelt == ['<s>abc', '<s>']
    for k, response in enumerate(row.responses):
        [alone], _ = encode_to_score([_comparison('abc', response)], tokenizer, reading, **options)
        assert alone.prompt_sizes == encoded.prompt_sizes[k:k + 1]
    assert np.isnan(encoded.ratings).all()
    assert encoded.ratings.shape == (2, 2)
    [plain], _ = encode_to_score([row], tokenizer, Reading(7))
    assert plain.prompt_sizes == ()


# Scoring.


def _dialogues(encoded):
    return [np.concatenate([encoded.prompt, response]).tolist() for response in encoded.responses]


def test_nothing_is_dropped_for_scoring(tokenizer):
    rows = [_comparison('a', 'b', 'b'), _comparison('a', 'b'), _comparison('a', 'x' * 30),
            _comparison('', '', 'b', 'c', ratings=(None, None, None))]
    encoded, cut = encode_to_score(rows, tokenizer, Reading(10))
    assert [len(item.responses) for item in encoded] == [2, 1, 1, 3]
    assert all(len(response) >= 1 for item in encoded for response in item.responses)
    assert [item.preference.shape for item in encoded] == [(2, 2), (1, 1), (1, 1), (3, 3)]
    assert cut == 1
    assert encode_to_score([], tokenizer, Reading(10)) == ([], 0)


def test_each_dialogue_is_cut_by_itself_to_bos_and_its_last_tokens(tokenizer):
    comparison = _comparison('abc', 'd', 'efghi')
    [encoded], cut = encode_to_score([comparison], tokenizer, Reading(6))
    spelt = [''.join(_spelt(tokenizer, ids)) for ids in _dialogues(encoded)]
    assert spelt == ['<s>abcd</s>', '<s>fghi</s>']
    assert cut == 1
    [encoded], cut = encode_to_score([comparison], tokenizer, Reading(4, append_eos=False))
    spelt = [''.join(_spelt(tokenizer, ids)) for ids in _dialogues(encoded)]
    assert spelt == ['<s>bcd', '<s>ghi']
    assert cut == 2


@pytest.mark.parametrize('max_length', [1, 2, 5, 8, 100])
def test_tokens_to_score_do_not_depend_on_neighbours(tokenizer, max_length):
    prompt, responses = 'hello ab', ('llo', 'ab', '', ' a long response', 'abc</s>', 'ab')
    alone = []
    for response in responses:
        [one], _ = encode_to_score([_comparison(prompt, response)], tokenizer,
                                   Reading(max_length))
        alone += _dialogues(one)
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [3, 0], [2, 1], [1, 5]):
        row = _comparison(prompt, *(responses[i] for i in order), ratings=(None,) * len(order))
        neighbours = [_comparison('x', 'y' * 50), row, _comparison('', 'z', 'z')]
        encoded, _ = encode_to_score(neighbours, tokenizer, Reading(max_length))
        assert _dialogues(encoded[1]) == [alone[i] for i in order]
    assert all(1 <= len(ids) <= max_length for ids in alone)


# Fingerprints.


def _item(**changes):
    item = Encoded(
        'a', 'g', np.array([1, 2, 3], np.int32),
        (np.array([4, 5], np.int32), np.array([6], np.int32)),
        np.array([[0, 1], [0, 0]], np.float32), np.array([[3], [np.nan]], np.float32),
        margin=0.5, weight=2.0, annotator=4, prompt_sizes=(2, 1),
    )
    return dataclasses.replace(item, **changes)


@pytest.mark.parametrize('changes', [
    {'prompt': np.array([1, 2, 9], np.int32)},
    {'prompt': np.array([1, 2], np.int32)},
    {'responses': (np.array([4, 9], np.int32), np.array([6], np.int32))},
    {'responses': (np.array([6], np.int32), np.array([4, 5], np.int32))},
    # The same tokens in a row, divided elsewhere.
    {'responses': (np.array([4], np.int32), np.array([5, 6], np.int32))},
    {'prompt': np.array([1, 2, 3, 4], np.int32),
     'responses': (np.array([5], np.int32), np.array([6], np.int32))},
    {'preference': np.array([[0, 0], [1, 0]], np.float32)},
    {'preference': np.array([[0, 0.5], [0.5, 0]], np.float32)},
    {'margin': 0.25},
    {'weight': 1.0},
    {'margin': 2.0, 'weight': 0.5},
    {'ratings': np.array([[3], [4]], np.float32)},
    {'ratings': np.array([[3, np.nan]], np.float32)},
    {'annotator': -1},
    # The gate reads another token.
    {'prompt_sizes': (2, 2)},
])
def test_fingerprints_tell_data_apart(changes):
    other = _item(prompt=np.array([8], np.int32))
    assert fingerprint([_item(**changes), other]) != fingerprint([_item(), other])


def test_fingerprints_depend_on_order_and_number_but_not_on_names():
    first, second = _item(), _item(margin=1.0)
    assert fingerprint([first, second]) != fingerprint([second, first])
    assert fingerprint([first, first]) != fingerprint([first])
    assert fingerprint([]) != fingerprint([first])
    assert fingerprint([_item(id='x', group='y')]) == fingerprint([_item()])
    assert len(fingerprint([first])) == 64


# The real tokenizer on real comparisons.


@pytest.mark.skipif(not (SHARED / 'hh').is_dir() or not (SHARED / 'gpt2-tokenizer').is_dir(),
                    reason='no HH comparisons and GPT-2 tokenizer in ../shared')
def test_real_comparisons_with_the_gpt2_tokenizer():
    gpt2 = tokens.load_tokenizer(str(SHARED / 'gpt2-tokenizer'))
    assert (len(gpt2), gpt2.eos_token_id) == (50257, 50256)
    folder = SHARED / 'gpt2-tokenizer'
    reference = tokenizers.ByteLevelBPETokenizer(str(folder / 'vocab.json'),
                                                 str(folder / 'merges.txt'))
    rows, expected = [], []
    for split in ('train', 'test'):
        path = str(SHARED / 'hh' / 'harmless-base' / f'{split}.jsonl.gz')
        for where, row in read_rows(path):
            rows.append(parse_row(row, where))
            # The whole texts by the `tokenizers` library, and their common beginning.
            pair = [[*reference.encode(row[side]).ids, 50256] for side in ('chosen', 'rejected')]
            same = itertools.takewhile(lambda ids: ids[0] == ids[1], zip(*pair, strict=False))
            expected.append((pair, len(list(same))))
    report = DataReport('harmless', 'all', read=len(rows))
    encoded = encode(rows, gpt2, report, Reading(1024))
    assert report.read == report.kept == len(encoded) == 1926
    for item, (pair, shared) in zip(encoded, expected, strict=True):
        assert _dialogues(item) == pair
        assert len(item.prompt) == shared
    total = sum(len(ids) for pair, _ in expected for ids in pair)
    saved = sum(shared for _, shared in expected)
    assert (report.dialogue_tokens, report.as_dict()['tokens_saved']) == (total, saved)
    # Storing each shared prompt once leaves about two tokens of three.
    assert 1.5 < report.dialogue_tokens / report.packed_tokens < 1.6


@pytest.mark.parametrize('split', [False, True])
@pytest.mark.parametrize('single', ['', '<s> $A', '<s> $A </s>'])
def test_tokens_are_those_of_the_tokenizer_whatever_it_was_used_for(single, split):
    own, other = (_tokenizer(single) for _ in range(2))
    texts = ['hello hell', '', 'spelt <s> out</s>', '\n\n h\u00e9 \u043a\u043e\u0442 \U0001f600',
             'll' * 30]
    own(texts, truncation=True, max_length=3, padding=True)
    for one in (own, other):
        one.split_special_tokens = split
    for special in (False, True):
        found = list(tokens._ids(texts, own, add_special_tokens=special))
        expected = other(texts, add_special_tokens=special)['input_ids']
        assert [ids.tolist() for ids in found] == expected
        assert {ids.dtype for ids in found} == {np.dtype(np.int32)}


def test_a_class_that_does_something_to_texts_does_so():
    own = _tokenizer()
    whole = type(own)._encode_plus
    own.__class__ = type('Own', (type(own),), {
        '_encode_plus': lambda self, text, **kwargs: whole(
            self, [one.upper() for one in text], **kwargs)})
    found, = tokens._ids(['he'], own, add_special_tokens=False)
    assert own.convert_ids_to_tokens(found) == ['H', 'E']


# Two responses that are read together.

PAIRWISE = Reading(60, pair_template=' A: {first} B: {second}')


def test_orders_are_dialogues_of_one_prompt(tokenizer):
    comparison = Comparison('a', 'hell:', ('he', 'll hell', 'x'), '', ranks=(0, 1, 1),
                            ratings=(1.0, None, 2.0))
    report = DataReport('', 'train')
    item, = encode([comparison], tokenizer, report, PAIRWISE)
    texts = ['he B: ll hell', 'll hell B: he', 'he B: x', 'x B: he', 'll hell B: x',
             'x B: ll hell']
    alone = tokenize([Comparison('b', 'hell: A: ', tuple(texts), '')], tokenizer, Reading(60))[0]
    whole = [np.concatenate([item.prompt, response]) for response in item.responses]
    assert [ids.tolist() for ids in whole] == [ids.tolist() for ids in alone]
    assert ''.join(tokenizer.convert_ids_to_tokens(item.prompt)) == '<s>hell:ĠA:Ġ'
    np.testing.assert_array_equal(item.preference, orders.preference(
        comparison.preference_matrix()))
    assert np.isnan(item.ratings).all()
    assert item.ratings.shape == (6, 1)
    np.testing.assert_array_equal(item.candidates.preference, comparison.preference_matrix())
    np.testing.assert_array_equal(item.candidates.ratings[:, 0], [1.0, math.nan, 2.0])
    assert item.candidates.lengths == (1, 3, 1)
    assert (report.kept, report.tied) == (1, 1)


def test_exchanged_responses_are_the_same_orders_exchanged(tokenizer):
    a, b = (encode([Comparison('a', 'hell:', texts, '', preference=p)], tokenizer,
                   DataReport('', 'train'), PAIRWISE)[0]
            for texts, p in ((('he', 'x'), 0.75), (('x', 'he'), 0.25)))
    assert a.prompt.tolist() == b.prompt.tolist()
    assert [r.tolist() for r in a.responses] == [r.tolist() for r in reversed(b.responses)]
    np.testing.assert_array_equal(a.preference, b.preference[::-1, ::-1])


def test_pairs_of_chats_are_rendered(chat_tokenizer):
    chat = [{'role': 'user', 'content': 'p'}]
    row = {'prompt': chat, 'responses': [[{'role': 'assistant', 'content': text}]
                                         for text in ('x', 'y')], 'preferred': 0}
    item, = encode([parse_row(row, 'a')], chat_tokenizer, DataReport('', 'train'), PAIRWISE)
    whole = chat_tokenizer.convert_ids_to_tokens([*item.prompt, *item.responses[0]])
    assert ''.join(whole) == '<s>[u]p[a]A:ĠxĠB:Ġy</s>'
    texts = Comparison('a', '\n\nHuman: p\n\nAssistant:', (' x', ' y'), '', preferred=0)
    as_chats, = encode([texts], chat_tokenizer, DataReport('', 'train'),
                       dataclasses.replace(PAIRWISE, as_chats=True))
    assert as_chats.prompt.tolist() == item.prompt.tolist()
    assert [r.tolist() for r in as_chats.responses] == [r.tolist() for r in item.responses]


def test_pairs_that_cannot_be_read_are_counted(tokenizer):
    report = DataReport('', 'train')
    rows = [Comparison('one', 'p', ('x',), '', ratings=(1.0,)),
            Comparison('same', 'p', ('x', ' x '), '', preferred=0),
            Comparison('long', 'p', ('x' * 40, 'y' * 40), '', preferred=0),
            Comparison('cut', 'p' * 45, ('x' * 9, 'y'), '', preferred=0)]
    kept = encode(rows, tokenizer, report, PAIRWISE)
    assert [item.id for item in kept] == ['cut']
    assert kept[0].longest == 60
    assert dict(report.dropped) == {'one response': 1, 'identical responses': 1,
                                    'a pair alone is longer than 60 tokens': 1}
    assert report.truncated == 1


def test_all_pairs_are_scored_but_no_response_alone(tokenizer):
    item, = encode_to_score([Comparison('a', 'p', ('x', 'y', 'z'), '', preferred=1)], tokenizer,
                            PAIRWISE)[0]
    assert len(item.responses) == 6
    assert item.candidates.lengths == (1, 1, 1)
    with pytest.raises(DataError, match='b: one response to a prompt, expected two or more'):
        encode_to_score([Comparison('b', 'p', ('x',), '')], tokenizer, PAIRWISE)


# Responses as a language model writes them.

ANSWERS = Reading(40, answers=True)


def spelt(tokenizer, ids):
    return ''.join(tokenizer.convert_ids_to_tokens(ids))


def test_what_responses_have_in_common_is_no_part_of_the_prompt(tokenizer):
    comparison = Comparison('a', 'ab', (' so', ' sure'), 'a', ranks=(0, 1))
    item, = encode([comparison], tokenizer, DataReport('', ''), ANSWERS)
    shared, = encode([comparison], tokenizer, DataReport('', ''), Reading(40))
    assert len(shared.prompt) == len(item.prompt) + 2  # ' s'
    assert item.prompt_sizes == (len(item.prompt),) * 2
    for own, other in zip(item.responses, shared.responses, strict=True):
        np.testing.assert_array_equal(np.r_[item.prompt, own], np.r_[shared.prompt, other])
    (scored,), _ = encode_to_score([comparison], tokenizer, ANSWERS)
    np.testing.assert_array_equal(scored.prompt, item.prompt)


def test_a_prompt_that_ends_otherwise_alone_ends_where_tokens_are_the_same(tokenizer):
    """'he' is one token alone, and part of 'hell' before 'll'."""
    comparison = Comparison('a', 'a he', ('ll', ' x'), 'a', ranks=(0, 1))
    item, = encode([comparison], tokenizer, DataReport('', ''), ANSWERS)
    assert item.prompt_sizes == (len(item.prompt), len(item.prompt) + 1)
    assert spelt(tokenizer, item.responses[0]) == 'hell</s>'


def test_what_a_template_puts_before_an_answer_belongs_to_the_prompt():
    template = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
                "{% if add_generation_prompt %}[assistant]{% endif %}")
    tokenizer = _tokenizer(template=template)
    chat = Comparison('a', ({'role': 'user', 'content': 'b'},), tuple(
        ({'role': 'assistant', 'content': text},) for text in ('x', 'y')), 'a', ranks=(0, 1))
    item, = encode([chat], tokenizer, DataReport('', ''), ANSWERS)
    assert spelt(tokenizer, item.prompt) == '[user]b[assistant]'
    assert [spelt(tokenizer, ids) for ids in item.responses] == ['x</s>', 'y</s>']


def test_demonstrations_are_single_responses_cut_as_pairs_are(tokenizer):
    report = DataReport('', '')
    comparisons = [Comparison('a', 'a' * 60, ('b', 'c'), 'a', ranks=(1, 0)),
                   Comparison('b', 'a', ('b' * 60, 'c'), 'b', ranks=(0, 1)),
                   Comparison('c', 'a', ('b', 'c'), 'c', ranks=(0, 0))]
    item, = encode(comparisons, tokenizer, report, ANSWERS, demonstrations=True)
    assert (len(item.prompt), spelt(tokenizer, item.responses[0])) == (38, 'c</s>')
    assert report.truncated == 1
    assert report.dropped == {'a response alone is longer than 40 tokens': 1,
                              'no response preferred to all others, or weight 0': 1}


def test_data_that_was_copied_has_the_same_tokens_and_names_its_own_files(tmp_path, tokenizer):
    """Also of rows that are told apart by line, refused, or too long, as errors say."""
    rows = [{'prompt': f'Q{i}', 'chosen': ' yes', 'rejected': ' no'} for i in range(4)]
    rows += [{'prompt': 'Q', 'chosen': ' yes', 'rejected': text, 'id': 'a'} for text in 'xy']
    chat = [{'role': 'user', 'content': 'Q'}]
    rows.insert(0, {'prompt': chat, 'chosen': [{'role': 'assistant', 'content': 'yes'}],
                    'rejected': [{'role': 'assistant', 'content': 'no'}]})
    templated = _tokenizer(template="{{ raise_exception('no chats') }}")
    found = []
    for name in ('one.jsonl', 'two.jsonl'):
        path = tmp_path / name
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        settings = ConfigDict({
            'path': str(path), 'validation_fraction': 0.0, 'test_fraction': 0.0,
            'max_malformed': 0.0, 'cache': str(tmp_path / 'cache'), 'attributes': (),
            'format': 'auto', 'columns': (), 'votes': 'share', 'strengths': 'ignored'})
        comparisons, report = load_splits(settings, 'any')['train']
        encoded = encode(comparisons, templated, report, Reading(64))
        ids = [f'{path}:{line}' for line in range(2, 6)] + ['a', f'{path}:7 id=a']
        assert [item.id for item in encoded] == [encoded[i].id for i in range(6)] == ids
        assert [item.id for item in encoded[4:]] == ids[4:]
        assert report.first_malformed.startswith(f'{path}:1: the chat template refuses it')
        with pytest.raises(DataError, match=rf'^{path}:2: a dialogue of \d+ tokens, expected at'):
            encode(comparisons[1:], templated, report, Reading(2), overlong='error')
        found.append((encoded.key, fingerprint(encoded)))
    assert found[0] == found[1]
    assert len(list((tmp_path / 'cache' / 'tokens').glob('*/entry.json'))) == 1
