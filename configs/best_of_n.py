"""Best of n against a gold reward that is known: selection rules and their controls.

    python -m experiments.best_of_n --config=configs/best_of_n.py --workdir=results/best_of_n

Needs no download and takes about 4 minutes on 2 CPU cores. Expect the gold reward of the choices of
every proxy's mean to be highest near n = 16 or 64 and to fall by 1.6 to 2.4 from there to
n = 4096; that of the lower quantile of ratings to fall by 1.5, and its tail utility at n = 64 to be
.7 above that of their mean. The ensemble's mean - std keeps the most at n = 4096, a gold reward of
1.1.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """The config; there is no other `arg` than ''."""
    if arg:
        raise ValueError(f'argument {arg!r}, expected none')
    config = ConfigDict()

    config.seed = 0  # of the first repetition; the others have the next ones
    config.repetitions = 8  # of everything: labels, parameters and candidates

    # --- what is true --------------------------------------------------------------------------
    config.world = world = ConfigDict()
    world.fall = 1.0  # loss of reward for each unit of |x|^2 / 8 beyond `start`
    world.start = 2.0  # |x|^2 / 8 has mean 1 where labels are given, and is above 2 in 4% of them
    world.share = 0.1  # of the candidates that are drawn from a wider distribution than the labels'
    world.width = 2.0  # of it, in standard deviations of the labels'

    # --- proxies -------------------------------------------------------------------------------
    config.labels = labels = ConfigDict()
    labels.pairs = 10_000  # comparisons to learn from; the more, the later over-optimisation
    config.proxies = proxies = ConfigDict()
    proxies.quantiles = 10  # N of every proxy with quantiles
    proxies.networks = 5  # of the ensemble
    proxies.huber_weight = 0.1  # lambda of the proxies with targets of +1 and -1
    proxies.kappa = 1.0  # threshold of their Huber loss
    config.training = training = ConfigDict()
    training.steps = 1500  # of Adam, the rate falling to 0 along a cosine
    training.batch_size = 256  # comparisons a step
    training.learning_rate = 3e-3  # at the start
    training.width = 64  # of both hidden layers

    # --- choosing ------------------------------------------------------------------------------
    config.choice = choice = ConfigDict()
    # 'mean', 'quantile:tau', 'cvar:alpha' or 'mean-std:k'.
    choice.rules = ('mean', 'quantile:0.05', 'cvar:0.2', 'mean-std:1')
    choice.prompts = 32  # sets of candidates in each repetition
    choice.candidates = 4096  # in each set, and the largest n; n goes up in powers of 4
    choice.moderate = 64  # the n, one of these, at which gains are judged beside the largest

    config.analysis = ConfigDict()
    config.analysis.level = 0.95  # of the intervals over repetitions

    return config.lock()
