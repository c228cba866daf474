"""Do the spreads of trained reward models know where people, or other models, disagree?

    qrm disagreement --config=disagreement --workdir=results/disagreement \\
      --config.runs=results/heads --config.pandalm=FILE --config.paper=DIR \\
      --config.prometheus=FILE

The models are those of a folder of `qrm compare`, as of `--config=compare:frozen`; members of an
ensemble on frozen features agree unless they began with `model.initial_std=1`. The panels are
public files: PandaLM's testset-v1.json (999 pairs, three people), the paper's validation pairs
(144, the scores of ten reward models), Prometheus' vicuna_eval.json (320 responses, three ratings).
What would count as an answer stands in the config, `yes.*`. With SmolLM2-135M about half an hour on
2 CPU cores, most of it hidden states, which are kept.
"""

from ml_collections import ConfigDict

from qrm.studies.disagreement import KEYS
from qrm.training import schema


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is ''."""
    if arg:
        raise ValueError(f"argument {arg!r}, expected ''")
    return schema.build(KEYS, {})
