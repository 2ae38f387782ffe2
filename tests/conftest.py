"""What the tests share: small worlds whose exact values are known, and pipelines on logs drawn from them."""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import os
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import config, install_import_hook

import tests.typechecker  # noqa: F401  the hook looks it up by name

# Under the hook other people's modules are compiled anew in every process; what is imported before it is not.
for large in ("lightning", "matplotlib.pyplot", "scipy.stats", "sympy"):
    importlib.import_module(large)

# Shapes and types in annotations are checked in every test.
install_import_hook("offrl_models", "tests.typechecker.check")

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import settings

from offrl_models import storage, training
from offrl_models.config import CoverageConfig, Pipeline, parse_pipeline
from offrl_models.learner import Learner
from offrl_models.logs.contract import Contract
from offrl_models.logs.coverage import measure
from offrl_models.logs.read import Log
from offrl_models.ope.sequences import ratios
from offrl_models.ope.tabular import states_of
from offrl_models.ope.worlds import World, random_world
from offrl_models.reports import overview, plots, shift
from offrl_models.reports.checks import check_logs
from offrl_models.reports.quality import CheckResult
from offrl_models.schema import Episodes, Feature

CHECKED_STEPS = 10  # of each training

torch.set_num_threads(1)
settings.register_profile("offrl", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("offrl")


@pytest.fixture(scope="session", autouse=True)
def one_after_the_other() -> Iterator[None]:
    """Candidates are trained in this process, one after the other: a process of its own takes seconds to load what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "cores", lambda: 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def shapes_are_checked_in_the_first_steps() -> Iterator[None]:
    """Every other step of a training runs the same code on the same shapes, and checking them costs as much as the step does."""
    chunk, after_each = Learner.training_step, Learner.move_targets

    def told_by_steps(learner: Learner) -> None:
        config.update("jaxtyping_disable", learner.gradient_steps >= CHECKED_STEPS)

    def training_step(self: Learner, batch: int, batch_idx: int) -> None:
        told_by_steps(self)
        try:
            chunk(self, batch, batch_idx)
        finally:
            config.update("jaxtyping_disable", False)

    def move_targets(self: Learner) -> None:
        after_each(self)
        told_by_steps(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "training_step", training_step)
        patch.setattr(Learner, "move_targets", move_targets)
        yield


@pytest.fixture(scope="session", autouse=True)
def graphs_are_written_with_functions_compiled_once() -> Iterator[None]:
    """The exporter compiles every function that it knows for every graph, which takes half of the time."""
    apis = importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="module")
def no_pages() -> Iterator[None]:
    """Where nobody reads the pages and plots of a walk, which take much of its time, empty files stand for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Great Expectations and its own dependencies
        from great_expectations.data_context.data_context.abstract_data_context import AbstractDataContext

    def docs(context: Any, **_: object) -> dict[str, str]:
        site = context.variables.data_docs_sites["coverage"]["store_backend"]["base_directory"]
        storage.write_bytes(Path(site) / "index.html", b"")
        return {}

    def closed(figure: Any, path: Path) -> None:
        plt.close(figure)
        storage.write_bytes(path, b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AbstractDataContext, "build_data_docs", docs)
        patch.setattr(AbstractDataContext, "_save_project_config", lambda *_, **__: None)
        patch.setattr(overview, "write", lambda *_: None)
        patch.setattr(plots, "save", closed)
        patch.setattr(shift, "write_report", lambda _reference, _current, page, _seed: storage.write_bytes(page, b""))
        yield


@contextlib.contextmanager
def side_by_side() -> Iterator[None]:
    """In here candidates are trained as they are outside of tests, in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "cores", lambda: 2)
        yield


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
        "gate": {"caps": [2.0, None]},  # every rung is exported
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


def ratio_of(policy: np.ndarray, episodes: Episodes) -> np.ndarray:
    return ratios(episodes, policy[states_of(episodes)[0]])


def circling_world(gamma: float, ending: float = 0.3) -> World:
    """Two states that are entered again and again, and an end that strikes with a given probability."""
    rng = np.random.default_rng(4)
    transition = np.zeros((3, 2, 3))
    transition[:2, :, :2] = (1 - ending) * rng.dirichlet([1.0, 1.0], size=(2, 2))
    transition[:2, :, 2] = ending
    transition[2, :, 2] = 1.0
    reward = rng.normal(size=transition.shape)
    reward[2] = 0.0
    return World(
        transition=transition,
        reward=reward,
        initial=np.array([0.8, 0.2, 0.0]),
        terminal=np.array([False, False, True]),
        mask=np.ones((3, 2), bool),
        gamma=gamma,
        behavior=rng.dirichlet([3.0, 3.0], size=3),
    )


def cut_after_one_step(whole: Episodes) -> Episodes:
    """The same episodes, recorded up to the first step only: those that go on are truncated there."""
    first = whole.offsets[:-1]
    names = ("observation", "action", "mask", "reward", "action_prob")
    return dataclasses.replace(
        whole,
        final_observation=whole.next_observation[first],
        **{name: getattr(whole, name)[first] for name in names},
        offsets=np.arange(whole.n_episodes + 1),
        terminated=whole.terminated[first],
        truncated=~whole.terminated[first],
    )


def recorded_paths(world: World, steps: int) -> tuple[Episodes, np.ndarray]:
    """Every trajectory of a recording that stops after `steps` steps, and its probability under the behavior."""
    found = []
    for s0 in np.flatnonzero(world.initial):
        open_paths = [(world.initial[s0], [], s0)]
        for step in range(steps):
            longer = []
            for p, path, s in open_paths:
                for a, t in itertools.product(range(world.n_actions), range(world.n_states)):
                    q = p * world.behavior[s, a] * world.transition[s, a, t]
                    if q > 0 and (world.terminal[t] or step == steps - 1):
                        found.append((q, [*path, (s, a, t)]))
                    elif q > 0:
                        longer.append((q, [*path, (s, a, t)], t))
            open_paths = longer
    rows = np.array([row for _, path in found for row in path])
    length = np.array([len(path) for _, path in found])
    whole = world._logged(rows, length)
    last = np.zeros(len(rows), bool)
    last[whole.offsets[1:] - 1] = True
    return dataclasses.replace(whole, truncated=last & ~whole.terminated), np.array([p for p, _ in found])


def open_log(contract: Contract, frame: pl.DataFrame, tmp_path: Path) -> Log:
    """A log of one batch, past ingestion."""
    storage.write_parquet(tmp_path / "b.parquet", frame.to_arrow())
    return Log.open([tmp_path / "b.parquet"], contract)


def check_log(contract: Contract, frame: pl.DataFrame, tmp_path: Path) -> dict[str, CheckResult]:
    """What every check of the raw logs says of a log that got past ingestion."""
    measured = measure(open_log(contract, frame, tmp_path))
    files = pl.DataFrame({"file": ["b.parquet"], "unchanged": [1]})
    found = check_logs(measured, contract, CoverageConfig(), files, tmp_path / "coverage")
    return {result.check: result for result in found}
