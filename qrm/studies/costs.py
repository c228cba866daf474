"""Costs counted by hand: work that comparisons need, and what a training step takes of a machine.

Useful work is that of the model's definition: every distinct token once, with the tokens it sees.
Padding, copies of a prompt, masked pairs and recomputed activations add nothing to it, so a rate
of useful work falls when any of them is wasted on.

What a step takes is that of `step` as it is written, padding and recomputation included: products,
bytes held, bytes sent and seconds, on devices that each hold all of the state or, `sharded`, their
share (`sharding`), and may compute blocks in tensor groups (`parallel`). It is for micro-batches of
one layout, without language-model loss and dropout.
Everything follows from an `Architecture`, of whatever family, and from what the head reads.
docs/scaling.md has the formulas, how they were checked, and what they predict.

Axes: R rows, L tokens a row, C comparisons, K responses, D features, H query heads, G key and value
heads, E features a head, F inner features, N devices, M of a tensor group.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qrm.data.encoded import Encoded
from qrm.data.packing import Layout
from qrm.models import parallel, sharding
from qrm.models.architecture import Architecture, flat, leaves
from qrm.models.lora import adapter_leaves
from qrm.models.network import RewardNetwork
from qrm.models.tuning import Tuning
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
_MEANS = {'mean', 'dialogue'}  # of `heads.PLACES`, those that read many tokens
# Arrays in the compute dtype that differentiation keeps of an activation, beside its result.
_ACTIVATION = {'gelu_new': 5, 'gelu_pytorch_tanh': 5, 'gelu': 3, 'silu': 3}

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
      tables: embeddings of tokens and positions, and of the output if it has its own.
      head: of the reward head and of what is gathered whole as it is: pooler and token types.
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
      head: of the reward head, the pooler, and means of hidden states over tokens.
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
      sums: communication within tensor groups, which products wait for.
      update: memory traffic of gradient sums and of the optimiser.
      exchange: communication of the micro-batches, which may run beside products.
      reduction: communication after the last of them, which nothing is left to run beside.
    """

    products: float
    sums: float
    update: float
    exchange: float
    reduction: float

    @property
    def shortest(self) -> float:
        """The step if exchange and products overlap completely."""
        return max(self.products + self.sums, self.exchange) + self.update + self.reduction

    @property
    def longest(self) -> float:
        """The step if nothing overlaps."""
        return sum(self)


def matmul_parameters(architecture: Architecture) -> int:
    """Scalars in the matrices of the blocks: attention and perceptron, without biases.

    Embeddings are looked up, not multiplied by, and the head acts on one token a response.
    """
    return architecture.num_layers * sum(_kernels(architecture).values())


def visible_pairs(item: Encoded, *, window: int = 0, causal: bool = True) -> int:
    """(query, key) pairs of the attention of one comparison with its prompt stored once.

    A token sees its own part, and a response also the prompt; of these tokens it sees those whose
    positions in the dialogue are in reach, see `attention.attention_mask`.
    """
    prompt, responses = len(item.prompt), [len(response) for response in item.responses]

    def back(size: int) -> int:
        """Pairs of so many tokens in a row with those at or before them."""
        return _triangle(size) - _triangle(max(size - window, 0) if window else 0)

    pairs = back(prompt) + sum(back(prompt + size) - back(prompt) for size in responses)
    if not causal:
        pairs += sum(back(size) - size for size in (prompt, *responses))
    return pairs


def useful_flops(
    architecture: Architecture, encoded: Iterable[Encoded], *, tuning: Tuning | None = None
) -> int:
    """Floating-point operations that the comparisons need in the blocks' products.

    Forward, a token takes 2 for each matrix parameter, and a visible pair 2 H E a block for its
    logit and as much for its share of the mixed values. Training all takes three times that, as
    the backward pass has two products for each of the forward pass (Kaplan et al. 2020, arXiv
    2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B, whose pairs
    are those of full attention). Kernels that are not trained have no gradient, what is below the
    lowest trained parameter has no backward pass, and adapters add products of their own.

    Args:
      architecture: of the backbone.
      encoded: comparisons with any number of responses.
      tuning: forward and backward pass for what it trains, without recomputation; None: forward
        alone.
    """
    a, items = architecture, list(encoded)
    tokens, kernels = distinct_tokens(items), _kernels(a)
    pairs = {window: sum(visible_pairs(item, window=window, causal=a.causal) for item in items)
             for window in {layer.window for layer in a.layers}}
    attention = [4 * a.num_heads * a.head_dim * pairs[a.layer(i).window]
                 for i in range(a.num_layers)]
    forward = 2 * tokens * matmul_parameters(a) + sum(attention)
    if tuning is None:
        return forward
    reached = {'head': 0, 'last': tuning.blocks}.get(tuning.kind, a.num_layers)
    of_kernels = 2 * tokens * reached * sum(kernels.values())
    backward = of_kernels + 2 * sum(attention[a.num_layers - reached:])
    if reached and tuning.kind != 'all':
        backward -= 2 * tokens * kernels['attention/qkv']  # nothing below is trained
    if tuning.lora is None:
        return forward + backward + of_kernels
    adapters = sum(leaf.shape[-2] * leaf.shape[-1] * a.num_layers
                   for leaf in adapter_leaves(a, tuning.lora).values())
    return forward + backward + 3 * 2 * tokens * adapters


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


@functools.cache
def parameters(network: RewardNetwork) -> Parameters:
    """All parameters of a network."""
    return _by_kind(_leaves(network))


@functools.cache
def split_parameters(network: RewardNetwork, devices: int, tensor: int = 1) -> Parameters:
    """Those parameters of which a device holds 1 / N.

    A leaf is split if N divides one of its axes that may be, see `sharding.MESH_AXES`; of what
    tensor groups have parts of, those parts over the groups. Others are whole on every device, but
    for biases of a group's parts, of which it holds 1 / M.

    Args:
      network: whose parameters.
      devices: N.
      tensor: M.
    """
    leaves = _leaves(network)
    splits = sharding.specs(leaves, devices, tensor)
    return _by_kind({path: leaf for path, leaf in leaves.items()
                     if sharding.AXIS in _mesh_axes(splits[path])})


@functools.cache
def held_parameters(network: RewardNetwork, shards: int, tensor: int = 1) -> Parameters:
    """What each of N devices holds over which the state is split; N = 1: all."""
    leaves, sizes = _leaves(network), {sharding.AXIS: shards // tensor, sharding.TENSOR: tensor}
    splits = sharding.specs(leaves, shards, tensor)
    return _by_kind({path: jax.ShapeDtypeStruct(
        (leaf.size // math.prod(sizes[name] for name in _mesh_axes(splits[path])),), leaf.dtype)
        for path, leaf in leaves.items()})


def micro_batch_work(
    network: RewardNetwork,
    layout: Layout,
    *,
    sharded: bool = False,
    pairs: Sequence[int] | None = None,
    tensor: int = 1,
) -> Work:
    """Products of the gradient of one micro-batch, as `step` computes them, on one device.

    The backward pass has two products for each of the forward pass. A block after the scan has its
    output projection and perceptron at the reads only. Recomputed are, with `remat`, the blocks in
    the scan, up to the last product of each unless a norm needs its result; sharded, without
    `remat`, their attention. XLA does not recompute blocks that are outside of the scan.

    Args:
      network: architecture, dtype, recomputation and reads.
      layout: of the micro-batch.
      sharded: whether parameters are.
      pairs: (query, key) pairs of the tiles that are computed in a block, 64 * 64 of each, by
        the tiled implementation, for each of `Architecture.layers`; None: all pairs of all rows,
        by the dense one.
      tensor: M; each device of a group has its part of the blocks' products and all of the head's.
    """
    a = parallel.part(network.architecture, tensor)
    tokens = layout.rows * layout.length
    first, scanned, last = _blocks(network)
    # Of one token, or of one pair.
    kernels, pair = _kernels(a), 4 * a.num_heads * a.head_dim
    inputs, block = 2 * kernels['attention/qkv'], 2 * sum(kernels.values())
    reads = _reads_of(network, layout)
    projections = 3 * ((first + scanned) * tokens * block
                       + last * (tokens * inputs + reads * (block - inputs)))
    computed = (layout.rows * layout.length**2,) if pairs is None else pairs
    mixing = [pair * computed[i % len(computed)] for i in range(first + scanned)]
    # The last block's is against the keys of all rows.
    attended = 3 * (sum(mixing) + last * pair * reads * tokens)
    if pairs is not None:
        attended += sum(mixing) // 2  # the backward pass has five products for two, with the logits
    if network.remat:
        without = 0 if _norms_results(a) else 2 * kernels['mlp/down']
        projections += scanned * tokens * (block - without)
    if network.remat or sharded:
        attended += sum(mixing[first:])
    return Work(projections, attended, _head_work(network, layout))


def kept_bytes(
    network: RewardNetwork, layout: Layout, *, sharded: bool = False, tiled: bool = False,
    tensor: int = 1,
) -> int:
    """Bytes of a block in the scan that the forward pass keeps for the backward pass.

    With `remat` its input. Sharded, also the results of its products but for the last one, unless
    a norm needs it. Else what differentiation keeps: the inputs of both branches; queries, keys,
    values and what attention gives; norms and perceptron, see `_norm_bytes` and
    `_perceptron_bytes`. Of attention, weights in float32 and in the compute dtype and two numbers
    a query, with a cap two more arrays like the weights, in float32; by tiles, its result again
    and one number. Where blocks have several contexts, also the block's own. Of a tensor group a
    device keeps all features of the residual stream, and else its part.
    """
    a = parallel.part(network.architecture, tensor)
    tokens = layout.rows * layout.length
    d, inner, size = a.hidden_size, a.num_heads * a.head_dim, jnp.dtype(network.dtype).itemsize
    results = sum(a.parts['qkv']) + d + sum(a.parts['up']) + d * _norms_results(a)
    context = _context_bytes(a, layout, tiled=tiled, chosen=network.remat or sharded)
    if network.remat or sharded:
        return context + tokens * size * (d + (0 if network.remat else results))
    if tiled:
        mixing = tokens * (inner * size + a.num_heads * _FLOAT)
    else:
        logits = _FLOAT + size + 2 * _FLOAT * bool(a.attention_cap)
        mixing = tokens * a.num_heads * (layout.length * logits + 2 * _FLOAT)
    factors = (2 * d + inner + sum(a.parts['qkv'])) * size
    norms, features = 2 * len(a.norm_places), 2 * len(a.norm_places) * d
    if a.query_key_norm:
        both = a.num_heads + a.num_kv_heads
        norms += both if a.query_key_norm == 'head' else 2
        features += both * a.head_dim
    return context + mixing + tokens * (
        factors + _norm_bytes(a, norms, features, size) + _perceptron_bytes(a, size))


def step_memory(
    network: RewardNetwork, layout: Layout, *, shards: int = 1, tiled: bool = False,
    tensor: int = 1,
) -> Memory:
    """Bytes on each device while a step runs, as a scan over blocks keeps them.

    Args:
      network: architecture, dtype, recomputation and reads.
      layout: of a micro-batch.
      shards: devices over which the state is split; 1: all of it is on each.
      tiled: whether attention is by tiles; L is then a multiple of the tile.
      tensor: M; a device gathers its part of a block.
    """
    a, sharded, held = network.architecture, shards > 1, held_parameters(network, shards, tensor)
    first, scanned, last = _blocks(network)
    whole, copied = parameters(network), held.kernels * scanned // a.num_layers
    size = jnp.dtype(network.dtype).itemsize
    copies = _FLOAT * copied if scanned < a.num_layers else 0  # slices, if not all of them
    if sharded:  # one block of the scan and those outside of it, see `traffic`
        block = whole.kernels // a.num_layers // tensor
        copies += (first + 1 + last) * block * size + _FLOAT * whole.head
    elif not network.remat and network.dtype != 'float32':
        copies += copied * size
    working = kept_bytes(dataclasses.replace(network, remat=False), layout, tiled=tiled,
                         tensor=tensor)
    kept = kept_bytes(network, layout, sharded=sharded, tiled=tiled, tensor=tensor)
    entered = a.embedding_norm * layout.rows * layout.length * _norm_bytes(
        a, 1, a.hidden_size, _FLOAT)
    return Memory(
        state=3 * _FLOAT * sum(held),
        gradients=_FLOAT * (sum(held) + held.kernels),
        copies=copies,
        activations=entered + scanned * kept + (first + 1) * working,
    )


def traffic(
    network: RewardNetwork, stacks: Stacks, devices: int, *, sharded: bool, tensor: int = 1
) -> Traffic:
    """Bytes that a device sends in a step, but for those of `group_traffic`.

    Copies of the state: all gradients are added up once. Shards: in each micro-batch kernels are
    gathered forward and again backward and their gradients scattered, embeddings and their
    gradients are exchanged in place of the tables; what is whole everywhere is added up once.
    Blocks that are not in the scan, and the head, XLA gathers once a step. Kernels are gathered in
    the compute dtype; the rest is float32. A device of a tensor group does so with its part of
    the kernels and of the features of embeddings.

    Args:
      network: architecture, dtype and reads.
      stacks: micro-batches of the step, on the device that has most.
      devices: N.
      sharded: whether the state is split over them.
      tensor: M.
    """
    a, (first, scanned, last) = network.architecture, _blocks(network)
    groups = devices // tensor
    sent = (groups - 1) / groups  # of the whole array: what a ring sends, and all-to-all too
    total, split = sum(parameters(network)), split_parameters(network, devices, tensor)
    if not sharded:
        return Traffic(all_reduce=round(2 * sent * _FLOAT * total))
    held = sum(held_parameters(network, devices, tensor)) - sum(split) // devices
    count = sum(filled for _, filled in stacks)
    tokens = _looked_up(network, stacks, devices, tensor)
    tables, block = 1 + a.learned_positions, split.kernels // a.num_layers // tensor
    gathered = (count * 2 * scanned + first + last) * block * jnp.dtype(network.dtype).itemsize
    scattered = (first + scanned + last) * block + split.head // tensor
    return Traffic(
        all_reduce=round(2 * sent * _FLOAT * held),
        # With int32 indices of all tokens in each table. The head is gathered from all devices.
        all_gather=round(sent * (gathered + _FLOAT * tables * tokens * groups)
                         + (devices - 1) / devices * _FLOAT * split.head),
        reduce_scatter=round(sent * _FLOAT * count * scattered),
        # Embeddings from each table, and one gradient for all.
        all_to_all=round(sent * _FLOAT * (tables + 1) * tokens * a.hidden_size / tensor),
    )


def group_traffic(
    network: RewardNetwork, stacks: Stacks, devices: int, *, tensor: int
) -> Traffic:
    """Bytes that a device of a tensor group sends in a step to the others of it, in each block.

    What each branch gives is added up forward, what comes back to its input backward, in the
    compute dtype: at all tokens, of a block after the scan at the reads but for the input of its
    attention. With `remat` the sums of blocks in the scan are taken once more, but for the last of
    each unless a norm needs it. Scales of norms that all heads have are added up backward, and
    embeddings are put together from the features of each.

    Args:
      network: architecture, dtype, recomputation and reads.
      stacks: micro-batches of the step, on the group that has most.
      devices: N.
      tensor: M.
    """
    a, (first, scanned, last) = network.architecture, _blocks(network)
    size = jnp.dtype(network.dtype).itemsize
    count = sum(filled for _, filled in stacks)
    tokens = sum(filled * layout.rows * layout.length for layout, filled in stacks)
    reads = sum(filled * _reads_of(network, layout) for layout, filled in stacks)
    again = scanned * (1 + _norms_results(a)) if network.remat else 0
    rows = (4 * (first + scanned) + again + last) * tokens + 3 * last * reads
    scales = 2 * a.head_dim if a.query_key_norm else 0
    sent, tables = (tensor - 1) / tensor, 1 + a.learned_positions
    return Traffic(
        all_reduce=round(2 * sent * (rows * a.hidden_size * size
                                     + _FLOAT * count * (first + scanned + last) * scales)),
        all_gather=round(sent * _FLOAT * tables * a.hidden_size
                         * _looked_up(network, stacks, devices, tensor)),
    )


def step_seconds(
    network: RewardNetwork,
    stacks: Stacks,
    machine: Machine,
    *,
    devices: int = 1,
    sharded: bool = False,
    efficiency: float,
    pairs: Sequence[int] | None = None,
    tensor: int = 1,
) -> Seconds:
    """Predicts how long a step takes, by part.

    Args:
      network: architecture, dtype, recomputation and reads.
      stacks: micro-batches of the step, on the device that has most.
      machine: rates of the devices.
      devices: N.
      sharded: whether the state is split over them; it is not on one.
      efficiency: share of `machine.flops` that products reach, with all that runs between them.
      pairs: of one micro-batch, see `micro_batch_work`.
      tensor: M, of devices that follow each other.
    """
    sharded, groups = sharded and devices > 1, devices // tensor
    work = sum(filled * sum(micro_batch_work(network, layout, sharded=sharded, pairs=pairs,
                                             tensor=tensor)) for layout, filled in stacks)
    sent = traffic(network, stacks, devices, sharded=sharded, tensor=tensor)
    within = group_traffic(network, stacks, devices, tensor=tensor)
    held = held_parameters(network, devices if sharded else 1, tensor)
    # AdamW reads and writes parameter and moments and reads the gradient, which was zeroed and is
    # read for its norm; a micro-batch reads and writes the sum and reads the blocks' gradients.
    touched = 9 * sum(held) + 3 * sum(filled for _, filled in stacks) * held.kernels
    # A ring over several groups enters and leaves each once, over the links of all its members,
    # which it shares with the rings of the others in a tensor group.
    wide = min(machine.link, machine.group * machine.between)
    own = machine.link if tensor <= machine.group else wide
    ring = machine.link if devices <= machine.group else min(
        machine.link, machine.group * machine.between / min(tensor, machine.group))
    # Of what goes to each device by itself, most leaves the group, over the device's own link.
    near = max(machine.group // tensor, 1)
    outside = max(groups - near, 0) / max(groups - 1, 1)
    to_each = outside / machine.between + (1 - outside) / machine.link
    return Seconds(
        products=work / (efficiency * machine.flops),
        sums=sum(within) / own,
        update=_FLOAT * touched / machine.bandwidth,
        exchange=(sent.all_gather + sent.reduce_scatter) / ring + sent.all_to_all * to_each,
        reduction=sent.all_reduce / ring,
    )


class _Blocks(NamedTuple):
    """How many blocks run in which way, see `Transformer`.

    Attributes:
      first: before the scan: 1 if the first block has one norm less than the others.
      scanned: in the scan.
      last: after it: 1 if the last block is computed at the reads only. If nothing is read there,
        it is not computed.
    """

    first: int
    scanned: int
    last: int


def _blocks(network: RewardNetwork) -> _Blocks:
    a, places = network.architecture, _last_places(network)
    at_reads = not places & _MEANS
    rest = a.num_layers - at_reads
    first = min(rest, int(not a.first_norm))
    return _Blocks(first, rest - first, int(at_reads and bool(places or network.head.gated)))


def _mesh_axes(spec: P) -> tuple[str, ...]:
    """Over which axes of the mesh a leaf is split."""
    return tuple(name for names in spec if names
                 for name in (names if isinstance(names, tuple) else (names,)))


def _looked_up(network: RewardNetwork, stacks: Stacks, devices: int, tensor: int) -> int:
    """Tokens whose embeddings are exchanged; 0 if each device has whole tables."""
    if not split_parameters(network, devices, tensor).tables:
        return 0
    return sum(filled * layout.rows * layout.length for layout, filled in stacks)


def _reads_of(network: RewardNetwork, layout: Layout) -> int:
    """How many places of a micro-batch are read after the last block."""
    return layout.slots * layout.responses * (len(_last_places(network)) + network.head.gated)


def _reads(network: RewardNetwork) -> list[heads.Read]:
    return [heads.parse_read(text) for text in network.head.reads]


def _last_places(network: RewardNetwork) -> set[str]:
    """Where the head reads hidden states of the last block."""
    return {read.place for read in _reads(network) if read.block is None}


def _kernels(a: Architecture) -> dict[str, int]:
    """Scalars of the matrices of one block."""
    return {path.removeprefix('blocks/').removesuffix('/kernel'): leaf.shape[1] * leaf.shape[2]
            for path, leaf in leaves(a).items()
            if path.startswith('blocks/') and path.endswith('/kernel')}


def _leaves(network: RewardNetwork) -> Mapping[str, jax.ShapeDtypeStruct]:
    """All arrays of a network by path."""
    backbone = leaves(network.architecture, output=network.language_model)
    head = _head(network.head, network.architecture.hidden_size)
    return {f'backbone/{path}': jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
            for path, leaf in backbone.items()} | {f'head/{path}': leaf
                                                   for path, leaf in head.items()}


@functools.cache
def _head(head: HeadConfig, width: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The arrays of a head by path."""
    return flat(jax.eval_shape(lambda key: heads.init(head, key, width), jax.random.key(0)))


def _by_kind(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    sizes = collections.Counter()
    for path, leaf in leaves.items():
        if path.startswith(('head/', 'backbone/pooler/', 'backbone/types')):
            kind = 'head'
        elif path in ('backbone/tokens', 'backbone/positions', 'backbone/output'):
            kind = 'tables'
        else:
            kind = 'kernels' if path.endswith('kernel') else 'vectors'
        sizes[kind] += leaf.size
    return Parameters(*(sizes[kind] for kind in Parameters._fields))


def _head_work(network: RewardNetwork, layout: Layout) -> int:
    """See `Work.head`.

    An implicit head is asked at each level. The weights of a mean need no gradient, and if it is
    read of any block in the scan, it is taken of all of them.
    """
    a, head, places = network.architecture, network.head, _last_places(network)
    levels = head.num_quantiles if head.name == 'implicit_quantile' else 1
    once = sum(leaf.size * (levels if path in ('kernel', 'cosines') else 1)
               for path, leaf in _head(head, a.hidden_size).items() if not path.endswith('bias'))
    pooled = len(places) * a.hidden_size**2 if a.pooler else 0
    first, scanned, _ = _blocks(network)
    inner = {(read.place, read.block <= first) for read in _reads(network)
             if read.block is not None and read.place in _MEANS}
    means = len(places & _MEANS) + sum(1 if alone else scanned for _, alone in inner)
    tokens = layout.rows * layout.length
    return layout.slots * layout.responses * (
        6 * (once + pooled) + 4 * means * tokens * a.hidden_size)


def _norms_results(a: Architecture) -> bool:
    """Whether norms see what the last product of a block gives."""
    return a.norm_places != ('before',)


def _norm_bytes(a: Architecture, norms: int, features: int, size: int) -> int:
    """Bytes that differentiation keeps of so many norms of so many features together.

    Of a layer norm three arrays in float32 and four numbers; of an RMS norm three arrays, one of
    them in the compute dtype if it is rounded before it is scaled, and two numbers.
    """
    if a.norm == 'layer':
        return 4 * _FLOAT * norms + 3 * _FLOAT * features
    return 2 * _FLOAT * norms + (2 * _FLOAT + (size if a.norm_rounds else _FLOAT)) * features


def _perceptron_bytes(a: Architecture, size: int) -> int:
    """Bytes a token that differentiation keeps of the inner features of a perceptron.

    The factor of its last product, if gated the two factors of that, and what the activation
    keeps; ReLU keeps which are positive, in a byte each.
    """
    own = 1 if a.activation == 'relu' else _ACTIVATION[a.activation] * size
    return a.intermediate_size * ((1 + 2 * a.gated) * size + own)


def _context_bytes(a: Architecture, layout: Layout, *, tiled: bool, chosen: bool) -> int:
    """Bytes of a block's own context, see `Transformer.contexts`; 0 if all have the same.

    A byte for each entry of the mask, and cosines and sines; indices of tiles are too few to count.
    Differentiation keeps dense masks of each head, and angles of queries and of keys, unless the
    whole context is kept as `chosen` for the block.
    """
    length = layout.length
    if len({(one.rotary, one.window * (one.window < length)) for one in a.layers}) == 1:
        return 0
    mask = layout.rows * length**2 * (1 if tiled or chosen else a.num_heads)
    angles = layout.rows * length * a.head_dim * _FLOAT if a.layers[0].rotary else 0
    return mask + (angles if chosen else 2 * angles)


def _dialogues(item: Encoded) -> list[int]:
    return [len(item.prompt) + len(response) for response in item.responses]


def _triangle(size: int) -> int:
    return size * (size + 1) // 2
