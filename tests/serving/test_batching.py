"""Micro-batches across clients: shapes, what shares a beginning, queue, failures."""

import asyncio
import dataclasses
import math

import numpy as np
import pytest

from qrm.data import demo
from qrm.data.encoded import Encoded
from qrm.data.packing import Layout
from qrm.data.rows import parse_row
from qrm.rewards import selection
from qrm.serving import batching
from qrm.serving.batching import Batcher, Dialogue, Overloaded, Score, Scorer, Step
from qrm.serving.functions import RewardFunction
from qrm.training import inference
from qrm.training.interruptions import NonFiniteLoss
from tests.helpers import small_reward_model

MEAN = selection.parse_rule('mean')


def dialogue(*ids, name='x'):
    """An encoded dialogue of these tokens."""
    ids = np.array(ids, np.int32)
    return Encoded(name, '', ids[:-1], (ids[-1:],), np.zeros((1, 1), np.float32),
                   np.full((1, 1), np.nan, np.float32))


def tokens(*dialogues):
    return [np.array(list(ids), np.int32) for ids in dialogues]


def sizes(layouts):
    return [(layout.rows, layout.length) for layout in layouts]


def test_shapes_are_few_and_hold_the_longest_dialogue():
    assert sizes(batching.shapes(200, 128)) == [(1, 64), (1, 96), (1, 128), (1, 192), (1, 224)]
    assert sizes(batching.shapes(64, 64)) == [(1, 64)]
    assert sizes(batching.shapes(600, 4096))[-3:] == [(1, 1024), (2, 1024), (4, 1024)]
    assert len(batching.shapes(8192, 1024)) == 15


def test_the_smallest_shape_that_holds_those_that_come_first_is_chosen():
    layouts = batching.shapes(256, 128)
    assert batching.choose([60], layouts, 128) == (layouts[0], [0])
    # 60 + 60 fill a batch of 128, and 50 does not fit, but 8 does.
    layout, chosen = batching.choose([60, 60, 50, 8], layouts, 128)
    assert (layout.length, chosen) == (128, [0, 1, 3])
    # One that is longer than a batch goes in the smallest shape that has a row for it.
    layout, chosen = batching.choose([150, 40, 60], layouts, 128)
    assert (layout.length, chosen) == (192, [0, 1])
    several = [Layout(100, 1, 8, 16), Layout(100, 2, 8, 16)]
    assert batching.choose([70, 70, 30, 31], several, 200) == (several[1], [0, 1, 2])


def test_dialogues_that_begin_alike_share_their_beginning():
    beginning = list(range(1, 41))
    dialogues = tokens([*beginning, 50, 51], [9, 8, 7], [*beginning, 60], [*beginning, 50, 52, 53])
    assert batching.share(dialogues, 100, 16) == [(46, [0, 2, 3]), (3, [1])]
    # As many as may be together, and as many tokens.
    assert batching.share(dialogues, 100, 2) == [(44, [0, 3]), (3, [1]), (41, [2])]
    assert batching.share(dialogues, 44, 16) == [(44, [0, 3]), (3, [1]), (41, [2])]
    assert batching.share(dialogues, 100, 1) == [(42, [0]), (3, [1]), (41, [2]), (43, [3])]


def test_a_short_beginning_in_common_keeps_no_one_from_a_longer_one():
    long = list(range(1, 31))
    dialogues = tokens([1, 2, 3, *range(100, 120)], *([*long, k] for k in range(60, 64)))
    assert batching.share(dialogues, 200, 16) == [(23, [0]), (34, [1, 2, 3, 4])]


def test_equal_dialogues_are_computed_once_but_for_their_last_token():
    assert batching.share(tokens(*[range(1, 21)] * 3), 100, 16) == [(19 + 3, [0, 1, 2])]


@pytest.fixture(scope='module')
def comparisons():
    return demo.generate('helpful', 'train', 6, 0).comparisons


@pytest.fixture(scope='module')
def model(comparisons):
    model = small_reward_model(comparisons)
    return dataclasses.replace(model, reading=dataclasses.replace(model.reading, max_length=96))


@pytest.fixture(scope='module')
def scorer(model):
    scorer = Scorer(model, 128)
    assert scorer.warm_up() > 0.0
    return scorer


@pytest.fixture(scope='module')
def waiting(model, comparisons):
    """Two dialogues of each comparison, one after the other."""
    single = [parse_row({'prompt': c.prompt, 'response': response}, 'row', literal=True)
              for c in comparisons for response in c.responses]
    return [Dialogue(item, MEAN) for item in model.encode(single)[0]]


def all_scores(scorer, waiting):
    """Scores in order, by as many steps as it takes, and how many that were."""
    left, found, steps = list(enumerate(waiting)), {}, 0
    while left:
        step = scorer.step([one for _, one in left])
        assert 0 in step.found  # the first is always served
        assert step.packed <= step.computed
        found |= {left[i][0]: score for i, score in step.found.items()}
        left = [entry for i, entry in enumerate(left) if i not in step.found]
        steps += 1
    return [found[i] for i in range(len(waiting))], steps


def test_a_score_does_not_depend_on_what_else_is_asked(model, scorer, waiting, comparisons):
    expected = np.concatenate(model.score(
        [c.prompt for c in comparisons], [list(c.responses) for c in comparisons]).rewards)
    scores, steps = all_scores(scorer, waiting)
    assert steps < len(waiting)
    np.testing.assert_allclose([score.reward for score in scores], expected, atol=1e-4)
    for order in ([3, 0, 7], [5], list(range(11, -1, -1)), [2, 2, 2, 8]):
        again, _ = all_scores(scorer, [waiting[i] for i in order])
        np.testing.assert_allclose([score.reward for score in again], expected[order], atol=1e-5)
        np.testing.assert_allclose([score.quantiles for score in again],
                                   [scores[i].quantiles for i in order], atol=1e-5)


def test_rules_share_a_batch(scorer, waiting):
    rules = [selection.parse_rule(name) for name in ('mean', 'quantile:0.05', 'cvar:0.1', 'cvar:1')]
    found, _ = all_scores(scorer, [Dialogue(waiting[0].encoded, rule) for rule in rules])
    quantiles = np.sort(found[0].quantiles)
    # Of ten quantiles the lowest is that at .05, and a tenth of the mass.
    np.testing.assert_allclose([score.reward for score in found],
                               [quantiles.mean(), quantiles[0], quantiles[0], quantiles.mean()],
                               atol=1e-5)
    assert found[0].std == pytest.approx(quantiles.std(), abs=1e-5)


def test_samples_are_those_of_a_reward_function_in_any_company(model, scorer, waiting, comparisons):
    rule = selection.parse_rule('sample:3')
    expected = RewardFunction(model, rule)(
        *zip(*((c.prompt, response) for c in comparisons for response in c.responses), strict=True))
    for order in (list(range(12)), [7], [11, 2, 2, 5]):
        found, _ = all_scores(scorer, [waiting[i]._replace(rule=rule) for i in order])
        np.testing.assert_allclose([score.reward for score in found],
                                   [expected[i] for i in order], atol=1e-4)
        # One of the ten quantiles.
        assert all(np.abs(np.array(score.quantiles) - score.reward).min() < 1e-5 for score in found)


def test_once_warm_nothing_is_compiled(scorer, waiting):
    compiled = inference._apply._cache_size()
    assert compiled >= len(scorer.layouts)
    for count in range(1, len(waiting)):
        scorer.step(waiting[:count])
    assert inference._apply._cache_size() == compiled


def test_one_that_fails_takes_nobody_along(model, waiting, monkeypatch):
    bad = dataclasses.replace(waiting[1].encoded, id='bad')
    expected = [score.reward for score in all_scores(Scorer(model, 128), waiting[:3])[0]]
    predict = type(model).predict

    def failing(self, encoded, layouts=()):
        if any('bad' in item.id for item in encoded):
            raise NonFiniteLoss('bad: a reward that is not finite')
        return predict(self, encoded, layouts)

    monkeypatch.setattr(type(model), 'predict', failing)
    found = all_scores(Scorer(model, 128), [waiting[0], Dialogue(bad, MEAN), waiting[2]])[0]
    assert isinstance(found[1], NonFiniteLoss)
    np.testing.assert_allclose([found[0].reward, found[2].reward], [expected[0], expected[2]],
                               atol=1e-5)


def test_a_reward_that_is_not_finite_by_its_rule_is_no_score(model, waiting, monkeypatch):
    monkeypatch.setattr(selection, 'reward', lambda *given: np.full(64, np.inf))
    step = Scorer(model, 128).step([waiting[0]._replace(rule=selection.parse_rule('cvar:0.2'))])
    assert isinstance(step.found[0], NonFiniteLoss)


# --- the queue -----------------------------------------------------------------------------------


def answered(steps, *calls, most=100, before=lambda batcher: None):
    """What the calls of a batcher give, all at once, with `steps` in place of a model."""

    async def run():
        batcher = Batcher(steps, most)
        calling = [asyncio.ensure_future(batcher.scores([Dialogue(item, MEAN) for item in items]))
                   for items in calls]
        await asyncio.sleep(0)
        before(batcher)
        working = asyncio.create_task(batcher.run())
        found = await asyncio.gather(*calling, return_exceptions=True)
        working.cancel()
        assert batcher.waiting == 0
        return found

    return asyncio.run(run())


def score_of(item):
    return Score(float(item.prompt[0]), 0.0, [float(item.prompt[0])])


def by_two(waiting):
    """Scores the first and, if there is one, the last."""
    return Step({i: score_of(waiting[i].encoded) for i in {0, len(waiting) - 1}}, 1, 1)


def test_each_client_gets_its_own_scores_in_its_order():
    calls = [[dialogue(10 * k + j, 0) for j in range(k)] for k in range(1, 6)]
    found = answered(by_two, *calls)
    assert [[score.reward for score in one] for one in found] == [
        [10.0 * k + j for j in range(k)] for k in range(1, 6)]


def test_too_much_is_refused_with_a_time_to_come_back():
    calls = [[dialogue(*range(1, 61))], [dialogue(*range(1, 51))], [dialogue(*range(1, 102))]]
    first, second, third = answered(by_two, *calls)
    assert first[0].reward == 1.0
    assert isinstance(second, Overloaded)
    assert str(second) == '60 tokens wait, expected at most 100 with 50 more'
    assert second.seconds == 1.0
    assert isinstance(third, Overloaded)
    assert math.isinf(third.seconds)


def test_what_fails_is_told_to_the_one_who_asked():

    def step(waiting):
        if waiting[0].encoded.id == 'bad':
            return Step({0: NonFiniteLoss('bad: a reward that is not finite')}, 1, 1)
        return Step({0: score_of(waiting[0].encoded)}, 1, 1)

    good, bad = answered(step, [dialogue(1, 0)], [dialogue(2, 0), dialogue(3, 0, name='bad')])
    assert good[0].reward == 1.0
    assert isinstance(bad, NonFiniteLoss)

    def broken(waiting):
        raise RuntimeError('broken')

    [found] = answered(broken, [dialogue(1, 0)])
    assert isinstance(found, RuntimeError)


def test_what_was_cancelled_is_not_computed():
    seen = []

    def step(waiting):
        seen.extend(int(one.encoded.prompt[0]) for one in waiting[:1])
        return by_two(waiting)

    def cancel(batcher):
        for one, future in batcher._queue:
            if one.encoded.prompt[0] == 1:
                future.cancel()

    first, second = answered(step, [dialogue(1, 0)], [dialogue(2, 0)], before=cancel)
    assert isinstance(first, asyncio.CancelledError)
    assert second[0].reward == 2.0
    assert seen == [2]
