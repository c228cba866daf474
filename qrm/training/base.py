"""What the parameters of a run start from: a checkpoint or random numbers, trained and frozen.

A run that trains only some parameters saves those, and a `Base` by which the others are found
again.
"""

import dataclasses
import functools
import hashlib
import os
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qrm.data.comparisons import DataError
from qrm.models import adapters, parallel, sharding
from qrm.models.architecture import flat, leaf_dtype, tree
from qrm.models.network import DTYPES, Network, Params
from qrm.models.weights import Pretrained


@dataclasses.dataclass(frozen=True)
class Base:
    """Where frozen parameters are to be found.

    Attributes:
      checkpoint: absolute path of a folder, or hub name; '': they are random.
      seed: of random parameters.
      dtype: of frozen tables and kernels, one of `DTYPES`.
      digest: of what is frozen, see `find`; '' if nothing is.

    Raises:
      ValueError: one of them is none.
    """

    checkpoint: str
    seed: int
    dtype: str
    digest: str = ''

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f'dtype={self.dtype!r}, expected one of {DTYPES}')
        for key, kind in (('checkpoint', str), ('seed', int), ('digest', str)):
            if not isinstance(getattr(self, key), kind):
                raise ValueError(f'{key}={getattr(self, key)!r}, expected a {kind.__name__}')


class Start(NamedTuple):
    """Parameters before the first step, see `Tuning.split`.

    Attributes:
      trained: float32.
      frozen: {} if all are trained.
      anew: names of parts of the backbone that the checkpoint does not have.
    """

    trained: Params
    frozen: Params
    anew: list[str]


def find(checkpoint: str, seed: int, dtype: str, *, frozen: bool) -> Base:
    """The base of a run.

    Args:
      checkpoint: folder or hub name; '': random.
      seed, dtype: as in `Base`.
      frozen: whether parameters stay as they are, so that their digest is needed. It is one of
        the files: settings and all tensors as they are stored; of random ones, of random bits.

    Raises:
      DataError: see `adapters.find`.
    """
    place = os.path.abspath(checkpoint) if os.path.isdir(checkpoint) else checkpoint
    return Base(place, seed, dtype, _digest(place, seed) if frozen else '')


def read(base: Base, *, whole: bool, output: bool) -> Pretrained:
    """The base's checkpoint.

    Args:
      base: with a checkpoint.
      whole: all of it is trained, so it is read in float32.
      output: see `adapters.load_pretrained`.

    Raises:
      DataError: see `adapters.find` and `adapters.load_pretrained`.
    """
    return adapters.load_pretrained(adapters.find(base.checkpoint), output=output,
                                    dtype='float32' if whole else base.dtype)


def start(
    network: Network, base: Base, pretrained: Pretrained | None, mesh: Mesh | None = None
) -> Start:
    """Parameters of a network that starts from a base.

    Args:
      network: whose parameters.
      base: the base.
      pretrained: what `read` gave; None if it has no checkpoint.
      mesh: over which they are split; None: they are not.

    Raises:
      DataError: a part of the backbone would start anew and not be trained.
    """
    key, tuning = jax.random.key(base.seed), network.tuning
    shapes = jax.eval_shape(network.init, key)
    places = None if mesh is None else flat(sharding.shardings(shapes, mesh))
    known = flat({'backbone': pretrained.backbone}) if pretrained else {}
    missing = tuple(path for path in flat(shapes) if path not in known)
    # The last blocks of 'last' are trained, so nothing is rounded before they are split off.
    dtype = base.dtype if tuning.kind in ('lora', 'head') else 'float32'
    made = _make(network, dtype, missing, key) if places is None else jax.jit(
        functools.partial(_make, network, dtype, missing),
        out_shardings={path: places[path] for path in missing})(key)
    if places:
        known = sharding.split(known, {path: places[path] for path in known})
    # In the order of `init`, whatever is known.
    params = parallel.arrange(tree({path: (known | made)[path] for path in flat(shapes)}),
                              network.architecture, mesh)
    trained, frozen = params, {}
    if tuning.kind != 'all':

        def split(params: Params) -> tuple[Params, Params]:
            trained, frozen = tuning.split(params)
            return trained, {'backbone': tree({
                path: leaf.astype(leaf_dtype(path, base.dtype))
                for path, leaf in flat(frozen['backbone']).items()})}

        if mesh is None:
            trained, frozen = split(params)
        else:
            parts = jax.eval_shape(split, params)
            trained, frozen = jax.jit(split, out_shardings=sharding.shardings(parts, mesh))(params)
    anew = sorted({path.split('/')[1] for path in missing
                   if pretrained and path.startswith('backbone/') and '/lora/' not in path})
    if lost := [name for name in anew if name in frozen.get('backbone', {})]:
        raise DataError(f'{base.checkpoint} has no {", ".join(lost)}, which would stay random: '
                        "expected config.train.tune='all', 'lora' or 'last:N'")
    return Start(trained, frozen, anew)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make(network: Network, dtype: str, paths: tuple[str, ...], key: jax.Array) -> Params:
    """Random parameters at some paths."""
    made = flat(network.init(key, dtype))
    return {path: made[path] for path in paths}


def start_head(network: Network, base: Base) -> Params:
    """What `start` gives as trained parameters where only the head is; no checkpoint is read."""
    return {'head': jax.jit(network.init_head)(jax.random.key(base.seed))}


def restore_frozen(network: Network, base: Base) -> Params:
    """The frozen parameters of a run, found again, as `start` gave them.

    Raises:
      DataError: the base is not there, or is another one than that the run was trained on.
    """
    pretrained = None
    if _digest(base.checkpoint, base.seed) != base.digest:
        raise DataError(f'{base.checkpoint}: other weights than those the run was trained on'
                        if base.checkpoint else
                        f'the random numbers of seed {base.seed} are others than those the run was '
                        'trained on, or it began with a checkpoint')
    if base.checkpoint:
        # As when the run was started, also as to what 'last' rounds.
        pretrained = read(base, whole=network.tuning.kind == 'last', output=network.language_model)
    return start(network, base, pretrained).frozen


def _digest(checkpoint: str, seed: int) -> str:
    """Hexadecimal digest of the files that a checkpoint, and the base of an adapter, consist of.

    Without one, of what the generator makes of a seed: bits, which are the same on every device
    where floats that are made of them are not, and which follow JAX's settings and defaults.
    """
    if not checkpoint:
        bits = np.asarray(jax.random.bits(jax.random.key(seed), (7, 3)), '<u4')
        return hashlib.sha256(bits.tobytes()).hexdigest()
    source = adapters.find(checkpoint)
    paths = [os.path.join(folder, name)
             for folder in (source.model, *([source.adapter.folder] if source.adapter else []))
             for name in sorted(os.listdir(folder))
             if name in ('config.json', adapters.CONFIG)
             or name.endswith(('.safetensors', '.safetensors.index.json'))]
    stats = map(os.stat, paths)
    return _digest_of(tuple((path, stat.st_size, stat.st_mtime_ns)
                            for path, stat in zip(paths, stats, strict=True)))


@functools.lru_cache(maxsize=1)
def _digest_of(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of files of these paths, sizes and times; they are read again if one of these changes."""
    found = hashlib.sha256()
    for path, size, _ in files:
        found.update(f'{os.path.basename(path)} {size}\n'.encode())
        with open(path, 'rb') as file:
            found.update(hashlib.file_digest(file, 'sha256').digest())
    return found.hexdigest()
