"""How a run ends before its time: by a signal, or by a number that is not finite."""

import signal
from typing import Any, Self


class NonFiniteLoss(ArithmeticError):
    """A loss, gradient, reward or hidden state became NaN or infinite; names the comparisons."""


class Interrupted(BaseException):
    """A signal asked the run to stop; its state is saved and a rerun goes on from there.

    No plain exception: libraries catch those where a failure is of no importance.
    """


_before_training: list[str] = []  # signals that came when nothing had entered `Signals`


def stop(number: int, unused_frame: Any) -> None:
    """Serves a signal where there is nothing to save; `Signals` does where there is.

    Raises:
      Interrupted: at once. Python drops what is raised in a callback of its own; for that case
        the signal is remembered, and ends training after its first step.
    """
    name = signal.Signals(number).name
    _before_training.append(name)
    raise Interrupted(f'{name}: stopped; run the same command again to go on')


class Signals:
    """Remembers SIGTERM and SIGINT while it is entered, in place of dying by them."""

    def __init__(self):
        self.received = _before_training[0] if _before_training else ''
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, unused_frame: Any) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[number])
        print(f'{self.received}: saving after this step; a second signal stops at once', flush=True)

    def __exit__(self, *unused) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
