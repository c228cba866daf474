"""Tests of the counts of work and of the model of a training step.

What a step takes is compared with what JAX traces and XLA compiles, never with a clock.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qrm.data import packing
from qrm.models import sharding
from qrm.models.architecture import Layer
from qrm.models.attention import attention_mask
from qrm.models.families import FAMILIES
from qrm.models.network import RewardNetwork, parameter_count
from qrm.models.tuning import Tuning
from qrm.rewards.heads import HeadConfig
from qrm.studies import costs, scaling, speed
from qrm.training import step
from tests.helpers import (
    ARCHITECTURE,
    ROOT,
    TUNINGS,
    architecture,
    encoded,
    load_config,
    network,
    optimizer_config,
    random_comparisons,
    simulated,
)
from tests.programs import compiled, forks

LAYOUT = packing.Layout(length=64, rows=5, slots=4, responses=2)
STEPS = {'replicated': 'replicated,gpt2,float32,remat', 'fsdp': 'fsdp,gpt2,float32,stored',
         'bert': 'fsdp,bert,float32,stored', 'modernbert': 'fsdp,modernbert,float32,remat',
         # Column biases and norms of each head; more sums where blocks are recomputed.
         'groups': 'fsdp:2,gpt2,float32,stored', 'grouped': 'fsdp:4,qwen3,float32,remat'}
# Width 32, two heads of 20 on one of keys and values, inner width 48.
GROUPED = compiled.architecture('llama')


def small(family='gpt2', attention='dense', remat=False, dtype='float32', **head):
    """Four blocks of a family; rows, tokens, features and so on are told apart by their sizes."""
    return RewardNetwork(compiled.architecture(family), HeadConfig('quantile', 10, **head), dtype,
                         attention, remat)


def abstract(net):
    return jax.eval_shape(net.init, jax.random.key(0))


def nbytes(leaf):
    return leaf.size * leaf.dtype.itemsize


def test_matrix_parameters_by_hand():
    # A block of width 16 and inner width 32: 16 * 48 + 16 * 16 + 16 * 32 + 32 * 16 = 2048; two.
    assert costs.matmul_parameters(ARCHITECTURE) == 4096
    # 32 * (40 + 20 + 20) for queries, keys and values, 40 * 32, gate and up 32 * 96, and 48 * 32.
    assert costs.matmul_parameters(GROUPED) == 4 * (2560 + 1280 + 3072 + 1536)


@pytest.mark.parametrize(('prompt', 'responses', 'expected'), [
    (2, (1, 3), 18),  # prompt 1 + 2; response a 3; response b 3 + 4 + 5
    (0, (2,), 3),
    (3, (1,), 10),  # a dialogue of four tokens: 1 + 2 + 3 + 4
    (3, (1, 1), 14),  # the second response sees the prompt and itself
])
def test_visible_pairs_by_hand(prompt, responses, expected):
    assert costs.visible_pairs(encoded('x', prompt, responses)) == expected


@pytest.mark.parametrize(('window', 'causal', 'expected'), [
    (2, True, 11),  # prompt 1 + 2; response a 2; response b 2 + 2 + 2
    (0, False, 22),  # prompt 2 + 2; response a 3; response b 5 + 5 + 5
    (2, False, 14),  # prompt 2 + 2; response a 2; response b 3 + 3 + 2
], ids=['window', 'encoder', 'encoder with a window'])
def test_visible_pairs_in_reach_by_hand(window, causal, expected):
    assert costs.visible_pairs(
        encoded('x', 2, (1, 3)), window=window, causal=causal) == expected


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('window', [0, 7])
@pytest.mark.parametrize('item', random_comparisons(5, seed=3))
def test_visible_pairs_are_those_of_the_attention_mask(item, window, causal):
    layout = packing.Layout(item.size, 1, 1, len(item.responses))
    batch = packing.pack([item], [layout])[0].micro_batch
    mask = np.asarray(attention_mask(batch.segments, batch.responses, batch.positions,
                                     window=window, causal=causal))
    assert costs.visible_pairs(item, window=window, causal=causal) == (
        mask[batch.segments > 0].sum())


def test_useful_flops_by_hand():
    items = [encoded('x', 2, (1, 3))]
    # Six tokens at 2 * 4096, 18 pairs at 4 * 16 features in each of two blocks.
    assert costs.useful_flops(ARCHITECTURE, items) == 6 * 8192 + 18 * 128 == 51456
    assert costs.useful_flops(ARCHITECTURE, items, tuning=Tuning()) == 3 * 51456
    assert costs.useful_flops(ARCHITECTURE, items * 2) == 2 * 51456
    assert costs.useful_flops(ARCHITECTURE, [], tuning=Tuning()) == 0


@pytest.mark.parametrize(('tuning', 'backward'), [
    ('head', 0),
    # One block: gradients of what its kernels read, but for the first of them, and of kernels.
    ('last', 6 * 2 * (2048 - 768) + 6 * 2 * 2048 + 2 * 18 * 64),
    # Two blocks, and adapters of rank 4 beside kernels of 16 x 48, 16 x 16, 16 x 32, 32 x 16.
    ('lora', 6 * 2 * (4096 - 768) + 2 * 18 * 128 + 3 * 6 * 2 * 4 * 2 * (64 + 32 + 48 + 48)),
])
def test_useful_flops_of_training_less_by_hand(tuning, backward):
    items = [encoded('x', 2, (1, 3))]
    assert costs.useful_flops(ARCHITECTURE, items, tuning=TUNINGS[tuning]) == 51456 + backward


def test_useful_flops_of_windows_are_those_of_each_block():
    # Blocks with a window and without take turns; two heads of 20.
    windowed = dataclasses.replace(GROUPED, layers=(Layer(window=2), Layer()))
    assert costs.useful_flops(windowed, [encoded('x', 2, (1, 3))]) == (
        6 * 2 * costs.matmul_parameters(GROUPED) + 4 * 40 * 2 * (11 + 18))


def test_tokens_by_hand():
    items = [encoded('x', 2, (1, 3)), encoded('y', 4, (2,)), encoded('z', 0, (1, 1, 1))]
    assert costs.distinct_tokens(items) == 6 + 6 + 3
    assert costs.repeated_tokens(items) == (3 + 5) + 6 + 3
    # In twos: dialogues of 3, 5 and 6 tokens take 3 * 6; the last batch 3 * 1.
    assert costs.padded_tokens(items, 2) == 18 + 3
    assert costs.padded_tokens(items, 1) == 10 + 6 + 3
    assert costs.padded_tokens(items, 8) == 6 * 6


def test_parameters_by_hand_and_as_they_are():
    # Of each of two blocks: biases 48 + 16 + 32 + 16 and two norms of 2 * 16; a final norm of 32.
    expected = costs.Parameters(kernels=4096, vectors=2 * 176 + 32, tables=50 * 16 + 64 * 16,
                                head=16 * 10)
    assert costs.parameters(network()) == expected


@pytest.mark.parametrize('family', FAMILIES)
def test_parameters_are_those_of_the_network(family):
    net = dataclasses.replace(small(family), language_model=FAMILIES[family].output != '')
    assert sum(costs.parameters(net)) == parameter_count(abstract(net))
    assert costs.parameters(net).kernels == costs.matmul_parameters(net.architecture)


@pytest.mark.parametrize(('head', 'size', 'products'), [
    (HeadConfig('quantile', 10, attributes=('a', 'b')), 16 * 20 + 16 * 2, 16 * 22),
    (HeadConfig('gaussian', members=3), 3 * 16 * 2, 3 * 16 * 2),
    # One kernel, and a table of cosines with biases; both are used at each of ten levels.
    (HeadConfig('implicit_quantile', 10, num_cosines=4), 16 + 4 * 16 + 16, 10 * (16 + 4 * 16)),
    # A common reward and one factor, and what each annotator makes of it.
    (HeadConfig('annotator', annotators=tuple('abc')), 16 * 2 + 3, 16 * 2 + 3),
    # What is read at two places, through a layer; biases are no products.
    (HeadConfig('quantile', 10, reads=('last', 'last@1'), hidden_layers=(8,), bias=True),
     32 * 8 + 8 + 8 * 10 + 10, 32 * 8 + 8 * 10),
    # The gate is not asked at each level.
    (HeadConfig('implicit_quantile', 10, num_cosines=4, attributes=('a', 'b')),
     16 * 2 + 4 * 16 + 16 + 16 * 2, 10 * (16 * 2 + 4 * 16) + 16 * 2),
], ids=['gated', 'ensemble', 'implicit', 'annotator', 'deep', 'gated implicit'])
def test_heads_by_hand_and_as_they_are(head, size, products):
    net = dataclasses.replace(network(), head=head)
    assert costs.parameters(net).head == size
    assert sum(costs.parameters(net)) == parameter_count(abstract(net))
    layout = packing.Layout(length=4, rows=1, slots=1, responses=2)
    assert costs.micro_batch_work(net, layout).head == 3 * 2 * 2 * products


@pytest.mark.parametrize('net', [
    RewardNetwork(architecture(vocab_size=16, n_positions=72, n_embd=12, n_layer=8, n_inner=48),
                  HeadConfig('quantile', 8)),
    *map(small, FAMILIES),
], ids=['sizes', *FAMILIES])
def test_split_parameters_are_those_of_the_table(net):
    params = abstract(net)
    for devices in (1, 2, 8, 9, 16, 36, 48, 512):
        sizes = dict.fromkeys(costs.Parameters._fields, 0)
        for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params),
                                      jax.tree.leaves(sharding.specs(params, devices)),
                                      strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            kind = ('head' if any(part in name for part in ('head', 'pooler', 'types'))
                    else 'tables' if 'tokens' in name or 'positions' in name
                    else 'kernels' if 'kernel' in name else 'vectors')
            sizes[kind] += leaf.size * (sharding.AXIS in spec)
        assert costs.split_parameters(net, devices)._asdict() == sizes


@pytest.mark.parametrize(('family', 'shards', 'tensor'), [
    ('gpt2', 1, 1), ('gpt2', 8, 1), ('bert', 8, 1), ('gpt2', 8, 2), ('bert', 8, 2), ('gpt2', 2, 2)])
def test_state_bytes_are_those_of_the_training_state(family, shards, tensor):
    net = small(family)
    optimizer = step.make_optimizer(optimizer_config(name='adamw', weight_decay=0.1), 3)
    state = jax.eval_shape(lambda key: step.init_state(net.init(key), optimizer, 0),
                           jax.random.key(0))
    mesh = AbstractMesh((shards // tensor, tensor), (sharding.AXIS, sharding.TENSOR))
    own = sum(math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize
              for leaf, spec in zip(*map(
                  jax.tree.leaves, (state, sharding.specs(state, shards, tensor))), strict=True))
    # Beside it the step, two counts of the optimiser, and a key of two words.
    assert own == costs.step_memory(net, LAYOUT, shards=shards, tensor=tensor).state + 3 * 4 + 2 * 4


def test_work_of_a_group_by_hand():
    """As above, in pairs of devices with a head and 16 inner features each."""
    layout = packing.Layout(length=4, rows=1, slots=1, responses=2)
    one, pair = (costs.micro_batch_work(network(), layout, tensor=tensor) for tensor in (1, 2))
    assert pair == (one.projections // 2, one.attention // 2, one.head)


def test_work_by_hand():
    """One row of 4 tokens, one comparison of two responses, the two blocks of `ARCHITECTURE`."""
    layout = packing.Layout(length=4, rows=1, slots=1, responses=2)
    # Forward, the first block takes 2 * 2048 a token; the last one 2 * 768 a token for queries,
    # keys and values, and 2 * (256 + 1024) at each of two reads. The head is 16 * 10.
    projections = 4 * 4096 + 4 * 1536 + 2 * 2560
    # 4 * 16 for a pair: 4 * 4 of them, then 2 reads with 4 keys.
    attention = 64 * 16 + 64 * 8
    work = costs.micro_batch_work(network(), layout)
    assert work == (3 * projections, 3 * attention, 3 * 2 * 160 * 2)
    # Recomputed: the first block without its last product, 2 * 512 a token.
    again = costs.micro_batch_work(network(remat=True), layout)
    assert again == (3 * projections + 4 * (4096 - 1024), 3 * attention + 1024, work.head)
    # One tile of 64 * 64: two products forward and five backward, of 2 * 16 a pair.
    tiled = costs.micro_batch_work(network(), layout, pairs=[4096])
    assert tiled.attention == 7 * 32 * 4096 + 3 * 512


def test_work_of_grouped_heads_and_means_by_hand():
    """As above, of three blocks at all tokens."""
    layout = packing.Layout(length=4, rows=1, slots=1, responses=2)
    net = RewardNetwork(dataclasses.replace(GROUPED, num_layers=3),
                        HeadConfig('quantile', 10, reads=('mean',)), attention='tiled')
    work = costs.micro_batch_work(net, layout, pairs=[4096])
    assert work.projections == 3 * 3 * 4 * 2 * (2560 + 1280 + 3072 + 1536)
    assert work.attention == 3 * 7 * (2 * 40) * 4096
    # Means of two responses over four tokens, whose weights need no gradient.
    assert work.head == 3 * 2 * 320 * 2 + 2 * 2 * 2 * 4 * 32


def test_work_of_windows_is_that_of_each_block():
    """Blocks of gemma2 with a window and without take turns; the last one sees its reads."""
    layout, net = packing.Layout(64, 1, 1, 2), small('gemma2', attention='tiled')
    work = costs.micro_batch_work(net, layout, pairs=[4096, 8192])
    assert work.attention == 7 * (2 * 40) * (4096 + 8192 + 4096) + 3 * 2 * (2 * 40) * 2 * 64


def gradient(net):
    """A function of (parameters, micro-batch), as in a step."""

    def objective(params, embedded, batch):
        return jnp.sum(net.outputs(params, net.hidden(params, batch, embedded)))

    return lambda params, batch: jax.value_and_grad(objective, argnums=(0, 1))(
        params, net.embed(params, batch), batch)


def products(jaxpr, trips, times=1):
    """FLOPs of the products of a jaxpr whose while loops go round `trips` times."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'dot_general':
            (contracted, _), _ = eqn.params['dimension_numbers']
            sizes = [eqn.invars[0].aval.shape[axis] for axis in contracted]
            total += 2 * times * math.prod([*eqn.outvars[0].aval.shape, *sizes])
        loops = {'scan': eqn.params.get('length'), 'while': trips}
        inner = times * loops.get(eqn.primitive.name, 1)
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple) else (value,):
                part = getattr(part, 'jaxpr', part)
                total += products(part, trips, inner) if hasattr(part, 'eqns') else 0
    return total


def assert_work_is_traced(net, groups=7):
    traced = jax.make_jaxpr(gradient(net))(abstract(net), packing.empty_micro_batch(LAYOUT))
    # Without what nothing needs, as XLA leaves it out.
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    # JAX recomputes a first block that is outside of the scan; XLA finds it done, see below.
    net = dataclasses.replace(net, architecture=dataclasses.replace(
        net.architecture, first_norm=net.architecture.first_norm or net.remat))
    pairs = None
    if net.attention == 'tiled':  # by four tiles of 64 x 64
        pairs = [groups * 4 * 64 * 64] * len(net.architecture.layers)
    assert products(needed, groups) == sum(costs.micro_batch_work(net, LAYOUT, pairs=pairs))


@pytest.mark.parametrize('family', FAMILIES)
def test_work_of_each_family_is_that_of_the_traced_gradient(family):
    assert_work_is_traced(small(family, 'tiled', remat=True))


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('attention', ['dense', 'tiled'])
def test_work_is_that_of_the_traced_gradient(attention, remat):
    assert_work_is_traced(small('gpt2', attention, remat))


@pytest.mark.parametrize(('family', 'head'), [
    ('gpt2', {'attributes': ('a', 'b')}),
    ('gpt2', {'reads': ('last', 'mean@2', 'last@3')}),
    ('gpt2', {'reads': ('last@2', 'dialogue@1')}),
    ('bert', {'reads': ('first', 'last')}),
    ('bert', {'reads': ('dialogue', 'mean', 'first', 'mean@3')}),
    ('modernbert', {'reads': ('first', 'mean@1', 'dialogue@3', 'mean@2')}),
], ids=lambda value: value if isinstance(value, str) else ' '.join(*value.values()))
def test_work_follows_what_the_head_reads(family, head):
    assert_work_is_traced(small(family, **head))


def assert_kept_bytes_are_those_of_differentiation(net, sharded=False, tensor=1):
    def kept(params, batch):
        def hidden(params, embedded):
            return net.hidden(params, batch, embedded)

        return jax.tree.leaves(jax.vjp(hidden, params, net.embed(params, batch))[1])

    batch = packing.empty_micro_batch(LAYOUT)
    if sharded:
        mesh = AbstractMesh((1, tensor), (sharding.AXIS, sharding.TENSOR))
        kept = sharding.on_shards(kept, mesh, P())
        batch = jax.tree.map(lambda x: x[None], batch)
    arrays = jax.eval_shape(kept, abstract(net), batch)
    # What a scan has stacked, other than slices of parameters and indices of tiles.
    scanned = 3 if net.architecture.first_norm else 2
    stacked = sum(nbytes(x) for x in arrays
                  if x.shape[:2] == (scanned, LAYOUT.rows) and x.dtype != jnp.int32)
    assert stacked == scanned * costs.kept_bytes(net, LAYOUT, sharded=sharded, tensor=tensor,
                                                 tiled=net.attention == 'tiled')


@pytest.mark.parametrize('family', FAMILIES)
def test_kept_bytes_of_each_family_are_those_of_differentiation(family):
    assert_kept_bytes_are_those_of_differentiation(small(family, dtype='bfloat16'))


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'bert', 'modernbert'])
def test_kept_bytes_of_shards_are_those_of_differentiation(family):
    assert_kept_bytes_are_those_of_differentiation(small(family, 'tiled'), sharded=True)


@pytest.mark.parametrize(('family', 'remat'), [
    ('gpt2', False), ('bert', True), ('gemma2', False)])
def test_kept_bytes_of_groups_are_those_of_differentiation(family, remat):
    net = dataclasses.replace(
        small(family, 'tiled', remat), architecture=compiled.architecture(family, tensor=2))
    assert_kept_bytes_are_those_of_differentiation(net, sharded=True, tensor=2)


@pytest.mark.parametrize(('attention', 'dtype', 'remat', 'sharded'), [
    ('dense', 'float32', False, False), ('tiled', 'float32', False, False),
    ('tiled', 'bfloat16', False, False), ('dense', 'bfloat16', True, False),
    ('tiled', 'bfloat16', True, False), ('tiled', 'float32', True, True),
    ('dense', 'float32', False, True)])
def test_kept_bytes_are_those_of_differentiation(attention, dtype, remat, sharded):
    # Norms on both sides of each branch, capped logits and two kinds of blocks.
    assert_kept_bytes_are_those_of_differentiation(
        small('gemma2', attention, remat, dtype), sharded)


@pytest.mark.parametrize(('activation', 'gated'), [
    ('relu', True), ('silu', False)])
def test_kept_bytes_of_activations_that_no_family_has(activation, gated):
    assert_kept_bytes_are_those_of_differentiation(RewardNetwork(
        dataclasses.replace(GROUPED, activation=activation, gated=gated),
        HeadConfig('quantile', 10), 'bfloat16', 'tiled'))


@pytest.fixture(scope='module')
def programs():
    """What XLA makes of a step on 8 devices, by layout of the state."""
    code, out, err = forks.run('tests.programs.compiled', STEPS.values(), simulated(8))
    assert code == 0, err
    found = json.loads(out)
    return {mode: found[key] for mode, key in STEPS.items()}


@pytest.mark.parametrize('mode', STEPS)
def test_work_is_that_of_the_compiled_step(programs, mode):
    assert programs[mode]['products'] == programs[mode]['predicted']['products']


@pytest.mark.parametrize('mode', STEPS)
def test_traffic_is_that_of_the_compiled_step(programs, mode):
    program, sent = programs[mode], programs[mode]['predicted']
    assert sent['all_gather'] == program['all-gather']
    # Together, as a sum over devices can be scattered by either, with as many bytes.
    assert sent['reduce_scatter'] + sent['all_to_all'] == (
        program['reduce-scatter'] + program['all-to-all'])
    assert program['collective-permute'] == 0
    # Metrics, the norm of the gradient and how often to go round are single numbers.
    assert 0 <= program['all-reduce'] - sent['all_reduce'] <= 2 * 20 * 4
    assert sent['all_reduce'] > 100 * 4


@pytest.mark.parametrize('mode', STEPS)
def test_memory_is_about_that_of_the_compiled_step(programs, mode):
    program, predicted = programs[mode], programs[mode]['predicted']
    assert 0 <= program['arguments'] - predicted['state'] < 5000  # the micro-batches
    assert predicted['temporary'] == pytest.approx(program['temporary'], rel=0.15)


def test_traffic_by_hand():
    """Two devices: each sends half of what is exchanged; floats have four bytes."""
    stacks = [(packing.Layout(4, 1, 1, 2), 3), (packing.Layout(2, 1, 1, 2), 1)]
    kernels, vectors, tables, head = costs.parameters(network())
    whole = costs.traffic(network(), stacks, 2, sharded=False)
    assert whole == (4 * (kernels + vectors + tables + head), 0, 0, 0)
    # Four micro-batches with 14 tokens in all: one block gathered twice in each and one once in
    # all, as is the head; indices of both devices for two tables, three arrays of 16 features.
    assert costs.traffic(network(), stacks, 2, sharded=True) == (
        4 * vectors, 2 * (4 * 2 * 2048 + 2048 + 160 + 14 * 2 * 2), 2 * 4 * (kernels + 160),
        2 * 14 * 3 * 16)
    assert costs.traffic(network(), stacks, 1, sharded=True) == (0, 0, 0, 0)
    # Of a decoder without a table of positions, one array less.
    rotary = dataclasses.replace(
        network(), architecture=dataclasses.replace(ARCHITECTURE, learned_positions=False))
    assert costs.traffic(rotary, stacks, 2, sharded=True) == (
        4 * vectors, 2 * (4 * 2 * 2048 + 2048 + 160 + 14 * 2), 2 * 4 * (kernels + 160),
        2 * 14 * 2 * 16)
    # In bfloat16 kernels are gathered in half as many bytes.
    half = costs.traffic(network(dtype='bfloat16'), stacks, 2, sharded=True)
    assert half.all_gather == 4 * 2 * 2048 + 2048 + 2 * (160 + 14 * 2 * 2)


def test_traffic_of_groups_by_hand():
    """Four devices in pairs, each sends half of what is exchanged between pairs or within one."""
    stacks = [(packing.Layout(4, 1, 1, 2), 3), (packing.Layout(2, 1, 1, 2), 1)]
    sent = costs.traffic(network(), stacks, 4, sharded=True, tensor=2)
    # Half of a block of 2,048, of its biases of 80 for columns, of embeddings' features. The head
    # is gathered from all four, its gradient scattered by halves.
    vectors = 2 * (40 + 32 + 64) + 32
    assert sent == (4 * vectors, 2 * (4 * 2 * 1024 + 1024 + 14 * 2 * 2) + 3 * 160,
                    2 * 4 * (2 * 1024 + 80), 2 * 14 * 3 * 8)
    # Of 14 tokens four sums in the first block, in the last one one, beside three at two reads of
    # each micro-batch; and what was looked up in two tables.
    rows = 4 * 14 + 14 + 3 * 8
    assert costs.group_traffic(network(), stacks, 4, tensor=2) == (
        4 * rows * 16, 2 * 14 * 2 * 16, 0, 0)
    # The first block's sum of attention once more, in half as many bytes.
    again = costs.group_traffic(network(remat=True, dtype='bfloat16'), stacks, 4, tensor=2)
    assert again.all_reduce == 2 * (rows + 14) * 16
    assert costs.group_traffic(network(), stacks, 4, tensor=1) == (0, 0, 0, 0)


def test_seconds_by_hand():
    machine = costs.Machine(flops=1e6, memory=1e9, bandwidth=1e5, group=2, link=1e4,
                            between=1e3)
    layout = packing.Layout(4, 1, 1, 2)
    stacks = [(layout, 2)]
    work = sum(costs.micro_batch_work(network(), layout))
    total = sum(costs.parameters(network()))
    settings = {'efficiency': 0.5}
    one = costs.step_seconds(network(), stacks, machine, **settings)
    # The optimiser touches a parameter nine times, a micro-batch a kernel's gradient three times.
    assert one == pytest.approx((2 * work / 5e5, 0, 4 * (9 * total + 6 * 4096) / 1e5, 0, 0))
    pmap = costs.step_seconds(network(), stacks, machine, devices=2, **settings)
    assert pmap == pytest.approx((*one[:4], 4 * total / 1e4))
    # Over two groups, a ring has the links of both of a group's members to leave it by.
    wide = costs.step_seconds(network(), stacks, machine, devices=4, **settings)
    assert wide.reduction == pytest.approx(2 * 3 / 4 * 4 * total / 2e3)
    sent = costs.traffic(network(), stacks, 4, sharded=True)
    fsdp = costs.step_seconds(network(), stacks, machine, devices=4, sharded=True, **settings)
    # Two of three other devices are in the other group.
    assert fsdp.exchange == pytest.approx(
        (sent.all_gather + sent.reduce_scatter) / 2e3
        + sent.all_to_all * (2 / 3 / 1e3 + 1 / 3 / 1e4))
    assert fsdp.longest - fsdp.shortest == pytest.approx(min(fsdp.products, fsdp.exchange))
    # Pairs are those of fast links; each of their devices is of a ring that has one link between.
    pairs = costs.step_seconds(network(), stacks, machine, devices=4, sharded=True, tensor=2,
                               **settings)
    sent, within = (costs.traffic(network(), stacks, 4, sharded=True, tensor=2),
                    costs.group_traffic(network(), stacks, 4, tensor=2))
    assert pairs.sums == pytest.approx(sum(within) / 1e4)
    assert pairs.exchange == pytest.approx(
        (sent.all_gather + sent.reduce_scatter + sent.all_to_all) / 1e3)
    # Products wait for sums, whatever is hidden.
    assert pairs.shortest == pytest.approx(
        max(pairs.products + pairs.sums, pairs.exchange) + pairs.update + pairs.reduction)


def test_a_benchmark_is_predicted_from_its_product():
    config = load_config('speed', **{
        'model.sizes.vocab_size': 300, 'model.sizes.max_positions': 64,
        'model.sizes.hidden_size': 16, 'model.sizes.num_layers': 2, 'model.sizes.num_heads': 2,
        'model.attention': 'dense',
        'data.max_length': 16, 'train.batch_size': 4, 'train.row_length': 64, 'train.rows': 2,
        'speed.repeats': 1, 'speed.steps': 2, 'speed.comparisons': 30,
        'speed.responses': 0})
    items = speed.synthetic(30, vocab_size=300, max_length=16, seed=0)
    layouts = packing.plan_layouts(items, row_length=64, rows=2)
    net = RewardNetwork(architecture(vocab_size=300, n_inner=64), HeadConfig('quantile', 10))
    work = [sum(costs.micro_batch_work(net, layouts[one.layout])) for number in (1, 2)
            for one in packing.pack(speed.training_items(config, items, number), layouts)]
    assert scaling.predicted(config, 1e9) == pytest.approx(2 * 4 * 1e9 / sum(work))


@pytest.mark.parametrize(('sharded', 'memory', 'fits'), [
    (False, 1000.0, True), (False, 999.0, False), (True, 1280.0, True), (True, 1279.0, False)])
def test_steps_under_fsdp_must_leave_room_for_what_is_held_longer(sharded, memory, fits):
    setting = scaling.Setting(1, sharded, 1, 1, False, costs.Memory(400, 300, 200, 100),
                              costs.Seconds(1.0, 0.0, 0.0, 0.0, 0.0))
    assert (scaling.fastest([setting], memory) is setting) == fits


def test_the_tables_of_the_documentation_are_those_printed():
    text = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')
    for title, table in scaling.tables().items():
        assert f'{title}:\n\n{table}\n' in text
