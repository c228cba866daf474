#!/usr/bin/env bash
# crowd-kit 1.4.2 (numpy 2.3.5), `NoisyBradleyTerry`, which is to find how reliable and how biased towards the left each
# worker is: its gradient for these stands at the places of others, and holds the last row of a worker alone, so that
# they follow from where they randomly began and a few last rows.
#
# Expected: of six honest workers, one who always says left and one who always says the wrong one, these two have the least
# skill. Seen, at 10,000 iterations with tolerance 1e-12 and 2,998 comparisons, over six values of `random_state`: the one
# who is always wrong has .74 to .89 and in four of them the most, .82 on average where the best honest worker has .77;
# the one who always says left .55 to .70; an honest worker .30 to .57.
# Who is hurt: whoever weighs annotators of preferences by it, pays them, or calls a judge biased.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check crowd-kit==1.4.2 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3
cat > skills.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import pandas as pd
from crowdkit.aggregation import NoisyBradleyTerry

rng = np.random.default_rng(0)
strengths = dict(zip('abcdefghij', np.linspace(0, 4, 10)))
games = [pair if rng.random() < 0.5 else pair[::-1]
         for pair in [(x, y) for x in strengths for y in strengths if x < y] * 40]
rows = []
for left, right in games:
    won = left if rng.random() < 1 / (1 + np.exp(strengths[right] - strengths[left])) else right
    rows.append((f'honest {rng.integers(6)}', left, right, won))
    lost = right if won == left else left
    rows += [('always left', left, right, left), ('always wrong', left, right, lost)] if len(rows) % 5 == 0 else []
data = pd.DataFrame(rows, columns=['worker', 'left', 'right', 'label'])
skills, biases = [], []
for seed in range(6):
    model = NoisyBradleyTerry(n_iter=10_000, tol=1e-12, random_state=seed).fit(data)
    skills.append(model.skills_)
    biases.append(model.biases_['always left'])
skills = pd.DataFrame(skills)
print(f'crowd-kit {importlib.metadata.version("crowd-kit")}: skill by random_state:', skills.round(2).to_string(),
      f'bias of always left: {np.round(biases, 2)}', f'rows: {data.worker.value_counts().to_dict()}', sep='\n')
mean = skills.mean()
print(f'mean: {mean.round(2).to_dict()}')
sys.exit(bool(mean.idxmax() != 'always wrong'))
PYTHON
env/bin/python skills.py 2> errors || { tail -3 errors; exit 1; }
