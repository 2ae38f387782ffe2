"""The gate: every objection keeps the champion, the gravest decides, and nothing passes by being unknown."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.gate import (
    GateConfig,
    Status,
    decisive_ladder,
    decisive_rung,
    findings,
    judge,
    ladder,
    verdict_from_json,
)
from offrl_models.measures import Contrast
from tests.hand_made import BAD, GOOD

CONFIG = GateConfig()
ENOUGH = {"episodes", "trust", "effective transitions", "one episode", "influence"}


def test_good_evidence_passes_and_says_by_how_much() -> None:
    verdict = judge("abc", GOOD, CONFIG)
    assert verdict.status is Status.PASS
    assert verdict.policy == "abc"
    assert "+0.02," in verdict.reason and "+0.01 at" in verdict.reason and "95%" in verdict.reason


def test_every_finding_is_exercised_here() -> None:
    assert [finding.name for finding in findings(GOOD, CONFIG)] == list(BAD)


@pytest.mark.parametrize("name", BAD)
def test_each_objection_alone_refuses_with_its_own_status(name: str) -> None:
    field, value, status = BAD[name]
    verdict = judge("abc", dataclasses.replace(GOOD, **{field: value}), CONFIG)
    assert (verdict.status, verdict.decided_by) == (status, name)


@pytest.mark.parametrize(
    "name", sorted(set(BAD) - {"episodes", "trust", "returns", "drift"})
)  # counts, sentences and truths are never NaN
def test_a_number_that_is_nan_refuses(name: str) -> None:
    field, value, _ = BAD[name]
    unknown = [0.01, math.nan, 0.02] if isinstance(value, list) else math.nan
    if isinstance(value, Contrast):
        unknown = dataclasses.replace(value, lower_bound=math.nan)
    assert judge("abc", dataclasses.replace(GOOD, **{field: unknown}), CONFIG).status is not Status.PASS


@pytest.mark.parametrize("field", ["mean_ratio_z", "worst_action_z"])
def test_mean_ratios_may_be_wrong_on_either_side(field: str) -> None:
    for z, status in ((-4.1, Status.INVALID), (-3.9, Status.PASS), (3.9, Status.PASS), (4.1, Status.INVALID)):
        assert judge("abc", dataclasses.replace(GOOD, **{field: z}), CONFIG).status is status


@given(st.sets(st.sampled_from(sorted(BAD)), min_size=1))
def test_the_gravest_objection_decides(names: set[str]) -> None:
    shown = dataclasses.replace(GOOD, trajectory_lower=-1.0, trajectory_upper=-0.001)  # harm needs no Markov state here
    broken = dataclasses.replace(shown, **{BAD[name][0]: BAD[name][1] for name in names})
    order = [Status.INVALID, Status.FAIL, Status.INCONCLUSIVE]
    counted = names - {"harm"} if names & ENOUGH else names  # harm is not told from too little
    assert judge("abc", broken, CONFIG).status is min((BAD[name][2] for name in counted), key=order.index)


@pytest.mark.parametrize("name", sorted(ENOUGH))
def test_nobody_is_said_to_be_harmed_where_there_is_too_little_to_say_so(name: str) -> None:
    field, value, _ = BAD[name]
    rise, loss = Contrast("days", 6000, 0.5, 0.4, 0.6), Contrast("unit surgery", 300, -0.2, -0.3, -0.1)
    config = GateConfig(constraints={"days": 0.1}, subgroups=("unit",))
    worse = dataclasses.replace(GOOD, difference=-0.02, lower_bound=-0.03, upper_bound=-0.01, without_top=-0.01)
    for harmed in (worse, dataclasses.replace(GOOD, costs=[rise]), dataclasses.replace(GOOD, subgroups=[loss])):
        harmed = dataclasses.replace(harmed, costs=harmed.costs or [dataclasses.replace(rise, lower_bound=0.0, upper_bound=0.0)],
                                     subgroups=harmed.subgroups or [dataclasses.replace(loss, upper_bound=0.1)])  # fmt: skip
        assert judge("abc", harmed, config).status is Status.FAIL
        few = dataclasses.replace(harmed, **{field: -value if name == "influence" and harmed.difference < 0 else value})
        verdict = judge("abc", few, config)
        assert (verdict.status, verdict.decided_by) == (Status.INCONCLUSIVE, name)


def test_a_group_of_a_few_episodes_decides_nothing() -> None:
    """Its bounds hold for large numbers: those of one episode have no width at all."""
    for episodes, harmed, shown in ((199, Status.PASS, Status.INCONCLUSIVE), (200, Status.FAIL, Status.PASS)):
        loss, gain = (Contrast("unit surgery", episodes, x, x, x) for x in (-0.7, 0.7))
        for group, margin, status in ((loss, 0.0, harmed), (gain, 0.01, shown)):
            config = GateConfig(subgroups=("unit",), subgroup_margin=margin)
            assert judge("abc", dataclasses.replace(GOOD, subgroups=[group]), config).status is status


def test_what_was_not_measured_does_not_pass() -> None:
    for config in (GateConfig(constraints={"days": 0.1}), GateConfig(subgroups=("unit",))):
        others = [Contrast("nights", 300, 0.0, 0.0, 0.0)], [Contrast("units surgery", 300, 0.0, 0.0, 0.0)]
        for costs, groups in (([], []), others):
            verdict = judge("abc", dataclasses.replace(GOOD, costs=costs, subgroups=groups), config if not costs else
                            config.model_copy(update={"constraints": {**config.constraints, "nights": 1.0}}))  # fmt: skip
            assert verdict.status is Status.INVALID and verdict.reason.endswith("is to be held and was not measured")
    assert judge("abc", dataclasses.replace(GOOD, fqe_differences=[]), CONFIG).decided_by == "fitted Q evaluation"


def test_a_margin_must_be_exceeded() -> None:
    assert judge("abc", GOOD, GateConfig(margin=0.0099)).status is Status.PASS
    assert judge("abc", GOOD, GateConfig(margin=0.01)).status is Status.INCONCLUSIVE


def test_a_gain_that_the_newer_half_does_not_keep_is_not_shown() -> None:
    now = Contrast("newer half", 2999, 0.001, -0.0002, 0.002)
    verdict = judge("abc", dataclasses.replace(GOOD, newer_half=now, kept_bound=-0.0042), CONFIG)
    assert (verdict.status, verdict.decided_by) == (Status.INCONCLUSIVE, "newer half")
    for said in ("(2,999 episodes) does not show", "was +0.02 and is +0.001 now", "by at least -0.0042, not above +0"):
        assert said in verdict.reason
    shown = dataclasses.replace(GOOD, lower_bound=0.02)  # 0.008 is what 0.01 and 0.01 leave beyond a fifth
    assert judge("abc", shown, GateConfig(margin=0.00999)).status is Status.PASS
    assert judge("abc", shown, GateConfig(margin=0.01)).decided_by == "newer half"


def test_the_ladder_stops_at_the_first_rung_that_does_not_pass() -> None:
    weak = dataclasses.replace(GOOD, lower_bound=-0.01)
    verdicts = ladder(["a", "b", "c", "d"], [GOOD, GOOD, weak, GOOD], CONFIG)
    assert [v.status for v in verdicts] == [Status.PASS, Status.PASS, Status.INCONCLUSIVE, Status.NOT_TESTED]
    assert decisive_rung(verdicts) == 1
    assert decisive_rung(ladder(["a", "b"], [weak, GOOD], CONFIG)) == 0


def test_of_several_ladders_the_highest_bound_decides() -> None:
    weak, low = dataclasses.replace(GOOD, lower_bound=-0.01), dataclasses.replace(GOOD, lower_bound=0.005)
    first, second, none = (ladder(["a", "b"], rungs, CONFIG) for rungs in ([GOOD, low], [GOOD, weak], [weak, GOOD]))
    assert decisive_ladder([first, second]) == 1  # +0.005 at its last rung, against +0.01
    assert decisive_ladder([none, first]) == 1
    assert decisive_ladder([none, none]) == 0
    doubtful = ladder(["a", "b"], [dataclasses.replace(GOOD, lower_bound=0.02, largest_share=0.06)] * 2, CONFIG)
    assert decisive_ladder([doubtful, first]) == 1  # a higher bound decides nothing where the rung did not pass


@pytest.mark.parametrize(
    ("field", "limit"),
    [
        ("alpha", CONFIG.alpha),
        ("unsupported_mass", CONFIG.unsupported_mass),
        ("few_visits_mass", CONFIG.few_visits_mass),
        ("episodes", CONFIG.first_look),
        ("effective_transitions", CONFIG.effective_transitions),
        ("largest_share", CONFIG.largest_share),
        ("without_top", 0.0),
    ],
)
def test_what_is_just_enough_is_enough(field: str, limit: float) -> None:
    assert judge("abc", dataclasses.replace(GOOD, **{field: limit}), CONFIG).status is Status.PASS


def test_a_bound_at_no_error_rate_is_none() -> None:
    verdict = judge("abc", dataclasses.replace(GOOD, alpha=0.0), CONFIG)
    assert (verdict.status, verdict.decided_by) == (Status.INVALID, "error rate")


def test_a_verdict_survives_json() -> None:
    group = Contrast("unit surgery", 300, 0.01, -0.02, 0.04)
    verdict = judge("abc", dataclasses.replace(GOOD, subgroups=[group], costs=[dataclasses.replace(group, name="days")]),
                    GateConfig(constraints={"days": 0.05}, subgroups=("unit",)))  # fmt: skip
    assert verdict_from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


@pytest.mark.parametrize("caps", [[], [1.0], [-1], [0.5, 2.0], [2.0, 1.2], [1.2, 1.2], [None, 2.0]])
def test_a_ladder_must_climb(caps: list[float | None]) -> None:
    with pytest.raises(ValueError, match="must be above 1 and rise"):
        GateConfig(caps=tuple(caps))


def test_leg_c_objects_only_where_enough_episodes_stand_behind_it() -> None:
    harmful = dataclasses.replace(GOOD, trajectory_difference=-1.0)
    for episodes, status in ((299.0, Status.PASS), (301.0, Status.INCONCLUSIVE)):  # 5% of 6,000 are 300
        assert judge("abc", dataclasses.replace(harmful, effective_episodes=episodes), CONFIG).status is status
    for difference, status in (
        (-0.0199, Status.PASS),
        (-0.0201, Status.INCONCLUSIVE),
    ):  # twice its standard error of 0.01
        assert judge("abc", dataclasses.replace(GOOD, trajectory_difference=difference), CONFIG).status is status
    off = dataclasses.replace(GOOD, trajectory_difference=None, trajectory_error=None)
    assert judge("abc", off, CONFIG).status is Status.PASS


@pytest.mark.parametrize(
    ("z", "lower", "upper", "episodes", "status"),
    [
        (3.9, -0.01, 0.03, 900.0, Status.PASS),
        (4.1, -0.01, 0.03, 900.0, Status.INCONCLUSIVE),
        (4.1, 0.001, 0.03, 900.0, Status.PASS),
        (4.1, 0.001, 0.03, 299.0, Status.INCONCLUSIVE),  # too few episodes stand behind leg C
        (math.nan, -0.01, 0.03, 900.0, Status.INCONCLUSIVE),
    ],
)
def test_without_a_markov_state_leg_c_has_to_show_the_gain(
    z: float, lower: float, upper: float, episodes: float, status: Status
) -> None:
    shown = dataclasses.replace(
        GOOD, markov_z=z, trajectory_lower=lower, trajectory_upper=upper, effective_episodes=episodes
    )
    assert judge("abc", shown, CONFIG).status is status


def test_without_a_markov_state_leg_c_has_to_show_the_margin() -> None:
    shown = dataclasses.replace(GOOD, markov_z=4.1, trajectory_lower=0.004, trajectory_upper=0.03)
    for margin, status in ((0.0039, Status.PASS), (0.0041, Status.INCONCLUSIVE)):
        assert judge("abc", shown, GateConfig(margin=margin)).status is status


@pytest.mark.parametrize(("difference", "without_top"), [(0.02, -0.001), (-0.02, 0.001)])
def test_a_few_episodes_may_not_turn_the_sign(difference: float, without_top: float) -> None:
    shown = dataclasses.replace(GOOD, difference=difference)
    for without, holds in ((without_top, False), (-without_top, True)):
        (found,) = [
            finding
            for finding in findings(dataclasses.replace(shown, without_top=without), CONFIG)
            if finding.name == "influence"
        ]
        assert found.holds is holds


@pytest.mark.parametrize(
    ("z", "upper", "episodes", "status"),
    [
        (0.0, 0.01, 900.0, Status.FAIL),
        (5.0, 0.01, 900.0, Status.INCONCLUSIVE),
        (5.0, -0.01, 900.0, Status.FAIL),
        (5.0, -0.01, 299.0, Status.INCONCLUSIVE),
    ],
)
def test_without_a_markov_state_leg_c_has_to_show_the_harm(
    z: float, upper: float, episodes: float, status: Status
) -> None:
    worse = dataclasses.replace(GOOD, upper_bound=-0.001, lower_bound=-0.02, markov_z=z, effective_episodes=episodes)
    assert (
        judge("abc", dataclasses.replace(worse, trajectory_lower=-1.0, trajectory_upper=upper), CONFIG).status is status
    )


@pytest.mark.parametrize(
    ("lower", "upper", "status"),
    [(-0.1, 0.05, Status.PASS), (-0.1, 0.11, Status.INCONCLUSIVE), (0.11, 0.2, Status.FAIL)],
)
def test_a_cost_may_rise_only_so_far(lower: float, upper: float, status: Status) -> None:
    config = GateConfig(constraints={"days": 0.1})
    measured = dataclasses.replace(GOOD, costs=[Contrast("days", 6000, (lower + upper) / 2, lower, upper)])
    verdict = judge("abc", measured, config)
    assert verdict.status is status
    assert verdict_from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


@pytest.mark.parametrize(
    ("margin", "lower", "upper", "status"),
    [
        (0.0, -0.5, 0.5, Status.PASS),  # harm only
        (0.0, -0.5, -0.1, Status.FAIL),
        (0.2, -0.1, 0.5, Status.PASS),
        (0.2, -0.3, 0.5, Status.INCONCLUSIVE),
    ],
)
def test_no_group_may_be_harmed(margin: float, lower: float, upper: float, status: Status) -> None:
    group = Contrast("sex f", 900, (lower + upper) / 2, lower, upper)
    config = GateConfig(subgroups=("sex",), subgroup_margin=margin)
    assert judge("abc", dataclasses.replace(GOOD, subgroups=[group]), config).status is status


@pytest.mark.parametrize(
    ("propensities", "alpha", "status", "certificate"),
    [
        ("logged", 0.05, Status.PASS, "GREEN"),
        ("estimated", 0.0251, Status.INVALID, "AMBER"),
        ("estimated", 0.025, Status.PASS, "AMBER"),
    ],
)
def test_estimated_propensities_leave_half_of_the_error_rate(
    propensities: str, alpha: float, status: Status, certificate: str
) -> None:
    verdict = judge("abc", dataclasses.replace(GOOD, propensities=propensities, alpha=alpha), CONFIG)
    assert (verdict.status, verdict.certificate) == (status, certificate)


def test_a_sequence_without_leg_c_relies_on_its_state_and_nuisances() -> None:
    assert not GOOD.relies_on_state
    assert dataclasses.replace(GOOD, effective_episodes=150.0).relies_on_state
    assert dataclasses.replace(GOOD, trajectory_difference=None).relies_on_state
    assert not dataclasses.replace(GOOD, effective_episodes=150.0, rows=GOOD.episodes).relies_on_state  # horizon 1
    assert not dataclasses.replace(GOOD, effective_episodes=150.0, e_value=21.0).relies_on_state
    assert not dataclasses.replace(GOOD, effective_episodes=150.0, doubt="no weights").relies_on_state


def test_a_large_e_value_makes_the_certificate_exact() -> None:
    for e_value, exact in ((None, False), (19.9, False), (20.0, True)):
        assert judge("abc", dataclasses.replace(GOOD, e_value=e_value), CONFIG).exact is exact
    refused = dataclasses.replace(GOOD, e_value=100.0, lower_bound=-1.0)
    assert not judge("abc", refused, CONFIG).exact
    estimated = dataclasses.replace(GOOD, e_value=100.0, propensities="estimated", alpha=0.025)
    assert judge("abc", estimated, CONFIG).status is Status.PASS and not judge("abc", estimated, CONFIG).exact
