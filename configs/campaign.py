"""Kills, damage, full disks, wrong rows, configs and folders: how many trials of each.

    qrm campaign --config=campaign --workdir=results/campaign

Needs no download, but the extra `campaign` (Hypothesis), and takes less than 20 minutes on 2 CPU
cores. Where PyTorch is installed, changed folders that load are compared with transformers.
`--config=campaign:full` takes the numbers of docs/reliability.md, which takes hours; in the folder
of a default run it goes on from there.
"""

from ml_collections import ConfigDict

from qrm.studies.campaign import KEYS, MEASURES
from qrm.training import schema


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'full'."""
    if arg not in ('', 'full'):
        raise ValueError(f"argument {arg!r}, expected '' or 'full'")
    return schema.build(KEYS, {'trials': {
        name: measure.trials[bool(arg)] for name, measure in MEASURES.items()}})
