"""Policies that look back: distributions over actions given the present observation and the rows of the episode before it.

Their probabilities of logged actions follow from what each row's past shows and from nothing after it, so that ratios along an
episode, and what importance sampling and doubly robust estimators make of them, are those of the policy that acts.
"""

from collections.abc import Iterator
from typing import Protocol, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from offrl_models.datasets.views import windows
from offrl_models.distributions import Categorical, Distribution, LogisticMixture
from offrl_models.schema import Episodes

WINDOWS_AT_A_TIME = 1024


class LooksBack(Protocol):
    context: int

    def given(
        self, observation: Tensor, action: Tensor, earned: Tensor, step: Tensor, mask: Tensor | None
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
        action: Int64[Tensor, "batch context"],
        earned: Float64[Tensor, "batch context"],
        step: Int64[Tensor, "batch"],
        mask: Bool[Tensor, "batch actions"],
    ) -> Float[Tensor, "batch actions"]:
        """Probabilities at the last row of each window, which is number `step` (from 0) of its episode.

        `earned` are the rewards of the episode before each row, added up. Rows from before its beginning come first and are not
        looked at, nor is the action of the last row, which is to be chosen; zeros will do for both. `mask` is of the last row.
        """
        parts = [observation.double(), action, earned, step, mask]
        found = cast(LooksBack, self.algorithm).given(*(part.expand(self.seeds, *part.shape) for part in parts))
        assert isinstance(found, Categorical)
        return found.log_probs.softmax(-1).mean(0)


class HistoryDensity(nn.Module):
    """The density of continuous actions of several seeds, given the history: the mean of theirs."""

    def __init__(self, algorithm: nn.Module, seeds: int):
        super().__init__()
        self.algorithm, self.seeds = algorithm.double(), seeds
        self.context = cast(LooksBack, algorithm).context

    def forward(
        self,
        observation: Float[Tensor, "batch context columns"],
        action: Float[Tensor, "batch context dimensions"],
        earned: Float64[Tensor, "batch context"],
        step: Int64[Tensor, "batch"],
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch dimensions"]]:
        """Logarithm of the density of the last row's action, and the distribution function of each of its dimensions given
        those before it. The density depends on the actions before the last one; the rest is as in `HistoryMixture.forward`."""
        action = action.double()
        parts = [part.expand(self.seeds, *part.shape) for part in (observation.double(), action, earned, step)]
        found = cast(LooksBack, self.algorithm).given(parts[0], parts[1], parts[2], parts[3], None)
        assert isinstance(found, LogisticMixture)
        log_density, share = found.pooled().conditionals(action[:, -1])
        return log_density.sum(-1), share


def inputs_of(episodes: Episodes, context: int) -> Iterator[dict[str, np.ndarray]]:
    """What such policies are given at every logged row, by name of the input, a number of rows at a time."""
    for start in range(0, episodes.n_rows, WINDOWS_AT_A_TIME):
        rows = np.arange(start, min(start + WINDOWS_AT_A_TIME, episodes.n_rows))
        view = windows(episodes, context, rows)
        found = {
            "observation": episodes.observation[view.row].astype(np.float32),
            "action": episodes.action[view.row].astype(np.int64 if episodes.n_actions else np.float32),
            "earned": episodes.earned[view.row],
            "step": episodes.step[rows],
        }
        yield found | ({"mask": np.array(episodes.mask[rows])} if episodes.n_actions else {})


def probs_given_history(policy: HistoryMixture, episodes: Episodes) -> Float64[np.ndarray, "rows actions"]:
    """Action probabilities at every logged row, given what came before it in its episode."""
    with torch.no_grad():
        found = [
            policy(*(torch.as_tensor(part) for part in inputs.values())).numpy()
            for inputs in inputs_of(episodes, policy.context)
        ]
    return np.concatenate(found)


def log_density_given_history(
    density: HistoryDensity, episodes: Episodes
) -> tuple[Float64[np.ndarray, "rows"], Float64[np.ndarray, "rows dimensions"]]:
    """Logarithm of the density of every logged action, and the distribution function of each of its dimensions, given what came
    before it in its episode."""
    with torch.no_grad():
        found = [
            [part.numpy() for part in density(*(torch.as_tensor(part) for part in inputs.values()))]
            for inputs in inputs_of(episodes, density.context)
        ]
    log_density, share = (np.concatenate(part) for part in zip(*found, strict=True))
    return log_density, share
