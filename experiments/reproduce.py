"""Trains every head on every workload and prints the paper's table beside real estimates.

    python -m experiments.reproduce --config=configs/demo.py --workdir=results/demo
"""

from absl import flags
from ml_collections import config_flags

from qrm.commands import launch
from qrm.studies.reproduce import reproduce

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, such as configs/demo.py.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun goes on in it.')
launch.define_process_flags()


def main() -> None:
    print(reproduce(_CONFIG.value, _WORKDIR.value))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    launch.run(main)
