"""The loop of a run, whatever it learns: steps, resume, held-out evaluation, checkpoints, records.

`training.train` and the runs of `policy` say what is learnt, as a `Course`; each reads from top to
bottom with `held` and `run`. What steps are fed with a `Source` gives: comparisons that there are,
or those that the policy in training makes.
"""

import contextlib
import functools
import hashlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qrm.data import packing
from qrm.data.comparisons import DataError, DataReport
from qrm.data.encoded import Encoded, Lengths, fingerprint
from qrm.data.seen import Seen
from qrm.models import parallel
from qrm.models.network import Network, Params, parameter_count
from qrm.training import base, step, workdir
from qrm.training.base import Base
from qrm.training.checkpoints import Checkpoints
from qrm.training.devices import Spread, fetch_number, release_programs
from qrm.training.interruptions import Interrupted, NonFiniteLoss, Signals, watched
from qrm.training.schema import ConfigError

_PROGRAMS = 8  # steps that a process keeps for runs to come

# What a run cannot go on with, by what it is known by.
_OTHERS = {
    'fingerprint': 'the training comparisons are not those',
    'start': 'the weights that training starts from are not those',
    'reward': 'the reward model is not the one', 'judge': 'the judge is not the one'}


class Outcome(NamedTuple):
    """What `run` says of a run.

    Attributes:
      parameters: how many the model has, those that are not trained included.
      seconds_per_step: median, without compilation and held-out evaluation; None if too few steps
        were left to take.
    """

    parameters: int
    seconds_per_step: float | None


class Fed(NamedTuple):
    """What a step is fed.

    Attributes:
      batches: of this process's devices.
      metrics: what is known before the step, and is logged with its own.
    """

    batches: list[packing.Batch]
    metrics: dict[str, float]


class Source(Protocol):
    """Where the batches of a run come from.

    Attributes:
      steps: of the whole run, at least 1.
      about: what they are made of, for the terminal.
    """

    steps: int
    about: str

    def feed(self, number: int, trained: Callable[[], Params]) -> Fed:
        """What step `number` is fed; steps are asked for in order, from any one on.

        Args:
          number: of the step, from 0.
          trained: gives the parameters before it, which are gone after it.
        """

    def ids(self, number: int) -> list[str]:
        """Of what stands in the batch of a step that was fed."""

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint has to keep so that the next steps are fed the same; always the same
        names, shapes and dtypes (of 32 bits)."""

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""


class Examples:
    """A source of comparisons that there are; what a step is fed is a pure function of its number.

    Args:
      config: of a run; `train` and the seed are read.
      examples: comparisons to learn from.
      make_batch: comparisons of a share of a step -> their batch.
      spread: how steps are dealt to devices.

    Raises:
      ConfigError: there is no step to take.
    """

    def __init__(self, config: Any, examples: Sequence[Encoded],
                 make_batch: Callable[[Sequence[Encoded]], packing.Batch], spread: Spread):
        self._examples, self._make_batch, self._spread = examples, make_batch, spread
        self._sizes = Lengths.of(examples).sizes
        self._seed, self._batch_size = config.seed, config.train.batch_size
        self._total = round(config.train.epochs * len(examples))
        self.steps = -(-self._total // self._batch_size)
        if not self.steps:
            raise ConfigError(f'config.train.epochs={config.train.epochs} of {len(examples)} '
                              'comparisons is not one comparison')
        if config.train.max_steps:
            self.steps = min(self.steps, config.train.max_steps)
            self._total = min(self._total, self.steps * self._batch_size)
        self.about = f'{len(examples)} comparisons'

    def feed(self, number: int, unused_trained: Callable[[], Params]) -> Fed:
        """See `Source`."""
        return Fed(self.batches(self._indices(number)), {})

    def batches(self, places: np.ndarray) -> list[packing.Batch]:
        """Of the comparisons at these places, one for each share of this process."""
        return [self._make_batch([self._examples[i] for i in part])
                for part in own_parts(self._sizes, places, self._spread)]

    def ids(self, number: int) -> list[str]:
        """See `Source`."""
        return [self._examples[i].id for i in self._indices(number)]

    def state(self) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Of nothing."""

    def _indices(self, number: int) -> np.ndarray:
        return packing.batch_indices(
            number, seed=self._seed, examples=len(self._examples), batch_size=self._batch_size,
            total=self._total)


class Course(NamedTuple):
    """What a run learns, and how it computes.

    Attributes:
      source: what steps are fed with.
      network: whose step is taken.
      objective: what a step makes smaller, see `step.Objective`.
      trained: parameters before the first step, see `Tuning.split`.
      begin: what becomes of these where a run begins, not where it goes on.
      frozen: parameters that a step needs beside them.
      mesh: over which all are split; None: they are not.
      evaluate: trained parameters, and after how many steps -> held-out metrics; raises
        NonFiniteLoss that says what is not finite.
      criterion: of the held-out metrics that by which checkpoints are ranked, the lowest first.
      told: of the others those that are printed with it, if they are there.
      parameters: how many the whole model has.
      shapes: of micro-batches, for the terminal.
      ended: says after an evaluation, and where a run goes on, why no more steps are to be taken;
        '': they are.
    """

    source: Source
    network: Network
    objective: step.Objective
    trained: Params
    begin: Callable[[Params], Params]
    frozen: Params
    mesh: Mesh | None
    evaluate: Callable[[Params, int], dict[str, float]]
    criterion: str
    told: tuple[str, ...]
    parameters: int
    shapes: str
    ended: Callable[[], str] = str


@contextlib.contextmanager
def held(config: Any, folder: str, *, gives_way: bool = True,
         free: Sequence[str] = workdir.FREE_KEYS) -> Iterator[None]:
    """Holds the folder of a run that is going to be, after what can be checked before any data.

    Args:
      config: a checked config.
      folder: the workdir.
      gives_way, free: see `workdir.check_claim`.

    Raises:
      ConfigError: a package is missing, or processes have different configs.
      WorkdirError: the folder belongs to another run, or one is going on in it.
    """
    if config.train.tensorboard and not importlib.util.find_spec('tensorboardX'):
        raise ConfigError('config.train.tensorboard=True needs tensorboardX: pip install '
                          "'qrm-jax[tensorboard]'")
    _check_same_config(config)
    with workdir.lock(folder):
        workdir.check_claim(folder, config, gives_way=gives_way, free=free)
        yield
    release_programs()  # a study trains many models


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
      DataError: it has other data, other weights, or another reward.
    """
    if not os.path.isdir(os.path.join(folder, 'checkpoints')):
        return
    with Checkpoints(folder, read_only=True) as checkpoints:
        known = checkpoints.meta or identity
    for key, found in identity.items():
        if known.get(key, found) != found:
            raise DataError(f'{folder}: {_OTHERS[key]} this run started with; choose another '
                            '--workdir or restore them')


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
      NonFiniteLoss: the run cannot go on; the last checkpoint is from before.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    source, steps = course.source, course.source.steps

    # State and step.
    spread = Spread(course.mesh)
    optimizer, run_step = _compiled(
        course.network, course.objective, tuple(config.optimizer.items()), steps, spread)
    rates = np.broadcast_to(step.make_schedule(config.optimizer, steps)(np.arange(steps)), steps)
    layout = f'{jax.device_count()} x {jax.devices()[0].device_kind}, {config.train.sharding}'
    if (group := jax.device_count() // spread.shares) > 1:
        layout += f', tensor groups of {group}'

    def not_finite(number: int, what: str) -> NonFiniteLoss:
        return NonFiniteLoss(f'{folder}: step {number} gave {what}; comparisons in its batch: '
                             f'{", ".join(source.ids(number))}')

    def held_out_metrics(trained: Params, number: int) -> dict[str, float]:
        try:
            return course.evaluate(trained, number + 1)
        # An update can overflow where loss and gradient did not.
        except NonFiniteLoss as error:
            raise not_finite(number, str(error)) from error

    def beside(rest: step.TrainState, as_array: Callable[[np.ndarray], Any] = np.array) -> Any:
        """What is saved beside parameters: with the state of the source, if it has any."""
        own = source.state()
        return (rest, jax.tree.map(as_array, own)) if own else rest

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
                start, state.params, beside(state._replace(params=None), jnp.asarray))
            if source.state():
                rest, own = rest
                source.restore(jax.tree.map(np.asarray, own))
            if meta['layout'] != layout:
                print(f'note: the run started on {meta["layout"]} and goes on on {layout}; the '
                      'last digits may differ', flush=True)
            state = parallel.arrange(rest._replace(params=trained), course.network.architecture,
                                     course.mesh)
            print(f'resuming {folder} at step {start} of {steps}', flush=True)
        fixed = course.parameters - parameter_count(state.params)
        print(f'{course.parameters - fixed:,} parameters'
              f'{f" ({fixed:,} more are frozen)" if fixed else ""}, {source.about}, '
              f'{steps} steps of {config.train.batch_size} on {layout}; micro-batches '
              f'{course.shapes}', flush=True)
        state, frozen = spread.start(state), spread.start(course.frozen)
        log = workdir.Metrics(folder, resume_from=start, tensorboard=config.train.tensorboard)
        progress = _Progress(steps)
        pending: list[tuple[int, Any, dict[str, float]]] = []
        known: list[jax.Array] = []
        seconds: list[float] = []
        interrupted = ''

        def flush(running: int) -> None:
            """Fetches, checks and writes the metrics of all steps so far but those running."""
            row: dict[str, float] = {}
            for number, values, known_before in pending[:len(pending) - running]:
                row = {name: fetch_number(value) for name, value in values.items()}
                if not all(map(math.isfinite, row.values())):
                    raise not_finite(number, str(row))
                row = known_before | course.objective.as_row(row)
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
            checkpoints.save(done, own.params, beside(own._replace(params=None)), meta,
                             loss_held_out)

        def current() -> Params:
            return spread.one(state.params)

        try:
            if start and (reason := course.ended()):
                print(f'step {start} of {steps}: {reason}', flush=True)
                steps = start
            for number in range(start, steps):
                progressed()
                began = time.monotonic()
                fed = source.feed(number, current)
                stop = np.int32(bool(signals.received))
                placed = spread.put([(batch, stop) for batch in fed.batches])
                # All that a step needs is on the devices; a hidden copy would stall it.
                with jax.transfer_guard('disallow'):
                    state, values, stops = run_step(state, placed, frozen)
                pending.append((number, values, fed.metrics))
                # The host stays one step ahead of the device, no more: a signal is served soon.
                if len(pending) > 1:
                    jax.block_until_ready(pending[-2][1])
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
                    held_out = held_out_metrics(current(), number)
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
                if due and (reason := course.ended()):
                    print(f'step {done} of {steps}: {reason}', flush=True)
                    break
        finally:
            progress.close()
            log.close()
    if interrupted:
        raise Interrupted(interrupted)
    # The first steps wait for compilation, and for none before them.
    return Outcome(course.parameters, float(np.median(seconds[3:])) if len(seconds) > 3 else None)


@functools.lru_cache(maxsize=_PROGRAMS)
def _compiled(
    network: Network, objective: step.Objective, settings: tuple[tuple[str, Any], ...], steps: int,
    spread: Spread,
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimiser and the step of a run; the same ones for runs of a process that differ in
    seeds and data alone, so that the step is traced and compiled once for them.

    Args:
      network, objective: see `Course`.
      settings: items of the section `optimizer`.
      steps: of the whole run.
      spread: see `Spread.compile`.
    """
    optimizer = step.make_optimizer(ConfigDict(dict(settings)), steps)
    return optimizer, spread.compile(step.make_train_step(network, objective, optimizer))


def own_parts(sizes: np.ndarray, places: np.ndarray, spread: Spread) -> list[np.ndarray]:
    """Places of a step's comparisons for each share of this process; no others are read.

    Args:
      sizes: tokens of all comparisons.
      places: of those of the step.
      spread: how they are dealt.
    """
    parts = packing.share(sizes[places], spread.shares)
    return [places[parts[share]] for share in spread.own]


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
