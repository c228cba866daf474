#!/usr/bin/env bash
# cohens-d 0.1.5 (numpy 2.3.5), `cohensd_2ind`: the variance of the second group is divided by n - 2 (`ddof=2`), that of the
# first by n - 1. `cohensd_2ind_from_stats` of the same package pools both with n - 1, as Cohen's d does.
#
# Expected: one effect size, whichever group comes first, and the same from the data and from their means and deviations. Seen,
# for groups of 3, 5 and 20 with deviations in the ratio 1 to 2: .943, .711 and .209; with the groups swapped 1.155, .775 and
# .213; from means and deviations, and by hand, 1.265, .8 and .214.
# Who is hurt: whoever reports the effect of few runs: it is too small, by a factor that depends on which system is named first.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check cohens-d==0.1.5 numpy==2.3.5 scipy==1.16.3
cat > groups.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from cohens_d import cohensd_2ind, cohensd_2ind_from_stats

found = {}
for size in (3, 5, 20):
    steps = np.arange(size) - (size - 1) / 2
    first, second = steps, 2 + 2 * steps
    pooled = np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2)
    found[size] = [round(float(d), 3) for d in (
        cohensd_2ind(first, second), cohensd_2ind(second, first), cohensd_2ind_from_stats(
            first.mean(), second.mean(), first.std(ddof=1), second.std(ddof=1), size, size), 2 / pooled)]
print(f'cohens-d {importlib.metadata.version("cohens-d")}: size of the groups -> d, d of the groups swapped, d from their means '
      f'and deviations, and by hand: {found}')
sys.exit(found != {3: [0.943, 1.155, 1.265, 1.265], 5: [0.711, 0.775, 0.8, 0.8], 20: [0.209, 0.213, 0.214, 0.214]})
PYTHON
env/bin/python groups.py 2> errors || { tail -3 errors; exit 1; }
