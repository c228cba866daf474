#!/usr/bin/env bash
# clu 0.0.12 (jax 0.10.2, CPU), `metrics.Average` merged over steps as the docstring of `Collection` shows, from the first update
# on: the total has the dtype of the values. In bfloat16 it soon is too large for one more step to change it, while the
# count goes on, and the mean falls towards 0. Started from `empty()` the total is float32. No docstring speaks of dtypes.
#
# Expected: the mean, or a warning. Seen, for a loss of exactly 1 in batches of 8: 1, .852 and .256 after 100, 300 and 1,000
# steps; from `empty()`, or with values in float32, 1 each time.
# Who is hurt: whoever evaluates a model in bfloat16 that way: losses and rewards go down with the
# length of the evaluation.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check clu==0.0.12 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.3.5
cat > decay.py <<'PYTHON'
import importlib.metadata
import sys

import jax.numpy as jnp
from clu import metrics

both = metrics.Collection.create(loss=metrics.Average.from_output('loss'))
found = {}
for dtype in (jnp.bfloat16, jnp.float32):
    for start in (None, both.empty()):
        total, seen = start, []
        for step in range(1, 1001):
            update = both.single_from_model_output(loss=jnp.ones(8, dtype))
            total = update if total is None else total.merge(update)
            if step in (100, 300, 1000):
                seen.append(round(float(total.compute()['loss']), 3))
        found[dtype.__name__, 'first update' if start is None else 'empty'] = seen
print(f'clu {importlib.metadata.version("clu")}: mean loss after 100, 300 and 1,000 steps of 1.0: {found}')
right = [1.0] * 3
sys.exit(list(found.values()) != [[1.0, 0.852, 0.256], right, right, right])
PYTHON
JAX_PLATFORMS=cpu env/bin/python decay.py 2> errors || { tail -3 errors; exit 1; }
