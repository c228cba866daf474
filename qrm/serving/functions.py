"""A reward model as a function, as engines of reinforcement learning call one.

    reward = qrm.reward('results/run', rule='cvar:0.2')
    rewards = reward(prompts=['Why?'], completions=[' Because.'])

TRL, Tunix, EasyDeL and MaxText take it as it is: they call it with prompts and completions, texts
or chats, and with whatever else they know, and want a number for each completion. NeMo-RL takes it
in an environment (`docs/serving.md`).
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qrm.data.comparisons import Comparison, DataError
from qrm.data.rows import parse_row
from qrm.rewards import pairwise, selection
from qrm.rewards.normalisation import Rewards
from qrm.rewards.selection import Rule
from qrm.training import reward_model
from qrm.training.reward_model import RewardModel


class RewardFunction:
    """Rewards of completions by a rule on the distributions that a model predicts.

    Completions of equal prompts share them, so that a group costs little more than its own tokens.
    A reward does not depend on what else is in the call; of a pairwise model it depends on the
    other completions of its prompt, of which there must be some.

    Attributes:
      model: the reward model; rewards are normalised if `model.normalisation` says so.
      rule: any that the model can be scored by.
      aggregate: of a pairwise model, one of `pairwise.AGGREGATES`; else ''.
      __name__: by which engines log it.

    Raises:
      ValueError: a rule that the model cannot be scored by, see `selection.check_alone`; a rule
        other than 'mean' or an unknown aggregate of a pairwise model, or an aggregate of any other.
    """

    def __init__(self, model: RewardModel, rule: Rule, name: str = '', aggregate: str = ''):
        selection.check_alone(rule, model.network.head.members, model.scale)
        compares = model.network.head.pairwise
        if compares and rule.kind != 'mean':
            raise ValueError(f"rule {rule.name!r} of a pairwise model, expected 'mean'")
        if aggregate not in (('', *pairwise.AGGREGATES) if compares else ('',)):
            raise ValueError(f'aggregate {aggregate!r}, expected ' + (
                f'one of {pairwise.AGGREGATES}' if compares else 'none: the model scores each '
                'response alone'))
        self.model, self.rule = model, rule
        self.aggregate = (aggregate or pairwise.AGGREGATES[0]) if compares else ''
        self.__name__ = name or 'qrm_' + re.sub(r'\W', '_', self.aggregate or rule.name)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *unused: Any,
        log_extra: Callable[[str, list[Any]], Any] | None = None,
        log_metric: Callable[[str, float], Any] | None = None,
        draw: int = 0,
        **columns: Any,
    ) -> list[float]:
        """Rewards of completions.

        Args:
          prompts: n texts or chats, that the completions continue.
          completions: n texts, or chats of what is said in answer.
          unused, columns: what engines pass on and a reward model does not read.
          log_extra: TRL's, called with a name and a value for each completion: the standard
            deviation and the outer quantiles of the distribution, if the model has one, and of an
            ensemble the disagreement, the standard deviation between its members.
          log_metric: TRL's, called with a name and the mean standard deviation.
          draw: number of the draw, for the rule 'sample'; the same texts get another reward in
            another one.

        Returns:
          n numbers.

        Raises:
          DataError: not as many completions as prompts, something that is neither text nor chat,
            or of a pairwise model one completion of a prompt.
          NonFiniteLoss: a reward is not finite.
        """
        if len(prompts) != len(completions):
            raise DataError(f'{len(prompts)} prompts and {len(completions)} completions')
        if not len(prompts):
            return []
        groups = grouped(prompts)
        comparisons = [comparison(members[0], prompts[members[0]],
                                   [completions[i] for i in members]) for members in groups]
        order = np.argsort([i for members in groups for i in members])
        if self.aggregate:
            wins, _ = self.model.win_probabilities(comparisons)
            return np.concatenate([pairwise.aggregate(one, self.aggregate).scores
                                   for one in wins])[order].tolist()
        encoded, _ = self.model.encode(comparisons)
        found = self.model.read(jnp.asarray(np.concatenate(self.model.predict(encoded))[order]))
        if log_extra and self.model.network.head.members > 1:
            log_extra(f'{self.__name__}_disagreement', np.std(
                np.asarray(found.members.mean, np.float64), axis=-1).tolist())
        if (spread := np.asarray(found.distribution.std)).any():
            self._log(found, spread, log_extra, log_metric)
        texts = None
        if self.rule.kind == 'sample':
            texts = np.stack([selection.text_digest(np.concatenate([one.prompt, response]))
                              for one in encoded for response in one.responses])[order]
        rewards = selection.reward(self.rule, found, self.model.scale, texts, draw)
        return np.asarray(rewards, np.float64).tolist()

    def _log(self, found: Rewards, spread: np.ndarray, log_extra: Callable[..., Any] | None,
             log_metric: Callable[..., Any] | None) -> None:
        if log_metric:
            log_metric(f'{self.__name__}_std', float(spread.mean(dtype=np.float64)))
        if log_extra:
            quantiles = np.sort(found.quantiles, axis=-1)
            low, high = self.model.taus[[0, -1]]
            log_extra(f'{self.__name__}_std', spread.tolist())
            log_extra(f'{self.__name__}_q{low:.2f}', quantiles[:, 0].tolist())
            log_extra(f'{self.__name__}_q{high:.2f}', quantiles[:, -1].tolist())


def reward(path: str, rule: str = 'mean', *, name: str = '', aggregate: str = '',
           **options: Any) -> RewardFunction:
    """A reward model as a function for engines of reinforcement learning.

    Args:
      path: workdir of a run, or another reward model as `reward_model.load` takes it.
      rule: what of its distribution is the reward: 'mean', 'quantile:tau', 'cvar:alpha',
        'mean-std:k' of a run that is normalised, 'disagreement:k' of an ensemble, 'sample:seed'.
      name: by which engines log it; '': by the rule, or by the aggregate.
      aggregate: of a pairwise model, how win probabilities among the completions of a prompt become
        rewards: 'tournament', their mean, or 'bradley-terry'; '': the former.
      options: see `reward_model.load`.

    Raises:
      ValueError: a rule that is none, or see `RewardFunction`.
      DataError, WorkdirError: see `reward_model.load`.
    """
    parsed = selection.parse_rule(rule)
    return RewardFunction(reward_model.load(path, **options), parsed, name, aggregate)


def grouped(prompts: Sequence[Any]) -> list[list[int]]:
    """Indices of equal prompts, texts or chats, in the order in which each comes first."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(json.dumps(_plain(prompt), sort_keys=True, default=repr), []).append(i)
    return list(groups.values())


def comparison(number: int, prompt: Any, completions: Sequence[Any]) -> Comparison:
    """Completions of a prompt, in which nothing is taken for anything else.

    Args:
      number: of the prompt, as errors name it.
      prompt: a text or a chat.
      completions: texts, or chats of what is said in answer.

    Raises:
      DataError: something that is neither text nor chat.
    """
    return parse_row({'prompt': _plain(prompt), 'responses': list(map(_plain, completions))},
                     f'prompts[{number}]', literal=True)


def _plain(value: Any) -> Any:
    """Texts and chats as they come out of arrays."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
