"""Tests of the counts of work."""

import jax
import numpy as np
import pytest

from qrm import costs, packing
from qrm.attention import attention_mask
from tests.helpers import DECODER, encoded, init, network, random_comparisons


def test_matrix_parameters_by_hand_and_as_they_are():
    # A block of width 16 and inner width 32: 16 * 48 + 16 * 16 + 16 * 32 + 32 * 16 = 2048; two.
    assert costs.matmul_parameters(DECODER) == 4096
    leaves = jax.tree_util.tree_leaves_with_path(init(network())['decoder'])
    assert costs.matmul_parameters(DECODER) == sum(
        leaf.size for path, leaf in leaves if path[-1].key == 'kernel')


@pytest.mark.parametrize(('prompt', 'responses', 'expected'), [
    (2, (1, 3), 18),  # prompt 1 + 2; response a 3; response b 3 + 4 + 5
    (0, (2,), 3),
    (3, (1,), 10),  # a dialogue of four tokens: 1 + 2 + 3 + 4
    (3, (1, 1), 14),  # the second response sees the prompt and itself
])
def test_visible_pairs_by_hand(prompt, responses, expected):
    assert costs.visible_pairs(encoded('x', prompt, responses)) == expected


@pytest.mark.parametrize('item', random_comparisons(5, seed=3))
def test_visible_pairs_are_those_of_the_attention_mask(item):
    layout = packing.Layout(item.size, 1, 1, len(item.responses))
    batch = packing.pack([item], [layout])[0].micro_batch
    mask = np.asarray(attention_mask(batch.segments, batch.responses))
    assert costs.visible_pairs(item) == mask[batch.segments > 0].sum()


def test_useful_flops_by_hand():
    items = [encoded('x', 2, (1, 3))]
    # Six tokens at 2 * 4096, 18 pairs at 4 * 16 features in each of two blocks.
    assert costs.useful_flops(DECODER, items, training=False) == 6 * 8192 + 18 * 128 == 51456
    assert costs.useful_flops(DECODER, items, training=True) == 3 * 51456
    assert costs.useful_flops(DECODER, items * 2, training=False) == 2 * 51456
    assert costs.useful_flops(DECODER, [], training=True) == 0


def test_tokens_by_hand():
    items = [encoded('x', 2, (1, 3)), encoded('y', 4, (2,)), encoded('z', 0, (1, 1, 1))]
    assert costs.distinct_tokens(items) == 6 + 6 + 3
    assert costs.repeated_tokens(items) == (3 + 5) + 6 + 3
    # In twos: dialogues of 3, 5 and 6 tokens take 3 * 6; the last batch 3 * 1.
    assert costs.padded_tokens(items, 2) == 18 + 3
    assert costs.padded_tokens(items, 1) == 10 + 6 + 3
    assert costs.padded_tokens(items, 8) == 6 * 6
