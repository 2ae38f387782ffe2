"""Policies over discrete actions.

A policy maps raw observations [batch, columns] and masks [batch, actions] to probabilities [batch, actions]: the encoder, the
mask and, for a capped policy, the behavior model and the projection are inside it.
"""

from typing import Protocol, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from offrl_models.datasets.encoding import known_codes
from offrl_models.distributions import Categorical, Distribution
from offrl_models.schema import Episodes, InputError

BEHAVIOR_SHARE = 1e-6  # of the behavior policy in a capped policy, so that the cap can always be met


class HasDistribution(Protocol):
    def distribution(self, observation: Tensor, mask: Tensor | None) -> Distribution: ...


def require_memoryless(algorithm: nn.Module) -> None:
    """Raises InputError for an algorithm whose policy needs more than the present observation."""
    if getattr(algorithm, "needs_history", False):
        raise InputError(
            f"{type(algorithm).__name__} looks back at what came before; use HistoryMixture or HistoryDensity of `history`."
        )


class Mixture(nn.Module):
    """The policy of several seeds: each step acts as one of them, drawn at random; pi = mean of the seeds' pi."""

    def __init__(self, algorithm: nn.Module, seeds: int):
        super().__init__()
        require_memoryless(algorithm)
        # Double precision: a softmax at a low temperature would turn rounding of single into different actions.
        self.algorithm, self.seeds = algorithm.double(), seeds

    def per_seed(self, observation: Tensor, mask: Tensor) -> Float[Tensor, "seed batch actions"]:
        found = cast(HasDistribution, self.algorithm).distribution(
            observation.double().expand(self.seeds, -1, -1), mask.expand(self.seeds, -1, -1)
        )
        assert isinstance(found, Categorical)
        return found.probs

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
        known = self.known[known_codes(observation[:, 0], len(self.known))] * mask
        unseen = (mask & (known == 0)).double()
        left = (1.0 - known.sum(-1, keepdim=True)).clamp(min=0.0)
        probs = known + unseen * left / unseen.sum(-1, keepdim=True).clamp(min=1.0)
        return probs / probs.sum(-1, keepdim=True)


def project(
    probs: Float[Tensor, "batch actions"], behavior: Float[Tensor, "batch actions"], cap: float | Float64[Tensor, ""]
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

    level: Tensor  # the cap: all that the rungs of a ladder differ in

    def __init__(self, candidate: nn.Module, behavior: nn.Module, cap: float):
        super().__init__()
        self.candidate, self.behavior = candidate, behavior
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))
        self.set_cap(cap)

    def set_cap(self, cap: float) -> None:
        self.level.fill_(cap)

    def forward(
        self, observation: Float[Tensor, "batch columns"], mask: Bool[Tensor, "batch actions"]
    ) -> Float[Tensor, "batch actions"]:
        return project(self.candidate(observation, mask), self.behavior(observation, mask), self.level)


ROWS_AT_A_TIME = 65_536


def probs_of(policy: nn.Module, episodes: Episodes) -> Float64[np.ndarray, "rows actions"]:
    """Action probabilities of a module at every logged observation."""
    found = []
    with torch.no_grad():
        for start in range(0, episodes.n_rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            mask = torch.as_tensor(np.array(episodes.mask[rows]))
            found.append(policy(torch.as_tensor(np.array(episodes.observation[rows])), mask).double().numpy())
    return np.concatenate(found)


def next_mask_or_all(episodes: Episodes) -> Bool[np.ndarray, "rows actions"]:
    """The next mask; where nothing acts any more, or it is unknown, all actions count as allowed."""
    return episodes.next_mask | ~episodes.next_mask.any(1, keepdims=True)
