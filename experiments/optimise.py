"""Optimises a policy against reward models, and prints what it was worth by the truth or another.

    qrm optimise --config=optimise --workdir=results/optimise
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun goes on in it.')
launch.define_config()


def main() -> None:
    from qrm.studies import overoptimisation

    print(overoptimisation.run(launch.config(overoptimisation.KEYS, overoptimisation.check),
                               _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
