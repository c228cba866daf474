#!/usr/bin/env bash
# skpro 2.16.0 (numpy 2.3.5, pandas 2.3.3), `QPD_Johnson`, a distribution through three quantiles, without bounds, its default:
# the density is the slope of its cdf divided by the base distribution's quantile at 1 - alpha, and with a symmetric triplet
# the cdf does not meet the outer quantiles. The class names both exact. With bounds neither occurs.
#
# Expected: a density that integrates to 1, and a cdf of alpha, .5 and 1 - alpha at the three quantiles. Seen, for quantiles .2,
# .4 and .8 of alpha .2: an integral of 1.188, which is 1 / .8416, and .721 with base 'logistic'; .780 for alpha .1, .608 for
# alpha .05. For .2, .5 and .8 a cdf of .229, .5 and .771; there numpy warns of a division by zero.
# Who is hurt: whoever fits or compares by log loss what quantile heads predict: it moves by log(1.188 / .608), .67 nats, with the
# alpha of the quantiles alone, and quantiles of a symmetric prediction are not those given.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check skpro==2.16.0 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3 scikit-learn==1.7.2
cat > triplets.py <<'PYTHON'
import importlib.metadata
import sys

import scipy.integrate
import scipy.stats
from skpro.distributions import QPD_Johnson


def johnson(alpha, low, median, high, **others):
    return QPD_Johnson(alpha=alpha, qv_low=low, qv_median=median, qv_high=high, **others)


def mass(distribution, start=-60, end=60):
    """Integral of the density and difference of the cdf, which is to be the same."""
    integral = scipy.integrate.quad(lambda x: float(distribution.pdf(x)), start, end, points=[0.2, 0.4, 0.8], limit=400)[0]
    return round(integral, 3), round(float(distribution.cdf(end) - distribution.cdf(start)), 3)


skew = (0.2, 0.4, 0.8)
masses = {'alpha .2': mass(johnson(0.2, *skew)), 'logistic': mass(johnson(0.2, *skew, base_dist='logistic')),
          'alpha .1': mass(johnson(0.1, *skew)), 'alpha .05': mass(johnson(0.05, *skew)),
          'lower bound': mass(johnson(0.2, *skew, lower=0.05), 0.050001)}
levels = {triplet: [round(float(johnson(0.2, *triplet).cdf(x)), 3) for x in triplet] for triplet in (skew, (0.2, 0.5, 0.8))}
factor = round(1 / scipy.stats.norm.ppf(0.8), 3)
print(f'skpro {importlib.metadata.version("skpro")}: integral of the density, of the cdf\'s: {masses}; 1 / normal quantile at '
      f'.8: {factor}; cdf at the three quantiles: {levels}')
sys.exit(masses != {'alpha .2': (1.188, 1.0), 'logistic': (0.721, 1.0), 'alpha .1': (0.78, 1.0), 'alpha .05': (0.608, 1.0),
                    'lower bound': (1.0, 1.0)} or factor != 1.188
         or levels != {skew: [0.2, 0.5, 0.8], (0.2, 0.5, 0.8): [0.229, 0.5, 0.771]})
PYTHON
env/bin/python triplets.py 2> errors || { tail -3 errors; exit 1; }
