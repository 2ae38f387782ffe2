"""A ward whose log passes every check: simulated patients, a pipeline over them, and a trainer that is given its policy."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from offrl_models import storage
from offrl_models.algorithms import BC
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.learner import Trained
from offrl_models.schema import Episodes

STATES, ACTIONS, LONGEST, EPISODES, DAYS = 6, 4, 8, 6000, 14
NEW = 5  # a state that nobody is in
START = datetime(2025, 3, 1)
SALT = "offrl"
BOTH, STATE = ("state", "pain"), ("state",)  # what is observed


def table(arrival: list[float], later: list[float]) -> np.ndarray:
    """A policy by state: everybody arrives in state 0, and nobody comes back to it."""
    return np.array([arrival, *[later] * (STATES - 1)])


LATER, LATER_BETTER = [0.5, 0.394, 0.1, 0.006], [0.25, 0.68, 0.064, 0.006]
BEHAVIOR = table([0.56, 0.404, 0.03, 0.006], LATER)
BETTER = table([0.3, 0.676, 0.018, 0.006], LATER_BETTER)
WORTH = np.array([0.4, 0.6, 0.2, 0.4])  # mean reward of each action, but for a little that depends on the state


def simulate(seed: int) -> pl.DataFrame:
    """Patients of two episodes each. Neither pain nor site is of any consequence; `chance` is noise that no contract names."""
    rng = np.random.default_rng(seed)
    worth = WORTH + rng.normal(0, 0.02, (STATES, ACTIONS))
    onward = np.zeros((STATES, ACTIONS, STATES))
    onward[:, :, 1:NEW] = rng.dirichlet(np.full(NEW - 1, 2.0), (STATES, ACTIONS))

    def draw(probs: np.ndarray) -> np.ndarray:
        return (rng.random(len(probs))[:, None] > probs.cumsum(1)[:, :-1]).sum(1)

    running, parts = np.arange(EPISODES), []
    state, pain = np.zeros(EPISODES, np.int64), rng.binomial(10, 0.4, EPISODES)
    for step in range(LONGEST):
        action, ended = draw(BEHAVIOR[state]), rng.random(len(running)) < 0.5
        following, next_pain = draw(onward[state, action]), rng.binomial(10, 0.4, len(running))
        row = {"episode": running, "step": np.full(len(running), step), "state": state, "pain": pain, "action": action}
        row |= {"prob": BEHAVIOR[state, action], "next_state": following, "next_pain": next_pain, "terminated": ended}
        row |= {"reward": np.clip(rng.normal(worth[state, action], 0.1), 0, 1), "chance": rng.random(len(running))}
        parts.append(pl.DataFrame(row | {"truncated": ~ended & (step == LONGEST - 1)}))
        running, state, pain = running[~ended], following[~ended], next_pain[~ended]
    patient = pl.col("episode") // 2
    at = START + pl.duration(seconds=pl.col("episode") * (DAYS * 86_400 // EPISODES) + pl.col("step") * 60)
    more = {
        "at": at, "came": at + pl.duration(minutes=1), "known": at + pl.duration(hours=1), "version": pl.lit("v1"),
        "patient": pl.format("patient {}", patient), "site": pl.format("site {}", pl.col("episode") % 3),
        "sex": pl.when(patient % 2 == 0).then(pl.lit("f")).otherwise(pl.lit("m")),
    }  # fmt: skip
    return pl.concat(parts).sort("episode", "step").with_columns(**more)


def configured(observed: tuple[str, ...], states: int) -> dict[str, Any]:
    """A pipeline over such logs. What is judged is the candidate itself, uncapped; it is given, and the rest trained briefly."""
    columns = [{"column": "state", "categories": states}, {"column": "pain", "range": [0, 99]}]
    logs = {
        "source": "data/ward/raw", "episode_id": "episode", "entity": "patient", "step": "step",
        "observation": [column for column in columns if column["column"] in observed],
        "next_observation": [f"next_{name}" for name in observed], "action": {"column": "action", "values": ACTIONS},
        "action_prob": "prob", "terminated": "terminated", "truncated": "truncated", "policy_version": "version",
        "reward": {"column": "reward", "range": [0, 1], "window_hours": 48, "arrived_at": "known"},
        "decided_at": "at", "ingested_at": "came", "actor": "site", "subgroups": ["sex"], "gamma": 1.0,
    }  # fmt: skip
    return {
        "dataset": "ward",
        "logs": logs,
        "salt": SALT,
        "algorithms": {"bc": {"hidden": [STATES]}},
        "seeds": 1,
        "fqe": {"gradient_steps": 10, "hidden": [8], "members": 2},
        "bootstrap_samples": 100,
        "gate": {"caps": [None], "effective_transitions": 430},
    }


def land(root: Path, log: pl.DataFrame, observed: tuple[str, ...] = BOTH, states: int = STATES) -> Pipeline:
    """The log in three batches that wait to be taken in."""
    pipeline = Pipeline(parse_pipeline(configured(observed, states), "ward"), root)
    batch = (pl.col("episode") // (EPISODES // 3)).clip(upper_bound=2)
    for number in range(3):
        storage.write_parquet(pipeline.folders.landing / f"{number}.parquet", log.filter(batch == number).to_arrow())
    return pipeline


def given(policy: np.ndarray) -> Callable[..., tuple[BC, Trained]]:
    """A trainer that trains nothing: its network holds the logarithms of a policy by state."""

    def fit(_: str, settings: Any, train: Episodes, encoder: Any, *, seeds: range, **__: object) -> Any:
        algorithm = BC(settings, encoder, train.n_actions, seeds)
        weights = {name: torch.zeros_like(tensor) for name, tensor in algorithm.policy.named_parameters()}
        weights["net.first.table"] += torch.eye(STATES)
        weights["net.rest.0.weight"] += torch.as_tensor(np.log(np.maximum(policy, 1e-12)))
        algorithm.policy.load_state_dict(weights, strict=False)
        return algorithm, Trained([{"gradient_steps": 1, "policy": [0.0]}], {})

    return fit
