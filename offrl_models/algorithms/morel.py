"""Model-based offline reinforcement learning: practise in a learned model that halts, at a loss, where its members disagree.

Kidambi, Rajeswaran, Netrapalli & Joachims (2020), https://arxiv.org/abs/2005.05951; defaults of Unifloral.
Differences from the paper: the planner is a soft actor-critic on branched rollouts, as in Unifloral, with two critics where that
has ten; members state a density, and the end of the task is learned, too; disagreement is measured in standard deviations of the
log and compared with the largest one on rows held out; halting costs 10 standard deviations of the reward where Unifloral, for
returns in the thousands, takes 200 units; all losses are taken at the same parameters. Fewer
rollouts are kept, as `rollouts` says.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, Temperature, soft_losses, soft_next_value
from offrl_models.datasets.encoding import Encoded, Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Actions, Distribution, Space
from offrl_models.dynamics import Dynamics, Simulated
from offrl_models.losses import ensemble_error, td_target
from offrl_models.rollouts import RolloutConfig, Rollouts, refuse_unequal_steps
from offrl_models.schema import Episodes


@dataclass(frozen=True, kw_only=True)
class MOReLConfig(RolloutConfig):
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256, 256), min_length=1)
    learning_rate: float = Field(default=1e-4, gt=0)  # of the critics
    actor_learning_rate: float = Field(default=1e-4, gt=0)  # of policy and temperature
    real_ratio: float = Field(default=0.01, ge=0, le=1)
    halt_threshold: float = Field(default=1.0, gt=0)  # in units of the largest disagreement on rows held out
    halt_penalty: float = Field(default=10.0, ge=0)  # below the least reward of the log; in its standard deviations
    entropy_share: float = Field(default=0.05, ge=0, le=1)  # wanted, of the greatest one; of discrete actions
    initial_temperature: float = Field(default=1.0, gt=0)  # in units of reward
    polyak: float = Field(default=0.005, gt=0, le=1)


class MOReL(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    only: ClassVar[dict[str, Space]] = {"entropy_share": "discrete"}
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}

    def __init__(self, config: MOReLConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.dynamics = Dynamics(config, encoder, actions, seeds)
        self.rollouts = Rollouts(config, self.dynamics, actions, len(seeds))
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.target_q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, components=1)
        self.temperature = Temperature(seeds, config.initial_temperature)
        self.target_update = (config.polyak, 1)
        self.draws = self.rollouts.draws + 2

    def check_log(self, episodes: Episodes) -> None:
        """Raises InputError where decisions are not equally far apart."""
        refuse_unequal_steps(episodes)

    def learning_rates(self) -> dict[str, float]:
        rate = self.config.actor_learning_rate
        return {"q": self.config.learning_rate, "policy": rate, "temperature": rate}

    def simulated(self, observation: Encoded, action: Tensor, uniform: Tensor) -> Simulated:
        """A step of the pessimistic model: definition 1. Where it is unknown what follows, nothing does, and that is costly."""
        c, model, step = self.config, self.dynamics, self.dynamics.step(observation, action, uniform)
        halt = model.disagreement(step.prediction) > c.halt_threshold * model.farthest.unsqueeze(-1)
        cost = model.low[-1] - c.halt_penalty * model.scale[-1]
        return step._replace(
            reward=torch.where(halt, cost, step.reward), discount=torch.where(halt, 0.0, step.discount)
        )

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        assert batch.uniform is not None
        _, for_actor, for_target = batch.uniform.split([self.rollouts.draws, 1, 1], 2)
        batch = self.rollouts.mixed(batch, self.policy, self.simulated)
        policy = self.policy(batch.observation, batch.mask)
        following = self.policy(batch.next_observation, batch.next_mask)
        price, share = self.temperature(), self.config.entropy_share
        next_value = soft_next_value(following, self.target_q, price, batch.next_observation, for_target)
        target = td_target(batch.reward, batch.discount, next_value)
        return {
            "q": ensemble_error(self.q(batch.observation, batch.action), target),
            **soft_losses(
                policy, self.q, self.temperature, batch.observation, batch.mask, for_actor, entropy_share=share
            ),
        }

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
