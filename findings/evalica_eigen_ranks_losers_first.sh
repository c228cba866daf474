#!/usr/bin/env bash
# evalica 0.4.2 (pandas 2.3.3), `eigen`, one of the methods that it ranks systems by from their comparisons: the scores are
# large where a system loses. Those of `bradley_terry`, `newman`, `pagerank`, `elo`, `counting` and `average_win_rate` are
# large where it wins, and neither name, docstring nor README says that one is the other way round.
#
# Expected: the largest score for the best, as its command gives rank 1 to the largest. Seen, for ten systems of known strengths
# from 0 to 2 and 40 comparisons of each two: rank correlation with the strength -1 for `eigen`, .988 for each of the
# other six.
# Who is hurt: whoever ranks reward models, judges or policies by it, or takes several methods for a check of one another:
# the leaderboard stands on its head.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check evalica==0.4.2 numpy==2.3.5 pandas==2.3.3
cat > direction.py <<'PYTHON'
import importlib.metadata
import sys

import evalica
import numpy as np
import pandas as pd

rng = np.random.default_rng(0)
strengths = dict(zip('abcdefghij', np.linspace(0, 2, 10)))
games = [(x, y) for x in strengths for y in strengths if x < y for _ in range(40)]
winners = [evalica.Winner.X if rng.random() < 1 / (1 + np.exp(strengths[y] - strengths[x])) else evalica.Winner.Y
           for x, y in games]
methods = ('eigen', 'bradley_terry', 'newman', 'pagerank', 'elo', 'counting', 'average_win_rate')
found = {}
for name in methods:
    scores = getattr(evalica, name)(*zip(*games), winners).scores
    found[name] = round(float(scores.rank().corr(pd.Series(strengths).rank())), 3)
print(f'evalica {importlib.metadata.version("evalica")}: rank correlation of scores with strength: {found}')
sys.exit(not (found.pop('eigen') < -0.9 and min(found.values()) > 0.9))
PYTHON
env/bin/python direction.py 2> errors || { tail -3 errors; exit 1; }
