"""Everything one evaluation says about one policy: all estimators with intervals, and effective sample sizes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from offrl_models.ope.diagnostics import effective_sample_size
from offrl_models.ope.doubly_robust import dr, wdr
from offrl_models.ope.fqe import FQEValues
from offrl_models.ope.importance import Terms, pdis, tis, trajectory_weights, wis, wpdis
from offrl_models.ope.intervals import Interval, bootstrap, ensemble
from offrl_models.ope.sequences import completed
from offrl_models.schema import Episodes

LEVEL = 0.95  # of the two-sided intervals in reports
ESTIMATORS = ("TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR", "FQE")


@dataclass(frozen=True)
class Estimates:
    """Intervals by estimator, and how many equally weighted episodes the importance weights are worth."""

    intervals: dict[str, Interval]
    effective_episodes: float

    def to_json(self) -> dict[str, Any]:
        return {
            "estimates": {name: interval.to_json() for name, interval in self.intervals.items()},
            "effective_episodes": self.effective_episodes,
        }


def all_terms(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
) -> dict[str, Terms]:
    """Every estimator that is a sum of ratios of means over episodes."""
    return {
        "TIS": tis(episodes, ratio),
        "PDIS": pdis(episodes, ratio),
        "WIS": wis(episodes, ratio),
        "WPDIS": wpdis(episodes, ratio),
        "DR": dr(episodes, ratio, q, v),
        "WDR": wdr(episodes, ratio, q, v),
    }


def estimate(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    fqe: FQEValues,
    policy: int,
    shares: Float64[np.ndarray, "samples episodes"],
) -> Estimates:
    """All estimators of the value of policy number `policy` of `fqe`, on the same bootstrap samples.

    What lies past a truncation is the policy's fitted value in all of them.
    """
    episodes = completed(episodes, fqe.next_v[policy])
    terms = all_terms(episodes, ratio, fqe.q[policy], fqe.v[policy])
    intervals = {name: bootstrap(term, shares, LEVEL) for name, term in terms.items()}
    intervals["FQE"] = ensemble(fqe.members(policy), fqe.initial[policy].mean(0), LEVEL)
    return Estimates(intervals, effective_sample_size(trajectory_weights(episodes, ratio)))
