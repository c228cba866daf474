"""Times samples of a language model, beside `generate` of transformers.

    python -m benchmarks.sampling --model=smollm2-135m --workdir=results/sampling \\
      --torch_python=ENV/bin/python

Both answer the same prompts of random tokens, one prompt after the other with 8 responses to each,
drawn at temperature 1 from all tokens, all of them of the same length, as nothing stops them. They
run in turns, qrm in this process and transformers in one of its own; loading and a first response
of each shape are not timed. On a machine with other load the ratios of a round count, not the
seconds; processor seconds are those of all threads, waiting for each other included. Greedy
responses are compared too.
"""

import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.trl import run
from qrm.commands import launch
from qrm.models.transformer import Transformer
from qrm.policy import sampling
from qrm.policy.sampling import Sampling
from qrm.training import workdir
from qrm.training.schema import ConfigError

_WORKER = Path(__file__).with_name('sampling_worker.py')
_COMPARED = 16  # tokens of a greedy response


def main() -> None:
    from qrm.policy import language_model

    values = flags.FLAGS
    if not os.access(values.torch_python, os.X_OK):
        raise ConfigError(f'--torch_python={values.torch_python}: no such program')
    model = language_model.load(values.model)
    with workdir.lock(values.workdir):
        print(compare(
            model.transformer, model.params, values.model, values.workdir,
            torch_python=values.torch_python, threads=values.threads, rounds=values.rounds,
            how=Sampling(values.samples, values.new_tokens),
            prompts={f'{size} tokens': random_prompts(
                int(size), values.prompts, model.transformer.architecture.vocab_size)
                for size in values.prompt_tokens}))


def random_prompts(size: int, count: int, vocab_size: int) -> list[list[int]]:
    """Prompts of so many random tokens, the same every time."""
    return np.random.default_rng(size).integers(0, vocab_size, (count, size)).tolist()


def compare(
    model: Transformer, params: Any, folder: str, target: str, *, torch_python: str, threads: int,
    rounds: int, how: Sampling, prompts: dict[str, list[list[int]]],
) -> str:
    """Times both; leaves `sampling.json` and logs in the folder `target`; returns a table."""
    task = os.path.join(target, 'task.json')
    workdir.write_json(task, {
        'model': os.path.abspath(folder), 'prompts': prompts, 'samples': how.samples,
        'new_tokens': how.max_new_tokens, 'threads': threads, 'compared': _COMPARED})
    found: list[dict[str, Any]] = []
    greedy = {name: _greedy(model, params, some[0]) for name, some in prompts.items()}
    for number in range(rounds):
        both = {}
        for name in ('qrm', 'transformers') if number % 2 == 0 else ('transformers', 'qrm'):
            print(f'round {number + 1} of {rounds}: {name}', flush=True)
            if name == 'qrm':
                both[name] = {'times': {workload: timed(model, params, some, how)
                                        for workload, some in prompts.items()}}
                continue
            output = os.path.join(target, 'worker.json')
            run([torch_python, str(_WORKER), f'--task={task}', f'--output={output}'],
                os.path.join(target, 'worker.log'))
            with open(output, encoding='utf-8') as file:
                both[name] = json.load(file)
        found.append(both)
    agree = {name: bool(found[0]['transformers']['greedy'][name] == own)
             for name, own in greedy.items()}
    result = {'rounds': found, 'greedy_agrees': agree, 'samples': how.samples,
              'new_tokens': how.max_new_tokens, 'load_average': os.getloadavg(),
              'versions': workdir.versions()}
    workdir.write_json(os.path.join(target, 'sampling.json'), result)
    return table(result)


def timed(
    model: Transformer, params: Any, prompts: Sequence[Sequence[int]], how: Sampling
) -> dict[str, float]:
    """Seconds, and seconds of the processor, to answer prompts after the first, untimed one."""
    arrays = [np.array(prompt, np.int32) for prompt in prompts]

    def answer(some: Sequence[np.ndarray]) -> None:
        for _, samples in sampling.sample(model, params, some, how, seed=0, rows=how.samples):
            if any(len(one.tokens) != how.max_new_tokens for one in samples):
                raise ConfigError('a response that ended early, expected none')

    answer(arrays[:1])
    start, of_processor = time.perf_counter(), time.process_time()
    answer(arrays)
    return {'seconds': time.perf_counter() - start,
            'processor_seconds': time.process_time() - of_processor}


def _greedy(model: Transformer, params: Any, prompt: Sequence[int]) -> list[int]:
    (_, (one,)), = sampling.sample(model, params, [np.array(prompt, np.int32)],
                                   Sampling(1, _COMPARED, temperature=0.0), seed=0)
    return one.tokens.tolist()


def table(result: dict[str, Any]) -> str:
    """Seconds of both and their ratios, the median of the rounds and each."""
    first = result['rounds'][0]
    lines = [f'{result["samples"]} responses of {result["new_tokens"]} tokens to a prompt; '
             f'{first["transformers"]["about"]}; load average {result["load_average"][0]:.1f} at '
             'the end', f'{"prompt":14}{"":20}{"qrm":>9}{"other":>9}{"ratio":>8}  of each round']
    for workload in first['qrm']['times']:
        for key in ('seconds', 'processor_seconds'):
            own, other = ([one[name]['times'][workload][key] for one in result['rounds']]
                          for name in ('qrm', 'transformers'))
            ratios = [y / x for x, y in zip(own, other, strict=True)]
            lines.append(
                f'{workload:14}{key.replace("_", " "):20}{statistics.median(own):>9.2f}'
                f'{statistics.median(other):>9.2f}{statistics.median(ratios):>8.2f}  '
                + ', '.join(f'{ratio:.2f}' for ratio in ratios))
    same = sum(result['greedy_agrees'].values())
    lines.append(f'{same} of {len(result["greedy_agrees"])} greedy responses are the same')
    return '\n'.join(lines)


def _define_flags() -> None:
    """As the program begins: others that define the same names can be imported beside it."""
    flags.DEFINE_string('model', None, 'Folder of a decoder of transformers.')
    flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun overwrites them.')
    flags.DEFINE_string('torch_python', None, 'Python of an environment with torch and '
                        'transformers.')
    flags.DEFINE_list('prompt_tokens', ['64', '256', '512'], 'Sizes of prompts.')
    flags.DEFINE_integer('new_tokens', 64, 'Of a response.', lower_bound=1)
    flags.DEFINE_integer('samples', 8, 'Responses to a prompt.', lower_bound=1)
    flags.DEFINE_integer('prompts', 2, 'Of each size.', lower_bound=1)
    flags.DEFINE_integer('rounds', 3, 'Times that both are run, in turns.', lower_bound=1)
    flags.DEFINE_integer('threads', 0, 'Of torch; 0: its default.', lower_bound=0)


if __name__ == '__main__':
    _define_flags()
    launch.run(main, required=('model', 'workdir', 'torch_python'))
