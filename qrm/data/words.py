"""Tokens word by word, for the tokenizers that split texts by a pattern that is known.

A byte-level BPE looks for words, by a pattern, and merges the bytes of each word for itself. So the
tokens of a word are looked up if it was met before. `tokenizers` is asked for each new word, and
for texts that anything else may happen to: with tokens that are spelt out, or with letters that
may be of another kind in another version of Unicode. It spends most of its time on keeping track
of where in the text each token is, which nothing here reads.
"""

import bisect
import functools
import itertools
import json
import re
import unicodedata
import weakref
from typing import Any

import numpy as np
import tokenizers
import transformers

from qrm.data.templates import Tokenizer

_BYTES = {'type': 'ByteLevel', 'add_prefix_space': False}
# Letters, digits, blanks and marks whose kinds are settled: Latin, and punctuation.
_SETTLED = '\x00-\u0233\u2010-\u2027\u2030-\u205e\u20a0-\u20b5\u2122\ufffd'
_LAST = 0x2122  # of those that are letters or digits
_UNSETTLED = re.compile(f'[^{_SETTLED}]')
_WORTH = 64  # letters that two texts begin with, from which on their words are taken over
_MOST_WORDS = 2**18  # remembered
_LONGEST_WORD = 64  # letters of one that is remembered


def _of_kind(kind: str) -> str:
    """The settled letters of a general category, for a set of a pattern."""
    return ''.join(re.escape(letter) for letter in map(chr, range(_LAST + 1))
                   if unicodedata.category(letter)[0] == kind and not _UNSETTLED.match(letter))


@functools.cache
def _patterns() -> tuple[str, str]:
    """What finds the words of GPT-2, and those after each digit has been split off.

    As Python's `re` has no categories, they are spelt out.
    """
    letter, digit = _of_kind('L'), _of_kind('N')
    blank = '\t-\r \x85\xa0'  # of those that are settled
    start = rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+|"
    mark = rf' ?[^{blank}{letter}{digit}]+|'
    return (rf'{start} ?[{digit}]+|{mark}[{blank}]+(?![^{blank}])|[{blank}]+',
            # Where every digit is split off before, the rest ends there.
            rf'{start}[{digit}]|{mark}[{blank}]+(?![^{blank}{digit}])|[{blank}]+')


class Words:
    """A tokenizer whose words are known.

    Args:
      tokenizer: whose tokens these are.
      pattern: which finds its words, one after the other, without looking back, and ahead no
        further than to the end of the next one.
      before, behind: special tokens around each text.
    """

    def __init__(self, tokenizer: Tokenizer, pattern: str, before: list[int], behind: list[int]):
        backend = tokenizer.backend_tokenizer
        self._model = backend.model
        self._words = re.compile(pattern)
        added = sorted((token.content for token in backend.get_added_tokens_decoder().values()),
                       key=len, reverse=True)
        self._spelt_out = re.compile('|'.join(map(re.escape, added)) or r'(?!)')
        self._before, self._behind = (np.array(ids, np.int32).tobytes() for ids in (before, behind))
        self._known = _Known(backend.model)
        self._last: tuple[str, list[str], list[bytes]] = '', [], []

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> 'Words | None':
        """The words of a tokenizer; None if it does anything else."""
        size, found = _of.get(tokenizer, (0, None))
        if size != len(tokenizer):  # tokens were added
            found = _recognised(tokenizer)
            _of[tokenizer] = len(tokenizer), found
        return found

    def ids(self, text: str, *, special: bool) -> np.ndarray | None:
        """[length] int32, tokens of a text; None if it has to be left to the tokenizer.

        Args:
          text: the text. Texts one after the other that begin alike cost little more than one.
          special: with the special tokens around it.
        """
        if _UNSETTLED.search(text) or self._spelt_out.search(text):
            return None
        last, words, found = self._last
        common, same, start = _common(last, text), 0, 0
        if common >= _WORTH:
            ends = list(itertools.accumulate(map(len, words)))
            # Of the words that end in what both begin with, the last one may be longer here, and
            # the one before it end where it looked ahead.
            same = max(0, bisect.bisect_left(ends, common) - 1)
            start = ends[same - 1] if same else 0
        new = self._words.findall(text, start)
        words = words[:same] + new
        found = found[:same] + list(map(self._known.__getitem__, new))
        self._last = text, words, found
        whole = b''.join([self._before, *found, self._behind] if special else found)
        return np.frombuffer(whole, np.int32)


class _Known(dict[str, bytes]):
    """Word -> its tokens, as bytes of int32; asks a model for those that it does not have."""

    def __init__(self, model: Any):
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> bytes:
        letters = ''.join(piece for piece, _ in _letters().pre_tokenize_str(word))
        found = np.array([token.id for token in self._model.tokenize(letters)], np.int32).tobytes()
        if len(word) <= _LONGEST_WORD:
            if len(self) == _MOST_WORDS:
                self.clear()
            self[word] = found
        return found


def _common(first: str, second: str) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


_of: 'weakref.WeakKeyDictionary[Tokenizer, tuple[int, Words | None]]' = (
    weakref.WeakKeyDictionary())


@functools.cache
def _letters() -> Any:
    """What writes bytes as letters."""
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _recognised(tokenizer: Tokenizer) -> Words | None:
    kind, own = type(tokenizer), transformers.PreTrainedTokenizerFast
    if not isinstance(tokenizer, own) or any(
            getattr(kind, name) is not getattr(own, name) for name in ('__call__', '_encode_plus')):
        return None
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    pattern, around = _pattern(parts['pre_tokenizer']), _around(parts['post_processor'])
    model = parts['model']
    plain = model['type'] == 'BPE' and not any(model.get(key) for key in (
        'dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback'))
    if parts['normalizer'] is not None or not plain or pattern is None or around is None:
        return None
    return Words(tokenizer, pattern, *around)


def _pattern(step: Any) -> str | None:
    """What finds the words that a step before the model does; None if that is not known."""

    def is_bytes(one: dict[str, Any]) -> bool:
        return _BYTES.items() <= one.items() and one.get('use_regex', True)

    if step is None:
        return None
    if is_bytes(step):
        return _patterns()[0]
    steps = step.get('pretokenizers', [])
    if (len(steps) == 2 and steps[0] == {'type': 'Digits', 'individual_digits': True}
            and is_bytes(steps[1])):
        return _patterns()[1]
    return None


def _around(step: Any) -> tuple[list[int], list[int]] | None:
    """Tokens that a step after the model writes before and behind a text; None if not known."""
    if step is None or step['type'] == 'ByteLevel':
        return [], []
    if step['type'] != 'TemplateProcessing':
        return None
    found: list[list[int]] = [[]]
    for piece in step['single']:
        if 'Sequence' in piece:
            found.append([])
        else:
            found[-1] += step['special_tokens'][piece['SpecialToken']['id']]['ids']
    return (found[0], found[1]) if len(found) == 2 else None
