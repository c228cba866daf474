#!/usr/bin/env bash
# CLES 0.1.3 (numpy 2.3.5), `CLES_2paired`: it compares each of n differences with n - 1 zeros and divides by n times n. The
# docstring names the common language effect size for paired samples, 50 to 100.
#
# Expected: the share of pairs in which the better sample wins, the same if the two are swapped, 50 where they are equal; so does
# `CLES_1samp` of the same package for the differences. Seen, for 10 pairs of which the second always wins, 90, swapped 100; for
# 4 pairs 75 and 100; for samples that are equal 55 and 62.5. For 10 pairs of which 6 are won by the second, 54, swapped 64.
# Who is hurt: whoever compares two systems on the same prompts: the effect is up to 10 or 25 points off for 10 or 4 pairs, and
# of two systems the one named first looks better.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check CLES==0.1.3 numpy==2.3.5
cat > pairs.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from CLES import CLES_1samp, CLES_2paired


def share(first, second):
    wins = np.mean((second > first) + 0.5 * (second == first))
    return 100 * max(wins, 1 - wins)


found = {}
for name, differences in (('always', np.ones(10)), ('always, of 4', np.ones(4)), ('equal', np.zeros(10)),
                          ('equal, of 4', np.zeros(4)), ('6 of 10', np.array([1.0] * 6 + [-1] * 4))):
    first = np.arange(len(differences)) / 4
    second = first + differences
    found[name] = [round(float(v), 9) for v in (CLES_2paired(first, second), CLES_2paired(second, first),
                                                CLES_1samp(differences), share(first, second))]
print(f'CLES {importlib.metadata.version("CLES")}: wins of the second sample -> paired, swapped, one sample of differences, and '
      f'by hand: {found}')
sys.exit(found != {'always': [90, 100, 100, 100], 'always, of 4': [75, 100, 100, 100], 'equal': [55, 55, 50, 50],
                   'equal, of 4': [62.5, 62.5, 50, 50], '6 of 10': [54, 64, 60, 60]})
PYTHON
env/bin/python pairs.py 2> errors || { tail -3 errors; exit 1; }
