#!/usr/bin/env bash
# arena-rank 0.1.1 (jax 0.8.1, CPU), `PairDataset.from_pandas`: a winner that is none of 'model_a', 'model_b', 'tie' and
# 'both_bad' counts as a tie, without a word: other capitals, 'a', the name of the model that won.
#
# Expected: an error that names the value. Seen, for three systems of which one beats the next 30 times of 40: ratings of
# 1191, 1000 and 809 with the names that it knows, 1000 for all three with 'Model_A', with 'a' or with the winner's name,
# and 1064, 1064 and 873 where half of the rows have capitals.
# Intervals do not say so: half widths of 41, 41 and 83 with half of the rows in capitals, where 93, 59 and 93 are right,
# and 0 where no row is read.
# Who is hurt: whoever ranks models of another arena's or data set's records: what a part of the rows says is taken for
# ties, differences shrink, and the ratings look surer than those of data that was read.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check arena-rank==0.1.1 jax==0.8.1 jaxlib==0.8.1 numpy==2.3.3 pandas==2.3.3
cat > winners.py <<'PYTHON'
import importlib.metadata
import sys

import pandas as pd
from arena_rank.models.bradley_terry import BradleyTerry
from arena_rank.utils.data_utils import PairDataset

games = [(x, y, won) for x, y in ('xy', 'yz') for won in ['model_a'] * 30 + ['model_b'] * 10]
spelt = {
    'as expected': lambda x, y, won: won,
    'capitals': lambda x, y, won: won.title(),
    'letters': lambda x, y, won: won[-1],
    'names': lambda x, y, won: x if won == 'model_a' else y,
    'half in capitals': lambda x, y, won: won.title() if x == 'x' else won,
}
found = {}
for name, spell in spelt.items():
    rows = [(x, y, spell(x, y, won)) for x, y, won in games]
    data = PairDataset.from_pandas(pd.DataFrame(rows, columns=['model_a', 'model_b', 'winner']))
    result = BradleyTerry(n_competitors=len(data.competitors)).compute_ratings_and_cis(data, significance_level=0.05)
    found[name] = {k: (round(float(rating)), round(float(upper - rating))) for k, rating, upper in sorted(
        zip(result['competitors'], result['ratings'], result['rating_upper']))}
print(f'arena-rank {importlib.metadata.version("arena-rank")}: how winners are spelt -> ratings and half widths: {found}')
tied = dict.fromkeys('xyz', (1000, 0))
sys.exit(list(found.values()) != [{'x': (1191, 93), 'y': (1000, 59), 'z': (809, 93)}, tied, tied, tied,
                                  {'x': (1064, 41), 'y': (1064, 41), 'z': (873, 83)}])
PYTHON
JAX_PLATFORMS=cpu env/bin/python winners.py 2> errors || { tail -3 errors; exit 1; }
