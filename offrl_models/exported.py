"""ONNX graphs that act and are evaluated.

Over discrete actions a graph maps raw observations and masks to probabilities. Over continuous ones it maps raw observations,
actions and random numbers to the logarithm of the density of each action and to an action drawn at each number.
"""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import Bool, Float, Float64, Int64
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
)

from offrl_models.densities import ROWS_AT_A_TIME, uniform_numbers
from offrl_models.schema import Episodes, InputError


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
