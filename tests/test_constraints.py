"""Costs and groups where the state is no Markov state for them: what leg A says of them is not believed."""

import math
from dataclasses import replace

import numpy as np
import pytest

from offrl_models import legs
from offrl_models.choices import Probabilities
from offrl_models.constraints import Held, costs, groups
from offrl_models.gate import GateConfig
from offrl_models.ope.tabular import TabularModel
from offrl_models.schema import Episodes, Feature

STEPS = 4
STATES = 2 * STEPS
THRESHOLDS = GateConfig(constraints={"now": 1.0, "later": 1.0}, subgroups=("ward",))


def logged(episodes: int, seed: int) -> Episodes:
    """States are coins beside the step, and actions are coins. A cost is paid for an action at once, another one a step later."""
    rng, rows = np.random.default_rng(seed), episodes * STEPS
    step, action = np.tile(np.arange(STEPS), episodes), rng.integers(0, 2, rows)
    state = 2 * step + rng.integers(0, 2, rows)
    later = np.where(step > 0, np.append(0, action[:-1]), 0).astype(float)
    return Episodes(
        episode_id=np.arange(episodes), offsets=np.arange(episodes + 1) * STEPS,
        observation=state[:, None].astype(np.float32), final_observation=np.zeros((episodes, 1), np.float32),
        action=action, mask=np.ones((rows, 2), bool), reward=0.2 * action + 0.1 * rng.normal(size=rows),
        terminated=step == STEPS - 1, truncated=np.zeros(rows, bool), action_prob=np.full(rows, 0.5), gamma=1.0,
        features=(Feature("s", STATES),), costs={"now": action.astype(float), "later": later},
        labels={"ward": np.arange(episodes) % 2},
    )  # fmt: skip


FITTED_ON, GATE = logged(4000, 1), logged(4000, 2)
OFTEN = 0.8  # how often the policy acts, where the log does so half of the time


def everything(markov: bool, informs: bool, states: int | None = STATES) -> tuple[Held, legs.Side, legs.Paired]:
    table = np.array([[1 - OFTEN, OFTEN]] * STATES)
    fitted, judged = (Probabilities(log, table[log.observation[:, 0].astype(int)]) for log in (FITTED_ON, GATE))
    nothing = np.zeros(GATE.n_rows)
    side = legs.Side(fitted, judged, judged.ratio(), nothing, nothing, nothing)
    leg = legs.paired(side, side, FITTED_ON, GATE, TabularModel.fit(FITTED_ON, STATES))
    assert isinstance(leg, legs.Paired)
    return Held(FITTED_ON, GATE, None, 0.05, states, THRESHOLDS, markov=markov, informs=informs), side, leg


@pytest.mark.parametrize(("markov", "informs"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_cost_that_the_state_does_not_tell_is_measured_by_weights_or_not_at_all(markov: bool, informs: bool) -> None:
    held, side, leg = everything(markov, informs)
    now, later = costs(held, [side], [leg], leg)
    for cost, rise, believed in ((now, STEPS * (OFTEN - 0.5), markov), (later, (STEPS - 1) * (OFTEN - 0.5), False)):
        assert cost.difference == pytest.approx(rise, abs=0.1), cost.name
        if believed or informs:
            assert cost.lower_bound < rise < cost.upper_bound < rise + 0.4
        else:
            assert (cost.lower_bound, cost.upper_bound) == (-math.inf, math.inf)


@pytest.mark.parametrize(("markov", "informs"), [(True, False), (False, True), (False, False)])
def test_groups_are_measured_by_what_is_believed(markov: bool, informs: bool) -> None:
    held, _, leg = everything(markov, informs)
    by_weights = leg.outcome + 5.0  # of another mean, to be told apart
    wards = groups(held, leg, by_weights)
    assert [ward.name for ward in wards] == ["ward 0", "ward 1"]
    for ward in wards:
        assert ward.difference == pytest.approx(STEPS * 0.2 * (OFTEN - 0.5) + 5.0 * (not markov and informs), abs=0.05)
        assert math.isfinite(ward.lower_bound) == math.isfinite(ward.upper_bound) == (markov or informs)


def test_a_group_without_gate_episodes_has_no_bounds() -> None:
    held, _, leg = everything(True, True)
    labels = {"ward": np.where(np.arange(FITTED_ON.n_episodes) < 9, 7, FITTED_ON.labels["ward"])}
    wards = groups(replace(held, fitted_on=replace(FITTED_ON, labels=labels)), leg, leg.outcome)
    assert [(ward.name, ward.episodes > 0) for ward in wards] == [("ward 0", True), ("ward 1", True), ("ward 7", False)]
    assert (wards[2].lower_bound, wards[2].upper_bound) == (-math.inf, math.inf)


def test_without_a_table_of_states_there_is_nothing_to_hold_against_it() -> None:
    held, side, leg = everything(True, False, None)
    now, _ = costs(held, [side], [leg], leg)
    assert math.isfinite(now.upper_bound)


def test_a_rise_over_a_champion_who_does_the_same_is_none() -> None:
    held, side, leg = everything(True, True)
    for cost in costs(held, [side] * 2, [leg] * 2, leg):
        assert cost.difference == 0.0
