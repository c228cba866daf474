"""Scoring files of comparisons with a reward model."""

import collections
import gzip
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qrm.data.comparisons import Comparison, DataError
from qrm.data.sources import read_comparisons
from qrm.data.templates import unread_keys
from qrm.rewards import pairwise
from qrm.training.reward_model import RewardModel
from qrm.training.workdir import write_bytes


def score_file(model: RewardModel, source: str, target: str, aggregate: str = '') -> str:
    """Scores every row of a file, and writes a line for each, in order.

    A row has `prompt` + `response`, `prompt` + `responses` or `chosen` + `rejected`; its scores
    are `{"rewards": [K], "quantiles": [K][N]}` in the order of the responses, chosen first; those
    of a model that is normalised are, and `"normalised"` says by which `mean` and `std`. A
    pairwise model compares the responses of a row, K >= 2, and its scores are
    `{"rewards": [K], "wins": [K][K]}` with win probabilities.

    Args:
      model: the reward model.
      source: file of rows to read, see `files.read_rows`.
      target: file to write, with gzip if it ends in `.gz`; it appears when all rows are scored.
      aggregate: of a pairwise model, how win probabilities become scores, one of
        `pairwise.AGGREGATES`; '': the first of them.

    Returns:
      A line that says what was done, and one for each remark on rows.

    Raises:
      DataError: a row that cannot be scored, named by file and line, or a target that cannot be
        written; nothing is written. Or an aggregate of a model that is not pairwise.
    """
    if aggregate and not model.network.head.pairwise:
        raise DataError(f'aggregate {aggregate!r} of a model with the {model.network.head.name} '
                        'head, which scores each response alone; expected none')
    check_target(source, target)
    comparisons = read_comparisons(source)
    if model.network.head.pairwise:
        lines, cut, remark = _compared(model, comparisons, aggregate or pairwise.AGGREGATES[0])
    else:
        lines, cut, remark = _scored(model, comparisons)
    write_rows(target, lines)
    count = sum(len(line['rewards']) for line in lines)
    notes = collections.Counter(
        remark for comparison in comparisons for remark in (*comparison.remarks, *(
            f'{key} not used by the chat template'
            for key in unread_keys(comparison, model.tokenizer))))
    return '\n'.join([
        f'{target}: {len(comparisons)} rows, {count} responses scored, {cut} dialogues cut to '
        f'{model.reading.max_length} tokens{remark}',
        *(f'  note {number}: {note}' for note, number in notes.items())])


def write_rows(target: str, rows: Iterable[Any]) -> None:
    """Writes a line of JSON for each row, with gzip if the name ends in `.gz`; all or nothing."""
    content = ''.join(json.dumps(row, allow_nan=False) + '\n' for row in rows).encode()
    write_bytes(target, gzip.compress(content, mtime=0) if target.endswith('.gz') else content)


def check_target(source: str, target: str) -> None:
    """Checks before anything is computed that the result can be written and loses nothing.

    Raises:
      DataError: it cannot.
    """
    if os.path.exists(target):
        if os.path.exists(source) and os.path.samefile(source, target):
            raise DataError(f'{target}: is the file to be read, expected another one to write')
        if not os.path.isfile(target):
            raise DataError(f'{target}: cannot be written, expected a file')
    if not target.endswith(('.jsonl', '.jsonl.gz')):
        raise DataError(f'{target}: cannot be written, expected a name that ends in .jsonl or '
                        '.jsonl.gz')
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(target) or '.'):
            pass
    except OSError as error:
        raise DataError(f'{target}: cannot be written ({error.strerror}), expected a file in a '
                        'folder that exists') from error


def _scored(model: RewardModel, comparisons: Sequence[Comparison]
            ) -> tuple[list[dict[str, Any]], int, str]:
    """A line for each comparison, how many dialogues were cut, and a remark."""
    scores, cut = model.score_comparisons(comparisons)
    by = model.normalisation
    said = {'normalised': by.as_dict()} if by else {}
    lines = [{'rewards': r.tolist(), 'quantiles': q.tolist(), **said}
             for r, q in zip(scores.rewards, scores.quantiles, strict=True)]
    crossed = np.concatenate([np.diff(q, axis=1) < 0 for q in scores.quantiles])
    crossing = f', {crossed.mean():.1%} of neighbouring quantiles cross' if crossed.size else ''
    return lines, cut, crossing + (f', normalised: {by}' if by else '')


def _compared(model: RewardModel, comparisons: Sequence[Comparison], kind: str
              ) -> tuple[list[dict[str, Any]], int, str]:
    """The same of a pairwise model, by an aggregate of this kind."""
    wins, cut = model.win_probabilities(comparisons)
    found = [pairwise.aggregate(one, kind) for one in wins]
    limited = sum(one.limited for one in found)
    return ([{'rewards': one.scores.tolist(), 'wins': own.tolist()}
             for one, own in zip(found, wins, strict=True)], cut,
            f', by {kind} of win probabilities' + (
                f', of which {limited} below {pairwise.LEAST:g} were taken for it' * bool(limited)))
