"""Both orders of every two responses, as a pairwise model reads them.

A comparison of K responses becomes one of K (K - 1) texts that continue the same prompt, each of
two of the responses in one order. Two orders of the same responses stand beside each other, in
the order of `of`. One is preferred to the other as its first response is to its second.
"""

import dataclasses

import numpy as np

from qrm.data.comparisons import Comparison, MalformedRow, Text

FIRST, SECOND = '{first}', '{second}'


def of(k: int) -> list[tuple[int, int]]:
    """Which two of K responses each order is of, the first one first: 01, 10, 02, 20, 12, ..."""
    return [pair for j in range(k) for i in range(j) for pair in ((i, j), (j, i))]


def check_template(template: str) -> None:
    """Checks that a template names both responses once, the first one first.

    Raises:
      ValueError: it does not, or nothing stands between them.
    """
    _, first, rest = template.partition(FIRST)
    between, second, after = rest.partition(SECOND)
    if not (first and second and between.strip()) or any(
            mark in part for mark in (FIRST, SECOND) for part in (rest[:len(between)], after)):
        raise ValueError(f'{template!r}, expected a text with {FIRST} and after it {SECOND}, each '
                         'once, and something between them')


def as_orders(comparison: Comparison, template: str) -> Comparison:
    """The comparison whose responses are the orders of two of its own, of which nothing is known.

    Of chats each is one message of the assistant. Blanks around a response are left out.

    Args:
      comparison: with texts or chats.
      template: see `check_template`.

    Raises:
      MalformedRow: a message with more than a role and a text, which the template has no place for.
    """
    texts = response_texts(comparison)
    before, rest = template.split(FIRST)
    between, after = rest.split(SECOND)
    written = [f'{before}{texts[i]}{between}{texts[j]}{after}' for i, j in of(len(texts))]
    responses: list[Text] = written if isinstance(comparison.prompt, str) else [
        ({'role': 'assistant', 'content': text.strip()},) for text in written]
    return dataclasses.replace(comparison, responses=tuple(responses), ranks=None, preferred=None,
                               preference=None, ratings=None, attributes={})


def response_texts(comparison: Comparison) -> list[str]:
    """Each response as it stands in an order; turns after the first message with their roles.

    Raises:
      MalformedRow: as `as_orders`.
    """
    return [_as_text(response, comparison.place).strip() for response in comparison.responses]


def preference(matrix: np.ndarray) -> np.ndarray:
    """The preference matrix [K (K - 1), K (K - 1)] of the orders of responses with one [K, K].

    That one order is preferred to the other of the same two is as likely as that its first response
    is preferred; nothing is known of orders of others.
    """
    pairs = of(len(matrix))
    found = np.zeros((len(pairs), len(pairs)), np.float32)
    for n, (i, j) in enumerate(pairs):
        found[n, n ^ 1] = matrix[i, j]  # orders of the same two: 0 and 1, 2 and 3, ...
    return found


def _as_text(response: Text, place: str) -> str:
    if isinstance(response, str):
        return response
    for message in response:
        if more := [key for key, value in message.items()
                    if key not in ('role', 'content') and value not in (None, '', (), [], {})]:
            raise MalformedRow(f'{place}: message key {more[0]!r} of a response, expected role and '
                               'content alone to be read in a pair')
    first, *rest = (message['content'] or '' for message in response)
    roles = (message['role'] for message in response[1:])
    return '\n\n'.join([first, *(f'{role}: {said}'
                                 for role, said in zip(roles, rest, strict=True))])
