"""Evaluation of a run: predictions on the test split, their metrics, and what is saved."""

import os
from typing import Any, NamedTuple

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
    `predictions.npz` and `evaluation.json` into the folder.

    Args:
      config: the run's config, in which `data` may name other data.
      folder: workdir of the run.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was evaluated.
    """
    config_lib.check(config)
    trained = workdir.load_config(folder)
    data = config.data.copy_and_resolve_references()
    if is_jsonl(data.path) and data.path != trained.data.path:
        data.test_fraction = 1.0
    loaded = model.load(folder, step=config.evaluation.checkpoint)
    comparisons, report = load_splits(data, config.workload)['test']
    encoded = tokens.encode(comparisons, loaded.tokenizer, report, append_eos=data.append_eos,
                            max_length=data.max_length or loaded.max_length,
                            overlong=data.overlong)
    if not encoded:
        raise DataError('no comparisons left to evaluate on\n' + report.format())
    predictions = metrics.ordered_pairs(encoded, loaded.predict(encoded), loaded.loss)
    summary = metrics.summarise(predictions)
    metrics.save_predictions(os.path.join(folder, 'predictions.npz'), predictions)
    workdir.write_json(os.path.join(folder, 'evaluation.json'), {
        'data': data.path, 'workload': config.workload, 'head': config.head.name,
        'checkpoint': config.evaluation.checkpoint, 'metrics': summary,
        'data_report': report.as_dict(),
    })
    return Evaluation(predictions, summary, report)
