"""Policies that look back: distributions over actions given the present observation and the rows of the episode before it.

Their probabilities of logged actions follow from what each row's past shows and from nothing after it, so that ratios along an
episode, and what importance sampling and doubly robust estimators make of them, are those of the policy that acts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from offrl_models.datasets.views import windows
from offrl_models.densities import uniform_numbers
from offrl_models.distributions import Categorical, Distribution, LogisticMixture
from offrl_models.exported import open_session
from offrl_models.exporting import require_parity, traced, write_policy
from offrl_models.schema import Episodes

WINDOWS_AT_A_TIME = 1024


class LooksBack(Protocol):
    context: int

    def given(
        self, observation: Tensor, past_action: Tensor, earned: Tensor, step: Tensor, mask: Tensor | None
    ) -> Distribution: ...


class HistoryMixture(nn.Module):
    """The policy of several seeds, given the history: each step acts as one of them, drawn at random."""

    def __init__(self, algorithm: nn.Module, seeds: int):
        super().__init__()
        self.algorithm, self.seeds = algorithm.double(), seeds  # as in policies.Mixture
        self.context = cast(LooksBack, algorithm).context

    def forward(
        self,
        observation: Float[Tensor, "batch context columns"],
        past_action: Int64[Tensor, "batch context"],
        earned: Float64[Tensor, "batch context"],
        step: Int64[Tensor, "batch"],
        mask: Bool[Tensor, "batch actions"],
    ) -> Float[Tensor, "batch actions"]:
        """Probabilities at the last row of each window, which is number `step` (from 0) of its episode.

        `earned` are the rewards of the episode before each row, added up. Rows from before its beginning come first and are not
        looked at, nor is the action of the last row, which is to be chosen; zeros will do for both. `mask` is of the last row.
        """
        parts = [observation.double(), past_action, earned, step, mask]
        found = cast(LooksBack, self.algorithm).given(*(part.expand(self.seeds, *part.shape) for part in parts))
        assert isinstance(found, Categorical)
        return found.probs.mean(0)


class HistoryDensity(nn.Module):
    """The density of continuous actions of several seeds, given the history: the mean of theirs."""

    def __init__(self, algorithm: nn.Module, seeds: int, dimensions: int):
        super().__init__()
        self.algorithm, self.seeds = algorithm.double(), seeds
        self.context, self.numbers = cast(LooksBack, algorithm).context, 1 + dimensions

    def forward(
        self,
        observation: Float[Tensor, "batch context columns"],
        past_action: Float[Tensor, "batch context dimensions"],
        earned: Float64[Tensor, "batch context"],
        step: Int64[Tensor, "batch"],
        action: Float[Tensor, "batch actions dimensions"],
        uniform: Float[Tensor, "batch draws numbers"],
    ) -> tuple[Float[Tensor, "batch actions"], Float[Tensor, "batch draws dimensions"]]:
        """Logarithm of the density of each action at the last row of a window, and one action drawn for each draw: as in
        `densities`. The first four are as in `HistoryMixture.forward`."""
        parts = [
            part.expand(self.seeds, *part.shape) for part in (observation.double(), past_action.double(), earned, step)
        ]
        found = cast(LooksBack, self.algorithm).given(parts[0], parts[1], parts[2], parts[3], None)
        assert isinstance(found, LogisticMixture)
        pooled = found.pooled()
        return pooled.of_each.log_prob(action.double()), pooled.sample(uniform.double())


def inputs_of(episodes: Episodes, context: int) -> Iterator[dict[str, np.ndarray]]:
    """What such policies are given at every logged row, by name of the input, a number of rows at a time. Of a density the
    logged action is asked for, and nothing is drawn by chance."""
    for start in range(0, episodes.n_rows, WINDOWS_AT_A_TIME):
        rows = np.arange(start, min(start + WINDOWS_AT_A_TIME, episodes.n_rows))
        view = windows(episodes, context, rows)
        found = {
            "observation": episodes.observation[view.row].astype(np.float32),
            "past_action": episodes.action[view.row].astype(np.int64 if episodes.n_actions else np.float32),
            "earned": episodes.earned[view.row],
            "step": episodes.step[rows],
        }
        if episodes.n_actions:
            yield found | {"mask": np.array(episodes.mask[rows])}
        else:
            action = episodes.action[rows][:, None].astype(np.float32)
            yield found | {"action": action, "uniform": uniform_numbers(len(rows), 1, 1 + action.shape[-1], start)}


def probs_given_history(policy: HistoryMixture, episodes: Episodes) -> Float64[np.ndarray, "rows actions"]:
    """Action probabilities at every logged row, given what came before it in its episode."""
    return np.concatenate([parts[0] for parts in _outputs(policy, episodes)])


def log_density_given_history(density: HistoryDensity, episodes: Episodes) -> Float64[np.ndarray, "rows"]:
    """Logarithm of the density of every logged action, given what came before it in its episode."""
    return np.concatenate([parts[0][:, 0] for parts in _outputs(density, episodes)])


def _outputs(policy: HistoryMixture | HistoryDensity, episodes: Episodes) -> Iterator[list[np.ndarray]]:
    for inputs in inputs_of(episodes, policy.context):
        with torch.no_grad():
            found = policy(*(torch.as_tensor(part) for part in inputs.values()))
        yield [part.numpy() for part in (found if isinstance(found, tuple) else (found,))]


def export_history_checked(
    policy: HistoryMixture | HistoryDensity, episodes: Episodes, folder: Path
) -> "OnnxHistoryPolicy":
    """Write `policy.onnx` and `policy.safetensors`, and hold the graph against the module at every row of some episodes.

    The graph takes and gives what the module does; the encoder, the mask and the target return are inside. Raises RuntimeError
    when a probability, or a density or a drawn action relative to its size or to 1, differs by more than `exported.PARITY`.
    """
    first = next(inputs_of(episodes, policy.context))
    example = {name: torch.as_tensor(part[:1]).repeat(2, *[1] * (part.ndim - 1)) for name, part in first.items()}
    dynamic: dict[str, tuple[str, ...]] = dict.fromkeys(example, ())
    if isinstance(policy, HistoryDensity):
        example |= {"action": example["action"].repeat(1, 3, 1), "uniform": example["uniform"].repeat(1, 5, 1)}
        dynamic |= {"action": ("actions",), "uniform": ("draws",)}
    outputs = ["probs"] if isinstance(policy, HistoryMixture) else ["log_density", "drawn"]
    exported = OnnxHistoryPolicy(write_policy(traced(policy, example, outputs, dynamic), policy, folder))
    for found, meant in zip(exported.outputs(episodes), _outputs(policy, episodes), strict=True):
        for of, one, other in zip(outputs, found, meant, strict=True):
            size = np.maximum(np.abs(other), 1.0)
            require_parity(exported.path, one / size, other / size, of)
    return exported


class OnnxHistoryPolicy:
    """An exported policy that looks back, over either kind of actions."""

    def __init__(self, path: Path):
        self.path, self.session = path, open_session(path)
        self.context: int = {entry.name: entry.shape for entry in self.session.get_inputs()}["earned"][1]

    def outputs(self, episodes: Episodes) -> Iterator[list[np.ndarray]]:
        """What the graph gives at every logged row, a number of rows at a time."""
        for inputs in inputs_of(episodes, self.context):
            yield [np.asarray(part, np.float64) for part in self.session.run(None, inputs)]

    def probs(self, episodes: Episodes) -> Float64[np.ndarray, "rows actions"]:
        """Of discrete actions at every logged row, given what came before it in its episode."""
        return np.concatenate([parts[0] for parts in self.outputs(episodes)])

    def log_density(self, episodes: Episodes) -> Float64[np.ndarray, "rows"]:
        """Of every logged action, given what came before it in its episode."""
        return np.concatenate([parts[0][:, 0] for parts in self.outputs(episodes)])
