"""Makes the references of this folder with PyTorch and `transformers`.

    python tests/reference/make_references.py [FAMILY ...]

A reference is a tiny sequence classifier in the Hugging Face layout (config.json and
model.safetensors) with numbers of `transformers` in float32, made with transformers 5.17 and
PyTorch 2.13. The tests need only the files. The numbers are reproducible up to rounding.

GPT-2's is the oldest and stands in this folder itself, with `gpt2.npz`: inputs and the outputs of
every module, of padded rows. Every family, GPT-2 too, has a folder with

    numbers.npz             tokens of three dialogues one after the other (the first two begin with
                            the same prompt), `lengths`; what goes into the first block, what every
                            block and the final norm give, and what the modules of the second block
                            give, for each of these tokens; rewards; logits of a language model
    gradients.safetensors   of sum(outgoing * rewards), under the names of the parameters

Each dialogue is computed alone, so nothing here depends on padding or on neighbours. Parameters are
random in all places, so that no norm or bias is trivial, and settings are such that every branch of
a family matters: few key and value heads, windows shorter than the dialogues, low caps, large
epsilons, rotary positions of several wavelengths and scalings.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors import torch as safetensors_torch

FOLDER = pathlib.Path(__file__).parent
EOS, PAD = 38, 39
PROMPT = [3, 14, 15, 9, 2]
FIRST = [6, 5, 35, 8, 9, 7, EOS]
SECOND = [27, 18, 28, EOS]
OTHER = [1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, EOS]

VOCABULARY = 32
OUTPUTS = 3
BLOCK = 1  # whose modules are recorded; ModernBERT's first lacks a norm

_PLAIN = dict(
    vocab_size=VOCABULARY, intermediate_size=20, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=24, num_labels=OUTPUTS, pad_token_id=31, bos_token_id=29,
    eos_token_id=30)
# Heads are together as wide as the model, or wider.
_NARROW = _PLAIN | dict(hidden_size=16)
_GROUPED = _NARROW | dict(num_key_value_heads=2, rms_norm_eps=1e-3)
_WIDE = _PLAIN | dict(hidden_size=12, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-3)
_ROTARY = {'rope_type': 'default', 'rope_theta': 100.0}
_LINEAR = {'rope_type': 'linear', 'rope_theta': 30.0, 'factor': 2.5}

SETTINGS = {
    # Of the wavelengths 6.3, 16.7, 44.4 and 118 the first is below 32 / 4, the last two above 32.
    'llama': _WIDE | dict(
        attention_bias=True, mlp_bias=True, rope_parameters={
            'rope_type': 'llama3', 'rope_theta': 50.0, 'factor': 4.0, 'low_freq_factor': 1.0,
            'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}),
    'mistral': _WIDE | dict(sliding_window=5, rope_parameters=_ROTARY),
    'qwen2': _GROUPED | dict(
        use_sliding_window=True, sliding_window=4, max_window_layers=1, rope_parameters=_ROTARY,
        tie_word_embeddings=True),
    'qwen3': _WIDE | dict(
        attention_bias=True, use_sliding_window=True, sliding_window=3, max_window_layers=2,
        rope_parameters=_LINEAR, tie_word_embeddings=True),
    'gemma2': _WIDE | dict(
        sliding_window=4, query_pre_attn_scalar=5, attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5, rope_parameters=_ROTARY),
    'gemma3_text': _WIDE | dict(
        sliding_window=4, query_pre_attn_scalar=5, attention_bias=True,
        layer_types=['full_attention', *['sliding_attention'] * 2, 'full_attention'],
        rope_parameters={'sliding_attention': {'rope_type': 'default', 'rope_theta': 10.0},
                         'full_attention': _LINEAR}),
    'olmo2': _GROUPED | dict(attention_bias=True, rope_parameters=_ROTARY),
    'bert': {key: value for key, value in _NARROW.items()
             if not key.startswith(('bos', 'eos'))} | dict(layer_norm_eps=1e-3),
    'modernbert': _NARROW | dict(
        cls_token_id=29, sep_token_id=30, local_attention=6, norm_eps=1e-3, norm_bias=True,
        attention_bias=True, mlp_bias=True, classifier_bias=True, rope_parameters={
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 10.0},
            'full_attention': _ROTARY}),
}
# Names of classes, where they are not all alike; and of the modules of a block, in order.
_NAMES = {'gemma3_text': ('Gemma3TextConfig', 'Gemma3TextForSequenceClassification',
                          'Gemma3ForCausalLM'),
          'gpt2': ('GPT2Config', 'GPT2ForSequenceClassification', 'GPT2LMHeadModel')}
_LLAMA = {'attention_norm': 'input_layernorm', 'attention': 'self_attn',
          'mlp_norm': 'post_attention_layernorm', 'mlp': 'mlp'}
_GEMMA = {'attention_norm': 'input_layernorm', 'attention': 'self_attn',
          'attention_out_norm': 'post_attention_layernorm',
          'mlp_norm': 'pre_feedforward_layernorm', 'mlp': 'mlp',
          'mlp_out_norm': 'post_feedforward_layernorm'}
_MODULES = {
    'gpt2': {'attention_norm': 'ln_1', 'attention': 'attn', 'mlp_norm': 'ln_2', 'mlp': 'mlp'},
    'gemma2': _GEMMA,
    'gemma3_text': _GEMMA,
    'olmo2': {'attention': 'self_attn', 'attention_out_norm': 'post_attention_layernorm',
              'mlp': 'mlp', 'mlp_out_norm': 'post_feedforward_layernorm'},
    'bert': {'attention': 'attention.output.dense',
             'attention_out_norm': 'attention.output.LayerNorm', 'mlp': 'output.dense',
             'mlp_out_norm': 'output.LayerNorm'},
    'modernbert': {'attention_norm': 'attn_norm', 'attention': 'attn', 'mlp_norm': 'mlp_norm',
                   'mlp': 'mlp'},
}
_BLOCKS = {'gpt2': 'h', 'bert': 'encoder.layer'}
_NORMS = {'gpt2': 'ln_f', 'bert': None, 'modernbert': 'final_norm'}


def main():
    for name in sys.argv[1:] or ['gpt2', *SETTINGS]:
        if name == 'gpt2':
            make_gpt2()
            folder, prompt, first, second, other = FOLDER, PROMPT, FIRST, SECOND, OTHER
        else:
            folder = FOLDER / name
            make_classifier(name, folder)
            # An encoder's first token is the one that is read.
            start = [29] if name in ('bert', 'modernbert') else []
            prompt = [*start, 3, 14, 15, 9]
            first, second = [6, 5, 27, 8, 9, 7, 26, 30], [27, 18, 28, 1, 30]
            other = [*start, 4, 1, 5, 9, 2, 6, 5, 3, 30]
        make_numbers(name, folder, [prompt + first, prompt + second, other])


def make_classifier(name, folder):
    """Writes a random classifier, and the output embedding of a language model that has its own."""
    torch.manual_seed(sorted(SETTINGS).index(name))
    config_class, classifier, _ = _classes(name)
    config = config_class(**SETTINGS[name])
    model = classifier._from_config(config, attn_implementation='eager')
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif 'embed' not in path:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                # Gemma multiplies its embedding by sqrt(D).
                parameter.copy_(noise / (config.hidden_size ** 0.5 if 'gemma' in name else 1.0))
    model.save_pretrained(folder)
    if not config.tie_word_embeddings:
        path = folder / 'model.safetensors'
        output = torch.randn(config.vocab_size, config.hidden_size) / config.hidden_size ** 0.5
        safetensors_torch.save_file(
            safetensors_torch.load_file(path) | {'lm_head.weight': output}, path,
            metadata={'format': 'pt'})


def make_numbers(name, folder, dialogues):
    """Writes numbers and gradients of the classifier in a folder."""
    _, classifier, language_model = _classes(name)
    model = classifier.from_pretrained(folder, attn_implementation='eager').eval()
    blocks = model.base_model.get_submodule(_BLOCKS.get(name, 'layers'))
    found = {}

    def keep(key, x):
        x = x[0] if isinstance(x, tuple) else x  # attention: (x, weights)
        found.setdefault(key, []).append(x.detach().numpy()[0].copy())

    def record(module, key):
        module.register_forward_hook(lambda _, inputs, output: keep(key, output))

    blocks[0].register_forward_pre_hook(
        lambda _, inputs, named: keep('embedding', (*inputs, *named.values())[0]),
        with_kwargs=True)
    for i, block in enumerate(blocks):
        record(block, f'block_{i}')
    for key, path in _MODULES.get(name, _LLAMA).items():
        record(blocks[BLOCK].get_submodule(path), key)
    if norm := _NORMS.get(name, 'norm'):
        record(model.base_model.get_submodule(norm), 'output')

    rewards = torch.cat([model(torch.tensor([dialogue])).logits for dialogue in dialogues])
    rng = np.random.default_rng(0)
    outgoing = rng.normal(size=rewards.shape).astype(np.float32)
    (rewards * torch.tensor(outgoing)).sum().backward()
    numbers = {key: np.concatenate(parts) for key, parts in found.items()} | {
        'tokens': np.concatenate(dialogues).astype(np.int32),
        'lengths': np.array([len(dialogue) for dialogue in dialogues], np.int32),
        'rewards': rewards.detach().numpy(), 'outgoing': outgoing}
    if language_model is not None:
        decoder = language_model.from_pretrained(folder, attn_implementation='eager').eval()
        with torch.no_grad():
            numbers['logits'] = np.concatenate([
                decoder(torch.tensor([dialogue])).logits[0].numpy() for dialogue in dialogues])
    own = FOLDER / name
    own.mkdir(exist_ok=True)
    np.savez_compressed(own / 'numbers.npz', **numbers)
    safetensors_torch.save_file(
        {path: parameter.grad for path, parameter in model.named_parameters()},
        own / 'gradients.safetensors')


def _classes(name):
    """Of settings, classifier and language model; None for encoders."""
    short = {'modernbert': 'ModernBert'}.get(name, name.title())
    causal = None if name in ('bert', 'modernbert') else f'{short}ForCausalLM'
    names = _NAMES.get(name, (f'{short}Config', f'{short}ForSequenceClassification', causal))
    return tuple(class_name and getattr(transformers, class_name) for class_name in names)


def make_gpt2():
    """Writes GPT-2's classifier with 10 outputs, and `gpt2.npz`."""
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
