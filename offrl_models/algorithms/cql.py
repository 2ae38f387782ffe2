"""Conservative Q-learning: Q-learning that lowers the value of actions the log does not show.

Kumar, Zhou, Tucker & Levine (2020), https://arxiv.org/abs/2006.04779, CQL(H): on double DQN where actions are discrete, else on a
soft actor-critic without entropy in its targets; defaults of d3rlpy, over continuous actions with the three layers of CORL.
Differences from the paper: over discrete actions the policy is a softmax of Q at a stated temperature instead of the argmax, so
that what is deployed is a distribution and what is evaluated is the same one. Over continuous ones it is a cut-off logistic
density where theirs is a squashed normal; the sum over actions is estimated as in their appendix F, without the actions of the
next observation that their code adds; all losses are taken at the same parameters. The conservative weight is fixed, as in CORL,
where d3rlpy multiplies it by a factor that a Lagrangian tunes, with a threshold of 10. Over discrete actions d3rlpy has
batches of 32 and copies the slow network at every 8,000th step; here it is 256, and a hundred times in a training, by default.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, Temperature, soft_actor_losses
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Actions, Categorical, Distribution, LogisticMixture, Space
from offrl_models.losses import (
    conservative_gap,
    double_q_value,
    huber,
    sampled_conservative_gap,
    squared_error,
    td_target,
)
from offrl_models.nets import masked_log_softmax, take


@dataclass(frozen=True, kw_only=True)
class CQLConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=6.25e-5, gt=0)
    alpha: float = Field(default=1.0, ge=0)  # weight of the conservative gap; in units of reward
    target_interval: int | None = Field(default=None, ge=1)  # gradient steps between copies; None: a hundredth of all
    temperature: float = Field(default=0.01, gt=0)  # of the softmax over Q that acts; in units of reward


@dataclass(frozen=True, kw_only=True)
class ContinuousCQLConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256, 256), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)  # of the critics
    actor_learning_rate: float = Field(default=1e-4, gt=0)  # of policy and temperature
    alpha: float = Field(default=5.0, ge=0)  # weight of the conservative gap; in units of reward
    samples: int = Field(default=10, ge=1)  # actions of the policy, and as many uniform ones, that stand for all
    polyak: float = Field(default=0.005, gt=0, le=1)


class CQL(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}

    def __init__(
        self, config: CQLConfig | ContinuousCQLConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]
    ):
        super().__init__()
        self.config, members = config, 1 if isinstance(actions, int) else 2
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members)
        self.target_q = Critic(seeds, "q", encoder, config.hidden, actions, members)
        if isinstance(config, CQLConfig):
            self.draws, self.target_update = 0, (1.0, config.target_interval)
        else:
            self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, components=1)
            self.temperature = Temperature(seeds)
            self.draws, self.target_update = 2 + 2 * config.samples, (config.polyak, 1)

    def learning_rates(self) -> dict[str, float]:
        c = self.config
        if isinstance(c, CQLConfig):
            return {"q": c.learning_rate}
        return {"q": c.learning_rate, "policy": c.actor_learning_rate, "temperature": c.actor_learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        c = self.config
        if isinstance(c, CQLConfig):
            q = self.q.each(batch.observation).squeeze(1)
            with torch.no_grad():
                online, slow = (net.each(batch.next_observation).squeeze(1) for net in (self.q, self.target_q))
            target = td_target(batch.reward, batch.discount, double_q_value(slow, online, batch.next_mask))
            gap = conservative_gap(q, batch.action, batch.mask)
            return {"q": huber(take(q, batch.action), target) + c.alpha * gap}
        policy = self.distribution(batch.observation, None)
        assert batch.uniform is not None and isinstance(policy, LogisticMixture)
        for_actor, for_target, drawn, anywhere = batch.uniform.split([1, 1, c.samples, c.samples], 2)
        with torch.no_grad():
            next_action = self.distribution(batch.next_observation, None).sample(for_target)
            next_value = self.target_q(batch.next_observation, next_action).amin(1).squeeze(-1)
            sampled, log_density = policy.sample_and_log_prob(drawn)
            sampled = torch.cat([sampled, policy.low + policy.width * anywhere[..., 1:]], 2)
            uniform = torch.full_like(log_density, -math.log(2.0) * batch.action.shape[-1])
        q = self.q(batch.observation, torch.cat([batch.action.unsqueeze(2), sampled], 2))
        target = td_target(batch.reward, batch.discount, next_value).unsqueeze(1).expand_as(q[..., 0])
        gap = sampled_conservative_gap(q[..., 1:], torch.cat([log_density, uniform], -1).unsqueeze(1), q[..., 0])
        return {
            "q": (squared_error(q[..., 0], target) + c.alpha * gap).sum(1),
            **soft_actor_losses(policy, self.q, self.temperature, batch.observation, for_actor),
        }

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        if isinstance(self.config, ContinuousCQLConfig):
            return self.policy(observation, mask)
        assert mask is not None
        q = self.q.each(observation).squeeze(1)
        return Categorical(masked_log_softmax(q / self.config.temperature, mask))
