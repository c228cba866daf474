"""Direct preference optimisation of a language model.

    qrm dpo --config=dpo --workdir=results/dpo --config.data.path=pairs.jsonl \
      --config.model.checkpoint=smollm2-135m

Rows of any form that `qrm data` knows, if they say which response is preferred. The reference is
the model that the run begins with: one that has learnt to answer, such as what `qrm sft` and
`qrm export` leave. On an accelerator raise `train.rows` and set `model.dtype=bfloat16`.

`--config=dpo:demo` is the demo with a small GPT-2 of random weights, which needs no download: of
use to see it run. Another argument is the workload, as in `--config=dpo:harmless`.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.policy import config, dpo

CHANGES = {
    'optimizer.learning_rate': 1e-6,
    'optimizer.warmup_fraction': 0.1,
}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '', 'demo' or the workload."""
    if arg != 'demo':
        return config.build(dpo.KEYS, CHANGES, arg)
    return config.build(dpo.KEYS, configs.changes('demo', dpo.KEYS))
