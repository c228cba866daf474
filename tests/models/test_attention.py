"""Attention of packed rows: a numpy reference, then every implementation against the dense one.

The GPU kernel is interpreted here, and lowered without a GPU; nothing of it runs compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh

from qrm.models import attention
from qrm.models.attention import attention_mask

# Rows as lists of segments: tokens of the prompt, tokens of each response. Tiles have 64 tokens.
CASES = {
    'shorter than a tile': (24, [[(5, (4, 3)), (2, (6,))], [(9, (9,))]]),
    'one tile exactly': (64, [[(30, (20, 14))], [(0, (1, 1)), (10, (10, 10))]]),
    'segments across many tiles': (
        330, [[(5, (300,))], [(200, (60, 50)), (4, (3,))], [(1, (10, 100, 100, 100)), (9, ())]]),
}
# Many segments, an empty row, and a response a tile away from the prompt that it goes on from.
MANY = (150, [[(10, (5, 7)), (0, (20,)), (30, (3, 3, 3)), (1, (1,))], [], [(40, (50, 41))]])
# Query heads, key and value heads and features; options of attention.
KINDS = {
    'nine heads read three': ((9, 3, 16), {}),
    'both directions, scaled': ((2, 2, 4), {'causal': False, 'scale': 0.3}),
    'four heads read one, both directions within a window, capped': (
        (4, 1, 4), {'causal': False, 'window': 20, 'cap': 3.0}),
    'as in Gemma 2': ((4, 2, 8), {'window': 66, 'cap': 3.0, 'scale': 0.25}),
}
BLOCKED = ['tiled', 'pallas']
OPTIONS = ('window', 'causal', 'scale', 'cap')


def layout(length, rows):
    """Segments, responses and positions [R, L] of rows of segments, laid out as `packing` does."""
    segments, responses, positions = np.zeros((3, len(rows), length), np.int32)
    for row, members in enumerate(rows):
        column = 0
        for number, (prompt, sizes) in enumerate(members, start=1):
            for response, size in enumerate((prompt, *sizes)):
                at = row, slice(column, column + size)
                segments[at] = number
                responses[at] = response
                positions[at] = np.arange(size) + (prompt if response else 0)
                column += size
        assert column <= length
    return segments, responses, positions


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


def random_inputs(rng, segments, heads=2, key_heads=2, features=4, dtype=jnp.float32):
    """q, k, v and a cotangent that is 0 at padding, whose outputs are meaningless."""
    q, k, v, outgoing = (
        jnp.asarray(rng.normal(size=(*segments.shape, count, features)), dtype)
        for count in (heads, key_heads, key_heads, heads))
    return 2 * q, 2 * k, v, outgoing * (segments > 0)[..., None, None]


@functools.partial(jax.jit, static_argnames=('implementation', *OPTIONS))
def run(implementation, q, k, v, outgoing, ids, reads=None, *,
        window=0, causal=True, scale=None, cap=0.0):
    """Output and the gradients of q, k and v."""
    plan = attention.plan(*ids, implementation, window=window, causal=causal)
    out, pull = jax.vjp(
        lambda q, k, v: attention.attend(q, k, v, plan, reads, scale=scale, cap=cap), q, k, v)
    return out, *pull(outgoing)


def assert_same(implementation, inputs, ids, tolerance=1e-5, **options):
    expected = run('dense', *inputs, ids, **options)
    actual = run(implementation, *inputs, ids, **options)
    real = ids[0] > 0
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


# Prompt of 2, responses of 1 and 2 tokens, then a second segment, then padding.
_SMALL = layout(9, [[(2, (1, 2)), (1, (1,))]])


def test_attention_mask_drawn():
    expected = _drawn(
        'x . . . . . . . .',
        'x x . . . . . . .',
        'x x x . . . . . .',
        'x x . x . . . . .',
        'x x . x x . . . .',
        '. . . . . x . . .',
        '. . . . . x x . .',
        '. . . . . . . x x',
        '. . . . . . . x x',
    )
    np.testing.assert_array_equal(attention_mask(*_SMALL)[0], expected)


def test_attention_mask_in_both_directions_drawn():
    # The prompt is read by all responses, and reads none of them.
    expected = _drawn(
        'x x . . . . . . .',
        'x x . . . . . . .',
        'x x x . . . . . .',
        'x x . x x . . . .',
        'x x . x x . . . .',
        '. . . . . x . . .',
        '. . . . . x x . .',
        '. . . . . . . x x',
        '. . . . . . . x x',
    )
    np.testing.assert_array_equal(attention_mask(*_SMALL, causal=False)[0], expected)


def test_attention_mask_rows_are_independent():
    segments = jnp.array([[1, 1, 1], [1, 2, 2]])
    responses = jnp.array([[0, 1, 2], [1, 1, 1]])
    positions = jnp.array([[0, 1, 1], [0, 0, 1]])
    mask = attention_mask(segments, responses, positions)
    np.testing.assert_array_equal(mask[0], _drawn('x . .', 'x x .', 'x . x'))
    np.testing.assert_array_equal(mask[1], _drawn('x . .', '. x .', '. x x'))


# Prompt of 4, responses of 4 and 2 tokens, then padding.
_FAR = layout(12, [[(4, (4, 2))]])


def test_window_is_counted_in_the_dialogue():
    # The second response is 5 places from the prompt, and still next to it.
    expected = _drawn(
        'x . . . . . . . . . . .',
        'x x . . . . . . . . . .',
        'x x x . . . . . . . . .',
        '. x x x . . . . . . . .',
        '. . x x x . . . . . . .',
        '. . . x x x . . . . . .',
        '. . . . x x x . . . . .',
        '. . . . . x x x . . . .',
        '. . x x . . . . x . . .',
        '. . . x . . . . x x . .',
        '. . . . . . . . . . x x',
        '. . . . . . . . . . x x',
    )
    np.testing.assert_array_equal(attention_mask(*_FAR, window=3)[0], expected)


def test_window_in_both_directions_drawn():
    # Less than 3 apart, to either side; the prompt still reads no response.
    expected = _drawn(
        'x x x . . . . . . . . .',
        'x x x x . . . . . . . .',
        'x x x x . . . . . . . .',
        '. x x x . . . . . . . .',
        '. . x x x x x . . . . .',
        '. . . x x x x x . . . .',
        '. . . . x x x x . . . .',
        '. . . . . x x x . . . .',
        '. . x x . . . . x x . .',
        '. . . x . . . . x x . .',
        '. . . . . . . . . . x x',
        '. . . . . . . . . . x x',
    )
    np.testing.assert_array_equal(attention_mask(*_FAR, window=3, causal=False)[0], expected)


@pytest.mark.parametrize('causal', [True, False])
def test_window_as_long_as_the_dialogue_is_none(causal):
    longest = 8  # the prompt and the first response
    unlimited = attention_mask(*_FAR, causal=causal)
    np.testing.assert_array_equal(attention_mask(*_FAR, window=longest, causal=causal), unlimited)
    shorter = attention_mask(*_FAR, window=longest - 1, causal=causal)
    # The last token of the first response does not see the first of the prompt.
    assert np.argwhere(shorter != unlimited).tolist() == [[0, 7, 0]]


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('window', [0, 1, 7, 40])
def test_mask_of_random_rows_is_that_of_each_dialogue_alone(window, causal):
    rng = np.random.default_rng(10)
    segments, responses, positions = layout(120, random_rows(rng, 120, 4))
    mask = attention_mask(segments, responses, positions, window=window, causal=causal)
    for row, i in zip(*np.nonzero(segments), strict=True):
        np.testing.assert_array_equal(
            np.flatnonzero(mask[row, i]), _seen(segments[row], responses[row], i, window, causal))


def test_tiles_of_a_plan_counted_by_hand():
    ids = layout(256, [
        [(100, ()), (60, ())],  # tokens 0-99, 100-159; 160-255 are padding
        [(10, (118, 64))],  # prompt 0-9, responses 10-127, 128-191
        [],
    ])
    plan = attention.plan(*ids, 'tiled')
    expected = [
        # Tile 2 of row 0 holds no token of the first segment, so its tile 0 is not paid for.
        (0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 1), (0, 2, 2),
        # Tile 2 of row 1 sees the prompt in tile 0, and not the other response in tile 1.
        (1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 2),
    ]
    assert int(plan.count) == len(expected)
    np.testing.assert_array_equal(plan.tiles.reshape(-1, 3)[:len(expected)], expected)
    # As many fit as causal rows without any structure need: 3 rows of 4 * 5 / 2 tiles, by fours.
    assert plan.tiles.shape == (8, 4, 3)
    assert int(plan.pairs) == 12 * 64 * 64

    # The same tiles as lists, by query tile and by key tile.
    listed = attention.plan(*ids, 'pallas').listed
    counts = [listed.key_counts.tolist(), listed.query_counts.tolist()]
    assert counts == [[[1, 2, 2, 0], [1, 2, 2, 0], [0, 0, 0, 0]],
                      [[2, 2, 1, 0], [3, 1, 1, 0], [0, 0, 0, 0]]]
    by_query = [(r, i, int(j)) for r in range(3) for i in range(4)
                for j in listed.keys[r, i, :listed.key_counts[r, i]]]
    by_key = [(r, int(i), j) for r in range(3) for j in range(4)
              for i in listed.queries[r, j, :listed.query_counts[r, j]]]
    assert by_query == expected
    assert sorted(by_key) == expected


@pytest.mark.parametrize(('options', 'expected'), [
    ({}, [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 3)]),
    # The first tile of the prompt is out of reach of both responses, the second of neither.
    ({'window': 32}, [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 1), (3, 3)]),
    # A response's first token is at 128, and sees 63 from 66 places away.
    ({'window': 65}, [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 1), (3, 3)]),
    ({'window': 66}, [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 3)]),
    ({'causal': False, 'window': 1}, [(0, 0), (1, 1), (2, 2), (3, 3)]),
    # Within the prompt there is a tile above the diagonal.
    ({'causal': False, 'window': 32},
     [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (2, 2), (3, 1), (3, 3)]),
])
def test_tiles_within_reach_counted_by_hand(options, expected):
    ids = layout(256, [[(128, (64, 64))]])  # tiles 0 and 1, 2, 3
    plan = attention.plan(*ids, 'tiled', **options)
    assert int(plan.count) == len(expected)
    np.testing.assert_array_equal(plan.tiles.reshape(-1, 3)[:len(expected)],
                                  [(0, *tile) for tile in expected])
    listed = attention.plan(*ids, 'pallas', **options).listed
    by_query = [(i, int(j)) for i in range(4) for j in listed.keys[0, i, :listed.key_counts[0, i]]]
    assert by_query == expected


def test_all_tiles_of_a_row_may_be_within_reach():
    # More than causal rows need.
    plan = attention.plan(*layout(128, [[(128, ())]]), 'tiled', causal=False)
    assert int(plan.count) == 4
    np.testing.assert_array_equal(plan.tiles, [[(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]])


def test_padding_makes_a_row_of_whole_tiles():
    plan = attention.plan(*layout(70, [[(3, (66,))]]), 'tiled')
    assert plan.mask.shape == (1, 128, 128)
    assert not np.any(plan.mask[0, 70:])
    assert not np.any(plan.mask[0, :, 70:])
    assert int(plan.count) == 3


def test_auto_needs_no_tiles_where_weights_are_dropped():
    ids = layout(8, [[(3, (4,))]])
    assert attention.plan(*ids, 'auto', dropout=True).tiles is None
    # Tests run on CPU.
    assert attention.plan(*ids, 'auto').tiles is not None


# Values and gradients.


def _seen(segments, responses, i, window=0, causal=True):
    """Columns of a row that token i attends to: its dialogue laid out alone, then what is near."""
    dialogue = np.flatnonzero((segments == segments[i]) & np.isin(responses, (0, responses[i])))
    place = int(np.flatnonzero(dialogue == i)[0])
    start = max(place - window + 1, 0) if window else 0
    stop = place + 1 if causal else place + window if window else len(dialogue)
    return dialogue[start:stop]


@pytest.mark.parametrize('heads', [(4, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize(('rows', 'length'), [(1, 64), (1, 128), (2, 64), (3, 64), (1, 192)])
def test_rows_of_few_tiles(rows, length, heads):
    # Compiled together with its plan, where XLA knows that an axis of one tile is not indexed.
    ids = layout(length, [[(20, (20, length - 45))]] * rows)
    inputs = random_inputs(np.random.default_rng(3), ids[0], *heads, features=16)
    assert_same('tiled', inputs, ids, window=30)


def _numpy_attention(q, k, v, ids, *, scale=None, cap=0.0, **reach):
    """Token by token and head by head in float64, without the positions."""
    segments, responses, _ = ids
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    out = np.zeros(q.shape)
    for row, i in zip(*np.nonzero(segments), strict=True):
        seen = _seen(segments[row], responses[row], i, **reach)
        for head in range(q.shape[2]):
            read = head // (q.shape[2] // k.shape[2])
            logits = k[row, seen, read] @ q[row, i, head] * scale
            logits = cap * np.tanh(logits / cap) if cap else logits
            weights = np.exp(logits - logits.max())
            out[row, i, head] = weights @ v[row, seen, read] / weights.sum()
    return out


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('implementation', ['dense', *BLOCKED])
def test_values_are_those_of_a_loop_over_tokens(implementation, case):
    ids = layout(*CASES[case])
    inputs = random_inputs(np.random.default_rng(0), ids[0])
    out = run(implementation, *inputs, ids)[0]
    expected = _numpy_attention(*_exact(inputs[:3]), ids)
    np.testing.assert_allclose(out[ids[0] > 0], expected[ids[0] > 0], rtol=0, atol=1e-5)


def _exact(inputs):
    return [np.asarray(x, np.float64) for x in inputs]


@functools.cache
def _of_kind(kind):
    """Ids, inputs, options and the output of the loop over tokens."""
    sizes, options = KINDS[kind]
    ids = layout(*MANY)
    inputs = random_inputs(np.random.default_rng(11), ids[0], *sizes)
    return ids, inputs, options, _numpy_attention(*_exact(inputs[:3]), ids, **options)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('implementation', ['dense', *BLOCKED])
def test_values_of_each_kind_are_those_of_a_loop_over_tokens(implementation, kind):
    ids, inputs, options, expected = _of_kind(kind)
    out = run(implementation, *inputs, ids, **options)[0]
    np.testing.assert_allclose(out[ids[0] > 0], expected[ids[0] > 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_reads_of_each_kind_are_those_of_all_tokens(kind):
    ids, (q, k, v, outgoing), options, expected = _of_kind(kind)
    # Of two rows, out of order and one of them twice.
    reads = np.random.default_rng(12).choice(np.flatnonzero(ids[0]), (3, 4))
    reads[0, 0] = reads[2, 3]
    heads = q.shape[2:]
    there = outgoing.reshape(-1, *heads)[reads]
    # The mask of a tiled plan has whole tiles, of which reads know nothing.
    out, *gradients = run('tiled', q, k, v, there, ids, reads, **options)
    np.testing.assert_allclose(out, expected.reshape(-1, *heads)[reads], rtol=0, atol=1e-5)
    scattered = jnp.zeros_like(outgoing).reshape(-1, *heads).at[reads].add(there)
    references = run('dense', q, k, v, scattered.reshape(q.shape), ids, **options)[1:]
    for gradient, reference in zip(gradients, references, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize('implementation', ['dense', *BLOCKED])
def test_what_a_token_does_not_see_leaves_no_trace(implementation):
    # Bit for bit, whatever is in other responses, other segments and padding.
    ids, inputs, options, _ = _of_kind('as in Gemma 2')
    segments, responses, _ = ids
    before = run(implementation, *inputs, ids, **options)
    others = random_inputs(np.random.default_rng(13), segments, *KINDS['as in Gemma 2'][0])
    # All but the prompt and the first response of each first segment.
    kept = ((segments == 1) & (responses < 2))[..., None, None]
    after = run(implementation, *(jnp.where(kept, x, other) for x, other in
                                  zip(inputs, others, strict=True)), ids, **options)
    kept = kept[..., 0, 0]
    np.testing.assert_array_equal(after[0][kept], before[0][kept])
    np.testing.assert_array_equal(after[1][kept], before[1][kept])
    # The keys and values of the prompt are read by the other response too.
    kept &= responses == 1
    for x, y in zip(after[2:], before[2:], strict=True):
        np.testing.assert_array_equal(x[kept], y[kept])


@pytest.mark.parametrize(('heads', 'key_heads', 'options'), [
    (1, 1, {}),
    (2, 1, {'cap': 2.0}),
    (4, 2, {'window': 3, 'cap': 2.0, 'scale': 0.8}),
    (1, 1, {'window': 2, 'causal': False}),
])
def test_gradients_of_the_reference_are_finite_differences(heads, key_heads, options):
    ids = layout(7, [[(2, (2, 2))]])
    q, k, v, outgoing = random_inputs(np.random.default_rng(1), ids[0], heads, key_heads, 2)
    gradients = run('dense', q, k, v, outgoing, ids, **options)[1:]
    *inputs, outgoing = _exact((q, k, v, outgoing))
    for which, gradient in enumerate(gradients):
        for place in np.ndindex(gradient.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in inputs]
                moved[which][place] += step
                sides.append(np.sum(_numpy_attention(*moved, ids, **options) * outgoing))
            assert gradient[place] == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-5)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('implementation', BLOCKED)
def test_blocked_is_dense(implementation, case):
    ids = layout(*CASES[case])
    assert_same(implementation, random_inputs(np.random.default_rng(2), ids[0]), ids)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('implementation', BLOCKED)
def test_blocked_of_each_kind_is_dense(implementation, kind):
    ids, inputs, options, _ = _of_kind(kind)
    assert_same(implementation, inputs, ids, **options)


@pytest.mark.parametrize('implementation', BLOCKED)
def test_blocked_is_dense_on_random_rows(implementation):
    # One shape, so one compilation, for all draws.
    rng = np.random.default_rng(3)
    for _ in range(6):
        ids = layout(200, random_rows(rng, 200, 3))
        assert_same(implementation, random_inputs(rng, ids[0]), ids)


@pytest.mark.parametrize('implementation', BLOCKED)
def test_batches_of_one_shape_compile_once(implementation):
    rng = np.random.default_rng(4)

    @jax.jit
    def attend(q, ids):
        return attention.attend(q, q, q, attention.plan(*ids, implementation))

    for rows in ([[(100, (20, 8))], []], [[(1, (1,))], [(30, (40, 50))]], [[], []]):
        ids = layout(128, rows)
        attend(random_inputs(rng, ids[0])[0], ids)
    assert attend._cache_size() == 1


@pytest.mark.parametrize('implementation', BLOCKED)
def test_padding_only(implementation):
    ids = layout(70, [[], []])
    inputs = random_inputs(np.random.default_rng(5), ids[0])
    for result in run(implementation, *inputs, ids):
        np.testing.assert_array_equal(result, 0.0)


@pytest.mark.parametrize('size', [1e4, -1e4])
@pytest.mark.parametrize('implementation', BLOCKED)
def test_extreme_logits(implementation, size):
    # Integers, so that float32 products are exact: logits are multiples of size / 2 up to
    # 2 * size, of either sign, and ties are common.
    ids = layout(150, [[(70, (30, 40))], [(2, (1, 140))]])
    segments, rng = ids[0], np.random.default_rng(6)
    _, _, v, outgoing = random_inputs(rng, segments)
    q, k = rng.integers(-1, 2, (2, *v.shape)).astype(np.float32)
    inputs = jnp.asarray(q), jnp.asarray(k * size), v, outgoing
    expected = run('dense', *inputs, ids)
    actual = run(implementation, *inputs, ids)
    # Weights are made again from the log-sum-exp, which float32 holds to 2e4 * 2^-24 = .0012.
    for x, reference, tolerance in zip(actual, expected, (1e-5, *[2e-3] * 3), strict=True):
        scale = max(np.max(np.abs(reference[segments > 0])), 1.0)
        assert np.all(np.isfinite(x))
        np.testing.assert_allclose(x[segments > 0] / scale, reference[segments > 0] / scale,
                                   rtol=0, atol=tolerance)


@pytest.mark.parametrize(('case', 'sizes', 'options'), [
    (CASES['segments across many tiles'], (2, 2, 4), {}),
    (MANY, *KINDS['as in Gemma 2']),
])
@pytest.mark.parametrize('implementation', ['dense', *BLOCKED])
def test_bfloat16_stays_near_float32(implementation, case, sizes, options):
    ids = layout(*case)
    inputs = random_inputs(np.random.default_rng(7), ids[0], *sizes, dtype=jnp.bfloat16)
    exact = run('dense', *(x.astype(jnp.float32) for x in inputs), ids, **options)
    rounded = run(implementation, *inputs, ids, **options)
    real = ids[0] > 0
    for x, reference in zip(rounded, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        error = np.abs(np.asarray(x, np.float32) - reference)[real]
        # Rounding to 8 bits has errors of up to 2^-9 of a number; a few of them meet in the
        # scaled queries, the weights and the sum.
        assert np.max(error) < 2 * 2.0**-8 * np.max(np.abs(reference[real]))
        assert np.mean(error) < 2 * 2.0**-8 * np.std(reference[real])
        assert np.max(error) > 1e-5  # it did compute in bfloat16


@pytest.mark.parametrize('implementation', BLOCKED)
def test_shared_keys_and_values_are_not_repeated(implementation):
    # Repeated, they would be as large as the queries, and made of something smaller. The row is of
    # whole tiles and the features are a power of two, so that nothing is padded. Masks may be.
    ids = layout(128, [[(30, (20, 14))]])
    inputs = random_inputs(np.random.default_rng(15), ids[0], 4, 1, 64)
    traced = run.trace(implementation, *inputs, ids, cap=3.0)
    large = 0
    for equation in _equations(traced.jaxpr.jaxpr):
        made = [x.aval.size for x in equation.outvars if x.aval.dtype != bool]
        if max(made, default=0) >= inputs[0].size:
            large += 1
            largest = max(getattr(x.aval, 'size', 1) for x in equation.invars)
            assert largest == 1 or largest >= inputs[0].size, equation
    assert large  # the queries at least


def _equations(jaxpr):
    """All equations, those of loops and of functions that are called included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


# The kernel beyond its interpreter.


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated')  # JAX 0.11
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(('heads', 'key_heads', 'options'), [
    (2, 2, {}),
    (9, 3, {'window': 20, 'cap': 3.0, 'scale': 0.25}),
])
def test_kernel_is_lowered_for_gpus(heads, key_heads, options, dtype):
    ids = layout(*MANY)
    inputs = random_inputs(np.random.default_rng(9), ids[0], heads, key_heads, dtype=dtype)
    # JAX 0.11 asks for which GPU.
    gpu = AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        traced = run.trace('pallas', *inputs, ids, **options)
        calls = traced.lower(lowering_platforms=('cuda',)).as_text().count('@__gpu$xla.gpu.triton')
    assert calls == 3  # forward, queries, keys and values


def test_kernel_is_refused_on_tpus(monkeypatch):
    ids = layout(8, [[(3, (4,))]])
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    with pytest.raises(ValueError, match="'pallas' is for NVIDIA GPUs; on a TPU use 'dense'"):
        attention.plan(*ids, 'pallas')
    assert attention.plan(*ids, 'auto').listed is None


# Dropout.


def test_dropout_keeps_the_mean_and_repeats_for_a_key():
    # Equal logits and values 1: without dropout every output is 1, with it the last token's is
    # 2 / 64 times how many of its 64 weights are kept, of mean 1 and standard deviation 1 / 8.
    shape = (64, 64, 16, 1)
    plan = attention.plan(*layout(64, [[(64, ())]] * 64), 'dense')
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
    ids = layout(8, [[(3, (4,))]])
    q, k, v, _ = random_inputs(np.random.default_rng(8), ids[0])
    plan = attention.plan(*ids, implementation)
    with pytest.raises(ValueError, match="attention dropout needs the implementation 'dense'"):
        attention.attend(q, k, v, plan, dropout=0.1, dropout_key=jax.random.key(0))
    # Without a key there is none, and nothing to refuse.
    np.testing.assert_array_equal(attention.attend(q, k, v, plan, dropout=0.1),
                                  attention.attend(q, k, v, plan))
