"""Low-rank adapters (LoRA, Hu et al. 2021): what is learnt beside kernels that stay as they are.

An adapted kernel W [D, F] computes x W + s x A B, A [D, r], B [r, F]. Kernels that are joined here
but stand by themselves in checkpoints (queries, keys and values; gate and up) have an adapter for
each, so that adapters are those of other libraries.

Axes: D features in, F features out, r rank.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.models.architecture import Architecture, Leaf, leaves
from qrm.models.families import Family

ALL = 'all-linear'  # as a target: every kernel of the blocks


class Module(NamedTuple):
    """A linear map of a checkpoint that has an adapter.

    Attributes:
      kernel: path of the parameter, without 'blocks/' and '/kernel'.
      name: last part of its name in checkpoints, as 'q_proj'; different for all of a kernel.
      start, stop: which columns of the kernel it is.
    """

    kernel: str
    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of a transformer, the same in all blocks.

    Attributes:
      rank: r.
      alpha: s is alpha / r.
      rank_stabilised: s is alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).
      modules: what is adapted.

    Raises:
      ValueError: a rank or an alpha that is not positive, or nothing to adapt.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    modules: tuple[Module, ...]

    def __post_init__(self):
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(f'rank={self.rank}, alpha={self.alpha}, expected positive numbers')
        if not self.modules:
            raise ValueError('targets (), expected at least one')

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def of(self, kernel: str) -> tuple[Module, ...]:
        """The adapted parts of a kernel."""
        return tuple(module for module in self.modules if module.kernel == kernel)


def module_names(family: Family, a: Architecture) -> dict[str, tuple[str, Module]]:
    """Linear maps of the blocks: name in the checkpoints of a family, `{}` the number -> module."""
    found = {}
    for path in leaves(a):
        if not path.startswith('blocks/') or not path.endswith('/kernel'):
            continue
        kernel, names = path[len('blocks/'):-len('/kernel')], family.tensors[path].names
        width = leaves(a)[path].shape[-1]
        sizes = a.parts[kernel.split('/')[-1]] if len(names) > 1 else (width,)
        start = 0
        for name, size in zip(names, sizes, strict=True):
            name = name.removesuffix('.weight')
            found[name] = Module(kernel, name.split('.')[-1], start, start + size)
            start += size
    return found


def targeted(family: Family, a: Architecture, targets: Sequence[str]) -> tuple[Module, ...]:
    """The modules that targets name.

    Args:
      family, a: of the model.
      targets: `ALL`, or ends of names of linear maps in its checkpoints, as 'q_proj' or
        'mlp.c_proj'.

    Raises:
      ValueError: a target that names none.
    """
    known = module_names(family, a)
    chosen = set()
    for target in targets:
        names = {name for name in known
                 if target == ALL or name == target or name.endswith(f'.{target}')}
        if not names:
            ends = sorted({module.name for module in known.values()})
            raise ValueError(f'target {target!r}, expected {ALL!r} or some of {ends}')
        chosen |= names
    return tuple(module for name, module in known.items() if name in chosen)


def adapter_leaves(a: Architecture, lora: Lora) -> dict[str, Leaf]:
    """Parameters by path, as `architecture.leaves`, which they stand beside."""
    found, kernels = {}, leaves(a)
    for module in lora.modules:
        d = kernels[f'blocks/{module.kernel}/kernel'].shape[-2]
        path = f'blocks/{module.kernel}/lora/{module.name}'
        found[f'{path}/a'] = Leaf((a.num_layers, d, lora.rank), 'uniform')
        found[f'{path}/b'] = Leaf((a.num_layers, lora.rank, module.stop - module.start), 'zeros')
    return found


def add(
    params: Mapping[str, Any], lora: Lora, kernel: str, x: jax.Array, y: jax.Array,
    project: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Output y [..., F] of a kernel, and what its adapters make of its input x [..., D].

    The A of all its adapters stand side by side, each B adds to its own columns.

    Args:
      params: name -> {'a', 'b'}.
      lora: which adapters.
      kernel: path of the kernel, see `Module`.
      x, y: its input and output.
      project: x times a matrix.
    """
    modules = lora.of(kernel)
    inner = split(project(x, jnp.concatenate([params[m.name]['a'] for m in modules], axis=-1)),
                  (lora.rank,) * len(modules))
    added = {module.start: project(h, lora.scaling * params[module.name]['b'])
             for module, h in zip(modules, inner, strict=True)}
    edges = sorted({0, y.shape[-1]} | {edge for m in modules for edge in (m.start, m.stop)})
    sizes = tuple(stop - start for start, stop in itertools.pairwise(edges))
    parts = [part + added[start] if start in added else part
             for start, part in zip(edges, split(y, sizes), strict=False)]
    return jnp.concatenate(parts, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def split(x: jax.Array, sizes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The parts of x [..., F] that joined maps give, of these sizes along the last axis.

    Written out for its backward pass, which puts them together again: differentiation would pad
    each with zeros, and jaxlib 0.10.2 reads before the start of what it pads on CPU, where there
    may be no memory: a run would die, once in a while.
    """
    return tuple(jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis=-1))


def _split_forward(x, sizes):
    return split(x, sizes), None


def _split_backward(sizes, _, gradients):
    return (jnp.concatenate(gradients, axis=-1),)


split.defvjp(_split_forward, _split_backward)


def merge(backbone: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """A backbone with W + s A B in place of adapted kernels, float32."""
    blocks = dict(backbone['blocks'])
    for kernel in dict.fromkeys(module.kernel for module in lora.modules):
        branch, name = kernel.split('/')
        p = dict(blocks[branch][name])
        adapters, whole = p.pop('lora'), jnp.asarray(p['kernel'], jnp.float32)
        for module in lora.of(kernel):
            a, b = adapters[module.name]['a'], adapters[module.name]['b']
            whole = whole.at[..., module.start:module.stop].add(
                lora.scaling * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
        p['kernel'] = whole
        blocks[branch] = blocks[branch] | {name: p}
    return dict(backbone) | {'blocks': blocks}
