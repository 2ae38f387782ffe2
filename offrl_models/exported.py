"""ONNX graphs that act and are evaluated, and proof that they equal what was trained.

Over discrete actions a graph maps raw observations and masks to probabilities. Over continuous ones it maps raw observations,
actions and random numbers to the logarithm of the density of each action and to an action drawn at each number.
"""

import contextlib
import io
import logging
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from jaxtyping import Bool, Float, Float64, Int64
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
)
from torch import Tensor, nn

from offrl_models import storage
from offrl_models.densities import ROWS_AT_A_TIME, CappedDensity, MixtureDensity, uniform_numbers
from offrl_models.policies import probs_of
from offrl_models.schema import Episodes, InputError
from offrl_models.tensors import write_tensors

PARITY_ROWS = 4096  # at which a density is held against its module
PARITY = 1e-6  # largest difference allowed between an exported policy and the one it was exported from


def export_checked(policy: nn.Module, episodes: Episodes, folder: Path) -> "Exported":
    """Write `policy.onnx` and `policy.safetensors`, and hold the graph against the module on the observations given.

    Raises RuntimeError when a probability differs by more than PARITY; over continuous actions, when the logarithm of a density or
    a drawn action does.
    """
    if isinstance(policy, MixtureDensity | CappedDensity):
        return export_density_checked(policy, episodes, folder)
    return export_probs_checked(policy, episodes, folder)


def export_probs_checked(policy: nn.Module, episodes: Episodes, folder: Path) -> "OnnxPolicy":
    """`export_checked` of a policy over discrete actions."""
    export(policy, episodes.observation.shape[1], episodes.n_actions, folder / "policy.onnx")
    write_tensors(folder / "policy.safetensors", weights(policy))
    exported = OnnxPolicy(folder / "policy.onnx")
    require_parity(exported.path, exported.on(episodes), probs_of(policy, episodes), "probability")
    return exported


def export_density_checked(density: MixtureDensity | CappedDensity, episodes: Episodes, folder: Path) -> "OnnxDensity":
    """`export_checked` of a policy over continuous actions; differences are relative to what is compared, or to 1."""
    dimensions = episodes.action.shape[1]
    middle = torch.as_tensor(np.asarray(episodes.action[:1], np.float32)).expand(2, 3, dimensions).clone()
    example = {
        "observation": torch.zeros(2, episodes.observation.shape[1]),
        "action": middle,
        "uniform": torch.full((2, 5, density.numbers), 0.5, dtype=torch.float64),
    }
    dynamic = {"observation": (), "action": ("actions",), "uniform": ("draws",)}
    write_graph(density, example, ["log_density", "drawn"], folder / "policy.onnx", dynamic)
    write_tensors(folder / "policy.safetensors", weights(density))
    exported = OnnxDensity(folder / "policy.onnx")
    few = slice(0, PARITY_ROWS)
    observation, action = (np.array(each[few], np.float32) for each in (episodes.observation, episodes.action))
    action = action[:, None]
    uniform = uniform_numbers(len(action), 2, density.numbers, 0)
    with torch.no_grad():
        meant = density(*(torch.as_tensor(each) for each in (observation, action, uniform)))
    for of, one, other in zip(
        ("density", "drawn action"), exported.run(observation, action, uniform), meant, strict=True
    ):
        size = np.maximum(np.abs(other.numpy()), 1.0)
        require_parity(exported.path, one / size, other.numpy() / size, of)
    return exported


def require_parity(path: Path, found: np.ndarray, meant: np.ndarray, of: str) -> None:
    """Raises RuntimeError where a graph and its module are further apart than PARITY."""
    difference = float(np.abs(found - meant).max())
    if not difference <= PARITY:
        raise RuntimeError(f"{path} differs from the trained policy by {difference:.2e} in {of}.")


def weights(policy: nn.Module) -> dict[str, Tensor]:
    """The state of a policy; numbers that single precision holds exactly are stored in it."""
    stored = {}
    for name, tensor in policy.state_dict().items():
        single = tensor.float() if tensor.dtype == torch.float64 else tensor
        stored[name] = (single if torch.equal(single.to(tensor.dtype), tensor) else tensor).clone()
    return stored


def export(policy: nn.Module, columns: int, actions: int, path: Path) -> None:
    """Write a policy as an ONNX graph with inputs `observation` and `mask` and output `probs`."""
    example = {"observation": torch.zeros(2, columns), "mask": torch.ones(2, actions, dtype=torch.bool)}
    write_graph(policy, example, ["probs"], path, {"observation": (), "mask": ()})


def write_graph(
    policy: nn.Module, example: dict[str, Tensor], outputs: list[str], path: Path, dynamic: dict[str, tuple[str, ...]]
) -> None:
    """Write a module as an ONNX graph. The file depends on the weights alone: traces of source lines are left out. `dynamic` are
    the axes of each input, after the batch, whose length is left open."""
    batch = torch.export.Dim("batch")
    shapes = {
        name: {0: batch, **{1 + axis: torch.export.Dim(each) for axis, each in enumerate(axes)}}
        for name, axes in dynamic.items()
    }
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # torch's own, in its exporter
        warnings.filterwarnings("ignore", ".*The axis name: batch will not be used.*", UserWarning)
        program: Any = torch.onnx.export(
            policy.eval(),
            tuple(example.values()),
            dynamo=True,
            verbose=False,
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes=shapes,
        )
    model = program.model_proto  # made anew whenever it is asked for
    graph = model.graph
    for part in [*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.metadata_props[:], model.metadata_props[:]
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
    storage.write_bytes(path, model.SerializeToString(deterministic=True))


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Raises InputError for a file that is no graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except (OSError, Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NotImplemented) as error:
        raise InputError(f"{path} cannot be loaded as an ONNX policy ({error}); export it again.") from error


class OnnxPolicy:
    """An exported policy. Rows with the same observation and mask are computed once."""

    def __init__(self, path: Path):
        self.path, self.session = path, open_session(path)

    def require_interface(self, columns: int, actions: int) -> None:
        """Raises InputError when the policy takes other observations or actions than these."""
        mine = {entry.name: entry.shape[1] for entry in self.session.get_inputs()}
        if mine != {"observation": columns, "mask": actions}:
            raise InputError(
                f"{self.path} takes {mine.get('observation')} observed columns and {mine.get('mask')} actions, and the logs "
                f"have {columns} and {actions}; a candidate cannot be held against it, so start a dataset of its own."
            )

    def distinct_probs(
        self, observation: Float[np.ndarray, "rows columns"], mask: Bool[np.ndarray, "rows actions"]
    ) -> tuple[Float64[np.ndarray, "distinct actions"], Int64[np.ndarray, "rows"]]:
        """Action probabilities of every distinct pair of observation and mask, and which of them each row has."""
        packed = np.concatenate(
            [np.ascontiguousarray(observation, np.float32).view(np.uint8), np.packbits(mask, axis=1)], axis=1
        )
        keys = np.ascontiguousarray(packed).view([("key", np.void, packed.shape[1])]).ravel()
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        probs = np.empty((len(first), mask.shape[1]))
        for block in _blocks(len(first)):
            rows = first[block]
            inputs = {"observation": observation[rows].astype(np.float32), "mask": mask[rows]}
            (found,) = self.session.run(["probs"], inputs)
            _require_shape(self.path, "probs", found, (len(rows), mask.shape[1]))
            probs[block] = np.asarray(found)
        return probs, inverse

    def probs(
        self, observation: Float[np.ndarray, "rows columns"], mask: Bool[np.ndarray, "rows actions"]
    ) -> Float64[np.ndarray, "rows actions"]:
        """Action probabilities of every row."""
        found, inverse = self.distinct_probs(observation, mask)
        return found[inverse]

    def on(self, episodes: Episodes) -> Float64[np.ndarray, "rows actions"]:
        """Probabilities at every logged observation."""
        return self.probs(episodes.observation, episodes.mask)


class OnnxDensity:
    """An exported policy over continuous actions. Asked twice it answers alike: its random numbers are those of seeds."""

    def __init__(self, path: Path):
        self.path, self.session = path, open_session(path)

    @property
    def numbers(self) -> int:
        """Uniform ones that a draw takes."""
        return next(int(entry.shape[-1]) for entry in self.session.get_inputs() if entry.name == "uniform")

    def require_interface(self, columns: int, dimensions: int) -> None:
        """Raises InputError when the policy takes other observations or actions than these."""
        mine = {entry.name: entry.shape[-1] for entry in self.session.get_inputs()}
        if (mine.get("observation"), mine.get("action")) != (columns, dimensions):
            raise InputError(
                f"{self.path} takes {mine.get('observation')} observed columns and actions of {mine.get('action')} dimensions, "
                f"and the logs have {columns} and {dimensions}; a candidate cannot be held against it, so start a dataset of its "
                "own."
            )

    def run(
        self,
        observation: Float[np.ndarray, "rows columns"],
        action: Float[np.ndarray, "rows actions dimensions"],
        uniform: Float64[np.ndarray, "rows draws numbers"],
    ) -> tuple[Float64[np.ndarray, "rows actions"], Float64[np.ndarray, "rows draws dimensions"]]:
        """Logarithm of the density of every action, and what is drawn at every number."""
        given = {
            "observation": observation.astype(np.float32),
            "action": action.astype(np.float32),
            "uniform": uniform,
        }
        log_density, drawn = self.session.run(["log_density", "drawn"], given)
        _require_shape(self.path, "log_density", log_density, action.shape[:2])
        _require_shape(self.path, "drawn", drawn, (*uniform.shape[:2], action.shape[2]))
        return np.asarray(log_density, np.float64), np.asarray(drawn, np.float64)

    def log_density(
        self,
        observation: Float[np.ndarray, "rows columns"],
        action: Float[np.ndarray, "rows actions dimensions"],
        seed: int = 0,
    ) -> Float64[np.ndarray, "rows actions"]:
        """Logarithm of the density of some actions at every observation."""
        return np.concatenate([
            self.run(observation[rows], action[rows], self._uniform(observation[rows], 1, seed))[0]
            for rows in _blocks(len(observation))
        ])  # fmt: skip

    def draws(
        self, observation: Float[np.ndarray, "rows columns"], dimensions: int, count: int, seed: int
    ) -> Float64[np.ndarray, "rows count dimensions"]:
        """So many actions at every observation, evenly spread over what the policy plays there."""
        none = np.zeros((min(len(observation), ROWS_AT_A_TIME), 1, dimensions), np.float32)
        return np.concatenate([
            self.run(observation[rows], none[: rows.stop - rows.start], self._uniform(observation[rows], count, seed))[1]
            for rows in _blocks(len(observation))
        ])  # fmt: skip

    def _uniform(self, observation: np.ndarray, draws: int, seed: int) -> Float64[np.ndarray, "rows draws numbers"]:
        """Other numbers for other observations, so that no two splits share them; the same ones for all policies."""
        seen = zlib.crc32(np.ascontiguousarray(observation, np.float32).tobytes())
        return uniform_numbers(len(observation), draws, self.numbers, [seed, seen])

    def on(self, episodes: Episodes) -> Float64[np.ndarray, "rows"]:
        """Density of every logged action."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_density(episodes.observation, np.asarray(episodes.action)[:, None])[:, 0])


def _require_shape(path: Path, name: str, found: Any, wanted: tuple[int, ...]) -> None:
    """Raises InputError for an output of another shape."""
    if np.shape(found) != wanted:
        raise InputError(
            f"{path} gives {name} of shape {list(np.shape(found))} where {list(wanted)} was asked for; export it again."
        )


def _blocks(rows: int) -> list[slice]:
    return [slice(start, min(start + ROWS_AT_A_TIME, rows)) for start in range(0, rows, ROWS_AT_A_TIME)]


Exported = OnnxPolicy | OnnxDensity


def interface(policy: Exported) -> dict[str, list[str]]:
    """Names of what a graph takes and gives."""
    session = policy.session
    return {
        "inputs": [each.name for each in session.get_inputs()],
        "outputs": [each.name for each in session.get_outputs()],
    }


def open_policy(path: Path) -> Exported:
    """The policy of a graph, over discrete or over continuous actions. Raises InputError for a file that is no graph."""
    density = OnnxDensity(path)
    return density if any(entry.name == "uniform" for entry in density.session.get_inputs()) else OnnxPolicy(path)
