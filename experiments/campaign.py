"""Breaks things on purpose, and counts what survives.

    qrm campaign --config=campaign --workdir=results/campaign
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun goes on in it.')
launch.define_config()


def main() -> None:
    from qrm.studies import campaign

    print(campaign.run(launch.config(campaign.KEYS, campaign.check), _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
