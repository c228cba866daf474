#!/usr/bin/env bash
# google-tunix 0.1.7 (jax 0.10.2, CPU), GRPO: a reward that is not a number counts as 0, without a word. Rewards of several
# functions are added by nansum, which leaves out what is NaN.
#
# Expected: an error, a warning, or a group without that completion. Seen: of a group with the rewards NaN, −1, −2 and −3, and
# −0.5 each from a second function, the first has the reward −0.5 and the largest advantage of the group, 1.162. No warning is
# given; with the first function alone numpy warns of the mean of an empty slice, where a metric is made.
# Who is hurt: whoever trains on rewards below zero, as reward models and penalties often give. What is reinforced most is the
# completion for which the reward failed, such as one whose score overflowed, and the logged mean does not show it.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat > failed.py <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import numpy as np
from tunix.rl import function_registry
from tunix.rl.grpo import grpo_learner
from tunix.rl.reward_manager import SequenceRewardManager


def score(prompts, completions, **columns):
    return [float('nan'), -1.0, -2.0, -3.0]


def penalty(prompts, completions, **columns):
    return [-0.5] * len(completions)


warnings.simplefilter('error')
config = grpo_learner.GRPOConfig(num_generations=4)
found = SequenceRewardManager([score, penalty], config)(
    prompts=['p'] * 4, completions=['a', 'b', 'c', 'd'])
advantages = np.asarray(function_registry.get_advantage_estimator(config.advantage_estimator)(
    rewards=found['rewards'], num_generations=4))
print(f'google-tunix {version("google-tunix")}: rewards {found["rewards"].tolist()}, advantages',
      advantages.round(3).tolist())
sys.exit(not (found['rewards'].tolist() == [-0.5, -1.5, -2.5, -3.5] and advantages.argmax() == 0))
PYTHON
JAX_PLATFORMS=cpu env/bin/python failed.py 2> errors | tail -1 || { tail -3 errors; exit 1; }
