"""Chooses the best of n responses by every rule and proxy, and prints what it was worth.

    qrm best_of_n --config=best_of_n --workdir=results/best_of_n
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results.')
launch.define_config()


def main() -> None:
    from qrm.studies import best_of_n

    print(best_of_n.run(launch.config(best_of_n.KEYS, best_of_n.check), _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
