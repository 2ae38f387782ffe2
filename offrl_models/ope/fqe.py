"""Fitted Q evaluation: the value of a policy by repeated regression on its own Bellman equation.

Le, Voloshin & Yue (2019), https://arxiv.org/abs/1903.08738. Several policies and several members of an ensemble are fitted
in one pass on the seed axis; member m sees the same bootstrap resample of episodes and the same batches for every policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor, nn

from offrl_models.actors import Critic
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import TransitionBatch, Transitions
from offrl_models.distributions import Actions
from offrl_models.exported import Exported, OnnxDensity, OnnxPolicy
from offrl_models.logs.contract import Strict
from offrl_models.losses import squared_error, td_target
from offrl_models.ope.units import entities_of, independent
from offrl_models.policies import next_mask_or_all
from offrl_models.schema import Episodes

DRAWS = 16  # of a policy over continuous actions, at every observation
ROWS_AT_A_TIME = 8192
OF_NEXT, OF_ROWS = 1, 2  # seeds of draws


class FQEConfig(Strict):
    """How every fitted Q evaluation is trained."""

    hidden: tuple[int, ...] = (64, 64)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=256, ge=1)
    gradient_steps: int = Field(default=10_000, ge=1)
    polyak: float = Field(default=0.02, gt=0, le=1)
    members: int = Field(default=3, ge=2)
    compile: bool = False  # machine code for losses and gradients, which takes a while to make


class FQE(nn.Module):
    """Q-networks [policy x member] and their slow copies."""

    targets: ClassVar[dict[str, str]] = {"target_q": "q"}
    draws = 0

    def __init__(
        self, config: FQEConfig, encoder: Encoder, policies: int, actions: Actions, start: float, unit: float = 1.0
    ):
        """The seeds are the members of the first policy, then those of the second, and so on.

        Every value starts near `start`, the mean return still to come in the log: the regression then corrects a sensible
        guess instead of carrying the rewards back from the end of the episodes one step at a time. Values, `start` and the
        rewards of the batches are in units of `unit`, in which networks and learning rates suit them.
        """
        super().__init__()
        self.config, self.unit = config, unit
        seeds = list(range(config.members)) * policies
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, 1)
        self.target_q = Critic(seeds, "q", encoder, config.hidden, actions, 1)
        self.target_update = (config.polyak, 1)
        with torch.no_grad():
            self.q.last_bias().add_(start)

    def learning_rates(self) -> dict[str, float]:
        return {"q": self.config.learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per policy and member."""
        with torch.no_grad():
            if batch.next_probs is not None:
                next_value = (batch.next_probs * self.target_q.each(batch.next_observation)[:, 0]).sum(-1)
            else:
                assert batch.next_draw is not None
                next_value = self.target_q(batch.next_observation, batch.next_draw)[:, 0]
        target = td_target(batch.reward, batch.discount, next_value)
        return {"q": squared_error(self.q(batch.observation, batch.action)[:, 0], target)}


@dataclass(frozen=True)
class FQEValues:
    """Fitted values of several policies on some episodes, in the order of the policies."""

    q: Float64[np.ndarray, "policies rows"]  # of the logged action, mean of the members
    v: Float64[np.ndarray, "policies rows"]
    next_v: Float64[np.ndarray, "policies rows"]  # zero but in truncated rows
    initial: Float64[np.ndarray, "policies members episodes"]  # value of each episode's first observation

    def members(self, policy: int) -> list[float]:
        """Each member's estimate of the policy's value."""
        return [float(value) for value in self.initial[policy].mean(1)]


def bootstrap_rows(episodes: Episodes, transitions: Transitions, seed: int) -> Tensor:
    """The usable rows of a bootstrap resample of episodes, or of entities where one has several."""
    unit, n = entities_of(episodes), independent(episodes)
    count = np.bincount(np.random.default_rng(seed).integers(0, n, n), minlength=n)
    count = count if unit is None else count[unit]
    copies = torch.as_tensor(count[episodes.episode_of_row], device=transitions.rows.device)
    return transitions.rows.repeat_interleave(copies[transitions.rows])


def fitted_values(fqe: FQE, policies: Sequence[Exported], episodes: Episodes) -> FQEValues:
    """Values of policies, all over the same kind of actions, by the networks that were fitted to them."""
    densities, others = divided(policies)
    return _values_of_densities(fqe, densities, episodes) if densities else _values_of_probs(fqe, others, episodes)


def divided(policies: Sequence[Exported]) -> tuple[list[OnnxDensity], list[OnnxPolicy]]:
    """Policies over continuous actions, and those over discrete ones. Raises TypeError where there are both."""
    densities = [policy for policy in policies if isinstance(policy, OnnxDensity)]
    others = [policy for policy in policies if isinstance(policy, OnnxPolicy)]
    if densities and others:
        raise TypeError("some policies are over continuous actions and others over discrete ones.")
    return densities, others


@torch.no_grad()
def _values_of_probs(fqe: FQE, policies: Sequence[OnnxPolicy], episodes: Episodes) -> FQEValues:
    rows, members = episodes.n_rows, fqe.config.members
    shape = (len(policies), members, -1, episodes.n_actions)

    def q_at(observation: np.ndarray) -> np.ndarray:
        distinct, inverse = np.unique(observation, axis=0, return_inverse=True)
        batch = torch.as_tensor(distinct).expand(len(policies) * members, -1, -1)
        return fqe.unit * fqe.q.each(batch).reshape(shape).double().numpy()[:, :, inverse.ravel()]

    probs = np.stack([policy.on(episodes) for policy in policies])
    every = q_at(episodes.observation)
    v = np.einsum("pra,pmra->pmr", probs, every)
    next_v = np.zeros((len(policies), rows))
    if episodes.truncated.any():
        cut = episodes.truncated
        next_mask = next_mask_or_all(episodes)[cut]
        next_probs = np.stack([policy.probs(episodes.next_observation[cut], next_mask) for policy in policies])
        next_v[:, cut] = np.einsum("pra,pmra->pr", next_probs, q_at(episodes.next_observation[cut])) / members
    q = every.mean(1)[:, np.arange(rows), episodes.action]
    return FQEValues(q, v.mean(1), next_v, v[:, :, episodes.offsets[:-1]])


def draws_of(policies: Sequence[OnnxDensity], observation: np.ndarray, dimensions: int, seed: int) -> np.ndarray:
    """DRAWS actions [policies, rows, draws, dimensions] of every policy at every observation, by the same random numbers."""
    drawn = np.empty((len(policies), len(observation), DRAWS, dimensions), np.float32)
    for place, policy in enumerate(policies):
        drawn[place] = policy.draws(observation, dimensions, DRAWS, seed)
    return drawn


@torch.no_grad()
def _values_of_densities(fqe: FQE, policies: Sequence[OnnxDensity], episodes: Episodes) -> FQEValues:
    """V is the mean of Q over DRAWS actions: an unbiased estimate of the mean over the policy, in every row by other draws."""
    count, members, dimensions = len(policies), fqe.config.members, episodes.action.shape[1]

    def q_at(observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        """[policies, members, rows] of actions [policies, rows, draws, dimensions], mean over the draws."""
        found, at_a_time = [], max(1, ROWS_AT_A_TIME // (count * members))
        for start in range(0, len(observation), at_a_time):
            rows = slice(start, start + at_a_time)
            seen = torch.as_tensor(np.array(observation[rows])).expand(count * members, -1, -1)
            asked = torch.as_tensor(np.array(action[:, rows])).repeat_interleave(members, 0)
            found.append(fqe.q(seen, asked)[:, 0].double().mean(-1).numpy())
        return fqe.unit * np.concatenate(found, 1).reshape(count, members, -1)

    drawn = draws_of(policies, episodes.observation, dimensions, OF_ROWS)
    logged = np.broadcast_to(
        np.asarray(episodes.action, np.float32)[None, :, None], (count, episodes.n_rows, 1, dimensions)
    )
    q, v = q_at(episodes.observation, logged).mean(1), q_at(episodes.observation, drawn)
    next_v = np.zeros((count, episodes.n_rows))
    if episodes.truncated.any():
        cut = episodes.truncated
        following = episodes.next_observation[cut]
        next_v[:, cut] = q_at(following, draws_of(policies, following, dimensions, OF_NEXT)).mean(1)
    return FQEValues(q, v.mean(1), next_v, v[:, :, episodes.offsets[:-1]])
