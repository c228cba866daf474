#!/usr/bin/env bash
# rax 0.4.0 (jax 0.10.2, CPU): NDCG, average precision, reciprocal rank, precision and recall put items of equal score in
# the order of the array; random orders, which `key` asks for, are not the default, and no default averages over orders.
#
# Expected: what sklearn.metrics.ndcg_score gives, the mean over the orders of tied items, .640 for four equal scores of
# which one item is relevant, wherever it stands. Seen: 1 for each of the five measures where the relevant item stands
# first; where it stands last .431 (NDCG), .25, .25, 0 and 0 (at 1).
# Who is hurt: whoever ranks responses of preference data, which stand best first in nearly every data set, with scores
# in bfloat16 or of a model that collapsed: equal scores count as right, and a constant is a perfect reward model.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check rax==0.4.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 scikit-learn==1.7.2
cat > ties.py <<'PYTHON'
import importlib.metadata
import sys

import jax.numpy as jnp
import numpy as np
import rax
import sklearn.metrics

scores = jnp.zeros(4)
places = {'first': jnp.array([1.0, 0, 0, 0]), 'last': jnp.array([0, 0, 0, 1.0])}
measures = {'ndcg': {}, 'ap': {}, 'mrr': {}, 'precision': {'topn': 1}, 'recall': {'topn': 1}}
found = {place: [round(float(getattr(rax, f'{name}_metric')(scores, labels, **settings)), 3)
                 for name, settings in measures.items()] for place, labels in places.items()}
mean = {place: round(float(sklearn.metrics.ndcg_score(np.asarray(labels)[None], np.asarray(scores)[None])), 3)
        for place, labels in places.items()}
print(f'rax {importlib.metadata.version("rax")}: {", ".join(measures)} of equal scores, by the place of the relevant item: '
      f'{found}; NDCG by sklearn: {mean}')
sys.exit(found != {'first': [1.0] * 5, 'last': [0.431, 0.25, 0.25, 0.0, 0.0]} or mean != {'first': 0.64, 'last': 0.64})
PYTHON
JAX_PLATFORMS=cpu env/bin/python ties.py 2> errors || { tail -3 errors; exit 1; }
