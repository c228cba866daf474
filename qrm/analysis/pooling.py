"""What the divergence of pooled rewards consists of: what is within pairs, what is between them.

Axes as in `divergences`: n pairs.
"""

from typing import NamedTuple

import numpy as np

from qrm.analysis import divergences
from qrm.rewards.statistics import is_constant, moments, normalised


class Split(NamedTuple):
    """What the Gaussian divergence of pooled rewards is made of.

    Attributes:
      within: nats; the divergence of rewards around the mean of their pair.
      share: of the variance of rewards within a side, what is within pairs; in [0, 1].
      unequal: nats; what the sides' unequal variances add.
    """

    within: float
    share: float
    unequal: float


def split(chosen: np.ndarray, rejected: np.ndarray, weights: np.ndarray | None,
          clusters: np.ndarray) -> Split:
    """Splits the Gaussian estimate: gaussian = within * share + unequal.

    With m = (chosen + rejected) / 2 of a pair, which preferences say nothing of, and half its
    margin d = (chosen - rejected) / 2, the sides are m + d and m - d. Around m they are d and -d:
    within = (2 E d)^2 / (2 Var d). If m and d do not covary, both sides have the variance
    Var d + Var m, and share = Var d / (Var d + Var m) is what pooling prompts leaves of it.

    Args:
      chosen, rejected, weights, clusters: as of `gaussian`.

    Raises:
      ValueError: as `gaussian`.
    """
    total = divergences.gaussian(chosen, rejected, weights, clusters)  # checks them, too
    shares = normalised(weights, len(chosen))
    present = np.concatenate([chosen[shares > 0.0], rejected[shares > 0.0]])
    if is_constant(present):
        return Split(0.0, 1.0, 0.0)
    margin, within = moments((chosen - rejected) / 2.0, shares)
    _, between = moments((chosen + rejected) / 2.0, shares)
    within = max(within, divergences.WIDTH_FLOOR * float(np.ptp(present)))
    inside, share = 2.0 * (margin / within) ** 2, within**2 / (within**2 + between**2)
    return Split(inside, share, total - inside * share)


class Parts(NamedTuple):
    """Why one model's Gaussian divergence is larger than another's, in nats.

    Attributes:
      total: the difference.
      within: what less variance within pairs, relative to the squared mean margin, contributes.
      between: what less variance between pairs does, relative to the same.
      unequal: what unequal variances of the sides do.
    """

    total: float
    within: float
    between: float
    unequal: float


def attribute(a: Split, b: Split) -> Parts:
    """Splits a - b into parts that sum to it.

    Of within * share = 2 (E d)^2 / (Var d + Var m) the inverse is a sum, v + w with v = Var d / 2
    (E d)^2 and w = Var m / 2 (E d)^2, so that the difference of two of them, 1 / (v + w) - 1 / (v'
    + w'), is exactly their product times (v' - v) + (w' - w).
    """
    first, second = a.within * a.share, b.within * b.share
    within = first * b.share - second * a.share
    between = first * (1.0 - b.share) - second * (1.0 - a.share)
    unequal = a.unequal - b.unequal
    return Parts(within + between + unequal, within, between, unequal)
