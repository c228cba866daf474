"""What a policy's run is watched by: a row of numbers for each evaluation, and the step to keep.

A policy that is trained against a reward model comes to answer where the model is wrong: the
reward that it is trained on (the proxy) goes on rising while what it stands for falls (Gao et al.
2022, arXiv 2210.10760). `measure` makes an evaluation, responses of the policy to the held-out
prompts, a `Row`, by which `rules` calls a run suspect; `best_checkpoint` says which step to keep.
Both are pure functions of arrays, and no run is needed to use them.

Standard errors are over prompts, those of one opening question together: of a ratio of sums by
linearisation (Cochran 1977, Sampling Techniques, section 6.3), with the factor G / (G - 1) for G
opening questions. They are of what these prompts and draws say of others.

Axes: C prompts, K responses to each, T tokens of a response.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qrm.analysis import tables, winrate
from qrm.policy import objectives
from qrm.rewards import selection
from qrm.rewards.distributions import Distribution

NGRAM = 4  # tokens of the n-grams whose repetition is counted

# A response that one of them is found in is a refusal. Typographic apostrophes are read as plain
# ones, capitals as small letters.
REFUSALS = (
    r"\bi(?: am|'m) (?:so |very |really )?sorry,? (?:but|i)\b",
    r"\bi(?: am|'m) (?:afraid|unable|not able|not (?:going|willing|allowed|comfortable))\b",
    r"\bi (?:can't|cannot|can not|could not|couldn't|won't|will not|would not|wouldn't|must not) "
    r"(?:\w+ly )?(?:help|assist|answer|provide|do (?:this|that)|discuss|support|comply|engage)\b",
    r"\bi (?:would|'d) rather not\b|\bi'd rather not\b",
    r"\bi (?:must |have to )?(?:decline|refuse)\b",
    r"\bas an ai\b",
)

_OF_TOKENS = ('tokens', 'mask', 'log_probs', 'reference_log_probs', 'sampled_log_probs',
              'entropies')
_LEVELS = {'length_p10': 0.1, 'length_p50': 0.5, 'length_p90': 0.9}


class Evaluation(NamedTuple):
    """Responses of a policy to held-out prompts, and what is known of them.

    KL, entropy and perplexity are estimates from these responses, which are to be draws of the
    policy at temperature 1 with all tokens; `Row.mismatch` says how far they are from it.

    Attributes:
      step: of the optimisation.
      groups: [C] opening question of each prompt.
      texts: [C][K], '' where there is no response.
      tokens: [C, K, T] integers.
      mask: [C, K, T] bool, where there is a token, EOS included.
      present: [C, K] bool, where there is a response.
      truncated: [C, K] bool, has no stop.
      log_probs, reference_log_probs: [C, K, T] nats, float32 or wider, of the tokens under policy
        and reference.
      proxy: the reward that is optimised, with leading axes [C, K].
      sampled_log_probs: [C, K, T] nats, under what the tokens were drawn from; None: `log_probs`.
      entropies: [C, K, T] nats, of the policy's next token; None: estimated by -log_probs.
      disagreements: [C, K] standard deviation of the reward between the members of an ensemble;
        None: there is none.
      gold: [C, K] gold reward; None: unknown.
      unread: [C, K] share of the characters that the gold reward could not read; None: unknown.
      wins: [C, K] probability of being preferred to the reference's responses, by a judge that is
        not optimised, means of `winrate.win_probabilities` and `demo.Population`; None: unknown.
      best_of: n, where a response is the best of n draws of the reference by the proxy; the
        distance from the reference is then at most `Row.kl_bound`, as the choice has no
        log-probabilities, and `Row.kl_estimate` by those of the draw.
    """

    step: int
    groups: Sequence[str]
    texts: Sequence[Sequence[str]]
    tokens: np.ndarray
    mask: np.ndarray
    present: np.ndarray
    truncated: np.ndarray
    log_probs: np.ndarray
    reference_log_probs: np.ndarray
    proxy: Distribution
    sampled_log_probs: np.ndarray | None = None
    entropies: np.ndarray | None = None
    disagreements: np.ndarray | None = None
    gold: np.ndarray | None = None
    unread: np.ndarray | None = None
    wins: np.ndarray | None = None
    best_of: int = 1


class Row(NamedTuple):
    """An evaluation in numbers, which JSON takes as `row._asdict()`, and None where unknown.

    Names that end in `_error` are standard errors. What is 'a response' is a mean over responses,
    'a token' the sum over all tokens over their number. Shares are of responses.

    Attributes:
      step: of the optimisation.
      prompts: that have a response.
      responses: all of them.
      proxy: mean of the proxy's reward, in its units.
      proxy_spread: standard deviation of it over responses.
      predicted_std: standard deviation that the proxy predicts for a response; grows far from what
        it was trained on only if it was taught to.
      gold: mean gold reward.
      gold_spread: standard deviation of it over responses.
      win: probability of being preferred to the reference.
      kl: KL(policy || reference), nats a response, estimator k1.
      kl_k3: the same by k3, which is never negative.
      kl_token, kl_token_k3: both in nats a token.
      kl_bound: upper bound in nats a response where responses are the best of n; of one draw None.
      kl_estimate: of such a choice, `selection.estimated_kl_best_of_n`, which is below the bound
        where a response is likely to be drawn more than once; of one draw None.
      length: tokens a response.
      length_p10, length_p50, length_p90: quantiles of that.
      entropy: of the next token, nats a token.
      repeated: of the n-grams of `NGRAM` tokens of a response, the share that stood before in it;
        0 of fewer tokens.
      distinct_1, distinct_2: different tokens and pairs of tokens over the number of all, in all
        responses together (Li et al. 2016, arXiv 1510.03055); falls with the number of responses,
        so compare evaluations of equal size.
      refused: share in which one of `REFUSALS` is found.
      truncated: share without a stop.
      blank: share without any text.
      unread: share of the characters of a response that the gold reward could not read.
      disagreement: standard deviation between members of an ensemble, a response.
      perplexity: of the responses under the reference: exp of the nats a token.
      mismatch: |log_probs - sampled_log_probs|, nats a token; 0 of draws of the policy itself.
    """

    step: int
    prompts: int
    responses: int
    proxy: float
    proxy_error: float
    proxy_spread: float
    predicted_std: float
    gold: float | None
    gold_error: float | None
    gold_spread: float | None
    win: float | None
    win_error: float | None
    kl: float | None
    kl_error: float | None
    kl_k3: float | None
    kl_k3_error: float | None
    kl_token: float | None
    kl_token_error: float | None
    kl_token_k3: float | None
    kl_token_k3_error: float | None
    kl_bound: float | None
    kl_estimate: float | None
    kl_estimate_error: float | None
    length: float
    length_error: float
    length_p10: float
    length_p50: float
    length_p90: float
    entropy: float | None
    entropy_error: float | None
    repeated: float
    repeated_error: float
    distinct_1: float
    distinct_2: float
    refused: float
    refused_error: float
    truncated: float
    truncated_error: float
    blank: float
    blank_error: float
    unread: float | None
    unread_error: float | None
    disagreement: float | None
    perplexity: float
    mismatch: float


class Best(NamedTuple):
    """The step to keep.

    Attributes:
      step: of the highest mean win probability, of equal ones the last, as of all checkpoints.
      win: 'value', 'low' and 'high' of that; the ends are None with too few opening questions.
      ties: other steps that are not told apart from it: the interval of the paired difference
        holds 0, or there is none.
    """

    step: int
    win: dict[str, float | None]
    ties: tuple[int, ...]


# --- an evaluation -------------------------------------------------------------------------------


def measure(evaluation: Evaluation) -> Row:
    """An evaluation in numbers.

    Args:
      evaluation: with responses to prompts of at least two opening questions.

    Raises:
      ValueError: an array of another shape, a number of a response that is not finite, named by the
        attribute, or too few opening questions for standard errors.
    """
    e = evaluation
    _check_shapes(e)
    present = np.asarray(e.present, bool)
    mask = np.asarray(e.mask, bool) & present[..., None]
    answered = present.any(axis=1)
    clusters = np.unique(list(e.groups), return_inverse=True)[1]
    if len(np.unique(clusters[answered])) < 2:
        raise ValueError('responses to prompts of fewer than two opening questions, expected more '
                         'for standard errors')
    log_probs, reference = (_numbers(name, getattr(e, name), mask)
                            for name in ('log_probs', 'reference_log_probs'))
    sampled = (log_probs if e.sampled_log_probs is None else
               _numbers('sampled_log_probs', e.sampled_log_probs, mask))
    entropies = -log_probs if e.entropies is None else _numbers('entropies', e.entropies, mask)
    proxy, predicted = (_numbers('proxy', values, present)
                        for values in (e.proxy.mean, e.proxy.std))
    gold, wins, unread, disagreements = (
        None if getattr(e, name) is None else _numbers(name, getattr(e, name), present)
        for name in ('gold', 'wins', 'unread', 'disagreements'))
    k1, k3 = (np.asarray(objectives.kl_estimates(log_probs, reference, mask, name),
                         np.float64).sum(axis=-1) for name in ('k1', 'k3'))
    lengths = mask.sum(axis=-1)
    refused, blank = ([[test(text) for text in row] for row in e.texts]
                      for test in (refuses, lambda text: not text.strip()))
    of_responses = {
        'proxy': proxy, 'gold': gold, 'win': wins, 'kl': k1, 'kl_k3': k3, 'length': lengths,
        'repeated': repetition(e.tokens, mask), 'refused': refused, 'truncated': e.truncated,
        'blank': blank, 'unread': unread, 'kl_estimate': None}
    of_tokens = {'kl_token': k1, 'kl_token_k3': k3, 'entropy': entropies.sum(axis=-1)}
    if e.best_of > 1:
        for of in (of_responses, of_tokens):
            of |= dict.fromkeys(of.keys() & {'kl', 'kl_k3', 'kl_token', 'kl_token_k3', 'entropy'})
        of_responses['kl_estimate'] = selection.estimated_kl_best_of_n(
            np.minimum(log_probs.sum(axis=-1), 0.0), e.best_of)
    numbers: dict[str, float | None] = {}
    for counts, values_of in ((present, of_responses), (lengths, of_tokens)):
        for name, values in values_of.items():
            numbers[name], numbers[f'{name}_error'] = (
                (None, None) if values is None else _mean(np.asarray(values), counts, clusters))
    return Row(
        step=e.step, prompts=int(answered.sum()), responses=int(present.sum()),
        proxy_spread=float(proxy[present].std()), predicted_std=float(predicted[present].mean()),
        gold_spread=None if gold is None else float(gold[present].std()),
        kl_bound=None if e.best_of == 1 else float(selection.kl_best_of_n(e.best_of)),
        **{name: float(np.quantile(lengths[present], level)) for name, level in _LEVELS.items()},
        **{f'distinct_{n}': distinct(e.tokens, mask, n) for n in (1, 2)},
        disagreement=None if disagreements is None else float(disagreements[present].mean()),
        perplexity=math.exp(_mean(-reference.sum(axis=-1), lengths, clusters)[0]),
        mismatch=_mean(np.abs(log_probs - sampled).sum(axis=-1), lengths, clusters)[0],
        **numbers)


def repetition(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Share of the n-grams of `NGRAM` tokens of a response that stood before in it.

    Args:
      tokens: [..., T] integers.
      mask: [..., T] bool.

    Returns:
      [...] float64 in [0, 1); 0 of responses of fewer tokens.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    found = []
    for row, there in zip(tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]),
                          strict=True):
        grams = list(_ngrams(row[there], NGRAM))
        found.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.reshape(np.array(found, np.float64), tokens.shape[:-1])


def distinct(tokens: np.ndarray, mask: np.ndarray, n: int) -> float:
    """Different n-grams over the number of all, in all responses together; 0 of none.

    Args:
      tokens: [..., T] integers.
      mask: [..., T] bool.
      n: tokens of an n-gram.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    grams = [gram for row, there in zip(tokens.reshape(-1, tokens.shape[-1]),
                                        mask.reshape(-1, mask.shape[-1]), strict=True)
             for gram in _ngrams(row[there], n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def refuses(text: str) -> bool:
    """Whether one of `REFUSALS` is found in a response."""
    return _REFUSAL.search(text.replace('\u2019', "'")) is not None


# --- checkpoints ---------------------------------------------------------------------------------


def lost(wins: np.ndarray) -> float:
    """Probability of not being preferred to the reference, which ranks checkpoints.

    Args:
      wins: [C] win probability of each prompt.
    """
    return 1.0 - float(np.mean(wins, dtype=np.float64))


def best_checkpoint(
    wins: Mapping[int, np.ndarray], groups: Sequence[str], *, replicates: int, level: float,
    seed: int,
) -> Best:
    """The step whose responses win most often against the reference's.

    Its interval is that of any one step: the highest of many is expected to be too high, the more
    so the more steps there are and the less they differ. Judge it on other prompts.

    Args:
      wins: step -> [C] win probability on the same held-out prompts.
      groups: [C] opening question of each prompt.
      replicates: of the bootstrap over opening questions.
      level: of the intervals.
      seed: of the resampling.

    Raises:
      ValueError: there is no step, or one with another number of prompts or numbers that are not
        finite.
    """
    if not wins:
        raise ValueError('no checkpoints, expected at least one')
    for step, values in wins.items():
        if np.shape(values) != (len(groups),) or not np.isfinite(values).all():
            raise ValueError(f'win probabilities of step {step}: expected {len(groups)} finite '
                             'numbers, one for each prompt')
    weights = winrate.prompt_weights(groups, replicates, seed)
    steps = sorted(wins)
    best = min(reversed(steps), key=lambda step: lost(wins[step]))

    def tied(step: int) -> bool:
        ahead = winrate.over_prompts(np.subtract(wins[best], wins[step]), weights, level)['low']
        return ahead is None or ahead <= 0.0

    return Best(best, winrate.over_prompts(np.asarray(wins[best]), weights, level),
                tuple(step for step in steps if step != best and tied(step)))


# --- text ----------------------------------------------------------------------------------------


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; '±' precedes standard errors, '-' stands for what is unknown.

    Args:
      rows: at least one.
    """
    columns = {
        'step': lambda row: str(row.step),
        'proxy': lambda row: _shown(row, 'proxy'),
        'gold': lambda row: _shown(row, 'gold'),
        'win': lambda row: _shown(row, 'win'),
        'KL (nats)': lambda row: (_shown(row, 'kl') if row.kl_bound is None else
                                  f'{_shown(row, "kl_estimate")}, <= {row.kl_bound:.3f}'),
        'KL a token': lambda row: _shown(row, 'kl_token', 4),
        'tokens': lambda row: _shown(row, 'length', 1),
        'entropy (nats)': lambda row: _shown(row, 'entropy'),
        'repeated': lambda row: f'{row.repeated:.1%}',
        'distinct-2': lambda row: f'{row.distinct_2:.3f}',
        'refused': lambda row: f'{row.refused:.1%}',
        'truncated': lambda row: f'{row.truncated:.1%}',
        'blank': lambda row: f'{row.blank:.1%}',
        'unread': lambda row: '-' if row.unread is None else f'{row.unread:.1%}',
        'predicted std': lambda row: f'{row.predicted_std:.3f}',
        'disagreement': lambda row: '-' if row.disagreement is None else f'{row.disagreement:.3f}',
        'perplexity': lambda row: f'{row.perplexity:.2f}',
    }
    return tables.markdown([list(columns), *([cell(row) for cell in columns.values()]
                                             for row in rows)])


# --- parts ---------------------------------------------------------------------------------------

_REFUSAL = re.compile('|'.join(f'(?:{pattern})' for pattern in REFUSALS), re.IGNORECASE)


def _check_shapes(e: Evaluation) -> None:
    shape = np.shape(e.present)
    if len(shape) != 2:
        raise ValueError(f'present: shape {shape}, expected [C, K]')
    of_tokens = (*shape, *np.shape(e.mask)[-1:])
    sizes = {len(row) for row in e.texts}
    for name, found, expected in (
            ('groups', (len(e.groups),), shape[:1]),
            ('texts', (len(e.texts), *sizes), shape),
            ('proxy', np.shape(e.proxy.mean), shape),
            *((name, np.shape(value), of_tokens if name in _OF_TOKENS else shape)
              for name in (*_OF_TOKENS, 'truncated', 'gold', 'wins', 'unread', 'disagreements')
              if (value := getattr(e, name)) is not None)):
        if found != expected:
            raise ValueError(f'{name}: shape {found}, expected {expected}')


def _numbers(name: str, values: Any, there: np.ndarray) -> np.ndarray:
    """Values as float64, 0 where there is no response or no token."""
    values = np.asarray(values, np.float64)
    there = np.broadcast_to(there.reshape(*there.shape, *(1,) * (values.ndim - there.ndim)),
                            values.shape)
    bad = there & ~np.isfinite(values)
    if bad.any():
        raise ValueError(f'{name}: {bad.sum()} numbers that are not finite, the first one of '
                         f'prompt {np.argwhere(bad)[0][0]}')
    return np.where(there, values, 0.0)


def _mean(totals: np.ndarray, counts: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Sum of [C, K] over the sum of counts [C, K], and its standard error; 0 of nothing."""
    totals = np.where(counts > 0, totals, 0.0).sum(axis=1)
    counts = counts.sum(axis=1, dtype=np.float64)
    if not counts.any():
        return 0.0, 0.0
    value = totals.sum() / counts.sum()
    residuals = np.bincount(clusters, totals - value * counts)
    number = np.count_nonzero(np.bincount(clusters, counts))
    error = math.sqrt(number / max(number - 1, 1)) * np.linalg.norm(residuals) / counts.sum()
    return float(value), float(error)


def _ngrams(tokens: np.ndarray, n: int) -> Iterator[tuple[int, ...]]:
    values = tokens.tolist()
    return zip(*(values[i:] for i in range(n)), strict=False)


def _shown(row: Row, name: str, digits: int = 3) -> str:
    value, error = getattr(row, name), getattr(row, f'{name}_error')
    return '-' if value is None else f'{value:.{digits}f} ± {error:.{digits}f}'
