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
step consists of as many micro-batches of one fixed shape as its comparisons need; what is left
over goes to micro-batches of a quarter of that size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qrm.data.encoded import Encoded, Lengths

_FEW = 3  # micro-batches of a quarter; four would be no smaller than a whole one
# Comparisons of up to 8 responses share layouts, those of up to 64, and so on: what is known of all
# pairs of a comparison takes [K, K], and K is that of the largest of its layout.
_FIRST_CLASS, _CLASS_FACTOR = 8, 8


class MicroBatch(NamedTuple):
    """Comparisons in R rows of L tokens; what the network and the losses read.

    Attributes:
      tokens: [R, L] int32.
      positions: [R, L] int32, index of the token within its dialogue.
      segments: [R, L] int32, unique within a row; 0 is padding.
      responses: [R, L] int32, 0 for prompt tokens, k for tokens of the segment's k-th response.
      reads: [C, K] int32, index into R * L of the token where each reward is read.
      prompt_reads: [C, K] int32, index into R * L of the last token of each one's prompt.
      starts: [C, K] int32, position in the dialogue of the response's first token.
      present: [C, K] bool, whether there is such a response.
      preference: [C, K, K] float32, see `Comparison.preference_matrix`.
      ratings: [C, K, A] float32, NaN where missing.
      margin: [C] float32.
      annotator: [C] int32, -1 if unknown.
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
    prompt_reads: np.ndarray
    starts: np.ndarray
    present: np.ndarray
    preference: np.ndarray
    ratings: np.ndarray
    margin: np.ndarray
    annotator: np.ndarray
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


# One stack for each layout. A step's batch holds every layout, also those it leaves empty.
Batch = tuple[Stack, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shape of a micro-batch.

    Attributes:
      length: tokens a row (L).
      rows: rows (R).
      slots: comparisons at most (C).
      responses: responses of a comparison at most (K).
      attributes: ratings of a response (A).
      most, examples: how many of how many comparisons have this layout, which bounds how many
        there are in a step; 0: all may have it.
    """

    length: int
    rows: int
    slots: int
    responses: int
    attributes: int = 1
    most: int = 0
    examples: int = 0


class Packed(NamedTuple):
    """A filled micro-batch and which comparison stands in which slot.

    Attributes:
      layout: which of the layouts it has.
      micro_batch: the arrays.
      indices: for each used slot, index of its comparison in the packed sequence.
    """

    layout: int
    micro_batch: MicroBatch
    indices: list[int]


def fit_row_length(encoded: Sequence[Encoded], row_length: int) -> int:
    """Tokens of a row: `row_length`, or more where that would cut or repeat what can be shared.

    A row holds the longest dialogue. Up to four times `row_length` it also holds the largest
    comparison with its prompt laid out once; a still larger one is split.
    """
    lengths = Lengths.of(encoded)
    needed = max(int(lengths.longest.max()), min(int(lengths.sizes.max()), 4 * row_length))
    return row_length if needed <= row_length else round_length(needed)


def round_length(tokens: int) -> int:
    """The next of eight lengths an octave, so that similar data need no new compilation."""
    step = max(8, 2 ** max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def plan_layouts(
    encoded: Sequence[Encoded], *, row_length: int, rows: int
) -> tuple[Layout, ...]:
    """The shapes that hold any of these comparisons: one, and one of a quarter of its tokens.

    The second has a quarter of the rows, or one short row; it takes what is left over at the end
    of a step. More shapes would save little more and take longer to compile. Only comparisons of
    many responses have shapes of their own, so that memory follows tokens: see `classes`.

    Args:
      encoded: all comparisons that will ever be packed into these layouts.
      row_length: tokens of a row, at least; see `fit_row_length`.
      rows: rows of a micro-batch of `row_length` tokens; fewer, if the rows are longer.

    Raises:
      ValueError: there is nothing to plan for.
    """
    if not encoded:
        raise ValueError('no comparisons to lay out')
    length = fit_row_length(encoded, row_length)
    lengths, layouts = Lengths.of(encoded), []
    counts, all_sizes = lengths.counts, lengths.sizes
    for number, members in enumerate(classes(counts)):
        sizes = all_sizes[members]
        needed = max((len(runs(encoded[i], length)) for i in members[sizes > length]), default=1)
        count = max(needed, rows * row_length // length, 1)
        # Powers of two, again so that similar data have the same shapes.
        responses = 1 << (int(counts[members].max()) - 1).bit_length()
        typical = max(1, int(np.percentile(sizes, 5)))
        shapes = [(count, length)]
        smaller = (count // 4, length) if count >= 4 else (1, count * length // 4)
        if not number and sizes.min() <= smaller[1]:
            shapes.append(smaller)
        bound = (len(members), len(encoded)) if number else (0, 0)
        layouts += [
            Layout(size, count, 1 << (max(1, count * size // typical)).bit_length() - 1, responses,
                   encoded[0].ratings.shape[1], *bound)
            for count, size in shapes
        ]
    return tuple(layouts)


def classes(responses: Sequence[int]) -> list[np.ndarray]:
    """Indices of comparisons with these numbers of responses, together those that share shapes.

    Of pairs and a few comparisons of a thousand responses each has its own: a thousand squared for
    every pair would be far more than its tokens. Most data have one class.
    """
    responses = np.asarray(responses)
    found, below, largest = [], 0, _FIRST_CLASS
    while len(responses) and below < responses.max():
        members = np.flatnonzero((below < responses) & (responses <= largest))
        found += [members] if len(members) else []
        below, largest = largest, largest * _CLASS_FACTOR
    return found


def pack(encoded: Sequence[Encoded], layouts: Sequence[Layout]) -> list[Packed]:
    """Packs comparisons into as few micro-batches as first-fit-decreasing finds.

    All of a class have its first layout, but for the comparisons of one that fit a few of the
    second.

    Raises:
      ValueError: a comparison fits no micro-batch of the layout that holds its responses.
    """
    order = sorted(range(len(encoded)), key=lambda i: (-encoded[i].size, i))
    packed = []
    below = 0  # responses that the layouts before can hold
    for most in sorted({layout.responses for layout in layouts}):
        last = most == max(layout.responses for layout in layouts)
        own = [i for i in order
               if below < len(encoded[i].responses) and (last or len(encoded[i].responses) <= most)]
        (first, whole), *rest = [(number, layout) for number, layout in enumerate(layouts)
                                 if layout.responses == most]
        placed = [(first, one) for one in _first_fit(encoded, own, whole)]
        for number, layout in rest:
            for i in reversed(range(len(placed))):  # the last ones are the emptiest
                smaller = _in_few(encoded, placed[i][1].indices, layout)
                if smaller:
                    placed[i:i + 1] = [(number, one) for one in smaller]
                    break
        packed += placed
        below = most
    return [Packed(number, _fill(one, encoded, layouts[number]), one.indices)
            for number, one in packed]


def make_batch(
    encoded: Sequence[Encoded], layouts: Sequence[Layout], batch_size: int
) -> Batch:
    """Packs the comparisons of one step of one device into stacks of fixed shape.

    Args:
      encoded: at most `batch_size` comparisons.
      layouts: from `plan_layouts`.
      batch_size: the most comparisons that any batch of these shapes may hold.
    """
    return stack(pack(encoded, layouts), layouts, batch_size, empty_micro_batch)


def stack(
    packed: Sequence[Packed], layouts: Sequence[Layout], batch_size: int,
    empty: Callable[[Layout], Any],
) -> Batch:
    """Micro-batches as stacks of fixed shape.

    Args:
      packed: of at most `batch_size` comparisons; their micro-batches may be any tuples and
        mappings of arrays, the same for all.
      layouts, batch_size: see `make_batch`.
      empty: one without comparisons.
    """
    stacks = []
    for number, layout in enumerate(layouts):
        filled = [item.micro_batch for item in packed if item.layout == number]
        small = number and layouts[number - 1].responses == layout.responses
        size = _FEW if small else stack_size(layout, batch_size)
        padding = [empty(layout)] * (size - len(filled))
        stacks.append(Stack(np.asarray(len(filled), np.int32), _stacked([*filled, *padding])))
    return tuple(stacks)


def _stacked(trees: Sequence[Any]) -> Any:
    """Tuples and mappings of arrays as one of arrays with a leading axis."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: _stacked([tree[key] for tree in trees]) for key in first}
    if isinstance(first, tuple):
        return type(first)(*map(_stacked, zip(*trees, strict=True)))
    return np.stack(trees)


def stack_size(layout: Layout, batch_size: int) -> int:
    """The most micro-batches (M) that first-fit can need for `batch_size` comparisons.

    A comparison takes at most min(R, K) rows and opens a new micro-batch only if every open one
    has fewer empty rows than that or no free slot.
    """
    if layout.most:  # of each epoch that a step may touch
        batch_size = min(batch_size, layout.most * (batch_size // layout.examples + 2))
    needed = min(layout.rows, layout.responses)
    at_least = min(layout.slots, -(-(layout.rows - needed + 1) // needed))
    return -(-batch_size // at_least)


def share(sizes: np.ndarray, parts: int) -> list[np.ndarray]:
    """Deals comparisons to devices, largest first, so that all get about equally much work.

    Args:
      sizes: tokens of each.
      parts: number of devices.

    Returns:
      For each device places of its comparisons.
    """
    order = np.argsort(-sizes, kind='stable')
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
        prompt_reads=np.zeros((slots, k), np.int32),
        starts=np.zeros((slots, k), np.int32),
        present=np.zeros((slots, k), bool),
        preference=np.zeros((slots, k, k), np.float32),
        ratings=np.full((slots, k, layout.attributes), np.nan, np.float32),
        margin=np.zeros(slots, np.float32),
        annotator=np.full(slots, -1, np.int32),
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


class _Placed(NamedTuple):
    """Where the comparisons of one micro-batch stand.

    Attributes:
      indices: for each used slot, index of its comparison.
      segments: (slot, row, first column, responses) of each segment.
    """

    indices: list[int]
    segments: list[tuple[int, int, int, range]]


def _first_fit(
    encoded: Sequence[Encoded], order: Sequence[int], layout: Layout
) -> list[_Placed]:
    """Places comparisons, in this order, each in the first micro-batch that has room."""
    placed: list[_Placed] = []
    free = np.full((len(order) + 1, layout.rows), layout.length)
    for index in order:
        segments = runs(encoded[index], layout.length)
        # One more than are open: the last one is empty.
        rooms = np.flatnonzero(free[:len(placed) + 1].max(axis=1) >= max(n for n, _ in segments))
        for number in rooms:
            if number < len(placed) and len(placed[number].indices) == layout.slots:
                continue
            left, found = free[number].copy(), []
            for size, responses in segments:
                fits = np.flatnonzero(left >= size)
                if not len(fits):
                    break
                found.append((fits[0], layout.length - left[fits[0]], responses))
                left[fits[0]] -= size
            if len(found) == len(segments):
                break
        else:
            raise ValueError(f'{encoded[index].id}: {len(segments)} segments of up to '
                             f'{max(n for n, _ in segments)} tokens fit no micro-batch of {layout}')
        if number == len(placed):
            placed.append(_Placed([], []))
        slot = len(placed[number].indices)
        placed[number].indices.append(index)
        placed[number].segments.extend((slot, *place) for place in found)
        free[number] = left
    return placed


def _in_few(encoded: Sequence[Encoded], order: Sequence[int], layout: Layout) -> list[_Placed]:
    """Places comparisons in at most `_FEW` micro-batches; none if they do not fit."""
    if sum(encoded[i].size for i in order) > _FEW * layout.rows * layout.length:
        return []
    try:
        placed = _first_fit(encoded, order, layout)
    except ValueError:
        return []
    return placed if len(placed) <= _FEW else []


def _fill(placed: _Placed, encoded: Sequence[Encoded], layout: Layout) -> MicroBatch:
    """Writes the comparisons of a micro-batch into arrays."""
    batch = empty_micro_batch(layout)
    for slot, index in enumerate(placed.indices):
        item, k = encoded[index], len(encoded[index].responses)
        batch.present[slot, :k] = True
        batch.preference[slot, :k, :k] = item.preference
        batch.ratings[slot, :k] = item.ratings
        batch.margin[slot], batch.weight[slot] = item.margin, item.weight
        batch.annotator[slot] = item.annotator
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
            if item.prompt_sizes:
                size = item.prompt_sizes[k]
                end = max(size - 1, 0)
                at = start + end if end < prompt else column + end - prompt
                batch.prompt_reads[slot, k] = row * layout.length + at
                # Of a response without a token of its own, the last of the dialogue.
                batch.starts[slot, k] = min(size, prompt + len(response) - 1)
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
    return int(best[0]) if len(best) == 1 and len(wins) > 1 else None
