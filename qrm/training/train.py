"""Training a reward model, read from top to bottom: data, model, what is learnt; then the loop."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qrm.data import packing, sources, tokens
from qrm.data.comparisons import DataError, check_malformed
from qrm.data.encoded import Encoded, EncodedTable, has_preferred, has_rating
from qrm.data.seen import Seen
from qrm.data.tokens import Reading
from qrm.models.network import Params, RewardNetwork, parameter_count
from qrm.rewards import heads, metrics
from qrm.training import config as config_lib
from qrm.training import features, inference, inputs, loop, reward_model, workdir
from qrm.training import initial as initial_lib
from qrm.training.devices import Spread
from qrm.training.features import FeatureNetwork, Features
from qrm.training.initial import Initial
from qrm.training.inputs import Data
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.loop import Course, Outcome
from qrm.training.reward_model import RewardModel
from qrm.training.reward_objective import RewardObjective
from qrm.training.schema import ConfigError

_SAMPLE = 32  # comparisons by which the scale of an initial head is found


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
    tokenizer = inputs.find_tokenizer(config, folder, splits['train'][0], a)
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
                raise inputs.nothing_left(known, split, reports)
    return Data(tokenizer, reading, encoded, reports,
                Seen.of(source.digest, splits['train'][0]), annotators)


def initial_network(config: Any, annotators: Sequence[str] = ()) -> Initial:
    """The configured network and what its parameters start from.

    Args:
      config: a checked config.
      annotators: names of those whom the annotator head knows.

    Raises:
      ConfigError: a setting of the head, the loss or what is trained that this backbone does not
        have.
      DataError: see `initial.start`.
    """
    found = initial_lib.start(config, *_describe_network(config, annotators))
    if found.pretrained and found.pretrained.head is not None:
        # The head always starts anew, so that heads compared with each other start alike.
        print(f'note: the head of {config.model.checkpoint} is not used, training starts a new one')
    return found


def _describe_network(
    config: Any, annotators: Sequence[str]
) -> tuple[RewardNetwork, dict[str, Any]]:
    """The configured network, without parameters, and the settings of its backbone."""
    settings, architecture, tuning = initial_lib.describe(config)
    try:
        network = RewardNetwork(
            architecture, config_lib.head_config(config, annotators), config.model.dtype,
            config.model.attention, config.model.remat, config.model.dropout,
            bool(config.loss.lm_weight), tuning)
    except ValueError as error:
        raise ConfigError(f'config: {error}') from error
    return network, settings


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
    with loop.held(config, folder):
        prepared = prepare(config, folder)
        identity = loop.identify(config, prepared.initial.base, prepared.encoded)
        loop.check_same_run(folder, identity)
        print(inputs.format_reports(prepared.data.reports), flush=True)
        per_device = -(-config.train.batch_size // Spread(prepared.initial.mesh).shares)
        course = (_with_features(config, prepared, per_device) if prepared.model.features
                  else _with_tokens(config, prepared, per_device))
        # Only now: a run that could not start must not keep a corrected one out of its folder.
        workdir.claim(folder, config)
        reward_model.describe(folder, prepared.model)
        loop.record(folder, prepared.data.reports, prepared.data.seen)
        return loop.run(config, folder, course, identity)


def _with_tokens(config: Any, prepared: Prepared, per_device: int) -> Course:
    """A run whose steps compute the whole network on tokens."""
    examples, initial = prepared.encoded['train'], prepared.initial
    network, frozen = initial.network, initial.frozen
    layouts = packing.plan_layouts(examples, row_length=config.train.row_length,
                                   rows=config.train.rows)
    packed = {'row_length': config.train.row_length, 'rows': config.train.rows,
              'mesh': initial.mesh}
    return _course(
        config, prepared, network, frozen, examples, prepared.encoded['validation'],
        lambda items: packing.make_batch(items, layouts, per_device),
        lambda trained, items: inference.predict(
            network, network.tuning.join(trained, frozen), items, **packed),
        lambda items: [
            one for some in inference.features(network, initial.params, items, **packed)
            for one in some],
        ', '.join(f'{x.rows} x {x.length}' for x in layouts))


def _with_features(config: Any, prepared: Prepared, per_device: int) -> Course:
    """A run whose steps compute the head on features, which are read or computed here."""
    model, count = prepared.model, len(prepared.encoded['train'])
    items = model.features.of([*prepared.encoded['train'], *prepared.encoded['validation']])
    layouts = features.plan_layouts(items[:count], per_device)
    return _course(
        config, prepared, FeatureNetwork(**vars(model.network)), {}, items[:count], items[count:],
        lambda items: features.make_batch(items, layouts),
        functools.partial(features.predict, model.network),
        lambda items: [item.features for item in items],
        f'{", ".join(str(layout.slots) for layout in layouts)} comparisons')


def _course(
    config: Any,
    prepared: Prepared,
    network: RewardNetwork,
    frozen: Params,
    examples: Sequence[Encoded],
    validation: Sequence[Encoded],
    make_batch: Callable[[Sequence[Encoded]], packing.Batch],
    predict: Callable[[Params, Sequence[Encoded]], list[np.ndarray]],
    read: Callable[[Sequence[Encoded]], list[np.ndarray]],
    shapes: str,
) -> Course:
    """What a run learns.

    Args:
      config, prepared: of the run.
      network, frozen, shapes: see `Course`.
      examples, make_batch: see `loop.Examples`.
      validation: comparisons that are held out.
      predict: (trained parameters, comparisons) -> raw outputs [K, outputs] of each.
      read: comparisons -> [K, W] of each, what the head reads before the first step.
    """
    model, loss, mesh = prepared.model, prepared.model.loss, prepared.initial.mesh

    def begin(trained: Params) -> Params:
        if not config.model.initial_std:
            return trained
        return trained | {'head': _standard_head(
            network, examples, read, trained['head'], config.model.initial_std, mesh)}

    def evaluate(trained: Params, unused_done: int) -> dict[str, float]:
        outputs = predict(trained, validation)
        if not all(np.isfinite(x).all() for x in outputs):
            raise NonFiniteLoss('held-out rewards that are not finite')
        return metrics.summarise(
            metrics.predictions_of(validation, outputs, model.network.head, loss))

    return Course(
        loop.Examples(config, examples, make_batch, Spread(mesh)), network,
        RewardObjective(network, loss), prepared.initial.trained, begin, frozen, mesh, evaluate,
        metrics.criterion(loss), ('accuracy',),
        parameter_count(jax.eval_shape(model.network.init, jax.random.key(0))), shapes)


def _standard_head(
    network: RewardNetwork,
    examples: Sequence[Encoded],
    read: Callable[[Sequence[Encoded]], list[np.ndarray]],
    head: Params,
    std: float,
    mesh: Mesh | None,
) -> Params:
    """An initial head as `heads.standardise` makes it, by a few comparisons."""
    count = min(_SAMPLE, len(examples))
    some = [examples[i] for i in np.linspace(0, len(examples) - 1, count, dtype=int)]
    of_responses = network.architecture.hidden_size * len(network.head.reads)
    standardise = jax.jit(
        functools.partial(heads.standardise, network.head, std=std),
        # Without a mesh it is not bound to its device: a state bound in part compiles twice.
        out_shardings=mesh and jax.tree.map(lambda leaf: leaf.sharding, head))
    return standardise(head, np.concatenate(read(some))[:, :of_responses])
