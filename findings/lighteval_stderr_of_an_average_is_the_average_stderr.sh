#!/usr/bin/env bash
# lighteval 0.13.0 (torch 2.13.0, CPU), rows `NAME:_average` and `all` of the results, as for the 57 subjects of MMLU: `_stderr`
# is the average of the standard errors of the tasks.
#
# Expected: the standard error of the average shown beside it. The questions of the tasks are different ones, so that it is the
# root of the sum of squared errors, divided by the number of tasks; it falls as tasks are added. Seen, for 16 tasks with 100
# questions each, of which 60 % are answered well: .0493, as for one task; by the formula .0123, as the standard deviation of the
# average over 2,000 such sets of answers, and as lighteval itself gives for the same 1,600 answers in one task.
# Who is hurt: whoever reads from the summary whether models differ: that of MMLU is shown about 7 times too large, and
# clear differences look like chance.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 lighteval==0.13.0 transformers==5.24.0 \
    inspect-ai==0.3.285 datasets==5.2.0 huggingface-hub==2.4.0 sacrebleu==2.6.0 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
cat > average.py <<'PYTHON'
import importlib.metadata
import math
import sys

import numpy as np
from lighteval.logging.info_loggers import MetricsLogger
from lighteval.metrics import apply_metric
from lighteval.metrics.metrics import Metrics
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTask, LightevalTaskConfig
from lighteval.tasks.requests import Doc


def results(answers):
    tasks, logger = {}, MetricsLogger()
    for name, right in answers.items():
        tasks[name] = LightevalTask(LightevalTaskConfig(name=name.split('|')[0], prompt_function=lambda line, name: None,
                                                        hf_repo='none', hf_subset='none', metrics=[Metrics.exact_match]))
        docs = [Doc(query='What is 2 + 2?', choices=['4'], gold_index=0) for _ in right]
        responses = [ModelResponse(text=['4' if answer else '5']) for answer in right]
        for result in apply_metric(responses=responses, docs=docs, metrics=tasks[name].metrics):
            logger.log(name, result)
    logger.aggregate(tasks)
    return {name: [round(float(row['em']), 4), round(float(row['em_stderr']), 4)]
            for name, row in logger.metric_aggregated.items()}


rng = np.random.default_rng(0)
right = rng.random((16, 100)) < 0.6
many = results({f'quiz:{place}|0': row for place, row in enumerate(right)})
one = results({'quiz|0': right.ravel()})
errors = right.std(axis=1, ddof=1) / 10
formula = round(math.sqrt((errors**2).sum()) / 16, 4)
spread = round(float((rng.random((2000, 16, 100)) < 0.6).mean((1, 2)).std()), 4)
shown = {'first task': many['quiz:0|0'], 'average': many['quiz:_average|0'], 'all': many['all'], 'one task': one['quiz|0']}
print(f'lighteval {importlib.metadata.version("lighteval")}: scores and standard errors: {shown}; of the average by the formula '
      f'{formula}, over 2,000 sets {spread}')
sys.exit(shown['average'] != [0.5906, 0.0493] or shown['all'] != [0.5906, 0.0493] or shown['one task'] != [0.5906, 0.0123]
         or formula != 0.0123 or not 0.012 <= spread <= 0.0126)
PYTHON
env/bin/python average.py 2> errors || { tail -3 errors; exit 1; }
