"""How fast this machine trains and scores, beside what it can do at best.

    python -m experiments.benchmark --config=configs/benchmark.py --workdir=results/benchmark

GPT-2 small with random weights on synthetic comparisons with the lengths of HH harmless-base, so
nothing is downloaded. For real text and weights add `--config.data.path=DIR
--config.model.checkpoint=DIR`. On an accelerator set `model.dtype=bfloat16` and raise
`train.batch_size`, `train.rows`, `benchmark.steps` and `benchmark.scored`, or the time to start a
computation is most of what is measured.

As `configs/hh.py` but for the keys below; the number of epochs, checkpoints, evaluation and
analysis have no effect.
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
    if not arg:
        config.workload = 'harmless'  # whose lengths the synthetic comparisons have
    config.data.path = ''  # '': synthetic comparisons
    config.data.max_length = 512  # so that a padded batch, which is compared with, fits too
    config.data.overlong = 'drop'  # as other trainers do, so that all time the same dialogues
    config.model.checkpoint = ''  # random weights
    config.train.batch_size = 32  # comparisons a step, over all devices
    with config.unlocked():
        config.benchmark = benchmark = ConfigDict()
        benchmark.repeats = 5  # times that everything is measured, in turns
        benchmark.steps = 1  # training steps timed together; one more is not timed
        benchmark.comparisons = 1500  # synthetic ones, read if data.path is ''
        benchmark.scored = 64  # comparisons scored in a repeat, or as many as there are
        # Best-of-N: one prompt with many responses against each response by itself.
        benchmark.responses = 16  # N; 0: not measured
        benchmark.prompt = 400  # tokens of the prompt
        benchmark.response = 100  # tokens of each response
    return config.lock()
