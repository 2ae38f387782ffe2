"""Intervals for estimates, all of them over episodes.

Two-sided ones take a `level` and return an `Interval`; one-sided ones take the error rate `alpha` and return a lower bound,
and an upper bound is minus the lower bound of minus the values. Hoeffding's, the empirical Bernstein and the clipped bound hold
for any number of episodes, given the range of the contract (as those by betting, in `eprocess`); the others for many.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float64
from scipy import stats

from offrl_models.ope.importance import Samples, Terms, resampled
from offrl_models.ope.sequences import finite
from offrl_models.schema import InputError

Name = TypeVar("Name", bound=Hashable)
ROUNDING = 1e-9  # share of a range by which a sum of rewards may miss it
TUNED = 0.05  # error rate of a one-sided sequence up to which it is made as tight as can be for that rate
TIES = 1e-4  # standard deviations of the samples: what is nearer to the estimate differs by rounding alone
THRESHOLD_SHARE = 0.05  # of the episodes choose the threshold of the clipped bound, and are then set aside


@dataclass(frozen=True)
class Interval:
    """An estimate and the two-sided interval of a stated level around it."""

    estimate: float
    low: float
    high: float
    level: float
    method: str

    def to_json(self) -> dict[str, float | str | None]:
        """Plain JSON; what could not be estimated is null."""
        plain = asdict(self).items()
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in plain}


def difference(minuend: Terms, subtrahend: Terms) -> Terms:
    """The difference of two estimates on the same episodes, as one: every interval of it is paired by episode."""
    numerator = np.hstack([minuend.numerator, -subtrahend.numerator])
    if minuend.denominator is None and subtrahend.denominator is None:
        return Terms(numerator)
    bottoms = [np.ones_like(t.numerator) if t.denominator is None else t.denominator for t in (minuend, subtrahend)]
    return Terms(numerator, np.hstack(bottoms))


def bootstrap(terms: Terms, shares: Float64[np.ndarray, "samples episodes"], level: float) -> Interval:
    """Percentile bootstrap over episodes; every ratio is formed again in each sample. Efron & Tibshirani (1993)."""
    return bootstrap_all({"": terms}, shares, level)[""]


def bca(terms: Terms, shares: Float64[np.ndarray, "samples episodes"], level: float) -> Interval:
    """Bias-corrected and accelerated bootstrap over episodes. Efron (1987), "Better bootstrap confidence intervals"."""
    return bootstrap_all({"": terms}, shares, level, corrected=True)[""]


def bootstrap_all(
    candidates: Mapping[Name, Terms],
    samples: Samples,
    level: float,
    *,
    corrected: bool = False,
    over: str = "episodes",
) -> dict[Name, Interval]:
    """The percentile interval of every candidate, or with `corrected` the BCa interval, on the same bootstrap samples. `over` says
    what the rows are."""
    probability = np.array([(1 - level) / 2, (1 + level) / 2])
    method = f"{'BCa' if corrected else 'percentile'} bootstrap over {over}"
    found = {}
    for (name, terms), values in zip(candidates.items(), resampled(list(candidates.values()), samples), strict=True):
        low, high = _bca_quantiles(terms, values, probability) if corrected else np.quantile(values, probability)
        found[name] = Interval(terms.estimate(), float(low), float(high), level, method)
    return found


def _bca_quantiles(
    terms: Terms, samples: Float64[np.ndarray, "samples"], probability: Float64[np.ndarray, "k"]
) -> Float64[np.ndarray, "k"]:
    """Quantiles of bootstrap samples at probabilities corrected for the bias and for the skewness of the estimate.

    The acceleration is the skewness of the empirical influence function over 6 sqrt(n): Efron (1987), section 7.
    """
    pull, estimate = terms.influence(), terms.estimate()
    pull = pull / (np.abs(pull).max() or 1.0)  # so that no power of it vanishes
    acceleration = float((pull**3).sum() / (6 * (pull @ pull) ** 1.5)) if pull.any() else 0.0
    alike = TIES * samples.std()
    below = float((samples < estimate - alike).sum() + 0.5 * (np.abs(samples - estimate) <= alike).sum())
    bias = stats.norm.ppf((below + 0.5) / (len(samples) + 1))  # half a sample more on each side keeps it finite
    shifted = bias + stats.norm.ppf(probability)
    scale = 1 - acceleration * shifted
    return np.quantile(samples, np.where(scale > 0, stats.norm.cdf(bias + shifted / np.abs(scale)), shifted > 0))


def bootstrap_lower_bound(
    minuend: Terms, subtrahend: Terms, shares: Float64[np.ndarray, "samples episodes"], level: float
) -> tuple[float, float]:
    """The difference of two estimates on the same episodes, and its one-sided lower percentile bound.

    Raises InputError where there is no overlap to estimate from.
    """
    samples = _overlapping(minuend.resampled(shares) - subtrahend.resampled(shares))
    return minuend.estimate() - subtrahend.estimate(), float(np.quantile(samples, 1 - level))


def bca_lower_bound(terms: Terms, shares: Float64[np.ndarray, "samples episodes"], *, alpha: float) -> float:
    """One-sided BCa bound. Raises InputError where there is no overlap to estimate from."""
    return float(_bca_quantiles(terms, _overlapping(terms.resampled(shares)), np.array([alpha]))[0])


def _overlapping(values: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    if np.isnan(values).any():
        raise InputError("a policy does not overlap with the log: at some step every importance weight is 0.")
    return values


def delta_method(terms: Terms, level: float) -> Interval:
    """Estimate and normal quantiles of its influence function: weights that normalise vary with the episodes as well.

    The linearised ratio of means: Owen (2013), Monte Carlo theory, methods and examples, section 9.2.
    """
    center = terms.estimate()
    half = float(stats.norm.ppf((1 + level) / 2)) * _standard_error(terms.influence())
    return Interval(center, center - half, center + half, level, "normal, standard error of the influence function")


def delta_method_lower_bound(terms: Terms, *, alpha: float) -> float:
    """One-sided bound of the delta method. Raises InputError where there is no overlap to estimate from."""
    error = _standard_error(_overlapping(terms.influence()))
    return terms.estimate() - float(stats.norm.ppf(1 - alpha)) * error


def student_t(values: Float64[np.ndarray, "n"], level: float) -> Interval:
    """Mean and t-interval with n - 1 degrees of freedom. Student (1908)."""
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * _standard_error(finite("the values", values))
    center = float(values.mean())
    return Interval(center, center - half, center + half, level, "Student's t")


def student_t_lower_bound(values: Float64[np.ndarray, "n"], *, alpha: float) -> float:
    """One-sided t-bound of a mean."""
    error = _standard_error(finite("the values", values))
    return float(values.mean()) - float(stats.t.ppf(1 - alpha, len(values) - 1)) * error


def _standard_error(values: Float64[np.ndarray, "n"]) -> float:
    if len(values) < 2:
        raise InputError(f"an interval needs at least 2 episodes, not {len(values)}.")
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def ensemble(members: Sequence[float], initial_values: Float64[np.ndarray, "episodes"], level: float) -> Interval:
    """A t-interval over models, each fitted to its own bootstrap resample, widened by the spread of the initial values.

    The spread of the members estimates the fitting error and has len(members) - 1 degrees of freedom; the initial values
    add the sampling error of the episodes at hand. A bias that all members share is not covered.

    Raises InputError for fewer than two members.
    """
    if len(members) < 2:
        raise InputError(f"an ensemble interval needs at least 2 members, not {len(members)}.")
    fitting = float(np.var(members, ddof=1)) * (1 + 1 / len(members))
    sampling = float(np.var(initial_values)) / len(initial_values)
    half = float(stats.t.ppf((1 + level) / 2, len(members) - 1)) * float(np.sqrt(fitting + sampling))
    center = float(np.mean(members))
    return Interval(center, center - half, center + half, level, f"t over {len(members)} models fitted to resamples")


def in_unit_range(values: Float64[np.ndarray, "n"], low: float, high: float) -> Float64[np.ndarray, "n"]:
    """(values - low) / (high - low): what was in the range of the contract is now in [0, 1].

    Raises InputError when a value lies outside: a bound that rests on the range would not hold.
    """
    finite("the values", values)
    if not high > low:
        raise InputError(f"the range from {low:g} to {high:g} is empty; give the true range of the values.")
    unit = (values - low) / (high - low)
    outside = int(((unit < -ROUNDING) | (unit > 1 + ROUNDING)).sum())
    if outside:
        raise InputError(
            f"{outside} of {len(values)} values lie outside {low:g} to {high:g}, the smallest being {values.min():g} and the "
            f"largest {values.max():g}; give the true range, which the contract's range of rewards implies."
        )
    return unit.clip(0.0, 1.0)


def two_sided(
    lower_bound: Callable[..., float], values: Float64[np.ndarray, "n"], level: float, *, low: float, high: float
) -> Interval:
    """The interval of a lower bound for values from `low` to `high`: half of the error rate for it, half for its mirror."""
    below = lower_bound(values, low=low, high=high, alpha=(1 - level) / 2)
    above = -lower_bound(-values, low=-high, high=-low, alpha=(1 - level) / 2)
    method = lower_bound.__name__.removesuffix("_lower_bound").replace("_", " ")
    return Interval(float(values.mean()), below, above, level, method)


def hoeffding_lower_bound(values: Float64[np.ndarray, "n"], *, low: float, high: float, alpha: float) -> float:
    """mean - (high - low) sqrt(log(1/alpha) / (2 n)). Hoeffding (1963), theorem 2. Raises InputError: see in_unit_range."""
    center = float(in_unit_range(values, low, high).mean())
    return low + (high - low) * (center - math.sqrt(-math.log(alpha) / (2 * len(values))))


def empirical_bernstein_lower_bound(
    values: Float64[np.ndarray, "n"], *, low: float, high: float, alpha: float
) -> float:
    """mean - sd sqrt(2 log(2/alpha) / n) - (high - low) 7 log(2/alpha) / (3 (n - 1)), sd with n - 1 in the denominator.

    Maurer & Pontil (2009), https://arxiv.org/abs/0907.3740, theorem 4. Raises InputError: see in_unit_range.
    """
    unit, penalty = in_unit_range(values, low, high), math.log(2 / alpha)
    slack = math.sqrt(2 * penalty) * _standard_error(unit) + 7 * penalty / (3 * (len(unit) - 1))
    return low + (high - low) * (float(unit.mean()) - slack)


def hcope_threshold(values: Float64[np.ndarray, "n"], *, planned: int, alpha: float) -> float:
    """The value, of those seen, at which to clip `planned` further ones for the highest bound to be expected; 0 if none is.

    Thomas, Theocharous & Ghavamzadeh (2015), "High confidence off-policy evaluation", with one threshold for all.
    """
    n, clips = len(values), np.sort(values)
    rest = np.arange(n - 1, -1, -1)
    mean = (clips.cumsum() + rest * clips) / n
    square = (np.square(clips).cumsum() + rest * np.square(clips)) / n
    variance = np.maximum(square - mean**2, 0.0) * n / (n - 1)
    penalty = math.log(2 / alpha)
    bound = mean - 7 * clips * penalty / (3 * (planned - 1)) - np.sqrt(2 * penalty * variance / planned)
    return float(clips[bound.argmax()])


def hcope_lower_bound(values: Float64[np.ndarray, "n"], *, alpha: float, seed: int) -> float:
    """Lower bound of the mean of weighted returns that are at least 0 and have no upper limit; there is no upper bound.

    A random part of the episodes chooses where to clip; the rest, clipped there, gets the empirical Bernstein bound.
    Clipping can only lower the mean, and no mean of such values is below 0. Thomas, Theocharous & Ghavamzadeh (2015), theorem 1
    with one threshold for all.

    Raises InputError for values below 0 and for fewer than 4.
    """
    if len(values) < 4 or finite("the values", values).min() < 0:
        raise InputError(
            "the clipped bound needs at least 4 weighted returns, none below 0; scale returns to 0 and above."
        )
    shuffled = np.random.default_rng(seed).permutation(values)
    chosen = max(math.ceil(THRESHOLD_SHARE * len(values)), 2)
    threshold = hcope_threshold(shuffled[:chosen], planned=len(values) - chosen, alpha=alpha)
    if threshold == 0:
        return 0.0
    clipped = np.minimum(shuffled[chosen:], threshold)
    return max(empirical_bernstein_lower_bound(clipped, low=0.0, high=threshold, alpha=alpha), 0.0)


def _mixture_precision(alpha: float, planned: int) -> float:
    """rho^2 of the mixture whose two-sided boundary is about the tightest there is after `planned` values."""
    return float(-2 * np.log(alpha) + np.log(1 - 2 * np.log(alpha))) / planned


def confidence_sequence_lower_bound(
    values: Float64[np.ndarray, "n"], *, alpha: float, planned: int, unseen: float = 0.0
) -> float:
    """One-sided asymptotic confidence sequence for a mean: valid at every look from a large enough n on.

    mean - sd sqrt( 2 (n r + 1) / (n^2 r) log(1 + sqrt(n r + 1) / (2 alpha)) ), with r chosen to be tightest near `planned`
    values; above an error rate of TUNED r stays what it is there, for the width would else rise with the error rate. What is
    known to be `unseen` of the variance is added to that of the values.
    Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas (2024), https://arxiv.org/abs/2103.06476, the one-sided boundary;
    the half-normal mixture that it comes from is checked in the tests. Raises InputError for values that are NaN or infinite.
    """
    return float(
        finite("the values", values).mean()
        - np.sqrt(values.var() + unseen) * confidence_sequence_width(len(values), alpha=alpha, planned=planned)
    )


def confidence_sequence_width(n: int, *, alpha: float, planned: int) -> float:
    """How far `confidence_sequence_lower_bound` lies under the mean of `n` values, in standard deviations.

    Raises InputError for an error rate that is not between 0 and a half.
    """
    if not 0 < alpha < 0.5:
        raise InputError(
            f"a one-sided confidence sequence at an error rate of {alpha:g} is none; give one between 0 and 0.5."
        )
    scale = n * (precision := _mixture_precision(2 * min(alpha, TUNED), planned)) + 1
    return float(np.sqrt(2 * scale / (n**2 * precision) * np.log1p(np.sqrt(scale) / (2 * alpha))))


def confidence_sequence(values: Float64[np.ndarray, "n"], level: float, *, planned: int) -> Interval:
    """Two-sided: mean +- sd sqrt( 2 (n r + 1) / (n^2 r) log(sqrt(n r + 1) / alpha) ), theorem 2.2 of the paper named above.

    Its normal mixture is exactly 1 / alpha at the boundary.
    """
    scale = (n := len(values)) * (precision := _mixture_precision(1 - level, planned)) + 1
    half = values.std() * np.sqrt(2 * scale / (n**2 * precision) * np.log(np.sqrt(scale) / (1 - level)))
    low, mean, high = (float(values.mean() + sign * half) for sign in (-1, 0, 1))
    return Interval(mean, low, high, level, "asymptotic confidence sequence")
