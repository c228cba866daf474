"""Comparisons: a prompt with K >= 1 responses and what people said of them.

Every source (files, folders, hub data sets, generated demos) becomes a list of `Comparison`; a
pair (chosen, rejected) is K = 2, a response to be scored is K = 1. What becomes of the rows of a
source is counted in a `DataReport`.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# A chat is a tuple of messages: mappings with `role`, `content` and whatever else a chat template
# may print of them, such as `tool_calls`.
Messages = tuple[Mapping[str, Any], ...]
Text = str | Messages

_DIGEST_BYTES = 16
_MALFORMED = 'malformed row'
_OWN_GROUP = 'row '


class DataError(ValueError):
    """Bad input; the message names the file, the line, the key and what was expected."""


class MalformedRow(DataError):
    """One row that cannot be used; a caller may skip and count such rows."""


def in_a_line(error: Exception) -> str:
    """What an error of another program says, in one line."""
    return ' '.join(str(error).split()) or type(error).__name__


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A prompt, its K responses and what is known about them.

    Attributes:
      id: unique name of the comparison within its source.
      prompt: text or chat messages that every response continues ('' if there is none).
      responses: K texts or message tuples; dialogue k is `prompt` followed by `responses[k]`.
      group: what the comparison is clustered by in splits and intervals (the opening question);
        '': is made of the texts.
      ranks: place of each response, 0 best, equal numbers tie.
      preferred: index of the one response that is preferred to all others.
      preference: for K = 2, probability in [0, 1] that the first response is preferred.
      ratings: one number per response, higher is better, None where unrated.
      attributes: name of an attribute -> `ratings` of it, for the attributes that were asked for.
      annotator: name of the person who judged.
      margin: by how much whichever response is preferred should be ahead, in units of reward;
        under a soft label this holds for either order.
      weight: weight of the comparison in losses.
      tools: descriptions of tools, which the template of a chat may print.
      where: 'file:line' of the row, for messages.
      remarks: what was noticed about the row.
    """

    id: str
    prompt: Text
    responses: tuple[Text, ...]
    group: str
    ranks: tuple[int, ...] | None = None
    preferred: int | None = None
    preference: float | None = None
    ratings: tuple[float | None, ...] | None = None
    attributes: Mapping[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)
    annotator: str | None = None
    margin: float = 0.0
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()
    where: str = dataclasses.field(default='', compare=False)
    remarks: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self):
        if not self.group:
            object.__setattr__(self, 'group', self._own_group)

    @property
    def _own_group(self) -> str:
        return f'{_OWN_GROUP}{self.text_digest().hex()}'

    @property
    def place(self) -> str:
        """Where the row stands and its id, as errors begin."""
        return self.id if self.where in ('', self.id) else f'{self.where} id={self.id}'

    @property
    def has_opening(self) -> bool:
        """Whether the group is more than the row itself."""
        return not self.group.startswith(_OWN_GROUP) or self.group != self._own_group

    def text_digest(self, *, ordered: bool = False) -> bytes:
        """[16] digest of prompt and responses, in whatever order these stand, or in theirs."""
        responses = map(_canonical, self.responses)
        texts = [self.prompt, list(self.tools), *(responses if ordered else sorted(responses))]
        return digest(_canonical(texts))

    def preference_matrix(self) -> np.ndarray:
        """P[i, j], the probability that response i is preferred to j; 0 both ways if unknown.

        A soft label takes precedence over ranks, ranks over a single preferred response, and
        that over ratings; a tie is 1/2 both ways.

        Returns:
          [K, K] float32 with a zero diagonal.
        """
        k = len(self.responses)
        matrix = np.zeros((k, k), np.float32)
        if self.preference is not None:
            matrix[0, 1], matrix[1, 0] = self.preference, 1.0 - self.preference
        elif self.ranks is None and self.preferred is not None:
            matrix[self.preferred] = 1.0
            matrix[self.preferred, self.preferred] = 0.0
        else:
            scores = [-r for r in self.ranks] if self.ranks else self.ratings or [None] * k
            for i, j in itertools.permutations(range(k), 2):
                if scores[i] is not None and scores[j] is not None:
                    ahead = scores[i] - scores[j]
                    matrix[i, j] = 0.5 if not ahead else float(ahead > 0)
        return matrix

    def rating_matrix(self, names: Sequence[str] = ()) -> np.ndarray:
        """Ratings of each response, NaN where there is none.

        Args:
          names: of the attributes, one column each; (): the rating of the response as a whole.

        Returns:
          [K, A] float32.
        """
        unrated = (None,) * len(self.responses)
        columns = [self.attributes.get(name, unrated) for name in names]
        return np.array(columns or [self.ratings or unrated], np.float32).T


def text_of(response: Text) -> str:
    """What a response says: itself, or of messages of a chat their contents one after the other."""
    return response if isinstance(response, str) else ''.join(
        message['content'] or '' for message in response)


def exchange_prompts(comparisons: Sequence[Comparison], seed: int) -> list[Comparison]:
    """The comparisons, each with the prompt of one of another group in place of its own.

    A prompt brings its tools along, and serves once. Texts take prompts of texts, chats those of
    chats that end with the same role. Left out are comparisons without a prompt, and those that
    would get one of their own group or their own once more, as where one group has more than half.

    Args:
      comparisons: whose responses, judgements, ids and groups stay.
      seed: of the exchange, which is drawn at random.
    """
    rng, found = np.random.default_rng(seed), {}
    kinds: dict[str | None, list[int]] = {}
    for i, c in enumerate(comparisons):
        if c.prompt:
            kinds.setdefault(
                None if isinstance(c.prompt, str) else c.prompt[-1]['role'], []).append(i)
    for members in kinds.values():
        groups: dict[str, list[int]] = {}
        for i in rng.permutation(members).tolist():
            groups.setdefault(comparisons[i].group, []).append(i)
        # Groups stand side by side: as far as the largest is long, there is another one.
        order = [i for group in groups.values() for i in group]
        shift = max(map(len, groups.values()), default=0)
        for place, i in enumerate(order):
            own, other = comparisons[i], comparisons[order[(place + shift) % len(order)]]
            if own.group != other.group and (own.prompt, own.tools) != (other.prompt, other.tools):
                found[i] = dataclasses.replace(own, prompt=other.prompt, tools=other.tools)
    return [found[i] for i in sorted(found)]


def digest(text: str) -> bytes:
    """[16] digest of a text, by which it is recognised."""
    return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).digest()[:_DIGEST_BYTES]


_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str).encode


@dataclasses.dataclass
class DataReport:
    """What happened to the rows of one split; `read` = `kept` + the sum of `dropped`.

    Attributes:
      source: where the rows came from.
      split: 'train', 'validation' or 'test'.
      read: rows read.
      kept: comparisons that remain.
      dropped: reason -> rows left out.
      first_malformed: what was wrong with the first row that cannot be used; '' if there is none.
      truncated: kept comparisons whose prompt was cut from the left.
      identical: comparisons whose responses are all the same (dropped: they teach nothing).
      tied: kept comparisons in which two responses are tied.
      notes: remark -> rows it applies to, whether kept or not; of the source as a whole 1.
      dialogue_tokens: tokens of all dialogues, each with its own copy of the prompt.
      packed_tokens: tokens with each shared prompt stored once.
      prompt_tokens: tokens of the dialogues that lie in shared prompts.
    """

    source: str
    split: str
    read: int = 0
    kept: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first_malformed: str = ''
    truncated: int = 0
    identical: int = 0
    tied: int = 0
    notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    dialogue_tokens: int = 0
    packed_tokens: int = 0
    prompt_tokens: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> 'DataReport':
        """The report that `stored` gave, JSON in between."""
        return cls(**values | {key: collections.Counter(values[key]) for key in _COUNTERS})

    def stored(self) -> dict[str, Any]:
        """JSON-ready, as it is."""
        return vars(self) | {key: dict(getattr(self, key)) for key in _COUNTERS}

    def copy(self, **changes: Any) -> 'DataReport':
        """A report of its own that says the same, but for what is changed."""
        return dataclasses.replace(
            self, **{key: getattr(self, key).copy() for key in _COUNTERS} | changes)

    def add(self, other: 'DataReport') -> None:
        """Adds what is counted of more rows of the same split."""
        for field in dataclasses.fields(self):
            if field.type is int:
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        for key in _COUNTERS:
            getattr(self, key).update(getattr(other, key))
        self.first_malformed = self.first_malformed or other.first_malformed

    def drop_malformed(self, error: MalformedRow) -> None:
        """Counts a row that cannot be used."""
        self.dropped[_MALFORMED] += 1
        self.first_malformed = self.first_malformed or str(error)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the two ratios derived from the token counts."""
        total = max(self.dialogue_tokens, 1)
        return self.stored() | {
            'prefix_share': self.prompt_tokens / total,
            'tokens_saved': self.dialogue_tokens - self.packed_tokens,
        }

    def format(self) -> str:
        """One line of counts and one for each reason and remark, for the terminal."""
        d = self.as_dict()
        saved = d['tokens_saved'] / max(self.dialogue_tokens, 1)
        lines = [
            f'{self.split}: {self.read} read, {self.kept} kept, {sum(self.dropped.values())} '
            f'dropped, {self.truncated} truncated, {self.identical} identical, {self.tied} tied; '
            f'{self.dialogue_tokens} tokens, {d["prefix_share"]:.0%} in shared prompts, '
            f'{saved:.0%} saved by storing them once ({self.source})'
        ]
        lines += [f'  dropped {count}: {reason}' for reason, count in self.dropped.items()]
        lines += [f'  first malformed: {self.first_malformed}'] * bool(self.first_malformed)
        lines += [f'  note {count}: {note}' for note, count in self.notes.items()]
        return '\n'.join(lines)


_COUNTERS = ('dropped', 'notes')


def check_malformed(reports: Iterable[DataReport], limit: float) -> None:
    """Checks that no more than this share of the rows of some splits together is malformed.

    Raises:
      DataError: says what is wrong with the first one.
    """
    reports = list(reports)
    malformed = sum(report.dropped.get(_MALFORMED, 0) for report in reports)
    read = sum(report.read for report in reports)
    if malformed and malformed / read > limit:
        first = next(report.first_malformed for report in reports if report.first_malformed)
        raise DataError(f'{first}; {malformed} of {read} rows are malformed, more than '
                        f'config.data.max_malformed={limit} allows')
