"""Over-optimisation of policies, against the truth of the demo or against another reward model.

Reward models learn from some pairs, and are the proxies; a language model, the reference, is
optimised against each by best of n, PPO or GRPO, and by DPO on the same pairs without any. What
each was worth is the gold reward of its responses to prompts that nobody learnt from, against its
KL to the reference (Gao et al. 2022, arXiv 2210.10760). In the demo the gold reward of any text is
known, and a small reference learns to answer from preferred responses (SFT). Of real text there is
no truth: a reward model that learnt from other pairs stands in for it.

    W/sft, W/policy                 a reference that learnt here, as a run, and exported
    W/reward-PROXY-SEED             a proxy, and the best of n by it
    W/dpo-SEED, W/ppo-..., W/grpo-...   a policy
    W/candidates.npz, W/rivals.npz  answers of the reference
    W/features                      hidden states that proxies share, if they are heads alone
    W/identity.json                 by what reference, gold, pairs and prompts are known again

Each folder keeps what was measured in it (`paths.json`), so that a second run trains nothing.

Risk rules score a response by less than the mean where its spread is large. A gain of a rule can
have other causes than what the spread knows; the controls are

    constant   the same deviations for every response: the choice of the same proxy's mean
    shuffled   the deviations of another response to the prompt (best of n)
    ensemble   the disagreement of members that differ in their initial weights, which is
               uncertainty about the reward, while quantiles are to show how people differ

What counts as an answer stands in the config, `yes.*`.

Axes: P prompts, N candidates to each, I evaluations of a policy, S seeds, r bootstrap replicates.
"""

import datetime
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from qrm.analysis import figures as analysis_figures
from qrm.data import demo, sources
from qrm.data.comparisons import Comparison
from qrm.data.sources import DEMO
from qrm.models.network import params_digest
from qrm.policy import config as policy_config
from qrm.policy import (
    dpo,
    export,
    language_model,
    objectives,
    optimise,
    rollouts,
    runs,
    scoring,
    sft,
)
from qrm.policy.monitor import Row
from qrm.rewards import distributions, resampling, selection
from qrm.rewards.distributions import Atoms
from qrm.rewards.selection import Rule
from qrm.studies import arms, compare, figures, paths
from qrm.studies import bench as bench_lib
from qrm.studies.arms import BEST_OF_N, DPO, ENSEMBLE, SCALAR, Arm, Paths, Statistics
from qrm.studies.bench import Bench
from qrm.studies.paths import Path
from qrm.training import config as config_lib
from qrm.training import reward_model, saved, schema, workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.reward_model import RewardModel
from qrm.training.schema import (
    ANY,
    AT_LEAST_ONE,
    LEVEL,
    NOT_NEGATIVE,
    POSITIVE,
    ConfigError,
    Each,
    Key,
    OneOf,
    Range,
    Table,
)
from qrm.training.train import read_data, train
from qrm.training.workdir import WorkdirError

ONLINE = ('ppo', 'grpo')
_KEPT, _IDENTITY = 'paths.json', 'identity.json'

# Name -> what a proxy has in its `head` and `loss` sections, as in `compare`.
PROXIES = {name: compare.MODELS[name] for name in (
    SCALAR, 'quantile', 'own_mean', 'distributional', 'ratings', ENSEMBLE)}

_SIZES = {'vocab_size': 512, 'max_positions': 128, 'hidden_size': 96, 'num_layers': 2,
          'num_heads': 4}

# Shapes as those of the evaluation, so that little is compiled.
_ROLLOUTS = {
    'rollouts': {'prompts': 32, 'samples': 4, 'rows': 128, 'max_new_tokens': 48},
    'evaluation': {'prompts': 32, 'samples': 4},
    'optimizer': {'learning_rate': 4e-4}}

KEYS: Table = {
    'data': Key(
        DEMO, ANY, f"pairs that proxies and DPO learn from, and prompts: {DEMO!r}, or what "
        '`data.path` of runs may be'),
    'workload': Key('helpful', OneOf(demo.WORKLOADS), 'of the demo, or of a folder of the HH '
                    'layout'),
    'reference': Key('', ANY, "language model that is optimised; '': a small one learns from "
                     '`demonstrations` of the demo'),
    'gold': Key(scoring.GOLD, ANY, f'what policies are worth: {scoring.GOLD!r}, the truth of the '
                'demo, or a reward model that learnt from other pairs'),
    'seeds': Key(
        (0, 1, 2), Each(int, NOT_NEGATIVE),
        'of proxies and policies: parameters, order of batches, draws; data and reference stay'),

    # --- What is learnt --------------------------------------------------------------------------
    'demonstrations': Key(4000, AT_LEAST_ONE, 'pairs whose preferred responses the reference '
                          'learns'),
    'pairs': Key(600, AT_LEAST_ONE, 'of the demo that proxies and DPO learn from; the fewer, the '
                 'sooner proxies are wrong'),
    'proxies.names': Key(
        (SCALAR, 'quantile', 'own_mean', 'distributional', 'ratings', ENSEMBLE), Each(str),
        f'which; {SCALAR!r} is what others are compared with'),
    'proxies.sections': Key(PROXIES, ANY, 'what each has in its `head` and `loss`'),
    'runs.common': Key(
        {'data': {'max_length': 128, 'demo': {'test': 200}},
         'train': {'row_length': 128, 'rows': 8, 'keep': 100}}, ANY,
        'what all runs change of the defaults of `qrm sft`, `qrm train`, `qrm dpo`, `qrm rl`'),
    'runs.sft': Key(
        {'model': {'checkpoint': '', 'sizes': _SIZES},
         'optimizer': {'learning_rate': 4e-3, 'warmup_fraction': 0.05, 'weight_decay': 0.01},
         'train': {'epochs': 6.0, 'checkpoint_every': 60, 'row_length': 256}}, ANY,
        'and those of the reference'),
    'runs.reward': Key(
        {'model': {'checkpoint': '', 'initial_std': 0.0, 'sizes': _SIZES | {'hidden_size': 64}},
         'optimizer': {'learning_rate': 2e-3, 'warmup_fraction': 0.05, 'weight_decay': 0.01},
         'train': {'epochs': 4.0, 'checkpoint_every': 18}}, ANY,
        "of the proxies, which begin as the `reference` if no 'checkpoint' is said; heads alone "
        'share hidden states'),
    'runs.dpo': Key(
        {'dpo': {'beta': 0.05}, 'optimizer': {'learning_rate': 3e-4},
         'train': {'epochs': 6.0, 'checkpoint_every': 9}}, ANY, 'of DPO'),
    'runs.ppo': Key(
        _ROLLOUTS | {
            'algorithm': {'beta': 0.0, 'kl_reward': 'k1', 'scale': 'running', 'centre': True,
                          'truncated': 'keep'},
            'train': {'batch_size': 32, 'epochs': 20.0, 'max_steps': 48, 'checkpoint_every': 8}},
        ANY, 'of PPO'),
    'runs.grpo': Key(
        _ROLLOUTS | {
            'algorithm': {'beta': 0.0, 'kl_reward': '', 'kl_loss': 'k2', 'truncated': 'keep'},
            'train': {'batch_size': 32, 'epochs': 20.0, 'max_steps': 24, 'checkpoint_every': 4}},
        ANY, 'of GRPO'),

    # --- What is optimised -----------------------------------------------------------------------
    'best_of_n.candidates': Key(
        64, Range(4), 'responses of the reference to each prompt; n goes up in powers of 2'),
    'best_of_n.rules': Key(
        ('quantile:0.1', 'cvar:0.2', 'mean-std:1'), Each(str),
        'risk rules of proxies with a spread'),
    'best_of_n.disagreement': Key(1.0, POSITIVE, 'k of mean - k std over members of the ensemble'),
    'online.ppo': Key((f'{SCALAR} mean', 'quantile mean'), Each(str), "'PROXY RULE', each a run"),
    'online.grpo': Key(
        (f'{SCALAR} mean', 'quantile mean', 'distributional mean', 'distributional cvar:0.2',
         f'{ENSEMBLE} disagreement:1'), Each(str), 'the same'),
    'with_dpo': Key(True, ANY, 'whether DPO is run'),

    # --- How it is judged ------------------------------------------------------------------------
    'evaluation.prompts': Key(
        96, Range(4), 'prompts with openings that nobody learnt from; they are the same for all'),
    'evaluation.samples': Key(4, AT_LEAST_ONE, 'responses to each, of policies'),
    'evaluation.rivals': Key(
        4, AT_LEAST_ONE, 'other responses of the reference to each, which all are compared with'),
    'evaluation.max_new_tokens': Key(48, AT_LEAST_ONE, 'of the longest response'),
    'evaluation.rows': Key(128, AT_LEAST_ONE, 'responses that grow at once'),
    'evaluation.seed': Key(0, NOT_NEGATIVE, 'of prompts and responses'),

    # Stated before anything was measured: what would count as an answer. Units of gold reward are
    # its standard deviation over the responses of the reference.
    'yes.gain': Key(
        0.0, NOT_NEGATIVE, '"yes" if the interval of a difference in gold reward is above this'),
    'yes.matters': Key(
        0.2, POSITIVE, '"no" if it is not, and the interval is below this; else "cannot tell"'),
    'yes.fall': Key(
        0.0, NOT_NEGATIVE, 'over-optimisation is seen if the interval of the fall of the gold '
        'reward from its peak to the last evaluation is above this; a rule can delay it only then'),

    'analysis.bootstrap': Key(2000, Range(20), 'replicates over opening questions and seeds'),
    'analysis.level': Key(
        0.95, LEVEL, 'of the intervals; where any of m rules is asked for, of all m together '
        '(Bonferroni)'),
    'analysis.seed': Key(0, NOT_NEGATIVE, 'of the resampling, and of shuffled spreads'),
}

# Of runs that train adapters, and of those that sample.
_ADAPTERS = {'optimizer': {'learning_rate': 5e-4, 'warmup_fraction': 0.1}}
_TEXT_ROLLOUTS = _ADAPTERS | {
    'rollouts': {'prompts': 8, 'samples': 4, 'rows': 32, 'max_new_tokens': 96},
    'evaluation': {'prompts': 16, 'samples': 4}}
# For a pretrained chat model of the size of SmolLM2-135M, on two cores.
TEXT = {
    'data': '', 'reference': '', 'gold': '', 'seeds': (0,),
    'proxies.names': ('scalar', 'quantile'),
    'runs.common': {'data': {'as_chats': True, 'max_length': 352, 'validation_fraction': 0.1},
                    'train': {'row_length': 1024, 'rows': 1, 'keep': 100}},
    'runs.reward': {
        'head': {'reads': ('last', 'mean', 'mean@10', 'mean@20')},
        'optimizer': {'learning_rate': 1e-3},
        'train': {'tune': 'head', 'epochs': 5.0, 'checkpoint_every': 5}},
    'runs.dpo': _ADAPTERS | {
        'dpo': {'beta': 0.05}, 'train': {'tune': 'lora', 'batch_size': 16, 'checkpoint_every': 12}},
    'runs.ppo': _TEXT_ROLLOUTS | {
        'algorithm': {'beta': 0.0, 'kl_reward': 'k1', 'scale': 'running', 'centre': True,
                      'truncated': 'keep'},
        'train': {'tune': 'lora', 'batch_size': 8, 'max_steps': 24, 'checkpoint_every': 8}},
    'runs.grpo': _TEXT_ROLLOUTS | {
        'algorithm': {'beta': 0.0, 'kl_reward': '', 'kl_loss': 'k2', 'truncated': 'keep'},
        'train': {'tune': 'lora', 'batch_size': 8, 'max_steps': 18, 'checkpoint_every': 6}},
    'best_of_n.candidates': 16, 'best_of_n.rules': ('cvar:0.2',),
    'online.ppo': (), 'online.grpo': ('scalar mean', 'quantile mean'),
    'evaluation.prompts': 64, 'evaluation.samples': 2, 'evaluation.max_new_tokens': 96,
    'evaluation.rows': 64}

# Of each kind of run its keys, what checks a config of it, and what runs it.
class Kind(NamedTuple):
    """A kind of run.

    Attributes:
      table: its keys.
      check: checks a config of it.
      train: trains in a folder.
      changes: section `runs` -> what it changes beside what all do.
    """

    table: Table
    check: Callable[[Any], None]
    train: Callable[[Any, str], Any]
    changes: Callable[[Any], Any]


_ONLINE = (optimise.KEYS, optimise.check, optimise.train)
_KINDS = {
    'sft': Kind(sft.KEYS, sft.check, sft.train, lambda runs: runs.sft),
    'reward': Kind(config_lib.KEYS, config_lib.check, train, lambda runs: runs.reward),
    'dpo': Kind(dpo.KEYS, dpo.check, dpo.train, lambda runs: runs.dpo),
    'ppo': Kind(*_ONLINE, lambda runs: runs.ppo),
    'grpo': Kind(*_ONLINE, lambda runs: runs.grpo),
}


def run(config: Any, folder: str) -> str:
    """Trains reference, proxies and policies, measures them, and tabulates in `folder`.

    Goes on where it was stopped. Leaves a folder for each run, `overoptimisation.json`,
    `overoptimisation.md` and `figures/`.

    Returns:
      The tables and the verdict as Markdown.

    Raises:
      ConfigError, DataError, WorkdirError, NonFiniteLoss, Interrupted: as the runs.
    """
    check(config)
    config = _absolute(config)
    with workdir.lock(folder):
        # What is measured is kept, so that all it depends on has to stay.
        workdir.check_claim(folder, config, free=(
            'analysis.bootstrap', 'analysis.level', 'evaluation.rows'))
        bench = prepare(config, folder)
        found = measure(config, folder, bench)
        result = arms.summarise(found, bench, config)
        text = arms.format_result(result)
        workdir.write_json(os.path.join(folder, 'overoptimisation.json'), result)
        workdir.write_text(os.path.join(folder, 'overoptimisation.md'), text)
        draw(folder, found, bench, config)
    return text


def check(config: Any) -> None:
    """Checks the values of a config, and those of all runs that follow from it.

    Raises:
      ConfigError: lists every value that cannot be used.
    """
    schema.check(config, KEYS)
    problems = []
    names, known = config.proxies.names, config.proxies.sections
    problems += [f'config.proxies.names: {name!r}, expected some of {tuple(known)}'
                 for name in names if name not in known]
    if SCALAR not in names:
        problems.append(f'config.proxies.names: no {SCALAR!r}, which others are compared with')
    if not config.seeds:
        problems.append('config.seeds=(), expected at least one')
    for key, values in (('seeds', config.seeds), ('proxies.names', names),
                        ('best_of_n.rules', config.best_of_n.rules),
                        *((f'online.{name}', config.online[name]) for name in ONLINE)):
        if len(set(values)) < len(values):
            problems.append(f'config.{key}={tuple(values)}, expected each once')
    if config.evaluation.samples > config.best_of_n.candidates:
        problems.append(f'config.evaluation.samples={config.evaluation.samples}, expected at most '
                        f'the {config.best_of_n.candidates} of best_of_n.candidates')
    for text in config.best_of_n.rules:
        try:
            selection.parse_rule(text, selection.DISTRIBUTION_KINDS)
        except ValueError as error:
            problems.append(f'config.best_of_n.rules: {error}')
    for algorithm, text in _online(config):
        proxy, _, rule = text.partition(' ')
        try:
            if proxy not in names:
                raise ValueError(f'{text!r}: proxy {proxy!r}, expected one of {tuple(names)}')
            _check_rule(selection.parse_rule(rule, ('mean', 'quantile', 'cvar', 'disagreement')),
                        known.get(proxy, {}).get('head', {}), text)
        except ValueError as error:
            problems.append(f'config.online.{algorithm}: {error}')
    if not config.gold:
        problems.append("config.gold='', expected who says what policies are worth")
    if config.data != DEMO:
        if not config.data:
            problems.append(f'config.data={config.data!r}, expected pairs')
        if not config.reference:
            problems.append(f"config.reference='' with config.data={config.data!r}, expected a "
                            'language model')
        if config.gold == scoring.GOLD:
            problems.append(f'config.gold={config.gold!r} with config.data={config.data!r}, '
                            'expected a reward model: the truth is known of the demo alone')
    elif len({one.group for one in bench_lib.of_demo(config)}) < resampling.MIN_GROUPS:
        problems.append(f'config.evaluation.prompts={config.evaluation.prompts}, '
                        f'{bench_lib.TOO_FEW}')
    schema.raise_all(problems)
    for kind in _KINDS:
        if kind != 'sft' or not config.reference:
            built = _build(config, kind, _online_changes(config, kind, 'a reward')
                           if kind in ONLINE else {})
            if kind in ONLINE and built.monitor.stop:
                raise ConfigError(f'config.runs.{kind}: config.monitor.stop={built.monitor.stop}, '
                                  'expected (): seeds are compared at the same steps')
            if kind != 'reward' and {built.model.dtype, built.train.frozen_dtype} != {'float32'}:
                raise ConfigError(f'config.runs.{kind}: dtypes {built.model.dtype} and '
                                  f"{built.train.frozen_dtype}, expected 'float32', in which the "
                                  'reference is computed that KLs are to')
    for name in names:
        _build(config, 'reward', _changes_of(config, name))
    if not config.reference:
        positions = _build(config, 'sft', {}).model.sizes.max_positions
        bench_lib.room(config, _build(config, 'reward', {}).data, positions)


# --- runs ----------------------------------------------------------------------------------------


def prepare(config: Any, folder: str) -> Bench:
    """Trains the reference, if it is to be trained, and lets it answer.

    The folder is claimed when all that is given has been found to be of use.

    Args:
      config: of the study.
      folder: of the study.

    Raises:
      ConfigError, DataError, WorkdirError: see `run`.
    """
    gold = scoring.load_judge(config.gold, workload=config.workload)
    if not gold.scores:
        raise ConfigError(f'config.gold={config.gold!r} compares two responses, expected a reward '
                          'model, which says what each is worth')
    _check_apart(config)
    path = _reference(config, folder)
    if config.reference and not os.path.exists(os.path.join(folder, 'config.json')):
        _check_networks(config)
    elif not config.reference and not os.path.isdir(path):
        workdir.claim(folder, config)
        own = os.path.join(folder, 'sft')
        _run(config, 'sft', own, {'data.demo.train': config.demonstrations})
        export.export(language_model.load_run(own), path)
    known = _known(folder)
    model = language_model.load(path, date=known['date'])
    data = _build(config, 'reward', {}).data
    prompts = bench_lib.held_out(config, model, data)
    digest = hashlib.sha256(b''.join(ids.tobytes() for ids in prompts.tokens))
    identity = known | {
        'reference': params_digest(bench_lib.policy_of(model)[1]), 'gold reward': gold.digest,
        'pairs': '' if config.data == DEMO else sources.read(data, config.workload).digest,
        'prompts': digest.hexdigest()}
    for name, found in identity.items():
        if known.get(name, found) != found:
            raise WorkdirError(f'{folder}/{_IDENTITY}: other {name} than this study started with, '
                               'expected another workdir')
    workdir.claim(folder, config)
    workdir.write_json(os.path.join(folder, _IDENTITY), identity)
    return bench_lib.make(config, folder, model, prompts, gold)


def measure(config: Any, folder: str, bench: Bench) -> dict[tuple[Arm, int], Path]:
    """What all arms did, with all seeds; trains what is not trained yet."""
    found: dict[tuple[Arm, int], Path] = {}
    pairs = {'data.demo.train': config.pairs} if config.data == DEMO else {}
    features = os.path.join(folder, 'features')

    @functools.cache
    def candidates_by(own: str) -> Atoms:
        return judge(reward_model.load(own, raw=True), bench.candidates)

    for name, seed in itertools.product(config.proxies.names, config.seeds):
        own = _reward_folder(folder, name, seed)

        def choose(own: str = own, name: str = name, seed: int = seed) -> dict[Arm, Path]:
            changes = _changes_of(config, name) | pairs | {'seed': seed}
            if _build(config, 'reward', changes).train.tune == 'head':
                changes['train.features'] = features
            _run(config, 'reward', own, changes)
            return best_of_n(bench, candidates_by(own), name, config)

        found |= {(arm, seed): path for arm, path in _kept(own, choose).items()}
    policies = [(DPO, ' '), *_online(config)] if config.with_dpo else _online(config)
    for (algorithm, text), seed in itertools.product(policies, config.seeds):
        proxy, _, rule = text.partition(' ')
        arm = Arm(algorithm, proxy, rule)
        judged_by = _reward_folder(folder, proxy or SCALAR, seed)
        own = os.path.join(folder, '-'.join(
            part.replace(':', '_') for part in (algorithm, proxy, rule, str(seed)) if part))

        def walk(own: str = own, arm: Arm = arm, seed: int = seed,
                 judged_by: str = judged_by) -> dict[Arm, Path]:
            reward = {} if arm.algorithm == DPO else _online_changes(
                config, arm.algorithm, judged_by) | {'reward.rule': arm.rule}
            _run(config, arm.algorithm, own, reward | pairs | {
                'seed': seed, 'model.checkpoint': _reference(config, folder)})
            return {arm: follow(bench, own, reward_model.load(judged_by, raw=True),
                                np.asarray(candidates_by(judged_by).mean, np.float64))}

        found |= {(arm, seed): path for arm, path in _kept(own, walk).items()}
    return found


def best_of_n(bench: Bench, rewards: Atoms, name: str, config: Any) -> dict[Arm, Path]:
    """What choosing among the candidates by a proxy is worth, by each rule.

    The n are the steps. The distance is the upper bound that scores without ties reach, the same
    for all rules.

    Args:
      bench: with the candidates.
      rewards: of the candidates by the proxy, [P, N, ...].
      name: of the proxy.
      config: of the study.
    """
    mean = np.asarray(rewards.mean, np.float64)
    rules = [Rule('mean')]
    if config.proxies.sections[name].get('head', {}).get('members', 1) > 1:
        rules.append(Rule('disagreement', config.best_of_n.disagreement))
    elif rewards.values.shape[-1] > 1:
        rules += map(selection.parse_rule, config.best_of_n.rules)
    shuffled = selection.shuffle_spread(rewards, jax.random.key(config.analysis.seed))
    ns = sizes(config.best_of_n.candidates)
    kl = np.broadcast_to(selection.kl_best_of_n(np.array(ns))[:, None], (len(ns), len(mean)))
    wins, found = bench.wins(bench.gold), {}
    for rule in rules:
        for control, own in (('none', rewards), ('shuffled', shuffled)):
            arm = Arm(BEST_OF_N, name, rule.name, control)
            if control == 'none' or arm.risky:
                chosen = selection.choice_probabilities(_scores(rule, own), ns)
                found[arm] = Path(np.array(ns), kl, *(
                    None if values is None else np.einsum('spn,pn->sp', chosen, values)
                    for values in (bench.gold.rewards, mean, wins, bench.lengths,
                                   bench.gold.unread, bench.gold.price)),
                    bench.rival_length, float(mean.std()))
    return found


def follow(bench: Bench, folder: str, model: RewardModel, candidates: np.ndarray) -> Path:
    """What a policy was at each of its checkpoints, the reference first.

    Args:
      bench: what it is judged by.
      folder: of its run.
      model: the proxy.
      candidates: [P, N] its mean rewards of the candidates.
    """
    # What the reference answers with the same random numbers.
    first = np.s_[:, :bench.sampling.samples]
    gold = bench.gold
    found = [(0, np.zeros(len(candidates)), *(_means(values, first) for values in (
        gold.rewards, candidates, bench.wins(gold), bench.lengths, gold.unread,
        gold.price)))]
    with Checkpoints(folder, read_only=True) as checkpoints:
        steps = checkpoints.evaluated  # not where the run was interrupted
    for step in steps:
        policy = language_model.load_run(folder, step=step)
        answers = bench.answer(policy.network, policy.params)
        dialogues = rollouts.dialogues(bench.prompts, answers)
        own, reference = (rollouts.read(
            network, params, dialogues, bench.plan, answers.tokens.shape[-1],
            chunk=len(dialogues)).log_probs
            for network, params in ((policy.network, policy.params), bench.reference))
        kl = np.asarray(objectives.kl_estimates(own, reference, answers.mask, 'k1'), np.float64)
        texts = rollouts.answered(bench.prompts, answers, bench.tokenizer)
        gold = bench.judge.read(texts)
        found.append((step, *(_means(values) for values in (
            kl.sum(axis=-1), gold.rewards, np.asarray(judge(model, texts).mean, np.float64),
            bench.wins(gold), answers.sizes, gold.unread, gold.price))))
    return Path(*(None if column[0] is None else np.array(column)
                  for column in zip(*found, strict=True)),
                bench.rival_length, float(candidates.std()))


def _means(values: np.ndarray | None, first: Any = ...) -> np.ndarray | None:
    """[P] over responses, of what is known."""
    return None if values is None else values[first].mean(axis=1)


def judge(model: RewardModel, texts: Sequence[Comparison]) -> Atoms:
    """Atoms [P, K, N] of the rewards of responses: quantiles, or of an ensemble its members."""
    encoded, _ = model.encode(texts)
    read = model.read(jnp.asarray(np.concatenate(model.predict(encoded))))
    values = read.members.mean if model.network.head.members > 1 else read.quantiles
    return distributions.uniform_atoms(values.reshape(len(texts), -1, values.shape[-1]))


def sizes(candidates: int) -> list[int]:
    """The n of best of n: powers of 2 up to the number of candidates."""
    return [2**i for i in range(candidates.bit_length())]


def _run(config: Any, kind: str, folder: str, changes: Mapping[str, Any]) -> None:
    print(f'\n== {kind}: {folder}', flush=True)
    _KINDS[kind].train(_build(config, kind, changes), folder)


def _build(config: Any, kind: str, changes: Mapping[str, Any]) -> Any:
    """The checked config of a run.

    Raises:
      ConfigError: it cannot be used; says of which kind of run.
    """
    own = _KINDS[kind]
    values = {'data.path': config.data, 'workload': config.workload}
    values |= optimise.CHANGES.get(kind, {})
    if config.reference:
        values |= {'model.checkpoint': config.reference}
    for section in (config.runs.common, own.changes(config.runs)):
        values |= dict(schema.flatten(section, {}))
    try:
        built = (policy_config.build(own.table, values | changes) if kind != 'reward' else
                 config_lib.build(values | changes))
        own.check(built)
    except ConfigError as error:
        raise ConfigError(f'config.runs.{kind}: {error}') from error
    return built


def _check_rule(rule: Rule, head: Mapping[str, Any], text: str) -> None:
    """Checks that a proxy with this head has the spread that a rule looks at.

    Raises:
      ValueError: it has not.
    """
    members = head.get('members', 1)
    if rule.kind == 'disagreement' and members < 2:
        raise ValueError(f'{text!r}: expected a proxy with members')
    if rule.kind in ('quantile', 'cvar') and head.get('name') == SCALAR and members < 2:
        raise ValueError(f'{text!r}: expected a proxy that predicts a spread')


def _changes_of(config: Any, proxy: str) -> dict[str, Any]:
    return dict(schema.flatten(config.proxies.sections[proxy], {}))


def _online_changes(config: Any, algorithm: str, reward: str) -> dict[str, str]:
    # The monitors of the demo know the truth by themselves.
    judged_by = {} if config.gold == scoring.GOLD else {'reward.judge': config.gold}
    return {'algorithm.name': algorithm, 'reward.source': reward} | judged_by


def _reference(config: Any, folder: str) -> str:
    """The language model that policies begin as, before it is there."""
    return config.reference or os.path.join(folder, 'policy')


def _check_networks(config: Any) -> None:
    """Checks what is to be learnt from the reference, and from what, before anything is computed.

    Raises:
      ConfigError, DataError: it cannot be.
    """
    if saved.is_run(config.reference):
        raise ConfigError(f'config.reference={config.reference!r}, a run; expected a model, such '
                          'as `qrm export` makes of it')
    for name in config.proxies.names:
        read_data(_build(config, 'reward', _changes_of(config, name)))
    runs.describe_network(_build(config, 'dpo', {}))


def _check_apart(config: Any) -> None:
    """Checks that the judge began as another random head than the proxies.

    What a few steps leave of the same beginning a judge and a proxy of the same shape agree about,
    whatever people prefer.

    Raises:
      ConfigError: it did not.
    """
    if (seed := scoring.seed_of(config.gold)) in config.seeds:
        raise ConfigError(
            f'config.gold={config.gold!r} began with the random weights of seed {seed}, one of '
            f'config.seeds={tuple(config.seeds)}; expected a judge of another seed')


def _known(folder: str) -> dict[str, str]:
    """By what a study is known again, and the day that chat templates print; of a new one that."""
    path = os.path.join(folder, _IDENTITY)
    return (workdir.read_json(path) if os.path.exists(path) else
            {'date': datetime.date.today().isoformat()})


def _absolute(config: Any) -> Any:
    """The config with absolute paths, so that it may go on from elsewhere."""
    found = ConfigDict(config.to_dict())
    for key in ('data', 'reference', 'gold'):
        if os.path.exists(found[key]) and found[key] not in (DEMO, scoring.GOLD):
            found[key] = os.path.abspath(found[key])
    return found


def _online(config: Any) -> list[tuple[str, str]]:
    return [(name, text) for name in ONLINE for text in config.online[name]]


def _reward_folder(folder: str, proxy: str, seed: int) -> str:
    return os.path.join(folder, f'reward-{proxy}-{seed}')


def _kept(folder: str, compute: Callable[[], dict[Arm, Path]]) -> dict[Arm, Path]:
    """What was measured in the folder of a run, or is now.

    Raises:
      WorkdirError: another version measured it.
    """
    path = os.path.join(folder, _KEPT)
    if not os.path.exists(path):
        workdir.write_json(path, [{'arm': list(arm), 'path': paths.as_json(own)}
                                  for arm, own in compute().items()])
    try:
        return {Arm(*one['arm']): paths.from_json(one['path']) for one in workdir.read_json(path)}
    except (KeyError, TypeError) as error:
        raise WorkdirError(f'{path}: not what this version writes ({error!r}); without it the run '
                           'is measured again') from error


def _scores(rule: Rule, rewards: Atoms) -> np.ndarray:
    """[P, N] scores by a rule; members of an ensemble are atoms, too."""
    mean, std = np.asarray(rewards.mean), np.asarray(rewards.std)
    if rule.kind == 'disagreement':
        return mean - rule.parameter * std
    scale = selection.reference_scale(
        mean.ravel(), std.ravel(), np.repeat(np.arange(len(mean)), mean.shape[1]))
    return np.asarray(selection.scores(rule, rewards, scale))


def draw(folder: str, found: Paths, bench: Bench, config: Any) -> None:
    """Draws proxy and gold of each mean against the KL, and the gold of all arms."""
    statistics = Statistics(found, bench.groups, float(bench.gold.rewards.std()), config.analysis)
    rows = {arm: statistics.rows(arm) for arm in statistics.arms}
    drawn = {str(arm): own for arm, own in rows.items() if not arm.risky}
    by_algorithm: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for arm, own in rows.items():
        if arm.algorithm != DPO and arm.control == 'none':
            by_algorithm.setdefault(arm.algorithm, {})[arm.proxy, arm.rule] = own
    for algorithm, policies in by_algorithm.items():
        if algorithm != BEST_OF_N and Arm(DPO) in rows:  # the KL of best of n is a bound
            policies['', ''] = rows[Arm(DPO)]
    analysis_figures.save(folder, {
        'overoptimisation': figures.draw_gains(drawn),
        'gold': figures.draw_paths(by_algorithm)})
