#!/usr/bin/env bash
# distilabel 1.5.3 (pydantic 2.14.4), `FormatTextGenerationDPO` and `FormatChatGenerationDPO`: chosen is the first response with
# the highest rating, rejected the first with the lowest. Where all are rated the same, both are the first. Docstrings do not
# speak of ties.
#
# Expected: no pair, an error or a warning, or at least two responses. Seen, for a, b and c rated 4, 4, 4: chosen a, rejected a;
# rated 2, 5, 4: b and a.
# Who is hurt: whoever trains on what comes out: ratings from 1 to 5 of good models are often all the same, such pairs teach
# nothing, and they stand in the size of the data and in every accuracy that is measured on it.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check distilabel==1.5.3 pydantic==2.14.4 requests==2.34.2 datasets==5.2.0
cat > ties.py <<'PYTHON'
import importlib.metadata
import sys

from distilabel.steps import FormatChatGenerationDPO, FormatTextGenerationDPO

rows = [{'instruction': 'q', 'messages': [{'role': 'user', 'content': 'q'}], 'generations': ['a', 'b', 'c'], 'ratings': ratings}
        for ratings in ([4, 4, 4], [2, 5, 4])]
found = {}
for step in (FormatTextGenerationDPO(), FormatChatGenerationDPO()):
    step.load()
    found[type(step).__name__] = [(row['chosen'][-1]['content'], row['rejected'][-1]['content'])
                                  for row in next(step.process([dict(row) for row in rows]))]
print(f'distilabel {importlib.metadata.version("distilabel")}: chosen and rejected of a, b, c rated 4, 4, 4 and 2, 5, 4: {found}')
sys.exit(found != dict.fromkeys(['FormatTextGenerationDPO', 'FormatChatGenerationDPO'], [('a', 'a'), ('b', 'a')]))
PYTHON
env/bin/python ties.py 2> errors || { tail -3 errors; exit 1; }
