"""Tokens word by word, for the tokenizers that split texts by a pattern that is known.

A byte-level BPE looks for words, by a pattern, and merges the bytes of each word for itself. So the
tokens of a word are looked up if it was met before. `tokenizers` is asked for each new word, and
for texts that anything else may happen to: with tokens that are spelt out, or with letters that
may be of another kind in another version of Unicode. It spends most of its time on keeping track
of where in the text each token is, which nothing here reads.
"""

import functools
import itertools
import json
import weakref
from typing import Any

import numpy as np
import regex
import tokenizers
import transformers

from qrm.data.templates import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Where every digit is split off before, the rest ends there.
_DIGITS = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+")
_BYTES = {'type': 'ByteLevel', 'add_prefix_space': False}
# Letters, digits and marks whose kinds are settled: Latin, and punctuation.
_UNSETTLED = regex.compile('[^\x00-\u0233\u2010-\u2027\u2030-\u205e\u20a0-\u20b5\u2122\ufffd]')
_MOST_WORDS = 2**18  # remembered
_LONGEST_WORD = 64  # letters of one that is remembered


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
        self._words = regex.compile(pattern)
        added = sorted((token.content for token in backend.get_added_tokens_decoder().values()),
                       key=len, reverse=True)
        self._spelt_out = regex.compile('|'.join(map(regex.escape, added)) or r'(?!)')
        self._before, self._behind = (np.array(ids, np.int32).tobytes() for ids in (before, behind))
        self._known: dict[str, bytes] = {}
        self._last: tuple[str, list[str], list[bytes]] = '', [], []

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> 'Words | None':
        """The words of a tokenizer; None if it does anything else."""
        if tokenizer not in _of:
            _of[tokenizer] = _recognised(tokenizer)
        return _of[tokenizer]

    def ids(self, text: str, *, special: bool) -> np.ndarray | None:
        """[length] int32, tokens of a text; None if it has to be left to the tokenizer.

        Args:
          text: the text. Texts one after the other that begin alike cost little more than one.
          special: with the special tokens around it.
        """
        if _UNSETTLED.search(text) or self._spelt_out.search(text):
            return None
        last, words, found = self._last
        same = self._same(last, words, text)
        start = sum(map(len, words[:same]))
        words = words[:same] + self._words.findall(text, start)
        found = found[:same] + list(map(self._of_word, words[same:]))
        self._last = text, words, found
        whole = b''.join([self._before, *found, self._behind] if special else found)
        return np.frombuffer(whole, np.int32)

    def _same(self, last: str, words: list[str], text: str) -> int:
        """How many words of the last text stand at the start of this one."""
        low, high = 0, min(len(last), len(text))
        while low < high:
            middle = (low + high + 1) // 2
            if last.startswith(text[low:middle], low):
                low = middle
            else:
                high = middle - 1
        ends = itertools.accumulate(map(len, words))
        whole = sum(1 for _ in itertools.takewhile(lambda end: end < low, ends))
        # The last of them may be longer here, and what is before it end where it looked ahead.
        return max(0, whole - 1)

    def _of_word(self, word: str) -> bytes:
        found = self._known.get(word)
        if found is None:
            letters = ''.join(piece for piece, _ in _letters().pre_tokenize_str(word))
            found = np.array([token.id for token in self._model.tokenize(letters)],
                             np.int32).tobytes()
            if len(word) <= _LONGEST_WORD:
                if len(self._known) == _MOST_WORDS:
                    self._known.clear()
                self._known[word] = found
        return found


_of: 'weakref.WeakKeyDictionary[Tokenizer, Words | None]' = weakref.WeakKeyDictionary()


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
        return _GPT2
    steps = step.get('pretokenizers', [])
    if (len(steps) == 2 and steps[0] == {'type': 'Digits', 'individual_digits': True}
            and is_bytes(steps[1])):
        return _DIGITS
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
