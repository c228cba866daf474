"""Makes `padded.npz`: what transformers 4.30.2, which the paper's code names, gives padded rows.

    python tests/reference/make_padded.py

The model is that of `config.json` and `model.safetensors`. Rows are padded on the left with EOS,
which the mask hides also where it ends a dialogue, as in min-seong-kim/QR-RLHF; `outputs` are
those of the classifier at every position [R, L, 10]. Made with PyTorch 2.13; the tests need only
the file.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

FOLDER = pathlib.Path(__file__).parent
EOS = 38
DIALOGUES = [[3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, EOS], [27, 18, EOS], [1, 4, 1, 5, 9, 2, EOS],
             [3, 14, 15, EOS]]


def main():
    assert transformers.__version__ == '4.30.2', transformers.__version__
    settings = json.loads((FOLDER / 'config.json').read_text())
    known = ('n_embd', 'n_layer', 'n_head', 'n_positions', 'vocab_size', 'layer_norm_epsilon')
    model = transformers.GPT2Model(transformers.GPT2Config(**{key: settings[key] for key in known}))
    state = load_file(str(FOLDER / 'model.safetensors'))
    head = state.pop('score.weight')
    missing, unexpected = model.load_state_dict(
        {key.removeprefix('transformer.'): value for key, value in state.items()}, strict=False)
    assert not unexpected
    assert all('attn.' in key and key.endswith('bias') for key in missing)
    width = max(map(len, DIALOGUES))
    tokens = torch.tensor([[EOS] * (width - len(ids)) + ids for ids in DIALOGUES])
    with torch.no_grad():
        hidden = model.eval()(input_ids=tokens, attention_mask=tokens.ne(EOS)).last_hidden_state
    np.savez_compressed(FOLDER / 'padded.npz', tokens=tokens.numpy().astype(np.int32),
                        outputs=(hidden @ head.T).numpy())


if __name__ == '__main__':
    main()
