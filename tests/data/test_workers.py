"""Tests of work on many chunks by several processes."""

import math
import os

import pytest

from qrm.data import workers
from qrm.data.comparisons import DataError


@pytest.mark.parametrize('small', [0, 100])
def test_what_is_found_of_chunks_comes_in_order(small, monkeypatch):
    monkeypatch.setattr(workers, '_SMALL', small)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1}, raising=False)
    assert list(workers.in_order(math.factorial, iter(range(20)))) == [
        math.factorial(i) for i in range(20)]
    found = workers.in_order(math.sqrt, [4, 9, -1, 16])
    assert [next(found), next(found)] == [2, 3]
    with pytest.raises(ValueError, match='math domain error'):
        next(found)


def test_a_process_that_ends_is_an_error_in_a_line(monkeypatch):
    monkeypatch.setattr(workers, '_SMALL', 0)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1}, raising=False)
    with pytest.raises(DataError, match='ended before it was done: it was killed'):
        list(workers.in_order(os._exit, [3, 3, 3]))
