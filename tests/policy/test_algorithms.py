"""What is learnt from rollouts, by hand; and what a step makes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qrm.data import packing
from qrm.policy import algorithms, batches, optimise, runs
from qrm.policy.algorithms import Carried, Improvement, Rolled
from qrm.policy.batches import Extended
from qrm.policy.network import PolicyNetwork
from qrm.policy.objectives import Moments
from qrm.training import step
from tests.helpers import ARCHITECTURE, encoded, init, load_config, optimizer_config


def how(name, **changes):
    config = load_config('rl', name, **{f'algorithm.{key}': x for key, x in changes.items()})
    return optimise.algorithm(config)


# Two prompts, three responses each, of 1 to 3 tokens.
SIZES = np.array([[1, 2, 3], [3, 1, 2]])
MASK = np.arange(3) < SIZES[..., None]
REWARDS = np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 1.0]], np.float32)
TRUNCATED = np.array([[False, False, True], [False, True, False]])
LOG_PROBS = np.where(MASK, -1.0 - np.arange(18).reshape(2, 3, 3) / 10, 0).astype(np.float32)
REFERENCE = np.where(MASK, LOG_PROBS - 0.5, 0).astype(np.float32)  # .5 nats a token
VALUES = np.where(MASK, 0.25, 0).astype(np.float32)
ROLLED = Rolled(REWARDS, MASK, TRUNCATED, LOG_PROBS, REFERENCE, VALUES)


def shape(algorithm, carried=None):
    return algorithms.shape(ROLLED, carried or algorithms.start(algorithm), algorithm)


def test_groups_by_hand_with_the_kl_in_the_reward():
    shaped, carried, metrics = shape(how('rloo', truncated='keep', beta=2.0))
    rewards = REWARDS - 2.0 * 0.5 * SIZES
    expected = rewards - (rewards.sum(axis=1, keepdims=True) - rewards) / 2
    np.testing.assert_allclose(shaped.advantages, np.where(MASK, expected[..., None], 0), atol=1e-5)
    assert shaped.counts.all()
    assert (shaped.beta == 2.0).all()
    assert carried.beta == 2.0
    assert metrics['kl_to_reference'] == pytest.approx(0.5 * SIZES.mean())
    assert metrics['reward'] == pytest.approx(3.0)
    assert metrics['truncated'] == pytest.approx(1 / 3)


def test_grpo_with_and_without_the_deviation_of_the_group():
    plain, *_ = shape(how('grpo', truncated='keep', divide_by_std=False))
    np.testing.assert_allclose(plain.advantages[:, :, 0], [[-2, -1, 3], [1, 1, -2]], atol=1e-6)
    divided, *_ = shape(how('grpo', truncated='keep'))
    std = REWARDS.std(axis=1, keepdims=True)
    np.testing.assert_allclose(divided.advantages[:, :, 0], plain.advantages[:, :, 0] / std,
                               atol=1e-5)


def test_truncated_responses_are_penalised_left_out_or_kept():
    penalised, *_ = shape(how('grpo', divide_by_std=False, truncation_penalty=3.0))
    np.testing.assert_allclose(penalised.advantages[:, :, 0], [[-1, 0, 1], [2, -1, -1]], atol=1e-6)
    masked, carried, metrics = shape(how('grpo', divide_by_std=False, truncated='mask'))
    np.testing.assert_allclose(masked.advantages[:, :, 0], [[-0.5, 0.5, 0], [1.5, 0, -1.5]],
                               atol=1e-6)
    np.testing.assert_array_equal(masked.counts, ~TRUNCATED)
    assert metrics['counted'] == pytest.approx(4 / 6)
    assert (float(carried.scores.count), float(carried.scores.mean)) == (4.0, 2.0)


def test_ppo_by_hand():
    shaped, *_ = shape(how('ppo', truncated='keep', whiten=False, gae_lambda=1.0, beta=2.0))
    # -beta KL at each token, the reward at the last; returns are what is still to come.
    expected = np.where(MASK, REWARDS[..., None] - (SIZES[..., None] - np.arange(3)), 0)
    np.testing.assert_allclose(shaped.returns, expected, atol=1e-5)
    np.testing.assert_allclose(shaped.advantages, np.where(MASK, expected - 0.25, 0), atol=1e-5)
    whitened, *_ = shape(how('ppo', truncated='keep', gae_lambda=1.0, beta=2.0))
    assert whitened.advantages[MASK].mean() == pytest.approx(0, abs=1e-6)
    assert whitened.advantages[MASK].std() == pytest.approx(1, rel=1e-5)
    assert not whitened.advantages[~MASK].any()


def test_expert_iteration_counts_the_best_alone():
    shaped, *_ = shape(how('expert_iteration', truncated='mask'))
    np.testing.assert_array_equal(shaped.counts, [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(shaped.advantages, np.where(MASK, shaped.counts[..., None], 0))


@pytest.mark.parametrize('scale', algorithms.SCALES)
def test_rewards_are_scaled_by_what_is_said(scale):
    before = Moments(*np.float32([4.0, 1.0, 8.0]))
    shaped, carried, _ = shape(
        how('grpo', truncated='keep', divide_by_std=False, scale=scale, centre=True),
        Carried(np.float32(0.04), before))
    both = [1 + 2**0.5, 1 - 2**0.5, 1 + 2**0.5, 1 - 2**0.5, *REWARDS.ravel()]
    std = {'none': 1.0, 'batch': REWARDS.std(), 'running': np.std(both)}[scale]
    np.testing.assert_allclose(
        shaped.advantages[:, :, 0], np.array([[-2, -1, 3], [1, 1, -2]]) / std, atol=1e-5)
    assert float(carried.scores.std) == pytest.approx(np.std(both), rel=1e-5)


def test_beta_is_adapted_to_a_target():
    _, carried, metrics = shape(how('ppo', beta=0.5, kl_target=0.5, kl_horizon=60.0,
                                    truncated='keep'))
    # 1 nat a response is twice the target; the error is bounded by .2, and 6 responses count.
    assert metrics['kl_to_reference'] == pytest.approx(1.0)
    assert float(carried.beta) == pytest.approx(0.5 * (1 + 0.2 * 6 / 60))


@pytest.mark.parametrize(('changes', 'message'), [
    ({'kl_loss': 'k1'}, "kl_loss='k1' without kl_corrected"),
    ({'kl_loss': 'k2', 'kl_corrected': True}, "kl_loss='k2' with kl_corrected"),
    ({'kl_reward': ''}, 'beta=0.05 with neither'),
    ({'kl_target': 3.0, 'beta': 0.0}, 'kl_target=3.0 with beta=0'),
])
def test_settings_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        how('ppo', **changes)


# --- the step ------------------------------------------------------------------------------------

NET = PolicyNetwork(dataclasses.replace(ARCHITECTURE, num_layers=1), value=True)


def items(count=5, k=3, *, off=0.0, all_count=False):
    """Rollouts with random advantages; old log-probabilities are off by random numbers."""
    rng = np.random.default_rng(0)
    some = [encoded(i, int(rng.integers(1, 7)), rng.integers(1, 9, k), seed=i)
            for i in range(count)]
    some = [dataclasses.replace(item, prompt_sizes=(len(item.prompt),) * k) for item in some]
    known, = runs.log_probs(NET, random_params(), some, row_length=64, rows=2)

    def noise(n, scale=1.0):
        return rng.normal(0, scale, n).astype(np.float32)

    return [Extended(**vars(item) | {'extras': {
        'old_log_probs': [x + noise(len(x), off) for x in old],
        'reference_log_probs': [x + noise(len(x), 0.3) for x in old],
        **{name: [noise(len(x)) for x in old] for name in ('advantages', 'returns')},
        'old_values': [noise(len(x), 0.1) for x in old],
        'counts': np.float32(np.ones(k) if all_count else rng.integers(0, 2, k)),
        'beta': np.full(k, 0.1, np.float32)}}) for item, old in zip(some, known, strict=True)]


def random_params():
    leaves, tree = jax.tree.flatten(init(NET))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [leaf + 0.1 * jax.random.normal(key, leaf.shape)
                                     for leaf, key in zip(leaves, keys, strict=True)])


def one_step(algorithm, some, *, rows=2, params=None):
    """Parameters and metrics after a step of SGD with rate .1."""
    layout = packing.Layout(length=40, rows=rows, slots=8, responses=4)
    plan = batches.Plan((layout,), 8, algorithm.of_responses, algorithm.of_tokens)
    optimizer = step.make_optimizer(optimizer_config(), 1)
    state = step.init_state(params or random_params(), optimizer, 0)
    train_step = jax.jit(step.make_train_step(NET, Improvement(NET, algorithm), optimizer))
    state, metrics = train_step(state, batches.make_batch(some, plan, len(some)))
    return state.params, {name: float(value) for name, value in metrics.items()}


NAMES = ('old_log_probs', 'reference_log_probs', 'advantages', 'returns', 'old_values')


def alone(some):
    """Responses each in a row of its own: rows, name -> [N, T] extras, and which count [N]."""
    layout = packing.Layout(length=16, rows=1, slots=1, responses=1)
    places = [(item, k) for item in some for k in range(len(item.responses))]
    rows = [batches.policy_batch(packing.pack([dataclasses.replace(
        item, responses=item.responses[k:k + 1], preference=np.zeros((1, 1), np.float32),
        ratings=item.ratings[:1], prompt_sizes=item.prompt_sizes[:1])], [layout])[0].micro_batch, 8)
        for item, k in places]
    extras = {name: np.stack([np.pad(item.extras[name][k], (0, 8 - len(item.responses[k])))
                              for item, k in places]) for name in NAMES}
    return (jax.tree.map(lambda *x: np.stack(x), *rows), extras,
            np.array([item.extras['counts'][k] for item, k in places]))


def read_alone(params, rows):
    """Log-probabilities, entropies and values [N, T]."""
    found = jax.vmap(lambda row: NET.read(params, row, entropy=True))(rows)
    return [x[:, 0, 0] for x in found]


@jax.jit
def by_hand(params, rows, extras, weights):
    """A loss of tokens that weigh [N, T], by formulas of its own, and its gradient."""

    def loss(params):
        log_p, entropy, value = read_alone(params, rows)
        old, reference, gain, target, old_value = (extras[name] for name in NAMES)
        ratio, d = jnp.exp(log_p - old), log_p - reference
        losses = -jnp.minimum(ratio * gain, jnp.clip(ratio, 0.8, 1.2) * gain)
        losses += 0.1 * (jnp.exp(-d) - 1 + d)
        near = jnp.clip(value, old_value - 0.2, old_value + 0.2)
        losses += 0.3 * 0.5 * jnp.maximum((value - target)**2, (near - target)**2)
        return jnp.sum(weights * (losses - 0.05 * entropy))

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(('aggregation', 'rows'), [('token', 1), ('sequence', 8), ('constant', 8)])
def test_a_step_is_that_of_every_dialogue_alone(aggregation, rows):
    algorithm = how('ppo', kl_loss='k3', entropy_weight=0.05, value_weight=0.3,
                    aggregation=aggregation)
    some, params = items(off=0.3), random_params()
    alone_rows, extras, counts = alone(some)
    mask = alone_rows.mask[:, 0, 0] * counts[:, None]
    sizes, number = mask.sum(axis=1, keepdims=True), counts.sum()
    weights = {'token': mask / mask.sum(), 'sequence': mask / np.maximum(sizes, 1) / number,
               'constant': mask / 64 / number}[aggregation]
    value, gradient = by_hand(params, alone_rows, extras, weights)
    after, metrics = one_step(algorithm, some, rows=rows)
    assert metrics['loss'] == pytest.approx(float(value), rel=1e-4)
    assert metrics['gradient_norm'] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    assert metrics['tokens'] == mask.sum()
    assert 0 < metrics['clipped'] < 1
    jax.tree.map(lambda x, p, g: np.testing.assert_allclose(x, p - 0.1 * g, atol=2e-6),
                 after, params, gradient)


def test_without_clip_and_kl_ppo_is_the_policy_gradient():
    algorithm = how('ppo', clip_low=1.0, clip_high=1e9, kl_reward='', beta=0.0, value_weight=0.0)
    some, params = items(all_count=True), random_params()
    rows, extras, _ = alone(some)

    def return_of(params):
        return jnp.sum(extras['advantages'] * read_alone(params, rows)[0]) / rows.mask.sum()

    gradient = jax.jit(jax.grad(return_of))(params)
    after, metrics = one_step(algorithm, some)
    jax.tree.map(lambda x, p, g: np.testing.assert_allclose(x, p + 0.1 * g, atol=2e-6),
                 after, params, gradient)
    # The policy is still the one that sampled.
    assert metrics['ratio'] == pytest.approx(1.0, abs=1e-6)
    assert metrics['old_kl'] == pytest.approx(0, abs=1e-9)
    assert metrics['clipped'] == 0


def test_the_likelihood_of_the_best_reads_nothing_of_the_policy_that_sampled():
    algorithm, some = how('expert_iteration'), items(k=1, all_count=True, off=1.0)
    for item in some:
        item.extras['advantages'] = [np.ones(len(r), np.float32) for r in item.responses]
    known, = runs.log_probs(NET, random_params(), some, row_length=64, rows=2)
    _, metrics = one_step(algorithm, some)
    assert metrics['loss'] == pytest.approx(-np.mean(np.concatenate([x for x, in known])), rel=1e-5)
    assert not {'clipped', 'value_loss', 'kl_loss', 'entropy'} & Improvement(
        NET, algorithm).as_row(metrics).keys()


def test_groups_of_one_and_responses_that_do_not_count_teach_nothing():
    rolled = Rolled(*(x[:, :1] for x in ROLLED))
    algorithm = how('grpo', truncated='keep', beta=0.0, kl_loss='')
    shaped, *_ = algorithms.shape(rolled, algorithms.start(algorithm), algorithm)
    assert not shaped.advantages.any()
    assert shaped.counts.all()
    some = items()
    for item in some:
        item.extras['counts'][:] = 0
    after, metrics = one_step(how('ppo'), some)
    assert metrics['loss'] == metrics['gradient_norm'] == metrics['tokens'] == 0
    jax.tree.map(np.testing.assert_array_equal, after, random_params())
