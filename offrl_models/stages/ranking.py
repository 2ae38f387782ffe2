"""From trained candidates to a leaderboard, on the selection split."""

from pathlib import Path
from typing import Any

from offrl_models import bundle, storage
from offrl_models.config import Pipeline
from offrl_models.evaluation import BEHAVIOR
from offrl_models.exported import OnnxPolicy
from offrl_models.reports import plots
from offrl_models.selection import rank
from offrl_models.stages.behavior import current_behavior, read_evaluated
from offrl_models.stages.data import current_episodes, read_episodes
from offrl_models.stages.learning import current_candidates, evaluate_policies
from offrl_models.storage import Stage


def _leaderboard_key(pipeline: Pipeline) -> dict[str, Any]:
    config = pipeline.config
    return {
        "episodes": current_episodes(pipeline).digest,
        "behavior": current_behavior(pipeline).digest,
        "candidates": current_candidates(pipeline),
        "fqe": config.fqe.model_dump(mode="json"),
        "bootstrap": [config.seed, config.bootstrap_samples],
    }


def current_leaderboard(pipeline: Pipeline) -> Stage:
    """The ranking of the present candidates. Raises InputError when it is of others."""
    return storage.load_stage(pipeline.folder / "leaderboard", _leaderboard_key(pipeline))


def leaderboard(pipeline: Pipeline) -> Stage:
    """Rank the candidates on the selection split."""
    picture = pipeline.reports / "leaderboard.png"
    key = _leaderboard_key(pipeline)

    def build(folder: Path) -> dict[str, Any]:
        policies = {name: OnnxPolicy(pipeline.candidate(name) / bundle.POLICY) for name in key["candidates"]}
        policies[BEHAVIOR] = OnnxPolicy(pipeline.folder / "behavior" / bundle.POLICY)
        train, selection = read_episodes(pipeline, "train"), read_evaluated(pipeline, "selection")
        rows = rank(evaluate_policies(pipeline, policies, train, selection, "FQE for the leaderboard"))
        storage.write_json(folder / "leaderboard.json", rows)
        gains = [row["score"] for row in rows]
        plots.bars([row["candidate"] for row in rows], gains, "Least gain", "gain", picture)
        return {"best": rows[0]["candidate"], "ranking": rows, "episodes": selection.n_episodes}

    return storage.build_stage(pipeline.folder / "leaderboard", key, build, (picture,))
