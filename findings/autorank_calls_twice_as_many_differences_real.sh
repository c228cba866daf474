#!/usr/bin/env bash
# autorank 1.3.0 (numpy 2.3.5, scipy 1.16.3), `autorank` of two columns that are not normal: it looks which one has the higher
# median, and then asks by a one-sided test whether this one is greater, with `alpha` as it is. The docstring says "Wilcoxon's
# signed rank test" and that results together fulfill the confidence level; only verbose=True prints "one-sided". For normal
# columns the test is two-sided.
#
# Expected: a difference called real in 5 % of the cases in which there is none, at the default alpha of .05. Seen, for 600 pairs
# of columns with 30 exponential draws each, of which 596 are found not normal: 9.6 % by autorank, 4.7 % by scipy.stats.wilcoxon.
# In 79.7 % of the cases its p-value is half of that of scipy; swapping the columns changes none, as the side is chosen anew.
# Who is hurt: whoever compares two systems with it by scores that are skewed or bounded, as accuracies and rewards are: chance
# gets a winner twice as often as alpha says.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check autorank==1.3.0 baycomp==1.0.3 numpy==2.3.5 scipy==1.16.3 pandas==2.3.3 \
    statsmodels==0.14.6 matplotlib==3.10.7
cat > chance.py <<'PYTHON'
import contextlib
import importlib.metadata
import sys

import numpy as np
import pandas as pd
import scipy.stats
from autorank import autorank

rng = np.random.default_rng(0)
its, swapped, exact = [], [], []
for _ in range(600):
    scores = pd.DataFrame(rng.exponential(size=(30, 2)), columns=['a', 'b'])
    with contextlib.redirect_stdout(sys.stderr):
        results = [autorank(scores[list(order)]) for order in ('ab', 'ba')]
    if results[0].omnibus == 'wilcoxon':
        its.append(results[0].pvalue)
        swapped.append(results[1].pvalue)
        exact.append(scipy.stats.wilcoxon(scores.a, scores.b).pvalue)
its, swapped, exact = map(np.array, (its, swapped, exact))
found = [len(its), *(round(float(np.mean(share)), 3) for share in (its < 0.05, exact < 0.05, np.isclose(its, exact / 2),
                                                                  np.isclose(its, swapped)))]
print(f'autorank {importlib.metadata.version("autorank")}: tests of equal distributions; share below .05 by it, by '
      f'scipy.stats.wilcoxon, with half the p-value of that, the same if swapped: {found}')
sys.exit(found != [596, 0.096, 0.047, 0.797, 1.0])
PYTHON
MPLBACKEND=agg env/bin/python chance.py 2> errors || { tail -3 errors; exit 1; }
