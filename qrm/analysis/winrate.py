"""How often a model prefers candidate responses to reference responses of the same prompts.

The scores of the references are kept, so that many sets of candidates are compared with them for
the price of their own.

Axes: p prompts, K candidates and J references of a prompt, r bootstrap replicates, `...` any.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from qrm.data.comparisons import Comparison, DataError, text_of
from qrm.data.sources import read_comparisons
from qrm.rewards import losses, pairwise, resampling, statistics
from qrm.rewards.distributions import Distribution
from qrm.rewards.losses import LossConfig
from qrm.training import workdir
from qrm.training.reward_model import RewardModel

_AT_ONCE = 2_000_000  # weights of pairs in all resamples that are fitted together
_WINS = ('win_rate', 'win_probability')  # that are also controlled for length


def win_rates(
    model: RewardModel, candidates: str, references: str, cache: str, *, replicates: int,
    level: float, seed: int,
) -> dict[str, Any]:
    """Win rate and win probability of candidates against references, with intervals.

    For a prompt the win rate is the share of the K x J pairs in which the candidate has the higher
    reward, ties half; the win probability is the mean over these pairs of the probability that the
    model gives. Both are averaged over prompts, so that each counts once, and both come once more
    as they would be if candidate and reference were equally long, see `length_controlled`. A
    pairwise model compares each pair in both orders, and the mean of their log odds counts; the
    scores of references alone, which it does not have, are not kept.

    Args:
      model: the reward model.
      candidates, references: files of rows with `prompt` + `response` or `responses`; a prompt is
        matched by its text.
      cache: folder for the scores of the references, by the content of file and model; '': none.
      replicates: of the bootstrap over opening questions.
      level: of the intervals.
      seed: of the resampling.

    Returns:
      'prompts', 'candidates', 'unmatched' (candidate rows without a reference), 'cached',
      'win_rate' and 'win_probability', of a pairwise model also 'flips', the share of pairs of
      which the other side wins in the other order, and 'first_log_odds', the mean log odds of
      standing first; 'win_rate_controlled' and 'win_probability_controlled', with lengths as
      characters; 'length' and 'reference_length', their means. Ready for JSON; intervals are null
      where there are too few opening questions for any, a controlled one where it is not defined.

    Raises:
      DataError: a row that cannot be read, named by file and line; a prompt that stands twice among
        the references; or no prompt has both.
    """
    known, by_prompt, given, matched = match(candidates, references)
    others = [by_prompt[str(row.prompt)] for row in matched]
    cached = False
    if model.network.head.pairwise:
        values = _compared(model, matched, [known[i] for i in others])
    else:
        reference_outputs, cached = _reference_outputs(model, known, cache)
        own_outputs = model.predict(model.encode(matched)[0])
        values = [_against(model, own, reference_outputs[i])
                  for own, i in zip(own_outputs, others, strict=True)]
    weights = prompt_weights([row.group for row in matched], replicates, seed)
    lengths = [[np.array([len(text_of(response)) for response in row.responses])
                for row in side] for side in (matched, [known[i] for i in others])]
    longer = [np.subtract.outer(*both) for both in zip(*lengths, strict=True)]
    return {'prompts': len(matched), 'candidates': sum(len(row.responses) for row in matched),
            'unmatched': len(given) - len(matched), 'cached': cached,
            **{name: over_prompts(np.array([one[name].mean() for one in values]), weights, level)
               for name in values[0]},
            **{f'{name}_controlled': length_controlled(
                [one[name] for one in values], longer, weights, level) for name in _WINS},
            **{name: float(np.mean([one.mean() for one in side]))
               for name, side in zip(('length', 'reference_length'), lengths, strict=True)}}


def prompt_weights(groups: Sequence[str], replicates: int, seed: int) -> np.ndarray | None:
    """Multiplicities [r, p] of prompts, resampled by opening question, for `over_prompts`.

    Args:
      groups: [p] opening questions.
      replicates: r.
      seed: of the resampling.

    Returns:
      Those, or None where there are too few opening questions for intervals.
    """
    clusters = np.unique(list(groups), return_inverse=True)[1]
    if len(np.unique(clusters)) < resampling.MIN_GROUPS:
        return None
    return resampling.cluster_bootstrap_weights(clusters, replicates, seed)


def over_prompts(of_prompts: np.ndarray, weights: np.ndarray | None,
                 level: float) -> dict[str, float | None]:
    """Mean of [p] over prompts, 'value', with its interval, 'low' and 'high', None if unknown.

    Args:
      of_prompts: [p].
      weights: of `prompt_weights`; the same ones make intervals of differences paired.
      level: of the interval.
    """
    if weights is None:
        return {'value': float(np.mean(of_prompts)), 'low': None, 'high': None}
    found = resampling.bootstrap(statistics.mean(of_prompts), weights, level)
    return {'value': found.value, 'low': found.low, 'high': found.high}


def length_controlled(
    wins: Sequence[np.ndarray], longer: Sequence[np.ndarray], weights: np.ndarray | None,
    level: float,
) -> dict[str, float | None]:
    """How often candidates would win if they were as long as their references.

    See `statistics.length_controlled_wins`; the pairs of a prompt count together as one.

    Args:
      wins: of each of p prompts [K, J], 1, 1/2, 0 or a probability.
      longer: of each [K, J] length of the candidate less that of the reference.
      weights, level: see `over_prompts`.

    Returns:
      'value', 'low' and 'high'; all None where all candidates are longer than their references, or
      all shorter, the interval also where those of a resample are, or if it has no weights.
    """
    sizes = [one.size for one in wins]
    rows = np.ones((1, len(wins)))
    if weights is not None:
        rows = np.concatenate([rows, weights])
    rows = rows / rows.sum(axis=1, keepdims=True) / sizes
    pairs = [np.concatenate([one.ravel() for one in side]) for side in (wins, longer)]
    value, *replicates = np.concatenate([
        statistics.length_controlled_wins(*pairs, np.repeat(some, sizes, axis=1))
        for some in np.array_split(rows, -(-len(rows) * sum(sizes) // _AT_ONCE))])
    if np.isnan(value):
        return {'value': None, 'low': None, 'high': None}
    if not replicates or np.isnan(replicates).any():
        return {'value': float(value), 'low': None, 'high': None}
    low, high = resampling.interval(np.array(replicates), level)
    return {'value': float(value), 'low': low, 'high': high}


def win_probabilities(loss: LossConfig, own: Distribution, other: Distribution) -> np.ndarray:
    """Probability that each response is preferred to each reference.

    Args:
      loss: by which the rewards were learnt, see `losses.log_win_probability`.
      own: with leading axes [..., K].
      other: with leading axes [..., J], of references.

    Returns:
      [..., K, J] float64.
    """
    own, other = (jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis), side)
                  for side, axis in ((own, -2), (other, -3)))
    return np.exp(np.asarray(losses.log_win_probability(loss, own, other), np.float64))


def match(
    candidates: str, references: str
) -> tuple[list[Comparison], dict[str, int], list[Comparison], list[Comparison]]:
    """The references, where each prompt is among them, the candidates, and those with a reference.

    Raises:
      DataError: see `win_rates`.
    """
    known = read_comparisons(references)
    by_prompt: dict[str, int] = {}
    for i, row in enumerate(known):
        if by_prompt.setdefault(str(row.prompt), i) != i:
            raise DataError(f'{row.id}: the prompt stands in an earlier row of {references} too, '
                            'expected all references of a prompt in one row')
    given = read_comparisons(candidates)
    matched = [row for row in given if str(row.prompt) in by_prompt]
    if not matched:
        raise DataError(f'{candidates}: none of its {len(given)} prompts is in {references}')
    return known, by_prompt, given, matched


def describe(found: dict[str, Any]) -> str:
    """The result of `win_rates` in a sentence, for the terminal."""
    def shown(name: str) -> str:
        number = found[name]
        if number['value'] is None:
            return 'not defined'
        return f'{number["value"]:.3f} ' + (
            'without an interval' if number['low'] is None else
            f'[{number["low"]:.3f}, {number["high"]:.3f}]')

    few = ('' if found['win_rate']['low'] is not None else
           f'; fewer than {resampling.MIN_GROUPS} opening questions have no interval')
    last = f'scores of the references {"from the cache" if found["cached"] else "computed"}'
    if 'flips' in found:
        last = ('of both orders together; share of pairs decided otherwise in the other order '
                f'{shown("flips")}, log odds of standing first {shown("first_log_odds")}')
    return (f'{found["candidates"]} candidates for {found["prompts"]} prompts '
            f'({found["unmatched"]} rows without a reference left out): win rate '
            f'{shown("win_rate")}, win probability {shown("win_probability")}{few}; at equal '
            f'length win rate {shown("win_rate_controlled")}, win probability '
            f'{shown("win_probability_controlled")} (mean {found["length"]:.0f} characters, of '
            f'references {found["reference_length"]:.0f}); {last}')


def _compared(model: RewardModel, candidates: Sequence[Comparison],
              references: Sequence[Comparison]) -> list[dict[str, np.ndarray]]:
    """What a pairwise model says of a prompt's pairs: wins [K, J], and [K J] what is said of both
    orders."""
    pairs = [dataclasses.replace(own, responses=(a, b), ranks=None, preferred=None,
                                 preference=None, ratings=None)
             for own, other in zip(candidates, references, strict=True)
             for a in own.responses for b in other.responses]
    # [2] of each pair: log odds of the candidate where it stands first, and second.
    log_odds = np.array([pairwise.in_both_orders(outputs)[0, 1]
                         for outputs in model.predict(model.encode(pairs)[0])])
    shapes = [(len(own.responses), len(other.responses))
              for own, other in zip(candidates, references, strict=True)]
    parts = np.split(log_odds, np.cumsum([k * j for k, j in shapes])[:-1])
    return [{'win_rate': statistics.halved_ties(both.mean(axis=1)).reshape(shape),
             'win_probability': expit(both.mean(axis=1)).reshape(shape),
             'flips': pairwise.flips(both), 'first_log_odds': pairwise.first_log_odds(both)}
            for both, shape in zip(parts, shapes, strict=True)]


def _against(model: RewardModel, own: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Wins [K, J] of candidates [K, outputs] against references [J, outputs]."""
    first, second = (model.network.head.read(side).distribution for side in (own, other))
    means = [np.asarray(side.mean, np.float64) for side in (first, second)]
    return {'win_rate': statistics.halved_ties(np.subtract.outer(*means)),
            'win_probability': win_probabilities(model.loss, first, second)}


def _reference_outputs(
    model: RewardModel, references: list[Comparison], cache: str
) -> tuple[list[np.ndarray], bool]:
    """Raw outputs [J, outputs] of each reference row, and whether they were in the cache."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        digest.update(np.asarray(leaf).tobytes())
    for row in references:
        digest.update(repr((row.prompt, row.responses, row.tools)).encode())
    digest.update(f'{model.reading} {model.tokenizer.chat_template}'.encode())
    path = os.path.join(cache, f'{digest.hexdigest()[:16]}.npz')
    sizes = np.cumsum([len(row.responses) for row in references])[:-1]
    if cache and os.path.exists(path):
        with np.load(path, allow_pickle=False) as file:
            return np.split(file['outputs'], sizes), True
    outputs = np.concatenate(model.predict(model.encode(references)[0]))
    if cache:
        workdir.make(cache)
        workdir.write_arrays(path, {'outputs': outputs})
    return np.split(outputs, sizes), False
