"""Evaluation of a run: predictions on the test split, their metrics, and what is saved."""

import os
from typing import Any, NamedTuple

import jax

from qrm import config as config_lib
from qrm import metrics, model, tokens, workdir
from qrm.comparisons import DataError, DataReport
from qrm.data import is_jsonl, load_splits
from qrm.metrics import Predictions


class Evaluation(NamedTuple):
    """What `evaluate` finds.

    Attributes:
      predictions: rewards of the test pairs.
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
    trained = workdir.load_config(folder)
    _check_changes(trained, config)
    data = config.data.copy_and_resolve_references()
    whole = is_jsonl(data.path) and not _same_source(data.path, trained.data.path)
    if whole:
        data.test_fraction = 1.0
    loaded = model.load(folder, step=config.evaluation.checkpoint)
    splits = load_splits(data, config.workload)
    comparisons, report = splits['test']
    if whole:  # What was said of rows that are in no split belongs to the one there is.
        rest = splits['train'][1]
        report.read += rest.read
        report.dropped += rest.dropped
        report.notes += rest.notes
    head, loss = loaded.network.head, loaded.loss
    encoded = tokens.encode(comparisons, loaded.tokenizer, report, append_eos=data.append_eos,
                            max_length=data.max_length or loaded.max_length,
                            overlong=data.overlong, ratings=loss.reads != 'preferences',
                            attributes=head.attributes)
    if not (tokens.has_preferred(encoded) or tokens.has_rating(encoded)):
        raise DataError('no comparison with a preferred response to evaluate on\n'
                        + report.format())
    predictions = metrics.predictions_of(encoded, loaded.predict(encoded), head, loss)
    summary = metrics.summarise(predictions)
    if not jax.process_index():
        metrics.save_predictions(os.path.join(folder, 'predictions.npz'), predictions)
    workdir.write_json(os.path.join(folder, 'evaluation.json'), {
        'data': data.path, 'workload': config.workload, 'head': config.head.name,
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
        raise config_lib.ConfigError(f'config.{", config.".join(fixed)}: cannot be changed to '
                                     'evaluate a run that was trained with other values')
