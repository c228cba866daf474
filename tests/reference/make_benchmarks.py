"""Makes benchmarks.json: what rewardbench 0.1.4, and RM-Bench's own code, make of given scores.

    pip install torch==2.13.0 datasets pandas accelerate tiktoken sentencepiece
    pip install --no-deps rewardbench==0.1.4 transformers==4.51.0 trl==0.15.2 fschat==0.2.36
    git clone https://github.com/THU-KEG/RM-Bench && git -C RM-Bench checkout 73c52d7
    PYTHONPATH=RM-Bench/scripts python tests/reference/make_benchmarks.py

Scores are small whole numbers, so that many are equal.
"""

import json
import pathlib

import datasets
import numpy as np
import utils as rm_bench
from rewardbench import utils
from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING


def ties(rng):
    """Prompts with one right response (ref), with several (tied), and with both."""
    rows = []
    for number in range(14):
        for kind, right, wrong in (('ref', 1, 3), ('tied', int(rng.integers(2, 5)), 4)):
            if number == (0 if kind == 'ref' else 1):
                continue
            lift = np.repeat([rng.integers(0, 6), 0], [right, wrong])
            scores = rng.integers(0, 5, right + wrong) + lift
            rows.append({'id': f'{kind}:{number}', 'num_correct': right,
                         'scores': [float(x) for x in scores]})
    return rows


def styles(rng):
    """Three styles of chosen and rejected responses; safety has halves of unequal size."""
    domains = ['chat'] * 6 + ['math'] * 9 + ['code'] * 4 + ['safety-refuse'] * 7
    return [{'domain': domain, 'score_chosen': rng.integers(1, 6, 3).astype(float).tolist(),
             'score_rejected': rng.integers(0, 5, 3).astype(float).tolist()}
            for domain in [*domains, *['safety-response'] * 3]]


def main():
    rng = np.random.default_rng(0)
    metrics = {name: float(rng.uniform()) for name in EXAMPLE_COUNTS}
    four = rng.integers(0, 4, (40, 4)).astype(float)
    flat = datasets.Dataset.from_dict({'text': [''] * 160, 'scores': four.ravel().tolist()})
    tied = ties(rng)
    styled = styles(rng)
    result = {
        'metrics': metrics,
        'sections': utils.calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, metrics),
        'four': four.tolist(),
        'four_results': list(utils.reroll_and_score_dataset(flat, [4] * 40)['results']),
        'ties': tied,
        'ties_score': float(utils.process_single_model(datasets.Dataset.from_list(tied))[1]),
        'styles': styled,
        # It takes the domain out of the rows that it is given.
        'styles_results': {name: float(value) for name, value in rm_bench.compute_accuracy(
            [dict(row) for row in styled]).items()},
    }
    path = pathlib.Path(__file__).with_name('benchmarks.json')
    path.write_text(json.dumps(result) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
