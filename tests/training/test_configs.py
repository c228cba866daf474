"""Config files are complete, locked, commented, and every key is read."""

import itertools
import json
import math
import re

import pytest
from ml_collections import ConfigDict

from qrm.analysis import evaluate
from qrm.training import config as config_lib
from qrm.training import train
from qrm.training.workdir import _flatten
from tests.helpers import ROOT, load_config

NAMES = ('demo', 'hh', 'moss', 'benchmark', 'compare')
WORLDS = tuple(path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem not in NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_configs_are_valid_locked_and_hold_the_same_keys(name):
    config = load_config(name)
    config_lib.check(config)
    assert config.is_locked
    keys, expected = (dict(_flatten(c.to_dict())).keys() for c in (config, load_config('demo')))
    own = {key for key in keys if key.split('.')[0] == name}
    assert keys - own == expected
    assert bool(own) == (name in ('benchmark', 'compare'))
    json.loads(config.to_json())


@pytest.mark.parametrize(('expected', 'inside', 'outside', 'text'), [
    (config_lib.AT_LEAST_ONE, (1, 1.5), (0, 0.999, math.inf, True), 'a number of at least 1'),
    (config_lib.POSITIVE, (5e-324, 2), (0.0, -1, math.nan, math.inf), 'a number above 0'),
    (config_lib.SHARE, (0, 0.3, 1), (-1e-9, 1.1), 'a number of at least 0 and at most 1'),
    (config_lib.LEVEL, (0.5, 0.999), (0.49, 1.0), 'a number of at least 0.5 and below 1'),
])
def test_ranges(expected, inside, outside, text):
    assert all(expected.holds(value) for value in inside)
    assert not any(expected.holds(value) for value in outside)
    assert str(expected) == text


def test_keys_that_a_config_lacks_are_named():
    keys = {key for key in dict(_flatten(load_config('demo').to_dict()))
            if not key.startswith('reproduce.')}
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.check(ConfigDict())
    assert set(re.findall(r'config\.([a-z0-9_.]+)', str(error.value))) == keys
    for run in (evaluate.evaluate, evaluate.diagnose, train.train):
        with pytest.raises(config_lib.ConfigError, match='^no config'):
            run(ConfigDict(), 'a folder that is not looked at')
    config = load_config('demo')
    with config.unlocked():
        del config.evaluation.rules
    with pytest.raises(config_lib.ConfigError, match=r'^no config\.evaluation\.rules; is this'):
        config_lib.check(config)


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'compare'])
def test_the_argument_names_workload_and_head(name):
    config = load_config(name, 'harmless,scalar')
    assert (config.workload, config.head.name) == ('harmless', 'scalar')
    assert config.reproduce.workloads == ('harmless',)
    assert config.reproduce.heads == ('scalar',)
    both = load_config(name).reproduce
    assert (both.workloads, both.heads) == (('helpful', 'harmless'), ('scalar', 'quantile'))


@pytest.mark.parametrize('name', ['demo', 'hh', 'benchmark', 'compare', *WORLDS])
def test_every_key_has_a_comment(name):
    lines = (ROOT / 'configs' / f'{name}.py').read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r' +(config|\w+)\.\w+ = (?!.*ConfigDict)', line):
            commented = '  # ' in line or before.lstrip().startswith('#')
            family = line.split('=')[0].rsplit('.', 1)[0].strip() in ('loss', 'config.reproduce')
            assert commented or family, line


def test_every_key_is_read_somewhere():
    source = '\n'.join(path.read_text() for path in (ROOT / 'qrm').glob('*.py'))
    for name in ('benchmark', 'compare', *WORLDS):
        for key in dict(_flatten(load_config(name).to_dict())):
            assert re.search(rf'\b{key.rsplit(".", 1)[-1]}\b', source), f'{name}: {key}'
