"""Times `generate` of transformers; run by `sampling`.

    TORCH_PYTHON benchmarks/sampling_worker.py --task=F --output=F

For the Python of an environment with torch and transformers: this file imports nothing of qrm.
"""

import argparse
import json
import os
import sys
import time


def main():
    """Answers all prompts and writes the times as JSON."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description='See benchmarks/sampling.py.')
    parser.add_argument('--task', required=True, help='JSON file that says what to do')
    parser.add_argument('--output', required=True, help='JSON file to write')
    args = parser.parse_args()
    with open(args.task, encoding='utf-8') as file:
        task = json.load(file)
    if task['threads']:
        torch.set_num_threads(task['threads'])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task['model'], dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)

    def answer(prompt, tokens, **settings):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                                 **settings)
        return out[:, len(prompt):]

    def answer_all(prompts):
        for prompt in prompts:
            out = answer(prompt, task['new_tokens'], do_sample=True, temperature=1.0, top_k=0,
                         num_return_sequences=task['samples'])
            assert out.shape == (task['samples'], task['new_tokens'])

    result = {'times': {}, 'greedy': {}, 'about': (
        f'torch {torch.__version__}, transformers {transformers.__version__}, '
        f'{torch.get_num_threads()} threads')}
    for name, prompts in task['prompts'].items():
        result['greedy'][name] = answer(prompts[0], task['compared'], do_sample=False)[0].tolist()
        answer(prompts[0], 2, do_sample=True, top_k=0, num_return_sequences=task['samples'])
        start, of_processor = time.perf_counter(), time.process_time()
        answer_all(prompts)
        result['times'][name] = {'seconds': time.perf_counter() - start,
                                 'processor_seconds': time.process_time() - of_processor}
    with open(args.output, 'w', encoding='utf-8') as file:
        json.dump(result, file, indent=2)


if __name__ == '__main__':
    # This file's folder, where names such as `sampling` would hide libraries.
    sys.path = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    main()
