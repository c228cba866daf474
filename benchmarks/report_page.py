"""Looks at a page of `qrm report` in a real browser, as a person would, and counts what is wrong.

    python -m benchmarks.report_page --browser=/usr/bin/chromium [--page=results/run/report.html]

Without a page it makes one of invented numbers beside generated texts. At the width of a desktop
and of a phone, in light and dark, it opens everything and counts: messages of the console, requests
to anywhere, pixels that stick out sideways, the keyboard's stops that are reached and show it, and
the least contrast of any text with what is behind it (WCAG 2.2 AA asks for 4.5). With
`--axe=axe.min.js`, from the package axe-core of npm, also its violations. Then it searches, sorts
and moves by keys alone, and times that.

Needs a Chromium and `pip install playwright 'qrm-jax[report]'`.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from absl import flags

from qrm.analysis import report, tables
from qrm.commands import launch
from qrm.data import demo, sources
from qrm.data.comparisons import Comparison, DataError
from qrm.rewards import heads, metrics
from qrm.training import config, workdir

VIEWS = [(f'{name}, {scheme}', {'width': width, 'height': height}, scheme)
         for name, width, height in (('desktop', 1280, 900), ('phone', 390, 844))
         for scheme in ('light', 'dark')]
_LONGER = 5  # generated responses that make one of the length of real ones

# The least contrast of any visible text, and where it is; what is disabled is exempt.
_CONTRAST = """() => {
  const parse = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  let least = [Infinity, ''];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || ['SCRIPT', 'NOSCRIPT', 'STYLE', 'OPTION'].includes(element.tagName)
      || element.disabled || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const color = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [parse(color), behind(element)].map(luminance).sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least[0]) least = [ratio, element.outerHTML.slice(0, 80)];
  }
  return least;
}"""
# What can be reached by the keyboard, and what has been.
_STOPS = """() => [...document.querySelectorAll(
  'a[href], button:not(:disabled), input, select, summary, [tabindex="0"]')]
  .filter((e) => e.checkVisibility()).length"""
_FOCUSED = """() => {
  const e = document.activeElement;
  if (e === document.body) return null;
  window.stops ||= new Map();
  if (!window.stops.has(e)) window.stops.set(e, window.stops.size);
  return [window.stops.get(e), getComputedStyle(e).outlineStyle !== 'none'];
}"""
_OPEN = '() => document.querySelectorAll("details").forEach((e) => { e.open = true; })'
_SIDEWAYS = '() => document.documentElement.scrollWidth - document.documentElement.clientWidth'
# Milliseconds from an input to the list that it leads to, with its layout.
_TIMED = """([id, value, event]) => new Promise((resolve) => {
  const start = performance.now();
  new MutationObserver((_, observer) => {
    observer.disconnect();
    document.body.offsetHeight;
    resolve(performance.now() - start);
  }).observe(document.getElementById('list'), {childList: true});
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event(event, {bubbles: true}));
})"""


def main() -> None:
    try:
        from playwright import sync_api
    except ImportError as error:
        raise DataError('needs the package playwright: pip install playwright') from error
    for path in filter(None, (flags.FLAGS.page, flags.FLAGS.browser, flags.FLAGS.axe)):
        if not os.path.exists(path):
            raise DataError(f'{path}: no such file')
    with tempfile.TemporaryDirectory() as folder, sync_api.sync_playwright() as player:
        page = flags.FLAGS.page or invented(folder, flags.FLAGS.comparisons)
        browser = player.chromium.launch(executable_path=flags.FLAGS.browser, args=['--no-sandbox'])
        print(f'{os.path.getsize(page) / 1e6:.1f} MB, Chromium {browser.version}', flush=True)
        looks = [look(browser, page, *view) for view in VIEWS]
        browser.close()
    names = list(looks[0])
    print(tables.markdown([['', *(name for name, *_ in VIEWS)],
                           *([name, *(str(each[name]) for each in looks)] for name in names)]))


def look(browser: Any, page: str, name: str, size: dict[str, int],
         scheme: str) -> dict[str, Any]:
    """What is found in one view of a page: name of a row -> cell."""
    # axe-core is a script that the page itself would not run.
    context = browser.new_context(viewport=size, color_scheme=scheme,
                                  bypass_csp=bool(flags.FLAGS.axe))
    tab, messages, requests = context.new_page(), [], []
    tab.on('console', lambda message: messages.append(message.text))
    tab.on('pageerror', lambda error: messages.append(str(error)))
    tab.on('request', lambda request: requests.append(request.url))
    tab.goto(f'file://{os.path.abspath(page)}')
    tab.wait_for_selector('.chart svg')
    drawn = tab.evaluate('() => performance.now()')
    ready = tab.evaluate(
        '() => performance.getEntriesByType("navigation")[0].domContentLoadedEventStart')
    found = {'list is there, ms': round(ready), 'charts are there, ms': round(drawn)}
    found |= _times(tab)
    found['keys: stops reached, of'] = '{}, {}'.format(*_by_keys(tab))
    if flags.FLAGS.shots:
        os.makedirs(flags.FLAGS.shots, exist_ok=True)
        stem = os.path.join(flags.FLAGS.shots, name.replace(', ', '_'))
        for part in ('verdict', 'explorer'):
            tab.evaluate(f'() => document.getElementById("{part}").scrollIntoView()')
            tab.screenshot(path=f'{stem}_{part}.png')
    tab.evaluate(_OPEN)
    ratio, where = tab.evaluate(_CONTRAST)
    found['least contrast of text'] = f'{ratio:.2f}'
    if ratio < 4.5:
        print(f'{name}: contrast {ratio:.2f}: {where}')
    found['sticks out, pixels'] = tab.evaluate(_SIDEWAYS)
    if flags.FLAGS.axe:
        tab.add_script_tag(path=flags.FLAGS.axe)
        violations = tab.evaluate('() => axe.run()')['violations']
        found['axe: violations'] = sum(len(rule['nodes']) for rule in violations)
        for rule in violations:
            print(f'{name}: axe: {rule["id"]}: {rule["nodes"][0]["html"][:80]}')
    found['messages of the console'] = len(messages)
    found['requests'] = len([url for url in requests if not url.startswith(('file:', 'data:'))])
    for message in messages:
        print(f'{name}: console: {message}')
    context.close()
    return found


def _times(tab: Any) -> dict[str, int]:
    """How long the list takes to follow, from an input to its layout; leaves it as it was."""
    inputs = {'first search, ms': ('search', 'in winter', 'input'),
              'next search, ms': ('search', 'plants', 'input'),
              'end of the search, ms': ('search', '', 'input'),
              'wrong only, ms': ('filter', 'wrong', 'change'),
              'all, ms': ('filter', 'all', 'change'),
              'sort by spread, ms': ('sort', 'spread', 'change'),
              'sort by error, ms': ('sort', 'error', 'change')}
    return {name: round(tab.evaluate(_TIMED, list(given))) for name, given in inputs.items()}


def _by_keys(tab: Any) -> tuple[int, int]:
    """How many stops Tab reaches and shows, of how many; and uses the explorer by keys alone.

    Raises:
      DataError: a key does not do what it should.
    """
    tab.evaluate('() => { window.scrollTo(0, 0); document.activeElement.blur(); }')
    count, shown = tab.evaluate(_STOPS), set()
    for _ in range(count + 1):
        tab.keyboard.press('Tab')
        if (stop := tab.evaluate(_FOCUSED)) and stop[1]:
            shown.add(stop[0])
    tab.focus('#list button')
    before = tab.inner_text('#detail-title')
    tab.keyboard.press('ArrowDown')
    tab.keyboard.press('Enter')
    focused = tab.evaluate('() => document.activeElement.id')
    if focused != 'detail' or tab.inner_text('#detail-title') == before:
        raise DataError('the arrow and Enter in the list do not show the next comparison')
    tab.wait_for_selector('.chart svg')
    return len(shown), count


def invented(folder: str, count: int) -> str:
    """Leaves two runs of invented rewards, beside generated texts as long as real ones, and a page.

    Args:
      folder: where all goes.
      count: comparisons.

    Returns:
      Path of the page.
    """
    short = demo.generate('helpful', 'test', count * _LONGER, 0).comparisons
    rows = [{'id': c.id, 'prompt': c.prompt, **{
        side: ''.join(other.responses[i] for other in short[place::count])
        for i, side in enumerate(('chosen', 'rejected'))}}
            for place, c in enumerate(short[:count])]
    data = os.path.join(folder, 'pairs.jsonl')
    workdir.write_text(data, ''.join(json.dumps(row) + '\n' for row in rows))
    settings = config.build({'data.path': data, 'analysis.bootstrap': 20})
    comparisons, _ = sources.whole(sources.read(settings.data, settings.workload))
    members = [os.path.join(folder, name) for name in ('one', 'other')]
    for seed, member in enumerate(members):
        workdir.make(member)
        predictions = _invented(seed, comparisons)
        metrics.save_predictions(os.path.join(member, 'predictions.npz'), predictions,
                                 report.text_digests(comparisons))
        workdir.write_json(os.path.join(member, 'evaluation.json'), {
            'data': data, 'workload': settings.workload, 'head': 'quantile',
            'metrics': metrics.summarise(predictions),
            'config': {key: settings[key].to_dict() for key in ('data', 'analysis')}})
    path = os.path.join(folder, 'report.html')
    print(report.report(members, path), flush=True)
    return path


def _invented(seed: int, comparisons: Sequence[Comparison]) -> metrics.Predictions:
    """Quantiles of Gaussians with random means and spreads, for pairs with the preferred first."""
    rng, count, taus = np.random.default_rng(seed), len(comparisons), heads.taus(10)
    means = rng.normal([0.5, 0.0], 1.0, (count, 2))
    quantiles = (means[..., None] + rng.uniform(0.5, 1.5, (count, 2, 1))
                 * scipy.stats.norm.ppf(taus)).reshape(2 * count, -1).astype(np.float32)
    margin = np.subtract(*means.T)
    unknown = np.full(2 * count, np.nan, np.float32)
    return metrics.Predictions(
        quantiles=quantiles, taus=taus, means=quantiles.mean(axis=1), stds=quantiles.std(axis=1),
        crps=unknown, ratings=unknown, lengths=np.full(2 * count, 50, np.int32),
        comparisons=np.repeat(np.arange(count, dtype=np.int32), 2),
        comparison_ids=np.array([c.id for c in comparisons]), comparison_groups=np.arange(count),
        pairs=np.arange(2 * count, dtype=np.int32).reshape(count, 2),
        label=np.ones(count, np.float32), log_win=-np.logaddexp(0.0, -margin).astype(np.float32),
        log_loss=-np.logaddexp(0.0, margin).astype(np.float32))


def _define_flags() -> None:
    """As the program begins: others that define the same names can be imported beside it."""
    flags.DEFINE_string('page', '', 'Page to look at. Default: an invented one.')
    flags.DEFINE_string('browser', '/usr/bin/chromium', 'Program of the browser.')
    flags.DEFINE_string('axe', '', 'axe.min.js, to check accessibility with too.')
    flags.DEFINE_string('shots', '', 'Folder for pictures. Default: none are taken.')
    flags.DEFINE_integer('comparisons', report.LIMIT, 'Of the invented page.')


if __name__ == '__main__':
    _define_flags()
    launch.run(main)
