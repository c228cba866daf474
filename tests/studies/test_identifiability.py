"""Tests of the experiment: published numbers in small, and what a run leaves in its folder."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qrm.rewards.distributions import uniform_atoms
from qrm.rewards.heads import HeadConfig
from qrm.rewards.losses import LossConfig
from qrm.studies import figures, identifiability, worlds
from qrm.studies.identifiability import Cell
from qrm.studies.mlp import Model
from qrm.training.schema import ConfigError
from qrm.training.workdir import WorkdirError
from tests.helpers import ROOT, load_config, optimised

TINY = {'seeds': 2, 'test_pairs': 100, 'pairs': 64, 'reproduce.sizes': (32, 64),
        'reproduce.growth': ('independent/monotone',)}


@pytest.fixture(scope='module')
def learnt():
    """'table/kind' -> metric -> mean over two seeds, of models trained as in the experiment."""
    cells = ('ratings/pinball', 'independent/teacher', 'independent/gaussian', 'shared/gaussian',
             'identified/anchor_after', 'independent/gaussian_anchored')
    done = subprocess.run([sys.executable, '-m', 'tests.programs.on_worlds', *cells], cwd=ROOT,
                          check=True, env=optimised(), stdout=subprocess.PIPE, text=True,
                          timeout=600)
    return json.loads(done.stdout)


# Published tolerances. The full experiment repeats them with five seeds.


def test_ratings_are_learnt(learnt):
    found = learnt['ratings/pinball']
    assert found['w1_shift'] <= 0.06
    assert found['coverage_mae'] <= 0.01
    assert found['spread_correlation'] >= 0.98
    assert found['spread_ratio'] == pytest.approx(1.0, abs=0.02)
    assert 0.0 < found['nll_excess'] < 0.001


def test_targets_of_a_teacher_collapse(learnt):
    assert learnt['independent/teacher']['spread_ratio'] <= 0.06  # .05 in the full experiment


def test_spread_is_learnt_only_from_independent_annotators(learnt):
    # In full .7 and .32, from four times the pairs.
    assert learnt['independent/gaussian']['spread_correlation'] >= 0.5
    assert learnt['independent/gaussian']['w1_affine'] <= 0.36
    assert learnt['shared/gaussian']['spread_correlation'] < 0.3


def test_an_anchor_each_brings_the_spread_back(learnt):
    found = learnt['identified/anchor_after']
    assert found['spread_correlation'] >= 0.9
    assert found['w1_affine'] <= 0.25


def test_two_thresholds_of_ratings_bring_the_spread_back(learnt):
    found, free = learnt['independent/gaussian_anchored'], learnt['independent/gaussian']
    # In full .88 and 1.00, from .69 and 1.16.
    assert found['spread_correlation'] >= 0.85
    assert found['spread_ratio'] == pytest.approx(1.0, abs=0.1)
    assert found['w1_shift'] < 0.75 * free['w1_shift']


def test_quantile_regression_itself():
    rows = identifiability.population_tolerances(0)
    assert len(rows) == 6
    assert all(row['met'] for row in rows), rows


# Parts.


def test_intervals_by_hand():
    # 1, 2, 3: standard error 1 / sqrt 3, and Student's t with 2 degrees of freedom is 4.3027.
    found = identifiability.interval([1.0, 2.0, 3.0], 0.95)
    assert found['mean'] == 2.0
    assert found['high'] - 2.0 == pytest.approx(4.3027 / math.sqrt(3.0), abs=1e-4)
    assert 2.0 - found['low'] == pytest.approx(found['high'] - 2.0)
    assert identifiability.interval([1.0, None], 0.95)['mean'] is None


def test_known_annotators_judge_by_their_own_rewards():
    # Two annotators, two pairs; the first pair is judged by annotator 1, the second by 0.
    model = Model(HeadConfig('annotator', annotators=('a', 'b')),
                  LossConfig('annotator_bradley_terry'))
    values = jnp.array([[9.0, 1.0], [0.0, 3.0], [0.5, 0.0], [0.0, 7.0]])
    win, loss = identifiability.log_wins(model, uniform_atoms(values), np.array([1, 0]))
    np.testing.assert_allclose(np.exp(win), [1 / (1 + math.e**2), 1 / (1 + math.e**-0.5)], 1e-5)
    np.testing.assert_allclose(np.exp(win) + np.exp(loss), 1.0, atol=1e-6)


def test_others_judge_by_the_likelihood_they_fit():
    # Atoms 0 and 2 against 1 and 1: the means are equal, and so is the mean of sigma(+-1).
    values = jnp.array([[0.0, 2.0], [1.0, 1.0], [3.0, 3.0], [0.0, 2.0]])
    for objective in ('bradley_terry', 'distributional_bradley_terry'):
        model = Model(HeadConfig('quantile', 2), LossConfig(objective))
        win, _ = identifiability.log_wins(model, uniform_atoms(values), np.zeros(2, int))
        expected = {'bradley_terry': 1 / (1 + math.e**-2),
                    'distributional_bradley_terry': (1 / (1 + math.e**-3) + 1 / (1 + math.e**-1))
                    / 2}[objective]
        np.testing.assert_allclose(np.exp(win), [0.5, expected], rtol=1e-5)


def test_two_sets_of_quantiles_in_the_report():
    found = identifiability.equal_win_probabilities(
        load_config('identifiability'), worlds.make(0))
    assert found['largest_difference'] <= 1e-9
    assert found['spread_ratio'] == pytest.approx(1.88, abs=0.2)


def test_agreement_by_hand():
    spreads = [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0]] + [[1.0, 1.0, 4.0]] * 4
    rows = {key: {'table': key[0], 'label': key[1], 'spread': spread,
                  'true_spread': [0.0, 1.0, 0.0]}
            for key, spread in zip(identifiability._ANCHORED, spreads, strict=True)}
    found = identifiability.agreement(rows)
    assert [(row['table'], row['label']) for row in found] == list(rows)
    np.testing.assert_allclose(found[0]['with'][:3], [1.0, 1.0, -1.0])
    # (1, 2, 3) with (1, 1, 4) is sqrt(3) / 2, and with the truth 0.
    np.testing.assert_allclose(found[0]['with'][3:], [3**0.5 / 2] * 4 + [0.0], atol=1e-12)


def test_models_learn_from_what_their_kind_says():
    config, world = load_config('identifiability', pairs=500), worlds.make(0)
    kinds = identifiability.kinds(config)

    def ratings(table, kind):
        data = identifiability._data(config, world, Cell(table, kind, 500), kinds[table][kind], 0)
        return np.asarray(data.judgement.ratings)[..., 0]

    pairs = worlds.sample_pairs(world, 'independent', 500, 0)
    np.testing.assert_array_equal(ratings('ratings', 'ordinal'), pairs.rewards)
    assert np.isnan(ratings('independent', 'thurstone')).all()
    for table in ('independent', 'shared'):
        assert np.isfinite(ratings(table, 'thurstone_anchored')).all()
    assert not np.allclose(ratings('independent', 'gaussian_anchored'), pairs.rewards)
    assert 0 < np.isfinite(ratings('independent', 'gaussian_few')).sum() < 30


# A run.


def pretend(_config, _world, cell):
    """What `measure` returns, without training: two seeds, four items."""
    metrics = {name: [0.25, 0.75] for name in identifiability.METRICS}
    if cell.kind == 'scalar':
        metrics['spread_correlation'] = [None, None]
    return {'metrics': metrics, 'coverage': [[0.5] * 10] * 2, 'spread': [1.0, 2.0, 2.0, 1.0],
            'true_spread': [0.5, 1.0, 1.5, 2.0]}


@pytest.fixture
def measured(monkeypatch):
    """The cells that are measured from here on."""
    cells = []
    monkeypatch.setattr(identifiability, 'measure',
                        lambda *args: cells.append(args[-1]) or pretend(*args))
    return cells


def test_a_run_leaves_numbers_text_and_figures(measured, tmp_path):
    config = load_config('identifiability', **TINY)
    text = identifiability.identify(config, str(tmp_path))
    assert measured == identifiability.cells(config)
    result = json.loads((tmp_path / 'identifiability.json').read_text())
    assert [Cell(row['table'], row['kind'], row['pairs']) for row in result['rows']] == measured
    scalar = result['rows'][0]['metrics']
    assert scalar['spread_correlation']['mean'] is None
    # .25, .75: standard error .25, and Student's t with 1 degree of freedom is 12.7062.
    assert scalar['accuracy']['mean'] == 0.5
    assert scalar['accuracy']['high'] == pytest.approx(0.5 + 0.25 * 12.7062, abs=1e-4)
    assert (tmp_path / 'identifiability.md').read_text(encoding='utf-8') == text
    assert '| BT, scalar | 0.500 [-2.677, 3.677] | ' in text
    assert '| distributional BT, 64 pairs: W1 after affine map | ≤ 0.32 | 0.5 | **no** |' in text
    assert '| one annotator a pair, Gaussian: spread correlation | ≤ 0.3 | 0.5 | **no** |' in text
    assert text.count('| independent | distributional BT, monotone | ') == 2
    assert '| (7) ratings: pinball | 1.00 |' in text
    for name in ('spread', 'coverage', 'growth', 'equal_win_probabilities', 'landscapes'):
        assert (tmp_path / 'figures' / f'{name}.png').read_bytes()[:4] == b'\x89PNG'


def test_growth_is_drawn_by_annotation():
    def row(table, label, pairs, value):
        cell = {'mean': value, 'low': value and value - 0.1, 'high': value and value + 0.2}
        return {'table': table, 'label': label, 'pairs': pairs,
                'metrics': {'spread_correlation': cell,
                            'w1_affine': {'mean': 0.5, 'low': 0.5, 'high': 0.5}}}

    figure = figures.draw_growth({'rows': [
        row('shared', 'a', 40, 0.6), row('shared', 'b', 40, 0.1), row('ratings', 'c', 40, None),
        row('shared', 'a', 10, 0.3), row('ratings', 'c', 10, None)]})
    shared, ratings, *below = figure.axes
    assert [axes.get_title() for axes in (shared, ratings)] == ['shared', 'ratings']
    (line, _, (bars,)), = shared.containers  # b has one size only
    np.testing.assert_array_equal(line.get_xydata(), [[10, 0.3], [40, 0.6]])
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [0.2, 0.5])
    assert not ratings.containers  # a scalar has no spread
    assert [axes.get_legend().get_texts()[0].get_text() for axes in below] == ['a', 'c']


def test_a_second_run_measures_only_what_is_missing(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(identifiability, 'summarise', lambda *_: {})
    monkeypatch.setattr(identifiability, 'format_report', lambda *_: '')
    monkeypatch.setattr(identifiability.figures, 'draw_identifiability', lambda *_: None)
    config = load_config('identifiability', **TINY)
    identifiability.identify(config, str(tmp_path))
    measured.clear()
    identifiability.identify(config, str(tmp_path))
    assert not measured
    larger = load_config('identifiability', **TINY | {'reproduce.sizes': (32, 64, 96)})
    identifiability.identify(larger, str(tmp_path))
    assert measured == [Cell('independent', 'monotone', 96)]
    with pytest.raises(WorkdirError, match='config.pairs: 64 -> 65'):
        identifiability.identify(load_config('identifiability', **TINY | {'pairs': 65}),
                                 str(tmp_path))


# Configuration.


def test_cells_of_the_config():
    config = load_config('identifiability')
    found = identifiability.cells(config)
    assert len(found) == len(set(found))
    kinds = identifiability.kinds(config)
    assert {(c.table, c.kind) for c in found if c.pairs == 40_000} == {
        (table, kind) for table, rows in kinds.items() for kind in rows}
    full = identifiability.cells(load_config('identifiability', 'full'))
    assert len(full) == 3 * sum(len(rows) for rows in kinds.values())
    assert set(found) < set(full)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'seeds': 1}, 'config.seeds=1, expected a number of at least 2'),
        ({'passes': 0.0}, 'config.passes=0.0'),
        ({'reproduce.growth': ('ratings/none',)}, "growth: 'ratings/none', expected some of"),
        ({'reproduce.sizes': (0,)}, r'config.reproduce.sizes=\(0,\)'),
        ({'analysis.level': 1.0}, 'config.analysis.level=1.0'),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        identifiability.check(load_config('identifiability', **change))
    identifiability.check(load_config('identifiability'))


def test_the_argument_is_empty_or_full():
    assert len(load_config('identifiability').reproduce.growth) == 5
    assert len(load_config('identifiability', 'full').reproduce.growth) == 32
    with pytest.raises(ValueError, match="argument 'half', expected '' or 'full'"):
        load_config('identifiability', 'half')
