"""Every head on the same workloads, batches and seeds.

    python -m experiments.compare --config=configs/compare.py --workdir=results/compare

trains nine models with three seeds each on the demo's helpful dialogues. With
`configs/compare.py:hh` it takes the data and the backbone of `configs/hh.py`, from the hub or
local folders (`--config.data.path`, `--config.model.checkpoint`).
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

# Name -> what a model has in its `head` and `loss` sections. Nothing else may differ.
_MODELS = {
    'scalar': {'head': {'name': 'scalar'}},
    # The paper's objective; lambda = 0 is Bradley-Terry on the mean of free quantiles.
    'quantile': {'head': {'name': 'quantile'}},
    'quantile_0': {'head': {'name': 'quantile'}, 'loss': {'huber_weight': 0.0}},
    'quantile_1': {'head': {'name': 'quantile'}, 'loss': {'huber_weight': 1.0}},
    # The distributional likelihood, by four families.
    'distributional': {'head': {'name': 'monotone_quantile'}},
    'implicit': {'head': {'name': 'implicit_quantile'}},
    'gaussian': {'head': {'name': 'gaussian'}},
    'categorical': {'head': {'name': 'categorical'}},
    'ensemble': {'head': {'name': 'scalar', 'members': 5}},
}
# Where responses have ratings.
_RATED = {'ratings': {'head': {'name': 'monotone_quantile'},
                      'loss': {'monotone_quantile': 'ratings_pinball'}}}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'demo' for the demo, 'hh' for Anthropic HH."""
    name = arg or 'demo'
    # Config files are loaded by path, so their neighbours are too.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f'{name}.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    with config.unlocked():
        config.compare = compare = ConfigDict()
        compare.workloads = ('helpful',)  # each model is trained on each by itself
        compare.seeds = (0, 1, 2)  # of parameters, batch order and dropout; the data stay
        compare.reference = 'scalar'  # the model that others are compared with, pair by pair
        known = _MODELS | (_RATED if name == 'demo' else {})
        compare.models = tuple(known)  # which, in the order of the tables
        compare.sections = ConfigDict(known)  # what each has in its `head` and `loss`
    return config.lock()
