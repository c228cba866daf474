#!/usr/bin/env bash
# judges 0.1.1 (pydantic 2.14.4), `Judgment` with score_type='likert': the grades 'good' and 'bad' become True and False, as the
# score is converted before its type is known and then taken for boolean, the default. The docstring of the conversion
# confines it to boolean scores, and the README names 'bad' and 'good' as two of the five grades.
#
# Expected: the grades as given, and verdicts of 1 to 5. Seen, for a jury of two that agree, voting by average: 'terrible' 1,
# 'bad' 3, 'average' 3, 'good' 3, 'excellent' 5. True and False are no grades, and what is none counts as average.
# Who is hurt: whoever has responses graded in words: a good one and a bad one are worth the same.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check judges==0.1.1 pydantic==2.14.4
cat > grades.py <<'PYTHON'
import importlib.metadata
import sys

from judges.base import BaseJudge, Judgment, Jury


class Grader(BaseJudge):
    def judge(self, input, output=None, expected=None):
        return Judgment(reasoning='', score=output, score_type='likert')


jury = Jury([Grader('none'), Grader('none')], voting_method='average')
found = {}
for grade in ('terrible', 'bad', 'average', 'good', 'excellent'):
    verdict = jury.vote(input='', output=grade)
    found[grade] = verdict.judgments[0].score, float(verdict.score)
print(f'judges {importlib.metadata.version("judges")}: grade of both judges -> score kept, verdict of the jury: {found}')
sys.exit(found != {'terrible': ('terrible', 1.0), 'bad': (False, 3.0), 'average': ('average', 3.0), 'good': (True, 3.0),
                   'excellent': ('excellent', 5.0)})
PYTHON
env/bin/python grades.py 2> errors || { tail -3 errors; exit 1; }
