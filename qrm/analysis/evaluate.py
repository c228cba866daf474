"""Evaluation of a run: predictions on the test split, their metrics, and what is saved."""

import dataclasses
import json
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from qrm.analysis import diagnostics, figures, winrate
from qrm.analysis.verdict import verdict
from qrm.data import tokens
from qrm.data.comparisons import Comparison, DataError, DataReport
from qrm.data.sources import is_jsonl, load_splits, load_whole
from qrm.data.tokens import Encoded
from qrm.rewards import metrics, resampling, selection
from qrm.rewards.metrics import Predictions
from qrm.training import config as config_lib
from qrm.training import features, reward_model, workdir
from qrm.training.reward_model import RewardModel
from qrm.training.schema import ConfigError


class Evaluation(NamedTuple):
    """What `evaluate` finds.

    Attributes:
      predictions: rewards of the test responses, and the pairs among them.
      metrics: see `metrics.summarise`.
      report: what became of the test rows.
    """

    predictions: Predictions
    metrics: dict[str, float]
    report: DataReport


def evaluate(config: Any, folder: str) -> Evaluation:
    """Evaluates a run's chosen checkpoint on the test split of `config.data`.

    A JSON Lines file other than the one trained on is evaluated whole. Writes
    `predictions.npz` and `evaluation.json`, which says what they are of, into the folder. Of a
    model whose head alone was trained hidden states are read from where the run keeps them, see
    `features`, and added there.

    Args:
      config: the run's config, in which `workload`, `data` and `evaluation` may differ.
      folder: workdir of the run.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was evaluated.
    """
    config_lib.check(config)
    return _evaluate(config, folder, _load(config, folder, validation=False))


def diagnose(config: Any, folder: str) -> str:
    """`evaluate`, with everything that says what the spread of the rewards is worth.

    Also writes `diagnostics.json`, `verdict.txt` and `figures/diagnostics.png`; where responses to
    one prompt are rated `choices.json`, what `config.evaluation.rules` choose among them; and with
    `config.evaluation.candidates` `win_rates.json`. The temperature is fitted on the validation
    split, which data other than those trained on do not have.

    Args:
      config, folder: as `evaluate`.

    Returns:
      The metrics and the verdict, for the terminal.

    Raises:
      ConfigError, DataError, WorkdirError: as `evaluate` and `winrate.win_rates`.
    """
    config_lib.check(config)
    rules = [selection.parse_rule(text) for text in config.evaluation.rules]
    settings = config.analysis
    resampled = {'replicates': settings.bootstrap, 'level': settings.level, 'seed': settings.seed}
    subject = _load(config, folder, validation=True)
    evaluation = _evaluate(config, folder, subject)
    diagnosis = diagnostics.diagnose(
        evaluation.predictions, subject.validation and subject.predict(subject.validation),
        **resampled, fits_ratings=subject.model.loss.reads != 'preferences')
    parts = [evaluation.report.format(), json.dumps(evaluation.metrics, indent=2)]
    workdir.write_json(os.path.join(folder, 'diagnostics.json'), diagnosis)
    if (found := _choices(evaluation.predictions, rules, resampled)) is not None:
        workdir.write_json(os.path.join(folder, 'choices.json'), found)
        parts.append(selection.describe(found))
    if config.evaluation.candidates:
        found = winrate.win_rates(
            subject.model, config.evaluation.candidates, config.evaluation.references,
            os.path.join(folder, 'reference_scores'), **resampled)
        workdir.write_json(os.path.join(folder, 'win_rates.json'), found)
        parts.append(winrate.describe(found))
    text = verdict(diagnosis)
    workdir.write_text(os.path.join(folder, 'verdict.txt'), text)
    if not jax.process_index():
        figures.save(folder, {
            'diagnostics': figures.draw_diagnostics(diagnosis, evaluation.predictions)})
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
    """A run's model and what it is judged on, in tokens; validation if asked for, of its data."""

    model: RewardModel
    test: list[Encoded]
    validation: list[Encoded] | None
    report: DataReport

    def predict(self, encoded: list[Encoded]) -> Predictions:
        """Rewards of these comparisons, with the win probabilities that the loss implies."""
        return metrics.predictions_of(encoded, self.model.predict(encoded),
                                      self.model.network.head, self.model.loss)


def _load(config: Any, folder: str, *, validation: bool) -> _Subject:
    """Everything that evaluation reads of the config and of files."""
    trained = workdir.load_config(folder)
    _check_changes(trained, config)
    model = reward_model.load(folder, step=config.evaluation.checkpoint,
                              keep=features.place(config, folder))
    same = _same_source(config.data.path, trained.data.path)
    if is_jsonl(config.data.path) and not same:
        test, held_out = load_whole(config.data, config.workload), None
    else:
        splits = load_splits(config.data, config.workload)
        # Only of the data trained on it is held out by construction.
        own = validation and same and config.workload == trained.workload
        test, held_out = splits['test'], splits['validation'] if own else None
    return _Subject(model, _encode(config.data, model, *test),
                    held_out and _encode(config.data, model, *held_out), test[1])


def _encode(data: Any, model: RewardModel, comparisons: list[Comparison],
            report: DataReport) -> list[Encoded]:
    rated, head = model.loss.reads != 'preferences', model.network.head
    reading = dataclasses.replace(model.reading, append_eos=data.append_eos,
                                  max_length=data.max_length or model.reading.max_length)
    encoded = tokens.encode(comparisons, model.tokenizer, report, reading,
                            overlong=data.overlong, ratings=rated, attributes=head.attributes)
    if not (tokens.has_preferred(encoded) or (rated and tokens.has_rating(encoded))):
        raise DataError(f'no comparison with a preferred {"or rated " * rated}response to evaluate '
                        'on\n' + report.format())
    return encoded


def _evaluate(config: Any, folder: str, subject: _Subject) -> Evaluation:
    predictions = subject.predict(subject.test)
    summary = metrics.summarise(predictions)
    if not jax.process_index():
        metrics.save_predictions(os.path.join(folder, 'predictions.npz'), predictions)
    workdir.write_json(os.path.join(folder, 'evaluation.json'), {
        'data': config.data.path, 'workload': config.workload, 'head': config.head.name,
        'checkpoint': config.evaluation.checkpoint, 'metrics': summary,
        'data_report': subject.report.as_dict(),
    })
    return Evaluation(predictions, summary, subject.report)


def _same_source(path: str, other: str) -> bool:
    """Whether two values of `data.path` name the same data."""
    return path == other or os.path.realpath(path) == os.path.realpath(other)


def _check_changes(trained: Any, config: Any) -> None:
    """Refuses changes that mean nothing here, or would put training rows into the test split."""
    changed = workdir.config_changes(trained.to_dict(), config.to_dict())
    keys = [line.split(':')[0].removeprefix('config.') for line in changed]
    fixed = [key for key in keys if not key.startswith(('data.', 'workload'))]
    if _same_source(config.data.path, trained.data.path):
        fixed += [key for key in keys if key in ('data.test_fraction', 'data.validation_fraction')
                  or key.startswith('data.demo.')]
    if fixed:
        raise ConfigError(f'config.{", config.".join(fixed)}: cannot be changed to '
                          'evaluate a run that was trained with other values')
