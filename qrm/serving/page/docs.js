'use strict';
function add(parent, name, text, attributes = {}) {
  const element = parent.appendChild(document.createElement(name));
  element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function schema(content, definitions) {
  const found = content['application/json'].schema;
  const resolve = (value) => {
    if (Array.isArray(value)) return value.map(resolve);
    if (value === null || typeof value !== 'object') return value;
    if (value.$ref) return resolve(definitions[value.$ref.split('/').pop()]);
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, resolve(one)]));
  };
  return JSON.stringify(resolve(found), null, 1);
}

function show(api) {
  const main = document.getElementById('paths');
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      add(main, 'h2', `${method.toUpperCase()} ${path}`);
      add(main, 'p', operation.summary);
      for (const [title, content] of [['request', operation.requestBody.content],
                                      ['answer', operation.responses['200'].content]]) {
        const details = add(main, 'details', '');
        add(details, 'summary', `${title} of ${path}`);
        add(details, 'pre', schema(content, api.components.schemas),
            {tabindex: 0, role: 'region', 'aria-label': `${title} of ${path}`});
      }
    }
  }
}

fetch('openapi.json').then((answer) => answer.json()).then(show).catch(() => {
  const error = document.getElementById('error');
  error.textContent = 'The server does not answer. It may have been stopped.';
  error.hidden = false;
});
