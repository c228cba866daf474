#!/usr/bin/env bash
# skpro 2.16.0 (numpy 2.3.5, pandas 2.3.3), `Mixture` of distributions of a single value: `mean`, `cdf`, `pdf` and `ppf` take all
# components for equally likely, whatever `weights` says. `sample` keeps to the weights, and so does the same mixture as a
# table; one cell of that by `iat` does not. The class names mean, variance, pdf and cdf among what it has exactly.
#
# Expected, of N(0, 1) with weight .3 and N(3, 2) with weight .7: mean 2.1, P(x <= 1) .3635 and median 1.934. Seen: 1.5, .5 and
# 1, those of equal weights; as a table with one cell 2.1, .3635 and 1.934, but 1.5 for `iat[0, 0]` of it. The mean of 20,000
# samples of the first is 2.1. With weights .99 and .01 the mean is 1.5 too, for .03.
# Who is hurt: whoever scores or quotes a predicted mixture, of rewards or of forecasts: log losses, intervals and means are
# those of another distribution than the one that samples show.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check skpro==2.16.0 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3 scikit-learn==1.7.2
cat > weights.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import scipy.optimize
import scipy.stats
from skpro.distributions import Mixture, Normal

weights = [0.3, 0.7]
single = Mixture([Normal(0, 1), Normal(3, 2)], weights=weights)
table = Mixture([Normal([[0]], [[1]]), Normal([[3]], [[2]])], weights=weights)


def exact(x):
    return float(np.dot(weights, scipy.stats.norm([0, 3], [1, 2]).cdf(x)))


def numbers(mixture):
    values = (mixture.mean(), mixture.cdf(np.array([[1.0]]) if mixture is table else 1.0), mixture.ppf(0.5))
    return [round(float(np.squeeze(np.asarray(value))), 4) for value in values]


np.random.seed(0)
right = [2.1, round(exact(1), 4), round(scipy.optimize.brentq(lambda x: exact(x) - 0.5, -9, 9), 4)]
found = {'one value': numbers(single), 'one cell': numbers(table), 'closed form': right}
cell = float(table.iat[0, 0].mean())
drawn = round(float(np.mean(np.asarray(single.sample(20000), float))), 1)
rare = float(Mixture([Normal(0, 1), Normal(3, 2)], weights=[0.99, 0.01]).mean())
print(f'skpro {importlib.metadata.version("skpro")}: mean, P(x <= 1), median: {found}; mean of the cell by iat {cell}, '
      f'of samples {drawn}, with weights .99 and .01 {rare}')
sys.exit(not (found['one value'] == [1.5, 0.5, 1.0] and found['one cell'] == right == [2.1, 0.3635, 1.9344]
              and [cell, drawn, rare] == [1.5, 2.1, 1.5]))
PYTHON
env/bin/python weights.py 2> errors || { tail -3 errors; exit 1; }
