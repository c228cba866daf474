"""Every head on the same workloads, batches and seeds.

    qrm compare --config=compare --workdir=results/compare

trains nine models with three seeds each on the demo's helpful dialogues. With `--config=compare:hh`
it takes the data and the backbone of `hh`, from the hub or local folders (`--config.data.path`,
`--config.model.checkpoint`), and leaves out the model that learns from ratings.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.studies import compare
from qrm.training import config


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'demo' for the demo, 'hh' for Anthropic HH."""
    known = {'': configs.module('demo').CHANGES, 'demo': configs.module('demo').CHANGES, 'hh': {}}
    if arg not in known:
        raise ValueError(f"argument {arg!r}, expected 'demo' or 'hh'")
    unrated = tuple(name for name in compare.MODELS if name not in compare.RATED)
    changes = {'compare.models': unrated} if arg == 'hh' else {}
    return config.build(known[arg] | changes, more=compare.KEYS)
