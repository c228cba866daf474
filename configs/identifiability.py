"""What each objective identifies, in a world whose reward distributions are known.

    qrm identifiability --config=identifiability --workdir=results/identifiability

Needs no download and takes 15 minutes on 2 CPU cores beside tests. Every cell is kept, so that a
run that was stopped goes on. Expect an accuracy of .665 to .668 of every row on independent labels
(the best possible is .668), a spread correlation of .99 from ratings, of .5 to .7 from
distributional Bradley-Terry on independent labels (of none with an implicit head), near 0 from
targets of +-1, and of less than .3 where one annotator judges both sides.

`--config=identifiability:full` lets every row grow from 10,000 to 160,000 pairs, which takes
about an hour; in the folder of a default run it adds what is missing.
"""

from ml_collections import ConfigDict

from qrm.studies.identifiability import KEYS
from qrm.training import schema

_MORE_GROWTH = (
    'independent/scalar', 'independent/margin', 'independent/teacher',
    'independent/per_quantile', 'independent/free', 'independent/implicit',
    'independent/gaussian', 'independent/categorical', 'independent/posterior',
    'independent/posterior_monotone', 'independent/ensemble', 'independent/thurstone',
    'independent/thurstone_anchored', 'independent/gaussian_anchored', 'independent/gaussian_few',
    'shared/scalar', 'shared/label', 'shared/monotone', 'shared/thurstone_anchored',
    'shared/gaussian_anchored', 'identified/monotone', 'identified/annotator',
    'identified/anchor_loss', 'ratings/implicit', 'ratings/huber', 'ratings/crps',
    'ratings/ordinal',
)


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'full'."""
    if arg not in ('', 'full'):
        raise ValueError(f"argument {arg!r}, expected '' or 'full'")
    growth = KEYS['reproduce.growth'].default + (_MORE_GROWTH if arg else ())
    return schema.build(KEYS, {'reproduce.growth': growth})
