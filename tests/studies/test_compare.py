"""Comparison of heads: paired intervals by hand, what may differ, and a tiny comparison."""

import json

import numpy as np
import pytest

from qrm.data import templates
from qrm.data.comparisons import DataError
from qrm.rewards.statistics import Undefined
from qrm.studies import compare, figures, overoptimisation
from qrm.studies.columns import COLUMNS, Judged
from qrm.training import inference, workdir
from qrm.training.schema import ConfigError
from tests.helpers import TINY, load_config, pair_predictions

TWO = {'replicates': 200, 'level': 0.9, 'seed': 0}


def made(seed, *, shift=0.5, spread=1.0, n=300):
    """Predictions of ten quantiles whose rewards are Gaussian, chosen ahead by `shift`."""
    rng = np.random.default_rng(seed)
    offsets = spread * np.linspace(-1.0, 1.0, 10)
    chosen, rejected = (rng.normal(x, 1.0, (n, 1)) + rng.uniform(0.5, 1.5, (n, 1)) * offsets
                        for x in (shift, 0.0))
    ahead = (chosen - rejected).mean(axis=1)
    made = pair_predictions(chosen, rejected, log_win=-np.log1p(np.exp(-ahead)),
                            log_loss=-np.log1p(np.exp(ahead)))
    return made if spread else made._replace(
        stds=np.zeros_like(made.stds), pair_stds=np.zeros_like(made.pair_stds))


@pytest.fixture(scope='module')
def rows():
    runs = {('a', 0): made(0), ('a', 1): made(1), ('b', 0): made(0, shift=1.5),
            ('b', 1): made(1, shift=1.5), ('c', 0): made(0, spread=0.0),
            ('c', 1): made(1, spread=0.0)}
    runs = {key: Judged(p) for key, p in runs.items()}
    return {row['model']: row for row in compare.measure(runs, reference='a', **TWO)}


def test_values_are_means_over_seeds(rows):
    for model, shift in (('a', 0.5), ('b', 1.5)):
        expected = []
        for seed in (0, 1):
            chosen, rejected = made(seed, shift=shift).rewards
            expected.append(np.mean(chosen > rejected))
        cell = rows[model]['columns']['accuracy']
        assert cell['value'] == pytest.approx(np.mean(expected))
        assert rows[model]['seeds']['accuracy'] == pytest.approx(expected)
        assert cell['low'] < cell['value'] < cell['high']


def test_differences_are_paired(rows):
    # The same noise under both, so the difference of b and a is known better than either.
    zero = rows['a']['columns']['accuracy']['difference']
    assert (zero['value'], zero['low'], zero['high']) == (0.0, 0.0, 0.0)
    assert rows['b']['columns']['gaussian']['difference']['low'] > 0.3
    gap = rows['b']['columns']['accuracy']
    width = gap['difference']['high'] - gap['difference']['low']
    assert gap['difference']['low'] > 0.0
    assert width < 1.5 * (gap['high'] - gap['low'])


def test_differences_of_the_divergence_are_split(rows):
    parts, kl = rows['b']['parts'], rows['b']['columns']['gaussian']['difference']
    for key in ('value', 'low', 'high'):
        assert parts['total'][key] == pytest.approx(kl[key])
    assert sum(parts[name]['value'] for name in ('within', 'between', 'unequal')) == (
        pytest.approx(kl['value']))
    # The same noise within pairs and between them, and three times the margin.
    assert parts['within']['low'] > 0.0
    assert parts['between']['low'] > 0.0
    assert rows['a']['parts']['total']['value'] == 0.0


def test_intervals_cover_seeds_too():
    # Two seeds that differ far more than resampled pairs do: the interval reaches both.
    runs = {('a', 0): Judged(made(0, shift=0.0)), ('a', 1): Judged(made(0, shift=3.0))}
    cell = compare.measure(runs, reference='a', **TWO)[0]['columns']['accuracy']
    assert cell['low'] < 0.6
    assert cell['high'] > 0.95


def test_what_is_not_defined_is_left_out(rows):
    # A single number has a spread of 0, which varies relative to nothing.
    cell = rows['c']['columns']
    assert cell['unexplained']['value'] is cell['spread_variation']['value'] is None
    assert cell['spread_variation']['difference']['value'] is None
    assert cell['spread']['value'] == pytest.approx(0.0, abs=1e-6)


def test_models_must_have_seen_the_same_comparisons():
    with pytest.raises(DataError, match='different comparisons'):
        compare.measure({('a', 0): Judged(made(0)), ('b', 0): Judged(made(0, n=200))},
                        reference='a', **TWO)


def test_members_differ_in_head_and_loss_only():
    config = load_config('compare')
    members = compare.member_configs(config)
    models = config.compare.models
    assert models[0] == 'scalar'
    assert list(members) == [('helpful', m, '', s) for m in models for s in (0, 1, 2)]
    plain = members['helpful', 'scalar', '', 0].to_dict()
    for (_, model, _, seed), member in members.items():
        other = member.to_dict()
        assert other['seed'] == seed
        assert {k: v for k, v in other.items() if k not in ('head', 'loss', 'seed')} == {
            k: v for k, v in plain.items() if k not in ('head', 'loss', 'seed')}, model


def test_some_models_read_texts_as_chats():
    models = ('scalar', 'quantile', 'quantile_chats')
    members = compare.member_configs(load_config('compare', **{'compare.models': models}))
    plain, chats = (members['helpful', name, '', 0].to_dict() for name in models[1:])
    assert (plain['data'].pop('as_chats'), chats['data'].pop('as_chats')) == (False, True)
    assert plain == chats


def test_the_own_mean_is_that_of_the_paper_config():
    published = load_config('paper').loss
    members = compare.member_configs(load_config('compare', **{
        'compare.models': ('scalar', 'quantile', 'own_mean')}))
    plain, own = (members['helpful', name, '', 0].to_dict() for name in ('quantile', 'own_mean'))
    changed = {key for key in own['loss'] if own['loss'][key] != plain['loss'][key]}
    assert changed == {'targets', 'huber_sides', 'huber_weight'}
    assert {key: own['loss'][key] for key in changed} == {key: published[key] for key in changed}
    assert own | {'loss': None} == plain | {'loss': None}
    assert overoptimisation.PROXIES['own_mean'] == compare.MODELS['own_mean']


def test_models_that_set_anything_else_are_refused():
    config = load_config('compare')
    for section, key in (('train', 'epochs'), ('data', 'max_length')):
        with config.unlocked():
            config.compare.sections.scalar = {section: {key: 9.0}}
        with pytest.raises(ConfigError, match=f"sections.scalar: sets '{section}.{key}', expected"):
            compare.member_configs(config)
    with pytest.raises(ConfigError, match="reference='none', expected one of"):
        compare.member_configs(load_config('compare', **{'compare.reference': 'none'}))
    with pytest.raises(ConfigError, match=r"models: \['none'\], expected some of"):
        compare.member_configs(load_config('compare', **{'compare.models': ('scalar', 'none')}))
    with pytest.raises(DataError, match=r"\['useful'\] not in demo"):
        compare.member_configs(load_config('compare', **{'compare.workloads': ('useful',)}))


def test_what_a_model_needs_of_the_data_is_checked_before_any_is_trained(tmp_path, monkeypatch):
    rows = [{'prompt': f'Question {i}?', 'chosen': ' yes', 'rejected': ' no'} for i in range(400)]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    monkeypatch.setattr(compare, 'train', None)
    config = load_config('compare', **TINY | {
        'data.path': str(tmp_path / 'rows.jsonl'), 'compare.seeds': (0, 1),
        'compare.models': ('scalar', 'ratings')})
    with pytest.raises(DataError, match='no comparison with a rated response is left'):
        compare.compare(config, str(tmp_path / 'compare'))
    assert not (tmp_path / 'compare').exists()


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('compare')
    config = load_config('compare', **TINY | {
        'train.max_steps': 5, 'compare.seeds': (0,), 'analysis.bootstrap': 20,
        'compare.models': ('scalar', 'quantile', 'quantile_1', 'own_mean')})
    return folder, config, compare.compare(config, str(folder))


def test_a_small_comparison_leaves_tables_and_figures(compared):
    folder, _, text = compared
    result = json.loads((folder / 'compare.json').read_text())
    assert (folder / 'compare.md').read_text() == text
    of_workload, = result['results']
    assert [row['model'] for row in of_workload['rows']] == [
        'scalar', 'quantile', 'quantile_1', 'own_mean', 'longer']
    # That of another target is no row of what lambda does.
    assert [row['lambda'] for row in of_workload['mechanism']] == [0.1, 1.0]
    assert 'bradley_terry_quantile_huber, lambda 1, targets own_mean |' in text
    *trained, longer = of_workload['rows']
    for row in trained:
        assert row['seconds_per_step'] > 0
        assert row['parameters'] > 9000
        assert row['columns']['own_prompt']['low'] <= row['columns']['own_prompt']['high']
        assert row['reads'] == 'last'
    assert longer['columns']['longer_chosen']['value'] == 1.0
    assert longer['columns']['shorter_chosen']['value'] == 0.0
    assert longer['columns']['own_prompt']['value'] == 0.0
    assert longer['columns']['nll']['value'] is None
    assert len(of_workload['truth'][1]['spread_correlation']) == 1
    assert '| quantile_1 ' in text
    assert {file.name for file in (folder / 'figures').iterdir()} == {
        'helpful_models.png', 'helpful_lambda.png'}


def test_the_mechanism_is_drawn_in_its_own_units():
    cells = [{'value': 1.5, 'low': 1.0, 'high': 1.75}, {'value': 0.5, 'low': 0.25, 'high': 1.0}]
    rows = [{'lambda': weight, 'reward_std': std, 'kl': {'gaussian': kl, 'sum': 40.0 * weight}}
            for weight, std, kl in zip((0.1, 1.0), cells, (-0.01, 0.02), strict=True)]
    estimators = {'gaussian': {'label': 'Gaussian', 'is_kl': True},
                  'sum': {'label': 'a sum', 'is_kl': False}}
    scale, estimates, formulas = figures.draw_mechanism(rows, estimators).axes
    line, _, (bars,) = scale.containers[0]
    np.testing.assert_array_equal(line.get_ydata(), [1.5, 0.5])
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[1.0, 1.75], [0.25, 1.0]]
    np.testing.assert_array_equal(estimates.lines[0].get_ydata(), [-0.01, 0.02])
    np.testing.assert_array_equal(formulas.lines[0].get_ydata(), [4.0, 40.0])
    assert formulas.get_yscale() == 'log'
    for axes in (scale, estimates, formulas):
        assert [text.get_text() for text in axes.get_xticklabels()] == ['0.1', '1']


def test_compared_models_start_and_train_alike(compared):
    folder, _, _ = compared
    batches = [json.loads((folder / f'helpful-{model}-0' / 'data_report.json').read_text())
               for model in ('scalar', 'quantile')]
    assert batches[0] == batches[1]


def test_a_second_comparison_trains_nothing(compared, capsys):
    folder, config, text = compared
    capsys.readouterr()
    assert compare.compare(config, str(folder)) == text
    assert 'at step 5 of 5' in capsys.readouterr().out


def test_each_head_on_a_frozen_backbone_reads_what_has_the_least_held_out_loss(
        tmp_path, monkeypatch):
    computed, compute = [], inference.features
    monkeypatch.setattr(inference, 'features', lambda network, params, encoded, **kwargs: (
        computed.append(len(encoded)) or compute(network, params, encoded, **kwargs)))
    reads = ('last', 'last+dialogue')
    config = load_config('compare', **TINY | {
        'train.tune': 'head', 'train.max_steps': 6, 'train.checkpoint_every': 3,
        'model.chat_template': templates.MOSS, 'compare.reads': reads, 'compare.seeds': (0, 1),
        'compare.models': ('scalar', 'scalar_chats'),
        'compare.baselines': ('longer', 'probe')})
    text = compare.compare(config, str(tmp_path))
    # Of texts and of chats, of which one is cut to two equal sides: for each backbone training and
    # validation, then test and that with prompts exchanged.
    assert computed == 2 * [300, 150 + 150] + 2 * [299, 150 + 150]
    assert (tmp_path / 'features').is_dir()
    result = workdir.read_json(str(tmp_path / 'compare.json'))['results'][0]
    for row in result['rows'][:2]:
        expected = {}
        for name in reads:
            losses = []
            for seed in (0, 1):
                folder = str(tmp_path / f'helpful-{row["model"]}-{name}-{seed}')
                assert workdir.load_config(folder).head.reads == tuple(name.split('+'))
                losses.append(min(r['nll'] for r in workdir.read_metrics(folder)
                                  if r['split'] == 'validation'))
                trained = 16 * len(name.split('+'))
                assert workdir.read_json(f'{folder}/cost.json')['parameters'] == 10160 + trained
            expected[name] = sum(losses) / 2
        assert row['held_out'] == pytest.approx(expected)
        assert row['reads'] == min(expected, key=expected.get)
        # Only those that are chosen are judged.
        judged = {name for name in reads
                  if (tmp_path / f'helpful-{row["model"]}-{name}-0' / 'evaluation.json').exists()}
        assert judged == {row['reads']}
        assert f"| {row['reads']} " in text
        stated = next(line for line in text.partition('Held-out loss')[2].splitlines()
                      if line.startswith(f'| {row["model"]} '))
        assert [float(cell) for cell in stated.split('|')[2:-1]] == pytest.approx(
            list(expected.values()), abs=5e-4)
    assert [row['model'] for row in result['rows'][2:]] == ['longer', 'probe']
    assert result['rows'][3]['columns']['nll']['value'] > 0.0


@pytest.mark.parametrize(('changes', 'message'), [
    ({'compare.reads': ('last+least',)}, "compare.reads: 'last.least': reads 'least', expected"),
    ({'compare.reads': ('',)}, "compare.reads: '': reads '', expected one of"),
    ({'compare.reads': ('last',), 'head.reads': ('mean',)}, 'beside compare.reads, expected one'),
    ({'compare.baselines': ('probe',)}, "'probe' with train.tune='all', expected 'head'"),
    ({'compare.baselines': ('likelihood',)}, "'likelihood' without a checkpoint"),
    ({'compare.baselines': ('shorter',)}, r"compare.baselines=\('shorter',\), expected a tuple"),
    ({'compare.sections.longer': {}, 'compare.models': ('scalar', 'longer')},
     r"models: \['longer'\], which are names of baselines")])
def test_reads_and_baselines_that_there_are_not(changes, message):
    config = load_config('compare')
    with config.unlocked():
        for key, value in changes.items():
            section, name = key.rsplit('.', 1)
            config[section.split('.')[0]][name] = value
            if 'sections' in key:
                del config.compare[name]
                config.compare.sections[name] = value
    with pytest.raises(ConfigError, match=message):
        compare.member_configs(config)


def test_rounding_of_equal_quantiles_is_no_spread():
    p = pair_predictions(*np.random.default_rng(0).normal(size=(2, 50, 1)))
    collapsed = p._replace(stds=np.random.default_rng(1).uniform(0.0, 1e-7, len(p.stds)))
    for name in ('spread_variation', 'unexplained'):
        with pytest.raises(Undefined, match='the spread is'):
            COLUMNS[name].statistic(Judged(collapsed))(None)
    assert COLUMNS['spread'].statistic(Judged(collapsed))(None) == 0.0
