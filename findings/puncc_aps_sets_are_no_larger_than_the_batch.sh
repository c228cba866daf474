#!/usr/bin/env bash
# puncc 0.9.3 (numpy 1.26.4), `APS` and `RAPS`: the prediction sets hold at most as many classes as there are rows in the call of
# `predict`: the limit is the number of test rows, where the number of classes is meant. The comment on that line speaks of
# logits that are not well normalized; the docstrings name no smallest batch. One row alone is an error.
#
# Expected: the set of a row does not depend on the rows beside it, and holds the truth in about 90 % or more at alpha=.1. Seen,
# for 5 classes, true probabilities, 1,000 calibration and 600 test rows, without randomisation: in one batch 97.3 % and 4.32
# classes, as by the definition of APS; in batches of 2 rows 68.8 % and 2, of 3 rows 85 % and 3: the right sets, cut to their
# first 2 or 3 classes. With randomisation, the default, 87.5 % in one batch, 68.8 % and 84.2 % in batches of 2 and 3. RAPS is
# alike. There is no warning.
# Who is hurt: whoever predicts as questions come in, or in batches smaller than the number of classes: the coverage that was
# measured on the whole test set is lost.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check puncc==0.9.3 numpy==1.26.4 scipy==1.15.3 pandas==2.3.3 \
    scikit-learn==1.6.1 matplotlib==3.10.7
cat > batches.py <<'PYTHON'
import importlib.metadata
import math
import sys

import numpy as np
from deel.puncc.api.prediction import BasePredictor
from deel.puncc.classification import APS, RAPS


class Given:
    """A model whose probabilities are its inputs."""

    def predict(self, probabilities):
        return probabilities


def data(rows, classes=5):
    odds = np.exp(rng.normal(size=(rows, classes)))
    probabilities = odds / odds.sum(1, keepdims=True)
    return probabilities, (probabilities.cumsum(1) < rng.random((rows, 1))).sum(1).clip(max=classes - 1)


def by_definition(alpha=0.1):
    """Sets of the likeliest classes that together reach the calibrated threshold."""
    order = np.argsort(-calibration, 1)
    sums = np.take_along_axis(calibration, order, 1).cumsum(1)
    scores = np.sort(sums[order == calibration_truth[:, None]])
    threshold = scores[math.ceil((len(scores) + 1) * (1 - alpha)) - 1]
    order = np.argsort(-test, 1)
    sums = np.take_along_axis(test, order, 1).cumsum(1)
    return [places[:min((row < threshold).sum() + 1, len(places))].tolist() for places, row in zip(order, sums)]


def sets(method, batch, **settings):
    np.random.seed(0)
    conformal = method(BasePredictor(Given(), is_trained=True), train=False, **settings)
    conformal.fit(X_fit=calibration[:1], y_fit=calibration_truth[:1], X_calib=calibration, y_calib=calibration_truth)
    return [[int(place) for place in places] for start in range(0, len(test), batch)
            for places in conformal.predict(test[start:start + batch], alpha=0.1)[1]]


def summary(predicted):
    return [round(float(np.mean([label in places for label, places in zip(test_truth, predicted)])), 3),
            round(float(np.mean([len(places) for places in predicted])), 2)]


rng = np.random.default_rng(0)
(calibration, calibration_truth), (test, test_truth) = data(1000), data(600)
right = by_definition()
plain = {batch: sets(APS, batch, rand=False) for batch in (2, 3, 600)}
cut = plain == {batch: [places[:batch] for places in right] for batch in plain}
found = {'APS': {batch: summary(predicted) for batch, predicted in plain.items()},
         'APS with randomisation': {batch: summary(sets(APS, batch))[0] for batch in plain},
         'RAPS': {batch: summary(sets(RAPS, batch, rand=False, lambd=0.05, k_reg=2)) for batch in plain}}
print(f'puncc {importlib.metadata.version("puncc")}: rows in a batch -> coverage and mean size: {found}; by the definition: '
      f'{summary(right)}; the same sets, but cut to the number of rows: {cut}')
sys.exit(found != {
    'APS': {2: [0.688, 2.0], 3: [0.85, 3.0], 600: [0.973, 4.32]}, 'APS with randomisation': {2: 0.688, 3: 0.842, 600: 0.875},
    'RAPS': {2: [0.688, 2.0], 3: [0.85, 3.0], 600: [0.975, 4.35]}} or not cut or summary(right) != [0.973, 4.32])
PYTHON
env/bin/python batches.py 2> errors || { tail -3 errors; exit 1; }
