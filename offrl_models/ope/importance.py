"""Importance sampling estimators, each as a sum of ratios of means.

An estimate is sum_k mean_i(numerator[i, k]) / mean_i(denominator[i, k]). Unbiased estimators have a denominator of 1;
self-normalised ones have the weights there, so that a bootstrap re-forms every ratio in each of its samples.
Precup, Sutton & Singh (2000); Thomas (2015), Safe Reinforcement Learning, chapter 3.

Weights may be clipped or forgotten, which trades a bias for a smaller variance; `slope` chooses how far to go.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float64, Real

from offrl_models.ope.resampling import Columns
from offrl_models.ope.sequences import by_step, finite, sum_of_products, weights_by_step
from offrl_models.schema import Episodes, InputError

# How often each episode is in each sample, or that over a constant; all samples at once, or a few at a time.
Samples = Real[np.ndarray, "samples episodes"] | Iterable[Real[np.ndarray, "_ episodes"]]

AGAIN = 32  # samples that are computed again in double precision at once
FAINT = 1e-30  # of the largest weight: a mean weight below it has lost digits, or all of them, in single precision
_Key = tuple[int, tuple[int, ...]]  # of a column: where it lies in memory, and its strides


@dataclass(frozen=True)
class Terms:
    """What an estimator leaves of each episode. `denominator` is None where it is 1.

    `top` is the numerator, or where `weighted` what the denominator is multiplied with to give it. Factors that many estimates
    share, such as rewards, are then kept once, and the product is formed a few episodes at a time.
    """

    top: Float64[np.ndarray, "episodes terms"]
    denominator: Float64[np.ndarray, "episodes terms"] | None = None
    weighted: bool = False

    @property
    def episodes(self) -> int:
        return len(self.top)

    @property
    def numerator(self) -> Float64[np.ndarray, "episodes terms"]:
        return self.top * self.denominator if self.weighted and self.denominator is not None else self.top

    def estimate(self, share: Float64[np.ndarray, "episodes"] | None = None) -> float:
        """The estimate with each episode counted `share` times (shares sum to 1); without it, equally."""
        return float(self.ratios.sum() if share is None else self.resampled(share[None, :])[0])

    @cached_property
    def ratios(self) -> Float64[np.ndarray, "terms"]:
        """The terms of the estimate; NaN where every weight is 0."""
        # By einsum, which is faster than a mean over a long axis.
        if self.denominator is None:
            return np.einsum("et->t", self.top) / self.episodes
        bottom = np.einsum("et->t", self.denominator)
        top = np.einsum("et,et->t", self.denominator, self.top) if self.weighted else np.einsum("et->t", self.top)
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)

    def deviation(
        self, rows: slice = slice(None), out: Float64[np.ndarray, "rows terms"] | None = None
    ) -> Float64[np.ndarray, "rows terms"]:
        """How far the numerator of each episode is from the ratio that the whole log has, times its denominator."""
        top = self.top[rows]
        if self.denominator is None:
            return np.subtract(top, self.ratios, out=out)
        denominator = self.denominator[rows]
        if self.weighted:
            beyond = np.subtract(top, self.ratios, out=out)
            return np.multiply(denominator, beyond, out=beyond)
        foreseen = np.multiply(denominator, self.ratios, out=out)
        return np.subtract(top, foreseen, out=foreseen)

    def influence(self) -> Float64[np.ndarray, "episodes"]:
        """How far each episode pulls the estimate: the influence function, whose mean is 0."""
        if self.denominator is None:
            return self.deviation().sum(1)
        bottom = self.denominator.mean(0)
        return (self.deviation() / np.where(bottom > 0, bottom, 1.0)).sum(1)

    def resampled(self, share: Float64[np.ndarray, "samples episodes"]) -> Float64[np.ndarray, "samples"]:
        """One estimate per row of shares; NaN where every weight of some step is 0, since then there is no estimate."""
        top = share @ self.numerator
        if self.denominator is None:
            return top.sum(1)
        bottom = share @ self.denominator
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan).sum(1)


def resampled(candidates: Sequence[Terms], samples: Samples) -> Float64[np.ndarray, "candidates samples"]:
    """`Terms.resampled` of many candidates, over the total of each sample: each block of samples is read once for all of them.

    Products are in single precision, which is twice as fast. What is multiplied is how far each episode deviates from the
    estimate, so that rounding stays below 1e-4 standard errors, and what does not vary is exact. A sample in which weights
    nearly vanish, beside those it leaves out, is computed again in double precision. Denominators that several estimators
    share in memory are resampled once.
    """
    columns, place = Columns(candidates[0].episodes), dict[_Key, int]()
    total = columns.put(1, lambda _rows, out: out.fill(1.0))
    tops, bottoms = [], []
    for terms in candidates:
        if terms.denominator is None:
            tops.append(columns.put(1, partial(_summed_deviation, terms)))
            bottoms.append(total)
            continue
        tops.append(columns.put(terms.top.shape[1], terms.deviation))
        keys = [(column.ctypes.data, column.strides) for column in terms.denominator.T]
        new = [term for term, key in enumerate(keys) if key not in place]
        places = columns.put(len(new), partial(_copy, terms.denominator, new))
        place |= zip((keys[term] for term in new), places, strict=True)
        bottoms.append([place[key] for key in keys])
    weights = list(place.values())
    found = []
    for block in [samples] if isinstance(samples, np.ndarray) else samples:
        sums, largest = columns.sums(block)
        faint = (sums[:, weights] < FAINT * largest[weights] * sums[:, total]).any(1)
        values = np.empty((len(candidates), len(block)))
        for row, terms, top, bottom in zip(values, candidates, tops, bottoms, strict=True):
            under = np.where(sums[:, bottom] > 0, sums[:, bottom], np.nan)
            row[:] = terms.ratios.sum() + (sums[:, top] / under).sum(1)
        again = np.flatnonzero(faint)
        for start in range(0, len(again), AGAIN):
            chosen = again[start : start + AGAIN]
            share = block[chosen] / block[chosen].sum(1, keepdims=True, dtype=np.float64)
            values[:, chosen] = [terms.resampled(share) for terms in candidates]
        found.append(values)
    return np.hstack(found)


def _summed_deviation(terms: Terms, rows: slice, out: Float64[np.ndarray, "rows 1"]) -> None:
    terms.deviation(rows).sum(1, keepdims=True, out=out)


def _copy(
    columns: Float64[np.ndarray, "episodes terms"],
    chosen: Sequence[int],
    rows: slice,
    out: Float64[np.ndarray, "rows chosen"],
) -> None:
    out[:] = columns[rows] if len(chosen) == columns.shape[1] else columns[rows, chosen]


def discounted_rewards(episodes: Episodes) -> Float64[np.ndarray, "episodes steps"]:
    """gamma^t r_t, zero past the end."""
    return by_step(episodes, finite("the reward", episodes.discounted_reward), 0.0)


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
    table = by_step(episodes, finite("the ratio", ratio), 1.0)
    weight = np.ones_like(table)
    for back in range(min(memory, table.shape[1])):
        weight[:, back:] *= table[:, : table.shape[1] - back]
    return weight


def plain(weight: Float64[np.ndarray, "episodes terms"], gain: Float64[np.ndarray, "episodes terms"]) -> Terms:
    """Mean of the weighted gains, such as discounted rewards: no weight is normalised."""
    return Terms(sum_of_products(weight, gain)[:, None])


def normalised(weight: Float64[np.ndarray, "episodes terms"], gain: Float64[np.ndarray, "episodes terms"]) -> Terms:
    """The weighted gains with the weights of each term normalised over all episodes."""
    return Terms(gain, weight, weighted=True)


def tis(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], *, clip: float = math.inf) -> Terms:
    """Trajectory-wise importance sampling: mean of w_T G, each w_T at most `clip`."""
    return plain(
        clipped(trajectory_weights(episodes, ratio), clip)[:, None], finite("the return", episodes.return_)[:, None]
    )


def wis(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], *, clip: float = math.inf) -> Terms:
    """Weighted (self-normalised) trajectory-wise importance sampling: sum w_T G / sum w_T, each w_T at most `clip`."""
    return normalised(
        clipped(trajectory_weights(episodes, ratio), clip)[:, None], finite("the return", episodes.return_)[:, None]
    )


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
    if not candidates or candidates[0].episodes < 2:
        raise InputError("a choice between estimators needs at least one candidate and two episodes.")
    center = finite("an estimate", np.array([terms.estimate() for terms in candidates]))
    error = np.array([terms.influence().std(ddof=1) / math.sqrt(terms.episodes) for terms in candidates])
    reach = 2.0 * width * np.maximum.accumulate(error[::-1])[::-1]
    meet = np.maximum.accumulate(center - reach) <= np.minimum.accumulate(center + reach)
    return int(np.flatnonzero(meet)[-1])
