"""What rests on entities beyond the gate's own bounds, and what is told where there are too few of them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks.calibration import small
from offrl_models import course, legs, storage
from offrl_models.assess import _found, answer, values
from offrl_models.assess.target import FunctionPolicy, Target
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.gate import GateConfig, Status, judge, verdict_from_json
from offrl_models.ope import behavior
from offrl_models.ope.fitted_ratios import Weights, fit_ratios
from offrl_models.ope.flow import Flow
from offrl_models.ope.fqe import FQEValues
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import ensemble
from offrl_models.ope.sequences import ratios
from offrl_models.ope.units import per_unit
from offrl_models.reports import brief
from offrl_models.reports.detail import _draw_course
from offrl_models.schema import Episodes, Feature, InputError
from offrl_models.stages import behavior as stage
from offrl_models.stages.judging import require_enough
from tests.conftest import attributes
from tests.hand_made import GOOD
from tests.test_entities import COPIES, copied

WORLD = small.world()


def described(log: Episodes) -> Episodes:
    return dataclasses.replace(log, features=(Feature("state", WORLD.n_states),))


def flow(log: Episodes) -> Flow:
    state = log.observation[:, 0].astype(int)
    return Flow.by_state(log, ratios(log, small.better(WORLD, 0.05)[state]))


def test_copies_of_an_episode_fit_ratios_no_surer_than_one() -> None:
    log, judged = described(WORLD.simulate(400, 1)), described(WORLD.simulate(400, 2))
    one, many = (fit_ratios(flow(each), ridge=1e-3) for each in (log, copied(log)))
    assert many.coefficients == pytest.approx(one.coefficients, rel=1e-6)
    assert many.covariance == pytest.approx(one.covariance, rel=1e-6) and many.noise == pytest.approx(one.noise)
    mine, theirs = one.weights(flow(judged)), many.weights(flow(copied(judged)))
    assert isinstance(mine, Weights) and isinstance(theirs, Weights)
    for name, value in dataclasses.asdict(mine.checks).items():
        assert getattr(theirs.checks, name) == pytest.approx(value, rel=1e-5, abs=1e-9), name
    drawn = np.bincount(np.random.default_rng(0).integers(0, 400, 400), minlength=400) / 400
    one = fit_ratios(flow(log), ridge=1e-3, share=drawn)
    many = fit_ratios(flow(copied(log)), ridge=1e-3, share=np.repeat(drawn, COPIES) / COPIES)
    assert many.covariance == pytest.approx(one.covariance, rel=1e-6)


def test_an_entity_is_in_one_half_of_the_log() -> None:
    log = dataclasses.replace(WORLD.simulate(40, 1), entity=np.repeat(np.arange(20), 2))
    one, other = behavior.halves(log)
    assert one.n_episodes == other.n_episodes == 20
    assert one.entity is not None and other.entity is not None and not set(one.entity) & set(other.entity)


def test_a_clone_tells_propensities_of_entities_it_never_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured = attributes(WORLD.n_states, 4)
    configured["logs"] |= {"observation": [{"column": "state"}], "next_observation": None}
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    log = dataclasses.replace(WORLD.simulate(40, 1), entity=np.repeat(np.arange(20), 2))

    def cloned(pipeline: Pipeline, fitted_on: Episodes, task: str) -> None:
        raise RuntimeError(sorted(fitted_on.entity.tolist() if fitted_on.entity is not None else []))

    monkeypatch.setattr(stage, "_cloned", cloned)
    with pytest.raises(RuntimeError) as raised:
        stage._estimated(pipeline, "gate", log)
    (seen,) = raised.value.args
    assert len(seen) == 20 and seen[::2] == seen[1::2]  # both episodes of each


@pytest.mark.parametrize(("entities", "enough"), [(None, True), (4, True), (3, False)])
def test_three_patients_are_too_few_however_many_episodes_they_have(entities: int | None, enough: bool) -> None:
    log = WORLD.simulate(40, 1)
    log = log if entities is None else dataclasses.replace(log, entity=np.arange(40) % entities)
    if enough:
        require_enough(log)
    else:
        with pytest.raises(InputError, match="the gate split holds 3 entities, and fewer than 4 say nothing"):
            require_enough(log)


def test_evaluate_looks_at_entities_for_what_pulls_most(monkeypatch: pytest.MonkeyPatch) -> None:
    log = dataclasses.replace(WORLD.simulate(400, 1), entity=np.arange(400) // 2)
    seen: list[Any] = []
    monkeypatch.setattr(answer, "influence", lambda minuend, base, entity=None: seen.append(entity) or 0.0)
    ratio = np.ones(log.n_rows)
    _found(log, Target({}, log.action_prob, None, None), ratio, None, "logged", None, values.Effort(1, 0))
    assert seen[0].tolist() == (np.arange(400) // 2).tolist()


def test_an_interval_of_fitted_values_counts_entities(monkeypatch: pytest.MonkeyPatch) -> None:
    log = dataclasses.replace(described(WORLD.simulate(400, 1)), entity=np.arange(400) // 10)
    rng = np.random.default_rng(0)
    worth = rng.normal(size=40)

    def fitted(config: Any, encoder: Any, policies: Any, fitted_on: Episodes, held: Episodes, **how: Any) -> FQEValues:
        assert held.entity is not None
        initial = np.tile(worth[held.entity.astype(int)], (1, values.MEMBERS, 1))
        nothing = np.zeros((1, held.n_rows))
        return FQEValues(nothing, nothing, nothing, initial)

    monkeypatch.setattr(values, "fit_fqe", fitted)
    policy = FunctionPolicy(lambda observation, mask: mask, "any")
    found = values.fitted_values(log, policy, values.Effort(1, 0), lambda *_: None).direct
    assert not isinstance(found, Terms)
    own = per_unit(worth[np.arange(400) // 10], np.arange(400) // 10)
    wanted = ensemble([float(worth.mean())] * values.MEMBERS, own, found.level)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    episodes = ensemble([float(worth.mean())] * values.MEMBERS, worth[np.arange(400) // 10], found.level)
    assert found.high - found.low > 3 * (episodes.high - episodes.low)


def test_what_few_patients_make_is_seen_by_patients() -> None:
    """25 of 5,000 patients have 40 episodes that gain; the others lose a little."""
    unit = np.concatenate([np.repeat(np.arange(25), 40), np.arange(25, 5000)])
    gained = np.where(unit < 25, 1.0, -0.06)
    base = Terms(np.zeros((len(unit), 1)))
    better = Terms(gained[:, None])
    assert answer.influence(better, base) > 0 > answer.influence(better, base, unit)
    assert answer.influence(better, base, unit) == pytest.approx(-0.06)
    groups = unit % 100
    by_entity = answer.gain("DR", better, base, groups, 0.05, unit).largest_share
    total = np.abs(per_unit(gained, unit))
    assert by_entity == pytest.approx(total.max() / total.sum())


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_rounding_is_no_difference_in_whatever_units(scale: float) -> None:
    rng = np.random.default_rng(0)
    returns = scale * rng.random(1000)
    noise = scale * 1e-14 * (1.0 + 0.01 * rng.random(1000))
    unit, base = np.arange(1000), Terms(returns[:, None])
    nothing = answer.gain("DR", Terms((returns + noise)[:, None]), base, unit, 0.05)
    assert (nothing.estimate, nothing.lower_bound, nothing.upper_bound) == (0.0, 0.0, 0.0)
    assert answer.answer(nothing, [])[0] == "unsettled"
    small_gain = answer.gain("DR", Terms((returns + 1e9 * noise)[:, None]), base, unit, 0.05)
    assert small_gain.lower_bound > 0 and answer.answer(small_gain, [])[0] == "better"
    assert answer.influence(Terms((returns - noise)[:, None]), base) == 0.0


def test_a_half_of_one_entity_bounds_nothing() -> None:
    rng = np.random.default_rng(0)
    outcome, order = 1.0 + rng.normal(size=1000), np.arange(1000)
    unit = np.where(order < 500, 0, order)
    found = course.kept(outcome, order, alpha=0.05, width=2.0, unit=unit)
    assert found.lower_bound == -math.inf and found.difference == pytest.approx(
        outcome[500:].mean() - course.KEPT * outcome[:500].mean()
    )
    assert course.kept(outcome, order, alpha=0.05, width=2.0, unit=order // 250).lower_bound > -math.inf
    older, newer = course.halves(outcome, order, 0.05, unit)
    assert (older.lower_bound, older.upper_bound, older.entities) == (-math.inf, math.inf, 1)
    assert older.difference == pytest.approx(outcome[:500].mean()) and newer.lower_bound > 0
    parts = course.parts(outcome, order, 0.05, unit)
    assert [math.isinf(part.lower_bound) for part in parts] == [True] * 5 + [False] * 5


def test_a_group_of_few_gets_no_bounds() -> None:
    log = dataclasses.replace(WORLD.simulate(129, 1), labels={"sex": np.array(["f"] * 29 + ["m"] * 30 + ["x"] * 70)})
    outcome = np.random.default_rng(0).normal(size=129)
    leg = legs.Paired(outcome, np.ones(log.n_rows), np.zeros(log.n_rows), "by hand", np.ones(log.n_rows), 1.0)
    few, enough, pairs = legs.by_subgroup(leg, log, ("sex",), 0.05, 1000)
    assert (few.lower_bound, few.upper_bound) == (-math.inf, math.inf)
    assert few.difference == pytest.approx(outcome[:29].mean())
    assert math.isfinite(enough.lower_bound) and math.isfinite(pairs.lower_bound)
    entity = np.arange(129) // 3
    assert math.isinf(legs.by_subgroup(leg, log, ("sex",), 0.05, 1000, entity)[2].upper_bound)


def test_a_verdict_with_bounds_that_are_infinite_is_written_read_and_drawn() -> None:
    part = dataclasses.replace(GOOD.older_half, lower_bound=-math.inf, upper_bound=math.inf)
    known = dataclasses.replace(
        GOOD,
        older_half=part,
        course=[part, *GOOD.course],
        subgroups=[dataclasses.replace(part, name="sex f", episodes=20)],
    )
    config = GateConfig(subgroups=("sex",))
    passed = judge("abc", known, config)
    assert passed.status is Status.PASS
    data = passed.to_json()
    storage.canonical_json(data)
    assert data["measures"]["older_half"]["lower_bound"] is None
    assert verdict_from_json(data) == passed
    _, axes = plt.subplots()
    _draw_course(axes, data["measures"])
    plt.close("all")
    stopped = judge("abc", dataclasses.replace(known, kept_bound=-math.inf), config)
    assert stopped.status is Status.INCONCLUSIVE and stopped.decided_by == "newer half"
    storage.canonical_json(stopped.to_json())
    assert brief._span(data["measures"]["subgroups"][0]) == "difference +0.02, too few for a bound"
