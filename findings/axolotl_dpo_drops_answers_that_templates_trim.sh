#!/usr/bin/env bash
# axolotl 0.19.0 (transformers 5.16.1), DPO data of type `chat_template.default`: each answer is rendered after a dummy question
# and then looked for in the text, to cut off what is before it. Where the template trims answers, as axolotl's `llama3` and
# `gemma` do, one with a space or a line break at an end is not found, and the place -1 leaves the last character of the text. A
# short answer that is in the text before it is found there, and dummy question and template stay in front. There is no warning.
#
# Expected: the answer with the template's end of turn. Seen, for 'Paris.' and 'Lyon.' by `llama3`: 'Paris.<|eot_id|>' and
# 'Lyon.<|eot_id|>'; with a space before or a line break behind them '>' and '>', by `gemma` '' and ''. Where only the rejected
# one ends with a line break, the pair is 'Paris.<|eot_id|>' and '>'. By `chatml` the answer 'user' begins with the turn of the
# dummy question, 'user\n[[dummy_message]]', and by `qwen_25` the answer 'C' with 'Cloud. You are a helpful assistant.'.
# Who is hurt: whoever trains on answers with such ends, as models and files have them: pairs of equal or empty answers teach
# nothing, others a bracket; and whoever trains on labels or letters of choices.
#
# PyTorch is left out: of the package one file, for processes of a run, is replaced by a line. All else is the release.
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check --no-deps axolotl==0.19.0
env/bin/pip install --quiet --disable-pip-version-check transformers==5.16.1 datasets==4.8.4 colorama==0.4.6 addict==2.4.0 \
    jinja2==3.1.6
cat > answers.py <<'PYTHON'
import importlib.metadata
import sys
import types

sys.modules['axolotl.utils.distributed'] = types.SimpleNamespace(is_main_process=lambda *_, **__: True)
from axolotl.prompt_strategies.dpo import load
from axolotl.utils.chat_templates import get_chat_template
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({'<unk>': 0}, unk_token='<unk>'))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token='<s>', eos_token='</s>')
question = [{'role': 'user', 'content': 'Which is the capital of France?'}]


def converted(template, *answers):
    convert, _ = load('chat_template.default', {'datasets': [{}], 'chat_template': template})
    row = convert(dict(zip(('messages', 'chosen', 'rejected'), (question, *answers))), tokenizer=tokenizer)
    return row['chosen'], row['rejected']


def right(template, *answers):  # what the template adds to the prompt
    def text(messages, **settings):
        return tokenizer.apply_chat_template(messages, chat_template=get_chat_template(template), tokenize=False, **settings)

    prompt = text(question, add_generation_prompt=True)
    return tuple(text([*question, {'role': 'assistant', 'content': answer}]).removeprefix(prompt).strip() for answer in answers)


pairs = ('Paris.', 'Lyon.'), (' Paris.', ' Lyon.'), ('Paris.\n', 'Lyon.\n'), ('Paris.', 'Lyon.\n')
cases = [(template, *pair) for template in ('llama3', 'gemma') for pair in pairs]
cases += [('chatml', 'user', 'no'), ('qwen_25', 'C', 'D')]
found = {case: converted(*case) for case in cases}
for case in cases:
    print(f'axolotl {importlib.metadata.version("axolotl")}, {case}: {found[case]}, by the template {right(*case)}')
ends = ['Paris.<|eot_id|>', 'Lyon.<|eot_id|>'], ['Paris.<end_of_turn>', 'Lyon.<end_of_turn>']
sys.exit(not (
    [list(right(*case)) for case in cases] == [ends[0]] * 4 + [ends[1]] * 4 + [['user<|im_end|>', 'no<|im_end|>'],
                                                                              ['C<|im_end|>', 'D<|im_end|>']]
    and [list(found[case]) for case in cases[:8]] == [ends[0], ['>', '>'], ['>', '>'], [ends[0][0], '>'],
                                                      ends[1], ['', ''], ['', ''], [ends[1][0], '']]
    and found[cases[8]][0].startswith('user\n[[dummy_message]]') and found[cases[9]][0].startswith('Cloud. You are a helpful')))
PYTHON
env/bin/python answers.py 2> errors || { tail -3 errors; exit 1; }
