"""Every estimate of the policy's value, the difference to what was logged, and the answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from offrl_models.assess.overlap import Check
from offrl_models.assess.values import Values, logged_returns
from offrl_models.ope.behavior import estimate_propensities
from offrl_models.ope.diagnostics import (
    effective_sample_size,
    gamma_star,
    largest_share,
    pareto_k,
    pareto_k_limit,
    without_most_influential,
)
from offrl_models.ope.doubly_robust import Model
from offrl_models.ope.estimates import LEVEL, all_terms, refitted
from offrl_models.ope.importance import Samples, Terms, pdis, tis, trajectory_weights, wis, wpdis
from offrl_models.ope.intervals import (
    Interval,
    bootstrap_all,
    confidence_sequence_lower_bound,
    difference,
)
from offrl_models.ope.sequences import completed
from offrl_models.ope.units import Units, by, pooled
from offrl_models.schema import Episodes

BANDIT = {"TIS": "IPW", "WIS": "SNIPW", "DR": "DR", "WDR": "SNDR"}  # what estimators are called at horizon 1
MODELLED = ("MDR", "DM")  # estimators that no propensity of a single row enters, once their model is fitted
UNITS = "entities, or groups of them where there are many"  # that are resampled
ROUNDING = 1e-12  # of the largest return: a difference that is smaller is 0
LEAST_SHOWN = 1e-4  # weight of an episode; smaller ones are drawn there


@dataclass(frozen=True)
class Gain:
    """The policy's value minus the logged one, with a one-sided bound on either side."""

    estimator: str
    estimate: float
    lower_bound: float
    upper_bound: float
    level: float  # of each bound
    largest_share: float  # what one entity contributes to the sum of all, without their signs


def every_terms(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], values: Values | None) -> dict[str, Terms]:
    """Every estimator that there are nuisances for, by the name it has at this horizon."""
    if values is None:
        plain = {"TIS": tis, "PDIS": pdis, "WIS": wis, "WPDIS": wpdis}
        found = {name: estimator(episodes, ratio) for name, estimator in plain.items()}
    else:
        valued = completed(episodes, values.next_v)
        found = all_terms(valued, ratio, Model.of(valued, values.q, values.v))
    if (episodes.length == 1).all() and episodes.terminated.all():
        found = {BANDIT[name]: terms for name, terms in found.items() if name in BANDIT}
    elif values is not None and values.gains is not None:
        found["MDR"] = Terms((values.gains + logged_returns(episodes, values))[:, None])
    if values is not None and isinstance(values.direct, Terms):
        found["DM"] = values.direct
    return found


def intervals(terms: Mapping[str, Terms], samples: Samples, unit: Int64[np.ndarray, "episodes"]) -> dict[str, Interval]:
    """Percentile bootstraps over units. NaN where weights overflow, or where a sample has none at some step."""
    usable = {name: pooled(term, unit) for name, term in terms.items() if _is_finite(term)}
    found = bootstrap_all(usable, samples, LEVEL, over=UNITS)
    nothing = Interval(np.nan, np.nan, np.nan, LEVEL, "the importance weights overflow")
    return {name: found.get(name, nothing) for name in terms}


def refitted_intervals(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    values: Values | None,
    states: int,
    samples: Samples,
    unit: Int64[np.ndarray, "episodes"],
) -> dict[str, Interval]:
    """The same where propensities were counted in these very episodes: they are counted again in every sample.

    Of the estimators that weigh with them; MDR, whose weights are of a model, and DM take what was fitted as given.
    """
    taken = ratio * episodes.action_prob

    def terms_of(action_prob: Float64[np.ndarray, "rows"]) -> dict[str, Terms]:
        again = every_terms(episodes, taken / action_prob, values)
        return {name: pooled(term, unit) for name, term in again.items() if name in finite}

    weighed = {name: term for name, term in every_terms(episodes, ratio, values).items() if name not in MODELLED}
    finite = [name for name, term in weighed.items() if _is_finite(term)]
    return refitted(
        terms_of,
        lambda copies: estimate_propensities(episodes, states, copies[unit]),
        episodes,
        samples,
        LEVEL,
        over=UNITS,
    )


def _is_finite(terms: Terms) -> bool:
    return all(bool(np.isfinite(part).all()) for part in (terms.numerator, terms.denominator) if part is not None)


def headline(terms: Mapping[str, Terms]) -> str:
    """The estimator that the difference is read off: the least variable of those that some nuisances may get wrong."""
    return next(name for name in ("MDR", "WDR", "DR", "SNIPW", "WPDIS") if name in terms)


def gain(
    name: str,
    minuend: Terms,
    base: Terms,
    unit: Int64[np.ndarray, "episodes"],
    alpha: float,
    entity: Units | None = None,
    unseen: float = 0.0,
) -> Gain:
    """The paired difference and its bounds, asymptotic confidence sequences of what each unit contributes. `entity` is that of
    each episode, where entities have several; a unit is one or more of them. `unseen` is missing from the variance over episodes.

    All NaN where weights overflow, or are all 0 at some step.
    """
    apart = difference(minuend, base)
    paired = pooled(apart, unit)
    estimate = paired.estimate() if _is_finite(paired) else np.nan
    if not np.isfinite(estimate):
        return Gain(name, np.nan, np.nan, np.nan, 1 - alpha, np.nan)
    each = estimate + paired.influence()
    more = unseen * len(each) / len(unit)
    lower = confidence_sequence_lower_bound(each, alpha=alpha, planned=len(each), unseen=more)
    upper = -confidence_sequence_lower_bound(-each, alpha=alpha, planned=len(each), unseen=more)
    share = largest_share(estimate + by(apart, entity).influence())
    center, low, high = (_snapped(value, base) for value in (estimate, lower, upper))
    return Gain(name, center, low, high, 1 - alpha, share)


def _snapped(value: float, base: Terms) -> float:
    """0 where only rounding keeps a difference to these returns from it."""
    return 0.0 if abs(value) <= ROUNDING * np.abs(base.numerator).max() else value


def tail(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], logged: float) -> dict[str, Any]:
    """How the weight of episodes is spread: for the plot, and for whoever asks how much hangs on few of them."""
    weight = trajectory_weights(episodes, ratio)
    if not np.isfinite(weight).all():
        return {"overflow": int((~np.isfinite(weight)).sum())}
    positive = weight[weight > 0]
    shown = np.log10(np.maximum(positive, LEAST_SHOWN))
    counts, edges = np.histogram(shown, 40) if len(positive) else (np.zeros(0), np.zeros(0))
    sensitive = episodes.n_actions > 0 and bool(positive.size) and episodes.gamma > 0
    return {
        "counts": [int(count) for count in counts],
        "log10_edges": [float(edge) for edge in edges],
        "zero": int((weight == 0).sum()),
        "largest": float(weight.max()),
        "largest_share": float(weight.max() / weight.sum()) if len(positive) else 0.0,
        "effective_episodes": effective_sample_size(weight),
        "pareto_k": pareto_k(weight),
        "pareto_k_limit": pareto_k_limit(len(weight)),
        "gamma_star": gamma_star(episodes, ratio, logged) if sensitive else np.nan,
    }


def influence(minuend: Terms, base: Terms, entity: Units | None = None) -> float:
    """The difference without the episodes, or entities where they have several, that pull it most; NaN where there is none."""
    if not (_is_finite(minuend) and _is_finite(base) and np.isfinite(minuend.estimate())):
        return np.nan
    return _snapped(without_most_influential(by(minuend, entity), by(base, entity)), base)


def ends(found: Gain) -> str:
    """What the ends of the interval hold for."""
    level = f"{found.level:.1%}".replace(".0%", "%")
    if found.estimator == "WPDIS":  # see loss_check
        return f"the lower end at {level} confidence and the upper end at less"
    return f"each end at {level} confidence"


def answer(found: Gain, said: list[Check]) -> tuple[str, str]:
    """One word, and one sentence that says why."""
    level = f"{found.level:.1%}".replace(".0%", "%")
    broken = [each for each in said if not each.holds]
    grave = next((each for each in broken if each.grave), None)
    if grave:
        return "unusable", f"These logs cannot judge this policy: {grave.sentence}."
    if not np.isfinite([found.estimate, found.lower_bound, found.upper_bound]).all():
        return (
            "unsettled",
            "These logs cannot tell: at some step hardly any logged episode does what the policy would do.",
        )
    size = f"by {abs(found.estimate):.4g} per episode ({found.estimator})"
    if found.upper_bound < 0 and not broken:
        return "worse", (
            f"The policy is worse than the one that wrote the logs, {size}, and by at least {-found.upper_bound:.4g} at {level} "
            "confidence."
        )
    if found.lower_bound > 0 and not broken:
        return "better", (
            f"The policy is better than the one that wrote the logs, {size}, and by at least {found.lower_bound:.4g} at {level} "
            "confidence."
        )
    between = f"between {found.lower_bound:+.4g} and {found.upper_bound:+.4g}, {ends(found)}"
    settled = found.lower_bound > 0 or found.upper_bound < 0
    reasons = [each for each in broken if settled or each.name != "influence"]
    why = f"; {reasons[0].sentence}" if reasons else ""
    return "unsettled", (
        "These logs do not settle whether the policy is better than the one that wrote them: the difference is "
        f"{found.estimate:+.4g} per episode ({found.estimator}), {between}{why}."
    )
