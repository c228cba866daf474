"""Trains a reward model.

    qrm train --config=hh:helpful,quantile --workdir=results/run
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; a rerun goes on in it.')
launch.define_config()
launch.define_process_flags()


def main() -> None:
    from qrm.training import config, train

    train.train(launch.config(config.KEYS, config.check), _WORKDIR.value)


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
