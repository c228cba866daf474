"""Checks of a config, and the objects its sections describe.

Configs are complete `ml_collections` files in `configs/`; here each value is checked once,
before anything is loaded, and turned into the frozen objects the rest of the package takes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qrm import attention, demo, devices, losses, step, tokens
from qrm.backbone import DecoderConfig
from qrm.heads import HEADS, HeadConfig
from qrm.network import DTYPES


class ConfigError(ValueError):
    """A config value that cannot be used; the message names the key and what was expected."""


_POSITIVE, _NOT_NEGATIVE = (1e-300, math.inf), (0, math.inf)
_RANGES = {
    'seed': _NOT_NEGATIVE,
    'data.max_length': _NOT_NEGATIVE,
    'data.validation_fraction': (1e-300, 1 - 1e-9),
    'data.test_fraction': (1e-300, 1),
    'data.max_malformed': (0, 1),
    'data.demo.train': (1, math.inf),
    'data.demo.test': (1, math.inf),
    'data.demo.seed': _NOT_NEGATIVE,
    'model.dropout': (0, 1 - 1e-9),
    'head.num_quantiles': (1, math.inf),
    'head.num_atoms': (2, math.inf),
    'head.atom_range': _POSITIVE,
    'head.num_cosines': (1, math.inf),
    'head.num_factors': (1, math.inf),
    'head.members': (1, math.inf),
    'loss.huber_weight': _NOT_NEGATIVE,
    'loss.kappa': _POSITIVE,
    'loss.ema_decay': (0, 1 - 1e-9),
    'loss.anchor_weight': _NOT_NEGATIVE,
    'loss.label_smoothing': (0, 0.5 - 1e-9),
    'loss.centre_weight': _NOT_NEGATIVE,
    'loss.entropy_weight': _NOT_NEGATIVE,
    'loss.lm_weight': _NOT_NEGATIVE,
    'optimizer.learning_rate': _NOT_NEGATIVE,
    'optimizer.warmup_fraction': (0, 1),
    'optimizer.final_fraction': (0, 1),
    'optimizer.b1': (0, 1 - 1e-9),
    'optimizer.b2': (0, 1 - 1e-9),
    'optimizer.eps': _POSITIVE,
    'optimizer.weight_decay': _NOT_NEGATIVE,
    'optimizer.clip_norm': _NOT_NEGATIVE,
    'train.batch_size': (1, math.inf),
    'train.epochs': _POSITIVE,
    'train.max_steps': _NOT_NEGATIVE,
    'train.row_length': (1, math.inf),
    'train.rows': (1, math.inf),
    'train.checkpoint_every': (1, math.inf),
    'train.keep': (1, math.inf),
    'train.log_every': (1, math.inf),
    'analysis.bootstrap': (20, math.inf),
    'analysis.null_draws': (20, math.inf),
    'analysis.level': (0.5, 1 - 1e-9),
    'analysis.seed': _NOT_NEGATIVE,
}
_BENCHMARK_RANGES = {  # of a section that only the config of a benchmark has
    'benchmark.repeats': (1, math.inf),
    'benchmark.steps': (1, math.inf),
    'benchmark.comparisons': (1, math.inf),
    'benchmark.scored': (1, math.inf),
    'benchmark.responses': _NOT_NEGATIVE,
    'benchmark.prompt': _NOT_NEGATIVE,
    'benchmark.response': (1, math.inf),
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


def range_problems(config: Any, ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """A line for each number of a config that is outside its range.

    Args:
      config: whose keys are asked for.
      ranges: dotted key -> least and largest value.
    """
    problems = []
    for key, (low, high) in ranges.items():
        value = _get(config, key)
        if isinstance(value, bool) or not (math.isfinite(value) and low <= value <= high):
            expected = 'a number above 0' if low == 1e-300 and high == math.inf else (
                f'a number from {low:.4g} to {high:.4g}')
            problems.append(f'config.{key}={value!r}, expected {expected}')
    return problems


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
