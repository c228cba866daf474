"""Chooses the best of n responses by every rule and proxy, and prints what it was worth.

    python -m experiments.best_of_n --config=configs/best_of_n.py --workdir=results/best_of_n
"""

from absl import flags
from ml_collections import config_flags

from qrm.commands import launch
from qrm.studies import best_of_n

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file: configs/best_of_n.py.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results.')


def main() -> None:
    print(best_of_n.run(_CONFIG.value, _WORKDIR.value))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    launch.run(main)
