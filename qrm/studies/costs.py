"""Costs counted by hand: work that comparisons need, and what a training step takes of a machine.

Useful work is that of the model's definition: every distinct token once, with the tokens it sees.
Padding, copies of a prompt, masked pairs and recomputed activations add nothing to it, so a rate
of useful work falls when any of them is wasted on.

What a step takes is that of `step` as it is written, padding and recomputation included: products,
bytes held, bytes sent and seconds, on devices that each hold all of the state or, `sharded`, their
share (`sharding`). It is for micro-batches of one layout, without language-model loss and dropout.
docs/scaling.md has the formulas, how they were checked, and what they predict.

Axes: R rows, L tokens a row, C comparisons, K responses, D features, N devices.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qrm.data.packing import Layout
from qrm.data.tokens import Encoded
from qrm.models import sharding
from qrm.models.decoder import DecoderConfig
from qrm.models.network import RewardNetwork
from qrm.rewards import heads
from qrm.rewards.heads import HeadConfig

# Dense bfloat16 peak of one device, FLOP/s, by the start of JAX's name for it; the longest match
# holds. From NVIDIA's data sheets (A100, H100, H200; without sparsity) and Google Cloud's "TPU
# system architecture" pages (v4, v5e, v5p, v6e).
PEAKS = {
    'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H200': 989e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12,
    'TPU v5': 459e12, 'TPU v5p': 459e12, 'TPU v6 lite': 918e12, 'TPU v6e': 918e12,
}

_FLOAT = 4  # bytes of a parameter, of each of AdamW's moments and of a gradient

# Layouts of a step's micro-batches, and how many there are of each.
Stacks = Sequence[tuple[Layout, int]]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of one kind, and how they are connected. Rates are a second, of one device.

    Attributes:
      flops: floating-point operations of dense products.
      memory: bytes.
      bandwidth: bytes to and from memory.
      group: devices that are connected by fast links.
      link: bytes that a device can send within its group.
      between: bytes that a device can send to other groups.
    """

    flops: float
    memory: float
    bandwidth: float
    group: int
    link: float
    between: float


# NVIDIA's data sheets of H200 SXM (141 GB at 4.8 TB/s; NVLink 900 GB/s, both directions together)
# and of DGX H200 (8 GPUs, one 400 Gb/s network adapter for each).
H200 = Machine(PEAKS['NVIDIA H200'], 141e9, 4.8e12, 8, 450e9, 50e9)
# Google Cloud's "TPU v5p" page: 95 GB at 2,765 GB/s; between chips 1,200 GB/s in both directions
# together; a job has up to 6,144 chips in one pod, beyond it 50 Gb/s for each chip.
TPU_V5P = Machine(PEAKS['TPU v5p'], 95e9, 2.765e12, 6144, 600e9, 6.25e9)


class Parameters(NamedTuple):
    """Scalars of a network by kind, see `sharding.LOGICAL_AXES`.

    Attributes:
      kernels: matrices of the blocks.
      vectors: biases and norms.
      tables: embeddings of tokens and positions.
      head: of the reward head.
    """

    kernels: int
    vectors: int
    tables: int
    head: int


class Work(NamedTuple):
    """Floating-point operations of the products of a micro-batch, forward and backward.

    Attributes:
      projections: of the blocks' kernels.
      attention: logits and mixed values.
      head: of the reward head.
    """

    projections: int
    attention: int
    head: int


class Memory(NamedTuple):
    """Bytes on each device while a step runs.

    Attributes:
      state: parameters and AdamW's two moments, which is all that is kept between steps.
      gradients: their sum over micro-batches, and those of the blocks in one micro-batch.
      copies: of block parameters: the scan's, in the compute dtype, and those gathered, with the
        head.
      activations: what the forward pass keeps for the backward pass, and one block's own.
    """

    state: int
    gradients: int
    copies: int
    activations: int


class Traffic(NamedTuple):
    """Bytes that each device sends in a step, by collective; in a ring all receive as many."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0
    all_to_all: int = 0


class Seconds(NamedTuple):
    """Times of the parts of a step.

    Attributes:
      products: matrix products.
      update: memory traffic of gradient sums and of the optimiser.
      exchange: communication of the micro-batches, which may run beside products.
      reduction: communication after the last of them, which nothing is left to run beside.
    """

    products: float
    update: float
    exchange: float
    reduction: float

    @property
    def shortest(self) -> float:
        """The step if exchange and products overlap completely."""
        return max(self.products, self.exchange) + self.update + self.reduction

    @property
    def longest(self) -> float:
        """The step if nothing overlaps."""
        return sum(self)


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


def parameters(network: RewardNetwork) -> Parameters:
    """All parameters of a network."""
    c = network.decoder
    of_block = 3 * c.n_embd + c.n_embd + c.n_inner + c.n_embd + 4 * c.n_embd  # and two norms
    return Parameters(
        kernels=matmul_parameters(c),
        vectors=c.n_layer * of_block + 2 * c.n_embd,
        tables=(c.vocab_size + c.n_positions) * c.n_embd,
        head=sum(leaf.size for leaf in _head(network.head, c.n_embd).values()),
    )


def split_parameters(network: RewardNetwork, devices: int) -> Parameters:
    """Those parameters of which a device holds 1 / N; the others are whole on every device.

    A leaf is split if N divides one of its axes that may be, see `sharding.MESH_AXES`.
    """
    c = network.decoder
    narrow, wide, inner = (size % devices == 0 for size in (c.n_embd, 3 * c.n_embd, c.n_inner))
    of_block = ((narrow or wide) * 3 * c.n_embd**2 + narrow * c.n_embd**2
                + (narrow or inner) * 2 * c.n_embd * c.n_inner)
    head = _head(network.head, c.n_embd)
    splits = sharding.specs({'head': head}, devices)['head']
    return Parameters(
        c.n_layer * of_block, 0, narrow * parameters(network).tables,
        sum(leaf.size for name, leaf in head.items() if sharding.AXIS in splits[name]))


def held_parameters(network: RewardNetwork, shards: int) -> Parameters:
    """What each of N devices holds over which the state is split; N = 1: all."""
    split = split_parameters(network, shards)
    return Parameters(*(total - part + part // shards
                        for total, part in zip(parameters(network), split, strict=True)))


def micro_batch_work(
    network: RewardNetwork, layout: Layout, *, sharded: bool = False, pairs: int | None = None
) -> Work:
    """Products of the gradient of one micro-batch, as `step` computes them.

    The backward pass has two products for each of the forward pass. The last block has its output
    projection and perceptron at the reads only. Recomputed are, with `remat`, all blocks but the
    last, up to the last product of each, whose result nothing needs; sharded, without `remat`,
    their attention. XLA does not recompute the last block, which is outside of the scan.

    Args:
      network: architecture, dtype and recomputation.
      layout: of the micro-batch.
      sharded: whether parameters are.
      pairs: (query, key) pairs of the tiles that are computed in a block, 64 * 64 of each, by
        the tiled implementation; None: all pairs of all rows, by the dense one.
    """
    c, tokens, reads = network.decoder, layout.rows * layout.length, layout.slots * layout.responses
    perceptron = 2 * c.n_embd * c.n_inner  # of one token, half of it for each of two kernels
    inputs, outputs = 6 * c.n_embd**2, 2 * c.n_embd**2 + 2 * perceptron
    blocks, last = (c.n_layer - 1) * tokens * (inputs + outputs), tokens * inputs + reads * outputs
    computed = layout.rows * layout.length**2 if pairs is None else pairs
    mixing = (c.n_layer - 1) * 4 * c.n_embd * computed
    last_mixing = 4 * c.n_embd * reads * tokens  # against the keys of all rows
    projections, attention = 3 * (blocks + last), 3 * (mixing + last_mixing)
    if pairs is not None:
        attention += mixing // 2  # the backward pass has five products for two, with the logits
    if network.remat:
        projections += blocks - (c.n_layer - 1) * tokens * perceptron
    if network.remat or sharded:
        attention += mixing
    return Work(projections, attention, 6 * reads * _head_products(network))


@functools.cache
def _head(head: HeadConfig, width: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The arrays of a head."""
    return jax.eval_shape(lambda key: heads.init(head, key, width), jax.random.key(0))


def _head_products(network: RewardNetwork) -> int:
    """Multiplications of the head for one response; an implicit one is asked at each level."""
    head = network.head
    once = sum(leaf.size for name, leaf in _head(head, network.decoder.n_embd).items()
               if name != 'bias')
    return once * (head.num_quantiles if head.name == 'implicit_quantile' else 1)


def kept_bytes(
    network: RewardNetwork, layout: Layout, *, sharded: bool = False, tiled: bool = False
) -> int:
    """Bytes of one block, not the last, that the forward pass keeps for the backward pass.

    With `remat` its input. Sharded, also the results of its products but for the last one. Else
    what differentiation keeps: of [R, L, D], six arrays in float32 (of the norms and the residual
    stream) and six in the compute dtype (factors of products); of [R, L, n_inner], six (factors,
    and the activation function's own); eight numbers a token of the norms. Of attention, weights
    in float32 and in the compute dtype and two numbers a query; by tiles, its result and one.
    """
    c, tokens = network.decoder, layout.rows * layout.length
    size = jnp.dtype(network.dtype).itemsize
    if network.remat:
        return tokens * c.n_embd * size
    if sharded:
        return tokens * (5 * c.n_embd + c.n_inner) * size
    if tiled:
        mixing = tokens * (c.n_embd * size + c.n_head * _FLOAT)
    else:
        mixing = tokens * c.n_head * (layout.length * (_FLOAT + size) + 2 * _FLOAT)
    return mixing + tokens * (6 * c.n_embd * (_FLOAT + size) + 6 * c.n_inner * size + 8 * _FLOAT)


def step_memory(
    network: RewardNetwork, layout: Layout, *, shards: int = 1, tiled: bool = False
) -> Memory:
    """Bytes on each device while a step runs, as a scan over blocks keeps them.

    Args:
      network: architecture, dtype and recomputation.
      layout: of a micro-batch.
      shards: devices over which the state is split; 1: all of it is on each.
      tiled: whether attention is by tiles; L is then a multiple of the tile.
    """
    c, sharded, held = network.decoder, shards > 1, held_parameters(network, shards)
    whole, scanned = parameters(network), held.kernels * (c.n_layer - 1) // c.n_layer
    size = jnp.dtype(network.dtype).itemsize
    copies = _FLOAT * scanned
    if sharded:  # one block of the scan and the last one, see `traffic`
        copies += 2 * whole.kernels // c.n_layer * size + _FLOAT * whole.head
    elif not network.remat and network.dtype != 'float32':
        copies += scanned * size
    working = kept_bytes(dataclasses.replace(network, remat=False), layout, tiled=tiled)
    kept = kept_bytes(network, layout, sharded=sharded, tiled=tiled)
    return Memory(
        state=3 * _FLOAT * sum(held),
        gradients=_FLOAT * (sum(held) + held.kernels),
        copies=copies,
        activations=(c.n_layer - 1) * kept + working,
    )


def traffic(
    network: RewardNetwork, stacks: Stacks, devices: int, *, sharded: bool
) -> Traffic:
    """Bytes that a device sends in a step.

    Copies of the state: all gradients are added up once. Shards: in each micro-batch kernels are
    gathered forward and again backward and their gradients scattered, embeddings and their
    gradients are exchanged in place of the tables; what is whole everywhere is added up once.
    The last block and the head, which are not in the scan, XLA gathers once a step. Kernels are
    gathered in the compute dtype; the rest is float32.

    Args:
      network: architecture and dtype.
      stacks: micro-batches of the step, on the device that has most.
      devices: N.
      sharded: whether the state is split over them.
    """
    sent = (devices - 1) / devices  # of the whole array: what a ring sends, and all-to-all too
    total, split = sum(parameters(network)), split_parameters(network, devices)
    if not sharded:
        return Traffic(all_reduce=round(2 * sent * _FLOAT * total))
    count = sum(filled for _, filled in stacks)
    tokens = sum(filled * layout.rows * layout.length for layout, filled in stacks)
    if not split.tables:
        tokens = 0  # looked up by each device in tables of its own
    last = split.kernels // network.decoder.n_layer
    gathered = (count * 2 * (split.kernels - last) + last) * jnp.dtype(network.dtype).itemsize
    return Traffic(
        all_reduce=round(2 * sent * _FLOAT * (total - sum(split))),
        # With int32 indices of all tokens.
        all_gather=round(sent * (gathered + _FLOAT * (split.head + 2 * tokens * devices))),
        reduce_scatter=round(sent * _FLOAT * count * (split.kernels + split.head)),
        # Embeddings of tokens and of positions, and one gradient for both.
        all_to_all=round(sent * _FLOAT * 3 * tokens * network.decoder.n_embd),
    )


def step_seconds(
    network: RewardNetwork,
    stacks: Stacks,
    machine: Machine,
    *,
    devices: int = 1,
    sharded: bool = False,
    efficiency: float,
    pairs: int | None = None,
) -> Seconds:
    """Predicts how long a step takes, by part.

    Args:
      network: architecture, dtype and recomputation.
      stacks: micro-batches of the step, on the device that has most.
      machine: rates of the devices.
      devices: N.
      sharded: whether the state is split over them; it is not on one.
      efficiency: share of `machine.flops` that products reach, with all that runs between them.
      pairs: of one micro-batch, see `micro_batch_work`.
    """
    sharded = sharded and devices > 1
    work = sum(filled * sum(micro_batch_work(network, layout, sharded=sharded, pairs=pairs))
               for layout, filled in stacks)
    sent = traffic(network, stacks, devices, sharded=sharded)
    held = held_parameters(network, devices if sharded else 1)
    # AdamW reads and writes parameter and moments and reads the gradient, which was zeroed and is
    # read for its norm; a micro-batch reads and writes the sum and reads the blocks' gradients.
    touched = 9 * sum(held) + 3 * sum(filled for _, filled in stacks) * held.kernels
    # A ring over several groups enters and leaves each once, over the links of all its members.
    ring = machine.link if devices <= machine.group else min(
        machine.link, machine.group * machine.between)
    # Of what goes to each device by itself, most leaves the group, over the device's own link.
    outside = max(devices - machine.group, 0) / max(devices - 1, 1)
    to_each = outside / machine.between + (1 - outside) / machine.link
    return Seconds(
        products=work / (efficiency * machine.flops),
        update=_FLOAT * touched / machine.bandwidth,
        exchange=(sent.all_gather + sent.reduce_scatter) / ring + sent.all_to_all * to_each,
        reduction=sent.all_reduce / ring,
    )


def _dialogues(item: Encoded) -> list[int]:
    return [len(item.prompt) + len(response) for response in item.responses]


def _triangle(size: int) -> int:
    return size * (size + 1) // 2
