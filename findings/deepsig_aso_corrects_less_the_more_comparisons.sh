#!/usr/bin/env bash
# deepsig 1.2.8 (numpy 2.3.5), `aso` with `num_comparisons` and `multi_aso`, which corrects by default: the confidence level for
# M comparisons is 1 less alpha, plus alpha / M, where Bonferroni, whom docstrings and README name, has 1 less alpha / M. The two
# agree for M = 2; for larger M the correction vanishes.
#
# Expected: the bound on the violation ratio grows with the number of comparisons. Seen, for two samples of 20 from N(.7, .2) and
# N(.5, .2): .062 for one comparison and .072, .068, .063, .062 for 2, 3, 10, 100, where confidence_level=1 - .05 / M gives
# .072, .078, .093, .116. For two models, which are one comparison, `multi_aso` works at level 1: both of its bounds are 1, so
# that neither can be better; with use_bonferroni=False they are .062 and 1.
# Who is hurt: whoever compares many models or data sets by it and takes the result for corrected, and whoever compares two.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check deepsig==1.2.8 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3
cat > comparisons.py <<'PYTHON'
import importlib.metadata
import sys

import deepsig
import numpy as np

rng = np.random.default_rng(0)
better, worse = rng.normal(0.7, 0.2, 20), rng.normal(0.5, 0.2, 20)
settings = {'seed': 1, 'show_progress': False, 'num_bootstrap_iterations': 200}
single = round(float(deepsig.aso(better, worse, **settings)), 3)
its, bonferroni = [], []
for count in (2, 3, 10, 100):
    its.append(round(float(deepsig.aso(better, worse, num_comparisons=count, **settings)), 3))
    bonferroni.append(round(float(deepsig.aso(better, worse, confidence_level=1 - 0.05 / count, **settings)), 3))
both = {flag: deepsig.multi_aso([list(better), list(worse)], use_bonferroni=flag, **settings).round(3).tolist()
        for flag in (True, False)}
print(f'deepsig {importlib.metadata.version("deepsig")}: one comparison {single}; num_comparisons 2, 3, 10, 100: {its}, '
      f'confidence_level 1 - .05 / that: {bonferroni}; multi_aso of two, by use_bonferroni: {both}')
sys.exit(single != 0.062 or its != [0.072, 0.068, 0.063, 0.062] or bonferroni != [0.072, 0.078, 0.093, 0.116]
         or both != {True: [[1.0, 1.0], [1.0, 1.0]], False: [[1.0, 0.062], [1.0, 1.0]]})
PYTHON
env/bin/python comparisons.py 2> errors || { tail -3 errors; exit 1; }
