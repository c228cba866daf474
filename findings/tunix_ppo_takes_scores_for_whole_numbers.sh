#!/usr/bin/env bash
# google-tunix 0.1.7 (jax 0.10.2, CPU), PPO: scores of responses lose what follows the decimal point. Rewards of tokens start as
# zeros like the tokens, which are whole numbers, and the score is added to them.
#
# Expected: with gamma and lambda 1, values of 0 and no KL penalty the return of a response is its score. Seen: of scores .9, -.9
# and 1.7 the returns are 0, 0 and 1. jax gives a FutureWarning; the logged scores are right, and the logged rewards are not.
# Who is hurt: whoever trains by PPO on a reward model, whose rewards are mostly within a few units, or on shares in [0, 1].
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat > rounded.py <<'PYTHON'
import sys
import types
import warnings
from importlib.metadata import version

import jax.numpy as jnp
import numpy as np
from tunix.rl import rl_cluster
from tunix.rl.ppo import ppo_learner

SCORES = np.array([0.9, -0.9, 1.7], np.float32)
config = ppo_learner.PPOConfig(beta=0.0, gamma=1.0, gae_lambda=1.0)
cluster = types.SimpleNamespace(
    cluster_config=types.SimpleNamespace(
        rollout_config=types.SimpleNamespace(max_tokens_to_generate=2)),
    rollout=types.SimpleNamespace(pad_id=lambda: 0, eos_id=lambda: 1),
    generate=lambda **unused: types.SimpleNamespace(
        tokens=[np.array([3, 1])] * 3, text=['x'] * 3,
        left_padded_prompt_tokens=np.full((3, 1), 2)),
    get_old_per_token_logps=lambda **unused: jnp.zeros((3, 2)),
    get_values=lambda **unused: jnp.zeros((3, 3)),
    buffer_metrics=lambda *unused, **others: None)
learner = types.SimpleNamespace(
    rl_cluster=cluster, algo_config=config, _rollout_micro_batch_size=None, metric_fns=[],
    _compute_logps_micro_batch_size=None, _use_reward_model=False,
    _compute_rewards=lambda **unused: SCORES)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    found = ppo_learner.PPOLearner._generate_and_compute_advantage(
        learner, {'prompts': ['p'] * 3}, rl_cluster.Mode.TRAIN)
returns = np.asarray(found.returns)[:, 0].tolist()
told = sum('scatter inputs have incompatible types' in str(one.message) for one in said)
print(f'google-tunix {version("google-tunix")}: scores {[0.9, -0.9, 1.7]}, returns of the first '
      f'token {returns}, FutureWarnings of jax {told}')
sys.exit(returns != [0.0, 0.0, 1.0])
PYTHON
JAX_PLATFORMS=cpu env/bin/python rounded.py 2> errors | tail -1 || { tail -3 errors; exit 1; }
