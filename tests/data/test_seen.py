"""What a run was trained on is kept as digests, and recognised."""

import io

import numpy as np
import pytest

from qrm.data.comparisons import Comparison, DataReport
from qrm.data.seen import Seen


def _row(prompt, *responses, **known):
    return Comparison('a', prompt, responses, prompt, **known)


SEEN = [_row('Why?', 'a', 'b'), _row('Why?', 'c', 'd'), _row('', 'x', 'y')]


def test_rows_and_questions_are_recognised():
    seen = Seen.of('digest', SEEN)
    report = DataReport('file', 'test')
    seen.note([_row('Why?', 'b', 'a', weight=2.0), _row('Why?', 'a', 'z'), _row('', 'x', 'y'),
               _row('How?', 'a', 'b'), _row('', 'x', 'z')], report)
    assert report.notes == {'row this run was trained on': 2,
                            'opening question this run was trained on': 2}
    report = DataReport('file', 'test')
    seen.note([_row('How?', 'a', 'b')], report)
    assert not report.notes


def test_digests_are_kept_without_texts_and_order():
    file = io.BytesIO()
    np.savez(file, **Seen.of('digest', SEEN).arrays())
    assert b'Why' not in file.getvalue()
    file.seek(0)
    with np.load(file) as arrays:
        assert Seen.from_arrays(arrays) == Seen.of('digest', SEEN)
    for name, array in Seen.of('digest', SEEN[::-1]).arrays().items():
        np.testing.assert_array_equal(array, Seen.of('digest', SEEN).arrays()[name])
    empty = Seen.of('digest', [])
    assert Seen.from_arrays(empty.arrays()) == empty
    with pytest.raises(KeyError):
        Seen.from_arrays({'source': np.array(['x'])})
