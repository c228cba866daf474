#!/usr/bin/env bash
# easydel 0.3.0 (transformers 5.5.4, jax 0.9.2) needs PyTorch to name any of its JAX models, and does not ask for it: torch is an
# extra. All families are imported when one is asked for; that of GLM-4V-MoE looks into a class of transformers that is a stand-in
# where torch is missing, and raises ImportError when it is looked into.
#
# Expected: `easydel.LlamaConfig` is a class, as after `pip install torch`. Seen: RuntimeError, which names torch and GLM-4V-MoE.
# Who is hurt: whoever installs the package as it stands, for a model that has nothing to do with either.
#
# Needs Python 3.11 to 3.13 and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check easydel==0.3.0 transformers==5.5.4 jax==0.9.2 jaxlib==0.9.2
cat > name.py <<'PYTHON'
import importlib.util
import sys
from importlib.metadata import version

import easydel

assert importlib.util.find_spec('torch') is None
try:
    easydel.LlamaConfig
except RuntimeError as error:
    lines = [line for line in str(error).splitlines() if 'PyTorch' in line]
    print(f'easydel {version("easydel")}: LlamaConfig: {lines[0]}')
    sys.exit('glm4v_moe' not in lines[0])
sys.exit('easydel.LlamaConfig is there without torch')
PYTHON
JAX_PLATFORMS=cpu env/bin/python name.py 2> errors | tail -1 || { tail -3 errors; exit 1; }
