"""Ranking candidates without an environment, on the selection split, and what a ranking was worth where the truth is known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy import stats

from offrl_models.evaluation import BEHAVIOR, Evaluation
from offrl_models.ope.sequences import finite
from offrl_models.schema import InputError

Scorer = Callable[[Sequence[str]], Sequence[float]]  # names of candidates in, one score each out, higher is better


def rank(found: Evaluation) -> list[dict[str, Any]]:
    """Candidates from best to worst, by the least that a member of the FQE ensemble says they gain on the champion.

    A member compares both policies on the same resample, so what it gets wrong of both cancels. Ranking by FQE follows
    Paine et al. (2020), https://arxiv.org/abs/2007.09055; the least of the members instead of their mean is pessimism.
    """
    rows = [
        {
            "candidate": name,
            "score": min(found.fqe_gains(name)),
            "gain_by_member": found.fqe_gains(name),
            **found.estimates[name].to_json(),
        }
        for name in found.names
        if name != BEHAVIOR
    ]
    rows.sort(key=lambda row: (-row["score"], row["candidate"]))
    return [{"rank": place, **row} for place, row in enumerate(rows, 1)]


@dataclass(frozen=True)
class Selection:
    """Scores of the two stages by candidate, each stage from best to worst."""

    cheap: dict[str, float]  # of every candidate
    full: dict[str, float]  # of those that were kept


def two_stage(candidates: Sequence[str], cheap: Scorer, full: Scorer, keep: int) -> Selection:
    """Keep the best few by a score that costs little, then rank these by one that costs much.

    The first may be WPDIS, or FQE of few steps; the second is FQE in full. Tang & Wiens (2021), "Model selection for offline
    reinforcement learning: practical considerations for healthcare settings", https://arxiv.org/abs/2107.11003. Equal scores
    are ranked by name. Raises InputError for scores that are no numbers, for a name that occurs twice, and for a `keep` that
    keeps none or too many.
    """
    if not 1 <= keep <= len(set(candidates)) == len(candidates):
        raise InputError(
            f"{keep} of {len(candidates)} candidates cannot be kept; name each once, and keep at least 1 and at most all."
        )
    first = _ranked(candidates, cheap)
    return Selection(first, _ranked(list(first)[:keep], full))


def _ranked(candidates: Sequence[str], scorer: Scorer) -> dict[str, float]:
    scores = dict(zip(candidates, scorer(candidates), strict=True))
    unknown = [name for name, score in scores.items() if not math.isfinite(score)]
    if unknown:
        raise InputError(f"{len(unknown)} candidates have no score that is a number: {', '.join(sorted(unknown)[:5])}.")
    return {name: float(scores[name]) for name in sorted(scores, key=lambda name: (-scores[name], name))}


def spearman(estimate: Float64[np.ndarray, "policies"], value: Float64[np.ndarray, "policies"]) -> float:
    """Correlation of the ranks by estimate with the ranks by true value, ties sharing a rank; NaN where either is constant."""
    ranks = [stats.rankdata(finite("an estimate or value", each)) for each in (estimate, value)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def _best(estimate: Float64[np.ndarray, "policies"], k: int) -> Int64[np.ndarray, "k"]:
    """Positions of the k highest estimates; of equal ones, those that come first."""
    if not 1 <= k <= len(estimate):
        raise InputError(f"the best {k} of {len(estimate)} policies do not exist; choose k from 1 to {len(estimate)}.")
    return np.argsort(-finite("an estimate", estimate), kind="stable")[:k]


def regret_at_k(estimate: Float64[np.ndarray, "policies"], value: Float64[np.ndarray, "policies"], k: int) -> float:
    """The best value there is less the best among the k policies of highest estimate. Paine et al. (2020)."""
    return float(finite("a value", value).max() - value[_best(estimate, k)].max())


def error_rates(
    passed: Bool[np.ndarray, "policies"], value: Float64[np.ndarray, "policies"], champion_value: float
) -> tuple[float, float]:
    """Type I and type II error of a rule: how many of the policies no better than the champion passed, and how many of the
    better ones did not, as shares. NaN where there is none to err on."""
    better = finite("a value", value) > champion_value
    false_pass = float(passed[~better].mean()) if not better.all() else math.nan
    false_fail = float((~passed[better]).mean()) if better.any() else math.nan
    return false_pass, false_fail


def sharpe_ratio_at_k(
    estimate: Float64[np.ndarray, "policies"], value: Float64[np.ndarray, "policies"], champion_value: float, k: int
) -> float:
    """(best value among the k policies of highest estimate - champion's value) / standard deviation of the k values.

    What trying out the k policies gains over its risk: Kiyohara et al. (2024), https://arxiv.org/abs/2311.18207. The
    deviation has k in its denominator. NaN where the k values are equal, as one alone is: without risk there is no ratio.
    """
    tried = finite("a value", value)[_best(estimate, k)]
    spread = float(tried.std())
    return float(tried.max() - champion_value) / spread if np.ptp(tried) > 0 else math.nan
