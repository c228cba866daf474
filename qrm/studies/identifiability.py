"""What quantiles from preferences mean: each objective against rewards whose distribution is known.

A model of `mlp` is trained on pairs of a world, and its quantiles are compared with the true ones.
A cell is a kind of model under a scheme of annotation on a number of pairs, over several seeds;
each is kept in a file of its own, so that a run that was stopped goes on at the next cell.

Axes: S seeds, P test pairs, m test items, N levels tau.
"""

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy

from qrm.rewards import distributions, heads, losses
from qrm.rewards.distributions import Distribution
from qrm.rewards.heads import QUANTILE_HEADS, HeadConfig
from qrm.rewards.losses import LossConfig
from qrm.studies import figures, mlp, worlds
from qrm.studies.mlp import Model, Training
from qrm.studies.worlds import World
from qrm.training import schema, workdir
from qrm.training.schema import (
    AT_LEAST_ONE,
    LEVEL,
    NOT_NEGATIVE,
    POSITIVE,
    Each,
    Key,
    Range,
    Table,
)

LEVELS = heads.taus(10)  # at which all models are compared with the truth

# Streams of random numbers, apart from those of the training pairs of seeds 0, 1, ...
_TEST, _ANCHORS, _ITEMS = 1_000_000, 2_000_000, 3_000_000
# About the quartiles of all ratings, where Fang et al. 2026 (arXiv:2605.11865) put two anchors.
_THRESHOLDS = (-0.9, 0.8)
_FEW = 0.01  # share of items that are rated where few are
_EQUAL_ITEMS = 6  # of the construction with equal win probabilities
_BOUND_ITEMS = 150  # whose pairs say what more than one number an item is worth
_DRAWN_ITEMS = 300  # of a figure

KEYS: Table = {
    'seed': Key(0, NOT_NEGATIVE, 'of the world and all that is drawn'),
    'seeds': Key(
        5, Range(2), 'models of a row, each with pairs, parameters and batches of its own'),
    'pairs': Key(40_000, AT_LEAST_ONE, 'that each model learns from in the main tables'),
    'annotators': Key(10, Range(2), 'known ones, where annotators have names'),
    'networks': Key(4, AT_LEAST_ONE, 'of the ensemble'),
    'test_pairs': Key(
        4000, Range(100), 'whose items and win probabilities models are compared on'),

    # --- Training of all models: Adam, two hidden layers -----------------------------------------
    'passes': Key(10.0, POSITIVE, 'over the pairs'),
    'batch_size': Key(512, AT_LEAST_ONE, 'pairs of a step'),
    'learning_rate': Key(5e-3, NOT_NEGATIVE, 'at the start; it falls to 0 along a cosine'),
    'width': Key(64, AT_LEAST_ONE, 'of a hidden layer'),

    # --- Which cells, and intervals: may change in a folder that has results ---------------------
    'reproduce.sizes': Key(
        (10_000, 40_000, 160_000), Each(int, AT_LEAST_ONE), 'pairs, of the rows below'),
    'reproduce.growth': Key(
        ('independent/label', 'independent/monotone', 'shared/gaussian',
         'identified/anchor_after', 'ratings/pinball'), Each(str),
        "rows that are trained on all sizes, 'table/row' as in `kinds`"),
    'analysis.level': Key(0.95, LEVEL, 'of the intervals over seeds'),
}


class Kind(NamedTuple):
    """A row of a table.

    Attributes:
      label: what it is, in words.
      model: what is trained.
      anchors: how one rated item of each annotator is used: '' not at all, 'loss' in every step,
        'after' to shift the annotator's rewards once the model is trained.
      rated: share of the items of pairs that an annotator of their own rates.
    """

    label: str
    model: Model
    anchors: str = ''
    rated: float = 0.0


class Cell(NamedTuple):
    """What is measured at once: kind `kind` of table `table` (see `kinds`) on `pairs` pairs."""

    table: str
    kind: str
    pairs: int

    @property
    def scheme(self) -> str:
        """Of `worlds.SCHEMES`; rated items have annotators of their own."""
        return 'independent' if self.table == 'ratings' else self.table

    @property
    def name(self) -> str:
        return f'{self.table}-{self.kind}-{self.pairs}'


TITLES = {
    'independent': 'Labels, an annotator of its own for each side',
    'shared': 'Labels, one annotator judges both sides of a pair',
    'identified': 'Labels, one of a few known annotators judges both sides',
    'ratings': 'A rating of each item',
}
# Metric -> heading of its column, digits.
METRICS = {
    'accuracy': ('accuracy', 3),
    'nll_excess': ('NLL - Bayes', 4),
    'w1_shift': ('W1, shift', 3),
    'w1_affine': ('W1, affine', 3),
    'coverage_mae': ('coverage MAE', 3),
    'crossing': ('crossing', 3),
    'spread_ratio': ('spread ratio', 2),
    'spread_correlation': ('spread correlation', 2),
    'outer_rank': ('Spearman(q.05, mean)', 3),
}


# Whose spreads are compared with each other: (table, kind).
_ANCHORED = (
    ('identified', 'anchor_after'), ('independent', 'gaussian_anchored'),
    ('independent', 'gaussian_few'), ('independent', 'thurstone_anchored'),
    ('shared', 'gaussian_anchored'), ('shared', 'thurstone_anchored'), ('ratings', 'pinball'))


class Tolerance(NamedTuple):
    """A published number: `metric` of a cell is at most, or at least, `bound`."""

    label: str
    cell: Cell
    metric: str
    at_most: bool
    bound: float


def tolerances(config: Any) -> list[Tolerance]:
    """What is expected of models trained with the settings of the configs."""
    rated, most = Cell('ratings', 'pinball', config.pairs), max(config.reproduce.sizes)
    return [
        Tolerance('ratings: W1 after shift', rated, 'w1_shift', True, 0.06),
        Tolerance('ratings: coverage MAE', rated, 'coverage_mae', True, 0.01),
        Tolerance('ratings: spread correlation', rated, 'spread_correlation', False, 0.98),
        Tolerance(f'distributional BT, {most:,} pairs: spread correlation',
                  Cell('independent', 'monotone', most), 'spread_correlation', False, 0.7),
        Tolerance(f'distributional BT, {most:,} pairs: W1 after affine map',
                  Cell('independent', 'monotone', most), 'w1_affine', True, 0.32),
        Tolerance('EMA target (control): spread ratio',
                  Cell('independent', 'teacher', config.pairs), 'spread_ratio', True, 0.05),
        Tolerance('one annotator a pair, monotone: spread correlation',
                  Cell('shared', 'monotone', config.pairs), 'spread_correlation', True, 0.3),
        Tolerance('one annotator a pair, Gaussian: spread correlation',
                  Cell('shared', 'gaussian', config.pairs), 'spread_correlation', True, 0.3),
    ]


def kinds(config: Any) -> dict[str, dict[str, Kind]]:
    """Table -> name -> kind of model."""

    def quantile(objective: str, head: str = 'quantile', **constants: Any) -> Model:
        return Model(HeadConfig(head), LossConfig(objective, **constants))

    paper, whole = 'bradley_terry_quantile_huber', 'distributional_bradley_terry'
    scalar = Kind('BT, scalar', quantile('bradley_terry', 'scalar'))
    label = Kind('BT + QH, target ±1', quantile(paper))
    monotone = Kind('distributional BT, monotone', quantile(whole, 'monotone_quantile'))
    gaussian = Kind('distributional BT, Gaussian', quantile(whole, 'gaussian'))
    thurstone = Kind('Thurstone, Gaussian', quantile('thurstone', 'gaussian'))
    gaussian_anchored, thurstone_anchored = (
        kind._replace(label=f'{kind.label}, two anchors', rated=1.0, model=dataclasses.replace(
            kind.model, loss=dataclasses.replace(kind.model.loss, thresholds=_THRESHOLDS)))
        for kind in (gaussian, thurstone))
    panel = Model(HeadConfig('annotator', annotators=tuple(map(str, range(config.annotators)))),
                  LossConfig('annotator_bradley_terry'))
    return {
        'independent': {
            'scalar': scalar,
            'label': label,
            'margin': Kind('BT + QH, target other side ±1', quantile(paper, targets='margin')),
            'teacher': Kind('BT + QH, EMA target (control)', quantile(paper, targets='teacher')),
            'per_quantile': Kind('BT per quantile (control)', quantile('quantile_bradley_terry')),
            'monotone': monotone,
            'free': Kind('distributional BT, free', quantile(whole)),
            'implicit': Kind('distributional BT, implicit', quantile(whole, 'implicit_quantile')),
            'gaussian': gaussian,
            'categorical': Kind('distributional BT, 21 atoms', quantile(whole, 'categorical')),
            'posterior': Kind('posterior quantile regression, free', quantile(
                'posterior_quantile_regression')),
            'posterior_monotone': Kind('posterior quantile regression, monotone', quantile(
                'posterior_quantile_regression', 'monotone_quantile')),
            'ensemble': Kind(f'distributional BT, Gaussian, {config.networks} networks',
                             dataclasses.replace(gaussian.model, networks=config.networks)),
            'thurstone': thurstone,
            'thurstone_anchored': thurstone_anchored,
            'gaussian_anchored': gaussian_anchored,
            'gaussian_few': gaussian_anchored._replace(
                label=f'{gaussian_anchored.label}, {_FEW:.0%} rated', rated=_FEW),
        },
        'shared': {
            'scalar': scalar, 'label': label, 'monotone': monotone, 'gaussian': gaussian,
            'thurstone_anchored': thurstone_anchored, 'gaussian_anchored': gaussian_anchored,
        },
        'identified': {
            'monotone': monotone._replace(label=f'{monotone.label}, names unused'),
            'annotator': Kind('BT per annotator, no anchor', panel),
            'anchor_loss': Kind('BT per annotator, anchors in the loss', panel, 'loss'),
            'anchor_after': Kind('BT per annotator, anchored after training', panel, 'after'),
        },
        'ratings': {
            'pinball': Kind('pinball', quantile('ratings_pinball')),
            'implicit': Kind('pinball, implicit', quantile('ratings_pinball', 'implicit_quantile')),
            'huber': Kind('QH, κ = 1', quantile('ratings_quantile_huber')),
            'crps': Kind('CRPS, Gaussian', quantile('ratings_crps', 'gaussian')),
            'ordinal': Kind('three classes of ratings, Gaussian', quantile(
                'ratings_ordinal', 'gaussian', thresholds=_THRESHOLDS)),
        },
    }


def identify(config: Any, folder: str) -> str:
    """Runs the whole experiment in `folder`; goes on where an earlier run stopped.

    Leaves `cells/`, one file for each cell, and `identifiability.json`, `identifiability.md` and
    `figures/`.

    Returns:
      The report as Markdown.

    Raises:
      ConfigError: a value that cannot be used.
      WorkdirError: the folder holds a run with other settings, or one that is going on.
    """
    check(config)
    with workdir.lock(folder):
        workdir.check_claim(folder, config)
        workdir.claim(folder, config)
        os.makedirs(os.path.join(folder, 'cells'), exist_ok=True)
        world, found = worlds.make(config.seed), {}
        for number, cell in enumerate(cells(config), 1):
            path = os.path.join(folder, 'cells', f'{cell.name}.json')
            if not os.path.exists(path):
                start = time.perf_counter()
                workdir.write_json(path, measure(config, world, cell))
                print(f'{number}/{len(cells(config))} {cell.name}: '
                      f'{time.perf_counter() - start:.0f} s', flush=True)
            found[cell] = workdir.read_json(path)
        result = summarise(config, world, found)
        text = format_report(config, result)
        workdir.write_json(os.path.join(folder, 'identifiability.json'), result)
        workdir.write_text(os.path.join(folder, 'identifiability.md'), text)
        figures.draw_identifiability(folder, result)
    return text


def check(config: Any) -> None:
    """Checks the values of a config.

    Raises:
      ConfigError: lists every value that cannot be used.
    """
    schema.check(config, KEYS)
    problems = []
    known = [f'{table}/{name}' for table, rows in kinds(config).items() for name in rows]
    problems += [f'config.reproduce.growth: {name!r}, expected some of {known}'
                 for name in config.reproduce.growth if name not in known]
    if not config.reproduce.sizes:
        problems.append('config.reproduce.sizes=(), expected at least one number of pairs')
    schema.raise_all(problems)


def cells(config: Any) -> list[Cell]:
    """All cells: every kind on `pairs` pairs, and those of `growth` on every size."""
    main = [Cell(table, kind, config.pairs) for table, rows in kinds(config).items()
            for kind in rows]
    growth = [Cell(*name.split('/'), size) for size in sorted(config.reproduce.sizes)
              for name in config.reproduce.growth]
    return list(dict.fromkeys(main + growth))


# ---------------------------------------------------------------------------------------------
# One cell


def measure(config: Any, world: World, cell: Cell) -> dict[str, Any]:
    """Trains the models of a cell and compares them with the truth.

    Args:
      config: of the experiment.
      world: the truth.
      cell: what.

    Returns:
      'metrics': metric -> [S] values, null where there is none; 'coverage': [S, N]; and of some
      items of the first seed, for a figure, 'spread' and 'true_spread', standard deviations.
    """
    kind = kinds(config)[cell.table][cell.kind]
    params = fit(config, world, cell, kind)
    x, judges = _test_items(config)
    wins = worlds.win_probability(world, x.reshape(-1, 2, worlds.FEATURES), cell.scheme, judges,
                                  config.annotators)
    bayes = worlds.expected_nll(wins, np.log(wins), np.log1p(-wins))
    metrics, coverage = {name: [] for name in METRICS}, []
    for seed in range(config.seeds):
        own = jax.tree.map(lambda a, seed=seed: a[seed:seed + 1], params)
        predicted = mlp.predict(kind.model, own, x)
        if kind.anchors == 'after':
            predicted = anchored(config, world, kind.model, own, seed, predicted)
        quantiles = predicted.quantile(jnp.asarray(LEVELS))[0]
        if kind.model.head.name in QUANTILE_HEADS and kind.model.networks == 1:
            quantiles = mlp.quantiles(kind.model, own, x)[0]  # in the order of tau: may cross
        match = worlds.match(world, x, np.asarray(quantiles), LEVELS)
        win, loss = log_wins(kind.model, jax.tree.map(lambda a: a[0], predicted), judges)
        values = match._asdict() | {
            'accuracy': worlds.expected_accuracy(wins, win - loss),
            'nll_excess': worlds.expected_nll(wins, win, loss) - bayes,
        }
        for name in METRICS:
            metrics[name].append(values[name] if math.isfinite(values[name]) else None)
        coverage.append(match.coverage.tolist())
        if seed == 0:
            spread = np.asarray(quantiles).std(axis=-1)
    drawn = slice(_DRAWN_ITEMS)
    return {
        'metrics': metrics,
        'coverage': coverage,
        'spread': spread[drawn].tolist(),
        'true_spread': world.quantile(x[drawn], LEVELS).std(axis=-1).tolist(),
    }


def fit(config: Any, world: World, cell: Cell, kind: Kind) -> mlp.Params:
    """Trains the models of a cell, each on pairs of its own: leading axes [S, E]."""
    data = mlp.stack([_data(config, world, cell, kind, config.seed + seed)
                      for seed in range(config.seeds)])
    always = None
    if kind.anchors == 'loss':
        always = mlp.stack([mlp.anchors(*_anchors(config, world, seed))
                            for seed in range(config.seeds)])
    training = Training(max(1, round(cell.pairs * config.passes / config.batch_size)),
                        config.batch_size, config.learning_rate, config.width)
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    return mlp.train(kind.model, training, data, keys, always)


def _data(config: Any, world: World, cell: Cell, kind: Kind, seed: int) -> mlp.Comparisons:
    """What one model of a cell learns from."""
    pairs = worlds.sample_pairs(world, cell.scheme, cell.pairs, seed, config.annotators)
    if cell.table == 'ratings':
        return mlp.comparisons(pairs, pairs.rewards)
    if kind.rated:
        return mlp.comparisons(pairs, worlds.sample_ratings(world, pairs.x, seed, kind.rated))
    return mlp.comparisons(pairs)


def anchored(config: Any, world: World, model: Model, params: mlp.Params, seed: int,
             predicted: Distribution) -> Distribution:
    """Shifts the rewards of every annotator by what its anchor was rated above its prediction."""
    x, ratings = _anchors(config, world, seed)
    own = jnp.diagonal(mlp.predict(model, params, x).values[0])
    return distributions.uniform_atoms(predicted.values + (ratings - own))


def log_wins(model: Model, predicted: Distribution, judges: np.ndarray):
    """Log-probabilities that the first and that the second item of a pair is preferred.

    Args:
      model: which says what a win probability is.
      predicted: distributions [2 P] of items, those of a pair one after the other.
      judges: [P] who judges; read by models with annotators.

    Returns:
      ([P], [P]) float64.
    """
    first, second = (jax.tree.map(lambda a, side=side: a[side::2], predicted) for side in (0, 1))
    if model.head.name == 'annotator':
        first, second = (
            jnp.take_along_axis(side.values, jnp.asarray(judges)[:, None], axis=-1)[:, 0]
            for side in (first, second))
        both = jax.nn.log_sigmoid(first - second), jax.nn.log_sigmoid(second - first)
    else:
        both = (losses.log_win_probability(model.loss, first, second),
                losses.log_win_probability(model.loss, second, first))
    return tuple(np.asarray(one, np.float64) for one in both)


def _test_items(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """([2 P, 8] items, those of a pair one after the other, [P] who judges if they are known)."""
    judges = np.random.default_rng((config.seed, _TEST)).integers(
        0, config.annotators, config.test_pairs)
    return worlds.sample_items(config.seed + _TEST, 2 * config.test_pairs), judges


def _anchors(config: Any, world: World, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return worlds.sample_anchors(world, config.annotators, config.seed + _ANCHORS + seed)


# ---------------------------------------------------------------------------------------------
# All cells


def summarise(config: Any, world: World, found: Mapping[Cell, Any]) -> dict[str, Any]:
    """All numbers of the report, ready for JSON.

    Args:
      config: of the experiment.
      world: the truth.
      found: what `measure` returned for every cell.
    """
    all_kinds = kinds(config)
    rows = [
        cell._asdict() | {'label': all_kinds[cell.table][cell.kind].label}
        | {'metrics': {name: interval(values, config.analysis.level)
                       for name, values in one['metrics'].items()}}
        | {'coverage': np.mean(one['coverage'], axis=0).tolist(),
           'spread': one['spread'], 'true_spread': one['true_spread']}
        for cell, one in found.items()
    ]
    by_cell = dict(zip(found, rows, strict=True))
    return {
        'rows': rows,
        'levels': LEVELS.tolist(),
        'truth': truth(config, world),
        'equal_win_probabilities': equal_win_probabilities(config, world),
        'agreement': agreement({(cell.table, cell.kind): row for cell, row in by_cell.items()
                                if cell.pairs == config.pairs}),
        'tolerances': [_met(t.label, by_cell[t.cell]['metrics'][t.metric]['mean'], t.bound,
                            t.at_most) for t in tolerances(config) if t.cell in by_cell]
        + population_tolerances(config.seed),
        'settings': {'seeds': config.seeds, 'pairs': config.pairs, 'level': config.analysis.level,
                     'passes': config.passes, 'test_pairs': config.test_pairs,
                     'annotators': config.annotators},
    }


def interval(values: Sequence[float | None], level: float) -> dict[str, Any]:
    """Mean over seeds with Student's t interval, in the units of the values.

    The seeds draw pairs, initial parameters and batches anew; the world and the test items are
    the same. All entries but 'seeds' are None if a value is missing.
    """
    if None in values:
        return {'mean': None, 'low': None, 'high': None, 'seeds': list(values)}
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(scipy.stats.t.ppf(0.5 + 0.5 * level, len(values) - 1)) * error
    return {'mean': mean, 'low': mean - half, 'high': mean + half, 'seeds': list(values)}


def truth(config: Any, world: World) -> dict[str, Any]:
    """What is true of the test pairs, and the best that can be reached on them.

    'bayes' of each scheme: accuracy and NLL (nats); 'mean_spread', the mean standard deviation of
    the true quantiles; 'w1_of_means', W1 of point masses at the true means; 'scalar_bound', what
    more than one number an item is worth (nats a pair).
    """
    x, judges = _test_items(config)
    bayes = {}
    for scheme in worlds.SCHEMES:
        wins = worlds.win_probability(world, x.reshape(-1, 2, worlds.FEATURES), scheme, judges,
                                      config.annotators)
        bayes[scheme] = {'accuracy': worlds.expected_accuracy(wins, wins - 0.5),
                         'nll': worlds.expected_nll(wins, np.log(wins), np.log1p(-wins))}
    means = np.repeat(world.mean(x)[:, None], len(LEVELS), axis=1)
    return {
        'bayes': bayes,
        'mean_spread': float(world.quantile(x, LEVELS).std(axis=-1).mean()),
        'w1_of_means': worlds.match(world, x, means, LEVELS).w1_shift,
        'scalar_bound': worlds.scalar_bound(
            world, worlds.sample_items(config.seed + _ITEMS, _BOUND_ITEMS)),
    }


def agreement(rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pearson's correlations of the spreads of some items, by models that are anchored.

    One number of each named annotator, classes of ratings beside preferences, and ratings alone
    each fix what preferences leave open: those that work find the same spreads.

    Args:
      rows: of (table, kind), with 'spread' and 'true_spread'.

    Returns:
      A row for each: 'table', 'label', 'with' (each of them in the same order, then the truth).
    """
    chosen = [rows[key] for key in _ANCHORED]
    spreads = [row['spread'] for row in chosen] + [chosen[0]['true_spread']]
    table = np.corrcoef(spreads)
    return [{'table': row['table'], 'label': row['label'], 'with': values.tolist()}
            for row, values in zip(chosen, table, strict=False)]


def equal_win_probabilities(config: Any, world: World) -> dict[str, Any]:
    """Two sets of quantiles of some items that no number of labels can tell apart."""
    x = worlds.sample_items(config.seed + _ITEMS, _EQUAL_ITEMS)
    true = world.quantile(x, LEVELS)
    other = worlds.equal_win_probabilities(true)
    gap = np.abs(worlds.atoms_log_win(true) - worlds.atoms_log_win(other)).max()
    return {'quantiles': true.tolist(), 'other': other.tolist(), 'largest_difference': float(gap),
            'spread_ratio': float(other.std(axis=1).mean() / true.std(axis=1).mean())}


def population_tolerances(seed: int) -> list[dict[str, Any]]:
    """Published numbers of quantile regression itself, without a network."""
    rng = np.random.default_rng((seed, _ITEMS))
    many, few = rng.standard_normal(10_000), rng.standard_normal(4096)
    midpoints = scipy.stats.norm.ppf(LEVELS.astype(np.float64))
    rows = [
        _met('quantiles of 10,000 draws of N(0, 1): largest error',
             float(np.abs(fit_quantiles(many) - midpoints).max()), 0.06, True),
        _met('pinball by gradient descent against np.quantile, 4096 draws: largest difference',
             float(np.abs(fit_quantiles(few) - np.quantile(few, LEVELS)).max()), 0.01, True),
    ]
    for kappa, expected in ((1.0, -1.309), (0.5, -1.448), (0.1, -1.601), (0.01, -1.640)):
        value = huber_minimiser(0, kappa)
        rows.append({'label': f'minimiser of quantile Huber, τ = .05, κ = {kappa:g}, N(0, 1)',
                     'value': value, 'expected': f'{expected:.3f} ± .005',
                     'met': abs(value - expected) <= 0.005})
    return rows


def fit_quantiles(samples: np.ndarray) -> np.ndarray:
    """[N] quantiles of the samples, by gradient descent on `losses.pinball`."""
    samples = jnp.asarray(samples, jnp.float32)
    loss = jax.vmap(losses.pinball, in_axes=(None, None, 0))
    gradient = jax.grad(lambda q: jnp.mean(loss(q, jnp.asarray(LEVELS), samples)))
    # The slopes jump at every sample: steps that shrink settle between two of them.
    optimizer = optax.sgd(optax.cosine_decay_schedule(4.0, 300))

    def step(carry, _):
        quantiles, state = carry
        updates, state = optimizer.update(gradient(quantiles), state)
        return (quantiles + updates, state), None

    start = jnp.zeros(len(LEVELS))
    return np.asarray(jax.lax.scan(step, (start, optimizer.init(start)), length=300)[0][0])


def huber_minimiser(index: int, kappa: float) -> float:
    """Where quantile number `index` of N(0, 1) stands at the minimum of `losses.quantile_huber`."""
    z = np.linspace(-9.0, 9.0, 4001, dtype=np.float32)
    density = scipy.stats.norm.pdf(z) * (z[1] - z[0])
    loss = jax.vmap(lambda q, t: losses.quantile_huber(q, jnp.asarray(LEVELS), t, kappa=kappa),
                    in_axes=(None, 0))
    slope = jax.jit(jax.grad(lambda q: jnp.sum(loss(q, z) * density)))
    return float(scipy.optimize.brentq(
        lambda q: float(slope(jnp.full(len(LEVELS), q))[index]), -5.0, 5.0, xtol=1e-4))


def _met(label: str, value: float | None, bound: float, at_most: bool) -> dict[str, Any]:
    met = value is not None and (value <= bound if at_most else value >= bound)
    return {'label': label, 'value': value, 'expected': f'{"≤" if at_most else "≥"} {bound:g}',
            'met': met}


# ---------------------------------------------------------------------------------------------
# The report


def format_report(config: Any, result: Mapping[str, Any]) -> str:
    """Markdown of `summarise`."""
    rows, true = result['rows'], result['truth']
    main = [row for row in rows if row['pairs'] == config.pairs]
    parts = [
        '# What quantiles from preferences mean',
        _introduction(config, result),
    ]
    for table, title in TITLES.items():
        bayes = true['bayes']['independent' if table == 'ratings' else table]
        parts += [f'## {title}: {config.pairs:,} pairs',
                  _table(['model', *(heading for heading, _ in METRICS.values())],
                         [[row['label'], *(_cell(row['metrics'][name], digits)
                                           for name, (_, digits) in METRICS.items())]
                          for row in main if row['table'] == table]),
                  f'Best possible: accuracy {bayes["accuracy"]:.3f}, NLL {bayes["nll"]:.4f} nats.']
    parts += [
        '## Coverage of each level, after the best common shift',
        _table(['model', *(f'τ = {tau:.2f}' for tau in LEVELS)],
               [[f'{TITLES[row["table"]].split(",")[0].lower()}: {row["label"]}',
                 *(f'{value:.3f}' for value in row['coverage'])]
                for row in main if row['table'] in ('independent', 'ratings')]),
        '## How it moves with the number of pairs',
        _growth(config, rows),
        '## Do anchored models agree?',
        _agreement(result['agreement']),
        '## Equal win probabilities, different spreads',
        _equal(result['equal_win_probabilities']),
        '## Published tolerances',
        _table(['what', 'expected', 'measured', 'met'],
               [[row['label'], row['expected'],
                 '-' if row['value'] is None else f'{row["value"]:.4g}',
                 'yes' if row['met'] else '**no**'] for row in result['tolerances']]),
        '## How to read this',
        _NOTES.format(bound=true['scalar_bound']),
    ]
    return '\n\n'.join(parts) + '\n'


_NOTES = """\
W1, coverage and spread compare quantiles at the levels τ = .05, .15, …, .95 with the true ones at
the same levels, so exact quantiles score 0, a ratio of 1 and a correlation of 1. Preferences leave
the zero of rewards open, hence the shift; their unit is that of the logistic noise, which the
affine map lets go too. NLL and accuracy are expectations over the labels of the test pairs, whose
probabilities are known, and so have no noise of labels in them. Intervals are Student's t over
seeds, and may pass the ends of a scale; the world and the test items are the same for all.

- Accuracy cannot tell the rows apart. All that more than one number an item can add is
  {bound:.4f} nats a pair: the Bayes NLL against that of the best scalar rewards.
- Target ±1: every quantile is a function of the win rate, so the lowest ranks items as the mean
  does (last column), and the spread has nothing to do with the true one.
- Per-quantile BT: every quantile fits the same win rates, so they can differ by constants only.
  Heads here have no bias that could hold such constants, and the quantiles fall together.
- The likelihood of distributional BT does not know the order of the atoms, so a free head keeps
  the order in which it happened to start: half of the neighbours cross. All else is computed from
  the sorted quantiles.
- Posterior quantile regression takes fixed-point steps, which move the spread slowly, that of the
  monotone head most of all. Pinball puts the quantiles of the free head in order.
- The spread of distributional BT is that of a model of the noise, and of few bits: it differs
  much between seeds, and depends on the head; the implicit one, which learns a spread from
  ratings, finds next to none here. Where one annotator judges both sides, the same model gives
  a spread that means nothing; even the sign of its correlation with the true one differs
  between seeds.
- With names of annotators the differences between items are known for each annotator, and one
  number each is missing. One rated item gives it: as a shift after training. In the loss, beside
  the pairs, the network can fit the few anchors as such and leave the number open.
- Two anchors: an annotator of its own sorts every item into three classes, by two thresholds that
  are known, beside the preferences. Thurstone's law has no logistic noise, and takes that of the
  choices for spread. The classes alone stand under ratings.
- Ratings show the distribution itself, and quantile regression finds it. Quantile Huber draws the
  outer quantiles in by an amount that grows with κ.\
"""


def _introduction(config: Any, result: Mapping[str, Any]) -> str:
    true = result['truth']
    return (
        f'A world in which the reward distribution of every item is known '
        f'(`qrm/studies/worlds.py`), and perceptrons with two hidden layers of {config.width} and '
        f'the heads and losses of the language models (`qrm/studies/mlp.py`). '
        f'{config.seeds} seeds; means with {config.analysis.level:.0%} intervals (of Student, over '
        f'seeds); {config.test_pairs:,} test pairs. The mean spread of the true quantiles is '
        f'{true["mean_spread"]:.3f}, and point masses at the true means have W1 '
        f'{true["w1_of_means"]:.3f}.'
    )


def _growth(config: Any, rows: Sequence[Mapping[str, Any]]) -> str:
    names = ('w1_affine', 'coverage_mae', 'spread_ratio', 'spread_correlation', 'nll_excess')
    chosen = [row for name in config.reproduce.growth for row in rows
              if f'{row["table"]}/{row["kind"]}' == name
              and row['pairs'] in config.reproduce.sizes]
    return _table(
        ['annotation', 'model', 'pairs', *(METRICS[name][0] for name in names)],
        [[row['table'], row['label'], f'{row["pairs"]:,}',
          *(_cell(row['metrics'][name], METRICS[name][1]) for name in names)]
         for row in sorted(chosen, key=lambda row: (row['table'], row['kind'], row['pairs']))])


def _agreement(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [f'{row["table"]}: {row["label"]}' for row in rows]
    return (
        f"Pearson's correlation of the spreads of {_DRAWN_ITEMS} items, one model of each kind.\n\n"
        + _table(['', *(f'({i})' for i in range(1, len(rows) + 1)), 'the truth'],
                 [[f'({i}) {name}', *(f'{value:.2f}' for value in row['with'])]
                  for i, (name, row) in enumerate(zip(names, rows, strict=True), 1)]))


def _equal(equal: Mapping[str, Any]) -> str:
    rows = zip(np.std(equal['quantiles'], axis=1), np.std(equal['other'], axis=1), strict=True)
    return (
        f'{len(equal["quantiles"])} items of the world, and other quantiles for them with which '
        f'every pair has the same win probability (largest difference of its logarithm '
        f'{equal["largest_difference"]:.0e} nats). Their spreads differ by x '
        f'{equal["spread_ratio"]:.2f} in the mean. No number of labels tells the two apart.\n\n'
        + _table(['item', 'true spread', 'other spread', 'ratio'],
                 [[str(item), f'{one:.3f}', f'{other:.3f}', f'{other / one:.2f}']
                  for item, (one, other) in enumerate(rows)]))


def _cell(value: Mapping[str, Any], digits: int) -> str:
    if value['mean'] is None:
        return '-'
    mean, low, high = (_rounded(value[key], digits) for key in ('mean', 'low', 'high'))
    return f'{mean} [{low}, {high}]'


def _rounded(value: float, digits: int) -> str:
    text = f'{value:.{digits}f}'
    return text if float(text) else text.lstrip('-')


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ['---'] * len(heading), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
