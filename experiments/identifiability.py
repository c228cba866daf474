"""Compares what each objective learns with rewards whose distribution is known.

    qrm identifiability --config=identifiability --workdir=results/identifiability
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun goes on in it.')
launch.define_config()


def main() -> None:
    from qrm.studies import identifiability

    config = launch.config(identifiability.KEYS, identifiability.check)
    print(identifiability.identify(config, _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
