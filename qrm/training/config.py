"""Checks of a config, and the objects its sections describe.

Configs are complete `ml_collections` files in `configs/`; here each value is checked once,
before anything is loaded, and turned into the frozen objects the rest of the package takes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qrm.data import demo, tokens
from qrm.models import attention
from qrm.models.decoder import DecoderConfig
from qrm.models.network import DTYPES
from qrm.rewards import losses
from qrm.rewards.heads import HEADS, HeadConfig
from qrm.training import devices, step


class ConfigError(ValueError):
    """A config value that cannot be used; the message names the key and what was expected."""


class Range(NamedTuple):
    """Finite numbers from `low` to `high`, without an end that is named open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is such a number."""
        if isinstance(value, bool) or not math.isfinite(value):
            return False
        return (self.low < value if self.open_low else self.low <= value) and (
            value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f'a number {"above" if self.open_low else "of at least"} {self.low:g}'
        if self.high == math.inf:
            return low
        return f'{low} and {"below" if self.open_high else "at most"} {self.high:g}'


AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE = Range(1), Range(0), Range(0, open_low=True)
SHARE, BELOW_ONE = Range(0, 1), Range(0, 1, open_high=True)
LEVEL = Range(0.5, 1, open_high=True)  # of an interval
_RANGES = {
    'seed': NOT_NEGATIVE,
    'data.max_length': NOT_NEGATIVE,
    'data.validation_fraction': Range(0, 1, open_low=True, open_high=True),
    'data.test_fraction': Range(0, 1, open_low=True),
    'data.max_malformed': SHARE,
    'data.demo.train': AT_LEAST_ONE,
    'data.demo.test': AT_LEAST_ONE,
    'data.demo.seed': NOT_NEGATIVE,
    'model.dropout': BELOW_ONE,
    'head.num_quantiles': AT_LEAST_ONE,
    'head.num_atoms': Range(2),
    'head.atom_range': POSITIVE,
    'head.num_cosines': AT_LEAST_ONE,
    'head.num_factors': AT_LEAST_ONE,
    'head.members': AT_LEAST_ONE,
    'loss.huber_weight': NOT_NEGATIVE,
    'loss.kappa': POSITIVE,
    'loss.ema_decay': BELOW_ONE,
    'loss.anchor_weight': NOT_NEGATIVE,
    'loss.label_smoothing': Range(0, 0.5, open_high=True),
    'loss.centre_weight': NOT_NEGATIVE,
    'loss.entropy_weight': NOT_NEGATIVE,
    'loss.lm_weight': NOT_NEGATIVE,
    'optimizer.learning_rate': NOT_NEGATIVE,
    'optimizer.warmup_fraction': SHARE,
    'optimizer.final_fraction': SHARE,
    'optimizer.b1': BELOW_ONE,
    'optimizer.b2': BELOW_ONE,
    'optimizer.eps': POSITIVE,
    'optimizer.weight_decay': NOT_NEGATIVE,
    'optimizer.clip_norm': NOT_NEGATIVE,
    'train.batch_size': AT_LEAST_ONE,
    'train.epochs': POSITIVE,
    'train.max_steps': NOT_NEGATIVE,
    'train.row_length': AT_LEAST_ONE,
    'train.rows': AT_LEAST_ONE,
    'train.checkpoint_every': AT_LEAST_ONE,
    'train.keep': AT_LEAST_ONE,
    'train.log_every': AT_LEAST_ONE,
    'analysis.bootstrap': Range(20),
    'analysis.null_draws': Range(20),
    'analysis.level': LEVEL,
    'analysis.seed': NOT_NEGATIVE,
}
_BENCHMARK_RANGES = {  # of a section that only the config of a benchmark has
    'benchmark.repeats': AT_LEAST_ONE,
    'benchmark.steps': AT_LEAST_ONE,
    'benchmark.comparisons': AT_LEAST_ONE,
    'benchmark.scored': AT_LEAST_ONE,
    'benchmark.responses': NOT_NEGATIVE,
    'benchmark.prompt': NOT_NEGATIVE,
    'benchmark.response': AT_LEAST_ONE,
}
_CHOICES = {
    'data.overlong': tokens.OVERLONG,
    'data.demo.annotators': demo.ANNOTATORS,
    'model.dtype': DTYPES,
    'model.attention': attention.IMPLEMENTATIONS,
    **{f'loss.{head}': tuple(losses.OBJECTIVES) for head in HEADS},
    'loss.targets': losses.TARGETS,
    'optimizer.name': step.OPTIMIZERS,
    'optimizer.schedule': step.SCHEDULES,
    'train.sharding': devices.MODES,
    'evaluation.checkpoint': ('best', 'last'),
}
_OTHERS = (  # whose values are checked where they are used
    'workload', 'data.path', 'data.attributes', 'data.append_eos', 'model.checkpoint',
    'model.tokenizer', 'model.remat', 'model.sizes.vocab_size', 'model.sizes.n_positions',
    'model.sizes.n_embd', 'model.sizes.n_layer', 'model.sizes.n_head', 'head.name',
    'train.tensorboard', 'evaluation.candidates', 'evaluation.references', 'evaluation.rules',
)


def check(config: Any) -> None:
    """Checks that a config is complete, and the ranges and choices of its values.

    Raises:
      ConfigError: lists every key that is missing, or every value that cannot be used.
    """
    ranges = _RANGES | (_BENCHMARK_RANGES if 'benchmark' in config else {})
    if missing := [key for key in (*ranges, *_CHOICES, *_OTHERS) if not _has(config, key)]:
        raise ConfigError(f'no config.{", config.".join(missing)}; is this the config of another '
                          'kind of run, or of another version?')
    problems = range_problems(config, ranges)
    for key, choices in _CHOICES.items():
        if (value := _get(config, key)) not in choices:
            problems.append(f'config.{key}={value!r}, expected one of {choices}')
    if bool(config.evaluation.candidates) != bool(config.evaluation.references):
        problems.append('config.evaluation: candidates and references, expected both or neither')
    for section, build in (('head', _check_head), ('model.sizes', decoder_config)):
        try:
            build(config)
        except ValueError as error:
            problems.append(f'config.{section}: {error}')
    if problems:
        raise ConfigError('\n'.join(problems))


def range_problems(config: Any, ranges: Mapping[str, Range]) -> list[str]:
    """A line for each number of a config that is outside its range.

    Args:
      config: whose keys are asked for.
      ranges: by dotted key.
    """
    values = {key: _get(config, key) for key in ranges}
    return [f'config.{key}={values[key]!r}, expected {expected}'
            for key, expected in ranges.items() if not expected.holds(values[key])]


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of a model that starts without a checkpoint."""
    return DecoderConfig(n_inner=4 * config.model.sizes.n_embd, **config.model.sizes)


def head_config(config: Any, annotators: Sequence[str] = ()) -> HeadConfig:
    """The head that the config describes, for annotators of these names."""
    return HeadConfig(**config.head, attributes=config.data.attributes,
                      annotators=tuple(annotators))


def loss_config(config: Any) -> losses.LossConfig:
    """The loss of the configured head."""
    rest = {key: value for key, value in config.loss.items() if key not in HEADS}
    return losses.LossConfig(objective=config.loss[config.head.name], **rest)


def _check_head(config: Any) -> None:
    # Which annotators there are, the data say.
    head = head_config(config, ['any'] if config.head.name == 'annotator' else ())
    losses.check_head(loss_config(config), head)


def _has(config: Any, key: str) -> bool:
    try:
        _get(config, key)
    except (KeyError, TypeError):
        return False
    return True


def _get(config: Any, key: str) -> Any:
    for part in key.split('.'):
        config = config[part]
    return config
