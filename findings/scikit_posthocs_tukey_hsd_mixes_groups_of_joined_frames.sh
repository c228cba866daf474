#!/usr/bin/env bash
# scikit-posthocs 0.17.1 (pandas 2.3.3), `posthoc_tukey_hsd`: it takes the values of a group from a DataFrame by the labels of
# its index. Frames that were joined by `pandas.concat` have each label once per group, so each group gets the values of all.
# There is no error and no warning.
#
# Expected: the p-values of the same values under an index without repeats, of scipy 1.16.3 and of `posthoc_tukey`. Seen, for 10
# values each of three groups with means 0, 2 and 4: 1, 1 and 1; .00121, 9.04e-11 and 9.52e-07 by all of these.
# Who is hurt: whoever joins the scores of several runs or models and compares them: no difference is ever found.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check scikit-posthocs==0.17.1 numpy==2.3.5 scipy==1.16.3 pandas==2.3.3 \
    statsmodels==0.14.5
cat > joined.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import pandas as pd
import scikit_posthocs
from scipy.stats import tukey_hsd

rng = np.random.default_rng(0)
scores = [rng.normal(mean, 1, 10) for mean in (0, 2, 4)]
frames = [pd.DataFrame({'model': name, 'score': values}) for name, values in zip('abc', scores)]
joined = pd.concat(frames)


def shown(p_values):
    p_values = np.asarray(p_values)
    return [float(f'{p_values[i, j]:.3g}') for i, j in ((0, 1), (0, 2), (1, 2))]


found = [shown(p_values) for p_values in (
    scikit_posthocs.posthoc_tukey_hsd(joined, 'score', 'model'),
    scikit_posthocs.posthoc_tukey_hsd(joined.reset_index(drop=True), 'score', 'model'),
    scikit_posthocs.posthoc_tukey(joined, 'score', 'model'), tukey_hsd(*scores).pvalue)]
print(f'scikit-posthocs {importlib.metadata.version("scikit-posthocs")}: p-values of three pairs for joined frames, with a new '
      f'index, by posthoc_tukey, by scipy: {found}')
sys.exit(found != [[1, 1, 1]] + 3 * [[0.00121, 9.04e-11, 9.52e-07]])
PYTHON
env/bin/python joined.py 2> errors || { tail -3 errors; exit 1; }
