"""Speed as measured, beside the work that was needed and what the machine does at best.

Training runs the step of `train`, scoring the function behind every score, in full: from
comparisons in tokens to parameters and rewards, packing included. Only what `costs` calls useful
counts as work. The machine's best is a large matrix product in the same process, timed in turns
with the rest, so that a load from outside slows both.
"""

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax.sharding import Mesh

from qrm.data import packing
from qrm.data.encoded import Encoded, Lengths
from qrm.models.architecture import Architecture
from qrm.models.network import Params, RewardNetwork, parameter_count
from qrm.models.tuning import Tuning
from qrm.studies import costs, figures
from qrm.training import config as config_lib
from qrm.training import inference, step, train, workdir
from qrm.training.devices import Spread, replicate
from qrm.training.reward_objective import RewardObjective
from qrm.training.schema import AT_LEAST_ONE, NOT_NEGATIVE, ConfigError, Key, Table

# Size of the matrix product, and products between two looks at the clock.
_PRODUCT = {'cpu': (2048, 1), 'accelerator': (8192, 20)}
_PRODUCT_TRIES = 3  # the best counts
_LOADED = 8  # steps that the loader alone prepares in a repeat
_PADDED_BATCH = 8  # comparisons that a loader with padding would put in a batch

# HH harmless-base in GPT-2's tokens, 1,426 pairs with dialogues of 512 tokens at most: percentiles
# of the prompt and of the responses, and Spearman's correlations of their lengths.
_PERCENTILES = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)
_PROMPT = (11, 16, 18, 24, 44, 70, 95, 121, 147, 185, 270, 323, 421, 495)
# The longest response, of 501 tokens, stands far off; 300 in its place keeps the mean.
_RESPONSE = (1, 7, 10, 14, 19, 25, 32, 42, 55, 71, 101, 127, 231, 300)
_PROMPT_RESPONSE, _RESPONSE_RESPONSE = 0.22, 0.30

_IMPORTED = time.monotonic()

KEYS: Table = {  # beside those of every run
    'speed.repeats': Key(5, AT_LEAST_ONE, 'times that everything is measured, in turns'),
    'speed.steps': Key(
        1, AT_LEAST_ONE, 'training steps timed together; one more is not timed'),
    'speed.comparisons': Key(
        1500, AT_LEAST_ONE, "synthetic ones, read if data.path is ''"),
    'speed.scored': Key(
        64, AT_LEAST_ONE, 'comparisons scored in a repeat, or as many as there are'),
    'speed.responses': Key(
        16, NOT_NEGATIVE, 'N, responses to one prompt against each by itself; 0: not measured'),
    'speed.prompt': Key(400, NOT_NEGATIVE, 'tokens of that prompt'),
    'speed.response': Key(100, AT_LEAST_ONE, 'tokens of each response'),
}


class Workload(NamedTuple):
    """What is measured.

    Attributes:
      network, trained, frozen: the model, see `Tuning.split`; the first step takes the memory of
        what is trained.
      objective: what a step makes smaller.
      mesh: over which the parameters are split; None: they are not.
      encoded: comparisons to train on and to score.
      max_length: tokens of the longest dialogue allowed.
      source: where the comparisons come from, in words.
    """

    network: RewardNetwork
    trained: Params
    frozen: Params
    mesh: Mesh | None
    objective: RewardObjective
    encoded: list[Encoded]
    max_length: int
    source: str


def run(config: Any, folder: str) -> str:
    """Measures training and scoring; leaves `speed.json` and `speed.png` in `folder`.

    A rerun in the folder measures again.

    Returns:
      The measurements as a table for the terminal.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was measured.
    """
    check(config)
    with workdir.lock(folder):
        result = measure(config, prepare(config))
        workdir.write_json(os.path.join(folder, 'speed.json'), result)
        figures.draw_benchmark(result).savefig(
            os.path.join(folder, 'speed.png'), dpi=130)
    return format_table(result)


def check(config: Any) -> None:
    """Checks a config with a `speed` section.

    Raises:
      ConfigError: there is no such section, or there are values that cannot be used.
    """
    config_lib.check(config, KEYS)


def prepare(config: Any) -> Workload:
    """Loads model and comparisons as `train.prepare` does, or makes synthetic ones.

    Raises:
      ConfigError: `data.max_length` or a dialogue of the best-of-N does not fit the model.
      DataError: see `train.prepare`.
    """
    if config.data.path:
        prepared = train.prepare(config)
        model, initial = prepared.model, prepared.initial
        workload = Workload(model.network, initial.trained, initial.frozen, initial.mesh,
                            RewardObjective(model.network, model.loss),
                            prepared.encoded['train'], model.reading.max_length,
                            f'{config.data.path}, {config.workload}, training')
    else:
        initial = train.initial_network(config)
        a = initial.network.architecture
        max_length = config.data.max_length or a.max_positions
        encoded = synthetic(config.speed.comparisons, vocab_size=a.vocab_size,
                            max_length=max_length, seed=config.seed)
        workload = Workload(initial.network, initial.trained, initial.frozen, initial.mesh,
                            RewardObjective(initial.network, config_lib.loss_config(config)),
                            encoded, max_length, 'synthetic, lengths of HH harmless-base')
    positions, settings = workload.network.architecture.max_positions, config.speed
    if workload.max_length > positions:
        raise ConfigError(f'config.data.max_length={workload.max_length}, but the model '
                          f'has {positions} positions')
    if settings.responses and settings.prompt + settings.response > workload.max_length:
        raise ConfigError(
            f'config.speed.prompt={settings.prompt} and response={settings.response}, expected '
            f'at most {workload.max_length} tokens together (config.data.max_length)')
    return workload


def synthetic(count: int, *, vocab_size: int, max_length: int, seed: int) -> list[Encoded]:
    """Pairs of random tokens whose lengths are distributed as those of HH harmless-base.

    Lengths are drawn from the percentiles above, correlated through a Gaussian copula. As in
    training on real text, a dialogue that is too long loses the left end of its prompt.

    Args:
      count: comparisons.
      vocab_size: tokens are from [0, vocab_size).
      max_length: tokens of the longest dialogue, at least 1.
      seed: the comparisons are a pure function of the arguments.
    """
    rng = np.random.default_rng(seed)
    ranks = np.eye(3) + np.array([[0, _PROMPT_RESPONSE, _PROMPT_RESPONSE],
                                  [_PROMPT_RESPONSE, 0, _RESPONSE_RESPONSE],
                                  [_PROMPT_RESPONSE, _RESPONSE_RESPONSE, 0]])
    # Pearson's correlation of the Gaussians with these rank correlations (Pearson 1907).
    covariance = 2 * np.sin(np.pi / 6 * ranks)
    gaussians = rng.multivariate_normal(np.zeros(3), covariance, count)
    # By ranks, so that every quantile is met whatever the seed.
    levels = 100 * (scipy.stats.rankdata(gaussians, axis=0) - 0.5) / count
    prompts = np.rint(np.interp(levels[:, 0], _PERCENTILES, _PROMPT)).astype(int)
    sizes = np.rint(np.interp(levels[:, 1:], _PERCENTILES, _RESPONSE)).astype(int)
    sizes = np.minimum(sizes, max_length)
    prompts = np.minimum(prompts, max_length - sizes.max(axis=1))
    preference, unrated = np.array([[0, 1], [0, 0]], np.float32), np.full((2, 1), np.nan, 'f4')
    return [
        Encoded(f'synthetic-{i}', f'synthetic-{i}', _random_ids(rng, prompt, vocab_size),
                tuple(_random_ids(rng, size, vocab_size) for size in pair), preference, unrated)
        for i, (prompt, pair) in enumerate(zip(prompts, sizes, strict=True))
    ]


def training_items(config: Any, encoded: Sequence[Encoded], number: int) -> list[Encoded]:
    """The comparisons of a training step, in order; step 0 is not timed."""
    batch_size, settings = config.train.batch_size, config.speed
    total = (1 + settings.repeats * settings.steps) * batch_size
    return [encoded[i] for i in packing.batch_indices(
        number, seed=config.seed, examples=len(encoded), batch_size=batch_size, total=total)]


def scoring_items(config: Any, encoded: Sequence[Encoded]) -> list[Encoded]:
    """The comparisons that a repeat scores, in order."""
    return list(encoded[:config.speed.scored])


def measure(config: Any, workload: Workload) -> dict[str, Any]:
    """Measures everything, in turns; what `speed.json` holds.

    Each timing is {'median', 'min', 'max', 'repeats'}. Times are in seconds, memory in bytes,
    work in floating-point operations.
    """
    settings, network = config.speed, workload.network
    training = _Training(config, workload)
    startup = training.start()
    memory = training.memory() | {'after_first_step': peak_memory()}
    scored = scoring_items(config, workload.encoded)
    score = _scoring(config, workload, scored)
    product, product_info = _product(config.model.dtype)
    best_of = _BestOf(config, workload) if settings.responses else None
    score(training.params)  # compiles, as does all that is called first outside of the loop
    if best_of:
        best_of.measure(training.params)
    steps = [range(1 + r * settings.steps, 1 + (r + 1) * settings.steps)
             for r in range(settings.repeats)]
    products, trained, score_seconds, best, loaded = [], [], [], [], []
    for numbers in steps:
        products.append(product())
        trained.append(training.run(numbers))
        products.append(product())
        score_seconds.append(score(training.params))
        if best_of:
            best.append(best_of.measure(training.params))
        loaded.append(training.load(numbers.start))
    memory['whole_run'] = peak_memory()
    items = [[item for number in numbers for item in training.items(number)] for numbers in steps]
    machine_rate = statistics.median(products)
    peak = peak_rate(jax.devices()[0].device_kind, config.model.dtype)
    rate = {'architecture': network.architecture, 'machine_rate': machine_rate,
            'peak': peak and peak * jax.local_device_count()}
    training_rates = _rates(trained, items, tuning=network.tuning, **rate)
    scoring_rates = _rates(score_seconds, [scored] * settings.repeats, tuning=None, **rate)
    timed = [number for numbers in steps for number in numbers]
    slots, real = training.slots(timed)
    loader = summary([_LOADED * config.train.batch_size / seconds for seconds in loaded])
    consumed = training_rates['comparisons_per_second']['median']
    return {
        'machine': machine(),
        'versions': workdir.versions(),
        'config': json.loads(config.to_json()),
        'data': {
            'source': workload.source, 'comparisons': len(workload.encoded),
            'mean_tokens': costs.distinct_tokens(workload.encoded) / len(workload.encoded),
            'mean_tokens_prompts_repeated': (
                costs.repeated_tokens(workload.encoded) / len(workload.encoded)),
        },
        'model': {'parameters': training.parameters,
                  'matmul_parameters': costs.matmul_parameters(network.architecture)},
        'matmul': product_info | {'flops_per_second': summary(products),
                                  'peak_flops_per_second': peak},
        'startup': startup,
        'memory': memory,
        'training': training_rates,
        'scoring': scoring_rates,
        'best_of_n': best_of and best_of.report(best),
        'loader': {'comparisons_per_second': loader, 'times_training': loader['median'] / consumed},
        'savings': savings([item for part in items for item in part], slots, real),
    }


class _Training:
    """Steps of `train` under a clock."""

    def __init__(self, config: Any, workload: Workload):
        self._config, self._examples = config, workload.encoded
        self._layouts = packing.plan_layouts(
            workload.encoded, row_length=config.train.row_length, rows=config.train.rows)
        optimizer = step.make_optimizer(
            config.optimizer, 1 + config.speed.repeats * config.speed.steps)
        state = step.init_state(workload.trained, optimizer, config.seed, workload.mesh,
                                teacher=workload.objective.ema_decay is not None)
        self.parameters = parameter_count(workload.trained) + parameter_count(workload.frozen)
        self._spread = Spread(workload.mesh)
        self._step = self._spread.compile(
            step.make_train_step(workload.network, workload.objective, optimizer))
        self._state = self._spread.start(state)
        self._network, self._frozen = workload.network, workload.frozen
        self._frozen_on_devices = self._spread.start(workload.frozen)

    @property
    def params(self) -> Params:
        """The parameters after the steps so far."""
        return self._network.tuning.join(self._spread.one(self._state.params), self._frozen)

    def start(self) -> dict[str, float]:
        """Compiles the step and takes it once, with the comparisons of step 0; seconds."""
        batch = self._batch(0)
        begin = time.perf_counter()
        lowered = self._step.lower(self._state, batch, self._frozen_on_devices)
        lowering = time.perf_counter()
        self._step = lowered.compile()
        compiled = time.perf_counter()
        self._state, *rest = self._step(self._state, batch, self._frozen_on_devices)
        jax.block_until_ready((self._state, rest))
        return {'lower_seconds': lowering - begin, 'compile_seconds': compiled - lowering,
                'first_step_seconds': time.perf_counter() - compiled,
                'process_to_first_step_seconds': process_seconds()}

    def memory(self) -> dict[str, int]:
        """Bytes that the compiled step plans with, if it says so: what it is given, and more."""
        plan = self._step.memory_analysis()
        return {} if plan is None else {
            'arguments': plan.argument_size_in_bytes, 'temporary': plan.temp_size_in_bytes}

    def run(self, numbers: range) -> float:
        """Seconds of these steps; the host prepares a batch while the device computes."""
        begin = time.perf_counter()
        for number in numbers:
            self._state, *rest = self._step(self._state, self._batch(number),
                                            self._frozen_on_devices)
        jax.block_until_ready((self._state, rest))
        return time.perf_counter() - begin

    def load(self, first: int) -> float:
        """Seconds to prepare some batches, with nothing else to do."""
        count = 1 + self._config.speed.repeats * self._config.speed.steps
        begin = time.perf_counter()
        for number in range(first, first + _LOADED):
            self._parts(number % count)
        return time.perf_counter() - begin

    def items(self, number: int) -> list[Encoded]:
        return training_items(self._config, self._examples, number)

    def slots(self, numbers: Sequence[int]) -> tuple[int, int]:
        """Slots of the micro-batches of these steps, and tokens in them."""
        stacks = [stack for number in numbers for part in self._parts(number) for stack in part]
        filled = [stack.micro_batches.segments[:stack.count] for stack in stacks]
        return sum(f.size for f in filled), sum(int(np.count_nonzero(f)) for f in filled)

    def _parts(self, number: int) -> list[packing.Batch]:
        """The batch of a step, a part for each of `Spread.shares`."""
        shares = self._spread.shares
        per_share = -(-self._config.train.batch_size // shares)
        items = self.items(number)
        return [packing.make_batch([items[i] for i in part], self._layouts, per_share)
                for part in packing.share(Lengths.of(items).sizes, shares)]

    def _batch(self, number: int) -> Any:
        """What a step takes beside the state, on the devices."""
        return self._spread.put([(part, np.int32(0)) for part in self._parts(number)])


class _BestOf:
    """One prompt with N responses, scored in one call and in one call for each response."""

    def __init__(self, config: Any, workload: Workload):
        settings = config.speed
        vocabulary = workload.network.architecture.vocab_size
        rng = np.random.default_rng((config.seed, settings.responses))
        self._prompt, self._response = settings.prompt, settings.response
        prompt = _random_ids(rng, settings.prompt, vocabulary)
        responses = tuple(_random_ids(rng, settings.response, vocabulary)
                          for _ in range(settings.responses))
        count, a = settings.responses, workload.network.architecture
        unrated = np.full((count, 1), np.nan)
        self._together = Encoded('all', 'all', prompt, responses, np.zeros((count, count)), unrated)
        self._alone = [Encoded(f'{k}', f'{k}', prompt, (response,), np.zeros((1, 1)), unrated[:1])
                       for k, response in enumerate(responses)]
        self._flops_ratio = (costs.useful_flops(a, self._alone)
                             / costs.useful_flops(a, [self._together]))
        self._score_together = _scoring(config, workload, [self._together])
        self._score_alone = [_scoring(config, workload, [item]) for item in self._alone]

    def measure(self, params: Params) -> tuple[float, float]:
        """Seconds of all responses together and of all one by one."""
        return self._score_together(params), sum(score(params) for score in self._score_alone)

    def report(self, seconds: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """What is written of these measurements."""
        return {
            'prompt': self._prompt, 'responses': len(self._alone), 'response': self._response,
            'together_seconds': summary([together for together, _ in seconds]),
            'alone_seconds': summary([alone for _, alone in seconds]),
            'ratio': summary([alone / together for together, alone in seconds]),
            'useful_flops_ratio': self._flops_ratio,
        }


def _scoring(
    config: Any, workload: Workload, items: Sequence[Encoded]
) -> Callable[[Params], float]:
    """A function of the parameters that scores these comparisons and returns the seconds."""

    def score(params: Params) -> float:
        begin = time.perf_counter()
        inference.predict(workload.network, params, items, row_length=config.train.row_length,
                          rows=config.train.rows, mesh=workload.mesh)
        return time.perf_counter() - begin

    return score


def _product(dtype: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """The rate of a square matrix product on all devices: a function to measure it, and what it is.

    float32 is computed in full precision, as in the model. The function returns FLOP/s, the best
    of a few tries.
    """
    size, inner = _PRODUCT['cpu' if jax.default_backend() == 'cpu' else 'accelerator']
    devices = jax.local_device_count()
    precision = (jax.lax.Precision.HIGHEST if dtype == 'float32' else jax.lax.Precision.DEFAULT)
    factor = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))

    def multiply(x: jax.Array) -> jax.Array:
        return jnp.matmul(x, x, precision=precision)

    run, factor = ((jax.pmap(multiply), replicate(factor)) if devices > 1
                   else (jax.jit(multiply), factor))
    jax.block_until_ready(run(factor))

    def measure() -> float:
        best = float('inf')
        for _ in range(_PRODUCT_TRIES):
            begin = time.perf_counter()
            results = [run(factor) for _ in range(inner)]
            jax.block_until_ready(results)
            best = min(best, time.perf_counter() - begin)
        return 2 * size**3 * inner * devices / best

    return measure, {'size': size, 'dtype': dtype, 'precision': precision.name.lower()}


def _rates(seconds: Sequence[float], items: Sequence[Sequence[Encoded]], *,
           tuning: Tuning | None, architecture: Architecture, machine_rate: float,
           peak: float | None) -> dict[str, Any]:
    """Work and rates of timed comparisons.

    Args:
      seconds: of each repeat.
      items: the comparisons of each repeat.
      tuning: what was trained on them; None: they were scored.
      architecture: of the backbone.
      machine_rate: FLOP/s of the matrix product on all devices.
      peak: FLOP/s that the maker states for all devices, or None.
    """
    flops = [costs.useful_flops(architecture, part, tuning=tuning) for part in items]
    tokens = [costs.distinct_tokens(part) for part in items]

    def per_second(amounts: Sequence[int]) -> dict[str, Any]:
        return summary([amount / s for amount, s in zip(amounts, seconds, strict=True)])

    useful = per_second(flops)
    return {
        'seconds': summary(seconds),
        'comparisons': [len(part) for part in items], 'tokens': tokens, 'useful_flops': flops,
        'comparisons_per_second': per_second([len(part) for part in items]),
        'tokens_per_second': per_second(tokens),
        'useful_flops_per_second': useful,
        'fraction_of_matmul_rate': useful['median'] / machine_rate,
        'model_flops_utilization': useful['median'] / peak if peak else None,
    }


def savings(timed: Sequence[Encoded], slots: int, real: int) -> dict[str, Any]:
    """What shared prompts and packing save, in tokens of the timed training steps.

    Args:
      timed: the comparisons, in order.
      slots: of the packed micro-batches.
      real: tokens in those slots; more than the distinct ones if a comparison was split.
    """
    distinct, repeated = costs.distinct_tokens(timed), costs.repeated_tokens(timed)
    padded = costs.padded_tokens(timed, _PADDED_BATCH)
    return {
        'comparisons': len(timed), 'distinct_tokens': distinct, 'repeated_tokens': repeated,
        'packed_tokens': real, 'packed_slots': slots, 'padded_slots': padded,
        'padded_batch': _PADDED_BATCH, 'distinct_of_repeated': distinct / repeated,
        'fill': real / slots, 'padded_fill': repeated / padded,
        'padded_over_packed': padded / slots,
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of repeated measurements, and the measurements."""
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values),
            'repeats': list(values)}


def peak_rate(device_kind: str, dtype: str) -> float | None:
    """The maker's dense bfloat16 FLOP/s of one device; None if unknown or for another dtype."""
    matches = [name for name in costs.PEAKS if device_kind.startswith(name)]
    return costs.PEAKS[max(matches, key=len)] if matches and dtype == 'bfloat16' else None


def peak_memory() -> int:
    """Most bytes held at any time so far: of a device where it counts them, else of the process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(s['peak_bytes_in_use'] for s in stats)
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_seconds() -> float:
    """Seconds since this process started; without Linux's /proc, since this module's import."""
    try:
        uptime = float(Path('/proc/uptime').read_text().split()[0])
        # Field 22 of proc_pid_stat(5); the command's name, field 2, may hold spaces.
        start = int(Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
        return uptime - start / os.sysconf('SC_CLK_TCK')
    except OSError:
        return time.monotonic() - _IMPORTED


def machine() -> dict[str, Any]:
    """The machine, as a reader needs to know it to compare numbers."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return {
        'device_kind': jax.devices()[0].device_kind, 'devices': jax.local_device_count(),
        'cpu': names[0] if names else platform.processor() or platform.machine(),
        'cores': os.cpu_count(),
        'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
        'platform': platform.platform(), 'python': platform.python_version(),
    }


def format_table(result: dict[str, Any]) -> str:
    """The measurements for the terminal: median, lowest and highest of the repeats."""
    host, data, matmul = result['machine'], result['data'], result['matmul']
    training, scoring, best = result['training'], result['scoring'], result['best_of_n']
    saved, startup, sizes = result['savings'], result['startup'], result['config']['train']
    rows = [('matrix product', matmul['flops_per_second'], 'FLOP/s')]
    for name, part in (('training', training), ('scoring', scoring)):
        rows += [
            (f'{name}: comparisons', part['comparisons_per_second'], '/s'),
            (f'{name}: distinct tokens', part['tokens_per_second'], '/s'),
            (f'{name}: useful work', part['useful_flops_per_second'], 'FLOP/s'),
            (f'{name}: share of the product', part['fraction_of_matmul_rate'], ''),
        ]
        if part['model_flops_utilization'] is not None:
            rows.append((f"{name}: share of the maker's peak", part['model_flops_utilization'], ''))
    if best:
        rows += [
            (f'best of {best["responses"]}: together', best['together_seconds'], 's'),
            (f'best of {best["responses"]}: one by one', best['alone_seconds'], 's'),
            ('  ratio of times', best['ratio'], 'x'),
            ('  ratio of useful work', best['useful_flops_ratio'], 'x'),
        ]
    rows += [
        ('loader alone: comparisons', result['loader']['comparisons_per_second'], '/s'),
        ('  of what training takes', result['loader']['times_training'], 'x'),
        ('compilation: trace and lower', startup['lower_seconds'], 's'),
        ('compilation: compile', startup['compile_seconds'], 's'),
        ('process start to first step', startup['process_to_first_step_seconds'], 's'),
        *((f'memory, step: {label}', result['memory'][name], 'B') for name, label in (
            ('arguments', 'state and batch'), ('temporary', 'temporary'))
          if name in result['memory']),
        ('memory, peak to first step', result['memory']['after_first_step'], 'B'),
        ('memory, peak of the run', result['memory']['whole_run'], 'B'),
        ('tokens: distinct of repeated', saved['distinct_of_repeated'], ''),
        ('fill of the packed rows', saved['fill'], ''),
        (f'fill if padded, {saved["padded_batch"]} a batch', saved['padded_fill'], ''),
        ('slots: padded over packed', saved['padded_over_packed'], 'x'),
    ]
    lines = [
        f'{host["devices"]} x {host["device_kind"]}; {host["cpu"]}, {host["cores"]} logical cores, '
        f'{host["memory_bytes"] / 2**30:.1f} GiB',
        f'{result["model"]["parameters"]:,} parameters, {matmul["dtype"]}, batches of '
        f'{sizes["batch_size"]}, rows of {sizes["row_length"]}, product of '
        f'{matmul["size"]} x {matmul["size"]}',
        f'data: {data["source"]}: {data["comparisons"]} comparisons of {data["mean_tokens"]:.0f} '
        f'tokens, {data["mean_tokens_prompts_repeated"]:.0f} with prompts repeated', '',
        f'{"":33}{"median":>10}{"min":>10}{"max":>10}',
    ]
    for name, value, unit in rows:
        numbers = ([value[key] for key in ('median', 'min', 'max')] if isinstance(value, dict)
                   else [value])
        cells = ''.join(f'{_short(number):>10}' for number in numbers)
        lines.append(f'{name:33}{cells:30}  {unit}'.rstrip())
    return '\n'.join(lines)


def _short(value: float) -> str:
    """Three digits, with a prefix for large numbers."""
    for scale, prefix in ((1e15, ' P'), (1e12, ' T'), (1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
        if value >= scale:
            return f'{value / scale:.3g}{prefix}'
    return f'{value:.3g}'


def _random_ids(rng: np.random.Generator, size: int, vocab_size: int) -> np.ndarray:
    return rng.integers(0, vocab_size, size).astype(np.int32)
