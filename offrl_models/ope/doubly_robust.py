"""Doubly robust estimators: a model of the values, corrected by importance sampling where it was wrong.

`q` and `v` belong to the evaluation policy: v(s) = sum_a pi(a|s) q(s, a). They must not be fitted on these episodes.
Truncated episodes are to be completed first (`sequences.completed`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float64
from scipy import optimize

from offrl_models.ope.importance import Terms
from offrl_models.ope.sequences import CHUNK, by_step, finite, sum_of_products, weights_by_step
from offrl_models.schema import Episodes, InputError

PART = 2**16  # rows at a time


@dataclass(frozen=True)
class Model:
    """What a model of the values says of every episode, discounted; 0 past its end."""

    # v(s_0), then what the model did not foresee at each step: r_t + gamma v(s_{t+1}) - q(s_t, a_t)
    gain: Float64[np.ndarray, "episodes places"]

    @classmethod
    def of(cls, episodes: Episodes, q: Float64[np.ndarray, "rows"], v: Float64[np.ndarray, "rows"]) -> "Model":
        """Raises InputError when a value is NaN or infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            gain = _gain_of_one_step(episodes, q, v) if episodes.length.max() == 1 else _gain(episodes, q, v)
            if not np.isfinite(gain.sum()):
                finite("the q-value", episodes.reward - q)
                finite("the state value", v)
        return cls(gain)

    def corrected(
        self, weight: Float64[np.ndarray, "episodes steps"], change: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> Terms:
        """v(s_0) + sum_t gamma^t w_t [r_t + gamma v(s_{t+1}) - q(s_t, a_t)], with each weight as `change` makes it.

        Whatever the weights, it is unbiased where q is exact, since each bracket then has mean 0 given its past.
        """
        found, height = np.empty((len(weight), 1)), max(PART // weight.shape[1], 1)
        for start in range(0, len(weight), height):
            rows = slice(start, start + height)
            part = weight[rows] if change is None else change(weight[rows])
            np.add(sum_of_products(part, self.gain[rows, 1:]), self.gain[rows, 0], out=found[rows, 0])
        return Terms(found)

    def normalised(self, after: Float64[np.ndarray, "episodes places"]) -> Terms:
        """The same with the weights of each step normalised over all episodes. `after` holds a 1 before those of the steps."""
        return Terms(self.gain, after, weighted=True)


def _gain_of_one_step(
    episodes: Episodes, q: Float64[np.ndarray, "rows"], v: Float64[np.ndarray, "rows"]
) -> Float64[np.ndarray, "episodes places"]:
    value, error = columns = np.empty((2, episodes.n_episodes))
    np.multiply(episodes.time_discount, v, out=value)
    np.subtract(episodes.reward, q, out=error)
    error *= episodes.time_discount
    return columns.T


def _gain(
    episodes: Episodes, q: Float64[np.ndarray, "rows"], v: Float64[np.ndarray, "rows"]
) -> Float64[np.ndarray, "episodes places"]:
    """In parts that stay in the cache."""
    steps = int(episodes.length.max())
    alike, height = episodes.n_rows == episodes.n_episodes * steps, max(PART // steps, 1)
    gain = (np.empty if alike else np.zeros)((episodes.n_episodes, steps + 1))
    errors, values = np.empty((2, height * steps))
    for start in range(0, len(gain), height):
        found, offsets = gain[start : start + height], episodes.offsets[start : start + height + 1]
        rows = slice(offsets[0], offsets[-1])
        first = slice(None, None, steps) if alike else offsets[:-1] - offsets[0]
        error, value = (each[: offsets[-1] - offsets[0]] for each in (errors, values))
        np.subtract(episodes.reward[rows], q[rows], out=error)
        error *= episodes.time_discount[rows]
        np.multiply(episodes.time_discount[rows], v[rows], out=value)
        found[:, 0] = value[first]
        value[first] = 0.0  # no episode goes on in the next
        error[:-1] += value[1:]
        if alike:
            found[:, 1:] = error.reshape(-1, steps)
        else:
            found[episodes.episode_of_row[rows] - start, episodes.step[rows] + 1] = error
    return gain


def weights_after(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> Float64[np.ndarray, "episodes places"]:
    """The weight after 0, 1, 2 and so on steps: 1, w_0, w_1 ..."""
    table = by_step(episodes, finite("the ratio", ratio), 1.0)
    after = np.empty((len(table), table.shape[1] + 1))
    # Column by column, in parts that stay in the cache: faster than a cumulative product of short rows.
    for start in range(0, len(after), CHUNK):
        found, by = after[start : start + CHUNK], table[start : start + CHUNK]
        found[:, 0] = 1.0
        for step in range(table.shape[1]):
            np.multiply(found[:, step], by[:, step], out=found[:, step + 1])
    return after


def dr(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
) -> Terms:
    """sum_t gamma^t [ w_t (r_t - q(s_t, a_t)) + w_{t-1} v(s_t) ]: Jiang & Li (2016), eq. 10, unrolled."""
    return Model.of(episodes, q, v).corrected(weights_by_step(episodes, ratio))


def switch_dr(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    tau: float,
) -> Terms:
    """DR that trusts the model alone at steps whose weight is over `tau`: infinity is DR, 0 is the model.

    Wang, Agarwal & Dudik (2017), https://arxiv.org/abs/1612.01205. Theirs is a bandit; over several steps the
    weight is the product w_t, so that a step counts again once the product has come back under `tau`.
    Raises InputError when `tau` is negative.
    """
    return Model.of(episodes, q, v).corrected(weights_by_step(episodes, ratio), partial(switched, tau=tau))


def switched(weight: Float64[np.ndarray, "..."], tau: float) -> Float64[np.ndarray, "..."]:
    """The weights of `switch_dr`."""
    if not tau >= 0:
        raise InputError(f"a switch at the weight {tau} is not possible; give 0 or more.")
    return np.where(weight <= tau, weight, 0.0)


def dros(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    shrinkage: float,
) -> Terms:
    """DR with optimistic shrinkage, w_t -> lambda w_t / (w_t^2 + lambda): infinity is DR, 0 is the model.

    Su, Dimakopoulou, Krishnamurthy & Dudik (2020), https://arxiv.org/abs/1907.09623, whose lambda is `shrinkage` here. Theirs
    is a bandit; over several steps the weight is the product w_t.
    Raises InputError when `shrinkage` is negative.
    """
    return Model.of(episodes, q, v).corrected(weights_by_step(episodes, ratio), partial(shrunk, shrinkage=shrinkage))


def shrunk(weight: Float64[np.ndarray, "..."], shrinkage: float) -> Float64[np.ndarray, "..."]:
    """The weights of `dros`."""
    if not shrinkage >= 0:
        raise InputError(f"a shrinkage of {shrinkage} is not possible; give 0 or more.")
    if shrinkage == 0:
        return np.zeros_like(weight)
    over = np.square(weight)
    over /= shrinkage
    over += 1.0
    return np.divide(weight, over, out=over)


def wdr(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
) -> Terms:
    """DR with the weights of each step normalised over all episodes: Thomas & Brunskill (2016), section 5."""
    return Model.of(episodes, q, v).normalised(weights_after(episodes, ratio))


def partial_returns(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    steps: Sequence[float],
    blend: Float64[np.ndarray, "blended"],
) -> Terms:
    """sum_j blend_j g^(j): WDR over the first `steps[j]` steps of an episode, and the model from there on.

    0 steps are the model alone, the mean v(s_0) of the episodes; infinity, or the length of the longest episode, is WDR.
    Thomas & Brunskill (2016), eq. 4, https://arxiv.org/abs/1604.00923, who count one step less: the model is their g^(-1).
    Raises InputError when a number of steps is neither whole nor infinite, or is negative.
    """
    for reach in steps:
        if not reach >= 0 or reach % 1 > 0:
            raise InputError(
                f"{reach} importance-weighted steps are not possible; give 0, 1, 2 and so on, or infinity."
            )
    discount, weight = episodes.time_discount, weights_after(episodes, ratio)
    error = by_step(episodes, finite("the q-value", (episodes.reward - q) * discount), 0.0)
    value = by_step(episodes, finite("the state value", discount * v), 0.0)
    before, after = weight[:, :-1], weight[:, 1:]
    column = np.arange(after.shape[1])
    corrected = blend @ (np.asarray(steps)[:, None] > column)
    valued = blend @ (np.asarray(steps)[:, None] >= column)
    # A step that no blended return reaches need not have any overlap.
    reached, used = corrected != 0, valued != 0
    top = [(corrected * after * error)[:, reached], (valued * before * value)[:, used]]
    return Terms(np.concatenate(top, 1), np.concatenate([after[:, reached], before[:, used]], 1))


def magic_blend(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    steps: Sequence[float],
    shares: Float64[np.ndarray, "samples episodes"],
    level: float = 0.5,
) -> Float64[np.ndarray, "blended"]:
    """The weights x on the simplex that minimize the estimated mean squared error x' (Omega + b b') x of the blend.

    Omega is n / (n - 1) sum_i (g_i - mean g) (g_i - mean g)' over the episodes' contributions g_i to the partial returns,
    and b_j the distance from g^(j) to the percentile bootstrap interval of WDR at `level`, stretched to hold WDR itself:
    Thomas & Brunskill (2016), eq. 5 and their algorithm. The factor n of Omega, which the first author's published code
    names as an erratum of the paper's experiments, is in; the small multiple of the identity that it adds is not.
    Raises InputError for fewer than 2 episodes, or where a step has no overlap in the log or in a bootstrap sample.
    """
    n = episodes.n_episodes
    if n < 2:
        raise InputError(f"a blend of partial returns needs at least 2 episodes, not {n}.")
    one = np.ones(1)
    parts = [partial_returns(episodes, ratio, q, v, [reach], one) for reach in steps]
    total = finite("a partial return", np.array([part.estimate() for part in parts]))
    mine = np.stack([_contributions(part) for part in parts], axis=1)
    whole = wdr(episodes, ratio, q, v)
    samples = np.quantile(finite("WDR", whole.resampled(shares)), [(1 - level) / 2, (1 + level) / 2])
    low, high = np.minimum(samples[0], whole.estimate()), np.maximum(samples[1], whole.estimate())
    bias = np.maximum(low - total, 0.0) + np.maximum(total - high, 0.0)
    spread = np.linalg.qr(math.sqrt(n / (n - 1)) * (mine - mine.mean(0)), mode="r")
    return _least_on_simplex(np.vstack([spread, bias]))


def _contributions(terms: Terms) -> Float64[np.ndarray, "episodes"]:
    """What each episode adds to a self-normalised estimate."""
    assert terms.denominator is not None
    return (terms.numerator / terms.denominator.sum(0)).sum(1)


def _least_on_simplex(root: Float64[np.ndarray, "rows columns"]) -> Float64[np.ndarray, "columns"]:
    """The x of the simplex with the smallest |root x|.

    Without the sum, |root y|^2 + (1 - sum y)^2 over y >= 0 has its minimum in the same direction: the best multiple of an x
    leaves m / (1 + m) with m = |root x|^2, which grows with m. That is nonnegative least squares, solved exactly.
    """
    scaled = root / max(float(np.abs(root).max()), np.finfo(float).tiny)
    found, _ = optimize.nnls(np.vstack([scaled, np.ones(root.shape[1])]), np.append(np.zeros(len(root)), 1.0))
    return found / found.sum()


def magic(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    steps: Sequence[float],
    shares: Float64[np.ndarray, "samples episodes"],
    level: float = 0.5,
) -> Terms:
    """Model and guided importance sampling combining: the blend of `partial_returns` that `magic_blend` finds.

    Thomas & Brunskill (2016). Resampling the terms forms every ratio again but keeps the blend, so an interval made of them
    leaves out what choosing the blend costs.
    """
    return partial_returns(episodes, ratio, q, v, steps, magic_blend(episodes, ratio, q, v, steps, shares, level))
