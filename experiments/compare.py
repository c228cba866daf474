"""Trains every head on the same batches and prints what it changes.

    qrm compare --config=compare --workdir=results/compare
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun goes on in it.')
launch.define_config()
launch.define_process_flags()


def main() -> None:
    from qrm.studies import compare
    from qrm.training import config

    print(compare.compare(launch.config(
        {**config.KEYS, **compare.KEYS}, compare.member_configs), _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
