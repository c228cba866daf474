"""Explains the paper's table from its authors' own code.

    qrm published --config=published --workdir=results/published
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun goes on in it.')
launch.define_config()
launch.define_process_flags()


def main() -> None:
    from qrm.studies import published
    from qrm.training import config

    print(published.published(launch.config(
        {**config.KEYS, **published.KEYS}, published.check), _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
