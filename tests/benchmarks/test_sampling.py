"""Beside transformers, for which a program stands in that writes what the worker would."""

import json

import pytest

from benchmarks import sampling
from qrm.models import weights
from qrm.models.transformer import Transformer
from qrm.policy.sampling import Sampling
from qrm.training.schema import ConfigError
from tests.helpers import REFERENCE, stub_python

STUB = """#!{python}
import json, sys
task, output = (arg.split('=', 1)[1] for arg in sys.argv[2:])
task = json.load(open(task))
json.dump({{
    'times': {{name: {{'seconds': 3.0, 'processor_seconds': 6.0}} for name in task['prompts']}},
    'greedy': {{name: [task['samples']] for name in task['prompts']}}, 'about': 'torch 0'}},
    open(output, 'w'))
"""


def test_both_answer_the_same_prompts(tmp_path, monkeypatch):
    stub = stub_python(tmp_path, STUB)
    pretrained = weights.load_pretrained(str(REFERENCE))
    model = Transformer(pretrained.architecture)
    prompts = {'3 tokens': sampling.random_prompts(3, 2, 40)}
    assert prompts['3 tokens'] == sampling.random_prompts(3, 2, 40)
    assert prompts['3 tokens'][0] != prompts['3 tokens'][1]
    monkeypatch.setattr(sampling, '_COMPARED', 1)
    out = sampling.compare(model, pretrained.backbone, 'gpt2', str(tmp_path), rounds=2, threads=1,
                           torch_python=stub, how=Sampling(2, 4), prompts=prompts)
    task = json.loads((tmp_path / 'task.json').read_text())
    assert (task['prompts'], task['samples'], task['new_tokens']) == (prompts, 2, 4)
    assert out.splitlines()[-1] == '0 of 1 greedy responses are the same'
    with pytest.raises(ConfigError, match='a response that ended early'):
        sampling.timed(model, pretrained.backbone, prompts['3 tokens'],
                       Sampling(2, 4, stops=tuple(range(40))))


def test_ratios_by_hand():
    def times(seconds, of_processor):
        return {'times': {'64 tokens': {'seconds': seconds, 'processor_seconds': of_processor}}}

    out = sampling.table({
        'samples': 8, 'new_tokens': 64, 'load_average': [1.0, 1.0, 1.0],
        'greedy_agrees': {'64 tokens': True}, 'rounds': [
            {'qrm': times(2.0, 3.0), 'transformers': times(6.0, 3.0) | {'about': 'torch 0'}},
            {'qrm': times(1.0, 3.0), 'transformers': times(5.0, 6.0)}]})
    assert out.splitlines()[2].split() == [
        '64', 'tokens', 'seconds', '1.50', '5.50', '4.00', '3.00,', '5.00']
    assert out.splitlines()[3].split()[-3:] == ['1.50', '1.00,', '2.00']
