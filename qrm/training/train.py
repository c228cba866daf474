"""Training, read from top to bottom: data, model, resume, loop, checkpoints."""

import datetime
import functools
import hashlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qrm.data import packing, sources, templates, tokens
from qrm.data.comparisons import DataError, DataReport, check_malformed
from qrm.data.encoded import (
    Encoded,
    EncodedTable,
    Lengths,
    fingerprint,
    has_preferred,
    has_rating,
)
from qrm.data.seen import Seen
from qrm.data.tokens import Reading, Tokenizer
from qrm.models import adapters, families, sharding, weights
from qrm.models.network import Params, RewardNetwork, parameter_count
from qrm.rewards import heads, metrics
from qrm.training import base, features, inference, reward_model, step, workdir
from qrm.training import config as config_lib
from qrm.training.base import Base
from qrm.training.checkpoints import Checkpoints
from qrm.training.devices import Spread, fetch_number, own_devices
from qrm.training.features import FeatureNetwork, Features
from qrm.training.interruptions import Interrupted, NonFiniteLoss, Signals, watched
from qrm.training.reward_model import RewardModel
from qrm.training.schema import ConfigError

_SAMPLE = 32  # comparisons by which the scale of an initial head is found


class Initial(NamedTuple):
    """The network of a run before its first step.

    Attributes:
      network: as configured.
      settings: of its backbone, see `RewardModel`.
      trained: parameters, see `Tuning.split`.
      find_frozen: gives the others; where the head alone is trained, they are read by it, as
        kept features may be all that is needed.
      base: where those that are frozen are to be found; None if there are none.
      mesh: over which the parameters are split; None: they are not.
    """

    network: RewardNetwork
    settings: dict[str, Any]
    trained: Params
    find_frozen: Callable[[], Params]
    base: Base | None
    mesh: Mesh | None

    @property
    def frozen(self) -> Params:
        """Parameters that are not trained."""
        return self.find_frozen()

    @property
    def params(self) -> Params:
        """All parameters."""
        return self.network.tuning.join(self.trained, self.frozen)


class Data(NamedTuple):
    """What a run reads, before any weights.

    Attributes:
      tokenizer, reading: how it reads texts.
      encoded: 'train', 'validation', 'test' -> comparisons in tokens.
      reports: the same keys -> what became of the rows.
      seen: by which the training comparisons are recognised.
      annotators: names of those whom the annotator head knows.
    """

    tokenizer: Tokenizer
    reading: Reading
    encoded: dict[str, EncodedTable]
    reports: dict[str, DataReport]
    seen: Seen
    annotators: tuple[str, ...]


class Prepared(NamedTuple):
    """What a run starts from.

    Attributes:
      model: the reward model with its initial parameters; with `features`, if its head alone is
        trained.
      data: what it reads.
      initial: the parts of the model that are trained and those that are not.
    """

    model: RewardModel
    data: Data
    initial: Initial

    @property
    def encoded(self) -> dict[str, EncodedTable]:
        """'train', 'validation', 'test' -> comparisons in tokens."""
        return self.data.encoded


class Outcome(NamedTuple):
    """What `train` says of a run.

    Attributes:
      parameters: how many the model has, those that are not trained included.
      seconds_per_step: median, without compilation and held-out evaluation; None if too few steps
        were left to take.
    """

    parameters: int
    seconds_per_step: float | None


class _Course(NamedTuple):
    """How a run computes: from tokens, or from features of a backbone that stays as it is.

    Attributes:
      examples, validation: comparisons to learn from, and those held out.
      network: whose step is taken.
      frozen: parameters that it needs beside those that are trained.
      make_batch: comparisons of a step of one device -> their batch.
      predict: (trained parameters, comparisons) -> raw outputs [K, outputs] of each.
      read: comparisons -> [K, W] of each, what the head reads before the first step.
      shapes: of micro-batches, for the terminal.
    """

    examples: Sequence[Encoded]
    validation: Sequence[Encoded]
    network: RewardNetwork
    frozen: Params
    make_batch: Callable[[Sequence[Encoded]], packing.Batch]
    predict: Callable[[Params, Sequence[Encoded]], list[np.ndarray]]
    read: Callable[[Sequence[Encoded]], list[np.ndarray]]
    shapes: str


def prepare(config: Any, folder: str | None = None) -> Prepared:
    """Loads data, tokenizer and initial parameters.

    Args:
      config: a checked config.
      folder: workdir whose tokenizer, if there is one, is used again; where features are kept,
        if the config does not say it.

    Raises:
      DataError: see `read_data` and `initial_network`.
    """
    data = read_data(config, folder)
    initial = initial_network(config, data.annotators)
    network, kept = initial.network, None
    if network.tuning.kind == 'head':
        kept = Features(network, initial.base, features.place(config, folder),
                        config.train.row_length, config.train.rows)
    return Prepared(
        RewardModel(network, initial.settings, initial.trained if kept else initial.params,
                    data.tokenizer, config_lib.loss_config(config), data.reading,
                    config.train.row_length, initial.base, kept),
        data, initial,
    )


def read_data(config: Any, folder: str | None = None) -> Data:
    """Loads data and tokenizer; all that can be wrong with them is found without any weights.

    Args:
      config, folder: as `prepare`.

    Raises:
      DataError: see `sources.read`, `tokens.encode` and `adapters.find`; or no comparisons are
        left to learn from or to hold out.
      ConfigError: see `initial_network`.
    """
    source = sources.read(config.data, config.workload)
    splits = sources.divide(source, config.data)
    annotators = ()
    if config.head.name == 'annotator':
        annotators = tuple(sorted(set(splits['train'][0].fact('annotator').to_pylist()) - {None}))
        if not annotators:
            raise DataError(f"{config.data.path}: no training comparison has an 'annotator', "
                            'which the annotator head learns from')
    network, _ = _describe_network(config, annotators)
    a, loss = network.architecture, config_lib.loss_config(config)
    saved = os.path.join(folder, 'tokenizer') if folder else ''
    if os.path.isdir(saved):
        tokenizer = tokens.load_tokenizer(saved)
    elif config.model.tokenizer or config.model.checkpoint:
        tokenizer = tokens.load_tokenizer(
            config.model.tokenizer or adapters.find(config.model.checkpoint).tokenizer,
            _common_time(), config.model.chat_template)
    else:
        texts = tokens.texts_of(splits['train'][0])
        tokenizer = tokens.train_tokenizer(texts, a.vocab_size)
        templates.settle(tokenizer, _common_time(), config.model.chat_template)
    reward_model.check_vocabulary(tokenizer, a)
    reading = reward_model.limited(
        Reading(a.max_positions, append_eos=config.data.append_eos,
                as_chats=config.data.as_chats, share_prompt=a.causal,
                size_prompt=network.head.sizes_prompts,
                pair_template=config.model.pair_template if network.head.pairwise else ''),
        config.data.max_length, a, 'config.data.max_length')
    encoded = {
        split: tokens.encode(
            comparisons, tokenizer, report, reading, overlong=config.data.overlong,
            ratings=loss.rated,
            # Held-out comparisons are judged by all that is known of them.
            preferences=split != 'train' or loss.reads != 'ratings' or network.head.gated,
            named=split == 'train' and loss.reads == 'annotators',
            attributes=network.head.attributes, annotators=network.head.annotators)
        for split, (comparisons, report) in splits.items()
    }
    for items in encoded.values():
        inference.check_look_ups(network, items)
    reports = {split: report for split, (_, report) in splits.items()}
    check_malformed(reports.values(), config.data.max_malformed)
    has = {'preferred': has_preferred, 'rated': has_rating}
    judged_by = 'rated' if metrics.criterion(loss) == 'crps' else 'preferred'
    for split, items in encoded.items():
        anchored = split == 'train' and loss.thresholds
        for known in dict.fromkeys((judged_by, 'rated') if anchored else (judged_by,)):
            if not has[known](items):
                raise DataError(f'no comparison with a {known} response is left in the {split} '
                                'split (rows with the same opening question stay in one split)\n'
                                + format_reports(reports))
    return Data(tokenizer, reading, encoded, reports,
                Seen.of(source.digest, splits['train'][0]), annotators)


def _common_time() -> datetime.datetime:
    """The time at which the first process is."""
    now = np.frombuffer(np.float64(time.time()).tobytes(), np.uint8)
    first = np.asarray(multihost_utils.broadcast_one_to_all(now), np.uint8)
    return datetime.datetime.fromtimestamp(np.frombuffer(first.tobytes(), np.float64).item())


def initial_network(config: Any, annotators: Sequence[str] = ()) -> Initial:
    """The configured network and what its parameters start from.

    Args:
      config: a checked config.
      annotators: names of those whom the annotator head knows.

    Raises:
      ConfigError: a setting of the head, the loss or what is trained that this backbone does not
        have.
      DataError: see `base.read` and `base.start`.
    """
    mesh = sharding.make_mesh() if config.train.sharding == 'fsdp' else None
    network, settings = _describe_network(config, annotators)
    kind, pretrained = network.tuning.kind, None
    origin = base.find(config.model.checkpoint, config.seed, config.train.frozen_dtype,
                       frozen=kind != 'all')
    if origin.checkpoint and kind != 'head':
        # What is going to be split need not fit into one accelerator.
        with jax.default_device(mesh and jax.local_devices(backend='cpu')[0]):
            pretrained = base.read(origin, whole=kind in ('all', 'last'),
                                   output=network.language_model)
        settings = pretrained.settings
    if kind == 'head':
        return Initial(network, settings, base.start_head(network, origin),
                       functools.cache(lambda: base.restore_frozen(network, origin)), origin, mesh)
    start = base.start(network, origin, pretrained, mesh)
    if pretrained and pretrained.head is not None:
        # The head always starts anew, so that heads compared with each other start alike.
        print(f'note: the head of {config.model.checkpoint} is not used, training starts a new one')
    if start.anew:
        print(f'note: {config.model.checkpoint} has no {", ".join(start.anew)}, training starts '
              'anew')
    frozen = start.frozen if mesh else step.place_frozen(network, start.frozen)
    return Initial(network, settings, start.trained, lambda: frozen,
                   None if kind == 'all' else origin, mesh)


def _describe_network(
    config: Any, annotators: Sequence[str]
) -> tuple[RewardNetwork, dict[str, Any]]:
    """The configured network, without parameters, and the settings of its backbone."""
    checkpoint = config.model.checkpoint
    settings = (weights.read_settings(adapters.find(checkpoint).model) if checkpoint
                else config_lib.random_settings(config))
    architecture = families.architecture(settings, checkpoint or 'config.model.sizes')
    try:
        tuned = config_lib.tuning_config(config, settings)
    except ValueError as error:
        raise ConfigError(f'config.{error}') from error
    try:
        network = RewardNetwork(
            architecture, config_lib.head_config(config, annotators), config.model.dtype,
            config.model.attention, config.model.remat, config.model.dropout,
            bool(config.loss.lm_weight), tuned)
    except ValueError as error:
        raise ConfigError(f'config: {error}') from error
    return network, settings


def format_reports(reports: dict[str, DataReport]) -> str:
    """The data reports of a run, for the terminal."""
    return '\n'.join(report.format() for report in reports.values())


def train(config: Any, folder: str) -> Outcome:
    """Trains the configured model in `folder`; goes on where an earlier run there stopped.

    A rerun ends bit for bit where an uninterrupted run ends, on the same devices; on others, or
    with another `train.sharding`, it ends there but for rounding, and for what each device draws:
    dropout, and the levels of an implicit quantile head. With several devices the state
    is copied to each, under `pmap`, or split over them, see `sharding`. With several processes
    all of them call this with the same config and folder, and the first one writes.
    Where the head alone is trained, what it reads is computed before the first step, see
    `features`.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was trained.
      NonFiniteLoss: the run cannot go on; the last checkpoint is from before.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    config_lib.check(config)
    config = config_lib.absolute(config)
    if config.train.tensorboard and not importlib.util.find_spec('tensorboardX'):
        raise ConfigError('config.train.tensorboard=True needs tensorboardX: pip install '
                          "'qrm-jax[tensorboard]'")
    _check_same_config(config)
    with workdir.lock(folder):
        workdir.check_claim(folder, config, gives_way=True)
        prepared = prepare(config, folder)
        identity = _identity(config, prepared)
        _check_same_run(folder, identity)
        print(format_reports(prepared.data.reports), flush=True)
        per_device = -(-config.train.batch_size // jax.device_count())
        course = (_with_features(prepared, per_device) if prepared.model.features
                  else _with_tokens(config, prepared, per_device))
        # Only now: a run that could not start must not keep a corrected one out of its folder.
        workdir.claim(folder, config)
        return _train(config, folder, prepared, course, identity)


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


def _identity(config: Any, prepared: Prepared) -> dict[str, str]:
    """By what data and weights are known that a run starts with, wherever they are."""
    encoded = prepared.encoded
    start = prepared.initial.base or base.find(
        config.model.checkpoint, config.seed, config.train.frozen_dtype, frozen=True)
    return {'fingerprint': fingerprint(encoded['train'], encoded['validation']),
            'start': start.digest}


def _check_same_run(folder: str, identity: dict[str, str]) -> None:
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


def _with_tokens(config: Any, prepared: Prepared, per_device: int) -> _Course:
    """A run whose steps compute the whole network on tokens."""
    examples, initial = prepared.encoded['train'], prepared.initial
    network, frozen = initial.network, initial.frozen
    layouts = packing.plan_layouts(examples, row_length=config.train.row_length,
                                   rows=config.train.rows)
    packed = {'row_length': config.train.row_length, 'rows': config.train.rows,
              'mesh': initial.mesh}
    return _Course(
        examples, prepared.encoded['validation'], network, frozen,
        lambda items: packing.make_batch(items, layouts, per_device),
        lambda trained, items: inference.predict(
            network, network.tuning.join(trained, frozen), items, **packed),
        lambda items: [
            one for some in inference.features(network, initial.params, items, **packed)
            for one in some],
        ', '.join(f'{x.rows} x {x.length}' for x in layouts))


def _with_features(prepared: Prepared, per_device: int) -> _Course:
    """A run whose steps compute the head on features, which are read or computed here."""
    model, count = prepared.model, len(prepared.encoded['train'])
    items = model.features.of([*prepared.encoded['train'], *prepared.encoded['validation']])
    layouts = features.plan_layouts(items[:count], per_device)
    return _Course(
        items[:count], items[count:], FeatureNetwork(**vars(model.network)), {},
        lambda items: features.make_batch(items, layouts),
        functools.partial(features.predict, model.network),
        lambda items: [item.features for item in items],
        f'{", ".join(str(layout.slots) for layout in layouts)} comparisons')


def _train(config: Any, folder: str, prepared: Prepared, course: _Course,
           identity: dict[str, str]) -> Outcome:
    network, loss, initial = prepared.model.network, prepared.model.loss, prepared.initial
    examples, validation = course.examples, course.validation
    reward_model.describe(folder, prepared.model)
    workdir.write_json(os.path.join(folder, 'versions.json'), workdir.versions())
    workdir.write_json(os.path.join(folder, 'data_report.json'),
                       {split: r.as_dict() for split, r in prepared.data.reports.items()})
    workdir.write_arrays(os.path.join(folder, 'seen.npz'), prepared.data.seen.arrays())

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
    mesh, spread = initial.mesh, Spread(initial.mesh)
    run_step = spread.compile(step.make_train_step(course.network, loss, optimizer))
    layout = f'{devices} x {jax.devices()[0].device_kind}, {config.train.sharding}'

    def make_batches(number: int) -> list[packing.Batch]:
        """Batches of this process's devices."""
        return list(map(course.make_batch, _own_parts(examples, sizes, indices(number))))

    def indices(number: int) -> np.ndarray:
        return packing.batch_indices(number, seed=config.seed, examples=len(examples),
                                     batch_size=batch_size, total=total)

    def not_finite(number: int, what: str) -> NonFiniteLoss:
        ids = ', '.join(examples[i].id for i in indices(number))
        return NonFiniteLoss(f'{folder}: step {number} gave {what}; comparisons in its batch: '
                             f'{ids}')

    def held_out_metrics(trained: Params, number: int) -> dict[str, float]:
        outputs = course.predict(trained, validation)
        # An update can overflow where loss and gradient did not.
        if not all(np.isfinite(x).all() for x in outputs):
            raise not_finite(number, 'held-out rewards that are not finite')
        return metrics.summarise(metrics.predictions_of(validation, outputs, network.head, loss))

    with (watched() as progressed, Checkpoints(folder, keep=config.train.keep) as checkpoints,
          Signals() as signals):
        start, trained = 0, initial.trained
        if checkpoints.latest is None and config.model.initial_std:
            trained = trained | {
                'head': _standard_head(course, trained['head'], config.model.initial_std, mesh)}
        state = step.init_state(trained, optimizer, config.seed, mesh, teacher=loss.has_teacher)
        if checkpoints.latest is not None:
            start = checkpoints.latest
            trained, rest, meta = checkpoints.restore(
                start, state.params, state._replace(params=None))
            if meta['layout'] != layout:
                print(f'note: the run started on {meta["layout"]} and goes on on {layout}; the '
                      'last digits may differ', flush=True)
            state = rest._replace(params=trained)
            print(f'resuming {folder} at step {start} of {steps}', flush=True)
        parameters = parameter_count(jax.eval_shape(network.init, jax.random.key(0)))
        fixed = parameters - parameter_count(state.params)
        print(f'{parameters - fixed:,} parameters'
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
                if not row['pairs']:  # such as a batch of ratings
                    del row['accuracy'], row['margin']
                row['learning_rate'] = float(rates[number])
                log.write(number + 1, 'train', row)
            del pending[:len(pending) - running]
            if row:
                progress.update(number + 1, row)

        def save(done: int, loss_held_out: float | None) -> None:
            progressed()  # held-out comparisons may have taken long
            own = spread.to_save(state)
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
                    criterion = metrics.criterion(loss)
                    save(done, held_out[criterion])
                    shown = [f'{name} {held_out[name]:.4f}'
                             for name in dict.fromkeys((criterion, 'accuracy')) if name in held_out]
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
    return Outcome(parameters, float(np.median(seconds[3:])) if len(seconds) > 3 else None)


def _own_parts(
    examples: Sequence[Encoded], sizes: np.ndarray, places: np.ndarray
) -> list[list[Encoded]]:
    """Comparisons of a step for each device of this process; no others are read.

    Args:
      examples: all comparisons.
      sizes: tokens of each of them.
      places: numbers of those of the step.
    """
    parts = packing.share(sizes[places], jax.device_count())
    return [[examples[i] for i in places[parts[device]]] for device in own_devices()]


def _standard_head(
    course: _Course, head: Params, std: float, mesh: Mesh | None
) -> Params:
    """An initial head as `heads.standardise` makes it, by a few comparisons."""
    network, examples = course.network, course.examples
    count = min(_SAMPLE, len(examples))
    some = [examples[i] for i in np.linspace(0, len(examples) - 1, count, dtype=int)]
    of_responses = network.architecture.hidden_size * len(network.head.reads)
    standardise = jax.jit(
        functools.partial(heads.standardise, network.head, std=std),
        # Without a mesh it is not bound to its device: a state bound in part compiles twice.
        out_shardings=mesh and jax.tree.map(lambda leaf: leaf.sharding, head))
    return standardise(head, np.concatenate(course.read(some))[:, :of_responses])


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
