"""Tests of the gold reward: the generator's replies, texts by hand, and ways to cheat."""

import numpy as np
import pytest

from qrm.data import demo, gold, phrases

COUNT = 2000
# All that one reply can gain for the average annotator, by hand from the weights of the types.
BEST = {
    # polite .3 * 1, answers 2.44 * 1.1, detail .94 * (.7 + .7)
    'helpful': (' I am happy to help! You can do it. First, stir for ten minutes. '
                'Then add a little salt.', 0.3 + 2.684 + 1.316),
    # gentle .48 * 1, refuses .83 * 1.2, alternative 1.28 * 1
    'harmless': (' I know this is hard for you. I will not help you do this. '
                 'You could tell the truth.', 0.48 + 0.996 + 1.28),
}


@pytest.fixture(scope='module', params=demo.WORKLOADS)
def workload(request):
    return request.param


def _mean(workload, text):
    return gold.judge(workload, text).reward.mean()


@pytest.mark.parametrize('split', ['train', 'test'])
def test_replies_of_the_generator_have_its_truth(workload, split):
    data = demo.generate(workload, split, COUNT, 0)
    for comparison, pair in zip(data.comparisons, data.truths, strict=True):
        for response, truth in zip(comparison.responses, pair, strict=True):
            found = gold.judge(workload, response)
            assert found.reward == truth  # to the last bit
            assert found.repeated == found.surplus == found.unread == (0, 0)


def test_all_sentences_of_the_generator_are_known_and_no_others(workload):
    seen = {part for c in demo.generate(workload, 'train', 5000, 0).comparisons
            for response in c.responses for part in gold._BETWEEN.split(response.strip())}
    assert seen == set(gold.sentences(workload))


def test_the_most_of_an_attribute_is_what_the_generator_has(workload):
    known, most = gold.sentences(workload), {}
    for c in demo.generate(workload, 'train', COUNT, 0).comparisons:
        for response in c.responses:
            attributes = [known[part].attribute
                          for part in gold._BETWEEN.split(response.strip())]
            for name in attributes:
                most[name] = max(most.get(name, 0), attributes.count(name))
    assert most == gold.MOST[workload]
    assert set(most) == set(phrases.SPECS[workload].weights)


def test_a_text_by_hand():
    # Read: a refusal (1.6, -.3, .6), said twice, and a sermon of 1.2 (.2, -1.4, -1.0). The rest,
    # 23 + 10 + 8 characters, costs .41.
    found = gold.judge('harmless', "I can't help with that.\n\n You should be  ashamed. "
                                   "I can't help with that. I like it! Human: a")
    assert found.attributes == {'refuses': 1.0, 'preaches': 1.2}
    assert found.counted == (2, 23 + 22)
    assert found.repeated == (1, 23)
    assert found.surplus == (0, 0)
    assert found.unread == (2, 10 + 8)
    np.testing.assert_allclose(found.reward.means, (1.84 - 0.41, -1.98 - 0.41, -0.6 - 0.41),
                               rtol=0, atol=1e-12)
    assert found.reward.sigma == 0.5
    assert found.reward.weights == (0.5, 0.3, 0.2)


def test_of_an_attribute_the_strongest_sentences_count_wherever_they_stand():
    weak, strong = 'Sure.', 'I am happy to help!'
    for text in (f'{weak} {strong}', f'{strong} {weak}'):
        found = gold.judge('helpful', text)
        assert found.attributes == {'polite': 1.0}
        assert found.surplus == (1, 5)
        assert found.reward.mean() == pytest.approx(0.3 - 0.05)
    # Harm is not hidden behind less of it: the worst of two ways to comply counts.
    found = gold.judge('harmless', 'You can try it, I suppose. Sure, most people never notice.')
    assert found.attributes == {'complies': 1.2}
    # Three points: two count.
    found = gold.judge('helpful', 'First, light comes from the sun. First, water it every day. '
                                  'Then pick a sunny spot.')
    assert found.attributes == {'detail': pytest.approx(1.4)}
    assert found.surplus == (1, 23)


def test_the_same_point_counts_once():
    found = gold.judge('helpful', 'First, stir for ten minutes. Then stir for ten minutes.')
    assert found.attributes == {'detail': 0.7}
    assert found.repeated.sentences == 1


@pytest.mark.parametrize('text', ['', ' ', '\n\n \t'])
def test_blank_responses_have_no_attribute(workload, text):
    found = gold.judge(workload, text)
    assert found.reward.means == (0.0, 0.0, 0.0)
    assert found.attributes == {}
    assert gold.shares([found]) == {
        'counted': 0.0, 'repeated': 0.0, 'surplus': 0.0, 'unread': 0.0, 'blank': 1.0}


def test_unknown_words_have_no_attribute_and_cost(workload):
    for text in ('zebra ' * 10, 'Sure.Sure.', 'sure.', 'um, I am happy to help!', 'First, .'):
        found = gold.judge(workload, text)
        size = len(' '.join(text.split()))
        assert found.attributes == {}
        assert found.unread == (1, size)
        assert found.reward.means == pytest.approx((-0.01 * size,) * 3)


def test_blanks_cost_nothing(workload):
    text, mean = BEST[workload]
    assert _mean(workload, text.replace(' ', '\n  ') + '\n\n') == pytest.approx(mean)


def test_nothing_that_is_appended_gains(workload):
    text, mean = BEST[workload]
    assert _mean(workload, text) == pytest.approx(mean)
    for more in [*gold.sentences(workload), 'zebra', text, '!', 'A. B. C.']:
        assert _mean(workload, f'{text} {more}') < mean - 0.005


def test_random_texts_gain_no_more_than_the_best_reply(workload):
    rng = np.random.default_rng(0)
    parts = [*gold.sentences(workload), 'zebra', 'Well.']
    for _ in range(2000):
        text = ' '.join(rng.choice(parts, rng.integers(1, 30)))
        assert _mean(workload, text) <= BEST[workload][1] + 1e-12


def test_repetition_costs_without_end(workload):
    text, mean = BEST[workload]
    size = sum(map(len, gold._BETWEEN.split(text.strip())))
    assert _mean(workload, text * 1000) == pytest.approx(mean - 0.01 * 999 * size)


@pytest.mark.parametrize(('text', 'share', 'price', 'counted'), [
    ('Sure. zebra', 5 / 10, 0.05, 'Sure.'), ('zebra', 1.0, 0.05, ''),
    ('Sure. Sure.', 0.0, 0.05, 'Sure.'), ('', 0.0, 0.0, ''),
    ('Sure. Sure. zebra', 5 / 15, 0.1, 'Sure.'), ('Good question!', 0.0, 0.0, 'Good question!'),
    # The stronger of two that are polite counts.
    ('Sure. Good question!', 0.0, 0.05, 'Good question!')])
def test_the_share_that_is_not_read_and_the_price_of_what_does_not_count(
        text, share, price, counted):
    found = gold.judge('helpful', text)
    assert found.unread_share == pytest.approx(share)
    assert found.price == pytest.approx(price)
    assert found.reward.mean() == pytest.approx(
        gold.judge('helpful', counted).reward.mean() - price)


def test_shares_of_characters():
    golds = [gold.judge('helpful', text) for text in ('Sure. Sure. zebra', '', 'Good question!')]
    # 5 and 14 counted, 5 repeated, 5 unread, of 29.
    assert gold.shares(golds) == pytest.approx({
        'counted': 19 / 29, 'repeated': 5 / 29, 'surplus': 0.0, 'unread': 5 / 29,
        'blank': 1 / 3})


def test_gold_rewards_make_a_population():
    golds = [gold.judge('helpful', text) for text in ('You can do it.', 'I like music.', 'zebra')]
    population = demo.population([one.reward for one in golds])
    np.testing.assert_allclose(population.mean(np.arange(3)), (2.684, 0.0, -0.05), atol=1e-12)
    assert population.quantile(np.array([2]), np.array([0.5]))[0, 0] == pytest.approx(-0.05)
    wins = population.win_probability(np.array([0, 1]), np.array([1, 1]))
    assert wins[0] > 0.99
    assert wins[1] == pytest.approx(0.5)


def test_an_unknown_workload_is_named():
    with pytest.raises(ValueError, match="unknown workload 'honest'.*helpful, harmless"):
        gold.judge('honest', 'Sure.')
