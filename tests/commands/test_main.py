"""The command `qrm`, and the wheel that brings it to any folder."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from qrm.commands import configs, main
from qrm.training.schema import ConfigError
from tests.helpers import ROOT, command

_QRM = 'from qrm.commands.main import main; main()'


def run(*args, code=0, **kwargs):
    """What the command prints and its errors, without any package that is installed as qrm."""
    done = subprocess.run([sys.executable, '-c', _QRM, *args], capture_output=True, text=True,
                          check=False, **kwargs)
    assert done.returncode == code, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return done.stdout, done.stderr


def test_there_is_a_main_for_every_command():
    mains = {path.stem for path in (ROOT / 'experiments').glob('[!_]*.py')}
    assert main.COMMANDS.keys() == mains
    for name in mains:
        text = (ROOT / 'experiments' / f'{name}.py').read_text(encoding='utf-8')
        assert f'    qrm {name} ' in text


@pytest.mark.parametrize('args', [['--help'], ['-h'], ['help']])
def test_help_lists_all_commands(args):
    out, _ = run(*args, cwd=ROOT)
    assert all(f'  {name} ' in out for name in main.COMMANDS)


@pytest.mark.parametrize(('args', 'message'), [
    ([], 'error: no command\n'),
    (['trian'], "error: no command 'trian', did you mean train?"),
    (['--config=hh'], "error: no command '--config=hh'\n"),
])
def test_no_command(args, message):
    _, err = run(*args, cwd=ROOT, code=2)
    assert err.startswith(message)
    assert 'qrm COMMAND --help' in err


def test_help_and_wrong_flags_do_not_wait_for_jax(tmp_path):
    # A jax that cannot be imported stands before the real one.
    (tmp_path / 'jax.py').write_text('raise SystemExit("jax was imported")')
    environment = os.environ | {'PYTHONPATH': f'{tmp_path}:{ROOT}'}
    for name in main.COMMANDS:
        done = subprocess.run([sys.executable, '-m', f'experiments.{name}', '--help'], cwd=ROOT,
                              env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split('\n\n')[1].startswith(f'    qrm {name} ')
    for flags in (['--config=hx', '--workdir=x'], ['--workdir=x'], ['--confg=hh']):
        done = subprocess.run([sys.executable, '-m', 'experiments.train', *flags], cwd=ROOT,
                              env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith('error: ')
        assert 'jax' not in done.stderr


def test_configs_by_name_and_by_path(tmp_path, monkeypatch):
    assert configs.load('hh:harmless,scalar').head.name == 'scalar'
    assert configs.load('hh').to_dict() == configs.load('hh:').to_dict()
    folder = tmp_path / 'a:b.py'
    folder.mkdir()
    (folder / 'mine.py').write_text((ROOT / 'configs' / 'hh.py').read_text())
    assert configs.load(f'{folder}/mine.py:,scalar').reproduce.models == ('scalar',)


@pytest.mark.parametrize(('text', 'message'), [
    ('def get_config(arg=""):\n    return arg.nope', "{}:2: AttributeError: 'str' object has"),
    ('def get_config(arg=""):\n    raise KeyError("k")', "{}:2: KeyError: 'k'"),
    ('import qrm\nx = y', "{}:2: NameError: name 'y' is not defined"),
    ('x = (\n', "{}:1: SyntaxError: '(' was never closed"),
    ('def get_config():\n    pass', '{}: TypeError: get_config() takes 0 positional arguments'),
    ('def get_config(arg=""):\n    return None', 'get_config returned NoneType, expected a Config'),
    ('x = 1', 'no get_config, which returns the config'),
    ('from qrm.training import config\ndef get_config(arg=""):\n'
     '    return config.build({{"train.row": 2}}, arg)', 'config.train.row: no such key, did you'),
])
def test_config_files_that_fail_are_told_in_one_line(tmp_path, text, message):
    path = tmp_path / 'mine.py'
    path.write_text(text.replace('{{', '{').replace('}}', '}'))
    with pytest.raises(ConfigError) as error:
        configs.load(f'{path}:x')
    assert str(error.value).startswith(f'--config={path}:x: {message.format(path)}')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('value', 'message'), [
    ('hhh', '--config=hhh: no such config, expected one of best_of_n, campaign, '),
    ('configs/none.py:x', '--config=configs/none.py:x: configs/none.py: no such file'),
    ('identifiability:half', "argument 'half', expected '' or 'full'"),
])
def test_configs_that_do_not_exist(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        configs.load(value)


@pytest.mark.parametrize(('flags', 'message'), [
    (['--config.train.row=3'], ': config.train.row: no such key, did you mean config.train.rows?'),
    (['--noconfig.model.rmat'],
     'error: config.model.rmat: no such key, did you mean config.model.remat?'),
    (['--config.reproduce.models[0]=scalar'],
     '--config.reproduce.models[0]: expected a value for '),
    (['--config.train.rows=x'], "invalid literal for int() with base 10: 'x'"),
    (['--workdir='], 'no --workdir'),
    (['--config=hh', '--flagfile=none'], 'none'),
])
def test_flags_that_cannot_be_used_are_told_in_one_line(flags, message):
    _, err = command('train', '--config=demo', '--workdir=x', *flags, code=2)
    assert err.startswith('error: ')
    assert message in err
    assert err.count('\n') == 1


def test_flags_may_stand_in_a_file(tmp_path):
    (tmp_path / 'flags').write_text('--config=demo:,scalar\n--config.train.rows=3\n')
    out, _ = command('train', f'--flagfile={tmp_path}/flags', '--print_config')
    assert 'config.train.rows = 3 ' in out
    assert "config.head.name = 'scalar' " in out


def test_only_commands_with_a_config_of_their_own_take_none():
    for name, flags in (('scaling', []), ('evaluate', ['--workdir=x'])):
        _, err = command(name, '--config=hh', *flags, code=2)
        assert 'config' in err
        assert 'no such config' not in err


@pytest.mark.parametrize('flags', [['--config=demo:,scalar'], ['--config', 'demo:,scalar'],
                                   ['--config=configs/demo.py:,scalar']])
def test_the_resolved_config_is_printed_without_a_workdir(flags):
    out, _ = command('train', *flags, '--config.train.rows=3', '--print_config')
    lines = out.splitlines()
    assert 'config.train.rows = 3  # rows of a micro-batch on one device; a step runs as many as ' \
           'it needs [default: 1]' in lines
    assert any(line.startswith("config.head.name = 'scalar'  # ") for line in lines)
    assert any(line.startswith('config.train.batch_size = 64  # ') for line in lines)


def test_values_that_cannot_be_used_are_printed_too():
    out, err = command('train', '--config=demo', '--config.train.rows=0', '--print_config', code=2)
    assert 'config.train.rows = 0  #' in out
    assert err == 'error: config.train.rows=0, expected a number of at least 1\n'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A folder with what is installed from a wheel of this tree."""
    build_meta = pytest.importorskip('setuptools.build_meta')
    source, target = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('site')
    for name in ('qrm', 'configs', 'experiments', 'benchmarks', 'tests/commands'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, '-c', f'import {build_meta.__name__} as b; b.build_wheel(".")'],
                   cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(source.glob('*.whl'))) as file:
        file.extractall(target)
    return target


def test_a_wheel_has_one_package_with_mains_and_configs(wheel):
    info, = wheel.glob('*.dist-info')
    assert {path.name for path in wheel.iterdir()} == {'qrm', info.name}
    assert 'qrm = qrm.commands.main:main' in (info / 'entry_points.txt').read_text()
    for name in ('experiments', 'configs'):
        installed = {path.name for path in (wheel / 'qrm' / name).glob('*.py')}
        assert installed == {path.name for path in (ROOT / name).glob('*.py')}


def test_an_installed_wheel_works_in_any_folder(wheel, tmp_path):
    environment = os.environ | {'PYTHONPATH': str(wheel), 'JAX_PLATFORMS': 'cpu'}
    out, _ = run('compare', '--config=compare:hh', '--print_config', cwd=tmp_path, env=environment)
    assert "config.data.path = 'Anthropic/hh-rlhf'" in out
    _, err = run('evaluate', '--workdir=none', cwd=tmp_path, env=environment, code=2)
    assert err.startswith('error: none: not the folder of a run')
    (tmp_path / 'mine.py').write_text(
        'from qrm.training import config\n'
        'def get_config(arg=""):\n'
        '    return config.build({"train.row": 2}, arg)\n')
    _, err = run('train', '--config=mine.py', '--workdir=x', cwd=tmp_path, env=environment, code=2)
    assert err.startswith('error: --config=mine.py: config.train.row: no such key, did you mean '
                          'config.train.rows?')
