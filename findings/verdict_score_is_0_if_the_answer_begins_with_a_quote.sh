#!/usr/bin/env bash
# verdict 0.2.7, `WeightedSummedScoreExtractor` and `ArgmaxScoreExtractor`: they take the probabilities of the first token of the
# answer. Where none of the 20 likeliest is a value of the scale, all values get probability 0: the weighted score is 0, off the
# scale, and the likeliest value is the first one of the scale, "yes" for `BooleanScale`. The prompt that they add shows values in
# quotation marks; an answer may begin with one, with an asterisk or a space. There is no error, and no warning in the log.
#
# Expected: an error, or the score of the token that holds it. Seen, on a scale of 1 to 5: an answer 5 with probability .9 or 4
# with .1 scores 4.9 and 5; the answers "5", **5** and 5 after a space score 0 and 1, the worst value. On a scale with the end as
# the worst, "5" counts as 1, the best. "No" in quotation marks with `BooleanScale` is True by argmax.
# Who is hurt: whoever averages such scores or filters data by them: a judge that writes quotation marks gives all the same score.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check verdict==0.2.7 litellm==1.80.0 openai==1.109.1 pydantic==2.12.5
cat > first.py <<'PYTHON'
import contextlib
import importlib.metadata
import math
import sys
from types import SimpleNamespace

from loguru import logger
from openai.types.chat import ChatCompletion
from verdict.common.judge import JudgeUnit
from verdict.extractor import ArgmaxScoreExtractor, WeightedSummedScoreExtractor
from verdict.prompt import PromptMessage
from verdict.scale import BooleanScale, LikertScale


class Client:
    """Answers as an OpenAI server does, with given tokens, of which the first has given probabilities."""

    model = SimpleNamespace(use_nonce=False)

    def __init__(self, tokens, probabilities):
        self.tokens, self.top, self.raw_client = tokens, probabilities, self

    @contextlib.contextmanager
    def defaults(self, **settings):
        yield

    def __call__(self, messages, **settings):
        self.asked = messages[-1]['content']
        tops = [self.top] + [{token: 1.0} for token in self.tokens[1:]]
        content = [{'token': token, 'logprob': math.log(top[token]), 'top_logprobs': [
            {'token': t, 'logprob': math.log(p)} for t, p in top.items()]} for token, top in zip(self.tokens, tops)]
        return ChatCompletion.model_validate({
            'id': '1', 'created': 0, 'model': 'judge', 'object': 'chat.completion',
            'usage': {'prompt_tokens': 1, 'completion_tokens': len(content), 'total_tokens': 1 + len(content)},
            'choices': [{'index': 0, 'finish_reason': 'stop', 'logprobs': {'content': content},
                         'message': {'role': 'assistant', 'content': ''.join(self.tokens)}}]})


def scores(scale, tokens, probabilities):
    client, result = Client(tokens, probabilities), []
    for extractor in (WeightedSummedScoreExtractor(), ArgmaxScoreExtractor()):
        extractor.inject(JudgeUnit(scale))
        response, _ = extractor.extract(client, PromptMessage(system=None, user='Rate the answer.'), logger)
        result.append(response.score)
    return result, client.asked


logger.remove()
answers = {'5': (['5'], {'5': 0.9, '4': 0.1}), 'quoted': (['"', '5', '"'], {'"': 1.0}),
           'bold': (['**', '5', '**'], {'**': 1.0}), 'space': ([' 5'], {' 5': 0.9, ' 4': 0.1})}
likert = {name: scores(LikertScale(), *answer)[0] for name, answer in answers.items()}
worst = scores(LikertScale(end_is_worst=True), *answers['quoted'])[0]
boolean = {name: scores(BooleanScale(), *answer)[0] for name, answer in {
    'No': (['No'], {'No': 0.9, 'Yes': 0.1}), 'quoted': (['"', 'No', '"'], {'"': 1.0})}.items()}
prompt = scores(LikertScale(), *answers['5'])[1]
print(f'verdict {importlib.metadata.version("verdict")}: weighted and likeliest value of 5: {likert}; where 5 is the worst, '
      f'quoted: {worst}; of No: {boolean}')
sys.exit(not ({k: [round(v[0], 9), v[1]] for k, v in likert.items()} == {
    '5': [4.9, 5], 'quoted': [0, 1], 'bold': [0, 1], 'space': [0, 1]} and worst == [0, 1]
    and [boolean['No'][1], *boolean['quoted']] == [False, 0, True] and '"1", "2", "3", "4", "5"' in prompt))
PYTHON
env/bin/python first.py 2> errors || { tail -3 errors; exit 1; }
