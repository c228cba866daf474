"""A few trials of every measure; a campaign goes on, counts, and keeps what failed."""

import json
import os

import numpy as np
import pytest

from qrm.studies import breakages, campaign, generated, strikes
from qrm.studies.strikes import Ground, Outcome
from qrm.training import schema
from qrm.training.schema import ConfigError
from tests.programs import forks

_START = strikes._start


def forked(name, folder, *flags):
    """`strikes._start` with everything imported."""
    _, _, _, *arguments = strikes._command(name, folder, *flags)
    return forks.Process('tests.programs.on_commands', arguments, strikes._environment())


@pytest.fixture(scope='module')
def ground(tmp_path_factory):
    """Of runs a third as long as the campaign's, whose micro-batches have one shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(strikes.TINY, 'train.epochs', 3.0)
        patch.setitem(strikes.TINY, 'train.rows', 1)
        patch.setattr(strikes, '_start', forked)
        yield Ground(tmp_path_factory.mktemp('ground'))


SAMPLES = {'killed': 1, 'killed_of_two': 1, 'checkpoint_damaged': 4, 'disk_full': 1, 'stopped': 2,
           'not_finite': 8, 'rows': 2, 'configs': 4, 'folders': 16, 'order': 50, 'twice': 1}


def test_every_measure_has_a_sample():
    assert SAMPLES.keys() == campaign.MEASURES.keys()


@pytest.mark.parametrize('name', SAMPLES)
def test_a_sample_of_each_measure_survives(name, ground, tmp_path, monkeypatch):
    if name == 'twice':
        monkeypatch.setattr(strikes, '_start', _START)  # as a user's shell starts it
    for number in range(1000, 1000 + SAMPLES[name]):
        outcome = campaign.take(name, number, 0, ground, tmp_path)
        if outcome.how == 'not run':
            pytest.skip(outcome.wrong)
        assert not outcome.wrong, (number, outcome)
    assert not os.listdir(tmp_path / 'failures')


def _config(**changes):
    return schema.build(campaign.KEYS, {'measures': ('order', 'twice')} | changes)


@pytest.fixture
def scripted(monkeypatch):
    """Two measures whose trials end as a script says; which trials were taken."""
    taken = []

    def trial(name):
        def take(ground, rng, folder):
            (folder / 'left').write_text('')
            taken.append((name, round(float(rng.random()), 6)))
            if len(taken) == 3:
                raise KeyError('lost')
            return Outcome('even' if len(taken) % 2 == 0 else 'odd',
                           'broken' if len(taken) == 4 else '')
        return take

    for name in ('order', 'twice'):
        measure = campaign.MEASURES[name]._replace(trial=trial(name), size=1 + (name == 'twice'))
        monkeypatch.setitem(campaign.MEASURES, name, measure)
    return taken


def test_a_campaign_counts_goes_on_and_keeps_what_failed(scripted, tmp_path):
    text = campaign.run(_config(trials={'order': 2, 'twice': 1}), str(tmp_path))
    assert '| the command twice at once in one folder | 2 | 0 | one is refused' in text
    assert 'twice, trial 0: KeyError: \'lost\' (test_campaign.py:' in text
    text = campaign.run(_config(trials={'order': 2, 'twice': 3}), str(tmp_path))
    # Only what was missing was taken, and each with numbers of its own.
    assert [name for name, _ in scripted] == ['order', 'order', 'twice', 'twice', 'twice']
    assert len({drawn for _, drawn in scripted}) == 5
    result = json.loads((tmp_path / 'campaign.json').read_text())['measures']
    assert (result['twice']['trials'], result['twice']['survived']) == (6, 2)
    assert result['twice']['outcomes'] == {'even': 1, 'odd': 1, 'traceback': 1}
    assert set(result['twice']['failures']) == {'0', '1'}
    assert result['order']['survived'] == 2
    assert '- twice: even 1, odd 1, traceback 1' in text
    assert '| kill -9 at a random moment, rerun | not run |  |' in text
    assert sorted(os.listdir(tmp_path / 'failures')) == ['twice-0', 'twice-1']
    # A failure is repeated from its seed.
    drawn = scripted[3]
    campaign.take('twice', 1, 0, None, tmp_path)
    assert scripted[-1] == drawn
    with pytest.raises(ConfigError, match='seed=1, but .* has trials of seed 0'):
        campaign.run(_config(seed=1), str(tmp_path))


def test_a_line_cut_by_a_kill_is_taken_again(scripted, tmp_path):
    campaign.run(_config(trials={'order': 2, 'twice': 0}), str(tmp_path))
    path = tmp_path / 'trials.jsonl'
    path.write_text(path.read_text()[:-9])
    campaign.run(_config(trials={'order': 2, 'twice': 0}), str(tmp_path))
    assert [name for name, _ in scripted] == ['order'] * 3
    assert len(path.read_text().splitlines()) == 2


def test_a_trial_that_kills_the_campaign_twice_has_failed(scripted, tmp_path):
    begun = tmp_path / 'begun.json'
    config = _config(trials={'order': 2, 'twice': 0})
    begun.write_text(json.dumps({'measure': 'order', 'trial': 0, 'seed': 0, 'times': 1}))
    campaign.run(config, str(tmp_path / 'other'))
    campaign.run(config, str(tmp_path))
    assert [name for name, _ in scripted] == ['order'] * 4
    assert not begun.exists()
    (tmp_path / 'trials.jsonl').unlink()
    begun.write_text(json.dumps({'measure': 'order', 'trial': 0, 'seed': 0, 'times': 2}))
    assert 'order, trial 0: the process died, twice' in campaign.run(config, str(tmp_path))
    assert len(scripted) == 5  # the other trial


@pytest.mark.parametrize(('changes', 'expected'), [
    ({'measures': ('none',)}, "config.measures: 'none', expected some of"),
    ({'trials': {'order': -1, 'twice': 1}}, 'config.trials.order=-1, expected a whole number'),
    ({'trials': {'order': 1}}, 'config.trials.twice: missing'),
    ({'trials': {'order': 1, 'twice': 1, 'x': 1}}, 'config.trials.x=1'),
])
def test_configs_that_cannot_be_used(changes, expected):
    with pytest.raises(ConfigError, match=expected):
        campaign.check(_config(**changes))


# The campaign itself can fail: what it looks for is found when it is there.


def test_a_checkpoint_that_is_read_in_spite_of_damage_is_noticed(ground, tmp_path, monkeypatch):
    known = breakages.digests(ground.run[0])
    monkeypatch.setattr(breakages, 'digests', lambda _: dict.fromkeys(known, 'other'))
    outcomes = [campaign.take('checkpoint_damaged', number, 0, ground, tmp_path)
                for number in range(2)]
    assert all('has other numbers' in outcome.wrong for outcome in outcomes)


def test_rows_that_are_read_otherwise_are_noticed(ground, tmp_path, monkeypatch):
    read = breakages.sources.parse_row

    def swapped(row, where, **kwargs):
        found = read(row, where, **kwargs)
        if len(found.responses) == 2:
            return breakages.dataclasses.replace(found, responses=found.responses[::-1])
        return found

    monkeypatch.setattr(breakages.sources, 'parse_row', swapped)
    outcomes = [campaign.take('rows', number, 0, ground, tmp_path) for number in range(3)]
    assert any('read as' in outcome.wrong for outcome in outcomes)


def test_folders_that_are_read_otherwise_are_noticed(ground, tmp_path, monkeypatch):
    expected = ground.rewards
    monkeypatch.setattr(breakages, 'score', lambda *_, **__: expected + 1.0)
    monkeypatch.setattr(breakages, '_rewards_of_transformers', lambda place: None)
    outcomes = [campaign.take('folders', number, 0, ground, tmp_path) for number in range(8)]
    assert all('not' in outcome.wrong for outcome in outcomes
               if not outcome.how.startswith('setting'))
    assert any(outcome.wrong for outcome in outcomes)


def test_orders_that_repeat_are_noticed(ground, tmp_path, monkeypatch):
    monkeypatch.setattr(breakages.packing, 'batch_indices',
                        lambda step, **kw: np.zeros(min(kw['batch_size'], kw['total']), np.int64))
    outcomes = [campaign.take('order', number, 0, ground, tmp_path) for number in range(8)]
    assert any(outcome.wrong for outcome in outcomes)


def test_generated_rows_are_half_valid_and_in_every_format():
    import hypothesis

    found = []

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=100, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(generated.files())
    def draw(drawn):
        found.append(drawn)

    draw()
    rows = [row for _, some in found for row in some]
    assert 0.3 < np.mean([row.meant is not None for row in rows]) < 0.8
    assert {suffix for suffix, _ in found} == set(generated.SUFFIXES)
