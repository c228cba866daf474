"""Times TRL's trainers and a forward pass of transformers; run by `trl` and `dpo`.

    TRL_PYTHON benchmarks/trl_worker.py --model=DIR --training=F --scoring=F --output=F ...
    TRL_PYTHON benchmarks/trl_worker.py --task=dpo --model=DIR --training=F --output=F ...

For the Python of an environment with torch, trl and transformers: this file imports nothing of
qrm, and those libraries only where they are used. Files of pairs are JSON Lines, to be taken in
their order: with the whole dialogues 'chosen' and 'rejected', or for DPO with 'prompt' and what
continues it.
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time


def main(argv=None):
    """Runs what is to be measured and writes it as JSON."""
    args = parse(argv)
    if args.task == 'dpo':
        result = {'training': train_dpo(args), **environment()}
    else:
        result = {'scoring': score(args), 'training': train(args), **environment()}
    with open(args.output, 'w', encoding='utf-8') as file:
        json.dump(result, file, indent=2)


def parse(argv):
    """Parses the command line."""
    parser = argparse.ArgumentParser(description='Times TRL; see benchmarks/trl.py.')
    for name, meaning in (('model', 'folder of the model and its tokenizer'),
                          ('training', 'pairs of all steps in order, the first step to warm up'),
                          ('output', 'JSON file to write')):
        parser.add_argument(f'--{name}', required=True, help=meaning)
    parser.add_argument('--task', choices=('reward', 'dpo'), default='reward',
                        help='which trainer is timed; of a reward model scoring, too')
    parser.add_argument('--scoring', help='pairs to score')
    parser.add_argument('--beta', type=float, default=0.1, help='of DPO')
    for name, meaning in (('max_length', 'tokens of the longest dialogue'),
                          ('batch_size', 'pairs of a training step'),
                          ('per_device', 'pairs of a forward pass; dialogues of one in scoring'),
                          ('steps', 'training steps of a repeat'), ('repeats', 'repeats')):
        parser.add_argument(f'--{name}', required=True, type=int, help=meaning)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), required=True)
    args = parser.parse_args(argv)
    if args.task == 'reward' and not args.scoring:
        parser.error('the following arguments are required: --scoring')
    if args.batch_size % args.per_device:
        parser.error(f'--batch_size={args.batch_size}, expected a multiple of '
                     f'--per_device={args.per_device}')
    return args


def score(args):
    """Scores every dialogue, in batches padded to their longest, in order and sorted by length."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, dtype=getattr(torch, args.dtype),
        attn_implementation=attention(args.dtype)).to(device).eval()
    model.config.pad_token_id = tokenizer.eos_token_id
    pairs = read(args.scoring)
    texts = [pair[side] + tokenizer.eos_token for pair in pairs for side in ('chosen', 'rejected')]
    dialogues = [torch.tensor(ids) for ids in tokenizer(texts)['input_ids']]

    def run(groups):
        for group in groups:
            members = [dialogues[i] for i in group]
            ids = torch.nn.utils.rnn.pad_sequence(
                members, batch_first=True, padding_value=tokenizer.eos_token_id)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(member) for member in members], batch_first=True)
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        synchronize()

    result = {'dialogue_tokens': sum(map(len, dialogues)), 'comparisons': len(pairs)}
    with torch.inference_mode():
        run(batches(dialogues, args.per_device, by_length=True)[:2])
        for name, by_length in (('in_order', False), ('sorted', True)):
            groups, rates = batches(dialogues, args.per_device, by_length=by_length), []
            for _ in range(args.repeats):
                begin = time.perf_counter()
                run(groups)
                rates.append(len(pairs) / (time.perf_counter() - begin))
            result[name] = {'comparisons_per_second': summary(rates)}
    return result


def train(args):
    """Trains as RewardTrainer does, on the pairs in their order; the first step is not timed."""
    import trl

    timed, result = run_trainer(args, trl.RewardTrainer, trl.RewardConfig, ('chosen', 'rejected'))
    return result | {'dialogue_tokens': sum(len(row[side]) for row in timed
                                            for side in ('chosen_ids', 'rejected_ids'))}


def train_dpo(args):
    """The same of DPOTrainer, whose reference is asked before the first step."""
    import trl

    timed, result = run_trainer(
        args, trl.DPOTrainer, trl.DPOConfig, ('prompt', 'chosen', 'rejected'), beta=args.beta,
        precompute_ref_log_probs=True)
    return result | {'dialogue_tokens': sum(len(row['prompt_ids']) + len(row[side]) for row in timed
                                            for side in ('chosen_ids', 'rejected_ids'))}


def run_trainer(args, trainer_class, config_class, columns, **settings):
    """Trains with a trainer of TRL on the pairs in their order.

    Returns:
      The rows of the steps that are timed, as the trainer has them, and what was measured.
    """
    import datasets
    import transformers

    pairs, ends = read(args.training), []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *unused, **also_unused):
            synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=args.model,
            args=config_class(
                output_dir=folder, max_length=args.max_length, disable_dropout=True,
                per_device_train_batch_size=args.per_device,
                gradient_accumulation_steps=args.batch_size // args.per_device,
                max_steps=1 + args.repeats * args.steps, train_sampling_strategy='sequential',
                bf16=args.dtype == 'bfloat16', gradient_checkpointing=False, use_cpu=not cuda(),
                model_init_kwargs={'attn_implementation': attention(args.dtype),
                                   'dtype': 'float32'},
                report_to='none', save_strategy='no', logging_strategy='no', disable_tqdm=True,
                **settings),
            train_dataset=datasets.Dataset.from_list(
                [{name: pair[name] for name in columns} for pair in pairs]),
            callbacks=[Clock()])
        tokenized = trainer.train_dataset
        if len(tokenized) != len(pairs):
            raise SystemExit(f'TRL dropped {len(pairs) - len(tokenized)} of {len(pairs)} pairs')
        trainer.train()
    timed = tokenized.select(range(args.batch_size, len(tokenized)))
    count = args.batch_size * args.steps
    seconds = intervals(ends, args.steps)
    return timed, {'comparisons_per_second': summary([count / value for value in seconds]),
                   'seconds': summary(seconds), 'comparisons': len(timed)}


def batches(dialogues, size, *, by_length):
    """Indices of the dialogues of each batch, in order or by falling length."""
    order = list(range(len(dialogues)))
    if by_length:
        order.sort(key=lambda i: -len(dialogues[i]))
    return [order[start:start + size] for start in range(0, len(order), size)]


def intervals(ends, steps):
    """Seconds of each run of `steps` steps, from the times at which all steps ended.

    The first time is the end of the step that warms up, where the clock starts.
    """
    marks = ends[::steps]
    return [after - before for before, after in itertools.pairwise(marks)]


def summary(values):
    """Median and range of repeated measurements, and the measurements."""
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values),
            'repeats': list(values)}


def attention(dtype):
    """The fastest attention that is installed, by its name in transformers."""
    flash = dtype == 'bfloat16' and cuda() and importlib.util.find_spec('flash_attn')
    return 'flash_attention_2' if flash else 'sdpa'


def cuda():
    """Whether there is a GPU."""
    import torch

    return torch.cuda.is_available()


def synchronize():
    """Waits for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment():
    """Versions, threads, device and peak memory in bytes."""
    import torch
    import transformers
    import trl

    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss: bytes on macOS, else KiB
    return {
        'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                     'transformers': transformers.__version__, 'trl': trl.__version__},
        'threads': torch.get_num_threads(),
        'device': torch.cuda.get_device_name() if cuda() else 'cpu',
        'peak_memory': (torch.cuda.max_memory_allocated() if cuda() else
                        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit),
    }


def read(path):
    """Rows of a JSON Lines file."""
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


if __name__ == '__main__':
    # This file's folder, where names such as `evaluate` would hide libraries.
    sys.path = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    main()
