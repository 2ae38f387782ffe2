"""Advantage-weighted actor-critic: imitates logged actions, the more the better the critic finds them than the policy's own.

Nair, Gupta, Dalal & Levine (2020), https://arxiv.org/abs/2006.09359; defaults of d3rlpy.
Differences from the paper: weights are clipped, as in CORL, and not divided by their sum over the batch; both losses are taken
at the same parameters; expectations over discrete actions are exact, and over continuous ones the policy is a mixture of
cut-off logistic densities, not a normal. Batches are of 256 by default, as in CORL, where d3rlpy has 1,024.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, expected_q, shares
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import COMPONENTS, Actions, Distribution, Space
from offrl_models.losses import advantage_weight, ensemble_error, td_target


@dataclass(frozen=True, kw_only=True)
class AWACConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    inverse_temperature: float = Field(default=1.0, ge=0)  # paper: 1 / lambda; 0 is behavior cloning
    max_weight: float = Field(default=100.0, gt=0)
    action_draws: int = Field(default=1, ge=1)  # for each expectation over continuous actions
    polyak: float = Field(default=0.005, gt=0, le=1)
    components: int = Field(default=COMPONENTS, ge=1)  # of the mixture density; 1 is enough where actions have one mode


class AWAC(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}
    only: ClassVar[dict[str, Space]] = dict.fromkeys(("action_draws", "components"), "continuous")

    def __init__(self, config: AWACConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.target_q = deepcopy(self.q)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, config.components)
        self.target_update = (config.polyak, 1)
        self.draws = 0 if isinstance(actions, int) else 2 * config.action_draws

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("q", "policy"), self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        c = self.config
        here, there = shares(batch.uniform, c.action_draws, c.action_draws)
        q, policy = self.q(batch.observation, batch.action), self.distribution(batch.observation, batch.mask)
        with torch.no_grad():
            following = self.distribution(batch.next_observation, batch.next_mask)
            next_value = expected_q(self.target_q, batch.next_observation, following, there).amin(1)
            value = expected_q(self.q, batch.observation, policy, here).amin(1)
        weight = advantage_weight(q.amin(1) - value, inverse_temperature=c.inverse_temperature, max_weight=c.max_weight)
        return {
            "q": ensemble_error(q, td_target(batch.reward, batch.discount, next_value)),
            "policy": -(weight * policy.log_prob(batch.action)).mean(-1),
        }

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
