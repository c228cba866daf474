"""Optimisation of a language model against a reward.

    qrm rl --config=rl:grpo --workdir=results/rl --config.model.checkpoint=smollm2-135m \
      --config.data.path=pairs.jsonl --config.reward.source=results/reward

The prompts are those of rows of any form that `qrm data` knows; responses in them are not read. The
reference is the model that the run begins with: one that has learnt to answer, such as what `qrm
sft` and `qrm export` leave. On an accelerator raise `train.rows` and `rollouts.rows`.

The argument is the algorithm, 'ppo', 'grpo', 'rloo', 'expert_iteration' or 'best_of_n', with its
settings. `--config=rl:ppo,demo` is the demo, its gold reward, and a small GPT-2 of random weights,
which needs no download: of use to see it run. In place of 'demo' may stand the workload, as in
`--config=rl:ppo,harmless`.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.policy import config, optimise
from qrm.training.schema import ConfigError

CHANGES = {
    'optimizer.learning_rate': 1e-6,
    'optimizer.warmup_fraction': 0.1,
}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '', 'demo', or an algorithm and after a comma 'demo' or the workload."""
    name, _, rest = arg.partition(',') if arg != 'demo' else ('', '', arg)
    if name not in ('', *optimise.CHANGES):
        raise ConfigError(f'rl:{name}: no such algorithm, expected one of '
                          f'{tuple(optimise.CHANGES)}')
    chosen = optimise.CHANGES[name] | {'algorithm.name': name} if name else {}
    if rest != 'demo':
        return config.build(optimise.KEYS, CHANGES | chosen, rest)
    return config.build(optimise.KEYS, configs.changes('demo', optimise.KEYS)
                        | {'reward.source': 'gold', 'optimizer.learning_rate': 1e-4} | chosen)
