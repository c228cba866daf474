#!/usr/bin/env bash
# clu 0.0.12 (jax 0.10.2, CPU), `metrics.LastValue`: values of shape (B, 1) without a mask are added up B times and divided by B,
# as the mask of shape (B,) that it makes meets them as (B, B). `metrics.Average`, which it is said to mirror, makes a mask of
# the shape of the values. The docstring speaks of the average of the batch.
#
# Expected: the mean, or an error. Seen, for 0, 1, 2 and 3 in a column: 6 by `LastValue`, 1.5 by `Average`; in one
# dimension 1.5 by both.
# Who is hurt: whoever logs what a head with one output gives, as heads of reward models and of values do: the number is as
# many times too large as the batch is, and changes with it.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check clu==0.0.12 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.3.5
cat > column.py <<'PYTHON'
import importlib.metadata
import sys

import jax.numpy as jnp
from clu import metrics

rewards = jnp.array([[0.0], [1.0], [2.0], [3.0]])
both = metrics.Collection.create(last=metrics.LastValue.from_output('reward'), average=metrics.Average.from_output('reward'))
found = {values.shape: {name: float(value) for name, value in both.single_from_model_output(reward=values).compute().items()}
         for values in (rewards, rewards[:, 0])}
print(f'clu {importlib.metadata.version("clu")}: shape -> means of 0, 1, 2, 3: {found}')
sys.exit(found != {(4, 1): {'last': 6.0, 'average': 1.5}, (4,): {'last': 1.5, 'average': 1.5}})
PYTHON
JAX_PLATFORMS=cpu env/bin/python column.py 2> errors || { tail -3 errors; exit 1; }
