"""What each leg of the gate says of a policy against the champion, from the episodes of the gate split.

Leg A is the primary one: per episode a marginalised doubly robust pseudo-outcome whose mean is the difference in value, and an
asymptotic confidence sequence around it. Leg B needs no model and no large numbers, leg C is trajectory-wise doubly robust.
Leg D, the ensemble of fitted Q evaluations, is read off the fit itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64

from offrl_models.choices import Choices, Probabilities
from offrl_models.measures import Contrast
from offrl_models.ope.diagnostics import without_most_influential
from offrl_models.ope.doubly_robust import dr
from offrl_models.ope.eprocess import e_value
from offrl_models.ope.fitted_ratios import Refusal, fit_ratios
from offrl_models.ope.flow import Flow
from offrl_models.ope.importance import Terms, pdis, trajectory_weights
from offrl_models.ope.intervals import confidence_sequence_lower_bound
from offrl_models.ope.marginal import bellman_errors, paired_differences, policy_table, value_gains
from offrl_models.ope.sequences import completed
from offrl_models.ope.surprises import unseen_variance
from offrl_models.ope.tabular import RATIO_LIMIT, TabularModel, states_of
from offrl_models.ope.units import Units, independent, per_unit, planned_units
from offrl_models.schema import Episodes

Rows = Bool[np.ndarray, "rows"] | slice

BEHAVIOR = "behavior"  # the policy that wrote the log
FEWEST_BOUNDED = 30  # episodes of a group, or entities where one has several
CERTAIN = 0.999  # a propensity above it leaves nothing to compare with
GATE_PER_FITTED = 2.0  # with more to judge on the interval shrinks below the error of the nuisances


@dataclass(frozen=True)
class Side:
    """One policy on the gate episodes and on those that its nuisances were fitted on."""

    fitted: Choices
    judged: Choices
    ratio: Float64[np.ndarray, "rows"]
    q: Float64[np.ndarray, "rows"]  # of the logged action, by FQE
    v: Float64[np.ndarray, "rows"]
    next_v: Float64[np.ndarray, "rows"]  # zero but in truncated rows


@dataclass(frozen=True)
class Paired:
    """Leg A: per episode a number whose mean is V(policy) - V(behavior), and the weight of every transition."""

    outcome: Float64[np.ndarray, "episodes"]
    weight: Float64[np.ndarray, "rows"]
    correction: Float64[
        np.ndarray, "rows"
    ]  # what each row adds by its weight: gamma^t w_t [r_t + gamma V(s_t+1) - Q(s_t, a_t)]
    method: str
    error: Float64[np.ndarray, "rows"] | float = 0.0  # Bellman error of each row; 0 where nothing is known of it
    behavior_weight: Float64[np.ndarray, "rows"] | float = 1.0  # above 1 where rows stand for what was cut off
    visits: Float64[np.ndarray, "rows"] | float = 1.0  # of the policy for one of the log, in the state of each row


def paired(side: Side, behavior: Side, fitted_on: Episodes, gate: Episodes, model: TabularModel | None) -> Paired | str:
    """Leg A of one policy, or the sentence that says why there is none."""
    if (gate.length == 1).all() and gate.terminated.all():
        return Paired(_gains(gate, side, side.ratio, behavior, np.ones(gate.n_rows)), side.ratio,
                      *_correction(gate, side, side.ratio, "doubly robust paired difference"))  # fmt: skip
    fitted, judged = independent(fitted_on), independent(gate)
    if judged > GATE_PER_FITTED * fitted:
        what = "episodes" if judged == gate.n_episodes else "entities"
        return (
            f"its weights and values are fitted on {fitted:,} {what}, and with {judged:,} to judge on their error would be more "
            "than the interval says"
        )
    if model is None:
        return _fitted(side, behavior, fitted_on, gate)
    table = _table(side, len(model.initial))
    if table is None:
        return "the policy depends on more than the state, such as a mask, so that the state alone is not Markov for it"
    found = paired_differences(model, table, gate, side.ratio)
    if found is None:
        return "the policy never ends an episode in the model of the log, so that its value does not exist"
    visits = np.minimum(model.recorded_state_ratio(table), RATIO_LIMIT)[states_of(gate)[0]]
    correction = gate.time_discount * found.weight * found.error
    method = "marginalised doubly robust paired difference"
    return Paired(found.outcome, found.weight, correction, method, found.error, visits=visits)


def _table(side: Side, states: int) -> Float64[np.ndarray, "states actions"] | None:
    """The policy by state; None where it depends on more than that."""
    parts = [(part.episodes, part.probs) for part in (side.fitted, side.judged) if isinstance(part, Probabilities)]
    return policy_table(parts, states) if len(parts) == 2 else None


def _fitted(side: Side, behavior: Side, fitted_on: Episodes, gate: Episodes) -> Paired | str:
    """Leg A where the observation is not one category: visit ratios that are fitted, and trusted only when they balance."""
    ratio = side.fitted.taken / fitted_on.action_prob
    found = fit_ratios(Flow.by_state(fitted_on, ratio)).weights(Flow.by_state(gate, side.ratio))
    if isinstance(found, Refusal):
        return found.reason.rstrip(".")
    behavior_weight = np.ones(gate.n_rows)
    if gate.truncated.any():
        base = fit_ratios(Flow.by_state(fitted_on, np.ones(fitted_on.n_rows))).weights(
            Flow.by_state(gate, behavior_weight)
        )
        if isinstance(base, Refusal):
            return f"what truncations cut off cannot be made up for: {base.reason.rstrip('.')}"
        behavior_weight = base.weight
    outcome = _gains(gate, side, found.weight, behavior, behavior_weight)
    method = "doubly robust paired difference with fitted visit ratios"
    return Paired(outcome, found.weight, *_correction(gate, side, found.weight, method), behavior_weight, found.omega)


def _gains(
    gate: Episodes,
    side: Side,
    weight: Float64[np.ndarray, "rows"],
    behavior: Side,
    behavior_weight: Float64[np.ndarray, "rows"],
) -> Float64[np.ndarray, "episodes"]:
    return value_gains(gate, weight, side.q, side.v, side.next_v, behavior_weight, behavior.v, behavior.next_v)


def _correction(
    gate: Episodes, side: Side, weight: Float64[np.ndarray, "rows"], method: str
) -> tuple[Float64[np.ndarray, "rows"], str, Float64[np.ndarray, "rows"]]:
    error = bellman_errors(gate, side.q, side.v, side.next_v)
    return gate.time_discount * weight * error, method, error


def unseen(
    leg: Paired, surprise: Float64[np.ndarray, "rows"] | float, log: Episodes, rows: Rows = slice(None)
) -> float:
    """What few surprises leave out of the variance of a difference; `surprise` is that of each row, of all episodes or of some."""
    shift, size = (
        np.broadcast_to(each, log.n_rows)[rows]
        for each in (log.time_discount * (leg.weight - leg.behavior_weight), surprise)
    )
    return unseen_variance(shift, size, len(np.unique(log.episode_of_row[rows])))


def widening(times: float) -> str:
    """What is said of an interval that is so many times as wide, where it shows."""
    return f", {times:.2f} times as wide for surprises that may not have come" if times >= 1.005 else ""


def contrast(
    name: str,
    outcome: Float64[np.ndarray, "episodes"],
    alpha: float,
    planned: int,
    unit: Units | None = None,
    unseen: float = 0.0,
) -> Contrast:
    """Mean and one-sided bounds, each by the asymptotic confidence sequence at 1 - alpha, over entities where `unit` tells them
    apart; tightest at `planned` episodes. `unseen` is missing from the variance over episodes."""
    values = per_unit(outcome, unit)
    planned = planned_units(planned, len(outcome), len(values))
    more = unseen * len(values) / len(outcome)
    lower = confidence_sequence_lower_bound(values, alpha=alpha, planned=planned, unseen=more)
    upper = -confidence_sequence_lower_bound(-values, alpha=alpha, planned=planned, unseen=more)
    return Contrast(name, len(outcome), float(outcome.mean()), lower, upper, None if unit is None else len(values))


def by_subgroup(
    found: Paired, gate: Episodes, columns: tuple[str, ...], alpha: float, planned: int, unit: Units | None = None
) -> list[Contrast]:
    """Leg A among the episodes of each group of each label column; its bounds, which are those of large numbers, are infinite
    where it is of fewer than FEWEST_BOUNDED."""
    contrasts = []
    for column in columns:
        labels = gate.labels[column].astype(str)
        for group in np.unique(labels):
            inside = labels == group
            who = None if unit is None else unit[inside]
            missing = unseen(found, found.error, gate, inside[gate.episode_of_row])
            found_there = contrast(f"{column} {group}", found.outcome[inside], alpha, planned, who, missing)
            few = found_there.independent < FEWEST_BOUNDED
            nothing = replace(found_there, lower_bound=-math.inf, upper_bound=math.inf)
            contrasts.append(nothing if few else found_there)
    return contrasts


def cost_outcome(
    column: str, side: Side, leg: Paired | str, fitted_on: Episodes, gate: Episodes, states: int | None
) -> Float64[np.ndarray, "episodes"]:
    """Per episode a number whose mean is the rise in the expected discounted total of a cost over the behavior's.

    Doubly robust where the observation is one category of `states`; by the weights of leg A elsewhere. Where leg A cannot be
    trusted, per-decision importance sampling of what was recorded.
    """
    model = TabularModel.fit(replace(fitted_on, reward=fitted_on.costs[column]), states) if states else None
    paid = replace(gate, reward=gate.costs[column])
    if isinstance(leg, str):
        return pdis(paid, side.ratio).numerator.sum(1) - paid.return_
    if model is not None:
        table = _table(side, len(model.initial))
        found = None if table is None else paired_differences(model, table, paid, side.ratio)
        if found is not None:
            return found[0]
    return gate.sum_per_episode((leg.weight - leg.behavior_weight) * gate.time_discount * gate.costs[column])


def has_spread(gains: Float64[np.ndarray, "episodes"]) -> bool:
    """Whether neither the numbers nor their squares overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.square(gains).sum()))


def visited(leg: Paired, mass: Float64[np.ndarray, "rows"]) -> float:
    """The mean over where the policy comes; 1 where that is nowhere in the log."""
    visits = np.broadcast_to(leg.visits, mass.shape)
    return float(np.average(mass, weights=visits)) if visits.any() else 1.0


def few_visits_mass(
    choices: Choices, logs: Sequence[Episodes], states: int | None, few: int
) -> Float64[np.ndarray, "rows"] | None:
    """The share of a policy's mass in each row of the last log where fewer rows than `few` in all logs show state and action; None
    without such cells."""
    if states is None or not isinstance(choices, Probabilities):
        return None
    gate = logs[-1]
    visits = np.zeros((states, gate.n_actions))
    for episodes in logs:
        np.add.at(visits, (episodes.observation[:, 0].astype(np.int64), episodes.action), 1.0)
    rare = visits[gate.observation[:, 0].astype(np.int64)] < few
    return (choices.probs * rare).sum(1)


def influence(outcome: Float64[np.ndarray, "units"]) -> float:
    """The mean without the 0.5% of the episodes, or entities, that pull it most in its own direction."""
    return without_most_influential(Terms(outcome[:, None]), Terms(np.zeros((len(outcome), 1))))


def sure_share(gate: Episodes) -> float:
    """The share of the rows with a choice in which the logged action was as good as certain (C18)."""
    if not gate.n_actions:  # a density may be as high as it likes
        return 0.0
    choice = gate.mask.sum(1) > 1
    return float((gate.action_prob[choice] > CERTAIN).mean()) if choice.any() else 1.0


def betting(side: Side, gate: Episodes, return_range: tuple[float, float], margin: float) -> float:
    """Leg B: the e-value against "no better than the policy that wrote the log, by more than the margin"."""
    return e_value(trajectory_weights(gate, side.ratio), gate.return_, return_range, max(margin, 0.0))


def trajectory_outcome(side: Side, gate: Episodes) -> Float64[np.ndarray, "episodes"]:
    """Leg C: the trajectory-wise doubly robust pseudo-outcome of each episode, whose mean estimates the value."""
    return dr(completed(gate, side.next_v), side.ratio, side.q, side.v).numerator.sum(1)
