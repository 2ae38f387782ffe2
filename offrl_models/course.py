"""Whether a gain lasts: what the older and the newer part of a log say of a difference."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from scipy import stats
from scipy.optimize import root_scalar

from offrl_models.measures import Contrast
from offrl_models.ope.intervals import student_t_lower_bound
from offrl_models.ope.units import Units, per_unit

PARTS = 10  # of the log, in which the course of a difference is shown
KEPT = 0.2  # share of the older half's gain that the newer half has to keep
FADED = 0.03  # and one that counts as nothing: nuisances fitted on both halves carry so much of it over
EARLIER_GAINS = np.linspace(0.0, 12.0, 61)  # in standard errors of the difference; beyond them nothing passes
QUANTILES = (np.arange(64) + 0.5) / 64


@dataclass(frozen=True)
class Kept:
    """What the newer half gains beyond `KEPT` of what the older one does, and the bound that is held against 0."""

    difference: float
    lower_bound: float  # -infinity where a half is of fewer than 2 units


def kept(
    outcome: Float64[np.ndarray, "episodes"],
    oldest_first: Int64[np.ndarray, "episodes"],
    *,
    alpha: float,
    width: float,
    unit: Int64[np.ndarray, "episodes"] | None = None,
) -> Kept:
    """Mean in the newer half less `KEPT` of the mean in the older half, and a lower bound of it.

    It is asked beside a bound of the whole mean that lies `width` standard errors below it. Its own level is the lowest at
    which both are above 0 with a probability of alpha at most where the newer half gains `FADED` of what the older one does,
    whatever that is: by the normal approximation. Episodes of one `unit` may depend on each other.
    """
    n, cut = len(outcome), len(outcome) // 2
    if cut < 1:
        return Kept(math.nan, -math.inf)
    halves, of = (oldest_first[:cut], oldest_first[cut:]), np.arange(n) if unit is None else unit
    difference = float(outcome[halves[1]].mean() - KEPT * outcome[halves[0]].mean())
    if min(len(np.unique(of[half])) for half in halves) < 2:
        return Kept(difference, -math.inf)
    older, newer = (_errors(outcome, half, of) for half in halves)
    whole, rest = (cut * older + (n - cut) * newer) / n, newer - KEPT * older
    of_whole, of_rest = (float(np.sqrt(np.square(part).sum())) for part in (whole, rest))
    if of_whole == 0 or of_rest == 0:
        return Kept(difference, difference)
    correlation = np.clip(whole @ rest / (of_whole * of_rest), -0.9999, 0.9999)
    older_gains = EARLIER_GAINS * of_whole * n / (cut + (n - cut) * FADED)
    shift = (KEPT - FADED) * older_gains / of_rest
    level = critical_value(alpha, width - EARLIER_GAINS, shift, float(correlation))
    return Kept(difference, difference - level * of_rest)


def _errors(
    outcome: Float64[np.ndarray, "episodes"], half: Int64[np.ndarray, "half"], unit: Int64[np.ndarray, "episodes"]
) -> Float64[np.ndarray, "units"]:
    """What each unit adds to the error of the mean of a half; the sum of squares is its variance."""
    each = np.zeros(len(outcome))
    each[half] = (outcome[half] - outcome[half].mean()) / math.sqrt(len(half) * (len(half) - 1))
    return np.bincount(unit, each)


def critical_value(
    alpha: float, first: Float64[np.ndarray, "cases"], shift: Float64[np.ndarray, "cases"], correlation: float
) -> float:
    """The least c >= 0 with P(X > first, Y > c + shift) <= alpha in every case, X, Y standard normal with that correlation.

    P = P(X > first) E[P(Y > c + shift | X)], the mean taken over quantiles of X beyond `first`.
    """
    tail = stats.norm.sf(first)
    beyond = correlation * stats.norm.isf(tail[:, None] * QUANTILES)

    def excess(c: float) -> float:
        chance = stats.norm.cdf((beyond - (c + shift)[:, None]) / math.sqrt(1 - correlation**2)).mean(1)
        return float((tail * chance).max()) - alpha

    return root_scalar(excess, bracket=(0.0, 10.0), method="brentq", xtol=1e-4).root if excess(0.0) > 0 else 0.0


def parts(
    outcome: Float64[np.ndarray, "episodes"],
    oldest_first: Int64[np.ndarray, "episodes"],
    alpha: float,
    unit: Units | None = None,
) -> list[Contrast]:
    """The mean in each tenth of the episodes, oldest first; in fewer parts where they would hold fewer than 2 episodes."""
    cut = np.array_split(oldest_first, min(PARTS, max(len(outcome) // 2, 1)))
    return [_stretch(f"part {number}", outcome, part, alpha, unit) for number, part in enumerate(cut, 1)]


def halves(
    outcome: Float64[np.ndarray, "episodes"],
    oldest_first: Int64[np.ndarray, "episodes"],
    alpha: float,
    unit: Units | None = None,
) -> tuple[Contrast, Contrast]:
    """The mean in the half of the episodes that was recorded first, and in the other one."""
    older, newer = np.split(oldest_first, [len(outcome) // 2])
    return _stretch("older half", outcome, older, alpha, unit), _stretch("newer half", outcome, newer, alpha, unit)


def _stretch(
    name: str,
    outcome: Float64[np.ndarray, "episodes"],
    part: Int64[np.ndarray, "part"],
    alpha: float,
    unit: Units | None,
) -> Contrast:
    """Mean in a part of the log and one-sided t-bounds, by entities where an entity has several episodes."""
    values = per_unit(outcome[part], None if unit is None else unit[part])
    entities = None if unit is None else len(values)
    if len(values) < 2:
        difference = float(outcome[part].mean()) if len(part) else math.nan
        return Contrast(name, len(part), difference, -math.inf, math.inf, entities)
    low, high = (sign * student_t_lower_bound(sign * values, alpha=alpha) for sign in (1.0, -1.0))
    return Contrast(name, len(part), float(outcome[part].mean()), low, high, entities)
