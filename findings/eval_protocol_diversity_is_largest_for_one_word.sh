#!/usr/bin/env bash
# eval-protocol 0.3.33 (pydantic 2.14.4), `diversity_reward`, "weighted score to encourage varied vocabulary": shares of different
# n-grams of one, two and three words have weights of .2, .3 and .5. A size for which the response is too short adds 1, without
# its weight.
#
# Expected: no more than 1, the sum of the weights, which all of ten different words get. Seen: 2.2 for the single word "Yes", 1.5
# for "I agree", and 1.4 for "yes yes", which is one word twice. reward-kit 0.4.1, its predecessor, has the same code.
# Who is hurt: whoever trains a policy with it for varied language: the largest reward there is goes to responses of one word,
# more than twice that of any text.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check eval-protocol==0.3.33 pydantic==2.14.4
cat > words.py <<'PYTHON'
import importlib.metadata
import sys

from eval_protocol.rewards.repetition import diversity_reward


def weighted(text):
    """The weighted share of different n-grams among those that the response has."""
    words, total = text.lower().split(), 0.0
    shares = {size: [tuple(words[i:i + size]) for i in range(len(words) - size + 1)] for size in (1, 2, 3)}
    weights = {size: weight for size, weight in ((1, 0.2), (2, 0.3), (3, 0.5)) if shares[size]}
    for size, weight in weights.items():
        total += weight * len(set(shares[size])) / len(shares[size])
    return total / sum(weights.values())


texts = ['Yes', 'I agree', 'yes yes', 'a b c d e f g h i j', 'a b c a b c a b c']
found = {}
for text in texts:
    conversation = [{'role': 'user', 'content': 'Well?'}, {'role': 'assistant', 'content': text}]
    found[text] = round(diversity_reward(messages=conversation).score, 3), round(weighted(text), 3)
print(f'eval-protocol {importlib.metadata.version("eval-protocol")}: score, weighted mean by hand: {found}')
sys.exit(found != {'Yes': (2.2, 1.0), 'I agree': (1.5, 1.0), 'yes yes': (1.4, 0.8), 'a b c d e f g h i j': (1.0, 1.0),
                   'a b c a b c a b c': (0.393, 0.393)})
PYTHON
LITELLM_LOCAL_MODEL_COST_MAP=True env/bin/python words.py 2> errors || { tail -3 errors; exit 1; }
