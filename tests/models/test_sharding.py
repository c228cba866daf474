"""Copies of the state, shards of it and one device take the same steps."""

import functools
import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from qrm.data import packing
from qrm.models import sharding
from qrm.models.network import RewardNetwork
from qrm.rewards import heads
from qrm.rewards.heads import HEADS, HeadConfig
from qrm.training import step, train, workdir
from qrm.training.checkpoints import Checkpoints
from tests.helpers import (
    architecture,
    init,
    loss_config,
    network,
    optimizer_config,
    random_comparisons,
    reward_step,
    simulated,
)
from tests.programs import forks, on_devices

GPT2 = architecture(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12,
                    n_inner=3072)


def run(devices, *args):
    """What `tests.programs.on_devices` prints on that many devices."""
    code, out, err = forks.run('tests.programs.on_devices', args, simulated(devices))
    assert code == 0, err
    return out


@pytest.fixture(scope='module')
def results():
    """{devices: {mode, optimizer, head: what came out}}."""
    one = run(1, 'replicated,sgd,quantile', 'replicated,adamw,scalar',
              'replicated,sgd,scalar,lora', 'replicated,sgd,scalar,last')
    eight = run(8, 'replicated,sgd,quantile', 'fsdp,sgd,quantile', 'fsdp,adamw,scalar',
                'fsdp,sgd,scalar,lora', 'replicated,sgd,scalar,last', 'fsdp,sgd,scalar,last')
    return {1: json.loads(one), 8: json.loads(eight)}


def assert_same_metrics(a, b):
    for row, other in zip(a, b, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(('mode', 'what'), [
    ('replicated', 'quantile'), ('fsdp', 'quantile'), ('fsdp', 'scalar,lora'),
    ('replicated', 'scalar,last'), ('fsdp', 'scalar,last')])
def test_one_and_eight_devices_take_the_same_steps(results, mode, what):
    """25 comparisons in batches of 9 over 8 devices: ragged, and empty on most at the end."""
    one = results[1][f'replicated,sgd,{what}']
    eight = results[8][f'{mode},sgd,{what}']
    assert (one['devices'], eight['devices']) == (1, 8)
    assert_same_metrics(eight['metrics'], one['metrics'])
    np.testing.assert_allclose(eight['params'], one['params'], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(eight['rewards'], one['rewards'], atol=1e-5)
    # The steps moved the parameters by far more than the tolerance.
    assert np.abs(np.subtract(one['params'], one['initial'])).max() > 1e-2


@pytest.mark.parametrize('mode', ['replicated', 'fsdp'])
def test_devices_of_those_steps_go_round_two_loops_differently_often(results, mode):
    trips = np.array(results[8][f'{mode},sgd,quantile']['trips'])  # [step, device, layout]
    assert trips.shape == (3, 8, 2)
    # In one step each, there are devices that have nothing to do in the loop, and others that do.
    assert ((trips.min(axis=1) == 0) & (trips.max(axis=1) > 0)).any(axis=0).all()


def test_shards_take_the_same_steps_under_adamw_with_clipping(results):
    one, eight = (results[1]['replicated,adamw,scalar'], results[8]['fsdp,adamw,scalar'])
    for row, other in zip(one['metrics'], eight['metrics'], strict=True):
        for name in ('loss', 'gradient_norm', 'margin'):
            assert row[name] == pytest.approx(other[name], rel=1e-4)


def test_a_device_holds_its_share_of_the_state(results):
    # In this small model 6% are biases and norms, whole on each device.
    assert 1 / 8 <= results[8]['fsdp,adamw,scalar']['share_of_bytes'] < 0.19
    state = abstract_state(RewardNetwork(GPT2, HeadConfig('quantile')))
    splits = sharding.specs(state, 8)
    own = sum(leaf.size // (8 if sharding.AXIS in spec else 1)
              for leaf, spec in zip(*map(jax.tree.leaves, (state, splits)), strict=True))
    assert own / sum(leaf.size for leaf in jax.tree.leaves(state)) == pytest.approx(1 / 8, rel=0.01)


def abstract_state(net):
    optimizer = step.make_optimizer(optimizer_config(name='adamw', weight_decay=0.1), 3)
    return jax.eval_shape(
        lambda key: step.init_state(net.init(key), optimizer, 0), jax.random.key(0))


def test_every_parameter_and_its_copies_in_the_optimiser_have_one_row():
    state = abstract_state(network())
    splits = sharding.specs(state, 8)
    # (features,) of the table, then as `LOGICAL_AXES` says, worked out for D = 16 on 8 devices.
    expected = {
        'backbone': {
            'tokens': P(None, 'fsdp'), 'positions': P(None, 'fsdp'),
            'blocks': {
                'attention_norm': {'scale': P(), 'bias': P()},
                'mlp_norm': {'scale': P(), 'bias': P()},
                'attention': {'qkv': {'kernel': P(None, 'fsdp', None), 'bias': P()},
                              'output': {'kernel': P(None, None, 'fsdp'), 'bias': P()}},
                'mlp': {'up': {'kernel': P(None, 'fsdp', None), 'bias': P()},
                        'down': {'kernel': P(None, None, 'fsdp'), 'bias': P()}},
            },
            'norm': {'scale': P(), 'bias': P()},
        },
        'head': {'kernel': P('fsdp', None)},
    }
    assert splits.params == expected
    adam = splits.opt_state[1][0]
    assert adam.mu == adam.nu == expected
    assert adam.count == splits.step == splits.key == P()


OF_HEADS = {
    'scalar': {'kernel': ('fsdp', None), 'gate': ('fsdp', None)},
    'gaussian': {'kernel': ('fsdp', None), 'gate': ('fsdp', None)},
    'categorical': {'kernel': ('fsdp', None)},
    'quantile': {'kernel': ('fsdp', None), 'gate': ('fsdp', None)},
    'monotone_quantile': {'kernel': ('fsdp', None), 'gate': ('fsdp', None)},
    # Cosines are split along features, as kernels are; biases are not.
    'implicit_quantile': {'kernel': ('fsdp', None), 'gate': ('fsdp', None),
                          'cosines': (None, 'fsdp'), 'bias': ()},
    'annotator': {'kernel': ('fsdp', None), 'annotators': ()},
    'pairwise': {'kernel': ('fsdp', None)},
}


@pytest.mark.parametrize('members', [1, 2])
@pytest.mark.parametrize('name', HEADS)
def test_every_parameter_of_every_head_has_one_row(name, members):
    gated = 'gate' in OF_HEADS[name]
    head = HeadConfig(name, members=members, attributes=('a', 'b') if gated else (),
                      annotators=tuple('abcdefgh') * (name == 'annotator'))
    optimizer = step.make_optimizer(optimizer_config(name='adamw', weight_decay=0.1), 3)
    params = jax.eval_shape(lambda: {'head': heads.init(head, jax.random.key(0), 16)})
    state = jax.eval_shape(lambda p: step.init_state(p, optimizer, 0, teacher=True), params)
    splits = sharding.specs(state, 8)
    # The axis of members is never split.
    expected = {'head': {key: P(*(() if not axes else axes if members == 1 else (None, *axes)))
                         for key, axes in OF_HEADS[name].items()}}
    assert splits.params == splits.teacher == expected
    assert splits.opt_state[1][0].mu == expected
    decayed = step.decays(params)['head']
    assert decayed == {key: key in ('kernel', 'gate', 'cosines') for key in OF_HEADS[name]}


@pytest.mark.parametrize(('path', 'shape'), [
    (('backbone', 'words'), (50, 16)),
    (('backbone', 'blocks', 'attention', 'qkv', 'kernel'), (16, 48)),
    (('kernel',), (16, 10)),
])
def test_a_leaf_without_a_row_is_refused(path, shape):
    tree = jnp.zeros(shape)
    for name in reversed(path):
        tree = {name: tree}
    with pytest.raises(ValueError, match=f'{"/".join(path)} .* expected one, with a name for each'):
        sharding.specs(tree, 8)


def test_an_axis_that_devices_do_not_divide_is_left_whole():
    """Of D = 12, 3 D = 36 and 4 D = 48, 8 divides 48 only, and 9 only 36."""
    a = architecture(vocab_size=16, n_positions=72, n_embd=12, n_layer=8, n_inner=48)
    params = jax.eval_shape(RewardNetwork(a, HeadConfig('quantile', 8)).init,
                            jax.random.key(0))
    eight, nine = (sharding.specs(params, n) for n in (8, 9))
    assert eight['backbone']['blocks']['mlp']['up']['kernel'] == P(None, None, 'fsdp')
    assert eight['backbone']['blocks']['mlp']['down']['kernel'] == P(None, 'fsdp', None)
    assert eight['backbone']['blocks']['attention']['qkv']['kernel'] == P()
    assert nine['backbone']['blocks']['attention']['qkv']['kernel'] == P(None, None, 'fsdp')
    for splits in (eight, nine):  # Vocabulary, positions, layers and outputs are never split.
        assert splits['backbone']['tokens'] == splits['backbone']['positions'] == P()
        assert splits['head']['kernel'] == P()


def test_gathered_blocks_are_not_kept_for_the_backward_pass():
    """Of a projection its result is kept, and its kernel as shards only, which are there anyway."""
    net, tokens = network(), jnp.ones((3, 8), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(8), tokens.shape)

    def kept(params, batch):
        contexts = net.transformer.contexts(*batch, 'dense')

        def hidden(blocks):
            backbone = params['backbone'] | {'blocks': blocks}
            return net.transformer(backbone, jnp.ones((3, 8, 16)), contexts)[0]

        return jax.tree.leaves(jax.vjp(hidden, params['backbone']['blocks'])[1])

    on_shards = sharding.on_shards(kept, sharding.make_mesh(), P())
    shapes = [leaf.shape for leaf in jax.eval_shape(
        on_shards, init(net), (tokens[None], tokens[None], places[None]))]
    assert shapes.count((2, 16, 48)) == 1
    assert shapes.count((2, 3, 8, 48)) == 1


def test_kernels_are_exchanged_in_the_dtype_they_are_computed_with():
    """And, on one device, a step in shards is the step without."""
    net, optimizer = network(layers=1, dtype='bfloat16', attention='dense'), optax.sgd(1.0)
    items = random_comparisons(5, seed=2, responses=(2, 4))
    batch = packing.make_batch(items, packing.plan_layouts(items, row_length=24, rows=2), 5)
    train_step = reward_step(net, loss_config(), optimizer)
    state, mesh = step.init_state(init(net), optimizer, 0), sharding.make_mesh()
    shares = jax.tree.map(lambda x: x[None], batch)
    on_mesh = functools.partial(train_step, mesh=mesh)
    gathered = {(eqn.invars[0].aval.shape, eqn.invars[0].aval.dtype.name)
                for eqn in equations(jax.make_jaxpr(on_mesh)(state, shares).jaxpr)
                if eqn.primitive.name == 'all_gather'}
    kernels = {(16, 48), (16, 16), (16, 32), (32, 16)}
    assert {(shape, dtype) for shape, dtype in gathered if dtype != 'int32'} == {
        *((shape, 'bfloat16') for shape in kernels), ((16, 10), 'float32')}
    ends = [jax.jit(f)(state, b)[0].params for f, b in ((train_step, batch), (on_mesh, shares))]
    moves, others = (jax.tree.leaves(jax.tree.map(jnp.subtract, end, state.params))
                     for end in ends)
    least = 0.01 * optax.tree.norm(moves)
    # XLA may keep what is rounded to bfloat16 in float32 for longer in one of them.
    for move, other in zip(moves, others, strict=True):
        assert optax.tree.norm(move - other) < 0.05 * max(optax.tree.norm(move), least)


def equations(jaxpr):
    """All equations of a jaxpr and of those inside."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_checkpoints_move_between_layouts(tmp_path):
    """Two steps each on 1 device, 8 in groups of 2, 2 with shards, 1: as eight steps on 1."""
    whole, moved = str(tmp_path / 'whole'), str(tmp_path / 'moved')
    train.train(on_devices.tiny_config(), whole)
    on_devices.train_until(moved, 2, {})
    run(8, moved, '4', 'train.sharding=fsdp', 'train.tensor=2')
    out = run(2, moved, '6', 'train.sharding=fsdp')
    assert ('the run started on 8 x cpu, fsdp, tensor groups of 2 and goes on on 2 x cpu, fsdp'
            in out)
    on_devices.train_until(moved, 0, {})
    rows, expected = workdir.read_metrics(moved), workdir.read_metrics(whole)
    assert [row.pop('split') for row in rows] == [row.pop('split') for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    shapes = jax.eval_shape(train.prepare(on_devices.tiny_config(), whole).model.network.init,
                            jax.random.key(0))
    ends = []
    for folder in (whole, moved):
        with Checkpoints(folder, read_only=True) as checkpoints:
            ends.append(checkpoints.restore_params(8, shapes)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *ends)
