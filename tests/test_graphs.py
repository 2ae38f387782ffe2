"""Graphs that `offrl evaluate` is given over continuous actions: an honest one is taken, a broken one gets one sentence."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper

from offrl_models import cli, storage
from offrl_models.algorithms import ALGORITHMS, make_config
from offrl_models.assess import graphs, log, target
from offrl_models.assess.graphs import both_ways
from offrl_models.assess.log import Assessed
from offrl_models.choices import Draws
from offrl_models.datasets.encoding import Encoder
from offrl_models.densities import CappedDensity, MixtureDensity
from offrl_models.exported import OnnxDensity
from offrl_models.schema import InputError
from tests.conftest import codes
from tests.test_assess_command import one_sentence
from tests.test_models import single_steps

ROWS = 300
CONTRACT: dict[str, Any] = {
    "horizon": 1, "observation": ["x"], "action": {"columns": ["a"], "low": 0, "high": 1},
    "action_prob": {"column": "p", "of": "density"}, "reward": {"column": "r", "range": [0, 1]}, "gamma": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of uniform actions, and its contract."""
    made, rng = tmp_path_factory.mktemp("graphs"), np.random.default_rng(0)
    x, a = rng.random(ROWS).astype(np.float32), rng.random(ROWS)
    pl.DataFrame({"x": x, "a": a, "p": np.ones(ROWS), "r": a}).write_parquet(made / "log.parquet")
    (made / "contract.yaml").write_text(yaml.safe_dump(CONTRACT))
    return made


@pytest.fixture(scope="module")
def given(folder: Path) -> Assessed:
    return log.read([folder / "log.parquet"], log.make_contract(CONTRACT, "here"), lambda *_: None)


# The policy has the density 2a at an action a from 0 to 1, so that it draws the root of a uniform number.
HONEST = {"observation": ["rows", 1], "action": ["rows", "actions", 1], "uniform": ["rows", "draws", 1]}
LOG_DENSITY = [
    ("Mul", ["action", "two"], "density"),
    ("Log", ["density"], "deep"),
    ("Squeeze", ["deep", "last"], "log_density"),
]
DRAWN = [("Sqrt", ["uniform"], "drawn")]


def written(
    path: Path,
    *,
    log_density: Any = LOG_DENSITY,
    drawn: Any = DRAWN,
    number: int = TensorProto.DOUBLE,
    gives: Any = ("log_density", "drawn"),
    **inputs: Any,
) -> Path:
    """The graph, or a broken one, made by hand."""
    kinds = {"uniform": number, "mask": TensorProto.BOOL}
    shapes = {name: shape for name, shape in {**HONEST, **inputs}.items() if shape is not False}
    taken = [
        helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape) for name, shape in shapes.items()
    ]
    given = [
        helper.make_tensor_value_info(name, number if name == "drawn" else TensorProto.FLOAT, None) for name in gives
    ]
    known = {"two": np.float32(2), "none": np.float32(0), "thousand": np.float32(1000), "one": 1.0, "nothing": 0.0, "half": 0.5,
             "last": np.array([-1]), "from": np.array([0]), "to": np.array([1])}  # fmt: skip
    made = helper.make_graph(
        [helper.make_node(kind, of, [to]) for kind, of, to in (*log_density, *drawn)], "policy", taken, given,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in known.items()],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    storage.write_bytes(path, model.SerializeToString())
    return path


def then(*nodes: tuple[str, list[str], str]) -> Any:
    """What is done with `density`, of the shape of the actions, before its last axis goes."""
    return [LOG_DENSITY[0], *nodes, LOG_DENSITY[2]]


NO_FIT = "gives a log_density that is not that of the actions it draws"
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "draws are NaN": ({"drawn": [("Neg", ["uniform"], "less"), ("Sqrt", ["less"], "drawn")]},
                      f"draws actions that are NaN or outside the bounds of the contract in {ROWS} of {ROWS} rows"),
    "draws above the bounds": ({"drawn": [("Add", ["uniform", "one"], "drawn")]}, "outside the bounds of the contract in"),
    "draws below the bounds": ({"drawn": [("Sub", ["uniform", "half"], "drawn")]}, "outside the bounds of the contract in"),
    "density is NaN": ({"log_density": then(("Neg", ["density"], "less"), ("Log", ["less"], "deep"))},
                       f"gives a density that is NaN or infinite in {ROWS} of {ROWS} rows"),
    "density is infinite": (
        {"log_density": then(("Mul", ["density", "none"], "0"), ("Log", ["0"], "-inf"), ("Neg", ["-inf"], "deep"))},
        f"gives a density that is NaN or infinite in {ROWS} of {ROWS} rows"),
    "density overflows": ({"log_density": then(("Mul", ["density", "thousand"], "deep"))}, "a density that is NaN or infinite in"),
    "density without its logarithm": ({"log_density": then(("Identity", ["density"], "deep"))}, NO_FIT),
    "density adds up to 2": ({"log_density": then(("Mul", ["density", "two"], "d"), ("Log", ["d"], "deep"))}, NO_FIT),
    "density is uniform and draws are not": ({"log_density": then(("Mul", ["density", "none"], "deep"))}, NO_FIT),
    "draws are uniform and density is not": ({"drawn": [("Identity", ["uniform"], "drawn")]}, NO_FIT),
    "draws are all the same": (
        {"drawn": [("Mul", ["uniform", "nothing"], "0s"), ("Add", ["0s", "half"], "drawn")]}, NO_FIT),
    "how many numbers is open": ({"uniform": ["rows", "draws", "numbers"]}, "leaves open how many numbers `uniform` holds"),
    "how many numbers has no name": ({"uniform": ["rows", "draws", None]}, "leaves open how many numbers `uniform` holds"),
    "numbers in single precision": ({"number": TensorProto.FLOAT, "drawn": [("Sqrt", ["uniform"], "drawn")]},
                                    "takes uniform as a tensor(float); export it to take a tensor(double)"),
    "one row at a time": ({"observation": [1, 1]}, "takes observation of shape [1, 1]; export it to take [rows, columns], all but"),
    "two draws at a time": ({"uniform": ["rows", 2, 1]}, "takes uniform of shape [rows, 2, 1]; export it to take [rows, draws,"),
    "one action a row": ({"action": [None, 1]}, "takes action of shape [?, 1]; export it to take [rows, actions, dimensions]"),
    "an input without a shape": ({"action": None}, "takes action of shape []; export it to take [rows, actions, dimensions]"),
    "other columns": ({"observation": ["rows", 2]}, "takes 2 observed columns and the log has 1"),
    "other dimensions": ({"action": ["rows", "actions", 2], "log_density": [
        ("ReduceSum", ["action", "last"], "deep"), ("Squeeze", ["deep", "last"], "log_density")]},
        "takes 2 dimensions of the action and the log has 1"),
    "densities with an axis too many": ({"log_density": [*LOG_DENSITY[:1], ("Log", ["density"], "log_density")]},
                                        f"gives log_density of shape [{ROWS}, 1, 1] where [{ROWS}, 1] was asked for"),
    "draws without their last axis": ({"drawn": [("Sqrt", ["uniform"], "root"), ("Squeeze", ["root", "last"], "drawn")]},
                                      f"gives drawn of shape [{ROWS}, 16] where [{ROWS}, 16, 1] was asked for"),
    "one draw for all numbers": (
        {"drawn": [("Sqrt", ["uniform"], "root"), ("Slice", ["root", "from", "to", "to"], "drawn")]},
        f"gives drawn of shape [{ROWS}, 1, 1] where [{ROWS}, 16, 1] was asked for"),
    "as many dimensions as numbers": ({"uniform": ["rows", "draws", 2]}, f"gives drawn of shape [{ROWS}, 16, 2] where"),
    "a step that cannot be run": ({"drawn": [("Asinh", ["uniform"], "drawn")]}, "cannot be loaded as an ONNX policy"),
    "nothing is drawn": ({"gives": ["log_density"]},
                         "outputs log_density; a policy over continuous actions has action and observation and uniform, and gives"),
    "an input too many": ({"mask": ["rows", 1]}, "has inputs observation, action, uniform, mask and outputs log_density, drawn;"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_graph_gets_one_sentence(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    how, said = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    asked = [
        folder / "log.parquet",
        "--contract",
        folder / "contract.yaml",
        "--policy",
        written(Path("policy.onnx"), **how),
    ]
    monkeypatch.setattr(sys, "argv", ["offrl", "evaluate", *map(str, asked)])
    assert cli.main() == 1
    sentence = one_sentence(capsys)
    assert sentence.startswith("offrl: policy.onnx ") and said in sentence and sentence.endswith(".")
    assert not Path("evaluation.html").exists()


def test_an_honest_graph_is_taken(given: Assessed, tmp_path: Path) -> None:
    found = target.of_graph(written(tmp_path / "policy.onnx"), given)
    assert found.taken == pytest.approx(2.0 * np.asarray(given.episodes.action)[:, 0], rel=1e-5)
    assert isinstance(found.choices, Draws) and found.choices.drawn.mean() == pytest.approx(2 / 3, abs=0.01)
    for by_draws, by_density, error in both_ways(found.choices):
        assert abs(by_draws - by_density) < 3 * error < 0.05


def discrete(path: Path, *nodes: Any, mask: Any = (TensorProto.BOOL, ["rows", 3])) -> Path:
    """A policy that plays all of three actions alike, or a broken one."""
    shapes = {"observation": (TensorProto.FLOAT, ["rows", 1]), "mask": mask}
    taken = [helper.make_tensor_value_info(name, *shape) for name, shape in shapes.items()]
    steps = [
        helper.make_node("Cast", ["mask"], ["all"], to=TensorProto.FLOAT),
        *(helper.make_node(*node) for node in nodes),
    ]
    gives = [helper.make_tensor_value_info("probs", TensorProto.FLOAT, None)]
    known = [numpy_helper.from_array(np.asarray(3, np.float32), "three"), numpy_helper.from_array(np.array([1]), "one")]
    model = helper.make_model(
        helper.make_graph(steps, "policy", taken, gives, known), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 8
    storage.write_bytes(path, model.SerializeToString())
    return path


EVEN = ("Div", ["all", "three"], ["probs"])


def test_a_graph_over_discrete_actions_is_held_to_the_same(given: Assessed, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "policy.onnx"
    with pytest.raises(
        InputError, match="has inputs observation, mask and outputs probs; a policy over continuous actions"
    ):
        target.of_graph(discrete(path, EVEN), given)
    table = {"x": rng.random(ROWS).astype(np.float32), "a": rng.integers(0, 3, ROWS), "p": np.full(ROWS, 1 / 3)}
    pl.DataFrame({**table, "r": rng.random(ROWS)}).write_parquet(tmp_path / "log.parquet")
    contract = log.make_contract({**CONTRACT, "action": {"column": "a", "values": 3}, "action_prob": "p"}, "here")
    logged = log.read([tmp_path / "log.parquet"], contract, lambda *_: None)
    with pytest.raises(InputError, match="a policy over discrete actions has mask and observation, and gives probs"):
        target.of_graph(written(path), logged)
    assert target.of_graph(discrete(path, EVEN), logged).taken == pytest.approx(np.full(ROWS, 1 / 3))
    for nodes, mask, said in (
        (
            [EVEN],
            (TensorProto.FLOAT, ["rows", 3]),
            r"takes mask as a tensor\(float\); export it to take a tensor\(bool\)",
        ),
        (
            [EVEN],
            (TensorProto.BOOL, [1, 3]),
            r"takes mask of shape \[1, 3\]; export it to take \[rows, actions\], all but",
        ),
        ([EVEN], (TensorProto.BOOL, ["rows", 4]), "takes 4 actions and the log has 3"),
        (
            [("ReduceMean", ["all", "one"], ["probs"])],
            (TensorProto.BOOL, ["rows", 3]),
            r"probs of shape \[300, 1\] where",
        ),
    ):
        with pytest.raises(InputError, match=said):
            target.of_graph(discrete(path, *nodes, mask=mask), logged)


class Asked(OnnxDensity):
    """A module where a graph is expected. Its density may be given as a multiple of what it is."""

    def __init__(self, density: MixtureDensity | CappedDensity, factor: float = 1.0):
        self.path, self.density, self.factor = Path("module"), density, factor

    @property
    def numbers(self) -> int:
        return self.density.numbers

    def run(self, observation: np.ndarray, action: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            log_density, drawn = self.density(*(torch.as_tensor(each) for each in (observation, action, uniform)))
        return log_density.numpy() + np.log(self.factor), drawn.numpy()


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_no_honest_density_is_refused_and_one_that_is_off_by_a_half_is(
    dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However peaked it is, whichever its bounds are, and also where part of it is estimated by the graph itself."""
    rng, rows = np.random.default_rng(dimensions), 400
    low, width = rng.normal(size=dimensions), 10.0 ** rng.uniform(-1, 1, dimensions)
    seen, action = rng.normal(size=(rows, 2)).astype(np.float32), low + width * rng.random((rows, dimensions))
    bounds = np.stack([low, low + width], 1)
    episodes = single_steps(seen, action.astype(np.float32), seen, features=tuple(codes(None, None)), bounds=bounds)

    def density(peak: float) -> MixtureDensity:
        config = make_config("bc", {"hidden": (8,)}, "continuous")
        algorithm = ALGORITHMS["bc"][1](config, Encoder.fit(episodes), bounds, [0, 1])
        with torch.no_grad():
            for each in algorithm.parameters():
                each.mul_(peak)
        return MixtureDensity(algorithm, 2, dimensions)

    for policy in (density(1.0), density(5.0), CappedDensity(density(5.0), density(1.0), 3.0)):
        graphs.require_density(Draws(episodes, Asked(policy)))
    with pytest.raises(InputError, match=NO_FIT):
        graphs.require_density(Draws(episodes, Asked(density(1.0), 1.5)))


class Spike(OnnxDensity):
    """All of its mass but a share lies in a millionth of the range, and the share is spread evenly; no draw shows it."""

    def __init__(self, share: float):
        self.path, self.share = Path("spike"), share

    def log_density(self, observation: np.ndarray, action: np.ndarray, seed: int = 0) -> np.ndarray:
        inside = (action[..., 0] >= 0.5) & (action[..., 0] <= 0.5 + 1e-6)
        with np.errstate(divide="ignore"):
            return np.log(self.share + (1.0 - self.share) * 1e6 * inside)

    def draws(self, observation: np.ndarray, dimensions: int, count: int, seed: int) -> np.ndarray:
        return np.full((len(observation), count, dimensions), 0.5)


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.02])
def test_what_one_side_never_sees_is_not_taken_for_certain(share: float, given: Assessed) -> None:
    """Of 4,800 draws a share of 1e-4 is not missed; one of 2% is."""
    choices = Draws(given.episodes, Spike(share))
    by_draws, by_density, error = both_ways(choices)[0]
    assert by_draws < 2e-6 and by_density == pytest.approx(share, rel=0.03)
    assert (abs(by_draws - by_density) > 6 * error) == (share == 0.02)
