"""Micro-batches of what many clients ask for: what is computed together, and in which shape.

Dialogues of all clients wait in one queue. As soon as the model is free, those that came first and
those that share their beginning with them fill a micro-batch of one of a few fixed shapes, so that
nothing is compiled once all shapes were. While it is computed the next dialogues come in: under
load batches are full, and where there is none a dialogue waits for nobody.

Each dialogue is tokenised by itself and shares what its tokens have in common with others, whoever
asks, so that a score depends on its own text alone.
"""

import asyncio
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data.encoded import Encoded, Ids
from qrm.data.packing import Layout, round_length
from qrm.data.tokens import split_prompt
from qrm.rewards import selection
from qrm.rewards.heads import HeadConfig
from qrm.rewards.normalisation import Normalisation, Rewards
from qrm.rewards.selection import Rule
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.reward_model import RewardModel

_SHORTEST = 64  # tokens of the smallest shape
_ROW = 1024  # tokens of the rows of a batch of several
_TOGETHER = 16  # responses that share one copy of their prompt
_WORTH = 8  # tokens that sharing must spare
_TYPICAL = 32  # tokens of a dialogue, for which there are slots
_AHEAD = 32  # batches of tokens that are looked through for dialogues that begin alike
_READ = 64  # outputs that are read as distributions at a time: one shape


class Dialogue(NamedTuple):
    """One dialogue to be scored.

    Attributes:
      encoded: its tokens, K = 1.
      rule: what of its distribution is the reward.
    """

    encoded: Encoded
    rule: Rule


class Score(NamedTuple):
    """What the model says of a dialogue.

    Attributes:
      reward: by the rule.
      std: standard deviation of the distribution, 0 where there is none.
      quantiles: [N] at `RewardModel.taus`.
    """

    reward: float
    std: float
    quantiles: list[float]


class Step(NamedTuple):
    """What came of a micro-batch.

    Attributes:
      found: index of a dialogue -> its score, or why there is none.
      packed: tokens that were computed, a shared beginning counted once.
      computed: tokens of the shape, with what was left empty.
    """

    found: Mapping[int, Score | Exception]
    packed: int
    computed: int


class Overloaded(Exception):
    """Too much is waiting.

    Attributes:
      seconds: after which to ask again; inf for what is too large to be ever accepted.
    """

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


class Scorer:
    """Scores the first of many dialogues, and those that fit beside them.

    Attributes:
      model: the reward model.
      layouts: the shapes.
    """

    def __init__(self, model: RewardModel, batch_tokens: int):
        # Cut once: else each batch would copy most of the parameters.
        self.model = dataclasses.replace(model, params=model.network.cut(model.params))
        self._batch_tokens = batch_tokens
        self.layouts = shapes(model.reading.max_length, batch_tokens,
                              attributes=max(1, len(model.network.head.attributes)))

    def warm_up(self) -> float:
        """Compiles every shape, and reading by every kind of rule; returns the seconds it took."""
        start = time.perf_counter()
        ids = np.zeros(1, np.int32)
        blank = Encoded('warm-up', '', ids[:0], (ids,), np.zeros((1, 1), np.float32),
                        np.full((1, self.layouts[0].attributes), np.nan, np.float32),
                        prompt_sizes=(0,) if self.model.reading.size_prompt else ())
        for layout in self.layouts:
            [outputs] = self.model.predict([blank], [layout])
        head, blank_text = self.model.network.head, np.zeros((1, 2), np.uint32)
        for rule in ('mean', 'quantile:0.5', 'cvar:0.5', 'sample:0',
                     *(['mean-std:1'] if self.model.scale else []),
                     *(['disagreement:1'] if head.members > 1 else [])):
            self._read(outputs, selection.parse_rule(rule), blank_text)
        return time.perf_counter() - start

    def step(self, waiting: Sequence[Dialogue]) -> Step:
        """Scores the first of the dialogues and some others; of one that fails says why."""
        waiting = waiting[:_within(waiting, _AHEAD * self._batch_tokens)]
        # An encoder's tokens see the whole dialogue: none share anything.
        groups = share([_tokens(one.encoded) for one in waiting], min(self._batch_tokens, _ROW),
                       _TOGETHER if self.model.reading.share_prompt else 1)
        layout, chosen = choose([size for size, _ in groups], self.layouts, self._batch_tokens)
        return self._compute(waiting, [groups[i][1] for i in chosen], layout)

    def _compute(self, waiting: Sequence[Dialogue], groups: Sequence[Sequence[int]],
                 layout: Layout) -> Step:
        members = [i for indices in groups for i in indices]
        together = [_together([waiting[i].encoded for i in indices]) for indices in groups]
        packed, computed = sum(one.size for one in together), layout.rows * layout.length
        try:
            outputs = np.concatenate(self.model.predict(together, [layout]))
            return Step(self._scores(waiting, members, outputs), packed, computed)
        except Exception as error:
            if len(members) == 1:
                return Step({members[0]: error}, packed, computed)
        # One is at fault, and what is not finite spreads in a row: each by itself.
        alone = [self._compute(waiting, [[i]], layout) for i in members]
        return Step({i: one for step in alone for i, one in step.found.items()},
                    packed + sum(step.packed for step in alone), computed * (1 + len(alone)))

    def _scores(self, waiting: Sequence[Dialogue], members: Sequence[int],
                outputs: np.ndarray) -> dict[int, Score]:
        rules = [waiting[i].rule for i in members]
        found = {}
        for rule in dict.fromkeys(rules):
            places = [k for k, one in enumerate(rules) if one == rule]
            for first in range(0, len(places), _READ):
                some = places[first:first + _READ]
                texts = None
                if rule.kind == 'sample':
                    texts = np.stack([selection.text_digest(_tokens(waiting[members[k]].encoded))
                                      for k in some])
                for k, score in zip(some, self._read(outputs[some], rule, texts), strict=True):
                    if not np.isfinite([score.reward, score.std, *score.quantiles]).all():
                        raise NonFiniteLoss(f'{waiting[members[k]].encoded.id}: a reward that is '
                                            'not finite')
                    found[members[k]] = score
        return found

    def _read(self, outputs: np.ndarray, rule: Rule, texts: np.ndarray | None) -> list[Score]:
        """Scores of up to `_READ` outputs; as many are read, as another number is compiled anew."""
        padded = np.zeros((_READ, outputs.shape[1]), np.float32)
        padded[:len(outputs)] = outputs
        model = self.model
        columns = [*_columns(model.network.head, model.normalisation, padded)]
        if rule.kind != 'mean':
            if texts is not None:
                texts = np.concatenate([texts, np.zeros((_READ - len(texts), 2), np.uint32)])
            columns[0] = selection.reward(rule, model.read(jnp.asarray(padded)), model.scale, texts)
        return [Score(float(reward), float(std), quantiles.tolist()) for reward, std, quantiles
                in zip(*(np.asarray(column)[:len(outputs)] for column in columns), strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _columns(head: HeadConfig, normalisation: Normalisation | None, outputs: jax.Array
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Means, standard deviations and quantiles of the distributions of outputs."""
    rewards = Rewards(head, outputs, normalisation)
    distribution = rewards.distribution
    return distribution.mean, distribution.std, rewards.quantiles


class Batcher:
    """Answers what many ask, a micro-batch after the other, in a thread of its own.

    Args:
      step: given those that wait, oldest first, scores the first and any others; is called in the
        thread.
      most_tokens: that may wait.
      observe: is called with each step and the seconds it took.
    """

    def __init__(self, step: Callable[[Sequence[Dialogue]], Step], most_tokens: int,
                 observe: Callable[[Step, float], Any] = lambda step, seconds: None):
        self._step, self._most, self._observe = step, most_tokens, observe
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'model')
        self._queue: list[tuple[Dialogue, asyncio.Future]] = []
        self._asked = asyncio.Event()
        self._rate = math.nan  # tokens a second
        self.waiting = 0  # tokens

    async def scores(self, dialogues: Sequence[Dialogue]) -> list[Score]:
        """The score of each dialogue; what was cancelled is not computed any more.

        Raises:
          Overloaded: too much waits.
          Exception: what `step` says is wrong with the first that has no score.
        """
        tokens = sum(one.encoded.size for one in dialogues)
        if tokens > self._most:
            raise Overloaded(f'{tokens} tokens at once, expected at most {self._most}', math.inf)
        if self.waiting + tokens > self._most:
            raise Overloaded(f'{self.waiting} tokens wait, expected at most {self._most} with '
                             f'{tokens} more', self.retry_after())
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in dialogues]
        self._queue += zip(dialogues, futures, strict=True)
        self.waiting += tokens
        self._asked.set()
        try:
            found = await asyncio.gather(*futures, return_exceptions=True)
        finally:
            self.waiting -= tokens
        if failed := [one for one in found if isinstance(one, BaseException)]:
            raise failed[0]
        return found

    def retry_after(self) -> float:
        """Seconds in which half of what waits should be answered, at least 1."""
        return 1.0 if math.isnan(self._rate) else max(1.0, 0.5 * self.waiting / self._rate)

    async def run(self) -> None:
        """Works until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._asked.wait()
                self._queue = [entry for entry in self._queue if not entry[1].done()]
                if not self._queue:
                    self._asked.clear()
                    continue
                batch = list(self._queue)
                start = loop.time()
                step = await loop.run_in_executor(
                    self._thread, self._guarded, [dialogue for dialogue, _ in batch])
                self._count(step, batch, loop.time() - start)
                for i, found in step.found.items():
                    if not (future := batch[i][1]).done():
                        (future.set_exception if isinstance(found, Exception)
                         else future.set_result)(found)
        finally:
            self._thread.shutdown(wait=False)

    def _guarded(self, dialogues: Sequence[Dialogue]) -> Step:
        try:
            return self._step(dialogues)
        except Exception as error:  # nobody is left waiting for ever
            return Step(dict.fromkeys(range(len(dialogues)), error), 0, 0)

    def _count(self, step: Step, batch: Sequence[tuple[Dialogue, Any]], seconds: float) -> None:
        rate = sum(batch[i][0].encoded.size for i in step.found) / max(seconds, 1e-6)
        self._rate = rate if math.isnan(self._rate) else 0.8 * self._rate + 0.2 * rate
        self._observe(step, seconds)


def shapes(longest: int, batch_tokens: int, *, attributes: int = 1) -> tuple[Layout, ...]:
    """The shapes of a server's micro-batches, small ones first.

    Single rows, two lengths an octave, up to the longest dialogue and the batch; and more rows of
    `_ROW` tokens, a power of two of them, up to the batch.

    Args:
      longest: tokens of the longest dialogue.
      batch_tokens: tokens of a full batch.
      attributes: see `Layout`.
    """
    largest = round_length(max(longest, min(batch_tokens, _ROW)))
    sizes, length = [], _SHORTEST
    while length < largest:
        sizes.append((1, length))
        if length * 3 // 2 < largest:
            sizes.append((1, length * 3 // 2))
        length *= 2
    sizes.append((1, largest))
    rows = 2
    while rows * _ROW <= batch_tokens:
        sizes.append((rows, _ROW))
        rows *= 2
    return tuple(Layout(length, rows, max(1, rows * length // _TYPICAL), _TOGETHER, attributes)
                 for rows, length in sorted(sizes, key=lambda size: (size[0] * size[1], size)))


def share(dialogues: Sequence[Ids], most_tokens: int, most: int) -> list[tuple[int, list[int]]]:
    """Puts dialogues that begin alike together, where that leaves fewer tokens.

    Args:
      dialogues: the tokens of each.
      most_tokens: of those together; one that is longer stays alone.
      most: dialogues together.

    Returns:
      Tokens and indices, ascending, of those together; first of those with the first dialogue, and
      so on.
    """
    # Those that begin alike are neighbours.
    order = sorted(range(len(dialogues)), key=lambda i: dialogues[i].astype('>i4').tobytes())
    common = [_common(dialogues[i], dialogues[j]) for i, j in itertools.pairwise(order)]
    groups: list[list[int]] = []
    sizes: list[int] = []
    prefix = 0  # of the last group
    for i, left, right in zip(order, [0, *common], [*common, 0], strict=True):
        length = len(dialogues[i])
        if groups and len(groups[-1]) < most and 2 * left >= right:
            others = len(groups[-1]) - 1
            shared = min(left, prefix) if others else left
            # Each of those before repeats what is not common any more.
            joined = sizes[-1] + others * (prefix - shared) + length - shared
            if joined <= min(most_tokens, sizes[-1] + length - _WORTH):
                groups[-1].append(i)
                prefix, sizes[-1] = shared, joined
                continue
        groups.append([i])
        sizes.append(length)
    return sorted(((size, sorted(group)) for size, group in zip(sizes, groups, strict=True)),
                  key=lambda found: found[1][0])


def choose(sizes: Sequence[int], layouts: Sequence[Layout], batch_tokens: int
           ) -> tuple[Layout, list[int]]:
    """The shape of the next micro-batch, and which comparisons fill it, the first in any case.

    Args:
      sizes: tokens of the comparisons that wait, oldest first.
      layouts: the shapes; one has rows for the first.
      batch_tokens: tokens of a full batch; more only for one that is longer.
    """
    able = [one for one in layouts if one.length >= sizes[0]]
    full = [one for one in able if one.rows * one.length <= batch_tokens] or able[:1]
    chosen = _first_fit(sizes, max(full, key=lambda one: (one.rows * one.length, -one.length)))
    some = [sizes[i] for i in chosen]
    # They are in the order of their tokens.
    return next(one for one in layouts if len(_first_fit(some, one)) == len(some)), chosen


def _first_fit(sizes: Sequence[int], layout: Layout) -> list[int]:
    """Which of the comparisons fit, each in the first row that has room."""
    free, placed = [layout.length] * layout.rows, []
    for i, size in enumerate(sizes):
        row = next((row for row, left in enumerate(free) if left >= size), None)
        if row is not None and len(placed) < layout.slots:
            free[row] -= size
            placed.append(i)
    return placed


def _within(waiting: Sequence[Dialogue], tokens: int) -> int:
    """How many of the first dialogues have so many tokens together, at least one."""
    sizes = np.cumsum([one.encoded.size for one in waiting])
    return max(1, int(np.searchsorted(sizes, tokens, 'right')))


def _common(first: Ids, second: Ids) -> int:
    """Tokens with which both begin, of each at most all but one."""
    length = min(len(first), len(second)) - 1
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def _tokens(item: Encoded) -> Ids:
    return np.concatenate([item.prompt, *item.responses])


def _together(items: Sequence[Encoded]) -> Encoded:
    """Dialogues as responses of one comparison."""
    if len(items) == 1:
        return items[0]
    prompt, responses = split_prompt([_tokens(item) for item in items])
    k = len(items)
    return Encoded(', '.join(dict.fromkeys(item.id for item in items)), '', prompt, responses,
                   np.zeros((k, k), np.float32), np.concatenate([item.ratings for item in items]),
                   prompt_sizes=tuple(size for item in items for size in item.prompt_sizes))
