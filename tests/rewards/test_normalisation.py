"""Normalised rewards: hand-worked, for every head, and by every rule."""

import functools

import jax
import numpy as np
import pytest

from qrm.rewards import normalisation, selection
from qrm.rewards.heads import HeadConfig
from qrm.rewards.normalisation import Normalisation, Rewards

BY = Normalisation(1.5, 0.25)
TAUS, POINTS = np.array([0.1, 0.5, 0.93], np.float32), np.array([-0.6, 0.1, 1.7])
HEADS = [
    HeadConfig('scalar'), HeadConfig('quantile', 3, levels=(0.05, 0.5, 0.95)),
    HeadConfig('quantile', 4, members=2),
    HeadConfig('quantile', 3, attributes=('a', 'b')), HeadConfig('monotone_quantile', 4),
    HeadConfig('implicit_quantile', 4), HeadConfig('gaussian'), HeadConfig('gaussian', members=2),
    HeadConfig('categorical', num_atoms=5),
    HeadConfig('annotator', annotators=('Ann', 'Ben', 'Cem')),
]


def by_hand(values):
    return (np.asarray(values, np.float64) - 1.5) / 0.25


def outputs(head, count=6):
    return np.asarray(jax.random.normal(jax.random.key(3), (count, head.outputs)))


@functools.partial(jax.jit, static_argnums=0)
def said(head, given):
    """What is said of outputs, raw and normalised; of both in one program, which compiles once."""
    found = []
    for by, points in ((None, POINTS), (BY, by_hand(POINTS))):
        rewards = Rewards(head, given, by)
        one = rewards.distribution
        found.append({
            'mean': one.mean, 'std': one.std, 'reported': rewards.quantiles,
            'quantile': one.quantile(TAUS), 'cvar': one.cvar(0.3),
            'sample': one.sample(jax.random.key(0), 7), 'cdf': one.cdf(np.float32(points))})
    return found


@pytest.mark.parametrize('head', HEADS, ids=lambda head: f'{head.name}-{head.outputs}')
def test_whole_distributions_move_with_the_mean(head):
    before, after = said(head, outputs(head))
    close = {'rtol': 1e-5, 'atol': 1e-4}
    for name in ('mean', 'reported', 'quantile', 'cvar', 'sample'):
        np.testing.assert_allclose(after[name], by_hand(before[name]), err_msg=name, **close)
    np.testing.assert_allclose(after['std'], np.asarray(before['std']) / 0.25, **close)
    np.testing.assert_allclose(after['cdf'], before['cdf'], atol=1e-5)
    raw = head.read(outputs(head)).distribution.mean
    np.testing.assert_allclose(before['mean'], raw, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('head', [HEADS[2], HEADS[6], HEADS[8]], ids=lambda head: head.name)
@pytest.mark.parametrize('rule', ['mean', 'quantile:0.2', 'cvar:0.4', 'mean-std:1'])
def test_rules_choose_as_before(head, rule):
    rule, given = selection.parse_rule(rule), outputs(head)
    scores = []
    for by in (None, BY):
        distribution = Rewards(head, given, by).distribution
        scale = None
        if rule.kind == 'mean-std':
            scale = selection.reference_scale(distribution.mean, distribution.std, np.zeros(6, int))
        scores.append(np.asarray(selection.scores(rule, distribution, scale)))
    # That of 'mean-std' is in units of its scale already: it moves by a constant.
    expected = by_hand(scores[0]) if scale is None else scores[0] + (scores[1] - scores[0])[0]
    np.testing.assert_allclose(scores[1], expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(np.argsort(scores[0]), np.argsort(scores[1]))


def test_the_mean_is_subtracted_first():
    """Two neighbours of float32 near 10,000 stay as far apart as they are."""
    by = Normalisation(1e4, 0.5)
    near = np.array([1e4, np.nextafter(np.float32(1e4), np.float32(2e4))], np.float32)
    np.testing.assert_array_equal(by.values(near), [0.0, 2 * 2.0**-10])
    found = Rewards(HeadConfig('quantile', 2), near[None], by)
    np.testing.assert_array_equal(found.distribution.values, [[0.0, 2 * 2.0**-10]])


def test_moments_are_those_of_the_responses():
    # Mean 3; squared distances 4, 1, 0, 9, whose mean is 3.5.
    found = normalisation.measure(np.array([1.0, 2.0, 3.0, 6.0], np.float32))
    assert (found.mean, found.std) == (3.0, pytest.approx(3.5**0.5))
    values = found.values(np.array([1.0, 2.0, 3.0, 6.0]))
    assert values.mean() == pytest.approx(0.0, abs=1e-12)
    assert values.std() == pytest.approx(1.0)
    assert str(found) == '(reward - 3) / 1.87083'
    assert str(Normalisation(-0.5, 2.0)) == '(reward + 0.5) / 2'


@pytest.mark.parametrize(('rewards', 'message'), [
    ([], '0 responses, expected at least two'), ([1.0], '1 response, expected at least two'),
    ([2.0, 2.0, 2.0], '3 responses with the same reward, 2, expected some that differ'),
    ([1000.0, np.nextafter(np.float32(1000.0), np.float32(2e3))], '2 responses with the same'),
    ([0.0, 0.0], '2 responses with the same reward, 0'),
    ([1.0, np.nan, np.inf], '2 of 3 rewards are not finite'),
])
def test_what_there_is_no_scale_of_is_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        normalisation.measure(np.array(rewards, np.float32))


@pytest.mark.parametrize(('mean', 'std'), [
    (0.0, 0.0), (0.0, -1.0), (float('nan'), 1.0), (0.0, float('inf')), (0.0, 1e-40), (1e39, 1.0),
    (None, 1.0), ('0', 1.0), (0.0, True),
])
def test_numbers_that_cannot_be_divided_by_are_refused(mean, std):
    with pytest.raises(ValueError, match='expected numbers, std above 0'):
        Normalisation(mean, std)
