"""Which parameters are trained, and that the others are as good as constants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qrm.data import packing
from qrm.models import tuning
from qrm.models.architecture import flat
from qrm.models.tuning import Tuning
from qrm.training import inference, step
from tests.helpers import (
    TUNINGS,
    init,
    loss_config,
    network,
    optimizer_config,
    random_comparisons,
    reward_step,
)


def paths(params):
    return {jax.tree_util.keystr(path, simple=True, separator='/')
            for path, _ in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize(('text', 'expected'), [
    ('all', ('all', 0)), ('lora', ('lora', 0)), ('head', ('head', 0)), ('last:12', ('last', 12))])
def test_what_is_trained_is_read(text, expected):
    assert tuning.parse(text) == expected


@pytest.mark.parametrize('text', ['', 'last', 'last:', 'last:0', 'last:-1', 'last:x', 'lora:4',
                                  'all:1', 'Head', 3, None])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="expected 'all', 'lora', 'last:N'"):
        tuning.parse(text)


@pytest.mark.parametrize('fields', [
    {'kind': 'some'}, {'kind': 'lora'}, {'kind': 'last'}, {'kind': 'head', 'blocks': 1},
    {'kind': 'head', 'lora': TUNINGS['lora'].lora}])
def test_tunings_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValueError, match='tuning'):
        Tuning(**fields)


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(ValueError, match='the last 3 blocks, of 2 that there are'):
        network(tuning=Tuning('last', 3))


def test_trained_and_frozen_parameters():
    whole = paths(init(network()))
    trained, frozen = (paths(p) for p in Tuning('head').split(init(network())))
    assert (trained, frozen) == ({'head/kernel'}, whole - {'head/kernel'})
    net = network(tuning=TUNINGS['lora'])
    trained, frozen = (paths(p) for p in net.tuning.split(init(net)))
    assert frozen == whole - {'head/kernel'}
    assert trained == {'head/kernel', *(
        f'backbone/blocks/{kernel}/lora/{name}/{factor}' for kernel, name in (
            ('attention/qkv', 'c_attn'), ('attention/output', 'c_proj'), ('mlp/up', 'c_fc'),
            ('mlp/down', 'c_proj')) for factor in 'ab')}
    trained, frozen = Tuning('last', 1).split(init(network(layers=3)))
    assert paths(trained) == whole - {'backbone/tokens', 'backbone/positions'}
    assert paths(frozen) == whole - {'backbone/norm/scale', 'backbone/norm/bias', 'head/kernel'}
    sizes = [len(p['backbone']['blocks']['mlp']['up']['kernel']) for p in (trained, frozen)]
    assert sizes == [1, 2]
    _, frozen = Tuning('last', 2).split(init(network()))
    assert paths(frozen) == {'backbone/tokens', 'backbone/positions'}


@pytest.mark.parametrize('unstacked', [False, True])
@pytest.mark.parametrize('kind', ['all', 'lora', 'last', 'head'])
def test_parts_are_joined_again(kind, unstacked):
    net = network(layers=3, tuning=TUNINGS[kind])
    params = init(net)
    parts = net.tuning.split(params)
    if unstacked:
        parts = map(tuning.unstack_blocks, parts)
    joined = tuning.stack_blocks(net.tuning.join(*parts))
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, joined, params)


@pytest.mark.parametrize('remat', [False, True])  # in runs of one, and by a scan over each run
@pytest.mark.parametrize('kind', ['lora', 'last', 'head'])
def test_a_step_moves_what_is_trained_as_if_all_were(kind, remat):
    items = random_comparisons(7, seed=3, responses=(2, 4))
    batch = packing.make_batch(items, packing.plan_layouts(items, row_length=24, rows=2), 7)
    optimizer = step.make_optimizer(optimizer_config(), 1)  # SGD, without clipping
    part = network(layers=3, remat=remat, tuning=TUNINGS[kind])
    params = init(part)
    trained, frozen = part.tuning.split(params)
    taken, metrics = jax.jit(reward_step(part, loss_config(), optimizer))(
        step.init_state(trained, optimizer, 0), batch, step.place_frozen(part, frozen))
    whole = jax.jit(reward_step(
        _AllOf(part), loss_config(), optimizer))(step.init_state(params, optimizer, 0), batch)
    expected, _ = part.tuning.split(whole[0].params)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, expected, trained))
    assert moved > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * moved + 1e-7),
                 taken.params, expected)
    assert metrics['loss'] == pytest.approx(float(whole[1]['loss']), rel=1e-6)
    assert metrics['gradient_norm'] == pytest.approx(float(moved) / 0.1, rel=1e-4)


class _AllOf:
    """A network of which all is trained, also its adapters."""

    def __init__(self, net):
        self._net, self.tuning = net, Tuning()

    def __getattr__(self, name):
        return getattr(self._net, name)

    def __call__(self, *args):
        return self._net(*args)


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('kind', ['lora', 'last', 'head'])
def test_what_is_frozen_may_be_narrower(kind, remat):
    """Kernels of bfloat16, as they are or as bits, give what their values give in float32."""
    items = random_comparisons(5, seed=4, responses=(2, 4))
    batch = packing.make_batch(items, packing.plan_layouts(items, row_length=24, rows=2), 5)
    net, optimizer = (network(layers=3, remat=remat, tuning=TUNINGS[kind]),
                      step.make_optimizer(optimizer_config(), 1))
    trained, frozen = net.tuning.split(init(net))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    train_step = jax.jit(reward_step(net, loss_config(), optimizer))
    ends = [train_step(step.init_state(trained, optimizer, 0), batch, part)
            for part in (rounded, narrow, step.place_frozen(net, narrow), frozen)]
    expected, *found, others = (end[0].params for end in ends)
    for one in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
                     one, expected)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, expected, others)) > 1e-5


@pytest.mark.parametrize(('kind', 'remat', 'runs'), [
    ('lora', False, [1, 1, 1]), ('lora', True, [2, 1]), ('head', False, [2, 1]),
    ('last', False, [1, 1]), ('last', True, [2])])
def test_frozen_blocks_are_cut_where_a_step_would_cut_them(kind, remat, runs):
    net = network(layers=3, remat=remat, tuning=TUNINGS[kind])
    _, frozen = net.tuning.split(init(net))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    placed = step.place_frozen(net, narrow)
    blocks = placed['backbone']['blocks']
    assert [len(run['mlp']['up']['kernel']) for run in blocks] == runs
    dtypes = {name: leaf.dtype for name, leaf in flat(placed['backbone']).items()}
    bits = {name for name, dtype in dtypes.items() if dtype == jnp.uint16}
    assert bits == {name for name in dtypes
                    if name in ('tokens', 'positions') or name.endswith('/kernel')}
    assert {dtypes[name] for name in dtypes.keys() - bits} <= {jnp.dtype('bfloat16')}
    items = random_comparisons(5, seed=4, responses=(2, 4))
    trained, _ = net.tuning.split(init(net))
    found, expected = (
        inference.predict(net, net.tuning.join(trained, part), items, row_length=24, rows=2)
        for part in (placed, narrow))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
