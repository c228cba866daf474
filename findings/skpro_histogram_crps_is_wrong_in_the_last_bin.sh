#!/usr/bin/env bash
# skpro 2.16.0 (numpy 2.3.5, pandas 2.3.3), CRPS of a `Histogram`, which predicts a distribution by bins. Its docstring has it as
# E|X - y| - E|X - X'| / 2. For an outcome in the last bin the first term leaves out all that lies above the outcome, and
# does not count right what lies below it in the bin; for all outcomes the second takes two values of one bin for equal.
#
# Expected: the integral of (F(x) - 1(x >= y))^2. Seen, for two bins of mass .5 on [0, 2]: CRPS .375 at y = .5 and .625 at
# y = 1.5, where .292 is right for both, and 0, that of a sure and right prediction, at y = 1 (.167). For outcomes spread evenly
# over [0, 2] its mean is smallest with mass .6 in the first bin, not .5, and .527, not .333.
# Who is hurt: whoever trains or compares predictions by bins by it: outcomes at the upper end, the best rewards, seem predicted
# worse than others, and a wrong distribution wins against the right one.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check skpro==2.16.0 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3 scikit-learn==1.7.2
cat > bins.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import pandas as pd
from skpro.distributions import Histogram
from skpro.metrics import CRPS

EDGES = [0, 1, 2]


def its(first, outcomes):
    y = pd.DataFrame({'y': outcomes})
    rows = [[np.array(EDGES)]] * len(y), [[np.array([first, 1 - first])]] * len(y)
    return float(CRPS()(y, Histogram(*rows, index=y.index, columns=y.columns)))


def integral(first, outcomes):
    x = (np.arange(4000) + 0.5) / 2000
    levels = np.interp(x, EDGES, [0, first, 1])
    return float(np.mean([np.mean((levels - (x >= y)) ** 2) * 2 for y in outcomes]))


single = {y: [round(score(0.5, [y]), 3) for score in (its, integral)] for y in (0.5, 1.0, 1.5)}
even = (np.arange(100) + 0.5) / 50
masses = [round(0.05 * step, 2) for step in range(1, 20)]
best = {score.__name__: min((round(score(mass, even), 3), mass) for mass in masses) for score in (its, integral)}
print(f'skpro {importlib.metadata.version("skpro")}: outcome: CRPS by it, by the integral: {single}; smallest mean for outcomes '
      f'spread evenly, and the mass of the first bin that has it: {best}')
sys.exit(single != {0.5: [0.375, 0.292], 1.0: [0.0, 0.167], 1.5: [0.625, 0.292]}
         or best != {'its': (0.527, 0.6), 'integral': (0.333, 0.5)})
PYTHON
env/bin/python bins.py 2> errors || { tail -3 errors; exit 1; }
