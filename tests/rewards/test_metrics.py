"""Metrics of held-out pairs against numbers worked out by hand and scikit-learn."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score

from qrm.data import orders
from qrm.data.encoded import Candidates
from qrm.rewards import metrics
from qrm.rewards.heads import HeadConfig
from qrm.rewards.losses import LossConfig
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
    assert found['accuracy'] == (1 + 0.5 + 0) / 3
    # Of nine (chosen, rejected): 2 beats 1, 1; 1 ties 1, 1; 0 beats none.
    assert found['auc'] == (2 + 2 * 0.5) / 9
    assert found['margin'] == pytest.approx((1 + 0 - 3) / 3)
    assert found['reward_mean'] == pytest.approx(8 / 6)
    assert found['reward_std'] == pytest.approx(np.std([2, 1, 0, 1, 1, 3]))
    assert found['nll'] == pytest.approx(-np.mean(np.log(expit([1, 0, -3]))), rel=1e-6)
    assert found['crossing_rate'] == 0.0


def test_area_under_the_curve_matches_sklearn():
    rng = np.random.default_rng(0)
    chosen, rejected = (rng.integers(i, 6, (50, 1)) for i in (1, 0))  # with many ties
    assert metrics.summarise(predictions(chosen, rejected))['auc'] == pytest.approx(
        roc_auc_score([1] * 50 + [0] * 50, np.concatenate([chosen, rejected])[:, 0]), abs=1e-12)


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
    assert metrics.summarise(p)['nll'] == pytest.approx(expected, rel=1e-6)


def test_the_distributional_objective_has_its_own_win_probability():
    chosen, rejected = [[0.0, 2.0]], [[1.0, 1.0]]
    plain = predictions(chosen, rejected)
    distributional = predictions(chosen, rejected, objective='distributional_bradley_terry')
    assert np.exp(plain.log_win[0]) == pytest.approx(0.5)
    expected = np.mean(expit([-1, -1, 1, 1]))
    assert np.exp(distributional.log_win[0]) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(np.exp(distributional.log_win) + np.exp(distributional.log_loss), 1,
                               rtol=1e-6)


def orders_of(name, preference, lengths, ratings=None):
    """A comparison that is read as orders of two of its responses."""
    preference = np.array(preference, np.float32)
    item = encoded(name, 2, [3] * (len(lengths) * (len(lengths) - 1)),
                   preference=orders.preference(preference))
    ratings = np.full(len(lengths), math.nan) if ratings is None else ratings
    return dataclasses.replace(item, candidates=Candidates(
        preference, np.array(ratings, np.float32)[:, None], lengths))


def test_pairs_that_are_read_together_by_hand():
    items = [orders_of('a', [[0, 1], [0, 0]], (4, 5), (2.0, 1.0)),
             orders_of('b', [[0, 0.2], [0.8, 0]], (6, 7))]
    # Log odds of whichever stands first: 3 and 1; -1 and 2.
    outputs = [np.array([[1.5], [0.5]], np.float32), np.array([[-0.5], [1.0]], np.float32)]
    p = metrics.predictions_of(items, outputs, HeadConfig('pairwise'),
                               LossConfig('pairwise_cross_entropy'))
    assert p.pairwise
    np.testing.assert_array_equal(p.pairs, [[0, 1], [3, 2]])
    np.testing.assert_allclose(p.label, [1.0, 0.8])
    # Of the preferred response, where it stands first and second.
    np.testing.assert_allclose(p.order_log_odds, [[3.0, -1.0], [2.0, 1.0]])
    np.testing.assert_allclose(np.subtract(*p.rewards), [1.0, 1.5])
    np.testing.assert_allclose(p.means, [0.5, -0.5, -0.75, 0.75])
    np.testing.assert_allclose(np.exp(p.log_win), expit([1.0, 1.5]), rtol=1e-6)
    np.testing.assert_allclose(np.exp(p.log_loss), expit([-1.0, -1.5]), rtol=1e-6)
    np.testing.assert_array_equal(p.lengths, [4, 5, 6, 7])
    np.testing.assert_array_equal(p.ratings, [2.0, 1.0, math.nan, math.nan])
    found = metrics.summarise(p)
    assert found.keys() == {'n', 'crossing_rate', 'accuracy', 'nll', 'ece', 'margin'}
    assert found['accuracy'] == 1.0
    assert found['margin'] == pytest.approx(1.25)
    expected = -np.mean([np.log(expit(1.0)), 0.8 * np.log(expit(1.5)) + 0.2 * np.log(expit(-1.5))])
    assert found['nll'] == pytest.approx(expected, rel=1e-6)


def test_of_more_responses_probabilities_are_those_of_the_pairs():
    """A cycle: every pair is won by 2 in log odds, and no response is better than another."""
    cycle = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]], np.float32)
    outputs = np.array([[1.0 if cycle[i, j] else -1.0] for i, j in orders.of(3)], np.float32)
    p = metrics.predictions_of([orders_of('a', cycle, (1, 2, 3))], [outputs],
                               HeadConfig('pairwise'), LossConfig('pairwise_cross_entropy'))
    assert p.pairs.tolist() == [[0, 1], [1, 2], [2, 0]]
    np.testing.assert_allclose(p.log_win, np.log(expit([2.0] * 3)), rtol=1e-6)
    np.testing.assert_allclose(p.means, 0.0, atol=1e-7)
    assert metrics.summarise(p)['accuracy'] == 0.5


def test_an_ensemble_of_pairwise_heads_has_a_spread():
    head = HeadConfig('pairwise', members=2)
    outputs = np.array([[1.0, 0.0], [-1.0, -0.5]], np.float32)
    p = metrics.predictions_of([orders_of('a', [[0, 1], [0, 0]], (1, 1))], [outputs], head,
                               LossConfig('pairwise_cross_entropy'))
    # Log odds of the pair 2 and .5.
    assert np.subtract(*p.rewards) == pytest.approx(1.25)
    np.testing.assert_allclose(p.stds, [0.375, 0.375], rtol=1e-6)
    np.testing.assert_allclose(p.pair_stds, [0.75], rtol=1e-6)
    assert p.log_win[0] == pytest.approx(np.log(expit(1.25)), rel=1e-5)


def test_offsets_of_members_are_no_spread_of_pairs():
    # Margins 2 and 4 of two members, each of a response with quantiles 1 above and below its mean.
    means = np.array([[3.0, 9.0], [1.0, 5.0]], np.float32)
    item = encoded('a', 2, (1, 1), preference=[[0, 1], [0, 0]])
    for offset in (0.0, 50.0):
        shifted = means + np.float32([0.0, offset])
        outputs = np.stack([shifted - 1, shifted + 1], axis=-1).reshape(2, 4)
        p = metrics.predictions_of([item], [outputs], HeadConfig('quantile', 2, members=2),
                                   LossConfig('bradley_terry'))
        np.testing.assert_allclose(p.pair_stds, [math.sqrt(2.0 + 1.0)], rtol=1e-5)
    assert p.stds.min() > 20.0


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


# What each head says of two responses, the first preferred and rated 1: outputs, then quantiles,
# means, stds, crps of the rating and log odds or probability of the pair, each worked out by hand.

GAUSSIAN_SCALE = 0.001 + math.log(2.0)
NORMAL = scipy.stats.norm(0.5, GAUSSIAN_SCALE)
THIRDS = scipy.stats.norm.ppf([1 / 4, 3 / 4]) * GAUSSIAN_SCALE


def _gaussian_win(lead, scale):
    return scipy.integrate.quad(
        lambda z: expit(lead + scale * z) * scipy.stats.norm.pdf(z), -12, 12)[0]


def _gaussian_crps(y):
    # Gneiting & Raftery 2007, eq. 20, by its integral: that of (cdf - 1{y <= x})^2.
    below = scipy.integrate.quad(lambda x: NORMAL.cdf(x) ** 2, -12, y)[0]
    return below + scipy.integrate.quad(lambda x: NORMAL.sf(x) ** 2, y, 12)[0]


SAID = {
    # A rating of 1: |2 - 1|.
    'scalar': (LossConfig('ratings_crps'), {}, [[2.0], [-1.0]], [[2], [-1]], [2, -1], [0, 0], 1.0,
               expit(3.0)),
    # Of preferences only: the rating is on another scale.
    'pairs': (LossConfig('bradley_terry'), {'name': 'scalar'}, [[2.0], [-1.0]], [[2], [-1]],
              [2, -1], [0, 0], np.nan, expit(3.0)),
    # Scalars 2, 4 and -1, 1: E|R - 1| = 2, E|R - R'| / 2 = 1/2; differences 3, 1, 5, 3.
    'members': (LossConfig('ratings_crps'), {'name': 'scalar', 'members': 2},
                [[2.0, 4.0], [-1.0, 1.0]], [[2, 4], [-1, 1]], [3, 0], [1, 1], 1.5,
                np.mean(expit([3.0, 1.0, 5.0, 3.0]))),
    # A free head's quantiles stay as they are, 4 before 0.
    'quantile': (LossConfig('ratings_pinball'), {}, [[4.0, 0.0], [1.0, 1.0]], [[4, 0], [1, 1]],
                 [2, 1], [2, 0], 2.0 - 1.0, np.mean(expit([3.0, -1.0]))),
    # softplus(ln(e^2 - 1)) / 2 = 1 between the two, around the means 1/2 and 0.
    'monotone_quantile': (
        LossConfig('distributional_bradley_terry'), {},
        [[0.5, math.log(math.e**2 - 1)], [0.0, math.log(math.e**2 - 1)]],
        [[0, 1], [-0.5, 0.5]], [0.5, 0], [0.5, 0.5], np.nan,
        np.mean(expit([0.5, -0.5, 1.5, 0.5]))),
    'gaussian': (LossConfig('ratings_crps'), {}, [[0.5, 0.0], [0.0, 0.0]],
                 [0.5 + THIRDS, THIRDS], [0.5, 0], [GAUSSIAN_SCALE] * 2, _gaussian_crps(1.0),
                 _gaussian_win(0.5, math.sqrt(2.0) * GAUSSIAN_SCALE)),
    # Atoms -1, 0, 1 with weights (1, 1, 2) / 4 and (1, 2, 1) / 4. E|R - 1| = 3/4; pairs of atoms
    # differ by 1, 2, 1 with weights 2 * 1, 2 * 2, 2 * 2 of 16: E|R - R'| = 14 / 16.
    'categorical': (
        LossConfig('ratings_crps'), {'num_atoms': 3, 'atom_range': 1.0},
        [np.log([1, 1, 2]), np.log([1, 2, 1])], [[-1, 1], [-1, 0]], [0.25, 0],
        [math.sqrt(3 / 4 - 1 / 16), math.sqrt(0.5)], 3 / 4 - 7 / 16,
        (np.array([1, 1, 2]) / 4) @ expit(np.subtract.outer([-1, 0, 1], [-1, 0, 1]))
        @ (np.array([1, 2, 1]) / 4)),
    # Three annotators who each judge both; quantiles at 1/4 and 3/4 of three.
    'annotator': (LossConfig('annotator_bradley_terry'), {'annotators': ('a', 'b', 'c')},
                  [[3.0, 0.0, 6.0], [2.0, 2.0, -1.0]], [[0, 6], [-1, 2]], [3, 1],
                  [math.sqrt(6), math.sqrt(2)], 8 / 3 - 24 / 18, np.mean(expit([1.0, -2.0, 7.0]))),
}


@pytest.mark.parametrize('name', SAID)
def test_what_each_head_says(name):
    loss, sizes, outputs, quantiles, means, stds, crps, win = SAID[name]
    head = HeadConfig(**{'name': name, 'num_quantiles': 2} | sizes)
    item = dataclasses.replace(encoded('a', 3, (2, 4)), ratings=np.float32([[1], [np.nan]]))
    p = metrics.predictions_of([item], [np.float32(outputs)], head, loss)
    np.testing.assert_array_equal(p.taus, head.taus)
    np.testing.assert_allclose(p.quantiles, quantiles, atol=1e-5)
    np.testing.assert_allclose(p.means, means, atol=1e-6)
    np.testing.assert_allclose(p.stds, stds, atol=1e-6)
    np.testing.assert_allclose(p.crps, [crps, np.nan], atol=1e-5)
    np.testing.assert_array_equal(p.ratings, np.float32([1, np.nan]))
    np.testing.assert_allclose(np.exp(p.log_win), [win], atol=1e-5)
    np.testing.assert_allclose(np.exp(p.log_loss), [1.0 - win], atol=1e-5)
    assert p.lengths.tolist() == [2, 4]
    assert {x.dtype.name for x in (p.quantiles, p.taus, p.means, p.stds, p.crps, p.ratings,
                                   p.label, p.log_win, p.log_loss)} == {'float32'}
    assert (p.pairs.dtype, p.lengths.dtype, p.comparisons.dtype) == ('int32',) * 3
    summary = metrics.summarise(p)
    assert ('crps' in summary) == (loss.reads != 'preferences')


def test_attributes_are_rated_one_by_one_over_all_members():
    # Two members with quantiles of attribute a, b: (0, 2), (4, 4) and (2, 2), (0, 0).
    head = HeadConfig('quantile', 2, attributes=('a', 'b'), members=2)
    outputs = np.float32([[0, 2, 4, 4, 0, 0, 2, 2, 0, 0, 0, 0]] * 3)
    # First: a is 1; second: a is 1 and b 2; third: nothing.
    ratings = np.float32([[1, np.nan], [1, 2], [np.nan, np.nan]])
    item = dataclasses.replace(encoded('a', 1, (1, 1, 1)), ratings=ratings)
    p = metrics.predictions_of([item], [outputs], head, LossConfig('ratings_pinball'))
    # a: atoms 0, 2, 2, 2: E|R - 1| = 1, E|R - R'| / 2 = 6 * 2 / 32. b: 4, 4, 0, 0: 2 - 8 * 4 / 32.
    np.testing.assert_allclose(p.crps, [0.625, (0.625 + 1.0) / 2, np.nan], atol=1e-6)
    assert np.isnan(p.ratings).all()
    # Gated means (1 + 4) / 2 and (2 + 0) / 2, of quantiles (2, 3) and (1, 1).
    np.testing.assert_allclose(p.means, [1.75] * 3)
    np.testing.assert_allclose(p.quantiles, [[1, 2]] * 3)
    assert metrics.summarise(p)['crps'] == pytest.approx((0.625 + 0.8125) / 2)


def test_comparisons_without_pairs_have_the_metrics_that_are_known():
    items = [dataclasses.replace(encoded(i, 2, (2,)), ratings=np.float32([[r]]))
             for i, r in enumerate((1.0, 3.0))]
    tie = encoded('tie', 1, (1, 1), preference=[[0, 0.5], [0.5, 0]])
    outputs = [np.float32([[0.0]]), np.float32([[1.0]]), np.float32([[4.0], [4.0]])]
    p = metrics.predictions_of([*items, tie], outputs, HeadConfig('scalar'),
                               LossConfig('ratings_pinball'))
    assert p.pairs.shape == (0, 2)
    assert p.label.shape == p.log_win.shape == p.log_loss.shape == p.ids.shape == (0,)
    assert p.chosen.shape == (0, 1)
    found = metrics.summarise(p)
    assert found == {'n': 0, 'reward_mean': pytest.approx(9 / 4),
                     'reward_std': pytest.approx(np.std([0, 1, 4, 4])), 'crossing_rate': 0.0,
                     'crps': pytest.approx((1.0 + 2.0) / 2)}
    # Also without any rating.
    p = metrics.predictions_of([tie], outputs[2:], HeadConfig('scalar'), loss_config('scalar'))
    assert set(metrics.summarise(p)) == {'n', 'reward_mean', 'reward_std', 'crossing_rate'}


def test_checkpoints_are_chosen_by_what_the_objective_learns_from():
    assert metrics.criterion(LossConfig('ratings_quantile_huber')) == 'crps'
    for name in ('plackett_luce', 'annotator_bradley_terry'):
        assert metrics.criterion(LossConfig(name)) == 'nll'


def test_predictions_survive_saving(tmp_path):
    p = predictions([[0.0, 4.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 3.0]])
    path = str(tmp_path / 'predictions.npz')
    metrics.save_predictions(path, p, np.zeros((2, 16), np.uint8))
    for name, value in metrics.load_predictions(path)._asdict().items():
        np.testing.assert_array_equal(value, getattr(p, name))
