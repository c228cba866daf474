#!/usr/bin/env bash
# deepsig 1.2.8 (numpy 2.3.5), `bonferroni_correction`: corrected p-values come back in another order than that of the p-values,
# for the sorting is applied once more in place of being undone. The comment in its code says that it is undone; the docstring
# says nothing of the order.
#
# Expected: the corrected p-value of each hypothesis in its place; the smallest p-value has the smallest. Seen, for .03, .5 and
# .01: .5, .03 and .06. By Bonferroni they are .09, 1 and .03; by Holm, whose factors 3, 2 and 1 it uses, .06, .5 and .03. The
# hypothesis with p = .5 gets .03, and the one with .01 gets .06.
# Who is hurt: whoever corrects p-values of three or more comparisons of models by it: another model is called better than
# the one that is. With two p-values, or with sorted ones, the order is right.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check deepsig==1.2.8 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3
cat > hypotheses.py <<'PYTHON'
import importlib.metadata
import sys

import deepsig
import numpy as np

p_values = np.array([0.03, 0.5, 0.01])
corrected = deepsig.bonferroni_correction(p_values).round(6).tolist()
exact = np.minimum(len(p_values) * p_values, 1).round(6).tolist()
print(f'deepsig {importlib.metadata.version("deepsig")}: p-values {p_values.tolist()}: its correction {corrected}, '
      f'three times the p-values, at most 1: {exact}')
sys.exit(corrected != [0.5, 0.03, 0.06] or exact != [0.09, 1.0, 0.03])
PYTHON
env/bin/python hypotheses.py 2> errors || { tail -3 errors; exit 1; }
