"""Everything one evaluation says about one policy: all estimators with intervals, and effective sample sizes."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float64

from offrl_models.logs.tally import zero_mean_z
from offrl_models.measures import enough_effective
from offrl_models.ope.diagnostics import effective_sample_size
from offrl_models.ope.doubly_robust import Model, weights_after
from offrl_models.ope.fqe import FQEValues
from offrl_models.ope.importance import Samples, Terms, discounted_rewards, normalised, plain, trajectory_weights
from offrl_models.ope.intervals import Interval, bootstrap_all, ensemble
from offrl_models.ope.sequences import completed, weights_by_step
from offrl_models.ope.units import Units, by, independent, per_unit, summed
from offrl_models.schema import Episodes

LEVEL = 0.95  # of the two-sided intervals in reports
ESTIMATORS = ("TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR", "FQE")
WHOLE, UNWEIGHTED = ("TIS", "WIS"), ("FQE", "DM", "MDR")  # by weights of whole episodes, and by none that are products
MISSED = 2.0  # see doubted
SURPRISES = 20  # returns unlike the mean: with fewer of them intervals are too narrow, whatever the weights
REFITS = 200  # bootstrap samples, where propensities are fitted again in each

Refit = Callable[[Float64[np.ndarray, "episodes"]], Float64[np.ndarray, "rows"]]  # propensities, of counted episodes


@dataclass(frozen=True)
class Estimates:
    """Intervals by estimator; how many equally weighted episodes, or entities, the weights of whole episodes are worth; and the
    estimators that are `doubted`."""

    intervals: dict[str, Interval]
    effective_episodes: float
    doubted: list[str]

    @classmethod
    def of(
        cls, intervals: dict[str, Interval], episodes: Episodes, ratio: Float64[np.ndarray, "rows"], unit: Units | None
    ) -> "Estimates":
        """Intervals that are made with these ratios."""
        effective = effective_sample_size(summed(trajectory_weights(episodes, ratio), unit))
        return cls(intervals, effective, doubted(intervals, episodes, ratio, unit))

    def to_json(self) -> dict[str, Any]:
        return {
            "estimates": {name: interval.to_json() for name, interval in self.intervals.items()},
            "effective_episodes": self.effective_episodes,
            "doubted": self.doubted,
        }


def doubted(
    names: Iterable[str], episodes: Episodes, ratio: Float64[np.ndarray, "rows"], unit: Units | None
) -> list[str]:
    """Estimators whose weights speak against their intervals: worth too few episodes, or entities, or of a mean that is more than
    MISSED standard errors below 1, which it is in expectation. Weights that are large and rare are then likely to be missing, and
    without them few episodes look like many.

    TIS and WIS are asked for the weights of whole episodes, the others for those up to every step. Where rewards are so rare that
    the log shows few, all are doubted.
    """
    if effective_sample_size(np.square(summed(episodes.return_ - episodes.return_.mean(), unit))) < SURPRISES:
        return list(names)
    enough, trusted = enough_effective(independent(episodes)), []
    with np.errstate(over="ignore", invalid="ignore"):  # a mean of weights that overflow is no number, and not trusted
        for weight in weights_by_step(episodes, ratio).T:
            missed = -zero_mean_z(summed(weight - 1.0, unit))
            trusted.append(effective_sample_size(summed(weight, unit)) >= enough and missed <= MISSED)
    last, every = trusted[-1], all(trusted)
    return [name for name in names if name not in UNWEIGHTED and not (last if name in WHOLE else every)]


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
