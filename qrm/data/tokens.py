"""Comparisons as tokens: tokenizers, shared prompts, over-length dialogues.

Each whole dialogue is tokenised once, so that its tokens are those a model would see if the
dialogue stood alone; the longest common token prefix of the dialogues is the shared prompt.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
import transformers

from qrm.data import encoded as encoded_lib
from qrm.data import orders, records, workers
from qrm.data.comparisons import (
    Comparison,
    DataError,
    DataReport,
    MalformedRow,
    in_a_line,
)
from qrm.data.encoded import Candidates, Encoded, EncodedTable, Ids
from qrm.data.records import Comparisons
from qrm.data.rows import as_chat
from qrm.data.tables import Cache, Writer
from qrm.data.templates import Tokenizer, render, settle, unread_keys

OVERLONG = ('truncate_prompt', 'drop', 'error')
_BATCH = 2048  # dialogues handed to the tokenizer at a time


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
      answers: a response is what a language model writes: all that follows its prompt as that is
        alone, which ends with what a chat template puts before an answer. Prompts are sized, and
        nothing of a response is laid out with the prompt, be it common to all of them.
    """

    max_length: int
    append_eos: bool = True
    as_chats: bool = False
    rendered_chats: bool = False
    skipped: int | None = None
    share_prompt: bool = True
    size_prompt: bool = False
    pair_template: str = ''
    answers: bool = False


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
            dialogues = [np.append(_without_end(ids, eos), np.int32(eos)) for ids in dialogues]
        if reading.skipped is not None:
            dialogues = [_without_end(ids, reading.skipped) for ids in dialogues]
        result.append(
            dialogues if all(map(len, dialogues)) else
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
    comparison: Comparison, dialogues: Sequence[Ids], tokenizer: Tokenizer, *,
    answers: bool = False,
) -> tuple[int, ...]:
    """How many tokens at the start of each dialogue belong to the prompt as it is alone.

    A function of the prompt and the one response: the tokens that all of them share may reach
    into the responses. It is 0 where there is no prompt; with `answers`, see `Reading`, one token
    of a dialogue at least is not of the prompt.

    Raises:
      MalformedRow: the chat template or the tokenizer refuses the prompt alone.
    """
    plainly = isinstance(comparison.prompt, str)
    alone = []
    if comparison.prompt or plainly:
        text = comparison.prompt if plainly else render(comparison, (), tokenizer,
                                                        to_answer=answers)
        alone = next(_ids([text], tokenizer, add_special_tokens=plainly))
        if isinstance(alone, Exception):
            raise MalformedRow(f'{comparison.place}: the tokenizer refuses its prompt '
                               f'({in_a_line(alone)})')
    alone = np.asarray(alone, np.int32)
    return tuple(_common_length((alone, ids[:-1] if answers else ids)) for ids in dialogues)


def split_prompt(
    dialogues: Sequence[Ids], *, share: bool = True, most: int | None = None
) -> tuple[Ids, tuple[Ids, ...]]:
    """Splits dialogues into their longest common prefix and the rest, at least one token each.

    Unless `share`, nothing is common: where tokens see the whole dialogue, those of a prompt are
    not the same for all of its responses. With `most` no more tokens than that are common.
    """
    length = _common_length([ids[:-1] for ids in dialogues]) if share else 0
    length = length if most is None else min(length, most)
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
    demonstrations: bool = False,
) -> EncodedTable:
    """Encodes comparisons to learn from or to evaluate on.

    A comparison with a dialogue longer than `reading.max_length` tokens (EOS included) loses the
    left end of its prompt, after BOS or CLS ('truncate_prompt'), is dropped ('drop') or
    raises ('error'); responses always stay whole. Comparisons that say nothing are dropped: those
    without any known preference or with identical responses, unless ratings are read and there is
    one. All is counted in `report`, as are rows that the chat template or the tokenizer refuses,
    which are malformed.

    What is found of `Comparisons` is kept where they are, by all that it depends on.

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
      demonstrations: of each comparison only the response that is preferred to all others is
        encoded, or the one there is; without such a one it is dropped.

    Raises:
      DataError: see `tokenize`; or a dialogue is too long and `overlong` is 'error'.
    """
    if overlong not in OVERLONG:
        raise ValueError(f'overlong={overlong!r}, expected one of {OVERLONG}')
    comparisons = Comparisons.of(comparisons)
    wanted = _Wanted(overlong, preferences, ratings, named, tuple(attributes), tuple(annotators),
                     demonstrations)
    what = _tokenizer_digest(tokenizer)  # of one in Python, what it does depends on its code
    cache = comparisons.cache if comparisons.key and what else Cache('')
    entry = cache.keep('tokens', {
        'comparisons': comparisons.key, 'rows': comparisons.digest, 'tokenizer': what,
        'reading': dataclasses.asdict(reading), 'wanted': dataclasses.asdict(wanted),
    }, functools.partial(_encode_all, comparisons, tokenizer, reading, wanted))
    report.add(records.named_report(entry.value, comparisons.files))
    return EncodedTable(entry.table('tokens'), entry.key if cache is comparisons.cache else '',
                        cache, files=comparisons.files)


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
    starts = _starts(tokenizer)
    dialogues_of = tokenize(comparisons, tokenizer, reading)
    for comparison, dialogues in zip(comparisons, dialogues_of, strict=True):
        if isinstance(dialogues, MalformedRow):
            raise dialogues
        leads = [min(_lead(ids, starts), max_length - 1) for ids in dialogues]
        excesses = [len(ids) - max_length for ids in dialogues]
        cut += sum(excess > 0 for excess in excesses)
        sizes = _sizes(as_read(comparison, reading), dialogues, tokenizer, reading)
        sizes = tuple(map(_size_after_cut, sizes, leads, excesses))
        prompt, responses = split_prompt(
            [np.delete(ids, np.s_[lead:lead + max(excess, 0)])
             for ids, lead, excess in zip(dialogues, leads, excesses, strict=True)],
            share=reading.share_prompt, most=min(sizes) if reading.answers else None)
        preference, rating, candidates = _judged(
            comparison, comparison.preference_matrix(), comparison.rating_matrix(attributes),
            tokenizer, reading)
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
    result, cut, starts = [], 0, _starts(tokenizer)
    for c in comparisons:
        plainly = isinstance(c.prompt, str)
        text = c.prompt if plainly else render(c, (), tokenizer, to_answer=True)
        ids = next(_ids([text], tokenizer, add_special_tokens=plainly))
        if isinstance(ids, Exception):
            raise MalformedRow(f'{c.place}: the tokenizer refuses it ({in_a_line(ids)})')
        if plainly:
            ids = _without_end(ids, tokenizer.eos_token_id)
        if not len(ids):
            raise MalformedRow(f'{c.place}: a prompt without tokens, expected text')
        lead, excess = min(_lead(ids, starts), max_length - 1), len(ids) - max_length
        cut += excess > 0
        result.append(np.delete(ids, np.s_[lead:lead + max(excess, 0)]))
    return result, cut


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Digest of all that a tokenizer does; '' of one that does it in Python."""
    backend = _backend(tokenizer)
    if backend is None:
        return ''
    return hashlib.sha256(repr((
        type(tokenizer).__qualname__, backend.to_str(), tokenizer.chat_template,
        tokenizer.special_tokens_map, tokenizer.split_special_tokens)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Arguments of `encode`."""

    overlong: str
    preferences: bool
    ratings: bool
    named: bool
    attributes: tuple[str, ...]
    annotators: tuple[str, ...]
    demonstrations: bool


def _encode_all(comparisons: Comparisons, tokenizer: Tokenizer, reading: Reading, wanted: _Wanted,
                writer: Writer) -> dict[str, Any]:
    """Writes the comparisons that are kept; what became of all of them.

    Raises:
      DataError: see `encode`.
    """
    report = DataReport('', '')
    columns = encoded_lib.schema(max(tokenizer.get_vocab().values(), default=0) + 1)
    encode_some = functools.partial(_encode_some, tokenizer=tokenizer, reading=reading,
                                    wanted=wanted, columns=columns)
    try:
        with writer.table('tokens', columns) as write:
            for rows, counts in workers.in_order(encode_some, comparisons.chunks()):
                write(rows)
                report.add(counts)
    except DataError as error:
        raise DataError(records.named(str(error), comparisons.files)) from error
    return report.stored()


def _encode_some(
    chunk: pa.RecordBatch, *, tokenizer: Tokenizer, reading: Reading, wanted: _Wanted,
    columns: pa.Schema,
) -> tuple[pa.RecordBatch, DataReport]:
    """Comparisons of a chunk as rows of a table, and what became of all of them."""
    report, kept = DataReport('', ''), []
    comparisons = list(records.decoded(chunk))
    starts = _starts(tokenizer)
    special = [token for token in tokenizer.all_special_tokens if token]
    for comparison, dialogues in zip(
            comparisons, tokenize(comparisons, tokenizer, reading), strict=True):
        try:
            if isinstance(dialogues, MalformedRow):
                raise dialogues
            item = _encode_one(comparison, dialogues, tokenizer, report, reading, wanted, starts)
        except MalformedRow as error:
            report.drop_malformed(error)
            continue
        if item is None:
            continue
        kept.append(item)
        k, responses = len(item.responses), sum(map(len, item.responses))
        report.tied += bool((item.preference == 0.5).any())
        report.dialogue_tokens += len(item.prompt) * k + responses
        report.packed_tokens += len(item.prompt) + responses
        report.prompt_tokens += len(item.prompt) * k
        if any(token in text for text in texts_of((comparison,)) for token in special):
            report.notes['special tokens spelt out in the text'] += 1
    report.kept = len(kept)
    return encoded_lib.rows_of(kept, columns), report


def _encode_one(
    comparison: Comparison, dialogues: list[Ids], tokenizer: Tokenizer, report: DataReport,
    reading: Reading, wanted: _Wanted, starts: Set[int],
) -> Encoded | None:
    """A comparison in tokens; None if it is dropped, which is counted, as what is cut.

    Raises:
      DataError: a dialogue is too long and that is an error.
      MalformedRow: the chat template or the tokenizer refuses the prompt alone, or a candidate.
    """
    if wanted.demonstrations:
        best = _best(comparison)
        if best is None or not comparison.weight:
            report.dropped['no response preferred to all others, or weight 0'] += 1
            return None
        comparison, dialogues = _only(comparison, best), [dialogues[best]]
    as_it_is_read = as_read(comparison, reading)
    sizes = _sizes(as_it_is_read, dialogues, tokenizer, reading)
    report.notes.update(f'{key} not used by the chat template'
                        for key in unread_keys(as_it_is_read, tokenizer))
    preference = comparison.preference_matrix()
    rating = comparison.rating_matrix(wanted.attributes)
    rated = wanted.ratings and np.isfinite(rating).any()
    if not (rated or wanted.demonstrations) and all(
            np.array_equal(ids, dialogues[0]) for ids in dialogues[1:]):
        report.identical += len(dialogues) > 1
        report.dropped['identical responses' if len(dialogues) > 1 else 'one response'] += 1
        return None
    if not wanted.demonstrations and (
            not (rated or (wanted.preferences and preference.any())) or not comparison.weight):
        known = ' or '.join(['preference'] * wanted.preferences + ['rating'] * wanted.ratings)
        report.dropped[f'no {known} known, or weight 0'] += 1
        return None
    if wanted.named and comparison.annotator is None:
        report.dropped['annotator not named'] += 1
        return None
    preference, rating, candidates = _judged(comparison, preference, rating, tokenizer, reading)
    prompt, responses = split_prompt(dialogues, most=min(sizes) if reading.answers else None)
    lead, max_length = _lead(prompt, starts), reading.max_length
    excess = len(prompt) + max(map(len, responses)) - max_length
    if excess > 0:
        if wanted.overlong == 'error':
            raise DataError(f"{comparison.place}: a dialogue of {max_length + excess} tokens, "
                            f"expected at most {max_length} (overlong is 'error')")
        # What responses have in common, or the one there is, is no part of the prompt.
        known = 0 if wanted.overlong == 'drop' else min(
            sizes or prompt_sizes(as_it_is_read, dialogues, tokenizer))
        if excess > min(known, len(prompt)) - lead:
            reason = ('a dialogue' if wanted.overlong == 'drop' else
                      'a response alone' if candidates is None else 'a pair alone')
            report.dropped[f'{reason} is longer than {max_length} tokens'] += 1
            return None
        report.truncated += 1
        prompt = np.delete(prompt, np.s_[lead:lead + excess])
    if not reading.share_prompt:
        prompt, responses = split_prompt(
            [np.concatenate([prompt, ids]) for ids in responses], share=False)
    annotator = (wanted.annotators.index(comparison.annotator)
                 if comparison.annotator in wanted.annotators else -1)
    return Encoded(comparison.id, comparison.group, prompt, responses, preference, rating,
                   comparison.margin, comparison.weight, annotator,
                   tuple(_size_after_cut(size, lead, excess) for size in sizes), candidates)


def _sizes(
    comparison: Comparison, dialogues: Sequence[Ids], tokenizer: Tokenizer, reading: Reading
) -> tuple[int, ...]:
    """Of prompts, see `Encoded.prompt_sizes`; () if nothing reads them."""
    if not (reading.size_prompt or reading.answers):
        return ()
    return prompt_sizes(comparison, dialogues, tokenizer, answers=reading.answers)


def _best(comparison: Comparison) -> int | None:
    """The response that is preferred to all others, or the one there is."""
    preference = comparison.preference_matrix()
    np.fill_diagonal(preference, 1.0)
    best = np.flatnonzero((preference > 0.5).all(axis=1))
    return int(best[0]) if len(best) else None


def _only(comparison: Comparison, k: int) -> Comparison:
    """A comparison of one response alone, of which no one said anything."""
    return dataclasses.replace(
        comparison, responses=comparison.responses[k:k + 1], ranks=None, preferred=None,
        preference=None, ratings=None, attributes={})


def _judged(
    comparison: Comparison, preference: np.ndarray, ratings: np.ndarray, tokenizer: Tokenizer,
    reading: Reading,
) -> tuple[np.ndarray, np.ndarray, Candidates | None]:
    """What is known of all that is read: of responses, or of orders and the candidates in them.

    Raises:
      MalformedRow: see `as_read`; or the tokenizer refuses a response alone.
    """
    if not reading.pair_template:
        return preference, ratings, None
    texts = orders.response_texts(as_chat(comparison) if reading.as_chats else comparison)
    found = list(_ids(texts, tokenizer, add_special_tokens=False))
    if refused := [ids for ids in found if isinstance(ids, Exception)]:
        raise MalformedRow(f'{comparison.place}: the tokenizer refuses a response '
                           f'({in_a_line(refused[0])})')
    of_orders = orders.preference(preference)
    return (of_orders, np.full((len(of_orders), ratings.shape[1]), np.nan, np.float32),
            Candidates(preference, ratings, tuple(map(len, found))))


def _starts(tokenizer: Tokenizer) -> Set[int]:
    """BOS and CLS, if there are such."""
    return {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}


def _lead(ids: Ids, starts: Set[int]) -> int:
    """1 if the tokens start with BOS or CLS, which a model expects there, else 0."""
    return int(len(ids) > 0 and int(ids[0]) in starts)


def _size_after_cut(size: int, lead: int, excess: int) -> int:
    """Tokens left of a prompt of `size` after `excess` were cut behind the first `lead`."""
    return size - max(min(size - lead, excess), 0)


def _common_length(sequences: Sequence[Ids]) -> int:
    """Length of the longest common prefix."""
    limit = min(map(len, sequences))
    first, *others = (ids[:limit] for ids in sequences)
    for ids in others:
        different = ids[:limit] != first[:limit]
        if different.any():
            limit = int(different.argmax())
    return limit


def _ids(
    texts: list[str], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> Iterator[Ids | Exception]:
    """Tokens of each text, or why there are none."""

    backend = _backend(tokenizer) if _is_plain(tokenizer) else None

    def of(some: list[str]) -> list[Ids]:
        if backend is None:
            found = tokenizer(
                some, add_special_tokens=add_special_tokens, return_attention_mask=False,
                verbose=False,  # lengths beyond the model's are cut, and counted, later
            )['input_ids']
        else:  # which does not keep track of where in the text each token is
            found = [one.ids for one in backend.encode_batch_fast(
                some, add_special_tokens=add_special_tokens)]
        return [np.asarray(ids, np.int32) for ids in found]

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


def _backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer | None:
    """What is not Python in a tokenizer, set as for each call, whatever the last one left."""
    backend = getattr(tokenizer, 'backend_tokenizer', None)
    if backend is None:
        return None
    # Set only where it differs, as another thread may be using it.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _is_plain(tokenizer: Tokenizer) -> bool:
    """Whether tokens are those of the backend, as its class does nothing else to texts."""
    kind, plain = type(tokenizer), transformers.PreTrainedTokenizerFast
    return issubclass(kind, plain) and all(
        getattr(kind, name) is getattr(plain, name) for name in ('__call__', '_encode_plus'))


def _without_end(ids: Ids, last: int) -> Ids:
    """Without this token at the end: spelt out in the text, added by the tokenizer, or both."""
    end = len(ids)
    while end and ids[end - 1] == last:
        end -= 1
    return ids[:end]
