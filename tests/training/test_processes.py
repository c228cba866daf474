"""Two processes over loopback train as one with as many devices, and end together."""

import socket
import time

import pytest

from qrm.training import workdir
from tests.helpers import TINY, simulated
from tests.programs import forks

OVERRIDES = TINY | {'train.max_steps': 8, 'train.checkpoint_every': 3, 'optimizer.eps': 1e-3}


def start(folder, devices, *flags, strike=('nothing', 0), **overrides):
    """Starts the command with that many simulated devices."""
    environment = simulated(devices) | {'HF_HUB_OFFLINE': '1'}
    arguments = [strike[0], str(strike[1]),
                 '--config=configs/demo.py:helpful,quantile', f'--workdir={folder}', *flags,
                 *(f'--config.{key}={value}' for key, value in (OVERRIDES | overrides).items())]
    return forks.Process('tests.programs.on_processes', arguments, environment)


def end(processes):
    """(exit code, output, errors) of each; none outlives the test."""
    try:
        ends = [(*process.communicate(timeout=120), process.poll()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, out, err) for out, err, code in ends]


def run_two(folder, strike=('nothing', 0), seed_of_second=0, **overrides):
    """Two processes of one device each; what strikes, strikes the second one."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return end([
        start(folder, 1, f'--coordinator=127.0.0.1:{port}', '--num_processes=2',
              f'--process_id={i}', strike=strike if i else ('nothing', 0),
              **overrides | {'seed': i * seed_of_second})
        for i in (0, 1)])


# What a kill does is in `tests.studies.test_campaign`.
def test_two_processes_stop_fail_and_end_as_one_process_with_two_devices(tmp_path):
    one, two = str(tmp_path / 'one'), str(tmp_path / 'two')
    (code, _, err), = end([start(one, 2)])
    assert code == 0, err

    # A signal that comes to one while it makes the second batch is known to both after the third.
    ends = run_two(two, ('SIGTERM', 2), **{'train.sharding': 'fsdp', 'train.tensor': 2})
    for code, _, err in ends:
        assert code == 0, err
        assert f'saved {two} at step 3 of 8' in err
    assert 'saving after this step' not in ends[0][1]  # it came to the other

    began = time.monotonic()
    (survivor, out, err), (raised, _, err_of_raised) = run_two(two, ('raise', 3))
    assert f'resuming {two} at step 3 of 8' in out
    assert raised == 2
    assert 'process 1: error: no space left on device' in err_of_raised
    assert 'Traceback' not in err_of_raised
    assert survivor not in (0, None), err
    assert time.monotonic() - began < 90  # start and 30 s

    ends = run_two(two, **{'train.sharding': 'fsdp'})
    for code, _, err in ends:
        assert code == 0, err
    out = [line for line in ends[1][1].splitlines() if 'Gloo' not in line]
    assert out == []  # only the first one prints
    rows, expected = workdir.read_metrics(two), workdir.read_metrics(one)
    assert [row.pop('split') for row in rows] == [row.pop('split') for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_two_processes_keep_the_same_hidden_states_once(tmp_path):
    one, two = str(tmp_path / 'one'), str(tmp_path / 'two')
    settings = {'train.tune': 'head', 'train.rows': 1}
    for code, _, err in (*end([start(one, 2, **settings)]), *run_two(two, **settings)):
        assert code == 0, err
    rows, expected = workdir.read_metrics(two), workdir.read_metrics(one)
    assert [row.pop('split') for row in rows] == [row.pop('split') for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    sizes = [[path.stat().st_size for path in sorted((tmp_path / name).glob('features/*/*'))]
             for name in ('one', 'two')]
    assert sizes[0] == sizes[1]


def test_processes_with_different_configs_are_refused(tmp_path):
    (first, _, err), (second, _, err_of_second) = run_two(tmp_path / 'run', seed_of_second=1)
    assert (first, second) == (2, 2), err + err_of_second
    for text in (err, err_of_second):
        assert 'processes [1] have another config than process 0' in text
    assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize('given', [
    ['--num_processes=2'], ['--coordinator=127.0.0.1:1'],
    ['--coordinator=localhost', '--num_processes=2', '--process_id=1'],
    ['--coordinator=127.0.0.1:1', '--num_processes=2', '--process_id=2'],
    ['--coordinator=127.0.0.1:99999', '--num_processes=2', '--process_id=1'],
    ['--stall_minutes=nan'], ['--stall_minutes=1e300'],
])
def test_flags_of_processes_that_do_not_go_together_are_refused(given, tmp_path):
    (code, _, err), = end([start(tmp_path, 1, *given)])
    assert code == 2
    assert given[0].partition('=')[0] in err
    assert 'Traceback' not in err
