"""Looks at the pages of qrm in a real browser, as a person would, and counts what is wrong.

    python -m benchmarks.pages --browser=/usr/bin/chromium [--page=results/run/report.html]
    python -m benchmarks.pages --browser=/usr/bin/chromium --checkpoint=results/run

The first looks at a page of `qrm report`; without one it makes one of invented numbers beside
generated texts. The second starts `qrm serve`, and looks at its pages. At the width of a desktop
and of a phone, in light and dark, it opens everything and counts: messages of the console, requests
to anywhere else, pixels that stick out sideways, the keyboard's stops that are reached and show it,
and the least contrast of any text with what is behind it (WCAG 2.2 AA asks for 4.5). With
`--axe=axe.min.js`, from the package axe-core of npm, also its violations. It uses the pages by keys
alone: searches, sorts and moves in a report, and times that; asks a server for rewards, for what it
refuses, for texts that are far too long, and when it has been stopped.

Needs a Chromium and `pip install playwright 'qrm-jax[report,serve]'`.
"""

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy
from absl import flags

from benchmarks import serving
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
  'a[href], button:not(:disabled), input, select, textarea, summary, [tabindex="0"]')]
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


Use = Callable[[Any, str], Iterator[dict[str, Any]]]


def main() -> None:
    try:
        from playwright import sync_api
    except ImportError as error:
        raise DataError('needs the package playwright: pip install playwright') from error
    for path in filter(None, (flags.FLAGS.page, flags.FLAGS.browser, flags.FLAGS.axe)):
        if not os.path.exists(path):
            raise DataError(f'{path}: no such file')
    with tempfile.TemporaryDirectory() as folder, sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=flags.FLAGS.browser, args=['--no-sandbox'])
        print(f'Chromium {browser.version}', flush=True)
        if flags.FLAGS.checkpoint:
            _served(browser, folder)
        else:
            page = flags.FLAGS.page or invented(folder, flags.FLAGS.comparisons)
            print(f'{page}: {os.path.getsize(page) / 1e6:.1f} MB', flush=True)
            print(_looks(browser, f'file://{os.path.abspath(page)}', use_report))
        browser.close()


def _served(browser: Any, folder: str) -> None:
    """Starts the server, looks at its pages, and stops it beneath one of them."""
    command = serving.qrm_command(flags.FLAGS.checkpoint, flags.FLAGS.max_length)
    with serving.running(command, os.path.join(folder, 'serve.log')) as (port, process):
        address = f'http://127.0.0.1:{port}'
        print(_looks(browser, address + '/', use_scores), flush=True)
        print(_looks(browser, address + '/docs', use_docs), flush=True)
        tab = browser.new_page()
        tab.goto(address)
        process.send_signal(signal.SIGTERM)
        process.wait()
        tab.click('#score')
        print('stopped:', _told(tab, 'The server does not answer'))


def _looks(browser: Any, address: str, use: Use) -> str:
    """A table of what is found in each view."""
    looks = [look(browser, address, use, *view) for view in VIEWS]
    return tables.markdown([['', *(name for name, *_ in VIEWS)],
                            *([name, *(str(each[name]) for each in looks)] for name in looks[0])])


def look(browser: Any, address: str, use: Use, name: str, size: dict[str, int],
         scheme: str) -> dict[str, Any]:
    """What is found in one view of a page: name of a row -> cell.

    Args:
      browser: of playwright.
      address: of the page.
      use: uses it, and says what it found, each time that the page is to be looked at.
      name, size, scheme: of the view.
    """
    # axe-core is a script that the page itself would not run.
    context = browser.new_context(viewport=size, color_scheme=scheme,
                                  bypass_csp=bool(flags.FLAGS.axe))
    tab, messages, requests = context.new_page(), [], []
    tab.on('console', lambda message: messages.append((message.text, message.location['url'])))
    tab.on('pageerror', lambda error: messages.append((str(error), '')))
    tab.on('request', lambda request: requests.append(request.url))
    tab.goto(address)
    found: dict[str, Any] = {}
    seen = []
    for part in use(tab, name):
        found |= part
        seen.append(_inspect(tab, name))
    contrast, sideways, violations = zip(*seen, strict=True)
    found['least contrast of text'] = f'{min(contrast):.2f}'
    found['sticks out, pixels'] = max(sideways)
    if flags.FLAGS.axe:
        found['axe: violations'] = sum(violations)
    # What is asked for and refused is a message of the browser, not of the page.
    messages = [text for text, url in messages if url != address + 'score']
    origin = address if address.startswith('file:') else address.rsplit('/', 1)[0]
    found['messages of the console'] = len(messages)
    found['requests to others'] = sum(
        not url.startswith((origin, 'data:')) for url in requests)
    for message in messages:
        print(f'{name}: console: {message}')
    context.close()
    return found


def _inspect(tab: Any, name: str) -> tuple[float, int, int]:
    """Least contrast, pixels that stick out, and violations that axe finds, with all opened."""
    tab.evaluate(_OPEN)
    ratio, where = tab.evaluate(_CONTRAST)
    if ratio < 4.5:
        print(f'{name}: contrast {ratio:.2f}: {where}')
    violations = []
    if flags.FLAGS.axe:
        if not tab.evaluate('() => "axe" in window'):
            tab.add_script_tag(path=flags.FLAGS.axe)
        violations = tab.evaluate('() => axe.run()')['violations']
        for rule in violations:
            print(f'{name}: axe: {rule["id"]}: {rule["nodes"][0]["html"][:80]}')
    return ratio, tab.evaluate(_SIDEWAYS), sum(len(rule['nodes']) for rule in violations)


def _shoot(tab: Any, name: str, part: str, **options: Any) -> None:
    if flags.FLAGS.shots:
        os.makedirs(flags.FLAGS.shots, exist_ok=True)
        stem = os.path.join(flags.FLAGS.shots, name.replace(', ', '_'))
        tab.screenshot(path=f'{stem}_{part}.png', **options)


def _stops(tab: Any) -> str:
    """How many stops Tab reaches and shows, of how many."""
    tab.evaluate('() => { window.scrollTo(0, 0); document.activeElement.blur(); }')
    count, shown = tab.evaluate(_STOPS), set()
    for _ in range(count + 1):
        tab.keyboard.press('Tab')
        if (stop := tab.evaluate(_FOCUSED)) and stop[1]:
            shown.add(stop[0])
    return f'{len(shown)}, {count}'


# --- the pages of a server -----------------------------------------------------------------------


def use_scores(tab: Any, name: str) -> Iterator[dict[str, Any]]:
    """Asks for rewards by keys alone, then for what is refused, and for what is far too long.

    Raises:
      DataError: the page does not show what it should.
    """
    for stop, text in (('prompt', 'Why?'), ('response1', ' So.'), ('response2', ' No.')):
        _tab_to(tab, stop)
        tab.keyboard.press('Control+A')
        tab.keyboard.type(text)
    _tab_to(tab, 'score')
    tab.keyboard.press('Enter')
    tab.wait_for_selector('#found')
    texts = tab.locator('#rewards .text').all_inner_texts()
    curves = tab.locator('#curves polyline').count()
    if texts != [' So.', ' No.'] or curves not in (0, 2):  # 0: of a model with scalar rewards
        raise DataError(f'the page shows the responses {texts} and {curves} curves, expected 2')
    _shoot(tab, name, 'rewards', full_page=True)
    yield {'keys: stops reached, of': _stops(tab)}
    tab.fill('#rule', 'median')
    tab.click('#score')
    _told(tab, "Refused: rule 'median'")
    yield {}
    tab.fill('#rule', '')
    tab.fill('#prompt', '')
    for stop in ('response1', 'response2'):
        tab.fill(f'#{stop}', ' word' * 2 * flags.FLAGS.max_length + 'word' * 5_000)
    tab.click('#score')
    tab.wait_for_selector('#found')
    if not tab.inner_text('#cut').startswith('2 of 2 dialogues are longer'):
        raise DataError('the page does not say that two dialogues are too long')
    yield {}


def use_docs(tab: Any, name: str) -> Iterator[dict[str, Any]]:
    """Opens everything."""
    tab.wait_for_selector('details')
    tab.evaluate(_OPEN)
    _shoot(tab, name, 'docs')
    yield {'paths': tab.locator('h2').count(), 'keys: stops reached, of': _stops(tab)}


def _tab_to(tab: Any, stop: str) -> None:
    """Presses Tab until an element has the focus.

    Raises:
      DataError: it never has.
    """
    for _ in range(tab.evaluate(_STOPS) + 1):
        if tab.evaluate('() => document.activeElement.id') == stop:
            return
        tab.keyboard.press('Tab')
    raise DataError(f'the keyboard does not reach #{stop}')


def _told(tab: Any, message: str) -> str:
    """The error that a page shows.

    Raises:
      DataError: it does not begin so.
    """
    tab.wait_for_selector('#error')
    if not (found := tab.inner_text('#error')).startswith(message):
        raise DataError(f'the page says {found!r}, expected {message!r}')
    return found


# --- a report ------------------------------------------------------------------------------------


def use_report(tab: Any, name: str) -> Iterator[dict[str, Any]]:
    """Searches, sorts and moves."""
    tab.wait_for_selector('.chart svg')
    drawn = tab.evaluate('() => performance.now()')
    ready = tab.evaluate(
        '() => performance.getEntriesByType("navigation")[0].domContentLoadedEventStart')
    found = {'list is there, ms': round(ready), 'charts are there, ms': round(drawn)}
    found |= _times(tab)
    found['keys: stops reached, of'] = _stops(tab)
    _move_by_keys(tab)
    for part in ('verdict', 'explorer') if flags.FLAGS.shots else ():
        tab.evaluate(f'() => document.getElementById("{part}").scrollIntoView()')
        _shoot(tab, name, part)
    yield found


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


def _move_by_keys(tab: Any) -> None:
    """Shows the next comparison by keys alone.

    Raises:
      DataError: a key does not do what it should.
    """
    tab.focus('#list button')
    before = tab.inner_text('#detail-title')
    tab.keyboard.press('ArrowDown')
    tab.keyboard.press('Enter')
    focused = tab.evaluate('() => document.activeElement.id')
    if focused != 'detail' or tab.inner_text('#detail-title') == before:
        raise DataError('the arrow and Enter in the list do not show the next comparison')
    tab.wait_for_selector('.chart svg')


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
        pair_stds=np.hypot(*quantiles.std(axis=1).reshape(count, 2).T),
        crps=unknown, ratings=unknown, lengths=np.full(2 * count, 50, np.int32),
        comparisons=np.repeat(np.arange(count, dtype=np.int32), 2),
        comparison_ids=np.array([c.id for c in comparisons]), comparison_groups=np.arange(count),
        pairs=np.arange(2 * count, dtype=np.int32).reshape(count, 2),
        label=np.ones(count, np.float32), log_win=-np.logaddexp(0.0, -margin).astype(np.float32),
        log_loss=-np.logaddexp(0.0, margin).astype(np.float32))


def _define_flags() -> None:
    """As the program begins: others that define the same names can be imported beside it."""
    flags.DEFINE_string('page', '', 'Report to look at. Default: an invented one.')
    flags.DEFINE_string('checkpoint', '', 'Reward model, of whose server to look at the pages.')
    flags.DEFINE_integer('max_length', 1024, "Tokens of a dialogue, the server's.", lower_bound=8)
    flags.DEFINE_string('browser', '/usr/bin/chromium', 'Program of the browser.')
    flags.DEFINE_string('axe', '', 'axe.min.js, to check accessibility with too.')
    flags.DEFINE_string('shots', '', 'Folder for pictures. Default: none are taken.')
    flags.DEFINE_integer('comparisons', report.LIMIT, 'Of the invented page.')


if __name__ == '__main__':
    _define_flags()
    launch.run(main)
