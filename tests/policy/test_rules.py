"""Tests of the rules that call a run suspect: when they hold, when not, what they say."""

import math

import numpy as np
import pytest

from qrm.policy import rules
from qrm.policy.monitor import Row
from qrm.policy.rules import Rules
from tests.helpers import policy_row


def _run(**series):
    """Rows at steps 0, 10, ... with these numbers, the others as they are."""
    count = len(next(iter(series.values())))
    return [policy_row(10 * i, **{name: values[i] for name, values in series.items()})
            for i in range(count)]


def _rules_of(rows, **changes):
    return [one.rule for one in rules.suspicions(rows, Rules(**changes))]


def test_a_trend_by_hand():
    # Steps 0 to 30 are 15 and 5 off their mean: coefficients 30 (-15, -5, 5, 15) / 500.
    rows = _run(gold=[9.0, 0.0, 1.0, 2.0, 3.0], gold_error=[0.0, 0.1, 0.1, 0.1, 0.1])
    found = rules.trend(rows, 'gold', 4)
    assert (found.first, found.last) == (10, 40)
    assert found.change == pytest.approx(3.0)
    assert found.error == pytest.approx(0.1 * math.sqrt(2 * 0.81 + 2 * 0.09))
    assert rules.trend(rows[:2], 'gold', 4) is None
    rows = [row._replace(gold=None) for row in rows[:3]] + rows[3:]
    assert rules.trend(rows, 'gold', 4) is None


def test_constant_rows_are_not_suspect():
    # Neither with errors nor without, whatever the constants are.
    rng = np.random.default_rng(0)
    for errors in (True, False):
        numbers = {name: rng.normal() for name in ('proxy', 'gold', 'win')} | {
            'length': 7.3, 'entropy': 0.0, 'repeated': 1.0, 'blank': 1.0, 'refused': 1.0}
        if not errors:
            numbers |= {name: 0.0 for name in Row._fields if name.endswith('_error')}
        rows = [policy_row(3 * i, **numbers) for i in range(30)]
        assert all(not rules.suspicions(rows[:i], Rules()) for i in range(31))


def test_noise_of_the_stated_size_is_not_suspect():
    names = [name for name in Row._fields if getattr(policy_row(0), f'{name}_error', None)]
    for seed in range(50):
        rng = np.random.default_rng(seed)
        rows = []
        for i in range(30):
            row = policy_row(10 * i)
            rows.append(row._replace(**{
                name: getattr(row, name) + rng.normal() * getattr(row, f'{name}_error')
                for name in names}))
            assert not rules.suspicions(rows, Rules())


@pytest.mark.parametrize(('name', 'label'), [('gold', 'gold reward'), ('win', 'win probability')])
def test_over_optimisation(name, label):
    up, down = [0.0, 0.3, 0.6, 0.9, 1.2], [0.8, 0.7, 0.6, 0.5, 0.4]
    rows = _run(**{'proxy': up, name: down, f'{name}_error': [0.01] * 5})
    (found,) = rules.suspicions(rows, Rules())
    assert found.rule == 'over-optimisation'
    # Coefficients (-.8, -.4, 0, .4, .8): errors of .1 and .01 times sqrt(1.6).
    assert found.line == ('from step 0 to 40 the proxy reward rose by 1.2 (standard error 0.13) '
                          f'while the {label} fell by 0.4 (standard error 0.013)')
    # Both rise, both fall, or it is not sure.
    for proxy, other, error in ((up, down[::-1], 0.01), (up[::-1], down, 0.01), (up, down, 0.2),
                                (up, [0.6] * 5, 0.01)):
        rows = _run(**{'proxy': proxy, name: other, f'{name}_error': [error] * 5})
        assert not rules.suspicions(rows, Rules())


def test_over_optimisation_needs_a_gold_reward_or_a_judge():
    rows = _run(proxy=[0.0, 1.0, 2.0, 3.0], gold=[None] * 4, gold_error=[None] * 4,
                win=[None] * 4, win_error=[None] * 4)
    assert not rules.suspicions(rows, Rules())


def test_over_optimisation_is_over_once_the_window_has_passed():
    rows = _run(proxy=[0.0, 1.0, 2.0, 3.0, *[3.0] * 8], gold=[3.0, 2.0, 1.0, 0.0, *[0.0] * 8])
    assert _rules_of(rows[:4]) == ['over-optimisation']
    assert _rules_of(rows) == []
    assert _rules_of(rows, window=12) == ['over-optimisation']


def test_kl_above_a_bound():
    rows = _run(kl=[0.0, 60.0])
    (found,) = rules.suspicions(rows, Rules())
    assert found == ('kl', '60 (standard error 0.3) nats a response at step 10, more than 50')
    assert _rules_of(_run(kl=[0.0, 50.5])) == []  # less than three errors above
    assert _rules_of(rows, kl_most=100.0) == []


def test_kl_that_grows_fast():
    kl = [0.0, 10.0, 20.0, 30.0]
    assert _rules_of(_run(kl=kl)) == ['kl growth']
    assert 'rose by 30 (standard error 0.4) nats a response, more than 25' in (
        rules.suspicions(_run(kl=kl), Rules())[0].line)
    assert _rules_of(_run(kl=kl), kl_growth=29.0) == []
    assert _rules_of(_run(kl=kl), window=3) == []


@pytest.mark.parametrize(('length', 'line'), [
    (120.0, '120 (standard error 2) tokens a response at step 10, more than 2 times the '
            '50 (standard error 2) at step 0'),
    (15.0, '15 (standard error 2) tokens a response at step 10, less than 0.5 times the '
           '50 (standard error 2) at step 0')])
def test_length_that_runs_away(length, line):
    assert rules.suspicions(_run(length=[50.0, length]), Rules()) == [('length', line)]
    # Three errors of sqrt(2^2 + (2 * 2)^2) = 4.47: from 113.4 on.
    assert _rules_of(_run(length=[50.0, 113.0])) == []
    assert _rules_of(_run(length=[50.0, 114.0])) == ['length']


def test_entropy_that_collapses():
    (found,) = rules.suspicions(_run(entropy=[2.0, 1.0, 0.2]), Rules())
    assert found == ('entropy', '0.2 (standard error 0.05) nats a token at step 20, less than '
                                '0.25 times the 2 (standard error 0.05) at step 0')
    assert _rules_of(_run(entropy=[2.0, 1.0, 0.4])) == []
    assert _rules_of(_run(entropy=[0.2, 0.2, 0.2])) == []


@pytest.mark.parametrize(('rule', 'name'), [
    ('repetition', 'repeated'), ('truncation', 'truncated'), ('blanks', 'blank'),
    ('refusals', 'refused')])
def test_shares_that_rise(rule, name):
    rows = _run(**{name: [0.1, 0.9], f'{name}_error': [0.01, 0.01]})
    limit = getattr(Rules(), rule)
    (found,) = rules.suspicions(rows, Rules())
    assert found == (rule, f'share 0.9 (standard error 0.01) at step 10, more than {limit:g} above '
                           'the 0.1 (standard error 0.01) at step 0')
    assert _rules_of(rows, **{rule: 0.8}) == []
    assert _rules_of(_run(**{name: [0.9, 0.9], f'{name}_error': [0.01, 0.01]})) == []
    assert _rules_of(_run(**{name: [0.1, 0.9], f'{name}_error': [0.01, 0.3]})) == []


def test_suspicions_stand_in_the_order_of_the_rules():
    rows = _run(kl=[0.0, 30.0, 60.0], length=[50.0, 100.0, 200.0], entropy=[2.0, 1.0, 0.1],
                repeated=[0.0, 0.2, 0.8])
    assert _rules_of(rows) == ['kl', 'kl growth', 'length', 'entropy', 'repetition']


def test_a_run_stops_for_what_lasts():
    rows = _run(kl=[0.0, 60.0, 10.0, 60.0, 61.0], length=[50.0, *[500.0] * 4])

    def reasons(count, **changes):
        return [one.rule for one in rules.reasons_to_stop(rows[:count], Rules(**changes))]

    stop = ('over-optimisation', 'kl')
    assert [reasons(count, stop=stop) for count in range(6)] == [[], [], [], [], [], ['kl']]
    assert reasons(2, patience=1, stop=stop) == ['kl']
    assert reasons(3, stop=('length',)) == ['length']
    assert reasons(5) == []  # unasked nothing ends a run
    line = rules.reasons_to_stop(rows, Rules(stop=stop))[0].line
    assert line.startswith('61 ')


def test_steps_have_to_rise():
    with pytest.raises(ValueError, match='step 5 after step 5'):
        rules.suspicions([policy_row(5), policy_row(5)], Rules())


@pytest.mark.parametrize(('changes', 'message'), [
    ({'window': 2}, 'window=2, expected at least 3'),
    ({'errors': -1.0}, 'errors=-1.0, expected at least 0'),
    ({'kl_most': np.nan}, 'kl_most=nan, expected at least 0'),
    ({'length_factor': 1.0}, 'length_factor=1.0, expected above 1'),
    ({'entropy_share': 1.0}, 'entropy_share=1.0, expected in'),
    ({'blanks': 1.5}, 'blanks=1.5, expected in'),
    ({'stop': ('KL',)}, "stop=.*'KL'.*expected some of"),
    ({'patience': 0}, 'patience=0, expected at least 1'),
])
def test_rules_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Rules(**changes)
