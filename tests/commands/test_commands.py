"""The commands, as a user types them."""

import json
import os
import pathlib

import numpy as np
import pytest

from tests.helpers import ROOT, TINY, command


def read(path):
    return pathlib.Path(path).read_text(encoding='utf-8')


def overrides(**kwargs):
    settings = TINY | {'train.max_steps': 4} | kwargs
    return [f'--config.{key}={value}' for key, value in settings.items()]


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """A file of pairs with chat messages, strings, a soft label, a tie and a malformed row."""
    path = tmp_path_factory.mktemp('data') / 'pairs.jsonl'
    rows = [{'id': i, 'prompt': f'\n\nHuman: question number {i}?\n\nAssistant:',
             'chosen': f' a good answer to {i}.', 'rejected': ' no idea.'} for i in range(400)]
    rows[3]['preference'] = 0.7
    rows[4]['preference'] = 0.5
    rows[5]['chosen'] = rows[5]['rejected']
    rows[6] = {'prompt': 'which is best?', 'responses': [' x', ' y', ' z'], 'ratings': [1, 3, None]}
    rows[7]['rejected'] = None
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture(scope='module')
def results(tmp_path_factory, pairs):
    """Results of the main job on a file of pairs, with what it printed."""
    folder = str(tmp_path_factory.mktemp('results'))
    out, _ = command('reproduce', '--config=configs/demo.py', f'--workdir={folder}',
                     *overrides(**{'data.path': pairs, 'data.max_malformed': 0.01}))
    return folder, out


def test_reproduce_leaves_table_figures_and_runs(results):
    folder, out = results
    table = json.loads(read(f'{folder}/table.json'))
    assert [(row['workload'], row['model']) for row in table['rows']] == [
        ('pairs', 'scalar'), ('pairs', 'scalar_centred'), ('pairs', 'quantile')]
    assert table['rows'][0]['n'] == table['rows'][1]['n'] >= 35
    assert read(f'{folder}/table.md').strip() in out
    figures = set(os.listdir(f'{folder}/figures'))
    assert figures == {'figure2_reward_densities.png', 'figure3_outer_quantiles.png',
                       'training_curves.png'}
    for model, outputs in (('scalar', 1), ('scalar_centred', 1), ('quantile', 10)):
        run = f'{folder}/pairs-{model}'
        assert {'metrics.jsonl', 'predictions.npz', 'checkpoints', 'config.json', 'versions.json',
                'data_report.json', 'evaluation.json'} <= set(os.listdir(run))
        with np.load(f'{run}/predictions.npz') as file:
            assert file['chosen'].shape == file['rejected'].shape == (
                table['rows'][0]['n'], outputs)
            assert len(file['taus']) == outputs
            assert (file['chosen'] == file['quantiles'][file['pairs'][:, 0]]).all()


def test_nothing_is_lost_uncounted(results):
    folder, out = results
    report = json.loads(read(f'{folder}/pairs-scalar/data_report.json'))
    assert sum(split['read'] for split in report.values()) == 400
    for split in report.values():
        assert split['read'] == split['kept'] + sum(split['dropped'].values())
    dropped = {key: value for split in report.values() for key, value in split['dropped'].items()}
    assert dropped == {'malformed row': 1, 'identical responses': 1}
    assert sum(split['tied'] for split in report.values()) == 1
    assert '1: malformed row' in out


def test_reproduce_again_trains_nothing_and_finds_the_same(results, pairs):
    folder, _ = results
    before = read(f'{folder}/table.json')
    out, _ = command('reproduce', '--config=configs/demo.py', f'--workdir={folder}',
                     *overrides(**{'data.path': pairs, 'data.max_malformed': 0.01}))
    assert 'at step 4 of 4' in out
    assert read(f'{folder}/table.json') == before


def test_evaluate_on_other_data_takes_the_whole_file(results, tmp_path):
    folder, _ = results
    path = tmp_path / 'other.jsonl'
    path.write_text(''.join(
        json.dumps({'prompt': f'why {i}?', 'chosen': ' so.', 'rejected': ' or so.'}) + '\n'
        for i in range(7)))
    out, _ = command('evaluate', f'--workdir={folder}/pairs-scalar',
                     f'--config.data.path={path}')
    assert json.JSONDecoder().raw_decode(out[out.index('{'):])[0]['n'] == 7
    assert 'rate of 1.000 [no interval]' in ' '.join(out.split())  # too few to resample
    _, err = command('evaluate', f'--workdir={folder}/pairs-scalar', '--config.data.pth=x', code=2)
    assert 'error: config.data.pth: no such key, did you mean config.data.path?' in err
    out, _ = command('evaluate', f'--workdir={folder}/pairs-scalar')
    verdict = read(f'{folder}/pairs-scalar/verdict.txt')
    assert verdict.strip() in out
    assert 'There is none' in verdict  # a scalar has no spread
    diagnosis = json.loads(read(f'{folder}/pairs-scalar/diagnostics.json'))
    assert diagnosis['calibration']['temperature']['value'] > 0
    assert 'Does it read the prompt?' in verdict
    assert diagnosis['prompt']['pairs'] > 20
    assert os.path.exists(f'{folder}/pairs-scalar/figures/diagnostics.png')
    # Nothing may bring training rows into the test split, or seem to change the model.
    before = json.loads(read(f'{folder}/pairs-scalar/evaluation.json'))['metrics']
    relative = os.path.relpath(json.loads(read(f'{folder}/pairs-scalar/config.json'))
                               ['data']['path'], ROOT)
    command('evaluate', f'--workdir={folder}/pairs-scalar', f'--config.data.path={relative}')
    assert json.loads(read(f'{folder}/pairs-scalar/evaluation.json'))['metrics'] == before
    for change in ('data.test_fraction=0.5', 'head.name=quantile'):
        _, err = command('evaluate', f'--workdir={folder}/pairs-scalar', f'--config.{change}',
                         code=2)
        assert f'config.{change.split("=")[0]}: cannot be changed' in err


def test_evaluate_compares_candidates_with_references(results, tmp_path):
    folder, _ = results
    for name, answer in (('candidates', ' a good answer'), ('references', ' no idea.')):
        (tmp_path / f'{name}.jsonl').write_text(''.join(
            json.dumps({'prompt': f'why {i}?', 'response': answer}) + '\n' for i in range(40)))
    files = [f'--config.evaluation.{name}={tmp_path}/{name}.jsonl'
             for name in ('candidates', 'references')]
    out, _ = command('evaluate', f'--workdir={folder}/pairs-quantile', *files)
    found = json.loads(read(f'{folder}/pairs-quantile/win_rates.json'))
    assert f'win rate {found["win_rate"]["value"]:.3f}' in ' '.join(out.split())
    _, err = command('evaluate', f'--workdir={folder}/pairs-quantile', files[0], code=2)
    assert 'candidates and references, expected both or neither' in err


def test_evaluate_counts_rows_that_it_leaves_out(results, tmp_path):
    folder, _ = results
    path = tmp_path / 'other.jsonl'
    rows = [{'prompt': f'why {i}?', 'chosen': ' so.', 'rejected': ' or so.'} for i in range(9)]
    rows[2]['chosen'] = None
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    out, _ = command('evaluate', f'--workdir={folder}/pairs-scalar',
                     f'--config.data.path={path}', '--config.data.max_malformed=0.5')
    assert 'test: 9 read, 8 kept, 1 dropped' in out


def test_score_of_a_run_and_errors_of_score(results, pairs, tmp_path):
    folder, _ = results
    target = str(tmp_path / 'out.jsonl')
    _, err = command('score', f'--checkpoint={folder}/pairs-quantile', f'--input={pairs}',
                     f'--output={target}', code=2)
    assert f"{pairs}:8 id=7 field 'rejected': got null, expected text" in err
    good = tmp_path / 'good.jsonl'
    good.write_text('{"prompt": "a", "response": " b"}\n{"prompt": "a", "responses": ["c", "d"]}\n')
    command('score', f'--checkpoint={folder}/pairs-quantile', f'--input={good}',
            f'--output={target}', '--noappend_eos', '--max_length=20', '--row_length=16')
    rows = [json.loads(line) for line in read(target).splitlines()]
    assert [np.shape(row['quantiles']) for row in rows] == [(1, 10), (2, 10)]
    _, err = command('score', f'--checkpoint={folder}', f'--input={good}', f'--output={target}',
                     code=2)
    assert 'pairs-quantile' in err
    _, err = command('evaluate', f'--workdir={folder}', code=2)
    assert 'it holds the runs pairs-quantile, pairs-scalar' in err


@pytest.mark.parametrize(('flags', 'code', 'message'), [
    (['--config=configs/demo.py:helpful,quantil'], 2, "head.name='quantil', expected one of"),
    (['--config=configs/demo.py:useful,scalar'], 2, "'useful'"),
    (['--config=configs/demo.py', '--config.optimizer.learning_rat=1'], 2, 'learning_rate'),
    (['--config=configs/demo.py', 'config.optimizer.learning_rate=3'], 2, 'unexpected arguments'),
    (['--config=configs/demo.py', '--config.data.path=/no/such/folder'], 2, 'no such folder'),
    (['--config=configs/demo.py', '--config.data.path=none.jsonl'], 2, 'no such file'),
    (['--config=configs/hh.py:helpful,scalar', '--config.data.path=demo'], 2, 'openai-community'),
    (['--config=configs/none.py'], 2, 'configs/none.py'),
    ([], 2, '--config'),
    (['--config=configs/demo.py', '--config.model.sizes.num_heads=5'], 2,
     'not divisible by num_heads=5'),
    (['--config=configs/demo.py', '--config.data.demo.annotators=x'], 2, 'config.data.demo.annot'),
])
def test_bad_input_ends_in_one_clear_line(flags, code, message, tmp_path):
    out, err = command('train', *flags, f'--workdir={tmp_path}/run', code=code)
    assert message in out + err
