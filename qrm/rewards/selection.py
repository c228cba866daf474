"""Choosing among the responses to a prompt by their reward distributions.

A rule turns the distributions of K responses into K scores, of which the highest is chosen, or
which are the rewards that a policy learns from. Here are the rules, what a choice is worth on
comparisons whose responses are rated, and the expected value of the best of n responses.

Axes: `...` any leading axes; K responses to a prompt; N candidates, n of them drawn; N also
quantiles of a response; R responses in all; c comparisons; r bootstrap replicates. Rules are JAX
in float32; estimates are numpy in float64 on the host.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.rewards import distributions, resampling
from qrm.rewards.distributions import Atoms, Distribution
from qrm.rewards.metrics import Predictions
from qrm.rewards.normalisation import Rewards
from qrm.rewards.resampling import Interval

DISTRIBUTION_KINDS = ('mean', 'quantile', 'cvar', 'mean-std')  # which read nothing else
KINDS = (*DISTRIBUTION_KINDS, 'disagreement', 'sample')
_ROUNDING = 1e-5  # of rewards and spreads, relative to their size
_PARAMETER = {'quantile': 'tau in (0, 1)', 'cvar': 'alpha in (0, 1]', 'mean-std': 'k >= 0',
              'disagreement': 'k >= 0', 'sample': 'seed a whole number in [0, 2^32)'}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A way to score a response by the distribution of its reward.

    - 'mean': the mean.
    - 'quantile': the quantile at tau = `parameter`; optimistic above 1/2.
    - 'cvar': the conditional value at risk, the mean of the lowest alpha = `parameter` of the mass
      (Rockafellar & Uryasev 2000); for ten quantiles and 10 alpha a whole number, the mean of the
      lowest 10 alpha quantiles.
    - 'mean-std': mean / s_mean - k std / s_std with k = `parameter` and the scales of `Scale`.
    - 'disagreement': mean - k std of the means that the members of an ensemble predict, with k =
      `parameter` (Coste et al. 2024, arXiv 2310.02743, whose uncertainty-weighted optimisation has
      the variance), in units of reward: what they do not agree on, not what people do not.
    - 'sample': a draw from the distribution with the seed `parameter`, see `reward`.

    Attributes:
      kind: one of `KINDS`.
      parameter: tau, alpha, k or seed; None for 'mean'.

    Raises:
      ValueError: an unknown kind, or a parameter that is missing, unexpected or out of range.
    """

    kind: str
    parameter: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f'rule {self.kind!r}, expected one of {KINDS}')
        if self.kind == 'mean':
            if self.parameter is not None:
                raise ValueError(f"rule 'mean' takes no parameter, got {self.parameter}")
        elif self.parameter is None or not {
            'quantile': 0.0 < self.parameter < 1.0,
            'cvar': 0.0 < self.parameter <= 1.0,
            'mean-std': 0.0 <= self.parameter < math.inf,
            'disagreement': 0.0 <= self.parameter < math.inf,
            'sample': 0 <= self.parameter < 2**32 and self.parameter % 1 == 0,
        }[self.kind]:
            raise ValueError(f'rule {self.kind!r} with parameter {self.parameter}, expected '
                             f'{_PARAMETER[self.kind]}')

    @property
    def name(self) -> str:
        """How a config writes the rule: 'mean', 'quantile:0.1', 'mean-std:1', 'sample:7', ..."""
        if self.parameter is None:
            return self.kind
        return f'{self.kind}:{self.parameter:{".0f" if self.kind == "sample" else "g"}}'


def parse_rule(text: str, kinds: Sequence[str] = KINDS) -> Rule:
    """The rule that a config writes as 'mean', 'quantile:0.1', 'cvar:0.2', 'mean-std:1.0', ...

    Args:
      text: the rule.
      kinds: that can be used, `DISTRIBUTION_KINDS` where there are predictions only.

    Raises:
      ValueError: names the text and what was expected.
    """
    kind, colon, parameter = text.partition(':')
    try:
        if kind not in kinds:
            raise ValueError(kind)
        return Rule(kind, float(parameter) if colon else None)
    except ValueError as error:
        forms = [f'{kind}:{_PARAMETER[kind].split()[0]} with {_PARAMETER[kind]}'
                 if kind in _PARAMETER else kind for kind in kinds]
        raise ValueError(f'rule {text!r}, expected {", ".join(forms[:-1])} or {forms[-1]}'
                         ) from error


def check_alone(rule: Rule, members: int, scale: 'Scale | None') -> None:
    """Checks that a rule scores a response of a model whatever others there are.

    Args:
      rule: the rule.
      members: of the model's head.
      scale: that is known of the model; None: none.

    Raises:
      ValueError: it needs a scale or members, and there are none.
    """
    if rule.kind == 'mean-std' and scale is None:
        raise ValueError(f'rule {rule.name!r} needs a scale of other responses, expected a run '
                         'that `qrm normalise` gave one, or another rule')
    if rule.kind == 'disagreement' and members < 2:
        raise ValueError(f'rule {rule.name!r} of a head with one member, expected an ensemble '
                         '(head.members), or another rule')


class Scale(NamedTuple):
    """One unit of reward and one of spread, for 'mean-std'.

    Heads differ in the units of their rewards, and in how much the spread differs between
    responses by far more: k in those units would mean another trade for each head. Divided by
    these scales, k = 1 trades one standard deviation of the rewards for one of the spreads. A
    common factor or constant would change no choice; only the ratio of the two scales does.

    Attributes:
      mean: standard deviation of the means of the responses within a prompt.
      std: standard deviation of the standard deviations of the responses within a prompt.
    """

    mean: float
    std: float


def reference_scale(mean: np.ndarray, std: np.ndarray, prompts: np.ndarray) -> Scale:
    """The scales over a reference population of responses.

    The variance within prompts, pooled over them: sum of squared deviations from the mean of the
    prompt's responses over R less the number of prompts. Not the variance over all responses, as
    preferences identify rewards only up to a constant for each prompt.

    Args:
      mean: [R] means of the reward distributions.
      std: [R] their standard deviations.
      prompts: [R] integers, equal for responses to one prompt.

    Raises:
      ValueError: no prompt has two responses.
    """
    _, index, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    freedom = len(index) - len(counts)
    if freedom < 1:
        raise ValueError('a scale within prompts needs a prompt with two responses, got '
                         f'{len(counts)} prompts with one each')

    def within(values):
        values = np.asarray(values, np.float64)
        deviations = values - (np.bincount(index, values) / counts)[index]
        return float(np.sqrt(deviations @ deviations / freedom))

    scale = Scale(within(mean), within(std))
    # Spreads that differ by the rounding of float32 are equal: k would multiply noise.
    rounding = _ROUNDING * (scale.mean + np.abs(std).max())
    return scale if scale.std > rounding else scale._replace(std=0.0)


def scores(rule: Rule, rewards: Distribution, scale: Scale | None = None) -> jax.Array:
    """The score of each response; the rule chooses the highest.

    Args:
      rule: the rule.
      rewards: distributions with leading axes [..., K].
      scale: for 'mean-std', otherwise not read; of the population that the prompts are drawn from,
        not of the K responses, so that a choice between two does not depend on the others. Where
        all spreads are equal the term of the spread is left out.

    Returns:
      [..., K].

    Raises:
      ValueError: 'mean-std' without a scale, or a rule that reads more than distributions, see
        `reward`.
    """
    if rule.kind not in DISTRIBUTION_KINDS:
        raise ValueError(f'rule {rule.name!r} of distributions alone, expected one of '
                         f'{DISTRIBUTION_KINDS}')
    if rule.kind == 'mean':
        return rewards.mean
    if rule.kind == 'quantile':
        return rewards.quantile(jnp.array([rule.parameter]))[..., 0]
    if rule.kind == 'cvar':
        return rewards.cvar(rule.parameter)
    if scale is None:
        raise ValueError(f'rule {rule.name!r} needs a scale')
    penalty = rule.parameter / scale.std if scale.std > 0.0 else 0.0
    return rewards.mean / (scale.mean or 1.0) - penalty * rewards.std


def reward(
    rule: Rule, rewards: Rewards, scale: Scale | None = None, texts: np.ndarray | None = None,
    draw: int = 0,
) -> jax.Array:
    """The reward of each response by any rule, from what a head says of it.

    'sample' draws one reward for each text, by random numbers of the seed, of the number of the
    draw and of the text: the same text gets the same reward in any batch and process, also twice in
    one group, and another one by another seed or in another draw.

    Args:
      rule: the rule.
      rewards: of R responses.
      scale: for 'mean-std', see `scores`.
      texts: for 'sample', [R, 2] from `text_digest`.
      draw: for 'sample', its number.

    Returns:
      [R].

    Raises:
      ValueError: what the rule reads is not there.
    """
    if rule.kind in DISTRIBUTION_KINDS:
        return scores(rule, rewards.distribution, scale)
    check_alone(rule, rewards.head.members, scale)
    if rule.kind == 'disagreement':
        means = rewards.members.mean
        return jnp.mean(means, axis=-1) - rule.parameter * jnp.std(means, axis=-1)
    if texts is None:
        raise ValueError(f'rule {rule.name!r} needs the texts')
    seed = jax.random.fold_in(jax.random.key(np.uint32(rule.parameter)), draw)

    def sample(one: Distribution, text: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(seed, text[0]), text[1])
        return one.sample(key, 1)[0]

    return jax.vmap(sample)(rewards.distribution, jnp.asarray(texts))


def text_digest(tokens: np.ndarray) -> np.ndarray:
    """Numbers [2] uint32 by which a dialogue of tokens [L] is known; the same on any machine."""
    digest = hashlib.blake2b(np.asarray(tokens, '<i4').tobytes(), digest_size=8).digest()
    return np.frombuffer(digest, '<u4').astype(np.uint32)


# --- controls ------------------------------------------------------------------------------------


def shuffle_spread(rewards: Atoms, key: jax.Array, block: int | None = None) -> Atoms:
    """Control: each response with the deviations from the mean of a random one of its prompt.

    What a rule gains beyond this control it owes to knowing which response has which spread. With
    `block`, deviations move only among responses of nearly the same mean, so that the control
    keeps how the spread depends on the mean: what a rule gains beyond it, it owes to more than a
    spread that is a function of the mean, as of rewards that saturate.

    Args:
      rewards: [..., K, N] atoms.
      key: of the permutations, one for each set of K.
      block: how many neighbours in the order of the means change places; None: all K.

    Returns:
      The same means, and in each set of K the same deviations in another order.
    """
    mean = rewards.mean
    place = jnp.arange(mean.shape[-1]) // (block or mean.shape[-1])
    by_mean = jnp.argsort(mean, axis=-1)
    moved = jnp.argsort(place + jax.random.uniform(key, mean.shape), axis=-1)
    # The response at each place in the order of the means takes the deviations of another place.
    source = jnp.take_along_axis(by_mean, moved, axis=-1)
    source = jnp.take_along_axis(source, jnp.argsort(by_mean, axis=-1), axis=-1)[..., None]
    deviations = rewards.values - mean[..., None]
    return Atoms(mean[..., None] + jnp.take_along_axis(deviations, source, axis=-2),
                 jnp.take_along_axis(rewards.weights, source, axis=-2))


def constant_spread(rewards: Atoms) -> Atoms:
    """Control: each response with the same deviations from its mean, the average ones.

    Every rule then orders responses as 'mean' does. What a rule still gains over another model's
    mean, this model's mean gains too, and it is not owed to the spread.

    Args:
      rewards: [..., N] atoms of equal weights.

    Returns:
      [..., N] atoms with the same means.
    """
    values = jnp.sort(rewards.values, axis=-1)
    mean = jnp.mean(values, axis=-1, keepdims=True)
    average = jnp.mean(values - mean, axis=range(values.ndim - 1))
    return rewards._replace(values=mean + average)


# --- comparisons with ratings --------------------------------------------------------------------


class ChosenRatings(NamedTuple):
    """What rules choose where responses are rated, in units of the ratings.

    Attributes:
      comparisons: c, the number of comparisons with at least two rated responses.
      responses: mean number of rated responses in them.
      chance: mean rating of a response drawn at random.
      best: mean of the highest ratings.
      chosen: name of a rule -> mean rating of the responses it chooses.
      differences: name of a rule -> the same less that of the rule 'mean', paired.
    """

    comparisons: int
    responses: float
    chance: Interval
    best: Interval
    chosen: dict[str, Interval]
    differences: dict[str, Interval]


class _Numbers(NamedTuple):
    """What is known of [R] distributions in `Predictions`, as far as rules ask for it."""

    mean: np.ndarray
    std: np.ndarray
    quantiles: np.ndarray

    def quantile(self, taus: jax.Array) -> jax.Array:
        return distributions.uniform_atoms(self.quantiles).quantile(taus)

    def cvar(self, alpha: float) -> jax.Array:
        return distributions.uniform_atoms(self.quantiles).cvar(alpha)


def scores_of(rule: Rule, predictions: Predictions) -> np.ndarray:
    """The score [R] of each response of predictions, in whose scale 'mean-std' is."""
    p = predictions
    scale = reference_scale(p.means, p.stds, p.comparisons) if rule.kind == 'mean-std' else None
    return np.asarray(scores(rule, _Numbers(p.means, p.stds, p.quantiles), scale))


def chosen_ratings(predictions: Predictions, rules: Sequence[Rule], *, replicates: int, seed: int,
                   level: float = 0.95) -> ChosenRatings:
    """The mean rating of the response that each rule chooses.

    A rule chooses among the rated responses of a comparison; comparisons with fewer than two are
    left out, and every other one counts once. Where scores tie, the mean rating of the tied
    responses counts. The scale of 'mean-std' is that of all predictions, rated or not, and is not
    computed again in the replicates.

    Args:
      predictions: of a model, with ratings.
      rules: what to compare; 'mean' is added if it is not among them.
      replicates: of the bootstrap over `comparison_groups` (opening questions).
      seed: of the bootstrap.
      level: of the intervals.

    Raises:
      ValueError: no comparison has two rated responses.
    """
    p = predictions
    rated = np.isfinite(p.ratings)
    rated &= np.bincount(p.comparisons[rated], minlength=len(p.comparison_ids))[p.comparisons] > 1
    if not rated.any():
        raise ValueError('no comparison has two rated responses')
    # Responses of a comparison side by side, so that sums over them are sums of slices.
    order = np.flatnonzero(rated)[np.argsort(p.comparisons[rated], kind='stable')]
    comparisons, starts, counts = np.unique(
        p.comparisons[order], return_index=True, return_counts=True)
    ratings = p.ratings[order].astype(np.float64)

    def chosen(rule):
        score = scores_of(rule, p)[order]
        top = score == np.repeat(np.maximum.reduceat(score, starts), counts)
        return np.add.reduceat(top * ratings, starts) / np.add.reduceat(top.astype(int), starts)

    weights = resampling.cluster_bootstrap_weights(
        p.comparison_groups[comparisons], replicates, seed)

    def mean(values):
        return resampling.bootstrap(lambda w: np.average(values, weights=w), weights, level)

    values = {rule.name: chosen(rule) for rule in (Rule('mean'), *rules)}
    return ChosenRatings(
        comparisons=len(comparisons),
        responses=float(counts.mean()),
        chance=mean(np.add.reduceat(ratings, starts) / counts),
        best=mean(np.maximum.reduceat(ratings, starts)),
        chosen={name: mean(v) for name, v in values.items()},
        differences={name: mean(v - values['mean']) for name, v in values.items()
                     if name != 'mean'},
    )


def as_dict(found: ChosenRatings) -> dict[str, Any]:
    """The result ready for JSON."""

    def number(interval: Interval) -> dict[str, float]:
        return {key: getattr(interval, key) for key in ('value', 'low', 'high')}

    return {
        'comparisons': found.comparisons, 'responses': found.responses,
        'chance': number(found.chance), 'best': number(found.best),
        'chosen': {name: number(cell) for name, cell in found.chosen.items()},
        'differences': {name: number(cell) for name, cell in found.differences.items()},
    }


def describe(found: Mapping[str, Any]) -> str:
    """The result of `as_dict` as lines for the terminal."""
    lines = [f'Rating of the chosen response, {found["comparisons"]} comparisons of '
             f'{found["responses"]:.1f} rated responses on average: chance '
             f'{found["chance"]["value"]:.3f}, best possible {found["best"]["value"]:.3f}']
    for name, cell in found['chosen'].items():
        line = f'  {name:<14} {cell["value"]:.3f} [{cell["low"]:.3f}, {cell["high"]:.3f}]'
        if name in found['differences']:
            other = found['differences'][name]
            line += (f'   against the mean {other["value"]:+.3f} '
                     f'[{other["low"]:+.3f}, {other["high"]:+.3f}]')
        lines.append(line)
    return '\n'.join(lines)


# --- best of n -----------------------------------------------------------------------------------


def kl_best_of_n(n: np.ndarray | int) -> np.ndarray | float:
    """KL(best of n || one draw) in nats: log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3).

    Exact if scores are continuous, so that no two draws tie; otherwise an upper bound (Beirami et
    al. 2024, arXiv 2401.01879), see `exact_kl_best_of_n` and `estimated_kl_best_of_n`. It does not
    depend on the score, so that rules with the same n are at the same distance from the policy.

    Args:
      n: number of draws, >= 1.
    """
    return np.log(n) - (n - 1) / n


def exact_kl_best_of_n(scores: np.ndarray, log_probs: np.ndarray, n: int) -> np.ndarray:
    """KL(best of n || one draw) in nats where all responses and their probabilities are known.

    Of tied draws one is taken at random. A response at a level of score that has the mass q, with
    the mass u below it, is then the best of n with ((u + q)^n - u^n) / q times its probability
    (Beirami et al. 2024, arXiv 2401.01879, section 2, for levels of several responses): the KL is
    that of the levels, and does not ask how many responses share one. Scores that are sampled, each
    with probability 1 / M, give the same of the sample, which is below the truth where levels
    would part with more samples.

    Args:
      scores: [..., V] finite.
      log_probs: [..., V] nats; probabilities sum to 1 along the last axis, 0 is allowed.
      n: number of draws, >= 1.

    Returns:
      [...] float64, at most `kl_best_of_n(n)`.

    Raises:
      ValueError: a score that is not finite, probabilities that do not sum to 1, or n < 1.
    """
    scores, probs = np.asarray(scores), np.exp(np.asarray(log_probs, np.float64))
    if n < 1:
        raise ValueError(f'best of {n}, expected at least 1')
    if not np.isfinite(scores).all():
        raise ValueError('scores must be finite')
    if not np.allclose(probs.sum(axis=-1), 1.0, rtol=0.0, atol=1e-5):
        raise ValueError(f'probabilities with the sum {probs.sum(axis=-1)}, expected 1: all '
                         'responses are needed')
    found = []
    for score, p in zip(*(x.reshape(-1, x.shape[-1]) for x in np.broadcast_arrays(scores, probs)),
                        strict=True):
        levels, place = np.unique(score[p > 0.0], return_inverse=True)
        mass = np.bincount(place, p[p > 0.0] / p.sum(), len(levels))
        reached = np.minimum(np.cumsum(mass), 1.0)
        chosen = np.diff(reached ** n, prepend=0.0)
        there = chosen > 0.0  # far below the best, powers underflow
        found.append(chosen[there] @ np.log(chosen[there] / mass[there]))
    return np.reshape(found, np.broadcast_shapes(scores.shape, probs.shape)[:-1])


def estimated_kl_best_of_n(log_probs: np.ndarray, n: int) -> np.ndarray:
    """Estimate of KL(best of n || one draw) in nats by the probability of the response chosen.

    Beirami et al. 2024 (arXiv 2401.01879), section 4: the KL if the chosen response, of probability
    p, had the highest score, and all below it were continuous. With a = 1 - p that is a^n (log n +
    (n - 1) log a - (n - 1) / n) + (1 - a^n) log((1 - a^n) / p): `kl_best_of_n` for small n p, and
    -log p for large ones. Average it over prompts. Where a choice ties with other responses p is to
    be the probability of all of them; with less the estimate is too high, up to the bound.

    Args:
      log_probs: [...] nats, of the response that was the best of n, under the policy it was
        drawn from; of the whole response.
      n: number of draws, >= 1.

    Returns:
      [...] float64.

    Raises:
      ValueError: a log-probability that is above 0, or n < 1.
    """
    log_p = np.asarray(log_probs, np.float64)
    if n < 1:
        raise ValueError(f'best of {n}, expected at least 1')
    if not (log_p <= 0.0).all():
        raise ValueError('log-probabilities must be at most 0')
    with np.errstate(divide='ignore'):
        log_a = np.where(log_p < 0.0, np.log(-np.expm1(log_p)), -np.inf)
    others = np.exp(n * log_a)  # no draw is the chosen one
    below = np.where(others > 0.0, np.log(n) + (n - 1) * np.where(np.isfinite(log_a), log_a, 0.0)
                     - (n - 1) / n, 0.0)
    # log((1 - a^n) / p) of a p below all floats: n p / p.
    odds = -np.expm1(n * log_a)
    ratio = np.where(odds > 0.0, np.log(np.where(odds > 0.0, odds, 1.0)) - log_p, np.log(n))
    return others * below + odds * ratio


def best_of_n_weights(total: int, n: int) -> np.ndarray:
    """Probability that the draw with the highest score is the one of each rank.

    Of `total` candidates n are drawn without replacement; the one of rank i, counted from 1 for
    the lowest score, is the highest of them with probability C(i - 1, n - 1) / C(total, n). With
    these weights the mean over candidates is an unbiased estimate of the expected value of the
    best of n, of smaller variance than one set of n (Nakano et al. 2021, WebGPT, appendix I; used
    by Gao et al. 2022). Neighbouring weights have the ratio (i - n + 1) / i, whose running product
    from the highest rank down needs no binomial coefficient and loses no digits.

    Args:
      total: number of candidates, N.
      n: how many are drawn, from 1 to N.

    Returns:
      [N] float64, non-decreasing, sum 1.

    Raises:
      ValueError: n is not from 1 to N.
    """
    if not 1 <= n <= total:
        raise ValueError(f'best of {n}, expected from 1 to the {total} candidates')
    ranks = np.arange(total - 1, 0, -1, dtype=np.float64)
    ratios = np.maximum(ranks - n + 1, 0.0) / ranks
    return n / total * np.cumprod(np.concatenate([[1.0], ratios]))[::-1]


def choice_probabilities(scores: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Probability that each candidate is the best of n drawn without replacement.

    Candidates whose scores tie share their weights equally: of tied draws one is taken at random.

    Args:
      scores: [..., N] finite scores of a rule; candidates of one prompt along the last axis.
      sizes: the s values of n.

    Returns:
      [s, ..., N] float64, sum 1 along the last axis.

    Raises:
      ValueError: a score is not finite, or as `best_of_n_weights`.
    """
    scores = np.asarray(scores)
    if not np.isfinite(scores).all():
        raise ValueError('scores must be finite')
    total = scores.shape[-1]
    order = np.argsort(scores, axis=-1)
    ascending = np.take_along_axis(scores, order, axis=-1)
    # Runs of equal scores, numbered over all rows; a row starts a new one.
    first = np.ones(scores.shape, bool)
    first[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    starts = np.flatnonzero(first)
    counts = np.diff(np.append(starts, first.size))
    result = np.empty((len(sizes), *scores.shape))
    for out, n in zip(result, sizes, strict=True):
        weights = np.broadcast_to(best_of_n_weights(total, n), scores.shape).ravel()
        shared = np.repeat(np.add.reduceat(weights, starts) / counts, counts)
        np.put_along_axis(out, order, shared.reshape(scores.shape), axis=-1)
    return result


def best_of_n(scores: np.ndarray, values: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Expected value of the candidate with the highest score of n.

    Args:
      scores: [..., N] what the choice is made by.
      values: [..., N] what it is judged by.
      sizes: the s values of n, each from 1 to N.

    Returns:
      [..., s] float64, in the units of the values.

    Raises:
      ValueError: as `choice_probabilities`.
    """
    return np.einsum('s...n,...n->...s', choice_probabilities(scores, sizes), values)
