"""Whether attention is right on a GPU and how fast it trains and scores there, within minutes.

    python -m benchmarks.device --minutes=8.5 --output=DIR

Started by `device.sh`, which says what the machine must have. Parts run in the order of their
importance, each in a process of its own (`device_parts`) with a share of the time that is left: one
that hangs, crashes or runs out of memory leaves a row that says so, and the others run. This module
needs Python alone and imports nothing of qrm, whose libraries take seconds to start.

    device.json   all rows, with the repeats      device.md   the table that is printed last
    device.log    what the parts printed          rows.jsonl  the rows so far, while it runs
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = ('pallas', 'dense', 'tiled')  # those that are checked


class Shape(NamedTuple):
    """A model's family and sizes, and what it is measured on.

    Attributes:
      family: `config.model.family`.
      sizes: `config.model.sizes`; those that are not named follow from the others.
      max_length: tokens of the longest dialogue.
      row_length: tokens of a packed row.
      settings: (rows of a micro-batch, comparisons a training step), in the order of memory.
      repeats: times that everything is measured, in turns.
      steps: training steps timed together.
      scored: comparisons scored in a repeat.
      per_device: pairs of TRL's forward pass; each is tried.
      rest: settings of TRL's checkpoint beside the sizes; none of them takes time.
      second: a shape that is measured too; '': none.
    """

    family: str
    sizes: Mapping[str, int]
    max_length: int
    row_length: int
    settings: tuple[tuple[int, int], ...] = ((8, 256), (16, 512), (32, 1024))
    repeats: int = 3
    steps: int = 4
    scored: int = 1024
    per_device: tuple[int, ...] = (32, 8)
    rest: Mapping[str, Any] = {}
    second: str = ''


def _sizes(vocabulary: int, positions: int, width: int, blocks: int, heads: int,
           **more: int) -> dict[str, int]:
    return {'vocab_size': vocabulary, 'max_positions': positions, 'hidden_size': width,
            'num_layers': blocks, 'num_heads': heads, **more}


_TINY = {'max_length': 128, 'row_length': 128, 'settings': ((1, 4), (2, 8)), 'repeats': 2,
         'steps': 1, 'scored': 8, 'per_device': (4,)}
SHAPES = {
    'gpt2-small': Shape('gpt2', _sizes(50257, 1024, 768, 12, 12), 512, 1024,
                        second='llama-1b'),
    'llama-1b': Shape(
        'llama', _sizes(128256, 131072, 2048, 16, 32, num_kv_heads=8, intermediate_size=8192), 512,
        1024, settings=((8, 128), (16, 256)), repeats=2, steps=2, scored=256,
        rest={'rope_theta': 500000.0, 'tie_word_embeddings': True}),
    'smollm2-135m': Shape(
        'llama', _sizes(49152, 8192, 576, 30, 9, num_kv_heads=3, intermediate_size=1536), 512, 1024,
        rest={'rope_theta': 100000.0, 'tie_word_embeddings': True}),
    # These run anywhere in a minute or two, to try the script itself.
    'tiny': Shape('gpt2', _sizes(50257, 128, 16, 2, 2), **_TINY, second='tiny-llama'),
    'tiny-llama': Shape(
        'llama', _sizes(50257, 128, 32, 2, 4, num_kv_heads=2, intermediate_size=64), **_TINY),
}
# Part -> seconds that it may need of the 8.5 minutes, in the order of importance. What a part
# leaves over is shared among those after it in this proportion. 'second' is the sweep of the second
# shape.
PARTS = {'correctness': 70, 'sweep-pallas': 80, 'sweep-dense': 45, 'attention': 30, 'trl': 140,
         'second': 85, 'lengths': 60}

_LEAST = 10  # seconds; starting Python and the libraries alone takes about as long
_RESERVE = 3  # seconds, to end the last part and write the table
_LONGEST = 160  # characters of a message in the table
_PACKAGES = ('jax', 'flax', 'optax', 'transformers', 'torch', 'trl')
# Heading -> key of a row and its format.
_COLUMNS = {
    'comparisons/s': ('comparisons_per_second', '{:,.4g}'),
    'tokens/s': ('tokens_per_second', '{:,.0f}'),
    'TFLOP/s': ('teraflops', '{:.3g}'),
    'of product': ('fraction_of_matmul_rate', '{:.1%}'),
    'MFU': ('model_flops_utilization', '{:.1%}'),
    'peak GiB': ('peak_gib', '{:.3g}'),
    'compile s': ('compile_seconds', '{:.3g}'),
}

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all parts; returns 1 if one failed or found something wrong, else 0."""
    args = parse(argv)
    # So that whoever ends this process early ends the part that runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    deadline = time.monotonic() + 60 * args.minutes - args.spent - _RESERVE
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    header = about(args.shape)
    rows = run(parts(args.shape), lambda part, seconds: part_command(args, part, seconds), output,
               deadline, header)
    print(f'\n{format_report(header, rows)}', flush=True)
    return int(any(row['result'].startswith(('failed', 'wrong')) for row in rows))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; what is wrong with it ends in one line and exit code 2."""
    parser = _Parser(prog='device', description='Correctness and speed on one GPU.')
    parser.add_argument('--minutes', type=_positive, default=8.5, help='for everything')
    parser.add_argument('--spent', type=float, default=0.0, help='seconds of them already gone')
    parser.add_argument('--shape', choices=SHAPES, default='gpt2-small')
    parser.add_argument('--output', default=str(ROOT / '.device' / 'out'), help='folder of results')
    parser.add_argument('--carried', default=str(ROOT / '.device'),
                        help='folder with tokenizer/ and pairs.jsonl, for TRL')
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}\n')


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text!r}, expected a number above 0')
    return value


def parts(shape: str) -> dict[str, float]:
    """`PARTS`, with the second shape by its name, if there is one."""
    second = SHAPES[shape].second
    return {f'sweep-{second}' if part == 'second' else part: seconds
            for part, seconds in PARTS.items() if second or part != 'second'}


def part_command(args: argparse.Namespace, part: str, seconds: float) -> list[str]:
    """The command that measures a part and appends to `rows.jsonl`."""
    return [sys.executable, '-m', 'benchmarks.device_parts', f'--part={part}',
            f'--shape={args.shape}', f'--seconds={seconds:.1f}', f'--carried={args.carried}',
            f'--rows={Path(args.output).resolve() / "rows.jsonl"}']


def run(parts: Mapping[str, float], command: Callable[[str, float], Sequence[str]], output: Path,
        deadline: float, header: Mapping[str, Any]) -> list[Row]:
    """Runs parts one after the other; results are on the disk after each of them.

    Args:
      parts: as `PARTS`.
      command: of a part and of the seconds it has; appends rows to `rows.jsonl`.
      output: folder of the results.
      deadline: when all is to have ended, by `time.monotonic`.
      header: what `device.json` holds beside the rows.
    """
    found, log = output / 'rows.jsonl', output / 'device.log'
    for path in (found, log):
        path.write_text('', encoding='utf-8')
    rows: list[Row] = []
    for number, part in enumerate(parts):
        seconds = limit(list(parts.values())[number:], deadline - time.monotonic())
        begin = time.monotonic()
        if seconds < _LEAST:
            _append(found, {'part': part, 'result': 'not measured: no time left'})
        else:
            print(f'{part}: {seconds:.0f} s at most', flush=True)
            problem = run_part(command(part, seconds), log, seconds)
            own = read_rows(found)[len(rows):]
            if not problem and not own:
                problem = 'failed: it printed no result'
            if problem:
                _append(found, {'part': part, 'result': problem})
        own = read_rows(found)[len(rows):]
        for row in own:
            print(f'  {row.get("setting", "")} {row.get("phase", "")}: {row["result"]}', flush=True)
        print(f'{part}: took {time.monotonic() - begin:.0f} s', flush=True)
        rows += own
        for name, text in (
            ('device.json', json.dumps(dict(header) | {'rows': rows}, indent=1) + '\n'),
            ('device.md', format_report(header, rows) + '\n'),
        ):
            (output / name).write_text(text, encoding='utf-8')
    found.unlink()
    return rows


def limit(weights: Sequence[float], left: float) -> float:
    """Seconds of the first of some parts: its share of those that are left for all of them."""
    return max(left, 0.0) * weights[0] / sum(weights)


def run_part(command: Sequence[str], log: Path, seconds: float) -> str:
    """Runs a program with all that it starts; returns '' or what went wrong.

    What it prints is added to the log.
    """
    with open(log, 'ab') as file:
        file.write(f'=== {" ".join(command)}\n'.encode())
        file.flush()
        start = file.tell()
        # A group of its own, so that whatever the program started ends with it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file,
                                   stderr=subprocess.STDOUT, cwd=ROOT, process_group=0)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)
    if code == 0:
        return ''
    text = log.read_bytes()[start:].decode(errors='replace')
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), 'no output')
    if code is None:
        return f'failed: stopped after {seconds:.0f} s; {last}'
    return f'failed: {last}' if code > 0 else f'failed: {signal.Signals(-code).name}; {last}'


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON Lines file; a last line cut by a kill is left out."""
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith('\n')]


def _append(path: Path, row: Row) -> None:
    """Appends a row, on a line of its own even if the last one was cut by a kill."""
    text = path.read_text(encoding='utf-8')
    kept = text[:text.rfind('\n') + 1]
    path.write_text(kept + json.dumps(row) + '\n', encoding='utf-8')


def about(shape: str) -> dict[str, Any]:
    """The card, its driver, versions and what is measured."""
    versions = {'Python': platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        done = subprocess.run(
            ['nvidia-smi', '--query-gpu=name,driver_version', '--format=csv,noheader'],
            capture_output=True, text=True, timeout=20, check=True)
        card, driver = (part.strip() for part in done.stdout.splitlines()[0].rsplit(',', 1))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        card, driver = 'no NVIDIA GPU', 'none'
    return {'card': card, 'driver': driver, 'versions': versions, 'shape': shape,
            'family': SHAPES[shape].family, 'sizes': dict(SHAPES[shape].sizes)}


def format_report(header: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """One line about the machine, and all rows as one Markdown table."""
    versions = ', '.join(f'{name} {version}' for name, version in header['versions'].items())
    headings = ['part', 'setting', 'phase', *_COLUMNS, 'result']
    lines = [headings, ['---'] * len(headings)]
    for row in rows:
        numbers = [text.format(row[key]) if row.get(key) is not None else ''
                   for key, text in _COLUMNS.values()]
        result = row['result']
        if len(result) > _LONGEST:
            result = result[:_LONGEST] + '…'
        lines.append([row['part'], row.get('setting', ''), row.get('phase', ''), *numbers, result])
    return '\n'.join([
        f'{header["card"]}, driver {header["driver"]}; {versions}; {header["shape"]}', '',
        *(f'| {" | ".join(map(_cell, line))} |' for line in lines)])


def _cell(text: str) -> str:
    """Text that ends neither its cell nor its line, nor becomes markup."""
    text = ' '.join(text.split())
    for mark in '\\|<>*_`':
        text = text.replace(mark, '\\' + mark)
    return text


if __name__ == '__main__':
    sys.exit(main())
