"""Judges: who says which of two responses is better, behind one interface.

A judge is asked about comparisons of two responses, in the order in which they stand, and gives the
probability that the first one is better. `labels` asks both orders. Kinds, by the name before the
colon:

    language-model:PATH     reads a question, and is read at the next token: P(A) against P(B)
    reward-model:PATH       the win probability of a reward model
    function:MODULE:NAME    a Python function of prompts, first and second responses
    endpoint:MODEL@URL      an HTTP server with the chat completions of OpenAI, asked a question
    gold:WORKLOAD           the truth about replies of the demo

`NAME=KIND:...` gives a judge another name than its own.
"""

import dataclasses
import functools
import inspect
import itertools
import numbers
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from qrm.analysis import winrate
from qrm.data import gold, orders
from qrm.data.comparisons import Comparison, DataError, Text, in_a_line
from qrm.data.demo import WORKLOADS
from qrm.data.encoded import Encoded
from qrm.data.templates import Tokenizer, render
from qrm.data.tokens import encode_prompts
from qrm.models.network import params_digest
from qrm.policy import batches, endpoint, language_model, network, programs
from qrm.policy.language_model import LanguageModel
from qrm.policy.network import PolicyNetwork
from qrm.policy.questions import ANSWERS, Answer, Options, Spec, identity, prompt_text, question
from qrm.rewards import pairwise
from qrm.training import inference, reward_model
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.reward_model import RewardModel

_PLAINLY = '\n\nAnswer:'  # what a model without a chat template is asked to continue
_TOGETHER = 64  # pairs that a function is given at once
_OF_A_ROW = 8  # questions for each packed row, after which answers are given
_ROW_LENGTH = 1024  # tokens of packed rows
_CHUNK = 1024  # comparisons of a reward model, as these are quickly scored


Placed = tuple[int, Answer]


class Judge(Protocol):
    """Whoever says which of two responses is better.

    Attributes:
      name: of the annotator that the labels name.
      identity: all that answers depend on beside the texts, by which they are kept.
    """

    name: str
    identity: str

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        """Judges comparisons of two responses each.

        Yields:
          The place of a comparison and the answer, for each one as soon as it is there.

        Raises:
          DataError: the judge cannot be asked.
        """


def parse(text: str) -> Spec:
    """What names a judge, see above.

    Raises:
      ValueError: it names none.
    """
    found = re.fullmatch(r'(?:([^=:]*)=)?([a-z-]+):(.+)', text, re.DOTALL)
    if not found or found[2] not in KINDS or (found[1] is not None and not found[1].strip()):
        raise ValueError(f'{text!r}, expected KIND:WHAT or NAME=KIND:WHAT, with a kind of '
                         f'{tuple(KINDS)}')
    name, kind, what = found.groups()
    own = {'language-model': os.path.basename(os.path.normpath(what)),
           'reward-model': os.path.basename(os.path.normpath(what)),
           'endpoint': what.partition('@http')[0], 'gold': f'gold {what}'}
    return Spec(name or own.get(kind, what), kind, what)


def load(spec: Spec, options: Options) -> Judge:
    """The judge of a name.

    Raises:
      DataError, WorkdirError: there is none, or it cannot be used.
    """
    return KINDS[spec.kind](spec, options)


@dataclasses.dataclass(frozen=True)
class LanguageModelJudge:
    """A language model that is asked, and read at the next token.

    Attributes:
      name, identity: see `Judge`.
      model: the language model.
      template: of the question.
      tokens: of the two answers.
      max_length: tokens of a question at most.
      rows: packed rows that are computed at once.
    """

    name: str
    identity: str
    model: LanguageModel
    template: str
    tokens: tuple[int, int]
    max_length: int
    rows: int

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        asked = [self._fit(pair) for pair in pairs]
        places = []
        for place, (ids, _) in enumerate(asked):
            if ids is None:
                yield place, Answer(None, 'responses longer than the model can read')
            else:
                places.append(place)
        encoded = [_answered(pairs[i].id, asked[i][0], self.tokens) for i in places]
        transformer = self.model.transformer
        policy = PolicyNetwork(transformer.architecture, jnp.dtype(transformer.dtype).name)
        inference.check_look_ups(policy, encoded)
        # Answers are one token each: T = 1.
        found = inference.run(
            network.log_probs, 1, policy, {'backbone': self.model.params}, encoded, _ROW_LENGTH,
            self.rows, None, _OF_A_ROW * self.rows * jax.device_count(),
            make=functools.partial(batches.policy_batch, longest=1))
        for place, log_probs in zip(places, itertools.chain.from_iterable(found), strict=True):
            yield place, _read(log_probs, *asked[place])

    def _fit(self, pair: Comparison) -> tuple[np.ndarray | None, bool]:
        """Tokens of a question, and whether its prompt was cut; None if it is still too long."""
        ids = self._encode(question(self.template, pair))
        if len(ids) <= self.max_length:
            return ids, False
        low, high = 0, len(prompt_text(pair))  # characters: so many fit, so many do not
        fitting = self._encode(question(self.template, pair, most=0))
        if len(fitting) > self.max_length:
            return None, False
        while high - low > 1:
            middle = (low + high) // 2
            ids = self._encode(question(self.template, pair, most=middle))
            if len(ids) <= self.max_length:
                low, fitting = middle, ids
            else:
                high = middle
        return fitting, True

    def _encode(self, text: str) -> np.ndarray:
        (ids,), _ = encode_prompts([_as_prompt(text, self.model.tokenizer)],
                                   self.model.tokenizer, sys.maxsize)
        return ids


def _read(log_probs: np.ndarray, ids: np.ndarray, cut: bool) -> Answer:
    """The answer of a language model, from log-probabilities [2, 1] of both answers."""
    both = log_probs[:, 0].astype(np.float64)
    if not np.isfinite(both).all():
        raise NonFiniteLoss('a language model that judges: log-probabilities that are not finite')
    return Answer(float(scipy.special.expit(both[0] - both[1])), read=len(ids), cut=cut,
                  share=float(np.exp(both).sum()))


def _answered(name: str, ids: np.ndarray, tokens: tuple[int, int]) -> Encoded:
    """A question as the prompt of its two answers."""
    return Encoded(name, name, ids, tuple(np.array([token], np.int32) for token in tokens),
                   np.zeros((2, 2), np.float32), np.full((2, 1), np.nan, np.float32),
                   prompt_sizes=(len(ids),) * 2)


def _as_prompt(text: str, tokenizer: Tokenizer) -> Comparison:
    """A question as a language model answers it: a chat, if it has a template."""
    prompt: Text = text + _PLAINLY
    if tokenizer.chat_template is not None:
        prompt = ({'role': 'user', 'content': text},)
    return Comparison('question', prompt, (), 'question')


def answer_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens by which both answers follow a question.

    Raises:
      DataError: an answer has not one token of its own.
    """
    asked = _as_prompt('', tokenizer)
    plainly = isinstance(asked.prompt, str)
    text = asked.prompt if plainly else render(asked, (), tokenizer, to_answer=True)
    ends = [f' {answer}' if plainly else answer for answer in ANSWERS]
    before, *after = (tokenizer(text + end, add_special_tokens=False)['input_ids']
                      for end in ('', *ends))
    found = [ids[-1] for ids in after if ids[:-1] == before and
             tokenizer.decode(ids[-1:]).strip() in ANSWERS]
    if len(set(found)) != len(ANSWERS):
        raise DataError(f'{tokenizer.name_or_path}: the tokenizer has no token for each of '
                        f'{" and ".join(ANSWERS)} after a question, expected one, as these are '
                        'compared')
    return found[0], found[1]


def _language_model(spec: Spec, options: Options) -> Judge:
    model = language_model.load(spec.what, dtype=options.dtype, date=options.date)
    positions = model.transformer.architecture.max_positions
    if options.max_length > positions:
        raise DataError(f'--max_length={options.max_length}, but the model has {positions} '
                        'positions')
    longest = (options.max_length or positions) - 1  # an answer has a position of its own
    digest = identity('language model', params_digest(model.params), dict(model.settings),
                         options.template, options.dtype, longest, model.tokenizer.chat_template)
    return LanguageModelJudge(spec.name, digest, model, options.template,
                              answer_tokens(model.tokenizer), longest, options.rows)


@dataclasses.dataclass(frozen=True)
class RewardModelJudge:
    """A reward model: the probability with which it prefers the first response.

    One that scores each response alone knows no order. A pairwise one is read in the order that is
    asked.

    Attributes:
      name, identity: see `Judge`.
      model: the reward model.
    """

    name: str
    identity: str
    model: RewardModel

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        for start in range(0, len(pairs), _CHUNK):
            yield from enumerate(self._judge(pairs[start:start + _CHUNK]), start)

    def _judge(self, pairs: Sequence[Comparison]) -> list[Answer]:
        # Both orders of two responses are scored once.
        keys = [pair.text_digest() for pair in pairs]
        once = dict(zip(keys, pairs, strict=True))
        encoded, cut = zip(*(self.model.encode([pair]) for pair in once.values()), strict=True)
        encoded = list(itertools.chain.from_iterable(encoded))
        wins = self._wins(self.model.predict(encoded))
        found = dict(zip(once, zip(wins.tolist(), encoded, cut, strict=True), strict=True))
        answers = []
        for key, pair in zip(keys, pairs, strict=True):
            of_orders, item, shortened = found[key]
            same = pair.responses == once[key].responses
            answers.append(Answer(of_orders[0 if same else 1], read=item.size,
                                  cut=bool(shortened)))
        return answers

    def _wins(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """[n, 2], that the first response is better: in the order they are in, and in the other."""
        if self.model.network.head.pairwise:
            log_odds = np.array([pairwise.in_both_orders(one) for one in outputs])
            return scipy.special.expit(np.stack([log_odds[:, 0, 1, 0], log_odds[:, 1, 0, 0]], 1))
        first, second = (self.model.network.head.read(np.stack(outputs)[:, k:k + 1]).distribution
                         for k in (0, 1))
        return np.concatenate([winrate.win_probabilities(self.model.loss, *sides)[..., 0]
                               for sides in ((first, second), (second, first))], axis=1)


def _reward_model(spec: Spec, options: Options) -> Judge:
    model = reward_model.load(spec.what, max_length=options.max_length, outputs=options.outputs,
                              date=options.date, raw=True)
    digest = identity('reward model', model.digest, model.tokenizer.chat_template)
    return RewardModelJudge(spec.name, digest, model)


@dataclasses.dataclass(frozen=True)
class FunctionJudge:
    """A Python function of prompts, first and second responses, of several pairs at once.

    Texts and chats are what they are in the rows. It returns a probability or None for each pair.

    Attributes:
      name, identity: see `Judge`.
      function: the function.
      place: by what name it is asked for.
    """

    name: str
    identity: str
    function: Callable[..., Any]
    place: str

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        for start in range(0, len(pairs), _TOGETHER):
            some = pairs[start:start + _TOGETHER]
            columns = [[_plain(text) for text in column] for column in (
                [pair.prompt for pair in some], *zip(*(pair.responses for pair in some),
                                                     strict=True))]
            try:
                found = list(self.function(*columns))
            except Exception as error:  # a program of somebody else, which fails in any way
                raise DataError(f'{self.place}: {type(error).__name__}: {in_a_line(error)}'
                                ) from error
            if len(found) != len(some):
                raise DataError(f'{self.place}: {len(found)} answers to {len(some)} pairs, expected'
                                ' one for each')
            for place, value in enumerate(found, start):
                yield place, self._answer(value)

    def _answer(self, value: Any) -> Answer:
        if value is None:
            return Answer(None, 'none by the function')
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
            raise DataError(f'{self.place}: {value!r:.50}, expected a probability in [0, 1], or '
                            'None')
        return Answer(float(value))


def _plain(text: Text) -> Any:
    """A text, or a chat as a list of messages."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def _function(spec: Spec, unused_options: Options) -> Judge:
    try:
        function, loaded = programs.find(spec.what)
    except ValueError as error:
        raise DataError(f'function:{spec.what}: {error}') from error
    try:
        source = inspect.getsource(loaded)
    except (OSError, TypeError):
        source = ''  # as of a compiled one
    return FunctionJudge(spec.name, identity('function', spec.what, source), function, spec.what)


@dataclasses.dataclass(frozen=True)
class GoldJudge:
    """The truth about replies of a demo workload: the probability that one annotator's reward of
    the first exceeds another's of the second.

    Attributes:
      name, identity: see `Judge`.
      workload: one of `demo.WORKLOADS`.
    """

    name: str
    identity: str
    workload: str

    def __call__(self, pairs: Sequence[Comparison]) -> Iterator[Placed]:
        for place, pair in enumerate(pairs):
            first, second = (gold.judge(self.workload, text).reward
                             for text in orders.response_texts(pair))
            yield place, Answer(first.win_probability(second))


def _gold(spec: Spec, unused_options: Options) -> Judge:
    if spec.what not in WORKLOADS:
        raise DataError(f'gold:{spec.what}: expected a workload of the demo, one of {WORKLOADS}')
    return GoldJudge(spec.name, identity('gold', spec.what), spec.what)


KINDS: dict[str, Callable[[Spec, Options], Judge]] = {
    'language-model': _language_model, 'reward-model': _reward_model, 'function': _function,
    'endpoint': endpoint.load, 'gold': _gold}
