#!/usr/bin/env bash
# transformers 5.24.0 (tokenizers 0.23.3): in a folder whose config.json says model_type qwen2, AutoTokenizer
# keeps the vocabulary of tokenizer.json and nothing else of it, whatever tokenizer_class says: texts are
# split by Qwen's rules, and a token is added with an id that the model's embedding may not have.
#
# Expected: what save_pretrained of a tokenizer wrote is read back as it was; it is for llama, qwen3 and others.
# Seen: of a byte-level BPE that joins two digits, '12' comes back as '1', '2', and <|endoftext|> is new, one
# id past the vocabulary; no warning. PreTrainedTokenizerFast reads the same folder right.
# Who is hurt: whoever trains or distils a Qwen 2 model with a tokenizer of their own. Scores and losses are
# those of other tokens than the model was trained on, in every program that uses AutoTokenizer.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 \
  tokenizers==0.23.3 huggingface_hub==2.4.0
cat > read.py <<'PYTHON'
import json
import sys

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
bpe = tokenizers.Tokenizer(models.BPE(
    vocab={name: i for i, name in enumerate([*bytes_, '12'])}, merges=[('1', '2')]))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
own = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
own.save_pretrained('folder')
text, seen = 'a12 b', {}
for family in ('llama', 'qwen3', 'qwen2'):
    with open('folder/config.json', 'w') as file:
        json.dump({'model_type': family}, file)
    read = transformers.AutoTokenizer.from_pretrained('folder')
    plain = transformers.PreTrainedTokenizerFast.from_pretrained('folder')
    assert plain.tokenize(text) == own.tokenize(text) and len(plain) == len(own)
    seen[family] = read.tokenize(text), len(read)
    print(f'transformers {transformers.__version__}, {family}: {type(read).__name__}, '
          f'{read.tokenize(text)}, {len(read)} tokens; written: {own.tokenize(text)}, {len(own)}')
same = own.tokenize(text), len(own)
sys.exit(not (seen['llama'] == seen['qwen3'] == same
              and seen['qwen2'] == (['a', '1', '2', 'Ġ', 'b'], len(own) + 1)))
PYTHON
HF_HUB_OFFLINE=1 env/bin/python read.py 2>/dev/null
