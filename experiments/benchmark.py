"""Measures how fast this machine trains and scores.

    python -m experiments.benchmark --config=configs/benchmark.py --workdir=results/benchmark
"""

from absl import flags
from ml_collections import config_flags

from qrm.commands import launch
from qrm.studies.benchmark import benchmark

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config, such as configs/benchmark.py.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun overwrites them.')


def main() -> None:
    print(benchmark(_CONFIG.value, _WORKDIR.value))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    launch.run(main)
