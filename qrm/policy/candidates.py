"""Candidates for best-of-N: a file of prompts, answered N times each by a language model."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qrm.data.comparisons import Comparison, DataError, MalformedRow
from qrm.data.rows import as_chat, as_row, parse_prompt, parse_row
from qrm.data.sources import read_comparisons
from qrm.data.tokens import Tokenizer, encode_prompts
from qrm.policy.language_model import LanguageModel
from qrm.policy.sampling import Sample, Sampling, sample
from qrm.serving.score import check_target, write_rows

_TOLD = 100  # prompts, after which their number is printed


def sample_file(
    model: LanguageModel, source: str, target: str, sampling: Sampling, *, seed: int,
    rows: int, max_length: int = 0, as_chats: bool = False, details: bool = False,
) -> str:
    """Answers every prompt of a file, and writes a row for each, in order, as `qrm score` reads it.

    A prompt is that of a row of any form, with or without responses, which are not read. What is
    drawn depends on the number of the row, from 0. Answers end before their stop; special tokens
    in them are left out.

    Args:
      model: the language model.
      source: file of rows to read, see `files.read_rows`.
      target: file to write, with gzip if it ends in `.gz`; it appears when all is answered.
      sampling: how, without stops.
      seed, rows: see `sampling.sample`.
      max_length: tokens of prompt and answer, longer prompts are cut from the left; 0: the model's
        number of positions.
      as_chats: texts are read and written as chats, see `rows.as_chat`.
      details: rows also have of each answer the number of its tokens, whether it was cut, and the
        sum of its log-probabilities under the model and as drawn.

    Returns:
      A line that says what was done, and one for each remark on rows.

    Raises:
      DataError: a row that cannot be read, named by file and line, or a target that cannot be
        written; nothing is written.
      NonFiniteLoss: see `sampling.sample`.
    """
    check_target(source, target)
    positions = model.transformer.architecture.max_positions
    longest = (max_length or positions) - sampling.max_new_tokens
    if not 0 < longest <= positions - sampling.max_new_tokens:
        limit = f'--max_length={max_length} with ' if max_length else ''
        raise DataError(f'{limit}--max_new_tokens={sampling.max_new_tokens}, but the model has '
                        f'{positions} positions; expected room for a prompt')
    comparisons = read_comparisons(source, parse_prompt)
    if as_chats:
        comparisons = [as_chat(comparison) for comparison in comparisons]
    prompts, cut = encode_prompts(comparisons, model.tokenizer, longest)
    notes = collections.Counter(remark for c in comparisons for remark in c.remarks)
    sampling = dataclasses.replace(sampling, stops=model.stops)
    found: list[Any] = [None] * len(prompts)
    samples: list[Sample] = []
    for done, (place, own) in enumerate(sample(
            model.transformer, model.params, prompts, sampling, seed=seed, rows=rows), start=1):
        found[place] = _row(comparisons[place], prompts[place], own, model, notes, details)
        samples += own
        if done % _TOLD == 0:
            print(f'{done} of {len(prompts)} prompts answered', flush=True)
    write_rows(target, found)
    return '\n'.join([
        f'{target}: {len(prompts)} prompts, {len(samples)} responses of '
        f'{sum(len(one.tokens) for one in samples)} tokens, '
        f'{sum(one.truncated for one in samples)} truncated at {sampling.max_new_tokens} tokens, '
        f'{cut} prompts cut to {longest} tokens',
        *(f'  note {number}: {note}' for note, number in notes.items())])


def readable_row(comparison: Comparison) -> tuple[dict[str, Any], bool]:
    """A row of a comparison whose prompt is continued, and whether it is read as this one again."""
    row = as_row(comparison)
    texts = comparison.responses
    wanted = texts if isinstance(comparison.prompt, str) else tuple(
        ({'role': 'assistant', 'content': text},) if isinstance(text, str) else text
        for text in texts)
    try:
        read = parse_row(row, comparison.where)
        if isinstance(read.prompt, str) and read.responses != wanted:
            # All begin with the prompt, and would be read as whole dialogues: they are made such.
            row['responses'] = [comparison.prompt + text for text in texts]
            read = parse_row(row, comparison.where)
    except MalformedRow:
        return row, False
    return row, read.responses == wanted


def _row(
    comparison: Comparison, prompt: np.ndarray, samples: Sequence[Sample], model: LanguageModel,
    notes: collections.Counter[str], details: bool,
) -> dict[str, Any]:
    """What is written of a prompt; adds to the notes."""
    special = set(model.tokenizer.all_special_ids) | set(model.stops)
    texts = []
    for one in samples:
        end = len(one.tokens) - (not one.truncated)
        notes['special tokens in a response left out'] += bool(
            special & set(one.tokens[:end].tolist()))
        texts.append(text_of(model.tokenizer, prompt, one.tokens[:end]))
        notes['response truncated within a letter'] += bool(
            one.truncated and texts[-1].endswith('\ufffd'))
        notes['blank response'] += not texts[-1].strip()
    row, readable = readable_row(dataclasses.replace(comparison, responses=tuple(texts)))
    notes['row that `qrm score` refuses'] += not readable
    for note in [note for note, count in notes.items() if not count]:
        del notes[note]
    if details:
        row |= {'tokens': [len(one.tokens) for one in samples],
                'truncated': [bool(one.truncated) for one in samples],
                'log_probs': [float(one.log_probs.sum()) for one in samples],
                'sampled_log_probs': [float(one.sampled_log_probs.sum()) for one in samples]}
    return row


def text_of(tokenizer: Tokenizer, prompt: np.ndarray, tokens: np.ndarray) -> str:
    """The text that tokens add to a prompt; some tokenizers leave out a blank at the beginning."""

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True,
                                clean_up_tokenization_spaces=False)

    before, whole = text(prompt), text(np.concatenate([prompt, tokens]))
    return whole[len(before):] if whole.startswith(before) else text(tokens)
