"""Trains every head on the same batches and prints what it changes.

    python -m experiments.compare --config=configs/compare.py --workdir=results/compare
"""

from absl import flags
from ml_collections import config_flags

from qrm.commands import launch
from qrm.studies.compare import compare

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file: configs/compare.py.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun goes on in it.')
launch.define_process_flags()


def main() -> None:
    print(compare(_CONFIG.value, _WORKDIR.value))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    launch.run(main)
