"""Policies optimised against reward models where the truth is known.

    qrm optimise --config=optimise --workdir=results/optimise

Every key has its default, `qrm.studies.overoptimisation.KEYS`; what would count as an answer stands
there, too, `yes.*`. Needs no download.

`--config=optimise:full` optimises ten rewards by both online algorithms, with five seeds and more
prompts: 105 policies in place of 24. How long it takes has not been measured.
"""

from ml_collections import ConfigDict

from qrm.studies.overoptimisation import KEYS, PROXIES
from qrm.training import schema

_REWARDS = (*(f'{name} mean' for name in PROXIES), 'distributional cvar:0.2',
            'quantile cvar:0.2', 'ratings cvar:0.2', 'ensemble disagreement:1')
_FULL = {'seeds': (0, 1, 2, 3, 4), 'online.ppo': _REWARDS, 'online.grpo': _REWARDS,
         'evaluation.prompts': 256}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'full'."""
    if arg not in ('', 'full'):
        raise ValueError(f"argument {arg!r}, expected 'full' or none")
    return schema.build(KEYS, _FULL if arg else {})
