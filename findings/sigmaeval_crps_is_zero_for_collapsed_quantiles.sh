#!/usr/bin/env bash
# sigmaeval 0.1.0 (numpy 2.3.5), `crps_quantile`: the integral ends at the first and at the last predicted quantile, so that it
# does not matter how far outside of them the observation lies, and where all quantiles are one there is nothing to add up.
# Its docstring calls the score proper, and 0 that of a perfect forecast.
#
# Expected: a score that grows with the distance and that the true distribution minimises, as twice the mean pinball loss, which
# is the CRPS in the limit of many levels. Seen, for 1,000 draws of N(0, 1) and nine levels, without normalization: quantiles of
# the truth .468, with a tenth of their spread .076, all of them 0: 0, all of them 100: 0; by twice the pinball loss .601,
# .74, .777 and 100.048. Quantiles of the truth get .936 at an observation of 1.3, of 10 and of 1,000.
# Who is hurt: whoever compares or stops models by it: the less spread, the better, wherever the forecast lies.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check sigmaeval==0.1.0 numpy==2.3.5 scipy==1.16.3
cat > collapsed.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import scipy.stats
from sigmaeval.sigmaeval import crps_quantile

levels = np.arange(1, 10) / 10
observed = np.random.default_rng(0).normal(size=1000)
forecasts = {'truth': scipy.stats.norm.ppf(levels), 'tenth': scipy.stats.norm.ppf(levels) / 10, 'zero': np.zeros(9),
             'hundred': np.full(9, 100.0)}


def pinball(quantiles):
    over = observed - quantiles[:, None]
    return 2 * np.maximum(levels[:, None] * over, (levels[:, None] - 1) * over).mean()


found = {}
for name, quantiles in forecasts.items():
    its = crps_quantile(np.tile(quantiles[:, None], 1000), levels, observed, normalization=False)
    found[name] = round(float(its), 3), round(float(pinball(quantiles)), 3)
far = {y: round(float(crps_quantile(forecasts['truth'][:, None], levels, np.array([y]), normalization=False)), 3)
       for y in (1.3, 10.0, 1000.0)}
print(f'sigmaeval {importlib.metadata.version("sigmaeval")}: forecast -> its CRPS, twice the mean pinball loss: {found}; '
      f'the truth at an observation of {far}')
sys.exit(found != {'truth': (0.468, 0.601), 'tenth': (0.076, 0.74), 'zero': (0.0, 0.777), 'hundred': (0.0, 100.048)}
         or far != {1.3: 0.936, 10.0: 0.936, 1000.0: 0.936})
PYTHON
env/bin/python collapsed.py 2> errors || { tail -3 errors; exit 1; }
