"""The checkpoints of a policy, watched after it was trained.

    qrm watch --config=watch --workdir=results/watch --config.run=results/dpo \
      --config.reward.source=results/reward --config.reward.judge=results/other-reward

Of any run of `qrm sft`, `qrm dpo` or `qrm rl`. The prompts are the run's own held-out ones, the
reference is what it began with; all else means what it does in `--config=rl`.
"""

from ml_collections import ConfigDict

from qrm.policy import follow
from qrm.training import schema


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is ''."""
    if arg:
        raise ValueError(f"argument {arg!r}, expected ''")
    return schema.build(follow.KEYS, {})
