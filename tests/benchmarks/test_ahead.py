"""Compiling steps ahead: for the devices that are here, and how the table is made."""

import jax
import pytest

from benchmarks import ahead
from qrm.data.comparisons import DataError
from qrm.studies import costs

SIZES = {'vocab_size': 50, 'max_positions': 64, 'hidden_size': 32, 'num_layers': 4,
         'num_heads': 2, 'intermediate_size': 48}
SMALL = ahead.Case('gpt2', SIZES, 2, 64, remat=True)


def test_arguments_are_the_state_and_the_micro_batches():
    row = ahead.measure(SMALL, jax.devices())
    network, layout = ahead.describe(SMALL)
    state = costs.step_memory(network, layout).state
    # Beside it step, key and the stack; of these the tokens alone are 4 bytes each.
    tokens = 2 * 4 * 2 * 64
    assert state + tokens < row['arguments'] < state + 100 * tokens
    assert row['temporary'] > 0
    assert 'error' not in row


def test_adapters_leave_out_what_is_not_trained():
    whole = ahead.measure(SMALL, jax.devices())['arguments']
    row = ahead.measure(SMALL._replace(lora=2), jax.devices())
    assert row['arguments'] < whole / 2
    assert 'formula' not in row


def test_the_table_by_hand():
    row = SMALL._asdict() | {'case': 'small', 'devices': 8, 'device': 'TPU v9', 'formula': 5e9,
                             'arguments': 3e9, 'temporary': 1.5e9, 'seconds': 12.4}
    refused = {key: value for key, value in row.items() if key not in ('arguments', 'temporary')}
    _, first, second = ahead.lines([row, refused | {'error': 'out of memory'}], 9e9)
    assert first == ['small', '8 x TPU v9', '2 x 64', '2', 'dense', '3', '1.5', '4.5 GB, 50%',
                     '5', '12 s']
    assert second[5:] == ['-', '-', 'out of memory', '5', '12 s']


def test_numbers_of_devices_without_a_layout_are_refused():
    with pytest.raises(DataError, match=r'--devices=3, expected one of \[1, 8, 16, 64\]'):
        ahead.devices('v5e', 3)


def test_every_case_is_described():
    for name, case in ahead.CASES.items():
        network, layout = ahead.describe(case)
        assert network.architecture.num_layers >= 12, name
        assert layout.slots >= 1, name
