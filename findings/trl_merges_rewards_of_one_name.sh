#!/usr/bin/env bash
# trl 1.16.0 (transformers 5.24.0, torch 2.13.0, CPU), GRPOTrainer: reward functions are told apart in logs by name
# alone, and a `functools.partial` has the name of its function, an object without a name that of its class. Both are
# forms that trl supports on purpose. Two of one name are logged as one, without a word.
#
# Expected: a metric for each function, or an error. Seen: with partial(f, k=0) and partial(f, k=10), whose rewards are
# 0 and 10, `reward` is 10 as it should be, and the one `rewards/f/mean` is 5, the reward of neither.
# Who is hurt: whoever trains on two settings of one reward, such as two thresholds, two models behind one class or a
# penalty beside its reward, and watches the curves to see which of them is being cheated.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0 transformers==5.24.0
cat > names.py <<'PYTHON'
import functools
import sys

import datasets
import tokenizers
import transformers
import trl

words = {f'w{i}': i for i in range(30)} | {'<pad>': 30, '<eos>': 31}
model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='w0'))
model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token='<pad>', eos_token='<eos>')
policy = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=31, eos_token_id=31))


def constant(completions, k, **columns):
    return [float(k)] * len(completions)


trainer = trl.GRPOTrainer(
    policy, reward_funcs=[functools.partial(constant, k=0), functools.partial(constant, k=10)],
    args=trl.GRPOConfig(output_dir='out', per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
                        max_steps=1, logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy='no'),
    train_dataset=datasets.Dataset.from_dict({'prompt': ['w1 w2'] * 2}), processing_class=tokenizer)
trainer.train()
row = trainer.state.log_history[0]
found = {key: float(value) for key, value in row.items() if key == 'reward' or key.startswith('rewards/')}
print(f'trl {trl.__version__}, transformers {transformers.__version__}: rewards of 0 and 10 are logged as {found}')
sys.exit(found != {'reward': 10.0, 'rewards/constant/mean': 5.0, 'rewards/constant/std': 0.0})
PYTHON
HF_HUB_OFFLINE=1 env/bin/python names.py 2> errors | tail -1 || { tail -3 errors; exit 1; }
