"""ONNX graphs that act and are evaluated, and proof that they equal what was trained.

A policy's graph maps raw observations and masks to probabilities; that of a density maps raw observations and actions to the
logarithm of their density and to the distribution function of each dimension.
"""

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import torch
from jaxtyping import Bool, Float, Float64, Int64
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf
from torch import Tensor, nn

from offrl_models import storage
from offrl_models.history import (
    HistoryDensity,
    HistoryMixture,
    inputs_of,
    log_density_given_history,
    probs_given_history,
)
from offrl_models.policies import MixtureDensity, log_density_of, probs_of
from offrl_models.schema import Episodes, InputError
from offrl_models.tensors import write_tensors

PARITY = 1e-6  # largest difference allowed between an exported policy and the one it was exported from


def export_checked(policy: nn.Module, episodes: Episodes, folder: Path) -> "OnnxPolicy":
    """Write `policy.onnx` and `policy.safetensors`, and hold the graph against the module on every observation given.

    Raises RuntimeError when a probability differs by more than PARITY.
    """
    export(policy, episodes.observation.shape[1], episodes.n_actions, folder / "policy.onnx")
    write_tensors(folder / "policy.safetensors", weights(policy))
    exported = OnnxPolicy(folder / "policy.onnx")
    _require_parity(exported.path, exported.on(episodes), probs_of(policy, episodes), "probability")
    return exported


def export_density_checked(density: MixtureDensity, episodes: Episodes, folder: Path) -> "OnnxDensity":
    """`export_checked` for continuous actions: every logged action's density and distribution function are compared.

    Raises RuntimeError when a logarithm of a density differs by more than PARITY of itself or of 1, or a share by more than
    PARITY.
    """
    example = {
        "observation": torch.zeros(2, episodes.observation.shape[1]),
        "action": torch.as_tensor(np.array(episodes.action[:1])).repeat(2, 1),
    }
    _write_graph(density, example, ["log_density", "share_below"], folder / "policy.onnx")
    write_tensors(folder / "policy.safetensors", weights(density))
    exported = OnnxDensity(folder / "policy.onnx")
    _require_density_parity(exported.path, exported.on(episodes), log_density_of(density, episodes))
    return exported


def export_history_checked(
    policy: HistoryMixture | HistoryDensity, episodes: Episodes, folder: Path
) -> "OnnxHistoryPolicy":
    """`export_checked` for a policy that looks back: inputs and outputs are those of its `forward`, compared at every row.

    Raises RuntimeError as `export_checked` and `export_density_checked` do.
    """
    first = next(inputs_of(episodes, policy.context))
    example = {name: torch.as_tensor(part[:1]).repeat(2, *[1] * (part.ndim - 1)) for name, part in first.items()}
    discrete = isinstance(policy, HistoryMixture)
    _write_graph(policy, example, ["probs"] if discrete else ["log_density", "share_below"], folder / "policy.onnx")
    write_tensors(folder / "policy.safetensors", weights(policy))
    exported = OnnxHistoryPolicy(folder / "policy.onnx")
    if isinstance(policy, HistoryMixture):
        _require_parity(exported.path, exported.probs(episodes), probs_given_history(policy, episodes), "probability")
    else:
        _require_density_parity(
            exported.path, exported.log_density(episodes), log_density_given_history(policy, episodes)
        )
    return exported


def _require_density_parity(
    path: Path, found: tuple[np.ndarray, np.ndarray], meant: tuple[np.ndarray, np.ndarray]
) -> None:
    size = np.maximum(np.abs(meant[0]), 1.0)
    _require_parity(path, found[0] / size, meant[0] / size, "logarithm of a density")
    _require_parity(path, found[1], meant[1], "distribution function")


def _require_parity(path: Path, found: np.ndarray, meant: np.ndarray, of: str) -> None:
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
    _write_graph(policy, example, ["probs"], path)


def _write_graph(policy: nn.Module, example: dict[str, Tensor], outputs: list[str], path: Path) -> None:
    """The file depends on the weights alone: traces of source lines are left out."""
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # torch's own, in its exporter
        warnings.filterwarnings("ignore", ".*The axis name: batch will not be used.*", UserWarning)
        program = cast(
            Any,
            torch.onnx.export(
                policy.eval(),
                tuple(example.values()),
                dynamo=True,
                verbose=False,
                input_names=list(example),
                output_names=outputs,
                dynamic_shapes={name: {0: batch} for name in example},
            ),
        )
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.metadata_props[:], model.metadata_props[:]
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
    storage.write_bytes(path, model.SerializeToString(deterministic=True))


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except (OSError, Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        raise InputError(f"{path} cannot be loaded as an ONNX policy ({error}); export it again.") from error


class OnnxPolicy:
    """An exported policy. Rows with the same observation and mask are computed once."""

    def __init__(self, path: Path):
        self.path, self.session = path, _session(path)

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
        inputs = {"observation": observation[first].astype(np.float32), "mask": mask[first]}
        (found,) = self.session.run(["probs"], inputs)
        return np.asarray(found, np.float64), inverse

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
    """An exported density of continuous actions."""

    def __init__(self, path: Path):
        self.path, self.session = path, _session(path)

    def on(self, episodes: Episodes) -> tuple[Float64[np.ndarray, "rows"], Float64[np.ndarray, "rows dimensions"]]:
        """Logarithm of the density of every logged action, and the distribution function of each of its dimensions."""
        inputs = {"observation": episodes.observation.astype(np.float32), "action": episodes.action.astype(np.float32)}
        log_density, share = self.session.run(["log_density", "share_below"], inputs)
        return np.asarray(log_density, np.float64), np.asarray(share, np.float64)


class OnnxHistoryPolicy:
    """An exported policy that looks back, over either kind of actions."""

    def __init__(self, path: Path):
        self.path, self.session = path, _session(path)
        self.context: int = {entry.name: entry.shape for entry in self.session.get_inputs()}["earned"][1]

    def probs(self, episodes: Episodes) -> Float64[np.ndarray, "rows actions"]:
        """Of discrete actions at every logged row, given what came before it in its episode."""
        found = [self.session.run(["probs"], inputs)[0] for inputs in inputs_of(episodes, self.context)]
        return np.concatenate([np.asarray(part, np.float64) for part in found])

    def log_density(
        self, episodes: Episodes
    ) -> tuple[Float64[np.ndarray, "rows"], Float64[np.ndarray, "rows dimensions"]]:
        """Of every logged action, given what came before it in its episode, and the distribution function of its dimensions."""
        outputs = ["log_density", "share_below"]
        found = [self.session.run(outputs, inputs) for inputs in inputs_of(episodes, self.context)]
        log_density, share = (
            np.concatenate([np.asarray(each, np.float64) for each in part]) for part in zip(*found, strict=True)
        )
        return log_density, share
