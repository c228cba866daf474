#!/usr/bin/env bash
# transformers 5.24.0 (tokenizers 0.23.3): `import transformers` opens and reads the source of every model it has, and
# naming `transformers.AutoTokenizer` reads all of them once more.
#
# Expected: an import reads what it imports; names are resolved lazily, so a tokenizer costs a
# tokenizer. Seen: 1,698 .py files below transformers/models opened by the import, and the same 1,698 a
# second time by that attribute, after which 7 of these modules are imported. Python's compiled files do
# not help, as sources are read as text to find out what each of them would export.
# Who is hurt: commands that start often and need a tokenizer alone (.6 and .3 s of 2 s of imports here
# with a warm disk), and whoever starts on a cold network file system or an image whose layers are
# fetched on demand, where each open is a round trip.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 \
  tokenizers==0.23.3 huggingface_hub==2.4.0
cat > count.py <<'PYTHON'
import os
import sys

opened = []


def note(event, args):
    if event == 'open' and isinstance(args[0], str) and args[0].endswith('.py'):
        opened.append(args[0])


sys.addaudithook(note)
import transformers

models = os.path.join(os.path.dirname(transformers.__file__), 'models', '')
first = [path for path in opened if path.startswith(models)]
opened.clear()
transformers.AutoTokenizer
second = [path for path in opened if path.startswith(models)]
imported = {module.__file__ for name, module in list(sys.modules.items())
            if name.startswith('transformers.models.') and getattr(module, '__file__', None)}
print(f'transformers {transformers.__version__}: {len(set(first))} sources of models opened by the '
      f'import, {len(set(second) & set(first))} of them again for AutoTokenizer; '
      f'{len(imported)} modules of models are imported')
sys.exit(not (len(set(first)) > 1000 and len(set(second) & set(first)) > 1000
              and len(imported) < 100))
PYTHON
HF_HUB_OFFLINE=1 env/bin/python count.py
