#!/usr/bin/env bash
# crepes 0.9.1 (numpy 2.3.5), CRPS by `evaluate` of a conformal predictive system with `sigmas`, estimates of difficulty: in the
# step of the distribution that holds the truth, distances that have the scale of the data already are multiplied by sigma once
# more. The docstring calls it the continuous-ranked probability score.
#
# Expected: one CRPS for one set of predictive distributions, which do not change if all sigmas are multiplied by one number, and
# the same as from the distances between values. Seen, for 100 calibration and 500 test values with noise of 1 or 3 times
# N(0, 1), and sigmas of .1, 1, 10 and 100 times that: 1.153, 1.383, 3.684 and 26.689, for intervals that are the same; from
# distances 1.225. Without sigmas, and noise of N(0, 1), .579 by both.
# Who is hurt: whoever chooses among difficulty estimates, or among models with them, by CRPS: the one with the smallest numbers
# wins, whatever it predicts.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check crepes==0.9.1 numpy==2.3.5 scipy==1.16.3 pandas==2.3.3 \
    scikit-learn==1.7.2
cat > unit.py <<'PYTHON'
import importlib.metadata
import sys

import crepes
import numpy as np

rng = np.random.default_rng(0)
spread_before, spread = rng.choice([1.0, 3.0], 100), rng.choice([1.0, 3.0], 500)
residuals, predicted = rng.normal(size=100) * spread_before, rng.normal(size=500)
truth = predicted + rng.normal(size=500) * spread


def exact(members):
    return float(np.mean(np.abs(members - truth[:, None]).mean(1)
                         - np.abs(members[:, :, None] - members[:, None]).mean((1, 2)) / 2))


found, intervals = {}, []
for unit in (0.1, 1, 10, 100):
    system = crepes.ConformalPredictiveSystem()
    system.fit(residuals, sigmas=unit * spread_before)
    score = system.evaluate(predicted, truth, sigmas=unit * spread, metrics=['CRPS'], seed=0)['CRPS']
    intervals.append(system.predict_int(predicted, sigmas=unit * spread, confidence=0.8))
    found[unit] = round(float(score), 3)
same = all(np.allclose(interval, intervals[0]) for interval in intervals)
by_distances = round(exact(predicted[:, None] + residuals / spread_before * spread[:, None]), 3)
system = crepes.ConformalPredictiveSystem()
system.fit(residuals / spread_before)
truth = predicted + (truth - predicted) / spread
plain = [round(float(score), 3) for score in (system.evaluate(predicted, truth, metrics=['CRPS'], seed=0)['CRPS'],
                                              exact(predicted[:, None] + residuals / spread_before))]
print(f'crepes {importlib.metadata.version("crepes")}: unit of the sigmas -> CRPS: {found}; same intervals: {same}; CRPS from '
      f'distances: {by_distances}; without sigmas, and from distances: {plain}')
sys.exit(found != {0.1: 1.153, 1: 1.383, 10: 3.684, 100: 26.689} or not same or by_distances != 1.225 or plain != [0.579, 0.579])
PYTHON
env/bin/python unit.py 2> errors || { tail -3 errors; exit 1; }
