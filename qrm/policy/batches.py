"""Micro-batches of a policy: packed rows, and where in them the tokens of responses are.

A response is all that follows its prompt as that is alone (`tokens.Reading.answers`), EOS included;
its tokens stand side by side in a row. What else a step needs to know of responses or of their
tokens, such as their log-probabilities under a reference, goes along as `extras`.

Axes: R rows, L tokens a row, C prompts, K responses, T tokens of a response.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data import packing
from qrm.data.encoded import Encoded
from qrm.data.packing import Batch, Layout, MicroBatch


class PolicyBatch(NamedTuple):
    """A micro-batch.

    Attributes:
      rows: the tokens, and what is known of comparisons.
      mask: [C, K, T] bool, where there is a token that is predicted: not the first of a dialogue.
      extras: name -> [C, K] or [C, K, T] float32, 0 where there is nothing.
    """

    rows: MicroBatch
    mask: np.ndarray
    extras: dict[str, np.ndarray]

    def places(self) -> tuple[jax.Array, jax.Array]:
        """Twice [C, K, T] int32: index into R * L of each token, and of that it is predicted from.

        Where `mask` is False these are meaningless.
        """
        rows = self.rows
        count = _counts(rows)
        place = (rows.reads - count + 1)[..., None] + jnp.arange(self.mask.shape[-1])
        first = jnp.arange(self.mask.shape[-1]) == 0
        return place, jnp.where(first, rows.prompt_reads[..., None], place - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extended(Encoded):
    """A comparison with more that a step reads of it.

    Attributes:
      extras: name -> [K] float32 of responses, or K arrays [n_k] float32 of their tokens.
    """

    extras: Mapping[str, Any]


class Plan(NamedTuple):
    """Shapes of the micro-batches of a run.

    Attributes:
      layouts: of the rows.
      longest: tokens of a response at most (T).
      of_responses, of_tokens: names of the extras that are [C, K], and of those [C, K, T].
    """

    layouts: tuple[Layout, ...]
    longest: int
    of_responses: tuple[str, ...] = ()
    of_tokens: tuple[str, ...] = ()


def apart(item: Encoded) -> Encoded:
    """A comparison whose prompts are sized as `Reading.answers` lays it out.

    What responses have in common is laid out for each, and one that has no token of its own begins
    with the last of its dialogue.
    """
    dialogues = [np.concatenate([item.prompt, response]) for response in item.responses]
    own = tuple(min(size, len(ids) - 1) for size, ids in
                zip(item.prompt_sizes, dialogues, strict=True))
    shared = min(len(item.prompt), *own)
    return dataclasses.replace(item, prompt=item.prompt[:shared], prompt_sizes=own,
                               responses=tuple(ids[shared:] for ids in dialogues))


def sizes(item: Encoded) -> np.ndarray:
    """[K], tokens of each response of a comparison, as `PolicyBatch` has them."""
    return np.array([len(item.prompt) + len(response) - size for size, response in
                     zip(item.prompt_sizes, item.responses, strict=True)])


def longest(encoded: Sequence[Encoded]) -> int:
    """Tokens of a response at most (T), rounded up so that similar data have the same shapes."""
    return packing.round_length(max(int(sizes(item).max()) for item in encoded))


def plan(
    encoded: Sequence[Encoded], *, row_length: int, rows: int, of_responses: Sequence[str] = (),
    of_tokens: Sequence[str] = (),
) -> Plan:
    """The shapes that hold any of these comparisons, see `packing.plan_layouts`."""
    return Plan(packing.plan_layouts(encoded, row_length=row_length, rows=rows), longest(encoded),
                tuple(of_responses), tuple(of_tokens))


def make_batch(encoded: Sequence[Encoded], plan: Plan, batch_size: int) -> Batch:
    """Packs the comparisons of one step of one device, see `packing.make_batch`.

    Args:
      encoded: at most `batch_size` comparisons; with extras `Extended` ones.
      plan: the shapes.
      batch_size: the most comparisons that any batch of these shapes may hold.
    """
    packed = [one._replace(micro_batch=_with_extras(
        policy_batch(one.micro_batch, plan.longest), [encoded[i] for i in one.indices], plan))
        for one in packing.pack(encoded, plan.layouts)]
    return packing.stack(packed, plan.layouts, batch_size, lambda layout: _with_extras(
        policy_batch(packing.empty_micro_batch(layout), plan.longest), [], plan))


def policy_batch(rows: MicroBatch, longest: int) -> PolicyBatch:
    """A micro-batch, without extras, of rows whose responses have at most so many tokens."""
    place = np.arange(longest)
    inside = place < _counts(rows)[..., None]
    predicted = (place > 0) | (rows.starts[..., None] > 0)
    return PolicyBatch(rows, inside & predicted & rows.present[..., None], {})


def _counts(rows: MicroBatch) -> Any:
    """[C, K], tokens of each response."""
    return rows.positions.reshape(-1)[rows.reads] - rows.starts + 1


def _with_extras(batch: PolicyBatch, items: Sequence[Extended], plan: Plan) -> PolicyBatch:
    """A micro-batch with the extras of the comparisons in its first slots."""
    extras = {name: np.zeros(batch.mask.shape[:2], np.float32) for name in plan.of_responses}
    extras |= {name: np.zeros(batch.mask.shape, np.float32) for name in plan.of_tokens}
    for slot, item in enumerate(items):
        for name in plan.of_responses:
            extras[name][slot, :len(item.responses)] = item.extras[name]
        for name in plan.of_tokens:
            for k, values in enumerate(item.extras[name]):
                extras[name][slot, k, :len(values)] = values
    return batch._replace(extras=extras)
