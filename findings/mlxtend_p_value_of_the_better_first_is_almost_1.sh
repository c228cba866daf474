#!/usr/bin/env bash
# mlxtend 0.25.0 (numpy 2.3.5), `evaluate.proportion_difference`: as the p-value it returns the lower tail of the normal
# distribution at z, whose sign is that of the first proportion less the second. The docstring says "the p-value"; the user guide
# tests for a difference, with 1.96 as the limit of z, and calls a z of -1.754 significant for its p of .040.
#
# Expected: a small p-value for a large difference of either sign. Seen, for accuracies of .84 and .80 on 2,000 examples each:
# z = 3.297, p = .9995; for .80 and .84 z = -3.297, p = .0005; by the normal distribution .001, two-sided, for both. For .84 and
# .92 on 100, as in the guide, .04, two-sided .079, and for .92 and .84 .96.
# Who is hurt: whoever compares two models or win rates by it: with the better one first no difference is ever significant, with
# the worse one first the p-value is half of the two-sided one.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check mlxtend==0.25.0 numpy==2.3.5 scipy==1.16.3 pandas==2.3.3 \
    scikit-learn==1.8.0 matplotlib==3.10.8
cat > tails.py <<'PYTHON'
import importlib.metadata
import math
import sys

from mlxtend.evaluate import proportion_difference

found = {}
for first, second, size in ((0.84, 0.80, 2000), (0.80, 0.84, 2000), (0.92, 0.84, 100), (0.84, 0.92, 100), (0.8, 0.8, 2000)):
    z = (first - second) / math.sqrt((first * (1 - first) + second * (1 - second)) / size)
    two_sided = math.erfc(abs(z) / math.sqrt(2))
    its = proportion_difference(first, second, size)
    found[first, second, size] = [round(float(x), 4) for x in (*its, z, two_sided)]
print(f'mlxtend {importlib.metadata.version("mlxtend")}: proportions, size -> its z, its p-value, z, two-sided p-value: {found}')
sys.exit(found != {(0.84, 0.80, 2000): [3.2969, 0.9995, 3.2969, 0.001], (0.80, 0.84, 2000): [-3.2969, 0.0005, -3.2969, 0.001],
                   (0.92, 0.84, 100): [1.7541, 0.9603, 1.7541, 0.0794], (0.84, 0.92, 100): [-1.7541, 0.0397, -1.7541, 0.0794],
                   (0.8, 0.8, 2000): [0.0, 0.5, 0.0, 1.0]})
PYTHON
MPLBACKEND=agg env/bin/python tails.py 2> errors || { tail -3 errors; exit 1; }
