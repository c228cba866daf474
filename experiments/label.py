"""Asks judges which of two responses is better, in both orders, and writes rows to learn from.

    qrm label --judge=language-model:smollm2-135m --input=candidates.jsonl --output=labels.jsonl
"""

from absl import flags

from qrm.commands import launch

_JUDGES = flags.DEFINE_list(
    'judge', None, 'KIND:WHAT or NAME=KIND:WHAT, several with commas between: language-model:PATH, '
    'reward-model:PATH, function:MODULE:NAME, endpoint:MODEL@URL, gold:WORKLOAD.')
_INPUT = flags.DEFINE_string('input', None, 'File of rows with two responses or more.')
_OUTPUT = flags.DEFINE_string('output', None, 'File to write, .jsonl or .jsonl.gz.')
_CACHE = flags.DEFINE_string(
    'cache', '', 'File where answers are kept as they come. Default: OUTPUT.answers.')
_FORMAT = flags.DEFINE_string('format', 'auto', 'As data.format of a config.')
_COLUMNS = flags.DEFINE_list('columns', [], 'As data.columns: key=place,…')
_PAIRS = flags.DEFINE_enum('pairs', 'all', ('all', 'first'), 'All pairs of the responses of a row, '
                           'or its first two responses.')
_LABELS = flags.DEFINE_enum('labels', 'soft', ('soft', 'hard'), 'Write probabilities, or which '
                            'response is preferred.')
_LEAST = flags.DEFINE_float('min_confidence', 0.5, 'Leave out labels below it.', lower_bound=0.5,
                            upper_bound=1.0)
_TEMPLATE = flags.DEFINE_string(
    'template', '', 'Question, or a file of it, with {prompt}, {first} and {second}.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Of a language model.')
_ROWS = flags.DEFINE_integer('rows', 4, 'Rows of 1024 tokens that a language model computes at '
                             'once; has no effect on answers.', lower_bound=1)
_TOKEN = flags.DEFINE_string('token_variable', '', 'Environment variable with the token of an '
                             'endpoint; empty: none is sent.')
_PATTERN = flags.DEFINE_string('pattern', '', "Regular expression that finds A or B in an "
                               "endpoint's answer, in its one group. Default: the letter alone.")
_ANSWER_TOKENS = flags.DEFINE_integer('answer_tokens', 16, 'That an endpoint may write.',
                                      lower_bound=1)
_TIMEOUT = flags.DEFINE_float('timeout', 60.0, 'Seconds for one answer of an endpoint.',
                              lower_bound=0.001, upper_bound=3600.0)
_RETRIES = flags.DEFINE_integer('retries', 4, 'How often an endpoint is asked again that could not '
                                'answer.', lower_bound=0, upper_bound=100)
_AT_ONCE = flags.DEFINE_integer('at_once', 4, 'Questions that an endpoint is asked at once.',
                                lower_bound=1, upper_bound=256)
launch.define_model()


def main() -> None:
    from qrm.policy import judges, labels, questions
    from qrm.training import config as config_lib
    from qrm.training.schema import ConfigError

    config = config_lib.build({'data.path': _INPUT.value, 'data.format': _FORMAT.value,
                               'data.columns': tuple(_COLUMNS.value)})
    config_lib.check(config)
    values = flags.FLAGS
    options = questions.Options(
        questions.read_template(_TEMPLATE.value), _DTYPE.value, values.date, values.max_length,
        values.outputs, _ROWS.value, _PATTERN.value or questions.PATTERN, _ANSWER_TOKENS.value,
        _TOKEN.value, _TIMEOUT.value, _RETRIES.value, at_once=_AT_ONCE.value)
    try:
        specs = [judges.parse(text) for text in _JUDGES.value]
        questions.check_pattern(options.pattern)
    except ValueError as error:
        raise ConfigError(f'--judge, --pattern: {error}') from error
    print(labels.label_file(
        specs, options, config.data, _OUTPUT.value, labels.Output(_LABELS.value, _LEAST.value),
        pairs=_PAIRS.value, cache=_CACHE.value))


if __name__ == '__main__':
    launch.run(main, required=('judge', 'input', 'output'))
