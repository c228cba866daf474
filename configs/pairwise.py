"""The demo with a pairwise model: it reads the prompt and both responses, in both orders.

    qrm train    --config=pairwise --workdir=results/pairwise
    qrm evaluate --workdir=results/pairwise

Needs no download and takes about 2 minutes on 2 CPU cores. Expect a test accuracy of about .76 on
the helpful workload, the mean of both orders, with a fifth of the pairs decided otherwise in the
other order (the best possible accuracy is .763).

With an argument, `--config=pairwise:harmless`, another workload.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.training import config

CHANGES = {
    'head.name': 'pairwise',
    # An order holds both responses.
    'data.max_length': 256,
    'model.sizes.max_positions': 256,
    'train.row_length': 256,
    'train.rows': 4,
}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or the workload."""
    return config.build({**configs.module('demo').CHANGES, **CHANGES}, arg)
