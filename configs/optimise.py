"""Policies optimised against reward models where the truth is known.

    qrm optimise --config=optimise --workdir=results/optimise

Every key has its default, `qrm.studies.overoptimisation.KEYS`; what would count as an answer stands
there, too, `yes.*`. Needs no download.
"""

from ml_collections import ConfigDict

from qrm.studies.overoptimisation import KEYS
from qrm.training import schema


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is ''."""
    if arg:
        raise ValueError(f"argument {arg!r}, expected ''")
    return schema.build(KEYS, {})
