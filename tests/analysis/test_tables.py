"""The table: paired intervals, what stands in it, and what is refused."""

import json

import numpy as np
import pytest
import scipy

from qrm.analysis import divergences, tables
from qrm.data.comparisons import DataError
from qrm.rewards import heads
from tests.helpers import pair_predictions


def made(n=200, *, shift=0.5, quantiles=1, noise=0.0, seed=0, scale=1.0, groups=None):
    """Predictions whose rewards are Gaussian, chosen ahead by `shift`."""
    rng = np.random.default_rng(seed)
    chosen = (rng.normal(shift, 1.0, n) + noise * np.random.default_rng(99).normal(size=n))[:, None]
    rejected = rng.normal(0.0, 1.0, n)[:, None]
    offsets = heads.taus(quantiles) - 0.5
    ahead = (chosen - rejected)[:, 0]
    return pair_predictions(
        scale * (chosen + offsets), scale * (rejected + offsets), groups=groups,
        log_win=-np.log1p(np.exp(-ahead)), log_loss=-np.log1p(np.exp(ahead)))


def build(runs, **kwargs):
    settings = {'replicates': 40, 'null_draws': 20, 'level': 0.9, 'seed': 0, 'source': 'noise'}
    return tables.build_table(runs, **settings | kwargs)


@pytest.fixture(scope='module')
def table():
    return build({
        ('helpful', 'scalar'): made(), ('helpful', 'quantile'): made(quantiles=10, noise=0.05),
        ('harmless', 'scalar'): made(seed=1), ('harmless', 'quantile'): made(seed=1, quantiles=10),
    })


def test_the_table_has_what_readers_of_the_file_rely_on(table):
    assert [(r['workload'], r['model']) for r in table['rows']] == [
        ('helpful', 'scalar'), ('helpful', 'quantile'),
        ('harmless', 'scalar'), ('harmless', 'quantile')]
    for row in table['rows']:
        assert {'n', 'accuracy', 'auc', 'std'} <= row.keys()
        assert row['kl'].keys() == divergences.ESTIMATORS.keys()
        for name, cell in row['kl'].items():
            assert {'value', 'low', 'high', 'null', 'half', 'double'} <= cell.keys()
            assert cell['is_kl'] == divergences.ESTIMATORS[name].is_kl
        assert row['accuracy_low'] <= row['accuracy'] <= row['accuracy_high']
    assert table['published'] == {'helpful': {'scalar': 4.914, 'quantile': 6.779},
                                  'harmless': {'scalar': 6.833, 'quantile': 7.291}}
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_real_estimators_find_the_divergence_and_do_not_depend_on_the_scale(table):
    truth = 0.5**2 / 2
    for row in table['rows']:
        gaussian = row['kl']['gaussian']
        assert gaussian['low'] < truth < gaussian['high']
        for cell in row['kl'].values():
            if cell['is_kl']:
                assert cell['half'] == pytest.approx(cell['value'], rel=1e-6)
                assert cell['double'] == pytest.approx(cell['value'], rel=1e-6)
        assert row['kl']['kde_sum_without_dx']['half'] == pytest.approx(
            2 * row['kl']['kde_sum_without_dx']['value'], rel=1e-6)


def test_accuracy_and_auc_of_subsets_by_hand():
    # Of rewards 1, 3, 5 chosen and 0, 2, 6 rejected two of three pairs are right, and 1 + 2 + 2 of
    # nine comparisons.
    chosen, rejected = (np.repeat(side, 20) for side in ([1.0, 3.0, 5.0], [0.0, 2.0, 6.0]))
    noise = 0.01 * np.random.default_rng(0).normal(size=60)  # for the definitions, of no other use
    given = chosen + noise, rejected + noise, np.arange(60)
    everything = tables.of_subsets(*given, 60, 3, 0)
    for name, expected in {'accuracy': 2 / 3, 'auc': 5 / 9}.items():
        assert list(everything[name].values()) == pytest.approx([expected] * 3)
    # Right pairs among 24 of 60 without replacement are hypergeometric.
    found = tables.of_subsets(*given, 24, 400, 0)['accuracy']
    right = scipy.stats.hypergeom(60, 40, 24)
    assert found['mean'] == pytest.approx(2 / 3, abs=4 * right.std() / 24 / 20)
    assert [found['low'], found['high']] == pytest.approx(
        [right.ppf(0.05) / 24, right.ppf(0.95) / 24])


def test_as_few_pairs_as_published(table):
    scalar = made()
    chosen, rejected = scalar.rewards
    for row in table['rows']:
        assert row['matched']['n'] == {'helpful': 79, 'harmless': 65}[row['workload']]
        assert row['matched']['kl'].keys() == divergences.ESTIMATORS.keys()
        for cell in (row['matched']['accuracy'], row['matched']['auc'],
                     *row['matched']['kl'].values()):
            assert cell['low'] < cell['mean'] < cell['high']
    # Where the subset is everything there is nothing random about it.
    found = tables.of_subsets(chosen, rejected, scalar.groups, len(chosen), 2, 0)['kl']['gaussian']
    assert found['low'] == pytest.approx(found['high'])
    assert found['mean'] == pytest.approx(table['rows'][0]['kl']['gaussian']['value'])
    # Few pairs leave more bins with one side only.
    first = table['rows'][0]
    assert first['matched']['kl']['epsilon_histogram_50']['low'] > (
        first['kl']['epsilon_histogram_50']['value'])
    assert build({('helpful', 'scalar'): made(79)})['rows'][0]['matched'] is None
    assert build({('pairs', 'scalar'): made()})['rows'][0]['matched'] is None


def test_differences_between_heads_are_paired(table):
    assert [(d['model'], d['reference']) for d in table['differences']] == 2 * [
        ('quantile', 'scalar')]
    first, second = (d['kl']['gaussian'] for d in table['differences'])
    rows = {(r['workload'], r['model']): r['kl']['gaussian'] for r in table['rows']}
    helpful = rows['helpful', 'quantile']
    assert first['value'] == pytest.approx(helpful['value'] - rows['helpful', 'scalar']['value'])
    # Nearly the same rewards: the difference is known far better than either value.
    assert first['high'] - first['low'] < 0.3 * (helpful['high'] - helpful['low'])
    # The same rewards up to rounding: no difference in any replicate.
    assert max(map(abs, second.values())) < 1e-5


def test_identical_quantiles_up_to_a_shift_have_equal_divergences(table):
    rows = [q for q in table['per_quantile'] if q['workload'] == 'harmless']
    np.testing.assert_allclose([q['tau'] for q in rows], (np.arange(10) + 0.5) / 10, rtol=1e-6)
    values = [q['kl']['gaussian'] for q in rows]
    np.testing.assert_allclose(values, values[0], rtol=1e-4)


def test_markdown_names_published_cells_suspects_and_the_statement(table):
    text = tables.format_table(table)
    for part in ('4.914', '6.779', '6.833', '7.291', '(!) KDE sum without dx',
                 'the script that made it is not public', '## Differences between models',
                 'between pairs'):
        assert part in text
    for line in text.splitlines():
        if line.startswith('|'):
            assert line.endswith('|')
            assert len(line) <= 125


@pytest.mark.parametrize(('kl', 'auc'), [(0.0, 0.5), (4.914, 0.987), (7.291, 0.997)])
def test_required_auc(kl, auc):
    assert tables.required_auc(kl) == pytest.approx(auc, abs=5e-4)


def test_what_the_divergence_is_made_of():
    plain = made(2000, shift=0.5)
    chosen, rejected = plain.rewards
    # The same margins, but for half of what pairs share.
    shared = 0.25 * (chosen + rejected)
    centred = pair_predictions(chosen[:, None] - shared[:, None],
                               rejected[:, None] - shared[:, None])
    table = build({('w', 'scalar'): plain, ('w', 'scalar_centred'): centred,
                   ('w', 'quantile'): plain})
    first, second, _ = table['rows']
    for row in table['rows']:
        found = row['split']
        assert (found['within']['value'] * found['share']['value'] + found['unequal']['value']
                == pytest.approx(row['kl']['gaussian']['value']))
        # Two independent normal sides: margins of mean .5 and variance 2.
        assert found['within']['low'] < 0.5**2 < found['within']['high']
    assert first['split']['share']['value'] == pytest.approx(0.5, abs=0.02)
    assert second['split']['share']['value'] == pytest.approx(0.8, abs=0.02)
    differences = {(d['model'], d['reference']): d for d in table['differences']}
    assert len(differences) == 3
    parts = differences['scalar_centred', 'scalar']['parts']
    kl = differences['scalar_centred', 'scalar']['kl']['gaussian']
    assert parts['total']['value'] == pytest.approx(kl['value'])
    assert parts['total']['low'] == pytest.approx(kl['low'])
    assert parts['within']['value'] == pytest.approx(0.0, abs=1e-9)
    assert parts['between']['low'] > 0.0
    assert sum(parts[name]['value'] for name in ('within', 'between', 'unequal')) == (
        pytest.approx(parts['total']['value']))
    assert differences['quantile', 'scalar']['parts']['total']['value'] == 0.0


def test_a_single_model_gives_no_differences():
    assert build({('pairs', 'scalar'): made(60)})['differences'] == []


def test_bootstrap_is_over_groups():
    apart = build({('w', 'scalar'): made(300)})
    pairs = made(100)
    tripled = pairs._replace(**{
        name: np.repeat(getattr(pairs, name), 3, axis=0)
        for name in ('pairs', 'label', 'log_win', 'log_loss')})
    clustered = build({('w', 'scalar'): tripled})
    width = [t['rows'][0]['accuracy_high'] - t['rows'][0]['accuracy_low']
             for t in (apart, clustered)]
    assert width[1] > 1.3 * width[0]


def test_models_must_have_seen_the_same_pairs():
    other = made(200)._replace(comparison_ids=np.array([f'other {i}' for i in range(200)]))
    with pytest.raises(DataError, match='different pairs'):
        build({('w', 'scalar'): made(200), ('w', 'quantile'): other})


def test_too_few_groups_are_refused():
    with pytest.raises(DataError, match='12 opening questions'):
        build({('w', 'scalar'): made(12)})
