#!/usr/bin/env bash
# infomeasure 0.6.3 (numpy 2.3.5), `kld` of discrete data (approach 'discrete', maximum likelihood): values of the first
# sample that the second does not have are left out of the cross-entropy, but not of the entropy. A warning is logged only
# where no value at all is common.
#
# Expected: the Kullback-Leibler divergence of the two histograms is infinite there, as scipy.special.rel_entr has it, or
# an error; it is never below 0. Seen, without a word, for 2,000 draws each of N(shift, 1) and N(0, 1) in bins of .3:
# shift .5, 1, 2, 3, 4, 5 gives .113, .467, 1.494, .826, -.964, -1.939 nats, where the normals have .125, .5, 2, 4.5, 8, 12.5.
# Who is hurt: whoever compares binned rewards of chosen and rejected responses by it, or any two histograms with an
# empty bin: from some distance on, the better they are separated the smaller the number, and the worse model wins.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check infomeasure==0.6.3 numpy==2.3.5 scipy==1.16.3
cat > separated.py <<'PYTHON'
import importlib.metadata
import sys

import infomeasure
import numpy as np
import scipy.special

rng = np.random.default_rng(0)
edges = np.linspace(-5, 10, 51)
found = {}
for shift in (0.5, 1, 2, 3, 4, 5):
    chosen, rejected = (np.digitize(rng.normal(mean, 1, 2000), edges) for mean in (shift, 0))
    p, q = (np.bincount(side, minlength=len(edges) + 1) / len(side) for side in (chosen, rejected))
    divergence = infomeasure.kld(chosen, rejected, approach='discrete')
    found[shift] = round(float(divergence), 3), float(scipy.special.rel_entr(p, q).sum())
print(f'infomeasure {importlib.metadata.version("infomeasure")}: shift -> its KL, KL of the histograms: {found}')
its = [divergence for divergence, _ in found.values()]
sys.exit(its != [0.113, 0.467, 1.494, 0.826, -0.964, -1.939] or not all(np.isinf(exact) for _, exact in found.values()))
PYTHON
env/bin/python separated.py 2> errors || { tail -3 errors; exit 1; }
! grep -i support errors
