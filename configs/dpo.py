"""Direct preference optimisation of a language model.

    qrm dpo --config=dpo --workdir=results/dpo --config.data.path=pairs.jsonl \
      --config.model.checkpoint=smollm2-135m

Rows of any form that `qrm data` knows, if they say which response is preferred. `--config.dpo.loss`
and `dpo.beta` choose the loss. The default is the demo, which needs no download, with a small GPT-2
of random weights: of use to see it run. The reference is the model that is begun with, so begin
with one that has learnt to answer, such as what `qrm sft` and `qrm export` leave.

With an argument, `--config=dpo:harmless`, another workload.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.policy import config, dpo

# The data and the model of the demo, but for what only reward models have.
CHANGES = {key: value for key, value in configs.module('demo').CHANGES.items() if key in dpo.KEYS}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or the workload."""
    return config.build(dpo.KEYS, CHANGES | {'optimizer.learning_rate': 5e-4}, arg)
