"""Compares what each objective learns with rewards whose distribution is known.

    python -m experiments.identifiability --config=configs/identifiability.py \\
        --workdir=results/identifiability
"""

from absl import flags
from ml_collections import config_flags

from qrm.commands import launch
from qrm.studies.identifiability import identify

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, such as configs/identifiability.py.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun goes on in it.')


def main() -> None:
    print(identify(_CONFIG.value, _WORKDIR.value))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    launch.run(main)
