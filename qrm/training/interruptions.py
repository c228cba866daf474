"""How a run ends before its time: by signals, numbers that are not finite, memory, a standstill."""

import contextlib
import faulthandler
import signal
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax


class NonFiniteLoss(ArithmeticError):
    """A loss, gradient, reward or hidden state became NaN or infinite; names the comparisons."""


class Interrupted(BaseException):
    """A signal asked the run to stop; its state is saved and a rerun goes on from there.

    No plain exception: libraries catch those where a failure is of no importance.
    """


def exhausts_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory, of the host or of a device."""
    # While it compiles XLA says RESOURCE_EXHAUSTED, while it runs INTERNAL (jaxlib 0.10.2, CPU).
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError)
        and any(words in str(error) for words in ('RESOURCE_EXHAUSTED', 'Out of memory')))


_STOPPED = '{}: stopped; run the same command again'
_before_training: list[str] = []  # signals that came when nothing had entered `Signals`
_entered = 0  # how many `Signals` are


def stop(number: int, unused_frame: Any) -> None:
    """Serves a signal where there is nothing to save; `Signals` does where there is.

    Raises:
      Interrupted: at once. Python drops what is raised in a callback of its own; for that case
        the signal is remembered: it ends training after its first step, and else `check` tells.
    """
    name = signal.Signals(number).name
    _before_training.append(name)
    raise Interrupted(_STOPPED.format(name))


def check() -> None:
    """Tells of a signal that was served and dropped, where `Signals` does not.

    Raises:
      Interrupted: there was one.
    """
    if _before_training and not _entered:
        raise Interrupted(_STOPPED.format(_before_training[0]))


_patience = 0.0  # seconds
_watched = 0  # how many are entered


def end_stalls(seconds: float) -> None:
    """From now on a process ends if it is `watched` and makes no progress for so long; 0: never.

    Of several processes one that dies is noticed, but not one that waits for ever for another that
    waits for it.
    """
    global _patience
    _patience = seconds


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], None]]:
    """Within it progress is expected, if `end_stalls` says so.

    Yields:
      What is to be called when there is some. If it is not for too long, the stack of each thread
      is printed to the standard error output, and the process ends with exit code 1.
    """

    global _watched

    def progress() -> None:
        if _patience:
            faulthandler.dump_traceback_later(_patience, exit=True)

    _watched += 1
    progress()
    try:
        yield progress
    finally:
        _watched -= 1
        if _watched:  # of one within another
            progress()
        elif _patience:
            faulthandler.cancel_dump_traceback_later()


class Signals:
    """Remembers SIGTERM and SIGINT while it is entered, in place of dying by them."""

    def __init__(self):
        self.received = _before_training[0] if _before_training else ''
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        global _entered
        _entered += 1
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, unused_frame: Any) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[number])
        print(f'{self.received}: saving after this step; a second signal stops at once', flush=True)

    def __exit__(self, *unused) -> None:
        global _entered
        _entered -= 1
        for number, handler in self._before.items():
            signal.signal(number, handler)
