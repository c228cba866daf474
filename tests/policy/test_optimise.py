"""Online runs learn what they are rewarded for, and end bit for bit where they would have."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy

from qrm.analysis import figures
from qrm.data.comparisons import Comparison, DataError
from qrm.models.architecture import flat
from qrm.policy import language_model, optimise, rollouts, runs, scoring
from qrm.policy.rollouts import Answers, Prompts
from qrm.rewards import selection
from qrm.rewards.heads import HeadConfig
from qrm.training import initial, interruptions, reward_model, workdir
from qrm.training.schema import ConfigError
from qrm.training.workdir import WorkdirError
from tests.helpers import (
    ROOT,
    init,
    load_config,
    simulated,
    small_reward_model,
    write_tokenizer,
)

KEYS = {
    'model.sizes.vocab_size': 40, 'model.sizes.max_positions': 32, 'model.sizes.hidden_size': 16,
    'model.sizes.num_layers': 1, 'model.sizes.num_heads': 2,
    'data.validation_fraction': 0.3, 'data.max_length': 24, 'rollouts.prompts': 8,
    'rollouts.samples': 8, 'rollouts.max_new_tokens': 6, 'rollouts.rows': 64,
    'train.batch_size': 4, 'train.row_length': 64, 'train.rows': 2, 'train.epochs': 20.0,
    'train.max_steps': 8, 'train.checkpoint_every': 8, 'evaluation.prompts': 8,
    'evaluation.samples': 8, 'optimizer.learning_rate': 0.02, 'optimizer.schedule': 'constant',
    'reward.source': 'tests.policy.test_optimise:share', 'algorithm.truncated': 'keep',
    'analysis.bootstrap': 20,
}
# What nothing reads where nothing is trained.
CHOSEN = {'algorithm.truncated': 'penalty', 'rollouts.prompts': 64, 'rollouts.samples': 4}
CALLS = {'at': 0, 'do': None, 'count': 0}


def share(prompts, completions):
    """Of the six words of an answer, those below w10."""
    CALLS['count'] += 1
    if CALLS['count'] == CALLS['at']:
        CALLS['do']()
    return [sum(len(word) == 2 for word in text.split()) / 6 for text in completions]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request):
    """Runs are not drawn, which takes as long as all else, but where figures are asked for."""
    if 'drawn' not in request.fixturenames:
        monkeypatch.setattr(figures, 'save', lambda folder, figures: None)
    monkeypatch.setitem(CALLS, 'at', 0)
    monkeypatch.setitem(CALLS, 'count', 0)


@pytest.fixture
def drawn():
    """Asks for figures."""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('prompts')
    write_tokenizer(folder / 'tokenizer')
    rng = np.random.default_rng(0)
    rows = [{'prompt': f'w{i} ' + ' '.join(f'w{j}' for j in rng.integers(1, 38, 4)),
             'response': 'w1'} for i in range(1, 31)]
    (folder / 'prompts.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder


def config(folder, name, **changes):
    return load_config('rl', f'{name},demo', **{
        'model.tokenizer': str(folder / 'tokenizer'),
        'data.path': str(folder / 'prompts.jsonl')} | KEYS | changes)


def read_lines(path):
    return list(map(json.loads, path.read_text(encoding='utf-8').splitlines()))


def rows_of(run):
    return workdir.read_json(os.path.join(run, 'monitor.json'))['rows']


@pytest.mark.parametrize('name', ['ppo', 'grpo', 'rloo', 'expert_iteration'])
def test_every_algorithm_raises_a_trivial_reward(name, folder, tmp_path):
    optimise.train(config(folder, name), str(tmp_path))
    first, last = rows_of(tmp_path)
    assert (first['step'], last['step']) == (0, 8)
    assert last['proxy'] > first['proxy'] + 3 * (first['proxy_error'] + last['proxy_error'])
    assert first['kl'] == pytest.approx(0, abs=1e-4)
    assert last['kl'] > 0.1
    # Each first step of a rollout is that of the policy that sampled.
    logged = [row for row in workdir.read_metrics(tmp_path) if 'rollout_reward' in row]
    assert len(logged) == 8 // (2 * optimise.CHANGES[name].get('algorithm.epochs', 2))
    for row in logged:
        assert row['ratio'] == pytest.approx(1.0, abs=1e-6)
        assert row.get('clipped', 0) == 0
    answers = read_lines(tmp_path / 'responses/8.jsonl')
    assert np.mean([row['rewards'] for row in answers]) == pytest.approx(last['proxy'])
    assert [share([], row['responses']) for row in answers] == [row['rewards'] for row in answers]


def fewer(prompts, firsts, seconds):
    """Prefers the answer with more words below w10."""
    return [0.5 + 0.5 * float(np.sign(one - other))
            for one, other in zip(share([], firsts), share([], seconds), strict=True)]


def test_a_judge_of_pairs_is_optimised_and_another_one_says_who_wins(folder, tmp_path):
    optimise.train(config(folder, 'grpo', **{
        'reward.source': 'function:tests.policy.test_optimise:fewer',
        'reward.judge': 'function:tests.policy.test_optimise:fewer_too'}), str(tmp_path))
    first, last = rows_of(tmp_path)
    # The judge is another function that says the same, and both compare with the reference.
    for row in (first, last):
        assert row['proxy'] == pytest.approx(row['win'], abs=1e-6)
    assert last['win'] > first['win'] + 3 * (first['win_error'] + last['win_error'])
    # Which needs no second answer of the policy, as a rollout does.
    judged = {'reward.source': 'function:tests.policy.test_optimise:fewer',
              'reward.judge': 'function:tests.policy.test_optimise:fewer_too'}
    optimise.train(config(folder, 'grpo', **judged | {
        'evaluation.samples': 1, 'train.max_steps': 1}), str(tmp_path / 'one'))
    with pytest.raises(ConfigError, match=r'rollouts.samples=1, expected at least 2 with function'):
        optimise.train(config(folder, 'ppo', **judged | {'rollouts.samples': 1}),
                       str(tmp_path / 'ppo'))
    with pytest.raises(ConfigError, match=r'evaluation.samples=1, expected at least 2 with func'):
        optimise.train(config(folder, 'best_of_n', **judged | CHOSEN | {'evaluation.samples': 1}),
                       str(tmp_path / 'best'))
    optimise.train(config(folder, 'best_of_n', **judged | CHOSEN | {'evaluation.samples': 4}),
                   str(tmp_path / 'best'))
    wins = [row['win'] for row in rows_of(tmp_path / 'best')]
    assert wins == sorted(wins)


def fewer_too(prompts, firsts, seconds):
    return fewer(prompts, firsts, seconds)


def sine(prompts, completions):
    """Of the number of a word."""
    return [np.sin(int(text.strip()[1:])) if text.strip() else 0.0 for text in completions]


def answers_of_a_token(network, params, tokenizer, numbers):
    """[prompts, vocabulary] log-probabilities of all answers of one token to the prompts wN."""
    prompts = [np.array(tokenizer(f'w{number}')['input_ids'], np.int32) for number in numbers]
    vocabulary = len(tokenizer)
    shape = len(prompts), vocabulary
    answers = Answers(np.broadcast_to(np.arange(vocabulary, dtype=np.int32)[:, None], (*shape, 1)),
                      np.ones(shape, np.int32), np.zeros(shape, bool))
    own = Prompts([Comparison(str(n), f'w{n}', (), f'w{n}') for n in numbers], prompts)
    return rollouts.read(
        network, params, rollouts.dialogues(own, answers),
        rollouts.plan(prompts, vocabulary, 1, row_length=64, rows=8), 1,
        chunk=len(prompts)).log_probs[..., 0].astype(np.float64)


@pytest.mark.parametrize(('name', 'changes'), [
    ('ppo', {'algorithm.whiten': False, 'algorithm.value_clip': 100.0, 'algorithm.epochs': 1}),
    ('grpo', {'algorithm.kl_loss': '', 'algorithm.divide_by_std': False}),
])
def test_a_run_reaches_the_optimum_of_a_bandit(name, changes, folder, tmp_path):
    """Of answers of one token it is pi_ref exp(r / beta), which 60 rollouts of 512 come near."""
    rows = ''.join(json.dumps({'prompt': f'w{i}', 'response': 'w1'}) + '\n' for i in range(1, 31))
    (tmp_path / 'prompts.jsonl').write_text(rows)
    beta = 0.5
    values = config(folder, name, **{
        'data.path': str(tmp_path / 'prompts.jsonl'), 'algorithm.beta': beta,
        'algorithm.kl_reward': 'k1', 'rollouts.max_new_tokens': 1, 'rollouts.prompts': 16,
        'rollouts.samples': 32, 'rollouts.rows': 512, 'train.batch_size': 16, 'train.rows': 8,
        'train.max_steps': 60, 'train.epochs': 1000.0, 'train.checkpoint_every': 60,
        'reward.source': 'tests.policy.test_optimise:sine', 'evaluation.samples': 1,
        'optimizer.learning_rate': 0.03, 'optimizer.schedule': 'cosine'} | changes)
    optimise.train(values, str(tmp_path / 'run'))
    policy = language_model.load_run(str(tmp_path / 'run'), step='last')
    start = initial.start(values, *runs.describe_network(values, value=name == 'ppo'))
    before, after = (answers_of_a_token(*of, policy.tokenizer, range(1, 31)) for of in (
        rollouts.reference(start.network, start.trained, start.frozen),
        (policy.network, policy.params)))
    words = [policy.tokenizer.decode([token], skip_special_tokens=True) for token in range(40)]
    best = scipy.special.log_softmax(before + np.array(sine([], words)) / beta, axis=1)

    def distance(policy):
        return np.mean(np.sum(np.exp(policy) * (policy - best), axis=1))

    assert distance(before) > 0.5
    assert distance(after) < 0.01


RESUMED = {'train.tune': 'lora', 'algorithm.kl_target': 1.0, 'algorithm.kl_horizon': 100.0,
           'algorithm.scale': 'running', 'train.checkpoint_every': 3, 'train.log_every': 1}


@pytest.fixture(scope='module')
def uninterrupted(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp('uninterrupted')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, 'save', lambda folder, figures: None)
        optimise.train(config(folder, 'ppo', **RESUMED), str(run))
    return run


def assert_same_run(run, other):
    params, expected = (flat(language_model.load_run(str(x), step='last').params)
                        for x in (run, other))
    assert any('lora' in path for path in params)
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, expected[path])
    assert workdir.read_metrics(run) == workdir.read_metrics(other)
    assert rows_of(run) == rows_of(other)


# The reward is asked for when held-out prompts are answered (with references the first time, which
# are judged by it too), and once an iteration of 4 steps: the 7th time is in the second one.
def test_a_signal_within_a_rollout_and_the_rerun_ends_bit_for_bit(
        uninterrupted, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(CALLS, 'at', 7)
    monkeypatch.setitem(CALLS, 'do', lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(interruptions.Interrupted, match='at step 5 of 8'):
        optimise.train(config(folder, 'ppo', **RESUMED), str(tmp_path))
    optimise.train(config(folder, 'ppo', **RESUMED), str(tmp_path))
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_that_died_goes_on_within_its_rollout(uninterrupted, folder, tmp_path, monkeypatch):
    def die():
        raise OSError('no more')

    monkeypatch.setitem(CALLS, 'at', 7)
    monkeypatch.setitem(CALLS, 'do', die)
    with pytest.raises(DataError, match=r'the reward function failed \(OSError: no more\)'):
        optimise.train(config(folder, 'ppo', **RESUMED), str(tmp_path))
    assert [row['step'] for row in rows_of(tmp_path)] == [0, 3]
    optimise.train(config(folder, 'ppo', **RESUMED), str(tmp_path))
    assert_same_run(tmp_path, uninterrupted)


def test_the_state_that_goes_on_changes(uninterrupted):
    rows = [row for row in workdir.read_metrics(uninterrupted) if 'rollout_beta' in row]
    assert [row['step'] for row in rows] == [1, 5]
    assert rows[0]['rollout_beta'] == pytest.approx(0.05)
    # No KL at all in the first rollout: the error is bounded by .2, of 64 responses of 100.
    assert rows[1]['rollout_beta'] == pytest.approx(0.05 * (1 - 0.2 * 0.64))
    assert workdir.read_json(uninterrupted / 'monitor.json')['best']['step'] in (3, 6, 8)


def test_a_run_ends_where_a_rule_says_so_and_is_left_ended(folder, tmp_path, capsys):
    changes = {'train.checkpoint_every': 2, 'monitor.kl_most': 0.0, 'monitor.patience': 1,
               'monitor.errors': 0.0, 'optimizer.learning_rate': 0.05}
    # Unasked it goes on, and says what is suspect.
    optimise.train(config(folder, 'grpo', **changes), str(tmp_path / 'unasked'))
    assert 'kl:' in capsys.readouterr().out
    assert [row['step'] for row in rows_of(tmp_path / 'unasked')] == [0, 2, 4, 6, 8]
    for _ in range(2):
        asked = config(folder, 'grpo', **changes | {'monitor.stop': ('kl',)})
        optimise.train(asked, str(tmp_path / 'asked'))
        assert 'kl:' in capsys.readouterr().out
        assert [row['step'] for row in rows_of(tmp_path / 'asked')] == [0, 2]


@pytest.mark.usefixtures('drawn')
def test_best_of_n_trains_nothing_and_has_its_bound(folder, tmp_path, capsys):
    optimise.train(config(folder, 'best_of_n', **CHOSEN | {'evaluation.samples': 6}), str(tmp_path))
    rows = rows_of(tmp_path)
    assert [row['step'] for row in rows] == [1, 2, 4, 6]
    assert (rows[0]['kl_bound'], rows[0]['kl']) == (None, 0.0)
    assert {row['kl'] for row in rows[1:]} == {None}
    assert [row['kl_bound'] for row in rows[1:]] == pytest.approx(
        [float(selection.kl_best_of_n(n)) for n in (2, 4, 6)])
    assert all(0 < row['kl_estimate'] <= row['kl_bound'] for row in rows[1:])
    proxies = [row['proxy'] for row in rows]
    assert proxies == sorted(proxies)
    assert proxies[-1] > proxies[0]
    assert '| 6 ' in capsys.readouterr().out
    assert (tmp_path / 'figures/overoptimisation.png').stat().st_size > 1000
    answers = read_lines(tmp_path / 'responses/0.jsonl')
    assert np.mean([max(row['rewards']) for row in answers]) == pytest.approx(proxies[-1])
    # It is done, and no other run takes its place.
    for name, changes in (('best_of_n', CHOSEN | {'evaluation.samples': 3}), ('grpo', {})):
        with pytest.raises(WorkdirError, match='holds a run with another config'):
            optimise.train(config(folder, name, **changes), str(tmp_path))
    assert rows_of(tmp_path) == rows
    with pytest.raises(DataError, match='the config of a run, expected that of a model'):
        language_model.load(str(tmp_path))


@pytest.mark.parametrize(('rule', 'score'), [
    ('quantile:0.125', lambda atoms: atoms[0]),
    ('quantile:0.875', lambda atoms: atoms[3]),  # optimistic
    ('cvar:0.5', lambda atoms: atoms[:2].mean()),
    ('mean-std:2', lambda atoms: atoms.mean() / 0.5 - 2.0 * atoms.std() / 0.1),
    ('disagreement:3', lambda members: members.mean() - 3.0 * members.std()),
    ('sample:7', None),
])
def test_every_rule_of_a_reward_model_chooses_among_the_answers_of_a_policy(
        rule, score, folder, tmp_path, monkeypatch):
    model = small_reward_model([Comparison('0', 'w1', (' w2', ' w3'), 'w1')])
    head = HeadConfig('scalar', members=4) if rule.startswith('dis') else (
        HeadConfig('quantile', num_quantiles=4))
    network = dataclasses.replace(model.network, head=head)
    model = dataclasses.replace(model, network=network, params=init(network),
                                scale=selection.Scale(mean=0.5, std=0.1))
    monkeypatch.setattr(reward_model, 'load', lambda path, **options: model)
    optimise.train(config(folder, 'best_of_n', **CHOSEN | {
        'evaluation.samples': 4, 'reward.source': 'somewhere', 'reward.rule': rule}), str(tmp_path))
    answers = read_lines(tmp_path / 'responses/0.jsonl')
    for row in answers:
        texts = Comparison('0', row['prompt'], tuple(row['responses']), '0')
        # Four numbers of each answer: quantiles, or the rewards of members.
        atoms = np.sort(np.concatenate(model.predict(model.encode([texts])[0])))
        if score:
            np.testing.assert_allclose(row['rewards'], list(map(score, np.float64(atoms))),
                                       atol=1e-4)
        else:
            assert (atoms[:, 0] - 1e-6 <= row['rewards']).all()
            assert (row['rewards'] <= atoms[:, -1] + 1e-6).all()
            assert np.abs(row['rewards'] - atoms.mean(axis=1)).max() > 1e-4
    last = rows_of(tmp_path)[-1]
    assert last['proxy'] == pytest.approx(np.mean([max(row['rewards']) for row in answers]))
    assert (last['disagreement'] is not None) == rule.startswith('dis')


def test_two_devices_do_as_one(folder, tmp_path):
    changes = {'train.max_steps': 3, 'optimizer.name': 'sgd', 'optimizer.learning_rate': 0.5,
               'train.checkpoint_every': 3}
    found = config(folder, 'ppo', **changes)
    optimise.train(found, str(tmp_path / 'one'))
    file = tmp_path / 'two.py'
    file.write_text('import json\nfrom qrm.training import workdir\n\n\ndef get_config(arg=""):\n'
                    f'    return workdir.config_of(json.loads({found.to_json()!r}))\n')
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.rl', f'--config={file}',
         f'--workdir={tmp_path / "two"}'], cwd=ROOT, env=simulated(2), capture_output=True,
        text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '2 x cpu' in done.stdout
    one, two = (language_model.load_run(str(tmp_path / x), step='last').params
                for x in ('one', 'two'))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, two)
    assert [row['proxy'] for row in rows_of(tmp_path / 'one')] == pytest.approx(
        [row['proxy'] for row in rows_of(tmp_path / 'two')])


@pytest.mark.parametrize(('changes', 'message'), [
    ({'reward.source': ''}, "config.reward.source='', expected"),
    ({'algorithm.kl_loss': 'k1'}, "config.algorithm.kl_loss='k1'"),
    ({'monitor.window': 1}, 'config.monitor.window=1, expected at least 3'),
    ({'model.dropout': 0.1}, 'config.model.dropout=0.1, expected 0'),
    ({'train.sharding': 'fsdp'}, "config.train.sharding='fsdp', expected 'replicated'"),
    ({'rollouts.max_new_tokens': 24}, 'expected room for a prompt'),
    ({'train.tune': 'head'}, "config.train.tune: 'head'"),
    ({'reward.source': 'no_such:thing'}, "config.reward.source='no_such:thing': no such function"),
    ({'reward.source': 'http://example.org/r', 'reward.token_variable': 'HOME'},
     'expected https, or http of this machine itself'),
    ({'reward.source': 'https://any:secret@example.org/r'},
     'config.reward.source: expected a URL such as https://host/v1, without a password'),
    ({'reward.token_variable': 'HOME'}, "with source='tests.policy.test_optimise:share', expected"),
    ({'data.overlong': 'error'}, "config.data.overlong='error', expected 'truncate_prompt'"),
    ({'data.strengths': 'margin'}, "config.data.strengths='margin', expected 'ignored'"),
    ({'algorithm.name': 'rloo', 'algorithm.aggregation': 'constant', 'rollouts.samples': 1},
     'config.rollouts.samples=1, expected at least 2 of rloo'),
    ({'algorithm.kl_target': 6.0, 'algorithm.kl_horizon': 12.8},
     'config.algorithm.kl_horizon=12.8, expected more than 12.8'),
    ({'reward.source': 'gold'}, 'the truth is known of the demo alone'),
    ({'reward.judge': 'gold'}, "config.reward.judge='gold' with config.data.path="),
    ({'algorithm.divide_by_std': False}, 'config.algorithm.divide_by_std=False, expected True: '),
    ({'algorithm.truncation_penalty': 2.0}, 'config.algorithm.truncation_penalty=2.0, expec'),
    ({'algorithm.kl_corrected': True}, "reads it with the other settings of algorithm 'ppo'"),
    ({'algorithm.kl_horizon': 99.0}, 'config.algorithm.kl_horizon=99.0, expected 10000.0: nothing'),
    (CHOSEN | {'algorithm.name': 'best_of_n', 'rollouts.samples': 16},
     "config.rollouts.samples=16, expected 4: nothing reads it"),
    ({'algorithm.name': 'rloo', 'algorithm.centre': True}, 'config.algorithm.centre=True, exp'),
])
def test_values_that_cannot_be_used_are_named(changes, message, folder, tmp_path):
    with pytest.raises(ConfigError) as caught:
        optimise.train(config(folder, 'ppo', **changes), str(tmp_path))
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)


def test_a_tokenizer_without_an_end_is_named(folder, tmp_path):
    shutil.copytree(folder / 'tokenizer', tmp_path / 'tokenizer')
    path = tmp_path / 'tokenizer/tokenizer_config.json'
    values = json.loads(path.read_text())
    del values['eos_token']
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match='token that ends an answer, expected an EOS'):
        optimise.train(config(folder, 'ppo', **{'model.tokenizer': str(tmp_path / 'tokenizer')}),
                       str(tmp_path / 'run'))


def test_evaluations_of_a_run_go_on_as_they_began(uninterrupted, folder):
    """What they ask is no free key, as their rows are compared."""
    with pytest.raises(WorkdirError, match='config.evaluation.samples: 8 -> 4'):
        optimise.train(config(folder, 'ppo', **{'evaluation.samples': 4}), uninterrupted)


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ConfigError, match='rl:ppp: no such algorithm'):
        load_config('rl', 'ppp')


def test_every_setting_of_an_algorithm_has_a_key():
    named = {field.name for field in dataclasses.fields(optimise.Algorithm)} - {'length'}
    assert named == set(load_config('rl', 'ppo').algorithm) - {'epochs'}


def test_a_run_does_not_go_on_with_another_reward_model(folder, tmp_path, monkeypatch):
    """Its path and its rule are in the config; what is behind the path may change."""
    values = config(folder, 'rloo', **{'train.max_steps': 2, 'train.checkpoint_every': 2})
    def load(name, digest):
        plain = getattr(scoring, name)
        monkeypatch.setattr(
            scoring, name, lambda *args, **kw: plain(*args, **kw)._replace(digest=digest))

    load('load', 'a')
    optimise.train(values, str(tmp_path))
    optimise.train(values, str(tmp_path))
    load('load_judge', 'b')
    with pytest.raises(DataError, match='the judge is not the one this run started with'):
        optimise.train(values, str(tmp_path))
    load('load', 'b')
    with pytest.raises(DataError, match='the reward model is not the one this run started with'):
        optimise.train(values, str(tmp_path))
