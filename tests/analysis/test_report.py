"""Pages of runs: numbers by hand, texts that stay texts, and data that are gone or were changed."""

import html.parser
import json
import os
import re
import sys

import numpy as np
import pytest

from qrm.analysis import diagnostics, report
from qrm.data import sources
from qrm.data.comparisons import Comparison, DataError
from qrm.rewards import metrics
from qrm.training import config as config_lib
from qrm.training import workdir
from qrm.training.workdir import WorkdirError
from tests.helpers import command, pair_predictions

# What would be read as HTML or end a script, were it not text.
TRICKY = '</script><b id="bold">bold</b><!-- & "quoted" \u2028 {{ 1 + 1 }}'


class _Page(html.parser.HTMLParser):
    """Elements and scripts of a page, as a browser finds them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._script = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == 'script':
            self._script = dict(attrs).get('id', '')
            self.scripts.append([self._script, ''])

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[-1][1] += data

    def handle_endtag(self, tag):
        if tag == 'script':
            self._script = None

    @property
    def data(self):
        return json.loads(dict(map(tuple, self.scripts))['data'])


def rows_of(count):
    return [{'id': f'row {i}', 'prompt': f'\n\nHuman: question {i}?\n\nAssistant:',
             'chosen': f' good {i}', 'rejected': f' bad {i}'} for i in range(count)]


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def judged(folder, data, predictions, **changes):
    """Leaves what an evaluation leaves, in a folder."""
    folder.mkdir(exist_ok=True)
    config = config_lib.build({'data.path': str(data), 'analysis.bootstrap': 20, **changes})
    comparisons, _ = sources.whole(sources.read(config.data, config.workload))
    predictions = predictions._replace(comparison_ids=np.array([c.id for c in comparisons]))
    metrics.save_predictions(str(folder / 'predictions.npz'), predictions,
                             report.text_digests(comparisons))
    workdir.write_json(str(folder / 'evaluation.json'), {
        'data': str(data), 'workload': config.workload, 'head': 'quantile',
        'metrics': metrics.summarise(predictions),
        'config': {key: config[key].to_dict() for key in ('data', 'analysis')}})
    return predictions


def page_of(path):
    return _Page(path.read_text(encoding='utf-8'))


@pytest.fixture
def run(tmp_path):
    """A judged run of 30 pairs in `run`, of which the first has tricky texts, and its rows."""
    rows = rows_of(30)
    rows[0] |= {'prompt': TRICKY, 'chosen': f' {TRICKY}', 'rejected': ' plain'}
    write_rows(tmp_path / 'pairs.jsonl', rows)
    rng = np.random.default_rng(0)
    p = pair_predictions(rng.normal(0.5, 1.0, (30, 3)), rng.normal(size=(30, 3)))
    judged(tmp_path / 'run', tmp_path / 'pairs.jsonl', p)
    return tmp_path, rows


def _run(name, predictions, comparisons, texts=None):
    return report.Run(
        name, {'workload': 'w', 'metrics': metrics.summarise(predictions), 'head': 'quantile',
               'data': 'd'}, predictions,
        texts or [b'%d' % i for i in range(len(predictions.comparison_ids))], comparisons, '', {},
        False, [])


def test_numbers_of_a_comparison_by_hand():
    p = pair_predictions([[1.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]],
                         log_win=np.log([0.75, 0.25]), log_loss=np.log([0.25, 0.75]),
                         label=np.array([1.0, 0.8], np.float32))
    other = p._replace(log_win=np.log(np.float32([0.5, 0.5])))
    first, second = report.explore([_run('a', p, [None, None]), _run('b', other, [None, None])])
    assert first['pairs'] == [[0, 1, 1.0]]
    assert first['prompt'] is first['responses'] is first['ratings'] is None
    own = first['runs'][0]
    assert (own['rewards'], own['stds'], own['wins']) == ([2.0, 0.0], [1.0, 0.0], [0.75])
    assert own['quantiles'] == [[1.0, 3.0], [0.0, 0.0]]
    assert (own['margin'], own['spread'], own['error']) == (2.0, 0.5, 0.2877)  # -ln .75
    assert first['disagreement'] == second['disagreement'] == 0.25
    # -.8 ln .25 - .2 ln .75
    assert (second['runs'][0]['margin'], second['runs'][0]['error']) == (-1.0, 1.167)


def test_the_least_margin_of_several_pairs_and_errors_of_ratings():
    p = pair_predictions([[5.0]], [[3.0]])._replace(
        quantiles=np.float32([[5], [3], [4]]), means=np.float32([5, 3, 4]),
        stds=np.zeros(3, np.float32), crps=np.float32([0.5, np.nan, 1.0]),
        ratings=np.float32([1, np.nan, 2]), comparisons=np.zeros(3, np.int32),
        pairs=np.int32([[0, 1], [1, 2]]), label=np.ones(2, np.float32),
        log_win=np.log(np.float32([0.9, 0.4])), log_loss=np.log(np.float32([0.1, 0.6])))
    record, = report.explore([_run('a', p, [None])])
    assert (record['pairs'], record['runs'][0]['margin']) == ([[0, 1, 1.0], [1, 2, 1.0]], -1.0)
    assert record['ratings'] == [1.0, None, 2.0]
    none = p._replace(pairs=np.zeros((0, 2), np.int32), label=np.zeros(0, np.float32),
                      log_win=np.zeros(0, np.float32), log_loss=np.zeros(0, np.float32))
    record, = report.explore([_run('a', none, [None])])
    assert (record['runs'][0]['margin'], record['runs'][0]['error']) == (None, 0.75)


def test_runs_share_comparisons_of_the_same_texts_and_judgements():
    p = pair_predictions([[1.0], [2.0]], [[0.0], [0.0]])
    runs = [_run('a', p, [None, None], [b'x', b'y']), _run('b', p, [None, None], [b'x', b'z'])]
    records = report.explore(runs)
    assert [[own is not None for own in r['runs']] for r in records] == [
        [True, True], [True, False], [False, True]]
    assert [r['disagreement'] for r in records] == [0.0, None, None]
    # Rows that are the same twice are two comparisons.
    twice = p._replace(comparison_ids=np.array(['same', 'same']))
    assert len(report.explore([_run('a', twice, [None, None], [b'x', b'x'])])) == 2


def test_of_many_comparisons_some_evenly_spaced_by_margin_are_shown():
    margins = [3.0, None, -2.0, 0.0, 1.0, 5.0, 4.0]
    records = [{'place': i, 'runs': [None, {'margin': m}]} for i, m in enumerate(margins)]
    assert report.choose(records, 7) is records
    # In order -2, 0, 1, 3, 4, 5, none: the first, the middle and the last.
    assert [r['place'] for r in report.choose(records, 3)] == [0, 1, 2]
    assert [r['place'] for r in report.choose(records, 4)] == [1, 2, 4, 6]


def test_a_page_counts_what_it_does_not_show(run, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(report, 'LIMIT', 10)
    assert report.report([str(folder / 'run')]).endswith('1 run, 10 of 30 comparisons')
    text = (folder / 'run' / 'report.html').read_text(encoding='utf-8')
    assert '10 of 30 comparisons are on this page' in text
    assert len(_Page(text).data['comparisons']) == 10


def test_texts_stay_texts_and_nothing_is_loaded(run):
    folder, rows = run
    report.report([str(folder / 'run')])
    page = page_of(folder / 'run' / 'report.html')
    found = page.data['comparisons']
    assert [c['id'] for c in found] == [row['id'] for row in rows]
    assert (found[0]['prompt'], found[0]['responses']) == (TRICKY, [f' {TRICKY}', ' plain'])
    assert found[1]['responses'] == [rows[1]['chosen'], rows[1]['rejected']]
    assert not any(attributes.get('id') == 'bold' for _, attributes in page.elements)
    # The policy allows the scripts of the page alone, and no address but those that hold data.
    policy = next(a['content'] for tag, a in page.elements if a.get('http-equiv'))
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    assert "default-src 'none'" in policy
    assert 'unsafe-eval' not in policy
    assert [report._hash(text) for name, text in page.scripts if not name] == allowed
    addresses = [a[key] for _, a in page.elements for key in ('src', 'href') if key in a]
    assert len(addresses) > 8
    assert all(address.startswith(('data:image/svg+xml', '#')) for address in addresses)


def test_names_of_folders_are_escaped(run):
    folder, _ = run
    name = folder / '<b id="bold">'
    (folder / 'run').rename(name)
    report.report([str(name)], str(folder / 'page.html'))
    page = page_of(folder / 'page.html')
    assert page.data['runs'][0]['name'] == name.name
    assert not any(attributes.get('id') == 'bold' for _, attributes in page.elements)


def test_a_page_is_the_same_each_time(run):
    folder, _ = run
    report.report([str(folder / 'run')])
    first = (folder / 'run' / 'report.html').read_bytes()
    report.report([str(folder / 'run')])
    assert (folder / 'run' / 'report.html').read_bytes() == first


def test_texts_of_other_data_are_not_shown(run):
    folder, rows = run
    path = folder / 'pairs.jsonl'
    rows[3] |= {'chosen': rows[3]['rejected'], 'rejected': rows[3]['chosen']}  # the same two texts
    rows[4]['prompt'] += ' '
    write_rows(path, rows[::-1])
    report.report([str(folder / 'run')])
    text = (folder / 'run' / 'report.html').read_text(encoding='utf-8')
    shown = _Page(text).data['comparisons']
    assert [i for i, c in enumerate(shown) if c['responses'] is None] == [3, 4]
    assert shown[5]['responses'] == [' good 5', ' bad 5']
    assert 'no longer holds the texts of 2 of 30 comparisons' in text
    path.unlink()
    report.report([str(folder / 'run')])
    text = (folder / 'run' / 'report.html').read_text(encoding='utf-8')
    assert 'the data cannot be read' in text
    assert all(c['responses'] is None for c in _Page(text).data['comparisons'])


def test_a_verdict_is_shown_if_it_is_of_these_predictions(run):
    folder, _ = run
    place = folder / 'run'
    p = metrics.load_predictions(str(place / 'predictions.npz'))
    stored = diagnostics.diagnose(p, None, p, replicates=20, level=0.9, seed=0, fits_ratings=False)
    workdir.write_json(str(place / 'diagnostics.json'),
                       stored | {'predictions': metrics.fingerprint(p)})
    alone = 'From the saved predictions alone'
    report.report([str(place)])
    text = (place / 'report.html').read_text(encoding='utf-8')
    assert alone not in text
    assert 'in brackets 90% intervals' in text
    workdir.write_json(str(place / 'diagnostics.json'), stored | {'predictions': 'other'})
    report.report([str(place)])
    text = (place / 'report.html').read_text(encoding='utf-8')
    assert alone in text
    assert 'in brackets 95% intervals' in text


def test_runs_side_by_side_and_what_is_refused(run):
    folder, _ = run
    p = metrics.load_predictions(str(folder / 'run' / 'predictions.npz'))
    judged(folder / 'other', folder / 'pairs.jsonl', p._replace(log_win=p.log_win - 0.5))
    both = [str(folder / 'run'), str(folder / 'other')]
    with pytest.raises(WorkdirError, match='2 folders and no --output'):
        report.report(both)
    report.report(both, str(folder / 'both.html'))
    data = page_of(folder / 'both.html').data
    assert [r['name'] for r in data['runs']] == ['run', 'other']
    expected = np.exp(-0.5) - np.exp(-1.0)
    assert data['comparisons'][0]['disagreement'] == pytest.approx(expected, abs=1e-4)
    # A folder of runs is all of them, by name.
    report.report([str(folder)])
    assert [r['name'] for r in page_of(folder / 'report.html').data['runs']] == ['other', 'run']
    with pytest.raises(WorkdirError, match='nowhere: no evaluation.json; expected the folder of'):
        report.report([str(folder / 'nowhere')])
    with pytest.raises(WorkdirError, match='page.html: cannot be written'):
        report.report(both, str(folder / 'nowhere' / 'page.html'))
    arrays = workdir.read_arrays(str(folder / 'other' / 'predictions.npz'))
    del arrays['texts']
    workdir.write_arrays(str(folder / 'other' / 'predictions.npz'), arrays)
    with pytest.raises(WorkdirError, match='evaluated by another version of qrm'):
        report.report(both, str(folder / 'both.html'))


def test_without_the_library_an_evaluation_says_how_to_get_its_page(run, monkeypatch, capsys):
    folder, _ = run
    place = str(folder / 'run')
    comparisons, _ = sources.whole(sources.read(
        config_lib.build({'data.path': str(folder / 'pairs.jsonl')}).data, 'helpful'))
    report.leave(place, {place: comparisons})
    assert capsys.readouterr().out == f'{place}/report.html: 1 run, 30 comparisons\n'
    monkeypatch.setitem(sys.modules, 'vl_convert', None)
    with pytest.raises(DataError, match="pip install 'qrm-jax\\[report\\]'"):
        report.report([place])
    report.leave(place, {place: comparisons})
    out = capsys.readouterr().out
    assert out.startswith(f'note: no {place}/report.html: ')
    assert "'qrm-jax[report]'" in out
    assert f'`qrm report --workdirs={place}`' in out
    assert out.count('\n') == 1
    assert not os.path.exists(f'{place}/report.html')


def test_chats_are_shown_under_their_roles():
    chat = ({'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': None,
                                                'tool_calls': [{'name': 'f'}]})
    assert report.as_text(chat) == 'user: Hi\n\nassistant: null\ntool_calls: [{"name": "f"}]'
    assert report.as_text(' as it is ') == ' as it is '
    turned = [Comparison('a', 'p', texts, 'g') for texts in ((' x', ' y'), (' y', ' x'))]
    assert turned[0].text_digest() == turned[1].text_digest()
    assert len(np.unique(report.text_digests(turned), axis=0)) == 2


def test_the_command(run):
    folder, _ = run
    out, _ = command('report', f'--workdirs={folder}/run')
    assert out == f'{folder}/run/report.html: 1 run, 30 comparisons\n'
    _, err = command('report', f'--workdirs={folder}/none', code=2)
    assert err == (f'error: {folder}/none: no evaluation.json; expected the folder of a run that '
                   '`qrm evaluate` has judged, or of several such\n')
