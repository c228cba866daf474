"""Answers prompts with a language model, N times each; `qrm score` reads what it writes.

    qrm sample --model=smollm2-135m --input=prompts.jsonl --output=candidates.jsonl --samples=16
"""

from absl import flags

from qrm.commands import launch

_MODEL = flags.DEFINE_string(
    'model', None, 'Folder or hub name of a decoder of transformers, or folder of a run that '
    'trained one.')
_INPUT = flags.DEFINE_string(
    'input', None, 'File of rows with a prompt: .jsonl, .json, either with .gz, or .parquet.')
_OUTPUT = flags.DEFINE_string(
    'output', None, 'File to write, a row for each row read; with gzip if it ends in .gz.')
_SAMPLES = flags.DEFINE_integer('samples', 1, 'Responses to each prompt.', lower_bound=1)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens', 256, 'Tokens of the longest response.', lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 1.0, 'Logits are divided by it; 0: the most probable token.', lower_bound=0.0)
_TOP_K = flags.DEFINE_integer(
    'top_k', 0, 'Only so many of the most probable tokens are drawn; 0: all.', lower_bound=0)
_TOP_P = flags.DEFINE_float(
    'top_p', 1.0, 'Of these only the fewest that have this probability together; 1: all.',
    lower_bound=0.0, upper_bound=1.0)
_SEED = flags.DEFINE_integer('seed', 0, 'Of all that is drawn.', lower_bound=0,
                             upper_bound=2**31 - 1)
_ROWS = flags.DEFINE_integer(
    'rows', 16, 'Responses computed at once; has no effect on what they are.', lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
    'max_length', 0, 'Tokens of prompt and response, longer prompts are cut from the left. 0: the '
    "model's number of positions.", lower_bound=0)
_AS_CHATS = flags.DEFINE_bool(
    'as_chats', False, 'Read and write texts as chats, for the chat template of the model.')
_DETAILS = flags.DEFINE_bool(
    'details', False, 'Write of each response how many tokens it has, whether it is truncated, and '
    'the sums of its log_probs and sampled_log_probs, which `qrm score` does not use.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Of what is computed.')
_DATE = flags.DEFINE_string(
    'date', '', 'The day (YYYY-MM-DD) that its chat template prints, if it prints any. Default: '
    'today.')


def main() -> None:
    from qrm.policy import candidates, language_model
    from qrm.policy.sampling import Sampling
    from qrm.training.schema import ConfigError

    try:
        sampling = Sampling(_SAMPLES.value, _MAX_NEW_TOKENS.value, _TEMPERATURE.value,
                            _TOP_K.value, _TOP_P.value)
    except ValueError as error:
        raise ConfigError(f'--{error}') from error
    model = language_model.load(_MODEL.value, dtype=_DTYPE.value, date=_DATE.value)
    print(candidates.sample_file(
        model, _INPUT.value, _OUTPUT.value, sampling, seed=_SEED.value, rows=_ROWS.value,
        max_length=_MAX_LENGTH.value, as_chats=_AS_CHATS.value, details=_DETAILS.value))


if __name__ == '__main__':
    launch.run(main, required=('model', 'input', 'output'))
