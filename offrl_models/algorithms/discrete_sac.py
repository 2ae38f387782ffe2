"""Soft actor-critic over discrete actions: the policy earns entropy besides rewards, at a price that is learned.

Christodoulou (2019), https://arxiv.org/abs/1910.07207; defaults of d3rlpy.
Differences from the paper: all losses are taken at the same parameters, and the entropy that is wanted is a share of the
greatest one among the actions a mask allows. The policy is deployed as it was trained, with the entropy it has.
Batches are of 256, and the slow network is copied a hundred times in a training, by default; d3rlpy has 64 and every 8,000th step.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, Temperature
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Categorical, Space
from offrl_models.losses import expected_value, soft_value, squared_error, td_target, temperature_loss
from offrl_models.nets import take


@dataclass(frozen=True, kw_only=True)
class DiscreteSACConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    entropy_share: float = Field(default=0.98, ge=0, le=1)  # wanted, of the greatest one: log(allowed actions)
    initial_temperature: float = Field(default=1.0, gt=0)  # paper: alpha; in units of reward
    target_interval: int | None = Field(default=None, ge=1)  # gradient steps between copies; None: a hundredth of all


class DiscreteSAC(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete",)
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}
    draws = 0

    def __init__(self, config: DiscreteSACConfig, encoder: Encoder, actions: int, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.target_q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions)
        self.temperature = Temperature(seeds, config.initial_temperature)
        self.target_update = (1.0, config.target_interval)

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("q", "policy", "temperature"), self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        price = self.temperature()
        q = self.q.each(batch.observation)
        with torch.no_grad():
            following = self.distribution(batch.next_observation, batch.next_mask).log_probs
            next_value = soft_value(self.target_q.each(batch.next_observation).amin(1), following, price)
        target = td_target(batch.reward, batch.discount, next_value).unsqueeze(1).expand(q.shape[:3])
        taken = take(q, batch.action.unsqueeze(1).expand(q.shape[:3]))
        log_probs = self.distribution(batch.observation, batch.mask).log_probs
        entropy = -expected_value(log_probs, log_probs)
        wanted = self.config.entropy_share * batch.mask.sum(-1).log()
        return {
            "q": squared_error(taken, target).sum(1),
            "policy": -soft_value(q.detach().amin(1), log_probs, price).mean(-1),
            "temperature": temperature_loss(self.temperature.log, entropy, wanted),
        }

    def distribution(self, observation: Observation, mask: Tensor) -> Categorical:
        """The policy, [seed, batch]."""
        policy = self.policy(observation, mask)
        assert isinstance(policy, Categorical)
        return policy
