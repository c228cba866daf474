"""Worlds in which the distribution of every item's reward is known, and what models made of it.

An item is x in R^8, drawn from N(0, I). An annotator is a number z, drawn from N(0, 1), and gives
item x the reward

    r(x, z) = mu(x) + s(x) h(z),    h(z) = (exp(kz) - exp(k^2 / 2)) / d,

h increasing with mean 0 and variance 1 (a lognormal; k = .3, skewness .95). So over annotators
the reward of x has mean mu(x), standard deviation s(x), quantile function mu(x) + s(x) h(Phi^-1(u))
and a cdf in closed form. mu and s are smooth functions of two directions of x each, all
orthogonal, so that they are independent of each other; the seed of the world turns the directions.
Of two items the first is preferred with probability sigma(r_1 - r_2), Bradley & Terry's logistic
noise. Who gives the two rewards is the scheme:

    'independent'  an annotator of its own for each side
    'shared'       one annotator, drawn anew for each pair, judges both sides
    'identified'   as 'shared', but one of A known annotators, who come back in other pairs

Measured, over 100,000 pairs: the best possible accuracy is .672 (NLL .6009) with independent
annotators, .702 (.5680) with shared ones. The standard deviation of mu is .92, the mean of s .94,
from .28 to 1.6. Ten quantiles at the midpoints tau_i = (i + 0.5) / 10, by which models are
compared, have a mean standard deviation of .86, and a point mass at the mean is .69 away from them.

Axes: `...` any leading axes; n pairs; m items; N quantiles; A annotators. NumPy, float64.
"""

from typing import NamedTuple

import numpy as np
import scipy
from scipy.special import expit, ndtr, ndtri

FEATURES = 8
SCHEMES = ('independent', 'shared', 'identified')

_MEAN_SCALE = 0.92  # standard deviation of mu over items
_STD_RANGE = (0.28, 1.6)  # of s over items
_STD_SLOPE = 1.5  # above 1, more items lie near the ends of that range than in a uniform spread
_BEND = 0.5  # size of the sine in both functions
_SKEW = 0.3  # k of h
_H_SCALE = np.sqrt(np.exp(_SKEW**2) * np.expm1(_SKEW**2))  # d, the lognormal's standard deviation
# Variance of u + bend sin(v), u and v independent N(0, 1): 1 + bend^2 (1 - e^-2) / 2.
_BENT_SCALE = np.sqrt(1.0 + _BEND**2 * -np.expm1(-2.0) / 2.0)

# Nodes and weights of the trapezoid rule for expectations over N(0, 1). It converges
# exponentially; with step 1/4 it is exact to 1e-11 for the functions here.
_NODES = np.arange(-8.5, 8.51, 0.25)
_WEIGHTS = np.exp(-(_NODES**2) / 2.0) / np.sum(np.exp(-(_NODES**2) / 2.0))
_CHUNK = 400  # pairs whose nodes are in memory together


class World(NamedTuple):
    """A world; a pure function of its seed.

    Attributes:
      directions: [8, 4] orthonormal: two of them make mu, two make s.
    """

    directions: np.ndarray

    def mean(self, x: np.ndarray) -> np.ndarray:
        """mu: [..., 8] -> [...]."""
        u = np.asarray(x, np.float64) @ self.directions
        return _MEAN_SCALE * _bent(u[..., 0], u[..., 1])

    def std(self, x: np.ndarray) -> np.ndarray:
        """s: [..., 8] -> [...], positive."""
        u = np.asarray(x, np.float64) @ self.directions
        low, high = _STD_RANGE
        return low + (high - low) * ndtr(_STD_SLOPE * _bent(u[..., 2], u[..., 3]))

    def reward(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """What annotators z [...] give to items x [..., 8]: [...]."""
        return self.mean(x) + self.std(x) * skewed(z)

    def quantile(self, x: np.ndarray, taus: np.ndarray) -> np.ndarray:
        """The rewards with cdf = taus: [..., 8], [N] -> [..., N]."""
        return self.mean(x)[..., None] + self.std(x)[..., None] * skewed(ndtri(taus))

    def cdf(self, x: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """Share of annotators who give at most `reward`: [..., 8], [..., N] -> [..., N]."""
        standard = (reward - self.mean(x)[..., None]) / self.std(x)[..., None]
        power = standard * _H_SCALE + np.exp(_SKEW**2 / 2.0)
        # No annotator gives less than the lognormal's lower end.
        return np.where(power > 0.0, ndtr(np.log(np.where(power > 0.0, power, 1.0)) / _SKEW), 0.0)


class Pairs(NamedTuple):
    """Labelled pairs, the preferred item first.

    Attributes:
      x: [n, 2, 8] float32 items.
      rewards: [n, 2] float32, what the annotators gave: the ratings where ratings are observed.
      annotators: [n] int32, who judged the pair; -1 unless the scheme is 'identified'.
    """

    x: np.ndarray
    rewards: np.ndarray
    annotators: np.ndarray


def make(seed: int) -> World:
    """The world of a seed."""
    rng = np.random.default_rng(seed)
    return World(np.linalg.qr(rng.standard_normal((FEATURES, 4)))[0])


def skewed(z: np.ndarray) -> np.ndarray:
    """h of the module docstring, elementwise."""
    return (np.exp(_SKEW * np.asarray(z, np.float64)) - np.exp(_SKEW**2 / 2.0)) / _H_SCALE


def panel(annotators: int) -> np.ndarray:
    """The z of A known annotators, [A]: at the midpoints of A equal shares of all annotators."""
    return ndtri((np.arange(annotators) + 0.5) / annotators)


def sample_items(seed: int, n: int) -> np.ndarray:
    """[n, 8] float32 items."""
    return np.random.default_rng((seed, 0)).standard_normal((n, FEATURES)).astype(np.float32)


def sample_pairs(world: World, scheme: str, n: int, seed: int, annotators: int = 10) -> Pairs:
    """Draws pairs, rewards and choices.

    Args:
      world: where the items live.
      scheme: one of `SCHEMES`.
      n: pairs.
      seed: of items, annotators and noise; the same items for every scheme.
      annotators: A, of the scheme 'identified'.

    Raises:
      ValueError: an unknown scheme.
    """
    _check_scheme(scheme)
    x = sample_items(seed, 2 * n).reshape(n, 2, FEATURES)
    rng = np.random.default_rng((seed, 1))
    who = np.full(n, -1)
    z = rng.standard_normal((n, 2))
    if scheme == 'shared':
        z = z[:, [0, 0]]
    if scheme == 'identified':
        who = rng.integers(0, annotators, n)
        z = np.repeat(panel(annotators)[who][:, None], 2, axis=1)
    rewards = world.reward(x, z)
    first = rng.random(n) < expit(rewards[:, 0] - rewards[:, 1])
    order = np.where(first[:, None], [0, 1], [1, 0])
    return Pairs(np.take_along_axis(x, order[..., None], 1),
                 np.take_along_axis(rewards, order, 1).astype(np.float32), who.astype(np.int32))


def sample_ratings(world: World, x: np.ndarray, seed: int, share: float = 1.0) -> np.ndarray:
    """Ratings [...] float32 of items [..., 8] by annotators of their own, of about a share of them.

    NaN stands where there is none.
    """
    rng = np.random.default_rng((seed, 3))
    ratings = world.reward(x, rng.standard_normal(x.shape[:-1]))
    return np.where(rng.random(ratings.shape) < share, ratings, np.nan).astype(np.float32)


def sample_anchors(world: World, annotators: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One rated item of each known annotator: ([A, 8] items, [A] rewards), float32."""
    x = np.random.default_rng((seed, 2)).standard_normal((annotators, FEATURES)).astype(np.float32)
    return x, world.reward(x, panel(annotators)).astype(np.float32)


def win_probability(
    world: World, x: np.ndarray, scheme: str, who: np.ndarray | None = None, annotators: int = 10
) -> np.ndarray:
    """P(the first item of a pair is preferred), annotators and noise integrated out.

    Args:
      world: where the items live.
      x: [n, 2, 8] pairs of items.
      scheme: one of `SCHEMES`.
      who: [n] the judges of 'identified'; without, averaged over all A.
      annotators: A, of 'identified'.

    Returns:
      [n].

    Raises:
      ValueError: an unknown scheme.
    """
    _check_scheme(scheme)
    lead = np.subtract(*np.moveaxis(world.mean(x), 1, 0))
    std = world.std(x)
    if scheme == 'identified':
        z = panel(annotators)
        wins = expit(lead[:, None] + (std[:, :1] - std[:, 1:]) * skewed(z))
        return wins.mean(axis=1) if who is None else wins[np.arange(len(who)), who]
    nodes = skewed(_NODES)
    if scheme == 'shared':
        return expit(lead[:, None] + (std[:, :1] - std[:, 1:]) * nodes) @ _WEIGHTS
    wins = np.empty(len(lead))
    for start in range(0, len(lead), _CHUNK):
        part = slice(start, start + _CHUNK)
        first = lead[part, None] + std[part, :1] * nodes
        table = expit(first[:, :, None] - (std[part, 1:] * nodes)[:, None, :])
        wins[part] = (table @ _WEIGHTS) @ _WEIGHTS
    return wins


def expected_accuracy(wins: np.ndarray, lead: np.ndarray) -> float:
    """Accuracy of preferring the first where `lead` > 0, over labels drawn with `wins`.

    With `lead` = wins - 1/2 it is the best possible. A lead of 0 counts as a coin toss.
    """
    return float(np.mean(0.5 + (wins - 0.5) * np.sign(lead)))


def expected_nll(wins: np.ndarray, log_first: np.ndarray, log_second: np.ndarray) -> float:
    """NLL, over labels drawn with `wins`, of log-probabilities that either side is preferred.

    With the logarithms of `wins` and 1 - `wins` it is the least possible, the Bayes NLL.
    """
    return float(-np.mean(wins * log_first + (1.0 - wins) * log_second))


class Match(NamedTuple):
    """How predicted quantiles compare with the true ones, both at the same N levels tau.

    W1 is the mean over items and levels of |predicted - true|: the Wasserstein-1 distance, the
    integral over u of |difference of the quantile functions|, by the midpoint rule at the levels.
    (As N atoms, even the true quantiles are .08 away from the true distribution for N = 10, which
    would hide the error of a good model.) Pairs identify no constant that is common to all
    rewards, so W1 is taken after the best common shift; and after the best common scale and shift,
    as rewards may be in other units than the noise.

    Attributes:
      w1_shift, w1_affine: least W1 over shifts, and over shifts and scales >= 0.
      shift: the best shift.
      scale: the best scale.
      coverage: [N] true mass at or below the shifted quantile, mean over the items.
      coverage_mae: mean over the levels of |coverage - tau|.
      crossing: share of neighbouring levels whose predicted quantiles are in the wrong order.
      spread_ratio: mean standard deviation of the predicted quantiles over that of the true ones.
      spread_correlation: Pearson's, over items, of the two standard deviations; NaN if the
        predicted one is constant.
      outer_rank: Spearman's correlation, over items, of the lowest predicted quantile and the
        predicted mean.
    """

    w1_shift: float
    w1_affine: float
    shift: float
    scale: float
    coverage: np.ndarray
    coverage_mae: float
    crossing: float
    spread_ratio: float
    spread_correlation: float
    outer_rank: float


def match(world: World, x: np.ndarray, quantiles: np.ndarray, taus: np.ndarray) -> Match:
    """Compares predicted quantiles with the truth.

    Args:
      world: the truth: a `World`, or anything with its `quantile` and `cdf`.
      x: [m, ...] items of it.
      quantiles: [m, N] predicted, in the order of tau; those that cross are sorted, as all but
        their crossing is that of a distribution.
      taus: [N] levels.
    """
    quantiles = np.asarray(quantiles, np.float64)
    true, ordered = world.quantile(x, taus), np.sort(quantiles, axis=-1)
    w1_shift, shift = _shifted_distance(ordered, true)
    scale = _best_scale(ordered, true)
    coverage = world.cdf(x, ordered + shift).mean(axis=0)
    spread, true_spread = quantiles.std(axis=-1), true.std(axis=-1)
    means = quantiles.mean(axis=-1)
    constant = np.ptp(spread) <= 1e-6 * true_spread.mean()
    return Match(
        w1_shift=w1_shift,
        w1_affine=_shifted_distance(scale * ordered, true)[0],
        shift=shift,
        scale=scale,
        coverage=coverage,
        coverage_mae=float(np.mean(np.abs(coverage - taus))),
        crossing=float(np.mean(np.diff(quantiles, axis=-1) < 0.0)),
        spread_ratio=float(spread.mean() / true_spread.mean()),
        spread_correlation=(
            float('nan') if constant else float(np.corrcoef(spread, true_spread)[0, 1])),
        outer_rank=float(scipy.stats.spearmanr(ordered[:, 0], means).statistic),
    )


def scalar_bound(world: World, x: np.ndarray) -> float:
    """What knowing more than one number an item is worth, at most, with independent annotators.

    The Bayes NLL of all pairs of the items falls below the least NLL of any scalar rewards by
    this much. The scalar rewards are fitted to the exact win probabilities (Newton's method; the
    NLL is convex), so nothing is lost to learning.

    Args:
      world: where the items live.
      x: [m, 8] items.

    Returns:
      Nats a pair.
    """
    first, second = np.triu_indices(len(x), 1)
    wins = win_probability(world, np.stack([x[first], x[second]], 1), 'independent')
    rewards = np.zeros(len(x))
    for _ in range(20):
        fitted = expit(rewards[first] - rewards[second])
        error, weight = wins - fitted, fitted * (1.0 - fitted)
        slope = np.bincount(first, error, len(x)) - np.bincount(second, error, len(x))
        # The Laplacian of the weights; a constant is added along the rewards it leaves free.
        table = np.zeros((len(x), len(x)))
        table[first, second] = table[second, first] = -weight
        table -= np.diag(table.sum(axis=1))
        rewards += np.linalg.solve(table + 1.0, slope)
    lead = rewards[first] - rewards[second]
    return (expected_nll(wins, np.log(expit(lead)), np.log(expit(-lead)))
            - expected_nll(wins, np.log(wins), np.log1p(-wins)))


def atoms_log_win(quantiles: np.ndarray) -> np.ndarray:
    """log mean_ij sigma(q_i(a) - q_j(b)) of the pairs a < b of [m, N]: [m (m - 1) / 2]."""
    first, second = np.triu_indices(len(quantiles), 1)
    wins = expit(quantiles[first][:, :, None] - quantiles[second][:, None, :])
    return np.log(wins.mean(axis=(1, 2)))


def equal_win_probabilities(
    quantiles: np.ndarray, factor: float = 2.0, tolerance: float = 1e-10
) -> np.ndarray:
    """Other quantiles of the same items, with the same win probabilities and another spread.

    The quantiles of every item are stretched about their mean by `factor`; from there
    Levenberg-Marquardt steps bring every win probability back. The unknowns are the means and the
    logarithms of the distances between neighbouring quantiles, m N numbers for m (m - 1) / 2
    equations. The more items, the closer the equations come to depending on each other and the
    slower are the last digits; with 6 items they take a dozen steps. Nothing keeps the steps from
    leading back to the quantiles given, which happens where there are fewer numbers than equations.

    Args:
      quantiles: [m, N], increasing along the last axis.
      factor: by which the spread is stretched at first.
      tolerance: largest error of a log win probability, nats.

    Returns:
      [m, N], increasing, `atoms_log_win` of which equals that of `quantiles` within `tolerance`.

    Raises:
      ValueError: no such quantiles were found.
    """
    m, n = quantiles.shape
    first, second = np.triu_indices(m, 1)
    pairs = np.arange(len(first))
    target = atoms_log_win(quantiles)
    # Quantile j moves with distance k by 1{j > k}, less what that does to the mean.
    centred = (np.arange(n)[:, None] > np.arange(n - 1)) - np.arange(n - 1, 0, -1) / n

    def read(unknowns: np.ndarray) -> np.ndarray:
        return unknowns[:, :1] + np.exp(unknowns[:, 1:]) @ centred.T

    unknowns = np.column_stack(
        [quantiles.mean(axis=1), np.log(factor * np.diff(quantiles, axis=1))])
    error, damping = atoms_log_win(read(unknowns)) - target, 1e-2
    for _ in range(200):
        if np.max(np.abs(error)) <= tolerance:
            return read(unknowns)
        found = read(unknowns)
        wins = expit(found[first][:, :, None] - found[second][:, None, :])
        slopes = wins * (1.0 - wins) / wins.sum(axis=(1, 2), keepdims=True)
        jacobian = np.zeros((len(first), m, n))
        jacobian[pairs, first] = slopes.sum(axis=2)
        jacobian[pairs, second] = -slopes.sum(axis=1)
        jacobian = np.concatenate(
            [jacobian.sum(axis=2, keepdims=True), jacobian @ centred * np.exp(unknowns[:, 1:])],
            axis=2).reshape(len(first), m * n)
        normal = jacobian @ jacobian.T + damping * np.eye(len(first))
        step = -(jacobian.T @ np.linalg.solve(normal, error)).reshape(m, n)
        after = atoms_log_win(read(unknowns + step)) - target
        if np.sum(after**2) < np.sum(error**2):
            unknowns, error, damping = unknowns + step, after, damping / 5.0
        else:
            damping *= 4.0
    raise ValueError(f'no quantiles with the win probabilities of these {m} x {n} were found from '
                     f'a spread of {factor} times theirs: {np.max(np.abs(error)):.1e} nats off')


def _bent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Variance 1 for independent u, v ~ N(0, 1)."""
    return (u + _BEND * np.sin(v)) / _BENT_SCALE


def _shifted_distance(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """(least mean |predicted + shift - true|, that shift): the median of the differences."""
    shift = float(np.median(true - predicted))
    return float(np.mean(np.abs(predicted + shift - true))), shift


def _best_scale(predicted: np.ndarray, true: np.ndarray) -> float:
    """The scale >= 0 of the least distance, a convex function of it once the shift is the best."""
    largest = 2.0 * np.std(true) / max(np.std(predicted), 1e-12)
    return float(scipy.optimize.minimize_scalar(
        lambda scale: _shifted_distance(scale * predicted, true)[0], bounds=(0.0, largest),
        method='bounded', options={'xatol': 1e-5 * largest}).x)


def _check_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f'scheme {scheme!r}, expected one of {SCHEMES}')
