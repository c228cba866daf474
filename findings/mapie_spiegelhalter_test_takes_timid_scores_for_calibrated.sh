#!/usr/bin/env bash
# MAPIE 1.6.0 (numpy 2.3.5), `spiegelhalter_p_value`: it is one minus the normal distribution of the statistic, so one-sided: only
# overconfidence gives small p-values; underconfidence gives values near 1. The docstring calls it the probability of the
# statistic under the null hypothesis of perfect calibration, and says of the statistic that scores are the better calibrated the
# closer it is to zero. The p-values of Kolmogorov-Smirnov and Kuiper beside it see both sides.
#
# Expected: small p-values for scores that are not calibrated, on either side. Seen, for 5,000 answers with logits of N(0, 4), and
# scores with 1, 2 and half of those logits: statistics of -0.446, 30.1 and -18.654, which are right, and p-values of .672, 0 and
# 1; two-sided .656, 0 and 0, and by `kuiper_p_value` .979, 0 and 0.
# Who is hurt: whoever tests calibration with it, or chooses a temperature by it: the more underconfident the scores, the better
# the p-value.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check mapie==1.6.0 numpy==2.3.5 scipy==1.16.3 scikit-learn==1.7.2
cat > sides.py <<'PYTHON'
import importlib.metadata
import math
import sys

import numpy as np
from mapie.metrics.calibration import kuiper_p_value, spiegelhalter_p_value, spiegelhalter_statistic


def two_sided(scores):
    z = ((answers - scores) * (1 - 2 * scores)).sum() / math.sqrt(((1 - 2 * scores) ** 2 * scores * (1 - scores)).sum())
    return z, math.erfc(abs(z) / math.sqrt(2))


rng = np.random.default_rng(0)
logits = rng.normal(0, 2, 5000)
answers = (rng.random(5000) < 1 / (1 + np.exp(-logits))).astype(int)
found = {}
for factor in (1, 2, 0.5):
    scores = 1 / (1 + np.exp(-factor * logits))
    found[factor] = [round(float(x), 3) for x in (
        spiegelhalter_statistic(answers, scores), spiegelhalter_p_value(answers, scores), *two_sided(scores),
        kuiper_p_value(answers, scores))]
print(f'mapie {importlib.metadata.version("mapie")}: factor of the logits -> statistic, p-value, both by the formula and '
      f'two-sided, p-value of Kuiper: {found}')
sys.exit(found != {1: [-0.446, 0.672, -0.446, 0.656, 0.979], 2: [30.1, 0, 30.1, 0, 0], 0.5: [-18.654, 1, -18.654, 0, 0]})
PYTHON
env/bin/python sides.py 2> errors || { tail -3 errors; exit 1; }
