"""Checkpoints of a training run: asynchronous, atomic, verified, the last few and the best.

    checkpoints/STEP/params, state     parameters; optimiser, step, RNG key
    checkpoints/STEP/manifest.json     what else belongs to it, and what its files are
    damaged/STEP                       one that was set aside

A checkpoint is what its manifest says. The manifest is written before the checkpoint appears, has
the digest of every file and one of itself, so that a flipped bit, a cut or exchanged file, and a
folder that merely has a number for a name are found before anything is read of them. The metric
that ranks checkpoints is a held-out loss, see `metrics.criterion`.
"""

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from qrm.data.comparisons import in_a_line
from qrm.models.architecture import flat
from qrm.training.workdir import WorkdirError, write_bytes

_METRIC = 'loss'
_TRIES = 5  # at a checkpoint, while a run deletes old ones
_MANIFEST = 'manifest.json'
# What orbax writes after the manifest, and reads nothing of.
_UNVERIFIED = ('commit_success.txt', '_CHECKPOINT_METADATA')
_ITEMS = ('params', 'state')


class Manifest(NamedTuple):
    """What belongs to a checkpoint beside its arrays.

    Attributes:
      loss: held-out loss; None if it was not evaluated.
      meta: whatever the run needs to go on.
      files: path within the checkpoint -> SHA-256.
    """

    loss: float | None
    meta: dict[str, Any]
    files: dict[str, str]


class Checkpoints:
    """The checkpoints of one workdir; use as a context manager, so that saves are finished.

    Args:
      workdir: folder of the run.
      keep: how many of the last checkpoints to keep, beside the best.
      read_only: only restore; nothing in the folder is touched, and no other process waited for.

    With several processes all of them save and restore together. If one of them leaves by an
    exception, which the others may not have, it does not wait for saves to be finished.

    Raises:
      WorkdirError: there is nothing to read.
    """

    def __init__(self, workdir: str, *, keep: int = 1, read_only: bool = False):
        self._workdir = workdir
        self._path = os.path.abspath(os.path.join(workdir, 'checkpoints'))
        self._saving: tuple[int, float | None, dict[str, Any]] | None = None
        self._manager = None
        if read_only:
            if not os.path.isdir(self._path):
                raise WorkdirError(f'{self._path}: no such folder; expected the checkpoints of a '
                                   'run')
            return
        if not jax.process_index():
            self._set_aside()
        multihost_utils.sync_global_devices('checkpoints are verified')
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[_METRIC], reverse=True, n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        self._manager = ocp.CheckpointManager(self._path, options=ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics[_METRIC],
            best_mode='min',
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        ))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
        if self._manager is None or (kind is not None and jax.process_count() > 1):
            return
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:  # else it is said already, or follows from what is
                raise self._not_saved(error) from error

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints."""
        return sorted(self._manifests())

    @property
    def evaluated(self) -> list[int]:
        """Steps of those with a held-out loss, which one that a signal left does not have."""
        return [step for step, found in sorted(self._manifests().items())
                if found.loss is not None]

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return max(self.steps, default=None)

    @property
    def meta(self) -> dict[str, Any] | None:
        """What the newest checkpoint was saved with; None if there is none."""
        manifests = self._manifests()
        return manifests[max(manifests)].meta if manifests else None

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the lowest held-out loss, the latest of equals."""
        return next(iter(self._ranked()), None)

    def save(
        self, step: int, params: Any, state: Any, meta: dict[str, Any], loss: float | None
    ) -> None:
        """Starts saving; `loss` is the held-out loss at this step, None if not evaluated.

        Raises:
          ValueError: a step that is not newer than the latest, or a loss that is not finite,
            which would rank this checkpoint above all others.
          WorkdirError: this checkpoint, or the one before, cannot be written.
        """
        if loss is not None and not np.isfinite(loss):
            raise ValueError(f'held-out loss {loss} at step {step}, expected a finite number')
        try:
            self._manager.wait_until_finished()
            self._saving = step, loss, meta
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), state=ocp.args.StandardSave(state)),
                metrics=None if loss is None else {_METRIC: loss},
                force=True,
            )
        except Exception as error:  # of files and of many layers above them
            raise self._not_saved(error) from error
        if not saved:
            raise ValueError(f'step {step} is not newer than the latest checkpoint {self.latest}')

    def restore(self, step: int, params: Any, state: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Restores (params, state, meta); the arguments give shapes, dtypes and how to split.

        Raises:
          ValueError: the checkpoint has other parameters.
          WorkdirError: there is none, or it is damaged.
        """
        if problem := self._problem(step, _ITEMS):
            raise WorkdirError(problem)
        return (self._restore(step, 'params', params), self._restore(step, 'state', state),
                self._manifests()[step].meta)

    def restore_params(self, which: int | str, params: Any) -> tuple[int, Any]:
        """Restores parameters alone, of a checkpoint where they are as they were saved.

        A run that goes on may delete what is being read: then it is chosen anew.

        Args:
          which: 'best', 'last' or a step. In place of a best or last one that is damaged the next
            good one is taken, and a note is printed.
          params: give shapes, dtypes and how to split.

        Returns:
          The step, and its parameters.

        Raises:
          ValueError: the checkpoint has other parameters.
          WorkdirError: there is none, or the one that is asked for is damaged.
        """
        for _ in range(_TRIES):
            steps, problem = self.steps, ''
            order = {'best': self._ranked(), 'last': steps[::-1]}.get(
                which, [which] if which in steps else [])
            for step in order:
                try:
                    problem = self._problem(step, ('params',))
                    if not problem:
                        return step, self._restore(step, 'params', params)
                except Exception as error:  # of files that vanish, and of many layers above them
                    if os.path.isdir(self._folder(step)):
                        raise ValueError(f'checkpoint {step}: {in_a_line(error)}') from error
                if not os.path.isdir(self._folder(step)):
                    break
                print(f'note: {problem}', flush=True)
            else:
                raise WorkdirError(problem or (
                    f'{self._workdir}: no checkpoint {which!r}; there are {steps}, expected one of '
                    "them, 'best' or 'last'"))
        raise WorkdirError(f'{self._workdir}: checkpoints were deleted while they were read, by '
                           'the run that goes on there')

    def digest(self, step: int) -> str:
        """Hexadecimal digest of a checkpoint's parameters, by what its manifest says of them.

        '': there is no such checkpoint any more.
        """
        manifest = _read_manifest(self._folder(step))
        files = manifest.files if manifest else {}
        own = sorted((name, digest) for name, digest in files.items()
                     if name.split('/')[0] == 'params')
        return hashlib.sha256(json.dumps(own).encode()).hexdigest() if own else ''

    def _restore(self, step: int, item: str, like: Any) -> Any:
        # A run restores in all processes together; to read alone no other one is waited for.
        processes = ocp.options.MultiprocessingOptions()
        if self._manager is None:
            this = jax.process_index()
            processes = ocp.options.MultiprocessingOptions(
                primary_host=this, active_processes={this}, barrier_sync_key_prefix=f'alone{this}')
        path = os.path.join(self._folder(step), item)
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=processes)
        with ocp.Checkpointer(handler, multiprocessing_options=processes) as reader:
            if item == 'params':
                _check_shapes(handler.metadata(epath.Path(path)).tree, like)
            return reader.restore(path, args=ocp.args.StandardRestore(_abstract(like)))

    def _folder(self, step: int) -> str:
        return os.path.join(self._path, str(step))

    def _manifests(self) -> dict[int, Manifest]:
        """Step -> manifest of all folders that have one which is whole."""
        found = {}
        for name in os.listdir(self._path) if os.path.isdir(self._path) else ():
            if name.isdecimal() and str(int(name)) == name:
                manifest = _read_manifest(self._folder(int(name)))
                if manifest is not None:
                    found[int(name)] = manifest
        return found

    def _ranked(self) -> list[int]:
        """Steps with a held-out loss, the lowest first, of equals the latest."""
        losses = {step: manifest.loss for step, manifest in self._manifests().items()
                  if manifest.loss is not None}
        return sorted(losses, key=lambda step: (losses[step], -step))

    def _problem(self, step: int, items: Sequence[str]) -> str:
        """What is wrong with these items of a checkpoint; '' if nothing is."""
        folder = self._folder(step)
        manifest = _read_manifest(folder)
        if manifest is None:
            return f'{folder}: no checkpoint, or its {_MANIFEST} is damaged'
        def own(files):
            return {name for name in files if name.split('/')[0] in items}

        expected, found = own(manifest.files), own(_files(folder))
        if not expected:
            return f'{folder}: no {" and ".join(items)}'
        for name in sorted(expected | found):
            path = os.path.join(folder, name)
            if name not in expected:
                return f'{path}: a file that does not belong to the checkpoint'
            if name not in found:
                return f'{path}: missing'
            if _sha256(path) != manifest.files[name]:
                return f'{path}: damaged, its SHA-256 is not that of {_MANIFEST}'
        return ''

    def _set_aside(self) -> None:
        """Moves what is no checkpoint out of the way, and damaged ones that are the newest."""
        names = os.listdir(self._path) if os.path.isdir(self._path) else []
        steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
        verified = False
        for step in steps:
            # Of older ones only what ranks them is read here.
            items = ('metrics',) if verified else (*_ITEMS, 'metrics')
            problem = self._problem(step, items)
            if verified and 'no metrics' in problem:
                continue
            if not problem:
                verified = True
                continue
            place = os.path.join(self._workdir, 'damaged', str(step))
            while os.path.exists(place):
                place += '-again'
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.rename(self._folder(step), place)
            print(f'note: {problem}; it is now {place}', flush=True)

    def _write_manifest(self) -> None:
        """Writes the manifest of the checkpoint that is being saved; called before it appears."""
        if jax.process_index():
            return
        step, loss, meta = self._saving
        folder, = glob.glob(os.path.join(glob.escape(self._path), f'{step}.orbax-checkpoint-tmp*'))
        files = {name: _sha256(os.path.join(folder, name)) for name in _files(folder)}
        content = json.dumps(Manifest(loss, meta, files)._asdict(), sort_keys=True).encode() + b'\n'
        digest = hashlib.sha256(content).hexdigest().encode()
        write_bytes(os.path.join(folder, _MANIFEST), digest + b'\n' + content)

    def _not_saved(self, error: Exception) -> WorkdirError:
        return WorkdirError(f'{self._path}: a checkpoint could not be saved '
                            f'({in_a_line(error)[:300]}); older ones are as they were')


def _read_manifest(folder: str) -> Manifest | None:
    """The manifest of a checkpoint; None if it has none that is whole."""
    try:
        with open(os.path.join(folder, _MANIFEST), 'rb') as file:
            digest, _, content = file.read().partition(b'\n')
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    return Manifest(**json.loads(content))


def _files(folder: str) -> list[str]:
    """Paths within a folder of all files that a manifest speaks of."""
    found = [os.path.relpath(os.path.join(place, name), folder)
             for place, _, names in os.walk(folder) for name in names]
    return sorted(name for name in found if name != _MANIFEST
                  and os.path.basename(name) not in _UNVERIFIED)


def _sha256(path: str) -> str:
    """Hexadecimal digest of a file; '' if it cannot be read."""
    try:
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError:
        return ''


def _check_shapes(found: Any, expected: Any) -> None:
    """Checks that saved parameters have the paths, shapes and dtypes that are expected.

    Raises:
      ValueError: names the first that has not.
    """
    saved, wanted = ({path: (tuple(leaf.shape), np.dtype(leaf.dtype).name)
                      for path, leaf in flat(tree).items()} for tree in (found, expected))
    for path in sorted(saved.keys() | wanted.keys()):
        if saved.get(path) != wanted.get(path):
            raise ValueError(f'{path}: {saved.get(path, "nothing")}, expected '
                             f'{wanted.get(path, "nothing")}')


def _abstract(tree: Any) -> Any:
    """Shapes where the leaves are split, or else on this process's first device.

    So a checkpoint restores on any number of devices, split or not.
    """
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        place = leaf.sharding if isinstance(leaf.sharding, jax.sharding.NamedSharding) else local
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(shape, tree)
