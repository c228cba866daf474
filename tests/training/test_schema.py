"""Keys of a config: what is built, checked and shown of a table."""

import math

import pytest
from ml_collections import ConfigDict

from qrm.training import schema
from qrm.training.schema import ANY, AT_LEAST_ONE, ConfigError, Each, Key, OneOf, Range

TABLE = {
    'seed': Key(0, Range(0), 'of all'),
    'train.rows': Key(2, AT_LEAST_ONE, 'of a batch'),
    'train.rate': Key(0.5, schema.SHARE, 'peak'),
    'train.kind.name': Key('sgd', OneOf(('sgd', 'adamw')), 'optimiser'),
    'train.on': Key(True, ANY, 'or off'),
    'sizes': Key((1, 2), Each(int, AT_LEAST_ONE), 'of runs'),
    'models': Key({'a': {'x': 1}}, ANY, 'by name'),
}


@pytest.mark.parametrize(('expected', 'inside', 'outside', 'text'), [
    (AT_LEAST_ONE, (1, 1.5, 10**400), (0, 0.999, math.inf, True, 'x', None),
     'a number of at least 1'),
    (schema.POSITIVE, (5e-324, 2), (0.0, -1, math.nan, math.inf), 'a number above 0'),
    (schema.SHARE, (0, 0.3, 1), (-1e-9, 1.1), 'a number of at least 0 and at most 1'),
    (Range(1, 2**20), (1, 2**20), (0, 2**20 + 1), 'a number of at least 1 and at most 1,048,576'),
    (schema.LEVEL, (0.5, 0.999), (0.49, 1.0), 'a number of at least 0.5 and below 1'),
    (OneOf(('a', 'b')), ('a', 'b'), ('c', ''), "one of ('a', 'b')"),
    (Each(int, Range(2)), ((), (2, 3)), ((2, 1), (2.0,), ('x',)),
     'a tuple, each of it a number of at least 2'),
    (Each(str), ((), ('a',)), ((1,),), 'a tuple, each of it text'),
])
def test_checks(expected, inside, outside, text):
    assert all(expected.holds(value) for value in inside)
    assert not any(expected.holds(value) for value in outside)
    assert str(expected) == text


def test_a_config_is_the_defaults_and_what_is_changed():
    config = schema.build(TABLE, {'train.rows': 7, 'models': {'b': {'y': 2}}})
    assert config.is_locked
    assert config.to_dict() == {
        'seed': 0, 'train': {'rows': 7, 'rate': 0.5, 'kind': {'name': 'sgd'}, 'on': True},
        'sizes': (1, 2), 'models': {'b': {'y': 2}}}
    schema.check(config, TABLE)
    # Defaults are not shared between configs.
    config.models.b.y = 3
    assert schema.build(TABLE, {}).models.to_dict() == {'a': {'x': 1}}
    assert TABLE['models'].default == {'a': {'x': 1}}


def test_a_change_of_no_key_is_refused():
    with pytest.raises(ConfigError, match=r'^config\.train\.row: no such key, did you mean '
                                          r'config\.train\.rows\?$'):
        schema.build(TABLE, {'train.row': 1})


@pytest.mark.parametrize(('key', 'value', 'expected'), [
    ('train.rows', 0, 'config.train.rows=0, expected a number of at least 1'),
    ('train.rows', 1.5, 'config.train.rows=1.5, expected a whole number'),
    ('train.rows', True, 'config.train.rows=True, expected a whole number'),
    ('train.rows', 2**31, 'config.train.rows=2147483648, expected a whole number below 2,147,'),
    ('train.rate', 'x', "config.train.rate='x', expected a number"),
    ('train.rate', 2, 'config.train.rate=2, expected a number of at least 0 and at most 1'),
    ('train.kind.name', 'adam', "config.train.kind.name='adam', expected one of"),
    ('train.on', 1, 'config.train.on=1, expected True or False'),
    ('sizes', (1, 0), 'config.sizes=(1, 0), expected a tuple, each of it a number of at least 1'),
    ('sizes', 'x', "config.sizes='x', expected a tuple"),
    ('models', 3, 'config.models=3, expected a section'),
])
def test_values_that_cannot_be_used(key, value, expected):
    found = schema.problems(schema.build(TABLE, {key: value}), TABLE)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_a_whole_number_is_a_number():
    assert not schema.problems(schema.build(TABLE, {'train.rate': 1}), TABLE)


def test_missing_and_unknown_keys_are_named():
    config = schema.build(TABLE, {})
    with config.unlocked():
        del config.train.kind
        del config.seed
    with pytest.raises(ConfigError, match=r'^no config\.seed, config\.train\.kind\.name; is this'):
        schema.check(config, TABLE)
    config = schema.build(TABLE, {})
    with config.unlocked():
        config.train.more = ConfigDict({'x': 1})
    with pytest.raises(ConfigError, match=r'^config\.train\.more\.x: not known here; is this'):
        schema.check(config, TABLE)


def test_description_has_every_key_in_order_with_changed_defaults():
    text = schema.describe(schema.build(TABLE, {'train.rows': 7}), TABLE)
    assert [line for line in text.split('\n') if line] == [
        'config.seed = 0  # of all',
        'config.train.rows = 7  # of a batch [default: 2]',
        'config.train.rate = 0.5  # peak',
        "config.train.kind.name = 'sgd'  # optimiser",
        'config.train.on = True  # or off',
        'config.sizes = (1, 2)  # of runs',
        "config.models = {'a': {'x': 1}}  # by name",
    ]
