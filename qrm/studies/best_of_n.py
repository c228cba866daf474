"""Best of n against a reward that is known: what rules gain, what it costs, and what it is owed to.

The setting of a synthetic gold reward (Gao et al. 2022, Scaling laws for reward model
overoptimization), in the worlds of `worlds`. A response is x in R^8. An annotator z gives it
the world's reward less what x lies too far out,

    r(x, z) = mu(x) + s(x) h(z) - fall max(|x|^2 / 8 - start, 0).

Gold reward: the mean over annotators. Tail utility: the mean over the least favourable tenth of
them, who are the same for every response. Proxies learn from comparisons of x ~ N(0, I), where
|x|^2 / 8 has mean 1 and the last term is rare. The base policy draws most candidates like this and
a share of them from a wider normal distribution, further out than what was compared. There proxies
extrapolate and the gold reward falls: choosing among many candidates finds those responses. This
is over-optimisation by design (extremal Goodhart); how soon it sets in, and how deep rewards fall,
depends on the world, and numbers from here are no forecast for language models.

A gain of a rule that looks at the spread can have other causes than what the spread knows. The
controls have the same proxy and the same candidates:

    constant   the average deviations from the mean for every response: the choice of the mean
    shuffled   the deviations of another response to the prompt
    matched    the deviations of a response of nearly the same mean, to whatever prompt: keeps a
               spread that is a function of the mean, as of rewards that saturate
    ensemble   a proxy of its own: networks that differ in seed only, whose disagreement is
               uncertainty about the reward, while quantiles are to show how annotators differ

Axes: S repetitions (labels, parameters and candidates anew), P prompts, N candidates for each, s
sizes n, R responses.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from scipy.special import ndtri

from qrm.analysis import tables
from qrm.rewards import selection
from qrm.rewards.distributions import Atoms
from qrm.rewards.heads import HeadConfig
from qrm.rewards.losses import LossConfig
from qrm.rewards.selection import Rule
from qrm.studies import figures, mlp, worlds
from qrm.studies.mlp import Model, Training
from qrm.studies.worlds import World
from qrm.training import schema, workdir
from qrm.training.schema import (
    AT_LEAST_ONE,
    LEVEL,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    ConfigError,
    Each,
    Key,
    Range,
    Table,
)

UTILITIES = {'gold': 'gold reward', 'tail': 'tail utility'}
CONTROLS = ('none', 'constant', 'shuffled', 'matched')
ORACLE = 'truth'  # in place of a proxy: the choice is made by the utility itself

_TAIL = 0.1  # share of the annotators whose mean is the tail utility
_BLOCK = 8  # neighbours in the order of the means, of matched shuffling
_RANKED = 256  # candidates of a prompt over which rank correlations are taken

KEYS: Table = {
    'seed': Key(0, NOT_NEGATIVE, 'of the first repetition; the others have the next ones'),
    'repetitions': Key(8, Range(2), 'of everything: labels, parameters and candidates'),

    # --- What is true ----------------------------------------------------------------------------
    'world.fall': Key(
        1.0, NOT_NEGATIVE, 'loss of reward for each unit of |x|^2 / 8 beyond `world.start`'),
    'world.start': Key(
        2.0, NOT_NEGATIVE,
        '|x|^2 / 8 has mean 1 where labels are given, and is above 2 in 4% of them'),
    'world.share': Key(
        0.1, SHARE,
        "of the candidates that are drawn from a wider distribution than the labels'"),
    'world.width': Key(2.0, NOT_NEGATIVE, "of it, in standard deviations of the labels'"),

    # --- Proxies ---------------------------------------------------------------------------------
    'labels.pairs': Key(
        10_000, AT_LEAST_ONE,
        'comparisons to learn from; the more, the later over-optimisation'),
    'proxies.quantiles': Key(10, Range(2), 'N of every proxy with quantiles'),
    'proxies.networks': Key(5, Range(2), 'of the ensemble'),
    'proxies.huber_weight': Key(
        0.1, NOT_NEGATIVE, 'lambda of the proxies with targets of +1 and -1'),
    'proxies.kappa': Key(1.0, POSITIVE, 'threshold of their Huber loss'),
    'training.steps': Key(
        1500, AT_LEAST_ONE, 'of Adam, the rate falling to 0 along a cosine'),
    'training.batch_size': Key(256, AT_LEAST_ONE, 'comparisons a step'),
    'training.learning_rate': Key(3e-3, NOT_NEGATIVE, 'at the start'),
    'training.width': Key(64, AT_LEAST_ONE, 'of both hidden layers'),

    # --- Choosing --------------------------------------------------------------------------------
    'choice.rules': Key(
        ('mean', 'quantile:0.05', 'cvar:0.2', 'mean-std:1'), Each(str),
        "'mean', 'quantile:tau', 'cvar:alpha' or 'mean-std:k'"),
    'choice.prompts': Key(32, AT_LEAST_ONE, 'sets of candidates in each repetition'),
    'choice.candidates': Key(
        4096, Range(4), 'in each set, and the largest n; n goes up in powers of 4'),
    'choice.moderate': Key(
        64, Range(2), 'the n, one of these, at which gains are judged beside the largest'),
    'analysis.level': Key(0.95, LEVEL, 'of the intervals over repetitions'),
}


class Gold(NamedTuple):
    """What annotators think of a response; offers what `worlds.sample_pairs` asks of a world.

    Attributes:
      world: of mu, s and h.
      fall: loss of reward for each unit of |x|^2 / 8 beyond `start`.
      start: where the loss begins.
    """

    world: World
    fall: float
    start: float

    def mean(self, x: np.ndarray) -> np.ndarray:
        """Gold reward: [..., 8] -> [...]."""
        out = np.mean(np.square(x, dtype=np.float64), axis=-1)
        return self.world.mean(x) - self.fall * np.maximum(out - self.start, 0.0)

    def tail(self, x: np.ndarray) -> np.ndarray:
        """Tail utility: [..., 8] -> [...]."""
        share = _TAIL * (np.arange(10_000) + 0.5) / 10_000
        return self.mean(x) + self.world.std(x) * np.mean(worlds.skewed(ndtri(share)))

    def reward(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """What annotators z [...] give to responses x [..., 8]: [...]."""
        return self.mean(x) + self.world.std(x) * worlds.skewed(z)


class Proxy(NamedTuple):
    """A model that stands in for the gold reward.

    Attributes:
      label: for tables.
      model: what is trained.
      rated: whether it learns from ratings; else from choices.
    """

    label: str
    model: Model
    rated: bool = False


class Strategy(NamedTuple):
    """A rule that chooses by what a proxy says, perhaps with its spread tampered with.

    Attributes:
      proxy: name in `proxies`, or `ORACLE`.
      rule: name of the rule; with the oracle the utility that is maximised.
      control: one of `CONTROLS`.
    """

    proxy: str
    rule: str
    control: str = 'none'


# Strategy -> what its choices are worth, [s] for each of `UTILITIES` and for 'own', the score of
# the choice itself: above the mean of all candidates, in standard deviations within prompts.
Curves = dict[Strategy, dict[str, np.ndarray]]


def run(config: Any, folder: str) -> str:
    """Trains the proxies, lets every rule choose, and tabulates in `folder`.

    Leaves `best_of_n.json`, `best_of_n.md` and `figures/best_of_n.png`.

    Returns:
      The tables as Markdown.

    Raises:
      ConfigError: a value that cannot be used.
      WorkdirError: the folder belongs to a run with another config, or one that is going on.
    """
    check(config)
    with workdir.lock(folder):
        workdir.check_claim(folder, config)
        workdir.claim(folder, config)
        curves, spreads = simulate(config)
        result = summarise(curves, spreads, config)
        text = format_tables(result)
        workdir.write_json(os.path.join(folder, 'best_of_n.json'), result)
        workdir.write_text(os.path.join(folder, 'best_of_n.md'), text)
        figures.save(folder, {'best_of_n': figures.draw_best_of_n(result)})
    return text


def check(config: Any) -> None:
    """Checks the values of a config.

    Raises:
      ConfigError: lists every value that cannot be used.
    """
    schema.check(config, KEYS)
    problems = []
    for text in config.choice.rules:
        try:
            selection.parse_rule(text, selection.DISTRIBUTION_KINDS)
        except ValueError as error:
            problems.append(f'config.choice.rules: {error}')
    if config.choice.moderate not in sizes(config.choice.candidates):
        problems.append(f'config.choice.moderate={config.choice.moderate}, expected one of '
                        f'{sizes(config.choice.candidates)}')
    schema.raise_all(problems)


def sizes(candidates: int) -> list[int]:
    """The n of the curves: powers of 4 up to the number of candidates."""
    return [4**i for i in range(int(math.log2(candidates) + 1e-9) // 2 + 1)]


def proxies(config: Any) -> dict[str, Proxy]:
    """The models that are compared, by name."""
    own = config.proxies
    bradley_terry = LossConfig('bradley_terry')
    monotone = HeadConfig('monotone_quantile', num_quantiles=own.quantiles)

    def to_labels(weight):
        return LossConfig('bradley_terry_quantile_huber', huber_weight=weight * own.huber_weight,
                          kappa=own.kappa)

    return {
        'scalar': Proxy('scalar, Bradley-Terry', Model(HeadConfig('scalar'), bradley_terry)),
        'ensemble': Proxy(f'ensemble of {own.networks} such scalars',
                          Model(HeadConfig('scalar'), bradley_terry, networks=own.networks)),
        # One number with as much weight on its targets as all quantiles have on theirs: rewards
        # that saturate without a spread.
        'label_scalar': Proxy('scalar with targets of +1 and -1',
                              Model(HeadConfig('scalar'), to_labels(own.quantiles))),
        'label_quantiles': Proxy(
            'quantiles with targets of +1 and -1',
            Model(HeadConfig('quantile', num_quantiles=own.quantiles), to_labels(1))),
        'distributional': Proxy('quantiles, distributional Bradley-Terry',
                                Model(monotone, LossConfig('distributional_bradley_terry'))),
        'ratings': Proxy('quantiles of ratings, pinball',
                         Model(monotone, LossConfig('ratings_pinball')), rated=True),
    }


def candidates(seed: int, prompts: int, count: int, share: float, width: float) -> np.ndarray:
    """What the base policy draws: [P, N, 8] float32.

    Args:
      seed: of the draws.
      prompts: P.
      count: N.
      share: probability of a draw from N(0, width^2 I); the others are from N(0, I).
      width: of that distribution.
    """
    rng = np.random.default_rng((seed, 3))
    x = rng.standard_normal((prompts, count, worlds.FEATURES))
    return (x * np.where(rng.random((prompts, count, 1)) < share, width, 1.0)).astype(np.float32)


# --- simulation ----------------------------------------------------------------------------------


def simulate(config: Any) -> tuple[list[Curves], list[dict[str, dict[str, float]]]]:
    """Trains all proxies and lets all rules choose, S times.

    Returns:
      Curves of each repetition; and of each what the spread of each proxy goes with, as `follows`.
    """
    seeds = range(config.seed, config.seed + config.repetitions)
    golds = [Gold(worlds.make(seed), config.world.fall, config.world.start) for seed in seeds]
    pairs = [worlds.sample_pairs(gold, 'independent', config.labels.pairs, seed)
             for seed, gold in zip(seeds, golds, strict=True)]
    trained = {}
    for place, (name, proxy) in enumerate(proxies(config).items()):
        print(f'== training: {proxy.label}', flush=True)
        data = mlp.stack([
            mlp.comparisons(p, p.rewards if proxy.rated else None) for p in pairs])
        keys = [jax.random.fold_in(jax.random.key(seed), place) for seed in seeds]
        trained[name] = proxy.model, mlp.train(
            proxy.model, Training(**config.training), data, jnp.stack(keys))
    rules = [selection.parse_rule(text) for text in config.choice.rules]
    choice, curves, spreads = config.choice, [], []
    for place, (seed, gold) in enumerate(zip(seeds, golds, strict=True)):
        print(f'== choosing: repetition {place + 1} of {len(seeds)}', flush=True)
        x = candidates(seed, choice.prompts, choice.candidates, config.world.share,
                       config.world.width)
        utilities = {'gold': gold.mean(x), 'tail': gold.tail(x)}
        rewards = {name: predict(model, params, place, x)
                   for name, (model, params) in trained.items()}
        for name, own in rewards.items():
            if not np.isfinite(own.values).all():
                raise ConfigError(f'the rewards of the proxy {name!r} are not finite; a lower '
                                  'config.training.learning_rate may help')
        curves.append(choose(rewards, utilities, rules, sizes(choice.candidates),
                             jax.random.key(seed)))
        spreads.append(follows(rewards, gold, x))
    return curves, spreads


def predict(model: Model, params: mlp.Params, place: int, x: np.ndarray) -> Atoms:
    """Distributions [P, N] of responses x [P, N, 8] by the networks of the repetition `place`."""
    params = jax.tree.map(lambda a: a[place:place + 1], params)
    # One prompt at a time, so that the hidden states of all candidates need not fit into memory.
    each = [mlp.predict(model, params, row) for row in x]
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *each)


def choose(rewards: Mapping[str, Atoms], utilities: Mapping[str, np.ndarray],
           rules: Sequence[Rule], ns: Sequence[int], key: jax.Array) -> Curves:
    """What the choices of all strategies are worth.

    The mean of every proxy chooses, and each other rule by the proxies that have a spread, as it
    is and under each control. The scale of 'mean-std' is taken over all candidates of all prompts:
    over the base policy.

    Args:
      rewards: proxy -> distributions [P, N].
      utilities: name -> [P, N].
      rules: to choose by beside 'mean'.
      ns: the sizes.
      key: of the shuffling.
    """
    curves = {Strategy(ORACLE, name): value(scores, utilities, ns)
              for name, scores in utilities.items()}
    for name, own in rewards.items():
        curves[Strategy(name, 'mean')] = value(np.asarray(own.mean), utilities, ns)
        if own.values.shape[-1] == 1:
            continue
        versions = {'none': own, 'constant': selection.constant_spread(own),
                    'shuffled': selection.shuffle_spread(own, key), 'matched': _matched(own, key)}
        prompts = np.repeat(np.arange(len(own.values)), own.values.shape[1])
        for rule in rules:
            for control, version in versions.items() if rule.kind != 'mean' else ():
                scale = selection.reference_scale(
                    np.ravel(version.mean), np.ravel(version.std), prompts)
                scores = np.asarray(selection.scores(rule, version, scale))
                curves[Strategy(name, rule.name, control)] = value(scores, utilities, ns)
    return curves


def _matched(own: Atoms, key: jax.Array) -> Atoms:
    """[P, N] with deviations moved among responses of nearly the same mean, to any prompt.

    Within a prompt the few highest means, among which a rule chooses, lie far apart.
    """
    flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), own)
    moved = selection.shuffle_spread(flat, key, _BLOCK)
    return jax.tree.map(lambda a, shaped: a.reshape(shaped.shape), moved, own)


def value(scores: np.ndarray, utilities: Mapping[str, np.ndarray],
          ns: Sequence[int]) -> dict[str, np.ndarray]:
    """Expected utilities of the best of n, and its own score, [s] each; see `Curves`.

    Args:
      scores: [P, N].
      utilities: name -> [P, N].
      ns: the sizes.
    """
    probabilities = selection.choice_probabilities(scores, ns)
    centred = scores - scores.mean(axis=1, keepdims=True, dtype=np.float64)
    judged = dict(utilities) | {'own': centred / (centred.std() or 1.0)}
    return {name: np.einsum('spn,pn->s', probabilities, values) / len(scores)
            for name, values in judged.items()}


# --- what the spread goes with -------------------------------------------------------------------


def follows(rewards: Mapping[str, Atoms], gold: Gold, x: np.ndarray) -> dict[str, dict[str, float]]:
    """Rank correlations, within prompts, of the spread of each proxy that has one.

    With 'annotators', the true standard deviation over annotators; 'networks', that of the
    ensemble; 'error', how far the gold reward is from the line that fits it best to the proxy's
    mean within prompts; 'distance', |x|; and 'mean', the proxy's own.

    Args:
      rewards: proxy -> distributions [P, N], 'ensemble' among them.
      gold: the truth.
      x: [P, N, 8].

    Returns:
      proxy -> name -> mean over the prompts of Spearman's correlation.
    """
    few = slice(_RANKED)
    std = {name: np.asarray(own.std)[:, few] for name, own in rewards.items()
           if own.values.shape[-1] > 1}
    common = {'annotators': gold.world.std(x[:, few]), 'networks': std['ensemble'],
              'distance': np.linalg.norm(x[:, few], axis=-1)}
    utility = gold.mean(x[:, few])
    result = {}
    for name, spread in std.items():
        mean = np.asarray(rewards[name].mean, np.float64)[:, few]
        others = common | {'error': np.abs(_residual(utility, mean)), 'mean': mean}
        result[name] = {other: _rank_correlation(spread, values)
                        for other, values in others.items()}
    return result


def _residual(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """What a line through [P, N] sources, with an offset for each prompt, leaves of the targets."""
    target, source = (a - a.mean(axis=1, keepdims=True) for a in (target, source))
    return target - source * np.sum(source * target) / np.sum(source**2)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the rows of Spearman's correlation of [P, m] and [P, m]; 0 of a constant row."""
    ranks = [scipy.stats.rankdata(values, axis=1) for values in (a, b)]
    ranks = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    both, first, second = (np.sum(p * q, axis=1) for p, q in
                           ((ranks[0], ranks[1]), (ranks[0], ranks[0]), (ranks[1], ranks[1])))
    return float(np.mean(both / np.maximum(np.sqrt(first * second), np.finfo(float).tiny)))


# --- summary -------------------------------------------------------------------------------------


def summarise(curves: Sequence[Curves], spreads: Sequence[Mapping[str, Mapping[str, float]]],
              config: Any) -> dict[str, Any]:
    """All numbers with their intervals over repetitions, ready for JSON.

    Args:
      curves: of each repetition.
      spreads: of each repetition, from `follows`.
      config: of the run.

    Returns:
      'sizes', 'kl' (nats), 'labels', 'curves', 'falls', 'gains', 'spreads', 'statements' and
      'settings'.
    """
    level, ns = config.analysis.level, sizes(config.choice.candidates)
    stacked = {strategy: {name: np.stack([c[strategy][name] for c in curves])
                          for name in curves[0][strategy]} for strategy in curves[0]}
    result = {
        'sizes': ns,
        'kl': [float(selection.kl_best_of_n(n)) for n in ns],
        'labels': {name: proxy.label for name, proxy in proxies(config).items()},
        'curves': [strategy._asdict() | {name: over_repetitions(values, level)
                                         for name, values in of_strategy.items()}
                   for strategy, of_strategy in stacked.items()],
        'falls': _falls(stacked, ns, level),
        'gains': _gains(stacked, ns, (config.choice.moderate, ns[-1]), level),
        'spreads': [
            {'proxy': name} | {
                other: over_repetitions(np.array([one[name][other] for one in spreads]), level)
                for other in others}
            for name, others in spreads[0].items()],
        'settings': {
            'repetitions': config.repetitions, 'level': level,
            'prompts': config.choice.prompts, 'candidates': config.choice.candidates,
            'moderate': config.choice.moderate, 'pairs': config.labels.pairs,
            'world': config.world.to_dict(), 'tail_share': _TAIL,
            'units': 'rewards: of the logistic noise of a choice; own: standard deviations of the '
                     'scores within prompts; kl: nats'},
    }
    return result | {'statements': statements(result)}


def over_repetitions(values: np.ndarray, level: float) -> dict[str, Any]:
    """Mean over S >= 2 independent repetitions with Student's t interval.

    Args:
      values: [S, ...].
      level: of the interval.

    Returns:
      'value', 'low' and 'high', numbers or lists of the shape [...].
    """
    count = len(values)
    mean = values.mean(axis=0)
    half = scipy.stats.t.ppf(0.5 + 0.5 * level, count - 1) * values.std(axis=0, ddof=1)
    half = half / math.sqrt(count)
    return {'value': mean.tolist(), 'low': (mean - half).tolist(), 'high': (mean + half).tolist()}


def _falls(stacked: Mapping[Strategy, Mapping[str, np.ndarray]], ns: Sequence[int],
           level: float) -> list[dict[str, Any]]:
    """How far each utility falls from the peak of its mean curve to the largest n."""
    rows = []
    for strategy, values in stacked.items():
        if strategy.proxy == ORACLE or strategy.control != 'none':
            continue
        for utility in UTILITIES:
            curve = values[utility]
            peak = int(np.argmax(curve.mean(axis=0)))
            rows.append(strategy._asdict() | {'utility': utility, 'peak': ns[peak]}
                        | over_repetitions(curve[:, peak] - curve[:, -1], level))
    return rows


def _gains(stacked: Mapping[Strategy, Mapping[str, np.ndarray]], ns: Sequence[int],
           at: Sequence[int], level: float) -> list[dict[str, Any]]:
    """What rules gain at some n, paired within repetitions.

    Of each rule with a spread over its controls, of which 'constant' is its proxy's mean; of the
    mean of each proxy over 'scalar', the mean of the scalar model.
    """
    rows = []
    for strategy, values in stacked.items():
        if strategy.proxy in (ORACLE, 'scalar') or strategy.control != 'none':
            continue
        others = ({'scalar': Strategy('scalar', 'mean')} if strategy.rule == 'mean' else
                  {control: strategy._replace(control=control) for control in CONTROLS[1:]})
        for utility in UTILITIES:
            for n in dict.fromkeys(at):
                place = ns.index(n)
                row = {'proxy': strategy.proxy, 'rule': strategy.rule, 'utility': utility, 'n': n}
                for name, other in others.items():
                    difference = (values[utility] - stacked[other][utility])[:, place]
                    row[name] = over_repetitions(difference, level)
                rows.append(row | {'verdict': verdict(row)})
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """What a gain of 'gains' shows; a difference counts if its interval excludes 0."""
    gain = row['scalar' if 'scalar' in row else 'constant']
    if gain['high'] < 0.0:
        return 'loses'
    if gain['low'] <= 0.0:
        return 'no difference shown'
    if 'scalar' in row:
        return 'gains'
    if row['shuffled']['low'] <= 0.0:
        return 'gains, not by which response has which spread'
    if row['matched']['low'] <= 0.0:
        return 'gains, by a spread that changes with the mean'
    return 'gains by the spread'


def statements(result: Mapping[str, Any]) -> list[str]:
    """What the numbers show, in sentences; a difference counts if its interval excludes 0.

    Args:
      result: of `summarise`, but for the statements.
    """
    last, moderate = result['sizes'][-1], result['settings']['moderate']
    falls = [row for row in result['falls'] if row['utility'] == 'gold']
    fell = [f'{_name(row)} ({_interval(row)} from n = {row["peak"]})'
            for row in falls if row['low'] > 0.0]
    stood = [_name(row) for row in falls if row['low'] <= 0.0]
    lines = [f'Over-optimisation: to n = {last} the gold reward falls from its peak, chosen by: '
             f'{_listed(fell)}. No fall is shown for: {_listed(stood)}.']
    for n, utility in ((moderate, 'tail'), (last, 'gold')):
        rows = [row for row in result['gains'] if (row['n'], row['utility']) == (n, utility)]
        by_verdict: dict[str, list[str]] = {}
        for row in rows:
            if 'constant' in row:
                by_verdict.setdefault(row['verdict'], []).append(
                    f'{_name(row)} ({_interval(row["constant"], sign="+")})')
        lines.append(f'{UTILITIES[utility].capitalize()} at n = {n}, over the mean of the same '
                     'proxy: ' + '; '.join(f'{verdict}: {_listed(names)}'
                                           for verdict, names in by_verdict.items()) + '.')
    lines.append(f'{UTILITIES["gold"].capitalize()} at n = {last}, the mean of each proxy over the '
                 "scalar's: " + '; '.join(
                     f'{row["proxy"]} {_interval(row["scalar"], sign="+")}, {row["verdict"]}'
                     for row in rows if 'scalar' in row) + '.')
    for row in result['spreads']:
        others = [name for name in ('annotators', 'networks', 'distance')
                  if (row['proxy'], name) != ('ensemble', 'networks')]
        lines.append(f'The spread of {row["proxy"]} goes, by rank, with ' + ', '.join(
            f'{_FOLLOWED[name]} {_interval(row[name])}' for name in others) + '.')
    return lines


_FOLLOWED = {'annotators': 'how annotators differ', 'networks': 'how networks disagree',
             'distance': 'the norm of x', 'error': "the error of the proxy's mean",
             'mean': "the proxy's mean"}


def format_tables(result: Mapping[str, Any]) -> str:
    """The tables as Markdown, for the terminal and for `best_of_n.md`."""
    settings, ns = result['settings'], result['sizes']
    level = f'{settings["level"]:.0%}'
    parts = [
        '# Best of n against a reward that is known\n',
        f'Means over {settings["repetitions"]} repetitions (labels, parameters, candidates) with '
        f"{level} intervals of Student's t; {settings['pairs']:,} comparisons, "
        f'{settings["prompts"]} prompts, {settings["candidates"]} candidates each.\n',
        *(f'- {name}: {label}' for name, label in result['labels'].items()),
        '\n## What it shows\n',
        'A difference counts if its interval excludes 0. A gain over the mean of the same proxy '
        '(constant spread) is put down to the spread if it is also a gain over shuffled spreads, '
        'and to more than a spread that is a function of the mean if it is one over spreads '
        'shuffled among responses of nearly the same mean (matched). With few networks the lowest '
        'quantile and the CVaR of an ensemble are both the lowest network.\n',
        *(f'- {line}' for line in result['statements']),
    ]
    for utility, label in UTILITIES.items():
        parts += [f'\n## {label.capitalize()}\n', 'KL: upper bound on KL(best of n || one draw), '
                  'nats; exact without ties.\n',
                  tables.markdown(_curve_lines(result['curves'], utility, ns, result['kl']))]
    parts += [
        '\n## Gains, paired\n', tables.markdown(_gain_lines(result['gains'])),
        f'\n## Fall from the peak to n = {ns[-1]}\n',
        tables.markdown(_fall_lines(result['falls'])),
        '\n## What the spread goes with\n',
        "Spearman's correlation with the spread over candidates of a prompt.\n",
        tables.markdown(_spread_lines(result['spreads'])),
    ]
    return '\n'.join(parts) + '\n'


def _curve_lines(curves: Sequence[Mapping[str, Any]], utility: str, ns: Sequence[int],
                 kl: Sequence[float]) -> list[list[str]]:
    lines = [['chooser', *(f'n = {n}' for n in ns)],
             ['KL', *(f'{value:.2f}' for value in kl)]]
    for row in curves:
        if row['control'] == 'none':
            cells = (dict(zip(row[utility], at, strict=True))
                     for at in zip(*row[utility].values(), strict=True))
            lines.append([_name(row), *map(_interval, cells)])
    return lines


def _gain_lines(gains: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    others = ('scalar', *CONTROLS[1:])
    lines = [['chooser', 'utility', 'n', *(f'over {name}' for name in others), 'verdict']]
    lines += [[_name(row), UTILITIES[row['utility']], str(row['n']),
               *(_interval(row[name], sign='+') if name in row else '-' for name in others),
               row['verdict']] for row in gains]
    return lines


def _fall_lines(falls: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [['chooser', 'utility', 'peak at n', 'fall'],
            *([_name(row), UTILITIES[row['utility']], str(row['peak']), _interval(row)]
              for row in falls)]


def _spread_lines(spreads: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [['proxy', *_FOLLOWED.values()],
            *([row['proxy'], *(_interval(row[name]) for name in _FOLLOWED)] for row in spreads)]


def _name(row: Mapping[str, Any]) -> str:
    control = row.get('control', 'none')
    return f'{row["proxy"]} {row["rule"]}' + ('' if control == 'none' else f' ({control})')


def _interval(cell: Mapping[str, float], *, sign: str = '') -> str:
    return f'{cell["value"]:{sign}.2f} [{cell["low"]:{sign}.2f}, {cell["high"]:{sign}.2f}]'


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names) if names else 'none'
