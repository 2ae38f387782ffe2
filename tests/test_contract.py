"""Contracts: every role and kind of column, from a small log made by hand to exact arrays; every mistake, to its sentence."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offrl_models import storage
from offrl_models.config import parse_pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import Log
from offrl_models.logs.rules import rules
from offrl_models.logs.screen import screen
from offrl_models.schema import Episodes, Feature, InputError
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


def contract_of(**roles: Any) -> Contract:
    """A contract with these roles instead of the plain ones; None leaves one out."""
    configured = attributes(None, 2)
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
    assert screen(log).violations == ()
    write_splits(log, "offrl", folder / "episodes")
    return read_splits(folder / "episodes", *SPLITS, salt="offrl", contract=log.contract)


def numbers(*rows: object) -> np.ndarray:
    return np.array(rows, np.float32)


# --- observations -----------------------------------------------------------------------------------------------------


def day(number: float, *, zone: timezone | None = None) -> datetime:
    """So many days after a Saturday, the first of 2000."""
    return datetime(2000, 1, 1, tzinfo=zone) + timedelta(days=number)


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
PAIRS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
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


# --- actions, rewards, propensities -----------------------------------------------------------------------------------

ALL = [[True, True]] * 4
ACTIONS: dict[str, tuple[dict[str, Any], Columns, Any, Any]] = {
    "codes": ({"column": "a", "values": 2}, {}, [0, 1, 1, 0], ALL),
    "small codes": ({"column": "a", "values": 2}, {"a": pa.array([0, 1, 1, 0], pa.uint8())}, [0, 1, 1, 0], ALL),
    "labels": ({"column": "a", "values": ["stop", "go"]}, {"a": ["go", "stop", "go", "go"]}, [1, 0, 1, 1], ALL),
    "numbers as labels": ({"column": "a", "values": [50, 5]}, {"a": [5, 50, 5, 5]}, [1, 0, 1, 1], ALL),
    "a mask": (
        {"column": "a", "values": 2, "mask": "m"},
        {"m": [[True, False], [True, True], [False, True], [True, True]]},
        [0, 1, 1, 0],
        [[True, False], [True, True], [False, True], [True, True]],
    ),
    "a fixed mask": (
        {"column": "a", "values": 2, "mask": "m"},
        {"m": pa.array([[True, False], [True, True]] * 2, pa.list_(pa.bool_(), 2)), "a": [0, 1, 0, 0]},
        [0, 1, 0, 0],
        [[True, False], [True, True]] * 2,
    ),
    "candidates": (
        {"column": "a", "values": ["p", "q", "r"], "candidates": "c"},
        {"a": ["p", "r", "q", "q"], "c": [["p"], ["r", "p"], ["q", "q"], ["r", "q", "p"]]},
        [0, 2, 1, 1],
        [[True, False, False], [True, False, True], [False, True, False], [True, True, True]],
    ),
    "candidates that are numbers": (
        {"column": "a", "values": 2, "candidates": "c"},
        {"c": [[0], [1, 0], [1], [0]]},
        [0, 1, 1, 0],
        [[True, False], [True, True], [False, True], [True, False]],
    ),
    "two at once": (
        {"components": [{"column": "a", "values": 2}, {"column": "b", "values": ["l", "m", "h"]}], "mask": "m"},
        {"b": ["h", "l", "m", "l"], "m": [[True] * 6, [False] * 3 + [True] * 3, [True] * 6, [True] + [False] * 5]},
        [2, 3, 4, 0],
        [[True] * 6, [False] * 3 + [True] * 3, [True] * 6, [True] + [False] * 5],
    ),
    "three at once": (
        {"components": [{"column": name, "values": 2} for name in "abc"]},
        {"b": [0, 1, 0, 1], "c": [1, 1, 0, 0]},
        [1, 7, 4, 2],
        [[True] * 8] * 4,
    ),
    "a number": (
        {"columns": ["a"], "low": -1, "high": 1},
        {"a": [0.5, -1.0, 1.0, 0.0]},
        [[0.5], [-1.0], [1.0], [0.0]],
        [[]] * 4,
    ),
    "several numbers": (
        {"columns": ["a", "b"], "low": [-1, 0], "high": [1, 9]},
        {"a": [0.5, -1.0, 1.0, 0.0], "b": [0, 9, 1, 2]},
        [[0.5, 0], [-1, 9], [1, 1], [0, 2]],
        [[]] * 4,
    ),
    "a list of numbers": ({"column": "a", "size": 2, "low": 1, "high": 8}, {"a": PAIRS}, PAIRS, [[]] * 4),
    "float32 at the bounds": (
        {"column": "a", "size": 2, "low": -0.1, "high": [0.1, 0.7]},
        {"a": pa.array([[0.1, 0.7], [-0.1, -0.1]] * 2, pa.list_(pa.float32(), 2))},
        [[0.1, 0.7], [-0.1, -0.1]] * 2,
        [[]] * 4,
    ),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_becomes_this_code_or_vector_and_this_mask(tmp_path: Path, name: str) -> None:
    action, columns, expected, mask = ACTIONS[name]
    episodes = dataset(tmp_path, {"action": action}, columns)
    wanted = np.array(expected, np.float32 if episodes.action.ndim == 2 else np.int64)
    assert episodes.action.dtype == wanted.dtype and np.array_equal(episodes.action, wanted)
    assert np.array_equal(episodes.mask, np.array(mask, bool).reshape(4, -1))


VECTORS = [[0.25, 0.75], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]
PROPENSITIES: dict[str, tuple[dict[str, Any], Columns, list[float]]] = {
    "none": ({}, {}, [NAN] * 4),
    "of the action": ({"action_prob": "p"}, {"p": [0.25, 1.0, 0.5, 0.125]}, [0.25, 1.0, 0.5, 0.125]),
    "of every action": ({"action_prob": {"column": "p", "of": "vector"}}, {"p": VECTORS}, [0.25, 0.5, 1.0, 1.0]),
    "in a fixed list": (
        {"action_prob": {"column": "p", "of": "vector"}},
        {"p": pa.array(VECTORS, pa.list_(pa.float32(), 2))},
        [0.25, 0.5, 1.0, 1.0],
    ),
    "of joint actions": (
        {
            "action": {"components": [{"column": "a", "values": 2}, {"column": "b", "values": 2}]},
            "action_prob": {"column": "p", "of": "vector"},
        },
        {"b": [1, 0, 1, 0], "p": [[0.125, 0.25, 0.5, 0.125]] * 4},
        [0.25, 0.5, 0.125, 0.125],
    ),
    "a density": (
        {"action": {"columns": ["a"], "low": 0, "high": 1}, "action_prob": {"column": "p", "of": "density"}},
        {"p": [0.25, 1.5, 40.0, 1e-9]},
        [0.25, 1.5, 40.0, 1e-9],
    ),
}


@pytest.mark.parametrize("name", PROPENSITIES)
def test_a_propensity_is_that_of_the_logged_action(tmp_path: Path, name: str) -> None:
    roles, columns, expected = PROPENSITIES[name]
    assert np.array_equal(dataset(tmp_path, roles, columns).action_prob, np.array(expected), equal_nan=True)


def test_a_reward_is_a_weighted_sum_and_costs_are_kept_apart(tmp_path: Path) -> None:
    roles = {
        "reward": {"weights": {"r": 1.0, "bonus": 0.5, "fee": -2.0}, "range": [-4, 2]},
        "costs": ["fee", {"column": "harm", "range": [0, 5]}],
    }
    columns = {
        "bonus": [1, 0, 2, 1],
        "fee": pa.array([0.5, 0.25, 0, 1], pa.float32()),
        "harm": [True, False, False, True],
    }
    episodes = dataset(tmp_path, roles, columns)
    assert episodes.reward.tolist() == [0.0 + 0.5 - 1.0, 1.0 + 0.0 - 0.5, 0.25 + 1.0 - 0.0, 0.5 + 0.5 - 2.0]
    assert {name: cost.tolist() for name, cost in episodes.costs.items()} == {
        "fee": [0.5, 0.25, 0.0, 1.0],
        "harm": [1.0, 0.0, 0.0, 1.0],
    }


def test_a_missing_reward_counts_as_the_contract_says(tmp_path: Path) -> None:
    roles = {"reward": {"column": "r", "range": [0, 1], "missing": 0.75}}
    assert dataset(tmp_path, roles, {"r": [None, 1.0, 0.25, None]}).reward.tolist() == [0.75, 1.0, 0.25, 0.75]


def test_a_float32_reward_at_its_bound_is_in_range(tmp_path: Path) -> None:
    roles = {"reward": {"column": "r", "range": [0, 0.3]}, "costs": [{"column": "c", "range": [0, 0.7]}]}
    columns = {"r": pa.array([0.3, 0.0, 0.3, 0.1], pa.float32()), "c": pa.array([0.7] * 4, pa.float32())}
    assert dataset(tmp_path, roles, columns).reward == pytest.approx([0.3, 0.0, 0.3, 0.1])
    beyond = log_of(tmp_path, roles, columns | {"r": [0.3, 0.0, 0.3000001, 0.1]})
    assert [violation.check for violation in screen(beyond).violations] == ["C12"]


def test_gamma_is_per_unit_of_the_interval(tmp_path: Path) -> None:
    episodes = dataset(tmp_path, {"interval": "hours", "gamma": 0.5}, {"hours": [2, 3, 0, 1]})
    assert episodes.interval is not None and episodes.interval.tolist() == [2.0, 3.0, 0.0, 1.0]
    assert episodes.step_discount.tolist() == [0.25, 0.125, 1.0, 0.5]
    assert episodes.discount.tolist() == [0.25, 0.0, 0.0, 0.0]
    assert episodes.return_.tolist() == [0.0 + 0.25 * 1.0, 0.25, 0.5]
    assert dataset(tmp_path, {"gamma": 0.5}).return_.tolist() == [0.5, 0.25, 0.5]


def test_labels_of_episodes_are_those_of_their_first_decision(tmp_path: Path) -> None:
    roles = {"subgroups": ["ward", "old"], "policy_version": "v", "policy_versions": ["1", "2"], "actor": "who"}
    columns = {"ward": ["a", "b", None, "a"], "old": [True, True, False, False], "v": [1, 1, 2, 1], "who": ["n"] * 4}
    episodes = dataset(tmp_path, roles, columns)
    assert {name: list(found) for name, found in episodes.labels.items()} == {
        "ward": ["a", None, "a"],
        "old": ["true", "false", "false"],
        "v": ["1", "2", "1"],
    }


# --- rows to episodes -------------------------------------------------------------------------------------------------


def test_without_a_step_the_order_is_that_of_time(tmp_path: Path) -> None:
    at = [day(3), day(1), day(0), day(2)]
    episodes = dataset(tmp_path, {"step": None, "decided_at": "at"}, {"at": at, "end": [True, False, True, True]})
    assert episodes.observation.ravel().tolist() == [1.5, 0.5, 2.5, 3.5]
    assert episodes.length.tolist() == [2, 1, 1]


def test_without_a_step_equal_times_keep_their_order_and_repeated_rows_count_once(tmp_path: Path) -> None:
    roles = {"step": None, "decided_at": "at"}
    first = {
        "id": [TRAIN] * 5,
        "at": [day(1)] * 5,
        "x": [3.0, 1.0, 3.0, 2.0, 1.0],
        "a": [0] * 5,
        "r": [0.0] * 5,
        "end": [False] * 5,
        "t": [0] * 5,
    }
    again = {**{name: values[:2] for name, values in first.items()}, "x": [1.0, 3.0]}
    last = {
        **LOG,
        "at": [day(2)] * 4,
        "id": [TRAIN, TRAIN, SELECTION, GATE],
        "end": [False, True, True, True],
        "x": [4.0, 5.0, 6.0, 7.0],
    }
    episodes = dataset(tmp_path, roles, first, again, last)
    assert episodes.observation.ravel().tolist() == [3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    found = screen(log_of(tmp_path, roles, first, again, last)).index
    assert found.duplicates == {0: 2, 1: 2} and sum(found.rows.values()) == 11


BANDIT: dict[str, Any] = {"horizon": 1, "step": None, "terminated": None}


def test_a_bandit_log_with_ids(tmp_path: Path) -> None:
    columns = {"id": [GATE, TRAIN, SELECTION, 10_000], "t": None}
    episodes = dataset(tmp_path, BANDIT, {name: c for name, c in {**LOG, **columns}.items() if c is not None})
    assert sorted(episodes.episode_id.tolist()) == sorted([GATE, TRAIN, SELECTION, 10_000])
    assert episodes.n_rows == 4 and episodes.terminated.all() and not episodes.truncated.any()
    assert not episodes.final_observation.any() and not episodes.discount.any()
    by_id = dict(zip(episodes.episode_id.tolist(), episodes.observation.ravel().tolist(), strict=True))
    assert by_id == {GATE: 0.5, TRAIN: 1.5, SELECTION: 2.5, 10_000: 3.5}


def test_two_rows_of_one_id_in_a_bandit_log_are_a_repetition_or_a_contradiction(tmp_path: Path) -> None:
    columns = {"id": [GATE, TRAIN, SELECTION, GATE], "x": [0.5, 1.5, 2.5, 0.5], "a": [0] * 4, "r": [0.5] * 4}
    assert screen(log_of(tmp_path, BANDIT, columns)).index.duplicates == {0: 1}
    assert dataset(tmp_path, BANDIT, columns).n_rows == 3
    found = screen(log_of(tmp_path, BANDIT, columns | {"r": [0.5, 0.5, 0.5, 1.0]}))
    assert found.index.duplicates == {}
    [violation] = found.violations
    assert violation.sentence("b0.parquet") == (
        "b0.parquet: column 'id' has 1 row contradicting another row of the same episode (C03), row 3; keep one row for "
        "each decision."
    )


def test_a_bandit_log_without_ids_names_rows_by_file_and_place(tmp_path: Path) -> None:
    columns = {name: values * 30 for name, values in LOG.items() if name in "xar"}
    log = Log.open(
        [write(tmp_path / f"{name}.parquet", columns) for name in ("one", "two")],
        contract_of(**BANDIT, episode_id=None),
    )
    assert screen(log).violations == () and screen(log).index.duplicates == {}
    write_splits(log, "offrl", tmp_path)
    episodes = read_splits(tmp_path, *SPLITS, salt="offrl", contract=log.contract)
    assert set(episodes.episode_id) == {f"{name}.parquet/{row}" for name in ("one", "two") for row in range(120)}
    places = [int(str(name).rpartition("/")[2]) % 4 for name in episodes.episode_id]
    assert np.array_equal(episodes.observation.ravel(), numbers(*LOG["x"])[places])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ids_may_be_numbers_in_one_batch_and_text_in_another(tmp_path: Path, order: tuple[int, ...]) -> None:
    ids = {name: pa.array(values) for name, values in LOG.items()}
    parts = [{name: values.take(pa.array(rows)) for name, values in ids.items()} for rows in ([0], [1, 2], [3])]
    parts[1]["id"] = parts[1]["id"].cast(pa.large_string())
    parts[2]["id"] = parts[2]["id"].cast(pa.uint64())
    episodes = dataset(tmp_path, {}, *(parts[i] for i in order))
    assert episodes.episode_id.tolist() == [str(TRAIN), str(SELECTION), str(GATE)]
    assert episodes.observation.ravel().tolist() == LOG["x"]


def test_an_entity_of_several_episodes_is_one_side_of_the_split(tmp_path: Path) -> None:
    columns = {"id": ["u", "u", "v", "w"], "who": [SELECTION, SELECTION, TRAIN, GATE]}
    episodes = dataset(tmp_path, {"entity": "who"}, columns)
    assert episodes.episode_id.tolist() == ["v", "u", "w"]
    assert episodes.entity is not None and episodes.entity.tolist() == [str(TRAIN), str(SELECTION), str(GATE)]
    assert episodes.observation.ravel().tolist() == [2.5, 0.5, 1.5, 3.5]


LONGER: Columns = {
    "id": [TRAIN] * 3 + [SELECTION] * 2 + [GATE] * 2 + [GATE + 1000],
    "t": [0, 1, 2, 0, 1, 0, 1, 0],
    "x": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "y": [2.0, 3.0, 3.5, 5.0, 5.5, 7.0, 7.5, 8.5],
    "a": [0] * 8,
    "r": [0.0] * 8,
    "end": [False, False, False, False, True, False, False, False],
    "cut": [False, False, True, False, False, False, False, False],
}


def test_without_a_next_observation_a_cut_episode_ends_one_decision_earlier(tmp_path: Path) -> None:
    """The last observation is what follows the decision before. An episode of which only one is known tells nothing."""
    episodes = dataset(tmp_path, {"truncated": "cut"}, LONGER)
    assert episodes.episode_id.tolist() == [TRAIN, SELECTION, GATE]
    assert episodes.observation.ravel().tolist() == [1.0, 2.0, 4.0, 5.0, 6.0]
    assert episodes.final_observation[[0, 2], 0].tolist() == [3.0, 7.0]
    assert episodes.truncated.tolist() == [False, True, False, False, True]
    assert episodes.terminated.tolist() == [False, False, False, True, False]


def test_with_a_next_observation_a_cut_episode_keeps_every_decision(tmp_path: Path) -> None:
    episodes = dataset(tmp_path, {"truncated": "cut", "next_observation": ["y"]}, LONGER)
    wanted = sorted(
        [TRAIN, SELECTION, GATE, GATE + 1000], key=lambda i: (bucket(i, "offrl") >= 60, bucket(i, "offrl") >= 70, i)
    )
    assert episodes.episode_id.tolist() == wanted and episodes.n_rows == 8
    finals = {TRAIN: 3.5, SELECTION: 5.5, GATE: 7.5, GATE + 1000: 8.5}
    assert episodes.final_observation.ravel().tolist() == [finals[i] for i in wanted]


def test_only_truncation_may_be_logged(tmp_path: Path) -> None:
    episodes = dataset(tmp_path, {"truncated": "cut", "terminated": None}, LONGER)
    assert not episodes.terminated.any() and episodes.truncated.sum() == 3


def test_lists_of_other_kinds_and_widths_are_the_same_rows(tmp_path: Path) -> None:
    observed = {"observation": [{"column": "x", "size": 2}], "next_observation": ["y"]}
    kinds = [pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.int8())]
    following = [PAIRS[1], *PAIRS[1:]]
    batches = [{"x": pa.array(PAIRS, x), "y": pa.array(following, y)} for x, y in zip(kinds, kinds[::-1], strict=True)]
    assert screen(log_of(tmp_path, observed, *batches)).index.duplicates == {1: 4, 2: 4}
    assert np.array_equal(dataset(tmp_path, observed, *batches).observation, numbers(*PAIRS))
    first, rest = ([0], [1, 2, 3])  # what follows lies in a batch of another kind
    parts = [
        {name: pa.array(values, from_pandas=False).take(pa.array(rows)) for name, values in {**LOG, **batch}.items()}
        for rows, batch in ((first, batches[0]), (rest, batches[1]))
    ]
    assert screen(log_of(tmp_path, observed, *parts)).violations == ()


def test_what_is_wrong_within_a_batch_is_not_said_again_of_several(tmp_path: Path) -> None:
    """Rows of one episode that lie apart in their batch, and the episode goes on in another."""
    wrong = {
        "id": [TRAIN] * 2,
        "t": [1, 0],
        "x": [1.0, 0.0],
        "y": [2.0, 9.0],
        "a": [0] * 2,
        "r": [0.0] * 2,
        "end": [False] * 2,
    }
    after = {"id": [TRAIN], "t": [2], "x": [2.0], "y": [3.0], "a": [0], "r": [0.0], "end": [True]}
    found = screen(log_of(tmp_path, {"next_observation": ["y"]}, wrong, after)).violations
    assert [(v.check, v.batch, v.rows, v.first, v.across) for v in found] == [("C07", 0, 1, 0, False)]


def test_a_row_of_another_entity_that_does_not_follow_is_counted_once(tmp_path: Path) -> None:
    roles = {"entity": "who", "next_observation": ["y"]}
    found = screen(log_of(tmp_path, roles, {"who": [1, 2, 3, 4], "y": [0.0] * 4})).violations
    assert [(violation.check, violation.rows, violation.first) for violation in found] == [("C07", 1, 1), ("C27", 1, 1)]


def test_a_column_may_play_several_roles(tmp_path: Path) -> None:
    """The step and the id's number may be observed, an observed category may be a subgroup."""
    observed = [
        "t",
        {"column": "ward", "categories": 3},
        {"column": "id", "categories": ["0", str(SELECTION), str(GATE)]},
    ]
    roles = {"observation": observed, "subgroups": "ward", "entity": "id", "costs": ["t"]}
    episodes = dataset(tmp_path, roles, {"ward": [2, 2, 0, 1], "t": pa.array([0, 1, 0, 0], pa.int16())})
    assert np.array_equal(episodes.observation, numbers([0, 2, 0], [1, 2, 0], [0, 0, 1], [0, 1, 2]))
    assert episodes.labels["ward"].tolist() == ["2", "0", "1"] and episodes.costs["t"].tolist() == [0, 1, 0, 0]


# --- rules that rows break --------------------------------------------------------------------------------------------


def observing(**options: Any) -> dict[str, Any]:
    return {"observation": [{"column": "x", **options}]}


def acting(**options: Any) -> dict[str, Any]:
    return {"action": options}


LABELED = acting(column="a", values=["no", "yes"], candidates="c")
WORDS: Columns = {"a": ["no", "yes", "yes", "no"], "c": [["no"], ["no", "yes"], ["yes"], ["no"]]}
MASKED = acting(column="a", values=2, mask="m")
VECTOR = acting(columns=["a", "b"], low=[0, -1], high=[1, 0.5])
LIST = acting(column="a", size=2, low=0, high=[1, 0.5])
TIMED: dict[str, Any] = {"decided_at": "at", "ingested_at": "in"}
AT: Columns = {"at": [day(1), day(2), day(3), day(4)], "in": [day(5)] * 4}
WINDOW = {"decided_at": "at", "reward": {"column": "r", "range": [0, 1], "window_hours": 24, "arrived_at": "came"}}
CAME: Columns = {"at": AT["at"], "came": [day(3), day(3), day(3), day(4)]}
FILL = "fill them at the source or leave their episodes out."
RANGE = "correct them or the range in the contract."
CLOCKS = "correct the clocks, the times or the steps."
TRUE4 = [[True, True]] * 4
TRIPPED: dict[str, tuple[dict[str, Any], Columns, str]] = {
    "null id": (
        {},
        {"id": pa.array([TRAIN, TRAIN, None, GATE])},
        f"column 'id' has 1 row missing, NaN or infinite (C10), row 2; {FILL}",
    ),
    "null step": (
        {},
        {"t": pa.array([0, 1, 0, None])},
        f"column 't' has 1 row missing, NaN or infinite (C10), row 3; {FILL}",
    ),
    "NaN": (
        {},
        {"x": [0.5, NAN, INF, None]},
        f"column 'x' has 3 rows missing, NaN or infinite (C10), the first is row 1; {FILL}",
    ),
    "NaN in a list": (
        observing(size=2),
        {"x": [[1.0, 2.0], [NAN, 0.0], [1.0, None], None]},
        f"column 'x' has 3 rows missing, NaN or infinite (C10), the first is row 1; {FILL}",
    ),
    "null action": (
        {},
        {"a": pa.array([0, None, 1, 0])},
        f"column 'a' has 1 row missing, NaN or infinite (C10), row 1; {FILL}",
    ),
    "NaN action": (
        VECTOR,
        {"b": [0.0, NAN, 0.0, 0.0]},
        f"column 'b' has 1 row missing, NaN or infinite (C10), row 1; {FILL}",
    ),
    "null end": (
        {},
        {"end": [False, True, None, True]},
        f"column 'end' has 1 row missing, NaN or infinite (C10), row 2; {FILL}",
    ),
    "infinity where some may miss": (
        observing(missing=0),
        {"x": [0.5, None, -INF, NAN]},
        f"column 'x' has 1 row infinite (C10), row 2; {FILL}",
    ),
    "infinity in a list where some may miss": (
        observing(size=2, missing=0),
        {"x": [[NAN, INF], None, [None, 1.0], [1.0, 1.0]]},
        f"column 'x' has 1 row infinite (C10), row 0; {FILL}",
    ),
    "category": (
        observing(categories=2),
        {"x": [0, 1, 2, -1]},
        (
            "column 'x' has 2 rows holding a category outside 0 to 1 (C11), the first is row 2; recode it or "
            "raise `categories` in the contract."
        ),
    ),
    "label": (
        observing(categories=["u", "v"]),
        {"x": ["u", "v", "u", "U"]},
        (
            "column 'x' has 1 row holding a label other than u, v (C11), row 3; correct it or add the label to "
            "the contract."
        ),
    ),
    "length of a list": (
        observing(size=2),
        {"x": [[1.0, 2.0], [1.0], [1.0, 2.0, 3.0], [1.0, 2.0]]},
        (
            "column 'x' has 2 rows holding a list of other than 2 numbers (C11), the first is row 1; pad or cut "
            "it at the source."
        ),
    ),
    "range": (
        observing(range=[0, 3]),
        {"x": [0.0, 3.0, 3.5, -0.5]},
        f"column 'x' has 2 rows outside the range [0, 3] (C11), the first is row 2; {RANGE}",
    ),
    "half a range": (
        observing(range=[None, 3], missing=0),
        {"x": [-9.0, None, NAN, 3.5]},
        f"column 'x' has 1 row outside the range [-inf, 3] (C11), row 3; {RANGE}",
    ),
    "range of a list": (
        observing(range=[0, 3], size=2),
        {"x": [[0.0, 3.0], [-1.0, 4.0], [1.0, 3.5], [0.0, 0.0]]},
        f"column 'x' has 2 rows outside the range [0, 3] (C11), the first is row 1; {RANGE}",
    ),
    "interval": (
        {"interval": "i"},
        {"i": [1, 0, -1, 2]},
        (
            "column 'i' has 1 row with a negative time between decisions (C11), row 2; log the time until the "
            "next decision."
        ),
    ),
    "action": (
        {},
        {"a": [0, 1, 2, -1]},
        (
            "column 'a' has 2 rows holding an action outside 0 to 1 (C13), the first is row 2; recode it or add "
            "it to `values` in the contract."
        ),
    ),
    "label of an action": (
        LABELED,
        {"a": ["no", "yes", "yes", "No"]},
        (
            "column 'a' has 1 row holding an action outside no, yes (C13), row 3; recode it or add it to `values`"
            " in the contract."
        ),
    ),
    "action beyond its bounds": (
        VECTOR,
        {"a": [0.0, 1.0, 0.5, 1.5], "b": [-1.0, 0.5, 0.0, 0.0]},
        (
            "column 'a' has 1 row holding an action outside [0, 1] (C13), row 3; clip it where it was logged or "
            "correct `low` and `high`."
        ),
    ),
    "second number beyond its bounds": (
        VECTOR,
        {"b": [-1.5, 0.5, 0.75, 0.0]},
        (
            "column 'b' has 2 rows holding an action outside [-1, 0.5] (C13), the first is row 0; clip it where "
            "it was logged or correct `low` and `high`."
        ),
    ),
    "list of an action": (
        LIST,
        {"a": [[0.0, 0.5], [1.0, 0.75], [0.0], [0.0, 0.0, 0.0]]},
        (
            "column 'a' has 3 rows holding an action of other than 2 numbers, or outside its bounds (C13), the "
            "first is row 1; clip it where it was logged or correct `low` and `high`."
        ),
    ),
    "mask": (
        MASKED,
        {"m": [[False, True], None, [True], [True, None]]},
        (
            "column 'm' has 4 rows holding an action that the mask does not allow, or a mask that is not 2 "
            "booleans (C13), the first is row 0; log the mask of the decision."
        ),
    ),
    "candidates": (
        LABELED,
        {"c": [["yes"], ["yes", "maybe"], None, ["no", None]]},
        (
            "column 'c' has 4 rows holding an action that is not among the candidates, or candidates that are no "
            "actions (C13), the first is row 0; log the candidates of the decision."
        ),
    ),
    "propensity": (
        {"action_prob": "p"},
        {"p": [0.0, 1.0, 1.5, -0.5]},
        (
            "column 'p' has 3 rows with a propensity outside (0, 1] (C14), the first is row 0; log the "
            "probability with which the action was drawn."
        ),
    ),
    "null propensity": (
        {"action_prob": "p"},
        {"p": [NAN, 1.0, None, 0.5]},
        f"column 'p' has 2 rows missing, NaN or infinite (C10), the first is row 0; {FILL}",
    ),
    "density": (
        {**VECTOR, "action_prob": {"column": "p", "of": "density"}},
        {"p": [0.0, 7.5, 1.5, -0.5], "b": [0.0] * 4},
        (
            "column 'p' has 2 rows with a density that is not above 0 (C14), the first is row 0; log the density "
            "with which the action was drawn."
        ),
    ),
    "vector of propensities": (
        {"action_prob": {"column": "p", "of": "vector"}},
        {"p": [[0.5, 0.4], [0.5, 0.25, 0.25], [1.0, 0.0], [1.5, -0.5]]},
        (
            "column 'p' has 4 rows without 2 propensities that sum to 1, or with 0 for the logged action (C14), "
            "the first is row 0; log the whole distribution from which the action was drawn."
        ),
    ),
    "reward": (
        {},
        {"r": [0.0, 1.0, 1.5, -0.5]},
        f"column 'r' has 2 rows outside the reward range [0, 1] (C12), the first is row 2; {RANGE}",
    ),
    "sum of rewards": (
        {"reward": {"weights": {"r": 1, "s": 2}, "range": [0, 3]}},
        {"s": [0.0, 1.5, 1.0, 1.0]},
        f"column 'r' has 1 row outside the reward range [0, 3] (C12), row 1; {RANGE}",
    ),
    "null reward": (
        {},
        {"r": [0.0, None, NAN, INF]},
        f"column 'r' has 3 rows missing, NaN or infinite (C10), the first is row 1; {FILL}",
    ),
    "null term": (
        {"reward": {"weights": {"r": 1, "s": 2}, "range": [0, 3]}},
        {"s": [0.0, None, 1.0, 1.0]},
        f"column 'r' has 1 row missing, NaN or infinite (C10), row 1; {FILL}",
    ),
    "cost": (
        {"costs": [{"column": "c", "range": [0, 2]}]},
        {"c": [0, 2, 3, -1]},
        f"column 'c' has 2 rows outside the range [0, 2] (C12), the first is row 2; {RANGE}",
    ),
    "null cost": (
        {"costs": ["c"]},
        {"c": [0.0, None, 1.0, INF]},
        f"column 'c' has 2 rows missing, NaN or infinite (C10), the first is row 1; {FILL}",
    ),
    "policy": (
        {"policy_version": "v", "policy_versions": ["1", "2"]},
        {"v": ["1", "3", "2", "4"]},
        (
            "column 'v' has 2 rows of a policy version other than 1, 2 (C17), the first is row 1; name the "
            "version in the contract if it is right."
        ),
    ),
    "next observation": (
        {"next_observation": ["y"]},
        {"y": [1.25, 0.0, 0.0, 0.0]},
        (
            "column 'y' has 1 row differing from 'x' in the row that follows (C07), row 0; the next observation "
            "must be what was observed next."
        ),
    ),
    "next list": (
        {**observing(size=2), "next_observation": ["y"]},
        {"x": PAIRS, "y": [[3.0, 5.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]},
        (
            "column 'y' has 1 row differing from 'x' in the row that follows (C07), row 0; the next observation "
            "must be what was observed next."
        ),
    ),
    "backwards": (
        TIMED,
        {"at": [day(2), day(1), day(3), day(4)]},
        f"column 'at' has 1 row earlier than the decision before it in the episode (C08), row 1; {CLOCKS}",
    ),
    "ingested early": (
        TIMED,
        {"in": [day(5), day(2), day(3) - timedelta(minutes=6), day(4) - timedelta(minutes=5)]},
        f"column 'at' has 1 row later than their own ingestion (C08), row 2; {CLOCKS}",
    ),
    "future": (
        TIMED,
        {"at": [day(1), day(2), day(3), day(9)], "in": [day(9)] * 4},
        f"column 'at' has 1 row later than the present (C08), row 3; {CLOCKS}",
    ),
    "future reward": (
        WINDOW,
        {"came": [day(3), None, day(9), day(4)]},
        f"column 'came' has 1 row later than the present (C08), row 2; {CLOCKS}",
    ),
    "early reward": (
        WINDOW,
        {"came": [day(3), None, day(3), day(1)]},
        f"column 'came' has 1 row earlier than the decision that they reward (C08), row 3; {CLOCKS}",
    ),
    "no reward in time": (
        WINDOW,
        {"r": [0.0, None, None, None], "came": [day(3), None, None, None]},
        (
            "column 'r' has 2 rows without a reward although the time for it is over (C10), the first is row 1; "
            "land the rewards, or say in the contract what a `missing` one counts as."
        ),
    ),
    "NaN reward in time": (
        WINDOW,
        {"r": [0.0, None, None, NAN], "came": [day(4), None, None, None], "at": [day(4)] * 4},
        f"column 'r' has 1 row missing, NaN or infinite (C10), row 3; {FILL}",
    ),
    "step below 0": (
        {},
        {"t": [0, 1, -1, 0]},
        (
            "column 't' has 1 row with a step outside 0 to 2147483646 (C04), row 2; steps must run 0, 1, 2, ...: "
            "number the decisions of each episode."
        ),
    ),
    "gap": (
        {},
        {"t": [0, 2, 1, 0]},
        (
            "column 't' has 2 rows following a gap in the steps of its episode (C04), the first is row 1; steps "
            "must run 0, 1, 2, ...: add the missing decisions or leave the episode out."
        ),
    ),
    "early end": (
        {},
        {"end": [True, True, True, False]},
        (
            "column 'end' has 1 row ending an episode wrongly (C05), row 0; only the last row of an episode may "
            "be terminated or truncated, and not both: correct the flags."
        ),
    ),
    "both ends": (
        {"truncated": "cut"},
        {"cut": [False, False, True, False]},
        (
            "column 'end' has 1 row ending an episode wrongly (C05), row 2; only the last row of an episode may "
            "be terminated or truncated, and not both: correct the flags."
        ),
    ),
    "contradiction": (
        {},
        {"t": [0, 0, 0, 0], "end": [False, False, True, True]},
        (
            "column 't' has 1 row contradicting another row of the same episode and step (C03), row 1; keep one "
            "row for each decision."
        ),
    ),
    "entity": (
        {"entity": "who"},
        {"who": [1, 2, 3, 4]},
        (
            "column 'who' has 1 row belonging to another entity than their episode (C27), row 1; an episode "
            "belongs to one entity: correct its id."
        ),
    ),
}
PRESENT = day(5)
DEFAULTS: Columns = {**AT, **CAME, "p": [0.5] * 4, "b": [0.0] * 4, "m": TRUE4, "c": [1.0] * 4}


def tripped(folder: Path, name: str) -> Log:
    roles, columns, _ = TRIPPED[name]
    more = WORDS if roles is LABELED else {"a": [[0.5, 0.5]] * 4} if roles is LIST else {}
    return log_of(folder, roles, {**DEFAULTS, **more, **columns})


@pytest.mark.parametrize("name", TRIPPED)
def test_a_broken_rule_is_one_sentence_with_file_column_rows_first_row_and_remedy(tmp_path: Path, name: str) -> None:
    sentence = TRIPPED[name][2]
    found = screen(tripped(tmp_path, name), PRESENT)
    file = tmp_path / "b0.parquet"
    assert found.violations[0].sentence("b0.parquet") == f"b0.parquet: {sentence}"
    assert found.reasons()[file][0] == f"{file}: {sentence}"
    assert found.broken["rows"].to_list() == [4]
    counted = sum(found.broken.row(0)[2:])
    assert counted == sum(violation.rows for violation in found.violations)


def test_every_rule_of_these_contracts_is_tripped_by_one_of_these_logs(tmp_path: Path) -> None:
    known, broken = set(), set()
    for number, name in enumerate(TRIPPED):
        log = tripped(tmp_path / str(number), name)
        known |= {(rule.check, rule.problem) for rule in rules(log.contract, PRESENT, PRESENT)}
        broken |= {(violation.check, violation.problem) for violation in screen(log, PRESENT).violations}
    assert known <= broken


# --- contracts that cannot be -----------------------------------------------------------------------------------------

SHAPES = "give the action as one of: column and values; components; columns, low and high; column, size, low and high"
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt key": ({"obsrvation": ["x"]}, "logs: unknown key 'obsrvation': did you mean 'observation'?"),
    "a misspelt key of an observation": (
        observing(categorys=3),
        "logs.observation.0: unknown key 'categorys': did you mean 'categories'?",
    ),
    "a misspelt key of the action": (
        acting(colunm="a", values=2),
        "logs.action: unknown key 'colunm': did you mean 'column'?",
    ),
    "a misspelt key of a component": (
        acting(components=[{"column": "a", "valus": 2}]),
        "logs.action.components.0: unknown key 'valus': did you mean 'values'?",
    ),
    "a misspelt key of the reward": (
        {"reward": {"column": "r", "rnge": [0, 1]}},
        "logs.reward: unknown key 'rnge': did you mean 'range'?",
    ),
    "a misspelt key of a cost": (
        {"costs": [{"column": "c", "rang": [0, 1]}]},
        "logs.costs.0: unknown key 'rang': did you mean 'range'?",
    ),
    "a misspelt key of the propensity": (
        {"action_prob": {"column": "p", "off": "vector"}},
        "logs.action_prob: unknown key 'off': did you mean 'of'?",
    ),
    "a key like no other": (
        {"reward": {"column": "r", "qq": 1}},
        (
            "logs.reward: unknown key 'qq': known keys are arrived_at, column, missing, range, unit, weights, "
            "window_hours."
        ),
    ),
    "boolean labels": (
        observing(categories=["no", False]),
        ("logs.observation.0.categories: False is no label: labels are text or whole numbers, so put quotes around it"),
    ),
    "labels of half numbers": (
        observing(ordered=[1.5]),
        ("logs.observation.0.ordered: 1.5 is no label: labels are text or whole numbers, so put quotes around it"),
    ),
    "boolean actions": (
        acting(column="a", values=[True, False]),
        "logs.action.values: True is no label: labels are text or whole numbers, so put quotes around it",
    ),
    "an unknown stand-in": (
        observing(missing="median"),
        ("logs.observation.0.missing: 'median' cannot stand for a missing value: give a number, 'mean' or 'category'"),
    ),
    "two kinds at once": (
        observing(categories=3, timestamp=True),
        "logs.observation.0: 'x' cannot be categories and timestamp at once; keep one",
    ),
    "an order in a list": (
        observing(ordered=["a"], size=3),
        "logs.observation.0: 'x' cannot be ordered and size at once; keep one",
    ),
    "no category": (observing(categories=0), "logs.observation.0: 'x' needs at least one category"),
    "fewer than no category": (observing(categories=-2), "logs.observation.0: 'x' needs at least one category"),
    "no label": (observing(categories=[]), "logs.observation.0: 'x' needs at least one category"),
    "an empty order": (observing(ordered=[]), "logs.observation.0: 'x' needs at least one category"),
    "a label twice": (observing(categories=["a", "b", "a"]), "logs.observation.0: 'x' names a label twice"),
    "a label twice as text": (observing(ordered=[1, "1"]), "logs.observation.0: 'x' names a label twice"),
    "a category for a missing number": (
        observing(missing="category"),
        "logs.observation.0: missing: category needs `categories`; give 'x' a number or 'mean'",
    ),
    "a number for a missing category": (
        observing(categories=3, missing=0),
        "logs.observation.0: 'x' has categories: a missing one is `missing: category`",
    ),
    "a range of labels": (
        observing(categories=3, range=[0, 1]),
        "logs.observation.0: 'x' is no number, so it has no range; leave it out",
    ),
    "a range of times": (
        observing(timestamp=True, range=[0, 1]),
        "logs.observation.0: 'x' is no number, so it has no range; leave it out",
    ),
    "an empty range": (
        observing(range=[1, 1]),
        "logs.observation.0: the range of 'x' [1.0, 1.0] must have its lower end below its upper end",
    ),
    "a range without end": (observing(range=[0, INF]), "logs.observation.0.range.1: Input should be a finite number"),
    "a list of nothing": (observing(size=0), "logs.observation.0.size: Input should be greater than or equal to 1"),
    "nothing observed": (
        {"observation": []},
        "logs.observation: List should have at least 1 item after validation, not 0",
    ),
    "too many categories": (
        observing(categories=2**24 + 1),
        "logs: column 'x' has over 16,777,216 categories; group them first",
    ),
    "one action": (acting(column="a", values=1), "logs.action: the action 'a' needs at least two different values"),
    "an action twice": (
        acting(column="a", values=["x", "x"]),
        "logs.action: the action 'a' needs at least two different values",
    ),
    "one action in a component": (
        acting(components=[{"column": "a", "values": 1}]),
        "logs.action.components.0: the action 'a' needs at least two different values",
    ),
    "no values": (acting(column="a"), f"logs.action: {SHAPES}"),
    "values and a size": (acting(column="a", values=2, size=2, low=0, high=1), f"logs.action: {SHAPES}"),
    "values beside components": (acting(components=[{"column": "a", "values": 2}], values=3), f"logs.action: {SHAPES}"),
    "one column and several": (acting(columns=["a"], column="b", low=0, high=1), f"logs.action: {SHAPES}"),
    "a column of the action twice": (
        acting(columns=["a", "a"], low=0, high=1),
        "logs.action: the action names a column twice",
    ),
    "a component twice": (
        acting(components=[{"column": "a", "values": 2}] * 2),
        "logs.action: the action names a column twice",
    ),
    "no bounds": (
        acting(columns=["a"], low=0),
        "logs.action: a continuous action needs `low` and `high`: a number each, or one per dimension",
    ),
    "bounds of other dimensions": (
        acting(columns=["a", "b"], low=[0, 0, 0], high=1),
        "logs.action: a continuous action needs `low` and `high`: a number each, or one per dimension",
    ),
    "bounds that cross": (
        acting(columns=["a", "b"], low=[0, 2], high=1),
        "logs.action: every `low` of the action must lie below its `high`",
    ),
    "bounds without end": (
        acting(columns=["a"], low=0, high=[INF]),
        "logs.action.high.float: Input should be a valid number",
    ),
    "a mask of numbers": (
        acting(columns=["a"], low=0, high=1, mask="m"),
        "logs.action: a continuous action has bounds; a mask or candidates are for discrete ones",
    ),
    "bounds of codes": (
        acting(column="a", values=2, low=0),
        "logs.action: `low` and `high` are for continuous actions; a discrete one has `values`",
    ),
    "a mask and candidates": (
        acting(column="a", values=2, mask="m", candidates="c"),
        "logs.action: give either the mask or the candidates of the action, not both",
    ),
    "candidates of a joint action": (
        acting(components=[{"column": "a", "values": 2}], candidates="c"),
        "logs.action: candidates are of an action in one column; give a joint action a mask",
    ),
    "a probability of numbers": (
        {**VECTOR, "action_prob": "p"},
        "logs: the propensity of this kind of action is `of: density`",
    ),
    "a density of codes": (
        {"action_prob": {"column": "p", "of": "density"}},
        "logs: the propensity of this kind of action is `of: action or vector`",
    ),
    "no reward": (
        {"reward": {"range": [0, 1]}},
        "logs.reward: give the reward either as `column` or as `weights` (column: weight)",
    ),
    "a reward in two ways": (
        {"reward": {"column": "r", "weights": {"r": 1}, "range": [0, 1]}},
        "logs.reward: give the reward either as `column` or as `weights` (column: weight)",
    ),
    "a reward without a range": ({"reward": {"column": "r"}}, "logs.reward.range: Field required"),
    "a reward range that crosses": (
        {"reward": {"column": "r", "range": [1, 0]}},
        "logs.reward: the reward range [1.0, 0.0] must have its lower end below its upper end",
    ),
    "a missing reward out of range": (
        {"reward": {"column": "r", "range": [0, 1], "missing": -1}},
        "logs.reward: a missing reward counts as -1, outside the range [0.0, 1.0]",
    ),
    "a window of no time": (
        {"reward": {"column": "r", "range": [0, 1], "window_hours": 0}},
        "logs.reward.window_hours: Input should be greater than 0",
    ),
    "a window without times": (
        {"reward": {"column": "r", "range": [0, 1], "window_hours": 2}},
        "logs: a reward window needs decided_at, and an episode_id by which late rewards find their row",
    ),
    "a cost range that crosses": (
        {"costs": [{"column": "c", "range": [2, 1]}]},
        "logs.costs.0: the range of 'c' [2.0, 1.0] must have its lower end below its upper end",
    ),
    "an unknown format": ({"format": "parket"}, "logs.format: unknown format 'parket': did you mean 'parquet'?"),
    "a source elsewhere": (
        {"source": "/data"},
        "logs.source: '/data' must be a folder inside the project, relative to it",
    ),
    "a source outside": (
        {"source": "../data"},
        "logs.source: '../data' must be a folder inside the project, relative to it",
    ),
    "no source": ({"source": "."}, "logs.source: '.' must be a folder inside the project, relative to it"),
    "a bandit with steps": (
        {"horizon": 1},
        "logs: with horizon 1 every row is an episode, so there is no step; leave it out",
    ),
    "a bandit with ends": (
        {"horizon": 1, "step": None},
        "logs: with horizon 1 every row is an episode, so there is no terminated; leave it out",
    ),
    "a bandit with a next observation": (
        {**BANDIT, "next_observation": ["y"]},
        "logs: with horizon 1 every row is an episode, so there is no next_observation; leave it out",
    ),
    "a longer horizon": ({"horizon": 2}, "logs.horizon: Input should be less than or equal to 1"),
    "no id": (
        {"episode_id": None},
        "logs: name the column of the episode_id, or write `horizon: 1` when every row stands alone",
    ),
    "no order": ({"step": None}, "logs: name the column of the step, or of decided_at to order the rows by"),
    "no end": (
        {"terminated": None},
        "logs: name the column that says that an episode terminated, or that it was truncated",
    ),
    "a next observation too many": (
        {"next_observation": ["y", "z"]},
        (
            "logs: next_observation names 2 columns and observation 1; give one next column for each observed "
            "column, in the same order"
        ),
    ),
    "a next observation that is the present one": (
        {"next_observation": ["x"]},
        "logs: column 'x' is named twice in one role; name it once",
    ),
    "a column observed twice": (
        {"observation": ["x", "x"]},
        "logs: column 'x' is named twice in one role; name it once",
    ),
    "a cost twice": ({"costs": ["c", "c"]}, "logs: column 'c' is named twice in one role; name it once"),
    "a subgroup twice": ({"subgroups": ["g", "g"]}, "logs: column 'g' is named twice in one role; name it once"),
    "versions without a column": (
        {"policy_versions": ["1"]},
        "logs: policy_versions are those of a column; name it as policy_version",
    ),
    "two kinds of a column": (
        {"reward": {"column": "end", "range": [0, 1]}},
        "logs: column 'end' cannot be the reward (number) and terminated (boolean) at once",
    ),
    "a time as a number": (
        {**observing(timestamp=True), "interval": "x"},
        "logs: column 'x' cannot be the observation (time) and the interval (number) at once",
    ),
    "no discount": ({"gamma": None}, "logs.gamma: Field required"),
    "a discount of nothing": ({"gamma": 0}, "logs.gamma: Input should be greater than 0"),
    "a discount beyond 1": ({"gamma": 1.5}, "logs.gamma: Input should be less than or equal to 1"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_contract_that_cannot_be_is_refused_in_one_sentence(name: str) -> None:
    roles, sentence = IMPOSSIBLE[name]
    with pytest.raises(InputError) as refusal:
        contract_of(**roles)
    assert str(refusal.value) == f"toy: {sentence}"


def test_formats_with_a_layout_of_their_own_name_its_columns() -> None:
    plain: dict[str, Any] = {
        "source": "data/toy/raw",
        "observation": ["x"],
        "action": ROLES["action"],
        "gamma": 1.0,
        "reward": {"range": [0, 1]},
    }
    found = Contract(**plain, format="d4rl")
    assert (found.episode_id, found.step, found.terminated, found.truncated) == (
        "episode_id",
        "step",
        "terminated",
        "truncated",
    )
    assert found.reward.column == "reward" and found.next_observation is None
    assert Contract(**plain, format="minari").next_observation == ["next_observation"]
    assert Contract(**plain, format="d3rlpy", episode_id="stay").episode_id == "stay"
    click: dict[str, Any] = plain | {"reward": {"column": "click", "range": [0, 1]}}
    assert Contract(**click, format="open_bandit").horizon == 1


# --- files that do not hold to the contract ---------------------------------------------------------------------------

MISFITS: dict[str, tuple[dict[str, Any], Columns, str]] = {
    "a column is missing": (
        {"costs": ["harms"]},
        {"harm": [0] * 4},
        (
            r"column 'harms' is missing in all 4 rows \(did you mean 'harm'\?\) \(C01\); the contract needs it "
            r"once \(number\), so write the batch again with it\."
        ),
    ),
    "text for a number": (
        {},
        {"x": ["1"] * 4},
        r"column 'x' is string in all 4 rows where the contract needs a number \(C01\); convert it",
    ),
    "numbers for flags": (
        {},
        {"end": [0, 1, 1, 1]},
        r"column 'end' is int64 in all 4 rows where the contract needs a boolean \(C01\)",
    ),
    "halves for codes": (
        observing(categories=3),
        {},
        r"column 'x' is double in all 4 rows where the contract needs a integer \(C01\)",
    ),
    "numbers for a list": (
        observing(size=2),
        {},
        r"column 'x' is double in all 4 rows where the contract needs a numbers\[2\] \(C01\)",
    ),
    "text in a list": (observing(size=2), {"x": [["1", "2"]] * 4}, "column 'x' is list<.*string> in all 4 rows"),
    "text for a time": (
        {"decided_at": "at"},
        {"at": ["2026-01-01"] * 4},
        "column 'at' is string in all 4 rows where the contract needs a time",
    ),
    "numbers for a mask": (
        MASKED,
        {"m": [[1, 0]] * 4},
        "column 'm' is list<.*int64> in all 4 rows where the contract needs a mask",
    ),
    "halves for an id": ({}, {"id": [0.5] * 4}, "column 'id' is double in all 4 rows where the contract needs a key"),
    "halves for a label": (
        {"subgroups": "x"} | observing(categories=["a"]),
        {},
        "column 'x' is double in all 4 rows where the contract needs a label",
    ),
    "nothing at all": ({}, {"x": pa.nulls(4)}, "column 'x' is null in all 4 rows where the contract needs a number"),
}


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    table = pa.table(LOG).append_column("x", [LOG["x"]])
    storage.write_parquet(tmp_path / "b.parquet", table)
    with pytest.raises(
        InputError, match=r"b\.parquet: column 'x' is there twice in all 4 rows \(C01\); the contract needs it once"
    ):
        Log.open([tmp_path / "b.parquet"], contract_of())


@pytest.mark.parametrize("name", MISFITS)
def test_a_file_that_does_not_hold_to_the_contract_is_named_with_column_and_rows(tmp_path: Path, name: str) -> None:
    roles, columns, sentence = MISFITS[name]
    with pytest.raises(InputError, match=r"b0\.parquet: " + sentence):
        log_of(tmp_path, roles, columns)
