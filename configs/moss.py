"""HH with the optimiser and schedule of MOSS-RLHF's reward-model training (Zheng et al. 2023).

    python -m experiments.train --config=configs/moss.py:helpful,scalar --workdir=results/moss

As `configs/hh.py` but for AdamW with betas (0.9, 0.95), eps 1e-6 and no weight decay, a warm-up of
500 of 10,000 steps followed by inverse-square-root decay from 5e-6, and a weight (0 as in their
default) for the language-model loss on the chosen response: `--config.loss.lm_weight`. Not
measured. Two things differ: the loss is log_sigmoid, not log(sigma + 1e-5), which loses the
gradient of badly wrong pairs; and a prompt too long is cut from the left, not by turns.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'workload,head'."""
    # Config files are loaded by path, so their neighbours are too.
    spec = importlib.util.spec_from_file_location('hh', Path(__file__).with_name('hh.py'))
    hh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hh)
    config = hh.get_config(arg)
    config.optimizer.learning_rate = 5e-6
    config.optimizer.schedule = 'inverse_sqrt'
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-6
    config.optimizer.weight_decay = 0.0
    config.train.epochs = 100.0  # max_steps ends the run
    config.train.max_steps = 10_000
    return config
