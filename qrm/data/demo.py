"""Demo workloads: dialogues made from a seed, with the true reward distribution of every response.

The text has the format of HH (Bai et al. 2022, arXiv 2204.05862): turns that begin with
'\\n\\nHuman:' and '\\n\\nAssistant:'. A response is a few sentences from phrase banks. Each
sentence adds its strength to one attribute (say 'detail' or 'refuses'). An annotator is of one of
a few types; a type has one weight per attribute, and the reward it gives is

    reward = weights[type] . attributes + sigma * standard normal noise,

so over a population of annotators the reward of a response is a known Gaussian mixture. Types
agree about some attributes and disagree about others: the spread varies between responses
(annotator types as hidden context: Siththaranjan et al. 2023, arXiv 2312.08358).
Labels come from drawn rewards, either with one annotator per response ('independent') or with one
annotator for both responses ('shared', as where one person compares the two).

The openings of dialogues are partitioned between the splits by a hash of the question, so that no
question of 'test' occurs in 'train'; the sentences of responses are the same in both.

Axes: T annotator types, P pairs.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from qrm.data import phrases
from qrm.data.comparisons import Comparison

WORKLOADS = ('helpful', 'harmless')
ANNOTATORS = ('independent', 'shared', 'panel')

_SPLITS = ('train', 'test')
_PANEL = 40  # annotators with a name, of each type as many as its share
# One question in four belongs to the test split.
_TEST_EVERY = 4
# Shares of dialogues with no and with one follow-up; the others have two.
_FOLLOW_UPS = (0.75, 0.2)
_TRIES = 20  # draws of a prompt for each that is asked for, as some come again
# How many sentences an earlier turn of the assistant has, so that dialogues stay short.
_EARLIER = 1
# Halvings of the bracket: the width falls below one part in 2^60, the resolution of a float64.
_BISECTIONS = 60


@dataclasses.dataclass(frozen=True)
class RewardDistribution:
    """The reward of one response over annotators: a Gaussian mixture with a common sigma.

    Attributes:
      weights: [T] share of each annotator type; they sum to 1.
      means: [T] mean reward that each type gives, in units of reward.
      sigma: standard deviation of the reward within a type, positive.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    sigma: float

    def __post_init__(self):
        """Raises ValueError unless weights are shares, one per mean, and sigma is positive."""
        if len(self.weights) != len(self.means) or not self.weights:
            raise ValueError(
                f'need as many weights as means, got {len(self.weights)} and {len(self.means)}'
            )
        if min(self.weights) < 0 or abs(sum(self.weights) - 1.0) > 1e-9:
            raise ValueError(f'weights must be shares that sum to 1, got {self.weights}')
        if not self.sigma > 0:
            raise ValueError(f'sigma must be positive, got {self.sigma}')

    def mean(self) -> float:
        """Expected reward."""
        return float(np.dot(self.weights, self.means))

    def std(self) -> float:
        """Standard deviation: noise within a type and disagreement between types."""
        between = np.dot(self.weights, np.square(np.subtract(self.means, self.mean())))
        return float(np.sqrt(self.sigma**2 + between))

    def cdf(self, x: np.ndarray | float) -> np.ndarray:
        """P(reward <= x), elementwise; the shape of `x`."""
        return _mixture_cdf(np.asarray(x, float), self.weights, np.array(self.means), self.sigma)

    def quantile(self, taus: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """The rewards x with cdf(x) = tau, by bisection.

        Args:
          taus: probabilities strictly between 0 and 1, any shape.

        Returns:
          The quantiles, in the shape of `taus`.

        Raises:
          ValueError: if a probability is not strictly between 0 and 1.
        """
        taus = np.asarray(taus, float)
        if not np.all((taus > 0) & (taus < 1)):
            raise ValueError(f'quantile levels must be strictly between 0 and 1, got {taus}')
        return _mixture_quantile(taus, self.weights, np.array(self.means), self.sigma)

    def sample(self, rng: np.random.Generator, size: int | tuple[int, ...]) -> np.ndarray:
        """Rewards of independently drawn annotators, of shape `size`."""
        types = rng.choice(len(self.weights), size=size, p=self.weights)
        return np.asarray(self.means)[types] + self.sigma * rng.standard_normal(size)

    def win_probability(
        self, other: 'RewardDistribution', annotators: str = 'independent'
    ) -> float:
        """P(a reward from this distribution exceeds one from `other`), in closed form.

        Two Gaussians: Phi((m_i - m_j) / sqrt(s_i^2 + s_j^2)) (Thurstone 1927, case V).
        Independent annotators average this over all pairs of types; a shared annotator has one
        type, so i = j, and only the noise is independent.

        Args:
          other: the distribution on the other side.
          annotators: one of `ANNOTATORS`; one annotator needs the same types on both sides.

        Raises:
          ValueError: on an unknown `annotators`, or types that differ where they are shared.
        """
        check_name('annotators', annotators, ANNOTATORS)
        if annotators != 'independent' and self.weights != other.weights:
            raise ValueError(
                'shared annotators need the same type weights on both sides, '
                f'got {self.weights} and {other.weights}'
            )
        leads = np.subtract.outer(self.means, other.means)
        wins = scipy.special.ndtr(leads / np.hypot(self.sigma, other.sigma))
        return float(_over_types(wins, self.weights, other.weights, annotators))


class Demo(NamedTuple):
    """Labelled pairs and what is true of them.

    Attributes:
      comparisons: P pairs; response 0 is the chosen one.
      truths: P pairs of reward distributions, in the order of the responses.
    """

    comparisons: list[Comparison]
    truths: list[tuple[RewardDistribution, RewardDistribution]]


class Population(NamedTuple):
    """Rewards of one workload as a world whose items are their places, see `worlds.match`.

    Attributes:
      weights: [T] shares of the annotator types.
      means: [m, T].
      sigma: standard deviation within a type.
    """

    weights: np.ndarray
    means: np.ndarray
    sigma: float

    def quantile(self, items: np.ndarray, taus: np.ndarray) -> np.ndarray:
        """The rewards with cdf = taus: [...], [N] -> [..., N]."""
        means = self.means[items][..., None, :]
        return _mixture_quantile(np.asarray(taus, float), self.weights, means, self.sigma)

    def mean(self, items: np.ndarray) -> np.ndarray:
        """Expected rewards: [...] -> [...]."""
        return self.means[items] @ self.weights

    def win_probability(
        self, items: np.ndarray, others: np.ndarray, annotators: str = 'independent'
    ) -> np.ndarray:
        """P(a reward of an item exceeds one of another item), see `RewardDistribution`.

        Args:
          items, others: places, of shapes that broadcast to [...].
          annotators: one of `ANNOTATORS`.

        Returns:
          [...].

        Raises:
          ValueError: on an unknown `annotators`.
        """
        check_name('annotators', annotators, ANNOTATORS)
        leads = self.means[items][..., :, None] - self.means[others][..., None, :]
        wins = scipy.special.ndtr(leads / (np.sqrt(2.0) * self.sigma))
        return _over_types(wins, self.weights, self.weights, annotators)

    def cdf(self, items: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """Share of annotators who give at most `reward`: [...], [..., N] -> [..., N]."""
        return _mixture_cdf(reward, self.weights, self.means[items][..., None, :], self.sigma)


def population(truths: Sequence[RewardDistribution]) -> Population:
    """The population of m distributions of one workload, which share weights and sigma."""
    return Population(np.array(truths[0].weights), np.array([t.means for t in truths]),
                      truths[0].sigma)


class Bayes(NamedTuple):
    """How well a predictor does that knows the win probability p of every pair.

    Attributes:
      accuracy: share of the pairs whose likelier side was chosen; p = 1/2 counts half.
      nll: mean of -log p(chosen side), in nats.
      expected_accuracy: mean of max(p, 1 - p): `accuracy` averaged over labels.
      expected_nll: mean entropy of the label in nats: `nll` averaged over labels.
    """

    accuracy: float
    nll: float
    expected_accuracy: float
    expected_nll: float


class _Part(NamedTuple):
    """A sentence of a response; it adds `strength` to `attribute`."""

    text: str
    attribute: str
    strength: float


class _Dialogue(NamedTuple):
    """A prompt with two replies to it.

    Attributes:
      question: that it opens with.
      opening: the first human turn, the question with what leads to it.
      prompt: everything up to the replies.
      replies: two replies, each a list of sentences.
    """

    question: str
    opening: str
    prompt: str
    replies: tuple[list[_Part], list[_Part]]


def generate(
    workload: str, split: str, count: int, seed: int, annotators: str = 'independent'
) -> Demo:
    """Draws labelled pairs; a pure function of its arguments.

    A greater `count` extends the same list. `annotators` changes only who is chosen: dialogues
    and their order are the same for both ways to judge, the place of a response may differ.

    Args:
      workload: one of `WORKLOADS`.
      split: 'train' or 'test'; the two have no opening question in common.
      count: number of pairs P, at least 1.
      seed: non-negative integer.
      annotators: one of `ANNOTATORS`: whether each response has an annotator of its own, or one
        annotator judges both, without a name ('shared') or with one ('panel'). The response with
        the higher drawn reward is chosen, and the drawn rewards are the ratings.

    Returns:
      The pairs, chosen response first (ranks (0, 1)), and their true reward distributions.

    Raises:
      ValueError: on an unknown name, a count below 1 or a negative seed.
    """
    check_name('annotators', annotators, ANNOTATORS)
    texts, types, noise, _ = _streams(workload, split, count, seed)
    dialogues = list(itertools.islice(_dialogues(workload, split, texts), count))
    pairs = [tuple(_truth(workload, reply) for reply in d.replies) for d in dialogues]
    people = np.floor(_PANEL * (uniforms := types.random((count, 2))))
    if annotators == 'panel':
        uniforms = (people + 0.5) / _PANEL  # each has a type of his own
    rewards = _rewards(pairs, uniforms, noise.standard_normal((count, 2)), annotators)
    comparisons, truths = [], []
    for i, (dialogue, pair, drawn) in enumerate(zip(dialogues, pairs, rewards, strict=True)):
        chosen, rejected = (0, 1) if drawn[0] > drawn[1] else (1, 0)
        comparisons.append(
            Comparison(
                id=f'{workload}/{split}/{i}',
                prompt=dialogue.prompt,
                responses=(_text(dialogue.replies[chosen]), _text(dialogue.replies[rejected])),
                group=dialogue.opening,
                ranks=(0, 1),
                ratings=(float(drawn[chosen]), float(drawn[rejected])),
                annotator=f'annotator {people[i, 0]:.0f}' if annotators == 'panel' else None,
            )
        )
        truths.append((pair[chosen], pair[rejected]))
    return Demo(comparisons, truths)


def prompts(workload: str, split: str, count: int, seed: int) -> list[Comparison]:
    """Draws different prompts for a policy to answer; a pure function of its arguments.

    They have the form and the opening questions of `generate`, and random numbers of their own; a
    prompt may be one of its pairs, too. A greater `count` extends the same list.

    Args:
      workload, split, seed: see `generate`; 'test' is for evaluation.
      count: number of prompts, at least 1.

    Returns:
      The prompts as comparisons without responses; `group` is the question that a prompt opens
      with, without what leads to it: the same question is asked with other leads.

    Raises:
      ValueError: on an unknown name, a count below 1 or above what is there, or a negative seed.
    """
    *_, rng = _streams(workload, split, count, seed)
    questions: dict[str, str] = {}
    for dialogue in itertools.islice(_dialogues(workload, split, rng), _TRIES * count):
        questions.setdefault(dialogue.prompt, dialogue.question)
        if len(questions) == count:
            return [Comparison(id=f'{workload}/{split}/prompt {i}', prompt=prompt, responses=(),
                               group=question)
                    for i, (prompt, question) in enumerate(questions.items())]
    raise ValueError(f'count={count}, but {_TRIES * count} draws had {len(questions)} prompts')


def bayes(demo: Demo, annotators: str = 'independent') -> Bayes:
    """The ideal predictor of the labels of `demo`, judged on its own pairs.

    Args:
      demo: P pairs with their true distributions.
      annotators: the way in which `demo` was judged.

    Returns:
      Accuracy and negative log-likelihood, on the labels drawn and averaged over labels.
    """
    p = np.array([chosen.win_probability(other, annotators) for chosen, other in demo.truths])
    q = 1.0 - p
    return Bayes(
        accuracy=float(np.mean((p > q) + 0.5 * (p == q))),
        nll=float(-np.mean(np.log(p))),
        expected_accuracy=float(np.mean(np.maximum(p, q))),
        expected_nll=float(np.mean(scipy.special.entr(p) + scipy.special.entr(q))),
    )


def _mixture_cdf(x: np.ndarray, weights: Sequence[float], means: np.ndarray,
                 sigma: float) -> np.ndarray:
    """P(reward <= x) [...] of Gaussian mixtures with means [..., T]."""
    return scipy.special.ndtr((x[..., None] - means) / sigma) @ np.asarray(weights)


def _mixture_quantile(taus: np.ndarray, weights: Sequence[float], means: np.ndarray,
                      sigma: float) -> np.ndarray:
    """The x with cdf(x) = tau, by bisection.

    The quantile of a mixture lies between the smallest and the largest of the quantiles of its
    components, which gives the bracket.
    """
    low = means.min(axis=-1) + sigma * scipy.special.ndtri(taus)
    high = means.max(axis=-1) + sigma * scipy.special.ndtri(taus)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        below = _mixture_cdf(middle, weights, means, sigma) < taus
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)


def _over_types(wins: np.ndarray, weights: Sequence[float], other_weights: Sequence[float],
                annotators: str) -> np.ndarray:
    """Win probabilities [...] of those between types [..., T, T], of one annotator or of two."""
    if annotators == 'independent':
        return wins @ np.asarray(other_weights) @ np.asarray(weights)
    return np.diagonal(wins, axis1=-2, axis2=-1) @ np.asarray(weights)


def check_name(what: str, name: str, known: Sequence[str]) -> None:
    """Raises ValueError, listing the known names, unless `name` is one of them."""
    if name not in known:
        raise ValueError(f'unknown {what} {name!r}; expected one of: {", ".join(known)}')


def _rewards(
    pairs: Sequence[tuple[RewardDistribution, RewardDistribution]],
    uniforms: np.ndarray,
    noise: np.ndarray,
    annotators: str,
) -> np.ndarray:
    """Draws a reward for each response.

    Args:
      pairs: P pairs of distributions over the same types.
      uniforms: [P, 2] uniform numbers, each of which picks a type; one annotator's is the first.
      noise: [P, 2] standard normal numbers.
      annotators: one of `ANNOTATORS`.

    Returns:
      [P, 2] rewards.
    """
    shares, sigma = pairs[0][0].weights, pairs[0][0].sigma
    means = np.array([[first.means, second.means] for first, second in pairs])  # [P, 2, T]
    types = np.searchsorted(np.cumsum(shares)[:-1], uniforms, side='right')  # [P, 2]
    if annotators != 'independent':
        types = np.repeat(types[:, :1], 2, axis=1)
    return np.take_along_axis(means, types[..., None], axis=2)[..., 0] + sigma * noise


def _truth(workload: str, reply: Sequence[_Part]) -> RewardDistribution:
    """The distribution of rewards for a reply: weights . attributes of each type."""
    spec = phrases.SPECS[workload]
    means = tuple(
        sum(spec.weights[part.attribute][t] * part.strength for part in reply)
        for t in range(len(spec.shares))
    )
    return RewardDistribution(spec.shares, means, spec.sigma)


def _text(reply: Sequence[_Part]) -> str:
    """The text of a reply, with the space that follows 'Assistant:'."""
    return ''.join(' ' + part.text for part in reply)


def _streams(workload: str, split: str, count: int, seed: int) -> list[np.random.Generator]:
    """Random numbers for texts, types, noise and prompts, after a check of the arguments.

    Each stream is read row by row, so that a prefix does not depend on the count.
    """
    check_name('workload', workload, WORKLOADS)
    check_name('split', split, _SPLITS)
    if count < 1:
        raise ValueError(f'count must be at least 1, got {count}')
    if seed < 0:
        raise ValueError(f'seed must not be negative, got {seed}')
    entropy = (seed, WORKLOADS.index(workload), _SPLITS.index(split))
    return list(map(np.random.default_rng, np.random.SeedSequence(entropy).spawn(4)))


@functools.cache
def _questions(workload: str, split: str) -> tuple[tuple[str, phrases.Topic], ...]:
    """The opening questions of a split with their topics; every question is in one split."""
    spec = phrases.SPECS[workload]
    questions = (
        (template.format(topic.phrase), topic)
        for topic in spec.topics
        for template in spec.templates[topic.kind]
    )
    return tuple(
        (question, topic)
        for question, topic in questions
        if (zlib.crc32(question.encode()) % _TEST_EVERY == 0) == (split == 'test')
    )


def _dialogues(workload: str, split: str, rng: np.random.Generator) -> Iterator[_Dialogue]:
    """Dialogues without end, each with two replies of different text."""
    spec, respond = phrases.SPECS[workload], _RESPOND[workload]
    questions = _questions(workload, split)
    while True:
        question, topic = _pick(rng, questions)
        opening = _pick(rng, phrases.LEADS) + question
        prompt = f'\n\nHuman: {opening}\n\nAssistant:'
        for turn in _distinct(rng, spec.follow_ups, _how_many(rng, *_FOLLOW_UPS)):
            answer = _text(respond(rng, topic)[:_EARLIER])
            prompt += f'{answer}\n\nHuman: {turn}\n\nAssistant:'
        first, second = respond(rng, topic), respond(rng, topic)
        while _text(second) == _text(first):
            second = respond(rng, topic)
        yield _Dialogue(question, opening, prompt, (first, second))


def _pick(rng: np.random.Generator, items: Sequence):
    """One of the items, all equally likely."""
    return items[int(rng.random() * len(items))]


def _distinct(rng: np.random.Generator, items: Sequence, count: int) -> list:
    """`count` different items in random order."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def _how_many(rng: np.random.Generator, *shares: float) -> int:
    """0, 1, 2, ... with the given shares; what they lack of 1 goes to the next number."""
    u = rng.random()
    return sum(u >= share for share in itertools.accumulate(shares))


def _parts(
    rng: np.random.Generator, bank: Mapping[str, float], attribute: str, count: int = 1
) -> list[_Part]:
    """`count` different sentences of a bank."""
    return [_Part(text, attribute, bank[text]) for text in _distinct(rng, bank, count)]


def _helpful_reply(rng: np.random.Generator, topic: phrases.Topic) -> list[_Part]:
    """Politeness, an answer with up to two points (or small talk), filler, a question back."""
    reply = _parts(rng, phrases.POLITE, 'polite', _how_many(rng, 0.5))
    if rng.random() < 0.3:
        reply += _parts(rng, phrases.OFF_TOPIC, 'answers')
    else:
        reply += _parts(rng, phrases.ANSWER[topic.kind], 'answers')
        points = _distinct(rng, topic.points, _how_many(rng, 0.35, 0.35))
        for form, point in zip(phrases.POINTS, points, strict=False):
            reply.append(_Part(form.format(point), 'detail', phrases.DETAIL))
    reply += _parts(rng, phrases.FILLER, 'filler', _how_many(rng, 0.6, 0.3))
    return reply + _parts(rng, phrases.CLARIFY, 'clarifies', _how_many(rng, 0.7))


def _harmless_reply(rng: np.random.Generator, topic: phrases.Topic) -> list[_Part]:
    """Gentleness, one stance (refuses, complies, evades), a sermon, a safe alternative."""
    reply = _parts(rng, phrases.GENTLE, 'gentle', _how_many(rng, 0.5))
    bank, attribute = phrases.STANCES[_how_many(rng, 0.45, 0.3)]
    reply += _parts(rng, bank, attribute)
    reply += _parts(rng, phrases.PREACH, 'preaches', _how_many(rng, 0.5, 0.3))
    if rng.random() < 0.4:
        point = phrases.ALTERNATIVE.format(_pick(rng, topic.points))
        reply.append(_Part(point, 'alternative', phrases.SAFE))
    return reply


_RESPOND = {'helpful': _helpful_reply, 'harmless': _harmless_reply}
