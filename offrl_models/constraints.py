"""What a policy does to costs and to groups, beside the value: contrasts to the champion that the gate holds to limits.

They are those of leg A as long as nothing speaks against a Markov state. Where something does, in what follows a decision or in the
cost that is asked about, weights of whole decisions take its place, and leg C for groups; without enough episodes behind these, and
among groups of too few episodes, there are no bounds.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from offrl_models import legs
from offrl_models.gate import GateConfig
from offrl_models.measures import Contrast
from offrl_models.ope.markov import markov_z
from offrl_models.ope.tabular import TabularModel

if TYPE_CHECKING:
    from offrl_models.evaluation import Evaluation, Question

NOT_MARKOV = "what happens next depends on more than the state"


def unbounded(found: Contrast) -> Contrast:
    return replace(found, lower_bound=-math.inf, upper_bound=math.inf)


def costs(
    name: str,
    found: "Evaluation",
    thresholds: GateConfig,
    asked: "Question",
    paired: Mapping[str, legs.Paired | str],
    leg: legs.Paired,
    *,
    markov: bool,
    informs: bool,
) -> list[Contrast]:
    """The rise of every cost; one whose weights overflow is not measured.

    `markov`: nothing speaks against the state for the reward. `informs`: enough episodes stand behind weights of whole ones.
    """
    planned, unit, paid = thresholds.planned_episodes, found.unit, found.episodes.costs
    measured = []
    for cost in thresholds.constraints:
        believed = markov and _is_markov(cost, found, asked.states, thresholds.markov_z)
        with np.errstate(over="ignore", invalid="ignore"):
            rise = _rise(cost, name, found, asked, paired if believed else dict.fromkeys(paired, NOT_MARKOV))
        if legs.has_spread(rise):
            unseen = legs.unseen(leg, paid[cost], found.episodes)
            contrast = legs.contrast(cost, rise, asked.alpha, planned, unit, unseen)
            measured.append(contrast if believed or informs else unbounded(contrast))
    return measured


def _is_markov(cost: str, found: "Evaluation", states: int | None, limit: float) -> bool:
    """Whether nothing speaks against the state for a cost, as it is asked of the reward."""
    if states is None:
        return True
    fitted_on, gate = (replace(log, reward=log.costs[cost]) for log in (found.fitted_on, found.episodes))
    model = TabularModel.fit(fitted_on, states)
    return model is None or markov_z(model, fitted_on, gate) < limit


def _rise(
    cost: str, name: str, found: "Evaluation", asked: "Question", paired: Mapping[str, legs.Paired | str]
) -> Float64[np.ndarray, "episodes"]:
    """Per episode a number whose mean is the rise in the expected total of a cost over the champion's."""

    def rise(policy: str) -> np.ndarray:
        leg = paired[policy]
        return legs.cost_outcome(cost, found.side(policy), leg, found.fitted_on, found.episodes, asked.states)

    return rise(name) if asked.champion == legs.BEHAVIOR else rise(name) - rise(asked.champion)


def groups(
    found: "Evaluation",
    thresholds: GateConfig,
    asked: "Question",
    leg: legs.Paired,
    trajectory: Float64[np.ndarray, "episodes"],
    *,
    markov: bool,
    informs: bool,
) -> list[Contrast]:
    """The difference among the episodes of each group of each label column. `trajectory` is leg C."""
    log, columns, planned = found.episodes, thresholds.subgroups, thresholds.planned_episodes
    by_weights = not markov and informs
    leg = replace(leg, outcome=trajectory) if by_weights else leg
    measured = legs.by_subgroup(leg, log, columns, asked.alpha, planned, found.unit)
    return measured if markov or by_weights else [unbounded(group) for group in measured]
