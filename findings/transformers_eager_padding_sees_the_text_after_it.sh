#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU): in a causal model with left padding the hidden state at a padded
# position depends on the text that comes after it if attention is eager, and does not if it is SDPA. Where
# all of a row of the mask is masked, the softmax is one of equal numbers, and the padding averages over
# later tokens too. (4.30.2, whose GPT-2 has eager attention alone, does it as well.)
#
# Expected: a masked position holds nothing, or nothing of the future, and both implementations agree. Seen:
# another last token changes the padding before it by .06 to .08 eagerly, by 0 with SDPA; the text between
# stays as it is in both.
# Who is hurt: whoever reads a left-padded batch at a column counted from its left edge, such as the sum of
# the attention mask less 1, a slip that reward models are known to make. Most of those columns are padding.
# Eagerly their rewards follow the dialogue and look as if they worked; with SDPA, so with another setting,
# version or machine, they are the same for every dialogue.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 \
  tokenizers==0.23.3 huggingface_hub==2.4.0 torch==2.13.0
cat > padding.py <<'PYTHON'
import sys

import torch
import transformers

config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16,
                                 bos_token_id=49, eos_token_id=49)
rows = torch.tensor([[49, 49, 49, 1, 2, 3], [49, 49, 49, 1, 2, 7]])  # 49 pads; the last token differs


def changes(kind):
    """Largest change of each position's hidden state by another last token."""
    torch.manual_seed(0)
    model = transformers.GPT2Model._from_config(config, attn_implementation=kind).eval()
    with torch.no_grad():
        hidden = model(input_ids=rows, attention_mask=rows.ne(49).long()).last_hidden_state
    return (hidden[0] - hidden[1]).abs().amax(-1).tolist()


eager, sdpa = changes('eager'), changes('sdpa')
print(f'transformers {transformers.__version__}, torch {torch.__version__}: another last token changes three '
      f'padded, two earlier and the last position by {[round(x, 3) for x in eager]} eagerly, by '
      f'{[round(x, 3) for x in sdpa]} with SDPA')
sees = min(eager[:3]) > 1e-3 and max(sdpa[:3]) == 0
causal = max(eager[3:5] + sdpa[3:5]) == 0 and min(eager[5], sdpa[5]) > 0.1
sys.exit(not (sees and causal))
PYTHON
HF_HUB_OFFLINE=1 env/bin/python padding.py 2>/dev/null
