#!/usr/bin/env bash
# foostrap 1.2.1 (numpy 2.3.5), `statistic='quantile'` with BCa, the default: the jackknife leaves the value itself out of the
# quantile and keeps only the step to the next one. For an even number of observations and the median, as wherever q (n - 2) is
# whole, it is 0 for all, the acceleration is 0 / 0, and the limits become those of all resamples, whatever `conf_lvl` is. There
# is no error; numpy prints a RuntimeWarning.
#
# Expected: about the interval of scipy 1.16.3, or that of `ci_method='percentile'`. Seen, for 100 normal values: a width of 1.09
# at 95 % and of 1.09 at 50 %, from the least to the largest of 10,000 medians; .56 by percentiles, .57 by scipy. For 101 values
# .57 and .12.
# Who is hurt: whoever reports the median of scores, latencies or lengths: for even numbers the interval is about twice as wide
# as it should be, grows with the number of resamples, and differences vanish in it.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check foostrap==1.2.1 numpy==2.3.5 scipy==1.16.3 numba==0.63.1
cat > median.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from foostrap import foostrap
from scipy.stats import bootstrap

data = np.random.default_rng(0).normal(size=101)
found, all_resamples = {}, []
for size in (100, 101):
    settings = {'statistic': 'quantile', 'random_state': 0, 'parallel': False}
    intervals = [foostrap(data[:size], conf_lvl=level, **settings) for level in (0.95, 0.5)]
    if size == 100:
        all_resamples = [result.ci == (result.boot_samples.min(), result.boot_samples.max()) for result in intervals]
    by_scipy = bootstrap((data[:size],), np.median, rng=np.random.default_rng(0)).confidence_interval
    percentile = foostrap(data[:size], ci_method='percentile', **settings).ci
    found[size] = [round(float(high - low), 2) for low, high in (*(r.ci for r in intervals), percentile, by_scipy)]
print(f'foostrap {importlib.metadata.version("foostrap")}: observations -> width of the interval of the median at 95 %, at 50 %, '
      f'by percentiles, by scipy: {found}; from the least to the largest resample: {all_resamples}')
sys.exit(found != {100: [1.09, 1.09, 0.56, 0.57], 101: [0.57, 0.12, 0.57, 0.57]} or all_resamples != [True, True])
PYTHON
env/bin/python median.py 2> errors || { tail -3 errors; exit 1; }
