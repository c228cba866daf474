"""Reward functions as engines call them: by name, by position, with texts, chats and arrays."""

import dataclasses

import numpy as np
import pytest

import qrm
from qrm.data.comparisons import DataError
from qrm.data.rows import parse_row
from qrm.rewards import pairwise, selection
from qrm.rewards.heads import HeadConfig
from qrm.rewards.selection import Scale
from qrm.serving.functions import RewardFunction
from tests.helpers import init


@pytest.fixture(scope='module')
def asked(comparisons):
    """Prompts and completions, those of a prompt one after the other."""
    return ([c.prompt for c in comparisons for _ in c.responses],
            [response for c in comparisons for response in c.responses])


def rewarded(model, rule='mean', **options):
    return RewardFunction(model, selection.parse_rule(rule), **options)


def test_rewards_are_those_of_the_model_in_the_order_asked_for(model, asked):
    expected = np.array(model.score(*asked).rewards)
    order = [5, 0, 3, 1, 7, 2, 6, 4]  # completions of a prompt apart from each other
    prompts, completions = ([texts[i] for i in order] for texts in asked)
    found = rewarded(model)(prompts=prompts, completions=completions)
    assert all(type(value) is float for value in found)
    np.testing.assert_allclose(found, expected[order], atol=1e-4)


def test_completions_of_a_prompt_share_it(model, asked, monkeypatch):
    seen = []
    predict = type(model).predict
    monkeypatch.setattr(type(model), 'predict',
                        lambda self, encoded: seen.extend(encoded) or predict(self, encoded))
    rewarded(model)(*asked)
    assert [len(item.responses) for item in seen] == [2, 2, 2, 2]
    assert all(len(item.prompt) > 0 for item in seen)


@pytest.mark.parametrize('rule', ['quantile:0.25', 'cvar:0.2'])
def test_rules_are_applied_to_the_distribution(model, asked, rule):
    quantiles = np.sort(np.array(model.score(*asked).quantiles), axis=-1)
    n = quantiles.shape[1]
    by_hand = {'quantile:0.25': quantiles[:, int(np.ceil(0.25 * n)) - 1],
               'cvar:0.2': None}[rule]
    if by_hand is None:  # the lowest fifth of the mass, an atom in part
        counted = np.clip(0.2 * n - np.arange(n), 0.0, 1.0)
        by_hand = quantiles @ counted / (0.2 * n)
    np.testing.assert_allclose(rewarded(model, rule)(*asked), by_hand, atol=1e-4)


def test_samples_do_not_depend_on_what_else_is_asked(model, asked):
    prompts, completions = asked
    found = rewarded(model, 'sample:5')(prompts, completions)
    order = [6, 1, 1, 3]
    again = rewarded(model, 'sample:5')(*([texts[i] for i in order] for texts in asked))
    np.testing.assert_allclose(again, [found[i] for i in order], atol=1e-4)
    quantiles = np.array(model.score(prompts, completions).quantiles)
    assert (np.abs(quantiles - np.array(found)[:, None]).min(axis=1) < 1e-4).all()
    assert rewarded(model, 'sample:6')(prompts, completions) != pytest.approx(found, abs=1e-3)
    assert rewarded(model, 'sample:5').__name__ == 'qrm_sample_5'


def test_members_that_disagree_lower_a_reward(model, asked):
    net = dataclasses.replace(model.network, head=HeadConfig('quantile', 4, members=3))
    ensemble = dataclasses.replace(model, network=net, params=init(net))
    found = rewarded(ensemble, 'disagreement:2')(*asked)
    encoded, _ = ensemble.encode([parse_row({'prompt': p, 'response': c}, 'row', literal=True)
                                  for p, c in zip(*asked, strict=True)])
    means = np.concatenate(ensemble.predict(encoded)).reshape(8, 3, 4).mean(axis=2)
    np.testing.assert_allclose(found, means.mean(axis=1) - 2.0 * means.std(axis=1), atol=1e-4)
    assert means.std(axis=1).min() > 0.1


def test_mean_std_is_in_units_of_the_scale_of_the_model(model, asked):
    scaled = dataclasses.replace(model, scale=Scale(0.5, 4.0))
    quantiles = np.array(model.score(*asked).quantiles)
    np.testing.assert_allclose(
        rewarded(scaled, 'mean-std:2')(*asked),
        quantiles.mean(axis=1) / 0.5 - 2.0 * quantiles.std(axis=1) / 4.0, atol=1e-4)


def test_engines_pass_on_what_a_reward_model_does_not_read(model, asked):
    prompts, completions = asked
    expected = rewarded(model)(prompts, completions)
    function = rewarded(model)
    # TRL and MaxText by names with columns; EasyDeL with all that it knows; Tunix with arrays of
    # np.str_.
    assert function(prompts=prompts, completions=completions, completion_ids=[[1]] * 8,
                    trainer_state=None, answer=['x'] * 8) == expected
    assert function(tmvp_config=object(), prompts=prompts, completions=completions,
                    answer=['x'] * 8, question='q') == expected
    assert function(prompts=prompts, completions=completions, raw_completions=completions,
                    prompt_texts=None, completion_texts=completions, raw_text=completions,
                    reasoning=[None] * 8, tool_calls=[None] * 8, max_length=44,
                    batch={}) == expected
    assert function(prompts, completions, object()) == expected
    assert function(prompts=np.array(prompts), completions=np.array(completions)) == expected


def test_names_say_the_rule(model):
    assert rewarded(model).__name__ == 'qrm_mean'
    assert rewarded(model, 'quantile:0.1').__name__ == 'qrm_quantile_0_1'
    assert rewarded(model, name='helpful').__name__ == 'helpful'


def test_distributions_are_logged_where_it_is_asked_for(model, asked):
    columns, metrics = {}, {}
    found = rewarded(model, name='r')(
        *asked, log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    quantiles = np.array(model.score(*asked).quantiles)
    low, high = (f'r_q{model.taus[i]:.2f}' for i in (0, -1))
    assert set(columns) == {'r_std', low, high}
    np.testing.assert_allclose(columns['r_std'], quantiles.std(axis=1), atol=1e-4)
    np.testing.assert_allclose(columns[low], quantiles.min(axis=1), atol=1e-4)
    np.testing.assert_allclose(columns[high], quantiles.max(axis=1), atol=1e-4)
    assert metrics == {'r_std': pytest.approx(np.mean(columns['r_std']))}
    np.testing.assert_allclose(found, quantiles.mean(axis=1), atol=1e-4)


def test_chats_are_answered_by_chats(model):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    model.tokenizer.chat_template = template
    try:
        chats = [[{'role': 'user', 'content': 'Why?'}]] * 2
        answers = [[{'role': 'assistant', 'content': text}] for text in ('So.', 'No.')]
        found = rewarded(model)(chats, answers)
        # A template is all that stands between them and texts.
        expected = rewarded(model)(['user: Why?\n'] * 2, ['assistant: So.\n', 'assistant: No.\n'])
        np.testing.assert_allclose(found, expected, atol=1e-4)
    finally:
        model.tokenizer.chat_template = None


def test_what_cannot_be_answered_is_refused(model, comparisons):
    assert rewarded(model)([], []) == []
    with pytest.raises(DataError, match='2 prompts and 1 completions'):
        rewarded(model)(['a', 'b'], ['c'])
    with pytest.raises(DataError, match=r"prompts\[1\] field 'responses\[0\]': got null, expected"):
        rewarded(model)(['a', 'b'], ['c', None])
    with pytest.raises(ValueError, match="rule 'mean-std:1' needs a scale of other responses"):
        rewarded(model, 'mean-std:1')
    with pytest.raises(ValueError, match="rule 'disagreement:1' of a head with one member"):
        rewarded(model, 'disagreement:1')
    with pytest.raises(ValueError, match="rule 'median', expected mean, quantile:tau"):
        qrm.reward('nowhere', rule='median')
    with pytest.raises(DataError, match='nowhere'):
        qrm.reward('./nowhere')


@pytest.mark.parametrize('aggregate', ['', 'bradley-terry'])
def test_a_pairwise_model_rewards_groups_of_completions(pairwise_model, comparisons, aggregate):
    prompts = [c.prompt for c in comparisons[:2] for _ in range(3)]
    completions = [*comparisons[0].responses, ' Yes.', *comparisons[1].responses, ' No.']
    order = [3, 0, 4, 1, 2, 5]
    function = rewarded(pairwise_model, aggregate=aggregate)
    found = function(*([texts[i] for i in order] for texts in (prompts, completions)))
    wins = pairwise_model.compare([prompts[0], prompts[3]], [completions[:3], completions[3:]])
    expected = np.concatenate([pairwise.aggregate(one, aggregate or 'tournament').scores
                               for one in wins])
    np.testing.assert_allclose(found, expected[order], atol=1e-5)
    assert function.__name__ == f'qrm_{(aggregate or "tournament").replace("-", "_")}'


def test_what_a_pairwise_model_cannot_reward_is_refused(model, pairwise_model):
    with pytest.raises(DataError, match=r'prompts\[2\]: one response to a prompt, expected two'):
        rewarded(pairwise_model)(['a', 'a', 'b'], [' x', ' y', ' z'])
    with pytest.raises(ValueError, match="rule 'cvar:0.2' of a pairwise model, expected 'mean'"):
        rewarded(pairwise_model, 'cvar:0.2')
    with pytest.raises(ValueError, match="aggregate 'elo', expected one of"):
        rewarded(pairwise_model, aggregate='elo')
    with pytest.raises(ValueError, match="aggregate 'tournament', expected none: the model scores"):
        rewarded(model, aggregate='tournament')
