#!/usr/bin/env bash
# eval-protocol 0.3.33 (pydantic 2.14.4), `accuracy_reward`, whose `compare_math_expressions` is to compare two expressions for
# equivalence by its docstring: points and commas are removed from both first, as punctuation, and so are those of decimals.
#
# Expected: 1 for an equal number, and less for one ten times as large. Seen: "The answer is 1.5" gets 1 against 15, as do .25
# against 25 and 3.75 against 37.5, where 14 gets .5 against 15. "The answer is 12" gets 0 against 12.0, which is read as
# 120, and 1/2 gets 0 against 0.5. 314 gets 1 against 3140, as both begin like pi. reward-kit 0.4.1, its predecessor, has
# the same code.
# Who is hurt: whoever trains on it or measures accuracy by it: answers that are wrong by powers of ten get full marks, and
# right ones with other decimals none.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check eval-protocol==0.3.33 pydantic==2.14.4
cat > decimals.py <<'PYTHON'
import importlib.metadata
import sys

from eval_protocol.rewards.accuracy import accuracy_reward


def reward(answer, truth):
    conversation = [{'role': 'user', 'content': 'How many?'}, {'role': 'assistant', 'content': f'The answer is {answer}'}]
    return accuracy_reward(messages=conversation, ground_truth=[{'role': 'assistant', 'content': truth}]).score


pairs = [('15', '15'), ('1.5', '1.5'), ('14', '15'), ('1.5', '15'), ('15', '1.5'), ('0.25', '25'), ('3.75', '37.5'),
         ('314', '3140'), ('12', '12.0'), ('1/2', '0.5')]
found = {f'{answer} for {truth}': reward(answer, truth) for answer, truth in pairs}
print(f'eval-protocol {importlib.metadata.version("eval-protocol")}: reward of an answer: {found}')
sys.exit(list(found.values()) != [1, 1, 0.5, 1, 1, 1, 1, 1, 0, 0])
PYTHON
LITELLM_LOCAL_MODEL_COST_MAP=True env/bin/python decimals.py 2> errors || { tail -3 errors; exit 1; }
