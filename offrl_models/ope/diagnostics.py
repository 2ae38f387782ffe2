"""How much an off-policy estimate can be believed: effective sample sizes and the mean-ratio test."""

import math

import numpy as np
from jaxtyping import Float64

from offrl_models.logs.tally import zero_mean_z
from offrl_models.ope.importance import Terms
from offrl_models.schema import Episodes


def effective_sample_size(weight: Float64[np.ndarray, "n"]) -> float:
    """(sum w)^2 / sum w^2: how many equal weights would carry as much. Kong (1992). 0 when all weights are 0."""
    total = float(np.square(weight).sum())
    return float(weight.sum()) ** 2 / total if total > 0 else 0.0


def mean_ratio_z(ratio: Float64[np.ndarray, "rows"]) -> float:
    """z-score of the mean ratio against 1, its expectation when the logged propensities are right.

    The errors are martingale differences, so their variances add over rows.
    """
    return zero_mean_z(ratio - 1.0)


def without_most_influential(minuend: Terms, subtrahend: Terms, share: float = 0.005) -> float:
    """The difference of two estimates without the episodes that pull it most in its own direction.

    `share` of the episodes are left out, at least one. Broderick, Giordano & Meager (2020), https://arxiv.org/abs/2011.14999.
    """
    n = len(minuend.numerator)
    dropped = max(math.ceil(share * n), 1)
    if dropped >= n:
        return math.nan
    sign = 1.0 if minuend.estimate() >= subtrahend.estimate() else -1.0
    kept = np.argsort(sign * (minuend.influence() - subtrahend.influence()), kind="stable")[: n - dropped]
    weight = np.zeros(n)
    weight[kept] = 1.0 / len(kept)
    return minuend.estimate(weight) - subtrahend.estimate(weight)


def worst_action_z(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"], probs: Float64[np.ndarray, "rows actions"]
) -> float:
    """The mean-ratio test of each single action: 1(a_t = a) ratio - pi(a|s_t) has mean 0. The z-score furthest from 0."""
    scores = [zero_mean_z((episodes.action == a) * ratio - probs[:, a]) for a in range(episodes.n_actions)]
    return max(scores, key=abs)
