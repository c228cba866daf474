"""Runs resume where they stopped, and refuse to go on with something else."""

import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import qrm
from qrm.analysis import evaluate
from qrm.data import packing, tables, tokens
from qrm.data.comparisons import DataError
from qrm.data.encoded import fingerprint
from qrm.training import config as config_lib
from qrm.training import inputs, interruptions, loop, step, train, workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.devices import Spread
from qrm.training.schema import ConfigError
from tests.helpers import ROOT, TINY, WORDS, load_config, random_comparisons, word_pairs

# With dropout and a teacher, so that all there can be of state has to be restored.
OVERRIDES = TINY | {'model.dropout': 0.1, 'train.max_steps': 14, 'train.keep': 1,
                    'train.log_every': 2, 'loss.targets': 'teacher', 'loss.ema_decay': 0.9}


def config(**kwargs):
    return load_config('demo', 'helpful,quantile', **OVERRIDES | kwargs)


def final_state(folder):
    """Every array of the last checkpoint, its step, and the best step."""
    prepared = train.prepare(load_config('demo', 'helpful,quantile', **OVERRIDES), folder)
    optimizer = step.make_optimizer(config().optimizer, 14)
    state = step.init_state(prepared.model.params, optimizer, 0, teacher=True)
    with Checkpoints(folder, read_only=True) as checkpoints:
        last, best = checkpoints.latest, checkpoints.best
        params, rest, _ = checkpoints.restore(last, state.params, state._replace(params=None))
    return [np.asarray(x) for x in jax.tree.leaves((params, rest))], last, best


def assert_same_end(folder, reference):
    leaves, last, best = final_state(folder)
    expected, expected_last, expected_best = final_state(reference)
    assert (last, best) == (expected_last, expected_best)
    for a, b in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert workdir.read_metrics(folder) == workdir.read_metrics(reference)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('uninterrupted'))
    train.train(config(), folder)
    return folder


def test_a_run_leaves_its_records(uninterrupted):
    rows = workdir.read_metrics(uninterrupted)
    assert [r['step'] for r in rows if r['split'] == 'train'] == list(range(1, 15))
    assert [r['step'] for r in rows if r['split'] == 'validation'] == [5, 10, 14]
    report = workdir.read_json(os.path.join(uninterrupted, 'data_report.json'))
    assert report['train']['read'] == report['train']['kept'] > 0
    assert report['train']['read'] + report['validation']['read'] == 300
    saved = workdir.read_json(os.path.join(uninterrupted, 'config.json'))
    assert saved == json.loads(config().to_json())
    assert 'jax' in workdir.read_json(os.path.join(uninterrupted, 'versions.json'))['packages']
    _, last, best = final_state(uninterrupted)
    validation = {r['step']: r['nll'] for r in rows if r['split'] == 'validation'}
    assert last == 14
    assert validation[best] == min(validation.values())


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    before = workdir.read_metrics(uninterrupted)
    train.train(config(), uninterrupted)
    assert workdir.read_metrics(uninterrupted) == before


def test_runs_that_differ_in_seeds_and_data_share_their_step(tmp_path, monkeypatch):
    """It is traced once for them."""
    traced, plain = [], step.make_train_step

    def counted(*args):
        train_step = plain(*args)
        return lambda *given, **kw: (traced.append(1), train_step(*given, **kw))[1]

    monkeypatch.setattr(step, 'make_train_step', counted)

    def final(name, **changes):
        own = config(**{'train.max_steps': 2, 'optimizer.learning_rate': 0.0123} | changes)
        train.train(own, str(tmp_path / name))
        return workdir.read_metrics(tmp_path / name)

    first = final('first')
    other = final('other', **{'seed': 1, 'data.demo.seed': 1})
    assert traced == [1]
    assert first[0]['loss'] != other[0]['loss']
    assert final('again') == first
    assert traced == [1]
    final('rate', **{'optimizer.learning_rate': 0.0124})
    assert traced == [1, 1]


def test_sigterm_saves_and_the_rerun_ends_bit_for_bit(uninterrupted, tmp_path, monkeypatch):
    folder = str(tmp_path)
    make_batch = packing.make_batch
    calls = []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(*args)

    monkeypatch.setattr(packing, 'make_batch', interrupt)
    with pytest.raises(interruptions.Interrupted, match='SIGTERM: saved .* at step 8 of 14'):
        train.train(config(), folder)
    assert [r['step'] for r in workdir.read_metrics(folder) if r['split'] == 'train'][-1] == 8
    monkeypatch.setattr(packing, 'make_batch', make_batch)
    train.train(config(), folder)
    assert_same_end(folder, uninterrupted)


def test_kill_at_any_moment_and_the_rerun_ends_bit_for_bit(uninterrupted, tmp_path):
    """Two kills of the real command: while it starts or trains, and after a first checkpoint."""
    folder = str(tmp_path)
    command = [sys.executable, '-m', 'experiments.train',
               '--config=configs/demo.py:helpful,quantile', f'--workdir={folder}',
               *(f'--config.{key}={value}' for key, value in OVERRIDES.items())]
    for steps in (1, 6):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while len(workdir.read_metrics(folder)) < steps and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        with open(os.path.join(folder, 'metrics.jsonl'), 'a', encoding='utf-8') as file:
            file.write('{"step": 3, "spl')  # as a kill in the middle of a write leaves it
    train.train(config(), folder)
    assert_same_end(folder, uninterrupted)


def test_another_config_is_refused_by_key(uninterrupted):
    with pytest.raises(workdir.WorkdirError) as error:
        train.train(config(**{'optimizer.learning_rate': 0.5, 'loss.kappa': 0.1}), uninterrupted)
    assert 'config.optimizer.learning_rate: 0.002 -> 0.5' in str(error.value)
    assert 'config.loss.kappa: 1.0 -> 0.1' in str(error.value)
    assert str(error.value).count('\n') == 2
    train.train(config(**{'train.log_every': 3, 'analysis.level': 0.9}), uninterrupted)


def test_other_data_under_the_same_name_are_refused(tmp_path):
    path, folder = tmp_path / 'pairs.jsonl', str(tmp_path / 'run')
    rows = [{'prompt': f'question {i}', 'chosen': f' good {i}', 'rejected': f' bad {i}'}
            for i in range(40)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    own = config(**{'data.path': str(path), 'train.max_steps': 2})
    train.train(own, folder)
    rows[3]['chosen'] = ' other'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    with pytest.raises(DataError, match='not those this run started with'):
        train.train(own, folder)


def test_a_start_that_failed_does_not_claim_the_folder(uninterrupted, tmp_path):
    folder = str(tmp_path)
    with pytest.raises(DataError, match='no such file'):
        train.train(config(**{'data.path': 'none.jsonl'}), folder)
    train.train(config(), folder)
    assert_same_end(folder, uninterrupted)


def test_a_run_without_a_checkpoint_gives_way_to_another(tmp_path, monkeypatch):
    """One that ran out of memory in its first step, say, must not keep a smaller one out."""
    folder = str(tmp_path)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(step, 'init_state', fail)
    with pytest.raises(MemoryError):
        train.train(config(**{'model.sizes.vocab_size': 280}), folder)
    assert (tmp_path / 'config.json').exists()
    monkeypatch.undo()
    train.train(config(**{'train.max_steps': 2}), folder)
    assert len(qrm.load(folder).tokenizer) == 300
    with pytest.raises(workdir.WorkdirError, match='vocab_size: 300 -> 280'):
        train.train(config(**{'train.max_steps': 2, 'model.sizes.vocab_size': 280}), folder)


def test_a_tokenizer_half_written_by_a_kill_is_written_again(uninterrupted, tmp_path):
    folder = str(tmp_path)
    os.makedirs(os.path.join(folder, 'tokenizer.tmp'))
    train.train(config(), folder)
    assert_same_end(folder, uninterrupted)
    assert not os.path.exists(os.path.join(folder, 'tokenizer.tmp'))


@pytest.mark.parametrize('split', ['train', 'test'])
def test_splits_without_a_preferred_response_are_refused_before_training(split, tmp_path):
    for name in ('train', 'test'):
        rows = [{'prompt': f'{name} {i}', 'chosen': ' a', 'rejected': ' b',
                 'preference': 0.5 if name == split else 1.0} for i in range(50)]
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    with pytest.raises(DataError, match=f'no comparison with a preferred .* in the {split} split'):
        train.train(config(**{'data.path': str(tmp_path)}), str(tmp_path / 'run'))


def test_a_signal_that_was_swallowed_before_training_ends_it_after_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(interruptions, '_before_training', [])
    with pytest.raises(interruptions.Interrupted, match='SIGTERM: stopped; run the same command'):
        interruptions.stop(signal.SIGTERM, None)
    with pytest.raises(interruptions.Interrupted, match='SIGTERM: stopped; run the same command'):
        interruptions.check()
    with interruptions.Signals() as signals:
        interruptions.check()  # it will be served after a step
        assert signals.received == 'SIGTERM'
    assert not issubclass(interruptions.Interrupted, Exception)  # which libraries catch
    with pytest.raises(interruptions.Interrupted, match='SIGTERM: saved .* at step 1 of 14'):
        train.train(config(), str(tmp_path))


def test_tensorboard_must_be_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboardX', None)
    with pytest.raises(ConfigError, match=r'config.train.tensorboard=True needs tensorboardX: pip'):
        train.train(config(**{'train.tensorboard': True}), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_workdir_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'x'):
        with pytest.raises(workdir.WorkdirError, match=f'{folder}: no folder to write into'):
            train.train(config(), str(folder))


def test_a_folder_in_use_is_refused(tmp_path):
    with (workdir.lock(str(tmp_path)),
          pytest.raises(workdir.WorkdirError, match='another process')):
        train.train(config(), str(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path):
    own = config(**{'optimizer.name': 'sgd', 'optimizer.learning_rate': 1e25,
                    'optimizer.clip_norm': 0.0, 'train.checkpoint_every': 1})
    with pytest.raises(interruptions.NonFiniteLoss, match=r'step \d+ gave .* helpful/train/\d+'):
        train.train(own, str(tmp_path))
    assert all(np.isfinite(row['loss']) for row in workdir.read_metrics(str(tmp_path))
               if row['split'] == 'train')


def test_positions_and_vocabulary_are_checked_before_training():
    with pytest.raises(DataError, match='config.data.max_length=300, but the model has 128'):
        train.prepare(config(**{'data.max_length': 300}))


@pytest.mark.parametrize(('key', 'value', 'message'), [
    ('loss.kappa', 0.0, 'config.loss.kappa=0.0, expected a number above 0'),
    ('loss.kappa', -1.0, 'config.loss.kappa=-1.0'),
    ('optimizer.learning_rate', float('nan'), 'config.optimizer.learning_rate=nan'),
    ('head.num_quantiles', 0, 'config.head.num_quantiles=0'),
    ('head.name', 'quantil', "config.head.name='quantil', expected one of"),
    ('loss.quantile', 'pinball', 'config.loss.quantile=\'pinball\', expected one of'),
    ('optimizer.schedule', 'step', 'config.optimizer.schedule'),
    ('data.overlong', 'cut', 'config.data.overlong'),
    ('train.batch_size', 0, 'config.train.batch_size=0'),
    ('model.dtype', 'float16', 'config.model.dtype'),
])
def test_values_out_of_range_are_named(key, value, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        train.train(config(**{key: value}), str(tmp_path / 'run'))
    assert message in str(error.value)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('options', [
    {'head.name': 'monotone_quantile', 'train.rows': 4,  # two shapes of micro-batches
     'model.dtype': 'bfloat16', 'data.overlong': 'drop', 'data.max_length': 90},
    {'loss.targets': 'margin', 'loss.lm_weight': 0.5, 'model.remat': True,
     'optimizer.name': 'sgd', 'train.row_length': 64, 'data.max_length': 0},
    {'head.name': 'scalar', 'data.append_eos': False, 'optimizer.schedule': 'inverse_sqrt',
     'train.tensorboard': True, 'data.demo.annotators': 'shared'},
    {'model.family': 'qwen3', 'model.sizes.intermediate_size': 24, 'model.initial_std': 1.0,
     'model.sizes.num_kv_heads': 1, 'model.sizes.head_dim': 6, 'head.reads': ('last', 'mean')},
    {'model.family': 'modernbert', 'model.sizes.intermediate_size': 24, 'head.reads': ('first',)},
])
def test_options_train_and_load(options, tmp_path):
    folder = str(tmp_path)
    train.train(config(**options | {'train.max_steps': 3}), folder)
    rows = [r for r in workdir.read_metrics(folder) if r['split'] == 'train']
    assert len(rows) == 3
    assert all(r['gradient_norm'] > 0 for r in rows)
    loaded = qrm.load(folder)
    assert loaded.reading.append_eos == options.get('data.append_eos', True)
    assert loaded.network.dtype == 'float32'  # scores do not depend on neighbours, see `load`
    quantiles = loaded.score(['\n\nHuman: why?\n\nAssistant:'], [[' so.', ' no.']]).quantiles[0]
    assert quantiles.shape == (2, len(loaded.taus))
    if options.get('head.name') == 'monotone_quantile':
        assert (np.diff(quantiles, axis=1) > 0).all()
    if options.get('data.overlong') == 'drop':
        report = workdir.read_json(os.path.join(folder, 'data_report.json'))['train']
        assert report['dropped']['a dialogue is longer than 90 tokens'] > 0
        assert report['read'] == report['kept'] + sum(report['dropped'].values())
    assert (tmp_path / 'tensorboard').exists() == options.get('train.tensorboard', False)


def test_a_run_over_midnight_goes_on_with_its_own_day(tmp_path, monkeypatch):
    """A chat template that prints the day makes other tokens on the next one."""
    keys = word_pairs(tmp_path)
    folder = keys['model.checkpoint']
    tokenizer = tokens.load_tokenizer(folder)
    tokenizer.chat_template = ("{{ strftime_now('w%d') }}{% for m in messages %} {{ m['content'] }}"
                               '{% endfor %}')
    tokens.save_tokenizer(tokenizer, folder)
    rows = [json.loads(line) for line in (tmp_path / 'pairs.jsonl').read_text().splitlines()]
    for row in rows:
        row['prompt'] = [{'role': 'user', 'content': row['prompt']}]
    (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    words = {key: value for key, value in WORDS.items() if not key.startswith('speed')}
    own = load_config('hh', 'helpful,scalar', **words | keys | {'train.max_steps': 2})

    def at(day):
        monkeypatch.setattr(inputs, '_common_time', lambda: datetime.datetime(2026, 11, day))
        return fingerprint(train.read_data(own, str(tmp_path / 'run')).encoded['train'])

    assert at(27) != at(28)
    first = at(27)
    train.train(own, str(tmp_path / 'run'))
    assert at(28) == first
    train.train(own, str(tmp_path / 'run'))
    assert 'w27' in qrm.load(str(tmp_path / 'run')).tokenizer.chat_template


# Other judgements than pairs of demo dialogues, from JSON Lines files to scores. All rows have more
# than 16 tokens: with rows of 64 there is one layout to compile.


def question(i):
    return f'Question number {i} of many: what (if anything) do you make of {i}?'


def attribute_rows():
    """Ratings of two attributes, some missing, of single responses; and some preferences."""
    rows = [{'prompt': question(i), 'response': f' it is {"xyz"[i % 3]} {i}.', 'source': 'web',
             'kind': i % 3 if i % 4 else None, 'true': 2 - i % 3 if i % 5 else None}
            for i in range(60)]
    rows += [{'prompt': question(-i), 'responses': [f' x {i}', f' y {i}'],
              'preferred': 0, 'kind': [i % 2, None] if i % 3 else None} for i in range(1, 30)]
    return rows


def rating_rows():
    return [{'prompt': question(i), 'response': f' it is {"xyz"[i % 3]} {i}.',
             'rating': i % 3 - 1} for i in range(60)]


def ranking_rows():
    return [{'prompt': question(i), 'responses': [f' {a} {i}' for a in 'xyz'[:2 + i % 2]],
             'ranks': list(range(2 + i % 2))} for i in range(60)]


def annotator_rows():
    rows = [{'prompt': question(i), 'chosen': f' x {i}', 'rejected': f' y {i}',
             'annotator': f'annotator {i % 3}'} for i in range(60)]
    rows += [{'prompt': question(-i), 'response': f' x {i}', 'rating': i % 2,
              'annotator': i % 3} for i in range(1, 30)]
    return [*rows, {'prompt': question('this'), 'chosen': ' a', 'rejected': ' b'}]


@pytest.mark.parametrize(('rows', 'options', 'criterion'), [
    (attribute_rows(), {'data.attributes': ('kind', 'true'), 'loss.quantile': 'ratings_pinball'},
     'crps'),
    (rating_rows(), {'head.name': 'gaussian', 'loss.gaussian': 'ratings_crps'}, 'crps'),
    (ranking_rows(), {'head.name': 'scalar', 'loss.scalar': 'plackett_luce'}, 'nll'),
    (annotator_rows(), {'head.name': 'annotator'}, 'nll'),
], ids=['attributes', 'ratings', 'rankings', 'annotators'])
def test_judgements_of_files_train_evaluate_and_score(rows, options, criterion, tmp_path):
    path, folder = tmp_path / 'rows.jsonl', str(tmp_path / 'run')
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    own = config(**options | {
        'data.path': str(path), 'data.test_fraction': 0.3, 'data.validation_fraction': 0.3,
        'train.max_steps': 3, 'train.rows': 1, 'train.row_length': 64, 'model.dropout': 0.0,
        'optimizer.name': 'sgd', 'loss.targets': 'label'})
    train.train(own, folder)
    metrics = workdir.read_metrics(folder)
    assert all(np.isfinite(row[key]) for row in metrics for key in row if key != 'split')
    # Ratings alone have no accuracy.
    assert all(('accuracy' in row) == (row['pairs'] > 0) for row in metrics
               if row['split'] == 'train')
    assert any('accuracy' in row for row in metrics) == (rows != rating_rows())
    assert criterion in metrics[-1]
    reports = workdir.read_json(os.path.join(folder, 'data_report.json'))
    assert sum(report['read'] for report in reports.values()) == len(rows)
    for report in reports.values():
        assert report['read'] == report['kept'] + sum(report['dropped'].values())
    # The config that is read back is the same, tuples of names included.
    found = evaluate.evaluate(workdir.load_config(folder), folder)
    assert criterion in found.metrics
    assert found.report.kept == len(found.predictions.comparison_ids)
    model = qrm.load(folder)
    assert model.loss == config_lib.loss_config(own)
    assert model.network.head.attributes == options.get('data.attributes', ())
    names = {str(row.get('annotator')) for row in rows} - {'None'}
    assert model.network.head.annotators == tuple(sorted(names))
    gated = model.network.head.gated
    if gated:  # with weights far from the equal ones that it starts with
        gate = jax.random.normal(jax.random.key(0), model.params['head']['gate'].shape)
        model = dataclasses.replace(
            model, params=model.params | {'head': model.params['head'] | {'gate': gate}})
    scores = model.score([question(1), question(2)], [' it is x', [' y 3', ' z', ' y']])
    assert scores.quantiles[1].shape == (3, len(model.taus))
    assert np.isfinite(scores.rewards[1]).all()
    if gated:  # what the gate reads does not depend on what else is scored
        alone = model.score([question(2)], [' z'])
        np.testing.assert_allclose(scores.rewards[1][1], alone.rewards[0], atol=1e-5)
        np.testing.assert_allclose(scores.quantiles[1][1], alone.quantiles[0], atol=1e-5)


# Data that are kept.


def _contents(data):
    """All that a run takes of its data."""
    train_items = data.encoded['train']
    layouts = packing.plan_layouts(train_items, row_length=24, rows=2)
    batch = packing.make_batch(train_items[:8], layouts, 8)
    return {
        'fingerprint': fingerprint(train_items, data.encoded['validation']),
        'tests': fingerprint(data.encoded['test']),
        'names': {split: [(item.id, item.group) for item in items]
                  for split, items in data.encoded.items()},
        'batch': [array.tobytes() for stack in batch
                  for array in (stack.count, *stack.micro_batches)],
        'reports': [json.dumps(report.as_dict()) for report in data.reports.values()],
        'seen': data.seen}


@pytest.fixture
def keeping(tmp_path, monkeypatch):
    """Reads data that are kept; what was read, and how many splits were tokenised for it."""
    keys = word_pairs(tmp_path) | {'data.max_length': 24, 'data.cache': str(tmp_path / 'kept')}
    rows = (tmp_path / 'pairs.jsonl').read_text().splitlines()
    # Rows that are noted, cut, dropped and refused.
    more = [rows[3], '{"chosen": 1}', json.dumps(json.loads(rows[4]) | {'note': 1, 'id': 'x'}),
            json.dumps({'chosen': 'w1 w2', 'rejected': 'w1 w2'}),
            json.dumps({'prompt': 'w5', 'chosen': 'w1 ' * 30, 'rejected': 'w2'})]
    (tmp_path / 'pairs.jsonl').write_text('\n'.join([*rows, *more]))
    made, whole = [], tokens._encode_all
    monkeypatch.setattr(tokens, '_encode_all', lambda *args: made.append(1) or whole(*args))

    def read(**changes):
        made.clear()
        own = load_config('hh', '', **keys | {'data.max_malformed': 0.1} | changes)
        return _contents(train.read_data(own)), len(made)

    return read


def test_data_are_the_same_whether_they_are_kept_or_not(keeping, tmp_path, capsys):
    expected, made = keeping(**{'data.cache': ''})
    assert made == 3
    reports = ' '.join(expected['reports'])
    for told in ('malformed row', 'repeats an earlier row', "key 'note' not used", 'identical',
                 'longer than 24 tokens'):
        assert told in reports
    assert keeping() == (expected, 3)
    assert keeping() == (expected, 0)
    for path in (tmp_path / 'kept' / 'tokens').glob('*/tokens.arrow'):
        path.write_bytes(path.read_bytes()[:-9])
    capsys.readouterr()
    assert keeping() == (expected, 3)
    assert capsys.readouterr().out.count('tokens.arrow: not what was written; made anew') == 3
    assert keeping() == (expected, 0)


@pytest.mark.parametrize('change', ['max_length', 'overlong', 'template', 'tokenizer', 'content',
                                    'fraction', 'code'])
def test_data_that_depend_on_something_else_are_made_anew(change, keeping, tmp_path, monkeypatch):
    keeping()
    changes = {'max_length': {'data.max_length': 20}, 'overlong': {'data.overlong': 'drop'},
               'template': {'model.chat_template': '{{ messages }}'},
               'fraction': {'data.test_fraction': 0.3}}.get(change, {})
    if change == 'tokenizer':
        path = tmp_path / 'checkpoint' / 'tokenizer.json'
        path.write_text(path.read_text().replace('"w7"', '"W7"'))
    if change == 'content':
        path = tmp_path / 'pairs.jsonl'
        path.write_text(path.read_text().replace('w9 ', 'w8 ', 1))
    if change == 'code':
        monkeypatch.setattr(tables, '_code', lambda: 'other')
    found, made = keeping(**changes)
    assert made >= 2
    assert keeping(**changes, **{'data.cache': ''})[0] == found


def test_a_pairwise_run_is_the_same_from_what_is_kept(tmp_path, monkeypatch):
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in ranking_rows()))
    made, whole = [], tokens._encode_all
    monkeypatch.setattr(tokens, '_encode_all', lambda *args: made.append(1) or whole(*args))

    def run(name, cache):
        folder = str(tmp_path / name)
        train.train(config(**{
            'head.name': 'pairwise', 'data.path': str(path), 'data.cache': cache,
            'data.test_fraction': 0.3, 'data.validation_fraction': 0.3, 'train.max_steps': 3,
            'train.rows': 1, 'train.row_length': 128, 'loss.targets': 'label'}), folder)
        found = evaluate.evaluate(workdir.load_config(folder), folder)
        return workdir.read_metrics(folder), found.predictions, found.metrics

    (losses, predictions, metrics), *others = [
        run(name, cache) for name, cache in (
            ('without', ''), ('first', str(tmp_path / 'kept')), ('second', str(tmp_path / 'kept')))]
    assert len(made) == 4 + 3  # without, test comparisons are read once more to be judged
    assert predictions.pairwise
    for found in others:
        assert (found[0], found[2]) == (losses, metrics)
        for name, array in found[1]._asdict().items():
            np.testing.assert_array_equal(array, getattr(predictions, name))


def test_a_process_reads_only_the_comparisons_of_its_devices(monkeypatch):
    class Items(list):
        def __getitem__(self, i):
            read.append(int(i))
            return super().__getitem__(i)

    items, read = Items(random_comparisons(40, seed=1)), []
    monkeypatch.setattr(Spread, 'shares', 4)
    config = load_config('demo', **{'train.batch_size': 12})
    source = loop.Examples(config, items, list, Spread())
    found = []
    for own in ([0, 1], [2, 3]):
        monkeypatch.setattr(Spread, 'own', own)
        read.clear()
        assert [len(part) for part in source.feed(0, dict).batches] == [3, 3]
        assert len(read) == 6
        found += read
    places = packing.batch_indices(0, seed=0, examples=40, batch_size=12, total=80)
    assert sorted(found) == sorted(places.tolist())
