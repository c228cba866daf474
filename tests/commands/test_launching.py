"""The files of docs/launch/ are what their readers take, and their commands are commands of qrm."""

import re
import subprocess

import pytest
import yaml

from qrm.commands import configs
from tests.helpers import ROOT, command

FOLDER = ROOT / 'docs' / 'launch'
FILES = sorted(path.name for path in FOLDER.iterdir())


def _texts(value):
    """All texts within lists and mappings."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(
            value, list) else ():
        yield from _texts(item)


def _shells(name):
    """The parts of a file that a shell runs."""
    text = (FOLDER / name).read_text(encoding='utf-8')
    return [text] if name.endswith('.sh') else list(_texts(yaml.safe_load(text)))


@pytest.fixture(scope='module')
def flags():
    """Of `qrm train`."""
    out, _ = command('train', '--help')
    return set(re.findall(r'^ +--(?:\[no\])?(\w+)', out, re.MULTILINE))


@pytest.mark.parametrize('name', FILES)
def test_files_train_with_flags_and_configs_that_there_are(name, flags):
    # From the command on to the end of its lines; of comments what stands after the script.
    found = re.findall(r'(?:qrm train|\.sh)\b((?:[^\n]|\\\n)*--(?:[^\n\\]|\\\n)*)',
                       '\n'.join(_shells(name)))
    assert found
    given = [flag for text in found for flag in re.findall(r' --(\w+)(?:=(\S*))?', text)]
    assert {flag for flag, _ in given} <= flags
    assert {'config', 'coordinator', 'workdir'} <= {flag for flag, _ in given}
    for flag, value in given:
        if flag == 'config':
            configs.load(value)


@pytest.mark.parametrize('name', FILES)
def test_what_shells_run_is_shell(name):
    for text in _shells(name):
        if 'qrm train' in text:
            subprocess.run(['bash', '-n'], input=text, text=True, check=True)


def test_bad_input_ends_a_set_of_jobs():
    spec = yaml.safe_load((FOLDER / 'jobset.yaml').read_text(encoding='utf-8'))['spec']
    job = spec['replicatedJobs'][0]['template']['spec']
    rule, = job['podFailurePolicy']['rules']
    assert (rule['action'], rule['onExitCodes']['values']) == ('FailJob', [2])
    assert rule['onExitCodes']['containerName'] in {
        container['name'] for container in job['template']['spec']['containers']}
    assert spec['failurePolicy']['rules'] == [
        {'name': 'badInput', 'action': 'FailJobSet',
         'onJobFailureReasons': ['PodFailurePolicy']}]
