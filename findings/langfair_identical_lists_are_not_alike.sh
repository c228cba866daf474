#!/usr/bin/env bash
# langfair 0.8.0, `SERP` of two lists of recommendations: the sum over common entries of K - rank + 1 is halved and divided by
# K (K + 1), with ranks from 0. Its notebook of recommendation metrics divides by K (K + 1) / 2, with ranks as usual.
#
# Expected, by that formula: 1 for a list and itself, as `JaccardSimilarity` gives. Seen: .5, .417, .333, .295 and .274 for
# lists of 1, 2, 5, 10 and 20 entries. Nor is it a multiple of the right number: of ten entries the first alone in common
# gives .05 (.182 by the formula), the last alone .0091 (.018).
# Who is hurt: whoever audits by it whether a model recommends the same to people of different groups: groups that are treated
# exactly alike seem to share a third or less, and short lists seem fairer than long ones.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check --no-deps langfair==0.8.0 numpy==2.3.5
cat > alike.py <<'PYTHON'
import importlib.metadata
import sys

from langfair.metrics.recommendation.metrics import SERP, JaccardSimilarity


def formula(one, other):
    size = len(one)
    return sum(size - rank + 1 for rank, entry in enumerate(one, 1) if entry in other) / (size * (size + 1) / 2)


songs = [f'song {number}' for number in range(20)]
others = [f'other {number}' for number in range(20)]
alike = {}
for size in (1, 2, 5, 10, 20):
    short = songs[:size]
    alike[size] = [round(measure(short, short), 3) for measure in (SERP().evaluate, formula, JaccardSimilarity().evaluate)]
ten = songs[:10]
single = {name: [round(measure(ten, found), 4) for measure in (SERP().evaluate, formula)] for name, found in (
    ('first', ten[:1] + others[:9]), ('last', ten[9:] + others[:9]))}
print(f'langfair {importlib.metadata.version("langfair")}: a list with itself by SERP, by the formula, by Jaccard: '
      f'{alike}; one of ten in common: {single}')
sys.exit(alike != {size: [serp, 1.0, 1.0] for size, serp in ((1, 0.5), (2, 0.417), (5, 0.333), (10, 0.295), (20, 0.274))}
         or single != {'first': [0.05, 0.1818], 'last': [0.0091, 0.0182]})
PYTHON
env/bin/python alike.py 2> errors || { tail -3 errors; exit 1; }
