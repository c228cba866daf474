#!/usr/bin/env bash
# calibrax 0.1.1, the last that runs on Python 3.11 (jax 0.10.2), `roc_auc`: among items of one score it takes a step of the curve
# for each, in the order of the rows, where the curve is one straight line. In 0.1.14 the code is the same.
#
# Expected: the share of pairs in which the positive one scores higher, a tie as half, whatever the order of the rows; the
# docstring says ".5 = random". Seen, for 500 positive and 500 negative items of the same score: 1, 0 and .479 with the positive
# ones first, last and mixed. For scores of 5 steps, as those of a judge: .768, .54 and .652; by pairs .654. Where no score occurs
# twice, .653 in all orders, and by pairs.
# Who is hurt: whoever judges by it scores of few steps, rounded or clipped ones: data that are sorted by label, or chosen answers
# before rejected ones, as preferences are, make the AUC too high, up to 1 for scores that say nothing.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check calibrax==0.1.1 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 \
    numpy==2.3.5
cat > ties.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from calibrax.metrics.functional.classification import roc_auc


def by_pairs(scores, labels):
    good, bad = scores[labels == 1], scores[labels == 0]
    return float(np.mean((good[:, None] > bad) + (good[:, None] == bad) / 2))


rng = np.random.default_rng(0)
labels = np.repeat([1, 0], 500)
judged = np.where(labels == 1, rng.choice(5, 1000, p=[0.05, 0.1, 0.15, 0.3, 0.4]),
                  rng.choice(5, 1000, p=[0.1, 0.15, 0.2, 0.3, 0.25])) / 4
untied = judged + np.linspace(0, 0.1, 1000) % 0.007
found = {}
for name, scores in (('constant', np.full(1000, 0.5)), ('judge', judged), ('untied', untied)):
    orders = np.arange(1000), np.arange(1000)[::-1], rng.permutation(1000)
    found[name] = [round(float(roc_auc(scores[order], labels[order])), 3) for order in orders] + [
        round(by_pairs(scores, labels), 3)]
print(f'calibrax {importlib.metadata.version("calibrax")}: scores -> AUC with the good first, last, mixed, and by pairs: {found}')
sys.exit(found != {'constant': [1, 0, 0.479, 0.5], 'judge': [0.768, 0.54, 0.652, 0.654], 'untied': [0.653] * 4})
PYTHON
env/bin/python ties.py 2> errors || { tail -3 errors; exit 1; }
