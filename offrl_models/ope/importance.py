"""Importance sampling estimators, each as a sum of ratios of means.

An estimate is sum_k mean_i(numerator[i, k]) / mean_i(denominator[i, k]). Unbiased estimators have a denominator of 1;
self-normalised ones have the weights there, so that a bootstrap re-forms every ratio in each of its samples.
Precup, Sutton & Singh (2000); Thomas (2015), Safe Reinforcement Learning, chapter 3.

Weights may be clipped or forgotten, which trades a bias for a smaller variance; `slope` chooses how far to go.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from offrl_models.ope.sequences import by_step, finite, weights_by_step
from offrl_models.schema import Episodes, InputError

Shares = Float64[np.ndarray, "samples episodes"] | Iterable[Float64[np.ndarray, "block episodes"]]


@dataclass(frozen=True)
class Terms:
    """What an estimator leaves of each episode. `denominator` is None where it is 1."""

    numerator: Float64[np.ndarray, "episodes terms"]
    denominator: Float64[np.ndarray, "episodes terms"] | None = None

    def estimate(self, share: Float64[np.ndarray, "episodes"] | None = None) -> float:
        """The estimate with each episode counted `share` times (shares sum to 1); without it, equally."""
        n = len(self.numerator)
        weight = np.full(n, 1.0 / n) if share is None else share
        return float(self.resampled(weight[None, :])[0])

    def influence(self) -> Float64[np.ndarray, "episodes"]:
        """How far each episode pulls the estimate: the influence function, whose mean is 0."""
        top = self.numerator.mean(0)
        if self.denominator is None:
            return (self.numerator - top).sum(1)
        bottom = self.denominator.mean(0)
        ratio = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)
        return ((self.numerator - ratio * self.denominator) / np.where(bottom > 0, bottom, 1.0)).sum(1)

    def resampled(self, share: Float64[np.ndarray, "samples episodes"]) -> Float64[np.ndarray, "samples"]:
        """One estimate per row of shares; NaN where every weight of some step is 0, since then there is no estimate."""
        top = share @ self.numerator
        if self.denominator is None:
            return top.sum(1)
        bottom = share @ self.denominator
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan).sum(1)


def resampled(candidates: Sequence[Terms], shares: Shares) -> Float64[np.ndarray, "candidates samples"]:
    """`Terms.resampled` of many candidates: one product of matrices reads the shares once for all of them.

    Weights that several estimators share in memory are resampled once.
    """
    parts = [part for t in candidates for part in (t.numerator, t.denominator) if part is not None]
    distinct = {(column.ctypes.data, column.strides): column for part in parts for column in part.T}
    columns, place = np.array(list(distinct.values())).T, {key: i for i, key in enumerate(distinct)}
    every = np.vstack([block @ columns for block in ([shares] if isinstance(shares, np.ndarray) else shares)])
    means = (every[:, [place[column.ctypes.data, column.strides] for column in part.T]] for part in parts)
    found = np.empty((len(candidates), len(every)))
    for row, terms in zip(found, candidates, strict=True):
        top = next(means)
        bottom = np.ones_like(top) if terms.denominator is None else next(means)
        row[:] = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan).sum(1)
    return found


def discounted_rewards(episodes: Episodes) -> Float64[np.ndarray, "episodes steps"]:
    """gamma^t r_t, zero past the end."""
    return by_step(episodes, finite("the reward", episodes.time_discount * episodes.reward), 0.0)


def trajectory_weights(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> Float64[np.ndarray, "episodes"]:
    """Product of all ratios of each episode."""
    return weights_by_step(episodes, ratio)[:, -1]


def clipped(weight: Float64[np.ndarray, "..."], at: float) -> Float64[np.ndarray, "..."]:
    """The weights, each at most `at`: truncated importance sampling of Ionides (2008), with a constant threshold.

    Of `ratio` it clips every step before the product is formed; the `clip` of an estimator clips the products themselves.
    Raises InputError when `at` is not positive.
    """
    if not at > 0:
        raise InputError(f"a clip of {at} leaves no weights to estimate with; give a positive one.")
    return np.minimum(weight, at)


def recent_weights(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"], memory: int | None
) -> Float64[np.ndarray, "episodes steps"]:
    """w_t without the ratios that lie `memory` or more steps back: the product over steps t - memory + 1 to t.

    None forgets nothing, and 0 everything. Past the end of an episode every ratio is 1, so that each step's weights have mean 1
    over the behavior policy whatever is forgotten.
    These are the weights of incremental importance sampling, Guo, Thomas & Brunskill (2017),
    https://arxiv.org/abs/1703.03453, which finds a memory for every step where this takes a stated one for all; and of
    partial-history importance weighting, Hu & Wager (2023), https://arxiv.org/abs/2110.12343.
    Raises InputError when `memory` is negative.
    """
    if memory is None:
        return weights_by_step(episodes, ratio)
    if memory < 0:
        raise InputError(f"a memory of {memory} steps is not possible; give 0 or more, or None for all of them.")
    table = by_step(episodes, ratio, 1.0)
    weight = np.ones_like(table)
    for back in range(min(memory, table.shape[1])):
        weight[:, back:] *= table[:, : table.shape[1] - back]
    return weight


def plain(weight: Float64[np.ndarray, "episodes terms"], gain: Float64[np.ndarray, "episodes terms"]) -> Terms:
    """Mean of the weighted gains, such as discounted rewards: no weight is normalised."""
    return Terms(np.einsum("et,et->e", weight, gain)[:, None])


def normalised(weight: Float64[np.ndarray, "episodes terms"], gain: Float64[np.ndarray, "episodes terms"]) -> Terms:
    """The weighted gains with the weights of each term normalised over all episodes."""
    return Terms(weight * gain, weight)


def tis(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], *, clip: float = math.inf) -> Terms:
    """Trajectory-wise importance sampling: mean of w_T G, each w_T at most `clip`."""
    return plain(clipped(trajectory_weights(episodes, ratio), clip)[:, None], episodes.return_[:, None])


def wis(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], *, clip: float = math.inf) -> Terms:
    """Weighted (self-normalised) trajectory-wise importance sampling: sum w_T G / sum w_T, each w_T at most `clip`."""
    return normalised(clipped(trajectory_weights(episodes, ratio), clip)[:, None], episodes.return_[:, None])


def pdis(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"], *, clip: float = math.inf, memory: int | None = None
) -> Terms:
    """Per-decision importance sampling: mean of sum_t w_t gamma^t r_t.

    Each w_t is at most `clip`, and a product over the last `memory` steps only.
    """
    return plain(clipped(recent_weights(episodes, ratio, memory), clip), discounted_rewards(episodes))


def wpdis(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"], *, clip: float = math.inf, memory: int | None = None
) -> Terms:
    """Weighted per-decision importance sampling: at each step the weights are normalised over all episodes.

    `clip` and `memory` act on the weights before they are normalised, as in `pdis`.
    """
    return normalised(clipped(recent_weights(episodes, ratio, memory), clip), discounted_rewards(episodes))


def slope(candidates: Sequence[Terms], *, width: float = 1.0) -> int:
    """Which of several estimates of one value to take: the last whose interval still meets all the intervals before it.

    The candidates run from the least biased (no clip, full memory, largest tau or lambda) to the least variable. The
    confidence radius is `width` standard errors, made monotone, and the intervals reach twice as far. The error of the
    choice is then within a constant factor of the least sum of bias and radius.
    Su, Srinath & Krishnamurthy (2020), https://arxiv.org/abs/2002.07729. One standard error is what the code they published
    uses; their guarantee asks for a radius that holds for all candidates at once, and for biases that grow.
    Raises InputError when there is no candidate, fewer than 2 episodes, or a candidate without an estimate.
    """
    if not candidates or len(candidates[0].numerator) < 2:
        raise InputError("a choice between estimators needs at least one candidate and two episodes.")
    center = finite("an estimate", np.array([terms.estimate() for terms in candidates]))
    error = np.array([terms.influence().std(ddof=1) / math.sqrt(len(terms.numerator)) for terms in candidates])
    reach = 2.0 * width * np.maximum.accumulate(error[::-1])[::-1]
    meet = np.maximum.accumulate(center - reach) <= np.minimum.accumulate(center + reach)
    return int(np.flatnonzero(meet)[-1])
