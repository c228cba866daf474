"""Measures how fast this machine trains and scores.

    qrm benchmark --config=benchmark --workdir=results/benchmark
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results; a rerun overwrites them.')
launch.define_config()


def main() -> None:
    from qrm.studies import benchmark
    from qrm.training import config

    print(benchmark.benchmark(launch.config(
        {**config.KEYS, **benchmark.KEYS}, benchmark.check), _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
