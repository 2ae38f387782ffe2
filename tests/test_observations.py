"""Every kind of observed column, from a small log made by hand to exact numbers of observations, and of what follows."""

import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from offrl_models.datasets.encoding import Encoder
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import DamagedBatchError, Log
from offrl_models.logs.screen import screen
from offrl_models.schema import Feature
from tests.hand_made import NAN, PAIRS, dataset, day, log_of, numbers

# --- observations -----------------------------------------------------------------------------------------------------


def turn(*fractions: float) -> list[float]:
    """Sine and cosine of fractions of a full turn."""
    return [wave(2 * math.pi * fraction) for fraction in fractions for wave in (math.sin, math.cos)]


TIMES = [
    [*turn(0.0, 5 / 7), 0.0],
    [*turn(0.5, 0.5 / 7), 2.5],
    [*turn(0.25, 1.25 / 7), 3.25],
    [*turn(0.75, 2.75 / 7), 8999.75],
]
DAYS = [0.0, 2.5, 3.25, 8999.75]
OBSERVATIONS: dict[str, tuple[dict[str, Any], Any, list[Any], list[Feature]]] = {
    "a number": ({}, [0.5, 1.5, -2.5, 3.5], [0.5, 1.5, -2.5, 3.5], [Feature("x")]),
    "a whole number": ({}, pa.array([1, 2, -3, 4], pa.int8()), [1, 2, -3, 4], [Feature("x")]),
    "an unsigned number": ({}, pa.array([1, 2, 3, 2**64 - 1], pa.uint64()), [1, 2, 3, 2.0**64], [Feature("x")]),
    "a boolean": ({}, [True, False, False, True], [1, 0, 0, 1], [Feature("x")]),
    "a number within a range": ({"range": [None, 3.5]}, [0.5, 1.5, -9.0, 3.5], [0.5, 1.5, -9.0, 3.5], [Feature("x")]),
    "a float32 at the bound": (
        {"range": [0, 0.1]},
        pa.array([0.0, 0.1, 0.1, 0.0], pa.float32()),
        [0, 0.1, 0.1, 0],
        [Feature("x")],
    ),
    "codes": ({"categories": 4}, [0, 3, 1, 2], [0, 3, 1, 2], [Feature("x", 4)]),
    "codes, some missing": (
        {"categories": 4, "missing": "category"},
        [0, None, 1, None],
        [0, 4, 1, 4],
        [Feature("x", 5)],
    ),
    "labels": ({"categories": ["b", "a"]}, ["a", "b", "b", "a"], [1, 0, 0, 1], [Feature("x", 2)]),
    "labels that are numbers": ({"categories": [20, 10]}, [10, 20, 20, 10], [1, 0, 0, 1], [Feature("x", 2)]),
    "labels that are booleans": (
        {"categories": ["false", "true"]},
        [True, False, False, True],
        [1, 0, 0, 1],
        [Feature("x", 2)],
    ),
    "labels in a dictionary": (
        {"categories": ["b", "a"]},
        pa.array(["a", "b", "b", "a"]).dictionary_encode(),
        [1, 0, 0, 1],
        [Feature("x", 2)],
    ),
    "labels, some missing": (
        {"categories": ["b", "a"], "missing": "category"},
        ["a", None, "b", None],
        [1, 2, 0, 2],
        [Feature("x", 3)],
    ),
    "an order": ({"ordered": ["low", "mid", "high"]}, ["high", "low", "mid", "low"], [2, 0, 1, 0], [Feature("x")]),
    "an order, some missing": (
        {"ordered": ["low", "high"], "missing": "mean"},
        ["high", None, "low", None],
        [1, NAN, 0, NAN],
        [Feature("x", None, "mean")],
    ),
    "a number, some missing": (
        {"missing": 7.5},
        [0.5, None, NAN, 3.5],
        [0.5, NAN, NAN, 3.5],
        [Feature("x", None, 7.5)],
    ),
    "a whole number, some missing": (
        {"missing": "mean"},
        [1, None, 3, None],
        [1, NAN, 3, NAN],
        [Feature("x", None, "mean")],
    ),
    "a boolean, some missing": ({"missing": 0}, [True, None, False, None], [1, NAN, 0, NAN], [Feature("x", None, 0.0)]),
    "a list": ({"size": 2}, PAIRS, PAIRS, [Feature("x[0]"), Feature("x[1]")]),
    "a list of whole numbers": (
        {"size": 2},
        pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.int16())),
        PAIRS,
        [Feature("x[0]"), Feature("x[1]")],
    ),
    "a fixed list": (
        {"size": 2, "range": [1, 8]},
        pa.array(PAIRS, pa.list_(pa.float32(), 2)),
        PAIRS,
        [Feature("x[0]"), Feature("x[1]")],
    ),
    "a list, some missing": (
        {"size": 2, "missing": 0, "range": [0, 9]},
        [[1.0, None], [NAN, 4.0], None, [7.0, 8.0]],
        [[1, NAN], [NAN, 4], [NAN, NAN], [7, 8]],
        [Feature("x[0]", None, 0.0), Feature("x[1]", None, 0.0)],
    ),
    "a time": ({"timestamp": True}, [day(d) for d in DAYS], TIMES, []),
    "a time of a zone": (
        {"timestamp": True},
        [day(d, zone=UTC).astimezone(timezone(timedelta(hours=5))) for d in DAYS],
        TIMES,
        [],
    ),
    "a time in nanoseconds": ({"timestamp": True}, pa.array([day(d) for d in DAYS], pa.timestamp("ns")), TIMES, []),
    "a time, some missing": (
        {"timestamp": True, "missing": 0},
        [day(0), None, day(3.25), None],
        [TIMES[0], [NAN] * 5, TIMES[2], [NAN] * 5],
        [],
    ),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_an_observed_column_becomes_these_numbers(tmp_path: Path, name: str) -> None:
    options, column, expected, features = OBSERVATIONS[name]
    episodes = dataset(tmp_path, {"observation": [{"column": "x", **options}]}, {"x": column})
    wanted = np.array(expected, np.float32).reshape(4, -1)
    assert episodes.observation == pytest.approx(wanted, rel=1e-6, abs=1e-6, nan_ok=True)
    if options.get("timestamp"):
        parts = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "days")
        features = [Feature(f"x.{part}", None, options.get("missing")) for part in parts]
    else:
        assert np.array_equal(episodes.observation, wanted, equal_nan=True)
    assert episodes.features == tuple(features)


def test_columns_stand_in_the_order_of_the_contract(tmp_path: Path) -> None:
    observed = [{"column": "y", "size": 2}, "x", {"column": "z", "categories": ["u", "v"]}]
    episodes = dataset(tmp_path, {"observation": observed}, {"y": PAIRS, "z": ["v", "u", "u", "v"]})
    expected = numbers([1, 2, 0.5, 1], [3, 4, 1.5, 0], [5, 6, 2.5, 0], [7, 8, 3.5, 1])
    assert np.array_equal(episodes.observation, expected)
    assert [feature.name for feature in episodes.features] == ["y[0]", "y[1]", "x", "z"]


def test_what_is_missing_reaches_the_network_as_its_stand_in_and_a_mark(tmp_path: Path) -> None:
    observed = [
        {"column": "x", "missing": 7.0},
        {"column": "y", "missing": "mean"},
        {"column": "z", "categories": 2, "missing": "category"},
    ]
    columns = {"x": [1.0, None, 3.0, NAN], "y": [None, 4.0, 6.0, 8.0], "z": [0, None, 1, 1]}
    episodes = dataset(tmp_path, {"observation": observed}, columns)
    encoded = Encoder.fit(episodes)(torch.tensor(episodes.observation))
    expected = [
        [-1.0, 0.0, 0.0, 1.0],
        [5.0, -2.0 / math.sqrt(8 / 3), 1.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
        [5.0, 2.0 / math.sqrt(8 / 3), 1.0, 0.0],
    ]
    assert encoded.numeric.numpy() == pytest.approx(numbers(*expected), abs=1e-6)
    assert encoded.codes.tolist() == [[0], [2], [1], [1]]


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_the_next_observation_of_any_kind_is_held_to_what_follows(tmp_path: Path, name: str) -> None:
    options, column, expected, _ = OBSERVATIONS[name]
    column = column if isinstance(column, pa.Array) else pa.array(column, from_pandas=False)
    following = column.take(pa.array([1, 0, 3, 2]))  # what follows the first row is the second
    roles = {"observation": [{"column": "x", **options}], "next_observation": ["y"]}
    episodes = dataset(tmp_path, roles, {"x": column, "y": following})
    wanted = np.array(expected, np.float32).reshape(4, -1)
    assert episodes.final_observation == pytest.approx(wanted[[0, 3, 2]], rel=1e-6, abs=1e-6, nan_ok=True)
    wrong = column.take(pa.array([2, 0, 3, 2]))  # it is the third
    violations = screen(log_of(tmp_path, roles, {"x": column, "y": wrong})).violations
    if wrong[0].as_py() != following[0].as_py():
        assert [(v.check, v.column, v.rows, v.first) for v in violations] == [("C07", "y", 1, 0)]


@pytest.mark.parametrize("name", ["codes", "labels", "a boolean", "an unsigned number", "a time", "a fixed list"])
def test_what_follows_an_end_may_be_missing_in_any_kind_of_column(tmp_path: Path, name: str) -> None:
    options, column, expected, _ = OBSERVATIONS[name]
    column = column if isinstance(column, pa.Array) else pa.array(column, from_pandas=False)
    following = column.take(pa.array([1, None, None, None]))
    roles = {"observation": [{"column": "x", **options}], "next_observation": ["y"]}
    episodes = dataset(tmp_path, roles, {"x": column, "y": following})
    wanted = np.array(expected, np.float32).reshape(4, -1)
    assert episodes.final_observation == pytest.approx(wanted[1:], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_times_with_and_without_a_zone_are_not_mixed(tmp_path: Path, kind: str) -> None:
    """The second batch is to blame; one that says nothing of time is not."""
    at = pl.DataFrame({"at": [datetime(2026, 1, 1, 8)] * 3, "x": [1.0, 2.0, 3.0], "a": [0, 1, 0], "r": [0.0, 1.0, 0.5]})
    frames = [at.with_columns(pl.col("at").dt.replace_time_zone("Europe/Berlin")), at]
    for number, frame in enumerate(frames):
        text = frame.with_columns(pl.col("at").dt.to_string("%Y-%m-%dT%H:%M:%S" + ("%:z" if number == 0 else "")))
        path = tmp_path / f"{number}.{kind}"
        {"parquet": frame.write_parquet, "csv": text.write_csv, "jsonl": text.write_ndjson}[kind](path)
    contract = Contract.model_validate({
        "source": "log", "format": kind, "horizon": 1, "observation": ["x"], "action": {"column": "a", "values": 2},
        "reward": {"column": "r", "range": [0, 1]}, "gamma": 1.0, "decided_at": "at",
    })  # fmt: skip
    paths = [tmp_path / f"{number}.{kind}" for number in (0, 1)]
    with pytest.raises(
        DamagedBatchError, match=r"1\.\w+: the times of column 'at' are without their offset from UTC"
    ) as error:
        Log.open(paths, contract)
    assert error.value.path == paths[1]
    assert len(Log.open(paths[:1] * 2, contract).batches) == 2
