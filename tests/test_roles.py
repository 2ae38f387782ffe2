"""Roles of the contract, actions, rewards, propensities and labels, from a log made by hand to the exact arrays of episodes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from offrl_models.logs.screen import screen
from tests.hand_made import GATE, NAN, PAIRS, SELECTION, Columns, dataset, log_of, numbers

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
