#!/usr/bin/env bash
# confidenceinterval 1.0.5 (numpy 2.3.5), `classification_report_with_ci`: `confidence_level` reaches the F1 of each class alone.
# The intervals of precision, of recall and of all averages are those of 95 %, whatever it says; docstring and README name no
# exception.
#
# Expected: wider intervals for a higher level. Seen, for 60 answers of two classes: from .5 to .99 two of the twelve intervals
# change, F1 of either class. The precision of class 1 has [.673, .919] at both, where the package's own `precision_score`
# gives [.781, .867] and [.617, .936].
# Who is hurt: whoever asks for 99 % as many classes are compared, or for 90 %: the table mixes levels, and does not say so.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check confidenceinterval==1.0.5 numpy==2.3.5 scipy==1.16.3 \
    pandas==2.3.3 scikit-learn==1.7.2
cat > report.py <<'PYTHON'
import importlib.metadata
import sys

import confidenceinterval
import numpy as np

rng = np.random.default_rng(0)
truth = rng.integers(0, 2, 60)
predicted = np.where(rng.random(60) < 0.8, truth, 1 - truth)
reports = [confidenceinterval.classification_report_with_ci(truth.tolist(), predicted.tolist(), confidence_level=level)
           .set_index('Class') for level in (0.5, 0.99)]
columns = ['Precision CI', 'Recall CI', 'F1-Score CI']
changed = [f'{name} of {row}' for row in reports[0].index for name in columns
           if reports[0].loc[row, name] != reports[1].loc[row, name]]
its = [[round(float(x), 3) for x in report.loc['Class 1', 'Precision CI']] for report in reports]
exact = [[round(float(x), 3) for x in confidenceinterval.precision_score(
    truth.tolist(), predicted.tolist(), average='binary', method='wilson', confidence_level=level)[1]] for level in (0.5, 0.99)]
print(f'confidenceinterval {importlib.metadata.version("confidenceinterval")}: changed from .5 to .99: {changed}, of '
      f'{reports[0][columns].size} intervals; precision of class 1: {its}; by precision_score: {exact}')
sys.exit(changed != ['F1-Score CI of Class 0', 'F1-Score CI of Class 1'] or its != [[0.673, 0.919]] * 2
         or exact != [[0.781, 0.867], [0.617, 0.936]])
PYTHON
env/bin/python report.py 2> errors || { tail -3 errors; exit 1; }
