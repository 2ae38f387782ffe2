"""Everything one evaluation says about one policy: all estimators with intervals, and effective sample sizes."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float64

from offrl_models.measures import enough_effective
from offrl_models.ope.diagnostics import effective_sample_size
from offrl_models.ope.doubly_robust import Model, weights_after
from offrl_models.ope.fqe import FQEValues
from offrl_models.ope.importance import Samples, Terms, discounted_rewards, normalised, plain
from offrl_models.ope.intervals import Interval, bootstrap_all, ensemble
from offrl_models.ope.sequences import completed, weights_by_step
from offrl_models.ope.units import Units, by, independent, per_unit, summed
from offrl_models.schema import Episodes

LEVEL = 0.95  # of the two-sided intervals in reports
ESTIMATORS = ("TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR", "FQE")
WHOLE, UNWEIGHTED = (
    ("TIS", "WIS"),
    ("FQE",),
)  # by the weights of whole episodes, and by none; the others by those of every step
REFITS = 200  # bootstrap samples, where propensities are fitted again in each

Refit = Callable[[Float64[np.ndarray, "episodes"]], Float64[np.ndarray, "rows"]]  # propensities, of counted episodes


@dataclass(frozen=True)
class Estimates:
    """Intervals by estimator, and how many equally weighted episodes, or entities, the importance weights are worth."""

    intervals: dict[str, Interval]
    effective_episodes: float
    least_effective: float  # of the weights up to and including the step at which they are worth the fewest
    independent: int  # episodes, or entities where one has several

    @classmethod
    def of(
        cls, intervals: dict[str, Interval], episodes: Episodes, ratio: Float64[np.ndarray, "rows"], unit: Units | None
    ) -> "Estimates":
        """Intervals that are made with these ratios."""
        sizes = [effective_sample_size(summed(weight, unit)) for weight in weights_by_step(episodes, ratio).T]
        return cls(intervals, sizes[-1], min(sizes), independent(episodes))

    @property
    def of_few(self) -> list[str]:
        """Estimators that weigh with fewer episodes than it takes for their intervals to be relied on."""
        enough = enough_effective(self.independent)
        worth = dict.fromkeys(WHOLE, self.effective_episodes) | dict.fromkeys(UNWEIGHTED, np.inf)
        return [name for name in self.intervals if worth.get(name, self.least_effective) < enough]

    def to_json(self) -> dict[str, Any]:
        return {
            "estimates": {name: interval.to_json() for name, interval in self.intervals.items()},
            "effective_episodes": self.effective_episodes,
            "least_effective_episodes": self.least_effective,
            "of_few": self.of_few,
        }


def all_terms(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    model: Model,
) -> dict[str, Terms]:
    """Every estimator that is a sum of ratios of means over episodes; what they share is found once.

    What does not depend on the ratio lies in `episodes` and `model`, and is found once for all ratios that are given with them.
    """
    after = weights_after(episodes, ratio)
    weight, last, total = after[:, 1:], after[:, -1:], episodes.return_[:, None]
    reward = discounted_rewards(episodes)
    return {
        "TIS": plain(last, total),
        "PDIS": plain(weight, reward),
        "WIS": normalised(last, total),
        "WPDIS": normalised(weight, reward),
        "DR": model.corrected(weight),
        "WDR": model.normalised(after),
    }


def refitted(
    terms_of: Callable[[Float64[np.ndarray, "rows"]], Mapping[str, Terms]],
    refit: Refit,
    episodes: Episodes,
    samples: Samples,
    level: float,
    unit: Units | None = None,
    over: str = "episodes",
) -> dict[str, Interval]:
    """Percentile bootstrap over episodes that fits the propensities again in each of its first REFITS samples.

    `terms_of` are the estimators by name, given the propensity of every row. Taken as given, propensities that were estimated
    on the same episodes would make an interval of importance sampling too wide: Hirano, Imbens & Ridder (2003).
    """
    estimates = {name: terms.estimate() for name, terms in terms_of(episodes.action_prob).items()}
    rows = itertools.chain.from_iterable([samples] if isinstance(samples, np.ndarray) else samples)
    found = []
    for row in itertools.islice(rows, REFITS):
        count = row if unit is None else row[unit]
        share = count.astype(np.float64) / count.sum(dtype=np.float64)
        found.append([terms.estimate(share) for terms in terms_of(refit(share * len(share))).values()])
    ends = np.quantile(np.array(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
    method = f"percentile bootstrap over {over}, propensities fitted again in every sample"
    return {
        name: Interval(estimates[name], float(low), float(high), level, method)
        for name, low, high in zip(estimates, *ends, strict=True)
    }


def estimate(
    episodes: Episodes,
    ratios: Sequence[Float64[np.ndarray, "rows"]],
    fqe: FQEValues,
    samples: Samples,
    refit: Refit | None = None,
    unit: Units | None = None,
) -> list[Estimates]:
    """All estimators of the value of each policy of `fqe`, whose ratios are given, on the same bootstrap samples.

    Each sample is drawn and gone through once for all policies. What lies past a truncation is the policy's fitted value in
    all of its estimators. `refit` fits estimated propensities again. `unit` is the entity of each episode, where entities have
    several: samples and standard errors are then of entities.
    """
    found, terms = [dict[str, Interval]() for _ in ratios], dict[tuple[int, str], Terms]()
    over = "episodes" if unit is None else "entities"
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # weights of long episodes may overflow; then there is no estimate
        for policy, ratio in enumerate(ratios):
            valued = completed(episodes, fqe.next_v[policy])
            model = Model.of(valued, fqe.q[policy], fqe.v[policy])
            if refit is None:
                terms |= {(policy, name): by(each, unit) for name, each in all_terms(valued, ratio, model).items()}
            else:
                again = partial(_reweighted, valued, ratio * episodes.action_prob, model)
                found[policy] |= refitted(again, refit, episodes, samples, LEVEL, unit, over)
        if terms:
            for (policy, name), interval in bootstrap_all(terms, samples, LEVEL, over=over).items():
                found[policy][name] = interval
        for policy, intervals in enumerate(found):
            intervals["FQE"] = ensemble(fqe.members(policy), per_unit(fqe.initial[policy].mean(0), unit), LEVEL)
        return [Estimates.of(each, episodes, ratio, unit) for each, ratio in zip(found, ratios, strict=True)]


def _reweighted(
    episodes: Episodes,
    probs: Float64[np.ndarray, "rows"],
    model: Model,
    action_prob: Float64[np.ndarray, "rows"],
) -> dict[str, Terms]:
    """The terms by other propensities; `probs` are those of the logged actions, under the policy."""
    return all_terms(episodes, probs / action_prob, model)
