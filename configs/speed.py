"""How fast this machine trains and scores, beside what it can do at best.

    qrm speed --config=speed --workdir=results/speed

GPT-2 small with random weights on synthetic comparisons with the lengths of HH harmless-base, so
nothing is downloaded. For real text and weights add `--config.data.path=DIR
--config.model.checkpoint=DIR`. On an accelerator set `model.dtype=bfloat16` and raise
`train.batch_size`, `train.rows`, `speed.steps` and `speed.scored`, or the time to start a
computation is most of what is measured.

The number of epochs, checkpoints, evaluation and analysis have no effect.
"""

from ml_collections import ConfigDict

from qrm.studies import speed
from qrm.training import config


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'workload,model'."""
    return config.build({
        'workload': 'harmless',  # whose lengths the synthetic comparisons have
        'data.path': '',  # synthetic comparisons
        'data.max_length': 512,  # so that a padded batch, which is compared with, fits too
        'data.overlong': 'drop',  # as other trainers do, so that all time the same dialogues
        'model.checkpoint': '',  # random weights
        'train.batch_size': 32,
    }, arg, speed.KEYS)
