#!/usr/bin/env bash
# abeval 0.1.0, `abeval ci --cluster-key`: where all scores are 0 or 1, the key is not looked at, and the interval is that of
# independent answers. The README says of the key that "the interval widens to account for within-cluster correlation". There is
# no message but the name of the method, wilson, beside the interval. With `--bootstrap` the clusters count.
#
# Expected: an interval of the same width for right answers scored 1 and for right answers scored 2, apart from that factor.
# Seen, for 5 questions on each of 40 documents, all 5 right or all wrong: [.431, .569] with and without the key for scores of 0
# and 1; [.680, 1.320] for scores of 0 and 2, half of which is [.340, .660], as by the formula for clusters, and by `--bootstrap`
# with the key. A key that no answer has is not noticed either.
# Who is hurt: whoever tests by such intervals whether a rate of right answers is above a limit: in 300 runs of this kind they
# cover the true rate 171 times, not 285.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check abeval==0.1.0
cat > clusters.py <<'PYTHON'
import contextlib
import importlib.metadata
import io
import json
import math
import pathlib
import random
import statistics
import sys

from abeval.__main__ import main


def interval(scores, *options):
    rows = [{'id': f'{place}', 'score': score, 'document': place // 5} for place, score in enumerate(scores)]
    pathlib.Path('run.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main(['ci', 'run.jsonl', '--json', *options])
    result = json.loads(shown.getvalue())
    return result['lo'], result['hi']


def rounded(pair):
    return [round(bound, 3) for bound in pair]


clustered = '--cluster-key', 'document'
right = [place % 2 if place < 20 else int(place < 30) for place in range(40)]
scores = [answer for answer in right for _ in range(5)]
spread = statistics.pstdev(right) / math.sqrt(40) * 2.0227  # of Student's t with 39 degrees of freedom
found = {'no key': interval(scores), 'key': interval(scores, *clustered),
         'no such key': interval(scores, '--cluster-key', 'none'),
         'key, 0 and 2': interval([2 * score for score in scores], *clustered),
         'key, bootstrap': interval(scores, *clustered, '--bootstrap'),
         'formula': (statistics.mean(right) - spread, statistics.mean(right) + spread)}
found = {name: rounded(pair) for name, pair in found.items()}

rng, covered = random.Random(0), 0
for _ in range(300):
    low, high = interval([answer for answer in (rng.randrange(2) for _ in range(40)) for _ in range(5)], *clustered)
    covered += low <= 0.5 <= high
print(f'abeval {importlib.metadata.version("abeval")}: 95 % intervals: {found}; cover the true rate in {covered} of 300 runs')
sys.exit(found != {'no key': [0.431, 0.569], 'key': [0.431, 0.569], 'no such key': [0.431, 0.569], 'key, 0 and 2': [0.68, 1.32],
                   'key, bootstrap': [0.34, 0.66], 'formula': [0.34, 0.66]} or covered != 171)
PYTHON
env/bin/python clusters.py 2> errors || { tail -3 errors; exit 1; }
