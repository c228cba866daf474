"""Prints what two models of each kind learn in the world, as JSON: metric -> mean over the two.

    python -m tests.programs.on_worlds table/kind …
"""

import json
import sys

import numpy as np

from qrm.studies import identifiability, worlds
from qrm.studies.identifiability import Cell
from tests.helpers import load_config


def main() -> None:
    # Two seeds in place of five; otherwise the settings of the experiment.
    config = load_config('identifiability', seeds=2, test_pairs=1000)
    world, found = worlds.make(config.seed), {}
    for name in sys.argv[1:]:
        metrics = identifiability.measure(
            config, world, Cell(*name.split('/'), config.pairs))['metrics']
        found[name] = {key: None if None in values else float(np.mean(values))
                       for key, values in metrics.items()}
    print(json.dumps(found))


if __name__ == '__main__':
    main()
