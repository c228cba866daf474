#!/usr/bin/env bash
# trl 0.23.0 with transformers 5.24.0, which it allows (`transformers>=4.56.1`, no upper bound) and pip therefore
# installs: every `is_..._available()` of trl is true, whatever is installed. A helper of transformers that trl asks
# returns (False, ...) since version 5, and a tuple with something in it is true.
#
# Expected: `is_mergekit_available()` is False without mergekit, or pip refuses the pair. Seen: all optional packages
# are taken for installed, and `from trl import DPOTrainer` fails with "No module named 'mergekit'", a package that
# nobody asked for. With transformers 4.57.6 both are right.
# Who is hurt: whoever installs a package that pins trl 0.23, such as rewarduq 0.1.0: it cannot be imported, and
# installing mergekit only leads to the next name.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 trl==0.23.0 transformers==5.24.0
cat > available.py <<'PYTHON'
import importlib.util
import sys

import transformers
import trl
from trl import import_utils

missing = [name for name in ('mergekit', 'vllm', 'deepspeed', 'unsloth')
           if importlib.util.find_spec(name) is None]
taken = [name for name in missing
         if (ask := getattr(import_utils, f'is_{name}_available', None)) and ask()]
try:
    from trl import DPOTrainer
    problem = ''
except Exception as error:
    problem = str(error).splitlines()[-1]
print(f'trl {trl.__version__}, transformers {transformers.__version__}: not installed {missing}, taken for installed '
      f'{taken}; from trl import DPOTrainer: {problem or "works"}')
sys.exit(not ('mergekit' in taken and "No module named 'mergekit'" in problem))
PYTHON
env/bin/python available.py 2> errors || { cat errors; exit 1; }
