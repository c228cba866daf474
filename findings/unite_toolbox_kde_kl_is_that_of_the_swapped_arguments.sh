#!/usr/bin/env bash
# unite-toolbox 0.2.1 (numpy 2.3.5), `calc_kde_kld(p, q)` in its default mode: the mean of log p - log q is taken over the values
# of q in place of those of p, and then its absolute value, which estimates D(q||p). The README names D_KL(p||q), the docstring
# the divergence between p and q; `calc_knn_kld`, `calc_bin_kld` and `mode='integral'` estimate D(p||q).
#
# Expected: one direction for all of them. Seen, for 1,000 values each of p = N(0, 1) and q = N(0, 4), where D(p||q) = .32 and
# D(q||p) = .81: 1.38 for p, q and .4 for q, p; by neighbours .43 and .53; by bins .39 for p, q.
# Who is hurt: whoever measures how far a policy is from its reference: narrow and wide change places, and a model that covers
# too little is told from one that covers too much the wrong way round.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check unite-toolbox==0.2.1 numpy==2.3.5 scipy==1.16.3
cat > direction.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from unite_toolbox.bin_estimators import calc_bin_kld
from unite_toolbox.kde_estimators import calc_kde_kld
from unite_toolbox.knn_estimators import calc_knn_kld


def exact(first, second):
    return np.log(second / first) + first ** 2 / (2 * second ** 2) - 0.5


rng = np.random.default_rng(0)
narrow, wide = rng.normal(0, 1, (1000, 1)), rng.normal(0, 2, (1000, 1))
edges = [np.linspace(-8, 8, 33)]
found = {}
for name, p, q, sigmas in (('narrow, wide', narrow, wide, (1, 2)), ('wide, narrow', wide, narrow, (2, 1))):
    found[name] = [round(float(v), 2) for v in (calc_kde_kld(p, q), calc_knn_kld(p, q, k=5), exact(*sigmas))]
binned = round(float(calc_bin_kld(narrow, wide, edges)), 2)
print(f'unite-toolbox {importlib.metadata.version("unite-toolbox")}: p, q -> divergence by kernels, by neighbours, exact: '
      f'{found}; of narrow and wide by bins: {binned}')
sys.exit(found != {'narrow, wide': [1.38, 0.43, 0.32], 'wide, narrow': [0.4, 0.53, 0.81]} or binned != 0.39)
PYTHON
env/bin/python direction.py 2> errors || { tail -3 errors; exit 1; }
