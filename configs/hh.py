"""The paper's experiment: GPT-2 on Anthropic's HH pairs, helpful and harmless.

    qrm reproduce --config=hh --workdir=results/hh

Every key has its default, `qrm.training.config.KEYS`. Reads data and weights from the Hugging
Face hub; for local folders add `--config.data.path=DIR --config.model.checkpoint=DIR`. On an
accelerator raise `train.rows` and set `model.dtype=bfloat16`. Expected: not measured with the
pretrained weights and all of HH; README.md shows a run on a small sample with random weights.

With an argument, `--config=hh:helpful,quantile`, only that workload and head are trained.
"""

from ml_collections import ConfigDict

from qrm.training import config


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'workload,model'."""
    return config.build({}, arg)
