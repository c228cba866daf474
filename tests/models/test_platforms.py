"""The platform that programs are made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrm.models import attention, platforms


def test_it_is_that_of_the_devices_unless_another_is_named():
    assert platforms.current() == jax.default_backend() == 'cpu'
    with platforms.ahead_of('tpu'):
        assert platforms.current() == 'tpu'
        with platforms.ahead_of('gpu'):
            assert platforms.current() == 'gpu'
        assert platforms.current() == 'tpu'
    assert platforms.current() == 'cpu'


def test_it_is_what_it_was_after_an_error():
    with pytest.raises(KeyError), platforms.ahead_of('tpu'):
        raise KeyError
    assert platforms.current() == 'cpu'


def test_others_are_refused():
    with (pytest.raises(ValueError, match=r"platform 'cuda', expected one of \('cpu', 'gpu', "),
          platforms.ahead_of('cuda')):
        pass


def test_programs_are_made_for_it():
    ids = np.ones((1, 64), np.int32)

    def tiled():
        plan = attention.plan(jnp.array(ids), jnp.array(ids), jnp.arange(64)[None], 'auto')
        return plan.tiles is not None

    assert tiled()
    with platforms.ahead_of('gpu'):
        assert not tiled()
