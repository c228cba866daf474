"""What every entry point shares: flags, a config by its name, and bad input that ends in one line.

Mains import what they run when they run it, so that help, and a wrong flag, come at once.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from qrm.commands import configs

# How absl and ml_collections report flags that cannot be parsed, and files that are not there.
_FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)
_HELP = ('-h', '-help', '--help')
_CONFIG = ('-config', '--config')

flags.disclaim_key_flags()  # what is defined here belongs to the main that asks for it


def define_config() -> None:
    """Defines `--config`, a name or a file, and `--print_config`."""
    config_flags.DEFINE_config_file(
        'config', None, f'One of {", ".join(configs.names())}, or a .py file; what may follow a '
        'colon, its docstring says. --config.KEY=VALUE changes a key.')
    define_print_config()


def define_print_config() -> None:
    """Defines `--print_config`."""
    flags.DEFINE_bool('print_config', False, 'Print all keys with values and comments, and end.')


def define_process_flags() -> None:
    """Defines the flags of commands that several processes can run together."""
    flags.DEFINE_string(
        'coordinator', None, "host:port of the first of several processes; 'auto': found out from "
        'Slurm, Kubernetes or the TPU pod, with the other two.')
    flags.DEFINE_integer('num_processes', None, 'Of how many.', lower_bound=1)
    flags.DEFINE_integer('process_id', None, 'Which one this is, from 0.', lower_bound=0)


def config(table: Any) -> ConfigDict:
    """The config of the command line; with `--print_config` prints it and ends.

    Args:
      table: its keys, see `schema`.

    Raises:
      ConfigError: with `--print_config`, values that cannot be used, after all were printed.
    """
    from qrm.training import schema

    found = flags.FLAGS.config
    if flags.FLAGS.print_config:
        print(schema.describe(found, table))
        schema.check(found, table)
        sys.exit()
    return found


def run(
    main: Callable[[], None],
    *,
    required: Sequence[str] = (),
    parse: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """Runs `main` under absl, see `processes.run`; exit code 2 for bad flags.

    Args:
      main: takes no arguments, reads flags.
      required: flags that must be given; for `--print_config` only the config.
      parse: parses flags, given the command line; default `flags.FLAGS`.
    """

    def parse_flags(argv: list[str]) -> list[str]:
        if any(arg in _HELP for arg in argv[1:]):
            print(main.__globals__['__doc__'] + flags.FLAGS.main_module_help())
            sys.exit()
        try:
            rest = (parse or flags.FLAGS)(_resolved(argv))
            _check_required(required)
            if 'config' in flags.FLAGS:
                # A file that could not be loaded says so only when a value is asked for.
                _ = flags.FLAGS.config.seed
            _check_process_flags()
        except _FLAG_ERRORS as error:
            _fail(f'{_line(error)}; --help lists the flags')
        except Exception as error:  # a config file is a program, and fails in any way
            place = traceback.extract_tb(error.__traceback__)[-1]
            _fail(f'{place.filename}:{place.lineno}: {type(error).__name__}: {error}')
        if len(rest) > 1:
            _fail(f'unexpected arguments {rest[1:]}; a flag starts with --')
        return rest

    def guarded(unused_argv: list[str]) -> None:
        from qrm.commands import processes

        several = [flags.FLAGS[name].value if name in flags.FLAGS else None
                   for name in ('coordinator', 'num_processes', 'process_id')]
        processes.run(main, *several)

    app.run(guarded, flags_parser=parse_flags)


def _resolved(argv: Sequence[str]) -> list[str]:
    """The command line with the path of a config in place of its name."""
    result = []
    for before, arg in zip(['', *argv], argv, strict=False):
        name, equals, value = arg.partition('=')
        if name in _CONFIG and equals:
            arg = f'{name}={configs.resolve(value)}'
        result.append(configs.resolve(arg) if before in _CONFIG else arg)
    return result


def _line(error: Exception) -> str:
    """What is wrong, without the traceback of a config file that refuses its argument or a key."""
    message = str(error).strip('"').replace('\\n', ' ').replace("\\'", "'")
    before, traced, after = message.partition('\n\nTraceback (most recent call last):\n')
    if not traced:
        return message
    kind, _, reason = after.rstrip().rpartition('\n')[2].partition(': ')
    flag = before.partition(': ')[0].removeprefix('flag ')
    return f'{flag}: {reason}' if kind.endswith(('ValueError', 'ConfigError')) else message


def _check_required(required: Sequence[str]) -> None:
    if 'print_config' in flags.FLAGS and flags.FLAGS.print_config:
        required = [name for name in required if name == 'config']
    if missing := [name for name in required if flags.FLAGS[name].value is None]:
        raise flags.ValidationError(f'no --{", no --".join(missing)}')


def _check_process_flags() -> None:
    if 'coordinator' not in flags.FLAGS:
        return
    coordinator, count, own = (
        flags.FLAGS[name].value for name in ('coordinator', 'num_processes', 'process_id'))
    if coordinator in (None, 'auto'):
        if count is not None or own is not None:
            raise flags.ValidationError(
                f'--num_processes={count} --process_id={own} without --coordinator=host:port')
    elif count is None or own is None or own >= count or ':' not in coordinator:
        raise flags.ValidationError(
            f'--coordinator={coordinator} --num_processes={count} --process_id={own}: expected '
            'host:port, a number of processes and an id below it')


def _fail(message: str) -> None:
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(2)
