#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU): Gemma 3 has the setting attn_logit_softcapping, its documentation
# says what it does, the attention gets it as an attribute, and nothing applies it: hidden states are the same
# with a cap of 0.5, of 50 and without one. Gemma 2, of which the code is a copy, applies it.
#
# Expected: a cap, or an error as for attention implementations that have none. Seen: bit for bit the same
# numbers in eager attention for gemma3_text, and differences of the order of the numbers for gemma2.
# Who is hurt: whoever trains with the cap elsewhere and serves the weights with
# transformers, or sets it for stability and believes to have it.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 \
  tokenizers==0.23.3 huggingface_hub==2.4.0 torch==2.13.0
cat > cap.py <<'PYTHON'
import sys

import torch
import transformers

sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=1, initializer_range=1.0,
             max_position_embeddings=32, attn_implementation='eager')
tokens = torch.arange(12)[None]


def change(config, model):
    """Largest change of a hidden state by a cap of 0.5, for the same weights."""
    outputs = []
    for cap in (None, 0.5):
        torch.manual_seed(0)
        network = model(config(attn_logit_softcapping=cap, **sizes)).eval()
        with torch.no_grad():
            outputs.append(network(tokens).last_hidden_state)
    return float((outputs[0] - outputs[1]).abs().max())


second = change(transformers.Gemma2Config, transformers.Gemma2Model)
third = change(transformers.Gemma3TextConfig, transformers.Gemma3TextModel)
print(f'transformers {transformers.__version__}, torch {torch.__version__}: an attention cap of 0.5 changes '
      f'Gemma 2 by {second:.3f} and Gemma 3 by {third}')
sys.exit(not (second > 0.1 and third == 0.0))
PYTHON
HF_HUB_OFFLINE=1 env/bin/python cap.py 2>/dev/null
