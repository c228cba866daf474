"""A training step means the same however its comparisons are spread."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qrm.data import orders, packing
from qrm.models import sharding
from qrm.rewards import losses
from qrm.training import reward_objective, step
from tests.helpers import (
    encoded,
    init,
    loss_config,
    network,
    optimizer_config,
    random_comparisons,
    reward_step,
    side,
    single_batch,
)


def run(items, *, rows=2, steps=3, batch_size=9, net=None, loss=None, optimizer=None):
    """States and metrics of a few steps on one device."""
    net, loss = net or network(layers=1), loss or loss_config()
    optimizer = optimizer or step.make_optimizer(optimizer_config(), steps)
    layouts = packing.plan_layouts(items, row_length=32, rows=rows)
    state = step.init_state(init(net), optimizer, 0)
    train_step = jax.jit(reward_step(net, loss, optimizer))
    metrics = []
    for number in range(steps):
        indices = packing.batch_indices(number, seed=0, examples=len(items),
                                        batch_size=batch_size, total=len(items))
        batch = packing.make_batch([items[i] for i in indices], layouts, batch_size)
        state, values = train_step(state, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def assert_close(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


def test_micro_batches_do_not_change_a_step():
    items = random_comparisons(25, seed=2, responses=(2, 4))
    one, one_metrics = run(items, rows=40)
    many, many_metrics = run(items, rows=1)
    assert_close(one.params, many.params)
    for a, b in zip(one_metrics, many_metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_a_step_is_gradient_descent_on_the_weighted_mean_loss():
    items = [encoded(i, 3, (4, 5), seed=i, weight=w) for i, w in enumerate((1.0, 2.0, 0.5))]
    net, loss = network(layers=1), loss_config()
    params = init(net)
    layout = packing.Layout(length=40, rows=1, slots=3, responses=2)
    batch = packing.pack(items, [layout])[0].micro_batch

    def mean_loss(params):
        quantiles = net(params, batch)
        each = [losses.bradley_terry_quantile_huber(
            side(quantiles[i, 0]), side(quantiles[i, 1]), huber_weight=loss.huber_weight,
            kappa=loss.kappa, targets=loss.targets) for i in range(3)]
        return sum(w * x for w, x in zip(batch.weight[:3], each, strict=True)) / 3.5

    value, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    state, metrics = run(items, steps=1, batch_size=3)
    assert metrics[0]['loss'] == pytest.approx(float(value), rel=1e-5)
    assert metrics[0]['gradient_norm'] == pytest.approx(
        float(optax.tree.norm(gradient)), rel=1e-5)
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))


def test_metrics_of_a_batch_worked_out_by_hand():
    rewards = jnp.array([[2.0, -1.0], [0.5, 0.5], [0.0, 3.0], [9.0, 9.0]])
    first = jnp.array([[0.0, 1.0], [0.0, 0.0]])
    tie = jnp.array([[0.0, 0.5], [0.5, 0.0]])
    batch = packing.empty_micro_batch(packing.Layout(4, 1, 4, 2))._replace(
        present=jnp.array([[True, True], [True, True], [True, True], [False, False]]),
        preference=jnp.stack([first, first, tie, jnp.zeros((2, 2))]),
        weight=jnp.array([1.0, 1.0, 1.0, 0.0]))
    sums = reward_objective.sums_of(jnp.float32(6.0), rewards, batch)
    values = {name: float(x) for name, x in sums.metrics().items()}
    # Decided pairs: (2, -1) right, (.5, .5) half right; six rewards with sum 5, squares 14.5.
    assert values['pairs'] == 2.0
    assert values['accuracy'] == pytest.approx(0.75)
    assert values['margin'] == pytest.approx((3.0 + 0.0) / 2)
    assert values['loss'] == pytest.approx(2.0)
    assert values['reward_mean'] == pytest.approx(5 / 6)
    assert values['reward_std'] == pytest.approx(np.sqrt(14.5 / 6 - (5 / 6) ** 2), rel=1e-5)


def test_a_step_on_pairs_read_together_is_that_of_each_order_alone():
    """Ranked, tied and soft, packed beside each other; in float64 by hand from outputs alone."""
    known = [[[0, 1], [0, 0]], [[0, 0.5], [0.5, 0]], [[0, 0.7, 1], [0.3, 0, 0], [0, 0, 0]]]
    items = [encoded(i, 3 + i, [4 + n for n in range(len(k) * (len(k) - 1))], seed=i,
                     preference=orders.preference(np.array(k)), weight=1.0 + i)
             for i, k in enumerate(known)]
    net = network('pairwise', layers=1)
    _, metrics = run(items, steps=1, batch_size=3, net=net,
                     loss=losses.LossConfig('pairwise_cross_entropy'))
    params, total = init(net), 0.0
    apply = jax.jit(lambda params, batch: net(params, batch)[0, 0, 0])
    for item, k in zip(items, map(np.array, known), strict=True):
        each = []
        for response, (i, j) in zip(item.responses, orders.of(len(k)), strict=True):
            whole = dataclasses.replace(
                item, prompt=item.prompt[:0], preference=np.zeros((1, 1)), ratings=item.ratings[:1],
                responses=(np.concatenate([item.prompt, response]),))
            log_odds = 2.0 * float(apply(params, single_batch(whole, 24)))
            each.append((k[i, j] * np.log1p(np.exp(-log_odds))
                         + k[j, i] * np.log1p(np.exp(log_odds)), k[i, j] + k[j, i]))
        total += item.weight * np.sum([loss for loss, _ in each]) / np.sum([n for _, n in each])
    assert metrics[0]['loss'] == pytest.approx(total / 6.0, rel=1e-5)


def test_all_steps_of_a_run_compile_once():
    items = random_comparisons(40, seed=1, responses=(2, 4))
    net, loss = network(layers=1), loss_config()
    optimizer = step.make_optimizer(optimizer_config(), 6)
    layouts = packing.plan_layouts(items, row_length=24, rows=2)
    state = step.init_state(init(net), optimizer, 0)
    train_step = jax.jit(reward_step(net, loss, optimizer))
    for number in range(6):  # the last one is short
        indices = packing.batch_indices(number, seed=0, examples=40, batch_size=7, total=40)
        state, _ = train_step(
            state, packing.make_batch([items[i] for i in indices], layouts, 7))
    assert train_step._cache_size() == 1
    assert int(state.step) == 6


def test_dropout_changes_steps_and_repeats_for_a_seed():
    items = random_comparisons(9, seed=2, responses=(2, 3))
    plain, _ = run(items, steps=1)
    first, _ = run(items, steps=1, net=network(layers=1, dropout=0.3))
    second, _ = run(items, steps=1, net=network(layers=1, dropout=0.3))
    assert_close(first.params, second.params, 0.0)
    assert max(jax.tree.leaves(jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), first.params, plain.params))) > 1e-4


def test_language_model_loss_is_the_mean_over_the_chosen_response():
    item = encoded('a', 3, (4, 5), weight=2.0)
    net = network(layers=1)
    params = init(net)
    layout, = packing.plan_layouts([item], row_length=16, rows=1)
    batch = packing.pack([item], [layout])[0].micro_batch

    @jax.jit
    def hidden_and_loss(params):
        hidden = net.hidden(params, batch, net.embed(params, batch), everywhere=True)
        return hidden.tokens, net.language_model_loss(params, batch, hidden.tokens)

    hidden, value = hidden_and_loss(params)
    predicting = hidden[0, 2:6]  # last prompt token and three of the response
    log_probs = jax.nn.log_softmax(predicting @ params['backbone']['tokens'].T)
    expected = -2.0 * np.mean([log_probs[i, t] for i, t in enumerate(item.responses[0])])
    assert float(value) == pytest.approx(expected, rel=1e-5)
    with_lm, without = (
        run([item], steps=1, batch_size=1, loss=loss_config(lm_weight=w))[1][0]['loss']
        for w in (0.5, 0.0))
    assert with_lm - without == pytest.approx(0.5 * expected / 2.0, rel=1e-4)


def one_batch(items):
    layouts = packing.plan_layouts(items, row_length=32, rows=2)[:1]
    return packing.make_batch(items, layouts, len(items))


def test_the_teacher_is_the_moving_average_of_the_parameters():
    items = random_comparisons(5, seed=2, responses=(2, 3))
    net, optimizer = network(layers=1), optax.sgd(0.5)
    loss = loss_config(targets='teacher', ema_decay=0.75)
    train_step = reward_step(net, loss, optimizer)
    compiled, batch = jax.jit(train_step), one_batch(items)
    start = step.init_state(init(net), optimizer, 0, teacher=True)
    first, _ = compiled(start, batch)
    second, metrics = compiled(first, batch)
    average = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start.params, first.params)
    assert_close(start.teacher, start.params, 0.0)
    assert_close(first.teacher, average)
    assert_close(second.teacher, jax.tree.map(
        lambda a, b: 0.75 * a + 0.25 * b, average, second.params))
    assert float(optax.tree.norm(jax.tree.map(
        jnp.subtract, first.teacher, first.params))) > 1e-3
    # The second step's targets are the first one's average, not its parameters.
    single = packing.pack(items, [packing.Layout(200, 1, 5, 2)])[0].micro_batch
    outputs = jax.jit(net)
    student, targets = (outputs(p, single) for p in (first.params, average))
    pair = functools.partial(losses.bradley_terry_quantile_huber, huber_weight=loss.huber_weight,
                             kappa=loss.kappa, targets='teacher')
    expected = np.mean([
        pair(*(side(student[i, k], jnp.mean(targets[i, k])) for k in range(2)))
        for i in range(5)])
    assert float(metrics['loss']) == pytest.approx(float(expected), rel=1e-5)
    # Over a mesh too, the state keeps its shape.
    on_mesh = jax.eval_shape(
        functools.partial(train_step, mesh=sharding.make_mesh()), start,
        jax.tree.map(lambda x: x[None], batch))[0]
    assert jax.tree.map(jnp.shape, on_mesh) == jax.tree.map(jnp.shape, start)


def test_implicit_quantiles_learn_at_other_levels_each_step_and_repeat_for_a_seed():
    net, optimizer = network('implicit_quantile', layers=1), optax.sgd(0.0)
    batch = one_batch(random_comparisons(5, seed=2, responses=(2, 3)))
    config = losses.LossConfig('distributional_bradley_terry')
    compiled = jax.jit(reward_step(net, config, optimizer))
    # Larger than at the start, so that rewards depend on levels.
    params = jax.tree.map(lambda x: 10.0 * x, init(net)['head'])
    params = init(net) | {'head': params}

    def run_seed(seed):
        state, found = step.init_state(params, optimizer, seed), []
        for _ in range(3):
            state, metrics = compiled(state, batch)
            found.append(float(metrics['loss']))
        return found

    # Parameters do not move, and the batch is the same.
    first, again, other = run_seed(0), run_seed(0), run_seed(1)
    assert first == again
    assert len({*first, *other}) == 6


@pytest.mark.parametrize(('name', 'expected'), [
    # 100 steps, peak 1, warm-up of 10 steps; values at steps 0, 9, 10, 55 and 100.
    ('constant', [0.1, 1.0, 1.0, 1.0, 1.0]),
    ('linear', [0.1, 1.0, 1.0, 0.6, 0.2]),
    ('cosine', [0.1, 1.0, 1.0, 0.6, 0.2]),
    ('inverse_sqrt', [0.1, 1.0, 1.0, np.sqrt(10 / 55), np.sqrt(10 / 100)]),
])
def test_schedules(name, expected):
    config = optimizer_config(learning_rate=1.0, schedule=name, warmup_fraction=0.1,
                              final_fraction=0.2)
    schedule = step.make_schedule(config, 100)
    values = [float(schedule(s)) for s in (0, 9, 10, 55, 100)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_warm_up_from_a_floor():
    # As in MOSS-RLHF: max(step / warm-up, 1/10), then the inverse square root.
    schedule = step.make_schedule(optimizer_config(
        learning_rate=2.0, schedule='inverse_sqrt', warmup_fraction=0.2, warmup_floor=0.1), 200)
    values = [float(schedule(s)) for s in (0, 3, 4, 19, 39, 40, 160)]
    np.testing.assert_allclose(values, [0.2, 0.2, 0.25, 1.0, 2.0, 2.0, 1.0], rtol=1e-5)


def test_schedule_without_warmup_starts_at_the_peak():
    schedule = step.make_schedule(optimizer_config(learning_rate=2.0, schedule='linear'), 4)
    np.testing.assert_allclose([float(schedule(s)) for s in range(5)], [2, 1.5, 1, 0.5, 0])


def test_weight_decay_acts_on_matrices_only():
    mask = step.decays(init(network(layers=1)))
    decayed = {jax.tree_util.keystr(path) for path, yes in
               jax.tree_util.tree_leaves_with_path(mask) if yes}
    assert "['head']['kernel']" in decayed
    assert "['backbone']['tokens']" in decayed
    assert len(decayed) == 7  # tokens, positions, head and four kernels of a block
    assert not any('norm' in name or 'bias' in name for name in decayed)


def test_clipping_bounds_the_update():
    items = random_comparisons(9, seed=2, responses=(2, 3))
    config = optimizer_config(clip_norm=0.01)
    state, metrics = run(items, steps=1, optimizer=step.make_optimizer(config, 1))
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, init(network(layers=1))))
    assert metrics[0]['gradient_norm'] > 0.01
    assert float(moved) == pytest.approx(0.1 * 0.01, rel=1e-3)
