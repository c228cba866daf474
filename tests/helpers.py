"""Small comparisons, networks and configs that several tests build on."""

import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers
from ml_collections import ConfigDict

from qrm.commands import configs
from qrm.data import packing, tokens
from qrm.data.encoded import Encoded
from qrm.data.tokens import Reading
from qrm.models import families
from qrm.models import lora as lora_lib
from qrm.models.network import RewardNetwork
from qrm.models.tuning import Tuning
from qrm.policy import monitor
from qrm.rewards import distributions, heads, losses, metrics
from qrm.rewards.heads import HeadConfig
from qrm.training import step
from qrm.training.reward_model import RewardModel
from qrm.training.reward_objective import RewardObjective
from tests.conftest import QUICKLY
from tests.programs import forks

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / 'tests/reference'
_LIGHTLY = '--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true'
# Of a GPT-2, small.
SETTINGS = {'model_type': 'gpt2', 'vocab_size': 50, 'n_positions': 64, 'n_embd': 16, 'n_layer': 2,
            'n_head': 2, 'n_inner': 32}
ARCHITECTURE = families.architecture(SETTINGS)


def encoded(name, prompt, responses, *, seed=0, preference=None, weight=1.0, margin=0.0):
    """A comparison with random tokens; sizes are token counts, the first response is best."""
    rng = np.random.default_rng(seed)
    k = len(responses)
    if preference is None:
        preference = np.triu(np.ones((k, k)), 1)
    return Encoded(
        str(name), str(name), rng.integers(1, 50, prompt).astype(np.int32),
        tuple(rng.integers(1, 50, size).astype(np.int32) for size in responses),
        np.asarray(preference, np.float32), np.full((k, 1), np.nan, np.float32), margin, weight,
    )


def random_comparisons(count, *, seed=0, most=20, responses=(1, 4)):
    """Comparisons of random sizes; dialogues have at most 2 * most tokens."""
    rng = np.random.default_rng(seed)
    return [
        encoded(i, rng.integers(0, most + 1), rng.integers(1, most + 1, rng.integers(*responses)),
                seed=(seed, i))
        for i in range(count)
    ]


def architecture(**settings):
    """That of the small GPT-2 with other settings."""
    return families.architecture(SETTINGS | settings)


def network(head='quantile', *, layers=2, **kwargs):
    architecture = dataclasses.replace(ARCHITECTURE, num_layers=layers)
    return RewardNetwork(architecture, HeadConfig(head, 10), **kwargs)


def lora(*targets, rank=4, alpha=6.0, rank_stabilised=False, architecture=ARCHITECTURE):
    """A tuning of the small GPT-2 with adapters, of everything if no targets are named."""
    modules = lora_lib.targeted(families.FAMILIES['gpt2'], architecture, targets or ['all-linear'])
    return Tuning('lora', lora=lora_lib.Lora(rank, alpha, rank_stabilised, modules))


TUNINGS = {'all': Tuning(), 'lora': lora(), 'last': Tuning('last', 1), 'head': Tuning('head')}


def init(net, seed=0):
    """Parameters of the scales of `net.init`, which takes seconds to compile.

    Residual projections are not made smaller, and no part of an adapter is 0.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if name.endswith(('bias', 'scale')):
            return jnp.full(leaf.shape, float(name.endswith('scale')), leaf.dtype)
        scale = 1 / math.sqrt(leaf.shape[0] + 1) if name == 'head/kernel' else 0.02
        scale = 0.3 if '/lora/' in name else scale
        return jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def loss_config(head='quantile', **kwargs):
    objective = 'bradley_terry' if head == 'scalar' else 'bradley_terry_quantile_huber'
    return losses.LossConfig(**{'objective': objective} | kwargs)


def read_quantiles(values):
    """What a quantile head with these outputs [..., N] says."""
    return HeadConfig('quantile', values.shape[-1]).read(values)


def side(quantiles, teacher=0.0):
    """One side of a pair with quantiles [N]."""
    return losses.Side(distributions.uniform_atoms(quantiles),
                       jnp.asarray(heads.taus(quantiles.shape[-1])), teacher)


def judgement(preference, margin=0.0, ratings=None, annotator=-1):
    """What is known of K responses, to be passed to a loss; by default no rating."""
    k = np.shape(preference)[-1]
    ratings = np.full((k, 1), np.nan, np.float32) if ratings is None else ratings
    return losses.Judgement(jnp.asarray(preference), jnp.asarray(margin), jnp.asarray(ratings),
                            jnp.asarray(annotator))


def pair_predictions(chosen, rejected, *, label=1.0, log_win=-0.5, log_loss=-0.9, groups=None,
                     **fields):
    """Predictions of n pairs with quantiles [n, N]; rewards are their means."""
    chosen, rejected = (np.asarray(side, np.float32) for side in (chosen, rejected))
    n, number = chosen.shape
    quantiles = np.stack([chosen, rejected], axis=1).reshape(2 * n, number)
    values = dict(
        quantiles=quantiles, taus=heads.taus(number), means=quantiles.mean(axis=1),
        stds=quantiles.std(axis=1), pair_stds=np.hypot(chosen.std(axis=1), rejected.std(axis=1)),
        crps=np.full(2 * n, np.nan, np.float32),
        ratings=np.full(2 * n, np.nan, np.float32), lengths=np.full(2 * n, 5, np.int32),
        comparisons=np.repeat(np.arange(n, dtype=np.int32), 2),
        comparison_ids=np.array([f'pair {i}' for i in range(n)]),
        comparison_groups=np.arange(n) if groups is None else groups,
        pairs=np.arange(2 * n, dtype=np.int32).reshape(n, 2),
        label=np.broadcast_to(np.float32(label), n),
        log_win=np.broadcast_to(np.float32(log_win), n),
        log_loss=np.broadcast_to(np.float32(log_loss), n))
    return metrics.Predictions(**values | fields)


def single_batch(item, length):
    """A comparison of K = 1 alone in a row."""
    layout = packing.Layout(length, 1, 1, 1)
    return packing.pack([item], [layout])[0].micro_batch


def policy_row(step, **changes):
    """A row of a run where nothing is wrong, with standard errors."""
    values = dict.fromkeys(monitor.Row._fields, 0.0) | {
        'step': step, 'prompts': 100, 'responses': 100, 'proxy': 1.0, 'proxy_error': 0.1,
        'proxy_spread': 1.0, 'predicted_std': 0.5, 'gold': 2.0, 'gold_error': 0.1,
        'gold_spread': 1.0, 'win': 0.5, 'win_error': 0.02, 'kl': 5.0, 'kl_error': 0.3,
        'kl_bound': None, 'kl_estimate': None, 'kl_estimate_error': None, 'unread': None,
        'unread_error': None, 'length': 50.0, 'length_error': 2.0, 'entropy': 2.0,
        'entropy_error': 0.05, 'repeated': 0.05, 'repeated_error': 0.01, 'refused': 0.1,
        'refused_error': 0.03, 'truncated': 0.02, 'truncated_error': 0.01, 'disagreement': None,
        'perplexity': 3.0}
    return monitor.Row(**values | changes)


def reward_step(net, loss, optimizer):
    """A training step of a reward model."""
    return step.make_train_step(net, RewardObjective(net, loss), optimizer)


def optimizer_config(**kwargs):
    return ConfigDict(SGD | kwargs)


def stub_python(folder, source):
    """A file that stands for the Python of another environment; `{python}` in it is this one's."""
    path = folder / 'python'
    path.write_text(source.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def simulated(devices):
    """The environment of a process with that many simulated devices."""
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
    return os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags.strip()}


def optimised():
    """The environment of a process that computes for longer than it compiles.

    Even there the last passes of LLVM would take longer than what they save.
    """
    flags = os.environ.get('XLA_FLAGS', '').replace(QUICKLY, _LIGHTLY)
    return os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}


def command(name, *flags, package='experiments', code=0):
    """Runs `python -m <package>.<name>`; returns what it printed and its errors."""
    found, out, err = forks.run(f'{package}.{name}', flags, os.environ | {
        'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'})
    assert found == code, out + err
    assert 'Traceback' not in err
    return out, err


def small_reward_model(comparisons):
    """Random weights, with a tokenizer trained on the comparisons."""
    tokenizer = tokens.train_tokenizer(tokens.texts_of(comparisons), 300)
    settings = SETTINGS | {'vocab_size': 300, 'n_positions': 200}
    net = dataclasses.replace(network(layers=1), architecture=families.architecture(settings))
    return RewardModel(net, settings, init(net), tokenizer, losses.LossConfig('bradley_terry'),
                       Reading(200), row_length=128)


def small_pairwise_model(comparisons, template=' [A]{first} [B]{second}'):
    """The same that reads two responses together; weights are large enough to tell orders apart."""
    model = small_reward_model(comparisons)
    settings = model.settings | {'n_positions': 400}
    net = dataclasses.replace(model.network, architecture=families.architecture(settings),
                              head=HeadConfig('pairwise'))
    params = jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, init(net))
    return dataclasses.replace(
        model, network=net, settings=settings, params=params,
        loss=losses.LossConfig('pairwise_cross_entropy'),
        reading=Reading(400, pair_template=template))


def write_tokenizer(folder, words=40):
    """Words w0 ... with <eos> and <pad> last, as in the reference."""
    vocab = {f'w{i}': i for i in range(words - 2)} | {'<eos>': words - 2, '<pad>': words - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='w0'))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token='<eos>', pad_token='<pad>').save_pretrained(folder)


def reference_checkpoint(folder):
    """The reference checkpoint with a tokenizer, in a folder below that may be changed."""
    checkpoint = folder / 'checkpoint'
    checkpoint.mkdir()
    for name in ('config.json', 'model.safetensors'):
        shutil.copyfile(REFERENCE / name, checkpoint / name)
    write_tokenizer(checkpoint)
    return checkpoint


def word_pairs(folder):
    """Makes a checkpoint whose tokens are words, and pairs of them; the config keys of both."""
    checkpoint = reference_checkpoint(folder)
    rng = np.random.default_rng(0)

    def text(most):
        return ''.join(f' w{i}' for i in rng.integers(1, 38, rng.integers(2, most)))

    rows = [{'id': str(i), 'prompt': f'w{i % 38}{text(15)}', 'chosen': text(12),
             'rejected': text(12)} for i in range(40)]
    path = folder / 'pairs.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return {'model.checkpoint': str(checkpoint), 'data.path': str(path)}


def load_config(name, arg='', **overrides):
    """A config file of the project with some keys, dotted names, set to other values."""
    config = configs.module(name).get_config(arg)
    config.update_from_flattened_dict(overrides)
    return config


SGD = {'name': 'sgd', 'learning_rate': 0.1, 'schedule': 'constant', 'warmup_fraction': 0.0,
       'warmup_floor': 0.0, 'final_fraction': 0.0, 'clip_norm': 0.0, 'b1': 0.9, 'b2': 0.95,
       'eps': 1e-8, 'weight_decay': 0.0}
# With words for tokens and the reference checkpoint of 40 words.
WORDS = {
    'data.max_length': 24, 'train.batch_size': 4, 'train.row_length': 24, 'train.rows': 2,
    'speed.repeats': 2, 'speed.scored': 6, 'speed.responses': 0,
}
# One row, of which all micro-batches have the same shape: a second one is compiled as long again.
TINY = {
    'data.demo.train': 300, 'data.demo.test': 150, 'model.sizes.hidden_size': 16,
    'model.sizes.num_layers': 1, 'model.sizes.num_heads': 2, 'model.sizes.vocab_size': 300,
    'train.batch_size': 16, 'train.epochs': 1.0, 'train.checkpoint_every': 5,
    'train.rows': 1, 'analysis.bootstrap': 20, 'analysis.null_draws': 20,
}
# Of a policy, which no study reads.
TINY_POLICY = {key: value for key, value in TINY.items() if not key.startswith('analysis.')}
