"""Real text that more than one judge has judged: people, reward models, runs of one model.

`preferences` reads what judges say of a comparison as one judgement. Here each judge is kept, so
that it is known on what they disagree.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qrm.data.comparisons import Comparison, DataError, in_a_line

# Files of min-seong-kim/QR-RLHF: workload -> name, pairs.
PAPER_FILES = {'helpful': 'helpful_valid.json', 'harmless': 'harmless_valid.json'}

_PROMETHEUS = re.compile(r'###The instruction to evaluate:\n(.*?)\n\s*###Response to evaluate:\n'
                         r'(.*?)\n\s*###Reference Answer', re.DOTALL)


class Panel(NamedTuple):
    """Comparisons of one response or two, and what each of several judges says of them.

    Attributes:
      name: key in results.
      judges: who they are, in words.
      comparisons: with the mean judgement: the share of judges that prefer a response, which is
        its rating, or the mean of its ratings.
      spread: id -> standard deviation of the judges' numbers.
      disputed: id -> whether they differ at all; None if they always do.
    """

    name: str
    judges: str
    comparisons: list[Comparison]
    spread: dict[str, float]
    disputed: dict[str, bool] | None


def read_pandalm(path: str) -> Panel:
    """PandaLM's test set (Wang et al. 2023): two responses, three people who choose or tie.

    Raises:
      DataError: the file is not there, or not that.
    """

    def read(row: dict[str, Any], where: str) -> tuple[Comparison, np.ndarray]:
        votes = [row[f'annotator{i}'] for i in (1, 2, 3)]
        if any(vote not in (0, 1, 2) for vote in votes):
            raise ValueError(f'annotators {votes}, expected 0 (a tie), 1 or 2')
        # Of one response the share of judges that prefer it; half of those who call it a tie.
        shares = np.array([[0.5, 1.0, 0.0][vote] for vote in votes])
        # A few texts that are the word True are the value in the file.
        first, second, task, given = (
            str(row[key]) for key in ('response1', 'response2', 'instruction', 'input'))
        question = f'{task}\n{given}' if given else task
        mean = float(shares.mean())
        return Comparison(
            str(row['idx']), _opening(question), (f' {first}', f' {second}'), question,
            preference=mean, ratings=(mean, 1.0 - mean), where=where), shares

    rows = _rows(path, read, 'the test set of PandaLM')
    return Panel('pandalm', 'three people', [c for c, _ in rows],
                 {c.id: float(shares.std()) for c, shares in rows},
                 {c.id: bool(np.ptp(shares)) for c, shares in rows})


def read_prometheus(path: str) -> Panel:
    """A benchmark file of Prometheus (Kim et al. 2024): a response, three ratings from 1 to 5.

    Raises:
      DataError: the file is not there, or not that.
    """

    def read(row: dict[str, Any], where: str) -> tuple[Comparison, np.ndarray]:
        found = _PROMETHEUS.search(row['instruction'])
        if not found:
            raise ValueError('no instruction and response in the template of Prometheus')
        ratings = np.array(row['gpt4_score'], np.float64)
        if ratings.ndim != 1 or len(ratings) < 2 or not np.isfinite(ratings).all():
            raise ValueError(f"gpt4_score {row['gpt4_score']}, expected several ratings")
        question, response = (text.strip() for text in found.groups())
        return Comparison(where, _opening(question), (f' {response}',), question,
                          ratings=(float(ratings.mean()),), where=where), ratings

    rows = _rows(path, read, 'a benchmark of Prometheus')
    return Panel('prometheus', 'three runs of GPT-4', [c for c, _ in rows],
                 {c.id: float(ratings.std()) for c, ratings in rows},
                 {c.id: bool(np.ptp(ratings)) for c, ratings in rows})


def read_paper(folder: str, workload: str) -> Panel:
    """The paper's validation pairs, with the scores that ten reward models give both sides.

    Raises:
      DataError: they are not there, or not what they were.
    """

    def read(row: dict[str, Any], where: str) -> tuple[Comparison, np.ndarray]:
        (*turns, chosen), (*others, rejected) = row['chosen'], row['rejected']
        margins = np.subtract(row['chosen score list'], row['rejected score list'])
        if turns != others or len(turns) % 2 != 1 or margins.ndim != 1:
            raise ValueError('sides of different dialogues, or no scores')
        prompt = ''.join(f'\n\n{("Human", "Assistant")[i % 2]}: {turn}'
                         for i, turn in enumerate(turns)) + '\n\nAssistant:'
        return Comparison(where, prompt, (f' {chosen}', f' {rejected}'), turns[0], ranks=(0, 1),
                          where=where), margins.astype(np.float64)

    path = os.path.join(folder, PAPER_FILES[workload])
    rows = _rows(path, read, 'the published validation pairs')
    return Panel(f'paper_{workload}', 'ten reward models', [c for c, _ in rows],
                 {c.id: float(margins.std()) for c, margins in rows}, None)


def _opening(question: str) -> str:
    """A question as a dialogue of Anthropic's HH begins."""
    return f'\n\nHuman: {question}\n\nAssistant:'


def _rows(path: str, read: Callable[[dict[str, Any], str], tuple[Comparison, np.ndarray]],
          what: str) -> list[tuple[Comparison, np.ndarray]]:
    """The rows of a JSON array, as a function reads them.

    Raises:
      DataError: names the file and the row.
    """
    where = path
    try:
        with open(path, encoding='utf-8') as file:
            rows = json.load(file)
        if not isinstance(rows, list) or not rows:
            raise ValueError('no array of rows')
        found = []
        for i, row in enumerate(rows):
            where = f'{path}[{i}]'
            found.append(read(row, where))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'{where}: not {what} ({in_a_line(error)})') from error
    return found
