"""Win rates against references, by hand, and their cache."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
from scipy.special import expit

from qrm.analysis import winrate
from qrm.data import tokens
from qrm.data.comparisons import Comparison, DataError
from qrm.data.tokens import Reading
from qrm.models import families
from qrm.models.network import RewardNetwork
from qrm.rewards import distributions, losses
from qrm.rewards.heads import HeadConfig
from qrm.training.reward_model import RewardModel
from tests.helpers import SETTINGS as GPT2
from tests.helpers import init, small_pairwise_model

SETTINGS = {'replicates': 50, 'level': 0.9, 'seed': 0}
PROMPTS = [f'\n\nHuman: question {i}?\n\nAssistant:' for i in range(40)]


@pytest.fixture(scope='module')
def model():
    tokenizer = tokens.train_tokenizer([*PROMPTS, ' yes of course', ' no, never'], 300)
    settings = GPT2 | {'vocab_size': 300, 'n_layer': 1}
    network = RewardNetwork(families.architecture(settings), HeadConfig('quantile', 4))
    params = jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, init(network))
    return RewardModel(network, settings, params, tokenizer,
                       losses.LossConfig('distributional_bradley_terry'), Reading(64),
                       row_length=64)


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    references = [{'prompt': p, 'responses': [f' no {i}', ' never']}
                  for i, p in enumerate(PROMPTS)]
    candidates = [{'prompt': p, 'response': f' yes {i}'} for i, p in enumerate(PROMPTS)]
    candidates.append({'prompt': 'of no reference', 'response': ' yes'})
    return write(folder / 'candidates.jsonl', candidates), write(
        folder / 'references.jsonl', references)


def test_rates_are_those_of_the_scores(model, files, tmp_path):
    found = winrate.win_rates(model, *files, str(tmp_path), **SETTINGS)
    own = model.score(PROMPTS, [f' yes {i}' for i in range(40)])
    other = model.score(PROMPTS, [[f' no {i}', ' never'] for i in range(40)])
    lead = np.array([a - b for a, b in zip(own.rewards, other.rewards, strict=True)])
    assert np.abs(lead).min() > 1e-4  # no ties
    assert found['win_rate']['value'] == pytest.approx(np.mean(lead > 0))
    # The mean over a draw from each side's four quantiles.
    wins = [expit(a[:, None] - b[None]).mean()
            for a, both in zip(own.quantiles, other.quantiles, strict=True) for b in both]
    assert found['win_probability']['value'] == pytest.approx(np.mean(wins), abs=1e-5)
    assert found['win_rate']['low'] < found['win_rate']['value'] < found['win_rate']['high']
    assert (found['prompts'], found['candidates'], found['unmatched']) == (40, 40, 1)
    assert '40 candidates for 40 prompts (1 rows without a reference' in winrate.describe(found)


def test_rates_at_equal_length_are_those_of_a_regression(model, files, tmp_path):
    found = winrate.win_rates(model, *files, str(tmp_path), **SETTINGS)
    own = model.score(PROMPTS, [f' yes {i}' for i in range(40)])
    others = model.score(PROMPTS, [[f' no {i}', ' never'] for i in range(40)])
    wins = np.array([[expit(a[:, None] - b[None]).mean() for b in both]
                     for a, both in zip(own.quantiles, others.quantiles, strict=True)]).ravel()
    longer = np.array([[1, len(f' yes {i}') - len(' never')] for i in range(40)]).ravel()
    feature = np.tanh(longer / longer.std())[:, None]
    fit = sklearn.linear_model.LogisticRegression(C=np.inf, tol=1e-12).fit(
        np.concatenate([feature, feature]), np.repeat([1, 0], 80),
        sample_weight=np.concatenate([wins, 1 - wins]))
    number = found['win_probability_controlled']
    assert number['value'] == pytest.approx(expit(fit.intercept_[0]), abs=1e-4)
    assert number['value'] != pytest.approx(found['win_probability']['value'], abs=1e-4)
    assert number['low'] < number['value'] < number['high']
    assert found['length'] == np.mean([len(f' yes {i}') for i in range(40)])
    assert 'at equal length win rate 0.' in winrate.describe(found)


def test_prompts_count_as_one_and_equal_differences_define_nothing():
    wins = [np.array([[0.2, 0.4]]), np.array([[0.9]])]
    found = winrate.length_controlled(wins, [np.zeros((1, 2)), np.zeros((1, 1))], None, 0.9)
    assert found == {'value': pytest.approx(0.6, abs=1e-5), 'low': None, 'high': None}
    weights = np.array([[2, 0], [1, 1]])
    found = winrate.length_controlled(wins, [np.full((1, 2), 4.0), np.full((1, 1), 3.0)], weights,
                                      0.9)
    assert found == {'value': None, 'low': None, 'high': None}
    # A resample without the prompt that is shorter leaves no interval.
    found = winrate.length_controlled(wins, [np.full((1, 2), 4.0), np.full((1, 1), -3.0)], weights,
                                      0.9)
    assert 0.2 < found['value'] < 0.9
    assert (found['low'], found['high']) == (None, None)


def test_scores_of_references_are_computed_once_for_a_model(model, files, tmp_path, monkeypatch):
    first = winrate.win_rates(model, *files, str(tmp_path), **SETTINGS)
    scored = []
    predict = RewardModel.predict
    monkeypatch.setattr(RewardModel, 'predict', lambda self, items: (
        scored.append(len(items)), predict(self, items))[1])
    second = winrate.win_rates(model, *files, str(tmp_path), **SETTINGS)
    assert scored == [40]  # the candidates
    assert (first.pop('cached'), second.pop('cached')) == (False, True)
    assert first == second
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: 1.1 * x, model.params))
    assert not winrate.win_rates(other, *files, str(tmp_path), **SETTINGS)['cached']
    assert scored[1:] == [40, 40]


def test_equal_responses_win_half(model, files, tmp_path):
    found = winrate.win_rates(model, files[1], files[1], str(tmp_path), **SETTINGS)
    assert found['win_rate']['value'] == pytest.approx(0.5)
    assert found['win_probability']['value'] == pytest.approx(0.5, abs=1e-6)


def test_errors_name_file_and_row(model, files, tmp_path):
    elsewhere = write(tmp_path / 'elsewhere.jsonl', [{'prompt': 'x', 'response': ' y'}])
    with pytest.raises(DataError, match='none of its 1 prompts is in'):
        winrate.win_rates(model, elsewhere, files[1], str(tmp_path), **SETTINGS)
    twice = write(tmp_path / 'twice.jsonl', [{'prompt': PROMPTS[0], 'response': ' y'}] * 2)
    with pytest.raises(DataError, match=r'twice.jsonl:2: the prompt stands in an earlier row'):
        winrate.win_rates(model, files[0], twice, str(tmp_path), **SETTINGS)
    few = write(tmp_path / 'few.jsonl', [{'prompt': p, 'response': ' y'} for p in PROMPTS[:9]])
    found = winrate.win_rates(model, few, files[1], '', **SETTINGS)
    assert found['prompts'] == 9
    for key in ('win_rate', 'win_probability'):
        assert (found[key]['low'], found[key]['high']) == (None, None)
        assert 0.0 <= found[key]['value'] <= 1.0
    text = winrate.describe(found)
    assert 'without an interval' in text
    assert 'fewer than 30 opening questions have no interval' in text


def test_a_pairwise_model_compares_both_orders(model, files, tmp_path):
    comparisons = [Comparison(str(i), p, (f' yes {i}', f' no {i}'), '')
                   for i, p in enumerate(PROMPTS)]
    pairwise_model = small_pairwise_model(comparisons)
    found = winrate.win_rates(pairwise_model, *files, str(tmp_path), **SETTINGS)
    outputs = np.array([  # of the candidate before the reference, and after it
        np.concatenate(pairwise_model.predict(pairwise_model.encode(
            [dataclasses.replace(c, responses=(c.responses[0], other))])[0]))[:, 0]
        for c in comparisons for other in (c.responses[1], ' never')])
    log_odds = outputs[:, 0] - outputs[:, 1]
    assert np.abs(log_odds).min() > 1e-4  # no ties
    assert found['win_rate']['value'] == pytest.approx(np.mean(log_odds > 0))
    assert found['win_probability']['value'] == pytest.approx(np.mean(expit(log_odds)), abs=1e-5)
    # The same response is ahead in both orders, if signs differ.
    assert found['flips']['value'] == pytest.approx(np.mean(outputs[:, 0] * outputs[:, 1] > 0))
    assert found['first_log_odds']['value'] == pytest.approx(outputs.sum(axis=1).mean(), abs=1e-4)
    assert found['win_rate']['low'] <= found['win_rate']['value'] <= found['win_rate']['high']
    assert (found['prompts'], found['candidates'], found['cached']) == (40, 40, False)
    assert not list(tmp_path.iterdir())
    text = winrate.describe(found)
    assert 'of both orders together; share of pairs decided otherwise' in text
    assert f'log odds of standing first {found["first_log_odds"]["value"]:.3f} [' in text


def test_win_probabilities_of_distributions_by_hand():
    # Two prompts of two responses and one of three references; atoms one by one.
    own = distributions.uniform_atoms(
        jnp.array([[[0.0, 2.0], [1.0, 1.0]], [[3.0, 5.0], [4.0, 4.0]]]))
    other = distributions.uniform_atoms(jnp.array([[[0.0, 1.0]] * 3, [[1.0, 2.0]] * 3]))
    loss = losses.LossConfig('distributional_bradley_terry')
    found = winrate.win_probabilities(loss, own, other)
    assert found.shape == (2, 2, 3)
    expected = [[expit(np.subtract.outer(a, b)).mean() for a in side] for side, b in
                (([[0, 2], [1, 1]], [0, 1]), ([[3, 5], [4, 4]], [1, 2]))]
    np.testing.assert_allclose(found, np.repeat(np.array(expected)[..., None], 3, 2), atol=1e-6)
    # By the means alone: 1 - .5 and 4 - 1.5.
    found = winrate.win_probabilities(losses.LossConfig('bradley_terry'), own, other)
    np.testing.assert_allclose(found[..., 0], expit([[0.5, 0.5], [2.5, 2.5]]), atol=1e-6)


def test_differences_over_prompts_are_paired():
    rng = np.random.default_rng(0)
    groups = [f'{i % 40}' for i in range(120)]
    weights = winrate.prompt_weights(groups, 200, 0)
    a = rng.normal(size=120)
    assert winrate.over_prompts(a + 0.1 - a, weights, 0.9)['low'] == pytest.approx(0.1)
    assert winrate.over_prompts(a, weights, 0.9)['low'] < a.mean()
    assert winrate.prompt_weights(groups[:29], 200, 0) is None
