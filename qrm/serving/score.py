"""Scoring files of comparisons with a reward model."""

import collections
import gzip
import json
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from qrm.data.comparisons import DataError
from qrm.data.sources import read_comparisons
from qrm.data.templates import unread_keys
from qrm.training.reward_model import RewardModel
from qrm.training.workdir import write_bytes


def score_file(model: RewardModel, source: str, target: str) -> str:
    """Scores every row of a file, and writes a line for each, in order.

    A row has `prompt` + `response`, `prompt` + `responses` or `chosen` + `rejected`; its scores
    are `{"rewards": [K], "quantiles": [K][N]}` in the order of the responses, chosen first.

    Args:
      model: the reward model.
      source: file of rows to read, see `files.read_rows`.
      target: file to write, with gzip if it ends in `.gz`; it appears when all rows are scored.

    Returns:
      A line that says what was done, and one for each remark on rows.

    Raises:
      DataError: a row that cannot be scored, named by file and line, or a target that cannot be
        written; nothing is written.
    """
    check_target(source, target)
    comparisons = read_comparisons(source)
    scores, cut = model.score_comparisons(comparisons)
    write_rows(target, ({'rewards': r.tolist(), 'quantiles': q.tolist()}
                        for r, q in zip(scores.rewards, scores.quantiles, strict=True)))
    crossed = np.concatenate([np.diff(q, axis=1) < 0 for q in scores.quantiles])
    crossing = f', {crossed.mean():.1%} of neighbouring quantiles cross' if crossed.size else ''
    count = sum(map(len, scores.rewards))
    notes = collections.Counter(
        remark for comparison in comparisons for remark in (*comparison.remarks, *(
            f'{key} not used by the chat template'
            for key in unread_keys(comparison, model.tokenizer))))
    return '\n'.join([
        f'{target}: {len(comparisons)} rows, {count} responses scored, {cut} dialogues cut to '
        f'{model.reading.max_length} tokens{crossing}',
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
