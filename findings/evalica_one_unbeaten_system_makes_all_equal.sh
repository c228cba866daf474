#!/usr/bin/env bash
# evalica 0.4.2 (pandas 2.3.3), `bradley_terry` and `newman`: one system that has won all of its comparisons makes the
# scores of all systems the same, 1e-6, without a warning, by both solvers; the first calls itself done after 2 iterations.
#
# Expected: no finite estimate for that system, the maximum likelihood being at infinity: a warning, or a large number
# for it beside usable ones for the others. Seen, for ten systems with 40 comparisons of each two, whose scores are .33
# to 2.4, and a new one that has won three: 1e-6 for all eleven. With a penalty (choix.ilsr_pairwise, alpha .01) they
# have logarithms from -1.28 to .69, and the new one 1.83.
# Who is hurt: whoever adds a new model to a leaderboard, or resamples one for intervals: draws in which a system lost
# nothing have all equal.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check evalica==0.4.2 numpy==2.3.5 pandas==2.3.3 choix==0.4.1
cat > unbeaten.py <<'PYTHON'
import importlib.metadata
import sys

import choix
import evalica
import numpy as np

rng = np.random.default_rng(0)
names = 'abcdefghij'
strengths = dict(zip(names, np.linspace(0, 2, 10)))
games = [(x, y) for x in names for y in names if x < y for _ in range(40)]
winners = [evalica.Winner.X if rng.random() < 1 / (1 + np.exp(strengths[y] - strengths[x])) else evalica.Winner.Y
           for x, y in games]
found = {}
for added in (0, 3):
    all_games = games + [('new', other) for other in 'aeh'[:added]]
    all_winners = winners + [evalica.Winner.X] * added
    for name in ('bradley_terry', 'newman'):
        for solver in ('pyo3', 'naive'):
            result = getattr(evalica, name)(*zip(*all_games), all_winners, solver=solver)
            found[name, solver, added] = [float(f'{s:.3g}') for s in sorted(result.scores)], result.iterations
wins = [(x, y) if winner == evalica.Winner.X else (y, x) for (x, y), winner in zip(all_games, all_winners)]
places = {name: place for place, name in enumerate([*names, 'new'])}
penalised = choix.ilsr_pairwise(11, [(places[x], places[y]) for x, y in wins], alpha=0.01)
print(f'evalica {importlib.metadata.version("evalica")}: (method, solver, comparisons of an unbeaten system) -> scores, '
      f'iterations: {found}; with a penalty: {penalised.round(2)}')
equal = [1e-6] * 11, 2
sys.exit(any((len(set(scores)) == 1) != (added == 3) for (_, _, added), (scores, _) in found.items())
         or any(found['bradley_terry', solver, 3] != equal for solver in ('pyo3', 'naive'))
         or int(penalised.argmax()) != 10)
PYTHON
env/bin/python unbeaten.py 2> errors || { tail -3 errors; exit 1; }
