"""Evaluations of a policy while it is trained: held-out prompts answered, watched, ranked, drawn.

    monitor.json            rows of `monitor.Row`, win probabilities of prompts, what is suspect
    figures/                the same drawn
    responses/STEP.jsonl    the answers, as `qrm score` reads them, with their rewards

The prompts are the same each time, and so are the random numbers: what changes between evaluations
is the policy.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qrm.analysis import figures as analysis_figures
from qrm.data.comparisons import Comparison, DataError, text_of
from qrm.data.rows import as_row
from qrm.data.tokens import Tokenizer
from qrm.models.network import Params
from qrm.policy import figures, monitor, rollouts, rules, scoring
from qrm.policy.batches import Plan
from qrm.policy.monitor import Row
from qrm.policy.network import PolicyNetwork
from qrm.policy.rollouts import Answers, Prompts
from qrm.policy.rules import Rules
from qrm.policy.sampling import Sampling
from qrm.policy.scoring import Judge, Judged, Reward, Scores
from qrm.rewards import distributions
from qrm.serving.score import write_rows
from qrm.training import workdir
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.workdir import WorkdirError

FILE = 'monitor.json'
CRITERION = 'lost'  # probability of not being preferred to the reference
_DRAWN_EVERY = 60  # seconds: to draw takes as long as a small policy takes to answer
TOLD = ('proxy', 'gold', 'win', 'kl', 'length')


class Bench(NamedTuple):
    """What evaluations are made with.

    Attributes:
      prompts: that are held out.
      reward, judge: see `scoring`.
      gold: comparisons -> gold rewards of the responses; None: unknown.
      tokenizer: of the policy.
      sampling, rows: how it answers.
      plan, chunk: see `rollouts.read`.
      seeds: of the answers, and of those of the reference that they are judged against.
      reference: the network and its parameters.
      rules: by which a run is suspect.
      analysis: the section of a config, for intervals.
    """

    prompts: Prompts
    reward: Reward
    judge: Judge
    gold: Callable[[Sequence[Comparison]], Judged] | None
    tokenizer: Tokenizer
    sampling: Sampling
    rows: int
    plan: Plan
    chunk: int
    seeds: tuple[int, int]
    reference: tuple[PolicyNetwork, Params]
    rules: Rules
    analysis: Any


class Watch:
    """The evaluations of a run, as they are in its folder.

    Args:
      folder: the workdir.
      bench: what they are made with.

    Raises:
      WorkdirError: what the folder has of them is of another version.
    """

    def __init__(self, folder: str, bench: Bench):
        self._folder, self._bench = folder, bench
        self._references: tuple[list[Comparison], Judged] | None = None
        self._drawn = -math.inf
        self.rows: list[Row] = []
        self._wins: dict[int, list[float]] = {}
        path = os.path.join(folder, FILE)
        if os.path.exists(path):
            try:
                found = workdir.read_json(path)
                self.rows = [Row(**row) for row in found['rows']]
                self._wins = {int(step): wins for step, wins in found['wins'].items()}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise WorkdirError(f'{path}: not what this version writes ({error!r})') from error

    def evaluate(self, network: PolicyNetwork, params: Params, step: int) -> dict[str, float]:
        """Answers the held-out prompts; what is known of later steps is forgotten.

        Args:
          network, params: the policy.
          step: after how many steps.

        Returns:
          The numbers of the row, those that are known, and `CRITERION`.

        Raises:
          NonFiniteLoss: the policy gives numbers that are not finite.
          DataError: see `scoring.Reward`; or too few prompts.
        """
        bench = self._bench
        answers = self._answers(network, params, bench.seeds[0])
        found = rollouts.read(network, params, rollouts.dialogues(bench.prompts, answers),
                              bench.plan, answers.tokens.shape[-1], chunk=bench.chunk)
        texts = rollouts.answered(bench.prompts, answers, bench.tokenizer)
        wins = self._judged(texts)
        scores = bench.reward.beside(texts, self._answers_of_reference()[0])
        row = _row(bench, step, answers, texts, found.log_probs, self._reference_log_probs(answers),
                   scores, wins, entropies=found.entropy)
        self._add(row, wins)
        self.write(texts, answers, scores, step)
        for one in rules.suspicions(self.rows, bench.rules):
            print(f'suspect at step {step}: {one.rule}: {one.line}', flush=True)
        numbers = {name: float(value) for name, value in row._asdict().items()
                   if value is not None and name != 'step'}
        return numbers | {CRITERION: monitor.lost(wins.mean(axis=1))}

    def best_of(self, counts: Sequence[int]) -> list[Row]:
        """Rows of the best of n answers of the reference by the reward; nothing is trained.

        Args:
          counts: n of each row, ascending, at most the samples.

        Raises:
          DataError: see `evaluate`.
        """
        bench = self._bench
        answers = self._answers(*bench.reference, bench.seeds[0])
        texts = rollouts.answered(bench.prompts, answers, bench.tokenizer)
        scores = bench.reward(*scoring.flat(texts)).reshape(*answers.sizes.shape)
        log_probs = self._reference_log_probs(answers)
        self.rows, self._wins = [], {}
        for n in counts:
            best = scores.rewards[:, :n].argmax(axis=1)
            at = np.arange(len(best)), best

            def chosen(x: np.ndarray, at: tuple[np.ndarray, ...] = at) -> np.ndarray:
                return x[at][:, None]

            own = Answers(*map(chosen, answers))
            picked = [dataclasses.replace(one, responses=(one.responses[k],))
                      for one, k in zip(texts, best, strict=True)]
            wins = self._judged(picked)
            self._add(_row(bench, n, own, picked, chosen(log_probs), chosen(log_probs),
                           scores.pick((*at, None)), wins, best_of=n), wins)
        self.write(texts, answers, scores, 0)
        return self.rows

    def reasons(self) -> str:
        """Why the run should end, in a line; '': it should not."""
        return '; '.join(f'{one.rule}: {one.line}' for one in
                         rules.reasons_to_stop(self.rows, self._bench.rules))

    def best(self) -> monitor.Best | None:
        """The step to keep; None: there is none after the first row."""
        wins = {step: np.array(values) for step, values in self._wins.items() if step}
        if not wins:
            return None
        analysis = self._bench.analysis
        return monitor.best_checkpoint(
            wins, [one.group for one in self._bench.prompts.comparisons],
            replicates=analysis.bootstrap, level=analysis.level, seed=analysis.seed)

    def verdict(self) -> str:
        """The step to keep, in a line; '': there is none after the first row."""
        best = self.best()
        if best is None:
            return ''
        return (f'best step {best.step}: preferred to the reference with probability '
                f'{best.win["value"]:.3f}; not told apart from it: '
                f'{", ".join(map(str, best.ties)) or "none"}')

    def forget(self, done: int) -> None:
        """Forgets evaluations of later steps, which come again; of a run without any steps, all."""
        self.rows = [row for row in self.rows if row.step <= done]
        self._wins = {step: wins for step, wins in self._wins.items() if step <= done}

    def write(self, texts: Sequence[Comparison], answers: Answers, scores: Scores, step: int
              ) -> None:
        """Writes all files; figures are drawn now and then."""
        bench = self._bench
        best = self.best()
        workdir.write_json(os.path.join(self._folder, FILE), {
            'reward': bench.reward.source, 'judge': bench.judge.source or bench.reward.source,
            'rows': [row._asdict() for row in self.rows],
            'wins': {str(step): wins for step, wins in self._wins.items()},
            'suspicions': [one._asdict() for one in rules.suspicions(self.rows, bench.rules)],
            'best': None if best is None else best._asdict()})
        workdir.make(os.path.join(self._folder, 'responses'))
        rewards = scores.rewards.reshape(answers.sizes.shape)
        write_rows(os.path.join(self._folder, 'responses', f'{step}.jsonl'), [
            as_row(one) | {'rewards': own.tolist()}
            for one, own in zip(texts, rewards, strict=True)])
        if time.monotonic() - self._drawn > _DRAWN_EVERY:
            self.draw()

    def draw(self) -> None:
        """Draws the figures, if there is something to draw."""
        if self.rows:
            analysis_figures.save(self._folder, {
                'monitor': figures.draw_monitor(self.rows, self._bench.rules),
                'overoptimisation': figures.draw_overoptimisation({'': self.rows}, root=True)})
            self._drawn = time.monotonic()

    def _answers(self, network: PolicyNetwork, params: Params, seed: int) -> Answers:
        bench = self._bench
        return rollouts.answer(network, params, bench.prompts.tokens, bench.sampling, seed=seed,
                               numbers=range(len(bench.prompts)), rows=bench.rows)

    def _reference_log_probs(self, answers: Answers) -> np.ndarray:
        bench = self._bench
        return rollouts.read(*bench.reference, rollouts.dialogues(bench.prompts, answers),
                             bench.plan, answers.tokens.shape[-1], chunk=bench.chunk).log_probs

    def _judged(self, texts: Sequence[Comparison]) -> np.ndarray:
        """[C, K] win probabilities against the reference's answers."""
        judge = self._bench.judge
        return judge.wins(judge.read(texts), self._answers_of_reference()[1]).mean(axis=-1)

    def _answers_of_reference(self) -> tuple[list[Comparison], Judged]:
        """What others are judged against, as texts and as the judge has read them; drawn once."""
        bench = self._bench
        if self._references is None:
            answers = self._answers(*bench.reference, bench.seeds[1])
            texts = rollouts.answered(bench.prompts, answers, bench.tokenizer)
            self._references = texts, bench.judge.read(texts)
        return self._references

    def _add(self, row: Row, wins: np.ndarray) -> None:
        self.forget(row.step - 1)
        self.rows.append(row)
        self._wins[row.step] = wins.mean(axis=1).tolist()


def _row(bench: Bench, step: int, answers: Answers, texts: Sequence[Comparison],
         log_probs: np.ndarray, reference: np.ndarray, scores: Scores, wins: np.ndarray,
         *, entropies: np.ndarray | None = None, best_of: int = 1) -> Row:
    shape = answers.sizes.shape
    plain = [[text_of(response) for response in one.responses] for one in texts]
    gold = Judged(None, None) if bench.gold is None else bench.gold(texts)
    # Two atoms that have this mean and standard deviation.
    atoms = np.stack([scores.rewards - scores.stds, scores.rewards + scores.stds], axis=-1)
    proxy = distributions.uniform_atoms(atoms)
    try:
        return monitor.measure(monitor.Evaluation(
            step, [one.group for one in texts], plain, answers.tokens, answers.mask,
            np.ones(shape, bool), answers.truncated, log_probs, reference, proxy,
            entropies=entropies, gold=gold.rewards, unread=gold.unread,
            disagreements=scores.disagreements, wins=wins if bench.judge.source else None,
            best_of=best_of))
    except ValueError as error:
        if 'not finite' in str(error):
            raise NonFiniteLoss(f'held-out {error}') from error
        raise DataError(f'held-out prompts: {error}') from error
