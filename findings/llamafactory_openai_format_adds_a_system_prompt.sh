#!/usr/bin/env bash
# llamafactory 0.9.5, data sets with "formatting": "openai": "detailed thinking off" is put at the end of each system prompt, and
# is the system prompt where there was none, unless the row has tools; then a prompt that is there gets a line break. The same
# rows with "sharegpt" and the tags of the OpenAI format stay as they are. The words are a switch of some reasoning models; they
# are added for all, and no log line or option names them.
#
# Expected: the system prompt of the row, as with "sharegpt". Seen, for preference pairs and plain conversations alike: '' becomes
# 'detailed thinking off', 'Be brief.' becomes 'Be brief.\ndetailed thinking off', and with tools 'Be brief.\n'. All else of the
# converted rows is equal.
# Who is hurt: whoever trains with this format: the model learns under a prompt that it does not get in use, and templates with a
# default system prompt lose it. Whoever mixes formats, trains one part with the words and one without.
#
# PyTorch is left out: the converter is loaded from the release without the package's start, and two files with names of models
# and checks of devices are replaced by mocks.
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check --no-deps llamafactory==0.9.5
env/bin/pip install --quiet --disable-pip-version-check datasets==4.0.0
cat > formats.py <<'PYTHON'
import importlib.metadata
import sys
import types
from unittest.mock import MagicMock

dist = importlib.metadata.distribution('llamafactory')
for name in ('llamafactory', 'llamafactory.data', 'llamafactory.extras'):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(dist.locate_file(name.replace('.', '/')))]
for name in ('constants', 'misc'):
    sys.modules[f'llamafactory.extras.{name}'] = MagicMock()
from llamafactory.data.converter import get_dataset_converter
from llamafactory.data.parser import get_dataset_list

tags = {'role_tag': 'role', 'content_tag': 'content', 'user_tag': 'user', 'assistant_tag': 'assistant', 'system_tag': 'system',
        'observation_tag': 'tool', 'function_tag': 'function_call'}
columns = {'messages': 'messages', 'tools': 'tools'}
question, yes, no = [{'role': role, 'content': text} for role, text in (
    ('user', 'Is it?'), ('assistant', 'Yes.'), ('assistant', 'No.'))]
tools = '[{"name": "look", "description": "", "parameters": {}}]'


def converted(formatting, ranking, system, tools):
    info = {'file_name': 'rows.json', 'formatting': formatting, 'ranking': ranking, 'tags': tags,
            'columns': columns | ({'chosen': 'chosen', 'rejected': 'rejected'} if ranking else {})}
    (attributes,) = get_dataset_list(['rows'], {'rows': info})
    row = {'messages': [{'role': 'system', 'content': system}] * bool(system) + [question], 'tools': tools}
    if ranking:
        row |= {'chosen': yes, 'rejected': no}
    else:
        row['messages'].append(yes)
    return get_dataset_converter(formatting, attributes, None)(row)


found = {}
for case in [(ranking, system, has) for ranking in (True, False) for system in ('', 'Be brief.') for has in ('', tools)]:
    rows = {formatting: converted(formatting, *case) for formatting in ('sharegpt', 'openai')}
    systems = [row.pop('_system') for row in rows.values()]
    assert rows['sharegpt'] == rows['openai']  # all but the system prompt
    found[case] = systems
    print(f'llamafactory {importlib.metadata.version("llamafactory")}: ranking {case[0]}, system {case[1]!r}, tools '
          f'{bool(case[2])}: by sharegpt {systems[0]!r}, by openai {systems[1]!r}')
expected = {('', ''): ['', 'detailed thinking off'], ('Be brief.', ''): ['Be brief.', 'Be brief.\ndetailed thinking off'],
            ('', tools): ['', ''], ('Be brief.', tools): ['Be brief.', 'Be brief.\n']}
sys.exit(any(systems != expected[case[1:]] for case, systems in found.items()))
PYTHON
env/bin/python formats.py 2> errors || { tail -3 errors; exit 1; }
