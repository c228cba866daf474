#!/usr/bin/env bash
# axolotl 0.19.0, DPO data of type `zephyr.nectar`: of the answers sorted by rank the last is chosen and the last but one
# rejected. In the Nectar data set, which the type is for, rank 1 is the best of seven (open-instruct's `nectar.py` sorts alike
# and chooses one of the first four), so that the worst answer is preferred to the second worst. No option turns it.
#
# Expected: rank 1 chosen and a worse one rejected; at least no worse one preferred. Seen, for 1152 rows with 2 to 7 answers in
# many orders: with n answers rank n is chosen and rank n - 1 rejected in each row, so that all pairs are the wrong way round.
# Who is hurt: whoever trains on Nectar, or on rankings written like it: losses and margins look as always, and the model learns
# to give the answer that was ranked last.
#
# PyTorch is left out: of the package one file, for processes of a run, is replaced by a line. All else is the release.
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check --no-deps axolotl==0.19.0
env/bin/pip install --quiet --disable-pip-version-check transformers==5.16.1 datasets==4.8.4 colorama==0.4.6 addict==2.4.0
cat > nectar.py <<'PYTHON'
import importlib.metadata
import itertools
import sys
import types

sys.modules['axolotl.utils.distributed'] = types.SimpleNamespace(is_main_process=lambda *_, **__: True)
from axolotl.prompt_strategies.dpo import load

convert = load('zephyr.nectar', {'datasets': [{}]})
pairs, rows, wrong = set(), 0, 0
for n in range(2, 8):
    for order in itertools.islice(itertools.permutations(range(1, n + 1)), 500):
        answers = [{'answer': f'Answer of rank {rank}.', 'model': 'm', 'rank': float(rank)} for rank in order]
        row = convert({'prompt': '\n\nHuman: Why is the sky blue?\n\nAssistant: ', 'answers': answers})
        rank = {a['answer']: a['rank'] for a in answers}
        rows += 1
        wrong += rank[row['chosen']] > rank[row['rejected']]
        pairs.add((n, int(rank[row['chosen']]), int(rank[row['rejected']])))
print(f'axolotl {importlib.metadata.version("axolotl")}: answers, rank chosen, rank rejected: {sorted(pairs)}; wrong way round '
      f'{wrong} of {rows}')
sys.exit(not (pairs == {(n, n, n - 1) for n in range(2, 8)} and wrong == rows == 1152))
PYTHON
env/bin/python nectar.py 2> errors || { tail -3 errors; exit 1; }
