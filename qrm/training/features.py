"""Hidden states that are computed once: the files that keep them, and training heads on them.

Where only the head is trained, it reads the same of the backbone in every step. That is computed
once for each comparison and kept in a folder that runs may share, whatever their heads and losses.
Each read (`head.reads`) has files of its own, so that a head takes what it reads of what was
computed for others:

    <key>/about.json     backbone, which read of it, dtype: what the key is a digest of
    <key>/features.f32   [responses, D] float32, one comparison after the other
    <key>/index          a line for each comparison: digest of its tokens, first row and number of
                         rows in features.f32, checksum of these

These grow at their ends, features first. What the index names is whole, and an extraction that was
killed goes on where it stopped.

Axes: M micro-batches, C comparisons, K responses, A attributes; D features of a read, W those of
all that the head reads.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from qrm.data import packing
from qrm.data.encoded import Encoded
from qrm.data.packing import Batch, Stack
from qrm.models.network import Hidden, Params, RewardNetwork
from qrm.rewards.heads import parse_read
from qrm.training import inference, step, workdir
from qrm.training.base import Base, restore_frozen
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.workdir import WorkdirError

_SLOTS = 64  # pairs of a micro-batch, which bounds what a head with many outputs takes
_ROWS = 256  # responses that a head is applied to at once
_SECONDS = 30  # between lines that say how far an extraction is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Featured(Encoded):
    """A comparison with what the head reads of it.

    Attributes:
      parts: [K, D] float32 of each read; may be read from a file when used.
    """

    parts: tuple[np.ndarray, ...]

    @property
    def features(self) -> np.ndarray:
        """[K, W] float32, see `RewardNetwork.features`."""
        return np.concatenate(self.parts, axis=1)


class FeatureBatch(NamedTuple):
    """Comparisons with features in place of tokens; the rest as in `packing.MicroBatch`.

    Attributes:
      features: [C, K, W] float32.
    """

    features: np.ndarray
    present: np.ndarray
    preference: np.ndarray
    ratings: np.ndarray
    margin: np.ndarray
    annotator: np.ndarray
    weight: np.ndarray


class Layout(NamedTuple):
    """Shape of the micro-batches of one class of comparisons of a step, see `packing.classes`.

    Attributes:
      micro_batches: at most (M).
      slots: comparisons at most (C).
      responses: of a comparison at most (K).
      attributes: ratings of a response (A).
      width: features of a response (W).
    """

    micro_batches: int
    slots: int
    responses: int
    attributes: int
    width: int


class FeatureNetwork(RewardNetwork):
    """A network whose head alone is trained, on `FeatureBatch`; parameters are `{'head': ...}`."""

    def embed(self, params: Params, batch: FeatureBatch) -> None:
        """Nothing: what comes before the head is computed."""

    def hidden(
        self,
        params: Params,
        batch: FeatureBatch,
        embedded: None = None,
        dropout_key: None = None,
        *,
        everywhere: bool = False,
    ) -> Hidden:
        """Hidden states of a micro-batch, at the places that the head reads."""
        responses = self.architecture.hidden_size * len(self.head.reads)
        prompts = batch.features[..., responses:] if self.head.gated else None
        return Hidden(batch.features[..., :responses], prompts)


@dataclasses.dataclass(frozen=True)
class Features:
    """What a network with a frozen backbone reads of comparisons, kept in a folder.

    Attributes:
      network: the network.
      base: where its backbone is to be found; it is read if there is something to compute.
      folder: where features are kept; None: nowhere.
      row_length, rows: shape of a micro-batch of tokens, see `packing.plan_layouts`.
    """

    network: RewardNetwork
    base: Base
    folder: str | None
    row_length: int
    rows: int

    def of(self, encoded: Sequence[Encoded]) -> list[Featured]:
        """The comparisons with their features; those that are not kept are computed.

        With several processes all of them call it, with the same comparisons.

        Raises:
          DataError: the backbone is not there, is another one, or would stay random in parts.
          WorkdirError: the folder cannot be written into, or a file in it is damaged.
          NonFiniteLoss: the backbone gives numbers that are not finite.
        """
        if self.folder is None:
            found = [one for chunk in self._compute(encoded) for one in chunk]
        elif encoded:
            found = self._kept(encoded)
        else:
            found = []
        return [Featured(**vars(item), parts=tuple(parts))
                for item, parts in zip(encoded, found, strict=True)]

    def _compute(self, encoded: Sequence[Encoded]) -> Iterator[list[list[np.ndarray]]]:
        """Chunks of comparisons; [K, D] of each read of each of them."""
        frozen = step.place_frozen(self.network, restore_frozen(self.network, self.base))
        for chunk in inference.features(self.network, frozen, encoded, row_length=self.row_length,
                                        rows=self.rows):
            yield [np.split(of_item, len(self.network.columns), axis=1) for of_item in chunk]

    def _kept(self, encoded: Sequence[Encoded]) -> list[tuple[np.ndarray, ...]]:
        """[K, D] of each read of each comparison, from files that are added to before."""
        columns, width = self.network.columns, self.network.architecture.hidden_size
        files = [_Files(self.folder, self._about(column), width) for column in columns]
        digests = [[_digest(item, _reads_sizes(column)) for item in encoded] for column in columns]
        if any(_missing(files, digests)):
            with contextlib.ExitStack() as held:
                # In one order everywhere, so that no two runs wait for each other.
                for folder in sorted(one.folder for one in files):
                    held.enter_context(workdir.lock(folder, wait=True))
                # Without what another run has added meanwhile.
                self._add(files, encoded, digests, _missing(files, digests))
            multihost_utils.sync_global_devices('features')  # all of it can be read now
        for one in files:
            print(f'hidden states of {len(encoded)} comparisons are in {one.folder}', flush=True)
        return list(zip(*map(_Files.read, files, digests), strict=True))

    def _add(self, files: Sequence['_Files'], encoded: Sequence[Encoded],
             digests: Sequence[Sequence[str]], missing: Sequence[Set[int]]) -> None:
        """Computes what is missing of any read, and adds to each what is missing of it."""
        order = sorted(set().union(*missing))
        count, done = len(order), 0
        if not count:
            return
        print(f'computing hidden states of {count} comparisons', flush=True)
        start = told = time.monotonic()
        with contextlib.ExitStack() as opened:
            appends = [opened.enter_context(one.append()) for one in files]
            for chunk in self._compute([encoded[i] for i in order]):
                own = order[done:done + len(chunk)]
                for i, parts in zip(own, chunk, strict=True):
                    if not all(np.isfinite(part).all() for part in parts):
                        raise NonFiniteLoss(f'{encoded[i].id}: hidden states that are not finite')
                for column, append in enumerate(appends):
                    new = [(digests[column][i], parts[column])
                           for i, parts in zip(own, chunk, strict=True) if i in missing[column]]
                    if new:
                        append(*zip(*new, strict=True))
                done, now = done + len(chunk), time.monotonic()
                if now - told > _SECONDS or done == count:
                    told, left = now, (now - start) * (count / done - 1)
                    print(f'{done} of {count} comparisons in {now - start:.0f} s'
                          f'{f", {left:.0f} s left" if done < count else ""}', flush=True)

    def _about(self, read: str) -> dict[str, Any]:
        """Everything that features of a read depend on, beside tokens; ready for JSON."""
        a, base = self.network.architecture, self.base
        return {
            'qrm': workdir.versions()['packages'].get('qrm-jax'),
            'backbone': base.digest,
            'architecture': hashlib.sha256(repr(a).encode()).hexdigest()[:16],
            'frozen_dtype': base.dtype, 'dtype': self.network.dtype,
            'read': read, 'width': a.hidden_size,
        }


def place(config: Any, folder: str | None) -> str | None:
    """Where a run in this folder keeps features; None: nowhere, as it has no folder."""
    return config.train.features or (folder and os.path.join(folder, 'features'))


def share(config: Any, folder: str) -> None:
    """Lets a run keep features where others of a study in this folder do, if it keeps any."""
    if config.train.tune == 'head':
        config.train.features = place(config, folder)


def plan_layouts(items: Sequence[Featured], batch_size: int) -> tuple[Layout, ...]:
    """The shapes that hold any `batch_size` of these comparisons.

    Args:
      items: all comparisons that will ever be put into it, at least one.
      batch_size: the most comparisons of a step of one device.
    """
    layouts = []
    for members in packing.classes([len(item.responses) for item in items]):
        # Of each epoch that a step may touch.
        most = min(batch_size, len(members) * (batch_size // len(items) + 2))
        responses = max(len(items[i].responses) for i in members)
        slots = min(most, max(1, 2 * _SLOTS // responses))
        layouts.append(Layout(-(-most // slots), slots, responses, items[0].ratings.shape[1],
                              sum(part.shape[1] for part in items[0].parts)))
    return tuple(layouts)


def make_batch(items: Sequence[Featured], layouts: Sequence[Layout]) -> Batch:
    """The comparisons of one step of one device, as `packing.make_batch` gives them in tokens."""
    stacks, below = [], 0
    for layout in layouts:
        stacks.append(_stack([item for item in items
                              if below < len(item.responses) <= layout.responses], layout))
        below = layout.responses
    return tuple(stacks)


def _stack(items: Sequence[Featured], layout: Layout) -> Stack:
    m, c, k, a, w = layout
    batch = FeatureBatch(
        features=np.zeros((m, c, k, w), np.float32),
        present=np.zeros((m, c, k), bool),
        preference=np.zeros((m, c, k, k), np.float32),
        ratings=np.full((m, c, k, a), np.nan, np.float32),
        margin=np.zeros((m, c), np.float32),
        annotator=np.full((m, c), -1, np.int32),
        weight=np.zeros((m, c), np.float32),
    )
    for number, item in enumerate(items):
        at, n = divmod(number, c), len(item.responses)
        batch.features[at][:n] = item.features
        batch.present[at][:n] = True
        batch.preference[at][:n, :n] = item.preference
        batch.ratings[at][:n] = item.ratings
        batch.margin[at], batch.annotator[at] = item.margin, item.annotator
        batch.weight[at] = item.weight
    return Stack(np.asarray(-(-len(items) // c), np.int32), batch)


def predict(
    network: RewardNetwork, params: Params, items: Sequence[Featured]
) -> list[np.ndarray]:
    """What the head gives for every response, as `inference.predict`.

    Args:
      network: the reward model.
      params: its parameters, of which the head's are used.
      items: the comparisons.

    Returns:
      One [K, outputs] float32 array for each, in order.
    """
    responses = [row for item in items for row in item.features]
    outputs = [np.empty((0, network.head.outputs), np.float32)]
    for start in range(0, len(responses), _ROWS):
        some = responses[start:start + _ROWS]
        batch = np.zeros((_ROWS, network.width), np.float32)  # one shape to compile
        batch[:len(some)] = some
        outputs.append(np.asarray(_outputs(network, params['head'], batch))[:len(some)])
    stops = np.cumsum([len(item.responses) for item in items])[:-1]
    return np.split(np.concatenate(outputs), stops) if items else []


@functools.partial(jax.jit, static_argnums=0)
def _outputs(network: RewardNetwork, head: Params, features: jax.Array) -> jax.Array:
    batch = FeatureBatch(features, *[None] * (len(FeatureBatch._fields) - 1))
    return FeatureNetwork(**vars(network))({'head': head}, batch)


class _Place(NamedTuple):
    """First row and number of rows of a comparison, and their CRC-32."""

    first: int
    count: int
    checksum: int


class _Files:
    """The files of one key.

    Args:
      parent: folder that theirs is in, or will be.
      about: what its name is the key of.
      width: D.
    """

    def __init__(self, parent: str, about: dict[str, Any], width: int):
        self.folder = os.path.join(parent, _key(about))
        self._about, self._width = about, width
        self._features, self._index = (
            os.path.join(self.folder, name) for name in ('features.f32', 'index'))

    def places(self) -> dict[str, _Place]:
        """Digest -> where the features of each comparison are that is kept.

        Raises:
          WorkdirError: a file is missing, damaged or of something else.
        """
        if not os.path.exists(self._index):
            return {}
        about = os.path.join(self.folder, 'about.json')
        if not os.path.exists(about) or workdir.read_json(about) != self._about:
            raise self._damaged(about, 'does not say what the folder is named after')
        places, rows = {}, 0
        try:
            with open(self._index, encoding='utf-8', errors='replace') as file:
                lines = file.readlines()
        except OSError as error:
            raise self._damaged(self._index, f'cannot be read ({error.strerror})') from error
        for number, line in enumerate(lines, start=1):
            if not line.endswith('\n'):  # cut by a kill
                break
            found = _LINE.fullmatch(line)
            if found is None or found[1] in places or int(found[2]) != rows:
                raise self._damaged(self._index, f'line {number} is none, or a line is missing '
                                    'before it')
            places[found[1]] = _Place(rows, int(found[3]), int(found[4], 16))
            rows += int(found[3])
        size = os.path.getsize(self._features) if os.path.exists(self._features) else 0
        if size < self._bytes(rows):
            raise self._damaged(self._features, f'{size} bytes, expected {self._bytes(rows)} for '
                                f'{rows} responses of {self._width} features')
        return places

    def read(self, digests: Sequence[str]) -> list[np.ndarray]:
        """Features [K, D] of comparisons that are kept, read from the file when they are used."""
        places = self.places()
        rows = sum(place.count for place in places.values())
        try:
            whole = np.asarray(
                np.memmap(self._features, np.float32, 'r', shape=(rows, self._width)))
        except OSError as error:
            raise self._damaged(self._features, f'cannot be read ({error.strerror})') from error
        found = []
        for digest in digests:
            first, count, checksum = places[digest]
            found.append(whole[first:first + count])
            if zlib.crc32(found[-1].tobytes()) != checksum:
                raise self._damaged(self._features, f'rows {first} to {first + count - 1} are not '
                                    'those that were written')
        return found

    @contextlib.contextmanager
    def append(self) -> Iterator[Callable[[Sequence[str], Sequence[np.ndarray]], None]]:
        """A function that adds features to those that are kept; of the first process only.

        Yields:
          `append(digests, arrays)`, for comparisons that are not kept yet.

        Raises:
          WorkdirError: the disk is full, or does not take them otherwise.
        """
        if jax.process_index():
            yield lambda digests, arrays: None
            return
        places = self.places()
        try:
            workdir.write_json(os.path.join(self.folder, 'about.json'), self._about)
            with open(self._features, 'ab') as features, open(self._index, 'ab') as index:
                # What a kill left behind the last whole line.
                rows = sum(place.count for place in places.values())
                features.truncate(self._bytes(rows))
                index.truncate(sum(len(_line(*item)) for item in places.items()))

                def append(digests: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
                    nonlocal rows
                    lines = []
                    for digest, array in zip(digests, arrays, strict=True):
                        checksum = zlib.crc32(array.tobytes())
                        lines.append(_line(digest, _Place(rows, len(array), checksum)))
                        rows += len(array)
                    for file, content in ((features, np.concatenate(arrays).tobytes()),
                                          (index, b''.join(lines))):
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())

                yield append
        except OSError as error:
            raise WorkdirError(f'{self.folder}: cannot be written into ({error.strerror})'
                               ) from error

    def _bytes(self, rows: int) -> int:
        return rows * self._width * np.dtype(np.float32).itemsize

    def _damaged(self, path: str, what: str) -> WorkdirError:
        return WorkdirError(f'{path}: {what}; delete the folder {self.folder}, and what it keeps '
                            'is computed again')


_DIGEST_BYTES = 16
_LINE = re.compile(rf'([0-9a-f]{{{2 * _DIGEST_BYTES}}}) (\d+) (\d+) ([0-9a-f]{{8}})\n')


def _reads_sizes(column: str) -> bool:
    """Whether features depend on where prompts end, see `Encoded.prompt_sizes`."""
    return column == 'prompt' or parse_read(column).place == 'mean'


def _digest(item: Encoded, sizes: bool) -> str:
    """Of all that features depend on, in hexadecimal; with or without sizes of prompts."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in (item.prompt, *item.responses, np.asarray(item.prompt_sizes if sizes else ())):
        digest.update(len(part).to_bytes(4, 'little'))
        digest.update(np.asarray(part, '<i4').tobytes())
    return digest.hexdigest()


def _line(digest: str, place: _Place) -> bytes:
    """Of the index."""
    return f'{digest} {place.first} {place.count} {place.checksum:08x}\n'.encode()


def _key(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _missing(files: Sequence[_Files], digests: Sequence[Sequence[str]]) -> list[set[int]]:
    """Which comparisons, by their digests in each of some files, are not kept there, each once.

    What the first process finds, in all of them.
    """
    found = np.zeros(np.shape(digests), bool)
    for row, one, own in zip(found, files, digests, strict=True):
        known = set() if jax.process_index() else set(one.places())
        for i, digest in enumerate(own):
            row[i] = digest not in known
            known.add(digest)
    return [set(np.flatnonzero(row).tolist())
            for row in multihost_utils.broadcast_one_to_all(found)]
