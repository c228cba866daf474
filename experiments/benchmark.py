"""How often a reward model is right, on published benchmarks or pairs of any format.

    qrm benchmark --suite=reward-bench-2 --model=results/run --path=reward-bench-2.parquet
    qrm benchmark --suite=judge-bench --model=some/reward-model
    qrm benchmark --suite=pairs --model=results/run --path=pairs.jsonl --format=shp
"""

from absl import flags

from qrm.commands import launch

_SUITE = flags.DEFINE_string(
    'suite', None, 'reward-bench, prior-sets, reward-bench-2, rm-bench, judge-bench, '
    'ppe-preference, ppe-correctness, or pairs (of any data).')
_MODEL = flags.DEFINE_string(
    'model', None, 'Folder of a run, or folder or hub name of a Hugging Face checkpoint.')
_PATH = flags.DEFINE_string(
    'path', '', 'File of rows, or a folder of such. Default: the hub; of pairs as data.path.')
_PRIOR = flags.DEFINE_string(
    'prior', '', 'Of reward-bench, file or folder of the prior sets. Default: left out.')
_FORMAT = flags.DEFINE_string('format', 'auto', 'Of pairs, as data.format of a config.')
_WORKLOAD = flags.DEFINE_string('workload', 'helpful', 'Of pairs, as workload of a config.')
_RULES = flags.DEFINE_list(
    'rules', ['mean', 'quantile:0.1', 'cvar:0.2'], 'By which distributions become scores: mean, '
    'quantile:tau, cvar:alpha, disagreement:k of an ensemble, sample:seed.')
_CHATS = flags.DEFINE_bool(
    'chats', None, 'Read texts as chats, by the chat template. Default: as the model was trained; '
    'one that was not trained here, if it has a template.')
_OUTPUT = flags.DEFINE_string(
    'output', '', 'Folder for benchmark.json, benchmark.md and scores.jsonl. Default: none.')
launch.define_model()


def main() -> None:
    from qrm.analysis import benchmarks
    from qrm.rewards import selection
    from qrm.training import config as config_lib
    from qrm.training import saved, workdir
    from qrm.training.schema import ConfigError

    if _SUITE.value not in benchmarks.PROTOCOLS:
        raise ConfigError(f'--suite={_SUITE.value}, expected one of '
                          f'{", ".join(benchmarks.PROTOCOLS)}')
    try:
        rules = [selection.parse_rule(text) for text in _RULES.value]
    except ValueError as error:
        raise ConfigError(f'--rules: {error}') from error
    config = config_lib.build({'data.path': _PATH.value or 'demo', 'data.format': _FORMAT.value})
    config_lib.check(config)
    model = launch.load_model(_MODEL.value, raw=True)
    seen = workdir.read_seen(_MODEL.value) if saved.is_run(_MODEL.value) else None
    print(benchmarks.benchmark(
        model, _SUITE.value, _PATH.value, rules=rules, prior=_PRIOR.value, data=config.data,
        workload=_WORKLOAD.value, as_chats=_CHATS.value, seen=seen, output=_OUTPUT.value))


if __name__ == '__main__':
    launch.run(main, required=('suite', 'model'))
