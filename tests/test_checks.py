"""The checks that assert on measures: each holds on a clean table and, with its severity and sentence, fails on one that is not.

What the measures make of logs is tested beside the measures; here it is what the checks make of measures.
"""

import dataclasses
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from offrl_models import stages, storage
from offrl_models.config import CoverageConfig, Pipeline, parse_pipeline
from offrl_models.logs.contract import Contract
from offrl_models.logs.coverage import Coverage, measure
from offrl_models.logs.read import Log
from offrl_models.reports.checks import check_behavior, check_evidence, check_logs, check_shift, check_splits
from offrl_models.reports.quality import CHECKS, CheckResult
from offrl_models.schema import InputError
from tests.conftest import as_table, attributes, chain_world

pytestmark = pytest.mark.usefixtures("no_pages")

WORLD = chain_world()
THRESHOLDS = CoverageConfig()


@pytest.fixture(scope="module")
def contract() -> Contract:
    configured = attributes(WORLD.n_states, 3)
    configured["logs"] |= {"subgroups": ["sex"], "policy_version": "version", "decided_at": "at", "ingested_at": "came"}
    configured["logs"] |= {"entity": "patient"}
    configured["logs"]["reward"] |= {"window_hours": 48, "arrived_at": "known", "missing": 0.0}
    return parse_pipeline(configured, "toy").logs


@pytest.fixture(scope="module")
def clean(contract: Contract, tmp_path_factory: pytest.TempPathFactory) -> Coverage:
    """1,200 episodes over ten days, with every column that a check can look at."""
    table = pl.DataFrame(as_table(WORLD.simulate(1200, seed=3)))
    at = pl.datetime(2025, 3, 1) + pl.duration(minutes=pl.col("episode") * 12 + pl.col("step"))
    log = table.with_columns(
        patient="episode", at=at, came=at + pl.duration(minutes=1), known=at + pl.duration(hours=1), version=pl.lit("v1"),
        sex=pl.when(pl.col("episode") % 2 == 0).then(pl.lit("f")).otherwise(pl.lit("m")),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("clean") / "b.parquet"
    storage.write_parquet(path, log.to_arrow())
    return measure(Log.open([path], contract))


def run(measured: Coverage, contract: Contract, folder: Path, *, unchanged: int = 1) -> dict[str, CheckResult]:
    files = pl.DataFrame({"file": ["b.parquet"], "unchanged": [unchanged]})
    return {r.check: r for r in check_logs(measured, contract, THRESHOLDS, files, folder / "docs")}


def test_on_a_clean_log_every_check_but_the_chain_looks_and_holds(
    clean: Coverage, contract: Contract, tmp_path: Path
) -> None:
    found = run(clean, contract, tmp_path)
    assert [name for name, result in found.items() if not result.passed] == []
    silent = {name for name, result in found.items() if not result.applies}
    assert silent <= {"C34", "C11"}  # no chain; the one observed column is a category and has no outliers
    assert set(found) == {name for name, check in CHECKS.items() if "raw_logs" in check.assets}


DAY = date(2025, 3, 9)
TRIPPED: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "C09": ("C09", {"column": "state", "auc": 0.995, "positives": 5, "negatives": 5}, True, "column 'state' alone predicts"),
    "C11": ("C11", {"column": "age", "rows": 9, "median": 1.0, "scale": 1.0, "share": 0.02}, False, "2.00% of column 'age'"),
    "C12 drift": ("C12", {"z": 5.0}, False, "differs from that of the batches before it (z = 5.0)"),
    "C29": ("C29", {"test": "actor", "z": 6.0, "r2_gain": 0.02}, False, "actor: z = 6.0"),
    "C30": ("C30", {"target": "reward", "gain": 0.05}, False, "the prediction of reward by 0.050"),
    "C31": ("C31", {"share_late": 0.2}, True, "20.0% of the rewards came after their window"),
    "C32 median": ("C32", {"median_min": 9.0}, False, "were ingested 9.0 minutes later"),
    "C32 early": ("C32", {"share_early": 0.1}, False, "10.0% of the decisions of source 'log'"),
    "C33": ("C33", {"day": DAY, "rows": 900, "ratio": 7.5, "partial": False}, False, "2025-03-09 has 900 rows, 7.50 times"),
    "C36": ("C36", {"group": "sex", "value": "x", "episodes": 12}, False, "subgroup sex = x has 12 episodes"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIPPED)
def test_a_measure_beyond_its_threshold_fails_its_check(
    name: str, clean: Coverage, contract: Contract, tmp_path: Path
) -> None:
    check, row, blocking, sentence = TRIPPED[name]
    table = clean.derived[check]
    blank = {column: None for column in table.columns} if table.height == 0 else table.row(-1, named=True)
    worse = pl.concat([table, pl.DataFrame([{**blank, **row}], schema=table.schema)])
    measured = dataclasses.replace(clean, derived={**clean.derived, check: worse})
    result = run(measured, contract, tmp_path)[check]
    assert not result.passed and result.blocking is blocking and sentence in result.sentence


def test_rows_of_another_entity_block_the_log(tmp_path: Path) -> None:
    """Accepted before the contract named the entity: no batch is refused any more, so the coverage must."""
    configured = attributes(WORLD.n_states, 3)
    second = (pl.col("step") == 1) & (pl.col("episode") < 40)
    log = pl.DataFrame(as_table(WORLD.simulate(300, seed=3)))
    log = log.with_columns(patient=pl.col("episode") + pl.when(second).then(7000).otherwise(0))
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    storage.write_parquet(pipeline.raw / "b.parquet", log.to_arrow())
    stages.ingest(pipeline).require_clean()
    configured["logs"] |= {"entity": "patient"}
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    results = stages.coverage(pipeline)[1]
    (result,) = [result for result in results if not result.passed and result.blocking]
    rows = log.filter(second).height
    said = f"column 'patient': {rows} rows of 1 batches, belonging to another entity than their episode"
    assert result.check == "C27" and rows > 10 and result.sentence.startswith(said)
    with pytest.raises(InputError, match=f"check C27 blocks the log: {said}"):
        stages.episodes(pipeline)


def test_a_log_without_entities_has_nothing_that_could_mix_them(
    clean: Coverage, contract: Contract, tmp_path: Path
) -> None:
    result = run(clean, contract.model_copy(update={"entity": None}), tmp_path)["C27"]
    assert result.passed and result.sentence == "not applicable: every episode is an entity of its own"


@pytest.mark.parametrize("unknown", [0, 3])
def test_late_rewards_of_no_decision_are_said_without_arrival_times(unknown: int, tmp_path: Path) -> None:
    contract = parse_pipeline(attributes(WORLD.n_states, 3), "toy").logs
    log = pl.DataFrame(as_table(WORLD.simulate(300, seed=3)))
    late = pl.DataFrame({"episode": [9000 + i for i in range(unknown)] or [0], "step": 0, "reward": 0.3})
    if not unknown:
        late = log.filter(pl.col("reward") > 0).select("episode", "step", "reward").head(1)
    for name, batch in (("a", log), ("b", late)):
        storage.write_parquet(tmp_path / f"{name}.parquet", batch.to_arrow())
    measured = measure(Log.open([tmp_path / "a.parquet", tmp_path / "b.parquet"], contract))
    result = run(measured, contract, tmp_path)["C31"]
    said = f"column 'episode': {unknown} rows of 1 batches, with a reward for a decision that no batch has"
    assert result.passed is (unknown == 0)
    assert result.sentence.startswith(said if unknown else "not applicable: the log has no arrival times of rewards")
    assert result.blocking is bool(unknown)


def test_a_changed_file_and_thin_cells_and_constant_rewards(
    clean: Coverage, contract: Contract, tmp_path: Path
) -> None:
    facts = {"share_of_thin_cells": 0.9, "reward_distinct_values": 1}
    found = run(dataclasses.replace(clean, card={**clean.card, **facts}), contract, tmp_path, unchanged=0)
    assert not found["C02"].passed and found["C02"].blocking and "b.parquet is not the file" in found["C02"].sentence
    assert not found["C21"].passed and not found["C21"].blocking and "90.0% of the" in found["C21"].sentence
    assert not found["C12"].passed and not found["C12"].blocking and "all rewards are equal" in found["C12"].sentence


def test_the_splits(tmp_path: Path) -> None:
    clean = {
        "support": pl.DataFrame({"share_outside": [0.001]}),
        "entities": pl.DataFrame({"splits": [1], "entities": [900]}),
        "duplicates": pl.DataFrame({"split": ["train", "gate"], "share": [0.0, 0.0]}),
    }
    assert all(result.passed for result in check_splits(clean, THRESHOLDS, tmp_path / "docs"))
    bad = {
        "support": pl.DataFrame({"share_outside": [0.1]}),
        "entities": pl.DataFrame({"splits": [1, 2], "entities": [890, 10]}),
        "duplicates": pl.DataFrame({"split": ["train", "gate"], "share": [0.0, 0.05]}),
    }
    found = {result.check: result for result in check_splits(bad, THRESHOLDS, tmp_path / "docs")}
    assert {name: (r.passed, r.blocking) for name, r in found.items()} == {
        "C26": (False, False), "C27": (False, True), "C28": (False, False)
    }  # fmt: skip
    assert (
        "10 entities are in 2 splits" in found["C27"].sentence
        and "5.00% of the episodes of gate" in found["C28"].sentence
    )


@pytest.mark.parametrize(
    ("z", "shortfall_z", "passed", "blocking"),
    [
        (1.0, 0.0, True, True),
        (9.0, 0.0, False, True),  # too small, whatever the model
        (-9.0, -9.0, False, True),
        (-9.0, -3.0, False, False),  # no further below 1 than the model may be
    ],
)
def test_the_mean_ratio_of_the_behavior_model(
    tmp_path: Path, z: float, shortfall_z: float, passed: bool, blocking: bool
) -> None:
    rows = [
        {"version": "older", "mean_ratio": 1.0, "z": 0.0, "shortfall_z": 0.0},
        {"version": "newer", "mean_ratio": 1.0 + z / 50, "z": z, "shortfall_z": shortfall_z},
    ]
    result = check_behavior({"ece": 0.0, "brier": 0.1, "mean_ratios": rows}, THRESHOLDS, tmp_path / "docs")[0]
    assert result.check == "C15" and result.passed is passed and result.blocking is blocking
    assert passed or f"logged propensities of newer is {1 + z / 50:.3f}" in result.sentence


def test_a_behavior_model_that_knows_no_state_of_other_episodes(tmp_path: Path) -> None:
    result = check_behavior({"ece": 0.0, "brier": 0.1, "mean_ratios": []}, THRESHOLDS, tmp_path / "docs")[0]
    assert result.check == "C15" and not result.applies and "nothing in the episodes held out" in result.sentence


def test_the_behavior_model_and_the_newest_batch(tmp_path: Path) -> None:
    for ece, passed in ((0.019, True), (0.021, False)):
        ratios, result = check_behavior({"ece": ece, "brier": 0.1}, THRESHOLDS, tmp_path / "docs")
        assert ratios.check == "C15" and ratios.sentence.startswith("not applicable: no propensities are logged")
        assert result.check == "C16" and result.passed is passed and not (result.blocking and not passed)
    for index, passed, blocking in ((0.05, True, True), (0.2, False, False), (0.3, False, True)):
        (result,) = check_shift([{"column": "age", "index": index}], 0.1, 0.25, tmp_path / "docs")
        assert result.check == "C25" and result.passed is passed and result.blocking is blocking
    (alone,) = check_shift([], 0.1, 0.25, tmp_path / "docs")
    assert alone.passed and alone.sentence.startswith("not applicable: there is one batch only")


GOOD = {"policy": "p", "unsupported_mass": 0.0, "effective_transitions": 900.0,
        "ratio_q99": 3.0, "ratio_max": 9.0, "chi_squared": 1.0, "influence": 0.01, "without_top": 0.01}  # fmt: skip
GATE = {"unsupported_mass": 0.05, "effective_transitions": 500}


@pytest.mark.parametrize(
    ("check", "column", "value", "blocking"),
    [
        ("C19", "unsupported_mass", 0.2, True),
        ("C20", "effective_transitions", 20.0, True),
        ("C22", "ratio_q99", 25.0, False),
        ("C35", "influence", -0.001, True),
    ],
)
def test_the_rung_that_decides(check: str, column: str, value: float, blocking: bool, tmp_path: Path) -> None:
    assert all(result.passed for result in check_evidence([GOOD], GATE, THRESHOLDS, tmp_path / "docs"))
    found = {r.check: r for r in check_evidence([{**GOOD, column: value}], GATE, THRESHOLDS, tmp_path / "docs")}
    assert [name for name, result in found.items() if not result.passed] == [check]
    assert found[check].blocking is blocking
