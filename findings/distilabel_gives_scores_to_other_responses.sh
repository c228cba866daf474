#!/usr/bin/env bash
# distilabel 1.5.3 (pydantic 2.14.4), `QualityScorer` and `ComplexityScorer` without structured output, the default: line i of the
# judge's answer is the score of response i. The number in brackets that the prompt asks for in each line is not read, and a line
# without a score counts as one. `UltraFeedback` splits answers at empty lines, in rationales too. No docstring says so. The
# project's pull request 1166 skips such lines in `QualityScorer`; this release does not have it.
#
# Expected: the score of [k] for response k, or none for all. Seen, for an answer with [1] 5, [2] 1 and [3] 3: with a line before
# them None, 5, 1; with empty lines between them 5, None, 1; with the best first 5, 3, 1. `UltraFeedback` gives 5, None, 2
# for two responses rated 5 and 2, where the first rationale has two paragraphs.
# Who is hurt: whoever builds preference or instruction data with them: scores stand at the wrong response, and only some of
# the cases show a None.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check distilabel==1.5.3 pydantic==2.14.4 requests==2.34.2 datasets==5.2.0
cat > scores.py <<'PYTHON'
import importlib.metadata
import sys

from distilabel.models.llms import LLM
from distilabel.steps.tasks import ComplexityScorer, QualityScorer, UltraFeedback


class Judge(LLM):
    @property
    def model_name(self):
        return 'none'

    def load(self):
        pass

    def generate(self, inputs, **settings):
        return []


lines = ['[1] Score: 5', '[2] Score: 1', '[3] Score: 3']
answers = {'as asked': lines, 'a line before': ['Here are the scores:', *lines], 'empty lines': '\n\n'.join(lines).split('\n'),
           'best first': [lines[0], lines[2], lines[1]]}
found = {}
for task, key in ((QualityScorer(llm=Judge()), 'responses'), (ComplexityScorer(llm=Judge()), 'instructions')):
    found[type(task).__name__] = {name: task.format_output('\n'.join(answer), {key: ['a', 'b', 'c']})['scores']
                                  for name, answer in answers.items()}
rated = 'Rating: 5\nRationale: Good.\n\nAlso clear.\n\nRating: 2\nRationale: Bad.'
ratings = UltraFeedback(llm=Judge(), aspect='overall-rating').format_output(rated, {'generations': ['a', 'b']})['ratings']
print(f'distilabel {importlib.metadata.version("distilabel")}: scores of [1] 5, [2] 1, [3] 3: {found}; UltraFeedback of 5 and 2, '
      f'a rationale in two paragraphs: {ratings}')
places = {'as asked': [5.0, 1.0, 3.0], 'a line before': [None, 5.0, 1.0], 'empty lines': [5.0, None, 1.0],
          'best first': [5.0, 3.0, 1.0]}
sys.exit(found != {'QualityScorer': places, 'ComplexityScorer': places} or ratings != [5, None, 2])
PYTHON
env/bin/python scores.py 2> errors || { tail -3 errors; exit 1; }
