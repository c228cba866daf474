"""Gives the rewards of a run mean 0 and standard deviation 1 over a reference set, wherever used.

    qrm normalise --checkpoint=results/run --split=validation
    qrm normalise --checkpoint=results/run --input=prompts.jsonl
    qrm normalise --checkpoint=results/run --clear
"""

from absl import flags

from qrm.commands import launch

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Folder of a run.')
_INPUT = flags.DEFINE_string(
    'input', '', 'File of the reference set, as `qrm score` reads it: .jsonl, .json, either with '
    '.gz, or .parquet.')
_SPLIT = flags.DEFINE_string(
    'split', '', "In place of a file a split of the run's own data: train or validation.")
_CLEAR = flags.DEFINE_bool('clear', False, 'Make rewards raw again.')
launch.define_step()
launch.define_max_length()


def main() -> None:
    from qrm.data.comparisons import DataError
    from qrm.serving import normalise

    if _CLEAR.value:
        if given := [name for name in ('input', 'split', 'step', 'max_length')
                     if flags.FLAGS[name].present]:
            raise DataError(f'--clear with --{given[0]}, expected one of the two')
        print(normalise.clear(_CHECKPOINT.value))
        return
    print(normalise.normalise(
        _CHECKPOINT.value, split=_SPLIT.value, source=_INPUT.value, step=launch.step(),
        max_length=flags.FLAGS.max_length))


if __name__ == '__main__':
    launch.run(main, required=('checkpoint',))
