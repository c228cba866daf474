"""A checkpoint is what its manifest says: anything else is set aside, or named."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.training import checkpoints as checkpoints_lib
from qrm.training.checkpoints import Checkpoints
from qrm.training.workdir import WorkdirError

LOSSES = {1: 0.5, 2: 0.4, 3: 0.6}
META = {'fingerprint': 'abc', 'layout': 'one'}


def _params(step):
    return {'backbone': {'kernel': jnp.arange(6.0).reshape(2, 3) + step},
            'head': {'bias': jnp.full(3, step, jnp.float32)}}


def _state(step):
    return {'step': jnp.int32(step)}


def _save(folder, losses, keep=3):
    with Checkpoints(str(folder), keep=keep) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, _params(step), _state(step), META | {'step': step}, loss)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    _save(folder, LOSSES)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'run')


def _best(folder):
    """Best and last step as reading finds them, and the bias of each."""
    with Checkpoints(str(folder), read_only=True) as checkpoints:
        found = [checkpoints.restore_params(which, _params(0)) for which in ('best', 'last')]
    return [(step, float(params['head']['bias'][0])) for step, params in found]


def test_what_a_signal_leaves_is_not_evaluated(tmp_path):
    _save(tmp_path, {1: 0.5, 2: None, 3: 0.6})
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert (checkpoints.steps, checkpoints.evaluated) == ([1, 2, 3], [1, 3])


def test_what_was_saved_is_restored(saved):
    with Checkpoints(str(saved), read_only=True) as checkpoints:
        assert checkpoints.steps == [1, 2, 3]
        assert (checkpoints.latest, checkpoints.best) == (3, 2)
        params, state, meta = checkpoints.restore(3, _params(0), _state(0))
    jax.tree.map(np.testing.assert_array_equal, params, _params(3))
    assert (int(state['step']), meta) == (3, META | {'step': 3})
    assert _best(saved) == [(2, 2.0), (3, 3.0)]


def _files(folder, step):
    root = folder / 'checkpoints' / str(step)
    return sorted(path for path in root.rglob('*') if path.is_file()
                  and path.name not in checkpoints_lib._UNVERIFIED)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    'flipped': _flip,
    'cut': lambda path: path.write_bytes(path.read_bytes()[:-1]),
    'emptied': lambda path: path.write_bytes(b''),
    'missing': lambda path: path.unlink(),
    'exchanged': lambda path: path.write_bytes(path.read_bytes()[::-1] + b'x'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_no_damaged_file_is_read(saved, tmp_path, damage, capsys):
    for number, path in enumerate(_files(saved, 3)):
        folder = shutil.copytree(saved, tmp_path / str(number))
        DAMAGES[damage](folder / path.relative_to(saved))
        item = path.relative_to(saved / 'checkpoints' / '3').parts[0]
        # Read alone only the parameters matter, and the manifest.
        readable = item not in ('params', 'manifest.json')
        last = 3 if readable else 2
        assert _best(folder) == [(2, 2.0), (last, float(last))], path
        # A run goes on from the newest good one, and keeps the damaged one.
        capsys.readouterr()
        with Checkpoints(str(folder), keep=3) as checkpoints:
            assert checkpoints.latest == 2, path
            assert 'note: ' in capsys.readouterr().out
            assert (folder / 'damaged' / '3').is_dir()
            params, _, _ = checkpoints.restore(2, _params(0), _state(0))
            jax.tree.map(np.testing.assert_array_equal, params, _params(2))
            checkpoints.save(3, _params(3), _state(3), META, 0.3)
        assert _best(folder) == [(3, 3.0), (3, 3.0)]


def test_files_of_another_checkpoint_are_found(copied):
    """Each is whole by itself."""
    for name in ('params', 'state', 'manifest.json'):
        place = copied / 'checkpoints'
        (place / '3' / name).rename(copied / 'old')
        if name == 'manifest.json':
            shutil.copy(place / '1' / name, place / '3' / name)
        else:
            shutil.copytree(place / '1' / name, place / '3' / name)
        with Checkpoints(str(copied), read_only=True) as checkpoints, pytest.raises(
                WorkdirError, match='damaged, its SHA-256|missing|does not belong'):
            checkpoints.restore(3, _params(0), _state(0))
        shutil.rmtree(place / '3' / name, ignore_errors=True)
        (place / '3' / name).unlink(missing_ok=True)
        (copied / 'old').rename(place / '3' / name)
    assert _best(copied)[1] == (3, 3.0)


def test_a_best_checkpoint_that_is_damaged_gives_way_to_the_next(copied, capsys):
    _flip(next(path for path in _files(copied, 2) if '/params/d/' in str(path)
               or 'ocdbt.process_0/d/' in str(path)))
    assert _best(copied) == [(1, 1.0), (3, 3.0)]
    assert 'damaged, its SHA-256 is not that of manifest.json' in capsys.readouterr().out
    with Checkpoints(str(copied), read_only=True) as checkpoints:
        with pytest.raises(WorkdirError, match=r'checkpoints/2/params/.*: damaged, its SHA-256'):
            checkpoints.restore_params(2, _params(0))
        with pytest.raises(WorkdirError, match=r'no checkpoint 7; there are \[1, 2, 3\], expected'):
            checkpoints.restore_params(7, _params(0))


def test_folders_that_are_no_checkpoints_are_set_aside(copied, capsys):
    """Orbax takes an empty folder whose name is a number for the newest checkpoint."""
    (copied / 'checkpoints' / '7').mkdir()
    (copied / 'checkpoints' / '8').mkdir()
    (copied / 'checkpoints' / '8' / 'notes.txt').write_text('mine')
    (copied / 'checkpoints' / 'notes').mkdir()
    assert _best(copied) == [(2, 2.0), (3, 3.0)]
    with Checkpoints(str(copied), keep=3) as checkpoints:
        assert (checkpoints.latest, checkpoints.steps) == (3, [1, 2, 3])
        checkpoints.save(4, _params(4), _state(4), META, None)
    assert capsys.readouterr().out.count('no checkpoint, or its manifest.json is damaged') == 2
    assert (copied / 'damaged' / '8' / 'notes.txt').read_text() == 'mine'
    assert (copied / 'checkpoints' / 'notes').is_dir()
    # Another one of that number does not take its place.
    (copied / 'checkpoints' / '7').mkdir()
    with Checkpoints(str(copied), keep=3):
        pass
    assert sorted(os.listdir(copied / 'damaged')) == ['7', '7-again', '8']


def test_a_loss_that_is_not_finite_ranks_nothing(tmp_path):
    _save(tmp_path, {1: 0.5})
    with Checkpoints(str(tmp_path)) as checkpoints:
        for loss in (np.nan, np.inf, -np.inf):
            with pytest.raises(ValueError, match='expected a finite number'):
                checkpoints.save(2, _params(2), _state(2), META, loss)
    assert _best(tmp_path) == [(1, 1.0), (1, 1.0)]


def test_the_last_few_and_the_best_are_kept(tmp_path):
    _save(tmp_path, {1: 0.1, 2: 0.4, 3: 0.3, 4: None, 5: 0.2}, keep=2)
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert (checkpoints.steps, checkpoints.best) == ([1, 4, 5], 1)


def test_a_save_that_fails_is_a_line_and_leaves_the_older_ones(tmp_path, monkeypatch):
    _save(tmp_path, {1: 0.5})

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    checkpoints = Checkpoints(str(tmp_path), keep=2)
    monkeypatch.setattr(checkpoints_lib, 'write_bytes', full)
    checkpoints.save(2, _params(2), _state(2), META, 0.1)  # written while the run goes on
    with pytest.raises(WorkdirError, match=r'could not be saved \(.*No space left on device'):
        checkpoints.save(3, _params(3), _state(3), META, 0.1)
    with pytest.raises(WorkdirError, match='could not be saved'), checkpoints:
        checkpoints.save(4, _params(4), _state(4), META, 0.1)
    monkeypatch.undo()
    assert _best(tmp_path) == [(1, 1.0), (1, 1.0)]
    _save(tmp_path, {2: 0.1})
    assert _best(tmp_path) == [(2, 2.0), (2, 2.0)]


def test_parameters_of_another_shape_are_named(saved):
    with Checkpoints(str(saved), read_only=True) as checkpoints:
        for change, expected in (
                ({'head': {'bias': jnp.zeros(4)}}, r"head/bias: \(\(3,\), 'float32'\), expected"),
                ({'head': {}}, 'head/bias: .*, expected nothing'),
                ({'head': {'bias': jnp.zeros(3, jnp.bfloat16)}}, "expected .*'bfloat16'"),
                ({'more': {'bias': jnp.zeros(3)}}, 'more/bias: nothing, expected')):
            with pytest.raises(ValueError, match=expected):
                checkpoints.restore_params(3, _params(0) | change)
