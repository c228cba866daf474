"""Makes `samples.json`: what `generate` of transformers continues prompts with.

    python tests/reference/make_samples.py

The models are the references of this folder, of all decoders. Of each, prompts of several lengths,
the longest beyond every window, each alone, are continued greedily up to EOS or 8 tokens: `tokens`
with the logarithm of their probabilities, `log_probs`. `filtered` are the probabilities of the
first token of the last prompt as the warpers of transformers leave them (temperature, top-k, then
top-p). Made with transformers 5.24 and PyTorch 2.13; the tests need only the file.
"""

import json

import numpy as np
import torch
import transformers
from make_references import FOLDER, SETTINGS, _classes

MOST = 8
FILTERS = {'temperature': 0.7, 'top_k': 9, 'top_p': 0.8}


def main():
    found = {}
    for name in ['gpt2', *SETTINGS]:
        _, _, decoder = _classes(name)
        if decoder is not None:
            folder = FOLDER if name == 'gpt2' else FOLDER / name
            found[name] = make(decoder.from_pretrained(folder, attn_implementation='eager').eval())
    with open(FOLDER / 'samples.json', 'w', encoding='utf-8') as file:
        json.dump(found, file)
        file.write('\n')


def make(model):
    """What is known of one model, ready for JSON."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 29, size).tolist() for size in (1, 4, 6, 9, 16)]
    result = {'prompts': prompts, 'tokens': [], 'log_probs': []}
    for prompt in prompts:
        with torch.no_grad():
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=MOST, return_dict_in_generate=True,
                                 output_logits=True)
        tokens = out.sequences[0, len(prompt):]
        log_probs = torch.cat(out.logits).log_softmax(-1)
        result['tokens'].append(tokens.tolist())
        result['log_probs'].append(log_probs[range(len(tokens)), tokens].tolist())
    scores = out.logits[0]
    for warper in (transformers.TemperatureLogitsWarper(FILTERS['temperature']),
                   transformers.TopKLogitsWarper(FILTERS['top_k']),
                   transformers.TopPLogitsWarper(FILTERS['top_p'])):
        scores = warper(None, scores)
    return result | {'filtered': scores.softmax(-1)[0].tolist(), 'filters': FILTERS}


if __name__ == '__main__':
    main()
