#!/usr/bin/env bash
# skpro 2.16.0 (numpy 2.3.5, pandas 2.3.3), `Hurdle(p, distribution)`, which is 0 with probability 1 - p: the part of `var` that
# comes from the choice between 0 and the rest has the mean m of the positive values where its square belongs, p (1 - p) m for
# p (1 - p) m^2. The class names the variance among what it has exactly; mean, pmf and samples are right. The warnings are of
# moments of the truncated base by a grid of 1000 nodes, which are near enough.
#
# Expected, for p = .3 and a negative binomial base with mean 1 and alpha 1: 1.44; seen: .99. For Poisson bases with means of
# 2 and 20: 1.6 and 90, seen .96 and 10.1, and for a normal base N(50, 5^2) 532.5, seen 17.9. Samples agree with the former.
# In a unit a tenth as large, N(500, 50^2), the variance is 846, not 100 times but 47 times as large.
# Who is hurt: whoever makes an interval or a z-score of a predicted hurdle distribution, of demand or of ratings with many
# zeros: for N(50, 5^2) the standard deviation is 4.2 where 23.1 is right.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check skpro==2.16.0 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3 scikit-learn==1.7.2
cat > hurdle.py <<'PYTHON'
import importlib.metadata
import sys
import warnings

import numpy as np
from skpro.distributions import Hurdle, NegativeBinomial, Normal, Poisson

warnings.simplefilter('ignore')
p = 0.3
bases = {'negative binomial': NegativeBinomial(mu=1.0, alpha=1.0), 'Poisson 2': Poisson(2.0), 'Poisson 20': Poisson(20.0),
         'normal': Normal(50.0, 5.0), 'normal, unit a tenth': Normal(500.0, 50.0)}
found, exact, close = {}, {}, True
for name, base in bases.items():
    hurdle = Hurdle(p, base)
    if 'normal' in name:  # so far from 0 that the part below it does not count
        m, v = base.mean(), base.var()
        right = p * v + p * (1 - p) * m**2
    else:
        k = np.arange(80.0)
        pmf = np.array([float(hurdle.pmf(x)) for x in k])
        right = pmf @ k**2 - (pmf @ k) ** 2
    np.random.seed(0)
    drawn = np.var(np.asarray(hurdle.sample(20000), float))
    found[name], exact[name] = round(float(hurdle.var()), 2), round(float(right), 2)
    close &= abs(drawn / right - 1) < 0.05
    print(f'skpro {importlib.metadata.version("skpro")}, {name}: var {found[name]}, right {exact[name]}, of samples {drawn:.2f}')
sys.exit(not (close and 'var' in Hurdle._tags['capabilities:exact'] and list(exact.values()) == [1.44, 1.6, 90, 532.5, 53250]
              and np.allclose(list(found.values()), [0.99, 0.96, 10.13, 17.91, 846], rtol=0.01)))
PYTHON
env/bin/python hurdle.py 2> errors || { tail -3 errors; exit 1; }
