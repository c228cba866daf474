"""Evaluation of a run: predictions on the test split, their metrics, and what is saved."""

import json
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from qrm.analysis import diagnostics, figures, winrate
from qrm.analysis.verdict import verdict
from qrm.data import tokens
from qrm.data.comparisons import Comparison, DataError, DataReport
from qrm.data.sources import Split, is_jsonl, load_splits
from qrm.rewards import metrics, resampling, selection
from qrm.rewards.metrics import Predictions
from qrm.training import config as config_lib
from qrm.training import reward_model, workdir
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
    `predictions.npz` and `evaluation.json`, which says what they are of, into the folder.

    Args:
      config: the run's config, in which `workload`, `data` and `evaluation` may differ.
      folder: workdir of the run.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was evaluated.
    """
    config_lib.check(config)
    return _evaluate(config, folder, _load(config, folder))


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
    rules = _rules(config)
    loaded = _load(config, folder)
    evaluation = _evaluate(config, folder, loaded)
    settings = config.analysis
    resampled = {'replicates': settings.bootstrap, 'level': settings.level, 'seed': settings.seed}
    validation = None
    if loaded.validation:
        validation = _predict(config, loaded, *loaded.validation)
    diagnosis = diagnostics.diagnose(
        evaluation.predictions, validation, **resampled,
        fits_ratings=loaded.model.loss.reads != 'preferences')
    parts = [evaluation.report.format(), json.dumps(evaluation.metrics, indent=2)]
    workdir.write_json(os.path.join(folder, 'diagnostics.json'), diagnosis)
    if (found := _choices(evaluation.predictions, rules, resampled)) is not None:
        workdir.write_json(os.path.join(folder, 'choices.json'), found)
        parts.append(selection.describe(found))
    if config.evaluation.candidates:
        found = winrate.win_rates(
            loaded.model, config.evaluation.candidates, config.evaluation.references,
            os.path.join(folder, 'reference_scores'), **resampled)
        workdir.write_json(os.path.join(folder, 'win_rates.json'), found)
        parts.append(winrate.describe(found))
    text = verdict(diagnosis)
    workdir.write_text(os.path.join(folder, 'verdict.txt'), text)
    if not jax.process_index():
        figures.save(folder, {
            'diagnostics': figures.draw_diagnostics(diagnosis, evaluation.predictions)})
    return '\n\n'.join([*parts, text])


def _rules(config: Any) -> list[selection.Rule]:
    try:
        return [selection.parse_rule(text) for text in config.evaluation.rules]
    except ValueError as error:
        raise ConfigError(f'config.evaluation.rules: {error}') from error


def _choices(predictions: Predictions, rules: list[selection.Rule],
             resampled: dict[str, Any]) -> dict[str, Any] | None:
    """What the rules choose; None if too few comparisons have two rated responses."""
    p = predictions
    rated = np.bincount(p.comparisons[np.isfinite(p.ratings)], minlength=len(p.comparison_ids))
    if len(np.unique(p.comparison_groups[rated > 1])) < resampling.MIN_GROUPS:
        return None
    return selection.as_dict(selection.chosen_ratings(p, rules, **resampled))


class _Loaded(NamedTuple):
    """A run and the data it is judged on; validation is None where there is no such split."""

    model: RewardModel
    test: Split
    validation: Split | None


def _load(config: Any, folder: str) -> _Loaded:
    trained = workdir.load_config(folder)
    _check_changes(trained, config)
    data = config.data.copy_and_resolve_references()
    same = _same_source(data.path, trained.data.path)
    whole = is_jsonl(data.path) and not same
    if whole:
        data.test_fraction = 1.0
    loaded = reward_model.load(folder, step=config.evaluation.checkpoint)
    splits = load_splits(data, config.workload)
    report = splits['test'][1]
    if whole:  # What was said of rows that are in no split belongs to the one there is.
        rest = splits['train'][1]
        report.read += rest.read
        report.dropped += rest.dropped
        report.notes += rest.notes
    # Only of the data trained on it is held out by construction.
    own = same and config.workload == trained.workload
    return _Loaded(loaded, splits['test'], splits['validation'] if own else None)


def _predict(config: Any, loaded: _Loaded, comparisons: list[Comparison],
             report: DataReport) -> Predictions:
    data, reward_model = config.data, loaded.model
    head, loss = reward_model.network.head, reward_model.loss
    rated = loss.reads != 'preferences'
    encoded = tokens.encode(comparisons, reward_model.tokenizer, report,
                            append_eos=data.append_eos,
                            max_length=data.max_length or reward_model.max_length,
                            overlong=data.overlong, ratings=rated, attributes=head.attributes)
    if not (tokens.has_preferred(encoded) or (rated and tokens.has_rating(encoded))):
        raise DataError(f'no comparison with a preferred {"or rated " * rated}response to evaluate '
                        'on\n' + report.format())
    return metrics.predictions_of(encoded, reward_model.predict(encoded), head, loss)


def _evaluate(config: Any, folder: str, loaded: _Loaded) -> Evaluation:
    comparisons, report = loaded.test
    predictions = _predict(config, loaded, comparisons, report)
    summary = metrics.summarise(predictions)
    if not jax.process_index():
        metrics.save_predictions(os.path.join(folder, 'predictions.npz'), predictions)
    workdir.write_json(os.path.join(folder, 'evaluation.json'), {
        'data': config.data.path, 'workload': config.workload, 'head': config.head.name,
        'checkpoint': config.evaluation.checkpoint, 'metrics': summary,
        'data_report': report.as_dict(),
    })
    return Evaluation(predictions, summary, report)


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
