"""The config of a run: all keys, with defaults, checks and comments, and what they describe.

`KEYS` is the complete config of the paper's experiment, GPT-2 on Anthropic's HH pairs. The files in
`configs/` state what they change of it. Values are checked once, before anything is loaded, and
turned into the frozen objects that the rest of the package takes.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from qrm.data import demo, formats, orders, tables, tokens, translate
from qrm.models import attention, families, lora, tuning
from qrm.models.architecture import Architecture
from qrm.models.families import FAMILIES
from qrm.models.lora import Lora
from qrm.models.network import DTYPES
from qrm.models.tuning import Tuning
from qrm.rewards import losses, selection
from qrm.rewards.heads import HEADS, HeadConfig
from qrm.training import devices, schema, step
from qrm.training.schema import (
    ANY,
    AT_LEAST_ONE,
    BELOW_ONE,
    LEVEL,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Each,
    Key,
    OneOf,
    Range,
    Table,
)

CENTRED = 'scalar_centred'  # a control of `reproduce`

_OBJECTIVE = OneOf(tuple(losses.OBJECTIVES))

KEYS: Table = {
    'seed': Key(
        0, NOT_NEGATIVE,
        'of parameters, batch order and dropout; the data have a seed of their own'),
    'workload': Key('helpful', ANY, 'what `train` trains on; `data.path` says which there are'),

    # --- Comparisons -----------------------------------------------------------------------------
    'data.path': Key(
        'Anthropic/hh-rlhf', ANY,
        "'demo', a file of rows (.jsonl, .json, either with .gz, .parquet), a folder with train "
        'and test files or of the HH layout, or a hub data set'),
    'data.format': Key(
        'auto', OneOf(('auto', 'rows', *formats.FORMATS)),
        "how rows say what is preferred, see `qrm data --formats`: 'rows' as they are read here, "
        "'auto' by the first of them"),
    'data.columns': Key(
        (), Each(str), "of rows whose keys are called otherwise, as ('prompt=question.text', "
        "'rating=score'); in place of data.format"),
    'data.votes': Key(
        'share', OneOf(translate.VOTES),
        "of several judges of a pair: 'share' of those who prefer a response, or a comparison of "
        "'each'"),
    'data.strengths': Key(
        'ignored', OneOf(translate.STRENGTHS),
        "by how much a response is preferred, in units of the format: 'ignored', or the 'margin'"),
    'data.cache': Key(
        'auto', ANY,
        "folder that keeps what is read and its tokens for the next start: 'auto', `qrm` in the "
        "user's cache folder ($XDG_CACHE_HOME or ~/.cache); '': nothing is kept"),
    'data.max_length': Key(
        0, NOT_NEGATIVE, "tokens of a dialogue with EOS; 0: the model's number of positions"),
    'data.overlong': Key(
        'truncate_prompt', OneOf(tokens.OVERLONG),
        "longer dialogues: 'truncate_prompt', 'drop' or 'error'"),
    'data.attributes': Key(
        (), Each(str), 'keys of rows that are ratings of attributes; (): of the whole response'),
    'data.append_eos': Key(
        True, ANY, "the reward is read at the last token: EOS, or the text's own last"),
    'data.as_chats': Key(
        False, ANY,
        'texts are read as chats, by the chat template: their turns are messages, a prompt without '
        'turns is one'),
    'data.validation_fraction': Key(
        0.05, Range(0, 1, open_low=True, open_high=True),
        'share of training prompts held out to choose a checkpoint'),
    'data.test_fraction': Key(
        0.1, Range(0, 1, open_low=True),
        'share of prompts held out where the source has no test split'),
    'data.max_malformed': Key(
        0.0, SHARE, 'share of the rows of a split that may be malformed, skipped and counted'),
    'data.demo.train': Key(
        4000, AT_LEAST_ONE, "pairs to learn from; this section is read if data.path is 'demo'"),
    'data.demo.test': Key(2000, AT_LEAST_ONE, 'pairs to evaluate on'),
    'data.demo.seed': Key(0, NOT_NEGATIVE, 'of the generated dialogues and judgements'),
    'data.demo.annotators': Key(
        'independent', OneOf(demo.ANNOTATORS),
        "'independent', one for each response; 'shared', 'panel': one for both"),

    # --- Model -----------------------------------------------------------------------------------
    'model.checkpoint': Key(
        'openai-community/gpt2', ANY,
        "Hugging Face folder or hub name; '': random weights of the sizes below"),
    'model.tokenizer': Key(
        '', ANY, "folder or hub name; '': the checkpoint's, or one trained on the data"),
    'model.chat_template': Key(
        '', ANY, "Jinja, or a file of it, in place of the tokenizer's chat template; '': that"),
    'model.pair_template': Key(
        '\n\n[A] {first}\n\n[B] {second}', ANY,
        'how the pairwise head reads two responses after their prompt'),
    'model.dtype': Key(
        'float32', OneOf(DTYPES),
        "of the computation, 'float32' or 'bfloat16'; parameters are float32"),
    'model.attention': Key(
        'auto', OneOf(attention.IMPLEMENTATIONS),
        "'auto', the fastest known for the device, or 'dense', 'tiled', 'pallas'"),
    'model.remat': Key(False, ANY, 'recompute blocks in the backward pass: slower, less memory'),
    'model.dropout': Key(
        0.0, BELOW_ONE, 'on embeddings, attention and residual branches while training'),
    # A scalar drawn with 1 has ten times the variance of a mean of ten quantiles drawn so, and a
    # short run keeps much of it.
    'model.initial_std': Key(
        0.01, NOT_NEGATIVE,
        "of the head's outputs on some training responses, with mean 0, before the first step; 0: "
        'kernels are drawn whatever hidden states are like'),
    'model.family': Key(
        'gpt2', OneOf(tuple(FAMILIES)),
        'what a model of random weights computes; this key and the sizes are read if there is no '
        'checkpoint'),
    'model.sizes.vocab_size': Key(
        50257, Range(1, 2**24),
        'tokens of the embedding, and of a tokenizer trained on the data'),
    'model.sizes.max_positions': Key(1024, Range(1, 2**24), 'longest dialogue, in tokens'),
    'model.sizes.hidden_size': Key(768, Range(1, 2**20), 'width'),
    'model.sizes.num_layers': Key(12, Range(1, 2**12), 'blocks'),
    'model.sizes.num_heads': Key(12, Range(1, 2**16), 'attention heads'),
    'model.sizes.num_kv_heads': Key(
        0, Range(0, 2**16), 'heads of keys and values; 0: as many as attention heads'),
    'model.sizes.head_dim': Key(0, Range(0, 2**16), 'of a head; 0: heads share the width'),
    'model.sizes.intermediate_size': Key(
        0, Range(0, 2**22), 'inner width of the perceptrons; 0: four times the width (gpt2)'),

    # --- Adapters, read if `train.tune` is 'lora' ------------------------------------------------
    'lora.rank': Key(16, Range(1, 2**16), 'r, of x A B beside a kernel'),
    'lora.alpha': Key(32.0, POSITIVE, 'x A B counts alpha / r'),
    'lora.rank_stabilised': Key(False, ANY, 'it counts alpha / sqrt(r) (rsLoRA)'),
    'lora.targets': Key(
        (lora.ALL,), Each(str),
        "'all-linear', or ends of names of linear maps in checkpoints of the family, as 'q_proj'"),

    # --- Head and loss ---------------------------------------------------------------------------
    'head.name': Key(
        'quantile', OneOf(HEADS),
        "'scalar', 'gaussian', 'categorical', 'quantile', 'monotone_quantile' (cannot cross), "
        "'implicit_quantile', 'annotator', or 'pairwise', which reads two responses together"),
    'head.num_quantiles': Key(
        10, Range(1, 2**12), 'N of the quantile heads, tau_i = (i + 0.5) / N'),
    'head.num_atoms': Key(21, Range(2, 2**12), 'of the categorical head, evenly spaced'),
    'head.atom_range': Key(
        5.0, POSITIVE, 'of the categorical head: atoms from -5 to 5, units of reward'),
    'head.num_cosines': Key(64, Range(1, 2**16), 'of tau, that the implicit quantile head reads'),
    'head.num_factors': Key(
        1, Range(1, 2**16), 'numbers in which annotators differ (annotator head)'),
    'head.bias': Key(False, ANY, 'a bias, which Bradley-Terry on means cannot move'),
    'head.reads': Key(
        ('last',), Each(str),
        "of hidden states: 'last' token, 'mean' over the response, 'dialogue' (over all of it), "
        "'first' (CLS of an encoder), each also after a block, 'mean@20'; of several, all"),
    'head.members': Key(
        1, Range(1, 2**10),
        'heads with parameters of their own, an ensemble if several: on one backbone they differ '
        'by where they begin alone, so give model.initial_std=1 if their disagreement is used'),
    # Objective of each head. From preferences: 'bradley_terry', 'bradley_terry_quantile_huber'
    # (the paper's), 'distributional_bradley_terry', 'posterior_quantile_regression',
    # 'plackett_luce', 'thurstone' and 'quantile_bradley_terry' (a control); from ratings:
    # 'ratings_pinball', 'ratings_quantile_huber', 'ratings_crps', 'ratings_ordinal'; from
    # preferences of named annotators: 'annotator_bradley_terry'; of pairs that are read together:
    # 'pairwise_cross_entropy'. `losses.OBJECTIVES` says which can train which head.
    'loss.scalar': Key(
        'bradley_terry', _OBJECTIVE, 'objective of the scalar head; `losses.OBJECTIVES` has all'),
    'loss.gaussian': Key('distributional_bradley_terry', _OBJECTIVE, 'of the Gaussian head'),
    'loss.categorical': Key('distributional_bradley_terry', _OBJECTIVE, 'of the categorical head'),
    'loss.quantile': Key(
        'bradley_terry_quantile_huber', _OBJECTIVE, "of the quantile head: the paper's"),
    'loss.monotone_quantile': Key(
        'distributional_bradley_terry', _OBJECTIVE, 'of the monotone quantile head'),
    'loss.implicit_quantile': Key(
        'distributional_bradley_terry', _OBJECTIVE, 'of the implicit quantile head'),
    'loss.annotator': Key('annotator_bradley_terry', _OBJECTIVE, 'of the annotator head'),
    'loss.pairwise': Key('pairwise_cross_entropy', _OBJECTIVE, 'of the pairwise head'),
    'loss.targets': Key(
        'label', OneOf(losses.TARGETS),
        "of the quantile Huber loss: 'label', +1 and -1, 'margin', 'teacher' (control), or "
        "'own_mean' (as the paper's authors ran it)"),
    'loss.huber_weight': Key(0.1, NOT_NEGATIVE, 'lambda, weight of the quantile Huber loss'),
    'loss.huber_sides': Key(
        'both', OneOf(losses.HUBER_SIDES), "whose quantiles it acts on, 'both' or 'chosen'"),
    'loss.pair_epsilon': Key(
        0.0, NOT_NEGATIVE,
        'added to the probability inside of the logarithm of Bradley-Terry; 0: none'),
    'loss.kappa': Key(1.0, POSITIVE, 'threshold of the Huber loss, in units of reward'),
    'loss.ema_decay': Key(0.99, BELOW_ONE, "of the teacher's parameters, a moving average"),
    'loss.thresholds': Key(
        (), Each(float),
        "that part ratings into classes, which 'ratings_ordinal' learns; beside preferences, of "
        'the Gaussian head, rated responses are anchors'),
    'loss.anchor_weight': Key(
        1.0, NOT_NEGATIVE, "weight of an annotator's ratings, or of classes, beside preferences"),
    'loss.label_smoothing': Key(
        0.0, Range(0, 0.5, open_high=True), 'share of preferences taken to be the wrong way round'),
    'loss.centre_weight': Key(
        0.0, NOT_NEGATIVE,
        'weight of (r_chosen + r_rejected)^2, which keeps rewards around 0; of the pairwise head, '
        'of the square of what it gives the first place'),
    'loss.entropy_weight': Key(0.0, NOT_NEGATIVE, 'weight of the entropy of categorical rewards'),
    'loss.lm_weight': Key(
        0.0, NOT_NEGATIVE, 'weight of the language-model loss on the preferred response'),

    # --- Optimisation ----------------------------------------------------------------------------
    'optimizer.name': Key('adamw', OneOf(step.OPTIMIZERS), "'adamw' or 'sgd'"),
    'optimizer.learning_rate': Key(1e-5, NOT_NEGATIVE, 'peak'),
    'optimizer.schedule': Key(
        'cosine', OneOf(step.SCHEDULES),
        "after warm-up: 'cosine', 'linear', 'constant' or 'inverse_sqrt'"),
    'optimizer.warmup_fraction': Key(0.03, SHARE, 'share of the run over which the rate rises'),
    'optimizer.warmup_floor': Key(
        0.0, SHARE, 'share of the peak below which the rate is at no time of the warm-up'),
    'optimizer.final_fraction': Key(0.0, SHARE, 'cosine, linear: share of the peak at the end'),
    'optimizer.b1': Key(0.9, BELOW_ONE, 'AdamW: decay of the mean of gradients'),
    'optimizer.b2': Key(0.95, BELOW_ONE, 'AdamW: decay of the mean of squared gradients'),
    'optimizer.eps': Key(1e-8, POSITIVE, 'AdamW: added to the root of the second moment'),
    'optimizer.weight_decay': Key(0.0, NOT_NEGATIVE, 'AdamW: on matrices, not on norms and biases'),
    'optimizer.clip_norm': Key(1.0, NOT_NEGATIVE, 'largest norm of the gradient; 0: no clipping'),

    # --- Training --------------------------------------------------------------------------------
    'train.tune': Key(
        'all', ANY,
        "what is trained: 'all'; 'lora', adapters and the head; 'last:N', the last N blocks, the "
        "final norm and the head; 'head', on hidden states that are computed once"),
    'train.frozen_dtype': Key(
        'float32', OneOf(DTYPES), 'of tables and kernels that are not trained, in memory'),
    'train.features': Key(
        '', ANY,
        "folder that keeps the hidden states of tune='head', which runs may share; '': `features` "
        "in the run's own"),
    'train.batch_size': Key(64, AT_LEAST_ONE, 'comparisons a step, over all devices'),
    'train.epochs': Key(
        1.0, POSITIVE, "passes over the training comparisons; the run's last step may be short"),
    'train.max_steps': Key(0, NOT_NEGATIVE, 'ends the run early; 0: no limit'),
    'train.row_length': Key(
        1024, AT_LEAST_ONE, 'tokens of a packed row, or more where a dialogue needs them'),
    'train.rows': Key(
        1, AT_LEAST_ONE, 'rows of a micro-batch on one device; a step runs as many as it needs'),
    'train.sharding': Key(
        'replicated', OneOf(devices.MODES),
        "state on several devices: 'replicated', a copy on each, or 'fsdp', in shards"),
    'train.tensor': Key(
        1, AT_LEAST_ONE,
        "'fsdp': devices of a tensor group, which compute each block together, a part each"),
    'train.checkpoint_every': Key(
        100, AT_LEAST_ONE, 'steps between held-out evaluations, each with a checkpoint'),
    'train.keep': Key(2, AT_LEAST_ONE, 'last checkpoints to keep, beside the best'),
    'train.log_every': Key(
        10, AT_LEAST_ONE, 'steps between fetching metrics from the device and writing them'),
    'train.tensorboard': Key(False, ANY, 'also write TensorBoard files (needs tensorboardX)'),

    # --- Evaluation and analysis -----------------------------------------------------------------
    'evaluation.checkpoint': Key(
        'best', OneOf(('best', 'last')), "'best' by the held-out loss, or 'last'"),
    'evaluation.candidates': Key(
        '', ANY, "JSON Lines file of prompt + responses whose win rate is asked for; '': none"),
    'evaluation.references': Key('', ANY, 'the same with responses that they are judged against'),
    'evaluation.exchanged': Key(
        1000, NOT_NEGATIVE,
        'test comparisons that are scored with the prompts of others too, to see whether prompts '
        'are read; 0: none'),
    'evaluation.rules': Key(
        ('mean', 'quantile:0.1', 'cvar:0.2', 'mean-std:1'), Each(str),
        "by which to choose among rated responses: 'mean', 'quantile:tau', 'cvar:alpha' (mean "
        "of the lowest share), 'mean-std:k'"),
    'analysis.bootstrap': Key(300, Range(20), 'replicates of the prompt-clustered bootstrap'),
    'analysis.null_draws': Key(300, Range(20), 'draws of the within-pair swap null'),
    'analysis.level': Key(0.95, LEVEL, 'of the intervals'),
    'analysis.seed': Key(0, NOT_NEGATIVE, 'of the resampling'),

    # --- Which models `reproduce` trains ---------------------------------------------------------
    'reproduce.workloads': Key(('helpful', 'harmless'), Each(str), 'in place of `workload`'),
    'reproduce.models': Key(
        ('scalar', CENTRED, 'quantile'), Each(str, OneOf((*HEADS, CENTRED))),
        'heads, in place of `head.name`, and a control, see `set_model`'),
}


def build(changes: Mapping[str, Any], arg: str = '', more: Table | None = None) -> ConfigDict:
    """The complete, locked config of a run, for the `get_config` of a config file.

    Args:
      changes: values that differ from the defaults, by dotted name.
      arg: '', or 'workload,model' to train only those; either may be empty.
      more: further keys, of a study.

    Raises:
      ConfigError: a change of a key that does not exist.
    """
    workload, _, model = arg.partition(',')
    chosen = {'workload': workload, 'reproduce.workloads': (workload,)} if workload else {}
    chosen |= {'reproduce.models': (model,)} if model else {}
    config = schema.build({**KEYS, **(more or {})}, {**changes, **chosen})
    if model:
        set_model(config, model)
    return config


def set_model(config: Any, name: str) -> None:
    """Makes a config that of a head, or of the control 'scalar_centred', see `centre_weight`.

    Raises:
      ConfigError: there is no such control beside this objective.
    """
    config.head.name = 'scalar' if name == CENTRED else name
    if name == CENTRED:
        config.loss.centre_weight = centre_weight(config)


def centre_weight(config: Any) -> float:
    """`loss.centre_weight` that pulls a scalar towards 0 as the quantile head is.

    On equal quantiles the quantile Huber loss with targets +1 and -1 is, within kappa of them,
    lambda N / 4 ((1 - c)^2 + (1 + r)^2) = lambda N / 8 ((c + r)^2 + (2 - (c - r))^2). This is the
    weight of the first part; the control has nothing of the second.

    Raises:
      ConfigError: the objective of the quantile head has no such part.
    """
    loss = config.loss
    if (loss.quantile, loss.targets, loss.huber_sides) != (
            'bradley_terry_quantile_huber', 'label', 'both') or not loss.huber_weight:
        raise schema.ConfigError(
            f'config.reproduce.models: {CENTRED!r} beside a quantile head that is not pulled '
            "towards 0, expected loss.targets='label', huber_sides='both' and a huber_weight")
    return loss.huber_weight * config.head.num_quantiles / 8.0


def check(config: Any, more: Table | None = None) -> None:
    """Checks that a config is complete, and all of its values.

    Args:
      config: of a run.
      more: keys that it has beside those of every run, of a study.

    Raises:
      ConfigError: names keys that are missing or unknown, or lists every value that cannot be used.
    """
    schema.check(config, {**KEYS, **(more or {})})
    problems = []
    if bool(config.evaluation.candidates) != bool(config.evaluation.references):
        problems.append('config.evaluation: candidates and references, expected both or neither')
    for section, use in (('data.columns', _check_columns), ('head', _check_head),
                         ('model.pair_template', _check_pair_template),
                         ('model.sizes', architecture), ('train.tune', _check_tune),
                         ('train.tensor', check_tensor), ('evaluation.rules', _check_rules)):
        try:
            use(config)
        except ValueError as error:
            problems.append(f'config.{section}: {error}')
    schema.raise_all(problems)


_PATHS = ('data.path', 'data.cache', 'model.checkpoint', 'model.tokenizer', 'model.chat_template',
          'train.features', 'evaluation.candidates', 'evaluation.references')


_NAMES = (('data.path', 'demo'), ('data.cache', tables.AUTO))  # whatever stands in the folder


def absolute(config: Any) -> Any:
    """The same config with absolute paths of files and folders, so that it holds everywhere."""
    found, values = copy.deepcopy(config), dict(schema.flatten(config, {}))
    found.update_from_flattened_dict({
        key: os.path.abspath(values[key]) for key in _PATHS
        # What does not exist may be a name on the hub, but for folders to write into.
        if values.get(key) and (key, values[key]) not in _NAMES
        and (os.path.exists(values[key]) or key in ('data.cache', 'train.features'))})
    return found


def random_settings(config: Any) -> dict[str, Any]:
    """Settings, as of a `config.json`, of a model that starts without a checkpoint."""
    return families.random_settings(config.model.family, dict(config.model.sizes))


def architecture(config: Any) -> Architecture:
    """What a model that starts without a checkpoint computes.

    Raises:
      ValueError: the sizes make none.
    """
    return families.architecture(random_settings(config), f'family {config.model.family!r}')


def tuning_config(config: Any, settings: Mapping[str, Any]) -> Tuning:
    """What the config says is trained of a model with these settings.

    Raises:
      ValueError: blocks or targets that the model does not have; begins with the key.
    """
    kind, blocks = tuning.parse(config.train.tune)
    a = families.architecture(settings)
    if blocks > a.num_layers:
        raise ValueError(f'train.tune={config.train.tune!r}, of {a.num_layers} blocks that there '
                         'are')
    if kind != 'lora':
        return Tuning(kind, blocks)
    family = families.family_of(settings, 'config.model')
    try:
        modules = lora.targeted(family, a, config.lora.targets)
    except ValueError as error:
        raise ValueError(f'lora.targets: {error}') from error
    return Tuning(kind, lora=Lora(config.lora.rank, config.lora.alpha,
                                  config.lora.rank_stabilised, modules))


def head_config(config: Any, annotators: Sequence[str] = ()) -> HeadConfig:
    """The head that the config describes, for annotators of these names."""
    return HeadConfig(**config.head, attributes=config.data.attributes,
                      annotators=tuple(annotators))


def loss_config(config: Any) -> losses.LossConfig:
    """The loss of the configured head."""
    rest = {key: value for key, value in config.loss.items() if key not in HEADS}
    return losses.LossConfig(objective=config.loss[config.head.name], **rest)


def check_tune(config: Any) -> str:
    """What is trained, see `Tuning.kind`, of any kind of run.

    Raises:
      ValueError: it is nothing of that kind, or does not go with other keys.
    """
    kind, _ = tuning.parse(config.train.tune)
    if kind == 'all' and config.train.frozen_dtype != 'float32':
        raise ValueError(f"'all' with train.frozen_dtype={config.train.frozen_dtype!r}, expected "
                         "'float32': nothing is frozen")
    if kind == 'lora' and not config.lora.targets:
        raise ValueError("'lora' with lora.targets=(), expected at least one")
    return kind


def check_tensor(config: Any) -> None:
    """Checks that tensor groups are of a state in shards.

    Raises:
      ValueError: they are not.
    """
    if config.train.tensor > 1 and config.train.sharding != 'fsdp':
        raise ValueError(f"{config.train.tensor} with train.sharding='{config.train.sharding}', "
                         "expected 1, or 'fsdp'")


def check_columns(config: Any, attributes: Sequence[str] = ()) -> None:
    """Checks how rows are read.

    Raises:
      ValueError: names of columns that are none, or that go beside a format.
    """
    translate.parse_columns(config.data.columns, attributes)
    if config.data.columns and config.data.format not in ('auto', 'rows'):
        raise ValueError(f'{tuple(config.data.columns)} beside data.format='
                         f'{config.data.format!r}, expected one of the two')


def _check_tune(config: Any) -> None:
    kind = check_tune(config)
    if kind != 'head' and config.train.features:
        raise ValueError(f'{config.train.tune!r} with train.features, expected \'\': only '
                         "'head' keeps any")
    for key, value in (('model.dropout', config.model.dropout),
                       ('loss.lm_weight', config.loss.lm_weight)):
        if kind == 'head' and value:
            raise ValueError(f"'head' with {key}={value}, expected 0: it does not reach the head")
    if kind == 'head' and config.train.sharding != 'replicated':
        raise ValueError("'head' with train.sharding='fsdp', expected 'replicated': a head is not "
                         'worth splitting')


def _check_columns(config: Any) -> None:
    check_columns(config, config.data.attributes)


def _check_pair_template(config: Any) -> None:
    orders.check_template(config.model.pair_template)


def _check_rules(config: Any) -> None:
    for text in config.evaluation.rules:
        selection.parse_rule(text, selection.DISTRIBUTION_KINDS)


def _check_head(config: Any) -> None:
    # Which annotators there are, the data say.
    head = head_config(config, ['any'] if config.head.name == 'annotator' else ())
    losses.check_head(loss_config(config), head)
