"""What a log with few surprises does not show: bounds that know of it, in the gate and in `offrl evaluate`."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.calibration.judging import CONFIG, asked, on_a_log
from benchmarks.calibration.rare import BETTER, rare, world
from offrl_models import legs
from offrl_models.assess import overlap
from offrl_models.assess.values import Values
from offrl_models.evaluation import Evaluation, measure_rungs
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import confidence_sequence_lower_bound
from offrl_models.ope.marginal import bellman_errors
from offrl_models.ope.surprises import FEW, unseen_variance
from tests.conftest import chain_world

CLICK, SHARE = 0.01, 0.03
LOG = world(CLICK, CLICK, SHARE)


def never(seed: int) -> Evaluation:
    """A policy that never plays the rare action, which is as good as the other one."""
    return on_a_log(LOG, {"never": np.tile([1.0, 0.0], (3, 1))}, seed, 3_000, 3_000)


def test_by_hand() -> None:
    """Where 100 of 1,000 rows differ by 1 and show none of the 20 surprises of 1, a tenth of 0.02 is missing."""
    shift, surprise = np.zeros(1000), np.zeros(1000)
    shift[:100], surprise[500:520] = 1.0, 1.0
    expected = 100 * 20 / 1000
    assert unseen_variance(shift, surprise, 1000) == pytest.approx(0.1 * 0.02 * FEW / (FEW + expected))
    assert unseen_variance(-shift, -surprise, 500) == pytest.approx(2 * 0.1 * 0.02 * FEW / (FEW + expected))
    surprise[:2] = 1.0  # as many there as elsewhere
    surprise[518:] = 0.0
    assert unseen_variance(shift, surprise, 1000) == pytest.approx(0.0, abs=1e-15)
    surprise[2:10] = 1.0
    assert unseen_variance(shift, surprise, 1000) == 0.0  # more than elsewhere is seen
    assert unseen_variance(shift, np.zeros(1000), 1000) == unseen_variance(np.zeros(1000), surprise, 1000) == 0.0
    assert unseen_variance(np.full(1000, 1e200), surprise, 1000) == 0.0


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_it_is_a_variance_and_vanishes_in_long_logs(seed: int, more: float, larger: float) -> None:
    rng = np.random.default_rng(seed)
    shift, surprise = rng.normal(size=400), rng.normal(size=400) * np.exp(rng.normal(size=400))
    found = unseen_variance(shift, surprise, 100)
    order = rng.permutation(400)
    assert found >= 0.0 and unseen_variance(shift[order], surprise[order], 100) == pytest.approx(found, abs=1e-12)
    assert unseen_variance(more * shift, larger * surprise, 100) == pytest.approx(
        (more * larger) ** 2 * found, rel=1e-6
    )
    tens = [np.tile(each, 10) for each in (shift, surprise)]
    assert unseen_variance(tens[0], tens[1], 1000) <= found + 1e-12


def test_it_is_added_to_the_variance_of_the_values() -> None:
    values = np.random.default_rng(1).normal(size=500)
    plain, wide = (
        confidence_sequence_lower_bound(values, alpha=0.05, planned=500, unseen=u) for u in (0.0, 3 * values.var())
    )
    assert values.mean() - wide == pytest.approx(2 * (values.mean() - plain))
    unit = np.arange(500) // 2
    found = legs.contrast("x", values, 0.05, 500, unit, 0.5)
    apart = legs.contrast("x", values, 0.05, 500, unit)
    pairs = values.reshape(-1, 2).mean(1).var()
    more = np.sqrt((pairs + 0.25) / pairs)
    assert found.difference - found.lower_bound == pytest.approx(more * (apart.difference - apart.lower_bound))
    assert found.upper_bound - found.difference == pytest.approx(more * (apart.upper_bound - apart.difference))


def test_a_policy_that_is_no_better_is_not_told_from_the_behavior_by_clicks_that_did_not_come() -> None:
    wrong = {"as it is": 0, "not widened": 0}
    for seed in range(1, 31):
        found = never(seed)
        measures = measure_rungs(["never"], found, CONFIG, asked(3))[0].measures
        wrong["as it is"] += measures.lower_bound > 0
        wrong["not widened"] += (
            measures.difference - (measures.difference - measures.lower_bound) / measures.widened > 0
        )
    assert wrong["as it is"] <= 1 and wrong["not widened"] >= 4, wrong


def test_the_study_of_rare_rewards_shows_power_and_no_harm() -> None:
    found = rare(1)
    assert found[BETTER]["passes"][-1] == 1 and found[BETTER]["plain"][-1] == 1
    assert sum(sum(one["fails"]) for one in found.values()) == 0
    assert len(found) == 10 and all(len(each) == 4 for one in found.values() for each in one.values())
    assert all(
        above <= plain for one in found.values() for above, plain in zip(one["above"], one["plain"], strict=True)
    )


def test_against_a_champion_only_what_it_does_otherwise_counts() -> None:
    found = never(4)
    same = measure_rungs(["never"], found, CONFIG, replace(asked(3), champion="never"))[0]
    assert same.measures.widened == 1.0 and same.leg.outcome == pytest.approx(0.0, abs=1e-12)
    assert (same.measures.lower_bound, same.measures.upper_bound) == pytest.approx((0.0, 0.0), abs=1e-12)
    measures = measure_rungs(["never"], found, CONFIG, asked(3))[0].measures
    assert measures.widened > 4
    assert measures.bound.endswith(
        f"sequence, {measures.widened:.2f} times as wide for surprises that may not have come"
    )
    assert same.measures.bound.endswith("sequence")


def test_subgroups_and_costs_know_of_it() -> None:
    found = never(4)
    gate = found.episodes
    group = np.where(np.arange(gate.n_episodes) % 3 == 0, "a", "b")
    rare_cost = np.zeros(gate.n_rows)
    rare_cost[np.flatnonzero(gate.action == 0)[:20]] = 1.0  # and none where the rare action was played
    gate = replace(gate, labels={"group": group}, costs={"harm": rare_cost})
    train = replace(found.fitted_on, costs={"harm": np.roll(np.resize(rare_cost, found.fitted_on.n_rows), 7)})
    config = CONFIG.model_copy(update={"subgroups": ("group",), "constraints": {"harm": 0.1}})
    measured = measure_rungs(["never"], replace(found, episodes=gate, fitted_on=train), config, asked(3))[0]
    (leg, measures), planned = (measured.leg, measured.measures), config.planned_episodes
    for one, name in zip(measures.subgroups, ("a", "b"), strict=True):
        inside = group == name
        missing = unseen_variance(
            (leg.weight - 1.0)[inside], np.broadcast_to(leg.error, len(group))[inside], int(inside.sum())
        )
        assert missing > 0
        assert one == legs.contrast(one.name, leg.outcome[inside], measures.alpha, planned, unseen=missing)
    (cost,) = measures.costs
    side, states = found.side("never"), 3
    rise = legs.cost_outcome("harm", side, leg, train, gate, states)
    missing = unseen_variance(leg.weight - 1.0, rare_cost, gate.n_episodes)
    assert missing > 0 and cost == legs.contrast("harm", rise, measures.alpha, planned, unseen=missing)


@pytest.mark.parametrize("name", ["SNIPW", "WPDIS", "WDR", "MDR"])
def test_of_an_estimator_of_evaluate(name: str) -> None:
    """By its own weights, in row after row, and by the model's errors where there is a model."""
    log = chain_world().simulate(200, 1)
    if name == "SNIPW":
        log = log.take(log.length == 1)
    rng = np.random.default_rng(2)
    ratio, q, v = rng.uniform(0.5, 1.5, log.n_rows), rng.random(log.n_rows), rng.random(log.n_rows)
    zeros = np.zeros(log.n_rows)
    weight, sums, counts = np.ones(log.n_rows), np.zeros(log.length.max()), log.n_episodes
    for episode in range(log.n_episodes):
        rows = np.arange(log.offsets[episode], log.offsets[episode + 1])
        weight[rows] = np.cumprod(ratio[rows])
        sums[: len(rows)] += weight[rows]
        sums[len(rows) :] += weight[rows[-1]]
    weight /= (sums / counts)[log.step]
    values, surprise = None, log.reward - log.reward.mean()
    if name in ("WDR", "MDR"):
        given_weight = rng.uniform(0.5, 1.5, log.n_rows) if name == "MDR" else None
        weight = weight if given_weight is None else given_weight
        values, surprise = (
            Values(q, v, zeros, zeros, Terms(zeros[:, None]), "", weight=given_weight),
            bellman_errors(log, q, v, zeros),
        )
    wanted = unseen_variance(log.time_discount * (weight - 1.0), surprise, log.n_episodes)
    assert overlap.unseen(name, log, ratio, values) == pytest.approx(wanted, rel=1e-9, abs=1e-15) and wanted >= 0
