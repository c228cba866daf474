#!/usr/bin/env bash
# reliabiliPy 0.0.36 (factor-analyzer 0.5.1), `reliability_analysis` of raw data: it takes absolute values of the correlations
# between the items before it computes alpha, lambdas and omegas. Neither docstring nor README says so, and of a correlation
# matrix that is handed over it takes none.
#
# Expected: a mean alpha near 0 for raters whose scores have nothing to do with one another, and the same for data as for their
# correlation matrix. Seen, for 30 items scored by 10 raters at random, 200 times: mean alpha .64 and omega total .72 from the
# data; alpha -.09 from the matrix, and by the closed form. With 10 good raters of whom three turn the scale upside down: alpha
# .96 from the data, as if all agreed, .39 from the matrix.
# Who is hurt: whoever looks by it whether raters, judges or rubrics agree before they average them: noise passes for agreement,
# and who scores upside down is not found.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check reliabiliPy==0.0.36 factor-analyzer==0.5.1 scikit-learn==1.5.2 \
    numpy==1.26.4 pandas==2.3.3 scipy==1.14.1
cat > noise.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import pandas as pd
from reliabilipy import reliability_analysis


def closed_form(scores):
    """Alpha of standardized items from the mean correlation."""
    items = scores.shape[1]
    mean = (np.corrcoef(scores.T).sum() - items) / (items * (items - 1))
    return items * mean / (1 + (items - 1) * mean)


def both(scores):
    data = reliability_analysis(raw_dataset=pd.DataFrame(scores), is_corr_matrix=False)
    matrix = reliability_analysis(correlations_matrix=pd.DataFrame(np.corrcoef(scores.T)))
    data.fit()
    matrix.fit()
    return data.alpha_cronbach, data.omega_total, matrix.alpha_cronbach, closed_form(scores)


rng = np.random.default_rng(0)
noise = [round(float(mean), 2) for mean in np.mean([both(rng.standard_normal((30, 10))) for _ in range(200)], axis=0)]
good = rng.standard_normal((30, 1)) + 0.7 * rng.standard_normal((30, 10))
good[:, :3] *= -1
turned = [round(float(value), 2) for value in both(good)]
print(f'reliabiliPy {importlib.metadata.version("reliabiliPy")}: alpha and omega total of the data, alpha of their matrix, '
      f'closed form: noise {noise}, three of ten raters turned {turned}')
sys.exit(noise != [0.64, 0.72, -0.09, -0.09] or turned != [0.96, 0.95, 0.39, 0.39])
PYTHON
env/bin/python noise.py 2> errors || { tail -3 errors; exit 1; }
