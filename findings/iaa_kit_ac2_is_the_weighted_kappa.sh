#!/usr/bin/env bash
# iaa-kit 0.1.2 (numpy 2.3.5), `ac2`: it returns `weighted_kappa`, under the name of Gwet's AC2. The README names "Gwet
# AC1/AC2" beside "Cohen and weighted kappa"; `ac1` is Gwet's.
#
# Expected: Gwet's AC2, made for answers of which most fall in one category, where kappa is low in spite of agreement. Seen, for
# 1,000 answers from 1 to 5 of two raters who agree in 82 to 86 %, of which 0, 50, 80 and 95 % are a sure 5: .816, .723, .576 and
# .3 by `ac2` and by `weighted_kappa`; by Gwet's formula and by irrCAC 0.4.4 .811, .801, .859 and .898.
# Who is hurt: whoever takes AC2 for ratings that are mostly high, as those of good answers are: the agreement looks poor, and the
# remedy that was chosen for that does nothing.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check iaa-kit==0.1.2 numpy==2.3.5
cat > gwet.py <<'PYTHON'
import importlib.metadata
import sys

import iaa_kit
import numpy as np


def by_gwet(first, second, categories):
    places = np.arange(categories)
    weights = 1 - np.abs(places[:, None] - places) / (categories - 1)
    shares = np.bincount(np.concatenate([first, second]) - 1, minlength=categories) / (2 * len(first))
    chance = weights.sum() / (categories * (categories - 1)) * (shares * (1 - shares)).sum()
    return (weights[first - 1, second - 1].mean() - chance) / (1 - chance)


rng = np.random.default_rng(0)
found = {}
for share in (0.0, 0.5, 0.8, 0.95):
    first = np.where(rng.random(1000) < share, 5, rng.integers(1, 6, 1000))
    second = np.where(rng.random(1000) < 0.8, first, rng.integers(1, 6, 1000))
    both = first.tolist(), second.tolist()
    found[share] = [round(float(x), 3) for x in (iaa_kit.ac2(*both), iaa_kit.weighted_kappa(*both), by_gwet(first, second, 5),
                                                np.mean(first == second))]
print(f'iaa-kit {importlib.metadata.version("iaa-kit")}: share of a sure 5 -> its AC2, its weighted kappa, AC2 by the formula, '
      f'raw agreement: {found}')
sys.exit(found != {0.0: [0.816, 0.816, 0.811, 0.852], 0.5: [0.723, 0.723, 0.801, 0.822], 0.8: [0.576, 0.576, 0.859, 0.84],
                   0.95: [0.3, 0.3, 0.898, 0.857]})
PYTHON
env/bin/python gwet.py 2> errors || { tail -3 errors; exit 1; }
