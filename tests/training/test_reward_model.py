"""Scores do not depend on order, neighbours or row length; workdirs load as they were trained."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import qrm
from qrm.data import demo, tokens
from qrm.data.comparisons import DataError
from qrm.data.tokens import Reading
from qrm.models import families
from qrm.models.network import RewardNetwork
from qrm.rewards import losses
from qrm.rewards.heads import HeadConfig
from qrm.rewards.normalisation import Normalisation
from qrm.training import reward_model as qrm_model
from qrm.training import workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.reward_model import RewardModel
from tests.helpers import small_pairwise_model


@pytest.fixture(scope='module')
def comparisons():
    return demo.generate('helpful', 'train', 60, 0).comparisons


@pytest.fixture(scope='module')
def model(comparisons):
    tokenizer = tokens.train_tokenizer(tokens.texts_of(comparisons), 300)
    settings = {'model_type': 'gpt2', 'vocab_size': 300, 'n_positions': 200, 'n_embd': 32,
                'n_layer': 2, 'n_head': 2, 'n_inner': 64}
    network = RewardNetwork(families.architecture(settings), HeadConfig('quantile', 10))
    params = jax.jit(network.init)(jax.random.key(0))
    # Larger than at the start, so that rewards depend on the whole text.
    params = jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, params)
    return RewardModel(network, settings, params, tokenizer, losses.LossConfig('bradley_terry'),
                       Reading(200), row_length=128)


def texts(comparisons):
    return [c.prompt for c in comparisons], [list(c.responses) for c in comparisons]


@pytest.fixture(scope='module')
def reference(model, comparisons):
    return model.score(*texts(comparisons))


def test_scores_have_the_shape_of_what_was_given(model, reference):
    assert len(reference.rewards) == len(reference.quantiles) == 60
    assert reference.rewards[0].shape == (2,)
    assert reference.quantiles[0].shape == (2, 10)
    np.testing.assert_allclose(reference.rewards[0], reference.quantiles[0].mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(model.taus, (np.arange(10) + 0.5) / 10, rtol=1e-6)
    assert np.std(np.concatenate(reference.rewards)) > 0.05


def test_scores_do_not_depend_on_order_or_neighbours(model, comparisons, reference):
    order = np.random.default_rng(0).permutation(60)
    prompts, responses = texts([comparisons[i] for i in order])
    shuffled = model.score(prompts, responses)
    for place, i in enumerate(order):
        np.testing.assert_allclose(shuffled.quantiles[place], reference.quantiles[i], atol=1e-4)
    for i in (0, 7, 30):
        prompts, responses = texts(comparisons[i:i + 1])
        alone = model.score(prompts, [responses[0][1]])
        np.testing.assert_allclose(alone.quantiles[0], reference.quantiles[i][1], atol=1e-4)
        assert isinstance(alone.rewards[0], float)


@pytest.mark.parametrize('row_length', [1, 50, 200])
def test_scores_do_not_depend_on_the_row_length(model, comparisons, reference, row_length):
    other = dataclasses.replace(model, row_length=row_length).score(*texts(comparisons))
    for a, b in zip(other.quantiles, reference.quantiles, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_many_responses_score_as_each_alone(model, comparisons):
    prompt = comparisons[0].prompt
    responses = [r for c in comparisons[:20] for r in c.responses]
    together = model.score([prompt], [responses])
    apart = model.score([prompt] * 40, responses)
    np.testing.assert_allclose(together.rewards[0], apart.rewards, atol=1e-4)


def test_a_long_dialogue_is_cut_by_itself(model, comparisons):
    long = comparisons[0].prompt * 9
    both = model.score([long], [[' yes.', ' no, ' + comparisons[1].responses[0]]])
    alone = model.score([long, long], [' yes.', ' no, ' + comparisons[1].responses[0]])
    np.testing.assert_allclose(both.rewards[0], alone.rewards, atol=1e-4)


def test_responses_are_continuations_whatever_they_begin_with(model):
    """To repeat the question is not for free: an optimised policy would learn to."""
    assert len(model.score(['a'], ['{"role": "user", "content": "x"}']).rewards) == 1
    prompt = 'What is the answer to it?'
    found = model.score([prompt], [[f'{prompt} No.', ' No.']])
    again = model.score([prompt + prompt], [' No.'])
    assert found.rewards[0][0] == pytest.approx(again.rewards[0], abs=1e-5)
    assert abs(found.rewards[0][0] - found.rewards[0][1]) > 1e-3


def test_prompts_and_responses_must_match(model):
    with pytest.raises(DataError, match='2 prompts and 1 lists'):
        model.score(['a', 'b'], [' c'])
    with pytest.raises(DataError, match=r"prompts\[0\] field 'responses\[1\]'"):
        model.score(['a'], [[' b', None]])
    with pytest.raises(DataError, match=r"prompts\[0\] field 'responses'"):
        model.score(['a'], [[]])


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(DataError, match='no such folder'):
        qrm.load(str(tmp_path / 'nothing'))
    with pytest.raises(DataError, match='neither the folder of a run'):
        qrm.load(str(tmp_path))
    (tmp_path / 'model.json').write_text('{')
    with pytest.raises(workdir.WorkdirError, match='not JSON'):
        qrm.load(str(tmp_path))


@pytest.mark.parametrize('change', [
    {'network': {'head': {'name': 'quantile', 'annotators': 0}}}, {'row_length': None}])
def test_a_model_of_another_version_is_named(model, tmp_path, change):
    qrm_model.describe(str(tmp_path), model)
    values = json.loads((tmp_path / 'model.json').read_text())
    for key, value in change.items():
        if value is None:
            del values[key]
        else:
            values[key] |= value
    (tmp_path / 'model.json').write_text(json.dumps(values))
    with pytest.raises(workdir.WorkdirError, match=r'model\.json: not a model of this version'):
        qrm.load(str(tmp_path))


@pytest.fixture
def saved(model, tmp_path):
    """The folder of a run with checkpoints 1 and 2, of which the first has the lower loss."""
    qrm_model.describe(str(tmp_path), model)
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        for number, loss in ((1, 0.5), (2, 0.6)):
            params = jax.tree.map(lambda leaf, n=number: n * leaf, model.params)
            checkpoints.save(number, params, {'step': np.int32(number)}, {}, loss)
    return tmp_path


def test_a_checkpoint_that_a_run_deletes_is_chosen_anew(saved, monkeypatch):
    """A run that goes on deletes old checkpoints while its model is being loaded."""
    restore = Checkpoints._restore

    def vanish(self, number, *rest):
        if number == 1:
            shutil.rmtree(saved / 'checkpoints' / '1')
        return restore(self, number, *rest)

    first, second = qrm.load(str(saved)), qrm.load(str(saved), step=2)
    monkeypatch.setattr(Checkpoints, '_restore', vanish)
    np.testing.assert_allclose(second.params['head']['kernel'], 2 * first.params['head']['kernel'])
    jax.tree.map(np.testing.assert_array_equal, qrm.load(str(saved)).params, second.params)
    with pytest.raises(workdir.WorkdirError, match=r'no checkpoint 1; there are \[2\], expected'):
        qrm.load(str(saved), step=1)


def test_a_checkpoint_that_is_asked_for_and_vanishes_is_named(saved, monkeypatch):
    def vanish(self, number, *rest):
        shutil.rmtree(saved / 'checkpoints' / str(number))
        raise FileNotFoundError('gone')

    monkeypatch.setattr(Checkpoints, '_restore', vanish)
    with pytest.raises(workdir.WorkdirError, match='no checkpoint 1'):
        qrm.load(str(saved), step=1)


def test_checkpoints_of_another_shape_or_not_finite_are_named(model, saved):
    values = json.loads((saved / 'model.json').read_text())
    values['network']['head']['num_quantiles'] = 7
    (saved / 'model.json').write_text(json.dumps(values))
    with pytest.raises(workdir.WorkdirError, match='describes other parameters than checkpoint 1'):
        qrm.load(str(saved))
    values['network']['head']['num_quantiles'] = 10
    (saved / 'model.json').write_text(json.dumps(values))
    params = model.params | {'head': jax.tree.map(lambda x: x * np.nan, model.params['head'])}
    with Checkpoints(str(saved), keep=2) as checkpoints:
        checkpoints.save(3, params, {'step': np.int32(3)}, {}, None)
    with pytest.raises(workdir.WorkdirError, match=r'checkpoint 3: head/kernel is not finite'):
        qrm.load(str(saved), step='last')


# Models that read two responses together.


@pytest.fixture(scope='module')
def pairwise_model(comparisons):
    return small_pairwise_model(comparisons)


@pytest.fixture(scope='module')
def many(comparisons):
    """Three responses to each of six prompts."""
    return [dataclasses.replace(c, responses=(*c.responses, comparisons[i + 1].responses[0]),
                                ranks=None, preference=None, ratings=None)
            for i, c in enumerate(comparisons[:6])]


def test_orders_have_the_outputs_that_each_has_alone(pairwise_model, many):
    packed, cut = pairwise_model.encode(many)
    alone = [dataclasses.replace(
        item, prompt=item.prompt[:0], responses=(np.concatenate([item.prompt, response]),),
        preference=np.zeros((1, 1), np.float32), ratings=item.ratings[:1], candidates=None)
        for item in packed for response in item.responses]
    outputs = np.concatenate(pairwise_model.predict(packed))
    assert cut == 0
    assert outputs.shape == (6 * 6, 1)
    assert np.std(outputs) > 0.01
    np.testing.assert_allclose(outputs, np.concatenate(pairwise_model.predict(alone)),
                               rtol=1e-4, atol=1e-5)


def test_win_probabilities_move_with_the_responses(pairwise_model, many):
    prompts, responses = texts(many)
    wins = pairwise_model.compare(prompts, responses)
    moved = pairwise_model.compare(prompts, [[r[2], r[0], r[1]] for r in responses])
    for own, other in zip(wins, moved, strict=True):
        assert own.shape == (3, 3)
        np.testing.assert_allclose(own + own.T, 1.0)
        assert np.abs(own - 0.5).max() > 1e-3
        np.testing.assert_allclose(other, own[np.ix_([2, 0, 1], [2, 0, 1])], atol=1e-5)
    same = pairwise_model.compare(prompts[:1], [[' yes', ' yes']])
    np.testing.assert_array_equal(same[0], 0.5)


def test_what_scores_alone_and_what_does_not(model, pairwise_model):
    with pytest.raises(DataError, match='a pairwise model compares two responses and scores none '
                                        'alone'):
        pairwise_model.score(['a'], [[' b', ' c']])
    with pytest.raises(DataError, match='with the quantile head scores each response alone'):
        model.compare(['a'], [[' b', ' c']])
    with pytest.raises(DataError, match=r'prompts\[1\]: one response to a prompt'):
        pairwise_model.compare(['a', 'b'], [[' b', ' c'], [' d']])


def test_the_digest_is_of_all_that_rewards_depend_on(model):
    changed = [
        dataclasses.replace(model, params=jax.tree.map(lambda x: x * 1.001, model.params)),
        dataclasses.replace(model, loss=losses.LossConfig('bradley_terry_quantile_huber')),
        dataclasses.replace(model, reading=Reading(100)),
        dataclasses.replace(model, normalisation=Normalisation(1.0, 2.0)),
        dataclasses.replace(model, tokenizer=tokens.train_tokenizer(['other text'], 290))]
    digests = [one.digest for one in (model, *changed)]
    assert len(set(digests)) == len(digests)
    assert dataclasses.replace(model, row_length=64).digest == model.digest
