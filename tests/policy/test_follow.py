"""Checkpoints are watched after training as they would have been while it went on."""

import json

import numpy as np
import pytest

from qrm.analysis import figures
from qrm.data.comparisons import DataError
from qrm.policy import dpo, follow, optimise
from qrm.training import train, workdir
from qrm.training.schema import ConfigError
from qrm.training.workdir import WorkdirError
from tests.helpers import TINY_POLICY, load_config

DATA = TINY_POLICY | {'data.demo.train': 150, 'data.demo.test': 40, 'train.max_steps': 4,
                      'train.checkpoint_every': 2}
WATCHED = {'reward.source': 'gold', 'rollouts.max_new_tokens': 4, 'rollouts.rows': 16,
           'evaluation.prompts': 6, 'evaluation.samples': 2, 'analysis.bootstrap': 20}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Nothing is drawn, which takes as long as all else."""
    monkeypatch.setattr(figures, 'save', lambda folder, figures: None)


def config(run, **changes):
    return load_config('watch', **WATCHED | {'run': str(run)} | changes)


def monitored(folder):
    return json.loads((folder / 'monitor.json').read_text())


@pytest.fixture(scope='module')
def preferences(tmp_path_factory):
    run = tmp_path_factory.mktemp('dpo')
    dpo.train(load_config('dpo', 'demo', **DATA | {'optimizer.learning_rate': 0.1}), str(run))
    return run


def test_a_run_that_answered_nothing_is_watched(preferences, tmp_path, capsys):
    text = follow.run(config(preferences), str(tmp_path))
    found = monitored(tmp_path)
    assert [row['step'] for row in found['rows']] == [0, 2, 4]
    first, _, last = found['rows']
    assert first['kl'] == pytest.approx(0.0, abs=1e-4)
    assert last['kl'] > 0.1
    assert first['gold'] == pytest.approx(first['proxy'], abs=1e-6)  # the reward is the truth
    assert [line.split('|')[1].strip() for line in text.splitlines()[2:5]] == ['0', '2', '4']
    assert f'best step {found["best"]["step"]}: preferred to the reference' in text
    rows = [json.loads(line) for line in (tmp_path / 'responses/4.jsonl').read_text().splitlines()]
    assert len(rows) == 6
    assert np.mean([row['rewards'] for row in rows]) == pytest.approx(last['proxy'])
    assert 'beyond evaluation.prompts' in capsys.readouterr().out
    # A second call does the same, and another one has another folder.
    (tmp_path / 'responses/3.jsonl').write_text('')  # of a step that is not kept any more
    assert follow.run(config(preferences), str(tmp_path)) == text
    assert monitored(tmp_path) == found
    assert {path.name for path in (tmp_path / 'responses').iterdir()} == {
        '0.jsonl', '2.jsonl', '4.jsonl'}
    with pytest.raises(WorkdirError, match='config.evaluation.samples: 2 -> 1'):
        follow.run(config(preferences, **{'evaluation.samples': 1}), str(tmp_path))


def test_a_run_that_was_split_over_devices_is_watched_whole(preferences, tmp_path):
    values = workdir.read_json(str(preferences / 'config.json'))
    values['train'] |= {'sharding': 'fsdp', 'tensor': 2}  # more than there are here
    run = tmp_path / 'run'
    run.mkdir()
    for path in preferences.iterdir():
        if path.name != 'config.json':
            (run / path.name).symlink_to(path)
    (run / 'config.json').write_text(json.dumps(values))
    follow.run(config(run), str(tmp_path / 'split'))
    follow.run(config(preferences), str(tmp_path / 'whole'))
    assert monitored(tmp_path / 'split')['rows'] == monitored(tmp_path / 'whole')['rows']


@pytest.mark.parametrize('name', ['ppo', 'grpo'])
def test_an_online_run_is_seen_as_it_saw_itself(name, tmp_path):
    own = {key: value for key, value in WATCHED.items() if key != 'reward.source'}
    optimise.train(load_config('rl', f'{name},demo', **DATA | own | {
        'rollouts.prompts': 4, 'rollouts.samples': 2, 'train.batch_size': 4, 'train.tune': 'lora',
        'optimizer.learning_rate': 0.05}), str(tmp_path / 'run'))
    follow.run(config(tmp_path / 'run'), str(tmp_path / 'watch'))
    assert monitored(tmp_path / 'watch')['rows'] == monitored(tmp_path / 'run')['rows']


def test_what_cannot_be_watched_is_named(preferences, tmp_path):
    with pytest.raises(ConfigError, match="config.run='', expected the workdir") as caught:
        follow.check(load_config('watch'))
    assert "config.reward.source='', expected a reward" in str(caught.value)
    with pytest.raises(ConfigError, match='config.monitor.window=1, expected at least 3'):
        follow.check(config(preferences, **{'monitor.window': 1}))
    with pytest.raises(WorkdirError, match=r'not the folder of a run \(no config.json\)'):
        follow.run(config(tmp_path / 'none'), str(tmp_path / 'watch'))
    run = tmp_path / 'reward'
    train.train(load_config('demo', **{
        'data.demo.train': 60, 'data.demo.test': 30, 'train.max_steps': 1}), str(run))
    with pytest.raises(DataError, match='a run, which is a reward model; expected a language mod'):
        follow.run(config(run), str(tmp_path / 'watch'))
    assert not (tmp_path / 'watch/config.json').exists()
    values = workdir.read_json(str(preferences / 'config.json'))
    values['data']['path'] = 'pairs.jsonl'
    (tmp_path / 'moved').mkdir()
    for path in preferences.iterdir():
        (tmp_path / 'moved' / path.name).symlink_to(path)
    (tmp_path / 'moved/config.json').unlink()
    (tmp_path / 'moved/config.json').write_text(json.dumps(values))
    with pytest.raises(ConfigError, match='the truth is known of the demo alone'):
        follow.run(config(tmp_path / 'moved'), str(tmp_path / 'watch'))
