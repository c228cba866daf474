#!/usr/bin/env bash
# crowd-kit 1.4.2 (numpy 2.3.5), `BradleyTerry`: with any tolerance above 0, the default of 1e-5 too, the fit ends after two
# iterations, whatever `n_iter` says: the distance to the scores before is taken to the same array, and is 0.
#
# Expected: the maximum likelihood. Seen, for ten systems in a chain, of which each beat the one before 30 times of 40: its
# estimates are ln 3 apart, 9.89 from the first to the last; with n_iter=100000 and tol=1e-5 the logarithms of the scores are
# 0, .83, .98 (six times), 1.09, 1.61. With tol=0 they are right.
# Who is hurt: whoever ranks models or responses of human comparisons by it: those that met few of the others come out
# nearly or exactly equal, as far apart as they are, and more iterations or a smaller tolerance change nothing.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check crowd-kit==1.4.2 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3
cat > chain.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import pandas as pd
from crowdkit.aggregation import BradleyTerry

names = 'abcdefghij'
rows = [('worker', below, above, won) for below, above in zip(names, names[1:]) for won in above * 30 + below * 10]
data = pd.DataFrame(rows, columns=['worker', 'left', 'right', 'label'])
found = {}
for iterations, tolerance in ((2, 1e-5), (100_000, 1e-5), (100_000, 1e-300), (100_000, 0.0)):
    scores = np.log(BradleyTerry(n_iter=iterations, tol=tolerance).fit_predict(data)[list(names)].to_numpy())
    found[iterations, tolerance] = (scores - scores[0]).round(2).tolist()
print(f'crowd-kit {importlib.metadata.version("crowd-kit")}: (iterations, tolerance) -> logarithms of the scores: {found}')
exact = (np.arange(10) * np.log(3)).round(2).tolist()
two = [0.0, 0.83, 0.98, 0.98, 0.98, 0.98, 0.98, 0.98, 1.09, 1.61]
sys.exit(list(found.values()) != [two, two, two, exact])
PYTHON
env/bin/python chain.py 2> errors || { tail -3 errors; exit 1; }
