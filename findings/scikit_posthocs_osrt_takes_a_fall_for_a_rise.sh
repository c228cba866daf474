#!/usr/bin/env bash
# scikit-posthocs 0.17.1, `test_osrt`: of each difference between a later and an earlier group it takes the absolute value, and
# then the largest. The docstring names Hayter's one-sided test against an ordered alternative, for which only rises count, and
# says that p-values come from the Tukey distribution, not that falls count too; what is computed is Tukey's test of all pairs.
#
# Expected: a small p-value where the means rise with the order of the groups, one near 1 where they fall. Seen, for four groups
# of 10 with means 0, .5, 1 and 1.5: .00047 in this order and .00047 in the reverse one, the smallest p-value of Tukey's test by
# scipy 1.16.3; .00025 and .94 from 20,000 simulations of the one-sided statistic.
# Who is hurt: whoever asks whether quality rises with data, model size or best-of-n: a fall is taken for a proof of the rise,
# and a rise is found less often than by the test that was asked for.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check scikit-posthocs==0.17.1 numpy==2.3.5 scipy==1.16.3 pandas==2.3.3 \
    statsmodels==0.14.5
cat > ordered.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import scikit_posthocs
from scipy.stats import tukey_hsd

rng = np.random.default_rng(0)
rising = [rng.normal(mean, 1, 10) for mean in (0, 0.5, 1, 1.5)]
null = rng.normal(size=(20000, 4, 10))


def statistic(groups):
    means, sigma = groups.mean(-1), np.sqrt(groups.var(-1, ddof=1).mean(-1))
    return np.max([means[..., j] - means[..., i] for j in range(4) for i in range(j)], 0) / sigma * np.sqrt(10)


found = {}
for name, groups in (('rise', rising), ('fall', rising[::-1])):
    one_sided = np.mean(statistic(null) >= statistic(np.array(groups)))
    found[name] = [float(f'{p:.2g}') for p in (scikit_posthocs.test_osrt([list(g) for g in groups])[0],
                                               tukey_hsd(*groups).pvalue.min(), one_sided)]
print(f'scikit-posthocs {importlib.metadata.version("scikit-posthocs")}: means -> p of test_osrt, the smallest of Tukey\'s test '
      f'by scipy, the one-sided p of 20,000 simulations: {found}')
sys.exit(found != {'rise': [0.00047, 0.00047, 0.00025], 'fall': [0.00047, 0.00047, 0.94]})
PYTHON
env/bin/python ordered.py 2> errors || { tail -3 errors; exit 1; }
