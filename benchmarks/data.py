"""How fast many pairs are read and tokenised, and how fast they are there again.

    python -m benchmarks.data --texts=hh --tokenizer=gpt2 --pairs=1000000 --folder=results/data

Pairs of realistic lengths are made of those of a folder in the layout of the HH release: a tenth of
their words are exchanged with others of it. A process reads them as `qrm train` does, from nothing
to its first batches, the fingerprint that a run is recognised by included, and keeps what it makes;
a second one finds it. Each prints seconds from its start on, those of its imports, pairs a second,
seconds of processors, and the most memory that it held, what is mapped included, alone and together
with the processes that it started, where what they share counts once. The pairs and what is kept
are deleted at the end.
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

from absl import app, flags

from qrm.commands import configs
from qrm.data import packing
from qrm.data.files import read_rows
from qrm.studies import speed
from qrm.training import loop, train

_EXCHANGED = 0.1
_STEPS = 20
_BETWEEN = 0.2  # seconds from one look at the memory to the next


def generate(texts: str, path: str, pairs: int) -> None:
    """Writes pairs as those of the HH release in folder `texts`."""
    names = [os.path.join(folder, name) for folder, _, found in os.walk(texts) for name in found]
    rows = [row for name in sorted(names) for _, row in read_rows(name)]
    words = [word for row in rows for word in re.findall('[A-Za-z]+', row['chosen'])
             if word not in ('Human', 'Assistant')]
    rng = random.Random(0)

    def changed(text: str) -> str:
        return re.sub(r'(?<!\n)\b[A-Za-z]{3,}\b(?!:)', lambda found: (
            rng.choice(words) if rng.random() < _EXCHANGED else found[0]), text)

    with open(path, 'w', encoding='utf-8') as file:
        for number in range(pairs):
            row = rows[number % len(rows)]
            # The last turn of the assistant is the response.
            start = row['chosen'].rfind('\n\nAssistant:') + len('\n\nAssistant:')
            if row['rejected'][:start] != row['chosen'][:start]:
                start = 0
            prompt = changed(row['chosen'][:start])
            file.write(json.dumps({side: prompt + changed(row[side][start:])
                                   for side in ('chosen', 'rejected')}) + '\n')


def measure(path: str, tokenizer: str, cache: str) -> dict[str, Any]:
    """Reads the pairs as a run does, and makes its first batches; what the process took so far."""
    imports = speed.process_seconds()
    with Together() as together:
        config = configs.module('hh').get_config()
        config.update_from_flattened_dict({
            'data.path': path, 'data.cache': cache, 'model.tokenizer': tokenizer,
            'model.checkpoint': ''})
        data = train.read_data(config)
        loop.identify(config, None, data.encoded)
        examples, size = data.encoded['train'], config.train.batch_size
        layouts = packing.plan_layouts(examples, row_length=config.train.row_length,
                                       rows=config.train.rows)
        for step in range(_STEPS):
            packing.make_batch([examples[i] for i in packing.batch_indices(
                step, seed=0, examples=len(examples), batch_size=size, total=len(examples))],
                layouts, size)
    seconds, pairs = speed.process_seconds(), sum(r.read for r in data.reports.values())
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {'pairs': pairs, 'seconds': round(seconds, 1), 'of these imports': round(imports, 1),
            'pairs a second': round(pairs / seconds),
            'seconds of processors': round(sum(one.ru_utime + one.ru_stime for one in used), 1),
            'GiB': round(used[0].ru_maxrss / 2**20, 2),
            'GiB with those it started': round(together.most / 2**30, 2)}


class Together:
    """Looks at the memory of this process and of those that it started, while it is entered.

    Attributes:
      most: bytes, the most that was seen.
    """

    def __init__(self):
        self.most = together()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *unused) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_BETWEEN):
            self.most = max(self.most, together())


def together() -> int:
    """Bytes of memory of this process and of all that it started, what they share counted once.

    Of Linux, see proc_pid_smaps(5) for `Pss`.
    """
    found, left = 0, ['self']
    while left:
        folder = Path('/proc') / left.pop()
        with contextlib.suppress(OSError):  # one that has ended
            text = (folder / 'smaps_rollup').read_text()
            found += 1024 * int(re.search(r'^Pss: +(\d+) kB$', text, re.MULTILINE)[1])
            for task in (folder / 'task').iterdir():
                left += (task / 'children').read_text().split()
    return found


def main(_: list[str]) -> None:
    """Makes pairs, and measures in processes of their own."""
    given = flags.FLAGS
    path, cache = (os.path.join(given.folder, name) for name in ('pairs.jsonl', 'cache'))
    if given.measure:
        print(json.dumps(measure(path, given.tokenizer, cache)))
        return
    os.makedirs(given.folder, exist_ok=True)
    try:
        generate(given.texts, path, given.pairs)
        for start in ('first', 'second'):
            done = subprocess.run([sys.executable, '-m', 'benchmarks.data', '--measure',
                                   f'--folder={given.folder}', f'--tokenizer={given.tokenizer}'],
                                  check=True, capture_output=True, text=True)
            print(f'{start} start: {done.stdout.splitlines()[-1]}', flush=True)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        if os.path.exists(path):
            os.remove(path)


if __name__ == '__main__':
    flags.DEFINE_string('texts', 'hh', 'Folder of pairs in the layout of the HH release.')
    flags.DEFINE_string('tokenizer', 'openai-community/gpt2', 'Folder or hub name.')
    flags.DEFINE_integer('pairs', 100_000, 'How many are made.')
    flags.DEFINE_string('folder', None, 'Where they are made, and what is kept of them.')
    flags.DEFINE_bool('measure', False, 'Read those that are there, and print what that took.')
    flags.mark_flag_as_required('folder')
    app.run(main)
