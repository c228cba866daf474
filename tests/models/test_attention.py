"""Attention of packed rows: a numpy reference, then every implementation against the dense one.

The GPU kernel is interpreted here, and lowered without a GPU; nothing of it runs compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from qrm.models import attention
from qrm.models.attention import attention_mask

# Rows as lists of segments: tokens of the prompt, tokens of each response. Tiles have 64 tokens.
CASES = {
    'shorter than a tile': (24, [[(5, (4, 3)), (2, (6,))], [(9, (9,))]]),
    'one tile exactly': (64, [[(30, (20, 14))], [(0, (1, 1)), (10, (10, 10))]]),
    'many segments, an empty row': (
        150, [[(10, (5, 7)), (0, (20,)), (30, (3, 3, 3)), (1, (1,))], [], [(40, (50, 41))]]),
    'segments across many tiles': (
        330, [[(5, (300,))], [(200, (60, 50)), (4, (3,))], [(1, (10, 100, 100, 100)), (9, ())]]),
}
BLOCKED = ['tiled', 'pallas']


def layout(length, rows):
    """Segments and responses [R, L] of rows of segments, laid out as `packing` does."""
    segments, responses = np.zeros((2, len(rows), length), np.int32)
    for row, members in enumerate(rows):
        column = 0
        for number, (prompt, sizes) in enumerate(members, start=1):
            for response, size in enumerate((prompt, *sizes)):
                segments[row, column:column + size] = number
                responses[row, column:column + size] = response
                column += size
        assert column <= length
    return segments, responses


def random_rows(rng, length, count):
    """Rows filled with random segments up to a random place."""
    rows = []
    for _ in range(count):
        members, left = [], rng.integers(0, length + 1)
        while left > 0:
            sizes = np.minimum(rng.integers(1, 1 + rng.integers(1, 90), 4), left // 4)
            members.append((int(sizes[0] + left % 4), tuple(sizes[1:1 + rng.integers(0, 4)])))
            left -= sum(members[-1][1], members[-1][0])
        rows.append(members)
    return rows


def random_inputs(rng, segments, heads=2, features=4, dtype=jnp.float32):
    """q, k, v and a cotangent that is 0 at padding, whose outputs are meaningless."""
    shape = (*segments.shape, heads, features)
    q, k, v, outgoing = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    return 2 * q, 2 * k, v, outgoing * (segments > 0)[..., None, None]


@functools.partial(jax.jit, static_argnums=0)
def run(implementation, q, k, v, outgoing, segments, responses):
    """Output and the gradients of q, k and v."""
    plan = attention.plan(segments, responses, implementation)
    out, pull = jax.vjp(lambda q, k, v: attention.attend(q, k, v, plan), q, k, v)
    return out, *pull(outgoing)


def assert_same(implementation, inputs, segments, responses, tolerance=1e-5):
    expected = run('dense', *inputs, segments, responses)
    actual = run(implementation, *inputs, segments, responses)
    real = segments > 0
    np.testing.assert_allclose(actual[0][real], expected[0][real], rtol=0, atol=tolerance)
    assert np.all(np.isfinite(actual[0]))
    for gradient, reference in zip(actual[1:], expected[1:], strict=True):
        scale = np.max(np.abs(reference)) + 1e-9
        np.testing.assert_allclose(gradient / scale, reference / scale, rtol=0, atol=tolerance)
        assert not np.any(gradient[~real])


# The mask and the plan.


def _drawn(*rows):
    """A mask from a drawing: rows are queries, columns keys."""
    return np.array([[cell == 'x' for cell in row.split()] for row in rows])


def test_attention_mask_drawn():
    # Prompt of 2, responses of 1 and 2 tokens, then a second segment, then padding.
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0, 0]])
    responses = jnp.array([[0, 0, 1, 2, 2, 0, 1, 0, 0]])
    expected = _drawn(
        'x . . . . . . . .',
        'x x . . . . . . .',
        'x x x . . . . . .',
        'x x . x . . . . .',
        'x x . x x . . . .',
        '. . . . . x . . .',
        '. . . . . x x . .',
        '. . . . . . . x .',
        '. . . . . . . x x',
    )
    np.testing.assert_array_equal(attention_mask(segments, responses)[0], expected)


def test_attention_mask_rows_are_independent():
    segments = jnp.array([[1, 1, 1], [1, 2, 2]])
    responses = jnp.array([[0, 1, 2], [1, 1, 1]])
    mask = attention_mask(segments, responses)
    np.testing.assert_array_equal(mask[0], _drawn('x . .', 'x x .', 'x . x'))
    np.testing.assert_array_equal(mask[1], _drawn('x . .', '. x .', '. x x'))


def test_tiles_of_a_plan_counted_by_hand():
    segments, responses = layout(256, [
        [(100, ()), (60, ())],  # tokens 0-99, 100-159; 160-255 are padding
        [(10, (118, 64))],  # prompt 0-9, responses 10-127, 128-191
        [],
    ])
    plan = attention.plan(segments, responses, 'tiled')
    expected = [
        # Tile 2 of row 0 holds no token of the first segment, so its tile 0 is not paid for.
        (0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 1), (0, 2, 2),
        # Tile 2 of row 1 sees the prompt in tile 0, and not the other response in tile 1.
        (1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 2),
    ]
    assert int(plan.count) == len(expected)
    np.testing.assert_array_equal(plan.tiles[:len(expected)], expected)
    # As many fit as causal rows without any structure need: 3 rows of 4 * 5 / 2 tiles.
    assert plan.tiles.shape == (30, 3)

    # The same tiles as lists, by query tile and by key tile.
    listed = attention.plan(segments, responses, 'pallas').listed
    counts = [listed.key_counts.tolist(), listed.query_counts.tolist()]
    assert counts == [[[1, 2, 2, 0], [1, 2, 2, 0], [0, 0, 0, 0]],
                      [[2, 2, 1, 0], [3, 1, 1, 0], [0, 0, 0, 0]]]
    by_query = [(r, i, int(j)) for r in range(3) for i in range(4)
                for j in listed.keys[r, i, :listed.key_counts[r, i]]]
    by_key = [(r, int(i), j) for r in range(3) for j in range(4)
              for i in listed.queries[r, j, :listed.query_counts[r, j]]]
    assert by_query == expected
    assert sorted(by_key) == expected


def test_padding_makes_a_row_of_whole_tiles():
    segments, responses = layout(70, [[(3, (66,))]])
    plan = attention.plan(segments, responses, 'tiled')
    assert plan.mask.shape == (1, 128, 128)
    assert not np.any(plan.mask[0, 70:])
    assert not np.any(plan.mask[0, :, 70:])
    assert int(plan.count) == 3


def test_auto_needs_no_tiles_where_weights_are_dropped():
    segments, responses = layout(8, [[(3, (4,))]])
    assert attention.plan(segments, responses, 'auto', dropout=True).tiles is None
    # Tests run on CPU.
    assert attention.plan(segments, responses, 'auto').tiles is not None


# Values and gradients.


def _numpy_attention(q, k, v, segments, responses):
    """Token by token in float64, from the words of the module: earlier tokens of the segment."""
    out = np.zeros(q.shape)
    for row, i in zip(*np.nonzero(segments), strict=True):
        seen = [j for j in range(i + 1) if segments[row, j] == segments[row, i]
                and responses[row, j] in (0, responses[row, i])]
        for head in range(q.shape[2]):
            logits = k[row, seen, head] @ q[row, i, head] / np.sqrt(q.shape[3])
            weights = np.exp(logits - logits.max())
            out[row, i, head] = weights @ v[row, seen, head] / weights.sum()
    return out


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('implementation', ['dense', *BLOCKED])
def test_values_are_those_of_a_loop_over_tokens(implementation, case):
    segments, responses = layout(*CASES[case])
    inputs = random_inputs(np.random.default_rng(0), segments)
    q, k, v = (np.asarray(x, np.float64) for x in inputs[:3])
    out = run(implementation, *inputs, segments, responses)[0]
    expected = _numpy_attention(q, k, v, segments, responses)
    np.testing.assert_allclose(out[segments > 0], expected[segments > 0], rtol=0, atol=1e-5)


def test_gradients_of_the_reference_are_finite_differences():
    segments, responses = layout(7, [[(2, (2, 2))]])
    q, k, v, outgoing = random_inputs(np.random.default_rng(1), segments, 1, 2)
    gradients = run('dense', q, k, v, outgoing, segments, responses)[1:]
    *inputs, outgoing = (np.asarray(x, np.float64) for x in (q, k, v, outgoing))
    for which, gradient in enumerate(gradients):
        for place in np.ndindex(gradient.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in inputs]
                moved[which][place] += step
                sides.append(np.sum(_numpy_attention(*moved, segments, responses) * outgoing))
            assert gradient[place] == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-5)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('implementation', BLOCKED)
def test_blocked_is_dense(implementation, case):
    segments, responses = layout(*CASES[case])
    inputs = random_inputs(np.random.default_rng(2), segments)
    assert_same(implementation, inputs, segments, responses)


@pytest.mark.parametrize('implementation', BLOCKED)
def test_blocked_is_dense_on_random_rows(implementation):
    # One shape, so one compilation, for all draws.
    rng = np.random.default_rng(3)
    for _ in range(6):
        segments, responses = layout(200, random_rows(rng, 200, 3))
        assert_same(implementation, random_inputs(rng, segments), segments, responses)


@pytest.mark.parametrize('implementation', BLOCKED)
def test_batches_of_one_shape_compile_once(implementation):
    rng = np.random.default_rng(4)

    @jax.jit
    def attend(q, segments, responses):
        return attention.attend(q, q, q, attention.plan(segments, responses, implementation))

    for rows in ([[(100, (20, 8))], []], [[(1, (1,))], [(30, (40, 50))]], [[], []]):
        segments, responses = layout(128, rows)
        attend(random_inputs(rng, segments)[0], segments, responses)
    assert attend._cache_size() == 1


@pytest.mark.parametrize('implementation', BLOCKED)
def test_padding_only(implementation):
    segments = responses = np.zeros((2, 70), np.int32)
    q, k, v, outgoing = random_inputs(np.random.default_rng(5), segments)
    for result in run(implementation, q, k, v, outgoing, segments, responses):
        np.testing.assert_array_equal(result, 0.0)


@pytest.mark.parametrize('size', [1e4, -1e4])
@pytest.mark.parametrize('implementation', BLOCKED)
def test_extreme_logits(implementation, size):
    # Integers, so that float32 products are exact: logits are multiples of size / 2 up to
    # 2 * size, of either sign, and ties are common.
    segments, responses = layout(150, [[(70, (30, 40))], [(2, (1, 140))]])
    rng = np.random.default_rng(6)
    _, _, v, outgoing = random_inputs(rng, segments)
    q, k = rng.integers(-1, 2, (2, *v.shape)).astype(np.float32)
    inputs = jnp.asarray(q), jnp.asarray(k * size), v, outgoing
    expected = run('dense', *inputs, segments, responses)
    actual = run(implementation, *inputs, segments, responses)
    # Weights are made again from the log-sum-exp, which float32 holds to 2e4 * 2^-24 = .0012.
    for x, reference, tolerance in zip(actual, expected, (1e-5, *[2e-3] * 3), strict=True):
        scale = max(np.max(np.abs(reference[segments > 0])), 1.0)
        assert np.all(np.isfinite(x))
        np.testing.assert_allclose(x[segments > 0] / scale, reference[segments > 0] / scale,
                                   rtol=0, atol=tolerance)


@pytest.mark.parametrize('implementation', ['dense', *BLOCKED])
def test_bfloat16_stays_near_float32(implementation):
    segments, responses = layout(*CASES['segments across many tiles'])
    inputs = random_inputs(np.random.default_rng(7), segments, dtype=jnp.bfloat16)
    exact = run('dense', *(x.astype(jnp.float32) for x in inputs), segments, responses)
    rounded = run(implementation, *inputs, segments, responses)
    real = segments > 0
    for x, reference in zip(rounded, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        error = np.abs(np.asarray(x, np.float32) - reference)[real]
        # Rounding to 8 bits has errors of up to 2^-9 of a number; a few of them meet in the
        # scaled queries, the weights and the sum.
        assert np.max(error) < 2 * 2.0**-8 * np.max(np.abs(reference[real]))
        assert np.mean(error) < 2 * 2.0**-8 * np.std(reference[real])
        assert np.max(error) > 1e-5  # it did compute in bfloat16


# The kernel beyond its interpreter.


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated')  # JAX 0.11
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_kernel_is_lowered_for_gpus(dtype):
    segments, responses = layout(*CASES['many segments, an empty row'])
    inputs = random_inputs(np.random.default_rng(9), segments, dtype=dtype)
    # JAX 0.11 asks for which GPU.
    gpu = AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        traced = run.trace('pallas', *inputs, segments, responses)
        calls = traced.lower(lowering_platforms=('cuda',)).as_text().count('@__gpu$xla.gpu.triton')
    assert calls == 3  # forward, queries, keys and values


def test_kernel_is_refused_on_tpus(monkeypatch):
    segments, responses = layout(8, [[(3, (4,))]])
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    with pytest.raises(ValueError, match="'pallas' is for NVIDIA GPUs; on a TPU use 'dense'"):
        attention.plan(segments, responses, 'pallas')
    assert attention.plan(segments, responses, 'auto').listed is None


# Dropout.


def test_dropout_keeps_the_mean_and_repeats_for_a_key():
    # Equal logits and values 1: without dropout every output is 1, with it the last token's is
    # 2 / 64 times how many of its 64 weights are kept, of mean 1 and standard deviation 1 / 8.
    shape = (64, 64, 16, 1)
    segments, responses = np.ones((64, 64), np.int32), np.zeros((64, 64), np.int32)
    plan = attention.plan(segments, responses, 'dense')
    attend = jax.jit(lambda key: attention.attend(
        jnp.zeros(shape), jnp.zeros(shape), jnp.ones(shape), plan, dropout=0.5, dropout_key=key))
    first = attend(jax.random.key(0))
    last = first[:, -1]
    assert np.mean(last) == pytest.approx(1.0, abs=4 / 8 / np.sqrt(last.size))
    assert np.std(last) == pytest.approx(1 / 8, rel=0.1)
    np.testing.assert_array_equal(attend(jax.random.key(0)), first)
    assert np.any(attend(jax.random.key(1)) != first)
    # A token that sees only itself has its weight doubled or dropped.
    assert set(np.unique(first[:, 0])) == {0.0, 2.0}


@pytest.mark.parametrize('implementation', BLOCKED)
def test_dropout_is_dense_only(implementation):
    segments, responses = layout(8, [[(3, (4,))]])
    q, k, v, _ = random_inputs(np.random.default_rng(8), segments)
    plan = attention.plan(segments, responses, implementation)
    with pytest.raises(ValueError, match="attention dropout needs the implementation 'dense'"):
        attention.attend(q, k, v, plan, dropout=0.1, dropout_key=jax.random.key(0))
    # Without a key there is none, and nothing to refuse.
    np.testing.assert_array_equal(attention.attend(q, k, v, plan, dropout=0.1),
                                  attention.attend(q, k, v, plan))
