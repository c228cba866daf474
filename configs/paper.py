"""The paper's experiment as its authors' own code runs it (min-seong-kim/QR-RLHF, c0f8e59).

    qrm reproduce --config=paper --workdir=results/paper

`hh` is what the paper describes, this is what was run: the quantile Huber loss, weight 1, moves
the quantiles of the chosen side to their own mean; Bradley-Terry adds 1e-5 inside its logarithm;
heads have a bias; turns are joined by "</s>"; AdamW at 2e-6 in steps of 4 pairs, 200,000 of them
with a warm-up of 20,000 from a tenth of the rate, then inverse-square-root decay; gradients are
clipped at norm 1.

What differs (docs/table1.md has it all): rewards are read at the last token, with EOS seen there;
they start from a GPT-2 fine-tuned on HH and train on fnlp's relabelling of it: give these with
`--config.model.checkpoint` and `--config.data.path`. They have `model.dropout=0.1`, as in GPT-2's
config, `model.dtype=bfloat16`, no scalar bias, and before their last commit 50 quantiles.
A checkpoint is chosen by the negative log-likelihood, not by the whole loss. A prompt too long is
cut from the left, not by turns. Not measured. Heads are scalar or quantile.
"""

from ml_collections import ConfigDict

from qrm.data import templates
from qrm.training import config

# What the authors' code optimises, in what text.
CHANGES = {
    'data.as_chats': True,
    'model.chat_template': templates.MOSS,
    'model.initial_std': 0.0,
    'head.bias': True,
    'loss.targets': 'own_mean',
    'loss.huber_sides': 'chosen',
    'loss.huber_weight': 1.0,
    'loss.pair_epsilon': 1e-5,
    'optimizer.eps': 1e-6,
    'reproduce.models': ('scalar', 'quantile'),
}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'workload,model'."""
    return config.build(CHANGES | {
        'optimizer.learning_rate': 2e-6,
        'optimizer.schedule': 'inverse_sqrt',
        'optimizer.warmup_fraction': 0.1,
        'optimizer.warmup_floor': 0.1,
        'train.batch_size': 4,
        'train.epochs': 1000.0,  # max_steps ends the run
        'train.max_steps': 200_000,
        'train.checkpoint_every': 2000,
    }, arg)
