'use strict';
const COLOURS = 6;
const get = (id) => document.getElementById(id);
let drawn = null;  // of the last answer: levels and quantiles

function add(parent, name, attributes = {}, text) {
  const space = parent.namespaceURI;
  const element = parent.appendChild(document.createElementNS(space, name));
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// --- the form ---

const areas = () => [...get('responses').querySelectorAll('textarea')];

function addResponse(text) {
  const field = add(get('responses'), 'div', {class: 'field'});
  const top = add(field, 'div', {class: 'top'});
  add(top, 'label');
  add(top, 'button', {type: 'button'}).onclick = () => {
    const place = areas().indexOf(area);
    field.remove();
    number();
    areas()[Math.max(place - 1, 0)].focus();
  };
  const area = add(field, 'textarea', {rows: 2, spellcheck: 'false'});
  area.value = text;
  number();
  return area;
}

function number() {
  [...get('responses').children].forEach((field, i) => {
    const [label, remove, area] = ['label', 'button', 'textarea'].map((name) => field.querySelector(name));
    area.id = `response${i + 1}`;
    label.htmlFor = area.id;
    label.textContent = `Response ${i + 1}`;
    remove.textContent = 'Remove';
    remove.setAttribute('aria-label', `Remove response ${i + 1}`);
    remove.hidden = get('responses').children.length === 1;
  });
}

// --- what is asked and answered ---

async function score(body) {
  let answer;
  try {
    answer = await fetch('score', {method: 'POST', body: JSON.stringify(body),
                                   headers: {'Content-Type': 'application/json'}});
  } catch {
    throw new Error('The server does not answer. It may have been stopped.');
  }
  const found = await answer.json().catch(() => ({}));
  if (answer.ok && found.rewards) return found;
  throw new Error(found.error ? `Refused: ${found.error}` : `The server answered with status ${answer.status}.`);
}

get('form').onsubmit = async (event) => {
  event.preventDefault();
  if (get('busy').textContent) return;
  const responses = areas().map((area) => area.value);
  const body = {prompt: get('prompt').value, responses};
  if (get('rule').value.trim()) body.rule = get('rule').value.trim();
  get('error').hidden = get('found').hidden = true;
  get('busy').textContent = 'Scoring …';
  try {
    show(responses, await score(body));
  } catch (error) {
    get('error').textContent = error.message;
    get('error').hidden = false;
  } finally {
    get('busy').textContent = '';
  }
};

function show(responses, found) {
  const {rewards, stds, levels, quantiles, tokens, cut} = found;
  get('caption').textContent = `By ${found.rule}, of ${found.model}${found.normalised ? ', normalised' : ''}`;
  get('cut').hidden = !cut;
  get('cut').textContent = `${cut} of ${rewards.length} dialogues ${cut === 1 ? 'is' : 'are'} longer than the server takes, and lost the beginning.`;
  const rows = get('rewards').tBodies[0];
  rows.replaceChildren();
  responses.forEach((response, i) => {
    const row = add(rows, 'tr');
    const head = add(row, 'th', {scope: 'row'});
    add(head, 'span', {class: `name curve${i % COLOURS}`}, i + 1);
    add(head, 'span', {class: 'text'}, response || '(empty)');
    for (const value of [rewards[i].toFixed(4), stds[i].toFixed(4), tokens[i]]) add(row, 'td', {}, value);
  });
  get('distributions').hidden = levels.length < 2;
  get('found').hidden = false;
  drawn = {levels, quantiles: quantiles.map((row) => [...row].sort((a, b) => a - b))};
  if (levels.length > 1) {
    curves();
    numbers();
  }
  get('found').focus();
}

function numbers() {
  const table = get('quantiles');
  const head = table.tHead.rows[0];
  head.replaceChildren();
  add(head, 'th', {scope: 'col'}, 'Response');
  for (const level of drawn.levels) add(head, 'th', {scope: 'col'}, level);
  table.tBodies[0].replaceChildren();
  drawn.quantiles.forEach((row, i) => {
    const line = add(table.tBodies[0], 'tr');
    add(line, 'th', {scope: 'row', class: `name curve${i % COLOURS}`}, i + 1);
    for (const value of row) add(line, 'td', {}, value.toFixed(3));
  });
}

// --- the chart: level against quantile ---

// Multiples of 1, 2 or 5 times a power of ten, about `count` of them, between two numbers.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / step);
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  return Array.from({length: Math.floor(high / step) - first + 1}, (_, i) => ((first + i) * step).toFixed(digits));
}

function curves() {
  const svg = get('curves');
  const [width, height] = [svg.clientWidth, svg.clientHeight];
  if (!drawn || !width) return;
  svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const all = drawn.quantiles.flat();
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const margin = 0.03 * (most - least) || 0.5;
  const [low, high] = [least - margin, most + margin];
  const x = (value) => 36 + (width - 52) * (value - low) / (high - low);
  const y = (level) => height - 44 - (height - 64) * level;
  for (const level of ['0', '0.25', '0.5', '0.75', '1']) {
    add(svg, 'line', {class: 'grid', x1: 36, x2: width - 16, y1: y(level), y2: y(level)});
    add(svg, 'text', {x: 30, y: y(level) + 4, 'text-anchor': 'end'}, level);
  }
  for (const value of ticks(low, high, width / 100)) {
    add(svg, 'line', {class: 'grid', x1: x(value), x2: x(value), y1: y(0), y2: y(1)});
    add(svg, 'text', {x: x(value), y: height - 26, 'text-anchor': 'middle'}, value);
  }
  add(svg, 'text', {x: (width + 20) / 2, y: height - 6, 'text-anchor': 'middle'}, 'reward');
  add(svg, 'text', {x: 36, y: 12}, 'level');
  drawn.quantiles.forEach((row, i) => {
    const group = add(svg, 'g', {class: `curve${i % COLOURS}`});
    const places = row.map((value, k) => [x(value), y(drawn.levels[k])]);
    add(group, 'polyline', {class: 'curve', points: places.join(' ')});
    for (const [cx, cy] of places) add(group, 'circle', {class: 'point', cx, cy, r: 3});
    const [endX, endY] = places[places.length - 1];
    add(group, 'text', {class: 'name', x: endX, y: endY - 8, 'text-anchor': 'middle'}, i + 1);
  });
}

get('more').onclick = () => addResponse('').focus();
addResponse(' A model that says how much people like a response.');
addResponse(' I do not know.');
new ResizeObserver(curves).observe(get('curves'));
