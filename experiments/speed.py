"""Measures how fast this machine trains and scores.

    qrm speed --config=speed --workdir=results/speed
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun overwrites them.')
launch.define_config()


def main() -> None:
    from qrm.studies import speed
    from qrm.training import config

    print(speed.run(launch.config(
        {**config.KEYS, **speed.KEYS}, speed.check), _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
