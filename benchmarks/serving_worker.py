"""A plain reward server of transformers, one request a forward pass; run by `serving`.

    TORCH_PYTHON benchmarks/serving_worker.py --model=DIR --port=P --max_length=N

For the Python of an environment with torch and transformers: this file imports nothing of qrm. It
answers POST /get_reward {"query": [text]} with {"rewards": [number]}.
"""

import argparse
import http.server
import json
import platform
import threading


def main():
    """Loads the model and serves it until it is killed."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description='See benchmarks/serving.py.')
    parser.add_argument('--model', required=True, help='folder of a sequence classifier')
    parser.add_argument('--port', required=True, type=int, help='on 127.0.0.1')
    parser.add_argument('--max_length', required=True, type=int, help='tokens; cut on the left')
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, truncation_side='left')
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, dtype=torch.float32).eval()
    suffix = tokenizer.eos_token if getattr(model.config, 'qrm_append_eos', False) else ''
    free = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        disable_nagle_algorithm = True

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            with free, torch.inference_mode():
                rewards = [model(**tokenizer(
                    text + suffix, return_tensors='pt', truncation=True,
                    max_length=args.max_length)).logits[0, 0].item() for text in body['query']]
            content = json.dumps({'rewards': rewards}).encode()
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *unused):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

    with Server(('127.0.0.1', args.port), Handler) as server:
        print(f'torch {torch.__version__}, transformers {transformers.__version__}, Python '
              f'{platform.python_version()}, {torch.get_num_threads()} threads', flush=True)
        server.serve_forever()


if __name__ == '__main__':
    main()
