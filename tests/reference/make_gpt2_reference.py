"""Makes the GPT-2 reference of this folder with PyTorch and `transformers`.

    python tests/reference/make_gpt2_reference.py

It writes, next to this file, a tiny `GPT2ForSequenceClassification` with 10 outputs in the
Hugging Face layout (config.json, model.safetensors) and `gpt2.npz`: inputs and the outputs of
every module in float32. Parameters are random in all places, so that no norm or bias is trivial.
The tests need only the files. The numbers are reproducible up to rounding.
"""

import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
EOS, PAD = 38, 39
PROMPT = [3, 14, 15, 9, 2]
FIRST = [6, 5, 35, 8, 9, 7, EOS]
SECOND = [27, 18, 28, EOS]
OTHER = [1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, EOS]


def main():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=24, n_embd=16, n_layer=3, n_head=4, num_labels=10,
        pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
    )
    model = transformers.GPT2ForSequenceClassification._from_config(
        config, attn_implementation='eager').eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if 'wte' in name or 'wpe' in name or 'score' in name:
                parameter.mul_(3.0)
    model.save_pretrained(FOLDER)

    # Two dialogues with a common prompt, the second padded, and one at later positions.
    short = PROMPT + SECOND
    tokens = torch.tensor(
        [PROMPT + FIRST, short + [PAD] * (len(OTHER) - len(short)), OTHER])
    lengths = np.array([len(OTHER), len(short), len(OTHER)], np.int32)
    attended = torch.arange(len(OTHER))[None] < torch.tensor(lengths)[:, None]
    positions = torch.arange(len(OTHER))[None] + torch.tensor([[0], [0], [7]])

    arrays = {}

    def record(module, name):
        def hook(_, inputs, output):
            output = output[0] if isinstance(output, tuple) else output  # attention: (x, weights)
            arrays[name] = output.numpy().copy()
        module.register_forward_hook(hook)

    decoder = model.transformer
    record(decoder.drop, 'embedding')
    record(decoder.ln_f, 'output')
    for i, block in enumerate(decoder.h):
        record(block.ln_1, f'norm_{i}')
        record(block.attn, f'attention_{i}')
        record(block.ln_2, f'second_norm_{i}')
        record(block.mlp, f'mlp_{i}')
        record(block, f'block_{i}')
    with torch.no_grad():
        pooled = model(tokens, attention_mask=attended.long(), position_ids=positions).logits
        arrays['normed_embedding'] = torch.nn.functional.layer_norm(
            torch.tensor(arrays['embedding']), (config.n_embd,), decoder.ln_f.weight,
            decoder.ln_f.bias, config.layer_norm_epsilon).numpy()
        arrays['rewards_10'] = pooled.numpy()
        # The same decoder with one output.
        scalar = torch.nn.Linear(config.n_embd, 1, bias=False)
        model.score, model.num_labels = scalar, 1
        arrays['score_1'] = scalar.weight.numpy()
        arrays['rewards_1'] = model(
            tokens, attention_mask=attended.long(), position_ids=positions).logits.numpy()
    arrays |= {
        'tokens': tokens.numpy().astype(np.int32),
        'positions': positions.numpy().astype(np.int32),
        'lengths': lengths,
    }
    np.savez_compressed(FOLDER / 'gpt2.npz', **arrays)


if __name__ == '__main__':
    main()
