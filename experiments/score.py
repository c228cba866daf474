"""Scores responses with a trained reward model.

    qrm score --checkpoint=results/run --input=in.jsonl --output=out.jsonl
"""

import dataclasses

from absl import flags

from qrm.commands import launch

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'Folder of a run, or folder or hub name of a Hugging Face checkpoint.')
_INPUT = flags.DEFINE_string(
    'input', None, 'File to score: .jsonl, .json, either with .gz, or .parquet.')
_OUTPUT = flags.DEFINE_string(
    'output', None, 'File to write, a line for each row read; with gzip if it ends in .gz.')
_READ_BEFORE = flags.DEFINE_string(
    'read_before', None, 'Token that dialogues are read without at their end, as padding is; '
    'empty: no such token. Default: as the model was trained.')
_APPEND_EOS = flags.DEFINE_bool(
    'append_eos', None, 'Append EOS to each dialogue. Default: as the model was trained, else yes.')
_ROW_LENGTH = flags.DEFINE_integer(
    'row_length', 0, 'Tokens of a packed row; has no effect on scores. 0: the default.',
    lower_bound=0)
_AGGREGATE = flags.DEFINE_enum(
    'aggregate', None, ('tournament', 'bradley-terry'),
    'Of a pairwise model, what the score of a response is: tournament, the mean of its win '
    'probabilities, or bradley-terry, by maximum likelihood. Default: tournament.')
launch.define_model()
launch.define_raw()


def main() -> None:
    from qrm.serving import score
    from qrm.training import reward_model

    model = launch.load_model(_CHECKPOINT.value, raw=flags.FLAGS.raw)
    model = reward_model.read_otherwise(model, append_eos=_APPEND_EOS.value,
                                        read_before=_READ_BEFORE.value)
    if _ROW_LENGTH.value:
        model = dataclasses.replace(model, row_length=_ROW_LENGTH.value)
    print(score.score_file(model, _INPUT.value, _OUTPUT.value, _AGGREGATE.value or ''))


if __name__ == '__main__':
    launch.run(main, required=('checkpoint', 'input', 'output'))
