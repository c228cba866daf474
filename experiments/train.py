"""Trains one reward model.

    python -m experiments.train --config=configs/hh.py:helpful,quantile --workdir=results/run
"""

from absl import flags
from ml_collections import config_flags

from qrm.commands import launch
from qrm.training.train import train

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, such as configs/demo.py.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; a rerun goes on in it.')
launch.define_process_flags()


def main() -> None:
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    launch.run(main)
