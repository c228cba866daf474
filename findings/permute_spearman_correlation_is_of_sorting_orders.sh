#!/usr/bin/env bash
# permute 0.2 (numpy 2.3.5), `spearman_corr`: in place of ranks it takes `argsort`, the places at which the sorted values lie.
# These are ranks only for data that are in order, or whose order is its own inverse. The docstring names the Spearman
# correlation coefficient.
#
# Expected: the coefficient of the ranks, as by scipy 1.16.3. Seen, for 200 scores of two judges who agree but for noise of .3:
# -.051, p .763, instead of .951, p .001. It changes to .013, p .417, if the same pairs come in another order, and is .951 if they
# come sorted by one of the judges.
# Who is hurt: whoever compares judges, reward models or metrics by rank: agreement that is nearly perfect looks like none.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check permute==0.2 cryptorandom==0.3 numpy==2.3.5 scipy==1.16.3
cat > ranks.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from permute.core import corr, spearman_corr
from scipy.stats import rankdata, spearmanr

rng = np.random.default_rng(0)
first = rng.normal(size=200)
second = first + 0.3 * rng.normal(size=200)
other, ordered = rng.permutation(200), np.argsort(first)
found = {}
for name, x, y in (('as drawn', first, second), ('shuffled', first[other], second[other]),
                   ('sorted', first[ordered], second[ordered])):
    theirs, ranks = (method(*args, reps=999, seed=0) for method, args in (
        (spearman_corr, (x, y)), (corr, (rankdata(x), rankdata(y)))))
    found[name] = [round(float(v), 3) for v in (*theirs[:2], *ranks[:2], spearmanr(x, y).statistic)]
print(f'permute {importlib.metadata.version("permute")}: order of the pairs -> its coefficient and p; those of ranks; scipy: '
      f'{found}')
right = [0.951, 0.001, 0.951]
sys.exit(found != {'as drawn': [-0.051, 0.763] + right, 'shuffled': [0.013, 0.417] + right, 'sorted': [0.951, 0.001] + right})
PYTHON
env/bin/python ranks.py 2> errors || { tail -3 errors; exit 1; }
