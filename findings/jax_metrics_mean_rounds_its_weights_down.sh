#!/usr/bin/env bash
# jax-metrics 0.2.5 (jax 0.10.2, CPU), `metrics.Mean` with `sample_weight`: the sum of the weights is kept as a whole number,
# and is rounded down after each batch, while the sum of the weighted values is not. The docstring promises the weighted mean
# and does not say that weights must be whole.
#
# Expected: the sum of weight times value over the sum of the weights, which does not change if all weights are multiplied by
# one number. Seen, for the values 1, 2 and 3, whose mean is 2, with each weight 1, .9, .5, .4 and .3: 2, 2.7, 3, 2.4 and
# infinity. For 1 and 2 four times, each weight .7, where the mean is 1.5: 2.1 in four batches, 1.68 in one.
# Who is hurt: whoever weights examples by importance, by the confidence of raters or by shares that sum to 1: the mean is too
# far from 0, and depends on how the data was cut into batches.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check jax-metrics==0.2.5 simple-pytree==0.2.2 jax==0.10.2 jaxlib==0.10.2 \
    numpy==2.3.5 scipy==1.16.3
cat > weights.py <<'PYTHON'
import importlib.metadata
import sys

import jax.numpy as jnp
import numpy as np
from jax_metrics import metrics


def mean(*batches):
    metric = metrics.Mean()
    for values, weights in batches:
        metric = metric.update(values=jnp.array(values), sample_weight=jnp.array(weights))
    return round(float(metric.compute()), 2)


found = {weight: (mean(([1.0, 2.0, 3.0], [weight] * 3)), float(np.average([1, 2, 3], weights=[weight] * 3).round(2)))
         for weight in (1.0, 0.9, 0.5, 0.4, 0.3)}
batches = [mean(*[([1.0, 2.0], [0.7] * 2)] * 4), mean(([1.0, 2.0] * 4, [0.7] * 8)), mean(*[([1.0, 2.0], [1.0] * 2)] * 4)]
print(f'jax-metrics {importlib.metadata.version("jax-metrics")}: weight of each of 1, 2, 3 -> its mean, by numpy.average: '
      f'{found}; 1 and 2 four times with weights .7, in four batches and in one, and in four with weights 1: {batches}')
sys.exit(found != {1.0: (2.0, 2.0), 0.9: (2.7, 2.0), 0.5: (3.0, 2.0), 0.4: (2.4, 2.0), 0.3: (float('inf'), 2.0)}
         or batches != [2.1, 1.68, 1.5])
PYTHON
JAX_PLATFORMS=cpu env/bin/python weights.py 2> errors || { tail -3 errors; exit 1; }
