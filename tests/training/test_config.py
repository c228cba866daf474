"""The config of a run and the files that change it: complete, locked, and every key is read."""

import ast
import json

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from qrm.analysis import evaluate
from qrm.commands import configs
from qrm.data import templates
from qrm.policy import dpo, follow, optimise, sft
from qrm.rewards import losses
from qrm.rewards.heads import HEADS, HeadConfig
from qrm.studies import (
    best_of_n,
    campaign,
    compare,
    disagreement,
    identifiability,
    overoptimisation,
    published,
    reproduce,
    speed,
)
from qrm.training import config as config_lib
from qrm.training import schema, train
from qrm.training.schema import ConfigError
from tests.helpers import ROOT, load_config

# Keys of each config beside those of every run, and those that have keys of their own.
RUNS = {'demo': {}, 'hh': {}, 'moss': {}, 'pairwise': {}, 'paper': {}, 'speed': speed.KEYS,
        'compare': compare.KEYS, 'published': published.KEYS}
WORLDS = {'identifiability': identifiability.KEYS, 'best_of_n': best_of_n.KEYS,
          'campaign': campaign.KEYS, 'disagreement': disagreement.KEYS,
          'optimise': overoptimisation.KEYS, 'watch': follow.KEYS}
POLICIES = {'sft': sft, 'dpo': dpo, 'rl': optimise}
NEEDED = {'rl': {'reward.source': 'results/run'}}  # what only a user can say
TABLES = [config_lib.KEYS, speed.KEYS, compare.KEYS, published.KEYS, *WORLDS.values(),
          *(module.KEYS for module in POLICIES.values())]


def test_every_config_is_tested():
    assert set(configs.names()) == RUNS.keys() | WORLDS.keys() | POLICIES.keys()


@pytest.mark.parametrize('name', [*RUNS, *WORLDS, *POLICIES])
def test_configs_are_valid_and_locked(name):
    config = load_config(name, **NEEDED.get(name, {}))
    if name in RUNS:
        config_lib.check(config, RUNS[name])
    elif name in POLICIES:
        POLICIES[name].check(config)
        POLICIES[name].check(load_config(name, 'demo'))
    else:
        schema.check(config, WORLDS[name])
    assert config.is_locked
    json.loads(config.to_json())


@pytest.mark.parametrize('name', [*RUNS, *WORLDS, *POLICIES])
def test_configs_fit_a_screen(name):
    assert len((ROOT / 'configs' / f'{name}.py').read_text().splitlines()) <= 50


def test_defaults_can_be_used():
    for table in TABLES:
        assert not schema.problems(schema.build(table, {}), table)


def test_every_key_has_a_comment_and_is_read():
    # As an attribute; or as a field of what a whole section is passed to, or of a head by its name.
    read = set(HEADS)
    for path in (ROOT / 'qrm').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                read.add(node.target.id)
    for table in TABLES:
        for name, key in table.items():
            assert key.comment, name
            assert name.rpartition('.')[2] in read, name


def test_keys_that_a_config_lacks_are_named():
    with pytest.raises(ConfigError, match='^no config.seed, config.workload, config.data.path and '
                                          f'{len(config_lib.KEYS) - 3} more; is this the config'):
        config_lib.check(ConfigDict())
    for run in (evaluate.evaluate, evaluate.diagnose, train.train):
        with pytest.raises(ConfigError, match='^no config'):
            run(ConfigDict(), 'a folder that is not looked at')
    config = load_config('demo')
    with config.unlocked():
        del config.evaluation.rules
    with pytest.raises(ConfigError, match=r'^no config\.evaluation\.rules; is this'):
        config_lib.check(config)


def test_keys_of_another_kind_of_run_are_refused():
    with pytest.raises(ConfigError, match=r'^config\.speed\.\w+, .* and 4 more: not known'):
        config_lib.check(load_config('speed'))


@pytest.mark.parametrize(('changes', 'message'), [
    ({'tune': 'all', 'frozen_dtype': 'bfloat16'}, "'all' with train.frozen_dtype='bfloat16', exp"),
    ({'tune': 'lora', 'features': 'here'}, "'lora' with train.features, expected ''"),
    ({'tune': 'head', 'sharding': 'fsdp'}, "'head' with train.sharding='fsdp', expected 'repl"),
    ({'tune': 'first:3'}, "'first:3', expected 'all', 'lora'"),
])
def test_settings_of_other_kinds_of_tuning_are_refused(changes, message):
    config = load_config('demo')
    config.train.update(changes)
    with pytest.raises(ConfigError, match=rf'config\.train\.tune: {message}'):
        config_lib.check(config)


@pytest.mark.parametrize('key', ['model.dropout', 'loss.lm_weight'])
def test_what_does_not_reach_the_head_is_refused(key):
    config = load_config('demo')
    config.train.tune = 'head'
    config.update_from_flattened_dict({key: 0.5})
    with pytest.raises(ConfigError, match=rf"train\.tune: 'head' with {key}=0.5, expected 0"):
        config_lib.check(config)


@pytest.mark.parametrize('name', [name for name in RUNS if name != 'compare'])
def test_the_argument_names_workload_and_model(name):
    config = load_config(name, 'harmless,scalar')
    assert (config.workload, config.head.name) == ('harmless', 'scalar')
    assert config.reproduce.workloads == ('harmless',)
    assert config.reproduce.models == ('scalar',)
    both = load_config(name).reproduce
    assert both.workloads == ('helpful', 'harmless')
    # Where quantiles move to their own mean nothing is pulled towards 0: there is no control of it.
    assert both.models == (('scalar', 'quantile') if name in ('paper', 'published') else
                           ('scalar', 'scalar_centred', 'quantile'))
    assert load_config(name, ',scalar').reproduce.workloads == ('helpful', 'harmless')


def test_the_recipe_of_the_papers_code():
    """As read in min-seong-kim/QR-RLHF, c0f8e59."""
    config = load_config('paper', 'harmless,quantile')
    expected = {
        'head.num_quantiles': 10, 'head.bias': True, 'loss.targets': 'own_mean',
        'loss.huber_sides': 'chosen', 'loss.huber_weight': 1.0, 'loss.kappa': 1.0,
        'loss.pair_epsilon': 1e-5, 'optimizer.learning_rate': 2e-6, 'optimizer.b1': 0.9,
        'optimizer.b2': 0.95, 'optimizer.eps': 1e-6, 'optimizer.schedule': 'inverse_sqrt',
        'optimizer.warmup_fraction': 0.1, 'optimizer.warmup_floor': 0.1, 'optimizer.clip_norm': 1.0,
        'train.batch_size': 4, 'train.max_steps': 200_000, 'model.dropout': 0.1,
        'model.dtype': 'bfloat16', 'model.chat_template': templates.MOSS}
    given = dict(schema.flatten(config, {}))
    assert {key: given[key] for key in expected} == expected
    # What explains the table has it, too, at a rate for small models.
    small = dict(schema.flatten(load_config('published'), {}))
    other = {key for key in expected if small[key] != expected[key]}
    assert other == {'optimizer.learning_rate', 'train.batch_size', 'train.max_steps',
                     'model.dropout', 'model.dtype'}
    assert small['train.epochs'] == 4.0


def test_the_centred_control_is_pulled_towards_0_as_equal_quantiles_are():
    config = load_config('hh', 'helpful,scalar_centred')
    assert config.head.name == 'scalar'
    assert config.loss.centre_weight == pytest.approx(0.1 * 10 / 8)

    def pull(loss, name, total):
        """d/dm of the loss of a pair whose rewards are m + .3 and m - .3."""
        head = HeadConfig(name)

        def of(m):
            outputs = jnp.stack([m + 0.3, m - 0.3])[:, None] * jnp.ones(head.outputs)
            return losses.comparison_loss(loss, head.read(outputs), judgement)

        return float(jax.grad(of)(total))

    judgement = losses.Judgement(jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.zeros(()),
                                 jnp.full((2, 1), jnp.nan), jnp.int32(0))
    scalar = config_lib.loss_config(config)
    quantile = config_lib.loss_config(load_config('hh', 'helpful,quantile'))
    for m in (-0.2, 0.0, 0.2):
        assert pull(scalar, 'scalar', m) == pytest.approx(pull(quantile, 'quantile', m), abs=1e-6)
    assert pull(scalar, 'scalar', 0.2) == pytest.approx(10 * 0.1 * 0.2, rel=1e-5)


@pytest.mark.parametrize('changes', [
    {'loss.targets': 'own_mean'}, {'loss.huber_sides': 'chosen'}, {'loss.huber_weight': 0.0},
    {'loss.quantile': 'distributional_bradley_terry'}])
def test_no_control_of_what_is_not_there(changes):
    config = load_config('hh', **changes)
    with pytest.raises(ConfigError, match='a quantile head that is not pulled towards 0'):
        reproduce.run_configs(config)


def test_the_weight_of_the_control_is_its_own():
    config = load_config('hh', 'helpful,scalar_centred', **{'loss.huber_weight': 0.2})
    config.loss.centre_weight = 0.0
    config.reproduce.models = ('scalar', 'scalar_centred', 'quantile')
    found = {model: member.loss.centre_weight
             for (_, model), member in reproduce.run_configs(config).items()}
    assert found == {'scalar': 0.0, 'scalar_centred': pytest.approx(0.25), 'quantile': 0.0}
    # Of a config that is made for the control, too.
    config = load_config('hh', 'helpful,scalar_centred')
    config.reproduce.models = ('scalar', 'scalar_centred')
    members = reproduce.run_configs(config)
    assert members['helpful', 'scalar'].loss.centre_weight == 0.0
    config.loss.centre_weight = 0.5
    with pytest.raises(ConfigError, match=r"centre_weight=0\.5 beside the model 'scalar_centred'"):
        reproduce.run_configs(config)


def test_hh_is_the_described_experiment():
    config = load_config('hh')
    # Kim, Hong & Kim: GPT-2, HH, ten quantiles; Bradley-Terry plus the quantile Huber loss.
    assert (config.model.checkpoint, config.data.path) == (
        'openai-community/gpt2', 'Anthropic/hh-rlhf')
    assert (config.head.name, config.head.num_quantiles) == ('quantile', 10)
    assert (config.loss.scalar, config.loss.quantile, config.loss.targets) == (
        'bradley_terry', 'bradley_terry_quantile_huber', 'label')
    assert (config.loss.huber_weight, config.loss.kappa) == (0.1, 1.0)


def test_compare_on_hh_leaves_out_what_learns_from_ratings():
    on_demo, on_hh = (load_config('compare', arg).compare.models for arg in ('', 'hh'))
    assert set(compare.MODELS) - set(on_demo) == {'own_mean', 'scalar_chats', 'quantile_chats'}
    assert set(on_demo) - set(on_hh) == {'ratings'}
    assert load_config('compare', 'hh').data.path == 'Anthropic/hh-rlhf'
    with pytest.raises(ValueError, match="argument 'x', expected 'demo', 'hh' or 'frozen'"):
        load_config('compare', 'x')


def test_a_pairwise_head_is_configured_by_its_name():
    config = load_config('pairwise', 'harmless')
    config_lib.check(config)
    assert config.workload == 'harmless'
    assert config_lib.loss_config(config).objective == 'pairwise_cross_entropy'
    assert config_lib.head_config(config).pairwise
    config.model.pair_template = '{first}{second}'
    with pytest.raises(ConfigError, match='pair_template: .{first}{second}., expected a text'):
        config_lib.check(config)


def test_tables_of_rewards_leave_no_place_for_a_pairwise_head():
    with pytest.raises(ConfigError, match="reproduce.models: 'pairwise' gives no reward of a resp"):
        reproduce.run_configs(load_config('demo', 'helpful,pairwise'))
    config = load_config('compare', **{'compare.models': ('scalar', 'both'), 'compare.sections': {
        'scalar': {'head': {'name': 'scalar'}}, 'both': {'head': {'name': 'pairwise'}}}})
    with pytest.raises(ConfigError, match="sections: 'both' has the pairwise head, which gives no"):
        compare.member_configs(config)
