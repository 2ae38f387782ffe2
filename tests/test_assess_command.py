"""`offrl evaluate` as it is typed: every way to give a policy says the same, and a mistake gets one sentence."""

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from offrl_models import assess, cli, registry, storage
from offrl_models.assess import log, options, target
from offrl_models.datasets.split import SPLITS, buckets
from offrl_models.logs.contract import Contract
from offrl_models.ope.worlds import World, bandit
from offrl_models.reports import assessment, evidence
from offrl_models.schema import InputError
from tests.conftest import attributes, chain_world
from tests.test_assess import FEW_STEPS, better, covers, graph, sequential

COLUMNS = ["--horizon", "1", "--observation", "x0,x1", "--action", "arm", "--actions", "3", "--action-prob", "p"]
COLUMNS += ["--reward", "click", "--reward-range", "0", "1"]


def offrl(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["offrl", "evaluate", *map(str, arguments)])
    return cli.main()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    assert found["doubted"] == [] and page.count('pale">') == 0
    assessment.write({**found, "doubted": ["IPW"]}, here / "doubted.html", None)
    assert (here / "doubted.html").read_text().count('pale">') == 1
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

            def by_place(observation, mask):
                return np.eye(3)[np.arange(len(mask)) % 3]
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


# A released bundle


def release(folder: Path, world: World, table: np.ndarray, **logs: Any) -> Path:
    """A bundle as `bundle.release` writes it, but for the files that are not read here."""
    made = folder / "released"
    graph(table, made / "policy.onnx")
    storage.write_json(made / "config.json", {"logs": attributes(world.n_states, 3)["logs"] | logs, "salt": "offrl"})
    storage.write_json(made / registry.MANIFEST, {"files": storage.list_files(made)})
    return made


def test_a_bundle_brings_its_contract_and_is_held_against_entities_it_never_saw(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
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
    (made / registry.MANIFEST).unlink()
    release(here, world, better(world), entity="patient")
    storage.write_json(Path("contract.yaml"), attributes(world.n_states, 3)["logs"])
    assert offrl(monkeypatch, "logs", "--policy", made, "--contract", "contract.yaml") == 1
    assert "kept from some entities by column 'patient'" in one_sentence(capsys)


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
    with pytest.raises(InputError, match="coded or ordered otherwise"):
        target.of_graph(made, given)


# Mistakes


def one_sentence(capsys: pytest.CaptureFixture) -> str:
    """What was said of a mistake."""
    said = capsys.readouterr().err.strip()
    assert said.startswith("offrl: ") and "\n" not in said and "Traceback" not in said
    return said


MISTAKES = {
    "a seed below 0": (["clicks.csv", *COLUMNS, "--policy-column", "pi", "--seed", "-1"], "--seed -1: a seed is 0 or more"),
    "no folder for the page": (
        ["clicks.csv", *COLUMNS, "--policy-column", "pi", "--html", "no/x.html"], "--html no/x.html: no file can be written"),
    "a folder for the numbers": (["clicks.csv", *COLUMNS, "--policy-column", "pi", "--json", "."], "--json .: no file can be"),
    "no such file": (["absent.csv", *COLUMNS, "--policy-column", "pi"], "absent.csv does not exist"),
    "no policy": (["clicks.csv", *COLUMNS], "0 policies were given"),
    "two policies": (["clicks.csv", *COLUMNS, "--policy-column", "pi", "--policy", "x"], "2 policies were given"),
    "no contract": (["clicks.csv", "--policy-column", "pi"], "nothing says what the columns mean"),
    "no such version, no contract": (["clicks.csv", "--policy", "policies/9"], "policies/9 does not exist"),
    "no bundle, no contract": (["clicks.csv", "--policy", "."], "so it is no released policy"),
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
        ["clicks.csv", *("click" if c == "p" else c for c in COLUMNS), "--policy-column", "pi"],
        "with a propensity outside (0, 1] (C14)"),
    "no graph": (["clicks.csv", *COLUMNS, "--policy", "clicks.csv"], "cannot be loaded as an ONNX policy"),
    "no such graph": (["clicks.csv", *COLUMNS, "--policy", "absent"], "absent does not exist"),
    "no bundle": (["clicks.csv", *COLUMNS, "--policy", "."], "so it is no released policy"),
    "another graph": (["clicks.csv", *COLUMNS, "--policy", "other.onnx"], "takes 1 observed columns and the log has 2"),
    "no function": (["clicks.csv", *COLUMNS, "--policy-callable", "numpy"], "names no function"),
    "no such module": (["clicks.csv", *COLUMNS, "--policy-callable", "absent:f"], "absent cannot be imported"),
    "a module that breaks": (
        ["clicks.csv", *COLUMNS, "--policy-callable", "outdated:f"], "outdated cannot be imported (AttributeError: `np.float_`"),
    "no such function": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:absent"], "has no absent"),
    "not callable": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:a_number"], "is a int, not a function"),
    "wrong shape": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:wrong_shape"], "an array of shape [12]"),
    "sums to 2": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:sums_to_two"], "negative or do not add up to 1"),
    "raises": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:breaks"], "raised IndexError"),
    "NaN": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:not_a_number"], "returned NaN or infinity"),
    "company": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:by_place"], "answers the same observation in two ways"),
    "draws": (["clicks.csv", *COLUMNS, "--policy-callable", "MODULE:draws"], "answers the same observation in two ways"),
    "few rows": (["few.csv", *COLUMNS, "--policy-column", "pi"], "it has 60 decisions, and an estimate needs 100 at least"),
    "one name twice": (["clicks.csv", "again/clicks.csv", *COLUMNS, "--policy-column", "pi"], "2 files are called clicks.csv"),
    "one log twice": (["clicks.csv", "again/copy.csv", *COLUMNS, "--policy-column", "pi"], "copy.csv is a copy of clicks.csv"),
    "the log for the numbers": (
        ["clicks.csv", *COLUMNS, "--policy-column", "pi", "--json", "clicks.csv"], "--json clicks.csv: clicks.csv is the log"),
    "the page among the logs": (
        ["again", *COLUMNS, "--policy-column", "pi", "--html", "again/x.html"], "--html again/x.html: again is the log"),
    "one file for both": (
        ["clicks.csv", *COLUMNS, "--policy-column", "pi", "--html", "x", "--json", "x"], "--html and --json are both x"),
    "a device for the page": (
        ["clicks.csv", *COLUMNS, "--policy-column", "pi", "--html", "fifo"], "--html fifo: no file can be written there"),
    "a range below 0": (
        ["clicks.csv", *COLUMNS[:-2], "-1e9", "-1e-3", "--policy-column", "pi"], "outside the reward range [-1e+09, -0.001]"),
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
    for name in ("clicks.csv", "clicks.bin", "again/copy.csv"):
        storage.write_bytes(here / name, text.encode())
    storage.write_bytes(here / "again/clicks.csv", text.replace("\n0", "\n-0", 1).encode())
    os.mkfifo(here / "fifo")
    storage.write_bytes(here / "outdated.py", b"import numpy\n\nnumpy.float_\n")
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
