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
from jaxtyping import Float, Float64

from offrl_models.ope.sequences import by_step, finite, sum_of_products, weights_by_step
from offrl_models.schema import Episodes, InputError

# How often each episode is in each sample, or that over a constant; all samples at once, or a few at a time.
Samples = Float[np.ndarray, "samples episodes"] | Iterable[Float[np.ndarray, "_ episodes"]]

WIDE = 512  # numbers in a row of a reduction over rows
STRETCH = 512  # rows that are added up in single precision
FAINT = 1e-30  # of the largest weight: a mean weight below it has lost digits, or all of them, in single precision
_Key = tuple[int, tuple[int, ...]]  # of a column: where it lies in memory, and its strides


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

    def ratios(self) -> Float64[np.ndarray, "terms"]:
        """The terms of the estimate; NaN where every weight is 0."""
        each = np.full(len(self.numerator), 1.0 / len(self.numerator))
        top = each @ self.numerator  # which is faster than a mean over a long axis
        if self.denominator is None:
            return top
        bottom = each @ self.denominator
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)

    def deviation(self) -> Float64[np.ndarray, "episodes terms"]:
        """How far the numerator of each episode is from the ratio that the whole log has, times its denominator."""
        if self.denominator is None:
            return self.numerator - self.ratios()
        foreseen = self.denominator * self.ratios()
        return np.subtract(self.numerator, foreseen, out=foreseen)

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


class _Columns:
    """Columns in single precision, each divided by its largest number."""

    def __init__(self, rows: int, width: int):
        self.values, self.scale, self.used = np.empty((rows, width), np.float32), np.ones(width), 0

    def put(self, columns: Float64[np.ndarray, "rows put"]) -> list[int]:
        """The places that the columns now have."""
        places = slice(self.used, self.used + columns.shape[1])
        largest = _largest(columns)
        self.scale[places] = np.where(largest == 0, 1.0, largest)
        np.divide(columns, self.scale[places], out=self.values[:, places], casting="same_kind")
        self.used = places.stop
        return list(range(places.start, places.stop))

    def sums(self, block: Float[np.ndarray, "samples rows"]) -> Float64[np.ndarray, "samples width"]:
        """The sum of every column in every sample, over its scale.

        Stretches of rows are added up in double precision: over millions of rows a sum in single precision drifts off.
        """
        counts, found = block.astype(np.float32, copy=False), np.zeros((len(block), len(self.scale)))
        for start in range(0, len(self.values), STRETCH):
            found += counts[:, start : start + STRETCH] @ self.values[start : start + STRETCH]
        return found


def resampled(candidates: Sequence[Terms], samples: Samples) -> Float64[np.ndarray, "candidates samples"]:
    """`Terms.resampled` of many candidates, over the total of each sample: each block of samples is read once for all of them.

    Products are in single precision, which is twice as fast. What is multiplied is how far each episode deviates from the
    estimate, so that rounding stays below 1e-4 standard errors, and what does not vary is exact. A sample in which weights
    nearly vanish, beside those it leaves out, is computed again in double precision. Denominators that several estimators
    share in memory are resampled once.
    """
    keys = [_keys(terms.denominator) for terms in candidates]
    width = 1 + sum(len(key) or 1 for key in keys) + len({each for key in keys for each in key})
    columns = _Columns(len(candidates[0].numerator), width)
    total, tops, place = columns.put(np.ones((len(columns.values), 1))), [], dict[_Key, int]()
    for terms, key in zip(candidates, keys, strict=True):
        deviation = terms.deviation()
        tops.append(columns.put(deviation if key else deviation.sum(1, keepdims=True)))
        new = [term for term, each in enumerate(key) if each not in place]
        if terms.denominator is not None and new:
            place |= zip((key[term] for term in new), columns.put(terms.denominator[:, new]), strict=True)
    bottoms = [[place[each] for each in key] or total for key in keys]
    estimates = [terms.ratios().sum() for terms in candidates]
    found = []
    for block in [samples] if isinstance(samples, np.ndarray) else samples:
        sums = columns.sums(block)
        faint = (sums[:, list(place.values())] < FAINT * sums[:, total]).any(1)
        means = sums * columns.scale
        values = np.empty((len(candidates), len(block)))
        for row, estimate, top, bottom in zip(values, estimates, tops, bottoms, strict=True):
            under = np.where(means[:, bottom] > 0, means[:, bottom], np.nan)
            row[:] = estimate + (means[:, top] / under).sum(1)
        if faint.any():
            again = block[faint] / block[faint].sum(1, keepdims=True, dtype=np.float64)
            values[:, faint] = [terms.resampled(again) for terms in candidates]
        found.append(values)
    return np.hstack(found)


def _largest(columns: Float64[np.ndarray, "rows terms"]) -> Float64[np.ndarray, "terms"]:
    """The largest absolute number of each column. Many rows side by side are gone through faster than narrow ones."""
    rows, terms = columns.shape
    beside = max(WIDE // terms, 1)
    whole = rows - rows % beside
    parts = [columns[whole:], columns[:whole].reshape(-1, beside * terms)]
    found = [np.maximum(part.max(0, initial=0.0), -part.min(0, initial=0.0)).reshape(-1, terms) for part in parts]
    return np.vstack(found).max(0)


def _keys(columns: Float64[np.ndarray, "rows terms"] | None) -> list[_Key]:
    return [] if columns is None else [(column.ctypes.data, column.strides) for column in columns.T]


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
    return Terms(sum_of_products(weight, gain)[:, None])


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
