"""Model-based offline policy optimization: a soft actor-critic that practises in a learned model, and pays for its uncertainty.

Yu, Thomas, Yu, Ermon, Zou, Levine, Finn & Ma (2020), https://arxiv.org/abs/2005.13239; defaults of OfflineRL-Kit.
Differences from the paper: the end of the task is learned, too; the largest deviation that a member states counts from what all
members expect and not from what it expects itself, for stated ones alone need not grow away from the data; it is in standard
deviations of the log and costs in those of the reward, so that `penalty` needs no change with their scales; the policy is a cut-off
logistic density where theirs is a squashed normal, and over discrete actions that of the discrete soft actor-critic; all losses are
taken at the same parameters. OfflineRL-Kit lets the actor's learning rate fall by a cosine, holds the temperature to at most 1 and
keeps more rollouts; here rates are constant by default, and `training.schedule: cosine` lets those of all networks fall.
"""

from collections.abc import Sequence
from typing import ClassVar

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
class MOPOConfig(RolloutConfig):
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)  # of the critics
    actor_learning_rate: float = Field(default=1e-4, gt=0)  # of policy and temperature
    penalty: float = Field(default=1.0, ge=0)  # paper: lambda, 0.5 to 5
    entropy_share: float = Field(default=0.05, ge=0, le=1)  # wanted, of the greatest one; of discrete actions
    initial_temperature: float = Field(default=1.0, gt=0)  # in units of reward
    polyak: float = Field(default=0.005, gt=0, le=1)


class MOPO(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    only: ClassVar[dict[str, Space]] = {"entropy_share": "discrete"}
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}

    def __init__(self, config: MOPOConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
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
        """A step of the model, whose reward is less by what its uncertainty costs: eq. 7."""
        step = self.dynamics.step(observation, action, uniform)
        cost = self.config.penalty * self.dynamics.scale[-1] * self.dynamics.deviation(step.prediction)
        return step._replace(reward=step.reward - cost)

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
