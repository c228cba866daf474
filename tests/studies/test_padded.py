"""Rewards where the paper's own code reads them, against transformers 4.30.2 and by hand."""

import numpy as np
import pytest

from qrm.studies import padded
from qrm.training import reward_model
from tests.helpers import REFERENCE, ROOT, reference_checkpoint

SHARED = ROOT / '../shared'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return reward_model.load(str(reference_checkpoint(tmp_path_factory.mktemp('padded'))),
                             outputs='quantiles')


def test_outputs_are_those_of_transformers(model):
    # Four rows in one batch: read inside, in the padding, in the padding, in the padding.
    expected = np.load(REFERENCE / 'padded.npz')
    tokens, at_columns = expected['tokens'], expected['outputs']
    eos = model.tokenizer.eos_token_id
    rows = [np.append(row[row != eos], eos) for row in tokens]
    first, second = padded.outputs(model, [(rows[0], rows[2]), (rows[1], rows[3])], 2)
    reads = (tokens != eos).sum(axis=1) - 1
    assert reads.tolist() == [10, 1, 5, 2]
    assert (tokens == eos).sum(axis=1).tolist() == [1, 10, 6, 9]
    expected = at_columns[np.arange(4), reads]
    for i, found in enumerate((first[0], second[0], first[1], second[1])):
        np.testing.assert_allclose(found, expected[i], rtol=2e-5, atol=2e-5)
    # The longest row has no padding in either batch and is read at the token before EOS.
    [(alone, _)] = padded.outputs(model, [(rows[0], rows[0])], 1)
    np.testing.assert_allclose(alone, expected[0], rtol=2e-5, atol=2e-5)
    # Others are read elsewhere beside longer ones.
    assert np.abs(second[0] - padded.outputs(model, [(rows[1], rows[1])], 1)[0][0]).max() > 0.01


def test_last_columns_are_those_of_transformers(model):
    expected = np.load(REFERENCE / 'padded.npz')
    tokens, at_columns = expected['tokens'], expected['outputs']
    eos = model.tokenizer.eos_token_id
    rows = [np.append(row[row != eos], eos) for row in tokens]
    first, second = padded.outputs(model, [(rows[0], rows[2]), (rows[1], rows[3])], 2, last=True)
    for i, found in enumerate((first[0], second[0], first[1], second[1])):
        np.testing.assert_allclose(found, at_columns[i, -1], rtol=2e-5, atol=2e-5)


def test_a_last_batch_that_is_short_is_a_batch_of_its_own(model):
    eos = model.tokenizer.eos_token_id
    draw = np.random.default_rng(0)
    pairs = [tuple(np.append(draw.integers(0, 30, size), eos) for size in draw.integers(1, 12, 2))
             for _ in range(5)]
    together = padded.outputs(model, pairs, 4)
    np.testing.assert_allclose(together[4], padded.outputs(model, pairs[4:], 1)[0], rtol=2e-5,
                               atol=2e-5)


def test_places_by_hand():
    # Widths 6 and 5. Columns read are length - 2; the text begins at width - length.
    lengths = np.array([[6, 3], [4, 5], [5, 2]])
    # 6: column 4, the last of the text; 3: column 1 before column 3; 4: column 2, its first token;
    # 5: column 3 of 1 to 4. In the second batch 5: the end; 2: column 0 before 3.
    assert padded.places(lengths, 2) == (6, 2, 2, 2)
    # Each pair by itself: only the longer side is read at the end.
    assert padded.places(lengths, 1) == (6, 3, 1, 2)


@pytest.mark.parametrize(('workload', 'expected'), [
    ('harmless', (130, 17, 38, 75)), ('helpful', (158, 20, 38, 100))])
def test_places_of_the_published_pairs(workload, expected):
    from qrm.studies import published
    folder, tokenizer = SHARED / 'paper', SHARED / 'gpt2-tokenizer'
    if not folder.exists() or not tokenizer.exists():
        pytest.skip(f'{folder} or {tokenizer} is not there')
    lengths = published.lengths(published.read_pairs(str(folder), workload), str(tokenizer))
    assert padded.places(lengths, 4) == expected
