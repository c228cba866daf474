"""A page to look at: what runs say of test comparisons, in one HTML file that needs no network.

It holds the verdict, the tables, the figures as SVG, and an explorer: comparisons in an order of
choice, their texts, and the quantile functions of all responses over each other. Everything is
inside the file: data as JSON, and the chart library, Vega-Lite, which comes with vl-convert-python
(the extra `report`). The browser is told to load nothing, and to run no script but those that were
written here, so that texts of data stay texts.

Axes as in `metrics`: c comparisons, R responses of all of them, n ordered pairs, N quantiles.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax
import numpy as np

from qrm.analysis import diagnostics, figures, tables
from qrm.analysis.verdict import verdict
from qrm.data import sources
from qrm.data.comparisons import Comparison, DataError, Text, in_a_line
from qrm.rewards import statistics
from qrm.rewards.metrics import Predictions, fingerprint
from qrm.training import workdir
from qrm.training.workdir import WorkdirError

LIMIT = 10_000  # comparisons on a page

_NAME = 'report.html'
_DIGITS = 4  # significant ones of the numbers of a comparison


class Run(NamedTuple):
    """A run as the page shows it.

    Attributes:
      name: what the page calls it.
      evaluation: what `evaluation.json` says.
      predictions: on its test comparisons.
      texts: [c] digests, by which the texts of the comparisons are recognised.
      comparisons: [c], None where the data no longer say what was evaluated.
      lost: why comparisons are missing; '' if none are.
      diagnosis: of `diagnostics.diagnose`.
      whole: whether the diagnosis had validation data and exchanged prompts.
      curve: rows of `metrics.jsonl`.
    """

    name: str
    evaluation: Mapping[str, Any]
    predictions: Predictions
    texts: list[bytes]
    comparisons: list[Comparison | None]
    lost: str
    diagnosis: Mapping[str, Any]
    whole: bool
    curve: list[dict[str, Any]]

    @property
    def workload(self) -> str:
        return self.evaluation['workload']


def text_digests(comparisons: Sequence[Comparison]) -> np.ndarray:
    """[c, 16] uint8 digests of prompts and responses, in the order in which these stand."""
    found = b''.join(c.text_digest(ordered=True) for c in comparisons)
    return np.frombuffer(found, np.uint8).reshape(len(comparisons), -1)


def report(folders: Sequence[str], output: str = '') -> str:
    """Writes a page of runs side by side.

    Args:
      folders: of evaluated runs, or of several such, as `reproduce` and `compare` leave them.
      output: file to write; '': `report.html` in the folder, if there is one.

    Returns:
      What was written, in a line.

    Raises:
      DataError: no package to draw with.
      WorkdirError: a folder holds no evaluated run, or the page cannot be written.
    """
    _charts()
    if not output and len(folders) > 1:
        raise WorkdirError(f'{len(folders)} folders and no --output, expected the page to write')
    table = _table_of(folders[0]) if len(folders) == 1 else None
    members = [member for folder in folders for member in _members(folder, table)]
    return _write(output or os.path.join(folders[0], _NAME), _read(members), table)


def leave(folder: str, evaluated: Mapping[str, Sequence[Comparison]]) -> None:
    """Writes `report.html` into a folder, or says in a line why there is none.

    Nothing that was computed depends on it, so that it never fails. Of several processes the first
    one writes.

    Args:
      folder: where it goes; `table.json` in it is shown too.
      evaluated: folder of a run -> its test comparisons, so that they need not be read again.
    """
    if jax.process_index():
        return
    path = os.path.join(folder, _NAME)
    try:
        _charts()
        print(_write(path, _read(evaluated, evaluated), _table_of(folder)), flush=True)
    except Exception as error:
        with contextlib.suppress(OSError):  # one of an earlier evaluation shows other numbers
            os.remove(path)
        print(f'note: no {path}: {in_a_line(error)}; `qrm report --workdirs={folder}` writes it '
              'later', flush=True)


def _table_of(folder: str) -> dict[str, Any] | None:
    path = os.path.join(folder, 'table.json')
    return workdir.read_json(path) if os.path.exists(path) else None


def _members(folder: str, table: Mapping[str, Any] | None) -> list[str]:
    """The evaluated runs of a folder: itself, or those in it, in the order of its table."""
    def evaluated(place: str) -> bool:
        return os.path.exists(os.path.join(place, 'evaluation.json'))

    if evaluated(folder):
        return [folder]
    names = ([f'{row["workload"]}-{row["model"]}' for row in table['rows']] if table
             else sorted(os.listdir(folder)) if os.path.isdir(folder) else [])
    found = [place for name in names if evaluated(place := os.path.join(folder, name))]
    if not found:
        raise WorkdirError(f'{folder}: no evaluation.json; expected the folder of a run that '
                           '`qrm evaluate` has judged, or of several such')
    return found


def _read(members: Iterable[str],
          evaluated: Mapping[str, Sequence[Comparison]] | None = None) -> list[Run]:
    """The runs of these folders; comparisons are read from their data if they are not given.

    Raises:
      WorkdirError: a folder holds no evaluation, or one of another version.
    """
    members = list(dict.fromkeys(map(os.path.normpath, members)))
    bases = Counter(map(os.path.basename, members))
    given = {os.path.normpath(place): c for place, c in (evaluated or {}).items()}
    known: dict[str, dict[bytes, Comparison] | str] = {}  # of data, or why they cannot be read
    runs = []
    for member in members:
        evaluation = workdir.read_json(os.path.join(member, 'evaluation.json'))
        path = os.path.join(member, 'predictions.npz')
        arrays = workdir.read_arrays(path)
        try:
            config = workdir.config_of(evaluation['config'])
            predictions = Predictions(**{name: arrays[name] for name in Predictions._fields})
            texts = [row.tobytes() for row in arrays['texts']]
        except (KeyError, TypeError) as error:
            raise WorkdirError(f'{path}: evaluated by another version of qrm (no {error}); '
                               f'expected what `qrm evaluate --workdir={member}` writes') from error
        if member in given:
            found = {c.text_digest(ordered=True): c for c in given[member]}
        else:
            key = json.dumps([evaluation['workload'], evaluation['config']['data']])
            if key not in known:
                known[key] = _of_data(config.data, evaluation['workload'])
            found = known[key]
        comparisons, lost = _found(texts, found, evaluation['data'])
        diagnosis, whole = _diagnosis(member, predictions, config.analysis)
        base = os.path.basename(member)
        runs.append(Run(base if bases[base] == 1 and base != '.' else member, evaluation,
                        predictions, texts, comparisons, lost, diagnosis, whole,
                        workdir.read_metrics(member)))
    return runs


def _of_data(data: Any, workload: str) -> dict[bytes, Comparison] | str:
    """Digest -> comparison, of all splits of the data; or why they cannot be read."""
    try:
        splits = sources.read(data, workload).splits
    except (DataError, OSError) as error:
        return in_a_line(error)
    return {c.text_digest(ordered=True): c for comparisons, _ in splits.values()
            for c in comparisons}


def _found(texts: Sequence[bytes], found: Mapping[bytes, Comparison] | str,
           data: str) -> tuple[list[Comparison | None], str]:
    """The comparisons with these texts, and why some are missing."""
    if isinstance(found, str):
        return [None] * len(texts), f'the data cannot be read: {found}'
    comparisons = [found.get(digest) for digest in texts]
    missing = comparisons.count(None)
    if not missing:
        return comparisons, ''
    return comparisons, (f'{data} no longer holds the texts of {missing} of {len(texts)} '
                         'comparisons as they were evaluated')


def _diagnosis(folder: str, predictions: Predictions,
               settings: Any) -> tuple[Mapping[str, Any], bool]:
    """What `diagnose` has left of these predictions, or what they say alone; and which it is."""
    path = os.path.join(folder, 'diagnostics.json')
    if os.path.exists(path):
        stored = workdir.read_json(path)
        if stored.get('predictions') == fingerprint(predictions):
            return stored, True
    return diagnostics.diagnose(
        predictions, None, None, replicates=settings.bootstrap, level=settings.level,
        seed=settings.seed, fits_ratings=bool(np.isfinite(predictions.crps).any())), False


# What is on the page.


def _write(path: str, runs: Sequence[Run], table: Mapping[str, Any] | None) -> str:
    """Writes the page; what was written, in a line.

    Raises:
      WorkdirError: it cannot be written.
    """
    import jinja2

    records = explore(runs)
    shown = choose(records, LIMIT)
    charts, style = _charts(), _file('base.css') + _file('report.css')
    data = {'runs': [{'name': run.name, 'workload': run.workload,
                      'taus': _rounded(run.predictions.taus)} for run in runs],
            'comparisons': shown}
    scripts = [_script(charts), _script(_file('report.js'))]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    # Names of folders may hold what UTF-8 does not.
    page = environment.from_string(_file('report.html')).render(
        title=f'qrm report: {runs[0].name}' if len(runs) == 1 else f'qrm report: {len(runs)} runs',
        runs=runs, sources=list(dict.fromkeys(run.evaluation['data'] for run in runs)),
        interval=_interval, verdicts=[_paragraphs(run.diagnosis) for run in runs],
        metrics=metric_lines(runs), table=table if table and _is_of(table, runs) else None,
        stale=bool(table) and not _is_of(table, runs), summary=tables.summary,
        figures=_figures(runs), total=len(records), shown=len(shown),
        scripts=scripts, hashes=[_hash(script) for script in scripts], style=style,
        spec=_as_json(json.loads(_file('quantiles.vl.json'))), data=_as_json(data))
    try:
        workdir.write_bytes(path, page.encode('utf-8', 'replace'))
    except OSError as error:
        raise WorkdirError(f'{path}: cannot be written ({error.strerror})') from error
    count = (f'{len(records):,}' if len(shown) == len(records)
             else f'{len(shown):,} of {len(records):,}')
    return f'{path}: {len(runs)} run{"s" * (len(runs) > 1)}, {count} comparisons'


def explore(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the page holds of each comparison, ready for JSON.

    Runs share a comparison if workload, id, texts in their order and judgement are the same.

    Returns:
      For each comparison 'id', 'workload', 'prompt' and 'responses' (None if the texts are gone),
      'pairs' ([preferred, other, label] each), 'ratings' (None if there are none), 'disagreement'
      (see `_disagreement`), and 'runs', for each run None or: 'margin', the smallest of its pairs;
      'spread', the mean of its responses; 'error', mean NLL of its pairs in nats, without pairs the
      mean CRPS of its ratings; 'rewards' and 'stds' of the responses; 'quantiles', [N] of each;
      'wins', the predicted probability of each pair that the preferred side is preferred.
    """
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place, run in enumerate(runs):
        twins: Counter[tuple[Any, ...]] = Counter()
        for i, (shared, own) in enumerate(_judged(run.predictions)):
            key = (run.workload, shared['id'], run.texts[i], json.dumps(shared['pairs']))
            twins[key] += 1
            record = records.setdefault((*key, twins[key]), {
                'workload': run.workload, **shared, 'prompt': None, 'responses': None,
                'disagreement': None, 'runs': [None] * len(runs)})
            record['runs'][place] = own
            if (comparison := run.comparisons[i]) is not None:
                record['prompt'] = as_text(comparison.prompt)
                record['responses'] = list(map(as_text, comparison.responses))
    for record in records.values():
        record['disagreement'] = _disagreement(record['runs'])
    return list(records.values())


def _judged(p: Predictions) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """For each comparison what every run has in common, and what this one says."""
    places = np.arange(len(p.comparison_ids) + 1)
    starts = np.searchsorted(p.comparisons, places)
    pair_starts = np.searchsorted(p.comparisons[p.pairs[:, 0]], places)
    chosen, rejected = p.rewards
    nll = statistics.log_scores(p.log_win.astype(np.float64), p.log_loss, p.label)
    for i, name in enumerate(p.comparison_ids.tolist()):
        own, pairs = (slice(*at[i:i + 2]) for at in (starts, pair_starts))
        error = nll[pairs] if len(p.pairs[pairs]) else p.crps[own][np.isfinite(p.crps[own])]
        ratings = p.ratings[own]
        yield ({
            'id': name,
            'pairs': [[int(a - starts[i]), int(b - starts[i]), *_rounded([label])]
                      for (a, b), label in zip(p.pairs[pairs], p.label[pairs], strict=True)],
            'ratings': _rounded(ratings) if np.isfinite(ratings).any() else None,
        }, {
            'margin': _least((chosen - rejected)[pairs]),
            'spread': _rounded([p.stds[own].mean(dtype=np.float64)])[0],
            'error': _rounded([error.mean(dtype=np.float64)])[0] if len(error) else None,
            'rewards': _rounded(p.means[own]), 'stds': _rounded(p.stds[own]),
            'quantiles': [_rounded(row) for row in p.quantiles[own]],
            'wins': _rounded(np.exp(p.log_win[pairs].astype(np.float64))),
        })


def _disagreement(judged: Sequence[Mapping[str, Any] | None]) -> float | None:
    """How far apart runs are in the win probability of a pair, at most; None of one run or no pair.

    Rewards of different runs have different scales; probabilities compare.
    """
    wins = [own['wins'] for own in judged if own is not None]
    if len(wins) < 2 or not wins[0]:
        return None
    return _rounded([np.ptp(wins, axis=0).max()])[0]


def choose(records: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """All comparisons, or `limit` of them, evenly spaced in the order of their margins.

    The margin is that of the first run that has the comparison; those without pairs come last. So
    both ends are there, and shares of those that are shown are near those of all.
    """
    if len(records) <= limit:
        return records
    margins = [next(own['margin'] for own in record['runs'] if own is not None)
               for record in records]
    order = sorted(range(len(records)), key=lambda i: (margins[i] is None, margins[i] or 0.0))
    places = np.linspace(0, len(records) - 1, limit).round().astype(int)
    return [records[i] for i in sorted(order[place] for place in places)]


def metric_lines(runs: Sequence[Run]) -> list[list[str]]:
    """The table of the runs: a line of names, then one for each run; without empty columns."""
    lines = [['run', 'accuracy', 'AUC', 'NLL', 'ECE', 'CRPS', 'margin', 'reward std', 'spread',
              'crossing', 'comparisons', 'pairs', 'head', 'workload']]
    for run in runs:
        d, summary = run.diagnosis, run.evaluation['metrics']
        numbers = [f'{summary[key]:.3f}' if key in summary else ''
                   for key in ('auc', 'crps', 'margin', 'reward_std')]
        lines.append([
            run.name, _interval(d['accuracy']), numbers[0],
            *(_interval(d['calibration'][key]) for key in ('nll', 'ece')), *numbers[1:],
            _interval(d['spread']['mean']), f"{summary['crossing_rate']:.1%}",
            *(f"{d['counts'][key]:,}" for key in ('comparisons', 'pairs')),
            run.evaluation['head'], run.workload])
    filled = [any(cells) for cells in zip(*lines[1:], strict=True)]
    return [[cell for cell, keep in zip(line, filled, strict=True) if keep] for line in lines]


def _interval(number: Mapping[str, Any]) -> str:
    return '' if number['value'] is None else tables.enclosed(number)


def _is_of(table: Mapping[str, Any], runs: Sequence[Run]) -> bool:
    """Whether a table of a reproduction has the numbers of these runs: one may be judged anew."""
    found = {(run.workload, run.name): run.evaluation['metrics'] for run in runs}
    return all(
        (own := found.get((row['workload'], f'{row["workload"]}-{row["model"]}'))) is not None
        and all(row[key] == value for key, value in own.items())
        for row in table['rows'])


def _paragraphs(diagnosis: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The verdict as questions and answers; '' where a paragraph asks none."""
    found = []
    for paragraph in verdict(diagnosis).split('\n\n'):
        text = ' '.join(paragraph.split())
        question, mark, answer = text.partition('? ')
        found.append((question + mark.strip(), answer) if mark else ('', text))
    return found


def _figures(runs: Sequence[Run]) -> dict[str, list[tuple[str, str]]]:
    """Title -> (run and what of it, address that holds the SVG), of what there is to draw."""
    found: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        d, p = run.diagnosis, run.predictions
        last = len(p.taus) - 1
        pooled = len(p.pairs) and not p.pairwise  # whether rewards of different prompts compare
        panels = [
            ('Rewards of test responses', '', pooled and (
                lambda axes, p=p: figures.reward_densities(axes, p))),
            ('Calibration of win probabilities', '',
             lambda axes, d=d: figures.reliability(axes, d)),
            ('Spread against reward', '',
             lambda axes, d=d, p=p: figures.spread_against_reward(axes, d, p)),
            ('Each quantile as the reward', '',
             lambda axes, d=d: figures.quantiles_as_rewards(axes, d)),
            ('Coverage of ratings', '', lambda axes, d=d: figures.coverage(axes, d)),
            *(('Outer quantiles', f', quantile {i}', last and pooled and (
                lambda axes, p=p, i=i: figures.outer_quantile(axes, p, i))) for i in (0, last)),
            *(('Training', f', {key}', run.curve and (
                lambda axes, run=run, keys=(key, held_out): figures.training_curve(
                    axes, run.curve, *keys)))
              for key, held_out in (('loss', 'nll'), ('accuracy', 'accuracy')))]
        for title, part, draw in panels:
            if draw and (image := figures.svg(draw)):
                address = base64.b64encode(image.encode()).decode()
                found.setdefault(title, []).append(
                    (run.name + part, f'data:image/svg+xml;base64,{address}'))
    return found


def as_text(text: Text) -> str:
    """A text as it is, messages of a chat under the names of their roles."""
    if isinstance(text, str):
        return text
    return '\n\n'.join(
        f'{message.get("role", "message")}: ' + (
            content if isinstance(content := message.get('content'), str)
            else json.dumps(content, ensure_ascii=False, default=str))
        + ''.join(f'\n{key}: {json.dumps(value, ensure_ascii=False, default=str)}'
                  for key, value in message.items() if key not in ('role', 'content'))
        for message in text)


def _least(values: np.ndarray) -> float | None:
    return _rounded([values.min()])[0] if len(values) else None


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Numbers to `_DIGITS` significant digits; None for what is no number."""
    return [float(f'{value:.{_DIGITS}g}') if np.isfinite(value) else None for value in values]


# What the file is made of.


def _charts() -> str:
    """The chart library as a script.

    Raises:
      DataError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise DataError("a page needs the package vl-convert-python: pip install "
                        "'qrm-jax[report]'") from error
    return _bundled(vl_convert)


@functools.cache
def _bundled(package: Any) -> str:
    return package.javascript_bundle('window.vegaEmbed = vegaEmbed;')


def _file(name: str) -> str:
    return (resources.files('qrm.analysis') / 'page' / name).read_text(encoding='utf-8')


def _as_json(value: Any) -> str:
    """JSON that can stand in a script element, which any `</script` would end."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))
    return text.replace('<', '\\u003c')


def _script(text: str) -> str:
    """A script that can stand in its element; in strings and patterns alike \\x3C is <."""
    return re.sub(r'<(?=/script|!--)', r'\\x3C', text, flags=re.IGNORECASE)


def _hash(script: str) -> str:
    """By which a browser knows a script that may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
