"""The demo with a pairwise model: it reads the prompt and both responses, in both orders.

    qrm train    --config=pairwise --workdir=results/pairwise
    qrm evaluate --workdir=results/pairwise

Needs no download; training takes 73 s of processor time. Expect a test accuracy of about .75 on the
helpful workload (.763 is the best possible), and a fifth to a third of the pairs decided otherwise
in the other order. docs/models.md has the numbers beside those of the scalar head.

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
