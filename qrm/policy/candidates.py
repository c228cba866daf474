"""Candidates for best-of-N: a file of prompts, answered N times each by a language model."""

import collections
import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qrm.data.comparisons import Comparison, DataError, MalformedRow
from qrm.data.rows import as_chat, as_row, parse_prompt, parse_row
from qrm.data.sources import read_comparisons
from qrm.data.tokens import Tokenizer, encode_prompts, load_tokenizer
from qrm.models import adapters, families, weights
from qrm.models.transformer import Transformer
from qrm.policy.sampling import Sample, Sampling, sample
from qrm.serving.score import check_target, write_rows
from qrm.training.reward_model import check_vocabulary

_TOLD = 100  # prompts, after which their number is printed


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder with its output embedding, and its way of reading and ending texts.

    Attributes:
      transformer: what is computed.
      params: of it.
      tokenizer: tokenizer.
      stops: tokens that end an answer.
    """

    transformer: Transformer
    params: Any
    tokenizer: Tokenizer
    stops: tuple[int, ...]


def load(path: str, *, dtype: str = 'float32', date: str = '') -> LanguageModel:
    """Loads a language model of transformers, or an adapter to one, see `adapters`.

    It stops at EOS of the tokenizer and at all that generation_config.json, or without it
    config.json, names as such.

    Args:
      path: folder or hub name.
      dtype: of tables, kernels and what is computed, 'float32' or 'bfloat16'.
      date: the day (YYYY-MM-DD) that its chat template prints if it prints any; '': today.

    Raises:
      DataError: there is no language model, or it cannot be used.
    """
    try:
        now = datetime.datetime.fromisoformat(date) if date else None
    except ValueError as error:
        raise DataError(f'date={date!r}, expected a day as 2024-07-26') from error
    source = adapters.find(path)
    settings = weights.read_settings(source.model)
    if not families.architecture(settings, path).causal:
        raise DataError(f'{path}: a {settings["model_type"]} is an encoder, which has no next '
                        'token; expected a decoder')
    pretrained = adapters.load_pretrained(source, output=True, dtype=dtype)
    if pretrained.head is not None:
        raise DataError(f'{path}: has a reward head, expected a language model')
    tokenizer = load_tokenizer(source.tokenizer, now)
    check_vocabulary(tokenizer, pretrained.architecture)
    return LanguageModel(Transformer(pretrained.architecture, jnp.dtype(dtype)),
                         pretrained.backbone, tokenizer,
                         _stops(source.model, settings, tokenizer))


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
        raise DataError(f'max_length={max_length} with max_new_tokens={sampling.max_new_tokens}, '
                        f'but the model has {positions} positions; expected room for a prompt')
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
        texts.append(_text(model.tokenizer, prompt, one.tokens[:end]))
        notes['blank response'] += not texts[-1].strip()
    row = as_row(dataclasses.replace(comparison, responses=tuple(texts)))
    try:
        read = parse_row(row, comparison.where)
        if isinstance(read.prompt, str) and read.responses != tuple(texts):
            # All begin with the prompt, and would be read as whole dialogues: they are made such.
            row['responses'] = [comparison.prompt + text for text in texts]
    except MalformedRow:
        notes['row that `qrm score` refuses'] += 1
    for note in [note for note, count in notes.items() if not count]:
        del notes[note]
    if details:
        row |= {'tokens': [len(one.tokens) for one in samples],
                'truncated': [bool(one.truncated) for one in samples],
                'log_probs': [float(one.log_probs.sum()) for one in samples],
                'sampled_log_probs': [float(one.sampled_log_probs.sum()) for one in samples]}
    return row


def _text(tokenizer: Tokenizer, prompt: np.ndarray, tokens: np.ndarray) -> str:
    """The text that tokens add to a prompt; some tokenizers leave out a blank at the beginning."""

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True,
                                clean_up_tokenization_spaces=False)

    before, whole = text(prompt), text(np.concatenate([prompt, tokens]))
    return whole[len(before):] if whole.startswith(before) else text(tokens)


def _stops(folder: str, settings: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer, of a model in a folder."""
    path = os.path.join(folder, 'generation_config.json')
    if os.path.isfile(path):
        settings = weights.read_json(path)
    else:
        path = os.path.join(folder, 'config.json')
    given = settings.get('eos_token_id')
    found = given if isinstance(given, list) else [given]
    for token in found:
        if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
            raise DataError(f'{path}: eos_token_id={json.dumps(given)}, expected a token or a list '
                            'of tokens')
    return tuple(sorted({*found, tokenizer.eos_token_id} - {None}))
