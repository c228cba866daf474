"""What a run was trained on is known wherever it stands; other models are judged by files too."""

import copy
import json
import os
import shutil

import numpy as np
import pytest

from qrm.analysis import diagnostics, evaluate
from qrm.data import comparisons, sources
from qrm.data.comparisons import DataError
from qrm.serving import export
from qrm.training import reward_model, train, workdir
from qrm.training.schema import ConfigError
from tests.helpers import TINY, WORDS, load_config, word_pairs

TRAINED = 'row this run was trained on'
ASKED = 'opening question this run was trained on'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run on 40 pairs, and the config it was started with."""
    folder = tmp_path_factory.mktemp('run')
    words = {key: value for key, value in WORDS.items() if not key.startswith('speed')}
    config = load_config('hh', 'helpful,scalar', **words | word_pairs(folder) | {
        'train.max_steps': 2, 'data.test_fraction': 0.3, 'data.validation_fraction': 0.2,
        'analysis.bootstrap': 20})
    train.train(config, str(folder / 'run'))
    return folder, config


def _judged(folder, **changes):
    """The evaluation of the run with changes to its config."""
    config = workdir.load_config(str(folder / 'run'))
    config.update_from_flattened_dict(changes)
    return evaluate.evaluate(config, str(folder / 'run'))


def test_data_are_known_by_what_they_say(run, tmp_path):
    folder, _ = run
    own = _judged(folder)
    assert len(own.predictions.comparison_ids) == 12
    assert not own.report.notes
    rows = [json.loads(line) for line in (folder / 'pairs.jsonl').read_text().splitlines()]
    moved = tmp_path / 'moved.json'
    moved.write_text(json.dumps(rows, indent=1))
    found = _judged(folder, **{'data.path': str(moved)})
    np.testing.assert_array_equal(found.predictions.means, own.predictions.means)
    # Other data are taken whole, and what of them the run was trained on is counted: rows in any
    # order of their responses, and questions under other responses.
    rows[0] |= {'margin': 1.0}
    rows += [{'prompt': rows[i]['prompt'], 'chosen': ' w1 w2', 'rejected': ' w3'} for i in (0, 1)]
    moved.write_text('\n'.join(json.dumps(row) for row in rows))
    found = _judged(folder, **{'data.path': str(moved)})
    assert found.report.read == 42
    prepared = train.read_data(workdir.load_config(str(folder / 'run')))
    trained = prepared.reports['train'].read
    questions = {item.group for item in prepared.encoded['train']}
    assert found.report.notes[TRAINED] == trained == len(prepared.seen.arrays()['texts'])
    assert found.report.notes[ASKED] == sum(row['prompt'] in questions for row in rows) >= trained
    for fraction in ('test', 'validation'):
        with pytest.raises(ConfigError, match=f'data.{fraction}_fraction: cannot be changed'):
            _judged(folder, **{f'data.{fraction}_fraction': 0.5})


def test_a_run_goes_on_with_data_and_weights_that_were_moved(run, tmp_path):
    folder, config = run
    shutil.copytree(folder / 'run', tmp_path / 'run')
    shutil.copy(folder / 'pairs.jsonl', tmp_path / 'there.jsonl')
    shutil.copytree(config.model.checkpoint, tmp_path / 'weights')
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({'data.path': str(tmp_path / 'there.jsonl'),
                                       'model.checkpoint': str(tmp_path / 'weights')})
    train.train(config, str(tmp_path / 'run'))
    stored = workdir.load_config(str(tmp_path / 'run'))
    assert stored.data.path == str(tmp_path / 'there.jsonl')
    (tmp_path / 'there.jsonl').write_text(
        (folder / 'pairs.jsonl').read_text().replace('w1', 'w2'))
    with pytest.raises(DataError, match='the training comparisons are not those this run'):
        train.train(config, str(tmp_path / 'run'))


def test_paths_of_a_run_hold_in_every_folder(run, tmp_path, monkeypatch):
    folder, config = run
    shutil.copy(folder / 'pairs.jsonl', tmp_path / 'pairs.jsonl')
    monkeypatch.chdir(tmp_path)
    config = config.copy_and_resolve_references()
    config.data.path = 'pairs.jsonl'
    train.train(config, 'run')
    monkeypatch.chdir(folder)
    assert _judged(tmp_path).report.source == str(tmp_path / 'pairs.jsonl')


def test_dialogues_longer_than_the_positions_are_refused(run):
    folder, _ = run
    with pytest.raises(DataError, match=r'config.data.max_length=1000, but the model has \d+ pos'):
        _judged(folder, **{'data.max_length': 1000})


def test_other_models_are_judged_by_files(run, tmp_path):
    folder, _ = run
    model = reward_model.load(str(folder / 'run'))
    place = str(tmp_path / 'exported')
    export.export(model, place, kind='mean')
    before = sorted(path.name for path in (tmp_path / 'exported').iterdir())
    config = evaluate.stored_config(place)
    config.update_from_flattened_dict({'data.path': str(folder / 'pairs.jsonl'),
                                       'analysis.bootstrap': 20})
    text = evaluate.diagnose(config, place)
    assert 'test: 40 read, 40 kept' in text
    assert sorted(path.name for path in (tmp_path / 'exported').iterdir()) == before
    evaluate.diagnose(config, place, str(tmp_path / 'judged'))
    found = json.loads((tmp_path / 'judged' / 'evaluation.json').read_text())
    # The same rewards as the run gives to the same rows.
    rows = [json.loads(line) for line in (folder / 'pairs.jsonl').read_text().splitlines()]
    scores = model.score([row['prompt'] for row in rows],
                         [[row['chosen'], row['rejected']] for row in rows])
    ahead = [rewards[0] > rewards[1] for rewards in scores.rewards]
    assert found['metrics']['accuracy'] == pytest.approx(np.mean(ahead))
    assert found['head'] == 'scalar'
    config.train.batch_size = 3
    with pytest.raises(ConfigError, match='train.batch_size: cannot be changed'):
        evaluate.diagnose(config, place)


def test_folders_that_hold_no_model_are_named(tmp_path):
    for place in (tmp_path, tmp_path / 'none', 'none'):
        with pytest.raises(workdir.WorkdirError, match='not the folder of a run'):
            evaluate.stored_config(str(place))


def test_prompts_of_some_test_comparisons_are_exchanged(run):
    folder, _ = run
    place = str(folder / 'run')

    def judged(count):
        config = workdir.load_config(place)
        config.evaluation.exchanged = count
        return evaluate.evaluate(config, place, exchange=True)

    assert _judged(folder).exchanged is None
    assert judged(0).exchanged is None
    found = judged(1000)
    own, _ = diagnostics.matching_pairs(found.predictions, found.exchanged)
    assert len(own) == len(found.predictions.pairs)
    assert not np.array_equal(found.predictions.means, found.exchanged.means)
    # Rewards are those of the texts, whichever prompt stands before them; of those that fit.
    config = workdir.load_config(place)
    test = sources.load_splits(config.data, config.workload)['test'][0]
    texts = {c.id: c for c in comparisons.exchange_prompts(test, config.analysis.seed)
             if len(f'{c.prompt} {max(c.responses, key=len)}'.split()) < config.data.max_length}
    assert texts
    for i, name in enumerate(found.exchanged.comparison_ids):
        if c := texts.get(name):
            assert c.prompt not in [own.prompt for own in test if own.id == name]
            scores = reward_model.load(place).score([c.prompt], [list(c.responses)])
            np.testing.assert_allclose(
                found.exchanged.means[2 * i:2 * i + 2], scores.rewards[0], atol=1e-5)
    some = judged(5).exchanged
    assert len(some.comparison_ids) == 5
    assert set(some.comparison_ids) <= set(found.exchanged.comparison_ids)


def test_paths_may_be_relative_where_a_run_was_started(run, tmp_path, monkeypatch):
    folder, config = run
    monkeypatch.chdir(folder)
    own = copy.deepcopy(config)
    for key in ('data.path', 'model.checkpoint'):
        section, name = key.split('.')
        own[section][name] = os.path.relpath(own[section][name], folder)
    own.train.features, own.train.tune = 'kept', 'head'
    train.train(own, str(tmp_path / 'relative'))
    found = evaluate.evaluate(own, str(tmp_path / 'relative'))
    stored = workdir.load_config(str(tmp_path / 'relative'))
    assert stored.train.features == str(folder / 'kept')
    monkeypatch.chdir(tmp_path)
    again = evaluate.evaluate(stored, str(tmp_path / 'relative'))
    np.testing.assert_array_equal(again.predictions.means, found.predictions.means)
    assert not (tmp_path / 'kept').exists()


def test_a_foreign_prompt_that_is_too_long_is_cut_whatever_is_said_of_the_data(run):
    folder, _ = run
    place = str(folder / 'run')
    config = workdir.load_config(place)
    config.data.overlong = 'drop'
    found = evaluate.evaluate(config, place, exchange=True)
    # Each that is kept is judged with another prompt too, however long that is.
    assert len(found.exchanged.comparison_ids) == 12
    assert len(found.predictions.comparison_ids) == 9  # of three the own prompt is too long


def test_a_pairwise_run_says_what_the_order_of_responses_is_worth(tmp_path):
    """Its head alone is trained, on features of orders."""
    folder = str(tmp_path / 'run')
    config = load_config('pairwise', 'helpful', **TINY | {
        'data.demo.train': 80, 'data.demo.test': 60, 'train.tune': 'head', 'train.max_steps': 2,
        'model.initial_std': 1.0, 'evaluation.exchanged': 20})
    train.train(config, folder)
    text = evaluate.diagnose(workdir.load_config(folder), folder)
    assert 'Does it matter which response stands first?' in text
    found, diagnosis = (workdir.read_json(f'{folder}/{name}.json')
                        for name in ('evaluation', 'diagnostics'))
    assert found['head'] == 'pairwise'
    assert found['position'] == diagnosis['position']
    assert 'auc' not in found['metrics']
    position = {name: number['value'] for name, number in found['position'].items()}
    # Of the pairs of the test split, as the loaded model compares them.
    model = reward_model.load(folder)
    test, _ = sources.load_splits(config.data, 'helpful')['test']
    wins = model.compare([c.prompt for c in test], [list(c.responses) for c in test])
    preferred = [int(c.preference_matrix()[1, 0]) for c in test]
    won = np.array([own[k, 1 - k] for own, k in zip(wins, preferred, strict=True)])
    assert np.abs(won - 0.5).max() > 1e-3
    assert position['accuracy'] == found['metrics']['accuracy'] == np.mean(won > 0.5)
    assert position['nll'] == pytest.approx(-np.log(won).mean(), rel=1e-4)
    assert found['metrics']['nll'] == pytest.approx(position['nll'], rel=1e-6)
