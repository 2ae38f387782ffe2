"""A log of four rows made by hand, its contract, and the way from both to episodes; and evidence that passes: what tests vary."""

import math
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from offrl_models import storage
from offrl_models.config import parse_pipeline
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.gate import Status
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import Log
from offrl_models.logs.screen import screen
from offrl_models.measures import Contrast, Measures
from offrl_models.schema import Episodes
from tests.conftest import attributes

TRAIN, SELECTION, GATE = (next(i for i in range(999) if bucket(i, "offrl") in numbers) for numbers in SPLITS.values())
NAN, INF = math.nan, math.inf
Columns = dict[str, Any]

# An episode of two decisions and two of one, in this order also in the dataset.
ROLES: dict[str, Any] = {
    "source": "data/toy/raw",
    "episode_id": "id",
    "step": "t",
    "observation": ["x"],
    "action": {"column": "a", "values": 2},
    "reward": {"column": "r", "range": [0, 1]},
    "terminated": "end",
    "gamma": 0.5,
}
LOG: Columns = {
    "id": [TRAIN, TRAIN, SELECTION, GATE],
    "t": [0, 1, 0, 0],
    "x": [0.5, 1.5, 2.5, 3.5],
    "a": [0, 1, 1, 0],
    "r": [0.0, 1.0, 0.25, 0.5],
    "end": [False, True, True, True],
}
PAIRS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
BANDIT: dict[str, Any] = {"horizon": 1, "step": None, "terminated": None}


def contract_of(**roles: Any) -> Contract:
    """A contract with these roles instead of the plain ones; None leaves one out."""
    configured = attributes(None, 2, algorithms={"bc": {}})
    configured["logs"] = {name: role for name, role in {**ROLES, **roles}.items() if role is not None}
    return parse_pipeline(configured, "toy").logs


def write(path: Path, columns: Mapping[str, Any]) -> Path:
    arrays = {
        name: values if isinstance(values, pa.Array) else pa.array(values, from_pandas=False)
        for name, values in columns.items()
    }
    storage.write_parquet(path, pa.table(arrays))
    return path


def log_of(folder: Path, roles: Mapping[str, Any], *batches: Mapping[str, Any]) -> Log:
    paths = [write(folder / f"b{number}.parquet", {**LOG, **columns}) for number, columns in enumerate(batches)]
    return Log.open(paths, contract_of(**roles))


def dataset(folder: Path, roles: Mapping[str, Any], *batches: Mapping[str, Any]) -> Episodes:
    """The episodes of all three splits, one after the other; no rule is broken on the way."""
    log = log_of(folder, roles, *batches or ({},))
    violations = screen(log).violations
    assert violations == (), violations
    write_splits(log, "offrl", folder / "episodes")
    return read_splits(folder / "episodes", *SPLITS, salt="offrl", contract=log.contract)


def numbers(*rows: object) -> np.ndarray:
    return np.array(rows, np.float32)


def day(number: float, *, zone: timezone | None = None) -> datetime:
    """So many days after a Saturday, the first of 2000."""
    return datetime(2000, 1, 1, tzinfo=zone) + timedelta(days=number)


def observing(**options: Any) -> dict[str, Any]:
    return {"observation": [{"column": "x", **options}]}


def acting(**options: Any) -> dict[str, Any]:
    return {"action": options}


MASKED = acting(column="a", values=2, mask="m")
VECTOR = acting(columns=["a", "b"], low=[0, -1], high=[1, 0.5])

# Measures that pass every finding, and what breaks each finding alone: field, value, the verdict it then is.
GOOD = Measures(
    episodes=6000,
    rows=50_000,
    alpha=0.05,
    difference=0.02,
    lower_bound=0.01,
    upper_bound=0.03,
    bound="test",
    doubt="",
    e_value=None,
    trajectory_difference=0.01,
    trajectory_error=0.01,
    fqe_differences=[0.01, 0.02, 0.03],
    effective_transitions=5000.0,
    effective_episodes=900.0,
    mean_ratio_z=0.5,
    worst_action_z=-1.5,
    unsupported_mass=0.01,
    few_visits_mass=0.01,
    ratio_q99=3.0,
    ratio_max=9.0,
    chi_squared=1.0,
    largest_share=0.001,
    without_top=0.015,
    older_half=Contrast("older half", 3000, 0.02, 0.01, 0.03),
    newer_half=Contrast("newer half", 3000, 0.02, 0.01, 0.03),
    kept=0.016,
    kept_bound=0.008,
    course=[Contrast(f"part {number}", 600, 0.02, -0.01, 0.05) for number in range(1, 11)],
    sure_share=0.01,
    propensities="logged",
)

BAD = {
    "error rate": ("alpha", 0.0501, Status.INVALID),
    "mean ratio": ("mean_ratio_z", -4.5, Status.INVALID),
    "mean ratio per action": ("worst_action_z", 5.0, Status.INVALID),
    "support": ("unsupported_mass", 0.2, Status.INVALID),
    "visits": ("few_visits_mass", 0.03, Status.INVALID),
    "returns": ("equal_returns", True, Status.INVALID),
    "drift": ("drifted", "the newest batch has drifted", Status.INVALID),
    "harm": ("upper_bound", -0.001, Status.FAIL),
    "episodes": ("episodes", 499, Status.INCONCLUSIVE),
    "trust": ("doubt", "the ratios do not balance", Status.INCONCLUSIVE),
    "effective transitions": ("effective_transitions", 499.0, Status.INCONCLUSIVE),
    "one episode": ("largest_share", 0.06, Status.INCONCLUSIVE),
    "influence": ("without_top", -0.001, Status.INCONCLUSIVE),
    "trajectory doubly robust": ("trajectory_difference", -0.021, Status.INCONCLUSIVE),
    "fitted Q evaluation": ("fqe_differences", [0.01, -0.001, 0.02], Status.INCONCLUSIVE),
    "Markov state": ("markov_z", 4.1, Status.INCONCLUSIVE),
    "lower bound": ("lower_bound", 0.0, Status.INCONCLUSIVE),
    "newer half": ("kept_bound", 0.0, Status.INCONCLUSIVE),
    "last rewards": ("cut_reward", 0.011, Status.INCONCLUSIVE),
}
