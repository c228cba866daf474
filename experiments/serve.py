"""Serves a reward model over HTTP.

    qrm serve --checkpoint=results/run --port=8000

It is asked as OpenRLHF, slime, verl, vLLM, SGLang and Text Embeddings Inference ask, and in its own
way; docs/serving.md has the paths. Shapes up to --max_length are compiled before anything is
served. SIGTERM and SIGINT end it when all that was asked is answered.
"""

from absl import flags

from qrm.commands import launch

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'Folder of a run, or folder or hub name of a Hugging Face checkpoint.')
_RULE = flags.DEFINE_string(
    'rule', 'mean', 'What of the predicted distribution is the reward: mean, quantile:tau, '
    'cvar:alpha, mean-std:k (of a normalised run), disagreement:k (of an ensemble) or '
    'sample:seed.')
_HOST = flags.DEFINE_string(
    'host', '127.0.0.1', 'Address to listen on; any other than of this machine alone demands a '
    'token.')
_PORT = flags.DEFINE_integer('port', 8000, 'Port to listen on; 0: any that is free.',
                             lower_bound=0, upper_bound=65535)
_TOKEN_FILE = flags.DEFINE_string(
    'token_file', '', 'File with the token that clients must send. Default: what '
    'QRM_SERVE_TOKEN holds, else none.')
_BATCH_TOKENS = flags.DEFINE_integer(
    'batch_tokens', 1024, 'Tokens of a full micro-batch.', lower_bound=64, upper_bound=2**20)
_MAX_WAITING = flags.DEFINE_integer(
    'max_waiting_tokens', 2**20, 'Tokens that may wait; what comes above that gets 429.',
    lower_bound=1)
_MAX_TEXTS = flags.DEFINE_integer('max_texts', 1024, 'Texts of a request.', lower_bound=1)
_MAX_BODY = flags.DEFINE_integer('max_body_bytes', 8 * 2**20, 'Of a request.', lower_bound=1)
_TIMEOUT = flags.DEFINE_float('timeout', 120.0, 'Seconds that a request may take.',
                              lower_bound=0.1)
launch.define_model()
launch.define_raw()


def main() -> None:
    from qrm.data.comparisons import DataError
    from qrm.rewards import selection
    try:
        from qrm.serving import server
    except ImportError as error:
        raise DataError(f"{error}; expected pip install 'qrm-jax[serve]'") from error

    try:
        rule = selection.parse_rule(_RULE.value)
    except ValueError as error:
        raise DataError(f'--rule: {error}') from error
    token = server.read_token(_TOKEN_FILE.value)
    if not token and not server.is_own(_HOST.value):
        raise DataError(f'--host={_HOST.value} without a token, expected --token_file or '
                        f'{server.TOKEN_VARIABLE}, or an address of this machine alone')
    bound = server.listen(_HOST.value, _PORT.value)
    model = launch.load_model(_CHECKPOINT.value, raw=flags.FLAGS.raw)
    try:
        selection.check_alone(rule, model.network.head.members, model.scale)
    except ValueError as error:
        raise DataError(f'--rule: {error}') from error
    service = server.Service(
        model, rule, _CHECKPOINT.value, batch_tokens=_BATCH_TOKENS.value, token=token,
        limits=server.Limits(body_bytes=_MAX_BODY.value, texts=_MAX_TEXTS.value,
                             waiting_tokens=_MAX_WAITING.value, seconds=_TIMEOUT.value))
    shapes = len(service.scorer.layouts)
    print(f'compiling {shapes} shapes of up to {model.reading.max_length} tokens', flush=True)
    print(f'compiled in {service.scorer.warm_up():.1f} s', flush=True)
    server.serve(service, bound)


if __name__ == '__main__':
    launch.run(main, required=('checkpoint',))
