"""Settings of a pipeline: a mistake is one sentence, a list is a sweep, and what else may be set goes the whole way."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from offrl_models import cli, stages, storage
from offrl_models.config import Pipeline, PipelineConfig, parse_pipeline, read_pipeline
from offrl_models.reports.evidence import policy_rows
from offrl_models.schema import InputError
from offrl_models.variants import candidate_name, variant_of
from orchestration.pipeline import TEMPLATE
from tests.conftest import attributes, write_batches
from tests.test_pipeline import WORLD
from tests.walks import OF_DAGSTER, ROOT, failures, made, printed, run, script

pytestmark = [*OF_DAGSTER, pytest.mark.usefixtures("no_pages")]

SIMULATE = Path("data") / "icu_sepsis" / "simulate.py"


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
    exact = shown["exact"]["values"]
    assert set(exact) >= {"bc", "cql", "iql", "bcq"}
    ranked = {row["policy"]: row["estimates"]["FQE"]["estimate"] for row in policy_rows(shown)[1:]}
    assert set(ranked) == set(exact) - {"behavior"}
    best = max(exact[name] for name in ranked)
    assert shown["exact"]["rankings"]["FQE"]["regret_at_1"] == pytest.approx(
        best - exact[max(ranked, key=lambda name: ranked[name])]
    )
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
    assert len(set(folders)) == len(folders) and folders[2].relative_to(
        Path("root/data/toy/candidates").absolute()
    ) == Path("cql,alpha=4/checkpoint-70")
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
