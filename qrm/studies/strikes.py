"""Runs that are killed, stopped, starved and started twice, and what the campaign's trials share.

A trial is a function of what all trials share, a generator and a folder of its own. It returns how
it ended, of a few kinds that are counted, and what was seen that must not be.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qrm.data import tokens
from qrm.data.comparisons import DataError
from qrm.data.tokens import Reading
from qrm.models import families
from qrm.models.network import RewardNetwork
from qrm.rewards import losses
from qrm.rewards.heads import HeadConfig
from qrm.serving import export
from qrm.training import config as config_lib
from qrm.training import reward_model, workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.reward_model import RewardModel
from qrm.training.schema import ConfigError
from qrm.training.workdir import WorkdirError

REFUSED = (ConfigError, DataError, WorkdirError, NonFiniteLoss)

# Of the runs that are broken: seconds each.
TINY = {
    'data.path': 'demo', 'data.demo.train': 200, 'data.demo.test': 60, 'model.checkpoint': '',
    'model.tokenizer': '',
    'model.sizes.vocab_size': 300, 'model.sizes.max_positions': 192, 'model.sizes.hidden_size': 16,
    'model.sizes.num_layers': 1, 'model.sizes.num_heads': 2, 'train.batch_size': 16,
    'train.rows': 4, 'train.row_length': 192, 'train.epochs': 8.0, 'train.checkpoint_every': 5,
    'train.log_every': 1, 'train.keep': 2, 'model.dropout': 0.1,
}
_LONGEST = 120  # seconds of a command that is not broken, beside others
_SECONDS_TO_END = 10  # after a signal
_SECONDS_ALONE = 60  # of a process whose peer is dead
_SETTINGS = {'model_type': 'llama', 'vocab_size': 280, 'max_position_embeddings': 64,
             'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 4,
             'num_key_value_heads': 2, 'intermediate_size': 24, 'rope_theta': 10000.0}


class Outcome(NamedTuple):
    """What came of a trial.

    Attributes:
      how: one of a few kinds, to be counted.
      wrong: what was seen that must not be; '' if it survived.
    """

    how: str
    wrong: str = ''


def tiny_config(**changes: Any) -> Any:
    """The config of a run of seconds."""
    config = config_lib.schema.build(config_lib.KEYS, TINY)
    config.update_from_flattened_dict(changes)
    return config


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all trials share, made when it is first needed.

    Attributes:
      folder: where it is kept.
    """

    folder: Path

    @functools.cached_property
    def run(self) -> tuple[Path, float]:
        """A run that nothing happened to, and the seconds it took with everything compiled."""
        for name in ('first', 'run'):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            began = time.monotonic()
            _finish(_start('train', self.folder / name))
            seconds = time.monotonic() - began
        return self.folder / 'run', seconds

    @functools.cached_property
    def pair_of_processes(self) -> tuple[Path, float]:
        """The same by two processes."""
        place = self.folder / 'two'
        shutil.rmtree(place, ignore_errors=True)
        began = time.monotonic()
        for process in _start_two(place):
            _finish(process)
        return place, time.monotonic() - began

    @functools.cached_property
    def model(self) -> Path:
        """A small reward model in the Hugging Face layout."""
        place = self.folder / 'model'
        shutil.rmtree(place, ignore_errors=True)
        export.export(self.classifier, str(place), kind='mean')
        return place

    @functools.cached_property
    def classifier(self) -> RewardModel:
        """The reward model that `model` was written from."""
        texts = [f'word{i} and word{i * 7 % 50}, {i}' for i in range(60)]
        network = RewardNetwork(families.architecture(_SETTINGS), HeadConfig('scalar'))
        params = jax.tree.map(lambda x: 3.0 * x, jax.jit(network.init)(jax.random.key(0)))
        return RewardModel(network, _SETTINGS, params, tokens.train_tokenizer(texts, 270),
                           losses.LossConfig('bradley_terry'), Reading(64))

    @functools.cached_property
    def rewards(self) -> np.ndarray:
        """What the model gives to `TEXTS`."""
        return score(str(self.model))


TEXTS = (['word1 and', 'word3 and word4, 5', 'a'], [[' word2', ' word7, 9'], [' 1'], [' b', '']])


def score(place: str, **options: Any) -> np.ndarray:
    """Rewards that a model gives to `TEXTS`, one after the other."""
    return np.concatenate(reward_model.load(place, **options).score(*TEXTS).rewards)


def killed(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """kill -9 at a random moment; the rerun must end as if nothing had happened."""
    reference, seconds = ground.run
    process = _start('train', folder / 'run')
    ended = _after(process, rng.uniform(0.0, 1.1 * seconds), signal.SIGKILL)
    return Outcome('ended before' if ended else 'killed', _rerun(folder / 'run', reference))


def killed_of_two(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """One of two processes is killed; the other must end, and the rerun as if nothing had been."""
    reference, seconds = ground.pair_of_processes
    processes = _start_two(folder / 'run')
    victim = int(rng.integers(2))
    ended = _after(processes[victim], rng.uniform(0.2, 1.0) * seconds, signal.SIGKILL)
    other, began = processes[1 - victim], time.monotonic()
    try:
        other.communicate(timeout=_SECONDS_ALONE)
    except subprocess.TimeoutExpired:
        other.kill()
        return Outcome('killed', f'the other process goes on after {_SECONDS_ALONE} s')
    how = 'ended before' if ended else f'killed process {victim}'
    if not ended and not other.returncode and not (folder / 'run' / 'checkpoints').exists():
        return Outcome(how, f'the other ended with 0 after {time.monotonic() - began:.0f} s')
    wrong = [_finish(process, check=False) for process in _start_two(folder / 'run')]
    return Outcome(how, ''.join(wrong) or _difference(folder / 'run', reference))


def stopped(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """SIGTERM or SIGINT at a random moment: saved and ended within seconds, and goes on."""
    reference, seconds = ground.run
    process = _start('train', folder / 'run')
    number = (signal.SIGTERM, signal.SIGINT)[rng.integers(2)]
    ended = _after(process, rng.uniform(0.0, 1.1 * seconds), number)
    began = time.monotonic()
    try:
        _, errors = process.communicate(timeout=2 * _SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        return Outcome(number.name, f'goes on {2 * _SECONDS_TO_END} s after {number.name}')
    took = time.monotonic() - began
    saved = 'saved' in errors
    how = 'ended before' if ended else f'{number.name}, {"saved" if saved else "before training"}'
    if took > _SECONDS_TO_END:
        return Outcome(how, f'ended {took:.1f} s after {number.name}')
    # Before the program is loaded the system ends it.
    if 'Traceback' in errors or process.returncode not in (0, -number):
        return Outcome(how, f'exit code {process.returncode}: {errors[-500:]}')
    return Outcome(how, _rerun(folder / 'run', reference, saved=saved))


def disk_full(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """A disk that is full at some byte: an error in a line, and the rerun goes on with more."""
    reference, _ = ground.run
    small = folder / 'small'
    small.mkdir()
    space = int(rng.integers(20, 1600))  # KiB, of which a whole run takes about 1,300
    script = f"""
set -e
mount -t tmpfs -o size={space}k tmpfs {small}
set +e
{_shell('train', small / 'run')} > {folder}/out 2> {folder}/err
echo $? > {folder}/code
ls {small}/run > /dev/null 2>&1
mount -o remount,size=256m {small}
{_shell('train', small / 'run')} > {folder}/out2 2> {folder}/err2
echo $? > {folder}/code2
cp -r {small}/run {folder}/run
"""
    made = subprocess.run(['unshare', '--user', '--map-root-user', '--mount', 'bash', '-c', script],
                          env=_environment(), capture_output=True, text=True,
                          timeout=4 * _LONGEST, check=False)
    if not (folder / 'code2').exists():
        return Outcome('not run', f'no small file system can be made here: {made.stderr[-300:]}')
    code, errors = int((folder / 'code').read_text()), (folder / 'err').read_text()
    how = 'fitted' if code == 0 else 'full'
    lines = [line for line in errors.splitlines() if line.startswith('error: ')]
    if code and (code != 2 or len(lines) != 1 or 'Traceback' in errors):
        return Outcome(how, f'exit code {code}: {errors[-500:]}')
    if int((folder / 'code2').read_text()):
        return Outcome(how, f'the rerun: {(folder / "err2").read_text()[-500:]}')
    return Outcome(how, _difference(folder / 'run', reference))


def run_twice(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """The same command twice at once: one is refused, nothing is lost."""
    reference, seconds = ground.run
    first = _start('train', folder / 'run')
    time.sleep(rng.uniform(0.0, 0.8) * seconds)
    second = _start('train', folder / 'run')
    ends = [(*process.communicate(timeout=_LONGEST), process.returncode)
            for process in (first, second)]
    codes = sorted(code for *_, code in ends)
    refused = [errors for _, errors, code in ends if code]
    how = 'one refused' if refused else 'one after the other'
    if codes not in ([0, 0], [0, 2]) or any(
            'another process is running in this folder' not in errors for errors in refused):
        return Outcome(how, f'exit codes {codes}: {"".join(refused)[-500:]}')
    return Outcome(how, _difference(folder / 'run', reference))


def _environment() -> dict[str, str]:
    return os.environ | {'HF_HUB_OFFLINE': '1', 'PYTHONFAULTHANDLER': '1',
                         'PYTHONPATH': os.pathsep.join(sys.path)}


def _command(name: str, folder: Path, *flags: str) -> list[str]:
    settings = [f'--config.{key}={value}' for key, value in TINY.items()]
    return [sys.executable, '-c', 'from qrm.commands.main import main; main()', name,
            '--config=hh:helpful,quantile', f'--workdir={folder}', *settings, *flags]


def _shell(name: str, folder: Path) -> str:
    return ' '.join("'" + part.replace("'", "'\\''") + "'" for part in _command(name, folder))


def _start(name: str, folder: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(_command(name, folder, *flags), env=_environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _start_two(folder: Path) -> Sequence[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return [_start('train', folder, f'--coordinator=127.0.0.1:{port}', '--num_processes=2',
                   f'--process_id={i}', f'--stall_minutes={_LONGEST / 120}') for i in (0, 1)]


def _after(process: subprocess.Popen[str], seconds: float, number: int) -> bool:
    """Sends a signal after some time; whether the process had ended by then."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.communicate()
        return False
    process.communicate()
    return True


def _finish(process: subprocess.Popen[str], *, check: bool = True) -> str:
    """What is wrong with the end of a process that nothing happens to."""
    try:
        _, errors = process.communicate(timeout=_LONGEST)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # says where it stands
        _, errors = process.communicate()
        errors = f'goes on after {_LONGEST} s: {errors}'
    wrong = '' if process.returncode == 0 else (
        f'exit code {process.returncode}: {errors[-3000:]}')
    if wrong and check:
        raise RuntimeError(wrong)
    return wrong


def _rerun(folder: Path, reference: Path, *, saved: bool = False) -> str:
    """What is wrong with the end of a run that is started again, see `_difference`."""
    return _finish(_start('train', folder), check=False) or _difference(folder, reference, saved)


def _difference(folder: Path, reference: Path, saved: bool = False) -> str:
    """What is different at the end of a run; '' if every bit is the same.

    A signal saves at its own step, which then may be one of the last that are kept: where it
    `saved`, one regular checkpoint may be another one.
    """
    if workdir.read_metrics(str(folder)) != workdir.read_metrics(str(reference)):
        return 'other metrics'
    found, expected = digests(folder), digests(reference)
    if saved and len(found) == len(expected) and len(found.keys() - expected.keys()) == 1:
        own, = found.keys() - expected.keys()
        missing, = expected.keys() - found.keys()
        since = own % TINY['train.checkpoint_every']
        if since and missing == own - since and own < max(expected):
            del found[own], expected[missing]
    return '' if found == expected else f'checkpoints {found}, not {expected}'


def digests(folder: Path) -> dict[int, str]:
    """Step -> digest of the parameters of its checkpoint."""
    with Checkpoints(str(folder), read_only=True) as checkpoints:
        steps = checkpoints.steps
    return {step: digest(reward_model.load(str(folder), step=step).params) for step in steps}


def digest(params: Any) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:12]
