#!/usr/bin/env bash
# arena-rank 0.1.1 (jax 0.8.1, CPU), `BradleyTerry.compute_ratings_and_cis`: a system that has won each of its comparisons
# has a rating far above all others with a variance of 0, so that its interval is a point, without a warning.
#
# Expected: the widest interval of all, or none, or a refusal: there is no finite maximum of the likelihood. Seen, for ten
# systems with 40 comparisons of each two, which have ratings of 808 to 1151 and half widths of 34 to 39, and one that won
# three: 3423.1 [3423.1, 3423.1], and the other ratings are 242 lower than without it, as the mean of all is kept.
# Who is hurt: whoever reads a leaderboard with a new model: the one that least is known of is the surest.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check arena-rank==0.1.1 jax==0.8.1 jaxlib==0.8.1 numpy==2.3.3 pandas==2.3.3
cat > unbeaten.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import pandas as pd
from arena_rank.models.bradley_terry import BradleyTerry
from arena_rank.utils.data_utils import PairDataset

rng = np.random.default_rng(0)
strengths = dict(zip('abcdefghij', np.linspace(0, 2, 10)))
rows = [(x, y, 'model_a' if rng.random() < 1 / (1 + np.exp(strengths[y] - strengths[x])) else 'model_b')
        for x in strengths for y in strengths if x < y for _ in range(40)]


def ratings(rows):
    data = PairDataset.from_pandas(pd.DataFrame(rows, columns=['model_a', 'model_b', 'winner']))
    model = BradleyTerry(n_competitors=len(data.competitors))
    return pd.DataFrame(model.compute_ratings_and_cis(data, significance_level=0.05)).set_index('competitors')


without, beside = ratings(rows), ratings(rows + [('new', other, 'model_a') for other in 'aeh'])
print(f'arena-rank {importlib.metadata.version("arena-rank")}:', without.round(1).to_string(), beside.round(1).to_string(), sep='\n')
new, others = beside.loc['new'], beside.drop('new')
half = (others.rating_upper - others.rating_lower) / 2
lower = (without.ratings - others.ratings).round()
sys.exit([round(new.ratings), round(new.rating_upper - new.rating_lower, 1), lower.min(), lower.max(), round(half.min()),
          round(half.max()), round(without.ratings.min()), round(without.ratings.max())]
         != [3423, 0.0, 242, 242, 34, 39, 808, 1151])
PYTHON
JAX_PLATFORMS=cpu env/bin/python unbeaten.py 2> errors || { tail -3 errors; exit 1; }
