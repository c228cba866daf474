"""Makes `objectives.json`: what TRL and Tunix compute from the same made-up numbers.

    python tests/reference/make_objectives.py trl
    pip install --no-deps --target=DIR trl==0.11.4
    PYTHONPATH=DIR python tests/reference/make_objectives.py trl_ppo
    python tests/reference/make_objectives.py tunix

The first two with trl 1.16.0, torch 2.13.0 and transformers 5.24.0, the third with google-tunix
0.1.7, jax 0.10.2 and flax 0.12.8. Each replaces its own part of the file. Losses are called as they
are, with log-probabilities in the place of a model's, and differentiated by these. TRL 1.16 has no
PPO and no KL controllers: of 0.11.4, which had them, definitions are taken out of the files and
run, as these cannot be imported beside this transformers.
"""

import ast
import collections.abc
import importlib.util
import json
import pathlib
import sys
import types

import numpy as np

FILE = pathlib.Path(__file__).with_name('objectives.json')
BETA, LOW, HIGH, GAMMA, LAMBDA, CLIP = 0.3, 0.2, 0.28, 0.97, 0.9, 0.25
LENGTH, GROUP, VOCABULARY = 5, 3, 4


def inputs():
    """Six responses of one to five tokens, in two groups; of preferences the first three won."""
    rng = np.random.default_rng(0)
    sizes, shape = np.array([5, 3, 1, 4, 2, 5]), (6, LENGTH)
    old = -rng.gamma(2.0, 0.6, shape)
    found = {
        'old_log_probs': old,
        'log_probs': old + rng.normal(0.0, 0.25, shape),
        'reference_log_probs': old + rng.normal(0.0, 0.4, shape),
        'logits': rng.normal(0.0, 1.0, (*shape, VOCABULARY)),
        'values': rng.normal(0.0, 1.0, shape),
        'new_values': rng.normal(0.0, 1.0, shape),
        'token_rewards': rng.normal(0.0, 1.0, shape),
        'scores': rng.normal(1.0, 2.0, 6),
        'advantages': rng.normal(0.0, 1.0, 6),
        'token_advantages': rng.normal(0.0, 1.0, shape),
    }
    found = {name: np.round(value, 4).astype(np.float32) for name, value in found.items()}
    return found | {'mask': np.arange(LENGTH) < sizes[:, None]}


# --- TRL 1.16 ------------------------------------------------------------------------------------


def trl():
    import torch
    from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

    given = {name: torch.tensor(value) for name, value in inputs().items()}
    mask = given['mask'].int()
    accelerator = types.SimpleNamespace(
        device='cpu', num_processes=1, sync_gradients=True, gather=lambda x: x,
        gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x)
    model = types.SimpleNamespace(training=True)

    def differentiated(loss_of, name='log_probs'):
        x = given[name].clone().requires_grad_()
        loss = loss_of(x)
        loss.backward()
        return {'loss': loss.item(), 'gradient': x.grad.tolist()}

    def trainer(**settings):
        return types.SimpleNamespace(
            accelerator=accelerator, aux_loss_enabled=False, model=model, beta=BETA,
            _metrics={'train': collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
            **settings)

    def grpo(loss_type, beta, corrected=False, entropy_coef=0.0):
        own = trainer(
            top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
            importance_sampling_level='token', loss_type=loss_type, epsilon_low=LOW,
            epsilon_high=HIGH, current_gradient_accumulation_steps=1, max_completion_length=LENGTH,
            args=types.SimpleNamespace(use_bias_correction_kl=corrected, delta=None,
                                       steps_per_generation=1),
            _entropy_bonus_enabled=entropy_coef > 0, use_adaptive_entropy=False,
            entropy_coef=entropy_coef)
        own.beta = beta
        entropies = torch.distributions.Categorical(logits=given['logits']).entropy()
        empty = torch.zeros((6, 0), dtype=torch.int32)

        def loss(x):
            own._get_per_token_logps_and_entropies = lambda *a, **k: (x, entropies, None)
            return GRPOTrainer._compute_loss(own, model, {
                'prompt_ids': empty, 'prompt_mask': empty, 'completion_ids': mask,
                'completion_mask': mask, 'advantages': given['advantages'],
                'old_per_token_logps': given['old_log_probs'],
                'ref_per_token_logps': given['reference_log_probs'],
                'num_items_in_batch': mask.sum()})

        found = differentiated(loss)
        return found | {'clipped': own._metrics['train']['clip_ratio/region_mean'][0]}

    def rloo():
        own = trainer(epsilon_low=LOW, epsilon_high=HIGH)
        empty = torch.zeros((6, 0), dtype=torch.int32)

        def loss(x):
            own._get_per_token_logps_and_entropies = lambda *a, **k: (x, 0 * x.detach(), None)
            return RLOOTrainer._compute_loss(own, model, {
                'prompt_ids': empty, 'prompt_mask': empty, 'completion_ids': mask,
                'completion_mask': mask, 'advantages': given['advantages'],
                'old_logps': (given['old_log_probs'] * mask).sum(1)})

        return differentiated(loss)

    def dpo(loss_type, smoothing=0.0):
        own = trainer(
            ld_alpha=None, precompute_ref_logps=True, f_divergence_type='reverse_kl',
            loss_types=[loss_type], loss_weights=[1.0], label_smoothing=smoothing,
            use_weighting=False)
        # A token of the prompt stands before each response.
        whole = torch.cat([torch.zeros((6, 1), dtype=torch.int32), mask], dim=1)
        summed = (given['reference_log_probs'] * mask).sum(1)

        def loss(x):
            outputs = types.SimpleNamespace(
                log_probs=x * mask, entropy=0 * x, mean_logits=0 * x,
                is_top1=torch.zeros_like(mask).bool())

            def policy(**unused):
                return outputs

            policy.training = True
            own.model = policy
            return DPOTrainer._compute_loss(own, policy, {
                'input_ids': whole, 'attention_mask': torch.ones_like(whole),
                'completion_mask': whole, 'ref_chosen_logps': summed[:3],
                'ref_rejected_logps': summed[3:]}, return_outputs=False)

        found = differentiated(loss)
        return found | {'rewards': [own._metrics['train'][f'rewards/{side}'][0]
                                    for side in ('chosen', 'rejected')]}

    return {
        'grpo': {name: grpo(name, BETA) for name in ('grpo', 'bnpo', 'dr_grpo', 'dapo')},
        'grpo_without_kl': grpo('grpo', 0.0), 'grpo_corrected_kl': grpo('bnpo', BETA, True),
        'grpo_entropy': grpo('bnpo', 0.0, entropy_coef=0.1), 'rloo': rloo(),
        'dpo': {name: dpo(name) for name in ('sigmoid', 'ipo', 'sigmoid_norm')},
        'dpo_robust': dpo('robust', 0.1), 'version': '1.16.0'}


# --- TRL 0.11.4 ----------------------------------------------------------------------------------


def definitions(path, names, scope):
    """The definitions of a file that have these names, run in a scope."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
             and node.name in names]
    assert sorted(node.name for node in nodes) == sorted(names)
    exec(compile(ast.Module(nodes, []), str(path), 'exec'), scope)


def trl_ppo():
    import torch

    folder = pathlib.Path(importlib.util.find_spec('trl').origin).parent
    assert "__version__ = \"0.11.4\"" in (folder / '__init__.py').read_text(encoding='utf-8')
    scope = {'torch': torch, 'F': torch.nn.functional, 'np': np, 'collections': collections,
             **{name: getattr(__import__('typing'), name) for name in (
                 'Optional', 'List', 'Tuple', 'Dict', 'Union')},
             'Mapping': collections.abc.Mapping, 'warnings': __import__('warnings')}
    definitions(folder / 'core.py', ['masked_mean', 'masked_var', 'masked_whiten', 'clip_by_value',
                                     'entropy_from_logits', 'flatten_dict'], scope)
    definitions(folder / 'trainer' / 'utils.py', ['AdaptiveKLController'], scope)
    definitions(folder / 'trainer' / 'ppo_trainer.py', ['compute_rewards', '_kl_penalty',
                                                        'compute_advantages', 'loss'], scope)
    given = {name: torch.tensor(value) for name, value in inputs().items()}
    mask = given['mask'].float()
    config = types.SimpleNamespace(
        whiten_rewards=False, gamma=GAMMA, lam=LAMBDA, cliprange_value=CLIP, cliprange=LOW,
        vf_coef=1.0, ratio_threshold=10.0, kl_penalty='kl')
    own = types.SimpleNamespace(config=config, kl_ctl=types.SimpleNamespace(value=BETA))
    own._kl_penalty = types.MethodType(scope['_kl_penalty'], own)
    rewards, _, _ = scope['compute_rewards'](
        own, given['scores'], given['old_log_probs'], given['reference_log_probs'],
        given['mask'].int())
    _, advantages, returns = scope['compute_advantages'](own, given['values'], rewards, mask)
    x, v = (given[name].clone().requires_grad_() for name in ('log_probs', 'new_values'))
    policy, value, stats = scope['loss'](
        own, given['old_log_probs'], given['values'], given['logits'], v, x, mask,
        given['token_advantages'], given['token_rewards'])
    policy.backward()
    value.backward()
    controller, betas = scope['AdaptiveKLController'](BETA, 6.0, 1000), []
    for kl in (3.0, 6.3, 60.0, 5.9):
        controller.update(kl, 256)
        betas.append(float(controller.value))
    return {
        'rewards': (rewards * mask).tolist(), 'returns': (returns * mask).tolist(),
        'advantages': (advantages * mask).tolist(),
        'whitened': (scope['masked_whiten'](given['token_rewards'], mask) * mask).tolist(),
        'policy': {'loss': policy.item(), 'gradient': x.grad.tolist(),
                   'clipped': float(stats['policy/clipfrac'])},
        'value': {'loss': value.item(), 'gradient': v.grad.tolist(),
                  'clipped': float(stats['val/clipfrac'])},
        'entropy': float(stats['policy/entropy']), 'betas': betas, 'version': '0.11.4'}


# --- Tunix ---------------------------------------------------------------------------------------


def tunix():
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.rl import algo_core, common
    from tunix.sft.dpo import dpo_trainer

    given = {name: jnp.asarray(value) for name, value in inputs().items()}
    mask = given['mask'].astype(jnp.float32)

    class Model(nnx.Module):
        """Of which log-probabilities, or values, are all there is."""

        def __init__(self, numbers):
            self.numbers = nnx.Param(numbers)

    def computed(graph, state, **unused):
        return nnx.merge(graph, state).numbers.get_value(), given['logits']

    common.compute_per_token_logps = computed
    common.compute_score = lambda model, *a, **k: jnp.pad(
        model.numbers.get_value(), ((0, 0), (0, 1)))
    dpo_trainer.compute_logps = lambda model, *a, **k: jnp.split(
        jnp.sum(model.numbers.get_value() * mask, axis=-1), 2)
    example = types.SimpleNamespace(
        prompt_ids=jnp.zeros((6, 0), int), completion_ids=jnp.ones((6, LENGTH), int),
        completion_mask=mask, advantages=given['advantages'],
        old_per_token_logps=given['old_log_probs'], old_values=given['values'],
        ref_per_token_logps=given['reference_log_probs'], returns=given['token_rewards'])

    def differentiated(loss_of, name='log_probs', **named):
        (loss, aux), slope = jax.value_and_grad(lambda x: loss_of(Model(x)), has_aux=True)(
            given[name])
        return {'loss': float(loss), 'gradient': np.asarray(slope).tolist(),
                **{key: float(aux[value]) for key, value in named.items()}}

    def grpo(mode, kl):
        config = types.SimpleNamespace(
            beta=BETA, epsilon=LOW, epsilon_high=HIGH, loss_algo='grpo', loss_agg_mode=mode,
            temperature=1.0, kl_loss_mode=kl, kl_clamp_value=None)
        return differentiated(lambda model: algo_core.grpo_loss_fn(
            model, example, config, 0, 1), clipped='pg_clipfrac', entropy='entropy')

    def ppo():
        config = types.SimpleNamespace(epsilon_low=LOW, epsilon_high=HIGH, entropy_coef=0.1)
        own = types.SimpleNamespace(**vars(example) | {'advantages': given['token_advantages']})
        return differentiated(lambda model: algo_core.ppo_policy_loss_fn(
            model, own, config, 0, 1), clipped='pg_clipfrac', entropy='loss/entropy')

    def dpo(smoothing):
        summed = jnp.split(jnp.sum(given['reference_log_probs'] * mask, axis=-1), 2)
        own = types.SimpleNamespace(
            input_ids=None, positions=None, attention_mask=None, logits_to_keep=LENGTH,
            completion_mask=mask, images=None, ref_chosen_logps=summed[0],
            ref_rejected_logps=summed[1])
        return differentiated(lambda model: dpo_trainer.dpo_loss_fn(
            model, own, beta=BETA, label_smoothing=smoothing),
            chosen='rewards/chosen', rejected='rewards/rejected')

    advantages, returns = algo_core.compute_gae_advantages(
        given['token_rewards'] * mask, given['values'] * mask, mask, GAMMA, LAMBDA)
    scores = given['scores']
    return {
        'grpo': {mode: grpo(mode, 'low_var_kl') for mode in (
            'token-mean', 'sequence-mean-token-mean', 'sequence-mean-token-scale')},
        'kl': {mode: grpo('token-mean', mode) for mode in ('kl', 'mse_kl', 'low_var_kl')},
        'ppo': ppo(), 'value': differentiated(lambda model: algo_core.ppo_value_loss_fn(
            model, example, CLIP, 0, 1), 'new_values', clipped='vf_clipfrac'),
        'advantages': (advantages * mask).tolist(), 'returns': (returns * mask).tolist(),
        'groups': {name: np.asarray(function(scores, GROUP)).tolist() for name, function in (
            ('grpo', lambda *a: algo_core.compute_advantages(np.asarray(a[0]), a[1])),
            ('drgrpo', algo_core.compute_drgrpo_advantages),
            ('rloo', algo_core.compute_rloo_advantages))},
        'dpo': dpo(0.0), 'dpo_smoothed': dpo(0.1), 'version': '0.1.7'}


def main():
    makers = {'trl': trl, 'trl_ppo': trl_ppo, 'tunix': tunix}
    name, = sys.argv[1:]
    found = json.loads(FILE.read_text(encoding='utf-8')) if FILE.exists() else {}
    found['inputs'] = {key: value.tolist() for key, value in inputs().items()}
    found['constants'] = {'beta': BETA, 'low': LOW, 'high': HIGH, 'gamma': GAMMA,
                          'lambda': LAMBDA, 'clip': CLIP, 'length': LENGTH}
    found[name] = makers[name]()
    FILE.write_text(json.dumps(found, sort_keys=True, default=float) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
