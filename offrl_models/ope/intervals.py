"""Intervals for estimates: the episode bootstrap, the ensemble of fitted models, and the anytime-valid lower bound."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float64
from scipy import stats

from offrl_models.ope.importance import Terms
from offrl_models.schema import InputError


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
        numbers = {key: value if value == value else None for key, value in asdict(self).items()}
        return numbers


def bootstrap_shares(episodes: int, samples: int, seed: int) -> Float64[np.ndarray, "samples episodes"]:
    """How often each episode occurs in each bootstrap sample, over the number of episodes. Drawn once, shared by all."""
    rng = np.random.default_rng(seed)
    shares = np.empty((samples, episodes))
    for row in shares:
        row[:] = np.bincount(rng.integers(0, episodes, episodes), minlength=episodes)
    return shares / episodes


def bootstrap(terms: Terms, shares: Float64[np.ndarray, "samples episodes"], level: float) -> Interval:
    """Percentile bootstrap over episodes; every ratio is formed again in each sample. Efron & Tibshirani (1993)."""
    low, high = np.quantile(terms.resampled(shares), [(1 - level) / 2, (1 + level) / 2])
    return Interval(terms.estimate(), float(low), float(high), level, "percentile bootstrap over episodes")


def bootstrap_lower_bound(
    minuend: Terms, subtrahend: Terms, shares: Float64[np.ndarray, "samples episodes"], level: float
) -> tuple[float, float]:
    """The difference of two estimates on the same episodes, and its one-sided lower percentile bound.

    Raises InputError where there is no overlap to estimate from.
    """
    difference = minuend.resampled(shares) - subtrahend.resampled(shares)
    if np.isnan(difference).any():
        raise InputError("a policy does not overlap with the log: at some step every importance weight is 0.")
    return minuend.estimate() - subtrahend.estimate(), float(np.quantile(difference, 1 - level))


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


def confidence_sequence_lower_bound(values: Float64[np.ndarray, "n"], *, alpha: float, planned: int) -> float:
    """One-sided asymptotic confidence sequence for a mean: valid at every look from a large enough n on.

    mean - sd sqrt( 2 (n r + 1) / (n^2 r) log(1 + sqrt(n r + 1) / (2 alpha)) ), with r chosen to be tightest near `planned`
    values. Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas (2024), https://arxiv.org/abs/2103.06476, the one-sided boundary;
    the half-normal mixture that it comes from is checked in the tests.
    """
    n = len(values)
    precision = (-2 * np.log(2 * alpha) + np.log(1 - 2 * np.log(2 * alpha))) / planned
    scale = n * precision + 1
    width = np.sqrt(2 * scale / (n**2 * precision) * np.log1p(np.sqrt(scale) / (2 * alpha)))
    return float(values.mean() - values.std() * width)
