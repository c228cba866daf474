"""Policies optimised against reward models: in the demo, where the truth is known, or on real text.

    qrm optimise --config=optimise --workdir=results/optimise

Every key has its default, `qrm.studies.overoptimisation.KEYS`; what would count as an answer stands
there, too, `yes.*`. Needs no download.

`--config=optimise:full` optimises ten rewards by both online algorithms, with five seeds and more
prompts: 105 policies in place of 24. How long it takes has not been measured.

`--config=optimise:text` has settings for a pretrained chat model of the size of SmolLM2-135M, pairs
of real text and, in place of the truth, a reward model that learnt from other pairs, from the
random weights of another seed:

    qrm optimise --config=optimise:text --workdir=results/text --config.data=DIR \\
      --config.reference=smollm2-135m --config.gold=results/judge

Policies are trained by LoRA; proxies are heads on hidden states of the reference.
"""

from ml_collections import ConfigDict

from qrm.studies.overoptimisation import KEYS, PROXIES, TEXT
from qrm.training import schema

_REWARDS = (*(f'{name} mean' for name in PROXIES), 'distributional cvar:0.2',
            'quantile cvar:0.2', 'ratings cvar:0.2', 'ensemble disagreement:1')
_FULL = {'seeds': (0, 1, 2, 3, 4), 'online.ppo': _REWARDS, 'online.grpo': _REWARDS,
         'evaluation.prompts': 256}
_CHANGES = {'': {}, 'full': _FULL, 'text': TEXT}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '', 'full' or 'text'."""
    if arg not in _CHANGES:
        raise ValueError(f"argument {arg!r}, expected 'full', 'text' or none")
    return schema.build(KEYS, _CHANGES[arg])
