"""Policies optimised against reward models: in the demo, where the truth is known, or on real text.

    qrm optimise --config=optimise --workdir=results/optimise

Every key has its default, `qrm.studies.overoptimisation.KEYS`; what would count as an answer stands
there, too, `yes.*`. Needs no download.

`--config=optimise:full` optimises ten rewards by both online algorithms, with five seeds and more
prompts: 105 policies in place of 24. How long it takes has not been measured.

`--config=optimise:text` has settings for a pretrained chat model of the size of SmolLM2-135M, pairs
of real text and, in place of the truth, a reward model that learnt from other pairs:

    qrm optimise --config=optimise:text --workdir=results/text --config.data=DIR \\
      --config.reference=smollm2-135m --config.gold=results/judge

Policies are trained by LoRA; proxies are heads on hidden states of the reference.
"""

from ml_collections import ConfigDict

from qrm.studies.overoptimisation import KEYS, PROXIES
from qrm.training import schema

_REWARDS = (*(f'{name} mean' for name in PROXIES), 'distributional cvar:0.2',
            'quantile cvar:0.2', 'ratings cvar:0.2', 'ensemble disagreement:1')
_FULL = {'seeds': (0, 1, 2, 3, 4), 'online.ppo': _REWARDS, 'online.grpo': _REWARDS,
         'evaluation.prompts': 256}

_ADAPTERS = {'optimizer': {'learning_rate': 5e-4, 'warmup_fraction': 0.1}}
_TEXT = {
    'data': '', 'reference': '', 'gold': '', 'seeds': (0,),
    'proxies.names': ('scalar', 'quantile'),
    'runs.common': {'data': {'as_chats': True, 'max_length': 352, 'validation_fraction': 0.1},
                    'train': {'row_length': 1024, 'rows': 1, 'keep': 100}},
    'runs.reward': {
        'head': {'reads': ('last', 'mean', 'mean@10', 'mean@20')},
        'optimizer': {'learning_rate': 1e-3},
        'train': {'tune': 'head', 'epochs': 5.0, 'checkpoint_every': 5}},
    'runs.dpo': _ADAPTERS | {
        'dpo': {'beta': 0.05}, 'train': {'tune': 'lora', 'batch_size': 16, 'checkpoint_every': 12}},
    'runs.grpo': _ADAPTERS | {
        'algorithm': {'beta': 0.0, 'kl_reward': '', 'kl_loss': 'k2', 'truncated': 'keep'},
        'rollouts': {'prompts': 8, 'samples': 4, 'rows': 32, 'max_new_tokens': 96},
        'evaluation': {'prompts': 16, 'samples': 4}, 'monitor': {'stop': ()},
        'train': {'tune': 'lora', 'batch_size': 8, 'max_steps': 18, 'checkpoint_every': 6}},
    'best_of_n.candidates': 16, 'best_of_n.rules': ('cvar:0.2',),
    'online.ppo': (), 'online.grpo': ('scalar mean', 'quantile mean'),
    'evaluation.prompts': 64, 'evaluation.samples': 2, 'evaluation.max_new_tokens': 96,
    'evaluation.rows': 64}
_CHANGES = {'': {}, 'full': _FULL, 'text': _TEXT}


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '', 'full' or 'text'."""
    if arg not in _CHANGES:
        raise ValueError(f"argument {arg!r}, expected 'full', 'text' or none")
    return schema.build(KEYS, _CHANGES[arg])
