"""Beside TRL, for which a program stands in that writes what the worker would."""

import importlib.util
import json
import sys

import pytest

from benchmarks import trl, trl_worker
from qrm.data.comparisons import DataError
from qrm.training.schema import ConfigError
from tests.helpers import ROOT, WORDS, command, load_config, simulated, stub_python, word_pairs


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    return word_pairs(tmp_path_factory.mktemp('words'))


STUB = """#!{python}
import json, runpy, sys
worker = runpy.run_path(sys.argv[1])
args = worker['parse'](sys.argv[2:])
pairs = {{name: worker['read'](getattr(args, name)) for name in ('training', 'scoring')}}
count = args.batch_size * args.steps
rates = {{'comparisons_per_second': worker['summary']([2.0] * args.repeats)}}
words = lambda rows: sum(len(row[side].split()) + 1 for row in rows
                         for side in ('chosen', 'rejected'))
json.dump({{
    'training': rates | {{'dialogue_tokens': words(pairs['training'][args.batch_size:])}},
    'scoring': {{'in_order': rates, 'sorted': rates, 'dialogue_tokens': words(pairs['scoring'])}},
    'versions': {{'trl': '0'}}, 'threads': 2, 'device': 'cpu',
}}, open(args.output, 'w'))
"""


@pytest.fixture
def stub(tmp_path):
    return stub_python(tmp_path, STUB)


def test_both_are_timed_on_the_same_pairs(words, stub, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('XLA_FLAGS', simulated(2)['XLA_FLAGS'])
    changes, folder = {'head.name': 'scalar'} | WORDS | words, tmp_path / 'out'
    out = trl.compare(
        load_config('speed', **changes), str(folder), trl_python=stub, rounds=1, per_device=2,
        config_args=['--config=configs/speed.py',
                     *(f'--config.{key}={value}' for key, value in changes.items())])
    with open(folder / 'benchmark_trl.json', encoding='utf-8') as file:
        found = json.load(file)
    pairs, (single,) = found['pairs'], found['rounds']
    assert (pairs['training'], pairs['scoring']) == (8, 6)
    for name in ('training', 'scoring'):  # qrm and the stub count the tokens of the same texts
        assert single['trl'][name]['dialogue_tokens'] == pairs[f'{name}_dialogue_tokens']
        assert f'{name}: {pairs[name]} pairs' in out
    assert single['qrm']['config']['head']['name'] == 'scalar'
    assert single['qrm']['training']['comparisons'] == [4, 4]
    assert (single['qrm']['machine']['devices'], single['qrm']['best_of_n']) == (2, None)
    assert '2 x cpu' in (folder / 'qrm-1.log').read_text()
    for name, part in (('training', 'training'), ('scoring', 'scoring'),
                       ('scoring_sorted', 'scoring')):
        rate = single['qrm'][part]['comparisons_per_second']['median']
        assert found['ratios'][name]['repeats'] == [pytest.approx(rate / 2.0)]
        assert found['comparisons_per_second'][name]['trl']['median'] == 2.0


def test_the_config_is_given_on():
    given = ['--config=speed:helpful,scalar', '--config.model.remat', '--noconfig.data.x',
             "--config.reproduce.models=('scalar',)", '--config.data.path=']
    assert trl.config_arguments(['--rounds=2', *given, '--workdir=x', '--config', 'hh',
                                 '--config.train.rows', '3', 'x']) == [
        *given, '--config', 'hh', '--config.train.rows', '3']


def test_bad_flags_end_in_one_clear_line(tmp_path):
    _, err = command('trl', '--config=configs/speed.py', f'--workdir={tmp_path}',
                     '--trl_python=python', package='benchmarks', code=2)
    assert "config.data.path='', expected pairs" in err


def test_ratios_are_taken_round_by_round_and_the_order_changes(words, stub, tmp_path, monkeypatch):
    qrm_rates, ran = iter([8.0, 2.0, 12.0]), []

    def run(arguments, unused_log):
        name = 'trl' if arguments[0] == stub else 'qrm'
        ran.append(name)
        rates = {'comparisons_per_second': {'median': next(qrm_rates) if name == 'qrm' else 4.0}}
        content = {'training': rates, 'scoring': rates} if name == 'qrm' else {
            'training': rates | {'dialogue_tokens': 1}, 'versions': {}, 'threads': 1,
            'scoring': {'in_order': rates, 'sorted': rates, 'dialogue_tokens': 1}, 'device': 'cpu'}
        path = tmp_path / ('trl.json' if name == 'trl' else 'qrm/speed.json')
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))

    monkeypatch.setattr(trl, 'run', run)
    table = trl.compare(load_config('speed', **WORDS | words), str(tmp_path),
                        trl_python=stub, rounds=3, per_device=4, config_args=[])
    assert ran == ['qrm', 'trl', 'trl', 'qrm', 'qrm', 'trl']
    with open(tmp_path / 'benchmark_trl.json', encoding='utf-8') as file:
        ratios = json.load(file)['ratios']
    assert ratios['training'] == {'median': 2.0, 'min': 0.5, 'max': 3.0, 'repeats': [2.0, 0.5, 3.0]}
    assert '2.00, 0.50, 3.00' in table


@pytest.mark.parametrize(('changes', 'message'), [
    ({'data.path': ''}, "config.data.path='', expected pairs"),
    ({'model.checkpoint': ''}, "config.model.checkpoint='', expected a model folder"),
    ({'model.checkpoint': 'no/folder'}, "config.model.checkpoint='no/folder', expected a folder"),
    ({'data.max_length': 0}, 'config.data.max_length=0, expected a number of tokens'),
    ({'data.overlong': 'truncate_prompt'}, "config.data.overlong='truncate_prompt', expected 'dro"),
    ({'model.remat': True}, 'config.model.remat=True, expected False'),
    ({'train.batch_size': 6}, 'config.train.batch_size=6, expected a multiple of --per_device=4'),
])
def test_what_trl_cannot_be_run_on(words, stub, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        trl.compare(load_config('speed', **WORDS | words | changes), str(tmp_path),
                    trl_python=stub, rounds=1, per_device=4, config_args=[])


def test_a_missing_or_failing_program_is_named(words, tmp_path):
    with pytest.raises(ConfigError, match='--trl_python=/no/python: no such program'):
        trl.check(load_config('speed', **WORDS | words), '/no/python', 4)
    log = tmp_path / 'log'
    with pytest.raises(ConfigError, match='exit code 1: no torch here'):
        trl.run([sys.executable, '-c', 'raise SystemExit("no torch here")'], str(log))


def test_only_pairs_can_be_compared(words, tmp_path):
    rows = [{'id': str(i), 'prompt': f'w{i}', 'responses': ['w1 w2', 'w3', 'w4'],
             'ratings': [1, 2, 3]} for i in range(30)]
    path = tmp_path / 'triples.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    cfg = load_config('speed', **WORDS | words | {'data.path': str(path)})
    with pytest.raises(DataError, match='expected two responses'):
        trl.write_pairs(cfg, str(tmp_path))


def test_the_chosen_response_is_the_preferred_one(words, tmp_path):
    rows = [{'id': str(i), 'prompt': f'w{i}', 'responses': [' w1', ' w2'], 'preferred': 1}
            for i in range(30)]
    path = tmp_path / 'preferred.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    cfg = load_config('speed', **WORDS | words | {'data.path': str(path)})
    trl.write_pairs(cfg, str(tmp_path))
    for name in ('training', 'scoring'):
        for row in trl_worker.read(tmp_path / f'{name}.jsonl'):
            assert row['chosen'] == f'w{row["id"]} w2'
            assert row['rejected'] == f'w{row["id"]} w1'


# The worker, as far as it goes without torch.


def test_the_worker_needs_neither_qrm_nor_torch_to_start():
    spec = importlib.util.spec_from_file_location('w', ROOT / 'benchmarks' / 'trl_worker.py')
    source = (ROOT / 'benchmarks' / 'trl_worker.py').read_text()
    assert 'import qrm' not in source
    assert 'from qrm' not in source
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_worker_batches_in_order_and_by_length():
    dialogues = ['aa', 'a', 'aaaa', 'aaa', 'a']
    assert trl_worker.batches(dialogues, 2, by_length=False) == [[0, 1], [2, 3], [4]]
    assert trl_worker.batches(dialogues, 2, by_length=True) == [[2, 3], [0, 1], [4]]


def test_worker_leaves_out_the_first_step():
    # Steps end at 10 (compiled, loaded), 11, 13, 16 and 20; in twos they took 3 and 7 seconds.
    assert trl_worker.intervals([10, 11, 13, 16, 20], 2) == [3, 7]
    assert trl_worker.intervals([10, 11, 13, 16, 20], 1) == [1, 2, 3, 4]


def test_worker_refuses_a_step_of_broken_batches(capsys):
    flags = {'model': 'm', 'training': 't', 'scoring': 's', 'output': 'o', 'max_length': 8,
             'batch_size': 6, 'per_device': 4, 'steps': 1, 'repeats': 1, 'dtype': 'float32'}
    with pytest.raises(SystemExit):
        trl_worker.parse([f'--{key}={value}' for key, value in flags.items()])
    assert '--batch_size=6, expected a multiple of --per_device=4' in capsys.readouterr().err
