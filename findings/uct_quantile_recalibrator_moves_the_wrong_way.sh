#!/usr/bin/env bash
# uncertainty-toolbox 0.1.1 (numpy 2.3.5), proportions of type 'quantile' and the `get_quantile_recalibrator` that is fitted to
# them: shares are counted of prediction less truth, where that of the data below a quantile needs truth less prediction.
# Docstrings speak of the share of the data below the predicted quantile.
#
# Expected: a recalibrated quantile that lies nearer to that of the data. Seen, for 2,000 draws of N(-1, 1) and the forecast
# N(0, 1) for each: the quantiles at .1, .5, .9, -1.28, 0 and 1.28, become -.26, 1.03 and 2.28, where the data have -2.28, -1.03
# and .27; below the recalibrated ones lie .773, .983 and all of the data. By `get_proportion_under_quantile` .009, .155
# and .596 of the data lie below those of the forecast, by counting .405, .845 and .991.
# Who is hurt: whoever recalibrates a reward model with uncertainty that scores too high or too low on the whole: the error
# doubles. Forecasts that are only too wide or too narrow are the same in the mirror.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check uncertainty-toolbox==0.1.1 numpy==2.3.5 scipy==1.16.3 scikit-learn==1.7.2
cat > recalibrated.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import scipy.stats
from uncertainty_toolbox import metrics_calibration, recalibration

rng = np.random.default_rng(0)
mean, spread, truth = np.zeros(2000), np.ones(2000), rng.normal(-1, 1, 2000)
recalibrated = recalibration.get_quantile_recalibrator(mean, spread, truth)
found, below = {}, {}
for level in (0.1, 0.5, 0.9):
    its, forecast = float(recalibrated(mean[:1], spread[:1], level)[0]), float(scipy.stats.norm.ppf(level))
    found[level] = [round(x, 3) for x in (forecast, its, float(np.quantile(truth, level)), float((truth <= its).mean()))]
    share = metrics_calibration.get_proportion_under_quantile(mean, spread, truth, level)
    below[level] = round(share, 3), round(float((truth <= forecast).mean()), 3)
print(f'uncertainty-toolbox {importlib.metadata.version("uncertainty-toolbox")}: level -> quantile of the forecast, '
      f'recalibrated, of the data, share of the data below the recalibrated: {found}; level -> share of the data below the '
      f'quantile of the forecast by it, counted: {below}')
sys.exit(found != {0.1: [-1.282, -0.264, -2.282, 0.773], 0.5: [0.0, 1.031, -1.034, 0.983], 0.9: [1.282, 2.276, 0.268, 1.0]}
         or below != {0.1: (0.009, 0.405), 0.5: (0.155, 0.845), 0.9: (0.596, 0.991)})
PYTHON
env/bin/python recalibrated.py 2> errors || { tail -3 errors; exit 1; }
