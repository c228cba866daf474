"""Runs that train a part: what is frozen is found again, and is what it was."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.data.comparisons import DataError
from qrm.models import weights
from qrm.models.network import RewardNetwork
from qrm.models.tuning import Tuning
from qrm.rewards.heads import HeadConfig
from qrm.training import base, reward_model, train, workdir
from qrm.training.base import Base
from qrm.training.checkpoints import Checkpoints
from qrm.training.workdir import WorkdirError
from tests.helpers import REFERENCE, TUNINGS, reference_checkpoint
from tests.programs import compiled, on_devices

KINDS = {'lora': {'train.tune': 'lora', 'train.frozen_dtype': 'bfloat16'},
         'last': {'train.tune': 'last:1', 'train.frozen_dtype': 'bfloat16'}}
PROMPTS, RESPONSES = ['a b', 'c'], [['d', 'e f'], ['g']]


@pytest.fixture(scope='module', params=KINDS)
def runs(request, tmp_path_factory):
    """Folders of a run that went through, and of one that was stopped after three steps."""
    whole, stopped = (str(tmp_path_factory.mktemp(name)) for name in ('whole', 'stopped'))
    changes = KINDS[request.param]
    on_devices.train_until(whole, 0, changes)
    on_devices.train_until(stopped, 3, changes)
    on_devices.train_until(stopped, 0, changes)
    return request.param, whole, stopped


def test_a_run_that_was_stopped_ends_as_one_that_was_not(runs):
    _, whole, stopped = runs
    rows = [workdir.read_metrics(folder) for folder in (whole, stopped)]
    assert rows[0] == rows[1]
    assert np.ptp([row['loss'] for row in rows[0] if row['split'] == 'train']) > 0


def test_checkpoints_hold_what_is_trained(runs):
    kind, whole, _ = runs
    initial = train.initial_network(on_devices.tiny_config(**KINDS[kind]))
    with Checkpoints(whole, read_only=True) as checkpoints:
        _, params = checkpoints.restore_params(8, jax.eval_shape(lambda: initial.trained))
    assert 'tokens' not in params['backbone']
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, initial.trained)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_a_loaded_model_is_the_base_with_what_was_trained(runs):
    kind, whole, _ = runs
    merged = reward_model.load(whole, step='last')
    apart = reward_model.load(whole, step='last', merge=False)
    assert apart.network.tuning.kind == kind
    assert merged.network.tuning.kind == 'all'
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(merged.params))
    a, b = (model.score(PROMPTS, RESPONSES) for model in (merged, apart))
    for one, other in zip(a.rewards, b.rewards, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    # What is frozen is the initial model, rounded; its table stands there as it was.
    initial = train.initial_network(on_devices.tiny_config()).params['backbone']['tokens']
    np.testing.assert_array_equal(merged.params['backbone']['tokens'],
                                  initial.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize('kind', ['last', 'head'])
def test_frozen_parameters_are_those_of_the_checkpoint(kind, tmp_path):
    folder = reference_checkpoint(tmp_path)
    pretrained = weights.load_pretrained(str(folder))
    net = RewardNetwork(pretrained.architecture, HeadConfig('scalar'), tuning=TUNINGS[kind])
    found = base.restore_frozen(net, base.find(str(folder), 0, 'float32', frozen=True))
    whole = {'backbone': pretrained.backbone, 'head': {}}
    _, expected = net.tuning.split(whole)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize('kind', ['all', 'last', 'head'])
def test_a_pooler_that_the_checkpoint_lacks_is_trained_or_refused(kind):
    pretrained = weights.load_pretrained(str(REFERENCE / 'bert'))
    backbone = {name: part for name, part in pretrained.backbone.items() if name != 'pooler'}
    net = RewardNetwork(pretrained.architecture, HeadConfig('scalar', reads=('first',)),
                        tuning=TUNINGS[kind])
    given = net, Base('bert', 0, 'float32'), pretrained._replace(backbone=backbone)
    if kind == 'head':
        with pytest.raises(DataError, match='bert has no pooler, which would stay random'):
            base.start(*given)
        return
    start = base.start(*given)
    assert start.anew == ['pooler']
    assert start.trained['backbone']['pooler']['dense']['kernel'].any()
    assert 'pooler' not in start.frozen.get('backbone', {})


@contextlib.contextmanager
def another_base(folder, checkpoint):
    """A run whose description names this checkpoint, with a digest that none has."""
    path = f'{folder}/model.json'
    values = workdir.read_json(path)
    base_ = values['base'] | {'checkpoint': checkpoint, 'digest': 'x'}
    workdir.write_json(path, values | {'base': base_})
    try:
        yield
    finally:
        workdir.write_json(path, values)


def test_another_base_is_refused(runs, tmp_path):
    _, whole, _ = runs
    folder = str(reference_checkpoint(tmp_path))
    for there, message in ((folder, 'other weights than those the run was trained on'),
                           (f'{folder}/none', 'no such folder'),
                           ('', 'or it began with a checkpoint')):
        with another_base(whole, there), pytest.raises(
                WorkdirError, match=f'"base": .*{message}.*say there where it is'):
            reward_model.load(whole)
    with another_base(whole, None), pytest.raises(
            WorkdirError, match='model.json: .*checkpoint=None, expected a str'):
        reward_model.load(whole)


def test_random_numbers_of_another_generator_are_refused():
    network = RewardNetwork(compiled.architecture('llama'), HeadConfig('scalar'),
                            tuning=Tuning('head'))
    found = base.find('', 3, 'float32', frozen=True)
    assert found == base.find('', 3, 'float32', frozen=True)
    assert found.digest != base.find('', 4, 'float32', frozen=True).digest
    base.restore_frozen(network, found)
    before = jax.config.jax_threefry_partitionable
    jax.config.update('jax_threefry_partitionable', not before)
    try:
        with pytest.raises(DataError, match='the random numbers of seed 3 are others than those'):
            base.restore_frozen(network, found)
    finally:
        jax.config.update('jax_threefry_partitionable', before)


def test_the_digest_follows_which_weights_are_read(tmp_path):
    folder = reference_checkpoint(tmp_path)
    (folder / 'model.safetensors.index.json').write_text('{"weight_map": {}}')
    before = base.find(str(folder), 0, 'float32', frozen=True).digest
    (folder / 'model.safetensors.index.json').unlink()
    assert base.find(str(folder), 0, 'float32', frozen=True).digest != before


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype='float16', expected one of"):
        Base('', 0, 'float16')
