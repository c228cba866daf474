"""Packing: comparisons laid out once, with shared prompts, in rows of fixed length.

Axes: M micro-batches, R rows, L tokens a row, C comparisons, K responses.

A comparison is laid out as [prompt | response 1 | ... | response K]. A token attends to earlier
tokens of its own segment that belong to the prompt or to its own response, and positions restart
for each response, so every reward is what the dialogue would get alone:

    row       p p p a a b b b . .        b attends to    p p p . . b b b
    segment   1 1 1 1 1 1 1 1 0 0
    response  0 0 0 1 1 2 2 2 0 0
    position  0 1 2 3 4 3 4 5 0 0

A comparison too large for a row is laid out in several segments, each with its own copy of the
prompt, in one micro-batch; this is exact too, as rewards are gathered from anywhere in it. A
step consists of as many micro-batches as its comparisons need, all of one fixed shape.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qrm.tokens import Encoded


class MicroBatch(NamedTuple):
    """Comparisons in R rows of L tokens; what the network and the losses read.

    Attributes:
      tokens: [R, L] int32.
      positions: [R, L] int32, index of the token within its dialogue.
      segments: [R, L] int32, unique within a row; 0 is padding.
      responses: [R, L] int32, 0 for prompt tokens, k for tokens of the segment's k-th response.
      reads: [C, K] int32, index into R * L of the token where each reward is read.
      present: [C, K] bool, whether there is such a response.
      preference: [C, K, K] float32, see `Comparison.preference_matrix`.
      margin: [C] float32.
      weight: [C] float32; 0 for slots without a comparison.
      lm_targets: [R, L] int32, next token where the language-model loss is taken.
      lm_weights: [R, L] float32; for each comparison with one best response they add up to its
        weight, for others they are 0.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    responses: np.ndarray
    reads: np.ndarray
    present: np.ndarray
    preference: np.ndarray
    margin: np.ndarray
    weight: np.ndarray
    lm_targets: np.ndarray
    lm_weights: np.ndarray


class Stack(NamedTuple):
    """Micro-batches of one shape: the first `count` of M are filled.

    Attributes:
      count: [] int32.
      micro_batches: `MicroBatch` with a leading axis M.
    """

    count: np.ndarray
    micro_batches: MicroBatch


# One stack for each row length. A step's batch holds every layout, also those it leaves empty.
Batch = tuple[Stack, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shape of a micro-batch.

    Attributes:
      length: tokens a row (L).
      rows: rows (R).
      slots: comparisons at most (C).
      responses: responses of a comparison at most (K).
    """

    length: int
    rows: int
    slots: int
    responses: int


class Packed(NamedTuple):
    """A filled micro-batch and which comparison stands in which slot.

    Attributes:
      micro_batch: the arrays.
      indices: for each used slot, index of its comparison in the packed sequence.
    """

    micro_batch: MicroBatch
    indices: list[int]


def plan_layouts(
    encoded: Sequence[Encoded], *, row_length: int, rows: int, max_length: int
) -> tuple[Layout, ...]:
    """The few shapes that hold all of these comparisons exactly.

    Rows have `row_length` tokens; comparisons with a longer dialogue go to rows of `max_length`
    tokens (as many as make up the same number of tokens), planned only if there are any.

    Args:
      encoded: all comparisons that will ever be packed into these layouts.
      row_length: tokens of a usual row.
      rows: rows of a micro-batch, at least; more if one comparison needs more.
      max_length: tokens of the longest dialogue allowed.

    Raises:
      ValueError: there is nothing to plan for.
    """
    if not encoded:
        raise ValueError('no comparisons to lay out')
    responses = max(len(item.responses) for item in encoded)
    layouts = []
    for length, members in (
        (row_length, [item for item in encoded if item.longest <= row_length]),
        (max_length, [item for item in encoded if item.longest > row_length]),
    ):
        if members:
            needed = max(len(runs(item, length)) for item in members)
            count = max(needed, rows * row_length // length, 1)
            slots = min(len(encoded), max(1, count * length // 16))
            layouts.append(Layout(length, count, slots, responses))
    return tuple(layouts)


def layout_of(item: Encoded, layouts: Sequence[Layout]) -> int:
    """Index of the layout a comparison is packed into: the shortest rows that hold it."""
    for i, layout in enumerate(layouts):
        if item.longest <= layout.length:
            return i
    raise ValueError(f'{item.id}: a dialogue of {item.longest} tokens fits no row of {layouts}')


def pack(encoded: Sequence[Encoded], layout: Layout) -> list[Packed]:
    """Packs comparisons into as few micro-batches of one shape as first-fit-decreasing finds.

    Raises:
      ValueError: a comparison fits no micro-batch of this layout.
    """
    bins: list[_Bin] = []
    order = sorted(range(len(encoded)), key=lambda i: (-encoded[i].size, i))
    open_bins: list[_Bin] = []
    smallest = min((size for item in encoded for size, _ in runs(item, layout.length)), default=0)
    for i in order:
        segments = runs(encoded[i], layout.length)
        for candidate in open_bins:
            if candidate.place(i, segments):
                break
        else:
            candidate = _Bin(layout)
            if not candidate.place(i, segments):
                raise ValueError(f'{encoded[i].id}: fits no micro-batch of {layout}')
            bins.append(candidate)
            open_bins.append(candidate)
        if candidate.full(smallest):
            open_bins.remove(candidate)
    return [Packed(_fill(b, encoded, layout), b.indices) for b in bins]


def make_batch(
    encoded: Sequence[Encoded], layouts: Sequence[Layout], batch_size: int
) -> Batch:
    """Packs the comparisons of one step of one device into stacks of fixed shape.

    Args:
      encoded: at most `batch_size` comparisons.
      layouts: from `plan_layouts`.
      batch_size: the most comparisons that any batch of these shapes may hold.
    """
    members: list[list[Encoded]] = [[] for _ in layouts]
    for item in encoded:
        members[layout_of(item, layouts)].append(item)
    stacks = []
    for layout, items in zip(layouts, members, strict=True):
        filled = [packed.micro_batch for packed in pack(items, layout)]
        empty = empty_micro_batch(layout)
        padding = [empty] * (stack_size(layout, batch_size) - len(filled))
        micro_batches = MicroBatch(*map(np.stack, zip(*filled, *padding, strict=True)))
        stacks.append(Stack(np.asarray(len(filled), np.int32), micro_batches))
    return tuple(stacks)


def stack_size(layout: Layout, batch_size: int) -> int:
    """The most micro-batches (M) that first-fit can need for `batch_size` comparisons.

    A comparison takes at most min(R, K) rows and opens a new micro-batch only if every open one
    has fewer empty rows than that or no free slot.
    """
    needed = min(layout.rows, layout.responses)
    at_least = min(layout.slots, -(-(layout.rows - needed + 1) // needed))
    return -(-batch_size // at_least)


def share(encoded: Sequence[Encoded], parts: int) -> list[list[Encoded]]:
    """Deals comparisons to devices, largest first, so that all get about equally much work."""
    order = sorted(encoded, key=lambda item: -item.size)
    return [order[part::parts] for part in range(parts)]


def batch_indices(
    step: int, *, seed: int, examples: int, batch_size: int, total: int
) -> np.ndarray:
    """Indices of the comparisons of a step: a pure function of (seed, step).

    The stream of examples is one permutation after another, each seeded by (seed, epoch); step
    s takes the places [s * batch_size, (s + 1) * batch_size) of it, the last step what is left
    of `total`.
    """
    places = range(step * batch_size, min((step + 1) * batch_size, total))
    epochs = {place // examples for place in places}
    orders = {e: np.random.default_rng((seed, e)).permutation(examples) for e in epochs}
    return np.array([orders[p // examples][p % examples] for p in places], np.int64)


def empty_micro_batch(layout: Layout) -> MicroBatch:
    """A micro-batch without comparisons."""
    grid, slots, k = (layout.rows, layout.length), layout.slots, layout.responses
    return MicroBatch(
        tokens=np.zeros(grid, np.int32),
        positions=np.zeros(grid, np.int32),
        segments=np.zeros(grid, np.int32),
        responses=np.zeros(grid, np.int32),
        reads=np.zeros((slots, k), np.int32),
        present=np.zeros((slots, k), bool),
        preference=np.zeros((slots, k, k), np.float32),
        margin=np.zeros(slots, np.float32),
        weight=np.zeros(slots, np.float32),
        lm_targets=np.zeros(grid, np.int32),
        lm_weights=np.zeros(grid, np.float32),
    )


def runs(item: Encoded, length: int) -> list[tuple[int, range]]:
    """Splits a comparison into the fewest runs of responses that fit a row with the prompt.

    Args:
      item: a comparison whose longest dialogue has at most `length` tokens.
      length: tokens of a row.

    Returns:
      (tokens, responses) of each run; a run is laid out as one segment.
    """
    found, start, size = [], 0, len(item.prompt)
    for k, response in enumerate(item.responses):
        if size + len(response) > length and k > start:
            found.append((size, range(start, k)))
            start, size = k, len(item.prompt)
        size += len(response)
    return [*found, (size, range(start, len(item.responses)))]


class _Bin:
    """The rows of one micro-batch while it is being filled."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.free = [layout.length] * layout.rows
        self.indices: list[int] = []
        # (slot, row, first column, responses) of each segment
        self.segments: list[tuple[int, int, int, range]] = []

    def place(self, index: int, segments: list[tuple[int, range]]) -> bool:
        """Places all segments, (tokens, responses) each, of a comparison, or none."""
        if len(self.indices) == self.layout.slots:
            return False
        free, placed = list(self.free), []
        for size, responses in segments:
            row = next((r for r, tokens in enumerate(free) if tokens >= size), None)
            if row is None:
                return False
            placed.append((len(self.indices), row, self.layout.length - free[row], responses))
            free[row] -= size
        self.free = free
        self.indices.append(index)
        self.segments += placed
        return True

    def full(self, smallest: int) -> bool:
        return len(self.indices) == self.layout.slots or max(self.free) < smallest


def _fill(placed: _Bin, encoded: Sequence[Encoded], layout: Layout) -> MicroBatch:
    """Writes the comparisons of a bin into arrays."""
    batch = empty_micro_batch(layout)
    for slot, index in enumerate(placed.indices):
        item, k = encoded[index], len(encoded[index].responses)
        batch.present[slot, :k] = True
        batch.preference[slot, :k, :k] = item.preference
        batch.margin[slot], batch.weight[slot] = item.margin, item.weight
    for number, (slot, row, column, responses) in enumerate(placed.segments, start=1):
        item = encoded[placed.indices[slot]]
        start, prompt = column, len(item.prompt)
        batch.tokens[row, column:column + prompt] = item.prompt
        batch.positions[row, column:column + prompt] = np.arange(prompt)
        column += prompt
        best = _best_response(item)
        for local, k in enumerate(responses, start=1):
            response = item.responses[k]
            stop = column + len(response)
            batch.tokens[row, column:stop] = response
            batch.positions[row, column:stop] = prompt + np.arange(len(response))
            batch.responses[row, column:stop] = local
            batch.reads[slot, k] = row * layout.length + stop - 1
            if k == best:
                # Each token is predicted from the one before it, the first from the prompt's last.
                sources = np.r_[[start + prompt - 1] if prompt else [], column:stop - 1].astype(int)
                batch.lm_targets[row, sources] = response[len(response) - len(sources):]
                batch.lm_weights[row, sources] = item.weight / max(len(sources), 1)
            column = stop
        batch.segments[row, start:column] = number
    return batch


def _best_response(item: Encoded) -> int | None:
    """The response preferred to all others it was compared with, if one stands out."""
    wins = item.preference.sum(axis=1) - item.preference.sum(axis=0)
    best = np.flatnonzero(wins == wins.max())
    return int(best[0]) if len(best) == 1 else None
