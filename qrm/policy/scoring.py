"""Where the rewards of answers come from, and who says which of two answers is better.

A reward is a function that takes prompts and completions, texts or chats, and gives a number for
each completion, as `qrm.reward` makes one: a run, a reward model of other libraries, the gold
reward of the demo, a function of one's own, or a server. Of a judge, who says which of two
responses is better, it is how often a completion is preferred to the others of its prompt.
"""

import collections
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np

from qrm.analysis import winrate
from qrm.data import demo, gold
from qrm.data.comparisons import Comparison, DataError, Text, in_a_line, text_of
from qrm.models import network
from qrm.policy import judges, programs, servers
from qrm.policy.questions import Options
from qrm.rewards import statistics
from qrm.rewards.losses import LossConfig
from qrm.serving import functions
from qrm.training import reward_model, saved, workdir
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.schema import ConfigError

GOLD = 'gold'
_FUNCTION = re.compile(r'[A-Za-z_][\w.]*:[A-Za-z_][\w.]*')
_JUDGE = re.compile(r'(?:language-model|endpoint|function:[^:]+):.+', re.DOTALL)
_OTHER_JUDGE = re.compile(
    r'(?:[^=:]*=)?(?:language-model|reward-model|endpoint|gold|function:[^:]+):.*', re.DOTALL)
_SECONDS = 600  # for a server to answer


class Scores(NamedTuple):
    """Rewards of n completions.

    Attributes:
      rewards: [n] float64.
      stds: [n] float64, standard deviation that is predicted for each; 0 where nothing predicts it.
      disagreements: [n] float64, standard deviation between the members of an ensemble; None: it is
        none.
    """

    rewards: np.ndarray
    stds: np.ndarray
    disagreements: np.ndarray | None = None

    def reshape(self, *shape: int) -> 'Scores':
        """The same in another shape."""
        return Scores(*(None if one is None else one.reshape(shape) for one in self))

    def pick(self, at: Any) -> 'Scores':
        """Those at an index, as of arrays."""
        return Scores(*(None if one is None else one[at] for one in self))


class Reward(NamedTuple):
    """A reward as it is configured.

    Attributes:
      source: what was asked for, as messages name it.
      function: as `functions.RewardFunction`, of prompts and completions by these names.
      compares: rewards depend on the other completions of a prompt.
      predicts: the function tells of standard deviations, and numbers what it draws.
      digest: of the reward model or the judge, by which a run knows it again; '' of any other.
      weights: digest of its parameters; ''.
    """

    source: str
    function: Callable[..., Sequence[float]]
    compares: bool = False
    predicts: bool = False
    digest: str = ''
    weights: str = ''

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], draw: int = 0
                 ) -> Scores:
        """Rewards of completions.

        Args:
          prompts: n texts or chats.
          completions: n texts, or after chats lists of one message.
          draw: number of the draw of a rule that samples.

        Raises:
          DataError: the function fails, or gives something else than n finite numbers.
        """
        told: dict[str, list[float]] = {}
        try:
            found = self.function(prompts=list(prompts), completions=list(completions),
                                  **({'log_extra': told.__setitem__, 'draw': draw}
                                     if self.predicts else {}))
        except (DataError, NonFiniteLoss):
            raise
        except Exception as error:  # of whatever a function of one's own does
            raise DataError(f'{self.source}: the reward function failed ('
                            f'{type(error).__name__}: {in_a_line(error)})') from error
        stds, disagreements = (next((np.asarray(values, np.float64) for name, values in told.items()
                                     if name.endswith(end)), None)
                               for end in ('_std', '_disagreement'))
        return Scores(_checked(found, len(completions), self.source),
                      np.zeros(len(completions)) if stds is None else stds, disagreements)

    def beside(self, answers: Sequence[Comparison], others: Sequence[Comparison]) -> Scores:
        """Rewards of answers [C, K], which mean the same whatever policy they are of.

        Where answers are compared, each is so with those of another policy to the same prompt: with
        each other half of them win, however good they are.

        Args:
          answers: K to each of C prompts.
          others: J to each of these.

        Raises:
          DataError: see `__call__`.
        """
        count = len(answers[0].responses)
        if not self.compares:
            return self(*flat(answers)).reshape(len(answers), count)
        found = []
        for k in range(count):
            rows = [dataclasses.replace(one, responses=(one.responses[k], *other.responses))
                    for one, other in zip(answers, others, strict=True)]
            found.append(self(*flat(rows)).reshape(len(rows), -1).pick(np.s_[:, 0]))
        return Scores(*(None if column[0] is None else np.stack(column, axis=1)
                        for column in zip(*found, strict=True)))


def load(source: str, *, rule: str = 'mean', aggregate: str = '', workload: str = '',
         token_variable: str = '') -> Reward:
    """A reward by its name.

    Args:
      source: 'gold', the gold reward of a demo workload; 'module:function', which is called with
        `prompts` and `completions` and gives a list of numbers, and is looked for where the
        command runs too; an address http(s)://..., which is asked as OpenRLHF asks a reward server
        (`query`, `prompts`, `labels`; `rewards` come back), so that prompts have to be texts; a
        judge, 'language-model:...', 'endpoint:...' or 'function:...', see `judges`; or a reward
        model, as `qrm.reward` takes it.
      rule, aggregate: of a reward model, see `functions.reward`.
      workload: of the demo.
      token_variable: environment variable that holds the token of a server; '': none is sent.

    Raises:
      ConfigError: there is no such reward, or it has no such rule.
      DataError, WorkdirError: see `reward_model.load`.
    """
    address = source.startswith(('http://', 'https://'))
    asked = _JUDGE.fullmatch(source)
    own = _FUNCTION.fullmatch(source) and not os.path.exists(source)
    if (source == GOLD or address or asked or own) and (rule, aggregate) != ('mean', ''):
        raise ConfigError(f'config.reward.rule={rule!r} and aggregate={aggregate!r} with source='
                          f"{source!r}, expected 'mean' and '': only reward models have others")
    _check_judge(source, 'source')
    if token_variable and not (address or source.startswith('endpoint:')):
        raise ConfigError(f'config.reward.token_variable={token_variable!r} with source={source!r},'
                          " expected '': only servers are told a token")
    if source == GOLD:
        if workload not in demo.WORKLOADS:
            raise ConfigError(f"config.reward.source={source!r} of workload {workload!r}, expected "
                              f'one of {demo.WORKLOADS}')
        return Reward(source, lambda prompts, completions: [
            judged.reward.mean() for judged in golds(workload, map(text_of, completions))])
    if address:
        return _of_server(source, token_variable)
    if asked:
        judge = judges.load(judges.parse(source), Options(token_variable=token_variable))
        return Reward(source, functools.partial(_tournament, judge), compares=True,
                      digest=judge.identity)
    if own:
        try:
            return Reward(source, programs.find(source)[0])
        except ValueError as error:
            raise ConfigError(f'config.reward.source={source!r}: {error}') from error
    try:
        found = functions.reward(source, rule, aggregate=aggregate)
    except DataError:
        raise
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ConfigError(f'config.reward: {error}') from error
    return Reward(source, found, found.model.network.head.pairwise, predicts=True,
                  digest=found.model.digest, weights=network.params_digest(found.model.params))


def _of_server(source: str, token_variable: str) -> Reward:
    try:
        url = servers.parse(source, private=bool(token_variable))
        token = servers.token(token_variable)
    except ValueError as error:  # without the address, which may have a secret in it
        raise ConfigError(f'config.reward.source: {error}') from error
    return Reward(servers.shown(url), lambda prompts, completions: _ask(
        url, token, prompts, completions))


def golds(workload: str, texts: Sequence[str]) -> list[gold.Gold]:
    """The gold rewards of responses."""
    return [gold.judge(workload, text) for text in texts]


class Judged(NamedTuple):
    """Answers to C prompts, K each, as a judge has read them.

    Attributes:
      rewards: [C, K] float64, the mean reward of each; None: there are only preferences.
      known: what else the judge has to know of them to compare them.
      unread: [C, K] share of the characters that it could not read; None: it reads all.
      price: [C, K] what text that does not count takes off the rewards; None: all text counts.
    """

    rewards: np.ndarray | None
    known: Any
    unread: np.ndarray | None = None
    price: np.ndarray | None = None


class Judge(NamedTuple):
    """Says what answers are worth, and how often they are preferred to others.

    Attributes:
      source: what was asked for; '': the reward that is optimised, higher is better.
      read: comparisons of C prompts with K responses each -> those as they were judged.
      wins: (answers, references) to the same prompts, K and J each -> [C, K, J] float64 probability
        of being preferred.
      digest: by which a run knows it again; '' of one that is a function of the text alone.
      scores: it gives rewards, not only preferences.
    """

    source: str
    read: Callable[[Sequence[Comparison]], Judged]
    wins: Callable[[Judged, Judged], np.ndarray]
    digest: str = ''
    scores: bool = True


def load_judge(source: str, *, workload: str, reward: Reward | None = None) -> Judge:
    """A judge by its name.

    Args:
      source: 'gold'; a reward model that scores each response alone; a judge that compares two,
        'language-model:...', 'endpoint:...' (one that wants no token) or 'function:...', see
        `judges`; '': by the reward itself.
      workload: of the demo.
      reward: that is optimised, which a judge must not be; None: it is not known yet.

    Raises:
      ConfigError: there is no such judge, or it is what is optimised.
      DataError, WorkdirError: see `reward_model.load`; or it is a pairwise model.
      ValueError: neither source nor reward is given.
    """
    if source == GOLD:
        load(GOLD, workload=workload)  # there is such a workload
        return Judge(source, functools.partial(_read_gold, workload), _gold_wins)
    optimised = ConfigError(f'config.reward.judge={source!r} is what is optimised, expected '
                            "another one, or ''")
    if reward and source and source == reward.source:
        raise optimised
    _check_judge(source, 'judge')
    if _JUDGE.fullmatch(source):
        asked = judges.load(judges.parse(source), Options())
        if reward and asked.identity == reward.digest:
            raise optimised
        return Judge(source, lambda texts: Judged(None, texts), functools.partial(
            _asked_wins, asked), asked.identity, scores=False)
    if source:
        model = reward_model.load(source, raw=True)
        try:
            reward_model.check_alone(model)
        except DataError as error:
            raise DataError(f'{source}: {error}') from error
        if reward and network.params_digest(model.params) == reward.weights:
            raise optimised
        if reward and (seed := seed_of(source)) is not None and seed == seed_of(reward.source):
            print(f'note: {source} and {reward.source} began with the random weights of one seed, '
                  f'{seed}, and agree by what is left of them; a judge of another seed does not',
                  flush=True)
        return Judge(source, functools.partial(_read_by_model, model), functools.partial(
            _model_wins, model.loss), model.digest)
    if reward is None:
        raise ValueError('neither a judge nor a reward')
    if reward.compares:
        raise ConfigError(f"config.reward.judge='' with {reward.source}, whose rewards depend on "
                          'the other responses; expected a judge')
    return Judge('', functools.partial(_read_by_reward, reward), _reward_wins)


def absolute(section: Mapping[str, Any]) -> dict[str, str]:
    """'source' and 'judge' of a section `reward`, folders as absolute paths."""

    def place(source: str) -> str:
        kind = 'language-model:' if source.startswith('language-model:') else ''
        path = source.removeprefix(kind)
        return kind + os.path.abspath(path) if os.path.isdir(path) and path != GOLD else source

    return {key: place(section[key]) for key in ('source', 'judge')}


def _check_judge(source: str, key: str) -> None:
    """Checks that what looks like a judge of `qrm label` is one of those that are taken here.

    Raises:
      ConfigError: it is not.
    """
    if _OTHER_JUDGE.fullmatch(source) and not (_JUDGE.fullmatch(source) or os.path.exists(source)):
        raise ConfigError(f"config.reward.{key}={source!r}, expected 'language-model:...', "
                          "'endpoint:...' or 'function:...' without a name of its own, the path of "
                          f'a reward model, or {GOLD!r}')


def seed_of(source: str) -> int | None:
    """The seed by which the head of a run began; None of anything else."""
    return workdir.load_config(source).seed if saved.is_run(source) else None


def flat(comparisons: Sequence[Comparison]) -> tuple[list[Any], list[Any]]:
    """Prompts and completions of all responses, as rewards take them."""
    prompts, completions = [], []
    for one in comparisons:
        for response in one.responses:
            prompts.append(one.prompt if isinstance(one.prompt, str) else list(one.prompt))
            completions.append(response if isinstance(response, str) else list(response))
    return prompts, completions


def _read_gold(workload: str, texts: Sequence[Comparison]) -> Judged:
    found = [golds(workload, map(text_of, row.responses)) for row in texts]
    return Judged(np.array([[one.reward.mean() for one in row] for row in found]),
                  [[one.reward for one in row] for row in found],
                  unread=np.array([[one.unread_share for one in row] for row in found]),
                  price=np.array([[one.price for one in row] for row in found]))


def _gold_wins(own: Judged, others: Judged) -> np.ndarray:
    world = demo.population([one for side in (own, others) for row in side.known for one in row])
    first, second = own.rewards.size, others.rewards.size
    return world.win_probability(
        np.arange(first).reshape(*own.rewards.shape, 1),
        np.arange(first, first + second).reshape(len(others.rewards), 1, -1))


def _read_by_model(model: reward_model.RewardModel, texts: Sequence[Comparison]) -> Judged:
    outputs = np.stack(model.predict(model.encode(texts)[0]))
    found = model.network.head.read(outputs).distribution
    return Judged(np.asarray(found.mean, np.float64), found)


def _model_wins(loss: LossConfig, own: Judged, others: Judged) -> np.ndarray:
    return winrate.win_probabilities(loss, own.known, others.known)


def _read_by_reward(reward: Reward, texts: Sequence[Comparison]) -> Judged:
    rewards = reward(*flat(texts)).rewards.reshape(len(texts), -1)
    return Judged(rewards, None)


def _reward_wins(own: Judged, others: Judged) -> np.ndarray:
    return statistics.halved_ties(own.rewards[:, :, None] - others.rewards[:, None, :])


def _tournament(judge: judges.Judge, prompts: Sequence[Any], completions: Sequence[Any]
                ) -> list[float]:
    """Of each completion, how often it is preferred to the others of its prompt.

    Raises:
      DataError: a prompt has one completion; or see `judges.Judge`.
    """
    places, pairs = [], []
    for members in functions.grouped(prompts):
        if len(members) < 2:
            raise DataError(f'prompts[{members[0]}]: one completion, expected several, which '
                            'are compared')
        row = functions.comparison(members[0], prompts[members[0]],
                                   [completions[i] for i in members])
        for one, other in itertools.combinations(range(len(members)), 2):
            places.append((members[one], members[other]))
            pairs.append((row, row.responses[one], row.responses[other]))
    wins, count = np.zeros((2, len(completions)))
    for (one, other), first in zip(places, _asked(judge, pairs), strict=True):
        wins[one] += first
        wins[other] += 1.0 - first
        count[[one, other]] += 1
    return (wins / count).tolist()


def _asked_wins(judge: judges.Judge, own: Judged, others: Judged) -> np.ndarray:
    pairs = [(row, response, other) for row, beside in zip(own.known, others.known, strict=True)
             for response, other in itertools.product(row.responses, beside.responses)]
    return _asked(judge, pairs).reshape(len(own.known), len(own.known[0].responses), -1)


def _asked(judge: judges.Judge, pairs: Sequence[tuple[Comparison, Text, Text]]) -> np.ndarray:
    """How likely the first of two responses is preferred, the mean of both orders.

    Where a judge has no answer it is 1/2, and the number of these is printed.

    Args:
      judge: who is asked.
      pairs: n of a comparison, whose prompt it is, and two responses.

    Returns:
      [n] in [0, 1].

    Raises:
      DataError: see `judges.Judge`.
    """
    questions = [Comparison(row.id, row.prompt, order, row.group, tools=row.tools)
                 for row, one, other in pairs for order in ((one, other), (other, one))]
    found, failures = np.full(len(questions), np.nan), collections.Counter()
    for place, answer in judge(questions):
        if answer.probability is None:
            failures[answer.failure] += 1
        else:
            found[place] = answer.probability
    if failures:
        (why, _), = failures.most_common(1)
        print(f'{judge.name}: no answer to {failures.total()} of {len(questions)} questions, '
              f'which counts as undecided (mostly: {why})', flush=True)
    both = (found[0::2] + 1.0 - found[1::2]) / 2.0
    return np.where(np.isnan(both), 0.5, np.clip(both, 0.0, 1.0))


def _ask(url: httpx.URL, token: str, prompts: Sequence[Any], completions: Sequence[Any]
         ) -> list[Any]:
    """What a server answers."""
    shown = servers.shown(url)
    if not all(isinstance(one, str) for one in (*prompts, *completions)):
        raise DataError(f'{shown}: chats, expected texts, which are all that is asked this way')
    body = {'query': [prompt + completion for prompt, completion in
                      zip(prompts, completions, strict=True)],
            'prompts': list(prompts), 'labels': [None] * len(prompts)}
    try:
        with servers.client(url, timeout=_SECONDS, token=token) as client:
            return client.post(url, json=body).raise_for_status().json()['rewards']
    except httpx.HTTPStatusError as error:  # whose text has the whole address
        why, cause = f'status {error.response.status_code}', error
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        why, cause = f'{type(error).__name__}: {in_a_line(error)}', error
    raise DataError(f'{shown}: no rewards ({why}); expected a server that answers with JSON '
                    '{"rewards": [...]}') from cause


def _checked(found: Any, count: int, source: str) -> np.ndarray:
    """[count] float64."""
    try:
        values = [float(value) for value in found]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f'{source}: got {in_a_line(error)}, expected a list of numbers, one for '
                        'each completion') from error
    if len(values) != count:
        raise DataError(f'{source}: {len(values)} rewards of {count} completions')
    if wrong := [i for i, value in enumerate(values) if not math.isfinite(value)]:
        raise DataError(f'{source}: reward {values[wrong[0]]} of completion {wrong[0]}, expected a '
                        'finite number')
    return np.array(values)
