"""Paths of optimisation: curves at equal KL, peaks and falls, by hand."""

import json

import numpy as np
import pytest

from qrm.rewards import statistics
from qrm.studies import paths
from qrm.studies.paths import Curves, Path


def one(kl, gold, proxy=None):
    """Curves of the prompts as they are alone."""
    gold = np.array([gold], float)
    return Curves(np.array([kl], float), gold, gold if proxy is None else np.array([proxy], float),
                  gold, gold, None, None)


def test_curves_are_weighted_means_over_prompts():
    path = Path(np.array([0, 5]), np.array([[0.0, 0.0], [1.0, 3.0]]),
                np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[0.0, 4.0], [8.0, 0.0]]),
                np.array([[0.5, 0.5], [0.2, 0.8]]), np.array([[4.0, 4.0], [5.0, 9.0]]),
                np.array([[0.0, 0.4], [0.2, 0.0]]), np.array([[0.5, 1.5], [2.0, 4.0]]),
                np.array([4.0, 4.0]), 1.0)
    found = paths.curves(path, np.array([[2, 0], [3, 1]]))
    np.testing.assert_allclose(found.kl, [[0.0, 2.0], [0.0, 1.0], [0.0, 1.5]])
    np.testing.assert_allclose(found.gold, [[1.5, 4.5], [1.0, 3.0], [1.25, 3.75]])
    np.testing.assert_allclose(found.proxy, [[2.0, 4.0], [0.0, 8.0], [1.0, 6.0]])
    np.testing.assert_allclose(found.win, [[0.5, 0.5], [0.5, 0.2], [0.5, 0.35]])
    np.testing.assert_allclose(found.length, [[4.0, 7.0], [4.0, 5.0], [4.0, 6.0]])
    np.testing.assert_allclose(found.unread, [[0.2, 0.1], [0.0, 0.2], [0.1, 0.15]])
    np.testing.assert_allclose(found.price, [[1.0, 3.0], [0.5, 2.0], [0.75, 2.5]])
    assert paths.curves(path._replace(unread=None), np.ones((1, 2))).unread is None


def test_wins_at_equal_length_are_of_the_last_responses():
    rng = np.random.default_rng(0)
    length = np.array([np.full(30, 22.0), rng.integers(10, 90, 30)])
    win = np.array([np.full(30, 0.5), rng.random(30)])
    path = Path(np.array([0, 5]), *np.zeros((3, 2, 30)), win, length, None, None,
                np.full(30, 20.0), 1.0)
    weights = rng.multinomial(30, np.full(30, 1 / 30), size=3)
    found = paths.win_controlled(path, weights)
    shares = np.concatenate([np.ones((1, 30)), weights]) / 30
    np.testing.assert_allclose(
        found, statistics.length_controlled_wins(win[1], length[1] - 20.0, shares))
    assert len(set(found.tolist())) == 4


def test_a_path_comes_back_from_json():
    path = Path(np.array([0, 5]), *np.random.default_rng(0).normal(size=(7, 2, 4)), np.arange(4.0),
                0.5)
    for own in (path, path._replace(unread=None, price=None)):
        back = paths.from_json(json.loads(json.dumps(paths.as_json(own))))
        assert back.unit == 0.5
        for name in Path._fields:
            np.testing.assert_array_equal(getattr(back, name), getattr(own, name))


def test_a_level_is_taken_where_it_is_first_reached():
    # KL rises to 4, falls to 1, and rises to 8.
    x, y = np.array([[0.0, 4.0, 1.0, 8.0]]), np.array([[0.0, 8.0, -5.0, 2.0]])
    for at, expected in ((0.0, 0.0), (1.0, 2.0), (4.0, 8.0), (4.5, -1.5), (8.0, 2.0)):
        assert paths.crossing(x, y, np.array([at]))[0] == pytest.approx(expected), at
    assert np.isnan(paths.crossing(x, y, np.array([8.1]))[0])


def test_each_replicate_has_its_own_level():
    x = np.array([[0.0, 2.0], [0.0, 4.0]])
    y = np.array([[0.0, 2.0], [1.0, 5.0]])
    np.testing.assert_allclose(paths.crossing(x, y, np.array([1.0, 1.0])), [1.0, 2.0])


def test_gains_are_at_equal_kl():
    # One rises by 1 a nat, the other by 1/2, and goes twice as far.
    a, b = one([0.0, 4.0], [1.0, 5.0]), one([0.0, 8.0], [1.0, 5.0])
    assert paths.common(a.kl, b.kl)[0] == 4.0
    assert paths.gain_at_end(a, b)[0] == pytest.approx(2.0)
    # Half a unit a nat, on average over 20 places from 4 / 20 to 4.
    assert paths.gain_along(a, b)[0] == pytest.approx(0.5 * 4.0 * 21 / 40)
    assert paths.gain_along(b, a)[0] == pytest.approx(-paths.gain_along(a, b)[0])
    assert paths.gain_along(a, a)[0] == 0.0


def test_gains_at_equal_proxy():
    a = one([0.0, 1.0], [0.0, 6.0], proxy=[0.0, 3.0])
    b = one([0.0, 9.0], [0.0, 2.0], proxy=[0.0, 2.0])
    assert paths.gain_at_end(a, b, 'proxy')[0] == pytest.approx(4.0 - 2.0)
    assert paths.gain_at_end(a, b)[0] == pytest.approx(6.0 - 2.0 / 9.0)


def test_a_path_that_never_leaves_has_no_gain():
    away, still = one([0.0, 3.0], [1.0, 2.0]), one([0.0, 0.0], [1.0, 7.0])
    assert paths.gain_at_end(away, still)[0] == 0.0
    assert paths.gain_along(away, still)[0] == 0.0


def test_the_peak_is_the_kl_of_the_highest_gold():
    assert paths.peak(one([0.0, 2.0, 5.0], [0.0, 3.0, 1.0]))[0] == 2.0
    assert paths.peak(one([0.0, 2.0, 5.0], [3.0, 3.0, 1.0]))[0] == 0.0


def test_a_fall_is_measured_on_the_other_half():
    half = np.array([True, True, False, False])
    gold = np.array([[0.0, 0.0, 0.0, 0.0], [4.0, 2.0, 1.0, 5.0], [1.0, 3.0, 2.0, 2.0]])
    path = Path(np.arange(3), np.zeros((3, 4)), *[gold] * 4, None, None, gold[0], 1.0)
    # Both halves have their peak at the second one: falls of (3, -1) and (-1, 3).
    found = paths.fall(path, np.array([[2, 0, 1, 1], [1, 1, 0, 2]]), half)
    np.testing.assert_allclose(found, [1.0, 0.5 * (3.0 + 1.0), 0.5 * (1.0 + 3.0)])
    # What else falls, from the peak of gold: (1, 2) and (5, -4).
    other = np.array([[9.0, 9.0, 9.0, 9.0], [3.0, 2.0, 6.0, 1.0], [2.0, 0.0, 1.0, 5.0]])
    found = paths.fall(path, np.array([[2, 0, 1, 1], [1, 1, 0, 2]]), half, values=other)
    np.testing.assert_allclose(found, [1.0, 0.5 * (1.0 + 0.5), 0.5 * (1.5 - 4.0)])
    with pytest.raises(ValueError, match='half'):
        paths.fall(path, np.ones((1, 4), int), np.ones(4, bool))


def test_noise_alone_has_no_fall_on_average():
    rng = np.random.default_rng(0)
    half = np.arange(40) % 2 == 0
    found = []
    for _ in range(300):
        gold = rng.normal(size=(8, 40))
        path = Path(np.arange(8), np.zeros((8, 40)), *[gold] * 4, None, None, gold[0], 1.0)
        found.append(paths.fall(path, np.ones((1, 40), int), half)[0])
    assert abs(np.mean(found)) < 3.0 * np.std(found) / np.sqrt(300)
