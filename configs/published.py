"""Table 1 explained from its authors' own code: where rewards are read, what each formula gives.

    qrm published --config=published --workdir=results/published --config.paper=DIR

Needs no download without `--config.paper`, the folder of the authors' validation files
(harmless_valid.json and helpful_valid.json of min-seong-kim/QR-RLHF, data/hh-rlhf and data_img);
with it GPT-2's tokenizer, `--config.published.tokenizer=DIR` if not from the hub. Takes about 6
minutes of processor time. The models are the demo's, with the authors' objective, schedule and
text; for other GPT-2s add `--config.data.path=DIR --config.model.checkpoint=DIR`.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.studies import published
from qrm.training import config


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or a workload."""
    return config.build(configs.module('demo').CHANGES | configs.module('paper').CHANGES | {
        'data.max_length': 0,
        'model.sizes.max_positions': 1024,
        # The authors' schedule, at a rate for models of this size.
        **configs.module('paper').SCHEDULE,
        'train.epochs': 4.0,
        'train.row_length': 256,
        'train.checkpoint_every': 20,  # the warm-up ends at 24 of 238 steps
        'train.keep': 100,  # every checkpoint: the spread is followed over training
        'evaluation.checkpoint': 'last',
    }, arg, published.KEYS)
