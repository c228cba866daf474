'use strict';
// The explorer: a list of comparisons, a page of it at a time, and one comparison in full.
(() => {
  const PAGE = 12;
  const COLORS = ['#0072B2', '#D55E00', '#009E73', '#B85F92', '#8C7000', '#6E7781'];
  // The shapes of the chart's points, in a square of 16.
  const SHAPES = ['M8 2a6 6 0 1 0 .01 0z', 'M3 3h10v10H3z', 'M8 2l6 12H2z', 'M8 1l6 7-6 7-6-7z',
    'M8 14L2 2h12z', 'M6 2h4v4h4v4h-4v4H6v-4H2V6h4z'];
  const $ = (id) => document.getElementById(id);
  const {runs, comparisons} = JSON.parse($('data').textContent);
  const spec = JSON.parse($('spec').textContent);
  comparisons.forEach((comparison, place) => { comparison.place = place; });

  let texts = null;  // of each comparison in lower case, made by the first search
  let found = comparisons;
  let page = 0;
  let current = null;
  let drawn = [];

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  function option(value, text) {
    return element('option', {value}, text);
  }

  const letter = (i) => (i < 26 ? String.fromCharCode(65 + i) : `#${i + 1}`);
  const exactly = (value) => (value === null ? '–' : String(value).replace('-', '−'));
  const number = (value) => exactly(value === null ? null : Number(value.toPrecision(3)));

  function searched(comparison) {
    texts ||= comparisons.map((c) => [c.id, c.prompt || '', ...(c.responses || [])]
      .join('\n').toLowerCase());
    return texts[comparison.place];
  }

  function aheadIn(own) {
    return own === null || own.margin === null ? null : Math.sign(own.margin);
  }

  // What the chosen run says of a comparison; if none is chosen, the first one that has it.
  function chosen(comparison) {
    const run = $('run').value;
    return run === '' ? comparison.runs.find((own) => own !== null) : comparison.runs[run];
  }

  function kept(comparison, filter) {
    const ahead = aheadIn(chosen(comparison));
    if (filter === 'wrong') return ahead === -1;
    if (filter === 'right') return ahead === 1;
    if (filter === 'split') {
      const all = comparison.runs.map(aheadIn);
      return all.includes(1) && all.includes(-1);
    }
    return true;
  }

  function select() {
    const key = $('sort').value;
    const sign = Number($('order').value);
    const filter = $('filter').value;
    const workload = $('workload').value;
    const words = $('search').value.toLowerCase().split(/\s+/).filter(Boolean);
    found = comparisons.filter((c) => chosen(c) !== null
      && (!workload || c.workload === workload) && kept(c, filter)
      && words.every((word) => searched(c).includes(word)));
    const keyed = found.map((c) => [key in c ? c[key] : chosen(c)[key], c]);
    keyed.sort(([a, c], [b, d]) => (
      a === b ? c.place - d.place : a === null ? 1 : b === null ? -1 : sign * (a - b)));
    found = keyed.map(([, c]) => c);
    page = 0;
    const count = found.length.toLocaleString('en');
    $('status').textContent =
      `${count} of ${comparisons.length.toLocaleString('en')} comparisons`;
    showList();
  }

  function snippet(comparison) {
    const whole = comparison.prompt === null ? comparison.id
      : comparison.prompt || (comparison.responses || [''])[0];
    return whole.replace(/\s+/g, ' ').trim().slice(0, 160) || comparison.id;
  }

  function mark(own) {
    const ahead = aheadIn(own);
    if (ahead === null) return '';
    const [kind, word] = {'-1': ['wrong', '✗ wrong'], 1: ['right', '✓ right'], 0: ['', 'tied']}[ahead];
    return element('span', {class: kind}, word);
  }

  function facts(comparison) {
    const own = chosen(comparison);
    const parts = [`margin ${number(own.margin)}`, `spread ${number(own.spread)}`,
      `error ${number(own.error)}`];
    if (comparison.disagreement !== null) {
      parts.push(`disagreement ${number(comparison.disagreement)}`);
    }
    return element('span', {class: 'facts'}, mark(own), ` ${parts.join(' · ')}`);
  }

  function showList() {
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    const rows = found.slice(page * PAGE, (page + 1) * PAGE).map((comparison) => {
      const button = element('button', {type: 'button', 'data-place': comparison.place,
        'aria-current': comparison === current ? 'true' : null},
      element('span', {class: 'text'}, snippet(comparison)), facts(comparison));
      button.addEventListener('click', () => show(comparison, true));
      return element('li', {}, button);
    });
    $('list').replaceChildren(...rows);
    $('list').setAttribute('start', page * PAGE + 1);
    $('page').textContent = found.length ? `page ${page + 1} of ${last + 1}` : 'nothing found';
    $('first').disabled = $('before').disabled = page === 0;
    $('after').disabled = $('last').disabled = page === last;
  }

  function turn(to) {
    page = to;
    showList();
    $('list').querySelector('button')?.focus();
  }

  // Up and down in the list, over the ends of a page too.
  function move(event) {
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    const button = event.target.closest('button');
    if (!step || !button) return;
    event.preventDefault();
    const place = found.findIndex((c) => c.place === Number(button.dataset.place)) + step;
    if (place < 0 || place >= found.length) return;
    if (Math.floor(place / PAGE) !== page) {
      page = Math.floor(place / PAGE);
      showList();
    }
    $('list').querySelectorAll('button')[place % PAGE].focus();
  }

  function key(i) {
    const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
    const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
    svg.setAttribute('viewBox', '0 0 16 16');
    svg.setAttribute('class', 'key');
    svg.setAttribute('aria-hidden', 'true');
    path.setAttribute('d', SHAPES[i % SHAPES.length]);
    path.setAttribute('fill', COLORS[i % COLORS.length]);
    svg.append(path);
    return svg;
  }

  function role(comparison, i) {
    const better = comparison.pairs.filter(([a]) => a === i).map(([, b]) => letter(b));
    const worse = comparison.pairs.filter(([, b]) => b === i).map(([a]) => letter(a));
    const size = comparison.runs.find((own) => own !== null).rewards.length;
    const parts = [];
    if (size === 2) parts.push(better.length ? 'preferred' : worse.length ? 'rejected' : '');
    else if (better.length) parts.push(`preferred to ${better.join(', ')}`);
    const rating = comparison.ratings && comparison.ratings[i];
    if (rating !== null && rating !== undefined) parts.push(`rated ${exactly(rating)}`);
    const text = parts.filter(Boolean).join(', ');
    return `${letter(i)}${text ? `: ${text}` : ''}`;
  }

  function responses(comparison) {
    const size = comparison.runs.find((own) => own !== null).rewards.length;
    const cards = Array.from({length: size}, (_, i) => element('div', {},
      element('h4', {}, key(i), role(comparison, i)),
      element('div', {class: 'text-block'},
        comparison.responses === null ? 'The text is not there.'
          : comparison.responses[i].trim() || '(empty)')));
    return element('div', {class: 'responses'}, ...cards);
  }

  function numbers(comparison) {
    const head = ['run', 'response', 'reward', 'spread', 'quantiles, lowest to highest τ'];
    const body = comparison.runs.flatMap((own, run) => (own === null ? [] : own.rewards.map(
      (reward, i) => element('tr', {},
        element('th', {scope: 'row'}, runs[run].name), element('td', {}, letter(i)),
        element('td', {}, exactly(reward)), element('td', {}, exactly(own.stds[i])),
        element('td', {}, own.quantiles[i].map(exactly).join(' '))))));
    const table = element('table', {}, element('thead', {}, element('tr', {},
      ...head.map((name) => element('th', {scope: 'col'}, name)))), element('tbody', {}, ...body));
    return element('details', {}, element('summary', {}, 'All numbers of this comparison'),
      element('div', {class: 'scroll', tabindex: 0, role: 'region',
        'aria-label': 'All numbers of this comparison'}, table));
  }

  // A single number is the same at every level.
  function points(own, taus) {
    return own.quantiles.flatMap((quantiles, i) => (taus.length === 1
      ? [0, taus[0], 1].map((tau) => ({response: i % COLORS.length, tau, quantile: quantiles[0],
        shown: tau === taus[0]}))
      : quantiles.map((quantile, j) => ({response: i % COLORS.length, tau: taus[j], quantile,
        shown: true}))));
  }

  function says(own, pairs) {
    const rewards = own.rewards.map((reward, i) => `${letter(i)} ${number(reward)}`).join(', ');
    const wins = own.wins.map((win, i) => `P(${letter(pairs[i][0])} is better than `
      + `${letter(pairs[i][1])}): predicted ${number(win)}, judged ${pairs[i][2]}`).join('; ');
    return wins ? `Rewards: ${rewards}. ${wins}.` : `Rewards: ${rewards}.`;
  }

  function charts(comparison) {
    const made = [];
    const boxes = comparison.runs.flatMap((own, run) => {
      if (own === null) return [];
      const chart = element('div', {class: 'chart', role: 'img',
        'aria-label': `Quantile functions of ${runs[run].name}. ${says(own, comparison.pairs)}`});
      made.push([chart, points(own, runs[run].taus)]);
      return [element('div', {}, element('h4', {}, runs[run].name, ' ', mark(own)), chart,
        element('p', {class: 'note'}, says(own, comparison.pairs)))];
    });
    return [element('div', {class: 'charts'}, ...boxes), made];
  }

  // With `ast` no expression is evaluated as JavaScript, which this page does not allow.
  async function draw(made) {
    drawn.forEach((chart) => chart.finalize());
    drawn = [];
    const options = {
      mode: 'vega-lite', renderer: 'svg', actions: false, ast: true, defaultStyle: false,
    };
    const next = await Promise.all(made.map(([chart, values]) => vegaEmbed(
      chart, {...spec, width: chart.clientWidth, data: {values}}, options)));
    if (next.some(({view}) => !view.container().isConnected)) {  // another one was shown meanwhile
      next.forEach((chart) => chart.finalize());
    } else {
      drawn = next;
    }
  }

  function show(comparison, focus) {
    current = comparison;
    const place = found.indexOf(comparison);
    const [boxes, made] = charts(comparison);
    const step = (by, text) => {
      const to = place < 0 ? undefined : found[place + by];
      const button = element('button', {type: 'button'}, text);
      button.disabled = to === undefined;
      button.addEventListener('click', () => {
        page = Math.floor((place + by) / PAGE);
        show(to, true);
      });
      return button;
    };
    const back = element('button', {type: 'button', class: 'back'}, 'Back to the list');
    back.addEventListener('click', () => {
      const button = $('list').querySelector('[aria-current]') || $('list').querySelector('button');
      (button || $('search')).focus();
    });
    const prompt = comparison.responses === null ? 'The text is not there.'
      : comparison.prompt.trim() || '(no prompt)';
    $('detail').replaceChildren(
      element('h3', {id: 'detail-title'}, `${comparison.workload}: ${comparison.id}`),
      element('div', {class: 'steps'}, step(-1, 'Previous'), step(1, 'Next'), back),
      element('h4', {}, 'Prompt'), element('div', {class: 'text-block'}, prompt),
      responses(comparison), element('h4', {}, 'Quantile functions'), boxes, numbers(comparison));
    draw(made);
    showList();
    if (focus) {
      $('detail').focus({preventScroll: true});
      $('detail').scrollIntoView({block: 'start'});
    }
  }

  // The runs of the chosen workload; of all of them each comparison has a first one.
  function offerRuns() {
    const workload = $('workload').value;
    const before = $('run').value;
    const offered = runs.flatMap((run, i) => (
      !workload || run.workload === workload ? [option(i, run.name)] : []));
    if (!workload && new Set(runs.map((run) => run.workload)).size > 1) {
      offered.unshift(option('', 'the first of each workload'));
    }
    $('run').replaceChildren(...offered);
    if (offered.some((one) => one.value === before)) $('run').value = before;
    $('run').parentElement.hidden = offered.length < 2;
  }

  function start() {
    const workloads = [...new Set(comparisons.map((c) => c.workload))];
    workloads.forEach((name) => $('workload').append(option(name, name)));
    $('workload').parentElement.hidden = workloads.length < 2;
    offerRuns();
    const shared = comparisons.some((c) => c.disagreement !== null);
    if (!shared) {
      $('sort').querySelector('[value=disagreement]').remove();
      $('filter').querySelector('[value=split]').remove();
    }
    $('controls').addEventListener('submit', (event) => event.preventDefault());
    for (const id of ['run', 'order', 'filter']) $(id).addEventListener('change', select);
    $('workload').addEventListener('change', () => {
      offerRuns();
      select();
    });
    $('sort').addEventListener('change', () => {
      $('order').value = ['margin', 'place'].includes($('sort').value) ? '1' : '-1';
      select();
    });
    let waiting = null;
    $('search').addEventListener('input', () => {
      clearTimeout(waiting);
      waiting = setTimeout(select, 120);
    });
    $('list').addEventListener('keydown', move);
    $('first').addEventListener('click', () => turn(0));
    $('before').addEventListener('click', () => turn(page - 1));
    $('after').addEventListener('click', () => turn(page + 1));
    $('last').addEventListener('click', () => turn(Infinity));
    window.addEventListener('resize', () => drawn.forEach(
      ({view}) => view.width(view.container().clientWidth).run()));
    select();
    if (found.length) show(found[0], false);
  }

  start();
})();
