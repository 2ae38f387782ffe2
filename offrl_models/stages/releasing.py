"""A look at drift, and the release of what passed."""

from pathlib import Path
from typing import Any

from offrl_models import bundle, storage
from offrl_models.config import Pipeline
from offrl_models.exported import interface, open_policy
from offrl_models.gate import Status
from offrl_models.reports import checks, plots, shift
from offrl_models.stages.data import read_episodes, read_log
from offrl_models.stages.judging import evidence_key
from offrl_models.stages.ranking import current_leaderboard
from offrl_models.storage import Stage


def shift_report(pipeline: Pipeline) -> Stage:
    """Compare training logs with the newest batch, and the behavior's actions with the best candidate's."""
    config, board = pipeline.config, current_leaderboard(pipeline)
    best = board.summary["best"]
    pages = tuple(pipeline.reports / name for name in ("shift-logs.html", "shift-actions.html", "shift.png"))

    def build(folder: Path) -> dict[str, Any]:
        rows, reference, newest = shift.log_drift(read_log(pipeline), config.seed)
        if rows:
            shift.write_report(reference, newest, pages[0], config.seed)
        else:
            storage.write_bytes(
                pages[0], b"<!doctype html><p>One batch only: there is nothing to compare it with yet.</p>"
            )
        selection = read_episodes(pipeline, "selection")
        candidate, names = open_policy(pipeline.candidate(best) / bundle.POLICY), config.logs.action.dimension_names
        index, logged, drawn = shift.action_shift(selection, candidate, names, config.seed)
        shift.write_report(logged, drawn, pages[1], config.seed)
        names = [*(row["column"] for row in rows), f"actions of {best}"]
        heights = [*(row["index"] for row in rows), index]
        title = "Newest batch against training logs, and the candidate's actions against the behavior's"
        plots.bars(names, heights, title, "population stability index", pages[2])
        worst = max((row["index"] for row in rows), default=0.0)
        color = "red" if worst > config.drift.red else "amber" if worst > config.drift.amber else "green"
        found = {"columns": rows, "worst": worst, "color": color, "actions_index": index, "candidate": best}
        results = checks.check_shift(rows, config.drift.amber, config.drift.red, docs)
        found["checks"] = [result.to_json() for result in results]
        storage.write_json(folder / "shift.json", found)
        return {**found, "compared_rows": reference.height, "newest_rows": newest.height}

    docs = pipeline.reports / "drift"
    return storage.build_stage(pipeline.folder / "shift", _shift_key(pipeline), build, pages)


def _shift_key(pipeline: Pipeline) -> dict[str, Any]:
    board = current_leaderboard(pipeline)
    return {
        "episodes": board.key["episodes"],
        "candidate": board.key["candidates"][board.summary["best"]],
        "drift": pipeline.config.drift.model_dump(),
        "seed": pipeline.config.seed,
    }


def release(pipeline: Pipeline) -> bundle.Release:
    """Release the rung that the verdict names.

    Raises ReleaseRefusedError unless the verdict is a PASS of that very policy and the newest batch has not drifted, and
    InputError when evidence or shift report are of other logs or settings than the present ones, so that the configuration
    in the bundle is the one that was trained and judged.
    """
    config = pipeline.config
    judged = storage.load_stage(pipeline.folder / "evidence", evidence_key(pipeline))
    drift = storage.load_stage(pipeline.folder / "shift", _shift_key(pipeline))
    if drift.summary["color"] == "red":
        raise bundle.ReleaseRefusedError(
            f"the newest batch has drifted from the training logs (index {drift.summary['worst']:.2f}); look at "
            f"{pipeline.folders.shown(pipeline.reports / 'shift-logs.html')}; the champion stays."
        )
    found = storage.read_json(judged.folder / "evidence.json")
    verdict = storage.read_json(judged.folder / "verdict.json")
    if judged.summary["status"] != Status.PASS:
        raise bundle.ReleaseRefusedError(
            f"the verdict on {judged.summary['policy_name']} is {judged.summary['status']}, not PASS: "
            f"{judged.summary['reason']}; the champion stays."
        )
    return bundle.release(
        judged.folder / judged.summary["rung"],
        verdict,
        thresholds=config.gate,
        evidence=found,
        config=config.resolved(),
        lineage={
            "interface": interface(open_policy(judged.folder / judged.summary["rung"] / bundle.POLICY)),
            "dataset": config.dataset,
            "algorithm": judged.summary["algorithm"],
            "candidate_name": judged.summary["candidate_name"],
            "cap": judged.summary["cap"],
            "compared_with": found["champion"]["name"],
            "champion_version": judged.summary["champion_version"],
            "candidate": judged.summary["candidate"],
            "raw_logs": found["raw_logs"],
            "code": judged.key["code"],
        },
        policies=pipeline.folder / "policies",
    )
