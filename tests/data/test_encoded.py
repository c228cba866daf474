"""Tests of tables of comparisons in tokens: decoded, they are what was written."""

import dataclasses
import hashlib

import numpy as np
import pytest

from qrm.data import encoded as encoded_lib
from qrm.data import orders, packing
from qrm.data.encoded import Candidates, EncodedTable, Lengths, Ranges, fingerprint
from qrm.data.tables import Cache, Table
from tests.helpers import encoded, random_comparisons


def _paired(name, k):
    """A comparison of K responses that is read as orders of two."""
    rng = np.random.default_rng(k)
    preference = rng.random((k, k), np.float32)
    return dataclasses.replace(
        encoded(name, 2, (3,) * (k * (k - 1)), preference=orders.preference(preference)),
        candidates=Candidates(preference, rng.random((k, 2), np.float32), tuple(range(1, k + 1))))


PAIRED = [_paired('two', 2), _paired('three', 3), _paired('more', 5)]
ITEMS = [
    *random_comparisons(40, seed=1),
    dataclasses.replace(encoded('rated', 0, (3,)), ratings=np.array([[0.1, np.nan]], np.float32),
                        margin=0.3, weight=1 / 3, annotator=4, prompt_sizes=(2,)),
    encoded('large', 3, (5,) * 70),
    *PAIRED,
    encoded('last', 2, (4, 1)),
]


def _table(items, vocabulary=50):
    columns = encoded_lib.schema(vocabulary)
    batches = [encoded_lib.rows_of(items[start:start + 7], columns)
               for start in range(0, len(items), 7)]
    return EncodedTable(Table(batches, columns))


def _assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(other):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if field.name == 'responses':
                assert [x.tolist() for x in a] == [x.tolist() for x in b]
                assert {x.dtype for x in a} == {np.dtype(np.int32)}
            elif isinstance(b, np.ndarray):
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype
            elif isinstance(b, Candidates):
                for x, y in zip(a, b, strict=True):
                    np.testing.assert_array_equal(x, y)
                    assert type(x) is type(y)
                assert (a.preference.dtype, a.ratings.dtype) == (np.float32, np.float32)
            else:
                assert (a, type(a)) == (b, type(b))


@pytest.mark.parametrize('vocabulary', [50, 2**16, 2**16 + 1])
def test_comparisons_come_back_as_they_were(vocabulary):
    table = _table(ITEMS, vocabulary)
    assert encoded_lib.schema(vocabulary).field('tokens').type.value_type.bit_width == (
        16 if vocabulary <= 2**16 else 32)
    _assert_same(table, ITEMS)
    _assert_same([table[i] for i in range(-3, 5)], [ITEMS[i] for i in range(-3, 5)])
    _assert_same(table[5:20][3:], ITEMS[8:20])
    _assert_same(table[::-1], ITEMS[::-1])
    assert fingerprint(table) == fingerprint(ITEMS)
    assert fingerprint(table[:9], table[9:]) == fingerprint(ITEMS)


def test_comparisons_that_are_all_read_as_orders_come_back_too():
    _assert_same(_table(PAIRED), PAIRED)


def test_tokens_that_do_not_fit_are_not_written():
    item = dataclasses.replace(encoded('a', 1, (2, 2)), prompt=np.array([2**16], np.int32))
    with pytest.raises(ValueError, match='65536'):
        _table([item])


@pytest.mark.parametrize('some', [slice(None), slice(3, 30), slice(41, 42)])
def test_lengths_and_ranges_are_those_of_the_comparisons(some):
    items, table = ITEMS[some], _table(ITEMS)[some]
    for found in (Lengths.of(table), Lengths.of(items)):
        assert found.sizes.tolist() == [item.size for item in items]
        assert found.longest.tolist() == [item.longest for item in items]
        assert found.counts.tolist() == [len(item.responses) for item in items]
    for found in (Ranges.of(table), Ranges.of(items)):
        whole = [np.concatenate([item.prompt, *item.responses]) for item in items]
        assert found.low.tolist() == [ids.min() for ids in whole]
        assert found.high.tolist() == [ids.max() for ids in whole]
        assert found.annotator.tolist() == [item.annotator for item in items]


def test_batches_of_a_table_are_those_of_a_list():
    items, table = ITEMS[:40], _table(ITEMS)[:40]
    layouts = packing.plan_layouts(items, row_length=32, rows=4)
    assert packing.plan_layouts(table, row_length=32, rows=4) == layouts
    for one, other in zip(packing.make_batch(table, layouts, 40),
                          packing.make_batch(items, layouts, 40), strict=True):
        for a, b in zip((one.count, *one.micro_batches), (other.count, *other.micro_batches),
                        strict=True):
            np.testing.assert_array_equal(a, b)


def test_fingerprints_of_tables_with_a_key_are_kept(tmp_path, monkeypatch):
    columns, cache = encoded_lib.schema(50), Cache(str(tmp_path))
    table = EncodedTable(Table([encoded_lib.rows_of(ITEMS[:9], columns)], columns), 'key', cache)
    known = fingerprint(table, table)
    monkeypatch.setattr(encoded_lib, '_fingerprint', None)
    assert fingerprint(table, table) == known == fingerprint_of_lists(ITEMS[:9] * 2)


def fingerprint_of_lists(items):
    """The same by another way: bytes of all arrays, one after the other."""
    parts = []
    for item in items:
        for array in (item.prompt, *item.responses, item.preference, item.ratings):
            parts += [str(array.shape).encode(), array.tobytes()]
        parts.append(f'{item.margin} {item.weight} {item.annotator} {item.prompt_sizes}'.encode())
    return hashlib.sha256(b''.join(parts)).hexdigest()
