"""Evaluates a trained reward model on the test split of its data, or of other data.

    qrm evaluate --workdir=results/run [--config.data.path=other.jsonl]
"""

from absl import flags
from ml_collections import ConfigDict

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
launch.define_print_config()
launch.define_process_flags()


def main() -> None:
    from qrm.analysis import evaluate
    from qrm.training import config

    print(evaluate.diagnose(launch.config(config.KEYS, config.check), _WORKDIR.value))


def stored() -> ConfigDict:
    """The run's own config: it says what `--config.…` can change."""
    from qrm.training import workdir

    return workdir.load_config(_WORKDIR.value)


if __name__ == '__main__':
    launch.run(main, required=('workdir',), stored=stored)
