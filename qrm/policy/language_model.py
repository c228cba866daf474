"""Language models in use: what to sample from, and how to load it."""

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qrm.data.comparisons import DataError
from qrm.data.tokens import Tokenizer, load_tokenizer
from qrm.models import adapters, families, lora, weights
from qrm.models.architecture import flat, leaf_dtype, tree
from qrm.models.network import Params
from qrm.models.transformer import Transformer
from qrm.models.tuning import Tuning, stack_blocks
from qrm.policy.network import PolicyNetwork
from qrm.training import saved
from qrm.training.base import Base
from qrm.training.reward_model import check_vocabulary
from qrm.training.workdir import WorkdirError, read_json


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder with its output embedding, and its way of reading and ending texts.

    Attributes:
      transformer: what is computed.
      params: of it.
      tokenizer: tokenizer.
      stops: tokens that end an answer.
      settings: of its family, as in `config.json`.
    """

    transformer: Transformer
    params: Any
    tokenizer: Tokenizer
    stops: tuple[int, ...]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """The language model that a run trained, its adapters by themselves.

    Attributes:
      network: as it was trained.
      params: all parameters.
      base: where those come from that were not trained; None if all were.
      tokenizer, stops, settings: see `LanguageModel`.
    """

    network: PolicyNetwork
    params: Params
    base: Base | None
    tokenizer: Tokenizer
    stops: tuple[int, ...]
    settings: Mapping[str, Any]

    def merged(self, dtype: str = 'float32') -> LanguageModel:
        """The model as if all of it had been trained, in a dtype."""
        backbone = stack_blocks(self.params)['backbone']
        if adapted := self.network.tuning.lora:
            backbone = lora.merge(backbone, adapted)
        backbone = tree({path: jnp.asarray(leaf, leaf_dtype(path, dtype))
                         for path, leaf in flat(backbone).items()})
        network = dataclasses.replace(self.network, tuning=Tuning(), dtype=dtype, remat=False,
                                      dropout=0.0)
        return LanguageModel(network.transformer, backbone, self.tokenizer, self.stops,
                             self.settings)


def load(path: str, *, dtype: str = 'float32', date: str = '') -> LanguageModel:
    """Loads a language model of transformers, an adapter to one, see `adapters`, or that of a run.

    It stops at EOS of the tokenizer and at all that generation_config.json, or without it
    config.json, names as such.

    Args:
      path: folder or hub name, or workdir of a run that trained a policy; of that the best
        checkpoint.
      dtype: of tables, kernels and what is computed, 'float32' or 'bfloat16'.
      date: the day (YYYY-MM-DD) that its chat template prints if it prints any; '': today; a run
        has its own.

    Raises:
      DataError: there is no language model, or it cannot be used.
      WorkdirError: the same of a run.
    """
    try:
        now = datetime.datetime.fromisoformat(date) if date else None
    except ValueError as error:
        raise DataError(f'date={date!r}, expected a day as 2024-07-26') from error
    if saved.is_run(path):
        if date:
            raise DataError(f'{path}: a run says itself which day its chat template prints; '
                            'expected a date of other models only')
        return load_run(path).merged(dtype)
    source = adapters.find(path)
    settings = weights.read_settings(source.model)
    if not families.architecture(settings, path).causal:
        raise DataError(f'{path}: a {settings["model_type"]} is an encoder, which has no next '
                        'token; expected a decoder')
    pretrained = adapters.load_pretrained(source, output=True, dtype=dtype)
    if pretrained.head is not None:
        raise DataError(f'{path}: has a reward head, expected a language model')
    tokenizer = load_tokenizer(source.tokenizer, now)
    check_vocabulary(tokenizer, pretrained.architecture)
    return LanguageModel(Transformer(pretrained.architecture, jnp.dtype(dtype)),
                         pretrained.backbone, tokenizer,
                         find_stops(source.model, settings, tokenizer), pretrained.settings)


def is_policy(path: str) -> bool:
    """Whether a path is the folder of a run that trained a language model."""
    return saved.is_run(path) and 'stops' in read_json(os.path.join(path, saved.MODEL))


def load_run(workdir: str, *, step: int | str = 'best') -> Run:
    """The language model of a run.

    Args:
      workdir: of the run.
      step: which checkpoint, 'best', 'last' or a number.

    Raises:
      DataError: the run trained a reward model.
      WorkdirError: the run cannot be read, or its base is not there any more.
    """
    path = os.path.join(workdir, saved.MODEL)
    values = read_json(path)
    if 'stops' not in values:
        raise DataError(f'{workdir}: a run, which is a reward model; expected a language model')
    try:
        settings, parts = values['settings'], values['network']
        network = PolicyNetwork(**parts | {
            'architecture': families.architecture(settings, path),
            'tuning': saved.tuning_of(parts['tuning'])})
        base = values['base'] and Base(**values['base'])
        stops = tuple(values['stops'])
    except (KeyError, TypeError, ValueError) as error:
        raise WorkdirError(f'{path}: not a model of this version ({error!r})') from error
    tokenizer = saved.tokenizer_of(workdir)
    trained, _ = saved.restore_trained(workdir, step, network)
    return Run(network, saved.with_base(workdir, network, base, trained), base, tokenizer, stops,
               settings)


def find_stops(folder: str, settings: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer, of a model in a folder.

    Raises:
      DataError: they are said in another way than by numbers.
    """
    path = os.path.join(folder, 'generation_config.json')
    if os.path.isfile(path):
        settings = weights.read_json(path)
    else:
        path = os.path.join(folder, 'config.json')
    given = settings.get('eos_token_id')
    found = given if isinstance(given, list) else [given]
    for token in found:
        if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
            raise DataError(f'{path}: eos_token_id={json.dumps(given)}, expected a token or a list '
                            'of tokens')
    return tuple(sorted({*found, tokenizer.eos_token_id} - {None}))
