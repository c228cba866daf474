"""What policies are judged by in a study: held-out prompts, answers of the reference, and gold.

A room of `overoptimisation`.

Axes: P prompts; N candidates, K answers of a policy and J rivals to each.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qrm.data import demo, sources
from qrm.data.comparisons import Comparison, DataError, DataReport
from qrm.data.seen import Seen
from qrm.data.sources import DEMO
from qrm.models.network import Params
from qrm.policy import rollouts
from qrm.policy.batches import Plan
from qrm.policy.language_model import LanguageModel
from qrm.policy.network import PolicyNetwork
from qrm.policy.rollouts import Answers, Prompts
from qrm.policy.sampling import Sampling
from qrm.policy.scoring import Judge, Judged
from qrm.rewards import resampling
from qrm.training import saved, workdir
from qrm.training.schema import ConfigError

TOO_FEW = f'expected prompts of at least {resampling.MIN_GROUPS} questions for intervals'


class Bench(NamedTuple):
    """What all policies are judged by.

    Attributes:
      prompts: P of them.
      tokenizer: of the policies.
      sampling, seed: how they answer.
      rows: answers that grow at once.
      plan: see `rollouts.read`.
      reference: the network and its parameters.
      candidates: N answers of the reference to each prompt, as texts.
      lengths: [P, N] their tokens.
      judge: of gold rewards.
      gold: what it says of the candidates.
      rivals: what it says of J other answers of the reference, which all others are compared with.
      rival_length: [P] mean tokens of those.
    """

    prompts: Prompts
    tokenizer: Any
    sampling: Sampling
    rows: int
    seed: int
    plan: Plan
    reference: tuple[PolicyNetwork, Params]
    candidates: list[Comparison]
    lengths: np.ndarray
    judge: Judge
    gold: Judged
    rivals: Judged
    rival_length: np.ndarray

    @property
    def groups(self) -> list[str]:
        """[P] the opening question of each prompt."""
        return [one.group for one in self.prompts.comparisons]

    def wins(self, answers: Judged) -> np.ndarray:
        """[P, K] how often answers would be preferred to a rival, by gold."""
        return self.judge.wins(answers, self.rivals).mean(axis=-1)

    def answer(self, network: PolicyNetwork, params: Params) -> Answers:
        """K answers of a policy to each prompt."""
        return rollouts.answer(network, params, self.prompts.tokens, self.sampling, seed=self.seed,
                               numbers=range(len(self.prompts)), rows=self.rows)


def make(config: Any, folder: str, model: LanguageModel, prompts: Prompts, judge: Judge) -> Bench:
    """Lets the reference answer, and judges that; answers are kept in the folder of the study.

    Args:
      config: of the study.
      folder: of the study.
      model: the reference.
      prompts: from `held_out`.
      judge: of gold rewards.
    """
    settings, common = config.evaluation, config.runs.common.train
    network, params = reference = policy_of(model)
    sampling = Sampling(samples=settings.samples, max_new_tokens=settings.max_new_tokens,
                        stops=model.stops)

    def answers(name: str, count: int, seed: int) -> Answers:
        path = os.path.join(folder, f'{name}.npz')
        if not os.path.exists(path):
            found = rollouts.answer(
                network, params, prompts.tokens, dataclasses.replace(sampling, samples=count),
                seed=seed, numbers=range(len(prompts)), rows=settings.rows)
            workdir.write_arrays(path, found._asdict())
        return Answers(**workdir.read_arrays(path))

    # Of other random numbers than what answers of policies share with the first candidates.
    drawn = (answers('candidates', config.best_of_n.candidates, settings.seed),
             answers('rivals', settings.rivals, settings.seed + 1))
    candidates, rivals = (rollouts.answered(prompts, one, model.tokenizer) for one in drawn)
    plan = rollouts.plan(prompts.tokens, settings.samples, settings.max_new_tokens,
                         row_length=common.row_length, rows=common.rows)
    return Bench(prompts, model.tokenizer, sampling, settings.rows, settings.seed, plan, reference,
                 candidates, drawn[0].sizes, judge, judge.read(candidates), judge.read(rivals),
                 drawn[1].sizes.mean(axis=1))


def policy_of(model: LanguageModel) -> tuple[PolicyNetwork, Params]:
    """A language model as the network of a policy, and its parameters."""
    return PolicyNetwork(model.transformer.architecture), {'backbone': model.params}


def held_out(config: Any, model: LanguageModel, data: Any) -> Prompts:
    """The prompts that policies are judged on: none opens with a question that is learnt from.

    Of a judge that is no run it is not known what it learnt from.

    Args:
      config: of the study.
      model: the reference.
      data: the `data` section of what is learnt from.

    Raises:
      ConfigError: see `room`.
      DataError: see `sources.read`; or there are too few.
    """
    settings = config.evaluation
    longest = room(config, data, model.transformer.architecture.max_positions)
    if config.data == DEMO:
        drawn: Sequence[Comparison] = of_demo(config)
        report = DataReport(f'demo {config.workload}', 'test', read=len(drawn))
    else:
        drawn, report = _unlearnt(data, config.workload, config.gold)
    found = rollouts.prompts_of(drawn, report, model.tokenizer, longest, as_chats=data.as_chats)
    if len(found) < settings.prompts:
        raise DataError(f'{config.data}: {len(found)} different prompts are held out, expected the '
                        f'{settings.prompts} of config.evaluation.prompts')
    order = np.random.default_rng(settings.seed).permutation(len(found))
    found = found.pick(sorted(order[:settings.prompts].tolist()))
    if (questions := len({one.group for one in found.comparisons})) < resampling.MIN_GROUPS:
        raise DataError(f'{config.data}: {settings.prompts} held-out prompts of {questions} '
                        f'questions (config.evaluation.prompts), {TOO_FEW}')
    print(f'{len(found)} of these prompts are used in evaluations:\n{report.format()}', flush=True)
    return found


def of_demo(config: Any) -> list[Comparison]:
    """Those of the demo, whose test questions are no training questions."""
    settings = config.evaluation
    return demo.prompts(config.workload, 'test', settings.prompts, settings.seed)


def room(config: Any, data: Any, positions: int) -> int:
    """Tokens of the longest prompt.

    Args:
      config: of the study.
      data: the `data` section of what is learnt from.
      positions: of the policy.

    Raises:
      ConfigError: there is none.
    """
    new = config.evaluation.max_new_tokens
    longest = min(data.max_length or positions, positions)
    if new >= longest:
        raise ConfigError(f'config.evaluation.max_new_tokens={new}, expected less than the '
                          f'{longest} tokens of prompt and response')
    return longest - new


def _unlearnt(data: Any, workload: str, judge: str) -> tuple[Sequence[Comparison], DataReport]:
    """The test rows whose opening questions nothing learns from, and their report."""
    splits = sources.divide(sources.read(data, workload), data)
    comparisons, report = splits['test']
    learnt = [Seen.of('', splits[name][0]) for name in ('train', 'validation')]
    if saved.is_run(judge):
        learnt.append(workdir.read_seen(judge))
    known = np.any([one.opens(comparisons) for one in learnt], axis=0)
    if count := int(known.sum()):
        report.dropped['opening question of rows that are learnt from'] += count
    return comparisons.pick(np.flatnonzero(~known)), report
