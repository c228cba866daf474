"""Figures of experiments: comparisons of heads, worlds with a known truth, benchmarks.

Functions that take `axes` draw one panel and can be reused elsewhere; the `draw_*` functions
arrange panels.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qrm.analysis.figures import CHOSEN, COLORS, FAINT, INK, PALE, REJECTED, grid, hide_empty, save
from qrm.policy.figures import rewards_against_kl
from qrm.policy.monitor import Row
from qrm.studies import landscapes
from qrm.studies.landscapes import Surface


def draw_comparison(folder: str, result: Mapping[str, Any]) -> None:
    """Draws the figures of a comparison of heads as PNGs in `<folder>/figures/`.

    Args:
      folder: of the comparison.
      result: of `compare.compare`.
    """
    for of_workload in result['results']:
        name = of_workload['workload']
        save(folder, {f'{name}_models': draw_models(of_workload['rows'], result['columns'])})
        if len(of_workload['mechanism']) > 1:
            save(folder, {f'{name}_lambda': draw_mechanism(of_workload['mechanism'],
                                                           result['estimators'])})


def draw_disagreement(folder: str, result: Mapping[str, Any]) -> None:
    """Draws what spreads know of disagreement as PNGs in `<folder>/figures/`.

    Args:
      folder: of the study.
      result: of `disagreement.disagreement`.
    """
    for panel in result['panels']:
        rows = result['results'][panel['name']]
        beside = 'margin' if panel['pairs'] else 'reward'
        table, column, label, bound = (
            ('disputed', 'equal_margin', f'AUROC of the spread at equal {beside}', 0.5)
            if 'disputed' in rows[0] else
            ('graded', 'partial', f'rank correlation of the spread given the {beside}', 0.0))
        workloads = list(dict.fromkeys(row['workload'] for row in rows))
        figure, places = grid(1, len(workloads), height=0.3 * len(rows) / len(workloads) + 1.0,
                              sharex='row')
        for axes, workload in zip(places[0], workloads, strict=True):
            intervals(axes, {row['model']: row[table][column] for row in rows
                             if row['workload'] == workload})
            axes.axvline(bound, color=FAINT, linewidth=0.8, linestyle=':')
            axes.set_title(f'trained on {workload}', fontsize='medium')
            axes.set_xlabel(label)
        figure.suptitle(f"{panel['name']}: {panel['judges']}")
        save(folder, {panel['name']: figure})


def draw_models(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Figure:
    """A panel for each column: value and interval of each model, the first one's as a band.

    Args:
      rows: of `compare.measure`.
      labels: column -> label.
    """
    across = 3
    figure, panels = grid(-(-len(labels) // across), across, height=0.3 * len(rows) + 0.7)
    for axes, (name, label) in zip(panels.flat, labels.items(), strict=False):
        intervals(axes, {row['model']: row['columns'][name] for row in rows})
        axes.set_title(label, fontsize='medium')
    hide_empty(panels)
    return figure


def draw_mechanism(rows: Sequence[Mapping[str, Any]], estimators: Mapping[str, Any]) -> Figure:
    """Scale of the rewards, estimates of the divergence, and formulas mistaken for it, by lambda.

    Args:
      rows: of `compare.mechanism`.
      estimators: name -> 'label' and 'is_kl'.
    """
    figure, panels = grid(1, 3, height=3.8)
    places = range(len(rows))
    scale, *others = panels[0]
    value, low, high = np.array([[row['reward_std'][key] for key in ('value', 'low', 'high')]
                                 for row in rows]).T
    scale.errorbar(places, value, [value - low, high - value], color=INK, marker='o', markersize=4,
                   capsize=3)
    scale.set_title('std of rewards', fontsize='medium')
    scale.set_ylim(bottom=0.0)
    for axes, is_kl, title in zip(others, (True, False), (
            'estimates of the KL divergence (nats)', 'formulas mistaken for it'), strict=True):
        chosen = [(name, e['label']) for name, e in estimators.items() if e['is_kl'] == is_kl]
        for (name, label), style in zip(chosen, ('o-', 's-', '^-', 'v-'), strict=False):
            axes.plot(places, [row['kl'][name] for row in rows], style, alpha=0.7, label=label,
                      color=CHOSEN if is_kl else REJECTED)
        axes.set_title(title, fontsize='medium')
        _legend_below(axes)
    others[0].axhline(0.0, color=FAINT, linewidth=0.8, linestyle=':')
    others[0].margins(y=0.4)
    others[1].set_yscale('log')
    for axes in panels[0]:
        axes.set_xticks(places, [f'{row["lambda"]:g}' for row in rows])
        axes.set_xlabel('lambda, weight of the quantile Huber term')
    return figure


def draw_published(folder: str, result: Mapping[str, Any]) -> None:
    """Draws what formulas give for few pairs, and spreads over training, in `<folder>/figures/`.

    Args:
      folder: of the study.
      result: of `published.published`.
    """
    save(folder, {'estimators': draw_few_pairs(result), 'spread': draw_spread_over_training(
        result['spread'])})


def draw_few_pairs(result: Mapping[str, Any]) -> Figure:
    """Histograms and the Gaussian estimate by AUC, a panel for each workload, and its cells.

    Args:
      result: of `published.published`.
    """
    pairs = result['settings']['pairs']
    figure, panels = grid(1, len(pairs), height=3.8)
    for axes, (workload, n) in zip(panels[0], pairs.items(), strict=True):
        rows = [row for row in result['estimators'] if row['n'] == n and (
            row['bins'] or row['definition'] == 'gaussian')]
        names = dict.fromkeys((row['definition'], row['bins']) for row in rows)
        for i, (name, bins) in enumerate(names):
            own = [row for row in rows if (row['definition'], row['bins']) == (name, bins)]
            aucs, mean, low, high = np.array(
                [[row[key] for key in ('auc', 'mean', 'low', 'high')] for row in own]).T
            axes.errorbar(aucs + 0.006 * (i - len(names) / 2), mean, [mean - low, high - mean],
                          marker='o', markersize=4, capsize=3, color=COLORS[i % len(COLORS)],
                          label=f'{bins} bins' if bins else 'Gaussian')
        for value in result['published'][workload].values():
            axes.axhline(value, color=FAINT, linewidth=1.0, linestyle='--')
        axes.set_title(f'{workload}, {n} pairs; dashed: published', fontsize='medium')
        axes.set_xlabel('AUC of two normal samples')
        _legend_below(axes)
    return figure


def draw_spread_over_training(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Spread of the quantiles of each side by step, a line for each target.

    Args:
      rows: of `published.follow`, with `targets`.
    """
    figure, panels = grid(1, 2, height=3.8)
    for axes, side in zip(panels[0], ('chosen', 'rejected'), strict=True):
        for i, name in enumerate(dict.fromkeys(row['targets'] for row in rows)):
            own = [row for row in rows if row['targets'] == name]
            axes.plot([row['step'] for row in own],
                      [row['relative'][side]['value'] for row in own], marker='o', markersize=4,
                      color=COLORS[i % len(COLORS)], label=name)
        axes.set_title(f'{side} responses', fontsize='medium')
        axes.set_xlabel('step')
        axes.set_ylim(bottom=0.0)
        _legend_below(axes)
    panels[0][0].set_ylabel('spread / std of rewards')
    return figure


def draw_identifiability(folder: str, result: Mapping[str, Any]) -> None:
    """Draws spreads, coverage, growth, equal win probabilities and losses, in `<folder>/figures/`.

    Args:
      folder: of the experiment.
      result: of `identifiability.summarise`.
    """
    figures = {'spread': draw_spreads(result), 'coverage': draw_coverage(result),
               'equal_win_probabilities': draw_equal(result),
               'landscapes': draw_landscapes({
                   label: landscapes.surface(loss)
                   for label, loss in landscapes.OBJECTIVES.items()})}
    if len({row['pairs'] for row in result['rows']}) > 1:
        figures['growth'] = draw_growth(result)
    save(folder, figures)


def draw_spreads(result: Mapping[str, Any]) -> Figure:
    """True against predicted spread of some items, one panel for each model (first seed).

    Models without a spread, point masses, are left out.
    """
    rows = [row for row in _main_rows(result)
            if row['metrics']['spread_correlation']['mean'] is not None]
    columns = 4
    figure, panels = grid(-(-len(rows) // columns), columns, height=2.6, sharex=True)
    for axes, row in zip(panels.flat, rows, strict=False):
        axes.plot(row['true_spread'], row['spread'], '.', color=CHOSEN, markersize=3)
        axes.axline((0.0, 0.0), slope=1.0, color=FAINT, linewidth=0.8, linestyle=':')
        axes.set_ylim(0.0, 1.05 * max(row['true_spread'] + row['spread']))
        axes.set_title(f'{row["table"]}\n{row["label"]}', fontsize='small')
    _label_edges(panels, 'true spread', 'predicted spread')
    hide_empty(panels)
    return figure


def draw_coverage(result: Mapping[str, Any]) -> Figure:
    """True mass below every predicted quantile, one panel for each kind of annotation."""
    rows, levels = _main_rows(result), result['levels']
    tables = list(dict.fromkeys(row['table'] for row in rows))
    figure, panels = grid(1, len(tables), height=5.4, sharey=True)
    for axes, table in zip(panels.flat, tables, strict=True):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=':')
        members = [row for row in rows if row['table'] == table]
        for number, row in enumerate(members):
            axes.plot(levels, row['coverage'], markersize=3, label=row['label'], **_style(number))
        axes.set_title(table, fontsize='medium')
        axes.set_xlabel('level τ')
        _legend_below(axes)
    panels[0, 0].set_ylabel('share of true rewards below')
    return figure


def draw_growth(result: Mapping[str, Any]) -> Figure:
    """Spread correlation and W1 against the number of pairs: a column for each annotation."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result['rows']:
        groups.setdefault((row['table'], row['label']), []).append(row)
    grown: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for (table, label), rows in groups.items():
        if len(rows) > 1:
            by_size = sorted(rows, key=lambda row: row['pairs'])
            grown.setdefault(table, {})[label] = by_size
    sizes = sorted({row['pairs'] for of_table in grown.values() for rows in of_table.values()
                    for row in rows})
    keys = {'spread_correlation': 'spread correlation', 'w1_affine': 'W1, affine'}
    figure, panels = grid(len(keys), len(grown), height=4.4, sharex='all', sharey='row')
    for across, (key, title) in zip(panels, keys.items(), strict=True):
        for axes, of_table in zip(across, grown.values(), strict=True):
            for number, (label, rows) in enumerate(of_table.items()):
                numbers = [row['metrics'][key] for row in rows]
                if all(number['mean'] is not None for number in numbers):
                    mean, low, high = np.array([
                        [cell[part] for part in ('mean', 'low', 'high')] for cell in numbers]).T
                    axes.errorbar([row['pairs'] for row in rows], mean, [mean - low, high - mean],
                                  capsize=3, markersize=4, label=label, **_style(number))
            axes.set_xscale('log')
            axes.set_xticks(sizes, [f'{size:,}' for size in sizes])
            axes.minorticks_off()
        across[0].set_ylabel(title)
    for axes, table in zip(panels[0], grown, strict=True):
        axes.set_title(table, fontsize='medium')
    for axes in panels[-1]:  # where scalars, which have no spread, are drawn too
        axes.set_xlabel('pairs')
        _legend_below(axes)
    return figure


def draw_equal(result: Mapping[str, Any]) -> Figure:
    """Two sets of quantiles with the same win probabilities, item by item."""
    equal = result['equal_win_probabilities']
    figure, panels = grid(1, 1)
    axes = panels[0, 0]
    for offset, color, label, key in ((0.12, CHOSEN, 'true', 'quantiles'),
                                      (-0.12, REJECTED, 'other', 'other')):
        for item, quantiles in enumerate(equal[key]):
            axes.plot(quantiles, np.full(len(quantiles), item + offset), '|-', color=color,
                      label=label if item == 0 else None)
    axes.set_xlabel('reward')
    axes.set_ylabel('item')
    axes.set_title(f'spreads x {equal["spread_ratio"]:.2f}, win probabilities equal to '
                   f'{equal["largest_difference"]:.0e} nats', fontsize='medium')
    axes.legend(frameon=False, fontsize='small', loc='upper right')
    return figure


def draw_landscapes(surfaces: Mapping[str, Surface]) -> Figure:
    """Loss of a pair over both rewards, a panel for each objective, and where it pulls them.

    Args:
      surfaces: label -> surface.
    """
    columns, every = 3, 10
    figure, panels = grid(-(-len(surfaces) // columns), columns, height=3.4, sharex='all',
                          sharey='all')
    few = landscapes.REWARDS[every // 2::every]
    for axes, (label, one) in zip(panels.flat, surfaces.items(), strict=False):
        # Steps of equal height in the logarithm of 1 + loss: losses range over decades.
        height = np.log1p(one.loss - one.loss.min())
        axes.contourf(landscapes.REWARDS, landscapes.REWARDS, height, levels=14, cmap='Blues_r')
        pull = -one.slopes[every // 2::every, every // 2::every]
        axes.quiver(few, few, pull[..., 0], pull[..., 1], color=REJECTED, angles='xy', width=0.006,
                    scale=12.0 * np.sqrt(np.mean(pull**2)))
        axes.axline((0.0, 0.0), slope=1.0, color=FAINT, linewidth=0.8, linestyle=':')
        axes.set_title(label, fontsize='small')
    _label_edges(panels, 'reward of the chosen', 'of the rejected')
    hide_empty(panels)
    return figure


def draw_best_of_n(result: Mapping[str, Any]) -> Figure:
    """A row for gold reward, tail utility and own score, a column for each proxy with a spread.

    Curves leave the panel below where choosing has lost half of what the best choice gains.

    Args:
      result: of `best_of_n.summarise`.
    """
    names = [row['proxy'] for row in result['spreads']]
    rules = dict.fromkeys(row['rule'] for row in result['curves'] if row['proxy'] in names)
    colors = dict(zip(rules, itertools.cycle(COLORS), strict=False))
    rows = {'gold': 'gold reward', 'tail': 'tail utility', 'own': 'score of the choice (std)'}
    figure, panels = grid(len(rows), len(names), sharex='all', sharey='row')
    for across, (key, label) in zip(panels, rows.items(), strict=True):
        for axes, name in zip(across, names, strict=True):
            curves_of_choice(axes, result, name, key, colors)
        values = np.array([row[key]['value'] for row in result['curves']])
        start, top = values[0, 0], values.max()
        across[0].set_ylim(max(start - 0.5 * (top - start), values.min()),
                           top + 0.05 * (top - start))
        across[0].set_ylabel(label)
    for axes, name in zip(panels[0], names, strict=True):
        axes.set_title(result['labels'][name], fontsize='medium')
    for axes in panels[-1]:
        axes.set_xlabel('KL(best of n || one draw), nats')
    figure.legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, fontsize='small',
                  ncols=len(rules) + 1, loc='outside lower center')
    settings = result['settings']
    figure.suptitle(f'Best of n = {", ".join(map(str, result["sizes"]))}; bands: '
                    f'{settings["level"]:.0%} intervals over {settings["repetitions"]} repetitions')
    return figure


def draw_gains(policies: Mapping[str, Sequence[Row]]) -> Figure:
    """Proxy and gold reward against the root of the KL, a panel for each policy.

    Args:
      policies: title -> rows, see `policy.figures.rewards_against_kl`.
    """
    figure, panels = grid(-(-len(policies) // 3), 3)
    drawn: dict[str, Artist] = {}
    for axes, (title, rows) in zip(panels.flat, policies.items(), strict=False):
        rewards_against_kl(axes, rows, root=True, legend=False)
        axes.set_title(title, fontsize='medium')
        lines, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, lines, strict=True))
    figure.legend(drawn.values(), drawn, frameon=False, fontsize='small',
                  loc='outside lower center', ncols=2)
    hide_empty(panels)
    return figure


def draw_paths(
    of_algorithms: Mapping[str, Mapping[tuple[str, str], Sequence[Row]]]
) -> Figure:
    """Gold reward against the KL to the reference, a panel for each algorithm.

    Args:
      of_algorithms: algorithm -> proxy and rule of a policy, both '' of one without a proxy, which
        is DPO -> its rows, with gold rewards. Colours tell proxies apart, and lines rules.
    """
    keys = list(dict.fromkeys(key for policies in of_algorithms.values() for key in policies))
    proxies, rules = (list(dict.fromkeys(key[i] for key in keys if key[i])) for i in (0, 1))
    colors = dict(zip(proxies, itertools.cycle(COLORS), strict=False)) | {'': INK}
    styles = dict(zip(rules, itertools.cycle(('-', '--', ':', '-.', (0, (1, 4)))), strict=False))
    styles[''] = '-'
    figure, panels = grid(1, len(of_algorithms), sharey='all')
    for axes, (algorithm, policies) in zip(panels[0], of_algorithms.items(), strict=True):
        for (proxy, rule), rows in policies.items():
            kl, gold, error = (np.array([getattr(row, name) for row in rows])
                               for name in ('kl', 'gold', 'gold_error'))
            axes.plot(kl, gold, linestyle=styles[rule], color=colors[proxy], marker='o',
                      markersize=2)
            if rule in ('', rules[0]):
                axes.vlines(kl, gold - 2.0 * error, gold + 2.0 * error, color=colors[proxy],
                            linewidth=0.8)
        axes.set_title(algorithm.replace('_', ' '), fontsize='medium')
        axes.set_xlabel('KL to the reference (nats a response)')
    panels[0, 0].set_ylabel('gold reward')
    shown = [*(Line2D([], [], color=colors[proxy], label=proxy) for proxy in proxies),
             *(Line2D([], [], color=FAINT, linestyle=styles[rule], label=rule) for rule in rules)]
    if ('', '') in keys:
        shown.append(Line2D([], [], color=INK, label='DPO'))
    figure.legend(handles=shown, frameon=False, fontsize='small', loc='outside lower center',
                  ncols=6)
    return figure


def draw_benchmark(result: Mapping[str, Any]) -> Figure:
    """Rates of useful work beside the machine's best, and what the slots hold.

    Args:
      result: of `speed.measure`.
    """
    figure, panels = grid(1, 2)
    useful_rates(panels[0, 0], {
        'matrix product': result['matmul']['flops_per_second'],
        'training': result['training']['useful_flops_per_second'],
        'scoring': result['scoring']['useful_flops_per_second'],
    })
    slot_use(panels[0, 1], result['savings'])
    machine = result['machine']
    figure.suptitle(f'{machine["devices"]} x {machine["device_kind"]} ({machine["cpu"]})',
                    fontsize='medium')
    return figure


def intervals(axes: Axes, cells: Mapping[str, Mapping[str, float | None]]) -> None:
    """Values with their intervals, one below the other; those that are not defined are left out.

    Args:
      axes: where to draw.
      cells: name -> 'value', 'low' and 'high'.
    """
    for place, cell in enumerate(cells.values()):
        if cell['value'] is None:
            axes.annotate('not defined', (0.02, place), xycoords=('axes fraction', 'data'),
                          va='center', fontsize='small', color=FAINT)
            continue
        axes.plot([cell['low'], cell['high']], [place, place], color=CHOSEN, linewidth=2)
        axes.plot(cell['value'], place, 'o', color=INK, markersize=4)
    first = next(iter(cells.values()))
    if first['value'] is not None:
        axes.axvspan(first['low'], first['high'], color=PALE, alpha=0.25, linewidth=0)
    axes.set_yticks(range(len(cells)), list(cells))
    axes.set_ylim(len(cells) - 0.5, -0.5)


def curves_of_choice(axes: Axes, result: Mapping[str, Any], proxy: str, key: str,
                     colors: Mapping[str, str]) -> None:
    """What the choices of each rule by one proxy are worth, against the KL divergence.

    Dotted: the same rules with spreads shuffled. Beside them the scalar's choices and the best
    possible ones.

    Args:
      axes: where to draw.
      result: of `best_of_n.summarise`.
      proxy: name of the proxy.
      key: 'gold', 'tail' or 'own'.
      colors: rule -> colour.
    """
    kl = result['kl']
    for row in result['curves']:
        value, rule = row[key]['value'], row['rule']
        if row['proxy'] == 'truth' and rule == key:
            axes.plot(kl, value, color=FAINT, label='the best possible')
        elif row['proxy'] == 'scalar':
            axes.plot(kl, value, '--', color=INK, label='scalar, mean')
        elif row['proxy'] == proxy and row['control'] == 'none':
            axes.plot(kl, value, 'o-', color=colors[rule], markersize=3, label=rule)
            axes.fill_between(kl, row[key]['low'], row[key]['high'], color=colors[rule],
                              alpha=0.2, linewidth=0)
        elif row['proxy'] == proxy and row['control'] == 'shuffled':
            axes.plot(kl, value, ':', color=colors[rule], label=f'{rule}, shuffled')


def useful_rates(axes: Axes, rates: Mapping[str, Mapping[str, float]]) -> None:
    """A bar for the median of each rate, FLOP/s, with its range, and its share of the first.

    Args:
      axes: where to draw.
      rates: name -> 'median', 'min' and 'max', the reference first.
    """
    reference = next(iter(rates.values()))['median']
    unit, scale = ('TFLOP/s', 1e12) if reference >= 1e12 else ('GFLOP/s', 1e9)
    median, low, high = (np.array([rate[key] for rate in rates.values()]) / scale
                         for key in ('median', 'min', 'max'))
    axes.barh(list(rates), median, xerr=[median - low, high - median], height=0.6,
              color=[PALE, *[CHOSEN] * (len(rates) - 1)], ecolor=INK, capsize=3)
    for place, (value, end) in enumerate(zip(median, high, strict=True)):
        share = '' if place == 0 else f' ({value * scale / reference:.0%})'
        axes.annotate(f'{value:.3g}{share}', (end, place), (5, 0), textcoords='offset points',
                      va='center', fontsize='small')
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0.0)
    axes.set_xlabel(f'useful {unit}: median, range of the repeats')


def slot_use(axes: Axes, savings: Mapping[str, Any]) -> None:
    """Slots of a comparison in packed rows and in padded batches, by what they hold.

    Args:
      axes: where to draw.
      savings: of `speed.savings`.
    """
    names = ['packed rows', f'padded batches of {savings["padded_batch"]}']
    distinct = np.array([savings['distinct_tokens']] * 2)
    real = np.array([savings['packed_tokens'], savings['repeated_tokens']])
    slots = np.array([savings['packed_slots'], savings['padded_slots']])
    left = np.zeros(2)
    for label, amount, color in (('distinct tokens', distinct, CHOSEN),
                                 ('prompts again', real - distinct, REJECTED),
                                 ('padding', slots - real, PALE)):
        width = amount / savings['comparisons']
        axes.barh(names, width, left=left, height=0.6, color=color, label=label)
        left = left + width
    axes.invert_yaxis()
    axes.set_xlabel('slots a comparison')
    axes.legend(frameon=False, fontsize='small', loc='lower center', bbox_to_anchor=(0.4, 1.0),
                ncols=3)


def _style(number: int) -> dict[str, str]:
    """Colour and marker that tell up to 18 lines of a panel apart."""
    return {'color': COLORS[number % len(COLORS)], 'marker': 'os^'[number // len(COLORS)]}


def _legend_below(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize='x-small', loc='upper center',
                    bbox_to_anchor=(0.5, -0.16))


def _main_rows(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in result['rows'] if row['pairs'] == result['settings']['pairs']]


def _label_edges(panels: np.ndarray, below: str, beside: str) -> None:
    """Labels of what all panels share, below the last row and beside the first column."""
    for axes in panels[-1]:
        axes.set_xlabel(below)
    for axes in panels[:, 0]:
        axes.set_ylabel(beside)
