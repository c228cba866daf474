"""Tests of the figures of policies: what is drawn is read back from the axes."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from qrm.policy import figures
from qrm.policy.rules import Rules
from tests.helpers import policy_row

STEPS = (0, 10, 20, 30, 40)


def _hacked(**changes):
    """Rows of a run that over-optimises from the middle on."""
    kl, proxy = (0.0, 4.0, 9.0, 16.0, 25.0), (1.0, 2.0, 3.0, 4.0, 5.0)
    gold, win = (2.0, 3.0, 2.0, 1.0, 0.0), (0.5, 0.7, 0.6, 0.4, 0.2)
    return [policy_row(step, **{'kl': kl[i], 'proxy': proxy[i], 'gold': gold[i], 'win': win[i],
                                'proxy_spread': 0.5, 'gold_spread': 2.0} | changes)
            for i, step in enumerate(STEPS)]


def _axes():
    return Figure().add_subplot()


def _lines(axes):
    """Label -> line, of the lines that stand in the legend."""
    return {line.get_label(): line for line in axes.lines
            if not line.get_label().startswith('_')}


def _marks(axes):
    """Places of upright lines."""
    return {line.get_xdata()[0] for line in axes.lines
            if list(line.get_ydata()) == [0, 1] and line.get_xdata()[0] == line.get_xdata()[1]}


@pytest.mark.parametrize('root', [False, True])
def test_rewards_are_gains_in_standard_deviations_of_the_first_row(root):
    figures.rewards_against_kl(axes := _axes(), _hacked(), root=root)
    lines = _lines(axes)
    distances = [0.0, 2.0, 3.0, 4.0, 5.0] if root else [0.0, 4.0, 9.0, 16.0, 25.0]
    for name, gains in (('proxy', [0.0, 2.0, 4.0, 6.0, 8.0]),
                        ('gold', [0.0, 0.5, 0.0, -0.5, -1.0])):
        np.testing.assert_allclose(lines[name].get_xdata(), distances)
        np.testing.assert_allclose(lines[name].get_ydata(), gains)
    # Two standard errors of .1, on either side, in units of .5 and 2.
    for lines, reach in zip(axes.collections, (0.4, 0.1), strict=True):
        np.testing.assert_allclose(lines.get_segments()[0], [[0.0, -reach], [0.0, reach]])
    assert axes.get_xlabel() == (
        '√ KL (√ nats a response)' if root else 'KL (nats a response)')
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['proxy', 'gold']
    figures.rewards_against_kl(axes := _axes(), _hacked(), root=root, legend=False)
    assert axes.get_legend() is None


def test_what_is_unknown_is_not_drawn():
    figures.rewards_against_kl(axes := _axes(), _hacked(gold=None, gold_error=None))
    assert set(_lines(axes)) == {'proxy'}
    figures.wins_against_kl(axes := _axes(), _hacked(win=None, win_error=None))
    assert not axes.has_data()
    figures.curve(axes := _axes(), _hacked(), {'disagreement': 'std over members'})
    assert not axes.has_data()


def test_an_estimate_below_zero_has_no_root():
    figures.wins_against_kl(axes := _axes(), _hacked(kl=-0.5), root=True)
    np.testing.assert_allclose(_lines(axes)['held-out judge'].get_xdata(), 0.0)


def test_best_of_n_stands_at_its_bound():
    figures.wins_against_kl(axes := _axes(), _hacked(kl_bound=2.25), root=True)
    np.testing.assert_allclose(_lines(axes)['held-out judge'].get_xdata(), 1.5)


def test_a_row_of_panels_for_each_run():
    figure = figures.draw_overoptimisation(
        {'one': _hacked(), 'two': _hacked(win=None, win_error=None)}, root=True)
    shown = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert shown == ['one', 'one', 'two']
    wins = _lines(figure.axes[1])['held-out judge']
    np.testing.assert_allclose(wins.get_ydata(), (0.5, 0.7, 0.6, 0.4, 0.2))


def test_the_monitor_shows_all_that_is_known_over_the_steps():
    figure = figures.draw_monitor(_hacked(win=None, win_error=None))
    shown = {axes.get_ylabel(): _lines(axes) for axes in figure.axes if axes.get_visible()}
    assert 'win probability' not in shown
    assert {label: list(lines) for label, lines in shown.items()} == {
        'mean reward': ['proxy', 'gold'], 'KL (nats a response)': ['k1', 'k3'],
        'tokens a response': ['mean', '10%', '50%', '90%'], 'entropy (nats a token)': ['policy'],
        'share': ['4-grams repeated', 'refused', 'truncated', 'blank'],
        'different ones of all': ['tokens', 'pairs of tokens'],
        "proxy's spread": ['predicted std', 'std over responses'],
        'perplexity': ['under the reference']}
    for lines in shown.values():
        for line in lines.values():
            np.testing.assert_array_equal(line.get_xdata(), STEPS)
    np.testing.assert_allclose(shown['share']['refused'].get_ydata(), 0.1)
    assert not any(_marks(axes) for axes in figure.axes)


def test_the_monitor_marks_where_rules_begin_to_hold():
    # Gold falls for sure as soon as the fall outweighs the rise: over steps 0 to 30.
    rules = Rules(kl_most=14.0, kl_growth=100.0)
    assert figures.first_seen(_hacked(), rules) == {'over-optimisation': 30, 'kl': 30}
    figure = figures.draw_monitor(_hacked(), rules)
    assert all(_marks(axes) == {30} for axes in figure.axes if axes.get_visible())
    assert figure.get_suptitle() == 'suspect: over-optimisation from step 30, kl from step 30'
