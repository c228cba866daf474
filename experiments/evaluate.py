"""Evaluates a trained reward model on the test split of its data, or of other data.

    qrm evaluate --workdir=results/run [--config.data.path=other.jsonl]
    qrm evaluate --workdir=MODEL --config.data.path=pairs.jsonl --output=results/model
"""

from absl import flags
from ml_collections import ConfigDict

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run, or folder or hub name of another reward model.')
_OUTPUT = flags.DEFINE_string(
    'output', '', 'Folder to write into. Default: that of the run; of another model nothing is '
    'written.')
launch.define_outputs()
launch.define_print_config()
launch.define_process_flags()


def main() -> None:
    from qrm.analysis import evaluate
    from qrm.training import config

    print(evaluate.diagnose(launch.config(config.KEYS, config.check), _WORKDIR.value,
                            _OUTPUT.value, flags.FLAGS.outputs))


def stored() -> ConfigDict:
    """The run's own config: it says what `--config.…` can change."""
    from qrm.analysis import evaluate

    return evaluate.stored_config(_WORKDIR.value)


if __name__ == '__main__':
    launch.run(main, required=('workdir',), stored=stored)
