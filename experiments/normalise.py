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
_STEP = flags.DEFINE_string(
    'step', 'best', "Which checkpoint of the run: 'best', which `qrm score` and others use, 'last' "
    'or a step.')
_MAX_LENGTH = flags.DEFINE_integer(
    'max_length', 0, 'Tokens of the longest dialogue, longer ones are cut from the left. 0: the '
    "model's number of positions.", lower_bound=0)


def main() -> None:
    from qrm.data.comparisons import DataError
    from qrm.serving import normalise

    if _CLEAR.value:
        if _INPUT.value or _SPLIT.value:
            raise DataError('--clear beside a reference set, expected one of the two')
        print(normalise.clear(_CHECKPOINT.value))
        return
    step = int(_STEP.value) if _STEP.value.isdecimal() else _STEP.value
    print(normalise.normalise(_CHECKPOINT.value, split=_SPLIT.value, source=_INPUT.value, step=step,
                              max_length=_MAX_LENGTH.value))


if __name__ == '__main__':
    launch.run(main, required=('checkpoint',))
