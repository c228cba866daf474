#!/usr/bin/env bash
# deepsig 1.2.8 (numpy 2.3.5), `bootstrap_test`, a paired bootstrap by docstring and README, which asks for lists of one length:
# each of the two is resampled by itself, so that pairs are torn apart and the test is one for independent samples.
#
# Expected: the p-value of resampled pairs. Seen, for 100 prompts of which scores differ by N(0, 1), and a model that is better by
# .05 with a deviation of .01, on each of the 100: p = .366, where resampled differences give 0 of 1,000, its own
# `permutation_test` .001 and the paired t-test 1.3e-73.
# Who is hurt: whoever compares two models on the same prompts by it: differences between prompts drown that between models.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check deepsig==1.2.8 numpy==2.3.5 pandas==2.3.3 scipy==1.16.3
cat > paired.py <<'PYTHON'
import importlib.metadata
import sys

import deepsig
import numpy as np
import scipy.stats

rng = np.random.default_rng(0)
worse = rng.normal(0, 1, 100)
better = worse + rng.normal(0.05, 0.01, 100)
its = float(deepsig.bootstrap_test(better, worse, seed=1))
permuted = float(deepsig.permutation_test(better, worse, seed=1))
gains = better - worse
paired = float(np.mean(rng.choice(gains, (1000, 100)).mean(1) >= 2 * gains.mean()))
exact = float(scipy.stats.ttest_rel(better, worse, alternative='greater').pvalue)
print(f'deepsig {importlib.metadata.version("deepsig")}: better on {int((gains > 0).sum())} of 100; p-values: its bootstrap '
      f'{its}, its permutations {permuted:.3f}, bootstrap of the pairs {paired}, paired t-test {exact:.1e}')
sys.exit(not (its > 0.3 and max(permuted, paired, exact) < 0.01))
PYTHON
env/bin/python paired.py 2> errors || { tail -3 errors; exit 1; }
