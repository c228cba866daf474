"""The config of a run that trains a policy: keys of reward runs that mean the same, and its own.

The objective of a run adds a section, see `sft` and `dpo`.
"""

from typing import Any

from ml_collections import ConfigDict

from qrm.training import config, schema
from qrm.training.schema import ANY, ConfigError, Key, Table

# Of a policy responses end with EOS, nothing rates attributes, and there is no head.
_OTHERS = ('data.append_eos', 'data.attributes', 'model.pair_template', 'model.initial_std',
           'train.features')
_SECTIONS = ('data', 'model', 'lora', 'optimizer', 'train')

KEYS: Table = {
    name: key for name, key in config.KEYS.items()
    if name not in _OTHERS and (name in ('seed', 'workload') or name.split('.')[0] in _SECTIONS)
} | {
    'model.checkpoint': config.KEYS['model.checkpoint']._replace(
        comment="folder or hub name of a language model; '': random weights of the sizes below"),
    'train.tune': Key(
        'all', ANY, "what is trained: 'all'; 'lora', adapters; 'last:N', the last N blocks and the "
        'final norm'),
}


def build(table: Table, changes: dict[str, Any], workload: str = '') -> ConfigDict:
    """The complete, locked config of a run, for the `get_config` of a config file.

    Args:
      table: its keys.
      changes: values that differ from the defaults, by dotted name.
      workload: in place of the configured one; '': that.

    Raises:
      ConfigError: a change of a key that does not exist.
    """
    return schema.build(table, changes | ({'workload': workload} if workload else {}))


def check(values: Any, table: Table) -> None:
    """Checks that a config is complete, and all of its values.

    Args:
      values: the config.
      table: its keys.

    Raises:
      ConfigError: names keys that are missing or unknown, or lists every value that cannot be used.
    """
    schema.check(values, table)
    problems = []
    for section, use in (('data.columns', config.check_columns),
                         ('model.sizes', config.architecture), ('train.tune', _check_tune),
                         ('train.tensor', config.check_tensor)):
        try:
            use(values)
        except ValueError as error:
            problems.append(f'config.{section}: {error}')
    schema.raise_all(problems)


def check_margins(values: Any, *, used: bool) -> None:
    """Checks that margins are not asked for where they are not used.

    Args:
      values: a checked config.
      used: whether what is learnt has a use for them.

    Raises:
      ConfigError: they are.
    """
    if values.data.strengths == 'margin' and not used:
        raise ConfigError("config.data.strengths='margin', expected 'ignored': what is learnt has "
                          'no use for it')


def _check_tune(values: Any) -> None:
    if config.check_tune(values) == 'head':
        raise ValueError("'head', expected 'all', 'lora' or 'last:N': a language model has none")
