"""Tests of the measurement of many pairs: what it makes, and that both starts read the same."""

import json
import os
import subprocess
import sys

from benchmarks import data
from qrm.data.files import read_rows
from tests.helpers import word_pairs


def _dialogue(number, answer):
    return (f'\n\nHuman: what about number {number} today\n\nAssistant: it sounds fine enough'
            f'\n\nHuman: really sure about that\n\nAssistant: {answer}')


def test_pairs_are_like_those_that_they_are_made_of(tmp_path):
    rows = [{'chosen': _dialogue(i, 'certainly quite good'),
             'rejected': _dialogue(i, 'perhaps rather bad')} for i in range(5)]
    os.makedirs(tmp_path / 'texts')
    (tmp_path / 'texts' / 'train.jsonl').write_text(
        ''.join(json.dumps(row) + '\n' for row in rows))
    data.generate(str(tmp_path / 'texts'), str(tmp_path / 'pairs.jsonl'), 50)
    made = [row for _, row in read_rows(str(tmp_path / 'pairs.jsonl'))]
    assert len(made) == 50
    changed = 0
    for number, row in enumerate(made):
        for side, text in row.items():
            given = rows[number % 5][side]
            assert len(text.split()) == len(given.split())
            changed += sum(map(str.__ne__, text.split(), given.split()))
        prompts = {text[:text.rfind('\n\nAssistant:')] for text in row.values()}
        assert len(prompts) == 1
    words = sum(len(text.split()) for row in made for text in row.values())
    assert 0.02 < changed / words < 0.1


def test_both_starts_read_all_pairs(tmp_path):
    keys = word_pairs(tmp_path)
    found = [data.measure(keys['data.path'], keys['model.checkpoint'], str(tmp_path / 'kept'))
             for _ in range(2)]
    assert [one['pairs'] for one in found] == [40, 40]
    assert len(list((tmp_path / 'kept' / 'tokens').glob('*/entry.json'))) == 3
    # What a run is recognised by is made, too, and kept.
    assert len(list((tmp_path / 'kept' / 'fingerprints').glob('*/entry.json'))) == 1
    for one in found:
        assert 0 < one['of these imports'] <= one['seconds']
        assert one['GiB with those it started'] > 0


def test_memory_is_that_of_all_processes_together():
    """Two that hold 32 MiB each beside this one, of which one was started by the other."""
    hold = 'held = bytearray(b"x") * 2**25; print("held", flush=True); input()'
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {hold!r}], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
child.stdout.readline()
{hold}"""
    before = data.together()
    with subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        added = data.together() - before
        process.communicate('\n')
    assert 2**26 < added < 2**27
