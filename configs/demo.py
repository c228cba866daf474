"""The demo: a tiny GPT-2 from scratch on generated dialogues whose true rewards are known.

    qrm reproduce --config=demo --workdir=results/demo

Needs no download and takes about 3 minutes on 2 CPU cores. Expect test accuracies of .735 to .754
(the best possible are .763 and .766) and real estimates of KL(chosen || rejected) from .28 to .38
nats.

With an argument, `--config=demo:helpful,quantile`, only that workload and head are trained.
"""

from ml_collections import ConfigDict

from qrm.training import config

CHANGES = {
    'data.path': 'demo',
    'data.max_length': 128,
    'model.checkpoint': '',
    'model.initial_std': 0.0,
    'model.sizes.vocab_size': 512,
    'model.sizes.max_positions': 128,
    'model.sizes.hidden_size': 64,
    'model.sizes.num_layers': 2,
    'model.sizes.num_heads': 4,
    'optimizer.learning_rate': 2e-3,
    'optimizer.warmup_fraction': 0.05,
    'optimizer.weight_decay': 0.01,
    'train.epochs': 2.0,
    'train.row_length': 128,
    'train.rows': 8,
    'train.checkpoint_every': 40,
}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'workload,model'."""
    return config.build(CHANGES, arg)
