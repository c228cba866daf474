"""What all runs that train a policy have in common, whatever their objective.

`sft` and `dpo` say what is learnt; the steps, checkpoints and records are those of every run, see
`training.loop`.

Axes as in `batches`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qrm.data import sources, tokens
from qrm.data.comparisons import DataError, check_malformed
from qrm.data.encoded import Encoded, has_preferred
from qrm.data.packing import Batch
from qrm.data.seen import Seen
from qrm.data.tokens import Reading, Tokenizer
from qrm.models import adapters, weights
from qrm.models.network import Params, parameter_count
from qrm.policy import batches, language_model, network
from qrm.policy.network import PolicyNetwork
from qrm.training import config as config_lib
from qrm.training import inference, initial, inputs, loop, reward_model, saved, step, workdir
from qrm.training.devices import Spread
from qrm.training.initial import Initial
from qrm.training.inputs import Data
from qrm.training.loop import Course, Outcome
from qrm.training.schema import ConfigError


class Prepared(NamedTuple):
    """What a run starts from.

    Attributes:
      config: of the run, with absolute paths.
      folder: its workdir.
      data: what it reads.
      initial: the policy before the first step.
      identity: by what it is known that it starts with, see `loop.identify`.
    """

    config: Any
    folder: str
    data: Data
    initial: Initial
    identity: dict[str, str]

    @property
    def network(self) -> PolicyNetwork:
        """The policy."""
        return self.initial.network

    @property
    def per_device(self) -> int:
        """Comparisons of a step on one device or tensor group, at most."""
        return -(-self.config.train.batch_size // Spread(self.initial.mesh).shares)


def train(
    config: Any, folder: str, learn: Callable[[Prepared], Course], *, demonstrations: bool = False
) -> Outcome:
    """Trains a policy in `folder`; goes on where an earlier run there stopped, see `train.train`.

    Args:
      config: a checked config.
      folder: the workdir.
      learn: what is learnt of what was prepared.
      demonstrations: see `tokens.encode`.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was trained.
      NonFiniteLoss: the run cannot go on; the last checkpoint is from before.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    config = config_lib.absolute(config)
    with loop.held(config, folder):
        prepared = prepare(config, folder, demonstrations=demonstrations)
        loop.check_same_run(folder, prepared.identity)
        data, start = prepared.data, prepared.initial
        print(inputs.format_reports(data.reports), flush=True)
        course = learn(prepared)
        workdir.claim(folder, config)
        saved.describe(folder, start.network, start.settings, start.base, data.tokenizer,
                       {'stops': stops(config, data.tokenizer)})
        loop.record(folder, data.reports, data.seen)
        return loop.run(config, folder, course, prepared.identity)


def prepare(config: Any, folder: str, *, demonstrations: bool = False) -> Prepared:
    """Loads data, tokenizer and initial parameters; arguments as of `train`.

    Raises:
      ConfigError: a setting that this model does not have.
      DataError: see `sources.read` and `tokens.encode`; or the checkpoint is no language model.
    """
    policy, settings = describe_network(config)
    data = read_data(config, folder, policy, demonstrations=demonstrations)
    found = initial.start(config, policy, settings)
    if found.pretrained and found.pretrained.head is not None:
        raise DataError(f'{config.model.checkpoint}: has a reward head, expected a language model')
    return Prepared(config, folder, data, found,
                    loop.identify(config, found.base, data.encoded))


def read_data(
    config: Any, folder: str | None, policy: PolicyNetwork, *, demonstrations: bool = False
) -> Data:
    """Loads data and tokenizer; arguments as of `train`."""
    a = policy.architecture
    section = without_attributes(config.data)
    source = sources.read(section, config.workload)
    splits = sources.divide(source, section)
    tokenizer = inputs.find_tokenizer(config, folder, splits['train'][0], a)
    reading = reward_model.limited(
        Reading(a.max_positions, as_chats=config.data.as_chats, answers=True),
        config.data.max_length, a, 'config.data.max_length')
    encoded = {
        split: tokens.encode(comparisons, tokenizer, report, reading,
                             overlong=config.data.overlong, demonstrations=demonstrations)
        for split, (comparisons, report) in splits.items()
    }
    for items in encoded.values():
        inference.check_look_ups(policy, items)
    reports = {split: report for split, (_, report) in splits.items()}
    check_malformed(reports.values(), config.data.max_malformed)
    for split, items in encoded.items():
        if not (len(items) if demonstrations else has_preferred(items)):
            raise inputs.nothing_left('preferred', split, reports)
    return Data(tokenizer, reading, encoded, reports,
                Seen.of(source.digest, splits['train'][0]))


def without_attributes(data: Any) -> ConfigDict:
    """The `data` section as `sources` reads it; policies learn from what whole responses got."""
    return ConfigDict(data.to_dict() | {'attributes': ()})


def course(
    prepared: Prepared,
    objective: step.Objective,
    examples: Sequence[Encoded],
    make_batch: Callable[[Sequence[Encoded]], Batch],
    evaluate: Callable[[Params], dict[str, float]],
    criterion: str,
    told: tuple[str, ...],
    plan: batches.Plan,
) -> Course:
    """What a run learns, with what follows from what was prepared; see `Course`."""
    start = prepared.initial
    return Course(
        loop.Examples(prepared.config, examples, make_batch, Spread(start.mesh)), start.network,
        objective, start.trained, lambda trained: trained, start.frozen, start.mesh,
        lambda trained, unused_done: evaluate(trained), criterion, told,
        parameter_count(jax.eval_shape(start.network.init, jax.random.key(0))),
        ', '.join(f'{x.rows} x {x.length}' for x in plan.layouts))


def log_probs(
    policy: PolicyNetwork, params: Params, encoded: Sequence[Encoded], *, row_length: int,
    rows: int, mesh: Mesh | None = None,
) -> Iterator[list[list[np.ndarray]]]:
    """Log-probabilities (nats) of the tokens of responses, on all devices.

    Args:
      policy, params: the policy.
      encoded: comparisons that were read with `Reading.answers`.
      row_length, rows, mesh: as of `inference.predict`.

    Yields:
      A chunk of comparisons after the other: of each K arrays [n_k] float32; of the first token of
      a dialogue without a prompt 0.
    """
    if not len(encoded):
        return
    longest, done = batches.longest(encoded), 0

    def make(batch: Any) -> batches.PolicyBatch:
        return batches.policy_batch(batch, longest)

    for chunk in inference.run(network.log_probs, longest, policy, params, encoded, row_length,
                               rows, mesh, make=make):
        counts = [batches.sizes(encoded[i]) for i in range(done, done + len(chunk))]
        done += len(chunk)
        yield [[values[:n] for values, n in zip(of_item, own, strict=True)]
               for of_item, own in zip(chunk, counts, strict=True)]


def describe_network(
    config: Any, *, value: bool = False
) -> tuple[PolicyNetwork, dict[str, Any]]:
    """The configured policy, without parameters, and the settings of its backbone.

    Args:
      config: of a run.
      value: whether there is a value head.

    Raises:
      ConfigError: a setting that this model does not have.
      DataError: no checkpoint, or one that is not computed.
    """
    settings, architecture, tuning = initial.describe(config)
    try:
        return PolicyNetwork(architecture, config.model.dtype, config.model.attention,
                             config.model.remat, config.model.dropout, tuning, value), settings
    except ValueError as error:
        raise ConfigError(f'config: {error}') from error


def stops(config: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer: those of the checkpoint, and EOS.

    Raises:
      DataError: there are none.
    """
    found: tuple[int, ...] = ()
    if config.model.checkpoint:
        folder = adapters.find(config.model.checkpoint).model
        found = language_model.find_stops(folder, weights.read_settings(folder), tokenizer)
    elif tokenizer.eos_token_id is not None:
        found = (tokenizer.eos_token_id,)
    if not found:
        raise DataError('neither the checkpoint nor the tokenizer names a token that ends an '
                        'answer, expected an EOS of config.model.tokenizer')
    return found
