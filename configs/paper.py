"""The paper's experiment as its authors' own code runs it (min-seong-kim/QR-RLHF, c0f8e59).

    qrm reproduce --config=paper --workdir=results/paper

`hh` is what the paper describes, this is what was run: the quantile Huber loss, weight 1, moves
the quantiles of the chosen side to their own mean; Bradley-Terry adds 1e-5 inside its logarithm;
heads have a bias; turns are joined by "</s>"; AdamW at 2e-6 in steps of 4 pairs, 200,000 of them
with a warm-up of 20,000 from a tenth of the rate, then inverse-square-root decay; gradients are
clipped at norm 1.

What differs, as far as known:

- Rewards are read at the last token: their quantile model counts tokens from the left of a row that
  is padded there, see `published`.
- Positions count from the start of a dialogue, theirs from the edge of the padded row; and EOS, at
  which rewards are read, is seen there, while their mask hides it with the padding.
- They start from a GPT-2 that was fine-tuned on HH, and train on fnlp's relabelling of it: give
  these with `--config.model.checkpoint` and `--config.data.path`.
- No dropout: theirs is the .1 of GPT-2's own config, which nothing changes (`model.dropout=0.1`).
- Ten quantiles are those of their last commit; it was 50 until then (`head.num_quantiles=50`), and
  which of them the paper's numbers are of is not known.
- Both heads have a bias; their scalar head has none, which no difference of rewards notices.
- Computed in float32, theirs in mixed precision (`model.dtype=bfloat16`).
- A checkpoint is chosen by the negative log-likelihood, not by the whole loss.
- A prompt too long is cut from the left, not by turns.

Not measured. Heads are scalar or quantile.
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
