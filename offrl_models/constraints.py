"""What a policy does to costs and to groups, beside the value: contrasts to the champion that the gate holds to limits.

They are those of leg A as long as nothing speaks against a Markov state. Where something does, in what follows a decision or in the
cost that is asked about, per-decision importance sampling takes its place, and leg C for groups; without enough episodes behind
it, and among groups of too few episodes, there are no bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from offrl_models import legs
from offrl_models.gate import GateConfig
from offrl_models.measures import Contrast
from offrl_models.ope.markov import markov_z
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.units import Units
from offrl_models.schema import Episodes

NOT_MARKOV = "what happens next depends on more than the state"


@dataclass(frozen=True)
class Held:
    """The logs, and how they are asked."""

    fitted_on: Episodes
    episodes: Episodes
    unit: Units | None
    alpha: float
    states: int | None
    thresholds: GateConfig
    markov: bool  # nothing speaks against the state for the reward
    informs: bool  # enough episodes stand behind weights of whole ones


def unbounded(found: Contrast) -> Contrast:
    return replace(found, lower_bound=-math.inf, upper_bound=math.inf)


def costs(
    held: Held, sides: Sequence[legs.Side], paired: Sequence[legs.Paired | str], leg: legs.Paired
) -> list[Contrast]:
    """The rise of every cost over the champion's; one whose weights overflow is not measured.

    `sides` and `paired` are of the policy and, where that is not who wrote the log, of the champion; `leg` is of both.
    """
    measured, planned = [], held.thresholds.planned_episodes
    for cost in held.thresholds.constraints:
        believed = held.markov and _is_markov(cost, held)
        with np.errstate(over="ignore", invalid="ignore"):
            rise, *base = [
                legs.cost_outcome(
                    cost, side, each if believed else NOT_MARKOV, held.fitted_on, held.episodes, held.states
                )
                for side, each in zip(sides, paired, strict=True)
            ]
            rise = rise - base[0] if base else rise
        if legs.has_spread(rise):
            unseen = legs.unseen(leg, held.episodes.costs[cost], held.episodes)
            contrast = legs.contrast(cost, rise, held.alpha, planned, held.unit, unseen)
            measured.append(contrast if believed or held.informs else unbounded(contrast))
    return measured


def _is_markov(cost: str, held: Held) -> bool:
    """Whether nothing speaks against the state for a cost, as it is asked of the reward."""
    if held.states is None:
        return True
    fitted_on, gate = (replace(log, reward=log.costs[cost]) for log in (held.fitted_on, held.episodes))
    model = TabularModel.fit(fitted_on, held.states)
    return model is None or markov_z(model, fitted_on, gate) < held.thresholds.markov_z


def groups(held: Held, leg: legs.Paired, trajectory: Float64[np.ndarray, "episodes"]) -> list[Contrast]:
    """The difference among the episodes of each group of each label column. `trajectory` is leg C.

    A group that the gate split has no episode of has no bounds.
    """
    by_weights = not held.markov and held.informs
    leg = replace(leg, outcome=trajectory) if by_weights else leg
    planned = held.thresholds.planned_episodes
    measured = legs.by_subgroup(leg, held.episodes, held.thresholds.subgroups, held.alpha, planned, held.unit)
    known = measured if held.markov or by_weights else [unbounded(group) for group in measured]
    return [*known, *_without_episodes(held, {group.name for group in measured})]


def _without_episodes(held: Held, measured: set[str]) -> list[Contrast]:
    """The groups of which all episodes fell into other splits."""
    none = None if held.unit is None else 0
    logged = {
        f"{column} {group}"
        for column in held.thresholds.subgroups
        for group in np.unique(held.fitted_on.labels.get(column, []))
    }
    return [Contrast(name, 0, 0.0, -math.inf, math.inf, none) for name in sorted(logged - measured)]
