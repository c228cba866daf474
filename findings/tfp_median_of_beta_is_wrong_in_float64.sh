#!/usr/bin/env bash
# tensorflow-probability 0.25.0 (jax 0.4.35), `Beta.quantile` and `math.betaincinv` in float64, at the level .5: the search for
# the root is bracketed by 0 and .5, and stops before its first step where the level, not the value, equals the end of the
# bracket. What comes back is the first guess. So it is in tfp-nightly 0.26.0.dev20261027, from which numpyro 0.22.0 takes the
# quantiles of its Beta.
#
# Expected: the median, as the docstring says: x such that betainc(a, b, x) is y. Seen, for Beta(1 + wins, 1 + losses): .2134 for
# 0 wins of 3, where the CDF is .617, and the median .1591; .3187 for 1 of 4 instead of .3138; .6755 for 7 of 10 instead of .6762.
# At the levels .4999999, .025 and .975, and in float32 at all four, the values are right. `PERT(0, .1, 1, 8)`: .1633, .1584 at
# .4999999.
# Who is hurt: whoever takes the posterior median of a win rate, or of any share, with 64-bit numbers on for precision: it is off,
# most where data are few, and all quantiles around it look right.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check tensorflow-probability==0.25.0 jax==0.4.35 jaxlib==0.4.35 \
    numpy==2.3.5 scipy==1.16.3
cat > median.py <<'PYTHON'
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
from scipy import stats
from tensorflow_probability.substrates import jax as tfp

jax.config.update('jax_enable_x64', True)
found, others = {}, {}
for wins, losses in ((0, 3), (1, 3), (3, 1), (7, 3), (10, 10)):
    for kind in (jnp.float64, jnp.float32):
        beta = tfp.distributions.Beta(kind(1 + wins), kind(1 + losses))
        exact = [float(stats.beta(1 + wins, 1 + losses).ppf(level)) for level in (0.5, 0.4999999, 0.025, 0.975)]
        values = [float(beta.quantile(kind(level))) for level in (0.5, 0.4999999, 0.025, 0.975)]
        if kind is jnp.float64:
            found[wins, losses] = [round(values[0], 4), round(exact[0], 4), round(float(beta.cdf(values[0])), 4)]
            others[wins, losses] = max(abs(a - b) for a, b in zip(values[1:], exact[1:])) < 1e-6
        else:
            others[wins, losses] &= max(abs(a - b) for a, b in zip(values, exact)) < 1e-5
pert = tfp.distributions.PERT(*(jnp.float64(value) for value in (0, 0.1, 1, 8)))
found['PERT'] = [round(float(pert.quantile(jnp.float64(level))), 4) for level in (0.5, 0.4999999)]
print(f'tensorflow-probability {importlib.metadata.version("tensorflow-probability")}: wins, losses -> median, exact median, CDF '
      f'of the former: {found}; other levels and float32 are right: {others}')
sys.exit(found != {(0, 3): [0.2134, 0.1591, 0.6171], (1, 3): [0.3187, 0.3138, 0.5099], (3, 1): [0.6813, 0.6862, 0.4901],
                   (7, 3): [0.6755, 0.6762, 0.4981], (10, 10): [0.5, 0.5, 0.5], 'PERT': [0.1633, 0.1584]}
         or not all(others.values()))
PYTHON
env/bin/python median.py 2> errors || { tail -3 errors; exit 1; }
