"""Whether the newest logs still look like those that came before: the gate calls everything INVALID where they do not."""

from pathlib import Path
from typing import Any

from offrl_models import bundle, storage
from offrl_models.config import Pipeline
from offrl_models.exported import open_policy
from offrl_models.reports import checks, plots, shift
from offrl_models.stages.data import current_episodes, read_episodes, read_log
from offrl_models.stages.ranking import current_leaderboard
from offrl_models.storage import Stage

RED = "red"


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
        color = RED if worst > config.drift.red else "amber" if worst > config.drift.amber else "green"
        found = {"columns": rows, "worst": worst, "color": color, "actions_index": index, "candidate": best}
        results = checks.check_shift(rows, config.drift.amber, config.drift.red, docs)
        found["checks"] = [result.to_json() for result in results]
        storage.write_json(folder / "shift.json", found)
        return {**found, "compared_rows": reference.height, "newest_rows": newest.height}

    docs = pipeline.reports / "drift"
    return storage.build_stage(pipeline.folder / "shift", shift_key(pipeline), build, pages)


def shift_key(pipeline: Pipeline) -> dict[str, Any]:
    board = current_leaderboard(pipeline)
    return {
        "episodes": board.key["episodes"],
        "raw": current_episodes(pipeline).summary["raw"],  # of which not every batch changes the episodes
        "candidate": board.key["candidates"][board.summary["best"]],
        "drift": pipeline.config.drift.model_dump(),
        "seed": pipeline.config.seed,
    }


def current_shift(pipeline: Pipeline) -> Stage:
    """The shift report of the present logs and settings. Raises InputError when it is of others."""
    return storage.load_stage(pipeline.folder / "shift", shift_key(pipeline))


def drifted(pipeline: Pipeline) -> str:
    """What is said of the newest batch where a column of it is red; empty where none is."""
    found = current_shift(pipeline).summary
    if found["color"] != RED:
        return ""
    worst = max(found["columns"], key=lambda row: row["index"])
    return (
        f"the newest batch has drifted from the logs before it: the stability index of {worst['column']!r} is "
        f"{worst['index']:.2f}, above {pipeline.config.drift.red:g}"
    )
