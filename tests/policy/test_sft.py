"""Preferred responses are learnt, token by token, and what was learnt answers and is exported."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
import transformers

from qrm.data.comparisons import DataError
from qrm.models import weights
from qrm.models.families import FAMILIES
from qrm.policy import batches, candidates, export, language_model, runs, sft
from qrm.policy.network import PolicyNetwork
from qrm.policy.sampling import Sampling
from qrm.training import reward_model, workdir
from qrm.training.workdir import WorkdirError
from tests.helpers import (
    ARCHITECTURE,
    TINY_POLICY,
    WORDS,
    encoded,
    init,
    load_config,
    single_batch,
    word_pairs,
)


@pytest.mark.parametrize('prompt', [3, 0])
def test_the_loss_is_the_mean_over_tokens_weighted(prompt):
    """Of responses of 4 and 2 tokens; the first token of a dialogue is predicted from nothing."""
    items = [dataclasses.replace(encoded(i, prompt, (n,), seed=i, weight=w), prompt_sizes=(prompt,))
             for i, (n, w) in enumerate(((4, 1.0), (2, 3.0)))]
    net = PolicyNetwork(dataclasses.replace(ARCHITECTURE, num_layers=1))
    params, objective = init(net), sft.Likelihood(net)
    run = jax.jit(lambda p, b: (objective(p, net.embed(p, b), b, None, None)[1],
                                net.log_probs(p, b)))
    total, count, found = 0.0, 0.0, []
    for item in items:
        batch = batches.policy_batch(single_batch(item, 8), 4)
        sums, log_probs = run(params, batch)
        n = len(item.responses[0]) - (not prompt)
        found.append([np.asarray(log_probs)[0, 0, :len(item.responses[0])]])
        assert int(batch.mask.sum()) == n
        assert float(sums.loss) == pytest.approx(-item.weight * found[-1][0].sum(), rel=1e-5)
        assert (float(sums.weight), float(sums.tokens)) == (item.weight * n, n)
        total, count = total - item.weight * found[-1][0].sum(), count + item.weight * n
    metrics = sft.held_out(items, found)
    assert metrics['nll'] == pytest.approx(total / count, rel=1e-6)
    assert metrics['response_nll'] == pytest.approx(total / 4.0, rel=1e-6)
    assert metrics['tokens'] == (6 if prompt else 4)


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """Config keys of a model whose tokens are words, without a head, and of pairs."""
    folder = tmp_path_factory.mktemp('words')
    keys = word_pairs(folder)
    path = os.path.join(keys['model.checkpoint'], 'model.safetensors')
    tensors = {name: np.asarray(tensor) for name, tensor in weights.read_file(path).items()
               if name != 'score.weight'}
    weights.write_file(path, tensors)
    return keys


def config(keys, **kwargs):
    own = {key: value for key, value in WORDS.items() if not key.startswith('speed')}
    return load_config('sft', **own | {
        'train.max_steps': 3, 'train.checkpoint_every': 2, 'optimizer.learning_rate': 0.01,
        'data.cache': ''} | keys | kwargs)


@pytest.fixture(scope='module', params=['all', 'lora'])
def run(request, words, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('run') / request.param)
    sft.train(config(words, **{'train.tune': request.param}), folder)
    return request.param, folder


def test_a_run_is_a_language_model_and_is_exported(run, words, tmp_path):
    kind, folder = run
    rows = workdir.read_metrics(folder)
    assert [row['step'] for row in rows if row['split'] == 'train'] == [1, 2, 3]
    assert [row['step'] for row in rows if row['split'] == 'validation'] == [2, 3]
    model, start = language_model.load(folder), language_model.load(words['model.checkpoint'])
    assert model.stops == start.stops == (38,)
    moved = [float(np.abs(a - b).max()) for a, b in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(start.params), strict=True)]
    assert max(moved) > 1e-3
    assert all(np.isfinite(row['nll' if row['split'] == 'validation' else 'loss']) for row in rows)
    # It answers.
    (tmp_path / 'in.jsonl').write_text(json.dumps({'prompt': 'w3 w4'}) + '\n')
    message = candidates.sample_file(model, str(tmp_path / 'in.jsonl'),
                                     str(tmp_path / 'out.jsonl'), Sampling(2, 3), seed=0, rows=2)
    assert '1 prompts, 2 responses' in message
    # Exported it is the same, with its own way to end.
    out = str(tmp_path / 'exported')
    line = export.export(language_model.load_run(folder), out)
    assert line.startswith(f'{out}: GPT2LMHeadModel, float32, ')
    again = language_model.load(out)
    assert again.stops == model.stops
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    settings = weights.read_json(os.path.join(out, 'config.json'))
    assert settings['architectures'] == [FAMILIES['gpt2'].language_model]
    with pytest.raises(DataError, match='exists, expected a folder to be made'):
        export.export(language_model.load_run(folder), out)
    adapter = str(tmp_path / 'adapter')
    if kind == 'all':
        with pytest.raises(DataError, match="'adapter' of a model without adapters"):
            export.export(language_model.load_run(folder), adapter, kind='adapter')
        return
    export.export(language_model.load_run(folder), adapter, kind='adapter')
    assert weights.read_json(os.path.join(adapter, 'adapter_config.json'))['task_type'] == (
        'CAUSAL_LM')
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
                 language_model.load(adapter).params, model.params)


def test_transformers_gives_the_same_log_probs(run, words, tmp_path):
    torch = pytest.importorskip('torch')
    out = str(tmp_path / 'exported')
    found = language_model.load_run(run[1])
    export.export(found, out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation='eager').eval()
    prepared = runs.prepare(config(words), str(tmp_path), demonstrations=True)
    items = [prepared.data.encoded['train'][i] for i in range(4)]
    for item, (own,) in zip(items, next(runs.log_probs(
            found.network, found.params, items, row_length=24, rows=1)), strict=True):
        dialogue = torch.tensor(np.r_[item.prompt, item.responses[0]].astype(np.int64))[None]
        with torch.no_grad():
            log_p = torch.log_softmax(theirs(dialogue).logits[0], dim=-1).numpy()
        places = np.arange(item.prompt_sizes[0], dialogue.shape[1])
        np.testing.assert_allclose(own, log_p[places - 1, dialogue[0, places]], rtol=0, atol=1e-5)


def test_a_policy_is_no_reward_model_and_the_other_way_round(run, tmp_path):
    kind, folder = run
    with pytest.raises(WorkdirError, match='a run that trained a language model; expected a rew'):
        reward_model.load(folder)
    with pytest.raises(DataError, match='a run says itself which day'):
        language_model.load(folder, date='2026-01-02')
    copy = str(tmp_path / kind)
    shutil.copytree(folder, copy)
    path = os.path.join(copy, 'model.json')
    values = workdir.read_json(path)
    del values['stops']
    workdir.write_json(path, values)
    with pytest.raises(DataError, match='a run, which is a reward model; expected a language mod'):
        language_model.load(copy)


def test_rows_of_all_forms_teach_their_preferred_response(words, tmp_path):
    rows = [{'id': 'pair', 'prompt': 'w1 w2', 'chosen': ' w3', 'rejected': ' w4 w5'},
            {'id': 'ranked', 'prompt': 'w6', 'responses': [' w7', ' w8 w9', ' w8'],
             'ranks': [2, 0, 1]},
            {'id': 'alone', 'prompt': 'w10', 'response': ' w11'},
            {'id': 'tied', 'prompt': 'w12', 'responses': [' w13', ' w14'], 'preference': 0.5},
            {'id': 'none', 'prompt': 'w15', 'responses': [' w16', ' w17'], 'weight': 0.0,
             'preferred': 0}]
    for split in ('train', 'validation', 'test'):
        (tmp_path / f'{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    own = config(words, **{'data.path': str(tmp_path)})
    prepared = runs.prepare(own, str(tmp_path / 'run'), demonstrations=True)
    found = {item.id: (item.prompt.tolist(), *(ids.tolist() for ids in item.responses))
             for item in prepared.data.encoded['train']}
    assert found == {'pair': ([1, 2], [3, 38]), 'ranked': ([6], [8, 9, 38]),
                     'alone': ([10], [11, 38])}
    report = prepared.data.reports['train']
    assert (report.read, report.kept) == (5, 3)
    assert report.dropped == {'no response preferred to all others, or weight 0': 2}


def test_a_checkpoint_with_a_reward_head_is_refused(tmp_path):
    keys = word_pairs(tmp_path)
    with pytest.raises(DataError, match='has a reward head, expected a language model'):
        sft.train(config(keys), str(tmp_path / 'run'))
    assert not os.path.exists(tmp_path / 'run' / 'config.json')


def test_random_weights_learn_the_demo(tmp_path):
    folder = str(tmp_path / 'run')
    sft.train(load_config('sft', 'demo', **TINY_POLICY | {
        'train.max_steps': 8, 'optimizer.learning_rate': 0.05}), folder)
    losses = [row['loss'] for row in workdir.read_metrics(folder) if row['split'] == 'train']
    assert losses[-1] < losses[0] - 0.5
    assert language_model.load_run(folder).stops == (0,)
