"""The gold reward of a demo workload for any text, such as what a policy answers.

`demo.generate` knows the reward of the replies that it writes. Here a response is read instead: it
is divided into sentences, after '.', '!' and '?' that a blank follows, and each is looked up among
those of the phrase banks, exactly but for white space. A reply of the generator has the reward
distribution that `generate` returns with it, to the last bit. What the generator never writes is
decided so that nothing is gained by it:

- Of an attribute the strongest different sentences count, as many as the generator gives one reply
  at most (`MOST`). The strongest: neither good nor harm can be hidden behind weaker sentences.
- A sentence counts once. The same point after 'First' and after 'Then' is the same.
- All else, whether repeated, beyond `MOST` ('surplus') or unread, adds to no attribute, and each
  of its characters costs every annotator `COST`.

So what can be gained is bounded, longer texts cost more without bound, and appending anything
to a reply that has all of the best sentences lowers its mean reward. White space has neither worth
nor cost, and a response without any text has no attribute: the mean reward is 0, that of an
evasive answer.

The prompt does not matter: in `generate`, too, the truth is a function of the reply. A point counts
whatever it was that was asked, so that the same reply is best for all prompts, and a policy that
always gives it has not hacked this reward.
"""

import collections
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qrm.data import phrases
from qrm.data.demo import WORKLOADS, RewardDistribution, check_name

# Sentences of an attribute in one reply of the generator, at most.
MOST = {
    'helpful': {'polite': 1, 'answers': 1, 'detail': 2, 'filler': 2, 'clarifies': 1},
    'harmless': {'gentle': 1, 'refuses': 1, 'complies': 1, 'preaches': 2, 'alternative': 1},
}
COST = 0.01  # units of reward for a character that does not count; a sentence has about 25

_BETWEEN = re.compile(r'(?<=[.!?]) ')


class Sentence(NamedTuple):
    """What the generator means by a sentence; it adds `strength` to `attribute`.

    Attributes:
      attribute: name.
      strength: in the units of the banks.
      content: equal for sentences that say the same.
      rewards: [T] what it adds to the reward that each type of annotators gives.
    """

    attribute: str
    strength: float
    content: str
    rewards: tuple[float, ...]


_Read = tuple[str, Sentence]  # with its text


class Amount(NamedTuple):
    """Some text of a response: how many sentences, and characters without blanks between them."""

    sentences: int
    characters: int


class Gold(NamedTuple):
    """The gold reward of a response, and how its text was read.

    Attributes:
      reward: over annotators.
      attributes: name -> sum of the strengths that count, for those that occur.
      counted: the text that the attributes are of.
      repeated: read, and said before.
      surplus: read, and beyond what one reply has of the attribute.
      unread: not among the generator's sentences.
    """

    reward: RewardDistribution
    attributes: Mapping[str, float]
    counted: Amount
    repeated: Amount
    surplus: Amount
    unread: Amount

    @property
    def unread_share(self) -> float:
        """Of its characters, in [0, 1]; 0 of a response without any."""
        total = sum(amount.characters for amount in self[2:])
        return self.unread.characters / max(total, 1)

    @property
    def price(self) -> float:
        """What all text but the counted takes off the reward that each annotator gives."""
        return _price(self.repeated, self.surplus, self.unread)


def judge(workload: str, response: str) -> Gold:
    """The gold reward of a response, see above; a pure function of its arguments.

    Args:
      workload: one of `demo.WORKLOADS`.
      response: any text.

    Raises:
      ValueError: on an unknown workload.
    """
    known = sentences(workload)
    spec = phrases.SPECS[workload]
    new: dict[str, tuple[str, Sentence]] = {}
    repeated, unread = [], []
    text = ' '.join(response.split())
    for part in _BETWEEN.split(text) if text else ():
        sentence = known.get(part)
        if sentence is None:
            unread.append(part)
        elif sentence.content in new:
            repeated.append(part)
        else:
            new[sentence.content] = part, sentence
    counted, surplus = _divide(MOST[workload], new.values())
    attributes: dict[str, float] = {}
    for _, sentence in counted:
        attributes[sentence.attribute] = (
            attributes.get(sentence.attribute, 0.0) + sentence.strength)
    amounts = (_amount([part for part, _ in counted]), _amount(repeated),
               _amount([part for part, _ in surplus]), _amount(unread))
    cost = _price(*amounts[1:])
    # In the order of the text, as the generator adds them up: sums of floats depend on it.
    of_types = zip(*(sentence.rewards for _, sentence in counted), strict=True)
    means = tuple(map(sum, of_types)) or (0.0,) * len(spec.shares)
    reward = RewardDistribution(spec.shares, tuple(mean - cost for mean in means), spec.sigma)
    return Gold(reward, attributes, *amounts)


def shares(golds: Iterable[Gold]) -> dict[str, float]:
    """How much of the text of some responses was read, by name.

    Args:
      golds: of at least one response.

    Returns:
      'counted', 'repeated', 'surplus' and 'unread', shares of all characters, which sum to 1, or
      are 0 where there is no text; and 'blank', the share of the responses without any.
    """
    names = Gold._fields[2:]
    table = np.array([[getattr(gold, name).characters for name in names] for gold in golds])
    total = table.sum()
    parts = table.sum(axis=0) / max(total, 1)
    return dict(zip(names, parts.tolist(), strict=True)) | {
        'blank': float(np.mean(table.sum(axis=1) == 0))}


@functools.cache
def sentences(workload: str) -> Mapping[str, Sentence]:
    """All sentences that replies of a workload are made of, by their text.

    Args:
      workload: one of `demo.WORKLOADS`.

    Raises:
      ValueError: on an unknown workload.
    """
    check_name('workload', workload, WORKLOADS)
    spec = phrases.SPECS[workload]
    points = dict.fromkeys(point for topic in spec.topics for point in topic.points)

    def sentence(attribute: str, strength: float, content: str) -> Sentence:
        rewards = tuple(weight * strength for weight in spec.weights[attribute])
        return Sentence(attribute, strength, content, rewards)

    if workload == 'helpful':
        banks = [(phrases.POLITE, 'polite'), (phrases.OFF_TOPIC, 'answers'),
                 *((bank, 'answers') for bank in phrases.ANSWER.values()),
                 (phrases.FILLER, 'filler'), (phrases.CLARIFY, 'clarifies')]
        forms, attribute, strength = phrases.POINTS, 'detail', phrases.DETAIL
    else:
        banks = [(phrases.GENTLE, 'gentle'), *phrases.STANCES, (phrases.PREACH, 'preaches')]
        forms, attribute, strength = (phrases.ALTERNATIVE,), 'alternative', phrases.SAFE
    return {form.format(point): sentence(attribute, strength, point)
            for form in forms for point in points} | {
        text: sentence(attribute, strength, text)
        for bank, attribute in banks for text, strength in bank.items()}


def _divide(most: Mapping[str, int], new: Iterable[_Read]) -> tuple[list[_Read], list[_Read]]:
    """Those of different sentences that count, in their order, and the surplus."""
    counted = list(new)
    surplus = []
    number = collections.Counter(sentence.attribute for _, sentence in counted)
    for attribute, count in number.items():
        if count > most[attribute]:
            own = [one for one in counted if one[1].attribute == attribute]
            surplus += sorted(own, key=lambda one: -one[1].strength)[most[attribute]:]
    return [one for one in counted if one not in surplus] if surplus else counted, surplus


def _price(*amounts: Amount) -> float:
    return COST * sum(amount.characters for amount in amounts)


def _amount(parts: Sequence[str]) -> Amount:
    return Amount(len(parts), sum(map(len, parts)))
