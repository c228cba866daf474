"""Training less than everything: which parameters a run changes, and which stay as they are."""

import dataclasses
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qrm.models.lora import Lora

KINDS = ('all', 'lora', 'last', 'head')


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Which parameters are trained.

    What lies between the last block and the head and comes with the head, the pooler of an encoder,
    is trained with it, but by 'head'. What stands beside the backbone, a head, always is.

    Attributes:
      kind: 'all'; 'lora', adapters and head; 'last', the last blocks, the final norm and head; or
        'head'.
      blocks: how many by 'last'.
      lora: the adapters of 'lora'.

    Raises:
      ValueError: an unknown kind, or one with what belongs to another.
    """

    kind: str = 'all'
    blocks: int = 0
    lora: Lora | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f'tuning {self.kind!r}, expected one of {KINDS}')
        if (self.kind == 'lora') != (self.lora is not None):
            raise ValueError(f'tuning {self.kind!r} with lora={self.lora}')
        if (self.kind == 'last') != bool(self.blocks):
            raise ValueError(f'tuning {self.kind!r} of {self.blocks} blocks')

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trained and frozen parameters; both have the tree of the whole, without what they lack.

        Args:
          params: of a network, blocks stacked.
        """
        if self.kind == 'all':
            return dict(params), {}
        heads = {name: part for name, part in params.items() if name != 'backbone'}
        if self.kind == 'head':
            return heads, {'backbone': params['backbone']}
        backbone = dict(params['backbone'])
        trained = {name: backbone.pop(name) for name in ('pooler',) if name in backbone}
        blocks = backbone.pop('blocks')
        if self.kind == 'lora':
            trained['blocks'], backbone['blocks'] = _part(blocks, 'lora')
        else:
            if 'norm' in backbone:
                trained['norm'] = backbone.pop('norm')
            trained['blocks'] = jax.tree.map(lambda leaf: leaf[-self.blocks:], blocks)
            if self.blocks < _count(blocks):
                backbone['blocks'] = jax.tree.map(lambda leaf: leaf[:-self.blocks], blocks)
        return {'backbone': trained, **heads}, {'backbone': backbone}

    def join(self, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `split`, copying nothing: blocks may come in runs, see `Transformer`."""
        if self.kind == 'last':
            backbone = frozen['backbone'] | trained['backbone']
            runs = [runs_of(part['backbone']['blocks']) for part in (frozen, trained)
                    if 'blocks' in part['backbone']]
            backbone['blocks'] = sum(runs, ())
            return dict(trained) | {'backbone': backbone}
        if self.kind == 'lora':
            parts = [part['backbone']['blocks'] for part in (frozen, trained)]
            if cut := next((part for part in parts if isinstance(part, tuple)), None):
                counts = [_count(run) for run in cut]
                trained, frozen = (cut_blocks(part, counts) for part in (trained, frozen))
        return _union(trained, frozen)


def parse(text: str) -> tuple[str, int]:
    """Kind and number of blocks of 'all', 'lora', 'last:4' or 'head'.

    Raises:
      ValueError: it is none.
    """
    kind, _, blocks = text.partition(':') if isinstance(text, str) else ('', '', '')
    if kind == 'last' and blocks.isdecimal() and int(blocks):
        return kind, int(blocks)
    if kind not in KINDS or kind == 'last' or text != kind:
        raise ValueError(f"{text!r}, expected 'all', 'lora', 'last:N' (the last N blocks) or "
                         "'head'")
    return kind, 0


def runs_of(blocks: Any) -> tuple[Any, ...]:
    """Blocks as runs, each stacked along a leading axis."""
    return blocks if isinstance(blocks, tuple) else (blocks,)


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters whose blocks are runs of one; the same if there are no blocks among them."""
    blocks = params.get('backbone', {}).get('blocks')
    return dict(params) if blocks is None else cut_blocks(params, [1] * _count(blocks))


def cut_blocks(params: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """Parameters whose blocks, stacked or cut like that already, are runs of so many."""
    blocks = params['backbone']['blocks']
    if not isinstance(blocks, tuple):
        stops = list(itertools.accumulate(counts, initial=0))
        blocks = tuple(jax.tree.map(operator.itemgetter(slice(low, high)), blocks)
                       for low, high in itertools.pairwise(stops))
    return dict(params) | {'backbone': params['backbone'] | {'blocks': blocks}}


def stack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters whose blocks, if there are any, are one run."""
    blocks = params.get('backbone', {}).get('blocks')
    if not isinstance(blocks, tuple):
        return dict(params)
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *blocks)
    return dict(params) | {'backbone': params['backbone'] | {'blocks': whole}}


def _count(blocks: Any) -> int:
    """How many blocks are stacked."""
    return len(jax.tree.leaves(blocks)[0])


def _part(tree: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stands under a name anywhere in a tree of dicts, and what does not."""
    inside, outside = {}, {}
    for key, value in tree.items():
        if key == name:
            inside[key] = value
        elif isinstance(value, Mapping):
            found, rest = _part(value, name)
            inside |= {key: found} if found else {}
            outside |= {key: rest} if rest else {}
        else:
            outside[key] = value
    return inside, outside


def _union(a: Any, b: Any) -> Any:
    """Two trees of dicts and tuples as one; no leaf may be in both."""
    if isinstance(a, tuple):
        return tuple(_union(x, y) for x, y in zip(a, b, strict=True))
    return {key: _union(a[key], b[key]) if key in a and key in b else a.get(key, b.get(key))
            for key in (*a, *(key for key in b if key not in a))}
