"""Every head on the same workloads, batches and seeds.

    qrm compare --config=compare --workdir=results/compare

trains eleven models with three seeds each on the demo's helpful dialogues: 13 minutes on 2 CPU
cores. With `--config=compare:hh` it takes the data and the backbone of `hh`, from the hub or local
folders (`--config.data.path`, `--config.model.checkpoint`), and leaves out the model that learns
from ratings. With `--config=compare:frozen` heads are trained on hidden states of a backbone that
stays as it is, of 30 blocks such as SmolLM2's, for both workloads; what each reads is chosen on
held-out pairs, of which there are twice as many; and baselines stand beside them:

    qrm compare --config=compare:frozen --workdir=results/heads --config.data.path=DIR \\
      --config.model.checkpoint=DIR

With SmolLM2-135M and the 3,684 pairs of docs/results.md that took 80 minutes beside other jobs,
nearly all of it hidden states and likelihoods, which are computed once. `scalar_chats` and
`quantile_chats` in `compare.models` read the texts by the chat template; `own_mean` has the
quantile loss of the paper's own code. On frozen features the ensemble has no spread unless
`model.initial_std` is 1.
"""

from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.studies import compare
from qrm.training import config

_UNRATED = {'compare.models': tuple(name for name in compare.DEFAULT if name not in compare.RATED)}
_FROZEN = _UNRATED | {
    'data.max_length': 1024,
    'data.validation_fraction': 0.1,
    'train.tune': 'head',
    'train.epochs': 5.0,
    'train.checkpoint_every': 20,
    'train.keep': 1,
    'optimizer.learning_rate': 1e-3,
    'compare.workloads': ('helpful', 'harmless'),
    'compare.reads': ('last', 'mean', 'last+mean', 'last+mean+mean@10+mean@20'),
    'compare.baselines': ('longer', 'likelihood', 'probe'),
}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'demo' for the demo, 'hh' or 'frozen' for Anthropic HH."""
    demo = configs.module('demo').CHANGES
    known = {'': demo, 'demo': demo, 'hh': _UNRATED, 'frozen': _FROZEN}
    if arg not in known:
        raise ValueError(f"argument {arg!r}, expected 'demo', 'hh' or 'frozen'")
    return config.build(known[arg], more=compare.KEYS)
