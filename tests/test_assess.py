"""`offrl evaluate`: estimates cover what is known exactly, every way to give a policy says the same, mistakes get one sentence."""

import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from offrl_models import assess, cli, registry, storage
from offrl_models.assess import answer, log, options, target, values
from offrl_models.assess.units import MOST_UNITS, pooled, units_of
from offrl_models.assess.values import Effort
from offrl_models.choices import Probabilities
from offrl_models.datasets.split import SPLITS, buckets
from offrl_models.logs.contract import Contract
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import Interval, bootstrap
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.worlds import World, bandit
from offrl_models.reports import assessment, evidence
from offrl_models.schema import Episodes, InputError
from tests.conftest import as_table, attributes, chain_world

FEW_STEPS = Effort(20, 0)
COLUMNS = ["--horizon", "1", "--observation", "x0,x1", "--action", "arm", "--actions", "3", "--action-prob", "p"]
COLUMNS += ["--reward", "click", "--reward-range", "0", "1"]


def offrl(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["offrl", "evaluate", *map(str, arguments)])
    return cli.main()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def test_values_come_from_the_other_fold(tmp_path: Path) -> None:
    """Rewards of one fold are shifted: it is the other fold's values that rise."""
    world = chain_world()
    episodes = world.simulate(600, 1)
    table = better(world)
    probs = table[episodes.observation[:, 0].astype(int)]
    choices = Probabilities(episodes, probs)
    known = target.Target({}, choices.taken, choices, None)
    first = values.first_fold(episodes)[episodes.episode_of_row]
    shifted = Episodes(**{**vars_of(episodes), "reward": episodes.reward + first})
    before, after = (values.tabular_values(e, known, known.ratio(e), world.n_states) for e in (episodes, shifted))
    assert before is not None and after is not None
    np.testing.assert_allclose(after.v[first], before.v[first])
    assert (after.v[~first] > before.v[~first] + 0.5).all()
    assert 0.4 < first.mean() < 0.6


def vars_of(episodes: Episodes) -> dict[str, Any]:
    names = ("episode_id", "offsets", "observation", "final_observation", "action", "mask", "reward", "terminated")
    return {name: getattr(episodes, name) for name in (*names, "truncated", "action_prob", "gamma")}


def test_an_entity_is_in_one_fold(tmp_path: Path) -> None:
    episodes = chain_world().simulate(400, 1)
    shared = Episodes(**vars_of(episodes), entity=np.arange(400) // 4)
    fold = values.first_fold(shared).reshape(100, 4)
    assert (fold == fold[:, :1]).all()


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
    assert "the fitted value past that point" in " ".join(found["method"])


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


# A bandit log, given by column options


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, World, np.ndarray]:
    """CSV and JSON lines with the policy's probabilities in columns; the world, and the policy by context."""
    world = bandit(12, 3, 2, seed=3)
    policy = 0.7 * world.optimal() + 0.3 * world.behavior
    logged = world.simulate(4000, seed=2)
    state = world.states(logged.observation)
    folder = tmp_path_factory.mktemp("clicks")
    frame = pl.DataFrame({
        "x0": logged.observation[:, 0], "x1": logged.observation[:, 1], "arm": logged.action, "p": logged.action_prob,
        "click": logged.reward, "pi": policy[state, logged.action],
    })  # fmt: skip
    frame.write_csv(folder / "clicks.csv")
    lists = frame.with_columns(all=pl.Series(policy[state].tolist()))
    lists.write_ndjson(folder / "clicks.jsonl")
    lists.with_columns(patient=pl.int_range(pl.len()) // 40).write_parquet(folder / "clicks.parquet")
    assert world.observed is not None
    storage.write_json(folder / "policy.json", {"seen": world.observed[:12].tolist(), "policy": policy[:12].tolist()})
    return folder, world, policy


def test_a_bandit_log_by_column_options(
    clicks: tuple[Path, World, np.ndarray], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, world, policy = clicks
    code = offrl(monkeypatch, folder / "clicks.csv", *COLUMNS, "--policy-column", "pi", "--json", "found.json")
    assert code == 0
    found = json.loads((here / "found.json").read_text())
    exact = world.value(policy)
    assert set(found["estimates"]) == {"IPW", "SNIPW"}
    assert covers(found["estimates"]["IPW"], exact) and covers(found["estimates"]["SNIPW"], exact)
    frame = pl.read_csv(folder / "clicks.csv")
    pi, p, click = (frame[name].to_numpy() for name in ("pi", "p", "click"))
    weight = pi / p
    assert found["estimates"]["IPW"]["estimate"] == pytest.approx((weight * click).mean(), abs=1e-12)
    assert found["logged"]["estimate"] == pytest.approx(click.mean(), abs=1e-12)
    assert found["weights"]["effective_episodes"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    assert found["difference"]["lower_bound"] < exact - world.value(world.behavior) < found["difference"]["upper_bound"]
    (why,) = found["left_out"].values()
    assert "the probability of the logged action alone" in why
    said = " ".join(capsys.readouterr().out.split())
    assert "BETTER: The policy is better" in said and "not a release" in said and "Left out" in said
    page = (here / "evaluation.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    assert "This is an estimate and not a release." in page
    assert evidence.STATEMENT.split(", ")[1] in page and "gate split" not in page


@pytest.fixture
def functions(clicks: tuple[Path, World, np.ndarray], here: Path) -> str:
    """A module in the current folder with policies, good and bad; its name."""
    name = f"policies_{here.name.replace('-', '_')}"
    (here / f"{name}.py").write_text(
        textwrap.dedent(
            f"""
            import json
            from pathlib import Path

            import numpy as np

            known = json.loads(Path({str(clicks[0] / "policy.json")!r}).read_text())
            table = {{tuple(np.float32(x)): p for x, p in zip(known["seen"], known["policy"])}}
            rng, a_number = np.random.default_rng(0), 3

            def good(observation, mask):
                assert observation.dtype == np.float32 and mask.dtype == bool
                return np.array([table.get(tuple(x), [1 / 3] * 3) for x in observation])

            def wrong_shape(observation, mask):
                return np.ones(len(mask))

            def sums_to_two(observation, mask):
                return 2 * mask / mask.sum(1, keepdims=True)

            def breaks(observation, mask):
                return observation["age"]

            def not_a_number(observation, mask):
                return np.full(mask.shape, np.nan)

            def draws(observation, mask):
                return np.eye(3)[rng.integers(0, 3, len(mask))]
            """
        )
    )
    return name


def test_every_way_to_give_a_policy_says_the_same(
    clicks: tuple[Path, World, np.ndarray], functions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function and a list of all probabilities are fitted alike; a number column agrees where no values are needed."""
    monkeypatch.setattr(options, "QUICK_STEPS", 20)
    ways = {
        "function": ["clicks.parquet", "--policy-callable", f"{functions}:good"],
        "parquet": ["clicks.parquet", "--policy-column", "all"],
        "lists": ["clicks.jsonl", "--policy-column", "all"],
        "numbers": ["clicks.jsonl", "--policy-column", "pi"],
    }
    found: dict[str, Any] = {}
    for name, (file, *policy) in ways.items():
        assert offrl(monkeypatch, clicks[0] / file, *COLUMNS, *policy, "--quick", "--json", "found.json") == 0
        found[name] = json.loads(Path("found.json").read_text())
    exact = clicks[1].value(clicks[2])
    for name in ("function", "lists", "parquet"):
        assert set(found[name]["estimates"]) == {"IPW", "SNIPW", "DR", "SNDR", "FQE"}
        assert covers(found[name]["estimates"]["DR"], exact) and covers(found[name]["estimates"]["SNDR"], exact)
        assert found[name]["difference"]["estimator"] == "DR" and found[name]["answer"] == "better"
        for estimator in ("IPW", "SNIPW"):
            mine, other = found[name]["estimates"][estimator], found["numbers"]["estimates"][estimator]
            assert mine["estimate"] == pytest.approx(other["estimate"], abs=1e-9)
    mine, other = (found[name]["estimates"] for name in ("function", "parquet"))
    for estimator, interval in mine.items():
        assert interval["estimate"] == pytest.approx(other[estimator]["estimate"], abs=1e-5)


def test_a_column_that_is_no_policy_of_the_observation_gets_no_values(
    clicks: tuple[Path, World, np.ndarray], tmp_path: Path
) -> None:
    frame = pl.read_parquet(clicks[0] / "clicks.parquet")
    mixed = frame["all"].to_list()[:1] + [[0.2, 0.3, 0.5]] * (len(frame) - 1)
    frame.with_columns(all=pl.Series(mixed)).write_parquet(tmp_path / "mixed.parquet")
    given = {"log": [tmp_path / "mixed.parquet"], "horizon": 1, "observation": "x0,x1", "action": "arm", "actions": "3"}
    given |= {"action_prob": "p", "reward": "click", "reward_range": (0.0, 1.0)}
    row = frame[0]
    assert len(frame.filter((pl.col("x0") == row["x0"]) & (pl.col("x1") == row["x1"]))) > 1
    found = assess.assess(
        given["log"], assess.contract_of(given), assess.target_of({"policy_column": "all"}), FEW_STEPS
    )
    assert set(found["estimates"]) == {"IPW", "SNIPW"}
    (why,) = found["left_out"].values()
    assert "differs between decisions with one observation" in why


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


# A released bundle


def release(folder: Path, world: World, table: np.ndarray) -> Path:
    """A bundle as `bundle.release` writes it, but for the files that are not read here."""
    made = folder / "released"
    graph(table, made / "policy.onnx")
    storage.write_json(made / "config.json", {"logs": attributes(world.n_states, 3)["logs"], "salt": "offrl"})
    storage.write_json(made / registry.MANIFEST, {"files": storage.list_files(made)})
    return made


def test_a_bundle_brings_its_contract_and_is_held_against_entities_it_never_saw(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = chain_world()
    sequential(here, world, 1500)
    made = release(here, world, better(world))
    assert offrl(monkeypatch, "logs", "--policy", made, "--json", "found.json") == 0
    found = json.loads(Path("found.json").read_text())
    unseen = int(np.isin(buckets(np.arange(1500), "offrl"), SPLITS["gate"]).sum())
    assert found["log"]["episodes"] == unseen and found["log"]["held_out_of"] == 1500
    assert found["policy"]["sha256"] == storage.sha256_file(made / "policy.onnx")
    assert covers(found["estimates"]["MDR"], world.value(better(world)))
    assert offrl(monkeypatch, "logs", "--policy", made, "--all-entities", "--json", "found.json") == 0
    every = json.loads(Path("found.json").read_text())
    assert every["log"]["episodes"] == 1500 and "has not seen these logs" in every["notice"]


def test_a_bundle_that_was_altered_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    world = chain_world()
    sequential(here, world, 600)
    made = release(here, world, better(world))
    graph(world.behavior, made / "policy.onnx")
    assert offrl(monkeypatch, "logs", "--policy", made) == 1
    assert "policy.onnx is not what" in one_sentence(capsys)
    (made / registry.MANIFEST).unlink()
    made = release(here, world, better(world))
    given = log.read([here / "logs"], Contract.model_validate(attributes(99, 3)["logs"]), lambda *_: None)
    with pytest.raises(InputError, match="coded otherwise"):
        target.of_graph(made, given)


# Mistakes


def one_sentence(capsys: pytest.CaptureFixture) -> str:
    """What was said of a mistake."""
    said = capsys.readouterr().err.strip()
    assert said.startswith("offrl: ") and "\n" not in said and "Traceback" not in said
    return said


MISTAKES = {
    "no such file": (["absent.csv", *COLUMNS, "--policy-column", "pi"], "absent.csv does not exist"),
    "no policy": (["clicks.csv", *COLUMNS], "0 policies were given"),
    "two policies": (["clicks.csv", *COLUMNS, "--policy-column", "pi", "--policy", "x"], "2 policies were given"),
    "no contract": (["clicks.csv", "--policy-column", "pi"], "nothing says what the columns mean"),
    "two contracts": (["clicks.csv", "--gamma", "1", "--contract", "c", "--policy", "x"], "--contract and --gamma"),
    "no gamma": (["clicks.csv", *COLUMNS[2:], "--policy-column", "pi"], "--gamma is missing"),
    "no action": (["clicks.csv", *COLUMNS[:4], "--policy-column", "pi"], "--action is missing"),
    "no such contract": (["clicks.csv", "--contract", "c.yaml", "--policy-column", "pi"], "c.yaml cannot be read"),
    "misspelt policy column": (["clicks.csv", *COLUMNS, "--policy-column", "pie"], "column 'pie' is missing (did you"),
    "no such columns": (["clicks.csv", *COLUMNS, "--mask", "m", "--policy-column", "pi"], "column 'm'"),
    "no probability": (["clicks.csv", *COLUMNS, "--policy-column", "x0"], "rows that do not hold a probability"),
    "a category too many": (
        ["clicks.csv", *COLUMNS[:7], "2", *COLUMNS[8:], "--policy-column", "pi"], "holding an action outside 0 to 1 (C13)"),
    "wrong range": (
        ["clicks.csv", *COLUMNS[:-1], "0.5", "--policy-column", "pi"], "outside the reward range [0, 0.5] (C12)"),
    "no propensity": (
        ["clicks.csv", *(c.replace("p", "x0") if c == "p" else c for c in COLUMNS), "--policy-column", "pi"],
        "with a propensity outside (0, 1] (C14)"),
    "no graph": (["clicks.csv", *COLUMNS, "--policy", "clicks.csv"], "cannot be loaded as an ONNX policy"),
    "no such graph": (["clicks.csv", *COLUMNS, "--policy", "absent"], "absent does not exist"),
    "no bundle": (["clicks.csv", *COLUMNS, "--policy", "."], "so it is no released policy"),
    "another graph": (["clicks.csv", *COLUMNS, "--policy", "other.onnx"], "takes 1 observed columns and the log has 2"),
    "no function": (["clicks.csv", *COLUMNS, "--policy-callable", "numpy"], "names no function"),
    "no such module": (["clicks.csv", *COLUMNS, "--policy-callable", "absent:f"], "absent cannot be imported"),
    "no such function": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:absent"], "has no absent"),
    "not callable": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:a_number"], "is a int, not a function"),
    "wrong shape": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:wrong_shape"], "an array of shape [12]"),
    "sums to 2": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:sums_to_two"], "negative or do not add up to 1"),
    "raises": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:breaks"], "raised IndexError"),
    "NaN": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:not_a_number"], "returned NaN or infinity"),
    "draws": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:draws"], "answers the same observation in two ways"),
    "few rows": (["few.csv", *COLUMNS, "--policy-column", "pi"], "it has 60 decisions, and an estimate needs 100 at least"),
    "one name twice": (["clicks.csv", "again/clicks.csv", *COLUMNS, "--policy-column", "pi"], "2 files are called clicks.csv"),
    "empty folder": (["again/empty", *COLUMNS, "--policy-column", "pi"], "does not say its format"),
    "binary": (["clicks.bin", *COLUMNS, "--policy-column", "pi"], "does not say its format"),
    "not that format": (["clicks.csv", *COLUMNS, "--format", "parquet", "--policy-column", "pi"], "cannot be read as Parquet"),
    "rewards that do not vary": (["equal.csv", *COLUMNS, "--policy-column", "pi"], "episodes the same return, 1, so that"),
    "unknown format": (["clicks.csv", *COLUMNS, "--format", "excel", "--policy-column", "pi"], "unknown format 'excel'"),
}  # fmt: skip


@pytest.fixture
def mistaken(clicks: tuple[Path, World, np.ndarray], functions: str, here: Path) -> str:
    """The current folder with everything that a mistake needs; the name of the module with the functions."""
    text = (clicks[0] / "clicks.csv").read_text()
    for name in ("clicks.csv", "clicks.bin", "again/clicks.csv"):
        storage.write_bytes(here / name, text.encode())
    (here / "again" / "empty").mkdir()
    (here / "few.csv").write_text("".join(text.splitlines(keepends=True)[:61]))
    pl.read_csv(here / "clicks.csv").with_columns(click=1.0).write_csv(here / "equal.csv")
    graph(np.full((3, 3), 1 / 3), here / "other.onnx")
    return functions


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(
    mistake: str, mistaken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments, said = MISTAKES[mistake]
    assert offrl(monkeypatch, *(text.replace("MODULE", mistaken) for text in arguments)) == 1
    assert said in one_sentence(capsys)
    assert not Path("evaluation.html").exists()


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


# Parts


def test_pooling_keeps_the_estimate_and_counts_entities_once() -> None:
    """Four copies of every episode under one entity are as much evidence as one."""
    rng = np.random.default_rng(0)
    top, bottom = rng.normal(size=(300, 2)), rng.uniform(0.5, 2, size=(300, 2))
    entity, shares = np.repeat(np.arange(300), 4), bootstrap_shares(300, 200, 0)
    for once in (Terms(top, bottom), Terms(top)):
        copied = Terms(np.repeat(top, 4, 0), None if once.denominator is None else np.repeat(bottom, 4, 0))
        merged = pooled(copied, entity)
        assert merged.estimate() == pytest.approx(once.estimate(), abs=1e-12)
        mine, plain = bootstrap(merged, shares, 0.95), bootstrap(once, shares, 0.95)
        assert (mine.low, mine.high) == pytest.approx((plain.low, plain.high), rel=1e-5)
    uneven = Terms(top)
    assert pooled(uneven, np.arange(300) // 7).estimate() == pytest.approx(top.mean(0).sum(), abs=1e-12)
    assert pooled(uneven, np.arange(300)) is uneven


def test_more_episodes_than_are_resampled_are_pooled_evenly() -> None:
    episodes = bandit(3, 2, 1, 0).simulate(2 * MOST_UNITS + 10, 0)
    count = np.bincount(units_of(episodes, 0))
    assert len(count) == MOST_UNITS and set(count) == {2, 3}


def test_a_check_that_fails_keeps_better_back() -> None:
    gain = answer.Gain("DR", 0.2, 0.1, 0.3, 0.95, 0.01)
    holds = answer.Check("episodes", True, 900, "at least 500", "", False)
    fails = answer.Check("episodes", False, 90, "at least 500", "90 episodes are fewer than 500", False)
    grave = answer.Check("mean ratio", False, 9, "under 4", "the ratio is wrong", True)
    assert answer.answer(gain, [holds])[0] == "better"
    word, said = answer.answer(gain, [holds, fails])
    assert word == "unsettled" and "90 episodes are fewer than 500" in said
    assert answer.answer(gain, [fails, grave])[0] == "unusable"
    down = answer.Gain("DR", -0.2, -0.3, -0.1, 0.95, 0.01)
    assert answer.answer(down, [fails])[0] == "worse"
    rounding = answer.Gain("SNIPW", -3e-15, -4e-15, -2e-15, 0.95, 0.0)
    assert answer.answer(rounding, [holds])[0] == "unsettled"
    nothing = answer.Gain("DR", math.nan, math.nan, math.nan, 0.95, math.nan)
    assert answer.answer(nothing, [holds])[0] == "unsettled"


def failing(episodes: Episodes, ratio: np.ndarray) -> set[str]:
    """The checks of the self-normalised difference that fail."""
    known, returns = target.Target({}, ratio * episodes.action_prob, None, None), Terms(episodes.return_[:, None])
    terms = answer.every_terms(episodes, ratio, None)["SNIPW"]
    gain = answer.gain("SNIPW", terms, returns, units_of(episodes, 0), 0.05)
    said = answer.checks(episodes, known, ratio, None, gain, answer.influence(terms, returns))
    assert all(check.sentence for check in said if not check.holds)
    return {check.name for check in said if not check.holds}


def test_each_check_fails_where_it_should() -> None:
    episodes = bandit(6, 3, 2, 1).simulate(2000, 0)
    ones = np.ones(2000)
    assert failing(episodes, ones) == set()
    assert failing(episodes.take(np.arange(2000) < 400), ones[:400]) == {"episodes"}
    assert failing(episodes, 1.2 * ones) == {"mean ratio"}
    few = np.where(np.arange(2000) % 40 == 0, 40.0, 0.0)  # 50 episodes carry all of the weight, and its mean is 1
    assert "effective episodes" in failing(episodes, few)
    worse = 1.0 - 199 / 1999 - 0.1 * (episodes.reward - episodes.reward.mean())
    one = np.where(np.arange(2000) == int(episodes.reward.argmax()), 200.0, worse)
    assert {"largest share", "influence"} <= failing(episodes, one)


def test_the_direct_method_may_not_contradict_what_is_settled() -> None:
    direct = Interval(0.4, 0.3, 0.5, 0.95, "")
    up, down = answer.Gain("DR", 0.2, 0.1, 0.3, 0.95, 0.0), answer.Gain("DR", -0.2, -0.3, -0.1, 0.95, 0.0)
    open_ = answer.Gain("DR", 0.0, -0.1, 0.1, 0.95, 0.0)
    held = [answer.direct_check(direct, logged, gain).holds for gain in (up, down, open_) for logged in (0.3, 0.5)]
    assert held == [True, False, False, True, True, True]


def test_a_settled_gain_has_to_show_in_the_newer_half() -> None:
    rng, n = np.random.default_rng(0), 2000
    base, unit, order = Terms(rng.normal(size=(n, 1))), np.arange(n), rng.permutation(n)
    for older, newer, holds in ((0.2, 0.2, True), (0.4, 0.0, False), (0.0, 0.4, True), (-0.4, -0.1, True)):
        gained = np.empty(n)
        gained[order[: n // 2]], gained[order[n // 2 :]] = older, newer
        better = Terms(base.numerator + (gained + rng.normal(scale=0.5, size=n))[:, None])
        gain = answer.gain("DR", better, base, unit, 0.05)
        found = answer.newer_check(better, base, unit, order, gain)
        assert found.holds is holds and bool(found.sentence) is not holds, (older, newer)
        mine = (better.numerator - base.numerator)[order[n // 2 :], 0]
        bound = mine.mean() - 1.959964 * mine.std(ddof=1) / np.sqrt(n / 2)
        assert found.value == pytest.approx(bound, abs=1e-6)
        pairs = answer.newer_check(better, base, unit // 2, order, gain)  # two episodes of each entity
        assert pairs.holds is holds and pairs.value != found.value


def test_a_state_that_is_only_ever_reached_is_worth_the_mean_return() -> None:
    """All recordings stop on reaching state 1, in which no decision was logged."""
    n = 400
    rng = np.random.default_rng(0)
    episodes = Episodes(
        episode_id=np.arange(n), offsets=np.arange(n + 1), observation=np.zeros((n, 1), np.float32),
        final_observation=np.ones((n, 1), np.float32), action=rng.integers(0, 2, n), mask=np.ones((n, 2), bool),
        reward=rng.normal(size=n), terminated=np.zeros(n, bool), truncated=np.ones(n, bool), action_prob=np.full(n, 0.5),
        gamma=0.9,
    )  # fmt: skip
    known = target.Target({}, np.full(n, 0.5), Probabilities(episodes, np.full((n, 2), 0.5)), None)
    found = values.tabular_values(episodes, known, np.ones(n), 2)
    assert found is not None
    first = values.first_fold(episodes)
    assert found.next_v[first] == pytest.approx(np.full(first.sum(), episodes.return_[~first].mean()))


def test_weights_that_overflow_are_said_to() -> None:
    world = chain_world()
    episodes = world.simulate(50, 0)
    ratio = np.full(episodes.n_rows, 1e200)
    with np.errstate(over="ignore", invalid="ignore"):
        terms = answer.every_terms(episodes, ratio, None)
        assert answer.tail(episodes, ratio, 0.0)["overflow"] > 0
        unit = units_of(episodes, 0)
        returns = Terms(episodes.return_[:, None])
        found = answer.intervals({"": returns, **terms}, bootstrap_shares(50, 100, 0), unit)
        gain = answer.gain("WPDIS", terms["WPDIS"], returns, unit, 0.05)
    assert math.isnan(found["TIS"].estimate) and math.isnan(gain.estimate)
    assert answer.plain({"TIS": found["TIS"]})["TIS"]["low"] is None
    assert found[""].estimate == pytest.approx(episodes.return_.mean())


def test_columns_as_options_write_them() -> None:
    one = {"age": {}, "ward:12": {"categories": 12}, "sex:f|m|x": {"categories": ["f", "m", "x"]}, "v[3]": {"size": 3}}
    for text, means in one.items():
        name = text.split(":")[0].split("[")[0]
        assert options._column(text) == {"column": name, **means}


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
