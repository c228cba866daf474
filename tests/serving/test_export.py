"""Exported models score as they did here: read back by us, and where torch is by others.

These are transformers and, for adapters, peft.
"""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors import numpy as safetensors_numpy

import qrm
from qrm.data import tokens
from qrm.data.comparisons import DataError
from qrm.data.rows import parse_row
from qrm.data.tokens import Reading, tokenize
from qrm.models import families, lora, weights
from qrm.models.architecture import leaf_dtype, tree
from qrm.models.families import FAMILIES
from qrm.models.lora import Lora
from qrm.models.network import RewardNetwork
from qrm.models.tuning import Tuning
from qrm.rewards import losses
from qrm.rewards.heads import HeadConfig
from qrm.rewards.normalisation import Normalisation
from qrm.serving import export
from qrm.training import reward_model, train
from qrm.training.base import Base
from qrm.training.reward_model import RewardModel
from tests.helpers import WORDS, command, load_config, word_pairs

TEXTS = ['a b', 'How many? 12 or 3.', 'yes\n\nno  way']
PROMPT, RESPONSES = 'a question 42?', [' an answer', ' 7', ' another one \n']
SIZES = {'vocab_size': 300, 'max_positions': 64, 'hidden_size': 16, 'num_layers': 3,
         'num_heads': 4, 'intermediate_size': 24}
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope='module')
def tokenizer():
    return tokens.train_tokenizer(TEXTS * 3, 300)


def make(tokenizer, family='llama', head=None, vocab_size=300):
    """A reward model of a family with random parameters, large enough to tell rewards apart."""
    settings = families.random_settings(family, SIZES | {'vocab_size': vocab_size})
    # Windows and caps that matter for dialogues of a dozen tokens.
    matter = {'sliding_window': 4, 'query_pre_attn_scalar': 3, 'attn_logit_softcapping': 2.0}
    settings |= {key: value for key, value in matter.items() if key in settings}
    if family == 'modernbert':
        settings['local_attention'] = 6
    a = families.architecture(settings)
    head = head or HeadConfig('quantile', 4, reads=families.classifier_reads(settings))
    network = RewardNetwork(a, head)
    params = jax.jit(network.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(tree, [
        x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])
    reading = Reading(64, append_eos=a.causal, share_prompt=a.causal)
    return RewardModel(network, settings, params, tokenizer, losses.LossConfig('bradley_terry'),
                       reading, row_length=64)


def scored(model):
    scores = model.score([PROMPT], [RESPONSES])
    return scores.rewards[0], scores.quantiles[0]


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_comes_back_with_its_rewards(tokenizer, tmp_path, family):
    model = make(tokenizer, family)
    rewards, quantiles = scored(model)
    assert np.ptp(rewards) > 1e-3
    for kind, expected in (('mean', rewards[:, None]), ('quantiles', quantiles)):
        folder = str(tmp_path / kind)
        message = export.export(model, folder, kind=kind)
        assert message.startswith(f'{folder}: {FAMILIES[family].classifier} with ')
        back = qrm.load(folder)
        assert back.network.architecture.layers == model.network.architecture.layers
        np.testing.assert_allclose(scored(back)[1], expected, rtol=0, atol=1e-5)
    assert {path.name for path in (tmp_path / 'mean').iterdir()} == {
        'README.md', 'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}


@pytest.mark.parametrize('family', FAMILIES)
def test_transformers_gives_the_same_rewards(tokenizer, tmp_path, family):
    torch = pytest.importorskip('torch')
    model = make(tokenizer, family)
    rewards, quantiles = scored(model)
    texts = [PROMPT + r + tokenizer.eos_token * model.reading.append_eos for r in RESPONSES]
    for kind, expected in (('mean', rewards[:, None]), ('quantiles', quantiles)):
        folder = str(tmp_path / kind)
        export.export(model, folder, kind=kind)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation='eager').eval()
        reader = tokens.load_tokenizer(folder)
        batch = reader(texts, return_tensors='pt', padding=True, return_token_type_ids=False)
        with torch.no_grad():
            found = theirs(**batch).logits.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


# What is written.


def test_settings_are_read_alike_by_versions_4_and_5(tokenizer, tmp_path):
    model = make(tokenizer)
    scaling = {'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0,
               'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
    model = dataclasses.replace(model, settings={
        **model.settings, 'rope_parameters': {'rope_theta': 5000.0, **scaling}})
    export.export(model, str(tmp_path / 'model'), kind='quantiles')
    found = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert found['rope_parameters'] == {'rope_theta': 5000.0, **scaling}
    assert (found['rope_theta'], found['rope_scaling']) == (5000.0, scaling)
    assert found['architectures'] == ['LlamaForSequenceClassification']
    assert found['num_labels'] == 4
    assert found['id2label'] == {'0': 'quantile 0.125', '1': 'quantile 0.375',
                                 '2': 'quantile 0.625', '3': 'quantile 0.875'}
    assert found['pad_token_id'] == model.tokenizer.pad_token_id


def test_tensors_are_those_of_torch(tokenizer, tmp_path):
    model = make(tokenizer)
    export.export(model, str(tmp_path / 'model'))
    tensors = safetensors_numpy.load_file(tmp_path / 'model' / 'model.safetensors')
    qkv = np.asarray(model.params['backbone']['blocks']['attention']['qkv']['kernel'])
    # [out, in] of queries, keys and values, of 16 outputs each.
    for i, name in enumerate('qkv'):
        np.testing.assert_array_equal(
            tensors[f'model.layers.1.self_attn.{name}_proj.weight'],
            qkv[1, :, 16 * i:16 * (i + 1)].T)
    np.testing.assert_array_equal(tensors['model.embed_tokens.weight'],
                                  model.params['backbone']['tokens'])
    np.testing.assert_allclose(
        tensors['score.weight'], model.params['head']['kernel'].mean(axis=1)[None], rtol=1e-5)


def test_half_precision(tokenizer, tmp_path):
    model = make(tokenizer)
    for dtype in ('bfloat16', 'float16'):
        export.export(model, str(tmp_path / dtype), dtype=dtype)
        back = scored(qrm.load(str(tmp_path / dtype)))[0]
        expected = scored(model)[0]
        assert 0 < np.abs(back - expected).max() < 0.05 * np.abs(expected).max()


def test_shards_are_written_with_an_index(tokenizer, tmp_path, monkeypatch):
    model = make(tokenizer)
    write = export.weights.write_tensors
    monkeypatch.setattr(export.weights, 'write_tensors',
                        lambda folder, tensors, shard_bytes: write(folder, tensors,
                                                                   shard_bytes=10000))
    export.export(model, str(tmp_path / 'model'))
    files = {path.name for path in (tmp_path / 'model').glob('*.safetensors')}
    assert len(files) > 2
    assert 'model-00001-of-' in min(files)
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'model')))[0], scored(model)[0],
                               rtol=0, atol=1e-5)


def test_padding_is_no_token_that_dialogues_end_with(tokenizer, tmp_path):
    # GPT-2's tokenizer has none, and TRL would take EOS, before which transformers reads.
    bare = tokens.train_tokenizer(TEXTS * 3, 300)
    bare.pad_token = None
    model = make(bare)
    export.export(model, str(tmp_path / 'model'))
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    back = tokens.load_tokenizer(str(tmp_path / 'model'))
    assert config['pad_token_id'] == back.pad_token_id != back.eos_token_id
    assert config['vocab_size'] >= 300
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'model')))[0], scored(model)[0],
                               rtol=0, atol=1e-5)


def unpadded(tmp_path):
    """A tokenizer that knows no padding, and a special token `<|other|>`."""
    saved = tmp_path / 'tokenizer'
    tokens.save_tokenizer(tokens.train_tokenizer(TEXTS * 3, 300), str(saved))
    for path in saved.iterdir():
        path.write_text(path.read_text().replace('<|pad|>', '<|other|>'))
    found = tokens.load_tokenizer(str(saved))
    found.pad_token = None
    return found


def test_a_padding_token_that_is_new_gets_an_embedding(tmp_path):
    full = unpadded(tmp_path)
    model = make(full, vocab_size=len(full))
    export.export(model, str(tmp_path / 'model'))
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert config['pad_token_id'] == len(full)
    assert config['vocab_size'] == len(full) + 1
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'model')))[0], scored(model)[0],
                               rtol=0, atol=1e-5)


@pytest.mark.parametrize('template', [CHAT, CHAT + '\n', CHAT + "{{ eos_token }}\n",
                                      CHAT + "{{ eos_token + '\\n' }}"])
def test_chat_templates_end_as_dialogues_are_read(tmp_path, template):
    chatty = tokens.train_tokenizer(TEXTS * 3, 300)
    chatty.chat_template = template
    model = make(chatty)
    export.export(model, str(tmp_path / 'model'))
    chat = [{'role': 'user', 'content': 'a b'}, {'role': 'assistant', 'content': 'yes '}]
    row = parse_row({'prompt': chat[:1], 'responses': [chat[1:]]}, 'row')
    [[expected]] = tokenize([row], chatty, model.reading)
    back = tokens.load_tokenizer(str(tmp_path / 'model'))
    found = back.apply_chat_template(chat, tokenize=True)['input_ids']
    assert found == expected.tolist()
    # What a model is to go on from is left as it was.
    begin = [chatty, back]
    one, other = (t.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
                  for t in begin)
    assert other.rstrip('\n') == one.rstrip('\n')


def test_texts_that_are_read_as_chats_are_so_after_an_export(tmp_path):
    chatty = tokens.train_tokenizer(TEXTS * 3, 300)
    chatty.chat_template = CHAT
    plain = make(chatty)
    model = dataclasses.replace(plain, reading=dataclasses.replace(plain.reading, as_chats=True))
    export.export(model, str(tmp_path / 'model'))
    assert 'use the chat template' in (tmp_path / 'model' / 'README.md').read_text()
    back = qrm.load(str(tmp_path / 'model'))
    np.testing.assert_allclose(scored(back)[0], scored(model)[0], rtol=0, atol=1e-5)
    assert np.abs(scored(model)[0] - scored(plain)[0]).max() > 0.01
    assert reward_model.stored_reading(str(tmp_path / 'model')) == {
        'append_eos': True, 'as_chats': True}


def test_the_card_says_how_to_use_it(tokenizer, tmp_path):
    model = make(tokenizer)
    export.export(model, str(tmp_path / 'q'), kind='quantiles')
    text = (tmp_path / 'q' / 'README.md').read_text()
    for words in ('LlamaForSequenceClassification', '4 labels are quantiles', '0.125, 0.375',
                  'tokenizer.eos_token', 'at the last token that is not padding', '64 tokens'):
        assert words in text
    export.export(model, str(tmp_path / 'm'))
    assert 'one label is the mean' in (tmp_path / 'm' / 'README.md').read_text()


# Of models that are normalised.


def normalised(model):
    return dataclasses.replace(model, normalisation=Normalisation(-0.7, 0.25))


def changed(folder, **settings):
    """Changes a config.json; None: takes the key out."""
    path = folder / 'config.json'
    found = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


@pytest.mark.parametrize(('family', 'kind'), [
    ('llama', 'mean'), ('llama', 'quantiles'), ('bert', 'mean')])
def test_normalised_rewards_come_back(tokenizer, tmp_path, family, kind):
    raw = make(tokenizer, family)
    model, folder = normalised(raw), tmp_path / 'model'
    message = export.export(model, str(folder), kind=kind)
    rewards, quantiles = scored(raw)
    before = quantiles if kind == 'quantiles' else rewards[:, None]
    expected = (before.astype(np.float64) + 0.7) / 0.25
    back = qrm.load(str(folder))
    np.testing.assert_allclose(scored(back)[1], expected, rtol=1e-5, atol=1e-5)
    assert back.normalisation == model.normalisation
    # Win probabilities are of the rewards that were trained.
    again = qrm.load(str(folder), raw=True)
    np.testing.assert_allclose(scored(again)[1], before, rtol=1e-5, atol=1e-5)
    export.export(back, str(tmp_path / 'again'), kind=kind)
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'again')))[1], expected, rtol=1e-5,
                               atol=1e-5)
    # What the tensors alone give, as transformers reads them.
    changed(folder, qrm_mean=None, qrm_std=None, normalize_reward=None)
    labels, bias = scored(qrm.load(str(folder)))[1], family == 'bert'
    np.testing.assert_allclose(labels, expected if bias else before / 0.25, rtol=1e-5, atol=1e-5)
    if not bias and kind == 'mean':  # OpenRLHF computes this, by its own keys
        found = json.loads((folder / 'config.json').read_text())
        np.testing.assert_allclose((labels - found['mean']) / found['std'], expected, rtol=1e-5,
                                   atol=1e-5)
        assert message.endswith("qrm does it, and config.json has it as OpenRLHF's mean")
    by = 'labels are (reward + 0.7) / 0.25' if bias else (
        'labels are reward / 0.25, and -2.8 is still to be subtracted, as '
        f'{FAMILIES[family].classifier} has no bias')
    assert f'; normalised: {by}' in message
    assert f'- normalised: {by}' in (folder / 'README.md').read_text()


def test_what_a_checkpoint_says_of_its_own_head_is_not_said_of_another(tokenizer, tmp_path):
    """A run that started from a reward model of OpenRLHF has a head of its own."""
    model = make(tokenizer)
    started = dataclasses.replace(model, settings={
        **model.settings, 'normalize_reward': True, 'mean': 3.0, 'std': 2.0,
        'value_head_prefix': 'value_head', 'qrm_mean': 1.0, 'qrm_std': 5.0})
    message = export.export(started, str(tmp_path / 'model'))
    assert 'normalised' not in message + (tmp_path / 'model' / 'README.md').read_text()
    found = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert not found.keys() & {'normalize_reward', 'mean', 'std', 'value_head_prefix', 'qrm_std'}
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'model')))[0], scored(model)[0],
                               rtol=0, atol=1e-5)


def test_adapters_are_normalised_whatever_their_base_is(tokenizer, tmp_path):
    model = adapted(tokenizer, tmp_path / 'base')
    changed(tmp_path / 'base', qrm_mean=1.0, qrm_std=5.0, qrm_outputs='mean')
    for one, name in ((model, 'raw'), (normalised(model), 'normalised')):
        message = export.export(one, str(tmp_path / name), kind='adapter')
        np.testing.assert_allclose(scored(qrm.load(str(tmp_path / name)))[1], scored(one)[1],
                                   rtol=1e-4, atol=1e-4)
    assert message.endswith('; normalised: labels are reward / 0.25, and -2.8 is still to be '
                            'subtracted, as LlamaForSequenceClassification has no bias; qrm does '
                            'it')


# What a classifier can compute.


@pytest.mark.parametrize(('head', 'kinds'), [
    (HeadConfig('scalar'), {'mean', 'quantiles'}),
    (HeadConfig('quantile', 3), {'mean', 'quantiles'}),
    (HeadConfig('monotone_quantile', 3), {'mean'}),
    (HeadConfig('gaussian'), {'mean'}),
    (HeadConfig('implicit_quantile', 3, num_cosines=4), {'mean', 'quantiles'}),
    (HeadConfig('quantile', 3, members=2), {'mean'}),
    (HeadConfig('categorical', num_atoms=3), set()),
    (HeadConfig('quantile', 3, hidden_layers=(5,)), set()),
])
def test_linear_heads_are_found_to_be(head, kinds):
    params = qrm_init(head, 6)
    hidden = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    for kind in ('mean', 'quantiles'):
        if kind not in kinds:
            with pytest.raises(DataError, match=f'the {kind} of a {head.name} head is no linear'):
                export.linear_head(head, params, kind)
            continue
        kernel, bias = export.linear_head(head, params, kind)
        outputs = export.heads.apply(head, params, hidden)
        expected = (head.read(outputs).distribution.mean[:, None] if kind == 'mean'
                    else head.quantiles(outputs))
        np.testing.assert_allclose(hidden @ kernel + bias, expected, rtol=1e-4, atol=1e-5)


def qrm_init(head, width):
    """Random parameters of a head, biases too."""
    params = export.heads.init(head, jax.random.key(0), width)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(key, x.shape)
                                     for x, key in zip(leaves, keys, strict=True)])


def test_what_cannot_be_exported_is_refused(tokenizer, tmp_path):
    folder = str(tmp_path / 'model')
    for head, message in (
        (HeadConfig('quantile', 2, attributes=('a', 'b')), 'a gate weighs attributes'),
        (HeadConfig('quantile', 2, reads=('last', 'mean')), 'the head reads last, mean'),
        (HeadConfig('scalar', bias=True), 'the head has a bias'),
        (HeadConfig('pairwise'), 'a pairwise model compares two responses and scores none alone'),
    ):
        with pytest.raises(DataError, match=message):
            export.export(make(tokenizer, head=head), folder)
    assert not pathlib.Path(folder).exists()
    pathlib.Path(folder).mkdir()
    with pytest.raises(DataError, match='exists, expected a folder to be made'):
        export.export(make(tokenizer), folder)


def test_the_command_exports_what_it_loads(tokenizer, tmp_path):
    model = make(tokenizer)
    export.export(model, str(tmp_path / 'first'), kind='quantiles')
    out, _ = command('export', f'--workdir={tmp_path}/first', f'--output={tmp_path}/second')
    assert 'LlamaForSequenceClassification with 1 label (mean), float32' in out
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'second')))[0], scored(model)[0],
                               rtol=0, atol=1e-5)
    _, err = command('export', f'--workdir={tmp_path}/first', f'--output={tmp_path}/second', code=2)
    assert 'exists, expected a folder to be made' in err


# What a fresh reader met.


def test_a_model_without_eos_comes_back_without(tokenizer, tmp_path):
    model = make(tokenizer)
    model = dataclasses.replace(model, reading=dataclasses.replace(model.reading, append_eos=False))
    export.export(model, str(tmp_path / 'model'))
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'model')))[0], scored(model)[0],
                               rtol=0, atol=1e-5)
    assert 'eos_token' not in (tmp_path / 'model' / 'README.md').read_text()


@pytest.mark.parametrize('single', ['$A <|endoftext|>', '$A <|pad|>'])
def test_tokenizers_that_end_texts_themselves(tmp_path, single):
    own = tokens.train_tokenizer(TEXTS * 3, 300)
    last = single.split()[-1]
    own.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(last, own.convert_tokens_to_ids(last))])
    model = make(own)
    if last != own.eos_token:
        with pytest.raises(DataError, match='the tokenizer puts tokens after EOS'):
            export.export(model, str(tmp_path / 'model'))
        return
    export.export(model, str(tmp_path / 'model'))
    assert '+ tokenizer.eos_token' not in (tmp_path / 'model' / 'README.md').read_text()


def test_numbers_that_a_dtype_cannot_hold_are_refused(tokenizer, tmp_path):
    model = make(tokenizer)
    backbone = model.params['backbone'] | {'tokens': 1e6 * model.params['backbone']['tokens']}
    model = dataclasses.replace(model, params=model.params | {'backbone': backbone})
    with pytest.raises(DataError, match=r'embed_tokens.weight is not finite in float16'):
        export.export(model, str(tmp_path / 'model'), dtype='float16')


def test_nothing_else_is_touched(tokenizer, tmp_path, monkeypatch):
    (tmp_path / 'model.tmp').mkdir()
    (tmp_path / 'model.tmp' / 'notes').write_text('mine')
    export.export(make(tokenizer), str(tmp_path / 'model'))
    assert (tmp_path / 'model.tmp' / 'notes').read_text() == 'mine'
    assert sorted(os.listdir(tmp_path)) == ['model', 'model.tmp']

    def fail(*args):
        raise DataError('no')

    # Half of one does not stay either.
    monkeypatch.setattr(export.weights, 'write_folder', fail)
    with pytest.raises(DataError, match='no'):
        export.export(make(tokenizer), str(tmp_path / 'other'))
    assert sorted(os.listdir(tmp_path)) == ['model', 'model.tmp']


def test_a_folder_that_cannot_be_made(tokenizer, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(DataError, match='cannot be made'):
        export.export(make(tokenizer), str(tmp_path / 'file' / 'model'))


# Adapters.


def adapted(tokenizer, folder, family='llama', head=None, targets=(lora.ALL,), vocab_size=300, *,
            rank_stabilised=False, dtype='float32'):
    """A model with adapters to a language model in a folder, which is written."""
    whole = make(tokenizer, family, head, vocab_size)
    settings = families.portable_settings(whole.settings) | {
        'architectures': [FAMILIES[family].language_model]}
    plain = {name: x for name, x in whole.params['backbone'].items() if name != 'pooler'}
    folder.mkdir()
    weights.write_folder(str(folder), settings, weights.backbone_tensors(settings, plain))
    tokens.save_tokenizer(tokenizer, str(folder))
    modules = lora.targeted(FAMILIES[family], whole.network.architecture, targets)
    network = dataclasses.replace(whole.network, tuning=Tuning(
        'lora', lora=Lora(2, 3.0, rank_stabilised, modules)))
    known = flat(whole.params)
    shapes = flat(jax.eval_shape(network.init, jax.random.key(0)))
    params = {path: known[path] if path in known else np.float32(
        0.3 * np.random.default_rng(i).normal(size=leaf.shape))
        for i, (path, leaf) in enumerate(shapes.items())}
    if dtype == 'bfloat16':
        params = {path: leaf.astype(leaf_dtype(path.removeprefix('backbone/'), dtype))
                  for path, leaf in params.items()}
    return dataclasses.replace(whole, network=network, settings=settings, params=tree(params),
                               base=Base(str(folder), 0, dtype))


def flat(params):
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize('family', FAMILIES)
def test_adapters_of_every_family_come_back_with_their_rewards(tokenizer, tmp_path, family):
    model = adapted(tokenizer, tmp_path / 'base', family)
    expected = scored(model)[1]
    assert np.abs(expected - scored(make(tokenizer, family))[1]).max() > 0.05
    message = export.export(model, str(tmp_path / 'adapter'), kind='adapter')
    assert message.startswith(f'{tmp_path}/adapter: adapter to {tmp_path}/base, '
                              f'{FAMILIES[family].classifier} with 4 labels (quantiles), float32, ')
    assert 'note' not in message
    assert {path.name for path in (tmp_path / 'adapter').iterdir()} == {
        'README.md', 'adapter_config.json', 'adapter_model.safetensors', 'tokenizer.json',
        'tokenizer_config.json'}
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'adapter')))[1], expected, rtol=0,
                               atol=1e-4)
    export.export(model, str(tmp_path / 'merged'), kind='merged')
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'merged')))[1], expected, rtol=0,
                               atol=1e-4)


@pytest.mark.filterwarnings('ignore::FutureWarning')  # peft asks transformers in an old way
@pytest.mark.parametrize(('family', 'head', 'targets', 'stabilised'), [
    ('llama', 'scalar', ('q_proj', 'v_proj'), False), ('llama', 'quantile', (lora.ALL,), True),
    ('gpt2', 'scalar', ('mlp.c_proj', 'c_attn'), True), ('gpt2', 'quantile', (lora.ALL,), False),
    ('bert', 'quantile', ('attention.output.dense',), True), ('bert', 'scalar', (lora.ALL,), False),
    ('modernbert', 'quantile', (lora.ALL,), False), ('qwen3', 'scalar', ('gate_proj',), False)])
def test_peft_gives_the_same_rewards_as_its_card_says(
        tokenizer, tmp_path, family, head, targets, stabilised):
    torch = pytest.importorskip('torch')
    peft = pytest.importorskip('peft')
    reads = ('last',) if FAMILIES[family].head == 'score' else ('first',)
    model = adapted(tokenizer, tmp_path / 'base', family, HeadConfig(head, 10, reads=reads),
                    targets, rank_stabilised=stabilised)
    rewards, quantiles = scored(model)
    folder = str(tmp_path / 'adapter')
    export.export(model, folder, kind='adapter')
    code = (tmp_path / 'adapter' / 'README.md').read_text().split('```')[1]
    found = {}
    exec(code.removeprefix('python').replace('THIS_FOLDER', folder), found)
    texts = [PROMPT + r + tokenizer.eos_token * model.reading.append_eos for r in RESPONSES]
    batch = tokens.load_tokenizer(folder)(texts, return_tensors='pt', padding=True,
                                          return_token_type_ids=False)
    with torch.no_grad():
        logits = found['model'](**batch).logits.numpy()
    expected = quantiles if head == 'quantile' else rewards[:, None]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert np.ptp(expected) > 1e-3
    # What peft says of it is what we say of it.
    found['model'].save_pretrained(str(tmp_path / 'theirs'))
    ours, theirs = (json.loads((tmp_path / name / 'adapter_config.json').read_text())
                    for name in ('adapter', 'theirs'))
    for config in (ours, theirs):
        config['target_modules'] = sorted(config['target_modules'])
        config['modules_to_save'] = sorted(set(config['modules_to_save']))
    assert ours.items() <= theirs.items()
    ours, theirs = (safetensors_numpy.load_file(tmp_path / name / 'adapter_model.safetensors')
                    for name in ('adapter', 'theirs'))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name])
    assert peft.__version__ == json.loads(
        (tmp_path / 'theirs' / 'adapter_config.json').read_text())['peft_version']


@pytest.mark.parametrize(('family', 'targets', 'expected'), [
    ('llama', ['q_proj', 'o_proj'], ['o_proj', 'q_proj']),
    ('gpt2', ['c_proj'], ['c_proj']),
    ('gpt2', ['mlp.c_proj', 'c_attn'], ['c_attn', 'mlp.c_proj']),
    ('bert', ['query', 'attention.output.dense'], ['attention.output.dense', 'query']),
    # The pooler is a `dense` too, and ends of these are those of attention.
    ('bert', ['intermediate.dense', 'encoder.layer.{}.output.dense'],
     ['0.output.dense', '1.output.dense', '2.output.dense', 'intermediate.dense']),
    ('bert', [lora.ALL], ['intermediate.dense', 'key', 'output.dense', 'query', 'value']),
    ('modernbert', ['Wi', 'mlp.Wo'], ['Wi', 'mlp.Wo']),
])
def test_the_config_names_what_is_adapted(tokenizer, tmp_path, family, targets, expected):
    model = adapted(tokenizer, tmp_path / 'base', family, targets=targets, rank_stabilised=True)
    export.export(model, str(tmp_path / 'adapter'), kind='adapter')
    config = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert config.pop('target_modules') == expected
    pooler = {'bert': ['pooler'], 'modernbert': ['head']}.get(family, [])
    assert config == {
        'peft_type': 'LORA', 'task_type': 'SEQ_CLS', 'base_model_name_or_path': f'{tmp_path}/base',
        'revision': None, 'inference_mode': True, 'r': 2, 'lora_alpha': 3, 'use_rslora': True,
        'rank_pattern': {}, 'alpha_pattern': {}, 'lora_dropout': 0.0, 'bias': 'none',
        'init_lora_weights': True, 'fan_in_fan_out': family == 'gpt2',
        'modules_to_save': [*pooler, 'classifier', 'score']}


def test_a_scalar_head_has_one_label_and_half_precision_less(tokenizer, tmp_path):
    model = adapted(tokenizer, tmp_path / 'base', head=HeadConfig('scalar'))
    for kind in ('adapter', 'merged'):
        message = export.export(model, str(tmp_path / kind), kind=kind, dtype='bfloat16')
        assert 'LlamaForSequenceClassification with 1 label (mean), bfloat16' in message
        back = scored(qrm.load(str(tmp_path / kind)))[0]
        assert 0 < np.abs(back - scored(model)[0]).max() < 0.2
    text = (tmp_path / 'adapter' / 'README.md').read_text()
    for words in ('library_name: peft', 'num_labels=1, pad_token_id=1', 'adapters and head',
                  f"'{tmp_path}/base'", 'Labels, in order: reward', 'tokenizer.eos_token'):
        assert words in text
    assert 'base_model:' not in text  # a path is no name on the hub


def test_a_base_that_was_rounded_in_training_is_noted(tokenizer, tmp_path):
    model = adapted(tokenizer, tmp_path / 'base', dtype='bfloat16')
    message = export.export(model, str(tmp_path / 'adapter'), kind='adapter')
    note = 'beside a base rounded to bfloat16, whose files have F32'
    assert note in message
    assert note in (tmp_path / 'adapter' / 'README.md').read_text()
    path = tmp_path / 'base' / 'model.safetensors'
    narrow = {name: x.astype('bfloat16') for name, x in safetensors_numpy.load_file(path).items()}
    safetensors_numpy.save_file(narrow, path)
    assert 'note' not in export.export(model, str(tmp_path / 'other'), kind='adapter')


def test_an_adapter_without_eos_comes_back_without(tokenizer, tmp_path):
    model = adapted(tokenizer, tmp_path / 'base')
    model = dataclasses.replace(model, reading=dataclasses.replace(model.reading, append_eos=False))
    export.export(model, str(tmp_path / 'adapter'), kind='adapter')
    back = qrm.load(str(tmp_path / 'adapter'))
    assert not back.reading.append_eos
    np.testing.assert_allclose(scored(back)[0], scored(model)[0], rtol=0, atol=1e-4)


def test_padding_of_an_adapter_has_an_embedding(tmp_path):
    bare = unpadded(tmp_path)
    size = len(bare)
    # Rows that no token has.
    model = adapted(bare, tmp_path / 'wide', vocab_size=size + 3)
    export.export(model, str(tmp_path / 'new'), kind='adapter')
    assert tokens.load_tokenizer(str(tmp_path / 'new')).pad_token_id == size
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'new')))[0], scored(model)[0],
                               rtol=0, atol=1e-4)
    # Another special token, as dialogues end with EOS.
    model = adapted(bare, tmp_path / 'base', vocab_size=size)
    export.export(model, str(tmp_path / 'adapter'), kind='adapter')
    assert tokens.load_tokenizer(str(tmp_path / 'adapter')).pad_token == '<|other|>'
    np.testing.assert_allclose(scored(qrm.load(str(tmp_path / 'adapter')))[0], scored(model)[0],
                               rtol=0, atol=1e-4)
    endless = dataclasses.replace(model, reading=dataclasses.replace(model.reading,
                                                                     append_eos=False))
    with pytest.raises(DataError, match=f'no padding token but EOS, and the embedding of {size}'):
        export.export(endless, str(tmp_path / 'none'), kind='adapter')
    assert not (tmp_path / 'none').exists()


def test_what_is_no_adapter_is_refused(tokenizer, tmp_path):
    for kind in ('adapter', 'merged'):
        with pytest.raises(DataError, match=f"'{kind}' of a model without adapters, expected a"):
            export.export(make(tokenizer), str(tmp_path / 'model'), kind=kind)
    model = adapted(tokenizer, tmp_path / 'base')
    started = dataclasses.replace(model, base=Base('', 0, 'float32'))
    with pytest.raises(DataError, match='of weights that started at random'):
        export.export(started, str(tmp_path / 'model'), kind='adapter')
    export.export(model, str(tmp_path / 'first'), kind='adapter')
    second = dataclasses.replace(model, base=Base(str(tmp_path / 'first'), 0, 'float32'))
    with pytest.raises(DataError, match='first, which is one itself'):
        export.export(second, str(tmp_path / 'model'), kind='adapter')
    gaussian = adapted(tokenizer, tmp_path / 'gaussian', head=HeadConfig('gaussian'))
    with pytest.raises(DataError, match="quantiles of a gaussian head is no linear|try 'mean'"):
        export.export(gaussian, str(tmp_path / 'model'), kind='adapter')


def test_the_command_exports_the_adapter_of_a_run(tmp_path):
    words = {key: value for key, value in WORDS.items() if not key.startswith('speed')}
    config = load_config('hh', 'helpful,scalar', **words | word_pairs(tmp_path) | {
        'train.tune': 'lora', 'lora.rank': 2, 'train.max_steps': 2,
        'optimizer.learning_rate': 0.01})
    train.train(config, str(tmp_path / 'run'))
    prompt, responses = 'w3 w5', [' w8 w2', ' w30 w11']
    expected = qrm.load(str(tmp_path / 'run')).score([prompt], [responses]).rewards[0]
    out, _ = command('export', f'--workdir={tmp_path}/run', f'--output={tmp_path}/adapter',
                     '--as=adapter')
    assert f'adapter to {tmp_path}/checkpoint, GPT2ForSequenceClassification with 1 label' in out
    found = qrm.load(str(tmp_path / 'adapter')).score([prompt], [responses]).rewards[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
