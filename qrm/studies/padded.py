"""Rewards where the paper's own code reads them: rows padded on the left, counted from the left.

Axes: n pairs, R rows, L columns, N outputs. Read in min-seong-kim/QR-RLHF (c0f8e59), which names
transformers 4.30.2: a batch holds the chosen responses of some pairs, then the rejected ones, all
padded on the left with EOS; the mask hides EOS, also where it ends a dialogue; columns are
positions; and the quantile model reads column (tokens that are not hidden) - 1, the scalar model
the last one. That column is the end of the text only for the longest dialogues of a batch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data.packing import MicroBatch
from qrm.models.attention import Plan
from qrm.models.network import Params, RewardNetwork
from qrm.training.reward_model import RewardModel

Ids = np.ndarray  # [length] int32, with EOS
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Places(NamedTuple):
    """Where responses are read, as numbers of them.

    Attributes:
      responses: all.
      end: at the last token of the text.
      inside: at an earlier token of the dialogue.
      padding: before the dialogue begins.
    """

    responses: int
    end: int
    inside: int
    padding: int


def places(lengths: np.ndarray, batch_size: int) -> Places:
    """Where the quantile model of the paper's code reads the responses of some pairs.

    Args:
      lengths: [n, 2] tokens of both dialogues of each pair, EOS included, in the order of the data.
      batch_size: pairs of a batch.
    """
    columns, first, last = (np.concatenate(x) for x in zip(*(
        _columns(lengths[start:start + batch_size])
        for start in range(0, len(lengths), batch_size)), strict=True))
    end, padding = int(np.sum(columns == last)), int(np.sum(columns < first))
    return Places(columns.size, end, columns.size - end - padding, padding)


def _columns(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns [n, 2] that are read in one batch, and of the first and last token of the text."""
    width = lengths.max()
    return lengths - 2, width - lengths, np.full_like(lengths, width - 2)


def outputs(
    model: RewardModel, dialogues: Sequence[Sequence[Ids]], batch_size: int, *, last: bool = False
) -> list[np.ndarray]:
    """Raw outputs [2, N] of each pair, read as a model of the paper's code does.

    Args:
      model: one that appends EOS.
      dialogues: n pairs of dialogues in tokens, no longer than the model has positions.
      batch_size: pairs of a batch.
      last: read at the last column, as its scalar model does; else as its quantile model.
    """
    eos = model.tokenizer.eos_token_id
    width = max(len(ids) for pair in dialogues for ids in pair)
    result = []
    for start in range(0, len(dialogues), batch_size):
        batch = dialogues[start:start + batch_size]
        # Chosen responses first; a last batch that is short is filled by its own rows.
        rows = [pair[side] for side in (0, 1) for pair in batch]
        used = max(map(len, rows))
        filled = [rows[i % len(rows)] for i in range(2 * batch_size)]
        tokens = np.stack([np.pad(ids, (used - len(ids), width - used), constant_values=eos)
                           for ids in filled])
        reads = np.where(last, used, np.sum(tokens != eos, axis=1)) - 1
        found = np.asarray(_outputs(model.network, model.params, tokens,
                                    padded_mask(tokens != eos, used), reads))
        result += list(found[:len(rows)].reshape(2, len(batch), -1).swapaxes(0, 1))
    return result


def padded_mask(shown: np.ndarray, used: int) -> np.ndarray:
    """What transformers 4.30.2 adds to the logits of GPT-2's attention, [R, L, L] float32.

    The lowest number for a later key, and once more for a hidden one, so that a key that is both
    is infinitely far and the others of a row without any visible key are equal: a position in the
    padding sees the padding up to it, and the whole text behind it, with equal weights.

    Args:
      shown: [R, L] bool, tokens that are not hidden.
      used: columns of the batch; later ones are there for a common shape, and seen by none.
    """
    length = shown.shape[1]
    columns = np.arange(length)
    later = columns[None, :] > columns[:, None]
    hidden = ~shown[:, None, :]
    mask = np.where(later | hidden, np.float32(_LOWEST), np.float32(0.0))
    return np.where(later & hidden | (columns >= used), np.float32(-np.inf), mask)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(network: RewardNetwork, params: Params, tokens: jax.Array, mask: jax.Array,
             reads: jax.Array) -> jax.Array:
    """Raw outputs [R, N] of rows [R, L], each read at one column [R]."""
    rows, length = tokens.shape
    zeros, none = jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, 0))
    at = (jnp.arange(rows) * length + reads)[:, None]
    batch = MicroBatch(
        tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), zeros + 1, zeros, at, at,
        jnp.zeros_like(at), jnp.ones_like(at, bool), *[none] * 7)
    contexts, plan = network.contexts(batch), Plan(mask)
    own = {id(context): context._replace(plan=plan) for context in contexts}  # alike stay the same
    hidden = network.hidden(params, batch, network.embed(params, batch), everywhere=True,
                            contexts=tuple(own[id(context)] for context in contexts))
    return network.outputs(params, hidden)[:, 0]
