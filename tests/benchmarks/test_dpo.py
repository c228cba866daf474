"""DPO beside TRL's, for which a program stands in that writes what the worker would."""

import dataclasses
import json
import os

import numpy as np
import pytest

from benchmarks import dpo
from qrm.data.comparisons import Comparison, DataError
from qrm.models import weights
from qrm.training.schema import ConfigError
from tests.helpers import ROOT, WORDS, encoded, load_config, stub_python, word_pairs

STUB = """#!{python}
import json, runpy, sys
worker = runpy.run_path(sys.argv[1])
args = worker['parse'](sys.argv[2:])
assert (args.task, args.beta) == ('dpo', 0.1)
rows = worker['read'](args.training)
timed = rows[args.batch_size:]
json.dump({{
    'training': {{'seconds': worker['summary']([2.0] * args.repeats), 'dialogue_tokens': sum(
        len((row['prompt'] + row[side]).split()) + 1 for row in timed
        for side in ('chosen', 'rejected'))}},
    'versions': {{'trl': '0'}}, 'threads': 2, 'device': 'cpu',
}}, open(args.output, 'w'))
"""


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """Config keys of a model whose tokens are words, without a head, and of pairs."""
    keys = word_pairs(tmp_path_factory.mktemp('words'))
    path = os.path.join(keys['model.checkpoint'], 'model.safetensors')
    weights.write_file(path, {
        name: np.asarray(tensor) for name, tensor in weights.read_file(path).items()
        if name != 'score.weight'})
    own = {key: value for key, value in WORDS.items() if not key.startswith('speed')}
    return own | keys | {'data.overlong': 'drop'}


@pytest.fixture
def stub(tmp_path):
    return stub_python(tmp_path, STUB)


def test_both_take_the_same_steps(words, stub, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / 'out'
    folder.mkdir()
    out = dpo.compare(
        load_config('dpo', **words), str(folder), trl_python=stub, rounds=1, per_device=2, steps=2,
        config_args=['--config=configs/dpo.py',
                     *(f'--config.{key}={value}' for key, value in words.items())])
    with open(folder / 'benchmark_dpo.json', encoding='utf-8') as file:
        found = json.load(file)
    single, = found['rounds']
    # qrm and the stub count the tokens of the same texts.
    assert single['trl']['training']['dialogue_tokens'] == found['pairs']['dialogue_tokens']
    assert found['pairs']['packed_tokens'] < found['pairs']['dialogue_tokens']
    assert found['pairs']['pairs'] == 8
    assert len(single['qrm']['seconds']) == 2
    assert found['ratio']['repeats'] == [pytest.approx(2.0 / np.mean(single['qrm']['seconds']))]
    assert '8 pairs in 2 steps' in out


@pytest.mark.parametrize(('changes', 'message'), [
    ({'model.checkpoint': 'no/folder'}, "config.model.checkpoint='no/folder', expected a folder"),
    ({'data.max_length': 0}, 'config.data.max_length=0, expected a number of tokens'),
    ({'dpo.loss': 'ipo'}, "config.dpo.loss='ipo', expected 'dpo', as TRL is run"),
    ({'train.batch_size': 6}, 'config.train.batch_size=6, expected a multiple of --per_device=4'),
])
def test_what_trl_cannot_be_run_on(words, stub, changes, message):
    with pytest.raises(ConfigError, match=message):
        dpo.check(load_config('dpo', **words | changes), stub, 4)


@pytest.mark.parametrize('label', [0.5, 0.7, float('nan')])
def test_pairs_without_a_certain_label_are_not_timed(label):
    item = encoded('row 3', 2, (1, 1), preference=np.array([[0, label], [1 - label, 0]]))
    comparison = Comparison('row 3', 'p', (' a', ' b'), 'p')
    with pytest.raises(DataError, match='row 3: expected two responses, as texts, of which one is'):
        dpo.pair(item, comparison)
    certain = dataclasses.replace(item, preference=np.array([[0, 0], [1, 0]], np.float32))
    with pytest.raises(DataError, match='without a margin'):
        dpo.pair(dataclasses.replace(certain, margin=1.0), comparison)
    assert dpo.pair(certain, comparison) == {'prompt': 'p', 'chosen': ' b', 'rejected': ' a'}
