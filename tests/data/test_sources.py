"""Tests of the sources of comparisons, and of their division into splits."""

import gzip
import json
import math
import shutil

import datasets
import pytest
from ml_collections import ConfigDict

from qrm.data import demo
from qrm.data import sources as data_lib
from qrm.data.comparisons import DataError, MalformedRow
from qrm.data.files import read_rows
from qrm.data.sources import load_splits, workloads_of
from tests.helpers import ROOT

HH = ROOT / '../shared/hh'
needs_hh = pytest.mark.skipif(not HH.is_dir(), reason='no HH comparisons in ../shared/hh')


def _settings(path, **changes):
    """The `data` section of a config, as far as loading reads it."""
    return ConfigDict({
        'path': str(path), 'validation_fraction': 0.25, 'test_fraction': 0.25,
        'max_malformed': 0.0, 'cache': '', 'attributes': (), 'format': 'auto', 'columns': (),
        'votes': 'share', 'strengths': 'ignored',
        'demo': {'train': 40, 'test': 20, 'seed': 3, 'annotators': 'independent'},
    } | changes)


def _dialogue(question, answer):
    return f'\n\nHuman: {question}\n\nAssistant: {answer}'


def _pair(question, good='good', bad='bad', **more):
    return {'chosen': _dialogue(question, good), 'rejected': _dialogue(question, bad)} | more


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == '.gz' else content.encode())
    return str(path)


def _hh_layout(folder, suffix='.jsonl.gz'):
    """A folder like the HH release: 6 training and 2 test pairs in each of two workloads."""
    for name in ('helpful-base', 'harmless-base'):
        for split, count in (('train', 6), ('test', 2)):
            rows = [_pair(f'{name} {split} {i}?') for i in range(count)]
            _write(folder / name / (split + suffix), rows)
    return folder


def _questions(split):
    return [comparison.group for comparison in split[0]]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The `datasets` library without network, with its cache in the test's own folder."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(datasets.config, 'DOWNLOADED_DATASETS_PATH', str(tmp_path / 'downloads'))
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# Names of sources.


def test_workloads_of_each_kind_of_source(tmp_path):
    assert workloads_of('demo') == ('helpful', 'harmless')
    assert workloads_of('rows.jsonl') == ()
    assert workloads_of('someone/preferences') == ()
    assert workloads_of('Anthropic/hh-rlhf')[:2] == ('helpful', 'harmless')
    assert workloads_of(str(_hh_layout(tmp_path / 'hh')))[:2] == ('helpful', 'harmless')
    _write(tmp_path / 'flat' / 'train.jsonl', [_pair('Q')])
    assert workloads_of(str(tmp_path / 'flat')) == ()


@pytest.mark.parametrize('path', ['demo', 'Anthropic/hh-rlhf'])
def test_unknown_workloads_are_refused_with_those_there_are(path):
    with pytest.raises(DataError, match=r"'cooking' is not in .*'helpful', 'harmless'"):
        load_splits(_settings(path), 'cooking')


@pytest.mark.parametrize('path', ['/no/such/folder', './nothing', '~/nothing', 'a/b/c'])
def test_paths_that_do_not_exist_are_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(datasets, 'load_dataset', None)
    with pytest.raises(DataError, match='no such folder') as error:
        load_splits(_settings(path), 'helpful')
    assert path in str(error.value)


def test_missing_and_unreadable_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match='no such file'):
        load_splits(_settings(tmp_path / 'rows.jsonl'), 'any')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match=r'expected train\.jsonl.*folder helpful-base'):
        load_splits(_settings(tmp_path / 'empty'), 'helpful')
    (tmp_path / 'rows.csv').write_text('a,b\n')
    with pytest.raises(DataError, match=r'ends in \.jsonl, .*\.parquet'):
        load_splits(_settings(tmp_path / 'rows.csv'), 'helpful')
    _write(tmp_path / 'web.jsonl', ['<!DOCTYPE html>', '<p>Not found</p>'])
    with pytest.raises(DataError, match='web page'):
        load_splits(_settings(tmp_path / 'web.jsonl', max_malformed=1.0), 'any')


# Folders.


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz'])
def test_folders_of_the_hh_layout(tmp_path, suffix):
    splits = load_splits(_settings(_hh_layout(tmp_path, suffix)), 'harmless')
    # 6 training questions, of which a quarter, rounded up, is held out.
    assert {name: len(split[0]) for name, split in splits.items()} == {
        'train': 4, 'validation': 2, 'test': 2}
    assert {name: split[1].read for name, split in splits.items()} == {
        'train': 4, 'validation': 2, 'test': 2}
    assert sorted(_questions(splits['train']) + _questions(splits['validation'])) == [
        f'harmless-base train {i}?' for i in range(6)]
    first, second = splits['test'][0]
    source = tmp_path / 'harmless-base' / f'test{suffix}'
    assert (first.id, second.id) == (f'{source}:1', f'{source}:2')
    assert first.prompt == '\n\nHuman: harmless-base test 0?\n\nAssistant:'
    assert first.responses == (' good', ' bad')
    assert splits['test'][1].source == str(source)
    assert not splits['test'][1].notes


def test_folders_with_train_and_test_files_serve_any_workload(tmp_path):
    _write(tmp_path / 'train.jsonl', [_pair(f'train {i}') for i in range(4)])
    _write(tmp_path / 'test.jsonl.gz', [_pair(f'test {i}') for i in range(3)])
    splits = load_splits(_settings(tmp_path), 'whatever')
    assert [len(splits[name][0]) for name in ('train', 'validation', 'test')] == [3, 1, 3]


def test_folders_with_test_rows_alone_can_be_evaluated_on(tmp_path):
    _write(tmp_path / 'test.jsonl', [_pair(f'test {i}') for i in range(3)])
    splits = load_splits(_settings(tmp_path), 'any')
    assert [len(splits[name][0]) for name in ('train', 'validation', 'test')] == [0, 0, 3]
    assert [splits[name][1].read for name in ('train', 'validation', 'test')] == [0, 0, 3]


def test_folders_with_training_rows_alone_are_divided_in_three(tmp_path):
    _write(tmp_path / 'train.jsonl', [_pair(f'train {i}') for i in range(8)])
    splits = load_splits(_settings(tmp_path), 'any')
    # A quarter of 8 questions, then a quarter of the other 6, rounded up.
    assert [len(splits[name][0]) for name in ('train', 'validation', 'test')] == [4, 2, 2]


@pytest.mark.parametrize('name', ['validation', 'valid', 'val', 'dev'])
def test_validation_files_are_the_validation_split(tmp_path, name):
    _write(tmp_path / 'train.jsonl', [_pair(f'train {i}') for i in range(8)])
    _write(tmp_path / f'{name}.json', [json.dumps([_pair('train 0'), _pair('other', note=1)])])
    splits = load_splits(_settings(tmp_path), 'any')
    assert [len(splits[name][0]) for name in ('train', 'validation', 'test')] == [6, 2, 2]
    report = splits['validation'][1]
    assert report.source == str(tmp_path / f'{name}.json')
    assert report.read == 2
    known = 'train 0' in _questions(splits['train'])
    assert report.notes == {"key 'note' not used": 1} | (
        {'opening question also in the training rows': 1} if known else {})
    assert [c.id for c in splits['validation'][0]] == [f'{report.source}:1[{i}]' for i in (0, 1)]


def test_files_beside_those_that_are_read_are_named(tmp_path):
    _write(tmp_path / 'train.jsonl', [_pair(f'train {i}') for i in range(8)])
    for name in ('extra.jsonl', 'holdout.parquet', 'README.md', 'test.csv'):
        (tmp_path / name).write_text('')
    (tmp_path / 'validation').mkdir()
    splits = load_splits(_settings(tmp_path), 'any')
    assert splits['train'][1].notes == dict.fromkeys((
        "'extra.jsonl' not read", "'holdout.parquet' not read", "'test.csv' not read",
        "'validation' not read"), 1)
    assert not splits['test'][1].notes


def test_parts_of_a_split_are_read_in_order(tmp_path, monkeypatch):
    for i in (1, 0):
        rows = [_pair(f'part {i} row {j}') for j in range(3)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f'train-0000{i}-of-00002.parquet')
    comparisons, report = data_lib.read(_settings(tmp_path), 'any').splits['train']
    assert [c.group for c in comparisons] == [f'part {i} row {j}' for i in (0, 1) for j in range(3)]
    assert report.read == 6
    monkeypatch.setattr(data_lib, '_MOST_PARTS', 1)
    with pytest.raises(DataError, match='2 parts of the train split, expected at most 1'):
        load_splits(_settings(tmp_path), 'any')
    monkeypatch.undo()
    (tmp_path / 'train-00000-of-00002.parquet').unlink()
    with pytest.raises(DataError, match='1 parts of the train split, expected 00002'):
        load_splits(_settings(tmp_path), 'any')


def test_rows_that_change_while_they_are_read_are_not_kept(tmp_path, monkeypatch):
    """Else they would be taken for the file that was there before, whenever it comes back."""
    path = tmp_path / 'rows.jsonl'
    settings = _settings(_write(path, [_pair(f'old {i}') for i in range(4)]),
                         cache=str(tmp_path / 'cache'))

    def changed(rows, data):
        _write(path, [_pair(f'new {i}') for i in range(4)])
        return plain(read_rows(str(path)), data)

    plain = data_lib.understood
    monkeypatch.setattr(data_lib, 'understood', changed)
    with pytest.raises(DataError, match=r'rows\.jsonl: changed while it was read, expected a file'):
        data_lib.read(settings, 'any')
    monkeypatch.undo()
    _write(path, [_pair(f'old {i}') for i in range(4)])
    comparisons, _ = data_lib.read(settings, 'any').splits['train']
    assert [one.group for one in comparisons] == [f'old {i}' for i in range(4)]


def _two_parts(folder):
    """Rows without ids, of one id, malformed and repeated, in two parts; and a test file."""
    rows = [[_pair(f'question {i}') for i in range(6)] + [_pair('A', id=1)],
            [_pair('B', id=1), '{"torn": ', _pair('question 2'), _pair('Q', id='bad') | {
                'chosen': None}] + [_pair(f'more {i}') for i in range(6)]]
    for i, part in enumerate(rows):
        _write(folder / f'train-0000{i}-of-00002.jsonl', part)
    _write(folder / 'test.jsonl.gz', [_pair(f'test {i}') for i in range(3)])


def test_data_that_was_copied_has_the_same_tables_and_names_its_own_files(tmp_path):
    settings = {'cache': str(tmp_path / 'cache'), 'max_malformed': 0.5}
    _two_parts(tmp_path / 'one')
    shutil.copytree(tmp_path / 'one', tmp_path / 'some where' / 'two')
    seen = []
    for folder in (tmp_path / 'one', tmp_path / 'some where' / 'two'):
        kept = _settings(folder, **settings)
        source = data_lib.read(kept, 'any')
        splits = data_lib.divide(source, kept)
        # As if nothing were kept.
        anew = data_lib.load_splits(_settings(folder, **settings | {'cache': ''}), 'any')
        for split, (comparisons, report) in splits.items():
            assert list(comparisons) == list(anew[split][0])
            assert [c.where for c in comparisons] == [c.where for c in anew[split][0]]
            assert report == anew[split][1]
        assert source.digest == data_lib.read(_settings(folder, **settings | {'cache': ''}),
                                              'any').digest
        comparisons, report = source.splits['train']
        second = folder / 'train-00001-of-00002.jsonl'
        assert report.source == str(folder / 'train-00000-of-00002.jsonl')
        assert report.first_malformed.startswith(f'{second}:2: not JSON')
        assert [c.id for c in comparisons][5:9] == [
            f'{folder}/train-00000-of-00002.jsonl:6', '1', f'{second}:1 id=1', f'{second}:3']
        assert [c.where for c in comparisons][6:8] == [
            f'{folder}/train-00000-of-00002.jsonl:7', f'{second}:1']
        assert comparisons[7].id == f'{second}:1 id=1'
        for some in (comparisons, comparisons.pick([1, 7])):
            assert some.fact('id').to_pylist() == [c.id for c in some]
            assert some.fact('where').to_pylist() == [c.where for c in some]
        seen.append((source.entry.key, source.digest))
    assert seen[0] == seen[1]
    for kind in ('comparisons', 'splits'):
        assert len([path for path in (tmp_path / 'cache' / kind).iterdir() if path.is_dir()]) == 1


def test_what_stands_in_another_kind_of_file_is_read_anew(tmp_path):
    keys = {data_lib.read(_settings(_write(tmp_path / name, [_pair('A'), _pair('B')]),
                                    cache=str(tmp_path / 'cache')), 'any').entry.key
            for name in ('a.jsonl', 'b.jsonl', 'c.json')}
    assert len(keys) == 2


def test_demos_of_two_workloads_are_kept_apart(tmp_path):
    groups = [_questions(data_lib.load_splits(
        _settings('demo', cache=str(tmp_path)), workload)['test'])
        for workload in ('helpful', 'harmless', 'helpful')]
    assert groups[0] == groups[2] != groups[1]


def test_what_a_model_is_judged_on_that_was_not_trained_on_it(tmp_path):
    _write(tmp_path / 'rows' / 'train.jsonl', [_pair(f'train {i}') for i in range(8)])
    assert len(data_lib.held_out(_settings(tmp_path / 'rows'), 'any')[0]) == 8
    _write(tmp_path / 'rows' / 'validation.jsonl', [_pair('other')])
    comparisons, report = data_lib.held_out(_settings(tmp_path / 'rows'), 'any')
    assert (len(comparisons), report.split) == (2, 'test')  # a quarter of the training rows
    _write(tmp_path / 'rows' / 'test.jsonl', [_pair(f'test {i}') for i in range(3)])
    assert len(data_lib.held_out(_settings(tmp_path / 'rows'), 'any')[0]) == 3


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ('train.jsonl', 'train.json', 'test.jsonl'):
        _write(tmp_path / name, [_pair('A')])
    with pytest.raises(DataError, match=r'train\.json and train\.jsonl may both be'):
        load_splits(_settings(tmp_path), 'any')


def test_sources_are_known_by_what_they_say(tmp_path):
    rows = [_pair(f'question {i}', margin=i) for i in range(6)]
    rows += [{'chosen': 'a', 'rejected': 'b'}]
    digests = {}
    for name, content in (('one.jsonl', rows), ('two.json', [json.dumps(rows)]),
                          ('other.jsonl', [*rows[:-1], rows[-1] | {'margin': 1}]),
                          ('order.jsonl', rows[::-1])):
        source = data_lib.read(_settings(_write(tmp_path / name, content)), 'any')
        digests[name] = source.digest
        splits = data_lib.divide(source, _settings('x'))
        if name == 'two.json':
            # Also those without an opening question are divided alike.
            first = data_lib.load_splits(_settings(tmp_path / 'one.jsonl'), 'any')
            for split in splits:
                assert _questions(splits[split]) == _questions(first[split])
    assert digests['one.jsonl'] == digests['two.json']
    assert len(set(digests.values())) == 3


# One file, divided by opening question.


def _twenty_questions(tmp_path, order=range(40)):
    """Two rows for each of 20 questions."""
    rows = [_pair(f'question {i % 20}', good=f'good {i}', id=f'row {i}') for i in range(40)]
    return _write(tmp_path / 'rows.jsonl', [rows[i] for i in order])


def test_splits_of_a_file_are_disjoint_by_question_and_complete(tmp_path):
    splits = load_splits(_settings(_twenty_questions(tmp_path), validation_fraction=0.2), 'any')
    # 0.25 of 20 questions for the test, 0.2 of the remaining 15 for validation.
    assert {name: len(set(_questions(split))) for name, split in splits.items()} == {
        'train': 12, 'validation': 3, 'test': 5}
    assert {name: split[1].read for name, split in splits.items()} == {
        'train': 24, 'validation': 6, 'test': 10}
    everything = [set(_questions(split)) for split in splits.values()]
    assert sum(map(len, everything)) == len(set.union(*everything)) == 20
    ids = [comparison.id for split in splits.values() for comparison in split[0]]
    assert sorted(ids) == sorted(f'row {i}' for i in range(40))
    assert [split[1].split for split in splits.values()] == ['train', 'validation', 'test']
    assert not splits['test'][1].notes


def test_splits_do_not_depend_on_the_order_of_rows(tmp_path):
    settings = _settings(_twenty_questions(tmp_path))
    first = load_splits(settings, 'any')
    for name, (comparisons, report) in load_splits(settings, 'any').items():
        assert (list(comparisons), report) == (list(first[name][0]), first[name][1])
    _twenty_questions(tmp_path, reversed(range(40)))
    again = load_splits(settings, 'any')
    for name in first:
        assert [c.id for c in again[name][0]] == [c.id for c in reversed(first[name][0])]


def test_a_fraction_of_one_takes_everything(tmp_path):
    splits = load_splits(_settings(_twenty_questions(tmp_path), test_fraction=1.0), 'any')
    assert [len(splits[name][0]) for name in ('train', 'validation', 'test')] == [0, 0, 40]


def test_rows_without_a_question_are_divided_one_by_one(tmp_path):
    path = _write(tmp_path / 'rows.jsonl', [{'chosen': f'{i} yes', 'rejected': f'no {i}'}
                                            for i in range(1, 9)])
    splits = load_splits(_settings(path), 'any')
    assert [len(splits[name][0]) for name in ('train', 'validation', 'test')] == [4, 2, 2]


# Malformed rows.


def _some_malformed(tmp_path, bad, count):
    rows = [_pair(f'question {i}') for i in range(count)]
    for i in range(bad):
        rows[3 * i + 1] = (_pair('Q', id=f'bad {i}') | {'chosen': None}, '{"torn": ')[i % 2]
    return _write(tmp_path / 'rows.jsonl', rows)


@pytest.mark.parametrize(('bad', 'count', 'share'), [
    (1, 10, 0.1), (2, 10, 0.2), (1, 4, 0.99), (29, 100, 0.29), (7, 100, 0.07), (0, 5, 0.0),
])
def test_malformed_rows_up_to_the_share_are_skipped_and_counted(tmp_path, bad, count, share):
    path = _some_malformed(tmp_path, bad, count)
    splits = load_splits(_settings(path, max_malformed=share), 'any')
    assert sum(split[1].read for split in splits.values()) == count
    assert sum(len(split[0]) for split in splits.values()) == count - bad
    assert splits['train'][1].dropped == ({'malformed row': bad} if bad else {})
    assert splits['train'][1].read == len(splits['train'][0]) + bad


@pytest.mark.parametrize(('bad', 'count', 'share'), [
    (1, 10, 0.0), (1, 10, 0.09), (2, 10, 0.19), (29, 100, 0.28),
])
def test_more_malformed_rows_than_the_share_stop(tmp_path, bad, count, share):
    path = _some_malformed(tmp_path, bad, count)
    with pytest.raises(DataError) as error:
        load_splits(_settings(path, max_malformed=share), 'any')
    assert not isinstance(error.value, MalformedRow)
    message = str(error.value)
    assert message.startswith(f"{path}:2 id=bad 0 field 'chosen': got null, expected text")
    assert f'{bad} of {count} rows are malformed' in message
    assert f'config.data.max_malformed={share}' in message


# What is noted of rows that are kept, and which contradictions stop.


def _report(tmp_path, rows):
    _write(tmp_path / 'train.jsonl', [_pair('another question')])
    _write(tmp_path / 'test.jsonl', rows)
    return load_splits(_settings(tmp_path), 'any')['test'][1]


def test_rows_of_one_id_are_told_apart_by_line(tmp_path):
    rows = [_pair('A', id=1), _pair('B', id=2), _pair('C', id=1), _pair('A', id=1, preference=0.3)]
    path = _write(tmp_path / 'rows.jsonl', rows)
    comparisons, report = data_lib.whole(data_lib.read(_settings(path), 'any'))
    assert [c.id for c in comparisons] == ['1', '2', f'{path}:3 id=1', f'{path}:4 id=1']
    assert report.notes == {'id of an earlier row, told apart by line': 2,
                            'contradicts an earlier row': 1}


def test_rows_repeated_with_their_id_are_kept_and_noted(tmp_path):
    report = _report(tmp_path, [_pair('A', id=1), _pair('B', id=2), _pair('A', id=1)])
    assert report.read == 3
    assert report.notes == {'repeats an earlier row': 1}


def test_remarks_stand_under_the_split_of_their_row(tmp_path):
    rows = [_pair(f'question {i}', good='' if i % 2 else 'good', note=i) for i in range(20)]
    splits = load_splits(_settings(_write(tmp_path / 'rows.jsonl', rows)), 'any')
    for comparisons, report in splits.values():
        assert report.notes["key 'note' not used"] == len(comparisons) == report.read
        assert report.notes['blank response'] == sum(
            not c.responses[0].strip() for c in comparisons)
    assert sum(report.notes['blank response'] for _, report in splits.values()) == 10


def _rated(responses, ratings):
    return {'prompt': 'Q', 'responses': responses, 'ratings': ratings}


@pytest.mark.parametrize(('rows', 'notes'), [
    ([_pair('A'), _pair('A', bad='worse'), _pair('B')], {}),
    ([_pair('A'), _pair('A'), _pair('A')], {'repeats an earlier row': 2}),
    ([_pair('A'), _pair('A', 'bad', 'good')], {'contradicts an earlier row': 1}),
    # Identical responses say nothing that could be contradicted.
    ([_pair('A', 'x', 'x'), _pair('A', 'x', 'x')], {'repeats an earlier row': 1}),
    # The same judgement with the responses in another order agrees.
    ([_rated(['a', 'b'], [1, 2]), _rated(['b', 'a'], [2, 1])], {'repeats an earlier row': 1}),
    ([_rated(['a', 'b'], [1, 2]), _rated(['a', 'b'], [2, 1])], {'contradicts an earlier row': 1}),
    ([_rated(['a', 'b', 'c'], [1, 2, 3]), _rated(['c', 'a', 'b'], [3, 1, 2])],
     {'repeats an earlier row': 1}),
    ([_rated(['a', 'b', 'c'], [1, 2, 3]), _rated(['c', 'a', 'b'], [3, 2, 1])],
     {'contradicts an earlier row': 1}),
    ([_pair('A', preference=0.7), _pair('A', preference=0.6)], {'repeats an earlier row': 1}),
    ([_pair('A', preference=0.7), _pair('A', preference=0.4)], {'contradicts an earlier row': 1}),
    # What others say is another judgement.
    ([_pair('A', annotator=name) for name in ('x', 'y', 'z')], {}),
    ([_pair('A', annotator='x'), _pair('A', 'bad', 'good', annotator='y')], {}),
    ([_pair('A', annotator='x'), _pair('A', 'bad', 'good', annotator='x')],
     {'contradicts an earlier row': 1}),
])
def test_duplicates_are_noted_by_whether_they_agree(tmp_path, rows, notes):
    report = _report(tmp_path, rows)
    assert report.read == len(rows)
    assert report.notes == notes


def test_keys_that_are_not_used_are_noted(tmp_path):
    report = _report(tmp_path, [_pair('A', source='x'), _pair('B', source='y', score=1),
                                _pair('C', margin=1.0)])
    assert report.notes == {"key 'source' not used": 2, "key 'score' not used": 1}


def test_overlap_of_test_and_training_questions_is_noted(tmp_path):
    _write(tmp_path / 'train.jsonl', [_pair(f'question {i}') for i in range(8)])
    _write(tmp_path / 'test.jsonl', [_pair(f'question {i}', good='fine') for i in range(5, 11)])
    splits = load_splits(_settings(tmp_path), 'any')
    # Questions 5, 6 and 7 are in both files; some of them may be in the validation split.
    assert splits['test'][1].notes == {'opening question also in the training rows': 3}
    assert len(splits['test'][0]) == 6


# The hub.


def test_hub_data_sets_of_the_hh_layout(tmp_path, monkeypatch, offline):
    folder = str(_hh_layout(tmp_path / 'hh'))
    load, calls = datasets.load_dataset, []

    def load_local(name, data_dir):
        calls.append((name, data_dir))
        return load(folder, data_dir=data_dir)

    monkeypatch.setattr(datasets, 'load_dataset', load_local)
    splits = load_splits(_settings('Anthropic/hh-rlhf'), 'harmless')
    assert calls == [('Anthropic/hh-rlhf', 'harmless-base')]
    local = load_splits(_settings(folder), 'harmless')
    for name in ('train', 'validation', 'test'):
        assert _questions(splits[name]) == _questions(local[name])
        for hub, file in zip(splits[name][0], local[name][0], strict=True):
            assert (hub.prompt, hub.responses) == (file.prompt, file.responses)
    where = 'Anthropic/hh-rlhf/harmless-base'
    assert splits['test'][1].source == where
    assert [c.id for c in splits['test'][0]] == [f'{where}[test]:0', f'{where}[test]:1']
    assert sorted(c.id for name in ('train', 'validation') for c in splits[name][0]) == [
        f'{where}[train]:{i}' for i in range(6)]


def test_hub_rows_name_their_split_and_number(tmp_path, offline):
    folder = str(_hh_layout(tmp_path / 'hh'))
    sources = data_lib._hub_sources(folder, 'helpful-base')
    assert list(sources) == ['train', 'test']
    for split, count in (('train', 6), ('test', 2)):
        source, rows, content, files, _ = sources[split]
        assert files == (f'{folder}/helpful-base[{split}]',)
        assert len(content()) == 1
        assert source == f'{folder}/helpful-base'
        assert list(rows()) == [(f'{folder}/helpful-base[{split}]:{i}',
                               _pair(f'helpful-base {split} {i}?')) for i in range(count)]


def _from_hub(folder, monkeypatch, **changes):
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, 'load_dataset',
                        lambda name, data_dir: load(str(folder), data_dir=data_dir))
    return load_splits(_settings('someone/preferences', **changes), 'any')


def test_hub_data_sets_with_messages(tmp_path, monkeypatch, offline):
    user = {'role': 'user', 'content': 'Hi'}
    yes, no = ({'role': 'assistant', 'content': text} for text in ('Yes', 'No'))
    rows = [{'prompt': 'Hi', 'chosen': [user, yes], 'rejected': [user, no], 'score': 1.5}]
    _write(tmp_path / 'hub' / 'test.jsonl', rows)
    other = user | {'content': 'Ho'}
    rows = [{'prompt': 'Ho', 'chosen': [other, yes], 'rejected': [other, no], 'score': 2.0}]
    _write(tmp_path / 'hub' / 'train.jsonl', rows)
    splits = _from_hub(tmp_path / 'hub', monkeypatch)
    [comparison] = splits['test'][0]
    assert comparison.prompt == (user,)
    assert comparison.responses == ((yes,), (no,))
    assert comparison.group == 'Hi'
    assert splits['test'][1].notes == {"key 'score' not used": 1}


def test_hub_data_sets_with_ratings_and_without_a_test_split(tmp_path, monkeypatch, offline):
    rows = [{'prompt': f'Q{i}', 'responses': [' a', ' b', ' c'], 'ratings': [1.0, None, 3.0],
             'id': f'r{i}'} for i in range(8)]
    _write(tmp_path / 'hub' / 'train.jsonl', rows)
    splits = _from_hub(tmp_path / 'hub', monkeypatch)
    assert [len(splits[name][0]) for name in ('train', 'validation', 'test')] == [4, 2, 2]
    assert {c.ratings for split in splits.values() for c in split[0]} == {(1.0, None, 3.0)}


def test_malformed_hub_rows_are_named(tmp_path, monkeypatch, offline):
    _write(tmp_path / 'hub' / 'train.jsonl', [_pair('A'), _pair('B') | {'rejected': None}])
    with pytest.raises(DataError, match=r"^someone/preferences\[train\]:1 field 'rejected': got "
                                        'null, expected text'):
        _from_hub(tmp_path / 'hub', monkeypatch)


def test_hub_data_sets_with_a_validation_split(tmp_path, monkeypatch, offline):
    for split in ('train', 'validation'):
        _write(tmp_path / 'hub' / f'{split}.jsonl', [_pair(f'{split} {i}') for i in range(4)])
    splits = _from_hub(tmp_path / 'hub', monkeypatch)
    assert [len(splits[name][0]) for name in ('train', 'validation', 'test')] == [3, 4, 1]


def test_hub_data_sets_without_train_and_test_are_refused(tmp_path, monkeypatch, offline):
    _write(tmp_path / 'hub' / 'validation.jsonl', [_pair('A')])
    with pytest.raises(DataError, match=r"splits \['validation'\], expected train or test"):
        _from_hub(tmp_path / 'hub', monkeypatch)


def test_hub_data_sets_that_cannot_be_loaded_are_refused(tmp_path, monkeypatch, offline):
    with pytest.raises(DataError, match=r'^someone/preferences: could not be loaded from the hub'):
        _from_hub(tmp_path / 'nothing', monkeypatch)


# Generated and real comparisons.


def test_hub_data_sets_with_a_script_are_refused_by_what_to_do(tmp_path, monkeypatch, offline):
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'hub.py').write_text('import datasets\n')
    with pytest.raises(DataError, match=r'^someone/preferences: is loaded by a script of its own, '
                                        r'which datasets [\d.]+ does not run; expected config\.'):
        _from_hub(tmp_path / 'hub', monkeypatch)


# Formats.


def _shp(number, label):
    return {'post_id': f'p{number}', 'history': f'Why {number}?', 'human_ref_A': 'So.',
            'human_ref_B': 'No.', 'labels': label, 'score_ratio': 2.0}


def test_rows_of_a_known_format_are_read_and_said_to_be(tmp_path):
    path = _write(tmp_path / 'rows.jsonl', [_shp(i, i % 2) for i in range(40)])
    comparisons, report = data_lib.read(_settings(path), '').splits['train']
    assert [c.preferred for c in comparisons] == [1, 0] * 20
    assert [c.group for c in comparisons] == [f'p{i}' for i in range(40)]
    assert report.notes["read as of the format 'shp'"] == 1
    named, _ = data_lib.read(_settings(path, format='shp', strengths='margin'), '').splits['train']
    assert [c.margin for c in named] == [2.0] * 40
    with pytest.raises(DataError, match="rows.jsonl:1: keys .* make no comparison, expected"):
        data_lib.read(_settings(path, format='rows'), '')


def test_several_judges_of_a_row_are_as_many_rows(tmp_path):
    path = _write(tmp_path / 'rows.jsonl', [
        {'instruction': f'{i}?', 'response1': 'a', 'response2': 'b', 'annotator1': 1,
         'annotator2': 2, 'annotator3': 0} for i in range(8)])
    comparisons, report = data_lib.read(_settings(path, votes='each'), '').splits['train']
    assert (report.read, len(comparisons)) == (24, 24)
    assert [c.annotator for c in comparisons[:3]] == ['annotator1', 'annotator2', 'annotator3']
    assert comparisons[1].id == f'{path}:1#1'
    shared, _ = data_lib.read(_settings(path), '').splits['train']
    assert [c.preference_matrix()[0, 1] for c in shared] == [0.5] * 8


def test_malformed_rows_of_a_format_are_counted(tmp_path):
    path = _write(tmp_path / 'rows.jsonl', [_shp(i, 1) for i in range(9)] + [_shp(9, 3)])
    with pytest.raises(DataError, match=r"rows.jsonl:10 field 'labels': got 3, expected one of "
                                        r'\[1, 0\]; 1 of 10 rows are malformed'):
        data_lib.read(_settings(path), '')
    _write(tmp_path / 'rows.jsonl', [_shp(i, 1) for i in range(8)] + [_shp(8, None), _shp(9, 3)])
    _, report = data_lib.read(_settings(path, max_malformed=0.1), '').splits['train']
    assert dict(report.dropped) == {'not judged': 1, 'malformed row': 1}
    assert report.read == 10


def test_formats_that_have_to_be_named_are(tmp_path):
    path = _write(tmp_path / 'rows.jsonl', [
        {'instruction': 'Why?', 'output_1': 'a', 'output_2': 'b', 'preference': 2}])
    with pytest.raises(DataError, match="rows.jsonl:1: may be of the format 'alpaca-eval', and"):
        data_lib.read(_settings(path), '')
    (one,), _ = data_lib.read(_settings(path, format='alpaca-eval'), '').splits['train']
    assert one.preferred == 1


def test_columns_that_are_called_otherwise(tmp_path):
    path = _write(tmp_path / 'rows.jsonl', [
        {'q': {'text': f'Why {i}?'}, 'good': 'So.', 'bad': 'No.'} for i in range(3)])
    columns = ('prompt=q.text', 'chosen=good', 'rejected=bad')
    comparisons, _ = data_lib.read(_settings(path, columns=columns), '').splits['train']
    assert [c.prompt for c in comparisons] == ['Why 0?', 'Why 1?', 'Why 2?']
    assert comparisons[0].responses == ('So.', 'No.')


def test_demo_splits_are_the_generated_pairs(tmp_path):
    splits = load_splits(_settings('demo'), 'helpful')
    generated = {split: demo.generate('helpful', split, count, 3).comparisons
                 for split, count in (('train', 40), ('test', 20))}
    assert list(splits['test'][0]) == generated['test']
    together = [*splits['train'][0], *splits['validation'][0]]
    assert sorted(c.id for c in together) == sorted(c.id for c in generated['train'])
    questions = {c.group for c in generated['train']}
    assert len(set(_questions(splits['validation']))) == math.ceil(0.25 * len(questions))
    assert not set(_questions(splits['validation'])) & set(_questions(splits['train']))
    assert 'opening question also in the training rows' not in splits['test'][1].notes


@needs_hh
@pytest.mark.parametrize(('workload', 'train', 'test'), [
    ('helpful', 1317, 342), ('harmless', 1506, 420),
])
def test_real_hh_folders_are_read_whole(workload, train, test):
    splits = load_splits(_settings(HH, validation_fraction=0.05), workload)
    assert splits['train'][1].read + splits['validation'][1].read == train
    assert len(splits['train'][0]) + len(splits['validation'][0]) == train
    assert len(splits['test'][0]) == splits['test'][1].read == test
    assert not set(_questions(splits['train'])) & set(_questions(splits['validation']))
    # The folders were divided by opening question.
    assert 'opening question also in the training rows' not in splits['test'][1].notes
    rows = [row for _, row in read_rows(str(HH / f'{workload}-base' / 'test.jsonl.gz'))]
    for comparison, row in zip(splits['test'][0], rows, strict=True):
        chosen, rejected = (comparison.prompt + response for response in comparison.responses)
        assert (chosen, rejected) == (row['chosen'], row['rejected'])


@needs_hh
def test_real_hh_folders_read_alike_through_the_hub_library(offline):
    rows = data_lib._hub_sources(str(HH), 'harmless-base')['test'].rows()
    with gzip.open(HH / 'harmless-base' / 'test.jsonl.gz', 'rt', encoding='utf-8') as file:
        assert [row for _, row in rows] == [json.loads(line) for line in file]


def test_a_file_as_a_whole_is_one_split_with_all_that_is_said_of_it(tmp_path):
    rows = [_pair(f'{i}?', note=1) for i in range(6)]
    path = _write(tmp_path / 'rows.jsonl', [*rows, rows[2], {'chosen': 'x'}])
    comparisons, report = data_lib.whole(
        data_lib.read(_settings(path, max_malformed=0.5), 'any'))
    assert [c.group for c in comparisons] == [*(f'{i}?' for i in range(6)), '2?']
    assert (report.split, report.read) == ('test', 8)
    assert report.dropped == {'malformed row': 1}
    assert report.notes == {"key 'note' not used": 7, 'repeats an earlier row': 1}
