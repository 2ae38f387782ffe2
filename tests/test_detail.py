"""What the evidence page says beside the verdict: what is behind it, where the policy differs, and what would settle it."""

import dataclasses
import json
import math

import numpy as np
import pytest
from pydantic import ValidationError

from benchmarks.calibration import small
from benchmarks.calibration.judging import asked, on_a_log
from offrl_models import legs
from offrl_models.choices import Probabilities
from offrl_models.config import parse_pipeline
from offrl_models.evaluation import BEHAVIOR, Evaluation, Measured, measure_rungs
from offrl_models.gate import GateConfig, Status, findings
from offrl_models.ope.bandit import smoothed_gain
from offrl_models.ope.diagnostics import gamma_star_of_bound
from offrl_models.ope.estimates import Estimates, estimate
from offrl_models.ope.intervals import Interval, confidence_sequence_width
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.sequences import weights_by_step
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import bandit
from offrl_models.reports.brief import brief
from offrl_models.reports.detail import CLIPS, canary_share, detail
from offrl_models.schema import Feature, InputError
from tests.conftest import attributes

WORLD = small.world()


@pytest.fixture(scope="module")
def judged() -> tuple[Evaluation, Measured, GateConfig]:
    """A better policy on a log with two groups."""
    found = on_a_log(WORLD, {"better": small.better(WORLD, 0.05)}, 1, 1500, 2500)
    sex = np.where(np.arange(found.episodes.n_episodes) % 3 == 0, "f", "m")
    found = dataclasses.replace(found, episodes=dataclasses.replace(found.episodes, labels={"sex": sex}))
    found.estimates["better"] = Estimates(
        {"A": Interval(1.0, 0.8, 1.2, 0.95, ""), "B": Interval(1.1, 0.9, 1.3, 0.95, ""),
                   "C": Interval(math.nan, math.nan, math.nan, 0.95, ""), "D": Interval(0.9, 0.7, 1.1, 0.95, "")},
        0.0, [],
    )  # fmt: skip
    config = GateConfig(subgroups=("sex",), planned_episodes=2500)
    (rung,) = measure_rungs(["better"], found, config, asked(WORLD.n_states))
    return found, rung, config


def test_gamma_star_is_that_of_the_bound_that_passed(judged: tuple[Evaluation, Measured, GateConfig]) -> None:
    found, rung, config = judged
    assert rung.measures.lower_bound > 0
    told = detail(found, "better", BEHAVIOR, rung, config, Status.PASS)
    width = confidence_sequence_width(rung.measures.episodes, alpha=0.05, planned=2500) * rung.measures.widened
    odds = told["gamma_star"]
    assert odds == gamma_star_of_bound(found.episodes, rung.leg.outcome, rung.leg.correction, width) and odds > 1.0
    wider = dataclasses.replace(rung, measures=dataclasses.replace(rung.measures, widened=1.01 * rung.measures.widened))
    assert 1.0 < detail(found, "better", BEHAVIOR, wider, config, Status.PASS)["gamma_star"] < odds
    stricter = config.model_copy(update={"margin": rung.measures.lower_bound / 2})
    assert detail(found, "better", BEHAVIOR, rung, stricter, Status.PASS)["gamma_star"] < odds
    assert detail(found, "better", BEHAVIOR, rung, config, Status.INCONCLUSIVE)["gamma_star"] is None


def test_clipped_weights_end_in_the_difference_itself(judged: tuple[Evaluation, Measured, GateConfig]) -> None:
    found, rung, config = judged
    told = detail(found, "better", BEHAVIOR, rung, config, Status.PASS)["clipped"]
    assert len(told) == len(CLIPS) and told[-1] == pytest.approx(rung.measures.difference)
    kept = np.minimum(1.0, 2.0 / np.maximum(rung.own.weight, 1e-12))
    by_hand = rung.own.outcome - found.episodes.sum_per_episode((1.0 - kept) * rung.own.correction)
    assert told[CLIPS.index(2.0)] == pytest.approx(by_hand.mean()) and told[0] != pytest.approx(told[-1])
    doubted = dataclasses.replace(rung, measures=dataclasses.replace(rung.measures, doubt="none"))
    assert detail(found, "better", BEHAVIOR, doubted, config, Status.INCONCLUSIVE)["clipped"] is None


def test_groups_have_sample_sizes_of_their_own(judged: tuple[Evaluation, Measured, GateConfig]) -> None:
    found, rung, config = judged
    told = detail(found, "better", BEHAVIOR, rung, config, Status.PASS)["effective_transitions_by_group"]
    weight = rung.leg.weight[(found.episodes.labels["sex"] == "f")[found.episodes.episode_of_row]]
    assert told["sex f"] == pytest.approx(weight.sum() ** 2 / np.square(weight).sum())
    assert set(told) == {contrast.name for contrast in rung.measures.subgroups} == {"sex f", "sex m"}


def test_the_page_names_the_estimators_that_agree_the_least(judged: tuple[Evaluation, Measured, GateConfig]) -> None:
    """B and D are .2 apart, each with a standard error of .1 / 1.96 * 2; C has no estimate."""
    found, rung, config = judged
    told = detail(found, "better", BEHAVIOR, rung, config, Status.PASS)["agreement"]
    assert {told["first"], told["second"]} == {"B", "D"}
    assert told["standardized"] == pytest.approx(0.2 / math.hypot(0.2 / 1.96, 0.2 / 1.96), rel=1e-4)


def test_corrections_are_what_the_weights_add() -> None:
    """Leg A is linear in the ratios: doubled, they add every correction once more, by tables and at horizon 1. With fitted weights
    it is the first value with the corrections, less the return."""
    world = dataclasses.replace(WORLD, gamma=0.8)
    found = on_a_log(world, {"better": small.better(WORLD, 0.05)}, 1, 1500, 600)
    model = TabularModel.fit(found.fitted_on, WORLD.n_states)
    rung = found.paired("better", model)
    assert isinstance(rung, legs.Paired)
    doubled = dataclasses.replace(found, ratio={name: 2.0 * ratio for name, ratio in found.ratio.items()})
    twice = doubled.paired("better", model)
    assert isinstance(twice, legs.Paired)
    added = found.episodes.sum_per_episode(rung.correction)
    assert twice.outcome - rung.outcome == pytest.approx(added, abs=1e-9) and np.abs(added).max() > 0.1
    fitted_on, gate = (
        dataclasses.replace(log, features=(Feature("state", WORLD.n_states),))
        for log in (found.fitted_on, found.episodes)
    )
    side = found.side("better")
    fitted = legs.paired(side, found.side(BEHAVIOR), fitted_on, gate, None)
    assert isinstance(fitted, legs.Paired) and "fitted" in fitted.method
    gained = side.v[gate.offsets[:-1]] + gate.sum_per_episode(fitted.correction) - gate.return_
    assert fitted.outcome == pytest.approx(gained, abs=1e-9)
    one = bandit(3, 2, 2, seed=1).simulate(300, 2)
    rng, ones = np.random.default_rng(0), np.ones(300)
    base = legs.Side(
        Probabilities(one, one.mask / 2), Probabilities(one, one.mask / 2), ones, *rng.normal(size=(3, 300))
    )
    side = dataclasses.replace(base, ratio=rng.uniform(size=300))
    parts = [
        legs.paired(dataclasses.replace(side, ratio=factor * side.ratio), base, one, one, None) for factor in (1.0, 2.0)
    ]
    first, second = (part for part in parts if isinstance(part, legs.Paired))
    assert second.outcome - first.outcome == pytest.approx(first.correction, abs=1e-9)


def test_against_another_champion_both_sides_are_corrected(judged: tuple[Evaluation, Measured, GateConfig]) -> None:
    _, _, config = judged
    tables = {"better": small.better(WORLD, 0.05), "champion": small.better(WORLD, 0.02)}
    found = on_a_log(WORLD, tables, 1, 1500, 2500)
    question = dataclasses.replace(asked(WORLD.n_states), champion="champion", drifted="so it has")
    plain = config.model_copy(update={"subgroups": ()})
    (rung,) = measure_rungs(["better"], found, plain, question)
    model = TabularModel.fit(found.fitted_on, WORLD.n_states)
    mine, other = (found.paired(name, model) for name in ("better", "champion"))
    assert isinstance(mine, legs.Paired) and isinstance(other, legs.Paired)
    assert rung.own.outcome == pytest.approx(mine.outcome) and rung.own.correction == pytest.approx(mine.correction)
    assert rung.leg.outcome == pytest.approx(mine.outcome - other.outcome)
    assert rung.leg.correction == pytest.approx(mine.correction - other.correction)
    assert rung.measures.drifted == "so it has" and rung.measures.smoothed_lower is None


def test_at_horizon_one_the_gain_is_smoothed_as_well() -> None:
    world = bandit(3, 2, 2, seed=1)
    policy = 0.5 * world.behavior + 0.5 * world.optimal()
    found = on_a_log(world, {"better": policy}, 1, 1500, 2500)
    question = dataclasses.replace(asked(world.n_states), return_range=(-5.0, 5.0))
    (rung,) = measure_rungs(["better"], found, GateConfig(), question)
    expected = smoothed_gain(found.episodes, found.ratio["better"], (-5.0, 5.0), alpha=0.05)
    assert rung.measures.smoothed_lower == pytest.approx(expected) and expected < rung.measures.difference
    for none in ({"return_range": None}, {"propensities": "estimated"}):
        (other,) = measure_rungs(["better"], found, GateConfig(), dataclasses.replace(question, **none))
        assert other.measures.smoothed_lower is None


@pytest.mark.parametrize("size", [1e40, 1e120])
def test_weights_that_overflow_switch_off_leg_c_and_stop_nothing(
    judged: tuple[Evaluation, Measured, GateConfig], size: float
) -> None:
    """Five ratios of 1e120 are more than a double holds, as are the squares of 1e200; a later ratio of 0 leaves nothing of them."""
    found, _, config = judged
    start, end = found.episodes.offsets[(longest := int(found.episodes.length.argmax())) :][:2]
    ratio = found.ratio["better"].copy()
    ratio[start:end] = size
    wild = dataclasses.replace(found, ratio=found.ratio | {"better": ratio})
    (rung,) = measure_rungs(["better"], wild, config, asked(WORLD.n_states))
    assert rung.measures.trajectory_difference is None and rung.measures.e_value is None
    told = detail(wild, "better", BEHAVIOR, rung, config, Status.INCONCLUSIVE)
    json.dumps(told | dataclasses.asdict(rung.measures), allow_nan=False)
    assert told["weights"][-1] == pytest.approx(1e200 if size == 1e40 else 1e300)
    assert told["pareto_k"] is None
    numbers = dataclasses.replace(asked(WORLD.n_states), states=None)  # with few to fit on leg A is in doubt as well
    few = dataclasses.replace(wild, fitted_on=found.fitted_on.take(np.arange(100)))
    (doubted,) = measure_rungs(["better"], few, config.model_copy(update={"subgroups": ()}), numbers)
    assert doubted.measures.doubt and doubted.measures.bound.startswith("paired difference by fitted Q evaluation")
    expected = found.fqe.v[found.names.index("better")][found.episodes.offsets[:-1]] - found.logged_returns
    assert doubted.measures.difference == pytest.approx(expected.mean())
    paid = [dataclasses.replace(log, costs={"paid": np.ones(log.n_rows)}) for log in (few.fitted_on, few.episodes)]
    held = config.model_copy(update={"subgroups": (), "constraints": {"paid": 1.0}})
    costly = dataclasses.replace(few, fitted_on=paid[0], episodes=paid[1])
    (unmeasured,) = measure_rungs(["better"], costly, held, numbers)
    assert unmeasured.measures.costs == [] and "measure of paid" in {
        each.name for each in findings(unmeasured.measures, held)
    }
    told = estimate(wild.episodes, [ratio, ratio], wild.fqe, bootstrap_shares(wild.episodes.n_episodes, 20, 0))
    assert (told[0].to_json()["estimates"]["TIS"]["estimate"] is None) is (size > 1e60)
    json.dumps([each.to_json() for each in told], allow_nan=False)
    ratio[end - 1] = 0.0
    weight = weights_by_step(wild.episodes, ratio)
    assert weight[longest, -2] > 1e155 and weight[longest, -1] == 0.0


def shown(told: dict, rung: Measured, **more: object) -> list[str]:
    verdict = {"measures": dataclasses.asdict(rung.measures), "decided_by": "lower bound", "proven_by_betting": False}
    return brief(
        {"verdict": verdict | {"status": more.pop("status", "PASS")}, "detail": told, "canary": None,
         "champion": {"name": "the behavior policy"}} | more
    )  # fmt: skip


def test_the_brief_says_what_a_risk_officer_asks(judged: tuple[Evaluation, Measured, GateConfig]) -> None:
    found, rung, config = judged
    told = detail(found, "better", BEHAVIOR, rung, config, Status.PASS)
    said = " ".join(shown(told, rung))
    assert f"by less than a factor of {told['gamma_star']:.4g} at every step" in said
    assert "agree the least, B and D, lie 1.4 standard errors apart" in said or "D and B" in said
    size = told["effective_transitions_by_group"]["sex f"]
    assert f"sex f: {rung.measures.subgroups[0].episodes:,} episodes, worth {size:,.0f} transitions, difference" in said
    assert "canary" not in said and "logarithmic smoothing" not in said
    smoothed = dataclasses.replace(rung, measures=dataclasses.replace(rung.measures, smoothed_lower=0.0123))
    assert "the difference is at least +0.0123 at 95.00% confidence" in " ".join(shown(told, smoothed))
    assert "the harm is shown" in " ".join(shown(told, rung, status="FAIL")) and "the harm" not in said
    canary = " ".join(shown(told, rung, status="INCONCLUSIVE", canary=0.0125))
    assert "Played in at most 1.250% of the episodes" in canary


def test_a_canary_loses_no_more_than_is_allowed_however_bad_the_policy_is() -> None:
    config, returns = GateConfig(canary_loss=0.05), np.array([-1.0, 0.0, 3.0])
    share = canary_share(Status.INCONCLUSIVE, config, (-1.0, 3.0), returns)
    assert share is not None and share == pytest.approx(0.0125)
    assert canary_share(Status.INCONCLUSIVE, config, (-1.0, 4.0), returns) == pytest.approx(0.01)  # whatever was logged
    best, worst = 3.0, -1.0  # a champion that always earns the most, and a candidate that never does
    assert best - ((1 - share) * best + share * worst) == pytest.approx(0.05)
    assert canary_share(Status.INCONCLUSIVE, GateConfig(canary_loss=9.0), (-1.0, 3.0), returns) == 1.0
    for status in (Status.PASS, Status.FAIL, Status.INVALID):
        assert canary_share(status, config, (-1.0, 3.0), returns) is None
    assert canary_share(Status.INCONCLUSIVE, GateConfig(), (-1.0, 3.0), returns) is None
    assert canary_share(Status.INCONCLUSIVE, config, None, returns) is None
    for ends in ((-0.5, 3.0), (-1.0, 2.5)):  # the log says otherwise
        assert canary_share(Status.INCONCLUSIVE, config, ends, returns) is None
    with pytest.raises(ValidationError, match="the lower one first"):
        GateConfig(return_range=(5.0, 0.0))


def test_a_canary_needs_the_worst_that_can_happen() -> None:
    with pytest.raises(InputError, match=r"gate.canary_loss needs gate.return_range"):
        parse_pipeline(attributes(10, 3, gate={"canary_loss": 0.1}), "toy")
    stated = parse_pipeline(attributes(10, 3, gate={"canary_loss": 0.1, "return_range": [0, 5]}), "toy")
    assert stated.return_range == (0, 5)
