"""Tests of comparisons as rows of tables: nothing of them is lost."""

import dataclasses
import json

import numpy as np
import pytest

from qrm.data import records
from qrm.data.comparisons import Comparison
from qrm.data.records import Comparisons

CALL = {'role': 'assistant', 'content': None,
        'tool_calls': [{'function': {'name': 'f', 'arguments': {'x': 1}}}]}
ALL = [
    Comparison('a', '\n\nHuman: Hü?\n\nAssistant:', (' “Yes”', ' No'), 'Hü?', ranks=(0, 1),
               margin=0.5, weight=2.0, where='rows.jsonl:1', remarks=('blank response',)),
    Comparison('rows.jsonl:2', '', ('x', 'y', 'z'), '', preferred=2, where='rows.jsonl:2'),
    Comparison('c', ({'role': 'user', 'content': 'q'},), ((CALL,), ({'role': 'assistant',
               'content': 'r'},)), 'q', preference=0.25, annotator='Ann',
               tools=({'name': 'f', 'parameters': {'x': [1, 2]}},)),
    Comparison('d', 'p', ('r',), 'p', ratings=(0.1,), attributes={'style': (None,), 'wit': (3.0,)}),
    Comparison('e', 'p', ('r', 's'), 'p', ratings=(None, 2.0)),
]


@pytest.fixture(scope='module')
def table():
    return Comparisons.of(ALL)


def test_comparisons_come_back_as_they_were(table):
    assert list(table) == ALL
    for one, other in zip(table, ALL, strict=True):
        assert (one.where, one.remarks) == (other.where, other.remarks)
        assert one.text_digest() == other.text_digest()
        assert type(one.prompt) is type(other.prompt)
    assert (len(table), table[2], table[-1], list(table[1:3])) == (5, ALL[2], ALL[4], ALL[1:3])
    assert Comparisons.of(table) is table
    with pytest.raises(ValueError, match='expected places that ascend'):
        table[::-1]
    assert list(Comparisons.of([])) == []


def test_some_are_picked_and_their_facts_with_them(table, monkeypatch):
    monkeypatch.setattr(records, 'CHUNK', 2)
    for whole in (table, Comparisons.of(ALL)):
        some = whole.pick(np.array([0, 2, 3])).pick(np.array([1, 2]))
        assert list(some) == [ALL[2], ALL[3]]
        assert some.fact('id').to_pylist() == ['c', 'd']
        assert some.fact('annotator').to_pylist() == ['Ann', None]
        assert [bytes(x) for x in some.numbers('texts')] == [c.text_digest() for c in ALL[2:4]]
        assert whole.numbers('has_opening').tolist() == [True, False, True, True, True]
    assert [len(chunk) for chunk in Comparisons.of(ALL).chunks()] == [2, 2, 1]
    assert table.pick(np.array([0, 1])).digest != table.pick(np.array([0, 2])).digest


def test_what_is_said_does_not_depend_on_the_place():
    first, second = (records.said(Comparison(f'{name}:1', 'p', ('a', 'b'), 'p', ranks=(0, 1),
                                             where=f'{name}:1')) for name in ('x', 'y'))
    assert first == second
    assert b'"id": ""' in first


def test_templates_find_keys_in_the_order_of_the_row():
    """They print tools and calls as they stand, so that another order is another text."""
    tools = ({'type': 'function', 'function': {'name': 'f', 'description': 'd', 'parameters': {
        'z': 1, 'a': 2}}},)
    call = {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': {
        'y': 1, 'b': 2}}}], 'content': ''}
    given = dataclasses.replace(ALL[2], tools=tools, responses=((call,), *ALL[2].responses[1:]))
    read, = Comparisons.of([given])
    assert json.dumps([read.tools, read.prompt, read.responses]) == json.dumps(
        [given.tools, given.prompt, given.responses])
    # What is said twice may be said in another order.
    other = dataclasses.replace(given, tools=({'function': tools[0]['function'],
                                               'type': 'function'},))
    assert records.said(other) != records.said(given)
    assert records.said_in_any_order(other) == records.said_in_any_order(given)
