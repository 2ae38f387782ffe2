"""The whole walk under Dagster, headless: what is released, what is refused, what is re-used, and the shape of the graph."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from offrl_models import bundle, cli, registry, stages, storage
from offrl_models.config import DriftConfig, Pipeline, PipelineConfig, parse_pipeline, read_pipeline
from offrl_models.reports import shift
from offrl_models.reports.quality import CHECKS
from offrl_models.schema import InputError
from offrl_models.variants import candidate_name, variant_of
from orchestration.pipeline import TEMPLATE, OfflineRLPipeline
from tests.conftest import attributes, chain_world, side_by_side, write_batches
from tests.walks import ROOT, failures, made, printed, run, script

SIMULATE = Path("data") / "icu_sepsis" / "simulate.py"
SNAPSHOT = Path(__file__).parent / "graph.json"
WORLD = chain_world()

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite handles of ephemeral Dagster instances
    pytest.mark.filterwarnings("ignore:Parameter `execution_type`"),  # Dagster warns of its own beta code
]


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
    with pytest.raises(bundle.ReleaseRefusedError, match="has drifted from the training logs"):
        stages.release(copy)


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


def test_numeric_observations_are_judged_with_fitted_ratios_or_not_at_all(tmp_path: Path) -> None:
    write_batches(tmp_path, WORLD.simulate(2000, seed=3), numeric=True)
    configured = attributes(None, 3, algorithms={"cql": {"hidden": [16], "learning_rate": 0.01, "target_interval": 20}})
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    judged, _ = stages.run(pipeline)
    rung = storage.read_json(judged.folder / "evidence.json")["ladder"][0]
    measures = rung["measures"]
    assert measures["lower_bound"] <= measures["difference"]
    if measures["doubt"]:
        assert rung["status"] == "INCONCLUSIVE" and "weights" in measures["doubt"]
    else:
        assert measures["bound"].startswith("doubly robust paired difference with fitted visit ratios")


def test_a_few_hundred_icu_stays_go_the_whole_way(tmp_path: Path) -> None:
    """The shipped pipeline, trained for less long; with so few stays the verdict cannot be a PASS."""
    shipped = read_pipeline(ROOT / "orchestration" / "defs" / "icu_sepsis" / "defs.yaml")
    quick = {"training": {"gradient_steps": 60, "batch_size": 64}, "seeds": 2, "bootstrap_samples": 100}
    quick |= {"fqe": {"gradient_steps": 60, "hidden": [16]}, "drift": {"red": 5.0}}
    config = parse_pipeline({**shipped.model_dump(), **quick}, "icu_sepsis")
    script(SIMULATE).write(tmp_path / "data" / "icu_sepsis" / "raw", 400, 2, seed=1)
    pipeline = Pipeline(config, tmp_path)
    result = run(pipeline)
    assert "icu_sepsis__evidence" not in failures(result)
    shown = storage.read_json(pipeline.reports / "evidence.json")
    assert shown["verdict"]["status"] in ("INCONCLUSIVE", "INVALID")  # too few stays, and too few rows in most cells
    assert shown["exact"]["values"]["behavior"] == pytest.approx(0.7817, abs=0.02)
    assert set(shown["exact"]["values"]) >= {"bc", "cql", "iql", "bcq"}
    gated = (pipeline.folder / "evidence" / "evidence.json").read_text()
    assert "exact" not in json.loads(gated) and "exact" not in gated


def test_a_misspelt_key_is_one_sentence_and_other_pipelines_are_still_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ROOT / "orchestration" / "defs" / "icu_sepsis" / "defs.yaml"
    bad = tmp_path / "defs.yaml"
    bad.write_text(good.read_text().replace("episode_id:", "epsode_id:"))
    monkeypatch.setattr(sys, "argv", ["offrl", "validate", str(bad), str(good)])
    assert cli.main() == 1
    printed = capsys.readouterr()
    assert "unknown key 'epsode_id': did you mean 'episode_id'?" in printed.err and printed.err.count("\n") == 1
    assert "the YAML of icu_sepsis is right" in printed.out.replace("\n", " ")


def graph(definitions: dg.Definitions) -> dict[str, Any]:
    repository = definitions.get_repository_def()
    nodes = repository.asset_graph
    return {
        "assets": {
            key.to_user_string(): {
                "deps": sorted(parent.to_user_string() for parent in nodes.get(key).parent_keys),
                "kinds": sorted(nodes.get(key).kinds),
            }
            for key in sorted(nodes.get_all_asset_keys())
        },
        "checks": {
            f"{key.asset_key.to_user_string()}:{key.name}": nodes.get(key).blocking
            for key in sorted(nodes.asset_check_keys, key=str)
        },
        "jobs": sorted(name for name in repository.job_names if not name.startswith("__")),
        "schedules": {schedule.name: schedule.cron_schedule for schedule in repository.schedule_defs},
        "sensors": sorted(sensor.name for sensor in repository.sensor_defs),
    }


def test_the_graph_is_the_one_on_record() -> None:
    """After a change that is meant, run `python -m tests.test_pipeline` and commit the new record."""
    from orchestration.definitions import defs

    assert graph(defs()) == json.loads(SNAPSHOT.read_text())


def test_the_sensor_asks_for_one_run_per_landing(toy: Pipeline) -> None:
    repository = OfflineRLPipeline(toy).build_defs().get_repository_def()
    sensor = repository.get_sensor_def("toy_new_logs")
    assert "no batch lies in data/toy/landing" in str(sensor(dg.build_sensor_context()))
    toy.folders.landing.mkdir(parents=True)
    shutil.copy(toy.raw / "batch-1.parquet", toy.folders.landing / "new.parquet")
    first, second = sensor(dg.build_sensor_context()), sensor(dg.build_sensor_context())
    assert isinstance(first, dg.RunRequest) and isinstance(second, dg.RunRequest)
    assert first.run_key == second.run_key


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"algoritms": {}}, "unknown key 'algoritms': did you mean 'algorithms'?"),
        ({"gate": {"alpa": 0.05}}, "gate: unknown key 'alpa': did you mean 'alpha'?"),
        (
            {"algorithms": {"iql": {"expectle": 0.8}}},
            "algorithms: unknown key 'expectle' of iql: did you mean 'expectile'?",
        ),
        ({"algorithms": {"cqll": {}}}, "algorithms: unknown algorithm 'cqll': did you mean 'cql'?"),
        (
            {"algorithms": {"iql": {"expectle": [0.7, 0.8]}}},
            "algorithms: unknown key 'expectle' of iql: did you mean 'expectile'?",
        ),
        (
            {"algorithms": {"iql": {"expectile": []}}},
            "algorithms: expectile of iql is an empty list; give it a value at least, or leave it out",
        ),
        (
            {"algorithms": {"cql": {"alpha": [1, 4, 1.0]}}},
            "algorithms: alpha of cql lists 1 twice; list every value once",
        ),
        (
            {"algorithms": {"iql": {"expectile": [0.7, 1.5], "polyak": 0.01}}},
            "algorithms: expectile of iql expectile=1.5: input should be less than 1, not 1.5",
        ),
        (
            {"algorithms": {"bc": {}, "iql": {"expectile": [i / 50 for i in range(1, 50)], "polyak": [0.1, 0.2]}}},
            "algorithms: the lists make 99 variants (98 of iql), and at most 64 are trained: shorten them",
        ),
        (
            {"algorithms": {"bc": {"hidden": [[8], 8]}}},
            "algorithms: hidden of bc is one list, or a list of lists to sweep it, and not a mixture",
        ),
        (
            {"training": {"gradient_steps": 2, "checkpoints": 3}},
            "training: 3 checkpoints need as many gradient_steps, not 2",
        ),
        ({"selection": {"finalist": 3}}, "selection: unknown key 'finalist': did you mean 'finalists'?"),
        ({"gate": {"alpha": 2}}, "gate.alpha: Input should be less than 0.5"),
        ({"known_world": 3}, "known_world: Input should be a valid string"),
    ],
)
def test_a_mistake_in_the_yaml_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse_pipeline(attributes(10, 3, **change), "defs.yaml")
    assert str(refusal.value) == f"defs.yaml: {sentence}"


def test_a_list_is_a_sweep_but_where_the_setting_is_a_list_itself() -> None:
    swept = {
        "cql": {"alpha": [0.5, 1e-7, 4.0], "hidden": [16, 8]},
        "bc": {"hidden": [[16], [16, 8]]},
        "crr": {"weight": ["exp", "binary"], "max_weight": [5]},
        "dqn": {"double": [True, False], "learning_rate": [0.1, 0.01]},
    }
    config = parse_pipeline(attributes(10, 3, algorithms=swept), "defs.yaml")
    variants = config.variants()
    assert list(variants) == [
        "cql alpha=0.5", "cql alpha=1e-07", "cql alpha=4", "bc hidden=16", "bc hidden=16x8", "crr weight=exp",
        "crr weight=binary", "dqn learning_rate=0.1 double=true", "dqn learning_rate=0.1 double=false",
        "dqn learning_rate=0.01 double=true", "dqn learning_rate=0.01 double=false",
    ]  # fmt: skip
    assert [variants[name].config.hidden for name in ("cql alpha=4", "bc hidden=16", "bc hidden=16x8")] == [
        (16, 8), (16,), (16, 8),
    ]  # fmt: skip
    assert variants["cql alpha=4"].config.alpha == 4.0 and variants["crr weight=exp"].config.max_weight == 5
    assert parse_pipeline(config.resolved(), "again").variants() == variants
    folders = [Pipeline(config, Path("root")).candidate(candidate_name(name, 70)) for name in variants]
    assert len(set(folders)) == len(folders) and folders[2].relative_to("root/data/toy/candidates") == Path(
        "cql,alpha=4/checkpoint-70"
    )
    assert variant_of("cql alpha=4 @70") == ("cql alpha=4", 70) and variant_of("bc") == ("bc", None)


def test_a_sweep_and_its_checkpoints_go_the_whole_way_by_their_names(toy: Pipeline) -> None:
    """Six candidates and three places: the best of bc has one, for all that its score says."""
    settings = {"hidden": [8], "learning_rate": 0.02}
    changed = {
        "algorithms": {"bc": settings, "cql": settings | {"alpha": [0.01, 1.0], "target_interval": 10}},
        "training": {"gradient_steps": 60, "batch_size": 64, "checkpoints": 2},
        "selection": {"finalists": 3},
        "gate": {"ladders": 2, "caps": [2.0]},
    }
    swept = Pipeline(parse_pipeline(attributes(WORLD.n_states, 3, **changed), "toy"), toy.root)
    result = run(swept)
    assert {"candidates/bc", "candidates/cql", "leaderboard", "evidence"} <= made(result), failures(result)
    every = {f"{name}{earlier}" for name in ("bc", "cql alpha=0.01", "cql alpha=1") for earlier in ("", " @30")}
    assert len({(swept.candidate(name) / "policy.onnx").read_bytes() for name in every}) == 6
    board = storage.read_json(swept.folder / "leaderboard" / "leaderboard.json")
    ranked, pruned = ([row["candidate"] for row in board[part]] for part in ("ranking", "pruned"))
    assert len(ranked) == len(pruned) == 3 and {*ranked, *pruned} == every
    assert sum(name.startswith("bc") for name in ranked) == 1 and board["ranking"][0]["first_order_gain"] is not None
    assert sum(row["probability_best"] for row in board["ranking"]) == pytest.approx(1.0)
    assert board["ranking"][0]["beats_next"] >= 0.5 and board["ranking"][-1]["beats_next"] is None
    page = (swept.reports / "leaderboard.html").read_text()
    assert (
        all(name in page for name in every)
        and "of 6 by first-order gain, and 3 are ranked, the best of each algorithm" in page
    )
    shown = storage.read_json(swept.reports / "evidence.json")
    assert [row["policy"] for row in shown["candidates"]] == ranked
    assert [rung["policy"] for rung in shown["ladder"]] == [f"{name} ≤ 2μ" for name in ranked[:2]]
    assert storage.load_stage(swept.folder / "evidence").summary["algorithm"] == "cql"
    status, text = printed(swept, result)
    assert status == 0 and ranked[0] in text
    events = result.get_asset_materialization_events()
    said = {event.asset_key.path[-1]: event.materialization.metadata for event in events if event.asset_key}
    trained, told = (
        {name: str(value.value) for name, value in said[asset].items()} for asset in ("cql", "leaderboard")
    )
    assert "| cql alpha=0.01 |" in trained["variants"] and "cql,alpha=1.png" in trained["curves"]
    assert board["sentence"] == told["how sure"] and pruned[0] in told["pruned"]

    longer = settings | {"alpha": [0.01, 0.1, 1.0], "target_interval": 10}
    more = swept.config.model_copy(update={"algorithms": {"bc": settings, "cql": longer}})
    again = stages.candidates(Pipeline(more, toy.root), ["cql"])
    reused = {"cql alpha=0.01": True, "cql alpha=0.1": False, "cql alpha=1": True}
    assert {name: stage.reused for name, stage in again["cql"].items()} == reused


def test_no_candidate_is_pruned_while_there_are_places(released: tuple[Pipeline, Any]) -> None:
    pipeline, _ = released
    board = storage.read_json(pipeline.folder / "leaderboard" / "leaderboard.json")
    assert board["pruned"] == [] and [row["first_order_gain"] for row in board["ranking"]] == [None, None]
    certain = r"with probability (99|100)%"
    sentence = rf"cql is ranked first: it beats bc, the second, {certain}, and is the best of 2 {certain}\."
    assert re.fullmatch(sentence, board["sentence"])


def test_the_scaffolded_pipeline_is_a_valid_one_and_plain_names_are_numbers() -> None:
    config = parse_pipeline(TEMPLATE, "template")
    assert [column.categories for column in config.logs.observation] == [None, 12]
    schema = json.dumps(PipelineConfig.model_json_schema())
    assert 'additionalProperties": false' not in schema  # unknown keys reach the validator that names the nearest one


def test_a_misspelt_column_role_names_the_nearest() -> None:
    configured = attributes(10, 3)
    configured["logs"]["action_probability"] = configured["logs"].pop("action_prob")
    with pytest.raises(InputError, match="logs: unknown key 'action_probability': did you mean 'action_prob'"):
        parse_pipeline(configured, "defs.yaml")


if __name__ == "__main__":
    from orchestration.definitions import defs

    SNAPSHOT.write_text(json.dumps(graph(defs()), indent=1, sort_keys=True) + "\n")
