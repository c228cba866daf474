#!/usr/bin/env bash
# venn-abers 1.5.4 (numpy 2.3.5), regression: `VennAbers(setting='regression')` and `VennAbersRegressor`. The lower bound is the
# isotonic regression with the test object added and given the smallest label, the upper one with the largest. Where several
# calibration objects have one prediction, the step for the lower bound takes off the label and the weight of one of them, not of
# all. Trees, integers and rounded scores give such ties. Nothing in the README or docstrings asks for distinct predictions.
#
# Expected: a lower bound that is not above the upper one, the same in any order of the calibration rows, and equal to isotonic
# regression. Seen, for 300 scores 1 to 5 of a judge with truths near twice the score: lower bounds of 3.53, 6.16, 7.77, 9.89 and
# 9.91 instead of 1.76, 3.53, 6.15, 7.77 and 9.91, about those of the next score; the first four are above the upper bounds of
# 1.99, 3.79, 6.37 and 7.99, which are right; with the rows in reverse 3.53, 6.14, 7.76, 9.9 and 9.91. For a tree of depth 4 in
# `VennAbersRegressor`, 57.4 % of intervals have the lower end above the upper one, and lower ends are off by up to 2.55. A linear
# model, without ties, is right.
# Who is hurt: whoever takes the bounds, or the point prediction made of them, from a tree or from ratings.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check venn-abers==1.5.4 numpy==2.3.5 scipy==1.16.3 pandas==2.3.3 \
    scikit-learn==1.7.2
cat > ties.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from sklearn.base import clone
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import train_test_split
from sklearn.tree import DecisionTreeRegressor
from venn_abers import VennAbers, VennAbersRegressor


def exact(predictions, labels, label, tests):
    """Isotonic regression of the calibration objects and one test object with the given label, at the test object."""
    fits = {test: IsotonicRegression().fit(np.append(predictions, test), np.append(labels, label)) for test in set(tests)}
    return np.array([fits[test].predict([test])[0] for test in tests])


rng = np.random.default_rng(0)
scores = rng.integers(1, 6, 300).astype(float)
truths = 2 * scores + rng.normal(size=300)
values = np.arange(1, 6.0)
lower, upper = {}, {}
lower['found'], upper['found'] = VennAbers(setting='regression').fit(scores, truths).predict_proba(values)[1].T
lower['exact'] = exact(scores, truths, truths.min(), values)
upper['exact'] = exact(scores, truths, truths.max(), values)
lower['reverse'] = VennAbers(setting='regression').fit(scores[::-1], truths[::-1]).predict_proba(values)[1][:, 0]
lower, upper = ({name: np.round(bound, 2).tolist() for name, bound in bounds.items()} for bounds in (lower, upper))

x = rng.uniform(0, 10, (1600, 1))
y = 2 * np.sin(x[:, 0]) + x[:, 0] + rng.normal(size=1600)
models = {}
for model in (DecisionTreeRegressor(max_depth=4, random_state=0), LinearRegression()):
    calibrated = VennAbersRegressor(estimator=model, inductive=True, cal_size=200, random_state=0)
    calibrated.fit(x[:600], y[:600])
    _, found = calibrated.predict(x[600:])
    x_fit, x_calibration, y_fit, y_calibration = train_test_split(x[:600], y[:600], test_size=200, random_state=0)
    fitted = clone(model).fit(x_fit, y_fit)
    predictions, tests = fitted.predict(x_calibration), fitted.predict(x[600:])
    ordered = np.sort(y_calibration)
    right = [exact(predictions, np.clip(y_calibration, ordered[0], ordered[-2]), ordered[0], tests),
             exact(predictions, np.clip(y_calibration, ordered[1], ordered[-1]), ordered[-1], tests)]
    models[type(model).__name__] = [
        round(float((found[:, 0] > found[:, 1] + 1e-9).mean()), 3), round(float((right[0] > right[1] + 1e-9).mean()), 3),
        *(round(float(np.abs(found[:, end] - right[end]).max()), 2) for end in (0, 1))]
print(f'venn-abers {importlib.metadata.version("venn-abers")}: lower bounds of scores 1 to 5: {lower}; upper bounds: {upper}; '
      f'crossed, crossed by isotonic regression, largest errors of lower and upper ends: {models}')
sys.exit(upper['found'] != upper['exact'] or lower != {
    'found': [3.53, 6.16, 7.77, 9.89, 9.91], 'exact': [1.76, 3.53, 6.15, 7.77, 9.91], 'reverse': [3.53, 6.14, 7.76, 9.9, 9.91]}
    or models != {'DecisionTreeRegressor': [0.574, 0.0, 2.55, 0.0], 'LinearRegression': [0.0, 0.0, 0.0, 0.0]})
PYTHON
env/bin/python ties.py 2> errors || { tail -3 errors; exit 1; }
