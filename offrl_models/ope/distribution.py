"""The distribution of the return under the evaluation policy, and what can be read from it: quantiles, variance, CVaR.

Huang, Leqi, Lipton & Azizzadenesheli (2021), https://arxiv.org/abs/2104.08977; Chandak, Niekum, da Silva, Learned-Miller, Brunskill
& Thomas (2021), https://arxiv.org/abs/2104.12820. The CDF is an expectation, of 1(G <= x), so every estimator of a value is one of
the CDF; its plug-in functionals follow. Returns must be whole: what lies past a truncation has a value, not a distribution.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64
from scipy import sparse

from offrl_models.ope.doubly_robust import dr
from offrl_models.ope.importance import trajectory_weights
from offrl_models.ope.intervals import ROUNDING, Interval, in_unit_range
from offrl_models.ope.sequences import finite
from offrl_models.schema import Episodes, InputError

# Of a step function [samples, points]: one number per sample.
Functional = Callable[
    [Float64[np.ndarray, "points"], Float64[np.ndarray, "samples points"]], Float64[np.ndarray, "samples"]
]


@dataclasses.dataclass(frozen=True)
class ReturnCDF:
    """What an estimator of the CDF leaves of each episode: a jump of `weight` at its return, and a model's correction.

    The estimate is made monotone by its running maximum, clipped to [0, 1], and 1 at the last point, the highest return that
    can occur: what weights with a mean under 1 leave missing lies there.
    """

    points: Float64[np.ndarray, "points"]  # ascending
    place: Int64[np.ndarray, "episodes"]  # of the first point that is not under the episode's return
    weight: Float64[np.ndarray, "episodes"]
    normalized: bool
    correction: Float64[np.ndarray, "episodes points"] | None = None

    @cached_property
    def _jumps(self) -> sparse.csr_array:
        at = (np.arange(len(self.place)), self.place)
        return sparse.csr_array((self.weight, at), shape=(len(self.place), len(self.points)))

    def estimate(self, share: Float64[np.ndarray, "episodes"] | None = None) -> Float64[np.ndarray, "points"]:
        """The CDF at every point with each episode counted `share` times (shares sum to 1); without it, equally."""
        n = len(self.weight)
        return self.resampled((np.full(n, 1.0 / n) if share is None else share)[None, :])[0]

    def resampled(self, share: Float64[np.ndarray, "samples episodes"]) -> Float64[np.ndarray, "samples points"]:
        """One CDF per row of shares. Raises InputError where all weights of a sample are 0: there is no overlap."""
        total = share @ self.weight
        if not (total > 0).all():
            raise InputError("a policy does not overlap with the log: every importance weight of a sample is 0.")
        cdf = np.cumsum(share @ self._jumps, axis=1)
        if self.normalized:
            cdf /= total[:, None]
        if self.correction is not None:
            cdf += share @ self.correction
        cdf = np.clip(np.maximum.accumulate(cdf, axis=1), 0.0, 1.0)
        cdf[:, -1] = 1.0
        return cdf


def _returns(episodes: Episodes, low: float, high: float) -> Float64[np.ndarray, "episodes"]:
    cut = int(episodes.truncated.sum())
    if cut:
        raise InputError(
            f"{cut} episodes are truncated; the distribution of what they would have returned is not known."
        )
    in_unit_range(episodes.return_, low, high)
    return np.clip(episodes.return_, low, high)


def _weighted_cdf(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"], low: float, high: float, *, normalized: bool
) -> ReturnCDF:
    returns = _returns(episodes, low, high)
    points, place = np.unique(np.concatenate([returns, [low, high]]), return_inverse=True)
    weight = trajectory_weights(episodes, finite("the ratio", ratio))
    return ReturnCDF(points, place[: len(returns)], weight, normalized)


def tis_cdf(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], *, low: float, high: float) -> ReturnCDF:
    """mean of w_T 1(G <= x): trajectory-wise importance sampling, the estimator of both papers.

    `low` and `high` are the lowest and highest return that can occur, from the contract. Raises InputError for truncated
    episodes and for returns outside the range.
    """
    return _weighted_cdf(episodes, ratio, low, high, normalized=False)


def wis_cdf(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], *, low: float, high: float) -> ReturnCDF:
    """sum of w_T 1(G <= x) / sum of w_T: a CDF as it is, whose mean is WIS. Errors as in `tis_cdf`."""
    return _weighted_cdf(episodes, ratio, low, high, normalized=True)


def dr_cdf(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows points"],
    v: Float64[np.ndarray, "rows points"],
    points: Float64[np.ndarray, "points"],
) -> ReturnCDF:
    """Doubly robust with a model of the CDF of the whole return: Huang et al. (2021), here at any horizon.

    q[row, k] is the modelled probability, under the evaluation policy, that the episode's return is at most points[k] given
    everything up to this row and its action, v[row, k] the same before the action; at horizon 1, of the reward. For each point
    it is `dr` with the reward 1(G <= x) at the end and no discount. All mass between two points counts at the upper one, and
    the last point is the highest return that can occur.

    Raises InputError for truncated episodes, returns over the last point, points that do not rise, and a model outside [0, 1].
    """
    if not (np.diff(points) > 0).all():
        raise InputError("the points of a CDF must rise.")
    returns = _returns(episodes, min(float(points[0]), float(episodes.return_.min())), float(points[-1]))
    for name, model in (("q", q), ("v", v)):
        bad = ~((model > -1e-9) & (model < 1 + 1e-9)).all(1)
        if bad.any():
            raise InputError(f"{name} is no probability in {int(bad.sum())} rows.")
    without = dataclasses.replace(episodes, reward=np.zeros(episodes.n_rows), gamma=1.0, interval=None)
    correction = [dr(without, ratio, q[:, k], v[:, k]).numerator[:, 0] for k in range(len(points))]
    weight = trajectory_weights(episodes, finite("the ratio", ratio))
    at = np.searchsorted(points, returns - ROUNDING * (points[-1] - points[0]))  # a sum may miss its point by rounding
    return ReturnCDF(points, at, weight, False, np.stack(correction, 1))


def _mass(cdf: Float64[np.ndarray, "samples points"]) -> Float64[np.ndarray, "samples points"]:
    return np.diff(cdf, axis=1, prepend=0.0)


def mean(
    points: Float64[np.ndarray, "points"], cdf: Float64[np.ndarray, "samples points"]
) -> Float64[np.ndarray, "samples"]:
    """Expected return."""
    return _mass(cdf) @ points


def variance(
    points: Float64[np.ndarray, "points"], cdf: Float64[np.ndarray, "samples points"]
) -> Float64[np.ndarray, "samples"]:
    """Variance of the return: between episodes, not of the estimate of their mean."""
    away = points - mean(points, cdf)[:, None]
    return (_mass(cdf) * np.square(away)).sum(1)


def quantile(
    points: Float64[np.ndarray, "points"], cdf: Float64[np.ndarray, "samples points"], *, level: float
) -> Float64[np.ndarray, "samples"]:
    """The lowest return whose CDF is at least `level`, up to rounding; `level` lies in (0, 1]."""
    if not 0 < level <= 1:
        raise InputError(f"the level of a quantile must lie in (0, 1], not {level}.")
    return points[(cdf >= level - 1e-12).argmax(1)]


def cvar(
    points: Float64[np.ndarray, "points"], cdf: Float64[np.ndarray, "samples points"], *, tail: float
) -> Float64[np.ndarray, "samples"]:
    """Conditional value at risk: mean of the worst `tail` of the returns, in (0, 1]; the mean of all of them at 1.

    Where the quantile carries more mass than the tail has room for, only as much of it counts: Rockafellar & Uryasev (2002).
    """
    if not 0 < tail <= 1:
        raise InputError(f"the tail must be a share in (0, 1], not {tail}.")
    return _mass(np.minimum(cdf, tail)) @ points / tail


def bootstrap_functional(
    cdf: ReturnCDF, functional: Functional, shares: Float64[np.ndarray, "samples episodes"], level: float
) -> Interval:
    """Percentile bootstrap over episodes of a functional of the return; the CDF is formed again in every sample."""
    low, high = np.quantile(functional(cdf.points, cdf.resampled(shares)), [(1 - level) / 2, (1 + level) / 2])
    estimate = functional(cdf.points, cdf.estimate()[None, :])[0]
    return Interval(float(estimate), float(low), float(high), level, "percentile bootstrap over episodes")


def band(
    cdf: ReturnCDF, weight_limit: float, level: float
) -> tuple[Float64[np.ndarray, "points"], Float64[np.ndarray, "points"]]:
    """Lower and upper step functions [points] that hold the true CDF everywhere with probability `level`, for any n.

    The estimate plus and minus B sqrt(log(2e / (1 - level)) / (2n)), where no weight w_T can exceed B = `weight_limit`: the limit
    that the policies imply, never the largest weight seen.

    The inequality of Dvoretzky, Kiefer, Wolfowitz and Massart, with e for the weights. Keep each episode with probability w / B and
    let D be the largest error of the share of episodes that are kept with a return of at most x; DKW holds for it,
    P(D > t) <= 2 exp(-2nt^2). The weighted estimate is B times its conditional mean, so that by Jensen's inequality its
    largest error D' satisfies E f(D' / B) <= E f(D) for increasing convex f. With f(s) = max(s^2 - t^2 + 1 / (2n), 0) that gives
    P(D' > B t) <= 2e exp(-2nt^2): the step from Jensen to tails is lemma 1 of Panchenko (2003).

    Raises InputError for an estimator that is not a plain mean of weights, and where a weight exceeds the limit.
    """
    if cdf.normalized or cdf.correction is not None:
        raise InputError("the band is one of `tis_cdf`; bootstrap the other estimators.")
    over = int((cdf.weight > weight_limit * (1 + 1e-9)).sum())
    if over:
        raise InputError(
            f"{over} importance weights exceed {weight_limit}, the limit that was said to hold for them all."
        )
    half = weight_limit * math.sqrt(math.log(2 * math.e / (1 - level)) / (2 * len(cdf.weight)))
    lower, upper = (np.clip(cdf.estimate() + shift, 0.0, 1.0) for shift in (-half, half))
    lower[-1] = upper[-1] = 1.0
    return lower, upper


def band_interval(cdf: ReturnCDF, functional: Functional, weight_limit: float, level: float) -> Interval:
    """What the band of the CDF says about the mean, a quantile or CVaR: they are lower where the CDF is higher.

    Several of them from one band hold together. Raises InputError for the variance, which does not rise with the returns.
    """
    if functional is variance:
        raise InputError("the variance is no increasing functional of the return; bootstrap it.")
    lower, upper = band(cdf, weight_limit, level)
    estimate, high, low = functional(cdf.points, np.stack([cdf.estimate(), lower, upper]))
    return Interval(float(estimate), float(low), float(high), level, f"CDF band for weights up to {weight_limit:g}")
