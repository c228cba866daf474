"""Comparisons as tokens: tokenizers, shared prompts, over-length dialogues.

Each whole dialogue is tokenised once, so that its tokens are those a model would see if the
dialogue stood alone; the longest common token prefix of the dialogues is the shared prompt.
"""

import collections
import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers

from qrm.data import orders
from qrm.data.comparisons import (
    Comparison,
    DataError,
    DataReport,
    MalformedRow,
    in_a_line,
)
from qrm.data.rows import as_chat
from qrm.data.templates import Tokenizer, render, settle, unread_keys

Ids = np.ndarray  # [length] int32

OVERLONG = ('truncate_prompt', 'drop', 'error')
_BATCH = 2048  # dialogues handed to the tokenizer at a time
_REMEMBERED = 4  # sets of comparisons whose tokens are kept, as the runs of a study read the same


class Candidates(NamedTuple):
    """The K responses of a comparison that is read as orders of two of them, see `orders`.

    Attributes:
      preference: [K, K] float32, see `Comparison.preference_matrix`.
      ratings: [K, A] float32, see `Comparison.rating_matrix`.
      lengths: tokens of each.
    """

    preference: np.ndarray
    ratings: np.ndarray
    lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One comparison in tokens; dialogue k is `prompt` followed by `responses[k]`.

    Attributes:
      id, group: as in `Comparison`.
      prompt: [P] int32, tokens shared by all dialogues.
      responses: K arrays [R_k] int32 with R_k >= 1; the reward is read at the last token. With
        `candidates` these are orders of two responses, and so are those that all else is of.
      preference: [K, K] float32, see `Comparison.preference_matrix`.
      ratings: [K, A] float32, see `Comparison.rating_matrix`.
      margin, weight: as in `Comparison`.
      annotator: index of who judged, -1 if unknown.
      prompt_sizes: how many tokens at the start of each dialogue are those of its prompt alone, if
        anything reads it. Unlike the size of `prompt`, no other response changes it.
      candidates: what is known of the responses that these are orders of; None: they are responses.
    """

    id: str
    group: str
    prompt: Ids
    responses: tuple[Ids, ...]
    preference: np.ndarray
    ratings: np.ndarray
    margin: float = 0.0
    weight: float = 1.0
    annotator: int = -1
    prompt_sizes: tuple[int, ...] = ()
    candidates: Candidates | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each response."""
        return tuple(map(len, self.responses))

    @property
    def size(self) -> int:
        """Tokens of the comparison with the prompt stored once."""
        return len(self.prompt) + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest dialogue."""
        return len(self.prompt) + max(self.lengths)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a model reads dialogues.

    Attributes:
      max_length: tokens of the longest dialogue; longer ones are cut.
      append_eos: EOS is appended to a dialogue unless it ends with it; it is then the last token,
        where rewards are read.
      as_chats: texts are read as chats, see `rows.as_chat`.
      rendered_chats: chats are the tokens of their template, whatever it ends with, as a classifier
        of `transformers` is used; else they end with EOS as plain dialogues do.
      skipped: token that a dialogue is read without at its end, however often it stands there;
        `transformers` reads classifiers before their padding token, also where that is EOS.
      share_prompt: lay the prompt out once for all responses, see `split_prompt`.
      size_prompt: find `Encoded.prompt_sizes`.
      pair_template: what continues a prompt are two responses in one order, by this template, see
        `orders`; '': a response.
    """

    max_length: int
    append_eos: bool = True
    as_chats: bool = False
    rendered_chats: bool = False
    skipped: int | None = None
    share_prompt: bool = True
    size_prompt: bool = False
    pair_template: str = ''


def load_tokenizer(path: str, now: datetime.datetime | None = None,
                   template: str = '') -> Tokenizer:
    """Loads a tokenizer from a local folder or the Hugging Face hub; runs no remote code.

    A `tokenizer.json` is taken as it is. Of some families, such as qwen2, AutoTokenizer of
    transformers 5 keeps only its vocabulary, and splits texts in its own way.

    Args:
      path: of the folder, or name on the hub.
      now: what the clock of a chat template stands at from now on, see `stop_clock`; None: at the
        time of this call.
      template: chat template in place of its own, see `templates.read`; '': its own.

    Raises:
      DataError: there is none at `path`, or its chat template is no function of the chat.
    """
    whole = os.path.isfile(os.path.join(path, 'tokenizer.json'))
    # Looking AutoTokenizer up reads the names of all models, which takes half a second.
    kind = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # The library raises a different type for each way to fail.
        raise DataError(
            f'{path}: no tokenizer could be loaded ({in_a_line(error)}); expected tokenizer.json, '
            'or vocab.json and merges.txt, or set config.model.tokenizer to where it is'
        ) from error
    settle(tokenizer, now or datetime.datetime.now(), template)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Writes a tokenizer that versions 4 and 5 of transformers take as it is.

    Its class is the one that reads tokenizer.json, by the name that both know. Those of families
    replace parts of it by their own, such as the splitting of digits.
    """
    tokenizer.save_pretrained(folder)
    path = os.path.join(folder, 'tokenizer_config.json')
    with open(path, encoding='utf-8') as file:
        config = json.load(file)
    config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    if isinstance(tokenizer.chat_template, str):
        config['chat_template'] = tokenizer.chat_template  # also where a file of its own is unread
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(config, file, indent=2, ensure_ascii=False)
        file.write('\n')


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens, with an end-of-text and a padding token."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=['<|endoftext|>', '<|pad|>'],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token='<|endoftext|>', pad_token='<|pad|>'
    )


def texts_of(comparisons: Iterable[Comparison]) -> Iterable[str]:
    """All texts of the comparisons, to train a tokenizer on."""
    for comparison in comparisons:
        for text in (comparison.prompt, *comparison.responses):
            yield text if isinstance(text, str) else '\n'.join(
                m['content'] or '' for m in text)


def tokenize(
    comparisons: Sequence[Comparison], tokenizer: Tokenizer, reading: Reading
) -> list[list[Ids] | MalformedRow]:
    """Tokenises every dialogue of every comparison as a whole.

    Chats are rendered by the tokenizer's chat template, which brings its own special tokens;
    plain dialogues get those the tokenizer adds by itself. So a BOS token is never doubled. How
    dialogues end, the reading says; here none is cut.

    Returns:
      One list of K arrays [length] int32 for each comparison; or what is wrong with it, if the
      template or the tokenizer refuses it, or a dialogue has no tokens.

    Raises:
      DataError: EOS or a chat template is needed and missing.
    """
    if reading.append_eos and tokenizer.eos_token_id is None:
        raise DataError(f'{tokenizer.name_or_path}: the tokenizer has no EOS token, and '
                        'append_eos is set; for BERT and others of its kind set '
                        'data.append_eos=False')
    texts: dict[bool, list[str]] = {True: [], False: []}  # plain or not -> dialogues
    read: list[Comparison | MalformedRow] = []
    for comparison in comparisons:
        try:
            comparison = as_read(comparison, reading)
            plainly = isinstance(comparison.prompt, str)
            texts[plainly] += [
                comparison.prompt + response if plainly else
                render(comparison, response, tokenizer, whole=reading.rendered_chats)
                for response in comparison.responses]
            read.append(comparison)
        except MalformedRow as error:
            read.append(error)
    source = {plainly: _ids(some, tokenizer, add_special_tokens=plainly)
              for plainly, some in texts.items()}
    result: list[list[Ids] | MalformedRow] = []
    for comparison in read:
        if isinstance(comparison, MalformedRow):
            result.append(comparison)
            continue
        plainly = isinstance(comparison.prompt, str)
        dialogues = [next(source[plainly]) for _ in comparison.responses]
        refused = [ids for ids in dialogues if isinstance(ids, Exception)]
        if refused:
            result.append(MalformedRow(f'{comparison.place}: the tokenizer refuses it '
                                       f'({in_a_line(refused[0])})'))
            continue
        if reading.append_eos and (plainly or not reading.rendered_chats):
            eos = tokenizer.eos_token_id
            dialogues = [[*_without_end(ids, eos), eos] for ids in dialogues]
        if reading.skipped is not None:
            dialogues = [_without_end(ids, reading.skipped) for ids in dialogues]
        result.append(
            [np.asarray(ids, np.int32) for ids in dialogues] if all(map(len, dialogues)) else
            MalformedRow(f'{comparison.place}: a dialogue has no tokens, expected text'))
    return result


def as_read(comparison: Comparison, reading: Reading) -> Comparison:
    """A comparison as it is read: texts, chats, or texts as chats; if so, its orders of two.

    Raises:
      MalformedRow: see `rows.as_chat` and `orders.as_orders`.
    """
    if reading.as_chats:
        comparison = as_chat(comparison)
    if reading.pair_template:
        comparison = orders.as_orders(comparison, reading.pair_template)
    return comparison


def prompt_sizes(
    comparison: Comparison, dialogues: Sequence[Ids], tokenizer: Tokenizer
) -> tuple[int, ...]:
    """How many tokens at the start of each dialogue belong to the prompt as it is alone.

    A function of the prompt and the one response: the tokens that all of them share may reach
    into the responses. It is 0 where there is no prompt.

    Raises:
      MalformedRow: the chat template or the tokenizer refuses the prompt alone.
    """
    plainly = isinstance(comparison.prompt, str)
    alone = []
    if comparison.prompt or plainly:
        text = comparison.prompt if plainly else render(comparison, (), tokenizer)
        alone = next(_ids([text], tokenizer, add_special_tokens=plainly))
        if isinstance(alone, Exception):
            raise MalformedRow(f'{comparison.place}: the tokenizer refuses its prompt '
                               f'({in_a_line(alone)})')
    alone = np.asarray(alone, np.int32)
    return tuple(_common_length((alone, ids)) for ids in dialogues)


def split_prompt(
    dialogues: Sequence[Ids], *, share: bool = True
) -> tuple[Ids, tuple[Ids, ...]]:
    """Splits dialogues into their longest common prefix and the rest, at least one token each.

    Unless `share`, nothing is common: where tokens see the whole dialogue, those of a prompt are
    not the same for all of its responses.
    """
    length = _common_length([ids[:-1] for ids in dialogues]) if share else 0
    return dialogues[0][:length], tuple(ids[length:] for ids in dialogues)


def encode(
    comparisons: Sequence[Comparison],
    tokenizer: Tokenizer,
    report: DataReport,
    reading: Reading,
    *,
    overlong: str = 'truncate_prompt',
    preferences: bool = True,
    ratings: bool = False,
    named: bool = False,
    attributes: Sequence[str] = (),
    annotators: Sequence[str] = (),
) -> list[Encoded]:
    """Encodes comparisons to learn from or to evaluate on.

    A comparison with a dialogue longer than `reading.max_length` tokens (EOS included) loses the
    left end of its prompt, after BOS or CLS ('truncate_prompt'), is dropped ('drop') or
    raises ('error'); responses always stay whole. Comparisons that say nothing are dropped: those
    without any known preference or with identical responses, unless ratings are read and there is
    one. All is counted in `report`, as are rows that the chat template or the tokenizer refuses,
    which are malformed.

    Args:
      comparisons: what to encode.
      tokenizer: for texts and chats.
      report: is added to.
      reading: how the model reads dialogues.
      overlong: see above.
      preferences, ratings: what is read; at least one of them.
      named: drop comparisons that do not say who judged.
      attributes: names of the rated attributes; (): responses are rated as a whole.
      annotators: names of the annotators that have an index.

    Raises:
      DataError: see `tokenize`; or a dialogue is too long and `overlong` is 'error'.
    """
    if overlong not in OVERLONG:
        raise ValueError(f'overlong={overlong!r}, expected one of {OVERLONG}')
    max_length = reading.max_length
    special = [token for token in tokenizer.all_special_tokens if token]
    index_of = {name: i for i, name in enumerate(annotators)}
    kept = []
    tokens_of = _remembered(comparisons, tokenizer, reading)
    for comparison, tokenised in zip(comparisons, tokens_of, strict=True):
        if isinstance(tokenised, MalformedRow):
            report.drop_malformed(tokenised)
            continue
        dialogues, sizes, lengths, unread = tokenised
        report.notes.update(f'{key} not used by the chat template' for key in unread)
        preference = comparison.preference_matrix()
        rating = comparison.rating_matrix(attributes)
        rated = ratings and np.isfinite(rating).any()
        if not rated and all(np.array_equal(ids, dialogues[0]) for ids in dialogues[1:]):
            report.identical += len(dialogues) > 1
            report.dropped['identical responses' if len(dialogues) > 1 else 'one response'] += 1
            continue
        if not (rated or (preferences and preference.any())) or not comparison.weight:
            known = ' or '.join(['preference'] * preferences + ['rating'] * ratings)
            report.dropped[f'no {known} known, or weight 0'] += 1
            continue
        if named and comparison.annotator is None:
            report.dropped['annotator not named'] += 1
            continue
        preference, rating, candidates = _judged(preference, rating, reading, lengths)
        prompt, responses = split_prompt(dialogues)
        lead = _lead(prompt, tokenizer)
        excess = len(prompt) + max(map(len, responses)) - max_length
        if excess > 0:
            if overlong == 'error':
                raise DataError(f"{comparison.place}: a dialogue of {max_length + excess} tokens, "
                                f"expected at most {max_length} (overlong is 'error')")
            try:
                # What responses have in common, or the one there is, is no part of the prompt.
                known = 0 if overlong == 'drop' else min(
                    sizes or prompt_sizes(as_read(comparison, reading), dialogues, tokenizer))
            except MalformedRow as error:
                report.drop_malformed(error)
                continue
            if excess > min(known, len(prompt)) - lead:
                reason = ('a dialogue' if overlong == 'drop' else
                          'a response alone' if candidates is None else 'a pair alone')
                report.dropped[f'{reason} is longer than {max_length} tokens'] += 1
                continue
            report.truncated += 1
            prompt = np.delete(prompt, np.s_[lead:lead + excess])
        if not reading.share_prompt:
            prompt, responses = split_prompt(
                [np.concatenate([prompt, ids]) for ids in responses], share=False)
        encoded = Encoded(comparison.id, comparison.group, prompt, responses, preference, rating,
                          comparison.margin, comparison.weight,
                          index_of.get(comparison.annotator, -1),
                          tuple(_size_after_cut(size, lead, excess) for size in sizes),
                          candidates)
        kept.append(encoded)
        report.tied += bool((preference == 0.5).any())
        report.dialogue_tokens += len(prompt) * len(responses) + sum(map(len, responses))
        report.packed_tokens += encoded.size
        report.prompt_tokens += len(prompt) * len(responses)
        if any(token in text for text in texts_of((comparison,)) for token in special):
            report.notes['special tokens spelt out in the text'] += 1
    report.kept += len(kept)
    return kept


def encode_to_score(
    comparisons: Sequence[Comparison],
    tokenizer: Tokenizer,
    reading: Reading,
    *,
    attributes: Sequence[str] = (),
) -> tuple[list[Encoded], int]:
    """Encodes comparisons to be scored: none is dropped, each dialogue is cut by itself.

    A dialogue longer than `reading.max_length` keeps BOS or CLS and its last tokens whatever its
    neighbours are, so that a score never depends on them.

    Returns:
      The encoded comparisons, in order, and how many dialogues were cut.

    Raises:
      DataError: see `tokenize`; the chat template or the tokenizer refuses one; or there is one
        response where two are read together.
    """
    if reading.pair_template and (alone := [c for c in comparisons if len(c.responses) < 2]):
        raise DataError(f'{alone[0].place}: one response to a prompt, expected two or more, as a '
                        'pairwise model compares them')
    result, cut, max_length = [], 0, reading.max_length
    dialogues_of = tokenize(comparisons, tokenizer, reading)
    for comparison, dialogues in zip(comparisons, dialogues_of, strict=True):
        if isinstance(dialogues, MalformedRow):
            raise dialogues
        leads = [min(_lead(ids, tokenizer), max_length - 1) for ids in dialogues]
        excesses = [len(ids) - max_length for ids in dialogues]
        cut += sum(excess > 0 for excess in excesses)
        sizes = (prompt_sizes(as_read(comparison, reading), dialogues, tokenizer)
                 if reading.size_prompt else ())
        sizes = tuple(map(_size_after_cut, sizes, leads, excesses))
        prompt, responses = split_prompt(
            [np.delete(ids, np.s_[lead:lead + max(excess, 0)])
             for ids, lead, excess in zip(dialogues, leads, excesses, strict=True)],
            share=reading.share_prompt)
        lengths = _candidate_lengths(comparison, tokenizer, reading)
        preference, rating, candidates = _judged(
            comparison.preference_matrix(), comparison.rating_matrix(attributes), reading, lengths)
        result.append(Encoded(comparison.id, comparison.group, prompt, responses, preference,
                              rating, prompt_sizes=sizes, candidates=candidates))
    return result, cut


def encode_prompts(
    comparisons: Sequence[Comparison], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Ids], int]:
    """The tokens of prompts as a language model continues them, and how many were cut.

    A chat ends with what its template puts before an answer, a text without an EOS that the
    tokenizer appends. One that is longer than `max_length` keeps BOS and its last tokens.

    Raises:
      DataError: a chat template is missing; or it or the tokenizer refuses a prompt, or there is
        no token in it.
    """
    result, cut = [], 0
    for c in comparisons:
        plainly = isinstance(c.prompt, str)
        text = c.prompt if plainly else render(c, (), tokenizer, to_answer=True)
        ids = next(_ids([text], tokenizer, add_special_tokens=plainly))
        if isinstance(ids, Exception):
            raise MalformedRow(f'{c.place}: the tokenizer refuses it ({in_a_line(ids)})')
        ids = np.asarray(_without_end(ids, tokenizer.eos_token_id) if plainly else ids, np.int32)
        if not len(ids):
            raise MalformedRow(f'{c.place}: a prompt without tokens, expected text')
        lead, excess = min(_lead(ids, tokenizer), max_length - 1), len(ids) - max_length
        cut += excess > 0
        result.append(np.delete(ids, np.s_[lead:lead + max(excess, 0)]))
    return result, cut


def _judged(
    preference: np.ndarray, ratings: np.ndarray, reading: Reading, lengths: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, Candidates | None]:
    """What is known of all that is read: of responses, or of orders and the candidates in them."""
    if not reading.pair_template:
        return preference, ratings, None
    of_orders = orders.preference(preference)
    return (of_orders, np.full((len(of_orders), ratings.shape[1]), np.nan, np.float32),
            Candidates(preference, ratings, lengths))


def _candidate_lengths(
    comparison: Comparison, tokenizer: Tokenizer, reading: Reading
) -> tuple[int, ...]:
    """Tokens of each response by itself, where the tokens of dialogues are those of two.

    Raises:
      MalformedRow: see `as_read`.
    """
    if not reading.pair_template:
        return ()
    texts = orders.response_texts(as_chat(comparison) if reading.as_chats else comparison)
    found = list(_ids(texts, tokenizer, add_special_tokens=False))
    if refused := [ids for ids in found if isinstance(ids, Exception)]:
        raise MalformedRow(f'{comparison.place}: the tokenizer refuses a response '
                           f'({in_a_line(refused[0])})')
    return tuple(map(len, found))


def has_preferred(encoded: Iterable[Encoded]) -> bool:
    """Whether there is any pair with a preferred side."""
    return any((item.preference > 0.5).any() for item in encoded)


def has_rating(encoded: Iterable[Encoded]) -> bool:
    """Whether there is any rated response."""
    return any(np.isfinite(item.ratings).any() for item in encoded)


def fingerprint(encoded: Sequence[Encoded]) -> str:
    """SHA-256 over everything training reads of the comparisons, to recognise other data."""
    digest = hashlib.sha256()
    for item in encoded:
        for array in (item.prompt, *item.responses, item.preference, item.ratings):
            digest.update(f'{array.shape}'.encode())
            digest.update(array.tobytes())
        digest.update(f'{item.margin} {item.weight} {item.annotator} {item.prompt_sizes}'.encode())
    return digest.hexdigest()


class _Tokenised(NamedTuple):
    """A comparison in tokens, before anything is cut.

    Attributes:
      dialogues: see `tokenize`.
      sizes: `prompt_sizes`, if the reading says so.
      lengths: of `Candidates`, if there are any.
      unread: see `unread_keys`.
    """

    dialogues: list[Ids]
    sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    unread: list[str]


_memory: collections.OrderedDict[str, list[_Tokenised | MalformedRow]] = collections.OrderedDict()


def _remembered(
    comparisons: Sequence[Comparison], tokenizer: Tokenizer, reading: Reading
) -> list[_Tokenised | MalformedRow]:
    """Each comparison in tokens, or what is wrong with it.

    Those of the last few texts are remembered, by everything that they depend on.
    """

    def complete(comparison: Comparison, dialogues: list[Ids] | MalformedRow):
        if isinstance(dialogues, MalformedRow):
            return dialogues
        read = as_read(comparison, reading)
        try:
            sizes = prompt_sizes(read, dialogues, tokenizer) if reading.size_prompt else ()
            lengths = _candidate_lengths(comparison, tokenizer, reading)
        except MalformedRow as error:
            return error
        return _Tokenised(dialogues, sizes, lengths, unread_keys(read, tokenizer))

    def make() -> list[_Tokenised | MalformedRow]:
        return list(map(complete, comparisons, tokenize(comparisons, tokenizer, reading)))

    backend = getattr(tokenizer, 'backend_tokenizer', None)
    if backend is None:  # what one in Python does depends on its code
        return make()
    digest = hashlib.sha256(repr((
        reading, backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map)).encode())
    for c in comparisons:
        digest.update(repr((c.prompt, c.responses, c.tools)).encode())
    key = digest.hexdigest()
    if key not in _memory:
        made = make()
        if any(isinstance(one, MalformedRow) for one in made):  # which name the place of the row
            return made
        _memory[key] = made
        while len(_memory) > _REMEMBERED:
            _memory.popitem(last=False)
    _memory.move_to_end(key)
    return _memory[key]


def _lead(ids: Ids, tokenizer: Tokenizer) -> int:
    """1 if the tokens start with BOS or CLS, which a model expects there, else 0."""
    starts = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return int(len(ids) > 0 and int(ids[0]) in starts)


def _size_after_cut(size: int, lead: int, excess: int) -> int:
    """Tokens left of a prompt of `size` after `excess` were cut behind the first `lead`."""
    return size - max(min(size - lead, excess), 0)


def _common_length(sequences: Sequence[Ids]) -> int:
    """Length of the longest common prefix."""
    limit = min(map(len, sequences))
    first = sequences[0][:limit]
    same = np.all([ids[:limit] == first for ids in sequences], axis=0)
    return limit if same.all() else int(np.argmin(same))


def _ids(
    texts: list[str], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> Iterator[list[int] | Exception]:
    """Tokens of each text, or why there are none."""

    def of(some: list[str]) -> list[list[int]]:
        return tokenizer(
            some, add_special_tokens=add_special_tokens, return_attention_mask=False,
            verbose=False,  # lengths beyond the model's are cut, and counted, later
        )['input_ids']

    for start in range(0, len(texts), _BATCH):
        some = texts[start:start + _BATCH]
        try:
            found = of(some)
        except Exception:  # One of them is at fault, which only it alone will tell.
            found = []
            for text in some:
                try:
                    found += of([text])
                except Exception as error:  # each tokenizer has its own errors
                    found.append(error)
        yield from found


def _without_end(ids: list[int], last: int) -> list[int]:
    """Without this token at the end: spelt out in the text, added by the tokenizer, or both."""
    end = len(ids)
    while end and ids[end - 1] == last:
        end -= 1
    return ids[:end]
