"""Metrics of held-out pairs against numbers worked out by hand and scikit-learn."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss

from qrm import metrics
from qrm.heads import HeadConfig
from tests.helpers import encoded, loss_config


def predictions(chosen, rejected, *, objective='bradley_terry', preference=None):
    """Predictions of pairs from quantiles [n, N]."""
    items = [encoded(i, 2, (2, 2), seed=i, preference=preference) for i in range(len(chosen))]
    quantiles = [np.array(pair, np.float32) for pair in zip(chosen, rejected, strict=True)]
    head = HeadConfig('quantile', quantiles[0].shape[1])
    return metrics.predictions_of(items, quantiles, head, loss_config(objective=objective))


def test_metrics_worked_out_by_hand():
    p = predictions([[2.0], [1.0], [0.0]], [[1.0], [1.0], [3.0]])
    found = metrics.summarise(p)
    assert found['n'] == 3
    assert found['accuracy'] == pytest.approx((1 + 0.5 + 0) / 3)
    # Of nine (chosen, rejected): 2 beats 1, 1; 1 ties 1, 1; 0 beats none.
    assert found['auc'] == pytest.approx((2 + 2 * 0.5) / 9)
    assert found['margin'] == pytest.approx((1 + 0 - 3) / 3)
    assert found['reward_mean'] == pytest.approx(8 / 6)
    assert found['reward_std'] == pytest.approx(np.std([2, 1, 0, 1, 1, 3]))
    assert found['nll'] == pytest.approx(-np.mean(np.log(expit([1, 0, -3]))), rel=1e-6)
    assert found['crossing_rate'] == 0.0


def test_crossing_rate_counts_neighbours_in_the_wrong_order():
    p = predictions([[0, 1, 2], [0, 2, 1]], [[2, 1, 0], [1, 1, 1]])
    assert metrics.summarise(p)['crossing_rate'] == pytest.approx(3 / 8)


def test_reward_is_the_mean_of_the_quantiles():
    p = predictions([[0.0, 4.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 3.0]])
    np.testing.assert_allclose(p.rewards, [[2.0, 1.0], [1.0, 1.5]])
    np.testing.assert_allclose(p.taus, [0.25, 0.75])


def test_soft_labels_give_the_cross_entropy():
    p = predictions([[1.0], [0.0]], [[0.0], [2.0]], preference=[[0, 0.8], [0.2, 0]])
    win = expit([1.0, -2.0])
    expected = np.mean([log_loss([1, 0], [w, w], sample_weight=[0.8, 0.2], labels=[0, 1])
                        for w in win])
    assert metrics.negative_log_likelihood(p) == pytest.approx(expected, rel=1e-6)


def test_the_distributional_objective_has_its_own_win_probability():
    chosen, rejected = [[0.0, 2.0]], [[1.0, 1.0]]
    plain = predictions(chosen, rejected)
    distributional = predictions(chosen, rejected, objective='distributional_bradley_terry')
    assert np.exp(plain.log_win[0]) == pytest.approx(0.5)
    expected = np.mean(expit([-1, -1, 1, 1]))
    assert np.exp(distributional.log_win[0]) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(np.exp(distributional.log_win) + np.exp(distributional.log_loss), 1,
                               rtol=1e-6)


def test_rankings_give_a_pair_for_each_decided_two_and_ties_none():
    items = [encoded('a', 2, (2, 2, 2)),
             encoded('b', 2, (2, 2), preference=[[0, 0.5], [0.5, 0]]),
             encoded('c', 2, (2, 2), preference=[[0, 0], [1, 0]])]
    quantiles = [np.array([[3.0], [2.0], [1.0]], np.float32), np.zeros((2, 1), np.float32),
                 np.array([[5.0], [7.0]], np.float32)]
    p = metrics.predictions_of(items, quantiles, HeadConfig('scalar'), loss_config('scalar'))
    assert p.ids.tolist() == ['a', 'a', 'a', 'c']
    assert p.groups.tolist() == [0, 0, 0, 2]
    np.testing.assert_array_equal(p.chosen[:, 0], [3, 3, 2, 7])
    np.testing.assert_array_equal(p.rejected[:, 0], [2, 1, 1, 5])
    assert p.comparisons.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert p.pairs.tolist() == [[0, 1], [0, 2], [1, 2], [6, 5]]
    assert p.lengths.tolist() == [2] * 7


def test_calibration_error_worked_out_by_hand():
    # Confidences .9 .9 .6 .6 in two bins of 10; right, wrong, right, tie-free wrong.
    win = np.array([0.9, 0.1, 0.6, 0.6])
    # Bin of .9: accuracy .5, confidence .9; bin of .6: accuracy 1, confidence .6.
    assert metrics.expected_calibration_error(win) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    assert metrics.expected_calibration_error(np.array([0.5, 1.0])) == pytest.approx(0.0)


def test_calibrated_predictions_have_a_small_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1.0, 200_000)
    win = np.where(rng.random(p.size) < p, p, 1 - p)
    assert metrics.expected_calibration_error(win) < 0.005


def test_predictions_survive_saving(tmp_path):
    p = predictions([[0.0, 4.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 3.0]])
    path = str(tmp_path / 'predictions.npz')
    metrics.save_predictions(path, p)
    for name, value in metrics.load_predictions(path)._asdict().items():
        np.testing.assert_array_equal(value, getattr(p, name))
