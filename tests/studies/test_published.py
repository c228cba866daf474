"""The paper's table from its own code: simulation against SciPy, a whole run, what is refused."""

import json

import numpy as np
import pytest
import scipy

from qrm.analysis import divergences
from qrm.data.comparisons import DataError
from qrm.studies import published
from qrm.training.schema import ConfigError
from tests.helpers import TINY, load_config, pair_predictions

CHANGES = TINY | {
    'reproduce.workloads': ('helpful',), 'model.sizes.max_positions': 256, 'train.max_steps': 6,
    'data.demo.train': 100, 'train.checkpoint_every': 3, 'optimizer.learning_rate': 1e-2,
    'published.draws': 20, 'published.followed': 20,
    'published.aucs': (0.5, 0.8), 'published.bins': (20, 50), 'train.row_length': 256,
}


def test_simulated_definitions_are_those_of_scipy():
    rows = published.simulate((79, 65), (0.5, 0.7), (50,), 20, 3)
    assert len(rows) == 2 * 2 * (len(divergences.ESTIMATORS) - 2 + 1)
    for n, auc in ((79, 0.5), (65, 0.7)):
        rng = np.random.default_rng((3, n, round(1000 * auc)))
        values, aucs = [], []
        for _ in range(20):
            chosen = rng.normal(2.0**0.5 * scipy.stats.norm.ppf(auc), 1.0, n)
            rejected = rng.normal(0.0, 1.0, n)
            limits = min(chosen.min(), rejected.min()), max(chosen.max(), rejected.max())
            values.append(scipy.stats.entropy(*(
                np.histogram(side, 50, limits)[0] / n + 1e-10 for side in (chosen, rejected))))
            aucs.append(np.mean(chosen[:, None] > rejected))
        row, = (r for r in rows if (r['n'], r['auc'], r['bins']) == (n, auc, 50))
        assert np.mean(aucs) == pytest.approx(auc, abs=0.03)
        assert row['definition'] == 'epsilon_histogram'
        assert not row['is_kl']
        assert row['mean'] == pytest.approx(np.mean(values), rel=1e-6)
        assert [row['low'], row['high']] == pytest.approx(np.quantile(values, [0.05, 0.95]))
    # Of unit variances the divergence is half the squared distance.
    assert rows[-1]['truth'] == pytest.approx(scipy.stats.norm.ppf(0.7) ** 2)


def test_orders_of_the_published_pairs():
    # All pairs alike: whatever the order and the batch, the longer side is read at its end.
    first, *_, last = published.read_orders('w', np.tile([[9, 4]], (32, 1)), 3, 0)
    assert first == {'workload': 'w', 'batch': 1, 'responses': 64, 'end': 32, 'inside': 0,
                     'padding': 32, 'end_in_random_order': {'mean': 32, 'low': 32, 'high': 32}}
    assert (last['batch'], last['end']) == (16, 32)


def test_measures_by_hand():
    # Two of three pairs are right, and five of nine comparisons of any two sides.
    chosen, rejected = (np.tile(side, 40)[:, None] for side in ([1.0, 3.0, 5.0], [0.0, 2.0, 6.0]))
    analysis = load_config('published', **CHANGES | {'analysis.bootstrap': 400}).analysis
    # Opening questions that are all alike leave nothing to be drawn.
    alike = published.measure(
        pair_predictions(chosen, rejected, groups=np.repeat(np.arange(40), 3)), analysis)
    for name, expected in {'accuracy': 2 / 3, 'auc': 5 / 9}.items():
        assert list(alike[name].values()) == pytest.approx([expected] * 3)
    # Means 3 and 8/3, variances 8/3 and 56/9.
    gaussian = (np.log(56 / 24) + (8 / 3 + 1 / 9) / (56 / 9) - 1) / 2
    assert list(alike['kl']['gaussian'].values()) == pytest.approx([gaussian] * 3)
    # With a question for each pair the number of right ones is binomial.
    own = published.measure(pair_predictions(chosen, rejected), analysis)
    assert own['kl']['gaussian']['low'] < gaussian < own['kl']['gaussian']['high']
    right = scipy.stats.binom(120, 2 / 3)
    assert [own['accuracy'][key] for key in ('value', 'low', 'high')] == pytest.approx(
        [2 / 3, right.ppf(0.025) / 120, right.ppf(0.975) / 120], abs=0.02)
    assert own['auc']['value'] == pytest.approx(5 / 9)
    assert own['auc']['low'] < 0.52 < 0.59 < own['auc']['high']


def test_histograms_of_means_and_of_all_quantiles():
    rng = np.random.default_rng(0)
    # Quantiles that are equal count as often as there are: the shares of bins are the same.
    equal = [np.repeat(rng.normal(mean, 1.0, (50, 1)), 4, axis=1) for mean in (0.5, 0.0)]
    means, quantiles = published.count(pair_predictions(*equal), 50, (20,), 30, 0)
    assert [row['counted'] for row in (means, quantiles)] == ['means', 'quantiles']
    assert quantiles['mean'] == pytest.approx(means['mean'], rel=1e-5)
    assert means['low'] == pytest.approx(means['high'])  # a subset of all
    # Far apart, two of four are not in the other side's bins: log of 1/4 to 1e-10, twice 1/4.
    apart = [np.tile([0.0, 1.0, 2.0, 3.0], (50, 1)), np.tile([0.0, 1.0, 8.0, 9.0], (50, 1))]
    rows = published.count(pair_predictions(*apart), 20, (10,), 30, 0)
    assert rows[1]['n'] == 20
    assert rows[1]['mean'] == pytest.approx(np.log(0.25 / 1e-10) / 2, rel=1e-6)
    # The scalar has its reward alone.
    single = [side[:, :1] for side in equal]
    rows = published.count(pair_predictions(*single), 12, (5, 9), 2, 0)
    assert [row['counted'] for row in rows] == ['means'] * 2


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp('published')
    config = load_config('published', **CHANGES)
    return published.published(config, str(folder)), folder, config


def test_a_whole_run(done):
    text, folder, config = done
    result = json.loads((folder / 'published.json').read_text())
    assert result['reads'] == {}
    assert 'Left out: no config.paper' in text
    assert (folder / 'published.md').read_text() == text
    assert {path.name for path in (folder / 'figures').iterdir()} == {
        'estimators.png', 'spread.png'}
    assert {(row['n'], row['auc']) for row in result['estimators']} == {
        (n, auc) for n in (79, 65) for auc in (0.5, 0.8)}
    assert {row['targets'] for row in result['spread']} == set(published.TARGETS)
    # All start alike. The own mean takes the spread away, also on the side that it does not act
    # on; without a quantile loss nothing does.
    spread = {(row['targets'], row['step']): row for row in result['spread']}
    assert {step for _, step in spread} == {3, 6}
    for side in ('chosen', 'rejected'):
        assert spread['own_mean', 6][side] < 0.9 * spread['own_mean', 3][side]
        assert spread['own_mean', 6][side] < 0.3 * spread['free', 6][side]
        assert spread['free', 6][side] > 0.9 * spread['free', 3][side]
        assert spread['own_mean', 6][side] < 0.5 * spread['label', 6][side]
        own = spread['own_mean', 6]
        assert own['relative'][side]['value'] == pytest.approx(own[side] / own['reward_std'])
        assert own['relative'][side]['low'] < own['relative'][side]['high']
    # Both models at both places; all pairs, and as many as published.
    assert [(row['head'], row['read'], row['n']) for row in result['table']] == [
        (head, read, n) for head in ('scalar', 'quantile') for read in ('end', 'published')
        for n in (150, 79)]
    # The same quantile model, read at two places.
    end, elsewhere = (row for row in result['table']
                      if (row['head'], row['n']) == ('quantile', 150))
    assert abs(end['accuracy']['value'] - elsewhere['accuracy']['value']) > 0.02
    assert abs(end['auc']['value'] - elsewhere['auc']['value']) > 0.005
    assert {(row['head'], row['read'], row['counted'], row['bins']) for row in result['counts']
            } == {(head, read, counted, bins) for bins in (20, 50) for read in published.READS
                  for head, counted in (('scalar', 'means'), ('quantile', 'means'),
                                        ('quantile', 'quantiles'))}
    # Of the same subsets: means in 50 bins stand in both tables.
    counted = {(row['head'], row['read']): row['mean'] for row in result['counts']
               if (row['counted'], row['bins']) == ('means', 50)}
    for row in result['table']:
        if row['n'] == 79:
            assert row['kl']['epsilon_histogram_50']['mean'] == pytest.approx(
                counted[row['head'], row['read']])
    for row in result['table']:
        assert row['kl'].keys() == divergences.ESTIMATORS.keys()
        assert row['kl']['gaussian']['low'] < row['kl']['gaussian']['high']
        for name in ('accuracy', 'auc'):
            low, middle, high = (row[name][key] for key in (
                'low', 'mean' if row['n'] == 79 else 'value', 'high'))
            assert low < middle < high
    # What subsets of the pairs come to is near all of them, and wider.
    for whole, subsets in zip(result['table'][::2], result['table'][1::2], strict=True):
        for name in ('accuracy', 'auc'):
            assert subsets[name]['mean'] == pytest.approx(whole[name]['value'], abs=0.03)
            assert f"{subsets[name]['mean']:.2f} [{subsets[name]['low']:.2f}, " in text
            assert f"{whole[name]['value']:.3f} [{whole[name]['low']:.3f}, " in text
    # A rerun trains nothing and comes to the same.
    again = published.published(config, str(folder))
    assert again == text


@pytest.mark.parametrize(('change', 'error', 'expected'), [
    ({'paper': '/nowhere'}, DataError, '/nowhere/helpful_valid.json: not the published'),
    ({'reproduce.models': ('scalar',)}, ConfigError, "expected \\('scalar', 'quantile'\\)"),
    ({'loss.targets': 'label'}, ConfigError, "expected 'own_mean', 'chosen' and a weight"),
    ({'model.family': 'llama', 'model.sizes.head_dim': 0}, ConfigError, "family 'llama'"),
    ({'published.aucs': (0.4,)}, ConfigError, 'config.published.aucs'),
    ({'head.members': 2}, ConfigError, 'expected EOS and one member'),
])
def test_what_cannot_be_used(change, error, expected):
    with pytest.raises(error, match=expected):
        published.check(load_config('published', **CHANGES | change))


@pytest.mark.parametrize('rows', [
    [], [{'chosen': 'ab', 'rejected': 'ac'}] * 65, [{'chosen': ['a', 'b'], 'rejected': ['a', 'c']}],
    {'a': 1}])
def test_files_that_are_not_the_published_pairs(tmp_path, rows):
    (tmp_path / 'harmless_valid.json').write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r'harmless_valid\.json: .*expected the'):
        published.read_pairs(str(tmp_path), 'harmless')
