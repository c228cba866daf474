"""Scores of several responses from what is said of each two, in closed form."""

import numpy as np
import pytest
from scipy.special import expit, logit

from qrm.data import orders
from qrm.rewards import pairwise

REWARDS = np.array([1.5, -0.25, 0.0, -3.0])


def outputs_of(first):
    """Raw outputs of orders with log odds [K, K] that the first response is preferred."""
    return np.array([[first[i, j] / 2.0] for i, j in orders.of(len(first))], np.float32)


def wins_of(rewards):
    return expit(rewards[:, None] - rewards[None, :])


def test_both_orders_of_a_pair_by_hand():
    # Where 0 stands first it has log odds 3, where 1 does that has log odds -1.
    outputs = np.array([[1.5], [-0.5]])
    np.testing.assert_allclose(pairwise.log_odds(outputs)[..., 0], [[0, 2], [-2, 0]])
    np.testing.assert_allclose(pairwise.in_both_orders(outputs), [[[0, 0], [3, 1]],
                                                                  [[-1, -3], [0, 0]]])
    np.testing.assert_allclose(pairwise.rewards(outputs)[:, 0], [1, -1])
    np.testing.assert_allclose(pairwise.win_probabilities(outputs),
                               [[0.5, expit(2)], [expit(-2), 0.5]])


def test_what_the_place_says_cancels():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(12, 2))
    np.testing.assert_allclose(pairwise.log_odds(outputs + 0.7), pairwise.log_odds(outputs))
    found = pairwise.in_both_orders(outputs + 0.7)[0, 1] - pairwise.in_both_orders(outputs)[0, 1]
    np.testing.assert_allclose(found, [1.4, -1.4])


def test_flips_and_the_worth_of_the_first_place():
    both = np.array([[2.0, 1.0], [1.0, -3.0], [-1.0, -1.0], [0.0, 0.5], [0.0, 0.0]])
    assert pairwise.flips(both).tolist() == [False, True, False, True, False]
    np.testing.assert_allclose(pairwise.first_log_odds(both), [0.5, 2.0, 0.0, -0.25, 0.0])


def test_rewards_are_given_back():
    outputs = outputs_of(REWARDS[:, None] - REWARDS[None, :])
    centred = REWARDS - REWARDS.mean()
    np.testing.assert_allclose(pairwise.rewards(outputs)[:, 0], centred, atol=1e-6)
    found = pairwise.bradley_terry(wins_of(REWARDS))
    np.testing.assert_allclose(found.scores, centred, atol=1e-9)
    assert found.limited == 0
    by_hand = [np.mean([wins_of(REWARDS)[i, j] for j in range(4) if j != i]) for i in range(4)]
    np.testing.assert_allclose(pairwise.tournament(wins_of(REWARDS)), by_hand)


def test_of_two_responses():
    wins = np.array([[0.5, 0.8], [0.2, 0.5]])
    np.testing.assert_allclose(pairwise.tournament(wins), [0.8, 0.2])
    np.testing.assert_allclose(
        pairwise.bradley_terry(wins).scores, [logit(0.8) / 2, -logit(0.8) / 2], atol=1e-12)


def test_a_cycle_has_equal_scores():
    wins = np.full((3, 3), 0.5)
    for i in range(3):
        wins[i, (i + 1) % 3], wins[(i + 1) % 3, i] = 0.9, 0.1
    np.testing.assert_allclose(pairwise.bradley_terry(wins).scores, 0.0, atol=1e-12)
    np.testing.assert_allclose(pairwise.tournament(wins), 0.5)
    np.testing.assert_allclose(pairwise.rewards(outputs_of(logit(wins))), 0.0, atol=1e-6)


def test_scores_are_where_wins_are_as_many_as_expected():
    """The likelihood equations: sum_j wins_ij = sum_j sigma(r_i - r_j)."""
    rng = np.random.default_rng(1)
    for k in (3, 6, 20):
        upper = np.triu(rng.uniform(0.001, 0.999, (k, k)), 1)
        wins = upper + np.tril(1.0 - upper.T, -1) + np.eye(k) / 2
        scores = pairwise.bradley_terry(wins).scores
        np.testing.assert_allclose(wins.sum(axis=1), wins_of(scores).sum(axis=1), atol=1e-9)
        assert scores.sum() == pytest.approx(0.0, abs=1e-9)


def test_who_always_wins_has_a_finite_score_and_is_counted():
    found = pairwise.bradley_terry(np.array([[0.5, 1.0], [0.0, 0.5]]))
    assert found.limited == 1
    np.testing.assert_allclose(found.scores, np.array([1, -1]) * logit(1 - 1e-6) / 2, rtol=1e-6)
    k = 6
    wins = np.triu(np.ones((k, k)), 1) + np.eye(k) / 2
    found = pairwise.bradley_terry(wins)
    assert found.limited == 15
    assert np.isfinite(found.scores).all()
    assert (np.diff(found.scores) < -1.0).all()
    limited = np.clip(wins, pairwise.LEAST, 1 - pairwise.LEAST)
    np.testing.assert_allclose(limited.sum(axis=1), wins_of(found.scores).sum(axis=1), atol=1e-8)


def test_what_is_no_tournament_is_refused():
    with pytest.raises(ValueError, match="aggregate 'elo', expected one of"):
        pairwise.aggregate(np.full((2, 2), 0.5), 'elo')
    for aggregate in (pairwise.tournament, pairwise.bradley_terry):
        with pytest.raises(ValueError, match=r'shape \(1, 1\), expected \[K, K\] with K >= 2'):
            aggregate(np.full((1, 1), 0.5))
    with pytest.raises(ValueError, match=r'5 orders, expected K \(K - 1\)'):
        pairwise.rewards(np.zeros((5, 1)))
    with pytest.raises(ValueError, match='0 orders'):
        pairwise.rewards(np.zeros((0, 1)))
