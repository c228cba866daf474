"""Evaluates a trained reward model on the test split of its data, or of other data.

    qrm evaluate --workdir=results/run [--config.data.path=other.jsonl]
"""

from absl import flags
from ml_collections import config_flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
launch.define_print_config()
launch.define_process_flags()


def main() -> None:
    from qrm.analysis import evaluate
    from qrm.training import config

    print(evaluate.diagnose(launch.config(config.KEYS), _WORKDIR.value))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags twice: the run's own config defines what `--config.…` can change."""
    from qrm.training import workdir

    flags.FLAGS(argv, known_only=True)
    if _WORKDIR.value is None:
        raise flags.ValidationError('no --workdir')
    config_flags.DEFINE_config_dict('config', workdir.load_config(_WORKDIR.value))
    return flags.FLAGS(argv)


if __name__ == '__main__':
    launch.run(main, parse=parse_flags)
