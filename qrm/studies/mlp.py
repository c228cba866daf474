"""The smallest reward model: a perceptron on features, with all heads and losses.

It stands in for the language model where rewards are known, in `worlds`: what comes after the
trunk, `heads` and `losses`, is the same code. Networks are trained together, one for each seed
and data set, in one compiled loop.

Axes: S seeds, E networks of an ensemble, n comparisons, K items of each, D features, m items.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qrm.rewards import distributions, heads, losses
from qrm.rewards.distributions import Distribution
from qrm.rewards.heads import HeadConfig
from qrm.rewards.losses import Judgement, LossConfig
from qrm.studies.worlds import Pairs

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """What to train.

    Attributes:
      head: on top of the trunk.
      loss: that trains it.
      networks: E, whole networks that are trained each by itself and pooled (Lakshminarayanan et
        al. 2017); they see the same comparisons in other orders.

    Raises:
      ValueError: a loss that cannot train the head, or no network.
    """

    head: HeadConfig
    loss: LossConfig
    networks: int = 1

    def __post_init__(self):
        losses.check_head(self.loss, self.head)
        if self.networks < 1:
            raise ValueError(f'networks={self.networks}, expected at least 1')


@dataclasses.dataclass(frozen=True)
class Training:
    """How to train: Adam, the rate falling to 0 along a cosine.

    Attributes:
      steps: of the optimiser.
      batch_size: comparisons of a step, drawn with replacement.
      learning_rate: at the start.
      width: of both hidden layers.
    """

    steps: int
    batch_size: int = 512
    learning_rate: float = 1e-2
    width: int = 64


class Comparisons(NamedTuple):
    """What is learnt from.

    Attributes:
      x: [..., n, K, D] float32 items.
      judgement: of each, with leading axes [..., n].
    """

    x: jax.Array
    judgement: Judgement


def comparisons(pairs: Pairs, ratings: np.ndarray | None = None) -> Comparisons:
    """Pairs of a world, whose preferred item is the first, for the trainer.

    Args:
      pairs: n of them.
      ratings: [n, 2] of both items, NaN where there is none; without, only choices are observed.
    """
    n = len(pairs.x)
    if ratings is None:
        ratings = np.full((n, 2), np.nan, np.float32)
    preference = np.broadcast_to(np.array([[0, 1], [0, 0]], np.float32), (n, 2, 2))
    return Comparisons(pairs.x, Judgement(
        preference, np.zeros(n, np.float32), ratings[..., None], pairs.annotators))


def anchors(x: np.ndarray, rewards: np.ndarray) -> Comparisons:
    """One rated item of each annotator, [A, D] and [A], and no choice: K = 1."""
    count = len(x)
    return Comparisons(x[:, None], Judgement(
        np.zeros((count, 1, 1), np.float32), np.zeros(count, np.float32),
        np.asarray(rewards, np.float32)[:, None, None], np.arange(count, dtype=np.int32)))


def stack(each: list[Comparisons]) -> Comparisons:
    """Comparisons of S seeds, equally many, with a leading axis S."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *each)


def init(head: HeadConfig, width: int, features: int, key: jax.Array) -> Params:
    """Parameters of one network."""
    first, second, last = jax.random.split(key, 3)
    return {
        'layers': [
            {'kernel': jax.random.normal(k, (size, width)) / math.sqrt(size),
             'bias': jnp.zeros(width)}
            for k, size in ((first, features), (second, width))
        ],
        'head': heads.init(head, last, width),
    }


def apply(
    head: HeadConfig, params: Params, x: jax.Array, levels: jax.Array | None = None
) -> jax.Array:
    """Raw outputs [..., outputs] of one network for items [..., D]; `levels` as `heads.apply`."""
    for layer in params['layers']:
        x = jax.nn.gelu(x @ layer['kernel'] + layer['bias'])
    return heads.apply(head, params['head'], x, levels=levels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
    model: Model, training: Training, data: Comparisons, keys: jax.Array,
    always: Comparisons | None = None,
) -> Params:
    """Trains E networks on each of S sets of comparisons.

    Args:
      model: what.
      training: how.
      data: with leading axes [S, n].
      keys: [S] random keys, of parameters and batches.
      always: [S, c] more of them, all of which are in every step, with a mean of their own:
        anchors.

    Returns:
      Parameters with leading axes [S, E].
    """
    own = jax.vmap(lambda key: jax.random.split(key, model.networks))(keys)
    one = functools.partial(_train_one, model, training)
    return jax.vmap(jax.vmap(one, in_axes=(None, None, 0)))(data, always, own)


@functools.partial(jax.jit, static_argnums=0)
def predict(model: Model, params: Params, x: jax.Array) -> Distribution:
    """Distributions [S, m] of the rewards of items [m, D], those of E networks in equal parts."""
    each = jax.vmap(jax.vmap(lambda p: model.head.read(apply(model.head, p, x)).distribution))
    return distributions.pool(jax.tree.map(lambda a: jnp.moveaxis(a, 1, 2), each(params)))


@functools.partial(jax.jit, static_argnums=0)
def quantiles(model: Model, params: Params, x: jax.Array) -> jax.Array:
    """[S, m, N] at `model.head.taus`; those of one network with a free head may cross."""
    if model.networks > 1:
        return predict(model, params, x).quantile(jnp.asarray(model.head.taus))
    each = jax.vmap(lambda p: model.head.quantiles(apply(model.head, p, x)))
    return each(jax.tree.map(lambda a: a[:, 0], params))


def _train_one(
    model: Model, training: Training, data: Comparisons, always: Comparisons | None,
    key: jax.Array,
) -> Params:
    """Parameters of one network, trained on [n] comparisons."""
    chex.assert_rank(data.x, 3)
    schedule = optax.cosine_decay_schedule(training.learning_rate, training.steps)
    optimizer = optax.adam(schedule, b2=0.99)
    of_init, of_steps = jax.random.split(key)
    params = init(model.head, training.width, data.x.shape[-1], of_init)

    def step(carry: tuple[Params, Any, Params | None], number: jax.Array):
        params, state, teacher = carry
        of_batch, of_levels = jax.random.split(jax.random.fold_in(of_steps, number))
        rows = jax.random.randint(of_batch, (training.batch_size,), 0, len(data.x))
        batch = jax.tree.map(lambda a: a[rows], data)

        def loss(params: Params) -> jax.Array:
            total = _loss(model, params, teacher, batch, of_levels)
            if always is not None:
                total += _loss(model, params, teacher, always, of_levels)
            return total

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        if teacher is not None:
            teacher = optax.incremental_update(params, teacher, 1.0 - model.loss.ema_decay)
        return (params, state, teacher), None

    teacher = params if model.loss.has_teacher else None
    carry = (params, optimizer.init(params), teacher)
    return jax.lax.scan(step, carry, jnp.arange(training.steps))[0][0]


def _loss(
    model: Model, params: Params, teacher: Params | None, data: Comparisons, key: jax.Array
) -> jax.Array:
    """Mean loss of [n] comparisons."""
    head, levels = model.head, None
    if head.name == 'implicit_quantile':  # learns at levels that are drawn
        levels = heads.random_levels(key, data.x.shape[:2], head.num_quantiles)
    reward = head.read(apply(head, params, data.x, levels), levels)
    means = None if teacher is None else head.read(apply(head, teacher, data.x)).members.mean
    each = jax.vmap(functools.partial(losses.comparison_loss, model.loss))
    return jnp.mean(each(reward, data.judgement, means))
