"""The network of a run before its first step, as the config describes it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from qrm.models import adapters, families, parallel, sharding, weights
from qrm.models.architecture import Architecture
from qrm.models.network import Network, Params
from qrm.models.tuning import Tuning
from qrm.models.weights import Pretrained
from qrm.training import base, step
from qrm.training import config as config_lib
from qrm.training.base import Base
from qrm.training.schema import ConfigError


class Backbone(NamedTuple):
    """What the config says of a backbone, without its parameters.

    Attributes:
      settings: as in the `config.json` of its family.
      architecture: what is computed.
      tuning: what is trained.
    """

    settings: dict[str, Any]
    architecture: Architecture
    tuning: Tuning


class Initial(NamedTuple):
    """The network of a run before its first step.

    Attributes:
      network: as configured.
      settings: of its backbone, see `Backbone`.
      trained: parameters, see `Tuning.split`.
      find_frozen: gives the others; where the head alone is trained, they are read by it, as
        kept features may be all that is needed.
      base: where those that are frozen are to be found; None if there are none.
      mesh: over which the parameters are split; None: they are not.
      pretrained: what was read of a checkpoint; None if nothing was.
    """

    network: Network
    settings: dict[str, Any]
    trained: Params
    find_frozen: Callable[[], Params]
    base: Base | None
    mesh: Mesh | None
    pretrained: Pretrained | None = None

    @property
    def frozen(self) -> Params:
        """Parameters that are not trained."""
        return self.find_frozen()

    @property
    def params(self) -> Params:
        """All parameters."""
        return self.network.tuning.join(self.trained, self.frozen)


def describe(config: Any) -> Backbone:
    """The backbone of the config.

    Raises:
      ConfigError: what is to be trained is not there.
      DataError: no checkpoint, or one that is not computed.
    """
    checkpoint = config.model.checkpoint
    settings = (weights.read_settings(adapters.find(checkpoint).model) if checkpoint
                else config_lib.random_settings(config))
    architecture = families.architecture(settings, checkpoint or 'config.model.sizes')
    try:
        tuned = config_lib.tuning_config(config, settings)
    except ValueError as error:
        raise ConfigError(f'config.{error}') from error
    return Backbone(settings, architecture, tuned)


def start(config: Any, network: Network, settings: dict[str, Any]) -> Initial:
    """What the parameters of a network start from.

    Args:
      config: of a run.
      network: the network.
      settings: of its backbone; those of a checkpoint are taken from it once more.

    Raises:
      ConfigError: tensor groups cannot divide the blocks, see `parallel.check`.
      DataError: see `base.read` and `base.start`.
    """
    mesh = None
    if config.train.sharding == 'fsdp':
        try:
            parallel.check(network.architecture, jax.device_count(), config.train.tensor)
        except ValueError as error:
            raise ConfigError(f'config.train.{error}') from error
        mesh = sharding.make_mesh(config.train.tensor)
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
    started = base.start(network, origin, pretrained, mesh)
    if started.anew:
        print(f'note: {config.model.checkpoint} has no {", ".join(started.anew)}, training starts '
              'anew')
    frozen = started.frozen if mesh else step.place_frozen(network, started.frozen)
    return Initial(network, settings, started.trained, lambda: frozen,
                   None if kind == 'all' else origin, mesh, pretrained)
