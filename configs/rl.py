"""Optimisation of a language model against a reward.

    qrm rl --config=rl:grpo --workdir=results/rl --config.model.checkpoint=smollm2-135m \
      --config.data.path=pairs.jsonl --config.reward.source=results/reward

The prompts are those of rows of any form that `qrm data` knows; responses in them are not read. The
default is the prompts of the demo, its gold reward, and a small GPT-2 of random weights, which is
good for nothing but trying the command out: give it a model that `qrm sft` trained and `qrm export`
wrote.

With an argument, `--config=rl:grpo`, another algorithm than PPO, with its settings; with
`--config=rl:grpo,harmless` another workload.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.policy import config, optimise
from qrm.training.schema import ConfigError

# The data and the model of the demo, but for what only reward models have.
CHANGES = {key: value for key, value in configs.module('demo').CHANGES.items()
           if key in optimise.KEYS} | {
    'reward.source': 'gold',
    'optimizer.learning_rate': 1e-4,
    'train.epochs': 1.0,
    'train.checkpoint_every': 16,
}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'algorithm,workload'."""
    name, _, workload = arg.partition(',')
    if name not in ('', *optimise.CHANGES):
        raise ConfigError(f'rl:{name}: no such algorithm, expected one of '
                          f'{tuple(optimise.CHANGES)}')
    chosen = optimise.CHANGES[name] | {'algorithm.name': name} if name else {}
    return config.build(optimise.KEYS, CHANGES | chosen, workload)
