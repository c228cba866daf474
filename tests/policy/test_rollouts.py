"""Rollouts are draws of the policy itself, whatever else is computed with them."""

import dataclasses

import jax
import numpy as np
import pytest

from qrm.data.comparisons import Comparison, DataError, DataReport
from qrm.data.tokens import load_tokenizer
from qrm.policy import rollouts
from qrm.policy.network import PolicyNetwork
from qrm.policy.rollouts import Prompts
from qrm.policy.sampling import Sampling, sample
from tests.helpers import ARCHITECTURE, init, lora, write_tokenizer

NET = PolicyNetwork(dataclasses.replace(ARCHITECTURE, num_layers=1), tuning=lora(), value=True)
PARAMS = jax.tree.map(lambda x: 2.0 * x, init(NET))
HOW = Sampling(samples=3, max_new_tokens=6, stops=(7, 8, 9, 10, 11, 12))
PROMPTS = [np.random.default_rng(i).integers(1, 50, 3 + i).astype(np.int32) for i in range(4)]


def comparisons(count):
    return [Comparison(f'{i}', f'w{i}', (), f'w{i}') for i in range(count)]


@pytest.fixture(scope='module')
def answers():
    return rollouts.answer(NET, PARAMS, PROMPTS, HOW, seed=3, numbers=range(10, 14), rows=16)


def test_answers_do_not_depend_on_what_else_is_answered(answers):
    assert 0 < answers.truncated.sum() < answers.truncated.size
    np.testing.assert_array_equal(answers.mask.sum(axis=-1), answers.sizes)
    alone = rollouts.answer(NET, PARAMS, PROMPTS[2:3], HOW, seed=3, numbers=[12], rows=2)
    np.testing.assert_array_equal(alone.tokens[0], answers.tokens[2])
    other = rollouts.answer(NET, PARAMS, PROMPTS[2:3], HOW, seed=3, numbers=[13], rows=2)
    assert (other.tokens != alone.tokens).any()


def test_what_is_read_of_answers_is_what_they_were_drawn_with(answers):
    prompts = Prompts(comparisons(4), PROMPTS)
    plan = rollouts.plan(PROMPTS, 3, 6, row_length=32, rows=2)
    found = rollouts.read(NET, PARAMS, rollouts.dialogues(prompts, answers), plan, 6, chunk=2)
    drawn = np.zeros_like(found.log_probs)
    for c, own in sample(NET.transformer, PARAMS['backbone'], PROMPTS, HOW, seed=3,
                         numbers=range(10, 14)):
        for k, one in enumerate(own):
            drawn[c, k, :len(one.tokens)] = one.log_probs
    np.testing.assert_allclose(found.log_probs, drawn, atol=1e-5)
    assert (found.entropy[answers.mask] > 0).all()
    assert found.values[answers.mask].all()
    assert not any(x[~answers.mask].any() for x in found)
    # The shapes hold the longest answers, so that no rollout is compiled for.
    assert plan.longest >= 6


def test_the_reference_of_adapters_is_the_model_without_them(answers):
    trained, frozen = NET.tuning.split(PARAMS)
    network, params = rollouts.reference(NET, trained, frozen)
    prompts, plan = Prompts(comparisons(4), PROMPTS), rollouts.plan(
        PROMPTS, 3, 6, row_length=32, rows=2)
    dialogues = rollouts.dialogues(prompts, answers)
    found = rollouts.read(network, params, dialogues, plan, 6, chunk=4).log_probs
    off = jax.tree_util.tree_map_with_path(
        lambda path, x: x * ('/lora/' not in jax.tree_util.keystr(
            path, simple=True, separator='/')), PARAMS)
    expected = rollouts.read(NET, off, dialogues, plan, 6, chunk=4).log_probs
    np.testing.assert_allclose(found, expected, atol=1e-6)
    moved = rollouts.read(NET, PARAMS, dialogues, plan, 6, chunk=4).log_probs
    assert np.abs(found - moved).max() > 1e-3
    assert not any(x is y for x, y in zip(*map(jax.tree.leaves, (
        rollouts.reference(dataclasses.replace(NET, tuning=dataclasses.replace(
            NET.tuning, kind='all', lora=None)), PARAMS, {})[1], PARAMS)), strict=False))


def test_different_prompts_are_kept_and_others_counted(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    chat = ({'role': 'user', 'content': 'w1'}, {'role': 'assistant', 'content': 'w2'})
    given = [Comparison('a', 'w1 w2 w3', ('w4',), 'g'), Comparison('b', 'w1 w2 w3', ('w5',), 'g'),
             Comparison('c', '', ('w4',), 'g'), Comparison('d', chat, (chat[1:],), 'h'),
             Comparison('e', 'w1', ('w4', 'w5'), 'h', ranks=(0, 1))]
    report = DataReport('', 'train', read=5)
    found = rollouts.prompts_of(given, report, tokenizer, 2)
    assert [one.id for one in found.comparisons] == ['a', 'e']
    assert [one.responses for one in found.comparisons] == [(), ()]
    assert [ids.tolist() for ids in found.tokens] == [[2, 3], [1]]
    assert (report.kept, report.truncated) == (2, 1)
    assert report.dropped == {'no prompt to answer': 2, 'prompt of an earlier row': 1}
    with pytest.raises(DataError, match='no prompt to answer is left in the test split'):
        rollouts.check_room(Prompts([], []), 'test')


def test_texts_are_those_of_the_tokens_before_the_stop(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    chat = ({'role': 'user', 'content': 'w1'},)
    prompts = Prompts([Comparison('a', 'w1', (), 'a'), Comparison('b', chat, (), 'b')],
                      [np.array([1], np.int32)] * 2)
    answers = rollouts.Answers(np.array([[[2, 3, 0], [4, 5, 6]]] * 2, np.int32),
                               np.array([[2, 3]] * 2, np.int32),
                               np.array([[False, True]] * 2))
    text, turns = (one.responses for one in rollouts.answered(prompts, answers, tokenizer))
    assert text == (' w2', ' w4 w5 w6')
    assert turns[1] == ({'role': 'assistant', 'content': ' w4 w5 w6'},)
