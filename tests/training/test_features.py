"""Training a head on kept features is training it on a frozen backbone, and computes that once."""

import dataclasses
import json
import os
import threading
import time

import jax
import numpy as np
import pytest

import qrm
from qrm.analysis import evaluate
from qrm.data.comparisons import DataError
from qrm.models.tuning import Tuning
from qrm.rewards import heads
from qrm.training import base as base_lib
from qrm.training import features, inference, reward_model, train, workdir
from qrm.training.base import restore_frozen
from qrm.training.checkpoints import Checkpoints
from qrm.training.features import Features
from qrm.training.interruptions import NonFiniteLoss
from qrm.training.workdir import WorkdirError
from tests.helpers import (
    TINY,
    load_config,
    network,
    random_comparisons,
    simulated,
    word_pairs,
)
from tests.programs import forks
from tests.training.test_train import annotator_rows, attribute_rows

SETTINGS = TINY | {
    'train.tune': 'head', 'model.initial_std': 1.0, 'train.max_steps': 9, 'train.log_every': 2,
    # Adam makes steps of mere rounding where a gradient is 0, unless eps is larger.
    'optimizer.eps': 1e-3}


def config(head='quantile', **kwargs):
    return load_config('demo', f'helpful,{head}', **SETTINGS | kwargs)


def last_params(folder):
    """Parameters of the last checkpoint, in one row."""
    with Checkpoints(folder, read_only=True) as checkpoints:
        _, saved = checkpoints.restore_params('last', reward_model.load(
            folder, step='last', keep='none').params)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(saved)])


def assert_same_run(folder, other, tolerance=1e-5):
    rows, expected = workdir.read_metrics(folder), workdir.read_metrics(other)
    assert [row.pop('split') for row in rows] == [row.pop('split') for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    np.testing.assert_allclose(last_params(folder), last_params(other), rtol=tolerance,
                               atol=tolerance)


def of_judgements(rows, tmp_path):
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return {'data.path': str(path), 'data.test_fraction': 0.3, 'data.validation_fraction': 0.3,
            'train.max_steps': 3, 'train.row_length': 64}


@pytest.mark.parametrize(('head', 'options', 'rows'), [
    ('scalar', {'head.reads': ('last', 'mean'), 'train.rows': 4}, None),
    ('quantile', {'loss.targets': 'teacher', 'loss.ema_decay': 0.9}, None),
    ('implicit_quantile', {}, None),
    ('gaussian', {'head.members': 3}, None),
    ('quantile', {'data.attributes': ('kind', 'true'), 'loss.quantile': 'ratings_pinball'},
     attribute_rows()),
    ('annotator', {}, annotator_rows()),
    ('scalar', {'model.family': 'modernbert', 'model.sizes.intermediate_size': 24,
                'head.reads': ('first',)}, None),
], ids=['reads', 'teacher', 'implicit', 'ensemble', 'attributes', 'annotators', 'encoder'])
def test_a_run_on_features_is_the_run_with_the_backbone_in_every_step(
        head, options, rows, tmp_path, monkeypatch):
    # Which levels are drawn depends on the micro-batch that a comparison is in.
    monkeypatch.setattr(heads, 'random_levels', lambda key, shape, n: np.broadcast_to(
        heads.taus(n), (*shape, n)))
    if rows:
        options = options | of_judgements(rows, tmp_path)
    own, folder, other = config(head, **options), str(tmp_path / 'own'), str(tmp_path / 'other')
    train.train(own, folder)
    monkeypatch.setattr(train, '_with_features', train._with_tokens)
    train.train(own, other)
    assert_same_run(folder, other)
    assert os.listdir(tmp_path / 'own' / 'features')
    assert not (tmp_path / 'other' / 'features').exists()


def test_a_run_on_features_stops_goes_on_and_moves_between_devices(tmp_path):
    """On one device; and three steps on eight of them, the rest on one."""
    whole, moved = str(tmp_path / 'whole'), str(tmp_path / 'moved')
    settings = ['train.tune=head', 'loss.targets=teacher']

    def run(devices, folder, stop):
        code, _, err = forks.run('tests.programs.on_devices', [folder, str(stop), *settings],
                                 simulated(devices))
        assert code == 0, err

    run(1, whole, 0)
    run(8, moved, 3)
    run(1, moved, 0)
    assert_same_run(moved, whole)


def test_loaded_scored_and_evaluated_models_are_those_of_features(tmp_path):
    folder = str(tmp_path)
    own = config(**{'train.max_steps': 4})
    train.train(own, folder)
    ordinary = qrm.load(folder)
    kept = reward_model.load(folder, keep=str(tmp_path / 'features'))
    assert ordinary.features is None
    assert set(ordinary.params) == {'backbone', 'head'}
    texts = ['\n\nHuman: why?\n\nAssistant:'], [[' so.', ' no.', ' so, so.']]
    np.testing.assert_allclose(kept.score(*texts).quantiles[0],
                               ordinary.score(*texts).quantiles[0], atol=1e-5)
    found = evaluate.evaluate(own, folder).predictions
    outputs = ordinary.predict(train.prepare(own, folder).encoded['test'])
    np.testing.assert_allclose(found.means, np.concatenate(outputs).mean(axis=1), atol=1e-5)


def test_diagnosis_of_a_head_takes_validation_features_from_the_run(tmp_path, monkeypatch):
    folder = str(tmp_path)
    own = config(**{'train.max_steps': 4})
    train.train(own, folder)
    computed = count_computed(monkeypatch)
    evaluate.diagnose(own, folder)
    assert computed == [150, 150]  # the test split, and that with prompts exchanged


def count_computed(monkeypatch):
    """Numbers of comparisons of all extractions from now on."""
    computed, compute = [], inference.features

    def counted(network, params, encoded, **kwargs):
        computed.append(len(encoded))
        return compute(network, params, encoded, **kwargs)

    monkeypatch.setattr(inference, 'features', counted)
    return computed


# The files.


ITEMS = random_comparisons(20, seed=3)


def random_base(seed):
    return base_lib.find('', seed, 'float32', frozen=True)


def kept(folder, **kwargs):
    net = network(layers=1, tuning=Tuning('head'))
    return dataclasses.replace(
        Features(net, random_base(0), str(folder), row_length=24, rows=2), **kwargs)


@pytest.fixture(scope='module')
def expected():
    """Features [K, W] of the items."""
    some = kept('unused')
    return [one for chunk in inference.features(
        some.network, restore_frozen(some.network, some.base), ITEMS, row_length=24, rows=2)
        for one in chunk]


def assert_features(found, expected):
    for item, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(item.features, wanted, atol=1e-5)


def the_folder(folder):
    name, = os.listdir(folder)
    return folder / name


def test_nothing_is_computed_twice(expected, tmp_path, monkeypatch):
    computed = count_computed(monkeypatch)
    assert_features(kept(tmp_path).of(ITEMS[:6]), expected[:6])
    found = kept(tmp_path).of([*ITEMS, *ITEMS])
    assert_features(found[:20], expected)
    assert_features(found[20:], expected)
    kept(tmp_path).of(ITEMS[::-1])
    assert computed == [6, 14]
    assert kept(tmp_path).of([]) == []


def test_what_differs_from_token_to_backbone_is_computed_anew(tmp_path, monkeypatch):
    computed = count_computed(monkeypatch)
    first = kept(tmp_path)
    base, net, item = first.base, first.network, ITEMS[0]

    def head(**kwargs):
        return {'network': dataclasses.replace(net, head=dataclasses.replace(net.head, **kwargs))}

    first.of(ITEMS[:1])
    for same in (head(name='scalar'), head(members=2), {'rows': 1, 'row_length': 32}):
        kept(tmp_path, **same).of(ITEMS[:1])
    other = dataclasses.replace(item, preference=item.preference * 0.5, weight=2.0, id='other')
    first.of([other])
    assert len(computed) == 1
    for number, different in enumerate((
            head(reads=('last', 'dialogue')),
            {'network': dataclasses.replace(net, dtype='bfloat16')},
            {'base': random_base(1)},
            {'base': dataclasses.replace(base, dtype='bfloat16')}), start=2):
        kept(tmp_path, **different).of(ITEMS[:1])
        assert len(computed) == number
    # The last token of the first two heads, the dialogue, and three others' last token.
    assert len(os.listdir(tmp_path)) == 5
    longer = dataclasses.replace(item, responses=(*item.responses[:-1],
                                                  np.r_[item.responses[-1], 7].astype(np.int32)))
    first.of([longer])
    assert len(computed) == 6


def test_heads_share_the_reads_that_they_have_in_common(tmp_path, monkeypatch):
    first = kept(tmp_path)

    def reading(*reads):
        head = dataclasses.replace(first.network.head, reads=reads)
        return kept(tmp_path, network=dataclasses.replace(first.network, head=head))

    direct = dataclasses.replace(reading('dialogue', 'last'), folder=None).of(ITEMS)
    computed = count_computed(monkeypatch)
    first.of(ITEMS[:4])
    assert_features(reading('last', 'dialogue').of(ITEMS[:4]),
                    [np.roll(item.features, 16, axis=1) for item in direct[:4]])
    assert_features(reading('dialogue', 'last').of(ITEMS), [item.features for item in direct])
    assert computed == [4, 4, 16]  # the dialogue of four, both of the others
    # Where its prompt ends tells two of them apart for what is read after it, not for the rest.
    sized = [dataclasses.replace(item, prompt_sizes=(1,) * len(item.responses)) for item in ITEMS]
    for items in (ITEMS[::-1], sized):
        for reads in (('last',), ('dialogue',), ('last', 'dialogue')):
            reading(*reads).of(items)
    assert computed == [4, 4, 16]
    assert len(os.listdir(tmp_path)) == 2
    for sizes in (0, 1):
        items = [dataclasses.replace(item, prompt_sizes=(sizes,) * len(item.responses))
                 for item in ITEMS]
        reading('last', 'mean').of(items)
    assert computed == [4, 4, 16, 20, 20]
    assert len(os.listdir(tmp_path)) == 3


def test_an_extraction_that_was_killed_goes_on_where_it_stopped(expected, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, '_FEW', 2)  # chunks of four comparisons
    compute = inference.features

    def cut(*args, **kwargs):
        for number, chunk in enumerate(compute(*args, **kwargs)):
            if number == 2:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(inference, 'features', cut)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path).of(ITEMS)
    folder = the_folder(tmp_path)
    for name in ('features.f32', 'index'):  # as a kill in the middle of a write leaves them
        with open(folder / name, 'ab') as file:
            file.write(b'0123456789')
    monkeypatch.setattr(inference, 'features', compute)
    computed = count_computed(monkeypatch)
    assert_features(kept(tmp_path).of(ITEMS), expected)
    assert computed == [12]
    assert_features(kept(tmp_path).of(ITEMS), expected)
    assert os.path.getsize(folder / 'features.f32') == sum(x.nbytes for x in expected)


@pytest.mark.parametrize(('name', 'damage', 'message'), [
    ('features.f32', lambda text: text[:-1], 'features.f32: 127 bytes, expected 128 for 2 resp'),
    ('index', lambda text: b'x' + text, 'index: line 1 is none, or a line is'),
    ('features.f32', lambda text: text[:-4] + bytes(4), 'features.f32: rows 0 to 1 are not those'),
    ('about.json', lambda text: text.replace(b'last', b'first'), 'about.json: does not say what'),
    ('about.json', lambda text: text[:-3], 'about.json: not JSON'),
])
def test_damaged_files_are_refused_in_a_line(name, damage, message, tmp_path):
    item = next(item for item in ITEMS if len(item.responses) == 2)
    kept(tmp_path).of([item])
    path = the_folder(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WorkdirError) as error:
        kept(tmp_path).of([item])
    assert message in str(error.value)
    assert str(the_folder(tmp_path)) in str(error.value)
    assert '\n' not in str(error.value)


def test_a_line_that_is_lost_from_the_index_is_noticed(tmp_path):
    kept(tmp_path).of(ITEMS)
    path = the_folder(tmp_path) / 'index'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join(lines[:3] + lines[4:]))
    with pytest.raises(WorkdirError, match='index: line 4 is none, or a line is missing before it'):
        kept(tmp_path).of(ITEMS)


def test_an_index_that_cannot_be_read_is_named(tmp_path):
    kept(tmp_path).of(ITEMS)
    (the_folder(tmp_path) / 'index').unlink()
    (the_folder(tmp_path) / 'index').mkdir()
    with pytest.raises(WorkdirError, match=r'index: cannot be read \(Is a directory\); delete'):
        kept(tmp_path).of(ITEMS)


def test_a_second_process_waits_for_the_first_and_computes_the_rest(tmp_path, monkeypatch, capsys):
    first = kept(tmp_path)
    first.of(ITEMS[:1])
    computed = count_computed(monkeypatch)
    with workdir.lock(str(the_folder(tmp_path))):
        second = threading.Thread(target=first.of, args=(ITEMS[:3],))
        second.start()
        said = ''
        while 'waiting for another process' not in said:
            assert second.is_alive()
            time.sleep(0.01)
            said += capsys.readouterr().out
        assert computed == []
    second.join()
    assert computed == [2]


def test_hidden_states_that_are_not_finite_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, 'features', lambda network, params, items, **kwargs: iter(
        [[np.full((len(item.responses), 16), np.nan, np.float32) for item in items]]))
    with pytest.raises(NonFiniteLoss, match='0: hidden states that are not finite'):
        kept(tmp_path).of(ITEMS[:2])
    assert os.path.getsize(the_folder(tmp_path) / 'index') == 0


def test_a_folder_that_cannot_be_written_into_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(WorkdirError, match='no folder to write into'):
        kept(tmp_path / 'file').of(ITEMS[:1])


def test_a_checkpoint_is_read_for_what_is_not_kept_only(tmp_path, monkeypatch):
    words = word_pairs(tmp_path)
    own = load_config('hh', 'helpful,scalar', **words | {
        'train.tune': 'head', 'train.features': str(tmp_path / 'features'), 'train.max_steps': 2,
        'train.batch_size': 4, 'train.row_length': 24, 'train.rows': 2, 'data.max_length': 24,
        'data.test_fraction': 0.2, 'data.validation_fraction': 0.2})
    reads, restore = [], features.restore_frozen
    monkeypatch.setattr(features, 'restore_frozen', lambda *args: reads.append(1) or restore(*args))
    for name in ('one', 'two'):
        train.train(own, str(tmp_path / name))
    assert len(reads) == 1
    evaluate.evaluate(own, str(tmp_path / 'one'))
    assert len(reads) == 2  # for the test split
    evaluate.evaluate(own, str(tmp_path / 'two'))
    assert len(reads) == 2
    path = tmp_path / 'checkpoint' / 'config.json'
    path.write_text(path.read_text() + '\n')
    with pytest.raises(DataError, match='weights that training starts from are not those'):
        train.train(own, str(tmp_path / 'one'))
    with pytest.raises(WorkdirError, match='other weights than those the run was trained on'):
        qrm.load(str(tmp_path / 'one'))
