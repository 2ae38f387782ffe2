"""Conservative offline model-based policy optimization: practise in a learned model, and lower the value of what it made up.

Yu, Kumar, Rafailov, Rajeswaran, Levine & Finn (2021), https://arxiv.org/abs/2102.08363; defaults of OfflineRL-Kit, which
leaves entropy out of the targets, too. No uncertainty of the model is asked for: of simulated and logged observations all actions
are lowered, and of logged ones those taken are raised.
Differences from the paper: the end of the task is learned, too; the policy is a cut-off logistic density where theirs is a squashed
normal, and over discrete actions it is that of the discrete soft actor-critic, where the sum over actions is exact; over continuous
ones it is estimated as in `cql`; all losses are taken at the same parameters. OfflineRL-Kit has a conservative weight of 5, or 0.5
for some tasks, lets the actor's learning rate fall by a cosine and keeps more rollouts; here the weight is 1, rates are constant by
default, and `training.schedule: cosine` lets those of all networks fall.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, Temperature, soft_losses, soft_next_value
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Actions, Categorical, Distribution, Space
from offrl_models.dynamics import Dynamics
from offrl_models.losses import ensemble_error, td_target
from offrl_models.model_losses import simulated_gap
from offrl_models.nets import masked
from offrl_models.rollouts import RolloutConfig, Rollouts, refuse_unequal_steps
from offrl_models.schema import Episodes


@dataclass(frozen=True, kw_only=True)
class COMBOConfig(RolloutConfig):
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256, 256), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)  # of the critics
    actor_learning_rate: float = Field(default=1e-4, gt=0)  # of policy and temperature
    real_ratio: float = Field(default=0.5, gt=0, le=1)
    alpha: float = Field(default=1.0, ge=0)  # paper: beta, 0.5 to 5; weight of the conservative gap, in units of reward
    samples: int = Field(
        default=10, ge=1
    )  # continuous actions of the policy, and as many uniform ones, that stand for all
    entropy_share: float = Field(default=0.05, ge=0, le=1)  # wanted, of the greatest one; of discrete actions
    initial_temperature: float = Field(default=1.0, gt=0)  # in units of reward
    polyak: float = Field(default=0.005, gt=0, le=1)


class COMBO(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    only: ClassVar[dict[str, Space]] = {"entropy_share": "discrete", "samples": "continuous"}
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}

    def __init__(self, config: COMBOConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.dynamics = Dynamics(config, encoder, actions, seeds)
        self.rollouts = Rollouts(config, self.dynamics, actions, len(seeds))
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.target_q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, components=1)
        self.temperature = Temperature(seeds, config.initial_temperature)
        self.target_update = (config.polyak, 1)
        self.samples = 0 if isinstance(actions, int) else config.samples
        self.draws = self.rollouts.draws + 2 + 2 * self.samples

    def check_log(self, episodes: Episodes) -> None:
        """Raises InputError where decisions are not equally far apart."""
        refuse_unequal_steps(episodes)

    def learning_rates(self) -> dict[str, float]:
        rate = self.config.actor_learning_rate
        return {"q": self.config.learning_rate, "policy": rate, "temperature": rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        assert batch.uniform is not None
        parts = [self.rollouts.draws, 1, 1, self.samples, self.samples]
        _, for_actor, for_target, drawn, anywhere = batch.uniform.split(parts, 2)
        batch = self.rollouts.mixed(batch, self.policy, self.dynamics.step)
        policy = self.policy(batch.observation, batch.mask)
        following = self.policy(batch.next_observation, batch.next_mask)
        free = torch.zeros_like(self.temperature())  # entropy is no part of the targets
        next_value = soft_next_value(following, self.target_q, free, batch.next_observation, for_target)
        taken, everywhere = self._values(batch, policy, drawn, anywhere)
        gap = simulated_gap(everywhere, taken[..., : self.rollouts.real(taken.shape[-1])]).sum(1)
        error = ensemble_error(taken, td_target(batch.reward, batch.discount, next_value))
        share = self.config.entropy_share
        return {
            "q": error + self.config.alpha * gap,
            **soft_losses(
                policy, self.q, self.temperature, batch.observation, batch.mask, for_actor, entropy_share=share
            ),
        }

    def _values(
        self, batch: TransitionBatch, policy: Distribution, drawn: Tensor, anywhere: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Q of the actions taken, and log sum_a exp Q(s, a) over all that are allowed, each [seed, member, batch]."""
        if isinstance(policy, Categorical):
            each = self.q.each(batch.observation)
            place = batch.action[:, None, :, None].expand(*each.shape[:3], 1)
            return each.gather(-1, place).squeeze(-1), torch.logsumexp(
                masked(each, batch.mask.unsqueeze(1).expand_as(each)), -1
            )
        with torch.no_grad():
            sampled, log_density = policy.sample_and_log_prob(drawn)
            sampled = torch.cat([sampled, policy.low + policy.width * anywhere[..., 1:]], 2)
            uniform = torch.full_like(log_density, -math.log(2.0) * batch.action.shape[-1])
            density = torch.cat([log_density, uniform], -1).unsqueeze(1)
        q = self.q(batch.observation, torch.cat([batch.action.unsqueeze(2), sampled], 2))
        return q[..., 0], torch.logsumexp(q[..., 1:] - density, -1) - math.log(density.shape[-1])

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
