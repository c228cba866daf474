#!/usr/bin/env bash
# lighteval 0.13.0 (torch 2.13.0, CPU), `_stderr` of the metrics of a whole corpus: perplexities, bits per byte, BLEU, chrF, TER,
# F1 and MCC. As the docstring of `bootstrap_stderr` says, the score is recomputed on `bootstrap_iters` resamples, 1,000 by
# default; but the standard deviation of these is then divided by the root of their number, as if it were that of single answers.
#
# Expected: the standard deviation of the resampled scores, which more resamples make steadier, not smaller. Seen, for bits per
# byte of 50 texts of 50 bytes each, where the score is a mean and its error has a closed form, .0731: .00740, .00221 and .00112
# with 100, 1,000 and 4,000 resamples, 10, 33 and 65 times less.
# Who is hurt: whoever tells models apart by these errors: by default a difference of a tenth of the true error looks like three.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 lighteval==0.13.0 transformers==5.24.0 \
    inspect-ai==0.3.285 datasets==5.2.0 huggingface-hub==2.4.0 sacrebleu==2.6.0 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
cat > draws.py <<'PYTHON'
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

logprobs = -np.random.default_rng(0).gamma(4, 10, 50)
docs = [Doc(query=50 * 'x', choices=[], gold_index=0) for _ in logprobs]
responses = [ModelResponse(logprobs=[float(value)]) for value in logprobs]
task = LightevalTask(LightevalTaskConfig(name='text', prompt_function=lambda line, name: None, hf_repo='none', hf_subset='none',
                                         metrics=[Metrics.bits_per_byte]))
found, scores = {}, set()
for draws in (100, 1000, 4000):
    logger = MetricsLogger()
    for result in apply_metric(responses=responses, docs=docs, metrics=task.metrics):
        logger.log('text|0', result)
    logger.aggregate({'text|0': task}, bootstrap_iters=draws)
    found[draws] = float(logger.metric_aggregated['text|0']['bits_per_byte_stderr'])
    scores.add(float(logger.metric_aggregated['text|0']['bits_per_byte']))
bits = -logprobs / 50 / math.log(2)
error = float(bits.std(ddof=1)) / math.sqrt(50)
times = [round(error / value) for value in found.values()]
print(f'lighteval {importlib.metadata.version("lighteval")}: bits per byte {scores}, directly {bits.mean()}; standard errors by '
      f'draws: {found}; in closed form {error}, which is {times} times as much')
sys.exit(len(scores) != 1 or abs(scores.pop() - bits.mean()) > 1e-9 or times != [10, 33, 65] or round(error, 4) != 0.0731)
PYTHON
LIGHTEVAL_DISABLE_TQDM=1 env/bin/python draws.py 2> errors || { tail -3 errors; exit 1; }
