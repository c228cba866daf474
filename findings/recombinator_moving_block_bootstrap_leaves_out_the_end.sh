#!/usr/bin/env bash
# recombinator 0.0.6.1 (numpy 2.3.5, numba 0.62.1), `moving_block_bootstrap` and its vectorized form: blocks start at multiples of
# the block length alone, and the last whole block is not among them where the length divides that of the series. The README
# names the Moving Block Bootstrap of Kuensch (1989), whose blocks start at each of the n - l + 1 observations.
#
# Expected: each observation is drawn. Seen, for the series 0, 1, ..., 19: with blocks of 5 its last five are never drawn, with
# blocks of 7 its last six, and with blocks of 10 the second half: each sample then is the first half twice, and the standard
# error of the mean 0. Mean of the samples with blocks of 5: 7.0 by it, 9.5 by blocks from each start, 9.5 in the series.
# `tapered_block_bootstrap` never draws the last value.
# Who is hurt: whoever takes intervals for rewards or losses of consecutive steps from it: they are about other data than
# those given, and where values rise or fall they lie beside the mean.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check numpy==2.3.5 numba==0.62.1
env/bin/pip install --quiet --disable-pip-version-check --no-deps recombinator==0.0.6.1
cat > blocks.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from recombinator.block_bootstrap import moving_block_bootstrap, moving_block_bootstrap_vectorized
from recombinator.tapered_block_bootstrap import tapered_block_bootstrap


def kuensch(x, length, replications):
    starts = np.random.randint(len(x) - length + 1, size=(replications, -(-len(x) // length), 1))
    return x[(starts + np.arange(length)).reshape(replications, -1)[:, :len(x)]]


np.random.seed(0)
series = np.arange(20.0)
last = {length: [int(draw(series, length, replications=2000).max()) for draw in (
    moving_block_bootstrap, moving_block_bootstrap_vectorized, kuensch)] for length in (5, 7, 10)}
halves = float(moving_block_bootstrap(series, 10, replications=2000).mean(axis=1).std())
# Weights of the tapered one are those of a block's places: an outlier at the end shows whether it is ever drawn.
ends = []
for place in (18, 19):
    spike = np.zeros(20)
    spike[place] = 1000.0
    ends.append(bool(tapered_block_bootstrap(spike, 5, replications=2000).max() > 100))
means = [round(float(draw(series, 5, replications=20000).mean()), 1) for draw in (moving_block_bootstrap, kuensch)]
print(f'recombinator {importlib.metadata.version("recombinator")}: last of 0 to 19 that is drawn, per block length, by the two '
      f'and by hand: {last}; standard error of the mean with blocks of 10: {halves}; is the last but one ever drawn by the '
      f'tapered one, the last: {ends}; means with blocks of 5, by it and by hand: {means}')
sys.exit([last, halves, ends, means] != [{5: [14, 14, 19], 7: [13, 13, 19], 10: [9, 9, 19]}, 0.0, [True, False], [7.0, 9.5]])
PYTHON
env/bin/python blocks.py 2> errors || { tail -3 errors; exit 1; }
