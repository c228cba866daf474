"""Supervised fine-tuning of a language model on the responses that people preferred.

    qrm sft --config=sft --workdir=results/sft --config.data.path=pairs.jsonl \
      --config.model.checkpoint=smollm2-135m

Rows of any form that `qrm data` knows: of pairs and rankings the preferred response is learnt, of
rows with one response that. On an accelerator raise `train.rows` and set `model.dtype=bfloat16`.

`--config=sft:demo` is the demo with a small GPT-2 of random weights, which needs no download: of
use to see it run. Another argument is the workload, as in `--config=sft:harmless`.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.policy import config, sft

CHANGES = {
    'optimizer.learning_rate': 2e-5,
    'optimizer.warmup_fraction': 0.1,
}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '', 'demo' or the workload."""
    if arg != 'demo':
        return config.build(sft.KEYS, CHANGES, arg)
    return config.build(sft.KEYS, configs.changes('demo', sft.KEYS))
