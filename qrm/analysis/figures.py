"""Figures of predictions and of training: for reproductions and diagnostics.

Functions that take `axes` draw one panel and can be reused elsewhere; the `draw_*` functions
arrange panels. Axes of arrays: n ordered pairs, N quantiles.
"""

import io
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import scipy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qrm.analysis.diagnostics import MIN_ITEMS
from qrm.analysis.verdict import conclusion
from qrm.rewards import statistics
from qrm.rewards.metrics import Predictions
from qrm.training import workdir

# Okabe & Ito's colours, which colour-blind readers can tell apart.
CHOSEN, REJECTED = '#0072B2', '#D55E00'
INK, FAINT, PALE = '#222222', '#8C8C8C', '#BFBFBF'
COLORS = (CHOSEN, REJECTED, '#009E73', '#CC79A7', '#E69F00', '#56B4E9')

_NAMES = {'nll': 'NLL (nats)', 'loss': 'loss (of the objective)'}

_DPI = 130
_WIDTH, _HEIGHT = 4.6, 3.0  # of a panel, inches
_BINS = 40
_GRID = 512
_TITLE_WIDTH = 110  # characters of a title over two columns
_TAIL = 4.0  # bandwidths beyond the outermost values: cuts 3e-5 of a kernel
_WINDOWS = 20  # a smoothed curve averages over one in so many of its points
_POINTS = 2000  # most that a panel shows of the responses
_SHARES = 10  # of the responses, by reward, over which a mean spread is taken

# (workload, model) -> predictions on the test pairs of the workload.
Runs = Mapping[tuple[str, str], Predictions]


def draw_all(folder: str, runs: Runs) -> None:
    """Draws all figures of a reproduction as PNGs in `<folder>/figures/`.

    There is no figure of outer quantiles if no run has more than one quantile.

    Args:
      folder: holds the folder `<workload>-<model>` of each run, from which metrics are read.
      runs: predictions on the test pairs.
    """
    figures = {
        'figure2_reward_densities': draw_reward_densities(runs),
        'training_curves': draw_training_curves({
            f'{workload}, {model}': workdir.read_metrics(
                os.path.join(folder, f'{workload}-{model}'))
            for workload, model in runs
        }),
    }
    quantile_runs = {workload if model == 'quantile' else f'{workload}, {model}': p
                     for (workload, model), p in runs.items() if len(p.taus) > 1}
    if quantile_runs:
        figures['figure3_outer_quantiles'] = draw_outer_quantiles(quantile_runs)
    save(folder, figures)


def save(folder: str, figures: Mapping[str, Figure]) -> None:
    """Writes figures, by name, as PNGs into `<folder>/figures/`."""
    os.makedirs(os.path.join(folder, 'figures'), exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(os.path.join(folder, 'figures', f'{name}.png'), dpi=_DPI)


def svg(draw: Callable[[Axes], None]) -> str | None:
    """A panel by itself, as SVG whose texts are text; None if nothing was drawn into it."""
    figure, panels = grid(1, 1)
    draw(panels[0, 0])
    if not panels[0, 0].has_data():
        return None
    file = io.StringIO()
    # Without a date and random ids the same numbers give the same file.
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'qrm'}):
        figure.savefig(file, format='svg', metadata={'Date': None})
    return file.getvalue()


def draw_reward_densities(runs: Runs) -> Figure:
    """A row of panels for each workload, a column for each model (the paper's figure 2).

    The panels of a row have the same scale of rewards, as the models differ in it.
    """
    workloads = list(dict.fromkeys(workload for workload, _ in runs))
    columns = list(dict.fromkeys(model for _, model in runs))
    figure, panels = grid(len(workloads), len(columns), sharex='row')
    for (workload, model), predictions in runs.items():
        axes = panels[workloads.index(workload), columns.index(model)]
        reward_densities(axes, predictions)
        axes.set_title(f'{workload}, {model}, n = {len(predictions.chosen)} pairs',
                       fontsize='medium')
    hide_empty(panels)
    figure.suptitle('Rewards of test responses')
    return figure


def draw_outer_quantiles(runs: Mapping[str, Predictions]) -> Figure:
    """A row of two panels, lowest and highest quantile, for each workload (figure 3).

    Args:
      runs: workload -> predictions with N > 1 quantiles.
    """
    figure, panels = grid(len(runs), 2, sharex='row')
    for row, (workload, predictions) in zip(panels, runs.items(), strict=True):
        for axes, index in zip(row, (0, len(predictions.taus) - 1), strict=True):
            outer_quantile(axes, predictions, index)
            axes.set_title(f'{workload}, {axes.get_title()}', fontsize='medium')
    figure.suptitle('Outer quantiles of test responses')
    figure.supxlabel('Preferences identify win probabilities only: the distance between the '
                     'quantiles is not the uncertainty of the reward.', fontsize='medium')
    return figure


def draw_training_curves(rows_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss and accuracy over the steps, a row of two panels for each run.

    Args:
      rows_of: title -> rows of `metrics.jsonl`.
    """
    figure, panels = grid(len(rows_of), 2, height=2.2, sharex='row', sharey='col')
    for row, (title, rows) in zip(panels, rows_of.items(), strict=True):
        for axes, keys in zip(row, (('loss', 'nll'), ('accuracy', 'accuracy')), strict=True):
            training_curve(axes, rows, *keys)
            axes.set_title(title, fontsize='medium')
    for axes in panels[1:].flat:  # One legend for a column is enough.
        axes.get_legend().remove()
    return figure


def draw_diagnostics(diagnosis: Mapping[str, Any], predictions: Predictions) -> Figure:
    """Whether the spread of a run is information or decoration; panels without data are empty.

    Args:
      diagnosis: of `diagnostics.diagnose`.
      predictions: those that were diagnosed.
    """
    figure, panels = grid(2, 2)
    reliability(panels[0, 0], diagnosis)
    spread_against_reward(panels[0, 1], diagnosis, predictions)
    quantiles_as_rewards(panels[1, 0], diagnosis)
    coverage(panels[1, 1], diagnosis)
    hide_empty(panels)
    text = f'Is the spread information or decoration? {conclusion(diagnosis)}'
    figure.suptitle(textwrap.fill(text, _TITLE_WIDTH), fontsize='medium')
    return figure


def reward_densities(axes: Axes, predictions: Predictions) -> None:
    """Densities of the rewards, means of the quantiles, of chosen and rejected responses."""
    chosen, rejected = predictions.rewards
    edges = _edges(chosen, rejected)
    _sample(axes, chosen, edges, CHOSEN, 'chosen')
    _sample(axes, rejected, edges, REJECTED, 'rejected')
    _finish_density(axes, 'reward')


def outer_quantile(axes: Axes, predictions: Predictions, index: int) -> None:
    """Histogram and density of one quantile over all responses, and the densities by side.

    The title states Spearman's rank correlation of the quantile with the reward, which is the
    mean of the quantiles: near 1 the quantile orders responses as the reward does, and says
    nothing of its own about them.

    Args:
      axes: where to draw.
      predictions: with N > index quantiles.
      index: of the quantile, from 0.
    """
    chosen, rejected = predictions.chosen[:, index], predictions.rejected[:, index]
    values = np.concatenate([chosen, rejected])
    _sample(axes, values, _edges(values), INK, 'all responses', fill=FAINT)
    _sample(axes, chosen, None, CHOSEN, 'chosen')
    _sample(axes, rejected, None, REJECTED, 'rejected')
    # Panels share their scale: high quantiles leave room on the left, low ones on the right.
    side = 'left' if predictions.taus[index] > 0.5 else 'right'
    _finish_density(axes, f'quantile {index} of the reward', legend=f'upper {side}')
    rank = rank_correlation(values, np.concatenate(predictions.rewards))
    axes.set_title(f'quantile {index} (τ = {predictions.taus[index]:.3g}), n = {len(values)} '
                   f'responses\nrank correlation with the reward {rank:.3f}', fontsize='medium')


def reliability(axes: Axes, diagnosis: Mapping[str, Any]) -> None:
    """How often the side that the model prefers was preferred, by how sure the model is.

    Bins of confidence with fewer than `diagnostics.MIN_ITEMS` pairs are left out. The title states
    the calibration error, which has them all.

    Args:
      axes: where to draw.
      diagnosis: of `diagnostics.diagnose`.
    """
    rows = [row for row in diagnosis['calibration']['reliability']
            if row['pairs'] >= MIN_ITEMS]
    if not rows:
        return
    _diagonal(axes, 0.5, 'calibrated')
    _estimates(axes, [row['confidence'] for row in rows], [row['observed'] for row in rows],
               CHOSEN, f'pairs, {_level(diagnosis)}')
    axes.set_xlabel('predicted probability of the side that the model prefers')
    axes.set_ylabel('share preferred as labelled')
    axes.set_title(f'calibration error {_number(diagnosis["calibration"]["ece"])}',
                   fontsize='medium')
    axes.legend(frameon=False, fontsize='small', loc='upper left')


def spread_against_reward(axes: Axes, diagnosis: Mapping[str, Any],
                          predictions: Predictions) -> None:
    """Standard deviation and mean of every predicted distribution, and the mean of the former.

    The title states which share of the spread's variance is not a function of the reward. Of many
    responses one in a number that the legend states is shown, in order of the reward. A model of
    single numbers has no spread, and nothing is drawn.

    Args:
      axes: where to draw.
      diagnosis: of `diagnostics.diagnose`.
      predictions: those that were diagnosed.
    """
    if not predictions.spreads.any():
        return
    order = np.argsort(predictions.means)
    means, stds = (values[order].astype(np.float64)
                   for values in (predictions.means, predictions.stds))
    step = -(-len(means) // _POINTS)
    axes.plot(means[::step], stds[::step], '.', color=FAINT, markersize=2, alpha=0.5,
              label='response' if step == 1 else f'one response in {step}')
    axes.plot([part.mean() for part in np.array_split(means, _SHARES) if len(part)],
              [part.mean() for part in np.array_split(stds, _SHARES) if len(part)],
              'o-', color=REJECTED, markersize=4, label='mean of a tenth')
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel('reward')
    axes.set_ylabel('spread')
    axes.set_title('not a function of the reward: '
                   f'{_number(diagnosis["spread"]["unexplained_share"])} of its variance',
                   fontsize='medium')
    axes.legend(frameon=False, fontsize='small', loc='lower right')


def quantiles_as_rewards(axes: Axes, diagnosis: Mapping[str, Any]) -> None:
    """Rank correlation with the reward and accuracy of every quantile; of one there is nothing.

    Args:
      axes: where to draw.
      diagnosis: of `diagnostics.diagnose`.
    """
    rows = diagnosis['per_tau']
    if len(rows) == 1:
        return
    for key, color, label in (
            ('rank_correlation_with_reward', REJECTED, 'rank correlation with the reward'),
            ('accuracy', CHOSEN, f'accuracy ({_level(diagnosis)})')):
        known = [row for row in rows if row[key]['value'] is not None]
        _estimates(axes, [row['tau'] for row in known], [row[key] for row in known], color, label)
    axes.set_ylim(top=1.02)
    axes.set_xlabel('τ')
    axes.set_ylabel('of a quantile as the reward')
    axes.legend(frameon=False, fontsize='small', loc='lower center', bbox_to_anchor=(0.5, 1.0),
                ncols=2)


def coverage(axes: Axes, diagnosis: Mapping[str, Any]) -> None:
    """Share of ratings below every quantile; nothing is drawn if there are no ratings.

    Args:
      axes: where to draw.
      diagnosis: of `diagnostics.diagnose`.
    """
    rows = [row for row in diagnosis['per_tau'] if row['coverage']['value'] is not None]
    if not rows:
        return
    _diagonal(axes, 0.0, 'exact')
    _estimates(axes, [row['tau'] for row in rows], [row['coverage'] for row in rows], CHOSEN,
               f'ratings, {_level(diagnosis)}')
    axes.set_xlabel('τ')
    axes.set_ylabel('share of ratings below the quantile')
    axes.set_title(f'error of coverage {_number(diagnosis["ratings"]["coverage_error"])}',
                   fontsize='medium')
    axes.legend(frameon=False, fontsize='small', loc='upper left')


def training_curve(axes: Axes, rows: Sequence[Mapping[str, Any]], train: str = 'loss',
                   validation: str = 'nll') -> None:
    """A metric of the training batches, as logged and smoothed, and one of the held-out pairs.

    Args:
      axes: where to draw.
      rows: of `metrics.jsonl`.
      train: key in the rows of the training batches.
      validation: key in the rows of the validation split.
    """
    steps, values = _series(rows, 'train', train)
    # Jagged lines compress better: with antialiasing the PNG is a third larger.
    axes.plot(steps, values, color=PALE, linewidth=0.8, antialiased=False,
              label=f'train {train}, each step')
    axes.plot(steps, smooth(values), color=INK, label=f'train {train}, smoothed')
    axes.plot(*_series(rows, 'validation', validation), 'o-', color=CHOSEN, markersize=4,
              label=f'validation {_NAMES.get(validation, validation)}')
    axes.set_xlabel('step')
    axes.set_ylabel(_NAMES.get(train, train))
    # Losses fall and accuracies rise. Looking for the best place can take seconds.
    axes.legend(frameon=False, fontsize='small',
                loc='lower right' if train == 'accuracy' else 'upper right')


def density(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Gaussian kernel density estimate with Scott's bandwidth on an even grid.

    Args:
      values: [m].

    Returns:
      (positions, densities) that integrate to 1, or None if all values are equal.
    """
    if statistics.is_constant(values):
        return None
    # Standardised, so that a narrow sample far from 0 keeps its digits.
    values = np.asarray(values, np.float64)
    center, scale = values.mean(), values.std()
    standard = (values - center) / scale
    estimate = scipy.stats.gaussian_kde(standard)
    reach = _TAIL * float(np.sqrt(estimate.covariance[0, 0]))
    grid = np.linspace(standard.min() - reach, standard.max() + reach, _GRID)
    return center + scale * grid, estimate(grid) / scale


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of [m] and [m]; NaN where one of them is constant."""
    try:
        return statistics.rank_correlation(a, b)(None)
    except statistics.Undefined:
        return float('nan')


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over one in `_WINDOWS` of the values, over fewer at the ends."""
    half = len(values) // (2 * _WINDOWS)
    window = np.ones(2 * half + 1)
    if not half:
        return np.asarray(values, np.float64)
    return (np.convolve(values, window, 'same')
            / np.convolve(np.ones(len(values)), window, 'same'))


def _series(rows: Sequence[Mapping[str, Any]], split: str,
            key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row['step'], row[key]) for row in rows if row['split'] == split and key in row]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def _edges(*samples: np.ndarray) -> np.ndarray | None:
    """Edges of bins common to the samples; None if all values are equal."""
    values = np.concatenate(samples).astype(np.float64)
    if statistics.is_constant(values):
        return None
    return np.linspace(values.min(), values.max(), _BINS + 1)


def _sample(axes: Axes, values: np.ndarray, edges: np.ndarray | None, color: str, label: str,
            fill: str | None = None) -> None:
    """Draws the density of a sample and its histogram, or a line where all values are equal."""
    curve = density(values)
    if curve is None:
        axes.axvline(values[0], color=color, label=f'{label} (all equal)')
        return
    if edges is not None:
        axes.hist(values, edges, density=True, color=fill or color, alpha=0.25)
    axes.plot(*curve, color=color, linewidth=1.8, label=label)


def _diagonal(axes: Axes, start: float, label: str) -> None:
    axes.plot([start, 1.0], [start, 1.0], ':', color=FAINT, label=label)


def _estimates(axes: Axes, x: Sequence[float], numbers: Sequence[Mapping[str, Any]], color: str,
               label: str) -> None:
    """Draws numbers of a diagnosis with their intervals, where they have one."""
    axes.plot(x, [number['value'] for number in numbers], 'o-', color=color, markersize=4,
              label=label)
    ends = [(place, number['low'], number['high'])
            for place, number in zip(x, numbers, strict=True) if number['low'] is not None]
    if ends:
        axes.vlines(*zip(*ends, strict=True), color=color, linewidth=1.2)


def _level(diagnosis: Mapping[str, Any]) -> str:
    return f'{diagnosis["settings"]["level"]:.0%} intervals'


def _number(number: Mapping[str, Any]) -> str:
    return 'unknown' if number['value'] is None else f'{number["value"]:.3f}'


def _finish_density(axes: Axes, label: str, *, legend: str = 'upper right') -> None:
    axes.axvline(0.0, color=FAINT, linewidth=0.8, linestyle=':', zorder=0)
    axes.set_xlabel(label)
    axes.set_ylabel('density')
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False, fontsize='small', loc=legend)


def grid(rows: int, columns: int, *, height: float = _HEIGHT,
         **shared: str) -> tuple[Figure, np.ndarray]:
    """A figure and its panels, always [rows, columns]."""
    figure = Figure(figsize=(columns * _WIDTH, rows * height + 0.4), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in panels.flat:
        axes.spines[['top', 'right']].set_visible(False)
        axes.tick_params(labelbottom=True, labelleft=True)
    return figure, panels


def hide_empty(panels: np.ndarray) -> None:
    for axes in panels.flat:
        axes.set_visible(axes.has_data())
