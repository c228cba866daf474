"""What a run leaves in its folder, apart from checkpoints: config, versions, metrics.

    config.json        the resolved config           versions.json   packages and devices
    data_report.json   what became of the rows       model.json      architecture
    metrics.jsonl      one object a step             tokenizer/      tokenizer files
    checkpoints/       see `checkpoints`             features/       hidden states, see `features`
    seen.npz           what training rows are recognised by, see `seen`
    reference/         log-probabilities of what a policy is compared with, see `policy.dpo`
    monitor.json       evaluations of a policy that learns from rewards, with responses/, see
                       `policy.watch`
    normalisation.json what rewards in use are normalised by, see `serving.normalise`

Of several processes, which share the folder, the first one writes and the others read.
"""

import contextlib
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from qrm.data.seen import Seen

# Sections and keys that may differ when a run is resumed, as they do not change its course: data
# and frozen weights are known by their content, wherever they are; with another sharding, as on
# another number of devices, it rounds differently.
FREE_KEYS = ('evaluation.', 'analysis.', 'reproduce.', 'train.log_every', 'train.keep',
             'train.tensorboard', 'train.sharding', 'train.tensor', 'train.features', 'data.path',
             'data.cache', 'data.max_malformed', 'model.checkpoint', 'model.tokenizer')
_PACKAGES = ('qrm-jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'transformers',
             'tokenizers', 'datasets', 'safetensors', 'numpy', 'scipy')


class WorkdirError(ValueError):
    """The folder belongs to another run, or a run in it is still going on."""


@contextlib.contextmanager
def lock(workdir: str, *, wait: bool = False) -> Iterator[None]:
    """Keeps a second run out of the folder; freed by the system if this process dies.

    Of several processes of a run the first one holds the folder.

    Args:
      workdir: the folder, which is made if there is none.
      wait: for another run to leave it, in place of being refused.

    Raises:
      WorkdirError: another run holds the folder, or it cannot be written into.
    """
    if jax.process_index():
        yield
        return
    try:
        os.makedirs(workdir, exist_ok=True)
        held = open(os.path.join(workdir, '.lock'), 'w', encoding='utf-8')  # noqa: SIM115
    except OSError as error:
        raise WorkdirError(f'{workdir}: no folder to write into ({error.strerror})') from error
    with held as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise WorkdirError(
                    f'{workdir}: another process is running in this folder') from error
            print(f'waiting for another process in {workdir}', flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(folder: str) -> None:
    """Makes a folder, if there is none.

    Raises:
      WorkdirError: it cannot be made.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f'{folder}: no folder to write into ({error.strerror})') from error


def write_json(path: str, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def write_text(path: str, text: str) -> None:
    """Writes text atomically; of several processes the first one does."""
    write_bytes(path, text.encode())


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to an `.npz` file, as `write_bytes` does."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_bytes(path, file.getvalue())


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Reads arrays; no pickled objects are read.

    Raises:
      WorkdirError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError as error:
        raise WorkdirError(f'{path}: no such file; expected the folder of a run') from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise WorkdirError(f'{path}: damaged ({error})') from error


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part.

    Of several processes the first one does.
    """
    if jax.process_index():
        return
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f'.{name}.tmp')  # no name that someone else would choose
    with open(partial, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: str) -> Any:
    """Reads a JSON file.

    Raises:
      WorkdirError: it is missing or damaged.
    """
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise WorkdirError(f'{path}: no such file; expected the folder of a run') from error
    except OSError as error:
        raise WorkdirError(f'{path}: cannot be read ({error.strerror})') from error
    except ValueError as error:
        raise WorkdirError(f'{path}: not JSON ({error})') from error


def claim(workdir: str, config: ml_collections.ConfigDict) -> None:
    """Stores the config, by which the folder belongs to this run."""
    write_json(os.path.join(workdir, 'config.json'), json.loads(config.to_json()))


def check_claim(
    workdir: str, config: ml_collections.ConfigDict, *, gives_way: bool = False,
    free: Sequence[str] = FREE_KEYS
) -> None:
    """Checks that a run in this folder, if there is one, has the same config.

    Args:
      workdir: the folder.
      config: of the run to be.
      gives_way: one without a checkpoint, as it ended before its first, gives way to another.
      free: what keys begin with that may differ, see `config_changes`.

    Raises:
      WorkdirError: the folder holds a run whose config differs; names each key with both values.
    """
    path = os.path.join(workdir, 'config.json')
    changes = []
    if os.path.exists(path):
        changes = config_changes(read_json(path), json.loads(config.to_json()), free)
    if changes and not (gives_way and not _has_checkpoints(workdir)):
        raise WorkdirError(
            f'{workdir} holds a run with another config; choose another --workdir or take '
            'back these changes:\n  ' + '\n  '.join(changes)
        )
    multihost_utils.sync_global_devices('claims are read')
    if changes and not jax.process_index():
        shutil.rmtree(os.path.join(workdir, 'tokenizer'), ignore_errors=True)
        for name in ('config.json', 'model.json', 'metrics.jsonl'):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(workdir, name))
    multihost_utils.sync_global_devices('claims are given up')


def _has_checkpoints(workdir: str) -> bool:
    path = os.path.join(workdir, 'checkpoints')
    return os.path.isdir(path) and any(name.isdecimal() for name in os.listdir(path))


def config_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = FREE_KEYS
) -> list[str]:
    """Lists the keys that differ between two configs, but for those that are free to.

    By default these are the keys that do not change the course of a run.
    """
    flat_old, flat_new = dict(_flatten(old)), dict(_flatten(new))
    missing = object()
    return [
        f'config.{key}: {flat_old.get(key, "absent")!r} -> {flat_new.get(key, "absent")!r}'
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key, missing) != flat_new.get(key, missing)
        and not key.startswith(tuple(free))
    ]


def load_config(workdir: str) -> ml_collections.ConfigDict:
    """The locked config of a run.

    Raises:
      WorkdirError: the folder holds no run; names those one folder down.
    """
    path = os.path.join(workdir, 'config.json')
    if not os.path.exists(path):
        raise WorkdirError(f'{workdir}: not the folder of a run (no config.json)'
                           + runs_hint(workdir))
    values = read_json(path)
    if not isinstance(values, dict) or not values:
        raise WorkdirError(f'{path}: not the config of a run')
    return config_of(values)


def config_of(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The locked config that was written as these values of JSON."""
    return ml_collections.ConfigDict(_tuples(values)).lock()


def runs_hint(folder: str) -> str:
    """'; it holds the runs a, b: name one of them', or nothing if there are none."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    runs = [name for name in names if os.path.exists(os.path.join(folder, name, 'model.json'))]
    return f'; it holds the runs {", ".join(runs)}: name one of them' if runs else ''


def versions() -> dict[str, Any]:
    """Versions of Python and of the packages that matter, and the devices."""
    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    devices = [f'{d.platform} {d.device_kind}' for d in jax.devices()]
    return {'python': platform.python_version(), 'platform': platform.platform(),
            'packages': packages, 'devices': devices}


class Metrics:
    """Writes scalars to `metrics.jsonl`, and to TensorBoard if asked for, in the first process.

    On resume, rows past the restored step, which will be written again, are removed.
    """

    def __init__(self, workdir: str, *, resume_from: int, tensorboard: bool):
        path = os.path.join(workdir, 'metrics.jsonl')
        rows = [row for row in read_metrics(workdir) if row['step'] <= resume_from]
        write_text(path, ''.join(json.dumps(row) + '\n' for row in rows))
        path = os.devnull if jax.process_index() else path
        self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 (closed by close)
        self._board = None
        if tensorboard and not jax.process_index():
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(
                os.path.join(workdir, 'tensorboard'), purge_step=resume_from + 1
            )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one row; `split` is 'train' or 'validation'."""
        self._file.write(json.dumps({'step': step, 'split': split, **values}) + '\n')
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f'{split}/{name}', value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board:
            self._board.close()


def read_seen(workdir: str) -> Seen:
    """What the training rows of a run are recognised by.

    Raises:
      WorkdirError: there is nothing of the kind.
    """
    path = os.path.join(workdir, 'seen.npz')
    try:
        return Seen.from_arrays(read_arrays(path))
    except (KeyError, ValueError) as error:
        raise WorkdirError(f'{path}: not what a run has read ({error!r})') from error


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`; a last line cut by a kill is left out."""
    path = os.path.join(workdir, 'metrics.jsonl')
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file if line.endswith('\n')]


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


def _tuples(value: Any) -> Any:
    """JSON has no tuples, and a config does not take a tuple where it had a list."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
