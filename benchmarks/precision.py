"""Says what computing in bfloat16 does to the scores of a reward model.

    python -m benchmarks.precision --checkpoint=results/run --input=pairs.jsonl

A score in float32 is the same whatever else is scored. In bfloat16 it depends on how the products
are summed, and with it on what shares its row: so every row of the table is there twice, with rows
of the usual and of half the length. Servers round the parameters too. Changes are relative to the
standard deviation of the rewards; a pair is any two responses of a comparison.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from qrm.analysis import tables
from qrm.commands import launch
from qrm.data.comparisons import DataError
from qrm.data.sources import read_comparisons
from qrm.rewards import statistics
from qrm.training import reward_model
from qrm.training.reward_model import RewardModel

REFERENCE = 'float32'


def main() -> None:
    model = reward_model.load(flags.FLAGS.checkpoint, outputs=flags.FLAGS.outputs)
    comparisons = read_comparisons(flags.FLAGS.input)
    rewards = {}
    for name, variant in variants(model).items():
        print(f'scoring in {name}', flush=True)
        rewards[name] = variant.score_comparisons(comparisons)[0].rewards
    print(tables.markdown(lines(changes(rewards, [c.preference_matrix() for c in comparisons]))))


def variants(model: RewardModel) -> dict[str, RewardModel]:
    """Name -> the model, computing otherwise; the first is the reference."""
    network = dataclasses.replace(model.network, dtype='bfloat16')
    # What rounding leaves, in the type that the parameters have.
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), model.params)
    found = {REFERENCE: model, 'bfloat16': dataclasses.replace(model, network=network),
             'bfloat16, parameters too': dataclasses.replace(
                 model, network=network, params=rounded)}
    half = model.row_length // 2
    return found | {f'{name}, rows of {half}': dataclasses.replace(one, row_length=half)
                    for name, one in found.items()}


def changes(rewards: Mapping[str, Sequence[np.ndarray]],
            preferences: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """How far rewards are from those of the first name.

    Args:
      rewards: name -> [K] of each comparison.
      preferences: [K, K] of each comparison, see `Comparison.preference_matrix`.

    Returns:
      One row for each name: 'rms' and 'largest' change over the standard deviation of the
      reference's rewards, 'flipped', the share of pairs whose order turns, 'rank', Spearman's
      correlation over all responses, and 'accuracy', NaN where nothing is preferred.

    Raises:
      DataError: no two responses whose rewards differ.
    """
    first = rewards[REFERENCE]
    together = np.concatenate(first).astype(np.float64)
    if np.ptp(together) == 0.0:
        raise DataError(f'all {len(together)} rewards are equal, expected some that differ')
    rows = []
    for name, found in rewards.items():
        difference = np.concatenate(found) - together
        turned = [np.sign(x[i] - x[j]) != np.sign(y[i] - y[j])
                  for x, y in zip(first, found, strict=True)
                  for i, j in zip(*np.triu_indices(len(x), 1), strict=True)]
        margins = np.array([y[i] - y[j] for y, known in zip(found, preferences, strict=True)
                            for i, j in np.argwhere(known > 0.5)], np.float64)
        rows.append({
            'name': name,
            'rms': float(np.sqrt(np.mean(difference**2)) / together.std()),
            'largest': float(np.abs(difference).max() / together.std()),
            'flipped': float(np.mean(turned)) if turned else float('nan'),
            'pairs': len(turned),
            'rank': statistics.rank_correlation(together, np.concatenate(found))(None),
            'accuracy': statistics.accuracy(margins)(None) if len(margins) else float('nan'),
        })
    return rows


def lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """`changes` as a table."""
    return [['computed in', 'RMS change / std', 'largest / std', 'pairs flipped',
             'rank correlation', 'accuracy'],
            *([row['name'], f'{row["rms"]:.5f}', f'{row["largest"]:.5f}',
               f'{row["flipped"]:.2%} of {row["pairs"]}', f'{row["rank"]:.5f}',
               f'{row["accuracy"]:.3f}'] for row in rows)]


def _define_flags() -> None:
    """As the program begins: others that define the same names can be imported beside it."""
    flags.DEFINE_string('checkpoint', None, 'The model, as of `qrm score`.')
    flags.DEFINE_string('input', None, 'File of comparisons, as of `qrm score`.')
    launch.define_outputs()


if __name__ == '__main__':
    _define_flags()
    launch.run(main, required=('checkpoint', 'input'))
