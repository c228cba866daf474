"""The paper's experiment as its authors' own code runs it (min-seong-kim/QR-RLHF, c0f8e59).

    qrm reproduce --config=paper --workdir=results/paper

`hh` is what the paper describes, this is what was run: the quantile Huber loss, weight 1, moves
the quantiles of the chosen side to their own mean; Bradley-Terry adds 1e-5 inside its logarithm;
heads have a bias; turns are joined by "</s>"; 200,000 AdamW steps of 4 pairs, 20,000 of warm-up.

What differs is in docs/table1.md: rewards are read at the last token, with EOS seen there; they
start from a GPT-2 fine-tuned on HH and train on fnlp's relabelling of it: give these with
`--config.model.checkpoint` and `--config.data.path`. Not measured. Heads are scalar or quantile.
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
SCHEDULE = {
    'optimizer.schedule': 'inverse_sqrt',
    'optimizer.warmup_fraction': 0.1,
    'optimizer.warmup_floor': 0.1,
}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'workload,model'."""
    return config.build(CHANGES | SCHEDULE | {
        'model.dropout': 0.1,  # as in GPT-2's config
        'model.dtype': 'bfloat16',
        'optimizer.learning_rate': 2e-6,
        'train.batch_size': 4,
        'train.epochs': 1000.0,  # max_steps ends the run
        'train.max_steps': 200_000,
        'train.checkpoint_every': 2000,
    }, arg)
