#!/usr/bin/env bash
# uncertainty-calibration 0.1.4 (numpy 2.3.5), `get_calibration_error_uncertainties`: alpha, .1 by default, goes to a bootstrap of
# 100 samples that reads it in percent. The docstring promises a 1 - alpha interval, and what comes is one of 99.9 %, from
# about the smallest to about the largest of the samples.
#
# Expected: 90 % by default, 50 % with alpha=.5. Seen, for 500 answers and p=1: [.048, .156] by default, .108 wide, and .1 wide
# with alpha=.5, where alpha=10 and alpha=50 give the intervals of 90 and 50 %, .055 and .022 wide.
# Who is hurt: whoever compares the calibration of reward models or judges by these intervals, which the README shows: they are
# twice as wide as they should be, overlap where they should not, and another alpha below 1 changes little.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check uncertainty-calibration==0.1.4 numpy==2.3.5 scikit-learn==1.7.2
cat > percent.py <<'PYTHON'
import importlib.metadata
import sys

import calibration
import numpy as np

rng = np.random.default_rng(0)
confidence = rng.random(500)
right = (rng.random(500) < confidence ** 1.5).astype(int)
found = {}
for alpha in (None, 0.5, 10, 50):
    np.random.seed(0)
    settings = {} if alpha is None else {'alpha': alpha}
    low, _, high = calibration.get_calibration_error_uncertainties(confidence, right, p=1, **settings)
    found[alpha] = [round(float(x), 3) for x in (low, high, high - low)]
print(f'uncertainty-calibration {importlib.metadata.version("uncertainty-calibration")}: alpha -> interval of the calibration '
      f'error, its width: {found}')
sys.exit(found != {None: [0.048, 0.156, 0.108], 0.5: [0.053, 0.153, 0.1], 10: [0.078, 0.132, 0.055], 50: [0.096, 0.118, 0.022]})
PYTHON
env/bin/python percent.py 2> errors || { tail -3 errors; exit 1; }
