"""Tests of tokens word by word: those that the tokenizer itself finds."""

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers, processors

from qrm.data import words
from qrm.data.words import Words
from tests.helpers import write_tokenizer

CORPUS = ["It's 1234 o'clock, we'll wait for  you;\n\n don't they've gone?\tÇa va — naïve 99%",
          '\n\nHuman: how are you today? I am well\n\nAssistant: he said hello, hello hello'] * 3
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
BOS_EOS = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0),
                                                                              ('</s>', 1)])


def _tokenizer(splits=BYTES, after=None, normalizer=None, **model):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
    bpe.pre_tokenizer, bpe.normalizer = splits, normalizer
    bpe.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=['<s>', '</s>'], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    if after is not None:
        bpe.post_processor = after
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<s>',
                                                eos_token='</s>')


def _texts():
    """Every settled letter beside letters, digits, blanks and marks, and random ones that begin
    like the one before."""
    settled = [chr(i) for i in range(0x2123) if not words._UNSETTLED.match(chr(i))]
    for letter in settled:
        yield ''.join(form.replace('_', letter) for form in (
            'a_a', ' 1_1 ', '._. ', "'_ ", '__', '\n _', '  _', '_\n\n', '_ '))
    rng = np.random.default_rng(0)
    pool = [*settled, *list(" \n\t'\r  aA1.5") * 60, *["'s", "'re", "'ll", 'hello', ' you'] * 30]
    text = ''
    for _ in range(800):
        begun = text[:rng.integers(len(text) + 1)] if rng.random() < 0.7 else ''
        text = begun + ''.join(pool[i] for i in rng.integers(len(pool), size=rng.integers(1, 60)))
        yield text


@pytest.mark.parametrize(('splits', 'after'), [
    (BYTES, None), (BYTES, processors.ByteLevel()), (DIGITS, BOS_EOS)])
def test_tokens_are_those_of_the_tokenizer(splits, after):
    tokenizer = _tokenizer(splits, after)
    known, texts = Words.of(tokenizer), list(_texts())
    for special in (False, True):
        expected = tokenizer(texts, add_special_tokens=special)['input_ids']
        for text, ids in zip(texts, expected, strict=True):
            found = known.ids(text, special=special)
            assert found.dtype == np.int32
            assert found.tolist() == ids, ascii(text)


def test_more_words_than_are_remembered(monkeypatch):
    monkeypatch.setattr(words, '_MOST_WORDS', 3)
    monkeypatch.setattr(words, '_LONGEST_WORD', 4)
    tokenizer = _tokenizer()
    known = Words.of(tokenizer)
    for text in CORPUS * 2:
        assert known.ids(text, special=False).tolist() == tokenizer(text)['input_ids']
    assert len(known._known) <= 3


@pytest.mark.parametrize('text', ['spelt </s> out', 'smile 😀', 'кот', 'zero\u200bwidth', '\uff11'])
def test_what_may_be_otherwise_is_left_to_the_tokenizer(text):
    assert Words.of(_tokenizer()).ids(text, special=True) is None


@pytest.mark.parametrize('tokenizer', [
    {'normalizer': normalizers.NFC()}, {'splits': pre_tokenizers.Whitespace()},
    {'splits': pre_tokenizers.ByteLevel(add_prefix_space=True)},
    {'splits': pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
    {'splits': pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTES])},
    {'dropout': 0.1}, {'after': processors.RobertaProcessing(('</s>', 1), ('<s>', 0))},
])
def test_tokenizers_that_do_anything_else_are_not_taken(tokenizer):
    assert Words.of(_tokenizer(**tokenizer)) is None


def test_tokens_that_are_added_are_known():
    tokenizer = _tokenizer()
    assert Words.of(tokenizer).ids('a <tool> b', special=False) is not None
    tokenizer.add_tokens(['<tool>'])
    assert Words.of(tokenizer).ids('a <tool> b', special=False) is None


def test_tokenizers_of_words_or_with_code_of_their_own_are_not_taken(tmp_path):
    write_tokenizer(tmp_path)
    assert Words.of(transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)) is None
    own = _tokenizer()
    own.__class__ = type('Own', (type(own),), {'_encode_plus': lambda self, *args, **kwargs: None})
    assert Words.of(own) is None
