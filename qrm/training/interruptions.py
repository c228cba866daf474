"""How a run ends before its time: by a signal, or by a number that is not finite."""

import signal
from typing import Any, Self


class NonFiniteLoss(ArithmeticError):
    """A loss, gradient or reward became NaN or infinite; names the step and its comparisons."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved and a rerun goes on from there."""


class Signals:
    """Remembers SIGTERM and SIGINT while it is entered, in place of dying by them."""

    def __init__(self):
        self.received = ''
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
