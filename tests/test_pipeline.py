"""The whole walk under Dagster, headless: what is released, what is refused, and what is re-used."""

import re
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offrl_models import bundle, registry, stages, storage
from offrl_models.config import DriftConfig, Pipeline, parse_pipeline
from offrl_models.logs.versions import log_version
from offrl_models.reports import evidence, shift
from offrl_models.reports.quality import CHECKS
from offrl_models.schema import InputError
from offrl_models.stages import drifting
from orchestration.pipeline import OfflineRLPipeline
from tests.conftest import attributes, chain_world, side_by_side, write_batches
from tests.walks import OF_DAGSTER, failures, made, printed, run

WORLD = chain_world()

pytestmark = OF_DAGSTER


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, dg.ExecuteInProcessResult]:
    """A world where a better policy is easy to find, and enough episodes for a verdict."""
    root = tmp_path_factory.mktemp("released")
    write_batches(root, WORLD.simulate(2600, seed=3), 3)
    pipeline = Pipeline(parse_pipeline(attributes(WORLD.n_states, 3, gate={}), "toy"), root)  # the whole ladder
    with side_by_side():
        return pipeline, run(pipeline)


def test_the_walk_ends_in_a_release_when_the_evidence_is_good(released: tuple[Pipeline, Any]) -> None:
    pipeline, result = released
    assert result.success, failures(result)
    assert made(result) == {
        "raw_logs", "episodes", "behavior_policy", "candidates/bc", "candidates/cql", "leaderboard", "evidence",
        "shift_report", "policy",
    }  # fmt: skip
    pointer = registry.champion(pipeline.folder / "policies")
    assert pointer is not None and pointer["verdict"] == "PASS" and pointer["lower_bound"] > 0
    folder = pipeline.folder / "policies" / str(pointer["version"])
    manifest = registry.verify(folder)
    assert manifest["raw_logs"] == stages.ingest(pipeline).version
    assert storage.read_json(folder / "config.json") == pipeline.config.resolved()
    from offrl_models.exported import OnnxPolicy

    states = WORLD.simulate(500, seed=5)
    table = OnnxPolicy(folder / "policy.onnx").on(states)
    policy = WORLD.behavior.copy()
    policy[states.observation[:, 0].astype(int)] = table
    assert WORLD.value(policy) > WORLD.value(WORLD.behavior) + pointer["lower_bound"] / 2


def test_every_asset_says_what_it_is_and_links_open(released: tuple[Pipeline, Any]) -> None:
    pipeline, result = released
    definitions = OfflineRLPipeline(pipeline).build_defs()
    for asset in definitions.resolve_all_asset_specs():
        assert asset.description and asset.kinds and asset.group_name == "toy", asset.key
    for event in result.get_asset_materialization_events():
        metadata = event.materialization.metadata
        kinds = {type(value) for value in metadata.values()}
        assert {dg.UrlMetadataValue, dg.MarkdownMetadataValue} <= kinds, event.asset_key
        assert "dagster/row_count" in metadata, event.asset_key
        for value in metadata.values():
            text = value.value if isinstance(value, (dg.UrlMetadataValue, dg.MarkdownMetadataValue)) else ""
            for part in str(text).replace("(", " ").replace(")", " ").split():
                if part.startswith("/reports/toy/"):
                    assert (pipeline.reports / part.removeprefix("/reports/toy/")).exists(), part
    expected = sum(len(check.assets) for check in CHECKS.values()) + 1  # and the gate
    assert len(result.get_asset_check_evaluations()) == expected
    assert all(check.passed for check in result.get_asset_check_evaluations())


def test_the_evidence_stands_beside_its_interval(released: tuple[Pipeline, Any]) -> None:
    pipeline, _ = released
    shown = storage.read_json(pipeline.reports / "evidence.json")
    assert shown["verdict"]["status"] == "PASS" and shown["exact"] is None
    for row in [*shown["candidates"], *shown["ladder"]]:
        assert set(row["estimates"]) == {"TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR", "FQE"}
        for interval in row["estimates"].values():
            assert interval["low"] <= interval["estimate"] <= interval["high"]
    page = (pipeline.reports / "evidence.html").read_text()
    assert "PASS" in page and shown["verdict"]["policy_name"] in page
    rows = evidence.policy_rows(shown)
    assert page.count('class="pale"') == sum(len(row["doubted"]) for row in rows) > 0


def test_the_demo_says_what_was_released(released: tuple[Pipeline, Any]) -> None:
    status, text = printed(*released)
    assert status == 0 and "Released cql" in text and "data/toy/policies/1" in text and "make ui" in text
    assert all(name in text for name in ("TIS", "WDR", "FQE", "ESS", "behavior", "PASS"))


def test_a_second_run_re_uses_everything_and_releases_nothing_new(released: tuple[Pipeline, Any]) -> None:
    pipeline, _ = released
    before = storage.read_json(pipeline.folder / "policies" / "champion.json")
    result = run(pipeline)
    assert result.success, failures(result)
    for event in result.get_asset_materialization_events():
        reused = event.materialization.metadata.get("reused")
        assert reused is None or reused.value is True, event.asset_key
    assert storage.read_json(pipeline.folder / "policies" / "champion.json") == before
    assert registry.versions(pipeline.folder / "policies") == [1]


def test_another_discount_is_another_dataset(released: tuple[Pipeline, Any], tmp_path: Path) -> None:
    """Gamma is in no row of the log, and must still reach every later step."""
    pipeline, _ = released
    shutil.copytree(pipeline.folder, tmp_path / "data" / "toy")
    logs = pipeline.config.logs.model_copy(update={"gamma": 0.5})
    other = Pipeline(pipeline.config.model_copy(update={"logs": logs}), tmp_path)
    with pytest.raises(InputError, match="coverage was made from other logs or settings"):
        stages.episodes(other)
    stages.coverage(other)
    assert stages.episodes(other).digest != storage.load_stage(pipeline.folder / "episodes").digest
    with pytest.raises(InputError, match="behavior was made from other logs or settings"):
        stages.leaderboard(other)
    stages.behavior_policy(other)
    with pytest.raises(InputError, match="candidates/bc was made from other logs or settings"):
        stages.evidence(other)


def test_another_setting_must_be_trained_before_it_is_judged(released: tuple[Pipeline, Any]) -> None:
    """A rung is built from the weights on disk and the settings in the YAML; they must belong together."""
    pipeline, _ = released
    hotter = {**pipeline.config.algorithms, "cql": {**pipeline.config.algorithms["cql"], "temperature": 0.5}}
    other = Pipeline(pipeline.config.model_copy(update={"algorithms": hotter}), pipeline.root)
    with pytest.raises(InputError, match="candidates/cql was made from other logs or settings"):
        stages.evidence(other)


def test_the_same_logs_elsewhere_give_the_same_bundle(released: tuple[Pipeline, Any], tmp_path: Path) -> None:
    pipeline, _ = released
    shutil.copytree(pipeline.raw, tmp_path / "data" / "toy" / "raw")
    elsewhere = Pipeline(pipeline.config, tmp_path)
    # Types are checked in this process, and what checks them leaves traces in the names of a graph's values.
    with side_by_side():
        judged, release = stages.run(elsewhere)
    assert judged.summary["status"] == "PASS" and release is not None
    mine = storage.read_json(pipeline.folder / "policies" / "champion.json")
    assert release.manifest_sha256 == mine["manifest_sha256"]


def test_two_candidates_that_climb_share_the_error_rate(released: tuple[Pipeline, Any], tmp_path: Path) -> None:
    pipeline, _ = released
    shutil.copytree(pipeline.folder, tmp_path / "data" / "toy", ignore=shutil.ignore_patterns("policies", "evidence"))
    gate = pipeline.config.gate.model_copy(update={"ladders": 2, "caps": (2.0, None)})
    both = Pipeline(pipeline.config.model_copy(update={"gate": gate}), tmp_path)
    judged = stages.evidence(both)
    found = storage.read_json(judged.folder / "evidence.json")
    assert [rung["policy"] for rung in found["ladder"]] == ["cql ≤ 2μ", "cql", "bc ≤ 2μ", "bc"]
    assert all(rung["measures"]["alpha"] == found["error_rate"]["alpha"] / 2 for rung in found["ladder"])
    bounds = {rung["policy"]: rung["measures"]["lower_bound"] for rung in found["ladder"] if rung["status"] == "PASS"}
    assert judged.summary["status"] == "PASS" and judged.summary["algorithm"] == "cql"
    assert judged.summary["lower_bound"] == bounds[judged.summary["policy_name"]]
    release = stages.release(both)
    assert (release.folder / "policy.onnx").read_bytes() == (
        judged.folder / judged.summary["rung"] / "policy.onnx"
    ).read_bytes()


def test_release_refuses_what_was_not_judged_also_when_materialized_alone(
    released: tuple[Pipeline, Any], tmp_path: Path
) -> None:
    pipeline, _ = released
    shutil.copytree(pipeline.folder, tmp_path / "data" / "toy")
    copy = Pipeline(pipeline.config, tmp_path)
    rung = copy.folder / "evidence" / storage.load_stage(copy.folder / "evidence").summary["rung"]
    other = copy.candidate("bc") / "policy.onnx"
    (rung / "policy.onnx").write_bytes(other.read_bytes())
    result = run(copy, "policy")
    assert not result.success
    assert "policy.onnx differs from what its step wrote" in failures(result)["toy__policy"]
    stricter = Pipeline(pipeline.config.model_copy(update={"gate": pipeline.config.gate.model_copy(update={"margin": 5.0})}),
                        pipeline.root)  # fmt: skip
    with pytest.raises(InputError, match="evidence was made from other logs or settings"):
        stages.release(stricter)


def test_drift_keeps_the_champion(
    released: tuple[Pipeline, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, _ = released
    shutil.copytree(pipeline.folder, tmp_path / "data" / "toy")
    touchy = pipeline.config.model_copy(update={"drift": DriftConfig(red=0.9)})
    copy = Pipeline(touchy, tmp_path)
    with pytest.raises(InputError, match="shift was made from other logs or settings"):
        stages.release(copy)
    monkeypatch.setattr(shift, "stability_index", lambda *_: 1.0)
    assert stages.shift_report(copy).summary["color"] == "red"
    with pytest.raises(InputError, match="evidence was made from other logs or settings"):
        stages.release(copy)
    judged = stages.evidence(copy)
    assert (judged.summary["status"], judged.summary["decided_by"]) == ("INVALID", "drift")
    said = r"the newest batch has drifted from the logs before it: the stability index of '\w+' is 1\.00, above 0\.9"
    assert re.search(said, str(judged.summary["reason"]))
    with pytest.raises(bundle.ReleaseRefusedError, match="is INVALID, not PASS: the newest batch has drifted"):
        stages.release(copy)


def test_a_drift_leaves_a_verdict_in_a_run(toy: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its check fails, and stops no step, nor does a warning: it is the gate that says INVALID, on its page."""
    monkeypatch.setattr(shift, "stability_index", lambda *_: 1.0)
    path = toy.raw / "batch-2.parquet"
    table = pq.read_table(path)
    poorer = pa.array(0.2 * table["reward"].to_numpy())
    storage.write_parquet(path, table.set_column(table.schema.get_field_index("reward"), "reward", poorer))
    result = run(toy)
    assert {"shift_report", "evidence"} <= made(result) and "policy" not in made(result)
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    drift = next(check for name, check in checks.items() if name.startswith("C25"))
    assert not drift.passed and not drift.blocking
    assert checks["gate"].description and checks["gate"].description.startswith("INVALID")
    assert "has drifted" in (toy.reports / "evidence.html").read_text()
    rewards = next(check for name, check in checks.items() if name.startswith("C12"))
    assert not rewards.passed and rewards.blocking and rewards.severity is dg.AssetCheckSeverity.WARN
    status, text = printed(toy, result)
    assert status == 0 and "Not released. INVALID: " in text


def test_too_few_episodes_are_inconclusive_and_nothing_is_released(toy: Pipeline) -> None:
    """600 episodes leave under 500 for the gate: the check blocks, and the release refuses by itself as well."""
    result = run(toy)
    assert not result.success
    assert "policy" not in made(result) and {"evidence", "shift_report"} <= made(result)
    gate = next(check for check in result.get_asset_check_evaluations() if check.check_name == "gate")
    assert not gate.passed and gate.description
    assert "INCONCLUSIVE" in gate.description and "fewer than the 500 of a first look" in gate.description
    status, text = printed(toy, result)
    assert status == 0 and "Not released. INCONCLUSIVE: " in text
    alone = run(toy, "policy")
    assert "is INCONCLUSIVE, not PASS" in failures(alone)["toy__policy"]
    assert not registry.versions(toy.folder / "policies") and registry.champion(toy.folder / "policies") is None


def test_a_bad_batch_fails_the_run_with_its_sentence_and_the_next_run_goes_on(toy: Pipeline) -> None:
    import polars as pl

    path = toy.raw / "batch-2.parquet"
    bad = pl.read_parquet(path).with_columns(reward=pl.lit(float("nan")))
    storage.write_parquet(toy.folders.landing / "late.parquet", bad.with_columns(pl.col("episode") + 900).to_arrow())
    result = run(toy, "raw_logs", "episodes")
    assert list(failures(result)) == ["toy__raw_logs"]
    sentence = failures(result)["toy__raw_logs"]
    assert sentence.startswith("data/toy/landing/late.parquet: column 'reward' has ") and "quarantine" in sentence
    assert printed(toy, result)[0] == 1 and printed(toy, result)[1].startswith("Error: data/toy/landing/late.parquet")
    assert (toy.folders.quarantine / "late.parquet").exists() and made(result) == set()
    assert run(toy, "raw_logs").success


@pytest.mark.parametrize(
    ("prob", "before", "printed_as", "said"),
    [
        (0.2, {"raw_logs"}, "check C15_mean_importance_ratios_are_1 blocks: ", "the mean ratio of 'uniform' has z = "),
        (0.6, {"raw_logs", "episodes"}, "", "the logged propensities of state 0 add up to 1.8000 over its actions"),
    ],
)
def test_a_blocking_coverage_check_stops_the_run_and_the_library(
    toy: Pipeline, prob: float, before: set[str], printed_as: str, said: str
) -> None:
    """Propensities that are wrong together pass every row-level rule, but not the mean-ratio test, or add up to more than 1."""
    import polars as pl

    for path in list(toy.raw.glob("*.parquet")):
        storage.write_parquet(path, pl.read_parquet(path).with_columns(prob=pl.lit(prob)).to_arrow())
    result = run(toy)
    assert not result.success and made(result) & {"raw_logs", "episodes", "behavior_policy"} == before
    assert any(f"Error: {printed_as}{said}"[:60] in line for line in printed(toy, result)[1:])
    refusing = stages.behavior_policy if "episodes" in before else stages.episodes
    with pytest.raises(InputError, match=said):
        refusing(toy)


def test_the_shift_report_is_of_the_raw_logs(released: tuple[Pipeline, Any]) -> None:
    """A batch that changes no episode, as one whose rewards are still to come, has to be looked at too."""
    pipeline, _ = released
    assert drifting.shift_key(pipeline)["raw"] == log_version(pipeline.raw)


def test_no_candidate_is_pruned_while_there_are_places(released: tuple[Pipeline, Any]) -> None:
    pipeline, _ = released
    board = storage.read_json(pipeline.folder / "leaderboard" / "leaderboard.json")
    assert board["pruned"] == [] and [row["first_order_gain"] for row in board["ranking"]] == [None, None]
    certain = r"with probability (99|100)%"
    sentence = rf"cql is ranked first: it beats bc, the second, {certain}, and is the best of 2 {certain}\."
    assert re.fullmatch(sentence, board["sentence"])
