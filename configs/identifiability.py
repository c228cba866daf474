"""What each objective identifies, in a world whose reward distributions are known.

    python -m experiments.identifiability --config=configs/identifiability.py \\
        --workdir=results/identifiability

Needs no download and takes 15 minutes on 2 CPU cores beside tests. Every cell is kept, so that a
run that was stopped goes on. Expect an accuracy of .665 to .668 of every row on independent labels
(the best possible is .668), a spread correlation of .99 from ratings, of .5 to .7 from
distributional Bradley-Terry on independent labels (of none with an implicit head), near 0 from
targets of +-1, and of less than .3 where one annotator judges both sides.

`configs/identifiability.py:full` lets every row grow from 10,000 to 160,000 pairs, which takes
about an hour; in the folder of a default run it adds what is missing.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'full'."""
    if arg not in ('', 'full'):
        raise ValueError(f"argument {arg!r}, expected '' or 'full'")
    config = ConfigDict()
    config.seed = 0  # of the world and all that is drawn
    config.seeds = 5  # models of a row, each with pairs, parameters and batches of its own
    config.pairs = 40_000  # that each model learns from in the main tables
    config.annotators = 10  # known ones, where annotators have names
    config.networks = 4  # of the ensemble
    config.test_pairs = 4000  # whose items and win probabilities models are compared on

    # --- training of all models: Adam, two hidden layers ---------------------------------------
    config.passes = 10.0  # over the pairs
    config.batch_size = 512  # pairs of a step
    config.learning_rate = 5e-3  # at the start; it falls to 0 along a cosine
    config.width = 64  # of a hidden layer

    # --- which cells, and intervals: may change in a folder that has results ------------------
    config.reproduce = ConfigDict()
    config.reproduce.sizes = (10_000, 40_000, 160_000)  # pairs, of the rows below
    # Rows that are trained on all sizes, 'table/row' as in `qrm.identifiability.kinds`.
    config.reproduce.growth = (
        'independent/label', 'independent/monotone', 'shared/gaussian', 'identified/anchor_after',
        'ratings/pinball',
    )
    if arg == 'full':
        config.reproduce.growth += (
            'independent/scalar', 'independent/margin', 'independent/teacher',
            'independent/per_quantile', 'independent/free', 'independent/implicit',
            'independent/gaussian', 'independent/categorical', 'independent/posterior',
            'independent/posterior_monotone', 'independent/ensemble', 'shared/scalar',
            'shared/label', 'shared/monotone', 'identified/monotone', 'identified/annotator',
            'identified/anchor_loss', 'ratings/implicit', 'ratings/huber', 'ratings/crps',
        )
    config.analysis = ConfigDict()
    config.analysis.level = 0.95  # of the intervals over seeds
    return config.lock()
