"""Log-probabilities in chunks, and their gradients, are those of all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.models import likelihood as likelihood_lib
from qrm.models.likelihood import likelihood

CAP = 3.0


def read_out(table, hidden):
    return CAP * jnp.tanh(hidden @ table.T / CAP)


def plain(table, hidden, targets, count):
    """Log-probabilities and entropies [P] from all logits; 0 from the place `count` on."""
    log_p = jax.nn.log_softmax(read_out(table, hidden))
    asked = jnp.arange(len(hidden)) < count
    return [jnp.where(asked, x, 0.0) for x in (
        jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0],
        -jnp.sum(jnp.exp(log_p) * log_p, axis=-1))]


@pytest.fixture(scope='module')
def inputs():
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(11, 6)), jnp.float32),
            jnp.asarray(rng.normal(size=(10, 6)), jnp.float32),
            jnp.asarray(rng.integers(0, 11, 10)),
            jnp.asarray(rng.normal(size=(2, 10)), jnp.float32))


@pytest.mark.parametrize('entropy', [False, True])
@pytest.mark.parametrize('count', [7, 10, 0])
def test_values_and_gradients(inputs, entropy, count, monkeypatch):
    monkeypatch.setattr(likelihood_lib, '_CHUNK', 4)  # of ten places, so that the last is in part
    table, hidden, targets, (a, b) = inputs

    def total(function, table, hidden):
        log_probs, entropies = function(table, hidden, targets, jnp.int32(count))
        return jnp.sum(a * log_probs) + entropy * jnp.sum(b * entropies), log_probs

    own = functools.partial(likelihood, read_out, entropy)
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(total, f), argnums=(0, 1), has_aux=True))(
            table, hidden) for f in (own, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), found, expected)


def test_what_is_not_asked_for_reaches_no_gradient(inputs):
    table, hidden, targets, _ = inputs
    spoilt = hidden.at[7:].set(jnp.nan)

    def total(table, hidden):
        return jnp.sum(likelihood(read_out, True, table, hidden, targets, jnp.int32(7)).log_probs)

    gradients = jax.grad(total, argnums=(0, 1))(table, spoilt)
    clean = jax.grad(total, argnums=(0, 1))(table, hidden)
    jax.tree.map(np.testing.assert_array_equal, gradients, clean)
    assert float(jnp.abs(clean[0]).max()) > 0.1


def test_a_table_that_is_not_trained_costs_no_second_look(inputs):
    """Then the backward pass has no loop, in which logits would be computed once more."""
    table, hidden, targets, _ = inputs

    def loops(argnums):
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda table, hidden: jnp.sum(likelihood(
            read_out, False, table, hidden, targets, jnp.int32(7)).log_probs), argnums))(
                table, hidden))
        return jaxpr.count('while[')

    assert (loops(1), loops((0, 1))) == (1, 2)


def test_the_gradient_of_a_table_in_bfloat16_is_added_up_in_float32(monkeypatch):
    """A part of one sharded over devices is gathered in that dtype."""
    monkeypatch.setattr(likelihood_lib, '_CHUNK', 1)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(0.5, 0.1, size=(512, 6)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 3, 512))
    table = jnp.asarray(rng.normal(size=(3, 6)), jnp.bfloat16)

    def total(table):
        def read(table, hidden):
            return hidden @ table.T.astype(jnp.float32)

        return jnp.sum(likelihood(read, False, table, hidden, targets, jnp.int32(512)).log_probs)

    found, exact = (jax.grad(total)(x) for x in (table, table.astype(jnp.float32)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8)
