"""The network's short cuts change nothing: pruning, scans, recomputation, packing itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qrm.data import packing
from qrm.models import families, transformer
from qrm.models.network import RewardNetwork
from qrm.models.tuning import stack_blocks, unstack_blocks
from qrm.rewards.heads import HeadConfig
from qrm.training import step
from tests.helpers import ARCHITECTURE, encoded, init, loss_config, reward_step
from tests.helpers import network as small_network

# Pairs and rankings of any weight and margin, one of them without a prompt.
ITEMS = [
    encoded('a', 5, (4, 7), seed=1, weight=2.0, margin=0.3),
    encoded('b', 0, (6, 2, 3), seed=2),
    encoded('c', 9, (3, 1), seed=3, weight=0.5),
    encoded('d', 2, (12, 9, 1), seed=4, margin=-0.2),
]
LAYOUT = packing.Layout(length=40, rows=2, slots=4, responses=3)


@pytest.fixture(scope='module')
def params():
    """Far from the initial ones, at which attention is all but uniform and biases are 0."""
    leaves, tree = jax.tree.flatten(init(small_network('scalar')))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)])


@pytest.fixture(scope='module')
def batch():
    packed, = packing.pack(ITEMS, [LAYOUT])
    return packed.micro_batch


@pytest.fixture(scope='module')
def outgoing(batch):
    """What multiplies each reward, 0 where there is none."""
    return np.random.default_rng(0).normal(size=batch.present.shape) * batch.present


def rewards_and_gradient(net, params, batch, outgoing, *, everywhere=False, key=None):
    """Rewards [C, K], and the gradient of their sum weighted with `outgoing`."""

    @jax.jit
    def run(params, batch):
        def total(params):
            embedded = net.embed(params, batch)
            hidden = net.hidden(params, batch, embedded, key, everywhere=everywhere)
            rewards = net.head.read(net.outputs(params, hidden)).distribution.mean
            return jnp.sum(jnp.where(batch.present, rewards * outgoing, 0.0)), rewards

        gradient, rewards = jax.grad(total, has_aux=True)(params)
        return rewards, gradient

    rewards, gradient = run(params, batch)
    return np.where(batch.present, rewards, 0.0), gradient


def assert_same_gradient(actual, expected, tolerance=1e-5):
    """Leaf by leaf, in units of its largest element, or of 1% of the largest of all leaves.

    Some are 0 but for rounding: a constant added to all rewards changes no preference.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(expected), strict=True)
    least = 0.01 * max(np.max(np.abs(leaf)) for leaf in leaves)
    for path, x, reference in zip(paths, jax.tree.leaves(actual), leaves, strict=True):
        scale = max(np.max(np.abs(reference)), least)
        np.testing.assert_allclose(np.asarray(x) / scale, np.asarray(reference) / scale, rtol=0,
                                   atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope='module')
def expected(params, batch, outgoing):
    """Without any short cut: dense attention, a scan, and all tokens through all of it."""
    net = small_network('scalar', attention='dense')
    return rewards_and_gradient(net, params, batch, outgoing, everywhere=True)


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('unstacked', [False, True])
@pytest.mark.parametrize('attention', ['dense', 'tiled'])
def test_short_cuts_change_nothing(
    params, batch, outgoing, expected, attention, unstacked, remat
):
    net = small_network('scalar', attention=attention, remat=remat)
    params = unstack_blocks(params) if unstacked else params
    rewards, gradient = rewards_and_gradient(net, params, batch, outgoing)
    gradient = stack_blocks(gradient) if unstacked else gradient
    np.testing.assert_allclose(rewards, expected[0], rtol=0, atol=1e-5)
    assert_same_gradient(gradient, expected[1])


@pytest.mark.parametrize('layers', [1, 2])
def test_dropout_is_the_same_with_and_without_a_scan(batch, outgoing, layers):
    net = small_network('scalar', layers=layers, dropout=0.3)
    params, key = init(net), jax.random.key(3)
    rewards, gradient = rewards_and_gradient(net, params, batch, outgoing, key=key)
    other, unstacked = rewards_and_gradient(
        net, unstack_blocks(params), batch, outgoing, key=key)
    np.testing.assert_allclose(other, rewards, rtol=0, atol=1e-5)
    assert_same_gradient(stack_blocks(unstacked), gradient)
    without, _ = rewards_and_gradient(net, params, batch, outgoing)
    assert np.max(np.abs(without - rewards)) > 1e-2


def test_unstacked_blocks_stack_again(params):
    unstacked = unstack_blocks(params)
    blocks = params['backbone']['blocks']
    assert len(unstacked['backbone']['blocks']) == ARCHITECTURE.num_layers
    for i, block in enumerate(unstacked['backbone']['blocks']):
        np.testing.assert_array_equal(
            block['mlp']['up']['kernel'], blocks['mlp']['up']['kernel'][i:i + 1])
    stacked = stack_blocks(unstacked)
    assert jax.tree.structure(stacked) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, stacked, params)


# What a head reads.

PROMPTS = {'a': (5, 4), 'b': (0, 0, 0), 'c': (9, 11), 'd': (1, 2, 2)}  # sizes of prompts alone
SIZED = [dataclasses.replace(item, prompt_sizes=PROMPTS[item.id]) for item in ITEMS]


def states_alone(net, params, dialogue):
    """Hidden states [L, D] of one dialogue after its first block, and after the final norm."""
    transformer = net.transformer
    tokens = jnp.asarray(dialogue)[None]
    places = jnp.arange(len(dialogue))[None]
    contexts = transformer.contexts(jnp.ones_like(tokens), jnp.zeros_like(tokens), places, 'dense')
    embedded = transformer.embed(params['backbone'], tokens, places)
    final, (first,) = transformer(params['backbone'], embedded, contexts, taps=(1,))
    return np.asarray(first[0], np.float64), np.asarray(final[0], np.float64)


def reads_of(net, params, batch):
    return jax.jit(lambda p, b: net.hidden(p, b, net.embed(p, b)))(params, batch)


@pytest.mark.parametrize('reads', [
    ('mean',), ('dialogue',), ('last', 'mean'), ('mean@1', 'last'), ('last@1', 'dialogue@1')])
def test_reads_are_those_of_dialogues_alone(params, reads):
    net = dataclasses.replace(small_network('scalar'), head=HeadConfig('scalar', reads=reads))
    packed, = packing.pack(SIZED, [LAYOUT])
    found = np.asarray(reads_of(net, params, packed.micro_batch).responses)
    assert found.shape[-1] == 16 * len(reads) == net.width
    for slot, index in enumerate(packed.indices):
        item = SIZED[index]
        for k, response in enumerate(item.responses):
            dialogue = np.r_[item.prompt, response]
            first, final = states_alone(net, params, dialogue)
            # A response without a token of its own starts at the last one.
            start = min(item.prompt_sizes[k], len(dialogue) - 1)
            expected = []
            for read in reads:
                place, _, block = read.partition('@')
                states = first if block else final
                state = {'last': states[-1], 'mean': states[start:].mean(axis=0),
                         'dialogue': states.mean(axis=0)}[place]
                expected.append(state / np.sqrt(np.mean(state**2)) if block else state)
            np.testing.assert_allclose(found[slot, k], np.concatenate(expected), rtol=0, atol=2e-5)


def test_an_encoder_is_read_at_its_first_token():
    settings = {'model_type': 'bert', 'vocab_size': 50, 'max_position_embeddings': 64,
                'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2,
                'intermediate_size': 24}
    net = RewardNetwork(families.architecture(settings),
                                HeadConfig('scalar', reads=('first', 'dialogue')))
    params = jax.jit(net.init)(jax.random.key(0))
    items = [dataclasses.replace(item, prompt=item.prompt[:0], responses=tuple(
        np.r_[item.prompt, response] for response in item.responses)) for item in SIZED]
    layout = packing.Layout(length=64, rows=2, slots=4, responses=3)
    packed, = packing.pack(items, [layout])
    found = np.asarray(reads_of(net, params, packed.micro_batch).responses)
    pool = net.transformer.pool
    for slot, index in enumerate(packed.indices):
        for k, dialogue in enumerate(items[index].responses):
            _, final = states_alone(net, params, dialogue)
            expected = [pool(params['backbone'], jnp.asarray(state, jnp.float32))
                        for state in (final[0], final.mean(axis=0))]
            np.testing.assert_allclose(found[slot, k], np.concatenate(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize(('reads', 'message'), [
    (('first',), "'first': the first token of a decoder"),
    (('last@2',), 'reads after block 2, expected less than the 2 that there are')])
def test_reads_that_a_backbone_does_not_have(reads, message):
    with pytest.raises(ValueError, match=message):
        RewardNetwork(ARCHITECTURE, HeadConfig('scalar', reads=reads))


# The two gradients that are written out by hand.


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('leading', [(6,), (2, 3), (2, 1, 3)])
def test_gradient_of_a_projection_is_that_of_a_product(leading, dtype):
    rng = np.random.default_rng(0)
    x, kernel, outgoing = (jnp.asarray(rng.normal(size=shape), dtype)
                           for shape in ((*leading, 4), (4, 5), (*leading, 5)))

    def product(x, kernel):
        return jnp.einsum('...d,df->...f', x, kernel, precision=jax.lax.Precision.HIGHEST)

    out, pull = jax.vjp(transformer._project, x, kernel)
    expected, pull_expected = jax.vjp(product, x, kernel)
    # Sums of at most 6 products, rounded once to bfloat16's 8 bits.
    tolerance = 1e-6 if dtype == jnp.float32 else 2.0**-7
    for actual, reference in zip((out, *pull(outgoing)), (expected, *pull_expected(outgoing)),
                                 strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual.astype(jnp.float32), reference.astype(jnp.float32),
                                   rtol=tolerance, atol=tolerance)


def test_embedding_gradient_is_added_up(params):
    net = small_network('scalar')
    # Tokens and positions that repeat, within a row and between rows.
    batch = packing.empty_micro_batch(packing.Layout(4, 2, 1, 1))._replace(
        tokens=np.array([[3, 3, 7, 0], [7, 3, 49, 0]]),
        positions=np.array([[0, 1, 2, 0], [0, 1, 1, 0]]))
    outgoing = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 16)), jnp.float32)
    _, pull = jax.vjp(lambda p: net.embed(p, batch), params)
    expected = jax.tree.map(jnp.add, params, pull(outgoing)[0])
    actual = jax.jit(net.add_embedding_gradient)(params, batch, outgoing)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
                 actual, expected)
    # By hand: token 3 stands at three places.
    np.testing.assert_allclose(
        actual['backbone']['tokens'][3] - params['backbone']['tokens'][3],
        outgoing[0, 0] + outgoing[0, 1] + outgoing[1, 1], rtol=0, atol=1e-5)


# A whole training step.


def plain_hidden(params, tokens):
    """GPT-2 on one dialogue, [L] -> [L, D]: no packing, no tiles, none of the code under test."""
    p, heads = params['backbone'], ARCHITECTURE.num_heads

    def norm(x, layer):
        centred = x - x.mean(-1, keepdims=True)
        spread = jnp.sqrt((centred**2).mean(-1, keepdims=True) + ARCHITECTURE.norm_epsilon)
        return centred / spread * layer['scale'] + layer['bias']

    def dense(x, layer):
        return x @ layer['kernel'] + layer['bias']

    def gelu(x):
        return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    n = len(tokens)
    x = p['tokens'][tokens] + p['positions'][:n]
    for i in range(ARCHITECTURE.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p['blocks'])
        qkv = dense(norm(x, layer['attention_norm']), layer['attention']['qkv'])
        q, k, v = (part.reshape(n, heads, -1) for part in jnp.split(qkv, 3, axis=1))
        logits = jnp.einsum('qhe,khe->hqk', q, k) / np.sqrt(q.shape[-1])
        logits = jnp.where(np.tri(n, dtype=bool), logits, -jnp.inf)
        mixed = jnp.einsum('hqk,khe->qhe', jax.nn.softmax(logits, axis=-1), v)
        x = x + dense(mixed.reshape(n, -1), layer['attention']['output'])
        x = x + dense(gelu(dense(norm(x, layer['mlp_norm']), layer['mlp']['up'])),
                      layer['mlp']['down'])
    return norm(x, p['norm'])


def plain_loss(params, items, lm_weight):
    """Weighted mean of Bradley-Terry losses, each the mean over the pairs of a ranking."""
    dialogues = [np.r_[item.prompt, response] for item in items for response in item.responses]
    # What stands after a token changes nothing, so that one length serves all.
    length = max(map(len, dialogues))
    padded = np.stack([np.pad(dialogue, (0, length - len(dialogue))) for dialogue in dialogues])
    states = iter(jax.vmap(plain_hidden, in_axes=(None, 0))(params, padded))
    total = 0.0
    for item in items:
        rewards, prompt = [], len(item.prompt)
        for number, response in enumerate(item.responses):
            hidden = next(states)[:prompt + len(response)]
            rewards.append(hidden[-1] @ params['head']['kernel'][:, 0])
            if lm_weight and number == 0:  # the best of the ranking
                # Without a prompt nothing predicts the first token.
                predicting = hidden[max(prompt - 1, 0):-1]
                log_probs = jax.nn.log_softmax(predicting @ params['backbone']['tokens'].T)
                targets = response[len(response) - len(predicting):]
                picked = log_probs[np.arange(len(targets)), targets]
                total -= lm_weight * item.weight * jnp.mean(picked)
        pairs = [jnp.log1p(jnp.exp(worse - better + item.margin))
                 for i, better in enumerate(rewards) for worse in rewards[i + 1:]]
        total += item.weight * sum(pairs) / len(pairs)
    return total / sum(item.weight for item in items)


@pytest.fixture(scope='module')
def plain(params):
    @functools.cache
    def run(lm_weight):
        return jax.jit(jax.value_and_grad(
            lambda params: plain_loss(params, ITEMS, lm_weight)))(params)

    return run


def step_gradient(net, params, lm_weight):
    """Loss and gradient of a training step; comparisons are spread over two micro-batches."""
    optimizer = optax.sgd(1.0)
    train_step = jax.jit(reward_step(
        net, loss_config('scalar', lm_weight=lm_weight), optimizer))
    micro_batches = [packing.pack(items, [LAYOUT])[0].micro_batch
                     for items in (ITEMS[:3], ITEMS[3:])]
    unused = packing.empty_micro_batch(LAYOUT)
    stack = packing.Stack(np.int32(2), jax.tree.map(lambda *x: np.stack(x), *micro_batches, unused))
    state, metrics = train_step(step.init_state(params, optimizer, 0), (stack,))
    return metrics['loss'], jax.tree.map(jnp.subtract, params, state.params)


@pytest.mark.parametrize(('attention', 'lm_weight'), [
    ('dense', 0.0), ('tiled', 0.0), ('tiled', 0.5), ('pallas', 0.0)])
def test_a_step_is_that_of_dialogues_alone(params, plain, attention, lm_weight):
    value, gradient = plain(lm_weight)
    loss, actual = step_gradient(small_network('scalar', attention=attention), params, lm_weight)
    assert float(loss) == pytest.approx(float(value), rel=1e-5)
    assert_same_gradient(actual, gradient, tolerance=2e-5)


def test_a_step_that_recomputes_blocks_does_not_store_them():
    # Eight blocks on 4 x 64 tokens: stored, their activations are most of the memory.
    unused = packing.empty_micro_batch(packing.Layout(64, 4, 4, 2))
    stack = packing.Stack(np.int32(1), jax.tree.map(lambda x: x[None], unused))
    optimizer = optax.sgd(1.0)

    def bytes_needed(**kwargs):
        net = small_network('scalar', layers=8, attention='dense', **kwargs)
        state = jax.eval_shape(
            lambda: step.init_state(net.init(jax.random.key(0)), optimizer, 0))
        train_step = jax.jit(reward_step(net, loss_config('scalar'), optimizer))
        compiled = train_step.lower(state, (stack,)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_needed(remat=True) < 0.5 * bytes_needed(remat=False)


@pytest.mark.parametrize('attention', ['dense', 'tiled'])
def test_a_step_in_bfloat16_stays_near_float32(params, plain, attention):
    value, gradient = plain(0.0)
    net = small_network('scalar', attention=attention, dtype='bfloat16')
    loss, actual = step_gradient(net, params, 0.0)
    assert float(loss) == pytest.approx(float(value), rel=0.02)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, actual, gradient))
    assert 1e-4 < float(difference / optax.tree.norm(gradient)) < 0.05
