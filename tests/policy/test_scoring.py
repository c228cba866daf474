"""Rewards of any source by one interface, and who says what is better."""

import dataclasses
import http.server
import json
import threading

import numpy as np
import pytest

from qrm.data import gold
from qrm.data.comparisons import Comparison, DataError, text_of
from qrm.models.network import params_digest
from qrm.policy import scoring
from qrm.rewards.heads import HeadConfig
from qrm.rewards.selection import Rule
from qrm.serving import functions
from qrm.training import reward_model
from qrm.training.schema import ConfigError
from tests.helpers import init, small_pairwise_model, small_reward_model

PROMPTS = ['a', 'b']
REPLY = 'I am happy to help.'


def lengths(prompts, completions):
    return [len(prompt + text_of(one))
            for prompt, one in zip(prompts, completions, strict=True)]


def too_few(prompts, completions):
    return [1.0]


def infinite(prompts, completions):
    return [float('inf')] * len(completions)


def failing(prompts, completions):
    raise KeyError('nothing\nhere')


def dividing(prompts, completions):
    return [1 / len(completion) for completion in ('', *completions)]


def huge(prompts, completions):
    return [10**400] * len(completions)


def none(prompts, completions):
    return [None] * len(completions)


def test_a_function_by_its_name():
    found = scoring.load('tests.policy.test_scoring:lengths')(PROMPTS, ['xyz', ''])
    np.testing.assert_array_equal(found.rewards, [4.0, 1.0])
    np.testing.assert_array_equal(found.stds, [0.0, 0.0])


@pytest.mark.parametrize(('name', 'message'), [
    ('too_few', '1 rewards of 2 completions'), ('infinite', 'reward inf of completion 0'),
    ('failing', r"the reward function failed \(KeyError: 'nothing"),
    ('none', 'expected a list of numbers'), ('huge', 'expected a list of numbers'),
    ('dividing', r'the reward function failed \(ZeroDivisionError: division by zero'),
])
def test_rewards_that_are_none_are_told_in_one_line(name, message):
    with pytest.raises(DataError, match=message) as caught:
        scoring.load(f'tests.policy.test_scoring:{name}')(PROMPTS, ['x', 'y'])
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('source', 'message'), [
    ('tests.policy.test_scoring:other', 'no such function'),
    ('no_such_module:f', 'no such function'),
    ('tests.policy.test_scoring:PROMPTS', 'got list, expected a function'),
])
def test_functions_that_do_not_exist_are_told_in_one_line(source, message):
    with pytest.raises(ConfigError, match=message) as caught:
        scoring.load(source)
    assert '\n' not in str(caught.value)


def test_the_gold_reward_of_the_demo():
    found = scoring.load('gold', workload='helpful')(PROMPTS, ['', REPLY])
    expected = [gold.judge('helpful', text).reward.mean() for text in ('', REPLY)]
    np.testing.assert_array_equal(found.rewards, expected)
    with pytest.raises(ConfigError, match="'gold' of workload 'other'"):
        scoring.load('gold', workload='other')
    with pytest.raises(ConfigError, match="rule='cvar:0.2' .* only reward models have others"):
        scoring.load('gold', rule='cvar:0.2', workload='helpful')


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with lengths of queries, as OpenRLHF asks."""

    def do_POST(self):
        path = self.path.partition('?')[0]
        if path == '/private' and self.headers['Authorization'] != 'Bearer abc':
            self.send_error(401)
            return
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        values = {'/rewards': {'rewards': [len(query) for query in asked['query']]},
                  '/private': {'rewards': [1.0]}, '/other': {'scores': []}}[path]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(values).encode())

    def log_message(self, *args):
        pass


def test_a_server(monkeypatch):
    monkeypatch.setenv('HTTP_PROXY', 'http://127.0.0.1:9')  # which does not reach this machine
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        found = scoring.load(f'{address}/rewards')
        np.testing.assert_array_equal(found(PROMPTS, ['xyz', '']).rewards, [4.0, 1.0])
        with pytest.raises(DataError, match='chats, expected texts'):
            found([[{'role': 'user', 'content': 'a'}]], [[{'role': 'assistant', 'content': 'b'}]])
        with pytest.raises(DataError, match="no rewards .*'rewards'"):
            scoring.load(f'{address}/other')(PROMPTS, ['x', 'y'])
        with pytest.raises(DataError, match=r'/private: no rewards \(status 401\)') as caught:
            scoring.load(f'{address}/private?secret=1')(PROMPTS[:1], ['x'])
        assert 'secret' not in str(caught.value)
        monkeypatch.setenv('QRM_TEST_TOKEN', 'abc')
        private = scoring.load(f'{address}/private', token_variable='QRM_TEST_TOKEN')
        np.testing.assert_array_equal(private(PROMPTS[:1], ['x']).rewards, [1.0])
        monkeypatch.delenv('QRM_TEST_TOKEN')
        with pytest.raises(ConfigError, match='variable QRM_TEST_TOKEN: not set, expected a token'):
            scoring.load(f'{address}/private', token_variable='QRM_TEST_TOKEN')
        server.shutdown()
    with pytest.raises(DataError, match='no rewards'):
        found(PROMPTS, ['x', 'y'])


def comparisons(*responses):
    return [Comparison(str(i), prompt, own, prompt)
            for i, (prompt, own) in enumerate(zip(PROMPTS, responses, strict=True))]


OWN, OTHERS = comparisons(('xx', 'yyyy'), ('', 'z')), comparisons(('uuu',), ('z',))


def wins(judge, own, others):
    """Of each answer [C, K], the mean over those of the other side."""
    found = judge.wins(judge.read(own), judge.read(others))
    assert found.shape == (len(own), len(own[0].responses), len(others[0].responses))
    return found.mean(axis=-1)


def test_the_reward_itself_as_judge_halves_ties():
    reward = scoring.load('tests.policy.test_scoring:lengths')
    judge = scoring.load_judge('', workload='', reward=reward)
    np.testing.assert_array_equal(wins(judge, OWN, OTHERS), [[0.0, 1.0], [0.0, 0.5]])
    np.testing.assert_array_equal(judge.read(OWN).rewards, [[3.0, 5.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match='neither a judge nor a reward'):
        scoring.load_judge('', workload='')


def test_gold_and_models_as_judges(monkeypatch, capsys):
    reward = scoring.load('tests.policy.test_scoring:lengths')
    judge = scoring.load_judge('gold', workload='helpful', reward=reward)
    own, others = comparisons((REPLY, ''), ('', 'zzz')), comparisons(('', REPLY), ('', ''))
    found = judge.wins(judge.read(own), judge.read(others))
    # Each pair in closed form.
    for c, (mine, theirs) in enumerate(zip(own, others, strict=True)):
        for k, one in enumerate(mine.responses):
            truth = gold.judge('helpful', one).reward
            assert judge.read(own).rewards[c, k] == truth.mean()
            for j, other in enumerate(theirs.responses):
                assert found[c, k, j] == pytest.approx(
                    truth.win_probability(gold.judge('helpful', other).reward))
    assert found[0, 0, 0] != pytest.approx(0.5)
    model = small_reward_model([*OWN, *OTHERS])
    monkeypatch.setattr(reward_model, 'load', lambda path, raw: model)
    judge = scoring.load_judge('somewhere', workload='', reward=reward)
    found = wins(judge, OWN, OTHERS)
    assert found[1, 1] == pytest.approx(0.5, abs=1e-5)  # the same text
    np.testing.assert_allclose(wins(judge, OTHERS, comparisons(('xx',), ('',)))[:, 0],
                               1 - found[:, 0], atol=1e-5)
    means = model.score(*[[getattr(one, name) for one in OWN] for name in ('prompt', 'responses')])
    np.testing.assert_allclose(judge.read(OWN).rewards, means.rewards, atol=1e-5)
    same = reward._replace(weights=params_digest(model.params))
    for own in (same, reward._replace(source='somewhere')):
        with pytest.raises(ConfigError, match="judge='somewhere' is what is optimised"):
            scoring.load_judge('somewhere', workload='', reward=own)
    # What began as the same random weights is no judge of another mind.
    monkeypatch.setattr(scoring, 'seed_of', {'somewhere': 3, 'other': 3, 'third': 4}.get)
    scoring.load_judge('somewhere', workload='', reward=reward._replace(source='third'))
    assert 'note' not in capsys.readouterr().out
    scoring.load_judge('somewhere', workload='', reward=reward._replace(source='other'))
    assert 'began with the random weights of one seed, 3' in capsys.readouterr().out


def longer(prompts, firsts, seconds):
    """The longer one with .9, first or second, and what stands first by .2 more; not of 'z'."""
    return [None if 'z' in (one, other) else
            min(1.0, 0.5 + 0.4 * np.sign(len(one) - len(other)) + 0.1)
            for one, other in zip(firsts, seconds, strict=True)]


LONGER = 'function:tests.policy.test_scoring:longer'


def test_a_judge_of_pairs_is_asked_in_both_orders(capsys):
    reward = scoring.load('tests.policy.test_scoring:lengths')
    judge = scoring.load_judge(LONGER, workload='', reward=reward)
    assert not judge.scores
    assert judge.digest
    # (1.0 + 1 - .2) / 2 = .9; equal lengths .6 both ways, which is .5.
    found = judge.wins(judge.read(OWN), judge.read(comparisons(('xxx', 'u'), ('', 'zz'))))
    np.testing.assert_allclose(found, [[[0.1, 0.9], [0.9, 0.9]], [[0.5, 0.1], [0.5, 0.5]]])
    assert capsys.readouterr().out == (
        'tests.policy.test_scoring:longer: no answer to 4 of 16 questions, which counts as '
        'undecided (mostly: none by the function)\n')
    for source in (LONGER, 'tests.policy.test_scoring:lengths'):
        with pytest.raises(ConfigError, match=f"judge='{source}' is what is optimised"):
            scoring.load_judge(source, workload='', reward=scoring.load(source))
    renamed = scoring.load(LONGER)._replace(source='another name')
    with pytest.raises(ConfigError, match='is what is optimised'):
        scoring.load_judge(LONGER, workload='', reward=renamed)
    with pytest.raises(DataError, match='function:no_such:f: no such function'):
        scoring.load_judge('function:no_such:f', workload='')


def test_a_judge_of_pairs_rewards_what_it_prefers_to_the_others():
    reward = scoring.load(LONGER)
    assert reward.compares
    found = reward(['a', 'b', 'a', 'b', 'a'], ['xx', 'x', 'yyyy', 'y', ''])
    np.testing.assert_allclose(found.rewards, [(0.9 + 0.1) / 2, 0.5, 0.9, 0.5, 0.1])
    np.testing.assert_array_equal(found.stds, 0.0)
    chats = [[{'role': 'user', 'content': 'a'}]] * 2
    answers = [[{'role': 'assistant', 'content': text}] for text in ('xx', 'x')]
    assert scoring.load('function:tests.policy.test_scoring:longer_answer')(
        chats, answers).rewards.tolist() == [1.0, 0.0]
    with pytest.raises(DataError, match=r'prompts\[1\]: one completion, expected several'):
        reward(['a', 'b', 'a'], ['x', 'y', 'z'])
    with pytest.raises(ConfigError, match="rule='cvar:0.2' .* only reward models have others"):
        scoring.load(LONGER, rule='cvar:0.2')
    for source in (LONGER, 'gold'):
        with pytest.raises(ConfigError, match='only servers are told a token'):
            scoring.load(source, token_variable='HOME', workload='helpful')
    found = reward.beside(*(comparisons(*texts) for texts in (
        (('xx', 'yyyy'), ('', 'x')), (('xxx', 'x'), ('', 'x')))))
    np.testing.assert_allclose(found.rewards, [[0.5, 0.9], [0.3, 0.7]])
    assert found.disagreements is None
    lengths_of = scoring.load('tests.policy.test_scoring:lengths')
    np.testing.assert_array_equal(lengths_of.beside(OWN, OTHERS).rewards, [[3.0, 5.0], [1.0, 2.0]])
    with pytest.raises(ConfigError, match='expected a judge'):
        scoring.load_judge('', workload='', reward=reward)


@pytest.mark.parametrize('source', [
    'gold:helpful', 'reward-model:somewhere', 'me=language-model:somewhere', 'me=gold:helpful'])
def test_judges_of_other_kinds_are_told_how_they_are_called_here(source):
    with pytest.raises(ConfigError, match="config.reward.source=.*, expected 'language-model:...'"):
        scoring.load(source, workload='helpful')
    with pytest.raises(ConfigError, match='config.reward.judge=.*the path of a reward model, or'):
        scoring.load_judge(source, workload='helpful')


def test_folders_of_rewards_are_known_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'gold').mkdir()
    monkeypatch.chdir(tmp_path)
    found = scoring.absolute({'source': 'model', 'judge': 'language-model:model'})
    assert found == {'source': f'{tmp_path}/model', 'judge': f'language-model:{tmp_path}/model'}
    same = {'source': 'gold', 'judge': 'language-model:org/name'}
    assert scoring.absolute(same) == same


def longer_answer(prompts, firsts, seconds):
    return [float(len(text_of(one)) > len(text_of(other)))
            for one, other in zip(firsts, seconds, strict=True)]


def test_gold_tells_what_it_could_not_read_and_what_that_costs():
    judge = scoring.load_judge('gold', workload='helpful')
    found = judge.read(comparisons(('Sure. zebra', ''), ('Good question!', 'zebra')))
    np.testing.assert_allclose(found.unread, [[0.5, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(found.price, [[0.05, 0.0], [0.0, 0.05]])


def test_members_of_an_ensemble_disagree():
    model = small_reward_model([*OWN, *OTHERS])
    alone = scoring.Reward('one', functions.RewardFunction(model, Rule('mean')), predicts=True)
    assert alone(*scoring.flat(OWN)).disagreements is None
    network = dataclasses.replace(model.network, head=HeadConfig('scalar', members=3))
    model = dataclasses.replace(model, network=network, params=init(network))
    reward = scoring.Reward('three', functions.RewardFunction(model, Rule('mean')), predicts=True)
    found = reward(*scoring.flat(OWN))
    means = model.read(np.concatenate(model.predict(model.encode(OWN)[0]))).members.mean
    np.testing.assert_allclose(found.disagreements, np.std(np.float64(means), axis=-1), atol=1e-6)
    assert (found.disagreements > 0).all()
    best = found.reshape(2, 2).pick((np.arange(2), np.array([1, 0])))
    np.testing.assert_array_equal(best.disagreements, found.disagreements[[1, 2]])


def test_a_rule_that_samples_draws_anew_by_number():
    model = small_reward_model([*OWN, *OTHERS])
    reward = scoring.Reward('one', functions.RewardFunction(model, Rule('sample', 3)),
                            predicts=True)
    first, again, other = (reward(*scoring.flat(OWN), draw=draw).rewards for draw in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.abs(first - other) > 1e-6).any()


def test_a_reward_model_tells_of_its_spread_and_a_pairwise_one_needs_a_judge(monkeypatch):
    model = small_reward_model([*OWN, *OTHERS])
    monkeypatch.setattr(reward_model, 'load', lambda path: model)
    found = scoring.load('somewhere', rule='quantile:0.1')(*scoring.flat(OWN))
    function = functions.reward('somewhere', 'quantile:0.1')
    np.testing.assert_allclose(found.rewards, function(*scoring.flat(OWN)))
    assert (found.stds > 0).all()
    with pytest.raises(ConfigError, match='config.reward: .*median'):
        scoring.load('somewhere', rule='median')
    pairwise = small_pairwise_model([*OWN, *OTHERS])
    monkeypatch.setattr(reward_model, 'load', lambda path: pairwise)
    reward = scoring.load('somewhere')
    assert reward.compares
    with pytest.raises(ConfigError, match='expected a judge'):
        scoring.load_judge('', workload='', reward=reward)
    monkeypatch.setattr(reward_model, 'load', lambda path, raw: pairwise)
    with pytest.raises(DataError, match='somewhere: a pairwise model compares two responses'):
        scoring.load_judge('somewhere', workload='')
