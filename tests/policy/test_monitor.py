"""Tests of the monitor: rows by hand, estimates of known numbers, checkpoints."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from qrm.data import phrases
from qrm.policy import monitor
from qrm.policy.monitor import Evaluation, Row
from qrm.policy.rules import Rules, suspicions
from qrm.rewards import distributions, resampling, selection
from tests.helpers import policy_row

NAN = np.nan


def _small(**changes):
    """Three responses, two to the first of two prompts; what is not there is nan.

    They have 6, 2 and 5 tokens; a token of each has the log-probabilities -1, -2, -1/2 under the
    policy, and -3/2, -2, -1 under the reference.
    """
    mask = np.arange(6) < np.array([[6, 2], [5, 0]])[..., None]

    def of_tokens(first, second, third):
        return np.where(mask, np.array([[first, second], [third, NAN]])[..., None], NAN)

    return Evaluation(**{
        'step': 7, 'groups': ['a', 'b'], 'texts': [[' Yes.', " I can't help."], [' \n', '']],
        'tokens': np.array([[[1, 2, 1, 2, 1, 2], [3, 4, 9, 9, 9, 9]], [[5] * 6, [9] * 6]]),
        'mask': mask, 'present': np.array([[True, True], [True, False]]),
        'truncated': np.array([[False, False], [True, True]]),
        'log_probs': of_tokens(-1.0, -2.0, -0.5),
        'reference_log_probs': of_tokens(-1.5, -2.0, -1.0),
        'proxy': distributions.uniform_atoms(jnp.array([
            [[1.0, 3.0], [0.0, 0.0]], [[4.0, 8.0], [NAN, NAN]]])),
    } | changes)


# An evaluation.


def test_a_row_by_hand():
    row = monitor.measure(_small())
    assert (row.step, row.prompts, row.responses) == (7, 2, 3)
    # Rewards 2, 0 and 6; the variance is 40/3 - 64/9 = 56/9. Predicted are 1, 0 and 2.
    assert row.proxy == pytest.approx(8 / 3)
    assert row.proxy_spread == pytest.approx(math.sqrt(56) / 3)
    assert row.predicted_std == pytest.approx(1.0)
    # d is 1/2, 0 and 1/2 a token, of 6, 2 and 5.
    assert row.kl == pytest.approx(5.5 / 3)
    assert row.kl_token == pytest.approx(5.5 / 13)
    k3 = math.exp(-0.5) - 0.5
    assert row.kl_k3 == pytest.approx(11 * k3 / 3, rel=1e-5)
    assert row.kl_token_k3 == pytest.approx(11 * k3 / 13, rel=1e-5)
    assert row.length == pytest.approx(13 / 3)
    assert (row.length_p10, row.length_p50, row.length_p90) == pytest.approx((2.6, 5.0, 5.8))
    assert row.entropy == pytest.approx(12.5 / 13)
    assert row.perplexity == pytest.approx(math.exp(18 / 13))
    # 1212, 2121, 1212; too few; 5555, 5555.
    assert row.repeated == pytest.approx((1 / 3 + 0 + 1 / 2) / 3)
    assert row.distinct_1 == pytest.approx(5 / 13)
    assert row.distinct_2 == pytest.approx(4 / 10)  # 12, 21, 34, 55
    assert (row.refused, row.truncated, row.blank) == pytest.approx((1 / 3,) * 3)
    assert row.mismatch == 0.0
    for name in ('gold', 'gold_error', 'gold_spread', 'win', 'win_error', 'disagreement',
                 'unread', 'kl_bound', 'kl_estimate'):
        assert getattr(row, name) is None


def test_standard_errors_by_hand():
    # Lengths: 8 of two responses and 5 of one, mean 13/3. What opening questions are off by is
    # 8 - 26/3 = -2/3 and 2/3: sqrt(2/1) sqrt(4/9 + 4/9) / 3 = 4/9.
    assert monitor.measure(_small()).length_error == pytest.approx(4 / 9)
    # Nats a token: 6 + 4 of 8 tokens and 2.5 of 5, mean 12.5/13; off by 10 - 100/13 = 30/13.
    assert monitor.measure(_small()).entropy_error == pytest.approx(
        math.sqrt(2) * math.sqrt(2) * 30 / 13 / 13)


def test_what_may_be_known_besides():
    sampled = _small().log_probs.copy()
    sampled[1, 0] -= 0.1
    row = monitor.measure(_small(
        sampled_log_probs=sampled, entropies=np.where(_small().mask, 0.7, NAN),
        disagreements=np.array([[1.0, 0.0], [2.0, NAN]]), unread=np.array([[0.1, 0.5], [0.9, NAN]]),
        gold=np.array([[1.0, 2.0], [6.0, NAN]]), wins=np.array([[0.5, 0.1], [0.9, NAN]])))
    assert row.mismatch == pytest.approx(0.5 / 13)
    assert row.entropy == pytest.approx(0.7)
    assert row.disagreement == pytest.approx((1.0 + 0.0 + 2.0) / 3)
    assert (row.gold, row.win, row.unread) == pytest.approx((3.0, 0.5, 0.5))
    assert row.gold_spread == pytest.approx(math.sqrt(14 / 3))
    assert (row.kl_bound, row.kl is None) == (None, False)


def test_the_kl_of_a_choice_is_estimated_from_the_draw():
    row = monitor.measure(_small(best_of=4))
    assert row.kl_bound == pytest.approx(math.log(4) - 3 / 4)
    # By what the draws were worth, -6, -4 and -2.5 nats, at most the bound each.
    of_draws = selection.estimated_kl_best_of_n(np.array([-6.0, -4.0, -2.5]), 4)
    assert row.kl_estimate == pytest.approx(of_draws.mean())
    assert row.kl_estimate < row.kl_bound
    unknown = [name for name, value in row._asdict().items() if value is None]
    assert {'kl', 'kl_error', 'kl_k3', 'kl_token', 'kl_token_k3', 'entropy'} <= set(unknown)
    assert ', <= 0.636 ' in monitor.format_rows([row])
    later = [policy_row(0), *(row._replace(step=step) for step in (1, 2, 3))]
    found = {one.rule for one in suspicions(later, Rules(kl_most=0.0, entropy_share=0.9))}
    assert not found & {'kl', 'kl growth', 'entropy'}


def test_rows_are_ready_for_json():
    row = monitor.measure(_small())
    assert Row(**json.loads(json.dumps(row._asdict()))) == row


def test_kl_and_entropy_are_those_of_the_distributions():
    # One token of five, drawn from the policy: both estimators are right within their own errors.
    rng = np.random.default_rng(0)
    policy, reference = np.array([0.5, 0.2, 0.1, 0.1, 0.1]), np.array([0.1, 0.3, 0.2, 0.2, 0.2])
    tokens = rng.choice(5, (2000, 4, 1), p=policy)
    there = np.ones((2000, 4), bool)
    row = monitor.measure(Evaluation(
        0, [str(i) for i in range(2000)], [[' a'] * 4] * 2000, tokens, there[..., None], there,
        ~there, np.log(policy)[tokens], np.log(reference)[tokens],
        distributions.uniform_atoms(jnp.zeros((2000, 4, 1)))))
    kl = np.sum(policy * np.log(policy / reference))
    for found, error in ((row.kl, row.kl_error), (row.kl_k3, row.kl_k3_error)):
        assert abs(found - kl) < 4 * error
        assert error < 0.02 * kl + 0.01
    assert abs(row.entropy + np.sum(policy * np.log(policy))) < 4 * row.entropy_error


def test_standard_errors_are_those_of_the_bootstrap():
    rng = np.random.default_rng(0)
    prompts, most = 200, 8
    groups = rng.integers(0, 60, prompts)
    lengths = rng.integers(1, most + 1, (prompts, 2)) * (groups % 2 + 1)[:, None]
    mask = np.arange(2 * most) < lengths[..., None]
    log_probs = -rng.gamma(1.0, 1.0, mask.shape) * (1 + groups % 3)[:, None, None]
    there = np.ones((prompts, 2), bool)
    row = monitor.measure(Evaluation(
        0, [f'{g}' for g in groups], [[' a'] * 2] * prompts, np.zeros_like(mask, int), mask, there,
        ~there, log_probs, log_probs, distributions.uniform_atoms(jnp.zeros((prompts, 2, 1)))))
    weights = resampling.cluster_bootstrap_weights(groups, 2000, 0)
    sums = weights @ (-log_probs * mask).sum((1, 2))
    assert row.entropy_error == pytest.approx(
        np.std(sums / (weights @ lengths.sum(1))), rel=0.1)
    assert row.length_error == pytest.approx(
        np.std(weights @ lengths.sum(1) / (2 * weights.sum(1))), rel=0.1)


def test_repetition_and_distinct_by_hand():
    tokens = np.array([[1, 2, 3, 4, 1, 2, 3, 4, 1], [7] * 9])
    mask = np.array([[True] * 9, [True] * 3 + [False] * 6])
    # 1234 2341 3412 4123 1234 2341: two of six stood before.
    np.testing.assert_allclose(monitor.repetition(tokens, mask), [2 / 6, 0.0])
    # 12 23 34 41, and 77, of 8 and 2 pairs.
    assert monitor.distinct(tokens, mask, 2) == pytest.approx(5 / 10)
    assert monitor.distinct(tokens, np.zeros_like(mask), 1) == 0.0


def test_responses_without_tokens_are_measured():
    row = monitor.measure(_small(mask=np.zeros((2, 2, 6), bool)))
    assert (row.length, row.kl, row.kl_token, row.entropy, row.repeated) == (0.0,) * 5
    assert row.perplexity == 1.0


@pytest.mark.parametrize('text', [
    " I'm sorry, but that is not something I do.", 'I\u2019m afraid I do not know.',
    'Well, I cannot help you.', "i can't assist with this", 'I must decline.',
    "I'd rather not say.", 'As an AI, I have no body.', 'I am unable to answer.',
    'I will not provide that.'])
def test_refusals(text):
    assert monitor.refuses(text)


@pytest.mark.parametrize('text', [
    '', 'Sure, here is how.', 'I can help.', 'You cannot help it.', 'Sorry to hear that!',
    'I will not be long: first, boil water.', 'Hawaii cannot help with that.'])
def test_no_refusals(text):
    assert not monitor.refuses(text)


def test_of_the_demo_only_refusals_are_refusals():
    banks = (*phrases.ANSWER.values(), phrases.POLITE, phrases.OFF_TOPIC, phrases.FILLER,
             phrases.CLARIFY, phrases.COMPLY, phrases.EVADE, phrases.PREACH, phrases.GENTLE)
    assert all(monitor.refuses(text) for text in phrases.REFUSE)
    assert not any(monitor.refuses(text) for bank in banks for text in bank)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'groups': ['a', 'a']}, 'fewer than two opening questions'),
    ({'groups': ['a']}, r'groups: shape \(1,\), expected \(2,\)'),
    ({'texts': [['a', 'b'], ['c']]}, 'texts: shape'),
    ({'present': np.ones(2, bool)}, r'present: shape \(2,\), expected \[C, K\]'),
    ({'gold': np.zeros((2, 3))}, r'gold: shape \(2, 3\), expected \(2, 2\)'),
    ({'unread': np.zeros((2, 3))}, r'unread: shape \(2, 3\), expected \(2, 2\)'),
    ({'tokens': np.zeros((2, 2, 5), int)}, r'tokens: shape \(2, 2, 5\), expected \(2, 2, 6\)'),
    ({'log_probs': np.full((2, 2, 6), NAN)}, 'log_probs: 13 numbers that are not finite.*prompt 0'),
    ({'gold': np.array([[1.0, 1.0], [np.inf, NAN]])}, 'gold: 1 numbers .*prompt 1'),
    ({'present': np.array([[True, True], [False, False]])}, 'fewer than two opening questions'),
])
def test_what_cannot_be_measured_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        monitor.measure(_small(**changes))


# Checkpoints and text.


def test_the_best_checkpoint_and_what_is_not_told_apart_from_it():
    rng = np.random.default_rng(0)
    groups = [f'{i % 50}' for i in range(200)]
    common = rng.normal(0.0, 0.1, 200)  # some prompts are won more often by all
    wins = {step: mean + common + rng.normal(0.0, 0.02, 200)
            for step, mean in ((30, 0.62), (10, 0.5), (20, 0.625))}
    wins[40] = wins[20] - 0.001 * np.tile([1.0, -1.0], 100) - 1e-6
    best = monitor.best_checkpoint(wins, groups, replicates=500, level=0.95, seed=0)
    assert best.step == max(wins, key=lambda step: wins[step].mean()) == 20
    assert best.win['value'] == pytest.approx(wins[20].mean())
    # Of the mean of 200 prompts of spread .1, in 50 groups that have nothing in common.
    assert best.win['high'] - best.win['low'] == pytest.approx(2 * 1.96 * 0.1 / 200 ** 0.5, rel=0.3)
    # The difference of .005 has a standard error of .002, as prompts are compared with themselves;
    # that of step 40 is 1e-6 on average.
    assert best.ties == (40,)


def test_with_few_opening_questions_no_checkpoint_is_told_apart():
    wins = {1: np.array([0.1, 0.2]), 2: np.array([0.9, 0.8]), 3: np.array([0.8, 0.9])}
    best = monitor.best_checkpoint(wins, ['a', 'b'], replicates=10, level=0.9, seed=0)
    assert best.step == 3
    assert best.win == {'value': pytest.approx(0.85), 'low': None, 'high': None}
    assert best.ties == (1, 2)


def test_of_equal_checkpoints_the_last_is_kept():
    """As of all runs, so that what is told of is what is loaded."""
    wins = {step: np.array([0.1, 0.7]) for step in (2, 4, 3)}
    best = monitor.best_checkpoint(wins, ['a', 'b'], replicates=10, level=0.9, seed=0)
    assert (best.step, best.ties) == (4, (2, 3))
    assert monitor.lost(wins[2]) == pytest.approx(0.6)


@pytest.mark.parametrize('wins', [{}, {1: np.zeros(3)}, {1: np.array([0.5, NAN])}])
def test_checkpoints_that_cannot_be_compared(wins):
    with pytest.raises(ValueError, match='expected'):
        monitor.best_checkpoint(wins, ['a', 'b'], replicates=10, level=0.9, seed=0)


def test_rows_as_a_table():
    text = monitor.format_rows([
        policy_row(0), policy_row(10, gold=None, repeated=0.5, disagreement=0.25)])
    header, _, first, second = (
        [cell.strip() for cell in line.strip('| ').split('|')] for line in text.splitlines())
    assert dict(zip(header, first, strict=True)) | {'step': '0'} == {
        'step': '0', 'proxy': '1.000 ± 0.100', 'gold': '2.000 ± 0.100', 'win': '0.500 ± 0.020',
        'KL (nats)': '5.000 ± 0.300', 'KL a token': '0.0000 ± 0.0000', 'tokens': '50.0 ± 2.0',
        'entropy (nats)': '2.000 ± 0.050', 'repeated': '5.0%', 'distinct-2': '0.000',
        'refused': '10.0%', 'truncated': '2.0%', 'blank': '0.0%', 'predicted std': '0.500',
        'unread': '-', 'disagreement': '-', 'perplexity': '3.00'}
    cells = dict(zip(header, second, strict=True))
    assert (cells['step'], cells['gold'], cells['repeated']) == ('10', '-', '50.0%')
    assert cells['disagreement'] == '0.250'
