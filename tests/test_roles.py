"""Every role of the contract and every kind of column, from a small log made by hand to the exact arrays of episodes."""

import math
from datetime import UTC, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.logs.read import Log
from offrl_models.logs.screen import screen
from offrl_models.schema import Feature
from tests.hand_made import (
    BANDIT,
    GATE,
    LOG,
    NAN,
    PAIRS,
    SELECTION,
    TRAIN,
    Columns,
    contract_of,
    dataset,
    day,
    log_of,
    numbers,
    write,
)

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


def test_without_a_step_a_time_is_one_decision(tmp_path: Path) -> None:
    """An exact repetition counts once. Of two rows that differ nobody knows which came first, nor whether both did."""
    roles = {"step": None, "decided_at": "at"}
    one = {
        "id": [TRAIN] * 3,
        "at": [day(1)] * 3,
        "x": [3.0] * 3,
        "a": [0] * 3,
        "r": [0.0] * 3,
        "end": [False] * 3,
        "t": [0] * 3,
    }
    last = {
        **LOG,
        "at": [day(2)] * 4,
        "id": [TRAIN, 10_000, SELECTION, GATE],
        "end": [True, True, True, True],
        "x": [4.0, 5.0, 6.0, 7.0],
    }
    episodes = dataset(tmp_path, roles, one, one, last)
    assert sorted(episodes.observation.ravel().tolist()) == [3.0, 4.0, 5.0, 6.0, 7.0]
    found = screen(log_of(tmp_path, roles, one, one, last)).index
    assert found.duplicates == {0: 2, 1: 3} and sum(found.rows.values()) == 10
    for batches, blamed, rows in (
        ([one | {"x": [3.0, 1.0, 3.0]}, last], 0, 1),
        ([one, one | {"x": [1.0] * 3}, last], 1, 3),
    ):
        (found,) = screen(log_of(tmp_path, roles, *batches)).violations
        assert (found.check, found.column, found.batch, found.rows) == ("C03", "at", blamed, rows)
        assert (
            found.problem == "contradicting another row of the same episode and time" and "log a step" in found.remedy
        )


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


def test_what_follows_an_end_may_be_missing_and_is_then_some_number(tmp_path: Path) -> None:
    """Of the two decisions that terminated the next observation is null, of the one that was cut off it is needed."""
    for number, (kind, missing) in enumerate([("number", None), ("number", NAN), ("list", None), ("list", [NAN, 1.0])]):
        wide = kind == "list"
        observed = {"observation": [{"column": "x", **({"size": 2} if wide else {})}], "next_observation": ["y"]}
        x = PAIRS if wide else [0.5, 1.5, 2.5, 3.5]
        y: list[Any] = [x[1], missing, x[0], missing]
        roles = {**observed, "truncated": "cut"}
        columns = {"x": x, "y": y, "end": [False, True, False, True], "cut": [False, False, True, False]}
        episodes = dataset(tmp_path / str(number), roles, columns)
        assert np.array_equal(episodes.final_observation, numbers(x[1], x[0], x[3]).reshape(3, -1))
        wrong = screen(
            log_of(tmp_path / f"{number} cut", roles, columns | {"y": [x[1], x[0], missing, x[0]]})
        ).violations
        assert [(violation.check, violation.column, violation.rows) for violation in wrong] == [("C10", "y", 1)]


@pytest.mark.parametrize("name", ["codes", "labels", "a boolean", "an unsigned number", "a time", "a fixed list"])
def test_what_follows_an_end_may_be_missing_in_any_kind_of_column(tmp_path: Path, name: str) -> None:
    options, column, expected, _ = OBSERVATIONS[name]
    column = column if isinstance(column, pa.Array) else pa.array(column, from_pandas=False)
    following = column.take(pa.array([1, None, None, None]))
    roles = {"observation": [{"column": "x", **options}], "next_observation": ["y"]}
    episodes = dataset(tmp_path, roles, {"x": column, "y": following})
    wanted = np.array(expected, np.float32).reshape(4, -1)
    assert episodes.final_observation == pytest.approx(wanted[1:], rel=1e-6, abs=1e-6)


def test_a_row_that_was_only_written_down_at_another_time_is_a_repetition(tmp_path: Path) -> None:
    """Unless the time plays another role as well: then it says something of the decision."""
    at = [day(1), day(2), day(1), day(1)]
    for roles in ({"decided_at": "at", "ingested_at": "in"}, {"decided_at": "at", "ingested_at": "in", "step": None}):
        batches = [{"at": at, "in": [day(number)] * 4} for number in (5, 6)]
        folder = tmp_path / str(len(roles))
        found = screen(log_of(folder, roles, *batches))
        assert found.violations == () and found.index.duplicates == {1: 4}
        assert dataset(folder, roles, *batches).n_rows == 4
    roles = {"ingested_at": "in", "observation": ["x", {"column": "in", "timestamp": True}]}
    batches = [{"in": [day(number)] * 4} for number in (5, 6)]
    assert [v.check for v in screen(log_of(tmp_path / "seen", roles, *batches)).violations] == ["C03"]


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
