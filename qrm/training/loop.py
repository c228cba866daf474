"""The loop of a run, whatever it learns: steps, resume, held-out evaluation, checkpoints, records.

`training.train` and the runs of `policy` say what is learnt, as a `Course`; each reads from top to
bottom with `held` and `run`.
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qrm.data import packing
from qrm.data.comparisons import DataError, DataReport
from qrm.data.encoded import Encoded, Lengths, fingerprint
from qrm.data.seen import Seen
from qrm.models import parallel
from qrm.models.network import Network, Params, parameter_count
from qrm.training import base, step, workdir
from qrm.training.base import Base
from qrm.training.checkpoints import Checkpoints
from qrm.training.devices import Spread, fetch_number
from qrm.training.interruptions import Interrupted, NonFiniteLoss, Signals, watched
from qrm.training.schema import ConfigError


class Outcome(NamedTuple):
    """What `run` says of a run.

    Attributes:
      parameters: how many the model has, those that are not trained included.
      seconds_per_step: median, without compilation and held-out evaluation; None if too few steps
        were left to take.
    """

    parameters: int
    seconds_per_step: float | None


class Course(NamedTuple):
    """What a run learns, and how it computes.

    Attributes:
      examples: comparisons to learn from.
      network: whose step is taken.
      objective: what a step makes smaller, see `step.Objective`.
      trained: parameters before the first step, see `Tuning.split`.
      begin: what becomes of these where a run begins, not where it goes on.
      frozen: parameters that a step needs beside them.
      mesh: over which all are split; None: they are not.
      make_batch: comparisons of a step of one device -> their batch.
      evaluate: trained parameters -> held-out metrics; raises NonFiniteLoss that says what is not
        finite.
      criterion: of the held-out metrics that by which checkpoints are ranked, the lowest first.
      told: of the others those that are printed with it, if they are there.
      parameters: how many the whole model has.
      shapes: of micro-batches, for the terminal.
    """

    examples: Sequence[Encoded]
    network: Network
    objective: step.Objective
    trained: Params
    begin: Callable[[Params], Params]
    frozen: Params
    mesh: Mesh | None
    make_batch: Callable[[Sequence[Encoded]], packing.Batch]
    evaluate: Callable[[Params], dict[str, float]]
    criterion: str
    told: tuple[str, ...]
    parameters: int
    shapes: str


@contextlib.contextmanager
def held(config: Any, folder: str) -> Iterator[None]:
    """Holds the folder of a run that is going to be, after what can be checked before any data.

    Args:
      config: a checked config.
      folder: the workdir.

    Raises:
      ConfigError: a package is missing, or processes have different configs.
      WorkdirError: the folder belongs to another run, or one is going on in it.
    """
    if config.train.tensorboard and not importlib.util.find_spec('tensorboardX'):
        raise ConfigError('config.train.tensorboard=True needs tensorboardX: pip install '
                          "'qrm-jax[tensorboard]'")
    _check_same_config(config)
    with workdir.lock(folder):
        workdir.check_claim(folder, config, gives_way=True)
        yield


def _check_same_config(config: Any) -> None:
    """Checks that all processes of a run have the config of the first one, which is kept.

    Raises:
      ConfigError: this one or another has not; all of them raise it.
    """
    digest = hashlib.sha256(config.to_json(sort_keys=True).encode()).digest()
    digests = np.reshape(multihost_utils.process_allgather(np.frombuffer(digest, np.uint8)),
                         (-1, len(digest)))
    if different := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
        raise ConfigError(f'processes {different} have another config than process 0, expected '
                          'the same flags everywhere')


def identify(
    config: Any, start: Base | None, encoded: Mapping[str, Sequence[Encoded]]
) -> dict[str, str]:
    """By what data and weights are known that a run starts with, wherever they are.

    Args:
      config: of the run.
      start: where frozen parameters come from; None if there are none.
      encoded: 'train' and 'validation' -> comparisons.
    """
    start = start or base.find(
        config.model.checkpoint, config.seed, config.train.frozen_dtype, frozen=True)
    return {'fingerprint': fingerprint(encoded['train'], encoded['validation']),
            'start': start.digest}


def check_same_run(folder: str, identity: dict[str, str]) -> None:
    """Checks that a run in this folder goes on with what it started with.

    Raises:
      DataError: it has other data, or other weights.
    """
    if not os.path.isdir(os.path.join(folder, 'checkpoints')):
        return
    with Checkpoints(folder, read_only=True) as checkpoints:
        known = checkpoints.meta or identity
    for key, what in (('fingerprint', 'the training comparisons are not those'),
                      ('start', 'the weights that training starts from are not those')):
        if known[key] != identity[key]:
            raise DataError(f'{folder}: {what} this run started with; choose another --workdir or '
                            'restore them')


def record(folder: str, reports: Mapping[str, DataReport], seen: Seen) -> None:
    """Writes what a run began with: versions, reports of the data, by what rows are recognised."""
    workdir.write_json(os.path.join(folder, 'versions.json'), workdir.versions())
    workdir.write_json(os.path.join(folder, 'data_report.json'),
                       {split: report.as_dict() for split, report in reports.items()})
    workdir.write_arrays(os.path.join(folder, 'seen.npz'), seen.arrays())


def run(config: Any, folder: str, course: Course, identity: dict[str, str]) -> Outcome:
    """Takes all steps of a run that its folder does not have yet.

    Args:
      config: a checked config; of its sections `optimizer`, `train` and the seed are read.
      folder: the workdir, which is held and claimed.
      course: what is learnt.
      identity: by what data and weights are known that it starts with, see `check_same_run`.

    Raises:
      ConfigError: there is no step to take.
      NonFiniteLoss: the run cannot go on; the last checkpoint is from before.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    examples = course.examples

    # Shapes and length of the run.
    sizes = Lengths.of(examples).sizes
    batch_size, devices = config.train.batch_size, jax.device_count()
    total = round(config.train.epochs * len(examples))
    steps = -(-total // batch_size)
    if not steps:
        raise ConfigError(f'config.train.epochs={config.train.epochs} of '
                          f'{len(examples)} comparisons is not one comparison')
    if config.train.max_steps:
        steps = min(steps, config.train.max_steps)
        total = min(total, steps * batch_size)

    # State and step.
    optimizer = step.make_optimizer(config.optimizer, steps)
    rates = np.broadcast_to(step.make_schedule(config.optimizer, steps)(np.arange(steps)), steps)
    spread = Spread(course.mesh)
    run_step = spread.compile(step.make_train_step(course.network, course.objective, optimizer))
    layout = f'{devices} x {jax.devices()[0].device_kind}, {config.train.sharding}'
    if spread.shares < devices:
        layout += f', tensor groups of {devices // spread.shares}'

    def make_batches(number: int) -> list[packing.Batch]:
        """Batches of this process's devices or tensor groups."""
        return list(map(course.make_batch, _own_parts(examples, sizes, indices(number), spread)))

    def indices(number: int) -> np.ndarray:
        return packing.batch_indices(number, seed=config.seed, examples=len(examples),
                                     batch_size=batch_size, total=total)

    def not_finite(number: int, what: str) -> NonFiniteLoss:
        ids = ', '.join(examples[i].id for i in indices(number))
        return NonFiniteLoss(f'{folder}: step {number} gave {what}; comparisons in its batch: '
                             f'{ids}')

    def held_out_metrics(trained: Params, number: int) -> dict[str, float]:
        try:
            return course.evaluate(trained)
        # An update can overflow where loss and gradient did not.
        except NonFiniteLoss as error:
            raise not_finite(number, str(error)) from error

    with (watched() as progressed, Checkpoints(folder, keep=config.train.keep) as checkpoints,
          Signals() as signals):
        start, trained = 0, course.trained
        if checkpoints.latest is None:
            trained = course.begin(trained)
        state = step.init_state(trained, optimizer, config.seed, course.mesh,
                                teacher=course.objective.ema_decay is not None)
        if checkpoints.latest is not None:
            start = checkpoints.latest
            trained, rest, meta = checkpoints.restore(
                start, state.params, state._replace(params=None))
            if meta['layout'] != layout:
                print(f'note: the run started on {meta["layout"]} and goes on on {layout}; the '
                      'last digits may differ', flush=True)
            state = parallel.arrange(rest._replace(params=trained), course.network.architecture,
                                     course.mesh)
            print(f'resuming {folder} at step {start} of {steps}', flush=True)
        fixed = course.parameters - parameter_count(state.params)
        print(f'{course.parameters - fixed:,} parameters'
              f'{f" ({fixed:,} more are frozen)" if fixed else ""}, {len(examples)} comparisons, '
              f'{steps} steps of {batch_size} on {layout}; micro-batches {course.shapes}',
              flush=True)
        state, frozen = spread.start(state), spread.start(course.frozen)
        log = workdir.Metrics(folder, resume_from=start, tensorboard=config.train.tensorboard)
        progress = _Progress(steps)
        pending: list[tuple[int, Any]] = []
        known: list[jax.Array] = []
        seconds: list[float] = []
        interrupted = ''

        def flush(running: int) -> None:
            """Fetches, checks and writes the metrics of all steps so far but those running."""
            row: dict[str, float] = {}
            for number, values in pending[:len(pending) - running]:
                row = {name: fetch_number(value) for name, value in values.items()}
                if not all(map(math.isfinite, row.values())):
                    raise not_finite(number, str(row))
                row = course.objective.as_row(row)
                row['learning_rate'] = float(rates[number])
                log.write(number + 1, 'train', row)
            del pending[:len(pending) - running]
            if row:
                progress.update(number + 1, row)

        def save(done: int, loss_held_out: float | None) -> None:
            progressed()  # held-out comparisons may have taken long
            own = spread.to_save(
                parallel.restore(state, course.network.architecture, course.mesh))
            meta = identity | {'layout': layout}
            checkpoints.save(done, own.params, own._replace(params=None), meta, loss_held_out)

        try:
            for number in range(start, steps):
                progressed()
                began = time.monotonic()
                batches = make_batches(number)
                stop = np.int32(bool(signals.received))
                placed = spread.put([(batch, stop) for batch in batches])
                # All that a step needs is on the devices; a hidden copy would stall it.
                with jax.transfer_guard('disallow'):
                    state, values, stops = run_step(state, placed, frozen)
                pending.append((number, values))
                # The host stays one step ahead of the device, no more: a signal is served soon.
                if len(pending) > 1:
                    jax.block_until_ready(pending[-2])
                seconds.append(time.monotonic() - began)
                done, stopped = number + 1, bool(signals.received)
                if jax.process_count() > 1:
                    # A signal may have come to some; all know of it after one more step.
                    known.append(stops)
                    stopped = len(known) > 1 and bool(fetch_number(known.pop(0)))
                due = done % config.train.checkpoint_every == 0 or done == steps
                if due or stopped:
                    flush(0)
                elif done % config.train.log_every == 0:
                    flush(1)  # the device never waits for the host to write
                if due:
                    held_out = held_out_metrics(spread.one(state.params), number)
                    log.write(done, 'validation', held_out)
                    save(done, held_out[course.criterion])
                    shown = [f'{name} {held_out[name]:.4f}'
                             for name in dict.fromkeys((course.criterion, *course.told))
                             if name in held_out]
                    progress.note(done, f'held-out {", ".join(shown)}')
                if stopped:
                    if not due:
                        save(done, None)
                    interrupted = (f'{signals.received or "stopped"}: saved {folder} at step '
                                   f'{done} of {steps}; run the same command again to go on')
                    break
        finally:
            progress.close()
            log.close()
    if interrupted:
        raise Interrupted(interrupted)
    # The first steps wait for compilation, and for none before them.
    return Outcome(course.parameters, float(np.median(seconds[3:])) if len(seconds) > 3 else None)


def _own_parts(
    examples: Sequence[Encoded], sizes: np.ndarray, places: np.ndarray, spread: Spread
) -> list[list[Encoded]]:
    """Comparisons of a step for each share of this process; no others are read.

    Args:
      examples: all comparisons.
      sizes: tokens of each of them.
      places: numbers of those of the step.
      spread: how they are dealt.
    """
    parts = packing.share(sizes[places], spread.shares)
    return [[examples[i] for i in places[parts[share]]] for share in spread.own]


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; time starts after the first steps.

    The first update comes after compilation, which the estimated time must not contain.
    """

    def __init__(self, steps: int):
        self._steps = steps
        self._bar: tqdm.tqdm | None = None
        self._start: tuple[int, float] | None = None

    def update(self, done: int, row: dict[str, float]) -> None:
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm.tqdm(total=self._steps, initial=done, unit='step', leave=False)
            shown = {name: f'{row[name]:.4f}' for name in ('loss', 'accuracy') if name in row}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - self._bar.n)
        if self._start is None:
            self._start = done, time.monotonic()

    def note(self, done: int, text: str) -> None:
        text = f'step {done}/{self._steps}: {text}'
        if self._bar is not None:
            self._bar.write(text)
            return
        if self._start and done > self._start[0]:
            pace = (time.monotonic() - self._start[1]) / (done - self._start[0])
            text += f', {pace:.2f} s/step, {pace * (self._steps - done):.0f} s left'
        print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
