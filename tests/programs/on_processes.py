"""`experiments.train` with something that happens to it while it makes the batch of a step.

    python -m tests.programs.on_processes SIGTERM|raise|nothing STEP FLAGS...
"""

import os
import signal
import sys

from experiments import train as command
from qrm.commands import launch
from qrm.data import packing


def strike_at(call: int, how: str) -> None:
    make_batch, calls = packing.make_batch, []

    def struck(*args):
        calls.append(1)
        if len(calls) == call and how == 'raise':
            raise OSError('no space left on device')
        if len(calls) == call and how != 'nothing':
            os.kill(os.getpid(), signal.Signals[how])
        return make_batch(*args)

    packing.make_batch = struck


if __name__ == '__main__':
    strike_at(int(sys.argv.pop(2)), sys.argv.pop(1))
    launch.run(command.main, required=('config', 'workdir'))
