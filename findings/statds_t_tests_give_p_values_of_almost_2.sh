#!/usr/bin/env bash
# statds 1.1.7 (numpy 2.3.5), `t_test_paired` and `t_test_unpaired`: twice the upper tail is called the p-value, without the
# absolute value of the statistic, and the verdict asks whether the statistic exceeds the critical value of a one-sided test.
# The docstrings say "higher absolute value" and "no difference between means".
#
# Expected: p-values from 0 to 1, and the same for both orders of the columns. Seen, for 30 draws of N(0, 1) beside 30 of
# N(.5, 1): paired t = -2.19, p = 1.963 and "Fail to Reject", with the columns swapped .037 and "Reject"; unpaired 1.978 and .022.
# By scipy.stats .037 and .022 in both orders. Pairs with t = 1.8 have p = .082 and "Reject H0 with alpha = 0.05".
# Who is hurt: whoever compares two systems with it: with the better one second no difference is found, and with the better one
# first chance is called a difference twice as often as by a two-sided test.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check statds==1.1.7 numpy==2.3.5 scipy==1.16.3 pandas==2.3.3
cat > order.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import pandas as pd
import scipy.stats
from statds import parametrics

rng = np.random.default_rng(1)
low, high = rng.normal(size=30), rng.normal(0.5, 1, 30)
both = pd.DataFrame({'low': low, 'high': high})
noise = np.resize([-1.0, 1.0], 30)
slight = pd.DataFrame({'a': 1.8 * noise.std(ddof=1) / 30 ** 0.5 + noise, 'b': np.zeros(30)})
found = {}
for name, test, exact, data in (('paired', parametrics.t_test_paired, scipy.stats.ttest_rel, both),
                                ('unpaired', parametrics.t_test_unpaired, scipy.stats.ttest_ind, both),
                                ('slight', parametrics.t_test_paired, scipy.stats.ttest_rel, slight)):
    for columns in (list(data), list(data)[::-1]):
        statistic, p_value, _, verdict = test(data[columns])
        found[name, columns[0]] = [round(float(x), 3) for x in (statistic, p_value, exact(*data[columns].to_numpy().T).pvalue)
                                   ] + [verdict.split(' H0')[0]]
print(f'statds {importlib.metadata.version("statds")}: (test, first column) -> t, its p-value, by scipy.stats, verdict: {found}')
sys.exit(found != {('paired', 'low'): [-2.19, 1.963, 0.037, 'Fail to Reject'], ('paired', 'high'): [2.19, 0.037, 0.037, 'Reject'],
                   ('unpaired', 'low'): [-2.358, 1.978, 0.022, 'Fail to Reject'],
                   ('unpaired', 'high'): [2.358, 0.022, 0.022, 'Reject'],
                   ('slight', 'a'): [1.8, 0.082, 0.082, 'Reject'], ('slight', 'b'): [-1.8, 1.918, 0.082, 'Fail to Reject']})
PYTHON
MPLBACKEND=agg env/bin/python order.py 2> errors || { tail -3 errors; exit 1; }
