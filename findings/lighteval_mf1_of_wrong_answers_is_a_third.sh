#!/usr/bin/env bash
# lighteval 0.13.0 (torch 2.13.0, CPU), `Metrics.multi_f1_numeric`, the `mf1` of the task `super_glue:cb` with its three classes.
# For each class it takes the F1 of "is it this class?" with average "micro", which for two classes is the accuracy, and averages
# over classes: the result is (1 + 2 x accuracy) / 3. The list of metrics says "Loglikelihood F1 score for multiple gold targets".
#
# Expected: the mean of the F1 of the classes, as SuperGLUE defines it for CB, 0 if all answers are wrong. Seen, for 115, 112 and
# 23 questions of the classes: .333 if all answers are wrong, by scikit-learn 1.9.1 0; .640 if all answers are the first class, by
# scikit-learn .210; .939 if the rare class is always missed, by scikit-learn .636; 1 by both if all are right.
# Who is hurt: whoever takes it for an F1: models that never find the rare class score above .9, and the score tells nothing that
# the accuracy beside it does not.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 lighteval==0.13.0 transformers==5.24.0 \
    inspect-ai==0.3.285 datasets==5.2.0 huggingface-hub==2.4.0 sacrebleu==2.6.0 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
cat > classes.py <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from lighteval.metrics import apply_metric
from lighteval.metrics.metrics import Metrics
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
from sklearn.metrics import f1_score

metric = Metrics.multi_f1_numeric.value
gold = np.repeat([0, 1, 2], [115, 112, 23])
docs = [Doc(query='Is it so?', choices=[' true', ' false', ' neither'], gold_index=int(answer)) for answer in gold]
found = {}
for name, chosen in {'wrong': (gold + 1) % 3, 'first': 0 * gold, 'rare missed': np.where(gold == 2, 1, gold),
                     'right': gold}.items():
    responses = [ModelResponse(logprobs=[-1.0 if place == answer else -5.0 for place in range(3)]) for answer in chosen]
    results = [result['mf1'] for result in apply_metric(responses=responses, docs=docs, metrics=[metric])]
    shown = metric.get_corpus_aggregations()['mf1'](results)
    found[name] = [round(float(value), 3) for value in (shown, f1_score(gold, chosen, average='macro', zero_division=0),
                                                        (1 + 2 * np.mean(gold == chosen)) / 3)]
print(f'lighteval {importlib.metadata.version("lighteval")}: answers -> mf1, mean F1 by scikit-learn, (1 + 2 x accuracy) / 3: '
      f'{found}')
sys.exit(found != {'wrong': [0.333, 0.0, 0.333], 'first': [0.64, 0.21, 0.64], 'rare missed': [0.939, 0.636, 0.939],
                   'right': [1.0, 1.0, 1.0]})
PYTHON
env/bin/python classes.py 2> errors || { tail -3 errors; exit 1; }
