"""Spreads against judges: numbers where the answer is known, and a study of tiny models."""

import json
import shutil
import types

import numpy as np
import pytest
import scipy.stats

from qrm.commands import configs
from qrm.data.comparisons import Comparison, DataError
from qrm.rewards import selection
from qrm.rewards.heads import HeadConfig
from qrm.rewards.losses import LossConfig
from qrm.rewards.statistics import Undefined
from qrm.studies import baselines, compare, disagreement
from qrm.studies.disagreement import Said
from qrm.studies.panels import Panel
from qrm.training import train, workdir
from qrm.training.schema import ConfigError
from qrm.training.workdir import WorkdirError
from tests.helpers import TINY, encoded, load_config, pair_predictions
from tests.studies.test_panels import votes

N = 400


def config(**changes):
    return configs.load('disagreement') if not changes else _changed(changes)


def _changed(changes):
    found = configs.load('disagreement')
    found.update_from_flattened_dict(changes)
    return found


def pairs(disputed, spread):
    """A panel of n pairs."""
    rows = [Comparison(str(i), f'q{i}', ('a', 'b'), f'q{i}', preference=0.5, ratings=(0.5, 0.5))
            for i in range(len(spread))]
    names = [c.id for c in rows]
    return Panel('made', 'judges', rows, dict(zip(names, spread.tolist(), strict=True)),
                 None if disputed is None else dict(zip(names, disputed.tolist(), strict=True)))


def said(margin, spread, **fields):
    n = len(margin)
    return Said(np.array([str(i) for i in range(n)]), np.arange(n), margin, spread,
                fields.pop('log_ratio', np.linspace(-1, 1, n)), fields.pop('predictions', None))


def test_what_knows_of_disagreement_and_what_does_not():
    rng = np.random.default_rng(0)
    margin, noise = rng.normal(size=N), rng.uniform(1.0, 2.0, N)
    disputed = rng.random(N) < 0.3
    panel = pairs(disputed, np.where(disputed, 0.5, 0.0))
    settings = config(**{'analysis.bootstrap': 200})
    knows = disagreement.measure(panel, [said(margin, noise + 1.0 * disputed)], settings)
    assert knows['disputed']['spread']['value'] == 1.0
    assert knows['disputed']['equal_margin']['low'] > 0.9
    # A function of the size of the margin says nothing at equal margin.
    copies = disagreement.measure(
        pairs(np.abs(margin) < 0.4, margin**2), [said(margin, 2.0 - np.abs(margin))], settings)
    assert copies['disputed']['spread']['value'] == copies['disputed']['margin']['value'] == 1.0
    assert copies['graded']['partial']['value'] is None
    blind = disagreement.measure(panel, [said(margin, noise)], settings)
    for name in ('spread', 'equal_margin', 'margin', 'shuffled', 'length'):
        cell = blind['disputed'][name]
        assert cell['low'] < 0.5 < cell['high'], name
    assert blind['items'] == N
    # Of two seeds the mean, and an interval that reaches both.
    both = disagreement.measure(
        panel, [said(margin, noise + disputed), said(margin, noise)], settings)
    cell = both['disputed']['spread']
    assert cell['value'] == pytest.approx((1.0 + blind['disputed']['spread']['value']) / 2)
    assert cell['low'] < 0.6
    assert cell['high'] > 0.95


def test_rank_correlations_with_the_judges_spread():
    rng = np.random.default_rng(1)
    margin, own = rng.normal(size=N), rng.normal(size=N)
    target = own + 0.5 * rng.normal(size=N) - np.abs(margin)
    panel = pairs(None, target)
    found = disagreement.measure(panel, [said(margin, own - np.abs(margin))],
                                 config(**{'analysis.bootstrap': 20}))
    assert 'disputed' not in found

    def rank(a, b):
        return scipy.stats.spearmanr(a, b).statistic

    spread, small = own - np.abs(margin), -np.abs(margin)
    assert found['graded']['spread']['value'] == pytest.approx(rank(spread, target))
    assert found['graded']['margin']['value'] == pytest.approx(rank(small, target))
    a, b, c = rank(spread, target), rank(small, target), rank(spread, small)
    assert found['graded']['partial']['value'] == pytest.approx(
        (a - b * c) / np.sqrt((1 - b**2) * (1 - c**2)))


def test_what_rules_gain_on_disputed_pairs():
    # The first response has the higher mean and a low lowest quantile; judges prefer the second.
    chosen = np.tile([[-5.0, 5.0, 6.0]], (60, 1))
    rejected = np.tile([[0.9, 1.0, 1.1]], (60, 1))
    p = pair_predictions(chosen, rejected)
    shares = np.tile([0.25, 0.75], 60).astype(np.float32)
    p = p._replace(ratings=shares, comparison_ids=np.array([str(i) for i in range(60)]))
    disputed = np.arange(60) < 40
    panel = pairs(disputed, np.zeros(60))
    settings = config(**{'analysis.bootstrap': 20, 'rules': ('quantile:0.1', 'cvar:1.0')})
    found = disagreement.measure(panel, [said(np.ones(60), np.ones(60), predictions=p)], settings)
    assert found['choices']['quantile:0.1']['value'] == pytest.approx(0.5)
    assert found['choices']['cvar:1.0']['value'] == pytest.approx(0.0, abs=1e-6)
    few = pairs(np.arange(60) < 5, np.zeros(60))
    found = disagreement.measure(few, [said(np.ones(60), np.ones(60), predictions=p)], settings)
    assert found['choices']['quantile:0.1']['value'] is None
    single = p._replace(stds=np.full_like(p.stds, 1e-7))  # what rounding makes of equal quantiles
    found = disagreement.measure(panel, [said(np.ones(60), np.ones(60), predictions=single)],
                                 settings)
    assert {cell['value'] for cell in found['choices'].values()} == {None}
    assert selection.scores_of(selection.Rule('mean'), p).tolist() == p.means.tolist()


def test_single_numbers_cover_nothing_and_have_an_error():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(60, 1))
    p = pair_predictions(rewards[:30], rewards[30:])
    ratings = (2.0 * p.means + 1.0).astype(np.float32)
    p = p._replace(ratings=ratings + rng.normal(size=60).astype(np.float32))
    slope, intercept = np.polyfit(p.means.astype(np.float64), p.ratings.astype(np.float64), 1)
    error = np.abs(p.ratings - intercept - slope * p.means)
    assert disagreement._of_ratings('crps', p)(None) == pytest.approx(error.mean(), rel=1e-5)
    assert disagreement._of_ratings('rank_correlation_of_reward', p)(None) > 0.5
    for name in ('coverage_error', 'crps_gain', 'rank_correlation_with_error'):
        with pytest.raises(Undefined, match='single numbers'):
            disagreement._of_ratings(name, p)


def test_rules_without_a_spread_are_not_counted():
    none = dict.fromkeys(('value', 'low', 'high'))
    gained = {'value': 0.1, 'low': 0.01, 'high': 0.2}
    rows = [{'workload': 'helpful', 'model': name, 'choices': {'cvar:0.2': cell}}
            for name, cell in (('scalar', none), ('quantile', gained))]
    lines = disagreement.verdict({'panels': [{'name': 'made', 'judges': 'judges'}],
                                  'results': {'made': rows}}, config().yes)
    assert lines == ['made: rules that choose better than the mean on disputed pairs: '
                     'quantile (helpful) by cvar:0.2 (of 1)']


def test_answers_are_by_the_bounds_of_the_config():
    cells = {'yes': (0.6, 0.52, 0.7), 'not shown': (0.6, 0.48, 0.7), 'no': (0.4, 0.3, 0.49)}
    rows = [{'workload': 'helpful', 'model': name, 'graded': {},
             'disputed': {'equal_margin': dict(zip(('value', 'low', 'high'), cell, strict=True))},
             'choices': {'cvar:0.2': {'value': 0.1, 'low': 0.01, 'high': 0.2}}}
            for name, cell in cells.items()]
    result = {'panels': [{'name': 'made', 'judges': 'judges', 'pairs': True}],
              'results': {'made': rows}}
    lines = disagreement.verdict(result, config().yes)
    for name in cells:
        assert f'its spread finds what is disputed: {name}: {name} (helpful)' in lines[
            list(cells).index(name)]
    assert lines[3].endswith(
        'yes (helpful) by cvar:0.2, not shown (helpful) by cvar:0.2, no (helpful) by cvar:0.2 '
        '(of 3)')
    stricter = config(**{'yes.auroc': 0.55}).yes
    assert ': not shown: yes (helpful), not shown (helpful)' in disagreement.verdict(
        result, stricter)[0]


def test_the_spread_of_a_pair_is_that_of_the_margins_of_members():
    # Margins 1 and 3 of two members, and 4 and 4; the second ranks responses as it likes.
    means = np.array([[[1.0, 5.0], [0.0, 2.0]], [[3.0, 1.0], [-1.0, -3.0]]])
    none = np.zeros_like(means)
    np.testing.assert_allclose(disagreement.spread_of(means, none), [1.0, 0.0], atol=1e-12)
    # Sides of 3 and 4 by one member and of nothing by the other: (25 + 0) / 2 on top.
    stds = none + np.array([[[3.0, 0.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = [np.sqrt(13.5), 0.0]
    np.testing.assert_allclose(disagreement.spread_of(means, stds), expected, atol=1e-12)
    offsets = np.array([0.0, 100.0])
    np.testing.assert_allclose(
        disagreement.spread_of(means + offsets, stds), expected, atol=1e-9)
    # One member: the sides are independent.
    np.testing.assert_allclose(
        disagreement.spread_of(means[..., :1], stds[..., :1]), [5.0, 0.0], atol=1e-12)
    # Single responses: 1 and 3 by one member, 2 and 8 by the other, less their means.
    single = np.array([[[1.0, 2.0]], [[3.0, 8.0]]])
    for members in (single, single + offsets):
        np.testing.assert_allclose(
            disagreement.spread_of(members, np.zeros_like(single)), [1.0, 1.0], atol=1e-9)


def test_an_ensemble_says_the_spread_of_its_margins():
    outputs = [np.array([[1.0, 5.0], [0.0, 2.0]], np.float32),
               np.array([[3.0, 1.0], [-1.0, -3.0]], np.float32)]
    items = [encoded(i, 2, [1, 1]) for i in range(2)]

    def saying(shift):
        return types.SimpleNamespace(
            predict=lambda _: [values + np.float32([0.0, shift]) for values in outputs],
            network=types.SimpleNamespace(head=HeadConfig('scalar', members=2)),
            loss=LossConfig('bradley_terry'))

    for shift in (0.0, 10.0):
        found = disagreement._of_head(saying(shift), items)
        np.testing.assert_allclose(found.spread, [1.0, 0.0], atol=1e-5)
        np.testing.assert_allclose(found.margin, [2.0, 4.0], atol=1e-5)


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    """Folder of a comparison of tiny heads, and of files of panels."""
    folder = tmp_path_factory.mktemp('disagreement')
    compare.compare(load_config('compare', **TINY | {
        'train.tune': 'head', 'train.max_steps': 5, 'compare.seeds': (0,),
        'compare.models': ('scalar', 'quantile'), 'head.reads': ('last', 'mean'),
        'compare.baselines': (), 'evaluation.exchanged': 0, 'analysis.bootstrap': 20}),
                    str(folder / 'runs'))
    rng = np.random.default_rng(0)
    words = ['one', 'two', 'three', 'four']

    def text(): return ' '.join(rng.choice(words, rng.integers(1, 6)))

    rows = [votes(*(rng.integers(3, size=3).tolist()), idx=i, instruction=f'Say {i} {text()}',
                  response1=text(), response2=text()) for i in range(80)]
    (folder / 'testset.json').write_text(json.dumps(rows))
    template = ('###The instruction to evaluate:\n{}\n\n###Response to evaluate:\n{}\n\n'
                '###Reference Answer (Score 5):\nX')
    rows = [{'instruction': template.format(f'Say {i}', text()),
             'gpt4_score': rng.integers(1, 6, 3).tolist()} for i in range(40)]
    (folder / 'eval.json').write_text(json.dumps(rows))
    for workload in ('helpful', 'harmless'):
        rows = [{'chosen': [f'Hi {i}', text()], 'rejected': [f'Hi {i}', text()],
                 'chosen score list': rng.normal(size=10).tolist(),
                 'rejected score list': rng.normal(size=10).tolist()} for i in range(35)]
        (folder / f'{workload}_valid.json').write_text(json.dumps(rows))
    return folder


def test_a_study_of_tiny_models(compared):
    settings = config(**{
        'runs': str(compared / 'runs'), 'pandalm': str(compared / 'testset.json'),
        'paper': str(compared), 'prometheus': str(compared / 'eval.json'),
        'analysis.bootstrap': 20, 'yes.auroc': 0.45, 'yes.correlation': 0.1, 'yes.gain': 0.02})
    text = disagreement.disagreement(settings, str(compared / 'out'))
    assert (compared / 'out' / 'disagreement.md').read_text() == text
    result = json.loads((compared / 'out' / 'disagreement.json').read_text())
    assert [p['name'] for p in result['panels']] == [
        'pandalm', 'paper_helpful', 'paper_harmless', 'prometheus']
    assert {path.name for path in (compared / 'out' / 'figures').iterdir()} == {
        f"{p['name']}.png" for p in result['panels']}
    rows = {row['model']: row for row in result['results']['pandalm']}
    assert list(rows) == ['scalar', 'quantile', 'bayes']
    assert (rows['scalar']['seeds'], rows['bayes']['seeds']) == (1, 1)
    # A scalar's spread is 0 everywhere: it can say nothing.
    assert rows['scalar']['disputed']['spread']['value'] is None
    assert 'the spread at equal reward' in text
    assert 'choices' not in rows['bayes']
    assert set(rows['quantile']['choices']) == {'quantile:0.1', 'cvar:0.2', 'mean-std:1'}
    assert 'rated' in result['results']['prometheus'][1]
    assert result['verdict']
    assert 'Yes: an interval above 0.45, of the AUROC' in text
    assert "above 0.1, of the rank correlation with the judges' spread" in text
    assert 'above 0.02, of what a rule gains' in text
    for line in text.splitlines():
        assert not line.startswith('|') or line.endswith('|')


def test_the_bayesian_head_is_the_probe_with_its_curvature(compared):
    run = next(r for r in disagreement.find_runs(str(compared / 'runs')) if r.model == 'bayes')
    prepared = train.prepare(workdir.load_config(run.folder), run.folder)
    bayes = baselines.fit_bayes(prepared)
    items = prepared.model.features.of(prepared.encoded['train'])
    x = np.array([np.subtract(*item.features) for item in items], np.float64)
    w = bayes.probe.weights

    def loss(v):
        return (np.logaddexp(0.0, -x @ v).sum()
                + 0.5 * len(x) * bayes.probe.penalty * np.sum((v * bayes.probe.scale) ** 2))

    # The second difference of the loss along a direction is the precision along it.
    rng, step = np.random.default_rng(0), 1e-3
    precision = np.linalg.inv(bayes.covariance)
    for _ in range(3):
        u = rng.normal(size=len(w))
        u /= np.linalg.norm(u)
        v = step * u / bayes.probe.scale
        curvature = (loss(w + v) - 2 * loss(w) + loss(w - v)) / step**2
        assert u @ precision @ u == pytest.approx(curvature, rel=1e-3)
    mean, std = bayes.predict(x[:5])
    np.testing.assert_allclose(mean, x[:5] @ w)
    np.testing.assert_allclose(
        std, [np.sqrt((row / bayes.probe.scale) @ bayes.covariance @ (row / bayes.probe.scale))
              for row in x[:5]])


@pytest.mark.parametrize(('changes', 'error', 'message'), [
    ({'runs': ''}, ConfigError, "config.runs='', expected the folder"),
    ({'pandalm': ''}, ConfigError, 'expected a panel'),
    ({'rules': ('median',)}, ConfigError, "config.rules: rule 'median'"),
    ({'runs': '/nowhere'}, WorkdirError, 'compare.json: no such file'),
    ({'pandalm': '/nowhere.json'}, DataError, '/nowhere.json: not the test set')])
def test_what_cannot_be_judged_is_said(changes, error, message, compared, tmp_path):
    settings = config(**{'runs': str(compared / 'runs'),
                         'pandalm': str(compared / 'testset.json')} | changes)
    with pytest.raises(error, match=message):
        disagreement.disagreement(settings, str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_a_backbone_that_was_trained_has_no_bayesian_head(compared, tmp_path):
    shutil.copytree(compared / 'runs', tmp_path / 'runs')
    assert [run.model for run in disagreement.find_runs(str(tmp_path / 'runs'))][-1] == 'bayes'
    for path in (tmp_path / 'runs').glob('*/config.json'):
        config = json.loads(path.read_text())
        config['train']['tune'] = 'all'
        path.write_text(json.dumps(config))
    assert {run.model for run in disagreement.find_runs(str(tmp_path / 'runs'))} == {
        'scalar', 'quantile'}
