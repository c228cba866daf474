"""Packing is exact, keeps what it is given, and gives few shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.data import packing
from qrm.models.attention import attention_mask
from qrm.rewards import losses
from qrm.studies.speed import synthetic
from tests.helpers import (
    encoded,
    init,
    loss_config,
    network,
    random_comparisons,
    side,
    single_batch,
)


def test_layout_of_one_comparison_drawn_by_hand():
    item = dataclasses.replace(
        encoded('a', 3, (2, 3)),
        prompt=np.array([11, 12, 13], np.int32),
        responses=(np.array([21, 22], np.int32), np.array([31, 32, 33], np.int32)),
        margin=0.5, weight=2.0,
    )
    packed, = packing.pack([item], [packing.Layout(length=10, rows=1, slots=2, responses=2)])
    batch = packed.micro_batch
    np.testing.assert_array_equal(batch.tokens, [[11, 12, 13, 21, 22, 31, 32, 33, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 4, 3, 4, 5, 0, 0]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.responses, [[0, 0, 0, 1, 1, 2, 2, 2, 0, 0]])
    np.testing.assert_array_equal(batch.reads, [[4, 7], [0, 0]])
    np.testing.assert_array_equal(batch.present, [[True, True], [False, False]])
    np.testing.assert_array_equal(batch.preference[0], [[0, 1], [0, 0]])
    np.testing.assert_array_equal(batch.margin, [0.5, 0])
    np.testing.assert_array_equal(batch.weight, [2, 0])
    # The chosen response is predicted from the prompt's last token on: 13 -> 21 -> 22.
    np.testing.assert_array_equal(batch.lm_targets, [[0, 0, 21, 22, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.lm_weights, [[0, 0, 1, 1, 0, 0, 0, 0, 0, 0]])
    picture = [
        '1.........',  # prompt
        '11........',
        '111.......',
        '1111......',  # first response: the prompt and itself
        '11111.....',
        '111..1....',  # second response: the prompt and itself, not the first
        '111..11...',
        '111..111..',
        '........11',  # padding sees padding
        '........11',
    ]
    expected = np.array([[c == '1' for c in line] for line in picture])
    mask = attention_mask(batch.segments, batch.responses, batch.positions)
    np.testing.assert_array_equal(mask[0], expected)


def test_a_comparison_too_large_for_a_row_gets_several_segments():
    item = encoded('a', 4, (5, 3, 6))
    # 4 + 5 + 3 = 12 tokens in one row, the prompt again with the third response in another.
    batch = packing.pack([item], [packing.Layout(12, 2, 1, 3)])[0].micro_batch
    np.testing.assert_array_equal(batch.tokens[1, :10], np.r_[item.prompt, item.responses[2]])
    np.testing.assert_array_equal(batch.reads, [[8, 11, 12 + 9]])
    assert batch.segments[0, 0] != batch.segments[1, 0]


def test_ratings_annotator_and_ends_of_prompts_drawn_by_hand():
    first = dataclasses.replace(
        encoded('a', 3, (2, 4, 2)), annotator=5, prompt_sizes=(3, 5, 2),
        ratings=np.float32([[1, np.nan], [2, 3], [np.nan, np.nan]]))
    second = dataclasses.replace(encoded('b', 0, (3,)), prompt_sizes=(2,),
                                 ratings=np.float32([[7, 8]]))
    layout, = packing.plan_layouts([first, second], row_length=12, rows=1)[:1]
    assert layout.attributes == 2
    packed, = packing.pack([first, second], [packing.Layout(16, 1, 3, 4, 2)])
    assert packed.indices == [0, 1]
    batch = packed.micro_batch
    # Row: p p p a a b b b b c c | x x x, responses at columns 3, 5, 9, the other at 11.
    # Ends: the last of the prompt; b's second token, as 4 - 3 = 1; inside of the prompt; x's
    # second.
    np.testing.assert_array_equal(
        batch.prompt_reads, [[2, 6, 1, 0], [12, 0, 0, 0], [0, 0, 0, 0]])
    # Where responses start: as far as the prompt alone goes.
    np.testing.assert_array_equal(batch.starts, [[3, 5, 2, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.reads, [[4, 8, 10, 0], [13, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.annotator, [5, -1, -1])
    nan = np.nan
    np.testing.assert_array_equal(batch.ratings, [
        [[1, nan], [2, 3], [nan, nan], [nan, nan]], [[7, 8], *[[nan, nan]] * 3],
        [[nan, nan]] * 4])


def test_ends_of_prompts_in_several_segments():
    item = dataclasses.replace(encoded('a', 4, (5, 3, 6)), prompt_sizes=(4, 5, 3))
    batch = packing.pack([item], [packing.Layout(12, 2, 1, 4)])[0].micro_batch
    # The first two beside each other from column 4 and 9 on, the third with a prompt of its own.
    np.testing.assert_array_equal(batch.prompt_reads, [[3, 9, 12 + 2, 0]])


@pytest.mark.parametrize('row_length', [12, 40, 100])
def test_ends_of_prompts_point_to_their_tokens(row_length):
    rng = np.random.default_rng(row_length)
    items = [dataclasses.replace(item, prompt_sizes=tuple(
        int(rng.integers(1 + len(item.prompt) + len(response))) for response in item.responses))
        for item in random_comparisons(40, seed=2)]
    layouts = packing.plan_layouts(items, row_length=row_length, rows=3)
    for packed in packing.pack(items, layouts):
        batch = packed.micro_batch
        for slot, index in enumerate(packed.indices):
            item = items[index]
            for k, (size, response) in enumerate(
                    zip(item.prompt_sizes, item.responses, strict=True)):
                end = max(size - 1, 0)
                row, column = divmod(batch.prompt_reads[slot, k], layouts[packed.layout].length)
                assert batch.tokens[row, column] == np.r_[item.prompt, response][end]
                assert batch.positions[row, column] == end
                # A response of no token of its own starts at the last.
                longest = len(item.prompt) + len(response)
                assert batch.starts[slot, k] == min(size, longest - 1)
                # In the same segment as the reward, and visible from there.
                read = divmod(batch.reads[slot, k], layouts[packed.layout].length)
                assert batch.segments[row, column] == batch.segments[read]
                assert batch.responses[row, column] in (0, batch.responses[read])
        assert not batch.prompt_reads[~batch.present].any()


def test_rows_are_as_long_as_the_data_need():
    small = encoded('a', 4, (5, 3))
    assert packing.fit_row_length([small], 16) == 16
    # A dialogue of 30 tokens; 33 tokens in all fit a row of four times 16: rounded up to 36.
    assert packing.fit_row_length([small, encoded('b', 10, (20, 3))], 16) == 40
    # 10 + 4 * 20 = 90 tokens are more than four rows: the prompt is repeated.
    many = encoded('c', 10, (20,) * 4)
    assert packing.fit_row_length([many], 16) == 64
    assert [len(run) for _, run in packing.runs(many, 64)] == [2, 2]
    # A dialogue of 100 tokens must fit, whatever it takes.
    assert packing.fit_row_length([encoded('d', 1, (99,))], 16) == 112


def test_lengths_are_rounded_to_eight_an_octave():
    assert [packing.round_length(n) for n in (1, 9, 64, 65, 72, 129, 673, 1000, 1025, 2000)] == [
        8, 16, 64, 80, 80, 160, 768, 1024, 1280, 2048]


def test_the_second_shape_has_a_quarter_of_the_tokens():
    items = [encoded(i, 4, (5, 3)) for i in range(40)]

    def shapes(**sizes):
        return [(x.rows, x.length) for x in packing.plan_layouts(items, **sizes)]

    assert shapes(row_length=16, rows=8) == [(8, 16), (2, 16)]
    assert shapes(row_length=16, rows=3) == [(3, 16), (1, 12)]
    assert shapes(row_length=64, rows=1) == [(1, 64), (1, 16)]
    assert shapes(row_length=32, rows=1) == [(1, 32)]  # no comparison of 12 fits a row of 8


def test_what_is_left_over_goes_to_the_smaller_shape():
    layouts = packing.Layout(48, 1, 8, 2), packing.Layout(12, 1, 8, 2)
    items = [encoded(i, 4, (5, 3)) for i in range(7)]
    expected = {4: [(0, 4)], 5: [(0, 4), (1, 1)], 7: [(0, 4), (1, 1), (1, 1), (1, 1)]}
    for count, found in expected.items():
        packed = packing.pack(items[:count], layouts)
        assert [(x.layout, len(x.indices)) for x in packed] == found
        counts = [int(stack.count) for stack in packing.make_batch(items[:count], layouts, 7)]
        assert counts == [1, len(found) - 1]


def test_steps_of_many_comparisons_are_packed_to_97_percent():
    items = synthetic(640, vocab_size=50, max_length=512, seed=0)  # lengths as in HH
    layouts = packing.plan_layouts(items, row_length=1024, rows=1)
    slots = sum(
        int(stack.count) * layout.rows * layout.length
        for start in range(0, 640, 64)
        for stack, layout in zip(
            packing.make_batch(items[start:start + 64], layouts, 64), layouts, strict=True)
    )
    assert sum(item.size for item in items) / slots > 0.97


@pytest.mark.parametrize(('row_length', 'rows'), [(10, 3), (40, 1), (64, 3)])
@pytest.mark.parametrize('seed', [0, 1])
def test_packing_keeps_every_comparison_once(row_length, rows, seed):
    items = random_comparisons(80, seed=seed)
    layouts = packing.plan_layouts(items, row_length=row_length, rows=rows)
    found = []
    for packed in packing.pack(items, layouts):
        batch = packed.micro_batch
        for slot, index in enumerate(packed.indices):
            item = items[index]
            found.append(index)
            assert batch.present[slot].sum() == len(item.responses)
            for k, response in enumerate(item.responses):
                row, column = divmod(batch.reads[slot, k], layouts[packed.layout].length)
                start = column - len(response) + 1
                np.testing.assert_array_equal(batch.tokens[row, start:column + 1], response)
                own = batch.segments[row] == batch.segments[row, column]
                prompt = own & (batch.responses[row] == 0)
                np.testing.assert_array_equal(batch.tokens[row, prompt], item.prompt)
                assert batch.positions[row, column] == len(item.prompt) + len(response) - 1
    assert sorted(found) == list(range(80))


def _wide():
    """Pairs, and a few comparisons of many responses."""
    rng = np.random.default_rng(0)
    return [*random_comparisons(100, responses=(2, 3)),
            *(encoded(f'wide {i}', 5, rng.integers(1, 12, count))
              for i, count in enumerate((130, 9, 130, 1000, 1000)))]


def test_comparisons_of_many_responses_have_shapes_of_their_own():
    items = _wide()
    layouts = packing.plan_layouts(items, row_length=64, rows=4)
    assert [layout.responses for layout in layouts] == [2, 2, 16, 256, 1024]
    assert [(layout.most, layout.examples) for layout in layouts] == [
        (0, 0), (0, 0), (1, 105), (2, 105), (2, 105)]
    assert [layout.slots for layout in layouts[2:]] == [2, 1, 1]
    # Any batch fits, also one with all of them and over several epochs.
    for indices in (range(105), [*range(100, 105)] * 2, [104, 0, 103, 1]):
        batch = packing.make_batch([items[i] for i in indices], layouts, 16)
        held = sum(int(stack.micro_batches.present.any(axis=-1).sum()) for stack in batch)
        assert held == len(indices)
    # What is known of pairs of responses takes memory as the comparisons of its shape do.
    batch = packing.make_batch([items[i] for i in range(16)], layouts, 16)
    sizes = [stack.micro_batches.preference.nbytes for stack in batch]
    assert sum(sizes[:3]) < 2**18
    assert sizes[3:] == [4 * 256**2 * 4, 4 * 1024**2 * 4]


def test_comparisons_of_many_responses_are_packed_once():
    items = _wide()
    layouts = packing.plan_layouts(items, row_length=64, rows=4)
    found = []
    for packed in packing.pack(items, layouts):
        for slot, index in enumerate(packed.indices):
            found.append(index)
            count = len(items[index].responses)
            assert packed.micro_batch.present[slot].sum() == count
            np.testing.assert_array_equal(
                packed.micro_batch.preference[slot, :count, :count], items[index].preference)
            assert layouts[packed.layout].responses < max(9, 8 * count)
    assert sorted(found) == list(range(105))


def _alone(item):
    """Each dialogue of a comparison by itself, without a shared prompt."""
    return [
        dataclasses.replace(item, prompt=response[:0], preference=np.zeros((1, 1), np.float32),
                            ratings=item.ratings[:1],
                            responses=(np.concatenate([item.prompt, response]),))
        for response in item.responses
    ]


@pytest.mark.parametrize('head', ['scalar', 'quantile'])
@pytest.mark.parametrize('row_length', [12, 40, 128])
def test_rewards_and_gradients_equal_those_of_dialogues_run_alone(head, row_length):
    items = random_comparisons(9, seed=3, responses=(2, 4))
    net, loss = network(head), loss_config(head)
    params = init(net)
    # Larger weights than at the start of training, so that attention has something to choose.
    params = jax.tree.map(lambda x: x * 3.0 if x.ndim > 1 else x, params)
    layouts = packing.plan_layouts(items, row_length=row_length, rows=2)
    packed = packing.pack(items, layouts)

    def stacked(batches):
        return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)

    def outputs(params, batches):
        return jax.lax.map(lambda batch: net(params, batch), batches)

    def objective(chosen, rejected):
        read = (net.head.read(x).distribution.mean for x in (chosen, rejected))
        if head == 'scalar':
            return losses.bradley_terry(*read)
        return losses.bradley_terry_quantile_huber(
            side(chosen), side(rejected), huber_weight=loss.huber_weight, kappa=loss.kappa,
            targets=loss.targets)

    numbers = sorted({one.layout for one in packed})
    by_layout = [[one for one in packed if one.layout == number] for number in numbers]

    def packed_loss(params):
        total, found = 0.0, []
        for some in by_layout:
            batch = stacked([one.micro_batch for one in some])
            quantiles = outputs(params, batch)
            known = losses.Judgement(batch.preference, batch.margin, batch.ratings, batch.annotator)
            each = jax.vmap(jax.vmap(functools.partial(losses.comparison_loss, loss)))
            total += jnp.sum(batch.weight * each(net.head.read(quantiles), known))
            found.append(quantiles)
        return total, found

    counts = [len(item.responses) for item in items]
    starts = np.cumsum([0, *counts])
    pairs, shares = zip(*(((start + i, start + j), 2 / (k * (k - 1)))
                          for start, k in zip(starts, counts, strict=False)
                          for i in range(k) for j in range(i + 1, k)), strict=True)
    chosen, rejected = np.transpose(pairs)

    def plain_loss(params):
        alone = stacked([single_batch(one, 40) for item in items for one in _alone(item)])
        q = outputs(params, alone)[:, 0, 0]
        return jnp.vdot(np.float32(shares), jax.vmap(objective)(q[chosen], q[rejected])), q

    (value, quantiles), gradient = jax.jit(
        jax.value_and_grad(packed_loss, has_aux=True))(params)
    (plain, alone), reference = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))(params)
    rewards = {items[index].id: of_batch[slot, :counts[index]]
               for some, of_layout in zip(by_layout, quantiles, strict=True)
               for one, of_batch in zip(some, of_layout, strict=True)
               for slot, index in enumerate(one.indices)}
    expected = {item.id: alone[start:start + count]
                for item, start, count in zip(items, starts, counts, strict=False)}
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    assert rewards.keys() == expected.keys()
    for name, reward in rewards.items():
        np.testing.assert_allclose(reward, expected[name], atol=1e-5)
    jax.tree.map(
        # A shift of all rewards changes no preference: such gradients are 0 but for rounding.
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(np.abs(b).max()) + 1e-6),
        gradient, reference)


def test_batches_of_all_steps_have_one_shape_and_compile_once():
    items = random_comparisons(60, seed=5, responses=(2, 4))
    layouts = packing.plan_layouts(items, row_length=32, rows=3)
    assert len(layouts) == 2
    net = network()
    params = init(net)
    traces = []

    @jax.jit
    def total(params, batch):
        traces.append(1)
        return sum(
            net(params, jax.tree.map(lambda x: x[0], stack.micro_batches)).sum()
            for stack in batch
        )

    for step in range(8):
        chosen = packing.batch_indices(step, seed=0, examples=60, batch_size=9, total=70)
        total(params, packing.make_batch([items[i] for i in chosen], layouts, 9))
    assert len(traces) == 1


@pytest.mark.parametrize('seed', range(20))
def test_stacks_are_large_enough_for_any_batch(seed):
    rng = np.random.default_rng(seed)
    items = random_comparisons(30, seed=seed, most=int(rng.integers(2, 21)), responses=(1, 5))
    layouts = packing.plan_layouts(items, row_length=int(rng.integers(8, 50)),
                                   rows=int(rng.integers(1, 6)))
    batch = packing.make_batch(items, layouts, 30)  # np.stack would refuse a stack that is short
    used = sum(int((stack.micro_batches.weight > 0).sum()) for stack in batch)
    assert used == 30


@pytest.mark.parametrize('responses', [(20, 20), (10,) * 16])
def test_comparisons_larger_than_a_row_still_share_micro_batches(responses):
    items = [encoded(i, 100, responses, seed=i) for i in range(64)]
    layout = packing.Layout(128, 8, 64, 16)
    needed = sum(len(packing.runs(item, 128)) for item in items)
    packed = packing.pack(items, [layout])
    assert len(packed) <= packing.stack_size(layout, 64)
    assert len(packed) <= 1.25 * needed / layout.rows + 1


@pytest.mark.parametrize('seed', range(200))
def test_first_fit_keeps_to_the_size_of_a_stack(seed):
    rng = np.random.default_rng(seed)
    items = [encoded(i, rng.integers(0, 30), rng.integers(1, 30, rng.integers(1, 9)))
             for i in range(30)]
    layouts = packing.plan_layouts(items, row_length=int(rng.integers(8, 90)),
                                   rows=int(rng.integers(1, 9)))
    size = int(rng.integers(1, 31))
    chosen = [items[i] for i in rng.permutation(30)[:size]]
    for stack, layout in zip(packing.make_batch(chosen, layouts, 30), layouts, strict=True):
        most = 3 if layout is not layouts[0] else packing.stack_size(layout, 30)
        assert stack.micro_batches.tokens.shape[0] == most


def test_every_epoch_is_a_permutation_and_a_step_needs_no_history():
    total = 2 * 23
    steps = [packing.batch_indices(s, seed=4, examples=23, batch_size=5, total=total)
             for s in range(10)]
    assert [len(s) for s in steps] == [5] * 9 + [1]
    stream = np.concatenate(steps)
    assert sorted(stream[:23]) == sorted(stream[23:]) == list(range(23))
    assert not np.array_equal(stream[:23], stream[23:])
    other = packing.batch_indices(0, seed=5, examples=23, batch_size=5, total=total)
    assert not np.array_equal(other, steps[0])


def test_batches_larger_than_the_data_draw_on_several_epochs():
    indices = packing.batch_indices(0, seed=0, examples=3, batch_size=7, total=7)
    np.testing.assert_array_equal(np.bincount(indices) >= 2, [True] * 3)


def test_devices_get_equal_numbers_of_comparisons_and_similar_work():
    items = random_comparisons(43, seed=1)
    parts = [[items[i] for i in part]
             for part in packing.share(np.array([x.size for x in items]), 8)]
    assert sorted(x.id for part in parts for x in part) == sorted(x.id for x in items)
    assert {len(part) for part in parts} == {5, 6}
    work = [sum(x.size for x in part) / len(part) for part in parts]
    assert max(work) < 1.5 * min(work)


def test_ties_and_later_responses_are_language_model_targets_only_if_preferred():
    tie = encoded('tie', 2, (2, 2), preference=[[0, 0.5], [0.5, 0]])
    second = encoded('second', 0, (2, 3), preference=[[0, 0], [1, 0]], weight=3.0)
    batch = packing.pack([tie, second], [packing.Layout(12, 1, 2, 2)])[0].micro_batch
    # Without a prompt the first token of a response is not predicted by anything.
    np.testing.assert_allclose(batch.lm_weights.sum(), 3.0)
    assert (batch.lm_weights > 0).sum() == 2
    targets = batch.lm_targets[batch.lm_weights > 0]
    np.testing.assert_array_equal(targets, second.responses[1][1:])


def test_a_response_that_was_compared_with_none_is_no_language_model_target():
    rated = dataclasses.replace(encoded('rated', 2, (3,)), ratings=np.float32([[-4]]))
    batch = single_batch(rated, 8)
    assert not batch.lm_weights.any()
    np.testing.assert_array_equal(batch.ratings, [[[-4]]])


def test_comparisons_that_all_are_larger_than_a_row_have_a_shape():
    items = [encoded(i, 5, (6,) * 20) for i in range(3)]
    layout, = packing.plan_layouts(items, row_length=16, rows=2)
    assert layout.length < items[0].size
    assert sorted(i for packed in packing.pack(items, [layout]) for i in packed.indices) == [
        0, 1, 2]


def test_what_cannot_be_packed_is_refused():
    item = encoded('a', 4, (20,))
    with pytest.raises(ValueError, match='nothing|no comparisons'):
        packing.plan_layouts([], row_length=8, rows=1)
    with pytest.raises(ValueError, match='a: 1 segments of up to 24 tokens fit no micro-batch'):
        packing.pack([item], [packing.Layout(16, 1, 1, 1)])
