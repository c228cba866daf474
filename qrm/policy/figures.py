"""Figures of policies: how a run went, and the proxy against what it stands for.

Functions that take `axes` draw one panel and can be reused elsewhere; the `draw_*` functions
arrange panels.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qrm.analysis.figures import CHOSEN, COLORS, FAINT, INK, REJECTED, grid, hide_empty
from qrm.policy import monitor
from qrm.policy.monitor import Row
from qrm.policy.rules import Rules, suspicions

_ERRORS = 2.0  # standard errors that upright lines reach
_SHARES = {'repeated': f'{monitor.NGRAM}-grams repeated', 'refused': 'refused',
           'truncated': 'truncated', 'blank': 'blank', 'unread': 'unread by gold'}


def draw_overoptimisation(runs: Mapping[str, Sequence[Row]], *, root: bool = False) -> Figure:
    """Proxy and gold against the KL, a row of two panels for each run: rewards, and who wins.

    Rewards are what was gained since the first row, in standard deviations of the responses there,
    so that both have one scale (as of Gao et al. 2022, arXiv 2210.10760, figure 1, against the
    root). A panel without data is empty.

    Args:
      runs: title -> rows.
      root: the axis is the square root of the KL, in which rewards of best of n and of policies
        begin as straight lines there.
    """
    figure, panels = grid(len(runs), 2)
    for row, (title, rows) in zip(panels, runs.items(), strict=True):
        rewards_against_kl(row[0], rows, root=root)
        wins_against_kl(row[1], rows, root=root)
        for axes in row:
            axes.set_title(title, fontsize='medium')
    hide_empty(panels)
    figure.suptitle('What is optimised, and what it stands for')
    return figure


def draw_monitor(rows: Sequence[Row], rules: Rules | None = None) -> Figure:
    """All that a run is watched by, over its steps; upright lines reach two standard errors.

    Args:
      rows: of a run, at least one.
      rules: a line marks the first step at which each rule holds; None: no lines.
    """
    figure, panels = grid(3, 3, sharex='all')
    places = iter(panels.flat)
    curve(axes := next(places), rows, {'proxy': 'proxy', 'gold': 'gold'}, errors=True)
    axes.set_ylabel('mean reward')
    curve(axes := next(places), rows, {'win': 'held-out judge'}, errors=True)
    axes.set_ylabel('win probability')
    curve(axes := next(places), rows, {
        'kl': 'k1', 'kl_k3': 'k3', 'kl_estimate': 'estimate, best of n',
        'kl_bound': 'bound, best of n'}, errors=True)
    axes.set_ylabel('KL (nats a response)')
    curve(axes := next(places), rows, {'length': 'mean'}, errors=True)
    curve(axes, rows, {'length_p10': '10%', 'length_p50': '50%', 'length_p90': '90%'}, style=':')
    axes.set_ylabel('tokens a response')
    curve(axes := next(places), rows, {'entropy': 'policy'}, errors=True)
    axes.set_ylabel('entropy (nats a token)')
    curve(axes := next(places), rows, _SHARES)
    axes.set_ylabel('share')
    curve(axes := next(places), rows, {'distinct_1': 'tokens', 'distinct_2': 'pairs of tokens'})
    axes.set_ylabel('different ones of all')
    curve(axes := next(places), rows, {
        'predicted_std': 'predicted std', 'proxy_spread': 'std over responses',
        'disagreement': 'std over members'})
    axes.set_ylabel("proxy's spread")
    curve(axes := next(places), rows, {'perplexity': 'under the reference'})
    axes.set_ylabel('perplexity')
    began = {} if rules is None else first_seen(rows, rules)
    for axes in panels.flat:
        for step in set(began.values()):
            axes.axvline(step, color=REJECTED, linewidth=0.8, linestyle=':', zorder=0)
        axes.set_xlabel('step')
        axes.set_visible(bool(axes.get_legend()))
    if began:
        figure.suptitle('suspect: ' + ', '.join(
            f'{rule} from step {step}' for rule, step in began.items()), fontsize='medium')
    return figure


def rewards_against_kl(axes: Axes, rows: Sequence[Row], *, root: bool = False,
                       legend: bool = True) -> None:
    """Gains of proxy and gold reward since the first row, in its standard deviations.

    Nothing is drawn of a reward that is unknown, or equal for all responses of the first row.

    Args:
      axes: where to draw.
      rows: of a run.
      root: see `draw_overoptimisation`.
      legend: whether it has one of its own.
    """
    for name, color in (('proxy', CHOSEN), ('gold', REJECTED)):
        known = [row for row in rows if getattr(row, name) is not None]
        if not known or not getattr(known[0], f'{name}_spread'):
            continue
        scale = getattr(known[0], f'{name}_spread')
        gains = np.array([getattr(row, name) for row in known]) - getattr(known[0], name)
        errors = np.array([getattr(row, f'{name}_error') for row in known])
        _estimates(axes, _distances(known, root), gains / scale, errors / scale, color, name)
    _finish_kl(axes, root, "gain of reward (first row's std)", 0.0, legend)


def wins_against_kl(axes: Axes, rows: Sequence[Row], *, root: bool = False) -> None:
    """Win probability against the reference; nothing is drawn if it is unknown.

    Args:
      axes: where to draw.
      rows: of a run.
      root: see `draw_overoptimisation`.
    """
    known = [row for row in rows if row.win is not None]
    if known:
        _estimates(axes, _distances(known, root), np.array([row.win for row in known]),
                   np.array([row.win_error for row in known]), INK, 'held-out judge')
    _finish_kl(axes, root, 'win probability', 0.5)


def curve(axes: Axes, rows: Sequence[Row], labels: Mapping[str, str], *, errors: bool = False,
          style: str = '-') -> None:
    """Numbers of the rows over the steps; nothing is drawn of those that are unknown.

    Args:
      axes: where to draw.
      rows: of a run.
      labels: field of `Row` -> label.
      errors: with their standard errors, where they have any.
      style: of the lines.
    """
    colors = COLORS if style == '-' else (FAINT,) * len(labels)
    for (name, label), color in zip(labels.items(), colors, strict=False):
        known = [row for row in rows if getattr(row, name) is not None]
        if not known:
            continue
        steps = np.array([row.step for row in known])
        values = np.array([getattr(row, name) for row in known])
        if errors and f'{name}_error' in Row._fields:
            of_rows = np.array([getattr(row, f'{name}_error') for row in known])
            _estimates(axes, steps, values, of_rows, color, label)
        else:
            axes.plot(steps, values, style, color=color, label=label)
    if axes.has_data():
        axes.legend(frameon=False, fontsize='small')


def first_seen(rows: Sequence[Row], rules: Rules) -> dict[str, int]:
    """Rules that held at some row -> the step of the first one, in order of the steps."""
    found: dict[str, int] = {}
    for count in range(1, len(rows) + 1):
        for one in suspicions(rows[:count], rules):
            found.setdefault(one.rule, rows[count - 1].step)
    return found


def _distances(rows: Sequence[Row], root: bool) -> np.ndarray:
    """KL of each row, its bound of best of n; of an estimate below 0 the root is taken as 0."""
    kl = np.array([row.kl if row.kl_bound is None else row.kl_bound for row in rows])
    return np.sqrt(np.maximum(kl, 0.0)) if root else kl


def _estimates(axes: Axes, x: np.ndarray, values: np.ndarray, errors: np.ndarray, color: str,
               label: str) -> None:
    """Values in the order of the rows, with upright lines that reach `_ERRORS` on either side."""
    axes.plot(x, values, 'o-', color=color, markersize=3, label=label)
    axes.vlines(x, values - _ERRORS * errors, values + _ERRORS * errors, color=color,
                linewidth=1.2)


def _finish_kl(axes: Axes, root: bool, label: str, level: float, legend: bool = True) -> None:
    if not axes.has_data():
        return
    axes.axhline(level, color=FAINT, linewidth=0.8, linestyle=':', zorder=0)
    axes.set_xlabel('√ KL (√ nats a response)' if root else 'KL (nats a response)')
    axes.set_ylabel(label)
    if legend:
        axes.legend(frameon=False, fontsize='small')
