"""Trains every head on every workload and prints the paper's table beside real estimates.

    qrm reproduce --config=demo --workdir=results/demo
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun goes on in it.')
launch.define_config()
launch.define_process_flags()


def main() -> None:
    from qrm.studies import reproduce
    from qrm.training import config

    print(reproduce.reproduce(launch.config(config.KEYS, reproduce.run_configs), _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
