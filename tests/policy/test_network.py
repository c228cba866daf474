"""What a policy says of packed responses is what it says of every dialogue alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.data import packing
from qrm.models import likelihood
from qrm.models.families import FAMILIES
from qrm.policy import batches
from qrm.policy.network import PolicyNetwork
from tests.helpers import ARCHITECTURE, encoded, init, lora
from tests.programs import compiled

DECODERS = [name for name in FAMILIES if name not in ('bert', 'modernbert')]


def sized(item, sizes):
    return dataclasses.replace(item, prompt_sizes=sizes)


# One without a prompt, whose first tokens nothing predicts; one whose prompts end later than what
# is shared; responses of one token.
ITEMS = [
    sized(encoded('a', 5, (4, 7), seed=1, weight=2.0), (5, 6)),
    sized(encoded('b', 0, (6, 2, 3), seed=2), (0, 0, 1)),
    sized(encoded('c', 9, (3, 1), seed=3, weight=0.5), (9, 9)),
    sized(encoded('d', 2, (12, 9, 1), seed=4), (2, 4, 2)),
]
LAYOUT = packing.Layout(length=40, rows=2, slots=5, responses=4)


def packed():
    one, = packing.pack(ITEMS, [LAYOUT])
    return jax.tree.map(jnp.asarray, batches.policy_batch(one.micro_batch, LONGEST)), one.indices


def random_params(net, scale=0.3):
    leaves, tree = jax.tree.flatten(init(net))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [leaf + scale * jax.random.normal(key, leaf.shape)
                                     for leaf, key in zip(leaves, keys, strict=True)])


RESPONSES = [(i, k) for i, item in enumerate(ITEMS) for k in range(len(item.responses))]
LONGEST = 16  # T


def alone(net, params):
    """Log-probabilities, entropies and values [N, T] of responses, each dialogue in its own row.

    What stands behind a dialogue in its row, no token of it sees.
    """
    transformer, length = net.transformer, 24
    tokens, before, place = (np.zeros((len(RESPONSES), n), np.int32)
                             for n in (length, LONGEST, LONGEST))
    mask = np.zeros(place.shape, bool)
    for n, (i, k) in enumerate(RESPONSES):
        dialogue, size = np.r_[ITEMS[i].prompt, ITEMS[i].responses[k]], ITEMS[i].prompt_sizes[k]
        tokens[n, :len(dialogue)] = dialogue
        for t in range(len(dialogue) - size):
            if size + t:  # nothing predicts the first token of a dialogue
                before[n, t], place[n, t], mask[n, t] = size + t - 1, size + t, True
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    contexts = transformer.contexts(1 + 0 * tokens, 0 * tokens, positions, 'dense')
    hidden, _ = transformer(params['backbone'], transformer.embed(
        params['backbone'], tokens, positions), contexts)
    log_p = jax.nn.log_softmax(transformer.logits(params['backbone'], hidden))
    values = (hidden @ params['value']['kernel'] + params['value']['bias'])[..., 0]
    rows = np.arange(len(RESPONSES))[:, None]
    found = (log_p[rows, before, tokens[rows, place]],
             -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)[rows, before], values[rows, before])
    return [jnp.where(mask, x, 0.0) for x in found]


def of_packed(net, params, batch, indices):
    """The same from packed rows."""
    slots = {index: slot for slot, index in enumerate(indices)}
    at = tuple(np.array([(slots[i], k) for i, k in RESPONSES]).T)
    return [x[at] for x in net.read(params, batch, entropy=True)]


def value_and_gradient(function, params):
    """A sum of all that is said, each element times a number of its own."""
    coefficients = np.random.default_rng(0).normal(size=(3, len(RESPONSES), LONGEST))

    def total(params):
        found = function(params)
        return sum(jnp.sum(c * x) for c, x in zip(coefficients, found, strict=True)), found

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return found, gradient


def network(name):
    if name == 'lora':
        return PolicyNetwork(dataclasses.replace(ARCHITECTURE, num_layers=1), tuning=lora(),
                             value=True)
    return PolicyNetwork(compiled.architecture(name, 32), value=True)


# Tied and not, grouped heads, sliding windows, soft caps.
@pytest.mark.parametrize('name', ['llama', 'gemma2', 'lora'])
def test_packed_responses_are_those_of_dialogues_alone(name, monkeypatch):
    monkeypatch.setattr(likelihood, '_CHUNK', 16)  # several, the last one in part
    net = network(name)
    params = random_params(net)
    batch, indices = packed()
    found, gradient = value_and_gradient(lambda p: of_packed(net, p, batch, indices), params)
    expected, other = value_and_gradient(lambda p: alone(net, p), params)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-5)
    least = 0.01 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(other))
    for x, y in zip(*map(jax.tree.leaves, (gradient, other)), strict=True):
        scale = max(float(jnp.abs(y).max()), least)
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=5e-5)
