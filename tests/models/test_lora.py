"""Adapters against what they mean: a kernel W + s A B."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.data import packing
from qrm.models import families, lora
from qrm.models.families import FAMILIES
from qrm.models.lora import Lora, Module
from qrm.models.network import RewardNetwork
from qrm.models.tuning import Tuning
from qrm.rewards.heads import HeadConfig
from tests.helpers import ARCHITECTURE, encoded, init, network
from tests.helpers import lora as adapters

LLAMA = {'model_type': 'llama', 'vocab_size': 50, 'hidden_size': 16, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 24,
         'max_position_embeddings': 64, 'rope_theta': 10000.0, 'rms_norm_eps': 1e-6}


@pytest.mark.parametrize(('stabilised', 'scaling'), [(False, 1.5), (True, 3.0)])
def test_scaling(stabilised, scaling):
    assert Lora(4, 6.0, stabilised, (Module('mlp/up', 'c_fc', 0, 8),)).scaling == scaling


@pytest.mark.parametrize(('rank', 'alpha'), [(0, 1.0), (4, 0.0), (4, float('inf'))])
def test_sizes_that_cannot_be_are_refused(rank, alpha):
    with pytest.raises(ValueError, match='expected positive numbers'):
        Lora(rank, alpha, False, (Module('mlp/up', 'c_fc', 0, 8),))
    with pytest.raises(ValueError, match='expected at least one'):
        Lora(4, 1.0, False, ())


def test_modules_are_those_of_checkpoints():
    a = families.architecture(LLAMA)
    names = lora.module_names(FAMILIES['llama'], a)
    # 4 heads of queries and 2 of keys and values, of 4 features each; gate beside up.
    assert names == {
        'layers.{}.self_attn.q_proj': Module('attention/qkv', 'q_proj', 0, 16),
        'layers.{}.self_attn.k_proj': Module('attention/qkv', 'k_proj', 16, 24),
        'layers.{}.self_attn.v_proj': Module('attention/qkv', 'v_proj', 24, 32),
        'layers.{}.self_attn.o_proj': Module('attention/output', 'o_proj', 0, 16),
        'layers.{}.mlp.gate_proj': Module('mlp/up', 'gate_proj', 0, 24),
        'layers.{}.mlp.up_proj': Module('mlp/up', 'up_proj', 24, 48),
        'layers.{}.mlp.down_proj': Module('mlp/down', 'down_proj', 0, 16),
    }
    assert lora.module_names(FAMILIES['gpt2'], ARCHITECTURE)['h.{}.attn.c_attn'] == Module(
        'attention/qkv', 'c_attn', 0, 48)


@pytest.mark.parametrize('name', sorted(FAMILIES))
def test_modules_of_a_kernel_have_different_names_in_every_family(name):
    sizes = {'vocab_size': 50, 'max_positions': 64, 'hidden_size': 16, 'num_layers': 2,
             'num_heads': 2}
    sizes |= {} if name == 'gpt2' else {'intermediate_size': 24}
    a = families.architecture(families.random_settings(name, sizes))
    modules = lora.targeted(FAMILIES[name], a, [lora.ALL])
    assert len({(m.kernel, m.name) for m in modules}) == len(modules)
    widths = {kernel: sum(m.stop - m.start for m in modules if m.kernel == kernel)
              for kernel in ('attention/qkv', 'attention/output', 'mlp/up', 'mlp/down')}
    assert widths == {'attention/qkv': sum(a.parts['qkv']), 'attention/output': 16,
                      'mlp/up': sum(a.parts['up']), 'mlp/down': 16}


@pytest.mark.parametrize(('targets', 'kernels'), [
    (['c_proj'], {'attention/output', 'mlp/down'}), (['mlp.c_proj'], {'mlp/down'}),
    (['c_attn', 'c_fc'], {'attention/qkv', 'mlp/up'}),
    (['h.{}.attn.c_attn'], {'attention/qkv'})])
def test_targets_are_ends_of_names(targets, kernels):
    found = lora.targeted(FAMILIES['gpt2'], ARCHITECTURE, targets)
    assert {module.kernel for module in found} == kernels


@pytest.mark.parametrize('target', ['q_proj', 'attn', 'proj', 'wte', ''])
def test_targets_that_are_no_linear_map_are_refused(target):
    with pytest.raises(ValueError, match=r"'all-linear' or some of \['c_attn', 'c_fc', 'c_proj'\]"):
        lora.targeted(FAMILIES['gpt2'], ARCHITECTURE, [target])


@pytest.mark.parametrize('which', [('q', 'k', 'v'), ('k', 'v'), ('k',)])
def test_adapters_add_to_their_own_columns(which):
    parts = {'q': Module('attention/qkv', 'q', 0, 6), 'k': Module('attention/qkv', 'k', 6, 8),
             'v': Module('attention/qkv', 'v', 8, 10)}
    config = Lora(3, 2.0, False, tuple(parts[name] for name in which))
    rng = np.random.default_rng(0)
    params = {name: {'a': rng.normal(size=(5, 3)),
                     'b': rng.normal(size=(3, parts[name].stop - parts[name].start))}
              for name in which}
    x, y = rng.normal(size=(2, 4, 5)), rng.normal(size=(2, 4, 10))
    expected = y.copy()
    for name in which:
        expected[..., parts[name].start:parts[name].stop] += (
            2 / 3 * x @ params[name]['a'] @ params[name]['b'])
    found = lora.add(params, config, 'attention/qkv', x, y, jnp.matmul)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_parts_are_put_together_again_in_the_backward_pass():
    x = jax.random.normal(jax.random.key(0), (2, 3, 9))
    weights = jax.random.normal(jax.random.key(1), (2, 3, 9))

    def total(cut, x):
        parts = cut(x)
        return sum(jnp.sum(w * jnp.sin(part)) for w, part in zip(
            jnp.split(weights, [4, 5], axis=-1), parts, strict=True))

    own = jax.value_and_grad(lambda x: total(lambda x: lora.split(x, (4, 1, 4)), x))(x)
    plain = jax.value_and_grad(lambda x: total(lambda x: jnp.split(x, [4, 5], axis=-1), x))(x)
    jax.tree.map(np.testing.assert_array_equal, own, plain)


def _equations(jaxpr):
    """All equations, those of jaxprs inside included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(one, 'jaxpr', one)
                if hasattr(inner, 'eqns'):
                    yield from _equations(inner)


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'gemma2'])
@pytest.mark.parametrize('tuned', ['all', 'lora'])
def test_nothing_is_padded_at_its_start(family, tuned):
    """Which on CPU is read before its memory begins, see `lora.split`."""
    settings = families.random_settings(family, {
        'vocab_size': 50, 'max_positions': 64, 'hidden_size': 16, 'num_layers': 2, 'num_heads': 4,
        'num_kv_heads': 0 if family == 'gpt2' else 2, 'intermediate_size': 24})
    a = families.architecture(settings)
    tuning = Tuning() if tuned == 'all' else Tuning('lora', lora=Lora(
        4, 6.0, False, lora.targeted(FAMILIES[family], a, [lora.ALL])))
    net = RewardNetwork(a, HeadConfig('scalar'), tuning=tuning)
    batch = packing.pack([encoded('a', 5, (4, 7))],
                         [packing.Layout(length=40, rows=1, slots=2, responses=2)])[0].micro_batch
    jaxpr = jax.make_jaxpr(jax.grad(lambda params: net(params, batch).sum()))(
        jax.eval_shape(net.init, jax.random.key(0)))
    padded = [equation for equation in _equations(jaxpr.jaxpr) if equation.primitive.name == 'pad']
    assert not [one for one in padded if one.params['padding_config'][-1][0] > 0]


def test_adapters_start_as_nothing():
    net = network(tuning=adapters())
    params = net.init(jax.random.key(0))
    up = params['backbone']['blocks']['mlp']['up']['lora']['c_fc']
    assert up['a'].shape == (2, 16, 4)
    assert up['b'].shape == (2, 4, 32)
    assert not up['b'].any()
    # Uniform within 1 / sqrt(16), another draw in each block.
    assert 0.2 < jnp.abs(up['a']).max() <= 0.25
    assert jnp.abs(up['a'][0] - up['a'][1]).max() > 0.1
    plain = network().init(jax.random.key(0))
    _, frozen = net.tuning.split(params)
    jax.tree.map(np.testing.assert_array_equal, frozen['backbone'], plain['backbone'])


@pytest.mark.parametrize('tuning', [
    adapters(), adapters('c_attn', 'mlp.c_proj', rank_stabilised=True)])
@pytest.mark.parametrize('remat', [False, True])
def test_rewards_and_gradients_are_those_of_merged_kernels(tuning, remat):
    """d/dA = s d/dW B^T and d/dB = s A^T d/dW, by the chain rule on W + s A B."""
    net, plain = network('scalar', tuning=tuning, remat=remat), network('scalar')
    layout = packing.Layout(length=40, rows=1, slots=2, responses=2)
    batch = packing.pack([encoded('a', 5, (4, 7)), encoded('b', 3, (6, 2), seed=1)],
                         [layout])[0].micro_batch
    params = init(net)
    whole = {'backbone': lora.merge(params['backbone'], tuning.lora), 'head': params['head']}
    outgoing = jax.random.normal(jax.random.key(1), batch.reads.shape)

    def total(net, params):
        return jnp.sum(net(params, batch)[..., 0] * outgoing)

    found, gradient = jax.jit(jax.value_and_grad(lambda p: total(net, p)))(params)
    of_plain = jax.jit(jax.value_and_grad(lambda p: total(plain, p)))
    expected, of_whole = of_plain(whole)
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert abs(found - of_plain(init(plain))[0]) > 1e-3  # adapters do something
    for module in tuning.lora.modules:
        branch, name = module.kernel.split('/')
        at = params['backbone']['blocks'][branch][name]['lora'][module.name]
        got = gradient['backbone']['blocks'][branch][name]['lora'][module.name]
        of_kernel = of_whole['backbone']['blocks'][branch][name]['kernel'][
            ..., module.start:module.stop]
        s = tuning.lora.scaling
        of_a = s * of_kernel @ at['b'].swapaxes(-1, -2)
        of_b = s * at['a'].swapaxes(-1, -2) @ of_kernel
        for got_one, want in ((got['a'], of_a), (got['b'], of_b)):
            assert np.abs(want).max() > 0
            np.testing.assert_allclose(got_one, want, rtol=0, atol=1e-5 * np.abs(want).max())
