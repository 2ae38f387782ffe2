"""What the tests share: small worlds whose exact values are known, and pipelines on logs drawn from them."""

import os
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  the hook looks it up by name

# Shapes and types in annotations are checked in every test.
install_import_hook("offrl_models", "tests.typechecker.check")

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import settings

from offrl_models import storage
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.ope.worlds import World, random_world
from offrl_models.schema import Episodes, Feature

torch.set_num_threads(1)
settings.register_profile("offrl", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("offrl")


@pytest.fixture(scope="session")
def tiny() -> World:
    """2 states, 2 actions, at most 3 steps, gamma 0.9: small enough to sum over every trajectory."""
    return random_world(2, 2, 3, 0.9, seed=1)


def chain_world(gamma: float = 1.0) -> World:
    """Ten states in a row, three actions; one of them is clearly better in every state. Episodes have at most 4 steps."""
    world = random_world(3, 3, 3, gamma, seed=7)
    rng = np.random.default_rng(11)
    good = rng.integers(0, 3, world.n_states)
    reward = np.zeros_like(world.reward)
    reward[np.arange(world.n_states), good] = 0.3
    reward[world.terminal] = 0.0
    behavior = np.full((world.n_states, 3), 1 / 3)
    return World(
        transition=world.transition,
        reward=reward,
        initial=world.initial,
        terminal=world.terminal,
        mask=world.mask,
        gamma=gamma,
        behavior=behavior,
    )


def codes(*categories: int | None) -> list[Feature]:
    """Columns of an observation: so many categories each, None for a number."""
    return [Feature(f"column {i}", n) for i, n in enumerate(categories)]


def as_table(episodes: Episodes, *, first_id: int = 0, numeric: bool = False) -> pa.Table:
    """Episodes as a raw log with the column names of `attributes`."""
    observation, following = episodes.observation[:, 0], episodes.next_observation[:, 0]
    columns = {
        "episode": (episodes.episode_of_row + first_id).astype(np.int64),
        "step": episodes.step.astype(np.int64),
        "state": observation.astype(np.float64) if numeric else observation.astype(np.int64),
        "next_state": following.astype(np.float64) if numeric else following.astype(np.int64),
        "action": episodes.action.astype(np.int64),
        "allowed": pa.FixedSizeListArray.from_arrays(pa.array(episodes.mask.ravel()), episodes.n_actions),
        "prob": episodes.action_prob,
        "reward": episodes.reward,
        "terminated": episodes.terminated,
        "truncated": episodes.truncated,
    }
    return pa.table(columns)


def attributes(states: int | None, actions: int, **more: object) -> dict:
    """A pipeline over such logs, trained for seconds."""
    state = {"column": "state", "categories": states} if states else "state"
    return {
        "dataset": "toy",
        "logs": {
            "source": "data/toy/raw",
            "episode_id": "episode",
            "step": "step",
            "observation": [state],
            "next_observation": ["next_state"],
            "action": {"column": "action", "values": actions, "mask": "allowed"},
            "action_prob": "prob",
            "reward": {"column": "reward", "range": [0, 1]},
            "terminated": "terminated",
            "truncated": "truncated",
            "gamma": 1.0,
        },
        "algorithms": {
            "bc": {"hidden": [16], "learning_rate": 0.01},
            "cql": {"hidden": [16], "learning_rate": 0.01, "alpha": 0.01, "target_interval": 20},
        },
        "seeds": 2,
        "training": {"gradient_steps": 200, "batch_size": 64},
        "fqe": {"gradient_steps": 200, "hidden": [16], "learning_rate": 0.01, "polyak": 0.1},
        "bootstrap_samples": 100,
        **more,
    }


def write_batches(root: Path, episodes: Episodes, batches: int = 2, *, numeric: bool = False) -> Path:
    """The log in `data/toy/raw`, cut into batches of whole episodes."""
    raw = root / "data" / "toy" / "raw"
    table = as_table(episodes, numeric=numeric)
    cuts = episodes.offsets[np.linspace(0, episodes.n_episodes, batches + 1).astype(int)]
    for number, (start, end) in enumerate(pairwise(cuts)):
        storage.write_parquet(raw / f"batch-{number + 1}.parquet", table.slice(start, end - start))
    return raw


@pytest.fixture
def toy(tmp_path: Path) -> Pipeline:
    """A pipeline over 600 episodes of a world in which a better policy is easy to find."""
    world = chain_world()
    write_batches(tmp_path, world.simulate(600, seed=3))
    return Pipeline(parse_pipeline(attributes(world.n_states, 3), "toy"), tmp_path)
