"""Episodes of one patient or user depend on each other: everything that is told of a log counts entities."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from benchmarks.calibration import small
from benchmarks.calibration.judging import asked, behavior_table, evaluation
from offrl_models import legs, stages, storage
from offrl_models.comparison import estimate_stated
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.datasets.transitions import Transitions
from offrl_models.evaluation import BEHAVIOR, Evaluation, measure_rungs
from offrl_models.gate import GateConfig, Status, judge
from offrl_models.measures import Contrast
from offrl_models.ope.diagnostics import gamma_star_of_bound
from offrl_models.ope.estimates import estimate
from offrl_models.ope.fqe import bootstrap_rows
from offrl_models.ope.intervals import confidence_sequence_lower_bound, confidence_sequence_width
from offrl_models.ope.resampling import BootstrapSamples
from offrl_models.ope.units import entities_of, per_unit
from offrl_models.reports.detail import detail
from offrl_models.schema import Episodes, Feature, InputError
from offrl_models.selection import rank
from tests.conftest import as_table, attributes, chain_world
from tests.hand_made import GOOD

pytestmark = pytest.mark.usefixtures("no_pages")

WORLD = small.world()
COPIES = 4
CONFIG = GateConfig(planned_episodes=2000, subgroups=("sex",), constraints={"paid": 1.0})


def copied(log: Episodes) -> Episodes:
    """Every episode several times, as those of one entity: they say no more than one."""
    n = log.n_episodes
    again = log.take(np.repeat(np.arange(n), COPIES))
    return dataclasses.replace(again, episode_id=np.arange(n * COPIES), entity=np.repeat(np.arange(n), COPIES) + 7)


def judged_on(gate: Episodes, fitted_on: Episodes) -> Evaluation:
    tables = {"better": small.better(WORLD, 0.05)}
    found = evaluation(tables, behavior_table(fitted_on, WORLD.mask), fitted_on, gate, seed=1)
    units = len(np.unique(gate.episode_id if gate.entity is None else gate.entity))
    samples = BootstrapSamples(units, 200, 0)
    estimates = estimate(gate, [found.ratio[name] for name in found.names], found.fqe, samples, None, found.unit)
    return dataclasses.replace(found, samples=samples, estimates=dict(zip(found.names, estimates, strict=True)))


@pytest.fixture(scope="module")
def once_and_copied() -> tuple[Evaluation, Evaluation]:
    both = WORLD.simulate(4000, 1)
    sex = np.where(np.arange(4000) % 3 == 0, "f", "m")
    both = dataclasses.replace(both, costs={"paid": (both.action == 0).astype(float)}, labels={"sex": sex})
    fitted_on, gate = both.take(np.arange(4000) < 2000), both.take(np.arange(4000) >= 2000)
    return judged_on(gate, fitted_on), judged_on(copied(gate), fitted_on)


def test_copies_of_an_episode_in_one_entity_say_no_more_than_one(
    once_and_copied: tuple[Evaluation, Evaluation],
) -> None:
    once, copies = once_and_copied
    (one,) = measure_rungs(["better"], once, CONFIG, asked(WORLD.n_states))
    more = CONFIG.model_copy(update={"planned_episodes": CONFIG.planned_episodes * COPIES})
    (many,) = measure_rungs(["better"], copies, more, asked(WORLD.n_states))
    mine, theirs = (dataclasses.asdict(rung.measures) for rung in (one, many))
    assert one.measures.entities is None and many.measures.entities == many.measures.independent == 2000
    assert mine.pop("e_value") is not None and theirs.pop("e_value") is None  # its proof is of independent episodes
    for name in ("costs", "subgroups"):
        assert [each["entities"] for each in theirs[name]] == [each["episodes"] for each in mine[name]]
    apart = {"episodes", "rows", "entities", "effective_transitions", "few_visits_mass"}  # and tests by row
    apart |= {"mean_ratio_z", "worst_action_z", "markov_z"}
    mine, theirs = ({name: each[name] for name in each.keys() - apart} for each in (mine, theirs))
    for part in (mine, theirs):
        nested = [part.pop(name) for name in ("costs", "subgroups", "course")] + [
            [part.pop("older_half"), part.pop("newer_half")]
        ]
        part |= {f"{each['name']} {end}": each[end] for group in nested for each in group
                 for end in ("difference", "lower_bound", "upper_bound")}  # fmt: skip
        part["fqe_differences"] = tuple(part["fqe_differences"])
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        expected = value if isinstance(value, (str, type(None))) else pytest.approx(value, rel=1e-3, abs=1e-9)
        assert theirs[name] == expected, name


def test_entities_of_unlike_episodes_are_as_sure_as_their_totals(
    once_and_copied: tuple[Evaluation, Evaluation],
) -> None:
    once, _ = once_and_copied
    unit = np.arange(once.episodes.n_episodes) // 2
    pairs = dataclasses.replace(once, episodes=dataclasses.replace(once.episodes, entity=unit))
    (rung,) = measure_rungs(["better"], pairs, CONFIG, asked(WORLD.n_states))
    leg_a, leg_c = rung.leg.outcome.reshape(-1, 2).mean(1), pairs.trajectory_gains("better", BEHAVIOR)
    assert rung.measures.trajectory_error == pytest.approx(leg_c.reshape(-1, 2).mean(1).std(ddof=1) / np.sqrt(1000))
    assert rung.measures.lower_bound == pytest.approx(confidence_sequence_lower_bound(leg_a, alpha=0.05, planned=1000))
    spread = detail(pairs, "better", BEHAVIOR, rung, CONFIG, Status.PASS)["gamma_star"]
    width = confidence_sequence_width(1000, alpha=0.05, planned=1000)
    assert spread == gamma_star_of_bound(pairs.episodes, rung.leg.outcome, rung.leg.correction, width, unit)
    assert spread != gamma_star_of_bound(pairs.episodes, rung.leg.outcome, rung.leg.correction, width)
    mixed, sex = np.random.default_rng(0).permutation(unit), once.episodes.labels["sex"] == "f"
    group = legs.by_subgroup(rung.leg, once.episodes, ("sex",), 0.05, 2000, mixed)[0]
    assert group == legs.contrast("sex f", rung.leg.outcome[sex], 0.05, 2000, mixed[sex])
    assert rung.measures.largest_share == pytest.approx(np.abs(leg_a).max() / np.abs(leg_a).sum())
    assert rung.measures.without_top == pytest.approx(np.sort(leg_a)[:-5].mean()) and leg_a.mean() > 0


def test_what_is_behind_a_verdict_counts_entities_too(once_and_copied: tuple[Evaluation, Evaluation]) -> None:
    once, copies = once_and_copied
    more = CONFIG.model_copy(update={"planned_episodes": CONFIG.planned_episodes * COPIES})
    told = []
    for found, config in ((once, CONFIG), (copies, more)):
        (rung,) = measure_rungs(["better"], found, config, asked(WORLD.n_states))
        told.append(detail(found, "better", BEHAVIOR, rung, config, Status.PASS))
    assert told[1]["gamma_star"] == pytest.approx(told[0]["gamma_star"], rel=1e-4)
    assert told[1]["influence"] == pytest.approx(told[0]["influence"])
    assert told[1]["episodes_needed"] == pytest.approx(COPIES * told[0]["episodes_needed"], rel=0.01)
    for name, interval in once.estimates["better"].intervals.items():
        again = copies.estimates["better"].intervals[name]
        assert ("over entities" in again.method) is (name != "FQE") and "entities" not in interval.method
        ends, least = [again.estimate, again.low, again.high], 1e-9 if name == "FQE" else 1e-3
        assert ends == pytest.approx([interval.estimate, interval.low, interval.high], rel=least), name
    assert copies.estimates["better"].effective_episodes == pytest.approx(once.estimates["better"].effective_episodes)
    for one, other in zip(rank(once), rank(copies), strict=True):
        assert other["gain_interval"] == pytest.approx(one["gain_interval"], rel=1e-3)


@pytest.mark.parametrize("refit", [False, True])
def test_a_compared_policy_is_estimated_by_entities(
    once_and_copied: tuple[Evaluation, Evaluation], refit: bool
) -> None:
    widths = []
    for found in once_and_copied:
        probs = small.better(WORLD, 0.05)[found.episodes.observation[:, 0].astype(int)]
        again = (lambda log: lambda count: log.action_prob)(found.episodes) if refit else None
        told = estimate_stated(found.episodes, probs, found.samples, again)
        widths.append([(each.low, each.high) for each in told.intervals.values()])
    assert widths[1] == [pytest.approx(ends, rel=1e-3) for ends in widths[0]]


def test_bounds_hold_where_the_episodes_of_an_entity_are_alike() -> None:
    """500 entities of 10 episodes each whose outcomes correlate by a half; taken as 5,000 independent ones they mislead."""
    unit, wrong = np.repeat(np.arange(500), 10), {"entities": 0, "episodes": 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        outcome = rng.normal(size=500)[unit] + rng.normal(size=5000)
        wrong["entities"] += legs.contrast("x", outcome, 0.05, 5000, unit).lower_bound > 0
        wrong["episodes"] += legs.contrast("x", outcome, 0.05, 5000).lower_bound > 0
    assert wrong["entities"] <= 10 and wrong["episodes"] >= 20


def test_entities_of_different_sizes_have_the_error_of_a_ratio() -> None:
    """Liang & Zeger (1986): the squared error of a mean is the sum over entities of (total - size * mean)^2 over n^2."""
    rng = np.random.default_rng(0)
    unit = rng.permutation(np.repeat(np.arange(40), np.arange(1, 41)))
    values = rng.normal(size=40)[unit] + rng.normal(size=len(unit)) + 0.3
    each = per_unit(values, unit)
    assert len(each) == 40 and each.mean() == pytest.approx(values.mean())
    total = np.bincount(unit, values - values.mean())
    assert each.var() / 40 == pytest.approx(np.square(total).sum() / len(values) ** 2)
    alone = rng.permutation(30)
    assert np.sort(per_unit(values[:30], alone)) == pytest.approx(np.sort(values[:30]))
    assert per_unit(values, None) is values


def test_an_entity_is_in_a_resample_of_the_fit_as_a_whole() -> None:
    log = copied(dataclasses.replace(WORLD.simulate(60, 1), features=(Feature("state", WORLD.n_states),)))
    rows = bootstrap_rows(log, Transitions(log, Encoder(log.features), "cpu"), 0).numpy()
    often = np.bincount(log.episode_of_row[rows], minlength=log.n_episodes) / log.length
    assert (often.reshape(-1, COPIES) == often[::COPIES, None]).all() and often[::COPIES].sum() == 60
    assert set(often) > {0.0, 1.0, 2.0}


def test_entities_are_told_apart_and_only_where_one_has_several_episodes() -> None:
    log = WORLD.simulate(6, 1)
    assert entities_of(log) is None
    assert entities_of(dataclasses.replace(log, entity=np.array(list("fedcba")))) is None
    unit = entities_of(dataclasses.replace(log, entity=np.array(["b", "a", "b", "c", "a", "b"])))
    assert unit is not None and unit.tolist() == [1, 0, 1, 2, 0, 1]


def test_many_episodes_of_a_few_entities_decide_nothing() -> None:
    few = judge("abc", dataclasses.replace(GOOD, entities=60), GateConfig())
    assert few.status is Status.INCONCLUSIVE and few.reason.startswith("60 gate entities are fewer than the 500")
    group = Contrast("sex f", 3000, 0.01, -0.5, 0.5, entities=40)
    config = GateConfig(subgroups=("sex",), subgroup_margin=0.6)
    said = judge("abc", dataclasses.replace(GOOD, subgroups=[group]), config)
    assert said.status is Status.INCONCLUSIVE and "sex f has 40 gate entities" in said.reason
    harmed = dataclasses.replace(group, lower_bound=-0.5, upper_bound=-0.1)
    assert (
        judge("abc", dataclasses.replace(GOOD, subgroups=[harmed]), GateConfig(subgroups=("sex",))).status
        is Status.PASS
    )
    assert math.isinf(dataclasses.replace(GOOD, entities=60, effective_episodes=60.0).trajectory_bounds[0])
    many = dataclasses.replace(GOOD, episodes=100_000, entities=5000)  # a twentieth of these is 250
    assert dataclasses.replace(many, effective_episodes=251.0).trajectory_informs
    assert not dataclasses.replace(many, effective_episodes=249.0).trajectory_informs


def test_groups_costs_and_entities_go_the_whole_way(tmp_path: Path) -> None:
    """600 episodes of 120 patients are 36 or so to judge on; and in the first half of the gate's log one of them is all alone."""
    world, configured = chain_world(), attributes(chain_world().n_states, 3)
    log = pl.DataFrame(as_table(world.simulate(1200, seed=3)))
    judging = next(number for number in range(1000, 2000) if bucket(number, "offrl") in SPLITS["gate"])
    log = log.with_columns(
        patient=pl.when(pl.col("episode") < 600).then(pl.lit(judging)).otherwise(pl.col("episode") // 5),
        sex=pl.when((pl.col("episode") < 600) | (pl.col("episode") // 5 % 2 == 0))
        .then(pl.lit("f"))
        .otherwise(pl.lit("m")),
        paid=(pl.col("action") == 0).cast(pl.Float64),
    )
    configured["logs"] |= {"entity": "patient", "subgroups": ["sex"], "costs": [{"column": "paid", "range": [0, 1]}]}
    configured["gate"] |= {"subgroups": ["sex"], "constraints": {"paid": 5.0}}
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    storage.write_parquet(pipeline.raw / "b.parquet", log.to_arrow())
    judged, released = stages.run(pipeline)
    assert released is None and judged.summary["status"] in ("INCONCLUSIVE", "INVALID")
    measures = storage.read_json(pipeline.folder / "evidence" / "verdict.json")["measures"]
    assert 20 < measures["entities"] < 60 and measures["episodes"] == 600 + 5 * (measures["entities"] - 1)
    assert measures["older_half"]["lower_bound"] is None and measures["kept_bound"] is None
    assert "too few for a bound." in (pipeline.reports / "evidence.html").read_text()
    assert {group["name"] for group in measures["subgroups"]} == {"sex f", "sex m"}
    assert sum(group["entities"] for group in measures["subgroups"]) == measures["entities"]
    (paid,) = measures["costs"]
    assert paid["entities"] == measures["entities"] and paid["lower_bound"] < paid["difference"] < paid["upper_bound"]


@pytest.mark.parametrize(
    ("asked_for", "sentence"),
    [
        (
            {"subgroups": ["sexx"]},
            "gate.subgroups names 'sexx', which is not among logs.subgroups (did you mean 'sex'?)",
        ),
        ({"constraints": {"days": 0.1}}, "gate.constraints names 'days', which is not among logs.costs; name it there"),
    ],
)
def test_what_the_gate_asks_of_has_to_be_logged(asked_for: dict[str, Any], sentence: str) -> None:
    configured = attributes(10, 3, gate=asked_for)
    configured["logs"] |= {"subgroups": ["sex"], "costs": [{"column": "paid", "range": [0, 1]}]}
    with pytest.raises(InputError, match=re.escape(sentence)):
        parse_pipeline(configured, "toy")


def test_equal_returns_tell_nothing_apart(once_and_copied: tuple[Evaluation, Evaluation]) -> None:
    once, _ = once_and_copied
    flat = dataclasses.replace(once, episodes=dataclasses.replace(once.episodes, reward=np.zeros(once.episodes.n_rows)))
    (rung,) = measure_rungs(["better"], flat, CONFIG, asked(WORLD.n_states))
    verdict = judge("abc", rung.measures, CONFIG)
    assert (
        verdict.status is Status.INVALID and "same return" in {f.name: f for f in verdict.findings}["returns"].sentence
    )
    (usual,) = measure_rungs(["better"], once, CONFIG, asked(WORLD.n_states))
    assert rung.measures.equal_returns and not usual.measures.equal_returns


def test_cells_are_counted_only_where_there_are_some(once_and_copied: tuple[Evaluation, Evaluation]) -> None:
    once, _ = once_and_copied
    numbers = dataclasses.replace(asked(WORLD.n_states), states=None)
    columns = (Feature("state", WORLD.n_states),)
    seen = dataclasses.replace(once.episodes, features=columns), dataclasses.replace(once.fitted_on, features=columns)
    (rung,) = measure_rungs(["better"], dataclasses.replace(once, episodes=seen[0], fitted_on=seen[1]), CONFIG, numbers)
    assert rung.measures.few_visits_mass is None
    assert "visits" not in {finding.name for finding in judge("abc", rung.measures, CONFIG).findings}
