"""Whole way of a log: files on disk, the stages, the checks. One clean log passes all; spoiled once, it fails one check alone.

Measures and checks are tested by themselves elsewhere. Here each check is tripped by rows, or by a policy that is judged on them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from great_expectations.data_context import AbstractDataContext
from jaxtyping import Float64

from offrl_models import bundle, stages, storage
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.leakage import split_tables
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.policies import BehaviorTable, export_checked
from offrl_models.reports.checks import check_splits
from offrl_models.reports.quality import BLOCKING, CHECKS, INFO, CheckResult
from offrl_models.schema import InputError
from offrl_models.stages import data, judging, learning

STATES, ACTIONS, LONGEST, EPISODES = 6, 4, 8, 4200
NEW = 5  # a state that no patient of the clean log is in
DAYS = 14
START = datetime(2025, 3, 1)
ARRIVAL, LATER = [0.5, 0.474, 0.02, 0.006], [0.5, 0.3, 0.194, 0.006]
BEHAVIOR = np.array([ARRIVAL, *[LATER] * (STATES - 1)])  # everybody arrives in state 0 and never comes back to it

# --- the clean log ----------------------------------------------------------------------------------------------------


def simulate(episodes: int, seed: int) -> pl.DataFrame:
    """Patients of two episodes each: a state and a pain score of no consequence, four actions, a reward for each of them."""
    rng = np.random.default_rng(seed)
    worth = np.clip(0.4 + np.outer(np.ones(STATES), [0.0, 0.1, -0.1, 0.0]) + rng.normal(0, 0.05, (STATES, ACTIONS)), 0, 1)
    onward = np.zeros((STATES, ACTIONS, STATES))
    onward[:, :, 1:NEW] = rng.dirichlet(np.full(NEW - 1, 2.0), (STATES, ACTIONS))

    def draw(probs: np.ndarray) -> np.ndarray:
        return (rng.random(len(probs))[:, None] > probs.cumsum(1)[:, :-1]).sum(1)

    running, state, pain = np.arange(episodes), np.zeros(episodes, int), rng.binomial(10, 0.4, episodes)
    parts = []
    for step in range(LONGEST):
        action = draw(BEHAVIOR[state])
        following, next_pain = draw(onward[state, action]), rng.binomial(10, 0.4, len(running))
        ends = rng.random(len(running)) < 0.35
        reward = np.clip(worth[state, action] + rng.normal(0, 0.1, len(running)), 0, 1)
        parts.append(
            pl.DataFrame(
                {
                    "episode": running, "step": step, "state": state, "pain": pain, "next_state": following,
                    "next_pain": next_pain, "action": action, "prob": BEHAVIOR[state, action], "reward": reward,
                    "terminated": ends, "truncated": ~ends & (step == LONGEST - 1),
                }
            )
        )  # fmt: skip
        running, state, pain = running[~ends], following[~ends], next_pain[~ends]
    patient, site = pl.col("episode") // 2, pl.col("episode").hash(3) % 3
    at = START + pl.duration(seconds=pl.col("episode") * (DAYS * 86_400 // episodes) + pl.col("step") * 60)
    return (
        pl.concat(parts)
        .sort("episode", "step")
        .with_columns(
            at=at, came=at + pl.duration(minutes=1), known=at + pl.duration(hours=1), version=pl.lit("v1"),
            patient=pl.format("patient {}", patient), site=pl.format("site {}", site),
            sex=pl.when(patient % 2 == 0).then(pl.lit("f")).otherwise(pl.lit("m")),
        )
    )  # fmt: skip


# --- the whole way ----------------------------------------------------------------------------------------------------


def configured(observed: tuple[str, ...], categories: int) -> dict[str, Any]:
    """A pipeline over such logs; the policy that is judged is given, and so nothing is trained for long."""
    columns: list[Any] = [{"column": "state", "categories": categories}, {"column": "pain", "range": [0, 99]}]
    columns = [column for column in columns if column["column"] in observed]
    logs = {
        "source": "data/ward/raw", "episode_id": "episode", "entity": "patient", "step": "step", "observation": columns,
        "next_observation": [f"next_{name}" for name in observed], "action": {"column": "action", "values": ACTIONS},
        "action_prob": "prob", "terminated": "terminated", "truncated": "truncated", "policy_version": "version",
        "reward": {"column": "reward", "range": [0, 1], "window_hours": 48, "arrived_at": "known"},
        "decided_at": "at", "ingested_at": "came", "actor": "site", "subgroups": ["sex"], "gamma": 1.0,
    }  # fmt: skip
    return {
        "dataset": "ward",
        "logs": logs,
        "algorithms": {"bc": {}},
        "seeds": 1,
        "fqe": {"gradient_steps": 10, "hidden": [8], "members": 2},
        "bootstrap_samples": 100,
        "gate": {"caps": [None]},
    }


def write(root: Path, frame: pl.DataFrame) -> Pipeline | None:
    third = EPISODES // 3
    for number in range(3):
        part = frame.filter(pl.col("episode") // third == number)
        storage.write_parquet(root / "data" / "ward" / "raw" / f"{number}.parquet", part.to_arrow())


def walk(pipeline: Pipeline, candidate: np.ndarray | None = None) -> dict[str, CheckResult]:
    import time
    t = time.time()
    def lap(n):
        nonlocal t
        print(f"   {n} {time.time()-t:.2f}"); t = time.time()
    stages.ingest(pipeline).require_clean()
    lap("ingest")
    found = stages.coverage(pipeline)[1]
    lap("coverage")
    if not any(r.blocking and not r.passed for r in found):
        found += stages.check_results(stages.episodes(pipeline))
        lap("episodes")
        if candidate is not None:
            found += stages.check_results(stages.behavior_policy(pipeline))
            lap("behavior")
            key = learning._candidate_key(pipeline, "bc", data.current_episodes(pipeline))
            def build(folder: Path):
                export_checked(BehaviorTable(candidate), stages.data.read_episodes(pipeline, "train"), folder)
                return {}
            storage.build_stage(pipeline.candidate("bc"), key, build)
            lap("candidate")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(judging, "load_candidate", lambda *_: BehaviorTable(candidate))
                stages.leaderboard(pipeline)
                lap("leader")
                ev = stages.evidence(pipeline)
                lap("evidence")
                print(ev.summary["reason"])
                print(storage.read_json(ev.folder / "evidence.json")["ladder"][0]["measures"])
            found += stages.check_results(ev)
            found += stages.check_results(stages.shift_report(pipeline))
            lap("shift")
    return {r.check: r for r in found}
