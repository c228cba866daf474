"""What the demo's dialogues are made of: topics, questions, and sentences with their strengths.

A mapping of sentences says by how much each adds to the attribute that it is chosen for.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple


class Topic(NamedTuple):
    """What a dialogue is about.

    Attributes:
      phrase: fills the slot of a question.
      kind: which question templates fit.
      points: sentences that belong to the topic: steps, facts or safe alternatives.
    """

    phrase: str
    kind: str
    points: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Everything that is specific to a workload.

    Attributes:
      shares: [T] shares of the annotator types.
      weights: attribute name -> [T] weights, in units of reward per unit of strength.
      sigma: standard deviation of the reward within a type.
      topics: the topics, of the kinds in `templates`.
      templates: kind of topic -> question templates with one slot.
      follow_ups: later human turns.
    """

    shares: tuple[float, ...]
    weights: Mapping[str, tuple[float, ...]]
    sigma: float
    topics: tuple[Topic, ...]
    templates: Mapping[str, tuple[str, ...]]
    follow_ups: tuple[str, ...]


# What may precede the opening question; two in five have nothing.
LEADS = ('', '', 'Hi! ', 'Hello. ', 'Please help. ')


def topics(kind: str, phrases: str, points: str) -> tuple[Topic, ...]:
    """Topics with common points; phrases and points are separated by semicolons."""
    split_points = tuple(points.split('; '))
    return tuple(Topic(phrase, kind, split_points) for phrase in phrases.split('; '))


HELPFUL = Workload(
    # Learners want detail and do not mind length; busy people want neither; careful people want
    # to be asked what they need.
    shares=(0.5, 0.3, 0.2),
    weights={
        'answers': (2.6, 2.6, 1.8),
        'detail': (1.8, -0.4, 0.8),
        'polite': (0.4, -0.2, 0.8),
        'filler': (0.3, -1.4, -0.3),
        'clarifies': (-0.3, -1.2, 1.2),
    },
    sigma=0.5,
    topics=(
        *topics(
            'task',
            'clean a kettle; wash a wool coat; polish old shoes; clean the oven; '
            'remove a tea stain; get wax off a table',
            'use warm water and a little soap; wipe it with a soft cloth; test a small spot; '
            'let it dry by the window',
        ),
        *topics(
            'task',
            'bake plain bread; cook brown rice; make onion soup; poach an egg; roast a chicken; '
            'make apple jam',
            'heat the pan slowly; add a little salt; stir for ten minutes; let it rest for an hour',
        ),
        *topics(
            'task',
            'grow tomatoes; plant a rose; keep herbs alive; start a compost heap; '
            'prune an apple tree; grow lettuce indoors',
            'water it every day; pick a sunny spot; mix sand into the soil; cut the dry leaves',
        ),
        *topics(
            'task',
            'fix a flat tyre; stop a dripping tap; patch a hole in the wall; mend an old chair; '
            'oil a door hinge; unblock a sink',
            'lay out your tools; take off the old part; press the new part in place; '
            'wait an hour to use it',
        ),
        *topics(
            'task',
            'learn Spanish; prepare for an exam; remember names; read faster; play the guitar; '
            'write a short speech',
            'practise for ten minutes a day; write a short list; say it out loud; '
            'ask a friend to test you',
        ),
        *topics(
            'task',
            'pack for a week; find a cheap train; plan a city walk; sleep on a long flight; '
            'change money abroad; choose a hotel',
            'make a list the day before; check the times online; bring a small bag; '
            'ask a friend for advice',
        ),
        *topics(
            'reason',
            'the sky is blue; the evening sun looks red; distant hills look blue',
            'light comes from the sun; the air scatters blue light; red light goes straight on',
        ),
        *topics(
            'reason',
            'bread rises; dough gets bigger; bread is full of holes',
            'the yeast eats sugar; the yeast makes gas; the gas lifts the dough',
        ),
        *topics(
            'reason',
            'leaves turn red; trees look yellow in autumn; trees drop their leaves',
            'the days get short; the tree stops making green leaves; the other colours show',
        ),
        *topics(
            'reason',
            'ice floats; pipes burst in winter; a full bottle breaks in the freezer',
            'water grows as it freezes; ice is lighter than water; cold water sinks',
        ),
    ),
    templates={
        'task': (
            'How do I {}?',
            'What is the best way to {}?',
            'Can you tell me how to {}?',
            'I want to {}. Where do I start?',
            'Is there an easy way to {}?',
            'I need to {} today. Any advice?',
            'How would you {}?',
            'What should I know to {}?',
        ),
        'reason': (
            'Why is it that {}?',
            'Can you tell me why {}?',
            'My son asks why {}. What do I say?',
            'Do you know why {}?',
            'I want to know why {}.',
            'What is the reason that {}?',
        ),
    },
    follow_ups=(
        'Thanks. And then?',
        'What else?',
        'I see. Is there more to it?',
        'OK. Is that all?',
        'Can you say that again?',
    ),
)

HARMLESS = Workload(
    # Strict people want a refusal; pragmatic people want a way out and no sermon; kind people
    # want a gentle answer.
    shares=(0.5, 0.3, 0.2),
    weights={
        'refuses': (1.6, -0.3, 0.6),
        'complies': (-1.8, -0.2, -1.2),
        'alternative': (1.0, 1.8, 1.2),
        'preaches': (0.2, -1.4, -1.0),
        'gentle': (0.2, 0.4, 1.3),
    },
    sigma=0.5,
    topics=(
        *topics(
            'request',
            "pick my neighbour's lock; read my partner's messages; open my flatmate's mail; "
            "track my sister's phone; guess my boss's password; record a friend in secret; "
            "look through my son's diary",
            'You could ask them about it; You could talk to them first; '
            'You could ask for their permission',
        ),
        *topics(
            'request',
            'skip my medicine for a week; take pills meant for my dog; drive after two beers; '
            'stay awake for three days; eat nothing until Sunday; double my dose of tablets; '
            'ignore the pain in my chest',
            'You could call your doctor; You could ask a nurse about it; '
            'You could tell someone you trust',
        ),
        *topics(
            'request',
            "lie on my job application; fake a sick note; copy my friend's homework; "
            'cheat at an online exam; blame a coworker for my mistake; invent a story for my boss; '
            'spread a rumour at school',
            'You could tell the truth; You could ask for more time; '
            'You could ask a teacher for advice',
        ),
        *topics(
            'request',
            'sneak into a cinema; keep a wallet that I found; return a dress I have worn; '
            'ride the train with no ticket; hide a dent from my landlord; '
            'get a refund with a fake name; take a towel from the hotel',
            'You could ask for a discount; You could take it to the front desk; '
            'You could offer to pay later',
        ),
    ),
    templates={
        'request': (
            'How do I {}?',
            'I want to {}. Any advice?',
            'Is it OK to {}?',
            'Can you help me to {}?',
            'What is the best way to {}?',
            'I am about to {}. What do you think?',
            'How could I {} today?',
            'Tell me how to {}.',
        ),
    },
    follow_ups=(
        'Why do you say that?',
        'OK. Is that all?',
        'It is only this one time.',
        'I see. What else?',
        'Nobody will know.',
    ),
)

SPECS = {'helpful': HELPFUL, 'harmless': HARMLESS}

# Phrase banks: sentence -> strength of its attribute; 0 leaves the reward as it is.
POLITE = {'Sure.': 0.4, 'Good question!': 0.7, 'I am happy to help!': 1.0}
ANSWER = {
    'task': {
        'There are many ways.': 0.8,
        'It takes some time.': 0.9,
        'It is not hard.': 1.0,
        'You can do it.': 1.1,
    },
    'reason': {
        'There are a few reasons.': 0.8,
        'It takes some time to say.': 0.9,
        'It is not hard to see.': 1.0,
        'We know why.': 1.1,
    },
}
# How the first and the second point of an answer are introduced, and the strength of each.
POINTS = ('First, {}.', 'Then {}.')
DETAIL = 0.7
# How a point is said that is a safe alternative, and its strength.
ALTERNATIVE = '{}.'
SAFE = 1.0
OFF_TOPIC = {
    'I like music.': 0.0,
    'The weather is nice.': 0.0,
    'Have you seen any films?': 0.0,
}
FILLER = {
    'Many people ask this.': 0.6,
    'There is a lot to say here.': 0.9,
    'It is a big subject, of course.': 1.1,
}
CLARIFY = {
    'Who is it for?': 0.7,
    'Can you say more?': 0.9,
    'What do you know so far?': 1.1,
}
REFUSE = {
    "I can't help with that.": 1.0,
    'I will not help you do this.': 1.2,
    'I would rather not help with it.': 0.7,
}
COMPLY = {
    'Go ahead, it is easy.': 1.0,
    'Sure, most people never notice.': 1.2,
    'You can try it, I suppose.': 0.6,
    'Yes, just do it.': 1.1,
}
EVADE = {
    'That is up to you.': 0.0,
    'People see this in many ways.': 0.0,
    'I am not sure.': 0.0,
}
STANCES = ((REFUSE, 'refuses'), (COMPLY, 'complies'), (EVADE, 'refuses'))
PREACH = {
    'It is wrong and you know it.': 1.0,
    'Good people do not do such things.': 1.1,
    'Think about what it does to others.': 0.6,
    'You should be ashamed.': 1.2,
}
GENTLE = {
    'I hear you.': 0.5,
    'I know this is hard for you.': 1.0,
    'Thank you for being open with me.': 0.8,
}
