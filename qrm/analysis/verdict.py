"""What a diagnosis says of the spread and of the model, in plain words and by stated rules."""

import re
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qrm.analysis.diagnostics import (
    CALIBRATION_ERROR,
    CONSTANT_SPREAD,
    COVERAGE_ERROR,
    DISAGREEMENT_LABEL,
    FLIPPED_SHARE,
    LENGTH_RATIO,
    REDUNDANT_SPREAD,
    SAME_ORDER,
)

_PAGE_WIDTH = 96


def verdict(diagnosis: Mapping[str, Any]) -> str:
    """What a diagnosis says of the spread and of the model, in plain words and by stated rules.

    Args:
      diagnosis: of `diagnostics.diagnose`.

    Returns:
      A page of text: the conclusion, then a paragraph for each question.
    """
    level, counts = diagnosis['settings']['level'], diagnosis['counts']
    paragraphs = (
        'Is the spread information or decoration? ' + conclusion(diagnosis),
        f"From {counts['pairs']} test pairs of {counts['opening_questions']} opening questions; in "
        f'brackets {level:.0%} intervals over opening questions. Decoration is a spread that is '
        'constant or a function of the reward, by the bounds below; of any other the most direct '
        'evidence there is decides: errors against ratings, else disagreement, else labels made '
        'wrong on purpose.',
        'Does the spread vary? ' + _says_variation(diagnosis),
        'Does it say more than the reward? ' + _says_redundancy(diagnosis),
        'Does it foretell errors against ratings? ' + _says_ratings(diagnosis),
        'Does it find disagreement? ' + _says_disagreement(diagnosis),
        'Does it help to find wrong labels? ' + _says_label_noise(diagnosis),
        'Are the win probabilities calibrated? ' + _says_calibration(diagnosis),
        'Is the reward length? ' + _says_length(diagnosis),
        'Does it read the prompt? ' + _says_prompt(diagnosis),
        *(['Does it matter which response stands first? ' + _says_position(diagnosis)]
          if diagnosis['position']['flips']['value'] is not None else []),
    )
    return '\n\n'.join(map(_wrap, paragraphs)) + '\n'


class _Evidence(NamedTuple):
    """A number that tells whether the spread knows anything; above `uninformed` it does."""

    what: str
    number: dict[str, Any]
    uninformed: float
    expected: str
    if_below: str


def _evidence(diagnosis: Mapping[str, Any]) -> _Evidence | None:
    """The most direct evidence there is."""
    ratings, disagreement, label_noise = (
        diagnosis[key] for key in ('ratings', 'disagreement', 'label_noise'))
    candidates = (
        _Evidence('its rank correlation with the error against ratings',
                  ratings['rank_correlation_with_error'], 0.0, '0', 'Misleading'),
        _Evidence('its AUROC for disagreement at equal margin',
                  disagreement['spread_at_equal_margin'], 0.5, '0.5', 'Misleading'),
        # A discount at random is a loss, so that one shows nothing.
        _Evidence("what it adds to the margin's AUROC for wrong labels",
                  label_noise['gain'], 0.0, '0 or a little less', 'Not shown'),
    )
    return next((e for e in candidates if e.number['low'] is not None), None)


def conclusion(diagnosis: Mapping[str, Any]) -> str:
    """The first paragraph of the verdict, without the question."""
    spread = diagnosis['spread']
    if spread['variation']['value'] is None:
        return f"There is none: {spread['variation']['reason']}."
    if _below(spread['variation'], CONSTANT_SPREAD):
        return 'Decoration: the spread is one constant for all responses.'
    if _below(spread['unexplained_share'], REDUNDANT_SPREAD):
        return 'Decoration: the spread is a function of the reward and adds nothing to it.'
    evidence = _evidence(diagnosis)
    if evidence is None:
        return 'Not known: there is too little data for an interval of anything that would show it.'
    word = {'Yes': 'Information', 'No': evidence.if_below}.get(
        _answer(evidence.number, evidence.uninformed), 'Not shown')
    text = (f'{word}: {evidence.what} is {_format(evidence.number)}, where a spread that knows '
            f'nothing has {evidence.expected}.')
    if not diagnosis['settings']['fits_ratings']:
        text += (' The model saw no ratings, and preferences identify win probabilities only: the '
                 'size of the spread is an assumption of the model.')
    return text


def _says_variation(diagnosis: Mapping[str, Any]) -> str:
    spread = diagnosis['spread']
    number = spread['variation']
    return (f'{_answer(number, CONSTANT_SPREAD)}: its coefficient of variation is '
            f'{_format(number)} (an interval below {CONSTANT_SPREAD:g} means one constant, such as '
            f"its initialisation). Its mean is {_format(spread['over_reward_sd'])} standard "
            f'deviations of the reward. Of neighbouring quantiles the share '
            f"{_format(spread['crossing_rate'])} is predicted in the wrong order.")


def _says_redundancy(diagnosis: Mapping[str, Any]) -> str:
    spread, rows = diagnosis['spread'], diagnosis['per_tau']
    share = spread['unexplained_share']
    text = (f'{_answer(share, REDUNDANT_SPREAD)}: the share of its variance that is not a function '
            f'of the reward is {_format(share)} (an interval below {REDUNDANT_SPREAD:g} means '
            f'that the reward says it all). Its rank correlation with the reward is '
            f"{_format(spread['rank_correlation_with_reward'])}.")
    known = [row for row in rows if row['rank_correlation_with_reward']['value'] is not None]
    if len(known) < 2:
        return text
    least = min(known, key=lambda row: row['rank_correlation_with_reward']['value'])
    number = least['rank_correlation_with_reward']
    same = 'every quantile orders responses as the reward does' if _above(
        number, SAME_ORDER) else 'not every quantile is the reward again'
    return text + (f" The quantile that follows the reward least, tau = {least['tau']:.3g}, has a "
                   f'rank correlation of {_format(number)} with it: {same} (bound '
                   f'{SAME_ORDER:g}).')


def _says_ratings(diagnosis: Mapping[str, Any]) -> str:
    ratings, rows = diagnosis['ratings'], diagnosis['per_tau']
    error = ratings['coverage_error']
    if error['value'] is None:
        return f"Not known: {error['reason']}."
    correlation = ratings['rank_correlation_with_error']
    fits = 'fit' if error['value'] <= COVERAGE_ERROR else 'do not fit'
    text = (f'{_answer(correlation, 0.0)}: its rank correlation with the absolute error of the '
            f'mean is {_format(correlation)} (yes means an interval above 0), and a constant '
            f"spread would cost {_format(ratings['crps_gain'])} of a CRPS of "
            f"{_format(ratings['crps'])}. The quantiles {fits} the ratings: the share of ratings "
            f'below a quantile is off by {_format(error)} on average (bound {COVERAGE_ERROR:g}).')
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        held = last['coverage']['value'] - first['coverage']['value']
        text += (f' {held:.0%} of the ratings lie between the outer quantiles, which should hold '
                 f"{last['tau'] - first['tau']:.0%}.")
    if ratings['mapped_by'] != 'nothing':
        text += f" Quantiles were mapped to ratings by {ratings['mapped_by']}."
    return text


def _says_disagreement(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['disagreement']
    number = found['spread_at_equal_margin']
    if number['value'] is None:
        return f"Not known: {number['reason']}."
    return (f'{_answer(number, 0.5)}: for pairs whose label is below {DISAGREEMENT_LABEL:g} its '
            f"AUROC is {_format(found['spread'])}, that of a small margin "
            f"{_format(found['margin'])}, and that of the spread among pairs of about equal margin "
            f'{_format(number)} (yes means an interval above 0.5).')


def _says_label_noise(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['label_noise']
    number = found['gain']
    if number['value'] is None:
        return f"Not known: {number['reason']}."
    return (f'{_answer(number, 0.0)}: for labels made wrong on purpose ({FLIPPED_SHARE:.0%} of the '
            f"pairs) the AUROC of the margin is {_format(found['margin'])}, and discounting it by "
            f'the spread adds {_format(number)} (yes means an interval above 0).')


def _says_calibration(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['calibration']
    if found['ece']['value'] is None:
        return f"Not known: {found['ece']['reason']}."
    near = 'Yes' if found['ece']['value'] <= CALIBRATION_ERROR else 'No'
    text = (f"{near}: the expected calibration error is {_format(found['ece'])} (bound "
            f"{CALIBRATION_ERROR:g}), the NLL {_format(found['nll'])} nats, where a coin has "
            f'{np.log(2.0):.3f}.')
    fitted = found['temperature']
    if fitted['value'] is None:
        return text + f" No temperature was fitted: {fitted['reason']}."
    if _above(fitted, 1.0):
        side = 'the model is overconfident'
    elif _below(fitted, 1.0):
        side = 'the model is not confident enough'
    else:
        side = '1 would do as well'
    return text + (f' The temperature that fits validation is {_format(fitted)}: {side}. After it '
                   f"the NLL is {_format(found['after']['nll'])}.")


def _says_length(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['length']
    controlled = found['accuracy_controlled']
    if controlled['value'] is None:
        return f"Not known: {controlled['reason']}."
    answer = {'Yes': 'No', 'No': 'Yes'}.get(_answer(controlled, 0.5), 'It may be')
    return (f'{answer}: the accuracy is {_format(diagnosis["accuracy"])}, and '
            f'{_format(controlled)} if both sides were equally long (no means an interval above '
            f"0.5). Of pairs within a factor of {LENGTH_RATIO:g} in length it is "
            f"{_format(found['accuracy_matched'])}. The longer response is preferred at a rate of "
            f"{_format(found['longer_is_preferred'])} and has the higher reward at a rate of "
            f"{_format(found['longer_has_higher_reward'])}.")


def _says_prompt(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['prompt']
    gain = found['gain']
    if gain['value'] is None:
        return f"Not known: {gain['reason']}."
    return (f"{_answer(gain, 0.0)}: with the prompts of {found['pairs']} pairs exchanged for those "
            f"of other opening questions the accuracy is {_format(found['accuracy_exchanged'])} in "
            f"place of {_format(found['accuracy'])}, and the own prompt is worth {_format(gain)} "
            f'(yes means an interval above 0). The mean margin is lower by '
            f'{_format(found["margin_gain"])} of its standard deviations. The share '
            f'{_format(found["changed_order"])} of the pairs changes its order; margins keep a '
            f"rank correlation of {_format(found['rank_correlation_of_margins'])} with what they "
            'were.')


def _says_position(diagnosis: Mapping[str, Any]) -> str:
    found = diagnosis['position']
    share, offset = found['first_is_chosen'], found['first_log_odds']
    answer = 'Not known'
    if offset['low'] is not None:
        answer = 'Yes' if any(_above(number, even) or _below(number, even) for number, even in (
            (share, 0.5), (offset, 0.0))) else 'Not shown'
    return (f'{answer}: the first is chosen at a rate of {_format(share)}, and standing first is '
            f'worth {_format(offset)} log odds (yes means an interval without 0.5, or without 0). '
            f'The share {_format(found["flips"])} of the pairs is decided otherwise in the other '
            'order. The accuracy is '
            f'{_format(found["accuracy_first"])} where the preferred response stands first, '
            f'{_format(found["accuracy_second"])} where it stands second, and '
            f'{_format(found["accuracy"])} of both orders together; the NLL is '
            f'{_format(found["nll_one_order"])} nats of one order and {_format(found["nll"])} of '
            'both. '
            'All else on this page is of both. Rewards are fitted to the log odds among the '
            'responses to a prompt, so that those of two prompts do not compare, and no divergence '
            'of chosen from rejected rewards is estimated.')


def _below(number: Mapping[str, Any], bound: float) -> bool:
    return number['high'] is not None and number['high'] < bound


def _above(number: Mapping[str, Any], bound: float) -> bool:
    return number['low'] is not None and number['low'] > bound


def _answer(number: Mapping[str, Any], bound: float) -> str:
    """Whether a number is above a bound, as far as its interval tells."""
    if number['low'] is None:
        return 'Not known'
    if _above(number, bound):
        return 'Yes'
    return 'No' if _below(number, bound) else 'Not shown'


def _wrap(text: str) -> str:
    """Lines of a paragraph, none of which ends within a number and its interval."""
    tie = '\N{NO-BREAK SPACE}'
    tied = re.sub(r' (?=\[)|(?<=\d,) (?=-?\d)', tie, text)
    return textwrap.fill(tied, _PAGE_WIDTH).replace(tie, ' ')


def _format(number: Mapping[str, Any]) -> str:
    if number['value'] is None:
        return f"unknown ({number['reason']})"
    ends = ('no interval' if number['low'] is None
            else f"{number['low']:.3f}, {number['high']:.3f}")
    return f"{number['value']:.3f} [{ends}]"
