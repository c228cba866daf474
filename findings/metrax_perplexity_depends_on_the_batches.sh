#!/usr/bin/env bash
# google-metrax 0.2.4 (jax 0.10.2), `Perplexity`: a batch counts by its number of sequences, whatever its number of tokens. The
# docstring gives the formula: exp of the sum of -w log P over all tokens, by the sum of w. Within one batch it holds.
#
# Expected: one perplexity for one set of tokens, however it is cut into batches. Seen, for answers whose first 4 tokens have
# probability .1 and the others .8, padded to 64 with weight 0: for one of 64 tokens and one of 1 token, 1.467 by the formula and
# in one batch, 3.773 as two batches that are merged; for 64 answers of 1 to 64 tokens, 1.605 by the formula and in one batch,
# 1.612 in batches of 8 at random, 1.954 in batches of 8 sorted by length. Without weights, batches of 8 answers of one length, 8
# to 64: 1.78 instead of 1.575.
# Who is hurt: whoever compares models by it: the result changes with the size and the order of the batches, and a token of a
# batch of short answers counts many times as much as one of a batch of long ones.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check google-metrax==0.2.4 clu==0.0.12 jax==0.10.2 jaxlib==0.10.2 \
    flax==0.12.8 numpy==2.3.5
cat > batches.py <<'PYTHON'
import functools
import importlib.metadata
import sys

import jax.numpy as jnp
import metrax
import numpy as np


def merged(batches, masked=True):
    """Perplexity of batches of sequences of the probability of the true token, which is token 0 of 2."""
    states = []
    for batch in batches:
        probability = np.full((len(batch), 64 if masked else len(batch[0])), 0.5)
        weight = np.zeros(probability.shape)
        for row, sequence in enumerate(batch):
            probability[row, :len(sequence)], weight[row, :len(sequence)] = sequence, 1
        states.append(metrax.Perplexity.from_model_output(
            jnp.asarray(np.stack([probability, 1 - probability], -1), jnp.float32), jnp.zeros(weight.shape, int),
            jnp.asarray(weight, jnp.float32) if masked else None))
    return round(float(functools.reduce(lambda one, other: one.merge(other), states).compute()), 3)


def by_formula(sequences):
    return round(float(np.exp(-np.log(np.concatenate(sequences)).mean())), 3)


def in_eights(sequences):
    return [sequences[start:start + 8] for start in range(0, len(sequences), 8)]


def answers(lengths):
    return [np.where(np.arange(length) < 4, 0.1, 0.8) for length in lengths]


two = answers([64, 1])
many, equal = answers(range(1, 65)), answers(np.repeat(np.arange(1, 9) * 8, 8))
mixed = [many[place] for place in np.random.default_rng(0).permutation(64)]
found = {'two': [by_formula(two), merged([two]), merged([two[:1], two[1:]])],
         '64': [by_formula(many), merged([many]), merged(in_eights(mixed)), merged(in_eights(many))],
         'unmasked': [by_formula(equal), merged(in_eights(equal), masked=False)]}
print(f'google-metrax {importlib.metadata.version("google-metrax")}: perplexity by the formula and by metrax (in one batch, in '
      f'more): {found}')
sys.exit(found != {'two': [1.467, 1.467, 3.773], '64': [1.605, 1.605, 1.612, 1.954], 'unmasked': [1.575, 1.78]})
PYTHON
env/bin/python batches.py 2> errors || { tail -3 errors; exit 1; }
