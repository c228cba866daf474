"""Ways of optimising a policy beside each other: curves over seeds, answers, and their table.

A room of `overoptimisation`, which trains and measures what is tabulated here.

Axes: P prompts, r bootstrap replicates.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qrm.analysis import tables
from qrm.data.comparisons import DataError
from qrm.data.sources import DEMO
from qrm.policy.monitor import Row
from qrm.policy.scoring import GOLD
from qrm.rewards import resampling
from qrm.studies import paths
from qrm.studies.bench import Bench
from qrm.studies.paths import Curves, Path
from qrm.training import schema

SCALAR, ENSEMBLE = 'scalar', 'ensemble'
BEST_OF_N, DPO = 'best_of_n', 'dpo'
YES, NO, OPEN = 'yes', 'no', 'cannot tell'
UNSEEN = 'cannot tell, no over-optimisation seen'
UNLIKE = 'not compared, one KL is an estimate and the other a bound'
CONTROLS = ('constant', 'shuffled', 'ensemble')


class Arm(NamedTuple):
    """A way of optimising.

    Attributes:
      algorithm: 'best_of_n', 'dpo', 'ppo' or 'grpo'.
      proxy: name in `proxies.names`; '' of DPO.
      rule: name of the rule; '' of DPO.
      control: 'none', or 'shuffled'.
    """

    algorithm: str
    proxy: str = ''
    rule: str = ''
    control: str = 'none'

    def __str__(self) -> str:
        shown = ' '.join(part for part in (self.algorithm.replace('_', ' '), self.proxy, self.rule)
                         if part)
        return shown + (f' ({self.control})' if self.control != 'none' else '')

    @property
    def risky(self) -> bool:
        """Whether the rule looks at a spread."""
        return self.rule not in ('', 'mean')


# (arm, seed) -> what it did.
Paths = Mapping[tuple[Arm, int], Path]


class Statistics:
    """Means over seeds, with intervals over opening questions and seeds.

    Args:
      found: of all arms and seeds.
      groups: [P] opening question of each prompt.
      gold_std: the unit of gold rewards.
      settings: the section `analysis` of a config.

    Raises:
      DataError: seeds of an arm were not measured at the same steps.
    """

    def __init__(self, found: Paths, groups: Sequence[str], gold_std: float, settings: Any):
        self.seeds = list(dict.fromkeys(seed for _, seed in found))
        self.arms = list(dict.fromkeys(arm for arm, _ in found))
        clusters = np.unique(list(groups), return_inverse=True)[1]
        self._found, self._std, self._level = found, gold_std, settings.level
        self._half = clusters % 2 == 0
        self._weights = resampling.cluster_bootstrap_weights(
            clusters, settings.bootstrap, settings.seed)
        self._picks = resampling.picks_of_seeds(
            len(self.seeds), settings.bootstrap, settings.seed)
        self._curves = {key: paths.curves(path, self._weights) for key, path in found.items()}
        for arm, seed in found:
            own, first = found[arm, seed].steps, found[arm, self.seeds[0]].steps
            if not np.array_equal(own, first):
                raise DataError(f'{arm}: measured at steps {own.tolist()} with seed {seed}, '
                                f'expected those of seed {self.seeds[0]}, {first.tolist()}; '
                                'without paths.json in its folder it is measured again')

    def cell(self, of_seed: Callable[[int], np.ndarray], tests: int = 1) -> dict[str, Any]:
        """A mean over seeds with its interval, of several tests that of all together.

        Args:
          of_seed: seed -> [1 + r].
          tests: how many.
        """
        return resampling.over_seeds([of_seed(seed) for seed in self.seeds], self._picks,
                                     1.0 - (1.0 - self._level) / tests)

    def curve(self, arm: Arm, seed: int) -> Curves:
        """A path in means over prompts."""
        return self._curves[arm, seed]

    def gain(self, a: Arm, b: Arm, *, at: str = 'kl', tests: int = 1) -> dict[str, Any]:
        """Gold of a less that of b: 'kl', 'proxy' at the end of what both reach, 'along' it."""

        def of_seed(seed: int) -> np.ndarray:
            one, other = self.curve(a, seed), self.curve(b, seed)
            return (paths.gain_along(one, other) if at == 'along' else
                    paths.gain_at_end(one, other, at)) / self._std

        return self.cell(of_seed, tests)

    def fall(self, arm: Arm) -> dict[str, Any]:
        """Of the gold reward from its peak to the last evaluation."""
        return self.cell(lambda seed: paths.fall(
            self._found[arm, seed], self._weights, self._half) / self._std)

    def fall_without_price(self, arm: Arm) -> dict[str, Any] | None:
        """Of what the text that counts is worth, from the peak of gold; None: all counts."""

        def of_seed(seed: int) -> np.ndarray:
            path = self._found[arm, seed]
            return paths.fall(path, self._weights, self._half,
                              values=path.gold + path.price) / self._std

        return None if self.curve(arm, self.seeds[0]).price is None else self.cell(of_seed)

    def win_controlled(self, arm: Arm) -> dict[str, Any]:
        """How often its last responses would win at equal length, as far as that is defined."""
        found = {seed: paths.win_controlled(self._found[arm, seed], self._weights)
                 for seed in self.seeds}
        if not any(np.isnan(one).any() for one in found.values()):
            return self.cell(found.__getitem__)
        value = float(np.mean([one[0] for one in found.values()]))
        return {'value': None if np.isnan(value) else value, 'low': None, 'high': None}

    def row(self, arm: Arm) -> dict[str, Any]:
        """All of an arm."""
        std = self._std

        def last(name: str, arm: Arm = arm) -> Callable[[int], np.ndarray]:
            return lambda seed: getattr(self.curve(arm, seed), name)[:, -1]

        def gained(seed: int) -> np.ndarray:
            gold = self.curve(arm, seed).gold
            return (gold[:, -1] - gold[:, 0]) / std

        row = arm._asdict() | {
            'name': str(arm), 'kl': self.cell(last('kl')), 'gold': self.cell(gained),
            'peak': self.cell(lambda seed: paths.peak(self.curve(arm, seed))),
            'fall': self.fall(arm), 'win': self.cell(last('win')),
            'win_controlled': self.win_controlled(arm), 'length': self.cell(last('length')),
            'unread': (None if self.curve(arm, self.seeds[0]).unread is None
                       else self.cell(last('unread'))),
            'fall_without_price': self.fall_without_price(arm)}
        scalar = Arm(arm.algorithm, SCALAR, 'mean')
        if scalar in self.arms and arm != scalar:
            row['over_scalar'] = self.gain(arm, scalar, at='along')
        return row

    def rows(self, arm: Arm) -> list[Row]:
        """An arm as rows of a monitor, means over seeds, for figures; other numbers are unknown.

        The proxy is what was gained since the reference, in its standard deviations there.
        """
        found = []
        for i, step in enumerate(self._found[arm, self.seeds[0]].steps):
            known: dict[str, Any] = {'step': int(step), 'proxy_spread': 1.0,
                                     'gold_spread': self._std}
            for name in ('kl', 'gold', 'proxy'):
                values = [getattr(self.curve(arm, seed), name)[:, i] for seed in self.seeds]
                if name == 'proxy':
                    values = [
                        (own - self.curve(arm, seed).proxy[0, 0]) / self._found[arm, seed].unit
                        for own, seed in zip(values, self.seeds, strict=True)]
                table = np.array(values)
                drawn = np.take_along_axis(table[:, 1:].T, self._picks, axis=1).mean(axis=1)
                known |= {name: float(table[:, 0].mean()), f'{name}_error': float(drawn.std())}
            found.append(Row(**dict.fromkeys(Row._fields) | known))
        return found


def summarise(found: Paths, bench: Bench, config: Any) -> dict[str, Any]:
    """All numbers with their intervals, ready for JSON.

    Args:
      found: of all arms and seeds.
      bench: what they were judged by.
      config: of the study.

    Returns:
      'rows' of arms, answers to the questions 'delay', 'quantile' and 'dpo', the 'verdict' in
      lines, 'reference' and 'settings'.
    """
    gold = bench.gold.rewards
    std = float(gold.std())
    statistics = Statistics(found, bench.groups, std, config.analysis)
    result = {
        'rows': [statistics.row(arm) for arm in statistics.arms],
        'delay': delays(statistics, config.yes),
        'quantile': [row for name in config.proxies.names if name not in (SCALAR, ENSEMBLE)
                     for row in over_scalar(statistics, config.yes, name)],
        'dpo': over_scalar(statistics, config.yes, ''),
        'reference': {'gold': float(gold.mean()), 'gold_std': std, 'prompts': len(gold),
                      'candidates': gold.shape[1], 'length': float(bench.rival_length.mean()),
                      'unread': (None if bench.gold.unread is None
                                 else float(bench.gold.unread.mean()))},
        'settings': dict(schema.flatten(config, {})),
    }
    return result | {'verdict': verdict(result)}


def delays(statistics: Statistics, bounds: Any) -> list[dict[str, Any]]:
    """Whether each risk rule delays over-optimisation; the first question.

    Gold reward is compared at the farthest KL that the rule and a control both reach, with
    intervals of all rules together. A rule of a proxy whose mean was not optimised is a control
    alone, and one that was not compared with all `CONTROLS` gets no yes.

    Args:
      statistics: of all arms.
      bounds: the section `yes`.
    """
    arms = statistics.arms
    judged = [arm for arm in arms if arm.risky and arm.control == 'none'
              and arm._replace(rule='mean') in arms]
    rows = []
    for arm in judged:
        mean, shuffled = arm._replace(rule='mean'), arm._replace(control='shuffled')
        controls = {'constant': mean} | ({'shuffled': shuffled} if shuffled in arms else {})
        others = [other for other in arms if other.risky and other.control == 'none'
                  and (other.algorithm, other.proxy) == (arm.algorithm, ENSEMBLE)]
        if arm.proxy != ENSEMBLE and others:
            controls['ensemble'] = others[0]
        against = {name: statistics.gain(arm, other, tests=len(judged))
                   for name, other in controls.items()}
        missing = [name for name in CONTROLS
                   if name not in against and (name, arm.proxy) != ('ensemble', ENSEMBLE)]
        fall = statistics.fall(mean)

        def later(seed: int, arm: Arm = arm, mean: Arm = mean) -> np.ndarray:
            return paths.peak(statistics.curve(arm, seed)) - paths.peak(
                statistics.curve(mean, seed))

        rows.append(arm._asdict() | {
            'name': str(arm), 'fall_of_mean': fall, 'against': against,
            'equal_proxy': statistics.gain(arm, mean, at='proxy', tests=len(judged)),
            'later': statistics.cell(later, len(judged)),
            'answer': (_controlled(answer(against.values(), bounds), missing)
                       if fall['low'] > bounds.fall else UNSEEN)})
    return rows


def _controlled(found: str, missing: Sequence[str]) -> str:
    """An answer that is no yes as long as controls are missing."""
    if found == YES and missing:
        return f'{OPEN}, as it has no control {" and ".join(missing)}'
    return found


def over_scalar(statistics: Statistics, bounds: Any, proxy: str) -> list[dict[str, Any]]:
    """Whether the mean of a proxy gives better policies than the scalar's at equal KL.

    The second and the third question: a row for each algorithm that both were optimised by, of DPO
    for each that the scalar was. Gold rewards are compared on average over the KLs that both reach.
    What best of n has for a KL is a bound, and DPO an estimate: that row answers nothing.

    Args:
      statistics: of all arms.
      bounds: the section `yes`.
      proxy: name of the proxy; '': DPO.
    """
    rows = []
    for scalar in statistics.arms:
        if (scalar.proxy, scalar.rule) != (SCALAR, 'mean'):
            continue
        arm = scalar._replace(proxy=proxy) if proxy else Arm(DPO)
        if arm in statistics.arms:
            gain = statistics.gain(arm, scalar, at='along')
            alike = (arm.algorithm == BEST_OF_N) == (scalar.algorithm == BEST_OF_N)
            rows.append({'name': str(arm), 'proxy': proxy, 'algorithm': scalar.algorithm,
                         'gain': gain, 'answer': answer([gain], bounds) if alike else UNLIKE})
    return rows


def answer(cells: Any, bounds: Any) -> str:
    """What differences in gold reward show: all of them for a yes, one is enough for a no.

    Args:
      cells: with 'low' and 'high'.
      bounds: the section `yes`.
    """
    cells = list(cells)
    if all(cell['low'] > bounds.gain for cell in cells):
        return YES
    return NO if any(cell['high'] < bounds.matters for cell in cells) else OPEN


def any_of(answers: Sequence[str]) -> str:
    """The answer to whether any does: one yes, or all no; of nothing it cannot be told."""
    if YES in answers:
        return YES
    return NO if answers and set(answers) == {NO} else OPEN


def all_of(answers: Sequence[str]) -> str:
    """The answer to whether all do: all yes, or all no; of nothing it cannot be told."""
    return answers[0] if len(set(answers)) == 1 and answers[0] in (YES, NO) else OPEN


def verdict(result: Mapping[str, Any]) -> list[str]:
    """The answers to the questions that the config states, in lines with their numbers."""
    lines = ['1. Does any risk rule delay over-optimisation, against all controls? '
             f'{any_of([row["answer"] for row in result["delay"]])}.']
    for row in result['delay']:
        gains = ', '.join(f'{name} {tables.enclosed(cell, sign="+")}'
                          for name, cell in row['against'].items())
        lines.append(
            f'   {row["name"]}: {row["answer"]}. Gold at equal KL over {gains}; at equal proxy '
            f'over constant {tables.enclosed(row["equal_proxy"], sign="+")}; its peak is '
            f'{tables.enclosed(row["later"], sign="+")} nats later; fall of the mean '
            f'{tables.enclosed(row["fall_of_mean"], sign="+")}.')
    of_proxies: dict[str, list[Any]] = {}
    for row in result['quantile']:
        of_proxies.setdefault(row['proxy'], []).append(row)
    lines += _compared('2. Does the model {proxy} give better policies than the scalar at '
                       'equal KL, by {by}?', of_proxies)
    lines += _compared('3. Does DPO on the same pairs give better policies than the scalar at '
                       'equal KL, by {by}?', {'': result['dpo']})
    return lines


def _compared(question: str, of_proxies: Mapping[str, Sequence[Any]]) -> list[str]:
    lines = []
    for name, rows in of_proxies.items():
        asked_of = [row for row in rows if row['answer'] != UNLIKE]
        by = [row['algorithm'].replace('_', ' ') for row in asked_of]
        asked = question.format(proxy=name, by=f'each of {", ".join(by)}' if by else 'any')
        lines.append(f'{asked} {all_of([row["answer"] for row in asked_of])}.')
        lines += [f'   {row["name"]}, the scalar by {row["algorithm"].replace("_", " ")}: '
                  f'{row["answer"]}. Gold {tables.enclosed(row["gain"], sign="+")}.'
                  for row in rows]
    return lines


def format_result(result: Mapping[str, Any]) -> str:
    """The table of all arms and the verdict as Markdown."""
    settings, reference = result['settings'], result['reference']
    lines = [['policy', 'KL at the end', 'gold gained there', 'KL of the peak', 'fall from it',
              'over the scalar at equal KL']]
    known = settings['gold'] == GOLD
    beside = [['policy', 'tokens', 'preferred to the reference', 'the same at equal length',
               *(['characters unread', 'fall of what counts'] if known else [])]]
    for row in result['rows']:
        other = row.get('over_scalar')
        lines.append([row['name'], tables.enclosed(row['kl']),
                      tables.enclosed(row['gold'], sign='+'), tables.enclosed(row['peak']),
                      tables.enclosed(row['fall'], sign='+'),
                      '-' if other is None else tables.enclosed(other, sign='+')])
        beside.append([row['name'], *(
            tables.enclosed(row[name]) for name in (
                'length', 'win', 'win_controlled', *(['unread'] if known else []))), *(
            [tables.enclosed(row['fall_without_price'], sign='+')] if known else [])])
    count = len(settings['seeds'])
    learnt = f'{settings["pairs"]} pairs' if settings['data'] == DEMO else settings['data']
    return '\n'.join([
        '# Over-optimisation ' + ('where the truth is known' if known else
                                  'as another reward model sees it') + '\n',
        ('' if known else f'Gold rewards are those of {settings["gold"]}, which is a reward model, '
         'no truth.\n'),
        f'{count} seed{"s" if count > 1 else ""}, {learnt}; {reference["prompts"]} prompts, '
        f'{settings["evaluation.samples"]} responses of each policy, {reference["candidates"]} '
        f'candidates of the reference. Means over seeds with {settings["analysis.level"]:.0%} '
        'intervals of a bootstrap over opening questions and seeds. KL in nats a response, of best '
        'of n its upper bound; gold reward in standard deviations of the responses of the '
        f'reference ({reference["gold_std"]:.3f}), whose mean is {reference["gold"]:.3f}.\n',
        tables.markdown(lines),
        '\n## Beside the reference, at the end\n',
        f'Compared with {settings["evaluation.rivals"]} other responses of the reference to each '
        f'prompt, of {reference["length"]:.1f} tokens: how often a response is preferred to one of '
        'them by gold, and how often it would be if it were as long, by a logistic regression on '
        'the difference in length. That has no interval where in a resample all are longer, or all '
        'shorter, and no value where all are.' + (
            f' Unread is the share of characters in no sentence that the gold reward knows, '
            f'{reference["unread"]:.3f} of the candidates. These, and sentences that are repeated '
            'or too many, take a price off gold; the last column is how far what counts falls '
            'without it, from the same peak.' if known else '') + '\n',
        tables.markdown(beside),
        '\n## By the bounds that the config states\n',
        f'Yes: intervals above {settings["yes.gain"]:g}; no: else, one below '
        f'{settings["yes.matters"]:g}. Those of question 1 hold for all of its rules together.\n',
        *(f'- {line}' if line[0] != ' ' else f'  - {line.strip()}' for line in result['verdict']),
    ]) + '\n'
