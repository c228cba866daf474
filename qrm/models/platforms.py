"""The platform that programs are made for: that of the devices here, or one that is named."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

PLATFORMS = ('cpu', 'gpu', 'tpu')
_TARGET: contextvars.ContextVar[str] = contextvars.ContextVar('target', default='')


def current() -> str:
    """One of `PLATFORMS`. Programs differ where one way is fast on one and slow on another."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def ahead_of(platform: str) -> Iterator[None]:
    """Programs that are traced within are for this platform, wherever they are compiled.

    Functions that were traced before keep what they were traced for.

    Raises:
      ValueError: it is none of `PLATFORMS`.
    """
    if platform not in PLATFORMS:
        raise ValueError(f'platform {platform!r}, expected one of {PLATFORMS}')
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)
