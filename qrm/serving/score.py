"""Scoring files of comparisons with a reward model."""

import json
import os

import numpy as np

from qrm.data.comparisons import DataError, read_comparisons
from qrm.training.reward_model import RewardModel
from qrm.training.workdir import write_text


def score_file(model: RewardModel, source: str, target: str) -> str:
    """Scores every row of a JSON Lines file, and writes one row for each, in order.

    A row has `prompt` + `response`, `prompt` + `responses` or `chosen` + `rejected`; its scores
    are `{"rewards": [K], "quantiles": [K][N]}` in the order of the responses, chosen first.

    Args:
      model: the reward model.
      source: `.jsonl` or `.jsonl.gz` file to read.
      target: file to write; it appears when all rows are scored.

    Returns:
      A line that says what was done.

    Raises:
      DataError: a row that cannot be scored, named by file and line, or a target that cannot be
        written; nothing is written.
    """
    _check_target(source, target)
    comparisons = read_comparisons(source)
    scores, cut = model.score_comparisons(comparisons)
    write_text(target, ''.join(
        json.dumps({'rewards': r.tolist(), 'quantiles': q.tolist()}, allow_nan=False) + '\n'
        for r, q in zip(scores.rewards, scores.quantiles, strict=True)
    ))
    crossed = np.concatenate([np.diff(q, axis=1) < 0 for q in scores.quantiles])
    crossing = f', {crossed.mean():.1%} of neighbouring quantiles cross' if crossed.size else ''
    count = sum(map(len, scores.rewards))
    return (f'{target}: {len(comparisons)} rows, {count} responses scored, {cut} dialogues cut to '
            f'{model.reading.max_length} tokens{crossing}')


def _check_target(source: str, target: str) -> None:
    """Checks before anything is scored that the result can be written and loses nothing."""
    if os.path.exists(target):
        if os.path.exists(source) and os.path.samefile(source, target):
            raise DataError(f'{target}: is the file to be scored, expected another one to write')
        if not os.path.isfile(target):
            raise DataError(f'{target}: cannot be written, expected a file')
    try:
        with open(target + '.tmp', 'w', encoding='utf-8'):
            pass
        os.remove(target + '.tmp')
    except OSError as error:
        raise DataError(f'{target}: cannot be written ({error.strerror}), expected a file in a '
                        'folder that exists') from error
