"""Logs that seem to tell of a policy what they cannot: nothing is settled by them, or they are refused."""

import gzip
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

from offrl_models import assess
from offrl_models.assess import options
from offrl_models.assess.log import make_contract
from offrl_models.assess.target import Target
from offrl_models.assess.values import logged_returns, tabular_values
from offrl_models.choices import Probabilities
from offrl_models.schema import InputError
from tests.conftest import circling_world, cut_after_one_step
from tests.test_assess import FEW_STEPS, better

LOSS = 10.0


def asked(folder: Path, frame: pl.DataFrame, table: np.ndarray | None = None, **columns: Any) -> dict[str, Any]:
    """What a log in one Parquet file says of a policy that looks at the largest of what is observed, or of its column `pi`."""
    path = folder / "log.parquet"
    frame.write_parquet(path)
    named = {
        "action": "a",
        "actions": "2",
        "action_prob": "p",
        "reward": "r",
        "reward_range": [-100.0, 100.0],
        "log": [path],
    }
    if "horizon" not in columns:
        named |= {
            "episode": "episode",
            "step": "step",
            "gamma": 1.0,
            "terminated": "terminated",
            "truncated": "truncated",
        }
    policy: dict[str, Any] = {"policy_column": "pi"}
    if table is not None:
        module = ModuleType("policy_of_a_trap")
        module.play = lambda seen, _: table[seen.argmax(1) if seen.shape[1] > 1 else seen[:, 0].astype(int)]  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules["policy_of_a_trap"] = module
        policy = {"policy_callable": "policy_of_a_trap:play"}
    named |= columns
    return assess.assess([path], options.contract_of(named), options.target_of(policy), FEW_STEPS)


def broken(found: dict[str, Any]) -> set[str]:
    return {check["name"] for check in found["checks"] if not check["holds"]}


# Where the policy goes and the log hardly does


def a_rare_ward(bonus: float, seed: int = 0, stays: int = 2000) -> pl.DataFrame:
    """One stay in 50 comes to ward 2, where action 0 is always played; action 1 would lose LOSS there."""
    rng = np.random.default_rng(seed)
    first = rng.choice(3, stays, p=[0.49, 0.49, 0.02])
    ward = np.where(first == 2, 2, 1)
    second = np.where(ward == 1, rng.integers(0, 2, stays), 0)
    prob = np.stack([np.array([0.49, 0.49, 0.02])[first], np.where(ward == 1, 0.5, 1.0)], 1)
    reward = np.stack([bonus * (first == 0), np.where(ward == 2, np.where(second == 0, 1.0, -LOSS), 0.0)], 1)
    seen = np.stack([np.zeros(stays, int), ward], 1).ravel()
    numbers = np.eye(3)[seen] + 0.01 * rng.standard_normal((2 * stays, 3))
    return pl.DataFrame({
        "episode": np.repeat(np.arange(stays), 2), "step": np.tile([0, 1], stays), "s": seen,
        "a": np.stack([first, second], 1).ravel(), "p": prob.ravel(),
        "r": (reward + 0.5 * rng.standard_normal((stays, 2))).ravel(), "terminated": np.tile([False, True], stays),
        "truncated": np.zeros(2 * stays, bool), "x0": numbers[:, 0], "x1": numbers[:, 1], "x2": numbers[:, 2],
    })  # fmt: skip


INTO_IT = np.array([[0.4, 0.4, 0.2], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
AND_A_BONUS = np.array([[0.79, 0.01, 0.2], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize("logged", [True, False])
def test_support_is_asked_where_the_policy_would_come(tmp_path: Path, logged: bool) -> None:
    prob = {} if logged else {"action_prob": None}
    found = asked(tmp_path, a_rare_ward(0.0), INTO_IT, observation="s:3", actions="3", **prob)
    assert found["answer"] == "unusable" and {"visits", "support"} & broken(found) >= (
        {"visits"} if logged else {"support"}
    )


@pytest.mark.parametrize("by", ["column", "function"])
def test_weights_that_lack_what_the_policy_does_settle_nothing(tmp_path: Path, by: str) -> None:
    frame = a_rare_ward(1.0)
    frame = frame.with_columns(pi=pl.Series(AND_A_BONUS[frame["s"].to_numpy(), frame["a"].to_numpy()]))
    table = AND_A_BONUS if by == "function" else None
    found = asked(tmp_path, frame, table, observation="x0,x1,x2", actions="3")
    assert found["difference"]["estimator"] == ("WDR" if by == "function" else "WPDIS")
    assert found["answer"] == "unsettled" and "mean weight" in broken(found)


# What was cut off


def transferred(stays: int = 2000, seed: int = 1) -> pl.DataFrame:
    """Single decisions. Action 0 earns .6; action 1 earns 1, or LOSS less than nothing for the 5% who are transferred then."""
    rng = np.random.default_rng(seed)
    action = rng.integers(0, 2, stays)
    gone = (action == 1) & (rng.random(stays) < 0.05)
    return pl.DataFrame({
        "episode": np.arange(stays), "step": np.zeros(stays, int), "s": rng.integers(0, 2, stays), "a": action,
        "p": np.full(stays, 0.5), "r": np.where(gone, -LOSS, np.where(action == 1, 1.0, 0.6)) + 0.1 * rng.normal(size=stays),
        "terminated": ~gone, "truncated": gone, "pi": np.where(action == 1, 0.9, 0.1),
    })  # fmt: skip


def test_rewards_of_decisions_that_are_left_out_may_not_undo_the_difference(tmp_path: Path) -> None:
    frame = transferred()
    lost = frame.filter("truncated")
    found = asked(tmp_path, frame, observation="s:2")
    assert found["answer"] == "unsettled" and broken(found) == {"last rewards"}
    assert found["log"]["cut_off"]["rows"] == found["log"]["cut_off"]["episodes"] == lost.height
    assert found["log"]["cut_off"]["reward"] == pytest.approx(np.abs(lost["r"].to_numpy()).sum() / frame.height)
    assert any(
        f"Of {lost.height} recordings that stopped, the last decision is left out" in line for line in found["method"]
    )
    without = frame.filter(~pl.col("truncated"))
    assert asked(tmp_path, without, observation="s:2")["answer"] == "better"  # it is these that keep it back


def test_recordings_that_stop_where_nobody_ever_acts_settle_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    action = rng.integers(0, 2, 4000)
    path = tmp_path / "log.parquet"
    pl.DataFrame({
        "episode": np.arange(4000), "step": np.zeros(4000, int), "s": np.zeros(4000, int), "a": action, "p": np.full(4000, 0.5),
        "r": np.where(action == 0, 1.0, 0.5) + 0.3 * rng.normal(size=4000), "terminated": np.zeros(4000, bool),
        "truncated": np.ones(4000, bool), "then": np.where(action == 0, 1, 2), "pi": [[0.9, 0.1]] * 4000,
    }).write_parquet(path)  # fmt: skip
    contract = make_contract(
        {
            "format": "parquet", "episode_id": "episode", "step": "step", "observation": [{"column": "s", "categories": 3}],
            "next_observation": ["then"], "action": {"column": "a", "values": 2}, "action_prob": "p",
            "reward": {"column": "r", "range": [-9, 9]}, "gamma": 1.0, "terminated": "terminated", "truncated": "truncated",
        },
        "here",
    )  # fmt: skip
    found = assess.assess([path], contract, options.target_of({"policy_column": "pi"}), FEW_STEPS)
    assert found["answer"] == "unsettled" and "recorded to the end" in broken(found)


def test_what_the_logs_earned_is_known_as_well_as_what_the_policy_would_where_recordings_stop() -> None:
    """Intervals of 95% cover the exact values of both, where a fitted value past the end would be taken for certain."""
    world = circling_world(0.9)
    table, covered = better(world), np.zeros(2)
    exact = world.value(world.behavior), world.value(table)
    for seed in range(100):
        log = cut_after_one_step(world.simulate(400, seed))
        probs = table[log.observation[:, 0].astype(int)]
        choices = Probabilities(log, probs)
        target = Target({}, choices.taken, choices, None)
        values = tabular_values(log, target, target.ratio(log), world.n_states)
        assert values is not None and values.gains is not None
        logged = logged_returns(log, values)
        for place, outcome in enumerate((logged, values.gains + logged)):
            covered[place] += abs(outcome.mean() - exact[place]) <= 1.96 * outcome.std() / np.sqrt(len(outcome))
    assert (covered >= 88).all()


# Rows that are not what they seem


def clicks(rounds: int = 600) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    x, action = rng.normal(size=rounds).round(1), rng.integers(0, 2, rounds)
    click = (rng.random(rounds) < 0.3 + 0.2 * action).astype(float)
    return pl.DataFrame({"x": x, "a": action, "p": np.full(rounds, 0.5), "r": click, "pi": np.full(rounds, 0.5)})


@pytest.mark.parametrize("column", ["a", "r", "p"])
def test_what_was_done_or_came_of_it_is_no_observation(tmp_path: Path, column: str) -> None:
    with pytest.raises(
        InputError, match=rf"column '{column}' is the \w+: observe only what was known before the decision"
    ):
        asked(tmp_path, clicks(), observation=f"x,{column}", horizon=1)


def test_a_copy_of_the_reward_is_no_observation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"column 'y' alone predicts the last reward \(AUC 1.000, C09\)"):
        asked(tmp_path, clicks().with_columns(y=2.0 * pl.col("r")), observation="x,y", horizon=1)


def test_rows_that_a_join_has_multiplied_are_refused(tmp_path: Path) -> None:
    assert asked(tmp_path, clicks(), observation="x", horizon=1)["log"]["rows"] == 600
    with pytest.raises(InputError, match="every row is there 3 times"):
        asked(tmp_path, pl.concat([clicks()] * 3), observation="x", horizon=1)


def test_a_compressed_copy_is_a_copy(tmp_path: Path) -> None:
    clicks().write_csv(tmp_path / "log.csv")
    with gzip.open(tmp_path / "log.csv.gz", "wb") as file:
        file.write((tmp_path / "log.csv").read_bytes())
    named = {"action": "a", "actions": "2", "action_prob": "p", "reward": "r", "reward_range": [0.0, 1.0], "horizon": 1}
    contract = options.contract_of({**named, "observation": "x", "log": [tmp_path], "format": "csv"})
    with pytest.raises(InputError, match=r"log.csv.gz is a copy of .*log.csv"):
        assess.assess([tmp_path], contract, options.target_of({"policy_column": "pi"}), FEW_STEPS)
