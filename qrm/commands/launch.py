"""What every entry point shares: flags, a config by its name, and bad input that ends in one line.

Mains import what they run when they run it, so that help, and a wrong flag, come at once.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from qrm.commands import configs
from qrm.training import schema
from qrm.training.schema import ConfigError

# How absl and ml_collections report flags that cannot be parsed, and files that are not there.
_FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)
_MOST_MINUTES = 100_000  # of waiting, more than two months
_HELP = ('-h', '-help', '--help')
_CONFIG = ('-config', '--config')

flags.disclaim_key_flags()  # what is defined here belongs to the main that asks for it


def define_config() -> None:
    """Defines `--config`, a name or a file, and `--print_config`."""
    flags.DEFINE_string(
        'config', None, f'One of {", ".join(configs.names())}, or a .py file; what may follow a '
        'colon, its docstring says. --config.KEY=VALUE changes a key.')
    define_print_config()


def define_print_config() -> None:
    """Defines `--print_config`."""
    flags.DEFINE_bool('print_config', False, 'Print all keys with values and comments, and end.')


def define_outputs() -> None:
    """Defines `--outputs`, of commands that take models of other libraries."""
    flags.DEFINE_string(
        'outputs', '', "Of a model that is no run, what its outputs mean: 'quantiles', 'gaussian', "
        'or the name or number of the one that is the reward. Default: as its config.json says.')


def define_model() -> None:
    """Defines what `load_model` reads."""
    flags.DEFINE_integer(
        'max_length', 0, 'Tokens of the longest dialogue, longer ones are cut from the left. 0: '
        "the model's number of positions.", lower_bound=0)
    flags.DEFINE_string(
        'date', '', 'Of a model that is no run, the day (YYYY-MM-DD) that its chat template '
        'prints, if it prints any. Default: today.')
    define_outputs()


def define_raw() -> None:
    """Defines `--raw`, of commands that use a model."""
    flags.DEFINE_bool('raw', False, 'Rewards as they were trained, also of a model that is '
                      'normalised (`qrm normalise`).')


def load_model(path: str, *, raw: bool) -> Any:
    """The reward model of a path, as the flags of `define_model` say.

    Args:
      path: of the model.
      raw: see `reward_model.load`.

    Raises:
      DataError, WorkdirError: see `reward_model.load`.
    """
    from qrm.training import reward_model

    values = flags.FLAGS
    return reward_model.load(path, max_length=values.max_length, outputs=values.outputs,
                             date=values.date, raw=raw)


def define_process_flags() -> None:
    """Defines the flags of commands that several processes can run together."""
    flags.DEFINE_string(
        'coordinator', None, "host:port of the first of several processes; 'auto': found out from "
        'Slurm, Kubernetes or the TPU pod, with the other two.')
    flags.DEFINE_integer('num_processes', None, 'Of how many.', lower_bound=1)
    flags.DEFINE_integer('process_id', None, 'Which one this is, from 0.', lower_bound=0)
    flags.DEFINE_float(
        'stall_minutes', 30.0, 'Of several processes one that makes no progress for so long prints '
        'where it stands and ends, and so do the others; 0: never.', lower_bound=0.0)


def config(table: schema.Table, check: Callable[[ConfigDict], Any]) -> ConfigDict:
    """The config of the command line; with `--print_config` prints it and ends.

    Args:
      table: its keys.
      check: raises what the command would raise of values that cannot be used; is called with
        `--print_config`, after all were printed.
    """
    found = flags.FLAGS.config
    if flags.FLAGS.print_config:
        try:
            print(schema.describe(found, table), flush=True)
        except BrokenPipeError:  # a pager or `head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        check(found)
        sys.exit()
    return found


def run(
    main: Callable[[], None],
    *,
    required: Sequence[str] = (),
    stored: Callable[[], ConfigDict] | None = None,
) -> None:
    """Runs `main` under absl, see `processes.run`; exit code 2 for bad flags.

    Args:
      main: takes no arguments, reads flags.
      required: flags that must be given; for `--print_config` only the config.
      stored: gives the config, once flags are read, in place of `--config`.
    """

    def parse_flags(argv: list[str]) -> list[str]:
        if any(arg in _HELP for arg in argv[1:]):
            print(main.__globals__['__doc__'] + flags.FLAGS.main_module_help())
            sys.exit()
        try:
            rest = _parse(argv, required, stored)
            _check_process_flags()
        except _FLAG_ERRORS as error:
            reason = ' '.join(map(str, error.args)) if len(error.args) > 1 else str(error)
            _fail(f'{reason}; --help lists the flags')
        if len(rest) > 1:
            _fail(f'unexpected arguments {rest[1:]}; a flag starts with --')
        return rest

    def guarded(unused_argv: list[str]) -> None:
        from qrm.commands import processes

        several = [flags.FLAGS[name].value if name in flags.FLAGS else None
                   for name in ('coordinator', 'num_processes', 'process_id', 'stall_minutes')]
        processes.run(main, *several)

    app.run(guarded, flags_parser=parse_flags)


def _parse(
    argv: list[str], required: Sequence[str], stored: Callable[[], ConfigDict] | None
) -> list[str]:
    """Parses flags twice, as the config says which `--config.KEY` there are; returns the rest."""
    values = flags.FLAGS
    argv = values.read_flags_from_files(argv)
    named = 'config' in values
    values(argv, known_only=True)
    _check_required(required)
    if not named and stored is None:
        return values(argv)
    found = configs.load(values.config) if named else stored()
    if named:
        del values.config
        argv = _without_config(argv)
    elif unknown := [arg for arg in argv if arg.partition('=')[0] in _CONFIG]:
        raise flags.UnrecognizedFlagError('config', unknown[0])
    _check_changes(argv, found)
    config_flags.DEFINE_config_dict('config', found, sys_argv=argv)
    return values(argv)


def _without_config(argv: Sequence[str]) -> list[str]:
    """The command line without `--config` and its value; `--config.KEY` stays."""
    return [arg for before, arg in zip(['', *argv], argv, strict=False)
            if arg.partition('=')[0] not in _CONFIG and before not in _CONFIG]


def _check_changes(argv: Sequence[str], found: ConfigDict) -> None:
    """Checks that every `--config.KEY` is a key of the config.

    Raises:
      ConfigError: names the closest one.
    """
    known = dict(schema.flatten(found, {}))
    for arg in argv:
        flag = arg.partition('=')[0].lstrip('-')
        name = flag.removeprefix('no').removeprefix('config.')
        if not arg.startswith('-') or not flag.startswith(('config.', 'noconfig.')):
            continue
        if (whole := name.partition('[')[0]) != name and whole in known:
            raise ConfigError(f'--{flag}: expected a value for the whole of config.{whole}, such '
                              f'as "{known[whole]!r}"')
        if name not in known:
            raise ConfigError(schema.unknown(name, known))


def _check_required(required: Sequence[str]) -> None:
    if 'config' in required and flags.FLAGS.print_config:
        required = ['config']
    if missing := [name for name in required if not flags.FLAGS[name].value]:
        raise flags.ValidationError(f'no --{", no --".join(missing)}')


def _check_process_flags() -> None:
    if 'coordinator' not in flags.FLAGS:
        return
    coordinator, count, own = (
        flags.FLAGS[name].value for name in ('coordinator', 'num_processes', 'process_id'))
    if not 0.0 <= (minutes := flags.FLAGS.stall_minutes) <= _MOST_MINUTES:
        raise flags.ValidationError(
            f'--stall_minutes={minutes}, expected a number from 0 to {_MOST_MINUTES}')
    if coordinator in (None, 'auto'):
        if count is not None or own is not None:
            raise flags.ValidationError(
                f'--num_processes={count} --process_id={own} without --coordinator=host:port')
        return
    host, colon, port = coordinator.rpartition(':')
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16
            and count is not None and own is not None and own < count):
        raise flags.ValidationError(
            f'--coordinator={coordinator} --num_processes={count} --process_id={own}: expected '
            'host:port, a number of processes and an id below it')


def _fail(message: str) -> None:
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(2)
