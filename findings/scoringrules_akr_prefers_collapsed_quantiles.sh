#!/usr/bin/env bash
# scoringrules 0.10.0 (numpy 2.3.5), `crps_ensemble(..., estimator='akr')`, which its docstring offers beside six others as
# an approximate estimate of the CRPS: it takes the distances between neighbours in the array for those between all
# members, so that the score depends on their order, which the docstring does not say. Quantiles come in order, and those
# distances are the smallest that there are.
#
# Expected: one number for one set of members, and a score that the true distribution minimises. Seen, for 2,000
# observations of N(0, 1) and its ten quantiles at the midpoints: .774 in ascending order, where 'nrg', 'qd' and 'int'
# have .568, and .508 with each row in a random order; 'akr_circperm' has .329 and .508. With half of their spread the
# quantiles are worse by those three, .616, and by 'akr' better than the truth, .719; without any they are .801 by all.
# Who is hurt: whoever scores quantiles by it, of rewards or anything else, which come in order: models that are too sure
# of themselves win.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check scoringrules==0.10.0 numpy==2.3.5 scipy==1.16.3
cat > order.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import scipy.stats
import scoringrules

rng = np.random.default_rng(0)
observed = rng.normal(size=2000)
quantiles = np.tile(scipy.stats.norm.ppf((np.arange(10) + 0.5) / 10), (2000, 1))
mixed = rng.permuted(quantiles, axis=1)


def score(members, estimator):
    return round(float(np.mean(scoringrules.crps_ensemble(observed, members, estimator=estimator))), 3)


found = {name: [score(quantiles * part, name) for part in (1, 0.75, 0.5, 0.25, 0)] + [score(mixed, name)]
         for name in ('nrg', 'qd', 'int', 'akr', 'akr_circperm')}
print(f'scoringrules {importlib.metadata.version("scoringrules")}: CRPS of ascending quantiles of the truth, with .75, '
      f'.5, .25 and none of their spread, and of those of the truth in random order: {found}')
exact = [0.568, 0.579, 0.616, 0.688, 0.801, 0.568]
sys.exit(found != {'nrg': exact, 'qd': exact, 'int': exact, 'akr': [0.774, 0.733, 0.719, 0.739, 0.801, 0.508],
                   'akr_circperm': [0.329, 0.4, 0.497, 0.628, 0.801, 0.508]})
PYTHON
env/bin/python order.py 2> errors || { tail -3 errors; exit 1; }
