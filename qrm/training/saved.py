"""What a run leaves beside its config and metrics: a model, described, with its tokenizer."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qrm.data.comparisons import DataError
from qrm.data.tokens import Tokenizer, load_tokenizer, save_tokenizer
from qrm.models.architecture import flat
from qrm.models.lora import Lora, Module
from qrm.models.network import Network, Params
from qrm.models.tuning import Tuning
from qrm.training.base import Base, restore_frozen
from qrm.training.checkpoints import Checkpoints
from qrm.training.workdir import WorkdirError, write_json

MODEL = 'model.json'


class Checkpoint(NamedTuple):
    """Which parameters of a run.

    Attributes:
      step: after which they were saved.
      digest: hexadecimal, of the files that hold them.
    """

    step: int
    digest: str


def is_run(path: str) -> bool:
    """Whether a path is the folder of a training run."""
    return os.path.isdir(path) and os.path.exists(os.path.join(path, MODEL))


def describe(
    workdir: str, network: Network, settings: Mapping[str, Any], base: Base | None,
    tokenizer: Tokenizer, rest: Mapping[str, Any],
) -> None:
    """Writes what is needed beside the checkpoints: `model.json` and the tokenizer.

    Args:
      workdir: of the run.
      network, settings: of the model.
      base: where parameters that are not trained come from; None if all are.
      tokenizer: of the model.
      rest: what else `model.json` has.
    """
    folder = os.path.join(workdir, 'tokenizer')
    if not jax.process_index() and not os.path.isdir(folder):
        # Appears whole or not at all, also if the run is killed here.
        shutil.rmtree(folder + '.tmp', ignore_errors=True)
        save_tokenizer(tokenizer, folder + '.tmp')
        os.rename(folder + '.tmp', folder)
    own = dataclasses.asdict(network)
    del own['architecture']  # follows from the settings
    write_json(os.path.join(workdir, MODEL), {
        'network': own, 'settings': dict(settings), 'base': base and dataclasses.asdict(base),
        **rest})


def tuning_of(values: Mapping[str, Any]) -> Tuning:
    """What `dataclasses.asdict` made of it, JSON in between."""
    lora = values['lora']
    if lora is not None:
        lora = Lora(**lora | {'modules': tuple(Module(*module) for module in lora['modules'])})
    return Tuning(**values | {'lora': lora})


def tokenizer_of(workdir: str) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
      WorkdirError: there is none.
    """
    folder = os.path.join(workdir, 'tokenizer')
    if not os.path.isdir(folder):  # or its path would be taken for a name on the hub
        raise WorkdirError(f'{folder}: no such folder; expected the tokenizer of the run')
    return load_tokenizer(folder)


def restore_trained(workdir: str, step: int | str, network: Network) -> tuple[Params, Checkpoint]:
    """The trained parameters of a checkpoint, see `Tuning.split`.

    Args:
      workdir: of the run.
      step: 'best', 'last' or a number.
      network: as `model.json` describes it.

    Raises:
      WorkdirError: there is no such checkpoint, or it is damaged or of another network.
    """
    trained, _ = jax.eval_shape(
        lambda key: network.tuning.split(network.init(key)), jax.random.key(0))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        try:
            number, trained = checkpoints.restore_params(step, trained)
        except ValueError as error:
            if isinstance(error, WorkdirError):
                raise
            raise WorkdirError(f'{os.path.join(workdir, MODEL)}: describes other parameters than '
                               f'{error}') from error
        checkpoint = Checkpoint(number, checkpoints.digest(number))
    if wrong := [name for name, leaf in flat(trained).items()
                 if not np.isfinite(np.asarray(leaf, np.float32)).all()]:
        raise WorkdirError(f'{workdir}: checkpoint {number}: {wrong[0]} is not finite')
    return trained, checkpoint


def with_base(workdir: str, network: Network, base: Base | None, trained: Params) -> Params:
    """All parameters of a run, those that are not trained from its base.

    Raises:
      WorkdirError: the base is not there any more.
    """
    if base is None:
        return trained
    try:
        return network.tuning.join(trained, restore_frozen(network, base))
    except DataError as error:
        raise WorkdirError(f'{os.path.join(workdir, MODEL)}: what was not trained comes from '
                           f'"base": {error}; if it has been moved, say there where it is now'
                           ) from error
