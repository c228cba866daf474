#!/usr/bin/env bash
# xskillscore 0.0.29 (numpy 2.3.5, xarray 2025.11.0), `resample_iterations` with replace=False and dim_max=k: it shuffles the
# first k members among themselves, instead of drawing k of all. Its docstring says that it gives the same result as
# `resample_iterations_idx`, and of dim_max that it is the number of items to select.
#
# Expected: other members in each iteration, as `resample_iterations_idx` draws them. Seen, for 64 draws of N(0, 1), 8 at a time,
# 500 times: it uses the first 8 members only, the other uses all 64. The mean of the highest of 8 is 1.304 with a standard
# deviation of 0 over the iterations, by the other 1.417 with .414; over all subsets it is 1.399 with .438. With replacement all
# 64 are drawn by both.
# Who is hurt: whoever estimates by subsets what the best of n is worth, or how a score varies with the size of an ensemble: all
# iterations are one subset, and the spread over them is 0.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check xskillscore==0.0.29 xarray==2025.11.0 numpy==2.3.5 scipy==1.16.3 \
    pandas==2.3.3
cat > subsets.py <<'PYTHON'
import importlib.metadata
import math
import sys

import numpy as np
import xarray as xr
import xskillscore

rewards = xr.DataArray(np.random.default_rng(0).normal(size=64), dims='member', coords={'member': np.arange(64)})
found = {}
for name in ('resample_iterations', 'resample_iterations_idx'):
    for replace in (False, True):
        np.random.seed(0)
        drawn = getattr(xskillscore, name)(rewards, 500, 'member', dim_max=8, replace=replace)
        best = drawn.max('member')
        used = np.flatnonzero(np.isin(rewards, drawn))
        found[name, replace] = drawn.sizes['member'], len(used), int(used.max()), round(float(best.mean()), 3), round(
            float(best.std()), 3)
ascending = np.sort(rewards.to_numpy())
chances = np.array([math.comb(rank, 7) for rank in range(64)]) / math.comb(64, 8)
mean = float(chances @ ascending)
exact = round(mean, 3), round(float(chances @ (ascending - mean) ** 2) ** 0.5, 3)
print(f'xskillscore {importlib.metadata.version("xskillscore")}: (function, replace) -> members of a draw, members used, last of '
      f'them, mean and deviation of the best of 8 over 500 draws: {found}; over all subsets: {exact}')
sys.exit(found['resample_iterations', False] != (8, 8, 7, round(float(rewards[:8].max()), 3), 0.0)
         or found['resample_iterations', False][3] != 1.304 or exact != (1.399, 0.438)
         or found['resample_iterations_idx', False] != (8, 64, 63, 1.417, 0.414)
         or any(found[name, True][1] != 64 for name in ('resample_iterations', 'resample_iterations_idx')))
PYTHON
env/bin/python subsets.py 2> errors || { tail -3 errors; exit 1; }
