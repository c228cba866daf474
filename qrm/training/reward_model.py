"""Trained reward models: what to score with, and how to load it.

    model = qrm.load('results/helpful-quantile')      # a workdir, or a Hugging Face folder or name
    scores = model.score(['...prompt...'], [['...response...', '...another...']])
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qrm.data.comparisons import Comparison, DataError
from qrm.data.encoded import Encoded
from qrm.data.packing import Layout
from qrm.data.rows import parse_row
from qrm.data.tokens import (
    Reading,
    Tokenizer,
    encode_to_score,
    load_tokenizer,
)
from qrm.models import adapters, checkpoint_heads, families, weights
from qrm.models.architecture import Architecture
from qrm.models.lora import merge as merge_adapters
from qrm.models.network import Params, RewardNetwork, params_digest
from qrm.models.tuning import Tuning, stack_blocks
from qrm.rewards import losses, pairwise
from qrm.rewards.heads import HeadConfig
from qrm.rewards.normalisation import Normalisation, Rewards
from qrm.rewards.selection import Scale
from qrm.training import features, inference, saved
from qrm.training.base import Base
from qrm.training.features import Features
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.saved import Checkpoint
from qrm.training.workdir import WorkdirError, read_json, runs_hint

_ROWS = 1  # of `row_length` tokens
_NAMED = 3  # comparisons in a message
# Of exported models, in config.json, or of an adapter in tokenizer_config.json.
OWN_SETTINGS = ('qrm_append_eos', 'qrm_as_chats', 'qrm_outputs', 'qrm_mean', 'qrm_std')
# In the folder of a run: by what its rewards are normalised, of which checkpoint, see
# `serving.normalise`.
NORMALISATION = 'normalisation.json'
_RAW = 'note: {} is normalised, and what follows is of its raw rewards'
# What a foreign head is taken to have learnt, which says how likely one response is to win.
_OBJECTIVES = {'scalar': 'bradley_terry', 'quantile': 'bradley_terry_quantile_huber',
               'gaussian': 'distributional_bradley_terry'}


class Scores(NamedTuple):
    """Scores of several prompts.

    Attributes:
      rewards: for each prompt [K] float32, or a float where its response was given as one text.
      quantiles: for each prompt [K, N] float32 at `RewardModel.taus`, or [N]; N = 1 for a
        scalar head.
    """

    rewards: list[Any]
    quantiles: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model with its parameters and its way of reading text.

    Attributes:
      network: architecture.
      settings: of the backbone, as in the `config.json` of its family, see `families`.
      params: parameters; with `features` those of the head alone.
      tokenizer: tokenizer.
      loss: the objective it was trained with, which says what a win probability is.
      reading: how it reads dialogues.
      row_length: tokens of a packed row; has no effect on scores.
      base: where parameters that were not trained come from; None if all were.
      features: where hidden states are kept, in place of computing them for every score; None:
        nowhere.
      normalisation: of rewards in use, see `read`; None: they are raw.
      checkpoint: that the parameters are of; None: of no run.
      scale: for the rule 'mean-std', of the reference set that rewards are normalised by and in
        units of rewards in use; None: not known.
    """

    network: RewardNetwork
    settings: Mapping[str, Any]
    params: Params
    tokenizer: Tokenizer
    loss: losses.LossConfig
    reading: Reading
    row_length: int = 1024
    base: Base | None = None
    features: Features | None = None
    normalisation: Normalisation | None = None
    checkpoint: Checkpoint | None = None
    scale: Scale | None = None

    @property
    def taus(self) -> np.ndarray:
        """[N] float32, the levels of the quantiles."""
        return self.network.head.taus

    @property
    def digest(self) -> str:
        """Hexadecimal digest of all that rewards depend on beside texts and their chat template.

        A template may print the day, so that it is another one each day.
        """
        # Files of checkpoints are the same everywhere; adapters are merged where they are loaded.
        params = self.checkpoint.digest if self.checkpoint else params_digest(self.params)
        parts = (params, self.base and self.base.digest, dict(self.settings),
                 str(self.network.head), str(self.loss), str(self.reading),
                 str(self.normalisation), str(self.scale), self.tokenizer.get_vocab())
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def score(self, prompts: Sequence[Any], responses: Sequence[Any]) -> Scores:
        """Scores responses; a score does not depend on what else is scored with it.

        Args:
          prompts: n texts or lists of chat messages.
          responses: for each prompt one response (text) or a list of K responses, which continue
            it, also if they begin with the same words.

        Raises:
          DataError: the two differ in length, or hold something that is no text; or the model
            scores no response alone, see `compare`.
        """
        comparisons = _comparisons(prompts, responses)
        single = [isinstance(response, str) for response in responses]
        scores, _ = self.score_comparisons(comparisons)
        return Scores(
            rewards=[float(r[0]) if one else r
                     for r, one in zip(scores.rewards, single, strict=True)],
            quantiles=[q[0] if one else q
                       for q, one in zip(scores.quantiles, single, strict=True)],
        )

    def compare(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[np.ndarray]:
        """Win probabilities [K, K] of the responses to each prompt, of a pairwise model.

        Args:
          prompts: n texts or lists of chat messages.
          responses: for each prompt a list of K >= 2 responses, which continue it.

        Raises:
          DataError: the two differ in length, hold something that is no text, or one response; or
            the model is not pairwise.
        """
        if not self.network.head.pairwise:
            raise DataError(f'a model with the {self.network.head.name} head scores each response '
                            'alone, expected a pairwise one to compare them')
        return self.win_probabilities(_comparisons(prompts, responses))[0]

    def win_probabilities(
        self, comparisons: Sequence[Comparison]
    ) -> tuple[list[np.ndarray], int]:
        """Of each comparison, see `pairwise.win_probabilities`; and how many orders were cut."""
        encoded, cut = self.encode(comparisons)
        return list(map(pairwise.win_probabilities, self.predict(encoded))), cut

    def score_comparisons(self, comparisons: Sequence[Comparison]) -> tuple[Scores, int]:
        """Scores [K] of each comparison, in order, and how many dialogues were cut.

        Raises:
          DataError: the model scores no response alone, or see `encode`.
        """
        check_alone(self)
        encoded, cut = self.encode(comparisons)
        if not encoded:
            return Scores([], []), cut
        outputs = self.predict(encoded)
        rewards, quantiles = jax.device_get(
            _read(self.network.head, self.normalisation, np.concatenate(outputs)))
        stops = np.cumsum([len(x) for x in outputs])[:-1]
        return Scores(np.split(rewards, stops), np.split(quantiles, stops)), cut

    def encode(self, comparisons: Sequence[Comparison]) -> tuple[list[Encoded], int]:
        """The comparisons in tokens, for `predict`, and how many dialogues were cut.

        Raises:
          DataError: see `tokens.encode_to_score`.
        """
        return encode_to_score(comparisons, self.tokenizer, self.reading,
                               attributes=self.network.head.attributes)

    def predict(
        self, encoded: Sequence[Encoded], layouts: Sequence[Layout] = ()
    ) -> list[np.ndarray]:
        """Raw outputs [K, outputs] of each encoded comparison, in order.

        Args:
          encoded: the comparisons.
          layouts: see `inference.predict`; of a model with `features` they are not read.

        Raises:
          DataError: tokens that the network does not have.
          NonFiniteLoss: an output is not finite; names the comparisons.
        """
        inference.check_look_ups(self.network, encoded)
        if self.features is not None:
            outputs = features.predict(self.network, self.params, self.features.of(encoded))
        else:
            outputs = inference.predict(self.network, self.params, encoded,
                                        row_length=self.row_length, rows=_ROWS, layouts=layouts)
        if wrong := [item.id for item, found in zip(encoded, outputs, strict=True)
                     if not np.isfinite(found).all()]:
            more = f' and {len(wrong) - _NAMED} more' if len(wrong) > _NAMED else ''
            raise NonFiniteLoss(f'{", ".join(wrong[:_NAMED])}{more}: a reward that is not finite')
        return [_tied(item, found) if item.candidates else found
                for item, found in zip(encoded, outputs, strict=True)]

    def read(self, outputs: jax.Array) -> Rewards:
        """What raw outputs [..., outputs] stand for in use: normalised, if this model is."""
        return Rewards(self.network.head, outputs, self.normalisation)


def _tied(item: Encoded, outputs: np.ndarray) -> np.ndarray:
    """The outputs of orders, the same for both of two equal responses, which rounding may part."""
    source = np.arange(len(outputs))
    for n in range(0, len(outputs), 2):
        if np.array_equal(item.responses[n], item.responses[n + 1]):
            source[n + 1] = n
    return outputs[source]


def load(
    path: str, *, step: int | str = 'best', max_length: int = 0, outputs: str = '',
    date: str = '', merge: bool = True, keep: str = '', raw: bool = False,
) -> RewardModel:
    """Loads a reward model from a workdir, or a sequence classifier of `transformers`.

    It computes in float32, also if it was trained in bfloat16.

    Args:
      path: workdir of a training run, or folder or hub name in the Hugging Face layout, of any of
        `families.FAMILIES`, or of an adapter to one, see `adapters`.
      step: of a workdir, which checkpoint: 'best', 'last' or a number.
      max_length: tokens of the longest dialogue; 0: the model's number of positions.
      outputs: of a foreign head, what its outputs mean where there are several and the checkpoint
        does not say it, see `checkpoint_heads.interpret`.
      date: of a foreign model, the day (YYYY-MM-DD) that its chat template prints if it prints any;
        '': today.
      merge: make one kernel of each kernel with adapters; else they stay beside each other.
      keep: of a run that trained its head alone, a folder where hidden states are kept, so that
        none is computed twice; '': none, and of other models none is.
      raw: leave rewards as they were trained, whatever they are normalised by.

    Raises:
      DataError, WorkdirError: there is no reward model, or it cannot be used; or it was normalised
        by another checkpoint.
    """
    if saved.is_run(path):
        if outputs or date:
            raise DataError(f'{path}: a run says itself what its outputs mean and which day its '
                            'chat template prints; expected outputs and date of other models only')
        model = _load_workdir(path, step, keep, raw, max_length)
    else:
        model = _load_hugging_face(path, outputs, date, raw)
    if model.normalisation:
        print(f'note: rewards of {path} are normalised, {model.normalisation}', flush=True)
    # In bfloat16 a score would depend on what shares its row, by about .003.
    network = dataclasses.replace(model.network, dtype='float32')
    reading = limited(model.reading, max_length, network.architecture, 'max_length')
    kept = model.features and dataclasses.replace(model.features, network=network)
    model = dataclasses.replace(model, network=network, reading=reading, features=kept)
    return merged(model) if merge and not kept else model


def check_alone(model: RewardModel) -> None:
    """Checks that a model scores a response whatever others there are.

    Raises:
      DataError: it compares two responses.
    """
    if model.network.head.pairwise:
        raise DataError('a pairwise model compares two responses and scores none alone: expected a '
                        'model with another head here (`qrm score --aggregate`, `qrm.reward` and '
                        '`compare` of the loaded model take this one)')


def _comparisons(prompts: Sequence[Any], responses: Sequence[Any]) -> list[Comparison]:
    """The responses to each prompt, as `RewardModel.score` takes them."""
    if isinstance(prompts, str) or isinstance(responses, str):
        raise DataError('got one text, expected a list of prompts and a list of responses')
    if len(prompts) != len(responses):
        raise DataError(f'{len(prompts)} prompts and {len(responses)} lists of responses')
    return [parse_row({'prompt': prompt, 'responses': [given] if isinstance(given, str) else given},
                      f'prompts[{i}]', literal=True)
            for i, (prompt, given) in enumerate(zip(prompts, responses, strict=True))]


def limited(reading: Reading, max_length: int, architecture: Architecture, name: str) -> Reading:
    """A reading with dialogues of at most `max_length` tokens; 0: of as many as has the model.

    Raises:
      DataError: the model has fewer; calls the limit by its name.
    """
    positions = architecture.max_positions
    if not 0 <= max_length <= positions:
        raise DataError(f'{name}={max_length}, but the model has {positions} positions')
    return dataclasses.replace(reading, max_length=max_length or positions)


def read_otherwise(
    model: RewardModel, *, append_eos: bool | None = None, read_before: str | None = None
) -> RewardModel:
    """The same model with another way of reading the end of dialogues.

    Args:
      model: the model.
      append_eos: see `Reading`; None: as it is.
      read_before: text of the token that dialogues are read without at their end, '' for no such
        token; None: as it is.

    Raises:
      DataError: no such token.
    """
    changes = {} if append_eos is None else {'append_eos': append_eos}
    if read_before is not None:
        known = model.tokenizer.get_vocab()
        if read_before and read_before not in known:
            raise DataError(f'read_before={read_before!r}: no token of {len(known)}, expected one, '
                            "or ''")
        changes['skipped'] = known.get(read_before)
    return dataclasses.replace(model, reading=dataclasses.replace(model.reading, **changes))


def merged(model: RewardModel) -> RewardModel:
    """The same model as if all of it had been trained: float32, blocks in one run, no adapters."""
    params = stack_blocks(jax.tree.map(lambda leaf: leaf.astype(np.float32), model.params))
    if lora := model.network.tuning.lora:
        params = params | {'backbone': merge_adapters(params['backbone'], lora)}
    return dataclasses.replace(
        model, params=params, base=None,
        network=dataclasses.replace(model.network, tuning=Tuning()))


def describe(workdir: str, model: RewardModel) -> None:
    """Writes what `load` needs beside the checkpoints: `model.json` and the tokenizer."""
    saved.describe(workdir, model.network, model.settings, model.base, model.tokenizer, {
        'loss': dataclasses.asdict(model.loss),
        'reading': dataclasses.asdict(model.reading), 'row_length': model.row_length,
    })


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(head: HeadConfig, normalisation: Normalisation | None,
          outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rewards [R] and quantiles [R, N] of raw outputs [R, outputs]."""
    found = Rewards(head, outputs, normalisation)
    return found.distribution.mean, found.quantiles


def _load_workdir(workdir: str, step: int | str, keep: str, raw: bool,
                  max_length: int) -> RewardModel:
    path = os.path.join(workdir, saved.MODEL)
    values = read_json(path)
    if 'loss' not in values:
        raise WorkdirError(f'{workdir}: a run that trained a language model; expected a reward '
                           'model')
    try:
        parts, loss = values['network'], losses.LossConfig(**values['loss'])
        settings = values['settings']
        network = RewardNetwork(**parts | {
            'architecture': families.architecture(settings, path),
            'head': HeadConfig(**parts['head']), 'tuning': saved.tuning_of(parts['tuning'])})
        rest = Reading(**values['reading']), values['row_length']
        base = values['base'] and Base(**values['base'])
    except (KeyError, TypeError, ValueError) as error:
        raise WorkdirError(f'{path}: not a model of this version ({error!r})') from error
    tokenizer = saved.tokenizer_of(workdir)
    params, checkpoint = saved.restore_trained(workdir, step, network)
    kept = None
    if keep and network.tuning.kind == 'head':
        kept = Features(network, base, keep, rest[1], _ROWS)
    else:
        params = saved.with_base(workdir, network, base, params)
    normalisation, scale = _stored_normalisation(
        workdir, checkpoint, raw, max_length or network.architecture.max_positions)
    return RewardModel(network, settings, params, tokenizer, loss, *rest, base, kept,
                       normalisation, checkpoint, scale)


def _stored_normalisation(workdir: str, checkpoint: Checkpoint, raw: bool, max_length: int
                          ) -> tuple[Normalisation | None, Scale | None]:
    """By what a run is normalised, if it is and that is asked for; tells of other lengths.

    Raises:
      WorkdirError: what says so is damaged, or speaks of other parameters.
    """
    path = os.path.join(workdir, NORMALISATION)
    if not os.path.exists(path):
        return None, None
    if raw:
        print(_RAW.format(workdir), flush=True)
        return None, None
    values = read_json(path)
    try:
        found = Normalisation(values['mean'], values['std'])
        scale = values['scale'] and Scale(**{key: float(x) for key, x in values['scale'].items()})
        known, measured = Checkpoint(**values['checkpoint']), values['max_length']
    except (KeyError, TypeError, ValueError) as error:
        raise WorkdirError(f'{path}: says not by what rewards are normalised ({error!r}); expected '
                           'what `qrm normalise` writes: run it again, or with --clear') from error
    if known != checkpoint:
        other = 'another checkpoint' if known.step == checkpoint.step else 'checkpoint'
        raise WorkdirError(
            f'{path}: is of checkpoint {known.step}, but {other} {checkpoint.step} is used; '
            'expected `qrm normalise` once more, or with --clear, or raw rewards (--raw)')
    if measured != max_length:
        print(f'note: rewards of {workdir} were normalised by dialogues of at most {measured} '
              f'tokens, and are now of at most {max_length}', flush=True)
    return found, scale


def _load_hugging_face(path: str, outputs: str, date: str, raw: bool) -> RewardModel:
    try:
        now = datetime.datetime.fromisoformat(date) if date else None
    except ValueError as error:
        raise DataError(f'date={date!r}, expected a day as 2024-07-26') from error
    source = adapters.find(path)
    if not source.adapter and not os.path.exists(os.path.join(source.model, 'config.json')):
        raise DataError(f'{path}: neither the folder of a run (model.json) nor a Hugging Face '
                        f'checkpoint (config.json){runs_hint(source.model)}')
    pretrained = adapters.load_pretrained(source)
    if pretrained.head is None:
        raise DataError(f'{path}: no {families.FAMILIES[pretrained.settings["model_type"]].head}'
                        '.weight or other reward head; this is a language model, not a reward '
                        'model')
    a, settings = pretrained.architecture, pretrained.settings
    tokenizer = load_tokenizer(source.tokenizer, now)
    check_vocabulary(tokenizer, a)
    if source.tokenizer != source.model:
        # An adapter has no config.json: trainers give its model the padding of this tokenizer.
        own = {'pad_token_id': tokenizer.pad_token_id,
               **{key: tokenizer.init_kwargs.get(key) for key in OWN_SETTINGS}}
        settings = settings | {key: value for key, value in own.items() if value is not None}
    try:
        (head, params), normalisation = checkpoint_heads.normalisation(
            checkpoint_heads.interpret(pretrained.head, settings, outputs), settings)
    except ValueError as error:
        raise DataError(f'{path}: {error}') from error
    skipped = _skipped(settings, a)
    if skipped is not None and skipped == tokenizer.eos_token_id:
        print(f'note: {path} pads with its EOS token, so that its rewards are read at the last '
              'token before EOS, as transformers reads them', flush=True)
    if raw and normalisation:
        print(_RAW.format(path), flush=True)
        normalisation = None
    objective = _OBJECTIVES[head.name]
    return RewardModel(
        RewardNetwork(a, head), settings,
        {'backbone': pretrained.backbone, 'head': params},
        tokenizer, losses.LossConfig(objective), Reading(
            a.max_positions,
            # An encoder's dialogues end as its tokenizer ends them.
            append_eos=settings.get('qrm_append_eos', a.causal) is True,
            as_chats=settings.get('qrm_as_chats') is True,
            rendered_chats=True, skipped=skipped,
            share_prompt=a.causal, size_prompt=head.sizes_prompts),
        normalisation=normalisation,
    )


def stored_reading(place: str) -> dict[str, bool]:
    """Of a model that is no run, whether EOS is appended, and texts are read as chats.

    Returns:
      'append_eos' and 'as_chats', as in `Reading`.

    Raises:
      DataError: there is no model.
    """
    source = adapters.find(place)
    settings = weights.read_settings(source.model)
    if source.tokenizer != source.model:
        path = os.path.join(source.tokenizer, 'tokenizer_config.json')
        own = weights.read_json(path) if os.path.exists(path) else {}
        settings = settings | {key: value for key, value in own.items() if key in OWN_SETTINGS}
    causal = families.architecture(settings, place).causal
    return {'append_eos': settings.get('qrm_append_eos', causal) is True,
            'as_chats': settings.get('qrm_as_chats') is True}


def _skipped(settings: Mapping[str, Any], a: Architecture) -> int | None:
    """Token that a foreign model is read before: padding, by the classifiers of transformers.

    Models with classes of their own (OpenRLHF's, LLaMA-Factory's, UltraRM and others) look at
    which tokens are attended to, so they are read at EOS also where that is the padding token.
    """
    names = settings.get('architectures') or [families.FAMILIES[settings['model_type']].classifier]
    classifier = str(names[0]).endswith('ForSequenceClassification')
    return settings.get('pad_token_id') if a.causal and classifier else None


def check_vocabulary(tokenizer: Tokenizer, architecture: Architecture) -> None:
    """Checks that every token has an embedding; a missing one would read another token's.

    Raises:
      DataError: the tokenizer has more tokens than the embedding has rows, or no words at all.
    """
    # From a folder with no tokenizer but a config.json, transformers makes an empty one.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(f'{tokenizer.name_or_path}: no tokenizer, or one with special tokens only; '
                        'expected tokenizer.json, or vocab.json and merges.txt')
    if len(tokenizer) > architecture.vocab_size:
        raise DataError(f'the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, '
                        f'but the embedding has {architecture.vocab_size} rows')
