"""Supervised fine-tuning of a language model on the responses that people preferred.

    qrm sft --config=sft --workdir=results/sft --config.data.path=pairs.jsonl \
      --config.model.checkpoint=smollm2-135m

Rows of any form that `qrm data` knows: of pairs and rankings the preferred response is learnt, of
rows with one response that. The default is the demo, which needs no download, with a small GPT-2 of
random weights.

With an argument, `--config=sft:harmless`, another workload.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.policy import config, sft

# The data and the model of the demo, but for what only reward models have.
CHANGES = {key: value for key, value in configs.module('demo').CHANGES.items() if key in sft.KEYS}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or the workload."""
    return config.build(sft.KEYS, CHANGES, arg)
