"""Both orders of two responses, by hand."""

import numpy as np
import pytest

from qrm.data import orders
from qrm.data.comparisons import Comparison, MalformedRow

TEMPLATE = ' [A] {first} [B] {second}'


def test_orders_of_the_same_two_stand_beside_each_other():
    assert orders.of(1) == []
    assert orders.of(2) == [(0, 1), (1, 0)]
    assert orders.of(3) == [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    many = orders.of(7)
    assert len(set(many)) == 7 * 6
    assert all(many[n ^ 1] == (j, i) for n, (i, j) in enumerate(many))


def test_texts_follow_the_prompt_which_is_never_swapped():
    found = orders.as_orders(
        Comparison('a', 'p:', (' x ', '{second}', 'z\n'), '', preferred=1, margin=0.5), TEMPLATE)
    assert found.prompt == 'p:'
    # What a response says is no part of the template.
    assert found.responses == (
        ' [A] x [B] {second}', ' [A] {second} [B] x', ' [A] x [B] z', ' [A] z [B] x',
        ' [A] {second} [B] z', ' [A] z [B] {second}')
    assert found.preferred is None
    assert not found.preference_matrix().any()
    assert (found.id, found.margin) == ('a', 0.5)


def test_a_pair_of_chats_is_one_message():
    def said(*texts):
        return tuple({'role': role, 'content': text}
                     for role, text in zip(('assistant', 'user', 'assistant'), texts, strict=False))

    prompt = ({'role': 'user', 'content': 'p'},)
    found = orders.as_orders(
        Comparison('a', prompt, (said('x'), said('y', 'why?', 'so.')), ''), TEMPLATE)
    assert found.prompt == prompt
    turns = 'y\n\nuser: why?\n\nassistant: so.'
    assert found.responses == tuple(({'role': 'assistant', 'content': text},)
                                    for text in (f'[A] x [B] {turns}', f'[A] {turns} [B] x'))


def test_messages_that_say_more_are_refused():
    call = ({'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'f'}]},)
    with pytest.raises(MalformedRow, match="row 3: message key 'tool_calls' of a response"):
        orders.as_orders(Comparison('row 3', (), (call, call), ''), TEMPLATE)


def test_an_order_is_preferred_as_its_first_response_is():
    matrix = np.array([[0.0, 0.8, 1.0], [0.2, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = orders.preference(matrix)
    expected = np.zeros((6, 6), np.float32)
    expected[0, 1], expected[1, 0] = 0.8, 0.2  # 0 before 1, and 1 before 0
    expected[2, 3] = 1.0  # of 1 and 2 nothing is known
    np.testing.assert_array_equal(found, expected)
    # Exchanged responses exchange the orders.
    np.testing.assert_array_equal(orders.preference(matrix[:2, :2].T), found[:2, :2].T)


@pytest.mark.parametrize('template', [
    '', '{first}', '{second} or {first}', '{first} {second}', '{first} {first} or {second}',
    '{first} or {second} {second}', '{first} or {second}, {first}'])
def test_templates_that_do_not_name_both_once(template):
    with pytest.raises(ValueError, match='expected a text with {first} and after it {second}'):
        orders.check_template(template)


def test_templates_that_do():
    for template in (TEMPLATE, '{first}|{second}', '{a} {first} vs {second}: '):
        orders.check_template(template)
