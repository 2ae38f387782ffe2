"""Policies become ONNX graphs, each held against the module it was exported from: see `exported` for what they take and give."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from offrl_models import storage
from offrl_models.densities import CappedDensity, MixtureDensity, uniform_numbers
from offrl_models.exported import Exported, OnnxDensity, OnnxPolicy
from offrl_models.policies import CappedPolicy, probs_of
from offrl_models.schema import Episodes
from offrl_models.tensors import write_tensors

PARITY_ROWS = 4096  # at which a density is held against its module
UNLIKE_ANY = 0.6180339887498949  # the level of a rung while it is traced: numbers that are alike would become one
PARITY = 1e-6  # largest difference allowed between an exported policy and the one it was exported from


def export_checked(policy: nn.Module, episodes: Episodes, folder: Path) -> Exported:
    """Write `policy.onnx` and `policy.safetensors`, and hold the graph against the module on the observations given.

    Raises RuntimeError when a probability differs by more than PARITY; over continuous actions, when the logarithm of a density or
    a drawn action does, relative to its size or to 1.
    """
    return _written(graph_of(policy, episodes), policy, episodes, folder)


def export_ladder_checked(
    rung: CappedPolicy | CappedDensity, caps: Mapping[Path, float], episodes: Episodes
) -> dict[Path, Exported]:
    """`export_checked` of a capped policy at several caps, each in a folder of its own. They are one graph with another number in
    it, and tracing it, which takes most of the time, is done once."""
    rung.level.fill_(UNLIKE_ANY)
    model, exported = graph_of(rung, episodes), {}
    (level,) = (each for each in model.graph.initializer if each.name == "level")
    for folder, cap in caps.items():
        rung.set_cap(cap)
        level.CopyFrom(numpy_helper.from_array(rung.level.numpy(), "level"))
        exported[folder] = _written(model, rung, episodes, folder)
    return exported


def write_policy(model: ModelProto, policy: nn.Module, folder: Path) -> Path:
    """Write the graph of a policy and its weights: `policy.onnx`, whose path is given back, and `policy.safetensors`."""
    path = folder / "policy.onnx"
    storage.write_bytes(path, model.SerializeToString(deterministic=True))
    write_tensors(folder / "policy.safetensors", weights(policy))
    return path


def _written(model: ModelProto, policy: nn.Module, episodes: Episodes, folder: Path) -> Exported:
    path = write_policy(model, policy, folder)
    if isinstance(policy, MixtureDensity | CappedDensity):
        return _checked_density(path, policy, episodes)
    exported = OnnxPolicy(path)
    require_parity(path, exported.on(episodes), probs_of(policy, episodes), "probability")
    return exported


def _checked_density(path: Path, density: MixtureDensity | CappedDensity, episodes: Episodes) -> OnnxDensity:
    exported, few = OnnxDensity(path), slice(0, PARITY_ROWS)
    observation, action = (np.array(each[few], np.float32) for each in (episodes.observation, episodes.action))
    action = action[:, None]
    uniform = uniform_numbers(len(action), 2, density.numbers, 0)
    with torch.no_grad():
        meant = density(*(torch.as_tensor(each) for each in (observation, action, uniform)))
    for of, one, other in zip(
        ("density", "drawn action"), exported.run(observation, action, uniform), meant, strict=True
    ):
        size = np.maximum(np.abs(other.numpy()), 1.0)
        require_parity(path, one / size, other.numpy() / size, of)
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


def graph_of(policy: nn.Module, episodes: Episodes) -> ModelProto:
    """A policy as an ONNX graph with inputs `observation` and `mask` and output `probs`; over continuous actions with inputs
    `observation`, `action` and `uniform` and outputs `log_density` and `drawn`."""
    example = {"observation": torch.zeros(2, episodes.observation.shape[1])}
    if not isinstance(policy, MixtureDensity | CappedDensity):
        example["mask"] = torch.ones(2, episodes.n_actions, dtype=torch.bool)
        return traced(policy, example, ["probs"], dict.fromkeys(example, ()))
    middle = torch.as_tensor(np.asarray(episodes.action[:1], np.float32))
    example["action"] = middle.expand(2, 3, middle.shape[1]).clone()
    example["uniform"] = torch.full((2, 5, policy.numbers), 0.5, dtype=torch.float64)
    dynamic = {"observation": (), "action": ("actions",), "uniform": ("draws",)}
    return traced(policy, example, ["log_density", "drawn"], dynamic)


def traced(
    policy: nn.Module, example: dict[str, Tensor], outputs: list[str], dynamic: dict[str, tuple[str, ...]]
) -> ModelProto:
    """A module as an ONNX graph. It depends on the weights alone: traces of source lines are left out. `dynamic` are the axes of
    each input, after the batch, whose length is left open."""
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
    return model
