#!/usr/bin/env bash
# jax-metrics 0.2.5 (jax 0.10.2, CPU), `metrics.Accuracy` with average='weighted' or 'none': both are taken for 'macro' when the
# metric is made. The docstring says that 'weighted' weights each class by its support, and that 'none' returns a value for
# each class.
#
# Expected: by the docstring, for 80 of 100 answers of class 0, 15 of 1 and 5 of 2, of which 76, 6 and 0 are right, .82 with
# 'weighted', as much as with 'micro', and .95, .4 and 0 with 'none'. Seen: .45 with 'weighted', with 'none' and with 'macro',
# which is the mean of the three.
# Who is hurt: whoever logs the accuracy of a judge or of a preference model with rare classes, such as ties: the rare ones count
# as much as the others, and the classes cannot be told apart.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check jax-metrics==0.2.5 simple-pytree==0.2.2 jax==0.10.2 jaxlib==0.10.2 \
    numpy==2.3.5 scipy==1.16.3
cat > accuracy.py <<'PYTHON'
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax_metrics import metrics

target = np.repeat([0, 1, 2], [80, 15, 5])
answer = np.repeat([0, 1, 1, 0, 0], [76, 4, 6, 9, 5])
found = {}
for average in ('micro', 'macro', 'weighted', 'none'):
    metric = metrics.Accuracy(num_classes=3, average=average)
    metric = metric.update(target=jnp.array(target), preds=jax.nn.one_hot(answer, 3))
    found[average] = np.asarray(metric.compute(), dtype=float).round(3).tolist()
right = [round(float(np.mean(answer[target == label] == label)), 3) for label in range(3)]
support = np.bincount(target)
exact = [round(float(np.average(right, weights=weights)), 3) for weights in (support, None)]
print(f'jax-metrics {importlib.metadata.version("jax-metrics")}: average -> accuracy: {found}; of each class: {right}, '
      f'weighted by support and with equal weights: {exact}')
sys.exit(exact != [0.82, 0.45] or right != [0.95, 0.4, 0.0]
         or found != {'micro': 0.82, 'macro': 0.45, 'weighted': 0.45, 'none': 0.45})
PYTHON
JAX_PLATFORMS=cpu env/bin/python accuracy.py 2> errors || { tail -3 errors; exit 1; }
