"""Tensor groups take the same steps as one device, and hold what they should."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qrm.models import parallel, sharding
from qrm.models.network import RewardNetwork
from qrm.rewards.heads import HeadConfig
from qrm.training import train
from qrm.training.schema import ConfigError
from tests.helpers import ARCHITECTURE, architecture, load_config, simulated
from tests.programs import forks, on_devices

# Biases and joined queries, keys and values; heads that share keys, and clipping; adapters of
# either, and norms of each head; windows, caps and norms on both sides; an encoder with a pooler.
STEPS = {
    'fsdp:2': ('sgd,quantile,all,gpt2', 'sgd,quantile,lora,gpt2', 'sgd,quantile,all,gemma2',
               'sgd,scalar,last,bert'),
    'fsdp:4': ('adamw,quantile,all,llama', 'sgd,scalar,lora,qwen3'),
}
KEYS = [(mode, what) for mode, whats in STEPS.items() for what in whats]


def on_eight(module, *args):
    """What a program of tests prints on eight devices."""
    code, out, err = forks.run(f'tests.programs.{module}', args, simulated(8))
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope='module')
def steps():
    return on_eight('on_devices', *(f'{mode},{what}' for mode, what in KEYS))


@pytest.fixture(scope='module')
def groups():
    return on_eight('on_groups')


@pytest.mark.parametrize(('mode', 'what'), KEYS)
def test_groups_take_the_steps_of_one_device(steps, mode, what):
    one, groups = on_devices.take_steps('replicated', *what.split(',')), steps[f'{mode},{what}']
    assert (one['devices'], groups['devices']) == (1, 8)
    for row, other in zip(groups['metrics'], one['metrics'], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    if 'adamw' not in what:  # which makes steps of rounding where a gradient is 0
        np.testing.assert_allclose(groups['params'], one['params'], rtol=1e-4, atol=3e-5)
        # Large adapters make 1e-3 of some rewards of what is 1e-5 of parameters; the program has
        # compared them with those of one device with the same parameters.
        if 'lora' not in what:
            np.testing.assert_allclose(groups['rewards'], one['rewards'], rtol=0,
                                       atol=1e-3 * np.abs(one['rewards']).max())
    # The steps moved the parameters by far more than the tolerance.
    assert np.abs(np.subtract(one['params'], one['initial'])).max() > 3e-3


def test_each_device_has_its_share_of_the_state(steps):
    """Of AdamW's, three floats for a parameter, beside a count of steps."""
    net = on_devices.grouped('quantile', 'all', 'llama')
    # 16 (48 + 24 + 24) and 48 * 16 of attention, 16 * 48 and 24 * 16 of the perceptron; the head.
    split = 2 * (1536 + 768 + 768 + 384) + 50 * 16 + 160
    norms = 5 * 16
    sizes = sum(leaf.size for leaf in jax.tree.leaves(
        jax.eval_shape(net.init, jax.random.key(0))))
    assert sizes == split + norms
    own = steps['fsdp:4,adamw,quantile,all,llama']['own_bytes']
    assert own == 3 * 4 * (split // 8 + norms) + 2 * 4


def test_specs_of_groups_by_hand():
    shapes = jax.eval_shape(RewardNetwork(ARCHITECTURE, HeadConfig('quantile', 10)).init,
                            jax.random.key(0))
    found = sharding.specs(shapes, 8, 2)
    both = ('tensor', 'fsdp')
    assert found['backbone']['blocks']['attention'] == {
        'qkv': {'kernel': P(None, 'fsdp', 'tensor'), 'bias': P(None, 'tensor')},
        'output': {'kernel': P(None, 'tensor', 'fsdp'), 'bias': P()}}
    assert found['backbone']['blocks']['mlp'] == {
        'up': {'kernel': P(None, 'fsdp', 'tensor'), 'bias': P(None, 'tensor')},
        'down': {'kernel': P(None, 'tensor', 'fsdp'), 'bias': P()}}
    assert found['backbone']['blocks']['mlp_norm'] == {'scale': P(), 'bias': P()}
    assert found['backbone']['tokens'] == P(None, both)
    assert found['head']['kernel'] == P(both, None)
    # Of D = 16, 32 devices in pairs: 16 pairs divide it, 32 devices do not.
    wide = sharding.specs(shapes, 32, 2)
    assert wide['backbone']['tokens'] == wide['head']['kernel'] == P()
    assert wide['backbone']['blocks']['mlp']['up']['kernel'] == P(None, 'fsdp', 'tensor')


def test_a_group_that_does_not_divide_a_leaf_is_refused():
    shapes = jax.eval_shape(RewardNetwork(ARCHITECTURE, HeadConfig('scalar')).init,
                            jax.random.key(0))
    with pytest.raises(ValueError, match=r'mlp/down/kernel .* 3 .*, expected a divisor of 32'):
        sharding.specs({'backbone': {'blocks': {'mlp': shapes['backbone']['blocks']['mlp']}}}, 6, 3)


def test_a_device_has_whole_heads_of_each_part(groups):
    """Queries 0 to 7, keys 8 to 11, values 12 to 15, of two features a head; then back."""
    assert groups['qkv'] == [[0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15],
                             list(range(16))]
    assert groups['up'] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11], list(range(12))]
    assert groups['plain'] == [list(range(16)), list(range(16, 32)), list(range(32))]


def test_dropout_is_one_of_the_stream_and_another_of_each_head(groups):
    """Two heads with the same weights, on two devices that have one each."""
    kept, dropped = groups['kept'], groups['dropped']
    np.testing.assert_allclose(*kept['attention'], rtol=1e-4, atol=1e-7)
    assert np.abs(np.subtract(*dropped['attention'])).max() > 0.1 * np.abs(
        dropped['attention']).max()
    assert dropped['norm'][0] == dropped['norm'][1]
    assert np.abs(np.subtract(dropped['norm'], kept['norm'])).max() > 1e-3


GROUPED = on_devices.grouped('scalar', 'all', 'llama').architecture


@pytest.mark.parametrize(('a', 'devices', 'tensor', 'message'), [
    (GROUPED, 8, 3, 'tensor=3, expected a divisor of the number of devices, 8'),
    (GROUPED, 8, 8, 'tensor=8 for 4 key and value heads, expected a divisor of them'),
    (architecture(n_inner=33), 8, 2, 'tensor=2 for 33 inner features, expected a divisor'),
    (dataclasses.replace(GROUPED, query_key_norm='projection'), 8, 2,
     'tensor=2 for a model with norms of the queries of all heads together, expected 1'),
    (GROUPED, 24, 2, 'tensor=2 makes 12 groups of 24 devices, expected a divisor of the 16 f'),
])
def test_groups_that_cannot_divide_a_model_are_refused(a, devices, tensor, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        parallel.check(a, devices, tensor)


def test_groups_that_divide_a_model_are_not():
    for tensor in (1, 2, 4):
        parallel.check(GROUPED, 8, tensor)
    # Nothing is asked of a model that no group divides.
    parallel.check(architecture(n_inner=33), 7, 1)


def test_settings_of_a_run_that_cannot_be_are_refused(tmp_path):
    config = on_devices.tiny_config(**{'train.tensor': 2})
    with pytest.raises(ConfigError, match=r"config\.train\.tensor: 2 with train\.sharding='repl"
                                          r"icated', expected 1, or 'fsdp'"):
        train.train(config, str(tmp_path / 'run'))
    config.train.sharding = 'fsdp'
    with pytest.raises(ConfigError, match=r'^config\.train\.tensor=2, expected a divisor of the '
                                          'number of devices, 1'):
        train.train(config, str(tmp_path / 'run'))
    with pytest.raises(ConfigError, match=r'config\.train\.tensor=0'):
        train.train(load_config('demo', **{'train.tensor': 0}), str(tmp_path / 'run'))


def test_a_part_is_the_model_with_fewer_heads_and_inner_features():
    part = parallel.part(GROUPED, 4)
    assert (part.num_heads, part.num_kv_heads, part.intermediate_size) == (2, 1, 6)
    assert part.parts == {'qkv': (12, 6, 6), 'up': (6, 6)}
    assert (part.hidden_size, part.head_dim) == (GROUPED.hidden_size, GROUPED.head_dim)
