"""Asks whether the spreads of trained models know where judges disagree.

    qrm disagreement --config=disagreement --workdir=results/disagreement \\
      --config.runs=results/heads --config.pandalm=testset-v1.json
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results.')
launch.define_config()


def main() -> None:
    from qrm.studies import disagreement

    print(disagreement.disagreement(
        launch.config(disagreement.KEYS, disagreement.check), _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
