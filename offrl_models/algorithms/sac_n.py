"""SAC-N and EDAC: an actor-critic that believes the least of many critics, and so avoids actions on which they disagree.

An, Moon, Kim & Song (2021), https://arxiv.org/abs/2110.01548; defaults of CORL. EDAC is SAC-N with a term that makes the critics
disagree about actions that are not in the data, so that it needs fewer of them. Over actions of one
dimension cosines are 1 or -1, that term has no gradient, and EDAC is SAC-N.
Differences from the paper: the policy is a cut-off logistic density where theirs is a squashed normal, and all losses are taken
at the same parameters.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, Temperature, soft_actor_losses
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import LogisticMixture, Space
from offrl_models.losses import diversity_loss, squared_error, td_target


@dataclass(frozen=True, kw_only=True)
class SACNConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256, 256), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    members: int = Field(default=10, ge=2)  # paper: N; 50 to 500 for SAC-N where ten are not careful enough
    diversity: float = Field(default=0.0, ge=0)  # paper: eta
    polyak: float = Field(default=0.005, gt=0, le=1)


@dataclass(frozen=True, kw_only=True)
class EDACConfig(SACNConfig):
    diversity: float = Field(default=1.0, ge=0)  # paper: eta; 5 for data of experts


class SACN(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("continuous",)
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}
    draws = 2  # of the policy: at the observation and at the next one

    def __init__(
        self, config: SACNConfig, encoder: Encoder, actions: Float64[np.ndarray, "dimensions 2"], seeds: Sequence[int]
    ):
        super().__init__()
        self.config = config
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, config.members)
        self.target_q = Critic(seeds, "q", encoder, config.hidden, actions, config.members)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, components=1)
        self.temperature = Temperature(seeds)
        self.target_update = (config.polyak, 1)

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("q", "policy", "temperature"), self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        assert batch.uniform is not None
        for_actor, for_target = batch.uniform.split(1, 2)
        policy = self.distribution(batch.observation)
        with torch.no_grad():
            action, log_prob = self.distribution(batch.next_observation).sample_and_log_prob(for_target)
            least = self.target_q(batch.next_observation, action).amin(1)
            next_value = (least - self.temperature()[:, None, None] * log_prob).squeeze(-1)
        return {
            "q": self._critic_loss(batch, td_target(batch.reward, batch.discount, next_value)),
            **soft_actor_losses(policy, self.q, self.temperature, batch.observation, for_actor),
        }

    def _critic_loss(self, batch: TransitionBatch, target: Tensor) -> Tensor:
        targets = target.unsqueeze(1).expand(-1, self.config.members, -1)
        if not self.config.diversity:
            return squared_error(self.q(batch.observation, batch.action), targets).sum(1)
        q, slope = self.q.with_slopes(batch.observation, batch.action)
        return squared_error(q, targets).sum(1) + self.config.diversity * diversity_loss(slope)

    def distribution(self, observation: Observation, mask: Tensor | None = None) -> LogisticMixture:
        """The policy, [seed, batch]."""
        policy = self.policy(observation, mask)
        assert isinstance(policy, LogisticMixture)
        return policy
