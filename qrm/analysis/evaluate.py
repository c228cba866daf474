"""Evaluation of a run: predictions on the test split, their metrics, and what is saved."""

import copy
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qrm.analysis import diagnostics, figures, report, winrate
from qrm.analysis.verdict import verdict
from qrm.data import sources, tokens
from qrm.data.comparisons import (
    Comparison,
    DataError,
    DataReport,
    check_malformed,
    exchange_prompts,
)
from qrm.data.encoded import Encoded, has_preferred, has_rating
from qrm.data.files import is_rows
from qrm.data.records import Comparisons
from qrm.models import adapters
from qrm.rewards import metrics, resampling, selection
from qrm.rewards.metrics import Predictions
from qrm.training import config as config_lib
from qrm.training import features, reward_model, saved, schema, workdir
from qrm.training.reward_model import RewardModel
from qrm.training.schema import ConfigError

# What can be changed to evaluate a run; of the data it depends on which they are.
_FREE = ('evaluation.', 'analysis.', 'reproduce.', 'train.features')


class Evaluation(NamedTuple):
    """What `evaluate` finds.

    Attributes:
      predictions: rewards of the test responses, and the pairs among them.
      metrics: see `metrics.summarise`.
      report: what became of the test rows.
      exchanged: predictions on some of them with the prompts of others; None: not asked for, or
        there are no prompts to exchange.
      comparisons: those of the predictions, in their order.
    """

    predictions: Predictions
    metrics: dict[str, float]
    report: DataReport
    exchanged: Predictions | None
    comparisons: Comparisons


def evaluate(config: Any, folder: str, *, exchange: bool = False) -> Evaluation:
    """Evaluates a run's chosen checkpoint on the test split of `config.data`.

    Data are recognised by what they say, wherever they are: of those that the run was trained on
    its own test split is taken, while another single file is evaluated whole; how many of the rows
    and opening questions the run was trained on is noted. Writes `predictions.npz` and
    `evaluation.json`, which says what they are of, into the folder. Of a model whose head alone was
    trained hidden states are read from where the run keeps them, see `features`, and added there.

    Args:
      config: the run's config, in which `workload`, `data` and `evaluation` may differ.
      folder: workdir of the run.
      exchange: also with prompts exchanged, as `config.evaluation.exchanged` says.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was evaluated.
    """
    config_lib.check(config)
    config = config_lib.absolute(config)
    return _evaluate(config, folder, _load(config, folder, validation=False, exchange=exchange))


def stored_config(place: str) -> Any:
    """The config of a run; of any other reward model the default one, to say what it is judged on.

    Args:
      place: folder of a run, or a model as `reward_model.load` takes it.

    Raises:
      DataError, WorkdirError: it is neither.
    """
    path = os.path.join(place, 'config.json')
    foreign = os.path.exists(os.path.join(place, adapters.CONFIG)) or (
        os.path.exists(path) and not isinstance(workdir.read_json(path).get('train'), dict))
    of_the_hub = re.fullmatch(r'[\w.-]+/[\w.-]+', place) and not os.path.exists(place)
    if not foreign and not of_the_hub:
        return workdir.load_config(place)
    return schema.build(config_lib.KEYS, {
        f'data.{key}': value for key, value in reward_model.stored_reading(place).items()})


def diagnose(config: Any, place: str, output: str = '', outputs: str = '') -> str:
    """`evaluate`, with everything that says what the spread of the rewards is worth.

    Also writes `diagnostics.json`, `verdict.txt`, `figures/diagnostics.png` and, see `report`,
    `report.html`; where responses to one prompt are rated `choices.json`, what
    `config.evaluation.rules` choose among them; and with `config.evaluation.candidates`
    `win_rates.json`. The temperature is fitted on the validation split, which data other than those
    trained on do not have.

    Args:
      config: as of `evaluate`; of a model that is no run, as `stored_config` gives it.
      place: workdir of the run, or another reward model as `reward_model.load` takes it.
      output: folder to write into; '': the run's, and of another model nothing is written.
      outputs: of another model, see `reward_model.load`.

    Returns:
      The metrics and the verdict, for the terminal.

    Raises:
      ConfigError, DataError, WorkdirError: as `evaluate` and `winrate.win_rates`.
    """
    config_lib.check(config)
    config = config_lib.absolute(config)
    rules = [selection.parse_rule(text) for text in config.evaluation.rules]
    settings = config.analysis
    resampled = {'replicates': settings.bootstrap, 'level': settings.level, 'seed': settings.seed}
    if config.evaluation.candidates:  # what is wrong with them is said before anything is computed
        winrate.match(config.evaluation.candidates, config.evaluation.references)
    subject = _load(config, place, validation=True, exchange=True, outputs=outputs)
    folder = output or (place if saved.is_run(place) else '')
    if folder:
        workdir.make(folder)
    evaluation = _evaluate(config, folder, subject)
    diagnosis = diagnostics.diagnose(
        evaluation.predictions, subject.validation and subject.predict(subject.validation),
        evaluation.exchanged, **resampled,
        fits_ratings=subject.model.loss.rated)
    diagnosis['predictions'] = metrics.fingerprint(evaluation.predictions)
    parts = [evaluation.report.format(), json.dumps(evaluation.metrics, indent=2)]
    text = verdict(diagnosis)
    if folder:
        workdir.write_json(os.path.join(folder, 'diagnostics.json'), diagnosis)
        workdir.write_text(os.path.join(folder, 'verdict.txt'), text)
        if not jax.process_index():
            figures.save(folder, {
                'diagnostics': figures.draw_diagnostics(diagnosis, evaluation.predictions)})
    if (found := _choices(evaluation.predictions, rules, resampled)) is not None:
        if folder:
            workdir.write_json(os.path.join(folder, 'choices.json'), found)
        parts.append(selection.describe(found))
    if config.evaluation.candidates:
        found = winrate.win_rates(
            subject.model, config.evaluation.candidates, config.evaluation.references,
            os.path.join(folder, 'reference_scores') if folder else '', **resampled)
        if folder:
            workdir.write_json(os.path.join(folder, 'win_rates.json'), found)
        parts.append(winrate.describe(found))
    if folder:
        report.leave(folder, {folder: evaluation.comparisons})
    return '\n\n'.join([*parts, text])


def _choices(predictions: Predictions, rules: list[selection.Rule],
             resampled: dict[str, Any]) -> dict[str, Any] | None:
    """What the rules choose; None if too few comparisons have two rated responses."""
    p = predictions
    rated = np.bincount(p.comparisons[np.isfinite(p.ratings)], minlength=len(p.comparison_ids))
    if len(np.unique(p.comparison_groups[rated > 1])) < resampling.MIN_GROUPS:
        return None
    return selection.as_dict(selection.chosen_ratings(p, rules, **resampled))


class _Subject(NamedTuple):
    """A run's model and what it is judged on, in tokens; validation if asked for, of its data.

    `exchanged` are some of the test comparisons with the prompts of others, if asked for.
    """

    model: RewardModel
    comparisons: Comparisons
    test: Sequence[Encoded]
    validation: Sequence[Encoded] | None
    exchanged: Sequence[Encoded] | None
    report: DataReport

    def predict(self, encoded: Sequence[Encoded]) -> Predictions:
        """Rewards of these comparisons, with the win probabilities that the loss implies."""
        return metrics.predictions_of(encoded, self.model.predict(encoded),
                                      self.model.network.head, self.model.loss)


def _load(config: Any, place: str, *, validation: bool, exchange: bool,
          outputs: str = '') -> _Subject:
    """Everything that evaluation reads of the config and of files."""
    is_run = saved.is_run(place)
    stored = stored_config(place)
    _check_changes(stored, config)
    # Win probabilities are those of the scale that was trained.
    model = reward_model.load(place, step=config.evaluation.checkpoint, outputs=outputs, raw=True,
                              keep=features.place(config, place) if is_run else '')
    source = sources.read(config.data, config.workload)
    seen, same = None, False
    if is_run:
        seen = workdir.read_seen(place)
        same = source.digest == seen.source
        _check_fractions(stored, config, same)
    held_out = None
    if is_rows(config.data.path) and not same:
        test = sources.whole(source)
    else:
        splits = sources.divide(source, config.data)
        # Only of the data trained on it is held out by construction.
        test, held_out = splits['test'], splits['validation'] if validation and same else None
    if seen:
        seen.note(*test)
    encoded = encode(config.data, model, *test)
    ids = enumerate(test[0].fact('id').to_pylist())
    judged = test[0].pick(np.array(
        [next(place for place, name in ids if name == item.id) for item in encoded], np.int64))
    return _Subject(model, judged, encoded,
                    held_out and encode(config.data, model, *held_out),
                    exchange_some(config, model, test[0]) if exchange else None, test[1])


def exchange_some(config: Any, model: RewardModel,
                  comparisons: Sequence[Comparison]) -> Sequence[Encoded] | None:
    """Some comparisons with a preference, each with the prompt of another; None if there are none.

    A prompt that is too long for another's responses loses its left end, whatever `data.overlong`
    says of the data. Those that a chat template refuses are counted in a note.

    Args:
      config: which says how many of them, and by what seed.
      model: by which they are read.
      comparisons: of one split.
    """
    judged = [c for c in comparisons if (c.preference_matrix() > 0.5).any()]
    count = min(config.evaluation.exchanged, len(judged))
    rng = np.random.default_rng(config.analysis.seed)
    some = [judged[i] for i in np.sort(rng.choice(len(judged), count, replace=False))]
    found = exchange_prompts(some, config.analysis.seed)
    report = DataReport(config.data.path, 'exchanged', read=len(found))
    data = copy.deepcopy(config.data)
    data.overlong = 'truncate_prompt'
    encoded = read_tokens(data, model, found, report, ratings=model.loss.rated)
    if len(encoded) < count:
        print(f'note: {count - len(encoded)} of {count} comparisons have no other prompt that they '
              'can be read with', flush=True)
    return encoded or None


def encode(data: Any, model: RewardModel, comparisons: Sequence[Comparison],
           report: DataReport) -> Sequence[Encoded]:
    """Comparisons to judge a model on, in tokens.

    Args:
      data: the `data` section of a config.
      model: by which they are read.
      comparisons: the comparisons.
      report: of their rows; is added to.

    Raises:
      DataError: nothing is left to judge it by, or too many rows are malformed.
    """
    rated = model.loss.rated
    encoded = read_tokens(data, model, comparisons, report, ratings=rated)
    check_malformed([report], data.max_malformed)
    if not (has_preferred(encoded) or (rated and has_rating(encoded))):
        raise DataError(f'no comparison with a preferred {"or rated " * rated}response to evaluate '
                        'on\n' + report.format())
    return encoded


def read_tokens(data: Any, model: RewardModel, comparisons: Sequence[Comparison],
                report: DataReport, *, ratings: bool) -> Sequence[Encoded]:
    """Comparisons as `tokens.encode` gives them, read as a model reads them.

    Args:
      data, model, comparisons, report: as of `encode`.
      ratings: whether ratings count as something said of a comparison.
    """
    reading = reward_model.limited(
        dataclasses.replace(model.reading, append_eos=data.append_eos, as_chats=data.as_chats),
        data.max_length, model.network.architecture, 'config.data.max_length')
    return tokens.encode(comparisons, model.tokenizer, report, reading, overlong=data.overlong,
                         ratings=ratings, attributes=model.network.head.attributes)


def _evaluate(config: Any, folder: str, subject: _Subject) -> Evaluation:
    predictions = subject.predict(subject.test)
    summary = metrics.summarise(predictions)
    settings = config.analysis
    position = diagnostics.position(
        predictions, replicates=settings.bootstrap, level=settings.level,
        seed=settings.seed) if subject.model.network.head.pairwise else None
    if folder:
        if not jax.process_index():
            metrics.save_predictions(os.path.join(folder, 'predictions.npz'), predictions,
                                     report.text_digests(subject.comparisons))
        workdir.write_json(os.path.join(folder, 'evaluation.json'), {
            'data': config.data.path, 'workload': config.workload,
            'head': subject.model.network.head.name, 'checkpoint': config.evaluation.checkpoint,
            'metrics': summary, **({'position': position} if position else {}),
            'data_report': subject.report.as_dict(),
            'config': {key: config[key].to_dict() for key in ('data', 'analysis')},
        })
    exchanged = subject.exchanged and subject.predict(subject.exchanged)
    return Evaluation(predictions, summary, subject.report, exchanged, subject.comparisons)


def _check_changes(stored: Any, config: Any) -> None:
    """Refuses changes that mean nothing here."""
    changed = _changed(stored, config)
    _refuse([key for key in changed if not key.startswith(('data.', 'workload'))])


def _check_fractions(trained: Any, config: Any, same: bool) -> None:
    """Refuses changes that would put training rows into the test split."""
    demo = trained.data.path == config.data.path == 'demo'
    _refuse([key for key in _changed(trained, config)
             if (same and key in ('data.test_fraction', 'data.validation_fraction'))
             or (demo and key.startswith('data.demo.'))])


def _changed(stored: Any, config: Any) -> list[str]:
    changed = workdir.config_changes(stored.to_dict(), config.to_dict(), _FREE)
    return [line.split(':')[0].removeprefix('config.') for line in changed]


def _refuse(keys: list[str]) -> None:
    if keys:
        raise ConfigError(f'config.{", config.".join(keys)}: cannot be changed to '
                          'evaluate a run that was trained with other values')
