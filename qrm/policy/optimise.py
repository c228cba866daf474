"""Online optimisation of a policy: it answers prompts, and learns from the rewards of its answers.

    for each iteration:
      answer the next prompts, K times each, with the policy as it is      (rollouts)
      rewards; log-probabilities under policy and reference                (scoring, rollouts)
      advantages                                                           (algorithms.shape)
      `epochs` passes over the rollout, in steps of `train.batch_size` prompts, each the step of
      `training.step` on the loss of `algorithms.Improvement`

Which prompts an iteration has, what is drawn, and the order of its steps are pure functions of
the seed and of numbers. A checkpoint has the rollout that its next step is of, so that a run that
goes on ends bit for bit where an uninterrupted one does.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qrm.data import packing, sources
from qrm.data.comparisons import DataError, DataReport, check_malformed
from qrm.data.encoded import Encoded
from qrm.data.seen import Seen
from qrm.data.tokens import Tokenizer
from qrm.models.architecture import Architecture
from qrm.models.network import Params, parameter_count
from qrm.policy import algorithms, batches, config, objectives, rollouts, runs, scoring
from qrm.policy.algorithms import Algorithm, Carried, Improvement, Rolled, Shaped
from qrm.policy.batches import Extended, Plan
from qrm.policy.monitor import format_rows
from qrm.policy.network import PolicyNetwork
from qrm.policy.objectives import Moments
from qrm.policy.rollouts import Answers, Prompts
from qrm.policy.rules import RULES, Rules
from qrm.policy.sampling import Sampling
from qrm.policy.scoring import Judge, Reward
from qrm.policy.watch import CRITERION, FILE, TOLD, Bench, Watch
from qrm.training import config as config_lib
from qrm.training import initial, inputs, loop, saved, schema, workdir
from qrm.training.devices import Spread
from qrm.training.initial import Initial
from qrm.training.loop import Course, Fed, Outcome
from qrm.training.schema import (
    ANY,
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    ConfigError,
    Each,
    Key,
    OneOf,
    Range,
    Table,
    raise_all,
)

_KL = OneOf(('', *objectives.KL_ESTIMATORS))
_RULES = {
    'window': 'evaluations of a trend', 'errors': 'standard errors beyond which something changed',
    'kl_most': 'nats a response', 'kl_growth': 'nats a response in a window',
    'length_factor': 'by which lengths change, above 1', 'entropy_share': 'of the first entropy',
    'repetition': 'share of n-grams', 'truncation': 'share of responses',
    'blanks': 'share of responses', 'refusals': 'share of responses',
    'stop': 'rules that end a run',
    'patience': 'evaluations in a row at which those of `stop` hold'}
_ANALYSIS = ('analysis.bootstrap', 'analysis.level', 'analysis.seed')

KEYS: Table = config.KEYS | {
    'train.batch_size': config.KEYS['train.batch_size']._replace(
        default=32, comment='prompts a step, with all their responses, over all devices'),
    'train.epochs': config.KEYS['train.epochs']._replace(
        comment='passes over the training prompts, rounded up to whole iterations'),
    'train.checkpoint_every': config.KEYS['train.checkpoint_every']._replace(default=16),

    # --- Rollouts --------------------------------------------------------------------------------
    'rollouts.prompts': Key(64, AT_LEAST_ONE, 'prompts that are answered in an iteration'),
    'rollouts.samples': Key(4, AT_LEAST_ONE, 'K, responses to each'),
    'rollouts.max_new_tokens': Key(
        64, AT_LEAST_ONE, 'of the longest response; prompt and response have data.max_length'),
    'rollouts.rows': Key(
        16, AT_LEAST_ONE, 'responses that grow at once, which has no influence on what they are'),

    # --- Reward ----------------------------------------------------------------------------------
    'reward.source': Key(
        '', ANY, "what is optimised: a run or reward model, 'module:function', http(s)://... of a "
        "server, a judge of pairs, 'language-model:...', 'endpoint:...' or 'function:...', or "
        "'gold' (of the demo)"),
    'reward.token_variable': Key(
        '', ANY, "environment variable with the bearer token of a server; '': it wants none"),
    'reward.rule': Key('mean', ANY, 'what of the distribution of a reward model is the reward'),
    'reward.aggregate': Key('', ANY, "of a pairwise model, see `qrm.reward`; '': its default"),
    'reward.judge': Key(
        '', ANY, "who says whether held-out answers are better than the reference's: a reward "
        "model, a judge of pairs as above, or 'gold'; '': the reward itself"),

    # --- Algorithm -------------------------------------------------------------------------------
    'algorithm.name': Key(
        'ppo', OneOf(algorithms.NAMES),
        "'ppo', 'grpo', 'rloo', 'expert_iteration' (maximum likelihood of the best of K), or "
        "'best_of_n', which trains nothing"),
    'algorithm.epochs': Key(2, AT_LEAST_ONE, 'passes over a rollout'),
    'algorithm.clip_low': Key(0.2, SHARE, 'the ratio counts from 1 - this on; 1: no bound'),
    'algorithm.clip_high': Key(0.2, NOT_NEGATIVE, 'and up to 1 + this'),
    'algorithm.beta': Key(0.05, NOT_NEGATIVE, 'weight of the KL to the reference, reward per nat'),
    'algorithm.kl_reward': Key(
        'k1', _KL, "estimator of the KL that is subtracted from rewards; '': it is not"),
    'algorithm.kl_loss': Key('', _KL, "estimator of the KL that is added to the loss; '': it is "
                             'not'),
    'algorithm.kl_corrected': Key(
        False, ANY, 'that of the loss is multiplied by the ratio to the policy that sampled'),
    'algorithm.kl_target': Key(
        0.0, NOT_NEGATIVE, 'nats a response, which beta is adapted to; 0: beta stays as it is'),
    'algorithm.kl_horizon': Key(
        10000.0, POSITIVE, 'responses in which an error of 100% would double beta'),
    'algorithm.scale': Key(
        'none', OneOf(algorithms.SCALES),
        "rewards are divided by a standard deviation: of the iteration's, 'batch', or of all so "
        "far, 'running'"),
    'algorithm.centre': Key(False, ANY, 'ppo: the mean of the same rewards is subtracted'),
    'algorithm.whiten': Key(True, ANY, 'ppo: advantages have mean 0 and std 1 over the iteration'),
    'algorithm.divide_by_std': Key(True, ANY, 'grpo: advantages are divided by the std of a group'),
    'algorithm.aggregation': Key(
        'token', OneOf(objectives.AGGREGATIONS),
        "what a token weighs: 1 / all tokens, 'token', 1 / (responses x own length), 'sequence', "
        "or 1 / (responses x rollouts.max_new_tokens), 'constant'"),
    'algorithm.truncated': Key(
        'penalty', OneOf(algorithms.TRUNCATED),
        "of responses without a stop: the 'penalty' is subtracted from their reward, the 'mask' "
        "leaves them out of losses, groups and statistics, 'keep' does nothing"),
    'algorithm.truncation_penalty': Key(1.0, NOT_NEGATIVE, 'in units of the raw reward'),
    'algorithm.gamma': Key(1.0, SHARE, 'ppo: discount of a token'),
    'algorithm.gae_lambda': Key(0.95, SHARE, 'ppo: 1: returns less values; 0: one step'),
    'algorithm.value_weight': Key(0.1, NOT_NEGATIVE, "ppo: of the value head's loss"),
    'algorithm.value_clip': Key(
        0.2, POSITIVE, 'ppo: distance to old values beyond which nothing is gained, in units of '
        'the scaled reward'),
    'algorithm.entropy_weight': Key(0.0, NOT_NEGATIVE, 'of the entropy bonus'),

    # --- Evaluation ------------------------------------------------------------------------------
    'evaluation.prompts': Key(
        64, Range(0), 'held-out prompts that are answered at each evaluation; 0: all'),
    'evaluation.samples': Key(1, AT_LEAST_ONE, 'responses to each'),
    **{f'monitor.{field.name}': Key(
        field.default, Each(str, OneOf(RULES)) if field.name == 'stop' else ANY,
        f'{_RULES[field.name]}, see `rules.Rules`') for field in dataclasses.fields(Rules)},
    **{name: config_lib.KEYS[name] for name in _ANALYSIS},
}

# What an algorithm changes of the defaults, which are those of PPO.
CHANGES: dict[str, dict[str, Any]] = {
    'ppo': {},
    'grpo': {'algorithm.kl_reward': '', 'algorithm.kl_loss': 'k3', 'algorithm.beta': 0.04,
             'algorithm.aggregation': 'sequence', 'algorithm.epochs': 1},
    'rloo': {'algorithm.aggregation': 'constant', 'algorithm.epochs': 1},
    'expert_iteration': {'algorithm.kl_reward': '', 'algorithm.beta': 0.0},
    'best_of_n': {'evaluation.samples': 16},
}
_GROUPED = ('grpo', 'rloo', 'expert_iteration')
# Settings that not all algorithms read.
_OF_ALGORITHMS = dict.fromkeys(('clip_low', 'clip_high'), ('ppo', 'grpo', 'rloo')) | dict.fromkeys(
    ('centre', 'whiten', 'gamma', 'gae_lambda', 'value_weight', 'value_clip'), ('ppo',)) | {
    'divide_by_std': ('grpo',)}


class Prepared(NamedTuple):
    """What a run starts from.

    Attributes:
      how: the algorithm.
      tokenizer: of the policy.
      stops: tokens that end its answers.
      prompts: 'train', 'validation' -> those.
      reports: split -> what became of the rows.
      seen: by which the training comparisons are recognised.
      initial: the policy before the first step.
      reference: the same as network and parameters, which stay.
      reward: what is optimised.
      judge: of held-out answers.
    """

    how: Algorithm
    tokenizer: Tokenizer
    stops: tuple[int, ...]
    prompts: dict[str, Prompts]
    reports: dict[str, DataReport]
    seen: Seen
    initial: Initial
    reference: tuple[PolicyNetwork, Params]
    reward: Reward
    judge: Judge


def check(values: Any) -> None:
    """Checks a config, see `config.check`."""
    config.check(values, KEYS)
    config.check_margins(values, used=False)
    problems = []
    for section, use in (('algorithm', algorithm), ('monitor', rules)):
        try:
            use(values)
        except ValueError as error:
            problems.append(f'config.{section}.{error}')
    if not values.reward.source:
        problems.append("config.reward.source='', expected what is to be optimised")
    if values.model.dropout:
        problems.append(f'config.model.dropout={values.model.dropout}, expected 0: ratios are to '
                        'the policy that sampled')
    if values.data.overlong != config.KEYS['data.overlong'].default:
        problems.append(f'config.data.overlong={values.data.overlong!r}, expected '
                        f"{config.KEYS['data.overlong'].default!r}: prompts that are too long lose "
                        'their left end, and are counted')
    if values.algorithm.name in _GROUPED and values.rollouts.samples < 2:
        problems.append(f'config.rollouts.samples={values.rollouts.samples}, expected at least 2 '
                        f'of {values.algorithm.name}, which compares the answers to a prompt')
    problems += without_truth(values) + _unread(values)
    responses = values.rollouts.prompts * values.rollouts.samples
    if values.algorithm.kl_target and values.algorithm.kl_horizon <= 0.2 * responses:
        problems.append(f'config.algorithm.kl_horizon={values.algorithm.kl_horizon}, expected more '
                        f'than {0.2 * responses:g}, a fifth of the responses of an iteration: beta '
                        'would become 0 or less')
    if values.train.sharding != 'replicated':
        problems.append(f"config.train.sharding={values.train.sharding!r}, expected 'replicated': "
                        'a policy that is split answers nothing')
    raise_all(problems)


def without_truth(values: Any) -> list[str]:
    """What is wrong with asking for the gold reward, of any other data than the demo."""
    if values.data.path == sources.DEMO:
        return []
    return [f'config.reward.{key}={scoring.GOLD!r} with config.data.path={values.data.path!r}, '
            'expected another: the truth is known of the demo alone'
            for key in ('source', 'judge') if values.reward[key] == scoring.GOLD]


def _unread(values: Any) -> list[str]:
    """Settings of the algorithm that were changed and that nothing reads."""
    section, name = values.algorithm, values.algorithm.name
    read = {key: name in names for key, names in _OF_ALGORITHMS.items()} | {
        key: bool(section[other]) for key, other in (
            ('kl_corrected', 'kl_loss'), ('kl_horizon', 'kl_target'))} | {
        'truncation_penalty': section.truncated == 'penalty'}
    if name == 'best_of_n':
        read = dict.fromkeys(set(section) - {'name'}, False)
    unread = [f'algorithm.{key}' for key, use in read.items() if not use]
    if name == 'best_of_n':  # of `evaluation.samples`
        unread += ['rollouts.prompts', 'rollouts.samples']
    found, given = [], dict(schema.flatten(values, {}))
    for key in sorted(unread):
        default = CHANGES[name].get(key, KEYS[key].default)
        if given[key] != default:
            found.append(f'config.{key}={given[key]!r}, expected {default!r}: nothing reads it '
                         f'with the other settings of algorithm {name!r}')
    return found


def algorithm(values: Any) -> Algorithm:
    """The algorithm of a config.

    Raises:
      ValueError: settings that do not go together; begins with the key.
    """
    section = {key: value for key, value in values.algorithm.items() if key != 'epochs'}
    constant = values.algorithm.aggregation == 'constant'
    return Algorithm(**section, length=values.rollouts.max_new_tokens if constant else 0)


def rules(values: Any) -> Rules:
    """The rules of a config.

    Raises:
      ValueError: a number out of range; begins with the key.
    """
    return Rules(**values.monitor)


def train(values: Any, folder: str) -> Outcome | None:
    """Optimises a policy in a folder; goes on where an earlier run there stopped.

    Args:
      values: the config.
      folder: the workdir.

    Returns:
      See `loop.run`; None if the algorithm trains nothing.

    Raises:
      ConfigError, DataError, WorkdirError: the run cannot start, or a reward cannot be had.
      NonFiniteLoss: the run cannot go on; the last checkpoint is from before.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    check(values)
    if jax.process_count() > 1:
        raise ConfigError(f'{jax.process_count()} processes, expected one: it may have several '
                          'devices')
    values = _absolute(values)
    # What evaluations ask is what their rows are of.
    free = [key for key in workdir.FREE_KEYS if key != 'evaluation.']
    with loop.held(values, folder, gives_way=not _tabulated(folder), free=free):
        prepared = prepare(values, folder)
        start, known = prepared.initial, {
            split: prompts.encoded() for split, prompts in prepared.prompts.items()}
        identity = loop.identify(values, start.base, known) | {
            'reward': prepared.reward.digest, 'judge': prepared.judge.digest}
        loop.check_same_run(folder, identity)
        print(inputs.format_reports(prepared.reports), flush=True)
        watch = Watch(folder, bench(
            values, prepared.prompts['validation'], prepared.tokenizer, prepared.stops,
            prepared.reference, prepared.reward, prepared.judge))
        workdir.claim(folder, values)
        loop.record(folder, prepared.reports, prepared.seen)
        if prepared.how.name == 'best_of_n':
            counts = [n for n in 2 ** np.arange(16) if n < values.evaluation.samples]
            print(format_rows(watch.best_of([*map(int, counts), values.evaluation.samples])))
            return None
        saved.describe(folder, start.network, start.settings, start.base, prepared.tokenizer,
                       {'stops': prepared.stops})
        try:
            outcome = loop.run(values, folder, _course(values, prepared, watch), identity)
        finally:
            watch.draw()
        if line := watch.verdict():
            print(line, flush=True)
        return outcome


def prepare(values: Any, folder: str) -> Prepared:
    """Loads prompts, tokenizer, the policy and the reward.

    Raises:
      ConfigError, DataError, WorkdirError: see `train`.
    """
    how = algorithm(values)
    network, settings = runs.describe_network(values, value=how.valued)
    longest = room(values, network.architecture)
    section = runs.without_attributes(values.data)
    source = sources.read(section, values.workload)
    splits = sources.divide(source, section)
    reports = {split: report for split, (_, report) in splits.items() if split != 'test'}
    check_malformed(reports.values(), values.data.max_malformed)
    tokenizer = inputs.find_tokenizer(values, folder, splits['train'][0], network.architecture)
    prompts = {split: rollouts.prompts_of(splits[split][0], report, tokenizer, longest,
                                          as_chats=values.data.as_chats)
               for split, report in reports.items()}
    for split, own in prompts.items():
        rollouts.check_room(own, split)
    prompts['validation'] = asked(values, prompts['validation'], reports['validation'])
    reward, judge = rewards(values)
    compared = 'evaluation' if how.name == 'best_of_n' else 'rollouts'
    if reward.compares and values[compared].samples < 2:
        raise ConfigError(f'config.{compared}.samples={values[compared].samples}, expected at '
                          f'least 2 with {reward.source}, which compares the answers to a prompt')
    found = initial.start(values, network, settings)
    if found.pretrained and found.pretrained.head is not None:
        raise DataError(f'{values.model.checkpoint}: has a reward head, expected a language model')
    return Prepared(how, tokenizer, runs.stops(values, tokenizer), prompts, reports,
                    Seen.of(source.digest, splits['train'][0]), found,
                    rollouts.reference(network, found.trained, found.frozen), reward, judge)


def room(values: Any, architecture: Architecture) -> int:
    """Tokens of the longest prompt.

    Raises:
      ConfigError: there is none.
    """
    positions, new = architecture.max_positions, values.rollouts.max_new_tokens
    longest = (values.data.max_length or positions) - new
    if not 0 < longest <= positions - new:
        raise ConfigError(f'config.data.max_length={values.data.max_length} with config.rollouts.'
                          f'max_new_tokens={new}, but the model has {positions} positions; '
                          'expected room for a prompt')
    return longest


def asked(values: Any, prompts: Prompts, report: DataReport) -> Prompts:
    """The held-out prompts that are answered at each evaluation; the report counts the others."""
    if not (most := values.evaluation.prompts):
        return prompts
    order = np.random.default_rng(_seed(values, 3)).permutation(len(prompts))
    found = prompts.pick(sorted(order[:most].tolist()))
    report.kept = len(found)
    report.dropped['beyond evaluation.prompts'] = len(prompts) - len(found)
    return found


def rewards(values: Any) -> tuple[Reward, Judge]:
    """What is optimised, and who says which held-out answers win.

    Raises:
      ConfigError, DataError, WorkdirError: see `scoring`.
    """
    reward = scoring.load(
        values.reward.source, rule=values.reward.rule, aggregate=values.reward.aggregate,
        workload=values.workload, token_variable=values.reward.token_variable)
    return reward, scoring.load_judge(values.reward.judge, workload=values.workload, reward=reward)


class Online:
    """A source of rollouts, see `loop.Source`.

    Args:
      values: the config.
      prepared: what the run starts from.
      watch: whose evaluations go on with the run.
    """

    def __init__(self, values: Any, prepared: Prepared, watch: Watch):
        self._values, self._prepared, self._watch = values, prepared, watch
        self._sampling = _sampling(values, prepared.stops, values.rollouts.samples)
        prompts, how, samples = prepared.prompts['train'], prepared.how, values.rollouts.samples
        shape = {'row_length': values.train.row_length, 'rows': values.train.rows}
        new = values.rollouts.max_new_tokens
        self._reading = rollouts.plan(prompts.tokens, samples, new, **shape)
        self.plan: Plan = rollouts.plan(
            prompts.tokens, samples if how.surrogate else 1, new, **shape,
            of_responses=how.of_responses, of_tokens=how.of_tokens)
        size = values.rollouts.prompts
        total = values.algorithm.epochs * size
        self._per = -(-total // values.train.batch_size)  # steps of an iteration
        iterations = -(-round(values.train.epochs * len(prompts)) // size)
        if not iterations:
            raise ConfigError(f'config.train.epochs={values.train.epochs} of {len(prompts)} '
                              'prompts is not one prompt')
        self.steps = min(self._per * iterations, values.train.max_steps or self._per * iterations)
        self._total = iterations * size
        self.about = (f'{len(prompts)} prompts, {-(-self.steps // self._per)} iterations of '
                      f'{size} x {samples} responses')
        self._done, self._iteration = 0, -1
        empty = (size, samples)
        self._answers = Answers(np.zeros((*empty, new), np.int32), np.ones(empty, np.int32),
                                np.zeros(empty, bool))
        self._rolled = Rolled(np.zeros(empty, np.float32), self._answers.mask,
                              self._answers.truncated, *np.zeros((3, *empty, new), np.float32))
        self._shaped = Shaped(*np.zeros((2, *empty, new), np.float32),
                              *np.zeros((2, *empty), np.float32))
        self._carried = algorithms.start(how)
        self._metrics: dict[str, float] = {}
        self._items: list[Encoded] = []

    def feed(self, number: int, trained: Callable[[], Params]) -> Fed:
        """See `loop.Source`; the first step of an iteration waits for its rollout."""
        iteration, place = divmod(number, self._per)
        if iteration != self._iteration:
            self._roll(iteration, trained())
        self._done = number + 1
        sizes = np.array([item.size for item in self._items])
        per_device = -(-self._values.train.batch_size // jax.device_count())
        made = [batches.make_batch([self._items[i] for i in part], self.plan, per_device)
                for part in loop.own_parts(sizes, self._places(place), Spread())]
        return Fed(made, {} if place else self._metrics)

    def ids(self, number: int) -> list[str]:
        """See `loop.Source`."""
        return [self._items[i].id for i in self._places(number % self._per)]

    def state(self) -> dict[str, np.ndarray]:
        """The rollout that is learnt from, and what goes on to the next one."""
        answers, rolled, shaped, carried = self._answers, self._rolled, self._shaped, self._carried
        return {
            'done': np.int32(self._done), 'iteration': np.int32(self._iteration),
            'tokens': answers.tokens, 'sizes': answers.sizes,
            'truncated': answers.truncated.astype(np.int32), 'rewards': rolled.rewards,
            'log_probs': rolled.log_probs, 'reference_log_probs': rolled.reference_log_probs,
            'values': rolled.values, **shaped._asdict(),
            'next_beta': np.float32(carried.beta),
            **{f'scores_{name}': np.float32(value)
               for name, value in carried.scores._asdict().items()}}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """See `loop.Source`."""
        self._done, self._iteration = int(state['done']), int(state['iteration'])
        self._answers = Answers(state['tokens'], state['sizes'], state['truncated'].astype(bool))
        self._rolled = Rolled(
            state['rewards'], self._answers.mask, self._answers.truncated,
            *(state[name] for name in ('log_probs', 'reference_log_probs', 'values')))
        self._shaped = Shaped(*(state[name] for name in Shaped._fields))
        self._carried = Carried(state['next_beta'], Moments(
            *(state[f'scores_{name}'] for name in Moments._fields)))
        self._items = self._made(self._prompts(self._iteration))
        self._watch.forget(self._done)

    def _places(self, place: int) -> np.ndarray:
        """Of the prompts of a step among those of the iteration."""
        size = self._values.rollouts.prompts
        return packing.batch_indices(
            place, seed=_seed(self._values, 4, self._iteration), examples=size,
            batch_size=self._values.train.batch_size, total=self._values.algorithm.epochs * size)

    def _prompts(self, iteration: int) -> Prompts:
        prompts = self._prepared.prompts['train']
        return prompts.pick(packing.batch_indices(
            iteration, seed=self._values.seed, examples=len(prompts),
            batch_size=self._values.rollouts.prompts, total=self._total))

    def _roll(self, iteration: int, trained: Params) -> None:
        """Answers the prompts of an iteration, and makes of it what its steps read."""
        values, prepared = self._values, self._prepared
        network, prompts = prepared.initial.network, self._prompts(iteration)
        params = network.tuning.join(trained, prepared.initial.frozen)
        first = iteration * values.rollouts.prompts
        self._answers = answers = rollouts.answer(
            network, params, prompts.tokens, self._sampling, seed=_seed(values, 0),
            numbers=range(first, first + len(prompts)), rows=values.rollouts.rows)
        texts = rollouts.answered(prompts, answers, prepared.tokenizer)
        scores = prepared.reward(*scoring.flat(texts), draw=iteration)
        dialogues = rollouts.dialogues(prompts, answers)
        shape = {'plan': self._reading, 'tokens': answers.tokens.shape[-1],
                 'chunk': values.train.batch_size}
        old = rollouts.read(network, params, dialogues, **shape)
        reference = rollouts.read(*prepared.reference, dialogues, **shape)
        self._rolled = Rolled(
            scores.rewards.reshape(answers.sizes.shape).astype(np.float32), answers.mask,
            answers.truncated, old.log_probs, reference.log_probs, old.values)
        self._shaped, self._carried, metrics = algorithms.shape(
            self._rolled, self._carried, prepared.how)
        tokens = answers.mask.sum()
        self._metrics = {f'rollout_{name}': value for name, value in metrics.items()} | {
            'rollout_entropy': float(old.entropy.sum(dtype=np.float64) / tokens)}
        self._iteration = iteration
        self._items = self._made(prompts)

    def _made(self, prompts: Prompts) -> list[Encoded]:
        """Comparisons that steps are fed with: of those that count, all a step reads."""
        rolled, shaped, how = self._rolled, self._shaped, self._prepared.how
        known = {
            'old_log_probs': rolled.log_probs, 'reference_log_probs': rolled.reference_log_probs,
            'old_values': rolled.values, **shaped._asdict()}
        found: list[Encoded] = []
        for c, item in enumerate(rollouts.dialogues(prompts, self._answers)):
            # A likelihood reads nothing of others than the best.
            chosen = (range(len(item.responses)) if how.surrogate
                      else [int(shaped.counts[c].argmax())])
            sizes = self._answers.sizes[c]
            extras: dict[str, Any] = {
                name: np.array([known[name][c, k] for k in chosen]) for name in how.of_responses}
            extras |= {name: [known[name][c, k, :sizes[k]] for k in chosen]
                       for name in how.of_tokens}
            k = len(chosen)
            found.append(Extended(**vars(item) | {
                'responses': tuple(item.responses[i] for i in chosen), 'extras': extras,
                'preference': item.preference[:k, :k], 'ratings': item.ratings[:k],
                'prompt_sizes': item.prompt_sizes[:k]}))
        return found


def _course(values: Any, prepared: Prepared, watch: Watch) -> Course:
    """What a run learns; the probability of losing against the reference ranks its checkpoints."""
    start, source = prepared.initial, Online(values, prepared, watch)
    network, frozen = start.network, start.frozen

    def evaluate(trained: Params, done: int) -> dict[str, float]:
        return watch.evaluate(network, network.tuning.join(trained, frozen), done)

    def begin(trained: Params) -> Params:
        watch.forget(-1)
        evaluate(trained, 0)
        return trained

    return Course(
        source, network, Improvement(network, prepared.how), start.trained, begin, frozen, None,
        evaluate, CRITERION, TOLD,
        parameter_count(jax.eval_shape(network.init, jax.random.key(0))),
        rollouts.layouts_of(source.plan), watch.reasons)


def bench(
    values: Any, held_out: Prompts, tokenizer: Tokenizer, stops: tuple[int, ...],
    reference: tuple[PolicyNetwork, Params], reward: Reward, judge: Judge,
) -> Bench:
    """What evaluations are made with.

    Args:
      values: a config with the sections that say how.
      held_out: from `asked`.
      tokenizer: of the policy.
      stops: tokens that end its answers.
      reference: network and parameters.
      reward, judge: from `rewards`.
    """
    gold = (scoring.load_judge(scoring.GOLD, workload=values.workload).read
            if values.data.path == sources.DEMO else None)
    samples = values.evaluation.samples
    return Bench(
        held_out, reward, judge, gold, tokenizer, _sampling(values, stops, samples),
        values.rollouts.rows,
        rollouts.plan(held_out.tokens, samples, values.rollouts.max_new_tokens,
                      row_length=values.train.row_length, rows=values.train.rows),
        max(1, len(held_out)), (_seed(values, 1), _seed(values, 2)), reference, rules(values),
        values.analysis)


def _sampling(values: Any, stops: tuple[int, ...], samples: int) -> Sampling:
    return Sampling(samples=samples, max_new_tokens=values.rollouts.max_new_tokens, stops=stops)


def _seed(values: Any, *stream: int) -> int:
    """A seed of one of the streams of random numbers of a run."""
    return int(np.random.SeedSequence([values.seed, *stream]).generate_state(1)[0] >> 1)


def _tabulated(folder: str) -> bool:
    """Whether a folder holds what best of n was worth, which has no checkpoint and is done."""
    path = os.path.join(folder, 'config.json')
    if not (os.path.exists(path) and os.path.exists(os.path.join(folder, FILE))):
        return False
    section = workdir.read_json(path).get('algorithm')
    return isinstance(section, dict) and section.get('name') == 'best_of_n'


def _absolute(values: Any) -> Any:
    """The config with absolute paths, see `config.absolute`."""
    found = config_lib.absolute(values)
    found.reward.update(scoring.absolute(found.reward))
    return found
