#!/usr/bin/env bash
# ordinalcorr 0.9.0 (numpy 2.3.5, pandas 2.3.3), `hetcor`: a column of ordered categories is accepted as ordinal, as the docstring
# says, and then sorted by the names of its categories; the order that it declares is not used.
#
# Expected: the correlation of the declared order, the same whatever the categories are called. Seen, for 2,000 draws with a
# correlation of .6, one side cut into low < medium < high: -.174 with the score, and -.347 with the same column as
# codes 0, 1, 2; with the categories called '1 low', '2 medium', '3 high' .597 and 1, and by the codes .597.
# Who is hurt: whoever correlates rewards with ratings in words, such as bad < good < great or low < medium < high: the sign may
# be the wrong one, and no warning is given.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check ordinalcorr==0.9.0 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3
cat > ordered.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import ordinalcorr
import pandas as pd

rng = np.random.default_rng(0)
score, hidden = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 2000).T
codes = np.digitize(hidden, [-0.5, 0.8])
found = {}
for names in (['low', 'medium', 'high'], ['1 low', '2 medium', '3 high']):
    ordered = pd.Categorical.from_codes(codes, names, ordered=True)
    table = ordinalcorr.hetcor(pd.DataFrame({'score': score, 'codes': codes, 'ordered': ordered}))
    found[names[0]] = table['ordered'].round(3).to_dict()
    as_codes = round(float(table.loc['score', 'codes']), 3)
print(f'ordinalcorr {importlib.metadata.version("ordinalcorr")}: correlation of ordered categories, by their first name, with '
      f'others: {found}; score with codes: {as_codes}')
sys.exit(found != {'low': {'score': -0.174, 'codes': -0.347, 'ordered': 1.0},
                   '1 low': {'score': 0.597, 'codes': 1.0, 'ordered': 1.0}} or as_codes != 0.597)
PYTHON
env/bin/python ordered.py 2> errors || { tail -3 errors; exit 1; }
