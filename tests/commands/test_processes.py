"""A command ends in a line and an exit code, whatever ends it."""

import signal
import subprocess
import sys

import jax
import pytest

from qrm.commands import processes
from qrm.data.comparisons import DataError
from qrm.training.interruptions import Interrupted, NonFiniteLoss
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def left(monkeypatch):
    """Exit codes of ends without Python's own, which would end the tests."""
    found = []
    monkeypatch.setattr(processes.os, '_exit', found.append)
    return found


def _end(error, capsys):
    """Exit code and errors of a command that is ended by an error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def main():
        raise error

    code = 0
    try:
        processes.run(main, None, None, None, 30.0)
    except SystemExit as end:
        code = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(('error', 'code', 'expected'), [
    (DataError('rows.jsonl:3: bad'), 2, 'error: rows.jsonl:3: bad\n'),
    (NonFiniteLoss('step 3'), 2, 'error: step 3\n'),
    (Interrupted('SIGTERM: stopped'), 0, 'SIGTERM: stopped\n'),
    (OSError(28, 'No space left on device', 'run/metrics.jsonl'), 2,
     'error: run/metrics.jsonl: No space left on device\n'),
    (OSError('a quota'), 2, 'error: a quota\n'),
])
def test_what_ends_a_command_is_a_line(error, code, expected, capsys, left):
    assert _end(error, capsys) == (code, expected)
    # XLA may still compile or compute when a signal has ended the work.
    assert left == [0] * isinstance(error, Interrupted)


@pytest.mark.parametrize('error', [
    MemoryError(), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory\nallocating 9 G'),
    jax.errors.JaxRuntimeError('INTERNAL: Error dispatching computation: Out of memory allocating'),
])
def test_too_little_memory_is_a_line_that_says_what_to_change(error, capsys):
    code, text = _end(error, capsys)
    assert code == 2
    assert text.startswith('error: too little memory (')
    assert 'train.row_length' in text
    assert text.count('\n') == 1


def test_an_error_of_the_program_is_a_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        _end(ZeroDivisionError('one'), capsys)


_STANDSTILL = """
import sys, time
from qrm.training import interruptions
interruptions.end_stalls(float(sys.argv[1]))
with interruptions.watched() as progressed:
    for _ in range(int(sys.argv[2])):
        time.sleep(0.4)
        progressed()
        with interruptions.watched():
            pass
    def wait_for_a_peer():
        time.sleep(60 if sys.argv[3] else 0)
    wait_for_a_peer()
time.sleep(1.5)  # outside of it nothing is expected
"""


@pytest.mark.parametrize(('patience', 'steps', 'stalls', 'code'), [
    ('1', '5', '', 0), ('1', '2', 'stalls', 1), ('0', '5', '', 0)])
def test_a_process_that_makes_no_progress_says_where_it_stands(patience, steps, stalls, code):
    done = subprocess.run([sys.executable, '-c', _STANDSTILL, patience, steps, stalls], cwd=ROOT,
                          capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == code, done.stderr
    assert ('in wait_for_a_peer' in done.stderr) == bool(code)
