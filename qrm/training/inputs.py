"""What a run reads before any weights: its tokenizer, and comparisons in tokens."""

import datetime
import os
import time
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import multihost_utils

from qrm.data import templates, tokens
from qrm.data.comparisons import DataError, DataReport
from qrm.data.encoded import EncodedTable
from qrm.data.records import Comparisons
from qrm.data.seen import Seen
from qrm.data.tokens import Reading, Tokenizer
from qrm.models import adapters
from qrm.models.architecture import Architecture
from qrm.training import reward_model


class Data(NamedTuple):
    """What a run reads, before any weights.

    Attributes:
      tokenizer, reading: how it reads texts.
      encoded: 'train', 'validation', 'test' -> comparisons in tokens.
      reports: the same keys -> what became of the rows.
      seen: by which the training comparisons are recognised.
      annotators: names of those whom the annotator head knows.
    """

    tokenizer: Tokenizer
    reading: Reading
    encoded: dict[str, EncodedTable]
    reports: dict[str, DataReport]
    seen: Seen
    annotators: tuple[str, ...] = ()


def find_tokenizer(
    config: Any, folder: str | None, comparisons: Comparisons, architecture: Architecture
) -> Tokenizer:
    """The tokenizer of a run: its own if it has one, the configured, or one that is trained.

    Args:
      config: of the run.
      folder: workdir whose tokenizer, if there is one, is used again.
      comparisons: to train one on.
      architecture: whose embedding has a row for each token.

    Raises:
      DataError: see `tokens.load_tokenizer` and `reward_model.check_vocabulary`.
    """
    saved = os.path.join(folder, 'tokenizer') if folder else ''
    if os.path.isdir(saved):
        tokenizer = tokens.load_tokenizer(saved)
    elif config.model.tokenizer or config.model.checkpoint:
        tokenizer = tokens.load_tokenizer(
            config.model.tokenizer or adapters.find(config.model.checkpoint).tokenizer,
            _common_time(), config.model.chat_template)
    else:
        tokenizer = tokens.train_tokenizer(tokens.texts_of(comparisons), architecture.vocab_size)
        templates.settle(tokenizer, _common_time(), config.model.chat_template)
    reward_model.check_vocabulary(tokenizer, architecture)
    return tokenizer


def nothing_left(kind: str, split: str, reports: dict[str, DataReport]) -> DataError:
    """What is said where no comparison with such a response is left in a split."""
    return DataError(f'no comparison with a {kind} response is left in the {split} split (rows '
                     'with the same opening question stay in one split)\n'
                     + format_reports(reports))


def format_reports(reports: dict[str, DataReport]) -> str:
    """The data reports of a run, for the terminal."""
    return '\n'.join(report.format() for report in reports.values())


def _common_time() -> datetime.datetime:
    """The time at which the first process is."""
    now = np.frombuffer(np.float64(time.time()).tobytes(), np.uint8)
    first = np.asarray(multihost_utils.broadcast_one_to_all(now), np.uint8)
    return datetime.datetime.fromtimestamp(np.frombuffer(first.tobytes(), np.float64).item())
