"""Work counted by hand: what the comparisons need, however they are laid out and computed.

Useful work is that of the model's definition: every distinct token once, with the tokens it sees.
Padding, copies of a prompt, masked pairs and recomputed activations add nothing to it, so a rate
of useful work falls when any of them is wasted on.
"""

from collections.abc import Iterable, Sequence

from qrm.backbone import DecoderConfig
from qrm.tokens import Encoded


def matmul_parameters(decoder: DecoderConfig) -> int:
    """Scalars in the matrices of the blocks: attention and perceptron, without biases.

    Embeddings are looked up, not multiplied by, and the head acts on one token a response.
    """
    attention = 4 * decoder.n_embd**2  # c_attn to queries, keys and values, and c_proj
    perceptron = 2 * decoder.n_embd * decoder.n_inner  # c_fc and c_proj
    return decoder.n_layer * (attention + perceptron)


def visible_pairs(item: Encoded) -> int:
    """(query, key) pairs of the attention of one comparison with its prompt stored once.

    A token sees itself, the tokens before it in its own part, and a response all of the prompt.
    """
    prompt, responses = len(item.prompt), [len(response) for response in item.responses]
    return _triangle(prompt) + sum(size * prompt + _triangle(size) for size in responses)


def useful_flops(decoder: DecoderConfig, encoded: Iterable[Encoded], *, training: bool) -> int:
    """Floating-point operations that the comparisons need in the blocks' products.

    Forward, a token takes 2 for each matrix parameter, and a visible pair 2 * n_embd a block for
    its logit and as much for its share of the mixed values. Training takes three times that, as
    the backward pass has two products for each of the forward pass (Kaplan et al. 2020, arXiv
    2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B, whose pairs
    are those of full attention).

    Args:
      decoder: architecture.
      encoded: comparisons with any number of responses.
      training: forward and backward pass, without recomputation; otherwise forward alone.
    """
    per_token = 2 * matmul_parameters(decoder)
    per_pair = 4 * decoder.n_embd * decoder.n_layer
    forward = sum(per_token * item.size + per_pair * visible_pairs(item) for item in encoded)
    return 3 * forward if training else forward


def distinct_tokens(encoded: Iterable[Encoded]) -> int:
    """Tokens with every prompt counted once."""
    return sum(item.size for item in encoded)


def repeated_tokens(encoded: Iterable[Encoded]) -> int:
    """Tokens with the prompt repeated for each of its responses."""
    return sum(sum(_dialogues(item)) for item in encoded)


def padded_tokens(encoded: Sequence[Encoded], batch: int) -> int:
    """Slots of a loader that pads each dialogue to the longest of its batch.

    Args:
      encoded: comparisons, in the order in which they are loaded.
      batch: comparisons a batch; all their dialogues are padded together.
    """
    total = 0
    for start in range(0, len(encoded), batch):
        sizes = [size for item in encoded[start:start + batch] for size in _dialogues(item)]
        total += len(sizes) * max(sizes)
    return total


def _dialogues(item: Encoded) -> list[int]:
    return [len(item.prompt) + len(response) for response in item.responses]


def _triangle(size: int) -> int:
    return size * (size + 1) // 2
