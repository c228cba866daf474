"""What bfloat16 does to scores: its table by hand, and the command on a tiny model."""

import math

import numpy as np
import pytest

from benchmarks import precision
from qrm.data import demo
from qrm.data.comparisons import DataError
from tests.helpers import small_reward_model

A_WINS = np.array([[0.0, 1.0], [0.0, 0.0]])


def test_changes_by_hand():
    rewards = {'float32': [np.float32([1, 3]), np.float32([0, 2, 2])],
               'other': [np.float32([2, 1]), np.float32([0, 2, 3])]}
    same, other = precision.changes(rewards, [A_WINS, np.zeros((3, 3))])
    assert (same['rms'], same['largest'], same['flipped']) == (0.0, 0.0, 0.0)
    assert same['rank'] == pytest.approx(1.0, abs=1e-12)
    # 1, 3, 0, 2, 2 has mean 1.6 and variance (18 - 12.8) / 5; changes are 1, -2, 0, 0, 1.
    std = math.sqrt(5.2 / 5.0)
    assert other['rms'] == pytest.approx(math.sqrt(6.0 / 5.0) / std)
    assert other['largest'] == pytest.approx(2.0 / std)
    # The first pair turns, and the equal pair of the three becomes unequal.
    assert (other['flipped'], other['pairs']) == (0.5, 4)
    # Ranks 2, 5, 1, 3.5, 3.5 and 3.5, 2, 1, 3.5, 5.
    assert other['rank'] == pytest.approx(
        np.corrcoef([2, 5, 1, 3.5, 3.5], [3.5, 2, 1, 3.5, 5])[0, 1])
    assert (same['accuracy'], other['accuracy']) == (0.0, 1.0)
    with pytest.raises(DataError, match='all 2 rewards are equal, expected some'):
        precision.changes({'float32': [np.ones(2, np.float32)]}, [A_WINS])


def test_a_model_computes_in_all_ways():
    comparisons = demo.generate('helpful', 'train', 12, 0).comparisons
    found = {name: model.score_comparisons(comparisons)[0].rewards
             for name, model in precision.variants(small_reward_model(comparisons)).items()}
    rows = {row['name']: row for row in precision.changes(
        found, [c.preference_matrix() for c in comparisons])}
    assert list(rows) == ['float32', 'bfloat16', 'bfloat16, parameters too',
                          'float32, rows of 64', 'bfloat16, rows of 64',
                          'bfloat16, parameters too, rows of 64']
    assert rows['float32, rows of 64']['largest'] < 1e-4
    for name in ('bfloat16', 'bfloat16, parameters too'):
        assert 1e-4 < rows[name]['rms'] < 0.2
    assert len(precision.lines(list(rows.values()))) == 7
