"""Preferences teach a policy: losses by hand, steps on several devices, runs that are resumed."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from qrm.data.comparisons import Comparison, DataError
from qrm.policy import batches, dpo, language_model, rollouts, runs
from qrm.policy.dpo import DpoConfig, preference_sums
from qrm.policy.rollouts import Answers, Prompts
from qrm.training import initial, interruptions, workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.schema import ConfigError
from qrm.training.workdir import WorkdirError
from tests.helpers import ROOT, TINY_POLICY, load_config, simulated, write_tokenizer
from tests.programs import on_policies

OVERRIDES = TINY_POLICY | {'train.max_steps': 6, 'train.checkpoint_every': 3, 'train.tune': 'lora',
                    'lora.rank': 2, 'data.demo.train': 150, 'data.demo.test': 40}


def config(**kwargs):
    return load_config('dpo', 'demo', **OVERRIDES | kwargs)


# Three responses with a tie and a sure preference, and two with a soft label; the last slot is
# empty, and so is a token of the first.
PREFERENCE = np.zeros((3, 3, 3), np.float32)
PREFERENCE[0, 0, 1] = 1.0
PREFERENCE[0, 0, 2] = PREFERENCE[0, 2, 0] = 0.5
PREFERENCE[1, 1, 0], PREFERENCE[1, 0, 1] = 0.8, 0.2
WEIGHT = np.array([2.0, 0.5, 0.0], np.float32)
OFFSET = np.array([0.7, -0.2, 0.3], np.float32)


@pytest.fixture(scope='module')
def arrays():
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-2, 1, (2, 3, 3, 4)).astype(np.float32)
    mask = rng.uniform(size=(3, 3, 4)) < 0.7
    mask[1, 2] = mask[2] = False
    return policy, reference, mask


@pytest.mark.parametrize('own', [
    DpoConfig(beta=0.3), DpoConfig(beta=0.3, label_smoothing=0.1), DpoConfig('ipo', beta=0.3),
    DpoConfig(beta=2.0, length_normalised=True)], ids=str)
def test_the_loss_by_hand(arrays, own):
    policy, reference, mask = arrays

    def pair(i, j, offset):  # of log-ratios, in float64
        margin = own.beta * (i - j)
        if own.loss == 'ipo':
            return (i - j - 1 / (2 * own.beta)) ** 2
        e = own.label_smoothing
        return (1 - e) * np.logaddexp(0, offset - margin) + e * np.logaddexp(0, offset + margin)

    def by_hand(policy):
        ratios = np.where(mask, policy.astype(np.float64) - reference, 0.0).sum(-1)
        if own.length_normalised:
            ratios /= np.maximum(mask.sum(-1), 1)
        (a, b, c), (d, e) = ratios[0], ratios[1, :2]
        first = (pair(a, b, 0.7) + 0.5 * pair(a, c, 0.7) + 0.5 * pair(c, a, 0.7)) / 2
        second = 0.8 * pair(e, d, -0.2) + 0.2 * pair(d, e, -0.2)
        return 2.0 * first + 0.5 * second, ratios

    def loss(policy):
        sums = preference_sums(own, policy, reference, mask, PREFERENCE, WEIGHT, OFFSET)
        return sums.loss, sums

    policy = np.where(mask, policy, np.nan)  # what is no token reaches nothing
    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(policy))
    clean = np.where(mask, policy, 0.0)
    expected, ratios = by_hand(clean)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    for at in ((0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 3), (1, 1, 0), (1, 2, 0), (2, 0, 0)):
        moved = clean.astype(np.float64)
        moved[at] += 1e-5
        slope = (by_hand(moved)[0] - expected) / 1e-5 if mask[at] else 0.0
        assert float(gradient[at]) == pytest.approx(slope, rel=1e-3, abs=1e-4)
    metrics = {name: float(x) for name, x in sums.metrics().items()}
    margins = own.beta * np.array([ratios[0, 0] - ratios[0, 1], ratios[1, 1] - ratios[1, 0]])
    totals = np.where(mask, clean, 0.0).sum(-1)
    assert metrics['loss'] == pytest.approx(expected / 2.5, rel=1e-5)
    assert metrics['pairs'] == 2
    assert metrics['accuracy'] == (margins > 0).mean()
    assert metrics['margin'] == pytest.approx(margins.mean(), rel=1e-5)
    assert metrics['chosen_log_prob'] == pytest.approx((totals[0, 0] + totals[1, 1]) / 2, rel=1e-5)
    assert metrics['rejected_log_prob'] == pytest.approx(
        (totals[0, 1] + totals[1, 0]) / 2, rel=1e-5)
    d = (clean - reference)[mask].astype(np.float64)
    assert metrics['kl'] == pytest.approx(np.mean(np.exp(d) - 1 - d), rel=1e-5)


def test_several_devices_take_the_step_of_one():
    modes = ('replicated', 'fsdp', 'fsdp:2')
    done = subprocess.run([sys.executable, '-m', 'tests.programs.on_policies', *modes],
                          cwd=ROOT, env=simulated(2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = on_policies.take_steps('replicated')
    assert alone['devices'] == 1
    moved = np.abs(np.subtract(alone['params'], alone['initial'])).max()
    assert moved > 1e-3
    for found in json.loads(done.stdout):
        assert found['devices'] == 2
        for one, other in zip(found['metrics'], alone['metrics'], strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(found['params'], alone['params'], rtol=0, atol=1e-3 * moved)
        np.testing.assert_allclose(found['log_probs'], alone['log_probs'], rtol=0, atol=1e-3)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('uninterrupted'))
    dpo.train(config(), folder)
    return folder


def trained(folder):
    """Every array of the last checkpoint that training changes."""
    run = language_model.load_run(folder, step='last')
    with Checkpoints(folder, read_only=True) as checkpoints:
        return run, jax.tree.leaves(run.network.tuning.split(run.params)[0]), checkpoints.latest


def test_a_run_leaves_its_records_and_learns(uninterrupted):
    rows = workdir.read_metrics(uninterrupted)
    steps = [row for row in rows if row['split'] == 'train']
    assert [row['step'] for row in steps] == list(range(1, 7))
    # Before the first step the policy is the reference.
    assert steps[0]['loss'] == pytest.approx(np.log(2), abs=1e-5)
    assert (steps[0]['margin'], steps[0]['accuracy']) == pytest.approx((0.0, 0.5), abs=1e-2)
    assert steps[-1]['kl'] > steps[0]['kl']
    held_out = [row for row in rows if row['split'] == 'validation']
    assert [row['step'] for row in held_out] == [3, 6]
    assert {'loss', 'accuracy', 'margin', 'chosen_log_prob', 'rejected_log_prob', 'kl'} < set(
        held_out[0])


def test_sigterm_saves_and_the_rerun_ends_bit_for_bit(uninterrupted, tmp_path, monkeypatch):
    folder, make_batch, calls = str(tmp_path), batches.make_batch, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(*args)

    monkeypatch.setattr(batches, 'make_batch', interrupt)
    with pytest.raises(interruptions.Interrupted, match='SIGTERM: saved .* at step 2 of 6'):
        dpo.train(config(), folder)
    monkeypatch.setattr(batches, 'make_batch', make_batch)
    dpo.train(config(), folder)
    (_, leaves, last), (_, expected, expected_last) = trained(folder), trained(uninterrupted)
    assert last == expected_last == 6
    for a, b in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert workdir.read_metrics(folder) == workdir.read_metrics(uninterrupted)


def test_the_reference_is_the_model_without_its_adapters_and_is_found_again(
        uninterrupted, monkeypatch, capsys):
    prepared = runs.prepare(config(), uninterrupted)
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(runs, 'log_probs', None)  # nothing is computed
        kept = dpo.with_reference(prepared)[1]
    assert 'are in ' in capsys.readouterr().out
    run, *_ = trained(uninterrupted)
    assert run.stops == (run.tokenizer.eos_token_id,) == (0,)
    without = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if 'lora' in jax.tree_util.keystr(path) else leaf, run.params)
    some = [prepared.data.encoded['validation'][i] for i in range(3)]
    found = next(runs.log_probs(run.network, without, some, row_length=128, rows=1))
    other = next(runs.log_probs(run.network, run.params, some, row_length=128, rows=1))
    for i, item in enumerate(found):
        for k, values in enumerate(item):
            reference = kept[i].extras['reference_log_probs'][k]
            np.testing.assert_allclose(reference, values, rtol=0, atol=1e-4)
            assert np.abs(other[i][k] - values).max() > 1e-6
    path, = (os.path.join(uninterrupted, 'reference', name)
             for name in os.listdir(os.path.join(uninterrupted, 'reference')))
    with open(path, 'rb') as file:
        content = file.read()
    try:
        workdir.write_arrays(path, {'log_probs': np.zeros(3, np.float32)})
        with pytest.raises(WorkdirError, match='not the log-probabilities of .* tokens; delete it'):
            dpo.with_reference(prepared)
    finally:
        workdir.write_bytes(path, content)


@pytest.mark.parametrize(('key', 'value', 'message'), [
    ('dpo.beta', 0.0, 'config.dpo.beta=0.0, expected a number above 0'),
    ('dpo.label_smoothing', 0.5, 'config.dpo.label_smoothing=0.5, expected a number of at least 0'),
    ('dpo.loss', 'kto', "config.dpo.loss='kto', expected one of ('dpo', 'ipo')"),
    ('train.tune', 'head', "config.train.tune: 'head', expected 'all', 'lora' or 'last:N'"),
    ('train.frozen_dtype', 'bfloat16', "'all' with train.frozen_dtype='bfloat16'"),
    ('model.family', 'bert', 'an encoder has no next token, expected a decoder'),
])
def test_bad_keys_end_in_one_line(key, value, message, tmp_path):
    own = {'train.tune': 'all', key: value} | (
        {'model.sizes.intermediate_size': 24} if key == 'model.family' else {})
    with pytest.raises((ConfigError, DataError)) as error:
        dpo.train(config(**own), str(tmp_path / 'run'))
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_smoothing_is_no_key_of_ipo():
    with pytest.raises(ConfigError, match="label_smoothing=0.1 beside dpo.loss='ipo', expected 0"):
        dpo.check(config(**{'dpo.loss': 'ipo', 'dpo.label_smoothing': 0.1}))


def test_margins_are_no_part_of_ipo(tmp_path):
    with pytest.raises(ConfigError, match="config.data.strengths='margin', expected 'ignored'"):
        dpo.check(config(**{'dpo.loss': 'ipo', 'data.strengths': 'margin'}))
    dpo.check(config(**{'data.strengths': 'margin'}))
    with pytest.raises(ConfigError, match='no config.dpo'):  # of another kind of run
        dpo.check(load_config('sft', 'demo'))
    rows = [{'prompt': f'question {i}', 'chosen': f' good {i}', 'rejected': f' bad {i}',
             'margin': float(i == 3)} for i in range(30)]
    path = tmp_path / 'pairs.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    with pytest.raises(DataError, match="1 train comparisons have a margin, which dpo.loss='ipo'"):
        dpo.train(config(**{'dpo.loss': 'ipo', 'data.path': str(path)}), str(tmp_path / 'run'))


def log_probs(network, params, prompts, answers):
    """[P, K] log-probabilities of K answers of two tokens to each prompt."""
    shape = len(prompts), len(answers)
    given = Answers(np.broadcast_to(np.array(answers, np.int32), (*shape, 2)),
                    np.full(shape, 2, np.int32), np.zeros(shape, bool))
    own = Prompts([Comparison(str(i), '', (), '') for i in range(len(prompts))], prompts)
    return rollouts.read(
        network, params, rollouts.dialogues(own, given),
        rollouts.plan(prompts, shape[1], 2, row_length=64, rows=8), 2,
        chunk=len(prompts)).log_probs.sum(axis=-1).astype(np.float64)


def test_a_run_reaches_the_optimum_of_a_bandit(tmp_path):
    """Taught by the preferences of rewards r it is pi_ref exp(r / beta), among the answers."""
    write_tokenizer(tmp_path / 'tokenizer')
    rewards, beta = np.array([1.0, -0.5, 0.3, -1.0]), 0.5
    rows = [{'prompt': f'w{i}', 'responses': [f' w{20 + a}', f' w{20 + b}'],
             'preference': float(scipy.special.expit(rewards[a] - rewards[b]))}
            for i in range(1, 13) for a in range(4) for b in range(a)]
    (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    values = config(**{
        'data.path': str(tmp_path / 'pairs.jsonl'), 'model.tokenizer': str(tmp_path / 'tokenizer'),
        'model.sizes.vocab_size': 40, 'data.validation_fraction': 0.3, 'dpo.beta': beta,
        'train.tune': 'all', 'train.batch_size': 64, 'train.rows': 4, 'train.epochs': 1000.0,
        'train.max_steps': 100, 'train.checkpoint_every': 100, 'optimizer.learning_rate': 0.02})
    dpo.train(values, str(tmp_path / 'run'))
    policy = language_model.load_run(str(tmp_path / 'run'), step='last')
    start = initial.start(values, *runs.describe_network(values))
    prompts = [np.array(policy.tokenizer(f'w{i}')['input_ids'], np.int32) for i in range(1, 13)]
    answers = [[20 + a, policy.tokenizer.eos_token_id] for a in range(4)]
    before, after = (scipy.special.log_softmax(log_probs(*of, prompts, answers), axis=1) for of in (
        rollouts.reference(start.network, start.trained, start.frozen),
        (policy.network, policy.params)))
    best = scipy.special.log_softmax(before + rewards / beta, axis=1)

    def distance(policy):
        return np.mean(np.sum(np.exp(policy) * (policy - best), axis=1))

    assert distance(before) > 0.5
    assert distance(after) < 0.01
