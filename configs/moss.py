"""HH with the optimiser and schedule of MOSS-RLHF's reward-model training (Zheng et al. 2023).

    qrm train --config=moss:helpful,scalar --workdir=results/moss

AdamW with betas (0.9, 0.95), eps 1e-6 and no weight decay, a warm-up of 500 of 10,000 steps
followed by inverse-square-root decay from 5e-6, and a weight (0 as in their default) for the
language-model loss on the chosen response: `--config.loss.lm_weight`. Not measured. Two things
differ: the loss is log_sigmoid, not log(sigma + 1e-5), which loses the gradient of badly wrong
pairs; and a prompt too long is cut from the left, not by turns.
"""

from ml_collections import ConfigDict

from qrm.training import config


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'workload,model'."""
    return config.build({
        'optimizer.learning_rate': 5e-6,
        'optimizer.schedule': 'inverse_sqrt',
        'optimizer.warmup_fraction': 0.05,
        'optimizer.b1': 0.9,
        'optimizer.b2': 0.95,
        'optimizer.eps': 1e-6,
        'optimizer.weight_decay': 0.0,
        'train.epochs': 100.0,  # max_steps ends the run
        'train.max_steps': 10_000,
    }, arg)
