"""Implicit Q-learning: never asks the critic about an action that is not in the data.

Kostrikov, Nair & Levine (2021), https://arxiv.org/abs/2110.06169; defaults of d3rlpy and CORL.
Differences from the paper: all three losses are taken at the same parameters, and the policy is categorical, or over
continuous actions a mixture of cut-off logistic densities. Learning rates are constant by default, where paper and CORL let the
actor's fall by a cosine; `training.schedule: cosine` lets those of all networks fall.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import COMPONENTS, Actions, Distribution, Space
from offrl_models.losses import advantage_weight, expectile_loss, squared_error, td_target
from offrl_models.nets import MLP


@dataclass(frozen=True, kw_only=True)
class IQLConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    expectile: float = Field(default=0.7, gt=0, lt=1)  # paper: tau
    inverse_temperature: float = Field(default=3.0, ge=0)  # paper: beta; 0 is behavior cloning
    max_weight: float = Field(default=100.0, gt=0)
    polyak: float = Field(default=0.005, gt=0, le=1)
    components: int = Field(default=COMPONENTS, ge=1)  # of the mixture density; 1 is enough where actions have one mode


class IQL(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}
    only: ClassVar[dict[str, Space]] = {"components": "continuous"}
    draws = 0

    def __init__(self, config: IQLConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.target_q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.value = MLP(seeds, "value", encoder, config.hidden, 1)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, config.components)
        self.target_update = (config.polyak, 1)

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("q", "value", "policy"), self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        c = self.config
        with torch.no_grad():
            q_in_data = self.target_q(batch.observation, batch.action).amin(1)
            next_value = self.value(batch.next_observation).squeeze(-1)
        value = self.value(batch.observation).squeeze(-1)
        weight = advantage_weight(q_in_data - value, inverse_temperature=c.inverse_temperature, max_weight=c.max_weight)
        q = self.q(batch.observation, batch.action)
        target = td_target(batch.reward, batch.discount, next_value).unsqueeze(1).expand_as(q)
        log_prob = self.distribution(batch.observation, batch.mask).log_prob(batch.action)
        return {
            "value": expectile_loss(value, q_in_data, expectile=c.expectile),
            "q": squared_error(q, target).sum(1),
            "policy": -(weight * log_prob).mean(-1),
        }

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
