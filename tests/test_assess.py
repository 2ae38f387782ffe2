"""What `offrl evaluate` finds: estimates cover what is known exactly, and what the log cannot tell is not settled."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from offrl_models import assess, storage
from offrl_models.assess import log
from offrl_models.assess.values import Effort
from offrl_models.ope.worlds import World
from offrl_models.reports import assessment
from offrl_models.schema import InputError
from tests.conftest import as_table, attributes, chain_world

FEW_STEPS = Effort(20, 0)


# A sequential log of a world with one category, whose values are known


def better(world: World) -> np.ndarray:
    return 0.5 * world.optimal() + 0.5 * world.behavior


def graph(table: np.ndarray, path: Path) -> Path:
    """A policy of one category as a graph, made by hand: exporting one takes seconds."""
    columns, actions = [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["rows", 1])], table.shape[1]
    columns.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["rows", actions]))
    nodes = [
        helper.make_node("Cast", ["observation"], ["code"], to=TensorProto.INT64),
        helper.make_node("Squeeze", ["code", "axis"], ["state"]),
        helper.make_node("Gather", ["table", "state"], ["probs"]),
    ]
    known = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")]
    output = [helper.make_tensor_value_info("probs", TensorProto.DOUBLE, ["rows", actions])]
    model = helper.make_model(
        helper.make_graph(nodes, "policy", columns, output, known), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    storage.write_bytes(path, model.SerializeToString())
    return path


def sequential(folder: Path, world: World, episodes: int, *, seed: int = 5, **columns: Any) -> Path:
    """A folder with the log in one Parquet file, and its contract beside it."""
    logged = world.simulate(episodes, seed)
    table = as_table(logged)
    for name, per_state in columns.items():
        table = table.append_column(name, pl.Series(per_state(logged)).to_arrow())
    storage.write_parquet(folder / "logs" / "a.parquet", table)
    contract = attributes(world.n_states, 3)["logs"]
    storage.write_bytes(folder / "contract.yaml", yaml.safe_dump({"logs": contract}).encode())
    return folder / "logs"


def assessed(folder: Path, effort: Effort = FEW_STEPS, **given: Any) -> dict[str, Any]:
    """What the log in a folder says, as the command finds it."""
    contract = assess.contract_of({"log": [folder / "logs"], "contract": folder / "contract.yaml"})
    return assess.assess([folder / "logs"], contract, assess.target_of(given), effort)


def covers(interval: dict[str, Any], exact: float) -> bool:
    return interval["low"] <= exact <= interval["high"]


def test_estimates_cover_the_exact_value_of_a_tabular_world(tmp_path: Path) -> None:
    world = chain_world()
    sequential(tmp_path, world, 3000)
    table = better(world)
    found = assessed(tmp_path, policy=graph(table, tmp_path / "policy.onnx"))
    exact, base = world.value(table), world.value(world.behavior)
    assert set(found["estimates"]) == {"TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR", "MDR", "DM"}
    assert {name for name, interval in found["estimates"].items() if not covers(interval, exact)} == set()
    assert covers(found["logged"], base)
    assert found["difference"]["lower_bound"] < exact - base < found["difference"]["upper_bound"]
    assert found["difference"]["estimator"] == "MDR" and found["answer"] == "better"
    assert "of the other one, but DM, which is of the whole log." in " ".join(found["method"])
    assert found["left_out"] == {} and all(check["holds"] for check in found["checks"])


def test_a_worse_policy_is_called_worse(tmp_path: Path) -> None:
    world = chain_world()
    sequential(tmp_path, world, 1500)
    worst = np.where(world.optimal() > 0, 0.02, 0.49)
    found = assessed(tmp_path, policy=graph(worst / worst.sum(1, keepdims=True), tmp_path / "policy.onnx"))
    assert found["answer"] == "worse" and found["difference"]["upper_bound"] < 0


def test_the_policy_that_wrote_the_log_is_worth_what_it_earned(tmp_path: Path) -> None:
    world = chain_world()
    sequential(tmp_path, world, 1000)
    found = assessed(tmp_path, policy=graph(world.behavior, tmp_path / "policy.onnx"))
    mean = found["logged"]["estimate"]
    for name in ("TIS", "PDIS", "WIS"):  # weights are 1; steps of WPDIS have weights past the end of episodes as well
        assert found["estimates"][name]["estimate"] == pytest.approx(mean, abs=1e-6)
    assert found["difference"]["estimate"] == pytest.approx(0.0, abs=0.01)
    assert found["answer"] == "unsettled" and "do not settle" in found["sentence"]


def test_without_propensities_they_are_estimated_and_labelled_amber(tmp_path: Path) -> None:
    world = chain_world()
    sequential(tmp_path, world, 2000)
    contract = yaml.safe_load((tmp_path / "contract.yaml").read_text())
    del contract["logs"]["action_prob"]
    (tmp_path / "contract.yaml").write_text(yaml.safe_dump(contract["logs"]))
    table = better(world)
    found = assessed(tmp_path, policy=graph(table, tmp_path / "policy.onnx"))
    assert found["behavior"]["color"] == "AMBER" and found["behavior"]["ece"] < 0.05
    assert found["difference"]["level"] == pytest.approx(0.975)  # half the error rate
    assert covers(found["estimates"]["WIS"], world.value(table)) and covers(
        found["estimates"]["MDR"], world.value(table)
    )
    assert found["statement"].startswith("This holds if the estimated propensities")
    assert "half the error rate" in " ".join(assessment.lines(found))


def test_past_a_truncation_both_sides_count_a_fitted_value(tmp_path: Path) -> None:
    """Every other recording stops after two decisions: the estimates are still of whole episodes."""
    world = chain_world()
    sequential(tmp_path, world, 3000)
    frame = pl.read_parquet(tmp_path / "logs" / "a.parquet")
    whole, ended = pl.col("episode") % 2 == 0, pl.col("terminated")
    cut = frame.filter(whole | (pl.col("step") < 2))
    cut.with_columns(truncated=~whole & (pl.col("step") == 1) & ~ended).write_parquet(tmp_path / "logs" / "a.parquet")
    table = better(world)
    found = assessed(tmp_path, policy=graph(table, tmp_path / "policy.onnx"))
    assert found["log"]["truncated"] > 500
    assert covers(found["logged"], world.value(world.behavior))
    assert covers(found["estimates"]["MDR"], world.value(table)) and covers(
        found["estimates"]["WDR"], world.value(table)
    )
    assert "the fitted value past that point" in " ".join(found["method"]) and found["answer"] == "better"


def test_numbers_without_propensities_that_stop_early_need_clones_and_networks(tmp_path: Path) -> None:
    """The observation is a number here, so that nothing can be counted. Whoever acted tossed a fair die."""
    world = chain_world()
    logged = as_table(world.simulate(600, 4), numeric=True)
    frame = pl.DataFrame(logged).filter((pl.col("episode") % 2 == 0) | (pl.col("step") < 2)).drop("prob")
    cut = (pl.col("episode") % 2 == 1) & (pl.col("step") == 1) & ~pl.col("terminated")
    storage.write_parquet(tmp_path / "logs" / "a.parquet", frame.with_columns(truncated=cut).to_arrow())
    contract = {name: value for name, value in attributes(None, 3)["logs"].items() if name != "action_prob"}
    storage.write_bytes(tmp_path / "contract.yaml", yaml.safe_dump(contract).encode())
    table = better(world)
    found = assessed(tmp_path, Effort(60, 0), policy=graph(table, tmp_path / "policy.onnx"))
    assert set(found["estimates"]) == {"TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR", "FQE"}
    assert found["behavior"]["color"] == "AMBER" and found["behavior"]["ece"] < 0.05
    assert found["logged"]["estimate"] == pytest.approx(world.value(world.behavior), abs=0.03)
    for name in ("WIS", "WPDIS", "DR", "WDR"):
        assert found["estimates"][name]["estimate"] == pytest.approx(world.value(table), abs=0.06)
    assert list(found["left_out"]) == ["MDR"] and found["difference"]["estimator"] == "WDR"
    broken = {check["name"]: check["sentence"] for check in found["checks"] if not check["holds"]}
    assert "of the episodes were recorded until before their task ended" in broken["recorded to the end"]
    assert found["answer"] == "unsettled"  # however far apart they are: what was cut off is in no bound


def test_propensities_of_someone_else_leave_nothing_to_say(tmp_path: Path) -> None:
    world = chain_world()
    sequential(tmp_path, world, 1000)
    frame = pl.read_parquet(tmp_path / "logs" / "a.parquet")
    frame.with_columns(prob=pl.lit(0.6)).write_parquet(tmp_path / "logs" / "a.parquet")
    found = assessed(tmp_path, policy=graph(better(world), tmp_path / "policy.onnx"))
    assert found["answer"] == "unusable" and "mean importance ratio" in found["sentence"]


def test_without_overlap_nothing_is_settled(tmp_path: Path) -> None:
    """A policy that never does what was done: every weight is 0, which is an answer and no mistake."""
    frame = pl.DataFrame(
        {"x": np.zeros(400), "a": np.zeros(400, int), "p": np.full(400, 0.5), "r": np.arange(400) % 2.0}
    )
    frame.with_columns(pi=pl.lit(0.0)).write_csv(tmp_path / "log.csv")
    given = {"log": [tmp_path / "log.csv"], "horizon": 1, "observation": "x", "action": "a", "actions": "2"}
    given |= {"action_prob": "p", "reward": "r", "reward_range": (0.0, 1.0)}
    found = assess.assess(given["log"], assess.contract_of(given), assess.target_of({"policy_column": "pi"}), FEW_STEPS)
    assert found["answer"] == "unusable" and found["estimates"]["SNIPW"]["estimate"] is None
    assessment.write(found, tmp_path / "page.html", tmp_path / "page.json")
    assert [line for line in assessment.lines(found) if "none" in line]


def test_columns_follow_their_rows_whatever_the_order_of_files_and_rows(tmp_path: Path) -> None:
    world = chain_world()
    table = better(world)
    sequential(tmp_path, world, 500, pi=lambda e: table[e.observation[:, 0].astype(int), e.action])
    straight = assessed(tmp_path, policy_column="pi")
    frame = pl.read_parquet(tmp_path / "logs" / "a.parquet").sample(fraction=1.0, shuffle=True, seed=1)
    frame[:700].write_parquet(tmp_path / "logs" / "b.parquet")
    frame[700:].write_parquet(tmp_path / "logs" / "a.parquet")
    shuffled = assessed(tmp_path, policy_column="pi")
    assert shuffled["estimates"] == straight["estimates"]
    known = table[frame["state"].to_numpy(), frame["action"].to_numpy()]
    assert np.allclose(known, frame["pi"])  # the log is as it was made


def test_a_column_that_says_two_things_of_a_decision_is_refused(tmp_path: Path) -> None:
    world = chain_world()
    table = better(world)
    sequential(tmp_path, world, 200, pi=lambda e: table[e.observation[:, 0].astype(int), e.action])
    path = tmp_path / "logs" / "a.parquet"
    frame, straight = pl.read_parquet(path), assessed(tmp_path, policy_column="pi")
    pl.concat([frame, frame[:5]]).write_parquet(path)
    assert assessed(tmp_path, policy_column="pi")["estimates"] == straight["estimates"]  # written down twice
    pl.concat([frame, frame[:5].with_columns(pi=pl.col("pi") / 2)]).write_parquet(path)
    with pytest.raises(InputError, match="column 'pi' says two things of 5 decisions .* the first in episode 0;"):
        assessed(tmp_path, policy_column="pi")


def test_policies_that_play_what_is_forbidden_are_refused(tmp_path: Path) -> None:
    world = chain_world()
    sequential(tmp_path, world, 200)
    frame = pl.read_parquet(tmp_path / "logs" / "a.parquet")
    taken = frame["action"].to_numpy()[:, None] == np.arange(3)
    frame.with_columns(allowed=pl.Series(taken, dtype=pl.Array(pl.Boolean, 3))).write_parquet(
        tmp_path / "logs" / "a.parquet"
    )
    (tmp_path / "forbidden.py").write_text(
        "def play(o, m):\n    import numpy as np\n    return np.full(m.shape, 1 / 3)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(InputError, match=f"actions that the mask forbids in {len(frame)} of {len(frame)} rows"):
            assessed(tmp_path, policy_callable="forbidden:play")
    finally:
        sys.path.remove(str(tmp_path))


def test_continuous_actions_ask_for_densities(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=2000), rng.normal(size=2000).clip(-5, 5)
    density = np.exp(-0.5 * a**2) / math.sqrt(2 * math.pi)
    moved = np.exp(-0.5 * (a - 0.5) ** 2) / math.sqrt(2 * math.pi)
    reward = 1 / (1 + np.exp(-a))
    frame = pl.DataFrame({"x": x, "a": a, "p": density, "r": reward, "pi": moved})
    frame.write_parquet(tmp_path / "a.parquet")
    contract: dict[str, Any] = {
        "horizon": 1,
        "observation": ["x"],
        "action": {"columns": ["a"], "low": -5, "high": 5},
        "action_prob": {"column": "p", "of": "density"},
        "reward": {"column": "r", "range": [0, 1]},
        "gamma": 1.0,
    }
    paths = [tmp_path / "a.parquet"]
    found = assess.assess(
        paths, log.make_contract(contract, "here"), assess.target_of({"policy_column": "pi"}), FEW_STEPS
    )
    exact = float(np.mean(1 / (1 + np.exp(-(rng.normal(size=1_000_000) + 0.5)))))
    assert covers(found["estimates"]["IPW"], exact) and found["answer"] == "better"
    ways = assess.target_of({"policy_callable": "numpy:zeros"})
    with pytest.raises(InputError, match="continuous; give --policy-column"):
        assess.assess(paths, log.make_contract(contract, "here"), ways, FEW_STEPS)
    del contract["action_prob"]
    found = assess.assess(
        paths, log.make_contract(contract, "here"), assess.target_of({"policy_column": "pi"}), FEW_STEPS
    )
    assert found["behavior"]["color"] == "AMBER" and found["behavior"]["ece"] < 0.05
    assert found["estimates"]["SNIPW"]["estimate"] == pytest.approx(exact, abs=0.03)


def test_a_hundred_thousand_rows_take_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = 120_000
    frame = pl.DataFrame({"x": rng.normal(size=rows), "a": rng.integers(0, 2, rows), "p": np.full(rows, 0.5)})
    frame = frame.with_columns(
        r=(pl.col("a") == 1).cast(pl.Float64), pi=pl.when(pl.col("a") == 1).then(0.8).otherwise(0.2)
    )
    frame.write_parquet(tmp_path / "big.parquet")
    given = {"log": [tmp_path / "big.parquet"], "horizon": 1, "observation": "x", "action": "a", "actions": "2"}
    given |= {"action_prob": "p", "reward": "r", "reward_range": (0.0, 1.0)}
    found = assess.assess(given["log"], assess.contract_of(given), assess.target_of({"policy_column": "pi"}), FEW_STEPS)
    assert found["log"]["rows"] == rows and covers(found["estimates"]["SNIPW"], 0.8)
    weight = (frame["pi"] / frame["p"]).to_numpy()
    expected = float((weight * frame["r"].to_numpy()).mean())
    assert found["estimates"]["IPW"]["estimate"] == pytest.approx(expected, abs=1e-12)


def test_numbers_in_single_precision_are_what_they_stand_for(tmp_path: Path) -> None:
    """A policy that is the one that wrote the log, each probability a third just off; and one that is sure, just above 1."""
    rng, rows = np.random.default_rng(0), 3000
    frame = pl.DataFrame({"x": rng.integers(0, 3, rows), "a": rng.integers(0, 3, rows), "r": rng.random(rows)})
    third = pl.lit(1 / 3).cast(pl.Float32)
    frame = frame.with_columns(p=third, same=pl.concat_list([third] * 3), sure=(pl.col("a") == 0) * (1 + 1.2e-7))
    frame.write_parquet(tmp_path / "log.parquet")
    given = {"log": [tmp_path / "log.parquet"], "horizon": 1, "observation": "x:3", "action": "a", "actions": "3"}
    given |= {"action_prob": "p", "reward": "r", "reward_range": (0.0, 1.0)}
    for column, effective in (("same", rows), ("sure", (frame["a"] == 0).sum())):
        way = assess.target_of({"policy_column": column})
        found = assess.assess(given["log"], assess.contract_of(given), way, FEW_STEPS)
        assert found["answer"] == "unsettled" and found["weights"]["effective_episodes"] == pytest.approx(effective)
        assert ("DR" in found["estimates"]) == (column == "same") and "MDR" not in " ".join(assessment.lines(found))
