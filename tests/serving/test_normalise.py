"""Normalised rewards: measured once, the same wherever they are used, never by the test split."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

import qrm
from qrm.analysis import evaluate
from qrm.data import sources
from qrm.data.comparisons import DataError
from qrm.data.rows import as_chat, as_row
from qrm.data.seen import Seen
from qrm.rewards import selection
from qrm.rewards.normalisation import Normalisation
from qrm.serving import score
from qrm.serving.normalise import clear, normalise
from qrm.serving.server import Service
from qrm.training import reward_model, workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.schema import ConfigError
from qrm.training.workdir import WorkdirError
from tests.helpers import (
    TINY,
    command,
    load_config,
    small_pairwise_model,
    small_reward_model,
)

SIZES = {'data.demo.train': 60, 'data.demo.test': 30, 'data.validation_fraction': 0.2,
         'data.max_length': 200, 'evaluation.exchanged': 10}


@pytest.fixture(scope='module')
def data():
    """The config of a run, its source and its splits."""
    config = load_config('demo', 'helpful,quantile', **TINY | SIZES)
    source = sources.read(config.data, 'helpful')
    splits = sources.divide(source, config.data)
    return config, source, {split: comparisons for split, (comparisons, _) in splits.items()}


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """The folder of a run with random weights, as if it had been trained."""
    config, source, splits = data
    folder, model = tmp_path_factory.mktemp('run'), small_reward_model(splits['train'])
    reward_model.describe(str(folder), model)
    workdir.claim(str(folder), config)
    workdir.write_arrays(str(folder / 'seen.npz'),
                         Seen.of(source.digest, splits['train']).arrays())
    save(folder, 1, model.params, 0.5)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'run')


def save(folder, step, params, loss):
    with Checkpoints(str(folder), keep=3) as checkpoints:
        checkpoints.save(step, params, {'step': np.int32(step)}, {}, loss)


def write(path, comparisons):
    path.write_text(''.join(json.dumps(as_row(c)) + '\n' for c in comparisons))
    return str(path)


def rewards(model, comparisons):
    return np.concatenate(model.score_comparisons(comparisons)[0].rewards).astype(np.float64)


def stored(run):
    return json.loads((run / 'normalisation.json').read_text())


def test_a_reference_set_gets_mean_0_and_deviation_1(run, data):
    reference = data[2]['validation']
    raw = rewards(qrm.load(str(run)), reference)
    said = normalise(str(run), split='validation')
    found = stored(run)
    assert (found['mean'], found['std']) == (pytest.approx(raw.mean()), pytest.approx(raw.std()))
    assert f'by {len(raw)} responses to {found["prompts"]} prompts of the validation split' in said
    assert found['responses'] == len(raw)
    assert found['prompts'] == len({c.prompt for c in reference})
    assert found['reference']['path'] == 'demo'
    assert found['reference']['split'] == 'validation'
    assert found['checkpoint']['step'] == 1
    after = rewards(qrm.load(str(run)), reference)
    assert after.mean() == pytest.approx(0.0, abs=1e-5)
    assert after.std() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(after, (raw - raw.mean()) / raw.std(), atol=1e-4)
    np.testing.assert_array_equal(rewards(qrm.load(str(run), raw=True), reference), raw)


def test_mean_std_gets_its_scale_from_the_reference_set(run, data, tmp_path):
    reference = data[2]['validation']
    assert 'no scale' not in normalise(str(run), split='validation')
    model = qrm.load(str(run))
    quantiles = np.concatenate(model.score_comparisons(reference)[0].quantiles)
    prompts = [c.prompt for c in reference for _ in c.responses]
    expected = selection.reference_scale(
        quantiles.mean(axis=1), quantiles.std(axis=1), np.array(prompts))
    np.testing.assert_allclose(model.scale, expected, rtol=1e-3)
    found = qrm.reward(str(run), rule='mean-std:1.5')(
        prompts[:4], [r for c in reference for r in c.responses][:4])
    np.testing.assert_allclose(
        found, (quantiles.mean(axis=1) / expected.mean
                - 1.5 * quantiles.std(axis=1) / expected.std)[:4], rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match='needs a scale'):
        qrm.reward(str(run), rule='mean-std:1.5', raw=True)
    alone = [dataclasses.replace(c, responses=c.responses[:1], ranks=None, preferred=None,
                                 preference=None, ratings=None) for c in reference[:5]]
    assert "note no prompt has two responses: the rule 'mean-std' has no scale" in normalise(
        str(run), source=write(tmp_path / 'alone.jsonl', alone))
    assert stored(run)['scale'] is None
    with pytest.raises(ValueError, match='needs a scale'):
        qrm.reward(str(run), rule='mean-std:1.5')


def test_what_else_is_said_of_a_reference_set(run, data, tmp_path, capsys):
    path = tmp_path / 'rows.jsonl'
    rows = [as_row(c) | {'surplus': 1} for c in data[2]['validation'][:2]]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    said = normalise(str(run), source=str(path), max_length=60)
    assert "note 2: key 'surplus' not used" in said
    capsys.readouterr()
    qrm.load(str(run))
    told = capsys.readouterr().out
    assert 'normalised by dialogues of at most 60 tokens, and are now of at most ' in told
    qrm.load(str(run), max_length=60)
    assert 'at most' not in capsys.readouterr().out


def test_a_checkpoint_that_is_not_the_best_is_told(run, data):
    save(run, 2, small_reward_model(data[2]['train']).params, 0.9)
    assert 'the best checkpoint, which other commands use, is 1: they will refuse this' in (
        normalise(str(run), split='validation', step=2))
    assert 'best checkpoint' not in normalise(str(run), split='validation')


def test_a_model_of_pairs_has_no_rewards_to_normalise(run, data):
    shutil.rmtree(run / 'tokenizer')
    shutil.rmtree(run / 'checkpoints')
    model = small_pairwise_model(data[2]['train'])
    reward_model.describe(str(run), model)
    save(run, 1, model.params, 0.5)
    with pytest.raises(DataError, match='pairwise'):
        normalise(str(run), split='validation')
    assert not (run / 'normalisation.json').exists()


def test_each_response_counts_once_however_rows_are_grouped(run, data, tmp_path):
    some = data[2]['validation'][:6]
    normalise(str(run), source=write(tmp_path / 'together.jsonl', some))
    together = stored(run)
    apart = [dataclasses.replace(c, responses=(response,), ranks=None, preferred=None,
                                 preference=None, ratings=None, id=f'{c.id} {i}')
             for c in reversed(some) for i, response in enumerate(c.responses)]
    said = normalise(str(run), source=write(tmp_path / 'apart.jsonl', apart))
    found = stored(run)
    assert found['mean'] == pytest.approx(together['mean'], abs=1e-5)
    assert found['std'] == pytest.approx(together['std'], rel=1e-4)
    assert (found['responses'], found['prompts']) == (together['responses'], together['prompts'])
    assert found['reference']['path'] == str(tmp_path / 'apart.jsonl')
    assert found['reference']['split'] is None
    assert found['reference']['digest'] != together['reference']['digest']
    assert said.splitlines()[0].endswith(
        f'; before: {Normalisation(together["mean"], together["std"])}')


def test_rewards_are_the_same_wherever_they_are_used(run, data, tmp_path, capsys):
    comparisons = data[2]['validation'][:4]
    prompts, responses = zip(*[(c.prompt, r) for c in comparisons for r in c.responses],
                             strict=True)
    raw = qrm.load(str(run)).score(prompts, responses)
    normalise(str(run), split='validation')
    mean, std = stored(run)['mean'], stored(run)['std']
    expected, quantiles = ((np.array(x, np.float64) - mean) / std
                           for x in (raw.rewards, raw.quantiles))
    lowest = np.sort(quantiles, axis=1)[:, :2].mean(axis=1)
    close = {'rtol': 0, 'atol': 1e-4}

    model = qrm.load(str(run))
    by = str(model.normalisation)
    assert f'note: rewards of {run} are normalised, {by}' in capsys.readouterr().out
    np.testing.assert_allclose(model.score(prompts, responses).quantiles, quantiles, **close)
    rows = write(tmp_path / 'in.jsonl', comparisons)
    said = score.score_file(model, rows, str(tmp_path / 'out.jsonl'))
    assert f', normalised: {by}' in said
    scored = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert scored[0]['normalised'] == {'mean': mean, 'std': std}
    np.testing.assert_allclose(np.concatenate([row['rewards'] for row in scored]), expected,
                               **close)

    logged = {}
    function = qrm.reward(str(run), rule='cvar:0.2')
    order = np.random.default_rng(0).permutation(len(prompts))
    found = function([prompts[i] for i in order], [responses[i] for i in order],
                     log_extra=logged.__setitem__)
    np.testing.assert_allclose(found, lowest[order], **close)
    np.testing.assert_allclose(logged['qrm_cvar_0_2_std'], quantiles.std(axis=1)[order], **close)
    np.testing.assert_allclose(logged['qrm_cvar_0_2_q0.05'], quantiles.min(axis=1)[order], **close)

    service = Service(model, selection.parse_rule('mean'), 'small')
    with TestClient(service.app(), base_url='http://localhost') as client:
        answers = [client.post('/score', json={'prompt': p, 'responses': [r]}).json()
                   for p, r in zip(prompts[:4], responses[:4], strict=True)]
        query = client.post('/get_reward', json={'query': [prompts[0] + responses[0]]}).json()
        assert client.get('/health').json()['normalised'] == {'mean': mean, 'std': std}
    assert answers[0]['normalised'] == {'mean': mean, 'std': std}
    np.testing.assert_allclose([a['rewards'][0] for a in answers], expected[:4], **close)
    np.testing.assert_allclose([a['quantiles'][0] for a in answers], quantiles[:4], **close)
    np.testing.assert_allclose([a['stds'][0] for a in answers], quantiles[:4].std(axis=1), **close)
    np.testing.assert_allclose(query['rewards'], expected[:1], **close)


def test_models_are_judged_by_raw_rewards(run, data, capsys):
    config = data[0]
    before = evaluate.evaluate(config, str(run))
    normalise(str(run), split='validation')
    capsys.readouterr()
    after = evaluate.evaluate(config, str(run))
    for name, values in before.predictions._asdict().items():
        np.testing.assert_array_equal(getattr(after.predictions, name), values)
    assert f'note: {run} is normalised, and what follows is of its raw' in capsys.readouterr().out


# Never by what judges the run.


def test_the_test_split_is_refused(run):
    _, err = command('normalise', f'--checkpoint={run}', '--split=test', code=2)
    assert err == ('error: --split=test judges the run, and is no reference set; expected train or '
                   'validation, or --input=FILE\n')
    with pytest.raises(DataError, match='--split=tset is no reference set; expected train or'):
        normalise(str(run), split='tset')
    for reference in ({}, {'split': 'train', 'source': 'x.jsonl'}):
        with pytest.raises(DataError, match='expected a reference set, either a file'):
            normalise(str(run), **reference)
    assert not (run / 'normalisation.json').exists()


def test_questions_of_the_test_split_are_refused_however_they_are_written(run, data, tmp_path):
    _, _, splits = data
    asked, other = splits['test'][0], splits['validation'][:3]
    opening = asked.prompt.removeprefix('\n\nHuman: ').split('\n\nAssistant:')[0]
    chat = as_chat(asked)
    for number, row in enumerate([
        {'prompt': asked.prompt, 'response': ' Another answer.'},
        {'prompt': opening, 'responses': [' One.', ' Two.']},
        {'prompt': list(chat.prompt), 'response': list(chat.responses[0])},
        {'chosen': asked.prompt + ' One.', 'rejected': asked.prompt + ' Two.'},
        {'prompt': '', 'response': asked.prompt + ' One.'},
        {'prompt': 'Else?', 'response': 'One.', 'group': asked.group},
    ]):
        path = tmp_path / f'{number}.jsonl'
        path.write_text(''.join(json.dumps(r) + '\n' for r in [*map(as_row, other), row]))
        with pytest.raises(DataError, match=rf"{path}: 1 of 4 rows, the first of them {path}:4, "
                                            "have questions of the run's test split"):
            normalise(str(run), source=str(path))
    assert not (run / 'normalisation.json').exists()


def test_what_cannot_be_told_is_said(run, data, tmp_path):
    config, _, splits = data
    rows = write(tmp_path / 'rows.jsonl', splits['test'][:5])
    moved = config.copy_and_resolve_references()
    moved.data.path = str(tmp_path / 'gone.jsonl')
    workdir.claim(str(run), moved)
    said = normalise(str(run), source=rows)
    assert "  note whether it has questions of the run's test split cannot be told: " in said
    assert 'gone.jsonl' in said
    with pytest.raises(DataError, match=r'gone\.jsonl'):
        normalise(str(run), split='train')
    # Data that say something else now.
    moved.data.path = write(tmp_path / 'gone.jsonl', splits['train'][:30])
    said = normalise(str(run), source=rows)
    assert 'cannot be told: ' in said
    assert 'no longer says what the run was trained on' in said
    with pytest.raises(DataError, match='no longer says what .* so that its train split is not'):
        normalise(str(run), split='train')


def test_rows_that_the_run_was_trained_on_are_counted(run, data, tmp_path):
    _, _, splits = data
    fresh = [c for c in splits['validation'] if c.group not in {t.group for t in splits['train']}]
    path = write(tmp_path / 'x.jsonl', [*splits['train'][:3], *fresh[:2]])
    said = normalise(str(run), source=path)
    assert '  note 3: row this run was trained on' in said.splitlines()


# What no rewards can be divided by, and what has changed since.


def test_rewards_that_give_no_scale_are_refused_in_a_line(run, data, tmp_path):
    one = tmp_path / 'one.jsonl'
    one.write_text('{"prompt": "a", "response": " b"}\n')
    with pytest.raises(DataError, match=rf'^{one}: 1 response, expected at least two'):
        normalise(str(run), source=str(one))
    params = qrm.load(str(run)).params
    signs = np.sign(params['head']['kernel'])
    for step, size, error, message in (
        (2, 0.0, DataError, r'^demo: \d+ responses with the same reward, 0, expected some'),
        (3, 3e38, NonFiniteLoss, 'a reward that is not finite'),
    ):
        save(run, step, params | {'head': {'kernel': np.float32(size) * signs}}, 0.5)
        with pytest.raises(error, match=message):
            normalise(str(run), split='validation', step=step)
    assert not (run / 'normalisation.json').exists()


def test_a_run_that_went_on_is_not_used_by_what_was_before(run, data):
    normalise(str(run), split='validation')
    model = qrm.load(str(run))
    before = stored(run)
    save(run, 2, jax.tree.map(lambda leaf: 2 * leaf, model.params), 0.4)
    expected = r'normalisation\.json: is of checkpoint 1, but checkpoint 2 is used; expected `qrm'
    for use in (qrm.load, qrm.reward):
        with pytest.raises(WorkdirError, match=expected):
            use(str(run))
    assert qrm.load(str(run), step=1).normalisation == model.normalisation
    assert qrm.load(str(run), raw=True).normalisation is None
    assert 'rewards of checkpoint 2 are now' in normalise(str(run), split='validation')
    assert qrm.load(str(run)).normalisation == Normalisation(stored(run)['mean'],
                                                             stored(run)['std'])
    assert stored(run)['std'] != before['std']
    # A checkpoint is known by its parameters.
    shutil.rmtree(run / 'checkpoints' / '2')
    save(run, 2, model.params, 0.4)
    with pytest.raises(WorkdirError, match='is of checkpoint 2, but another checkpoint 2 is used'):
        qrm.load(str(run))


def test_it_can_be_taken_back(run):
    with pytest.raises(DataError, match='no such file, rewards of this run are raw'):
        clear(str(run))
    assert 'prompts of the train split of demo; 0 dialogues cut' in normalise(str(run),
                                                                              split='train')
    found = qrm.load(str(run)).normalisation
    assert clear(str(run)).endswith(f'removed, rewards are raw; before: {found}')
    assert qrm.load(str(run)).normalisation is None


def test_what_is_damaged_is_named_and_can_be_made_anew(run):
    path = run / 'normalisation.json'
    for content, message in (
        ('{"mean": 0.0, "std": 1.0, "checkpoint": {"stp": 1}}', 'says not by what rewards are'),
        ('{"mean": 0.0, "std": 0.0}', 'says not .* std=0.0, expected numbers'),
        ('{}', 'says not by what'), ('[]', 'says not by what'), ('{', 'not JSON'),
    ):
        path.write_text(content)
        with pytest.raises(WorkdirError, match=rf'normalisation\.json: {message}'):
            qrm.load(str(run))
    assert normalise(str(run), split='validation').endswith(
        '; before: a file that could not be read')
    assert qrm.load(str(run)).normalisation


def test_what_is_no_run_is_refused(run, tmp_path):
    for use in (clear, lambda folder: normalise(folder, split='train')):
        with pytest.raises(WorkdirError, match='not the folder of a run, .* holds the runs run:'):
            use(str(tmp_path))
    with workdir.lock(str(run)), pytest.raises(WorkdirError, match='another process is running'):
        normalise(str(run), split='train')


def test_a_run_whose_config_is_of_another_version_is_refused_in_a_line(run):
    path = run / 'config.json'
    values = json.loads(path.read_text())
    kept = path.read_text()
    del values['data']['cache']
    path.write_text(json.dumps(values))
    try:
        with pytest.raises(ConfigError, match=r'no config\.data\.cache'):
            normalise(str(run), split='train')
    finally:
        path.write_text(kept)
