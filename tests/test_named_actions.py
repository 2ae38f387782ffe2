"""Where actions have names, a policy says which of its numbers is which: in another order it would be another policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import polars as pl
import pytest

from offrl_models.assess import log, options
from offrl_models.assess.column import of_column
from offrl_models.assess.log import Assessed
from offrl_models.assess.target import Target, of_function, of_graph
from offrl_models.schema import InputError
from tests.test_assess import graph

NAMES = ["wait", "drug", "operate"]
PROBS = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])  # by state, in the order of NAMES
OTHER = [2, 0, 1]  # an order in which another program has them


def read(folder: Path, actions: str, frame: pl.DataFrame, name: str) -> Assessed:
    path = folder / name
    frame.write_parquet(path) if path.suffix == ".parquet" else frame.write_ndjson(path)
    contract = options.contract_of({
        "log": [path], "horizon": 1, "observation": "ward:2", "action": "chosen", "actions": actions, "action_prob": "p",
        "reward": "alive", "reward_range": [0, 1],
    })  # fmt: skip
    return log.read([path], contract, lambda *_: None)


def decisions(named: bool) -> pl.DataFrame:
    """300 of them, each with the policy's probabilities in a struct of another order, and in a list."""
    rng = np.random.default_rng(0)
    ward, chosen, alive = rng.integers(0, 2, 300), rng.integers(0, 3, 300), rng.integers(0, 2, 300)
    by_name = [{NAMES[place]: float(PROBS[state, place]) for place in OTHER} for state in ward]
    label = [NAMES[code] for code in chosen] if named else chosen
    return pl.DataFrame({
        "ward": ward, "chosen": label, "p": np.full(300, 1 / 3), "alive": alive, "by_name": by_name,
        "listed": PROBS[ward][:, OTHER].tolist(), "without_one": [{NAMES[0]: 1.0, "drugs": 0.0, NAMES[2]: 0.0}] * 300,
    })  # fmt: skip


@pytest.fixture
def given(tmp_path: Path) -> Assessed:
    return read(tmp_path, ",".join(NAMES), decisions(True), "log.parquet")


@pytest.fixture
def coded(tmp_path: Path) -> Assessed:
    return read(tmp_path, "3", decisions(False), "coded.parquet")


def expected(given: Assessed) -> np.ndarray:
    return PROBS[given.episodes.observation[:, 0].astype(int)]


def found(target: Target) -> np.ndarray:
    assert target.probs is not None
    return target.probs


FUNCTIONS: dict[str, Callable[[np.ndarray], Any]] = {
    "pandas": lambda probs: pd.DataFrame(probs[:, OTHER], columns=[NAMES[place] for place in OTHER]),
    "polars": lambda probs: pl.DataFrame(probs[:, OTHER], schema=[NAMES[place] for place in OTHER]),
    "bare": lambda probs: probs,
    "others": lambda probs: pd.DataFrame(probs, columns=["wait", "drugs", "operate"]),
    "more": lambda probs: pd.DataFrame(np.hstack([probs, 0 * probs[:, :1]]), columns=[*NAMES, "leave"]),
    "codes": lambda probs: pd.DataFrame(probs[:, OTHER], columns=OTHER),
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder that answers as FUNCTIONS do."""
    monkeypatch.chdir(tmp_path)
    name = f"named_{tmp_path.name.replace('-', '_')}"
    lines = ["from tests.test_named_actions import FUNCTIONS, PROBS", ""]
    for way in FUNCTIONS:
        lines += [
            f"def {way}(observation, mask):",
            f"    return FUNCTIONS[{way!r}](PROBS[observation[:, 0].astype(int)])",
        ]
    Path(f"{name}.py").write_text("\n".join(lines))
    return name


@pytest.mark.parametrize("way", ["pandas", "polars"])
def test_a_data_frame_is_taken_by_the_names_of_its_columns(given: Assessed, module: str, way: str) -> None:
    np.testing.assert_array_equal(found(of_function(f"{module}:{way}", given)), expected(given))


def test_codes_need_no_names_and_may_have_them(coded: Assessed, module: str) -> None:
    for way in ("bare", "codes"):
        np.testing.assert_array_equal(found(of_function(f"{module}:{way}", coded)), expected(coded))


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (
            "bare",
            "does not say which number is which action; return a DataFrame with columns 'wait', 'drug', 'operate'",
        ),
        ("others", "names 3 actions, 'wait', 'drugs', 'operate', and the log has 3, 'wait', 'drug', 'operate'"),
        ("more", "names 4 actions"),
        ("codes", "names 3 actions, '2', '0', '1'"),
    ],
)
def test_a_function_that_does_not_name_the_actions_is_refused(
    given: Assessed, module: str, way: str, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        of_function(f"{module}:{way}", given)


@pytest.mark.parametrize("name", ["log.parquet", "log.jsonl"])
def test_a_struct_is_taken_by_the_names_of_its_fields(tmp_path: Path, name: str) -> None:
    given = read(tmp_path, ",".join(NAMES), decisions(True), name)
    np.testing.assert_array_equal(found(of_column("by_name", given)), expected(given))
    with pytest.raises(InputError, match="column 'listed' does not say which number is which action; write a struct"):
        of_column("listed", given)
    with pytest.raises(
        InputError, match="'drugs'" if name == "log.parquet" else "300 rows that do not hold a list of 3"
    ):
        of_column("without_one", given)


def test_lists_do_for_codes(coded: Assessed) -> None:
    np.testing.assert_array_equal(found(of_column("listed", coded)), expected(coded)[:, OTHER])


def with_metadata(path: Path, actions: str | None) -> Path:
    graph(PROBS, path)
    if actions is not None:
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {"actions": actions})
        onnx.save(model, path)
    return path


def test_a_graph_says_the_order_in_its_metadata(given: Assessed, coded: Assessed, tmp_path: Path) -> None:
    named = with_metadata(tmp_path / "policy.onnx", '["wait", "drug", "operate"]')
    np.testing.assert_array_equal(found(of_graph(named, given)), expected(given))
    bare = with_metadata(tmp_path / "bare.onnx", None)
    np.testing.assert_array_equal(found(of_graph(bare, coded)), expected(coded))
    for actions, said in (
        (None, "does not say which number is which action; export it with metadata `actions`"),
        ('["wait", "operate", "drug"]', "has the actions in the order .*; name them in that one"),
        ('["wait", "operate"]', "names 2 actions"),
        ("wait, drug, operate", "no list of names in JSON"),
    ):
        with pytest.raises(InputError, match=said):
            of_graph(with_metadata(tmp_path / "policy.onnx", actions), given)
