"""What a run does with the devices of its process."""

import jax
import jax.numpy as jnp

from qrm.training import devices


def test_programs_are_forgotten_where_room_is_short(monkeypatch):
    triple = jax.jit(lambda x: 3.0 * x)
    triple(jnp.float32(1.0))
    devices.release_programs()
    assert triple._cache_size() == 1
    monkeypatch.setattr(devices, '_MAPPINGS', 0.0)
    devices.release_programs()
    assert triple._cache_size() == 0
    assert float(triple(jnp.float32(2.0))) == 6.0
