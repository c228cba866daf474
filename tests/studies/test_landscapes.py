"""Losses over both rewards, against closed forms and where their minima must lie."""

import numpy as np
import pytest
import scipy.special

from qrm.studies import figures, landscapes
from qrm.studies.landscapes import OBJECTIVES, REWARDS

CHOSEN, REJECTED = np.meshgrid(REWARDS, REWARDS)


@pytest.fixture(scope='module')
def surfaces():
    return {label: landscapes.surface(loss) for label, loss in OBJECTIVES.items()}


def minimum(one):
    """(r_c, r_r) of the least loss."""
    place = np.unravel_index(np.argmin(one.loss), one.loss.shape)
    return CHOSEN[place], REJECTED[place]


def test_bradley_terry_is_a_slope_with_rewards_open_along_the_diagonal(surfaces):
    one = surfaces['Bradley-Terry']
    np.testing.assert_allclose(one.loss, np.logaddexp(0.0, REJECTED - CHOSEN), atol=1e-5)
    slope = scipy.special.expit(REJECTED - CHOSEN)
    np.testing.assert_allclose(one.slopes, np.stack([-slope, slope], axis=-1), atol=1e-5)


def test_thurstone_is_the_probit_of_a_difference_of_variance_two(surfaces):
    expected = -scipy.special.log_ndtr((CHOSEN - REJECTED) / np.sqrt(2.0))
    np.testing.assert_allclose(surfaces["Thurstone's law"].loss, expected, rtol=1e-4, atol=1e-6)


def test_slopes_are_those_of_the_surface(surfaces):
    step = REWARDS[1] - REWARDS[0]
    moving = '+ quantile Huber, other side ±1, λ = 1'
    for label, one in surfaces.items():
        by_r, by_c = np.gradient(one.loss, step)
        inner = (slice(2, -2), slice(2, -2))
        found = one.slopes[inner]
        if label == moving:  # no slope flows into its targets, which are the other side's
            assert np.abs(found[..., 0] - by_c[inner]).max() > 1.0
            continue
        np.testing.assert_allclose(found[..., 0], by_c[inner], atol=0.06, err_msg=label)
        np.testing.assert_allclose(found[..., 1], by_r[inner], atol=0.06, err_msg=label)


def test_what_has_a_minimum_has_it_where_it_must(surfaces):
    # Centring keeps the sum at 0 and lets the difference grow; targets of +-1 hold both.
    assert minimum(surfaces['Bradley-Terry, centred (weight .125)']) == (4.0, -4.0)
    for weight, most in (('.1', 2.0), ('1', 1.2)):
        chosen, rejected = minimum(surfaces[f'+ quantile Huber, ±1, λ = {weight}'])
        assert chosen == pytest.approx(-rejected, abs=0.11)
        assert 0.9 < chosen < most
    # Smoothing asks for a difference of log 9, wherever it lies.
    chosen, rejected = minimum(surfaces['Bradley-Terry, 10% of labels smoothed'])
    assert chosen - rejected == pytest.approx(np.log(9.0), abs=0.06)
    # Anchors hold both in the class between them.
    chosen, rejected = minimum(surfaces["Thurstone's law, both rated between two anchors"])
    assert chosen == pytest.approx(-rejected, abs=0.11)
    assert 0.0 < chosen < 1.0


def test_each_is_drawn(surfaces):
    drawn = figures.draw_landscapes(surfaces).axes
    assert [axes.get_title() for axes in drawn[:len(surfaces)]] == list(OBJECTIVES)
