#!/usr/bin/env bash
# calibrax 0.1.1, the last that runs on Python 3.11 (jax 0.10.2), `ClasswiseWrapper`: it lists the labels by `jax.numpy.unique`
# with a size of the largest label + 1. Where a class is absent, that fills up with the smallest label, and names go by place in
# the list. In 0.1.14 the code is the same. The docstring calls labels an array of integers, and asks for no full set.
#
# Expected: the score of each class under its own name, and their mean. Seen, for an accuracy of .9, .7, .5 and .3 for chat, code,
# safety and reasoning: with all four, just that. Without the items of code: .9 for chat, .5 for code, .3 for safety and .9 for
# reasoning, mean .65 instead of .567. Without chat and code: .5, .3, .5 and .5, mean .45 instead of .4. Without names the scores
# have the right numbers, but the mean is as wrong.
# Who is hurt: whoever scores a part of the data, a batch or one language, in which a class does not occur: it gets a score,
# others get those of their neighbours, and there is no error.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check calibrax==0.1.1 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 \
    numpy==2.3.5
cat > classes.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from calibrax.metrics.functional.classification import accuracy
from calibrax.metrics.wrappers import ClasswiseWrapper

names = ['chat', 'code', 'safety', 'reasoning']
labels = np.repeat([0, 1, 2, 3], 100)
right = np.concatenate([np.arange(100) < share for share in (90, 70, 50, 30)]).astype(int)


def by_class(classes):
    kept = np.isin(labels, classes)
    by_hand = {names[place]: float(right[kept & (labels == place)].mean()) for place in classes}
    by_hand['mean'] = sum(by_hand.values()) / len(by_hand)
    return tuple({key: round(value, 3) for key, value in result.items()} for result in (by_hand, *(
        ClasswiseWrapper(accuracy, class_names=given).compute(right[kept], np.ones(kept.sum(), int), labels[kept])
        for given in (names, None))))


found = {'all': by_class([0, 1, 2, 3]), 'without code': by_class([0, 2, 3]), 'without chat and code': by_class([2, 3])}
print(f'calibrax {importlib.metadata.version("calibrax")}: accuracy by hand, by name, by number: {found}')
sys.exit(found != {
    'all': ({'chat': 0.9, 'code': 0.7, 'safety': 0.5, 'reasoning': 0.3, 'mean': 0.6},
            {'chat': 0.9, 'code': 0.7, 'safety': 0.5, 'reasoning': 0.3, 'mean': 0.6},
            {'0': 0.9, '1': 0.7, '2': 0.5, '3': 0.3, 'mean': 0.6}),
    'without code': ({'chat': 0.9, 'safety': 0.5, 'reasoning': 0.3, 'mean': 0.567},
                     {'chat': 0.9, 'code': 0.5, 'safety': 0.3, 'reasoning': 0.9, 'mean': 0.65},
                     {'0': 0.9, '2': 0.5, '3': 0.3, 'mean': 0.65}),
    'without chat and code': ({'safety': 0.5, 'reasoning': 0.3, 'mean': 0.4},
                              {'chat': 0.5, 'code': 0.3, 'safety': 0.5, 'reasoning': 0.5, 'mean': 0.45},
                              {'2': 0.5, '3': 0.3, 'mean': 0.45})})
PYTHON
env/bin/python classes.py 2> errors || { tail -3 errors; exit 1; }
