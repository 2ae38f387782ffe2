"""Policies as distributions over actions, and the ONNX graphs that act and are evaluated.

Every graph maps raw observations [batch, columns] and masks [batch, actions] to probabilities [batch, actions]: the encoder,
the mask and, for a capped policy, the behavior model and the projection are inside it.
"""

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import onnxruntime
import torch
from jaxtyping import Bool, Float, Float64, Int64
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf
from torch import Tensor, nn

from offrl_models import storage
from offrl_models.schema import Episodes, InputError
from offrl_models.tensors import write_tensors

BEHAVIOR_SHARE = 1e-6  # of the behavior policy in a capped policy, so that the cap can always be met


class HasLogProbs(Protocol):
    def log_probs(self, observation: Tensor, mask: Tensor) -> Tensor: ...


class Mixture(nn.Module):
    """The policy of several seeds: each step acts as one of them, drawn at random; pi = mean of the seeds' pi."""

    def __init__(self, algorithm: nn.Module, seeds: int):
        super().__init__()
        # Double precision: a softmax at a low temperature would turn rounding of single into different actions.
        self.algorithm, self.seeds = algorithm.double(), seeds

    def per_seed(self, observation: Tensor, mask: Tensor) -> Float[Tensor, "seed batch actions"]:
        log_probs = cast(HasLogProbs, self.algorithm).log_probs(
            observation.double().expand(self.seeds, -1, -1), mask.expand(self.seeds, -1, -1)
        )
        return log_probs.softmax(-1)

    def forward(
        self, observation: Float[Tensor, "batch columns"], mask: Bool[Tensor, "batch actions"]
    ) -> Float[Tensor, "batch actions"]:
        return self.per_seed(observation, mask).mean(0)


class BehaviorTable(nn.Module):
    """The behavior policy where the observation is one category: logged propensities, by state and action.

    What a state's visited actions leave of probability 1 is shared by its allowed actions that were never visited.
    """

    known: Tensor

    def __init__(self, known: Float64[np.ndarray, "states actions"]):
        super().__init__()
        self.register_buffer("known", torch.as_tensor(known, dtype=torch.float64))

    def forward(
        self, observation: Float[Tensor, "batch columns"], mask: Bool[Tensor, "batch actions"]
    ) -> Float[Tensor, "batch actions"]:
        known = self.known[observation[:, 0].long()] * mask
        unseen = (mask & (known == 0)).double()
        left = (1.0 - known.sum(-1, keepdim=True)).clamp(min=0.0)
        probs = known + unseen * left / unseen.sum(-1, keepdim=True).clamp(min=1.0)
        return probs / probs.sum(-1, keepdim=True)


def project(
    probs: Float[Tensor, "batch actions"], behavior: Float[Tensor, "batch actions"], cap: float
) -> Float[Tensor, "batch actions"]:
    """The distribution nearest to `probs`, in KL(. | probs), among those with p <= cap * behavior.

    It is p = min(cap * behavior, k * probs). The mass sum_a min(cap mu_a, k pi_a) is concave in k and the minimum of linear
    functions (the j first actions at their caps), so k is the largest of the solutions for single j.
    """
    pi = (1.0 - BEHAVIOR_SHARE) * probs + BEHAVIOR_SHARE * behavior
    limit = cap * behavior
    order = (-limit / pi.clamp(min=1e-300)).topk(pi.shape[-1]).indices
    limit_in_order, pi_in_order = limit.gather(-1, order), pi.gather(-1, order)
    capped = limit_in_order.cumsum(-1) - limit_in_order  # mass at its cap before each action
    free = pi_in_order.sum(-1, keepdim=True) - pi_in_order.cumsum(-1) + pi_in_order  # mass from each action on
    k = torch.where(free > 1e-12, (1.0 - capped) / free.clamp(min=1e-12), 0.0).amax(-1, keepdim=True)
    projected = torch.minimum(limit, k * pi)
    return projected / projected.sum(-1, keepdim=True)


class CappedPolicy(nn.Module):
    """One rung of the ladder: the candidate projected on {pi <= cap * mu}."""

    def __init__(self, candidate: nn.Module, behavior: nn.Module, cap: float):
        super().__init__()
        self.candidate, self.behavior, self.cap = candidate, behavior, cap

    def forward(
        self, observation: Float[Tensor, "batch columns"], mask: Bool[Tensor, "batch actions"]
    ) -> Float[Tensor, "batch actions"]:
        return project(self.candidate(observation, mask), self.behavior(observation, mask), self.cap)


def weights(policy: nn.Module) -> dict[str, Tensor]:
    """The state of a policy; numbers that single precision holds exactly are stored in it."""
    stored = {}
    for name, tensor in policy.state_dict().items():
        single = tensor.float() if tensor.dtype == torch.float64 else tensor
        stored[name] = (single if torch.equal(single.to(tensor.dtype), tensor) else tensor).clone()
    return stored


ROWS_AT_A_TIME = 65_536
PARITY = 1e-6  # largest difference allowed between an exported policy and the one it was exported from


def export_checked(policy: nn.Module, episodes: Episodes, folder: Path) -> "OnnxPolicy":
    """Write `policy.onnx` and `policy.safetensors`, and hold the graph against the module on every observation given.

    Raises RuntimeError when a probability differs by more than PARITY.
    """
    export(policy, episodes.observation.shape[1], episodes.n_actions, folder / "policy.onnx")
    write_tensors(folder / "policy.safetensors", weights(policy))
    exported = OnnxPolicy(folder / "policy.onnx")
    difference = float(np.abs(exported.on(episodes) - probs_of(policy, episodes)).max())
    if not difference <= PARITY:
        raise RuntimeError(
            f"{folder / 'policy.onnx'} differs from the trained policy by {difference:.2e} in probability."
        )
    return exported


def probs_of(policy: nn.Module, episodes: Episodes) -> Float64[np.ndarray, "rows actions"]:
    """Action probabilities of a module at every logged observation."""
    found = []
    with torch.no_grad():
        for start in range(0, episodes.n_rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            mask = torch.as_tensor(np.array(episodes.mask[rows]))
            found.append(policy(torch.as_tensor(np.array(episodes.observation[rows])), mask).double().numpy())
    return np.concatenate(found)


def export(policy: nn.Module, columns: int, actions: int, path: Path) -> None:
    """Write a policy as an ONNX graph with inputs `observation` and `mask` and output `probs`.

    The file depends on the weights alone: traces of source lines are left out.
    """
    example = (torch.zeros(2, columns), torch.ones(2, actions, dtype=torch.bool))
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # torch's own, in its exporter
        warnings.filterwarnings("ignore", ".*The axis name: batch will not be used.*", UserWarning)
        program = cast(
            Any,
            torch.onnx.export(
                policy.eval(),
                example,
                dynamo=True,
                verbose=False,
                input_names=["observation", "mask"],
                output_names=["probs"],
                dynamic_shapes={"observation": {0: batch}, "mask": {0: batch}},
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


class OnnxPolicy:
    """An exported policy. Rows with the same observation and mask are computed once."""

    def __init__(self, path: Path):
        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except (OSError, Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
            raise InputError(f"{path} cannot be loaded as an ONNX policy ({error}); export it again.") from error

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


def next_mask_or_all(episodes: Episodes) -> Bool[np.ndarray, "rows actions"]:
    """The next mask; where nothing acts any more, or it is unknown, all actions count as allowed."""
    return episodes.next_mask | ~episodes.next_mask.any(1, keepdims=True)
