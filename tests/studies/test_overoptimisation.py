"""Over-optimisation where the truth is known: answers by hand, best of n, and a tiny study."""

import json

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from qrm.data import sources
from qrm.data.comparisons import DataError
from qrm.policy import language_model, rollouts
from qrm.policy.rollouts import Answers
from qrm.rewards import distributions, resampling
from qrm.rewards.selection import Rule
from qrm.studies import arms, bench, figures
from qrm.studies import overoptimisation as study
from qrm.studies.arms import NO, OPEN, UNSEEN, YES, Arm, Statistics
from qrm.studies.paths import Path
from qrm.training import reward_model, workdir
from qrm.training.schema import ConfigError
from qrm.training.train import train
from qrm.training.workdir import WorkdirError
from tests.helpers import load_config, policy_row, word_pairs

BOUNDS = ConfigDict({'gain': 0.0, 'matters': 0.2, 'fall': 0.0})
ANALYSIS = ConfigDict({'bootstrap': 200, 'level': 0.9, 'seed': 0})
MEAN, RISKY = Arm('best_of_n', 'distributional', 'mean'), Arm('best_of_n', 'distributional',
                                                               'cvar:0.2')
SCALAR = Arm('best_of_n', 'scalar', 'mean')
GROUPS = [f'question {i // 2}' for i in range(40)]


def path(gold, kl=(0.0, 2.0, 4.0), noise=0.1, seed=0):
    """Equal for all prompts but for noise."""
    rng = np.random.default_rng(seed)
    shape = len(gold), len(GROUPS)
    table = np.array(gold, float)[:, None] + noise * rng.normal(size=shape)
    return Path(np.arange(len(gold)), np.broadcast_to(np.array(kl, float)[:, None], shape), table,
                table, np.full(shape, 0.5), np.ones(shape), np.full(shape, 0.25), -table / 4.0,
                np.ones(shape[1]), 1.0)


def statistics(**golds):
    """Of arms by name, with two seeds."""
    arms = {'mean': MEAN, 'risky': RISKY, 'shuffled': RISKY._replace(control='shuffled'),
            'ensemble': Arm('best_of_n', 'ensemble', 'disagreement:1'), 'scalar': SCALAR,
            'dpo': Arm('dpo'), 'grpo': Arm('grpo', 'scalar', 'mean')}
    found = {(arms[name], seed): path(gold, seed=seed) for name, gold in golds.items()
             for seed in (0, 1)}
    return Statistics(found, GROUPS, 2.0, ANALYSIS)


# Answers.


def test_answers_follow_the_bounds():
    def cell(low, high):
        return {'value': 0.5 * (low + high), 'low': low, 'high': high}

    assert arms.answer([cell(0.01, 0.4), cell(0.1, 0.2)], BOUNDS) == YES
    assert arms.answer([cell(-0.1, 0.4), cell(0.1, 0.2)], BOUNDS) == OPEN
    assert arms.answer([cell(0.1, 0.4), cell(-0.3, 0.19)], BOUNDS) == NO


def test_any_needs_one_and_all_need_all():
    assert arms.any_of([NO, YES, OPEN]) == YES
    assert arms.any_of([NO, NO]) == NO
    assert arms.any_of([NO, UNSEEN]) == OPEN
    assert arms.any_of([]) == OPEN
    assert arms.all_of([YES, YES]) == YES
    assert arms.all_of([YES, NO]) == OPEN
    assert arms.all_of([NO]) == NO
    assert arms.all_of([OPEN, OPEN]) == OPEN
    assert arms.all_of([]) == OPEN


def test_a_rule_delays_if_it_beats_all_controls():
    falls, stays = (0.0, 3.0, 1.0), (0.0, 3.0, 3.0)
    rows = arms.delays(statistics(mean=falls, risky=stays, shuffled=falls, ensemble=falls), BOUNDS)
    assert [row['name'] for row in rows] == ['best of n distributional cvar:0.2']
    assert rows[0]['answer'] == YES
    assert list(rows[0]['against']) == ['constant', 'shuffled', 'ensemble']
    # Two units at the farthest KL, in units of two; the noise is the same in all.
    for cell in rows[0]['against'].values():
        assert cell['value'] == pytest.approx(1.0)
    assert rows[0]['fall_of_mean']['value'] == pytest.approx(1.0, abs=0.1)
    # Where the control does as well, it is not the spread.
    rows = arms.delays(statistics(mean=falls, risky=stays, shuffled=stays, ensemble=falls), BOUNDS)
    assert rows[0]['answer'] == NO
    # Where a control was not run, nothing shows that it is the spread.
    rows = arms.delays(statistics(mean=falls, risky=stays, ensemble=falls), BOUNDS)
    assert rows[0]['answer'] == f'{OPEN}, as it has no control shuffled'
    rows = arms.delays(statistics(mean=falls, risky=stays), BOUNDS)
    assert rows[0]['answer'] == f'{OPEN}, as it has no control shuffled and ensemble'
    assert arms.verdict({'delay': rows, 'quantile': [], 'dpo': []})[0].endswith(f'{OPEN}.')


def test_nothing_is_delayed_that_is_not_seen():
    rises = (0.0, 1.0, 2.0)
    rows = arms.delays(statistics(mean=rises, risky=(0.0, 2.0, 4.0)), BOUNDS)
    assert rows[0]['answer'] == UNSEEN
    lines = arms.verdict({'delay': rows, 'quantile': [], 'dpo': []})
    assert lines[0].endswith(f'{OPEN}.')
    assert UNSEEN in lines[1]


def test_a_fall_is_told_without_the_price():
    found = statistics(mean=(0.0, 3.0, 1.0))
    # The price rises by a quarter of what gold falls.
    row, cell = found.row(MEAN), found.fall_without_price(MEAN)
    assert row['fall_without_price'] == cell
    for name in ('value', 'low', 'high'):
        assert cell[name] == pytest.approx(0.75 * row['fall'][name])
    assert cell['value'] == pytest.approx(0.75, abs=0.1)


def test_panels_share_a_legend_of_all_that_any_draws():
    policies = {'by a judge': [policy_row(step, gold=None, gold_error=None) for step in (0, 1)],
                'in the demo': [policy_row(step) for step in (0, 1)]}
    figure = figures.draw_gains(policies)
    legend, = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ['proxy', 'gold']
    assert [axes.get_legend() for axes in figure.axes if axes.get_visible()] == [None, None]


def test_policies_are_compared_along_the_kl():
    found = statistics(scalar=(0.0, 1.0, 2.0), mean=(0.0, 2.0, 4.0), dpo=(0.0, 0.5, 1.0))
    row, = arms.over_scalar(found, BOUNDS, 'distributional')
    # Half a unit more a nat, on average over 20 places up to 4 nats, in units of two; the noise of
    # both is the same.
    assert row['gain']['value'] == pytest.approx(0.5 * 4.0 * 21 / 40 / 2.0)
    assert row['answer'] == YES
    # The KL of best of n is a bound: what is said of it there is no answer.
    row, = unlike = arms.over_scalar(found, BOUNDS, '')
    assert (row['name'], row['algorithm'], row['answer']) == ('dpo', 'best_of_n', arms.UNLIKE)
    lines = arms.verdict({'delay': [], 'quantile': [], 'dpo': unlike})
    assert lines[1].endswith(f'by any? {OPEN}.')
    found = statistics(scalar=(0.0, 1.0, 2.0), grpo=(0.0, 1.0, 2.0), dpo=(0.0, 0.5, 1.0))
    rows = arms.over_scalar(found, BOUNDS, '')
    assert [row['answer'] for row in rows] == [arms.UNLIKE, NO]
    lines = arms.verdict({'delay': [], 'quantile': [], 'dpo': rows})
    assert lines[1].endswith(f'by each of grpo? {NO}.')
    assert arms.over_scalar(found, BOUNDS, 'ratings') == []


def test_seeds_are_measured_at_the_same_steps():
    found = {(SCALAR, 0): path((0.0, 1.0, 2.0)),
             (SCALAR, 1): path((0.0, 1.0), kl=(0.0, 2.0))}
    with pytest.raises(DataError, match=r'scalar mean: measured at steps \[0, 1\] with seed 1'):
        Statistics(found, GROUPS, 2.0, ANALYSIS)


def test_rows_of_figures_are_means_over_seeds():
    rows = statistics(scalar=(0.0, 1.0, 2.0)).rows(SCALAR)
    assert [row.step for row in rows] == [0, 1, 2]
    assert [row.kl for row in rows] == pytest.approx([0.0, 2.0, 4.0])
    golds = [path((0.0, 1.0, 2.0), seed=seed).gold.mean(axis=1) for seed in (0, 1)]
    assert [row.gold for row in rows] == pytest.approx(np.mean(golds, axis=0))
    assert rows[0].proxy == pytest.approx(0.0)
    assert 0.0 < rows[1].gold_error < 0.1
    assert rows[0].length is None


# Best of n.


def test_scores_of_an_ensemble_are_mean_less_disagreement():
    atoms = distributions.uniform_atoms(jnp.array([[[0.0, 2.0], [1.0, 1.0]]]))
    np.testing.assert_allclose(study._scores(Rule('disagreement', 2.0), atoms), [[-1.0, 1.0]])
    np.testing.assert_allclose(study._scores(Rule('mean'), atoms), [[1.0, 1.0]])


def test_sizes_are_powers_of_two():
    assert study.sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert study.sizes(9) == [1, 2, 4, 8]


# The config.


@pytest.mark.parametrize(('changes', 'message'), [
    ({'proxies.names': ('quantile',)}, "no 'scalar'"),
    ({'proxies.names': ('scalar', 'median')}, "'median', expected some of"),
    ({'seeds': ()}, 'expected at least one'),
    ({'best_of_n.rules': ('disagreement:1',)}, 'best_of_n.rules'),
    ({'online.ppo': ('median mean',)}, "online.ppo: 'median mean': proxy 'median'"),
    ({'online.grpo': ('scalar mean-std:1',)}, 'online.grpo'),
    ({'evaluation.samples': 65}, 'expected at most'),
    ({'online.grpo': ('scalar cvar:0.2',)}, 'expected a proxy that predicts a spread'),
    ({'online.grpo': ('scalar disagreement:1',)}, 'expected a proxy with members'),
    ({'online.ppo': ('scalar mean', 'scalar mean')}, 'expected each once'),
    ({'seeds': (0, 0)}, 'expected each once'),
    ({'proxies.names': ('scalar', 'quantil'), 'online.ppo': ('quantil mean',)}, "'quantil', expec"),
    ({'evaluation.prompts': 32}, 'config.evaluation.prompts=32, expected prompts of at least 30 q'),
    ({'evaluation.max_new_tokens': 128}, 'expected less than the 128 tokens of prompt and'),
    ({'runs.grpo': {'algorithm': {'kl_loss': 'k2', 'kl_reward': ''}, 'rollouts': {'samples': 1}}},
     'runs.grpo: config.rollouts.samples=1, expected at least 2 of grpo'),
    ({'runs.grpo': {'algorithm': {'beta': -1.0}}}, 'runs.grpo: config.algorithm.beta=-1.0'),
    ({'runs.ppo': {'monitor': {'stop': ('kl',)}}}, r"runs.ppo: config.monitor.stop=\('kl'"),
    ({'runs.sft': {'train': {'epoch': 1.0}}}, 'did you mean config.train.epochs'),
])
def test_what_cannot_be_used_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        study.check(load_config('optimise', **changes))


@pytest.mark.parametrize(('changes', 'message'), [
    ({'data': ''}, "config.data='', expected pairs"),
    ({'reference': ''}, "config.reference='' with config.data='pairs.jsonl', expected a language"),
    ({'gold': 'gold'}, 'expected a reward model: the truth is known of the demo alone'),
    ({'gold': ''}, "config.gold='', expected who says what policies are worth"),
])
def test_real_text_needs_what_the_demo_has(changes, message):
    given = {'data': 'pairs.jsonl', 'reference': 'model', 'gold': 'judge'}
    with pytest.raises(ConfigError, match=message):
        study.check(load_config('optimise', 'text', **given | changes))


def test_all_policies_of_real_text_are_adapters():
    """A config names any algorithm without settings of its own."""
    config = load_config('optimise', 'text', data='pairs.jsonl', reference='model', gold='judge',
                         **{f'online.{name}': ('scalar mean',) for name in study.ONLINE})
    study.check(config)
    for name in ('dpo', *study.ONLINE):
        own = {'algorithm.name': name, 'reward.source': 'proxy'} if name in study.ONLINE else {}
        section = study._build(config, name, own)
        assert section.train.tune == 'lora'
        assert section.optimizer.learning_rate == 5e-4
        if own:
            assert section.rollouts.max_new_tokens == config.evaluation.max_new_tokens


# A tiny study. All answers have one shape, so that little is compiled.

_SIZES = {'vocab_size': 300, 'max_positions': 128, 'hidden_size': 8, 'num_layers': 1,
          'num_heads': 1}
_ONE = {'model': {'checkpoint': '', 'sizes': _SIZES}, 'train': {'max_steps': 1}}
TINY = {
    'seeds': (0,), 'demonstrations': 40, 'pairs': 40, 'proxies.names': ('scalar', 'distributional'),
    'runs.common': {'data': {'max_length': 128, 'demo': {'test': 4}},
                    'train': {'row_length': 128, 'rows': 8, 'keep': 9}},
    'runs.sft': _ONE, 'runs.reward': _ONE, 'runs.dpo': {'train': {'max_steps': 1}},
    'runs.grpo': {'algorithm': {'beta': 0.0, 'kl_loss': 'k2', 'kl_reward': ''},
                  'rollouts': {'prompts': 2, 'samples': 4, 'rows': 16, 'max_new_tokens': 2},
                  'evaluation': {'prompts': 4, 'samples': 4},
                  'train': {'batch_size': 2, 'max_steps': 1}},
    'best_of_n.candidates': 4, 'best_of_n.rules': ('cvar:0.2',), 'online.ppo': (),
    'online.grpo': ('scalar mean',), 'evaluation.prompts': 6, 'evaluation.samples': 4,
    'evaluation.max_new_tokens': 2, 'evaluation.rows': 16, 'analysis.bootstrap': 20,
}


def test_a_second_run_trains_nothing_and_finds_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(resampling, 'MIN_GROUPS', 2)
    config, folder = load_config('optimise', **TINY), str(tmp_path)
    text = study.run(config, folder)
    names = {'sft', 'policy', 'reward-scalar-0', 'reward-distributional-0', 'dpo-0',
             'grpo-scalar-mean-0', 'figures', 'candidates.npz', 'rivals.npz', 'identity.json',
             'config.json', '.lock', 'overoptimisation.json', 'overoptimisation.md'}
    assert {path.name for path in tmp_path.iterdir()} == names
    result = json.loads((tmp_path / 'overoptimisation.json').read_text())
    assert (tmp_path / 'overoptimisation.md').read_text() == text
    assert [row['name'] for row in result['rows']] == [
        'best of n scalar mean', 'best of n distributional mean',
        'best of n distributional cvar:0.2', 'best of n distributional cvar:0.2 (shuffled)', 'dpo',
        'grpo scalar mean']
    of_best = result['rows'][0]
    assert of_best['kl']['value'] == pytest.approx(np.log(4.0) - 0.75)
    assert 0.0 < of_best['win']['value'] < 1.0
    assert 0.0 < of_best['length']['value'] <= 2.0
    # Two tokens are no sentence of the demo.
    assert 0.5 < of_best['unread']['value'] <= 1.0
    assert 'characters unread' in text
    assert 'fall of what counts' in text
    # Sampled from a policy that has taken a step.
    assert result['rows'][-1]['kl']['value'] != 0.0
    for name in ('overoptimisation', 'gold'):
        assert matplotlib.image.imread(tmp_path / f'figures/{name}.png').std() > 0.0
    assert all(line in text for line in (row['name'] for row in result['rows']))

    def refuse(*unused):
        raise AssertionError('a second run trains')

    monkeypatch.setattr(study, '_run', refuse)
    assert study.run(config, folder) == text
    assert json.loads((tmp_path / 'overoptimisation.json').read_text()) == result
    # What is kept is of these prompts, draws and spreads.
    for key in ('pairs', 'evaluation.seed', 'evaluation.samples', 'analysis.seed'):
        with pytest.raises(WorkdirError, match=f'config.{key}'):
            study.run(load_config('optimise', **TINY | {key: 3}), folder)
    study.run(load_config('optimise', **TINY | {'analysis.bootstrap': 30}), folder)
    path = tmp_path / 'dpo-0/paths.json'
    path.write_text(path.read_text().replace('"win"', '"wins"'))
    with pytest.raises(WorkdirError, match=r"dpo-0/paths.json: .*'win'.*measured again"):
        study.run(config, folder)


# The same on pairs of words, with a reward model in place of the truth.


@pytest.fixture
def words(tmp_path):
    """A language model, pairs in two halves, a judge that learnt from the second one."""
    keys = word_pairs(tmp_path)
    path = tmp_path / 'checkpoint/model.safetensors'
    save_file({name: tensor for name, tensor in load_file(path).items() if 'score' not in name},
              path)
    rows = (tmp_path / 'pairs.jsonl').read_text().splitlines(keepends=True)
    for name, own in (('proxy', rows[:20]), ('judge', rows[20:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'train.jsonl').write_text(''.join(own))
        (tmp_path / name / 'test.jsonl').write_text(''.join(
            row.replace('"w', '"w0 w') for row in rows))
    train(load_config('hh', 'helpful,scalar', **{
        'model.checkpoint': keys['model.checkpoint'], 'data.path': str(tmp_path / 'judge'),
        'data.max_length': 24, 'train.tune': 'head', 'train.max_steps': 2, 'train.row_length': 32,
        'train.rows': 2, 'seed': 1}), str(tmp_path / 'gold'))
    common = {'data': {'max_length': 24, 'validation_fraction': 0.3},
              'train': {'row_length': 32, 'rows': 2, 'keep': 9}}
    return {
        'data': str(tmp_path / 'proxy'), 'reference': keys['model.checkpoint'],
        'gold': str(tmp_path / 'gold'), 'proxies.names': ('scalar', 'quantile'),
        'runs.common': common,
        'runs.reward': {'train': {'tune': 'head', 'max_steps': 2, 'batch_size': 8},
                        'optimizer': {'learning_rate': 0.1}},
        'runs.dpo': {'train': {'tune': 'lora', 'max_steps': 1, 'batch_size': 8}},
        'runs.grpo': {'algorithm': {'beta': 0.0, 'kl_loss': 'k2', 'kl_reward': ''},
                      'rollouts': {'prompts': 2, 'samples': 4, 'rows': 16, 'max_new_tokens': 4},
                      'evaluation': {'prompts': 2, 'samples': 4},
                      'optimizer': {'learning_rate': 0.01},
                      'train': {'tune': 'lora', 'batch_size': 2, 'max_steps': 1}},
        'best_of_n.candidates': 4, 'online.grpo': ('scalar mean',), 'evaluation.prompts': 12,
        'evaluation.samples': 4, 'evaluation.max_new_tokens': 4, 'evaluation.rows': 16,
        'analysis.bootstrap': 20}


def test_a_judge_began_as_other_weights_than_the_proxies(words, tmp_path):
    folder = tmp_path / 'study'
    with pytest.raises(ConfigError, match='began with the random weights of seed 1, one of conf'):
        study.run(load_config('optimise', 'text', **words | {'seeds': (0, 1)}), str(folder))
    assert not (folder / 'config.json').exists()


def test_a_judge_that_compares_is_no_gold(words, tmp_path):
    words |= {'gold': 'function:tests.policy.test_scoring:longer'}
    with pytest.raises(ConfigError, match='config.gold=.* compares two responses, expected a rew'):
        study.run(load_config('optimise', 'text', **words), str(tmp_path / 'study'))
    assert not (tmp_path / 'study/config.json').exists()


def test_a_reward_model_stands_in_for_the_truth(words, tmp_path, monkeypatch):
    monkeypatch.setattr(resampling, 'MIN_GROUPS', 2)
    config, folder = load_config('optimise', 'text', **words), tmp_path / 'study'
    text = study.run(config, str(folder))
    assert text.startswith('# Over-optimisation as another reward model sees it')
    assert f'Gold rewards are those of {words["gold"]}' in text
    assert 'unread' not in text  # by a model that reads all
    assert 'fall of what counts' not in text
    assert not (folder / 'sft').exists()
    assert len(list((folder / 'features').iterdir())) == 1  # which proxies share
    result = json.loads((folder / 'overoptimisation.json').read_text())
    rows = {row['name']: row for row in result['rows']}
    assert list(rows) == [
        'best of n scalar mean', 'best of n quantile mean', 'best of n quantile cvar:0.2',
        'best of n quantile cvar:0.2 (shuffled)', 'dpo', 'grpo scalar mean']
    # What the judge itself says of the candidates, chosen one by one.
    judge, proxy = (reward_model.load(path, raw=True)
                    for path in (words['gold'], str(folder / 'reward-scalar-0')))
    own = study.prepare(config, str(folder))
    texts = [[getattr(one, name) for one in own.candidates] for name in ('prompt', 'responses')]
    gold, scored = (np.array(model.score(*texts).rewards) for model in (judge, proxy))
    rivals = judge.score(texts[0], [one.responses for one in rollouts.answered(
        own.prompts, Answers(**workdir.read_arrays(str(folder / 'rivals.npz'))),
        own.tokenizer)])
    best = np.take_along_axis(gold, scored.argmax(axis=1)[:, None], axis=1)
    assert rows['best of n scalar mean']['gold']['value'] == pytest.approx(
        (best.mean() - gold.mean()) / gold.std(), abs=1e-4)
    wins = expit(best - np.array(rivals.rewards)).mean()
    assert rows['best of n scalar mean']['win']['value'] == pytest.approx(wins, abs=1e-4)
    monitored = json.loads((folder / 'grpo-scalar-mean-0/monitor.json').read_text())
    assert monitored['judge'] == words['gold']
    assert monitored['rows'][-1]['win'] is not None
    # What is behind the paths is known again.
    path = folder / 'identity.json'
    known = path.read_text()
    path.write_text(known.replace(judge.digest, 'another'))
    with pytest.raises(WorkdirError, match='other gold reward than this study started with'):
        study.run(config, str(folder))
    path.write_text(known)
    data = tmp_path / 'proxy/test.jsonl'
    data.write_text(data.read_text().replace('"w0', '"w9'))
    with pytest.raises(WorkdirError, match='other pairs than this study started with'):
        study.run(config, str(folder))


def prompts_of(words, **changes):
    """Those that policies are judged on."""
    config = load_config('optimise', 'text', **words | changes)
    data = study._build(config, 'reward', {}).data
    return bench.held_out(config, language_model.load(words['reference']), data)


def test_prompts_open_with_nothing_that_is_learnt_from(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resampling, 'MIN_GROUPS', 2)
    # A test split of which some rows open as training rows do.
    learnt = [json.loads(row) for row in (tmp_path / 'proxy/train.jsonl').read_text().splitlines()]
    path = tmp_path / 'proxy/test.jsonl'
    path.write_text(path.read_text() + ''.join(
        json.dumps(row | {'chosen': ' w1', 'rejected': ' w2'}) + '\n' for row in learnt[:7]))
    found = prompts_of(words)
    assert not {one.prompt for one in found.comparisons} & {row['prompt'] for row in learnt}
    told = capsys.readouterr().out
    assert 'dropped 7: opening question of rows that are learnt from' in told
    assert '12 of these prompts are used' in told
    # Nor with what the judge has learnt.
    taken = json.loads((tmp_path / 'judge/train.jsonl').read_text().splitlines()[0])
    path.write_text(path.read_text() + json.dumps(taken) + '\n')
    prompts_of(words)
    assert 'dropped 8: opening question of rows that are learnt from' in capsys.readouterr().out
    # A single file: what runs take from it for a test split, and nothing else.
    pairs = str(tmp_path / 'pairs.jsonl')
    found = prompts_of(words, data=pairs, **{'evaluation.prompts': 2})
    section = study._build(load_config('optimise', 'text', **words | {'data': pairs}), 'reward', {})
    splits = sources.load_splits(section.data, 'helpful')
    assert {one.prompt for one in found.comparisons} <= {one.prompt for one in splits['test'][0]}


def test_what_cannot_be_used_claims_no_folder(words, tmp_path, monkeypatch):
    """One line, before anything is computed; the right command follows in the same folder."""
    monkeypatch.setattr(bench, 'make', lambda *unused: None)
    folder = str(tmp_path / 'study')

    def refused(error, message, **changes):
        with pytest.raises(error, match=message):
            study.run(load_config('optimise', 'text', **words | changes), folder)

    refused(DataError, 'nowhere', gold=str(tmp_path / 'nowhere'))
    refused(DataError, 'neither the folder of a run', gold=str(tmp_path / 'gold/features'))
    refused(DataError, 'nowhere', reference=str(tmp_path / 'nowhere'))
    refused(ConfigError, 'a run; expected a model, such as `qrm export`', reference=words['gold'])
    own = words['runs.reward'] | {'head': {'reads': ('mean@9',)}}
    refused(ConfigError, 'reads after block 9, expected less than the 3', **{'runs.reward': own})
    refused(DataError, '40 different prompts are held out, expected the 41',
            **{'evaluation.prompts': 41})
    refused(DataError, r'12 held-out prompts of 12 questions .*, expected prompts of at least 30')
    refused(ConfigError, "dtypes bfloat16 and float32, expected 'float32'", **{
        'runs.dpo': words['runs.dpo'] | {'model': {'dtype': 'bfloat16'}}})
    refused(ConfigError, 'expected less than the 24 tokens of prompt and resp',
            **{'evaluation.max_new_tokens': 24})
    monkeypatch.setattr(resampling, 'MIN_GROUPS', 2)
    study.prepare(load_config('optimise', 'text', **words), folder)
    assert {path.name for path in (tmp_path / 'study').iterdir()} == {
        '.lock', 'config.json', 'identity.json'}
